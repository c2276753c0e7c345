"""The report and the site: whole, without a network, true to the records, and with today's
prose."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
from contextlib import chdir
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from toy_project import (
    ToyProject,
)

from llmeco_nb.core import UsageError, format_duration
from llmeco_nb.runner.identity import Package
from llmeco_nb.runner.pipeline import Pipeline
from llmeco_nb.runner.stages import StageRegistry
from llmeco_nb.runner.store import Run
from llmeco_nb.site.comparisons import (
    accuracy_picture,
    comparison,
    learning_curve_picture,
    one_table,
)
from llmeco_nb.site.diagram import ring_svg
from llmeco_nb.site.docs import chapter_map, render_readme, render_site
from llmeco_nb.site.kept_run import KeptRun, front_page_results, keep_run
from llmeco_nb.site.markup import PageRenderer, code_summary
from llmeco_nb.site.page import NOT_EXECUTED, PageCell, output_html, render_chapter
from llmeco_nb.site.report import render_report
from llmeco_nb.site.style import contrast, dark, light, style
from llmeco_nb.site.template import format_value

ROOT = Path(__file__).resolve().parent.parent
VOID = set("area base br col embed hr img input link meta source track wbr".split())
BLOCK = set("div p pre table ul ol dl h1 h2 h3 h4 section figure details blockquote".split())


class Html(HTMLParser):
    """A page read strictly: what is closed must be open, ids are given once, and no block stands in
    a paragraph."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], []
        self.roles, self.empty_headers, self.header = [], 0, None  # role -> the elements in it
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert not (tag in BLOCK and "p" in self.open), (
            f"<{tag}> inside <p>, line {self.getpos()[0]}"
        )
        self.tags.append((tag, dict(attrs)))
        if "role" in dict(attrs):
            self.roles.append((dict(attrs)["role"], []))
        for role in self.roles[-1:]:
            role[1].append(tag)
        if tag == "svg" and not dict(attrs).get("role"):
            self.roles.append(("", []))
        if tag == "th":
            self.header = ""
        if self.header is not None and tag in ("img", "math"):
            self.header = tag
        if "id" in dict(attrs):
            self.ids.append(dict(attrs)["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (
            f"</{tag}> closes {self.open[-1:]}, line {self.getpos()[0]}"
        )
        self.open.pop()
        if tag == "svg":
            self.roles.append(("", []))
        if tag == "th":
            self.empty_headers += not self.header.strip()
            self.header = None

    def handle_data(self, data):
        self.text.append(data)
        if self.header is not None:
            self.header += data


def sections(folder: Path) -> list[list[str]]:
    "The index of the search: address, heading, page, text."
    text = (folder / "assets" / "sections.js").read_text(encoding="utf-8")
    return json.loads(text.removeprefix("window.sections = ").removesuffix(";\n"))


def check_accessible(name: str, page: Html):
    "What a screen reader, a keyboard and an eye that sees no colours need."
    for tag, attributes in page.tags:
        if attributes.get("class") == "scroll":
            assert attributes.get("tabindex") == "0", (
                f"{name}: a box that scrolls out of the keyboard's reach"
            )
            assert attributes.get("role") == "group" and attributes.get("aria-label"), (
                f"{name}: a box without a name"
            )
        if tag == "a":
            assert attributes.get("href"), f"{name}: a link that leads nowhere"
    for role, inside in page.roles:
        assert role != "img" or "a" not in inside, f"{name}: links inside of an image"
    assert not page.empty_headers, f"{name}: {page.empty_headers} headers of tables are empty"


def check_pages(folder: Path) -> dict[str, Html]:
    """Every page is well formed, every address leads somewhere, and nothing is loaded from
    elsewhere."""
    pages = {f.name: Html(f.read_text(encoding="utf-8")) for f in folder.glob("*.html")}
    for name, page in pages.items():
        again = {i for i in page.ids if page.ids.count(i) > 1}
        assert not again, f"{name}: ids given twice: {again}"
        for tag, attributes in page.tags:
            loaded = [
                attributes.get(k)
                for k in ("src", "srcset", "poster", "data", "xlink:href")
                if attributes.get(k)
            ] + (
                [attributes["href"]]
                if tag in ("link", "use", "image") and "href" in attributes
                else []
            )
            for address in loaded:
                assert (
                    address.startswith(("data:", "#")) or (folder / unquote(address)).is_file()
                ), f"{name}: <{tag}> loads {address}"
            assert not [k for k in attributes if k.startswith("on")], (
                f"{name}: <{tag}> carries a script"
            )
            assert "url(" not in attributes.get("style", ""), f"{name}: <{tag}> loads by style"
            assert attributes.get("type") != "module", f"{name}: modules do not load from disk"
            href = attributes.get("href", "") if tag == "a" else ""
            if not href or "://" in href or href.startswith("mailto:"):
                continue
            file, _, anchor = href.partition("#")
            assert (folder / unquote(file)).is_file() if file else True, (
                f"{name}: {href} leads nowhere"
            )
            if anchor and (file or name).endswith(".html"):
                assert anchor in pages[file or name].ids, f"{name}: {href} names no heading"
    for asset in (folder / "assets").iterdir():
        if asset.suffix in (".css", ".js"):
            text = asset.read_text(encoding="utf-8")
            asks = r"fetch\(|XMLHttpRequest|\bimport\b|@import|url\("
            assert asset.name == "sections.js" or not re.search(asks, text), asset.name
            assert asset.name == "sections.js" or "//" not in re.sub(
                r"^\s*//.*$", "", text, flags=re.M
            ), asset.name
    for address, heading, page, _ in sections(folder):
        file, _, anchor = address.partition("#")
        assert file in pages and (not anchor or anchor in pages[file].ids) and heading and page, (
            address
        )
    for name, page in pages.items():
        check_accessible(name, page)
    return pages


@pytest.fixture(scope="module")
def finished(tmp_path_factory, machine_json):
    """Two rounds of a toy project whose stages show what pages must cope with: formulas, figures,
    tables, rude HTML, links."""
    project = ToyProject(tmp_path_factory.mktemp("report") / "project", machine_json)
    file = project.folder / "nbs" / "71_make.ipynb"
    nb = json.loads(file.read_text())
    nb["cells"][0]["source"] += (
        "\n\n"
        "The sum is $s = \\sum_{i<n} a_i$, see [Train](72_train.ipynb) and "
        "[elsewhere](99_gone.ipynb).\n\n"
        "$$\\frac{a}{b}$$\n\n"
        "## Links & more\n\n"
        "To [itself](#Links-&-more)."
    )
    show = dict(cell_type="code", metadata=dict(tags=["show"]), execution_count=None, outputs=[])
    nb["cells"].insert(
        3,
        dict(
            show,
            id="71-fig",
            metadata={},
            source=(
                "import matplotlib.pyplot as plt\n"
                "from IPython.display import HTML\n"
                "from IPython.display import Markdown\n"
                "from IPython.display import display"
            ),
        ),
    )
    nb["cells"] += [
        dict(show, id="71-plot", source="fig, ax = plt.subplots(); ax.plot([1, 2]); plt.show()"),
        dict(
            show,
            id="71-rude",
            source=(
                """display(HTML('<style>b{}</style><table border=1 onclick="x()"><tr><td>3.5"""
                """<td>x<p>y<p>z</table><img src="http://a.b/c.png" alt="far">"""
                """<script>fetch("http://a.b")</script>'))"""
            ),
        ),
        dict(
            show,
            id="71-words",
            source=(
                'display(Markdown(f\'**{open_record(out, "make").metrics["total"]}** in all, '
                "$x_1$'))"
            ),
        ),
    ]
    file.write_text(json.dumps(nb))
    project.edit(
        "73_compare",
        (
            "write_json(record.artifact('table'), "
            "[json.loads(Path(m).read_text())['total'] for m in model])"
        ),
        (
            "write_json(record.artifact('table'), [dict(model=Path(m).parent.name[:5], "
            "total=json.loads(Path(m).read_text())['total']) for m in model])\n"
            "(record.path/'summary.txt').write_text('two <models>')"
        ),
    )
    with pytest.MonkeyPatch.context() as outside:
        outside.delenv("MPLBACKEND", raising=False)  # figures shall appear in the notebook
        project.run()
        project.run("--next")
    return project


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    copy = object.__new__(ToyProject)
    copy.folder, copy.runs = tmp_path / "project", tmp_path / "project" / "runs"
    shutil.copytree(finished.folder, copy.folder, symlinks=True)
    monkeypatch.setenv("LLMECO_RUNS", str(copy.runs))
    return copy


def report(project, run="toy-2"):
    "Render a run's report; ({file: page}, {file: text})."
    where = StageRegistry(project.folder / "nbs", Package(project.folder / "llmeco_nb"), False)
    index = render_report(Pipeline(where, Run(project.runs / run)))
    assert index == project.runs / run / "report" / "index.html"
    return check_pages(index.parent), {
        f.name: f.read_text(encoding="utf-8") for f in index.parent.glob("*.html")
    }


def test_report_is_whole_and_needs_no_network(project):
    pages, text = report(project)
    assert set(pages) == {"index.html", "make.html", "train-a.html", "train-b.html", "compare.html"}
    assert not list((project.runs / "toy-2").glob("report.*"))
    for name in ("make", "train@a", "train@b", "compare"):
        assert any(
            t == "a" and a.get("href") == name.replace("@", "-") + ".html"
            for t, a in pages["index.html"].tags
        )
    again, _ = report(project)
    assert set(again) == set(pages)


def test_report_can_be_moved(project, tmp_path):
    report(project)
    shutil.move(project.runs / "toy-2" / "report", tmp_path / "elsewhere")
    shutil.rmtree(project.folder)
    check_pages(tmp_path / "elsewhere")


def test_front_page_says_what_came_out(project):
    _, text = report(project)
    front = text["index.html"]
    metrics = {
        name: json.loads((project.runs / "toy-2" / name / "metrics.json").read_text())
        for name in ("make", "train@a", "train@b")
    }
    assert (
        "four toys" in front
        and "two &lt;models&gt;" in front
        and "round <b>2</b>, after toy-1" in front
        and "all current" in front
    )
    for m in metrics.values():
        assert f"<b>{m['total']}</b>" in front
    assert '<h2 id="comparison">' in front and re.search(
        r'<td>train</td><td class="num">\d+</td>', front
    )
    assert (
        "parent/train@b" in front and '<h2 id="against-the-round-before">' in front
    )  # train@b adds what the round before gave
    before = json.loads((project.runs / "toy-1" / "train@b" / "metrics.json").read_text())["total"]
    assert (
        f'<td class="num">{before}</td><td class="num">{metrics["train@b"]["total"]}</td>'
        f'<td class="num">+{metrics["train@b"]["total"] - before}</td>'
    ) in front
    assert front.count('class="meter') == 8 and "<b>value</b> over step" in front


def test_stage_page_says_from_what_and_how(project):
    pages, text = report(project)
    page, manifest = (
        text["train-b.html"],
        json.loads((project.runs / "toy-2" / "train@b" / "manifest.json").read_text()),
    )
    assert '<code>factor</code></td><td class="num"><b>5</b>' in page or "<b>5</b>" in page
    assert (
        "(by the profile)" in page
        and 'from <a href="make.html">make</a>' in page
        and "parent/train@b" in page
    )
    assert (
        manifest["outputs"]["model"][:12] in page
        and manifest["inputs"]["numbers"][0]["sha256"] in page
        and manifest["key"] in page
    )
    assert 'to <a href="compare.html">compare</a>' in page


def test_prose_outputs_and_formulas_are_joined(project):
    pages, text = report(project)
    page, total = (
        text["make.html"],
        json.loads((project.runs / "toy-2" / "make" / "metrics.json").read_text())["total"],
    )
    assert f"the sum is {total}" in page and f"<strong>{total}</strong> in all" in page
    assert page.count("<math") == 3 and "\\frac" not in page and "<mfrac>" in page
    assert (
        any(
            t == "img" and a["src"].endswith(".png") and a["alt"]
            for t, a in pages["make.html"].tags
        )
        and "far" in page
    )
    assert 'href="train-a.html">Train</a>' in page and "<span>elsewhere</span>" in page


def test_changed_prose_appears_without_a_rerun(project):
    _, before = report(project)
    entries = {
        p: p.stat().st_mtime_ns
        for p in (project.runs / "store").rglob("*")
        if p.is_file() and p.name != ".seen.json"
    }
    project.edit("71_make", "Writes numbers", "Puts down numbers")
    _, after = report(project)
    assert (
        "Writes numbers" in before["make.html"]
        and "Puts down numbers" in after["make.html"]
        and "Writes numbers" not in after["make.html"]
    )
    total = json.loads((project.runs / "toy-2" / "make" / "metrics.json").read_text())["total"]
    assert f"the sum is {total}" in after["make.html"] and "all current" in after["index.html"]
    assert entries == {
        p: p.stat().st_mtime_ns
        for p in (project.runs / "store").rglob("*")
        if p.is_file() and p.name != ".seen.json"
    }


def test_a_changed_cell_is_shown_as_it_ran(project):
    project.edit(
        "71_make",
        "caption(open_record(out, 'make').metrics['total'])",
        "caption(2 * open_record(out, 'make').metrics['total'])",
    )
    project.edit("72_train", "total + before))", "total - before))")
    _, text = report(project)
    assert (
        "This cell has changed since the run" in text["make.html"]
        and "the sum is" in text["make.html"]
        and ">2</span> <span" not in text["make.html"].split("This cell has changed")[0][-600:]
    )
    assert "Not current: " in text["train-b.html"] and "not current" in text["index.html"]


def test_an_unfinished_run_has_a_report_too(project):
    run = Run(project.runs / "toy-2")
    run.update(lambda info: info["instances"].pop("compare"))
    pages, text = report(project)
    assert (
        "has not been made in this run yet" in text["compare.html"]
        and "<b>3</b> of 4 stages made" in text["index.html"]
    )


def test_the_command_says_where_the_report_is(project):
    "From the terminal, in a checkout that has the report's chapter."
    for module in (
        "site.style",
        "site.template",
        "site.diagram",
        "site.charts",
        "site.markup",
        "site.page",
        "site.results",
        "site.comparisons",
        "site.stage_page",
        "site.report",
        "stats.claims",
        "stats.significance",
        "stats.metrics",
    ):
        project.bring(module)
    code, out, err = project.llmeco("report", "--profile", "toy")
    assert code == 0 and "Report: runs/toy-2/report/index.html" in out, err


# -- the site and the README


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site of all chapters, without executing them."
    folder = tmp_path_factory.mktemp("site")
    before = os.environ.get("LLMECO_RUNS")
    os.environ["LLMECO_RUNS"] = str(folder / "runs")
    try:
        with chdir(folder):
            index, failed = render_site(
                StageRegistry(ROOT / "nbs", Package(ROOT / "llmeco_nb"), False), execute=False
            )
    finally:
        os.environ.pop("LLMECO_RUNS") if before is None else os.environ.__setitem__(
            "LLMECO_RUNS", before
        )
    assert not failed and index == folder / "_docs" / "index.html"
    return index.parent


def test_site_is_whole_and_needs_no_network(site):
    pages = check_pages(site)
    assert set(pages) == {f"{p.stem}.html" for p in StageRegistry.find().notebooks} | {"api.html"}
    for name, page in pages.items():
        if m := re.search(
            r"\\(frac|sum|text|sqrt|log)\b",
            re.sub(
                r"<pre>.*?</pre>|<code>.*?</code>",
                "",
                (site / name).read_text(encoding="utf-8"),
                flags=re.S,
            ),
        ):
            pytest.fail(f"{name}: a formula was not translated: {m[0]}")


def test_site_documents_what_is_exported(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in ("create_record", "Record", "sha256_of", "render_report"):
        assert f'#api-{name}"' in text
    core = (site / "00_core.html").read_text(encoding="utf-8")
    assert (
        'id="api-create_record"' in core
        and "Name of the stage" in core.split('id="api-create_record"')[1].split("</section>")[0]
    )


def test_links_between_chapters_lead_somewhere():
    "A link to a notebook that does not exist yet is allowed only where its number is still free."
    notebooks = StageRegistry.find().notebooks
    numbers = {p.name.split("_")[0] for p in notebooks}
    wrong = [
        f"{p.name}: {target}"
        for p in notebooks
        for c in json.loads(p.read_text())["cells"]
        if c["cell_type"] == "markdown"
        for target in re.findall(r"\]\(([\w./@-]+\.ipynb)", "".join(c["source"]))
        if not (p.parent / target).is_file() and target.rpartition("/")[2].split("_")[0] in numbers
    ]
    assert not wrong, wrong


def test_readme_is_in_step_with_its_notebook():
    "README.md and the picture of the ring are made; `llmeco docs --readme` makes them anew."
    assert (ROOT / "README.md").read_text(encoding="utf-8") == render_readme(
        StageRegistry.find()
    ), "run `llmeco docs --readme`"
    assert (ROOT / "nbs" / "images" / "ring.svg").read_text(encoding="utf-8") == ring_svg(
        "", alone=True
    ), "run `llmeco docs --readme`"
    for file in (ROOT / "nbs" / "records").glob("run_*.json"):
        picture = ROOT / "nbs" / "images" / f"{file.stem}.svg"
        assert picture.read_text(encoding="utf-8") == KeptRun.load(file).svg()


def test_a_run_is_kept_for_the_readme_while_it_holds(project):
    "Only a whole, current run is kept; what README shows of it goes when the code changes."
    with_accuracy = "dict(model=Path(m).parent.name[:5], labels=9, title='tuned', accuracy=0.75, "
    project.edit(
        "73_compare",
        "dict(model=Path(m).parent.name[:5], ",
        with_accuracy + "accuracy_low=0.6, accuracy_high=0.8, ",
    )
    where = StageRegistry(project.folder / "nbs", Package(project.folder / "llmeco_nb"), True)

    def pipe():
        return Pipeline(where, Run(project.runs / "toy-2"))

    with pytest.raises(UsageError, match="Not current: compare"):
        keep_run(pipe())
    project.run()
    file = keep_run(pipe())
    kept = KeptRun.load(file)
    assert file == project.folder / "nbs" / "records" / "run_toy.json"
    assert kept.models and kept.models[0]["title"] == "tuned" and not kept.is_stale(where)
    assert all(seconds > 0 for seconds in kept.seconds.values())
    assert "| tuned | 9 | 75.0 [60.0, 80.0] |" in front_page_results(where, "toy")
    project.edit("70_toys", "SCALE = 3", "SCALE = 4")
    later = StageRegistry(where.nbs, Package(project.folder / "llmeco_nb"), True)
    assert kept.is_stale(later)
    assert "75.0" not in front_page_results(later, "toy")


def test_readme_leads_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    local = [
        t for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t and not t.startswith("#")
    ]
    missing = [t for t in local if not (ROOT / t.split("#")[0]).exists()]
    assert local and not missing, missing
    for picture in (t for t in local if t.endswith((".png", ".svg"))):
        assert (ROOT / picture).stat().st_size < 200_000, f"{picture} is too large"
    assert chapter_map(StageRegistry.find(), "nbs/") in text


# -- what was once wrong on a page


def test_anything_read_on_the_readme_is_on_the_front_page_too(site):
    "The tables that index.ipynb computes, such as the one beside other projects."
    front = Html((site / "index.html").read_text(encoding="utf-8"))
    said = " ".join("".join(front.text).split())
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text())["cells"]
    headings = re.findall(
        r"^## (.+)$",
        "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"),
        re.M,
    )
    assert "Beside others" in headings and all(h in said for h in headings)
    beside = said.split("Beside others")[1].split("Your own text")[0]
    written = (ROOT / "README.md").read_text(encoding="utf-8").split("## Beside others")[1]
    written = re.sub(r"\]\([^)]*\)", "]", written.split("\n## ")[0])
    words = set(re.findall(r"[A-Za-z-]{6,}|\d[\d.]+", written))
    assert len(words) > 20 and not {w for w in words if w not in beside}


