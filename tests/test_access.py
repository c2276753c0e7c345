"""Keys, roles, quotas and the audit log: every route needs a key once one exists, a revoked one
opens nothing a moment later, and what was done to keys cannot be undone in silence."""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("casbin", reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from served import ServeCommand
from smallbundle import make_bundle

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.deployment.audit import AuditRow, verify_audit, write_audit
from llmeco_nb.deployment.authentication import AuthMiddleware
from llmeco_nb.deployment.key_admin import KeyAdmin
from llmeco_nb.deployment.keys import KeyOptions, Principal, key_digest
from llmeco_nb.deployment.ledger import connect, read_feedback
from llmeco_nb.deployment.quotas import QuotaExceeded, Quotas
from llmeco_nb.deployment.server import actions, make_app
from llmeco_nb.deployment.server_options import ServerOptions
from llmeco_nb.deployment.serving import run_server

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the test client about its HTTP library
    from fastapi.testclient import TestClient

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "words")


@pytest.fixture
def admin(tmp_path):
    one = KeyAdmin(tmp_path / "f.sqlite", "a test")
    yield one
    one.close()


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def routes(app):
    "Every path there is, with a method that it takes."
    found = [(r.path, next(iter(r.methods - {"HEAD"}))) for r in app.routes]
    assert {"/", "/docs", "/livez", "/openapi.json", "/v1/predict"} <= {path for path, _ in found}
    return found


def test_the_route_table_is_closed(bundle, admin, tmp_path):
    "Walked with no, a wrong, an expired, a revoked and a foreign key, and one of a lower role."
    elsewhere = KeyAdmin(tmp_path / "elsewhere.sqlite", "a test")
    foreign, _ = elsewhere.add(KeyOptions(name="ann"))
    elsewhere.close()
    good, row = admin.add(KeyOptions(name="ann", role="admin"))
    gone, _ = admin.add(KeyOptions(name="gone"))
    admin.revoke("gone")
    old, _ = admin.add(KeyOptions(name="old", days=1e-9))
    reader, _ = admin.add(KeyOptions(name="eve", role="reader"))
    wrong = [None, "", "x", foreign, gone, old, good[:-1], good + "x", good.swapcase(), row.id]
    wrong += [row.digest, key_digest(good), "é" * 50]
    with TestClient(make_app(bundle, tmp_path / "f.sqlite"), raise_server_exceptions=False) as c:
        [door] = (layer for layer in layers(c.app) if isinstance(layer, AuthMiddleware))
        for path, method in [*routes(c.app), ("/nowhere", "GET"), ("/v1/predict/", "POST")]:
            for key in wrong:
                told = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
                door.attempts.left.clear()  # its patience is not asked here
                r = c.request(method, path, headers=told)
                if path == "/livez":
                    assert r.status_code == 200
                else:
                    assert r.status_code == 401, (path, key, r.text)
                    assert r.json()["error"]["code"] == "unauthorized"
                    assert "Bearer" in r.headers["www-authenticate"]
                    assert not key or len(key) < 3 or key not in r.text
            r = c.request(method, path, headers=bearer(reader))
            assert (r.status_code == 403) == (actions.get(path, "see") not in ("", "see")), path
            assert c.request(method, path, headers=bearer(good)).status_code not in (401, 403)
        basic = base64.b64encode(f"anybody:{good}".encode()).decode()
        r = c.post(
            "/v1/predict", json={"text": "good"}, headers={"Authorization": f"Basic {basic}"}
        )
        assert r.status_code == 200


def layers(app):
    "The middlewares of an application that has started, from the outside."
    layer = app.middleware_stack
    while layer is not None:
        yield layer
        layer = getattr(layer, "app", None)


def test_without_a_key_anybody_may_ask_and_nobody_may_more(bundle, tmp_path):
    with TestClient(make_app(bundle, tmp_path / "f.sqlite")) as c:
        assert c.post("/v1/predict", json={"text": "good"}).status_code == 200
        assert c.post("/v1/predict", json={"text": "good"}, headers=bearer("x")).status_code == 200


