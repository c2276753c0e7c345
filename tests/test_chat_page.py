"""The page to chat in: what it is over plain HTTP, and what it does in a browser if one is here."""

import asyncio
import base64
import hashlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

for library in ("fastapi", "uvicorn", "sqlalchemy", "openvino_genai"):
    pytest.importorskip(library, reason="serving needs the extra `serve`")
pytest.importorskip("torch", reason="a decoder is packed from torch")
pytest.importorskip("gguf", reason="packing needs the extra `pack`")
import httpx
from served import LiveApp
from sqlalchemy import select

from llmeco_nb.deployment.chat_page import chat_page, chat_script
from llmeco_nb.deployment.decoder_packing import small_decoder_bundle
from llmeco_nb.deployment.fair_queue import Busy
from llmeco_nb.deployment.generation import TextGenerator
from llmeco_nb.deployment.generation_engine import GenerationBatch
from llmeco_nb.deployment.generation_log import generations, read_rated_generations
from llmeco_nb.deployment.generation_server import make_generation_app
from llmeco_nb.deployment.key_admin import KeyAdmin
from llmeco_nb.deployment.keys import KeyOptions
from llmeco_nb.deployment.ledger import connect
from llmeco_nb.tasks.text_generation import TextChunk

MARKUP = '<script>window.ran = 1</script><img src="x" onerror="window.ran = 2"> & <b>bold</b>'


class ServedDecoder(LiveApp):
    "A decoder whose server is a thread of this process, so that a test can reach into its service."

    def __init__(self, generator: TextGenerator, database: Path):
        self.database = database
        super().__init__(make_generation_app(generator, database, log=lambda line: None))

    @property
    def service(self):
        "Writes the answers."
        return self.app.state.service

    def rows(self) -> list[tuple[str, str]]:
        "Text and finish_reason of all that is stored."
        engine = connect(self.database)
        with engine.connect() as c:
            found = c.execute(select(generations.c.text, generations.c.finish_reason)).all()
        engine.dispose()
        return [(text, why) for text, why in found]


@contextmanager
def live_app(database: Path, generator: TextGenerator | None = None) -> Iterator[ServedDecoder]:
    "One for the length of a `with` block."
    one = ServedDecoder(generator or TextGenerator.load(small_decoder_bundle()), database)
    try:
        yield one
    finally:
        one.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServedDecoder]:
    "One without keys."
    with live_app(tmp_path_factory.mktemp("chat") / "answers.sqlite") as one:
        yield one


def until(check, seconds: float = 15.0):
    "Wait until something holds; what it gave."
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.02)
    return found


# -- over plain HTTP


