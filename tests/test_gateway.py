"""The server: no body it cannot answer, nothing acknowledged that is not stored."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

for library in ("fastapi", "uvicorn", "sqlalchemy", "onnxruntime"):
    pytest.importorskip(library, reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
import httpx
from served import ServeCommand
from smallbundle import make_bundle

from llmeco_nb.core import MissingError, UsageError
from llmeco_nb.deployment.executor import ExecutorOptions
from llmeco_nb.deployment.ledger import read_feedback
from llmeco_nb.deployment.loading import newest_bundle
from llmeco_nb.deployment.manifest import verify
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.deployment.refusals import limits
from llmeco_nb.deployment.server import make_app
from llmeco_nb.deployment.serving import listen

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the test client about its HTTP library
    from fastapi.testclient import TestClient

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "words")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return tmp_path_factory.mktemp("ledger") / "feedback.sqlite"


@pytest.fixture(scope="module")
def client(bundle, database):
    with TestClient(make_app(bundle, database), raise_server_exceptions=False) as c:
        yield c


def message(r) -> str:
    assert set(r.json()) == {"error"} and set(r.json()["error"]) == {"code", "message", "where"}, (
        r.text
    )
    return r.json()["error"]["message"]


# -- the routes


def test_one_text_or_several(client, bundle):
    one = client.post("/v1/predict", json={"text": "A good film"})
    several = client.post("/v1/predict", json={"texts": ["A good film", "dull"]})
    assert one.status_code == several.status_code == 200
    assert [a["label"] for a in several.json()["answers"]] == ["positive", "negative"] and [
        a["item"] for a in several.json()["answers"]
    ] == [0, 1]
    assert (
        one.json()["answers"] == several.json()["answers"][:1]
        and one.json()["request_id"] != several.json()["request_id"]
    )
    assert (
        one.json()["model"]
        == {"name": "words", "digest": verify(bundle).digest, "task": "text-classification"}
        and one.headers["X-Request-Id"] == one.json()["request_id"]
    )


def test_model_health_and_page(client, bundle):
    assert client.get("/v1/model").json()["labels"] == ["negative", "positive"]
    assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert {"/v1/predict", "/v1/feedback", "/v1/model", "/livez", "/readyz"} <= set(
        client.get("/openapi.json").json()["paths"]
    )


@pytest.mark.parametrize(
    "body,status,said",
    [
        ({}, 422, "either"),
        ({"text": "a", "texts": ["b"]}, 422, "either"),
        ({"text": ""}, 422, "empty"),
        ({"text": " \n"}, 422, "empty"),
        ({"text": 5}, 422, "text"),
        ({"text": ["a"]}, 422, "text"),
        ({"texts": []}, 422, "texts"),
        ({"texts": ["a", ""]}, 422, "texts.1 is empty"),
        ({"texts": ["a", None]}, 422, "texts.1"),
        ({"texts": ["a"] * 65}, 422, "64"),
        ({"texts": "abc"}, 422, "texts"),
        ({"text": "x" * (limits.text + 1)}, 422, str(limits.text)),
        ({"text": "a\0b"}, 422, "U+0000"),
        ([], 422, ""),
        ("text", 422, ""),
        (None, 422, ""),
        (7, 422, ""),
    ],
)
def test_wrong_questions(client, body, status, said):
    r = client.post("/v1/predict", json=body)
    assert r.status_code == status and said in message(r)


def test_wrong_bodies(client):
    kind = {"Content-Type": "application/json"}
    for content, headers in (
        (b"", kind),
        (b"{", kind),
        (b"\xff\xfe", kind),
        (b'{"text": NaN}', kind),
        (b'{"text": "\\ud800"}', kind),
        (b'{"\\ud800": 1}', kind),
        (b"[" * 100_000, kind),
        (b'{"text": "a"}', {"Content-Type": "text/plain"}),
        (b"text=a", {"Content-Type": "application/x-www-form-urlencoded"}),
    ):
        r = client.post("/v1/predict", content=content, headers=headers)
        assert r.status_code in (400, 422) and message(r), (content[:40], r.status_code, r.text)
    assert "application/json" in message(client.post("/v1/predict", data={"text": "a"}))


def test_a_long_text_is_tokenized_beside_the_event_loop(bundle, tmp_path):
    "A body of a megabyte takes half a second to tokenize, and others ask meanwhile."
    predictor = Predictor.load(bundle)
    encoder, seen = predictor.model.model, []
    encode = encoder.input_ids.__wrapped__

    def input_ids(text):
        seen.append(threading.current_thread().name)
        return encode(text)

    encoder.input_ids = lru_cache(256)(input_ids)
    with TestClient(make_app(predictor, tmp_path / "f.sqlite")) as c:
        seen.clear()
        texts = [f"good film {i} " * 500 for i in range(8)]
        assert c.post("/v1/predict", json={"texts": texts}).status_code == 200
    assert len(seen) == 8 and all(name == "prepare" for name in seen), seen


def test_large_bodies_are_not_read(client):
    assert client.post("/v1/predict", content=b" " * (limits.body + 1)).status_code == 413
    drip = (b" " * 2**16 for _ in range(1 + limits.body // 2**16))  # no announced length
    r = client.post("/v1/predict", content=drip)
    assert r.status_code == 413 and "larger" in message(r)


def test_unknown_routes_and_methods(client):
    assert (
        client.get("/v1/predict").status_code == 405
        and client.get("/nowhere").status_code == 404
        and "docs" in message(client.get("/nowhere"))
    )


# -- feedback


@pytest.fixture
def asked(client):
    return client.post("/v1/predict", json={"texts": ["good", "bad"]}).json()["request_id"]


def test_feedback_is_stored_once(client, asked, database):
    tell = lambda **k: client.post("/v1/feedback", json=dict(request_id=asked, **k))
    first, second = tell(label="negative", author="ann"), tell(label="negative", author="ann")
    assert (first.json()["stored"], second.json()["stored"]) == (True, False) and first.json()[
        "predicted"
    ] == "positive"
    assert (
        tell(label="negative", author="ann", item=1).json()["correct"] is True
        and tell(correct=False, author="bob").json()["label"] == "negative"
    )
    contradiction = tell(label="positive", author="ann")
    assert contradiction.status_code == 409 and "key" in message(contradiction)
    assert tell(label="positive", author="ann", key="second").json()["stored"]
    assert client.post(
        "/v1/feedback",
        json=dict(request_id=asked, label="positive"),
        headers={"Idempotency-Key": "k"},
    ).json()["stored"]
    assert not client.post(
        "/v1/feedback",
        json=dict(request_id=asked, label="positive"),
        headers={"Idempotency-Key": "k"},
    ).json()["stored"]
    assert len([r for r in read_feedback(database) if r.request_id == asked]) == 5


def test_wrong_feedback(client, asked, database):
    before = len(read_feedback(database))
    for body, status, said in (
        (dict(request_id="nobody", label="positive"), 404, "nobody"),
        (dict(request_id=asked, item=2, label="positive"), 404, "item"),
        (dict(request_id=asked, label="purple"), 422, "negative, positive"),
        (dict(request_id=asked), 422, "correct"),
        (dict(request_id=asked, label="negative", correct=True), 422, "contradict"),
        (dict(label="positive"), 422, "request_id"),
        (dict(request_id=asked, correct="perhaps"), 422, "correct"),
        (dict(request_id=asked, item=-1, correct=True), 422, "item"),
        (dict(request_id=asked, item=2**70, correct=True), 422, "item"),
        (dict(request_id=asked, correct=True, note="x" * 9999), 422, "note"),
        (dict(request_id=asked, correct=True, note="\ud800"), 422, "note"),
        (dict(request_id="\0", correct=True), 422, "U+0000"),
    ):
        r = client.post(
            "/v1/feedback", content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        assert r.status_code == status and said in message(r), (body, r.text)
    assert len(read_feedback(database)) == before


# -- whatever is sent

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["good", "negative", "", "\0", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
fields = st.dictionaries(
    st.sampled_from("text texts request_id item label correct author note key".split())
    | st.text(max_size=5),
    values,
    max_size=6,
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=fields | values, route=st.sampled_from(["/v1/predict", "/v1/feedback"]), real=st.booleans()
)
@example(body={"text": "\udfff"}, route="/v1/predict", real=False)
def test_no_json_is_a_server_error(client, asked_once, body, route, real):
    if real and isinstance(body, dict):
        body = {**body, "request_id": asked_once}
    r = client.post(route, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert r.status_code < 500, (body, r.text)
    if r.status_code != 200:
        assert message(r)


@pytest.fixture(scope="module")
def asked_once(client):
    return client.post("/v1/predict", json={"text": "good"}).json()["request_id"]


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.binary(max_size=200),
    kind=st.sampled_from(
        [
            "application/json",
            "application/json; charset=utf-16",
            "multipart/form-data; boundary=x",
            "",
            "text/html",
        ]
    ),
    route=st.sampled_from(["/v1/predict", "/v1/feedback"]),
)
def test_no_bytes_are_a_server_error(client, body, kind, route):
    r = client.post(route, content=body, headers={"Content-Type": kind})
    assert 400 <= r.status_code < 500 and message(r), (body, kind, r.text)


# -- the ledger behind it


def test_a_ledger_that_cannot_write_takes_no_thanks(bundle, tmp_path):
    with TestClient(make_app(bundle, tmp_path / "f.sqlite"), raise_server_exceptions=False) as c:
        assert c.post("/v1/predict", json={"text": "good"}).status_code == 200
        c.app.state.ledger.close()
        r = c.post("/v1/predict", json={"text": "good"})
        assert (
            r.status_code == 503
            and r.json()["error"]["code"] == "not_stored"
            and c.get("/readyz").status_code == 503
        )
        c.app.state.ledger.close = lambda: None


def test_an_overloaded_server_says_when(bundle, tmp_path):
    with TestClient(
        make_app(bundle, tmp_path / "f.sqlite", ExecutorOptions(max_waiting=0)),
        raise_server_exceptions=False,
    ) as c:
        r = c.post("/v1/predict", json={"text": "good"})
        assert (
            r.status_code == 429
            and int(r.headers["Retry-After"]) >= 1
            and c.get("/readyz").status_code == 503
        )


# -- as a process


def process(bundle, database) -> ServeCommand:
    return ServeCommand("--bundle", bundle, "--database", database)


def test_the_printed_line_works_and_ctrl_c_ends_politely(bundle, tmp_path):
    p = process(bundle, tmp_path / "f.sqlite")
    line = next(s for s in p.said if s.startswith("curl "))
    done = (
        subprocess.run(line, shell=True, capture_output=True, text=True, timeout=30)
        if not subprocess.run("command -v curl", shell=True, capture_output=True).returncode
        else None
    )
    if done:
        assert json.loads(done.stdout)["answers"][0]["label"] == "positive", (
            done.stdout + done.stderr
        )
    code, out, err = p.end(signal.SIGINT)
    assert code == 0 and out.rstrip().endswith("Stopped.") and "Traceback" not in err


def test_sigterm_ends_politely(bundle, tmp_path):
    code, out, err = process(bundle, tmp_path / "f.sqlite").end(signal.SIGTERM)
    assert code == 0 and out.rstrip().endswith("Stopped.") and "Traceback" not in err


def test_a_port_in_use_is_told(bundle, tmp_path):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from llmeco_nb.cli import main; main()",
                "serve",
                "--bundle",
                str(bundle),
                "--database",
                str(tmp_path / "f.sqlite"),
                "--port",
                str(port),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (
        done.returncode == UsageError.code
        and f"Port {port} is in use" in done.stderr
        and "--port" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_the_newest_champion_is_served(tmp_path):
    runs = tmp_path / "runs"
    with pytest.raises(MissingError, match="llmeco run"):
        newest_bundle(runs)
    made = {}

    def run(name: str, created: float, *places: str):
        (runs / name).mkdir(parents=True)
        (runs / name / "run.json").write_text(
            json.dumps(dict(created=created, profile="laptop", round=1, parent=None))
        )
        for place in places:
            made[name, place] = make_bundle(runs / name / place, name=f"{name} {place}").resolve()

    run("decoder-1", 0, "pack_decoder/bundle")
    with pytest.raises(MissingError, match="serve --bundle .*/decoder-1/pack_decoder/bundle"):
        newest_bundle(runs)
    run("laptop-1", 1, "bundle/bundle")
    run("decoder-2", 2, "pack_decoder/bundle")
    run("laptop-2", 2)
    assert newest_bundle(runs) == made["laptop-1", "bundle/bundle"]  # the newest run that has one
    run("laptop-10", 4, "improve/champion", "bundle/bundle")
    run("smoke-1", 3, "bundle/bundle")
    assert newest_bundle(runs) == made["laptop-10", "improve/champion"]
    (runs / "latest").symlink_to("smoke-1")
    assert (
        newest_bundle(runs) == made["smoke-1", "bundle/bundle"]
    )  # `latest` is the run that finished last


def test_sigkill_loses_nothing_that_was_acknowledged(bundle, tmp_path):
    database, acknowledged, sent = tmp_path / "feedback.sqlite", set(), set()
    for life in range(2):
        p, dead = process(bundle, database), threading.Event()

        def person(n):
            with httpx.Client(base_url=p.address, timeout=20) as http:
                while not dead.is_set():
                    try:
                        request = http.post(
                            "/v1/predict", json={"text": f"good number {n}"}
                        ).json()["request_id"]
                        body = dict(
                            request_id=request,
                            label="negative",
                            author=f"person {n}",
                            note="n" * 200,
                        )
                        sent.add((request, body["author"]))
                        if http.post("/v1/feedback", json=body).json()["stored"]:
                            acknowledged.add((request, body["author"]))
                    except httpx.HTTPError:
                        return

        with ThreadPoolExecutor(6) as people:
            work = [people.submit(person, n) for n in range(6)]
            begun = time.monotonic()
            while len(acknowledged) < 15 * (life + 1) and time.monotonic() - begun < 20:
                time.sleep(0.01)
            time.sleep(random.Random(life).random() / 4)
            p.process.kill()
            dead.set()
            for w in work:
                w.result()
        p.end()
    stored = [(r.request_id, r.author) for r in read_feedback(database)]
    assert (
        len(stored) == len(set(stored))
        and acknowledged <= set(stored) <= sent
        and len(acknowledged) >= 15
    )
    p = process(bundle, database)  # who got no answer asks again, and nothing is there twice
    for request, author in sorted(sent):
        r = httpx.post(
            f"{p.address}/v1/feedback",
            json=dict(request_id=request, label="negative", author=author, note="n" * 200),
            timeout=20,
        )
        assert r.status_code == 200 and r.json()["stored"] == ((request, author) not in set(stored))
    p.end()
    assert {(r.request_id, r.author) for r in read_feedback(database)} == sent and len(
        read_feedback(database)
    ) == len(sent)
