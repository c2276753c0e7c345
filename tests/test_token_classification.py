"""Spans from a table to a served answer: offsets of any text, windows, damaged rows by name, bytes
after a kill, and a comparison over sentences."""

import contextlib
import gzip
import io
import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import live

from llmeco_nb.core import DataError, UsageError, create_record, read_json, sha256_of
from llmeco_nb.data.corpus import read_split
from llmeco_nb.data.span_corpus import (
    SpanCorpusConfig,
    build_span_corpus,
    small_span_corpus,
    small_span_table,
)
from llmeco_nb.data.span_tables import SpanReading, read_spans
from llmeco_nb.finetuning.word_windows import answering_windows, window_ranges, window_text
from llmeco_nb.stats.spans import span_report
from llmeco_nb.tasks.registry import find_task, load_schema, word_tasks
from llmeco_nb.tasks.text_spans import (
    TextSpan,
    check_spans,
    from_utf16,
    spans_from_json,
    spans_json,
    tagged_spans,
    word_offsets,
    word_tags,
)
from llmeco_nb.tasks.token_classification import TokenSchema

quiet = pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
TASK = find_task("token-classification")
TYPES = ["LOC", "PER"]

letters = st.sampled_from(
    [*"aZé9_.,-'’ \t\n", "\r\n", "e\u0301", "👍🏽", "👨‍👩‍👧", "東", "ก็", "हि", "\u200b"]
)
texts = st.lists(letters, max_size=25).map("".join)


@st.composite
def spanned(draw):
    "A text and spans of its words, apart from each other."
    text = draw(texts)
    words, spans, place = word_offsets(text), [], 0
    while place < len(words) and draw(st.booleans()):
        first = draw(st.integers(place, len(words) - 1))
        last = draw(st.integers(first, min(first + 3, len(words) - 1)))
        spans.append(TextSpan(words[first][0], words[last][1], draw(st.sampled_from(TYPES))))
        place = last + 1
    return text, spans


@given(spanned())
@settings(max_examples=70, deadline=None)
def test_spans_become_tags_and_spans_again(made_spans):
    text, spans = made_spans
    tags = word_tags(text, spans)
    assert len(tags) == len(word_offsets(text))
    assert tagged_spans(word_offsets(text), tags) == spans
    assert spans_from_json(spans_json(spans[::-1])) == spans
    units = lambda offset: len(text[:offset].encode("utf-16-le", "surrogatepass")) // 2
    other = [TextSpan(units(s.start), units(s.end), s.label) for s in spans]
    assert from_utf16(text, other) == spans


@given(texts)
@settings(max_examples=70, deadline=None)
def test_every_visible_character_is_in_one_word(text):
    words = word_offsets(text)
    assert all(start < end for start, end in words)
    assert all(one[1] <= other[0] for one, other in zip(words, words[1:]))
    inside = [k for start, end in words for k in range(start, end)]
    assert inside == [k for k, one in enumerate(text) if not one.isspace()]


@pytest.mark.parametrize(
    "spans,said",
    [
        ([(0, 12, "PER")], "beyond the text, which has 11 characters"),
        ([(-1, 3, "PER")], "beyond the text"),
        ([(3, 3, "PER")], "is empty"),
        ([(3, 0, "PER")], "is empty"),
        ([(0, 7, "PER"), (4, 7, "LOC")], r"4 to 7.*overlaps the span 0 to 7"),
        ([(3, 7, "PER")], "does not begin with a word.*4 to 7"),
        ([(1, 3, "PER")], "does not begin with a word.*0 to 3: 'Ada'"),
        ([(0, 2, "PER")], "does not end with a word"),
        ([(0, 3, "")], "no type"),
    ],
)
def test_spans_that_words_cannot_tell_are_refused_with_their_offsets(spans, said):
    with pytest.raises(DataError, match=f"^here: the span.*{said}"):
        check_spans("Ada met Bo.", [TextSpan(*s) for s in spans], "here")


def test_half_a_character_is_no_place():
    with pytest.raises(DataError, match="row 2: the span 1 to 5.*surrogate pair, at 1"):
        from_utf16("👍 Ada", [TextSpan(1, 5, "PER")], "row 2")
    with pytest.raises(DataError, match="beyond the text"):
        check_spans("👍", from_utf16("👍", [TextSpan(0, 3, "PER")]))


