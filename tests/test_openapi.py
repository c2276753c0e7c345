"""Requests made from the OpenAPI document, good and bad: nothing that the server replies breaks
what the document promises. The requests are schemathesis' own."""

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("schemathesis", reason="pip install schemathesis")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from smallbundle import make_bundle
from test_monitoring import Live

from llmeco_nb.deployment.key_admin import KeyAdmin
from llmeco_nb.deployment.keys import KeyOptions
from llmeco_nb.tasks.regression import RegressionSchema


@pytest.mark.parametrize("task", ["text-classification", "regression"])
def test_no_reply_breaks_the_document(task, tmp_path):
    schema = RegressionSchema(low=0, high=5) if task == "regression" else None
    admin = KeyAdmin(tmp_path / "f.sqlite", "a test")
    key, _ = admin.add(KeyOptions(name="root", role="admin"))
    admin.close()
    live = Live(make_bundle(tmp_path / "words", schema=schema), tmp_path / "f.sqlite")
    try:
        line = [sys.executable, "-m", "schemathesis.cli", "run"]
        line += [f"http://127.0.0.1:{live.port}/openapi.json"]
        line += ["-H", f"Authorization: Bearer {key}", "--seed", "1", "--max-examples", "60"]
        # which texts and which pairs of fields make sense is more than a schema says
        line += ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
        # the key that asks would be revoked
        line += ["--exclude-path", "/admin/keys/revoke", "--phases", "coverage,fuzzing"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        told = live.app.openapi()
    finally:
        live.end()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    generated, passed = map(int, re.findall(r"(\d+) generated, (\d+) passed", done.stdout)[0])
    assert generated == passed > 300
    wanted = "LabelFeedback" if task == "text-classification" else "NumberFeedback"
    assert wanted in json.dumps(told), "the task's own models stand in the document"
