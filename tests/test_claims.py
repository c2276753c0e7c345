"""Claims: the verdict follows from the evidence, and nothing is lost on disk.

The family can only make a verdict more careful.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, MissingError, UsageError, markdown_text
from llmeco_nb.stats.claims import (
    Claim,
    adjust_pvalues,
    claim,
    claims_table,
    read_claims,
    write_claims,
)
from llmeco_nb.stats.power import minimum_detectable_difference
from llmeco_nb.stats.significance import (
    average,
    bootstrap,
    compare,
    holm,
    wilson,
)

fast = settings(max_examples=80, deadline=None)
probability = st.floats(0, 1)
made = st.builds(
    claim,
    st.text(max_size=20),
    st.floats(-1, 1),
    p=probability,
    margin=st.floats(-0.5, 0.5),
    alpha=st.sampled_from([0.01, 0.05]),
    detectable=st.none() | st.floats(0.001, 0.5),
)


@fast
@given(made)
def test_a_verdict_needs_both_a_side_and_a_test(c):
    assert (c.verdict == "not shown") == (c.p > c.alpha)
    if c.verdict != "not shown":
        assert (c.verdict == "supported") == (c.difference > c.margin)
    assert (
        c.verdict in c.badge and c.badge in c.markdown() and markdown_text(c.text) in c.markdown()
    )


def test_alpha_and_company_decide():
    assert (
        claim("x", 0.1, p=0.03).verdict == "supported"
        and claim("x", 0.1, p=0.03, alpha=0.01).verdict == "not shown"
    )
    assert [
        c.verdict for c in adjust_pvalues([claim("x", 0.1, p=0.03), claim("y", -0.1, p=0.001)])
    ] == ["supported", "refuted"]
    assert [
        c.verdict for c in adjust_pvalues([claim("x", 0.1, p=0.03), claim("y", -0.1, p=0.03)])
    ] == ["not shown"] * 2


@fast
@given(st.floats(-1, 1), st.floats(0.001, 0.3), st.floats(-0.5, 0.5))
def test_an_interval_supports_refutes_or_holds_the_margin(difference, half, margin):
    c = claim("x", difference, interval=(difference - half, difference + half), margin=margin)
    gap = abs(difference - margin)
    if gap > 1.001 * half:
        assert c.verdict == ("supported" if difference > margin else "refuted")
    if gap < 0.999 * half:
        assert c.verdict == "not shown"
    opposite = claim(
        "not x", -difference, interval=(-difference - half, -difference + half), margin=-margin
    )
    assert opposite.p == pytest.approx(c.p) and {c.verdict, opposite.verdict} in (
        {"not shown"},
        {"supported", "refuted"},
    )


@fast
@given(st.lists(made, max_size=8))
def test_a_family_is_never_less_careful_and_judging_twice_is_judging_once(claims):
    judged = adjust_pvalues(claims)
    assert np.allclose([c.p_adjusted for c in judged], holm([c.p for c in claims])) and [
        c.verdict for c in adjust_pvalues(judged)
    ] == [c.verdict for c in judged]
    for before, after in zip(claims, judged):
        assert after.family == len(claims) and (
            after.verdict == before.verdict or after.verdict == "not shown"
        )
        if before.detectable is not None:
            # the level that Holm grants the smallest p-value of the family
            share = minimum_detectable_difference(900, 0.2, before.alpha / len(claims)) / (
                minimum_detectable_difference(900, 0.2, before.alpha)
            )
            assert after.detectable == pytest.approx(before.detectable * share, rel=0.03)
    bigger = adjust_pvalues(judged + [claim("one more", 0.0, p=1.0)])
    assert all(b.p_adjusted >= a.p_adjusted - 1e-12 for a, b in zip(judged, bigger))


@fast
@given(st.lists(made, max_size=5))
def test_claims_survive_the_disk(tmp_path_factory, claims):
    file = tmp_path_factory.mktemp("claims") / "claims.json"
    write_claims(file, adjust_pvalues(claims))
    assert read_claims(file) == adjust_pvalues(claims)
    json.loads(file.read_text())


@fast
@given(
    st.lists(
        st.builds(claim, st.text("ab| ", min_size=1), st.floats(-1, 1), p=probability),
        min_size=1,
        max_size=5,
    )
)
def test_a_table_has_a_row_a_claim_and_six_cells_a_row(claims):
    rows = claims_table(adjust_pvalues(claims)).split("\n")
    assert len(rows) == 2 + len(claims) and all(r.replace("\\|", "").count("|") == 7 for r in rows)


def test_evidence_in_all_its_shapes():
    rng = np.random.default_rng(0)
    base = rng.random(2000) < 0.8
    better, same = base | (rng.random(2000) < 0.2), base ^ (rng.random(2000) < 0.002)
    c = claim("better", compare(better, base))
    assert (
        c.verdict == "supported"
        and c.p == compare(better, base).p
        and c.low > 0
        and c.detectable == compare(better, base).detectable
    )
    assert claim("worse", compare(base, better)).verdict == "refuted"
    assert (
        claim("no more than a point is lost", compare(same, base), margin=-0.01).verdict
        == "supported"
    )
    assert claim("a point is won", compare(same, base), margin=0.01).verdict == "refuted"
    assert (
        claim(
            "no answer changed, so less than a point is lost", compare(base, base), margin=-0.01
        ).verdict
        == "supported"
    )
    assert claim("better", compare(base, base)).verdict == "not shown"
    assert claim("above 75 %", wilson(int(base.sum()), 2000), margin=0.75).verdict == "supported"
    losses = rng.exponential(size=300)
    assert (
        claim("loss above 1/2", bootstrap(average, losses), margin=0.5, unit="nats").verdict
        == "supported"
    )
    assert claim("better", 0.3, p=0.01, interval=(0.1, 0.5)).low == 0.1


def test_what_people_read():
    c = claim("the small one is faster", -3.21, p=0.002, unit="ms")
    assert c.markdown() == "✗ **refuted**: the small one is faster (−3.21 ms; p = 0.002)"
    c = adjust_pvalues(
        [claim("it helps", 0.006, p=0.2, interval=(-0.002, 0.013), margin=0.001, detectable=0.011)]
    )[0]
    assert c.markdown() == (
        "○ **not shown**: it helps (+0.6 points; 95% interval −0.2 points to +1.3 points; must "
        "exceed +0.1 points; "
        "p = 0.2; 1.1 points would have shown)"
    )


def test_what_is_refused(tmp_path):
    with pytest.raises(UsageError, match="needs a p-value"):
        claim("x", 0.1)
    for bad in (dict(p=1.5), dict(p=float("nan"))):
        with pytest.raises(DataError):
            claim("x", 0.1, **bad)
    with pytest.raises(DataError):
        claim("x", float("nan"), p=0.5)
    with pytest.raises(MissingError):
        read_claims(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('[{"name": 1}]')
    with pytest.raises(DataError):
        read_claims(tmp_path / "other.json")
    assert adjust_pvalues([]) == [] and isinstance(Claim("x", 0.1, 0.5), Claim)
