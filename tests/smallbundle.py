"""A bundle made by hand in milliseconds: word vectors in ONNX; serving tests need no torch."""

from pathlib import Path

import numpy as np

from llmeco_nb.deployment.manifest import Manifest, write_manifest
from llmeco_nb.tasks.contract import Cleaning, Schema
from llmeco_nb.tasks.text_classification import ClassificationSchema

WORDS = "[PAD] [UNK] [CLS] [SEP] good great fine funny wonderful bad dull poor long awful".split()


def make_bundle(folder: Path, name: str = "words", schema: Schema | None = None) -> Path:
    "Words 4 to 8 speak for `positive`, the rest for `negative`; logits are a mean over tokens."
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True)
    schema = schema or ClassificationSchema(labels=["negative", "positive"], cleaning=Cleaning())
    outputs = len(getattr(schema, "labels", "1"))  # a regression has one
    vectors = np.zeros((len(WORDS), outputs), np.float32)
    vectors[4:9, -1], vectors[9:, 0] = 4, 4
    nodes = [
        helper.make_node("Gather", ["vectors", "input_ids"], ["found"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["found", "wide"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "one"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "one"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["logits"]),
    ]
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["texts", "tokens"])
        for n in ("input_ids", "attention_mask")
    ]
    constants = [
        numpy_helper.from_array(vectors, "vectors"),
        numpy_helper.from_array(np.array([2]), "last"),
        numpy_helper.from_array(np.array([1]), "one"),
    ]
    graph = helper.make_graph(
        nodes,
        "words",
        inputs,
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["texts", outputs])],
        constants,
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10),
        folder / "model.onnx",
    )
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    t.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    t.save(str(folder / "tokenizer.json"))
    facts = Manifest(
        name,
        kind="onnx",
        schema=schema,
        max_length=16,
        head_fraction=0.25,
        pad_token_id=0,
    )
    write_manifest(folder, facts)
    return folder
