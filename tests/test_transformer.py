"""The network of 2017: attention against numbers done by hand and against torch's own layers,
masks, shapes, symmetries, and what turning does to positions."""

import math

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmeco_nb.core import UsageError
from llmeco_nb.models.decoder_parts import apply_rotary, rotary_cos_sin
from llmeco_nb.models.transformer import (
    Bert,
    Block,
    Embeddings,
    Gpt,
    MultiHeadAttention,
    Seq2Seq,
    Stack,
    TransformerConfig,
    bert_loss,
    greedy_decode,
    make_attn_mask,
    sinusoidal_embedding,
)


def wild(model, seed=0, spread=0.4):
    """The model with every parameter random, norms and biases included, in float64: a part that is
    left out would show."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * spread + (p.ndim == 1) * 0.5)
    return model.double().eval()


def vectors(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids_of(*shape, seed=2, vocabulary=30):
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


# -- attention


def test_attention_by_hand():
    """One head, two tokens of width 2, projections that do nothing: softmax over (q k)/sqrt 2 with
    numbers from a pocket calculator."""
    part = MultiHeadAttention(2, 1).double()
    for linear in (part.query, part.key, part.value, part.output):
        linear.weight.data = torch.eye(2).double()
        linear.bias.data = torch.zeros(2).double()
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]).double()
    # scores: token 0 with itself 1/1.41421 = 0.70711, with token 1 nothing; exp gives 2.02811 and
    # 1, hence 0.66976 and 0.33024
    # token 1 with itself 4/1.41421 = 2.82843, exp 16.91883, hence 0.94419 and 0.05581
    expected = torch.tensor([[[0.66976, 0.66048], [0.05581, 1.88838]]]).double()
    torch.testing.assert_close(part(x), expected, atol=2e-5, rtol=0)
    # the first token sees itself alone
    torch.testing.assert_close(part(x, is_causal=True)[0, 0], torch.tensor([1.0, 0.0]).double())


@settings(max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([(4, 1), (4, 2), (12, 3)]),
    st.booleans(),
    st.integers(0, 99),
)
def test_attention_is_torchs_multihead_attention(rows, n, m, sizes, masked, seed):
    width, heads = sizes
    part = wild(MultiHeadAttention(width, heads), seed)
    theirs = nn.MultiheadAttention(width, heads, batch_first=True).double()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = (
        torch.cat([getattr(getattr(part, name), w).detach() for name in ("query", "key", "value")])
        for w in ("weight", "bias")
    )
    theirs.out_proj.load_state_dict(part.output.state_dict())
    x = vectors(rows, n, width, seed=seed)
    memory = vectors(rows, m, width, seed=seed + 1)
    keep = torch.ones(rows, m, dtype=torch.bool)
    if masked:
        keep[:, 1:] = torch.rand(rows, m - 1, generator=torch.Generator().manual_seed(seed)) < 0.6
    torch.testing.assert_close(
        part(x, memory, make_attn_mask(keep, n, False)),
        theirs(x, memory, memory, key_padding_mask=~keep)[0],
    )


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_blocks_are_torchs_layers(norm):
    s = TransformerConfig(30, 12, 3, intermediate_size=20, norm=norm)
    given = dict(
        d_model=12,
        nhead=3,
        dim_feedforward=20,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=norm == "pre",
    )
    x = vectors(2, 5, 12)
    memory = vectors(2, 7, 12, seed=4)
    keep = torch.ones(2, 5)
    read = torch.ones(2, 7)
    keep[1, 3:], read[0, 4:] = 0, 0
    for cross in (False, True):
        ours = wild(Block(s, cross))
        theirs = (
            (nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer)(**given)
            .double()
            .eval()
        )
        for part, other in (
            (ours.self_attn, theirs.self_attn),
            *([(ours.cross_attn, theirs.multihead_attn)] if cross else []),
        ):
            for w in ("weight", "bias"):
                getattr(other, f"in_proj_{w}").data = torch.cat(
                    [getattr(getattr(part, name), w).detach() for name in ("query", "key", "value")]
                )
            other.out_proj.load_state_dict(part.output.state_dict())
        theirs.linear1.load_state_dict(ours.mlp.fc1.state_dict())
        theirs.linear2.load_state_dict(ours.mlp.fc2.state_dict())
        for k, part in enumerate(
            (ours.self_attn_norm, *([ours.cross_attn_norm] if cross else []), ours.mlp_norm)
        ):
            getattr(theirs, f"norm{k + 1}").load_state_dict(part.state_dict())
        here = keep.bool()
        with torch.no_grad():
            if cross:
                ahead = torch.ones(5, 5, dtype=torch.bool).triu(1)
                mine = ours(
                    x,
                    make_attn_mask(keep, 5, True),
                    memory=memory,
                    memory_attn_mask=make_attn_mask(read, 5, False),
                )
                other = theirs(
                    x,
                    memory,
                    tgt_mask=ahead,
                    tgt_key_padding_mask=~here,
                    memory_key_padding_mask=~read.bool(),
                )
            else:
                mine = ours(x, make_attn_mask(keep, 5, False))
                other = theirs(x, src_key_padding_mask=~here)
        torch.testing.assert_close(mine[here], other[here])


# -- who sees whom


@settings(max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans())
def test_masks_say_who_may_look(lengths, causal):
    keep = torch.tensor([[int(i < n) for i in range(6)] for n in lengths])
    pairs = make_attn_mask(keep, 6, causal)
    for row, n in enumerate(lengths):
        for i in range(6):
            for j in range(6):
                assert bool(pairs.expand(-1, -1, 6, -1)[row, 0, i, j]) == (
                    j < n and (j <= i or not causal)
                )
    assert make_attn_mask(None, 6, causal) is None


@pytest.mark.parametrize(
    "norm,places", [("post", "learned"), ("pre", "learned"), ("pre", "sinusoidal")]
)
def test_a_decoder_does_not_look_ahead_and_an_encoder_does(norm, places):
    s = TransformerConfig(
        30, 16, 2, max_position_embeddings=10, norm=norm, position_embedding=places
    )
    ids = ids_of(2, 9)
    gpt, bert = wild(Gpt(s)), wild(Bert(s))
    for at in (0, 4, 8):
        other = ids.clone()
        other[:, at] = (other[:, at] + 1) % 30
        with torch.no_grad():
            before, after = gpt(ids), gpt(other)
            assert (
                torch.equal(before[:, :at], after[:, :at])
                and not torch.isclose(before[:, at:], after[:, at:]).all(-1).any()
            )
            assert not torch.isclose(bert(ids)[0], bert(other)[0]).all(-1).any()


def test_padding_changes_nothing():
    s = TransformerConfig(30, 16, 2, max_position_embeddings=10)
    ids = ids_of(2, 8)
    keep = torch.ones(2, 8, dtype=torch.long)
    keep[1, 5:] = 0
    other = torch.where(keep == 1, ids, 7)
    bert = wild(Bert(s))
    gpt = wild(Gpt(s))
    both = wild(Seq2Seq(s))
    with torch.no_grad():
        for run in (
            lambda i: bert(i, keep)[0][keep == 1],
            lambda i: bert(i, keep)[1],
            lambda i: gpt(i, keep)[keep == 1],
            lambda i: both(i, ids_of(2, 4), keep),
        ):
            torch.testing.assert_close(run(ids), run(other))
        # as if it were not there
        torch.testing.assert_close(bert(ids, keep)[0][1, :5], bert(ids[1:, :5])[0][0])
        torch.testing.assert_close(
            both(ids, ids_of(2, 4), keep)[1], both(ids[1:, :5], ids_of(2, 4)[1:])[0]
        )


# -- shapes and sizes


@pytest.mark.parametrize(
    "norm,places,first_norm,scale",
    [
        ("post", "learned", True, False),
        ("pre", "sinusoidal", False, True),
        ("pre", "learned", True, True),
    ],
)
def test_shapes(norm, places, first_norm, scale):
    s = TransformerConfig(
        30,
        16,
        4,
        24,
        2,
        3,
        12,
        norm=norm,
        position_embedding=places,
        embedding_norm=first_norm,
        scale_embedding=scale,
    )
    ids, written = ids_of(3, 7), ids_of(3, 5)
    tokens, pair = Bert(s)(ids)
    assert (
        tokens.shape == (3, 7, 30)
        and pair.shape == (3, 2)
        and Bert(s).hidden(ids).shape == (3, 7, 16)
    )
    assert Gpt(s)(ids).shape == (3, 7, 30)
    both = Seq2Seq(s)
    assert both.encode(ids).shape == (3, 7, 16) and both(ids, written).shape == (3, 5, 30)
    assert len(both.encoder.blocks) == 2 and len(both.decoder.blocks) == 3
    linear = lambda a, b: a * b + b
    norms = 2 * 16
    # by hand
    block = 4 * linear(16, 16) + linear(16, 24) + linear(24, 16) + 2 * norms
    embed = 30 * 16 + (12 * 16 if places == "learned" else 0) + (norms if first_norm else 0)
    assert sum(p.numel() for p in Gpt(s).parameters()) == embed + 2 * block + (
        norms if norm == "pre" else 0
    )


def test_what_makes_no_network_is_refused():
    for wrong, says in (
        (dict(hidden_size=15, num_heads=3), "hidden_size is 15"),
        (dict(hidden_size=16, num_heads=3), "3 heads"),
        (dict(norm="middle"), "norm is 'middle'"),
        (dict(position_embedding="none"), "position_embedding is 'none'"),
        (dict(activation="swish"), "activation is 'swish'"),
        (dict(num_layers=0), "below 1"),
        (dict(num_heads=0), "below 1"),
        (dict(intermediate_size=-4), "below 1"),
        (dict(num_decoder_layers=-1), "below 1"),
        (dict(type_vocab_size=-1), "type_vocab_size is -1"),
        (dict(dropout=1.5), "dropout 1.5"),
    ):
        with pytest.raises(UsageError, match=says):
            TransformerConfig(30, **wrong)
    with pytest.raises(UsageError, match="11 tokens; this model reads 10"):
        Gpt(TransformerConfig(30, 16, max_position_embeddings=10))(ids_of(1, 11))
    with pytest.raises(UsageError, match="type_vocab_size is 2"):
        Seq2Seq(TransformerConfig(30, 16, type_vocab_size=2))


def test_weights_depend_on_the_seed_alone():
    s = TransformerConfig(30, 16)
    for kind in (Bert, Gpt, Seq2Seq):
        torch.manual_seed(1)
        a = kind(s, seed=3)
        torch.manual_seed(2)
        b = kind(s, seed=3)
        assert all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
        assert not all(x.equal(y) for x, y in zip(a.parameters(), kind(s, seed=4).parameters()))


# -- gradients


def test_every_parameter_learns_and_the_gradient_is_right():
    s = TransformerConfig(20, 8, 2, num_layers=1, max_position_embeddings=6, type_vocab_size=2)
    ids = ids_of(2, 5, vocabulary=20)
    losses = {
        Bert: lambda m: sum(out.square().sum() for out in m(ids)),
        Gpt: lambda m: m(ids).logsumexp(-1).sum(),
        Seq2Seq: lambda m: m(ids, ids_of(2, 4, vocabulary=20)).square().mean(),
    }
    for kind, loss in losses.items():
        model = wild(
            kind(
                s
                if kind is Bert
                else TransformerConfig(20, 8, 2, num_layers=1, max_position_embeddings=6)
            ),
            spread=0.3,
        )
        for p in model.parameters():
            p.grad = None
        loss(model).backward()
        # a shift of all keys changes no softmax: that gradient is nought by mathematics
        for name, p in model.named_parameters():
            assert p.grad is not None and (name.endswith("key.bias") or p.grad.abs().max() > 0), (
                name
            )
            if name.endswith("key.bias"):
                assert p.grad.abs().max() < 1e-12, name
        name, p = next(
            (n, p) for n, p in model.named_parameters() if n.endswith("self_attn.value.weight")
        )
        at, h = (1, 2), 1e-6
        with torch.no_grad():
            p[at] += h
            up = loss(model)
            p[at] -= 2 * h
            down = loss(model)
            p[at] += h
        assert abs((up - down) / 2 / h - p.grad[at]) < 1e-6 * max(1, abs(p.grad[at])), name


def test_bert_loss_asks_only_what_is_asked():
    s = TransformerConfig(30, 16, max_position_embeddings=10, type_vocab_size=2)
    ids = ids_of(2, 8)
    model = wild(Bert(s), spread=0.2)
    labels = ids.masked_fill(torch.arange(8) % 3 > 0, -100)
    with torch.no_grad():
        logits, pair = model(ids)
        asked = [
            -logits[r, i].log_softmax(-1)[labels[r, i]]
            for r in range(2)
            for i in range(8)
            if labels[r, i] >= 0
        ]
        expected = (
            sum(asked) / len(asked) - (pair.log_softmax(-1)[0, 1] + pair.log_softmax(-1)[1, 0]) / 2
        )
        assert abs(bert_loss(model, ids, labels, torch.tensor([1, 0])) - expected) < 1e-5


# -- where a token stands


def test_without_places_order_is_unknown_and_with_them_it_is_not():
    s = TransformerConfig(30, 16, 2, max_position_embeddings=8)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    stack, x = wild(Stack(s, 2)), vectors(2, 6, 16)
    torch.testing.assert_close(stack(x[:, order]), stack(x)[:, order])
    assert not torch.allclose(
        stack(x[:, order], is_causal=True), stack(x, is_causal=True)[:, order]
    )
    ids = ids_of(2, 6)
    for places in ("learned", "sinusoidal"):
        embed = wild(
            Embeddings(
                TransformerConfig(30, 16, 2, max_position_embeddings=8, position_embedding=places)
            )
        )
        assert not torch.allclose(stack(embed(ids[:, order])), stack(embed(ids))[:, order])


def test_rows_do_not_meet():
    s = TransformerConfig(30, 16, 2, max_position_embeddings=8)
    ids = ids_of(3, 6)
    for model in (wild(Bert(s)), wild(Gpt(s))):
        run = lambda i: model(i)[0] if isinstance(model, Bert) else model(i)
        with torch.no_grad():
            torch.testing.assert_close(run(ids)[[2, 0, 1]], run(ids[[2, 0, 1]]))


def test_sinusoidal_positions_are_the_papers():
    p = sinusoidal_embedding(50, 12)
    for t in (0, 1, 7, 49):
        for i in range(6):
            assert p[t, i].item() == pytest.approx(math.sin(t / 10000 ** (2 * i / 12)), abs=1e-6)
            assert p[t, 6 + i].item() == pytest.approx(
                math.cos(t / 10000 ** (2 * i / 12)), abs=1e-6
            )
    # how near two places are depends on their distance alone
    products = p.double() @ p.double().T
    for d in (1, 5):
        torch.testing.assert_close(
            products.diagonal(d), products[0, d].expand(50 - d), atol=1e-5, rtol=0
        )


@settings(max_examples=40)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.integers(0, 99))
def test_rotation_tells_distances_only(i, j, shift, seed):
    """RoPE: the product of a query at place i and a key at place j is that at i + shift and j +
    shift, and lengths stay."""
    q = vectors(8, seed=seed)
    k = vectors(8, seed=seed + 1)
    at = lambda x, place: apply_rotary(
        x, *(t.double() for t in rotary_cos_sin(torch.tensor(place), 8))
    )
    assert (at(q, i) @ at(k, j) - at(q, i + shift) @ at(k, j + shift)).abs() < 1e-3
    assert (at(q, i).norm() - q.norm()).abs() < 1e-5 and torch.equal(at(q, 0), q)
    if i != j:
        assert not torch.allclose(at(q, i), at(q, j))


# -- writing


def test_greedy_writing_is_the_likeliest_token_each_time():
    s = TransformerConfig(12, 16, 2, max_position_embeddings=10)
    ids = ids_of(3, 6, vocabulary=12)
    model = wild(Seq2Seq(s), seed=5)
    written = greedy_decode(model, ids, 1, 2, 7)
    assert written.shape[0] == 3 and 1 <= written.shape[1] <= 7
    whole = torch.cat([torch.ones(3, 1, dtype=torch.long), written], 1)
    # asked all at once, the same answers
    with torch.no_grad():
        assert torch.equal(model(ids, whole[:, :-1]).argmax(-1), written)
    model.bias[2] = 1e6
    # all say at once that they are done
    assert greedy_decode(model, ids, 1, 2, 7).tolist() == [[2]] * 3
