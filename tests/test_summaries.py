"""Summaries from a table to a comparison: damaged rows by name, splits that share no document,
scores by hand and by the library, any encoder-decoder, bytes after a kill."""

import contextlib
import importlib.util
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import live

from llmeco_nb.core import DataError, MissingError, UsageError, create_record, read_json, sha256_of
from llmeco_nb.data.corpus import read_split
from llmeco_nb.data.splits import split_names
from llmeco_nb.data.summary_corpus import (
    SummaryCorpusConfig,
    build_summary_corpus,
    read_summary_splits,
    small_summary_corpus,
    small_summary_table,
)
from llmeco_nb.data.summary_tables import (
    SummaryColumns,
    aclsum_source,
    read_summaries,
    summary_revision,
)
from llmeco_nb.tasks.predictions import read_predictions_file

quiet = pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
rouge = pytest.importorskip("rouge_score", reason="ROUGE needs the library rouge-score")
from llmeco_nb.finetuning.extracts import (
    document_sentences,
    extract_text,
    lead_scores,
    oracle_sentences,
    stationary_scores,
)
from llmeco_nb.stats.rouge import rouge_scores, rouge_words

GOOD = dict(document="One thing. Another thing.", summary="Things.")
word = st.sampled_from("red hat cat dog the sat on mat".split())
sentence = st.lists(word, min_size=1, max_size=6).map(" ".join)


def jsonl(file: Path, *rows) -> str:
    "A JSON Lines file; a text is written as it is."
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


# -- scores


def longest_common(a: list, b: list) -> int:
    "Length of the longest common subsequence, by trying all of one side's."
    best = 0
    for bits in range(2 ** len(a)):
        some = [x for k, x in enumerate(a) if bits >> k & 1]
        rest = iter(b)
        if len(some) > best and all(x in rest for x in some):
            best = len(some)
    return best


@given(sentence, sentence)
@settings(max_examples=40, deadline=None)
def test_rouge_l_is_that_of_its_definition(one, other):
    cut = rouge_words()
    a, b = cut(one), cut(other)
    expected = 2 * longest_common(a, b) / (len(a) + len(b))
    found = rouge_scores([one], [[other]])
    assert found.rougeL[0] == pytest.approx(expected)
    assert found.rouge1[0] >= found.rougeL[0] - 1e-12
    assert rouge_scores([one], [[one]]).rougeL[0] == 1


@given(st.lists(sentence, min_size=1, max_size=4), sentence)
@settings(max_examples=40, deadline=None)
def test_of_several_references_the_best_counts(references, summary):
    several = rouge_scores([summary], [references])
    alone = [rouge_scores([summary], [[one]]) for one in references]
    for name in ("rouge1", "rouge2", "rougeL"):
        best = max(getattr(one, name)[0] for one in alone)
        assert getattr(several, name)[0] == pytest.approx(best)


def test_another_script_has_words_where_they_are_asked_for():
    with pytest.raises(DataError, match="Item 2: the reference '東京.*unicode"):
        rouge_scores(["a", "東京 は"], [["a"], ["東京 は 晴れ"]])
    found = rouge_scores(["東京 は"], [["東京 は 晴れ"]], "unicode")
    assert found.rougeL[0] == pytest.approx(2 * 2 / 5)


# -- tables


@pytest.mark.parametrize(
    "change,said",
    [
        (dict(document=""), "row 2: the field `document` is empty"),
        (dict(document=None), "row 2: the field `document` is empty"),
        (dict(document="  \n "), "row 2: the field `document` is"),
        (dict(document=[]), "row 2: the field `document` is an empty list"),
        (dict(document=["a", ""]), "row 2: the field `document`, item 2, is blank"),
        (dict(document=7), "row 2: the field `document` holds '7', which is no text"),
        (dict(document={"a": "b"}), "row 2: the field `document` holds"),
        (dict(summary=""), "row 2: the field `summary` is empty"),
        (dict(summary=["fine", None]), "row 2: the field `summary`, item 2, holds 'None'"),
    ],
)
def test_a_damaged_row_is_named_and_skipped_only_if_asked(tmp_path, change, said):
    file = jsonl(tmp_path / "t.jsonl", GOOD, GOOD | change)
    with pytest.raises(DataError, match=f"t.jsonl, {said}.*set damaged to skip"):
        read_summaries(file)
    table = read_summaries(file, SummaryColumns(damaged="skip"))
    assert [row.document for row in table.rows] == [GOOD["document"]] and len(table.skipped) == 1