# -- windows


@given(st.integers(0, 80), st.integers(1, 20), st.data())
@settings(max_examples=70, deadline=None)
def test_windows_answer_every_piece_once_and_far_from_a_cut(pieces, room, data):
    overlap = data.draw(st.integers(0, room - 1))
    ranges = window_ranges(pieces, room, overlap)
    assert ranges[0][0] == 0 and ranges[-1][1] == pieces
    assert all(end - start == min(room, pieces) for start, end in ranges)
    found = answering_windows(ranges, range(pieces))
    assert found == sorted(found) and len(found) == pieces
    for piece, window in enumerate(found):
        start, end = ranges[window]
        assert start <= piece < end
        if start > 0:
            assert piece - start >= overlap // 2
        if end < pieces:
            assert end - 1 - piece >= (overlap - 1) // 2
    with pytest.raises(UsageError, match="overlap"):
        window_ranges(pieces, room, room)


@pytest.fixture(scope="module")
def tokenizer():
    "Of the small encoder: WordPiece, whose pieces are known from the made sentences."
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    from llmeco_nb.finetuning.token_classification import encoder_of_spans

    return AutoTokenizer.from_pretrained(encoder_of_spans(small_span_corpus()))


@given(st.lists(st.one_of(letters, st.sampled_from(["Florence ", "lives", "New York "]))))
@settings(max_examples=40, deadline=None)
def test_a_word_is_answered_by_its_first_piece_in_one_window(tokenizer, parts):
    text = "".join(parts)
    [told] = tokenizer([text]).encodings
    whole = window_text(text, told, 10_000, 0)
    small = window_text(text, told, 9, 3)
    [only] = whole.windows
    assert only.input_ids == told.ids
    first = {word: told.ids[place] for place, word in only.places}
    owned = [(word, one.input_ids[place]) for one in small.windows for place, word in one.places]
    assert sorted(owned) == sorted(first.items())  # each once, by the same piece
    for place, word in only.places:
        start, end = whole.words[word]
        assert told.offsets[place][0] < end and told.offsets[place][1] > start
        assert not any(o[0] < end and o[1] > start for o in told.offsets[1:place] if o[0] >= start)
    assert max(len(one.input_ids) for one in small.windows) <= 9


# -- tables

GOOD = dict(text="Ada met Bo.", spans=[dict(start=0, end=3, label="PER")])


def jsonl(file: Path, *rows) -> str:
    "A JSON Lines file; a text is written as it is."
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def span(start, end, label="PER", text="Ada met Bo."):
    "A row with one span."
    return dict(text=text, spans=[dict(start=start, end=end, label=label)])


@pytest.mark.parametrize(
    "row,said",
    [
        (span(0, 99), "row 2: the span 0 to 99.*beyond the text"),
        (span(4, 4), "row 2: the span 4 to 4.*is empty"),
        (span(3, 7), "row 2: the span 3 to 7.*does not begin with a word"),
        (span("0", 3), "row 2: a span has start='0'"),
        (span(0, True), "row 2: a span has start=0, end=True"),
        (span(0, 3, None), "row 2.*label=None"),
        (dict(text="Ada"), "row 2: it has the fields text"),
        (dict(text=7, spans=[]), "row 2: it has the fields text, spans"),
        (dict(text="Ada", spans=[[0, 3, "PER"]]), r"row 2: \[0, 3, 'PER'\] is no span"),
        (dict(tokens=["Ada"], tags=[]), "row 2: 1 tokens and 0 tags"),
        (
            dict(tokens=["Ada"], tags=["I-PER"]),
            "row 2, token 1: I-PER at the beginning is not IOB2",
        ),
        (
            dict(tokens=["Ada", "B"], tags=["B-PER", "I-LOC"]),
            "row 2, token 2: I-LOC after B-PER is not",
        ),
        (dict(tokens=["Ada"], tags=["PER"]), "row 2, token 1: 'PER' is no tag"),
        (
            dict(tokens=["Ada"], tags=["S-PER"]),
            "row 2, token 1: 'S-PER' is a tag of the scheme IOBES",
        ),
        (dict(tokens=["Ada"], tags=[1]), "row 2: 1 stands among tokens and tags"),
        (dict(tokens=[" "], tags=["O"]), "row 2, token 1: ' ' is blank"),
        ('{"text": "Ada"', "line 2.*not JSON"),
        ("[1]", "row 2: each line must be an object"),
        ('{"text": "\\ud83d", "spans": []}', "line 2.*half of a character"),
    ],
)
def test_a_damaged_row_is_named_and_skipped_only_if_asked(tmp_path, row, said):
    file = jsonl(tmp_path / "t.jsonl", GOOD, row)
    with pytest.raises(DataError, match=f"(?s)t.jsonl, {said}.*set damaged to skip"):
        read_spans(file)
    table = read_spans(file, SpanReading(damaged="skip"))
    assert [r.text for r in table.rows] == ["Ada met Bo."] and len(table.skipped) == 1
    assert "t.jsonl, " in table.skipped[0]


