"""Proves that two checkouts compute the same, down to the last bit of every number.

    python tests/yardstick.py OLD NEW [--work DIR] [--profiles smoke,laptop] [--python PYTHON]

Runs the profiles in both checkouts, one run after the other, each on one processor with a runs
folder and a home of its own, and compares the content of every stage of every run: tensors,
arrays, tables, JSON, tokenizers, ONNX models, databases, metrics. `tests/yardstick_map.json`
says how stages, parameters, files, columns, metrics and fields of OLD are called in NEW, and
which places may differ, each with its reason. Nothing else may. The exit status is 0 if nothing
differs, 1 if something does, 2 if a run fails. A run that is whole in DIR is taken from there.

`--seed N` gives every stage of NEW the seed N: the comparison must then fail.
"""

import argparse
import configparser
import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path

import numpy as np

MAP = Path(__file__).with_name("yardstick_map.json")
SHOWN, SHOWN_OF_A_FILE = 50, 5  # differences that are printed
FOREIGN = ("LLMECO_", "HF_", "TRANSFORMERS_", "XDG_", "PYTHON", "OMP_", "MKL_", "JUPYTER_")
SOURCES = (".ipynb", ".py", ".yaml", ".yml")
TRANSLATED = "translated"  # the type of an array whose values the map has changed


class RunError(Exception):
    """A run that did not end well, or a checkout that cannot be run."""


# -- What a file holds: a flat dictionary from the path of a value to the value


@dataclass(frozen=True, eq=False)
class Array:
    """Values of one type in any shape. `kind` names the type as the file does."""

    kind: str
    values: np.ndarray


FieldPath = tuple[str, ...]
Leaf = Array | str | int | float | bool | bytes | None
Leaves = dict[FieldPath, Leaf]


def objects(values: Iterable[object]) -> np.ndarray:
    """A one-dimensional array of Python objects, whatever they are."""
    listed = list(values)
    return np.fromiter(listed, dtype=object, count=len(listed))


def flatten(value: object, at: FieldPath = ()) -> Iterator[tuple[FieldPath, Leaf]]:
    """The leaves of nested dictionaries and lists; tensors and arrays are leaves."""
    if isinstance(value, dict) and value:
        for k, v in value.items():
            yield from flatten(v, (*at, str(k)))
    elif isinstance(value, list | tuple) and value:
        for k, v in enumerate(value):
            yield from flatten(v, (*at, str(k)))
    elif isinstance(value, np.ndarray):
        yield at, Array(str(value.dtype), value)
    elif hasattr(value, "detach"):
        yield at, array_of_tensor(value)
    elif value is None or isinstance(value, str | int | float | bool | bytes):
        yield at, value
    else:
        yield at, repr(value)  # an empty dictionary or list, or something of the library's own


def array_of_tensor(tensor) -> Array:
    """A torch tensor as an array; types that numpy lacks as the integers of their bits."""
    import torch

    plain, kind = tensor.detach().cpu().contiguous(), str(tensor.dtype)
    if plain.dtype in (torch.bfloat16, torch.float16):
        plain = plain.view(torch.int16)
    return Array(kind, plain.numpy())


def read_safetensors(path: Path) -> Leaves:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        found = {("tensors", name): array_of_tensor(f.get_tensor(name)) for name in f.keys()}
        return found | dict(flatten(f.metadata() or {}, ("metadata",)))


def read_checkpoint(path: Path) -> Leaves:
    import torch

    return dict(flatten(torch.load(path, map_location="cpu", weights_only=True)))


def read_numpy(path: Path) -> Leaves:
    loaded = np.load(path, allow_pickle=False)
    return dict(flatten(loaded if isinstance(loaded, np.ndarray) else dict(loaded)))


