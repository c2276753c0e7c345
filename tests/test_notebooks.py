"""Every notebook runs, is in step with its module, and keeps the promises of a chapter: what is
read where, and what is imported from where."""

import ast
import builtins
import difflib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import symtable
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llmeco_nb"
SECONDS = 600  # what one notebook may take, on a busy machine, before it counts as stuck
OUTPUT_BYTES = 100_000  # what a notebook may keep of its outputs
IPYTHON = {"display", "get_ipython", "In", "Out", "_"}


def directives(source: str) -> dict[str, str]:
    "nbdev's directives in a cell: `#| export` gives {'export': ''}."
    return {
        m[1].rstrip(":"): m[2].strip()
        for m in re.finditer(r"^\s*#\s*\|\s*([\w:]+)(.*)$", source, re.M)
    }


class Cell:
    "A code cell: its role, syntax and directives."

    def __init__(self, raw: dict):
        self.id, self.source, self.tags = (
            raw.get("id"),
            "".join(raw["source"]),
            raw["metadata"].get("tags", []),
        )
        self.directives = directives(self.source)

    @cached_property
    def tree(self) -> ast.Module:
        "Syntax of the cell; IPython's magics and shell lines are left out."
        return ast.parse(
            "\n".join(
                "" if line.startswith(("%", "!")) else line for line in self.source.splitlines()
            )
        )

    @property
    def imports_only(self) -> bool:
        return bool(self.tree.body) and all(
            isinstance(n, (ast.Import, ast.ImportFrom)) for n in self.tree.body
        )

    @property
    def role(self) -> str:
        """parameters, run, show, lesson (passed over by papermill), imports, empty, or unmarked:
        code that a pipeline would run by accident."""
        found = [t for t in self.tags if t in ("parameters", "run", "show", "skip-execution")]
        if found:
            return "lesson" if found[0] == "skip-execution" else found[0]
        return "imports" if self.imports_only else "unmarked" if self.tree.body else "empty"


class Chapter:
    "A notebook as the tests below see it, read without the package that is under test."

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        self.nb = json.loads(path.read_text(encoding="utf-8"))
        self.code = [Cell(c) for c in self.nb["cells"] if c["cell_type"] == "code"]
        told = self.nb["metadata"].get("llmeco", {})
        self.contract = {k: v for k, v in told.items() if k != "outputs_of"}
        self.outputs_of = told.get("outputs_of")
        number = re.match(r"(\d+)([a-z]?)_", self.name)
        self.number = (int(number[1]), number[2]) if number else None
        self.module = next(
            (c.directives["default_exp"] for c in self.code if "default_exp" in c.directives), None
        )
        self.exports = [
            c for c in self.code if {"export", "exporti", "exports"} & c.directives.keys()
        ]

    def role(self, *roles: str) -> list[Cell]:
        return [c for c in self.code if c.role in roles]

    @cached_property
    def parameters(self) -> dict[str, ast.AnnAssign]:
        return {
            n.target.id: n
            for c in self.role("parameters")
            for n in c.tree.body
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        }

    @property
    def bench(self) -> bool:
        return self.number is not None and self.number[0] // 10 == 9


