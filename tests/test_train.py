"""The training loop: sums that are right, runs that survive any kill bit by bit, and errors that
say where to look."""

import dataclasses
import json
import os
import random
import signal
import time
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")
from llmeco_nb.core import DataError, Record, UsageError, create_record, open_record
from llmeco_nb.training.checkpoint import (
    identity_of,
    load_checkpoint,
    save_checkpoint,
)
from llmeco_nb.training.loop import (
    batch_indices,
    length_bucketed_batches,
    measure_step_time,
    resolve_train_plan,
    train_task,
)
from llmeco_nb.training.optim import Optimiser, schedule_of
from llmeco_nb.training.state import TrainPlan, TrainState
from llmeco_nb.training.task import Callback, TrainTask

IGNORED, PAD, WORDS = -100, 0, 40


def bert(seed=0, dropout=0.0):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def sentences(rows, seed):
    "Ids, mask, labels: rows of different lengths, with different numbers of positions that count."
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, WORDS, (rows, 12), generator=g)
    labels = torch.where(torch.rand(ids.shape, generator=g) < 0.4, (ids * 7 + 3) % WORDS, IGNORED)
    for i, n in enumerate(torch.randint(3, 13, (rows,), generator=g).tolist()):
        ids[i, n:], labels[i, n:] = PAD, IGNORED
    labels[:, 0] = ids[:, 0]
    return ids, (ids != PAD).long(), labels


def step(model, batch, backward):
    ids, mask, labels = batch
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    backward(loss)
    return loss.detach(), (labels != IGNORED).sum()


def make_batch(rows, index, *share):
    return sentences(rows, index)


def judge(model):
    loss, weight = step(model, sentences(16, 99_999), lambda loss: None)
    return {"validation_loss": float(loss / weight)}


OF_TASK = ("loss_step", "make_batch", "evaluate", "monitor", "mode")  # fields of `TrainTask`


def run(out, dropout=0.1, precision="bf16", lr=3e-3, callbacks=(), **given):
    "A run with these fields of task and plan: its record, optimizer and result."
    torch.manual_seed(1)
    record, model = create_record(out, "toy"), bert(dropout=dropout)
    optimiser = Optimiser(model, lr, precision=precision)
    task = dict(
        model=model,
        optimizer=optimiser,
        loss_step=step,
        make_batch=make_batch,
        evaluate=judge,
        identity=dict(seed=1),
    )
    task |= {k: given.pop(k) for k in OF_TASK if k in given}
    plan = dict(steps=14, batch_size=4, grad_accum_steps=3, warmup=2, log_every=2)
    plan |= dict(evaluate_every=5, checkpoint_every=3) | given
    result = train_task(record, TrainTask(**task), TrainPlan(**plan), callbacks)
    return record, optimiser, result


def what_stays(record, optimiser, result):
    "Everything about a run that must not depend on how often it was killed."
    rows = [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in record.rows()
    ]
    result = {k: v for k, v in dataclasses.asdict(result).items() if k != "seconds"}
    return json.dumps([rows, result]), {
        k: v.clone() for k, v in optimiser.state_dict().items() if k.startswith("master/")
    }


def same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys() and all(
        torch.equal(v, other[1][k]) for k, v in one[1].items()
    )


