"""Contrastive tuning: losses against sums by hand and numerical gradients, pairs as a function of
seed and step, a tuning that is killed, bad input, and a tuned folder that is packed and read."""

import contextlib
import io
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmeco_nb.core import DataError, UsageError, create_record, sha256_of
from llmeco_nb.data.corpus import write_corpus
from llmeco_nb.finetuning.checkpoints import small_random_encoder
from llmeco_nb.finetuning.contrastive import (
    contrastive_step,
    pair_losses,
    ranking_losses,
    text_vectors,
    two_way_ranking_losses,
)
from llmeco_nb.finetuning.contrastive_pairs import (
    class_mean_accuracy,
    contrastive_batches,
    numbered_pair,
    retrieval_map,
    text_pairs,
)
from llmeco_nb.finetuning.embedding_tuning import EmbeddingTuningConfig, tune_embeddings
from llmeco_nb.finetuning.embeddings import mean_pool, open_encoder
from llmeco_nb.finetuning.few_shot import cross_validated_head, first_of_each_class
from llmeco_nb.tasks.text_classification import ClassificationSchema

FEW = EmbeddingTuningConfig(
    steps=6, batch_size=4, num_evals=2, max_length=16, precision="fp32", eval_examples=24
)


def quietly(work, *arguments, **named):
    with contextlib.redirect_stdout(io.StringIO()):
        return work(*arguments, **named)


def corpus_at(folder, train, validation=(), test=()):
    "A corpus of (text, label) pairs in two classes."
    parts = {}
    for split, rows in dict(train=train, validation=validation, test=test).items():
        table = pd.DataFrame(list(rows), columns=["text", "label"])
        table.insert(0, "id", [f"{split}-{i}" for i in range(len(table))])
        parts[split] = table.astype(dict(id=str, text=str, label=int))
    names = ["lost", "stolen"]
    write_corpus(folder, parts, names, {}, ClassificationSchema(labels=tuple(names)))
    return str(folder)


@pytest.fixture(scope="module")
def cards(tmp_path_factory) -> str:
    "Texts that one word tells apart, and many that do not."
    rng = np.random.default_rng(0)
    words = "the of film a was and it great story one very that movie is in".split()

    def texts(n):
        return [
            (
                " ".join(
                    [*rng.choice(words, 6), "good" if k % 2 else "bad", *rng.choice(words, 3)]
                ),
                k % 2,
            )
            for k in range(n)
        ]

    return corpus_at(tmp_path_factory.mktemp("cards") / "corpus", texts(40), texts(24), texts(40))


@pytest.fixture(scope="module")
def encoder(cards) -> str:
    return str(small_random_encoder(cards))


# -- losses


def by_hand(a, p, labels, temperature):
    "Plain loops over plain numbers."
    cosine = lambda x, y: sum(i * j for i, j in zip(x, y)) / (math.hypot(*x) * math.hypot(*y))
    found = []
    for i in range(len(a)):
        rivals = [j for j in range(len(p)) if j == i or labels is None or labels[j] != labels[i]]
        scores = [cosine(a[i], p[j]) / temperature for j in rivals]
        found.append(math.log(sum(map(math.exp, scores))) - cosine(a[i], p[i]) / temperature)
    return found


@given(st.integers(0, 10**6), st.integers(1, 6), st.booleans(), st.sampled_from([0.05, 0.3, 2.0]))
def test_the_ranking_loss_is_a_sum_by_hand(seed, pairs, masked, temperature):
    rng = np.random.default_rng(seed)
    a, p = rng.normal(size=(2, pairs, 3))
    labels = rng.integers(0, 3, pairs)
    given = torch.tensor(labels) if masked else None
    found = ranking_losses(torch.tensor(a), torch.tensor(p), given, temperature)
    asked = labels if masked else None
    there = by_hand(a.tolist(), p.tolist(), asked, temperature)
    assert np.allclose(found, there, atol=1e-9)
    back = by_hand(p.tolist(), a.tolist(), asked, temperature)
    both = two_way_ranking_losses(torch.tensor(a), torch.tensor(p), given, temperature)
    assert np.allclose(both, (np.array(there) + back) / 2, atol=1e-9)


def test_gradients_are_those_of_differences():
    torch.manual_seed(1)
    u, v = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.tensor([0, 1, 0, 2, 2])
    for loss in (
        lambda a, b: pair_losses(a, b, labels == 0),
        lambda a, b: ranking_losses(a, b, labels, 0.1),
        lambda a, b: two_way_ranking_losses(a, b, None, 0.3),
    ):
        assert torch.autograd.gradcheck(loss, (u, v))


