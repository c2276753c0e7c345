"""Streams: the texts that `read_table` gives, one at a time; broken sources are named with their
line; memory does not grow with the source."""

import bz2
import csv
import gzip
import io
import json
import tracemalloc
import zipfile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, MissingError, UsageError
from llmeco_nb.data.corpus import split_texts
from llmeco_nb.data.delimited import ReadOptions, max_text
from llmeco_nb.data.sources import fetch, local_path, revision, source_kind
from llmeco_nb.data.stream import csv_rows, read_lines, stream_texts
from llmeco_nb.data.table_stream import open_table
from llmeco_nb.data.tables import read_table
from llmeco_nb.data.unpacking import open_stream, parquet_batches

anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
drawn = settings(max_examples=80, deadline=None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("s")


def opened(source):
    with open_stream(source) as f:
        return f.read()


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".jsonl", ".parquet", ".txt"])
def test_a_path_is_read_as_its_text_is(tmp_path, ending):
    file, frame = tmp_path / f"t{ending}", pd.DataFrame(dict(text=["one", "two"]))
    if ending == ".parquet":
        frame.to_parquet(file)
    elif ending == ".jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        frame.to_csv(file, index=False)
    readers = [opened, stream_texts, fetch, revision, source_kind, local_path]
    if ending != ".parquet":
        readers += [read_lines, csv_rows]
    listed = lambda found: list(found) if hasattr(found, "__next__") else found
    for read in readers:
        assert listed(read(file)) == listed(read(str(file))), read
    ours, theirs = (read_table(f, label_column="") for f in (file, str(file)))
    assert ours.equals(theirs) and ours.attrs == theirs.attrs


@pytest.mark.parametrize("source", [3, None, b"t.csv"])
def test_what_is_neither_text_nor_path_is_refused_by_its_type(source):
    for read in (opened, stream_texts, fetch, revision, source_kind, local_path, read_table):
        with pytest.raises(UsageError, match=f"text or a path; found {type(source).__name__} "):
            read(source)


def pack(data, packing):
    "`data` packed by gzip, bz2, zip, or not at all."
    if packing == "zip":
        with zipfile.ZipFile(packed := io.BytesIO(), "w") as archive:
            archive.writestr("t.csv", data)
        return packed.getvalue()
    return {"": bytes, "gzip": gzip.compress, "bz2": bz2.compress}[packing](data)


def whole(file, **more):
    return read_table(str(file), label_column="", **more).text.tolist()


def streamed(file, **more):
    return [t for t in stream_texts(str(file), **more) if t.strip()]


@drawn
@given(
    st.text(st.sampled_from("ab \t\n\n\r\x0b\u2003é"), max_size=40),
    st.sampled_from(["line", "paragraph", "file"]),
)
def test_plain_text_is_cut_as_read_table_cuts_it(place, text, unit):
    (file := place / "t.txt").write_bytes(text.encode())
    if text.strip():
        assert streamed(file, unit=unit) == whole(file, unit=unit)
    else:
        assert streamed(file, unit=unit) == []


