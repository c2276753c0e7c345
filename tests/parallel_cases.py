"""What the processes of test_parallel do; a module of its own, because they start anew and import it."""
import os
import signal
import time

import torch
from torch.distributed.device_mesh import init_device_mesh

from llmeco_nb.optim import Optimiser
from llmeco_nb.parallel import reduce_gradients, shard, shares, split_tensors

BATCH = 6

def model():
    from transformers import BertConfig, BertForMaskedLM
    torch.manual_seed(0)
    sizes = dict(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32)
    return BertForMaskedLM(BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))

def example(i):
    g = torch.Generator().manual_seed(i)
    ids = torch.randint(0, 101, (12,), generator=g)
    return ids, torch.where(torch.arange(12) < 1 + 2 * (i % BATCH), ids, -100)     # later examples count more

def backward(net, which, device):
    ids, labels = (torch.stack(t).to(device) for t in zip(*map(example, which)))
    torch.nn.functional.cross_entropy(net(input_ids=ids).logits.transpose(1, 2), labels, reduction="sum").backward()
    return (labels != -100).sum().item()

def whole(t): return t.full_tensor() if hasattr(t, "full_tensor") else t

def distance(net, reference, scale=1.0):
    theirs = dict(reference.named_parameters())
    pairs = [(whole(p.grad) / scale, theirs[n].grad) for n, p in net.named_parameters()]
    return ((sum((a - b).square().sum() for a, b in pairs)) / sum(b.square().sum() for _, b in pairs)).sqrt().item()

def one(device):
    net = model().to(device)
    tokens = backward(net, shares(1, BATCH), device)
    for p in net.parameters(): p.grad /= tokens
    return net, tokens

def compare(world):
    reference, tokens = one(world.device)
    mine = list(shares(1, BATCH, world.size, world.rank))
    found = dict(mine=mine, tokens=tokens)
    net = model().to(world.device)
    o = Optimiser(net, precision="fp32")
    found["counted"] = backward(net, mine, world.device)
    total = reduce_gradients(o, found["counted"])
    found.update(total=total, data=distance(net, reference, total))
    net = shard(model().to(world.device), world.device.type)
    found["sharded"] = all(type(p).__name__ == "DTensor" for p in net.parameters())
    found["local"] = sum(p.to_local().numel() for p in net.parameters()) / sum(p.numel() for p in net.parameters())
    o = Optimiser(net, precision="fp32")
    total = reduce_gradients(o, backward(net, mine, world.device))
    found["fully"] = distance(net, reference, total)
    found["norm"] = o.step(weight=total)
    found["true_norm"] = torch.stack([p.grad.norm() for p in reference.parameters()]).norm().item()
    if world.size == 2:
        net = split_tensors(model().to(world.device), init_device_mesh(world.device.type, (2,)))
        weight = net.bert.encoder.layer[0].intermediate.dense.weight
        found["split"] = weight.to_local().numel() / weight.numel()
        found["tensor"] = distance(net, reference, backward(net, shares(1, BATCH), world.device))
    return found

def dies(world, folder):
    with open(f"{folder}/{world.rank}", "w") as f: f.write(str(os.getpid()))
    if world.rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(120)
