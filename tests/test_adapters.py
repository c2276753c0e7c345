"""Several adapters over one base: whatever order requests come in, each is answered as it is alone
and as its merged model answers; what does not belong to a base is refused; it is opened once."""

import asyncio
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

for library in ("fastapi", "uvicorn", "sqlalchemy", "onnxruntime", "safetensors"):
    pytest.importorskip(library, reason="serving needs the extra `serve`")
for library in ("onnx", "onnxscript", "transformers", "peft"):
    pytest.importorskip(library, reason="packing a base needs it")
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from served import ServeCommand
from smallbundle import make_bundle
from test_finetune import SMALL, made

from llmeco_nb.core import DataError, MissingError, UsageError, create_record, read_json, write_json
from llmeco_nb.data.corpus import small_corpus
from llmeco_nb.deployment import adapter_export, adapter_packing
from llmeco_nb.deployment.adapter_base import (
    BaseManifest,
    base_files,
    open_base,
    open_bases,
    stated_digest,
    verify_base,
    write_base_manifest,
)
from llmeco_nb.deployment.adapter_export import pack_base
from llmeco_nb.deployment.adapter_model import AdapterModel, adapter_files
from llmeco_nb.deployment.adapter_packing import (
    AdapterPackOptions,
    pack_adapter,
    random_adapter,
    small_adapters,
)
from llmeco_nb.deployment.executor import ExecutorOptions
from llmeco_nb.deployment.ledger import Ledger, read_feedback
from llmeco_nb.deployment.loading import open_model
from llmeco_nb.deployment.manifest import (
    BundleFiles,
    manifest_digest,
    read_manifest,
    verify,
    write_manifest,
)
from llmeco_nb.deployment.pack_command import PackChoice, pack
from llmeco_nb.deployment.packing import reference_scores
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.deployment.service import PredictRequest
from llmeco_nb.deployment.signing import TrustedKeys, new_key, sign_bundle
from llmeco_nb.deployment.task_server import TaskServices, make_task_app
from llmeco_nb.finetuning.checkpoints import small_random_encoder
from llmeco_nb.tasks.registry import load_schema
from llmeco_nb.tasks.text_classification import ClassificationSchema

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the test client about its HTTP library
    from fastapi.testclient import TestClient

NAMES = ("topics", "labels", "rating")
TEXTS = [
    "A wonderful film, moving and funny.",
    "Dull.",
    "It was late, it was broken, and nobody answered my letters. " * 6,
    "",
    "The soup was cold &amp; the waiter <b>rude</b>.",
    "Nine hours in a bus, and the sea was worth every one of them.",
    "ok ok ok",
]
QUERY = "bert.encoder.layer.0.attention.self.query"


@cache
def made_once():
    return small_adapters()


@pytest.fixture(scope="module")
def place():
    return made_once()


@pytest.fixture
def moved(place, tmp_path):
    "A copy of the folder that may be harmed."
    return Path(shutil.copytree(place, tmp_path / "served"))


def stated(bundle):
    "The manifest, whatever has become of the files."
    return read_manifest((bundle / "manifest.json").read_bytes(), bundle)


def sealed(bundle, **changes):
    "Write the manifest anew, as somebody who can write files may do."
    return write_manifest(bundle, replace(stated(bundle), **changes))


@cache
def shared(place):
    "All adapters, over one base."
    return {name: Predictor.load(place / name) for name in NAMES}


def nothing_open():
    "As a process that has opened nothing yet."
    shared.cache_clear()
    gc.collect()  # an application that was closed is a cycle of objects
    assert open_bases() == [], "nothing keeps a base that no adapter uses"


@cache
def alone(place, name, *chosen):
    "Outputs of a batch over a base that nobody else has used."
    bundle = place / name
    files = BundleFiles(bundle, verify(bundle).files)
    model = AdapterModel(files, verify(bundle), own_base(place, name))
    return model.outputs([TEXTS[i] for i in chosen])


@cache
def own_base(place, name):
    return open_base(place / "base")


# -- the same answers


