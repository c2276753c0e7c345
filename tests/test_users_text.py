"What users wrote is shown as text in every page: names of classes and texts full of markup."

import csv
import html
import random
from pathlib import Path

import pytest

from llmeco_nb.core import create_record, markdown_text, read_json
from llmeco_nb.data.corpus import CorpusConfig, build_corpus, label_names
from llmeco_nb.runner.kernel import execute
from llmeco_nb.runner.stages import StageRegistry
from llmeco_nb.site.markup import PageRenderer
from llmeco_nb.site.page import output_html

names = [
    "$x$ and $y$",
    "_under_",
    "a|b",
    "<script>alert(1)</script>",
    "`tick`",
    "**bold** [l](http://e.example)",
    "L" * 100,
]
marks = "| pipe <b>loud</b> $5 and $6 `code` ![i](x) _so_ **so** #1 &lt;i&gt;"


def nasty_corpus(folder: Path) -> Path:
    "A corpus whose names and texts are full of signs that Markdown, HTML and matplotlib read."
    chance = random.Random(0)
    with open(folder / "nasty.csv", "w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerow(["text", "label"])
        for i in range(210):
            k = i % len(names)
            said = " ".join(chance.choices([f"w{k}{j}" for j in range(4)] + ["and", "so"], k=9))
            # every tenth row is labelled wrongly, so that mistakes are shown
            rows.writerow([f"{said} {names[k]} {marks} {i}", names[k if i % 10 else -k - 1]])
    record = create_record(folder / "data", "data")
    return build_corpus(record, CorpusConfig(source=str(folder / "nasty.csv"), max_rows=None))


def shown_by(stem: str, folder: Path, **parameters) -> str:
    "The HTML of what a chapter shows when it is executed with these parameters."
    registry = StageRegistry.find()
    notebook = next(p for p in registry.notebooks if p.stem == stem)
    executed = folder / "executed.ipynb"
    execute(notebook, executed, {**parameters, "out": str(folder / stem)})
    cells = read_json(executed)["cells"]
    shown = [c for c in cells if "show" in c["metadata"].get("tags", [])]
    assert shown
    scribe = PageRenderer(folder)
    return "\n".join(output_html(c["outputs"], scribe) for c in shown if c.get("outputs"))


@pytest.mark.slow
def test_chapters_show_names_and_texts_as_they_are(tmp_path):
    corpus = nasty_corpus(tmp_path)
    assert set(label_names(corpus)) == set(names)
    own = dict(source=str(tmp_path / "nasty.csv"), max_rows=None)
    pages = {
        "10_corpus": own,
        "20_classifier": dict(corpus=str(corpus), epochs=1, name="_own_ $a$ $b$"),
        "30_comparison": dict(corpus=str(corpus), num_labeled=[0], learning_curve=[]),
    }
    for stem, parameters in pages.items():
        page = shown_by(stem, tmp_path, **parameters)
        for made in (
            "<script>alert",
            "<em>under",
            "<em>so",
            "<strong>bold",
            "<strong><code>tick",
            'href="http://e.example',
            "<b>loud",
            "<math",
            "<img src=x",
        ):
            assert made not in page, f"{stem}: {made}"
    assert names[1] in page and "&lt;script&gt;" in page  # shown, and not left out


@pytest.mark.parametrize("written", [*names, marks, "1. a", "- a", "+ a", "=", "12) b", "~~~"])
def test_markdown_text_is_read_as_nothing(written, tmp_path):
    assert html.unescape(markdown_text(written)) == written
    for place in (markdown_text(written), f"| a |\n|---|\n| {markdown_text(written)} |"):
        page = PageRenderer(tmp_path).prose(place, listed=False)
        for made in ("<em>", "<strong>", "<code>", "<a ", "<math", "<script", "<img", "<ul", "<ol"):
            assert made not in page, page
        assert page.count("<td") in (0, 1)
