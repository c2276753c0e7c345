"""Pretraining: masks are pure and have the promised shares, a killed run ends with the same bytes,
and plain transformers opens what it leaves."""

import os
import random
import signal
import time

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")
from llmeco_nb.core import (
    DataError,
    UsageError,
    create_record,
    open_record,
    read_json,
    sha256_of,
)
from llmeco_nb.data.corpus import read_split, write_corpus
from llmeco_nb.pretraining.budget import pretrain_plan
from llmeco_nb.pretraining.embedding_init import (
    document_ppmi_embeddings,
    init_mlm_model,
    unigram_log_probs,
    window_ppmi_embeddings,
)
from llmeco_nb.pretraining.masking import (
    MASK,
    group_texts,
    mask_row,
    masked_batch,
    mlm_batches,
)
from llmeco_nb.pretraining.mlm import (
    MLMConfig,
    fill_mask,
    pretrain,
    tile_position_embeddings,
    validation_losses,
)
from llmeco_nb.runner.machine import gflops
from llmeco_nb.tokenization.wordpiece import (
    TokenizerConfig,
    build_tokenizer,
    encode_texts,
    open_tokenizer,
)
from llmeco_nb.training.plan import Measured
from llmeco_nb.training.task import added_callbacks

QUICK = dict(
    size="1x32",
    seq_len=16,
    max_position_embeddings=32,
    steps=14,
    batch_size=4,
    lr=3e-3,
    eval_examples=6,
    num_evals=3,
    prompts=["the [MASK] film"],
)
ROWS = np.random.default_rng(0).integers(5, 500, (300, 64)).astype(np.int32)
ROWS[:, 0], ROWS[:, -1] = 2, 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    "A tiny corpus and its tokenizer."
    folder, r = tmp_path_factory.mktemp("inputs"), random.Random(0)
    said = lambda: " ".join(
        (
            f"the {r.choice(['good', 'bad'])} {r.choice(['film', 'plot', 'cast'])} "
            f"{r.choice(['bored', 'moved'])} {r.choice(['me', 'us'])} ."
        )
        for _ in range(8)
    )
    parts = {
        s: pd.DataFrame(
            {
                "id": [f"{s}{i}" for i in range(n)],
                "text": [said() for _ in range(n)],
                "label": [0] * n,
            }
        )
        for s, n in (("train", 30), ("validation", 8), ("test", 2))
    }
    write_corpus(folder / "corpus", parts, [], {})
    return folder / "corpus", build_tokenizer(
        create_record(folder / "t", "tokenizer"), folder / "corpus", TokenizerConfig(vocab_size=80)
    )


def what_stays(folder) -> tuple:
    "Everything about a finished run that must not depend on how often it was killed."
    record = open_record(folder, "pretrain")
    rows = [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "roof_share")}
        for row in record.rows()
    ]
    timed = ("seconds", "tokens_per_s", "gflops", "roof_gflops", "roof_share", "forecast_seconds")
    return (
        sha256_of(record.artifact("encoder")),
        rows,
        {k: v for k, v in record.metrics.items() if k not in timed},
        read_json(record.path / "held.json"),
        read_json(record.path / "examples.json"),
    )


@pytest.fixture(scope="module")
def calm(inputs, tmp_path_factory):
    "An undisturbed run."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("calm") / "run"
    pretrain(create_record(folder, "pretrain"), *inputs, MLMConfig(**QUICK))
    return folder


def in_child(work) -> int:
    "Run `work()` in a forked process and return its process id."
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


# -- masks


def test_shares_of_the_mask():
    masks = [mask_row(row, (3, 0, i), 0.2, 500) for i, row in enumerate(ROWS)]
    hidden = np.concatenate([row[h] for row, (_, h) in zip(ROWS, masks)])
    shown = np.concatenate([s[h] for s, h in masks])
    assert all(len(h) == round(0.2 * 62) for _, h in masks)  # the same work in every row
    n = len(hidden)
    within = lambda share, expected: (
        abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
    )
    assert within((shown == MASK).mean(), 0.8)
    assert within(
        (shown == hidden).mean(), 0.1 + 0.1 / 495
    )  # left as they are, or exchanged for themselves
    assert shown[(shown != MASK)].min() >= 5  # never another special token
    places = np.bincount(np.concatenate([h for _, h in masks]), minlength=64)
    assert places[0] == places[-1] == 0 and places[1:-1].min() > 0.5 * places[1:-1].mean()