@drawn
@given(
    st.lists(
        st.text(st.sampled_from('a é,;|\t"'), min_size=1, max_size=12), min_size=2, max_size=6
    ),
    st.sampled_from(",;|\t"),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["text", "text; in full", "price (EUR, incl. VAT)", "a|b"]),
    st.sampled_from(["", "sep", "space"]),
    st.sampled_from(["", "gzip", "bz2", "zip"]),
)
@example(["a,a", "é,é"], ";", "\n", "price (EUR, incl. VAT)", "", "")
@example(["a", "b"], ";", "\n", "price (EUR, incl. VAT)", "sep", "")
def test_the_separator_is_found_or_the_file_is_refused(
    place, texts, separator, end, name, custom, packing
):
    """Whatever writes the table, table and stream read what was written, or refuse a file that two
    separators would cut; `custom` is a first line `sep=`, or a space behind each separator."""
    assume("".join(texts).strip())
    table, file = pd.DataFrame({"id": range(len(texts)), name: texts}), place / "t.csv"
    quoting = csv.QUOTE_ALL if custom == "space" else csv.QUOTE_MINIMAL
    written = table.to_csv(None, index=False, sep=separator, lineterminator=end, quoting=quoting)
    if custom == "space":
        assume('"' not in "".join(texts) and not any(c in "".join(texts) for c in ",;|\t"))
        assume(separator not in name)
        written = written.replace(f'"{separator}"', f'"{separator} "')
    if custom == "sep":
        written = f"sep={separator}{end}{written}"
    file.write_bytes(pack(written.encode(), packing))
    try:
        found = whole(file, text_column=name)
    except DataError as e:
        assert custom != "sep" and "can be cut by more than one sign" in str(e)
        with pytest.raises(DataError, match="can be cut by more than one sign"):
            streamed(file, column=name)
        told = ReadOptions(separator=separator)
        found = whole(file, text_column=name, options=told)
        assert found == [text for text in texts if text.strip()]
        assert found == streamed(file, column=name, options=told)
    else:
        assert found == [text for text in texts if text.strip()] == streamed(file, column=name)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"<!doctype HTML>\n<html><head><title>Sign in</title>", "web page titled “Sign in”"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04 damaged", "not a whole zip file"),
        (gzip.compress(b"text\na\n")[:-5], "not a whole gzip file"),
    ],
    ids=["page", "pointer", "zip", "gzip"],
)
def test_what_is_no_table_is_refused_by_what_it_is(tmp_path, content, said):
    "By table and stream alike; its name says .csv."
    (file := tmp_path / "a.csv").write_bytes(content)
    for read in (whole, streamed):
        with pytest.raises(DataError, match=said):
            read(file)


def test_json_that_is_no_json_lines_is_told_what_it_seems_to_be(tmp_path):
    (file := tmp_path / "a.jsonl").write_text('{\n "text": "a"\n}\n{\n "text": "b"\n}\n')
    with pytest.raises(DataError, match="objects that are written over several lines"):
        whole(file)
    file.write_text('["a", "bad"]\n["b", "good"]\n')
    with pytest.raises(DataError, match="an array a line"):
        whole(file)


@drawn
@given(
    st.lists(anything, min_size=1, max_size=8),
    st.sampled_from([".csv", ".csv.gz", ".tsv", ".jsonl", ".jsonl.gz", ".parquet"]),
    st.sampled_from([0, 1]),
)
@example(["\t", "\n1\t"], ".tsv", 1)
def test_tables_give_the_same_texts(place, texts, ending, quoting):
    """`quoting` 1 is around all cells; 0 only where one must, and then neither a tab nor a lone
    carriage return inside a text can be told from a border."""
    assume(quoting or not any(c in t for t in texts for c in "\t\r"))
    texts = [*texts, "at least one"]
    table, file = pd.DataFrame(dict(id=range(len(texts)), text=texts)), place / f"t{ending}"
    if ending == ".parquet":
        table.to_parquet(file, row_group_size=3)
    elif ending.startswith(".jsonl"):
        data = "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_dict("records")
        ).encode()
        file.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    else:
        table.to_csv(file, index=False, sep="\t" if ending == ".tsv" else ",", quoting=quoting)
    assert streamed(file) == whole(file) == [t for t in texts if t.strip()]


