"""Before the first step: what is probed goes into the plan, a killed run takes it from there and
ends with the same bytes, and what was foretold stands beside what came."""

import json
import random
from dataclasses import replace

import pandas as pd
import pytest

torch = pytest.importorskip("torch")
import llmeco_nb.training.plan
from llmeco_nb.core import (
    UsageError,
    create_record,
    read_json,
    sha256_of,
)
from llmeco_nb.data.corpus import write_corpus
from llmeco_nb.models.decoder import new_decoder
from llmeco_nb.models.speedups import has_bf16, num_loss_chunks
from llmeco_nb.pretraining.causal import (
    CausalConfig,
    causal_loss_step,
    pretrain_causal,
)
from llmeco_nb.pretraining.mlm import MLMConfig, pretrain
from llmeco_nb.pretraining.packing import pack_documents, select_rows
from llmeco_nb.tokenization.bpe import save_subword_tokenizer, train_bpe
from llmeco_nb.tokenization.wordpiece import TokenizerConfig, build_tokenizer
from llmeco_nb.training.forecast import (
    chunked_memory_model,
    fit_memory_model,
    largest_batch,
    peak_step_bytes,
    predict_peak_bytes,
)
from llmeco_nb.training.loop import resolve_train_plan
from llmeco_nb.training.lr_finder import set_lr
from llmeco_nb.training.optim import Optimiser
from llmeco_nb.training.plan import (
    BATCH_SIZE_CANDIDATES,
    LR_CANDIDATES,
    Measured,
    PlanConfig,
    forecast_vs_actual,
    run_training,
)
from llmeco_nb.training.state import TrainPlan
from llmeco_nb.training.task import TrainTask

QUICK = dict(size="1x32", steps=8, batch_size=16, lr=3e-3, eval_examples=6, num_evals=2)
KINDS = ("encoder", "decoder")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder, r = tmp_path_factory.mktemp("inputs"), random.Random(0)
    said = lambda: " ".join(
        (
            f"the {r.choice(['good', 'bad'])} {r.choice(['film', 'plot', 'cast'])} "
            f"{r.choice(['bored', 'moved'])} {r.choice(['me', 'us'])} ."
        )
        for _ in range(8)
    )
    write_corpus(
        folder / "corpus",
        {
            s: pd.DataFrame(
                dict(
                    id=[f"{s}{i}" for i in range(n)], text=[said() for _ in range(n)], label=[0] * n
                )
            )
            for s, n in (("train", 30), ("validation", 8), ("test", 2))
        },
        [],
        {},
    )
    build_tokenizer(
        create_record(folder / "t", "tokenizer"), folder / "corpus", TokenizerConfig(vocab_size=60)
    )
    save_subword_tokenizer(
        train_bpe(pd.read_parquet(folder / "corpus" / "train.parquet").text, 290), folder / "pieces"
    )
    return folder


def run(kind, inputs, out, **more):
    torch.set_num_threads(1)
    record = create_record(out, kind)
    if kind == "encoder":
        pretrain(
            record,
            inputs / "corpus",
            inputs / "t" / "tokenizer",
            MLMConfig(**QUICK | dict(seq_len=24, max_position_embeddings=32) | more),
        )
    else:
        pretrain_causal(
            record,
            inputs / "corpus",
            inputs / "pieces",
            CausalConfig(**QUICK | dict(context_length=24, baseline_tokens=0) | more),
        )
    return record


