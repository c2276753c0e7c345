"""A corpus of a table that is read row by row is, to the byte, that of the same table in memory:
files, counts, reasons, notes and errors."""

import contextlib
import gc
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, LlmecoError, create_record
from llmeco_nb.data import corpus_stream
from llmeco_nb.data.corpus import build_corpus
from llmeco_nb.data.corpus_rows import CorpusConfig
from llmeco_nb.data.readers import read_frame

ENDINGS = [".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".jsonl.bz2"]
WORDS = ["a", "B", "lamp", "<br>", "&amp;", "é", "cafÃ©", "😀", "\u200b", "NA", '"', ",", " ", "\n"]
texts = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)
cells = dict(
    text=st.none() | texts | st.sampled_from(["one text", "One  text", "another text"]),
    label=st.sampled_from(["good", "bad", "Bad ", "2.0", "rare", "", None]),
    target=st.sampled_from(["1", "2.5", "-3", "", None, "none"]) | st.integers(0, 9).map(str),
    split=st.sampled_from(["train"] * 5 + ["Dev", "test", "unsup"]),
    who=st.sampled_from(["x", "y", "z", "", None]),
)
EXAMPLES = int(os.environ.get("LLMECO_EXAMPLES", "15"))
OPTIONS = dict(
    task=["text-classification"] * 3 + ["regression"],
    label_column=["label"] * 6 + ["", "text"],
    split_column=["", "none", "split", "who"],
    group_column=["", "", "who"],
    rare=["stop", "drop", "other"],
    join_names=[False, True],
    nulls=[[], ["NA", "none"]],
    keep_newlines=[False, True],
    max_rows=[None, None, 20],
    max_labels=[1000, 2],
    validation_size=[0.1, 0.0, 3],
)


def write(folder: Path, name: str, rows: list[dict]) -> str:
    "The rows as a file of the kind that its name says."
    frame, file = pd.DataFrame(rows, columns=list(cells)), folder / name
    if ".json" in name:
        frame.to_json(file, orient="records", lines=True, force_ascii=False)
    elif name.endswith(".parquet"):
        frame.astype(object).to_parquet(file)
    else:
        frame.to_csv(file, index=False, sep="\t" if ".tsv" in name else ",")
    return str(file)


def made(folder: Path, config: CorpusConfig) -> dict[str, object]:
    "All that a corpus is: its files, numbers and sentences; or why there is none."
    record = create_record(folder, "data")
    try:
        corpus = build_corpus(record, config)
    except LlmecoError as e:
        return {"error": f"{type(e).__name__}: {e}"}
    files = {f.name: f.read_bytes() for f in sorted(corpus.iterdir())}
    return files | {"metrics": record.metrics, "said": (folder / "summary.txt").read_text()}


def compare(folder: Path, config: CorpusConfig, any_fault: bool = False) -> dict[str, object]:
    """Build in both ways; what both have made. Of several faults each may name another one, with
    `any_fault`."""
    with pytest.MonkeyPatch.context() as patch:
        held = made(folder / "held", config)
        patch.setattr(corpus_stream, "large_bytes", 0)
        assert corpus_stream.is_streamed(config)
        streamed = made(folder / "streamed", config)
    if not (any_fault and "error" in held and "error" in streamed):
        assert streamed.get("datasheet.json") == held.get("datasheet.json")
        assert streamed == held
    assert not [f for f in (folder / "streamed").iterdir() if f.name.startswith("tmp")]
    return held


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_it_is_the_corpus_of_the_table_in_memory(tmp_path, data):
    name = "t" + data.draw(st.sampled_from(ENDINGS))
    some = st.lists(st.fixed_dictionaries(cells), min_size=1, max_size=12)
    fields = {field: data.draw(st.sampled_from(of)) for field, of in OPTIONS.items()}
    rows = data.draw(some)
    # most tables of so few rows are refused; those that are not have rows enough in each class
    if data.draw(st.integers(0, 3)):
        usual = [("good", "2", "x"), ("bad", "3", "y"), ("Bad ", "4", None)]
        rows += [
            dict(text=f"text {i} <b>of</b> {t}", label=t, target=n, split="train", who=w)
            for i in range(9)
            for t, n, w in usual
        ]
    if data.draw(st.integers(0, 3)) == 0:
        other = "o" + data.draw(st.sampled_from([".csv", ".jsonl", ".parquet"]))
        fields["test_source"] = write(tmp_path, other, data.draw(some))
    asked = CorpusConfig(source=write(tmp_path, name, rows), **fields)
    compare(tmp_path, asked, any_fault=True)


