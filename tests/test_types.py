"""pyright finds nothing wrong with the types of the folders that are done; more may join the list.

In the other modules it finds 435 errors (`pyright` without a path: 2 minutes, 3 GB).

pyright brings 200 MB of Node.js, so no extra installs it: `pip install "pyright[nodejs]"`."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TYPED = ["core.py", "locks.py", "runner", "tasks", "deployment"]  # in llmeco_nb


@pytest.mark.skipif(shutil.which("pyright") is None, reason="needs the command pyright")
def test_types_are_right():
    paths = [f"llmeco_nb/{name}" for name in TYPED]
    done = subprocess.run(
        ["pyright", "--outputjson", *paths], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    said = json.loads(done.stdout)
    wanted = {f for p in paths for f in [ROOT / p, *(ROOT / p).rglob("*.py")] if f.suffix == ".py"}
    assert said["summary"]["filesAnalyzed"] == len(wanted)  # a wrong path is passed over in silence
    errors = [
        f"{Path(d['file']).relative_to(ROOT)}:{d['range']['start']['line'] + 1}: {d['message']}"
        for d in said["generalDiagnostics"]
        if d["severity"] == "error"
    ]
    assert not errors, "\n".join(errors)
