"""Leaks: what was planted is found, what was not is left alone, and both policies account for every
document."""

import random
import subprocess
import sys

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.data.corpus import read_split, small_corpus
from llmeco_nb.data.decontamination import (
    LeakIndex,
    evaluation_sets,
    ngram_hashes,
    without_leaks,
)
from llmeco_nb.data.filters import FilterReport

rng = random.Random(5)
vocabulary = [f"word{i}" for i in range(5000)]
texts = [" ".join(rng.choices(vocabulary, k=rng.randint(8, 120))) for _ in range(200)]
index = LeakIndex({"one": texts[:100], "two": texts[100:]})
vocabularies = st.lists(st.sampled_from(vocabulary[:50]), min_size=0, max_size=40)


def documents(some):
    return [dict(id=f"d{i}", text=t, domain="d") for i, t in enumerate(some)]


@pytest.mark.parametrize(
    "dress",
    [
        str.upper,
        lambda t: t.replace(" ", ", "),
        lambda t: f" “{t}” \n",
        lambda t: t.replace(" ", "\n\n"),
        lambda t: t.title(),
    ],
)
def test_the_same_text_in_any_dress(dress):
    found = [index.check(dress(t)) for t in texts]
    assert (
        all(f.kind == "exact" for f in found)
        and [f.set for f in found] == ["one"] * 100 + ["two"] * 100
        and [f.text for f in found] == [*range(100), *range(100)]
    )


def test_thirteen_words_are_found_wherever_they_stand_and_twelve_are_not():
    sharp = LeakIndex(
        {"one": texts[:100], "two": texts[100:]}, min_containment=1.0
    )  # switches near-duplicates off for all but whole copies
    strange = [f"strange{i}" for i in range(60)]
    for t in texts:
        words = t.split()
        if len(words) < 15:
            continue
        at, into = rng.randrange(len(words) - 13), rng.randrange(60)
        put = lambda n: " ".join([*strange[:into], *words[at : at + n], *strange[into:]])
        assert sharp.check(put(13)).kind == "13-gram" and sharp.check(put(12)) is None


def edited(words: list[str], edits: int) -> str:
    words = list(words)
    for i in rng.sample(range(len(words)), edits):
        words[i] = f"other{rng.randrange(10**6)}"
    return " ".join(words)