def test_masks_are_pure():
    before = mask_row(ROWS[1], (3, 2, 1), 0.2, 500)
    np.random.seed(9)
    torch.manual_seed(9)
    mask_row(ROWS[0], (0, 0, 0), 0.2, 500)
    after = mask_row(ROWS[1], (3, 2, 1), 0.2, 500)
    assert all((a == b).all() for a, b in zip(before, after)) and ROWS[1, 0] == 2
    for other in ((4, 2, 1), (3, 1, 1), (3, 2, 0)):
        assert (mask_row(ROWS[1], other, 0.2, 500)[0] != before[0]).any()


def test_batches_do_not_depend_on_the_past():
    batches = mlm_batches(ROWS, 7, 3, 0.2, 500)
    expected = {i: batches(i) for i in (0, 41, 42, 43, 100)}  # 300 rows: batch 42 crosses an epoch
    fresh = mlm_batches(ROWS.copy(), 7, 3, 0.2, 500)
    for i in (100, 42, 0):
        assert all(fresh(i)[k].equal(expected[i][k]) for k in expected[i])
    seen = np.concatenate([batches(i)["input_ids"].numpy() for i in range(43)])[:300]
    assert sorted(seen[:, 0].tolist()) == [2] * 300 and len(expected[42]["targets"]) == 7 * round(
        0.2 * 62
    )


def test_rows_hold_every_token_once():
    texts = [np.arange(5, 5 + n, dtype=np.int32) for n in (3, 40, 1, 0, 11)]
    rows = group_texts(texts, 10)
    stream = np.concatenate([np.append(t, 3) for t in texts])
    assert (
        rows[:, 1:-1].ravel().tolist() == stream[: rows.shape[0] * 8].tolist()
        and len(stream) - rows[:, 1:-1].size < 8
    )
    assert not (rows == 0).any()
    with pytest.raises(DataError, match="do not fill"):
        group_texts([np.array([7])], 64)
    with pytest.raises(UsageError):
        group_texts(texts, 4)


# -- the start


def test_frequencies_and_company():
    assert abs(np.exp(unigram_log_probs(ROWS, 500)).sum() - 1) < 1e-4
    toy = np.array([[5, 10, 6], [5, 11, 6], [7, 12, 8], [7, 13, 8]] * 9)
    e = window_ppmi_embeddings(toy, 20, 3, window=1)
    cosine = lambda a, b: e[a] @ e[b] / np.linalg.norm(e[a]) / np.linalg.norm(e[b])
    assert (
        cosine(10, 11) > 0.99
        and cosine(10, 12) < 0.5
        and (e[:5] == 0).all()
        and (e[14:] == 0).all()
        and np.isfinite(e).all()
    )
    model = init_mlm_model(ROWS, 500, "1x32", 64, "window_ppmi", 0)
    assert (
        model.bert.embeddings.word_embeddings.weight[4].abs().sum() > 0
    )  # [MASK] keeps a vector of its own
    with pytest.raises(UsageError, match="window_ppmi, document_ppmi or random"):
        init_mlm_model(ROWS, 500, "1x32", 64, "zero", 0)


def test_vectors_from_whole_texts_are_the_factorisation_written_out():
    """Against loops and numpy's SVD; neither the order within a text nor how often a token is
    repeated matters, and all vectors are of one length."""
    r = np.random.default_rng(1)
    texts = [np.r_[r.integers(5, 30, r.integers(1, 12)), [5, 6][i % 2]] for i in range(80)]
    found = document_ppmi_embeddings(texts, 40, 4, contexts=10)
    together = np.zeros((40, 40))
    for t in texts:
        for a in set(t.tolist()):
            for b in set(t.tolist()):
                together[a, b] += 1
    met = together[:, np.argsort(-together.diagonal(), kind="stable")[:10]]
    common = met.sum(0) ** 0.75
    ppmi = np.log(
        np.maximum(1, met / np.maximum(met.sum(1, keepdims=True), 1) / (common / common.sum()))
    )
    u, s, _ = np.linalg.svd(ppmi, full_matrices=False)
    wanted, seen = u[:, :4] * s[:4] ** 0.5, together.diagonal() > 0
    wanted[seen] -= wanted[seen].mean(0)
    wanted[seen] *= 0.04 * 4**0.5 / np.linalg.norm(wanted[seen], axis=1, keepdims=True)
    assert (
        found.dtype == np.float32
        and (found[~seen] == 0).all()
        and np.allclose(np.sqrt((found[seen] ** 2).mean(1)), 0.04, rtol=1e-4)
    )
    assert np.allclose(
        found[seen] @ found[seen].T, wanted[seen] @ wanted[seen].T, atol=2e-5
    )  # products, because an axis may point either way
    again = document_ppmi_embeddings(
        [np.repeat(r.permutation(t), 2) for t in texts], 40, 4, contexts=10
    )
    assert np.allclose(again, found, atol=1e-5)
    model = init_mlm_model(ROWS, 500, "1x32", 64, "document_ppmi", 0, list(ROWS))
    assert np.allclose(
        model.bert.embeddings.word_embeddings.weight[5:].detach().norm(dim=1),
        0.04 * 32**0.5,
        rtol=1e-3,
    )


