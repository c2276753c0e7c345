"""Ranking and generation metrics against scikit-learn, sacrebleu and slow references by hand, on
whatever hypothesis finds."""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.stats.generation import (
    bits_per_byte_of,
    bleu_statistic,
    byte_counts,
    check_generated,
    generation_scores,
    language_model_report,
    perplexity_of,
)
from llmeco_nb.stats.metrics import mcc
from llmeco_nb.stats.ranked_lists import list_metrics, list_scores
from llmeco_nb.stats.ranking import (
    auroc,
    auroc_difference,
    auroc_interval,
    auroc_statistic,
    average_precision,
    average_precision_statistic,
    check_probabilities,
    multiclass_auroc,
    one_vs_rest,
    ranking_curve,
)
from llmeco_nb.stats.significance import bootstrap
from llmeco_nb.stats.spans import Span, spans_of

fast = settings(max_examples=50, deadline=None)
numbers = st.one_of(st.integers(-3, 3), st.floats(-1e6, 1e6), st.sampled_from([0.0, 1e-9, 0.5]))


@st.composite
def scored(draw, most=30):
    "Labels with both classes, and scores with many ties."
    n = draw(st.integers(2, most))
    labels = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    assume(0 < sum(labels) < n)
    return np.array(labels), np.array(draw(st.lists(numbers, min_size=n, max_size=n)), float)


# -- two classes


@fast
@given(scored())
def test_auroc_and_average_precision_are_scikit_learns(data):
    y, s = data
    assert auroc(y, s) == pytest.approx(sk.roc_auc_score(y, s))
    assert average_precision(y, s) == pytest.approx(sk.average_precision_score(y, s))
    assert auroc(y, s) + auroc(1 - y, s) == pytest.approx(1)
    assert auroc(y, s) == auroc(y.astype(bool), s)


@fast
@given(scored())
def test_curves_are_scikit_learns(data):
    y, s = data
    curve = ranking_curve(y, s)
    fpr, tpr, thresholds = sk.roc_curve(y, s, drop_intermediate=False)
    assert curve.false_positive_rate == pytest.approx(fpr[1:])
    assert curve.recall == pytest.approx(tpr[1:])
    assert curve.thresholds == pytest.approx(thresholds[1:])
    precision, recall, _ = sk.precision_recall_curve(y, s)
    assert curve.precision == pytest.approx(precision[:-1][::-1])
    assert curve.recall == pytest.approx(recall[:-1][::-1])


@settings(max_examples=25, deadline=None)
@given(scored(), st.integers(0, 2**32 - 1))
def test_a_resample_is_its_rows_written_out(data, seed):
    y, s = data
    w = np.random.default_rng(seed).integers(0, 4, (3, len(y)))
    for statistic, theirs, none in (
        (auroc_statistic, sk.roc_auc_score, 0.5),
        (average_precision_statistic, sk.average_precision_score, None),
    ):
        for row, value in zip(w, statistic(w, y, s)):
            drawn, scores = np.repeat(y, row), np.repeat(s, row)
            if 0 < drawn.sum() < len(drawn):
                assert value == pytest.approx(theirs(drawn, scores))
            elif none is not None:
                assert value == none
            else:
                assert value == (1 if drawn.sum() else 0)


@fast
@given(scored())
def test_intervals_hold_what_their_test_does_not_reject(data):
    y, s = data
    one = auroc_interval(y, s)
    assert 0 <= one.low <= one.estimate <= one.high <= 1
    assert one.estimate == pytest.approx(auroc(y, s))
    for end in (one.low, one.high):
        if 1e-9 < end < 1 - 1e-9 and one.low < one.high:
            assert one.p_value(end) == pytest.approx(0.05, abs=1e-4)
    assert one.high > one.low  # even where every pair is right
    assert auroc_interval(y, -s).low == pytest.approx(1 - one.high, abs=1e-6)


def slow_delong(y, s):
    "DeLong's variance from all pairs, as the paper writes it."
    psi = np.array([[(a > b) + (a == b) / 2 for b in s[y == 0]] for a in s[y == 1]])
    return psi.mean(1).var(ddof=1) / len(psi) + psi.mean(0).var(ddof=1) / psi.shape[1]


