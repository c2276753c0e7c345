"""A table is looked at before anything is trained: what is asked of it is there, what is counted is
what the stage data counts, and the printed line reads the table so."""

import csv
import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from llmeco_nb.core import DataError, LlmecoError, create_record, read_json
from llmeco_nb.data.corpus import CorpusConfig, build_corpus, label_names, read_split
from llmeco_nb.data.delimited import ReadOptions
from llmeco_nb.data.inspect_questions import ask
from llmeco_nb.data.inspect_table import InspectConfig, inspect_table, plan_splits, shell_word
from llmeco_nb.data.inspect_text import inspection_json, inspection_text, visible
from llmeco_nb.data.inspection import Inspection
from llmeco_nb.data.readers import read_frame
from llmeco_nb.data.table_profile import count_columns, guess_roles
from llmeco_nb.data.table_stream import open_table
from llmeco_nb.tasks.limits import max_label_chars, max_text_chars

WORDS = [a + b for a in "ba ke li mo nu pa re so ti wu".split() for b in "dal fen gor hix".split()]


def sentence(n: int, words: int = 14) -> str:
    "A text that shares no run of five words with another."
    return " ".join(random.Random(n).choices(WORDS, k=words)) + f" {n}."


def rows_of(n: int = 60, labels=("bad", "good")) -> list[list]:
    "Texts that differ, in classes of one size."
    return [[sentence(i), labels[i % len(labels)]] for i in range(n)]


