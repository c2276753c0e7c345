"""Label errors: planted ones are found, and nothing of the test split is read."""

import builtins
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cleanlab", reason='pip install "llmeco[evaluation]"')
from llmeco_nb.core import DataError, MissingError, UsageError, create_record
from llmeco_nb.data.corpus import write_corpus
from llmeco_nb.evaluation.label_errors import (
    LabelErrorConfig,
    find_label_errors,
    label_error_candidates,
    out_of_fold_probabilities,
)
from llmeco_nb.tasks.regression import RegressionSchema
from llmeco_nb.tasks.text_classification import ClassificationSchema

NAMES = ["cold", "warm", "hot"]
WORDS = dict(cold="ice snow frost", warm="spring mild soft", hot="fire desert boil")


def rows(count: int, seed: int, start: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    label = np.arange(count) % 3
    said = [" ".join(rng.choice([*WORDS[NAMES[k]].split(), "the", "a"], 12)) for k in label]
    text = [f"{words} n{start + i}" for i, words in enumerate(said)]
    return pd.DataFrame(dict(id=[f"r{start + i}" for i in range(count)], text=text, label=label))


def corpus(folder, moved=()):
    parts = {"train": rows(90, 1), "validation": rows(30, 2, 90), "test": rows(30, 3, 120)}
    train = parts["train"]
    for i in moved:
        train.loc[i, "label"] = (train.label[i] + 1) % 3
    write_corpus(folder, parts, NAMES, {}, ClassificationSchema(labels=tuple(NAMES)))
    return folder


def found_in(record, folder, config):
    return find_label_errors(record, folder, config) / "candidates.jsonl"


def test_planted_errors_are_found_and_the_test_split_is_not_read(tmp_path):
    moved = (4, 17, 51)
    folder = corpus(tmp_path / "c", moved)
    (folder / "test.parquet").write_bytes(b"nobody reads this")
    record = create_record(tmp_path / "r", "find_label_errors")
    file = found_in(record, folder, LabelErrorConfig(folds=4, most=10))
    found = [json.loads(line) for line in file.open()]
    assert {f"r{i}" for i in moved} <= {one["id"] for one in found}
    first = found[0]
    assert first["given"] != first["likely"] and first["given_probability"] < 0.5
    assert record.metrics["texts"] == 120 and record.metrics["candidates"] == len(found) < 12
    assert sum(r["candidates"] for r in record.rows()) == len(found)


def test_no_candidate_is_an_empty_file(tmp_path):
    record = create_record(tmp_path / "r", "find_label_errors")
    file = found_in(record, corpus(tmp_path / "c"), LabelErrorConfig(most=1))
    assert len(file.read_text().splitlines()) == min(1, record.metrics["candidates"])


probabilities = st.integers(0, 10**6).map(
    lambda seed: np.random.default_rng(seed).dirichlet(np.full(3, 0.5), 60)
)


@settings(max_examples=20, deadline=None)
@given(probabilities, st.randoms())
def test_the_order_of_rows_and_of_classes_decides_nothing(p, rng):
    labels = np.arange(60) % 3
    found = {c.row for c in label_error_candidates(labels, p, NAMES)}
    for c in label_error_candidates(labels, p, NAMES):
        assert c.given == NAMES[labels[c.row]] and c.likely == NAMES[p[c.row].argmax()]
        assert c.given_probability <= c.likely_probability
    order = rng.sample(range(60), 60)
    again = {order[c.row] for c in label_error_candidates(labels[order], p[order], NAMES)}
    assert again == found
    swapped = [2, 0, 1]
    names = [NAMES[k] for k in swapped]
    other = label_error_candidates(np.argsort(swapped)[labels], p[:, swapped], names)
    assert {c.row for c in other} == found


def test_labels_that_agree_are_no_candidates():
    labels = np.arange(30) % 3
    assert label_error_candidates(labels, 0.97 * np.eye(3)[labels] + 0.01, NAMES) == []


@pytest.mark.parametrize(
    "labels, row, said",
    [
        ([0, 1, 3], [0.2, 0.3, 0.5], "Row 2 has the label 3; there are 0 to 2"),
        ([0, 1, 2], [0.2, 0.3, 0.9], "Row 1 is no set of probabilities"),
        ([0, 1, 2], [0.2, float("nan"), 0.8], "Row 1 is no set of probabilities"),
        ([0, 1, 2], [-0.2, 0.4, 0.8], "Row 1 is no set of probabilities"),
        ([0, 1], [0.2, 0.3, 0.5], "none of 2 texts and 3 classes"),
        ([1, 1, 1], [0.2, 0.3, 0.5], "All labels are the same"),
    ],
)
def test_what_is_no_probability_or_label_is_refused(labels, row, said):
    p = np.full((3, 3), 1 / 3)
    p[1] = row
    with pytest.raises(DataError, match=said):
        label_error_candidates(labels, p, NAMES)


def test_a_small_class_a_set_without_words_and_another_task_are_refused(tmp_path):
    with pytest.raises(DataError, match="Class 1 has 1 texts of 7, and 3 folds need"):
        out_of_fold_probabilities(["a b"] * 7, [0, 0, 0, 1, 0, 0, 0], 3)
    with pytest.raises(DataError, match="cannot be told apart by words"):
        out_of_fold_probabilities(["?!"] * 8, [0, 1] * 4, 2)
    numbers = rows(12, 1).rename(columns=dict(label="target")).astype(dict(target=float))
    parts = dict(train=numbers, validation=numbers.head(0), test=numbers.head(0))
    write_corpus(tmp_path / "n", parts, [], {}, RegressionSchema(low=0, high=5))
    with pytest.raises(UsageError, match="is a corpus for regression"):
        find_label_errors(create_record(tmp_path / "r", "find_label_errors"), tmp_path / "n")


def test_without_cleanlab_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name.startswith("cleanlab"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingError, match="llmeco\\[evaluation\\]"):
        label_error_candidates([0, 1], np.full((2, 2), 0.5), ["a", "b"])
