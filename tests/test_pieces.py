"""Pieces: every lossless kind gives any text back, the same texts give the same bytes in any
process, and what cannot be done is refused by name."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmeco_nb.core import (
    DataError,
    MissingError,
    UsageError,
    create_record,
    open_record,
    write_json,
)
from llmeco_nb.data.corpus import read_split, small_corpus
from llmeco_nb.tokenization.bpe import (
    chat_tokens,
    encode_subwords,
    open_subword_tokenizer,
    save_subword_tokenizer,
)
from llmeco_nb.tokenization.unigram import (
    Lattice,
    SubwordTokenizerConfig,
    build_subword_tokenizer,
    byte_tokens,
    learn_unigram,
    tokenizer_kinds,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def texts():
    return read_split(small_corpus(), "train").text.tolist()[:150]


@pytest.fixture(scope="module")
def made(texts):
    return {kind: train_tokenizer(kind, texts, 900) for kind in tokenizer_kinds}


traps = [
    "<0x41>",
    "<0x+f>",
    "<unk>",
    "\u2581",
    " ",
    "  \n\t",
    "\x00",
    "é",
    "e\u0301",
    "<|im_end|>",
    "👩‍🚀",
    "日本",
    "a",
    "The",
    "\ufeff",
    "\u2028",
    "\r\n",
]


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from(traps)).map("".join))
@example(text="".join(traps))
@example(text="\U0010ffff\u0000\ufffd")
def test_any_text_comes_back(made, text):
    for kind, tokenizer in made.items():
        ids = encode_subwords(tokenizer, [text])[0]
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text, kind
        assert not {tokenizer.token_to_id(t) for t in chat_tokens} & set(ids.tolist()), kind


@pytest.mark.parametrize("kind", ["fallback", "unigram"])
def test_bytes_cannot_be_spelled(made, kind):
    "The token of byte 0x41 is written by no text: `A` is a letter, and its spelling is cut."
    for text in ("<0x41>", " <0x41>", "A<0x41>A", "<0x41><0x41>"):
        assert "<0x41>" not in made[kind].encode(text).tokens
    assert made[kind].encode("\ue000").tokens == [byte_tokens[b] for b in "\ue000".encode()]


@pytest.mark.parametrize("kind", tokenizer_kinds)
def test_same_texts_same_bytes_in_another_process(made, texts, kind):
    code = (
        "import sys, json, hashlib\nfrom llmeco_nb.tokenization.unigram import train_tokenizer\n"
        "made = train_tokenizer(sys.argv[1], json.load(sys.stdin), 900)\n"
        "print(hashlib.sha256(made.to_str().encode()).hexdigest())"
    )
    here = hashlib.sha256(made[kind].to_str().encode()).hexdigest()
    for salt in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", code, kind],
            input=json.dumps(texts),
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": salt},
        )
        assert there.stdout.strip() == here


@settings(max_examples=60, deadline=None)
@given(
    word=st.text("ab", min_size=1, max_size=7),
    p=st.lists(st.floats(0.01, 1), min_size=6, max_size=6),
)
def test_lattice_adds_up_every_cut(word, p):
    pieces = ["a", "b", "ab", "ba", "aab", "bb"]
    p = np.array(p)

    def cuts(rest):
        return (
            [[]]
            if not rest
            else [
                [i, *c]
                for i, q in enumerate(pieces)
                if rest.startswith(q)
                for c in cuts(rest[len(q) :])
            ]
        )

    weights = [(np.prod(p[c]), np.bincount(c, minlength=len(p))) for c in cuts(word)]
    total = sum(w for w, _ in weights)
    lattice = Lattice([word], pieces)
    assert np.allclose(lattice.totals(p), total)
    assert np.allclose(
        lattice.expected_counts(p, np.array([2.0])), 2 * sum(w * n for w, n in weights) / total
    )


def test_learned_probabilities_add_up_and_letters_stay():
    learned = learn_unigram(
        Counter({"watching": 9, "watched": 7, "talking": 5, "talked": 5}),
        sorted(set("watchingedlk")),
        16,
    )
    assert (
        set("watchingedlk") <= learned.keys()
        and len(learned) <= 16
        and abs(np.exp(list(learned.values())).sum() - 1) < 1e-9
    )
    assert any(len(p) > 2 for p in learned)


@pytest.mark.parametrize("kind", tokenizer_kinds)
def test_transformers_opens_it_with_its_template(made, kind, tmp_path):
    from transformers import AutoTokenizer

    save_subword_tokenizer(made[kind], tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    talk = [dict(role="user", content="Good <0x41>?"), dict(role="assistant", content=" Very ✨.")]
    ids = plain.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    assert (
        plain.decode(ids["input_ids"])
        == "<|im_start|>user\nGood <0x41>?<|im_end|>\n<|im_start|>assistant\n Very ✨.<|im_end|>\n"
    )
    assert (
        plain.decode([i for i, m in zip(ids["input_ids"], ids["assistant_masks"]) if m])
        == " Very ✨.<|im_end|>"
    )
    assert open_subword_tokenizer(tmp_path).encode("a film").ids == plain("a film")["input_ids"]


@pytest.mark.parametrize("kind", tokenizer_kinds)
def test_too_large_a_vocabulary_warns_with_what_it_got(texts, kind):
    with pytest.warns(UserWarning) as said:
        got = train_tokenizer(kind, texts[:3], 50_000).get_vocab_size()
    assert 300 < got < 50_000 and f"{got:,} pieces, not the 50,000" in str(said[0].message)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(UsageError, match="no kind 'bpm'.*bpe, fallback, unigram"):
        train_tokenizer("bpm", ["a"], 900)
    with pytest.raises(MissingError, match="train.parquet.*prose and data"):
        build_subword_tokenizer(create_record(tmp_path / "a", "pieces"), tmp_path / "nothing")
    with pytest.raises(UsageError, match="max_texts is 0"):
        build_subword_tokenizer(
            create_record(tmp_path / "b", "pieces"),
            small_corpus(),
            SubwordTokenizerConfig(max_texts=0),
        )
    for kind in tokenizer_kinds:
        with pytest.raises(UsageError, match="vocab_size is 100"):
            train_tokenizer(kind, ["a film"], 100)
        with pytest.raises(DataError, match="not a single character"):
            train_tokenizer(kind, ["", ""], 900)


def test_the_stage_reads_a_prose_by_its_domains(tmp_path):
    rows = pd.DataFrame(
        dict(
            id=list("abcd"),
            text=["a good film", "in the beginning", "a film again", "the very end"],
            domain=["reviews", "literature"] * 2,
        )
    )
    for split in ("train", "validation"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    write_json(tmp_path / "datasheet.json", dict(domains=["literature", "reviews"]))
    with pytest.warns(UserWarning, match="pieces, not the"):
        build_subword_tokenizer(
            create_record(tmp_path / "r", "pieces"),
            tmp_path,
            SubwordTokenizerConfig(kind="unigram", vocab_size=400),
        )
    record = open_record(tmp_path / "r", "pieces")
    assert [r["domain"] for r in record.rows()] == ["literature", "reviews"] and record.metrics[
        "round_trip"
    ] == 1
