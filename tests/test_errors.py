"""Bad input: each kind has its own sentence and exit status, and nobody sees a traceback."""

import os
import shutil
import subprocess
import sys

import pytest
from toy_project import (
    RUNNER,
    ToyProject,
)


@pytest.fixture
def project(tmp_path, machine_json):
    return ToyProject(tmp_path / "project", machine_json)


def refused(result, code, *words):
    "The command left with `code`, said all the words, and showed no traceback."
    got, out, err = result
    assert got == code, (got, out, err)
    for w in words:
        assert w in err, (w, err)
    assert "Traceback" not in out + err
    assert err.startswith("llmeco: ") or "Error" in err
    return err


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["run", "--profile", "tyo"], 2, ["no profile tyo", "Did you mean toy?"]),
        (["run", "--profile", "toy", "-p", "mke.n=3"], 2, ["no stage mke", "Did you mean make?"]),
        (
            ["run", "--profile", "toy", "-p", "make.nn=3"],
            2,
            ["no parameter nn", "There are: n, pause, source"],
        ),
        (["run", "--profile", "toy", "-p", "make.n=many"], 2, ["make.n is 'many'", "int"]),
        (["run", "--profile", "toy", "-p", "make.n=1.5"], 2, ["make.n is '1.5'", "valid integer"]),
        (["run", "--profile", "toy", "-p", "n=3"], 2, ["stage.name=value"]),
        (["run", "--profile", "toy", "--only", "mke"], 2, ["no stage mke"]),
        (["run", "--profile", "toy", "--only", "compare"], 2, ["compare needs train@a, train@b"]),
        (["run", "--profile", "toy", "--only", "make", "--from", "make"], 2, ["not both"]),
        (["run", "--profile", "toy", "-f", "nowhere.yaml"], 3, ["nowhere.yaml"]),
        (["run", "--profile", "toy", "--next"], 2, ["no run of the profile toy to follow"]),
        (
            ["run", "--profile", "toy", "-p", "make.source=nowhere.txt"],
            3,
            ["nowhere.txt", "not there"],
        ),
        (["stages", "--profile", "toy"], 3, ["no run of the profile toy"]),
        (["bench", "nothing"], 2, ["no benchmark nothing"]),
        (["prune", "--keep", "-1"], 2, ["keep is -1", "0 or more"]),
    ],
)
def test_names_and_values(project, words, code, said):
    refused(project.llmeco(*words), code, *said)
    assert not project.entries(), "nothing was executed"
    assert not list(project.runs.glob("toy-*")), "a command that is refused makes no run"


TYPOS = [
    ["-p", "make.source=nowhere.txt"],
    ["-p", "make.nn=3"],
    ["-p", "make.n=many"],
    ["-p", "make.n=3", "--only", "mke"],
    ["-p", "make.source=nowhere.txt"],
    ["--from", "mke"],
    ["-p", "make.n=3", "-p", "train.factor=x"],
]


def test_what_is_refused_leaves_no_trace(project):
    "Neither in the run it would have changed, nor as a new run that would count as the newest."
    project.run()
    before = (project.runs / "toy-1" / "run.json").read_bytes()
    for k, typo in enumerate(TYPOS):
        more = [[], ["--new-run"], ["--next"]][k % 3]
        code, _, err = project.llmeco("run", "--profile", "toy", *typo, *more)
        assert code in (2, 3), (typo, more, err)
        assert (project.runs / "toy-1" / "run.json").read_bytes() == before, (typo, more)
        assert [p.name for p in project.runs.glob("toy-*")] == ["toy-1"], (typo, more)
    only = project.llmeco("run", "--profile", "toy", "--new-run", "--only", "compare")
    refused(only, 2, "compare needs train@a, train@b")
    assert [p.name for p in project.runs.glob("toy-*")] == ["toy-1"]
    assert set(project.run().values()) == {"current"}


