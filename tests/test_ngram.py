"""Counting: Kneser-Ney against fractions done by hand and against the published equations written
out slowly, probabilities that add up, bits that agree with a compressor's."""

import gzip
import lzma
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.models.ngram import (
    Ngram,
    bits_per_byte,
    compression_bits_per_byte,
    concat_documents,
    discounts,
)

documents = st.lists(
    st.lists(st.integers(1, 5), max_size=8).map(lambda d: np.array(d, dtype=np.int32)),
    min_size=1,
    max_size=8,
)
ids = lambda *d: np.array(d, dtype=np.int32)


# -- the published equations, slowly


class Published:
    """Interpolated modified Kneser-Ney as in Chen and Goodman 1999, equations 4.28 to 4.31, in
    exact fractions; uniform below the unigram. Nothing is shared with the code under test."""

    def __init__(self, docs, vocabulary: int, order: int):
        self.vocabulary = vocabulary
        self.order = order
        pad = max(1, order - 1)
        texts = [[0] * pad + [int(t) for t in d] + [0] for d in docs]
        # stretches whose last token is predicted
        asked = lambda n: [tuple(t[i - n + 1 : i + 1]) for t in texts for i in range(pad, len(t))]
        self.count = {order: Counter(asked(order))}
        # in how many different stretches it is the end
        for n in range(order - 1, 0, -1):
            self.count[n] = Counter(g[1:] for g in self.count[n + 1])
        self.off = {n: self.discount(c) for n, c in self.count.items()}

    def discount(self, counts):
        n = [None] + [sum(1 for c in counts.values() if c == k) for k in (1, 2, 3, 4)]
        if 0 in n[1:]:
            return [Fraction(1, 2)] * 3
        y = Fraction(n[1], n[1] + 2 * n[2])
        return [
            min(max(k - (k + 1) * y * Fraction(n[k + 1], n[k]), Fraction(1, 20)), k)
            for k in (1, 2, 3)
        ]

    def p(self, context: tuple, w: int) -> Fraction:
        n = len(context) + 1
        below = self.p(context[1:], w) if n > 1 else Fraction(1, self.vocabulary)
        here = {g[-1]: c for g, c in self.count[n].items() if g[:-1] == context}
        if not here:
            return below
        d = lambda c: self.off[n][min(c, 3) - 1]
        return (
            max(Fraction(0), here[w] - d(here[w]) if w in here else Fraction(0))
            + sum(d(c) for c in here.values()) * below
        ) / sum(here.values())


@settings(max_examples=40)
@given(documents, st.integers(1, 5))
def test_it_is_the_published_model(docs, order):
    model = Ngram(docs, 6, order)
    slow = Published(docs, 6, order)
    for d in [*docs[:3], ids(5, 5, 1)]:
        whole = [0] * max(1, order - 1) + d.tolist() + [0]
        expected = [
            slow.p(tuple(whole[i - order + 1 : i]), whole[i])
            for i in range(max(1, order - 1), len(whole))
        ]
        stream, asked = concat_documents([d], order, 0)
        assert model.probabilities(stream)[asked] == pytest.approx(
            [float(p) for p in expected], rel=1e-5
        )
        assert model.nats([d]) == (
            pytest.approx(-sum(math.log(p) for p in expected), rel=1e-5),
            len(d) + 1,
        )


def test_discounts_where_the_counts_suffice():
    """A corpus in which stretches occur one to four times: the formula for the discounts is at
    work, not its stand-in."""
    r = np.random.default_rng(0)
    docs = [np.minimum(r.geometric(0.3, r.integers(2, 30)), 11).astype(np.int32) for _ in range(60)]
    slow = Published(docs, 12, 2)
    assert (
        all(d != Fraction(1, 2) for off in slow.off.values() for d in off)
        or slow.off[2] != [Fraction(1, 2)] * 3
    )
    model = Ngram(docs, 12, 2)
    for before in range(12):
        assert model.distribution([before]) == pytest.approx(
            [float(slow.p((before,), w)) for w in range(12)], rel=1e-5
        )


# -- by hand


