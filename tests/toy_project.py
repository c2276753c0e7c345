"""A small checkout of its own: the real core and runner, with four toy stages that take a second.
The tests edit it and see what runs again."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
RUNNER = "import sys; sys.argv[0] = 'llmeco'; from llmeco_nb.cli import main; main()"

TOYS = {
    "70_toys": (
        None,
        [
            ("markdown", "# Toys\n\n> What the toy stages import."),
            ("", "#| default_exp toys"),
            ("", "#| export\nfrom pathlib import Path\n\nfrom llmeco_nb.core import sha256_of"),
            (
                "",
                (
                    "#| export\n"
                    "SCALE = 3\n\n"
                    "def scaled(x):\n"
                    '    "Used by the stage make."\n'
                    "    return x * SCALE\n\n"
                    "def unused(x): return x + 1"
                ),
            ),
            (
                "",
                (
                    "#| export\n"
                    "def caption(x):\n"
                    '    "Used by a show cell."\n'
                    '    return f"the sum is {x}"'
                ),
            ),
            ("", "#| export\ndef revision(source): return sha256_of(Path(source))"),
        ],
    ),
    "71_make": (
        dict(stage="make", inputs=[], outputs=["numbers"], sources={"source": "toys.revision"}),
        [
            (
                "markdown",
                (
                    "# Make\n\n"
                    "> Writes numbers, one step after the other, and can be killed at any of them."
                ),
            ),
            (
                "parameters",
                (
                    "n: int = 6  # how many\n"
                    "source: str = ''  # a file whose length is added\n"
                    "pause: float = 0.05  # seconds a step\n"
                    "out: str = ''"
                ),
            ),
            (
                "",
                (
                    "import json\n"
                    "import time\n"
                    "from pathlib import Path\n\n"
                    "from llmeco_nb.core import create_record\n"
                    "from llmeco_nb.core import open_record\n"
                    "from llmeco_nb.toys import caption\n"
                    "from llmeco_nb.toys import scaled"
                ),
            ),
            (
                "run",
                (
                    "record = create_record(out, 'make')\n"
                    "state = record.resume/'state.json'\n"
                    "done, rows = json.loads(state.read_text()) if state.exists() else ([], 0)\n"
                    "record.rewind(rows)\n"
                    "extra = len(Path(source).read_text()) if source else 0\n"
                    "for k in record.track(range(len(done), n)):\n"
                    "    done.append(scaled(k) + extra)\n"
                    "    record.log(step=k, value=done[-1])\n"
                    "    time.sleep(pause)\n"
                    "    beside = state.with_suffix('.tmp'); "
                    "beside.write_text(json.dumps([done, len(record.rows())])); "
                    "beside.rename(state)\n"
                    "folder = record.artifact('numbers'); folder.mkdir()\n"
                    "for k, v in enumerate(done): (folder/f'{k:02d}.txt').write_text(f'{v}\\n')\n"
                    "record.save_metrics(total=sum(done))"
                ),
            ),
            ("show", "caption(open_record(out, 'make').metrics['total'])"),
        ],
    ),
    "72_train": (
        dict(stage="train", inputs=["numbers", "previous?"], outputs=["model"]),
        [
            ("markdown", "# Train\n\n> Adds the numbers up."),
            ("parameters", "factor: int = 2\nnumbers: str = ''\nprevious: str = ''\nout: str = ''"),
            (
                "",
                (
                    "import json\n"
                    "from pathlib import Path\n\n"
                    "from llmeco_nb.core import create_record\n"
                    "from llmeco_nb.core import write_json"
                ),
            ),
            (
                "run",
                (
                    "record = create_record(out, 'train')\n"
                    "total = factor * sum(int(f.read_text()) for f in "
                    "sorted(Path(numbers).iterdir()))\n"
                    "before = json.loads(Path(previous).read_text())['total'] if previous else 0\n"
                    "write_json(record.artifact('model'), dict(total=total + before))\n"
                    "record.save_metrics(total=total + before)"
                ),
            ),
        ],
    ),
    "73_compare": (
        dict(stage="compare", inputs=["model[]"], outputs=["table"]),
        [
            ("markdown", "# Compare\n\n> Puts the models side by side."),
            ("parameters", "model: list[str] = []\nout: str = ''"),
            (
                "",
                (
                    "import json\n"
                    "from pathlib import Path\n\n"
                    "from llmeco_nb.core import create_record\n"
                    "from llmeco_nb.core import write_json"
                ),
            ),
            (
                "run",
                (
                    "record = create_record(out, 'compare')\n"
                    "write_json(record.artifact('table'), "
                    "[json.loads(Path(m).read_text())['total'] for m in model])"
                ),
            ),
        ],
    ),
}
PIPELINE = """about: four toys
stages:
  make:
  train@a: {numbers: make}
  train@b: {numbers: make, previous: parent/train@b}
  compare: {model: [train@a, train@b]}