def test_delong_is_that_of_all_pairs_and_near_the_bootstrap():
    rng = np.random.default_rng(3)
    y = np.repeat([0, 1], [70, 40])
    s, t = np.round(rng.normal(size=(2, 110)) + y, 1)
    one = auroc_interval(y, s)
    logit = lambda p: math.log(p / (1 - p))
    error = (logit(one.high) - logit(one.low)) / 2 / 1.959964
    theta = one.estimate
    assert error * theta * (1 - theta) == pytest.approx(math.sqrt(slow_delong(y, s)), rel=1e-6)
    drawn = bootstrap(auroc_statistic, y, s, resamples=800)
    assert one.low == pytest.approx(drawn.low, abs=0.03)
    assert one.high == pytest.approx(drawn.high, abs=0.03)
    paired = auroc_difference(y, s, t)
    assert paired.estimate == pytest.approx(auroc(y, s) - auroc(y, t))
    unpaired = math.sqrt(slow_delong(y, s) + slow_delong(y, t))
    both = auroc_difference(y, s, s + t)  # two scores that share much: the paired error is smaller
    assert both.high - both.low < 2 * 1.96 * unpaired
    assert auroc_difference(y, s, s).p_value() == 1


@pytest.mark.parametrize(
    "labels, scores, said",
    [
        ([0, 1, 1], [0.1, math.nan, math.nan], "score of item 1 is nan"),
        ([0, 1], [math.inf, 0], "score of item 0 is inf"),
        ([1, 1, 1], [1, 2, 3], "All 3 items are positive"),
        ([0], [1], "All 1 items are negative"),
        ([0, 1, 7], [1, 2, 3], "label of item 2 is 7"),
        ([0, None], [1, 2], "label of item 1 is None"),
        ([0, "1"], [1, 2], "label of item 0 is '0'"),
        ([0, 1], [1], "shape"),
        ([], [], "nothing"),
        ([0, 1], ["a", "b"], "must be numbers"),
        ([[0, 1]], [[1, 2]], "one column"),
    ],
)
def test_what_no_order_can_be_judged_by_is_refused(labels, scores, said):
    for metric in (auroc, average_precision, auroc_interval, ranking_curve):
        with pytest.raises(DataError, match=said):
            metric(labels, scores)


# -- several classes


@st.composite
def shares(draw):
    "Labels of 2 to 5 classes, each there, and probabilities that add up to one."
    classes = draw(st.integers(2, 5))
    more = draw(st.lists(st.integers(0, classes - 1), max_size=20))
    y = np.array([*range(classes), *more])
    seed = draw(st.integers(0, 999))
    raw = np.random.default_rng(seed).integers(0, 4, (len(y), classes)) + 0.25
    return y, raw / raw.sum(1, keepdims=True)


@settings(max_examples=20, deadline=None)
@given(shares())
def test_one_against_the_rest_is_scikit_learns(data):
    y, p = data
    for average in ("macro", "weighted", None):
        if p.shape[1] == 2:
            theirs = sk.roc_auc_score(np.eye(2)[y], p, average=average)
        else:
            theirs = sk.roc_auc_score(y, p, multi_class="ovr", average=average)
        assert multiclass_auroc(y, p, average) == pytest.approx(theirs)
        precise = sk.average_precision_score(np.eye(p.shape[1])[y], p, average=average)
        assert one_vs_rest(y, p, average_precision, average) == pytest.approx(precise)


def test_probabilities_that_are_none_are_refused():
    good = [[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]]
    for labels, p, said in (
        ([0, 1, 0], [[0.5, 0.5], [0.2, 0.7], [1, 1]], "item 1 add up to 0.9"),
        ([0, 1, 0], [[0.5, 0.5], [1.2, -0.2], [1, 0]], "item 1 are"),
        ([0, 1, 0], [[0.5, 0.5], [math.nan, 1], [1, 0]], "item 1 are"),
        ([0, 0, 0], good, "class 1"),
        ([0, 1, 2], good, "item 2 is 2"),
        ([0, 1, 0.5], good, "item 2 is 0.5"),
        ([0, 1], good, "one row"),
        ([], np.zeros((0, 2)), "nothing"),
    ):
        with pytest.raises(DataError, match=said):
            check_probabilities(labels, p)
    with pytest.raises(UsageError, match="micro"):
        multiclass_auroc([0, 1, 0], good, "micro")


