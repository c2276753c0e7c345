"""Runs notebooks, each in a process of its own: forked from one that has imported the heavy
libraries already, or started from nothing.

What a notebook runs is the same either way: the cells that `nbdev_test` runs, in its shell, in an
empty namespace, with a session and a runs folder of its own. Only the seconds that each would spend
on importing torch are spent once. The package under test is never imported ahead.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent

# What starts threads as it is imported must not stand here, for a child has none of them (the one
# of pyarrow's jemalloc starts itself again). What is not installed is passed over.
AHEAD = [
    "nbdev.test",
    "pandas",
    "scipy.stats",
    "matplotlib.pyplot",
    "sklearn.linear_model",
    "sklearn.feature_extraction.text",
    "torch",
    "transformers",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.trainer",
    "datasets",
]


@cache
def server():
    "The context whose processes are forked from the one that has imported `AHEAD`."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(AHEAD)
    return context


def run_cells(path: str, flags: list[str]):
    "Run the notebook at `path` in this process, and exit with 0 if every cell ran."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    well, _ = test_nb(Path(path), get_config().tst_flags.split(), flags)
    sys.exit(0 if well else 1)


def _child(path: str, flags: list[str], folder: str, environment: dict[str, str]):
    os.setsid()
    said = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(descriptor, standard)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(TESTS.parent)
    sys.path[:] = [p for p in sys.path if p != str(TESTS)]  # no notebook may import from the tests
    run_cells(path, flags)


def session_folder(tmp_path_factory) -> Path:
    "The folder for temporary files of this session, which all workers of pytest-xdist share."
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@cache
def fixtures() -> list[str]:
    "Names of the folders under runs/scratch that hold what chapters make for themselves, once."
    texts = (f.read_text(encoding="utf-8") for f in (TESTS.parent / "llmeco_nb").rglob("*.py"))
    found = {name for text in texts for name in re.findall(r'cached_fixture\(\s*"([\w-]+)"', text)}
    return sorted(found)


def share_fixtures(runs: Path, shared: Path):
    """Let a notebook, whose runs folder is `runs`, find in the folder `shared` what others have
    made, and leave there what it makes. A small corpus or model costs seconds of each of forty
    notebooks; it is named by a hash of all that it depends on, made under a lock, and only read."""
    (runs / "scratch").mkdir(parents=True)
    for name in fixtures():
        (shared / name).mkdir(parents=True, exist_ok=True)
        (runs / "scratch" / name).symlink_to(shared / name)


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "LLMECO_RUNS": str(folder / "runs")}


def _end_group(pid: int):
    "Kill whatever the process `pid`, which leads a group, has started and left behind."
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def fork(path: Path, flags: list[str], folder: Path, seconds: float) -> int | None:
    """Run a notebook in a warm child, with `folder/runs` as its runs folder and what it says in
    `folder/log`. Returns its exit status, a signal's number below zero, or None when it was still
    at work after `seconds`."""
    given = (str(path), flags, str(folder), _environment(folder))
    process = server().Process(target=_child, args=given)
    process.start()
    process.join(seconds)
    status = process.exitcode
    _end_group(process.pid)
    process.join()
    return status


def start_anew(path: Path, flags: list[str], folder: Path, seconds: float) -> int | None:
    "The same as `fork`, in a Python that has imported nothing."
    with open(folder / "log", "wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(path), *flags],
            cwd=TESTS.parent,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        _end_group(process.pid)
        process.wait()
    return status


if __name__ == "__main__":
    run_cells(sys.argv[1], sys.argv[2:])
