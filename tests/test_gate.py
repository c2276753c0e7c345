"""The gate: exact levels, slices, metrics of every task; its account through kills and rotation;
edited copies; bad input; the command."""

import json
import os
import random
import re
import signal
from dataclasses import asdict
from itertools import count

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm
from scipy.stats import permutation_test as scipy_permutation
from typer.testing import CliRunner

from llmeco_nb.core import DataError, UsageError, read_json, write_json
from llmeco_nb.evaluation.gate import (
    gate,
    mcnemar_one_sided,
    permutation_one_sided,
    shown_worse,
)
from llmeco_nb.evaluation.gate_account import (
    GateAccount,
    Look,
    item_set,
    look_level,
    read_looks,
    spend_look,
)
from llmeco_nb.evaluation.gate_metrics import GateMetric, gate_metric, item_totals
from llmeco_nb.evaluation.near_duplicates import NearDuplicateIndex
from llmeco_nb.evaluation.paired_predictions import pair_predictions
from llmeco_nb.tasks.predictions import write_predictions

few = settings(max_examples=25, deadline=None)


def columns(b, c, both=0, neither=0):
    "Right and wrong of a champion and a candidate with these counts."
    champion = [0] * b + [1] * c + [1] * both + [0] * neither
    candidate = [1] * b + [0] * c + [1] * both + [0] * neither
    return np.array(champion, bool), np.array(candidate, bool)


# -- the level


def promotion_rate(apart: int, level: float, judged) -> float:
    "How often equal models that differ on `apart` items see a promotion, over all outcomes."
    b = np.arange(apart + 1)
    return float(binom.pmf(b, apart, 0.5)[judged(b, apart - b) <= level].sum())


@pytest.mark.parametrize("level", [0.05, look_level(1), look_level(10), look_level(50)])
def test_the_exact_level_is_at_most_the_nominal_one_and_a_doubled_one_is_seen(level):
    rates = np.array([promotion_rate(m, level, mcnemar_one_sided) for m in range(401)])
    assert rates.max() <= level and rates.max() > 0.8 * level
    doubled = np.array([promotion_rate(m, 2 * level, mcnemar_one_sided) for m in range(401)])
    two_sided = lambda b, c: 2 * np.minimum(mcnemar_one_sided(b, c), mcnemar_one_sided(c, b))
    assert doubled.max() > level, "a gate at twice its level would not pass this test"
    assert promotion_rate(400, level, two_sided) > 0
    for discordance in (0.02, 0.1, 0.5):  # over the number of discordant items, too
        shares = binom.pmf(np.arange(401), 400, discordance)
        assert shares @ rates <= level
        if discordance >= 0.1 and level > 1e-3:
            assert shares @ doubled > level


def test_the_gate_promotes_by_that_rule_and_no_other():
    for level in (0.05, look_level(3)):
        for apart in (0, 1, 5, 12, 30):
            for b in range(apart + 1):
                found = gate(*columns(b, apart - b, 40, 10), level=level)
                p = binomtest(b, apart, alternative="greater").pvalue if apart else 1.0
                assert found.p == pytest.approx(p)
                assert found.promoted == (p <= level and 2 * b > apart)
                assert (found.mended, found.broken) == (b, apart - b)


def test_what_could_not_be_seen_has_the_power_it_says():
    n, discordance, level = 2000, 0.1, look_level(5)
    one, other = columns(100, 100, n - 300, 100)
    d = gate(one, other, level=level).detectable
    b_rate, apart = (discordance + d) / 2, np.arange(0, 500)
    power = sum(
        binom.pmf(m, n, discordance)
        * binom.pmf(k := np.arange(m + 1), m, b_rate / discordance)[
            mcnemar_one_sided(k, m - k) <= level
        ].sum()
        for m in apart
    )
    assert 0.74 < power < 0.86
    assert gate(*columns(0, 0, 3), level=0.01).detectable is None


# -- slices


def test_a_slice_that_is_shown_worse_withholds_the_promotion():
    champion, candidate = columns(120, 20, 800, 60)
    small = np.zeros(1000, bool)
    small[120:140] = small[140:240] = True  # all that broke, and a hundred that stayed
    assert gate(champion, candidate).promoted
    found = gate(champion, candidate, slices=dict(small=small, rest=~small))
    assert not found.promoted and found.worse_slices == ["small"]
    assert gate(champion, candidate, margin=0.5, slices=dict(small=small)).promoted


