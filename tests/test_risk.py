"""The assessment finds each hole that is planted in a real server, and nothing in one that is
whole; bad input of every kind gets its status and an explanation in the protocol's own form."""

import gzip
import json
import re
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

for library in ("fastapi", "uvicorn", "sqlalchemy", "casbin"):
    pytest.importorskip(library, reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
import served
from smallbundle import make_bundle

from llmeco_nb.core import MissingError, UsageError, read_json
from llmeco_nb.deployment.http_requests import content_policy, own_names
from llmeco_nb.deployment.key_admin import KeyAdmin
from llmeco_nb.deployment.keys import KeyOptions
from llmeco_nb.deployment.manifest import read_manifest, write_manifest
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.deployment.refusals import BodyLimit
from llmeco_nb.deployment.retention import Retention
from llmeco_nb.deployment.risk import assess, probes, run_probe
from llmeco_nb.deployment.risk_body_probes import BadInput, bad_inputs, explains, is_openai
from llmeco_nb.deployment.risk_contract import AssessOptions, owasp_items
from llmeco_nb.deployment.risk_report import Assessment, write_report
from llmeco_nb.deployment.risk_target import Target
from llmeco_nb.deployment.server import make_app
from llmeco_nb.deployment.serving import TimedProtocol
from llmeco_nb.deployment.signing import new_key, sign_bundle

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def serving(app, http=TimedProtocol):
    "The URL of an application that answers in a thread."
    with served.serving(app, http=http) as (host, port):
        yield f"http://{host}:{port}"


@dataclass
class House:
    "A server's files and keys, before it is served."

    folder: Path
    bundle: Path
    database: Path
    log: Path
    user: str
    admin: str
    limited: str = ""

    def write(self, line: str) -> None:
        "Add a line to the log."
        with open(self.log, "a") as f:
            f.write(line + "\n")

    def options(self, url: str, **more) -> AssessOptions:
        "All that the owner can give."
        given: dict[str, Any] = dict(url=url, key=self.user, admin_key=self.admin, quick=True)
        given |= dict(bundle=self.bundle, database=self.database, log=self.log)
        return AssessOptions(**(given | more))


def make_house(folder: Path, bundle: Path) -> House:
    "Keys in a new database."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "server.log").touch()
    admin = KeyAdmin(folder / "answers.sqlite", "a test")
    user, _ = admin.add(KeyOptions(name="ann"))
    root, _ = admin.add(KeyOptions(name="root", role="admin"))
    limited, _ = admin.add(KeyOptions(name="few", requests_per_minute=3))
    admin.close()
    files = folder / "answers.sqlite", folder / "server.log"
    return House(folder, bundle, *files, user, root, limited)


@pytest.fixture
def house(tmp_path):
    return make_house(tmp_path / "house", make_bundle(tmp_path / "words"))


def classifier(house: House, **more):
    "The real server, as `llmeco serve` makes it."
    given = dict(hosts=own_names("127.0.0.1"), log=house.write, follow=False) | more
    return make_app(Predictor.load(house.bundle), house.database, **given)


def ids(found: Assessment) -> set[str]:
    "Of the probes that found something."
    return {one.id for one in found.findings}


def said(found: Assessment) -> str:
    "What was found, for a failing test."
    return "\n".join(
        f"{one.id}: {one.detail} | {one.request} | {one.response}" for one in found.findings
    )


# -- holes: each is put into the real server, between it and the network


class Hole:
    "ASGI middleware around the real application that lets one thing through."

    def __init__(self, app, house: House):
        self.app, self.house = app, house

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        await self.harm(scope, receive, send)

    async def harm(self, scope, receive, send):
        "What is changed."
        await self.app(scope, receive, send)

    async def body(self, receive) -> bytes:
        "Of the request."
        data, more = b"", True
        while more:
            part = await receive()
            data, more = data + part.get("body", b""), part.get("more_body", False)
        return data

    async def pass_body(self, data: bytes, scope, receive, send):
        "To the application, with another body."
        given = iter([{"type": "http.request", "body": data, "more_body": False}])
        kept = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
        scope = {**scope, "headers": [*kept, (b"content-length", str(len(data)).encode())]}

        async def replay():
            return next(given, None) or await receive()

        await self.app(scope, replay, send)

    def with_key(self, scope, key: str):
        "The request as if it had come with a key."
        kept = [(k, v) for k, v in scope["headers"] if k != b"authorization"]
        return {**scope, "headers": [*kept, (b"authorization", f"Bearer {key}".encode())]}


