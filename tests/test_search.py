"""Hyperparameter search: the grammar of a space, reuse of equal trials, kills at any moment, and
the test split that no trial may read."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmeco_nb
from llmeco_nb.config import default_of
from llmeco_nb.core import DataError, LlmecoError, UsageError
from llmeco_nb.evaluation.search import Choices, Range, SearchSpace, read_part, search_space
from llmeco_nb.evaluation.search_target import SearchBudget, Target, corrected_best, reach_bound
from llmeco_nb.finetuning.classifier_config import ClassifierConfig

pytest.importorskip("optuna")
known = {one.name: one for one in fields(ClassifierConfig)}


def read(name: str, written: object) -> Range | Choices:
    "A line of a space of the stage finetune."
    return read_part(f"finetune.{name}", written, known[name].type, default_of(known[name]))


# ------------------------------------------------------------------ the grammar

floats = st.floats(1e-6, 1e6).map(lambda x: float(f"{x:.4g}"))


@given(floats, floats, st.booleans())
def test_a_range_of_numbers_is_read_back_as_it_was_written(a, b, log):
    low, high = sorted((a, b))
    if low == high:
        with pytest.raises(UsageError, match="must be below"):
            read("lr", f"{low}..{high}")
        return
    part = Range(low, high, log=log)
    assert read("lr", str(part)) == part


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 30))
def test_whole_numbers_with_a_step(low, step, steps):
    part = Range(low, low + step * steps, step=step, whole=True)
    assert read("batch_size", str(part)) == part and part.size == steps + 1
    values = [low + step * k for k in range(steps + 1)]
    assert all(part.holds(value) for value in values)
    assert sum(part.holds(value) for value in range(low - 5, low + step * steps + 6)) == len(values)


@given(st.lists(st.sampled_from(["all", "biases", "head", "lora", "dora"]), unique=True))
def test_choices_are_read_back_and_one_alone_is_refused(values):
    if len(values) < 2:
        with pytest.raises(UsageError, match="two or more"):
            read("trainable", values)
        return
    part = Choices(tuple(values))
    assert read("trainable", str(part)) == read("trainable", values) == part


@settings(max_examples=50)
@given(st.sampled_from(sorted(known)), st.text(max_size=20))
def test_any_other_line_is_refused_by_name_and_nothing_else_happens(name, text):
    try:
        part = read(name, text)
    except UsageError as e:
        assert str(e).startswith(f"finetune.{name} ")
    else:
        assert isinstance(part, (Range, Choices)) and (part.size or 2) > 1


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_whatever_is_drawn_the_config_takes(seed):
    import optuna

    space = search_space(ClassifierConfig)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(3):
        drawn = study.ask(fixed_distributions=space.distributions()).params
        values = space.values(drawn)
        assert space.holds(values)
        made = ClassifierConfig.of(values)
        assert {name: getattr(made, name) for name in values} == values


def test_every_parameter_is_searched_or_has_a_reason():
    space = search_space(ClassifierConfig)
    assert set(space.parts) | set(space.left_out) == set(known)
    assert not set(space.parts) & set(space.left_out)
    assert {"nproc", "device", "seed"} <= set(space.left_out)
    again = search_space(ClassifierConfig, dict(line.split(": ", 1) for line in space.lines()))
    assert again.parts == space.parts


@pytest.mark.parametrize(
    "name, written, said",
    [
        ("device", ["cpu", "cuda"], "never which"),
        ("seed", "0..9", "luck"),
        ("learning_rate", "1..2", "no such parameter"),
        ("dropout", "0..1", "less than 1"),
        ("trainable", ["all", "everything"], "'lora'"),
        ("lr", "0..1", "greater than 0"),
    ],
)
def test_what_cannot_be_searched_says_what_can(name, written, said):
    with pytest.raises(UsageError, match=said) as e:
        search_space(ClassifierConfig, {name: written}, "finetune")
    assert f"finetune.{name}" in str(e.value)


# ------------------------------------------------------------------ when it stops


def test_the_bound_is_what_scipy_says_of_an_exponential_tail():
    from scipy.stats import beta, chi2

    values = np.random.default_rng(0).exponential(size=21)
    goal = Target("validation", 1, 9.0)
    found = reach_bound(values, goal, 3)
    top = np.sort(values)[::-1]
    k = 21 // 2
    # twice a sum of k exponential excesses over their mean is chi-squared with 2k degrees
    scale = 2 * (top[:k] - top[k]).sum() / chi2.ppf(0.025, 2 * k)
    one = beta.ppf(0.975, k + 1, 21 - k) * np.exp(-(9.0 - top[k]) / scale)
    assert np.isclose(found.scale, scale) and np.isclose(found.one_draw, one)
    assert np.isclose(found.chance, 1 - (1 - one) ** 30)
    assert reach_bound(values, goal, 30).chance > found.chance
    assert reach_bound(values, goal, 0).chance == 0


def test_the_corrected_value_is_that_of_a_plain_loop():
    rng = np.random.default_rng(2)
    scores = (rng.uniform(size=(6, 40)) < 0.7).astype(float)
    found = corrected_best(scores, resamples=300, seed=5)
    drawn = np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40), size=300)
    values = []
    for counts in drawn:
        means = [(row * counts).sum() / 40 for row in scores]
        values.append(scores[int(np.argmax(means))][counts == 0].mean())
    assert np.isclose(found.estimate, np.mean(values))
    assert found.estimate < scores.mean(1).max()


# ------------------------------------------------------------------ killed


def quiet(line: str) -> None:
    "Nobody wants to know."


def search_slowly(file: Path, pause: float) -> None:
    "Search a made-up stage whose trials take three pauses, and write down what came of it."
    from llmeco_nb.evaluation.search_stage import SearchOptions, run_search
    from llmeco_nb.evaluation.search_trials import Outcome

    parts = {"lr": Range(1e-5, 1e-1, log=True), "width": Range(1, 50, whole=True)}
    space = SearchSpace({**parts, "kind": Choices(("a", "b"))})

    def run(values, on_value=lambda value: False):
        value = 0.9 - abs(values["lr"] - 0.01) - 0.001 * values["width"]
        value -= 0.1 * (values["kind"] == "b")
        seen = []
        for share in (0.5, 0.8, 1.0):
            time.sleep(pause)
            seen.append(share * value)
            if on_value(seen[-1]):
                return Outcome("pruned", None, 1.0, values=tuple(seen))
        return Outcome("complete", value, 1.0, 1.0, values=tuple(seen))

    options = SearchOptions(Target("accuracy_validation", 1, 2.0), SearchBudget(14), "median")
    rows, verdict = run_search(run, space, options, file, dict(lr=0.1, width=40, kind="b"), quiet)
    told = [[r.place, r.drawn, r.parameters, r.outcome.state, r.outcome.value] for r in rows]
    file.with_suffix(".json").write_text(json.dumps([told, verdict.ended]))


def finished_trials(file: Path) -> int:
    "How many trials a journal says are told of."
    return file.read_bytes().count(b'"outcome"') if file.exists() else 0


def test_a_search_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    import optuna  # noqa: F401  # the processes below have it then

    search_slowly(tmp_path / "whole", 0)
    chance, kills = random.Random(0), 0
    file = tmp_path / "killed"
    for more in (2, 3, 2, 4):
        before = finished_trials(file)
        one = multiprocessing.get_context("fork").Process(target=search_slowly, args=(file, 0.05))
        one.start()
        while finished_trials(file) < before + more and one.is_alive():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))  # the next trial is under way
        os.kill(one.pid, signal.SIGKILL)
        one.join()
        kills += one.exitcode == -signal.SIGKILL
    assert kills == 4 and not file.with_suffix(".json").exists()
    with open(file, "ab") as journal:
        journal.write(b'{"op_code": 5, "wor')  # a kill in the middle of a line
    search_slowly(file, 0)
    whole, killed = (json.loads(Path(f"{p}.json").read_text()) for p in (tmp_path / "whole", file))
    assert killed == whole and len(whole[0]) == 14
    assert {row[3] for row in whole[0]} == {"complete", "pruned"}


# ------------------------------------------------------------------ trials of a stage

CELLS = {
    "71_texts": (
        dict(stage="texts", inputs=[], outputs=["corpus"]),
        "rows: int = 8  # a split\nout: str = ''",
        "import pyarrow as pa\n"
        "import pyarrow.parquet as pq\n"
        "from llmeco_nb.core import create_record\n"
        "from llmeco_nb.core import write_json",
        "record = create_record(out, 'texts')\n"
        "folder = record.artifact('corpus'); folder.mkdir()\n"
        "for k, split in enumerate(('train', 'validation', 'test')):\n"
        "    ids = [f'{split}{i}' for i in range(rows)]\n"
        "    table = dict(id=ids, label=[i % 2 for i in range(rows)])\n"
        "    pq.write_table(pa.table(table), folder / f'{split}.parquet')\n"
        "write_json(folder / 'labels.json', ['a', 'b'])",
    ),
    "72_learn": (
        dict(stage="learn", inputs=["corpus"], outputs=["predictions"]),
        "x: float = 0.1  # how good\nepochs: int = 3  # rows of the log\npause: float = 0.0\n"
        "corpus: str = ''\nout: str = ''",
        "import time\n"
        "from pathlib import Path\n"
        "import pyarrow.parquet as pq\n"
        "from llmeco_nb.core import UsageError\n"
        "from llmeco_nb.core import create_record",
        "if x > 0.9:\n    raise UsageError(f'x is {x}, which is too much.')\n"
        "record = create_record(out, 'learn')\n"
        "splits = {s: pq.read_table(Path(corpus) / f'{s}.parquet') for s in "
        "('train', 'validation', 'test')}\n"
        "for k in range(epochs):\n"
        "    time.sleep(pause)\n"
        "    record.log(step=k, validation_accuracy=x * (k + 1) / epochs)\n"
        "record.artifact('predictions').write_text('none')\n"
        "tested = dict(accuracy_test=x - 0.05) if len(splits['test']) else {}\n"
        "record.save_metrics(accuracy_validation=x, **tested)",
    ),
}


def write_notebook(path: Path, contract: dict, parameters: str, imports: str, run: str) -> None:
    "A stage of three cells."
    cells = [(["parameters"], parameters), ([], imports), (["run"], run), (["show"], "1 / 0")]
    made = [
        dict(
            cell_type="code",
            id=f"cell{i}",
            metadata={"tags": tags},
            source=source,
            execution_count=None,
            outputs=[],
        )
        for i, (tags, source) in enumerate(cells)
    ]
    if contract["stage"] == "texts":
        made.pop()
    about = dict(
        llmeco=contract, kernelspec=dict(name="python3", display_name="", language="python")
    )
    path.write_text(json.dumps(dict(cells=made, metadata=about, nbformat=4, nbformat_minor=5)))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    "A pipeline of two toy stages, its corpus made."
    from llmeco_nb.evaluation.tune import make_inputs
    from llmeco_nb.runner import execution
    from llmeco_nb.runner.identity import Package
    from llmeco_nb.runner.pipeline import Pipeline, open_run
    from llmeco_nb.runner.stages import StageRegistry

    home = tmp_path_factory.mktemp("search")
    (home / "nbs").mkdir()
    for stem, one in CELLS.items():
        write_notebook(home / "nbs" / f"{stem}.ipynb", *one)
    (home / "toy").mkdir()
    (home / "toy" / "pipeline.yaml").write_text("stages:\n  texts:\n  learn:\n")
    registry = StageRegistry(home / "nbs", Package(Path(llmeco_nb.__file__).parent), False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "machine", lambda cache: dict(cores=2, threads=1))
        run = open_run(registry, str(home / "toy"), str(home / "runs" / "toy-1"))
        made = Pipeline(registry, run)
        make_inputs(made, made.by_name["learn"], lambda told: None)
        yield made


def prepared(pipe, target: str = "accuracy_validation>=0.8", **changed):
    "A search of the toy stage."
    from llmeco_nb.evaluation.search_stage import SearchOptions
    from llmeco_nb.evaluation.tune import Search

    told = dict(budget=SearchBudget(2), pruner="none", seed=0) | changed
    space = SearchSpace({"x": Range(0.0, 0.7, step=0.1)})
    options = SearchOptions(Target.parse(target), **told)
    return Search.prepare(pipe, pipe.by_name["learn"], space, options)


def test_no_trial_reads_the_test_split_and_the_chosen_config_does(pipe):
    from llmeco_nb.evaluation.tune import judged_result

    search = prepared(pipe)
    (_, corpus), *_ = search.runner.given["corpus"]
    whole = (corpus / "test.parquet").read_bytes()
    (corpus / "test.parquet").write_bytes(b"poison")
    rows, verdict = search.arm(None, quiet)
    assert [row.outcome.state for row in rows] == ["complete"] * 2
    assert rows[0].parameters == {"x": 0.1} and verdict.ended == "spent"
    assert not any("accuracy_test" in row.outcome.metrics for row in rows)
    refused = search.runner.run({"x": 0.5}, with_test=True)
    assert refused.state == "refused" and "Parquet" in refused.reason
    (corpus / "test.parquet").write_bytes(whole)
    result = judged_result(search, {"guided": rows}, verdict)
    assert result.of("profile").test == pytest.approx(0.05)
    assert result.of("chosen").test == pytest.approx(result.value - 0.05)
    assert result.of("random") is None and result.trials_to_target is None


def test_equal_trials_cost_nothing_in_this_search_and_in_another(pipe, monkeypatch):
    search = prepared(pipe)
    rows, _ = search.arm(None, quiet)  # those of the test above, or made now
    again = [search.runner.run(row.parameters) for row in rows]
    assert all(one.reused for one in again)
    assert [one.key for one in again] == [row.outcome.key for row in rows]
    monkeypatch.setattr(type(search.runner), "_make", None)  # nothing may be made any more
    other = prepared(pipe, "accuracy_validation>=0.9", pruner="hyperband")
    assert other.folder != search.folder
    found, _ = other.arm(None, quiet)
    assert [row.parameters for row in found] == [row.parameters for row in rows]
    assert all(row.outcome.reused for row in found)
    random, _ = search.arm(2, quiet)  # its random trials are those of the guided search
    assert [row.outcome.value for row in random] == [row.outcome.value for row in rows]
    # a later target goes on with the same trials
    assert prepared(pipe, "accuracy_validation>=0.05").folder == search.folder


def test_a_trial_that_is_stopped_early_leaves_nothing(pipe):
    search = prepared(pipe)
    seen = []

    def at_second(value: float) -> bool:
        seen.append(value)
        return len(seen) == 2

    # minutes, were it not stopped
    outcome = search.runner.run({"x": 0.2, "epochs": 400, "pause": 0.5}, at_second)
    assert outcome.state == "pruned" and seen == pytest.approx([0.0005, 0.001])
    assert outcome.value is None and not outcome.reused
    left = [p.name for p in pipe.store.folder.glob(f"learn-{outcome.key}*") if p.is_dir()]
    assert left == []


def test_what_a_config_is_refused_for_and_what_ends_a_search(pipe):
    search = prepared(pipe)
    outcome = search.runner.run({"x": 0.95})
    assert outcome.state == "refused" and outcome.reason == "x is 0.95, which is too much."
    with pytest.raises(LlmecoError, match="measured no number f1_validation.*accuracy_validation"):
        prepared(pipe, "f1_validation>=0.5").runner.run({"x": 0.1})


def test_every_config_of_a_small_space_is_tried_once(tmp_path):
    from llmeco_nb.evaluation.search_stage import SearchOptions, run_search
    from llmeco_nb.evaluation.search_trials import Outcome

    ran = []

    def run(values, on_value):
        ran.append(values["x"])
        return Outcome("complete", values["x"] / 10, 0.0, 0.0)

    space = SearchSpace({"x": Range(1, 4, whole=True)})
    goal = Target("accuracy_validation", 1, 0.9)
    options = SearchOptions(goal, SearchBudget(None, 1000.0), "none")
    rows, verdict = run_search(run, space, options, tmp_path / "journal", {"x": 2}, quiet)
    assert verdict.ended == "exhausted" and sorted(set(ran)) == [1, 2, 3, 4] and ran[0] == 2

    def refusing(values, on_value):
        return Outcome("refused", None, 0.0, reason="no.") if values["x"] != 2 else run(values, 0)

    wide = SearchSpace({"x": Range(1, 99, whole=True)})
    with pytest.raises(DataError, match="Five trials in a row were refused.*no."):
        run_search(refusing, wide, options, tmp_path / "refused", {"x": 2}, quiet)


def test_without_optuna_the_command_says_how_to_get_it(monkeypatch):
    from llmeco_nb.core import MissingError
    from llmeco_nb.evaluation.search_stage import import_optuna

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingError, match=r"pip install 'llmeco\[evaluation\]'"):
        import_optuna()


@pytest.mark.parametrize(
    "told, said",
    [
        (dict(target="accuracy_test>=0.9"), "not measured on validation"),
        (dict(search=["x=1..2"]), "frozen.x: frozen has no such parameter"),
        (dict(pruner="best"), "There is no pruner best"),
        (dict(budget="soon"), "--budget soon"),
        (dict(stage="finetune"), "name one of them"),
    ],
)
def test_the_command_refuses_before_anything_runs(tmp_path, monkeypatch, told, said):
    from llmeco_nb.cli import TuneOptions, tune

    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path / "runs"))
    known = dict(stage="frozen", profile="smoke", target="accuracy_validation>=0.9")
    with pytest.raises(UsageError, match=said):
        tune(TuneOptions(**known | told))
    assert not (tmp_path / "runs").exists()
