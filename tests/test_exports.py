"""Exports of a fine-tuned encoder: each format answers as torch does, for any batch and length;
what does not is refused and leaves nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="an encoder is exported from torch")
for library in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf"):
    pytest.importorskip(library, reason="every format needs its libraries")
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmeco_nb.core import DataError, MissingError, UsageError, read_json, sha256_of, write_json
from llmeco_nb.data.corpus import label_names, read_split, small_corpus
from llmeco_nb.deployment.export_command import ExportChoice, export
from llmeco_nb.deployment.export_trial import (
    corpus_of_run,
    corpus_texts,
    export_model,
    file_texts,
)
from llmeco_nb.deployment.exported_model import ExportedModel
from llmeco_nb.deployment.exports import export_formats, open_source
from llmeco_nb.deployment.loading import open_model
from llmeco_nb.deployment.manifest import verify, write_manifest
from llmeco_nb.deployment.packing import reference_scores
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.finetuning.checkpoints import build_classifier, small_random_encoder
from llmeco_nb.finetuning.classifier import save_classifier
from llmeco_nb.finetuning.engine_trial import tolerated_loss
from llmeco_nb.tasks.registry import load_schema

LENGTH = 48


def saved_classifier(folder: Path, scale: float) -> Path:
    "A tiny BERT with random weights whose logits are so many times as far apart, around 0."
    corpus = str(small_corpus())
    model, tokenizer = build_classifier(str(small_random_encoder(corpus)), label_names(corpus))
    texts = read_split(corpus, "validation").text.tolist()[:30]
    given = tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
    with torch.no_grad():
        model.classifier.weight.mul_(scale)
        model.classifier.bias.sub_(model.eval()(**given).logits.mean(0))
    save_classifier(model, tokenizer, folder, LENGTH, 25, load_schema(corpus))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return saved_classifier(tmp_path_factory.mktemp("model") / "classifier", 10)


@pytest.fixture(scope="module")
def exports(classifier, tmp_path_factory) -> Path:
    "All formats, as the command makes them."
    to = tmp_path_factory.mktemp("exports")
    told = ExportChoice(str(classifier), to=str(to), corpus=str(small_corpus()), most=30)
    export(told)
    return to


@pytest.fixture(scope="module")
def opened(exports) -> dict[str, ExportedModel]:
    with pytest.warns(DeprecationWarning, match="torch.jit.load"):  # as torch says it
        return {name: ExportedModel(exports / name) for name in export_formats}


WORDS = (
    "a good film it was long and dull nobody laughed <br /> ? ! \u00e9t\u00e9 \u4e2d 1999".split(
        " "
    )
)
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=90).map(" ".join)


@pytest.mark.parametrize("name", export_formats)
@settings(max_examples=12, deadline=None)
@given(texts=st.lists(sentences, min_size=1, max_size=9), batch_size=st.integers(1, 9))
def test_any_batch_is_answered_as_torch_answers_each_text(
    classifier, opened, name, texts, batch_size
):
    model = opened[name]
    schema = model.manifest.schema
    alone = np.concatenate([reference_scores_of(classifier, [text], schema) for text in texts])
    off = np.abs(model.scores(texts, batch_size) - alone).max()
    assert off < (1e-4 if export_formats[name].exact else 0.1)


references: dict[Path, object] = {}


def reference_scores_of(folder: Path, texts: list[str], schema) -> np.ndarray:
    "What plain transformers says, one batch, with its own tokenizer."
    if folder not in references:
        references[folder] = open_source(folder)
    source = references[folder]
    rows = source.rows(texts)
    with torch.no_grad():
        logits = torch.cat([source.model(torch.tensor([row])).logits for row in rows])
    return torch.softmax(logits, -1).numpy()


@pytest.mark.parametrize("name", export_formats)
def test_a_manifest_says_what_was_measured_and_on_what(exports, classifier, name):
    told = read_json(exports / name / "manifest.json")
    assert told["format"] == name and told["source"] == sha256_of(classifier)
    assert [one["name"] for one in told["inputs"]] == ["input_ids", "attention_mask"]
    assert told["outputs"] == [dict(name="logits", type="float32", shape=["texts", 2])]
    assert told["versions"]["torch"] == torch.__version__
    parity = told["parity"]
    assert parity["texts"] == 30 and parity["compared_on"] == "validation texts"
    assert parity["expected_loss"] <= tolerated_loss
    if export_formats[name].exact:
        assert parity["largest_difference"] < 1e-4 and parity["same_predictions"] == 1
    lost = abs(parity["accuracy_exported"] - parity["accuracy_float32"])
    assert lost <= 1 - parity["same_predictions"] + 1e-9
    there = {one.name for one in (exports / name).iterdir()} - {"manifest.json"}
    assert there == set(told["files"])
    # nothing of this machine's folders is told to whoever gets it
    assert str(exports) not in json.dumps(told) and "/runs/" not in json.dumps(told)


def test_torchscript_is_said_to_be_deprecated_by_torch_itself(exports):
    notes = read_json(exports / "torchscript" / "manifest.json")["notes"]
    assert "deprecated" in notes["deprecated"]
    assert any("torch.jit.trace" in line and "deprecated" in line for line in notes["warnings"])


def test_the_stock_folder_opens_in_plain_transformers(exports, classifier, opened):
    at = exports / "safetensors"
    model = AutoModelForSequenceClassification.from_pretrained(at).eval()
    given = AutoTokenizer.from_pretrained(at)(["a good film"], return_tensors="pt")
    with torch.no_grad():
        found = torch.softmax(model(**given).logits, -1).numpy()
    assert np.allclose(found, opened["onnx"].scores(["a good film"]), atol=1e-5)
    assert list(model.config.id2label.values()) == label_names(small_corpus())
    assert not list(at.glob("*.bin")) and (at / "model.safetensors").is_file()


def test_onnx_names_its_operations_and_leaves_two_dimensions_open(exports):
    import onnx

    model = onnx.load(exports / "onnx" / "model.onnx")
    onnx.checker.check_model(model)
    stated = read_json(exports / "onnx" / "manifest.json")["notes"]["opset"]
    used = {one.domain or "ai.onnx": one.version for one in model.opset_import}
    assert stated == used and stated["ai.onnx"] >= 18
    for one in model.graph.input:
        assert [bool(d.dim_param) for d in one.type.tensor_type.shape.dim] == [True, True]


def test_a_torch_export_states_the_longest_text(opened):
    "One that is longer than the model's positions is refused, not read wrongly."
    engine = opened["torch-export"].engine
    ids = np.ones((1, 513), np.int64)
    with pytest.raises(Exception, match="512"):
        engine.logits(ids, ids)


def test_what_loses_too_much_is_refused_and_leaves_nothing(tmp_path, capsys):
    "Logits so far apart that the rounding of 8-bit numbers turns sure answers round."
    folder = saved_classifier(tmp_path / "sharp", 3000)
    source = open_source(folder)
    trial = corpus_texts(small_corpus(), source.schema, 30)
    told = dict(to=str(tmp_path / "to"), corpus=str(small_corpus()), most=30)
    formats = ["openvino-int8", "torch-export"]
    with pytest.raises(DataError, match=r"1 of 2 formats could not be made") as raised:
        export(ExportChoice(str(folder), formats=formats, **told))
    for said in ("openvino-int8 is refused: on 30 texts", "points of accuracy; 0.5 are tolerated"):
        assert said in str(raised.value) and said in capsys.readouterr().out + str(raised.value)
    assert [one.name for one in (tmp_path / "to").iterdir()] == ["torch-export"], (
        "the next is taken"
    )
    exact = reference_scores(folder, list(trial.texts), source.schema)
    with pytest.raises(UsageError, match="never replaced"):
        export_model(source, "torch-export", tmp_path / "to", trial, exact)


def test_a_file_that_was_changed_is_not_opened(exports, tmp_path):
    copy = Path(shutil.copytree(exports / "torchscript", tmp_path / "copy"))
    data = bytearray((copy / "model.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.pt").write_bytes(data)
    with pytest.raises(DataError, match=r"model\.pt is not the file that was exported"):
        ExportedModel(copy)


# -- which texts


def test_a_model_of_a_run_finds_its_validation_texts(classifier, tmp_path):
    "Through the manifest that the runner leaves in the store, and the links of the run."
    store = tmp_path / "store"
    corpus = Path(shutil.copytree(small_corpus(), store / "data-ab" / "corpus"))
    entry = store / "finetune-cd"
    shutil.copytree(classifier, entry / "classifier")
    inputs = dict(corpus=[dict(source="data", entry="data-ab", sha256=sha256_of(corpus))])
    write_json(entry / "manifest.json", dict(stage="finetune", inputs=inputs))
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "finetune").symlink_to(entry)
    model = tmp_path / "latest" / "finetune" / "classifier"
    assert corpus_of_run(model) == corpus
    (corpus / "more").write_text("x")
    with pytest.raises(DataError, match="is not the corpus that"):
        corpus_of_run(model)
    shutil.rmtree(corpus)
    with pytest.raises(MissingError, match="not there any more"):
        corpus_of_run(model)
    with pytest.raises(MissingError, match="is not in a run"):
        corpus_of_run(classifier)


def test_texts_from_a_file_are_divided_and_checked(classifier, tmp_path):
    schema = load_schema(classifier)
    (tmp_path / "a.txt").write_text("One film.\n\nAnother film.\nA third.\n")
    found = file_texts(str(tmp_path / "a.txt"), schema, 10)
    assert [*found.texts] == ["One film.", "A third."] and found.targets is None
    assert [*found.calibration] == ["Another film."]
    (tmp_path / "b.csv").write_text("text,label\nfine,positive\nbad,nobody\nworse,nobody\n")
    with pytest.raises(DataError, match="none of the model's"):
        file_texts(str(tmp_path / "b.csv"), schema, 10)
    (tmp_path / "c.csv").write_text("text\nfine\n")
    with pytest.raises(DataError, match="two or more"):
        file_texts(str(tmp_path / "c.csv"), schema, 10)


def test_what_has_no_trained_head_is_refused(tmp_path):
    with pytest.raises(DataError, match="BertModel, which has no trained head"):
        open_source(small_random_encoder(small_corpus()))
    write_json(tmp_path / "config.json", dict(architectures=["Qwen3ForCausalLM"]))
    with pytest.raises(DataError, match="llmeco pack"):
        open_source(tmp_path)


# -- the server opens none of it


@pytest.mark.parametrize("name", export_formats)
def test_no_server_opens_an_export(exports, name):
    with pytest.raises(DataError, match="is refused: "):
        Predictor.load(exports / name)


def test_a_manifest_of_ours_does_not_make_a_bundle_of_an_export(exports, bundle_facts, tmp_path):
    "Neither the file nor the kind is taken, whatever somebody writes beside it."
    copy = Path(shutil.copytree(exports / "torchscript", tmp_path / "copy"))
    with pytest.raises(DataError, match=r"model\.pt may carry a program"):
        write_manifest(copy, bundle_facts("onnx"))
    (copy / "model.pt").rename(copy / "model")
    write_manifest(copy, bundle_facts("torchscript"))
    with pytest.raises(DataError, match="a model of the kind 'torchscript'; known are"):
        open_model(copy, verify(copy))


@pytest.fixture
def bundle_facts(classifier):
    from llmeco_nb.deployment.manifest import Manifest

    def make(kind: str) -> Manifest:
        return Manifest(
            "x",
            kind=kind,
            schema=load_schema(classifier),
            max_length=8,
            head_fraction=1.0,
            pad_token_id=0,
        )

    return make
