"""Questions from a file to a served answer: SQuAD's rules, damaged rows by name, splits by article,
windows over any text, bytes after a kill, and a comparison over contexts."""

import contextlib
import io
import json
import string
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import live

from llmeco_nb.core import DataError, UsageError, create_record, read_json, sha256_of
from llmeco_nb.data.question_corpus import (
    QuestionCorpusConfig,
    build_question_corpus,
    made_articles,
    read_question_splits,
    small_question_corpus,
    small_question_table,
)
from llmeco_nb.data.question_tables import QuestionReading, read_questions
from llmeco_nb.stats.answer_match import exact_match, normalized_answer, token_f1
from llmeco_nb.tasks.question_answering import QuestionSchema, ReadContext
from llmeco_nb.tasks.registry import find_task, load_schema, word_tasks
from llmeco_nb.tasks.sentence_baseline import overlap_sentence, sentence_offsets
from llmeco_nb.tasks.text_answers import (
    Answer,
    Question,
    answers_from_json,
    answers_json,
    check_answer_places,
    join_question,
    split_question,
)

quiet = pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
TASK = find_task("question-answering")
letters = st.sampled_from(
    [*"aZé9_.,-'’ \t\n", "\r\n", "e\u0301", "👍🏽", "東", "ก็", "\u200b", "\x02", "\x03", "[SEP]"]
)
texts = st.lists(letters, max_size=25).map("".join)


# -- SQuAD's rules


@pytest.mark.parametrize(
    "text,plain",
    [
        ("The Beatles", "beatles"),
        ("  A\t man,  a plan\n", "man plan"),
        ("U.S.A.", "usa"),
        ("the-end", "theend"),  # punctuation goes first, so the article is no word any more
        ("don't", "dont"),
        ("$1,000.50", "100050"),
        ("50%", "50"),
        ("“The” end", "“ ” end"),  # curly quotes are no ASCII; between them `the` is a word
        ("l’a", "l’"),  # likewise
        ("Athena", "athena"),
        ("ÉCOLE", "école"),
        ("東京 a", "東京"),
        ("an", ""),
        ("_a_", ""),  # the underscore is punctuation, and is gone before the article is looked for
        ("a\u00a0b", "b"),  # a no-break space is white space
    ],
)
def test_answers_are_normalised_in_the_order_of_the_official_scorer(text, plain):
    assert normalized_answer(text) == plain


words = st.lists(st.sampled_from(["the", "a", "Rhine", "rhine,", "big", "...", "b-c"]), max_size=6)
phrases = words.map(" ".join)


@given(phrases, st.lists(phrases, max_size=3))
@settings(max_examples=200, deadline=None)
def test_scores_are_those_of_counting_word_by_word(said, accepted):
    kept = [one for one in accepted if normalized_answer(one)] or [""]

    def by_hand(true: str) -> float:
        left, mine = normalized_answer(true).split(), normalized_answer(said).split()
        if not left or not mine:
            return float(left == mine)
        total, shared = len(left), 0
        for word in mine:
            if word in left:
                left.remove(word)
                shared += 1
        precision, recall = shared / len(mine), shared / total
        return 2 * precision * recall / (precision + recall) if shared else 0.0

    assert token_f1(said, accepted) == pytest.approx(max(map(by_hand, kept)))
    same = [normalized_answer(said) == normalized_answer(one) for one in kept]
    assert exact_match(said, accepted) == float(any(same))
    assert exact_match(said, accepted) <= token_f1(said, accepted) <= 1
    loud = said.upper() + " " + string.punctuation
    assert token_f1(loud, accepted) == token_f1(said, accepted)


# -- answers in a text


@given(texts.filter(str.strip), st.data())
@settings(max_examples=80, deadline=None)
def test_an_answer_is_taken_at_its_place_and_nowhere_else(context, data):
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    answer = Answer(start, context[start:end])
    if not answer.text.strip():
        with pytest.raises(DataError, match="is blank"):
            check_answer_places(context, [answer])
        return
    assert check_answer_places(context, [answer, answer]) == [answer]
    assert answers_from_json(answers_json([answer])) == [answer]
    other = data.draw(st.integers(-2, len(context) + 2))
    moved = Answer(other, answer.text)
    if other < 0 or context[other : other + len(answer.text)] != answer.text:
        with pytest.raises(DataError, match=f"^here: the answer.*at character {other}"):
            check_answer_places(context, [moved], "here")