@pytest.mark.parametrize(
    "words, new", [(["run", "--fresh"], "--new-run"), (["prune", "--pretend"], "--dry-run")]
)
def test_options_that_were_renamed(project, words, new):
    refused(project.llmeco(*words), 2, f"{words[1]} is called {new} now")


@pytest.mark.parametrize(
    "text, said",
    [
        ("stages: [make", ["pipeline.yaml is not YAML"]),
        ("- make", ["holds a list"]),
        ("about: nothing", ["names no stages"]),
        ("stages: {mke: }", ["no stage mke"]),
        (
            "stages: {train: {numbers: make}}",
            ["takes numbers from make, which is not in this profile"],
        ),
        ("stages: {train: }", ["needs the input numbers", "no stage of this profile gives it"]),
        ("stages: {make: {numbers: make}}", ["no input numbers"]),
        (
            "stages: {train@a: {numbers: train@b}, train@b: {numbers: train@a}}",
            ["wait for each other"],
        ),
    ],
)
def test_profiles(project, text, said):
    (project.folder / "nbs" / "profiles" / "toy" / "pipeline.yaml").write_text(text)
    refused(project.llmeco("run", "--profile", "toy"), 2, *said)


def test_failing_cell_names_itself_and_keeps_the_notebook(project):
    project.edit("71_make", "record.rewind(rows)", "record.rewind(1 / 0)")
    err = refused(
        project.llmeco("run", "--profile", "toy"),
        5,
        "71_make.ipynb",
        "cell 71-3 (run)",
        "ZeroDivisionError: division by zero",
    )
    kept = err.rstrip().rpartition(" ")[2]
    assert os.path.exists(kept) and "ZeroDivisionError" in open(kept).read()
    project.edit("71_make", "record.rewind(1 / 0)", "record.rewind(rows)")
    assert project.run()["make"] == "made"


def test_an_output_that_was_promised(project):
    project.edit(
        "72_train", "write_json(record.artifact('model'), dict(total=total + before))", "pass"
    )
    refused(
        project.llmeco("run", "--profile", "toy"),
        5,
        "72_train.ipynb promises model and did not write it",
    )


@pytest.mark.skipif(
    not shutil.which("mount") or os.geteuid() != 0,
    reason="a small file system can be mounted by root alone",
)
@pytest.mark.parametrize("kib", [64, 132, 196])
def test_full_disk(project, kib):
    disk = project.folder / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount here")
    try:
        shutil.copy(project.runs / "machine.json", disk)
        roomy = dict(pause="0.01", n="4000")  # more rows than the disk takes
        words = (
            [
                "run",
                "--profile",
                "toy",
                *(w for k, v in roomy.items() for w in ("-p", f"make.{k}={v}")),
            ]
            if kib > 100
            else ["run", "--profile", "toy"]
        )
        (disk / "ballast").write_bytes(b"x" * (kib - 52) * 1024)
        refused(project.llmeco(*words, LLMECO_RUNS=str(disk)), 6, "No space left", "LLMECO_RUNS")
        assert not [p for p in disk.glob("store/*-*") if p.is_dir() and p.suffix != ".partial"], (
            "nothing whole was made"
        )
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        code, out, err = project.llmeco(
            "run", "--profile", "toy", "-p", "make.n=6", LLMECO_RUNS=str(disk)
        )
        assert code == 0, err  # with room again it carries on
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.skipif(
    not shutil.which("setpriv") or os.geteuid() != 0,
    reason="root's rights are dropped with setpriv",
)
def test_no_right_to_write(project):
    project.runs.chmod(0o555)
    try:
        drop = [
            "setpriv",
            "--inh-caps=-all",
            "--bounding-set=-all",
        ]  # still root, but file permissions count
        done = subprocess.run(
            [*drop, sys.executable, "-c", RUNNER, "run", "--profile", "toy"],
            cwd=project.folder,
            env=project.env(),
            capture_output=True,
            text=True,
        )
        refused((done.returncode, done.stdout, done.stderr), 6, "Permission denied", "LLMECO_RUNS")
    finally:
        project.runs.chmod(0o755)
