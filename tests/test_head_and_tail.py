"""Which part of a long text is read: compared where minutes are given, obeyed where it is given,
the same in training, in the folder and in what follows a race."""

import random
import time

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("transformers")
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import create_record, read_json, write_json
from llmeco_nb.data.corpus import write_corpus
from llmeco_nb.finetuning import head_and_tail
from llmeco_nb.finetuning import race as race_chapter
from llmeco_nb.finetuning.classifier import fine_tune
from llmeco_nb.finetuning.classifier_config import ClassifierConfig
from llmeco_nb.finetuning.frozen import FrozenConfig, fit_frozen
from llmeco_nb.finetuning.head_and_tail import (
    HeadChoice,
    choice_text,
    choose_head,
    item_quality,
)
from llmeco_nb.finetuning.race import RaceConfig, race
from llmeco_nb.finetuning.regression import RegressionTraining
from llmeco_nb.finetuning.text_classification import ClassificationTraining
from llmeco_nb.tasks.regression import RegressionSchema
from llmeco_nb.tasks.text_classification import ClassificationSchema
from llmeco_nb.training.loop import plan_file


@pytest.fixture(autouse=True)
def runs(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path_factory.getbasetemp() / "runs"))


@pytest.fixture(scope="module")
def news(tmp_path_factory) -> str:
    "The fourth word of a long text decides, which a quarter of twelve tokens does not reach."
    rng, parts = random.Random(0), {}
    for split, size in dict(train=160, validation=80, test=20).items():
        noise = lambda k: " ".join(rng.choices("the of a film one that was it".split(), k=k))
        labels = [i % 2 for i in range(size)]
        texts = [f"{noise(3)} {('dull', 'great')[k]} {noise(40)}" for k in labels]
        ids = [f"{split}-{i}" for i in range(size)]
        parts[split] = pd.DataFrame(dict(id=ids, text=texts, label=labels))
    folder = tmp_path_factory.mktemp("news") / "corpus"
    write_corpus(folder, parts, ["bad", "good"], {})
    return str(folder)


SMALL = dict(max_length=12, epochs=1, batch_size=8, num_evals=1, name="quick")


def trained(news, folder, race="", **more):
    record = create_record(folder, "finetune")
    fine_tune(record, news, config=ClassifierConfig(**SMALL | more), race=race)
    told = read_json(record.artifact("classifier") / "config.json")["llmeco"]
    return record.metrics, told["head"]


def test_a_fine_tuning_chooses_where_it_has_minutes(news, tmp_path):
    found, head = trained(news, tmp_path / "timed", minutes=1.0)
    assert head == 100 and found["head_fraction"] == 1
    assert found["head_alone_score"] > 0.9 > 0.7 > found["head_and_tail_score"]
    assert found["head_p_value"] < 0.001 and "better, and is read" in choice_text(found)


def test_a_race_chooses_for_all(news, tmp_path):
    lines = ["quick lr:5e-3", "half lr:1e-3 head_fraction:0.5"]
    asked = RaceConfig(candidates=lines, total=1.0, max_length=12, batch_size=8, epochs=1)
    file = race(create_record(tmp_path / "r", "race"), news, config=asked)
    told = read_json(file)["head_choice"]
    assert told["metric"] == "accuracy" and told["head_fraction"] == 1 and told["max_length"] == 12
    found, head = trained(news, tmp_path / "f", str(file))
    assert head == 100 and found["head_alone_score"] == told["alone"]


def test_a_frozen_encoder_chooses_too(news, tmp_path):
    record = create_record(tmp_path / "r", "frozen")
    folder = fit_frozen(record, news, config=FrozenConfig(max_length=12, minutes=1.0))
    assert read_json(folder / "head.json")["head_fraction"] == 1 == record.metrics["head_fraction"]


@given(
    st.integers(2, 12),
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_few_texts_can_be_compared(train, held, words, classes, seed):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 5, rng.integers(1, words + 1)).tolist() for _ in range(train + held)]
    labels = rng.integers(0, classes, train + held)
    found = item_quality(rows, labels, train, True)
    assert found.shape == (held,) and set(found) <= {0.0, 1.0}
    errors = item_quality(rows, labels.astype(float), train, False)
    assert errors.shape == (held,) and (errors <= 0).all()


class Counting:
    "A tokenizer whose tokens are words, which counts what it reads and takes its time."

    def __init__(self, text_s=0.0):
        self.text_s, self.texts, self.characters = text_s, 0, 0

    def __call__(self, texts, **more):
        self.texts += len(texts)
        self.characters += sum(map(len, texts))
        time.sleep(self.text_s * len(texts))
        return {"input_ids": [[1, *(sum(map(ord, w)) for w in t.split()), 2] for t in texts]}