def test_every_form_of_a_table_gives_the_same_rows(tmp_path):
    rows = [dict(GOOD, about="all"), dict(document="A b. C d.", summary="A d.", about="end")]
    frame = pd.DataFrame(rows)
    files = [
        jsonl(tmp_path / "t.jsonl", *rows),
        str(tmp_path / "t.csv"),
        str(tmp_path / "t.parquet"),
    ]
    frame.to_csv(files[1], index=False)
    frame.to_parquet(files[2])
    found = [read_summaries(file, SummaryColumns(aspect="about")).rows for file in files]
    assert found[0] == found[1] == found[2] and [row.aspect for row in found[0]] == ["all", "end"]
    frame.assign(document=[["A b.", "C."]] * 2, summary=[["x", "y"]] * 2).to_parquet(files[2])
    [row, _] = read_summaries(files[2], SummaryColumns(aspect="about")).rows
    assert row.sentences == ("A b.", "C.") and row.references == ("x", "y")


def test_what_is_no_table_of_summaries_is_refused(tmp_path):
    file = jsonl(tmp_path / "t.jsonl", dict(text="a", label="b"))
    with pytest.raises(DataError, match="has no column `document`.*text, label"):
        read_summaries(file)
    jsonl(tmp_path / "t.jsonl", GOOD | dict(summary=""))
    with pytest.raises(DataError, match="no usable row: 1 are damaged"):
        read_summaries(file, SummaryColumns(damaged="skip"))
    with pytest.raises(MissingError):
        read_summaries(tmp_path / "absent.jsonl")


# -- the corpus


def test_a_document_in_two_splits_is_refused_by_both_rows(tmp_path):
    rows = [dict(document=f"Report number {k} is here.", summary="x") for k in range(9)]
    source = jsonl(tmp_path / "t.jsonl", *rows)
    test = jsonl(
        tmp_path / "test.jsonl",
        GOOD,
        dict(rows[4], summary="y", document="REPORT number 4  is here."),
    )
    config = SummaryCorpusConfig(source=source, test_source=test, validation_size=2)
    with pytest.raises(DataError, match=r"test.jsonl, row 2 \(test\) and .*t.jsonl, row 5"):
        build_summary_corpus(create_record(tmp_path / "r", "summaries"), config)


def test_a_corpus_accounts_for_its_rows(tmp_path):
    body = " ".join(f"word{k}" for k in range(80))
    rows = [
        dict(document=f"The {k}th report says {k * k} and no more.", summary=f"{k}")
        for k in range(20)
    ]
    source = jsonl(
        tmp_path / "t.jsonl",
        *rows,
        dict(document=f"{body} end", summary="w"),
        dict(rows[0], summary="another"),
        rows[1],
        dict(document="Two words.", summary="This one is longer."),
        dict(document="", summary="x"),
    )
    test = jsonl(tmp_path / "test.jsonl", dict(document=f"{body} changed", summary="w"))
    record = create_record(tmp_path / "r", "summaries")
    config = SummaryCorpusConfig(source=source, test_source=test, validation_size=4, damaged="skip")
    corpus = build_summary_corpus(record, config)
    n = record.metrics
    wanted = dict(
        read=26, damaged=1, joined=1, copies=1, longer=1, near_leaks=1, test=1, validation=4
    )
    assert {name: n[name] for name in wanted} == wanted
    assert n["train"] == 17
    parts = read_summary_splits(corpus)
    first = pd.concat(parts.values()).set_index("text").references[rows[0]["document"]]
    assert list(first) == ["0", "another"]
    assert "row 25: the field `document`" in read_json(corpus / "datasheet.json")["damaged_rows"][0]