def test_the_page_comes_with_a_policy_that_names_its_one_script(server):
    reply = httpx.get(server.address)
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
    [script] = re.findall(r"<script[^>]*>(.*?)</script>", reply.text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = reply.headers["content-security-policy"]
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy
    assert "unsafe-eval" not in policy and "script-src 'unsafe-inline'" not in policy
    assert reply.headers["x-frame-options"] == "DENY" and "http" not in reply.text
    assert not re.search(r"\son\w+=", reply.text), "a handler in the markup would not run"


def test_every_field_has_a_label_and_every_button_a_text(server):
    class Reader(HTMLParser):
        fields, labelled, wrapped, depth = [], set(), 0, 0

        def handle_starttag(self, tag, attrs):
            told = dict(attrs)
            if tag == "label":
                self.depth += 1
                self.labelled |= {told.get("for")}
            if tag in ("input", "textarea"):
                self.fields.append((told["id"], self.depth > 0))
            if tag == "html":
                assert told["lang"] == "en"

        def handle_endtag(self, tag):
            self.depth -= tag == "label"

    reader = Reader()
    reader.feed(httpx.get(server.address).text)
    assert {name for name, _ in reader.fields} == {"key", "text", "temperature", "most"}
    assert all(inside or name in reader.labelled for name, inside in reader.fields)
    assert not re.search(r"<button[^>]*></button>", httpx.get(server.address).text)


@pytest.mark.parametrize("name", ['"><script>alert(1)</script>', "a'b\"c&d", "{name}"])
def test_a_name_is_text(name):
    class Reader(HTMLParser):
        found: dict = {}

        def handle_starttag(self, tag, attrs):
            if tag == "body":
                self.found = dict(attrs)

    page, reader = chat_page(name, dialogues=False), Reader()
    reader.feed(page)
    assert reader.found == {"data-model": name, "data-way": "text"}
    assert page.count("<script>") == 1 and chat_script in page


def test_once_a_key_exists_the_page_needs_one(tmp_path):
    "A browser asks for it, and sends it as a password."
    database = tmp_path / "answers.sqlite"
    admin = KeyAdmin(database, "a test")
    key, _ = admin.add(KeyOptions(name="ada"))
    admin.close()
    app = make_generation_app(TextGenerator.load(small_decoder_bundle()), database)

    async def check() -> None:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            refused = await client.get("/")
            assert refused.status_code == 401
            # a line each: Chromium asks for nothing where one line holds both
            assert 'Basic realm="llmeco"' in refused.headers.get_list("www-authenticate")
            asked = await client.post("/v1/chat/completions", json={})
            assert asked.headers.get_list("www-authenticate") == ["Bearer"], "the page asks"
            assert (await client.get("/", auth=("ada", key))).text.startswith("<!doctype html>")

    asyncio.run(check())


# -- in a browser


class Browser:
    "Headless chromium, which does what it is told over its debugging protocol."

    def __init__(self, program: str, profile: Path):
        websocket = pytest.importorskip("websocket", reason="a browser is driven by a WebSocket")
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        self.process = subprocess.Popen(
            [program, *words, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        told = profile / "DevToolsActivePort"
        until(lambda: told.exists() and len(told.read_text().split()) == 2, 60)
        port = told.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as reply:
            [page] = [one for one in json.loads(reply.read()) if one["type"] == "page"]
        self.socket = websocket.create_connection(
            page["webSocketDebuggerUrl"], suppress_origin=True, timeout=30
        )
        self.count, self.thrown = 0, []
        self.send("Runtime.enable")

    def send(self, method: str, **params):
        "A command; its result."
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while True:
            told = json.loads(self.socket.recv())
            if told.get("method") == "Runtime.exceptionThrown":
                self.thrown.append(told["params"])
            if told.get("id") == self.count:
                assert "error" not in told, told
                return told["result"]

    def run(self, code: str):
        "The value of an expression in the page."
        found = self.send(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, address: str) -> None:
        "Go there, and wait until the page stands."
        self.send("Page.navigate", url=address)
        until(
            lambda: self.run(
                "location.href !== 'about:blank' && document.readyState === 'complete' "
                "&& !!document.getElementById('ask')?.onsubmit"
            )
        )

    def fill(self, name: str, value: str) -> None:
        "Set a field by its id."
        self.run(f"document.getElementById('{name}').value = {json.dumps(value)}")

    def press(self, text: str) -> None:
        "Press the last button of this text."
        every = "[...document.querySelectorAll('button')]"
        self.run(f"{every}.findLast(b => b.innerText === '{text}').click()")

    def ask(self, text: str) -> None:
        "Type a message and press Enter."
        self.fill("text", text)
        self.run("document.getElementById('text').focus()")
        for kind in ("keyDown", "keyUp"):
            told = dict(key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
            self.send("Input.dispatchKeyEvent", type=kind, **told)

    def said(self) -> list[str]:
        "The texts of the dialogue."
        return self.run("[...document.querySelectorAll('#talk .text')].map(x => x.textContent)")

    def status(self) -> str:
        "What the page says of itself."
        return self.run("document.getElementById('status').textContent")

    def wait(self, part: str) -> str:
        "The status, once it has a part."
        return until(lambda: part in self.status() and self.status())


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Browser]:
    "One for all tests."
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("there is no chromium")
    one = Browser(program, tmp_path_factory.mktemp("chromium"))
    try:
        yield one
    finally:
        one.process.terminate()
        one.process.wait(20)


@pytest.fixture
def page(chromium, server) -> Iterator[Browser]:
    "The page, new; its script must not stumble."
    chromium.thrown.clear()
    chromium.open(server.address)
    yield chromium
    assert chromium.thrown == []


def written(*pieces: str):
    "Stands in for a service's `generate`: these pieces, and the end."

    async def generate(request):
        for i, piece in enumerate(pieces):
            yield TextChunk(piece, i + 1, prompt_tokens=3)
        yield TextChunk("", len(pieces), "stop", 3)

    return generate


def test_an_answer_appears_and_is_judged(page, server):
    page.fill("temperature", "0")
    page.ask("What of film 12?")
    page.wait("complete")
    asked, answer = page.said()
    assert asked == "What of film 12?" and answer.endswith("was long, and nobody left.")
    assert server.rows()[-1] == (answer, "stop")
    page.press("Poor")
    page.wait("Thank you")
    page.press("Write a better one")
    page.run("document.querySelector('#talk form textarea').value = 'Film 12 was short.'")
    page.press("Send it")
    until(lambda: len(read_rated_generations(server.database)) == 2)
    poor, better = read_rated_generations(server.database)
    assert not poor.correct and better.better == "Film 12 was short." and better.author == "page"
    assert poor.prompt == [("user", "What of film 12?")]
    page.ask("What of film 31?")
    until(lambda: len(page.said()) == 4)
    page.wait("complete")
    assert server.rows()[-1][1] == "stop"


def test_markup_stays_text(page, server, monkeypatch):
    "In a message, in an answer, however it is cut into pieces, and in a better answer."
    monkeypatch.setattr(server.service, "generate", written(MARKUP[:5], MARKUP[5:], MARKUP))
    page.ask(MARKUP)
    page.wait("complete")
    assert page.said() == [MARKUP, MARKUP * 2]
    page.press("Write a better one")
    assert page.run("document.querySelectorAll('#talk script, #talk img, #talk b').length") == 0
    page.run("new Promise(done => setTimeout(done, 100))")
    assert page.run("typeof window.ran") == "undefined"
    # where markup is parsed after all, the policy holds
    page.run(f"document.getElementById('talk').innerHTML = {json.dumps(MARKUP)}")
    page.run("new Promise(done => setTimeout(done, 100))")
    assert page.run("typeof window.ran") == "undefined"


def test_events_are_read_wherever_the_network_cuts_them(page):
    "Byte by byte, and so within a character, too."
    told = [dict(text="naïve 日本語 🦊"), dict(text="a\n\nb: data: c"), dict(text="")]
    body = "".join(f"data: {json.dumps(one, ensure_ascii=False)}\n\n" for one in told)
    code = f"""(async () => {{
      const bytes = [...new TextEncoder().encode({json.dumps(body + "data: [DONE]" + chr(10) * 2)})]
      const body = new ReadableStream({{
        pull: to => bytes.length ? to.enqueue(new Uint8Array([bytes.shift()])) : to.close()
      }})
      const found = []
      for await (const one of events({{body}})) found.push(one)
      return found
    }})()"""
    assert page.run(code) == told


def test_the_end_stays_in_sight_unless_somebody_scrolls_up(page, server, monkeypatch):
    async def lines(request):
        for i in range(200):
            yield TextChunk(f"line {i}\n", i + 1)
            await asyncio.sleep(0.002)
        yield TextChunk("", 200, "stop")

    monkeypatch.setattr(server.service, "generate", lines)
    below = "(t => t.scrollHeight - t.clientHeight - t.scrollTop)(document.getElementById('talk'))"
    page.ask("x")
    page.wait("complete")
    until(lambda: page.run(below) < 40)
    page.ask("y")
    until(lambda: "line 9" in page.said()[-1])
    page.run("document.getElementById('talk').scrollTop -= 300")
    page.wait("complete")
    assert page.run(below) > 200


def test_stop_cancels_at_the_server(page, server, monkeypatch):
    step = GenerationBatch.step

    def slowly(self):
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(GenerationBatch, "step", slowly)
    before = len(server.rows())
    page.fill("temperature", "2")
    page.fill("most", "200")
    page.ask("What of film 12?")
    until(lambda: len(page.said()) == 2 and page.said()[1])
    page.press("Stop")
    page.wait("Stopped.")
    until(lambda: len(server.rows()) == before + 1)
    text, why = server.rows()[-1]
    assert why == "cancelled" and text.startswith(page.said()[1])
    until(lambda: not server.service.executor.slots)
    page.press("Good")
    page.wait("Thank you")


def test_to_start_anew_stops_and_forgets(page, server, monkeypatch):
    asked = []

    async def endless(request):
        asked.append(request.prompt)
        while True:
            yield TextChunk("word ", 1)
            await asyncio.sleep(0.02)

    monkeypatch.setattr(server.service, "generate", endless)
    page.ask("first")
    until(lambda: len(page.said()) == 2 and page.said()[1])
    page.press("Start anew")
    assert page.said() == [] and page.status() == ""
    monkeypatch.setattr(server.service, "generate", written("Yes."))
    page.ask("second")
    page.wait("complete")
    assert page.said() == ["second", "Yes."] and len(asked) == 1


def test_a_refusal_is_said_and_the_message_comes_back(page, server, monkeypatch):
    async def busy(request):
        raise Busy(7)
        yield

    with monkeypatch.context() as patch:
        patch.setattr(server.service, "generate", busy)
        page.ask("Hello?")
        assert page.wait("429").endswith("Too many requests are waiting. Ask again in 7 s.")
    assert page.run("document.getElementById('text').value") == "Hello?" and page.said() == []
    page.fill("most", "100000")
    page.press("Send")
    assert "max_tokens is 100,000" in page.wait("Refused (400)")
    page.fill("most", "")
    page.fill("text", "\0")
    page.press("Send")
    assert "U+0000" in page.wait("U+0000")

    async def broken(request):
        yield TextChunk("Half of ", 1)
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(server.service, "generate", broken)
    page.ask("Hello?")
    assert page.wait("made a mistake") and page.said()[1] == "Half of "


def test_a_key_is_asked_for_when_one_is_needed(chromium, tmp_path):
    "Keys come to be while the page is open; and the browser's own way to send one works, too."
    with live_app(tmp_path / "answers.sqlite") as server:
        chromium.open(server.address)
        admin = KeyAdmin(server.database, "a test")
        key, _ = admin.add(KeyOptions(name="ada"))
        admin.close()
        until(lambda: httpx.get(server.address).status_code == 401)
        chromium.ask("What of film 12?")
        assert "needs a key" in chromium.wait("Refused (401)")
        assert chromium.run("!document.getElementById('door').hidden")
        chromium.fill("key", "wrong")
        chromium.press("Use this key")
        chromium.wait("is not known")
        chromium.fill("key", key)
        chromium.press("Use this key")
        chromium.wait("complete")
        assert chromium.said()[0] == "What of film 12?"
        chromium.press("Good")
        chromium.wait("Thank you")
        [rated] = read_rated_generations(server.database)
        assert rated.author == "ada/page"
        chromium.open(server.address.replace("//", f"//ada:{key}@"))
        until(lambda: chromium.said() == [])
        chromium.ask("What of film 12?")
        chromium.wait("complete")


def test_a_decoder_without_dialogues_continues_texts(chromium, tmp_path):
    "Each text by itself: what was asked before is no part of it."
    generator = TextGenerator.load(small_decoder_bundle())
    generator.schema = replace(generator.schema, chat_format="")
    with live_app(tmp_path / "answers.sqlite", generator) as server:
        chromium.open(server.address)
        assert chromium.run("document.title") == "Texts of small"
        chromium.fill("most", "5")
        for text in ("Film 12", "Film 31 was"):
            chromium.ask(text)
            until(lambda text=text: text in chromium.said())
            until(lambda: not chromium.run("document.getElementById('send').disabled"))
        chromium.press("Good")
        chromium.wait("Thank you")
        [rated] = read_rated_generations(server.database)
        assert rated.prompt == [("", "Film 31 was")] and rated.text == chromium.said()[3]