batches = st.lists(
    st.tuples(
        st.sampled_from(NAMES), st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=5)
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=50)
@given(batches)
def test_whatever_comes_before_an_answer_does_not_change_it(asked):
    place = made_once()
    models = shared(place)
    for name, chosen in asked:
        texts = [TEXTS[i] for i in chosen]
        found = models[name].model.model.outputs(texts)
        assert np.array_equal(found, alone(place, name, *chosen)), "not the bits it has alone"
        one_by_one = np.concatenate([alone(place, name, i) for i in chosen])
        assert np.abs(found - one_by_one).max() < 1e-5, "a text depends on its batch"


@settings(max_examples=10)
@given(batches)
def test_batches_at_the_same_time_are_answered_as_alone(asked):
    place = made_once()
    models = shared(place)

    def answered(one):
        name, chosen = one
        return models[name].model.model.outputs([TEXTS[i] for i in chosen])

    with ThreadPoolExecutor(4) as threads:
        for (name, chosen), found in zip(asked, threads.map(answered, asked)):
            assert np.array_equal(found, alone(place, name, *chosen))


@pytest.mark.parametrize("name", NAMES)
def test_the_merged_model_in_torch_answers_the_same(place, name):
    merged = place / "merged" / name
    schema = load_schema(merged)
    scale = getattr(schema, "scale", 1.0)
    predictor = shared(place)[name]
    found = predictor.model.scores(TEXTS)
    original = reference_scores(merged, TEXTS, schema)
    assert np.abs(found - original).max() < 1e-5 * scale
    task = predictor.task
    if task.stores_scores():
        assert (task.predict(found) == task.predict(original)).all()
    assert verify(place / name).parity.equal == verify(place / name).parity.items


def test_an_adapter_changes_what_the_base_says(place):
    "Without its thin matrices the same head answers otherwise: they are not ignored."
    model = shared(place)["topics"].model.model
    thin = model.carried_out_by
    off = {k: 0 * v if k.endswith((".up", ".down")) else v for k, v in thin.tensors.items()}
    ids = np.array([model.input_ids(TEXTS[0])])
    plain = model.base.engine_with(off).logits(ids, np.ones_like(ids))
    assert np.abs(plain - thin.logits(ids, np.ones_like(ids))).max() > 1e-3


# -- one base


@pytest.fixture
def sessions(monkeypatch):
    "How many engines of onnxruntime are made."
    import onnxruntime

    made = []
    usual = onnxruntime.InferenceSession

    def counted(*words, **named):
        made.append(1)
        return usual(*words, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counted)
    return made


def test_four_adapters_open_one_engine_and_four_bundles_four(moved, sessions, tmp_path):
    shutil.copytree(moved / "topics", moved / "again")
    write_manifest(moved / "again", replace(verify(moved / "topics"), name="again"))
    digest = stated_digest(moved / "base")
    nothing_open()
    adapters = [Predictor.load(moved / name) for name in (*NAMES, "again")]
    assert len(sessions) == 1 and open_bases() == [digest]
    assert len({id(one.model.model.base) for one in adapters}) == 1
    thin = [one.model.model.carried_out_by.tensors for one in adapters]
    own = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in thin]
    assert max(own) < (moved / "base" / "model.onnx").stat().st_size / 5
    del sessions[:]
    whole = [Predictor.load(make_bundle(tmp_path / f"whole-{i}")) for i in range(4)]
    assert len(sessions) == len(whole) == 4
    # the base goes when the last adapter does, and not before
    kept = adapters.pop()
    adapters.clear()
    assert open_bases() == [digest]
    kept.predict_batch(TEXTS)
    del kept
    assert open_bases() == []


def test_the_base_may_lie_elsewhere(moved, tmp_path, monkeypatch):
    shutil.move(moved / "base", tmp_path / "somewhere")
    with pytest.raises(MissingError, match="there is no base in"):
        verify_and_open(moved / "topics")
    monkeypatch.setenv("LLMECO_BASE", str(tmp_path / "somewhere"))
    assert len(verify_and_open(moved / "topics").scores(TEXTS)) == len(TEXTS)


def verify_and_open(bundle):
    nothing_open()
    return open_model(bundle, verify(bundle))


