"""Denoising: holes are pure and lose nothing, distances are the textbook's, a killed run ends with
the same bytes, plain transformers opens what it leaves, and what can be filled in is filled in."""

import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
import llmeco_nb.pretraining.span_corruption
import llmeco_nb.training.plan
from llmeco_nb.core import (
    DataError,
    UsageError,
    create_record,
    open_record,
    read_json,
    sha256_of,
)
from llmeco_nb.data.corpus import read_split, write_corpus
from llmeco_nb.models.conversion import from_stock
from llmeco_nb.models.ngram import Ngram
from llmeco_nb.models.transformer import Seq2Seq, TransformerConfig
from llmeco_nb.pretraining.denoising import (
    DenoisingConfig,
    denoise,
    masks_to_sentinels,
    save_seq2seq,
)
from llmeco_nb.pretraining.denoising_eval import (
    apply_baseline,
    best_baseline,
    bigram_baselines,
    copy_baseline_nats,
    copy_baselines,
    denoise_texts,
    edit_distances,
    generate_spans,
    most_frequent_successors,
    ngram_nats,
    validation_scores,
)
from llmeco_nb.pretraining.embedding_init import (
    document_ppmi_embeddings,
    unigram_log_probs,
    window_ppmi_embeddings,
)
from llmeco_nb.pretraining.masking import SEP, group_texts
from llmeco_nb.pretraining.seq2seq import (
    denoise_loss,
    denoise_loss_step,
    fit_bigram_embeddings,
    neighbour_ppmi_embeddings,
    new_seq2seq,
    target_log_probs,
    token_log_probs,
)
from llmeco_nb.pretraining.span_corruption import (
    SpanCorruption,
    corrupt_spans,
    denoise_batch,
    denoise_batches,
    restore_spans,
    sample_spans,
    span_counts,
)
from llmeco_nb.tokenization.wordpiece import (
    TokenizerConfig,
    build_tokenizer,
    encode_texts,
    open_tokenizer,
)
from llmeco_nb.training.plan import LR_CANDIDATES