"""
DETERMINISTIC = (
    "numbers",
    "model",
    "table",
    "metrics.json",
    "log.jsonl",
)  # notebooks, manifests and page keys hold times


def cell(kind, source, name):
    if kind == "markdown":
        return dict(cell_type="markdown", id=name, metadata={}, source=source)
    imports_only = all(re.match(r"(from|import) |#\||$", line) for line in source.splitlines())
    tags = (
        [kind]
        if kind
        else []
        if imports_only and not source.startswith("#| default_exp")
        else ["skip-execution"]
    )
    return dict(
        cell_type="code",
        id=name,
        metadata=dict(tags=tags) if tags else {},
        execution_count=None,
        outputs=[],
        source=source,
    )


@cache  # also since `ast.parse` in several threads at once fails now and then in Python 3.11
def imported_with(module: str) -> set[str]:
    "Modules of the package that are imported as soon as this one is."
    found, todo = set(), [module]
    while todo:
        one = todo.pop()
        file = Path(ROOT, "llmeco_nb", *one.split(".")).with_suffix(".py")
        if one in found or not file.is_file():
            continue
        found.add(one)
        room = one.split(".")[:-1]
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                name = (node.module or "").removeprefix("llmeco_nb.")
                above = room[: len(room) - node.level + 1] if node.level else []
                todo.append(".".join([*above, *filter(None, [name])]))
    return found


class ToyProject:
    def __init__(self, folder: Path, machine: Path):
        self.folder, self.runs = folder, folder / "runs"
        (folder / "nbs" / "profiles" / "toy").mkdir(parents=True)
        shutil.copy(ROOT / "settings.ini", folder)
        shutil.copy(ROOT / "nbs" / "renamed.tsv", folder / "nbs")
        (folder / "llmeco_nb").mkdir()
        (folder / "nbs" / "0_ground").mkdir()
        for nb in sorted((ROOT / "nbs" / "0_ground").glob("0[01]*.ipynb")):
            shutil.copy(nb, folder / "nbs" / "0_ground")
            self.bring(re.search(r"default_exp ([\w.]+)", nb.read_text())[1])
        for module in imported_with("cli"):
            self.bring(module)
        shutil.copy(ROOT / "llmeco_nb" / "__init__.py", folder / "llmeco_nb")
        (folder / "nbs" / "profiles" / "toy" / "pipeline.yaml").write_text(PIPELINE)
        (folder / "nbs" / "profiles" / "toy" / "train@b.yaml").write_text("factor: 5\n")
        for name, (contract, cells) in TOYS.items():
            meta = dict(
                kernelspec=dict(name="python3", display_name="python3", language="python"),
                **(dict(llmeco=contract) if contract else {}),
            )
            nb = dict(
                cells=[cell(kind, s, f"{name[:2]}-{k}") for k, (kind, s) in enumerate(cells)],
                metadata=meta,
                nbformat=4,
                nbformat_minor=5,
            )
            (folder / "nbs" / f"{name}.ipynb").write_text(json.dumps(nb))
        self.export()
        self.runs.mkdir()
        shutil.copy(machine, self.runs / "machine.json")

    def bring(self, module):
        "Copy a module of the package, and the `__init__.py` of its room."
        file = Path("llmeco_nb", *module.split(".")).with_suffix(".py")
        (self.folder / file.parent).mkdir(parents=True, exist_ok=True)
        for one in (file, file.with_name("__init__.py")):
            shutil.copy(ROOT / one, self.folder / one)

    def export(self):
        cells = json.loads((self.folder / "nbs" / "70_toys.ipynb").read_text())["cells"]
        parts = [
            c["source"].partition("\n")[2] for c in cells if c["source"].startswith("#| export")
        ]
        (self.folder / "llmeco_nb" / "toys.py").write_text(
            "\n\n".join(parts).replace("from llmeco_nb.", "from .")
        )

    def edit(self, notebook, old, new):
        "Replace text in one cell of a notebook, and export."
        file = self.folder / "nbs" / f"{notebook}.ipynb"
        nb = json.loads(file.read_text())
        hit = [c for c in nb["cells"] if old in "".join(c["source"])]
        assert len(hit) == 1, (notebook, old, len(hit))
        hit[0]["source"] = "".join(hit[0]["source"]).replace(old, new)
        file.write_text(json.dumps(nb))
        self.export()

    def store_outputs(self, notebook):
        "Give every code cell an output, and the notebook the key of what they were made by."
        file = self.folder / "nbs" / f"{notebook}.ipynb"
        nb = json.loads(file.read_text())
        for cell in nb["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = [dict(output_type="stream", name="stdout", text=["42\n"])]
        nb["metadata"].setdefault("llmeco", {})["outputs_of"] = dict(cells="a" * 16, code="b" * 16)
        file.write_text(json.dumps(nb))

    def edit_core(self, old, new):
        "Replace text in 00_core, in the notebook and in the module."
        for file in (
            self.folder / "nbs" / "0_ground" / "00_core.ipynb",
            self.folder / "llmeco_nb" / "core.py",
        ):
            text = file.read_text()
            a, b = (
                (json.dumps(old)[1:-1], json.dumps(new)[1:-1])
                if file.suffix == ".ipynb"
                else (old, new)
            )
            assert text.count(a) == 1, (file, old, text.count(a))
            file.write_text(text.replace(a, b))

    def env(self, **more):
        dying = [str(ROOT / "tests" / "dying")] if {"DIE_AT", "FSYNCED"} & more.keys() else []
        path = [str(self.folder), *dying]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            # a module edited twice in a second would be taken for the one that was compiled
            "PYTHONDONTWRITEBYTECODE": "1",
            "LLMECO_RUNS": str(self.runs),
            "COLUMNS": "200",
            **more,
        }

    def start(self, *words, **env):
        return subprocess.Popen(
            [sys.executable, "-c", RUNNER, *words],
            cwd=self.folder,
            env=self.env(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def llmeco(self, *words, **env):
        "(exit status, standard output, standard error) of the command."
        p = self.start(*words, **env)
        out, err = p.communicate(timeout=300)
        return p.returncode, out, err

    def run(self, *words, expect=0):
        "Run the toy profile; returns {instance: 'made' | 'page' | 'current'}."
        code, out, err = self.llmeco("run", "--profile", "toy", *words)
        assert code == expect, (code, out, err)
        said = {
            m[1]: m[2] for m in re.finditer(r"^([\w@]+): (done|current|page redrawn)", out, re.M)
        }
        return {k: {"done": "made", "page redrawn": "page"}.get(v, v) for k, v in said.items()}

    def why(self, *words):
        "{instance: (state, reason)} as `llmeco stages` says."
        code, out, err = self.llmeco("stages", "--profile", "toy", *words)
        assert code == 0, err
        rows = [
            re.split(r"  +", line.strip(), maxsplit=2)
            for line in out.splitlines()[1:]
            if line.strip()
        ]
        return {r[0]: (r[1], r[2] if len(r) > 2 else "") for r in rows}

    def entries(self):
        return sorted(p for p in (self.runs / "store").glob("*-*") if p.is_dir())

    def artifacts(self, run="toy-1"):
        """{instance/artifact: sha256} of everything that must not depend on when or how often it
        was made."""
        from llmeco_nb.core import sha256_of

        return {
            f"{link.name}/{name}": sha256_of(link / name)
            for link in sorted((self.runs / run).iterdir())
            if link.is_symlink()
            for name in DETERMINISTIC
            if (link / name).exists()
        }


def kernels(project):
    "Living processes, other than runners of ours, that work for this project."
    found = []
    for p in psutil.process_iter():
        try:
            if (
                p.pid != os.getpid()
                and any("ipykernel" in w for w in p.cmdline())
                and p.environ().get("LLMECO_RUNS") == str(project.runs)
                and p.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(p)
        except (psutil.Error, OSError):
            pass
    return found
