"""Two texts with one label: from a table to a served answer, and what is refused on the way."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import live, reads_back_the_same

from llmeco_nb.core import DataError, UsageError, create_record, read_json, sha256_of
from llmeco_nb.data.corpus import build_corpus, read_split, split_texts
from llmeco_nb.data.corpus_rows import CorpusConfig
from llmeco_nb.data.text_pairs import pair_groups
from llmeco_nb.finetuning.linear import LinearText
from llmeco_nb.tasks.cleaning import clean_text
from llmeco_nb.tasks.registry import load_schema
from llmeco_nb.tasks.text_pairs import (
    join_pair,
    map_pair,
    order_free,
    pair_mark,
    split_pair,
)

TASK = "text-pair-classification"
SPLITS = ("train", "validation", "test")
WORDS = [f"{a}{b}" for a in "bdgkmnprst" for b in ("ab", "el", "im", "ot", "un")]


def pair_rows(count: int, seed: int = 0) -> list[dict]:
    "Every second pair says the same words in another order; no text stands twice."
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        first = [*rng.choice(WORDS, 4, replace=False), f"n{seed}x{i}"]
        second = first if i % 2 else [*rng.choice(WORDS, 4, replace=False), f"m{seed}x{i}"]
        said = dict(premise=" ".join(first), claim=" ".join(rng.permutation(second)))
        rows.append(said | dict(label=["other", "same"][i % 2]))
    return rows


def corpus_of(folder, rows: list[dict], name: str = "t.csv", **more):
    "The corpus of rows with the columns premise, claim and label."
    folder.mkdir(exist_ok=True)
    file = folder / name
    if name.endswith(".jsonl"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pd.DataFrame(rows).to_csv(file, index=False)
    asked = dict(task=TASK, text_column="premise", pair_column="claim", max_rows=None) | more
    return build_corpus(
        create_record(folder / "data", "data"), CorpusConfig(source=str(file), **asked)
    )


def whole(corpus) -> pd.DataFrame:
    "All rows of a corpus, the split beside each."
    return pd.concat([read_split(corpus, s).assign(split=s) for s in SPLITS])


texts = st.text("ab<br/> &#x\x02\x03\n", max_size=12)


@given(texts, texts)
@settings(max_examples=60, deadline=None)
def test_a_pair_is_cut_where_it_was_joined_and_cleaned_part_by_part(first, second):
    clean = [clean_text(part) for part in (first, second)]
    assert split_pair(join_pair(*clean)) == tuple(clean)
    assert pair_mark not in clean_text(join_pair(first, second))
    assert order_free(join_pair(*clean)) == order_free(join_pair(*clean[::-1]))
    made = map_pair(clean_text, join_pair(first, second))
    assert made == (join_pair(*clean) if all(clean) else "")


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=12))
@settings(max_examples=30, deadline=None)
def test_groups_are_the_components_of_the_graph_of_texts(edges):
    found = pair_groups(join_pair(f"t{a}", f"t{b}") for a, b in edges).tolist()
    for one in edges:
        reached, before = set(one), set()
        while reached != before:
            before = set(reached)
            reached |= {x for edge in edges if reached & set(edge) for x in edge}
        same = {found[k] for k, other in enumerate(edges) if other[0] in reached}
        assert len(same) == 1 and same.isdisjoint(
            found[k] for k, other in enumerate(edges) if other[0] not in reached
        )


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_corpus_keeps_both_texts_cleaned(tmp_path, name):
    rows = pair_rows(60)
    rows[0] = dict(premise="It&#x27;s  <b>so</b>", claim=" is\tit <i>so</i>?", label="same")
    rows[2] = dict(premise="only markup follows", claim="<br/>", label="other")
    corpus = corpus_of(tmp_path, rows, name)
    stored = pd.concat([pd.read_parquet(corpus / f"{s}.parquet") for s in SPLITS])
    assert list(stored) == ["id", "text", "text_pair", "label"] and len(stored) == 59
    told = {(r["premise"], r["claim"]): r["label"] for r in rows[3:]} | {
        ("It's so", "is it so?"): "same",
        (rows[1]["premise"], rows[1]["claim"]): "same",
    }
    labels = load_schema(corpus).labels
    assert {(r.text, r.text_pair): labels[r.label] for r in stored.itertuples()} == told
    assert [split_pair(t) for t in split_texts(corpus, "test")] == [
        split_pair(t) for t in read_split(corpus, "test").text
    ]
    sheet = read_json(corpus / "datasheet.json")
    assert sheet["counts"]["empty"] == 1 and sheet["pair_column"] == "claim"


def swapped(row: dict) -> dict:
    "The pair the other way round."
    return row | dict(premise=row["claim"], claim=row["premise"])


def test_the_other_way_round_is_a_leak_always_and_a_copy_where_it_is_said(tmp_path):
    rows = pair_rows(80)
    other = [swapped(row) for row in rows[:10]]
    corpus = corpus_of(tmp_path / "a", rows + other)
    kept = whole(corpus)
    assert len(kept) == 90  # the order counts, so (b, a) is a row of its own
    assert kept.groupby(kept.text.map(order_free)).split.nunique().max() == 1
    alike = corpus_of(tmp_path / "b", rows + other, symmetric=True)
    assert len(whole(alike)) == 80
    assert read_json(alike / "datasheet.json")["counts"]["duplicates"] == 10
    contrary = [row | dict(label="other") for row in map(swapped, rows[1:11:2])]
    torn = corpus_of(tmp_path / "c", rows + contrary, symmetric=True)
    assert read_json(torn / "datasheet.json")["counts"]["conflicts"] == 10
    held = tmp_path / "test.csv"
    pd.DataFrame(other[:7] + pair_rows(9, seed=3)).to_csv(held, index=False)
    apart = corpus_of(tmp_path / "d", rows, test_source=str(held))
    counts = read_json(apart / "datasheet.json")["counts"]
    assert (counts["leaks"], counts["test"], counts["overlap"]) == (7, 16, 0)


def test_a_text_of_a_test_pair_stands_in_no_training_pair(tmp_path):
    rows = pair_rows(120)
    for i in range(0, 90, 3):  # three claims for each of thirty premises
        for k in (1, 2):
            rows[i + k]["premise"] = rows[i]["premise"]
    kept = whole(corpus_of(tmp_path, rows))
    parts = kept.assign(part=kept.text.map(split_pair)).explode("part")
    assert parts.groupby("part").split.nunique().max() == 1
    assert len(kept) == 120 and set(kept.split) == set(SPLITS)
    for row in rows:  # one premise for all: it cannot be kept apart, and that is said
        row["premise"] = "the same words everywhere"
    told = read_json(corpus_of(tmp_path / "all", rows) / "datasheet.json")
    assert any("hang together" in note for note in told["notes"])


@pytest.mark.parametrize(
    "change,more,said",
    [
        (dict(claim=""), {}, r"t\.csv, row 3: the column `claim` is blank; a pair has two"),
        (dict(premise=" "), {}, r"t\.csv, row 3: the column `premise` is blank"),
        ({}, dict(pair_column="hypothesis"), r"no column `hypothesis`.*`pair_column`"),
        ({}, dict(pair_column="premise"), "are both `premise`"),
        ({}, dict(label_column=""), "a pair needs a label"),
    ],
)
def test_tables_that_are_refused(tmp_path, change, more, said):
    rows = pair_rows(40)
    rows[2] |= change
    with pytest.raises((DataError, UsageError), match=said):
        corpus_of(tmp_path, rows, **more)


QUICK = dict(max_length=32, epochs=3, min_steps=0, num_evals=2, device="cpu", lr=3e-3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The records of the profile's stages, with a small random encoder."
    pytest.importorskip("torch")
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="packing an encoder needs the extra `serve`")
    place = tmp_path_factory.mktemp("pairs")
    source = place / "pairs.csv"
    pd.DataFrame(pair_rows(200)).to_csv(source, index=False)
    given = dict(
        data=dict(source=str(source), text_column="premise", pair_column="claim", max_rows=None),
        finetune=dict(QUICK, weights=""),
        evaluate=dict(num_labeled=[0], learning_curve=[60]),
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setenv("LLMECO_RUNS", str(place))
        return live("text_pairs", place / "store", given)


def test_from_a_table_to_a_table_of_models(made):
    table = read_json(made["evaluate"] / "table" / "table.json")
    found = {
        r["model"]: r["accuracy"] for r in table["rows"] if r["labels"] == table["train_items"]
    }
    assert found.keys() >= {"minilm", "majority", "pair_words_lr", "pair_overlap_lr"}
    assert table["task"] == TASK and found["majority"] < 0.6 < 0.9 < found["pair_overlap_lr"]
    assert reads_back_the_same(made["finetune@minilm"])


def test_the_trained_folder_opens_in_plain_transformers(made):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from llmeco_nb.deployment.packing import reference_scores

    folder, rows = (
        made["finetune@minilm"] / "classifier",
        read_split(made["data"] / "corpus", "test"),
    )
    schema = load_schema(folder)
    long = join_pair(" ".join(WORDS), "a short one")
    pairs = [
        split_pair(text) for text in [*rows.text[:12], long, join_pair("b", split_pair(long)[0])]
    ]
    own, tokenizer = (
        one.from_pretrained(folder) for one in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    given = tokenizer(
        *map(list, zip(*pairs)), truncation="longest_first", padding=True, return_tensors="pt"
    )
    assert given["token_type_ids"].any() and given["input_ids"].shape[1] == 32
    with torch.no_grad():
        expected = own.eval()(**given).logits.softmax(-1).numpy()
        blind = own(**given | {"token_type_ids": None}).logits.softmax(-1).numpy()
    found = reference_scores(folder, [join_pair(*pair) for pair in pairs], schema)
    assert np.allclose(found, expected, atol=1e-6) and not np.allclose(found, blind, atol=1e-6)


def test_a_packed_encoder_answers_as_the_folder_does(made, tmp_path):
    from llmeco_nb.deployment.manifest import write_manifest
    from llmeco_nb.deployment.packing import pack_encoder, reference_scores
    from llmeco_nb.deployment.predictor import Predictor

    folder, schema = made["finetune@minilm"] / "classifier", load_schema(made["data"] / "corpus")
    (tmp_path / "bundle").mkdir()
    with warnings.catch_warnings(action="ignore"):
        facts = pack_encoder(folder, tmp_path / "bundle", "minilm", schema)
    write_manifest(tmp_path / "bundle", facts)
    asked = read_split(made["data"] / "corpus", "test").text.tolist()[:20]
    asked.append(join_pair(" ".join(WORDS), "It&#x27;s  short"))
    predictor = Predictor.load(tmp_path / "bundle")
    expected = reference_scores(folder, asked, schema)
    assert np.allclose(predictor.model.scores(asked), expected, atol=1e-5)
    turned = [join_pair(*split_pair(text)[::-1]) for text in asked]
    assert not np.allclose(predictor.model.scores(turned), expected, atol=1e-5)
    assert 5 < predictor.prepare(asked[0]).cost <= 32 == predictor.prepare(asked[-1]).cost


def test_a_killed_training_ends_with_the_same_bytes(made, tmp_path, killed_at):
    import torch

    from llmeco_nb.finetuning.classifier import fine_tune
    from llmeco_nb.finetuning.classifier_config import ClassifierConfig

    torch.set_num_threads(1)
    config = ClassifierConfig(**QUICK | dict(num_labeled=48))
    tuned = lambda name: fine_tune(
        create_record(tmp_path / name, "finetune"), str(made["data"] / "corpus"), config=config
    )
    tuned("calm")
    killed_at(5, lambda: tuned("hit"))
    assert not (tmp_path / "hit" / "classifier").exists()
    tuned("hit")
    for part in ("classifier", "predictions"):
        assert sha256_of(tmp_path / "hit" / part) == sha256_of(tmp_path / "calm" / part)


def test_a_saved_baseline_says_which_tokens_speak_for_a_class(made):
    [folder] = (made["evaluate"] / "baselines").glob("pair_overlap_lr-*")
    model = LinearText.load(folder)
    same, other = join_pair("bab del gim", "gim bab del"), join_pair("bab del gim", "kot mun pab")
    assert model.outputs([same, other]).argmax(1).tolist() == [1, 0]
    assert all(
        token.startswith(("jaccard", "inside", "bigrams", "longer"))
        for token, _ in model.why(same, 1)
    )


@pytest.fixture(scope="module")
def client(made, tmp_path_factory):
    "Of a server of the profile's bundle."
    for library in ("fastapi", "uvicorn", "sqlalchemy"):
        pytest.importorskip(library, reason="serving needs the extra `serve`")
    from llmeco_nb.interaction.client import Client, running_server

    place = tmp_path_factory.mktemp("served")
    with running_server(made["bundle"] / "bundle", place / "feedback.sqlite") as address:
        yield Client(address, author="ann")


def test_a_bundle_is_served_and_corrected(made, client):
    from llmeco_nb.deployment.manifest import verify

    manifest = verify(made["bundle"] / "bundle")
    rows = read_split(made["data"] / "corpus", "test")
    assert manifest.task.name == client.model()["task"] == TASK
    reply = client.predict([split_pair(text) for text in rows.text])
    right = np.mean([manifest.labels.index(a.label) for a in reply.answers] == rows.label)
    assert right == pytest.approx(manifest.accuracy["test"], abs=1e-6)
    [alone] = client.predict(split_pair(rows.text[0])).answers
    assert alone.probabilities == pytest.approx(reply.answers[0].probabilities, abs=1e-4)
    told = client.feedback(reply, correct=False)
    assert told.given == next(n for n in manifest.labels if n != reply.answers[0].label)
    assert client.feedback(reply, reply.answers[1].label, item=1).given == reply.answers[1].label
    with pytest.raises(UsageError, match="not a label"):
        client.feedback(reply, "maybe", item=2)


@pytest.mark.parametrize(
    "body,said",
    [
        (dict(text="a"), "text_pair"),
        (dict(text="a", text_pair=""), "text_pair"),
        (dict(texts=["a", "b"]), "texts"),
        (dict(pairs=[dict(text="a")]), "text_pair"),
        (dict(text="a", text_pair="b", pairs=[dict(text="a", text_pair="b")]), "pairs"),
        (dict(text="a", text_pair="<br/>"), "text or text_pair holds nothing but markup"),
        (dict(pairs=[dict(text="a", text_pair="b"), dict(text=" ", text_pair="b")]), "pairs.1"),
    ],
)
def test_half_a_pair_is_refused_by_the_server(client, body, said):
    with pytest.raises(UsageError, match=said):
        client.ask("POST", "/v1/predict", body)


def test_routes_and_page_know_the_second_text(client):
    schemas = client.ask("GET", "/openapi.json")["components"]["schemas"]
    assert set(schemas["PairRequest"]["properties"]) == {"text", "text_pair", "pairs"}
    assert set(schemas["TextPair"]["required"]) == {"text", "text_pair"}
    assert "label" in schemas["PairResponse"]["properties"]
    page = client.http.get("/").text
    assert 'id="text_pair"' in page and f'm.task === "{TASK}"' in page


def test_a_table_gets_its_labels(made, tmp_path):
    from llmeco_nb.deployment.predict import PredictOptions, predict_table
    from llmeco_nb.deployment.predictor import Predictor

    predictor, table = Predictor.load(made["bundle"] / "bundle"), tmp_path / "ask.csv"
    rows = {"premise": ["bab del gim", "bab", "del"], "claim": ["gim bab del", None, "NA"]}
    pd.DataFrame(rows).to_csv(table, index=False)
    options = PredictOptions(text_column="premise", pair_column="claim")
    with warnings.catch_warnings(action="ignore"):
        done = predict_table(predictor, str(table), tmp_path / "said.csv", options)
    assert (done.rows, done.blank) == (3, 1)
    found = pd.read_csv(tmp_path / "said.csv").prediction
    expected = predictor.predict_batch([join_pair("bab del gim", "gim bab del")])[0]
    assert found[0] == expected.label and pd.isna(found[1])
    with pytest.raises(DataError, match="no column `text_pair`"):
        predict_table(
            predictor, str(table), tmp_path / "no.csv", PredictOptions(text_column="premise")
        )


def test_a_separator_that_somebody_writes_is_read_as_letters(made):
    from tokenizers import Tokenizer

    from llmeco_nb.finetuning.pair_encoding import PairEncoder

    file = made["finetune@minilm"] / "classifier" / "tokenizer.json"
    encoder = PairEncoder(Tokenizer.from_file(str(file)), 32)
    ids, _ = encoder(join_pair("bab [SEP] del", "gim"))
    assert ids.count(encoder.separator) == 2
    plain = encoder.whole.encode("bab [SEP] del", "gim").ids
    assert plain.count(encoder.separator) == 3


def test_stages_that_know_no_pairs_say_so(made, tmp_path):
    from llmeco_nb.data.augment import build_augmented
    from llmeco_nb.finetuning.frozen import fit_frozen
    from llmeco_nb.finetuning.race import RaceConfig, race
    from llmeco_nb.interaction.feedback import interact
    from llmeco_nb.interaction.improve import improve

    corpus, bundle = str(made["data"] / "corpus"), str(made["bundle"] / "bundle")
    for name, stage, inputs in (
        ("interact", interact, (corpus, bundle)),
        ("improve", improve, (corpus, bundle)),
        ("frozen", fit_frozen, (corpus,)),
        ("race", race, (corpus, "", RaceConfig())),
        ("augment", build_augmented, (corpus,)),
    ):
        with pytest.raises(UsageError, match=TASK):
            stage(create_record(tmp_path / name, name), *inputs)
