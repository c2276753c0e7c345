"""Statistics against scipy and statsmodels, their symmetries and their error rates."""

import warnings

import numpy as np
import pytest
import scipy.stats as ss
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import normal_sample_size_one_tail
from statsmodels.stats.proportion import proportion_confint, proportions_ztest

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.stats.metrics import confusion_matrix, score
from llmeco_nb.stats.power import minimum_detectable_accuracy, minimum_detectable_difference
from llmeco_nb.stats.significance import (
    Interval,
    average,
    bootstrap,
    compare,
    compare_metric,
    confusion_statistic,
    difference,
    holm,
    mcnemar,
    paired_difference,
    permutation_test,
    tango_z,
    wilson,
)

fast = settings(max_examples=40, deadline=None)
few = settings(max_examples=15, deadline=None)
cells = st.tuples(*[st.integers(0, 60)] * 4).filter(lambda c: sum(c) > 0)
levels = st.sampled_from([0.8, 0.9, 0.95, 0.99])
numbers = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=5, max_size=40).filter(
    lambda v: np.ptp(v) > 0.1
)
samples = st.builds(
    lambda seed, n, power: np.random.default_rng(seed).normal(size=n) ** power,
    st.integers(0, 10**6),
    st.integers(20, 60),
    st.sampled_from([1, 2]),
)


def models(both, b, c, neither):
    return np.repeat([1, 1, 0, 0], [both, b, c, neither]), np.repeat(
        [1, 0, 1, 0], [both, b, c, neither]
    )


# one proportion


@fast
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), levels)
def test_wilson_is_statsmodels_and_mirrors(counts, level):
    right, items = counts
    w, mirror = wilson(right, items, level), wilson(items - right, items, level)
    assert np.allclose(
        (w.low, w.high), proportion_confint(right, items, 1 - level, method="wilson")
    )
    assert (
        np.allclose((w.low, w.high), (1 - mirror.high, 1 - mirror.low))
        and -1e-12 <= w.low <= w.estimate <= w.high <= 1 + 1e-12
    )
    assert w.p_value(w.estimate) == pytest.approx(1)
    for end in (w.low, w.high):
        assert w.p_value(end) == pytest.approx(1 - level) or end in (0, 1)
    if 0 < right < items:
        for truth in (0.1, 0.5, 0.77):
            assert w.p_value(truth) == pytest.approx(
                proportions_ztest(right, items, truth, prop_var=truth)[1]
            )


@pytest.mark.parametrize("right, items", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(right, items):
    with pytest.raises(DataError):
        wilson(right, items)
    with pytest.raises(UsageError):
        wilson(1, 2, 95)


# two models, right and wrong


@fast
@given(cells)
def test_mcnemar_is_statsmodels_and_takes_no_side(c):
    first, second = models(*c)
    theirs = (
        statsmodels_mcnemar([[c[0], c[1]], [c[2], c[3]]], exact=True).pvalue if c[1] + c[2] else 1.0
    )
    assert mcnemar(first, second) == pytest.approx(theirs) == pytest.approx(mcnemar(second, first))


@pytest.mark.parametrize("m", [1, 5, 17, 60, 200])
def test_mcnemar_never_raises_more_false_alarms_than_promised(m):
    b = np.arange(m + 1)
    p = np.array([mcnemar(*models(3, k, m - k, 2)) for k in b])
    for alpha in (0.01, 0.05, 0.2):
        assert ss.binom.pmf(b, m, 0.5)[p <= alpha].sum() <= alpha + 1e-12


@fast
@given(cells, levels)
def test_paired_difference_mirrors_and_ends_where_its_test_says(c, level):
    d, mirror = paired_difference(*models(*c), level), paired_difference(*models(*c)[::-1], level)
    n = sum(c)
    assert d.estimate == pytest.approx((c[1] - c[2]) / n) and np.allclose(
        (d.low, d.high), (-mirror.high, -mirror.low), atol=1e-6
    )
    assert -1 <= d.low <= d.estimate <= d.high <= 1 and d.high > d.low
    for end in (d.low, d.high):
        if abs(end) < 1 - 1e-6:
            assert d.p_value(end) == pytest.approx(1 - level, abs=1e-4)
    if c[1] + c[2]:
        assert tango_z(c[1], c[2], n, 0) == pytest.approx((c[1] - c[2]) / np.sqrt(c[1] + c[2]))


@fast
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 200), st.floats(-0.3, 0.3))
def test_tango_uses_the_most_likely_shares(b, c, rest, delta):
    n, grid = b + c + rest, np.linspace(max(0, -delta), (1 - delta) / 2, 200_001)[1:-1]
    q = grid[
        np.argmax(b * np.log(grid + delta) + c * np.log(grid) + rest * np.log1p(-2 * grid - delta))
    ]
    z = (b - c - n * delta) / np.sqrt(n * (2 * q + delta * (1 - delta)))
    assert tango_z(b, c, n, delta) == pytest.approx(z, abs=2e-3)