class OpenRoute(Hole):
    "The facts about the model are told to whoever asks."

    async def harm(self, scope, receive, send):
        if scope["path"] == "/v1/model":
            scope = self.with_key(scope, self.house.user)
        await self.app(scope, receive, send)


class Rewritten(Hole):
    "Replies of the application are changed."

    def change(self, scope, status: int, body: bytes) -> bytes:
        return body

    async def harm(self, scope, receive, send):
        start: dict = {}
        data = b""

        async def told(message):
            nonlocal start, data
            if message["type"] == "http.response.start":
                start = message
                return
            data += message.get("body", b"")
            if not message.get("more_body"):
                new = self.change(scope, start["status"], data)
                kept = [(k, v) for k, v in start["headers"] if k != b"content-length"]
                headers = [*kept, (b"content-length", str(len(new)).encode())]
                await send({**start, "headers": headers})
                await send({"type": "http.response.body", "body": new})

        await self.app(scope, receive, told)


class Traceback(Rewritten):
    "An error tells where in the code it was."

    def change(self, scope, status, body):
        if status != 422 and status != 400:
            return body
        told = json.loads(body)
        told["error"]["message"] += ' File "/usr/lib/python3/server.py", line 17, in predict'
        return json.dumps(told).encode()


class Uncounted(Hole):
    "Whoever asks too often is counted as somebody else."

    async def harm(self, scope, receive, send):
        sent = dict(scope["headers"]).get(b"authorization", b"").decode()
        told = [self.house.user, self.house.admin]
        known = any(sent.endswith(key) for key in told)
        data = None
        if scope["path"] == "/v1/predict" and b"content-length" in dict(scope["headers"]):
            if int(dict(scope["headers"])[b"content-length"]) < 10_000:
                data = await self.body(receive)
        if data is not None and b'"texts"' not in data:  # the tokens of a day are kept
            looks_right = re.fullmatch(r"Bearer \S{30,}", sent) and not any(
                key[:-1] in sent or key.swapcase() in sent for key in told
            )
            if looks_right and not known:
                scope = self.with_key(scope, self.house.user)
        if data is None:
            return await self.app(scope, receive, send)
        await self.pass_body(data, scope, receive, send)