@given(texts, texts)
@settings(max_examples=80, deadline=None)
def test_a_context_travels_unchanged(question, context):
    found = split_question(join_question(question, context))
    assert found.context == context and len(found.question) == len(question)
    assert split_question(join_question(found.question, context)) == found


@given(texts, texts)
@settings(max_examples=80, deadline=None)
def test_a_sentence_is_a_part_of_its_text(question, text):
    found = sentence_offsets(text)
    inside = [k for start, end in found for k in range(start, end)]
    assert inside == sorted(set(inside))
    assert {k for k, one in enumerate(text) if not one.isspace()} <= set(inside)
    said = overlap_sentence(question, text)
    assert bool(said) == bool(text.strip()) and check_answer_places(text, said) == said


# -- windows


@pytest.fixture(scope="module")
def tokenizer():
    "Of the small encoder: WordPiece, whose pieces are known from the made contexts."
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    from llmeco_nb.finetuning.token_classification import encoder_of_spans

    return AutoTokenizer.from_pretrained(encoder_of_spans(small_question_corpus()))


parts = st.lists(st.one_of(letters, st.sampled_from(["Bo Hall ", "lives ", "Cape Town"])))


@given(parts.map("".join), st.sampled_from(["", "Where?", "Where " * 9, "is [SEP] it"]), st.data())
@settings(max_examples=60, deadline=None)
def test_windows_hold_every_piece_and_every_short_answer(tokenizer, context, question, data):
    from llmeco_nb.finetuning.context_windows import (
        ContextEncoder,
        WindowSettings,
        answer_pieces,
        window_target,
    )

    encode = ContextEncoder(tokenizer.backend_tokenizer, WindowSettings(16, 4, 6, 4))
    one = encode(question, context)
    [whole] = ContextEncoder(tokenizer.backend_tokenizer, WindowSettings(9000, 4, 6, 4))(
        question, context
    ).windows
    ids = whole.input_ids[whole.first : whole.first + whole.pieces]
    assert len(one.offsets) == whole.pieces
    seen = set()
    for window in one.windows:
        assert len(window.input_ids) <= 16
        assert window.input_ids[: window.first] == whole.input_ids[: whole.first]
        own = window.input_ids[window.first : window.first + window.pieces]
        assert own == ids[window.begun : window.begun + window.pieces]
        seen.update(range(window.begun, window.begun + window.pieces))
    assert seen == set(range(len(ids)))
    if not ids:
        return
    first = data.draw(st.integers(0, len(ids) - 1))
    last = data.draw(st.integers(first, min(first + 3, len(ids) - 1)))
    start, end = one.offsets[first][0], one.offsets[last][1]
    pieces = answer_pieces(one.offsets, start, end)
    assert pieces is not None and pieces[0] <= first and last <= pieces[1]
    targets = [window_target(window, (first, last)) for window in one.windows]
    assert any(target != (0, 0) for target in targets)  # no longer than what neighbours share
    for window, (begun, stop) in zip(one.windows, targets):
        if stop:
            assert window.input_ids[begun : stop + 1] == ids[first : last + 1]


# -- files


BASE = dict(question="Where?", context="Ada was born in Oslo.")
OSLO = dict(text="Oslo", answer_start=16)
GOOD = dict(question="Who?", context="Ada was born in Oslo.", answers=[dict(text="Ada", start=0)])


