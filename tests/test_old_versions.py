"""What an earlier version wrote is opened, translated, or refused with the command that helps."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

for library in ("fastapi", "uvicorn", "sqlalchemy", "onnxruntime"):
    pytest.importorskip(library, reason="serving needs the extra `serve`")
from llmeco_nb.core import DataError, UsageError, read_json
from llmeco_nb.deployment.ledger import Conflict, Ledger, keep_feedback, read_feedback
from llmeco_nb.deployment.loading import open_model
from llmeco_nb.deployment.manifest import verify
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.interaction.client import Client, running_server
from llmeco_nb.interaction.feedback import freeze, read_frozen
from llmeco_nb.interaction.rounds import read_history
from llmeco_nb.runner.stages import StageRegistry, current_overrides, import_by_name

FIXTURES = Path(__file__).resolve().parent / "fixtures"
TAG = "e8ccf91"


def unpack(name: str, folder: Path) -> Path:
    "The folder with what the archive `name` of the fixtures holds."
    with tarfile.open(FIXTURES / f"{name}_{TAG}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> Path:
    return unpack("bundle", tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def database(tmp_path) -> Path:
    return Path(shutil.copy(FIXTURES / f"feedback_{TAG}.sqlite", tmp_path / "feedback.sqlite"))


@pytest.fixture(scope="module")
def answers() -> dict:
    return read_json(FIXTURES / f"answers_{TAG}.json")


# -- bundles


@pytest.mark.parametrize("kind", ["linear", "onnx"])
def test_an_old_bundle_answers_as_it_did(kind, bundles, answers):
    manifest = verify(bundles / kind)
    found = open_model(bundles / kind, manifest).scores(answers["texts"])
    assert np.abs(found - np.array(answers[kind])).max() < 1e-5
    assert manifest.digest == read_json(bundles / kind / "manifest.json")["digest"]


def test_the_fields_of_an_old_manifest_are_translated(bundles):
    raw = read_json(bundles / "onnx" / "manifest.json")
    manifest = verify(bundles / "onnx")
    assert (raw["form"], manifest.format_version) == (1, 1)
    assert manifest.max_length == raw["tokens"]
    assert manifest.head_fraction == raw["head"] / 100
    assert manifest.pad_token_id == raw["pad"]
    assert manifest.origin.num_labeled == raw["origin"]["labels"]
    assert manifest.parity.items == raw["parity"]["items"]


def test_a_changed_old_bundle_is_refused(bundles, tmp_path):
    folder = shutil.copytree(bundles / "onnx", tmp_path / "changed")
    text = (folder / "manifest.json").read_text().replace('"tokens"', '"max_length"')
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="manifest.json"):
        Predictor.load(folder)


# -- the feedback database


def test_an_old_database_is_read_and_written(database, bundles, tmp_path):
    rows = read_feedback(database)
    assert len(rows) == 12 and {r.author for r in rows} == {"ann", "bob", "çelik", ""}
    assert {r.model for r in rows} == {verify(bundles / k).digest for k in ("linear", "onnx")}
    assert freeze(tmp_path, tmp_path / "frozen") == len(read_frozen(tmp_path / "frozen")) > 0
    first = next(r for r in rows if r.key == "ann")
    ledger = Ledger(database)
    again = keep_feedback(
        ledger, first.request_id, first.item, first.given, author="ann", note=first.note
    )
    assert not again.result().stored
    other = keep_feedback(ledger, first.request_id, first.item, "negative", author="ann")
    assert isinstance(other.exception(), Conflict)
    new = keep_feedback(ledger, first.request_id, first.item, correct=True, author="dora")
    assert new.result().stored
    ledger.close()
    assert len(read_feedback(database)) == 13


def test_an_old_bundle_is_served_with_an_old_database(bundles, database):
    before = len(read_feedback(database))
    with running_server(bundles / "linear", database) as address:
        client = Client(address, author="eve")
        assert client.model()["digest"] == verify(bundles / "linear").digest
        answer = client.predict("A wonderful film.")
        assert client.feedback(answer, correct=True).stored
    assert len(read_feedback(database)) == before + 1


# -- a run


def translations() -> list[list[str]]:
    "Rows of nbs/renamed_values.tsv: stage, old parameter, old value, new value."
    lines = (StageRegistry.find().nbs / "renamed_values.tsv").read_text().splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("stage,name,old,new", translations())
def test_a_translated_value_is_one_that_the_stage_takes(stage, name, old, new):
    config = import_by_name(StageRegistry.find().stages[stage].contract["config"])
    stored = 5 if old == "*" else old
    [(now, value)] = current_overrides({stage: {name: stored}})[stage].items()
    assert now != name and value == (0.05 if old == "*" else new)
    assert config.read(now, value, stage) == value


@pytest.fixture(scope="module")
def runs(tmp_path_factory, machine_json) -> Path:
    found = unpack("run", tmp_path_factory.mktemp("old")) / "runs"
    shutil.copy(machine_json, found)  # it is another machine than that of the run
    return found


def llmeco(runs: Path, *words: str, seconds: int = 60) -> subprocess.CompletedProcess:
    "`llmeco` with these words in the folder of runs."
    return subprocess.run(
        [sys.executable, "-c", "from llmeco_nb.cli import main; main()", *words],
        env={**os.environ, "LLMECO_RUNS": str(runs)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def test_the_stages_of_an_old_run_are_said_to_be_stale(runs):
    done = llmeco(runs, "stages", "-P", "smoke")
    assert done.returncode == 0, done.stderr
    instances = read_json(runs / "smoke-2" / "run.json")["instances"]
    states = {
        line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line[0] != " "
    }
    assert {name: states.get(name) for name in instances} == dict.fromkeys(instances, "stale")
    assert max(map(len, done.stdout.splitlines())) <= 200
    assert len(done.stdout.splitlines()) < 100, "hundreds of changed functions say no more than ten"


def test_the_plan_of_an_old_training_is_read(runs):
    "Its names of fields are translated, and a name that nobody knows is refused with a command."
    from llmeco_nb.training.checkpoint import current_identity
    from llmeco_nb.training.state import TrainPlan

    files = sorted((runs / "store").glob("*.plan.json"))
    assert len(files) == 3
    for file in files:
        stored = read_json(file)
        plan = TrainPlan.from_json(stored, str(file))
        assert plan.steps == stored["steps"] and plan.fingerprint == stored["asked"]
        assert plan.batch_size == stored.get("batch")
        assert {k: plan.to_json()[k] for k in stored} == stored
        # a checkpoint that says it belongs to this plan says so still
        identity = {f"plan.{k}": v for k, v in stored.items()} | dict(asked=stored["asked"])
        assert current_identity(identity) == {f"plan.{k}": v for k, v in plan.to_json().items()}
        with pytest.raises(DataError, match=f"{file.name} holds 'momentum'.*llmeco run --new-run"):
            TrainPlan.from_json({**stored, "momentum": 1}, str(file))


def test_an_old_run_has_a_report(runs):
    done = llmeco(runs, "report", "-P", "smoke", seconds=120)
    assert done.returncode == 0, done.stderr
    page = (runs / "smoke-2" / "report" / "index.html").read_text(encoding="utf-8")
    assert "tfidf_lr" in page or "TF-IDF" in page


def test_a_run_that_cannot_be_translated_is_refused_with_the_command_that_helps(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    file = folder / "smoke-2" / "run.json"
    info = read_json(file)
    info["overrides"]["pretrain"]["wavelength"] = 3
    file.write_text(json.dumps(info))
    before = sorted(p.name for p in folder.iterdir())
    for words in (["stages"], ["report"], ["run", "--next"]):
        done = llmeco(folder, *words, "-P", "smoke")
        assert done.returncode == UsageError.code, (words, done.stdout, done.stderr)
        assert "wavelength" in done.stderr and "Traceback" not in done.stderr
        assert "`llmeco run --profile smoke --new-run`" in done.stderr
    assert sorted(p.name for p in folder.iterdir()) == before


def test_the_next_round_of_an_old_run(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    old = read_json(folder / "smoke-2" / "run.json")
    done = llmeco(folder, "run", "-P", "smoke", "--next", seconds=900)
    assert done.returncode == 0, done.stdout + done.stderr
    new = read_json(folder / "smoke-3" / "run.json")
    assert (new["round"], new["parent"]) == (3, "smoke-2")
    assert new["overrides"] == current_overrides(old["overrides"]) != old["overrides"]
    assert new["overrides"]["tokenizer"] == {"vocab_size": 800}
    # frozen is a stage that the profile has gained since
    assert new["instances"].keys() == old["instances"].keys() | {"frozen"}
    learned, known = (
        read_history(folder / run / "improve" / "history.json") for run in ("smoke-3", "smoke-2")
    )
    assert learned[:2] == known and learned[2].before == known[1].champion
    assert learned[2].feedback.rows == len(
        read_frozen(folder / "smoke-3" / "snapshots" / "feedback")
    )
    assert verify(folder / "smoke-3" / "improve" / "champion").digest == learned[2].champion
    assert read_json(folder / "smoke-2" / "run.json") == old
