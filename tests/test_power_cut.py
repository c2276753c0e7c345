"""Power cuts, simulated by a library that notes what was not pushed to the disk; a disk that is
full; and what a server has told its clients by then."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("casbin", reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
import httpx
from smallbundle import make_bundle
from sqlalchemy import select

from llmeco_nb.core import LlmecoError, UsageError
from llmeco_nb.deployment.audit import audit_secret
from llmeco_nb.deployment.generation_log import GenerationFeedback, keep_generation_feedback
from llmeco_nb.deployment.key_admin import KeyAdmin
from llmeco_nb.deployment.keys import KeyOptions
from llmeco_nb.deployment.ledger import (
    Ledger,
    UnknownRequest,
    connect,
    predictions,
    read_feedback,
    unmatched_feedback,
)
from llmeco_nb.deployment.power_cut import (
    compile_library,
    cut_power,
    read_notes,
    watched_environment,
)
from llmeco_nb.deployment.quotas import day_of, usage
from llmeco_nb.deployment.registry import Registry
from llmeco_nb.deployment.server import make_app
from llmeco_nb.deployment.usage_marks import read_marks
from llmeco_nb.interaction.crash_clients import CrashClients, kept_rows
from llmeco_nb.interaction.server_process import ServerProcess
from llmeco_nb.tasks.regression import RegressionSchema

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the test client about its HTTP library
    from fastapi.testclient import TestClient

ROOT = Path(__file__).resolve().parent.parent
compiled = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc")), reason="needs a C compiler, and there is none"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_library(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "words")


def run_watched(library, file, notes, code):
    "A process that writes, and dies by its own hand."
    code = f"import os, signal, sys\n{code}\nos.kill(os.getpid(), signal.SIGKILL)"
    environment = os.environ | watched_environment(library, file, notes)
    died = subprocess.run([sys.executable, "-c", code, str(file)], env=environment)
    assert died.returncode == -signal.SIGKILL


# --- the library itself -----------------------------------------------------------------------

WRITES = {
    "write": "os.write(f, b'new')",
    "pwrite": "os.pwrite(f, b'new', 1)",
    "longer": "os.pwrite(f, b'new' * 4000, 3)",
    "past the end": "os.pwrite(f, b'new', 9000)",
    "append": "os.write(os.open(sys.argv[1], os.O_RDWR | os.O_APPEND), b'new')",
    "shorter": "os.ftruncate(f, 2)",
    "stretched": "os.ftruncate(f, 5000)",
    "two": "os.pwrite(f, b'new', 1); os.ftruncate(f, 2); os.pwrite(f, b'again', 0)",
}


@compiled
@pytest.mark.parametrize("name", WRITES)
def test_what_was_not_synced_is_lost_and_what_was_is_not(library, tmp_path, name):
    file, notes = tmp_path / "f.sqlite", tmp_path / "notes"
    opened = "f = os.open(sys.argv[1], os.O_RDWR)"
    file.write_bytes(b"synced")
    run_watched(library, file, notes, f"{opened}\n{WRITES[name]}")
    written = file.read_bytes()
    assert written != b"synced", "a kill alone takes nothing"
    assert cut_power(file, notes) >= 1 and file.read_bytes() == b"synced"
    # pushed by another descriptor of the same file, as the server's second thread does it
    other = "os.fsync(os.open(sys.argv[1], os.O_RDONLY))"
    run_watched(library, file, notes, f"{opened}\n{WRITES[name]}\n{other}")
    assert cut_power(file, notes) == 0 and file.read_bytes() == written
    file.write_bytes(b"synced")
    run_watched(library, file, notes, f"{opened}\n{WRITES[name]}")
    assert cut_power(file, notes, kept=1.0) >= 1 and file.read_bytes() == written


@compiled
def test_other_files_are_left_alone_and_a_torn_note_is_left_out(library, tmp_path):
    file, notes = tmp_path / "f.sqlite", tmp_path / "notes"
    file.write_bytes(b"synced")
    names = [f"{file}{end}" for end in ("-shm", ".audit-secret", "2", "-wal2")]
    code = f"for name in {names}: open(name, 'wb').write(b'new')\n"
    run_watched(library, file, notes, code + "open(sys.argv[1] + '-wal', 'wb').write(b'new')")
    assert [len(list(read_notes(notes / str(i)))) for i in range(3)] == [0, 1, 0]
    whole = (notes / "1").read_bytes()
    for n in range(len(whole)):
        (notes / "1").write_bytes(whole[:n])
        assert not list(read_notes(notes / "1"))
    (notes / "1").write_bytes(whole)
    cut_power(file, notes)
    assert [Path(name).exists() for name in names] == [False, True, True, True]
    assert Path(f"{file}-wal").read_bytes() == b""


SQL = """
import random, sqlite3
chance = random.Random(int(os.environ["SEED"]))
c = sqlite3.connect(sys.argv[1], isolation_level=None)
for line in ("journal_mode=WAL", "wal_autocheckpoint=8", "cache_size=10"):
    c.execute(f"PRAGMA {line}")