def test_paired_difference_of_the_published_example():
    d = paired_difference(
        *models(1, 1, 7, 12)
    )  # Fagerland, Lydersen and Laake 2014: 21 children, airway hyper-responsiveness
    assert (round(d.low, 3), round(d.high, 3)) == (-0.517, -0.026)


def test_paired_difference_covers():
    rng, shares = np.random.default_rng(0), [0.85, 0.06, 0.03, 0.06]
    inside = [0.03 in paired_difference(*models(*rng.multinomial(200, shares))) for _ in range(800)]
    assert abs(np.mean(inside) - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 800) + 0.01


# bootstrap


@few
@given(samples, st.sampled_from(["percentile", "BCa"]), levels, st.integers(0, 99))
def test_bootstrap_is_scipys_draw_for_draw(values, method, level, seed):
    values = np.sort(values)
    theirs = ss.bootstrap(
        (values,),
        np.mean,
        n_resamples=400,
        method=method,
        confidence_level=level,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    ours = bootstrap(average, values, resamples=400, method=method.lower(), level=level, seed=seed)
    assert np.allclose((ours.low, ours.high), theirs) and ours.estimate == pytest.approx(
        values.mean()
    )


def test_bootstrap_of_a_difference_is_scipys_paired_one():
    rng = np.random.default_rng(1)
    a = np.sort(rng.normal(size=60))
    b = a + rng.normal(0.2, 0.5, 60)
    theirs = ss.bootstrap(
        (a, b),
        lambda x, y, axis=-1: np.mean(x - y, axis),
        paired=True,
        n_resamples=1000,
        method="BCa",
        rng=np.random.default_rng(2),
    )
    ours = bootstrap(difference, a, b, resamples=1000, seed=2)
    assert np.allclose((ours.low, ours.high), theirs.confidence_interval)


@few
@given(numbers, st.randoms(), st.floats(0.1, 10), st.floats(-50, 50))
def test_bootstrap_forgets_the_order_and_follows_the_scale(values, random, factor, shift):
    shuffled = list(values)
    random.shuffle(shuffled)
    one = bootstrap(average, values, resamples=300)
    assert one == bootstrap(average, shuffled, resamples=300) and one.low <= one.high
    moved = bootstrap(average, np.array(values) * factor + shift, resamples=300)
    assert np.allclose(
        (moved.low, moved.high),
        np.array((one.low, one.high)) * factor + shift,
        atol=1e-6 * factor * 100,
    )


@few
@given(samples, st.sampled_from(["percentile", "bca"]), st.sampled_from([0.8, 0.9, 0.95]))
def test_bootstrap_rejects_what_its_interval_leaves_out(values, method, level):
    i = bootstrap(average, values, resamples=999, method=method, level=level)
    out, reach = 1e-2 * (i.high - i.low), i.high - i.low
    assert (
        i.p_value(i.low - out) <= 1 - level + 0.01 and i.p_value(i.high + out) <= 1 - level + 0.01
    )
    assert (
        i.p_value(i.low + out) >= 1 - level - 0.01 and i.p_value(i.high - out) >= 1 - level - 0.01
    )
    assert i.p_value(i.low - 3 * reach) < 0.05 and i.p_value(i.estimate) > 0.6


def test_bca_of_a_biased_statistic_is_scipys_and_its_test_agrees():
    def variance(w, values):
        return (
            w @ values**2 / w.sum(1) - average(w, values) ** 2
        )  # too small by (n - 1)/n, more so when resampled

    values = np.sort(np.random.default_rng(11).normal(size=25))
    theirs = ss.bootstrap(
        (values,), np.var, n_resamples=5000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = bootstrap(variance, values, resamples=5000, seed=1)
    assert np.allclose((ours.low, ours.high), theirs)
    assert ours.p_value(ours.low) == pytest.approx(0.05, abs=0.002) and ours.p_value(
        ours.high
    ) == pytest.approx(0.05, abs=0.002)


def test_equal_items_drawn_together_or_apart_give_the_same_interval():
    right = np.repeat([1.0, 0.0], [430, 70])
    apart = bootstrap(
        average, right + np.linspace(0, 1e-7, 500), resamples=20_000
    )  # all different, to the eye the same
    together = bootstrap(average, right, resamples=20_000)
    assert abs(apart.low - together.low) < 0.003 and abs(apart.high - together.high) < 0.003


def test_bootstrap_of_macro_f1_is_the_slow_one():
    rng = np.random.default_rng(3)
    y = rng.integers(0, 4, 150)
    p = np.where(rng.random(150) < 0.7, y, rng.integers(0, 4, 150))
    q = np.where(rng.random(150) < 0.6, y, rng.integers(0, 4, 150))
    f1 = lambda y, p: float(score(confusion_matrix(y, p, 4), "f1"))
    drawn = rng.integers(0, 150, (3000, 150))
    for columns, slow in (
        ((y, p), [f1(y[i], p[i]) for i in drawn]),
        ((y, p, q), [f1(y[i], p[i]) - f1(y[i], q[i]) for i in drawn]),
    ):
        ours = bootstrap(
            confusion_statistic("f1", n_classes=4), *columns, resamples=3000, method="percentile"
        )
        width = ours.high - ours.low
        assert np.allclose(
            (ours.low, ours.high), np.quantile(slow, (0.025, 0.975)), atol=0.06 * width
        )


def test_clusters_of_one_change_nothing_and_copies_add_nothing():
    values = np.random.default_rng(4).normal(size=80)
    alone, ones = (
        bootstrap(average, np.sort(values)),
        bootstrap(average, np.sort(values), clusters=np.arange(80)),
    )
    assert np.allclose((alone.low, alone.high), (ones.low, ones.high))
    tenfold = bootstrap(
        average, np.repeat(np.sort(values), 10), clusters=np.repeat(np.arange(80), 10)
    )
    assert np.allclose((alone.low, alone.high), (tenfold.low, tenfold.high))
    naive = bootstrap(average, np.repeat(values, 10))
    assert (alone.high - alone.low) > 2.5 * (naive.high - naive.low)  # √10 = 3.2


def test_bootstrap_covers():
    trials = np.random.default_rng(5).normal(2, 1, (300, 60))
    assert abs(np.mean([2 in bootstrap(average, t, resamples=500) for t in trials]) - 0.95) < 0.045


@pytest.mark.parametrize(
    "columns", [([],), ([1, np.nan],), ([1, np.inf],), ([1, 2], [1]), (["a", "b"],), ([[1, 2]],)]
)
def test_bootstrap_and_permutation_refuse_what_they_cannot_draw(columns):
    with pytest.raises(DataError):
        bootstrap(average, *columns)
    with pytest.raises(DataError):
        permutation_test(difference, columns[0], columns[-1])


def test_bootstrap_refuses_unknown_methods_levels_and_clusters():
    with pytest.raises(UsageError):
        bootstrap(average, [1, 2], method="t")
    with pytest.raises(UsageError):
        bootstrap(average, [1, 2], level=1)
    with pytest.raises(DataError):
        bootstrap(average, [1, 2], clusters=[1])
    assert (
        bootstrap(average, [3.0, 3.0, 3.0]).p_value(5) == 1
    )  # draws without spread are no evidence


# permutation


@few
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=10))
def test_permutation_is_scipys_exact_one(pairs):
    a, b = np.round(np.array(pairs).T, 3)
    exact = ss.permutation_test(
        (a, b),
        lambda x, y, axis=-1: np.mean(x - y, axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    ).pvalue
    ours = permutation_test(difference, a, b, resamples=4000)
    assert abs(ours - exact) < 5 * np.sqrt(exact * (1 - exact) / 4000) + 1 / 4000


@few
@given(cells)
def test_permutation_of_right_and_wrong_is_mcnemar(c):
    exact = mcnemar(*models(*c))
    assert (
        abs(permutation_test(difference, *models(*c), resamples=4000) - exact)
        < 5 * np.sqrt(exact * (1 - exact) / 4000) + 1 / 4000
    )


def test_permutation_keeps_its_error_rate():
    rng = np.random.default_rng(6)
    p = np.array(
        [
            permutation_test(difference, *rng.exponential(size=(2, 25)), resamples=199)
            for _ in range(600)
        ]
    )
    assert 0.02 < (p <= 0.05).mean() < 0.08 and 0.4 < p.mean() < 0.6
    y = rng.integers(0, 3, (150, 60))
    a, b = (np.where(rng.random(y.shape) < 0.7, y, 0) for _ in range(2))
    p = np.array(
        [
            permutation_test(confusion_statistic("f1", n_classes=3), *columns, resamples=99)
            for columns in zip(y, a, b)
        ]
    )
    assert (p <= 0.05).mean() < 0.12 and 0.38 < p.mean() < 0.62


def test_permutation_sees_a_difference():
    rng = np.random.default_rng(7)
    assert permutation_test(difference, rng.normal(1, 1, 60), rng.normal(0, 1, 60)) == 1e-4
    assert permutation_test(difference, np.ones(5), np.ones(5)) == 1


# power, families, comparisons


@fast
@given(
    st.integers(200, 100_000),
    st.floats(0.01, 0.5),
    st.sampled_from([0.01, 0.05]),
    st.sampled_from([0.5, 0.8, 0.95]),
)
def test_detectable_inverts_the_sample_size_of_statsmodels(items, psi, alpha, power):
    d = minimum_detectable_difference(items, psi, alpha, power)
    assume(d < psi)
    assert normal_sample_size_one_tail(
        d, power, alpha / 2, np.sqrt(psi), np.sqrt(psi - d * d)
    ) == pytest.approx(items)
    assert (
        minimum_detectable_difference(2 * items, psi, alpha, power)
        < d
        < minimum_detectable_difference(items, psi, alpha, power + 0.02)
    )


@pytest.mark.parametrize("name", ["alpha", "power"])
@pytest.mark.parametrize("share", [5, 1, 0, -0.5, float("nan")])
def test_detectable_refuses_what_is_no_probability(name, share):
    with pytest.raises(UsageError, match=f"{name} lies between 0 and 1; found {share}"):
        minimum_detectable_difference(1000, **{name: share})


def test_detectable_of_well_known_test_sets():
    assert [round(100 * minimum_detectable_difference(n, 0.1), 1) for n in (3080, 970, 943)] == [
        1.6,
        2.8,
        2.9,
    ]  # BANKING77, PhraseBank, MovieLens-100k
    rng, d = np.random.default_rng(8), minimum_detectable_difference(970, 0.1)
    drawn = rng.multinomial(970, [0.85, 0.05 + d / 2, 0.05 - d / 2, 0.05], size=600)
    assert 0.72 < np.mean([mcnemar(*models(*c)) < 0.05 for c in drawn]) < 0.84


@pytest.mark.parametrize("alpha, needed", [(0.05, 6), (0.01, 8), (0.5, 2), (0.0625, 5)])
@pytest.mark.parametrize("items", [1, 5, 6, 7, 50, 970, 3080])
def test_models_that_hardly_differ_show_what_the_exact_test_can_show(items, alpha, needed):
    d = minimum_detectable_accuracy(items, 0.0, alpha)
    if items < needed:
        assert d is None
        return
    # every way in which one-sided discordance of share d can fall, by enumeration
    b = np.arange(items + 1)
    rejects = np.array([ss.binomtest(int(k), int(k)).pvalue <= alpha if k else False for k in b])
    assert ss.binom.pmf(b, items, d)[rejects].sum() == pytest.approx(0.8)


@fast
@given(st.integers(6, 5000), st.floats(0, 1))
def test_no_detectable_accuracy_is_below_the_floor_or_beyond_the_discordance(items, psi):
    d, normal = minimum_detectable_accuracy(items, psi), minimum_detectable_difference(items, psi)
    floor = minimum_detectable_accuracy(items, 0.0)
    assert 0 < floor <= d <= 1
    assert d == (floor if normal > psi else max(normal, floor))


def test_few_clusters_warn():
    scores = np.random.default_rng(1).normal(size=400)
    with pytest.warns(UserWarning, match="over 19 clusters covers less than the 95%"):
        bootstrap(average, scores, clusters=np.arange(400) % 19, resamples=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bootstrap(average, scores, clusters=np.arange(400) % 20, resamples=50)


@fast
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_its_definition_and_between_naive_and_bonferroni(p):
    p, adjusted, m = np.array(p), holm(p), len(p)
    for i, q in zip(np.argsort(p, kind="stable"), range(m)):
        assert adjusted[i] == pytest.approx(
            min(1, max((m - j) * np.sort(p)[j] for j in range(q + 1)))
        )
    assert (p <= adjusted).all() and (adjusted <= np.minimum(1, p * m) + 1e-12).all()


def test_holm_is_statsmodels():
    p = np.random.default_rng(10).random(50) ** 3
    assert np.allclose(holm(p), multipletests(p, method="holm")[1])


def test_holm_refuses_what_is_no_probability():
    for bad in ([1.1], [-0.1], [float("nan")]):
        with pytest.raises(DataError):
            holm(bad)


@fast
@given(cells)
def test_compare_of_right_and_wrong_is_mcnemar_and_tango(c):
    first, second = models(*c)
    one, other = compare(first, second), compare(second.astype(bool), first.astype(float))
    assert (
        one.method == "McNemar, exact"
        and one.p == mcnemar(first, second)
        and one.interval == paired_difference(first, second)
    )
    assert (
        one.difference
        == pytest.approx(first.mean() - second.mean())
        == pytest.approx(-other.difference)
        and one.p == other.p
    )
    assert one.detectable == pytest.approx(
        minimum_detectable_accuracy(sum(c), (c[1] + c[2]) / sum(c))
    ) and one.items == sum(c)
    assert one.p_value(0) == one.p and one.p_value(one.difference) > 0.99


def test_compare_of_scores_metrics_and_clusters():
    rng = np.random.default_rng(9)
    a, b = rng.normal(0.3, 1, 200), rng.normal(0, 1, 200)
    c = compare(a, b, resamples=999)
    assert (
        c.method == "permutation"
        and c.first == pytest.approx(a.mean())
        and c.difference == pytest.approx((a - b).mean())
        and c.difference in c.interval
    )
    assert compare(a, b, resamples=999) == c
    doubled = compare(
        np.repeat(a, 2), np.repeat(b, 2), clusters=np.repeat(np.arange(200), 2), resamples=999
    )
    assert (
        doubled.p == c.p
        and doubled.detectable == pytest.approx(c.detectable)
        and doubled.difference == pytest.approx(c.difference)
    )
    y = rng.integers(0, 3, 200)
    p, q = (np.where(rng.random(200) < s, y, 0) for s in (0.9, 0.6))
    f1 = compare_metric(y, p, q, resamples=999)
    assert (
        f1.difference
        == pytest.approx(
            float(score(confusion_matrix(y, p), "f1") - score(confusion_matrix(y, q), "f1"))
        )
        and f1.p == 0.001
        and f1.interval.low > 0
    )
    assert compare_metric(y, p, q, "accuracy") == compare(y == p, y == q)
    assert set(f1.metrics("f1_")) == {
        f"f1_{k}"
        for k in ("first", "second", "difference", "low", "high", "p", "detectable", "items")
    }
    for bad in (([1, 2], [1]), ([], []), ([1, np.nan], [1, 2])):
        with pytest.raises(DataError):
            compare(*bad)
    with pytest.raises(DataError):
        compare_metric(y, p, q[:-1])
    with pytest.raises(UsageError):
        compare_metric(y, p, q, "f7")


def test_an_interval_without_a_test_takes_a_normal_curve():
    i = Interval(0.02, 0.0004, 0.0396)
    assert (
        i.p_value(0) == pytest.approx(0.0455, abs=1e-3)
        and i.p_value(0.02) == 1
        and Interval(1, 1, 1).p_value(1) == 1
        and Interval(1, 1, 1).p_value(0) == 0
    )
    assert 0.01 in i and 0.04 not in i and str(i) == "0.020 [0.000, 0.040]"
