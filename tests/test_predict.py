"A table answered by a bundle: the server's answers, every row, and nothing lost on the way."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from fastapi.testclient import TestClient

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.data.corpus import read_split, small_corpus
from llmeco_nb.data.delimited import ReadOptions
from llmeco_nb.deployment.bundle import small_bundle
from llmeco_nb.deployment.predict import PredictOptions, predict_table
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.deployment.server import make_app

odd = ["A &#x27;fine&#x27; film.<br />Really", "", None, " ", "x" * 30_000, "ภาพยนตร์ดี", "NA", "🎬"]


@pytest.fixture(scope="module", params=["linear", "onnx"])
def predictor(request):
    return Predictor.load(small_bundle(request.param))


def test_equals_the_server_in_every_row(predictor, tmp_path):
    texts = read_split(small_corpus(), "test").text.tolist()[:30] + odd
    pd.DataFrame({"n": range(len(texts)), "text": texts}).to_parquet(tmp_path / "t.parquet")
    made = predict_table(
        predictor, tmp_path / "t.parquet", tmp_path / "out.parquet", PredictOptions(chunk=7)
    )
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert (made.rows, made.blank) == (len(texts), 3)
    assert found.n.tolist() == list(range(len(texts)))
    with TestClient(make_app(predictor, tmp_path / "answers.sqlite")) as client:
        for text, row in zip(texts, found.itertuples()):
            if text is None or not text.strip():
                assert pd.isna(row.prediction) and pd.isna(row.prediction_probability)
                continue
            said = client.post("/v1/predict", json={"text": text}).json()["answers"][0]
            assert row.prediction == said["label"], text
            likely = said["probabilities"][said["label"]]
            assert row.prediction_probability == pytest.approx(likely, abs=2e-5), text


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_columns_stay_and_scores_come_on_request(ending, tmp_path):
    predictor = Predictor.load(small_bundle())
    (tmp_path / "t.csv").write_text('id;text\n007;"good; really"\n008;bad\n', encoding="utf-8")
    out = tmp_path / f"out.{ending}"
    predict_table(predictor, tmp_path / "t.csv", out, PredictOptions(all_scores=True))
    read = dict(
        csv=lambda: pd.read_csv(out, dtype={"id": str}),
        jsonl=lambda: pd.read_json(out, lines=True, dtype={"id": str}),
        parquet=lambda: pd.read_parquet(out),
    )
    found = read[ending]()
    assert found.id.tolist() == ["007", "008"] and found.text[0] == "good; really"
    total = sum(found[f"prediction_probability_{name}"] for name in predictor.labels)
    assert total.tolist() == pytest.approx([1, 1], abs=1e-5)


def test_rows_without_a_text_may_fill_a_chunk(predictor, tmp_path):
    pd.DataFrame({"text": ["fine", None, " "]}).to_parquet(tmp_path / "t.parquet")
    out = tmp_path / "out.jsonl"
    predict_table(predictor, tmp_path / "t.parquet", out, PredictOptions(chunk=1))
    assert pd.read_json(out, lines=True).prediction.notna().tolist() == [True, False, False]


def test_other_columns_pass_through_as_they_are(tmp_path):
    predictor = Predictor.load(small_bundle())
    (tmp_path / "t.csv").write_text("code,text\nNA,fine\nx,NA\n", encoding="utf-8")
    reading = PredictOptions(reading=ReadOptions(nulls=("NA",)))
    made = predict_table(predictor, tmp_path / "t.csv", tmp_path / "o.csv", reading)
    rows = (tmp_path / "o.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert made.blank == 1 and rows[0].startswith("NA,fine,") and rows[1] == "x,NA,,"
    table = pd.DataFrame({"n": [1.23e-11, None], "at": pd.Timestamp("2024-01-02"), "text": "a"})
    table.to_parquet(tmp_path / "t.parquet")
    predict_table(predictor, tmp_path / "t.parquet", tmp_path / "o.jsonl")
    first, second = map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())
    assert first["n"] == 1.23e-11 and second["n"] is None and first["at"].startswith("2024-01-02")


