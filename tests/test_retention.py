"""Old answers go, what people said stays, and nobody waits for it."""

import asyncio
import shutil
import sqlite3
import time
import uuid
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from smallbundle import make_bundle

from llmeco_nb.core import UsageError
from llmeco_nb.deployment.ledger import (
    Ledger,
    connect,
    keep_feedback,
    keep_predictions,
    predictions,
    read_feedback,
)
from llmeco_nb.deployment.retention import Retention, delete_answers, keep_tidy, used_bytes
from llmeco_nb.deployment.server import make_app
from llmeco_nb.tasks.text_classification import ClassPrediction

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the test client about its HTTP library
    from fastapi.testclient import TestClient

ANSWER = ClassPrediction(label="good", probabilities={"bad": 0.2, "good": 0.8})


def ids(ledger):
    with ledger.engine.connect() as c:
        return {row.request_id for row in c.execute(predictions.select())}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=30),
    st.integers(0, 50),
    st.integers(1, 40),
)
def test_the_oldest_that_nobody_judged_go_and_nothing_else(tmp_path_factory, rows, before, most):
    ledger = Ledger(tmp_path_factory.mktemp("r") / "l.sqlite")
    for i, (_, judged) in enumerate(rows):
        keep_predictions(ledger, f"{i}", "0" * 64, ["text"], [ANSWER])
        if judged:
            keep_feedback(ledger, f"{i}", correct=True)
    ages = [predictions.update().where(predictions.c.request_id == f"{i}").values(at=at)
            for i, (at, _) in enumerate(rows)]  # fmt: skip
    ledger.write(lambda c: [c.execute(one) for one in ages]).result()
    gone = ledger.write(lambda c: delete_answers(c, before, most)).result()
    left = ids(ledger)
    ledger.close()
    may_go = sorted(at for at, judged in rows if not judged and at < before)
    assert gone == min(most, len(may_go)) and len(left) == len(rows) - gone
    went = [(at, judged) for i, (at, judged) in enumerate(rows) if f"{i}" not in left]
    assert sorted(at for at, _ in went) == may_go[:gone] and not any(j for _, j in went)


def test_a_server_keeps_to_its_room_while_it_answers(tmp_path):
    bundle, where = make_bundle(tmp_path / "words"), tmp_path / "f.sqlite"
    Ledger(where).close()
    with sqlite3.connect(where) as c:
        c.executemany(
            "INSERT INTO predictions VALUES (?, 0, ?, 'm', ?, 'positive', '{}')",
            [(uuid.uuid4().hex, time.time() - 9000 + i / 100, "x" * 2000) for i in range(6000)],
        )
    room = 5_000_000
    with TestClient(make_app(bundle, where, retention=Retention(max_bytes=room))) as c:
        deadline, slowest, engine = time.monotonic() + 30, 0.0, connect(where)
        used = room + 1
        while used > room:
            begun = time.monotonic()
            assert c.post("/v1/predict", json={"text": "good"}).status_code == 200
            slowest = max(slowest, time.monotonic() - begun)
            with engine.connect() as connection:
                used = used_bytes(connection)
            assert time.monotonic() < deadline
        said = c.post("/v1/predict", json={"text": "good"}).json()["request_id"]
        reply = c.post("/v1/feedback", json={"request_id": said, "correct": True})
        assert reply.status_code == 200
        engine.dispose()
    assert slowest < 2.0
    assert [row.request_id for row in read_feedback(where)] == [said]


def test_what_is_too_old_goes_and_a_failing_database_does_not_end_it(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    for i in range(2500):
        keep_predictions(ledger, f"{i}", "0" * 64, ["text"], [ANSWER])
    ledger.write(lambda c: None).result()

    async def run():
        real, calls = ledger.write, iter(range(10**6))

        def write(job, durable=True):
            return real(job if next(calls) else lambda c: c.exec_driver_sql("wrong"), durable)

        ledger.write = write
        task = asyncio.create_task(keep_tidy(ledger, Retention(days=1e-9), every=0.01))
        while ids(ledger):
            await asyncio.sleep(0.02)
        task.cancel()
        assert next(calls) > 3

    asyncio.run(asyncio.wait_for(run(), 30))
    ledger.close()


def test_a_database_of_before_gets_the_index_and_limits_are_above_zero(tmp_path):
    old = Path(__file__).parent / "fixtures" / "feedback_e8ccf91.sqlite"
    shutil.copy(old, tmp_path / "l.sqlite")
    Ledger(tmp_path / "l.sqlite").close()
    with sqlite3.connect(tmp_path / "l.sqlite") as c:
        plan = c.execute("EXPLAIN QUERY PLAN SELECT item FROM predictions WHERE at < 5").fetchall()
    assert "predictions_at" in str(plan)
    for wrong in (dict(days=0), dict(max_bytes=-1), dict(days=float("nan"))):
        with pytest.raises(UsageError, match="above 0"):
            Retention(**wrong)
