"""Baselines and comparison.

The linear models are held against scikit-learn and arithmetic by hand, the table against its stored
predictions.
"""

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import (
    DataError,
    MissingError,
    UsageError,
    create_record,
    read_json,
    sha256_of,
    write_json,
)
from llmeco_nb.data.corpus import CorpusConfig, build_corpus, read_split, write_corpus
from llmeco_nb.data.splits import split_rows
from llmeco_nb.evaluation.comparison import (
    EvaluationConfig,
    evaluate_models,
    label_sizes,
)
from llmeco_nb.evaluation.comparison_table import ComparisonTable
from llmeco_nb.evaluation.model_rows import ShownMetric
from llmeco_nb.finetuning.classifier import labelled_subset
from llmeco_nb.finetuning.linear import (
    LinearText,
    Recipe,
    RowSplit,
    fit,
    interpolate,
    log_count_ratio,
    recipes,
)
from llmeco_nb.finetuning.ngram_counts import BagOfNgrams, count_ngrams
from llmeco_nb.stats.claims import read_claims
from llmeco_nb.tasks.predictions import read_predictions_file, scores_of
from llmeco_nb.tasks.words import token_pattern

WORDS = {
    1: "awful terrible worst",
    2: "poor weak dull",
    3: "average okay middling",
    4: "good solid pleasant",
    5: "superb wonderful best",
}
pytestmark = pytest.mark.filterwarnings("ignore:The parameter 'token_pattern'")
odd = [
    "",
    "   ",
    "!!!",
    "Don't — DON’T!",
    "naïve Ünïcödé Straße İstanbul",
    "日本語のテキスト。",
    "a\tb\nc\u00a0d",
    "x" * 300,
    "🙂 good",
]


def config(**values) -> EvaluationConfig:
    "A config without a learning curve, unless one is given."
    return EvaluationConfig(**{"learning_curve": [], **values})


def stars_table(n: int, classes: int = 5) -> pd.DataFrame:
    "Texts whose words tell, mostly, how many stars they carry."
    rng, rows = np.random.default_rng(1), []
    for i in range(n):
        s = int(rng.integers(1, classes + 1))
        said = s if rng.random() < 0.8 else int(rng.integers(1, classes + 1))
        rows.append(
            (
                f"Number {i}: "
                + " ".join(rng.choice("film story actor scene music end camera".split(), 7))
                + " "
                + " ".join(rng.choice(WORDS[said].split(), 2))
                + "!",
                s,
            )
        )
    return pd.DataFrame(rows, columns=["body", "stars"])


@pytest.fixture(scope="module")
def stars(tmp_path_factory):
    "A corpus of five classes, from a CSV with columns of its own names."
    folder = tmp_path_factory.mktemp("stars")
    stars_table(400).to_csv(folder / "reviews.csv", index=False)
    config = CorpusConfig(
        source=str(folder / "reviews.csv"), text_column="body", label_column="stars", max_rows=None
    )
    return build_corpus(create_record(folder / "data", "data"), config)


@pytest.fixture(scope="module")
def outside(stars, tmp_path_factory):
    """Predictions of two outside models: one that is mostly right, one that guesses, with 60 labels
    each.
    """
    folder, rng, frames = tmp_path_factory.mktemp("outside"), np.random.default_rng(2), {}
    for name, share in (("sharp", 0.97), ("guess", 0.2)):
        parts = []
        for split in ("test", "validation"):
            rows = read_split(stars, split)
            p = rng.random((len(rows), 5)).astype(np.float32) * 0.1
            p[
                np.arange(len(rows)),
                np.where(rng.random(len(rows)) < share, rows.label, rng.integers(0, 5, len(rows))),
            ] += 1
            parts.append(
                pd.DataFrame(
                    dict(
                        model=name,
                        labels=60,
                        split=split,
                        id=rows.id,
                        label=rows.label,
                        predicted=p.argmax(1),
                        **{f"score_{c}": p[:, c] for c in range(5)},
                    )
                )
            )
        frames[name] = pd.concat(parts).sample(frac=1, random_state=3)
        (folder / name).mkdir()
        frames[name].to_parquet(folder / name / "predictions", index=False)
    (folder / "sharp" / "metrics.json").write_text('{"seconds": 12.5, "parameters": 1234}')
    return folder, frames


