"""Behavioural tests: templates, what counts as a failure, files of tests, the suite for opinions, a
bundle under test, and what training on failures does."""

import itertools
import re

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from smallbundle import make_bundle

from llmeco_nb.core import DataError, LlmecoError, UsageError, create_record, read_json
from llmeco_nb.deployment.behave import BehaviourConfig, answer_texts, behave, judge_bundle
from llmeco_nb.deployment.behave_command import BehaveChoice
from llmeco_nb.deployment.behave_command import behave as behave_command
from llmeco_nb.evaluation.behaviour import (
    BehaviourTest,
    Example,
    asked_texts,
    fill_templates,
    run_tests,
    template_test,
)
from llmeco_nb.evaluation.behaviour_files import read_tests
from llmeco_nb.evaluation.dose_response import dose_response
from llmeco_nb.evaluation.failure_matrix import failure_matrix
from llmeco_nb.evaluation.perturbations import (
    contract,
    harmless,
    own_text_tests,
    perturbations,
    write_out,
)
from llmeco_nb.evaluation.sentiment_suite import sentiment_lexicon, sentiment_suite
from llmeco_nb.evaluation.template_augmentation import (
    LabelledTexts,
    failed_rows,
    failures_of,
    fit_linear,
    fit_probe,
    no_worse_claim,
    repair_rows,
)
from llmeco_nb.stats.significance import wilson
from llmeco_nb.tasks.contract import Cleaning
from llmeco_nb.tasks.regression import RegressionSchema

LABELS = ["negative", "positive"]


class Table:
    "Answers from a table of probabilities of the second class; what it does not know is 0.5."

    def __init__(self, positive: dict[str, float]):
        self.positive, self.asked = positive, []

    def scores(self, texts: list[str]) -> np.ndarray:
        self.asked += texts
        p = np.array([self.positive.get(t, 0.5) for t in texts])
        return np.stack([1 - p, p], 1)


# -- templates

words = st.lists(st.sampled_from("red blue green old new apple".split()), min_size=1, unique=True)