def test_validation_sums_do_not_depend_on_the_batch():
    model = init_mlm_model(ROWS, 500, "1x32", 64, "random", 0).eval()
    assert np.allclose(
        validation_losses(model, ROWS[:9], 0, 0.2, 500, 2),
        validation_losses(model, ROWS[:9], 0, 0.2, 500, 9),
        atol=1e-4,
    )
    b = masked_batch(ROWS, range(9), [0] * 9, 0, 0.2, 500)
    labels = torch.full((9 * 64,), -100)
    labels[b["positions"]] = b["targets"]
    with torch.no_grad():
        theirs = model(b["input_ids"], labels=labels.view(9, 64)).loss
    loss, _, n = validation_losses(model, ROWS[:9], 0, 0.2, 500).sum(0)
    assert abs(loss / n - float(theirs)) < 1e-5


def test_positions_are_repeated():
    model = init_mlm_model(ROWS, 500, "1x32", 64, "random", 0)
    table = model.bert.embeddings.position_embeddings.weight
    before = table[:10].clone()
    tile_position_embeddings(model, 10)
    assert (
        table[:10].equal(before)
        and table[10].equal(before[2])
        and table[17].equal(before[1])
        and table[63].equal(before[1 + 62 % 8])
    )


def test_speed_is_measured_where_it_is_asked_for():
    "The device `meta` computes nothing, and is therefore faster than any that does."
    assert gflops(512, torch.float32, 0.05, "meta") > 3 * gflops(512, torch.float32, 0.05)


def test_plans_are_whole_numbers():
    measured = Measured(batch_size=32, step_seconds=0.217, evaluation_seconds=1.9)
    plan = pretrain_plan(MLMConfig(minutes=2.0, num_evals=8), 8.3, measured)
    assert all(isinstance(v, (int, str)) for v in plan.to_json().values())
    assert 8.3 + plan.steps * 0.217 + 8 * 1.9 < 120 and plan.steps > 400
    with pytest.raises(UsageError, match="together they are at most 1"):
        pretrain_plan(MLMConfig(warmup_ratio=0.7), 0, measured)


# -- the stage


def test_it_learns_and_opens_in_plain_transformers(calm, inputs):
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

    metrics, folder = open_record(calm, "pretrain").metrics, calm / "encoder"
    model, words = (
        AutoModelForMaskedLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert type(model).__name__ == "BertForMaskedLM" and model.dtype == torch.float32
    with torch.no_grad():
        logits = model(**words("the good [MASK]", return_tensors="pt")).logits
    assert logits.shape[-1] == len(words) == model.config.vocab_size
    assert (
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).config.num_labels
        == 3
    )
    assert (
        metrics["validation_loss"] < metrics["unigram_loss"]
        and 0 < metrics["roof_share"] < 1.5
        and metrics["steps"] == 14
    )
    assert fill_mask(model.eval(), open_tokenizer(folder), "the good [MASK] .")[0][1] > 0
    with pytest.raises(UsageError, match="no .MASK."):
        fill_mask(model, open_tokenizer(folder), "nothing hidden")


def test_killed_at_chosen_steps_it_ends_with_the_same_bytes(
    calm, inputs, tmp_path, at_step, killed_at
):
    "Before the first checkpoint, right after one, and in the last step."
    whole = what_stays(calm)
    for at in (1, 6, 13):
        killed_at(
            at,
            lambda: pretrain(
                create_record(tmp_path / "run", "pretrain"), *inputs, MLMConfig(**QUICK)
            ),
        )
        assert not (tmp_path / "run" / "encoder").exists()
    taken = []
    with added_callbacks(at_step(None, taken.append)):
        pretrain(create_record(tmp_path / "run", "pretrain"), *inputs, MLMConfig(**QUICK))
    assert what_stays(tmp_path / "run") == whole
    assert taken == [12, 13]  # it went on from its last checkpoint and did not start anew