def test_slices_are_tested_at_their_level_by_holm():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):  # four slices, each worse by exactly the margin
        u = rng.random(2000)
        champion, candidate = u > 0.10, (u > 0.10) ^ (u < 0.04) ^ (u > 0.94)
        quarter = np.arange(2000) % 4
        found = gate(
            champion, candidate, margin=0.02, slices={str(k): quarter == k for k in range(4)}
        )
        hits += bool(found.worse_slices)
    # 0.05 plus three standard errors
    assert hits / 400 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    _, p = shown_worse(
        *[np.c_[c, np.ones(1000)] for c in columns(20, 60, 900, 20)],
        gate_metric("text-classification"),
        0.0,
    )
    assert p == pytest.approx(norm.cdf(-40 / np.sqrt(80)))


@pytest.mark.parametrize("mask", [[True], np.ones(10), ["a"] * 10])
def test_a_slice_that_is_no_column_of_booleans_is_refused(mask):
    with pytest.raises(DataError, match="slice wrong"):
        gate(*columns(3, 2, 5), slices=dict(wrong=mask))


# -- metrics of the other tasks


@few
@given(
    st.lists(
        st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 7)), min_size=3, max_size=9
    )
)
def test_permutation_is_the_exact_one_for_micro_f1(rows):
    true, one, other = np.array(rows).T
    metric = gate_metric("multi-label-classification")
    a, b = (item_totals("multi-label-classification", true, said).totals for said in (one, other))
    swaps = (np.arange(2 ** len(rows))[:, None] >> np.arange(len(rows))) & 1
    first = a.sum(0) + swaps @ (b - a)
    gains = metric.gain(first, a.sum(0) + b.sum(0) - first)
    exact = np.mean(gains >= metric.gain(a.sum(0), b.sum(0)) - 1e-9)
    drawn = permutation_one_sided(a, b, metric, level=0.01)
    assert abs(drawn - exact) < 5 * exact / 10 + 3 / 2000


def test_permutation_of_errors_is_scipys():
    rng = np.random.default_rng(3)
    target, noise = rng.normal(size=12), rng.normal(size=(2, 12)) * [[1.0], [0.6]]
    a, b = (item_totals("regression", target, target + e) for e in noise)
    theirs = scipy_permutation(
        (b.scores, a.scores),
        lambda x, y, axis=-1: np.mean(x - y, axis),
        permutation_type="samples",
        n_resamples=np.inf,
        alternative="greater",
        vectorized=True,
    ).pvalue
    ours = permutation_one_sided(a.totals, b.totals, gate_metric("regression"), level=0.005)
    assert abs(ours - theirs) < 0.35 * theirs + 0.002
    found = gate(a.totals, b.totals, metric=gate_metric("regression"), level=0.03)
    assert found.difference > 0 and found.candidate < found.champion, "a smaller error is better"


def test_permutation_keeps_its_level():
    rng, p = np.random.default_rng(0), []
    for seed in range(300):
        a, b = (np.c_[rng.exponential(size=40), np.ones(40)] for _ in range(2))
        p.append(permutation_one_sided(a, b, GateMetric("mean"), 0.05, seed))
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)


def test_spans_answers_and_summaries_have_their_metric():
    assert [gate_metric(t).name for t in ("token-classification", "question-answering")] == [
        "f1"
    ] * 2
    told = item_totals("summarization", ['["the cat sat"]', '["a dog"]'], ["the cat sat", "no"])
    assert told.scores.tolist() == [1, 0]
    answers = [json.dumps([dict(start=0, text="red")])] * 2
    told = item_totals("question-answering", answers, [answers[0], "[]"])
    assert told.scores.tolist() == [1, 0]


# -- the account


def test_levels_never_add_up_to_more_than_alpha():
    assert sum(look_level(k, 0.05) for k in range(1, 20000)) < 0.05
    assert look_level(1) == pytest.approx(0.05 * 6 / np.pi**2)
    with pytest.raises(UsageError):
        GateAccount(alpha=0.5)