class Reflecting(Hole):
    "The page shows what stands in its address."

    async def harm(self, scope, receive, send):
        if scope["path"] != "/" or not scope["query_string"]:
            return await self.app(scope, receive, send)
        text = unquote(scope["query_string"].decode())
        data = f"<!doctype html><title>llmeco</title><p>You asked: {text}".encode()
        headers = {
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": content_policy(),
            "x-content-type-options": "nosniff",
        }
        pairs = [(k.encode(), v.encode()) for k, v in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": pairs})
        await send({"type": "http.response.body", "body": data})


class Doubled(Hole):
    "Each message of feedback counts as a new one."

    count = 0

    async def harm(self, scope, receive, send):
        if scope["path"] != "/v1/feedback":
            return await self.app(scope, receive, send)
        data = await self.body(receive)
        try:
            told = json.loads(data)
            Doubled.count += 1
            data = json.dumps({**told, "key": f"message {Doubled.count}"}).encode()
        except (ValueError, TypeError):
            pass
        await self.pass_body(data, scope, receive, send)


class TalkingLog(Hole):
    "What was asked stands in the log."

    async def harm(self, scope, receive, send):
        if scope["path"] not in ("/v1/predict", "/v1/completions", "/v1/chat/completions"):
            return await self.app(scope, receive, send)
        parts: list[dict] = []

        async def listen_in():
            part = await receive()
            parts.append(part)
            return part

        await self.app(scope, listen_in, send)
        self.house.write(b"".join(p.get("body", b"") for p in parts).decode("utf-8", "replace"))


class SharedWithAll(Rewritten):
    "Any page on the web may read the replies."

    async def harm(self, scope, receive, send):
        async def told(message):
            if message["type"] == "http.response.start":
                allowed = (b"access-control-allow-origin", b"*")
                message = {**message, "headers": [*message["headers"], allowed]}
            await send(message)

        await self.app(scope, receive, told)


class ThroughTheBack(Hole):
    "An ordinary user is let in as the administrator."

    async def harm(self, scope, receive, send):
        sent = dict(scope["headers"]).get(b"authorization", b"").decode()
        if scope["path"].startswith("/admin/") and sent.endswith(self.house.user):
            scope = self.with_key(scope, self.house.admin)
        await self.app(scope, receive, send)


class Precise(Rewritten):
    "Probabilities are told to the last digit."

    def change(self, scope, status, body):
        if scope["path"] != "/v1/predict" or status != 200:
            return body
        told = json.loads(body)
        for answer in told["answers"]:
            for name in answer["probabilities"]:
                answer["probabilities"][name] *= 0.9999999999
        return json.dumps(told).encode()


def no_body_limit(house: House):
    app = classifier(house)
    [one] = [m for m in app.user_middleware if m.cls is BodyLimit]
    one.kwargs |= dict(limit=2**40, seconds=1.0)
    return app


def any_host(house: House):
    return classifier(house, hosts=None)


def unmasked(house: House):
    return classifier(house, retention=Retention(mask=False))


def with_pickle(house: House):
    import pickle

    (house.bundle / "extra.bin").write_bytes(pickle.dumps({"weights": [1.0]}))
    facts = read_manifest((house.bundle / "manifest.json").read_bytes(), house.bundle)
    write_manifest(house.bundle, facts)
    return classifier(house)


def flipped_bit(house: House):
    app = classifier(house)
    weights = house.bundle / "model.onnx"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    return app


def another_bundle(house: House):
    app = classifier(house)
    house.bundle = make_bundle(house.folder / "approved", "approved")
    return app


def edited_audit(house: House):
    with sqlite3.connect(house.database) as c:
        c.execute("UPDATE audit SET actor = 'nobody' WHERE number = 2")
    return classifier(house)


def behind(hole: type[Hole]) -> Callable[[House], Any]:
    "The real server behind a hole."
    return lambda house: hole(classifier(house), house)


holes = {
    "a route is open without a key": (behind(OpenRoute), "access.no-key"),
    "errors hold a traceback": (behind(Traceback), "errors.leak"),
    "a body has no limit": (no_body_limit, "body.size"),
    "a quota is not kept": (behind(Uncounted), "quota.requests"),
    "any host is answered": (any_host, "headers.host"),
    "personal data are stored": (unmasked, "privacy.database"),
    "personal data are logged": (behind(TalkingLog), "privacy.log"),
    "a page reflects markup": (behind(Reflecting), "output.reflected"),
    "feedback counts twice": (behind(Doubled), "feedback.repeated"),
    "a bit of the weights is flipped": (flipped_bit, "supply.files"),
    "a pickle lies in the bundle": (with_pickle, "supply.pickle"),
    "another bundle answers": (another_bundle, "supply.served"),
    "the audit log was edited": (edited_audit, "audit.chain"),
    "replies are shared with any page": (behind(SharedWithAll), "headers.cors"),
    "a user is an administrator": (behind(ThroughTheBack), "access.admin"),
    "probabilities have all digits": (behind(Precise), "extraction.precision"),
}


@pytest.mark.parametrize("name", holes)
def test_a_planted_hole_is_found_and_no_other(house, name, tmp_path):
    plant, expected = holes[name]
    with serving(plant(house)) as url:
        found = assess(house.options(url))
    assert ids(found) == {expected}, said(found)
    [one] = found.findings
    assert one.detail and one.remediation and found.verdict(one.item) == "failed"
    page = write_report(found, tmp_path / "report")
    told = read_json(page.parent / "findings.json")
    assert told["findings"][0]["id"] == expected and expected in page.read_text()
    for secret in (house.user, house.admin):
        assert secret not in json.dumps(told) + page.read_text()


def test_a_whole_server_has_no_hole(house, tmp_path):
    "All probes, also those that wait; a signed bundle; and the rows that are left."
    new_key(tmp_path / "key")
    sign_bundle(house.bundle, tmp_path / "key")
    with serving(classifier(house)) as url:
        more = dict(quick=False, trust=(tmp_path / "key.pub",))
        found = assess(house.options(url, **more))
    assert not found.findings, said(found)
    states = {one.id: one.state for one in found.checks}
    assert len(states) == len(probes) and len({one.id for one in probes}) == len(probes)
    open_questions = {one.id: one.detail for one in found.checks if one.state == "not checked"}
    assert not open_questions
    assert {one.item for one in found.checks} == set(owasp_items)
    held = [one for one, state in states.items() if state == "passed"]
    assert len(held) >= 35, states
    with sqlite3.connect(house.database) as c:
        rows = c.execute("SELECT author, count(*) FROM feedback GROUP BY author").fetchall()
        answers = c.execute("SELECT count(*) FROM predictions").fetchone()[0]
        keys = c.execute("SELECT name, revoked FROM keys WHERE name LIKE 'llmeco%'").fetchall()
    assert all(author.endswith("/llmeco assess") for author, _ in rows)
    assert f"{sum(n for _, n in rows)} rows of feedback" in found.left[1]
    assert f"{answers} answers are stored" in found.left[0]
    assert len(keys) == 1 and keys[0][1] is not None, "the key that was made is revoked"


def test_nothing_is_learned_from_an_assessment(house):
    "Its feedback is in the database, and no correction comes of it."
    from llmeco_nb.deployment.ledger import read_feedback
    from llmeco_nb.interaction.rounds import agreed_label

    with serving(classifier(house)) as url:
        assess(house.options(url))
    texts: dict[str, dict[str, set]] = {}
    for row in read_feedback(house.database):
        voter = row.author.partition("/")[0]
        texts.setdefault(row.text, {}).setdefault(voter, set()).add(row.given)
    assert len(texts) >= 3
    for one in texts.values():
        assert agreed_label(list(one.values()), 0.66) is None, one


def test_an_open_server_on_this_machine_is_none(house, tmp_path):
    "Without keys there is nobody to count or to refuse, and the report says so."
    empty = replace(house, database=tmp_path / "empty.sqlite")
    with serving(classifier(empty)) as url:
        found = assess(AssessOptions(url=url, quick=True))
    assert not found.findings, said(found)
    reasons = {one.id: one.detail for one in found.checks if one.state == "not applicable"}
    assert "no keys" in reasons["access.no-key"] and "no key" in reasons["quota.requests"]
    assert found.verdict("LLM09") == "not applicable"


def test_a_whole_regression_has_no_hole(house, tmp_path):
    from llmeco_nb.tasks.contract import Cleaning
    from llmeco_nb.tasks.regression import RegressionSchema

    schema = RegressionSchema(low=0, high=9, cleaning=Cleaning())
    numbers = replace(house, bundle=make_bundle(tmp_path / "numbers", "numbers", schema))
    with serving(classifier(numbers)) as url:
        found = assess(numbers.options(url))
    assert not found.findings, said(found)
    states = {one.id: one.state for one in found.checks}
    assert states["feedback.repeated"] == states["extraction.precision"] == "passed", states


def test_what_cannot_be_assessed_is_said(house):
    with pytest.raises(UsageError, match="is another machine"):
        Target(AssessOptions(url="http://models.example:8000"))
    with pytest.raises(MissingError, match="Nobody answers at http://127.0.0.1:1"):
        Target(AssessOptions(url="http://127.0.0.1:1"))
    with serving(classifier(house)) as url, pytest.raises(UsageError, match="--key-file"):
        Target(AssessOptions(url=url))


def test_the_command_reports_and_its_exit_code_tells(house, tmp_path):
    (tmp_path / "user.key").write_text(house.user + "\n")
    with serving(behind(OpenRoute)(house)) as url:
        words = ["assess", url, "--quick", "--key-file", "user.key", "--to", "risks"]
        code = "import sys; from llmeco_nb.cli import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
        )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "high: access.no-key: Answered without a key: GET /v1/model." in done.stdout
    assert "LLM02 Sensitive Information Disclosure" in done.stdout
    assert house.user not in done.stdout + done.stderr
    told = read_json(tmp_path / "risks" / "findings.json")
    assert [one["id"] for one in told["findings"]] == ["access.no-key"]