c.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, w TEXT)")
first = c.execute("SELECT coalesce(max(n), 0) FROM t").fetchone()[0]
for n in range(first + 1, first + chance.randint(2, 40)):
    waits = chance.random() < 0.3
    c.execute(f"PRAGMA synchronous={'FULL' if waits else 'NORMAL'}")
    c.execute("INSERT INTO t VALUES (?, ?)", (n, "w" * chance.randint(1, 3000)))
    if waits:
        print(n, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


LIVES = 20


def numbers(file):
    "What a copy of the database holds; the next life finds the original as it was left."
    copy = file.parent / "copy"
    copy.mkdir()
    for end in ("", "-wal"):
        shutil.copy(f"{file}{end}", f"{copy / file.name}{end}")
    with closing(sqlite3.connect(copy / file.name)) as c:
        assert c.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        found = [n for (n,) in c.execute("SELECT n FROM t ORDER BY n")]
    shutil.rmtree(copy)
    return found


@compiled
def test_sqlite_keeps_what_waited_for_the_disk_whatever_else_it_took(library, tmp_path):
    """Including what was written before it without waiting: a log has no holes. This is why no
    feedback is left without the answer that it is about."""
    chance, lost = random.Random(0), 0
    for life in range(LIVES):
        file, notes = tmp_path / f"{life % 4}.sqlite", tmp_path / f"{life % 4}"
        environment = os.environ | watched_environment(library, file, notes)
        line = [sys.executable, "-c", f"import os, signal, sys\n{SQL}", str(file)]
        environment["SEED"] = str(life)
        told = subprocess.run(line, env=environment, capture_output=True, text=True).stdout.split()
        before, last = numbers(file), int(told[-1]) if told else 0
        cut_power(file, notes, chance.choice([0, 0.5, 0.95]), life)
        rows = numbers(file)
        assert rows == list(range(1, len(rows) + 1)) and last <= len(rows) <= len(before)
        lost += len(before) - len(rows)
    assert lost > 5, "the cuts took nothing, and so showed nothing"


# --- a server ---------------------------------------------------------------------------------


class Site:
    "A database with a registry, and keys."

    def __init__(self, where, bundle, count=3):
        registry, admin = Registry(where, "a test"), KeyAdmin(where, "a test")
        registry.promote(str(registry.register(bundle)))
        self.where = where
        self.root, _ = admin.add(KeyOptions(name="root", role="admin"))
        made = [admin.add(KeyOptions(name=f"person-{i}")) for i in range(count)]
        self.people, self.ids = [key for key, _ in made], [row.id for _, row in made]
        admin.close()
        registry.close()

    def kept(self, clients):
        return kept_rows(clients.told, self.where, self.ids)


def wait_until(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@compiled
def test_a_power_cut_takes_the_last_answers_and_nothing_that_was_judged(library, bundle, tmp_path):
    site = Site(tmp_path / "f.sqlite", bundle)
    environment = watched_environment(library, site.where, tmp_path / "notes")
    clients, gone = CrashClients([], site.people, site.root), {}
    told = clients.told
    with clients:
        for life in range(2):
            server = ServerProcess(site.where, environment)
            clients.addresses[:] = [server.address]
            before = len(told.keys)
            wait_until(lambda: len(told.keys) > before + 4)
            clients.quiet.set()
            time.sleep(0.4)
            asked = len(told.answers)
            wait_until(lambda: len(told.answers) > asked + 5)
            server.end()
            now = time.monotonic()
            clients.addresses.clear()
            clients.quiet.clear()
            assert cut_power(site.where, tmp_path / "notes", kept=life / 2) > 0
            found = site.kept(clients)
            gone |= {k: now - told.answers[k].at for k in found.lost_answers if k not in gone}
        server = ServerProcess(site.where, environment)
        clients.addresses[:] = [server.address]
        judged = lambda: {request_id for request_id, _ in told.unmatched}
        wait_until(lambda: set(gone) <= judged())
        server.end(signal.SIGTERM)
    assert gone, "the cuts took nothing, and so showed nothing"
    # the log is pushed to the disk a second after a write; a busy machine may take longer
    assert max(gone.values()) < 5
    found = site.kept(clients)
    assert set(found.lost_answers) == set(gone) == judged()
    assert not (found.lost - found.lost.__class__(request=len(gone))).total()
    assert not found.doubled.total() and not told.refused
    assert {row.request_id for row in read_feedback(site.where)} >= {k for k, _ in told.feedback}


def tokens_used(where, key_id):
    "What counts as used today, and what is stored with the answers."
    engine, day = connect(where), day_of(time.time())
    with engine.connect() as c:
        marked = {key: tokens for key, _, tokens in read_marks(c, day)}
        rows = c.execute(select(usage).where(usage.c.day == day))
        stored = {row.key_id: row.tokens for row in rows}
    engine.dispose()
    return marked.get(key_id, 0), stored.get(key_id, 0)


@compiled
def test_a_power_cut_gives_no_key_its_quota_again(library, bundle, tmp_path):
    where, notes, quota = tmp_path / "f.sqlite", tmp_path / "notes", 1200
    Site(where, bundle, count=0)
    admin = KeyAdmin(where, "a test")
    key, row = admin.add(KeyOptions(name="ann", tokens_per_day=quota))
    admin.close()
    environment, told = watched_environment(library, where, notes), 0

    def ask(http, texts=1):
        "A reply; what is told is counted: three tokens a text."
        nonlocal told
        reply = http.post("/v1/predict", json={"texts": ["good"] * texts})
        told += 3 * texts * (reply.status_code == 200)
        return reply

    def opened(address):
        return httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"})

    server = ServerProcess(where, environment)
    with opened(server.address) as http:
        assert [ask(http).status_code for _ in range(9)] == [200] * 9
    server.end(signal.SIGTERM)
    assert tokens_used(where, row.id) == (told, told), "exact"
    lost, block = 0, quota // 100
    for life in range(2):
        server = ServerProcess(where, environment)
        with opened(server.address) as http:
            # a mark is written with the seventh and all before it; what follows waits for nobody
            assert [ask(http).status_code for _ in range(9)] == [200] * 9
        server.end()
        assert cut_power(where, notes, kept=life / 2) > 0
        counted, stored = tokens_used(where, row.id)
        assert told <= counted <= told + (life + 1) * block
        lost = max(lost, told - stored)
    assert lost > 0, "the cuts took nothing, and so showed nothing"
    server, before = ServerProcess(where, environment), told
    with opened(server.address) as http:
        while (reply := ask(http, 50)).status_code == 200:
            pass
        assert f"{counted + told - before:,} are used" in reply.text
    server.end(signal.SIGTERM)
    assert quota - 2 * block - 150 < told <= quota
    assert tokens_used(where, row.id)[0] == counted + told - before, "exact, from there on"


@pytest.fixture
def small_disk(tmp_path):
    "A file system of a few megabytes."
    folder = tmp_path / "disk"
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder)]
    if os.geteuid() or subprocess.run(line, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk, bundle):
    """The floor of free space is set to zero. Answers are refused and not given; nothing told is
    lost; and it goes on when there is room."""
    site = Site(small_disk / "f.sqlite", bundle)
    server = ServerProcess(site.where, min_free=0)
    clients = CrashClients([server.address], site.people)
    statuses = clients.told.statuses
    with clients:
        wait_until(lambda: statuses[200] > 20)
        with open(small_disk / "ballast", "wb", buffering=0) as f:
            deadline = time.monotonic() + 20
            while statuses[503] < 20:
                try:
                    f.write(bytes(4096))
                except OSError:
                    time.sleep(0.01)
                assert time.monotonic() < deadline, "it never noticed"
        (small_disk / "ballast").unlink()
        answered = statuses[200]
        wait_until(lambda: statuses[200] > answered + 20)
    server.end(signal.SIGTERM)
    found = site.kept(clients)
    assert not found.lost.total() and not found.doubled.total() and not clients.told.refused
    assert set(statuses) == {200, 503} and "Traceback" not in server.errors()