def test_search_finds_text_and_not_only_headings(site, tmp_path):
    """The index holds every chapter that says the word, and the script finds them, first those
    whose heading says it."""
    index = sections(site)
    holding = {row[0].partition("#")[0] for row in index if "softmax" in " ".join(row[1:]).lower()}
    shown = {
        f.name
        for f in site.glob("*.html")
        if "softmax" in "".join(Html(f.read_text(encoding="utf-8")).text).lower()
    }
    assert len(holding) > 5 and holding <= shown
    assert {"13_encoder.html", "13f_decoder_parts.html"} <= holding
    if not shutil.which("node"):
        pytest.skip("needs node to run the search")
    code = f"""
const fs = require('fs');
globalThis.window = globalThis;
(0, eval)(fs.readFileSync('{site}/assets/search.js', 'utf8'));
(0, eval)(fs.readFileSync('{site}/assets/sections.js', 'utf8'));
const found = q => search(window.sections, q, 99).map(hit => hit.address);
console.log(JSON.stringify([found('softmax'), found('SOFTMAX'), \
found('zebra xylophone quux'), found("")]));
"""
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    softmax, loud, nothing, empty = json.loads(done.stdout)
    assert {a.partition("#")[0] for a in softmax} == holding and loud == softmax
    assert len(softmax) == len(holding), "of each page the best section"
    assert nothing == [] and empty == []


