"""Exactly the right stages run again, or only their show cells, and `llmeco stages` says why."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy_project import (
    ToyProject,
)

ROOT = Path(__file__).resolve().parent.parent
ALL = ["make", "train@a", "train@b", "compare"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, machine_json):
    "A toy project with a finished run; tests work on copies of it."
    project = ToyProject(tmp_path_factory.mktemp("identity") / "project", machine_json)
    assert project.run() == dict.fromkeys(ALL, "made")
    assert project.run() == dict.fromkeys(ALL, "current")
    return project


@pytest.fixture
def project(finished, tmp_path):
    copy = object.__new__(ToyProject)
    copy.folder, copy.runs = tmp_path / "project", tmp_path / "project" / "runs"
    shutil.copytree(finished.folder, copy.folder, symlinks=True)
    return copy


NOTHING, EVERYTHING = {}, dict.fromkeys(ALL, "made")
PAGE = {"make": "page"}
TRAINS = {"train@a": "made", "train@b": "made", "compare": "made"}
# after these edits of numbers' maker the numbers are the same, so nothing that reads them runs
SAME_NUMBERS = {"make": "made"}
TABLE = {
    "markdown edited": (
        lambda h: h.edit("71_make", "Writes numbers", "Writes down numbers"),
        NOTHING,
        "",
    ),
    "comment in the run cell": (
        lambda h: h.edit(
            "71_make", "record.rewind(rows)", "record.rewind(rows)  # drop what came later"
        ),
        NOTHING,
        "",
    ),
    "comment in a parameter": (
        lambda h: h.edit("71_make", "# how many", "# how many numbers"),
        NOTHING,
        "",
    ),
    "comment in a function": (
        lambda h: h.edit("70_toys", "return x * SCALE", "return x * SCALE  # thrice"),
        NOTHING,
        "",
    ),
    "docstring": (
        lambda h: h.edit("70_toys", "Used by the stage make.", "Used by make."),
        NOTHING,
        "",
    ),
    "show cell": (
        lambda h: h.edit(
            "71_make",
            "caption(open_record(out, 'make').metrics['total'])",
            "caption(2 * open_record(out, 'make').metrics['total'])",
        ),
        PAGE,
        "cell 71-4 changed",
    ),
    "function a show cell uses": (
        lambda h: h.edit("70_toys", "the sum is", "the sum was"),
        PAGE,
        "function toys.caption changed",
    ),
    "run cell, same result": (
        lambda h: h.edit("71_make", "sum(done)", "sum(list(done))"),
        SAME_NUMBERS,
        "cell 71-3 changed",
    ),
    "outputs stored in the notebook": (
        lambda h: h.store_outputs("71_make"),
        NOTHING,
        "",
    ),
    "function used": (
        lambda h: h.edit("70_toys", "return x * SCALE", "return SCALE * x + 1"),
        EVERYTHING,
        "function toys.scaled changed",
    ),
    "constant used": (
        lambda h: h.edit("70_toys", "SCALE = 3", "SCALE = 4"),
        EVERYTHING,
        "function toys.SCALE changed",
    ),
    "function not used": (lambda h: h.edit("70_toys", "return x + 1", "return x + 2"), NOTHING, ""),
    "function of core not used": (
        lambda h: h.edit_core("if not 0 <= seed < 2**32:", "if not 0 <= seed < 2**31:"),
        NOTHING,
        "",
    ),
    "function of core used": (
        lambda h: h.edit_core(
            "indent=1, ensure_ascii=False, allow_nan=False",
            "ensure_ascii=False, indent=1, allow_nan=False",
        ),
        EVERYTHING,
        "function core.write_json changed",
    ),
    "import only lessons use": (
        lambda h: h.edit(
            "71_make", "import json\nimport time", "import json\nimport math\nimport time"
        ),
        NOTHING,
        "",
    ),
    "a default one instance takes": (
        lambda h: h.edit("72_train", "factor: int = 2", "factor: int = 3"),
        {"train@a": "made", "compare": "made"},
        "parameter factor: 2 → 3",
    ),
}


@pytest.mark.parametrize("change", TABLE)
def test_what_runs_again_and_why(project, change):
    act, expected, reason = TABLE[change]
    before = project.artifacts()
    act(project)
    said = project.why()
    if reason:
        assert any(reason in why for _, why in said.values()), said
    else:
        assert all(state == "current" for state, _ in said.values()), said
    assert project.run() == {**dict.fromkeys(ALL, "current"), **expected}
    assert project.run() == dict.fromkeys(ALL, "current")
    if expected in (NOTHING, PAGE):
        assert project.artifacts() == before


def test_a_parameter_on_the_command_line(project):
    assert project.why("-p", "train@a.factor=7")["train@a"] == ("stale", "parameter factor: 2 → 7")
    assert project.run("-p", "train@a.factor=7") == {
        "make": "current",
        "train@a": "made",
        "train@b": "current",
        "compare": "made",
    }
    assert project.run() == dict.fromkeys(ALL, "current")  # it stays with the run
    # both instances with one value are one and the same work: the store has it already
    assert project.run("-p", "train.factor=7") == {
        "make": "current",
        "train@a": "current",
        "train@b": "current",
        "compare": "made",
    }
    assert (
        project.run("--new-run")["train@a"] == "current"
    )  # a fresh run starts from the profile's values; the store still has them


def test_a_library_version_is_recorded_and_changes_nothing(project):
    site = project.folder / "llmeco_nb" / "runner" / "machine.py"
    # versions() reads installed metadata; a newer papermill is played by a metadata folder that
    # comes first on the path
    fake = project.folder / "papermill-99.0.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: papermill\nVersion: 99.0\n")
    assert site.exists() and project.run() == dict.fromkeys(ALL, "current")
    from llmeco_nb.core import read_json

    assert project.run("--force", "--only", "make")["make"] == "made"
    assert (
        read_json(project.runs / "toy-1" / "make" / "manifest.json")["versions"]["papermill"]
        == "99.0"
    )


def test_outside_source_touched_and_changed(project):
    source = project.folder / "words.txt"
    source.write_text("some words")
    assert project.run("-p", "make.source=words.txt") == EVERYTHING
    os.utime(source, (1, 1))
    assert project.run() == dict.fromkeys(ALL, "current")
    source.write_text("some other words")
    assert "source source changed" in project.why()["make"][1]
    code, _, err = project.llmeco("run", "--profile", "toy")
    assert code == 8 and "words.txt" in err and "--accept-changed" in err and "Traceback" not in err
    assert project.run("--accept-changed") == EVERYTHING
    source.write_text("some words")  # the old content again: it is still in the store
    assert project.run("--accept-changed") == dict.fromkeys(ALL, "current")


def test_second_round(project):
    first = project.artifacts("toy-1")
    assert project.run("--next") == {
        "make": "current",
        "train@a": "current",
        "train@b": "made",
        "compare": "made",
    }
    from llmeco_nb.core import read_json

    second = read_json(project.runs / "toy-2" / "run.json")
    assert second["parent"] == "toy-1" and second["round"] == 2
    assert project.artifacts("toy-1") == first
    assert (
        read_json(project.runs / "toy-2" / "train@b" / "model")["total"]
        == 2 * read_json(project.runs / "toy-1" / "train@b" / "model")["total"]
    )
    assert project.run() == dict.fromkeys(ALL, "current")  # continues the second round
    assert (project.runs / "latest").resolve() == (project.runs / "toy-2").resolve()


def test_tampered_output_is_made_again_with_a_warning(project):
    before = project.artifacts()
    (project.runs / "toy-1" / "make" / "numbers" / "00.txt").write_text("666\n")
    assert "numbers was changed after it was made" in project.why()["make"][1]
    code, out, err = project.llmeco("run", "--profile", "toy")
    assert code == 0 and "numbers is not what it was when it was made" in out
    assert project.artifacts() == before


def test_only_from_and_force(project):
    assert project.run("--only", "train@a") == {"train@a": "current"}
    assert project.run("--from", "train@b", "--force") == {"train@b": "made", "compare": "made"}
    assert project.run("--force") == EVERYTHING


def test_export_out_of_step_is_refused(project):
    module = project.folder / "llmeco_nb" / "toys.py"
    module.write_text(module.read_text().replace("SCALE = 3", "SCALE = 4"))
    code, _, err = project.llmeco("run", "--profile", "toy")
    assert code == 7 and "70_toys.ipynb" in err and "nbdev_export" in err and "Traceback" not in err


def test_plain_papermill_with_a_flat_file(project, tmp_path):
    """The notebooks are ordinary papermill notebooks; the profile's flat files are ordinary
    parameter files."""
    import subprocess
    import sys

    numbers = (project.runs / "toy-1" / "make" / "numbers").resolve()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "nbs/72_train.ipynb",
            str(tmp_path / "done.ipynb"),
            "-f",
            "nbs/profiles/toy/train@b.yaml",
            "-p",
            "numbers",
            str(numbers),
            "-p",
            "out",
            str(tmp_path / "record"),
        ],
        cwd=project.folder,
        env=project.env(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    from llmeco_nb.core import read_json

    assert read_json(tmp_path / "record" / "model") == read_json(
        project.runs / "toy-1" / "train@b" / "model"
    )


# -- the same under every Python

KEYS = """
import json
from llmeco_nb.runner.stages import StageRegistry
from llmeco_nb.runner.identity import Notebook, key_of, show_parts, work_parts
registry, found = StageRegistry.find(), {}
for path in registry.notebooks:
    notebook = Notebook.read(path)
    found[path.stem] = [key_of(work_parts(notebook, registry.package, {}, {}, {})), \
key_of(show_parts(notebook, registry.package))]
print(json.dumps(found))
"""


def interpreter(name: str) -> str | None:
    """The path of `python3.12`, say: on the path, or among the versions of a pyenv whose shim is on
    the path."""
    shim = shutil.which(name)
    if shim is None:
        return None
    installed = sorted(Path(shim).parent.parent.glob(f"versions/*/bin/{name}"))
    return str(installed[0]) if installed else None if Path(shim).parent.name == "shims" else shim


def keys_under(python: str) -> dict:
    "The keys of all notebooks as the interpreter `python` computes them, without any library."
    env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    done = subprocess.run(
        [python, "-B", "-c", KEYS], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def keys_here() -> dict:
    return keys_under(sys.executable)


@pytest.mark.parametrize("python", ["python3.11", "python3.12", "python3.13", "python3.14"])
def test_keys_are_the_same_under_every_python(python, keys_here):
    "A result must not read as stale because the interpreter was upgraded."
    other = interpreter(python)
    if other is None:
        pytest.skip(f"there is no {python} here")
    assert len(keys_here) > 30 and keys_under(other) == keys_here