def read_parquet(path: Path) -> Leaves:
    """The columns; one of lists that are all equally long is a column for every place in them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    found: Leaves = {}
    for name in table.schema.names:
        kind, values = table[name].type, table[name].to_pylist()
        if pa.types.is_list(kind) and len({len(v) for v in values if v is not None}) == 1:
            rows = zip(*values, strict=True) if None not in values else ()
            places = {
                (name, str(i)): Array(str(kind.value_type), objects(row))
                for i, row in enumerate(rows)
            }
            if places:
                found |= places
                continue
        # how long the offsets are is a matter of storage
        found[(name,)] = Array(str(kind).removeprefix("large_"), objects(values))
    return found


def read_sqlite(path: Path) -> Leaves:
    """Every column of every table, rows in the order in which they were written."""
    found: Leaves = {}
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as c:
        names = c.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        for (table,) in names.fetchall():
            columns = [row[1] for row in c.execute(f'PRAGMA table_info("{table}")')]
            rows = c.execute(f'SELECT * FROM "{table}"').fetchall()
            for k, column in enumerate(columns):
                found[table, column] = Array("column", objects(row[k] for row in rows))
    c.close()
    return found


def read_csv(path: Path) -> Leaves:
    import pandas as pd

    separator = "\t" if path.suffix == ".tsv" else ","
    table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    return {(str(name),): Array("text", table[name].to_numpy(object)) for name in table}


def read_json(path: Path) -> Leaves:
    return dict(flatten(json.loads(path.read_text(encoding="utf-8"))))


def read_jsonl(path: Path) -> Leaves:
    lines = path.read_text(encoding="utf-8").split("\n")
    return dict(flatten([json.loads(line) for line in lines if line]))


def read_text(path: Path) -> Leaves:
    return dict(flatten(path.read_text(encoding="utf-8").split("\n")))


def read_bytes(path: Path) -> Leaves:
    return {("bytes",): path.read_bytes()}


def read_onnx(path: Path) -> Leaves:
    """Initialisers, nodes with their attributes, inputs, outputs; not the exporter's notes."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    found: Leaves = {("opset", o.domain or "ai.onnx"): o.version for o in model.opset_import}
    for one in model.graph.initializer:
        found |= flatten(numpy_helper.to_array(one), ("initializers", one.name))
    for side in ("input", "output"):
        for one in getattr(model.graph, side):
            found[side, one.name] = str(one.type).replace("\n", " ")
    for k, node in enumerate(model.graph.node):
        found["nodes", str(k), "type"] = node.op_type
        for a in node.attribute:
            value = onnx.helper.get_attribute_value(a)
            value = numpy_helper.to_array(value) if hasattr(value, "data_type") else value
            found |= flatten(value, ("nodes", str(k), a.name))
    return found


Reader = Callable[[Path], Leaves]
BY_SUFFIX: dict[str, Reader] = {
    ".safetensors": read_safetensors,
    ".onnx": read_onnx,
    ".npz": read_numpy,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".txt": read_text,
    ".pt": read_checkpoint,
    ".ckpt": read_checkpoint,
    ".bin": read_checkpoint,
}
BY_MAGIC: dict[bytes, Reader] = {
    b"PAR1": read_parquet,
    b"SQLite format 3\0": read_sqlite,
    b"\x93NUMPY": read_numpy,
}


def read_leaves(path: Path) -> Leaves:
    """What the file holds, read by its first bytes or its ending; unknown files as bytes."""
    with open(path, "rb") as f:
        head = f.read(16)
    by_magic = next((r for magic, r in BY_MAGIC.items() if head.startswith(magic)), None)
    return (by_magic or BY_SUFFIX.get(path.suffix, read_bytes))(path)


# -- What is called otherwise in NEW, and what may differ


@dataclass(frozen=True)
class Rename:
    """The new name, and what becomes of the value: another word, or a hundredth of a number."""

    to: str
    values: dict[str, object] = field(default_factory=dict)
    divide_by: float | None = None

    @classmethod
    def read(cls, given: str | dict) -> "Rename":
        return cls(given) if isinstance(given, str) else cls(**given)

    def value(self, leaf: Leaf) -> Leaf:
        if isinstance(leaf, Array):
            flat = leaf.values.reshape(-1).tolist()
            values = objects(self.value(v) for v in flat).reshape(leaf.values.shape)
            return Array(TRANSLATED, values)
        if self.divide_by and isinstance(leaf, int | float):
            return leaf / self.divide_by
        return self.values.get(str(leaf), leaf) if self.values else leaf

    @property
    def plain(self) -> bool:
        return not self.values and not self.divide_by


@dataclass
class Allowed:
    """A place that may differ: patterns of the file (stage/path) and the field, and why."""

    file: str
    field: str
    reason: str
    matched: int = 0
    differed: int = 0


def renamed_parameters(table: Path) -> dict[str, str]:
    """`stage.old` -> `stage.new`, from the table of all renamings where the checkout has one."""
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    told = [
        (old, where.removeprefix("stage:"), new)
        for old, kind, where, new in rows
        if kind == "parameter"
    ]
    return {f"{stage}.{old}": f"{stage}.{new}" for old, stage, new in told}


