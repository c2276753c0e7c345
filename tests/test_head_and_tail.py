"""Which part of a long text is read: compared where minutes are given, obeyed where it is given,
the same in training, in the folder and in what follows a race."""

import random

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("transformers")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from llmeco_nb.core import create_record, read_json  # noqa: E402
from llmeco_nb.data.corpus import write_corpus  # noqa: E402
from llmeco_nb.finetuning.classifier import ClassifierConfig, fine_tune  # noqa: E402
from llmeco_nb.finetuning.frozen import FrozenConfig, fit_frozen  # noqa: E402
from llmeco_nb.finetuning.head_and_tail import choice_text, item_quality  # noqa: E402
from llmeco_nb.finetuning.race import RaceConfig, race  # noqa: E402


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
    assert told["head_fraction"] == 1 and told["max_length"] == 12
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
