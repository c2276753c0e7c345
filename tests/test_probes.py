"""Probes: on a problem whose answer is known, the right learning rate is left, the wrong ones lose,
and nothing has moved."""

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")
from llmeco_nb.core import DataError, UsageError
from llmeco_nb.training.lr_finder import (
    fastest_batch_size,
    lr_range_test,
    smallest_near_best,
    successive_halving,
)
from llmeco_nb.training.optim import Optimiser
from llmeco_nb.training.task import TrainTask


def make(rows, index, *share):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(index))


def step(model, x, backward):
    """Least squares towards weights of 1: AdamW moves each weight by about the rate a step, so a
    distance of 1 in 8 to 32 steps wants a rate near 0.1."""
    loss = (model[1](x) - x.sum(1, keepdim=True)).pow(2).sum()
    backward(loss)
    return loss.detach(), torch.tensor(len(x))


@pytest.fixture
def task():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1, bias=False))
    torch.nn.init.zeros_(model[1].weight)
    model[0].requires_grad_(False)
    return TrainTask(
        model=model,
        optimizer=Optimiser(model, 1e-3, decay=0.0, precision="fp32"),
        loss_step=step,
        make_batch=make,
        count_tokens=len,
    )


def test_the_known_order(task):
    model, optimiser = task.model, task.optimizer
    before, noise = (
        {k: v.clone() for k, v in [*model.state_dict().items(), *optimiser.state_dict().items()]},
        torch.get_rng_state(),
    )
    found = successive_halving(task, 16, [100.0, 1e-4, 0.1, 1e-2])
    first = found.rounds[0]
    assert (
        found.lr == 0.1
        and first[0.1] < first[1e-2] < first[1e-4] < first[100.0] == math.inf
        and len(found.rounds) == 2
    )
    assert found == successive_halving(task, 16, [100.0, 1e-4, 0.1, 1e-2])
    curve = lr_range_test(task, 16, 1e-5, 1e3)
    assert len(curve) < 40 and min(curve, key=lambda p: p[1])[0] < curve[-1][0]
    fastest_batch_size(task, [2, 4])
    after = dict([*model.state_dict().items(), *optimiser.state_dict().items()])
    assert (
        before.keys() == after.keys()
        and all(torch.equal(v, after[k]) for k, v in before.items())
        and torch.equal(noise, torch.get_rng_state())
    )


def test_says_when_the_best_is_at_the_edge(task):
    assert "largest that was tried" in successive_halving(task, 16, [1e-5, 1e-4, 1e-2]).why


def test_all_diverge_or_too_few(task):
    for rates, said in (
        ([1e3, 1e4, 1e5], "Every learning rate diverged"),
        ([0.1, 0.2], "three to five"),
    ):
        with pytest.raises(UsageError, match=said):
            successive_halving(task, 16, rates)


def test_batches_without_anything_that_counts(task):
    with pytest.raises(DataError, match="masked out"):
        nothing = lambda m, x, backward: (step(m, x, backward)[0], 0)
        successive_halving(dataclasses.replace(task, loss_step=nothing), 16, [1e-3, 1e-2, 1e-1])


def test_smallest_within_five_per_cent():
    assert (
        smallest_near_best({1: 10, 2: 95, 4: 100}) == 2
        and smallest_near_best({1: 10, 2: 94, 4: 100}) == 4
    )