def test_comparison_says_what_was_claimed():
    "A baseline below the reference is `worse`, and a tiny p-value is no row of zeros."
    row = dict(
        title="A", labels=10, accuracy=0.9, accuracy_low=0.8, accuracy_high=0.95, baseline=False
    )
    low = dict(
        row,
        title="Majority class",
        model="majority",
        baseline=True,
        difference=-0.369,
        difference_low=-0.4,
        difference_high=-0.3,
        reference="a",
        p=1e-30,
        p_adjusted=1e-29,
        verdict="supported",
    )
    table = one_table(
        [
            dict(row, model="a"),
            low,
            dict(low, model="b", title="B", baseline=False, difference=0.2, p_adjusted=0.04),
        ]
    )
    assert "worse: supported" in table and "better: supported" in table
    today = one_table([dict(row, model="a"), dict(low, verdict="refuted")])
    assert "better: refuted" in today and "worse" not in today
    assert (
        "&lt; 0.0001" in table
        and "0.04" in table
        and "0.0000" not in table.replace("&lt; 0.0001", "")
    )
    assert "−0.369" in table and "-0.369" not in table and "[−0.4,\u00a0−0.3]" in table
    errors = dict(model="own", title="Own", mae=0.5, reference="a", difference=0.12)
    saved = one_table([errors, dict(model="a", title="A", mae=0.62)])
    assert "error saved against A" in saved and "difference from" not in saved
    assert "Short names" in comparison([dict(row, model="tfidf_lr", title="TF-IDF")])
    assert accuracy_picture([dict(row, model="a")]).count("<circle") == 1
    points = [dict(row, model="a", labels=n) for n in (100, 1000, 10_000)]
    drawn = learning_curve_picture([*points, dict(row, model="b", title="b<", labels=100)])
    assert drawn.count('class="curve"') == 2 and drawn.count("<circle") == 1 and "b<" not in drawn
    first, middle, last = (float(x) for x in re.findall(r"([\d.]+),[\d.]+", drawn)[:3])
    assert abs((first + last) / 2 - middle) < 0.2, "equal factors are equally far apart"
    assert learning_curve_picture([dict(row, model="a", labels=9)]) == ""
    assert format_value(-0.0) == "0" and format_value(-0.5) == "−0.5"


