"""What every test finds: a home of its own, no network, the outside data, and markers for what this
machine may lack."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

import pytest
import slow
from hypothesis import settings
from warm import session_folder

settings.register_profile(
    "shared machine", deadline=None
)  # how long an example takes says more of the neighbours than of the code
settings.load_profile("shared machine")

ROOT = Path(__file__).resolve().parent.parent
HOME = Path(tempfile.mkdtemp(prefix="llmeco-tests-"))

# Set before anything imports a library that reads them at import. A test that wants otherwise says
# so with monkeypatch.
os.environ.update(
    HOME=str(HOME),
    XDG_CACHE_HOME=str(HOME / ".cache"),
    XDG_CONFIG_HOME=str(HOME / ".config"),
    HF_HOME=str(HOME / "hf"),
    MPLBACKEND="agg",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two threads on a busy machine can be several times slower than one
for name in (
    # each process that the tests start would compile the package anew
    "PYTHONDONTWRITEBYTECODE",
    "LLMECO_RUNS",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "HF_MODULES_CACHE",
    "HF_EVALUATE_CACHE",
    "TRANSFORMERS_CACHE",
):
    os.environ.pop(name, None)
sys.path.insert(0, str(ROOT))  # the checkout, whatever is installed
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def cores() -> int:
    "Processors that these tests may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def available(what: str) -> bool:
    "Whether this machine has a `gpu`, a `docker` daemon, or leave to ask the `hub`."
    if what == "hub":
        return os.environ["HF_HUB_OFFLINE"] == "0"
    if what == "docker":
        return (
            bool(shutil.which("docker"))
            and subprocess.run(["docker", "info"], capture_output=True, timeout=60).returncode == 0
        )
    import torch

    return torch.cuda.is_available()


MARKERS = dict(
    gpu="needs a CUDA device, and torch sees none",
    docker="needs Docker, and no daemon answers",
    hub="needs the Hugging Face hub: set HF_HUB_OFFLINE=0 to ask it",
)


def pytest_addoption(parser):
    text = "write to tests/slow.tsv which of the tests that run are slow; on an idle machine"
    parser.addoption("--note-slow", action="store_true", help=text)
    text = "minutes for which tests/test_soak.py keeps a server under load; 0: it is skipped"
    parser.addoption("--soak", type=float, default=0, metavar="MINUTES", help=text)


def pytest_configure(config):
    for name, reason in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {reason}; skipped then")
    text = f"takes more than {slow.LIMIT:.0f} s, as tests/slow.tsv says"
    config.addinivalue_line("markers", f"slow: {text}")


def pytest_collection_modifyitems(items):
    listed = slow.read()
    for item in items:
        if slow.short(item.nodeid) in listed:
            item.add_marker(pytest.mark.slow)
        for name, reason in MARKERS.items():
            if item.get_closest_marker(name) and not available(name):
                item.add_marker(pytest.mark.skip(reason=reason))
    if "PYTEST_XDIST_WORKER" in os.environ:
        names = [slow.short(item.nodeid) for item in items]
        items[:] = [items[k] for k in slow.longest_first(names, listed)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Half as many workers again as there are processors: a third of its time a test waits, for a
    server or for a process that it has started."""
    return cores() + cores() // 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Unless `--dist` asks for another: a file's fixtures are made once, the longest is run first."
    return slow.scheduler(config, log) if config.getvalue("dist") == "load" else None


TOOK: dict[str, float] = {}  # Seconds of the call of each test that passed


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        TOOK[slow.short(report.nodeid)] = report.duration


def pytest_sessionfinish(session):
    if session.config.getoption("note_slow") and "PYTEST_XDIST_WORKER" not in os.environ:
        slow.write(TOOK)


def pytest_unconfigure():
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of outside data sets (IMDB's official test split, BANKING77, ...), which are not
    part of this repository."""
    folder = Path(os.environ.get("LLMECO_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(
            f"needs the data sets of the tests: there is no folder {folder}; name another in "
            "LLMECO_DATA"
        )
    return folder


@pytest.fixture(scope="session")
def machine_json(tmp_path_factory):
    "This machine measured once for all toy projects."
    from llmeco_nb.locks import lock
    from llmeco_nb.runner.machine import machine

    folder = session_folder(tmp_path_factory)
    with lock(folder / ".machine.lock"):  # another worker may be measuring it
        machine(folder / "machine.json")
    return folder / "machine.json"


@pytest.fixture
def at_step():
    """`at_step(step, work)` is a callback that calls `work` as that step of a training begins;
    `work` gets the step. Without a step it does so at each."""
    from llmeco_nb.training.task import Callback

    class AtStep(Callback):
        def __init__(self, step, work):
            self.step, self.work = step, work

        def on_step_begin(self, run):
            if self.step in (None, run.state.step):
                self.work(run.state.step)

    return AtStep


@pytest.fixture
def killed_at(at_step):
    """`killed_at(step, work)` calls `work` in a process of its own, which signal 9 ends as its
    training begins that step."""
    from llmeco_nb.training.task import added_callbacks

    def killed(at: int, work):
        pid = os.fork()
        if pid == 0:
            try:
                with added_callbacks(at_step(at, lambda s: os.kill(os.getpid(), signal.SIGKILL))):
                    work()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    return killed


@pytest.fixture(scope="session")
def flags() -> list[str]:
    "The nbdev test flags (`#| gpu` and so on) whose cells can run here."
    return [name for name in MARKERS if available(name)]