def write(file: Path, rows: list[list], columns=("text", "label")) -> Path:
    with open(file, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([list(columns), *rows])
    return file


def look(folder: Path, rows: list[list], columns=("text", "label"), **said) -> Inspection:
    return inspect_table(write(folder / "t.csv", rows, columns), InspectConfig(**said))


def codes(found: Inspection) -> set[str]:
    return {f.code for f in found.findings}


def parameters(arguments) -> dict:
    "What the stage data is given by the words of a run, those of its profile first."
    words = list(arguments)
    profile = words[words.index("-P") + 1] if "-P" in words else "laptop"
    given = dict(task="regression") if profile == "regression" else {}
    told = [w.partition("=") for before, w in zip(words, words[1:]) if before == "-p"]
    given |= {name.removeprefix("data."): value for name, _, value in told}
    return {"max_rows": None, **given}


def built(folder: Path, arguments) -> Path:
    config = CorpusConfig.of(parameters(arguments))
    return build_corpus(create_record(folder, "data"), config)


# -- each question is put where it belongs, and only there

LONG = "x" * (max_label_chars + 1)
CASES = {
    "one_class": lambda rows: [[t, "bad"] for t, _ in rows],
    "no_labels": lambda rows: [[t, str(n)] for n, (t, _) in enumerate(rows)],
    "no_texts": lambda rows: [["3", label] for _, label in rows],
    "many_classes": lambda rows: [[t, f"c{n % 1001}"] for n, (t, _) in enumerate(rows * 51)],
    "long_names": lambda rows: [[t, LONG if label == "bad" else label] for t, label in rows],
    "long_texts": lambda rows: [*rows, ["a " * max_text_chars, "bad"]],
    "rare_classes": lambda rows: [*rows, [sentence(1000), "seldom"]],
    "few_rows": lambda rows: [[t, "abcdefg"[n % 7]] for n, (t, _) in enumerate(rows[:14])],
    "null_names": lambda rows: [*rows, *([sentence(900 + i), "None"] for i in range(9))],
    "near_equal_names": lambda rows: [*rows, *([sentence(900 + i), "Bad\u200b"] for i in range(9))],
    "contradictions": lambda rows: [*rows, [rows[0][0].upper(), "good"]],
    "duplicates": lambda rows: [*rows, [rows[0][0], rows[0][1]]],
    "imbalance": lambda rows: [[t, "good" if n % 20 else "bad"] for n, (t, _) in enumerate(rows)],
    "near_duplicates": lambda rows: [*rows, [rows[0][0] + " more", rows[0][1]]],
    "blank": lambda rows: [*rows, [" ", "bad"], ["<br />", "bad"], ["said", ""]],
    "markup": lambda rows: [["It&#x27;s <b>so</b> " + t, label] for t, label in rows],
}


@pytest.mark.parametrize("code", CASES)
def test_a_question_is_put_where_it_belongs(code, tmp_path):
    plain = rows_of()
    assert codes(look(tmp_path, plain)) == {"small_test"}
    found = look(tmp_path, CASES[code](plain))
    assert code in codes(found)
    assert all(f.message and f.level in ("stop", "warning", "note") for f in found.findings)


COLUMNS = {
    "other_labels": ("topic", lambda n: "abc"[n % 3]),
    "groups": ("author", lambda n: f"person{n % 9}"),
}


@pytest.mark.parametrize("code", COLUMNS)
def test_a_third_column_is_asked_about(code, tmp_path):
    name, value = COLUMNS[code]
    rows = [[t, label, value(n)] for n, (t, label) in enumerate(rows_of())]
    assert code in codes(look(tmp_path, rows, ("text", "label", name)))
    assert code not in codes(look(tmp_path, [r[:2] for r in rows]))


def test_a_large_test_set_raises_no_question(tmp_path):
    "320 rows tell 5 points apart, so 1,700 rows of which a fifth is tested do."
    found = look(tmp_path, rows_of(1700))
    assert codes(found) == set() and found.detectable < 5
    assert found.splits["test"] == 340


def test_a_test_set_is_compared(tmp_path):
    rows = rows_of(80)
    test = write(
        tmp_path / "test.csv", [*rows[:4], *([sentence(500 + i), "bad"] for i in range(9))]
    )
    found = look(tmp_path, rows, test_source=str(test))
    assert found.counts.leaks == 4 and "test_overlap" in codes(found)
    assert found.official[0].rows == 13 and found.splits["test"] == 13
    apart = write(tmp_path / "test.csv", [[sentence(500 + i), "bad"] for i in range(9)])
    assert "test_overlap" not in codes(look(tmp_path, rows, test_source=str(apart)))
    strange = write(tmp_path / "test.csv", [[sentence(500), "worse"], [sentence(501), "bad"]])
    found = look(tmp_path, rows, test_source=str(strange))
    assert found.official[0].unknown == ("worse",) and found.findings[0].code == "unknown_classes"
    assert not found.command


def test_a_column_of_splits_is_kept_to(tmp_path):
    splits = ["train"] * 6 + ["dev", "test", "unsup"]
    rows = [[t, label, splits[n % 9]] for n, (t, label) in enumerate(rows_of(90, "abc"))]
    rows.append([rows[0][0], "a", "test"])
    found = look(tmp_path, rows, ("text", "label", "split"))
    assert (found.rows, found.counts.read, found.unlabelled) == (91, 60, 10)
    assert {s.split: s.usable for s in found.official} == {"validation": 10, "test": 11}
    assert found.counts.leaks == 1 and found.splits == {"train": 59, "validation": 10, "test": 11}
    built(tmp_path / "record", found.arguments)
    metrics = read_json(tmp_path / "record" / "metrics.json")
    assert found.splits == {s: metrics[s] for s in found.splits} and metrics["leaks"] == 1
    named = look(tmp_path, rows, ("text", "label", "fold"))
    assert named.official == () and "data.split_column=fold" in str(named.findings)


def test_numbers_are_a_regression(tmp_path):
    rows = [[sentence(i), f"{i / 7:.2f}"] for i in range(80)]
    found = look(tmp_path, rows, ("said", "price"))
    assert found.task == "regression" and found.arguments[1:3] == ("-P", "regression")
    corpus = built(tmp_path / "record", found.arguments)
    assert read_split(corpus, "test").target.dtype == float
    assert "no_numbers" not in codes(found)
    rows[3][1] = "much"
    found = look(tmp_path, rows, ("said", "price"))
    assert found.counts.no_numbers == 1 and "no_numbers" in codes(found) and not found.command


def test_the_most_serious_comes_first(tmp_path):
    rows = [*rows_of(), ["<br />", "bad"], *([sentence(800 + i), "nan"] for i in range(9))]
    rows.append([sentence(1000), "seldom"])
    levels = [f.level for f in look(tmp_path, rows).findings]
    assert levels == sorted(levels, key=["stop", "warning", "note"].index)
    assert {"stop", "warning", "note"} == set(levels)


# -- what is counted is what the stage data counts


def mixed() -> list[list]:
    "Duplicates, contradictions, blanks, markup, classes written as numbers."
    rows = rows_of(90, ("1", "2.0", "3"))
    rows += [[rows[0][0].upper(), "1.0"], [f" {rows[1][0]}\n", "3"], [rows[2][0], "3"]]
    rows += [["", "1"], ["said", " "], ["<p> </p>", "2"], [f"<b>{rows[5][0]}</b>", "3"]]
    return rows + [["Caf\xc3\xa9 &amp; bar at the corner", "1"]]


def test_counts_are_those_of_the_stage_data(tmp_path):
    test = write(tmp_path / "test.csv", [*rows_of(90, ("1", "2", "3"))[40:50], ["new one", "2"]])
    for test_source in ("", str(test)):
        found = look(tmp_path, mixed(), test_source=test_source)
        folder = tmp_path / f"record{bool(test_source)}"
        corpus = built(folder, found.arguments)
        metrics = read_json(folder / "metrics.json")
        for name in ("null_texts", "null_labels", "empty", "duplicates", "conflicts", "usable"):
            assert metrics[name] == getattr(found.counts, name), name
        assert metrics["read"] == found.rows and metrics["leaks"] == found.counts.leaks
        assert sorted(label_names(corpus)) == sorted(c.name for c in found.classes)
        for step, texts in found.changed.items():
            assert metrics[f"changed_{step}"] == texts
        assert found.splits == {s: metrics[s] for s in ("train", "validation", "test")}


def test_examples_of_contradictions_name_rows_and_classes(tmp_path):
    rows = [*rows_of(), ["the SAME text twice", "bad"], ["The same  text twice", "good"]]
    one = look(tmp_path, rows).contradictions[0]
    assert one.rows == (61, 62) and one.labels == ("bad", "good") and "same text" in one.text


def test_a_declared_class_has_its_name(tmp_path):
    table = pa.table(
        {"text": [sentence(i) for i in range(60)], "label": [i % 2 for i in range(60)]}
    )
    feature = {"names": ["1.0", "no"], "_type": "ClassLabel"}
    info = json.dumps({"info": {"features": {"label": feature}}})
    file = tmp_path / "t.parquet"
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), file)
    found = inspect_table(file)
    assert {c.name for c in found.classes} == {"1.0", "no"}
    assert set(label_names(built(tmp_path / "record", found.arguments))) == {"1.0", "no"}


