"A classifier from lists of texts and labels: README's lines, what it holds, and what it refuses."

import copy
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from llmeco_nb.core import DataError, UsageError
from llmeco_nb.data.corpus import label_names, read_split, small_corpus
from llmeco_nb.deployment.bundle import small_bundle
from llmeco_nb.deployment.estimator import TextClassifier
from llmeco_nb.finetuning.checkpoints import small_random_encoder

root = Path(__file__).parent.parent


def lists(split: str) -> tuple[list[str], list[str]]:
    "Texts and class names of a split of the small corpus."
    rows, names = read_split(small_corpus(), split), label_names(small_corpus())
    return rows.text.tolist(), [names[i] for i in rows.label]


def test_the_lines_of_readme_run(tmp_path, monkeypatch, capsys):
    shown = (root / "README.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```python\n(.*?)```", shown, re.S) if "fit(" in b)
    monkeypatch.chdir(tmp_path)
    texts, labels = lists("train")
    unseen_texts, unseen_labels = lists("test")
    scope = dict(texts=texts, labels=labels, unseen_texts=unseen_texts, unseen_labels=unseen_labels)
    exec(block, scope)  # what README shows
    said = capsys.readouterr().out.splitlines()
    assert said[0] in ("['negative']", "['positive']")
    assert re.fullmatch(
        rf"accuracy [\d.]+ % \[[\d., ]+\], macro-F1 .*, {len(unseen_texts)} texts", said[1]
    )
    again = TextClassifier.load(tmp_path / "bundle")
    assert again.predict(unseen_texts) == scope["model"].predict(unseen_texts)
    assert len([line for line in block.splitlines() if line]) <= 6  # a handful, as it says


def test_an_encoder_joins_the_comparison():
    texts, labels = lists("train")
    model = TextClassifier(encoder=str(small_random_encoder(small_corpus()))).fit(texts, labels)
    assert "frozen" in model.report
    p = model.predict_proba(texts[:5])
    assert p.shape == (5, 2) and np.allclose(p.sum(1), 1, atol=1e-5)


def test_numbers_as_classes_and_missing_values(tmp_path):
    texts, labels = lists("train")
    numbers = [i + 7 for i in (np.array(labels) == "positive").astype(int)]
    model = TextClassifier().fit([*texts, None, float("nan"), "fine"], [*numbers, 7, 7, None])
    assert model.classes == ["7", "8"] and set(model.predict(texts)) == {"7", "8"}
    assert model.evaluate(texts, numbers).items == len(texts)
    said = model.predict(texts)
    with pytest.raises(DataError):
        model.fit(["a", "b"], ["x", "x"])
    assert model.predict(texts) == said and model.save(tmp_path / "kept").is_dir()
    with pytest.raises(UsageError, match=r"texts\[1\]"):
        model.predict(["fine", float("nan")])


@pytest.mark.parametrize(
    ("work", "kind", "said"),
    [
        (lambda m: m.predict(["x"]), UsageError, "fit, or load"),
        (lambda m: m.save("anywhere"), UsageError, "fit, or load"),
        (lambda m: m.report, UsageError, "no comparison"),
        (lambda m: m.fit("a text", ["x"]), UsageError, "as many labels"),
        (lambda m: m.fit(["a", "b"], ["x"]), UsageError, "2 texts"),
        (lambda m: m.fit(["a", "b"], ["x", "x"]), DataError, "x"),
        (lambda m: m.fit([], []), DataError, "no usable row"),
    ],
)
def test_refusals(work, kind, said):
    with pytest.raises(kind, match=said):
        work(TextClassifier())


def test_it_is_copied_pickled_and_cloned_as_other_estimators_are(tmp_path):
    import joblib
    from sklearn.base import clone

    texts, labels = lists("train")
    model = TextClassifier(test_size=0.3, seed=2).fit(texts, labels)
    joblib.dump(model, tmp_path / "model.joblib")
    copies = [
        joblib.load(tmp_path / "model.joblib"),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ]
    told, asked, scores = model.report, texts[:9], model.predict_proba(texts[:9])
    del model  # and its temporary folder with it: a copy stands on its own
    for one in copies:
        assert np.array_equal(one.predict_proba(asked), scores) and one.report == told
        assert one.get_params() == copies[0].get_params() and one.test_size == 0.3
    assert TextClassifier.load(copies[0].save(tmp_path / "bundle")).predict(asked)
    blank = clone(copies[0])
    assert blank.get_params() == copies[0].get_params()
    for unfitted in (blank, pickle.loads(pickle.dumps(blank))):
        with pytest.raises(UsageError, match="fit, or load"):
            unfitted.predict(asked)
    assert blank.set_params(seed=5).seed == 5
    with pytest.raises(UsageError, match="There is no argument sead.*seed"):
        blank.set_params(sead=5)


def test_who_cannot_be_pickled_any_more_says_why(tmp_path):
    texts, labels = lists("train")
    place = TextClassifier().fit(texts, labels).save(tmp_path / "bundle")
    model = TextClassifier.load(place)
    shutil.rmtree(place)
    with pytest.raises(DataError, match="cannot be pickled or copied.*bundle.*load"):
        pickle.dumps(model)


def test_loaded_by_a_relative_name_it_is_found_from_elsewhere(tmp_path, monkeypatch):
    shutil.copytree(small_bundle(), tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    model = TextClassifier.load("bundle")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    asked = ["a dull film"]
    assert pickle.loads(pickle.dumps(model)).predict(asked) == model.predict(asked)
    assert TextClassifier.load(model.save("saved")).predict(asked) == model.predict(asked)


def test_a_pickle_of_another_version_says_what_to_do():
    "It may have other arguments, or hold other things."
    for state, found in (
        ({**TextClassifier().__getstate__(), "params": {"seed": 1, "sead": 2}}, "sead"),
        ({"params": {}, "files": {}}, "told"),
        ({"encoder": ""}, "params"),
    ):
        blank = TextClassifier.__new__(TextClassifier)
        with pytest.raises(DataError, match=f"another version.*{found}.*save.*load"):
            blank.__setstate__(state)
