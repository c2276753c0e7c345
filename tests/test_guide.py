"The guide to your own text, typed as it is written: from its own 60 rows to the served answer."

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
guide = json.loads((root / "nbs" / "guide_own_text.ipynb").read_text(encoding="utf-8"))


def commands() -> list[str]:
    "The commands of the guide's fenced blocks, in their order."
    prose = ["".join(c["source"]) for c in guide["cells"] if c["cell_type"] == "markdown"]
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", "\n".join(prose), re.S | re.M)
    return [line for block in blocks for line in block.strip().splitlines()]


def write_table(folder: Path) -> Path:
    "The table that the guide's own cell writes."
    cell = next(
        "".join(c["source"])
        for c in guide["cells"]
        if c["cell_type"] == "code" and "tickets.csv" in "".join(c["source"])
    )
    imports = "import csv, tempfile\nfrom pathlib import Path\n"
    scope: dict = {}
    exec(imports + cell.replace("tempfile.mkdtemp()", repr(str(folder))), scope)
    return folder / "tickets.csv"


def free_port() -> int:
    "A port that nobody uses now."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_the_guide_names_what_the_test_types():
    named = [shlex.split(line)[:2] for line in commands()]
    assert [n for n in named if n[0] == "llmeco" and n[1] == "run"], named
    assert ["llmeco", "serve"] in named and sum(n[0] == "curl" for n in named) == 2


@pytest.mark.slow
def test_typed_as_it_is_written(tmp_path, machine_json):
    table = write_table(tmp_path)
    assert len(table.read_text(encoding="utf-8").splitlines()) == 61
    port = free_port()
    (tmp_path / "runs").mkdir()
    shutil.copy(machine_json, tmp_path / "runs")
    environment = dict(os.environ, LLMECO_RUNS=str(tmp_path / "runs"), OMP_NUM_THREADS="1")
    command = tmp_path / "bin" / "llmeco"  # of this checkout, whatever is installed
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom llmeco_nb.cli import main\n\nmain()\n")
    command.chmod(0o755)
    environment["PATH"] = f"{command.parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])

    def type_in(line: str) -> str:
        "Run a line as a shell would, and return what it printed."
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, text=True, capture_output=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    server, asked, said = None, None, []
    try:
        for line in commands():
            if line == "llmeco serve":
                words = [str(command), "serve", "--port", str(port)]
                server = subprocess.Popen(words, cwd=tmp_path, env=environment)
                ready = f"http://127.0.0.1:{port}/readyz"
                for _ in range(300):
                    try:
                        urllib.request.urlopen(ready, timeout=1)
                        break
                    except OSError:
                        time.sleep(0.1)
                continue
            if line.startswith("curl"):
                line = line.replace("localhost:8000", f"127.0.0.1:{port}")
                line = line.replace('"..."', json.dumps((asked or {}).get("request_id")))
                said.append(json.loads(type_in(line)))
                asked = asked or said[-1]
                continue
            if "--next" in line and server is not None:
                server.terminate()
                server.wait(20)
            said.append(type_in(line))
    finally:
        if server is not None and server.poll() is None:
            server.kill()
    answers = [s for s in said if isinstance(s, dict)]
    assert answers[0]["answers"][0]["label"] in ("billing", "delivery", "returns")
    assert answers[1]["stored"] and answers[1]["label"] == "delivery"
    assert list((tmp_path / "runs").glob("*/report/index.html"))
    runs = [p for p in (tmp_path / "runs").glob("*/run.json") if not p.parent.is_symlink()]
    rounds = [json.loads(p.read_text(encoding="utf-8")) for p in runs]
    assert sorted(r["round"] for r in rounds) == [1, 2]
