"""Tuning a decoder on dialogues and on preferences: masks of random dialogues, bytes after a kill,
messages for bad input, and the loss of trl."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import DataError, MissingError, UsageError, create_record, sha256_of
from llmeco_nb.finetuning.answer_mask import DialogueTokenizer, encode_dialogues
from llmeco_nb.finetuning.chat_decoder import (
    TuningConfig,
    open_chat_decoder,
    small_random_decoder,
)
from llmeco_nb.finetuning.dialogues import read_dialogues, small_dialogues, split_by_question
from llmeco_nb.finetuning.preference_pairs import (
    collate_pairs,
    encode_pairs,
    read_preferences,
    small_preferences,
)
from llmeco_nb.finetuning.preferences import (
    PreferenceConfig,
    log_likelihoods,
    preference_step,
    tune_preferences,
)
from llmeco_nb.finetuning.supervised_tuning import (
    TuneChatConfig,
    answer_loss_step,
    dialogue_batches,
    tune_chat,
)
from llmeco_nb.tasks.text_generation import ChatMessage, GenerationSchema
from llmeco_nb.tokenization.bpe import open_subword_tokenizer, save_subword_tokenizer, train_bpe
from llmeco_nb.tokenization.prompts import PromptTokenizer

FEW = dict(steps=6, num_evals=2, batch_size=8, precision="fp32")


@pytest.fixture(autouse=True, scope="module")
def runs(tmp_path_factory):
    before = os.environ.get("LLMECO_RUNS")
    os.environ["LLMECO_RUNS"] = str(tmp_path_factory.getbasetemp() / "runs")
    yield
    os.environ.pop("LLMECO_RUNS")
    if before is not None:
        os.environ["LLMECO_RUNS"] = before


@pytest.fixture(scope="module")
def opened(runs):
    return open_chat_decoder(small_random_decoder())


@pytest.fixture(scope="module")
def served(opened):
    ends = [opened.words.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    schema = GenerationSchema(context_length=4096, end_token_ids=ends, chat_format="chatml")
    return PromptTokenizer(open_subword_tokenizer(small_random_decoder()), schema)


# -- masks

plain = st.text(
    st.one_of(st.sampled_from(" \n\tab.?<|>"), st.characters(codec="utf-8")),
    min_size=1,
    max_size=12,
).filter(str.strip)


@st.composite
def dialogues(draw):
    "A dialogue: perhaps a system message, then users and answers in any order, an answer last."
    roles = draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=4))
    roles = [*(["system"] if draw(st.booleans()) else []), "user", *roles, "assistant"]
    return tuple(ChatMessage(role=role, content=draw(plain)) for role in roles)


@given(messages=dialogues())
@settings(max_examples=30, deadline=None)
def test_the_mask_is_what_answers_write_and_the_rest_what_is_served(opened, served, messages):
    words = opened.words
    one = words.tokenize(messages, "Row 1")
    assert len(one.input_ids) == len(one.answer_mask) == one.turn_ends[-1]
    starts, begun = [], 0
    for end in one.turn_ends:
        start = one.answer_mask.index(1, begun)
        assert all(one.answer_mask[start:end]) and not any(one.answer_mask[begun:start])
        starts.append(start)
        begun = end
    answers = [k for k, m in enumerate(messages) if m.role == "assistant"]
    assert len(answers) == len(starts)
    for k, start, end in zip(answers, starts, one.turn_ends):
        learned = words.decode(one.input_ids[start:end])
        assert learned == f"{messages[k].content}<|im_end|>"
        assert one.input_ids[start:end] == [*served.encode(messages[k].content), 2]
        assert one.input_ids[:start] == served.dialogue(messages[:k])
    assert "".join(text for text, _ in words.loss_spans(one)) == words.decode(one.input_ids)
    for room in range(0, len(one.input_ids) + 1, 7):
        cut = one.shortened(room)
        if cut is None:
            assert room < one.turn_ends[0]
        else:
            assert len(cut.input_ids) == max(e for e in one.turn_ends if e <= room)
            assert cut.input_ids == one.input_ids[: len(cut.input_ids)]
            assert cut.answer_mask == one.answer_mask[: len(cut.input_ids)]


def test_templates_of_other_families(opened):
    "An end without a special token, a system turn that is merged, and content that is trimmed."
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_random_decoder())
    talk = [("user", "Hi"), ("assistant", " Yes. "), ("user", "Who?"), ("assistant", "I.")]
    messages = tuple(ChatMessage(role=role, content=content) for role, content in talk)
    for template, expected in (
        (
            "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
            "m.content | trim + '<|endoftext|>' }}{% endfor %}",
            ["Yes.<|endoftext|>", "I.<|endoftext|>"],
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            [" Yes.\n\n", " I.\n\n"],
        ),
    ):
        tokenizer.chat_template = template
        words = DialogueTokenizer(tokenizer)
        spans = words.loss_spans(words.tokenize(messages, "Row 1"))
        assert [text for text, learned in spans if learned] == expected


def test_a_tokenizer_without_template_gets_chatml_or_an_error(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_random_decoder())
    known = tokenizer.chat_template
    tokenizer.chat_template = None
    assert DialogueTokenizer(tokenizer).tokenizer.chat_template == known
    save_subword_tokenizer(
        train_bpe(["Hello"] * 3, 261, special_tokens=["<|endoftext|>"]), tmp_path
    )
    with pytest.raises(DataError, match="no chat template, and no special token <|im_start|>"):
        DialogueTokenizer(AutoTokenizer.from_pretrained(tmp_path))


# -- bad input


def lines(folder, *rows):
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def said(*pairs):
    return [dict(role=role, content=content) for role, content in pairs]


@pytest.mark.parametrize(
    "row, message",
    [
        (dict(messages=[]), "Row 2 of rows.jsonl has no messages"),
        (dict(messages="Hello"), "Row 2 of rows.jsonl: messages is the text 'Hello'"),
        (dict(messages=["Hello"]), "Row 2 of rows.jsonl: message 1 is Hello"),
        (dict(messages=said(("bot", "Hi"))), "Row 2 .* role 'bot'; it is system, user or assis"),
        (dict(messages=said(("user", "Hi"))), "Row 2 of rows.jsonl has no answer"),
        (dict(messages=said(("assistant", "Hi"))), "Row 2 of rows.jsonl begins with an answer"),
        (
            dict(messages=said(("user", "Hi"), ("assistant", ""))),
            "Row 2 of rows.jsonl: message 2, of the assistant, has an empty content",
        ),
        (
            dict(messages=said(("user", "Hi"), ("assistant", None))),
            "Row 2 of rows.jsonl: message 2, of the assistant, has an empty content",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    good = dict(messages=said(("user", "Hi"), ("assistant", "Yes.")))
    with pytest.raises(DataError, match=message):
        read_dialogues(lines(tmp_path, good, row))


def test_too_few_questions_and_too_little_room(tmp_path, opened):
    row = dict(messages=said(("user", "Hi"), ("assistant", "Yes.")))
    with pytest.raises(DataError, match="5 rows ask 1 questions"):
        split_by_question(read_dialogues(lines(tmp_path, *[row] * 5)))
    record = create_record(tmp_path / "record", "tune_chat")
    with pytest.raises(DataError, match="finds room in 5 tokens"):
        tune_chat(record, config=TuneChatConfig(max_length=5, **FEW))
    with pytest.raises(UsageError, match="max_length is 500; this decoder reads 128"):
        TuningConfig(max_length=500).room(opened)


def test_what_is_no_decoder(tmp_path):
    with pytest.raises(MissingError, match="neither a GGUF file nor a folder"):
        open_chat_decoder(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(dict(model_type="bert", architectures=["BertForMaskedLM"]))
    )
    with pytest.raises(DataError, match="holds a BertForMaskedLM; a decoder is wanted"):
        open_chat_decoder(tmp_path)


# -- gradients


def test_batches_and_accumulation_do_not_change_the_gradient(opened):
    "Over the same dialogues: one batch, batches of three, and each alone."
    coded = encode_dialogues(read_dialogues(small_dialogues())[::17], opened.words, 128)
    model = opened.model

    def gradient(size):
        model.zero_grad(set_to_none=True)
        make = dialogue_batches(coded.examples, opened.pad, 0)
        numbers = range(-(-len(coded.examples) // size))
        weight = sum(
            answer_loss_step(model, make(size, i), lambda loss: loss.backward())[1] for i in numbers
        )
        assert weight == coded.answer_tokens
        return {n: p.grad / weight for n, p in model.named_parameters()}

    whole = gradient(len(coded.examples))
    for size in (3, 1):
        for name, found in gradient(size).items():
            assert torch.allclose(found, whole[name], atol=1e-5, rtol=1e-4), (size, name)


# -- the stages

stages = {
    "tune_chat": (tune_chat, TuneChatConfig(**FEW, samples=1)),
    "tune_preferences": (tune_preferences, PreferenceConfig(**FEW)),
}


@pytest.mark.parametrize("stage", stages)
def test_a_killed_stage_ends_with_the_same_bytes(stage, tmp_path, killed_at):
    work, config = stages[stage]
    small_random_decoder(), small_dialogues(), small_preferences()  # made by one process
    torch.set_num_threads(1)

    def tuned(name):
        with contextlib.redirect_stdout(io.StringIO()):
            work(create_record(tmp_path / name, stage), config=config)

    tuned("calm")
    killed_at(4, lambda: tuned("hit"))
    assert not (tmp_path / "hit" / "decoder").exists()
    tuned("hit")
    assert sha256_of(tmp_path / "hit" / "decoder") == sha256_of(tmp_path / "calm" / "decoder")


def test_a_folder_of_splits_is_taken_as_it_is(tmp_path):
    rows = small_dialogues().read_text(encoding="utf-8").splitlines()
    folder = tmp_path / "talk"
    folder.mkdir()
    for name, part in (("train", rows[:40]), ("validation", rows[40:48]), ("test", rows[48:56])):
        (folder / f"{name}.jsonl").write_text("\n".join(part), encoding="utf-8")
    found = split_by_question(read_dialogues(folder))
    assert {s: len(part) for s, part in found.items()} == dict(train=40, validation=8, test=8)


# -- preferences


def test_the_loss_is_that_of_trl(opened, tmp_path):
    "The same decoder, reference and tokens through trl's own trainer."
    peer = Path(os.environ.get("LLMECO_PEERS", "")) / "trl"
    if os.environ.get("LLMECO_PEERS") and peer.is_dir():
        sys.path.append(str(peer))
    trl = pytest.importorskip(
        "trl", reason="needs trl: pip install trl, or LLMECO_PEERS=the folder that holds it"
    )
    from datasets import Dataset

    DPOConfig, DPOTrainer = trl.DPOConfig, trl.DPOTrainer

    rows = read_preferences(small_preferences())[:6]
    pairs, _ = encode_pairs(rows, opened.words, 128)
    policy = open_chat_decoder(small_random_decoder())
    reference = open_chat_decoder(small_random_decoder("", 1))
    likely = log_likelihoods(reference.model, pairs, opened.pad)
    batch = collate_pairs(pairs, opened.pad, likely)
    data = Dataset.from_list(
        [dict(prompt=r.prompt[0].content, chosen=r.chosen, rejected=r.rejected) for r in rows]
    )
    args = DPOConfig(output_dir=str(tmp_path), beta=0.3, report_to=[], use_cpu=True, bf16=False)
    trainer = DPOTrainer(
        model=policy.model,
        ref_model=reference.model,
        args=args,
        train_dataset=data,
        processing_class=opened.words.tokenizer,
    )
    # theirs has all chosen answers first
    order = [*range(0, 2 * len(pairs), 2), *range(1, 2 * len(pairs), 2)]
    mask = torch.zeros_like(batch["input_ids"])
    mask[:, 1:] = batch["targets"][:, :-1] != -100
    theirs = trainer._compute_loss(
        trainer.model,
        dict(
            input_ids=batch["input_ids"][order],
            attention_mask=batch["attention_mask"][order],
            completion_mask=mask[order],
        ),
        False,
    )
    plain = open_chat_decoder(small_random_decoder())
    ours, weight = preference_step(0.3)(plain.model, batch, lambda loss: loss.backward())
    assert abs(float(ours) / weight - float(theirs.detach())) < 1e-6
    theirs.backward()
    found = dict(policy.model.named_parameters())
    for name, p in plain.model.named_parameters():
        assert torch.allclose(p.grad / weight, found[name].grad, atol=1e-6), name


def test_the_reference_is_the_decoder_as_it_came(opened, tmp_path):
    "Without a step that moves anything, every margin is 0."
    record = create_record(tmp_path / "record", "tune_preferences")
    with contextlib.redirect_stdout(io.StringIO()):
        tune_preferences(record, config=PreferenceConfig(**{**FEW, "steps": 1}, lr=1e-12))
    n = record.metrics
    assert abs(n["margin"]) < 1e-5 and abs(n["loss"] - np.log(2)) < 1e-5
    assert n["chosen_within_bound"] == 1 and abs(n["chosen_change"]) < 1e-5


def test_weights_beyond_the_bound_lose(tmp_path):
    "A bound that nothing meets: validation counts every evaluation as worse than the reference."
    record = create_record(tmp_path / "record", "tune_preferences")
    rejected_first = [
        dict(prompt=f"{i}?", chosen="zz " * (3 + i % 5), rejected="It is.") for i in range(40)
    ]
    config = PreferenceConfig(
        **FEW, source=str(lines(tmp_path, *rejected_first)), lr=0.3, max_chosen_drop=1e-9
    )
    with contextlib.redirect_stdout(io.StringIO()):
        tune_preferences(record, config=config)
    held = [r for r in record.rows() if "preference_loss" in r]
    assert any(r["chosen_change"] < 0 for r in held), held
    for r in held:
        beyond = -r["chosen_change"] > 1e-9
        assert (
            (r["validation_loss"] > np.log(2))
            if beyond
            else (r["validation_loss"] == r["preference_loss"])
        )
