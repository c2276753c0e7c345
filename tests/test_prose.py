"Prose: splits are disjoint, weights are respected, equal input gives equal bytes, a kill leaves nothing half-done, errors name what was found."
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, MissingError, UsageError, begin, read_json, sha256_of
from llmeco_nb.data import read_split, small_corpus
from llmeco_nb.prose import build_prose, mixture, packaged_domains, read_prose, shares_of, side, small_prose, splits, spread

vocabulary = [f"word{i}" for i in range(3000)]

def write(folder, name, n, words=60, seed=1):
    "A JSONL source of n random documents."
    import json
    rng = random.Random(f"{name}{seed}")
    (folder/f"{name}.jsonl").write_text("".join(json.dumps({"text": " ".join(rng.choices(vocabulary, k=words))}) + "\n" for _ in range(n)))
    return f"{name}={folder/name}.jsonl"

def build(folder, name, own, **more): return build_prose(begin(folder/name, "prose"), domains=[], own=own, **more)


def test_the_packaged_domains_open():
    for name, read in packaged_domains.items():
        texts = [t for t, _ in zip(read(), range(40))]
        assert len(texts) == 40 and np.median([len(t) for t in texts]) > 400, name
    assert {d["domain"] for d in read_prose(small_prose(), "train")} == set(packaged_domains)


def test_no_evaluation_text_is_left():
    held = {t for s in ("validation", "test") for t in read_split(small_corpus(), s).text}
    assert not held & {" ".join(d["text"].split()) for s in splits for d in read_prose(small_prose(), s, ["reviews"])}
    sheet = read_json(small_prose()/"datasheet.json")
    assert sheet["checked"] and sum(n for kinds in sheet["leaks"].values() for n in kinds.values()) == sum(t["leak"] for t in sheet["domains"].values())


def test_splits_are_disjoint_complete_and_stable(tmp_path):
    own = [write(tmp_path, "a", 300), write(tmp_path, "b", 100)]
    folder = build(tmp_path, "one", own, validation=0.1, test=0.2)
    ids = {s: [d["id"] for d in read_prose(folder, s)] for s in splits}
    sets = {s: set(i) for s, i in ids.items()}
    assert all(not sets[a] & sets[b] for a in splits for b in splits if a < b)
    sheet = read_json(folder/"datasheet.json")["domains"]
    assert all(t["read"] == sum(t[s] for s in splits) for t in sheet.values())
    larger = build(tmp_path, "two", [*own, write(tmp_path, "c", 50)], validation=0.1, test=0.2)
    assert {d["id"] for d in read_prose(larger, "test", ["a", "b"])} == sets["test"]           # who is a test document depends on nobody else


def test_equal_input_equal_bytes_and_the_seed_decides(tmp_path):
    own = [write(tmp_path, "a", 80), write(tmp_path, "b", 40)]
    one, two, other = (build(tmp_path, n, own, seed=s) for n, s in (("x", 1), ("y", 1), ("z", 2)))
    assert sha256_of(one) == sha256_of(two) != sha256_of(other)


def test_weights_are_respected_within_a_document(tmp_path):
    own = [write(tmp_path, "a", 200), write(tmp_path, "b", 200), write(tmp_path, "c", 30)]
    folder = build(tmp_path, "w", own, weights=["a=3", "b=2"], epochs=3)
    sheet = read_json(folder/"datasheet.json")["domains"]
    total, longest = sum(t["characters"] for t in sheet.values()), 60 * 9
    for d, share in dict(a=3 / 6, b=2 / 6, c=1 / 6).items(): assert abs(sheet[d]["characters"] - share * total) <= 3 * longest
    assert sheet["c"]["epochs"] <= 3 and max(t["epochs"] for t in sheet.values()) == pytest.approx(3, abs=0.2)
    few = build(tmp_path, "f", own, characters=20_000)
    assert abs(sum(len(d["text"]) for d in read_prose(few, "train")) - 20_000) <= 3 * longest


amounts = st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(1, 500), min_size=1, max_size=30), min_size=1)

@settings(max_examples=200, deadline=None)
@given(amounts, st.integers(1, 4), st.data())
def test_mixture_properties(lengths, epochs, data):
    sizes = {d: np.array(n) for d, n in lengths.items()}
    shares = shares_of([f"{d}={data.draw(st.floats(0.1, 10))}" for d in sizes], list(sizes))
    used = mixture(sizes, shares, epochs, None)
    total = min(epochs * sizes[d].sum() / shares[d] for d in sizes)
    for d, numbers in used.items():
        times = np.bincount(numbers, minlength=len(sizes[d]))
        assert times.max() - times.min() <= 1 and times.max() <= epochs                    # whole epochs and a beginning
        given_, asked = sizes[d][numbers].sum(), shares[d] * total
        assert asked - 1e-3 <= given_ <= asked + sizes[d].max()                           # at most one document too much
    for order in ("mixed", "short"):
        line = spread(used, sizes, order)
        assert sorted(line) == sorted((d, int(i)) for d in used for i in used[d])
    assert [sizes[d][i] for d, i in spread(used, sizes, "short")] == sorted(sizes[d][i] for d in used for i in used[d])


