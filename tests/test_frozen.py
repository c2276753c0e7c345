"""An encoder that is not trained: its vectors are those of plain transformers, the layer is that of
scikit-learn, kills leave no trace, and the folder is packed, matched and refitted."""

import os
import random
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from test_finetune import CLASSES, made

from llmeco_nb.core import (
    DataError,
    MissingError,
    UsageError,
    create_record,
    read_json,
    sha256_of,
)
from llmeco_nb.data.corpus import read_split, write_corpus
from llmeco_nb.finetuning import embeddings, frozen
from llmeco_nb.finetuning.budget import TooFewMinutes, round_down
from llmeco_nb.finetuning.checkpoints import small_random_encoder
from llmeco_nb.finetuning.embeddings import (
    embed_tokens,
    open_encoder,
    token_batches,
)
from llmeco_nb.finetuning.frozen import FrozenConfig, fit_frozen
from llmeco_nb.finetuning.frozen_classifier import open_frozen
from llmeco_nb.finetuning.linear import softmax
from llmeco_nb.finetuning.linear_probe import spread_of
from llmeco_nb.finetuning.reading_plan import (
    ReadingSpeed,
    fewest_tokens,
    frozen_plan,
)
from llmeco_nb.tasks.predictions import (
    exclusion_of,
    read_predictions_file,
    scores_of,
)
from llmeco_nb.tasks.registry import load_schema
from llmeco_nb.tasks.regression import RegressionSchema

SMALL = FrozenConfig(max_length=24, device="cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return made(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(autouse=True)
def runs(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path_factory.getbasetemp() / "runs"))


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    "A whole run, used by several tests."
    os.environ["LLMECO_RUNS"] = str(tmp_path_factory.getbasetemp() / "runs")
    record = create_record(tmp_path_factory.mktemp("done") / "r", "frozen")
    fit_frozen(record, corpus, config=SMALL)
    return record


def test_it_learns_and_says_so(done):
    m = done.metrics
    assert min(m["accuracy_test"], m["accuracy_validation"], m["macro_f1"]) > 0.7
    assert (m["labels"], m["max_length"]) == (120, 24)
    assert m["title"] == "frozen (frozen encoder, 24 tokens)"
    assert m["reopened_agrees"] == 1 and m["reopened_difference"] < 1e-4
    assert not (done.path / "resume").exists()
    table = pd.read_parquet(done.artifact("predictions"))
    assert set(table.model) == {"frozen"} and set(table.num_labeled) == {120}
    assert np.allclose(scores_of(table).sum(1), 1, atol=1e-5)


def random_encoder(kind: str, corpus: str, folder: Path) -> str:
    "A tiny encoder of another family, with the tokenizer of the small BERT."
    import transformers

    source = small_random_encoder(corpus)
    sizes = dict(vocab_size=1500, max_position_embeddings=64, pad_token_id=0)
    if kind == "DistilBert":
        sizes |= dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    else:
        sizes |= dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        sizes |= dict(intermediate_size=64)
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Roberta"])
def test_vectors_are_those_of_transformers(kind, corpus, tmp_path):
    "One text at a time in float32, whatever shares its batch here."
    from transformers import AutoModel

    folder = random_encoder(kind, corpus, tmp_path / "encoder")
    reader = open_encoder(folder, 24, 25, "cpu")
    rows, _ = reader.tokens(read_split(corpus, "test").text.tolist() + ["a"])
    stock = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        one = [stock(torch.tensor([row])).last_hidden_state.mean(1)[0] for row in rows]
    expected = torch.nn.functional.normalize(torch.stack(one), dim=1).numpy()
    for batch_tokens in (1, 60, 4096):
        assert np.abs(embed_tokens(reader, rows, batch_tokens) - expected).max() < 1e-5
    halved = embed_tokens(reader.in_precision("bf16"), rows)
    assert (halved * expected).sum(1).min() > 0.999
    with pytest.raises(UsageError, match=f"from 2 to {63 if kind == 'Roberta' else 64}"):
        open_encoder(folder, 65, 25, "cpu")
    longest = open_encoder(folder, 63 if kind == "Roberta" else 64, 25, "cpu")
    assert len(embed_tokens(longest, longest.tokens(["and so on " * 90])[0])) == 1


