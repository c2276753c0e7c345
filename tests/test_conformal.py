"""Conformal sets against a slow reference from the definition, and their promise in simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.evaluation.conformal import (
    coverage_band,
    covered_law,
    even_draws,
    exact_interval,
    fit_conformal,
    methods,
    needed_texts,
    nonconformity,
    report_sets,
)
from llmeco_nb.finetuning.linear import softmax


def drawn(n: int, classes: int, seed: int, rare: float = 0.0):
    "Too sure a model; with `rare` the last class has that share and is hard."
    draw = np.random.default_rng(seed)
    shares = np.full(classes, 1 / classes)
    if rare:
        shares = np.array([(1 - rare) / (classes - 1)] * (classes - 1) + [rare])
    y = draw.choice(classes, n, p=shares)
    z = draw.normal(size=(n, classes))
    hard = np.where(y == classes - 1, 0.4, 1.5) if rare else 1.5
    z[np.arange(n), y] += hard
    return softmax(2 * z), y


def slow_score(p, c, method, u, penalty, free):
    "Of one class of one text, from the definition: classes are sorted, equals by their number."
    if method == "lac":
        return 1 - p[c]
    order = sorted(range(len(p)), key=lambda k: (-p[k], k))
    rank = order.index(c) + 1
    score = sum(p[k] for k in order[: rank - 1]) + u * p[c]
    return score + (penalty * max(0, rank - free) if method == "raps" else 0)


def slow_sets(p, y, new, method, alpha, by_class, draws):
    "Which classes are in the set of each new text, one pair at a time."
    u, v = draws
    found = [[False] * p.shape[1] for _ in new]
    for c in range(p.shape[1]):
        own = [i for i in range(len(y)) if not by_class or y[i] == c]
        scores = sorted(slow_score(p[i], y[i], method, u[i], 0.01, 5) for i in own)
        for j, row in enumerate(new):
            score = slow_score(row, c, method, v[j], 0.01, 5)
            # at least floor(alpha (n+1)) of n+1 scores must be as large as this one
            larger = sum(s >= score - 1e-12 for s in scores)
            found[j][c] = larger + 1 > alpha * (len(own) + 1) + 1e-9
    return np.array(found)


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("method", methods)
def test_sets_are_those_of_a_slow_reference_by_p_values(method, by_class):
    for seed, alpha, classes in ((0, 0.1, 3), (1, 0.25, 8), (2, 0.5, 2)):
        p, y = drawn(60, classes, seed)
        new, _ = drawn(25, classes, seed + 100)
        fitted = fit_conformal(p, y, method, alpha, by_class, seed)
        draws = even_draws(60, seed, 1), even_draws(25, seed, 2)
        wanted = slow_sets(p, y, new, method, alpha, by_class, draws)
        assert (fitted.sets(new) == wanted).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 7), st.sampled_from(methods), st.booleans())
def test_scores_are_their_definition_with_ties_too(seed, classes, method, tied):
    draw = np.random.default_rng(seed)
    p = draw.dirichlet(np.ones(classes), 6)
    p = np.round(p, 1) if tied else p
    u = draw.random(6)
    found = nonconformity(p, method, u, 0.3, 2)
    wanted = [[slow_score(r, c, method, w, 0.3, 2) for c in range(classes)] for r, w in zip(p, u)]
    assert np.allclose(found, wanted)


@pytest.mark.parametrize("method", methods)
def test_coverage_is_promised_for_all_texts_and_for_each_class(method):
    held = {False: [], True: []}
    for seed in range(120):
        p, y = drawn(400, 4, seed, rare=0.12)
        for by_class, found in held.items():
            fitted = fit_conformal(p[:200], y[:200], method, 0.1, by_class, seed)
            inside = fitted.sets(p[200:])[np.arange(200), y[200:]]
            found.append((inside, y[200:] == 3))
    for by_class, found in held.items():
        inside = np.concatenate([one for one, _ in found])
        rare = np.concatenate([one[k] for one, k in found])
        assert 0.89 < inside.mean() < 0.93
        if by_class:
            assert rare.mean() > 0.885
        else:
            assert rare.mean() < 0.85


def test_too_few_texts_and_strange_levels_are_refused():
    p, y = drawn(8, 3, 0)
    with pytest.raises(DataError, match="8 calibration texts are too few.*9 are needed"):
        fit_conformal(p, y, alpha=0.1)
    assert fit_conformal(p, y, alpha=0.2).too_few == []
    for alpha in (0, 1, -0.1, 2):
        with pytest.raises(UsageError, match="alpha"):
            fit_conformal(p, y, alpha=alpha)
    with pytest.raises(UsageError, match="no method"):
        fit_conformal(p, y, "none", 0.5)
    with pytest.raises(DataError, match="3 classes"):
        fit_conformal(p, y, alpha=0.5).sets(np.full((2, 4), 0.25))
    for n in range(1, 300):
        for alpha in (0.01, 0.05, 0.1, 0.2, 0.3):
            enough = math.ceil(round((n + 1) * (1 - alpha), 9)) <= n
            assert enough == (n >= needed_texts(alpha)), (n, alpha)


def test_a_class_with_too_few_texts_is_named_and_stands_in_every_set():
    p, y = drawn(200, 3, 1)
    kept = np.flatnonzero((y != 2) | (np.cumsum(y == 2) <= 5))
    fitted = fit_conformal(p[kept], y[kept], "aps", 0.1, by_class=True)
    assert fitted.too_few == [2] and fitted.counts[2] == 5
    told = report_sets(fitted, p, y)
    assert fitted.sets(p)[:, 2].all() and told.by_class[2].share.estimate == 1
    assert told.by_class[2].band == (1.0, 1.0) and told.empty == 0


def test_intervals_and_bands_equal_scipy():
    from scipy.stats import betabinom, binomtest

    for hits, items in ((0, 7), (7, 7), (88, 100), (1, 3)):
        found = exact_interval(hits, items)
        wanted = binomtest(hits, items).proportion_ci(0.95, "exact")
        assert np.allclose((found.low, found.high), (wanted.low, wanted.high))
    for n, m, alpha in ((50, 40, 0.1), (500, 2000, 0.05), (9, 100, 0.1)):
        k = math.ceil(round((n + 1) * (1 - alpha), 9))
        wanted = betabinom.ppf([0.025, 0.975], m, k, n + 1 - k) / m
        assert np.allclose(coverage_band(covered_law(n, m, alpha)), wanted)
        assert np.isclose(covered_law(n, m, alpha).sum(), 1)
    assert coverage_band(covered_law(5, 100, 0.1)) == (1.0, 1.0)
    with pytest.raises(DataError):
        exact_interval(3, 2)


def test_the_report_counts_sizes_and_a_class_without_texts():
    p, y = drawn(400, 5, 3)
    fitted = fit_conformal(p[:200], y[:200], "lac", 0.3)
    rest = y[200:] != 4
    told = report_sets(fitted, p[200:][rest], y[200:][rest])
    sets = fitted.sets(p[200:][rest])
    assert told.by_class[4] is None and told.sizes.sum() == rest.sum()
    assert np.isclose(told.mean_size, sets.sum(1).mean())
    assert np.isclose(told.empty, (sets.sum(1) == 0).mean())
    hits = sets[np.arange(rest.sum()), y[200:][rest]]
    assert np.isclose(told.coverage.share.estimate, hits.mean())


def test_the_band_of_a_threshold_for_each_class_knows_that_each_rounds_up():
    inside = []
    for seed in range(150):
        p, y = drawn(400, 8, seed)
        fitted = fit_conformal(p[:120], y[:120], "lac", 0.1, by_class=True)
        told = report_sets(fitted, p[120:], y[120:])
        inside.append((told.coverage.kept, told.coverage.share.estimate))
    kept, share = np.mean(inside, axis=0)
    assert kept > 0.9 and share > 0.915
