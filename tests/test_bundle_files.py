"""Bundles that somebody has prepared with intent: manifests, paths, links, patterns, numbers."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime", reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from smallbundle import make_bundle

from llmeco_nb.core import DataError, LlmecoError, MissingError, read_json, sha256_of, write_json
from llmeco_nb.deployment.bundle import small_bundle
from llmeco_nb.deployment.loading import open_model
from llmeco_nb.deployment.manifest import (
    BundleFiles,
    Manifest,
    is_relative,
    manifest_digest,
    verify,
    write_manifest,
)
from llmeco_nb.deployment.patterns import check_tokenizer
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.tasks.registry import schema_from_json
from llmeco_nb.tasks.text_classification import ClassificationSchema

SLOW_PATTERN = r"(\w+\s?)+$"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "words")


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.fixture(scope="module")
def stack() -> Path:
    pytest.importorskip("torch")
    return small_bundle("stack")


def rewrite(folder: Path, change) -> None:
    "Change manifest.json and give it the digest of what it says now."
    raw = json.loads((folder / "manifest.json").read_text())
    change(raw)
    raw["digest"] = manifest_digest(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))


def repack(folder: Path) -> None:
    "Hash the files as they are now, as somebody would who wants the bundle to look whole."
    write_manifest(folder, verify_nothing(folder))


def verify_nothing(folder: Path) -> Manifest:
    return Manifest.from_json(json.loads((folder / "manifest.json").read_text()))


# -- the manifest


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda m: m.pop("name"), "name"),
        (lambda m: m.pop("files"), "is not in the manifest"),
        (lambda m: m.update(name=7), "name"),
        (lambda m: m.update(name=""), "name"),
        (lambda m: m.update(name="x" * 301), "name"),
        (lambda m: m.update(secret=1), "secret"),
        (lambda m: m.update(max_length="16"), "max_length"),
        (lambda m: m.update(max_length=0), "max_length"),
        (lambda m: m.update(head_fraction=1.5), "head_fraction"),
        (lambda m: m.update(pad_token_id=-1), "pad_token_id"),
        (lambda m: m.update(accuracy=[1]), "accuracy"),
        (lambda m: m.update(parity=dict(items=3)), "parity"),
        (lambda m: m.update(origin=dict(model="a", artifact="b")), "origin.artifact"),
        (lambda m: m.update(origin=dict(planet="earth")), "planet"),
        (lambda m: m["schema"].pop("labels"), "labels"),
        (lambda m: m["schema"].update(labels="ab"), "labels"),
        (lambda m: m["schema"].update(labels=["a", 1]), "labels"),
        (lambda m: m["schema"].update(labels=["a", "a"]), "twice"),
        (lambda m: m["schema"].update(task="translation"), "translation"),
        (lambda m: m["schema"].update(cleaning=dict(version="1")), "version"),
        (lambda m: m.update(schema=[1]), "schema names its task"),
        (lambda m: m.update(format_version=True), "format version True"),
        (lambda m: m.update(format_version="3"), "format version '3'"),
        (lambda m: m["files"].update({"model.onnx": 3}), "files"),
        (lambda m: m["files"].update({"model.onnx": "0" * 63}), "files"),
    ],
)
def test_a_field_that_is_not_as_it_should_be_is_named(copy, change, said):
    rewrite(copy, change)
    with pytest.raises(DataError, match="refused|cannot be read|format version") as e:
        verify(copy)
    assert said in str(e.value) and str(copy) in str(e.value)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "a/../b", "./a", "a//b", "a\\b", "C:a", "", "a\0b", "a\nb"],
)
def test_a_path_that_leads_elsewhere_is_refused(copy, name):
    assert not is_relative(name)
    rewrite(copy, lambda m: m["files"].update({name: "0" * 64}))
    with pytest.raises(DataError, match="which is no file in it"):
        verify(copy)


@pytest.mark.parametrize("name", ["a", "linear/weights_0.npy", "a b", "é.txt", ".hidden", "a..b"])
def test_a_path_in_the_folder_is_one(name):
    assert is_relative(name)


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"{", b"\xff\xfe{}", b"[" * 100_000, b"NaN"])
def test_what_is_no_manifest_is_refused(copy, data):
    (copy / "manifest.json").write_bytes(data)
    with pytest.raises(DataError, match="manifest.json is not as it was written"):
        verify(copy)


def test_a_manifest_that_lists_itself_is_refused(copy):
    rewrite(copy, lambda m: m["files"].update({"manifest.json": "0" * 64}))
    with pytest.raises(DataError, match="which is no file in it"):
        verify(copy)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_a_field_holds_is_read_or_refused(bundle, data):
    "No field can be changed in a way that ends in anything but a manifest or a refusal."
    raw = read_json(bundle / "manifest.json")
    place = raw
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        break
    place[key] = data.draw(json_values)
    try:
        found = Manifest.from_json(raw)
    except LlmecoError:
        return
    again = Manifest.from_json(json.loads(json.dumps(found.as_json())))
    assert again == found


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_whatever_a_schema_holds_is_read_or_refused(raw):
    for value in (raw, {"task": "text-classification", "labels": raw}, {"task": raw}):
        try:
            schema_from_json(value)
        except LlmecoError:
            pass


# -- files


@pytest.mark.parametrize("what", ["file", "folder", "pipe", "member"])
def test_a_link_or_a_pipe_is_refused(copy, tmp_path, what):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_text("x")
    if what == "file":
        shutil.move(copy / "tokenizer.json", outside / "tokenizer.json")
        (copy / "tokenizer.json").symlink_to(outside / "tokenizer.json")
    if what == "folder":
        (copy / "more").symlink_to(outside)
    if what == "pipe":
        os.mkfifo(copy / "pipe")
    if what == "member":
        (copy / "linear").mkdir()
        (copy / "linear" / "weights").symlink_to(outside / "x")
    for look in (verify, lambda at: write_manifest(at, verify_nothing(at))):
        with pytest.raises(DataError, match="is a link or a device"):
            look(copy)


@pytest.mark.parametrize(
    "name", ["model.pt", "model.pt2", "a/MODEL.PT", "weights.pth", "x.pkl", "m.joblib", "c.ckpt"]
)
def test_a_file_that_can_start_a_program_is_refused(copy, name):
    "Even where the manifest lists it: no bundle holds one, and the server opens none."
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"PK")
    rewrite(copy, lambda m: m["files"].update({name: sha256_of(copy / name)}))
    for look in (verify, lambda at: write_manifest(at, verify_nothing(at)), Predictor.load):
        with pytest.raises(DataError, match="may carry a program"):
            look(copy)


def test_a_file_that_is_exchanged_after_the_check_is_not_opened(copy):
    manifest = verify(copy)
    for name in ("model.onnx", "tokenizer.json"):
        kept = (copy / name).read_bytes()
        (copy / name).write_bytes(kept + b" ")
        with pytest.raises(DataError, match=f"{name} is not the file that was packed"):
            open_model(copy, manifest)
        (copy / name).unlink()
        with pytest.raises(MissingError, match=name):
            open_model(copy, manifest)
        (copy / name).write_bytes(kept)
    open_model(copy, manifest)


def test_what_the_manifest_does_not_list_cannot_be_read(copy):
    (copy / "extra").write_text("x")
    with pytest.raises(MissingError, match="extra is not in its manifest"):
        BundleFiles(copy, verify_nothing(copy).files).read("extra")


def test_a_member_that_lists_other_files_than_its_stack_is_refused(stack, tmp_path):
    copy = Path(shutil.copytree(stack, tmp_path / "copy"))
    (copy / "linear" / "extra").write_text("x")
    write_manifest(copy, verify_nothing(copy))  # the stack lists it, the member does not
    with pytest.raises(DataError, match="linear/manifest.json lists other files"):
        open_model(copy, verify(copy))


# -- what is in them


def test_a_pattern_of_a_tokenizer_is_refused_and_never_run(copy):
    told = read_json(copy / "tokenizer.json")
    told["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": SLOW_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    write_json(copy / "tokenizer.json", told)
    repack(copy)
    begun = time.monotonic()
    with pytest.raises(DataError, match="brings the pattern"):
        Predictor.load(copy)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("place", ["normalizer", "pre_tokenizer", "decoder", "post_processor"])
def test_no_place_of_a_tokenizer_may_hold_one(copy, place):
    told = read_json(copy / "tokenizer.json")
    told[place] = {"type": "Sequence", "parts": [[{"pattern": {"Regex": SLOW_PATTERN}}]]}
    with pytest.raises(DataError, match="brings the pattern"):
        check_tokenizer(told, "tokenizer.json")


def test_the_packaged_tokenizers_bring_known_patterns_only():
    checkpoints = pytest.importorskip("llmeco_nb.finetuning.checkpoints")
    try:
        folder = checkpoints.packaged_minilm()
    except MissingError:
        pytest.skip("the packaged MiniLM comes with the extra `demo`")
    check_tokenizer(read_json(folder / "tokenizer.json"), "minilm")


def linear_bundle(folder: Path) -> Path:
    return Path(shutil.copytree(small_bundle("linear"), folder))


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda m: m["bags"][0].update(pattern=SLOW_PATTERN), "as llmeco never does"),
        (lambda m: m["bags"][0].update(pattern=7), "not as it is written"),
        (lambda m: m["bags"][0].update(high=10**9), "as llmeco never does"),
        (lambda m: m["bags"][0].update(low=0), "as llmeco never does"),
        (lambda m: m.update(scale=None), "not as it is written"),
        (lambda m: m.update(scale="1e999"), "no finite number"),
        (lambda m: m.update(bias=[1e308 * 10]), "not JSON|no finite number"),
        (lambda m: m.update(classes=m["classes"][:1] * 5), "for 5 classes"),
        (lambda m: m.update(form=None), "has the form None"),
    ],
)
def test_a_linear_model_with_a_trap_in_it_is_refused(tmp_path, change, said):
    copy = linear_bundle(tmp_path / "copy")
    facts = json.loads((copy / "model.json").read_text())
    change(facts)
    (copy / "model.json").write_text(json.dumps(facts))
    repack(copy)
    with pytest.raises(DataError, match=said):
        Predictor.load(copy)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused(tmp_path, value):
    copy = linear_bundle(tmp_path / "copy")
    weights = np.load(copy / "weights_0.npy")
    weights[-1, -1] = value
    np.save(copy / "weights_0.npy", weights)
    repack(copy)
    with pytest.raises(DataError, match=r"weights_0.npy holds what is no finite number"):
        Predictor.load(copy)


def test_an_array_of_objects_is_refused(tmp_path):
    copy = linear_bundle(tmp_path / "copy")
    np.save(copy / "weights_0.npy", np.array([print], dtype=object), allow_pickle=True)
    repack(copy)
    with pytest.raises(DataError, match="weights_0.npy is not an array file"):
        Predictor.load(copy)


def test_an_encoder_whose_answers_are_no_numbers_is_refused(copy):
    import onnx
    from onnx import numpy_helper

    model = onnx.load(copy / "model.onnx")
    for one in model.graph.initializer:
        if one.name == "vectors":
            spoiled = np.full_like(numpy_helper.to_array(one), np.nan)
            one.CopyFrom(numpy_helper.from_array(spoiled, "vectors"))
    onnx.save(model, copy / "model.onnx")
    repack(copy)
    with pytest.raises(DataError, match="no finite number"):
        Predictor.load(copy)


def test_weights_that_lie_elsewhere_are_not_read(copy, tmp_path, monkeypatch):
    "A model in ONNX may name another file for its weights; that one nobody has hashed."
    import onnx

    model = onnx.load(copy / "model.onnx")
    for one in model.graph.initializer:
        if one.name == "vectors":
            raw = onnx.numpy_helper.to_array(one).tobytes()
            one.ClearField("raw_data")
            one.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(len(raw)))):
                entry = one.external_data.add()
                entry.key, entry.value = key, value
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "w.bin").write_bytes(raw)
    monkeypatch.chdir(tmp_path)
    repack(copy)
    with pytest.raises(DataError, match="cannot be opened"):
        Predictor.load(copy)


@pytest.mark.parametrize("labels", [["negative", "fair", "positive"], ["negative"]])
def test_classes_that_are_not_those_of_the_model_are_refused(copy, labels):
    write_manifest(
        copy,
        Manifest(
            "words",
            kind="onnx",
            schema=ClassificationSchema(labels=labels),
            max_length=16,
            head_fraction=0.25,
            pad_token_id=0,
        ),
    )
    with pytest.raises(DataError, match="an answer of the model has 2 scores"):
        Predictor.load(copy)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_what_the_libraries_cannot_read_is_refused(copy, name):
    (copy / name).write_bytes(b"{}" if name == "tokenizer.json" else b"\0" * 50)
    repack(copy)
    with pytest.raises(DataError, match="cannot be opened as a model of the kind onnx"):
        Predictor.load(copy)