def jsonl(file: Path, *rows) -> str:
    "A JSON Lines file; a text is written as it is."
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def squad(file: Path, *qas, context: str = BASE["context"], **more) -> str:
    "A file in the JSON of SQuAD with one paragraph."
    paragraph = dict(context=context, qas=list(qas))
    told = dict(data=[dict(title="Ada", paragraphs=[paragraph])]) | more
    file.write_text(json.dumps(told), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    "row,said",
    [
        (
            BASE | dict(answers=[OSLO | dict(answer_start=15)]),
            "at character 15.*' Osl' stands there.*at 16",
        ),
        (
            BASE | dict(answers=[dict(text="Rome", answer_start=16)]),
            "'Oslo' stands there.*does not hold it",
        ),
        (BASE | dict(answers=[OSLO | dict(answer_start=19)]), "beyond the context, which has 21"),
        (BASE | dict(answers=[OSLO | dict(answer_start=-4)]), "beyond the context"),
        (BASE | dict(answers=[dict(text=" ", answer_start=3)]), "is blank"),
        (BASE | dict(answers=[OSLO | dict(answer_start=16.0)]), "answer_start=16.0"),
        (BASE | dict(answers=[OSLO | dict(text=None)]), "text=None"),
        (BASE | dict(answers=[16]), "16 is no answer"),
        (BASE | dict(answers=dict(text=["Oslo"])), "lists of other lengths"),
        (BASE | dict(answers=[]), "there is no answer, and the file says that all questions have"),
        (BASE | dict(answers=[OSLO], is_impossible=True), "says that there is no answer.*'Oslo'"),
        (BASE | dict(answers=[OSLO], question=""), "`question` is ''"),
        (BASE | dict(answers=[OSLO], context=" \n"), "`context` is"),
        (BASE | dict(answers=[OSLO], context=7), "`context` is 7"),
        (BASE, "it has the fields question, context"),
        ('{"question": "Where?"', "line 2.*not JSON"),
        ("[1]", "each line must be an object"),
    ],
)
def test_a_damaged_row_is_named_and_skipped_only_if_asked(tmp_path, row, said):
    file = jsonl(tmp_path / "t.jsonl", GOOD, row)
    with pytest.raises(
        DataError, match=f"(?s)t.jsonl, (row|line) 2.*{said.removeprefix('line 2')}"
    ):
        read_questions(file)
    table = read_questions(file, QuestionReading(damaged="skip"))
    assert [r.question for r in table.rows] == ["Who?"] and len(table.skipped) == 1


def test_a_question_of_squad_is_named_by_its_place(tmp_path):
    good = dict(
        id="a", question="Where?", answers=[OSLO, OSLO, dict(text="in Oslo", answer_start=13)]
    )
    none = dict(id="b", question="When?", answers=[], is_impossible=True)
    [row] = read_questions(squad(tmp_path / "t.json", good, version="1.1")).rows
    assert row.answers == ((16, "Oslo"), (13, "in Oslo")) and row.title == "Ada"
    rows = read_questions(squad(tmp_path / "t.json", good, none)).rows
    assert [bool(row.answers) for row in rows] == [True, False]
    place = "t.json, article 1, paragraph 1, question 2"
    for odd, said in (
        (none | dict(is_impossible=False), "there is no answer, and the file says"),
        (none | dict(answers=[OSLO]), "`is_impossible` says"),
        (good | dict(question="Who?"), "the id 'a' is that of article 1, paragraph 1, question 1"),
        (good | dict(id="b", answers=[OSLO | dict(answer_start=0)]), "'Ada ' stands there"),
    ):
        with pytest.raises(DataError, match=f"{place}: .*{said}"):
            read_questions(squad(tmp_path / "t.json", good, odd))
    allowed = QuestionReading(unanswerable="allow")
    file = squad(tmp_path / "t.json", good, none | dict(is_impossible=False))
    assert not read_questions(file, allowed).rows[1].answers
    for told in ([BASE], dict(data=[dict(title="x")]), dict(data=[dict(paragraphs=[dict(qas=1)])])):
        (tmp_path / "o.json").write_text(json.dumps(told))
        with pytest.raises(DataError, match="has no list `(data|paragraphs|qas)` of objects"):
            read_questions(str(tmp_path / "o.json"))