def test_every_form_of_a_table_gives_the_same_rows(tmp_path):
    tokens = [["Ada", "van", "Dyk", "met", "Bo", "."], ["New", "York", "Rome"]]
    tags = {
        "iob2": [["B-PER", "I-PER", "I-PER", "O", "B-PER", "O"], ["B-LOC", "I-LOC", "B-LOC"]],
        "iob1": [["I-PER", "I-PER", "I-PER", "O", "I-PER", "O"], ["I-LOC", "I-LOC", "B-LOC"]],
        "iobes": [["B-PER", "I-PER", "E-PER", "O", "S-PER", "O"], ["B-LOC", "E-LOC", "S-LOC"]],
    }
    expected = None
    for scheme, own in tags.items():
        rows = [dict(tokens=t, tags=g) for t, g in zip(tokens, own)]
        columns = "-DOCSTART- -X- O\n\n" + "\n".join(
            "".join(f"{t} NN {g}\n" for t, g in zip(*pair)) for pair in zip(tokens, own)
        )
        files = [jsonl(tmp_path / "t.jsonl", *rows)]
        (tmp_path / "t.conll").write_text(columns)
        (tmp_path / "t.tsv").write_bytes(columns.replace(" ", "\t").replace("\n", "\r\n").encode())
        (tmp_path / "t.iob.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + columns.encode()))
        files += [str(tmp_path / name) for name in ("t.conll", "t.tsv", "t.iob.gz")]
        for file in files:
            read = read_spans(file, SpanReading(tag_scheme=scheme))
            found = [(row.text, row.spans) for row in read.rows]
            expected = expected or found
            assert found == expected, (scheme, file)
            if scheme == "iob1":
                with pytest.raises(DataError, match="not IOB2.*iob1"):
                    read_spans(file)
    text, spans = expected[0]
    assert [text[s.start : s.end] for s in spans] == ["Ada van Dyk", "Bo"]
    assert len(expected[1][1]) == 2


def test_what_is_no_table_of_spans_is_refused(tmp_path):
    (tmp_path / "t.xyz").write_text("Ada B-PER\n")
    (tmp_path / "t.tsv").write_text("Ada\tB-PER\nmet\n")
    (tmp_path / "e.jsonl").write_text("\n")
    for name, said in (
        ("t.xyz", "is no table of spans"),
        ("t.tsv", "line 2: 'met' has one column"),
        ("e.jsonl", "no usable row"),
        ("", "is a folder"),
    ):
        with pytest.raises(DataError, match=said):
            read_spans(str(tmp_path / name))


def test_a_corpus_accounts_for_its_rows_and_refuses_what_training_lacks(tmp_path):
    rows = [span(0, 3, text=f"Ada met n{k}.") for k in range(30)]
    source = jsonl(tmp_path / "t.jsonl", *rows, rows[0], dict(text=" ", spans=[]))
    test = jsonl(tmp_path / "test.jsonl", rows[3], rows[3])
    record = create_record(tmp_path / "a", "spans")
    corpus = build_span_corpus(record, SpanCorpusConfig(source=source, test_source=test))
    n = record.metrics
    told = {k: n[k] for k in ("duplicates", "conflicts", "leaks", "blank", "test", "read")}
    assert told == dict(duplicates=1, conflicts=0, leaks=1, blank=1, test=2, read=34)
    assert n["train"] + n["validation"] == 29 and read_split(corpus, "test").id.is_unique
    jsonl(tmp_path / "test.jsonl", rows[3], span(0, 3, "ORG"))
    with pytest.raises(DataError, match="test.jsonl, row 2: the span 0 to 3.*'ORG'"):
        build_span_corpus(
            create_record(tmp_path / "b", "spans"),
            SpanCorpusConfig(source=source, test_source=test),
        )
    jsonl(tmp_path / "t.jsonl", dict(text="Ada", spans=[]))
    with pytest.raises(DataError, match="no span in 1 rows"):
        build_span_corpus(create_record(tmp_path / "c", "spans"), SpanCorpusConfig(source=source))


# -- scores


@given(st.lists(st.tuples(spanned(), st.data()), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_scores_of_spans_are_those_of_their_tags(cases):
    "Which are equal to those of seqeval (tests/test_spans.py)."
    targets, predicted, true, said = [], [], [], []
    for (text, spans), data in cases:
        words = word_offsets(text)
        tag = st.sampled_from(TokenSchema(types=TYPES).tags)
        tags = data.draw(st.lists(tag, min_size=len(words), max_size=len(words)))
        targets.append(spans_json(spans))
        predicted.append(spans_json(tagged_spans(words, tags)))
        true.append(word_tags(text, spans))
        said.append(tags)
    found = TASK.report(targets, predicted, TokenSchema(types=TYPES))
    expected = span_report(true, said)
    for name in ("precision", "recall", "f1"):
        assert found[name] == pytest.approx(expected[name])
    for name in TYPES:
        assert found[f"f1_{name}"] == pytest.approx(expected.get(f"f1_{name}", 0.0))


@given(st.builds(TASK.Prediction, spans=st.just([]), types=st.just(TYPES)))
@settings(max_examples=20, deadline=None)
def test_a_stored_answer_is_read_as_it_was(answer):
    assert TASK.from_stored(TASK.to_stored(answer)) == answer
    assert TASK.correct(answer, [], None).correct


# -- training


FEW = dict(steps=6, num_evals=2, eval_examples=8, max_length=16, overlap=4, precision="fp32")


def test_a_killed_stage_ends_with_the_same_bytes(tokenizer, tmp_path, killed_at):
    from llmeco_nb.finetuning.tagger import TaggerConfig, tune_tagger

    corpus, digests = small_span_corpus(), {}
    config = TaggerConfig(**FEW, class_weights="balanced")

    def tuned(name: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            tune_tagger(create_record(tmp_path / name, "tune_tagger"), corpus, "", config)

    killed_at(4, lambda: tuned("hit"))
    assert not (tmp_path / "hit" / "tagger").exists()
    for name in ("hit", "whole"):
        tuned(name)
        made = [tmp_path / name / part for part in ("tagger", "predictions")]
        digests[name] = [sha256_of(one) for one in made]
    assert digests["hit"] == digests["whole"]


def test_what_a_tagger_cannot_be_told_is_refused(tokenizer, tmp_path):
    from llmeco_nb.finetuning.tagger import TaggerConfig, tune_tagger

    record = create_record(tmp_path / "r", "tune_tagger")
    for options, said in ((dict(max_length=9000), "at most 512"), (dict(overlap=14), "overlap 14")):
        with pytest.raises(UsageError, match=said):
            tune_tagger(record, small_span_corpus(), "", TaggerConfig(**FEW | options))
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="no corpus of spans"):
        tune_tagger(record, tmp_path / "other")


# -- from a table to a served answer


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    "The records of the profile's stages, with a small random encoder."
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="packing an encoder needs the extra `serve`")
    place = tmp_path_factory.mktemp("spans")
    given = dict(
        spans=dict(source=str(small_span_table())),
        tune_tagger=dict(steps=70, num_evals=1, eval_examples=40),
        compare_spans=dict(resamples=200),
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setenv("LLMECO_RUNS", str(place))
        return live("token_classification", place / "store", given)


def test_from_a_table_to_a_table_of_taggers(made):
    folder = made["compare_spans"] / "span_table"
    table = {row["model"]: row for row in read_json(folder / "table.json")["rows"]}
    assert set(table) == {"no_entity", "word_tag", "tagger"}
    assert table["no_entity"]["f1"] == 0 < table["word_tag"]["f1"] < table["tagger"]["f1"]
    one = table["tagger"]
    assert 0 < one["difference_low"] < one["difference"] < one["difference_high"]
    assert one["difference"] == pytest.approx(one["f1"] - table["word_tag"]["f1"])
    [said] = read_json(made["compare_spans"] / "claims.json")
    assert said["primary"] and said["text"] == "tagger beats word_tag in entity F1"
    told = read_json(made["tune_tagger"] / "metrics.json")
    assert told["reopened_agrees"] == 1 and told["f1_test"] == pytest.approx(one["f1"])
    config = read_json(made["tune_tagger"] / "tagger" / "config.json")
    assert list(config["id2label"].values()) == TokenSchema(types=TYPES).tags
    assert config["architectures"] == ["BertForTokenClassification"]
    for stage, name in (("tune_tagger", "loss"), ("compare_spans", "types"), ("spans", "texts")):
        assert (made[stage] / "figures" / f"{name}.png").is_file()


def test_a_bundle_answers_spans_and_takes_corrections(made, tmp_path):
    for library in ("fastapi", "uvicorn", "sqlalchemy"):
        pytest.importorskip(library, reason="serving needs the extra `serve`")
    from llmeco_nb.deployment.manifest import verify
    from llmeco_nb.interaction.client import Client, running_server

    bundle = made["pack_tagger"] / "bundle"
    manifest = verify(bundle)
    assert manifest.kind == "tagger" and manifest.parity.equal == manifest.parity.items
    rows = read_split(made["spans"] / "span_corpus", "test")
    with running_server(bundle, tmp_path / "feedback.sqlite") as address:
        client = Client(address, author="ann")
        assert client.model()["task"] == TASK.name
        reply = client.predict(rows.text.tolist()[:40])
        said = TASK.predict(reply.answers)
        found = TASK.report(rows.target.tolist()[:40], said, manifest.schema)
        assert found["f1"] > 0.5
        odd = "👍🏽\r\nAda lives in New York.  " * 30  # several windows
        [answer] = client.predict([odd]).answers
        assert answer.spans and answer.characters == len(odd)
        assert all(odd[s.start : s.end] == s.text for s in answer.spans)
        assert check_spans(odd, [TextSpan(s.start, s.end, s.label) for s in answer.spans])
        right = [dict(start=0, end=3, label="PER")]
        told = client.feedback(reply, right)
        assert told.given == right and told.predicted == TASK.answered(reply.answers[0])
        assert client.feedback(reply, [], item=1).given == []
        assert client.feedback(reply, correct=True, item=2).correct
        for wrong in ([dict(start=0, end=3, label="X")], [dict(start=0, end=999, label="PER")]):
            with pytest.raises(UsageError, match="type|beyond"):
                client.feedback(reply, wrong, item=3)


def test_stages_that_know_no_spans_say_so(made, tmp_path):
    from llmeco_nb.deployment.loading import open_model
    from llmeco_nb.deployment.manifest import verify
    from llmeco_nb.deployment.predict import predict_table
    from llmeco_nb.deployment.predictor import Predictor
    from llmeco_nb.evaluation.comparison import evaluate_models
    from llmeco_nb.finetuning.classifier import fine_tune
    from llmeco_nb.finetuning.frozen import fit_frozen

    corpus = str(made["spans"] / "span_corpus")
    for stage in (fine_tune, fit_frozen, evaluate_models):
        with pytest.raises(DataError, match="token-classification, which has stages of its own"):
            stage(create_record(tmp_path / stage.__name__, "any"), corpus)
    with pytest.raises(DataError, match="tune_tagger"):
        load_schema(made["tune_tagger"] / "tagger")
    assert TASK.name in word_tasks
    bundle = made["pack_tagger"] / "bundle"
    predictor = Predictor.load(bundle)
    with pytest.raises(UsageError, match="finds spans"):
        predict_table(predictor, "t.csv", tmp_path / "said.csv")
    with pytest.raises(DataError, match="knows no engine"):
        open_model(bundle, verify(bundle), engine="openvino-int8")


@quiet
def test_the_server_loads_no_heavy_library(made):
    import subprocess
    import sys

    code = (
        "import sys; from llmeco_nb.deployment.predictor import Predictor; "
        f"Predictor.load({str(made['pack_tagger'] / 'bundle')!r}).predict_batch(['Ada']); "
        "print(*sorted({'torch', 'transformers', 'pandas', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "\n", done.stdout + done.stderr
