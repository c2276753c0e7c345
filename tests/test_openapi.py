"""Requests made from the OpenAPI document, good and bad: nothing that the server replies breaks
what the document promises. The requests are schemathesis' own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("schemathesis", reason="pip install schemathesis")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from served import LiveApp
from smallbundle import make_bundle
from test_monitoring import Live

from llmeco_nb.deployment.embedding_packing import small_embedding_bundle
from llmeco_nb.deployment.embedding_server import make_embedding_app
from llmeco_nb.deployment.embeddings import SentenceEncoder
from llmeco_nb.deployment.key_admin import KeyAdmin
from llmeco_nb.deployment.keys import KeyOptions
from llmeco_nb.tasks.regression import RegressionSchema


def live_server(task: str, folder: Path) -> LiveApp:
    "Of a bundle that is made by hand, or of a tiny sentence encoder."
    if task == "feature-extraction":
        pytest.importorskip("torch", reason="an encoder is packed from torch")
        pytest.importorskip("onnxscript", reason="an encoder is packed with onnxscript")
        encoder = SentenceEncoder.load(small_embedding_bundle())
        return LiveApp(make_embedding_app(encoder, folder / "f.sqlite"))
    schema = RegressionSchema(low=0, high=5) if task == "regression" else None
    return Live(make_bundle(folder / "words", schema=schema), folder / "f.sqlite")


tasks = {  # and a model that stands in the document of its server
    "text-classification": "LabelFeedback",
    "regression": "NumberFeedback",
    "feature-extraction": "EmbeddingsReply",
}


@pytest.mark.parametrize("task", tasks)
def test_no_reply_breaks_the_document(task, tmp_path):
    admin = KeyAdmin(tmp_path / "f.sqlite", "a test")
    key, _ = admin.add(KeyOptions(name="root", role="admin"))
    admin.close()
    live = live_server(task, tmp_path)
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
    assert generated == passed > (300 if task != "feature-extraction" else 100)
    assert tasks[task] in json.dumps(told), "the task's own models stand in the document"