def test_every_form_of_a_file_gives_the_same_rows(tmp_path):
    import pandas as pd

    context = "Ada, “the 1st”, lives in Oslo; 東京 👍🏽 is far."
    told = [("Where?", "Oslo"), ("Which?", "“the 1st”"), ("What is far?", "東京 👍🏽")]
    rows = [dict(question=q, context=context, text=t, start=context.index(t)) for q, t in told]
    listed = [
        dict(
            id=str(k),
            question=r["question"],
            context=context,
            answers=[dict(text=r["text"], answer_start=r["start"])],
        )
        for k, r in enumerate(rows)
    ]
    files = [jsonl(tmp_path / "t.jsonl", *listed)]
    frame = pd.DataFrame(listed)
    frame.to_parquet(tmp_path / "t.parquet")
    pd.DataFrame(
        [
            row
            | dict(answers={k: [a[k] for a in row["answers"]] for k in ("text", "answer_start")})
            for row in listed
        ]
    ).to_parquet(tmp_path / "d.parquet")
    flat = [
        dict(
            id=k, question=r["question"], context=context, answer=r["text"], answer_start=r["start"]
        )
        for k, r in enumerate(rows)
    ]
    pd.DataFrame(flat).to_csv(tmp_path / "t.csv", index=False)
    frame.assign(answers=frame.answers.map(json.dumps)).to_csv(
        tmp_path / "t.tsv", index=False, sep="\t"
    )
    qas = [{k: v for k, v in row.items() if k != "context"} for row in listed]
    files += [str(tmp_path / name) for name in ("t.parquet", "d.parquet", "t.csv", "t.tsv")]
    files.append(squad(tmp_path / "t.json", *qas, context=context))
    expected = [(row["question"], context, ((row["start"], row["text"]),)) for row in rows]
    for file in files:
        found = [(row.question, row.context, row.answers) for row in read_questions(file).rows]
        assert found == expected, file
    for name, said in (("t.xyz", "is no table of questions"), ("", "is a folder")):
        (tmp_path / "t.xyz").write_text("x")
        with pytest.raises(DataError, match=said):
            read_questions(str(tmp_path / name))


# -- corpus