@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 500))
@settings(max_examples=60)
def test_batches_hold_every_text_once_and_no_more_than_fits(lengths, batch_tokens):
    batches = token_batches(lengths, batch_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens


def test_the_layer_is_that_of_scikit_learn(done, corpus):
    "At the same C and temperature, on vectors that are computed again."
    _, exact, about = open_frozen(done.artifact("classifier"))
    vectors, targets = {}, {}
    for split, precision in (("train", about["precision"]), ("test", "fp32")):
        reader = exact.in_precision(precision)
        rows = read_split(corpus, split)
        vectors[split] = embed_tokens(reader, reader.tokens(rows.text.tolist())[0])
        targets[split] = rows.label.to_numpy()
    unit = spread_of(vectors["train"])
    theirs = LogisticRegression(C=about["C"], tol=1e-8, max_iter=10_000)
    theirs.fit(vectors["train"].astype(float) / unit, targets["train"])
    scores = theirs.decision_function(vectors["test"].astype(float) / unit)
    told = scores_of(read_predictions_file(done.artifact("predictions"), split="test"))
    assert np.abs(softmax(about["scale"] * scores) - told).max() < 2e-3


@pytest.mark.parametrize("when,kept", [("plan", 0), (1, 0), (3, 2), ("fit", 3)])
def test_kills_leave_no_trace(done, corpus, tmp_path, when, kept):
    "Killed while it is planned, before a chunk of vectors is written, and after the fit."
    out = tmp_path / "r"
    pid = os.fork()
    if pid == 0:
        write, seen = embeddings.write_bytes, []

        def dying(*args):
            seen.append(1)
            if len(seen) == when:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args)

        embeddings.write_bytes = dying
        name = dict(plan="frozen_plan", fit="label_curve").get(when)
        if name:
            setattr(frozen, name, lambda *a: os.kill(os.getpid(), signal.SIGKILL))
        try:
            fit_frozen(create_record(out, "frozen"), corpus, config=SMALL)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not (out / "classifier").exists()
    assert len(list((out / "resume").rglob("*.npz"))) == kept
    record = create_record(out, "frozen")
    fit_frozen(record, corpus, config=SMALL)
    for file in ("predictions", "classifier/head.safetensors", "classifier/head.json"):
        assert (record.path / file).read_bytes() == (done.path / file).read_bytes(), file
    assert sha256_of(record.artifact("classifier")) == sha256_of(done.artifact("classifier"))
    logged = lambda r: [{k: v for k, v in row.items() if k != "seconds"} for row in r.rows()]
    assert logged(record) == logged(done)


def test_vectors_of_another_question_are_not_taken(corpus, tmp_path):
    "A record that is used again with other parameters, by hand."
    record = create_record(tmp_path / "r", "frozen")
    fit_frozen(record, corpus, config=SMALL)
    left = record.resume / "vectors" / "test" / "000000000.npz"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"not read")
    record = create_record(tmp_path / "r", "frozen")
    fit_frozen(record, corpus, config=SMALL.replace(max_length=12))
    assert record.metrics["max_length"] == 12


@given(
    st.floats(0.01, 60),
    st.floats(1e-6, 1e-2),
    st.lists(st.integers(2, 400), min_size=1, max_size=20),
    st.integers(5, 100_000),
    st.integers(0, 20_000),
)
@settings(max_examples=200)
def test_a_plan_keeps_its_minutes(minutes, token_s, lengths, train, answered):
    "It is within them or refused; with more of them no fewer labels at the same tokens."
    speed = ReadingSpeed("bf16", 1e-4, token_s, 2 * token_s, lengths, 1e-4)
    config = FrozenConfig(minutes=minutes)
    try:
        plan = frozen_plan(config, speed, train, 5, answered, 0.3)
    except TooFewMinutes as e:
        told = float(re.search(r"about ([\d.]+) here", str(e))[1])
        assert told > minutes
        frozen_plan(config.replace(minutes=told), speed, train, 5, answered, 0.3)
        shortest = speed.seconds(answered, fewest_tokens, exact=True) + 0.3
        shortest += (speed.seconds(5, fewest_tokens) + 5 * speed.fit_s) / 0.95
        assert shortest > 0.99 * (60 * minutes - min(5, 15 * minutes))
        return
    assert 5 <= plan["labels"] <= train and fewest_tokens <= plan["max_length"] <= 128
    assert plan["forecast_s"] <= 60 * minutes - min(5, 15 * minutes) + 0.5, "time to save"
    assert plan["labels"] in (5, train, round_down(plan["labels"]))
    more = frozen_plan(config.replace(minutes=2 * minutes), speed, train, 5, answered, 0.3)
    if more["max_length"] == plan["max_length"]:
        assert more["labels"] >= plan["labels"]
    free = frozen_plan(FrozenConfig(), speed, train, 5, answered, 0.3)
    assert (free["labels"], free["max_length"]) == (train, 128)