def wait_for(ask, status, seconds=5.0):
    "Until a request gets a status."
    begun = time.monotonic()
    while (got := ask().status_code) != status:
        assert time.monotonic() - begun < seconds, got
        time.sleep(0.1)


def test_keys_change_under_a_running_server(bundle, admin, tmp_path):
    with TestClient(make_app(bundle, tmp_path / "f.sqlite")) as c:
        ask = lambda key="": c.post("/v1/predict", json={"text": "good"}, headers=bearer(key))
        assert ask().status_code == 200
        first, _ = admin.add(KeyOptions(name="ann"))
        wait_for(ask, 401)  # the first key closes the door
        assert ask(first).status_code == 200
        second, _ = admin.rotate("ann", grace_hours=1)
        wait_for(lambda: ask(second), 200)
        assert ask(first).status_code == 200
        admin.revoke("ann")
        wait_for(lambda: ask(second), 401)
        assert ask(first).status_code == 401 and ask().status_code == 401


def test_a_key_asks_its_models_alone(bundle, admin, tmp_path):
    mine, _ = admin.add(KeyOptions(name="ann", models=("wor*",)))
    other, _ = admin.add(KeyOptions(name="bob", models=("topics", "w")))
    with TestClient(make_app(bundle, tmp_path / "f.sqlite")) as c:
        for key, status in ((mine, 200), (other, 403)):
            r = c.post("/v1/predict", json={"text": "good"}, headers=bearer(key))
            assert r.status_code == status, r.text


def test_quotas_are_kept_also_by_the_next_server(bundle, admin, tmp_path):
    hasty, _ = admin.add(KeyOptions(name="ann", requests_per_minute=3))
    modest, row = admin.add(KeyOptions(name="bob", tokens_per_day=20))
    ask = lambda c, key, text: c.post("/v1/predict", json={"text": text}, headers=bearer(key))
    with TestClient(make_app(bundle, tmp_path / "f.sqlite")) as c:
        assert [ask(c, hasty, "good").status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = ask(c, hasty, "good")
        assert 1 <= int(refused.headers["Retry-After"]) <= 20
        assert refused.json()["error"]["code"] == "quota"
        assert ask(c, modest, "good " * 10).status_code == 200  # 12 tokens
        assert ask(c, modest, "<br>").status_code == 422  # and nothing is counted
        refused = ask(c, modest, "good " * 10)
        assert refused.status_code == 429 and "12 are used" in refused.text
        assert ask(c, modest, "good").status_code == 200  # 3 tokens
    with TestClient(make_app(bundle, tmp_path / "f.sqlite")) as c:
        assert "15 are used" in ask(c, modest, "good " * 10).text
    with sqlite3.connect(tmp_path / "f.sqlite") as db:
        found = db.execute("SELECT key_id, requests, tokens FROM usage ORDER BY tokens").fetchall()
        assert (row.id, 2, 15) in found and len(found) == 2


def test_feedback_counts_among_the_requests_of_a_key(bundle, admin, tmp_path):
    "A key with a quota cannot flood what is learned from; also what is refused counts."
    hasty, _ = admin.add(KeyOptions(name="ann", requests_per_minute=4))
    with TestClient(make_app(bundle, tmp_path / "f.sqlite")) as c:
        asked = c.post("/v1/predict", json={"text": "good"}, headers=bearer(hasty)).json()
        statuses = []
        for i, request_id in enumerate([asked["request_id"], "nobody", asked["request_id"], "x"]):
            said = dict(request_id=request_id, label="negative", key=str(i))
            r = c.post("/v1/feedback", json=said, headers=bearer(hasty))
            statuses.append(r.status_code)
        assert statuses == [200, 404, 200, 429]
        assert r.json()["error"]["code"] == "quota" and 1 <= int(r.headers["Retry-After"]) <= 15


def test_feedback_is_that_of_the_key(bundle, admin, tmp_path):
    "Whoever has a key can name for whom he speaks, and cannot speak as somebody else."
    key, _ = admin.add(KeyOptions(name="ann"))
    with TestClient(make_app(bundle, tmp_path / "f.sqlite")) as c:
        asked = c.post("/v1/predict", json={"text": "good"}, headers=bearer(key)).json()
        for author in ("", "bob"):
            said = dict(request_id=asked["request_id"], label="negative", author=author)
            r = c.post("/v1/feedback", json=said, headers=bearer(key))
            assert r.json()["stored"], r.text
    assert [row.author for row in read_feedback(tmp_path / "f.sqlite")] == ["ann", "ann/bob"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 90), st.booleans()), max_size=60), st.integers(1, 30))