@pytest.fixture(scope="module")
def compared(stars, outside, tmp_path_factory):
    "Two runs of the stage with the same arguments."
    records = [
        create_record(tmp_path_factory.mktemp("evaluate") / name, "evaluate")
        for name in ("first", "second")
    ]
    for r in records:
        given = [str(outside[0] / n / "predictions") for n in ("sharp", "guess")]
        evaluate_models(r, str(stars), given, config(num_labeled=[100, 0], learning_curve=[40]))
    return records


# -- linear models


@pytest.mark.parametrize(
    "bag",
    [
        BagOfNgrams(),
        BagOfNgrams(low=2, high=3),
        BagOfNgrams("char_wb", 2, 5),
        BagOfNgrams("char_wb", 1, 3),
        BagOfNgrams(pattern=r"(?u)\b\w\w+\b"),
    ],
    ids=str,
)
def test_counts_are_scikit_learns(bag):
    from sklearn.feature_extraction.text import CountVectorizer

    texts = [*odd, *stars_table(30).body]
    theirs = CountVectorizer(
        analyzer=bag.analyzer, ngram_range=(bag.low, bag.high), token_pattern=bag.pattern
    ).fit(texts)
    ours = count_ngrams(texts, bag)
    names = ours.spell(np.arange(ours.matrix.shape[1]))
    assert sorted(names) == sorted(theirs.vocabulary_)
    assert (
        ours.matrix.toarray()
        == theirs.transform(texts).toarray()[:, [theirs.vocabulary_[n] for n in names]]
    ).all()


def pipelines(C):
    "What scikit-learn makes of the two recipes that it can express."
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.svm import LinearSVC

    tfidf = lambda analyzer, lengths: TfidfVectorizer(
        analyzer=analyzer,
        ngram_range=lengths,
        token_pattern=token_pattern,
        sublinear_tf=True,
        min_df=2,
    )
    yield (
        "tfidf_lr",
        make_pipeline(
            tfidf("word", (1, 2)),
            LogisticRegression(
                C=C, solver="liblinear", dual=True, tol=1e-2, max_iter=1000, random_state=0
            ),
        ),
    )
    yield (
        "wordchar_svc",
        make_pipeline(
            make_union(tfidf("word", (1, 2)), tfidf("char_wb", (2, 5))),
            LinearSVC(C=C, dual=True, tol=1e-2, max_iter=1000, random_state=0),
        ),
    )


@pytest.mark.parametrize("classes", [2, 5])
def test_saved_models_score_as_scikit_learn(classes, tmp_path):
    table = stars_table(240, classes)
    texts, y = table.body.tolist(), table.stars.to_numpy() - 1
    train, validation, test = np.arange(150), np.arange(150, 200), np.arange(200, 240)
    counted = {
        b.analyzer: count_ngrams(texts, b) for b in (BagOfNgrams(), BagOfNgrams("char_wb", 2, 5))
    }
    for name, theirs in pipelines(0.5):
        names = [str(c) for c in range(classes)]
        rows = RowSplit(train, validation, test)
        model, scores = fit(name, counted, y, rows, names, settings={"C": 0.5})
        model.save(tmp_path / name)
        ours = LinearText.load(tmp_path / name).scores([texts[i] for i in test] + odd)
        assert np.abs(ours[: len(test)] - scores).max() < 1e-6
        asked = [texts[i] for i in test] + odd
        if classes == 2:
            assert (
                np.abs(
                    2 * ours[:, 1]
                    - theirs.fit([texts[i] for i in train], y[train]).decision_function(asked)
                ).max()
                < 1e-6
            )
        else:
            for c in range(classes):  # one class against the rest, each with the solver's seed
                assert (
                    np.abs(
                        ours[:, c]
                        - theirs.fit([texts[i] for i in train], y[train] == c).decision_function(
                            asked
                        )
                    ).max()
                    < 1e-6
                )


