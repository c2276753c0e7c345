"""The engine: bundles that are refused, answers that hold in any batch, a bounded queue."""

import asyncio
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime", reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from smallbundle import WORDS, make_bundle

from llmeco_nb.core import DataError, MissingError
from llmeco_nb.deployment.engine import BatchingEngine, Busy, Expired, Predictor
from llmeco_nb.deployment.manifest import Manifest, manifest_digest, verify, write_manifest
from llmeco_nb.tasks.text_classification import ClassificationSchema, ClassPrediction

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "words")


@pytest.fixture(scope="module")
def predictor(bundle):
    return Predictor.load(bundle)


# -- bundles


def test_every_flipped_bit_is_refused_by_name(bundle, tmp_path):
    for name in ("manifest.json", "model.onnx", "tokenizer.json"):
        size = (bundle / name).stat().st_size
        for at in sorted({0, size // 3, size // 2, size - 1}):
            for bit in (0, 6):
                place = tmp_path / f"{name}-{at}-{bit}"
                shutil.copytree(bundle, place)
                data = bytearray((place / name).read_bytes())
                data[at] ^= 1 << bit
                (place / name).write_bytes(data)
                with pytest.raises(DataError, match=name):
                    Predictor.load(place)


def test_missing_and_extra_files_are_refused(bundle, tmp_path):
    for what in ("missing", "extra", "no manifest", "link"):
        place = shutil.copytree(bundle, tmp_path / what)
        if what == "missing":
            (place / "tokenizer.json").unlink()
        if what == "extra":
            (place / "sitecustomize.py").write_text("")
        if what == "no manifest":
            (place / "manifest.json").unlink()
        if what == "link":
            (place / "gone").symlink_to(place / "nowhere")
        with pytest.raises(
            MissingError if what == "no manifest" else DataError,
            match="manifest" if what == "no manifest" else "tokenizer|sitecustomize|gone",
        ):
            verify(place)
    with pytest.raises(MissingError):
        verify(tmp_path / "nowhere")


def test_a_version_or_kind_from_the_future_is_refused(bundle, tmp_path):
    place = shutil.copytree(bundle, tmp_path / "future")
    m = json.loads((place / "manifest.json").read_text())
    m["format_version"] = 99
    m["digest"] = manifest_digest(m)
    (place / "manifest.json").write_text(json.dumps(m))
    with pytest.raises(
        DataError,
        match="format version 99; 1 to 3 are read here. .*make a new one with `llmeco run`",
    ):
        verify(place)
    (place / "manifest.json").unlink()
    write_manifest(
        place, Manifest("x", kind="quantum", schema=ClassificationSchema(labels=["a", "b"]))
    )
    with pytest.raises(DataError, match="quantum"):
        Predictor.load(place)


def test_same_content_same_digest(bundle, tmp_path):
    assert verify(make_bundle(tmp_path / "again")).digest == verify(bundle).digest
    assert verify(make_bundle(tmp_path / "other", name="other")).digest != verify(bundle).digest


# -- answers


def test_answers(predictor):
    good, bad = predictor.predict_batch(["A good, funny, wonderful film", "bad and dull and poor"])
    assert good.label == "positive" and bad.label == "negative"
    assert (
        list(good.probabilities) == ["negative", "positive"]
        and abs(sum(good.probabilities.values()) - 1) < 1e-5
    )


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(WORDS[4:]), max_size=40).map(" ".join), min_size=1, max_size=40
    )
)
def test_an_answer_does_not_depend_on_company(predictor, texts):
    together = predictor.predict_batch(texts)
    for t, a in zip(texts, together):
        alone = predictor.predict_batch([t])[0]
        assert all(
            abs(a.probabilities[name] - alone.probabilities[name]) < 2e-6
            for name in predictor.labels
        )


def test_cost_is_what_the_window_holds(predictor):
    assert (
        predictor.cost("good film") == 4
        and predictor.cost("good " * 500) == 16
        and predictor.cost("") >= 1
    )


def test_the_window_keeps_both_ends(predictor):
    middle = "good good " + "dull " * 50 + "good " * 12
    assert (
        predictor.predict_batch([middle])[0].label == "positive"
    )  # 4 tokens from the front, 12 from the end


# -- the queue


class Clockwork:
    "A millisecond for every character; says upper case; fails on texts that hold `fire`."

    def __init__(self):
        self.batches, self.inside = [], 0

    def cost(self, text):
        return len(text)

    def predict_batch(self, texts):
        self.inside += 1
        assert self.inside == 1, "two predictions at a time"
        try:
            self.batches.append(list(texts))
            time.sleep(sum(map(len, texts)) / 1000)
            if any("fire" in t for t in texts):
                raise ValueError("fire")
            return [ClassPrediction(label=t.upper(), probabilities={}) for t in texts]
        finally:
            self.inside -= 1


