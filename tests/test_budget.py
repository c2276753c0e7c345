"""The minutes of a run: divided by shares, stored with the run, turned into plans that fit them,
and given to the encoder that wins the race."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_project import PIPELINE, ToyProject

from llmeco_nb.core import UsageError, create_record, read_json, write_json
from llmeco_nb.data.corpus import read_split, write_corpus
from llmeco_nb.finetuning.budget import (
    FINISHING_S,
    TooFewMinutes,
    Workload,
    finetune_plan,
    plan_workload,
    planned_batch_size,
    planned_length,
    round_down,
)
from llmeco_nb.runner.budget import LEAST_MINUTES, Budget, set_budget, split_minutes
from llmeco_nb.runner.stages import StageRegistry, read_profile
from llmeco_nb.stats.chance import ChanceTest
from llmeco_nb.tasks.predictions import exclusion_of

registry = StageRegistry.find()
WITH_BUDGET = [p for p in ("laptop", "gpu", "cluster")]


# -- From the run to its stages


@st.composite
def budgets(draw) -> Budget:
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True))
    shares = {name: draw(st.floats(0.5, 50)) for name in names}
    first = tuple(draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names) - 1)))
    fixed = draw(st.floats(0, 5))
    needed = fixed + LEAST_MINUTES * sum(shares.values()) / min(shares.values())
    return Budget(needed + draw(st.floats(0, 50)), fixed, shares, first)


@given(budgets(), st.floats(0, 100), st.floats(0, 100))
def test_minutes_are_divided_and_never_more_than_there_are(budget, more, still_more):
    minutes = budget.least + more
    parts = split_minutes(budget, minutes)
    assert parts.keys() == budget.shares.keys()
    assert budget.fixed + sum(parts.values()) <= minutes + 1e-6
    assert budget.fixed + sum(parts.values()) > minutes - 0.01 * len(parts) - 1e-6
    assert min(parts.values()) >= LEAST_MINUTES
    larger = split_minutes(budget, minutes + still_more)
    assert all(larger[name] >= part for name, part in parts.items())


@given(budgets(), st.floats(0.01, 5))
def test_the_first_to_shrink_gives_before_the_others(budget, missing):
    "What is not in `shrinks_first` loses nothing before that is down to the least."
    minutes = max(budget.least, budget.minutes - missing)
    whole, parts = split_minutes(budget, budget.minutes), split_minutes(budget, minutes)
    others = [name for name in parts if name not in budget.shrinks_first]
    if any(parts[name] < whole[name] - 0.02 for name in others):
        assert all(parts[name] <= LEAST_MINUTES + 0.011 for name in budget.shrinks_first)


@pytest.mark.parametrize(
    "told,said",
    [
        ("ten", "budget holds 'ten'"),
        (dict(minutes="10"), "budget.shares is None"),
        (dict(minutes="10", shares={}), "budget.shares is {}"),
        (dict(minutes="soon", shares={"a": "1"}), "budget.minutes is 'soon'"),
        (dict(minutes="nan", shares={"a": "1"}), "budget.minutes is 'nan'"),
        (dict(minutes="10", shares={"a": "-1"}), "budget.shares.a is '-1'"),
        (dict(minutes="10", shares={"a": "1"}, shrinks_first=["b"]), "names b, which has no"),
        (dict(minutes="10", fixed="10", shares={"a": "1"}), "at least 10.1"),
        (dict(minutes="10", share={"a": "1"}), "it holds minutes, fixed, shares"),
    ],
)
def test_a_budget_that_is_wrong_is_named(told, said):
    with pytest.raises(UsageError, match=said.replace("{", r"\{").replace(".", r"\.")):
        Budget.read(dict(budget=told), "somewhere")


@pytest.mark.parametrize("profile", WITH_BUDGET)
def test_a_profile_divides_its_minutes(profile):
    instances, spec = read_profile(registry, profile)
    by_name = {one.name: one for one in instances}
    minutes = set_budget(instances, spec, {}, profile)
    spent = [by_name["pretrain"].values["minutes"], by_name["race"].values["minutes"]]
    spent.append(by_name["race"].values["total"])
    assert min(spent) > 0 and float(spec["budget"]["fixed"]) + sum(spent) <= minutes
    # own pretraining gives way first
    set_budget(instances, spec, dict(minutes=minutes - 0.3), profile)
    assert by_name["pretrain"].values["minutes"] < spent[0]
    assert by_name["race"].values["total"] == spent[2]
    candidates = [c.split()[0] for c in by_name["race"].values["candidates"]]
    trained = [o.values["name"] for o in instances if o.stage == "finetune"]
    assert sorted(candidates) == sorted(trained), "the race gives minutes by name"
    for one in instances:
        one.config.of(one.values, one.name)


def test_a_number_of_labels_goes_to_all_who_learn():
    instances, spec = read_profile(registry, "laptop")
    set_budget(instances, spec, dict(num_labeled=300), "laptop")
    found = {o.name: o.values["num_labeled"] for o in instances if "num_labeled" in o.values}
    assert found["finetune@own"] == found["finetune@minilm"] == 300
    assert found["evaluate"] == [300]


def test_smoke_has_no_budget():
    instances, spec = read_profile(registry, "smoke")
    before = {o.name: dict(o.values) for o in instances}
    assert set_budget(instances, spec, {}, "smoke") is None
    assert before == {o.name: o.values for o in instances}
    with pytest.raises(UsageError, match="--minutes 5: the profile smoke does not say"):
        set_budget(instances, spec, dict(minutes=5.0), "smoke")


def test_the_command_stores_the_minutes_and_p_goes_before_them(tmp_path, machine_json):
    project = ToyProject(tmp_path / "project", machine_json)
    profile = project.folder / "nbs" / "profiles" / "toy" / "pipeline.yaml"
    code, _, err = project.llmeco("run", "-P", "toy", "--minutes", "3")
    assert code == 2 and "the profile toy does not say how" in err and not project.entries()
    shares = "budget: {minutes: 0.6, fixed: 0.45, shares: {make.pause: 1}}\n"
    profile.write_text(shares + PIPELINE)

    def pause() -> float:
        manifest = project.runs / "toy-1" / "make" / "manifest.json"
        return json.loads(manifest.read_text())["parameters"]["pause"]

    code, out, err = project.llmeco("run", "-P", "toy")
    assert code == 0 and ", 0.6 minutes" in out, err
    assert "of 0.6 minutes left)" in out or "minutes more than 0.6)" in out
    assert read_json(project.runs / "toy-1" / "run.json")["minutes"] == 0.6 and pause() == 0.15
    assert set(project.run().values()) == {"current"}
    assert project.run("--minutes", "0.7")["make"] == "made" and pause() == 0.25
    assert read_json(project.runs / "toy-1" / "run.json")["minutes"] == 0.7
    assert set(project.run().values()) == {"current"}, "the minutes stay with the run"
    assert project.run("-p", "make.pause=0.01")["make"] == "made" and pause() == 0.01
    for words, said in (
        (["--minutes", "0.1"], "at least 0.6"),
        (["--minutes", "-1"], "give a number of minutes above 0"),
        (["--minutes", "nan"], "give a number of minutes above 0"),
        (["--num-labeled", "-1"], "give a number of labels"),
        (["--minutes", "ten"], "Invalid value for"),
    ):
        code, _, err = project.llmeco("run", "-P", "toy", *words)
        assert code == 2 and said in err and "Traceback" not in err, err
    assert read_json(project.runs / "toy-1" / "run.json")["minutes"] == 0.7


# -- From minutes to a plan

CONFIG = dict(epochs=3, min_steps=0, minutes=0.0, num_evals=2, patience=3, warmup_ratio=0.1)


def config(**more) -> SimpleNamespace:
    return SimpleNamespace(**(CONFIG | more))


works = st.builds(
    Workload,
    labels=st.integers(2, 50_000),
    predicted=st.integers(1, 20_000),
    evaluated=st.integers(1, 500),
    max_length=st.just(64),
    batch_size=st.integers(1, 64),
    step_s=st.floats(1e-3, 2),
    forward_s=st.floats(1e-5, 0.05),
    exact_s=st.floats(0.05, 0.1),
    encode_s=st.floats(0, 1e-3),
    spent_s=st.floats(0, 20),
)


@given(works, st.floats(0.05, 30), st.floats(1, 4), st.integers(1, 9), st.integers(0, 300))
def test_a_plan_fits_its_minutes_and_grows_with_them(work, minutes, times, epochs, least):
    asked = config(minutes=minutes, epochs=epochs, min_steps=least)
    try:
        plan = finetune_plan(asked, work)
    except UsageError:
        return
    taken = (
        plan["steps"] * work.step_s
        + work.predicting(asked.num_evals, bool(plan["exact"]))
        + work.spent_s
    )
    assert taken <= 60 * minutes
    if plan["steps"] < max(-(-work.labels // work.batch_size) * epochs, least):
        spare = 0.05 * 60 * minutes + FINISHING_S + work.step_s
        reading = work.encode_s * (work.predicted + work.batch_size * plan["steps"] + 1)
        assert taken + spare + reading >= 60 * minutes, "minutes are used"
    assert plan["steps"] >= 1 and 1 <= plan["labels"] <= work.labels
    assert plan["labels"] <= plan["steps"] * work.batch_size, "each label is seen once at least"
    an_epoch = -(-plan["labels"] // work.batch_size)
    rounded = 1.11 if plan["labels"] < work.labels else 1
    assert plan["steps"] <= max(an_epoch * epochs * rounded + 1, least)
    assert all(isinstance(v, int) for k, v in plan.items() if k != "schedule")
    larger = finetune_plan(config(**vars(asked) | dict(minutes=minutes * times)), work)
    assert larger["steps"] >= plan["steps"] and larger["labels"] >= plan["labels"]


def test_a_plan_reads_a_label_of_each_class():
    "Or the model is left out: of three steps of 32 texts some of 150 classes would see none."
    work = Workload(
        labels=9000,
        least=150,
        predicted=100,
        evaluated=50,
        max_length=32,
        batch_size=32,
        step_s=1.0,
        forward_s=0.01,
        exact_s=0.03,
    )
    with pytest.raises(TooFewMinutes, match="fewest labels there can be, 150,"):
        finetune_plan(config(minutes=0.15), work)
    plan = finetune_plan(config(minutes=0.2), work)
    assert plan["steps"] * work.batch_size >= plan["labels"] >= 150


@given(
    st.floats(0.01, 3),
    st.floats(1e-4, 2),
    st.floats(1e-5, 0.05),
    st.integers(1, 2000),
    st.integers(0, 5000),
    st.floats(0, 20),
)
def test_the_minutes_that_are_named_suffice(minutes, step_s, forward_s, least, predicted, spent):
    work = Workload(
        labels=9000,
        least=least,
        predicted=predicted,
        evaluated=50,
        max_length=32,
        batch_size=32,
        step_s=step_s,
        forward_s=forward_s,
        exact_s=3 * forward_s,
        spent_s=spent,
    )
    try:
        finetune_plan(config(minutes=minutes), work)
    except TooFewMinutes as e:
        told = float(re.search(r"about ([\d.]+) here", str(e))[1])
        assert told > minutes
        finetune_plan(config(minutes=told), work)


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_rounding_keeps_the_order(a, b):
    low, high = sorted((a, b))
    assert round_down(low) <= round_down(high) <= high < round_down(high) * 1.11 + 1


@given(
    st.lists(st.integers(3, 900), min_size=1, max_size=200),
    st.integers(2, 512),
    st.floats(0.05, 20),
    st.integers(1, 20_000),
)
def test_predicting_leaves_time_to_learn(lengths, max_length, minutes, predicted):
    "Or the texts are as short as they may be."
    asked = config(minutes=minutes, max_length=max_length, batch_size=8)
    known = Workload(
        labels=100,
        predicted=predicted,
        evaluated=10,
        max_length=1,
        batch_size=1,
        step_s=0,
        forward_s=0,
        exact_s=0,
    )
    mean = lambda tokens: float(np.minimum(lengths, tokens).mean())
    measured = []

    def speed(tokens, batch_size):
        measured.append(tokens)
        return mean(tokens) * batch_size * 1e-4, mean(tokens) * 3e-5, mean(tokens) * 9e-5

    forward = lambda tokens: speed(tokens, 1)[1]
    found = plan_workload(asked, known, lengths, speed, forward)
    assert len(measured) == 2, "each measurement takes seconds"
    assert found.max_length <= max(max_length, 0) and found.batch_size >= 8
    assert found.predicting(2) <= 30 * minutes or found.max_length <= 16
    assert found.max_length <= max(16, planned_length(lengths, max_length))
    assert planned_batch_size(1, 8) == 32


def test_a_loser_has_minutes_that_suffice_or_none():
    "0 would be no limit at all."
    assert divide_minutes(5.0, ["a", "b"], "a", 0.1) == dict(a=4.5, b=0.5)
    assert divide_minutes(5.0, ["a"], "a", 0.1) == dict(a=5.0)
    assert divide_minutes(0.3, ["a", "b"], "b", 0.1) == dict(a=LEAST_MINUTES, b=0.2)
    assert divide_minutes(0.1, ["a", "b"], "a", 0.1) == dict(a=0.1)
    assert divide_minutes(5.0, ["a", "b"], "a", 0.0) == dict(a=5.0)
    assert divide_minutes(0.0, ["a", "b"], "a", 0.1) == dict(a=0, b=0), "epochs decide"
    with pytest.raises(UsageError, match="total is 0.004: give 0.1 or more, or 0"):
        RaceConfig(total=0.004)


@given(
    st.floats(LEAST_MINUTES, 60),
    st.integers(1, 8),
    st.floats(0, 0.49),
)
def test_no_minutes_are_lost_in_a_race(total, candidates, share):
    names = [f"n{i}" for i in range(candidates)]
    given = divide_minutes(total, names, names[-1], share)
    assert min(given.values()) >= LEAST_MINUTES and given[names[-1]] == max(given.values())
    assert total - 0.01 * len(given) - 1e-6 <= sum(given.values()) <= total + 1e-6


def test_a_race_that_is_too_long_scores_on_fewer_texts():
    asked = RaceConfig(minutes=0.5, batch_size=8)
    plan = race_plan(asked, [(0.5, 0.1), (0.1, 0.02)], 500, 1000, 5.0)
    assert sum(plan["seconds"]) + 5 <= 30 and 50 <= plan["evaluated"] < 300


def test_few_texts_get_steps_enough():
    work = Workload(
        labels=600,
        predicted=100,
        evaluated=50,
        max_length=32,
        batch_size=16,
        step_s=0.1,
        forward_s=0.001,
        exact_s=0.003,
    )
    assert finetune_plan(config(epochs=2), work)["steps"] == 76
    assert finetune_plan(config(epochs=2, min_steps=200), work)["steps"] == 200
    assert finetune_plan(config(epochs=2, min_steps=200, minutes=0.3), work)["steps"] < 150


# -- What came of it


@given(st.integers(1, 300), st.floats(0, 1), st.integers(2, 5), st.integers(0, 99))
def test_naming_one_class_is_always_chance(n, share, classes, seed):
    rng = np.random.default_rng(seed)
    truth = np.where(rng.random(n) < share, 0, rng.integers(0, classes, n))
    found = ChanceTest.of(truth, np.zeros(n, int), 0)
    assert found.at_chance and "at chance" in found.sentence("it")
    if (truth == 0).mean() < 0.8 and n > 40:
        assert not ChanceTest.of(truth, truth, 0).at_chance


pytest.importorskip("transformers")
from llmeco_nb.finetuning import classifier
from llmeco_nb.finetuning.checkpoints import small_random_encoder
from llmeco_nb.finetuning.classifier import fine_tune
from llmeco_nb.finetuning.classifier_config import ClassifierConfig
from llmeco_nb.finetuning.race import RaceConfig, race
from llmeco_nb.finetuning.race_plan import divide_minutes, race_plan


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    from test_finetune import made

    return made(tmp_path_factory.mktemp("corpus") / "corpus", train=60, validation=40, test=60)


@pytest.fixture(autouse=True)
def runs(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path_factory.getbasetemp() / "runs"))


SMALL = dict(max_length=24, epochs=1, batch_size=8, num_evals=2, name="toy")


def test_what_has_not_learned_is_said_to_be_at_chance(corpus, tmp_path):
    record = create_record(tmp_path / "idle", "finetune")
    fine_tune(record, corpus, config=ClassifierConfig(**SMALL, lr=1e-9))
    assert record.metrics["at_chance"] and record.metrics["chance_p_value"] > 0.05
    said = (record.path / "summary.txt").read_text()
    assert said.startswith("toy is at chance: ") and "33.3%" in said
    record = create_record(tmp_path / "learned", "finetune")
    fine_tune(record, corpus, config=ClassifierConfig(**SMALL, lr=5e-3, min_steps=90))
    assert record.metrics["steps"] == 90 and record.metrics["at_chance"] is False
    assert not (record.path / "summary.txt").exists()


def test_minutes_become_tokens_labels_and_steps(corpus, tmp_path):
    write_json(tmp_path / "race.json", dict(minutes=dict(toy=1e-6, other=5)))
    asked = ClassifierConfig(**SMALL | dict(max_length=256), lr=5e-3)
    record = create_record(tmp_path / "hasty", "finetune")
    fine_tune(record, corpus, config=asked, race=str(tmp_path / "race.json"))
    assert record.metrics["left_out"] and not (tmp_path / "hasty.plan.json").exists()
    assert "toy is left out: minutes is 1e-06" in (record.path / "summary.txt").read_text()
    with pytest.raises(UsageError, match="name is third, and the race was between toy, other"):
        fine_tune(
            create_record(tmp_path / "r", "finetune"),
            corpus,
            config=asked.replace(name="third"),
            race=str(tmp_path / "race.json"),
        )
    record = create_record(tmp_path / "r", "finetune")
    longer = asked.replace(minutes=1.5)  # goes before those of the race
    fine_tune(record, corpus, config=longer, race=str(tmp_path / "race.json"))
    plan = read_json(tmp_path / "r.plan.json")
    assert plan["max_length"] == record.metrics["max_length"] <= 40, "as long as the texts are"
    assert (plan["batch"], plan["labels"], plan["steps"]) == (32, 60, 2)
    assert record.metrics["labels"] == 60 and record.metrics["passes"] >= 1
    assert record.metrics["title"] == "toy", "nothing was cut off for lack of minutes"
    tokenizer = json.loads((record.artifact("classifier") / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == plan["max_length"]


def test_a_title_says_what_minutes_have_cut_off(corpus, tmp_path, monkeypatch):
    "In the table of all models, too."
    from llmeco_nb.evaluation.comparison import recorded_facts

    slow = lambda model, rows, pad, tries=2: 0.001 * max(map(len, rows))
    monkeypatch.setattr(classifier, "forward_seconds", slow)
    record = create_record(tmp_path / "r", "finetune")
    asked = ClassifierConfig(**SMALL | dict(max_length=256), minutes=0.1, head_fraction=0.5)
    fine_tune(record, corpus, config=asked)
    told = read_json(record.artifact("classifier") / "config.json")["llmeco"]
    assert told["head"] == 50 and record.metrics["head_fraction"] == 0.5, "what is given is obeyed"
    title = recorded_facts(record.artifact("predictions")).title
    assert record.metrics["max_length"] < 32
    assert title == f"toy, {record.metrics['max_length']} of 40 tokens"


def test_a_race_is_the_same_by_the_same_plan(corpus, tmp_path):
    lines = ["idle lr:1e-9", "quick lr:5e-3"]
    asked = RaceConfig(
        candidates=lines, minutes=0.2, total=5, max_length=24, batch_size=8, epochs=9
    )
    first = race(create_record(tmp_path / "first", "race"), corpus, config=asked)
    shutil.copy(tmp_path / "first.plan.json", tmp_path / "second.plan.json")
    second = race(create_record(tmp_path / "second", "race"), corpus, config=asked)
    assert first.read_bytes() == second.read_bytes()
    found = read_json(first)
    assert found["winner"] == "quick" and "better than idle" in found["why"]
    assert found["minutes"] == dict(idle=0.5, quick=4.5)
    scores = {row["name"]: row["score"] for row in found["rows"]}
    assert scores["quick"] > 0.6 > scores["idle"]
    with pytest.raises(UsageError, match="candidates are one; a race needs two or more"):
        race(
            create_record(tmp_path / "third", "race"),
            corpus,
            config=asked.replace(candidates=["one lr:1e-3"]),
        )


def test_who_cannot_read_the_texts_gets_no_minutes(corpus, tmp_path):
    "The others share them, and its fine-tuning says why it is left out."
    lines = ["picky max_unknown_share:0", "quick lr:5e-3", "slow lr:1e-4"]
    asked = RaceConfig(candidates=lines, total=5, max_length=24, batch_size=8, epochs=1)
    parts = {s: read_split(corpus, s) for s in ("train", "validation", "test")}
    odd = {s: rows.assign(text="ก " + rows.text) for s, rows in parts.items()}
    write_corpus(tmp_path / "odd", odd, ["refund", "delivery", "praise"], {})
    encoder = str(small_random_encoder(corpus))
    file = race(create_record(tmp_path / "r", "race"), str(tmp_path / "odd"), encoder, asked)
    found = read_json(file)
    assert found["minutes"] == {found["winner"]: 4.5} | {
        name: 0.5 for name in ("quick", "slow") if name != found["winner"]
    }
    record = create_record(tmp_path / "f", "finetune")
    config = ClassifierConfig(**SMALL | dict(name="picky"))
    folder = fine_tune(record, str(tmp_path / "odd"), config=config, race=str(file))
    assert record.metrics["left_out"]
    assert exclusion_of(folder).startswith("picky is left out: its tokenizer does not know")


def test_a_loser_without_minutes_is_left_out(corpus, tmp_path):
    lines = ["quick lr:5e-3", "slow lr:1e-9"]
    asked = RaceConfig(candidates=lines, total=0.15, max_length=24, batch_size=8, epochs=1)
    file = race(create_record(tmp_path / "r", "race"), corpus, config=asked)
    assert read_json(file)["minutes"] == dict(quick=0.15)
    record = create_record(tmp_path / "f", "finetune")
    config = ClassifierConfig(**SMALL | dict(name="slow"))
    said = exclusion_of(fine_tune(record, corpus, config=config, race=str(file)))
    assert said.startswith("slow is left out: quick has won the race") and "0.15" in said