# --- feedback on an answer that is lost -------------------------------------------------------


@pytest.mark.parametrize("task", ["classes", "numbers"])
def test_feedback_on_a_lost_answer_is_kept_under_its_id(bundle, tmp_path, task):
    right = dict(label="negative") if task == "classes" else dict(value=2.5)
    if task == "numbers":
        bundle = make_bundle(tmp_path / "stars", "stars", RegressionSchema(low=0, high=5))
    where = tmp_path / "f.sqlite"
    with TestClient(make_app(bundle, where)) as c:
        asked = [
            c.post("/v1/predict", json={"texts": ["good", "bad"]}).json()["request_id"]
            for _ in range(2)
        ]
    engine = connect(where)
    with engine.begin() as c:
        c.execute(predictions.delete().where(predictions.c.request_id == asked[0]))
    with TestClient(make_app(bundle, where)) as c:  # the next server knows the ids of the last
        tell = lambda request_id, **k: c.post("/v1/feedback", json=dict(request_id=request_id, **k))
        first = tell(asked[0], item=1, author="ann", note="mail a@b.org", **right)
        assert first.status_code == 200 and first.json()["stored"]
        assert first.json()["predicted"] is first.json()["correct"] is None
        again = tell(asked[0], item=1, author="ann", note="mail a@b.org", **right)
        assert again.status_code == 200 and not again.json()["stored"]
        assert tell(asked[0], correct=False).json()["correct"] is False
        assert tell(asked[0], item=1, author="ann", correct=True).status_code == 409
        assert tell(asked[0], item=1).status_code == 422
        # an id that nobody was given, and an item of an answer that is there
        made_up = f"{int(asked[0], 16) ^ 1:032x}"
        assert tell(made_up, **right).status_code == tell(asked[1], item=2, **right).status_code
        assert tell(made_up, **right).status_code == 404
        assert tell(asked[1], **right).json()["predicted"] is not None
    with engine.connect() as c:
        rows = c.execute(select(unmatched_feedback).order_by("item")).all()
    engine.dispose()
    assert [(one.request_id, one.item, one.correct) for one in rows] == [
        (asked[0], 0, False),
        (asked[0], 1, None),
    ]
    kind = "text-classification" if task == "classes" else "regression"
    assert [(one.task, one.correction) for one in rows] == [
        (kind, None),
        (kind, json.dumps(*right.values())),
    ]
    assert "a@b.org" not in rows[1].note
    assert [row.request_id for row in read_feedback(where)] == [asked[1]]