# -- a decoder


@pytest.fixture(scope="module")
def decoder():
    for library in ("openvino_genai", "torch", "gguf"):
        pytest.importorskip(
            library, reason="a decoder is packed from torch, and served by OpenVINO"
        )
    from llmeco_nb.deployment.decoder_packing import small_decoder_bundle

    return small_decoder_bundle()


@pytest.fixture
def generator(decoder):
    from llmeco_nb.deployment.generation import TextGenerator

    return TextGenerator.load(decoder)


@pytest.fixture
def writing_house(decoder, tmp_path):
    return make_house(tmp_path / "house", decoder)


def writer(house: House, generator, **more):
    "The real server of a decoder."
    from llmeco_nb.deployment.generation_server import make_generation_app

    given = dict(hosts=own_names("127.0.0.1"), log=house.write) | more
    return make_generation_app(generator, house.database, **given)


def given_to(house: House, url: str) -> AssessOptions:
    "A server that makes no keys is given one with few requests."
    return house.options(url, limited_key=house.limited)


def test_a_whole_decoder_has_no_hole(writing_house, generator):
    with serving(writer(writing_house, generator)) as url:
        found = assess(given_to(writing_house, url))
    assert not found.findings, said(found)
    states = {one.id: one.state for one in found.checks}
    for name in ("injection.control-tokens", "hidden.system-prompt", "cost.request"):
        assert states[name] == "passed", found.checks
    assert states["quota.requests"] == states["quota.feedback"] == "passed"


