"""Several labels for a text: from a table to a served answer, and what is refused on the way."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import live
from sklearn.metrics import accuracy_score, f1_score, hamming_loss

from llmeco_nb.core import DataError, UsageError, create_record, read_json
from llmeco_nb.data.corpus import CorpusConfig, build_corpus, read_split
from llmeco_nb.finetuning.linear import LinearText
from llmeco_nb.finetuning.training_half import LossOptions
from llmeco_nb.stats.multi_label import (
    as_sets,
    example_f1,
    multi_label_metrics,
    multi_label_report,
    multi_label_statistic,
)
from llmeco_nb.stats.significance import bootstrap
from llmeco_nb.tasks.multi_label import MultiLabelSchema
from llmeco_nb.tasks.registry import load_schema

quiet = pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
TASK = "multi-label-classification"
TOPICS = {
    "plot": ["story", "twist", "ending"],
    "actors": ["cast", "acting", "role"],
    "music": ["song", "score", "tune"],
}
FILLER = "the a film with and of some this was very".split()


def topic_rows(count: int, seed: int = 0) -> list[dict]:
    "Texts in which each topic that applies has three of its words; a fifth of them has none."
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        topics = [name for name in TOPICS if rng.random() < 0.42]
        words = [word for name in topics for word in rng.choice(TOPICS[name], 3)]
        words += [*rng.choice(FILLER, 5), f"n{seed}x{i}"]
        rows.append(dict(text=" ".join(rng.permutation(words)), topics=topics))
    return rows


def write_table(file: Path, rows: list[dict], sign: str = "|") -> str:
    "A CSV table with a sign between labels, or JSONL with lists."
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        joined = [row | dict(topics=sign.join(row["topics"])) for row in rows]
        pd.DataFrame(joined).to_csv(file, index=False)
    return str(file)


def corpus_of(folder: Path, source: str, **more) -> Path:
    "The corpus of a table with columns text and topics."
    asked = dict(task=TASK, label_column="topics", max_rows=None) | more
    return build_corpus(create_record(folder, "data"), CorpusConfig(source=source, **asked))


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 63)), min_size=1, max_size=30),
)
@settings(max_examples=80, deadline=None)
def test_metrics_of_sets_are_those_of_scikit_learn(labels, pairs):
    y, p = np.array(pairs).T % 2**labels
    one, two = ((a[:, None] >> np.arange(labels)) & 1 for a in (y, p))
    found = multi_label_report(y, p, labels)
    with warnings.catch_warnings(action="ignore"):
        if labels > 1:  # scikit-learn takes a single column for two classes
            assert found["micro_f1"] == pytest.approx(f1_score(one, two, average="micro"))
            assert found["macro_f1"] == pytest.approx(f1_score(one, two, average="macro"))
            by_item = f1_score(one, two, average="samples", zero_division=1)
            assert example_f1(y, p).mean() == pytest.approx(by_item)
        assert found["exact_match"] == pytest.approx(accuracy_score(one, two))
        assert found["hamming_loss"] == pytest.approx(hamming_loss(one, two))


@pytest.mark.parametrize("true,predicted", [(0, 0), (0, 7), (7, 0), (7, 7)])
def test_metrics_of_sets_that_are_all_empty_or_all_full(true, predicted):
    y, p = np.full(5, true), np.full(5, predicted)
    one, two = ((a[:, None] >> np.arange(3)) & 1 for a in (y, p))
    found = multi_label_report(y, p, 3)
    for average in ("micro", "macro"):
        expected = f1_score(one, two, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(expected)
    assert found["exact_match"] == float(true == predicted)
    assert example_f1(y, p).tolist() == [float(true == predicted)] * 5


def test_every_metric_of_sets_has_an_interval():
    rng = np.random.default_rng(3)
    inside = rng.random((150, 4)) < 0.4
    y, p = as_sets(inside), as_sets(inside ^ (rng.random((150, 4)) < 0.2))
    for name in multi_label_metrics:
        found = bootstrap(multi_label_statistic(name, 4), y, p, resamples=300)
        assert found.low < found.estimate < found.high
        assert found.estimate == pytest.approx(multi_label_report(y, p, 4)[name])
    with pytest.raises(UsageError, match="accuracy"):
        multi_label_statistic("accuracy", 4)


@pytest.mark.parametrize("name,more", [("t.jsonl", {}), ("t.csv", dict(label_separator=";"))])
def test_a_list_and_every_sign_give_the_same_corpus(tmp_path, name, more):
    rows = topic_rows(60)
    plain = corpus_of(tmp_path / "a", write_table(tmp_path / "plain.csv", rows))
    source = write_table(tmp_path / name, rows, more.get("label_separator", "|"))
    same = corpus_of(tmp_path / "b", source, **more)
    for split in ("train", "validation", "test"):
        assert read_split(same, split).equals(read_split(plain, split))
    every = pd.concat([read_split(plain, s) for s in ("train", "validation", "test")])
    assert len(every) == 60 and (every.target == 0).any()  # rows without a label stay
    assert every.target.dtype == np.int64
    schema = load_schema(plain)
    assert schema.labels == ["actors", "music", "plot"]
    told = {row["text"]: set(row["topics"]) for row in rows}
    assert all(set(schema.names(r.target)) == told[r.text] for r in every.itertuples())
    sheet = read_json(plain / "datasheet.json")
    assert sum(sheet["balance"]["train"].values()) == sum(
        len(told[text]) for text in read_split(plain, "train").text
    )
    assert sheet["label_separator"] == "|" and "target_column" not in sheet


def test_sixty_two_labels_are_kept_to_the_last_bit(tmp_path):
    names = [f"l{i:02}" for i in range(62)]
    rows = [dict(text=f"text n{i}", topics=[names[i % 62], names[61]]) for i in range(150)]
    rows = [row | dict(topics=list(dict.fromkeys(row["topics"]))) for row in rows]
    corpus = corpus_of(tmp_path / "a", write_table(tmp_path / "t.jsonl", rows))
    targets = read_split(corpus, "train").target
    assert (targets >= 2**61).all() and load_schema(corpus).labels == names


def test_equal_texts_with_other_labels_are_a_conflict(tmp_path):
    rows = topic_rows(60)
    other = [name for name in TOPICS if name not in rows[0]["topics"]]
    rows.append(rows[0] | dict(topics=other))
    corpus = corpus_of(tmp_path / "a", write_table(tmp_path / "t.csv", rows))
    [told] = read_json(corpus / "datasheet.json")["copies"]["contradictions"]
    said = [", ".join(sorted(one)) or "no label" for one in (rows[0]["topics"], other)]
    assert set(told["labels"]) == set(said)


@pytest.mark.parametrize(
    "change,more,said",
    [
        (lambda rows: rows, dict(label_column="labels"), r"no column `labels`.*label_column"),
        (lambda rows: [r | dict(topics=["one"]) for r in rows], {}, "has 1 labels: one"),
        (lambda rows: [r | dict(topics=[]) for r in rows], {}, "has 0 labels"),
        (lambda rows: [r | dict(topics=["a", "b"]) for r in rows], {}, "same labels in all of 60"),
        (
            lambda rows: [r | dict(topics=[f"l{i}", f"m{i}"]) for i, r in enumerate(rows)],
            {},
            "120 different labels.*at most 62",
        ),
        (lambda rows: [rows[0] | dict(topics=["plot"] * 2), *rows], {}, "row 1: a label is named"),
        (lambda rows: rows, dict(label_separator=";"), r"cells hold the sign '\|'"),
        (lambda rows: [r | dict(topics=["x" * 101, "y"]) for r in rows[:9]] + rows, {}, "101 char"),
    ],
)
def test_tables_that_are_refused(tmp_path, change, more, said):
    source = write_table(tmp_path / "t.csv", change(topic_rows(60)))
    with pytest.raises(DataError, match=said):
        corpus_of(tmp_path / "a", source, **more)


def test_a_label_that_training_lacks_is_named_with_its_row(tmp_path):
    source = write_table(tmp_path / "t.csv", topic_rows(60))
    held = topic_rows(20, seed=1)
    held[3]["topics"] = ["plot", "sound"]
    other = write_table(tmp_path / "v.csv", held)
    with pytest.raises(DataError, match="v.csv, row 4: 'sound'.*actors, music, plot"):
        corpus_of(tmp_path / "a", source, validation_source=other)


def test_texts_without_a_table_are_refused(tmp_path):
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match="texts alone"):
        corpus_of(tmp_path / "a", str(tmp_path / "t.txt"))


def test_the_loss_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from llmeco_nb.finetuning.classifier import halves

    half, labels = halves[TASK], 5
    torch.manual_seed(0)
    logits, inside = torch.randn(7, labels), torch.rand(7, labels) < 0.4
    targets = torch.tensor(as_sets(inside.numpy()))
    own = torch.nn.BCEWithLogitsLoss()(logits, inside.float())  # of multi_label_classification
    assert half.loss(logits, targets) / 7 == pytest.approx(float(own), abs=1e-6)
    weights = half.balanced_weights(targets.tolist(), MultiLabelSchema(labels=list("abcde")))
    counts = inside.sum(0).numpy()
    assert weights == pytest.approx([(7 - n) / n if 0 < n < 7 else 1.0 for n in counts])
    weighted = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))(logits, inside.float())
    found = half.loss(logits, targets, LossOptions(class_weights=weights)) / 7
    assert found == pytest.approx(float(weighted), abs=1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The records of the profile's stages, with a small random encoder."
    pytest.importorskip("torch")
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="packing an encoder needs the extra `serve`")
    place = tmp_path_factory.mktemp("topics")
    source = write_table(place / "topics.csv", topic_rows(260))
    given = dict(
        data=dict(source=source, label_column="topics", max_rows=None),
        finetune=dict(
            weights="", max_length=32, epochs=6, min_steps=0, num_evals=2, device="cpu", lr=3e-3
        )
        | dict(class_weights="balanced", rdrop=0.5, dropout=0.1, label_smoothing=0.05),
        evaluate=dict(num_labeled=[60, 0], learning_curve=[30]),
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setenv("LLMECO_RUNS", str(place))
        return live("multi_label", place / "store", given)


def test_from_a_table_to_a_table_of_models(made):
    table = read_json(made["evaluate"] / "table" / "table.json")
    names = {row["model"] for row in table["rows"]}
    assert names == {"minilm", "frequent_set", "ovr_tfidf_lr", "ovr_nbsvm"}
    assert table["no_stack"].startswith("No stack") and table["task"] == TASK
    best = max(table["rows"], key=lambda row: row["micro_f1"])
    assert best["micro_f1"] > 0.9 and best["micro_f1_low"] <= best["micro_f1"]
    told = read_json(made["finetune@minilm"] / "metrics.json")
    constant = max(r["micro_f1"] for r in table["rows"] if r["model"] == "frequent_set")
    assert told["micro_f1_test"] > constant and told["reopened_agrees"] == 1
    config = read_json(made["finetune@minilm"] / "classifier" / "config.json")
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == ["actors", "music", "plot"]


def test_a_saved_baseline_answers_as_it_was_measured(made):
    [folder] = (made["evaluate"] / "baselines").glob("ovr_tfidf_lr-1*")
    model = LinearText.load(folder)
    assert model.activation == "sigmoid"
    scores = model.outputs(["the story twist ending song score tune", "this was very"])
    assert (scores[0] > 0.5).tolist() == [False, True, True] and (scores[1] < 0.5).all()
    facts = read_json(folder / "model.json")
    (folder / "model.json").write_text(json.dumps(facts | dict(activation="relu")))
    with pytest.raises(DataError, match="relu"):
        LinearText.load(folder)
    (folder / "model.json").write_text(json.dumps(facts))


def test_a_bundle_is_served_and_corrected(made, tmp_path):
    for library in ("fastapi", "uvicorn", "sqlalchemy"):
        pytest.importorskip(library, reason="serving needs the extra `serve`")
    from llmeco_nb.deployment.manifest import verify
    from llmeco_nb.interaction.client import Client, running_server
    from llmeco_nb.interaction.feedback import freeze, read_frozen

    bundle, rows = made["bundle"] / "bundle", read_split(made["data"] / "corpus", "test")
    manifest = verify(bundle)
    assert manifest.task.name == TASK and manifest.labels == ["actors", "music", "plot"]
    with running_server(bundle, tmp_path / "feedback.sqlite") as address:
        client = Client(address, author="ann")
        assert client.model()["task"] == TASK
        reply = client.predict(rows.text.tolist())
        said = [sum(1 << manifest.labels.index(n) for n in a.labels) for a in reply.answers]
        found = multi_label_report(rows.target.to_numpy(), np.array(said), 3)
        assert found["micro_f1"] == pytest.approx(manifest.metrics["test"]["micro_f1"], abs=1e-3)
        told = client.feedback(reply, ["plot", "actors"])
        assert told.given == ["actors", "plot"] and told.predicted == reply.answers[0].labels
        assert client.feedback(reply, [], item=1).given == []
        assert client.feedback(reply, correct=False, item=2).given is None
        assert not client.feedback(reply, [], item=1).stored  # the same again
        for wrong in (["sound"], ["plot", "plot"], "plot"):
            with pytest.raises(UsageError, match="labels"):
                client.feedback(reply, wrong, item=3)
    assert freeze(tmp_path, tmp_path / "frozen") == 2
    given = [row.given for row in read_frozen(tmp_path / "frozen")]
    assert sorted(map(str, given)) == ["['actors', 'plot']", "[]"]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_table_gets_its_labels(made, tmp_path, ending):
    from llmeco_nb.deployment.predict import PredictOptions, predict_table
    from llmeco_nb.deployment.predictor import Predictor

    predictor = Predictor.load(made["bundle"] / "bundle")
    table = tmp_path / "ask.csv"
    texts = ["a story with twist and song score tune", None, "this was very"]
    pd.DataFrame({"text": texts, "n": [1, 2, 3]}).to_csv(table, index=False)
    output = tmp_path / f"said{ending}"
    predict_table(predictor, str(table), output, PredictOptions(all_scores=True))
    read = dict(zip((".csv", ".jsonl", ".parquet"), (pd.read_csv, pd.read_json, pd.read_parquet)))
    more = dict(lines=True) if ending == ".jsonl" else {}
    found = read[ending](output, **more)
    expected = predictor.predict_batch([texts[0]])[0]
    assert found.prediction[0] == "|".join(expected.labels)
    assert found.prediction_score_plot[0] == pytest.approx(expected.scores["plot"], abs=1e-3)
    assert np.isnan(found.prediction_score_plot[1])


def test_stages_that_know_no_sets_say_so(made, tmp_path):
    from llmeco_nb.finetuning.frozen import fit_frozen
    from llmeco_nb.finetuning.race import RaceConfig, race
    from llmeco_nb.interaction.feedback import interact
    from llmeco_nb.interaction.improve import improve

    corpus, bundle = str(made["data"] / "corpus"), str(made["bundle"] / "bundle")
    for name, stage, inputs in (
        ("interact", interact, (corpus, bundle)),
        ("improve", improve, (corpus, bundle)),
        ("frozen", fit_frozen, (corpus,)),
        ("race", race, (corpus, "", RaceConfig())),
    ):
        with pytest.raises(UsageError, match=TASK):
            stage(create_record(tmp_path / name, name), *inputs)


@quiet
def test_the_server_loads_no_heavy_library(made):
    import subprocess
    import sys

    code = (
        "import sys; from llmeco_nb.deployment.predictor import Predictor; "
        f"Predictor.load({str(made['bundle'] / 'bundle')!r}).predict_batch(['a song']); "
        "print(*sorted({'torch', 'transformers', 'pandas', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "\n", done.stdout + done.stderr