@few
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=12))
def test_no_item_is_ever_judged_above_alpha(windows):
    """Whatever windows of items are looked at, in any order: the levels of all looks at any one
    item add up to at most alpha, each level is used once, and the file says the same."""
    account = GateAccount()
    spent: dict[int, list[float]] = {}
    for k, (start, size) in enumerate(windows):
        names = [f"i{n}" for n in range(start, start + size)]
        look = account.spend(item_set(names, [0] * size), "champion", str(k))
        for n in range(start, start + size):
            spent.setdefault(n, []).append(look.level)
        known = [i for i in range(start, start + size)]
        assert look.number >= max(len(spent[n]) for n in known)
    for levels in spent.values():
        assert sum(levels) <= 0.05 and len(set(levels)) == len(levels)
    again = GateAccount([Look.from_json(asdict(one)) for one in account.looks])
    assert again.spent == account.spent
    assert all((again.known[k] == account.known[k]).all() for k in account.known)


def test_killed_at_any_moment_a_look_is_neither_lost_nor_counted_twice(tmp_path):
    items = item_set(["a", "b"], [0, 1])

    def work(file, seen):
        for name in ("one", "two", "three"):
            spend_look(file, items, "champion", name)
            write_json(seen / name, True)  # the answer is seen only now

    kills = 0
    for at in range(1, 9):
        for after in (False, True):
            place = tmp_path / f"{at}{after}"
            place.mkdir()
            if not (pid := os.fork()):
                real, renames = os.replace, count(1)

                def replace(old, new):
                    now = next(renames)
                    if now == at and not after:
                        os.kill(os.getpid(), signal.SIGKILL)
                    real(old, new)
                    if now == at:
                        os.kill(os.getpid(), signal.SIGKILL)

                os.replace = replace
                work(place / "account.json", place)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert status == (-signal.SIGKILL if at <= 6 else 0)
            kills += status == -signal.SIGKILL
            file = place / "account.json"
            paid = {look.candidate for look in read_looks(file)} if file.exists() else set()
            seen = {f.name for f in place.iterdir()} & {"one", "two", "three"}
            assert seen <= paid and len(paid - seen) <= 1, "paid before it is seen"
            work(file, place)
            assert [(k.number, k.candidate) for k in read_looks(file)] == [
                (1, "one"),
                (2, "two"),
                (3, "three"),
            ]
    assert kills == 12


def test_a_file_that_is_no_account_is_refused(tmp_path):
    for told in (3, {"looks": 3}, {"looks": [{"number": 1}]}, ["a"], {}):
        (tmp_path / "a.json").write_text(json.dumps(told))
        with pytest.raises(DataError, match="a.json"):
            read_looks(tmp_path / "a.json")


# -- edited copies

draw = random.Random(0)


def moved(text):
    words = text.split()
    word = words.pop(draw.randrange(len(words)))
    words.insert(draw.randrange(len(words) + 1), word)
    return " ".join(words)


edits = {
    "stop": lambda t: t + ".",
    "commas": lambda t: t.replace(",", ""),
    "commas to spaces": lambda t: t.replace(",", " "),
    "last letter": lambda t: re.sub(r"[^\W\d_](?=[\W\d_]*$)", "", t),
    "last character": lambda t: t[:-1],
    "case": lambda t: draw.choice([str.upper, str.lower, str.title, str.swapcase])(t),
    "word moved": moved,
}
words = st.sampled_from(
    "Sales rose, to EUR 3.5 mn 35 -2 1,000 from good,bad (net) it's a Straße".split()
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(words, min_size=3, max_size=12),
    st.sampled_from(list(edits)),
    st.sampled_from(list(edits)),
)
def test_every_edit_and_any_two_are_known_again(found, first, second):
    cut = {"last letter", "last character"}
    text = " ".join(found)
    copy = edits[first](text)
    index = NearDuplicateIndex(["Another text that is longer", text])
    assert index.find(copy) == 1, (text, copy)
    if not ({first, second} <= cut or (second in cut and first == "word moved")):
        assert index.find(edits[second](copy)) == 1, (text, copy)


def test_numbers_and_two_words_make_another_text():
    index = NearDuplicateIndex(["Net sales rose to EUR 35.6 mn from EUR 28 mn", "Is my card here"])
    for other in ("356 mn from EUR 28 mn", "35.6 mn from EUR 29 mn", "35.6 bn from EUR 28 mn"):
        assert index.find(f"Net sales rose to EUR {other}") is None
    assert index.find("Is our bank here") is None and index.find("Is my card home") is None
    assert index.find("Is my cart here") == 1


# -- bad input