@contextmanager
def forked(work):
    "Run `work()` in a forked process; yields its pid and reaps it."
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    try:
        yield pid
    finally:
        os.waitpid(pid, 0)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_accumulation_is_one_big_batch(tmp_path, size):
    """24 sentences at once, or in pieces that count different numbers of tokens: the same weights
    after four steps."""

    def piece(size, i, *share):
        return tuple(t[i % (24 // size) * size :][:size] for t in sentences(24, i // (24 // size)))

    whole, cut = (
        run(
            tmp_path / str(s),
            dropout=0.0,
            precision="fp32",
            lr=1e-3,
            make_batch=piece,
            evaluate=None,
            steps=4,
            batch_size=s,
            grad_accum_steps=24 // s,
        )
        for s in (24, size)
    )
    for n, m in whole[1].masters.items():
        torch.testing.assert_close(cut[1].masters[n], m, rtol=0, atol=1e-6)
    for a, b in zip(whole[0].rows(), cut[0].rows()):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and a["tokens"] == b["tokens"]


def test_what_does_not_count_leaves_no_trace():
    ids, mask, labels = sentences(6, 3)
    junk = torch.where(mask == 0, 9, ids)
    found = []
    for these in (ids, junk):
        model = bert()
        loss, _ = step(model, (these, mask, labels), lambda loss: loss.backward())
        found.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    for n, g in found[0][1].items():
        if g is not None:
            torch.testing.assert_close(found[1][1][n], g, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kills_at_any_time_change_nothing(tmp_path, precision):
    straight = what_stays(*run(tmp_path / "straight", precision=precision))
    rng, pointer, steps, until = (
        random.Random(precision),
        tmp_path / "killed" / "resume" / "train" / "checkpoint.json",
        [0],
        time.monotonic() + 60,
    )
    reached = lambda: json.loads(pointer.read_text())["state"]["step"] if pointer.exists() else 0
    while (
        steps[-1] < 14 and time.monotonic() < until
    ):  # each attempt gets at least one checkpoint further, and then a little
        with forked(lambda: run(tmp_path / "killed", precision=precision)) as pid:
            while reached() == steps[-1] and time.monotonic() < until:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.03))
            os.kill(pid, signal.SIGKILL)
        steps.append(reached())
    assert len(steps) > 2, "every attempt was over before its killer came"
    same(straight, what_stays(*run(tmp_path / "killed", precision=precision)))


def test_death_at_every_rename_changes_nothing(tmp_path, monkeypatch):
    "The process dies right before, or right after, the n-th time that a file takes its final name."
    straight, replace = what_stays(*run(tmp_path / "straight", steps=8)), os.replace

    def dying(n, after):
        def counted(*names):
            nonlocal n
            n -= 1
            if n == 0 and after:
                replace(*names)
            if n == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names)

        return counted

    for n in range(2, 12):
        out, replaced = tmp_path / f"killed-{n}", dying(n, n % 2)

        def work():
            os.replace = replaced
            run(out, steps=8)

        with forked(work):
            pass
        same(straight, what_stays(*run(out, steps=8)))


def test_a_finished_run_does_not_train_again(tmp_path):
    first = what_stays(*run(tmp_path))

    def never(model, batch, backward):
        raise AssertionError("it trained")

    same(first, what_stays(*run(tmp_path, loss_step=never)))


def test_a_run_can_be_prolonged_only_by_beginning_anew(tmp_path):
    class Stop(Callback):
        def on_checkpoint(self, run):
            if run.state.step >= 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=(Stop(),))
    with pytest.raises(DataError, match="plan.steps is 14 there and 20 here"):
        run(tmp_path, steps=20)
    with pytest.raises(DataError, match="lr is 0.003 there and 0.001 here"):
        run(tmp_path, lr=1e-3)
    with pytest.raises(DataError, match="precision"):
        run(tmp_path, precision="fp32")
    same(what_stays(*run(tmp_path)), what_stays(*run(tmp_path / "straight")))


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named(tmp_path, spoil):
    optimiser = Optimiser(bert())
    identity = identity_of(optimiser, TrainPlan(steps=1))
    save_checkpoint(tmp_path, optimiser, TrainState(step=1), identity)
    file = tmp_path / "a.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    if spoil == "remove":
        file.unlink()
    else:
        file.write_bytes(data if spoil == "flip" else data[:1000])
    with pytest.raises(DataError, match="a.safetensors is damaged"):
        load_checkpoint(tmp_path, optimiser, identity)


