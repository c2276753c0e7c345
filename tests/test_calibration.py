"""Calibration against definitions, scikit-learn and made-up truths; the temperature in a bundle."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smallbundle import make_bundle

from llmeco_nb.core import DataError, UsageError, create_record, read_json
from llmeco_nb.deployment.calibrated_bundle import calibrate_bundle, fitted_for
from llmeco_nb.deployment.loading import open_model
from llmeco_nb.deployment.manifest import Manifest, read_manifest, verify, write_manifest
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.deployment.signing import TrustedKeys, new_key, sign_bundle
from llmeco_nb.evaluation.calibration import (
    brier_parts,
    calibration_error,
    debiased_interval,
    equal_mass_bins,
    nats,
    reliability_bins,
)
from llmeco_nb.evaluation.calibration_report import CalibrationConfig, calibrate
from llmeco_nb.evaluation.scored_texts import scored_texts
from llmeco_nb.evaluation.selective_prediction import (
    error_bound,
    guaranteed_threshold,
    judge_threshold,
    risk_coverage,
)
from llmeco_nb.evaluation.stacking import Stack, StackMember
from llmeco_nb.evaluation.temperature import (
    apply_temperature,
    likeliest_temperature,
    temperature_texts,
)
from llmeco_nb.finetuning.linear import softmax
from llmeco_nb.tasks.contract import Cleaning
from llmeco_nb.tasks.multi_label import MultiLabelSchema
from llmeco_nb.tasks.predictions import predictions_table, write_predictions
from llmeco_nb.tasks.registry import find_task, task_of
from llmeco_nb.tasks.regression import RegressionSchema

CLASSIFYING = find_task("text-classification")


def drawn(n: int, classes: int, sharper: float = 1.0, seed: int = 0):
    "Probabilities said, and classes drawn from the true ones."
    draw = np.random.default_rng(seed)
    logits = 1.5 * draw.normal(size=(n, classes))
    y = np.minimum((softmax(logits).cumsum(1) > draw.random((n, 1))).argmax(1), classes - 1)
    return softmax(sharper * logits), y


def table_of(p: np.ndarray, y: np.ndarray, split: str = "validation", model: str = "m"):
    rows = pd.DataFrame(dict(id=[f"{split}-{k}" for k in range(len(y))], label=y))
    return predictions_table(CLASSIFYING, split, rows, p, model, 10)


# -- what comes in


def spoil(table, row, value):
    scores = list(table.scores)
    scores[row] = value
    return table.assign(scores=pd.Series(scores, dtype=object))


BAD = {
    "sum": (lambda t: spoil(t, 3, np.float32([0.5, 0.2, 0.2])), "row 4 .*add up to 0.9"),
    "nan": (lambda t: spoil(t, 1, np.float32([np.nan, 0.5, 0.5])), "row 2 .*no probability"),
    "negative": (lambda t: spoil(t, 0, np.float32([-0.5, 1.0, 0.5])), "row 1 .*no probability"),
    "short": (lambda t: spoil(t, 2, np.float32([0.5, 0.5])), "row 3 .*2 scores"),
    "missing": (lambda t: spoil(t, 2, None), "row 3 .*0 scores"),
    "label": (lambda t: t.assign(target=[0, 1, 2, 9, 0, 0]), "row 4 .*target 9 is no class"),
    "half": (lambda t: t.assign(target=[0, 1.5, 2, 0, 0, 0]), "row 2 .*1.5 is no class"),
    "twice": (lambda t: t.assign(id=["a", "b", "c", "b", "d", "e"]), "row 4 .*twice"),
    "empty": (lambda t: t[:0], "no text"),
    "order": (lambda t: t[::-1].reset_index(drop=True), "row 1: .*stands where"),
    "lacking": (lambda t: t[:4], "validation-4"),
    "prediction": (lambda t: t.assign(prediction=1 - t.prediction % 2), "what its scores say"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_predictions_are_refused_with_their_row(case):
    table = table_of(*drawn(6, 3))
    change, said = BAD[case]
    ids = [f"validation-{k}" for k in range(6)]
    assert scored_texts(table, "file", ids).ids == ids
    with pytest.raises(DataError, match=said):
        scored_texts(change(table), "file", ids)


# -- measures


def slow_error(c, right, bins):
    "From the definition: bins by sorted places, equal values together."
    edges = sorted({sorted(c)[len(c) * k // bins] for k in range(bins)})
    owner = [max(e for e in edges if e <= x) for x in c]
    plain = squared = 0.0
    for e in edges:
        inside = [i for i in range(len(c)) if owner[i] == e]
        n, a = len(inside), sum(right[i] for i in inside) / len(inside)
        gap = sum(c[i] for i in inside) / n - a
        plain += n / len(c) * abs(gap)
        squared += n / len(c) * (gap**2 - (a * (1 - a) / (n - 1) if n > 1 else 0))
    return plain, squared


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=60),
    st.integers(1, 8),
    st.randoms(use_true_random=False),
)
def test_calibration_error_is_its_definition_in_any_order(rows, bins, random):
    shuffled = random.sample(rows, len(rows))
    c, right = [k / 20 for k, _ in rows], [float(r) for _, r in rows]
    found = calibration_error(c, right, bins)
    plain, squared = slow_error(c, right, bins)
    assert np.isclose(found.plain, plain) and np.isclose(found.squared, squared)
    again = calibration_error([k / 20 for k, _ in shuffled], [r for _, r in shuffled], bins)
    assert np.isclose(again.plain, found.plain) and np.isclose(again.squared, found.squared)


def test_a_calibrated_model_has_a_plain_error_and_no_debiased_one():
    found = []
    for seed in range(150):
        p, y = drawn(400, 3, seed=seed)
        found.append(calibration_error(p.max(1), p.argmax(1) == y))
    squared = np.array([e.squared for e in found])
    assert np.mean([e.plain for e in found]) > 0.04
    assert abs(squared.mean()) < 3.5 * squared.std() / np.sqrt(150)
    assert 0.3 < (squared < 0).mean() < 0.75
    assert np.isclose(
        np.mean([e.chance for e in found]), np.mean([e.plain for e in found]), rtol=0.06
    )


def test_the_debiased_error_is_right_where_there_is_one_and_its_interval_covers():
    p, y = drawn(150_000, 3, 2.0, 10**6)
    truth = calibration_error(p.max(1), p.argmax(1) == y).debiased
    squared, covered = [], []
    for seed in range(40):
        p, y = drawn(500, 3, 2.0, seed)
        right = p.argmax(1) == y
        squared.append(calibration_error(p.max(1), right).squared)
        covered.append(truth in debiased_interval(p.max(1), right, resamples=300))
    error = np.std(squared) / np.sqrt(40)
    assert abs(np.mean(squared) - truth**2) < 3.5 * error + 2e-3 * truth
    assert np.mean(covered) >= 0.85


def test_scores_equal_scikit_learn():
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss, log_loss

    for classes in (2, 5):
        p, y = drawn(700, classes, 1.7)
        assert np.isclose(nats(p, y).mean(), log_loss(y, p))
        each = [brier_score_loss(y == k, p[:, k]) for k in range(classes)]
        parts = brier_parts(p, y)
        assert np.isclose(parts.score, sum(each))
        total = parts.reliability - parts.resolution + parts.uncertainty + parts.within
        assert np.isclose(parts.score, total)
    right = p.argmax(1) == y
    share, said = calibration_curve(right, p.max(1), n_bins=7, strategy="quantile")
    found = reliability_bins(p.max(1), right, 7)
    assert np.allclose([b.accuracy for b in found], share)
    assert np.allclose([b.confidence for b in found], said)


def test_murphys_parts_without_a_rest_where_forecasts_repeat():
    draw = np.random.default_rng(0)
    p = draw.choice([0.1, 0.4, 0.8], 500)
    y = (draw.random(500) < 0.5).astype(int)
    parts = brier_parts(np.stack([1 - p, p], 1), y, 500)
    assert abs(parts.within) < 1e-12
    groups = [y[p == v] for v in (0.1, 0.4, 0.8)]
    by_hand = sum(len(g) / 500 * (v - g.mean()) ** 2 for g, v in zip(groups, (0.1, 0.4, 0.8)))
    assert np.isclose(parts.reliability, 2 * by_hand)


def test_bins_refuse_nothing_and_none():
    with pytest.raises(UsageError):
        equal_mass_bins([0.5], 0)
    with pytest.raises(DataError):
        equal_mass_bins([], 3)


# -- temperature


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0.01, 100), st.booleans())
def test_a_temperature_changes_no_prediction(seed, classes, temperature, single):
    draw = np.random.default_rng(seed)
    z = draw.choice([0.0, 1e-7, -1e-7, 1.0, -40.0, 5.0], (20, classes)) + draw.normal(size=(20, 1))
    p = (softmax(z) if single else 1 / (1 + np.exp(-z))).astype(np.float32)
    found = apply_temperature(p, temperature, single)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    if single:
        assert (found.argmax(1) == p.argmax(1)).all() and np.allclose(found.sum(1), 1, atol=1e-5)
    else:
        assert ((found > 0.5) == (p > 0.5)).all()


def test_the_temperature_is_the_least_loss_of_a_search():
    p, y = drawn(800, 4, 2.3)
    fitted = likeliest_temperature(p, y)
    loss = lambda t: nats(softmax(np.log(p) / t), y).mean()
    grid = np.geomspace(0.2, 20, 4000)
    best = grid[np.argmin([loss(t) for t in grid[::8]]) * 8]
    assert np.isclose(fitted.temperature, best, rtol=0.02)
    assert loss(fitted.temperature) <= min(loss(t) for t in grid[::40]) + 1e-9
    assert np.isclose(fitted.nats_after, loss(fitted.temperature))
    scaled = apply_temperature(p, fitted.temperature)
    assert abs(np.log(likeliest_temperature(scaled, y).temperature)) < 1e-3
    with pytest.raises(DataError, match="no validation texts"):
        likeliest_temperature(p[:0], y[:0])
    assert likeliest_temperature(p, p.argmax(1)).at_bound


def test_the_product_of_experts_under_a_temperature_divides_its_weights():
    pair = (StackMember("linear", "a", "A", 9, 0.7), StackMember("onnx", "b", "B", 9, 0.5, 1.4))
    scores = [drawn(60, 3, 1.2, seed)[0].astype(np.float32) for seed in (1, 2)]
    whole = Stack(pair, 5, 60).combine(scores, CLASSIFYING)
    halved = tuple(replace(m, weight=m.weight / 2.5) for m in pair)
    weaker = Stack(halved, 5, 60).combine(scores, CLASSIFYING)
    assert np.allclose(apply_temperature(whole, 2.5), weaker, atol=1e-5)


# -- selective prediction


def slow_area(c, right):
    "Mean over all orders of equals, by drawing none: each block's mean at each place."
    order = sorted(range(len(c)), key=lambda i: -c[i])
    wrong = [1 - right[i] for i in order]
    values = [c[i] for i in order]
    spread = [np.mean([w for w, v in zip(wrong, values) if v == one]) for one in values]
    return np.mean([sum(spread[: k + 1]) / (k + 1) for k in range(len(c))])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), min_size=1, max_size=30))
def test_the_area_is_its_definition(rows):
    c, right = [k / 6 for k, _ in rows], [r for _, r in rows]
    curve = risk_coverage(c, right)
    assert np.isclose(curve.area, slow_area(c, right)) and curve.excess >= 0
    for t, coverage, risk in zip(curve.thresholds, curve.coverage, curve.risk):
        given_ = [r for x, r in zip(c, right) if x >= t]
        assert np.isclose(coverage, len(given_) / len(c)) and np.isclose(risk, 1 - np.mean(given_))
    best = risk_coverage([r + 0.001 * k for k, r in enumerate(sorted(right))], sorted(right))
    assert best.excess < 1e-12 and best.area <= curve.area + 1e-12


def test_the_bound_is_clopper_and_pearsons():
    from scipy.stats import binomtest

    for errors, answered in ((0, 5), (2, 30), (17, 400), (8, 9)):
        wanted = binomtest(errors, answered, alternative="less").proportion_ci(0.97, "exact").high
        assert np.isclose(error_bound(errors, answered, 0.03), wanted)
    assert error_bound(4, 4, 0.05) == 1


def test_the_stated_risk_is_kept_on_new_texts():
    broken = answered = 0
    for seed in range(300):
        draw = np.random.default_rng(seed)
        c = draw.beta(12, 1, 400)
        right = draw.random(400) < c
        found = guaranteed_threshold(c, right, 0.08, 0.1)
        answered += found.coverage > 0
        above = np.linspace(min(found.threshold, 1), 1, 2001)
        weight = 12 * above**11
        risk = (weight * (1 - above)).sum() / weight.sum() if found.coverage else 0
        broken += risk > 0.08
    assert broken <= 30 and answered > 200, (broken, answered)
    with pytest.raises(UsageError):
        guaranteed_threshold(c, right, 1.5)
    assert judge_threshold(2.0, c, right).sentence().startswith("It answers none")


# -- the stage


def test_the_stage_measures_files_and_refuses_an_empty_split(tmp_path):
    parts = []
    for split, seed in (("validation", 1), ("test", 2)):
        parts.append(table_of(*drawn(300, 3, 2.0, seed), split))
    write_predictions(pd.concat(parts), tmp_path / "p.parquet")
    quick = CalibrationConfig(resamples=100)
    record = create_record(tmp_path / "r", "calibrate")
    folder = calibrate(record, "", [str(tmp_path / "p.parquet")], quick)
    [told] = read_json(folder / "report.json")["models"].values()
    p, y = drawn(300, 3, 2.0, 1)
    fits = temperature_texts([f"validation-{k}" for k in range(300)], 0.25)
    own = likeliest_temperature(p[fits], y[fits]).temperature
    assert np.isclose(told["temperature"]["temperature"], own, rtol=1e-4)
    assert record.metrics["ece_after"] < record.metrics["ece_before"]
    write_predictions(parts[1], tmp_path / "q.parquet")
    with pytest.raises(DataError, match="validation: there is no text"):
        calibrate(record, "", [str(tmp_path / "q.parquet")], quick)


# -- the bundle

TEXTS = ["good great bad", "dull poor film", "fine", "awful good", "nothing known here"] * 12


def predictions_of(bundle, file, model="words"):
    plain = Predictor.load(bundle)
    scores = plain.model.scores(TEXTS)
    draw = np.random.default_rng(0)
    target = plain.task.predict(scores)
    flip = draw.random(len(TEXTS)) < 0.3
    ids = [str(k) for k in range(len(TEXTS))]
    rows = pd.DataFrame({"id": ids, plain.task.target: np.where(flip, 0, target)})
    table = predictions_table(plain.task, "validation", rows, scores, model, 10)
    write_predictions(table, file)
    return scores


@pytest.mark.parametrize("several", [False, True])
def test_a_temperature_travels_in_the_bundle(tmp_path, several):
    schema = MultiLabelSchema(labels=["a", "b", "c"], cleaning=Cleaning()) if several else None
    bundle = make_bundle(tmp_path / "bundle", schema=schema)
    before = predictions_of(bundle, tmp_path / "p.parquet")
    made, fitted = calibrate_bundle(bundle, tmp_path / "p.parquet", tmp_path / "calm")
    assert made == verify(tmp_path / "calm") and made.temperature == fitted.temperature != 1
    assert made.digest != verify(bundle).digest
    calm = Predictor.load(tmp_path / "calm")
    after = calm.model.scores(TEXTS)
    wanted = apply_temperature(before, fitted.temperature, not several)
    assert np.allclose(after, wanted, atol=1e-6) and not np.allclose(after, before)
    assert (calm.task.predict(after) == calm.task.predict(before)).all()
    said = calm.predict_batch(TEXTS[:5])
    told = [list((s.scores if several else s.probabilities).values()) for s in said]
    assert np.allclose(told, after[:5], atol=1e-5)
    again, _ = calibrate_bundle(tmp_path / "calm", tmp_path / "p.parquet", tmp_path / "twice")
    assert again.digest == made.digest  # replaced, not multiplied


def test_the_digest_and_so_a_signature_cover_the_temperature(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    predictions_of(bundle, tmp_path / "p.parquet")
    made, _ = calibrate_bundle(bundle, tmp_path / "p.parquet", tmp_path / "calm")
    new_key(tmp_path / "key")
    sign_bundle(tmp_path / "calm", tmp_path / "key")
    trusted = TrustedKeys.read([tmp_path / "key.pub"])
    trusted.check(tmp_path / "calm", made.digest)
    raw = json.loads((tmp_path / "calm" / "manifest.json").read_text())
    for value in (1.0, None):
        forged = {k: v for k, v in (raw | dict(temperature=value)).items() if v is not None}
        with pytest.raises(DataError, match="not as it was written"):
            read_manifest(json.dumps(forged).encode(), tmp_path)
    other = write_manifest(tmp_path / "calm", replace(made, temperature=1.0))
    with pytest.raises(DataError, match="signed"):
        trusted.check(tmp_path / "calm", other.digest)


def test_a_bundle_without_a_temperature_is_as_it_was(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    raw = json.loads((bundle / "manifest.json").read_text())
    assert "temperature" not in raw
    model = open_model(bundle, verify(bundle))
    assert (model.scores(TEXTS[:3]) == model.model.scores(TEXTS[:3])).all()


@pytest.mark.parametrize("value", [0, -1, 0.001, 1000, "2", True, float("nan")])
def test_a_manifest_with_a_strange_temperature_is_refused(tmp_path, value):
    raw = json.loads((make_bundle(tmp_path / "b") / "manifest.json").read_text())
    with pytest.raises(DataError):
        Manifest.from_json(raw | dict(temperature=value))
    assert Manifest.from_json(raw | dict(temperature=2.5)).temperature == 2.5


def test_what_has_no_classes_takes_no_temperature(tmp_path):
    schema = RegressionSchema(low=0, high=5, mean=2, scale=1)
    bundle = make_bundle(tmp_path / "bundle", schema=schema)
    with pytest.raises(UsageError, match="no probabilities of classes"):
        calibrate_bundle(bundle, tmp_path / "p.parquet", tmp_path / "new")
    manifest = write_manifest(bundle, replace(verify(bundle), temperature=2.0))
    with pytest.raises(DataError, match="temperature"):
        open_model(bundle, manifest)


def test_predictions_of_another_model_are_refused(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    manifest = verify(bundle)
    file = tmp_path / "p.parquet"
    predictions_of(bundle, file, "other")
    with pytest.raises(DataError, match=r"it has other \(10 labels\)"):
        fitted_for(manifest, file)
    assert fitted_for(manifest, file, "other").items == 15
    with pytest.raises(DataError, match="of another model"):
        fitted_for(replace(manifest, accuracy=dict(validation=0.123)), file, "other")
    write_predictions(table_of(*drawn(40, 3), model="words"), file)
    with pytest.raises(DataError, match="row 1 .*3 scores, and the bundle knows 2"):
        fitted_for(manifest, file)
    write_predictions(table_of(*drawn(40, 2), "test", "words"), file)
    with pytest.raises(DataError, match="no validation texts"):
        fitted_for(manifest, file)
    assert task_of(manifest.schema).single_label()
