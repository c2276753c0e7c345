"""Costs: parameters, operations and activations are what torch counts, for any shape; the stock
classes agree; the peak of a step is near the ledger's."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmeco_nb.core import UsageError
from llmeco_nb.models.conversion import (
    architectures,
    config_from_stock,
    stock_class,
    stock_config,
)
from llmeco_nb.models.costs import (
    activation_bytes,
    cost_row,
    extra_parameters,
    flops_of,
    parameters_of,
    published,
    published_config,
    training_bytes,
)
from llmeco_nb.models.transformer import (
    Bert,
    Gpt,
    Seq2Seq,
    TransformerConfig,
    bert_loss,
)
from llmeco_nb.training.forecast import peak_step_bytes, saved_bytes
from llmeco_nb.training.optim import Optimiser

shapes = st.builds(
    lambda heads, part, **more: TransformerConfig(
        hidden_size=2 * heads * part, num_heads=heads, max_position_embeddings=24, **more
    ),
    heads=st.integers(1, 3),
    part=st.integers(1, 4),
    vocab_size=st.integers(5, 60),
    intermediate_size=st.integers(0, 40),
    num_layers=st.integers(1, 3),
    num_decoder_layers=st.integers(1, 3),
    norm=st.sampled_from(["post", "pre"]),
    position_embedding=st.sampled_from(["learned", "sinusoidal"]),
    embedding_norm=st.booleans(),
    scale_embedding=st.booleans(),
    activation=st.sampled_from(["gelu", "gelu_new", "relu", "silu"]),
)
kinds = st.sampled_from([Bert, Gpt, Seq2Seq])


def a_batch(s, rows, n, written):
    g = torch.Generator().manual_seed(0)
    some = lambda k: torch.randint(0, s.vocab_size, (rows, k), generator=g)
    return (
        some(n),
        some(written) if written else None,
        some(written or n),
        torch.zeros(rows, dtype=torch.long),
    )


def a_step(model, batch, backward):
    ids, written, targets, follows = batch
    if type(model) is Bert:
        loss = bert_loss(model, ids, targets, follows)
    else:
        loss = F.cross_entropy(
            (model(ids) if written is None else model(ids, written)).flatten(0, 1).float(),
            targets.flatten(),
            reduction="sum",
        )
    backward(loss)
    return loss.detach(), targets.numel()


def with_segments(kind, s, segments):
    from dataclasses import replace

    return replace(s, type_vocab_size=segments) if kind is Bert else s


@settings(max_examples=15, deadline=None)
@given(kinds, shapes, st.integers(0, 2), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))
def test_everything_is_counted_as_torch_counts_it(kind, s, segments, rows, n, written):
    s = with_segments(kind, s, segments)
    written = written * (kind is Seq2Seq)
    model = kind(s)
    batch = a_batch(s, rows, n, written)
    assert sum(parameters_of(kind, s).values()) == sum(p.numel() for p in model.parameters())
    for training in (False, True):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            a_step(model, batch, (lambda loss: loss.backward()) if training else lambda loss: None)
        assert counter.get_total_flops() == rows * sum(
            flops_of(kind, s, n, written, training=training).values()
        )
    for each, number in ((4, torch.float32), (2, torch.bfloat16)):
        for p in model.parameters():
            p.data = p.data.to(number)
            p.grad = None
        assert saved_bytes(model, a_step, batch) == sum(
            activation_bytes(kind, s, rows, n, written, each).values()
        ), each


@pytest.mark.parametrize("name", list(published))
def test_published_networks_are_what_their_stock_class_holds(name):
    stock, _, said, where = published[name]
    config = published_config(name)
    with torch.device("meta"):
        there = sum(p.numel() for p in stock_class(stock)(config).parameters())
    s = config_from_stock(stock, config)
    total = sum(parameters_of(architectures[stock][0], s).values())
    assert total + extra_parameters(stock, s) == there and abs(total / said - 1) < 0.035 and where
    assert cost_row(name, 2, 128)["parameters"] == total


@pytest.mark.parametrize(
    "stock,written",
    [
        ("GPT2LMHeadModel", 0),
        ("BertForPreTraining", 0),
        ("BartForConditionalGeneration", 9),
        ("MarianMTModel", 9),
    ],
)
def test_operations_are_those_of_the_stock_classes(stock, written):
    "Not our own network in the witness stand, but theirs."
    kind, options = architectures[stock]
    s = TransformerConfig(
        70,
        24,
        3,
        intermediate_size=50,
        num_layers=2,
        num_decoder_layers=3,
        max_position_embeddings=32,
        **options
        | (dict(type_vocab_size=2) if kind is Bert else {})
        | dict(activation="gelu_new" if kind is Gpt else "relu"),
    )
    theirs = stock_class(stock)(stock_config(stock, s, bos_token_id=1, eos_token_id=2))
    theirs.set_attn_implementation("eager")
    ids = torch.randint(3, 70, (4, 16))
    more = dict(decoder_input_ids=torch.randint(3, 70, (4, written))) if written else {}
    for training in (False, True):
        with FlopCounterMode(display=False) as counter:
            out = theirs(input_ids=ids, **more)
            if training:
                sum(
                    out[k].sum()
                    for k in ("logits", "prediction_logits", "seq_relationship_logits")
                    if out.get(k) is not None
                ).backward()
        assert counter.get_total_flops() == 4 * sum(
            flops_of(kind, s, 16, written, training=training).values()
        )


@pytest.mark.parametrize(
    "kind,rows,precision",
    [
        (Gpt, 1, "fp32"),
        (Gpt, 24, "bf16"),
        (Bert, 6, "fp32"),
        (Seq2Seq, 1, "bf16"),
        (Seq2Seq, 12, "fp32"),
    ],
)
def test_the_peak_is_near_what_is_measured(kind, rows, precision):
    s = TransformerConfig(
        500,
        64,
        4,
        num_layers=2,
        max_position_embeddings=32,
        norm="pre",
        type_vocab_size=2 * (kind is Bert),
    )
    written = 16 * (kind is Seq2Seq)
    model = kind(s)
    found = peak_step_bytes(
        model, a_step, a_batch(s, rows, 32, written), Optimiser(model, precision=precision)
    )
    told = training_bytes(kind, s, rows, 32, written, precision)
    assert abs(told["peak"] / found - 1) < 0.03 and told["peak"] == max(
        told["at_loss"], told["at_end"]
    )


def test_few_rows_cost_the_update_and_many_the_loss():
    s = TransformerConfig(500, 64, 4, num_layers=2, max_position_embeddings=32, norm="pre")
    few, many = (training_bytes(Gpt, s, rows, 32) for rows in (1, 64))
    assert (
        few["peak"] == few["at_end"]
        and many["peak"] == many["at_loss"]
        and few["weights"] == many["weights"]
    )
    assert activation_bytes(Gpt, s, 64, 32)["mlp"] == 64 * activation_bytes(Gpt, s, 1, 32)["mlp"]


def test_refusals():
    s = TransformerConfig(20, 8)
    for words, wrong in (
        ("Linear is none of", lambda: parameters_of(torch.nn.Linear, s)),
        ("target_len is 0", lambda: flops_of(Seq2Seq, s, 5)),
        ("target_len is 3", lambda: flops_of(Gpt, s, 5, 3)),
        ("precision is 'int8'", lambda: training_bytes(Gpt, s, 1, 5, precision="int8")),
        ("'BERT huge' is not among", lambda: cost_row("BERT huge")),
    ):
        with pytest.raises(UsageError, match=words):
            wrong()
