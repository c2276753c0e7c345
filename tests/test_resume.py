"""Resume is the same run: 2N steps, against N, a death, and the rest, bit by bit, for every
combination the loop offers."""

import dataclasses
import json
import os
import signal

import pytest

torch = pytest.importorskip("torch")
from llmeco_nb.core import DataError, UsageError, create_record
from llmeco_nb.training.loop import batch_indices, train_task
from llmeco_nb.training.optim import Optimiser
from llmeco_nb.training.state import TrainPlan
from llmeco_nb.training.task import TrainTask

WORDS, ROWS, STEPS, ACCUMULATION, BATCH = (
    30,
    29,
    12,
    3,
    4,
)  # an epoch ends inside micro-batch 7, step 2, and again and again


class Died(BaseException):
    "A death in this process: nothing in the loop may catch it."


class Tiny(torch.nn.Module):
    """Enough of a language model to have everything: a table, hidden matrices for Muon, a norm,
    dropout, a head, a buffer."""

    def __init__(self):
        super().__init__()
        self.words, self.one, self.two = (
            torch.nn.Embedding(WORDS, 16),
            torch.nn.Linear(16, 24),
            torch.nn.Linear(24, 16),
        )
        self.norm, self.drop, self.lm_head = (
            torch.nn.LayerNorm(16),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(16, WORDS),
        )
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids):
        if self.training:
            self.seen += 1
        x = self.words(ids)
        return self.lm_head(
            self.norm(x + self.two(self.drop(torch.nn.functional.gelu(self.one(x)))))
        )


def corpus():
    g = torch.Generator().manual_seed(0)
    return torch.randint(1, WORDS, (ROWS, 8), generator=g)


def batches(poison=None):
    rows = corpus()

    def of(batch_size, index, *share):
        ids = rows[torch.from_numpy(batch_indices(index, batch_size, ROWS, 3, *share))].clone()
        if index == poison:
            ids[:] = 0
        return ids

    return of


def step(model, ids, backward):
    loss = torch.nn.functional.cross_entropy(
        model(ids).flatten(0, 1).float(), ((ids * 7 + 3) % WORDS).flatten(), reduction="sum"
    )
    if (ids == 0).all():
        loss = loss * float("nan")
    backward(loss)
    return loss.detach(), torch.tensor(ids.numel())


def dying(fatal, die):
    "`step` that dies at micro-batch `fatal` of this attempt."
    count = 0

    def stepping(model, ids, backward):
        nonlocal count
        if count == fatal:
            die()
        count += 1
        return step(model, ids, backward)

    return stepping


def judge(model):
    loss, weight = step(model, corpus()[:8], lambda loss: None)
    return {"validation_loss": float(loss / weight)}


OPTIMIZER = ("precision", "muon", "ema", "muon_options")  # what `Optimiser` is told


def run(out, step=step, poison=None, workers=0, **given):
    "A run with these entries of the plan and of the optimizer; what must not depend on its deaths."
    torch.manual_seed(1)
    record = create_record(out, "toy")
    chosen = {k: given.pop(k) for k in OPTIMIZER if k in given}
    optimiser = Optimiser(Tiny(), 3e-3, **{"precision": "fp32", **chosen})
    usual = dict(
        steps=STEPS,
        batch_size=BATCH,
        grad_accum_steps=ACCUMULATION,
        warmup=2,
        schedule="wsd",
        decay=4,
        evaluate_every=5,
        checkpoint_every=2,
    )
    task = TrainTask(
        model=optimiser.model,
        optimizer=optimiser,
        loss_step=step,
        make_batch=batches(poison),
        evaluate=judge,
        identity=dict(seed=1),
    )
    plan = TrainPlan(**usual | given)
    result = dataclasses.asdict(train_task(record, task, plan, workers=workers))
    rows = [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in record.rows()
    ]
    tensors = {
        **{f"state/{k}": v.clone() for k, v in optimiser.state_dict().items()},
        **{f"model/{k}": v.clone() for k, v in optimiser.model.state_dict().items()},
    }
    return json.dumps([rows, {k: v for k, v in result.items() if k != "seconds"}]), tensors


def same(one, other):
    assert one[0] == other[0]
    assert (
        one[1].keys() == other[1].keys()
        and [k for k, v in one[1].items() if not torch.equal(v, other[1][k])] == []
    )


def die_here():
    raise Died