def test_other_forms(tmp_path):
    (tmp_path / "bare.tsv").write_text('id\ttext\n1\tHe said "no\n2\tShe "did"\n')
    (tmp_path / "semi.csv").write_text("id;text\n1;one, two\n")
    (tmp_path / "mac.csv").write_bytes(b"id,text\r1,one\r2,two\r")
    (tmp_path / "array.json").write_text(
        json.dumps([{"text": "one"}, {"text": None}, {"text": "two"}])
    )
    (tmp_path / "holes.jsonl").write_text(
        '{"text": "one"}\n\n{"id": 2}\n{"text": null}\n{"text": 5}\n'
    )
    for name in ("bare.tsv", "semi.csv", "mac.csv", "array.json", "holes.jsonl"):
        assert streamed(tmp_path / name) == whole(tmp_path / name), name
    assert list(stream_texts(str(tmp_path / "holes.jsonl"))) == ["one", "", "", "5"]
    for name in ("imdb", "rotten_tomatoes"):
        assert list(stream_texts(name)) == read_table(name).text.tolist()
    (tmp_path / "b" / "deep" / ".git").mkdir(parents=True)
    for name, text in (
        ("b/two.MD", "two"),
        ("b/one.txt", "one"),
        ("b/deep/three.txt", "three"),
        ("b/deep/.git/four.txt", "four"),
        ("b/five.csv", "five"),
    ):
        (tmp_path / name).write_text(text)
    assert list(stream_texts(str(tmp_path / "b"))) == ["three", "one", "two"]


@drawn
@given(st.lists(st.binary(max_size=12), max_size=12))
def test_broken_lines_are_named(place, lines):
    (file := place / "broken.txt").write_bytes(data := b"\n".join(lines))
    assume(data[:2] not in (b"\xff\xfe", b"\xfe\xff"))  # the mark of UTF-16
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        marked = 3 if data.startswith(b"\xef\xbb\xbf") else 0
        with pytest.raises(DataError) as said:
            list(read_lines(str(file)))
        at = e.start + marked
        if "\0" in data[:at].decode("utf-8", "replace") or "first bytes" in str(said.value):
            return  # another fault comes first
        assert f"line {data.count(10, 0, at) + 1}, byte {at}" in str(said.value)
    else:
        if "\0" not in text:
            assert "".join(read_lines(str(file))) == text
        else:
            with pytest.raises(DataError, match=f"byte {data.index(0)}: a zero byte"):
                list(read_lines(str(file)))


def test_bad_sources(tmp_path):
    def said(name, data, **more):
        (tmp_path / name).write_bytes(data)
        with pytest.raises((DataError, UsageError, MissingError)) as e:
            list(stream_texts(str(tmp_path / name), **more))
        return str(e.value)

    assert "line 3: 1 columns where the header has 2" in said("a.csv", b"id,text\n1,one\ntwo\n")
    assert "no column `body`" in said(
        "b.csv", b"id,text\n1,one\n", column="body"
    ) and "no column `text`. Did you mean `texts`" in said("c.jsonl", b'{"texts": "x"}\n')
    assert "line 2, column 1: not JSON" in said(
        "d.jsonl", b'{"text": "x"}\n?\n'
    ) and "must be an object" in said("e.jsonl", b'"x"\n')
    assert "each row needs one text" in said("f.jsonl", b'{"text": ["x"]}\n')
    assert "set encoding to utf-16-le" in said("g.csv", "text\nä".encode("utf-16-le"))
    assert "not a readable Parquet file" in said(
        "h.parquet", b"PAR1 is not enough"
    ) and "not a whole gzip file" in said("i.txt.gz", gzip.compress(b"some text " * 999)[:40])
    assert "ends in .doc" in said("j.doc", b"x") and "line, paragraph, file" in said(
        "k.txt", b"x", unit="word"
    )
    with pytest.raises(MissingError, match="absent.txt"):
        stream_texts(str(tmp_path / "absent.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no texts"):
        list(stream_texts(str(tmp_path / "empty")))


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".txt"])
def test_memory_does_not_grow(tmp_path, ending):
    def peak(n):
        rows = (f"Text {i} of many, which says little." for i in range(n))
        (tmp_path / f"{n}{ending}").write_text(
            "text\n" * (ending == ".csv")
            + "".join(
                json.dumps({"text": t}) + "\n"
                if ending == ".jsonl"
                else f'"{t}"\n'
                if ending == ".csv"
                else t + "\n\n"
                for t in rows
            )
        )
        tracemalloc.start()
        assert sum(1 for _ in stream_texts(str(tmp_path / f"{n}{ending}"))) == n
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)
    assert peak(20_000) < 1.5 * peak(2000)


