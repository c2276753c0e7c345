"""Metrics against scikit-learn on whatever hypothesis finds, and the symmetries they must have."""

import itertools
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.stats.metrics import (
    accuracy,
    averaged,
    balanced_accuracy,
    class_scores,
    class_table,
    classification_report,
    confused_pairs,
    confusion_figure,
    confusion_matrix,
    mcc,
    metric,
    precision_recall_f1,
    score,
)

fast = settings(max_examples=60, deadline=None)


@st.composite
def answers(draw, classes=6, items=40):
    n = draw(st.integers(1, classes))
    pairs = draw(
        st.lists(
            st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), min_size=1, max_size=items
        )
    )
    return *map(np.array, zip(*pairs)), n


@fast
@given(answers())
def test_whole_matrix_metrics_are_scikit_learns(data):
    labels, predicted, n = data
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # scikit-learn warns of classes that are called and never true, and of single classes
        assert accuracy(labels, predicted) == pytest.approx(sk.accuracy_score(labels, predicted))
        assert balanced_accuracy(labels, predicted) == pytest.approx(
            sk.balanced_accuracy_score(labels, predicted)
        )
        assert mcc(labels, predicted) == pytest.approx(
            sk.matthews_corrcoef(labels, predicted), abs=1e-12
        )
        assert (
            confusion_matrix(labels, predicted, n)
            == sk.confusion_matrix(labels, predicted, labels=range(n))
        ).all()


@fast
@given(answers(), st.sampled_from(["macro", "weighted", "micro"]))
def test_averages_are_scikit_learns_whatever_n_classes_says(data, average):
    labels, predicted, n = data
    theirs = sk.precision_recall_fscore_support(
        labels, predicted, average=average, zero_division=0
    )[:3]
    assert precision_recall_f1(labels, predicted, average=average) == pytest.approx(theirs)
    assert precision_recall_f1(labels, predicted, n + 3, average) == pytest.approx(theirs)


@fast
@given(answers())
def test_class_scores_are_scikit_learns(data):
    labels, predicted, n = data
    theirs = sk.precision_recall_fscore_support(labels, predicted, labels=range(n), zero_division=0)
    assert np.allclose(class_scores(confusion_matrix(labels, predicted, n)), theirs)
    assert np.allclose(precision_recall_f1(labels, predicted, n, None), theirs[:3])


@fast
@given(answers(classes=2))
def test_binary_is_the_second_class(data):
    labels, predicted, _ = data
    theirs = sk.precision_recall_fscore_support(labels, predicted, labels=[0, 1], zero_division=0)
    assert precision_recall_f1(labels, predicted, 2, "binary") == pytest.approx(
        [t[1] for t in theirs[:3]]
    )


@fast
@given(answers(), st.randoms())
def test_neither_the_order_of_items_nor_the_names_of_classes_matter(data, random):
    labels, predicted, n = data
    order, names = list(range(len(labels))), list(range(n))
    random.shuffle(order)
    random.shuffle(names)
    assert classification_report(labels, predicted) == classification_report(
        labels[order], predicted[order]
    )
    assert classification_report(labels, predicted) == pytest.approx(
        classification_report(np.array(names)[labels], np.array(names)[predicted])
    )


@fast
@given(answers())
def test_bounds_and_identities(data):
    labels, predicted, n = data
    numbers = classification_report(labels, predicted, n)
    assert (
        all(0 <= v <= 1 for k, v in numbers.items() if k not in ("mcc", "items"))
        and -1 - 1e-12 <= numbers["mcc"] <= 1 + 1e-12
    )
    assert precision_recall_f1(labels, predicted, average="micro") == pytest.approx(
        (numbers["accuracy"],) * 3
    )
    assert numbers["weighted_recall"] == pytest.approx(numbers["accuracy"])
    p, r, _ = precision_recall_f1(labels, predicted)
    assert numbers["macro_f1"] <= (2 * p * r / (p + r) if p + r else 0) + 1e-12
    assert mcc(labels, predicted) == pytest.approx(mcc(predicted, labels), abs=1e-12)
    assert classification_report(labels, labels)["macro_f1"] == 1 == accuracy(labels, labels)


@fast
@given(st.lists(answers(), min_size=2, max_size=5))
def test_a_stack_of_matrices_scores_like_each_of_them(several):
    matrices = np.stack([confusion_matrix(y, p, 6) for y, p, _ in several])
    for name, average in itertools.product(
        ("accuracy", "balanced_accuracy", "mcc", "precision", "recall", "f1"),
        ("macro", "weighted", "micro", None),
    ):
        assert np.allclose(
            score(matrices, name, average), [score(m, name, average) for m in matrices]
        ), (name, average)


