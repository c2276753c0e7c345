"""The encoder: a stock BERT by one dial, counted to the last parameter and operation, and a loss
that equals transformers' own."""

import pytest

torch = pytest.importorskip("torch")
from llmeco_nb.core import UsageError
from llmeco_nb.models.encoder import (
    count_parameters,
    encoder_config,
    flops_per_token,
    mlm_logits,
    mlm_loss,
    new_encoder,
    sizes,
)

VOCABULARY = 300


def batch(rows=5, length=24, share=0.3, padded=True, seed=0):
    "ids, hidden ids, attention mask, asked positions as a boolean table."
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=g)
    keep = torch.ones(rows, length, dtype=torch.long)
    if padded:
        for i in range(rows):
            keep[i, length - 3 * i :] = 0
    asked = (torch.rand(rows, length, generator=g) < share) & keep.bool()
    return ids, ids.masked_fill(asked, 4), keep, asked


@pytest.mark.parametrize("padded", [True, False])
def test_loss_and_gradients_are_those_of_transformers(padded):
    model = new_encoder(VOCABULARY, "2x32", 32)
    ids, hidden, keep, asked = batch(padded=padded)
    theirs = model(hidden, attention_mask=keep, labels=ids.masked_fill(~asked, -100)).loss
    theirs.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    where = asked.flatten().nonzero()[:, 0]
    ours = mlm_loss(model, hidden, where, ids.flatten()[where], keep if padded else None) / len(
        where
    )
    ours.backward()
    assert abs(ours.item() - theirs.item()) < 1e-5
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], atol=1e-6, rtol=1e-4)


def test_what_padding_holds_changes_nothing():
    model = new_encoder(VOCABULARY, "2x32", 32).eval()
    _, hidden, keep, asked = batch()
    where = asked.flatten().nonzero()[:, 0]
    other = hidden.masked_fill(keep == 0, 77)
    with torch.no_grad():
        torch.testing.assert_close(
            mlm_logits(model, hidden, where, keep), mlm_logits(model, other, where, keep)
        )


def test_logits_are_fp32_and_only_where_asked():
    model = new_encoder(VOCABULARY, "2x32", 32).bfloat16()
    logits = mlm_logits(model, torch.full((2, 8), 7), torch.tensor([0, 9, 15]))
    assert logits.dtype == torch.float32 and logits.shape == (3, VOCABULARY)


@pytest.mark.parametrize("size", ["tiny", "1x32", "3x192"])
def test_parameters_are_counted(size):
    model = new_encoder(VOCABULARY, size, 40)
    assert count_parameters(model.config)["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_operations_are_what_torch_counts(training):
    from torch.utils.flop_counter import FlopCounterMode

    model = new_encoder(VOCABULARY, "2x64", 32)
    # the counter does not see the CPU's fused kernel
    model.set_attn_implementation("eager")
    where = torch.arange(0, 64, 4)
    with FlopCounterMode(display=False) as counter:
        loss = mlm_loss(model, torch.full((4, 16), 9), where, torch.full((16,), 9))
        if training:
            loss.backward()
    assert counter.get_total_flops() == 64 * flops_per_token(model.config, 16, 16 / 64, training)


def test_weights_depend_on_the_arguments_alone():
    torch.manual_seed(1)
    a = new_encoder(VOCABULARY, "1x32", seed=5)
    first = torch.rand(1)
    torch.manual_seed(1)
    torch.rand(3)
    b = new_encoder(VOCABULARY, "1x32", seed=5)
    assert all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    torch.manual_seed(1)
    assert torch.rand(1) == first  # and leave the generator alone
    assert not new_encoder(VOCABULARY, "1x32", seed=6).bert.embeddings.word_embeddings.weight.equal(
        a.bert.embeddings.word_embeddings.weight
    )


def test_sizes():
    from transformers import BertForMaskedLM

    for name in sizes:
        assert encoder_config(100, name).hidden_dropout_prob == 0
    assert (
        encoder_config(100, "mini").num_attention_heads == 4
        and encoder_config(100, "5x32").num_hidden_layers == 5
    )
    model = new_encoder(100, "1x32")
    assert type(model) is BertForMaskedLM and model.config._attn_implementation == "sdpa"
    for wrong in ("", "huge", "2x33", "0x64", "x64", "-1x64"):
        with pytest.raises(UsageError, match="layers x width"):
            encoder_config(100, wrong)
