"""Next sentences: pairs are pure, balanced and tell nothing by their shape; the losses are the
stock class's; a killed run ends with the same bytes; what can be learned is learned."""

import random
from dataclasses import replace

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
from llmeco_nb.data.corpus import read_split, write_corpus
from llmeco_nb.pretraining.mlm import MLMConfig, pretrain
from llmeco_nb.pretraining.nsp import (
    NSPConfig,
    load_nsp_model,
    nsp_loss_step,
    nsp_losses,
    nsp_validation,
    pretrain_nsp,
    token_overlap_baseline,
)
from llmeco_nb.pretraining.sentence_pairs import (
    SentencePairs,
    nsp_batch,
    nsp_batches,
    nsp_example,
    pair_boundaries,
    segment_lengths,
    split_sentences,
    tokenize_documents,
)
from llmeco_nb.tokenization.wordpiece import (
    TokenizerConfig,
    build_tokenizer,
    open_tokenizer,
)

QUICK = dict(seq_len=24, steps=10, batch_size=8, eval_examples=20, num_evals=2)
NAMES = [
    "anna",
    "boris",
    "clara",
    "david",
    "emma",
    "felix",
    "greta",
    "hugo",
    "irene",
    "jakob",
    "karin",
    "lukas",
    "mara",
    "nils",
    "olga",
    "peter",
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Texts that speak of one person each, so that a pair can be told by the name; their tokenizer,
    and an encoder of a few steps."""
    torch.set_num_threads(1)
    folder, r = tmp_path_factory.mktemp("inputs"), random.Random(0)

    def said():
        name = r.choice(NAMES)
        return " ".join(
            (
                f"{name} {r.choice(['saw', 'liked', 'left'])} the "
                f"{r.choice(['film', 'plot', 'cast'])} ."
            )
            for _ in range(12)
        )

    parts = {
        s: pd.DataFrame(
            {
                "id": [f"{s}{i}" for i in range(n)],
                "text": [said() for _ in range(n)],
                "label": [0] * n,
            }
        )
        for s, n in (("train", 60), ("validation", 20), ("test", 2))
    }
    write_corpus(folder / "corpus", parts, [], {})
    tokenizer = build_tokenizer(
        create_record(folder / "t", "tokenizer"), folder / "corpus", TokenizerConfig(vocab_size=120)
    )
    encoder = pretrain(
        create_record(folder / "e", "pretrain"),
        folder / "corpus",
        tokenizer,
        MLMConfig(
            size="1x32",
            seq_len=24,
            max_position_embeddings=32,
            steps=4,
            batch_size=4,
            eval_examples=4,
            num_evals=1,
        ),
    )
    return folder / "corpus", tokenizer, encoder


@pytest.fixture(scope="module")
def docs(inputs):
    return tokenize_documents(open_tokenizer(inputs[1]), read_split(inputs[0], "train").text)


def pairs_of(docs, vocab_size=100, **more):
    "Pairs of 24 tokens."
    return SentencePairs(docs, pair_boundaries(docs, 24), 24, vocab_size, **more)


# -- pairs


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="ab.!? \n\"')", max_size=60))
def test_cutting_sentences_loses_nothing_but_space(text):
    found = split_sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split()) and all(
        s == s.strip() and s for s in found
    )


def test_borders_are_where_sentences_end(docs):
    for ids, borders in docs:
        assert len(borders) == 11 and (np.diff(np.r_[0, borders, len(ids)]) > 0).all()


def test_a_pair_fills_its_row_and_is_pure(docs):
    where = pair_boundaries(docs, 24)
    a, b = segment_lengths(24)
    labels = []
    for i in range(len(where)):
        row, label = nsp_example(docs, where, i, (5, 0, i), 24)
        d, at = where[i]
        labels.append(label)
        assert len(row) == 24 and row[0] == 2 and row[1 + a] == row[-1] == 3 and (row != 0).all()
        assert row[1 : 1 + a].tolist() == docs[d][0][at - a : at].tolist()
        if not label:
            assert row[2 + a : -1].tolist() == docs[d][0][at : at + b].tolist()
    np.random.seed(1)
    assert all(
        np.array_equal(
            nsp_example(docs, where, i, (5, 0, i), 24)[0],
            nsp_example(docs, where, i, (5, 0, i), 24)[0],
        )
        for i in range(20)
    )
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / len(labels) ** 0.5
    changed = [nsp_example(docs, where, i, (5, 1, i), 24) for i in range(len(where))]
    assert [c[1] for c in changed] != labels  # another epoch, other coins


def test_shares_of_a_batch_add_up(docs, inputs):
    """Three processes whose pairs hide unequal numbers of tokens give the loss and the gradient of
    one."""
    sparse = []
    for d, (ids, borders) in enumerate(docs):
        unknown = np.arange(len(ids)) % (2 + d % 3) == 0
        sparse.append((np.where(unknown, 1, ids), borders))  # [UNK] is never hidden
    model = load_nsp_model(inputs[2], 0)
    pairs = pairs_of(sparse, model.config.vocab_size, mask_prob=0.3, seed=3)

    def made(world, rank):
        return nsp_batches(pairs, 7, world, rank)(5)

    def learned(batches):
        model.zero_grad()
        told = [nsp_loss_step(0.5)(model, b, lambda loss: loss.backward()) for b in batches]
        gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return sum(float(loss) for loss, _ in told), sum(n for _, n in told), torch.cat(gradient)

    parts = [made(3, rank) for rank in range(3)]
    assert len({len(b["targets"]) / len(b["next_sentence"]) for b in parts}) > 1
    loss, count, gradient = learned([made(1, 0)])
    shared, counted, added = learned(parts)
    assert count == counted == 7 and shared == pytest.approx(loss, rel=1e-5)
    assert (added - gradient).norm() < 1e-5 * gradient.norm()
    with pytest.raises(UsageError, match="can not be shared by 8 processes"):
        made(8, 0)


def test_a_false_b_comes_from_another_document(docs):
    marked = [
        (np.full_like(ids, 10 + d), borders) for d, (ids, borders) in enumerate(docs)
    ]  # every document of one token
    where, (a, _) = pair_boundaries(marked, 24), segment_lengths(24)
    for i in range(len(where)):
        for follows in (True, False):
            row, label = nsp_example(marked, where, i, (0, 0, i), 24, follows)
            assert label == int(not follows) and (row[1] == row[a + 2]) == follows


def test_a_batch_is_pure_across_epochs_and_hides_the_same_everywhere(docs):
    where = pair_boundaries(docs, 24)
    pairs = pairs_of(docs, seed=3)
    batches, fresh = (nsp_batches(p, 7) for p in (pairs, replace(pairs, boundaries=where.copy())))
    edge = len(where) // 7  # this batch crosses an epoch
    expected = {i: batches(i) for i in (0, edge, 500)}
    for i in (500, edge, 0):
        assert all(fresh(i)[k].equal(expected[i][k]) for k in expected[i])
    b = expected[edge]
    assert (
        len(b["positions"]) == 7 * round(0.15 * 21)
        and b["token_type_ids"].sum(1).eq(segment_lengths(24)[1] + 1).all()
    )
    shown = nsp_batch(pairs, [0, 1], [0, 0])
    plain = torch.from_numpy(
        np.concatenate([nsp_example(docs, where, i, (3, 0, i), 24)[0] for i in (0, 1)])
    ).long()
    assert plain[shown["positions"]].equal(shown["targets"]) and (shown["targets"] >= 5).all()
    kept = torch.ones(48, dtype=torch.bool)
    kept[shown["positions"]] = False
    assert shown["input_ids"].flatten()[kept].equal(plain[kept])


def test_too_little_text_is_refused(docs):
    with pytest.raises(DataError, match="fewer than two"):
        pair_boundaries(docs[:1], 24)
    with pytest.raises(DataError, match="lower seq_len"):
        pair_boundaries(docs, 400)
    with pytest.raises(UsageError, match="at least 11"):
        pair_boundaries(docs, 8)


# -- losses


def test_losses_are_the_stock_class_s(inputs, docs):
    model = load_nsp_model(inputs[2], 1)
    b = nsp_batch(pairs_of(docs, mask_prob=0.2), range(9), [0] * 9)
    labels = torch.full((9 * 24,), -100)
    labels[b["positions"]] = b["targets"]
    out = model(
        b["input_ids"],
        token_type_ids=b["token_type_ids"],
        labels=labels.view(9, 24),
        next_sentence_label=b["next_sentence"],
    )
    out.loss.backward()
    theirs = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss, n = nsp_loss_step(1.0)(model, b, lambda loss: loss.backward())
    assert (
        abs(loss / n - out.loss) < 1e-5
        and (nsp_losses(model, **b)[0] - out.seq_relationship_logits).abs().max() < 1e-5
    )
    for p, g in zip(model.parameters(), theirs):
        assert (p.grad / n - g).abs().max() < 1e-5


def test_held_pairs_are_balanced_and_do_not_depend_on_the_batch(inputs, docs):
    model = load_nsp_model(inputs[2], 1).eval()
    a, b = (nsp_validation(model, pairs_of(docs), 31, batch) for batch in (4, 30))
    assert len(a) == 30 and np.allclose(a[:, :2], b[:, :2], atol=1e-4)


# -- the stage


def what_stays(folder):
    record = open_record(folder, "nsp")
    rows = [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in record.rows()
    ]
    return (
        sha256_of(record.artifact("paired")),
        rows,
        {k: v for k, v in record.metrics.items() if k not in ("seconds", "forecast_seconds")},
        read_json(record.path / "pairs.json"),
    )


def test_killed_it_ends_with_the_same_bytes(inputs, tmp_path, killed_at):
    pretrain_nsp(create_record(tmp_path / "calm", "nsp"), *inputs, NSPConfig(**QUICK))
    for at in (1, 7):
        killed_at(
            at,
            lambda: pretrain_nsp(
                create_record(tmp_path / "run", "nsp"), *inputs, NSPConfig(**QUICK)
            ),
        )
    pretrain_nsp(create_record(tmp_path / "run", "nsp"), *inputs, NSPConfig(**QUICK))
    assert what_stays(tmp_path / "run") == what_stays(tmp_path / "calm")


def test_batch_and_rate_are_found_and_memory_foretold(inputs, tmp_path):
    "Probes choose; what was foretold from two small batches lies within a tenth of what came."
    from llmeco_nb.training.plan import BATCH_SIZE_CANDIDATES, LR_CANDIDATES

    pretrain_nsp(
        create_record(tmp_path / "run", "nsp"),
        *inputs,
        NSPConfig(**QUICK | dict(batch_size=None, lr=None)),
    )
    n = open_record(tmp_path / "run", "nsp").metrics
    assert (
        n["batch"] in BATCH_SIZE_CANDIDATES
        and n["lr"] in LR_CANDIDATES
        and n["forecast_mib"] == pytest.approx(n["peak_mib"], rel=0.1)
    )
    with pytest.raises(UsageError, match="lr is 0"):
        pretrain_nsp(
            create_record(tmp_path / "zero", "nsp"), *inputs, NSPConfig(**QUICK | dict(lr=0.0))
        )


def test_what_can_be_told_is_told(inputs, tmp_path):
    """Each text speaks of one person: counting shared words solves most pairs, and the model,
    trained on, is above chance beyond its interval."""
    from llmeco_nb.stats.significance import wilson

    pretrain_nsp(
        create_record(tmp_path / "run", "nsp"),
        *inputs,
        NSPConfig(seq_len=24, steps=400, batch_size=32, eval_examples=120, num_evals=2, lr=3e-3),
    )
    n = open_record(tmp_path / "run", "nsp").metrics
    assert (
        n["overlap_accuracy"] > 0.85
        and wilson(n["right"], n["pairs"]).low > 0.5
        and n["pair_loss"] < 0.69
    )


def test_counting_shared_words_knows_nothing_without_topics(docs):
    r = np.random.default_rng(0)
    noise = [(r.integers(5, 120, len(ids)).astype(np.int32), borders) for ids, borders in docs]
    train, held = pairs_of(noise, 120), pairs_of(noise[30:], 120)
    assert 0.35 < token_overlap_baseline(train, held, 200).mean() < 0.65


def test_refusals(inputs, tmp_path):
    corpus, tokenizer, encoder = inputs
    for words, more in (
        ("mask_prob is 1", dict(mask_prob=1.0)),
        ("mlm_weight is -1", dict(mlm_weight=-1.0)),
        ("at most 32", dict(seq_len=64)),
        ("eval_examples is 1", dict(eval_examples=1)),
    ):
        with pytest.raises(UsageError, match=words):
            pretrain_nsp(create_record(tmp_path / "run", "nsp"), *inputs, NSPConfig(**QUICK | more))
    with pytest.raises(MissingError, match="not an encoder"):
        pretrain_nsp(
            create_record(tmp_path / "run", "nsp"), corpus, tokenizer, tmp_path, NSPConfig(**QUICK)
        )
    other = build_tokenizer(
        create_record(tmp_path / "t", "tokenizer"), corpus, TokenizerConfig(vocab_size=60)
    )
    with pytest.raises(DataError, match="do not belong together"):
        pretrain_nsp(
            create_record(tmp_path / "run", "nsp"), corpus, other, encoder, NSPConfig(**QUICK)
        )