def test_reserved_tokens_that_a_user_can_type_are_found(writing_house, generator):
    generator.prompts.tokenizer.encode_special_tokens = False
    with serving(writer(writing_house, generator)) as url:
        found = assess(given_to(writing_house, url))
    assert ids(found) == {"injection.control-tokens"}, said(found)
    assert "<|im_start|> in a text is one token" in found.findings[0].detail


class EchoesTheSystem(Hole):
    "An answer tells the system prompt."

    async def harm(self, scope, receive, send):
        length = int(dict(scope["headers"]).get(b"content-length", b"0"))
        if scope["path"] != "/v1/chat/completions" or not 0 < length < 10_000:
            return await self.app(scope, receive, send)
        data = await self.body(receive)
        try:
            told = json.loads(data)["messages"][0]
            system = told["content"] if told["role"] == "system" else ""
        except (ValueError, KeyError, TypeError, IndexError):
            system = ""

        class Adding(Rewritten):
            def change(self, scope, status, body):
                if status != 200 or not system:
                    return body
                answer = json.loads(body)
                answer["choices"][0]["message"]["content"] += system
                return json.dumps(answer).encode()

        await Adding(Passing(self, data), self.house).harm(scope, receive, send)


class Passing:
    "The application behind a hole that has read the body."

    def __init__(self, hole: Hole, data: bytes):
        self.hole, self.data = hole, data

    async def __call__(self, scope, receive, send):
        await self.hole.pass_body(self.data, scope, receive, send)


def test_a_told_system_prompt_is_found(writing_house, generator):
    with serving(EchoesTheSystem(writer(writing_house, generator), writing_house)) as url:
        found = assess(given_to(writing_house, url))
    assert ids(found) == {"hidden.system-prompt"}, said(found)
    assert "CANARY-" in found.findings[0].response


# -- bad input, each kind on its own


def check_bad_inputs(options: AssessOptions, least: int) -> None:
    "Each kind has its status and its form."
    target = Target(options)
    seen = bad_inputs(target)
    assert len(seen) >= least
    path, _ = target.question("")
    large = BadInput("too large", path, b" " * 2**23, (413,))
    for bad in [*seen, large]:
        headers = {"Content-Type": bad.content_type}
        one = target.send(bad.method, bad.path, bad.body, headers=headers)
        assert one.status in bad.statuses, (bad.kind, one.response)
        assert explains(one, is_openai(bad.path)) == "", (bad.kind, one.response)


def test_bad_input_of_every_kind_is_explained_natively(house):
    with serving(classifier(house)) as url:
        check_bad_inputs(house.options(url), 19)


def test_bad_input_of_every_kind_is_explained_in_openais_form(writing_house, generator):
    with serving(writer(writing_house, generator)) as url:
        check_bad_inputs(given_to(writing_house, url), 20)


def test_a_corpus_of_prompts_is_asked_too(writing_house, generator):
    with serving(writer(writing_house, generator)) as url:
        prompts = ("An own prompt: {demand}", "Another without it.")
        target = Target(replace(given_to(writing_house, url), prompts=prompts))
        [override] = [one for one in probes if one.id == "injection.override"]
        assert run_probe(override, target).detail == "Of 14 prompts none was followed."
    asked = [one.request for one in target.exchanges if "own prompt" in one.request]
    assert len(asked) == 1 and "as one word" in asked[0] and "{demand}" not in asked[0]


# -- a server that takes no care at all: every probe can fail