def test_each_stretch_has_the_same_mixture():
    sizes = {"a": np.full(300, 10), "b": np.full(100, 10)}
    line = [d for d, _ in spread({d: np.arange(len(n)) for d, n in sizes.items()}, sizes, "mixed")]
    assert all(line[i:i + 40].count("b") in (9, 10, 11) for i in range(0, 400, 40))


def test_every_document_is_accounted_for(tmp_path):
    texts = [" ".join(random.Random(i).choices(vocabulary, k=50)) for i in range(60)]
    dirty = [*texts, texts[0].upper(), texts[1].replace(" ", "  "), "too short", "<br />"]
    import json
    (tmp_path/"d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in dirty))
    table = read_json(build(tmp_path, "r", [f"d={tmp_path/'d.jsonl'}"])/"datasheet.json")["domains"]["d"]
    assert (table["read"], table["duplicate"], table["too short"], table["empty"], table["leak"]) == (64, 2, 1, 1, 0) and sum(table[s] for s in splits) == 60


def test_killed_anywhere_it_begins_cleanly(tmp_path):
    own = write(tmp_path, "a", 200)
    code = f"""import os, signal, sys
import llmeco_nb.prose as p
from llmeco_nb.core import begin
at, seen = int(sys.argv[2]), 0
def dying(function):
    def call(*args, **kwargs):
        global seen
        seen += 1
        if seen == at: os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
p.lot, p.write_split, p.write_json = dying(p.lot), dying(p.write_split), dying(p.write_json)
p.build_prose(begin(sys.argv[1], "prose"), domains=[], own=[{own!r}])"""
    attempt = lambda at: subprocess.run([sys.executable, "-c", code, str(tmp_path/"hit"), str(at)], capture_output=True, text=True)
    for at in (120, 202, 204):                # while reading, between two splits, before the datasheet
        done = attempt(at)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path/"hit"/"metrics.json").exists()
    assert attempt(-1).returncode == 0
    assert sha256_of(tmp_path/"hit"/"prose") == sha256_of(build(tmp_path, "calm", [own])) and not (tmp_path/"hit"/"kept.bytes").exists()


def test_bad_input_is_named(tmp_path):
    good = write(tmp_path, "a", 30)
    with pytest.raises(MissingError, match="absent.jsonl"): build(tmp_path, "1", [f"x={tmp_path}/absent.jsonl"])
    (tmp_path/"latin.txt").write_bytes("Café".encode("cp1252"))
    with pytest.raises(DataError, match="latin.txt.*not UTF-8"): build(tmp_path, "2", [f"x={tmp_path}/latin.txt"])
    (tmp_path/"dust.txt").write_text("a b\n\nc d\n")
    with pytest.raises(DataError, match=r"domain dust.*2 documents read.*'too short': 2"): build(tmp_path, "3", [f"dust={tmp_path}/dust.txt"])
    with pytest.raises(UsageError, match="no packaged domain 'review'.*Did you mean `reviews`"): build_prose(begin(tmp_path/"4", "prose"), domains=["review"])
    with pytest.raises(UsageError, match="weights names 'b'"): build(tmp_path, "5", [good], weights=["b=1"])
    for wrong in ("a=x", "a=0", "a=-1", "a=nan", "a"):
        with pytest.raises(UsageError): build(tmp_path, "6", [good], weights=[wrong])
    for more in (dict(order="long"), dict(epochs=0), dict(validation=0.6, test=0.5), dict(documents=0), dict(on_leak="no")):
        with pytest.raises(UsageError): build(tmp_path, "7", [good], **more)
    with pytest.raises(UsageError, match="name=source"): build(tmp_path, "8", ["only-a-name"])
    with pytest.raises(UsageError, match="given twice"): build(tmp_path, "9", [good, good])
    with pytest.raises(UsageError, match="no domain 'x'"): read_prose(small_prose(), "train", ["x"])
    with pytest.raises(MissingError): read_prose(tmp_path, "train")


def test_stop_names_set_and_count(tmp_path):
    import json
    leaked = read_split(small_corpus(), "test").text.tolist()[:3]
    (tmp_path/"web.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [*leaked, *(" ".join(random.Random(i).choices(vocabulary, k=50)) for i in range(30))]))
    with pytest.raises(DataError, match=r"of 33 documents 3 of the evaluation set test of the corpus \(3 exact\)"):
        build_prose(begin(tmp_path/"s", "prose"), small_corpus(), domains=[], own=[f"web={tmp_path}/web.jsonl"], on_leak="stop")
    folder = build_prose(begin(tmp_path/"d", "prose"), small_corpus(), domains=[], own=[f"web={tmp_path}/web.jsonl"], on_leak="drop")
    assert read_json(folder/"datasheet.json")["leaks"] == {"test of the corpus": {"exact": 3}}


def test_sides_follow_the_lot():
    assert [side(x, 0.1, 0.2) for x in (0.0, 0.19, 0.2, 0.29, 0.31, 0.99)] == ["test", "test", "validation", "validation", "train", "train"]
