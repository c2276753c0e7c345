"""A database of an earlier program is brought to today's tables: all rows are there, it is done
once whoever comes, and who is killed leaves the old one or the new one."""

import importlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("alembic", reason="the database needs the extra `serve`")
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, event, inspect, text
from sqlalchemy.exc import DBAPIError

from llmeco_nb.core import UsageError, WriteError
from llmeco_nb.deployment.generation_log import read_rated_generations
from llmeco_nb.deployment.ledger import Ledger, connect, keep_feedback, read_feedback, schema
from llmeco_nb.deployment.schema_versions import head, read_revision, revision_scripts
from llmeco_nb.tasks.registry import find_task
from llmeco_nb.tasks.regression import NumberPrediction
from llmeco_nb.tasks.text_classification import ClassPrediction

ROOT = Path(__file__).resolve().parent.parent

# as the program before the first numbered revision made them
OLD_TABLES = """
CREATE TABLE audit (
    number INTEGER NOT NULL, at FLOAT NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
    target TEXT NOT NULL, detail TEXT NOT NULL, mac VARCHAR(64) NOT NULL, PRIMARY KEY (number));
CREATE TABLE deployments (
    revision INTEGER NOT NULL, at FLOAT NOT NULL, actor TEXT NOT NULL, reason TEXT NOT NULL,
    champion VARCHAR(64) NOT NULL, canary VARCHAR(64), canary_share FLOAT NOT NULL,
    shadow VARCHAR(64), PRIMARY KEY (revision));
CREATE TABLE feedback (
    request_id VARCHAR(64) NOT NULL, item INTEGER NOT NULL, "key" VARCHAR(200) NOT NULL,
    at FLOAT NOT NULL, author TEXT NOT NULL, given TEXT, correct BOOLEAN NOT NULL,
    note TEXT NOT NULL, PRIMARY KEY (request_id, item, "key"));
CREATE INDEX feedback_at ON feedback (at);
CREATE TABLE generations (
    request_id VARCHAR(64) NOT NULL, at FLOAT NOT NULL, model VARCHAR(64) NOT NULL,
    prompt TEXT NOT NULL, text TEXT NOT NULL, finish_reason VARCHAR(10) NOT NULL,
    prompt_tokens INTEGER NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (request_id));
CREATE INDEX generations_at ON generations (at);
CREATE TABLE keys (
    id VARCHAR(16) NOT NULL, digest VARCHAR(64) NOT NULL, name VARCHAR(100) NOT NULL,
    role VARCHAR(20) NOT NULL, models TEXT NOT NULL, created FLOAT NOT NULL, expires FLOAT,
    revoked FLOAT, requests_per_minute INTEGER, tokens_per_day INTEGER, PRIMARY KEY (id),
    UNIQUE (digest));
CREATE TABLE models (
    digest VARCHAR(64) NOT NULL, name VARCHAR(200) NOT NULL, version INTEGER NOT NULL,
    task VARCHAR(64) NOT NULL, folder TEXT NOT NULL, added FLOAT NOT NULL, PRIMARY KEY (digest),
    UNIQUE (name, version));
CREATE TABLE predictions (
    request_id VARCHAR(64) NOT NULL, item INTEGER NOT NULL, at FLOAT NOT NULL,
    model VARCHAR(64) NOT NULL, text TEXT NOT NULL, label TEXT NOT NULL,
    probabilities TEXT NOT NULL, PRIMARY KEY (request_id, item));
CREATE INDEX predictions_at ON predictions (at);
CREATE TABLE usage (
    key_id VARCHAR(16) NOT NULL, day VARCHAR(10) NOT NULL, requests INTEGER NOT NULL,
    tokens INTEGER NOT NULL, PRIMARY KEY (key_id, day))
"""
LIKELY = json.dumps({"negative": 0.4, 'ğ "quoted" \\': 0.6})
ODD = 'ğ "quoted" \\'
MODEL = "0" * 64
OLD_ROWS = {
    "predictions": [
        ("r1", 0, 1.5, MODEL, "Oh, 'great'.\nReally? 100%", ODD, LIKELY),
        ("r1", 1, 1.5, MODEL, "I laughed :smile", "negative", LIKELY),
        ("n1", 0, 2.5, MODEL, "Oh, great.", "3.25", "null"),
        ("n2", 0, 2.5, MODEL, "tiny", "-1e-07", "null"),
    ],
    "feedback": [
        ("r1", 0, "ann", 3.0, "ann", "negative", False, "no 'way'"),
        ("r1", 0, "bob", 4.0, "bob", ODD, True, ""),
        ("r1", 1, "", 5.0, "", None, False, "wrong"),
        ("n1", 0, "ann", 6.0, "ann", "4.0", False, ""),
        ("n1", 0, "bo", 7.0, "bo", None, False, ""),
        ("g1", 0, "ann", 8.0, "ann", 'Rain "falls".', False, ""),
        ("gone", 0, "ann", 9.0, "ann", "positive", False, "of an answer that is deleted"),
    ],
    "generations": [("g1", 2.0, MODEL, '[["user", "Why?"]]', "Rains.", "stop", 3, 2)],
    "keys": [("k", "d" * 64, "ann", "user", "[]", 1.0, None, None, 60, None)],
    "usage": [("k", "2026-11-29", 3, 40)],
    "audit": [(1, 1.0, "a", "add key", "ann", "{}", "m" * 64)],
    "models": [(MODEL, "one", 1, "regression", "/tmp/one", 1.0)],
    "deployments": [(1, 1.0, "a", "first", MODEL, None, 0.0, None)],
}
SAID = {  # request, item and key -> task, predicted, given
    ("r1", 0, "ann"): ("text-classification", ODD, "negative"),
    ("r1", 0, "bob"): ("text-classification", ODD, ODD),
    ("r1", 1, ""): ("text-classification", "negative", None),
    ("n1", 0, "ann"): ("regression", 3.25, 4.0),
    ("n1", 0, "bo"): ("regression", 3.25, None),
}


