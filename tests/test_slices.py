"Slices of errors: the test against an enumeration, a planted slice, and silence without one."

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.evaluation.error_slices import (
    excess_p,
    find_slices,
    first_half,
    svd_vectors,
    telling_words,
)


@given(st.integers(2, 9), st.data())
@settings(max_examples=40, deadline=None)
def test_the_p_value_is_that_of_an_enumeration(items, data):
    "All ways to place the errors among the texts are equally likely; they are counted."
    wrong = np.array(data.draw(st.lists(st.booleans(), min_size=items, max_size=items)))
    inside = np.array(data.draw(st.lists(st.booleans(), min_size=items, max_size=items)))
    ways = list(itertools.combinations(range(items), int(wrong.sum())))
    seen = (wrong & inside).sum()
    extreme = sum(inside[list(way)].sum() >= seen for way in ways)
    assert excess_p(wrong, inside) == pytest.approx(extreme / len(ways))


@given(st.lists(st.text(max_size=3), min_size=2, max_size=60), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_halves_are_stable_and_keep_copies_together(texts, seed):
    half = first_half(texts, seed)
    assert (half == first_half(texts, seed)).all()
    side = {}
    for text, one in zip(texts, half):
        assert side.setdefault(text, one) == one
    assert abs(sum(side.values()) - len(side) / 2) <= 0.5
    assert (first_half(texts[::-1], seed)[::-1] == half).all()


def points(texts: int, seed: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    "Texts of five topics, a vector near its topic's centre for each, and the topics."
    draw = np.random.default_rng(seed)
    topic = draw.integers(0, 5, texts)
    names = ["harbour", "garden", "railway", "kitchen", "desert"]
    said = [f"{names[t]} {names[t]}view number {i} the" for i, t in enumerate(topic)]
    centres = 6 * np.eye(5)[topic]
    return said, (centres + draw.normal(size=(texts, 5))).astype(np.float32), topic


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_slice_is_found_and_described(seed):
    said, vectors, topic = points(600, seed)
    wrong = np.random.default_rng(seed + 50).random(600) < np.where(topic == 2, 0.45, 0.1)
    worst, *others = find_slices(said, vectors, wrong, groups=5, seed=seed)
    assert worst.found() and worst.words[0].startswith("railway")
    assert worst.low > worst.elsewhere and worst.rate > 0.25
    assert all(e.startswith("railway") for e in worst.examples) and worst.examples
    assert not any(s.found() for s in others)
    assert find_slices(said, vectors, wrong, groups=5, seed=seed)[0] == worst


def test_clean_sets_are_mostly_silent():
    "At a level of 5 %, more than 4 alarms in 25 sets have a probability of 0.7 %."
    said, vectors, _ = points(300, 0)
    alarms = 0
    for seed in range(25):
        wrong = np.random.default_rng(seed).random(300) < 0.15
        alarms += any(s.found() for s in find_slices(said, vectors, wrong, groups=5, seed=seed))
    assert alarms <= 4


def test_the_rate_by_which_a_slice_is_chosen_is_flattered():
    "Without any slice the chosen groups look bad on the half that chose, and not on the other."
    said, vectors, _ = points(300, 1)
    chosen, tested = [], []
    for seed in range(12):
        wrong = np.random.default_rng(seed).random(300) < 0.15
        for s in find_slices(said, vectors, wrong, groups=5, most=1, seed=seed):
            chosen.append(s.chosen_rate)
            tested.append(s.rate)
    assert np.mean(chosen) > 0.19 > np.mean(tested)


def test_words_are_those_of_more_texts_inside():
    said = ["red boat", "red sail", "a red oar", "the blue car", "a blue van", "the van"]
    inside = np.array([1, 1, 1, 0, 0, 0], bool)
    assert telling_words(said, inside)[0] == "red"
    assert telling_words(said, ~inside, 1) == ("blue",) or telling_words(said, ~inside, 1) == (
        "the",
    )
    assert telling_words(said, np.zeros(6, bool)) == ()


def test_what_cannot_be_grouped_is_said():
    said, vectors, _ = points(40, 0)
    with pytest.raises(DataError, match="40 texts, 40 vectors and 39"):
        find_slices(said, vectors, np.zeros(39, bool))
    with pytest.raises(UsageError, match="groups is 30"):
        find_slices(said, vectors, np.zeros(40, bool), groups=30)
    assert find_slices(said, vectors, np.zeros(40, bool), groups=2) == []
    with pytest.raises(DataError, match="No word"):
        svd_vectors(["a b", "c d"])
    made = svd_vectors([f"word{i % 7} other{i % 3} thing{i % 5}" for i in range(50)], 4)
    assert made.shape == (50, 4) and np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