def test_parameters_stand_in_their_columns(project):
    "The value with who set it; the default alone."
    _, text = report(project)
    assert (
        '<b>5</b> <span class="quiet">(by the profile)</span></td><td class="num">2</td>'
        in text["train-b.html"]
    )


def test_pages_follow_the_chapters_numbers(project):
    """In the list of pages and when turning from one to the next; the last page leads back on the
    left."""
    _, text = report(project)
    order = ["make.html", "train-a.html", "train-b.html", "compare.html"]
    side = re.findall(
        r'<li><a href="([\w-]+\.html)"', text["index.html"].split('<nav class="side"')[1]
    )
    assert side == ["index.html", *order]
    last = text["compare.html"].split('<nav class="turn"')[1].split("</nav>")[0]
    assert 'class="before" href="train-b.html"' in last and "next" not in last
    assert (
        ".turn .next{text-align:right;margin-left:auto}" in style
        and ".turn a:last-child" not in style
    )


def test_text_is_escaped_once(tmp_path):
    "Whatever form an output has, an apostrophe stays an apostrophe."
    scribe, said = PageRenderer(tmp_path), 'isn\'t <it> & "so"'
    outputs = [
        dict(output_type="stream", name="stdout", text=said),
        dict(output_type="display_data", data={"text/plain": said}),
        dict(output_type="display_data", data={"text/html": f"<p>{html.escape(said)}</p>"}),
        dict(output_type="display_data", data={"text/markdown": f"> {html.escape(said)}"}),
    ]
    for output in outputs:
        page = Html(output_html([output], scribe))
        assert "".join(page.text).strip() == said, output


