"""The light half of the task contract: schemas, checks, predictions, metrics of numbers."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.stats.regression import (
    regression_metrics,
    regression_report,
    regression_statistic,
    weighted_ranks,
)
from llmeco_nb.stats.significance import bootstrap
from llmeco_nb.tasks.contract import Cleaning, Rows, Schema
from llmeco_nb.tasks.limits import max_label_chars
from llmeco_nb.tasks.registry import (
    find_task,
    load_schema,
    save_schema,
    schema_from_json,
    task_of,
    tasks,
)
from llmeco_nb.tasks.regression import RegressionSchema

NUMBERS = st.lists(
    st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=40
).filter(lambda pairs: all(len({p[side] for p in pairs}) > 1 for side in (0, 1)))


@given(NUMBERS)
@settings(max_examples=60, deadline=None)
def test_metrics_of_numbers_are_those_of_scipy_and_scikit_learn(pairs):
    y, p = np.array(pairs, float).T
    found = regression_report(y, p)
    assert found["mae"] == pytest.approx(mean_absolute_error(y, p))
    assert found["rmse"] == pytest.approx(root_mean_squared_error(y, p))
    assert found["r2"] == pytest.approx(r2_score(y, p))
    assert found["spearman"] == pytest.approx(spearmanr(y, p).statistic, abs=1e-9)


@given(NUMBERS, st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_a_statistic_of_drawn_rows_is_the_metric_of_the_rows_written_out(pairs, seed):
    y, p = np.array(pairs, float).T
    w = np.random.default_rng(seed).integers(0, 3, (1, len(y)))
    if w.sum() == 0:
        return
    whole = [np.repeat(side, w[0]) for side in (y, p)]
    for name, value in regression_report(*whole).items():
        if name == "items":
            continue
        if name in ("r2", "spearman") and len(set(whole[0])) < 2:
            continue
        assert regression_statistic(name)(w, y, p)[0] == pytest.approx(value, abs=1e-9), name


def test_equal_values_share_their_mean_rank():
    assert weighted_ranks(np.array([[1, 1, 1]]), np.array([2.0, 1.0, 2.0])).tolist() == [
        [2.5, 1.0, 2.5]
    ]


def test_every_metric_of_numbers_has_an_interval():
    rng = np.random.default_rng(3)
    y = rng.normal(size=120)
    p = y + rng.normal(size=120)
    for name in regression_metrics:
        found = bootstrap(regression_statistic(name), y, p, resamples=300)
        assert found.low < found.estimate < found.high
        assert found.estimate == pytest.approx(regression_report(y, p)[name])
    with pytest.raises(UsageError, match="mape"):
        regression_statistic("mape")


def sample(name: str) -> Rows:
    "Three rows that fit the task of this name."
    values = {
        "text-classification": {"text": ["a", "b", "c"], "label": [0, 1, 1]},
        "regression": {"text": ["a", "b", "c"], "target": ["1", 2.5, 4]},
        "multi-label-classification": {
            "text": ["a", "b", "c"],
            "target": [["no"], [], ["yes", "no"]],
        },
        "text-pair-classification": {
            "text": ["a", "b", "c"],
            "text_pair": ["d", "e", "f"],
            "label": [0, 1, 1],
        },
    }
    return Rows("t.csv", values[name], [2, 3, 5], ["no", "yes"], Cleaning(keep_newlines=True))


def some_outputs(schema: Schema) -> np.ndarray:
    "What a model could give for two texts: an output for each label, or one."
    return np.array([[0.5, 1.5], [3.0, -1.0]])[:, : len(getattr(schema, "labels", "1"))]


@pytest.mark.parametrize("name", tasks)
def test_a_schema_survives_json_and_a_folder(name, tmp_path):
    schema = find_task(name).check(sample(name))
    assert schema_from_json(json.loads(json.dumps(schema.to_json()))) == schema
    save_schema(schema, tmp_path)
    assert load_schema(tmp_path) == schema and task_of(schema) is tasks[name]
    assert schema.prepare("It&#x27;s<br>so") == "It's\nso"


@pytest.mark.parametrize("name", tasks)
def test_answers_are_json_and_say_what_was_predicted(name):
    task = find_task(name)
    schema = task.check(sample(name))
    outputs = some_outputs(schema)
    scores = task.activate(outputs, schema)
    assert scores.dtype == np.float32 and scores.shape == outputs.shape
    answers = [task.respond(i, p) for i, p in enumerate(task.decode(scores, schema))]
    told = json.loads(json.dumps([a.model_dump() for a in answers]))
    assert [a["item"] for a in told] == [0, 1]
    if name == "regression":
        assert [a["value"] for a in told] == task.predict(scores).tolist() == [0.5, 3.0]
    elif name == "multi-label-classification":
        assert [a["labels"] for a in told] == [["no", "yes"], ["no"]]
        assert task.predict(scores).tolist() == [3, 1]
    else:
        assert [a["label"] for a in told] == ["yes", "no"]
        assert [schema.labels[i] for i in task.predict(scores)] == ["yes", "no"]
    assert task.cost("", len) == 1 and task.cost("abc", len) == 3


@pytest.mark.parametrize("unit", [1e-9, 1e-6, 1e6])
def test_the_unit_of_the_targets_changes_neither_r2_nor_the_digits_of_an_answer(unit):
    y = np.arange(20.0)
    p = y + np.sin(y)
    found, scaled = regression_report(y, p), regression_report(unit * y, unit * p)
    assert np.isclose(scaled["r2"], found["r2"]) and found["r2"] > 0.9
    assert regression_report([0.1] * 1001, [0.1 + unit] * 1001)["r2"] == 0
    schema = RegressionSchema(low=0, high=unit)
    [answer] = find_task("regression").decode(np.array([[0.123456 * unit]], np.float32), schema)
    assert np.isclose(answer.value, 0.123456 * unit, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", tasks)
def test_a_task_is_listed_wherever_tasks_are(name):
    "What CONTRIBUTING says of adding a task, as far as it can be counted."
    from llmeco_nb.data.corpus import CorpusConfig
    from llmeco_nb.evaluation.comparison import EvaluationConfig
    from llmeco_nb.evaluation.model_rows import row_types
    from llmeco_nb.finetuning.classifier import halves

    task, half, row = find_task(name), halves[name], row_types[name]
    assert task.schema.task == half.task.name == CorpusConfig(task=name).task == name
    assert task.target in [column.name for column in task.columns]
    assert tuple(half.recipes) == task.baselines
    assert EvaluationConfig(models=list(task.baselines)).models == list(task.baselines)
    metric = task.selection.metric
    assert next(iter(row.metrics)) == metric and half.monitor == f"validation_{metric}"
    assert half.mode == ("max" if task.selection.higher_is_better else "min")
    fields = {field.name for field in dataclasses.fields(row)}
    ends = {f"{one}{end}" for one in row.metrics for end in ("", "_low", "_high")}
    assert ends | {f"validation_{metric}"} <= fields
    # a record and the table name the same metrics, and the report has them
    assert set(half.further_metrics) | {metric} == set(row.metrics)
    schema = task.check(sample(name))
    first, second = task.predict(task.activate(some_outputs(schema), schema))
    targets, predicted = np.array([[first, second, first], [first, second, second]])
    assert first != second
    report = task.report(targets, predicted, schema)
    for one in row.metrics.keys() - {"accuracy"}:  # a share of items has an interval of its own
        found = row.statistic(one, schema)(np.ones((1, 3)), targets, predicted)
        assert found[0] == pytest.approx(report[one]), one


@pytest.mark.parametrize("name", tasks)
def test_a_task_can_be_served_and_corrected(name):
    for library in ("fastapi", "uvicorn", "sqlalchemy"):
        pytest.importorskip(library, reason="serving needs the extra `serve`")
    from llmeco_nb.deployment.packing import check_outputs
    from llmeco_nb.deployment.server import check_served

    task = find_task(name)
    schema = task.check(sample(name))
    check_served(task)
    field, told = task.answer_field, {task.answer_field, "predicted"}
    assert {field, "correct"} <= task.Feedback.model_fields.keys()
    assert told <= task.FeedbackResult.model_fields.keys()
    assert field in task.Response.model_fields and task.Prediction.task == name
    names = getattr(schema, "labels", ["0"])  # of a model's outputs
    check_outputs("model", names, schema)
    with pytest.raises(DataError, match="The model model"):
        check_outputs("model", [*names, "one more"], schema)
    outputs = np.eye(2, len(names))
    one, other = task.decode(task.activate(outputs, schema), schema)
    assert task_of(one) is task and task.same_answer(one, one, schema)
    assert not task.same_answer(one, other, schema)
    # what is right can be told by the field of the same name, and comes back as it was told
    right = task.correct(one, task.answered(other), None)
    assert (right.given, right.correct) == (task.answered(other), False)
    sent = task.Feedback.model_validate_json(json.dumps({"request_id": "r", field: right.given}))
    assert getattr(sent, field) == right.given == json.loads(json.dumps(right.given))
    assert task.correct(one, task.answered(one), None).correct
    assert task.correct(one, None, True).given == task.answered(one)
    if field == "labels":  # of several labels none may be right
        assert task.correct(one, [], None).given == []
    else:
        with pytest.raises(UsageError):
            task.correct(one, [], None)
    for wrong in ((None, None), (task.answered(other), True), ([[]], None), ({}, False)):
        with pytest.raises(UsageError):
            task.correct(one, *wrong)


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", tasks)
def test_a_stored_answer_is_read_as_it_was(name, data):
    task = find_task(name)
    answer = data.draw(st.builds(task.Prediction))
    again = task.from_stored(task.to_stored(answer))
    assert type(again) is task.Prediction and repr(again) == repr(answer)


@pytest.mark.parametrize("name", tasks)
@pytest.mark.parametrize("stored", ["", "[]", "{}", '{"label": 7}', '{"value": "x"}'])
def test_a_stored_answer_that_is_none_is_refused(name, stored):
    with pytest.raises(DataError, match=f"stored answer of {name}"):
        find_task(name).from_stored(stored)


def test_a_target_that_is_no_number_is_refused_with_its_row():
    rows = sample("regression")
    rows.values["target"][1] = "2,5"
    with pytest.raises(DataError, match=r"t\.csv, row 3.*'2,5'.*point"):
        find_task("regression").check(rows)


def test_a_label_that_no_client_could_send_back_is_refused_with_its_row():
    rows = sample("text-classification")
    rows.labels[1] = "y" * (max_label_chars + 1)
    with pytest.raises(DataError, match=r"t\.csv, row 3.*101 characters"):
        find_task("text-classification").check(rows)


def test_texts_cleaned_in_a_way_that_is_not_known_are_refused(tmp_path):
    (tmp_path / "schema.json").write_text(
        '{"task": "regression", "low": 0, "high": 1, "cleaning": {"version": 9}}'
    )
    with pytest.raises(DataError, match=r"schema\.json.*version 9"):
        load_schema(tmp_path)


@pytest.mark.parametrize(
    "said", ['"task": ["regression"]', '"task": "regression", "cleaning": {"unicode": "NFC"}']
)
def test_a_schema_of_unknown_fields_is_refused_by_its_file(tmp_path, said):
    (tmp_path / "schema.json").write_text("{" + said + ', "low": 0, "high": 1}')
    with pytest.raises(DataError, match=r"schema\.json"):
        load_schema(tmp_path)