def test_few_labels_are_one_of_each_class(corpus, tmp_path):
    record = create_record(tmp_path / "r", "frozen")
    fit_frozen(record, corpus, config=SMALL.replace(num_labeled=1))
    assert record.metrics["labels"] == 3 and record.metrics["labels_asked"] == 1


def numbers(folder: Path) -> str:
    "A corpus whose texts have the number of words in them that are not filler."
    rng = random.Random(0)
    parts = {}
    for split, size in dict(train=160, validation=40, test=40).items():
        counts = [rng.randint(0, 8) for _ in range(size)]
        texts = [
            " ".join(rng.sample(["great"] * n + ["the", "film", "was"] * 4, n + 12)) for n in counts
        ]
        ids = [f"{split}-{i}" for i in range(size)]
        parts[split] = pd.DataFrame(dict(id=ids, text=texts, target=np.array(counts) / 2 + 1990))
    write_corpus(folder, parts, [], {}, RegressionSchema(low=1990, high=1994))
    return str(folder)


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    "A whole run on numbers, and its corpus."
    os.environ["LLMECO_RUNS"] = str(tmp_path_factory.getbasetemp() / "runs")
    corpus = numbers(tmp_path_factory.mktemp("rated") / "corpus")
    record = create_record(tmp_path_factory.mktemp("rated") / "r", "frozen")
    fit_frozen(record, corpus, config=SMALL)
    return record, corpus


def test_a_number_is_learned_too(rated):
    m = rated[0].metrics
    assert m["mae_test"] < 0.4 and m["spearman"] > 0.9
    assert m["reopened_agrees"] == 1
    curve = read_json(rated[0].path / "shown.json")["curve"]
    assert [c["labels"] for c in curve] == [10, 20, 40, 80]