def test_show_cells_fold_under_what_they_show():
    assert code_summary("record = open_record(out, 'x')\nplot(record)") == "plot(record)"
    assert code_summary("record = open_record(out, 'x')") == "record = open_record(out, 'x')"


def test_a_promise_that_was_not_executed_is_explained(tmp_path):
    "Prose that ends in a colon, and then nothing."
    cells = [
        PageCell("a", "markdown", "This comes out:"),
        PageCell("b", "lesson", "print(1)"),
        PageCell("c", "markdown", "Well."),
    ]
    page = render_chapter(cells, PageRenderer(tmp_path))
    assert NOT_EXECUTED in page and page.index(NOT_EXECUTED) < page.index("Well.")
    cells[1].outputs = [dict(output_type="stream", name="stdout", text="1")]
    assert NOT_EXECUTED not in render_chapter(cells, PageRenderer(tmp_path))


def test_plotting_code_is_folded(tmp_path):
    picture = dict(
        output_type="display_data", data={"image/png": base64.b64encode(b"x" * 30).decode()}
    )
    plot = PageCell("b", "lesson", "plt.plot([1])", [picture])
    page = render_chapter([plot, PageCell("c", "lesson", "1 + 1")], PageRenderer(tmp_path))
    assert page.index("<details>") < page.index("plt") and page.count("<details>") == 1


