"""Measure the craft of package, notebooks and tests: width, parameters, names, docstrings, size.

python tests/craft.py            print a table of counts
python tests/craft.py --list     and every place found
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmeco_nb"
WIDTH = 100
MOST_PARAMETERS = 8


@dataclass(frozen=True)
class Place:
    "Where something was found: a file, a cell or line in it, and what it is."

    file: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.where}: {self.what}"


def notebooks() -> list[Path]:
    "All notebooks of the repository, in the order of their numbers."
    nbs = ROOT / "nbs"
    found = [*nbs.glob("*.ipynb"), *nbs.glob("[0-9]*_*/*.ipynb")]
    return sorted(found, key=lambda p: p.name)


def code_cells(path: Path) -> Iterator[tuple[str, str]]:
    "(id, source) of a notebook's code cells."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            yield cell["id"], "".join(cell["source"])


@cache
def sources() -> list[tuple[str, str, str]]:
    "(file, place, code) of everything that is written by hand: notebooks' cells and tests."
    found = []
    for path in notebooks():
        name = path.relative_to(ROOT).as_posix()
        found += [(name, cell_id, source) for cell_id, source in code_cells(path)]
    for path in sorted((ROOT / "tests").glob("*.py")):
        found.append((f"tests/{path.name}", "", path.read_text(encoding="utf-8")))
    return found


def plain_python(source: str) -> str:
    "A cell without IPython's magics and shell lines."
    kept = ("" if line.startswith(("%", "!")) else line for line in source.splitlines())
    return "\n".join(kept)


def wide_lines() -> list[Place]:
    "Lines of code over 100 columns."
    return [
        Place(name, where or str(number), f"{len(line)} columns: {line.strip()[:60]}")
        for name, where, source in sources()
        for number, line in enumerate(source.splitlines(), 1)
        if len(line) > WIDTH
    ]


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[ast.arg]:
    "Parameters of any kind, but for the object itself."
    a = node.args
    found = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs]
    found += filter(None, [a.kwarg])
    return [p for p in found if p.arg not in ("self", "cls")]


def many_parameters() -> list[Place]:
    "Functions with more than eight parameters of any kind."
    return [
        Place(name, where or str(n.lineno), f"{n.name} has {len(parameters_of(n))} parameters")
        for name, where, source in sources()
        for n in ast.walk(ast.parse(plain_python(source)))
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
        and len(parameters_of(n)) > MOST_PARAMETERS
    ]


def modules() -> dict[str, str]:
    "Dotted name within the package -> source, of every exported module."
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p.read_text(encoding="utf-8")
        for p in sorted(PACKAGE.rglob("*.py"))
        if p.name not in ("_modidx.py", "__init__.py")
    }


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    "Functions at the top of a module, and methods of its public classes, that are public."
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        if isinstance(node, ast.ClassDef) and node.name.startswith("_"):
            continue
        for n in inside:
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.name[0] != "_":
                yield n


def undocumented_parameters() -> list[Place]:
    "Public functions whose docstring, which is what `help()` shows, leaves out a parameter."
    found = []
    for name, source in modules().items():
        for function in public_functions(ast.parse(source)):
            text = ast.get_docstring(function) or ""
            bare = [p.arg for p in parameters_of(function) if not names(text, p.arg)]
            if bare:
                found.append(
                    Place(name, str(function.lineno), f"{function.name}: {', '.join(bare)}")
                )
    return found


def names(docstring: str, parameter: str) -> bool:
    "Whether a docstring says something of a parameter."
    return re.search(rf"\b{re.escape(parameter)}\b", docstring) is not None


def unannotated() -> list[Place]:
    "Public functions with a parameter or a result that has no type."
    found = []
    for name, source in modules().items():
        for function in public_functions(ast.parse(source)):
            bare = [p.arg for p in parameters_of(function) if p.annotation is None]
            if bare:
                found.append(
                    Place(name, str(function.lineno), f"{function.name}: {', '.join(bare)}")
                )
    return found


def defined_names(tree: ast.Module) -> set[str]:
    "Names that a module binds at its top."
    found = set()
    for n in tree.body:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(n.name)
        elif isinstance(n, (ast.Assign, ast.AnnAssign)):
            targets = n.targets if isinstance(n, ast.Assign) else [n.target]
            found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


def renamed() -> list[list[str]]:
    "Rows of nbs/renamed.tsv: old, kind, where, new."
    lines = (ROOT / "nbs" / "renamed.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def stage_parameters() -> dict[str, set[str]]:
    "Stage -> names in its parameter cell."
    found = {}
    for path in notebooks():
        nb = json.loads(path.read_text(encoding="utf-8"))
        stage = nb["metadata"].get("llmeco", {}).get("stage")
        cells = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
        if stage and cells:
            body = ast.parse("".join(cells[0]["source"])).body
            found[stage] = {n.target.id for n in body if isinstance(n, ast.AnnAssign)}
    return found


def banned_names() -> list[Place]:
    "Names that the table of renamings has replaced and that are back where they were."
    defined = {name: defined_names(ast.parse(source)) for name, source in modules().items()}
    told = stage_parameters()
    found = []
    for old, kind, where, new in renamed():
        if kind in ("function", "class", "constant") and old in defined.get(where, ()):
            found.append(Place(where, kind, f"{old} is called {new}"))
        if kind == "parameter" and old in told.get(where.removeprefix("stage:"), ()):
            found.append(Place(where, kind, f"{old} is called {new}"))
    return found


def long_modules(most: int) -> list[Place]:
    "Modules with more lines than `most`."
    sizes = {name: len(source.splitlines()) for name, source in modules().items()}
    return [Place(name, "", f"{n} lines") for name, n in sizes.items() if n > most]


def reasons() -> dict[str, str]:
    "Why a module of over 400 lines stays one: name -> reason."
    rows = (ROOT / "tests" / "long_modules.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return dict(row.split("\t") for row in rows)


def reasoned_modules() -> list[Place]:
    "Modules over 400 lines, each with the reason for which it stays one."
    why = reasons()
    return [
        Place(place.file, "", f"{place.what}: {why.get(place.file, 'no reason given')}")
        for place in long_modules(400)
    ]


MEASURES = {
    "lines over 100 columns": wide_lines,
    "functions with over eight parameters": many_parameters,
    "banned names": banned_names,
    "public functions whose help leaves out a parameter": undocumented_parameters,
    "public functions with an untyped parameter": unannotated,
    "modules over 600 lines": lambda: long_modules(600),
    "modules over 400 lines": reasoned_modules,
}


def main(arguments: list[str]) -> None:
    "Print the table, and with --list every place."
    for name, measure in MEASURES.items():
        found = measure()
        print(f"{len(found):6}  {name}")
        if "--list" in arguments:
            print(*(f"          {place}" for place in found), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
