"""Augmentation: labels stay, nothing of the held-out texts gets in, engines that are absent are
named, and the same seed gives the same bytes."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from llmeco_nb.core import (
    ChangedSourceError,
    MissingError,
    UsageError,
    create_record,
    open_record,
    sha256_of,
)
from llmeco_nb.data import augment
from llmeco_nb.data.augment import (
    AugmentConfig,
    apertium,
    available_engines,
    back_translate,
    build_augmented,
    change_ratio,
    distinct_n,
    engines_revision,
    marian,
    mix_augmented,
    pivot_revision,
    translator,
)
from llmeco_nb.data.corpus import CorpusConfig, build_corpus, read_split, write_corpus
from llmeco_nb.data.synonyms import MaskedLMScorer, WordNet, replace_words, wordnet_folder
from llmeco_nb.data.text_spool import normalized_key
from llmeco_nb.runner.identity import key_of, work_parts
from llmeco_nb.runner.pipeline import Pipeline
from llmeco_nb.runner.stages import StageRegistry
from llmeco_nb.runner.store import Run
from llmeco_nb.tasks.registry import load_schema

needs_apertium = pytest.mark.skipif(
    not shutil.which("apertium"), reason="needs Apertium: apt-get install apertium apertium-eo-en"
)
needs_wordnet = pytest.mark.skipif(
    not (Path(wordnet_folder) / "index.noun").is_file(),
    reason="needs WordNet: apt-get install wordnet-base",
)

# The files of a WordNet of two meanings, in the format of wndb(5WN): words, and at which byte of
# the data file their meanings stand.
LINE = "{:08d} 06 n 02 film 0 movie 0 000 | a story in pictures  \n"


@pytest.fixture
def small_wordnet(tmp_path):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    head = "  1 A licence.  \n"
    for pos in ("noun", "verb", "adj", "adv"):
        (folder / f"data.{pos}").write_text(
            head + (LINE.format(len(head)) if pos == "noun" else "")
        )
        (folder / f"index.{pos}").write_text(
            head
            + (
                "".join(f"{w} n 1 0 1 0 {len(head):08d}  \n" for w in ("film", "movie"))
                if pos == "noun"
                else ""
            )
        )
    return folder


def corpus(folder, n=12):
    rows = lambda part, n: pd.DataFrame(
        {
            "id": [f"{part}{i}" for i in range(n)],
            "text": [
                f"The {part} movie number {i} was beautiful and the actor was terrible."
                for i in range(n)
            ],
            "label": [i % 2 for i in range(n)],
        }
    )
    write_corpus(
        folder,
        {"train": rows("train", n), "validation": rows("validation", 4), "test": rows("test", 4)},
        ["no", "yes"],
        {},
    )
    return folder


def test_synonyms_come_from_the_files(small_wordnet):
    net = WordNet(small_wordnet)
    assert (
        net.synonyms("film") == ["movie"]
        and net.synonyms("movie") == ["film"]
        and net.synonyms("chair") == []
    )
    assert replace_words("The film, a film.", net, (0,), 1.0) == "The movie, a movie."


def test_absent_engines_are_named(tmp_path, monkeypatch):
    with pytest.raises(MissingError, match="apt-get install wordnet-base"):
        WordNet(tmp_path)
    with pytest.raises(MissingError, match="does not open as a translation model"):
        marian(str(tmp_path))
    with pytest.raises(MissingError, match="masked language model"):
        MaskedLMScorer(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="apt-get install apertium"):
        apertium("en-eo")


def test_refusals(tmp_path):
    place = corpus(tmp_path / "corpus")
    wrong = [
        (dict(kinds=["magic"]), r"kinds\[0\] is 'magic'"),
        (dict(added_ratio=-1), "added_ratio is -1"),
        (dict(replaced_fraction=1.1), "replaced_fraction is 1.1"),
        (dict(pivot="en-eo"), "there and back"),
    ]
    for fields, said in wrong:
        with pytest.raises(UsageError, match=said):
            record = create_record(tmp_path / "a", "augment")
            build_augmented(record, place, config=AugmentConfig(**fields))


@needs_apertium
def test_an_unknown_mode_lists_those_there_are():
    with pytest.raises(MissingError, match="en-eo"):
        apertium("xx-yy")


@needs_apertium
def test_back_translation_keeps_texts_and_lines_apart():
    texts = [
        "A film.\n\nAnother [line] with ^signs$ and {braces}.",
        "",
        "One.\x00 Two\u2028three\x85four",
        "@x / y < z > & * # ~ \\ end",
    ]
    back = back_translate(texts, translator("en-eo"), translator("eo-en"))
    assert (
        len(back) == 4
        and back[1] == ""
        and [len(b.splitlines() or [""]) for b in back]
        == [len(t.splitlines() or [""]) for t in texts]
    )
    assert "film" in back[0].lower()


@needs_apertium
@needs_wordnet
def test_stage_keeps_labels_and_repeats_itself(tmp_path):
    place = corpus(tmp_path / "corpus")
    config = AugmentConfig(kinds=["translation", "synonyms"], added_ratio=1.0, seed=5)
    a, b = (
        build_augmented(create_record(tmp_path / name, "augment"), place, config=config)
        for name in "ab"
    )
    assert sha256_of(a) == sha256_of(b)
    rows, old = read_split(a, "train"), read_split(place, "train").set_index("id")
    assert (rows.origin == "original").sum() == len(old) and {"translation", "synonyms"} <= set(
        rows.origin
    )
    assert all(old.label[i.split("~")[0]] == label for i, label in zip(rows.id, rows.label))
    assert (
        open_record(tmp_path / "a", "augment").metrics["added"] == (rows.origin != "original").sum()
    )
    for s in ("validation", "test"):
        assert read_split(a, s).drop(columns="origin").equals(read_split(place, s))


@pytest.mark.parametrize("task", ["text-classification", "regression", "none"])
def test_an_augmented_corpus_is_of_the_same_task(tmp_path, monkeypatch, task):
    "Its texts are cleaned in the same way, too. No engine is here, so that nothing is added."
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(augment, "wordnet_folder", str(tmp_path))
    rows = [dict(text=f"Line {i}.\nLine {i + 1}.", label="ab"[i % 2], target=i) for i in range(40)]
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    config = CorpusConfig(
        source=str(tmp_path / "table.csv"),
        task=task if task != "none" else "text-classification",
        label_column="" if task == "none" else "label",
        keep_newlines=True,
    )
    place = build_corpus(create_record(tmp_path / "data", "data"), config)
    made = build_augmented(create_record(tmp_path / "augment", "augment"), place)
    assert len(read_split(made, "train")) == len(read_split(place, "train"))
    assert (made / "schema.json").is_file() == (place / "schema.json").is_file() == (task != "none")
    if task != "none":
        assert load_schema(made) == load_schema(place) and load_schema(made).task == task
        assert load_schema(made).cleaning.keep_newlines


def test_a_marian_folder_translates(tmp_path):
    """The way through transformers, on a model of random weights: as many texts as were given, and
    the same ones each time."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "film", "good", "."])}
    raw = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(tmp_path / "m")
    torch.manual_seed(0)
    MarianMTModel(
        MarianConfig(
            vocab_size=7,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            bos_token_id=0,
            forced_eos_token_id=1,
            max_position_embeddings=32,
        )
    ).save_pretrained(tmp_path / "m")
    translate = marian(str(tmp_path / "m"), batch_size=2, max_length=8)
    got = translate(["a good film .", "a", "film"])
    assert (
        len(got) == 3
        and got == translate(["a good film .", "a", "film"])
        and set(" ".join(got).split()) <= set(vocabulary)
    )