def test_no_minute_holds_more_than_twice_the_quota(steps, most):
    "A bucket that was full and fills meanwhile; and who waits as told is served."
    now, served = 1e9, []
    quotas = Quotas(clock=lambda: now)
    who = Principal(id="a", name="a", role="user", requests_per_minute=most)
    for pause, patient in steps:
        now += pause
        try:
            quotas.take_request(who)
        except QuotaExceeded as e:
            if not patient:
                continue
            now += e.retry_after
            quotas.take_request(who)
        served.append(now)
        assert sum(now - 60 < t for t in served) <= 2 * most


def test_what_is_done_to_keys_stands_in_the_log(admin, tmp_path):
    admin.add(KeyOptions(name="ann", role="operator"))
    admin.rotate("ann")
    with pytest.raises(UsageError):
        admin.add(KeyOptions(name="ann"))  # and a refusal changes neither keys nor log
    admin.revoke("ann")
    count, seal = admin.verify()
    assert count == 4 and len(admin.rows()) == 2 and admin.verify(seal) == (4, seal)
    for change in (
        "UPDATE audit SET actor = 'x' WHERE number = 1",
        "UPDATE audit SET at = at + 1 WHERE number = 2",
        "UPDATE audit SET detail = '{}' WHERE number = 3",
        "DELETE FROM audit WHERE number = 2",
        "DELETE FROM audit WHERE number = 4",
        "DELETE FROM audit",
        "UPDATE audit SET number = 9 WHERE number = 4",
    ):
        with sqlite3.connect(tmp_path / "f.sqlite") as db:
            kept = db.execute("SELECT * FROM audit").fetchall()
            db.execute(change)
        with pytest.raises(DataError):
            admin.verify(seal)
        with sqlite3.connect(tmp_path / "f.sqlite") as db:
            db.execute("DELETE FROM audit")
            db.executemany("INSERT INTO audit VALUES (?,?,?,?,?,?,?)", kept)
    assert admin.verify(seal) == (4, seal)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), min_size=2, max_size=8),
    st.data(),
)
def test_no_change_of_a_log_verifies(entries, data):
    from sqlalchemy import create_engine

    from llmeco_nb.deployment.audit import audit, read_audit

    engine = create_engine("sqlite://")
    audit.metadata.create_all(engine, tables=[audit])
    with engine.begin() as c:
        for actor, action in entries:
            write_audit(c, b"secret", actor, action)
        rows = list(read_audit(c))
    head = verify_audit(rows, b"secret")
    changed = list(rows)
    at = data.draw(st.integers(0, len(rows) - 1))
    how = data.draw(st.sampled_from(["drop", "swap", "twice", "actor", "merge"]))
    if how == "drop":
        del changed[at]
    elif how == "swap":
        other = (at + 1) % len(rows)
        changed[at], changed[other] = changed[other], changed[at]
    elif how == "twice":
        changed.insert(at, rows[at])
    else:  # what stood in one field may not stand in the next
        r = rows[at]
        actor = r.actor + "x" if how == "actor" else r.actor + r.action
        action = r.action if how == "actor" else ""
        changed[at] = AuditRow(r.number, r.at, actor, action, r.target, r.detail, r.mac)
    if changed != rows:
        with pytest.raises(DataError):
            verify_audit(changed, b"secret", head)


