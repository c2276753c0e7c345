"""Whatever table is written, the reader gives its truth or refuses it by an error of ours: it is
never wrong without a word. Tables inside the rules are nearly all read."""

import bz2
import csv
import gzip
import io
import json
import os
import zipfile
from collections import Counter
from dataclasses import dataclass

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmeco_nb.core import LlmecoError
from llmeco_nb.data.delimited import ReadOptions
from llmeco_nb.data.stream import stream_texts
from llmeco_nb.data.tables import class_name, read_table

pieces = st.sampled_from(
    [*",;|\t\"'\n\\", "\r\n", *"aéłЖ😀€ ", "b c", "NA", "None", "10043", "1.5"]
)
texts = st.lists(pieces, max_size=7).map("".join)
label_types = [
    ["bad", "good", "so so"],
    ["bad, or so", 'the "good"', "c;d|e"],
    [0, 1, 10043],
    [0.5, 1.5, 2.25],
    [True, False],
    ["NA", "None", "nan"],
    ["01", "1.10", "$"],
    ["😀", "żółć", "да"],
]
faults = ["encoding", "mark", "escape", "unquoted", "ragged", "single quotes"]


@dataclass
class Written:
    """A table as it was written, and what is said of it.

    Args:
        name: Of the file.
        data: Its bytes.
        rows: Text and label of each row; None for nothing.
        options: What the reader is told.
        fault: What breaks the rules; empty: nothing does.
    """

    name: str
    data: bytes
    rows: list[tuple]
    options: ReadOptions
    fault: str = ""


def pack(data: bytes, packing: str) -> bytes:
    if packing == ".zip":
        with zipfile.ZipFile(packed := io.BytesIO(), "w") as archive:
            archive.writestr("table", data)
        return packed.getvalue()
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[packing](data)


def encodable(value: object, encoding: str) -> object:
    "A cell of which only those characters are left that the encoding has."
    if not isinstance(value, str):
        return value
    return value.encode(encoding, "ignore").decode(encoding)


def delimited(frame: pd.DataFrame, how: dict, fault: str) -> str:
    "The table as CSV, broken in the way of the fault if there is one."
    cells = "".join(str(v) for v in frame.to_numpy().ravel())
    more = dict(sep=how["separator"], lineterminator=how["end"], quoting=how["quoting"])
    # the module csv quotes a line end only if it is its own, and pandas writes by it
    foreign = set("\r\n") - set(how["end"])
    if how["quoting"] == csv.QUOTE_MINIMAL and foreign & set(cells):
        more["quoting"] = csv.QUOTE_ALL
    if fault == "escape":
        more |= dict(doublequote=False, escapechar="\\", quoting=how["quoting"])
    if fault == "single quotes":
        more["quotechar"] = "'"
    if fault == "unquoted":
        return how["end"].join(
            how["separator"].join("" if v is None else str(v) for v in row)
            for row in [frame.columns, *frame.to_numpy().tolist()]
        )
    written = frame.to_csv(None, index=False, **more)
    if fault == "ragged":
        written += how["separator"].join(["one"] * (len(frame.columns) + 1)) + how["end"]
    return written


@st.composite
def tables(draw) -> Written:
    ending = draw(st.sampled_from([".csv"] * 6 + [".tsv", ".jsonl", ".json", ".parquet"]))
    fault = draw(st.sampled_from([""] * 3 + faults))
    how = dict(
        separator="\t" if ending == ".tsv" else draw(st.sampled_from(",;\t|")),
        end=draw(st.sampled_from(["\n", "\r\n", "\r"])),
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])),
    )
    delimited_one = ending in (".csv", ".tsv")
    if not delimited_one and fault not in ("encoding", "mark"):
        fault = ""
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252"]))
    if fault:
        encoding = {"encoding": "cp1252", "mark": "utf-16-le"}.get(fault, "utf-8")
    if ending == ".parquet":
        encoding, fault = "utf-8", ""
    labels = draw(st.sampled_from(label_types))
    nothing = draw(st.sampled_from(["", "", "text", "label", "both"]))
    drawn = draw(st.lists(st.tuples(texts, st.sampled_from(labels)), max_size=5))
    rows = [
        (
            None if nothing in ("text", "both") and draw(st.booleans()) else text,
            None if nothing in ("label", "both") and draw(st.booleans()) else label,
        )
        for text, label in drawn
    ]
    rows += [("plain one", labels[0]), ("plain two", labels[1])]
    if encoding == "cp1252":
        rows = [(encodable(t, encoding), encodable(k, encoding)) for t, k in rows]
        rows = [(t, k) for t, k in rows if k is None or str(k).strip()]
        rows += [("plain café", "bad"), ("plain thé", "good")]
    if fault == "escape":  # backslashes aside: behind such a writer they are doubled, and look sane
        rows = [(t and t.replace("\\", ""), k) for t, k in rows]
        marked = draw(st.sampled_from(['say "no"', 'end "', '"start', 'a,"b']))
        rows.append((marked, labels[0]))
    if fault in ("unquoted", "single quotes"):
        rows.append((f"one{how['separator']}two", labels[0]))
    return finished(draw, ending, rows, how, encoding, fault)


