"""Tokenizer: the same texts give the same bytes in any process, stock transformers opens it, and
what cannot be done is refused by name."""

import json
import subprocess
import sys
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import (
    DataError,
    MissingError,
    UsageError,
    create_record,
    open_record,
    sha256_of,
)
from llmeco_nb.data.corpus import write_corpus
from llmeco_nb.tokenization.wordpiece import (
    TokenizerConfig,
    build_tokenizer,
    encode_texts,
    initial_alphabet,
    measure,
    open_tokenizer,
    save_tokenizer,
    special_tokens,
    train_wordpiece,
    word_counts,
    wordpiece,
)

TEXTS = [
    f"{a} {b}, {c} the film's ending. Café number {n}!"
    for n, (a, b, c) in enumerate(
        (a, b, c)
        for a in ("Unwatchable", "Watchable", "Lovely", "Terrible")
        for b in ("acting", "actors", "acted")
        for c in ("unlike", "like", "liking", "disliked")
    )
]


def corpus(folder, train=TEXTS[8:], validation=TEXTS[:8]):
    parts = {
        name: pd.DataFrame(
            {
                "id": [f"{name}{i}" for i in range(len(t))],
                "text": t,
                "label": [i % 2 for i in range(len(t))],
            }
        )
        for name, t in (("train", train), ("validation", validation), ("test", TEXTS[:2]))
    }
    write_corpus(folder, parts, ["no", "yes"], {})
    return folder


def test_two_processes_find_the_same_vocabulary():
    "The library's own trainer does not: the order of a hash table becomes ids, and ids break ties."
    code = (
        "import sys, json; from llmeco_nb.tokenization.wordpiece import train_wordpiece; "
        "print(json.dumps(train_wordpiece(json.load(sys.stdin), 120)))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(TEXTS),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and json.loads(runs[0]) == train_wordpiece(TEXTS, 120)


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger():
    assert train_wordpiece(TEXTS, 130)[:90] == train_wordpiece(TEXTS, 90)


def test_special_tokens_come_first():
    assert (
        train_wordpiece(TEXTS, 100)[:5]
        == special_tokens
        == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    )


def test_stage_gives_equal_bytes_and_opens_in_transformers(tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = corpus(tmp_path / "corpus")
    how = TokenizerConfig(vocab_size=110, strip_accents="always")
    a, b = (
        build_tokenizer(create_record(tmp_path / name, "tokenizer"), place, how) for name in "ab"
    )
    assert sha256_of(a) == sha256_of(b)
    for opened in (AutoTokenizer.from_pretrained(a), PreTrainedTokenizerFast.from_pretrained(a)):
        assert (
            opened("Café acting")["input_ids"] == open_tokenizer(a).encode("cafe ACTING").ids
            and len(opened) == 110
        )
    auto = AutoTokenizer.from_pretrained(a)
    assert [
        auto.pad_token_id,
        auto.unk_token_id,
        auto.cls_token_id,
        auto.sep_token_id,
        auto.mask_token_id,
    ] == [0, 1, 2, 3, 4]
    assert auto("a", "b")["token_type_ids"][-1] == 1 and auto("[MASK]")["input_ids"] == [2, 4, 3]
    metrics = open_record(tmp_path / "a", "tokenizer").metrics
    assert (
        metrics["vocabulary"] == 110
        and metrics["measured_on"] == "validation"
        and metrics["round_trip"] == 1
    )


def test_more_than_the_texts_offer_gives_what_there_is(tmp_path):
    place = corpus(tmp_path / "corpus", train=["abc abc abd"] * 3)
    build_tokenizer(
        create_record(tmp_path / "t", "tokenizer"), place, TokenizerConfig(vocab_size=8192)
    )
    metrics = open_record(tmp_path / "t", "tokenizer").metrics
    assert metrics["asked"] == 8192 and metrics["vocabulary"] < 20


def test_without_validation_texts_it_says_what_it_measured(tmp_path):
    build_tokenizer(
        create_record(tmp_path / "t", "tokenizer"),
        corpus(tmp_path / "corpus", validation=[]),
        TokenizerConfig(vocab_size=100),
    )
    assert open_record(tmp_path / "t", "tokenizer").metrics["measured_on"] == "train"


def test_refusals(tmp_path):
    with pytest.raises(UsageError, match="need at least"):
        train_wordpiece(TEXTS, 20)
    with pytest.raises(DataError, match="without a single character"):
        train_wordpiece(["", " "], 100)
    with pytest.raises(UsageError, match="max_texts is 0"):
        build_tokenizer(
            create_record(tmp_path / "t", "tokenizer"),
            corpus(tmp_path / "corpus"),
            TokenizerConfig(vocab_size=100, max_texts=0),
        )
    with pytest.raises(MissingError, match="tokenizer.json"):
        open_tokenizer(tmp_path)
    with pytest.raises(DataError):
        measure(wordpiece(train_wordpiece(TEXTS, 90)), [])


def test_characters_beyond_the_limit_are_unknown():
    pieces = train_wordpiece(["aaaa bbbb"] * 5 + ["z"], 60, limit_alphabet=2)
    assert wordpiece(pieces).encode("aaaa z", add_special_tokens=False).tokens[
        -1
    ] == "[UNK]" and not any("z" in p for p in pieces)
    assert initial_alphabet(Counter({"ab": 2, "c": 1}), 2) == ["a", "b", "##b"]


def test_case_and_accents_can_stay(tmp_path):
    made = wordpiece(train_wordpiece(TEXTS, 120, lowercase=False), lowercase=False)
    save_tokenizer(made, tmp_path)
    assert open_tokenizer(tmp_path).decode(made.encode("Café").ids) == "Café"


TOK = wordpiece(train_wordpiece(TEXTS, 150))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.text(
            st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Zl", "Zp")), max_size=40
        ),
        max_size=4,
    )
)
def test_cutting_each_stretch_once_changes_nothing(texts):
    assert [e.tolist() for e in encode_texts(TOK, texts)] == [
        TOK.encode(t, add_special_tokens=False).ids for t in texts
    ]


@settings(max_examples=150, deadline=None)
@given(st.text("acdefgiklmnortuw 'é!", max_size=60))
def test_known_letters_survive_the_round_trip(text):
    words = word_counts([text])
    if words:
        assert measure(TOK, [text])["round_trip"] == 1 and measure(TOK, [text])["unknown_rate"] == 0