def make_old(file: Path, leave_out: tuple[str, ...] = ()) -> Path:
    "An SQLite database of that time, some of its tables left out."
    with sqlite3.connect(file) as c:
        c.execute("PRAGMA journal_mode=WAL")
        c.executescript(OLD_TABLES)
        for name, rows in OLD_ROWS.items():
            marks = ", ".join("?" * len(rows[0]))
            c.executemany(f"INSERT INTO {name} VALUES ({marks})", rows)
        for name in leave_out:
            c.execute(f"DROP TABLE {name}")
    c.close()
    return file


def dump(file: Path) -> dict[str, list]:
    "All that an SQLite database holds: table -> rows."
    with sqlite3.connect(file) as c:
        names = [r[0] for r in c.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = {name: sorted(map(repr, c.execute(f"SELECT * FROM {name}"))) for name in names}
    c.close()
    return found


def copies(file: Path) -> list[Path]:
    return sorted(file.parent.glob(f"{file.name}.*"))


def check_upgraded(where: str | Path) -> None:
    "The database is of the newest revision and says all that the old one said."
    found = {(r.request_id, r.item, r.key): r for r in read_feedback(where)}
    assert {name: (r.task, r.predicted, r.given) for name, r in found.items()} == SAID
    assert [r.at for r in found.values()] == [3.0, 4.0, 5.0, 6.0, 7.0]
    assert found["r1", 0, "ann"].note == "no 'way'"
    assert found["r1", 0, "ann"].text == OLD_ROWS["predictions"][0][4]
    engine = connect(where)
    with engine.connect() as c:
        assert read_revision(c) == head
        assert compare_metadata(MigrationContext.configure(c), every_table()) == []
        rows = c.execute(text("SELECT request_id, item, task, answer FROM predictions")).all()
        orphan = "SELECT task, correction, note FROM feedback WHERE request_id = 'gone'"
        assert c.execute(text(orphan)).all() == [("", '"positive"', "of an answer that is deleted")]
    engine.dispose()
    answers = {(r.request_id, r.item): find_task(r.task).from_stored(r.answer) for r in rows}
    likely = json.loads(LIKELY)
    assert answers == {
        ("r1", 0): ClassPrediction(label=ODD, probabilities=likely),
        ("r1", 1): ClassPrediction(label="negative", probabilities=likely),
        ("n1", 0): NumberPrediction(value=3.25),
        ("n2", 0): NumberPrediction(value=-1e-07),
    }
    assert list(answers["r1", 0].probabilities) == list(likely), "in their order"


def every_table():
    "The tables that the chapters declare."
    for file in sorted((ROOT / "llmeco_nb" / "deployment").glob("*.py")):
        if " = Table(\n" in file.read_text(encoding="utf-8"):
            importlib.import_module(f"llmeco_nb.deployment.{file.stem}")
    assert len(schema.tables) >= 10
    return schema


def test_the_revisions_make_the_tables_that_the_chapters_declare(tmp_path):
    engine = connect(tmp_path / "new.sqlite")
    with engine.connect() as c:
        options = dict(compare_type=True, compare_server_default=True)
        context = MigrationContext.configure(c, opts=options)
        assert compare_metadata(context, every_table()) == []
        tables = inspect(c)
        for table in schema.sorted_tables:  # alembic does not look at primary keys
            keys = tables.get_pk_constraint(table.name)["constrained_columns"]
            assert keys == [column.name for column in table.primary_key]
    engine.dispose()
    assert not copies(tmp_path / "new.sqlite"), "nothing was there to copy"


def test_an_old_database_is_read_in_full_and_a_copy_of_it_is_kept(tmp_path, caplog):
    file = make_old(tmp_path / "old.sqlite")
    file.chmod(0o640)
    before = dump(file)
    check_upgraded(file)
    after = dump(file)
    same = set(before) - {"predictions", "feedback"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert {name: len(rows) for name, rows in before.items()} == {
        name: len(rows) for name, rows in after.items() if name in OLD_ROWS
    }
    new = {"alembic_version", "unmatched_feedback", "secrets", "usage_marks"}
    assert after.keys() - before.keys() == new
    [judged] = read_rated_generations(file)
    assert (judged.better, judged.text, judged.correct) == ('Rain "falls".', "Rains.", False)
    [copy] = copies(file)
    assert copy.name == "old.sqlite.revision-0001" and dump(copy) == before
    assert copy.stat().st_mode & 0o777 == 0o640
    assert "from revision 0001" in caplog.text and str(copy) in caplog.text
    # the copy is a whole database: it can take the place of the other, and is changed in its turn
    shutil.copy(copy, tmp_path / "again.sqlite")
    check_upgraded(tmp_path / "again.sqlite")


def test_what_was_said_before_is_known_to_be_a_repetition(tmp_path):
    ledger = Ledger(make_old(tmp_path / "old.sqlite"))
    again = keep_feedback(ledger, "r1", 0, "negative", author="ann", note="no 'way'").result()
    assert not again.stored and again.predicted == ODD
    assert not keep_feedback(ledger, "r1", 0, ODD, author="bob").result().stored
    assert not keep_feedback(ledger, "n1", 0, 4, author="ann").result().stored
    assert keep_feedback(ledger, "n2", 0, correct=True).result().given == -1e-07
    with pytest.raises(UsageError, match="not a label"):
        keep_feedback(ledger, "r1", 0, "4.0", author="eve").result()
    ledger.close()


@pytest.mark.parametrize(
    "absent",
    [("generations",), ("audit", "models", "deployments"), ("keys", "usage", "audit", "models")],
)
def test_a_database_from_before_some_tables(absent, tmp_path):
    file = make_old(tmp_path / "old.sqlite", absent)
    with sqlite3.connect(file) as c:
        c.execute("DROP INDEX predictions_at")  # it came later than its table
        if "generations" in absent:
            c.execute("DELETE FROM feedback WHERE request_id = 'g1'")
    c.close()
    check_upgraded(file)
    assert {name: len(dump(file)[name]) for name in absent} == dict.fromkeys(absent, 0)


def test_a_database_of_a_newer_program_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "new.sqlite"
    connect(file).dispose()
    with sqlite3.connect(file) as c:
        c.execute("UPDATE alembic_version SET version_num = '0977'")
        c.execute("ALTER TABLE feedback ADD COLUMN stars INTEGER")
    c.close()
    before = dump(file)
    with pytest.raises(WriteError, match=f"revision 0977.*up to {head}.*newer llmeco"):
        read_feedback(file)
    assert dump(file) == before and not copies(file)


def test_tables_of_something_else_are_refused_and_left_alone(tmp_path):
    file = make_old(tmp_path / "other.sqlite")
    with sqlite3.connect(file) as c:
        c.execute("ALTER TABLE predictions RENAME COLUMN label TO verdict")
    c.close()
    before = dump(file)
    with pytest.raises(WriteError, match="table predictions has no column label"):
        connect(file)
    assert dump(file) == before and not copies(file)


def test_a_database_of_any_revision_gets_what_it_lacks(tmp_path):
    "As it is left by a program that knew the revisions up to there."
    scripts = revision_scripts()
    numbers = [one.revision for one in scripts.walk_revisions()][::-1]
    for number in numbers[:-1]:
        file = make_old(tmp_path / f"{number}.sqlite")
        options = dict(isolation_level=None)
        engine = create_engine(f"sqlite:///{file}", connect_args=options)
        with engine.begin() as c:
            context = MigrationContext.configure(c)
            with Operations.context(context):
                for one in [*scripts.walk_revisions()][::-1][: int(number)]:
                    one.module.upgrade()
                    context.stamp(scripts, one.revision)
        engine.dispose()
        before = dump(file)
        check_upgraded(file)
        after = dump(file)
        [copy] = copies(file)
        assert copy.name.endswith(f".revision-{number}") and dump(copy) == before
        assert len(after["secrets"]) == 1 and after["unmatched_feedback"] == []
        assert after["usage"] == before["usage"] and after["usage_marks"] == []
        check_upgraded(file)
        assert dump(file)["secrets"] == after["secrets"], "ids told before are known"


NO_ROOM = """
import resource, signal, sys
from llmeco_nb.core import WriteError
from llmeco_nb.deployment.ledger import connect
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    connect(sys.argv[1])
except WriteError as e:
    print(e)
"""


def test_without_room_for_the_copy_nothing_changes(tmp_path):
    file = make_old(tmp_path / "old.sqlite")
    before = dump(file)
    line = [sys.executable, "-c", NO_ROOM, str(file), str(file.stat().st_size // 2)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert "cannot be opened" in done.stdout, done.stdout + done.stderr
    assert dump(file) == before and not copies(file)
    check_upgraded(file)


READ = """
import sys
from sqlalchemy import Engine, event
asked = []
event.listen(Engine, "before_cursor_execute", lambda *a: asked.append(a[2]))
from llmeco_nb.deployment.ledger import connect
connect(sys.argv[1])
print(asked, "alembic" in sys.modules)
"""


def test_a_database_of_today_costs_one_question_and_no_alembic(tmp_path):
    connect(tmp_path / "new.sqlite").dispose()
    line = [sys.executable, "-c", READ, str(tmp_path / "new.sqlite")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['SELECT version_num FROM alembic_version'] False\n", done.stderr


# -- killed, and two at once: one program forks the processes, so that each starts at once

FORK = """
import os, signal, sys, time
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, event
from llmeco_nb.deployment.ledger import connect

def die(): os.kill(os.getpid(), signal.SIGKILL)

def killed_at(where, number):
    "A child dies before its statement of this number, or at the commit if there are fewer."
    asked = []
    def count(*a):
        asked.append(1)
        if len(asked) == number: die()
    event.listen(Engine, "before_cursor_execute", count)
    event.listen(Engine, "commit", lambda c: die())
    connect(where)

def killed_after(where, seconds):
    import threading
    threading.Timer(seconds, die).start()
    connect(where)
    die()

def at(where, moment):
    "A child opens the database at a moment."
    time.sleep(max(0, moment - time.time()))
    connect(where)

def fork(call, *args):
    child = os.fork()
    if child: return child
    code = 1
    try:
        call(*args)
        code = 0
    finally:
        os._exit(code)

def wait(child): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def forked(code: str, *words: object, seconds: float = 120) -> str:
    "What a program prints that begins with FORK."
    line = [sys.executable, "-W", "ignore", "-c", FORK + code, *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_before_any_statement_it_is_the_old_database_and_nothing_is_lost(tmp_path):
    old = make_old(tmp_path / "old.sqlite")
    places = [tmp_path / f"{i:03}" / "d.sqlite" for i in range(1, 75, 3)]
    for place in places:
        place.parent.mkdir()
        shutil.copy(old, place)
    code = """
for where in sys.argv[1:]:
    number = int(where.split(os.sep)[-2])
    print(wait(fork(killed_at, where, number)))
"""
    assert forked(code, *places).split() == ["-9"] * len(places)
    before, partial, copied = dump(old), 0, 0
    for place in places:
        partial += bool([*place.parent.glob("*.partial")])
        copied += bool([*place.parent.glob("*.revision-0001")])
        assert dump(place) == before, place
        if place in places[::4]:
            check_upgraded(place)
            assert not [*place.parent.glob("*.partial")]
    assert 0 < copied < len(places), "some were killed before the copy, and some behind it"
    # the last ones had no statement left, and died at the commit
    connect(tmp_path / "old.sqlite").dispose()
    assert count_statements(make_old(tmp_path / "counted.sqlite")) < 73


def count_statements(file: Path) -> int:
    asked = []
    count = lambda *a: asked.append(1)
    event.listen(Engine, "before_cursor_execute", count)
    try:
        connect(file).dispose()
    finally:
        event.remove(Engine, "before_cursor_execute", count)
    return len(asked)


def test_killed_at_some_time_it_is_the_old_one_or_the_new_one(tmp_path):
    old = make_old(tmp_path / "old.sqlite")
    with sqlite3.connect(old) as c:
        row = [(f"m{i}", 0, 0.5, MODEL, "text " * 40, "negative", LIKELY) for i in range(20_000)]
        c.executemany("INSERT INTO predictions VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    c.close()
    before = dump(old)
    delays = [0.005 * 1.6**i for i in range(12)]
    places = []
    for delay in delays:
        places.append(tmp_path / f"{delay:.4f}" / "d.sqlite")
        places[-1].parent.mkdir()
        shutil.copy(old, places[-1])
    code = """
for where in sys.argv[1:]:
    wait(fork(killed_after, where, float(where.split(os.sep)[-2])))
"""
    forked(code, *places)
    new = 0
    for place in places:
        found = dump(place)
        if "alembic_version" in found:
            new += 1
            assert len(found["predictions"]) == len(before["predictions"])
        else:
            assert found == before
    connect(places[0]).dispose()
    assert len(dump(places[0])["predictions"]) == 20_004 and new < len(places)


RACE = """
where, moment = sys.argv[1], time.time() + 0.3
print([wait(one) for one in [fork(at, where, moment) for _ in range(4)]])
"""


@pytest.mark.parametrize("kind", ["old", "new"])
def test_who_comes_at_once_does_it_once(kind, tmp_path):
    for i in range(3):
        file = tmp_path / f"{i}.sqlite"
        if kind == "old":
            make_old(file)
        assert forked(RACE, file) == "[0, 0, 0, 0]\n"
        if kind == "old":
            check_upgraded(file)
        assert len(copies(file)) == (kind == "old"), "one of them made one copy"
        assert dump(file)["alembic_version"] == [f"('{head}',)"]


def told_meanwhile(engine: Engine, where: str | Path) -> tuple[set[str], set[str], list[str]]:
    """What a server of the earlier program was told to be stored while the database was changed,
    what is there afterwards, and what the server said in the end."""
    told, said, begun = set(), [], threading.Event()
    insert = text(
        "INSERT INTO predictions (request_id, item, at, model, text, label, probabilities)"
        " VALUES (:name, 0, 1.0, 'm', 't', '1.5', 'null')"
    )

    def serve():
        while not said:
            name = f"w{len(told)}"
            try:
                with engine.begin() as c:
                    c.execute(insert, dict(name=name))
                told.add(name)
                if len(told) == 20:
                    begun.set()
            except DBAPIError as e:
                said.append(str(e.orig))

    server = threading.Thread(target=serve)
    server.start()
    assert begun.wait(30)
    connect(where).dispose()
    server.join(30)
    with engine.connect() as c:
        names = "SELECT request_id FROM predictions WHERE request_id LIKE 'w%'"
        there = {*c.execute(text(names)).scalars()}
    engine.dispose()
    return told, there, said


def test_a_server_of_the_earlier_program_loses_nothing_that_it_told(tmp_path):
    file = make_old(tmp_path / "old.sqlite")
    engine = create_engine(f"sqlite:///{file}", connect_args=dict(timeout=30))
    told, there, said = told_meanwhile(engine, file)
    assert told == there and len(told) >= 20 and "label" in said[0]


# -- whatever an old row held

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
numbers = st.floats(allow_nan=False)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    classes=st.lists(st.dictionaries(words, st.floats(0, 1), min_size=1), max_size=6),
    values=st.lists(st.tuples(numbers, st.none() | numbers), max_size=6),
)
def test_any_old_answer_is_read_as_it_was(classes, values, tmp_path_factory):
    file = tmp_path_factory.mktemp("any") / "d.sqlite"
    answers, said = {}, {}
    with sqlite3.connect(file) as c:
        c.executescript(OLD_TABLES)
        for i, likely in enumerate(classes):
            label = max(likely, key=likely.get)
            answers[f"c{i}"] = ClassPrediction(label=label, probabilities=likely)
            said[f"c{i}"] = [*likely][-1]
            told = (f"c{i}", 0, 1.0, MODEL, "t", label, json.dumps(likely))
            c.execute("INSERT INTO predictions VALUES (?, ?, ?, ?, ?, ?, ?)", told)
            told = (f"c{i}", 0, "k", 2.0, "ann", said[f"c{i}"], False, "")
            c.execute("INSERT INTO feedback VALUES (?, ?, ?, ?, ?, ?, ?, ?)", told)
        for i, (value, right) in enumerate(values):
            answers[f"n{i}"], said[f"n{i}"] = NumberPrediction(value=value), right
            told = (f"n{i}", 0, 1.0, MODEL, "t", repr(value), "null")
            c.execute("INSERT INTO predictions VALUES (?, ?, ?, ?, ?, ?, ?)", told)
            told = (f"n{i}", 0, "k", 2.0, "ann", None if right is None else repr(right), False, "")
            c.execute("INSERT INTO feedback VALUES (?, ?, ?, ?, ?, ?, ?, ?)", told)
    c.close()
    assert {r.request_id: r.given for r in read_feedback(file)} == said
    engine = connect(file)
    with engine.connect() as c:
        rows = c.execute(text("SELECT request_id, task, answer FROM predictions")).all()
    engine.dispose()
    assert {r.request_id: find_task(r.task).from_stored(r.answer) for r in rows} == answers
    assert not os.path.exists(f"{file}.partial")
