"""The server on PostgreSQL: all that it stores, two servers of one database, and a database that
goes away. Needs Debian's package `postgresql`, whose server is started on a free port."""

import shutil
import signal
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("psycopg", reason="PostgreSQL needs the extra `postgresql`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
import httpx
from served import ServeCommand
from smallbundle import make_bundle
from sqlalchemy import create_engine, text
from test_migrations import OLD_ROWS, OLD_TABLES, RACE, check_upgraded, forked, told_meanwhile

from llmeco_nb.core import WriteError
from llmeco_nb.deployment.key_admin import KeyAdmin
from llmeco_nb.deployment.keys import KeyOptions
from llmeco_nb.deployment.ledger import (
    Conflict,
    Ledger,
    connect,
    database_url,
    predictions,
    read_feedback,
    shown,
)
from llmeco_nb.deployment.local_postgresql import LocalPostgresql, postgresql_programs
from llmeco_nb.deployment.manifest import verify, write_manifest
from llmeco_nb.deployment.quotas import count_usage, day_of, read_usage, usage
from llmeco_nb.deployment.registry import Registry
from llmeco_nb.deployment.retention import Retention, delete_answers, tidy, used_bytes
from llmeco_nb.deployment.server import make_app
from llmeco_nb.deployment.usage_marks import read_marks
from llmeco_nb.interaction.crash_clients import CrashClients, kept_rows
from llmeco_nb.interaction.server_process import ServerProcess

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the test client about its HTTP library
    from fastapi.testclient import TestClient

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.skipif(
        postgresql_programs() is None, reason="no PostgreSQL server: apt-get install postgresql"
    ),
    # the servers share one database server
    pytest.mark.xdist_group("postgresql"),
]


@pytest.fixture(scope="module")
def cluster():
    one = LocalPostgresql()
    yield one
    one.close()


@pytest.fixture
def where(cluster, monkeypatch):
    monkeypatch.setenv("LLMECO_AUDIT_SECRET", "a long secret that all servers share")
    return cluster.database()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    place = tmp_path_factory.mktemp("bundles")
    one = make_bundle(place / "one", name="one")
    two = shutil.copytree(one, place / "two")
    write_manifest(two, replace(verify(two), name="two"))
    return dict(one=one, two=two)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_all_that_a_server_stores(where, bundles):
    registry, admin = Registry(where, "a test"), KeyAdmin(where, "a test")
    registry.register(bundles["one"])
    registry.promote("one")
    key, _ = admin.add(KeyOptions(name="ann", tokens_per_day=1000))
    with TestClient(make_app(bundles["one"], where)) as c:
        told = [
            c.post("/v1/predict", json={"text": "good"}, headers=bearer(key)) for _ in range(20)
        ]
        assert [one.status_code for one in told] == [200] * 20
        asked = told[0].json()["request_id"]
        for _ in range(2):  # the same twice is stored once
            body = dict(request_id=asked, correct=False, key="k")
            reply = c.post("/v1/feedback", json=body, headers=bearer(key))
            assert reply.status_code == 200, reply.text
        assert not reply.json()["stored"]
        assert c.post("/v1/predict", json={"text": "good"}).status_code == 401
    [row] = read_feedback(where)
    assert (row.request_id, row.author, row.correct) == (asked, "ann", False)
    engine = connect(where)
    with engine.begin() as c:
        assert delete_answers(c, time.time(), 100) == 19
        [left] = c.execute(predictions.select()).all()
        assert left.request_id == asked
    engine.dispose()
    assert admin.verify()[0] == 3 and "a test" not in shown(where)
    with pytest.raises(Conflict):
        registry.stop("canary", seen=0)
    admin.close()
    registry.close()


def test_who_opens_a_database_locks_nothing_that_others_write(where):
    "A second server starts, and each request of an admin opens the database, while others write."
    engine = connect(where)
    opened = []
    with engine.begin() as c:
        row = dict(request_id="r", item=0, at=0.0, model="m", text="t")
        c.execute(predictions.insert(), dict(row, task="none", answer="{}"))
        one = threading.Thread(target=lambda: opened.append(connect(where)))
        one.start()
        one.join(20)
        assert opened, "it waits for a lock"
    one.join()
    opened[0].dispose()
    engine.dispose()


def test_of_several_who_decide_on_one_revision_one_succeeds(where, bundles):
    first = Registry(where, "a test")
    for folder in bundles.values():
        first.register(folder)
    first.promote("one")
    for _ in range(5):
        seen, told = first.history()[-1].revision, []

        def decide():
            one = Registry(where, "a thread")
            try:
                told.append(one.canary("two", 0.5, seen=seen).revision)
            except Conflict:
                told.append(0)
            finally:
                one.close()

        them = [threading.Thread(target=decide) for _ in range(6)]
        for one in them:
            one.start()
        for one in them:
            one.join()
        assert sorted(told) == [0] * 5 + [seen + 1]
        first.stop("canary")
    assert first.verify()[0] == 2 + 1 + 10
    first.close()


