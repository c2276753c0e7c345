"""What is served is prepared as what was trained, and any task of the contract can be served."""

import html
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

for library in ("fastapi", "uvicorn", "sqlalchemy", "onnxruntime"):
    pytest.importorskip(library, reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
import pandas as pd
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from smallbundle import make_bundle
from test_gateway import fields, values

from llmeco_nb.core import DataError, Record, UsageError, create_record, read_json
from llmeco_nb.data.corpus import CorpusConfig, build_corpus, read_split, small_corpus
from llmeco_nb.deployment.bundle import (
    build_bundle,
    match_checkpoint,
    stored_scores,
)
from llmeco_nb.deployment.loading import open_model
from llmeco_nb.deployment.manifest import manifest_digest, verify, write_manifest
from llmeco_nb.deployment.packing import (
    model_schema,
    pack_encoder,
    pack_linear,
    parity,
    reference_scores,
)
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.deployment.server import make_app
from llmeco_nb.evaluation.comparison import evaluate_models
from llmeco_nb.evaluation.stacking import StackMember
from llmeco_nb.finetuning.linear import LinearText, RowSplit, fit, recipes
from llmeco_nb.finetuning.ngram_counts import count_ngrams
from llmeco_nb.interaction.client import Client, running_server
from llmeco_nb.interaction.feedback import freeze, interact, read_frozen
from llmeco_nb.interaction.improve import improve
from llmeco_nb.tasks.contract import Cleaning
from llmeco_nb.tasks.predictions import predictions_table, write_predictions
from llmeco_nb.tasks.registry import load_schema, save_schema, task_of
from llmeco_nb.tasks.regression import RegressionSchema
from llmeco_nb.tasks.text_classification import ClassificationSchema

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the test client about its HTTP library
    from fastapi.testclient import TestClient

ROOT = Path(__file__).resolve().parent.parent

# -- texts are prepared


@pytest.fixture(scope="module")
def escaped(tmp_path_factory):
    """Texts with `&#x27;` where an apostrophe was, and a corpus and a linear bundle made of them:
    who says "don't" is not content."""
    place = tmp_path_factory.mktemp("escaped")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(240):
        bad = i % 2
        verb = ["would", "could", "did", "do"][rng.integers(4)] + ("n&#x27;t" if bad else "")
        thing = ["jacket", "lamp", "order", "coat"][rng.integers(4)]
        text = f"I {verb} say the {thing} I got on day {i} was worth it"
        rows.append(dict(text=text, label=["good", "bad"][bad]))
    table = pd.DataFrame(rows)
    table.to_csv(place / "table.csv", index=False)
    record = create_record(place / "data", "data")
    corpus = build_corpus(record, CorpusConfig(source=str(place / "table.csv")))
    parts = {split: read_split(corpus, split) for split in ("train", "validation")}
    every = pd.concat(parts.values())
    bags = recipes["tfidf_lr"].bags
    counted = {bag.analyzer: count_ngrams(every.text.tolist(), bag) for bag in bags}
    n = len(parts["train"])
    split = RowSplit(np.arange(n), np.arange(n, len(every)), np.arange(0))
    schema = load_schema(corpus)
    model, _ = fit("tfidf_lr", counted, every.label.to_numpy(), split, schema.labels)
    model.save(place / "model")
    (place / "bundle").mkdir()
    write_manifest(place / "bundle", pack_linear(place / "model", place / "bundle", "nots", schema))
    return place / "bundle", table


def share_right(labels, table) -> float:
    return float(np.mean([a == b for a, b in zip(labels, table.label)]))


def test_an_escaped_text_is_served_as_it_was_trained(escaped, tmp_path):
    bundle, table = escaped
    texts = table.text.tolist()
    assert all("&#x27;" in t for t in texts[1::2])
    by_engine = [a.label for a in Predictor.load(bundle).predict_batch(texts)]
    with running_server(bundle, tmp_path / "f.sqlite") as address:
        client = Client(address)
        asked = [client.predict(texts[i : i + 60]) for i in range(0, len(texts), 60)]
        assert client.model()["schema"]["cleaning"] == {"keep_newlines": False, "version": 1}
    by_server = [a.label for reply in asked for a in reply.answers]
    assert by_server == by_engine and share_right(by_server, table) == 1.0
    # without the preparation, the same bundle is wrong about some of them
    manifest = verify(bundle)
    raw = replace(manifest, schema=replace(manifest.schema, cleaning=None))
    picked = open_model(bundle, raw).scores(texts).argmax(1)
    assert share_right([manifest.labels[i] for i in picked], table) < 0.95


def test_every_way_in_prepares_a_text(escaped, tmp_path):
    bundle, table = escaped
    raw = table.text[1]
    plain = html.unescape(raw)
    model = open_model(bundle, verify(bundle))
    assert (model.scores([raw]) == model.scores([plain])).all()
    assert model.cost(raw) == model.cost(plain)
    with TestClient(make_app(bundle, tmp_path / "f.sqlite")) as c:
        one, two = (c.post("/v1/predict", json={"text": t}).json()["answers"] for t in (raw, plain))
        assert one == two
        refused = c.post("/v1/predict", json={"texts": ["good", " <br/>&nbsp;"]})
        assert refused.status_code == 422
        assert "texts.1 holds nothing but markup" in refused.json()["error"]["message"]


def test_a_bundle_of_an_earlier_version_is_served_as_it_was(tmp_path):
    "Versions 1 and 2 held no schema, and texts went to the model as they were sent."
    folder = make_bundle(tmp_path / "bundle")
    raw = read_json(folder / "manifest.json")
    raw["format_version"], raw["labels"] = 2, raw.pop("schema")["labels"]
    del raw["task"]
    raw["digest"] = manifest_digest(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))
    manifest = verify(folder)
    assert manifest.schema == ClassificationSchema(labels=["negative", "positive"])
    assert (manifest.task.name, manifest.format_version) == ("text-classification", 2)
    model = open_model(folder, manifest)
    assert model.prepare("&lt;good&gt;") == "&lt;good&gt;"


