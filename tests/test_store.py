"""Names that two containers may share, signals while something is waited for, and what stands
around a run: its folder for temporary files, its database, the parameters that were set for it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from toy_project import ToyProject, imported_with, kernels

from llmeco_nb.core import write_bytes
from llmeco_nb.locks import lock

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def project(tmp_path, machine_json):
    return ToyProject(tmp_path / "project", machine_json)


def until(true, seconds=30.0):
    "Wait until `true()` is; returns whether it came to that."
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(found)


# -- names


def test_writers_with_one_process_id_do_not_meet(tmp_path):
    "Threads have one, as the first processes of two containers that share a folder do."
    file, failed = tmp_path / "run.json", []

    def write(who: int):
        for k in range(40):
            try:
                write_bytes(file, f"{who} {k}".encode() * 50)
            except OSError as e:
                failed.append(e)

    writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    assert not failed
    text = file.read_text()
    assert text == text[: len(text) // 50] * 50, "two wrote into one file"
    assert [f.name for f in tmp_path.iterdir()] == ["run.json"]


HOLDER = """
import sys, time
from llmeco_nb.runner.kernel import socket_folder
with socket_folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_living_runner_keeps_its_sockets_and_a_dead_one_does_not():
    from llmeco_nb.runner.kernel import socket_folder

    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    theirs = Path(holder.stdout.readline().strip())
    assert str(holder.pid) not in theirs.name
    with socket_folder():
        assert theirs.is_dir()
    holder.kill()
    holder.communicate()
    assert theirs.is_dir()
    with socket_folder() as ours:
        assert not theirs.exists() and ours.is_dir() and ours.stat().st_mode & 0o77 == 0


# -- a folder for temporary files with a long name; and what is on the disk before the rename


def test_a_long_temporary_folder_and_an_entry_that_is_wholly_on_the_disk(project, tmp_path):
    (long := tmp_path / ("t" * 120)).mkdir()
    noted = tmp_path / "noted"
    words = ("run", "--profile", "toy", "--only", "make")
    code, out, err = project.llmeco(*words, TMPDIR=str(long), FSYNCED=str(noted))
    assert code == 0, (out, err)
    lines = noted.read_text().splitlines()
    [entry] = [e for e in project.entries() if e.name.startswith("make-")]
    renamed = lines.index(f"renamed {entry}.partial")
    for name in ("", "/numbers", "/numbers/00.txt", "/metrics.json", "/notebook.ipynb"):
        assert f"{entry}.partial{name}" in lines[:renamed], name or "the entry itself"


