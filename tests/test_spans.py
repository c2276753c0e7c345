"""Spans and their scores, beside seqeval's where it is installed, on tags of any kind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.stats.spans import Span, iob2_tags, span_counts, span_report, spans_of

POSITIONS = ("B", "I", "E", "S")
tags = st.one_of(
    st.just("O"), st.builds("{}-{}".format, st.sampled_from(POSITIONS), st.sampled_from("PLX"))
)
sentences = st.lists(st.lists(tags, max_size=9), min_size=1, max_size=6)


@st.composite
def pairs(draw):
    "True and predicted tags of the same words."
    true = draw(sentences)
    said = [draw(st.lists(tags, min_size=len(t), max_size=len(t))) for t in true]
    return true, said


@settings(deadline=None)
@given(pairs())
def test_scores_equal_those_of_seqeval(pair):
    seqeval = pytest.importorskip("seqeval.metrics", reason="needs seqeval, which is not installed")
    sequence_labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    true, said = pair
    for one in true:
        theirs = [Span(k, b, e + 1) for k, b, e in sequence_labeling.get_entities(one)]
        assert spans_of(one) == theirs
    report = span_report(true, said)
    more = dict(zero_division=0)
    assert np.isclose(report["f1"], seqeval.f1_score(true, said, **more))
    assert np.isclose(report["precision"], seqeval.precision_score(true, said, **more))
    assert np.isclose(report["recall"], seqeval.recall_score(true, said, **more))


@settings(deadline=None)
@given(pairs())
def test_counts_keep_their_order(pair):
    "Right spans are no more than predicted or true ones; swapping the two swaps their columns."
    true, said = pair
    one, other = span_counts(true, said), span_counts(said, true)
    assert (one.counts[..., 0] <= one.counts[..., 1:].min(-1)).all()
    assert (one.counts == other.counts[..., [0, 2, 1]]).all() and one.kinds == other.kinds
    assert span_report(true, said)["f1"] == span_report(said, true)["f1"]


@settings(deadline=None)
@given(st.lists(tags, max_size=12))
def test_spans_are_apart_in_order_and_hold_every_tagged_word(sentence):
    found = spans_of(sentence)
    inside = [place for span in found for place in range(span.start, span.end)]
    assert inside == [place for place, tag in enumerate(sentence) if tag != "O"]
    assert spans_of(iob2_tags(found, len(sentence))) == found