# -- what the file is


def test_the_file_is_described(tmp_path):
    (tmp_path / "t.csv").write_text("sep=;\nbody;team\n" + "a, b;x\nc, d;y\n" * 30)
    facts = inspect_table(tmp_path / "t.csv").file
    assert (facts.kind, facts.separator, facts.columns) == ("CSV", ";", ("body", "team"))
    data = "text,label\nété,a\n".encode("cp1252")
    (tmp_path / "l.csv").write_bytes(data)
    with pytest.raises(DataError, match="encoding"):
        inspect_table(tmp_path / "l.csv")
    options = ReadOptions(encoding="cp1252")
    table = open_table(tmp_path / "l.csv", options)
    assert table.facts.encoding == "cp1252" and next(table.rows()) == ["été", "a"]


@pytest.mark.parametrize(
    "said", ["[]", "no JSON", '{"info": []}', '{"info": {"features": {"label": {"names": "ab"}}}}']
)
def test_metadata_of_another_program_declare_no_classes(said, tmp_path):
    table = pa.table({"text": ["a", "b"], "label": [0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": said}), tmp_path / "t.parquet")
    assert open_table(tmp_path / "t.parquet").declared == {}
    assert read_frame(tmp_path / "t.parquet")[1] == {}


def test_named_columns_tell_two_separators_apart(tmp_path):
    rows = "".join(f"{sentence(i)};{'ab'[i % 2]};3,5\n" for i in range(40))
    for name in ("t.csv", "test.csv"):
        (tmp_path / name).write_text("text;label;price, (EUR)\n" + rows)
    with pytest.raises(DataError, match="more than one sign"):
        inspect_table(tmp_path / "t.csv")
    said = dict(text_column="text", label_column="label")
    found = inspect_table(tmp_path / "t.csv", InspectConfig(**said))
    assert found.file.separator == ";" and found.counts.usable == 40
    assert set(label_names(built(tmp_path / "record", found.arguments))) == {"a", "b"}
    said["test_source"] = str(tmp_path / "test.csv")
    assert inspect_table(tmp_path / "t.csv", InspectConfig(**said)).official[0].usable == 40


def test_words_are_counted_by_script_and_footers_are_named(tmp_path):
    thai = "\u0e1c\u0e21\u0e0a\u0e2d\u0e1a\u0e2b\u0e19\u0e31\u0e07 "  # one stretch of several words
    found = look(tmp_path, [[thai * 3 + str(i), "ab"[i % 2]] for i in range(40)])
    assert found.words.median > 6 and list(found.scripts) == ["Thai"] and found.english is None
    footer = " This message is meant for the person it is addressed to and nobody else."
    found = look(tmp_path, [[t + footer, label] for t, label in rows_of()])
    assert found.near.pairs == 0 and found.near.boilerplate == 1
    assert "100% of the texts hold words" in inspection_text(found)
    assert look(tmp_path, rows_of()).near.boilerplate == 0


def test_what_was_said_goes_into_the_line(tmp_path):
    lines = [
        "said;verdict",
        *(f"{sentence(i)};{'NA' if i > 70 else 'yn'[i % 2]}" for i in range(80)),
    ]
    (tmp_path / "t.csv").write_bytes("\n".join(lines).encode("utf-16"))
    options = ReadOptions(separator=";", nulls=("NA", "missing"))
    found = inspect_table(tmp_path / "t.csv", InspectConfig(options=options))
    assert found.counts.null_labels == 9 and "null_names" not in codes(found)
    assert "data.nulls=NA,missing" in found.arguments
    assert set(label_names(built(tmp_path / "record", found.arguments))) == {"y", "n"}


@pytest.mark.parametrize(
    "rows, text, label",
    [
        ([[str(i), sentence(i), "xy"[i % 2]] for i in range(50)], 1, 2),
        ([["pn"[i % 2], sentence(i), f"2024-01-{1 + i % 28:02}"] for i in range(50)], 1, 0),
        ([[f"u{i}", "short", sentence(i), str(1 + i % 5)] for i in range(50)], 2, 3),
    ],
)
def test_roles_are_guessed_from_cells_alone(rows, text, label):
    columns = [f"c{n}" for n in range(len(rows[0]))]
    roles = guess_roles(count_columns(columns, rows), "t.csv")
    assert (roles.text, roles.label) == (columns[text], columns[label])


def test_a_column_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="Did you mean `label`"):
        look(tmp_path, rows_of(), label_column="lable")


# -- the line to type

ODD_NAMES = [
    "a'b",
    'say "it"',
    "tab\there",
    "dollar$HOME`ls`",
    "zero\u200bwidth",
    "new\nline 1",
    "\\n",
]


def by_a_shell(command: str) -> list[str]:
    "The words that bash makes of a line."
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True
    )
    return done.stdout.decode().split("\0")[:-1]


def test_a_shell_reads_the_line_as_it_is_meant(tmp_path):
    folder = tmp_path / "my tables (1) & more"
    folder.mkdir()
    for n, name in enumerate(ODD_NAMES):
        rows = [[t, label] for t, label in rows_of()]
        file = write(folder / f"it's {n}.csv", rows, (name, "label"))
        found = inspect_table(file, InspectConfig(text_column=name))
        assert by_a_shell(found.command) == ["llmeco", *found.arguments]
        printed = inspection_text(found).rpartition("To run it\n")[2]
        assert by_a_shell(printed) == ["llmeco", *found.arguments]
        assert len(label_names(built(tmp_path / f"record{n}", found.arguments))) == 2


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12))
@settings(max_examples=30, deadline=None)
@example("\x1b[31m")
@example("a\n1")
def test_any_word_survives_a_shell(word):
    assert by_a_shell(shell_word(word)) == [word]


