"""The service: models are exchanged under load without a failed or a mixed answer."""

import asyncio
import json
import shutil
import time
import uuid
from dataclasses import replace

import pytest

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from smallbundle import make_bundle

from llmeco_nb.core import UsageError
from llmeco_nb.deployment.keys import anybody
from llmeco_nb.deployment.ledger import Ledger, predictions
from llmeco_nb.deployment.manifest import verify, write_manifest
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.deployment.service import PredictRequest, Service
from llmeco_nb.tasks.regression import RegressionSchema
from llmeco_nb.tasks.text_classification import ClassificationSchema


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Three models: the second and the third give texts the opposite labels of the first."
    place = tmp_path_factory.mktemp("bundles")
    one = make_bundle(place / "one", name="one")
    two = shutil.copytree(one, place / "two")
    swapped = ClassificationSchema(
        labels=["positive", "negative"], cleaning=verify(one).schema.cleaning
    )
    write_manifest(two, replace(verify(two), name="two", schema=swapped))
    three = shutil.copytree(two, place / "three")
    write_manifest(three, replace(verify(three), name="three"))
    return [Predictor.load(one), Predictor.load(two), Predictor.load(three)]


def question(*texts):
    names = [f"texts.{i}" for i in range(len(texts))]
    return PredictRequest(texts, names, uuid.uuid4().hex, anybody)


async def under_load(service, models, swaps):
    "All answers of eight clients while models are exchanged."
    answers, stop = [], False

    async def client():
        while not stop:
            answers.append(await service.predict(question("a good film", "dull", "great")))

    clients = [asyncio.create_task(client()) for _ in range(8)]
    ways_back = []
    for i in range(swaps):
        await service.swap(models[(i + 1) % 3])
        await asyncio.sleep(0.005)
        if i % 5 == 4:
            begun = time.monotonic()
            await service.roll_back()
            ways_back.append(time.monotonic() - begun)
            await service.roll_back()
    stop = True
    await asyncio.gather(*clients)
    return answers, ways_back


def exchange(models, place, swaps):
    ledger = Ledger(place / "f.sqlite")

    async def run():
        service = Service(models[0], ledger)
        found = await under_load(service, models, swaps)
        assert len(service.retiring) < 30  # not one a swap
        await service.close()
        return found

    answers, ways_back = asyncio.run(run())
    labels = {
        models[0].digest: ["positive", "negative", "positive"],
        models[1].digest: ["negative", "positive", "negative"],
        models[2].digest: ["negative", "positive", "negative"],
    }
    for answer in answers:
        assert [p.label for p in answer.predictions] == labels[answer.model.digest]
    assert {a.model.name for a in answers} == {"one", "two", "three"} and max(ways_back) < 1
    with ledger.engine.connect() as c:
        rows = c.execute(predictions.select()).all()
    assert len(rows) == 3 * len(answers)
    assert all(json.loads(row.answer)["label"] == labels[row.model][row.item] for row in rows)
    ledger.close()


def test_models_are_exchanged_under_load(models, tmp_path):
    exchange(models, tmp_path, 60)


@pytest.mark.slow
def test_models_are_exchanged_a_thousand_times_under_load(models, tmp_path):
    exchange(models, tmp_path, 1000)


def test_a_model_of_another_task_is_refused_and_there_is_a_way_back_once(models, tmp_path):
    rating = Predictor.load(make_bundle(tmp_path / "r", schema=RegressionSchema(low=0, high=5)))
    ledger = Ledger(tmp_path / "f.sqlite")

    async def run():
        service = Service(models[0], ledger)
        with pytest.raises(UsageError, match="another server"):
            await service.swap(rating)
        with pytest.raises(UsageError, match="before"):
            await service.roll_back()
        await service.swap(models[1])
        assert service.predictor is models[1]
        assert await service.roll_back() is models[0]
        assert (await service.predict(question("good"))).model.name == "one"
        await service.close()

    asyncio.run(run())
    ledger.close()