Rules = dict[str, Rename]
RUN_SECTIONS = ("overrides", "sources", "instances")  # of run.json: names of instances below


@dataclass
class Map:
    """`yardstick_map.json`. Everything on a left side is a name of OLD."""

    stages: dict[str, str] = field(default_factory=dict)
    parameters: Rules = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    columns: dict[str, Rules] = field(default_factory=dict)
    metrics: dict[str, Rules] = field(default_factory=dict)
    fields: dict[str, Rules] = field(default_factory=dict)
    rows_sorted_by: dict[str, list[str]] = field(default_factory=dict)
    exceptions: list[Allowed] = field(default_factory=list)
    settings: dict[str, dict[str, object]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    seeds: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Map":
        given = json.loads(path.read_text(encoding="utf-8"))
        given.pop("about", None)

        def rules(names: dict) -> Rules:
            return {k: Rename.read(v) for k, v in names.items()}

        renamed = renamed_parameters(path.parent.parent / "nbs" / "renamed.tsv")
        given["parameters"] = rules({**renamed, **given.get("parameters", {})})
        for section in ("columns", "metrics", "fields"):
            given[section] = {k: rules(v) for k, v in given.get(section, {}).items()}
        given["exceptions"] = [Allowed(**one) for one in given.get("exceptions", [])]
        return cls(**given)

    def stage(self, name: str) -> str:
        """The name in NEW of an instance (`stage` or `stage@variant`)."""
        stage, at, variant = name.partition("@")
        return self.stages.get(name, self.stages.get(stage, stage) + at + variant)

    def parameter(self, name: str) -> Rename:
        """What `stage.parameter` is in NEW; the stage may be an instance."""
        instance, _, parameter = name.rpartition(".")
        stage = instance.partition("@")[0]
        found = self.parameters.get(name) or self.parameters.get(f"{stage}.{parameter}")
        to = found.to.rpartition(".")[2] if found else parameter
        rest = (found.values, found.divide_by) if found else ()
        return Rename(f"{self.stage(instance)}.{to}", *rest)

    def file(self, stage: str, path: str) -> str:
        """The path in NEW of a file of a stage; a renamed folder moves what is in it."""
        for start in (path, *(p.as_posix() for p in Path(path).parents)):
            for pattern, to in self.files.items():
                if matches(stage, start, pattern):
                    return to + path.removeprefix(start)
        return path

    def rules(self, stage: str, path: str, leaves: Leaves) -> Rules:
        """What the fields of a file are in NEW."""
        found: Rules = {}
        for section in (self.columns, self.fields):
            for pattern, rules in section.items():
                found |= rules if matches(stage, path, pattern) else {}
        if path == "metrics.json":
            for pattern, rules in self.metrics.items():
                found |= rules if matches(stage, path, f"{pattern}/*") else {}
        return self.own_rules(path, stage, leaves) | found

    def own_rules(self, path: str, stage: str, leaves: Leaves) -> Rules:
        """Names of stages and parameters where the pipeline itself writes them."""
        rules: Rules = {}
        if path in ("record.json", "manifest.json"):
            named = dict[str, object](self.stages)
            rules = {k: Rename(k, named) for k in ("stage", "inputs.*.*.source")}
        for at in leaves:
            if path == "manifest.json" and at[0] == "parameters" and len(at) > 1:
                new = self.parameter(f"{stage}.{at[1]}")
                to = f"parameters.{new.to.rpartition('.')[2]}"
                rules[f"parameters.{at[1]}"] = Rename(to, new.values, new.divide_by)
            if path == "run.json" and at[0] in ("overrides", "sources") and len(at) > 2:
                new = self.parameter(f"{at[1]}.{at[2]}")
                rules[".".join(at[:3])] = Rename(f"{at[0]}.{new.to}", new.values, new.divide_by)
            elif path == "run.json" and at[0] in RUN_SECTIONS and len(at) > 1:
                rules[".".join(at[:2])] = Rename(f"{at[0]}.{self.stage(at[1])}")
        return rules


@cache
def compiled(pattern: str, separator: str) -> re.Pattern[str]:
    """A pattern as a regular expression: `*` is anything in one part, `**` in any number."""
    words = {"**": ".*", "*": f"[^{re.escape(separator)}]*"}
    parts = re.split(r"(\*\*|\*)", pattern)
    return re.compile("".join(words.get(p, re.escape(p)) for p in parts), re.DOTALL)


def matches(stage: str, path: str, pattern: str) -> bool:
    """Whether `pattern` means this file, with the instance's name or the stage's."""
    names = (stage, stage.partition("@")[0])
    return any(compiled(pattern, "/").fullmatch(f"{name}/{path}") for name in names)


def rename(at: FieldPath, leaf: Leaf, rules: Rules) -> tuple[FieldPath, Leaf]:
    """Path and value in NEW. The longest rule that fits the path's beginning holds."""
    for length in range(len(at), 0, -1):
        for pattern, rule in rules.items():
            parts = pattern.split(".")
            if len(parts) != length or any(p not in ("*", a) for p, a in zip(parts, at)):
                continue
            stars = iter([a for p, a in zip(parts, at) if p == "*"])
            to = tuple(next(stars) if p == "*" else p for p in rule.to.split("."))
            return (*to, *at[length:]), leaf if rule.plain else rule.value(leaf)
    return at, leaf


# -- The comparison


@dataclass(frozen=True)
class Found:
    """What differs in a leaf: both values, the place inside it, how many values of an array."""

    old: str
    new: str
    place: str = ""
    count: int = 1


@dataclass(frozen=True)
class Difference:
    """What differs, and where."""

    stage: str
    file: str
    field: str
    found: Found


@dataclass
class Tally:
    """What was compared of one stage of one run."""

    label: str
    stage: str
    files: int = 0
    numbers: int = 0
    texts: int = 0
    differences: int = 0


ABSENT, TAKEN = "(not there)", "(its name in NEW is taken by another)"


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def size_of(leaf: Leaf) -> tuple[int, int]:
    """How many numbers and how many other values a leaf holds."""
    if not isinstance(leaf, Array):
        return (1, 0) if is_number(leaf) else (0, 1)
    if leaf.values.dtype != object:
        return leaf.values.size, 0
    numbers = sum(map(is_number, leaf.values.tolist()))
    return numbers, leaf.values.size - numbers


def brief(value: object) -> str:
    """A value as one short line."""
    if isinstance(value, Array):
        return f"{value.kind} {value.values.shape}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()[:12]}"
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unequal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which elements of two arrays of one shape differ, flat: in any bit, or as objects."""
    if a.dtype == object or b.dtype == object:
        pairs = zip(a.reshape(-1).tolist(), b.reshape(-1).tolist())
        return np.array([repr(x) != repr(y) for x, y in pairs], bool)
    bits = [np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(x.size, -1) for x in (a, b)]
    return (bits[0] != bits[1]).any(axis=1)


def difference(old: Leaf, new: Leaf) -> Found | None:
    """What differs between two leaves. A type that differs is a difference."""
    if not (isinstance(old, Array) and isinstance(new, Array)):
        same = type(old) is type(new) and repr(old) == repr(new)
        return None if same else Found(brief(old), brief(new))
    a, b = old.values, new.values
    typed = TRANSLATED in (old.kind, new.kind) or (old.kind, a.dtype) == (new.kind, b.dtype)
    if not typed or a.shape != b.shape:
        return Found(brief(old), brief(new), count=max(a.size, b.size))
    where = np.flatnonzero(unequal(a, b)) if a.size else np.array([], int)
    if not len(where):
        return None
    first = [brief(x.reshape(-1)[where[0]]) for x in (a, b)]
    return Found(*first, f"[{where[0]}]", len(where))


def sorted_rows(leaves: Leaves, by: list[str]) -> Leaves:
    """The leaves of a JSONL file with its rows in the order of the fields `by`."""
    rows: dict[str, Leaves] = {}
    for at, leaf in leaves.items():
        rows.setdefault(at[0], {})[at[1:]] = leaf
    ordered = sorted(rows.values(), key=lambda row: [str(row.get((b,))) for b in by])
    return {(str(k), *at): leaf for k, row in enumerate(ordered) for at, leaf in row.items()}


def files_below(folder: Path | None) -> dict[str, Path]:
    """Every file of a folder by its path in it. Links, locks and logs of databases are left out."""
    found: dict[str, Path] = {}
    for place, _, names in os.walk(folder) if folder else ():
        for path in (Path(place) / name for name in names):
            if not path.is_symlink() and not path.name.endswith(("-wal", "-shm", ".lock")):
                found[path.relative_to(folder).as_posix()] = path
    return found


@dataclass
class Comparison:
    """Two sides compared under a map: what was compared, what differs, what was allowed to."""

    map: Map
    tallies: list[Tally] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    seen: set[tuple[Path | None, Path | None]] = field(default_factory=set)
    known: dict[tuple[str, str], list[Allowed]] = field(default_factory=dict)

    def folders(self, label: str, stage: str, old: dict[str, Path], new: dict[str, Path]) -> None:
        """Compare files given by their paths within a stage; `stage` is its name in OLD."""
        tally = Tally(label, stage)
        self.tallies.append(tally)
        was: dict[str, str] = {}
        for name in old:
            if was.setdefault(self.map.file(stage, name), name) != name:
                self.judge(tally, name, (), Found("a file", TAKEN))
        for name in sorted({*was, *new}):
            tally.files += 1
            if name not in was:
                self.judge(tally, name, (), Found(ABSENT, "a file"))
            elif name not in new:
                self.judge(tally, was[name], (), Found("a file", ABSENT))
            else:
                self.files(tally, was[name], old[was[name]], new[name])

    def files(self, tally: Tally, name: str, old: Path, new: Path) -> None:
        """Compare two files value by value."""
        ours, theirs = read_leaves(old), read_leaves(new)
        rules, met = self.map.rules(tally.stage, name, ours), set()
        for pattern, by in self.map.rows_sorted_by.items():
            if matches(tally.stage, name, pattern):
                renamed = [rename(("0", b), None, rules)[0][1] for b in by]
                ours, theirs = sorted_rows(ours, by), sorted_rows(theirs, renamed)
        for at, leaf in ours.items():
            numbers, texts = size_of(leaf)
            tally.numbers, tally.texts = tally.numbers + numbers, tally.texts + texts
            to, leaf = rename(at, leaf, rules)
            if to in met:
                found = Found(brief(leaf), TAKEN)
            else:
                found = difference(leaf, theirs[to]) if to in theirs else Found(brief(leaf), ABSENT)
            met.add(to)
            self.judge(tally, name, at, found)
        for to in sorted(theirs.keys() - met):
            self.judge(tally, name, to, Found(ABSENT, brief(theirs[to])))

    def judge(self, tally: Tally, file: str, at: FieldPath, found: Found | None) -> None:
        """Note a difference, unless it is allowed; count what matches an exception."""
        if (tally.stage, file) not in self.known:
            fits = [e for e in self.map.exceptions if matches(tally.stage, file, e.file)]
            self.known[tally.stage, file] = fits
        dotted = ".".join(at)
        here = self.known[tally.stage, file]
        allowed = next((e for e in here if compiled(e.field, ".").fullmatch(dotted)), None)
        if allowed:
            allowed.matched += 1
            allowed.differed += found is not None
        elif found:
            tally.differences += found.count
            place = dotted + found.place
            self.differences.append(Difference(tally.label, file, place, found))

    def runs(self, label: str, old: Path | None, new: Path | None) -> None:
        """Compare two runs: every stage, and the run's own files as the stage `run`."""
        ours, theirs = stages_of(old), stages_of(new)
        was = {self.map.stage(name): name for name in ours}
        for name in sorted({*was, *theirs}):
            stage = was.get(name, name)
            pair = ours.get(stage), theirs.get(name)
            if pair in self.seen:
                continue  # a round takes over what the round before has made
            self.seen.add(pair)
            self.folders(f"{label} {stage}", stage, *map(files_below, pair))
        self.folders(f"{label} run", "run", files_below(old), files_below(new))

    def profiles(self, profile: str, old: Path, new: Path) -> None:
        """Compare two folders of runs: every round, and the databases as the stage `runs`."""
        for n, pair in enumerate(zip_longest(runs_of(old), runs_of(new)), 1):
            self.runs(f"{profile}-{n}", *pair)
        databases = [{p.name: p for p in folder.glob("*.sqlite")} for folder in (old, new)]
        self.folders(f"{profile} runs", "runs", *databases)

    def report(self) -> Iterator[str]:
        """What was compared, what differs and which exceptions were used, line by line."""
        row = "{:<28} {:>6} {:>11} {:>9} {:>11}".format

        def line(t: Tally) -> str:
            counts = (t.files, t.numbers, t.texts, t.differences)
            return row(t.label, *(f"{n:,}" for n in counts))

        yield row("stage", "files", "numbers", "texts", "differences")
        total = Tally("together", "")
        for t in self.tallies:
            yield line(t)
            for name in ("files", "numbers", "texts", "differences"):
                setattr(total, name, getattr(total, name) + getattr(t, name))
        yield line(total)
        yield from self.differing()
        yield from self.allowed()

    def differing(self) -> Iterator[str]:
        """The first differences of every file, one a line, as far as there is room."""
        total = len(self.differences)
        yield f"\n{total:,} fields or files differ" + ":" * bool(total)
        shown, of_file = 0, Counter[tuple[str, str]]()
        for d in self.differences:
            of_file[d.stage, d.file] += 1
            if shown == SHOWN or of_file[d.stage, d.file] > SHOWN_OF_A_FILE:
                continue
            shown += 1
            more = f"  ({d.found.count:,} values)" if d.found.count > 1 else ""
            yield f"  {d.stage}  {d.file}  {d.field}: {d.found.old} -> {d.found.new}{more}"
        if total > shown:
            yield f"  and {total - shown:,} more, in {len(of_file):,} files together"

    def allowed(self) -> Iterator[str]:
        """The exceptions: used ones with counts, then those that no field matched."""
        used = [e for e in self.map.exceptions if e.matched]
        yield f"\n{len(used)} exceptions used (differing of matching fields):"
        for e in used:
            yield f"  {e.differed:>6} of {e.matched:<6} {e.file}: {e.field}  ({e.reason})"
        for e in self.map.exceptions:
            if not e.matched:
                yield f"  unused: {e.file}: {e.field}"


def stages_of(run: Path | None) -> dict[str, Path]:
    """The instances of a run and their folders in the store."""
    links = [p for p in run.iterdir() if p.is_symlink() and p.is_dir()] if run else []
    return {p.name: p.resolve() for p in links}


def runs_of(runs: Path) -> list[Path]:
    """The runs of a folder, oldest first."""
    found = [f for f in runs.glob("*/run.json") if not f.parent.is_symlink()]
    whole = [f for f in found if f.parent.suffix != ".partial"]
    created = {f.parent: json.loads(f.read_text(encoding="utf-8")).get("created", 0) for f in whole}
    return sorted(created, key=lambda run: (created[run], run.name))


# -- The runs


@dataclass
class Side:
    """A checkout, and the folder that gets its runs."""

    name: str
    checkout: Path
    work: Path
    python: str
    map: Map
    seed: int | None = None

    def ini(self) -> Mapping[str, str]:
        """The checkout's settings.ini. Raises `RunError`."""
        parser = configparser.RawConfigParser()
        if not parser.read(self.checkout / "settings.ini", encoding="utf-8"):
            raise RunError(f"{self.checkout} is no checkout: it has no settings.ini.")
        return parser.defaults()

    def command(self) -> str:
        """Python code that is the console script `llmeco`. Raises `RunError`."""
        lines = self.ini().get("console_scripts", "").splitlines()
        targets = [t for name, _, t in (line.partition("=") for line in lines) if name == "llmeco"]
        if not targets:
            raise RunError(f"{self.checkout}/settings.ini names no console script llmeco.")
        module, _, function = targets[0].strip().partition(":")
        return f"from {module} import {function}; {function}()"

    def seeds(self, profile: str) -> list[str]:
        """The map's seeds but those of a stage that this checkout's profile lacks, such as a stage
        that only the new one has."""
        file = self.checkout / self.ini()["nbs_path"] / "profiles" / profile / "pipeline.yaml"
        if not file.is_file():
            return list(self.map.seeds)
        lines = file.read_text(encoding="utf-8").splitlines()
        wired = {line.strip().partition(":")[0].partition("@")[0] for line in lines}
        here = {
            name: name if self.name == "old" else self.map.parameter(name).to
            for name in self.map.seeds
        }
        return [name for name, own in here.items() if own.partition(".")[0] in wired]

    def settings(self, profile: str) -> list[str]:
        """Every parameter that is set for a profile, as `stage.name=value` in its own names."""
        given = dict(self.map.settings.get(profile, {}))
        if self.seed is not None:
            given |= dict.fromkeys(self.seeds(profile), self.seed)
        if self.name == "old":
            return [f"{name}={written(value)}" for name, value in given.items()]
        named = [(self.map.parameter(name), value) for name, value in given.items()]
        return [f"{rule.to}={written(rule.value(value))}" for rule, value in named]

    def identity(self, profile: str) -> str:
        """A hash over all that the runs of a profile follow from."""
        ini, digest = self.ini(), hashlib.sha256()
        folders = [self.checkout / ini[key] for key in ("nbs_path", "lib_path")]
        files = [f for folder in folders for f in folder.rglob("*") if f.suffix in SOURCES]
        for f in sorted({*files, self.checkout / "settings.ini"}):
            name = f.relative_to(self.checkout).as_posix()
            if not name.startswith(f"{ini['nbs_path']}/runs/"):
                digest.update(f"{name} {hashlib.sha256(f.read_bytes()).hexdigest()}\n".encode())
        told = [self.python, self.map.rounds.get(profile, 1), *self.settings(profile)]
        digest.update(json.dumps(told).encode())
        return digest.hexdigest()[:12]

    def make(self, profile: str, say: Callable[[str], None]) -> Path:
        """The folder with every round of a profile, run as far as it is not there. `RunError`."""
        folder = self.work / self.name / f"{profile}-{self.identity(profile)}"
        (folder / "home").mkdir(parents=True, exist_ok=True)
        rounds = self.map.rounds.get(profile, 1)
        for n in range(1, rounds + 1):
            mark = folder / f"round-{n}.json"
            if mark.exists():
                say(f"{self.name} {profile}-{n}: whole already, in {folder}")
                continue
            words = ["run", "--profile", profile]
            if n == 1:
                words += [word for s in self.settings(profile) for word in ("-p", s)]
            elif len(runs_of(folder / "runs")) < n:
                words.append("--next")
            began = time.monotonic()
            self.run(folder, words)
            mark.write_text(json.dumps({"seconds": round(time.monotonic() - began, 1)}))
            say(f"{self.name} {profile}-{n}: run in {time.monotonic() - began:.0f} s, in {folder}")
        made = [stages_of(run) for run in runs_of(folder / "runs")]
        if len(made) != rounds or not all(made):
            raise RunError(
                f"{self.name}: {folder}/runs holds {len(made)} runs with "
                f"{sum(map(len, made))} stages; {rounds} runs with stages are wanted."
            )
        return folder / "runs"

    def run(self, folder: Path, words: list[str]) -> None:
        """Run the command in the checkout on one processor. Raises `RunError`."""
        log = folder / "log.txt"
        with open(log, "a", encoding="utf-8") as out:
            done = subprocess.run(
                [self.python, "-c", self.command(), *words],
                cwd=self.checkout,
                env=environment(self.checkout, folder),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=one_processor,
            )
        if done.returncode:
            end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
            raise RunError(
                f"{self.name}: llmeco {' '.join(words)} ended with {done.returncode}. "
                f"The end of {log}:\n{end}"
            )


def written(value: object) -> str:
    """A parameter's value as the command line takes it."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def one_processor() -> None:
    """Keep this process and its children on one processor, so that all sums have one order."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def environment(checkout: Path, folder: Path) -> dict[str, str]:
    """Nothing of the caller's settings; a home, a folder of runs and a package of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
    return kept | {
        "HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "LLMECO_RUNS": str(folder / "runs"),
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(checkout),
    }


def measure(old: Side, new: Side, profiles: list[str], map_: Map) -> Comparison:
    """Run the profiles on both sides, where they are not whole, and compare. `RunError`."""
    comparison = Comparison(map_)
    for profile in profiles:
        made = [side.make(profile, lambda line: print(line, flush=True)) for side in (old, new)]
        comparison.profiles(profile, *made)
    return comparison


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "yardstick")
    parser.add_argument("--profiles", default="smoke,laptop")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--seed", type=int)
    told = parser.parse_args(words)
    map_, work = Map.read(MAP), told.work.resolve()
    old = Side("old", told.old.resolve(), work, told.python, map_)
    new = Side("new", told.new.resolve(), work, told.python, map_, told.seed)
    try:
        comparison = measure(old, new, told.profiles.split(","), map_)
    except RunError as e:
        print(f"yardstick: {e}", file=sys.stderr)
        return 2
    print(*comparison.report(), sep="\n")
    return 1 if comparison.differences else 0


if __name__ == "__main__":
    sys.exit(main())