def test_early_stopping_keeps_the_best(tmp_path):
    values = iter([3.0, 2.0, 1.0, 1.5, 1.0, 9.9])
    kept = {}

    def evaluate(model):
        value = next(values)
        if value not in kept:
            kept[value] = {n: p.detach().clone() for n, p in model.named_parameters()}
        return {"validation_loss": value}

    record, optimiser, result = run(
        tmp_path, evaluate=evaluate, steps=100, grad_accum_steps=1, evaluate_every=4, patience=2
    )
    assert (result.steps, result.best_step, result.best, result.stopped) == (
        20,
        12,
        1.0,
        True,
    )
    assert all(torch.equal(p, kept[1.0][n]) for n, p in optimiser.model.named_parameters())
    assert {f.name for f in (tmp_path / "resume" / "train").iterdir()} <= {
        "before.json",
        "checkpoint.json",
        "a.safetensors",
        "b.safetensors",
        "best-12.safetensors",
    }


def mostly_one(rows, seed):
    "Ids, mask, labels: the answer to most ids is 5, that to each of the others is the id itself."
    ids = torch.randint(2, WORDS, (rows, 12), generator=torch.Generator().manual_seed(seed))
    return ids, torch.ones_like(ids), torch.where(ids < 24, 5, ids)


def noise(rows, seed):
    "Ids, mask, labels: answers of six kinds that have nothing to do with the ids."
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, WORDS, (rows, 12), generator=generator)
    return ids, torch.ones_like(ids), torch.randint(2, 8, ids.shape, generator=generator)


def accuracy(task):
    def evaluate(model):
        ids, mask, labels = task(16, 99_999)
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        right = logits.argmax(-1) == labels
        return {"validation_loss": loss.item(), "validation_accuracy": right.float().mean().item()}

    return evaluate


PLATEAU = dict(
    make_batch=lambda n, i, *share: mostly_one(n, i), evaluate=accuracy(mostly_one), steps=80
)
# the same eight rows over and over
OVERFITTING = dict(
    make_batch=lambda n, i, *share: noise(n, i % 2), evaluate=accuracy(noise), steps=150
)
BY_ACCURACY = dict(
    monitor="validation_accuracy",
    mode="max",
    precision="fp32",
    lr=1e-2,
    grad_accum_steps=1,
    evaluate_every=3,
    checkpoint_every=5,
    log_every=5,
)


def evaluations(record):
    "Steps, accuracies and losses of all evaluations."
    rows = [r for r in record.rows() if "validation_accuracy" in r]
    return [[r[k] for r in rows] for k in ("step", "validation_accuracy", "validation_loss")]


def ended_by_accuracy_alone(accuracies, patience):
    "Which evaluation ends a training for which a better accuracy is the only progress; or None."
    best, stale = -1.0, 0
    for i, value in enumerate(accuracies):
        best, stale = max(best, value), 0 if value > best else stale + 1
        if stale == patience:
            return i
    return None


def test_patience_outlasts_a_plateau(tmp_path):
    "Accuracy stands still for longer than patience allows, the loss falls, the task is learned."
    record, _, result = run(tmp_path, **PLATEAU, **BY_ACCURACY, patience=2)
    steps, accuracies, _ = evaluations(record)
    early = ended_by_accuracy_alone(accuracies, 2)
    assert early is not None and max(accuracies[: early + 1]) < 0.95
    assert not result.stopped and result.steps == 80 and max(accuracies) == 1.0
    assert result.best == 1.0 and result.best_step == steps[accuracies.index(1.0)]
    record, _, without = run(tmp_path / "without", **PLATEAU, **BY_ACCURACY)
    assert evaluations(record)[1] == accuracies
    alike = lambda one: dataclasses.replace(one, seconds=0, plan=result.plan)
    assert alike(without) == alike(result)


def test_patience_ends_overfitting(tmp_path):
    "Noise learned by heart: the training ends as soon as patience allows after the lowest loss."
    record, _, result = run(tmp_path, **OVERFITTING, **BY_ACCURACY, patience=3)
    _, accuracies, losses = evaluations(record)
    assert result.stopped and result.steps < 45 and result.best == max(accuracies)
    assert losses.index(min(losses)) == len(losses) - 4
    record, _, _ = run(tmp_path / "on", **OVERFITTING, **BY_ACCURACY)
    assert evaluations(record)[2][-1] > 1.5 * min(losses)  # it would have gone on so