@pytest.mark.hub
def test_a_published_marian_model_translates():
    there, back = marian("Helsinki-NLP/opus-mt-en-de"), marian("Helsinki-NLP/opus-mt-de-en")
    assert "film" in back_translate(["This film is very good."], there, back)[0].lower()


def test_a_judge_refuses_what_the_model_finds_unlikely(tmp_path, small_wordnet):
    "A model whose output bias alone decides: `movie` is likely, `film` is not."
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film", "movie", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "m")
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=8,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    with torch.no_grad():
        model.cls.predictions.bias[6] += 20
    model.save_pretrained(tmp_path / "m")
    judge, net = MaskedLMScorer(str(tmp_path / "m")), WordNet(small_wordnet)
    assert judge.gaps("the ", "film", "", ["movie", "unknown"])[0] > 5 and judge.gaps(
        "the ", "film", "", ["picture"]
    ) == [-float("inf")]
    assert (
        replace_words("the film", net, (0,), 1.0, judge) == "the movie"
        and replace_words("the movie", net, (0,), 1.0, judge) == "the movie"
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=8), min_size=1, max_size=6),
    st.lists(st.text(max_size=8), max_size=6),
    st.sets(st.text(max_size=4), max_size=3),
    st.integers(0, 99),
)
def test_mixing_loses_no_original_and_lets_nothing_in_twice(old, new, taken, seed):
    frame = lambda texts, name: pd.DataFrame(
        {
            "id": [f"{name}{i}" for i in range(len(texts))],
            "text": pd.Series(texts, dtype=object),
            "label": 0,
        }
    )
    mixed, dropped = mix_augmented(
        frame(old, "o"), {"k": frame(new, "n")}, taken={normalized_key(t) for t in taken}, seed=seed
    )
    added = mixed[mixed.origin == "k"].text.map(normalized_key).tolist()
    assert sorted(mixed[mixed.origin == "original"].text) == sorted(old) and len(
        added
    ) + dropped == len(new)
    assert len(set(added)) == len(added) and not set(added) & (
        {normalized_key(t) for t in old} | {normalized_key(t) for t in taken} | {""}
    )