chapters = [
    Chapter(p)
    for p in sorted(
        [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs").glob("[0-9]*_*/*.ipynb")],
        key=lambda p: p.name,
    )
]
numbered = [c for c in chapters if c.number]
of_module = {c.module: c for c in chapters if c.module}
every = pytest.mark.parametrize("chapter", chapters, ids=lambda c: c.name)
complete = pytest.mark.parametrize(
    "chapter", [c for c in chapters if c.contract or c.role("parameters")], ids=lambda c: c.name
)


def fail_with(found: list[str]):
    "One failure that lists everything found."
    if found:
        pytest.fail("\n".join(found), pytrace=False)


# -- reading: each chapter's form


@every
def test_is_a_notebook_with_a_title(chapter):
    import nbformat

    ids = [c["id"] for c in chapter.nb["cells"]]
    assert ids and len(ids) == len(set(ids)), (
        f"{chapter.name}: cell ids must be there and differ; twice or more: "
        f"{sorted({i for i in ids if ids.count(i) > 1})}"
    )
    nbformat.validate(
        json.loads(chapter.path.read_text(encoding="utf-8"))
    )  # of a copy: it mends what it can in place
    first = chapter.nb["cells"][0]
    lines = [line for line in "".join(first["source"]).splitlines() if line.strip()]
    titled = (
        first["cell_type"] == "markdown"
        and len(lines) > 1
        and lines[0].startswith("# ")
        and lines[1].startswith("> ")
    )
    assert titled, (
        f"{chapter.name} must open with a Markdown cell: `# Title`, then `> one line that says "
        "what it is`"
    )


@every
def test_cells_have_a_role(chapter):
    found = []
    for c in chapter.code:
        if c.role == "unmarked":
            found.append(
                f"{chapter.name}, cell {c.id}: code without a tag would run in every pipeline; tag "
                "it skip-execution, run or show"
            )
        if len([t for t in c.tags if t in ("parameters", "run", "show", "skip-execution")]) > 1:
            found.append(f"{chapter.name}, cell {c.id}: more than one role: {c.tags}")
        if c in chapter.exports and c.role not in ("lesson", "imports"):
            found.append(
                f"{chapter.name}, cell {c.id}: an exported cell must be a lesson or imports only, "
                f"and is {c.role}"
            )
    fail_with(found)


@every
def test_imports_stand_alone(chapter):
    """The documentation runs import and export cells only, so a cell that mixes imports with work
    would be run there, too."""
    fail_with(
        [
            (
                f"{chapter.name}, cell {c.id}: imports mixed with other code; give them a cell of "
                "their own"
            )
            for c in chapter.code
            if not c.imports_only
            and any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in c.tree.body)
        ]
    )


@every
def test_outputs_are_small(chapter):
    size = sum(
        len(json.dumps(c["outputs"], ensure_ascii=False).encode())
        for c in chapter.nb["cells"]
        if c.get("outputs")
    )
    assert size <= OUTPUT_BYTES, (
        f"{chapter.name} keeps {size} bytes of outputs; {OUTPUT_BYTES} are allowed. "
        "`llmeco outputs` makes them small"
    )


@every
def test_outputs_are_those_of_the_cells(chapter):
    """Outputs in a notebook were made by the code that stands above them. That a function of the
    package has changed since is listed by `llmeco outputs --stale`."""
    from llmeco_nb.site.outputs import cells_key

    kept = [c["id"] for c in chapter.nb["cells"] if c.get("outputs")]
    if not kept and not chapter.outputs_of:
        return
    how = f"run `llmeco outputs {chapter.path.stem}`"
    assert chapter.outputs_of, f"{chapter.name} has outputs of no known origin: {how}"
    assert chapter.outputs_of["cells"] == cells_key(chapter.nb), (
        f"{chapter.name}: its cells have changed since its outputs were made: {how}"
    )


MACHINE_PATH = re.compile(
    r"(?<![\w.$}/~-])/(?:tmp|work|root|home|Users|private|opt/wheels|opt/pypi)/[\w.]+"
)


@every
def test_outputs_are_plain(chapter):
    "No paths of one machine, complaints, colours, progress bars or counts of executions."
    found = []
    for c in chapter.nb["cells"]:
        if c["cell_type"] == "code" and c["execution_count"] is not None:
            found.append(f"{chapter.name}, cell {c['id']}: execution_count is not null")
        for o in c.get("outputs", []):
            said = ["".join(o.get("text", "")), *map("".join, o.get("data", {}).values())]
            if o["output_type"] == "error" or o.get("name") == "stderr":
                found.append(f"{chapter.name}, cell {c['id']}: {o['output_type']}")
            if o.get("execution_count") is not None:
                found.append(f"{chapter.name}, cell {c['id']}: execution_count is not null")
            for text in said:
                found += [
                    f"{chapter.name}, cell {c['id']}: {m[0]!r}"
                    for m in re.finditer(rf"{MACHINE_PATH.pattern}|\x1b\[|\r(?!\n)", text)
                ]
    fail_with(found)


# -- contracts: what a stage promises


@complete
def test_parameters_are_typed_and_explained(chapter):
    cells = chapter.role("parameters")
    assert len(cells) == 1, f"{chapter.name} has {len(cells)} parameter cells; it needs one"
    found, lines = [], cells[0].source.splitlines()
    for n in cells[0].tree.body:
        if not (
            isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.value is not None
        ):
            found.append(
                f"{chapter.name}: `{ast.unparse(n)}` is not of the form `name: type = value`"
            )
            continue
        try:
            ast.literal_eval(n.value)
        except ValueError:
            found.append(f"{chapter.name}: the default of {n.target.id} is not a plain value")
        # What papermill can read
        allowed = r"(int|float|bool|str|list\[(?:int|float|str)\])|Optional\[(int|float|str)\]"
        if not re.fullmatch(allowed, ast.unparse(n.annotation)):
            found.append(f"{chapter.name}: {n.target.id} has the type {ast.unparse(n.annotation)}")
        if not re.search(r"#\s*\w", lines[n.end_lineno - 1].encode()[n.end_col_offset :].decode()):
            found.append(f"{chapter.name}: {n.target.id} has no comment")
    fail_with(found)


@complete
def test_contract_fits_the_parameters(chapter):
    found = [] if chapter.role("run") else [f"{chapter.name} has parameters and no run cell"]
    kind = lambda name: (
        ast.unparse(chapter.parameters[name].annotation) if name in chapter.parameters else None
    )
    if kind("out") != "str" or ast.literal_eval(chapter.parameters["out"].value) != "":
        found.append(f'{chapter.name} needs the parameter `out: str = ""`')
    if not chapter.bench:
        absent = [k for k in ("stage", "inputs", "outputs") if k not in chapter.contract]
        if absent:
            found.append(f"{chapter.name}: its metadata `llmeco` lacks {', '.join(absent)}")
        if not chapter.contract.get("outputs"):
            found.append(f"{chapter.name} is a stage without outputs")
        if not chapter.role("show"):
            found.append(f"{chapter.name} is a stage without a show cell")
    for i in chapter.contract.get("inputs", []):
        name, wanted = re.sub(r"[?\[\]]+$", "", i), "list[str]" if i.endswith("[]") else "str"
        if kind(name) != wanted:
            found.append(
                f"{chapter.name}: the input {i} needs a parameter `{name}: {wanted}`, found "
                f"{kind(name)}"
            )
    for name, function in chapter.contract.get("sources", {}).items():
        module, _, function_name = function.rpartition(".")
        if name not in chapter.parameters:
            found.append(f"{chapter.name}: the source {name} is not a parameter")
        file = ROOT.joinpath(PACKAGE, *module.split(".")).with_suffix(".py")
        if not file.is_file() or function_name not in definitions(file):
            found.append(
                f"{chapter.name}: the source {name} names {function}, which the package does not "
                "define"
            )
    if not isinstance(chapter.contract.get("cores", 1), int):
        found.append(f"{chapter.name}: cores is {chapter.contract['cores']!r}")
    if not isinstance(chapter.contract.get("headline", ""), str):
        found.append(
            f"{chapter.name}: headline is {chapter.contract['headline']!r}; the terminal shows one "
            "metric, given by its name"
        )
    fail_with(found)


def config_fields(chapter: Chapter) -> dict[str, tuple[object, str, str]]:
    "A config's fields from its module's source: name -> (default, comment, type as declared)."
    module, _, name = chapter.contract["config"].rpartition(".")
    source = (
        ROOT.joinpath(PACKAGE, *module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    )
    lines, found = source.splitlines(), {}
    body = next(
        n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name
    )
    for n in body:
        if not isinstance(n, ast.AnnAssign):
            continue
        value = n.value
        if isinstance(value, ast.Call):
            made_by = next(k.value for k in value.keywords if k.arg == "default_factory")
            value = made_by.body if isinstance(made_by, ast.Lambda) else ast.List([])
        comment = (
            lines[n.end_lineno - 1].encode()[n.end_col_offset :].decode().partition("#")[2].strip()
        )
        comment = (
            comment or lines[n.lineno - 1].partition("#")[2].strip()
        )  # of a field of several lines: on its first
        found[n.target.id] = (ast.literal_eval(value), comment, ast.unparse(n.annotation))
    return found


@pytest.mark.parametrize(
    "chapter", [c for c in chapters if c.contract.get("config")], ids=lambda c: c.name
)
def test_parameter_cell_equals_the_config(chapter):
    """One source of defaults: names, defaults and comments of the cell are those of the config's
    fields, in their order."""
    lines = chapter.role("parameters")[0].source.splitlines()
    told = (
        chapter.parameters.keys()
        - {"out"}
        - {re.sub(r"[?\[\]]+$", "", i) for i in chapter.contract.get("inputs", [])}
    )
    comment = lambda n: (
        lines[n.end_lineno - 1].encode()[n.end_col_offset :].decode().partition("#")[2].strip()
    )
    cell = {
        name: (ast.literal_eval(n.value), comment(n))
        for name, n in chapter.parameters.items()
        if name in told
    }
    fields = config_fields(chapter)
    assert list(cell) == list(fields)
    fail_with(
        [
            (
                f"{chapter.name}: {name} is {cell[name]} in the cell and {fields[name][:2]} in the "
                "config"
            )
            for name in cell
            if cell[name] != fields[name][:2]
        ]
    )
    marked = {
        name
        for name, (_, _, kind) in fields.items()
        if "ExecutionOnly" in kind or "EXECUTION_ONLY" in kind
    }
    assert marked == set(chapter.contract.get("execution_only", [])), (
        "the contract's execution_only names the fields that the config marks so"
    )


@pytest.mark.parametrize(
    "chapter", [c for c in chapters if c.contract.get("stage")], ids=lambda c: c.name
)
def test_papermill_says_nothing_about_valid_parameters(chapter):
    "papermill reads a parameter cell line by line, and warns of every name it has not understood."
    from papermill import inspect_notebook

    understood = inspect_notebook(str(chapter.path)).keys()
    assert chapter.parameters.keys() <= understood, chapter.parameters.keys() - understood


def definitions(file: Path) -> set[str]:
    return {
        n.name
        for n in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }


def test_names_are_taken_once():
    "One stage a name, one notebook a module; benchmarks export nothing."
    found, seen = [], {}
    for c in chapters:
        for what, name in (("stage", c.contract.get("stage")), ("module", c.module)):
            if name is None:
                continue
            if (what, name) in seen:
                found.append(f"{c.name} and {seen[what, name]} both claim the {what} {name}")
            seen[what, name] = c.name
        if c.bench and c.exports:
            found.append(f"{c.name} is a benchmark and must not export")
        if c.exports and not c.module:
            found.append(f"{c.name} exports cells and has no `#| default_exp`: they go nowhere")
    fail_with(found)


# -- names: show and run cells stand on what a pipeline gives them


def loops_inside(statement: ast.stmt) -> set[str]:
    """Names that only comprehensions of a statement bind and read. From Python 3.12 on, symtable
    counts them among those of the notebook."""
    made, elsewhere, todo = set(), set(), [(statement, False)]
    while todo:
        node, inside = todo.pop()
        inside = inside or isinstance(
            node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        )
        if isinstance(node, ast.comprehension):
            made |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
        if isinstance(node, ast.Name) and not inside:
            elsewhere.add(node.id)
        todo += [(child, inside) for child in ast.iter_child_nodes(node)]
    return made - elsewhere


def bound(statement: ast.stmt) -> set[str]:
    "Names a top-level statement binds in the notebook."
    table = symtable.symtable(ast.unparse(ast.Module([statement], [])), "cell", "exec")
    return {
        s.get_name()
        for s in table.get_symbols()
        if s.is_assigned() or s.is_imported() or s.is_namespace()
    } - loops_inside(statement)


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    "A node and what stands in it, but for the bodies of functions, whose names are their own."
    yield node
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        for child in ast.iter_child_nodes(node):
            yield from outside_functions(child)


def read(statement: ast.stmt) -> tuple[set[str], set[str]]:
    "Notebook-level names a statement reads: (at once, later when a function in it is called)."
    table = symtable.symtable(ast.unparse(ast.Module([statement], [])), "cell", "exec")
    at_once, later = {s.get_name() for s in table.get_symbols() if s.is_referenced()}, set()
    at_once |= {
        n.target.id
        for n in outside_functions(statement)
        if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)
    }
    todo = [(inner, at_once) for inner in table.get_children()]
    while todo:
        inner, names = todo.pop()
        if inner.get_type() == "function" and inner.get_name() not in (
            "lambda",
            "listcomp",
            "setcomp",
            "dictcomp",
            "genexpr",
        ):
            names = later
        names |= {s.get_name() for s in inner.get_symbols() if s.is_global() and s.is_referenced()}
        todo += [(deeper, names) for deeper in inner.get_children()]
    return at_once - loops_inside(statement), later


def stray_names(chapter: Chapter, role: str) -> list[str]:
    """Names that cells of this role read although neither imports, parameters nor earlier cells of
    the same role bind them."""
    known, found, owed = (
        IPYTHON | set(dir(builtins)) | {"__name__", "__file__"} | chapter.parameters.keys(),
        [],
        {},
    )
    for c in chapter.code:
        if c.role not in ("imports", role):
            continue
        for n in c.tree.body:
            if isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names):
                found.append((c.id, f"* from {n.module}"))
            at_once, later = read(n)
            own = bound(n)
            rebinding = isinstance(
                n, (ast.Assign, ast.AnnAssign, ast.AugAssign)
            )  # `x = f(x)` reads an x from before
            found += [
                (c.id, name) for name in sorted(at_once - known - (set() if rebinding else own))
            ]
            for name in later:
                owed.setdefault(name, c.id)
            known |= own
    found += [(i, name) for name, i in owed.items() if name not in known]
    return [
        (
            f"{chapter.name}, {role} cell {i}: the name {name} comes neither from an import, a "
            f"parameter nor an earlier {role} cell"
        )
        for i, name in found
    ]


@every
def test_show_cells_stand_on_the_record(chapter):
    fail_with(stray_names(chapter, "show"))


@every
def test_run_cells_stand_on_the_package(chapter):
    fail_with(stray_names(chapter, "run"))


# -- modules: what the notebooks export


def test_imports_run_downhill():
    """The packages' order, their independence and the absence of circles, as the import contract
    states them."""
    script = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(script), ".importlinter", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def modules() -> dict[str, ast.Module]:
    "Dotted name within the package -> syntax, of every module but the autogenerated index."
    files = [p for p in sorted((ROOT / PACKAGE).rglob("*.py")) if p.name != "_modidx.py"]
    return {
        ".".join(p.relative_to(ROOT / PACKAGE).with_suffix("").parts): ast.parse(
            p.read_text(encoding="utf-8")
        )
        for p in files
    }


def test_every_room_is_in_the_import_contract():
    "A package or module at the top that the contract does not name could import what it likes."
    contract = (ROOT / ".importlinter").read_text(encoding="utf-8")
    tops = {name.split(".")[0] for name in modules()} - {"__init__"}
    assert len(tops) <= 18, f"at most 18 rooms and files at the top: {sorted(tops)}"
    assert not [t for t in sorted(tops) if not re.search(rf"\b{t}\b", contract)]


def test_every_module_comes_from_a_notebook_and_has_a_name_of_its_own():
    names, found = modules(), []
    rooms = {name.split(".")[0] for name in names if "." in name}
    for name in names:
        stem = name.rpartition(".")[2]
        if stem == "__init__":
            continue
        if name not in of_module:
            found.append(f"{name}: no notebook exports it; remove it")
        if "." in name and stem in rooms:
            found.append(f"{name} has the name of a room")
    for room in sorted(rooms):
        if not ast.get_docstring(names[f"{room}.__init__"]):
            found.append(f"{room}: its __init__.py says in one line what the room is for")
    fail_with(found)


def test_own_modules_are_imported_by_name_alone():
    """`import_module` hides an import from the contract, from the work key and from readers: entry
    points and the stage registry only."""
    allowed = {
        ("runner.stages", "import_by_name"),
        ("training.parallel", ""),
    }  # a contract's function; the launched module under its own name
    found = []
    for name, tree in modules().items():
        for top in tree.body:
            where = (name, getattr(top, "name", ""))
            for n in ast.walk(top):
                called = ast.unparse(n.func).rpartition(".")[2] if isinstance(n, ast.Call) else ""
                if (
                    called in ("import_module", "__import__", "find_spec")
                    and PACKAGE in ast.unparse(n)
                    and where not in allowed
                ):
                    found.append(f"{name}: {ast.unparse(n)}; write an import statement")
    fail_with(found)


def test_rooms_take_public_names_only():
    "A package imports another's public names, never its private ones."
    found = []
    for name, tree in modules().items():
        room = name.split(".")[0]
        for n in ast.walk(tree):
            if not isinstance(n, ast.ImportFrom) or not n.level:
                continue
            home = name.split(".")[:-1]
            origin = [*home[: len(home) - n.level + 1], *filter(None, (n.module or "").split("."))]
            if origin and origin[0] == room:
                continue
            found += [
                f"{name} imports {a.name} from {'.'.join(origin)}"
                for a in n.names
                if a.name.startswith("_") and not a.name.startswith("__")
            ]
    fail_with(found)


def test_names_in_modules_resolve():
    """A function that reads a variable of its notebook passes there and fails on import: pyflakes
    sees it."""
    done = subprocess.run(
        [sys.executable, "-m", "pyflakes", PACKAGE], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def own_imports(tree: ast.AST) -> list[tuple[int, str, str]]:
    "(line, module, name) of every `from llmeco_nb... import name`, those in functions too."
    return [
        (node.lineno, node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level
        if (node.module or "").split(".")[0] == "llmeco_nb"
        for alias in node.names
    ]


def test_imports_inside_functions_resolve():
    """What a function imports when it is called is not seen when its module is imported: a name
    that has moved would be met by the user first."""
    places = [(p, p.read_text(encoding="utf-8")) for p in (ROOT / "tests").glob("*.py")]
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        places += [(path, source) for source in code if not source.startswith(("%", "!"))]
    assert len(places) > 1000
    found = []
    for path, source in places:
        for line, module, name in own_imports(ast.parse(source)):
            there = importlib.import_module(module)
            if hasattr(there, name):
                continue
            if not hasattr(there, "__path__") or not importlib.util.find_spec(f"{module}.{name}"):
                found.append(f"{path.name}:{line}: {module} has no {name}")
    fail_with(found)


WALL = """
import importlib, sys
banned = set(sys.argv[1].split(","))
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in banned: raise ModuleNotFoundError(f"imports {name}", name=name)
sys.meta_path.insert(0, Wall())
for module in sys.argv[2:]:
    try: importlib.import_module(module)
    except ImportError as e: print(f"{module}: {e}")
"""


def behind_a_wall(banned: list[str], modules: list[str]) -> str:
    "Import `modules` where the `banned` libraries are not to be had, and return the complaints."
    done = subprocess.run(
        [sys.executable, "-c", WALL, ",".join(banned), *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_ground_floor_is_light():
    "`import llmeco_nb.core` and `llmeco --help` need none of the heavy libraries."
    script = re.search(
        r"^console_scripts *= *llmeco=([\w.]+):", (ROOT / "settings.ini").read_text(), re.M
    )[1]
    complaints = behind_a_wall(
        [
            "torch",
            "transformers",
            "datasets",
            "evaluate",
            "pandas",
            "sklearn",
            "scipy",
            "statsmodels",
            "matplotlib",
            "nbdev",
            "papermill",
        ],
        [f"{PACKAGE}.core", script],
    )
    assert not complaints, complaints


serving = [
    c.module for c in numbered if c.module and (40 <= c.number[0] <= 48 or c.number[0] == 50)
]


@pytest.mark.skipif(not serving, reason="there is no serving notebook (40-48, 50) yet")
def test_serving_imports_no_torch():
    complaints = behind_a_wall(
        ["torch", "transformers", "nbdev"], [f"{PACKAGE}.{m}" for m in serving]
    )
    assert not complaints, complaints


def test_the_light_half_of_a_task_imports_nothing_heavy():
    "A server reads schemas and decodes answers without the libraries of training."
    light = [f"{PACKAGE}.{name}" for name in modules() if name.startswith("tasks.")]
    banned = "torch transformers datasets pandas sklearn scipy matplotlib nbdev pyarrow".split()
    assert light and not behind_a_wall(banned, light), behind_a_wall(banned, light)


def test_modules_are_what_the_notebooks_export(tmp_path):
    "Exporting everything from scratch and cleaning changes no notebook and no module."
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns("runs", ".*"))
    (tmp_path / PACKAGE).mkdir()
    shutil.copy(ROOT / PACKAGE / "__init__.py", tmp_path / PACKAGE)
    work = (
        "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; "
        "nbdev_export(); nbdev_clean()"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:nbdev", "-c", work],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = []
    for pattern in ("nbs/**/*.ipynb", f"{PACKAGE}/**/*.py"):
        ours, theirs = (
            {
                p.relative_to(top).as_posix()
                for p in top.glob(pattern)
                if p.name not in ("_modidx.py", "__init__.py") and "runs" not in p.parts
            }
            for top in (ROOT, tmp_path)
        )
        for name in sorted(ours | theirs):
            if name not in theirs:
                found.append(f"{name}: no notebook exports it; remove it")
            elif name not in ours:
                found.append(f"{name} is missing; run nbdev_export")
            elif (old := (ROOT / name).read_text(encoding="utf-8")) != (
                new := (tmp_path / name).read_text(encoding="utf-8")
            ):
                lines = list(
                    difflib.unified_diff(
                        old.splitlines(),
                        new.splitlines(),
                        "here",
                        "after nbdev_export and nbdev_clean",
                        lineterm="",
                        n=0,
                    )
                )
                found.append("\n".join([f"{name}: run nbdev_export and nbdev_clean", *lines[:12]]))
    fail_with(found)


# -- prose: nothing that is true of one machine only, nothing unfinished


def tracked_texts():
    """Every text file of the repository: those git knows or would add, or, without git, those
    outside of what runs leave behind."""
    done = subprocess.run(
        [
            "git",
            "-c",
            "safe.directory=*",
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    left = {
        ".git",
        "runs",
        "build",
        "dist",
        "_proc",
        "_docs",
        "__pycache__",
        ".pytest_cache",
        ".venv",
        "venv",
    }
    names = (
        done.stdout.split("\0")
        if done.returncode == 0
        else [
            p.relative_to(ROOT).as_posix()
            for p in ROOT.rglob("*")
            if not left & {*p.relative_to(ROOT).parts}
        ]
    )
    for name in filter(None, names):
        if not (ROOT / name).is_file() or b"\0" in (data := (ROOT / name).read_bytes())[:4096]:
            continue
        yield name, data.decode(errors="replace")


def test_no_machine_paths_and_no_leftovers():
    machine = re.compile(
        r"(?<![\w.$}/~-])/(?:work|root|home|Users|opt/wheels|opt/pypi)/[\w.]+|\b[A-Z]:\\+Users\\"
    )
    leftover = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
    found = []
    for name, text in tracked_texts():
        for number, line in enumerate(text.splitlines(), 1):
            for m in machine.finditer(line):
                found.append(f"{name}:{number}: {m[0]} is a path of one machine")
            for m in leftover.finditer(line):
                found.append(f"{name}:{number}: {m[0]} marks something unfinished")
    fail_with(found)


# -- running: every notebook from its first cell to its last

# These two start from nothing, so that what is imported ahead of the others hides nothing: an
# import that the shell or nbdev lacks would fail here.
FROM_NOTHING = {"00_core.ipynb", "20_classifier.ipynb"}


def execute(
    path: Path, flags: list[str], folder: Path, shared: Path
) -> tuple[int | None, str, Path]:
    """Run a notebook in a process and a runs folder of its own; (exit status or None for stuck,
    what it said, the runs folder). Small inputs that it makes are shared, but for those that start
    from nothing."""
    if path.name not in FROM_NOTHING:
        warm.share_fixtures(folder / "runs", shared)
    start = warm.start_anew if path.name in FROM_NOTHING else warm.fork
    status = start(path, flags, folder, SECONDS)
    return status, (folder / "log").read_text(errors="replace"), folder / "runs"


@pytest.fixture(scope="module")
def executions(request, flags, tmp_path_factory):
    """Start all wanted notebooks, as many at a time as there are cores; each test waits for its
    own. (A worker of pytest-xdist starts only its own.)"""
    wanted = (
        []
        if "PYTEST_XDIST_WORKER" in os.environ
        else [
            i.callspec.params["chapter"]
            for i in request.session.items
            if getattr(i, "originalname", "") == "test_runs_from_top_to_bottom"
        ]
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ThreadPoolExecutor(min(4, cores))
    shared = warm.session_folder(tmp_path_factory) / "fixtures"
    start = lambda chapter: pool.submit(
        execute, chapter.path, flags, tmp_path_factory.mktemp(chapter.path.stem), shared
    )
    started = {c.name: start(c) for c in wanted}
    yield lambda chapter: (started.get(chapter.name) or start(chapter)).result()
    pool.shutdown(cancel_futures=True)


@every
def test_runs_from_top_to_bottom(chapter, executions):
    status, said, runs = executions(chapter)
    if status == 0 and (headline := chapter.contract.get("headline")):
        metrics = json.loads(
            (runs / "scratch" / chapter.contract["stage"] / "metrics.json").read_text(
                encoding="utf-8"
            )
        )
        assert headline in metrics, (
            f"{chapter.name}: the headline {headline} is not among the metrics that the stage "
            f"saves: {', '.join(metrics)}"
        )
    if status == 0:
        return
    if chapter.bench and (
        absent := re.findall(r"MissingError: (.*)", re.sub(r"\x1b\[[\d;]*m", "", said))
    ):
        pytest.skip(f"{chapter.name}: {absent[-1]}")
    what = (
        f"did not end within {SECONDS} s"
        if status is None
        else f"was ended by signal {-status}"
        if status < 0
        else "failed"
    )
    if cell := re.search(r"While Executing Cell #(\d+)", said):
        what += f" in cell {chapter.nb['cells'][int(cell[1]) - 1].get('id')}"
    pytest.fail(f"{chapter.name} {what}.\n{said[-6000:]}", pytrace=False)
