"""Bad input to pretraining, in one table: every error is one of ours, names the file or the field,
says what was found there and what to do."""

import random
import re
import warnings

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")
import llmeco_nb.pretraining.masking
import llmeco_nb.training.plan
from llmeco_nb.core import (
    DataError,
    LlmecoError,
    MissingError,
    UsageError,
    create_record,
    read_json,
)
from llmeco_nb.data.corpus import CorpusConfig, build_corpus, write_corpus
from llmeco_nb.data.mixture import MixtureConfig, build_mixture
from llmeco_nb.models.decoder import new_decoder
from llmeco_nb.models.decoder_conversion import load_decoder, save_decoder
from llmeco_nb.models.encoder import new_encoder
from llmeco_nb.pretraining.causal import CausalConfig, pretrain_causal
from llmeco_nb.pretraining.mlm import MLMConfig, pretrain
from llmeco_nb.pretraining.nsp import NSPConfig, pretrain_nsp
from llmeco_nb.tokenization.bpe import save_subword_tokenizer, train_bpe
from llmeco_nb.tokenization.unigram import train_tokenizer
from llmeco_nb.tokenization.wordpiece import (
    TokenizerConfig,
    build_tokenizer,
    train_wordpiece,
)
from llmeco_nb.training.checkpoint import (
    identity_of,
    load_checkpoint,
    save_checkpoint,
)
from llmeco_nb.training.optim import Optimiser
from llmeco_nb.training.state import TrainPlan, TrainState

QUICK = dict(size="1x32", steps=6, lr=3e-3, eval_examples=6, num_evals=1)