def given(pairs):
    "An evaluation that gives these pairs of accuracy and loss, one after the other."
    left = iter(pairs)

    def evaluate(model):
        accuracy, loss = next(left)
        told = {} if loss is None else {"validation_loss": loss}
        return {"validation_accuracy": accuracy, **told}

    return evaluate


@pytest.mark.parametrize(
    "pairs,warmup,ends,best",
    [
        # a lower loss is progress, an equal one is none
        (
            [(0.5, 1.0), (0.5, 0.9), (0.4, 0.8), (0.5, 0.7), (0.6, 0.9), (0.6, 0.7), (0.5, 0.9)],
            0,
            14,
            10,
        ),
        # the first three evaluations are within the warm-up
        ([(0.5, 1.0), (0.5, 1.1), (0.5, 1.2), (0.4, 1.3), (0.5, 1.0), (0.5, 1.4)], 6, 10, 2),
        # a better accuracy is progress, whatever the loss
        ([(0.5, 1.0), (0.4, 1.0), (0.6, 1.2), (0.4, 1.1), (0.5, 1.0)], 0, 10, 6),
        # no loss is told: accuracy alone
        ([(0.5, None), (0.6, None), (0.6, None), (0.6, None)], 0, 8, 4),
    ],
)
def test_what_counts_as_progress(tmp_path, pairs, warmup, ends, best):
    how = {**BY_ACCURACY, "evaluate_every": 2, "steps": 60, "warmup": warmup, "patience": 2}
    _, _, result = run(tmp_path, evaluate=given(pairs), **how)
    assert (result.steps, result.best_step, result.stopped) == (ends, best, True)


def test_the_last_steps_before_an_early_stop_are_logged(tmp_path):
    how = {**BY_ACCURACY, "evaluate_every": 2, "steps": 60, "warmup": 0, "patience": 2}
    how["log_every"] = 50
    worse = iter(range(100))
    evaluate = lambda model: dict(validation_accuracy=0.5, validation_loss=float(next(worse)))
    record, _, result = run(tmp_path, evaluate=evaluate, **how)
    logged = [r for r in record.rows() if "lr" in r]
    assert result.stopped and [r["step"] for r in logged] == [result.steps]
    assert result.loss == logged[0]["loss"] and logged[0]["tokens"] == result.tokens


@pytest.mark.parametrize("task,patience", [(PLATEAU, 2), (OVERFITTING, 3)])
def test_a_killed_run_stops_where_the_undisturbed_one_does(tmp_path, task, patience):
    "Killed at every checkpoint: each attempt must know how long was waited, and for what."

    class Dying(Callback):
        def on_checkpoint(self, run):
            os.kill(os.getpid(), signal.SIGKILL)

    how = {**BY_ACCURACY, **task, "patience": patience, "checkpoint_every": 4}
    straight = what_stays(*run(tmp_path / "straight", **how))
    pointer, kills, done = tmp_path / "killed" / "resume" / "train" / "checkpoint.json", 0, False
    while not done:
        with forked(lambda: run(tmp_path / "killed", callbacks=(Dying(),), **how)):
            pass
        kills, done = kills + 1, json.loads(pointer.read_text())["state"]["done"]
    assert kills > 3
    same(straight, what_stays(*run(tmp_path / "killed", **how)))


class Noting(Callback):
    "Logs rows of its own."

    def on_evaluation(self, run, values):
        run.record.log(noted="evaluation", step=run.state.step)

    def on_step_end(self, run, result):
        run.record.log(noted="step", step=run.state.step)


