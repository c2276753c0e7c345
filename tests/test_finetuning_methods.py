"""Methods of fine-tuning through the whole stage: what is frozen stays, adapters open elsewhere, a
killed run ends with the same bytes, and what does not go together is refused."""

import os
import signal

import pytest
from test_finetune import SMALL, made

pd = pytest.importorskip("pandas")
pytest.importorskip("transformers")
import numpy as np
import torch

from llmeco_nb.core import UsageError, create_record, read_json
from llmeco_nb.finetuning import classifier as finetune
from llmeco_nb.finetuning import training_half
from llmeco_nb.finetuning.checkpoints import small_random_encoder
from llmeco_nb.finetuning.classifier import fine_tune
from llmeco_nb.finetuning.classifier_config import ClassifierConfig
from llmeco_nb.finetuning.trainable import is_embedding, layer_number
from llmeco_nb.tasks.predictions import scores_of

FEW = {**SMALL, "epochs": 2, "num_evals": 2}


@pytest.fixture(autouse=True)
def runs(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path_factory.getbasetemp() / "runs"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return made(tmp_path_factory.mktemp("corpus") / "corpus")


def tuned(corpus, folder, **options):
    record = create_record(folder, "finetune")
    fine_tune(record, corpus, config=ClassifierConfig(**{**FEW, **options}))
    return record


def weights(folder):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory):
    "The random encoder that the stage starts from, as a state dict of a classifier."
    os.environ["LLMECO_RUNS"] = str(tmp_path_factory.getbasetemp() / "runs")
    from transformers import AutoModel

    return AutoModel.from_pretrained(small_random_encoder(corpus)).state_dict()


@pytest.mark.parametrize(
    "options, stays",
    [
        (dict(trainable="head"), lambda n: is_embedding(n) or layer_number(n) is not None),
        (dict(trainable="biases"), lambda n: not n.endswith("bias") and "pooler" not in n),
        (dict(frozen_layers=1), lambda n: is_embedding(n) or layer_number(n) == 0),
        (dict(freeze_embeddings=True), is_embedding),
    ],
    ids=["head", "biases", "layers", "embeddings"],
)
def test_what_is_frozen_comes_out_as_it_went_in(corpus, pretrained, tmp_path, options, stays):
    record = tuned(corpus, tmp_path / "r", **options)
    after = weights(record.artifact("classifier"))
    for name, before in pretrained.items():
        own = f"bert.{name}"
        if before.is_floating_point() and "pooler" not in name:
            assert torch.equal(after[own], before) == stays(own), name
    assert record.metrics["trainable_parameters"] < record.metrics["parameters"]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_opens_in_peft_and_is_merged_into_a_stock_model(
    corpus, pretrained, tmp_path, method
):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    record = tuned(corpus, tmp_path / "r", trainable=method, adapter_rank=4, lr=1e-2)
    folder = record.artifact("classifier")
    merged = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert set(merged.state_dict()) == set(weights(folder))
    assert not any("lora" in name for name in merged.state_dict())
    base = AutoModelForSequenceClassification.from_pretrained(
        small_random_encoder(corpus), num_labels=3
    )
    apart = PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(["my parcel is late", "money back please"], padding=True, return_tensors="pt")
    with torch.no_grad():
        one, two = merged(**given).logits, apart(**given).logits
    assert torch.allclose(one, two, atol=1e-5)
    assert read_json(folder / "adapter" / "adapter_config.json")["r"] == 4
    size = lambda f: f.stat().st_size
    assert size(folder / "adapter" / "adapter_model.safetensors") < size(
        folder / "model.safetensors"
    )


def test_every_method_changes_what_is_learned_and_still_learns(corpus, tmp_path):
    methods = dict(
        plain={},
        fgm=dict(adversary="fgm", perturbation=0.02),
        pgd=dict(adversary="pgd", perturbation=0.02, ascents=2),
        freelb=dict(adversary="freelb", perturbation=0.02, ascents=2),
        neftune=dict(neftune=1.0),
        mixup=dict(mixup=0.2),
        rdrop=dict(rdrop=1.0, dropout=0.1),
        weighted=dict(class_weights="balanced"),
        smoothed=dict(label_smoothing=0.1),
        thawed=dict(unfreezing=0.5),
    )
    scores = {}
    for name, options in methods.items():
        record = tuned(corpus, tmp_path / name, **{**options, "epochs": 4})
        scores[name] = scores_of(pd.read_parquet(record.artifact("predictions")))
        assert record.metrics["accuracy_test"] > 0.5, name
    alike = [n for n in methods if n != "plain" and np.allclose(scores[n], scores["plain"])]
    assert alike == ["weighted"]  # the classes are of one size


def test_a_killed_run_of_several_methods_ends_with_the_same_bytes(corpus, tmp_path):
    many = dict(adversary="freelb", ascents=2, neftune=5.0, mixup=0.3, unfreezing=0.5, dropout=0.1)
    calm, hit = tuned(corpus, tmp_path / "calm", **many), tmp_path / "hit"
    pid = os.fork()
    if pid == 0:
        plan, predict, asked = finetune.finetune_plan, training_half.predict_outputs, []
        finetune.finetune_plan = lambda *a: {**plan(*a), "checkpoint_every": 4}

        def dying(*a, **k):
            asked.append(1)
            if len(asked) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return predict(*a, **k)

        training_half.predict_outputs = dying
        try:
            tuned(corpus, hit, **many)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not (hit / "classifier").exists() and (hit / "resume").exists()
    again = tuned(corpus, hit, **many)
    assert again.artifact("predictions").read_bytes() == calm.artifact("predictions").read_bytes()


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(rdrop=1.0), "dropout is 0"),
        (dict(rdrop=1.0, dropout=0.1, mixup=0.2), "mixes two texts"),
        (dict(trainable="lora", pooling="mean"), "Take pooling=cls"),
        (dict(frozen_layers=9), "this model has 2 layers"),
        (dict(unfreezing=1.5), "unfreezing"),
        (dict(dropout=1.0), "dropout"),
        (dict(trainable="top"), "trainable"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_does_not_go_together_is_refused(corpus, tmp_path, options, told):
    with pytest.raises(UsageError, match=told):
        tuned(corpus, tmp_path / "r", **options)
    assert not (tmp_path / "r" / "classifier").exists()
