"""Several processes give what one gives, go on where another number of them stopped, and leave
nothing behind when one fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest

torch = pytest.importorskip("torch")
import parallel_cases as cases

from llmeco_nb.core import (
    CellError,
    DataError,
    MissingError,
    UsageError,
    create_record,
    open_record,
)
from llmeco_nb.runner.identity import read_parameters
from llmeco_nb.runner.stages import StageRegistry
from llmeco_nb.training.parallel import (
    current_world,
    init_process_group,
    launch,
    launched_main,
    raise_worker_error,
    resolve_device,
    run_distributed,
    run_notebook,
)

CASES = str(Path(__file__).with_name("parallel_cases.py"))


def children(work, processes, folder, joined):
    """Ids of forked processes that do `work`, in order of rank; each leaves
    `<processes>-<rank>.json` with its result or `.error` with what it raised in the folder."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            try:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(processes),
                    LOCAL_WORLD_SIZE=str(processes),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
                if joined:
                    with init_process_group("cpu") as world:
                        result = work(world)
                else:
                    result = work()
                (folder / f"{processes}-{rank}.json").write_text(json.dumps(result))
            except BaseException:
                (folder / f"{processes}-{rank}.error").write_text(traceback.format_exc())
            finally:
                os._exit(0)
        pids.append(pid)
    return pids


def forked(work, processes, folder, timeout=100, joined=True):
    """`work(world)` in so many forked processes that met over gloo, in order of rank: what `launch`
    does, without the seconds that new interpreters take to import torch."""
    left = set(children(work, processes, folder, joined))
    until = time.monotonic() + timeout
    while left:
        for pid in list(left):
            if os.waitpid(pid, os.WNOHANG)[0]:
                left.discard(pid)
        if time.monotonic() > until or list(folder.glob(f"{processes}-*.error")):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    errors = [f.read_text() for f in sorted(folder.glob(f"{processes}-*.error"))]
    assert not errors, "\n".join(errors)
    return [
        json.loads((folder / f"{processes}-{rank}.json").read_text()) for rank in range(processes)
    ]


def left_to_themselves(work, processes, folder, timeout=100):
    "How each process ends when nobody ends the others for it: done, killed, or what it raised."
    pids = children(work, processes, folder, joined=False)
    status, until = {}, time.monotonic() + timeout
    while len(status) < processes and time.monotonic() < until:
        for pid in set(pids) - set(status):
            ended, how = os.waitpid(pid, os.WNOHANG)
            if ended:
                status[pid] = how
        time.sleep(0.02)
    waiting = set(pids) - set(status)
    for pid in waiting:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not waiting, f"{len(waiting)} of {processes} processes still waited after {timeout} s"
    errors = [folder / f"{processes}-{rank}.error" for rank in range(processes)]
    return [
        "killed" if os.WIFSIGNALED(status[pid]) else error.read_text() if error.exists() else "done"
        for pid, error in zip(pids, errors)
    ]


def check(found):
    assert [i for f in found for i in f["mine"]] == list(range(6, 12)), "another order of samples"
    assert len({f["counted"] for f in found}) > 1, "the shares count alike: nothing would be shown"
    for f in found:
        assert f["total"] == f["tokens"] and all(
            f[way] < 1e-5 for way in ("data", "ddp", "fully", "forgetful")
        )
        assert f["sharded"] and abs(f["local"] - 1 / len(found)) < 0.1
        assert abs(f["norm"] / f["true_norm"] - 1) < 1e-5
        if len(found) == 2:
            assert f["split"] == 0.5 and f["tensor"] < 1e-5
        b = f["bf16"]
        assert (
            b["kinds"] == ["torch.bfloat16", "torch.float32"]
            and b["rounded"]
            and b["stored"]
            and b["went_on"]
        )
        assert (
            1e-4 < b["one"] < 0.02
            and b["many"] < 1.5 * b["one"]
            and b["between"] < 2 * b["one"]
            and b["moved"] < 0.1
        )  # AdamW divides small gradients by small ones
    print([{k: f[k] for k in ("data", "ddp", "fully", "tensor", "bf16") if k in f} for f in found])


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_are_one(processes, tmp_path):
    cases.model(), cases.import_sharding()  # before the fork, once for all
    check(forked(lambda world: cases.compare(world, str(tmp_path / "stored")), processes, tmp_path))