def said(seed: int, n: int = 8) -> str:
    r = random.Random(seed)
    return " ".join(
        (
            f"the {r.choice(['good', 'bad'])} {r.choice(['film', 'plot', 'cast'])} "
            f"{r.choice(['bored', 'moved'])} {r.choice(['me', 'us'])} ."
        )
        for _ in range(n)
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What a pretraining needs, small and sound: corpus, tokenizer, prose, pieces, an encoder of 24
    tokens."""
    folder = tmp_path_factory.mktemp("inputs")
    write_corpus(
        folder / "corpus",
        {
            s: pd.DataFrame(
                dict(
                    id=[f"{s}{i}" for i in range(n)],
                    text=[said(100 * n + i) for i in range(n)],
                    label=[0] * n,
                )
            )
            for s, n in (("train", 30), ("validation", 8), ("test", 2))
        },
        [],
        {},
    )
    build_tokenizer(
        create_record(folder / "t", "tokenizer"), folder / "corpus", TokenizerConfig(vocab_size=60)
    )
    (folder / "prose").mkdir()
    for s in ("train", "validation"):
        pd.read_parquet(folder / "corpus" / f"{s}.parquet")[["id", "text"]].assign(
            domain="reviews"
        ).to_parquet(folder / "prose" / f"{s}.parquet")
    save_subword_tokenizer(
        train_bpe(pd.read_parquet(folder / "corpus" / "train.parquet").text, 290), folder / "pieces"
    )
    pretrain(
        create_record(folder / "e", "pretrain"),
        folder / "corpus",
        folder / "t" / "tokenizer",
        MLMConfig(**QUICK, seq_len=24, max_position_embeddings=24, batch_size=4),
    )
    return folder


def encoder(inputs, tmp, **more):
    pretrain(
        create_record(tmp / "run", "pretrain"),
        inputs / "corpus",
        inputs / "t" / "tokenizer",
        MLMConfig(**QUICK | dict(seq_len=24, max_position_embeddings=32, batch_size=4) | more),
    )


def decoder(inputs, tmp, **more):
    pretrain_causal(
        create_record(tmp / "run", "causal"),
        inputs / "prose",
        inputs / "pieces",
        CausalConfig(**QUICK | dict(context_length=24, batch_size=4, baseline_tokens=0) | more),
    )


def corpus_from(tmp, name: str):
    build_corpus(create_record(tmp / "run", "data"), CorpusConfig(source=str(tmp / name)))


def corpus_of(text: bytes, name: str):
    def work(inputs, tmp):
        (tmp / name).write_bytes(text)
        corpus_from(tmp, name)

    return work


def prose_of(texts: list[str], corpus="", **more):
    def work(inputs, tmp):
        (tmp / "own").mkdir()
        for i, t in enumerate(texts):
            (tmp / "own" / f"{i}.txt").write_text(t)
        config = MixtureConfig(domains=[], extra_sources=[f"mine={tmp / 'own'}"], **more)
        build_mixture(create_record(tmp / "run", "prose"), corpus, config)

    return work


def leaking(inputs, tmp):
    held = pd.read_parquet(inputs / "corpus" / "validation.parquet").text.tolist()
    words = [
        " ".join(
            random.Random(i).choice(
                "amber basalt cedar delta ember fjord garnet harbour iris jasper".split()
            )
            for _ in range(60)
        )
        for i in range(30)
    ]
    prose_of(
        [*words, *held[:3]],
        corpus=inputs / "corpus",
        on_leak="stop",
        quality_rules=["mine=none"],
        min_english=0.0,
        validation_size=0,
        test_size=0,
    )(inputs, tmp)


def another_model(inputs, tmp):
    one, other = Optimiser(new_encoder(50, "1x32", 16)), Optimiser(new_encoder(50, "2x32", 16))
    plan = TrainPlan(steps=9)
    save_checkpoint(tmp / "resume", one, TrainState(step=1), identity_of(one, plan))
    load_checkpoint(tmp / "resume", other, identity_of(other, plan))


def foreign_folder(inputs, tmp):
    load_decoder(inputs / "e" / "encoder")


def no_tokenizer(inputs, tmp):
    save_decoder(new_decoder(60, "1x32", 16), tmp / "nowhere", tmp / "model")


BAD = [
    # what, how, error, and what its message must say: the place, what was found, what to do
    (
        "no such source",
        lambda inputs, tmp: corpus_from(tmp, "absent.csv"),
        MissingError,
        ["absent.csv", "no file or folder"],
    ),
    (
        "not UTF-8",
        corpus_of(b"text,label\nfine,a\nna\xefve,b\n", "latin.csv"),
        DataError,
        ["latin.csv", "line 3", "0xef is not UTF-8", "Set encoding"],
    ),
    (
        "no Parquet file",
        corpus_of(b"PAR1 and then nothing", "torn.parquet"),
        DataError,
        ["torn.parquet", "not a readable Parquet file", "Fetch or write it again"],
    ),
    (
        "no JSON",
        corpus_of(b'{"text": "fine", "label": "a"}\n{"text": \n', "torn.jsonl"),
        DataError,
        ["torn.jsonl", "not JSON", "line"],
    ),
    (
        "another column",
        corpus_of(b"body,label\nfine,a\nbad,b\n", "odd.csv"),
        DataError,
        ["odd.csv", "no column `text`", "body"],
    ),
    (
        "an unknown kind of file",
        corpus_of(b"x", "corpus.docx"),
        UsageError,
        ["corpus.docx", "ends in .docx", ".parquet"],
    ),
    (
        "nothing left of a corpus",
        corpus_of(b'text,label\n<br/>,a\n"<i> </i>",b\n<hr>,a\n', "tags.csv"),
        DataError,
        ["tags.csv", "Nothing of .* is left of 3 rows", "empty took 3", "Look at some of them"],
    ),
    (
        "nothing left of a prose",
        prose_of(["no", "too short", "also"]),
        DataError,
        ["domain mine", "Of 3 documents", "3", "Loosen the rule|give the domain more text"],
    ),
    (
        "a vocabulary too small",
        lambda inputs, tmp: train_wordpiece([said(1)], 9),
        UsageError,
        ["vocab_size is 9", "letters", "Raise vocab_size"],
    ),
    (
        "pieces too few",
        lambda inputs, tmp: train_tokenizer("bpe", [said(1)], 100),
        UsageError,
        ["vocab_size is 100", "260", "Give more"],
    ),
    (
        "an encoder's rows too long",
        lambda inputs, tmp: encoder(inputs, tmp, seq_len=64),
        UsageError,
        [
            "seq_len is 64",
            "max_position_embeddings 32",
            "Lower seq_len, or raise max_position_embeddings",
        ],
    ),
    (
        "a next-sentence row too long",
        lambda inputs, tmp: pretrain_nsp(
            create_record(tmp / "run", "nsp"),
            inputs / "corpus",
            inputs / "t" / "tokenizer",
            inputs / "e" / "encoder",
            NSPConfig(seq_len=32, steps=2),
        ),
        UsageError,
        ["seq_len is 32", "at most 24", "Lower seq_len"],
    ),
    (
        "a decoder's row too long",
        lambda inputs, tmp: new_decoder(60, "1x32", 16)(torch.zeros(1, 17, dtype=torch.long)),
        DataError,
        ["17 tokens", "context is 16", "Cut the rows, or make it with a longer context"],
    ),
    (
        "a row longer than all text",
        lambda inputs, tmp: encoder(inputs, tmp, seq_len=4000, max_position_embeddings=4000),
        DataError,
        ["do not fill a single row of 4000", "Take more texts, or lower seq_len"],
    ),
    (
        "a batch of nothing",
        lambda inputs, tmp: encoder(inputs, tmp, batch_size=0),
        UsageError,
        [r"batch_size is 0", "greater than 0"],
    ),
    (
        "an encoder's batch too large",
        lambda inputs, tmp: encoder(inputs, tmp, batch_size=4096),
        UsageError,
        [
            "batch of 4096 rows",
            "MiB",
            "set for this test",
            r"largest batch that fits is \d+",
            r"batch_size \d+ with grad_accum_steps \d+",
        ],
    ),
    (
        "a decoder's batch too large",
        lambda inputs, tmp: decoder(inputs, tmp, batch_size=4096),
        UsageError,
        [
            "batch of 4096 rows",
            "MiB",
            "set for this test",
            r"largest batch that fits is \d+",
            r"batch_size \d+ with grad_accum_steps \d+",
        ],
    ),
    (
        "a checkpoint of another model",
        another_model,
        DataError,
        [
            "checkpoint.json",
            "belongs to another run",
            "model is 'BertForMaskedLM .*' there and 'BertForMaskedLM .*' here",
            "to begin anew",
        ],
    ),
    ("an encoder where a decoder belongs", foreign_folder, DataError, ["encoder", "bert"]),
    (
        "a model without its tokenizer",
        no_tokenizer,
        MissingError,
        ["no tokenizer folder", "nowhere"],
    ),
    (
        "a folder that is no corpus",
        lambda inputs, tmp: pretrain(
            create_record(tmp / "run", "pretrain"),
            inputs / "pieces",
            inputs / "t" / "tokenizer",
            MLMConfig(**QUICK, batch_size=16),
        ),
        MissingError,
        ["pieces is not a corpus", "parquet", "stage data makes one"],
    ),
    (
        "an earlier run that is none",
        lambda inputs, tmp: encoder(inputs, tmp, previous_runs=[str(tmp / "old")]),
        MissingError,
        ["previous_runs names", "old", "forecast.json"],
    ),
    (
        "an earlier run of another recipe",
        lambda inputs, tmp: encoder(inputs, tmp, previous_runs=[str(inputs / "e")]),
        UsageError,
        ["previous_runs names", "max_position_embeddings is 24 there and 32 here", "Leave it out"],
    ),
    (
        "evaluation texts in the training text",
        leaking,
        DataError,
        [
            "The training text leaks",
            "3 of the evaluation set validation of the corpus",
            "3 exact",
            "on_leak to drop",
        ],
    ),
]


@pytest.mark.parametrize("work,error,parts", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_a_clear_error(work, error, parts, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        llmeco_nb.training.plan,
        "memory_budget",
        lambda model, optimiser: (2**24, "set for this test"),
    )  # 16 MiB: enough for batches of four
    with pytest.raises(LlmecoError) as e:
        work(inputs, tmp_path)
    assert type(e.value) is error
    for part in parts:
        assert re.search(part, str(e.value)), f"{part!r} is not in: {e.value}"


@pytest.mark.parametrize(
    "train,enough",
    [
        (train_wordpiece, 45),
        (lambda t, n: train_tokenizer("bpe", t, n), 270),
        (lambda t, n: train_tokenizer("fallback", t, n), 290),
        (lambda t, n: train_tokenizer("unigram", t, n), 290),
    ],
    ids=["wordpiece", "bpe", "fallback", "unigram"],
)
def test_a_vocabulary_larger_than_the_data_gives_is_said(train, enough):
    "Not refused: what there is serves. But what was asked, what came, and what to do stand there."
    with pytest.warns(
        UserWarning,
        match=(
            r"The texts give [\d,]+ pieces, not the 50,000 asked for.*Take more texts.*smaller "
            r"vocabulary"
        ),
    ):
        train([said(i) for i in range(20)], 50_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train([said(i) for i in range(20)], enough)


def test_no_large_batch_is_made_to_find_that_it_does_not_fit(inputs, tmp_path, monkeypatch):
    """The refusal names a batch that was within the limit, and nothing larger than a few rows was
    made before it."""
    made, masked = [], llmeco_nb.pretraining.masking.masked_batch
    monkeypatch.setattr(
        llmeco_nb.pretraining.masking,
        "masked_batch",
        lambda rows, which, *more: made.append(len(which)) or masked(rows, which, *more),
    )
    monkeypatch.setattr(
        llmeco_nb.training.plan,
        "memory_budget",
        lambda model, optimiser: (2**23, "set for this test"),
    )
    with pytest.raises(UsageError) as e:
        encoder(inputs, tmp_path, batch_size=512)
    largest, rows, instead, times = map(
        int,
        re.search(
            (
                r"fits is (\d+)\. For the same (\d+) rows a step: batch_size (\d+) with "
                r"grad_accum_steps (\d+)"
            ),
            str(e.value),
        ).groups(),
    )
    assert (
        max(made) <= 4 < largest < 512 == rows == instead * times
        and not (tmp_path / "run.plan.json").exists()
    )
    encoder(
        inputs, tmp_path, batch_size=instead, grad_accum_steps=times, steps=1
    )  # the advice can be followed
    assert read_json(tmp_path / "run" / "forecast.json")["came"]["bytes"] <= 2**23


def test_a_damaged_checkpoint_of_a_stage_is_named(inputs, tmp_path, killed_at):
    """Killed in the middle, one byte of its checkpoint turned: the next attempt says which file,
    and what to remove."""
    killed_at(4, lambda: encoder(inputs, tmp_path))
    folder = tmp_path / "run" / "resume" / "pretrain"
    file = folder / f"{read_json(folder / 'checkpoint.json')['slot']}.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        DataError,
        match=(
            f"{file.name} is damaged: its content is not what was written there. Remove .*pretrain "
            "to begin anew"
        ),
    ):
        encoder(inputs, tmp_path)
    for f in folder.iterdir():
        f.unlink()
    folder.rmdir()
    encoder(inputs, tmp_path)  # what was advised works
    assert np.isfinite(read_json(tmp_path / "run" / "metrics.json")["validation_loss"])