def test_no_context_and_no_article_is_in_two_splits(tmp_path):
    told = made_articles(60, seed=3)
    for k, article in enumerate(told["data"]):  # three contexts an article
        article["title"] = f"Article {k // 3}"
    loud = json.loads(json.dumps(told["data"][0]))  # one context again, elsewhere
    loud["title"], paragraph = "Another article", loud["paragraphs"][0]
    paragraph["context"] = paragraph["context"].upper().replace(" ", "  ")
    paragraph["qas"] = [dict(id="x", question="Who?", answers=[], is_impossible=True)]
    told["data"].append(loud)
    (tmp_path / "t.json").write_text(json.dumps(told))
    record = create_record(tmp_path / "r", "questions")
    config = QuestionCorpusConfig(source=str(tmp_path / "t.json"), seed=4)
    schema, splits = read_question_splits(build_question_corpus(record, config))
    assert schema.unanswerable and sum(map(len, splits.values())) == 181
    groups = {split: set(rows.group) for split, rows in splits.items()}
    assert not groups["train"] & groups["test"] and not groups["validation"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    where = {split for split, rows in splits.items() if set(rows.id) & {"x", "0-0"}}
    assert len(where) == 1
    for rows in splits.values():
        for row in rows.itertuples():
            for a in answers_from_json(row.target):
                assert row.context[a.start : a.end] == a.text


def test_a_corpus_that_cannot_be_split_says_so(tmp_path):
    source = jsonl(tmp_path / "t.jsonl", *[GOOD | dict(question=f"Who {k}?") for k in range(20)])
    record = create_record(tmp_path / "r", "questions")
    with pytest.raises(DataError, match="leaves no question for .*1 articles"):
        build_question_corpus(record, QuestionCorpusConfig(source=source))
    none = jsonl(tmp_path / "n.jsonl", BASE | dict(answers=[], is_impossible=True))
    with pytest.raises(DataError, match="no answer to 1 questions"):
        build_question_corpus(record, QuestionCorpusConfig(source=none))


REAL = {"dev-v1.1.json": 10_570, "xquad.en.json": 1_190}  # files in the JSON of SQuAD 1.1


@pytest.mark.parametrize("name", REAL)
def test_a_real_set_is_read_whole(name, shared_data, tmp_path):
    file = shared_data / name
    if not file.is_file():
        pytest.skip(f"needs {name} in {shared_data}; name a folder that holds it in LLMECO_DATA")
    record = create_record(tmp_path / "r", "questions")
    corpus = build_question_corpus(record, QuestionCorpusConfig(source=str(file)))
    n = record.metrics
    assert (n["read"], n["damaged"]) == (REAL[name], 0)
    kept = n["train"] + n["validation"] + n["test"]
    assert kept + n["duplicates"] + n["conflicts"] == REAL[name] and kept > 0.99 * REAL[name]
    schema, splits = read_question_splits(corpus)
    assert not schema.unanswerable
    assert not set(splits["train"].context) & set(splits["test"].context)
    one = splits["test"]
    last = [answers_json(answers_from_json(target)[-1:]) for target in one.target]
    assert TASK.report(one.target.tolist(), last, schema)["f1"] > 0.999


# -- answers


@given(
    st.integers(0, 5),
    st.integers(0, 5),
    st.floats(0, 1, width=32),
    st.floats(0, 1, width=32),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_stored_answer_is_read_as_it_was(start, length, score, none, unanswerable):
    context = "Ada was here."
    read = ReadContext(context, start, start + length, score, none)
    schema = QuestionSchema(unanswerable=unanswerable)
    [said] = TASK.decode([read], schema)
    assert TASK.from_stored(TASK.to_stored(said)) == said
    assert (said.no_answer is not None) == unanswerable
    if said.answer is not None:
        assert context[said.start : said.end] == said.answer
        assert TASK.correct(said, TASK.answered(said), True).correct
    else:
        assert length == 0 or unanswerable and none > score
        assert TASK.correct(said, [], None).correct
    assert TASK.predict([said])[0] == answers_json(
        [Answer(start, said.answer)] if said.answer else []
    )


# -- training


FEW = dict(
    steps=6,
    num_evals=2,
    eval_examples=8,
    max_length=24,
    overlap=5,
    question_tokens=10,
    precision="fp32",
)


def test_a_killed_stage_ends_with_the_same_bytes(tokenizer, tmp_path, killed_at):
    from llmeco_nb.finetuning.reader import ReaderConfig, tune_reader

    corpus, digests = small_question_corpus(), {}

    def tuned(name: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            record = create_record(tmp_path / name, "tune_reader")
            tune_reader(record, corpus, "", ReaderConfig(**FEW))

    killed_at(4, lambda: tuned("hit"))
    assert not (tmp_path / "hit" / "reader").exists()
    for name in ("hit", "whole"):
        tuned(name)
        made = [tmp_path / name / part for part in ("reader", "predictions")]
        digests[name] = [sha256_of(one) for one in made]
    assert digests["hit"] == digests["whole"]


def test_what_a_reader_cannot_be_told_is_refused(tokenizer, tmp_path):
    from llmeco_nb.finetuning.reader import ReaderConfig, tune_reader

    record = create_record(tmp_path / "r", "tune_reader")
    for options, said in (
        (dict(max_length=9000), "at most 512"),
        (dict(question_tokens=20), "leave 1 for the context"),
        (dict(overlap=11), "neighbours share 11"),
    ):
        with pytest.raises(UsageError, match=said):
            tune_reader(record, small_question_corpus(), "", ReaderConfig(**FEW | options))
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="no corpus of questions"):
        tune_reader(record, tmp_path / "other")


# -- from a file to a served answer


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    "The records of the profile's stages, with a small random encoder."
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="packing an encoder needs the extra `serve`")
    place = tmp_path_factory.mktemp("questions")
    given = dict(
        questions=dict(source=str(small_question_table())),
        tune_reader=dict(steps=250, num_evals=2, eval_examples=100),
        compare_readers=dict(resamples=200),
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setenv("LLMECO_RUNS", str(place))
        return live("question_answering", place / "store", given)


def test_from_a_file_to_a_table_of_readers(made):
    folder = made["compare_readers"] / "question_table"
    table = {row["model"]: row for row in read_json(folder / "table.json")["rows"]}
    assert set(table) == {"no_answer", "overlap_sentence", "reader"}
    one, floor = table["reader"], table["overlap_sentence"]
    assert floor["exact_match"] == 0 < floor["f1"] < one["f1"]
    for metric in ("exact_match", "f1"):
        assert 0 < one[f"{metric}_difference_low"] < one[f"{metric}_difference"]
        assert one[f"{metric}_difference"] == pytest.approx(one[metric] - floor[metric])
    said = read_json(made["compare_readers"] / "claims.json")
    assert [c["text"] for c in said] == [
        "reader beats overlap_sentence in exact match",
        "reader beats overlap_sentence in F1",
    ]
    told = read_json(made["tune_reader"] / "metrics.json")
    assert told["reopened_agrees"] == 1 and told["f1_test"] == pytest.approx(one["f1"])
    config = read_json(made["tune_reader"] / "reader" / "config.json")
    assert config["architectures"] == ["BertForQuestionAnswering"]
    drawn = ("tune_reader", "loss"), ("compare_readers", "scores"), ("questions", "questions")
    for stage, name in drawn:
        assert (made[stage] / "figures" / f"{name}.png").is_file()


def test_the_saved_folder_answers_in_plain_transformers(made):
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    from llmeco_nb.tasks.predictions import read_predictions_file

    folder = made["tune_reader"] / "reader"
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    plain = AutoTokenizer.from_pretrained(folder)
    _, splits = read_question_splits(made["questions"] / "question_corpus")
    told = read_predictions_file(made["tune_reader"] / "predictions", split="test")
    agreed = 0
    for row, said in list(zip(splits["test"].itertuples(), told.prediction))[:20]:
        given = plain(row.question, row.context, return_tensors="pt", return_offsets_mapping=True)
        offsets = given.pop("offset_mapping")[0].tolist()
        with torch.inference_mode():
            out = model(**given)
        first, last = (one[0].softmax(0) for one in (out.start_logits, out.end_logits))
        inside = [k for k, part in enumerate(given.sequence_ids(0)) if part == 1]
        pairs = [(i, j) for i in inside for j in inside if i <= j < i + 12]
        i, j = max(pairs, key=lambda at: float(first[at[0]] * last[at[1]]))
        none = first[0] * last[0] > first[i] * last[j]
        own = [] if none else [Answer(offsets[i][0], row.context[offsets[i][0] : offsets[j][1]])]
        agreed += answers_json(own) == said
    assert agreed == 20


def test_a_bundle_answers_questions_and_takes_corrections(made, tmp_path):
    for library in ("fastapi", "uvicorn", "sqlalchemy"):
        pytest.importorskip(library, reason="serving needs the extra `serve`")
    from llmeco_nb.deployment.manifest import verify
    from llmeco_nb.interaction.client import Client, running_server

    bundle = made["pack_reader"] / "bundle"
    manifest = verify(bundle)
    assert manifest.kind == "reader" and manifest.parity.equal == manifest.parity.items
    _, splits = read_question_splits(made["questions"] / "question_corpus")
    rows = splits["test"].head(40)
    with running_server(bundle, tmp_path / "feedback.sqlite") as address:
        client = Client(address, author="ann")
        assert client.model()["task"] == TASK.name
        reply = client.predict([Question(*pair) for pair in zip(rows.question, rows.context)])
        said = TASK.predict(reply.answers)
        assert TASK.report(rows.target.tolist(), said, manifest.schema)["f1"] > 0.5
        odd = "👍🏽\r\nIt rained all night.  [SEP] " * 20 + "Bo Hall lives in New York."
        [answer] = client.predict(Question("Where does Bo Hall live?", odd)).answers
        assert answer.characters == len(odd)
        if answer.answer is not None:
            assert odd[answer.start : answer.end] == answer.answer
        [blank] = client.predict(Question("Where?", "\u2003 ")).answers
        assert blank.answer is None
        k = next(k for k, one in enumerate(reply.answers) if one.answer is not None)
        told = client.feedback(reply, [dict(start=0, end=3)], item=k)
        assert told.given == [dict(start=0, end=3)] and not told.correct
        assert told.predicted == TASK.answered(reply.answers[k])
        other = next(i for i in range(40) if i != k)
        assert client.feedback(reply, correct=True, item=other).correct
        with pytest.raises(UsageError, match="beyond"):
            client.feedback(reply, [dict(start=0, end=9999)], item=other, key="2")
        schemas = client.ask("GET", "/openapi.json")["components"]["schemas"]
        assert set(schemas["QuestionRequest"]["properties"]) == {"question", "context", "questions"}
        assert {"answer", "start", "end", "score", "no_answer"} < set(
            schemas["AnswerResponse"]["properties"]
        )
        for body, message in (
            (dict(question="Where?"), "context"),
            (dict(text="Where?"), "text"),
            (dict(questions=[dict(question="Where?")]), "context"),
        ):
            with pytest.raises(UsageError, match=message):
                client.ask("POST", "/v1/predict", body)
        assert 'm.task === "question-answering"' in client.http.get("/").text


def test_a_table_gets_its_answers(made, tmp_path):
    import pandas as pd

    from llmeco_nb.deployment.predict import PredictOptions, predict_table
    from llmeco_nb.deployment.predictor import Predictor

    predictor = Predictor.load(made["pack_reader"] / "bundle")
    _, splits = read_question_splits(made["questions"] / "question_corpus")
    rows = splits["test"].head(30)[["id", "question", "context"]].copy()
    rows.loc[3, "question"] = None
    rows.to_csv(tmp_path / "asked.csv", index=False)
    told = predict_table(predictor, tmp_path / "asked.csv", tmp_path / "o.parquet")
    assert (told.rows, told.blank) == (30, 1)
    found = pd.read_parquet(tmp_path / "o.parquet")
    names = ["prediction", *(f"prediction_{n}" for n in ("start", "end", "score", "no_answer"))]
    assert found.columns.tolist() == ["id", "question", "context", *names]
    texts = [join_question(*pair) for pair in zip(rows.question.fillna(""), rows.context)]
    for k, said in enumerate(predictor.predict_batch(texts)):
        row = found.iloc[k]
        if k == 3:
            assert row[names].isna().all()
        elif said.answer is None:
            assert pd.isna(row.prediction) and row.prediction_no_answer > row.prediction_score
        else:
            assert row.prediction == said.answer
            assert row.context[row.prediction_start : row.prediction_end] == said.answer
            assert row.prediction_score == pytest.approx(said.score, abs=1e-4)
    renamed = rows.rename(columns=dict(question="q", context="c"))
    renamed.to_json(tmp_path / "r.jsonl", orient="records", lines=True)
    options = PredictOptions(text_column="q", pair_column="c", prediction_column="said")
    predict_table(predictor, tmp_path / "r.jsonl", tmp_path / "o.jsonl", options)
    last = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[-1])
    assert last["said"] == (
        None if pd.isna(found.prediction.iloc[-1]) else found.prediction.iloc[-1]
    )
    with pytest.raises(DataError, match="question"):
        predict_table(predictor, tmp_path / "r.jsonl", tmp_path / "p.jsonl")


def test_stages_that_know_no_questions_say_so(made, tmp_path):
    from llmeco_nb.deployment.loading import open_model
    from llmeco_nb.deployment.manifest import verify
    from llmeco_nb.evaluation.comparison import evaluate_models
    from llmeco_nb.finetuning.classifier import fine_tune
    from llmeco_nb.finetuning.frozen import fit_frozen
    from llmeco_nb.finetuning.tagger import tune_tagger

    corpus = str(made["questions"] / "question_corpus")
    for stage in (fine_tune, fit_frozen, evaluate_models):
        with pytest.raises(DataError, match="question-answering, which has stages of its own"):
            stage(create_record(tmp_path / stage.__name__, "any"), corpus)
    with pytest.raises(DataError, match="no corpus of spans"):
        tune_tagger(create_record(tmp_path / "tagger", "any"), corpus)
    with pytest.raises(DataError, match="tune_reader"):
        load_schema(made["tune_reader"] / "reader")
    assert TASK.name in word_tasks
    bundle = made["pack_reader"] / "bundle"
    with pytest.raises(DataError, match="knows no engine"):
        open_model(bundle, verify(bundle), engine="openvino-int8")


@quiet
def test_the_server_loads_no_heavy_library(made):
    import subprocess
    import sys

    code = (
        "import sys; from llmeco_nb.deployment.predictor import Predictor; "
        f"Predictor.load({str(made['pack_reader'] / 'bundle')!r}).predict_batch(['Ada']); "
        "print(*sorted({'torch', 'transformers', 'pandas', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "\n", done.stdout + done.stderr


def test_a_repeated_context_is_no_more_evidence():
    from llmeco_nb.stats.significance import bootstrap, difference

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, 40).astype(float), rng.integers(0, 2, 40).astype(float)
    contexts = [f"c{k}" for k in range(40)]
    one = bootstrap(difference, a, b, clusters=contexts, resamples=400)
    many = [np.repeat(x, 5) for x in (a, b, contexts)]
    other = bootstrap(difference, *many[:2], clusters=many[2], resamples=400)
    assert other.high - other.low == pytest.approx(one.high - one.low, rel=0.25)