def test_two_documents_by_hand():
    """`1 2` and `1 3`, 0 ends a document; every count is too small for the formula, so one half is
    taken off each."""
    model = Ngram([ids(1, 2), ids(1, 3)], 4, 2)
    half = Fraction(1, 2)
    # before 0 stood two tokens, before 1, 2 and 3 one each
    unigram = [(2 - half + 4 * half / 4) / 5, *[(1 - half + 4 * half / 4) / 5] * 3]
    assert sum(unigram) == 1 and model.distribution([1]) == pytest.approx(
        [
            float(x)
            for x in (
                unigram[0] / 2,
                unigram[1] / 2,
                (half + unigram[2]) / 2,
                (half + unigram[3]) / 2,
            )
        ]
    )
    # 2 was always the last
    assert model.distribution([2])[0] == pytest.approx(float(half + half * unigram[0]))
    assert model.tokens == 6


def test_francisco_is_frequent_and_follows_one_token_only():
    """San Francisco, the example of the textbooks: after an unknown token, what stood behind many
    different ones is likelier than what is frequent."""
    san, francisco, glasses = 1, 2, 3
    docs = [ids(san, francisco)] * 9 + [ids(k, glasses) for k in (4, 5, 6, 7)]
    after_unknown = Ngram(docs, 9, 2).distribution([8])
    assert 9 > 4 and after_unknown[glasses] > 2 * after_unknown[francisco]
    # the plain unigram has it the other way round
    assert (
        Ngram(docs, 9, 1).distribution([])[francisco] > Ngram(docs, 9, 1).distribution([])[glasses]
    )


# -- what must hold whatever the corpus


@settings(max_examples=60)
@given(documents, st.integers(1, 5), st.lists(st.integers(0, 5), max_size=6))
def test_probabilities_add_up_to_one(docs, order, context):
    p = Ngram(docs, 6, order).distribution(context)
    assert abs(p.sum() - 1) < 1e-6 and (p > 0).all() and (p < 1).all()


@settings(max_examples=30)
@given(documents, st.integers(1, 4))
def test_documents_are_counted_apart_and_in_any_order(docs, order):
    model = Ngram(docs, 6, order)
    turned = Ngram(docs[::-1], 6, order)
    assert model.surprisals(docs) == pytest.approx(turned.surprisals(docs), rel=1e-6)
    assert model.surprisals(docs) == pytest.approx(
        [model.nats([d])[0] for d in docs], rel=1e-9
    ) and model.surprisals(docs, chunk_size=2) == pytest.approx(model.surprisals(docs))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=200))
def test_a_discount_is_no_more_than_the_count(counts):
    off = discounts(np.array(counts))
    assert off[0] == 0 and all(0 < off[k] <= k for k in (1, 2, 3))


def test_longer_contexts_help_on_text_with_structure():
    # after 1 2 come 3 and 4 in turn: two tokens do not tell, four do
    docs = [ids(*([1, 2, 3, 1, 2, 4] * 6)) for _ in range(8)]
    nats = {n: Ngram(docs, 6, n).nats(docs[:1])[0] for n in (1, 2, 3, 5)}
    assert nats[1] > nats[2] > nats[5] and nats[3] > 2 * nats[5]


# -- bits and refusals


def test_bits_per_byte_by_hand():
    # three tokens of two bits each over two bytes
    assert bits_per_byte(3 * math.log(4), 2) == pytest.approx(3)
    with pytest.raises(DataError):
        bits_per_byte(1.0, 0)
    text, before = "über " * 40, "über alles " * 40
    found = compression_bits_per_byte([text, text], [before])
    size = len(f"{text}\n{text}".encode())
    assert found["gzip"] == pytest.approx(
        8 * len(gzip.compress(f"{text}\n{text}".encode(), 9, mtime=0)) / size
    )
    xz = lambda data: len(
        lzma.compress(data, format=lzma.FORMAT_RAW, filters=[dict(id=lzma.FILTER_LZMA2, preset=6)])
    )
    assert (
        found["xz"] == pytest.approx(8 * xz(f"{text}\n{text}".encode()) / size, rel=0.05)
        and found["xz_after_train"] < found["xz"]
        and "xz_after_train" not in compression_bits_per_byte([text])
    )


def test_refusals():
    with pytest.raises(DataError, match="token 9.*vocabulary has only 6.*another tokenizer"):
        Ngram([ids(9)], 6, 2)
    with pytest.raises(DataError, match="no document"):
        Ngram([], 6, 2)
    with pytest.raises(UsageError, match="order is 0"):
        Ngram([ids(1)], 6, 0)
    with pytest.raises(DataError, match="no text to compress"):
        compression_bits_per_byte([""])
    # documents without a token still end
    assert Ngram([ids(), ids()], 6, 3).distribution([])[0] > 0.5
