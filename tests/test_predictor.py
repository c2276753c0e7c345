"""The predictor: bundles that are refused, answers that hold in any batch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime", reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from smallbundle import WORDS, make_bundle

from llmeco_nb.core import DataError, MissingError
from llmeco_nb.deployment.manifest import Manifest, manifest_digest, verify, write_manifest
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.tasks.text_classification import ClassificationSchema

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
        match="format version 99; 1 to 4 are read here. .*make a new one with `llmeco run`",
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
    cost = lambda text: predictor.prepare(text).cost
    assert cost("good film") == 4 and cost("good " * 500) == 16 and cost("") >= 1


def test_the_window_keeps_both_ends(predictor):
    middle = "good good " + "dull " * 50 + "good " * 12
    assert (
        predictor.predict_batch([middle])[0].label == "positive"
    )  # 4 tokens from the front, 12 from the end


# -- what it stands on


def test_answering_loads_no_heavy_library(bundle):
    code = f"""
import sys
from llmeco_nb.deployment.predictor import Predictor
heavy = {{"torch", "transformers", "nbdev", "sklearn", "pandas", "scipy", "onnx"}}
answer = Predictor.load({str(bundle)!r}).predict_batch(["good"])[0]
print(answer.label, *sorted(heavy & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["positive"], done.stdout + done.stderr