def test_near_equal_documents_share_a_split(tmp_path):
    draw = np.random.default_rng(0)
    rows = []
    for k in range(40):
        words = [f"w{n}" for n in draw.integers(0, 10**6, 60)]
        for change in (0, 1):
            words[-1] = f"end{change}"
            rows.append(dict(document=" ".join(words), summary=f"{k}"))
    config = SummaryCorpusConfig(source=jsonl(tmp_path / "t.jsonl", *rows))
    corpus = build_summary_corpus(create_record(tmp_path / "r", "summaries"), config)
    sides = {}
    for split, part in read_summary_splits(corpus).items():
        for [reference] in part.references:
            assert sides.setdefault(reference, split) == split
    assert len(sides) == 40 and set(sides.values()) == set(split_names)


def test_stages_that_know_no_summaries_say_so(tmp_path):
    pytest.importorskip("torch")
    from llmeco_nb.evaluation.comparison import evaluate_models
    from llmeco_nb.finetuning.classifier import fine_tune
    from llmeco_nb.finetuning.frozen import fit_frozen

    corpus = str(small_summary_corpus())
    for stage in (fine_tune, fit_frozen, evaluate_models):
        with pytest.raises(
            DataError, match="summarization, which has stages of its own: summaries"
        ):
            stage(create_record(tmp_path / stage.__name__, "any"), corpus)


# -- extracts


@given(st.lists(sentence, min_size=1, max_size=5), sentence)
@settings(max_examples=40, deadline=None)
def test_an_oracle_is_no_worse_than_any_single_sentence(sentences, reference):
    def value(text):
        found = rouge_scores([text], [[reference]])
        return (found.rouge1[0] + found.rouge2[0]) / 2

    chosen = oracle_sentences(sentences, [reference])
    assert chosen == sorted(set(chosen))
    reached = value(" ".join(sentences[k] for k in chosen))
    assert reached >= max(map(value, sentences)) - 1e-9