def test_a_table_that_the_output_cannot_hold_is_refused_first(tmp_path):
    predictor = Predictor.load(small_bundle())
    mixed = pd.DataFrame({"id": [1, "a"], "text": ["x", "y"]}, dtype=object)
    mixed.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    (tmp_path / "t.csv").write_text("id,id,text\n1,2,fine\n", encoding="utf-8")
    told = []
    for name, out, said in (("t.jsonl", "o.parquet", "columns"), ("t.csv", "o.jsonl", "two")):
        with pytest.raises(DataError, match=said):
            predict_table(
                predictor, tmp_path / name, tmp_path / out, tell=lambda *done: told.append(done)
            )
    assert not told and len(list(tmp_path.iterdir())) == 2


def test_refusals_leave_nothing_behind(tmp_path):
    predictor = Predictor.load(small_bundle())
    table = tmp_path / "t.csv"
    table.write_text("text,prediction\nfine,x\n", encoding="utf-8")
    (tmp_path / "there.csv").write_text("mine", encoding="utf-8")
    before = sorted(p.name for p in tmp_path.iterdir())
    wrong = [
        ("out.csv", PredictOptions(), UsageError, "--prediction-column"),
        ("out.xlsx", PredictOptions(), UsageError, ".parquet, .csv, .jsonl"),
        ("there.csv", PredictOptions(), UsageError, "--replace"),
        ("no/out.csv", PredictOptions(), UsageError, "no folder"),
        ("out.csv", PredictOptions(text_column="txt"), DataError, "`text`"),
        ("out.csv", PredictOptions(chunk=0), UsageError, "at least one row"),
    ]
    for name, options, kind, said in wrong:
        with pytest.raises(kind, match=said):
            predict_table(predictor, table, tmp_path / name, options)
        assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "there.csv").read_text(encoding="utf-8") == "mine"


def test_input_may_be_answered_in_its_own_place(tmp_path):
    predictor = Predictor.load(small_bundle())
    table = tmp_path / "t.csv"
    table.write_text("text\nfine\ndull\n", encoding="utf-8")
    predict_table(predictor, table, table, PredictOptions(replace=True))
    assert list(pd.read_csv(table).columns) == ["text", "prediction", "prediction_probability"]


@pytest.mark.slow
def test_killed_it_carries_on(tmp_path):
    rows = 10_000
    texts = read_split(small_corpus(), "train").text.tolist()
    table = pd.DataFrame({"text": [f"{i} {texts[i % len(texts)]}" for i in range(rows)]})
    table.to_parquet(tmp_path / "t.parquet")
    words = ["predict", str(tmp_path / "t.parquet"), "-o", str(tmp_path / "out.parquet")]
    words += ["--bundle", str(small_bundle())]
    command = [sys.executable, "-c", "from llmeco_nb.cli import main; main()", *words]
    attempts = 0
    while attempts < 3:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=dict(os.environ))
        folder = tmp_path / "out.parquet.partial"
        had = len(list(folder.glob("[0-9]*.json"))) if folder.exists() else 0
        while process.poll() is None and len(list(folder.glob("[0-9]*.json"))) <= had:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        attempts += 1
        assert not (tmp_path / "out.parquet").exists()
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert attempts and "from an interrupted attempt" in done.stdout
    found = pd.read_parquet(tmp_path / "out.parquet")
    once = Predictor.load(small_bundle()).predict_batch(table.text.tolist()[-200:])
    assert len(found) == rows and found.prediction.notna().all()
    assert found.prediction.tolist()[-200:] == [one.label for one in once]
    left = {p.name for p in Path(tmp_path).iterdir()} - {"t.parquet", "out.parquet"}
    assert not left


@pytest.mark.slow
def test_thirty_thousand_rows_equal_the_server(tmp_path):
    predictor = Predictor.load(small_bundle())
    texts = read_split(small_corpus(), "train").text.tolist()
    many = [f"{texts[i % len(texts)][: 40 + i % 400]} {i}" for i in range(30_000)]
    pd.DataFrame({"text": many}).to_parquet(tmp_path / "t.parquet")
    predict_table(predictor, tmp_path / "t.parquet", tmp_path / "out.parquet")
    found = pd.read_parquet(tmp_path / "out.parquet").prediction.tolist()
    with TestClient(make_app(predictor, tmp_path / "answers.sqlite")) as client:
        for start in range(0, 30_000, 64 * 25):  # every 25th full request
            asked = many[start : start + 64]
            said = client.post("/v1/predict", json={"texts": asked}).json()["answers"]
            assert [one["label"] for one in said] == found[start : start + 64]