def test_answers_need_no_heavy_library(place):
    code = (
        "import sys; from llmeco_nb.deployment.predictor import Predictor; "
        f"Predictor.load({str(place / 'labels')!r}).predict_batch(['Ada']); "
        "print(*sorted({'torch', 'transformers', 'pandas', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "\n", done.stdout + done.stderr


# -- what is refused


@pytest.fixture(scope="module")
def stranger(place, tmp_path_factory):
    "A base of another encoder of the same shape: one of its weights is another."
    import onnx

    folder = Path(shutil.copytree(place / "base", tmp_path_factory.mktemp("stranger") / "other"))
    graph = onnx.load(folder / "model.onnx")
    weight = max(graph.graph.initializer, key=lambda one: len(one.raw_data))
    weight.raw_data = weight.raw_data[:-4] + np.float32(0.5).tobytes()
    onnx.save(graph, folder / "model.onnx")
    facts = BaseManifest.from_json(read_json(folder / "manifest.json"))
    write_base_manifest(folder, replace(facts, frozen="5" * 64))
    return folder


def test_another_base_is_refused_with_both_digests(moved, stranger, monkeypatch):
    nothing_open()
    needed, found = stated_digest(moved / "base"), stated_digest(stranger)
    assert needed != found
    shutil.rmtree(moved / "base")
    shutil.copytree(stranger, moved / "other")
    for named in ("", str(stranger)):
        if named:
            monkeypatch.setenv("LLMECO_BASE", named)
        with pytest.raises(DataError) as said:
            Predictor.load(moved / "topics")
        assert needed in str(said.value) and found in str(said.value)


def test_a_base_under_a_false_digest_is_refused(moved, stranger):
    "Somebody writes the digest that is asked for into the manifest of another base."
    nothing_open()
    needed = stated_digest(moved / "base")
    shutil.rmtree(moved / "base")
    shutil.copytree(stranger, moved / "base")
    told = read_json(moved / "base" / "manifest.json")
    write_json(moved / "base" / "manifest.json", {**told, "digest": needed})
    with pytest.raises(DataError, match="manifest.json is not as it was written"):
        Predictor.load(moved / "topics")


@pytest.mark.parametrize("file", adapter_files)
@pytest.mark.parametrize("at", (0.1, 0.5, 0.999))
def test_a_flipped_bit_of_an_adapter_is_named(moved, file, at):
    data = bytearray((moved / "topics" / file).read_bytes())
    data[int(at * len(data))] ^= 1
    (moved / "topics" / file).write_bytes(data)
    for opened in (Predictor.load, lambda b: open_model(b, stated(b))):
        with pytest.raises(DataError, match=f"{file} is not the file that was packed"):
            opened(moved / "topics")


@pytest.mark.parametrize("file", (*base_files, "manifest.json"))
def test_a_flipped_bit_of_the_base_is_named(moved, file):
    nothing_open()
    data = bytearray((moved / "base" / file).read_bytes())
    data[len(data) // 2] ^= 1
    (moved / "base" / file).write_bytes(data)
    with pytest.raises((DataError, MissingError), match=f"{file} is not|no base in"):
        Predictor.load(moved / "topics")


def changed_tensors(change):
    "A way to change the file of tensors."

    def do(bundle):
        file = bundle / "adapter.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return do


def changed_facts(**changes):
    def do(bundle):
        write_json(bundle / "adapter.json", {**read_json(bundle / "adapter.json"), **changes})

    return do


def wider(tensors):
    "One pair of matrices of another rank than all others."
    tensors[f"{QUERY}.down"] = np.zeros((64, 7), np.float32)
    tensors[f"{QUERY}.up"] = np.zeros((7, 64), np.float32)


def deeper(bundle):
    "Matrices for a layer that the base has not."
    told = read_json(bundle / "adapter.json")
    name = QUERY.replace("layer.0", "layer.7")
    changed_facts(modules=[*told["modules"], name])(bundle)
    more = {f"{name}.down": np.zeros((64, 2), np.float32)}
    more[f"{name}.up"] = np.zeros((2, 64), np.float32)
    changed_tensors(lambda t: t.update(more))(bundle)


def of_nan(tensors):
    tensors[f"{QUERY}.up"][0, 0] = np.nan


def halved(tensors):
    tensors[f"{QUERY}.up"] = tensors[f"{QUERY}.up"].astype(np.float16)


REFUSED = dict(
    rank=(changed_facts(rank=3), r"with rank 3 and 3 outputs the base tiny"),
    one_rank=(changed_tensors(wider), rf"{QUERY}.down has the shape \(64, 7\)"),
    missing=(changed_tensors(lambda t: t.pop(f"{QUERY}.up")), rf"{QUERY}.up is missing"),
    head=(changed_tensors(lambda t: t.pop("classifier.bias")), "classifier.bias is missing"),
    layer=(deeper, r"layer.7.attention.self.query', which the base tiny .* has not"),
    unstated=(changed_facts(modules=[QUERY]), "neither a matrix that it states"),
    stranger=(changed_tensors(lambda t: t.update(x=np.zeros(1, np.float32))), "holds 'x'"),
    nan=(changed_tensors(of_nan), "not finite"),
    half=(changed_tensors(halved), "of the type float16"),
    outputs=(changed_facts(outputs=4), r"classifier.bias has the shape \(3,\)"),
    field=(changed_facts(alpha=3), "alpha: Unexpected"),
    none=(changed_facts(rank=0), "rank: "),
    text=(lambda b: (b / "adapter.safetensors").write_text("none"), "no file of safetensors"),
    gone=(lambda b: (b / "adapter.json").unlink(), "adapter.json is not in its manifest"),
)


@pytest.mark.parametrize("how", REFUSED)
def test_what_does_not_fit_the_base_is_refused_by_name(moved, how):
    change, said = REFUSED[how]
    change(moved / "topics")
    sealed(moved / "topics")
    with pytest.raises((DataError, MissingError), match=said):
        Predictor.load(moved / "topics")


def test_a_manifest_that_fits_no_adapter_is_refused(moved):
    told = verify(moved / "topics")
    for changes, said in (
        (dict(base_model=None), "names no base_model"),
        (dict(max_length=None), "lacks max_length"),
        (dict(max_length=9999), "its base at most 512"),
        (dict(schema=ClassificationSchema(labels=["a", "b"])), "has 3 scores"),
    ):
        write_manifest(moved / "topics", replace(told, **changes))
        with pytest.raises(DataError, match=said):
            Predictor.load(moved / "topics")
    with pytest.raises(DataError, match="knows no engine 'openvino-int8'"):
        open_model(moved / "topics", told, engine="openvino-int8")
    with pytest.raises(UsageError, match="holds a base of adapters"):
        Predictor.load(moved / "base")
    with pytest.raises(DataError, match="no base of adapters but a bundle of the kind 'adapter'"):
        open_base(moved / "topics")


def test_a_signature_covers_the_base_that_is_named(moved, stranger, tmp_path):
    pytest.importorskip("cryptography")
    new_key(tmp_path / "key")
    trusted = TrustedKeys.read([tmp_path / "key.pub"])
    sign_bundle(moved / "base", tmp_path / "key")
    sign_bundle(moved / "topics", tmp_path / "key")
    Predictor.load(moved / "topics", trusted=trusted)
    kept = (moved / "topics" / "signature.json").read_bytes()
    sealed(moved / "topics", base_model=stated_digest(stranger))
    (moved / "topics" / "signature.json").write_bytes(kept)
    with pytest.raises(DataError, match="signature is of another bundle"):
        Predictor.load(moved / "topics", trusted=trusted)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(use_dora=True), "DoRA"),
        (dict(use_rslora=True), "use_rslora is True"),
        (dict(bias="all"), "bias is 'all'"),
        (dict(rank_pattern={"query": 3}), "rank_pattern"),
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(r=3), "with rank 3"),
        (dict(lora_alpha=99.0), "does not answer as the original"),
        (dict(lora_alpha=None), "lora_alpha: Input should be"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_peft_does_otherwise_is_not_packed(moved, changes, said):
    file = moved / "merged" / "topics" / "adapter" / "adapter_config.json"
    write_json(file, {**read_json(file), **changes})
    with pytest.raises(DataError, match=said):
        pack_adapter(moved / "merged" / "topics", moved / "base", moved / "new")
    assert not (moved / "new").exists() and not [*moved.glob(".new*")]


def test_a_model_of_another_encoder_is_not_packed(moved, stranger):
    needed, found = (verify_base(b).frozen for b in (stranger, moved / "base"))
    with pytest.raises(DataError) as said:
        pack_adapter(moved / "merged" / "topics", stranger, moved / "new")
    assert needed in str(said.value) and found in str(said.value)
    shutil.rmtree(moved / "merged" / "topics" / "adapter")
    with pytest.raises(MissingError, match="trainable=lora"):
        pack_adapter(moved / "merged" / "topics", moved / "base", moved / "new")
    assert not (moved / "new").exists()


# -- packing


@pytest.mark.parametrize("last", ("write_manifest", "verify", "parity"))
def test_a_killed_packing_leaves_no_bundle(moved, last):
    merged, base, to = moved / "merged" / "rating", moved / "base", moved / "made" / "new"
    pid = os.fork()
    if pid == 0:
        setattr(adapter_packing, last, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
        try:
            pack_adapter(merged, base, to)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not to.exists() and all(p.name.startswith(".new-") for p in to.parent.iterdir())
    manifest = pack_adapter(merged, base, to, AdapterPackOptions(name="rating"))
    assert verify(to) == manifest
    assert manifest.digest == verify(moved / "rating").digest, "the same files, whenever it is made"


def test_a_base_is_whole_or_not_there(tmp_path, monkeypatch):
    "It is killed once the graph is written, and a folder that exists is never touched."
    encoder, to = small_random_encoder(small_corpus()), tmp_path / "base"

    def written(model, at):
        at.write_bytes(b"graph")
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        adapter_export.export_base = written
        try:
            pack_base(encoder, to)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not to.exists() and all(p.name.startswith(".base-") for p in tmp_path.iterdir())
    to.mkdir()
    with pytest.raises(UsageError, match="never replaced"):
        pack_base(encoder, to)
    assert [*to.iterdir()] == []


def test_the_commands_name_what_does_not_go_together(tmp_path):
    for words, said in (
        (dict(as_base=True, base="b"), "--as-base makes a base"),
        (dict(as_base=True, weights="int8"), "--weights is not for"),
        (dict(base="b", weights="int8"), "--weights is not for"),
    ):
        with pytest.raises(UsageError, match=said):
            pack(PackChoice("model", to=str(tmp_path / "new"), **words))
    with pytest.raises(MissingError, match="is no folder"):
        pack(PackChoice(str(tmp_path / "no"), to=str(tmp_path / "new"), as_base=True))
    assert not (tmp_path / "new").exists()


def test_what_was_trained_is_served_over_its_base(tmp_path, monkeypatch):
    """From the stage that fine-tunes to answers: the base's weights come out as they went in, and
    the adapter over them answers as the stage has."""
    pd = pytest.importorskip("pandas")
    from llmeco_nb.finetuning import classifier as finetune
    from llmeco_nb.finetuning.classifier_config import ClassifierConfig
    from llmeco_nb.tasks.predictions import scores_of

    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path / "runs"))
    corpus = made(tmp_path / "corpus")
    encoder = small_random_encoder(corpus)
    merge, seen = finetune.merge_adapter, {}

    def spying(model):
        weights = model.state_dict()
        seen.update({k.replace(".base_layer", ""): v.clone() for k, v in weights.items()})
        merge(model)

    monkeypatch.setattr(finetune, "merge_adapter", spying)
    told = ClassifierConfig(**{**SMALL, "epochs": 1, "num_evals": 1}, trainable="lora")
    record = create_record(tmp_path / "r", "finetune")
    finetune.fine_tune(record, corpus, config=told)

    import torch
    from transformers import AutoModel

    for name, before in AutoModel.from_pretrained(encoder).state_dict().items():
        if "pooler" not in name and before.is_floating_point():
            assert torch.equal(seen[f"bert.{name}"], before), name
    pack_base(encoder, tmp_path / "served" / "base")
    bundle = tmp_path / "served" / "toy"
    pack_adapter(record.artifact("classifier"), tmp_path / "served" / "base", bundle)
    table = pd.read_parquet(record.artifact("predictions"))
    table = table[table.split == "test"].head(20)
    texts = pd.read_parquet(Path(corpus) / "test.parquet").set_index("id").text[table.id].tolist()
    found = Predictor.load(bundle).model.scores(texts)
    assert np.abs(found - scores_of(table)).max() < 0.02, "bfloat16 may have answered"
    exact = reference_scores(record.artifact("classifier"), texts, verify(bundle).schema)
    assert np.abs(found - exact).max() < 1e-5