QUICK = dict(
    size="1x32",
    seq_len=32,
    max_position_embeddings=48,
    steps=12,
    batch_size=4,
    eval_examples=4,
    num_evals=3,
    final_eval_examples=8,
    prompts=["anna [MASK] the film ."],
)
V = 120


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Texts in which each person always does the same with the same, so that a hole can be filled
    from either side; and their tokenizer."""
    torch.set_num_threads(1)
    folder, r = tmp_path_factory.mktemp("inputs"), random.Random(0)
    names, did, things = (
        ["anna", "boris", "clara", "david", "emma", "felix"],
        ["saw", "liked", "left", "made", "sold", "cut"],
        ["film", "plot", "cast", "song", "book", "play"],
    )

    def said():
        found = [r.randrange(6) for _ in range(r.randint(10, 16))]
        return " ".join(f"{names[k]} {did[k]} the {things[k]} ." for k in found)

    parts = {
        s: pd.DataFrame(
            {
                "id": [f"{s}{i}" for i in range(n)],
                "text": [said() for _ in range(n)],
                "label": [0] * n,
            }
        )
        for s, n in (("train", 80), ("validation", 150), ("test", 2))
    }
    write_corpus(folder / "corpus", parts, [], {})
    return folder / "corpus", build_tokenizer(
        create_record(folder / "t", "tokenizer"), folder / "corpus", TokenizerConfig(vocab_size=V)
    )


@pytest.fixture(scope="module")
def rows(inputs):
    return group_texts(
        encode_texts(open_tokenizer(inputs[1]), read_split(inputs[0], "train").text), 32
    )


@pytest.fixture(scope="module")
def first(inputs):
    return open_tokenizer(inputs[1]).get_vocab_size()


# -- holes

sizes = st.tuples(st.integers(8, 90), st.floats(0.05, 0.6), st.floats(1, 9))


def room(length, share, mean):
    try:
        return span_counts(length, share, mean)
    except UsageError:
        return None


@settings(max_examples=120, deadline=None)
@given(sizes, st.integers(0, 2**40), st.integers(0, 2**20), st.sampled_from(["spans", "text"]))
def test_nothing_is_lost(size, seed, index, answer):
    "What is read and what is to be written give back the row, and neither says the same twice."
    if (found := room(*size)) is None:
        return
    (length, share, mean), (_, holes) = size, found
    row = np.random.default_rng(seed).integers(5, 50, length).astype(np.int32)
    where = sample_spans(length, (seed, 0, index), share, mean)
    np.random.seed(index % 1000)  # whatever the process' own generator does
    assert (where == sample_spans(length, (seed, 0, index), share, mean)).all()
    assert (
        where.shape == (holes, 2)
        and np.diff(where, axis=1).min() >= 1
        and where.min() >= 1
        and where.max() < length
        and (where[1:, 0] > where[:-1, 1]).all()
    )
    seen, written, targets, cut = corrupt_spans(row, where, 50, answer)
    assert (
        (restore_spans(seen, targets, 50, answer) == row).all()
        and (written[1:] == targets[:-1]).all()
        and cut.sum() == np.diff(where, axis=1).sum()
    )
    assert (
        sorted(np.r_[seen[seen < 50], targets[cut]]) == sorted(row) and (seen >= 50).sum() == holes
    )
    assert targets[cut].tolist() == np.concatenate([row[a:b] for a, b in where]).tolist()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 59), max_size=40))
def test_any_answer_can_be_restored(said):
    "Whatever a model writes: what was visible stays, in order, and no mark is left."
    row = np.arange(5, 37, dtype=np.int32)
    seen = corrupt_spans(row, sample_spans(32, (0, 0, 0), 0.3, 3.0), 50)[0]
    back = restore_spans(seen, np.array(said, dtype=np.int64), 50)
    assert (back < 50).all()
    left = iter(back.tolist())
    assert all(t in left for t in seen[seen < 50].tolist())


def test_holes_are_as_large_as_asked_on_average_wherever_they_stand():
    many = np.diff([sample_spans(64, (1, 0, i), 0.3, 3.0) for i in range(3000)], axis=2)[..., 0]
    assert (
        np.abs(many.mean(0) - 3).max() < 0.25 and np.abs((many == 1).mean(0) - 1 / 3).max() < 0.04
    )  # every one geometric, the last like the first


def test_holes_differ_by_epoch_row_and_seed():
    keys = [(s, e, i) for s in range(3) for e in range(3) for i in range(3)]
    assert len({sample_spans(64, k, 0.3, 3.0).tobytes() for k in keys}) == len(keys)


def test_batches_are_pure_across_epochs(rows, first):
    batches, fresh, edge = (
        denoise_batches(rows, 7, SpanCorruption(first, seed=3)),
        denoise_batches(rows.copy(), 7, SpanCorruption(first, seed=3)),
        len(rows) // 7,
    )
    expected = {i: batches(i) for i in (0, edge, 500)}
    for i in (500, edge, 0):
        assert all(fresh(i)[k].equal(expected[i][k]) for k in expected[i])
    one, two = (denoise_batch(rows, [4], [e], SpanCorruption(first, seed=3)) for e in (0, 1))
    assert not one["input_ids"].equal(two["input_ids"])


def test_what_is_cut_out_is_not_read(rows, first):
    b = denoise_batch(rows, [0, 1], [0, 0], SpanCorruption(first))
    other = rows.copy()
    for i in (0, 1):
        for a, z in sample_spans(32, (0, 0, i), 0.3, 3.0):
            other[i, a:z] = 9
    c = denoise_batch(other, [0, 1], [0, 0], SpanCorruption(first))
    assert (
        b["input_ids"].equal(c["input_ids"])
        and not b["targets"].equal(c["targets"])
        and (c["targets"][c["cut"]] == 9).all()
    )


# -- loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def shaken(model, spread=0.1):
    "Every weight, norm and bias moved a little, so that no part hides behind a one or a zero."
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * spread)
    return model


def test_what_is_masked_counts_nothing(rows, first):
    """Targets of -100, padding in what is read, the parts a loss is made in, and how rows are
    batched change neither loss nor gradient."""
    model = shaken(new_seq2seq(rows, SpanCorruption(first), "1x32", 48))
    asked = lambda b: (b["input_ids"], b["written"], b["targets"], b["attention_mask"])
    b, alone = (
        denoise_batch(rows, range(4), [0] * 4, SpanCorruption(first)),
        [denoise_batch(rows, [i], [0], SpanCorruption(first)) for i in range(4)],
    )
    assert (
        (b["attention_mask"] == 0).any()
        and (b["targets"] == -100).any()
        and all(a["attention_mask"].all() and (a["targets"] != -100).all() for a in alone)
    )
    plain = sum(
        torch.nn.functional.cross_entropy(
            Seq2Seq.forward(model, a["input_ids"], a["written"]).flatten(0, 1),
            a["targets"].flatten(),
            reduction="sum",
        )
        for a in alone
    )
    ours = denoise_loss(model, *asked(b))
    whole = gradients(model, ours)
    assert abs(ours - plain) / plain < 1e-6
    near = lambda other: (other - whole).norm() / whole.norm() < 1e-6
    assert near(gradients(model, plain))
    assert near(
        gradients(model, denoise_loss(model, *asked(b), max_logits=7 * model.config.vocab_size))
    )
    padded, keep = (
        torch.cat([b["input_ids"], torch.randint(5, 20, (4, 5))], 1),
        torch.cat([b["attention_mask"], torch.zeros(4, 5, dtype=torch.long)], 1),
    )
    more = torch.cat([b["written"], torch.randint(5, 20, (4, 3))], 1)
    assert near(
        gradients(
            model,
            denoise_loss(
                model, padded, more, torch.cat([b["targets"], torch.full((4, 3), -100)], 1), keep
            ),
        )
    )
    assert not near(
        gradients(model, denoise_loss(model, padded, b["written"], b["targets"]))
    )  # without `attention_mask` the padding is read
    loss, n = denoise_loss_step(
        model, b | dict(targets=b["targets"].masked_fill(b["cut"], -100)), lambda loss: None
    )
    assert n == (~b["cut"] & (b["targets"] != -100)).sum() and loss < ours
    in_parts, n = denoise_loss_step(model, b, lambda loss: None, parts=3)
    assert n == (b["targets"] != -100).sum() and abs(in_parts - ours) / ours < 1e-6


def test_held_answers_do_not_depend_on_the_batch(rows, first):
    model = shaken(new_seq2seq(rows, SpanCorruption(first), "1x32", 48)).eval()
    for answer in ("spans", "text"):
        one, two = (
            validation_scores(model, rows[:11], SpanCorruption(first, target=answer), batch)
            for batch in (3, 11)
        )
        assert (
            np.allclose(one, two, atol=1e-3)
            and (
                one[:, 2]
                == [np.diff(sample_spans(32, (0, 0, i), 0.3, 3.0)).sum() for i in range(11)]
            ).all()
            and (one[:, 0] > 0).all()
        )


# -- what is counted before the first step


def test_counted_neighbours_are_the_singular_vectors_of_what_follows_what():
    """With as many columns as there are tokens, after · before gives back the direction of each row
    of the table; by another way, numpy's own decomposition."""
    draw = np.random.default_rng(0)
    table = np.array(
        [[2, *draw.choice(np.arange(5, 13), 40, p=np.arange(1, 9) / 36), 3] for _ in range(200)]
    )
    table[:, 3::7], table[:, 4::7] = 6, 9  # something that follows something
    e = neighbour_ppmi_embeddings(table, 13, 16)
    met = np.zeros((13, 13))
    np.add.at(met, (table[:, 1:-2], table[:, 2:-1]), 1)
    share, p = (
        np.bincount(table[:, 1:-1].ravel(), minlength=13) / table.size,
        met.sum(0) / met.sum(),
    )  # special tokens are part of a row
    with np.errstate(all="ignore"):
        surprising = np.log(np.nan_to_num(met / met.sum(1, keepdims=True) / p).clip(1))
    core = (np.sqrt(share)[:, None] * surprising * np.sqrt(share))[5:, 5:]
    left, values, right = np.linalg.svd(core)
    expected = [
        half / np.linalg.norm(half, axis=1, keepdims=True)
        for half in (left * np.sqrt(values), right.T * np.sqrt(values))
    ]
    for half, ours in zip(expected, (e[5:, :8], e[5:, 8:])):
        assert np.allclose(half @ half.T, ours @ ours.T, atol=1e-3)  # signs are free
    assert (
        np.allclose(expected[0] @ expected[1].T, e[5:, :8] @ e[5:, 8:].T, atol=1e-3)
        and (e[:5] == 0).all()
    )
    assert (e[6, :8] @ e[5:, 8:].T).argmax() == 9 - 5