def test_everybody_gets_the_own_answer():
    async def scene():
        async with BatchingEngine(Clockwork()) as engine:
            asked = [[f"{i}-{k}" for k in range(1 + i % 3)] for i in range(60)]
            got = await asyncio.gather(*(engine.submit(a) for a in asked))
            assert [[a.label for a in g] for g in got] == asked
            assert (
                engine.queued_tokens == 0
                and not engine.queue
                and len(engine.predictor.batches) < 30
            )

    asyncio.run(scene())


def test_batches_respect_their_size_and_one_request_may_exceed_it():
    async def scene():
        async with BatchingEngine(Clockwork(), max_batch_tokens=30) as engine:
            await asyncio.gather(
                *(engine.submit(["x" * 10]) for _ in range(20)), engine.submit(["y" * 100])
            )
            assert all(
                sum(map(len, b)) <= 30 or b == ["y" * 100] for b in engine.predictor.batches[1:]
            )

    asyncio.run(scene())


def test_a_failure_stays_with_its_request():
    async def scene():
        async with BatchingEngine(Clockwork()) as engine:
            got = await asyncio.gather(
                *(engine.submit([t]) for t in ("a", "fire", "b", "fire!", "c")),
                return_exceptions=True,
            )
            assert [g if isinstance(g, Exception) else g[0].label for g in got][::2] == [
                "A",
                "B",
                "C",
            ] and all(isinstance(g, ValueError) for g in got[1::2])
            assert (await engine.submit(["after"]))[0].label == "AFTER"

    asyncio.run(scene())


def test_who_hangs_up_is_not_computed():
    async def scene():
        async with BatchingEngine(Clockwork()) as engine:
            first = asyncio.create_task(engine.submit(["x" * 200]))
            await asyncio.sleep(0.02)
            gone = asyncio.create_task(engine.submit(["gone"]))
            stays = asyncio.create_task(engine.submit(["stays"]))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.gather(first, stays)
            assert not any("gone" in b for b in engine.predictor.batches)

    asyncio.run(scene())


def test_what_cannot_be_in_time_is_refused_at_once_and_told_when():
    async def scene():
        async with BatchingEngine(Clockwork(), max_batch_tokens=50) as engine:
            busy = [
                asyncio.create_task(engine.submit(["x" * 500], deadline=30)) for _ in range(4)
            ]  # two seconds of work
            await asyncio.sleep(0.01)
            begun = time.monotonic()
            with pytest.raises(Busy) as refused:
                await engine.submit(["late"], deadline=0.3)
            assert time.monotonic() - begun < 0.1 and 1 <= refused.value.retry_after <= 4
            assert (await engine.submit(["patient"], deadline=60))[0].label == "PATIENT"
            await asyncio.gather(*busy)

    asyncio.run(scene())


def test_the_queue_is_bounded():
    async def scene():
        async with BatchingEngine(Clockwork(), max_queue=5, max_batch_tokens=1) as engine:
            tasks = [
                asyncio.create_task(engine.submit(["xxxxxxxxxx"], deadline=60)) for _ in range(30)
            ]
            got = await asyncio.gather(*tasks, return_exceptions=True)
            assert 5 <= sum(isinstance(g, list) for g in got) <= 8 and all(
                isinstance(g, (list, Busy)) for g in got
            )

    asyncio.run(scene())


def test_a_deadline_that_passes_in_the_queue_is_told():
    async def scene():
        engine = BatchingEngine(Clockwork(), max_batch_tokens=1)
        engine.tokens_per_s = 1e9  # it thinks itself much faster than it is, so it admits all
        async with engine:
            got = await asyncio.gather(
                engine.submit(["x" * 400]),
                engine.submit(["too late"], deadline=0.1),
                return_exceptions=True,
            )
            assert isinstance(got[0], list) and isinstance(got[1], Expired)

    asyncio.run(scene())


def test_closing_answers_what_was_admitted():
    async def scene():
        engine = BatchingEngine(Clockwork(), max_batch_tokens=1)
        tasks = [asyncio.create_task(engine.submit(["x" * 20])) for _ in range(5)]
        await asyncio.sleep(0.01)
        await engine.close()
        assert all(isinstance(g, list) for g in await asyncio.gather(*tasks))

    asyncio.run(scene())


# -- what it stands on


def test_answering_loads_no_heavy_library(bundle):
    code = f"""
import sys
from llmeco_nb.deployment.engine import Predictor
heavy = {{"torch", "transformers", "nbdev", "sklearn", "pandas", "scipy", "onnx"}}
answer = Predictor.load({str(bundle)!r}).predict_batch(["good"])[0]
print(answer.label, *sorted(heavy & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["positive"], done.stdout + done.stderr
