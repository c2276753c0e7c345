"""The decoder: Qwen3's logits and gradients both ways, causality, packed documents, masked targets,
refusals, counts."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, MissingError, UsageError
from llmeco_nb.models.decoder import (
    cache_bytes,
    causal_loss,
    decoder_config,
    decoder_flops,
    decoder_parameters,
    new_decoder,
)
from llmeco_nb.models.decoder_conversion import (
    load_decoder,
    qwen3,
    qwen3_config,
    save_decoder,
)
from llmeco_nb.models.decoder_parts import causal_attention, document_positions

VOCABULARY = 120
FULL = dict(
    mlp_type="relu2",
    tie_word_embeddings=False,
    softcap=15.0,
    bigram_rows=500,
    value_embeddings=True,
    embedding_skip=True,
    embedding_norm=True,
)
STOCK = [
    dict(),
    dict(num_heads=4, num_kv_heads=2, tie_word_embeddings=False),
    dict(rope_theta=300.0, intermediate_size=40),
]


def made(seed=0, **options):
    "A decoder whose every parameter, scales included, is random."
    model = new_decoder(VOCABULARY, "2x32", 40, seed=seed, **options)
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.15 + (1.0 if p.ndim == 1 else 0.0))
    return model


def tokens(*shape, seed=0):
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", STOCK)
def test_a_saved_decoder_is_a_stock_qwen3(options, tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer/config.json").write_text("not for this model")
    ours = made(**options)
    save_decoder(ours, tmp_path / "tokenizer", tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(theirs) is qwen3()[1] and (tmp_path / "model/tokenizer.json").read_text() == "{}"
    ids = tokens(3, 40)
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5
    causal_loss(ours, ids[:, :-1], ids[:, 1:]).div(3 * 39).backward()
    theirs(ids, labels=ids).loss.backward()
    expected = dict(theirs.named_parameters())
    for n, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[n].grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options", STOCK)
def test_a_stock_qwen3_loads(options, tmp_path):
    torch.manual_seed(0)
    theirs = qwen3()[1](qwen3_config(decoder_config(VOCABULARY, "2x32", 40, **options)))
    theirs.save_pretrained(tmp_path)
    ours, ids = load_decoder(tmp_path), tokens(3, 40)
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5
    assert ours.config == decoder_config(VOCABULARY, "2x32", 40, **options)


@pytest.mark.parametrize(
    "option",
    [
        dict(mlp_type="relu2"),
        dict(softcap=15.0),
        dict(bigram_rows=9),
        dict(value_embeddings=True),
        dict(embedding_skip=True),
        dict(embedding_norm=True),
        dict(qk_norm=False),
    ],
)
def test_what_no_stock_class_has_is_refused_by_name(option, tmp_path):
    with pytest.raises(UsageError, match=next(iter(option))):
        save_decoder(made(**option), None, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_other_models_are_refused(tmp_path):
    with pytest.raises(MissingError, match="config.json"):
        load_decoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(DataError, match="gpt2"):
        load_decoder(tmp_path)
    with pytest.raises(MissingError, match="nowhere"):
        save_decoder(made(), tmp_path / "nowhere", tmp_path / "model")


@pytest.mark.parametrize("options", [dict(), dict(num_kv_heads=1), FULL])
def test_no_token_sees_a_later_one(options):
    model, ids = made(**options), tokens(2, 40)
    for at in (0, 1, 17, 39):
        other = ids.clone()
        other[:, at:] = (other[:, at:] + 1) % VOCABULARY
        with torch.no_grad():
            before, after = model(ids), model(other)
        assert torch.allclose(before[:, :at], after[:, :at], atol=1e-5) and not torch.allclose(
            before[:, at], after[:, at], atol=1e-3
        )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 15), min_size=1, max_size=6), st.integers(0, 1000), st.booleans())
def test_packed_rows_are_separate_rows(lengths, seed, full):
    model = made(seed, **(FULL if full else {}))
    model.config = replace(model.config, context_length=90)
    parts = [tokens(1, n, seed=seed + i) for i, n in enumerate(lengths)]
    aims = [tokens(1, n, seed=seed + 50 + i) for i, n in enumerate(lengths)]
    documents = torch.cat([torch.full((1, n), i % 2) for i, n in enumerate(lengths)], 1)
    packed = causal_loss(model, torch.cat(parts, 1), torch.cat(aims, 1), documents)
    apart = sum(causal_loss(model, p, a) for p, a in zip(parts, aims))
    assert abs(packed - apart) / apart < 1e-6
    one, two = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x, list(model.parameters()))])
        for x in (packed, apart)
    )
    assert (one - two).norm() / two.norm() < 2e-6


def test_masked_targets_count_nothing():
    model = made()
    ids = tokens(2, 30)
    aim = tokens(2, 30, seed=1)
    hide = torch.rand(2, 30, generator=torch.Generator().manual_seed(2)) < 0.4
    each = torch.nn.functional.cross_entropy(
        model(ids).flatten(0, 1), aim.flatten(), reduction="none"
    ).view(2, 30)
    loss = causal_loss(model, ids, aim.masked_fill(hide, -100))
    torch.testing.assert_close(loss, each[~hide].sum(), rtol=1e-6, atol=0)
    nothing = causal_loss(model, ids, torch.full_like(aim, -100))
    assert nothing == 0 and all(
        (g == 0).all() for g in torch.autograd.grad(nothing, list(model.parameters()))
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=3))
def test_runs_of_documents(rows):
    run, where = document_positions(torch.tensor(rows))
    for documents, r, w in zip(rows, run.tolist(), where.tolist()):
        number, place = 0, 0
        for i, d in enumerate(documents):
            if i:
                number, place = (number, place + 1) if d == documents[i - 1] else (number + 1, 0)
            assert (r[i], w[i]) == (number, place)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="flex attention has a backward pass on GPUs only"
)
def test_flex_is_sdpa_on_a_gpu():
    q, k, v = (torch.randn(2, h, 256, 64, device="cuda", requires_grad=True) for h in (4, 2, 2))
    ids = document_positions(
        torch.arange(256, device="cuda").div(60, rounding_mode="floor").expand(2, -1)
    )[0]
    flex, sdpa = (causal_attention(q, k, v, ids, kind) for kind in ("flex", "sdpa"))
    torch.testing.assert_close(flex, sdpa, atol=2e-3, rtol=2e-3)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (flex, sdpa))):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("options", [*STOCK, FULL])
def test_counts(options):
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = made(**options), tokens(4, 40)
    assert decoder_parameters(model.config)["total"] == sum(p.numel() for p in model.parameters())
    for training in (True, False):
        with FlopCounterMode(display=False) as counter:
            loss = causal_loss(model, ids, ids)
            if training:
                loss.backward()
        assert counter.get_total_flops() == ids.numel() * decoder_flops(model.config, 40, training)
    assert (
        cache_bytes(model.config, 10)
        == 2 * 2 * model.config.num_kv_heads * model.config.head_dim * 10 * 2
    )


def test_bad_input_is_named():
    for wrong, says in (
        (dict(size="big"), "layers x width"),
        (dict(num_heads=5), "num_heads"),
        (dict(num_heads=4, num_kv_heads=3), "num_kv_heads"),
        (dict(mlp_type="gelu"), "gated or relu2"),
        (dict(swish=1), "swish"),
        (dict(context_length=0), "context_length"),
        (dict(num_heads=-2), "num_heads is -2"),
        (dict(num_kv_heads=-1), "num_kv_heads is -1"),
        (dict(intermediate_size=-8), "intermediate_size is -8"),
    ):
        with pytest.raises(UsageError, match=says):
            decoder_config(VOCABULARY, **{"size": "2x32", **wrong})
    with pytest.raises(DataError, match="41 tokens.*40"):
        made()(tokens(1, 41))
    with pytest.raises(UsageError, match="math, sdpa, flex"):
        causal_attention(*(torch.zeros(1, 1, 3, 4) for _ in range(3)), None, "fast")
