"""Names that people bring are drawn as they are: dollar signs, underscores and backslashes."""

import json
from pathlib import Path
from typing import Optional

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import create_record, plain_text
from llmeco_nb.data.corpus import CorpusConfig, build_corpus, read_split
from llmeco_nb.evaluation.comparison import EvaluationConfig, evaluate_models
from llmeco_nb.stats.metrics import confusion_figure
from llmeco_nb.tasks.predictions import predictions_table, write_predictions
from llmeco_nb.tasks.registry import find_task

NBS = Path(__file__).resolve().parent.parent / "nbs"
NAMES = ["$", "$$", "$5 to $9", "_x", r"a\$b"]
pytestmark = pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")


@pytest.fixture(autouse=True)
def no_figures():
    plt.close("all")
    yield
    plt.close("all")


def pixels(text: str, **how) -> bytes:
    fig = plt.figure(figsize=(2, 0.4), dpi=50)
    fig.text(0.05, 0.4, text, **how)
    fig.canvas.draw()
    drawn = bytes(fig.canvas.buffer_rgba())
    plt.close(fig)
    return drawn


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=r"$_\^{}%& ab1", max_size=8))
def test_any_label_is_drawn_as_it_is(label):
    assert pixels(plain_text(label)) == pixels(label, parse_math=False)
    fig, ax = plt.subplots()
    ax.plot([0, 1], label=plain_text(label))
    assert len(ax.get_legend_handles_labels()[1]) == bool(label)
    plt.close(fig)


def test_the_confusion_matrix_shows_its_names(tmp_path):
    n = len(NAMES)
    fig = confusion_figure(np.eye(n, dtype=int), NAMES)
    fig.savefig(tmp_path / "confusion.png")
    for axis in (fig.axes[0].xaxis, fig.axes[0].yaxis):
        drawn = [label.get_text() for label in axis.get_ticklabels()]
        assert drawn == [plain_text(name) for name in NAMES]


def show(notebook: str, out: Path, **parameters) -> set[str]:
    "Run the imports and the `show` cells of a notebook on a record; every text in its figures."
    cells = json.loads(next(NBS.glob(f"*/{notebook}")).read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    tags = lambda c: c["metadata"].get("tags", [])
    names = dict(Optional=Optional)  # the types of parameters that may be missing
    for c in code:
        if "parameters" in tags(c):
            exec("".join(c["source"]), names)
    names |= dict(out=str(out), **parameters)
    for c in code:
        if not tags(c) or "show" in tags(c):
            exec("".join(c["source"]), names)
    figures = [plt.figure(n) for n in plt.get_fignums()]
    assert figures and len(list((out / "figures").glob("*.png"))) == len(figures)
    return {t.get_text() for fig in figures for t in fig.findobj(matplotlib.text.Text)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "A labelled table with such names as classes, through the stage data."
    folder = tmp_path_factory.mktemp("named")
    rows = [(f"word{k} and number {i}", name) for i in range(30) for k, name in enumerate(NAMES)]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(folder / "named.csv", index=False)
    record = create_record(folder / "data", "data")
    return record, build_corpus(
        record, CorpusConfig(source=str(folder / "named.csv"), max_rows=None)
    )


def test_figures_of_the_data_stage(corpus):
    texts = show("10_corpus.ipynb", corpus[0].path)
    assert {plain_text(name) for name in NAMES} <= texts


def test_figures_of_the_evaluation(corpus, tmp_path):
    "Classes on the axes of the confusion matrix, and a model whose name is a formula."
    model, parts = "_own $$", []
    classifying = find_task("text-classification")
    for split in ("validation", "test"):
        rows = read_split(corpus[1], split)
        scores = np.eye(len(NAMES), dtype=np.float32)[rows.label]
        parts.append(predictions_table(classifying, split, rows, scores, model, 50))
    write_predictions(pd.concat(parts), tmp_path / "predictions")
    record = create_record(tmp_path / "r", "evaluate")
    given = [str(tmp_path / "predictions")]
    config = EvaluationConfig(num_labeled=[0], learning_curve=[], models=["majority", "tfidf_lr"])
    evaluate_models(record, str(corpus[1]), given, config)
    texts = show("30_comparison.ipynb", record.path, corpus=str(corpus[1]))
    assert {plain_text(model), f"{plain_text(model)}, 50"} <= texts  # a legend, and an axis
    assert {plain_text(name) for name in NAMES} <= texts


def test_figures_of_a_mixture_with_domains_of_ones_own(tmp_path):
    mixture = pytest.importorskip("llmeco_nb.data.mixture")
    own = []
    for k, name in enumerate(("_mine", "$$")):
        lines = [f"In story {i} of shelf {k} somebody came home and said hello." for i in range(60)]
        (tmp_path / f"{k}.txt").write_text("\n\n".join(lines) + "\n")
        own.append(f"{name}={tmp_path / f'{k}.txt'}")
    record = create_record(tmp_path / "r", "prose")
    config = mixture.MixtureConfig(
        domains=[],
        extra_sources=own,
        min_jaccard=1.0,
        max_epochs=1,
        quality_rules=["_mine=none", "$$=none"],
    )
    mixture.build_mixture(record, config=config)
    texts = show("10d_mixture.ipynb", record.path)
    assert {plain_text("_mine"), plain_text("$$")} <= texts