def test_the_fit_comes_near_the_counted_probabilities(rows, first):
    """With vectors wide enough and passes enough, the softmax gives back p(b | a) of every token
    that has a successor; the same arguments, the same bits."""
    after, before = fit_bigram_embeddings(rows, first, 96, passes=120)
    met = np.zeros((first, first))
    np.add.at(met, (rows[:, 1:-2], rows[:, 2:-1]), 1)
    logits = np.sqrt(96) * after @ before.T + token_log_probs(rows, first)
    ours = np.exp(logits - logits.max(1, keepdims=True))
    ours, often = ours / ours.sum(1, keepdims=True), met.sum(1) >= 20
    assert np.abs(ours[often] - met[often] / met[often].sum(1, keepdims=True)).sum(1).mean() < 0.1
    assert np.allclose(np.linalg.norm(after[often], axis=1), 1, atol=1e-5)
    assert all(
        (a == b).all()
        for a, b in zip(
            fit_bigram_embeddings(rows, first, 32), fit_bigram_embeddings(rows.copy(), first, 32)
        )
    )


@pytest.mark.parametrize("token", [12, -1])
def test_ids_outside_the_vocabulary_are_refused(token):
    toy = np.array([[2, 7, 8, 9, 7, 8, 3], [2, 8, token, 7, 9, 9, 3]] * 20)
    for count in (
        most_frequent_successors,
        copy_baselines,
        token_log_probs,
        unigram_log_probs,
        lambda ids, size: target_log_probs(ids, SpanCorruption(size)),
        lambda ids, size: neighbour_ppmi_embeddings(ids, size, 8),
        lambda ids, size: fit_bigram_embeddings(ids, size, 8, passes=1),
        lambda ids, size: window_ppmi_embeddings(ids, size, 8),
        lambda ids, size: document_ppmi_embeddings(list(ids), size, 8),
    ):
        with pytest.raises(DataError, match=f"hold the token {token},.* from 0 to 11"):
            count(toy, 12)
    assert len(unigram_log_probs(toy.clip(0), 13)) == len(token_log_probs(toy.clip(0), 13)) == 13