@given(st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_centrality_solves_its_equation(n, seed):
    links = np.random.default_rng(seed).random((n, n))
    links = links + links.T
    found = stationary_scores(links, 400)
    np.fill_diagonal(links, 0)
    rows = links.sum(1, keepdims=True)
    walk = links / rows if n > 1 else np.ones((1, 1))
    assert np.allclose(found, 0.15 / n + 0.85 * found @ walk) and found.sum() == pytest.approx(1)


def test_a_lead_is_the_beginning():
    cut = document_sentences(read_split(small_summary_corpus(), "test"))
    for one, scores in zip(cut, lead_scores(cut)):
        assert extract_text(one, scores, 2) == " ".join(one[:2])


# -- the stages


def test_an_extractor_is_the_same_again_and_refuses_other_folders(tmp_path):
    pytest.importorskip("torch")
    from llmeco_nb.finetuning.extractor import ExtractorConfig, fit_extractor, open_scorer

    config = ExtractorConfig(most_sentences=3)
    made = [create_record(tmp_path / name, "fit_extractor") for name in "ab"]
    for record in made:
        fit_extractor(record, small_summary_corpus(), "", config)
    for name in ("extractor", "predictions"):
        assert sha256_of(made[0].artifact(name)) == sha256_of(made[1].artifact(name))
    assert made[0].metrics["reopened_changed"] == 0
    with pytest.raises(DataError, match="holds no extractor"):
        open_scorer(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="no corpus of summaries"):
        fit_extractor(made[0], tmp_path / "other")


FEW = dict(
    steps=6, num_evals=2, eval_examples=8, source_length=32, max_new_tokens=6, precision="fp32"
)


@pytest.mark.parametrize("lr", [1e-3, None], ids=["given rate", "chosen rate"])
def test_a_killed_stage_ends_with_the_same_bytes(tmp_path, killed_at, lr):
    pytest.importorskip("torch")
    from llmeco_nb.finetuning.summarizer import SummarizerConfig, tune_summarizer

    corpus, digests = small_summary_corpus(), {}
    config = SummarizerConfig(**FEW, num_beams=2, dropout=0.1, lr=lr, lr_steps=2)

    def tuned(name: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            tune_summarizer(create_record(tmp_path / name, "tune_summarizer"), corpus, "", config)

    killed_at(4, lambda: tuned("hit"))
    assert not (tmp_path / "hit" / "summarizer").exists()
    for name in ("hit", "whole"):
        tuned(name)
        made = [tmp_path / name / part for part in ("summarizer", "predictions")]
        digests[name] = [sha256_of(one) for one in made]
    assert digests["hit"] == digests["whole"]


@pytest.fixture(scope="module")
def stock_folders(tmp_path_factory):
    "Folders of encoder-decoders: BART with random weights, and our own after a few steps."
    pytest.importorskip("torch")
    from transformers import BartConfig, BartForConditionalGeneration

    from llmeco_nb.finetuning.seq2seq_models import small_random_seq2seq
    from llmeco_nb.pretraining.denoising import DenoisingConfig, denoise
    from llmeco_nb.tokenization.wordpiece import open_tokenizer

    words = small_random_seq2seq(small_summary_corpus())
    place, size = tmp_path_factory.mktemp("writers"), open_tokenizer(words).get_vocab_size()
    config = BartConfig(
        vocab_size=size,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_bos_token_id=2,
        forced_eos_token_id=3,
    )
    BartForConditionalGeneration(config).save_pretrained(place / "bart")
    for file in words.glob("tokenizer*"):
        (place / "bart" / file.name).write_bytes(file.read_bytes())
    toy = DenoisingConfig(
        size="1x32",
        seq_len=32,
        max_position_embeddings=64,
        steps=6,
        batch_size=4,
        eval_examples=8,
        num_evals=1,
        final_eval_examples=4,
        baseline_tokens=1000,
        prompts=["The [MASK]."],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        own = denoise(create_record(place / "own", "denoise"), small_summary_corpus(), words, toy)
    return {"bart": place / "bart", "own": own}


@pytest.mark.parametrize("name", ["bart", "own"])
def test_any_encoder_decoder_is_tuned_and_opens_in_plain_transformers(
    stock_folders, tmp_path, name
):
    from transformers import AutoModelForSeq2SeqLM

    from llmeco_nb.finetuning.seq2seq_models import open_seq2seq
    from llmeco_nb.finetuning.summarizer import SummarizerConfig, tune_summarizer

    record = create_record(tmp_path / "r", "tune_summarizer")
    config = SummarizerConfig(**FEW, num_beams=2, lr=3e-3)
    with contextlib.redirect_stdout(io.StringIO()):
        folder = tune_summarizer(record, small_summary_corpus(), str(stock_folders[name]), config)
    n = record.metrics
    assert n["reopened_agrees"] == 1 and n["documents_cut"] > 0, n
    kinds = {"bart": "BartForConditionalGeneration", "own": "MBartForConditionalGeneration"}
    plain = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert type(plain).__name__ == kinds[name]
    before, after = open_seq2seq(stock_folders[name]), open_seq2seq(folder)
    for what in ("start", "forced", "end", "pad", "longest"):
        assert getattr(before, what) == getattr(after, what)
    with pytest.raises(UsageError, match="source_length is 65.*places for 64"):
        tune_summarizer(
            record,
            small_summary_corpus(),
            str(stock_folders[name]),
            config.replace(source_length=65),
        )


def test_padding_carries_no_loss(stock_folders):
    import torch

    from llmeco_nb.finetuning.seq2seq_models import open_seq2seq
    from llmeco_nb.finetuning.seq2seq_training import (
        collate_written,
        encode_written,
        written_loss_step,
    )

    for folder in stock_folders.values():
        opened = open_seq2seq(folder)
        texts = ["The council of Corby.", "It rains over the hills all day in Alden."]
        pairs = encode_written(opened, texts, texts[::-1], 20, 20)
        whole = collate_written(pairs, opened, spare=3)
        opened.model.eval()
        with torch.no_grad():
            both = written_loss_step(opened.model, whole, lambda loss: None)
            parts = [
                written_loss_step(opened.model, collate_written([p], opened), lambda loss: None)
                for p in pairs
            ]
        assert both[1] == sum(n for _, n in parts) == sum(len(p.target) for p in pairs)
        assert float(both[0]) == pytest.approx(sum(float(x) for x, _ in parts), rel=1e-4)


# -- from a table to a comparison


@quiet
def test_from_a_table_to_a_table_of_summarisers(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path))
    small = dict(steps=6, batch_size=4, eval_examples=8, num_evals=1)
    given_parameters = dict(
        summaries=dict(source=str(small_summary_table())),
        tokenizer=dict(vocab_size=500),
        denoise=small
        | dict(
            size="1x32", max_position_embeddings=64, final_eval_examples=4, baseline_tokens=1000
        ),
        fit_extractor=dict(weights="", most_sentences=3),
        tune_summarizer=small
        | dict(source_length=48, target_length=16, max_new_tokens=8, min_new_tokens=0, lr=1e-3),
        compare_summaries=dict(resamples=200, most_sentences=3),
    )
    with warnings.catch_warnings(action="ignore"):
        made = live("summaries", tmp_path / "store", given_parameters)
    table = read_json(made["compare_summaries"] / "summary_table" / "table.json")
    rows = {row["model"]: row for row in table["rows"]}
    assert set(rows) == {"lead", "textrank", "oracle", "extractor", "summarizer"}
    assert rows["lead"]["difference"] is None and table["reference"] == "lead"
    assert rows["extractor"]["difference_low"] > 0, "decisions never stand first"
    assert rows["oracle"]["rougeL"] >= rows["extractor"]["rougeL"] - 0.02
    claims = read_json(made["compare_summaries"] / "claims.json")
    assert {one["text"].split()[0] for one in claims} == {"textrank", "extractor", "summarizer"}
    assert all(one["family"] == 3 and not one["primary"] for one in claims)
    told = read_json(made["fit_extractor"] / "metrics.json")
    assert told["rougeL_test"] == pytest.approx(rows["extractor"]["rougeL"])
    found = read_predictions_file(made["tune_summarizer"] / "predictions", split="test")
    assert len(found) == read_json(made["summaries"] / "metrics.json")["test"]
    for stage, figure in (
        ("summaries", "lengths"),
        ("fit_extractor", "facts"),
        ("tune_summarizer", "loss"),
        ("compare_summaries", "aspects"),
    ):
        assert (made[stage] / "figures" / f"{figure}.png").is_file()


@pytest.mark.skipif(importlib.util.find_spec("aclsum") is None, reason="needs the package aclsum")
def test_the_packaged_papers(tmp_path):
    table = read_summaries(aclsum_source)
    counts = {split: sum(row.split == split for row in table.rows) for split in split_names}
    assert counts == dict(train=300, validation=150, test=300)
    assert table.aspects == ["approach", "challenge", "outcome"]
    assert all(len(row.sentences) > 5 for row in table.rows) and summary_revision(aclsum_source)
    record = create_record(tmp_path / "r", "summaries")
    build_summary_corpus(record, SummaryCorpusConfig(source=aclsum_source))
    n = record.metrics
    assert (n["documents_train"], n["documents_validation"], n["documents_test"]) == (100, 50, 100)