def test_an_unmasked_false_negative_is_pushed_away():
    "Two pairs of one label: without the mask each is the other's negative."
    a = torch.tensor([[1.0, 0.2], [1.0, -0.2]], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([[1.0, 0.1], [1.0, -0.1]], dtype=torch.float64)
    [slope] = torch.autograd.grad(ranking_losses(a, p, None, 0.1).sum(), a)
    turn = -slope[0, 1]  # the first anchor turns away from the second positive, which lies below
    assert turn > 0.1
    masked = ranking_losses(a, p, torch.tensor([4, 4]), 0.1)
    assert masked.tolist() == [0, 0] and not torch.autograd.grad(masked.sum(), a)[0].any()


def test_parts_change_no_vector(encoder):
    reader = open_encoder(encoder, 32, 100, "cpu")
    texts = ["a film", "ok", "a very long and tedious film that nobody saw", "so good", "bad"]
    rows, _ = reader.tokens(texts)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    mask = torch.tensor([[k < len(r) for k in range(ids.shape[1])] for r in rows]).long()
    alone = [mean_pool(reader.model(torch.tensor([r])).last_hidden_state) for r in rows]
    for parts in (1, 2, 9):
        found = text_vectors(reader.model, ids, mask, parts)
        assert torch.allclose(found, torch.cat(alone), atol=1e-5)


# -- pairs


@given(st.integers(0, 2**40))
def test_a_pairs_number_can_be_computed_back(number):
    i, j = numbered_pair(number)
    assert 0 <= i < j and j * (j - 1) // 2 + i == number


@given(st.lists(st.integers(2, 6), min_size=2, max_size=5), st.data())
def test_pairs_of_a_batch_are_of_one_class_and_none_twice(sizes, data):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    there_are = sum(n * (n - 1) // 2 for n in sizes)
    batch = data.draw(st.integers(1, there_are))
    step = data.draw(st.integers(0, 10**6))
    pairs = text_pairs(["x"] * len(labels), labels, [str(c) for c in range(len(sizes))], batch)
    drawn = pairs.positive(batch, step, 3)
    assert (labels[drawn[:, 0]] == labels[drawn[:, 1]]).all()
    assert len({tuple(sorted(p)) for p in drawn.tolist()}) == batch
    assert (drawn == pairs.positive(batch, step, 3)).all()
    classes = labels[drawn[:, 0]]
    assert len(set(classes.tolist())) == min(batch, len(sizes))
    more = pairs.positive(batch + there_are, step, 3)
    assert len(more) == batch + there_are and (labels[more[:, 0]] == labels[more[:, 1]]).all()
    apart = pairs.negative(batch, step, 3)
    assert (labels[apart[:, 0]] != labels[apart[:, 1]]).all()


def test_the_pair_loss_gets_both_kinds(encoder):
    labels = [0, 1, 0, 1, 0, 1]
    pairs = text_pairs(["x"] * 6, labels, ["a", "b"], 4)
    rows = [[2, 5 + k, 3] for k in range(6)]
    batch = contrastive_batches(pairs, rows, 0, "pair", 0)(4, 7)
    assert (batch["labels"][:4] == batch["labels"][4:]).tolist() == [True, True, False, False]
    model = open_encoder(encoder, 16, 100, "cpu").model
    summed, count = contrastive_step("pair", 0.05)(model, batch, lambda loss: loss.backward())
    whole = text_vectors(model, batch["input_ids"], batch["attention_mask"]).double()
    cosine = (whole[:4] * whole[4:]).sum(1)
    assert count == 4
    assert abs(summed - ((cosine - torch.tensor([1, 1, 0, 0])) ** 2).sum()) < 1e-4


def test_the_measures_are_those_of_scikit_learn():
    from sklearn.metrics import average_precision_score
    from sklearn.neighbors import NearestCentroid

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 40)
    vectors = rng.normal(size=(40, 6)) + np.eye(6)[labels]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    theirs = []
    for i in range(40):
        others = np.arange(40) != i
        theirs.append(
            average_precision_score(labels[others] == labels[i], (unit @ unit[i])[others])
        )
    assert np.isclose(retrieval_map(vectors, labels), np.mean(theirs))
    hits = []
    for i in range(40):
        others = np.arange(40) != i
        means = NearestCentroid().fit(unit[others], labels[others]).centroids_
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        hits.append((means @ unit[i]).argmax() == labels[i])
    assert np.isclose(class_mean_accuracy(vectors, labels), np.mean(hits))


# -- the stage


def test_it_learns_and_transformers_and_the_packer_read_what_it_made(cards, encoder, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    record = create_record(tmp_path / "tuned", "tune_embeddings")
    config = FEW.replace(steps=25, batch_size=8)
    folder = quietly(tune_embeddings, record, cards, encoder, config)
    m = record.metrics
    assert m["class_mean_accuracy"] > max(0.85, m["class_mean_accuracy_before"])
    assert m["retrieval_map"] > m["retrieval_map_before"]
    assert (m["pooling"], m["normalise"], m["max_length"]) == ("mean", True, 16)
    assert record.rows()[-1]["step"] == 25

    pytest.importorskip("onnxscript", reason="an encoder is packed with onnxscript")
    from llmeco_nb.deployment.embedding_packing import is_sentence_encoder, pack_sentence_encoder
    from llmeco_nb.deployment.embeddings import SentenceEncoder

    assert is_sentence_encoder(folder)
    facts = pack_sentence_encoder(folder, tmp_path / "bundle")
    assert (facts.schema.pooling, facts.schema.normalise) == ("mean", True)
    assert facts.schema.max_length == 16
    served = SentenceEncoder.load(tmp_path / "bundle")
    texts = ["a good film", "it was a bad story and one very bad movie"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    for text in texts:
        with torch.no_grad():
            hidden = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state
        plain = torch.nn.functional.normalize(hidden[0].mean(0), dim=0).numpy()
        assert np.abs(served.vectors([served.token_ids(text)])[0] - plain).max() < 1e-5


@pytest.mark.parametrize("loss", ["ranking", "pair"])
def test_a_killed_tuning_ends_with_the_same_bytes(loss, cards, encoder, tmp_path, killed_at):
    torch.set_num_threads(1)
    config = FEW.replace(loss=loss, dropout=0.1)

    def tuned(name):
        record = create_record(tmp_path / name, "tune_embeddings")
        quietly(tune_embeddings, record, cards, encoder, config)

    tuned("calm")
    killed_at(4, lambda: tuned("hit"))
    assert not (tmp_path / "hit" / "encoder").exists()
    tuned("hit")
    assert sha256_of(tmp_path / "hit" / "encoder") == sha256_of(tmp_path / "calm" / "encoder")


def test_without_validation_texts_the_last_weights_are_taken(encoder, tmp_path):
    rows = [("good film", 0), ("great film", 0), ("bad film", 1), ("a bad story", 1)]
    corpus = corpus_at(tmp_path / "corpus", rows)
    record = create_record(tmp_path / "tuned", "tune_embeddings")
    quietly(tune_embeddings, record, corpus, encoder, FEW.replace(steps=2, batch_size=2))
    m = record.metrics
    assert m["best_validation"] is None and m["retrieval_map"] is None and m["steps"] == 2


def test_minutes_become_steps(cards, encoder, tmp_path):
    record = create_record(tmp_path / "tuned", "tune_embeddings")
    config = FEW.replace(minutes=0.1, steps=100_000, num_evals=1)
    quietly(tune_embeddings, record, cards, encoder, config)
    assert 10 <= record.metrics["steps"] < 1000


GOOD = [("good film", 0), ("great film", 0), ("bad film", 1), ("a bad story", 1)]
BAD = {
    "one class": ([(t, 0) for t, _ in GOOD], {}, DataError, "one class, lost: there is nothing"),
    "one text": (GOOD[:3], {}, DataError, "The class stolen has one training text"),
    "empty": ([*GOOD, ("  ", 1)], {}, DataError, "is empty, and nothing can be near"),
    "pairs": (GOOD, dict(batch_size=3), UsageError, "batch_size is 3, and the 4 training texts"),
    "length": (GOOD, dict(max_length=512), UsageError, "one place is padding"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_its_message(case, encoder, tmp_path):
    rows, options, error, about = BAD[case]
    corpus = corpus_at(tmp_path / "corpus", rows)
    record = create_record(tmp_path / "tuned", "tune_embeddings")
    config = FEW.replace(**{"batch_size": 2, **options})
    with pytest.raises(error, match=about):
        quietly(tune_embeddings, record, corpus, encoder, config)
    assert not record.artifact("encoder").exists()


def test_numbers_are_no_classes(encoder, tmp_path):
    from llmeco_nb.tasks.regression import RegressionSchema

    table = pd.DataFrame(dict(id=["a", "b"], text=["x", "y"], target=[0.5, 1.5]))
    write_corpus(tmp_path / "c", dict(train=table), [], {}, RegressionSchema(low=0.5, high=1.5))
    record = create_record(tmp_path / "tuned", "tune_embeddings")
    with pytest.raises(UsageError, match="texts with one class each"):
        tune_embeddings(record, str(tmp_path / "c"), encoder, FEW)


# -- a few texts a class


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_subsets_hold_the_smaller_ones(seed, count):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(3), 5))
    small, large = (set(first_of_each_class(labels, n).tolist()) for n in (count, count + 1))
    assert small < large and len(large) == 3 * (count + 1)


def test_the_strength_is_chosen_on_the_texts_themselves():
    "Clear classes want little regularisation, and noise wants much."
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(3), 8)
    clear = np.eye(3)[labels] + 0.05 * rng.normal(size=(24, 3))
    noise = rng.normal(size=(24, 40))
    loose, tight = (cross_validated_head(x, labels, 3) for x in (clear, noise))
    assert loose.C > tight.C == 0.3
    assert (loose.head.outputs(clear.astype(np.float32)).argmax(1) == labels).all()