def test_feedback_on_a_lost_text_is_kept_under_its_id(tmp_path):
    ledger = Ledger(tmp_path / "f.sqlite")
    lost = ledger.request_ids.new()
    tell = lambda **k: keep_generation_feedback(ledger, GenerationFeedback(**k)).result()
    assert tell(request_id=lost, better="Because it rains.").stored
    reply = tell(request_id=lost, better="Because it rains.")
    assert not reply.stored and reply.correct is None
    assert tell(request_id=lost, correct=True, author="ann").correct is True
    for wrong, error in (({}, UsageError), (dict(request_id="0" * 32), UnknownRequest)):
        with pytest.raises(error):
            tell(**{"request_id": lost, **wrong, **({"correct": True} if wrong else {})})
    with ledger.engine.connect() as c:
        rows = c.execute(select(unmatched_feedback).order_by("at")).all()
    assert [(one.task, one.correction, one.correct) for one in rows] == [
        ("text-generation", '"Because it rains."', None),
        ("text-generation", None, True),
    ]
    ledger.close()


def test_servers_of_one_database_know_each_others_ids(tmp_path):
    where = tmp_path / "f.sqlite"
    both = [Ledger(where) for _ in range(2)]
    other = Ledger(tmp_path / "g.sqlite")
    one = both[0].request_ids.new()
    assert both[1].request_ids.made(one) and not other.request_ids.made(one)
    for ledger in (*both, other):
        ledger.close()


def test_the_name_of_the_audit_secret_is_pushed_to_the_disk(tmp_path, monkeypatch):
    "Else a power cut takes the file, and no row of the log verifies any more."
    seen = []
    plain = os.fsync
    note = lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), plain(fd))
    monkeypatch.setattr(os, "fsync", note)
    audit_secret(tmp_path / "f.sqlite")
    assert seen[-1] == str(tmp_path) and len(seen) == 2


@compiled
def test_a_library_that_cannot_note_ends_the_process(library, tmp_path):
    "A power cut of which nothing is noted would show nothing."
    environment = watched_environment(library, tmp_path / "f.sqlite", tmp_path / "notes")
    shutil.rmtree(tmp_path / "notes")
    done = subprocess.run([sys.executable, "-c", "1"], env=os.environ | environment)
    assert done.returncode == 97
    with pytest.raises(LlmecoError, match="did not start"):
        ServerProcess(tmp_path / "f.sqlite", environment)
