"""The model registry and the server that follows it: changes decided on an old revision are
refused; a canary that is worse, slower, broken or hung is stopped, and its clients are answered."""

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
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("casbin", reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from served import ServeCommand
from smallbundle import make_bundle

from llmeco_nb.core import DataError, LlmecoError, UsageError
from llmeco_nb.deployment.canary import CanaryLimits, CanaryTest
from llmeco_nb.deployment.deployments import (
    Deployment,
    add_canary,
    add_shadow,
    find_model,
    promote,
    remove,
    roll_back,
)
from llmeco_nb.deployment.executor import ExecutorOptions
from llmeco_nb.deployment.follower import Follower
from llmeco_nb.deployment.key_admin import KeyAdmin
from llmeco_nb.deployment.keys import KeyOptions, Principal, anybody
from llmeco_nb.deployment.ledger import Conflict, Ledger, keep_feedback
from llmeco_nb.deployment.manifest import verify, write_manifest
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.deployment.registry import Registry
from llmeco_nb.deployment.server import make_app
from llmeco_nb.deployment.service import PredictRequest, Service
from llmeco_nb.tasks.regression import RegressionSchema

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the test client about its HTTP library
    from fastapi.testclient import TestClient

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    "Name -> folder: `one`; `same` answers alike; `turned` calls everything the opposite."
    place = tmp_path_factory.mktemp("bundles")
    found = {"one": make_bundle(place / "one", name="one")}
    schema = verify(found["one"]).schema
    for name, labels in (("same", schema.labels), ("turned", schema.labels[::-1])):
        found[name] = shutil.copytree(found["one"], place / name)
        facts = replace(verify(found["one"]), name=name, schema=replace(schema, labels=labels))
        write_manifest(found[name], facts)
    return found


@pytest.fixture
def registry(tmp_path, bundles):
    one = Registry(tmp_path / "f.sqlite", "a test")
    for folder in bundles.values():
        one.register(folder)
    one.promote("one")
    yield one
    one.close()


# --- what a deployment can be -----------------------------------------------------------------

digests = st.sampled_from("abcd")
verbs = st.one_of(
    st.tuples(st.just(promote), digests),
    st.tuples(st.just(add_canary), digests, st.floats(-0.5, 1.5)),
    st.tuples(st.just(add_shadow), digests),
    st.tuples(st.just(remove), st.sampled_from(["canary", "shadow", "champion"])),
    st.tuples(st.just(roll_back)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(verbs, max_size=12))
def test_no_order_of_changes_makes_an_impossible_deployment(steps):
    history = [promote(None, "a")]
    for verb, *rest in steps:
        try:
            new = verb(history, *rest) if verb is roll_back else verb(history[-1], *rest)
        except UsageError:
            continue
        history.append(new)
        assert new.champion not in (new.canary, new.shadow)
        assert (0 < new.canary_share < 1) if new.canary else new.canary_share == 0
        if verb in (promote, roll_back):
            assert new.canary is new.shadow is None, "both were compared with another champion"
        if verb is roll_back:
            assert new.champion != history[-2].champion


def test_versions_count_up_and_are_found(registry, bundles, tmp_path):
    other = shutil.copytree(bundles["one"], tmp_path / "other")
    write_manifest(other, replace(verify(other), accuracy={"test": 0.5}))
    assert str(registry.register(other)) == "one@2"
    again = registry.register(bundles["one"])
    assert str(again) == "one@1", "the same bundle keeps its number"
    found = registry.models()
    assert (
        find_model(found, "one").version == 2 and find_model(found, "one@1").digest == again.digest
    )
    assert find_model(found, again.digest[:8]) == find_model(found, again.digest) == again
    for wrong in ("two", "one@3", "one@", "@1", "", again.digest[:5], "zzzzzzzz"):
        with pytest.raises(UsageError, match="Registered are: one@1"):
            find_model(found, wrong)
    (other / "model.onnx").write_bytes(b"")
    with pytest.raises(DataError, match=r"model\.onnx"):
        registry.register(other)


def test_a_model_of_another_task_is_not_deployed(registry, tmp_path):
    registry.register(make_bundle(tmp_path / "r", "stars", RegressionSchema(low=0, high=5)))
    with pytest.raises(UsageError, match="one task"):
        registry.promote("stars")
    with pytest.raises(UsageError, match="one task"):
        registry.canary("stars", 0.1)


def _promotes(where, name, seen, results):
    one = Registry(where, name)
    try:
        one.canary(name, 0.5, seen=seen)
        results.put(name)
    except Conflict:
        results.put("")
    finally:
        one.close()


def test_of_several_who_decide_on_one_revision_one_succeeds(registry, tmp_path):
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        seen, results = registry.history()[-1].revision, context.Queue()
        both = ["same", "turned"] * 3
        them = [
            context.Process(target=_promotes, args=(tmp_path / "f.sqlite", name, seen, results))
            for name in both
        ]
        for one in them:
            one.start()
        told = [results.get(timeout=60) for _ in them]
        for one in them:
            one.join()
        [winner] = filter(None, told)
        newest = registry.history()[-1]
        assert newest.revision == seen + 1 and newest.actor == winner
    revisions = [one.revision for one in registry.history()]
    assert revisions == list(range(1, len(revisions) + 1))
    assert registry.verify()[0] == 3 + len(revisions), "no refused change stands in the log"
    with pytest.raises(Conflict, match="newer"):
        registry.stop("canary", seen=1)
    with pytest.raises(Conflict, match="newer"):
        registry.roll_back(seen=1)


def _deploys(where, told):
    registry = Registry(where, "a process")
    while True:
        registry.canary("same", 0.5)
        os.write(told, b"%d\n" % registry.stop("canary").revision)


def killed_while_deploying(registry, where, times):
    "Each process is forked, so that a kill costs no new interpreter."
    chance, context = np.random.default_rng(0), multiprocessing.get_context("fork")
    for _ in range(times):
        read, write = os.pipe()
        one = context.Process(target=_deploys, args=(where, write))
        one.start()
        os.close(write)
        with open(read) as said:
            told = int(said.readline())
            time.sleep(chance.uniform(0, 0.05))
            one.kill()
            one.join()
            told = int((said.read().split() or [told])[-1])
        assert one.exitcode == -signal.SIGKILL, "it ended before it was killed"
        history = registry.history()
        assert history[-1].revision >= told, "what was told is lost"
        assert [h.revision for h in history] == list(range(1, len(history) + 1))
        rows, _ = registry.verify()
        assert rows == 3 + len(history), "a deployment without its row of the log, or the reverse"


def test_killed_at_any_moment_no_deployment_is_lost_or_unlogged(registry, tmp_path):
    killed_while_deploying(registry, tmp_path / "f.sqlite", 4)


@pytest.mark.slow
def test_killed_two_hundred_times_no_deployment_is_lost(registry, tmp_path):
    killed_while_deploying(registry, tmp_path / "f.sqlite", 200)


# --- the test of a canary ---------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.9]),
    st.floats(0.01, 0.6),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_a_canary_that_is_no_worse_is_seldom_stopped(share, rate, better, seed):
    "Looked at after each of 400 answers, at the level of 5 %: 200 canaries, mean and 4 deviations."
    chance, stopped = np.random.default_rng(seed), 0
    for _ in range(200):
        test = CanaryTest(share)
        drawn, wrong = chance.random(400) < share, chance.random(400)
        for canary, number in zip(drawn, wrong):
            test.add(bool(canary), bool(number < (rate * better if canary else rate)))
        stopped += test.highest >= 20
    assert stopped <= 200 * 0.05 + 4 * (200 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("share", [0.01, 0.28, 0.5, 0.9])
def test_a_canary_that_goes_bad_late_is_stopped_soon(share):
    "Nothing of long ago is paired with what is new, whatever the share."
    chance, test = np.random.default_rng(1), CanaryTest(share)
    for _ in range(20_000):  # both as good
        test.add(bool(chance.random() < share), bool(chance.random() < 0.05))
    assert sum(map(len, test.waiting)) <= sum(test.block) and test.highest < 100
    bad = 0
    while test.highest < 100:
        canary = bool(chance.random() < share)
        bad += canary
        test.add(canary, bool(chance.random() < (1.0 if canary else 0.05)))
        assert bad < 1500


# --- a server that follows --------------------------------------------------------------------


def question(*texts, who=anybody):
    names = [f"texts.{i}" for i in range(len(texts))]
    return PredictRequest(texts, names, uuid.uuid4().hex, who)


def followed(bundles, tmp_path, work, limits=CanaryLimits(), options=ExecutorOptions()):
    "What `work(service, follower)` returns; and what the follower said."
    said = []

    async def run():
        service = Service(
            Predictor.load(bundles["one"]), Ledger(tmp_path / "f.sqlite"), options=options
        )
        follower = Follower(service, tmp_path / "f.sqlite", limits, said.append)
        try:
            await follower.step()
            return await work(service, follower)
        finally:
            follower.thread.close()
            await service.close()
            service.ledger.close()

    return asyncio.run(run()), said


def test_a_canary_gets_its_share_and_answers_say_who_gave_them(registry, bundles, tmp_path):
    async def work(service, follower):
        registry.canary("turned", 0.25)
        await follower.step()
        texts = [f"good {i}" for i in range(400)]
        found = [await service.predict(question(text)) for text in texts]
        again = [await service.predict(question(text)) for text in texts[:50]]
        narrow = Principal(id="1", name="eve", role="user", models=("one",))
        kept = [await service.predict(question(text, who=narrow)) for text in texts[:50]]
        return found, again, kept

    (found, again, kept), _ = followed(bundles, tmp_path, work)
    share = np.mean([one.model.name == "turned" for one in found])
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    for one in found:
        assert one.predictions[0].label == (
            "negative" if one.model.name == "turned" else "positive"
        )
    assert [one.model for one in again] == [one.model for one in found[:50]]
    assert {one.model.name for one in kept} == {"one"}, "a key that may not ask the canary"


def test_feedback_stops_a_canary_that_is_worse_and_spares_one_that_is_not(
    registry, bundles, tmp_path
):
    async def work(service, follower):
        for name in ("same", "turned"):
            registry.canary(name, 0.5)
            await follower.step()
            for i in range(150):
                asked = question(f"good {name} {i}")
                found = await service.predict(asked)
                right = found.predictions[0].label == "positive"
                # every tenth reader is wrong
                keep_feedback(
                    service.ledger, asked.request_id, correct=right ^ (i % 10 == 0)
                ).result()
            for _ in range(3):
                await follower.step()
            if name == "same":
                assert service.serving.canary is not None
        return service.serving.canary

    canary, said = followed(bundles, tmp_path, work)
    newest = registry.history()[-1]
    assert canary is None and newest.canary is None and newest.actor == "server"
    assert "were wrong" in newest.reason and any("canary was stopped" in one for one in said)
    assert newest.champion == registry.history()[0].champion


def slowed(executor, seconds):
    "Have a model take longer."
    model = executor.predictor.model.model
    plain = model.scores

    def scores(texts):
        time.sleep(seconds)
        return plain(texts)

    model.scores = scores


def broken(executor, share=1.0):
    "Have a model fail, for a share of the texts."
    model = executor.predictor.model.model
    plain = model.scores

    def scores(texts):
        if any(zlib.crc32(text.encode()) < share * 2**32 for text in texts):
            raise ValueError("broken")
        return plain(texts)

    model.scores = scores


def test_a_slow_canary_is_stopped(registry, bundles, tmp_path):
    async def work(service, follower):
        registry.canary("same", 0.5)
        await follower.step()
        slowed(service.serving.canary, 0.02)
        for i in range(200):
            await service.predict(question(f"good {i}"))
        await follower.step()
        return service.serving.canary

    canary, _ = followed(bundles, tmp_path, work, CanaryLimits(min_items=50))
    assert canary is None and "ms for a text" in registry.history()[-1].reason


def test_a_failing_canary_is_stopped_and_its_clients_are_answered(registry, bundles, tmp_path):
    async def work(service, follower):
        registry.canary("same", 0.5)
        await follower.step()
        broken(service.serving.canary, share=0.5)
        found = [await service.predict(question(f"good {i}")) for i in range(100)]
        await follower.step()
        return service.serving.canary, found

    (canary, found), _ = followed(bundles, tmp_path, work)
    assert canary is None and "failures" in registry.history()[-1].reason
    names = [one.model.name for one in found]
    assert len(found) == 100 and 10 < names.count("same") < 50
    assert all(one.predictions[0].label == "positive" for one in found)


def test_a_hung_canary_is_stopped(registry, bundles, tmp_path):
    async def work(service, follower):
        registry.canary("same", 0.5)
        await follower.step()
        slowed(service.serving.canary, 5.0)
        asked = [asyncio.create_task(service.predict(question(f"good {i}"))) for i in range(20)]
        await asyncio.sleep(2.5)
        await follower.step()
        canary = service.serving.canary
        await asyncio.gather(*asked, return_exceptions=True)
        return canary, [one for one in asked if not one.exception()]

    options = ExecutorOptions(deadline=4.0)
    (canary, answered), _ = followed(bundles, tmp_path, work, options=options)
    assert canary is None and "hangs" in registry.history()[-1].reason
    assert 1 <= len(answered) < 20, "the champion's clients, and not those of a model that hangs"


def test_a_stop_that_cannot_be_written_is_kept_to_and_written_later(registry, bundles, tmp_path):
    async def work(service, follower):
        registry.canary("same", 0.5)
        await follower.step()
        broken(service.serving.canary)
        for i in range(60):
            await service.predict(question(f"good {i}"))
        follower.where = tmp_path  # no database: a folder
        await follower.step()
        assert service.serving.canary is None, "out of the traffic, written or not"
        assert "cannot be written" in follower.problem and follower.stopping
        await follower.step()
        assert service.serving.canary is None and registry.history()[-1].canary
        follower.where = tmp_path / "f.sqlite"
        await follower.step()
        assert not follower.problem and not follower.stopping
        assert registry.history()[-1].canary is None
        await follower.step()
        return follower.deployment

    deployment, said = followed(bundles, tmp_path, work)
    assert deployment == registry.history()[-1] and len(said) == 4


def test_whatever_goes_wrong_a_rollback_is_followed(registry, bundles, tmp_path, monkeypatch):
    from llmeco_nb.deployment import service as module

    async def work(service, follower):
        task = asyncio.create_task(follower.run(every=0.02))
        await asyncio.sleep(0.1)
        made = module.LocalExecutor
        wrong = type("Wrong", (made,), dict(__init__=lambda self, *a: 1 / 0))
        monkeypatch.setattr(module, "LocalExecutor", wrong)
        calls = []
        monkeypatch.setattr(
            "llmeco_nb.deployment.follower.load_version",
            lambda version, trusted=None: calls.append(version) or Predictor.load(version.folder),
        )
        registry.promote("turned")
        await asyncio.sleep(0.5)
        assert "division" in follower.problem and not task.done() and len(calls) == 1
        assert service.predictor.manifest.name == "one"
        monkeypatch.setattr(module, "LocalExecutor", made)
        registry.promote("same")
        await asyncio.sleep(0.5)
        assert service.predictor.manifest.name == "same" and not follower.problem
        task.cancel()

    followed(bundles, tmp_path, work)


def test_a_model_that_hangs_while_it_is_opened_keeps_nobody(
    registry, bundles, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "llmeco_nb.deployment.follower.load_version",
        lambda version, trusted=None: time.sleep(3600),
    )

    async def work(service, follower):
        registry.canary("same", 0.5)
        await follower.step()
        assert "more than 0.3 s" in registry.history()[-1].reason
        assert (await service.predict(question("good"))).model.name == "one"

    options = ExecutorOptions(open_seconds=0.3)
    followed(bundles, tmp_path, work, options=options)


def test_a_text_that_is_repeated_is_no_further_evidence(registry, bundles, tmp_path):
    async def work(service, follower):
        registry.canary("turned", 0.5)
        await follower.step()
        for i in range(99):
            if (await service.predict(question(f"good {i}"))).model.name == "turned":
                hit = f"good {i}"
                break
        for i in range(60):
            for text, correct in ((hit, False), (f"fine {i}", True)):
                asked = question(text)
                await service.predict(asked)
                keep_feedback(service.ledger, asked.request_id, correct=correct).result()
            await follower.step()
        return service.serving.canary, follower.comparison.wrong

    (canary, wrong), _ = followed(bundles, tmp_path, work)
    assert canary is not None and sum(wrong.wrong) + wrong.waiting[1].count(True) <= 1


def test_what_cannot_be_opened_changes_nothing(registry, bundles, tmp_path):
    spoiled = shutil.copytree(bundles["turned"], tmp_path / "spoiled")
    write_manifest(spoiled, replace(verify(spoiled), name="spoiled"))
    whole = (spoiled / "model.onnx").read_bytes()
    registry.register(spoiled)
    (spoiled / "model.onnx").write_bytes(whole[:-1])

    async def work(service, follower):
        for verb in (registry.shadow, lambda name: registry.canary(name, 0.5)):
            verb("spoiled")
            await follower.step()
            newest = registry.history()[-1]
            assert newest.canary is newest.shadow is None and newest.actor == "server"
            assert "model.onnx" in newest.reason and not follower.problem
        registry.promote("spoiled")
        await follower.step()
        assert service.predictor.manifest.name == "one" and "model.onnx" in follower.problem
        facts = follower.facts()
        assert facts["problem"] and str(tmp_path) not in str(facts), "paths are for the log"
        assert facts["champion"] == service.predictor.digest, "the one that is followed"
        assert (await service.predict(question("good"))).model.name == "one"
        (spoiled / "model.onnx").write_bytes(whole)
        await follower.step()
        assert follower.problem, "it tries again, but not at once"
        follower.retry_at = 0.0
        await follower.step()
        assert not follower.problem and service.predictor.manifest.name == "spoiled"
        shutil.rmtree(spoiled)
        assert (await service.predict(question("good"))).model.name == "spoiled", "it is open"

    followed(bundles, tmp_path, work)


def test_a_folder_with_another_bundle_than_was_registered_is_not_opened(
    registry, bundles, tmp_path
):
    place = shutil.copytree(bundles["same"], tmp_path / "place")
    write_manifest(place, replace(verify(place), name="first"))
    registry.register(place)
    write_manifest(place, replace(verify(place), name="second"))

    async def work(service, follower):
        registry.promote("first")
        await follower.step()
        assert "was registered as" in follower.problem
        assert service.predictor.manifest.name == "one"

    followed(bundles, tmp_path, work)


def test_a_shadow_is_compared_and_never_answers(registry, bundles, tmp_path):
    async def work(service, follower):
        found = []
        for name in ("same", "turned"):
            registry.shadow(name)
            await follower.step()
            for i in range(20):
                answer = await service.predict(question(f"good {i}", "bad"))
                assert answer.model.name == "one"
                await asyncio.gather(*service.shadowing)
            found.append(service.shadow_counts)
        broken(service.serving.shadow)
        await service.predict(question("good"))
        await asyncio.gather(*service.shadowing)
        await asyncio.gather(*(service.predict(question(f"good {i}")) for i in range(30)))
        return found

    (same, turned), _ = followed(bundles, tmp_path, work)
    assert (same.agreed, same.disagreed) == (40, 0)
    assert (turned.agreed, turned.disagreed) == (0, 40)
    assert turned.failed >= 1 and turned.skipped >= 1


def test_over_http_an_operator_promotes_and_rolls_back_within_a_second(bundles, tmp_path):
    where = tmp_path / "f.sqlite"
    registry, admin = Registry(where, "a test"), KeyAdmin(where, "a test")
    for folder in bundles.values():
        registry.register(folder)
    operator, _ = admin.add(KeyOptions(name="olga", role="operator"))
    user, _ = admin.add(KeyOptions(name="uwe"))
    told = []
    with TestClient(make_app(bundles["one"], where, log=told.append)) as c:

        def ask(method, path, key=operator, **body):
            headers = {"Authorization": f"Bearer {key}"}
            return c.request(method, path, json=body or None, headers=headers)

        def answered_by(name):
            begun = time.monotonic()
            while time.monotonic() - begun < 10:
                if ask("POST", "/v1/predict", user, text="good").json()["model"]["name"] == name:
                    return time.monotonic() - begun
            raise AssertionError(f"{name} never answers")

        for name in ("one", "turned"):
            reply = ask("POST", "/admin/deployments", action="promote", model=name, reason="May")
            assert reply.status_code == 200 and reply.json()["actor"].startswith("olga (")
            answered_by(name)
        reply = ask("POST", "/admin/deployments", action="rollback")
        assert reply.status_code == 200 and answered_by("one") < 1
        facts = ask("GET", "/v1/model", user).json()
        assert facts["deployment"]["revision"] == 3 and facts["name"] == "one"
        rows = ask("GET", "/admin/deployments").json()
        assert [row["revision"] for row in rows] == [1, 2, 3]
        assert {row["name"] for row in ask("GET", "/admin/models").json()} == set(bundles)
        for status, body in (
            (409, dict(action="stop", model="canary", revision=1)),
            (422, dict(action="stop", model="canary")),
            (422, dict(action="canary", model="turned", share=1.0)),
            (422, dict(action="promote")),
            (422, dict(action="promote", model="nobody")),
            (422, dict(action="promote", model="one", force=True)),
        ):
            reply = ask("POST", "/admin/deployments", **body)
            assert reply.status_code == status and reply.json()["error"]["message"], body
        assert ask("POST", "/admin/deployments", user, action="rollback").status_code == 403
        assert ask("GET", "/admin/keys").status_code == 403, "an operator is no admin"
        figures = ask("GET", "/metrics").text
        assert "llmeco_deployment_revision 3.0" in figures
        assert "llmeco_deployment_followed 1.0" in figures
    events = [json.loads(line) for line in told if "event" in json.loads(line)]
    assert [one["event"] for one in events] == ["deployment"] * 3
    assert registry.verify()[0] == 3 + 2 + 3
    admin.close()
    registry.close()


def test_over_http_an_admin_makes_and_revokes_keys(bundles, tmp_path):
    where = tmp_path / "f.sqlite"
    with TestClient(make_app(bundles["one"], where)) as c:
        reply = c.post("/admin/keys", json={"name": "first"})
        assert reply.status_code == 403 and "llmeco keys add" in reply.json()["error"]["message"]
        admin = KeyAdmin(where, "a test")
        root, _ = admin.add(KeyOptions(name="root", role="admin"))
        head = {"Authorization": f"Bearer {root}"}
        deadline = time.monotonic() + 10
        while c.get("/admin/keys", headers=head).status_code != 200:  # the server reads keys anew
            assert time.monotonic() < deadline
            time.sleep(0.1)
        reply = c.post("/admin/keys", json={"name": "ann", "models": ["one"]}, headers=head)
        made = reply.json()
        assert reply.status_code == 200 and made["key"].startswith("llmeco_")
        listed = c.get("/admin/keys", headers=head)
        assert made["key"] not in listed.text and "digest" not in listed.text
        assert {row["name"] for row in listed.json()} == {"root", "ann"}
        gone = c.post("/admin/keys/revoke", json={"name": "ann"}, headers=head)
        assert [row["name"] for row in gone.json()] == ["ann"] and gone.json()[0]["id"] == made[
            "id"
        ]
        for body in ({"name": "ann"}, {"name": ""}, {}):
            assert c.post("/admin/keys/revoke", json=body, headers=head).status_code == 422
        for body in ({"name": "a b"}, {"name": "x", "role": "king"}, {"name": "x", "days": -1}):
            assert c.post("/admin/keys", json=body, headers=head).status_code == 422, body
        assert admin.verify()[0] == 3
        admin.close()


def test_the_command_line_deploys_and_the_server_follows(bundles, tmp_path):
    "`llmeco serve` answers with the registry's champion, and another process changes it."
    import httpx

    where, runs = tmp_path / "f.sqlite", tmp_path / "runs"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LLMECO_RUNS": str(runs)}

    def models(*words):
        line = [sys.executable, "-c", "from llmeco_nb.cli import main; main()", "models", *words]
        line += ["--database", str(where)]
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    assert "No model is registered" in models("list")[1]
    for name in ("one", "turned"):
        code, out = models("add", str(bundles[name]))
        assert code == 0 and f"{name}@1 is" in out
    code, out = models("promote", "one@1", "--reason", "the first")
    assert code == 0 and "the first" in out
    server = ServeCommand("--database", where, env={"LLMECO_RUNS": str(runs)})
    try:
        at = server.address
        answer = lambda: httpx.post(f"{at}/v1/predict", json={"text": "good"}).json()["model"]
        assert answer()["name"] == "one"
        assert models("promote", "turned", "--revision", "7")[0] != 0, "another revision holds"
        code, out = models("promote", "turned")
        assert code == 0
        deadline = time.monotonic() + 10
        while answer()["name"] != "turned":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, out = models("list")
        assert [line.split()[-2] for line in out.splitlines() if "champion" in line] == ["champion"]
        assert models("rollback")[0] == 0
        while answer()["name"] != "one":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, out = models("history")
        assert code == 0 and len(out.splitlines()) == 4
    finally:
        server.end()
    for words in (("paint",), ("promote", "nobody"), ("stop",), ("add", str(tmp_path / "none"))):
        code, out = models(*words)
        assert code != 0 and "Traceback" not in out, words


def test_refusals_of_deployments_are_sentences():
    now = Deployment(champion="a")
    for wrong in (
        lambda: promote(now, "a"),
        lambda: add_canary(now, "b", 0.0),
        lambda: add_canary(now, "a", 0.5),
        lambda: add_shadow(now, "a"),
        lambda: remove(now, "canary"),
        lambda: remove(now, "champion"),
        lambda: roll_back([]),
    ):
        with pytest.raises(LlmecoError, match=r"\.$"):
            wrong()