def test_nbsvm_is_the_papers_equation(tmp_path):
    """Every number from the definitions, with dense arithmetic; only the SVM itself is
    scikit-learn's.
    """
    from sklearn.svm import LinearSVC

    texts = [
        "good fun good",
        "good film fun",
        "fun film good",
        "bad film bad",
        "bad dull film",
        "dull bad film",
        "good bad",
        "fun dull",
    ]
    y = np.array([1, 1, 1, 0, 0, 0, 1, 0])
    vocabulary = ["good", "fun", "film", "bad", "dull"]  # in at least two training texts
    f = np.array([[float(w in t.split()) for w in vocabulary] for t in texts])
    p, q = 1 + f[:6][y[:6] == 1].sum(0), 1 + f[:6][y[:6] == 0].sum(0)
    assert p.tolist() == [4, 4, 3, 1, 1] and q.tolist() == [1, 1, 4, 4, 3]
    r = np.log((p / 13) / (q / 13))
    svm = LinearSVC(C=0.1, dual=True, tol=1e-2, max_iter=1000, random_state=0).fit(
        r * f[:6], y[:6] == 1
    )
    w, mean = svm.coef_[0], np.abs(svm.coef_[0]).sum() / 5
    expected = (f * r) @ (0.25 * w + 0.75 * mean) + svm.intercept_[0]
    bag = BagOfNgrams(high=1, binary=True)
    counted = count_ngrams(texts, bag)
    order = [counted.spell(np.arange(5)).index(v) for v in vocabulary]
    x = counted.matrix[:6].toarray().clip(max=1)[:, order]
    assert (
        np.allclose(log_count_ratio(counted.matrix[:6].minimum(1)[:, order], y[:6] == 1), r)
        and (x == f[:6]).all()
    )
    assert np.allclose(interpolate(w, 0.25), 0.25 * w + 0.75 * mean)
    before = recipes["nbsvm"]
    try:
        recipes["nbsvm"] = Recipe("unigrams", [bag], [0.1], [0.25])
        rows = RowSplit(np.arange(6), np.array([6, 7]), np.arange(8))
        model, scores = fit("nbsvm", {"word": counted}, y, rows, ["bad", "good"])
    finally:
        recipes["nbsvm"] = before
    model.save(tmp_path / "nb")
    assert (
        np.abs(2 * scores[:, 1] - expected).max() < 1e-6
        and np.abs(2 * LinearText.load(tmp_path / "nb").scores(texts)[:, 1] - expected).max() < 1e-6
    )


def test_answers_with_numpy_alone(compared):
    """Loading and scoring import neither scikit-learn nor scipy, pandas or torch, even where they
    are installed.
    """
    folder = compared[0].artifact("baselines") / "wordchar_svc-100"
    code = (
        "import sys; from llmeco_nb.finetuning.linear import LinearText; m = "
        "LinearText.load(sys.argv[1]); print(m.classes[m.probabilities(['superb and "
        "wonderful']).argmax()]); m.why('superb', 0); "
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'sklearn', 'scipy', 'torch', "
        "'pandas', 'pyarrow', 'matplotlib'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split("\n")[:2] == ["5", "[]"], (
        done.stdout + done.stderr
    )


def test_damaged_models_are_refused(compared, tmp_path):
    import shutil

    damages = {
        "weights_0.npy": (lambda f: f.unlink(), MissingError),
        "idf_1.npy": (lambda f: f.write_bytes(b"not an array"), DataError),
        "vocabulary_0.json": (lambda f: f.write_text('["one"]'), DataError),
        "model.json": (lambda f: f.write_text('{"form": "other"}'), DataError),
    }
    for name, (damage, error) in damages.items():
        copy = shutil.copytree(
            compared[0].artifact("baselines") / "wordchar_svc-100", tmp_path / name
        )
        damage(copy / name)
        with pytest.raises(
            error, match=name.split("_")[0].split(".")[0] if name != "model.json" else "form"
        ):
            LinearText.load(copy)


