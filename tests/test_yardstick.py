"""The yardstick: it sees a single bit that differs, and passes what the map explains."""

import json
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from yardstick import ABSENT, MAP, Allowed, Comparison, Map, Rename, RunError, Side, main

ROOT = Path(__file__).resolve().parent.parent


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_tensors(path: Path, element: float = 1.0) -> None:
    plain = torch.tensor([[1.0, 2.0], [3.0, element]])
    save_file({"layer.weight": plain, "layer.half": plain.to(torch.bfloat16)}, path)


def write_table(path: Path, label: str = "label", cell: int = 7) -> None:
    pd.DataFrame({"text": ["a", "b"], label: [0, cell]}).to_parquet(path, index=False)


def write_database(path: Path, text: str = "A film.") -> None:
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as c:
        c.execute("CREATE TABLE predictions (item INTEGER, text TEXT, at REAL)")
        c.execute("INSERT INTO predictions VALUES (0, ?, 1.5)", (text,))
    c.close()


def write_onnx(path: Path, weight: float = 0.5, scale: float = 1.0) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1]) for n in "xy"]
    node = helper.make_node("Gemm", ["x", "w"], ["y"], alpha=scale)
    value = numpy_helper.from_array(np.array([[weight]], np.float32), "w")
    onnx.save(helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [value])), path)


def make_runs(runs: Path, instance: str = "train@a") -> Path:
    """A folder of runs with one run of one stage that holds a file of every kind."""
    stage = runs / "store" / f"{instance.partition('@')[0]}-0123"
    run = runs / "smoke-1"
    for folder in (stage / "model", run):
        folder.mkdir(parents=True)
    overrides = {instance: {"judged": 5}}
    about = dict(profile="smoke", created=1.0, overrides=overrides, instances={instance: {}})
    write_json(run / "run.json", about)
    (run / instance).symlink_to(os.path.relpath(stage, run))
    write_json(stage / "manifest.json", {"parameters": {"judged": 5, "head": 25}, "seconds": 1.5})
    write_json(stage / "metrics.json", {"loss": 0.25, "steps": 4, "name": "own"})
    write_json(stage / "model" / "config.json", {"llmeco": {"head": 25, "pool": "first"}})
    write_tensors(stage / "model" / "model.safetensors")
    torch.save({"step": 3, "state": [torch.ones(2)]}, stage / "state.pt")
    np.save(stage / "idf.npy", np.zeros(3, np.float32))
    np.savez(stage / "arrays.npz", a=np.arange(2), b=np.array([np.nan]))
    write_table(stage / "predictions")
    (stage / "table.csv").write_text("a,b\n1,2\n")
    (stage / "log.jsonl").write_text('{"step": 1, "seconds": 0.1}\n{"step": 2, "seconds": 0.2}\n')
    (stage / "vocab.txt").write_text("the\nfilm\n")
    (stage / "figure.png").write_bytes(b"\x89PNG one")
    write_onnx(stage / "model.onnx")
    write_database(runs / "feedback.sqlite")
    return stage


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """The stage of OLD and that of NEW, equal."""
    return make_runs(tmp_path / "old"), make_runs(tmp_path / "new")


def compared(sides: tuple[Path, Path], map_: Map | None = None) -> Comparison:
    found = Comparison(map_ or Map())
    found.profiles("smoke", *(stage.parent.parent for stage in sides))
    return found


def told(found: Comparison) -> list[tuple[str, str, str, str]]:
    return [(d.file, d.field, d.found.old, d.found.new) for d in found.differences]


def test_equal_sides_pass_and_everything_is_counted(sides):
    found = compared(sides)
    assert told(found) == []
    counts = {t.label: (t.files, t.numbers, t.texts) for t in found.tallies}
    # numbers: manifest 3, metrics 2, config 1, tensors 8, state 3, idf 3, arrays 3,
    # predictions 2, log 4, onnx: weight 1, opset 1, alpha 1 -- csv cells are texts
    assert counts["smoke-1 train@a"][:2] == (13, 32)
    assert counts["smoke-1 run"] == (1, 2, 2) and counts["smoke runs"] == (1, 2, 1)


def negative_zero(path: Path) -> None:
    np.save(path, np.array([0, 0, -0.0], np.float32))