def test_code_and_small_print_can_be_read():
    """Each colour of text has 4.5:1 on both grounds, by day and by night; links in prose are
    underlined."""
    used = set(re.findall(r"[{;]color:var\(--(\w+)\)", style)) - {"faint"}
    assert len(used) > 8
    for colours in (light, dark):
        for name in used:
            for ground in ("paper", "wash"):
                found = contrast(colours[name], colours[ground])
                assert found >= 4.5, (name, ground, found)
    assert re.search(r"main :is\([^)]*\bp\b[^)]*\) a\{text-decoration:underline", style)
    assert re.findall(r"([^{}]+)\{[^}]*[{;]color:var\(--faint\)", style) in (
        [],
        ["summary::before"],
    ) or all(
        "::before" in rule for rule in re.findall(r"([^{}]+)\{[^}]*[{;]color:var\(--faint\)", style)
    )


TERMS = (
    "record",
    "run",
    "bundle",
    "ledger",
    "champion",
    "candidate",
    "gate",
    "claim",
    "work key",
    "show key",
    "stage",
    "profile",
    "master weights",
    "parity",
)


def test_glossary_explains_each_term_of_our_own_in_a_sentence(site):
    """It stands with the overviews in the list of pages, and the front page and the README lead
    there."""
    text = (site / "05b_glossary.html").read_text(encoding="utf-8")
    for term in TERMS:
        said = re.findall(rf'<h3 id="[\w-]+">{term.capitalize()}</h3>\s*<p>(.*?)</p>', text, re.S)
        assert len(said) == 1, term
        plain = re.sub("<[^>]*>", "", said[0])
        assert 40 < len(plain) < 330 and plain.count(". ") == 0 and plain.endswith("."), (
            term,
            plain,
        )
    for name in ("own", "minilm", "tfidf_lr"):
        assert f"<code>{name}</code></td>" in text
    front = (site / "index.html").read_text(encoding="utf-8")
    main, side = front.split('<nav class="side"')
    assert 'href="05b_glossary.html">glossary</a>' in main
    assert side.index("05b_glossary.html") < side.index("00_core.html")
    assert "nbs/0_ground/05b_glossary.ipynb" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_duration_that_is_no_number_of_seconds_is_unknown():
    assert [format_duration(float(s)) for s in ("nan", "inf", "-inf")] == ["unknown"] * 3
    assert format_duration(None) == "" and format_duration(59.94) == "59.9 s"