def test_mcc_is_scikit_learns_where_it_is_undefined():
    for y, p in (([0, 0], [0, 0]), ([0, 1], [1, 1]), ([0, 1, 2], [2, 2, 2])):
        with warnings.catch_warnings(action="ignore"):
            assert mcc(y, p) == sk.matthews_corrcoef(y, p)


# -- ranked lists


def in_every_order(name, relevance, scores, k):
    "The metric by its definition, averaged over every order that the scores allow."
    found = []
    for order in itertools.permutations(range(len(scores))):
        if any(scores[a] < scores[b] for a, b in itertools.pairwise(order)):
            continue
        r = [relevance[i] for i in order]
        hits = [i + 1 for i, one in enumerate(r) if one > 0]
        if name == "hit_rate":
            found.append(float(bool(hits) and hits[0] <= k))
        elif name == "mrr":
            found.append(1 / hits[0] if hits and hits[0] <= k else 0.0)
        elif name == "map":
            found.append(sum((j + 1) / h for j, h in enumerate(hits)) / max(len(hits), 1))
        else:
            gain = lambda rs: sum(one / math.log2(i + 2) for i, one in enumerate(rs[:k]))
            best = gain(sorted(r, reverse=True))
            found.append(gain(r) / best if best else 0.0)
    return sum(found) / len(found)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=5),
    st.integers(1, 6),
)
def test_ties_count_as_the_mean_over_all_orders(items, k):
    relevance, scores = zip(*items)
    for name in list_metrics:
        wanted = in_every_order(name, relevance, scores, k)
        assert list_scores(name, [relevance], [scores], k)[0] == pytest.approx(wanted)


@fast
@given(st.integers(0, 9999), st.integers(2, 30), st.integers(1, 30))
def test_ndcg_and_map_are_scikit_learns(seed, items, k):
    rng = np.random.default_rng(seed)
    relevance = rng.integers(0, 4, (3, items))
    tied = rng.integers(0, 5, (3, items)).astype(float)
    ours = list_scores("ndcg", relevance, tied, k).mean()
    assert ours == pytest.approx(sk.ndcg_score(relevance, tied, k=k))
    apart = rng.permuted(np.tile(np.arange(items), (3, 1)), axis=1)
    for r, s, value in zip(relevance > 0, apart, list_scores("map", relevance > 0, apart)):
        if r.any():
            assert value == pytest.approx(sk.average_precision_score(r, s))


def test_a_model_that_knows_nothing_is_not_lucky():
    "Hit rate at 10 of one relevant item among 100 that tie, wherever it stands in the file."
    for place in (0, 50, 99):
        relevance = np.eye(100)[place]
        assert list_scores("hit_rate", [relevance], [np.zeros(100)])[0] == pytest.approx(0.1)
    assert list_scores("mrr", [[0, 0]], [[1, 2]])[0] == 0  # nothing relevant


@pytest.mark.parametrize(
    "relevance, scores, said",
    [
        ([[1, 0], [1, 0]], [[1, 2], [1, math.nan]], "query 1, item 1 is nan"),
        ([[1, 0]], [[1, None]], "query 0, item 1"),
        ([[1, -1]], [[1, 2]], "relevance of query 0, item 1"),
        ([[1, 0]], [[1]], "Query 0 has"),
        ([[]], [[]], "Query 0 has"),
        ([[1]], [[1], [2]], "1 queries"),
        ([], [], "no query"),
        ([["x"]], [[1]], "Query 0 holds"),
    ],
)
def test_lists_that_cannot_be_scored_are_refused(relevance, scores, said):
    with pytest.raises(DataError, match=said):
        list_scores("ndcg", relevance, scores)
    with pytest.raises(UsageError):
        list_scores("recall", [[1]], [[1]])
    with pytest.raises(UsageError):
        list_scores("mrr", [[1]], [[1]], k=0)


# -- generated texts