CHANGES: list[tuple[str, Callable[[Path], object], str, str, str]] = [
    (
        "model/model.safetensors",
        lambda p: write_tensors(p, 1.0000001),
        "tensors.layer.weight[3]",
        "1.0",
        "1.0000001192092896",
    ),
    (
        "model/model.safetensors",
        lambda p: save_file({"other": torch.ones(1)}, p),
        "tensors.layer.weight",
        "torch.float32 (2, 2)",
        ABSENT,
    ),
    ("predictions", lambda p: write_table(p, cell=8), "label[1]", "7", "8"),
    (
        "state.pt",
        lambda p: torch.save({"step": 3, "state": [torch.zeros(2)]}, p),
        "state.0[0]",
        "1.0",
        "0.0",
    ),
    ("idf.npy", negative_zero, "[2]", "0.0", "-0.0"),
    ("idf.npy", lambda p: np.save(p, np.zeros(3)), "", "float32 (3,)", "float64 (3,)"),
    ("idf.npy", lambda p: np.save(p, np.zeros(4, np.float32)), "", "float32 (3,)", "float32 (4,)"),
    ("arrays.npz", lambda p: np.savez(p, a=np.arange(2), b=np.array([1.0])), "b[0]", "nan", "1.0"),
    ("table.csv", lambda p: p.write_text("a,b\n1,2.0\n"), "b[0]", "'2'", "'2.0'"),
    ("log.jsonl", lambda p: p.write_text('{"step": 1, "seconds": 0.1}\n'), "1.step", "2", ABSENT),
    (
        "metrics.json",
        lambda p: write_json(p, {"loss": 0.25, "steps": 4.0, "name": "own"}),
        "steps",
        "4",
        "4.0",
    ),
    (
        "metrics.json",
        lambda p: write_json(p, {"loss": 0.25, "steps": 4, "name": "own", "x": 1}),
        "x",
        ABSENT,
        "1",
    ),
    ("vocab.txt", lambda p: p.write_text("the\nfilms\n"), "1", "'film'", "'films'"),
    ("model.onnx", lambda p: write_onnx(p, weight=0.75), "initializers.w[0]", "0.5", "0.75"),
    ("model.onnx", lambda p: write_onnx(p, scale=2.0), "nodes.0.alpha", "1.0", "2.0"),
    ("vocab.txt", Path.unlink, "", "a file", ABSENT),
    ("more.txt", lambda p: p.write_text("more"), "", ABSENT, "a file"),
    (
        "../../feedback.sqlite",
        lambda p: write_database(p, "A movie."),
        "predictions.text[0]",
        "'A film.'",
        "'A movie.'",
    ),
]


@pytest.mark.parametrize("file,change,where,old,new", CHANGES)
def test_a_single_change_is_found(sides, file, change, where, old, new):
    change(sides[1] / file)
    assert (Path(file).name if file.startswith("..") else file, where, old, new) in told(
        compared(sides)
    )


def test_half_precision_is_compared_bit_by_bit(sides):
    write_tensors(sides[1] / "model" / "model.safetensors", 1.0078125)  # the next in bfloat16
    fields = [field for _, field, *_ in told(compared(sides))]
    assert fields == ["tensors.layer.half[3]", "tensors.layer.weight[3]"]


def test_unknown_files_are_compared_as_bytes(sides):
    (sides[1] / "figure.png").write_bytes(b"\x89PNG two")
    ((file, field, old, new),) = told(compared(sides))
    assert (file, field) == ("figure.png", "bytes") and old != new and old.startswith("8 bytes")


def test_a_stage_and_a_run_that_are_not_there(sides):
    runs = sides[1].parent.parent
    (runs / "smoke-1" / "train@a").unlink()
    assert len(compared(sides).differences) == 13
    shutil.rmtree(runs / "smoke-1")
    assert len(compared(sides).differences) == 14


def test_a_renamed_column_needs_the_map(sides):
    write_table(sides[1] / "predictions", label="target")
    differs = [
        ("predictions", "label", "int64 (2,)", ABSENT),
        ("predictions", "target", ABSENT, "int64 (2,)"),
    ]
    assert told(compared(sides)) == differs
    names = {"label": Rename("target")}
    assert told(compared(sides, Map(columns={"train/predictions": names}))) == []
    assert told(compared(sides, Map(columns={"tune/predictions": names}))) == differs