GOOD = pd.DataFrame(
    dict(
        model="a",
        num_labeled=0,
        split="test",
        id=list("xyz"),
        target=[0, 1, 1],
        prediction=[0, 1, 0],
    )
).assign(scores=[np.eye(2, dtype=np.float32)[k] for k in (0, 1, 0)])
WRONG = {
    "no answer to the item 'z'": GOOD[:2],
    "row 1 is 'x' for the champion and 'z'": GOOD[::-1],
    "true value of the item 'y'": GOOD.assign(target=[0, 0, 1]),
    "answers the item 'x' twice": pd.concat([GOOD, GOOD[:1]]),
    "more than one model": GOOD.assign(model=list("aab")),
    "no prediction for the item 'x'": GOOD.assign(prediction=[None, 1, 0]),
}


@pytest.mark.parametrize("said", WRONG)
def test_tables_that_do_not_fit_are_refused_by_the_first_item(said):
    with pytest.raises(DataError, match=re.escape(said)):
        pair_predictions(GOOD, WRONG[said])


# -- the command


@pytest.fixture
def asked(tmp_path, monkeypatch):
    "Runs `llmeco gate` in a folder with files of predictions; gives the exit status and the text."
    from llmeco_nb.cli import app

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    target = rng.integers(0, 3, 400)
    for name, right in (("champion", 0.7), ("better", 0.9), ("equal", 0.7)):
        said = np.where(rng.random(400) < right, target, (target + 1) % 3)
        table = pd.DataFrame(dict(model=name, num_labeled=0, split="test", target=target))
        table = table.assign(id=[f"i{k}" for k in range(400)], prediction=said)
        scores = pd.Series([np.eye(3, dtype=np.float32)[k] for k in said])
        write_predictions(table.assign(scores=scores), tmp_path / f"{name}.parquet")

    def ask(*given):
        done = CliRunner().invoke(app, ["gate", *given])
        return done.exit_code, done.output, done.exception

    return ask


def test_the_command_says_yes_and_no_and_counts(asked, tmp_path):
    assert asked("champion.parquet", "better.parquet")[0] == 0
    told = read_json(tmp_path / "gate" / "gate.json")
    assert told["promoted"] and told["selected"] and told["look"]["number"] == 1
    code, said, _ = asked("champion.parquet", "equal.parquet")
    assert code == 10 and "look 2 at this test set" in said and "mostly not be seen" in said
    told = read_json(tmp_path / "gate" / "gate.json")
    lines = (tmp_path / "gate" / "changed_items.jsonl").read_text().splitlines()
    changes = [json.loads(line)["change"] for line in lines]
    assert (changes.count("broken"), changes.count("mended")) == (told["broken"], told["mended"])
    assert asked("champion.parquet", "better.parquet")[0] == 0  # asked again, paid already
    assert len(read_looks(tmp_path / "gate_account.json")) == 2


def test_the_command_refuses_what_does_not_fit(asked, tmp_path):
    table = pd.read_parquet("better.parquet")
    write_predictions(table.assign(prediction=7), tmp_path / "label.parquet")
    error = asked("champion.parquet", "label.parquet")[2]
    assert isinstance(error, DataError) and "'i0' has the unknown label 7" in str(error)
    assert isinstance(asked("champion.parquet", str(tmp_path))[2], UsageError)
    assert not (tmp_path / "gate_account.json").exists(), "nothing was looked at"
    asked("champion.parquet", "better.parquet")
    for name in ("champion", "better"):
        other = pd.read_parquet(f"{name}.parquet")
        write_predictions(other.assign(id="other " + other.id), tmp_path / f"o_{name}.parquet")
    error = asked("o_champion.parquet", "o_better.parquet")[2]
    assert isinstance(error, UsageError) and "another test set" in str(error)
    code, said, _ = asked("o_champion.parquet", "o_better.parquet", "--fresh-test-set")
    assert code == 0 and "account 2" in said


def test_a_slice_of_a_file_can_withhold(asked, tmp_path):
    one, other = (pd.read_parquet(f"{n}.parquet") for n in ("champion", "better"))
    broken = (one.prediction == one.target) & (other.prediction != other.target)
    pd.DataFrame(dict(id=one.id, hurt=broken)).to_parquet("slices.parquet")
    code, said, _ = asked("champion.parquet", "better.parquet", "--slices", "slices.parquet")
    assert code == 10 and "SHOWN WORSE" in said