words = st.text(st.sampled_from("ab cd.é"), max_size=25)
full = words.filter(str.strip)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(words, st.lists(full, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_bleu_and_chrf_are_sacrebleus(items):
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra evaluation")
    generated, references = zip(*items)
    streams = check_generated(generated, references)
    found = generation_scores(generated, references)
    assert found.bleu == sacrebleu.corpus_bleu(list(generated), streams).score
    assert found.chrf == sacrebleu.corpus_chrf(list(generated), streams).score
    w = np.array([[1] * len(items), [2] * len(items), [3, *[0] * (len(items) - 1)]])
    again = [np.repeat(np.arange(len(items)), row) for row in w]
    for rows, value in zip(again, bleu_statistic(w, *found.counts.T)):
        some = check_generated([generated[i] for i in rows], [references[i] for i in rows])
        theirs = sacrebleu.corpus_bleu([generated[i] for i in rows], some).score
        assert value == pytest.approx(theirs)


def test_missing_texts_are_refused_and_empty_ones_are_bad():
    for generated, references, said in (
        (["a", None], [["a"], ["b"]], "generated text 1 is None"),
        (["a"], ["a"], "references of text 0"),
        (["a"], [[]], "references of text 0"),
        (["a", "b"], [["a"], ["b", " "]], "Text 1 has the reference ' '"),
        (["a"], [[None]], "Text 0 has the reference None"),
        (["a"], [["a"], ["b"]], "1 generated texts"),
        ([], [], "nothing"),
    ):
        with pytest.raises(DataError, match=said):
            check_generated(generated, references)
    pytest.importorskip("sacrebleu", reason="needs the extra evaluation")
    found = generation_scores(["", ""], [["a b"], ["c"]])
    assert found.bleu == found.chrf == 0
    signature = generation_scores(["a"], [["a"]]).bleu_signature
    assert "tok:13a" in signature and "nrefs:1" in signature


@fast
@given(st.lists(st.tuples(st.floats(0, 600), st.integers(1, 99)), min_size=1, max_size=20))
def test_perplexity_and_bits_per_byte_by_their_definition(items):
    losses, sizes = map(np.array, zip(*items))
    report = language_model_report(losses, sizes, 2 * sizes)
    mean = sum(losses) / sum(sizes)
    assert report["loss"] == pytest.approx(mean)
    assert report["perplexity"] == pytest.approx(math.exp(mean))
    assert report["bits_per_byte"] == pytest.approx(mean / 2 / math.log(2))
    twice = np.full((1, len(items)), 2)
    assert perplexity_of(twice, losses, sizes)[0] == pytest.approx(report["perplexity"])
    assert bits_per_byte_of(twice, losses, sizes)[0] == pytest.approx(mean / math.log(2))


def test_bytes_are_those_of_utf8():
    assert byte_counts(["", "a", "é", "ß€", "𝄞"]).tolist() == [0, 1, 2, 5, 4]


def test_losses_that_are_none_are_refused():
    for losses, sizes, said in (
        ([1, math.nan], [1, 1], "loss of text 1"),
        ([-1], [1], "loss of text 0"),
        ([1], [0], "tokens of text 0"),
        ([1, 2], [1], "one entry per text"),
        ([], [], "at least one"),
        (["x"], [1], "must be numbers"),
        ([1e4], [1], "10000 nats per token"),
    ):
        with pytest.raises(DataError, match=said):
            language_model_report(losses, sizes, sizes)


# -- spans: the published rules of CoNLL's scorer, written out as a table

STARTS = {("B", "B"), ("I", "B"), ("O", "B"), ("O", "I"), ("E", "E"), ("E", "I"), ("O", "E")} | {
    *(("S", one) for one in "BIES"),
    *(("E", one) for one in "BS"),
    *((one, "S") for one in "BIO"),
}
ENDS = {("B", "B"), ("B", "O"), ("I", "B"), ("I", "O"), ("B", "S"), ("I", "S")} | {
    *(("E", one) for one in "BIEOS"),
    *(("S", one) for one in "BIEOS"),
}


def spans_by_the_table(tags):
    "A span starts and ends where the table says, or where the type changes."
    found, begun = [], None
    before, kind_before = "O", ""
    for place, tag in enumerate([*tags, "O"]):
        now, kind = tag[0], tag[2:]
        changed = kind != kind_before
        if before != "O" and ((before, now) in ENDS or changed):
            found.append(Span(kind_before, begun, place))
        if now != "O" and ((before, now) in STARTS or changed):
            begun = place
        before, kind_before = now, kind
    return found


tags = st.one_of(
    st.just("O"), st.builds("{}-{}".format, st.sampled_from("BIES"), st.sampled_from("PL"))
)


@settings(max_examples=150, deadline=None)
@given(st.lists(tags, max_size=10))
def test_spans_follow_the_table_of_conlls_scorer(sentence):
    assert spans_of(sentence) == spans_by_the_table(sentence)


def render(spans, words, scheme):
    "The tags of spans in a scheme, as its definition says."
    out = ["O"] * words
    for k, (kind, start, end) in enumerate(spans):
        touches = lambda other: 0 <= other < len(spans) and spans[other].kind == kind
        after = touches(k - 1) and spans[k - 1].end == start
        ahead = touches(k + 1) and spans[k + 1].start == end
        inner = ["I"] * (end - start)
        if scheme == "IOB2" or (scheme == "IOB1" and after):
            inner[0] = "B"
        if scheme == "IOE2" or (scheme == "IOE1" and ahead):
            inner[-1] = "E"
        if scheme == "IOBES":
            inner[0], inner[-1] = ("S", "S") if len(inner) == 1 else ("B", "E")
        out[start:end] = [f"{one}-{kind}" for one in inner]
    return out


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["P", "L"]), st.integers(1, 3), st.integers(0, 2)), max_size=5
    ),
    st.sampled_from(["IOB1", "IOB2", "IOE1", "IOE2", "IOBES"]),
)
def test_spans_of_each_scheme_are_read_back(pieces, scheme):
    spans, at = [], 0
    for kind, length, gap in pieces:
        spans.append(Span(kind, at + gap, at + gap + length))
        at += gap + length
    assert spans_of(render(spans, at + 1, scheme)) == spans