def test_a_new_network_goes_on_from_the_token_before(rows, first, inputs):
    """Before its first step it already finds unseen hidden tokens less surprising than their
    frequencies do, and the parts that only training can fill add nothing."""
    model = new_seq2seq(rows, SpanCorruption(first), "2x64", 48).eval()
    held = group_texts(
        encode_texts(open_tokenizer(inputs[1]), read_split(inputs[0], "validation").text), 32
    )[:30]
    nats, _, hidden, *_ = validation_scores(model, held, SpanCorruption(first)).sum(0)
    guess = copy_baseline_nats(
        held,
        [sample_spans(32, (0, 0, i), 0.3, 3.0) for i in range(len(held))],
        token_log_probs(rows, first),
        [0],
    ).sum()
    assert nats < guess - 0.5 * hidden
    seen = denoise_batch(rows, [0], [0], SpanCorruption(first))["input_ids"]
    with torch.no_grad():
        assert torch.allclose(
            model.encode(seen), model.encoder.norm(model.encoder_embeddings(seen)), atol=1e-5
        )
    with pytest.raises(UsageError, match="embedding_init is 'warm'"):
        new_seq2seq(rows, SpanCorruption(first), "2x64", 48, "warm")


# -- copying


def slowly(a, b):
    d = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, d[0] = d[:], i
        for j, y in enumerate(b, 1):
            d[j] = min(above[j] + 1, d[j - 1] + 1, above[j - 1] + (x != y))
    return d[-1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8)),
        min_size=1,
        max_size=6,
    )
)
def test_edit_distance_is_the_textbook_s(pairs):
    assert edit_distances([a for a, _ in pairs], [b for _, b in pairs]).tolist() == [
        slowly(a, b) for a, b in pairs
    ]


def test_copying_is_a_distribution_and_the_best_way_is_found(rows, first):
    logp, where = token_log_probs(rows, first), sample_spans(32, (0, 0, 0), 0.3, 3.0)

    def nats(token):
        row = rows[0].copy()
        row[where[0][0]] = token
        return copy_baseline_nats(row[None], [where], logp, [0.2])[0, 0]

    visible = [int(t) for t in corrupt_spans(rows[0], where, first)[0][1:-1] if t < first]
    seven = 0.2 * visible.count(7) / len(visible) + 0.8 * np.exp(
        logp[7]
    )  # by hand; the other hidden tokens cancel out below
    assert (
        abs(sum(np.exp(nats(7) - nats(t)) for t in range(first)) * seven - 1) < 1e-6
    )  # the probabilities of what may stand there add up to one
    broken, follower = (
        [
            corrupt_spans(r, sample_spans(32, (0, 0, i), 0.3, 3.0), first)[0]
            for i, r in enumerate(rows)
        ],
        most_frequent_successors(rows, first),
    )
    cost = lambda way: edit_distances(
        [apply_baseline(b, way, follower, first) for b in broken], list(rows)
    ).sum()
    ways = copy_baselines(rows, first) | bigram_baselines
    name, way = best_baseline(ways, rows, follower, SpanCorruption(first), tried=10**6)
    assert (
        cost(way)
        == min(map(cost, ways.values()))
        < cost(("fixed", ()))
        == sum(np.diff(sample_spans(32, (0, 0, i), 0.3, 3.0)).sum() for i in range(len(rows)))
    )
    assert (
        ways[name] == way and way[0] == "after"
    )  # in this language the next word is nearly certain
    ngram = Ngram([r[1:-1] for r in rows], first, 3, SEP)
    assert ngram_nats(
        ngram, rows[:5], [sample_spans(32, (0, 0, i), 0.3, 3.0) for i in range(5)]
    ).shape == (5,)


