"""What pyright finds wrong with the types of the package may become fewer, never more.

pyright brings 200 MB of Node.js, so no extra installs it: `pip install "pyright[nodejs]"`."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

RUNNER_CEILING = 35  # errors in core.py and runner/
OTHER_CEILING = 470  # errors in all other modules


@pytest.mark.skipif(shutil.which("pyright") is None, reason="needs the command pyright")
def test_types_get_no_worse():
    done = subprocess.run(
        ["pyright", "--outputjson"], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [d for d in found if d["severity"] == "error"]
    package = ROOT / "llmeco_nb"
    near, far = [], []
    for d in errors:
        file = Path(d["file"]).relative_to(package)
        line = f"{file}:{d['range']['start']['line'] + 1}: {d['message']}"
        (near if file.parts[0] in ("core.py", "runner") else far).append(line)
    assert len(near) <= RUNNER_CEILING, "\n".join(near)
    assert len(far) <= OTHER_CEILING, f"{len(far)} errors:\n" + "\n".join(far)