# -- evaluate


def test_every_report_is_a_metric_of_evaluate():
    from llmeco_nb.stats.evaluate_metrics import load_metric, reports

    rng = np.random.default_rng(0)
    y, s = np.repeat([0, 1], 40), rng.normal(size=80)
    m = load_metric("ranking")
    for part in np.array_split(rng.permutation(80), 3):
        m.add_batch(predictions=s[part], references=y[part])
    assert m.compute()["auroc"] == pytest.approx(sk.roc_auc_score(y, s))
    p = rng.dirichlet(np.ones(3), 60)
    classes = np.arange(60) % 3
    found = load_metric("weighted_auroc").compute(predictions=p, references=classes)
    theirs = sk.roc_auc_score(classes, p, multi_class="ovr", average="weighted")
    assert found == {"weighted_auroc": pytest.approx(theirs)}
    lists = load_metric("ranked_lists", k=2)
    found = lists.compute(predictions=[[0.2, 0.1, 0.0], [1.0]], references=[[0, 1, 0], [1]])
    assert found["mrr"] == pytest.approx(0.75) and found["hit_rate"] == 1
    tags = dict(predictions=[["B-P", "O"]], references=[["B-P", "B-L"]])
    assert load_metric("spans/f1").compute(**tags) == {"f1": pytest.approx(2 / 3)}
    sets = load_metric("label_sets", labels=3).compute(predictions=[5, 0], references=[4, 0])
    assert sets["exact_match"] == 0.5
    names = [name for spec in reports.values() for name in spec.metrics]
    for name in set(names):
        if names.count(name) > 1:
            with pytest.raises(UsageError, match="several"):
                load_metric(name)
    with pytest.raises(UsageError, match="labels=5"):
        load_metric("hamming_loss")
    with pytest.raises(DataError, match="item 1"):
        load_metric("auroc").compute(predictions=[0.1, math.nan, 1], references=[0, 1, 1])
    with pytest.raises(DataError, match="label of item 0"):
        load_metric("auroc").compute(predictions=[0.1, 0.2], references=[None, 1])
    with pytest.raises(DataError, match="Item 1 has 1"):
        load_metric("macro_auroc").compute(predictions=[[0.5, 0.5], [1.0]], references=[0, 1])
    with pytest.raises(DataError, match="nothing to score"):
        load_metric("bleu").compute()