def test_a_renamed_column_still_needs_its_values(sides):
    write_table(sides[1] / "predictions", label="target", cell=8)
    found = compared(sides, Map(columns={"train/*": {"label": Rename("target")}}))
    assert told(found) == [("predictions", "label[1]", "7", "8")]


def test_renamed_files_folders_metrics_and_fields(sides):
    stage = sides[1]
    (stage / "idf.npy").rename(stage / "weights.npy")
    (stage / "model").rename(stage / "classifier")
    config = {"llmeco": {"head_fraction": 0.25, "pooling": "cls"}}
    write_json(stage / "classifier" / "config.json", config)
    write_json(stage / "metrics.json", {"validation_loss": 0.25, "steps": 4, "name": "own"})
    fields = {
        "llmeco.head": Rename("llmeco.head_fraction", divide_by=100),
        "llmeco.pool": Rename("llmeco.pooling", {"first": "cls"}),
    }
    renamed = Map(
        files={"train/idf.npy": "weights.npy", "train/model": "classifier"},
        metrics={"train": {"loss": Rename("validation_loss")}},
        fields={"train/model/config.json": fields},
    )
    assert told(compared(sides, renamed)) == []
    renamed.fields.clear()
    assert len(compared(sides, renamed).differences) == 4


def test_two_names_that_become_one_are_found(sides):
    both = Map(metrics={"train": {"loss": Rename("steps")}})
    fields = {field for _, field, *_ in told(compared(sides, both))}
    assert fields == {"loss", "steps"}


def test_renamed_stages_and_parameters(tmp_path):
    old, new = make_runs(tmp_path / "old"), make_runs(tmp_path / "new", "tune@a")
    parameters = {"eval_examples": 5, "head_fraction": 0.25}
    write_json(new / "manifest.json", {"parameters": parameters, "seconds": 1.5})
    about = json.loads((new.parents[1] / "smoke-1" / "run.json").read_text())
    write_json(
        new.parents[1] / "smoke-1" / "run.json",
        about | {"overrides": {"tune@a": {"eval_examples": 5}}},
    )
    names = {
        "train.judged": Rename("tune.eval_examples"),
        "train.head": Rename("tune.head_fraction", divide_by=100),
    }
    renamed = Map(stages={"train": "tune"}, parameters=names)
    assert told(compared((old, new), renamed)) == []
    assert {t.label for t in compared((old, new), renamed).tallies} == {
        "smoke-1 train@a",
        "smoke-1 run",
        "smoke runs",
    }
    assert compared((old, new), Map(stages={"train": "tune"})).differences


def test_exceptions_pass_and_are_counted(sides):
    lines = '{"step": 1, "seconds": 0.1}\n{"step": 2, "seconds": 0.3}\n'
    (sides[1] / "log.jsonl").write_text(lines)
    (sides[1] / "figure.png").unlink()
    allowed = Map(
        exceptions=[
            Allowed("*/log.jsonl", "*.seconds", "a time"),
            Allowed("train/figure.png", "**", "drawn"),
            Allowed("*/metrics.json", "speed", "a speed"),
        ]
    )
    found = compared(sides, allowed)
    assert told(found) == []
    assert [(e.differed, e.matched) for e in allowed.exceptions] == [(1, 2), (1, 1), (0, 0)]
    text = "\n".join(found.report())
    assert re.search(r"1 of 2 +\*/log.jsonl: \*\.seconds  \(a time\)", text)
    assert "unused: */metrics.json: speed" in text and "0 fields or files differ" in text


def test_an_exception_allows_no_more_than_it_says(sides):
    write_json(sides[1] / "model" / "config.json", {"llmeco": {"head": 30, "pool": "first"}})
    for file, field in (
        ("*/config.json", "**"),
        ("**/config.json", "head"),
        ("**/config.json", "*"),
        ("tune/**", "**"),
    ):
        found = compared(sides, Map(exceptions=[Allowed(file, field, "too narrow")]))
        assert told(found) == [("model/config.json", "llmeco.head", "25", "30")]
    for file in ("**/config.json", "train/model/*", "train@a/**"):
        assert not compared(sides, Map(exceptions=[Allowed(file, "*.head", "fits")])).differences