@pytest.mark.parametrize("lines", [3, 50])
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".txt"])
def test_utf8_is_not_read_by_another_encoding(tmp_path, ending, lines):
    "Though it was named; a text with a single byte of its own is read by it, and so is ASCII."
    told = ReadOptions(encoding="cp1252")
    start = {".csv": "text\n", ".jsonl": "", ".txt": ""}[ending]
    line = '{"text": "très bon"}\n' if ending == ".jsonl" else "très bon\n"
    (file := tmp_path / f"a{ending}").write_text(start + line * lines, encoding="utf-8")
    for read in (whole, streamed):
        with pytest.raises(DataError, match="is valid UTF-8, and encoding is cp1252"):
            read(file, options=told)
    file.write_text(start + line * lines, encoding="cp1252")
    more = {"unit": "line"} if ending == ".txt" else {}
    assert whole(file, options=told) == streamed(file, options=told, **more) == ["très bon"] * lines
    file.write_text(start + line.replace("è", "e") * lines)
    assert whole(file, options=told) == streamed(file, options=told, **more)


@pytest.mark.parametrize(
    "ending, start, more",
    [
        (".csv.gz", b'text\n"', b"a" * 1000),
        (".csv.gz", b'text\n"', b"a" * 999 + b"\n"),
        (".jsonl.gz", b'{"text": "', b"a" * 1000),
        (".txt.gz", b"", b"a" * 999 + b"\n"),
        (".txt.gz", b"", b"\0" * 1000),
    ],
    ids=["cell", "cell of lines", "object", "paragraph", "zeros"],
)
def test_packed_data_without_bounds_takes_no_memory(tmp_path, ending, start, more):
    "Less than a megabyte holds ten times the largest text, in one line, cell or paragraph."
    (file := tmp_path / f"a{ending}").write_bytes(gzip.compress(start + more * 170_000))
    tracemalloc.start()
    with pytest.raises(DataError, match="text of more than .* characters|a zero byte"):
        list(stream_texts(file))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 6 * max_text  # a line as it is put together, and no more
    with pytest.raises(DataError, match="bytes and holds more than 6. MiB when it is unpacked"):
        read_table(file, label_column="")


def test_a_parquet_file_is_not_held(tmp_path):
    "However many row groups have been read, by whatever reads some rows at a time."
    file = tmp_path / "train.parquet"
    schema = pa.schema({"id": pa.string(), "text": pa.string(), "label": pa.int64()})
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for group in range(12):
            names = [f"{group}-{i}" for i in range(2000)]
            rows = dict(id=names, text=[name * 200 for name in names], label=[0, 1] * 1000)
            writer.write_table(pa.table(rows, schema=schema))
    assert file.stat().st_size > 24e6

    def memory() -> int:
        return pa.total_allocated_bytes() + tracemalloc.get_traced_memory()[0]

    def rows():
        with open_stream(str(file)) as raw:
            for batch in parquet_batches(raw, 1000):
                yield from batch.column(1).to_pylist()

    readers = [
        lambda: stream_texts(str(file)),
        lambda: split_texts(tmp_path, "train"),
        lambda: (row[0] for row in open_table(str(file), ReadOptions(), peek=None).cells(["text"])),
        rows,
    ]
    tracemalloc.start()
    try:
        for read in readers:
            before, held = memory(), []
            for _ in read():
                held.append(memory() - before)
            assert len(held) == 24_000 and max(held) < 10e6, max(held)
    finally:
        tracemalloc.stop()