def what_stays(record):
    rows = [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "roof_share")}
        for row in record.rows()
    ]
    return (
        sha256_of(record.artifact(record.stage)),
        rows,
        {
            k: v
            for k, v in record.metrics.items()
            if k
            not in (
                "seconds",
                "tokens_per_s",
                "gflops",
                "roof_gflops",
                "roof_share",
                "forecast_seconds",
            )
        },
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_probed_is_kept_and_a_killed_run_is_the_same(
    kind, inputs, tmp_path, monkeypatch, capsys, killed_at
):
    whole = run(kind, inputs, tmp_path / "whole", batch_size=None, lr=None)
    plan, printed = read_json(tmp_path / "whole.plan.json"), capsys.readouterr().out
    assert (
        plan["batch"] in BATCH_SIZE_CANDIDATES
        and float(plan["lr"]) in LR_CANDIDATES
        and whole.metrics["batch"] == plan["batch"]
        and whole.metrics["lr"] == float(plan["lr"])
    )
    assert (
        printed.startswith(f"batch {plan['batch']}: ")
        and f"learning rate {float(plan['lr']):g}: left of 4" in printed
        and all(f"\n{what}: " in printed for what in ("time", "memory", "loss"))
    )
    rates = {row["lr"] for row in whole.rows() if "lr" in row}
    assert max(rates) == pytest.approx(float(plan["lr"]))  # it was trained with
    (tmp_path / "hit.plan.json").write_text(
        (tmp_path / "whole.plan.json").read_text()
    )  # as after a kill before the first step
    monkeypatch.setattr(
        llmeco_nb.training.plan,
        "successive_halving",
        lambda *a, **k: pytest.fail("probed a second time"),
    )
    monkeypatch.setattr(
        llmeco_nb.training.plan,
        "fastest_batch_size",
        lambda *a, **k: pytest.fail("probed a second time"),
    )
    killed_at(5, lambda: run(kind, inputs, tmp_path / "hit", batch_size=None, lr=None))
    assert what_stays(run(kind, inputs, tmp_path / "hit", batch_size=None, lr=None)) == what_stays(
        whole
    )
    other = run(
        kind,
        inputs,
        tmp_path / "other",
        batch_size=plan["batch"],
        lr=float(plan["lr"]),
        **({"muon_lr": 1e-2 * float(plan["lr"]) / 3e-3} if kind == "decoder" else {}),
    )
    assert (
        what_stays(other)[0] == what_stays(whole)[0] or kind == "decoder"
    )  # given by hand they make the same model (Muon's rate may differ in its last bit)
    assert [r["loss"] for r in other.rows() if "loss" in r] == pytest.approx(
        [r["loss"] for r in whole.rows() if "loss" in r], rel=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_of_nothing_is_refused(kind, inputs, tmp_path):
    with pytest.raises(UsageError, match="lr is 0"):
        run(kind, inputs, tmp_path / "r", lr=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forecast_leaves_no_trace(kind, inputs, tmp_path, monkeypatch):
    "The same run without anything being measured before it."
    told = run(kind, inputs, tmp_path / "told", batch_size=4, lr=2e-3)

    def silent(record, task, config):
        def make():
            plan = config.make_plan(Measured(batch_size=4, step_seconds=1, evaluation_seconds=1))
            return replace(plan, batch_size=4, grad_accum_steps=1)

        plan = resolve_train_plan(record, config.fingerprint, make)
        (record.resume / "forecast.json").write_text(
            json.dumps(dict(seconds=1.0, bytes=1, loss=None, says=[]))
        )
        return plan

    monkeypatch.setattr(llmeco_nb.training.plan, "plan_training", silent)
    assert (
        what_stays(run(kind, inputs, tmp_path / "silent", batch_size=4, lr=2e-3))[:2]
        == what_stays(told)[:2]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_told_and_come(kind, inputs, tmp_path):
    record = run(kind, inputs, tmp_path / "run", batch_size=8, lr=3e-3, grad_accum_steps=2)
    told = read_json(record.path / "forecast.json")
    assert (
        told["loss"] is None
        and "unknown" in told["says"][-1]
        and "| loss | unknown |" in forecast_vs_actual(record)
    )
    assert (
        told["bytes"] == pytest.approx(told["came"]["bytes"], rel=0.05)
        and record.metrics["peak_mib"] == told["came"]["bytes"] / 2**20
    )
    assert told["tokens"] == pytest.approx(told["came"]["tokens"], rel=0.1) and told["came"][
        "loss"
    ] == min(r["validation_loss"] for r in record.rows() if "validation_loss" in r)
    assert 0.05 < told["came"]["seconds"] / told["seconds"] < 20  # a neighbour may slow either


def test_earlier_runs_give_a_loss_and_others_are_refused(inputs, tmp_path):
    given = dict(batch_size=8, lr=3e-3)
    shorter = [
        str(
            run(
                "encoder",
                inputs,
                tmp_path / f"run{n}",
                steps=n,
                num_evals=1,
                **{**given, "seed": n},
            ).path
        )
        for n in (6, 12, 24, 48)
    ]
    record = run(
        "encoder", inputs, tmp_path / "long", steps=60, num_evals=1, previous_runs=shorter, **given
    )
    told = read_json(record.path / "forecast.json")
    losses = [read_json(f"{f}/forecast.json")["came"]["loss"] for f in shorter]
    assert (
        record.metrics["forecast_loss"] == told["loss"]
        and losses[0] > losses[-1]
        and 0.3 * losses[-1] < told["loss"] < losses[0]
    )
    assert "from 4 earlier runs, 1.2 times beyond the longest" in told["says"][-1]
    for more in (dict(lr=1e-3), dict(mask_prob=0.3)):
        with pytest.raises(
            UsageError,
            match="says nothing of this run: "
            + dict(lr="rate", batch_size="rows").get(*more, next(iter(more))),
        ):
            run(
                "encoder",
                inputs,
                tmp_path / "odd",
                steps=60,
                num_evals=1,
                previous_runs=shorter[:1],
                **{**given, **more},
            )


def test_early_stop_and_roof_in_the_rows(inputs, tmp_path):
    record = run(
        "encoder",
        inputs,
        tmp_path / "run",
        batch_size=4,
        lr=1e-9,
        steps=400,
        num_evals=200,
        patience=2,
        warmup_ratio=0,
        decay_ratio=0,
        precision="bf16",
    )
    assert (
        record.metrics["steps"] < 60 and record.metrics["best_step"] < record.metrics["steps"]
    )  # at such a rate nothing gets better for long
    shares = [row["roof_share"] for row in record.rows() if "tokens_per_s" in row]
    # without instructions for bfloat16 a large product, the roof, is slower than small ones
    assert shares and min(shares) > 0 and (max(shares) < 1.5 or not has_bf16("cpu"))


@pytest.mark.parametrize("rows", [2, 9, 40, 150])
def test_a_loss_made_in_parts_is_foretold(rows):
    "A large vocabulary, so that the real step works through its logits in one to eighteen parts."
    generator = torch.Generator().manual_seed(0)
    packed = pack_documents(
        [torch.randint(1, 15_000, (61,), generator=generator).numpy() for _ in range(160)], 64, 0
    )
    torch.manual_seed(0)
    model = new_decoder(15_000, "1x16", 64)
    optimiser, a_row = Optimiser(model, precision="fp32"), 62
    make = lambda n, i: select_rows(packed, range(n))
    room = 600 * 15_000
    real = lambda m, b, backward: causal_loss_step(
        m, b, backward, num_loss_chunks(int((b["targets"] != -100).sum()), 15_000, room)
    )
    law = chunked_memory_model(
        model,
        lambda n: lambda m, b, backward: causal_loss_step(m, b, backward, n),
        lambda n: num_loss_chunks(n * a_row, 15_000, room),
        a_row,
        make,
        optimiser,
    )
    found = peak_step_bytes(model, real, make(rows, 0), optimiser)
    assert predict_peak_bytes(law, rows) == pytest.approx(found, rel=0.08)
    if rows == 150:
        assert (
            predict_peak_bytes(
                fit_memory_model(
                    model,
                    lambda m, b, backward: causal_loss_step(m, b, backward, 1),
                    make,
                    optimiser,
                ),
                rows,
            )
            > 2 * found
        )  # as if in one part


def test_the_largest_batch_is_found_from_below():
    asked = []

    def law(rows):
        asked.append(rows)
        return [(100.0, 7.0), (0.0, 9.0)]

    for limit in (90, 106.9, 107, 500, 905):
        expected = max([b for b in range(1, 2000) if max(100 + 7 * b, 9 * b) <= limit], default=0)
        for most in (1, 5, 64, 1000):
            asked.clear()
            assert (
                largest_batch(law, limit, most)
                == largest_batch([(100.0, 7.0), (0.0, 9.0)], limit, most)
                == min(expected, most)
            )
            assert max(asked) <= max(1, 2 * expected)


def test_a_rate_is_taken_by_every_part():
    model = new_decoder(50, "1x16", 16)
    optimiser = Optimiser(model, 1e-3, muon=1e-2)
    set_lr(optimiser, 4e-3)
    assert (
        optimiser.lr == 4e-3
        and optimiser.muon == pytest.approx(4e-2)
        and [g["base"] for o in optimiser.inner for g in o.param_groups]
        == pytest.approx(
            [4e-3] * len(optimiser.inner[0].param_groups)
            + [4e-2] * len(optimiser.inner[1].param_groups)
        )
    )
    with pytest.raises(UsageError, match="lr is 0"):
        set_lr(optimiser, 0)


def test_a_rate_that_is_given_is_the_one_that_is_used(tmp_path):
    "Whatever the optimizer was made with."
    model = torch.nn.Linear(4, 1)

    def loss_step(model, batch, backward):
        loss = model(batch).square().sum()
        backward(loss)
        return loss.detach(), len(batch)

    task = TrainTask(
        model=model,
        optimizer=Optimiser(model, 0.1, precision="fp32"),
        loss_step=loss_step,
        make_batch=lambda rows, index, *share: torch.ones(rows, 4),
        count_tokens=len,
    )
    make_plan = lambda measured: TrainPlan(steps=3)
    config = PlanConfig(fingerprint={}, make_plan=make_plan, batch_size=4, lr=1e-3)
    record = create_record(tmp_path, "toy")
    assert run_training(record, task, config).lr == 1e-3
    assert record.rows()[0]["lr"] == 1e-3