@pytest.mark.parametrize("task", ["classes", "number"])
def test_a_packed_bundle_answers_as_the_folder(task, done, corpus, rated, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from llmeco_nb.deployment.bundle import match_checkpoint
    from llmeco_nb.deployment.loading import open_model
    from llmeco_nb.deployment.manifest import verify, write_manifest
    from llmeco_nb.deployment.packing import pack_encoder, parity, reference_scores
    from llmeco_nb.evaluation.stacking import StackMember

    record, place = (done, corpus) if task == "classes" else rated
    folder = record.artifact("classifier")
    schema = load_schema(folder)
    rows = read_split(place, "validation")
    texts = ["a", *rows.text.tolist(), "the film was great " * 40]
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write_manifest(bundle, pack_encoder(folder, bundle, "frozen", schema))
    assert {f.name for f in bundle.iterdir()} == {"model.onnx", "tokenizer.json", "manifest.json"}
    facts = verify(bundle)
    assert (facts.kind, facts.max_length, facts.head_fraction) == ("onnx", 24, 0.25)
    original = reference_scores(folder, texts, schema)
    same = parity(original, open_model(bundle, facts).scores(texts), 1e-4, schema)
    assert same.equal == len(texts)
    table = tmp_path / "table"
    table.mkdir()
    (table / "predictions.parquet").write_bytes(record.artifact("predictions").read_bytes())
    row = StackMember("onnx", "frozen", "frozen", record.metrics["labels"])
    some = rows.text.tolist()[:16], rows.id.tolist()[:16]
    found = match_checkpoint(row, [str(folder)], table, *some, load_schema(place))
    assert found == str(folder)


def test_its_row_says_tokens_and_that_nothing_was_trained(done, corpus, tmp_path):
    from llmeco_nb.evaluation.comparison import EvaluationConfig, evaluate_models

    record = create_record(tmp_path / "e", "evaluate")
    config = EvaluationConfig(num_labeled=[0], learning_curve=[], models=["majority", "nbsvm"])
    evaluate_models(record, corpus, [str(done.artifact("predictions"))], config)
    rows = read_json(record.artifact("table") / "table.json")["rows"]
    row = next(r for r in rows if r["model"] == "frozen")
    assert row["title"] == "frozen (frozen encoder, 24 tokens)" and row["labels"] == 120
    assert row["parameters"] == done.metrics["parameters"]
    assert row["title"] in (record.path / "summary.txt").read_text()


def test_its_title_says_what_minutes_have_cut_off(corpus, tmp_path, monkeypatch):
    plan = frozen.frozen_plan
    monkeypatch.setattr(frozen, "frozen_plan", lambda *a: plan(*a) | dict(max_length=12))
    record = create_record(tmp_path / "r", "frozen")
    fit_frozen(record, corpus, config=SMALL)
    assert record.metrics["title"] == "frozen (frozen encoder, 12 of 24 tokens)"


def test_a_round_refits_the_layer(done, corpus, tmp_path):
    "Of a champion that is a frozen encoder; without its folder the round says so."
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from llmeco_nb.deployment.manifest import Origin, write_manifest
    from llmeco_nb.deployment.packing import pack_encoder
    from llmeco_nb.interaction.improve import improve, refit_frozen, small_feedback

    folder = done.artifact("classifier")
    champion = tmp_path / "champion"
    champion.mkdir()
    facts = pack_encoder(folder, champion, "frozen", load_schema(folder))
    origin = Origin(model="frozen", num_labeled=120, artifact=sha256_of(folder))
    write_manifest(champion, replace(facts, origin=origin))
    given = corpus, str(champion)
    feedback = str(small_feedback(corpus))
    record = create_record(tmp_path / "round", "improve")
    improve(record, *given, [str(folder)], feedback)
    assert record.metrics["corrections"] == 12 and record.metrics["candidates"] == 1
    history = read_json(record.artifact("history.json"))
    assert history[0]["candidates"][0]["corrected_after"] > 0.7
    with pytest.raises(MissingError, match="Run the stage bundle again"):
        improve(create_record(tmp_path / "no", "improve"), *given, [], feedback)
    wrong = pd.DataFrame(dict(text=["new"], label=[7]))
    with pytest.raises(DataError, match=r"`label` of the corrections holds 7 .*from 0 to 2"):
        refit_frozen(record, folder, corpus, wrong, tmp_path / "at")


def test_bad_input_is_named(corpus, tmp_path):
    def fit(config=SMALL, corpus=corpus, encoder=""):
        return fit_frozen(create_record(tmp_path / "r", "frozen"), corpus, encoder, config)

    with pytest.raises(MissingError, match="no encoder in nowhere"):
        fit(SMALL.replace(weights="nowhere"))
    with pytest.raises(DataError, match="does not hold an encoder"):
        fit(encoder=corpus)
    with pytest.raises(UsageError, match="max_length is 513.*from 2 to 512"):
        fit(SMALL.replace(max_length=513))
    said = exclusion_of(fit(SMALL.replace(minutes=1e-6)))
    assert "minutes is 1e-06; reading 105 validation" in said and "Give more" in said
    with pytest.raises(DataError, match="no validation texts"):
        fit(corpus=made(tmp_path / "unvalidated", validation=0))
    rows = read_split(corpus, "train")
    write_corpus(
        tmp_path / "single", dict.fromkeys(("train", "validation", "test"), rows), CLASSES[:1], {}
    )
    with pytest.raises(DataError, match="has 1 classes"):
        fit(corpus=str(tmp_path / "single"))


def test_an_encoder_that_cannot_read_the_texts_is_left_out(corpus, tmp_path):
    parts = {s: read_split(corpus, s).assign(text="กระเป๋าสวยมาก") for s in ("train", "validation")}
    write_corpus(tmp_path / "thai", parts | dict(test=parts["validation"]), CLASSES, {})
    record = create_record(tmp_path / "r", "frozen")
    encoder = str(small_random_encoder(corpus))
    folder = fit_frozen(record, str(tmp_path / "thai"), encoder, SMALL)
    assert record.metrics["left_out"] and record.metrics["unknown_characters"] > 0.9
    assert exclusion_of(folder).startswith("frozen is left out: its tokenizer does not know ")


def test_an_encoder_that_also_writes_is_refused(corpus, tmp_path):
    from transformers import AutoTokenizer, T5Config, T5Model

    sizes = dict(vocab_size=1500, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5Model(T5Config(**sizes)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(small_random_encoder(corpus)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="T5Model, which reads and writes"):
        open_encoder(str(tmp_path), 24, 25, "cpu")