everything = dict(muon=0.02, ema=0.9, max_rollbacks=3, poison=8 * ACCUMULATION + 1)
settings = {
    "AdamW fp32": {},
    "AdamW bf16": dict(precision="bf16"),
    "Muon fp32": dict(muon=0.02),
    "Muon bf16": dict(muon=0.02, precision="bf16"),
    "EMA": dict(ema=0.9, muon=0.02),
    "guard": dict(max_rollbacks=3, poison=8 * ACCUMULATION + 1),
    "all fp32": everything,
    "all bf16": dict(everything, precision="bf16"),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "The untouched run of each setting, made once."
    made = {}

    def of(name):
        if name not in made:
            made[name] = run(tmp_path_factory.mktemp("straight"), **settings[name])
        return made[name]

    return of


@pytest.mark.parametrize(
    "deaths",
    [(18,), (19,), (7, 1, 13)],
    ids=["between steps", "inside an accumulation", "three times, over epoch edges"],
)
@pytest.mark.parametrize("name", settings)
def test_died_and_continued(tmp_path, straight, name, deaths):
    for fatal in deaths:
        with pytest.raises(Died):
            run(tmp_path, dying(fatal, die_here), **settings[name])
    same(straight(name), run(tmp_path, **settings[name]))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_other_workers_same_run(tmp_path, straight, workers):
    with pytest.raises(Died):
        run(tmp_path, dying(19, die_here), workers=2, **everything)
    same(straight("all fp32"), run(tmp_path, workers=workers, **everything))


@pytest.mark.parametrize("name,fatal", [("all fp32", 20), ("all bf16", 28)])
def test_killed_and_continued(tmp_path, straight, name, fatal):
    "The same with SIGKILL, which leaves no time for anything; 28 falls after the guard went back."
    pid = os.fork()
    if pid == 0:
        try:
            run(
                tmp_path,
                dying(fatal, lambda: os.kill(os.getpid(), signal.SIGKILL)),
                **settings[name],
            )
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    same(straight(name), run(tmp_path, **settings[name]))


def test_the_rows_above_are_not_all_the_same(straight):
    "Settings that changed nothing would make the table above worth less than it looks."
    assert len({straight(name)[0] for name in settings}) == len(settings)


def test_the_guard_leaves_out_the_poison_and_says_so(straight):
    rows = json.loads(straight("guard")[0])[0]
    back = [r for r in rows if "rewind" in r]
    assert [(r["rewind"], r["leaped_at"], r["step"], r["rate"]) for r in back] == [
        (1, 9, 8, 1.0)
    ] and "nan" in back[0]["why"]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, STEPS + 1))


def test_the_guard_gives_up(tmp_path):
    def always(model, ids, backward):
        loss, weight = step(model, ids, backward)
        return (loss * float("nan") if model.seen > 15 else loss), weight

    with pytest.raises(DataError, match="gone back 2 times already"):
        run(tmp_path, always, max_rollbacks=2)
    rates = [r["rate"] for r in create_record(tmp_path, "toy").rows() if "rewind" in r]
    assert rates[-1] == 0.5  # the second time, the rate was halved


@pytest.mark.parametrize(
    "changed,named",
    [
        (dict(muon=0.01), "muon is 0.02 there and 0.01 here"),
        (dict(muon=0.0), "muon is 0.02 there and None here"),
        (dict(ema=0.5), "ema is 0.9 there and 0.5 here"),
        (dict(muon_options=dict(momentum=0.9)), "muon.momentum is 0.95 there and 0.9 here"),
        (dict(muon_options=dict(dtype=torch.float64)), "muon.dtype is 'torch.*' there and"),
    ],
)
def test_another_optimiser_is_refused_by_name(tmp_path, changed, named):
    "The shapes would fit, and the run would not be the one that was begun."
    with pytest.raises(Died):
        run(tmp_path, dying(19, die_here), muon=0.02, ema=0.9)
    with pytest.raises(DataError, match=named):
        run(tmp_path, **(dict(muon=0.02, ema=0.9) | changed))
    run(
        tmp_path, muon=0.02, ema=0.9, muon_options=dict(momentum=0.95)
    )  # a default, spelt out, is no other run


def test_unknown_option_of_muon_is_named():
    with pytest.raises(UsageError, match="'momentun'.*momentum, nesterov, iterations, scale"):
        Optimiser(Tiny(), muon=0.02, muon_options=dict(momentun=0.9))
