"""Decoders and sentence encoders in the registry: exchanged under load, each answer is of one
model, which it names, and none fails; what cannot be served leaves the old model answering."""

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

for library in ("fastapi", "casbin", "sqlalchemy", "openvino_genai"):
    pytest.importorskip(library, reason="serving needs the extra `serve`")
pytest.importorskip("torch", reason="a decoder is packed from torch")
pytest.importorskip("gguf", reason="packing needs the extra `pack`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
import httpx
import numpy as np
from fastapi import FastAPI
from smallbundle import make_bundle
from sqlalchemy import select

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.deployment.decoder_manifest import verify_decoder, write_decoder_manifest
from llmeco_nb.deployment.decoder_packing import small_decoder_bundle
from llmeco_nb.deployment.embedding_packing import small_embedding_bundle
from llmeco_nb.deployment.embedding_server import make_embedding_app
from llmeco_nb.deployment.embeddings import (
    SentenceEncoder,
    verify_encoder,
    write_encoder_manifest,
)
from llmeco_nb.deployment.exchange import ModelFollower
from llmeco_nb.deployment.generation import TextGenerator
from llmeco_nb.deployment.generation_executor import GenerationOptions
from llmeco_nb.deployment.generation_log import generations
from llmeco_nb.deployment.generation_server import load_checked, make_generation_app
from llmeco_nb.deployment.generation_service import GenerationRequest, GenerationService
from llmeco_nb.deployment.key_admin import KeyAdmin
from llmeco_nb.deployment.keys import KeyOptions, anybody
from llmeco_nb.deployment.ledger import Conflict, Ledger
from llmeco_nb.deployment.registry import Registry
from llmeco_nb.deployment.serve_command import ServeChoice, serve
from llmeco_nb.deployment.server import make_app
from llmeco_nb.deployment.server_options import ServerOptions
from llmeco_nb.deployment.serving import open_served
from llmeco_nb.tasks.text_generation import ChatMessage, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
QUESTION = [{"role": "user", "content": "What of film 12?"}]
ASKED = dict(model="small", messages=QUESTION, temperature=0, max_tokens=24)


def turned_decoder(folder: Path, name: str = "small") -> Path:
    """The small decoder whose words `long` and `left` have changed places in the tokenizer: the
    same weights write another answer."""
    shutil.copytree(small_decoder_bundle(), folder)
    told = json.loads((folder / "tokenizer.json").read_text())
    words = told["model"]["vocab"]
    words["Ġlong"], words["Ġleft"] = words["Ġleft"], words["Ġlong"]
    (folder / "tokenizer.json").write_text(json.dumps(told))
    manifest = replace(verify_decoder(small_decoder_bundle()), name=name)
    write_decoder_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def decoders(tmp_path_factory) -> dict[str, Path]:
    "`one` and `two` have one name, and answer the same question with other words."
    two = turned_decoder(tmp_path_factory.mktemp("decoders") / "two")
    return {"one": small_decoder_bundle(), "two": two}


@pytest.fixture(scope="module")
def answers(decoders) -> dict[str, str]:
    "Digest -> what the model answers to the question, asked alone."
    found = {}
    for folder in decoders.values():
        generator = TextGenerator.load(folder)
        asked = [ChatMessage(role="user", content=QUESTION[0]["content"])]
        greedy = SamplingParams(max_tokens=24, temperature=0)
        pieces = generator.generate(generator.prepare_dialogue(asked, greedy))
        found[generator.digest] = "".join(piece.text for piece in pieces)
        generator.close()
    assert len(set(found.values())) == 2
    return found


@pytest.fixture
def registry(tmp_path, decoders):
    "With both, the first of which is the champion."
    one = Registry(tmp_path / "f.sqlite", "a test")
    for folder in decoders.values():
        one.register(folder)
    one.promote("small@1")
    yield one
    one.close()


@asynccontextmanager
async def asking(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    "A client of an application that runs."
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
    ):
        yield client


async def until(check: Callable[[], bool], seconds: float = 20.0) -> None:
    "Wait until something holds."
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it does not come to hold"
        await asyncio.sleep(0.02)


def follows(app: FastAPI, revision: int) -> Callable[[], bool]:
    "Whether the server answers as a deployment says."
    return lambda: app.state.follower.facts().get("revision") == revision


def decoder_app(folder: Path, where: Path, **more) -> FastAPI:
    "A server of a decoder that follows."
    return make_generation_app(TextGenerator.load(folder), where, **more)


async def streamed(client: httpx.AsyncClient) -> tuple[str, str]:
    "Digest and text of an answer that is sent piece by piece."
    reply = await client.post("/v1/chat/completions", json={**ASKED, "stream": True})
    assert reply.status_code == 200, reply.text
    *lines, end = [one for one in reply.text.split("\n\n") if one]
    assert end == "data: [DONE]", reply.text
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    [digest] = {one["system_fingerprint"] for one in chunks}
    return digest, "".join(one["choices"][0]["delta"].get("content", "") for one in chunks)


async def whole(client: httpx.AsyncClient) -> tuple[str, str]:
    "Likewise of one that is sent when it is complete."
    reply = await client.post("/v1/chat/completions", json=ASKED)
    assert reply.status_code == 200, reply.text
    told = reply.json()
    return told["system_fingerprint"], told["choices"][0]["message"]["content"]


# --- decoders


def test_under_load_no_answer_fails_and_none_is_of_two_models(
    registry, decoders, answers, tmp_path
):
    "Twelve clients ask without a pause while the champion changes to and fro."
    app = decoder_app(decoders["one"], tmp_path / "f.sqlite")
    seen: list[tuple[str, str]] = []

    async def client_loop(client, number: int, ends: asyncio.Event) -> None:
        while not ends.is_set():
            seen.append(await (whole if number % 2 else streamed)(client))

    async def check() -> None:
        async with asking(app) as client:
            ends = asyncio.Event()
            clients = [asyncio.create_task(client_loop(client, i, ends)) for i in range(12)]
            follower = app.state.follower
            for name in ("small@2", "small@1", "small@2"):
                revision = registry.promote(name).revision
                follower.wake.set()
                await until(follows(app, revision))
                count = len(seen)
                await until(lambda: len(seen) > count + 24)
            ends.set()
            await asyncio.gather(*clients)
            await until(lambda: not app.state.service.unfinished())
            last = await whole(client)
            assert last[0] == registry.history()[-1].champion

    asyncio.run(check())
    assert {digest for digest, _ in seen} == set(answers), "both have answered"
    assert all(text == answers[digest] for digest, text in seen)
    ledger = Ledger(tmp_path / "f.sqlite")
    with ledger.engine.connect() as c:
        rows = c.execute(select(generations.c.model, generations.c.text)).all()
        ended = set(c.execute(select(generations.c.finish_reason)).scalars())
    ledger.close()
    assert len(rows) == len(seen) + 1 and ended == {"stop"}
    assert all(text == answers[digest] for digest, text in rows), "what is stored is what was told"


def test_what_is_at_work_is_finished_by_the_model_that_began_it(registry, decoders, tmp_path):
    "A long answer goes on with the old engine, which is released when the answer is complete."
    service = GenerationService(TextGenerator.load(decoders["one"]), Ledger(tmp_path / "f.sqlite"))
    sampling = SamplingParams(max_tokens=200, temperature=2, seed=3)

    def ask() -> GenerationRequest:
        return GenerationRequest(
            request_id=uuid.uuid4().hex, who=anybody, sampling=sampling, text="Film 12 was"
        )

    async def read(pieces) -> str:
        return "".join([piece.text async for piece in pieces])

    async def check() -> None:
        alone = await read(service.generate(ask()))
        old = service.generator
        pipeline = weakref.ref(old.engine)
        pieces = service.generate(ask())
        begun = (await anext(pieces)).text
        await service.exchange(TextGenerator.load(decoders["two"]))
        assert service.unfinished() == 1 and old.digest in service.predictors()
        assert service.generator.digest != old.digest
        assert begun + await read(pieces) == alone
        await until(lambda: not service.unfinished())
        assert old.engine.pipeline is None, "its memory has been given back"
        assert list(service.predictors()) == [service.generator.digest]
        del old, pieces
        await until(lambda: pipeline() is None)
        await service.close()

    asyncio.run(check())
    service.ledger.close()


def test_a_request_keeps_the_model_to_which_it_came(registry, decoders, answers, tmp_path):
    "Also if that is exchanged between its arrival and its first step."
    service = GenerationService(TextGenerator.load(decoders["one"]), Ledger(tmp_path / "f.sqlite"))

    async def check() -> None:
        first = service.generator.digest
        judged = service.guard.check

        async def slow(*args):
            other = TextGenerator.load(decoders["two"])
            other.prepare_dialogue = lambda *args: 1 / 0  # the prompt is the first model's, too
            await service.exchange(other)
            return await judged(*args)

        service.guard.check = slow
        greedy = SamplingParams(max_tokens=24, temperature=0)
        message = ChatMessage(role="user", content=QUESTION[0]["content"])
        asked = GenerationRequest(
            request_id="r", who=anybody, sampling=greedy, messages=[message], by=service.executor
        )
        said = "".join([piece.text async for piece in service.generate(asked)])
        assert said == answers[first] and service.generator.digest != first
        await service.close()

    asyncio.run(check())
    service.ledger.close()
    with service.ledger.engine.connect() as c:
        [digest] = c.execute(select(generations.c.model)).scalars()
    assert digest == registry.history()[0].champion


def followed(folder: Path, where: Path, work, options=GenerationOptions(), load=None):
    "What `work(service, follower)` returns, and what the follower has said."
    said: list[str] = []

    async def run():
        service = GenerationService(TextGenerator.load(folder), Ledger(where), options=options)
        opens = load or (lambda folder: load_checked(folder, service.engine_options, None))
        follower = ModelFollower(service, opens, said.append)
        await follower.step()
        try:
            return await work(service, follower)
        finally:
            follower.thread.close()
            await service.close()
            service.ledger.close()

    return asyncio.run(run()), said


def test_a_rollback_brings_the_old_model_back(registry, decoders, tmp_path):
    "At once while it still has an answer to finish, and opened anew once it is gone."

    async def work(service, follower):
        first = service.generator
        registry.promote("small@2")
        with service.using():
            await follower.step()
            assert service.generator is not first and service.unfinished() == 1
            registry.roll_back("too short")
            await follower.step()
            assert service.generator is first, "it was still there"
        await until(lambda: not service.unfinished())
        assert first.engine.pipeline is not None
        registry.roll_back()
        await follower.step()
        await until(lambda: not service.unfinished())
        registry.roll_back()
        await follower.step()
        assert service.generator is not first and service.generator.digest == first.digest
        return follower.deployment

    deployment, said = followed(decoders["one"], tmp_path / "f.sqlite", work)
    assert deployment == registry.history()[-1] and deployment.revision == 5
    assert said[-1] == "Deployment 5 answers: small@1."
    assert [one.reason for one in registry.history()][2] == "too short"


def test_a_third_decoder_waits_until_the_first_is_gone(registry, decoders, tmp_path):
    registry.register(turned_decoder(tmp_path / "three", "third"))

    async def work(service, follower):
        with service.using():
            registry.promote("small@2")
            await follower.step()
            registry.promote("third")
            await follower.step()
            assert "waits" in follower.problem and len(service.predictors()) == 2
        await until(lambda: not service.unfinished())
        await follower.step()
        assert service.model_name == "third" and not follower.problem

    followed(decoders["one"], tmp_path / "f.sqlite", work)


def test_a_decoder_that_nobody_lets_go_is_closed_after_the_deadline(registry, decoders, tmp_path):
    "A client that reads for ever keeps two decoders in memory no longer than an answer may take."

    async def work(service, follower):
        first = service.generator
        with service.using():
            registry.promote("small@2")
            await follower.step()
            await until(lambda: not service.unfinished())
        assert first.engine.pipeline is None and not service.users

    options = GenerationOptions(deadline=1.0)
    followed(decoders["one"], tmp_path / "f.sqlite", work, options)


def test_a_bundle_of_another_kind_is_refused_and_said(decoders, tmp_path):
    "The first deployment of a database may be of any kind, whatever a server of it answers."
    registry = Registry(tmp_path / "f.sqlite", "a test")
    registry.register(make_bundle(tmp_path / "words"))
    registry.register(decoders["one"])
    registry.promote("words")
    with pytest.raises(UsageError, match="one task"):
        registry.promote("small")
    registry.close()

    async def work(service, follower):
        assert "answers text-generation, and words@1 is for text-class" in follower.problem
        assert follower.deployment is None and service.model_name == "small"
        assert follower.facts() == dict(
            problem="The newest deployment cannot be followed; the log says why."
        )

    _, said = followed(decoders["one"], tmp_path / "f.sqlite", work, load=lambda folder: 1 / 0)
    assert len(said) == 1


def test_a_classifier_refuses_a_decoder(decoders, tmp_path):
    registry = Registry(tmp_path / "f.sqlite", "a test")
    registry.register(decoders["one"])
    registry.promote("small")
    registry.close()
    lines: list[str] = []
    app = make_app(make_bundle(tmp_path / "words"), tmp_path / "f.sqlite", log=lines.append)

    async def check() -> None:
        async with asking(app) as client:
            await until(lambda: bool(app.state.follower.problem))
            facts = (await client.get("/v1/model")).json()
            assert facts["name"] == "words" and "problem" in facts["deployment"]
            reply = await client.post("/v1/predict", json={"text": "good"})
            assert reply.json()["answers"][0]["label"] == "positive"

    asyncio.run(check())
    assert any("small@1 is for text-generation. Start another server" in line for line in lines)


def test_a_damaged_bundle_leaves_the_old_model_answering(registry, decoders, answers, tmp_path):
    spoiled = turned_decoder(tmp_path / "spoiled", "spoiled")
    good = (spoiled / "model.gguf").read_bytes()
    registry.register(spoiled)
    (spoiled / "model.gguf").write_bytes(good[:-1])
    with pytest.raises(DataError, match=r"model\.gguf"):
        registry.register(spoiled)
    app = decoder_app(decoders["one"], tmp_path / "f.sqlite")
    first = verify_decoder(decoders["one"]).digest

    async def check() -> None:
        async with asking(app) as client:
            follower = app.state.follower
            await until(lambda: follower.deployment is not None)
            registry.promote("spoiled")
            follower.wake.set()
            await until(lambda: bool(follower.problem))
            assert "spoiled@1 cannot be opened" in follower.problem
            assert "model.gguf" in follower.problem
            assert await whole(client) == (first, answers[first])
            facts = (await client.get("/v1/model")).json()
            assert facts["digest"] == facts["deployment"]["champion"] == first
            assert facts["deployment"]["problem"] and str(tmp_path) not in str(facts)
            assert "llmeco_deployment_followed 0.0" in (await client.get("/metrics")).text
            (spoiled / "model.gguf").write_bytes(good)
            follower.retry_at = 0.0
            await until(lambda: not follower.problem)
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == "spoiled"

    asyncio.run(check())


def test_what_opens_and_cannot_answer_is_not_taken(registry, decoders, tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("no kernel for this")

    async def work(service, follower):
        first = service.generator
        monkeypatch.setattr(TextGenerator, "check_answers", broken)
        registry.promote("small@2")
        await follower.step()
        assert "no kernel for this" in follower.problem and service.generator is first
        monkeypatch.undo()
        monkeypatch.setattr(TextGenerator, "measure", broken)
        follower.retry_at = 0.0
        await follower.step()
        assert "Deployment 2 cannot be followed: no kernel" in follower.problem
        assert service.generator is first and not service.unfinished()

    followed(decoders["one"], tmp_path / "f.sqlite", work)


def test_a_folder_with_another_decoder_than_was_registered_is_not_opened(
    registry, decoders, tmp_path
):
    place = turned_decoder(tmp_path / "place", "first")
    registry.register(place)
    write_decoder_manifest(place, replace(verify_decoder(place), name="second"))

    async def work(service, follower):
        registry.promote("first")
        await follower.step()
        assert "was registered as" in follower.problem and service.model_name == "small"

    followed(decoders["one"], tmp_path / "f.sqlite", work)


# --- the registry


def test_canary_and_shadow_of_a_decoder_are_refused_by_name(registry, tmp_path):
    said = (
        r"small@2 is for text-generation and cannot be a {}: answers are compared for "
        r"text-classification and regression and multi-label-classification and "
        r"text-pair-classification only\. "
        r"Promote it \(llmeco models promote small@2\)"
    )
    with pytest.raises(UsageError, match=said.format("canary")):
        registry.canary("small@2", 0.1)
    with pytest.raises(UsageError, match=said.format("shadow")):
        registry.shadow("small@2")
    registry.register(small_embedding_bundle())
    with pytest.raises(UsageError, match="tiny@1 is for feature-extraction and cannot be a canary"):
        registry.canary("tiny", 0.1)
    assert len(registry.history()) == 1, "nothing was stored"


def _promotes(where, name, seen, results):
    one = Registry(where, name)
    try:
        one.promote(name, seen=seen)
        results.put(name)
    except Conflict:
        results.put("")
    finally:
        one.close()


def test_of_two_operators_who_decide_on_one_revision_one_succeeds(registry, tmp_path):
    for i in (3, 4, 5, 6):
        registry.register(turned_decoder(tmp_path / f"d{i}", f"own{i}"))
    context, results = multiprocessing.get_context("fork"), None
    results = context.Queue()
    names = [f"own{i}" for i in (3, 4, 5, 6)]
    them = [
        context.Process(target=_promotes, args=(tmp_path / "f.sqlite", name, 1, results))
        for name in names
    ]
    for one in them:
        one.start()
    told = [results.get(timeout=60) for _ in them]
    for one in them:
        one.join()
    [winner] = filter(None, told)
    newest = registry.history()[-1]
    assert newest.revision == 2 and newest.actor == winner
    with pytest.raises(Conflict, match="newer"):
        registry.roll_back(seen=1)
    assert registry.verify()[0] == 6 + 2, "no refused change stands in the log"


def test_over_http_an_operator_promotes_a_decoder(registry, decoders, tmp_path):
    admin = KeyAdmin(tmp_path / "f.sqlite", "a test")
    operator, _ = admin.add(KeyOptions(name="olga", role="operator"))
    user, _ = admin.add(KeyOptions(name="uwe"))
    admin.close()
    app = decoder_app(decoders["one"], tmp_path / "f.sqlite")

    async def check() -> None:
        async with asking(app) as client:

            async def change(key: str, **body):
                head = {"Authorization": f"Bearer {key}"}
                return await client.post("/admin/deployments", json=body, headers=head)

            assert (await change(user, action="rollback")).status_code == 403
            reply = await change(operator, action="canary", model="small@2")
            assert reply.status_code == 422
            assert "cannot be a canary" in reply.json()["error"]["message"]
            reply = await change(operator, action="promote", model="small@2", revision=1)
            assert reply.status_code == 200
            reply = await change(operator, action="rollback", revision=1)
            assert reply.status_code == 409
            await until(follows(app, 2))
            client.headers["Authorization"] = f"Bearer {user}"
            assert (await whole(client))[0] == verify_decoder(decoders["two"]).digest

    asyncio.run(check())


# --- sentence encoders


def turned_encoder(folder: Path) -> Path:
    "The tiny encoder, which does not scale its vectors."
    shutil.copytree(small_embedding_bundle(), folder)
    manifest = verify_encoder(folder)
    schema = replace(manifest.schema, normalise=not manifest.schema.normalise)
    pooling = "cls" if manifest.schema.pooling == "mean" else "mean"
    write_encoder_manifest(folder, replace(manifest, schema=replace(schema, pooling=pooling)))
    return folder


def test_encoders_are_exchanged_under_load(tmp_path):
    "Both give the same vectors; which of them gave one, its reply says."
    where, first = tmp_path / "f.sqlite", small_embedding_bundle()
    registry = Registry(where, "a test")
    versions = [registry.register(one) for one in (first, turned_encoder(tmp_path / "two"))]
    registry.promote("tiny@1")
    app = make_embedding_app(SentenceEncoder.load(first), where)
    seen: list[str] = []

    async def ask(client, ends: asyncio.Event) -> None:
        while not ends.is_set():
            texts = ["A good film.", "Rain."]
            reply = await client.post("/v1/embeddings", json=dict(model="tiny", input=texts))
            assert reply.status_code == 200, reply.text
            seen.append(reply.json()["system_fingerprint"])
            vectors = np.array([one["embedding"] for one in reply.json()["data"]])
            assert vectors.shape == (2, 64)

    async def check() -> None:
        async with asking(app) as client:
            ends, follower = asyncio.Event(), app.state.follower
            clients = [asyncio.create_task(ask(client, ends)) for _ in range(6)]
            for change in (lambda: registry.promote("tiny@2"), registry.roll_back):
                revision = change().revision
                follower.wake.set()
                await until(follows(app, revision))
                count = len(seen)
                await until(lambda: len(seen) > count + 12)
            ends.set()
            await asyncio.gather(*clients)
            await until(lambda: not app.state.service.unfinished())
            facts = (await client.get("/v1/model")).json()
            assert facts["digest"] == versions[0].digest and facts["kind"] == "sentence-encoder"

    asyncio.run(check())
    assert set(seen) == {one.digest for one in versions}
    assert seen[-1] == versions[0].digest
    registry.close()


# --- options of the engine, and the terminal


def test_an_engine_has_the_options_that_were_typed_also_after_an_exchange(
    registry, decoders, tmp_path
):
    engine = dict(max_num_seqs=2, kv_cache_tokens=64, max_num_batched_tokens=32, threads=1)
    holds = {one.digest: one for one in registry.models()}[registry.history()[-1].champion]
    served = open_served(ServerOptions(engine=engine), holds, tmp_path / "f.sqlite", None)
    app = served.app

    async def check() -> None:
        async with asking(app) as client:
            client.headers["host"] = "127.0.0.1:8000"
            for revision in (1, 2):
                await until(follows(app, revision))
                assert asdict(app.state.service.generator.options) == engine
                told = {**ASKED, "max_tokens": 63}
                reply = await client.post("/v1/chat/completions", json=told)
                assert reply.status_code == 400
                assert "the model reads 64 in all" in reply.json()["error"]["message"]
                if revision == 1:
                    registry.promote("small@2")
                    app.state.follower.wake.set()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("kind", "typed", "about"),
    [
        ("decoder", dict(threads=-1), "threads is -1; give 1 or more"),
        ("decoder", dict(max_num_seqs=9, max_num_batched_tokens=8), "max_num_seqs is 9"),
        ("classifier", dict(threads=2), r"--threads: .*words holds a bundle of the kind onnx"),
        (
            "encoder",
            dict(max_num_seqs=2, kv_cache_tokens=9),
            "--max-num-seqs, --kv-cache-tokens: .* sentence-encoder. Leave it out",
        ),
    ],
)
def test_options_that_no_engine_can_keep_to_are_refused(decoders, tmp_path, kind, typed, about):
    if kind == "decoder":
        bundle = decoders["one"]
    elif kind == "encoder":
        bundle = small_embedding_bundle()
    else:
        bundle = make_bundle(tmp_path / "words")
    choice = ServeChoice(bundle=str(bundle), port=0, database=str(tmp_path / "f.sqlite"), **typed)
    with pytest.raises(UsageError, match=about):
        serve(choice)


def test_the_command_line_deploys_a_decoder_and_the_server_follows(decoders, answers, tmp_path):
    "`llmeco serve` without a bundle answers with the registry's champion, whatever its kind."
    where = tmp_path / "f.sqlite"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LLMECO_RUNS": str(tmp_path / "runs")}

    def llmeco(*words):
        line = [sys.executable, "-c", "from llmeco_nb.cli import main; main()", *words]
        return subprocess.Popen(
            line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def models(*words):
        done = llmeco("models", *words, "--database", str(where))
        out, error = done.communicate(timeout=60)
        return done.returncode, out + error

    code, out = models("register", str(decoders["one"]))
    assert code == 0 and "small@1 is" in out
    assert models("promote", str(decoders["one"]))[0] == 0
    server = llmeco("serve", "--port", "0", "--database", str(where), "--deadline", "60")
    try:
        line = server.stdout.readline()
        at = line.split(" answers at ")[1].split()[0]

        def answer() -> str:
            told = httpx.post(f"{at}/v1/chat/completions", json=ASKED).json()
            said = told["choices"][0]["message"]["content"]
            assert said == answers[told["system_fingerprint"]]
            return told["system_fingerprint"]

        def becomes(folder: Path) -> None:
            deadline, digest = time.monotonic() + 20, verify_decoder(folder).digest
            while answer() != digest:
                assert time.monotonic() < deadline
                time.sleep(0.05)

        becomes(decoders["one"])
        code, out = models("promote", str(decoders["two"]))
        assert code == 0 and "small@2" in out
        becomes(decoders["two"])
        code, out = models("canary", "small@1")
        assert code != 0 and "cannot be a canary" in out and "Traceback" not in out
        assert "text-generation" in models("list")[1]
        assert models("rollback")[0] == 0
        becomes(decoders["one"])
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