WRITER = """
import sys
from llmeco_nb.deployment.key_admin import KeyAdmin
from llmeco_nb.deployment.keys import KeyOptions
admin = KeyAdmin(sys.argv[1], "a writer")
for n in range(10**6):
    key, row = admin.add(KeyOptions(name=f"k{n}-{sys.argv[2]}"))
    print(row.id, flush=True)
"""


def test_sigkill_loses_no_key_and_breaks_no_seal(tmp_path):
    told = []
    for attempt in range(4):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "f.sqlite"), str(attempt)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            for _ in range(3 + attempt):
                told.append(writer.stdout.readline().strip())
            os.kill(writer.pid, signal.SIGKILL)
            told += writer.stdout.read().split()
    admin = KeyAdmin(tmp_path / "f.sqlite", "a test")
    there = [row.id for row in admin.rows()]
    count, _ = admin.verify()
    admin.close()
    whole = [one for one in told if len(one) == 8]  # the last word may have been cut off
    assert len(whole) >= 18 and set(whole) <= set(there) and count == len(there)


def test_a_server_for_everybody_needs_a_key_or_a_word(bundle, tmp_path):
    with pytest.raises(UsageError, match="llmeco keys add NAME"):
        run_server(
            ServerOptions(bundle=bundle, host="0.0.0.0", port=0, database=tmp_path / "f.sqlite")
        )


def test_the_secret_is_not_in_the_database_and_for_its_owner_alone(admin, tmp_path):
    key, _ = admin.add(KeyOptions(name="ann"))
    secret = tmp_path / "f.sqlite.audit-secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    connect(tmp_path / "f.sqlite").dispose()
    for file in tmp_path.iterdir():
        if file != secret:
            data = file.read_bytes()
            assert secret.read_bytes() not in data and key.encode() not in data
            assert key.split("_", 2)[2].encode() not in data


def test_the_command(tmp_path):
    def typed(*words):
        command = [sys.executable, "-c", "from llmeco_nb.cli import main; main()", "keys", *words]
        env = {**os.environ, "LLMECO_DATABASE": str(tmp_path / "f.sqlite")}
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)

    assert "There is no key" in typed("list").stdout
    made = typed("add", "ann", "--per-minute", "5", "--model", "sent*")
    assert (
        made.returncode == 0 and made.stdout.startswith("llmeco_") and made.stdout.count("\n") == 1
    )
    shown = typed("list").stdout
    assert "ann" in shown and "sent*" in shown and made.stdout.strip() not in shown
    again = typed("add", "ann")
    assert again.returncode == 2 and "There is a key 'ann'" in again.stderr
    assert typed("revoke", "ann").returncode == 0 and "revoked" in typed("list").stdout
    log = typed("audit").stdout
    assert "2 rows" in log
    assert typed("audit", "--head", log.split("\n")[1]).returncode == 0
    assert typed("audit", "--head", "0" * 64).returncode != 0