# -- one server


def answers_of(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["answers"]


def value_of(answer):
    "What an answer says, without what goes with it."
    return next(answer[k] for k in ("label", "labels", "value") if k in answer)


def test_tasks_are_served_side_by_side(place, tmp_path):
    predictors = list(shared(place).values())
    wanted = {
        name: [value_of(a.model_dump()) for a in one.predict_batch(TEXTS[:3])]
        for name, one in shared(place).items()
    }
    with TestClient(make_task_app(predictors, tmp_path / "f.sqlite")) as client:

        def asked(i):
            name = NAMES[i % 3]
            texts = [TEXTS[i % 3], TEXTS[(i + 1) % 3]]
            found = answers_of(client.post(f"/v1/models/{name}/predict", json=dict(texts=texts)))
            return name, i, [value_of(a) for a in found]

        with ThreadPoolExecutor(6) as threads:
            for name, i, found in threads.map(asked, range(60)):
                expected = [wanted[name][i % 3], wanted[name][(i + 1) % 3]]
                if name == "rating":
                    assert found == pytest.approx(expected, abs=1e-4)
                else:
                    assert found == expected
        assert client.post("/v1/models/nobody/predict", json=dict(text="x")).status_code == 404
        assert client.get("/readyz").json() == {"ready": True}
        assert len(client.get("/v1/model").json()["open_bases"]) == 1
        got = client.post("/v1/models/topics/predict", json=dict(text="x")).json()
        told = dict(request_id=got["request_id"], label="food")
        assert client.post("/v1/models/topics/feedback", json=told).json()["label"] == "food"
        number = client.post("/v1/models/rating/predict", json=dict(text="x")).json()
        crossed = dict(request_id=number["request_id"], correct=True)
        reply = client.post("/v1/models/topics/feedback", json=crossed)
        assert reply.status_code == 404 and "another model" in reply.text
        assert client.post("/v1/models/rating/feedback", json=crossed).json()["correct"]
        wrong = dict(request_id=number["request_id"], value="food", author="ann")
        assert client.post("/v1/models/rating/feedback", json=wrong).status_code == 422
        document = client.get("/openapi.json").json()
        assert {f"/v1/models/{name}/predict" for name in NAMES} <= document["paths"].keys()
    assert [row.task for row in read_feedback(tmp_path / "f.sqlite")] == [
        "text-classification",
        "regression",
    ]


def test_a_key_for_one_task_neither_asks_nor_judges_another(place, tmp_path):
    from llmeco_nb.deployment.key_admin import KeyAdmin
    from llmeco_nb.deployment.keys import KeyOptions

    database = tmp_path / "f.sqlite"
    admin = KeyAdmin(database, "a test")
    whole, _ = admin.add(KeyOptions(name="whole"))
    one, _ = admin.add(KeyOptions(name="one", models=("topics",)))
    admin.close()
    head = {name: {"Authorization": f"Bearer {key}"} for name, key in dict(w=whole, o=one).items()}
    app = make_task_app(list(shared(place).values()), database)
    with TestClient(app) as client:
        ask = lambda name, who: client.post(
            f"/v1/models/{name}/predict", json=dict(text="x"), headers=head[who]
        )
        rated = ask("rating", "w").json()["request_id"]
        judged = dict(request_id=rated, correct=False)
        assert ask("topics", "o").status_code == 200 and ask("rating", "o").status_code == 403
        for name, status in (("rating", 403), ("topics", 404)):
            at = f"/v1/models/{name}/feedback"
            assert client.post(at, json=judged, headers=head["o"]).status_code == status
    assert not list(read_feedback(database))


def test_exchanging_one_adapter_leaves_the_others_alone(moved, sessions, tmp_path):
    merged = tmp_path / "merged"
    schema = load_schema(moved / "merged" / "topics")
    random_adapter(small_random_encoder(small_corpus()), schema, merged, seed=9, rank=5)
    pack_adapter(merged, moved / "base", moved / "new", AdapterPackOptions(name="topics"))
    del sessions[:]
    models = {name: Predictor.load(moved / name) for name in (*NAMES, "new")}
    assert open_bases().count(stated_digest(moved / "base")) == 1
    del sessions[:]

    async def run():
        from llmeco_nb.deployment.keys import anybody

        ledger = Ledger(tmp_path / "f.sqlite")
        services = TaskServices([models[name] for name in NAMES], ledger, None, ExecutorOptions())
        count = iter(range(10**6))

        async def ask(name):
            asked = PredictRequest([TEXTS[0]], ["text"], f"r{next(count)}", anybody)
            return await services.services[name].predict(asked)

        before = {name: await ask(name) for name in NAMES}
        executors = {name: one.executor for name, one in services.services.items()}
        stop, others = False, []

        async def busy():
            while not stop:
                others.append(await ask("rating"))

        client = asyncio.create_task(busy())
        for version in ("new", "topics", "new"):
            await services.swap(models[version])
            await asyncio.sleep(0.02)
        stop = True
        await client
        after = {name: await ask(name) for name in NAMES}
        assert not sessions, "nothing was opened for an exchange"
        for name in ("labels", "rating"):
            assert services.services[name].executor is executors[name]
            assert after[name].predictions == before[name].predictions
        assert {r.model.digest for r in others} == {models["rating"].digest}
        assert all(r.predictions == before["rating"].predictions for r in others) and others
        assert after["topics"].model.digest == models["new"].digest
        assert after["topics"].predictions != before["topics"].predictions
        with pytest.raises(UsageError, match="No model 'base'|is served here"):
            await services.swap(shared_other(models))
        await services.close()
        ledger.close()

    asyncio.run(run())


def shared_other(models):
    "A predictor under a name that is not served."
    one = models["new"]
    return Predictor(replace(one.manifest, name="unknown"), one.model)


def test_names_that_no_path_can_tell_apart_are_refused(place, tmp_path):
    one = shared(place)["topics"]
    odd = Predictor(replace(one.manifest, name="a/b"), one.model)
    for predictors, said in (([one, one], "Two models have the name"), ([odd], "cannot be asked")):
        with pytest.raises(UsageError, match=said):
            make_task_app(predictors, tmp_path / "f.sqlite")


def test_the_command_serves_several(place, tmp_path):
    import httpx

    words = ["--bundle", place / "topics", "--also", place / "rating"]
    server = ServeCommand(*words, "--database", tmp_path / "f.sqlite")
    try:
        assert "/v1/models/topics/predict" in server.said[-1]
        for name in ("topics", "rating", "topics"):
            url = f"{server.address}/v1/models/{name}/predict"
            [answer] = answers_of(httpx.post(url, json=dict(text=TEXTS[0]), timeout=30))
            [expected] = shared(place)[name].predict_batch(TEXTS[:1])
            assert value_of(answer) == pytest.approx(value_of(expected.model_dump()), abs=1e-4)
        assert len(httpx.get(f"{server.address}/v1/model").json()["models"]) == 2
    finally:
        server.end()


def test_also_needs_a_bundle(place, tmp_path):
    from llmeco_nb.deployment.server_options import ServerOptions
    from llmeco_nb.deployment.serving import open_served

    told = ServerOptions(also=(str(place / "rating"),))
    with pytest.raises(UsageError, match="give --bundle"):
        open_served(told, None, tmp_path / "f.sqlite", None)


def test_an_edited_manifest_is_read_strictly(moved):
    told = read_json(moved / "topics" / "manifest.json")
    told["base_model"] = "not a digest"
    told["digest"] = manifest_digest(told)
    (moved / "topics" / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="base_model"):
        verify(moved / "topics")