@pytest.mark.gpu
def test_two_gpus_are_one(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    check(launch(f"{CASES}:compare", 2, timeout=300, folder=str(tmp_path)))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_a_gpu_trains_as_the_processor_does(tmp_path, device):
    from llmeco_nb.data.mixture import small_mixture
    from llmeco_nb.pretraining.causal import CausalConfig, pretrain_causal
    from llmeco_nb.pretraining.packing import small_subword_tokenizer

    toy, prose, losses = (
        dict(
            size="1x32",
            context_length=32,
            steps=12,
            batch_size=4,
            lr=3e-3,
            eval_examples=8,
            num_evals=3,
            baseline_tokens=0,
            precision="fp32",
            muon_lr=0.0,
        ),
        small_mixture(),
        [],
    )
    for where in ("cpu", device):
        pretrain_causal(
            create_record(tmp_path / where, "causal"),
            prose,
            small_subword_tokenizer(prose),
            CausalConfig(device=where, **toy),
        )
        losses.append(
            [r["loss"] for r in open_record(tmp_path / where, "causal").rows() if "loss" in r]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    processor, gpu = (
        open_record(tmp_path / where, "causal").metrics["roof_gflops"] for where in ("cpu", device)
    )
    assert gpu > 2 * processor  # each is held against the speed of its own device


def test_a_tpu_is_one_of_the_devices():
    pytest.importorskip(
        "torch_xla",
        reason="needs torch_xla, which is not installed; the path is written and has not run here",
    )
    assert resolve_device("xla").type == "xla"


def rows_of(out):
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")}
        for r in open_record(out, "toy").rows()
    ]


def drawn_in(file, processes):
    """{micro-batch: rows in the order of the ranks}, of all attempts; an attempt that repeats one
    must have drawn the same."""
    found = {}
    for rank in range(processes):
        mine = {}
        for line in Path(f"{file}.{rank}").read_text().splitlines():
            index, *which = map(int, line.split())
            assert mine.setdefault(index, which) == which
        for index, which in mine.items():
            found.setdefault(index, []).extend(which)
    return found


def masters(out):
    return list(torch.load(Path(out) / "masters.pt").values())


def close(out, other):
    "The same course and end, up to the order of additions."
    for a, b in zip(rows_of(out), rows_of(other), strict=True):
        assert a.keys() == b.keys() and (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        for k, v in a.items():
            assert v == pytest.approx(b[k], rel=1e-5), k
    assert cases.apart(masters(out), masters(other)) < 1e-5


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The run of one process, never touched."
    folder = tmp_path_factory.mktemp("alone")
    cases.training(create_record(folder / "run", "toy"), str(folder / "seen"))
    return folder


@pytest.mark.parametrize("first,then", [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_processes_goes_on(tmp_path, alone, first, then):
    """Begun by some processes, dead inside an accumulation, ended by others: the same order of
    samples, gradients and weights within 1e-5."""
    for processes, fatal in ((first, 9), (then, -1)):
        how = dict(
            out=str(tmp_path / "run"),
            aside=str(tmp_path / "aside"),
            seen=str(tmp_path / f"seen{processes}"),
            fatal=fatal,
        )
        dead = forked(lambda world: cases.attempt(world, **how), processes, tmp_path)
        assert dead == [fatal > 0] * processes
    close(tmp_path / "run", alone / "run")
    order, before, after = (
        drawn_in(alone / "seen", 1),
        drawn_in(tmp_path / f"seen{first}", first),
        drawn_in(tmp_path / f"seen{then}", then),
    )
    assert sorted({*before, *after}) == sorted(order) and set(before) != set(order) != set(after)
    assert all(order[i] == which for part in (before, after) for i, which in part.items())


def test_the_loop_in_two_processes_resumes_to_the_bit(tmp_path):
    """With dropout, and a loss that is no number in one of the two: both go back, and a death
    changes nothing."""
    how = dict(dropout=0.3, guard=2)
    for name, fatals in (("calm", [-1]), ("hit", [13, -1])):
        for fatal in fatals:
            forked(
                lambda world: cases.attempt(
                    world, str(tmp_path / name), str(tmp_path / f"{name}-aside"), fatal=fatal, **how
                ),
                2,
                tmp_path,
            )
    assert rows_of(tmp_path / "calm") == rows_of(tmp_path / "hit") and [
        r["rewind"] for r in rows_of(tmp_path / "hit") if "rewind" in r
    ] == [1]
    assert all(map(torch.equal, masters(tmp_path / "calm"), masters(tmp_path / "hit")))


def test_a_callback_of_one_process_ends_the_training_of_all(tmp_path):
    from llmeco_nb.training.task import Callback, added_callbacks

    class Ending(Callback):
        def on_step_end(self, run, result):
            if current_world().rank == 1 and run.state.step == 4:
                run.end()

    def ended(world):
        record = create_record(tmp_path / str(world.rank), "toy")
        with added_callbacks(Ending()):
            cases.training(record)
        return [(r["step"], "lr" in r) for r in record.rows()][-2:]

    assert forked(ended, 2, tmp_path, timeout=60) == [[[5, True], [5, False]]] * 2


def test_the_loop_through_ddp(tmp_path, alone):
    forked(
        lambda world: cases.attempt(
            world, str(tmp_path / "run"), str(tmp_path / "aside"), ddp=True
        ),
        2,
        tmp_path,
    )
    close(tmp_path / "run", alone / "run")


def test_a_stage_in_two_processes(tmp_path, alone):
    "By torchrun, from the call that stands in a stage's notebook."
    assert run_distributed(cases.training, 1) is cases.training
    record = create_record(tmp_path / "run", "toy")
    assert run_distributed(cases.training, 2)(record, steps=10) == tmp_path / "run" / "masters.pt"
    close(tmp_path / "run", alone / "run")


def test_a_real_stage_in_two_processes(tmp_path):
    """The decoder of 18a from its notebook's cells, as under torchrun: what one process learns, up
    to rounding."""
    from llmeco_nb.data.mixture import small_mixture
    from llmeco_nb.models.decoder_conversion import qwen3
    from llmeco_nb.pretraining.packing import small_subword_tokenizer

    qwen3(), small_subword_tokenizer(small_mixture())  # before the fork, once for all
    args = [
        "causal",
        "-p",
        "size=1x32",
        "-p",
        "context_length=32",
        "-p",
        "steps=6",
        "-p",
        "batch_size=6",
        "-p",
        "lr=3e-3",
        "-p",
        "eval_examples=8",
        "-p",
        "num_evals=2",
        "-p",
        "baseline_tokens=0",
        "-p",
        "precision=fp32",
        "-p",
        "max_new_tokens=2",
        "-p",
        "activation_checkpointing=1",
        "-p",
        "muon_lr=0",
    ]  # Muon rounds to bf16 inside, and a last bit becomes a third digit
    runs = {
        n: forked(
            lambda: run_notebook([*args, "-p", f"out={tmp_path / str(n)}"]),
            n,
            tmp_path,
            joined=False,
        )
        and open_record(tmp_path / str(n), "causal")
        for n in (1, 2)
    }
    for a, b in zip(runs[1].rows(), runs[2].rows(), strict=True):
        for k in {"loss", "norm", "validation_loss", "tokens"} & a.keys():
            assert a[k] == pytest.approx(b[k], rel=1e-4), k
    assert (tmp_path / "2" / "decoder" / "model.safetensors").exists() and runs[2].metrics[
        "validation_loss"
    ] == pytest.approx(runs[1].metrics["validation_loss"], rel=1e-4)
    before = runs[
        2
    ].rows()  # killed after its last step, before the stage is whole: nobody trains any more
    assert (
        forked(
            lambda: run_notebook([*args, "-p", f"out={tmp_path / '2'}"]), 2, tmp_path, joined=False
        )
        and runs[2].rows() == before
    )


STAGES = StageRegistry.find().stages
ENCODER = "size=1x32 embedding_init=random seq_len=32 max_position_embeddings=64 precision=fp32"
BRIEF = "steps=6 batch_size=5 eval_examples=8 num_evals=2"  # of odd batches the shares differ
SHARING = dict(  # how to ask a stage for a second of its work
    pretrain=f"{BRIEF} {ENCODER} lr=3e-3",
    causal=(
        f"{BRIEF} size=1x32 context_length=32 lr=3e-3 muon_lr=0 baseline_tokens=0 "
        "max_new_tokens=2 precision=fp32"
    ),
    denoise=f"{BRIEF} {ENCODER} lr=3e-3 muon_lr=0 final_eval_examples=8 baseline_tokens=1000",
    nsp=f"{BRIEF} seq_len=32 lr=3e-4 precision=fp32",
    # an epoch of 17 texts ends with a batch of one, and of two processes one has none
    finetune="num_labeled=17 max_length=24 epochs=2 batch_size=8 eval_examples=20 num_evals=2 "
    "device=cpu",
)
ROUNDING = dict(finetune=0.01)  # it trains in bf16


def asked(stage, out):
    values = [*SHARING[stage].split(), f"out={out}"]
    return [stage, *(part for value in values for part in ("-p", value))]


@pytest.fixture(scope="module")
def small_inputs():
    "What the stages make when they are given nothing, and what they import, once for all forks."
    from llmeco_nb.data.corpus import small_corpus
    from llmeco_nb.data.mixture import small_mixture
    from llmeco_nb.finetuning.checkpoints import small_random_encoder
    from llmeco_nb.models.decoder_conversion import qwen3
    from llmeco_nb.pretraining.nsp import small_pretrained_encoder
    from llmeco_nb.pretraining.packing import small_subword_tokenizer

    qwen3()
    small_subword_tokenizer(small_mixture())
    small_pretrained_encoder()
    small_random_encoder(small_corpus())
    for stage in SHARING:
        for cell in STAGES[stage].role("imports"):
            exec(cell.source, {})


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_shares_its_work_or_is_refused(stage, tmp_path, request):
    """In two processes a stage learns what it learns in one, up to rounding, from batches of the
    same size; or it does not begin, and says its name."""
    assert (stage in SHARING) == ("nproc" in read_parameters(STAGES[stage]))
    if stage not in SHARING:

        def refusing():
            with pytest.raises(
                UsageError, match=f"^{stage} does not share its work: each of the 2"
            ):
                run_notebook([stage, "-p", f"out={tmp_path / 'run'}"])

        forked(refusing, 2, tmp_path, joined=False)
        assert not (tmp_path / "run").exists()
        return
    request.getfixturevalue("small_inputs")
    for n in (1, 2):
        forked(lambda: run_notebook(asked(stage, tmp_path / str(n))), n, tmp_path, joined=False)
    one, two = (open_record(tmp_path / str(n), stage) for n in (1, 2))
    for a, b in zip(one.rows(), two.rows(), strict=True):
        assert a.keys() == b.keys() and (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        for k in {"loss", "norm", "lr", "validation_loss"} & a.keys():
            assert a[k] == pytest.approx(b[k], rel=ROUNDING.get(stage, 1e-4)), k
    assert sum("validation_loss" in row for row in two.rows()) == 2
    assert one.metrics.keys() == two.metrics.keys()
    assert all(two.artifact(name).exists() for name in STAGES[stage].contract["outputs"])


@pytest.mark.parametrize("how", ["raises in a step", "is killed as it should agree"])
@pytest.mark.parametrize("stage", SHARING)
def test_a_process_that_fails_leaves_no_results(stage, how, tmp_path, small_inputs, at_step):
    """Of two processes the second fails, and nobody ends the first: it ends by itself, and leaves
    what can go on, but no metrics and no artifacts."""
    import llmeco_nb.training.parallel
    from llmeco_nb.training.task import added_callbacks

    out = tmp_path / "run"

    def raising(step):
        raise RuntimeError("the second process stumbles")

    def dying():
        os.kill(os.getpid(), signal.SIGKILL)

    def stumbling():
        stumbles = []
        if os.environ["RANK"] == "1" and how == "raises in a step":
            stumbles.append(at_step(3, raising))
        elif os.environ["RANK"] == "1":
            llmeco_nb.training.parallel.barrier = (
                dying  # only `all_finished` finds it under this name
            )
        with added_callbacks(*stumbles):
            run_notebook(asked(stage, out))

    first, second = left_to_themselves(stumbling, 2, tmp_path)
    assert "RuntimeError" in first and "onnection" in first
    assert (
        "the second process stumbles" in second if how == "raises in a step" else second == "killed"
    )
    results = {"metrics.json", *STAGES[stage].contract["outputs"]}
    assert not results & {f.name for f in out.iterdir()}
    if how == "raises in a step":
        return
    for f in tmp_path.glob("2-*"):
        f.unlink()
    forked(lambda: run_notebook(asked(stage, out)), 2, tmp_path, joined=False)
    assert results <= {f.name for f in out.iterdir()}  # begun again, it is whole


def test_a_failed_process_under_torchrun_leaves_no_results(tmp_path):
    record = create_record(tmp_path / "run", "toy")
    with pytest.raises(CellError, match="failed in one of 2 processes"):
        run_distributed(cases.stumbling, 2)(record)
    assert not record.metrics and not record.artifact("result").exists()
    assert (record.resume / "train" / "checkpoint.json").exists()


@pytest.mark.parametrize("stage", ["nsp", "finetune"])
def test_small_inputs_are_made_by_the_first_process(stage, tmp_path, monkeypatch):
    "For a chapter read alone an encoder is made: the second process waits, and finds it whole."
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path / "runs"))
    forked(lambda: run_notebook(asked(stage, tmp_path / "run")), 2, tmp_path, joined=False)
    assert open_record(tmp_path / "run", stage).metrics
    made = (
        tmp_path
        / "runs"
        / "scratch"
        / dict(nsp="encoder-pretrained", finetune="encoder-small")[stage]
    )
    assert (
        len(list(made.glob("**/model.safetensors"))) == len(list(made.glob("**/config.json"))) == 1
    )


def test_a_training_that_shares_nothing_is_refused(tmp_path):
    "Its name is said, and it has learned nothing."

    def unshared(world):
        record = create_record(tmp_path / str(world.rank), "toy")
        with pytest.raises(
            UsageError, match="The training toy gives each of the 2 processes the same"
        ):
            cases.training(record, alike=True)
        return len(record.rows())

    assert forked(unshared, 2, tmp_path) == [0, 0]


@pytest.mark.gpu
def test_accelerate_starts_a_notebook_on_two_gpus(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "-m",
        "llmeco_nb.training.parallel",
        "causal",
        "-p",
        "steps=3",
        "-p",
        "baseline_tokens=0",
        "-p",
        f"out={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert open_record(tmp_path / "run", "causal").metrics["steps"] == 3


@pytest.mark.parametrize(
    "name,device,kind,says",
    [
        ("refuses", "cpu", UsageError, "1 of 1, and this is said in plain words"),
        ("diverges", "cpu", DataError, "The loss is nan"),
        ("refuses", "abacus", UsageError, "device is 'abacus'"),
    ],
)
def test_a_refusal_comes_out_as_itself(tmp_path, name, device, kind, says):
    """Of the function as of `init_process_group`. What is a kind of `DataError`, such as
    `UnstableStep`, comes out as that."""

    def refusing():
        with pytest.raises(kind):
            launched_main(f"{CASES}:{name}", "{}", str(tmp_path), device)

    forked(refusing, 1, tmp_path, joined=False)
    with pytest.raises(kind, match=says):
        raise_worker_error(tmp_path)


def gone(folder, processes):
    "Whether the processes that wrote their ids are there no more; within five seconds."
    pids, until = (
        [
            int(f.read_text())
            for f in map(folder.joinpath, map(str, range(processes)))
            if f.exists()
        ],
        time.monotonic() + 5,
    )
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return bool(pids) and os.getpid() not in pids and not any(map(psutil.pid_exists, pids))


def test_a_death_ends_all(tmp_path):
    with pytest.raises(CellError, match="SIGKILL|Signal 9|exitcode"):
        launch(f"{CASES}:dies", 2, timeout=60, folder=str(tmp_path))
    assert gone(tmp_path, 2)


def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="RANK is not set"):
        with init_process_group():
            pass
    with pytest.raises(UsageError, match="device is 'tpu'"):
        resolve_device("tpu")
    with pytest.raises(UsageError, match="nproc is 0"):
        run_distributed(cases.training, 0)(create_record(tmp_path, "toy"))
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="sees no GPU"):
            resolve_device("cuda")
    with pytest.raises(UsageError, match="Write: torchrun"):
        run_notebook(["causal", "-p", "steps"])
    with pytest.raises(UsageError, match="no parameter stepz"):
        run_notebook(["causal", "-p", "stepz=3"])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="device is 'abacus'"):
        with init_process_group("abacus"):
            pass