@fast
@given(
    answers(),
    st.sampled_from([-1, 7, 0.5, float("nan"), float("inf"), "1", None]),
    st.booleans(),
    st.data(),
)
def test_what_is_no_class_is_refused_wherever_it_stands(data, bad, in_labels, where):
    labels, predicted, n = data
    columns = [labels.tolist(), predicted.tolist()]
    columns[0 if in_labels else 1][where.draw(st.integers(0, len(labels) - 1))] = bad
    with pytest.raises(DataError):
        confusion_matrix(*columns, n_classes=6)


@pytest.mark.parametrize(
    "labels, predicted", [([], []), ([0, 1], [0]), ([0], [0, 1]), ([[0, 1]], [[0, 1]]), (3, 3)]
)
def test_unequal_empty_and_nested_columns_are_refused(labels, predicted):
    for f in (
        accuracy,
        balanced_accuracy,
        mcc,
        confusion_matrix,
        precision_recall_f1,
        classification_report,
    ):
        with pytest.raises(DataError):
            f(labels, predicted)


def test_errors_name_the_item_and_the_choice():
    with pytest.raises(DataError, match="label of item 2 is 5; with 3 classes"):
        confusion_matrix([0, 1, 5], [0, 1, 2], 3)
    with pytest.raises(DataError, match=r"found 0\.7"):
        confusion_matrix([0, 1], [1, 0.7])
    with pytest.raises(UsageError, match="balanced_accuracy"):
        score([[1]], "balanced")
    with pytest.raises(UsageError, match="macro"):
        averaged([[1, 0], [0, 1]], "f1", "marco")
    with pytest.raises(UsageError, match="two classes"):
        averaged(np.eye(3), "f1", "binary")
    with pytest.raises(UsageError, match="'mcc'; there are precision, recall, f1"):
        averaged(np.eye(3), "mcc", "macro")


@fast
@given(answers(), st.integers(1, 5))
def test_confused_pairs_are_the_largest_cells_off_the_diagonal(data, top):
    labels, predicted, n = data
    m, names = confusion_matrix(labels, predicted, n), [f"class {i}" for i in range(n)]
    pairs = confused_pairs(m, names, top)
    assert [p.count for p in pairs] == sorted(
        (int(c) for (i, j), c in np.ndenumerate(m) if i != j and c), reverse=True
    )[:top]
    assert all(m[names.index(p.truth), names.index(p.predicted)] == p.count for p in pairs)
    assert [row.support for row in class_table(m, names)] == m.sum(1).tolist()
    with pytest.raises(DataError):
        class_table(m, names + ["one more"])


@pytest.mark.parametrize("n", [1, 4, 20, 77])
def test_confusion_figure_draws_any_number_of_classes(n):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig = confusion_figure(np.arange(n * n).reshape(n, n), [f"intent_{i}" for i in range(n)])
    texts = [t.get_text() for t in fig.axes[0].texts]
    assert texts == ([str(c) for c in range(n * n)] if n <= 15 else [])
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()][:1] == ["intent_0"] or n > 40
    plt.close(fig)


def test_evaluate_metrics_take_batches_and_combine():
    import evaluate

    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    for cuts in ([], [1], [64, 128, 192], list(range(10, 200, 10))):
        m = metric("f1", "weighted", 5)
        for y, p in zip(np.split(labels, cuts), np.split(predicted, cuts)):
            m.add_batch(references=y, predictions=p)
        assert m.compute() == {
            "weighted_f1": pytest.approx(sk.f1_score(labels, predicted, average="weighted"))
        }
        assert m.compute(references=[0, 1], predictions=[0, 1]) == {
            "weighted_f1": 1
        }  # nothing is left of the first round
    both = evaluate.combine(
        [
            metric("accuracy"),
            metric("f1"),
            metric("f1", "micro"),
            metric("mcc"),
            metric("recall", None),
        ]
    )
    numbers = both.compute(references=labels, predictions=predicted)
    assert (
        set(numbers) == {"accuracy", "macro_f1", "micro_f1", "mcc", "recall"}
        and numbers["micro_f1"] == numbers["accuracy"]
    )
    for bad in (dict(predictions=[0.7], references=[1]), dict(predictions=[], references=[]), {}):
        with pytest.raises(DataError):
            metric("f1").compute(**bad)
    with pytest.raises(DataError):
        metric("f1", n_classes=2).compute(predictions=[2], references=[1])
    with pytest.raises(UsageError):
        metric("f3")


def test_ground_floor_imports_stay_light():
    heavy = (
        "torch transformers datasets evaluate sklearn scipy statsmodels pandas matplotlib".split()
    )
    code = (
        "import sys, llmeco_nb.stats.metrics, llmeco_nb.stats.significance\n"
        "import llmeco_nb.stats.claims\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