def test_the_room_is_that_of_the_rows_that_are_left(where):
    "Deleted rows keep their place in PostgreSQL's files; the limit must not delete all for that."
    engine = connect(where)

    def used():
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as c:
            c.exec_driver_sql("ANALYZE")
            return used_bytes(c)

    row = dict(item=0, at=time.time() - 9000, model="m", task="none", answer="{}")
    with engine.begin() as c:
        rows = [dict(row, request_id=f"{i}", text=f"{i:09} " * 50) for i in range(4000)]
        c.execute(predictions.insert(), rows)
    full = used()
    assert 4000 * 500 < full < 4000 * 1500
    room = Retention(max_bytes=full // 2)
    gone = 1
    while gone:
        with engine.begin() as c:
            gone = tidy(c, room, 500)
        if used() <= full // 2:
            break
    with engine.connect() as c:
        left = len(c.execute(predictions.select()).all())
    engine.dispose()
    assert 1000 <= left <= 2000


def test_of_two_servers_one_is_killed_and_no_client_fails(where, bundles, tmp_path):
    registry, admin = Registry(where, "a test"), KeyAdmin(where, "a test")
    for folder in bundles.values():
        registry.register(folder)
    registry.promote("one")
    key, _ = admin.add(KeyOptions(name="ann"))
    env = {"LLMECO_RUNS": str(tmp_path)}
    both = [ServeCommand("--database", where, env=env) for _ in range(2)]
    told, failed, stop = [], [], threading.Event()

    def client(number):
        "Asks one server, and the other if that one is gone, as a proxy would."
        order = [both[number % 2].address, both[1 - number % 2].address]
        with httpx.Client(headers=bearer(key), timeout=10) as c:
            while not stop.is_set():
                for url in order:
                    try:
                        reply = c.post(f"{url}/v1/predict", json={"text": f"good {number}"})
                    except httpx.TransportError:
                        continue
                    (told if reply.status_code == 200 else failed).append(reply.json())
                    break
                else:
                    failed.append("no server")

    clients = [threading.Thread(target=client, args=(i,)) for i in range(6)]
    for one in clients:
        one.start()
    try:
        time.sleep(1.0)
        registry.promote("two")  # both follow
        deadline = time.monotonic() + 10
        while any(
            httpx.get(f"{one.address}/v1/model", headers=bearer(key)).json()["name"] != "two"
            for one in both
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = len(told)
        both[0].end(signal.SIGKILL)
        time.sleep(1.0)
        # what the dead one told is known to the other
        asked = told[before // 2]["request_id"]
        reply = httpx.post(
            f"{both[1].address}/v1/feedback",
            json=dict(request_id=asked, correct=True),
            headers=bearer(key),
        )
        assert reply.status_code == 200
    finally:
        stop.set()
        for one in clients:
            one.join()
        for one in both:
            if one.process.poll() is None:
                one.end()
    assert not failed, failed[:3]
    assert len(told) > before > 20 and {one["model"]["name"] for one in told} == {"one", "two"}
    engine = connect(where)
    with engine.connect() as c:
        stored = [row.request_id for row in c.execute(predictions.select())]
    engine.dispose()
    assert len(stored) == len(set(stored)), "an answer is stored twice"
    assert {one["request_id"] for one in told} <= set(stored), "what was told is lost"
    admin.close()
    registry.close()


def test_two_servers_that_wait_for_each_others_rows_both_write(where):
    """PostgreSQL ends one of two transactions that wait for each other. Its jobs are done again one
    by one: each is done, none twice, and no client is told of it."""
    both, meet, calls = [Ledger(where) for _ in range(2)], threading.Barrier(2), []

    def count(key, together):
        def job(c):
            calls.append(key)
            if together and len(calls) <= 4:  # both hold a row before either asks for the other
                meet.wait(10)
            count_usage(c, key, 7, 0.0)
            return key

        return job

    told = []
    for ledger, order in zip(both, (("a", "b"), ("b", "a"))):
        # while the first job sleeps the others gather, for one transaction
        ledger.write(lambda c: time.sleep(0.3))
        told += [ledger.write(count(key, i == 1)) for i, key in enumerate(order)]
    assert [one.result(timeout=30) for one in told] == ["a", "b", "b", "a"]
    assert len(calls) > 4, "there was no deadlock"
    assert all(ledger.not_ready_reasons() == [] for ledger in both)
    for ledger in both:
        ledger.close()
    engine = connect(where)
    with engine.connect() as c:
        rows = c.execute(usage.select().order_by(usage.c.key_id)).all()
    engine.dispose()
    assert [(row.key_id, row.requests, row.tokens) for row in rows] == [("a", 2, 14), ("b", 2, 14)]


def test_a_crash_of_the_database_takes_no_feedback_and_no_key(where, cluster, bundles):
    """Answers do not wait for the disk here either, and a crash of the database may take the last.
    Feedback does, and so what was written before it is there, too."""
    admin, registry = KeyAdmin(where, "a test"), Registry(where, "a test")
    registry.promote(str(registry.register(bundles["one"])))
    root, _ = admin.add(KeyOptions(name="root", role="admin"))
    made = [admin.add(KeyOptions(name=f"person-{i}")) for i in range(3)]
    server = ServerProcess(where)
    clients = CrashClients([server.address], [key for key, _ in made], root)
    told = clients.told
    with clients:
        deadline = time.monotonic() + 60
        while len(told.feedback) < 20 or len(told.keys) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        clients.quiet.set()
        time.sleep(0.3)
        cluster.stop()
        clients.quiet.clear()
        cluster.start()
        asked = told.statuses[200]
        while told.statuses[200] < asked + 30:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    server.end()
    found = kept_rows(told, where, [row.id for _, row in made])
    assert found.lost.total() == found.lost["request"] and not found.doubled.total(), found
    assert not told.refused
    admin.close()
    registry.close()


def test_a_key_may_use_billions_and_a_crash_of_the_database_takes_none_of_them(
    where, cluster, bundles
):
    admin, day = KeyAdmin(where, "a test"), day_of(time.time())
    key, row = admin.add(KeyOptions(name="ann", tokens_per_day=5 * 10**9))
    engine = connect(where)
    with engine.begin() as c:  # by another server
        count_usage(c, row.id, 3 * 10**9, time.time())
    ask = lambda c: c.post("/v1/predict", json={"text": "good"}, headers=bearer(key)).status_code
    with TestClient(make_app(bundles["one"], where)) as c:
        assert [ask(c) for _ in range(20)] == [200] * 20
        cluster.stop()
        cluster.start()
        engine.dispose()
        with engine.connect() as other:
            [(_, _, counted)] = read_marks(other, day)
        # in the log of the database, and 20 answers of 3 tokens were told
        assert 60 <= counted <= 60 + 5 * 10**7
    with engine.connect() as c:
        assert read_marks(c, day) == [(row.id, day, 60)], "exact after an orderly end"
        assert read_usage(c, day)[0][2] > 3 * 10**9 > 2**31
    engine.dispose()
    admin.close()


def test_a_database_that_goes_away_and_comes_back(where, cluster, bundles):
    with TestClient(make_app(bundles["one"], where)) as c:
        ask = lambda: c.post("/v1/predict", json={"text": "good"})
        assert ask().status_code == 200
        cluster.stop()
        try:
            reply = ask()
            assert reply.status_code == 503 and reply.json()["error"]["message"]
            assert c.get("/livez").status_code == 200
        finally:
            cluster.start()
        deadline = time.monotonic() + 20
        while ask().status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert c.get("/readyz").status_code == 200


# -- a database of an earlier program


@pytest.fixture
def old(where):
    "The tables as they were before revisions were numbered, with rows."
    engine = create_engine(database_url(where))
    with engine.begin() as c:
        for line in OLD_TABLES.split(";"):
            c.exec_driver_sql(line)
        for name, rows in OLD_ROWS.items():
            marks = ", ".join(["%s"] * len(rows[0]))
            c.exec_driver_sql(f"INSERT INTO {name} VALUES ({marks})", rows)
    yield engine
    engine.dispose()


def old_rows(engine) -> dict[str, list]:
    with engine.connect() as c:
        every = {name: c.execute(text(f"SELECT * FROM {name}")).all() for name in OLD_ROWS}
    return {name: [tuple(row) for row in rows] for name, rows in every.items()}


def test_an_old_database_is_read_in_full(where, old):
    before = old_rows(old)
    check_upgraded(where)
    after = old_rows(old)
    assert {name: len(rows) for name, rows in after.items()} == {
        name: len(rows) for name, rows in OLD_ROWS.items()
    }
    for name in before.keys() - {"predictions", "feedback"}:
        assert after[name] == before[name]
    with old.begin() as c:
        c.execute(text("UPDATE alembic_version SET version_num = '0977'"))
    with pytest.raises(WriteError, match="revision 0977"):
        connect(where)


def test_who_comes_at_once_changes_it_once(where, old):
    assert forked(RACE, where) == "[0, 0, 0, 0]\n"
    check_upgraded(where)


def test_who_is_killed_leaves_the_old_database(where, old):
    code = """
for number in range(5, 71, 5):
    print(wait(fork(killed_at, sys.argv[1], number)))
"""
    assert forked(code, where).split() == ["-9"] * 14
    assert old_rows(old) == OLD_ROWS
    old.dispose()
    check_upgraded(where)


def test_a_database_without_tables_is_made_once(where):
    assert forked(RACE, where) == "[0, 0, 0, 0]\n"
    assert read_feedback(where) == []


def test_a_server_of_the_earlier_program_loses_nothing_that_it_told(where, old):
    many = """
    INSERT INTO predictions
    SELECT 'm' || n, 0, 1.0, 'm', repeat('text ', 20), '1.5', 'null'
    FROM generate_series(1, 60000) n
    """
    with old.begin() as c:  # so that the change takes its time
        c.exec_driver_sql(many)
        # of the first revision already: that one locks the tables by looking at their indexes
        c.exec_driver_sql("CREATE TABLE alembic_version AS SELECT '0001' AS version_num")
    told, there, said = told_meanwhile(old, where)
    assert told == there and len(told) >= 20 and "label" in said[0]
