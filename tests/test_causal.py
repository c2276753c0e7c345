"""Causal pretraining: packed is padded, a killed run ends with the same bytes, and plain
transformers opens what it leaves."""

import math
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from llmeco_nb.core import (
    DataError,
    MissingError,
    UsageError,
    create_record,
    open_record,
    read_json,
    sha256_of,
)
from llmeco_nb.data.corpus import write_corpus
from llmeco_nb.models.decoder import causal_loss, new_decoder
from llmeco_nb.models.decoder_conversion import load_decoder
from llmeco_nb.pretraining.causal import (
    CausalConfig,
    fast_causal_loss,
    generate,
    pretrain_causal,
    validation_nats,
)
from llmeco_nb.pretraining.packing import (
    best_fit_packing,
    eos_token_id,
    pack_documents,
    read_texts,
    select_rows,
)
from llmeco_nb.tokenization.bpe import (
    encode_subwords,
    open_subword_tokenizer,
    save_subword_tokenizer,
    train_bpe,
)
from llmeco_nb.training.task import added_callbacks

QUICK = dict(
    size="1x32",
    context_length=32,
    steps=14,
    batch_size=4,
    lr=3e-3,
    eval_examples=6,
    num_evals=3,
    prompts=["the good"],
    max_new_tokens=6,
    baseline_tokens=10_000,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    "A tiny corpus of two domains and its tokenizer."
    folder, r = tmp_path_factory.mktemp("inputs"), random.Random(0)
    said = lambda: " ".join(
        (
            f"the {r.choice(['good', 'bad'])} {r.choice(['film', 'plot', 'cast'])} "
            f"{r.choice(['bored', 'moved'])} {r.choice(['me', 'us'])} ."
        )
        for _ in range(r.randint(1, 9))
    )
    (folder / "prose").mkdir()
    for split, n in (("train", 60), ("validation", 16)):
        pd.DataFrame(
            dict(
                id=[f"{split}{i}" for i in range(n)],
                text=[said() if i % 2 else said().upper() for i in range(n)],
                domain=[("loud", "calm")[i % 2] for i in range(n)],
            )
        ).to_parquet(folder / "prose" / f"{split}.parquet")
    save_subword_tokenizer(
        train_bpe(pd.read_parquet(folder / "prose" / "train.parquet").text, 320), folder / "pieces"
    )
    return folder / "prose", folder / "pieces"


@pytest.fixture(scope="module")
def calm(inputs, tmp_path_factory):
    "An undisturbed run."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("calm") / "run"
    pretrain_causal(create_record(folder, "causal"), *inputs, CausalConfig(**QUICK))
    return folder


def what_stays(folder) -> tuple:
    "Everything about a finished run that must not depend on how often it was killed."
    record = open_record(folder, "causal")
    rows = [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "roof_share")}
        for row in record.rows()
    ]
    timed = ("seconds", "tokens_per_s", "gflops", "roof_gflops", "roof_share", "forecast_seconds")
    return (
        sha256_of(record.artifact("decoder")),
        rows,
        {k: v for k, v in record.metrics.items() if k not in timed},
        read_json(record.path / "domains.json"),
        read_json(record.path / "samples.json"),
    )


# -- packing


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_pieces_share_rows_and_no_place(sizes):
    row, start, rows = best_fit_packing(sizes, 16)
    taken = np.zeros((rows, 16), int)
    for n, k, s in zip(sizes, row, start):
        taken[k, s : s + n] += 1
    assert taken.max() == 1 and taken.sum() == sum(sizes) and (taken[:, 0] == 1).all()
    free = 16 - taken.sum(1)
    assert (free >= 8).sum() <= 1  # best fit: at most one row is half empty


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(1, 9), max_size=40).map(lambda d: np.array(d, dtype=np.int32)),
        min_size=1,
        max_size=12,
    ),
    st.integers(2, 16),
)
def test_every_token_is_asked_once(docs, length):
    packed = pack_documents(docs, length, 0)
    asked = packed["targets"] != -100
    assert sorted(packed["targets"][asked]) == sorted(t for d in docs for t in [*d.tolist(), 0])
    assert sorted(packed["input_ids"][asked]) == sorted(t for d in docs for t in [0, *d.tolist()])
    assert ((packed["documents"] > 0) == asked).all()