def test_figures_and_lines_tell_of_requests_and_not_what_was_asked(bundle, admin, tmp_path):
    key, row = admin.add(KeyOptions(name="ann", role="operator"))
    lines = []
    app = make_app(bundle, tmp_path / "f.sqlite", log=lines.append)
    with TestClient(app, raise_server_exceptions=False) as c:
        sent = bearer(key)
        r = c.post("/v1/predict", json={"texts": ["good zebra", "dull"]}, headers=sent)
        assert r.headers["x-request-id"] == r.json()["request_id"]
        wrong = c.post("/v1/predict?zebra=1", json={"zebra": "zebra"}, headers=sent)
        assert wrong.status_code == 422 and len(wrong.headers["x-request-id"]) == 32
        assert c.post("/zebra", json={}, headers=bearer("zebra")).status_code == 401
        figures = c.get("/metrics", headers=sent)
        assert figures.headers["content-type"].startswith("text/plain")
    families = {s.name: s for f in parser(figures.text) for s in f.samples}
    assert families["llmeco_items_total"].value == 2 and families["llmeco_ready"].value == 1
    counted = [
        (s.labels["http_route"], s.labels["http_response_status_code"], s.value)
        for f in parser(figures.text)
        for s in f.samples
        if s.name == "http_server_request_duration_seconds_count"
    ]
    assert sorted(counted) == [
        ("/v1/predict", "200", 1),
        ("/v1/predict", "422", 1),
        ("other", "401", 1),
    ]
    told = [json.loads(line) for line in lines]
    assert [t["status"] for t in told] == [200, 422, 401, 200]
    assert [t["refusal"] for t in told] == ["", "wrong", "unauthorized", ""]
    assert told[0]["key"] == row.id and told[0]["model"] == r.json()["model"]["digest"]
    everything = figures.text + "".join(lines)
    assert "zebra" not in everything and key not in everything


def parser(text):
    "The families of figures in what Prometheus reads."
    from prometheus_client.parser import text_string_to_metric_families

    return list(text_string_to_metric_families(text))


def test_browsers_and_caches_are_told_what_they_may_not_do(bundle, tmp_path):
    with TestClient(make_app(bundle, tmp_path / "f.sqlite")) as c:
        replies = [c.get("/"), c.get("/docs"), c.get("/nowhere"), c.get("/v1/model")]
        replies += [c.post("/v1/predict", json={"text": "good"}), c.post("/v1/predict", json={})]
        for reply in replies:
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["cache-control"] == "no-store"
            policy = reply.headers["content-security-policy"]
            assert "frame-ancestors 'none'" in policy and "unsafe-inline' " not in policy
            assert "strict-transport-security" not in reply.headers
        scripts = re.findall(r"<script>(.*?)</script>", replies[0].text, re.S)
        assert len(scripts) == 1
        digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy, "the page's own script may run"


def test_a_stated_address_is_believed_of_named_proxies_alone(bundle, admin, tmp_path):
    "Else whoever tries keys gives each attempt another address."
    import httpx

    admin.add(KeyOptions(name="ann"))
    for words, expected in (((), {401, 429}), (("--proxy", "127.0.0.1"), {401})):
        server = ServeCommand("--bundle", bundle, "--database", tmp_path / "f.sqlite", *words)
        try:
            got = set()
            for i in range(40):
                head = {"Authorization": "Bearer wrong", "X-Forwarded-For": f"10.0.0.{i}"}
                got.add(httpx.get(f"{server.address}/v1/model", headers=head).status_code)
            assert got == expected, words
        finally:
            server.end()


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
def test_https(bundle, tmp_path):
    import httpx

    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    line += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*line, "-keyout", key, "-out", cert], check=True, capture_output=True)
    words = ("--bundle", bundle, "--database", tmp_path / "f.sqlite")
    server = ServeCommand(*words, "--tls-cert", cert, "--tls-key", key)
    at = server.address
    try:
        assert at.startswith("https://")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reply = httpx.post(f"{at}/v1/predict", json={"text": "good"}, verify=str(cert))
        assert reply.status_code == 200 and "strict-transport-security" in reply.headers
        with pytest.raises(httpx.TransportError):
            httpx.get(at.replace("https", "http") + "/livez")
    finally:
        server.end()
    (tmp_path / "other.pem").write_text("no key")
    other = dict(tls_cert=str(cert), tls_key=str(tmp_path / "other.pem"))
    for wrong in (dict(tls_cert=str(cert)), other):
        with pytest.raises(UsageError, match="key"):
            run_server(ServerOptions(bundle=bundle, port=0, **wrong))