def test_measures_by_hand():
    assert (
        distinct_n(["a b a b", "a b"]) == 2 / 4
        and change_ratio("a b c d", "a b c d") == 0
        and change_ratio("a b", "c d") == 1
    )


@pytest.fixture
def pipe(tmp_path):
    "The stages data and augment as a profile wires them, in a run of their own."
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "pipeline.yaml").write_text("stages:\n  data:\n  augment:\n")
    (tmp_path / "runs").mkdir()
    return Pipeline(
        StageRegistry.find(), Run.create(tmp_path / "runs" / "profile-1", str(tmp_path / "profile"))
    )


def key(pipe, **values):
    "The key of the stage augment on this machine as it is now."
    one = pipe.by_name["augment"]
    one.set(values, "test")
    return key_of(
        work_parts(
            one.notebook,
            pipe.registry.package,
            one.values,
            {"corpus": "a corpus"},
            pipe.revisions(one),
        )
    )


def test_what_is_made_with_other_engines_is_another_stage(
    pipe, tmp_path, small_wordnet, monkeypatch
):
    """Without `kinds` the engines of the machine decide, so they are in the key; the same engines
    give the same key, whoever names them."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(augment, "wordnet_folder", tmp_path / "nowhere")
    assert available_engines() == [] and engines_revision([]) == "none"
    bare = key(pipe)
    pipe.check_sources(pipe.by_name["augment"])
    monkeypatch.setattr(augment, "wordnet_folder", small_wordnet)
    assert available_engines() == ["synonyms"] and engines_revision([]) == engines_revision(
        ["synonyms"]
    )
    with_words = key(pipe)
    assert bare != with_words == key(pipe)
    with pytest.raises(ChangedSourceError, match="augment.kinds"):
        pipe.check_sources(pipe.by_name["augment"])
    with open(small_wordnet / "data.verb", "a") as file:
        file.write("  another release\n")
    assert key(pipe) not in (bare, with_words)


def test_a_translator_is_known_by_its_content(tmp_path, monkeypatch):
    share = tmp_path / "share" / "apertium" / "modes"
    share.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "m").mkdir()
    (tmp_path / "bin" / "apertium").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "rules.bin").write_text("one")
    (share / "en-eo.mode").write_text(f"lt-proc '{tmp_path}/rules.bin' | apertium-tagger -g $2")
    seen = [pivot_revision(f"en-eo {tmp_path}/m")]
    (tmp_path / "rules.bin").write_text("two")
    seen.append(pivot_revision(f"en-eo {tmp_path}/m"))
    (tmp_path / "m" / "weights").write_text("x")
    seen.append(pivot_revision(f"en-eo {tmp_path}/m"))
    assert len(set(seen)) == 3
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingError, match="org/name is not in the local cache"):
        pivot_revision("eo-en org/name")
    (tmp_path / "models--org--name" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--name" / "refs" / "main").write_text("1" * 40)
    assert pivot_revision("eo-en org/name") == "eo-en absent, org/name@" + "1" * 40


@needs_apertium
def test_the_modes_are_where_apertium_looks():
    assert not pivot_revision("en-eo eo-en").endswith("absent") and "absent" not in pivot_revision(
        "en-eo"
    )


@needs_apertium
def test_lines_do_not_touch_each_other():
    "Apertium's rules reach over the end of a line: these two came back as three."
    translate, lines = (
        apertium("eo-en"),
        ["povus peti pli", "ruza virina empowerment filmo , kvankam ne en vojo iu ajn atendus"],
    )
    assert (
        len(translate(lines)) == 2
        and translate(lines) == [translate([line])[0] for line in lines]
        and translate(["\n".join(lines)])[0].count("\n") == 1
    )
    assert apertium("en-eo")(["The house is big.", "The house is big", ""]) == [
        "La domo estas granda.",
        "La domo estas granda",
        "",
    ]