def finished(draw, ending, rows, how, encoding, fault) -> Written:
    "The table written: columns in some order, encoded, packed, and with what is said of it."
    columns = {
        "text": [t for t, _ in rows],
        "label": [k for _, k in rows],
        "id": list(range(len(rows))),
        "price (EUR, incl. VAT)": ["3,5"] * len(rows),
    }
    further = draw(st.sampled_from([[], ["id"], ["id", "price (EUR, incl. VAT)"]]))
    named = draw(st.permutations(["text", "label", *further]))
    frame = pd.DataFrame({name: pd.Series(columns[name], dtype=object) for name in named})
    packing = draw(st.sampled_from(["", "", "", ".gz", ".bz2", ".zip"]))
    if ending == ".parquet":
        frame = frame.convert_dtypes() if draw(st.booleans()) else frame.infer_objects()
        if draw(st.booleans()) and all(k is None or isinstance(k, str) for _, k in rows):
            frame["label"] = frame["label"].astype("category")
        frame.to_parquet(out := io.BytesIO())
        data = out.getvalue()
    elif ending.startswith(".json"):
        records = frame.to_dict("records")
        dump = lambda value: json.dumps(value, ensure_ascii=draw(st.booleans()))
        text = dump(records) if ending == ".json" else "\n".join(map(dump, records))
        data = text.encode(encoding)
    else:
        data = delimited(frame, how, fault).encode(encoding)
    options = dict(
        encoding=encoding if encoding == "cp1252" and not fault else "",
        separator=draw(st.sampled_from(["", how["separator"]])) if ending == ".csv" else "",
        nulls=draw(st.sampled_from([(), (), ("NA", "None")])),
    )
    return Written(f"a{ending}{packing}", pack(data, packing), rows, ReadOptions(**options), fault)


def truth(case: Written) -> tuple[list[tuple[str, str]], list[str]]:
    "Text and class of each row that has both, and all texts."
    gone = lambda v: v is None or not str(v).strip() or str(v).strip() in case.options.nulls
    pairs = [(str(t), class_name(k)) for t, k in case.rows if not gone(t) and not gone(k)]
    return pairs, [str(t) for t, _ in case.rows if not gone(t)]


def check(case: Written, folder, counts: Counter) -> None:
    (file := folder / case.name).write_bytes(case.data)
    side = case.fault or "inside"
    pairs, all_texts = truth(case)
    counts[side] += 1
    if len({k for _, k in pairs}) < 2:  # no two classes are left: nothing to read
        counts[side] -= 1
        counts["too few classes"] += 1
        return
    try:
        table = read_table(file, options=case.options)
    except LlmecoError as e:
        assert str(file) in str(e) and "\n" not in str(e) and len(str(e)) < 700, str(e)
        counts[f"{side}, refused"] += 1
        try:
            streamed = list(stream_texts(file, options=case.options))
        except LlmecoError:
            return
        assert [t for t in streamed if t.strip()] == all_texts, case
        return
    found = [(t, table.attrs["labels"][c]) for t, c in zip(table.text, table.label)]
    assert found == pairs, (case, found)
    streamed = [t for t in stream_texts(file, options=case.options) if t.strip()]
    assert streamed == all_texts, (case, streamed)
    counts[f"{side}, read"] += 1


def draw_many(examples: int, folder, **more) -> Counter:
    counts = Counter()
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=examples, deadline=None, suppress_health_check=quiet, **more)
    @given(tables())
    def one(case):
        check(case, folder, counts)

    one()
    print(*(f"{name}: {n}" for name, n in sorted(counts.items())), sep="\n")
    assert counts["inside, read"] >= 0.9 * counts["inside"] > 0
    return counts


def test_a_table_is_read_rightly_or_refused(tmp_path):
    draw_many(100, tmp_path, derandomize=True)


@pytest.mark.slow
def test_many_tables_are_read_rightly_or_refused(tmp_path):
    """Other ones each time; `LLMECO_EXAMPLES=2000` draws more."""
    counts = draw_many(int(os.environ.get("LLMECO_EXAMPLES", "250")), tmp_path)
    assert all(counts[f"{fault}, refused"] for fault in faults)