def rows_of(n: int) -> list[dict]:
    split = ["train"] * 7 + ["dev", "test", "unsup"]
    return [
        dict(
            text=f"letter {i // 2 if i % 8 < 2 else i}, <i>kind</i> {i % 3}",
            label=["good", "bad", "so so"][i % 3],
            target=str(i % 7),
            split=split[i % 10],
            who=f"author {i // 6}" if i % 4 else None,
        )
        for i in range(n)
    ]


FAULTS = [
    dict(text_column="nothing"),
    dict(label_column="nothing"),
    dict(label_column="text"),
    dict(group_column="nobody"),
    dict(split_column="nowhere"),
    dict(split_column="who"),
    dict(split_column="label"),
    dict(task="regression", target_column="who"),
    dict(task="regression", target_column="nothing"),
    dict(max_labels=2),
    dict(nulls=["good", "bad", "so so"]),
    dict(nulls=["good", "bad"]),
    dict(split_column="none", test_size=0.999),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_the_same_is_said_of_a_fault(tmp_path, fault):
    asked = CorpusConfig(source=write(tmp_path, "t.csv", rows_of(120)), max_rows=None)
    assert "Error: " in compare(tmp_path, asked.replace(**fault))["error"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_any_file(tmp_path, ending):
    asked = CorpusConfig(source=write(tmp_path, f"t{ending}", rows_of(120)), max_rows=None)
    assert "unlabelled.parquet" in compare(tmp_path, asked)
    named = asked.replace(split_column="none", group_column="who")
    assert json.loads(compare(tmp_path, named)["datasheet.json"])["groups"]["grouped_rows"] > 50
    assert "error" not in compare(tmp_path, asked.replace(task="regression"))


def test_official_sets_of_any_kind(tmp_path):
    source = write(tmp_path, "t.csv", [r | dict(split="") for r in rows_of(120)])
    for s, kind in {"a": "good", "b": "bad", "c": "good"}.items():
        (tmp_path / "folder" / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / kind / f"{s}.txt").write_text(f"the text {s}")
    asked = CorpusConfig(source=source, max_rows=None, split_column="none")
    official = write(tmp_path, "o.jsonl", rows_of(30))
    both = asked.replace(test_source=str(tmp_path / "folder"), validation_source=official)
    assert json.loads(compare(tmp_path, both)["datasheet.json"])["counts"]["test"] == 3
    regression = both.replace(task="regression")
    assert "holds texts alone" in compare(tmp_path, regression)["error"]
    unlabelled = both.replace(label_column="")
    assert "error" not in compare(tmp_path, unlabelled)
    strange = write(tmp_path, "s.csv", [r | dict(label="strange") for r in rows_of(30)])
    assert "strange" in compare(tmp_path, asked.replace(test_source=strange))["error"]


def test_declared_classes_and_what_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    frame = pd.DataFrame({"text": [f"text {i}" for i in range(90)], "label": [0, 2, -1] * 30})
    names = {"label": {"names": ["none", "bad", "good"], "_type": "ClassLabel"}}
    told = {"huggingface": json.dumps({"info": {"features": names}})}
    table = pa.Table.from_pandas(frame).replace_schema_metadata(told)
    pq.write_table(table, tmp_path / "d.parquet")
    asked = CorpusConfig(source=str(tmp_path / "d.parquet"), max_rows=None)
    found = json.loads(compare(tmp_path, asked)["datasheet.json"])
    assert found["labels"] == ["none", "good"] and found["counts"]["null_labels"] == 30
    lists = '{"text": "a", "label": ["x"]}\n{"text": "b", "label": "y"}\n'
    (tmp_path / "l.jsonl").write_text(lists)
    for name, refusal in {
        "l.jsonl": "holds such values as",
        "e.csv": "line 3: 3 columns",
        "n.csv": "more than one sign",
    }.items():
        if name == "e.csv":
            (tmp_path / name).write_text("text,label\na,b\nc,d,e\n")
        if name == "n.csv":
            (tmp_path / name).write_text("a;b,c\nd;e,f\n")
        source = str(tmp_path / name)
        assert refusal in compare(tmp_path, CorpusConfig(source=source))["error"]
    long = [r | dict(label="x" * 101) if i % 2 else r for i, r in enumerate(rows_of(60))]
    source = write(tmp_path, "x.csv", long)
    assert "characters" in compare(tmp_path, CorpusConfig(source=source))["error"]
    long = [r | dict(text="x" * 200_001) if i > 57 else r for i, r in enumerate(rows_of(60))]
    for task in ("text-classification", "regression"):
        source = write(tmp_path, "y.csv", long)
        asked = CorpusConfig(source=source, task=task, split_column="none")
        assert "and 1 more; a text has at most" in compare(tmp_path, asked)["error"]


def test_many_near_copies_of_an_official_text_leave_training(tmp_path):
    "Whether a text is near an official one does not depend on how many others are, too."
    words = [f"word{k}" for k in range(30)]
    rows = [dict(text=" ".join(f"f{i * 30 + k}" for k in range(30))) for i in range(100)]
    rows += [dict(text=" ".join([f"new{k}", *words[1:]])) for k in range(40)]
    rows += [dict(text=f"A long{'!' * k} day") for k in range(1, 21)]
    rows = [r | dict(label="ab"[i % 2]) for i, r in enumerate(rows)]
    source = write(tmp_path, "t.csv", rows)
    held = [dict(text=" ".join(words), label="a"), dict(text="a long day", label="b")]
    asked = CorpusConfig(source=source, test_source=write(tmp_path, "o.csv", held), max_rows=None)
    counts = json.loads(compare(tmp_path, asked)["datasheet.json"])["counts"]
    assert (counts["near_leaks"], counts["usable"]) == (60, 100)


def test_an_official_set_without_labels_is_refused(tmp_path):
    source = write(tmp_path, "t.csv", [r | dict(split="") for r in rows_of(120)])
    (tmp_path / "flat").mkdir()
    for name in ("flat/a.txt", "held.txt"):
        (tmp_path / name).write_text("a text without a label\n")
    for s in ("validation", "test"):
        for name in ("flat", "held.txt"):
            official = {f"{s}_source": str(tmp_path / name)}
            asked = CorpusConfig(source=source, max_rows=None, **official)
            said = compare(tmp_path, asked)["error"]
            assert f"{name} holds texts alone" in said and "classes" in said
            assert "error" not in compare(tmp_path, asked.replace(label_column=""))


def test_the_datasheet_does_not_grow_with_copies(tmp_path):
    rows = rows_of(60) + [dict(text="no <b>comment</b>", label="good")] * 3000
    asked = CorpusConfig(source=write(tmp_path, "t.csv", [r | dict(split="") for r in rows]))
    sheet = compare(tmp_path, asked)["datasheet.json"]
    sample = max(json.loads(sheet)["copies"]["samples"], key=lambda one: one["rows"])
    assert sample["rows"] == 3000 and len(sample["texts"]) == len(sample["ids"]) == 5
    assert len(sheet) < 10_000


def test_of_an_official_set_with_splits_the_one_asked_for_is_taken(tmp_path):
    source = write(tmp_path, "t.csv", [r | dict(split="") for r in rows_of(120)])
    (tmp_path / "parts").mkdir()
    for name, begin in (("train", 200), ("test", 300)):
        held = pd.DataFrame(rows_of(begin + 20)[begin:]).drop(columns="split")
        held.to_csv(tmp_path / "parts" / f"{name}.csv", index=False)
    official = write(tmp_path, "o.jsonl", rows_of(440)[400:])
    asked = CorpusConfig(source=source, max_rows=None)
    for named, n in ((str(tmp_path / "parts"), 20), (official, 4)):
        found = compare(tmp_path, asked.replace(test_source=named))
        counts = json.loads(found["datasheet.json"])["counts"]
        assert counts["test_read"] == n and "Those for test are taken." in found["said"]
        whole = compare(tmp_path, asked.replace(test_source=named, split_column="none"))
        assert json.loads(whole["datasheet.json"])["counts"]["test_read"] == 40
        assert "All are taken, since split_column is none." in whole["said"]
    said = compare(tmp_path, asked.replace(validation_source=str(tmp_path / "parts")))["error"]
    assert "validation_source (parts)" in said and "20 for train, 20 for test" in said
    one = write(tmp_path, "one.csv", [r | dict(split="test") for r in rows_of(440)[400:]])
    found = compare(tmp_path, asked.replace(validation_source=one))
    assert json.loads(found["datasheet.json"])["counts"]["validation_read"] == 40
    lists = write(tmp_path, "l.jsonl", [r | dict(split=["a"]) for r in rows_of(440)[400:]])
    assert "error" not in compare(tmp_path, asked.replace(test_source=lists))


SAME = {
    "lists in a column named split": (
        [r | dict(split=[r["split"]]) for r in rows_of(60)],
        {},
        "",
    ),
    "objects in a column of splits": (
        [r | dict(split={"is": r["split"]}) for r in rows_of(60)],
        dict(split_column="split"),
        "The column `split` of .* holds such values as",
    ),
    "an official set of no bytes": (rows_of(60), dict(test_source="e.csv"), "no usable row: 0"),
    "an official set of no lines": (rows_of(60), dict(test_source="e.jsonl"), "no usable row: 0"),
    "rows without keys": ([{}] * 3, {}, "no usable row: 0"),
    "no keys and no numbers": ([{}] * 3, dict(task="regression"), "no usable row: 0"),
    "a cut line": ('{"text": "a", "label": "b"}\n{"text":\n', {}, "line 2, column 9: not JSON"),
    "a line of another kind": (
        '{"text": "a", "label": "b"}\n\n[1]\n',
        {},
        "line 3: each line",
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_odd_lines_and_cells(tmp_path, case):
    rows, fields, refusal = SAME[case]
    lines = rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "t.jsonl").write_text(lines)
    for name in ("e.csv", "e.jsonl"):
        (tmp_path / name).write_text("")
    fields = {k: str(tmp_path / v) if "source" in k else v for k, v in fields.items()}
    asked = CorpusConfig(source=str(tmp_path / "t.jsonl"), max_rows=None, **fields)
    if "task" not in fields and case.startswith("an official"):
        asked = asked.replace(split_column="none")
    said = compare(tmp_path, asked).get("error", "")
    assert re.search(refusal, said) and bool(said) == bool(refusal)


def test_a_text_whose_last_line_is_in_the_encoding_that_is_named(tmp_path):
    lines = [f"très bon {i},{'ab'[i % 2]}\n" for i in range(60)]
    data = "text,label\n" + "".join(lines)
    (tmp_path / "t.csv").write_bytes(data.encode() + "très beau,a\n".encode("cp1252"))
    asked = CorpusConfig(source=str(tmp_path / "t.csv"), encoding="cp1252", max_rows=None)
    assert json.loads(compare(tmp_path, asked)["datasheet.json"])["counts"]["read"] == 61
    (tmp_path / "t.csv").write_bytes(data.encode())
    assert "is valid UTF-8" in compare(tmp_path, asked)["error"]


def test_days_and_zones_that_python_has_not(tmp_path):
    "In a column that is not read they do no harm to a streamed table; elsewhere it is named."
    import pyarrow as pa
    import pyarrow.parquet as pq

    far = pa.array([2**31 - 1] * 60, pa.int32())
    ticks = pa.array([1] * 60, pa.int64())
    kinds = {
        "day": far.cast(pa.date32()),
        "time": ticks.cast(pa.time64("ns")),
        "zone": ticks.cast(pa.timestamp("us", "Nowhere/None")),
        "year": pa.array([2**60] * 60).cast(pa.timestamp("us")),
    }
    columns = {k: [r[k] for r in rows_of(60)] for k in ("text", "label")}
    for name, column in kinds.items():
        source = str(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table(columns | {name: column}), source)
        asked = CorpusConfig(source=source, max_rows=None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(corpus_stream, "large_bytes", 0)
            assert "error" not in made(tmp_path / f"far {name}", asked)
            said = made(tmp_path / "named", asked.replace(label_column=name))["error"]
            assert f"The column `{name}` of {source} holds" in said or name == "time"
        with contextlib.suppress(DataError):  # pandas has some of them; Python cuts a time
            read_frame(source)


@pytest.mark.parametrize("more", ["test", "somewhere", "dev"])
def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch, more):
    rows = [r | dict(split="train" if i % 10 else "dev") for i, r in enumerate(rows_of(60))]
    source = write(tmp_path, "t.csv", rows)
    first = corpus_stream.split_counts

    def and_then(*args):
        found = first(*args)
        with open(source, "a") as f:
            f.write(f"late,good,,{more},x\n")
        return found

    monkeypatch.setattr(corpus_stream, "large_bytes", 0)
    monkeypatch.setattr(corpus_stream, "split_counts", and_then)
    said = made(tmp_path / "grown", CorpusConfig(source=source, max_rows=None))["error"]
    assert "t.csv changed while it was read" in said


@pytest.mark.parametrize("label", ["label", "nothing"])
def test_the_file_of_the_texts_is_closed(tmp_path, monkeypatch, label):
    asked = CorpusConfig(source=write(tmp_path, "t.csv", rows_of(120)), label_column=label)
    monkeypatch.setattr(corpus_stream, "large_bytes", 0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        made(tmp_path / "closed", asked)
        gc.collect()
    assert not [w for w in seen if w.category is ResourceWarning]


CHILD = """
import resource, sys
from llmeco_nb.core import create_record
from llmeco_nb.data import corpus_stream, groups, text_spool
from llmeco_nb.data.corpus import build_corpus
from llmeco_nb.data.corpus_rows import CorpusConfig
corpus_stream.large_bytes, text_spool.group_rows = 0, 1000
groups.read_within = lambda texts, most: None  # as if the texts were too many to be searched
build_corpus(create_record(sys.argv[2], "data"), CorpusConfig(source=sys.argv[1], max_rows=None))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_memory_grows_by_bytes_a_row(tmp_path):
    "Eighty thousand more rows take 150 bytes each at most; a text alone has 400."

    def peak(n: int) -> int:
        file = tmp_path / f"{n}.csv"
        with open(file, "w") as f:
            f.write("text,label\n")
            for i in range(n):
                f.write(f"{i} {'some words ' * 35}{i % 977} {i % 7919},{'abc'[i % 3]}\n")
        args = [sys.executable, "-c", CHILD, str(file), str(tmp_path / f"record {n}")]
        return int(subprocess.run(args, check=True, capture_output=True, text=True).stdout)

    small, large = peak(30_000), peak(110_000)
    assert large - small < 80_000 * 150