def test_a_tenth_of_the_words_edited_is_found_by_promise():
    """Replacing e of m words leaves at least 1 - 3e/(m-2) of the windows, which is a half or more
    for e = m//10 and m >= 8."""
    for t in texts:
        words = t.split()
        assert index.check(edited(words, max(1, len(words) // 10))) is not None


def test_dropped_and_inserted_words_too():
    found = 0
    for t in texts:
        words = t.split()
        for i in sorted(rng.sample(range(len(words)), len(words) // 10), reverse=True):
            if rng.random() < 0.5:
                del words[i]
            else:
                words.insert(i, "inserted")
        found += index.check(" ".join(words)) is not None
    assert found >= 0.95 * len(texts)


def test_foreign_texts_raise_no_alarm():
    """Texts over the same 5,000 words share single words only; thirteen in a row, or half of the
    windows, have no chance."""
    assert not any(index.check(" ".join(rng.choices(vocabulary, k=200))) for _ in range(500))


@settings(max_examples=200, deadline=None)
@given(vocabularies, vocabularies)
def test_it_agrees_with_a_slow_and_obvious_check(a, b):
    "Against sets of tuples instead of hashes."
    grams = lambda words, n: {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    if not a:
        return
    found = LeakIndex({"s": [" ".join(a)]}).check(" ".join(b))
    three = grams(a, 3)
    if a == b:
        expected = "exact"
    elif grams(a, 13) & grams(b, 13):
        expected = "13-gram"
    else:
        expected = "near" if len(a) >= 8 and len(three & grams(b, 3)) >= len(three) / 2 else None
    assert (found.kind if found else None) == expected
    assert len(ngram_hashes(b, 3)) == max(0, len(b) - 2) and len(
        set(ngram_hashes(b, 3).tolist())
    ) == len(grams(b, 3))


def test_hashes_are_the_same_in_every_process():
    code = (
        "from llmeco_nb.data.decontamination import ngram_hashes; "
        "print(ngram_hashes('to be or not'.split(), 3).tolist())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**__import__("os").environ, "PYTHONHASHSEED": s},
        ).stdout
        for s in "12"
    }
    assert said == {f"{ngram_hashes('to be or not'.split(), 3).tolist()}\n"}


def test_drop_counts_and_stop_names_set_and_count():
    mixed = documents(
        [
            *[" ".join(rng.choices(vocabulary, k=50)) for _ in range(20)],
            texts[0],
            texts[1].upper(),
            texts[150],
        ]
    )
    kept = list(without_leaks(mixed, index, report := FilterReport()))
    assert [d["id"] for d in kept] == [f"d{i}" for i in range(20)]
    assert (
        report.leaks == {"one": {"exact": 2}, "two": {"exact": 1}}
        and report.removed["leak"].domains == {"d": 3}
        and len(report.removed["leak"].samples) == 3
    )
    with pytest.raises(
        DataError,
        match=(
            r"of 23 documents 2 of the evaluation set one \(2 exact\); 1 of the evaluation set two "
            r"\(1 exact\).*d20.*on_leak"
        ),
    ):
        list(without_leaks(mixed, index, FilterReport(), "stop"))
    assert (
        len(list(without_leaks(mixed[:20], index, FilterReport(), "stop"))) == 20
        and len(list(without_leaks(mixed, None, FilterReport()))) == 23
    )


def test_of_texts_trained_on_with_labels_only_exact_copies_leak():
    """What resembles an evaluation text stays and is counted, under stop as well; elsewhere it
    leaks."""
    words = texts[0].split()
    near = " ".join(["another", *words[1:]])
    assert index.check(near).kind in ("13-gram", "near")
    mixed = [
        dict(id=str(i), text=t, domain=d)
        for i, (t, d) in enumerate([(near, "corpus"), (texts[1].upper(), "corpus"), (near, "web")])
    ]
    kept = list(without_leaks(mixed, index, report := FilterReport(), exact_only=["corpus"]))
    assert [d["id"] for d in kept] == ["0"]
    assert report.resembling == {"one": {index.check(near).kind: 1}}
    assert report.removed["leak"].domains == {"corpus": 1, "web": 1}
    alone = list(without_leaks(mixed[:1], index, FilterReport(), "stop", exact_only=["corpus"]))
    assert len(alone) == 1
    with pytest.raises(DataError, match="1 exact"):
        list(without_leaks(mixed[:2], index, FilterReport(), "stop", exact_only=["corpus"]))


def test_a_stream_is_read_one_document_at_a_time():
    taken = []

    def endless():
        for i in range(10**9):
            taken.append(i)
            yield dict(id=str(i), text=f"document number {i}", domain="d")

    stream = without_leaks(endless(), index, FilterReport())
    assert [next(stream)["id"] for _ in range(5)] == list("01234") and len(taken) == 5


def test_bad_input():
    for share in (0, -1, 1.5):
        with pytest.raises(UsageError, match="min_containment is"):
            LeakIndex({"a": ["x"]}, min_containment=share)
    with pytest.raises(DataError, match="evaluation set empty holds no text"):
        LeakIndex({"a": ["x"], "empty": []})
    with pytest.raises(UsageError, match="on_leak is 'ignore'"):
        without_leaks([], index, FilterReport(), "ignore")
    odd = LeakIndex({"odd": ["", "...", "\ud800 x", "a"]})
    assert (
        odd.check("") is None
        and odd.check("!!!") is None
        and odd.check("A.").kind == "exact"
        and LeakIndex({}).check("anything at all") is None
    )


def test_a_corpus_gives_its_evaluation_splits(tmp_path):
    sets = evaluation_sets(small_corpus())
    assert {n: len(t) for n, t in sets.items()} == {
        "validation of the corpus": 40,
        "test of the corpus": 80,
    }
    against = LeakIndex(sets)
    train, test = read_split(small_corpus(), "train").text, read_split(small_corpus(), "test").text
    assert all(against.check(t).kind == "exact" for t in test) and not [
        t for t in train if (f := against.check(t)) and f.kind == "exact"
    ]
    one = tmp_path / "corpus"
    one.mkdir()
    for split, rows in (("validation", []), ("test", ["a text"])):
        pd.DataFrame(dict(id=rows, text=rows, label=[0] * len(rows))).to_parquet(
            one / f"{split}.parquet"
        )
    assert evaluation_sets(one) == {"test of the corpus": ["a text"]}


NOTICE = (
    "this message and its attachments are confidential and meant for the addressee alone so please "
    "delete it at once if that is not you"
)


def test_boilerplate_of_an_evaluation_set_is_no_leak():
    "What more than a tenth of its texts hold counts for nothing, as a run and by trigrams."
    mails = [f"parcel {i} has not come to house {7 * i}, {NOTICE}" for i in range(60)]
    index = LeakIndex({"mails": mails})
    assert index.check(f"where is my lamp? {NOTICE}") is None
    assert index.check(f"dear all, {mails[4]}").kind == "13-gram"
    assert index.check(mails[4].upper()).kind == "exact"
    named = index.boilerplate["mails"]
    assert named["share"] == 1.0 and named["text"] in NOTICE
    few = LeakIndex({"mails": mails[:5]})
    assert few.check(f"where is my lamp? {NOTICE}") is not None and few.boilerplate == {}


@pytest.mark.parametrize(
    "step, cure",
    [
        ("leak", "hold texts of the evaluation sets"),
        ("near copy", "copies of documents read before"),
        ("words", "Loosen the rule that took most .quality_rules: d=none"),
    ],
)
def test_an_emptied_domain_gets_the_cure_of_its_cause(step, cure):
    from llmeco_nb.data.filters import note
    from llmeco_nb.data.mixture import check_nonempty

    report = FilterReport()
    report.read["d"] = 1
    note(report.removed, step, {"id": "d 0", "domain": "d"}, "a text")
    with pytest.raises(DataError, match=cure):
        check_nonempty({}, report, ["d"])
