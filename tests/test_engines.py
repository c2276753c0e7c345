"""Engines: int8 against float32, who may predict and be served, and what a bundle does."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="an encoder is quantized from torch")
pytest.importorskip("openvino", reason="serving needs the extra `serve`")
pytest.importorskip("nncf", reason="serving needs the extra `serve`")

from llmeco_nb.core import DataError, create_record, read_json
from llmeco_nb.data.corpus import label_names, read_split, small_corpus
from llmeco_nb.deployment import loading
from llmeco_nb.deployment.bundle import BundleConfig, build_bundle, small_bundle
from llmeco_nb.deployment.loading import open_model
from llmeco_nb.deployment.manifest import Origin, verify, write_manifest
from llmeco_nb.deployment.packing import (
    add_engine,
    check_engine,
    engine_of,
    open_classifier,
    pack_encoder,
    pack_stack,
    reference_scores,
)
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.evaluation.comparison import EvaluationConfig, evaluate_models
from llmeco_nb.evaluation.stacking import Stack, StackMember
from llmeco_nb.finetuning import engine_trial
from llmeco_nb.finetuning import engines as module
from llmeco_nb.finetuning.budget import Workload, finetune_plan
from llmeco_nb.finetuning.classifier import fine_tune
from llmeco_nb.finetuning.classifier_config import ClassifierConfig
from llmeco_nb.finetuning.encoding import tokenize_texts
from llmeco_nb.finetuning.engine_trial import EngineTrial, build_engine, engine_speed
from llmeco_nb.finetuning.engines import (
    TorchEngine,
    engine_files,
    engine_outputs,
    fastest_engine,
    open_engines,
    openvino_engine,
)
from llmeco_nb.tasks.predictions import read_predictions_file, scores_of
from llmeco_nb.tasks.registry import find_task, load_schema
from llmeco_nb.tasks.regression import RegressionSchema
from llmeco_nb.tasks.text_classification import ClassificationSchema

ROOT = Path(__file__).resolve().parent.parent
BRIEF = dict(max_length=24, epochs=3, num_evals=1, eval_examples=60, lr=2e-3)


@pytest.fixture(scope="module")
def corpus() -> str:
    return str(small_corpus())


@pytest.fixture(scope="module")
def tuned(corpus, tmp_path_factory):
    "A record of a fine-tuning whose predictions an engine made."
    record = create_record(tmp_path_factory.mktemp("tuned") / "finetune-0", "finetune")
    with pytest.MonkeyPatch.context() as patch:
        # a small encoder that has learned little is rounded more than a real one
        patch.setattr(engine_trial, "tolerated_loss", 0.2)
        fine_tune(record, corpus, config=ClassifierConfig(engine=openvino_engine, **BRIEF))
    return record


@pytest.fixture(scope="module")
def bundle(tuned, corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "encoder"
    folder.mkdir()
    source, schema = tuned.artifact("classifier"), load_schema(corpus)
    write_manifest(folder, pack_encoder(source, folder, "own", schema))
    return folder


@pytest.fixture(scope="module")
def texts(corpus) -> list[str]:
    return read_split(corpus, "validation").text.tolist()


# -- two engines


def test_onnxruntime_answers_as_torch_and_int8_nearly_so(bundle, tuned, corpus, texts):
    model, tokenizer = open_classifier(tuned.artifact("classifier"))
    rows, _ = tokenize_texts(tokenizer, texts, 24, 25)
    opened = open_engines(lambda name: (bundle / name).read_bytes(), [openvino_engine, "onnx"])
    found = {name: engine_outputs(one, rows, 0) for name, one in opened.items()}
    exact = engine_outputs(TorchEngine(model), rows, 0)
    assert np.abs(found["onnx"] - exact).max() < 1e-4
    off = np.abs(found[openvino_engine] - exact)
    assert 0 < off.mean() < 0.25 * exact.std()
    assert (found[openvino_engine].argmax(1) == exact.argmax(1)).mean() > 0.9


def test_an_int8_answer_hardly_depends_on_its_company(bundle, texts):
    model = open_model(bundle, verify(bundle), engine=openvino_engine)
    together = model.scores(texts[:40])
    alone = np.concatenate([model.scores([t]) for t in texts[:40]])
    assert np.abs(together - alone).max() < 0.02
    again = open_model(bundle, verify(bundle), 2, openvino_engine).scores(texts[:40])
    assert np.abs(together - again).max() < 0.02


class Slow:
    "An engine that takes so many turns."

    def __init__(self, turns):
        self.turns = turns

    def logits(self, input_ids, attention_mask):
        for _ in range(self.turns):
            np.sort(np.arange(200_000)[::-1])
        return np.zeros((len(input_ids), 2), np.float32)


def test_the_fastest_engine_is_taken_and_the_first_where_both_are_alike():
    assert fastest_engine({"a": Slow(30), "b": Slow(3)}) == "b"
    assert fastest_engine({"a": Slow(3), "b": Slow(30)}) == "a"
    assert fastest_engine({"a": Slow(10), "b": Slow(10)}) == "a"


def test_a_logit_that_is_no_number_is_refused():
    class Broken:
        def logits(self, input_ids, attention_mask):
            return np.full((len(input_ids), 2), np.nan, np.float32)

    with pytest.raises(DataError, match="no finite number"):
        engine_outputs(Broken(), [[1, 2], [3]], 0)


def test_nothing_is_reported_to_anybody(bundle, tuned, tmp_path):
    "Quantizing and answering open no connection, and the package that reports is never imported."
    code = f"""