@pytest.mark.parametrize(
    "change,said",
    [
        (dict(schema={"task": "telepathy"}), "telepathy"),
        (dict(schema={"task": "regression"}), "low"),
        (dict(schema={"task": "regression", "low": 0, "high": 1, "cleaning": {"version": 9}}), "9"),
        (dict(schema={}), "names its task"),
        (dict(schema=[]), "names its task"),
    ],
)
def test_a_schema_that_cannot_be_read_is_refused_by_name(change, said, tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    raw = {**read_json(folder / "manifest.json"), **change}
    raw["digest"] = manifest_digest(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match="manifest.json.*" + said):
        verify(folder)


def test_another_preparation_is_another_digest(tmp_path):
    labels = ["negative", "positive"]
    digests = {
        verify(make_bundle(tmp_path / name, schema=schema)).digest
        for name, schema in (
            ("raw", ClassificationSchema(labels=labels)),
            ("cleaned", ClassificationSchema(labels=labels, cleaning=Cleaning())),
            ("lines", ClassificationSchema(labels=labels, cleaning=Cleaning(keep_newlines=True))),
        )
    }
    assert len(digests) == 3


# -- a regression, from a fitted model's folder to a served answer


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    "A corpus of texts with numbers, and the folder of a fine-tuned encoder with one output."
    pytest.importorskip("torch")
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from llmeco_nb.data.corpus import small_corpus
    from llmeco_nb.finetuning.checkpoints import small_random_encoder
    from llmeco_nb.finetuning.classifier import save_classifier

    place = tmp_path_factory.mktemp("ratings")
    reviews = small_corpus()
    rng = np.random.default_rng(0)
    parts = {}
    for name in ("train", "validation", "test"):
        rows = read_split(reviews, name).head(40)
        parts[name] = rows.assign(target=1990 + 30 * rng.random(len(rows))).drop(columns="label")
    (place / "corpus").mkdir()
    for name, rows in parts.items():
        rows.to_parquet(place / "corpus" / f"{name}.parquet")
    seen = parts["train"].target
    schema = RegressionSchema(low=seen.min(), high=seen.max(), cleaning=Cleaning())
    save_schema(schema, place / "corpus")
    encoder = str(small_random_encoder(reviews))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    save_classifier(model, tokenizer, place / "model", 64, 25)
    own = schema.standardised(seen)
    save_schema(own, place / "model")
    answers = []
    for name in ("validation", "test"):
        rows = parts[name]
        scores = reference_scores(place / "model", rows.text.tolist(), own)
        answers.append(predictions_table(task_of(own), name, rows, scores, "tiny", 40))
    write_predictions(pd.concat(answers, ignore_index=True), place / "predictions.parquet")
    record = create_record(place / "evaluate-0", "evaluate")
    evaluate_models(record, str(place / "corpus"), [str(place / "predictions.parquet")])
    return place


def build(place: Path, name: str, best: str) -> tuple[Path, Record]:
    "A bundle of the model that a copy of the table, where `best` has the least error, prefers."
    table = shutil.copytree(place / "evaluate-0" / "table", place / f"table-{name}")
    told = read_json(table / "table.json")
    for row in told["rows"]:
        if row["model"] == best:
            row["validation_mae"] = 0.0
    (table / "table.json").write_text(json.dumps(told))
    record = create_record(place / f"{name}-0", "bundle")
    folders = [str(place / "model")]
    baselines = str(place / "evaluate-0" / "baselines")
    return build_bundle(record, str(place / "corpus"), folders, baselines, str(table)), record


@pytest.fixture(scope="module")
def rating_bundle(ratings):
    return build(ratings, "encoder", "tiny")[0]


def test_a_linear_regression_is_served(ratings, tmp_path):
    bundle, record = build(ratings, "ridge", "tfidf_ridge")
    manifest = verify(bundle)
    assert (manifest.kind, manifest.task.name) == ("linear", "regression")
    assert record.metrics["mae_validation"] == 0.0 and record.metrics["mae_test"] > 0
    text = read_split(ratings / "corpus", "test").text[0]
    model = LinearText.load(bundle)
    with TestClient(make_app(bundle, tmp_path / "f.sqlite")) as c:
        [answer] = c.post("/v1/predict", json={"text": text}).json()["answers"]
    assert answer["value"] == pytest.approx(float(model.outputs([text])[0, 0]), abs=1e-3)


@pytest.mark.parametrize("unit,shift", [(1e6, -10), (1e-6, 0)])
def test_the_unit_of_the_targets_changes_no_verdict(tmp_path, unit, shift):
    "Large negative targets are compared, and a changed model of tiny ones is not packed."
    rng = np.random.default_rng(0)
    words = np.array(["awful", "bad", "fine", "good", "great"])
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, n in (("train", 60), ("validation", 30), ("test", 30)):
        drawn = rng.integers(0, 5, (n, 4))
        texts = [f"{' '.join(words[k])} t{i}" for i, k in enumerate(drawn)]
        target = unit * (drawn.mean(1) + shift + 0.1 * rng.normal(size=n))
        rows = dict(id=[f"{name}-{i}" for i in range(n)], text=texts, target=target)
        pd.DataFrame(rows).to_parquet(corpus / f"{name}.parquet")
    seen = pd.read_parquet(corpus / "train.parquet").target
    save_schema(RegressionSchema(low=seen.min(), high=seen.max()), corpus)
    table = evaluate_models(create_record(tmp_path / "evaluate-0", "evaluate"), str(corpus))
    row = max(read_json(table / "table.json")["rows"], key=lambda r: r["r2"])
    assert row["model"] == "tfidf_ridge" and row["r2"] > 0.8
    saved = table.parent / "baselines"
    given = str(corpus), [], str(saved), str(table)
    bundle = build_bundle(create_record(tmp_path / "bundle-0", "bundle"), *given)
    assert verify(bundle).schema.scale == pytest.approx(seen.std(ddof=0))
    [answer] = Predictor.load(bundle).predict_batch(["great great great great"])
    assert answer.value == pytest.approx(unit * (4 + shift), abs=unit)
    for file in saved.glob("tfidf_ridge-*/weights_0.npy"):
        np.save(file, 1.01 * np.load(file))
    with pytest.raises(DataError, match="does not answer as the original"):
        build_bundle(create_record(tmp_path / "bundle-1", "bundle"), *given)


def test_a_fitted_regression_is_served(ratings, rating_bundle, tmp_path):
    manifest = verify(rating_bundle)
    own = load_schema(ratings / "model")
    assert manifest.schema == own and own.scale > 5 and manifest.labels == []
    assert manifest.parity.equal == manifest.parity.items == 40
    texts = read_split(ratings / "corpus", "test").text.tolist()[:5]
    reference = reference_scores(ratings / "model", texts, own)[:, 0]
    assert np.ptp(reference) > 0
    with running_server(rating_bundle, tmp_path / "feedback.sqlite") as address:
        client = Client(address, author="ann")
        facts = client.model()
        assert facts["task"] == "regression" and facts["schema"]["mean"] == own.mean
        assert facts["metrics"] == manifest.metrics and "accuracy" not in facts
        reply = client.predict(texts)
        assert reply.model.task == "regression"
        assert np.abs([a.value for a in reply.answers] - reference).max() < 1e-3
        escaped = client.predict("It&#x27;s <b>fine</b>").answers
        assert escaped == client.predict("It's fine").answers
        told = client.feedback(reply, 2001.5)
        assert (told.stored, told.given, told.correct) == (True, 2001.5, False)
        assert told.predicted == reply.answers[0].value
        assert not client.feedback(reply, 2001.5).stored
        assert client.feedback(reply, correct=True, item=1).given == reply.answers[1].value
        for wrong in ("positive", 2002.0):
            with pytest.raises(UsageError, match="value|other feedback"):
                client.feedback(reply, wrong)
    assert freeze(tmp_path, tmp_path / "frozen") == 2
    rows = read_frozen(tmp_path / "frozen")
    assert {r.given for r in rows} == {2001.5, reply.answers[1].value}


def test_the_document_describes_the_task_that_is_served(rating_bundle, tmp_path):
    wanted = {
        "NumberResponse": (rating_bundle, "NumberFeedback"),
        "ClassResponse": (make_bundle(tmp_path / "words"), "LabelFeedback"),
    }
    for response, (bundle, feedback) in wanted.items():
        with TestClient(make_app(bundle, tmp_path / f"{response}.sqlite")) as c:
            document = c.get("/openapi.json").json()
        models = document["components"]["schemas"]
        other = wanted.keys() - {response}
        assert {response, feedback, "TextRequest"} <= models.keys()
        assert not other & models.keys()
        post = document["paths"]["/v1/predict"]["post"]
        assert post["requestBody"]["content"]["application/json"]["schema"] == {
            "$ref": "#/components/schemas/TextRequest"
        }
        reply = post["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
        answers = models[reply.rpartition("/")[2]]["properties"]["answers"]
        assert answers["items"] == {"$ref": f"#/components/schemas/{response}"}


@pytest.mark.parametrize("body", [{}, {"value": "NaN"}, {"value": 1e999}, {"label": "good"}])
def test_a_correction_that_is_no_number_is_refused(rating_bundle, tmp_path, body):
    with TestClient(make_app(rating_bundle, tmp_path / "f.sqlite")) as c:
        asked = c.post("/v1/predict", json={"text": "good"}).json()["request_id"]
        content = json.dumps({**body, "request_id": asked}).replace("Infinity", "1e999")
        r = c.post("/v1/feedback", content=content, headers={"Content-Type": "application/json"})
        assert r.status_code == 422 and "value" in r.json()["error"]["message"], r.text


def test_a_regression_that_reads_less_than_the_original_fails_parity(ratings, tmp_path):
    own = load_schema(ratings / "model")
    facts = pack_encoder(ratings / "model", tmp_path, "ratings", own)
    texts = read_split(ratings / "corpus", "test").text.tolist()[:20]
    original = reference_scores(ratings / "model", texts, own)
    same = parity(original, open_model(tmp_path, facts).scores(texts), 1e-4, own)
    assert same.items == same.equal == 20 and same.max_difference < 1e-3
    shorter = open_model(tmp_path, replace(facts, max_length=4)).scores(texts)
    with pytest.raises(DataError, match="does not answer as the original"):
        parity(original, shorter, 1e-4, own)


def test_a_checkpoint_that_answers_otherwise_is_not_matched_however_many_classes(tmp_path):
    "Among 100 classes most probabilities are near 0 in any model: a mean over all says nothing."
    pytest.importorskip("transformers")
    from llmeco_nb.finetuning.checkpoints import build_classifier, small_random_encoder
    from llmeco_nb.finetuning.classifier import save_classifier

    schema = ClassificationSchema(labels=[f"class {i}" for i in range(100)])
    classifier = build_classifier(str(small_random_encoder(small_corpus())), schema.labels)
    save_classifier(*classifier, tmp_path / "classifier", 64, 25)
    texts = read_split(small_corpus(), "validation").text.tolist()[:8]
    ids = [str(i) for i in range(8)]
    rows = pd.DataFrame(dict(id=ids, label=range(8)))
    row = StackMember("onnx", "own", "own", 100)
    own = reference_scores(tmp_path / "classifier", texts, schema)
    sure = np.full((8, 100), 0.1 / 99, np.float32)
    sure[np.arange(8), np.arange(8)] = 0.9
    task = task_of(schema)
    given = [str(tmp_path / "classifier")], tmp_path, texts, ids, schema
    file = tmp_path / "predictions.parquet"
    write_predictions(predictions_table(task, "validation", rows, own, "own", 100), file)
    assert match_checkpoint(row, *given) == str(tmp_path / "classifier")
    write_predictions(predictions_table(task, "validation", rows, sure, "own", 100), file)
    with pytest.raises(DataError, match="No classifier answers as own does"):
        match_checkpoint(row, *given)


def test_a_table_of_another_corpus_is_refused_by_its_file(tmp_path):
    rows = pd.DataFrame(dict(id=["1", "2"], label=[0, 1]))
    task = task_of(ClassificationSchema(labels=["a", "b"]))
    scores = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    table = predictions_table(task, "validation", rows, scores, "own", 100)
    write_predictions(table, tmp_path / "predictions.parquet")
    row = StackMember("onnx", "own", "own", 100)
    assert np.allclose(stored_scores(tmp_path, row, ["2", "1"]), scores[::-1])
    with pytest.raises(DataError, match=r"predictions\.parquet .* own .* text 3;"):
        stored_scores(tmp_path, row, ["1", "3"])


def test_a_model_that_does_not_fit_its_corpus_is_not_packed(ratings, tmp_path):
    two = ClassificationSchema(labels=["a", "b"], cleaning=Cleaning())
    with pytest.raises(DataError, match="knows the classes"):
        pack_encoder(ratings / "model", tmp_path, "x", two)
    with pytest.raises(DataError, match="trained for regression"):
        model_schema(ratings / "model", two)
    lines = replace(load_schema(ratings / "corpus"), cleaning=Cleaning(keep_newlines=True))
    with pytest.raises(DataError, match="prepared by"):
        model_schema(ratings / "model", lines)


def test_stages_that_know_classes_only_say_so(ratings, rating_bundle, tmp_path):
    for stage in (interact, improve):
        record = create_record(tmp_path / stage.__name__, stage.__name__)
        with pytest.raises(UsageError, match="a corpus for regression"):
            stage(record, str(ratings / "corpus"), str(rating_bundle))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    "A client of a hand-made regression, and a request that it has answered."
    place = tmp_path_factory.mktemp("numbers")
    schema = RegressionSchema(low=0, high=9, mean=2.0, scale=3.0, cleaning=Cleaning())
    bundle = make_bundle(place / "bundle", schema=schema)
    app = make_app(bundle, place / "f.sqlite")
    with TestClient(app, raise_server_exceptions=False) as client:
        asked = client.post("/v1/predict", json={"text": "good"}).json()
        yield client, asked["request_id"]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=fields | values,
    number=values,
    route=st.sampled_from(["/v1/predict", "/v1/feedback"]),
    real=st.booleans(),
)
@example(body={"correct": False}, number=10**400, route="/v1/feedback", real=True)
@example(body={"correct": False}, number=True, route="/v1/feedback", real=True)
def test_no_json_is_a_server_error_of_a_regression(numbers, body, number, route, real):
    client, asked = numbers
    if real and isinstance(body, dict):
        body = {**body, "request_id": asked, "value": number}
    content, kind = json.dumps(body), {"Content-Type": "application/json"}
    r = client.post(route, content=content, headers=kind)
    assert r.status_code < 500, (body, r.text)
    if r.status_code != 200:
        assert set(r.json()) == {"error"}


SERVE = """
import sys, warnings
warnings.simplefilter("ignore")
from fastapi.testclient import TestClient
from llmeco_nb.deployment.server import make_app
with TestClient(make_app(sys.argv[1], sys.argv[2])) as c:
    asked = c.post("/v1/predict", json={"text": "It&#x27;s good"}).json()
    body = dict(request_id=asked["request_id"], correct=True)
    assert c.post("/v1/feedback", json=body).json()["stored"], asked
print(*sorted(asked["answers"][0]))
print(*sorted({"torch", "transformers", "nbdev", "pandas", "sklearn", "scipy"} & set(sys.modules)))
"""


@pytest.mark.parametrize("task", ["text-classification", "regression"])
def test_serving_a_task_loads_no_heavy_library(task, tmp_path):
    schema = RegressionSchema(low=0, high=9, cleaning=Cleaning()) if task == "regression" else None
    bundle = make_bundle(tmp_path / "bundle", schema=schema)
    line = [sys.executable, "-c", SERVE, str(bundle), str(tmp_path / "f.sqlite")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    fields = "item value" if task == "regression" else "item label probabilities"
    assert done.stdout == f"{fields}\n\n", done.stdout + done.stderr