def test_the_doctor_starts_a_kernel_whatever_the_temporary_folder_is_called(tmp_path):
    (long := tmp_path / ("t" * 120)).mkdir()
    code = (
        "from pathlib import Path; from llmeco_nb.runner.doctor import findings; "
        "from llmeco_nb.runner.stages import StageRegistry; "
        f"found = findings(StageRegistry.find(), Path({str(tmp_path / 'runs')!r})); "
        "print(next(f for f in found if f[0] == 'kernel'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(long)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and "('kernel', True" in done.stdout, (done.stdout, done.stderr)


def test_without_a_short_folder_a_kernel_speaks_through_tcp(tmp_path, monkeypatch):
    from llmeco_nb.runner import kernel

    nbformat = kernel.import_nbformat()
    monkeypatch.setattr(kernel, "longest_socket", 20)
    cells = [nbformat.v4.new_code_cell("6 * 7")]
    about = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    kernel.execute(nbformat.v4.new_notebook(cells=cells, metadata=about), tmp_path / "n.ipynb", {})
    [done] = nbformat.read(tmp_path / "n.ipynb", 4).cells
    assert done.outputs[0]["data"]["text/plain"] == "42"


# -- locks and signals


def test_a_child_does_not_keep_its_parents_lock(tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "from llmeco_nb.locks import lock\n"
        f"with lock({str(tmp_path / 'held')!r}):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        time.sleep(20)\n"
        "        sys.exit()\n"
        "    print(child, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(done.stdout.readline()))
    try:
        done.wait(10)
        assert child.is_running()
        with lock(tmp_path / "held", wait=False):
            pass
    finally:
        child.kill()
        done.stdout.close()


def test_who_waits_for_another_runner_can_be_stopped_at_once(project):
    """By Ctrl-C and by SIGTERM, with a sentence; and the one who works can be too, and leaves no
    kernel."""
    words = ("run", "--profile", "toy", "--only", "make")
    first = project.start(*words, "-p", "make.pause=5")
    assert until(lambda: list((project.runs / "store").glob("make-*.partial")))
    second, third = project.start(*words), project.start(*words)
    for p in (second, third):
        line = ""
        while "another runner is making it, waiting" not in line:
            line = p.stdout.readline()
            assert line, p.stderr.read()
    begun = time.monotonic()
    second.send_signal(signal.SIGINT)
    third.send_signal(signal.SIGTERM)
    told = [(p.communicate(timeout=20)[1], p.returncode) for p in (second, third)]
    assert time.monotonic() - begun < 4
    assert told[0] == ("llmeco: stopped. Run again to carry on.\n", 130)
    assert told[1] == ("llmeco: stopped by SIGTERM. Run again to carry on.\n", 143)
    assert until(lambda: list((project.runs / "store").glob("make-*.partial/resume")))
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=20)
    assert first.returncode == 143 and "Traceback" not in err, err
    assert err.endswith("llmeco: stopped by SIGTERM. Run again to carry on.\n")
    assert until(lambda: not kernels(project), 3), "a kernel is still at work"


SLEEP = "import os, time; open(os.environ['LLMECO_RUNS'] + '/asleep', 'w'); time.sleep(60)"


def ends_without_a_kernel(project, runner, number: int):
    "Send the signal once a cell sleeps; the runner ends soon, with a sentence."
    try:
        assert until((project.runs / "asleep").exists)
        begun = time.monotonic()
        runner.send_signal(number)
        _, err = runner.communicate(timeout=20)
    finally:
        runner.kill()
    assert time.monotonic() - begun < 10, "what was at work was waited for"
    assert runner.returncode == 128 + number and "Traceback" not in err, err
    assert "Run again to carry on." in err
    assert until(lambda: not kernels(project), 3), "a kernel is still at work"


def test_an_interrupt_while_a_page_is_drawn_leaves_no_kernel(project):
    project.run("--only", "make")
    project.edit("71_make", "caption(open", f"{SLEEP}; caption(open")
    runner = project.start("run", "--profile", "toy", "--only", "make")
    ends_without_a_kernel(project, runner, signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_outputs_are_made_leaves_no_kernel(project, number):
    "The signal reaches the command alone, not the processes that it has started."
    for module in imported_with("site.outputs"):
        project.bring(module)
    for notebook in ("71_make", "72_train"):
        project.edit(notebook, "import json\n", f"{SLEEP}\n")
    runner = project.start("outputs", "71_make", "72_train")
    ends_without_a_kernel(project, runner, number)


ENDLESS = """
import signal, time
from pathlib import Path
from llmeco_nb.runner.kernel import execute, import_nbformat
from llmeco_nb.terminal import terminate
signal.signal(signal.SIGTERM, terminate)
v4 = import_nbformat().v4
about = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
code = "import os, time; open(asleep, 'w').write(str(os.getpid())); time.sleep(60)"
cell = v4.new_code_cell(code)
nb, folder = v4.new_notebook(cells=[cell], metadata=about), Path({folder!r})
cell.source = cell.source.replace("asleep", repr(str(folder / "asleep")))
try:
    execute(nb, folder / "endless.ipynb", dict())
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(20)
"""


def test_an_interrupted_execution_leaves_no_kernel_while_its_process_lives(tmp_path):
    "As in a notebook of JupyterLab, where whoever interrupts a cell goes on in the same process."
    words = [sys.executable, "-c", ENDLESS.format(folder=str(tmp_path))]
    runner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert until(lambda: (tmp_path / "asleep").exists() and (tmp_path / "asleep").read_text())
        kernel = psutil.Process(int((tmp_path / "asleep").read_text()))
        begun = time.monotonic()
        runner.send_signal(signal.SIGTERM)
        assert runner.stdout.readline() == "interrupted\n"
        assert time.monotonic() - begun < 3
        assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE
    finally:
        runner.kill()
        runner.communicate()


# -- parameters that are taken back


def test_a_parameter_is_taken_back(project):
    from llmeco_nb.core import read_json

    overrides = lambda: read_json(project.runs / "toy-1" / "run.json")["overrides"]
    project.run("--only", "make", "-p", "make.n=3", "-p", "train.factor=7")
    assert overrides() == {
        "make": {"n": 3},
        "train@a": {"factor": 7},
        "train@b": {"factor": 7},
    }
    code, _, err = project.llmeco("run", "--profile", "toy", "--unset", "make.pause")
    assert code == 2 and "--unset make.pause: it is not set in this run" in err
    assert "Set are: make.n, train@a.factor, train@b.factor." in err
    code, _, err = project.llmeco("run", "--profile", "toy", "--new-run", "--unset", "make.n")
    assert code == 2 and "Nothing is set." in err
    assert [p.name for p in project.runs.glob("toy-*")] == ["toy-1"]
    made = project.run("--only", "make", "--unset", "make.n", "--unset", "train@b.factor")
    assert made == {"make": "made"} and overrides() == {"train@a": {"factor": 7}}
