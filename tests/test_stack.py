"""A stack: its weights against a grid, what must not change them, that its validation score is not
flattered, and its way from the table into a bundle, a server and the next round.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smallbundle import make_bundle

from llmeco_nb.core import DataError, MissingError, create_record, read_json, write_json
from llmeco_nb.data.corpus import read_split, write_corpus
from llmeco_nb.deployment.bundle import build_bundle, packable
from llmeco_nb.evaluation.comparison import EvaluationConfig, evaluate_models
from llmeco_nb.evaluation.comparison_table import ComparisonTable, best_first
from llmeco_nb.evaluation.stack_row import min_validation
from llmeco_nb.evaluation.stacking import (
    Stack,
    StackMember,
    cross_fitted_scores,
    fit_class_weights,
    fit_number_weights,
    fit_stack,
    fold_numbers,
    log_probabilities,
)
from llmeco_nb.finetuning.linear import LinearText, softmax
from llmeco_nb.tasks.contract import Cleaning
from llmeco_nb.tasks.predictions import predictions_table, read_predictions_file, write_predictions
from llmeco_nb.tasks.registry import find_task, load_schema, save_schema, task_of
from llmeco_nb.tasks.regression import RegressionSchema
from llmeco_nb.tasks.text_classification import ClassificationSchema

CLASSES, NUMBERS = find_task("text-classification"), find_task("regression")
PAIR = (StackMember("linear", "nbsvm", "NB-SVM", 400), StackMember("onnx", "own", "own", 40))


def witness(rng, y, classes, knows):
    "Probabilities of a made-up member; 0: it knows nothing."
    z = rng.normal(size=(len(y), classes))
    z[np.arange(len(y)), y] += knows
    return softmax(z).astype(np.float32)


# -- the weights


@pytest.mark.parametrize("seed,n,knows", [(0, 60, (2, 1)), (1, 500, (0.5, 2)), (2, 80, (0, 0))])
def test_class_weights_are_the_best_of_a_grid(seed, n, knows):
    "The objective is written down again, one text at a time; no point of a fine grid is better."
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    scores = [witness(rng, y, 3, k) for k in knows]
    weights, temperatures = fit_class_weights(scores, y)

    def objective(w):
        total = 0.0
        for i in range(n):
            z = sum(w[m] * np.log(scores[m][i].astype(float)) / temperatures[m] for m in (0, 1))
            total -= z[y[i]] - np.log(np.exp(z).sum())
        return total + sum(((v - 0.5) / 0.5) ** 2 for v in w) / 2

    here = objective(weights)
    for step in (0.3, 0.03, 0.003):
        for a in (-step, 0, step):
            for b in (-step, 0, step):
                other = np.maximum(weights + [a, b], 0)
                assert objective(other) >= here - 1e-7
    coarse = [objective((a, b)) for a in np.arange(0, 3, 0.3) for b in np.arange(0, 3, 0.3)]
    assert here <= min(coarse) + 1e-9


def test_number_weights_are_the_best_of_a_grid():
    rng = np.random.default_rng(0)
    y = rng.normal(size=80)
    first, second = y + 0.4 * rng.normal(size=80), y + 0.7 * rng.standard_t(3, size=80)
    found = fit_number_weights([first[:, None], second[:, None]], y)
    unit = np.abs(y - (first + second) / 2).mean()

    def objective(w):
        errors = np.abs(y - w * first - (1 - w) * second).sum() / unit
        return errors + ((w - 0.5) / 0.5) ** 2 / 2

    grid = np.linspace(0, 1, 2001)
    best = grid[int(np.argmin([objective(w) for w in grid]))]
    assert found[0] == pytest.approx(best, abs=1e-3) and found.sum() == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), n=st.integers(4, 120))
def test_neither_order_nor_names_change_the_weights(seed, classes, n):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    scores = [witness(rng, y, classes, k) for k in rng.uniform(0, 3, 2)]
    weights, temperatures = fit_class_weights(scores, y)
    assert (weights >= 0).all() and (temperatures >= 0.1).all() and (temperatures <= 10).all()
    renamed = rng.permutation(classes)  # class c is now called renamed[c]
    moved = [p[:, np.argsort(renamed)] for p in scores]
    assert np.allclose(fit_class_weights(moved, renamed[y])[0], weights, atol=1e-4)
    rows = rng.permutation(n)
    assert np.allclose(fit_class_weights([p[rows] for p in scores], y[rows])[0], weights, atol=1e-4)
    swapped, _ = fit_class_weights(scores[::-1], y)
    assert np.allclose(swapped[::-1], weights, atol=1e-4)


def test_equal_members_count_equally_and_answer_as_each_of_them():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 200)
    p = witness(rng, y, 4, 1.5)
    stack = fit_stack(PAIR, [p, p], y, CLASSES, 5)
    assert stack.members[0].weight == pytest.approx(stack.members[1].weight, abs=1e-4)
    assert (stack.combine([p, p], CLASSES).argmax(1) == p.argmax(1)).all()
    numbers = rng.normal(size=(50, 1)).astype(np.float32)
    both = fit_stack(PAIR, [numbers, numbers], rng.normal(size=50), NUMBERS, 5)
    assert np.allclose(both.combine([numbers, numbers], NUMBERS), numbers, atol=1e-5)


def test_with_few_texts_the_weights_stay_near_a_half():
    "Of independent witnesses the right weights are 1 and 1; it takes texts to say so."
    rng = np.random.default_rng(0)
    far = []
    for n in (4, 60, 3000):
        y = rng.integers(0, 2, n)
        weights, _ = fit_class_weights([witness(rng, y, 2, 1.5) for _ in PAIR], y)
        far.append(np.abs(weights - 0.5).max())
    assert far[0] < 0.3 and far[0] < far[1] and 0.4 < far[2] < 0.6


def test_no_probability_is_refused_or_breaks_a_stack():
    "A member that rules the right class out, or is wrong about everything, leaves numbers behind."
    y = np.array([0, 1] * 30)
    certain = np.eye(2, dtype=np.float32)[1 - y]  # always wrong, and sure of it
    for other in (certain, 1 - certain, np.full((60, 2), 0.5, np.float32)):
        stack = fit_stack(PAIR, [certain, other], y, CLASSES, 5)
        p = stack.combine([certain, other], CLASSES)
        assert np.isfinite(p).all() and np.allclose(p.sum(1), 1, atol=1e-5)
    assert np.isfinite(log_probabilities([certain])).all()


# -- nothing is flattered


def test_the_weights_of_a_fold_have_not_seen_it():
    "Whatever the labels of a fold are, its answers are the same."
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 100)
    scores = [witness(rng, y, 3, 1) for _ in PAIR]
    folds = fold_numbers([f"v{i}" for i in range(100)], 5)
    before = cross_fitted_scores(PAIR, scores, y, folds, CLASSES)
    changed = np.where(folds == 2, (y + 1) % 3, y)
    after = cross_fitted_scores(PAIR, scores, changed, folds, CLASSES)
    assert (after[folds == 2] == before[folds == 2]).all()
    assert (after[folds != 2] != before[folds != 2]).any()


def test_members_that_know_nothing_gain_nothing():
    "Over many draws: weights that saw the text gain likelihood by it, cross-fitted ones do not."
    rng = np.random.default_rng(0)
    ids = [f"v{i}" for i in range(60)]
    folds = fold_numbers(ids, 5)
    seen, unseen, right = [], [], []
    for _ in range(120):
        y = rng.integers(0, 2, 60)
        scores = [witness(rng, y, 2, 0) for _ in PAIR]
        for p, losses in (
            (fit_stack(PAIR, scores, y, CLASSES, 5).combine(scores, CLASSES), seen),
            (cross_fitted_scores(PAIR, scores, y, folds, CLASSES), unseen),
        ):
            losses.append(-np.log(p[np.arange(60), y]).mean() - np.log(2))
        right.append((p.argmax(1) == y).mean() - 0.5)
    assert np.mean(seen) < 0 < np.mean(unseen)
    assert abs(np.mean(right)) < 3 * np.std(right) / np.sqrt(len(right))


def test_a_member_and_its_shadow_gain_nothing_on_validation():
    "The second member is the first with noise: the stack's cross-fitted score is no better."
    rng = np.random.default_rng(1)
    folds = fold_numbers([f"v{i}" for i in range(80)], 5)
    gains = []
    for _ in range(80):
        y = rng.integers(0, 2, 80)
        p = witness(rng, y, 2, 1)
        noisy = softmax(np.log(p) + 0.7 * rng.normal(size=p.shape)).astype(np.float32)
        found = cross_fitted_scores(PAIR, [p, noisy], y, folds, CLASSES)
        gains.append((found.argmax(1) == y).mean() - (p.argmax(1) == y).mean())
    assert np.mean(gains) < 2 * np.std(gains) / np.sqrt(len(gains))


# -- from the table to the bundle

WORDS = dict(negative="bad dull poor long awful".split(), positive="good great fine funny".split())


def told_table(n: int, seed: int) -> pd.DataFrame:
    "Texts in which words tell the class, most of the time."
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        label = int(rng.integers(0, 2))
        said = label if rng.random() < 0.75 else 1 - label
        words = rng.choice(WORDS[["negative", "positive"][said]], 2)
        other = rng.choice(WORDS[["negative", "positive"][1 - said]], 1)
        rows.append((f"{seed}-{i}", f"Film {seed} {i} is {' '.join([*words, *other])}", label))
    return pd.DataFrame(rows, columns=["id", "text", "label"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    parts = dict(train=told_table(200, 1), validation=told_table(120, 2), test=told_table(300, 3))
    labels = ["negative", "positive"]
    schema = ClassificationSchema(labels=labels, cleaning=Cleaning())
    write_corpus(folder / "corpus", parts, labels, {}, schema)
    return folder / "corpus"


def predictions_of(corpus: Path, folder: Path, name: str = "own", labels: int = 40) -> str:
    "A file with what an encoder that knows most texts says of validation and test."
    rng = np.random.default_rng(5)
    schema = load_schema(corpus)
    tables = []
    for split in ("validation", "test"):
        rows = read_split(corpus, split)
        p = witness(rng, rows.label.to_numpy(), 2, 1.6)
        tables.append(predictions_table(task_of(schema), split, rows, p, name, labels))
    folder.mkdir(parents=True)
    write_predictions(pd.concat(tables, ignore_index=True), folder / "predictions")
    write_json(folder / "metrics.json", dict(parameters=1000))
    return str(folder / "predictions")


@pytest.fixture(scope="module")
def compared(corpus, tmp_path_factory):
    place = tmp_path_factory.mktemp("compared")
    given = [predictions_of(corpus, place / "own")]
    record = create_record(place / "evaluate-0", "evaluate")
    asked = EvaluationConfig(num_labeled=[0], learning_curve=[])
    evaluate_models(record, str(corpus), given, asked)
    return record


def test_the_row_of_a_stack_states_members_and_weights(compared):
    table = ComparisonTable.load(compared.artifact("table"))
    [row] = [r for r in table.rows if r.stack]
    linear, encoder = row.stack.members
    by_key = {(r.model, r.labels): r for r in table.rows}
    fitted = [r for r in table.rows if r.baseline and r.labels == 200 and r.model != "majority"]
    best = max(fitted, key=lambda r: r.validation_accuracy)
    assert by_key[linear.model, linear.num_labeled].validation_accuracy == best.validation_accuracy
    assert (encoder.model, encoder.num_labeled) == ("own", 40)
    assert (row.model, row.labels, row.baseline) == ("stack", 200, False)
    assert row.title == f"Stack: {linear.title} + own"
    assert row.parameters == by_key[linear.model, 200].parameters + 1000
    assert row.against.reference and row.against.p_adjusted >= row.against.p
    assert table.no_stack == "" and table.stack_text() in (compared.path / "summary.txt").read_text(
        encoding="utf-8"
    )
    assert f"weight {linear.weight:.2f}" in table.stack_text()
    assert table.best_row is best_first(table.rows)[0]


def test_the_answers_of_a_stack_follow_from_those_of_its_members(compared, corpus):
    "Test texts by the weights that the row states; validation texts by none that saw them."
    table = ComparisonTable.load(compared.artifact("table"))
    stack = next(r.stack for r in table.rows if r.stack)
    file = compared.artifact("table") / "predictions.parquet"
    found = {}
    for split in ("validation", "test"):
        ids = read_split(corpus, split).id

        def scores(model, labels):
            rows = read_predictions_file(file, model, labels, split).set_index("id").loc[ids]
            return np.stack(rows.scores.tolist()), rows.target.to_numpy()

        members = [scores(m.model, m.num_labeled)[0] for m in stack.members]
        found[split] = members, *scores("stack", 200), ids.tolist()
    members, told, _, _ = found["test"]
    assert np.allclose(stack.combine(members, CLASSES), told, atol=1e-6)
    members, told, targets, ids = found["validation"]
    assert not np.allclose(stack.combine(members, CLASSES), told, atol=1e-6)
    again = fit_stack(stack.members, members, targets, CLASSES, 5)
    assert again == stack
    folds = fold_numbers(ids, 5)
    assert np.allclose(cross_fitted_scores(stack.members, members, targets, folds, CLASSES), told)


@pytest.mark.parametrize("lacking", ["encoder", "linear", "validation answers", "texts"])
def test_where_there_is_no_stack_it_is_said(corpus, tmp_path, lacking):
    given = [predictions_of(corpus, tmp_path / "own")]
    models, said, place = ["majority", "nbsvm"], "predictions of an encoder", corpus
    if lacking == "encoder":
        given = []
    if lacking == "linear":
        models, said = ["majority"], "no linear model that reads texts"
    if lacking == "validation answers":
        table = read_predictions_file(given[0], split="test")
        write_predictions(table, Path(given[0]))
    if lacking == "texts":
        parts = {s: read_split(corpus, s) for s in ("train", "validation", "test")}
        parts["validation"] = parts["validation"].head(min_validation - 1)
        place, said = tmp_path / "corpus", "50 validation texts or more, and there are 49"
        write_corpus(place, parts, ["negative", "positive"], {}, load_schema(corpus))
        given = [predictions_of(place, tmp_path / "few")]
    record = create_record(tmp_path / "evaluate-0", "evaluate")
    asked = EvaluationConfig(num_labeled=[0], learning_curve=[], models=models)
    table = ComparisonTable.load(evaluate_models(record, str(place), given, asked))
    assert said in table.no_stack and not any(r.stack for r in table.rows)
    assert table.no_stack in (record.path / "summary.txt").read_text(encoding="utf-8")


def test_a_model_that_is_called_stack_is_refused(corpus, tmp_path):
    given = [predictions_of(corpus, tmp_path / "own", name="stack")]
    asked = EvaluationConfig(num_labeled=[0], learning_curve=[], models=["nbsvm"])
    with pytest.raises(DataError, match="model stack .*another name"):
        evaluate_models(create_record(tmp_path / "r", "evaluate"), str(corpus), given, asked)


def told_otherwise(compared, folder: Path, **values) -> ComparisonTable:
    "The table with other values in every row, in a new folder."
    shutil.copytree(compared.artifact("table"), folder)
    told = read_json(folder / "table.json")
    for row in told["rows"]:
        row |= values
    (folder / "table.json").write_text(json.dumps(told))
    return ComparisonTable.load(folder)


@pytest.mark.parametrize("error,first", [(None, "linear"), (0.0, "linear"), (0.01, "stack")])
def test_between_equals_the_simpler_model_goes_first(compared, tmp_path, error, first):
    """A linear model, then an encoder, in the table as in what is bundled. A stack is last where
    equal means equal, and first where a standard error says that it may be otherwise.
    """
    values = dict(validation_accuracy=0.5, validation_standard_error=error)
    table = told_otherwise(compared, tmp_path / "table", **values)
    ordered = best_first(table.rows)
    saved = compared.artifact("baselines")
    rows = packable(["some folder"], saved, tmp_path / "table")
    kinds = ["linear"] * (len(rows) - 2) + ["onnx"]
    stack_at = 0 if first == "stack" else len(kinds)
    kinds.insert(stack_at, "stack")
    assert [r.kind for r in rows] == kinds
    assert rows[0].model == ordered[0].model
    assert not [r for r in packable([], saved, tmp_path / "table") if r.kind == "stack"]


@pytest.mark.parametrize("behind,first", [(0.9, "stack"), (1.1, "own")])
def test_a_stack_is_served_where_it_is_less_than_a_standard_error_behind(compared, behind, first):
    from dataclasses import replace

    rows = ComparisonTable.load(compared.artifact("table")).rows
    best = next(replace(r, validation_accuracy=0.9) for r in rows if r.model == "own")
    error = best.validation_standard_error
    [stack] = [replace(r, validation_accuracy=0.9 - behind * error) for r in rows if r.stack]
    others = [replace(r, validation_accuracy=0.8) for r in rows if r.baseline]
    assert best_first([*others, stack, best])[0].model == first


def test_the_standard_error_of_a_row_is_that_of_its_answers(compared):
    table = ComparisonTable.load(compared.artifact("table"))
    answers = read_predictions_file(compared.artifact("table") / "predictions.parquet")
    for r in table.rows:
        own = answers[(answers.model == r.model) & (answers.num_labeled == r.labels)]
        right = (own.target == own.prediction)[own.split == "validation"]
        share = right.mean()
        assert r.validation_accuracy == pytest.approx(share)
        expected = np.sqrt(share * (1 - share) / len(right))
        assert r.validation_standard_error == pytest.approx(expected)


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda s: s["members"][0].update(weight=-1.0), "at least 0"),
        (lambda s: s["members"][0].update(weight="x"), "not as it is written"),
        (lambda s: s["members"][1].update(temperature=0.0), "above 0"),
        (lambda s: s["members"].pop(), "a linear model and an encoder"),
        (lambda s: s["members"].reverse(), "a linear model and an encoder"),
        (lambda s: [m.update(weight=0.0) for m in s["members"]], "not all 0"),
        (lambda s: s.pop("folds"), "folds"),
        (lambda s: s.update(members=3), "not as it is written"),
    ],
)
def test_a_stack_that_cannot_be_read_is_refused_by_its_file(tmp_path, change, said):
    raw = Stack(PAIR, 5, 100).to_json()
    change(raw)
    write_json(tmp_path / "stack.json", raw)
    with pytest.raises(DataError, match=f"stack.json: .*{said}"):
        Stack.load(tmp_path)


# -- bundles; with hand-made members, so that no torch is needed


@pytest.fixture(scope="module")
def bundle(compared, corpus, tmp_path_factory) -> Path:
    "A stack of a linear model of the table and of a hand-made encoder."
    pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
    from dataclasses import replace

    from llmeco_nb.deployment.manifest import Manifest, Origin, write_manifest
    from llmeco_nb.deployment.packing import pack_linear

    folder = tmp_path_factory.mktemp("bundles") / "stack"
    folder.mkdir()
    schema = load_schema(corpus)
    (folder / "linear").mkdir()
    facts = pack_linear(
        compared.artifact("baselines") / "nbsvm-200", folder / "linear", "nbsvm", schema
    )
    write_manifest(folder / "linear", replace(facts, origin=Origin(model="nbsvm")))
    make_bundle(folder / "onnx", schema=schema)
    members = (
        StackMember("linear", "nbsvm", "NB-SVM", 200, weight=0.8),
        StackMember("onnx", "words", "words", 40, weight=0.6, temperature=1.5),
    )
    Stack(members, 5, 120).save(folder)
    write_manifest(folder, Manifest("stack", kind="stack", schema=schema))
    return folder


def test_a_stack_answers_what_its_members_make_together(bundle, corpus):
    pytest.importorskip("onnxruntime")
    from llmeco_nb.deployment.loading import open_model
    from llmeco_nb.deployment.manifest import verify
    from llmeco_nb.deployment.predictor import Predictor

    texts = read_split(corpus, "test").text.tolist()[:40]
    model = open_model(bundle, verify(bundle))
    parts = [open_model(bundle / k, verify(bundle / k)) for k in ("linear", "onnx")]
    scores = [part.scores(texts) for part in parts]
    stack = Stack.load(bundle)
    by_hand = scores[0].astype(float) ** 0.8 * scores[1].astype(float) ** (0.6 / 1.5)
    by_hand /= by_hand.sum(1, keepdims=True)
    assert np.abs(model.scores(texts) - by_hand).max() < 1e-5
    assert np.abs(stack.combine(scores, CLASSES) - by_hand).max() < 1e-5
    escaped = "It&#x27;s good"
    assert (model.scores([escaped]) == model.scores(["It's good"])).all()
    for text in (*texts[:3], "", "word " * 3000):
        words, tokens = (part.model.cost(part.prepare(text)) for part in parts)
        assert tokens <= model.model.cost(text) <= tokens + words
    answers = Predictor.load(bundle).predict_batch(texts)
    assert [a.label for a in answers] == [verify(bundle).labels[i] for i in by_hand.argmax(1)]


def test_every_file_of_a_member_is_verified(bundle, tmp_path):
    from llmeco_nb.deployment.manifest import verify

    names = [n for n in verify(bundle).files if "/" in n]
    assert {"linear/manifest.json", "onnx/model.onnx", "onnx/tokenizer.json"} <= {*names}
    for i, name in enumerate(["stack.json", *names]):
        copy = Path(shutil.copytree(bundle, tmp_path / str(i)))
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} is not the file that was packed"):
            verify(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        verify(copy)


@pytest.mark.parametrize("what", ["kind", "labels", "cleaning"])
def test_a_member_that_belongs_elsewhere_is_refused(bundle, tmp_path, what):
    "All hashes fit, and yet the member is not that of the stack."
    from dataclasses import replace

    from llmeco_nb.deployment.loading import open_model
    from llmeco_nb.deployment.manifest import verify, write_manifest

    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    own = verify(copy / "linear")
    if what == "kind":
        shutil.rmtree(copy / "onnx")
        shutil.copytree(copy / "linear", copy / "onnx")
    elif what == "labels":
        swapped = replace(own.schema, labels=own.labels[::-1])
        write_manifest(copy / "linear", replace(own, schema=swapped))
    else:
        write_manifest(copy / "linear", replace(own, schema=replace(own.schema, cleaning=None)))
    write_manifest(copy, verify(bundle))
    with pytest.raises(DataError, match="does not belong to its stack"):
        open_model(copy, verify(copy))


def test_a_stack_is_served_and_takes_feedback(bundle, corpus, tmp_path):
    pytest.importorskip("fastapi")
    from llmeco_nb.interaction.client import Client, running_server
    from llmeco_nb.interaction.feedback import freeze, read_frozen

    texts = read_split(corpus, "test").text.tolist()[:5]
    with running_server(bundle, tmp_path / "feedback.sqlite") as address:
        client = Client(address, author="ann")
        facts = client.model()
        assert (facts["kind"], facts["name"]) == ("stack", "stack")
        assert [m["title"] for m in facts["stack"]["members"]] == ["NB-SVM", "words"]
        reply = client.predict(texts)
        assert client.feedback(reply, "positive").stored
    assert freeze(tmp_path, tmp_path / "frozen") == 1
    assert read_frozen(tmp_path / "frozen")[0].given == "positive"


# -- numbers


def test_a_stack_of_numbers_is_compared_and_packed(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from llmeco_nb.data.corpus import small_corpus
    from llmeco_nb.deployment.loading import open_model
    from llmeco_nb.deployment.manifest import verify
    from llmeco_nb.deployment.packing import reference_scores
    from llmeco_nb.finetuning.checkpoints import small_random_encoder
    from llmeco_nb.finetuning.classifier import save_classifier

    rng = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    for split, n in (("train", 120), ("validation", 60), ("test", 60)):
        rows = told_table(n, n)
        target = 50 + 10 * rows.label + rng.normal(size=n)
        rows.assign(target=target).drop(columns="label").to_parquet(
            tmp_path / "corpus" / f"{split}.parquet"
        )
    seen = read_split(tmp_path / "corpus", "train").target
    schema = RegressionSchema(low=seen.min(), high=seen.max(), cleaning=Cleaning())
    save_schema(schema, tmp_path / "corpus")
    encoder = str(small_random_encoder(small_corpus()))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1)
    save_classifier(model, AutoTokenizer.from_pretrained(encoder), tmp_path / "model", 32, 25)
    own = schema.standardised(seen)
    save_schema(own, tmp_path / "model")
    tables = []
    for split in ("validation", "test"):
        rows = read_split(tmp_path / "corpus", split)
        scores = reference_scores(tmp_path / "model", rows.text.tolist(), own)
        tables.append(predictions_table(NUMBERS, split, rows, scores, "tiny", 120))
    write_predictions(pd.concat(tables, ignore_index=True), tmp_path / "predictions.parquet")
    record = create_record(tmp_path / "evaluate-0", "evaluate")
    asked = EvaluationConfig(num_labeled=[0], learning_curve=[])
    evaluate_models(
        record, str(tmp_path / "corpus"), [str(tmp_path / "predictions.parquet")], asked
    )
    table = record.artifact("table")
    told = read_json(table / "table.json")
    [row] = [r for r in told["rows"] if r["model"] == "stack"]
    weights = [m["weight"] for m in row["stack"]["members"]]
    assert sum(weights) == pytest.approx(1, abs=1e-5) and weights[0] > 0.5
    assert row["stack"]["members"][0]["model"] == "tfidf_ridge" and "spearman_low" in row
    row["validation_mae"] = 0.0  # so that it is the best
    (table / "table.json").write_text(json.dumps(told))
    record = create_record(tmp_path / "bundle-0", "bundle")
    given = [str(tmp_path / "model")], str(table.parent / "baselines"), str(table)
    folder = build_bundle(record, str(tmp_path / "corpus"), *given)
    manifest = verify(folder)
    assert (manifest.kind, manifest.parity.equal) == ("stack", 60)
    texts = read_split(tmp_path / "corpus", "test").text.tolist()
    ids = read_split(tmp_path / "corpus", "test").id
    stored = read_predictions_file(table / "predictions.parquet", "stack", 120, "test")
    served = open_model(folder, manifest).scores(texts)[:, 0]
    assert np.abs(served - stored.set_index("id").loc[ids].prediction).max() < 1e-3


# -- a round of improvement


def test_both_members_of_a_champion_learn_from_feedback(tmp_path):
    pytest.importorskip("torch")
    from llmeco_nb.data.corpus import small_corpus
    from llmeco_nb.deployment.bundle import small_bundle
    from llmeco_nb.deployment.manifest import verify
    from llmeco_nb.interaction.improve import ImproveConfig, improve, small_feedback
    from llmeco_nb.interaction.rounds import read_history

    champion = small_bundle("stack")
    classifier = [str(small_bundle("onnx").parent / "classifier")]
    feedback = str(small_feedback(small_corpus()))
    brief = ImproveConfig(replay_examples=16, eval_examples=40)
    record = create_record(tmp_path / "improve", "improve")
    given = str(small_corpus()), str(champion), classifier, feedback
    improve(record, *given, config=brief)
    [learned] = read_history(record.artifact("history.json"))[-1].candidates
    assert learned.items == 40 and learned.digest != verify(champion).digest
    assert verify(record.artifact("champion")).kind == "stack"
    assert not (record.path / "refitted").exists()
    with pytest.raises(MissingError, match="none of the 0 given is that one"):
        again = create_record(tmp_path / "again", "improve")
        improve(again, str(small_corpus()), str(champion), [], feedback, config=brief)


def test_what_a_candidate_learned_is_in_both_of_its_members(tmp_path):
    pytest.importorskip("torch")
    from llmeco_nb.data.corpus import small_corpus
    from llmeco_nb.deployment.bundle import small_bundle
    from llmeco_nb.deployment.loading import open_model
    from llmeco_nb.deployment.manifest import verify, write_manifest
    from llmeco_nb.interaction.improve import ImproveConfig, learn_corrections

    champion = small_bundle("stack")
    classifier = [str(small_bundle("onnx").parent / "classifier")]
    corrections = pd.DataFrame(dict(text=["a dreadful bore"] * 4, label=[1] * 4))
    record = create_record(tmp_path / "improve", "improve")
    brief = ImproveConfig(replay_examples=16)
    found = learn_corrections(record, small_corpus(), champion, classifier, corrections, brief)
    write_manifest(found.folder, found.facts)
    assert Stack.load(found.folder) == Stack.load(champion)
    for kind in ("linear", "onnx"):
        before, after = (
            open_model(folder / kind, verify(folder / kind)).scores(["a dreadful bore"])[0, 1]
            for folder in (champion, found.folder)
        )
        assert after > before, kind
    labels = [LinearText.load(f / "linear").about["labels"] for f in (champion, found.folder)]
    assert labels[1] == labels[0] + 4
    assert found.facts.parity.equal == found.facts.parity.items == 32