@pytest.mark.parametrize(
    "change", [dict(bags=[dict(analyser="word")]), dict(bags=None), dict(scale=None)]
)
def test_a_linear_model_that_is_written_otherwise_is_refused_by_its_file(
    compared, tmp_path, change
):
    from_here = compared[0].artifact("baselines") / "wordchar_svc-100"
    copy = shutil.copytree(from_here, tmp_path / "model")
    facts = read_json(copy / "model.json")
    for wrong in (change, dict(classes=facts["classes"][:-1])):
        write_json(copy / "model.json", facts | wrong)
        with pytest.raises(DataError, match=r"model/model\.json"):
            LinearText.load(copy)


# -- the table


def test_rows_follow_from_the_stored_predictions(compared, outside):
    from scipy.stats import binomtest
    from sklearn.metrics import accuracy_score, f1_score
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.proportion import proportion_confint

    folder = compared[0].artifact("table")
    table, answers = (
        read_json(folder / "table.json"),
        read_predictions_file(folder / "predictions.parquet"),
    )
    test = {
        k: g.set_index("id")
        for k, g in answers[answers.split == "test"].groupby(["model", "num_labeled"])
    }
    assert (
        {(r["model"], r["labels"]) for r in table["rows"]} == set(test)
        and table["sizes"] == [100, table["train_items"], 60]
        and table["curve"] == [40]
    )
    tested = []
    for r in table["rows"]:
        t = test[r["model"], r["labels"]]
        assert r["accuracy"] == pytest.approx(accuracy_score(t.target, t.prediction)) and r[
            "macro_f1"
        ] == pytest.approx(f1_score(t.target, t.prediction, average="macro", zero_division=0))
        assert (r["accuracy_low"], r["accuracy_high"]) == pytest.approx(
            proportion_confint((t.target == t.prediction).sum(), len(t), method="wilson")
        )
        assert r["macro_f1_low"] <= r["macro_f1"] <= r["macro_f1_high"]
        assert (scores_of(t).argmax(1) == t.prediction).all()
        block = [o for o in table["rows"] if o["labels"] == r["labels"] and o["baseline"]]
        reference = max(block, key=lambda o: o["validation_accuracy"])
        if r["labels"] in table["curve"] or r is reference:
            assert "p" not in r
            continue
        o = test[reference["model"], r["labels"]].loc[t.index]
        mine, its = (t.target == t.prediction).to_numpy(), (o.target == o.prediction).to_numpy()
        b, c = int((mine & ~its).sum()), int((its & ~mine).sum())
        assert (
            r["reference"] == reference["model"]
            and r["difference"] == pytest.approx(r["accuracy"] - reference["accuracy"])
            and r["difference_low"] <= r["difference"] <= r["difference_high"]
        )
        assert r["p"] == pytest.approx(binomtest(b, b + c).pvalue if b + c else 1)
        tested.append(r)
    claims = read_claims(folder / "claims.json")
    # the row to serve against the best baseline of all is judged alone, the others together
    first, *rest = claims
    served = next(
        r for r in table["rows"] if (r["model"], r["labels"]) == tuple(table["best"].values())
    )
    baselines = [r for r in table["rows"] if r["baseline"] and r["labels"] in table["sizes"]]
    opponent = max(baselines, key=lambda r: (r["validation_accuracy"], r["labels"]))
    assert first.primary and first.p_adjusted == first.p and not any(c.primary for c in rest)
    assert first.difference == pytest.approx(served["accuracy"] - opponent["accuracy"])
    assert opponent["labels"] != served["labels"] and len(rest) == len(tested)
    adjusted = multipletests([r["p"] for r in tested], method="holm")[1]
    assert [r["p_adjusted"] for r in tested] == pytest.approx(adjusted)
    for r in tested:  # the verdict is about the row's model, as its difference is
        shown = r["p_adjusted"] <= 0.05
        said = "supported" if r["difference"] > 0 else "refuted"
        assert r["verdict"] == (said if shown else "not shown")
    assert any(r["baseline"] and r["verdict"] == "refuted" for r in tested)
    verdicts = {r["model"]: r["verdict"] for r in tested if not r["baseline"]}
    assert verdicts == {"sharp": "supported", "guess": "refuted"}
    stored = test["sharp", 60].sort_index()
    assert (
        stored.prediction.tolist()
        == outside[1]["sharp"].query("split == 'test'").sort_values("id").predicted.tolist()
    )