def compared(tokenizer, texts, minutes, classes=2, half=None):
    rows = pd.DataFrame(dict(id=[f"t{i}" for i in range(len(texts))], text=texts))
    rows["label"], rows["target"] = np.arange(len(rows)) % classes, np.arange(len(rows)) % 7.0
    schema = ClassificationSchema(labels=[f"c{i}" for i in range(classes)])
    if half is not None:
        schema = half.fit_schema(RegressionSchema(low=0, high=6), rows)
    half = half or ClassificationTraining()
    return choose_head(half, schema, tokenizer, dict(train=rows, validation=rows), 12, minutes)


def test_no_more_characters_are_read_than_matter():
    tokenizer, rng = Counting(), random.Random(0)
    texts = [
        f"{('dull', 'great')[i % 2]} " + " ".join(rng.choices(["a", "film"], k=20_000))
        for i in range(60)
    ]
    compared(tokenizer, texts, 1.0)
    assert tokenizer.characters < 100_000 < sum(map(len, texts)) / 40


def test_slow_tokenizers_and_many_classes_get_fewer_texts(monkeypatch):
    texts = [f"word{i % 40} " + "the film was " * 9 for i in range(400)]
    slow = Counting(text_s=1e-3)
    compared(slow, texts, 0.05)
    assert 150 <= slow.texts < 400, "of 800, within a tenth of three seconds"
    fit, seen = head_and_tail.fit_binary, []

    def slow_fit(name, x, *more):
        seen.append(x.shape[0])
        time.sleep(0.005)
        return fit(name, x, *more)

    monkeypatch.setattr(head_and_tail, "fit_binary", slow_fit)
    compared(Counting(), texts, 0.1, classes=40)
    assert max(seen) < 200


def test_numbers_are_told_as_errors():
    texts = [f"the a film w{i % 7} " + "the film was " * 9 for i in range(60)]
    found = choice_text(compared(Counting(), texts, 1.0, half=RegressionTraining()).metrics())
    assert "mean absolute error" in found and "standard deviation" in found and "-" not in found
    assert "accuracy" in choice_text(compared(Counting(), texts, 1.0).metrics())


def test_a_plan_of_an_earlier_version_is_followed(news, tmp_path):
    "It said nothing of heads."
    for stage, begin in dict(finetune=trained, frozen=frozen_head).items():
        for _ in range(2):
            assert begin(news, tmp_path / stage, head_fraction=0.5)[1] == 50
            file = plan_file(create_record(tmp_path / stage, stage))
            plan = read_json(file)
            plan.pop("head_choice", None)
            write_json(file, plan)


def frozen_head(news, folder, **more):
    record = create_record(folder, "frozen")
    found = fit_frozen(record, news, config=FrozenConfig(max_length=12, **more))
    return record.metrics, round(100 * read_json(found / "head.json")["head_fraction"])


def test_another_race_s_choice_is_obeyed(news, tmp_path):
    for share in (0.25, 1.0):
        file = tmp_path / "race.json"
        choice = HeadChoice(share, 12, both=0.5, alone=0.9, p_value=0.001).to_json()
        write_json(file, dict(minutes=dict(quick=0.0), left_out={}, head_choice=choice))
        assert trained(news, tmp_path / "f", str(file))[1] == 100 * share


def test_a_race_chooses_where_a_candidate_leaves_it_open(news, tmp_path, monkeypatch):
    "At the length that this one reads, and once: a killed race goes on with the same part."
    asked_at = []

    def spy(half, schema, tokenizer, splits, max_length, minutes):
        asked_at.append((max_length, minutes))
        return HeadChoice(1.0, max_length)

    monkeypatch.setattr(race_chapter, "choose_head", spy)
    monkeypatch.setattr(race_chapter, "entrant_speed", lambda *a: (0.1, 0.01))
    heads = []

    def run(record, half, schema, one, plan):
        heads.append((one.config.name, one.config.head_fraction))
        return np.full((plan["evaluated"], 2), 0.5), 0.1

    monkeypatch.setattr(race_chapter, "run_entrant", run)
    common = dict(batch_size=8, epochs=1, num_labeled=16, eval_examples=20)

    def told(name, lines, **more):
        record = create_record(tmp_path / name, "race")
        file = race(record, news, config=RaceConfig(candidates=lines, **common, **more))
        return read_json(file)["head_choice"]

    both = ["a lr:1e-3 head_fraction:0.5", "b lr:1e-4 head_fraction:0.5"]
    assert told("both", both, total=5.0, max_length=12) is None and not asked_at
    one = ["a lr:1e-3 head_fraction:0.5", "b lr:1e-4"]
    assert told("short", one, minutes=0.5, total=5.0, max_length=12) is None and not asked_at
    for _ in range(2):
        assert told("one", one, total=5.0, max_length=4096)["head_fraction"] == 1
    assert heads[-4:] == [("a", 0.5), ("b", 1.0)] * 2
    assert asked_at == [(asked_at[0][0], 5.0)] and asked_at[0][0] < 4096