def test_rows_without_an_order(sides):
    first, second = (sides[1] / "log.jsonl").read_text().splitlines()
    (sides[1] / "log.jsonl").write_text(f"{second}\n{first}\n")
    assert len(compared(sides).differences) == 4
    ordered = Map(rows_sorted_by={"train/log.jsonl": ["step"]})
    assert not compared(sides, ordered).differences
    renamed = (sides[1] / "log.jsonl").read_text().replace("step", "at")
    (sides[1] / "log.jsonl").write_text(renamed)
    assert len(compared(sides, ordered).differences) == 6
    ordered.columns["train/log.jsonl"] = {"*.step": Rename("*.at")}
    assert not compared(sides, ordered).differences


def test_the_report_shows_five_differences_of_a_file_and_fifty_in_all(sides):
    write_json(sides[1] / "metrics.json", {f"m{k:02}": k for k in range(60)})
    lines = "\n".join(compared(sides).report()).splitlines()
    assert "63 fields or files differ:" in lines
    assert "  smoke-1 train@a  metrics.json  loss: 0.25 -> (not there)" in lines
    assert sum("  metrics.json  " in line for line in lines) == 5
    assert "  and 58 more, in 1 files together" in lines
    for k in range(60):
        (sides[0] / f"{k}.txt").touch()
    lines = "\n".join(compared(sides).report()).splitlines()
    assert sum("-> (not there)" in line for line in lines) == 50
    assert "  and 73 more, in 61 files together" in lines


# -- The runner, with a checkout whose command writes a run in milliseconds

CHECKOUT = """
import json, os, sys
from pathlib import Path

def main():
    given = dict(word.split("=") for word in sys.argv if "=" in word)
    if given.get("train.steps") == "0": sys.exit("no steps")
    if given.get("train.steps") == "1": return
    runs = Path(os.environ["LLMECO_RUNS"])
    n = len(list(runs.glob("*/run.json"))) + 1
    stage, run = runs/"store"/f"train-{n}", runs/f"{sys.argv[3]}-{n}"
    stage.mkdir(parents=True); run.mkdir()
    about = dict(created=n, words=sys.argv[1:3], cpus=len(os.sched_getaffinity(0)))
    (run/"run.json").write_text(json.dumps(about))
    (run/"train").symlink_to(stage)
    names = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "LLMECO_DATA", "PYTHONPATH")
    seen = {name: os.environ.get(name) for name in names}
    result = dict(given=given, home=os.environ["HOME"].startswith(str(runs.parent)), seen=seen)
    (stage/"metrics.json").write_text(json.dumps(result))
    print("said by the command")
"""
INI = "[DEFAULT]\nlib_path = toy\nnbs_path = nbs\nconsole_scripts = llmeco=toy.cli:main\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in ("toy", "nbs"):
        (tmp_path / "checkout" / folder).mkdir(parents=True)
    (tmp_path / "checkout" / "toy" / "cli.py").write_text(CHECKOUT)
    (tmp_path / "checkout" / "settings.ini").write_text(INI)
    return tmp_path / "checkout"


def side_of(checkout: Path, name: str = "old", seed: int | None = None, **settings) -> Side:
    names = {"train.steps": Rename("train.num_steps")}
    map_ = Map(
        settings={"smoke": settings.get("smoke", {})},
        rounds={"smoke": 2},
        seeds=["train.seed"],
        parameters=names,
    )
    return Side(name, checkout, checkout.parent / "work", sys.executable, map_, seed)


def test_runs_are_apart_complete_and_taken_again(checkout, monkeypatch):
    monkeypatch.setenv("LLMECO_DATA", "/elsewhere")
    said: list[str] = []
    side = side_of(checkout, smoke={"train.steps": 3})
    runs = side.make("smoke", said.append)
    made = json.loads((runs / "smoke-1" / "train" / "metrics.json").read_text())
    wanted = dict(
        HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", LLMECO_DATA=None, PYTHONPATH=str(checkout)
    )
    assert made == dict(given={"train.steps": "3"}, home=True, seen=wanted)
    assert json.loads((runs / "smoke-2" / "run.json").read_text())["cpus"] == 1
    assert ["whole already" in line for line in said] == [False, False]
    assert side.make("smoke", said.append) == runs and len(list(runs.glob("smoke-*"))) == 2
    assert ["whole already" in line for line in said] == [False, False, True, True]


