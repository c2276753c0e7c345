"""What is served is what was measured: rows of a raw table, sent to the server, get the labels that
the comparison table has for them, whatever kind of model answers.
"""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llmeco_nb.core import create_record, read_json
from llmeco_nb.data.corpus import CorpusConfig, build_corpus, read_split
from llmeco_nb.deployment.bundle import BundleConfig, build_bundle
from llmeco_nb.deployment.manifest import verify
from llmeco_nb.evaluation.comparison import EvaluationConfig, evaluate_models
from llmeco_nb.finetuning.classifier import fine_tune
from llmeco_nb.finetuning.classifier_config import ClassifierConfig
from llmeco_nb.tasks.limits import max_request_texts
from llmeco_nb.tasks.predictions import read_predictions_file
from llmeco_nb.tasks.registry import load_schema

SAID = {
    "escaped": {
        "bad": "can&#x27;t won&#x27;t isn&#x27;t",
        "good": "it&#x27;s they&#x27;re I&#x27;m",
    },
    "thai": {"bad": "แย่ น่าเบื่อ ผิดหวัง", "good": "ดี สนุก ยอดเยี่ยม"},
    "long": {"bad": "awful dull broken", "good": "lovely bright sound"},
}
OTHER = {
    "escaped": "the &amp; film <br/> story that I saw".split(),
    "thai": "หนัง เรื่อง นี้ มาก และ เพลง".split(),
    "long": "page after page of what nobody asked about".split(),
}
LABELS = ["bad", "good"]


def raw_text(rng, sort: str, label: str, i: int, before: int = 0) -> str:
    "A text in which words of the class stand at the end, most of the time."
    said = label if rng.random() < 0.8 else LABELS[1 - LABELS.index(label)]
    between = "" if sort == "thai" else " "
    words = [*rng.choice(OTHER[sort], 6), *rng.choice(SAID[sort][said].split(), 2)]
    text = f"{i} {between.join(words)}"
    return "page after page of what nobody asked about " * before + text


def raw_table(seed: int, rows: int) -> pd.DataFrame:
    "A table with the three sorts of texts in equal parts; a fifth of the long ones is long indeed."
    rng = np.random.default_rng(seed)
    found = []
    for i in range(rows):
        sort, label = list(SAID)[i % 3], LABELS[int(rng.integers(0, 2))]
        before = 480 if i % 15 == 2 else 0  # just above 20,000 characters
        text = raw_text(rng, sort, label, 10_000 * seed + i, before)
        found.append(dict(text=text, label=label, sort=sort))
    return pd.DataFrame(found)


@pytest.fixture(scope="module")
def serving():
    "A client of the server that answers from a bundle; all are skipped without the extra `serve`."
    for library in ("fastapi", "httpx", "sqlalchemy", "onnxruntime"):
        pytest.importorskip(library, reason="serving needs the extra `serve`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the test client about its HTTP library
        from fastapi.testclient import TestClient

    from llmeco_nb.deployment.executor import ExecutorOptions
    from llmeco_nb.deployment.server import make_app

    return lambda *place: TestClient(make_app(*place, ExecutorOptions(deadline=300)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory, serving):
    "The raw test table, the corpus, a small encoder's folder, and the table that compares models."
    place = tmp_path_factory.mktemp("measured")
    raw = raw_table(2, 510)
    raw_table(1, 600).to_csv(place / "train.csv", index=False)
    raw.to_csv(place / "test.csv", index=False)
    config = CorpusConfig(
        source=str(place / "train.csv"), test_source=str(place / "test.csv"), max_rows=None
    )
    corpus = build_corpus(create_record(place / "data-0", "data"), config)
    assert len(read_split(corpus, "test")) == len(raw)
    brief = ClassifierConfig(max_length=24, epochs=2, num_evals=1, eval_examples=30, lr=2e-3)
    record = create_record(place / "finetune-0", "finetune")
    classifier = fine_tune(record, str(corpus), config=brief)
    table = evaluate_models(
        create_record(place / "evaluate-0", "evaluate"),
        str(corpus),
        [str(record.artifact("predictions"))],
        EvaluationConfig(num_labeled=[0], learning_curve=[], models=["majority", "nbsvm"]),
    )
    return place, raw, corpus, classifier, table


@pytest.fixture(scope="module", params=["linear", "onnx", "stack"])
def served(request, measured):
    "The labels that the table has for the raw rows, and the bundle of the row that was chosen."
    place, raw, corpus, classifier, table = measured
    kind, model = request.param, dict(linear="nbsvm", onnx="own", stack="stack")[request.param]
    chosen = Path(shutil.copytree(table, place / f"table-{kind}"))
    told = read_json(chosen / "table.json")
    for row in told["rows"]:  # so that this one is the best
        row["validation_accuracy"] = float(row["model"] == model)
    (chosen / "table.json").write_text(json.dumps(told))
    bundle = build_bundle(
        create_record(place / f"bundle-{kind}", "bundle"),
        str(corpus),
        [str(classifier)],
        str(table.parent / "baselines"),
        str(chosen),
        BundleConfig(parity_examples=60),
    )
    manifest = verify(bundle)
    assert (manifest.kind, manifest.origin.model) == (kind, model)
    answers = read_predictions_file(table / "predictions.parquet", model, split="test")
    schema, test = load_schema(corpus), read_split(corpus, "test")
    by_text = dict(zip(test.text, test.id))
    ids = [by_text[schema.prepare(text)] for text in raw.text]
    assert len(set(ids)) == len(raw)
    predicted = answers.set_index("id").loc[ids].prediction
    right = answers.target == answers.prediction
    assert right.mean() == next(r["accuracy"] for r in told["rows"] if r["model"] == model)
    return bundle, [schema.labels[i] for i in predicted]


def test_the_server_answers_as_the_table_says(served, serving, measured, tmp_path):
    bundle, expected = served
    raw = measured[1]
    long = raw.text.str.len() > 20_000
    assert long.sum() == 34 and set(raw.sort[long]) == {"long"}
    asked, said = raw.text.tolist(), []
    with serving(bundle, tmp_path / "feedback.sqlite") as client:
        for start in range(0, len(asked), max_request_texts):
            part = dict(texts=asked[start : start + max_request_texts])
            reply = client.post("/v1/predict", json=part)
            assert reply.status_code == 200, reply.text
            said += [answer["label"] for answer in reply.json()["answers"]]
    assert said == expected
    for sort in SAID:  # a model that answers one thing only would prove nothing
        kept = {label for label, own in zip(said, raw.sort) if own == sort}
        # a tokenizer may know no Thai
        assert kept == set(LABELS) or (sort == "thai" and len(kept) == 1), sort
    assert {label for label, own in zip(said, long) if own} == set(LABELS)


def test_the_tables_texts_are_raw(measured):
    "The test would be empty if preparing changed nothing."
    _, raw, corpus, _, _ = measured
    prepared = [load_schema(corpus).prepare(text) for text in raw.text]
    changed = raw.text != prepared
    assert changed[raw.sort == "escaped"].all()