@pytest.mark.parametrize("step", [4, 6, 11])
def test_rows_of_other_callbacks_survive_a_kill(tmp_path, at_step, step):
    "Also those of the step whose checkpoint the run goes on from."

    def die(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", callbacks=(Noting(), at_step(step, die)))
    straight = run(tmp_path / "straight", callbacks=(Noting(),))
    killed = run(tmp_path / "killed", callbacks=(Noting(),))
    same(what_stays(*straight), what_stays(*killed))
    noted = [r["step"] for r in straight[0].rows() if r.get("noted") == "step"]
    assert noted == list(range(1, 15))


@pytest.mark.parametrize(
    "hook,last", [("on_step_begin", 5), ("on_step_end", 5), ("on_evaluation", 6)]
)
@pytest.mark.parametrize("every", [5, 100])
def test_a_callback_ends_a_training_in_good_order(tmp_path, hook, last, every):
    "With a row, an evaluation and a checkpoint of its last step; nothing is left to do then."

    def end(self, run, *_):
        if run.state.step >= 4:
            run.end()

    ending = type("Ending", (Callback,), {hook: end})()
    how = dict(callbacks=(ending,), evaluate_every=every, log_every=100)
    if hook == "on_evaluation" and every > 14:
        last = 14  # it is evaluated at the end only
    first = run(tmp_path, **how)
    rows = first[0].rows()
    assert (first[2].steps, first[2].best_step is not None) == (last, True)
    assert [r["step"] for r in rows if "lr" in r] == [last] and "validation_loss" in rows[-1]
    same(what_stays(*first), what_stays(*run(tmp_path, **how)))


def test_nan_is_refused_with_its_place(tmp_path):
    calls = 0

    def spoilt(model, batch, backward):
        nonlocal calls
        calls += 1
        loss, weight = step(model, batch, backward)
        return (loss * float("nan") if calls == 20 else loss), weight

    with pytest.raises(DataError, match=r"loss is nan at step 7 \(batches 18 to 20, learning rate"):
        run(tmp_path, loss_step=spoilt)
    same(
        what_stays(*run(tmp_path)), what_stays(*run(tmp_path / "straight"))
    )  # what was saved before it is sound

    def no_gradient(model, batch, backward):
        return step(model, batch, lambda loss: (loss * float("inf")).backward())

    with pytest.raises(DataError, match="norm of the gradient is (nan|inf).*at step 1"):
        run(tmp_path / "other", loss_step=no_gradient)


def test_mistakes_of_the_caller_are_named(tmp_path):
    with pytest.raises(UsageError, match="validation_loss"):
        run(tmp_path / "a", evaluate=lambda model: {"accuracy": 1.0})
    with pytest.raises(UsageError, match="steps is 0"):
        run(tmp_path / "b", steps=0)
    for name in ("warmup", "decay", "patience", "evaluate_every", "checkpoint_every", "threads"):
        with pytest.raises(UsageError, match=f"{name} is -1; it is at least"):
            TrainPlan(steps=3, **{name: -1})
    with pytest.raises(UsageError, match="cosine"):
        schedule_of(TrainPlan(steps=3, schedule="cosine"))
    with pytest.raises(UsageError, match="fp16"):
        Optimiser(bert(), precision="fp16")
    with pytest.raises(DataError, match="Nothing was counted"):
        nothing = lambda n, i, *share: (*sentences(n, i)[:2], torch.full((n, 12), IGNORED))
        run(tmp_path / "c", make_batch=nothing)


def test_two_trainings_share_a_record(tmp_path):
    def both():
        record = create_record(tmp_path, "toy")
        for name in ("first", "second"):
            torch.manual_seed(3)
            model = bert(dropout=0.1)
            task = TrainTask(
                model=model,
                optimizer=Optimiser(model),
                loss_step=step,
                make_batch=make_batch,
                name=name,
            )
            train_task(record, task, TrainPlan(steps=3, batch_size=4, checkpoint_every=2))

    both()
    once = [r["loss"] for r in open_record(tmp_path, "toy").rows()]
    both()
    assert once[:3] == once[3:] and [r["loss"] for r in open_record(tmp_path, "toy").rows()] == once


def test_bf16_with_masters_follows_fp32(tmp_path):
    losses = [
        [
            r["loss"]
            for r in run(
                tmp_path / p, dropout=0.0, precision=p, steps=40, grad_accum_steps=1, log_every=1
            )[0].rows()
            if "loss" in r
        ]
        for p in ("fp32", "bf16")
    ]
    assert losses[0][-1] < losses[0][0] - 0.3 and max(abs(a - b) for a, b in zip(*losses)) < 0.05


def test_muon_and_adamw_go_on_from_their_state():
    def three(optimiser, start):
        for i in range(start, start + 3):
            step(optimiser.model, sentences(4, i), lambda loss: loss.backward())
            optimiser.step(weight=10)

    one, two = Optimiser(bert(), muon=0.01), Optimiser(bert(seed=5), muon=0.01)
    assert len(one.inner) == 2
    three(one, 0)
    two.load_state_dict({k: v.clone() for k, v in one.state_dict().items()})
    three(one, 3)
    three(two, 3)
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_pace_leaves_no_trace():
    model = bert(dropout=0.1)
    optimiser = Optimiser(model)
    for _ in range(2):
        step(model, sentences(4, 0), lambda loss: loss.backward())
        optimiser.step()
    before, noise = {k: v.clone() for k, v in optimiser.state_dict().items()}, torch.get_rng_state()
    assert measure_step_time(model, step, lambda i: sentences(4, i), optimiser, accumulation=2) > 0
    assert torch.equal(noise, torch.get_rng_state()) and all(
        torch.equal(v, before[k]) for k, v in optimiser.state_dict().items()
    )


def test_a_plan_is_kept_until_something_else_is_asked(tmp_path):
    record = create_record(tmp_path / "r", "toy")
    steps = lambda epochs, n: resolve_train_plan(record, epochs, lambda: TrainPlan(steps=n)).steps
    assert steps(dict(epochs=1), 5) == 5
    (record.resume / "left").write_text("half a run")
    assert steps(dict(epochs=1), 6) == 5 and (record.resume / "left").exists()
    assert steps(dict(epochs=2), 7) == 7 and not (record.resume / "left").exists()


def test_a_plan_goes_after_what_it_had_begun(tmp_path):
    "Killed in between, the next attempt finds the old plan and clears the rest."

    class Dying(Record):
        @property
        def resume(self):
            raise KeyboardInterrupt

    record = create_record(tmp_path / "r", "toy")
    steps = lambda of, epochs, n: resolve_train_plan(of, epochs, lambda: TrainPlan(steps=n)).steps
    assert steps(record, dict(epochs=1), 5) == 5
    (record.resume / "left").write_text("half a run")
    with pytest.raises(KeyboardInterrupt):
        steps(Dying(record.path, "toy"), dict(epochs=2), 6)
    assert steps(record, dict(epochs=2), 7) == 7 and not (record.resume / "left").exists()


def test_order_is_a_function_of_seed_and_index():
    n = 23
    stream = [int(i) for k in range(23) for i in batch_indices(k, 5, n, 7)]
    assert all(
        sorted(stream[e : e + n]) == list(range(n)) for e in range(0, 5 * n, n)
    )  # over epoch edges inside a batch
    assert stream == [int(i) for k in range(115) for i in batch_indices(k, 1, n, 7)] and stream != [
        int(i) for k in range(23) for i in batch_indices(k, 5, n, 8)
    ]
    lengths = tuple(random.Random(0).choices(range(3, 60), k=n))
    for epoch in range(3):
        assert sorted(
            int(i) for b in length_bucketed_batches(lengths, 4, 7, epoch) for i in b
        ) == list(range(n))
    assert [list(b) for b in length_bucketed_batches(lengths, 4, 7, 0)] != [
        list(b) for b in length_bucketed_batches(lengths, 4, 7, 1)
    ]