import socket, sys
def refuse(*a, **k): raise SystemExit("a connection was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from pathlib import Path
from llmeco_nb.finetuning.engines import OpenVinoEngine, engine_files, quantize_encoder
from llmeco_nb.deployment.packing import open_classifier
model, _ = open_classifier({str(tuned.artifact("classifier"))!r})
place = Path({str(tmp_path / "engine")!r})
quantize_encoder(model, [[1, 2, 3], [4, 5, 6, 7]], place)
OpenVinoEngine(*((place / name).read_bytes() for name in engine_files))
print("reports:", sys.modules.get("openvino_telemetry"))"""
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines() == ["reports: None"], done.stdout
    assert not (tmp_path / "intel").exists()


# -- who may predict


def test_an_engine_is_refused_for_what_it_is_expected_to_lose():
    "By the probabilities of the original; whatever the labels are."
    task, schema = find_task("text-classification"), ClassificationSchema(labels=["a", "b"])
    for sure, flips, accepted in (
        (0.99, 0, True),
        (0.99, 2, True),
        (0.99, 3, False),
        (0.51, 60, True),
        (0.51, 120, False),
    ):
        exact = np.tile(np.array([[sure, 1 - sure]]), (400, 1))
        rounded = np.where(np.arange(400)[:, None] < flips, exact[:, ::-1], exact)
        trial = EngineTrial.of(exact, rounded, schema, task)
        assert (trial.accepted, trial.items) == (accepted, 400), (sure, flips)
        assert trial.agreement == pytest.approx(1 - flips / 400)
        assert trial.loss == pytest.approx(flips / 400 * (2 * sure - 1))
    rounded = rounded.copy()
    rounded[0, 0] = np.nan
    assert not EngineTrial.of(exact, rounded, schema, task).accepted


def test_the_expected_loss_is_that_of_calibrated_probabilities():
    "Labels are drawn from the original's probabilities; what the engine loses is what was told."
    rng = np.random.default_rng(0)
    task, schema = find_task("text-classification"), ClassificationSchema(labels=list("abc"))
    logits = 2 * rng.normal(size=(100_000, 3))
    exact, rounded = (
        np.exp(z) / np.exp(z).sum(1, keepdims=True)
        for z in (logits, logits + 0.3 * rng.normal(size=logits.shape))
    )
    drawn = (exact.cumsum(1) > rng.random((len(exact), 1))).argmax(1)
    lost = (exact.argmax(1) == drawn).mean() - (rounded.argmax(1) == drawn).mean()
    trial = EngineTrial.of(exact, rounded, schema, task)
    assert trial.loss == pytest.approx(lost, abs=0.003) and trial.loss > 0.003


def test_numbers_lose_in_standard_deviations():
    task, schema = find_task("regression"), RegressionSchema(low=0, high=100, mean=50, scale=20)
    exact = np.linspace(0, 100, 50)[:, None]
    for off, accepted in ((0.0, True), (0.05, True), (0.2, False), (np.nan, False)):
        trial = EngineTrial.of(exact, exact + off, schema, task)
        assert trial.accepted is accepted
        assert trial.loss == pytest.approx(off / 20, abs=1e-9, nan_ok=True)


def test_the_predictions_are_those_of_the_engine(tuned, corpus, texts):
    folder = tuned.artifact("classifier")
    assert engine_of(folder) == openvino_engine and tuned.metrics["predicted_in"] == openvino_engine
    assert tuned.metrics["engine_accepted"] and tuned.metrics["engine_items"] == 40
    table = read_predictions_file(tuned.artifact("predictions"), split="validation")
    ids = read_split(corpus, "validation").id.astype(str)
    told = scores_of(table.set_index("id").loc[ids])
    schema = load_schema(corpus)
    by_engine = reference_scores(folder, texts, schema, openvino_engine)
    by_torch = reference_scores(folder, texts, schema)
    assert np.abs(told - by_engine).max() < 0.02
    assert np.abs(told - by_torch).max() > 2 * np.abs(told - by_engine).max()


def test_a_refused_engine_is_neither_kept_nor_asked(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_trial, "tolerated_loss", -1.0)
    record = create_record(tmp_path / "finetune-0", "finetune")
    folder = fine_tune(record, corpus, config=ClassifierConfig(engine=openvino_engine, **BRIEF))
    assert engine_of(folder) is None and not (record.path / "engine").exists()
    assert record.metrics["predicted_in"] == "fp32" and not record.metrics["engine_accepted"]
    table = read_predictions_file(record.artifact("predictions"), split="validation").head(20)
    rows = read_split(corpus, "validation").set_index("id").loc[table.id].text.tolist()
    found = reference_scores(folder, rows, load_schema(corpus))
    assert np.abs(scores_of(table) - found).max() < 1e-4


def test_a_plan_counts_the_engine_s_time():
    "With an engine its predictions are planned, whatever the precision of training would take."
    work = Workload(
        labels=10_000,
        predicted=5000,
        evaluated=100,
        max_length=64,
        batch_size=8,
        step_s=0.1,
        forward_s=0.01,
        exact_s=0.002,
    )
    config = ClassifierConfig(minutes=2, num_evals=1, epochs=1)
    plain, quick = (finetune_plan(config, replace(work, engine=engine)) for engine in (False, True))
    assert (plain["exact"], quick["exact"]) == (0, 1)
    saved = work.predicted * (work.forward_s - work.exact_s)
    assert quick["steps"] - plain["steps"] == pytest.approx(0.95 * saved / work.step_s, abs=2)


def test_a_killed_attempt_s_engine_does_not_stand_in_the_way(tuned, corpus, tmp_path, monkeypatch):
    "Killed after the engine had its place; the next attempt makes another, or none."
    place = Path(shutil.copytree(tuned.path, tmp_path / "finetune-0"))
    for limit, kept in ((0.5, openvino_engine), (-1.0, None)):
        monkeypatch.setattr(engine_trial, "tolerated_loss", limit)
        record = create_record(place, "finetune")
        config = ClassifierConfig(engine=openvino_engine, **BRIEF)
        folder = fine_tune(record, corpus, config=config)
        assert engine_of(folder) == kept


def test_what_cannot_be_quantized_is_predicted_by_torch(corpus, tmp_path, monkeypatch):
    def fail(*a):
        raise RuntimeError("no such operation\nand a long trace")

    monkeypatch.setattr(engine_trial, "quantize_encoder", fail)
    record = create_record(tmp_path / "finetune-0", "finetune")
    folder = fine_tune(record, corpus, config=ClassifierConfig(engine=openvino_engine, **BRIEF))
    assert engine_of(folder) is None and record.metrics["engine_refused"] == "no such operation"
    assert record.metrics["predicted_in"] == "fp32"


def test_two_threads_may_ask_one_engine(bundle, texts):
    from concurrent.futures import ThreadPoolExecutor

    model = open_model(bundle, verify(bundle), engine=openvino_engine)
    alone = [model.scores([t]) for t in texts[:30]]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda t: model.scores([t]), texts[:30]))
    assert np.abs(np.array(alone) - np.array(together)).max() < 1e-6


def test_an_engine_from_a_later_version_is_left_to_onnxruntime(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    shutil.rmtree(copy / openvino_engine)
    write_manifest(copy, replace(verify(bundle), engine="quantum-int2"))
    assert Predictor.load(copy).model.model.engine == "onnx"


def test_an_engine_that_answers_otherwise_here_is_not_taken(bundle, monkeypatch):
    "Sums of 8-bit products may overflow on a processor without instructions for them."
    monkeypatch.setattr(loading, "multiplies_int8", lambda: False)
    monkeypatch.setattr(loading, "fastest_engine", lambda found: openvino_engine)
    assert open_model(bundle, verify(bundle)).model.engine == openvino_engine
    right = module.OpenVinoEngine.logits
    spoiled = lambda self, ids, mask: right(self, ids, mask) + np.array([9, -9], np.float32)
    monkeypatch.setattr(module.OpenVinoEngine, "logits", spoiled)
    assert open_model(bundle, verify(bundle)).model.engine == "onnx"


def test_an_engine_that_was_half_made_is_made_again(tuned, tmp_path):
    model, _ = open_classifier(tuned.artifact("classifier"))
    place = tmp_path / "engine"
    place.mkdir()
    (place / "model.xml").write_text("half")
    build_engine(model, [[1, 2, 3]], place, threads=1)
    assert sorted(f.name for f in place.iterdir()) == sorted(engine_files)
    a_text, made = engine_speed(model, [[1, 2, 3]] * 8, 0, threads=1)
    assert 0 < a_text < made


# -- in a bundle


def test_a_bundle_says_which_engine_was_measured_and_holds_both(bundle, texts):
    manifest = verify(bundle)
    assert manifest.engine == openvino_engine and manifest.format_version == 4
    files = {f"{openvino_engine}/{name}" for name in engine_files}
    assert {"model.onnx", "tokenizer.json", *files} <= {*manifest.files}
    for name in ("onnx", openvino_engine):
        assert open_model(bundle, manifest, engine=name).model.engine == name
    chosen = open_model(bundle, manifest).model.engine
    assert chosen in ("onnx", openvino_engine)


@pytest.mark.parametrize("instructions,taken", [(True, openvino_engine), (False, "onnx")])
def test_without_8_bit_products_both_are_timed(bundle, monkeypatch, instructions, taken):
    monkeypatch.setattr(loading, "multiplies_int8", lambda: instructions)
    timed = []
    monkeypatch.setattr(loading, "fastest_engine", lambda found: timed.append([*found]) or "onnx")
    assert open_model(bundle, verify(bundle)).model.engine == taken
    assert timed == ([] if instructions else [[openvino_engine, "onnx"]])


def test_the_environment_names_an_engine(bundle, monkeypatch):
    monkeypatch.setenv("LLMECO_ENGINE", "onnx")
    assert Predictor.load(bundle).model.model.engine == "onnx"
    monkeypatch.setenv("LLMECO_ENGINE", "abacus")
    with pytest.raises(DataError, match="knows no engine 'abacus'"):
        Predictor.load(bundle)


def test_without_the_package_onnxruntime_answers(bundle, monkeypatch):
    for one in (module, loading):
        monkeypatch.setattr(one, "has_openvino", lambda quantize=False: False)
    assert Predictor.load(bundle).model.model.engine == "onnx"


def test_a_flipped_bit_of_an_engine_s_weights_is_refused(bundle, tmp_path):
    for name in engine_files:
        copy = Path(shutil.copytree(bundle, tmp_path / name))
        place = copy / openvino_engine / name
        data = bytearray(place.read_bytes())
        data[len(data) // 2] ^= 1
        place.write_bytes(data)
        with pytest.raises(DataError, match=f"{openvino_engine}/{name} is not the file"):
            Predictor.load(copy)


def test_the_bundle_stage_packs_the_engine_that_was_measured(tuned, corpus, tmp_path, monkeypatch):
    asked = EvaluationConfig(num_labeled=[0], learning_curve=[], models=["majority"])
    record = create_record(tmp_path / "evaluate-0", "evaluate")
    table = evaluate_models(record, corpus, [str(tuned.artifact("predictions"))], asked)
    told = read_json(table / "table.json")
    for row in told["rows"]:  # so that this one is the best
        row["validation_accuracy"] = float(row["model"] == "own")
    (table / "table.json").write_text(json.dumps(told))
    given = [str(tuned.artifact("classifier"))], str(record.artifact("baselines")), str(table)
    folder = build_bundle(
        create_record(tmp_path / "bundle-0", "bundle"), corpus, *given, BundleConfig()
    )
    assert verify(folder).engine == openvino_engine
    rows = read_split(corpus, "test")
    answers = read_predictions_file(table / "predictions.parquet", "own", split="test")
    predicted = answers.set_index("id").loc[rows.id.astype(str)].prediction.to_numpy()
    monkeypatch.setenv("LLMECO_ENGINE", openvino_engine)
    served = Predictor.load(folder).predict_batch(rows.text.tolist())
    labels = np.array([verify(folder).labels.index(a.label) for a in served])
    assert (labels != predicted).mean() <= 0.01  # near one half a batch's company may decide


def test_an_engine_that_answers_otherwise_is_refused():
    schema = ClassificationSchema(labels=["a", "b"])
    p = np.tile(np.array([[0.9, 0.1]], np.float32), (100, 1))
    check_engine(p, p + 0.001, schema)
    for wrong in (1 - p, p + 0.05, np.full_like(p, np.nan)):
        with pytest.raises(DataError, match="does not answer as it was measured"):
            check_engine(p, wrong, schema)


def test_a_stack_s_encoder_brings_its_engine(tuned, corpus, tmp_path, texts):
    linear = small_bundle("linear")
    schema, folder = load_schema(corpus), tmp_path / "stack"
    folder.mkdir()
    members = (
        StackMember("linear", "nbsvm", "NB-SVM", 80, weight=0.5),
        StackMember("onnx", "own", "own", 80, weight=0.5),
    )
    both = Stack(members, folds=5, validation_items=0)
    facts = pack_stack((linear, tuned.artifact("classifier")), folder, both, schema)
    write_manifest(folder, facts)
    for name in ("onnx", openvino_engine):
        model = open_model(folder, verify(folder), engine=name)
        assert model.model.engine == name
        assert np.isfinite(model.scores(texts[:5])).all()


def test_what_learns_from_feedback_keeps_its_engine(bundle, tuned, corpus, tmp_path, monkeypatch):
    import pandas as pd

    from llmeco_nb.core import sha256_of
    from llmeco_nb.interaction.improve import ImproveConfig, learn_corrections

    classifier = tuned.artifact("classifier")
    champion = Path(shutil.copytree(bundle, tmp_path / "champion"))
    origin = Origin(model="own", num_labeled=20, artifact=sha256_of(classifier))
    write_manifest(champion, replace(verify(champion), origin=origin))
    corrections = pd.DataFrame(dict(text=["a dreadful bore"] * 4, label=[0] * 4))
    record = create_record(tmp_path / "improve", "improve")
    monkeypatch.setattr(engine_trial, "tolerated_loss", 0.5)
    brief = ImproveConfig(replay_examples=16)
    found = learn_corrections(record, corpus, champion, [str(classifier)], corrections, brief)
    assert found.facts.engine == openvino_engine
    assert {f.name for f in (found.folder / openvino_engine).iterdir()} == {*engine_files}


def test_an_engine_is_added_to_a_classifier(corpus, tmp_path, texts, monkeypatch):
    source = small_bundle("onnx").parent / "classifier"
    copy = Path(shutil.copytree(source, tmp_path / "classifier"))
    schema = load_schema(corpus)
    monkeypatch.setattr(engine_trial, "tolerated_loss", 0.5)
    assert add_engine(copy, texts, texts, schema)
    assert engine_of(copy) == openvino_engine and engine_of(source) is None
    exact, rounded = (reference_scores(copy, texts, schema, e) for e in (None, openvino_engine))
    assert rounded.shape == exact.shape == (len(texts), len(label_names(corpus)))
    shutil.rmtree(copy / openvino_engine)
    monkeypatch.setattr(engine_trial, "tolerated_loss", -1.0)
    assert not add_engine(copy, texts, texts, schema) and engine_of(copy) is None