def test_packed_is_padded():
    "Loss and gradient of packed rows against one document a row, filled up, in float64."
    r = np.random.default_rng(0)
    docs = [r.integers(1, 50, n).astype(np.int32) for n in (3, 20, 9, 1, 0, 14, 6)]
    packed, padded = (
        pack_documents(docs, 24, 0),
        dict(input_ids=np.zeros((7, 24), int), targets=np.full((7, 24), -100)),
    )
    for k, d in enumerate(docs):
        padded["input_ids"][k, 1 : len(d) + 1], padded["targets"][k, : len(d) + 1] = d, [*d, 0]
    model, found = new_decoder(50, "2x32", 24).double(), []
    for rows, loss in ((packed, fast_causal_loss), (packed, causal_loss), (padded, causal_loss)):
        model.zero_grad()
        value = loss(model, **select_rows(rows, slice(None)))
        value.backward()
        found.append((value.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for value, gradient in found[:2]:
        assert (
            value == pytest.approx(found[2][0], rel=1e-6)
            and (gradient - found[2][1]).norm() < 1e-6 * found[2][1].norm()
        )
    assert len(packed["targets"]) < 7


# -- the stage


def test_it_learns_and_opens_in_plain_transformers(calm, inputs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    m, found = open_record(calm, "causal").metrics, read_json(calm / "domains.json")
    plain, words = (
        AutoModelForCausalLM.from_pretrained(calm / "decoder"),
        AutoTokenizer.from_pretrained(calm / "decoder"),
    )
    assert (
        type(plain).__name__ == "Qwen3ForCausalLM"
        and plain.dtype == torch.float32
        and len(words) == plain.config.vocab_size
    )
    assert (
        m["steps"] == 14
        and m["perplexity"] < 320
        and {*found["domains"]} == {"loud", "calm"}
        and {*found["baselines"]}
        == {"unigram", "fivegram", "gzip", "xz", "xz_after_train", "counted"}
    )
    tok, texts = open_subword_tokenizer(inputs[1]), read_texts(inputs[0], "validation")
    nats = 0.0  # the whole held-out text, by the stock class, document by document
    for domain in texts.values():
        for ids in encode_subwords(tok, domain):
            whole = torch.tensor([0, *ids.tolist(), 0])
            for s in range(0, len(whole) - 1, 32):
                with torch.no_grad():
                    logits = plain(whole[None, s : min(s + 32, len(whole) - 1)]).logits[0]
                nats += torch.nn.functional.cross_entropy(
                    logits, whole[s + 1 : s + 33], reduction="sum"
                ).item()
    assert m["bits_per_byte"] == pytest.approx(
        nats / sum(len(t.encode()) for d in texts.values() for t in d) / math.log(2), rel=1e-5
    )
    samples = read_json(calm / "samples.json")
    assert [s["step"] for s in samples] == [5, 10, 14, "best", "best", "best"] and all(
        s["text"].startswith("the good") for s in samples
    )
    assert (
        generate(load_decoder(calm / "decoder"), tok, "the good", 6, 0.8, 0) == samples[3]["text"]
    )


def test_killed_it_ends_with_the_same_bytes(calm, inputs, tmp_path, at_step, killed_at):
    "Before the first checkpoint, after one, and in the last step."
    whole = what_stays(calm)
    for at in (1, 7, 13):
        killed_at(
            at,
            lambda: pretrain_causal(
                create_record(tmp_path / "run", "causal"), *inputs, CausalConfig(**QUICK)
            ),
        )
        assert not (tmp_path / "run" / "decoder").exists()
    taken = []
    with added_callbacks(at_step(None, taken.append)):
        pretrain_causal(create_record(tmp_path / "run", "causal"), *inputs, CausalConfig(**QUICK))
    assert what_stays(tmp_path / "run") == whole and taken == [12, 13]


def test_a_budget_is_planned_once(inputs, tmp_path):
    asked = QUICK | dict(minutes=0.001, baseline_tokens=0)
    pretrain_causal(create_record(tmp_path / "run", "causal"), *inputs, CausalConfig(**asked))
    assert read_json(tmp_path / "run.plan.json")["steps"] == 10
    (tmp_path / "again.plan.json").write_text((tmp_path / "run.plan.json").read_text())
    pretrain_causal(create_record(tmp_path / "again", "causal"), *inputs, CausalConfig(**asked))
    assert what_stays(tmp_path / "again") == what_stays(tmp_path / "run")


def test_a_labelled_corpus_is_one_domain(inputs, tmp_path):
    parts = {
        s: pd.DataFrame(
            dict(
                id=[f"{s}{i}" for i in range(n)],
                text=["THE GOOD FILM MOVED ME ."] * n,
                label=[0] * n,
            )
        )
        for s, n in (("train", 9), ("validation", 3), ("test", 0))
    }
    write_corpus(tmp_path / "corpus", parts, ["x"], {})
    pretrain_causal(
        create_record(tmp_path / "run", "causal"),
        tmp_path / "corpus",
        inputs[1],
        CausalConfig(**QUICK | dict(steps=2, baseline_tokens=0)),
    )
    assert list(read_json(tmp_path / "run" / "domains.json")["domains"]) == ["texts"]


def test_refusals(inputs, tmp_path):
    run = lambda prose=inputs[0], pieces=inputs[1], **more: pretrain_causal(
        create_record(tmp_path / "run", "causal"), prose, pieces, CausalConfig(**QUICK | more)
    )
    with pytest.raises(UsageError, match="batch_size is 0"):
        run(batch_size=0)
    with pytest.raises(UsageError, match="layers x width"):
        run(size="big")
    with pytest.raises(UsageError, match="cannot be packed"):
        run(context_length=1)
    with pytest.raises(MissingError, match="train.parquet|validation.parquet"):
        run(prose=tmp_path)
    with pytest.raises(MissingError, match="tokenizer.json"):
        run(pieces=tmp_path)
    (tmp_path / "silent").mkdir()
    train = pd.read_parquet(inputs[0] / "train.parquet")
    train.to_parquet(tmp_path / "silent" / "train.parquet")
    train.head(0).to_parquet(tmp_path / "silent" / "validation.parquet")
    with pytest.raises(DataError, match="no validation texts"):
        run(prose=tmp_path / "silent")
    (tmp_path / "odd").mkdir()
    train.rename(columns=dict(text="body")).to_parquet(tmp_path / "odd" / "validation.parquet")
    with pytest.raises(DataError, match="no column text.*body"):
        run(prose=tmp_path / "odd")
    model = new_decoder(320, "1x32", 16)
    with torch.no_grad(), pytest.raises(DataError, match="context is 16"):
        validation_nats(
            model, pack_documents([np.arange(1, 40, dtype=np.int32)], 32, 0)
        )  # rows longer than the model reads
    with pytest.raises(UsageError, match="temperature"):
        generate(model, open_subword_tokenizer(inputs[1]), "the", temperature=-1)
    from tokenizers import Tokenizer, models

    with pytest.raises(DataError, match="token to end"):
        eos_token_id(Tokenizer(models.BPE()))