def test_killed_from_outside_it_ends_with_the_same_bytes(calm, inputs, tmp_path):
    "Whenever the kill falls: three at random moments, then one attempt in peace."
    r = random.Random(1)
    for _ in range(3):
        pid = in_child(
            lambda: pretrain(
                create_record(tmp_path / "run", "pretrain"), *inputs, MLMConfig(**QUICK)
            )
        )
        time.sleep(r.uniform(0.3, 1.5))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    pretrain(create_record(tmp_path / "run", "pretrain"), *inputs, MLMConfig(**QUICK))
    assert what_stays(tmp_path / "run") == what_stays(calm)


def test_a_budget_is_planned_once(inputs, tmp_path):
    asked = QUICK | dict(minutes=0.001)  # no time at all: ten steps
    pretrain(create_record(tmp_path / "run", "pretrain"), *inputs, MLMConfig(**asked))
    plan = read_json(tmp_path / "run.plan.json")
    assert plan["steps"] == 10 and open_record(tmp_path / "run", "pretrain").metrics["steps"] == 10
    first = what_stays(tmp_path / "run")
    (tmp_path / "again.plan.json").write_text((tmp_path / "run.plan.json").read_text())
    pretrain(create_record(tmp_path / "again", "pretrain"), *inputs, MLMConfig(**asked))
    assert what_stays(tmp_path / "again") == first


def test_refusals(inputs, tmp_path):
    for words, more in (
        ("mask_prob is 1", dict(mask_prob=1.0)),
        ("a row cannot be longer", dict(seq_len=64)),
        ("holds no", dict(prompts=["no gap"])),
        ("layers x width", dict(size="big")),
        ("embedding_lr_scale is 2", dict(embedding_lr_scale=2.0)),
        ("random vectors would be held", dict(embedding_lr_scale=0.0, embedding_init="random")),
    ):
        with pytest.raises(UsageError, match=words):
            pretrain(
                create_record(tmp_path / "run", "pretrain"), *inputs, MLMConfig(**QUICK | more)
            )
    folder = tmp_path / "corpus"
    write_corpus(
        folder,
        {
            s: pd.DataFrame({"id": list("ab"), "text": ["x y", "z"], "label": [0, 0]}).head(
                2 * (s == "train")
            )
            for s in ("train", "validation", "test")
        },
        [],
        {},
    )
    with pytest.raises(DataError, match="no validation texts"):
        pretrain(create_record(tmp_path / "run", "pretrain"), folder, inputs[1], MLMConfig(**QUICK))


@pytest.mark.parametrize("lr", [3e-3, None])
def test_what_was_counted_is_held(inputs, tmp_path, lr):
    """With no share of the rate word embeddings end as they began, to the last bit, and all else
    has moved; with a tenth they have moved less than with all of it."""
    from transformers import AutoModelForMaskedLM

    def vectors(share):
        record = create_record(tmp_path / f"{share}", "pretrain")
        pretrain(record, *inputs, MLMConfig(**QUICK | dict(embedding_lr_scale=share, lr=lr)))
        model = AutoModelForMaskedLM.from_pretrained(record.artifact("encoder"))
        return model.bert.embeddings.word_embeddings.weight.detach(), model.bert.encoder.layer[
            0
        ].output.dense.weight.detach()

    cutter = open_tokenizer(inputs[1])
    encoded = encode_texts(cutter, read_split(inputs[0], "train").text)
    begun = init_mlm_model(
        group_texts(encoded, QUICK["seq_len"]),
        cutter.get_vocab_size(),
        QUICK["size"],
        QUICK["max_position_embeddings"],
        "window_ppmi",
        0,
    )
    first, layer = (
        begun.bert.embeddings.word_embeddings.weight.detach(),
        begun.bert.encoder.layer[0].output.dense.weight.detach(),
    )
    held, moved = vectors(0.0)
    assert torch.equal(held, first) and not torch.equal(moved, layer)
    assert 0 < (vectors(0.1)[0] - first).norm() < 0.5 * (vectors(1.0)[0] - first).norm()


def test_an_encoder_too_short_for_the_examples_still_ends(inputs, tmp_path):
    """The word hidden in an unseen text may stand beyond what the encoder reads; such a text is not
    shown."""
    pretrain(
        create_record(tmp_path / "run", "pretrain"),
        *inputs,
        MLMConfig(**QUICK | dict(max_position_embeddings=16, steps=2, num_evals=1)),
    )
    assert all(
        e["text"].count("[MASK]") == 1 for e in read_json(tmp_path / "run" / "examples.json")
    )