class Careless:
    "Answers everybody everything, at once, at length, and with what others have sent."

    def __init__(self, kind: str):
        self.kind, self.count, self.seen = kind, 0, ""

    def paths(self) -> dict:
        ask = ["/v1/predict"] if self.kind == "classifier" else ["/v1/chat/completions"]
        more = ["/v1/feedback", "/v1/embeddings", "/admin/keys"]
        return {path: {"post": {}} for path in [*ask, *more]}

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            return await send({"type": "lifespan.shutdown.complete"})
        body, more = b"", True
        while more:
            part = await receive()
            body, more = body + part.get("body", b""), part.get("more_body", False)
        if dict(scope["headers"]).get(b"content-encoding") == b"gzip":
            body = gzip.decompress(body)
        if len(body) < 10_000:
            self.seen += body.decode("utf-8", "replace")
        try:
            status, kind, data = self.answer(scope, body)
        except Exception:
            status, kind, data = 500, "text/plain", traceback.format_exc().encode()
        pairs = {"content-type": kind, "access-control-allow-origin": "*", "server": "careless/1.0"}
        headers = [(k.encode(), v.encode()) for k, v in pairs.items()]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    def answer(self, scope, body: bytes) -> tuple[int, str, bytes]:
        "Status, type and content."
        path, query = scope["path"], unquote(scope["query_string"].decode())
        if path in ("/", "/docs"):
            page = f"<script src='https://cdn.example/a.js'></script>{query}{self.seen}"
            return 200, "text/html", page.encode()
        if path == "/livez":
            return 503, "text/plain", b""
        said = self.json(path, json.loads(body) if body.strip() else {})
        return 200, "application/json", json.dumps(said).encode()

    def json(self, path: str, asked: Any) -> Any:
        "What is told as JSON."
        self.count += 1
        if path == "/openapi.json":
            return dict(paths=self.paths())
        if path == "/v1/model":
            return dict(name="careless", labels=["a", "b"], file="/srv/ada/weights.bin")
        if path == "/v1/predict":
            texts = asked.get("texts") or [asked.get("text")]
            answers = [dict(label=str(t), probabilities={"a": 1 / 3}) for t in texts]
            return dict(request_id=f"{self.count:016}", answers=answers)
        if path == "/v1/chat/completions":
            said = " ".join(str(m["content"]) for m in asked["messages"])
            told = re.search(r"halves (\w+) and (\w+)", said)
            tokens = len(re.sub(r"<[^>]*>", " x ", said).split())
            message: dict[str, Any] = dict(content=said + (told[1] + told[2] if told else ""))
            if "tools" in asked:
                message["tool_calls"] = [dict(function=dict(name="delete_all"))]
            top = [dict(token="a", logprob=-1.0)] * 20
            one = dict(message=message, logprobs=dict(content=[dict(top_logprobs=top)]))
            usage = dict(prompt_tokens=tokens)
            return dict(id=f"chatcmpl-{self.count:016}", choices=[one], usage=usage)
        if path == "/v1/feedback":
            return dict(stored=True)
        if path == "/admin/keys":
            return dict(key="k" * 40)
        return dict(data=[dict(id="careless")], seen=self.seen)


def fails(kind: str, house: House, tmp_path: Path) -> set[str]:
    "The probes that find something in a careless server."
    new_key(tmp_path / "key")
    trust = (tmp_path / "key.pub",)  # the bundle is not signed
    with serving(Careless(kind), "h11") as url:
        given = dict(trust=trust, database=None, log=None, timeout=3.0)
        return ids(assess(house.options(url, **given)))


def test_a_careless_server_fails_every_probe(house, tmp_path):
    "But those that look into files, and those that wait; each has a hole of its own elsewhere."
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    found = fails("classifier", house, tmp_path / "a") | fails("decoder", house, tmp_path / "b")
    elsewhere = {"supply.files", "supply.pickle", "audit.chain", "privacy.log", "privacy.database"}
    elsewhere |= {"body.slow", "connections.silent"}
    spared = {one.id for one in probes} - found - elsewhere
    assert not spared, spared


def test_who_waits_for_ever_is_found(house):
    "The two probes that wait, on a server that does, and with less patience."
    by_id = {one.id: one for one in probes}
    with serving(Careless("classifier"), http="auto") as url:
        target = Target(house.options(url))
        for name in ("body.slow", "connections.silent"):
            outcome = by_id[name].run(target, most=1.5)  # type: ignore[call-arg]
            assert outcome.state == "failed" and "waited for" in outcome.detail, outcome