@given(words, words, st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_filled_texts_are_combinations_of_the_lexicon(first, second, count, seed):
    "Against all combinations, written out by itertools: distinct, as many as asked or there are."
    lexicon = {"a": first, "b": second}
    made = [t for (t,) in fill_templates(["x {a} {b} {b2}"], lexicon, count, seed)]
    every = {
        f"X {a} {b} {c}"
        for a, (b, c) in itertools.product(first, itertools.permutations(second, 2))
    }
    assert set(made) <= every and len(made) == len(set(made)) == min(count, len(every))
    assert made == [t for (t,) in fill_templates(["x {a} {b} {b2}"], lexicon, count, seed)]


def test_all_combinations_are_equally_likely():
    lexicon = {"a": list("abcdef"), "b": list("uvwxyz")}
    drawn = [fill_templates(["{a}{b}"], lexicon, 6, seed=s) for s in range(600)]
    counts = np.unique([t for one in drawn for (t,) in one], return_counts=True)[1]
    assert len(counts) == 36 and counts.min() > 60 and counts.max() < 140  # 100 are expected


def test_very_many_combinations_are_drawn_without_being_listed():
    lexicon = {name: [f"{name}{i}" for i in range(2000)] for name in "abcdef"}
    made = fill_templates(["{a} {b} {c} {d} {e} {f}", "{a} {f}"], lexicon, 50)
    assert len(made) == 50
    assert all(long.split()[0] == short.split()[0] for long, short in made)


@pytest.mark.parametrize("template", ["{b}", "{a3b}", "{a", "{}", "{0}"])
def test_a_template_without_words_is_named(template):
    with pytest.raises(DataError, match="template"):
        fill_templates([template], {"a": ["x"]}, 1)


# -- what fails

probabilities = st.floats(0, 1).map(lambda p: round(p, 3))


@given(st.lists(st.tuples(probabilities, probabilities), min_size=1, max_size=30), st.data())
@settings(max_examples=60, deadline=None)
def test_failures_are_those_of_the_definitions(rows, data):
    "Each kind against its definition, written down again one example at a time."
    table = {f"t{i}": a for i, (a, _) in enumerate(rows)}
    table |= {f"c{i}": b for i, (_, b) in enumerate(rows)}
    kind = data.draw(st.sampled_from(["MFT", "INV", "fall", "rise"]))
    label = "" if kind == "INV" else data.draw(st.sampled_from(LABELS))
    tolerance = data.draw(st.sampled_from([-0.2, 0.0, 0.1]))
    direction = kind in ("fall", "rise")
    examples = tuple(
        Example(f"t{i}", "" if kind == "MFT" else f"c{i}", label) for i in range(len(rows))
    )
    test = BehaviourTest(
        name="n",
        capability="c",
        kind="DIR" if direction else kind,
        examples=examples,
        must_not=kind if direction else "",
        tolerance=tolerance if direction else 0.0,
    )
    failures = 0
    for a, b in rows:
        of = (lambda p: p) if label == "positive" else (lambda p: 1 - p)
        said, then = (LABELS[int(p > 0.5)] for p in (a, b))  # of two equal scores the first class
        rise = of(b) - of(a)
        failures += {
            "MFT": said != label,
            "INV": said != then,
            "fall": -rise > tolerance + 1e-9,
            "rise": rise > tolerance + 1e-9,
        }[kind]
    [found] = run_tests(Table(table), [test], LABELS, keep=3)
    assert (found.items, found.failures) == (len(rows), failures)
    ends = wilson(failures, len(rows))
    assert (found.low, found.high) == (ends.low, ends.high)
    assert len(found.worst) == min(3, failures)
    assert [f.severity for f in found.worst] == sorted(f.severity for f in found.worst)[::-1]


def test_each_text_is_asked_once():
    shared = Example("t", "u")
    tests = [
        BehaviourTest(name=n, capability="c", kind="INV", examples=(shared, Example("u", "t")))
        for n in "ab"
    ]
    model = Table({})
    run_tests(model, tests, LABELS)
    assert model.asked == ["t", "u"] == asked_texts(tests)


def test_a_bound_of_the_test_goes_before_that_of_the_call():
    made = dict(name="n", capability="c", kind="MFT", examples=(Example("t", label="positive"),))
    for own, given_bound, above in (
        (None, None, False),
        (None, 1.0, False),
        (None, 0.99, True),
        (1.0, 0.0, False),
        (0.5, 1.0, True),
    ):
        test = BehaviourTest(**made, max_failure_rate=own)
        [found] = run_tests(Table({"t": 0.1}), [test], LABELS)
        assert found.rate == 1 and found.exceeds(given_bound) is above


def test_the_matrix_pools_examples():
    template = {"w": ["a", "b", "c"]}
    tests = [
        template_test(f"{n}", "c", "MFT", [f"{n} {{w}}"], template, "positive") for n in range(2)
    ]
    found = run_tests(Table({"0 a": 0.1, "1 a": 0.9, "1 b": 0.9, "1 c": 0.9}), tests, LABELS)
    [cell] = failure_matrix({"m": found})
    assert (cell.items, cell.failures) == (6, 3)


# -- perturbations


@given(st.text(min_size=1, max_size=80), st.floats(0, 1), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_perturbations_are_functions_of_their_arguments(text, rate, seed):
    for name in set(perturbations) - {"synonyms"}:
        change = perturbations[name].change
        assert change(text, rate, (seed,)) == change(text, rate, (seed,))
        assert change(text, 0.0, (seed,)) == text or name == "words_left_out"


@given(
    st.lists(st.sampled_from("I we film was not good DO it do is cannot , .".split()), max_size=20)
)
@settings(max_examples=100, deadline=None)
def test_contractions_keep_the_words(words_):
    "Contracted and written out again it is the same text, but for case and `can not`."
    text = " ".join(words_)
    there = write_out(contract(text, 1.0, (0,)), 1.0, (0,))
    plain = lambda t: re.sub(r"can not", "cannot", t.lower())
    assert plain(there) == plain(write_out(text, 1.0, (0,)))


def test_a_higher_rate_changes_more():
    text = " ".join(["wonderful"] * 200)
    for name in ("letters", "typos", "capitals"):
        change = perturbations[name].change
        changed = [
            sum(a != b for a, b in zip(text.split(), change(text, rate, (1,)).split()))
            for rate in (0.02, 0.1, 0.3)
        ]
        assert changed[0] < changed[1] < changed[2], (name, changed)


def test_own_texts_are_perturbed_and_nothing_is_counted_that_stays():
    made = own_text_tests(["it is ok", "!", "GOOD"], [n for n in harmless if n != "synonyms"])
    assert all(e.text != e.changed and t.kind == "INV" for t in made for e in t.examples)
    by_name = {t.name: len(t.examples) for t in made}
    assert by_name["own texts: words in capitals"] == 1
    assert by_name["own texts: no capitals"] == 1
    assert by_name["own texts: a link"] == 3
    assert "own texts: don't → do not" not in by_name


# -- the suite


def test_the_halves_of_the_suite_share_nothing():
    first, second = (sentiment_suite(half=h, count=1000) for h in ("first", "second"))
    assert len(first) == len(second) >= 40
    assert not set(asked_texts(first)) & set(asked_texts(second))
    one, other = (sentiment_lexicon(h) for h in ("first", "second"))
    for name, listed in one.items():
        assert len(set(listed)) == len(listed) and not set(listed) & set(other[name])
    every = [w for lexicon in (one, other) for n in ("positive", "negative") for w in lexicon[n]]
    assert len(every) == len(set(every))  # no word is praise and blame


def test_a_model_that_knows_the_classes_passes_and_a_coin_does_not():
    suite = [t for t in sentiment_suite(count=20) if t.kind == "MFT"]
    known = {e.text: float(e.label == "positive") for t in suite for e in t.examples}
    assert len(known) > 400
    assert all(r.failures == 0 for r in run_tests(Table(known), suite, LABELS))
    against = run_tests(Table({t: 1 - p for t, p in known.items()}), suite, LABELS)
    assert all(r.rate == 1 for r in against)


# -- files

GOOD = """
lexicon: {thing: [film, "no", 7]}
tests:
  - {name: a, capability: c, kind: MFT, templates: "A {thing}.", label: positive}
  - {name: b, capability: c, kind: INV, texts: [x, y], changed: [u, v]}
  - {name: d, capability: c, kind: DIR, texts: x, changed: u, label: no, must_not: fall}
  - {name: e, capability: c, kind: INV, own_texts: 2, perturbation: link}
"""


def test_a_file_of_tests(tmp_path):
    (tmp_path / "t.yaml").write_text(GOOD)
    a, b, d, e = read_tests(tmp_path / "t.yaml", ["first", "second", "third"])
    assert {x.text for x in a.examples} == {"A film.", "A no.", "A 7."}
    assert b.examples == (Example("x", "u"), Example("y", "v"))
    assert d.examples == (Example("x", "u", "no"),)  # YAML's truth values are words here
    assert [x.text for x in e.examples] == ["first", "second"]


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("label: positive", "label: positive, lable: x", "test 'a', field lable"),
        ("kind: MFT", "kind: mft", "test 'a', field kind"),
        ("changed: [u, v]", "changed: [u]", "test 'b', field changed"),
        ("texts: [x, y]", "texts: [x, {y: z}]", "test 'b', field texts"),
        (", must_not: fall", "", "test 'd', field must_not"),
        ("must_not: fall", "must_not: fall, tolerance: 2", "test 'd', field tolerance"),
        ("own_texts: 2", "own_texts: 2, texts: [a]", "test 'e', field templates"),
        ("perturbation: link", "perturbation: lnik", "test 'e', field perturbation"),
        ("name: b", "name: a", "test 'a', field name"),
        ("A {thing}.", "A {thin}.", "test 'a', field templates"),
        ("- {name: a", "- 5\n  - {name: a", "test 1"),
        ("[film", "[[film]", "lexicon, thing"),
        ("kind: INV, texts", "texts", "test 'b', field kind"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, old, new, said):
    assert old in GOOD
    (tmp_path / "t.yaml").write_text(GOOD.replace(old, new, 1))
    with pytest.raises(DataError) as e:
        read_tests(tmp_path / "t.yaml", ["a", "b"])
    assert str(e.value).startswith(f"{tmp_path / 't.yaml'}: ") and said in str(e.value)


def test_files_that_hold_no_tests(tmp_path):
    for name, text in (("a.yaml", "tests: []"), ("b.yaml", "a: [\n"), ("c.csv", "text\nx\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(LlmecoError, match=name):
            read_tests(tmp_path / name)
    (tmp_path / "t.yaml").write_text(GOOD)
    with pytest.raises(DataError, match="own_texts"):
        read_tests(tmp_path / "t.yaml")


def test_a_table_of_examples(tmp_path):
    rows = [
        "name;capability;kind;text;changed;label;max_failure_rate",
        "a;c;MFT;one;;x;0.5",
        "b;c;INV;two;zwei;;",
        "a;c;MFT;three;;y;0.5",
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    a, b = read_tests(tmp_path / "t.csv")
    assert a.examples == (Example("one", "", "x"), Example("three", "", "y"))
    assert a.max_failure_rate == 0.5 and b.max_failure_rate is None and b.kind == "INV"


# -- bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b")


def test_a_bundle_is_judged_as_its_words_say(bundle, tmp_path):
    "It knows ten words and no order: it passes praise and blame, and fails every negation."
    (tmp_path / "t.yaml").write_text(
        """
lexicon: {good: [good, great, fine], bad: [bad, dull, awful]}
tests:
  - {name: praise, capability: words, kind: MFT, templates: "{good}", label: positive}
  - {name: blame, capability: words, kind: MFT, templates: "{bad}", label: negative}
  - {name: "not", capability: negation, kind: MFT, templates: "not {good}", label: negative}
  - {name: case, capability: robustness, kind: INV, templates: "{good}", perturbation: capitals}
"""
    )
    tests = read_tests(tmp_path / "t.yaml")
    found = judge_bundle(bundle, tests)
    assert [r.failures for r in found.results] == [0, 0, 3, 0] and len(found.digest) > 10
    record = create_record(tmp_path / "r", "behave")
    config = BehaviourConfig(tests=str(tmp_path / "t.yaml"), max_failure_rate=0.2)
    folder = behave(record, [str(bundle)], config=config)
    told = read_json(folder / "results.json")[0]["results"]
    assert [r["rate"] for r in told] == [0, 0, 1, 0] and record.metrics["above_bound"] == 1
    assert record.metrics["failure_rate"] == pytest.approx(3 / 12)
    with pytest.raises(UsageError, match="Two bundles"):
        behave(create_record(tmp_path / "s", "behave"), [str(bundle)] * 2, config=config)


def test_the_command_fails_above_its_bound(bundle, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(
        "name,capability,kind,text,label\na,c,MFT,good,positive\na,c,MFT,not good,negative\n"
    )
    choice = dict(bundle=str(bundle), tests=str(tmp_path / "t.csv"))
    behave_command(BehaveChoice(**choice, max_failure_rate=0.5))
    assert "50%" in capsys.readouterr().out
    with pytest.raises(typer.Exit) as e:
        behave_command(BehaveChoice(**choice, max_failure_rate=0.4, output=tmp_path / "o.json"))
    said = capsys.readouterr().out
    assert e.value.exit_code == 1 and "FAIL" in said and "positive: not good" in said
    assert read_json(tmp_path / "o.json")["results"][0]["failures"] == 1


def test_a_bundle_that_answers_numbers_is_refused(tmp_path):
    schema = RegressionSchema(low=0.0, high=1.0, cleaning=Cleaning())
    numbers = make_bundle(tmp_path / "n", schema=schema)
    with pytest.raises(DataError, match="text-classification"):
        judge_bundle(numbers, sentiment_suite(count=2))


def test_a_killed_stage_answers_each_piece_once(tmp_path):
    class Dying(Table):
        limit = 5

        def scores(self, texts):
            if len(self.asked) >= self.limit:
                raise KeyboardInterrupt
            return super().scores(texts)

    model, texts = Dying({f"t{i}": i / 10 for i in range(10)}), [f"t{i}" for i in range(10)]
    with pytest.raises(KeyboardInterrupt):
        answer_texts(model, texts, tmp_path / "p", chunk=3)
    model.limit = 99
    found = answer_texts(model, texts, tmp_path / "p", chunk=3)
    assert np.allclose(found[:, 1], np.arange(10) / 10) and model.asked == texts


# -- doses


def test_doses_count_what_changes():
    "Accuracy may stay while answers change: as many flips to right as to wrong."

    class Length:
        def scores(self, texts):
            return np.array([[0.0, 1.0] if len(t) > 12 else [1.0, 0.0] for t in texts])

    texts = ["short words"] * 20
    points = dose_response({"m": Length()}, texts, [0, 1] * 10, ["distractor"], [0.0, 1.0])
    assert [p.accuracy for p in points] == [0.5, 0.5] and [p.flips for p in points] == [0, 1]
    assert points[1].change == 0 and points[1].change_low < 0 < points[1].change_high


# -- training on what failed


def made_reviews(count: int, seed: int) -> LabelledTexts:
    "Reviews of words of the whole lexicon in which nothing is negated."
    draw, lexicon = np.random.default_rng(seed), sentiment_lexicon()
    targets = draw.integers(0, 2, count)
    texts = [
        " ".join(draw.choice(lexicon[LABELS[y]], 4))
        + " "
        + " ".join(draw.choice(lexicon["thing"], 4))
        for y in targets
    ]
    return LabelledTexts(texts, targets)


def test_a_linear_model_learns_not_as_a_word():
    """Trained on negated praise of the first half, it passes that of the second, whose words it has
    not seen negated: to it `not` is one more word of blame, and so it fails where blame is negated
    and a word of praise stands beside."""
    first, second = (
        [t for t in sentiment_suite(half=h, count=60) if t.name == "praise negated"]
        for h in ("first", "second")
    )
    train, validation, clean = made_reviews(600, 0), made_reviews(150, 1), made_reviews(400, 2)
    old = fit_linear(train, validation, LABELS)
    texts, targets = failed_rows(first, run_tests(old, first, LABELS), LABELS)
    assert set(texts) == set(asked_texts(first)) and not targets.any()
    new = fit_linear(train.with_added(texts, targets), validation, LABELS)
    [seen], [held] = repair_rows(old, new, first, LABELS), repair_rows(old, new, second, LABELS)
    assert seen.before == held.before == 1 and seen.after < 0.1 and seen.verdict == "mended"
    assert held.after < 0.5 and failures_of(new, second, LABELS)[0].mean() == held.after
    kept = [
        template_test(
            "not only",
            "negation",
            "MFT",
            "This is not only {positive}.",
            sentiment_lexicon(),
            "positive",
        )
    ]
    [broken] = repair_rows(old, new, kept, LABELS)
    assert broken.before == 0 and broken.verdict == "broken"
    assert no_worse_claim(old, new, clean, 0.05).verdict == "supported"
    wrecked = Table({t: 1.0 - y for t, y in zip(clean.texts, clean.targets)})
    assert no_worse_claim(old, wrecked, clean, 0.05).verdict == "refuted"


def test_results_of_other_tests_are_refused():
    tests = sentiment_suite(count=4)
    with pytest.raises(DataError, match="not the results"):
        failed_rows(tests, run_tests(Table({}), tests[1:], LABELS), LABELS)


def test_a_probe_learns_what_was_added(monkeypatch):
    "The layer on a frozen encoder, whose reading is played by counts of two letters."
    import llmeco_nb.finetuning.embeddings as embeddings

    class Reader:
        def tokens(self, texts):
            return [[t.count("a"), t.count("b"), len(t)] for t in texts], None

    monkeypatch.setattr(
        embeddings, "embed_tokens", lambda encoder, rows: np.array(rows, np.float32)
    )
    draw = np.random.default_rng(0)
    x = draw.integers(0, 5, (200, 3)).astype(np.float32)
    y = (x[:, 0] > 2).astype(int)
    held, none = (x[:50], y[:50]), LabelledTexts([], np.array([], int))
    plain = fit_probe(Reader(), (x, y), held, none, 2)
    assert plain.scores(["aaaa", "b"]).argmax(1).tolist() == [1, 0]
    added = LabelledTexts(["b" * 9 + "a" * k for k in range(4)] * 100, np.ones(400, int))
    taught = fit_probe(Reader(), (x, y), held, added, 2)
    assert taught.scores(["b" * 9]).argmax(1).tolist() == [1]
    assert plain.scores(["b" * 9]).argmax(1).tolist() == [0]