# -- the stage


def what_stays(folder):
    record = open_record(folder, "denoise")
    rows = [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in record.rows()
    ]
    timed = ("seconds", "tokens_per_s", "forecast_seconds")
    return (
        sha256_of(record.artifact("writer")),
        rows,
        {k: v for k, v in record.metrics.items() if k not in timed},
        read_json(record.path / "held.json"),
        read_json(record.path / "examples.json"),
    )


@pytest.mark.parametrize("answer", ["spans", "text"])
def test_killed_it_ends_with_the_same_bytes(inputs, tmp_path, killed_at, answer):
    denoise(
        create_record(tmp_path / "calm", "denoise"),
        *inputs,
        DenoisingConfig(**QUICK, target=answer),
    )
    for at in (1, 7) if answer == "spans" else (7,):
        killed_at(
            at,
            lambda: denoise(
                create_record(tmp_path / "run", "denoise"),
                *inputs,
                DenoisingConfig(**QUICK, target=answer),
            ),
        )
    denoise(
        create_record(tmp_path / "run", "denoise"), *inputs, DenoisingConfig(**QUICK, target=answer)
    )
    assert what_stays(tmp_path / "run") == what_stays(tmp_path / "calm")


def test_plain_transformers_opens_it_with_the_same_logits_and_writes_the_same(
    rows, first, inputs, tmp_path
):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = new_seq2seq(rows, SpanCorruption(first, seed=4), "2x32", 48)
    shaken(model)
    save_seq2seq(model.eval(), inputs[1], tmp_path / "writer")
    plain, words = (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "writer").eval(),
        AutoTokenizer.from_pretrained(tmp_path / "writer"),
    )
    b = denoise_batch(rows, range(5), [0] * 5, SpanCorruption(first))
    with torch.no_grad():
        assert (
            plain(input_ids=b["input_ids"], decoder_input_ids=b["written"]).logits
            - model(b["input_ids"], b["written"])
        ).abs().max() < 1e-5
        assert (
            from_stock(plain)(b["input_ids"], b["written"]) - model(b["input_ids"], b["written"])
        ).abs().max() < 1e-5
    assert (
        type(plain).__name__ == "MBartForConditionalGeneration"
        and len(words) == plain.config.vocab_size == model.config.vocab_size
    )
    assert words("anna <extra_id_0> the film", add_special_tokens=False).input_ids[
        1
    ] == first and words.decode(rows[0], skip_special_tokens=True) == open_tokenizer(
        inputs[1]
    ).decode(rows[0].tolist())
    strange = Seq2Seq(TransformerConfig(first + 4, 32, position_embedding="sinusoidal", norm="pre"))
    with pytest.raises(UsageError, match="position_embedding='sinusoidal'"):
        save_seq2seq(strange, inputs[1], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_can_be_filled_in_is_filled_in(inputs, tmp_path):
    """A network that reads to both sides beats the copier, and the counter who goes on from the
    left neighbour, beyond the interval."""
    from llmeco_nb.stats.significance import compare

    denoise(
        create_record(tmp_path / "run", "denoise"),
        *inputs,
        DenoisingConfig(
            size="1x64",
            seq_len=32,
            max_position_embeddings=48,
            steps=300,
            batch_size=16,
            lr=5e-3,
            muon_lr=1e-2,
            eval_examples=10,
            num_evals=2,
            final_eval_examples=300,
        ),
    )
    held, n = (
        pd.DataFrame(read_json(tmp_path / "run" / "held.json")),
        open_record(tmp_path / "run", "denoise").metrics,
    )
    assert len(held) == 300
    for a, b in (("copy_edits", "edits"), ("counter_edits", "edits"), ("copy_bits", "bits")):
        assert compare(held[a], held[b]).interval.low > 0
    assert n["edits"] < n["counter_edits"] < n["copy_edits"] < 1 and n["hidden_accuracy"] > 0.5


def test_answers_fill_every_hole_in_order(rows, first):
    "Even a network that knows nothing writes a hole after the other, and ends."
    model = new_seq2seq(rows, SpanCorruption(first), "1x32", 48).eval()
    said = generate_spans(
        model,
        denoise_batch(rows, range(6), [0] * 6, SpanCorruption(first))["input_ids"],
        first,
        40,
        3.0,
    )
    for answer in said.tolist():
        marks = [t - first for t in answer if t >= first]
        assert (
            marks[:3] == [1, 2, 3][: len(marks[:3])]
            and set(marks[3:]) <= {3}
            and (not marks or answer[0] < first)
        )
    texts = [
        masks_to_sentinels([2, 7, 4, 8, 4, 3], first, 3),
        masks_to_sentinels([2, 7, 4, 8, 9, 3], first, 3),
        masks_to_sentinels([2, 4, 3], first, 3),
    ]
    for text, back in zip(texts, denoise_texts(model, texts, SpanCorruption(first), 20)):
        assert back[0] == 2 and back[-1] == 3 and (back < first).all() and len(back) >= len(text)


def test_what_is_not_given_is_probed_and_what_it_costs_is_foretold(inputs, tmp_path, capsys):
    denoise(
        create_record(tmp_path / "run", "denoise"),
        *inputs,
        DenoisingConfig(**QUICK | dict(lr=None, steps=6, num_evals=1)),
    )
    n, told = (
        open_record(tmp_path / "run", "denoise").metrics,
        read_json(tmp_path / "run" / "forecast.json"),
    )
    assert (
        n["batch"] == 4
        and n["lr"] in LR_CANDIDATES
        and told["came"]["steps"] == 6
        # of one MiB; in float32 the forecast is on the safe side
        and -0.15 < n["peak_mib"] / n["forecast_mib"] - 1 < 0.1
    )
    printed = capsys.readouterr().out
    assert all(line in printed for line in told["says"]) and f"learning rate {n['lr']:g}" in printed


def test_a_batch_that_cannot_fit_is_refused_before_it_is_made(inputs, tmp_path, monkeypatch):
    made, batch = [], llmeco_nb.pretraining.span_corruption.denoise_batch
    monkeypatch.setattr(
        llmeco_nb.pretraining.span_corruption,
        "denoise_batch",
        lambda rows, which, *more: made.append(len(which)) or batch(rows, which, *more),
    )
    monkeypatch.setattr(
        llmeco_nb.training.plan,
        "memory_budget",
        lambda model, optimiser: (2**24, "set for this test"),
    )
    with pytest.raises(UsageError, match="batch of 4096 rows.*largest batch that fits is"):
        denoise(
            create_record(tmp_path / "run", "denoise"),
            *inputs,
            DenoisingConfig(**QUICK | dict(batch_size=4096)),
        )
    assert max(made) <= 64


def test_refusals(inputs, tmp_path):
    corpus, tokenizer = inputs
    for words, more in (
        ("noise_density is 1", dict(noise_density=1.0)),
        ("mean_span_length is 0.5", dict(mean_span_length=0.5)),
        ("too few between them", dict(noise_density=0.9, mean_span_length=1.0)),
        ("max_position_embeddings 16", dict(max_position_embeddings=16)),
        ("target is 'half'", dict(target="half")),
        ("embedding_init is 'warm'", dict(embedding_init="warm")),
        ("batch_size is 0", dict(batch_size=0)),
        (r"0 \[MASK\]", dict(prompts=["no hole"])),
        ("size is", dict(size="huge")),
    ):
        with pytest.raises(UsageError, match=words):
            denoise(
                create_record(tmp_path / "run", "denoise"),
                corpus,
                tokenizer,
                DenoisingConfig(**QUICK | more),
            )
    with pytest.raises(DataError, match="none are left"):
        denoise(
            create_record(tmp_path / "run", "denoise"),
            corpus,
            tokenizer,
            DenoisingConfig(**QUICK | dict(eval_examples=10_000)),
        )
    empty = tmp_path / "empty"
    frame = read_split(corpus, "train")
    write_corpus(empty, dict(train=frame, validation=frame.head(0), test=frame.head(1)), [], {})
    with pytest.raises(DataError, match="no validation texts"):
        denoise(
            create_record(tmp_path / "run", "denoise"), empty, tokenizer, DenoisingConfig(**QUICK)
        )