def test_the_table_reads_back_as_it_was_written(compared, tmp_path):
    folder = compared[0].artifact("table")
    table = ComparisonTable.load(folder)
    table.save(tmp_path)
    assert (tmp_path / "table.json").read_bytes() == (folder / "table.json").read_bytes()
    assert table.best_row.model == "sharp" and table.block(60)[0] is table.best_row
    (tmp_path / "table.json").write_text('{"rows": [{"model": "x"}]}')
    with pytest.raises(DataError, match="no comparison"):
        ComparisonTable.load(tmp_path)


def test_record_says_what_was_measured(compared):
    record = compared[0]
    table, metrics = read_json(record.artifact("table") / "table.json"), record.metrics
    by = {(r["model"], r["labels"]): r for r in table["rows"]}
    best = by[table["best"]["model"], table["best"]["labels"]]
    assert metrics["best_accuracy"] == best["accuracy"] and best["model"] == "sharp"
    assert (
        metrics["accuracy_nbsvm_100"] == by["nbsvm", 100]["accuracy"]
        and metrics["accuracy_nbsvm_all"] == by["nbsvm", table["train_items"]]["accuracy"]
        and "accuracy_sharp_60" in metrics
    )
    assert (
        by["sharp", 60]["parameters"] == 1234
        and {"model": "sharp", "labels": 60, "seconds": 12.5} in record.rows()
    )
    summary = (record.path / "summary.txt").read_text()
    assert (
        "sharp" in summary and f"{100 * best['accuracy']:.1f} [" in summary and "NB-SVM" in summary
    )
    for entry in read_json(record.artifact("baselines") / "index.json"):
        model = LinearText.load(record.artifact("baselines") / entry["folder"])
        assert (model.name, model.about["labels"]) == (
            entry["model"],
            entry["labels"],
        ) and model.parameters == by[entry["model"], entry["labels"]]["parameters"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_saved_baselines_give_the_stored_answers(compared, stars, split):
    answers, rows = (
        read_predictions_file(compared[0].artifact("table") / "predictions.parquet"),
        read_split(stars, split),
    )
    for name in recipes:
        mine = answers[
            (answers.split == split) & (answers.model == name) & (answers.num_labeled == 100)
        ]
        stored = scores_of(mine.set_index("id").loc[rows.id])
        model = LinearText.load(compared[0].artifact("baselines") / f"{name}-100")
        assert np.abs(model.probabilities(rows.text.tolist()) - stored).max() < 1e-5


def test_two_runs_give_the_same_bytes(compared):
    for artifact in ("table", "baselines"):
        assert sha256_of(compared[0].artifact(artifact)) == sha256_of(
            compared[1].artifact(artifact)
        )


def test_a_model_knows_only_its_labelled_subset(stars, tmp_path):
    "N-grams that stand in other training texts alone are not in the vocabulary."
    record = create_record(tmp_path / "r", "evaluate")
    evaluate_models(record, str(stars), config=config(num_labeled=[50], models=["nbsvm"]))
    model = LinearText.load(record.artifact("baselines") / "nbsvm-50")
    seen = labelled_subset(read_split(stars, "train"), 50, 0)
    assert (
        set(model.vocabularies[0]) <= {g for t in seen.text for g in BagOfNgrams().ngrams(t)}
        and model.about["labels"] == len(seen) == 50
    )


def test_unusable_predictions_are_refused(stars, outside, tmp_path):
    sharp = outside[1]["sharp"]
    spoiled = {
        "lacks": sharp.iloc[5:],
        "other targets": sharp.assign(label=(sharp.label + 1) % 5),
        "what its scores say": sharp.assign(predicted=(sharp.predicted + 1) % 5),
        "needs 5 numbers": sharp.drop(columns="score_4"),
        "no predictions for the test": sharp[sharp.split == "validation"],
        "already in the table": sharp.assign(model="nbsvm"),
    }
    file = tmp_path / "predictions"

    def evaluate(path):
        record = create_record(tmp_path / "r", "evaluate")
        evaluate_models(record, str(stars), [str(path)], config(models=["majority"]))

    for reason, table in spoiled.items():
        table.to_parquet(file, index=False)
        with pytest.raises(DataError, match=reason):
            evaluate(file)
    file.write_text("no table")
    with pytest.raises(DataError, match="Parquet"):
        evaluate(file)
    with pytest.raises(MissingError):
        evaluate(tmp_path / "nowhere")


# -- the sizes follow the data


@settings(max_examples=200, deadline=None)
@given(
    asked=st.lists(st.integers(0, 3000), max_size=6),
    classes=st.integers(2, 1000),
    more=st.integers(0, 2000),
)
def test_whatever_size_is_kept_can_be_drawn(asked, classes, more):
    total = classes + more
    drawn, left_out = label_sizes(asked, total, classes)
    assert all(classes <= n <= total for n in drawn) and all(0 < n < classes for n in left_out)
    assert {n if 0 < n < total else total for n in asked} == {*drawn, *left_out}
    assert len({*drawn, *left_out}) == len(drawn) + len(left_out)
    labels = [i % classes for i in range(total)]
    rows = pd.DataFrame(dict(id=[str(i) for i in range(total)], text="", label=labels))
    for n in drawn[:1]:
        subset = labelled_subset(rows, n)
        assert len(subset) == n and subset.label.nunique() == classes


def corpus_of(folder, rows: int, classes: int, absent: tuple[int, ...] = ()) -> str:
    "A corpus of so many rows and classes; no training text has one of the `absent` classes."
    labels = [i % classes for i in range(rows)]
    texts = [f"text {i} says word{k} and word{k}" for i, k in enumerate(labels)]
    table = pd.DataFrame(dict(id=[f"{i:05}" for i in range(rows)], text=texts, label=labels))
    parts = split_rows(table, 0.1, 0.2)
    parts["train"] = parts["train"][~parts["train"].label.isin(absent)]
    write_corpus(folder, parts, [f"class {c}" for c in range(classes)], {})
    return str(folder)


@pytest.mark.parametrize(
    "rows,classes,curve",
    [(30, 2, [25, 50]), (30, 10, [5, 25]), (450, 150, [25, 100, 500]), (1500, 500, [100, 500])],
)
def test_the_curve_follows_the_data(tmp_path, rows, classes, curve):
    "From thirty rows on, and for more classes than a point of the curve has labels."
    record = create_record(tmp_path / "r", "evaluate")
    models = ["majority", "tfidf_lr"] if classes < 100 else ["majority"]
    asked = config(num_labeled=[100, 0], learning_curve=curve, models=models)
    evaluate_models(record, corpus_of(tmp_path / "c", rows, classes), config=asked)
    table = read_json(record.artifact("table") / "table.json")
    total = table["train_items"]
    small = sorted({n for n in [100, *curve] if n < min(classes, total)})
    assert table["left_out"] == small and table["least"] == classes
    wanted = {min(n, total) or total for n in (100, 0, *curve)} - {*small}
    assert {*table["sizes"], *table["curve"]} == {r["labels"] for r in table["rows"]} == wanted
    summary = (record.path / "summary.txt").read_text()
    assert record.metrics.get("labels_left_out", "") == ", ".join(map(str, small))
    assert all(str(n) in summary.splitlines()[-1] for n in small)
    assert ("left out" in summary) == bool(small)


def test_nothing_that_can_be_drawn_means_everything(tmp_path):
    record = create_record(tmp_path / "r", "evaluate")
    asked = config(num_labeled=[3], learning_curve=[2], models=["majority", "nbsvm"])
    evaluate_models(record, corpus_of(tmp_path / "c", 60, 12), config=asked)
    table = read_json(record.artifact("table") / "table.json")
    assert table["sizes"] == [table["train_items"]] and table["curve"] == []
    assert table["left_out"] == [2, 3]


def test_a_class_without_training_texts_is_never_predicted(tmp_path):
    corpus = corpus_of(tmp_path / "c", 120, 4, absent=(2,))
    record = create_record(tmp_path / "r", "evaluate")
    evaluate_models(record, corpus, config=config(num_labeled=[3, 0], learning_curve=[2]))
    answers = read_predictions_file(record.artifact("table") / "predictions.parquet")
    known = answers[(answers.target != 2) & (answers.model != "majority")]
    known = known[known.num_labeled == known.num_labeled.max()]
    assert (known.prediction == known.target).all()
    assert not (answers.prediction == 2).any()
    assert record.metrics["labels_left_out"] == "2"


@pytest.mark.parametrize("labels", [0, 3, 5000])
def test_predictions_keep_their_number_of_labels(stars, outside, tmp_path, labels):
    "Where no baseline can learn from as many, a model stands alone, and nothing is claimed of it."
    file, record = tmp_path / "predictions", create_record(tmp_path / "r", "evaluate")
    outside[1]["sharp"].assign(labels=labels).to_parquet(file, index=False)
    asked = config(num_labeled=[0], models=["majority", "tfidf_lr"])
    evaluate_models(record, str(stars), [str(file)], asked)
    table = read_json(record.artifact("table") / "table.json")
    assert table["sizes"] == [table["train_items"], labels]
    assert table["best"] == dict(model="sharp", labels=labels)
    (alone,) = [r for r in table["rows"] if r["labels"] == labels]
    assert alone["model"] == "sharp" and "p" not in alone
    assert f"{labels:,} labels" in (record.path / "summary.txt").read_text()


def test_wrong_parameters_are_named(stars, tmp_path):
    for wrong, message in (
        (dict(learning_curve=[-3]), r"learning_curve\[0\] is -3"),
        (dict(num_labeled=[-1]), r"num_labeled\[0\] is -1"),
        (dict(models=["nbsvn"]), r"models\[0\] is 'nbsvn'"),
        (dict(models=["median"]), "no baseline median for text-classification"),
    ):
        with pytest.raises(UsageError, match=message):
            record = create_record(tmp_path / "r", "evaluate")
            evaluate_models(record, str(stars), config=config(num_labeled=[0]).replace(**wrong))


def test_small_errors_are_shown_with_digits_that_count():
    error, share = ShownMetric("mean absolute error", ""), ShownMetric("accuracy", "%")
    shown = [error.text(x) for x in (0.00412, -0.00412, 4.1e-7, 0.0, 0.5, 12.345)]
    assert shown == ["0.00412", "-0.00412", "4.1e-07", "0.00", "0.50", "12.35"]
    assert error.text(0.0123456, 3) == "0.01235" and share.text(0.00021) == "0.02"


def test_a_corpus_without_validation_is_refused(tmp_path):
    stars_table(60).to_csv(tmp_path / "reviews.csv", index=False)
    config = CorpusConfig(
        source=str(tmp_path / "reviews.csv"),
        text_column="body",
        label_column="stars",
        max_rows=None,
        validation_size=0,
    )
    corpus = build_corpus(create_record(tmp_path / "data", "data"), config)
    with pytest.raises(DataError, match="Build it with validation_size=0.1"):
        evaluate_models(create_record(tmp_path / "r", "evaluate"), str(corpus))