# -- arbitrary input

ENDINGS = [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt", ".csv.gz"]


@given(st.binary(max_size=200), st.sampled_from(ENDINGS))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(b"text,label\n", ".csv")
@example(b"[" * 3000, ".json")
@example(b'{"a":' * 3000, ".jsonl")
@example(b"\xff\xfea", ".csv")
@example(b'{"text": "a", "label": "\\ud800"}\n', ".jsonl")
@example(b"PK\x03\x04", ".csv")
def test_arbitrary_bytes_raise_only_our_errors(tmp_path, data, ending):
    file = tmp_path / f"t{ending}"
    file.write_bytes(data)
    try:
        found = inspect_table(file)
    except LlmecoError:
        return
    assert inspection_text(found) and json.loads(inspection_json(found))


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
tables = st.lists(
    st.tuples(cells, st.sampled_from(["a", "b", "a ", "2", "2.0", "", "nan", "\u200b"]) | cells),
    min_size=8,
    max_size=40,
)


@given(tables, st.lists(cells, min_size=2, max_size=2, unique=True))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([(f"text {i}", "ab"[i % 2]) for i in range(30)], ["text", "label"])
@example([(f"text {i}", "x" if i % 9 else "y") for i in range(30)], ["text", "label"])
def test_the_line_reads_any_table_to_the_classes_that_were_counted(tmp_path_factory, rows, columns):
    folder = tmp_path_factory.mktemp("table")
    file = write(folder / "t.csv", [[*row] for row in rows], columns)
    try:
        said = InspectConfig(text_column=columns[0], label_column=columns[1])
        found = inspect_table(file, said)
    except LlmecoError:
        return
    text = inspection_text(found)
    assert {c for c in text if not c.isprintable()} <= {"\n"}
    shown = text.partition("To run it")[0].splitlines()[1:]
    assert max(map(cell_len, shown)) <= 96
    if not found.command:
        assert any(f.level == "stop" for f in found.findings)
        return
    kept = {c.name for c in found.classes} - set(found.rare)
    assert set(label_names(built(folder / "record", found.arguments))) == kept


def test_a_plan_leaves_every_class_a_row_to_train_on():
    splits, rare = plan_splits({0: 3, 1: 3, 2: 200})
    assert not rare and sum(splits.values()) == 206
    assert sum(plan_splits({c: 3 for c in range(7)})[0].values()) == 21
    assert plan_splits({c: 2 for c in range(7)}) == ({}, list(range(7)))


# -- what is shown


def test_what_users_wrote_is_shown_as_text(tmp_path):
    rows = [
        [sentence(i), ("\x1b[2Jred", "zero\u200bwidth", "two\nlines")[i % 3]] for i in range(60)
    ]
    found = look(tmp_path, rows)
    shown = inspection_text(found)
    assert "\\x1b[2Jred" in shown and "zero\\u200bwidth" in shown and "two\\nlines" in shown
    assert shown.isascii() or not set(shown) & {"\x1b", "\u200b"}
    assert inspection_json(found).isascii()
    assert json.loads(inspection_json(found))["classes"][0]["name"] in {label for _, label in rows}
    assert visible("\u202eabc\x00") == "\\u202eabc\\x00"


@pytest.mark.parametrize("width", [80, 100])
def test_an_inspection_fits_its_width(width, tmp_path):
    labels = ("映画館映画館映画館" * 12, "b" * 99, "c d " * 20)
    rows = [["映画" * 40 + str(i), labels[i % 3], f"p{i % 8}"] for i in range(60)]
    shown = inspection_text(look(tmp_path, rows, ("text", "label", "author" * 9)), width)
    body = shown.rpartition("To run it")[0].split("\n", 1)[1]
    assert max(map(cell_len, body.splitlines())) <= width


def llmeco(*words, **environment) -> subprocess.CompletedProcess:
    code = "import sys; sys.argv[0] = 'llmeco'; from llmeco_nb.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_prints_and_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path / "runs"))
    file = write(
        tmp_path / "t.csv", [[i, *row] for i, row in enumerate(rows_of())], "no a b".split()
    )
    done = llmeco("inspect", str(file), "--label", "b")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.index("Questions") < done.stdout.index("Classes (2)")
    assert "llmeco run --new-run" in done.stdout.splitlines()[-4:][0] + done.stdout[-400:]
    told = json.loads(llmeco("inspect", str(file), "--json").stdout)
    assert told["text_column"] == "a" and told["counts"]["usable"] == 60
    (tmp_path / "p.csv").write_text("<!doctype html><title>Sign in</title>")
    done = llmeco("inspect", str(tmp_path / "p.csv"))
    assert done.returncode == 4 and "web page" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


# -- size


@pytest.mark.slow
def test_memory_grows_by_bytes_a_row(tmp_path):
    "The table itself is never held: 12,000 more rows of a kilobyte take 60 bytes each at most."

    def peak(n: int) -> int:
        rows = ([sentence(i, 150), "ab"[i % 2]] for i in range(n))
        file = write(tmp_path / f"{n}.csv", rows)
        tracemalloc.start()
        inspect_table(file, scan=1000)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    inspect_table(write(tmp_path / "warm.csv", rows_of()))  # what is imported at first use
    small, large = peak(8_000), peak(20_000)
    # a remembered first row takes 250 bytes, for at most 100,000 rows
    assert large - small < 12_000 * (60 + 250)


# -- limits hold from the first stage to the server


def test_a_text_or_name_that_no_server_takes_is_refused_by_the_first_stage(tmp_path):
    cases = {
        f"at most {max_label_chars}": [[t, LONG if n == "bad" else n] for t, n in rows_of()],
        f"at most {max_text_chars:,}": [*rows_of(), ["x" * (max_text_chars + 1), "bad"]],
    }
    for limit, rows in cases.items():
        source = str(write(tmp_path / "t.csv", rows))
        with pytest.raises(DataError, match=limit):
            build_corpus(create_record(tmp_path / limit, "data"), CorpusConfig(source=source))


@pytest.mark.slow
def test_a_text_of_the_limit_goes_to_the_server(tmp_path):
    "Table, corpus, linear model, bundle, answer: the longest name, texts of over 20,000 signs."
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from llmeco_nb.deployment.manifest import write_manifest
    from llmeco_nb.deployment.packing import pack_linear
    from llmeco_nb.deployment.server import make_app
    from llmeco_nb.evaluation.comparison import EvaluationConfig, evaluate_models
    from llmeco_nb.interaction.client import Client, running_server
    from llmeco_nb.interaction.feedback import find_mistakes
    from llmeco_nb.tasks.registry import load_schema

    name = "y" * max_label_chars
    rows = [
        [f"{t} {'no' if n == 'bad' else 'yes'}", name if n == "bad" else n] for t, n in rows_of()
    ]
    longest = (sentence(7000, 40_000) + " no")[-max_text_chars:]
    rows += [[longest, name], [longest[150_000:], "good"]]
    source = str(write(tmp_path / "t.csv", rows))
    record = create_record(tmp_path / "data", "data")
    corpus = build_corpus(record, CorpusConfig(source=source, max_rows=None))
    record = create_record(tmp_path / "evaluate", "evaluate")
    config = EvaluationConfig(num_labeled=[0], learning_curve=[], models=["majority", "nbsvm"])
    evaluate_models(record, str(corpus), config=config)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    model = next(record.artifact("baselines").glob("nbsvm-*"))
    write_manifest(bundle, pack_linear(model, bundle, "long", load_schema(corpus)))
    with TestClient(make_app(bundle, tmp_path / "f.sqlite")) as client:
        reply = client.post("/v1/predict", json={"text": longest})
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        assert set(answer["answers"][0]["probabilities"]) == {name, "good"}
        told = dict(request_id=answer["request_id"], item=0, label=name)
        assert client.post("/v1/feedback", json=told).status_code == 200
        escaped = json.dumps({"text": "\U0001f600" * max_text_chars})
        sent = {"Content-Type": "application/json"}
        reply = client.post("/v1/predict", content=escaped, headers=sent)
        assert reply.status_code == 200, reply.text[:200]
    # eight of them are more than one request may hold
    asked = pd.DataFrame({"text": ["\u20ac" * max_text_chars] * 8, "label": 0})
    names, record = load_schema(corpus).labels, create_record(tmp_path / "m", "m")
    with running_server(bundle, tmp_path / "g.sqlite") as address:
        mistakes, searched = find_mistakes(Client(address), asked, names, 9, record)
    assert searched == 8 and len(mistakes) in (0, 8)


def test_every_finding_is_asked_once(tmp_path):
    found = look(tmp_path, mixed())
    assert len({f.code for f in found.findings}) == len(found.findings) and ask(found)
