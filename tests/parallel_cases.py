"""What the processes of test_parallel do; a module of its own, because some of them start anew and
import it."""

import importlib
import os
import signal
import time
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from llmeco_nb.core import Record, UsageError, create_record
from llmeco_nb.training.activation_checkpointing import enable_activation_checkpointing
from llmeco_nb.training.checkpoint import load_checkpoint, save_checkpoint
from llmeco_nb.training.loop import batch_indices, train_task
from llmeco_nb.training.loss_spikes import UnstableStep
from llmeco_nb.training.optim import Optimiser
from llmeco_nb.training.parallel import all_finished, current_world
from llmeco_nb.training.sharding import (
    LossModule,
    ddp_loss_step,
    rank_slice,
    reduce_gradients,
    shard,
    tensor_parallel,
)
from llmeco_nb.training.state import TrainPlan, TrainState
from llmeco_nb.training.task import TrainTask

BATCH = 6


def model():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertForMaskedLM(
        BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def import_sharding():
    for name in ("fsdp", "tensor", "tensor.parallel"):
        importlib.import_module(f"torch.distributed.{name}")


def example(i):
    g = torch.Generator().manual_seed(i)
    ids = torch.randint(0, 101, (12,), generator=g)
    return ids, torch.where(
        torch.arange(12) < 1 + 2 * (i % BATCH), ids, -100
    )  # later examples count more


def batch(which, device):
    return tuple(torch.stack(t).to(device) for t in zip(*map(example, which)))


def step(net, batch, backward):
    ids, labels = batch
    loss = torch.nn.functional.cross_entropy(
        net(input_ids=ids).logits.float().transpose(1, 2), labels, reduction="sum"
    )
    backward(loss)
    return loss.detach(), (labels != -100).sum().item()


def backward(net, which, device):
    return step(net, batch(which, device), lambda loss: loss.backward())[1]


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def apart(some, others):
    "Relative distance of two sets of tensors, in the norm of all."
    some, others = ([whole(t).double() for t in ts] for ts in (some, others))
    return (
        (
            sum((a - b).square().sum() for a, b in zip(some, others, strict=True))
            / sum(b.square().sum() for b in others)
        )
        .sqrt()
        .item()
    )


def distance(net, reference, scale=1.0):
    theirs = dict(reference.named_parameters())
    return apart(
        [whole(p.grad) / scale for p in net.parameters()],
        [theirs[n].grad for n, _ in net.named_parameters()],
    )


def one(device):
    net = model().to(device)
    tokens = backward(net, rank_slice(1, BATCH), device)
    for p in net.parameters():
        p.grad /= tokens
    return net, tokens


def compare(world, folder):
    "Every way to share a step, each beside one process that makes it alone."
    reference, tokens = one(world.device)
    mine = list(rank_slice(1, BATCH, world.size, world.rank))
    found = dict(mine=mine, tokens=tokens)
    net = model().to(world.device)
    o = Optimiser(net, precision="fp32")
    found["counted"] = backward(net, mine, world.device)
    total = reduce_gradients(o, found["counted"])
    found.update(total=total, data=distance(net, reference, total))
    net = model().to(world.device)  # torch's DDP, in two micro-batches
    stepping, o = ddp_loss_step(net, step), Optimiser(net, precision="fp32")
    for part in (mine[:1], mine[1:]):
        stepping(net, batch(part, world.device), lambda loss: loss.backward())
    found.update(ddp=distance(net, reference, tokens))
    net = model().to(world.device)
    shard(LossModule(net, step), world.device.type)
    found["sharded"] = all(type(p).__name__ == "DTensor" for p in net.parameters())
    found["local"] = sum(p.to_local().numel() for p in net.parameters()) / sum(
        p.numel() for p in net.parameters()
    )
    net = shard(model().to(world.device), world.device.type)
    o = Optimiser(net, precision="fp32")
    total = reduce_gradients(o, backward(net, mine, world.device))
    found["fully"] = distance(net, reference, total)
    found["norm"] = o.step(weight=total)
    found["true_norm"] = torch.stack([p.grad.norm() for p in reference.parameters()]).norm().item()
    net = shard(
        enable_activation_checkpointing(model().to(world.device).train()), world.device.type
    )
    found["forgetful"] = distance(
        net,
        reference,
        reduce_gradients(Optimiser(net, precision="fp32"), backward(net, mine, world.device)),
    )
    found["bf16"] = halved(world, mine, folder)
    if world.size == 2:
        net = tensor_parallel(model().to(world.device), init_device_mesh(world.device.type, (2,)))
        weight = net.bert.encoder.layer[0].intermediate.dense.weight
        found["split"] = weight.to_local().numel() / weight.numel()
        found["tensor"] = distance(
            net, reference, backward(net, rank_slice(1, BATCH), world.device)
        )
    return found


def halved(world, mine, folder):
    """bf16 weights with fp32 masters, sharded, AdamW and Muon: gradient, two steps, and a
    checkpoint that one process can go on from, and back."""
    nets = model().to(world.device), shard(model().to(world.device), world.device.type)
    sixteen = dict(muon=1e-2, precision="bf16", muon_options=dict(dtype=torch.bfloat16))
    (net, o), (cut, p), found = *((n, Optimiser(n, 1e-2, **sixteen)) for n in nets), {}
    for i in range(2):
        weight, total = (
            backward(net, rank_slice(1, BATCH), world.device),
            reduce_gradients(p, backward(cut, mine, world.device)),
        )
        o.collect()
        if i == 0:
            exact, _ = one(world.device)
            grads = [[m.grad / total for m in x.masters.values()] for x in (o, p)]
            truth = [q.grad for q in exact.parameters()]
            found.update(
                one=apart(grads[0], truth),
                many=apart(grads[1], truth),
                between=apart(*reversed(grads)),
                kinds=sorted(
                    {str(q.dtype) for q in cut.parameters()}
                    | {str(m.dtype) for m in p.masters.values()}
                ),
            )
        o.step(weight=weight)
        p.step(weight=total)
    start = [m.detach() for m in Optimiser(model().to(world.device)).masters.values()]
    moved = [[whole(m) - s for m, s in zip(x.masters.values(), start)] for x in (p, o)]
    found.update(
        moved=apart(*moved),
        rounded=all(
            torch.equal(whole(w), whole(m).bfloat16())
            for w, m in zip(p.weights.values(), p.masters.values())
        ),
    )
    save_checkpoint(folder, p, TrainState(step=2), dict(made="here"), writes=world.rank == 0)
    torch.distributed.barrier()
    alone, again = (
        Optimiser(model().to(world.device), 1e-2, **sixteen),
        Optimiser(shard(model().to(world.device), world.device.type), 1e-2, **sixteen),
    )
    for x in (alone, again):
        load_checkpoint(folder, x, dict(made="here"))
    states = [{k: whole(v) for k, v in sorted(x.state_dict().items())} for x in (p, alone, again)]
    found["stored"] = all(
        s.keys() == states[0].keys()
        and all(torch.equal(v, states[0][k].to(v)) for k, v in s.items())
        for s in states[1:]
    )
    for x, which in ((p, mine), (again, mine)):
        x.step(weight=reduce_gradients(x, backward(x.model, which, world.device)))
    found["went_on"] = all(
        torch.equal(whole(a), whole(b)) for a, b in zip(p.masters.values(), again.masters.values())
    )
    return found


class Died(BaseException):
    "A death in this process: nothing in the loop may catch it."


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.one, self.lm_head = (
            torch.nn.Embedding(30, 16),
            torch.nn.Linear(16, 16),
            torch.nn.Linear(16, 30),
        )
        self.drop = torch.nn.Dropout(0.0)

    def forward(self, ids):
        return self.lm_head(self.drop(torch.nn.functional.gelu(self.one(self.words(ids)))))


def tiny_step(net, batch, backward):
    loss = torch.nn.functional.cross_entropy(
        net(batch).flatten(0, 1), ((batch * 7 + 3) % 30).flatten(), ignore_index=3, reduction="sum"
    )  # word 0 does not count
    backward(loss)
    return loss.detach(), int((batch != 0).sum())


def training(
    record: Record,
    seen: str = "",
    fatal: int = -1,
    dropout: float = 0.0,
    steps: int = 10,
    guard: int = 0,
    ddp: bool = False,
    alike: bool = False,
) -> Path:
    """A stage: ten steps of five rows in two micro-batches. Writes which rows it drew to `seen`;
    dies at micro-batch `fatal` of this attempt. `alike`: all processes draw the same rows."""
    world, count, rows = (
        current_world(),
        [0],
        torch.randint(0, 30, (23, 8), generator=torch.Generator().manual_seed(0)),
    )
    torch.manual_seed(1)
    net = Tiny()
    net.drop.p = dropout
    optimiser = Optimiser(net, 3e-3, precision="fp32")

    def make_batch(batch_size, index, *share):
        which = batch_indices(index, batch_size, len(rows), 3, *(() if alike else share))
        if seen:
            with open(f"{seen}.{world.rank}", "a") as f:
                f.write(f"{index} {' '.join(map(str, which))}\n")
        poison = guard and index == 8 and world.rank == world.size - 1  # in one process only
        return (
            torch.zeros(len(which), 8, dtype=torch.int64)
            if poison
            else rows[torch.from_numpy(which)]
        )

    def stepping(net, batch, backward):
        if count[0] == fatal:
            raise Died
        count[0] += 1
        loss, weight = tiny_step(net, batch, backward)
        return (loss * float("nan") if guard and not batch.any() else loss), weight

    if ddp:
        stepping = ddp_loss_step(net, stepping)

    def judge(net):
        return dict(validation_loss=float(tiny_step(net, rows[:5], lambda loss: None)[0]) / 40)

    plan = TrainPlan(
        steps=steps,
        batch_size=5,
        grad_accum_steps=2,
        warmup=2,
        evaluate_every=3,
        checkpoint_every=2,
        max_rollbacks=guard,
    )
    task = TrainTask(
        model=net,
        optimizer=optimiser,
        loss_step=stepping,
        make_batch=make_batch,
        evaluate=judge,
        identity=dict(seed=1),
        name="toy" if alike else "train",
    )
    train_task(record, task, plan)
    if world.rank == 0:
        torch.save(
            {n: m.detach() for n, m in optimiser.masters.items()}, record.path / "masters.pt"
        )
    return record.path / "masters.pt"


def stumbling(record: Record) -> Path:
    "A stage whose second process fails when its training is over."
    training(record)
    if current_world().rank == 1:
        raise RuntimeError("the second process stumbles")
    if not all_finished():
        return record.artifact("result")
    record.artifact("result").write_text("trained")
    record.save_metrics(steps=10)
    return record.artifact("result")


def attempt(world, out, aside, **how):
    "One process's part of `training` in the folder `out`; says whether it died."
    try:
        training(
            create_record(out, "toy")
            if world.rank == 0
            else create_record(f"{aside}{world.rank}", "toy"),
            **how,
        )
    except Died:
        return True
    return False


def refuses(world):
    raise UsageError(f"{world.rank + 1} of {world.size}, and this is said in plain words.")


def diverges(world):
    raise UnstableStep("The loss is nan at step 3.")


def dies(world, folder):
    with open(f"{folder}/{world.rank}", "w") as f:
        f.write(str(os.getpid()))
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(120)


def waits(world, folder):
    with open(f"{folder}/{world.rank}", "w") as f:
        f.write(str(os.getpid()))
    time.sleep(120)