def test_other_code_or_settings_are_run_anew(checkout):
    plain = side_of(checkout).identity("smoke")
    assert side_of(checkout, smoke={"train.steps": 3}).identity("smoke") != plain
    assert side_of(checkout, seed=7).identity("smoke") != plain
    (checkout / "nbs" / "runs").mkdir()
    (checkout / "nbs" / "runs" / "left.ipynb").write_text("{}")
    assert side_of(checkout).identity("smoke") == plain
    (checkout / "nbs" / "1.ipynb").write_text("{}")
    assert side_of(checkout).identity("smoke") != plain


def test_settings_are_named_as_each_side_names_them(checkout):
    given = {"train@a.steps": 3, "train.models": ["a", "b"]}
    assert side_of(checkout, "old", smoke=given).settings("smoke") == [
        "train@a.steps=3",
        "train.models=[a,b]",
    ]
    assert side_of(checkout, "new", 7, smoke=given).settings("smoke") == [
        "train@a.num_steps=3",
        "train.models=[a,b]",
        "train.seed=7",
    ]


def test_a_stage_that_a_profile_lacks_is_not_seeded(checkout):
    folder = checkout / "nbs" / "profiles" / "smoke"
    folder.mkdir(parents=True)
    (folder / "pipeline.yaml").write_text("stages:\n  tune@a: {corpus: data}\n")
    assert side_of(checkout, "old", 7).settings("smoke") == []
    (folder / "pipeline.yaml").write_text("stages:\n  train@a: {corpus: data}\n")
    assert side_of(checkout, "old", 7).settings("smoke") == ["train.seed=7"]


def test_a_run_that_fails_says_why(checkout):
    side = side_of(checkout, smoke={"train.steps": 0})
    with pytest.raises(RunError, match=r"(?s)old: llmeco run .* ended with 1.*no steps"):
        side.make("smoke", print)
    with pytest.raises(RunError, match="holds 1 runs with 1 stages; 2 runs"):
        side_of(checkout, smoke={"train.steps": 1}).make("smoke", print)
    (checkout / "settings.ini").unlink()
    with pytest.raises(RunError, match="settings.ini"):
        side.make("smoke", print)


def test_the_exit_status_and_a_changed_seed(checkout, capsys):
    words = [str(checkout), str(checkout), "--work", str(checkout.parent / "w"), "--profiles"]
    assert main([*words, "smoke"]) == 0
    assert main([*words, "smoke", "--seed", "7"]) == 1
    assert "given.data.seed: (not there) -> '7'" in capsys.readouterr().out
    (checkout / "settings.ini").unlink()
    assert main([*words, "smoke"]) == 2


# -- The committed map


def stage_parameters() -> dict[str, set[str]]:
    """The names of the parameters of every stage that the two profiles run."""
    import yaml

    found: dict[str, set[str]] = {}
    profiles = [ROOT / "nbs" / "profiles" / name / "pipeline.yaml" for name in ("smoke", "laptop")]
    instances = [name for p in profiles for name in yaml.safe_load(p.read_text())["stages"]]
    used = {name.partition("@")[0] for name in instances}
    for path in sorted((ROOT / "nbs").glob("[0-9]*_*/*.ipynb")):
        nb = json.loads(path.read_text())
        stage = nb["metadata"].get("llmeco", {}).get("stage")
        cells = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
        text = "\n".join("".join(c["source"]) for c in cells)
        if stage in used:
            found[stage] = set(re.findall(r"^(\w+):", text, re.M))
    return found


def test_the_map_fits_this_checkout():
    map_, known = Map.read(MAP), stage_parameters()
    stage_of = lambda name: map_.parameter(name).to.partition(".")[0].partition("@")[0]
    renamed = {name for name in map_.parameters if stage_of(name) in known}  # of these profiles
    names = {*renamed, *map_.seeds, *map_.settings["laptop"], *map_.settings["smoke"]}
    for name in names:
        stage, _, parameter = map_.parameter(name).to.rpartition(".")
        stage = stage.partition("@")[0]
        assert stage not in known or parameter in known[stage], name  # the table holds all stages
    seeded = {stage for stage, parameters in known.items() if "seed" in parameters}
    used = {map_.parameter(name).to.partition(".")[0] for name in map_.seeds}
    assert used == seeded
    assert all(e.reason.strip() for e in map_.exceptions)
    places = [(e.file, e.field) for e in map_.exceptions]
    assert len(set(places)) == len(places)
