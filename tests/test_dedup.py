"""Near-duplicates: estimates agree with exact counts and with another implementation; planted
copies are found; memory is bounded; a kill changes nothing."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.data.dedup import UnionFind, find_duplicates, pairs_with_equal_keys
from llmeco_nb.data.filters import FilterReport
from llmeco_nb.data.minhash import (
    as_bytes,
    band_keys,
    candidate_probability,
    choose_bands,
    minhash_signatures,
    mix64,
    shingles,
    slice_bytes,
    word_hashes,
)
from llmeco_nb.tasks.words import shingle_pattern


def shingle_set(text, n=5):
    words = re.findall(shingle_pattern, text.casefold())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


def jaccard(a, b):
    return len(a & b) / max(1, len(a | b))


def prose(chance, n):
    return " ".join(f"w{int(chance.paretovariate(0.7)) % 5000}" for _ in range(n))


def edited(text, changes, chance):
    words = text.split()
    for _ in range(changes):
        words[chance.randrange(len(words))] = f"x{chance.randrange(10**9)}"
    return " ".join(words)


def documents(texts):
    return [{"id": str(i), "text": t, "domain": "d"} for i, t in enumerate(texts)]


# ---- hashes --------------------------------------------------------------------------------------

messy = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "the",
                "The",
                "film",
                "é",
                "É",
                "straße",
                "STRASSE",
                "’",
                "“a”",
                "_",
                "9",
                "\n",
                "日本",
                "\ud800",
                ".",
                " ",
                "x" * 40,
            ]
        ),
        st.text(max_size=4),
    ),
    max_size=30,
).map("".join)


@given(messy)
def test_words_are_those_of_the_pattern(text):
    hashes, _ = word_hashes(as_bytes(text))
    words = re.findall(shingle_pattern, text.casefold())
    assert len(hashes) == len(words) and len(set(zip(words, hashes.tolist()))) == len(
        set(words)
    ) == len(set(hashes.tolist()))


@given(st.lists(messy, max_size=6), st.integers(1, 6))
def test_shingles_are_those_of_the_plain_way(texts, n):
    found, owners = shingles(texts, n)
    assert (np.diff(owners) >= 0).all()
    sets = [shingle_set(t, n) for t in texts]
    hashed = [set(found[owners == i].tolist()) for i in range(len(texts))]
    assert list(map(len, hashed)) == list(map(len, sets))
    for a in range(len(texts)):
        for b in range(a):
            assert len(hashed[a] & hashed[b]) == len(sets[a] & sets[b])


def test_place_in_the_stream_does_not_matter():
    text = "Alike wherever it stands, in whatever company"
    alone = shingles([text])[0]
    filler = "filler word " * (slice_bytes // 12)
    for before in ("", filler[:-1], filler[:-9], filler[:-30] + "ü"):
        found, owners = shingles([before, text])
        assert np.array_equal(found[owners == 1], alone)
    found, owners = shingles([filler + text])
    assert set(alone.tolist()) <= set(found.tolist())
    assert (
        len(word_hashes(b"y" * (2 * slice_bytes + 5))[0]) == 3
    )  # one word longer than a slice: it ends, and counts as several


# ---- signatures ----------------------------------------------------------------------------------


def test_estimate_beside_the_exact_count_and_datasketch():
    datasketch = pytest.importorskip(
        "datasketch", reason="needs the package datasketch, of the extra dev"
    )
    chance, k = random.Random(0), 128
    pairs = [
        (t, edited(t, chance.randint(1, 25), chance))
        for t in (prose(chance, 150) for _ in range(300))
    ]
    exact = np.array([jaccard(shingle_set(a), shingle_set(b)) for a, b in pairs])
    found, owners = shingles([t for p in pairs for t in p])
    table = minhash_signatures(found, owners, 600, k)
    ours = (table[::2] == table[1::2]).mean(1)

    def theirs(a, b):
        one, two = datasketch.MinHash(k, seed=1), datasketch.MinHash(k, seed=1)
        one.update_batch([" ".join(s).encode() for s in shingle_set(a)])
        two.update_batch([" ".join(s).encode() for s in shingle_set(b)])
        return one.jaccard(two)

    others = np.array([theirs(a, b) for a, b in pairs])
    expected = np.sqrt(np.mean(exact * (1 - exact)) / k)
    assert abs((ours - exact).mean()) < 4 * expected / np.sqrt(300) and abs(
        (others - exact).mean()
    ) < 4 * expected / np.sqrt(300)
    rms = lambda x: float(np.sqrt(np.mean(x**2)))
    assert rms(ours - exact) < 1.15 * expected and rms(ours - exact) < 1.15 * rms(others - exact)


@pytest.mark.parametrize("size", [12, 60, 300])
@pytest.mark.parametrize("similarity", [0.3, 0.55, 0.7, 0.85])
def test_meetings_follow_the_s_curve(size, similarity):
    rng, pairs, (bands, rows) = np.random.default_rng(size), 1200, (21, 6)
    both = round(2 * size * similarity / (1 + similarity))
    true = both / (2 * size - both)
    common = rng.integers(0, 2**63, (pairs, 1, both), np.uint64)
    values = np.concatenate(
        [np.repeat(common, 2, 1), rng.integers(0, 2**63, (pairs, 2, size - both), np.uint64)], 2
    )
    table = minhash_signatures(
        values.reshape(-1), np.repeat(np.arange(2 * pairs), size), 2 * pairs, bands * rows
    )
    assert (table != 0xFFFFFFFF).all()  # nothing stays empty
    assert abs((table[::2] == table[1::2]).mean() - true) < 0.01
    keys = band_keys(table, bands, rows)
    assert (
        abs((keys[::2] == keys[1::2]).any(1).mean() - candidate_probability(true, bands, rows))
        < 0.06
    )
    each = (keys[::2] == keys[1::2]).mean()
    assert abs(each - true**rows) < 0.02


@given(st.floats(0.05, 1))
def test_bands_keep_what_they_promise(threshold):
    bands, rows = choose_bands(threshold)
    assert bands * rows <= 128 and (
        candidate_probability(threshold, bands, rows) >= 0.995 or rows == 1
    )


# ---- groups --------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 30), max_size=300),
    st.sampled_from([1 << 12, 1 << 14, 1 << 25]),
    st.sampled_from([1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_equal_keys_whatever_the_memory(tmp_path_factory, values, memory, item):
    file = tmp_path_factory.mktemp("keys") / "k.bin"
    np.repeat(mix64(np.array(values, np.uint64)), item).astype("<u8").tofile(file)
    groups = UnionFind(np.arange(len(values)))
    for pairs in pairs_with_equal_keys(file, len(values), item, memory):
        for i, j in pairs.tolist():
            assert i < j and values[i] == values[j]
            groups.join(i, j)
    assert [groups.root(i) for i in range(len(values))] == [values.index(v) for v in values]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=40))
def test_union_find(pairs):
    groups, colour = UnionFind(np.arange(21)), list(range(21))
    for a, b in pairs:
        groups.join(a, b)
        colour = [min(colour[a], colour[b]) if c in (colour[a], colour[b]) else c for c in colour]
    assert [groups.root(i) for i in range(21)] == colour


# ---- whole corpora -------------------------------------------------------------------------------


def test_planted_copies_are_found_and_nothing_else(tmp_path):
    chance = random.Random(3)
    originals = [prose(chance, chance.randint(40, 400)) for _ in range(800)]
    copies = [
        (i, edited(originals[i], chance.randint(0, 1 + len(originals[i].split()) // 20), chance))
        for i in chance.sample(range(800), 400)
    ]
    corpus = documents(originals + [t for _, t in copies])
    found = find_duplicates(corpus, tmp_path / "s")
    truth = np.array([jaccard(shingle_set(originals[i]), shingle_set(t)) for i, t in copies])
    caught = np.array([found.leaders[800 + n] == i for n, (i, _) in enumerate(copies)])
    assert not caught[truth < 0.8].any() and (truth < 0.8).sum() > 50 and (truth >= 0.8).sum() > 100
    assert caught[truth >= 0.8].mean() >= 0.99
    assert (
        found.exact == sum(a == originals[i] for i, a in copies)
        and found.exact + found.near == caught.sum()
    )
    report = FilterReport()
    kept = list(found.kept(corpus, report))
    assert [d["id"] for d in kept] == [
        d["id"] for d, leader, n in zip(corpus, found.leaders, range(10**6)) if leader == n
    ]
    assert {step: r.documents for step, r in report.removed.items()} == {
        "exact copy": found.exact,
        "near copy": found.near,
    } and all(len(r.samples) == 3 for r in report.removed.values())
    assert found.equal.tolist() == [
        n >= 800 and corpus[n]["text"] == originals[copies[n - 800][0]] for n in range(len(corpus))
    ]


@given(
    st.lists(
        st.sampled_from(
            [
                "",
                " ",
                "!!",
                "one",
                "One!",
                "two words",
                "TWO  words",
                "two, words",
                "é",
                "the same five words or more",
                "The same five words, or more",
            ]
        ),
        max_size=25,
    )
)
@settings(max_examples=40, deadline=None)
def test_small_corpora(tmp_path_factory, texts):
    """Equal word for word are near, equal but for case and space are exact; documents without words
    are alike only when they are equal."""
    found = find_duplicates(documents(texts), tmp_path_factory.mktemp("s"))
    same = lambda t: tuple(re.findall(r"\w+", t.casefold())) or t.strip()
    assert found.leaders.tolist() == [[same(u) for u in texts].index(same(t)) for t in texts]
    folded = [" ".join(t.casefold().split()) for t in texts]
    assert found.exact == len(folded) - len(set(folded))
    assert len(list(found.kept(documents(texts)))) == len({same(t) for t in texts})


def test_a_crowded_bucket(tmp_path):
    """Two thousand copies of one page, each with another number at its end, are one group, and no
    pair of all pairs is asked for."""
    page = prose(random.Random(0), 120)
    begun = time.process_time()
    found = find_duplicates(
        documents([f"{page} {i}" for i in range(2000)]), tmp_path / "s", memory_mib=8
    )
    assert (found.leaders == 0).all() and found.near == 1999
    assert time.process_time() - begun < 20


def test_added_documents_and_other_corpora(tmp_path):
    chance = random.Random(5)
    texts = [prose(chance, 80) for _ in range(50)]
    first = find_duplicates(documents(texts), tmp_path / "s")
    assert first.exact + first.near == 0 and len(first) == 50
    more = find_duplicates(
        documents(texts + [texts[7], edited(texts[9], 1, chance)]), tmp_path / "s"
    )
    assert more.leaders[50:].tolist() == [7, 9] and (more.exact, more.near) == (1, 1)
    with pytest.raises(DataError, match="Document 1 "):
        find_duplicates(documents(texts[::-1]), tmp_path / "s")
    with pytest.raises(DataError, match="has 10 documents"):
        find_duplicates(documents(texts[:10]), tmp_path / "s")
    with pytest.raises(UsageError, match="threshold"):
        find_duplicates(documents(texts), tmp_path / "s", threshold=0.5)
    with pytest.raises(UsageError, match="threshold is 1.2"):
        find_duplicates(documents(texts), tmp_path / "t", threshold=1.2)
    with pytest.raises(DataError, match="more than the 52"):
        list(more.kept(documents(texts * 2)))
    with pytest.raises(DataError, match="has 3 documents"):
        list(more.kept(documents(texts[:3])))
    os.truncate(tmp_path / "s" / "shingles.bin", 10)
    with pytest.raises(DataError, match="shorter than"):
        find_duplicates(documents(texts * 2), tmp_path / "s")


CORPUS = """
import random, sys, time
names = [f"word{i}" for i in range(3000)]
def corpus(n, words=120, slow=0.):
    "A stream made as it is read: every tenth document repeats an earlier one with a word changed."
    for i in range(n):
        chance = random.Random(i if i % 10 else i//2 + 1)
        text = chance.choices(names, k=words)
        if i % 10 == 0: text[i % words] = "changed"
        if slow: time.sleep(slow)
        yield {"id": str(i), "text": " ".join(text), "domain": "d"}
"""


def test_killed_and_started_again(tmp_path):
    code = CORPUS + (
        "from llmeco_nb.data.dedup import find_duplicates\n"
        "find_duplicates(corpus(3000, slow=float(sys.argv[2])), sys.argv[1], memory_mib=8)"
    )
    run = lambda folder, slow: subprocess.Popen([sys.executable, "-c", code, str(folder), slow])
    assert run(tmp_path / "whole", "0").wait() == 0
    kills, chance = 0, random.Random(1)
    for _ in range(5):
        process = run(tmp_path / "killed", ".0003")
        time.sleep(chance.uniform(0.4, 1.4))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 2
    assert run(tmp_path / "killed", "0").wait() == 0
    names = sorted(f.name for f in (tmp_path / "whole").iterdir() if f.suffix in (".bin", ".json"))
    assert "leaders.bin" in names and "state.json" in names
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "killed" / name
        ).read_bytes(), name
    assert not (tmp_path / "killed" / "leaders.partial").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_memory_is_bounded(tmp_path):
    """A corpus several times the memory limit goes through; the limit is the kernel's
    (RLIMIT_DATA), and the peak does not grow with the corpus."""
    code = (
        CORPUS
        + """
import resource, json
from llmeco_nb.data.dedup import find_duplicates
resource.setrlimit(resource.RLIMIT_DATA, (96 << 20, 96 << 20))
documents = lambda: corpus(int(sys.argv[2]), 400)
found = find_duplicates(documents(), sys.argv[1], memory_mib=8)
kept = sum(1 for _ in found.kept(documents()))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") \
if line.startswith("VmHWM"))/1024
print(json.dumps(dict(peak=peak, kept=kept)))
"""
    )
    run = lambda name, n: json.loads(
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name), str(n)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    small, large = run("small", 1500), run("large", 12_000)  # 5 and 40 MB of text
    assert large["peak"] < small["peak"] + 6, (small, large)
    assert large["kept"] < 12_000 * 0.97
