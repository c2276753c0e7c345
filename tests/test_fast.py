"""The faster forward is the stock one: same logits and gradients in fp32, in every case it takes
on, and torch's own attention in every case it does not."""

import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import llmeco_nb.models.speedups as fast
from llmeco_nb.models.encoder import mlm_loss, new_encoder
from llmeco_nb.models.speedups import (
    EagerAttention,
    FusedLinearCrossEntropy,
    fast_mlm_loss,
    use_fast_attention,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some(rows=4, tokens=24, vocabulary=300, seed=0):
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator(seed))
    positions = (
        (torch.rand(rows, tokens, generator=generator(seed + 1)) < 0.2).flatten().nonzero()[:, 0]
    )
    return ids, positions, ids.flatten()[positions]


def twins(**more):
    stock, ours = (new_encoder(300, "2x96", 32, seed=1, **more).train() for _ in range(2))
    return stock, use_fast_attention(ours, always=True)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(0, 99),
    st.booleans(),
)
def test_attention_is_torchs(rows, heads, tokens, width, seed, masked):
    g = generator(seed)
    q, k, v = (
        torch.randn(
            rows, heads, tokens, width, generator=g, dtype=torch.float64, requires_grad=True
        )
        for _ in range(3)
    )
    mask = None
    if masked:
        mask = torch.rand(rows, 1, tokens, tokens, generator=g) < 0.6
        # every query sees something
        mask[..., 0] = True
    grad = torch.randn(rows, heads, tokens, width, generator=g, dtype=torch.float64)
    found = []
    for out in (
        EagerAttention.apply(q, k, v, 0.7, mask),
        F.scaled_dot_product_attention(q, k, v, mask, scale=0.7),
    ):
        found.append([out, *torch.autograd.grad(out, (q, k, v), grad)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(2, 30), st.integers(1, 200), st.integers(0, 99))
def test_the_loss_is_cross_entropy_however_it_is_cut(n, vocabulary, room, seed):
    g = generator(seed)
    x, w, b = (
        torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True)
        for s in ((n, 5), (vocabulary, 5), (vocabulary,))
    )
    y = torch.randint(0, vocabulary, (n,), generator=g)
    ours = FusedLinearCrossEntropy.apply(x, w, b, y, room)
    torchs = F.cross_entropy(F.linear(x, w, b), y, reduction="sum")
    torch.testing.assert_close(ours, torchs)
    for a, c in zip(
        torch.autograd.grad(2.5 * ours, (x, w, b)), torch.autograd.grad(2.5 * torchs, (x, w, b))
    ):
        torch.testing.assert_close(a, c)


def test_the_models_logits_and_gradients_in_fp32():
    stock, ours = twins()
    ids, positions, targets = some()
    keep = torch.ones_like(ids)
    keep[2, 15:] = 0
    for seen in (None, keep):
        with torch.no_grad():
            assert (stock(ids, attention_mask=seen).logits - ours(ids, attention_mask=seen).logits)[
                keep.bool()
            ].abs().max() < 1e-5
        for m, loss in ((stock, mlm_loss), (ours, fast_mlm_loss)):
            m.zero_grad()
            m.value = loss(m, ids, positions, targets, seen) / len(targets)
            m.value.backward()
        assert abs(stock.value - ours.value) < 1e-5
        for (n, p), q in zip(stock.named_parameters(), ours.parameters()):
            assert (p.grad - q.grad).abs().max() < 1e-5, n
    assert (
        len(list(ours.parameters())) == len(list(stock.parameters()))
        and ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight
    )


def test_in_bf16_it_is_as_near_to_fp32_as_the_stock_model(monkeypatch):
    stock, _ = twins()
    ids, positions, targets = some(8)
    exact = torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(
                mlm_loss(stock, ids, positions, targets), list(stock.parameters())
            )
        ]
    )
    calls, real = [], EagerAttention.apply
    monkeypatch.setattr(fast.EagerAttention, "apply", lambda *a: calls.append(1) or real(*a))
    error = {}
    for name, loss, change in (
        ("stock", mlm_loss, lambda m: m),
        ("ours", fast_mlm_loss, use_fast_attention),
    ):
        m = change(new_encoder(300, "2x96", 32, seed=1).train()).bfloat16()
        got = torch.cat(
            [
                g.float().flatten()
                for g in torch.autograd.grad(loss(m, ids, positions, targets), list(m.parameters()))
            ]
        )
        error[name] = ((got - exact).norm() / exact.norm()).item()
    # both layers took the products
    assert error["ours"] < 1.2 * error["stock"] < 0.1 and len(calls) == 2


def test_what_it_is_not_made_for_goes_to_torch(monkeypatch):
    def never(*a):
        raise AssertionError("the products were used")

    monkeypatch.setattr(fast.EagerAttention, "apply", never)
    ids = some()[0]
    # dropout on the shares
    use_fast_attention(new_encoder(300, "1x32", 32, dropout=0.1)).train()(ids)
    # float32: torch's kernel is the faster one
    use_fast_attention(new_encoder(300, "1x32", 32))(ids)
    monkeypatch.setattr(fast, "EAGER_MAX_LENGTH", 8)
    # long rows
    use_fast_attention(new_encoder(300, "1x32", 32)).bfloat16()(ids)
    from transformers import BertConfig, BertLMHeadModel

    decoder = BertLMHeadModel(
        BertConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            is_decoder=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    # causal
    use_fast_attention(decoder, always=True)(ids)
    with pytest.raises(AssertionError, match="products were used"):
        use_fast_attention(new_encoder(300, "1x32", 32), always=True)(ids)


def test_nothing_of_it_is_saved(tmp_path):
    from transformers import AutoModelForMaskedLM

    _, ours = twins()
    ours.save_pretrained(tmp_path)
    assert "products" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert np.allclose(plain(some()[0]).logits, ours(some()[0]).logits, atol=1e-5)


kept_and_given_back = """
import resource, torch
from llmeco_nb.models.speedups import retain_freed_memory
def faults(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
x = torch.ones(33 * 2**18)  # 33 MiB, more than any threshold
work = lambda: x + 1
outside = min(faults(work) for _ in range(3))
try:
    with retain_freed_memory():
        assert work().sum() == 2 * len(x)
        # an aligned block leaves crumbs behind it, which glibc sets aside, up to seven of a
        # size, before the freed place is whole again
        inside = min(faults(work) for _ in range(30))
        1 / 0
except ZeroDivisionError: pass
# what was kept has been given back, so even a place in the heap must be filled anew
after = faults(work)
# glibc gives back, keeps, gives back
if outside > 1000: assert inside < outside / 10 and after > outside / 2, (outside, inside, after)
print("told")
"""


def test_kept_memory_changes_no_number_and_ends_with_its_block():
    # in a process of its own: what others left in the heap would be taken first
    run = subprocess.run(
        [sys.executable, "-c", kept_and_given_back], capture_output=True, text=True
    )
    assert run.stdout == "told\n", run.stderr


def test_without_glibc_it_does_nothing(monkeypatch):
    class Library:
        pass

    monkeypatch.setattr(fast.ctypes, "CDLL", lambda name: Library())
    with fast.retain_freed_memory():
        assert (torch.ones(3) + 1).sum() == 6
