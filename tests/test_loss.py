"""The loss is right: gradients of whole models, relative in the global norm, in float32, for an
encoder and a stock causal model."""

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional
from llmeco_nb.core import create_record
from llmeco_nb.models.encoder import new_encoder
from llmeco_nb.training.loop import train_task
from llmeco_nb.training.optim import Optimiser
from llmeco_nb.training.state import TrainPlan
from llmeco_nb.training.task import TrainTask

WORDS, IGNORED = 60, -100


def encoder():
    return new_encoder(WORDS, "2x32", 64, seed=1).float()


def causal():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=WORDS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=48,
            max_position_embeddings=64,
            attn_implementation="sdpa",
        )
    )


models = pytest.mark.parametrize("make", [encoder, causal])


def texts(n=8, seed=0):
    "Texts of different lengths, and labels of which different numbers count."
    g = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(5, WORDS, (int(k),), generator=g)
        for k in torch.randint(4, 15, (n,), generator=g)
    ]
    return [
        (
            i,
            torch.where(torch.rand(len(i), generator=g) < 0.5, (i * 7) % WORDS, IGNORED).index_fill(
                0, torch.tensor([1]), 9
            ),
        )
        for i in ids
    ]


def padded(pairs, junk=0):
    "(ids, mask, labels), each row a text filled up with `junk`."
    width = max(len(i) for i, _ in pairs)
    ids = torch.stack([F.pad(i, (0, width - len(i)), value=junk) for i, _ in pairs])
    mask = torch.stack(
        [F.pad(torch.ones(len(i), dtype=torch.long), (0, width - len(i))) for i, _ in pairs]
    )
    return ids, mask, torch.stack([F.pad(t, (0, width - len(t)), value=IGNORED) for _, t in pairs])


def step(model, batch, backward):
    ids, mask, labels = batch
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    backward(loss)
    return loss.detach(), (labels != IGNORED).sum()


def packed_step(model, pairs, backward):
    """All texts in one row, each seeing itself alone (and, in a causal model, what is before it),
    its positions counted from 0."""
    ids, labels = torch.cat([i for i, _ in pairs])[None], torch.cat([t for _, t in pairs])
    document = torch.cat([torch.full((len(i),), n) for n, (i, _) in enumerate(pairs)])
    positions = torch.cat([torch.arange(len(i)) for i, _ in pairs])[None]
    allowed = document[:, None] == document
    if not hasattr(model, "bert"):
        allowed = allowed.tril()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[
        None, None
    ]
    loss = F.cross_entropy(
        model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0],
        labels,
        ignore_index=IGNORED,
        reduction="sum",
    )
    backward(loss)
    return loss.detach(), (labels != IGNORED).sum()


def gradient(model, step, parts):
    "Loss per counted token, and the whole gradient as one vector."
    model.zero_grad()
    done = [step(model, p, lambda loss: loss.backward()) for p in parts]
    weight = sum(w for _, w in done)
    return sum(s for s, _ in done) / weight, torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    ) / weight


def close(one, other, most=1e-6):
    distance = ((one[1] - other[1]).norm() / other[1].norm()).item()
    assert abs(one[0] - other[0]) / other[0] < most and distance < most, (
        f"gradients differ by {distance:.1e} of their norm"
    )


@models
@pytest.mark.parametrize("size", [1, 3])
def test_accumulation_is_one_big_batch(make, size):
    model, pairs = make(), texts()
    close(
        gradient(model, step, [padded(pairs[i : i + size]) for i in range(0, 8, size)]),
        gradient(model, step, [padded(pairs)]),
    )


@models
def test_a_mean_of_means_would_be_seen(make):
    "The check above must have teeth: the usual mistake is far outside of it."

    def mean(model, batch, backward):
        loss, weight = step(model, batch, lambda loss: backward(loss / (batch[2] != IGNORED).sum()))
        return loss / weight, torch.tensor(1)

    model, pairs = make(), texts()
    whole, wrong = (
        gradient(model, step, [padded(pairs)]),
        gradient(model, mean, [padded(pairs[i : i + 1]) for i in range(8)]),
    )
    assert ((wrong[1] - whole[1]).norm() / whole[1].norm()) > 0.02


@models
def test_packed_is_padded(make):
    model, pairs = make(), texts()
    close(gradient(model, packed_step, [pairs]), gradient(model, step, [padded(pairs)]))


@models
def test_masked_tokens_count_nothing(make):
    "Whatever stands behind the padding, and however much of it there is."
    model, pairs = make(), texts()
    right = gradient(model, step, [padded(pairs)])
    close(gradient(model, step, [padded(pairs, junk=17)]), right)
    wider = [F.pad(t, (0, 7), value=v) for t, v in zip(padded(pairs), (3, 0, IGNORED))]
    close(gradient(model, step, [wider]), right)
    blank = [torch.full((2, 5), 7), torch.ones(2, 5, dtype=torch.long), torch.full((2, 5), IGNORED)]
    close(gradient(model, step, [padded(pairs), blank]), right)


@models
def test_the_loop_takes_the_step_of_the_big_batch(tmp_path, make):
    """One step of plain gradient arithmetic by torch's own AdamW on the mean loss, against the loop
    on pieces of it."""
    pairs, ours, theirs = texts(), make(), make()
    task = TrainTask(
        model=ours,
        optimizer=Optimiser(ours, 1e-3, decay=0.0, eps=1e-4, precision="fp32", clip=0.0),
        loss_step=step,
        make_batch=lambda n, i, *share: padded(pairs[n * (i % 4) : n * (i % 4) + n]),
    )
    plan = TrainPlan(steps=3, batch_size=2, grad_accum_steps=4)
    train_task(create_record(tmp_path, "toy"), task, plan)
    optimiser = torch.optim.AdamW(theirs.parameters(), 1e-3, weight_decay=0.0, eps=1e-4)
    for s in range(3):
        for g in optimiser.param_groups:
            g["lr"] = 1e-3 * (3 - s) / 3
        ids, mask, labels = padded(pairs)
        F.cross_entropy(
            theirs(input_ids=ids, attention_mask=mask).logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED,
        ).backward()
        optimiser.step()
        optimiser.zero_grad()
    vector = lambda m: torch.cat([p.detach().flatten() for p in m.parameters()])
    assert ((vector(ours) - vector(theirs)).norm() / vector(theirs).norm()) < 1e-6
