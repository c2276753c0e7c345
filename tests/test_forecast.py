"""What is foretold must come true: bytes against a second way of counting, losses against a known
law, refusals against what then fits."""

import re
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from llmeco_nb.core import UsageError
from llmeco_nb.training.compilation import compile_choice
from llmeco_nb.training.forecast import (
    ForecastConfig,
    cgroup_memory,
    check_fits_memory,
    expected_loss,
    fit_memory_model,
    fit_power_law,
    forecast,
    memory_model_of,
    peak_step_bytes,
    predict_peak_bytes,
    saved_bytes,
)
from llmeco_nb.training.optim import Optimiser
from llmeco_nb.training.state import TrainPlan
from llmeco_nb.training.task import TrainTask


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.drop, self.two = (
            torch.nn.Linear(20, 40),
            torch.nn.BatchNorm1d(40),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(40, 3),
        )

    def forward(self, x):
        return self.two(self.drop(torch.relu(self.norm(self.one(x)))))


def make(rows, index=0):
    return torch.randn(rows, 20, generator=torch.Generator().manual_seed(index))


def wide(rows, index=0):
    return torch.randn(
        rows * 40, 20, generator=torch.Generator().manual_seed(index)
    )  # a row is 40 vectors: activations weigh more than weights


def step(model, x, backward):
    loss = model(x).float().pow(2).sum()
    backward(loss)
    return loss.detach(), len(x)


def task_of(model, make, optimiser):
    return TrainTask(
        model=model,
        optimizer=optimiser,
        loss_step=step,
        make_batch=lambda rows, index, *share: make(rows, index),
    )


@pytest.fixture(
    params=[dict(precision="fp32"), dict(precision="fp32", muon=0.02, ema=0.9)],
    ids=["AdamW", "Muon and EMA"],
)
def pair(request):
    torch.manual_seed(0)
    model = Net()
    return model, Optimiser(model, 1e-2, **request.param)


def everything(model, optimiser):
    return {
        **{f"o/{k}": v.clone() for k, v in optimiser.state_dict().items()},
        **{f"m/{k}": v.clone() for k, v in model.state_dict().items()},
        "noise": torch.get_rng_state(),
    }


def test_leaves_no_trace(pair):
    model, optimiser = pair
    before = everything(model, optimiser)
    plan = TrainPlan(steps=10, batch_size=8, grad_accum_steps=2)
    forecast(task_of(model, make, optimiser), plan, ForecastConfig(memory_limit=1e9))
    saved_bytes(model, step, make(8))
    compile_choice(
        model,
        step,
        lambda i: make(8, i),
        optimiser,
        10,
        lambda m: torch.compile(m, backend="eager"),
        tries=1,
    )
    after = everything(model, optimiser)
    assert (
        before.keys() == after.keys()
        and [k for k in before if not torch.equal(before[k], after[k])] == []
    )


@pytest.mark.parametrize("rows", [3, 16, 64, 256, 1024])
def test_two_small_batches_tell_the_large_ones(pair, rows):
    "From where the update is the peak to where the backward pass is."
    model, optimiser = pair
    assert predict_peak_bytes(
        fit_memory_model(model, step, make, optimiser), rows
    ) == pytest.approx(peak_step_bytes(model, step, make(rows), optimiser), rel=0.02)


def test_clipping_one_of_the_small_batches_alone_spoils_nothing(pair):
    """The larger of the two has the larger gradient; a limit between them clips one step and not
    the other."""
    model, optimiser = pair

    def pushed(model, x, backward):
        loss, n = step(model, x, lambda loss: backward(loss * (1e-6 if len(x) < 100 else 100)))
        return loss, n

    law = fit_memory_model(model, pushed, wide, optimiser)
    assert (
        predict_peak_bytes(law, 64)
        == pytest.approx(
            predict_peak_bytes(fit_memory_model(model, step, wide, optimiser), 64), rel=1e-3
        )
        and optimiser.clip == 1.0
    )


def test_memory_is_measured_with_the_largest_rows(pair):
    """The batches of a task whose rows differ in length say little of the largest one: those of 2
    and of 4 rows need not even do the same operations."""
    model, optimiser = pair
    task = replace(task_of(model, make, optimiser), memory_batch=lambda n, i, *share: wide(n, i))
    law = memory_model_of(task)
    assert predict_peak_bytes(law, 64) == pytest.approx(
        peak_step_bytes(model, step, wide(64), optimiser), rel=0.02
    )
    assert predict_peak_bytes(law, 64) > 2 * peak_step_bytes(model, step, make(64), optimiser)


@pytest.mark.parametrize("batch,accumulation", [(64, 1), (48, 2), (37, 1)])
def test_what_is_advised_would_fit(pair, batch, accumulation):
    model, optimiser = pair
    law = fit_memory_model(model, step, wide, optimiser)
    limit = (predict_peak_bytes(law, 20) + predict_peak_bytes(law, 21)) / 2
    with pytest.raises(UsageError) as e:
        plan = TrainPlan(steps=10, batch_size=batch, grad_accum_steps=accumulation)
        forecast(task_of(model, wide, optimiser), plan, ForecastConfig(memory_limit=limit))
    largest, rows, instead, times = map(
        int,
        re.search(
            (
                r"fits is (\d+)\. For the same (\d+) rows a step: batch_size (\d+) with "
                r"grad_accum_steps (\d+)"
            ),
            str(e.value),
        ).groups(),
    )
    assert largest == 20 and rows == batch * accumulation == instead * times and instead <= largest
    assert (
        peak_step_bytes(model, step, wide(largest), optimiser)
        <= limit
        < peak_step_bytes(model, step, wide(largest + 1), optimiser)
    )  # measured, not foretold
    check_fits_memory(instead, times, law, limit)
    check_fits_memory(largest, 1, law, limit)
    with pytest.raises(UsageError):
        check_fits_memory(largest + 1, 1, law, limit)
    with pytest.raises(UsageError, match="Not even one row"):
        check_fits_memory(1, 1, law, predict_peak_bytes(law, 1) - 1)


def test_loss_is_foretold_or_unknown():
    truth = lambda c: 2.0 + 30 / c**0.3
    points = [(10.0**k, truth(10.0**k)) for k in range(3, 8)]
    law = fit_power_law(points)
    assert (law["E"], law["A"], law["a"]) == pytest.approx((2.0, 30, 0.3), rel=0.01)
    assert (
        expected_loss(points, 1e9)["loss"] == pytest.approx(truth(1e9), rel=1e-3)
        and "100.0 times beyond" in expected_loss(points, 1e9)["why"]
    )
    few = expected_loss(points[:3] * 2, 1e9)
    assert few["loss"] is None and "3 earlier runs" in few["why"]


def test_limit_of_a_container(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    assert cgroup_memory(tmp_path, "/a/b") is None
    for folder, most in (("a", 5000), ("a/b", 3000)):
        (tmp_path / folder / "memory.max").write_text(f"{most}\n")
        (tmp_path / folder / "memory.current").write_text("2500\n")
    assert cgroup_memory(tmp_path, "/a/b") == (500, str(tmp_path / "a/b/memory.max"))
    (tmp_path / "a/b/memory.stat").write_text("inactive_file 900\n")
    assert cgroup_memory(tmp_path, "/a/b")[0] == 1400


def test_failing_compiler_is_a_reason(pair):
    model, optimiser = pair
    choice = compile_choice(
        model,
        step,
        lambda i: make(8, i),
        optimiser,
        10,
        lambda m: torch.compile(m, backend="there is none"),
        tries=1,
    )
    assert choice["step"] is step and not choice["compiled"] and "there is none" in choice["why"]
