"""Feedback is kept once, frozen the same for the same rows, and promotes only what is better."""

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

for library in ("fastapi", "uvicorn", "sqlalchemy", "onnxruntime"):
    pytest.importorskip(library, reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
import pandas as pd
from smallbundle import make_bundle
from sqlalchemy import update

from llmeco_nb.cli import RunOptions, prepare_run
from llmeco_nb.core import DataError, MissingError, UsageError, create_record, read_json, sha256_of
from llmeco_nb.data.corpus import read_split, write_corpus
from llmeco_nb.deployment.bundle import small_bundle
from llmeco_nb.deployment.ledger import (
    Conflict,
    Ledger,
    UnknownRequest,
    database_url,
    keep_feedback,
    keep_predictions,
    read_feedback,
)
from llmeco_nb.deployment.ledger import feedback as feedback_table
from llmeco_nb.deployment.manifest import Manifest, Origin, verify, write_manifest
from llmeco_nb.evaluation.gate import gate
from llmeco_nb.evaluation.gate_account import read_looks
from llmeco_nb.finetuning.classifier import labelled_subset
from llmeco_nb.finetuning.linear import LinearText, RowSplit, fit, recipes
from llmeco_nb.finetuning.ngram_counts import count_ngrams
from llmeco_nb.interaction import improve as improve_module
from llmeco_nb.interaction.client import Client, ask_by_curl, running_server
from llmeco_nb.interaction.feedback import InteractConfig, freeze, interact, read_frozen
from llmeco_nb.interaction.improve import improve, refit_encoder, refit_linear, usable_corrections
from llmeco_nb.interaction.rounds import CorrectionCounts, read_history
from llmeco_nb.runner.stages import StageRegistry, read_profile
from llmeco_nb.runner.store import Run, feedback_database
from llmeco_nb.tasks.registry import load_schema
from llmeco_nb.tasks.text_classification import ClassPrediction

ROOT = Path(__file__).resolve().parent.parent
ANSWER = ClassPrediction(label="positive", probabilities={"negative": 0.4, "positive": 0.6})


@pytest.fixture
def ledger(tmp_path):
    one = Ledger(tmp_path / "feedback.sqlite")
    yield one
    one.close()


# -- the ledger

messages = st.tuples(
    st.sampled_from(["r0", "r1", "r9"]),
    st.integers(0, 2),
    st.sampled_from(["negative", "positive", "purple", None]),
    st.sampled_from([True, False, None]),
    st.sampled_from(["ann", "bob"]),
    st.sampled_from(["", "k1"]),
)


@settings(max_examples=25, deadline=None)
@given(sent=st.lists(messages, max_size=12))
def test_the_ledger_holds_what_it_acknowledged(tmp_path_factory, sent):
    """Against a dictionary that follows the rules: unknown answers, unknown labels and
    contradictions are refused, repetitions are stored once."""
    ledger, expected = Ledger(tmp_path_factory.mktemp("ledger") / "f.sqlite"), {}
    for r in ("r0", "r1"):
        keep_predictions(ledger, r, "0" * 64, ["a", "b"], [ANSWER, ANSWER]).result()
    for request, item, label, correct, author, key in sent:
        future = keep_feedback(ledger, request, item, label, correct, author, "", key)
        place, given_label = (
            (request, item, key or author),
            label or ("positive" if correct else "negative"),
        )
        if request == "r9" or item == 2:
            wanted = UnknownRequest
        elif (
            (label is None and correct is None)
            or label == "purple"
            or (label and correct is not None and correct != (label == "positive"))
        ):
            wanted = UsageError
        elif place in expected and expected[place] != (author, given_label):
            wanted = Conflict
        else:
            wanted = None
        if wanted:
            assert isinstance(future.exception(), wanted)
        else:
            assert future.result().stored == (place not in expected)
            expected[place] = (author, given_label)
    found = read_feedback(str(ledger.engine.url))
    ledger.close()
    assert {(r.request_id, r.item, r.key): (r.author, r.given) for r in found} == expected and len(
        found
    ) == len(expected)


WRITER = """
import sys
from llmeco_nb.deployment.ledger import *
from llmeco_nb.tasks.text_classification import ClassPrediction
ledger = Ledger(sys.argv[1])
answer = ClassPrediction(label="a", probabilities={"a": 1.0})
for i in range(60):
    name = f"{sys.argv[2]}-{i}"
    keep_predictions(ledger, name, "0" * 64, ["t"], [answer]).result()
    keep_feedback(ledger, name, correct=True).result()
ledger.close()
"""


def test_a_job_that_meets_the_end_of_the_ledger_is_done_or_refused(tmp_path):
    "Whoever writes while it closes gets an answer, and does not wait for ever."
    for i in range(10):
        # groups of one to three jobs, and of as many as there are
        ledger = Ledger(tmp_path / f"{i}.sqlite", max_batch=(1, 2, 3, 256)[i % 4])
        futures, begin = [], threading.Event()

        def write():
            begin.wait()
            futures.extend(ledger.write(lambda c: 1) for _ in range(400))

        writer = threading.Thread(target=write)
        writer.start()
        begin.set()
        ledger.close()
        writer.join()
        futures.append(ledger.write(lambda c: 1))
        refused = [f.exception(timeout=5) for f in futures]
        assert all(e is None or "closed" in str(e) for e in refused) and refused[-1] is not None


def test_two_servers_may_share_a_database(tmp_path):
    with ThreadPoolExecutor(2) as two:
        done = list(
            two.map(
                lambda n: subprocess.run(
                    [sys.executable, "-c", WRITER, str(tmp_path / "f.sqlite"), n],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                ),
                "ab",
            )
        )
    assert all(d.returncode == 0 for d in done), done
    assert len(read_feedback(tmp_path / "f.sqlite")) == 120


# -- freezing


def test_the_same_rows_freeze_to_the_same_bytes(tmp_path):
    rows = [
        (f"r{i}", k, label, who)
        for i in range(5)
        for k in (0, 1)
        for label, who in (("negative", "ann"), ("positive", "bob"))
    ]
    for name, order in (("a", rows), ("b", random.Random(0).sample(rows, len(rows)))):
        ledger = Ledger(tmp_path / name / "feedback.sqlite")
        for i in sorted({r[0] for r in order}, key=lambda r: hash((name, r))):
            keep_predictions(
                ledger, i, "0" * 64, ["one", "zwei ö 日本 \u2028"], [ANSWER, ANSWER]
            ).result()
        for r, item, label, who in order:
            keep_feedback(ledger, r, item, label, author=who).result()
        ledger.close()
        assert freeze(tmp_path / name, tmp_path / name / "frozen") == len(rows)
    assert sha256_of(tmp_path / "a" / "frozen") == sha256_of(tmp_path / "b" / "frozen")
    found = read_frozen(tmp_path / "a" / "frozen")
    assert [(r.request_id, r.item, r.author) for r in found] == sorted(
        (r[0], r[1], r[3]) for r in rows
    ) and found[-1].text.startswith("zwei ö")


def test_the_last_word_counts_and_doubt_is_not_frozen(ledger, tmp_path):
    keep_predictions(
        ledger,
        "r",
        "0" * 64,
        ["t"],
        [ClassPrediction(label="a", probabilities={"a": 0.5, "b": 0.3, "c": 0.2})],
    ).result()
    keep_feedback(ledger, "r", 0, "b", author="ann").result()
    keep_feedback(ledger, "r", 0, "c", author="ann", key="again").result()
    keep_feedback(
        ledger, "r", 0, correct=False, author="bob"
    ).result()  # of three labels: which of the others?
    assert (
        freeze(tmp_path, tmp_path / "frozen") == 1
        and read_frozen(tmp_path / "frozen")[0].given == "c"
    )


def test_the_last_word_is_the_last_though_a_clock_was_set_back(ledger, tmp_path):
    keep_predictions(ledger, "r", "0" * 64, ["t"], [ANSWER]).result()
    keep_feedback(ledger, "r", 0, "negative", author="ann").result()
    ahead = update(feedback_table).values(at=feedback_table.c.at + 3600)  # by the clock of then
    ledger.write(lambda c: c.execute(ahead) and None).result()
    keep_feedback(ledger, "r", 0, "positive", author="ann", key="again").result()
    keep_feedback(ledger, "r", 0, "negative", author="bob").result()
    assert freeze(tmp_path, tmp_path / "frozen") == 2
    assert [(r.author, r.given) for r in read_frozen(tmp_path / "frozen")] == [
        ("ann", "positive"),
        ("bob", "negative"),
    ]


@pytest.mark.parametrize("name", ["what?", "a?b=c", "50%20", "#1 & more", "é"])
def test_a_database_in_a_folder_of_any_name(tmp_path, name):
    ledger = Ledger(tmp_path / name / "feedback.sqlite")
    keep_predictions(ledger, "r", "0" * 64, ["t"], [ANSWER]).result()
    assert keep_feedback(ledger, "r", 0, "negative", author="ann").result().stored
    ledger.close()
    assert [r.given for r in read_feedback(tmp_path / name / "feedback.sqlite")] == ["negative"]
    assert freeze(tmp_path / name, tmp_path / "frozen") == 1
    assert [f.name for f in tmp_path.iterdir() if f.name != "frozen"] == [name]


@pytest.mark.parametrize("url", ["mysql://host/name", "postgresql://host:port/name", "://"])
def test_what_is_no_database_is_refused(url):
    with pytest.raises(UsageError, match="postgresql://"):
        database_url(url)


def test_a_round_learns_from_the_database_that_its_run_was_told(tmp_path, monkeypatch):
    "The place stays with the run: the rounds after it, and the server, take it from there."
    runs, place = tmp_path / "runs", tmp_path / "elsewhere?" / "said.sqlite"
    runs.mkdir()
    for at, said in ((place, "negative"), (runs / "feedback.sqlite", "positive")):
        ledger = Ledger(at)
        keep_predictions(ledger, "r", "0" * 64, ["t"], [ANSWER]).result()
        keep_feedback(ledger, "r", 0, said, author="ann").result()
        ledger.close()
    monkeypatch.setenv("LLMECO_RUNS", str(runs))
    monkeypatch.chdir(tmp_path)

    def finish(run: Run):
        done = {one.name: {"key": "0"} for one in read_profile(StageRegistry.find(), "smoke")[0]}
        run.update(lambda info: info.update(instances=done))

    def frozen(run: Run) -> list[str]:
        return [r.given for r in read_frozen(run.path / "snapshots" / "feedback")]

    finish(Run.create(runs / "smoke-1", "smoke"))
    second = prepare_run(RunOptions(profile="smoke", next=True))[0].run
    assert frozen(second) == ["positive"]
    assert feedback_database(runs) == runs / "feedback.sqlite"
    finish(second)
    told = RunOptions(profile="smoke", next=True, database="elsewhere?/said.sqlite")
    third = prepare_run(told)[0].run
    assert frozen(third) == ["negative"] and third["database"] == str(place)
    assert feedback_database(runs) == str(place)
    finish(third)
    fourth = prepare_run(RunOptions(profile="smoke", next=True))[0].run
    assert frozen(fourth) == ["negative"] and fourth["parent"] == third.path.name
    assert len(Run.all(runs)) == 4


def test_nothing_to_freeze_makes_no_folder(tmp_path):
    assert freeze(tmp_path, tmp_path / "frozen") == 0 and not (tmp_path / "frozen").exists()
    with pytest.raises(MissingError):
        read_frozen(tmp_path / "frozen")


# -- a real server


def test_client_curl_and_server_agree(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    with running_server(bundle, tmp_path / "f.sqlite") as address:
        client = Client(address, author="ann")
        assert client.model()["digest"] == verify(bundle).digest
        answer, several = client.predict("good fun"), client.predict(["good", "dull"])
        by_curl = ask_by_curl(address, "good fun")
        assert by_curl is None or by_curl.answers == answer.answers
        assert client.feedback(answer, "negative").stored
        assert not client.feedback(answer.request_id, "negative").stored
        assert client.feedback(several, correct=True, item=1).stored
        for wrong in (
            lambda: client.predict(""),
            lambda: client.feedback("nobody", "negative"),
            lambda: client.feedback(answer, "purple"),
        ):
            with pytest.raises(UsageError):
                wrong()
    with pytest.raises(MissingError, match="llmeco serve"):
        client.model()
    assert [(r.text, r.given, r.author) for r in read_feedback(tmp_path / "f.sqlite")] == [
        ("good fun", "negative", "ann"),
        ("dull", "negative", "ann"),
    ]


def test_the_stage_asks_reports_and_leaves_no_process(tmp_path):
    rows = pd.DataFrame(
        dict(
            id=[f"v{i}" for i in range(30)],
            text=[f"good film number {i}" if i % 2 else f"dull film number {i}" for i in range(30)],
            label=[(i % 2) ^ (i % 5 == 0) for i in range(30)],
        )
    )
    write_corpus(
        tmp_path / "corpus",
        dict(train=rows, validation=rows, test=rows),
        ["negative", "positive"],
        {},
    )
    config = InteractConfig(
        max_corrections=4, max_questions=30, timed_requests=5, author="somebody"
    )
    bundle = str(make_bundle(tmp_path / "bundle"))
    for _ in range(2):  # begun twice: the second attempt begins with nothing
        record = create_record(tmp_path / "store" / "interact-0", "interact")
        interact(record, str(tmp_path / "corpus"), bundle, config)
    # what a demonstration says is not what people said: it is in no database that is frozen
    assert not (tmp_path / "feedback.sqlite").exists()
    assert freeze(tmp_path, tmp_path / "frozen") == 0
    stored = read_feedback(record.path / "feedback.sqlite")
    assert len(stored) == 4 == record.metrics["stored"] and all(
        r.given != r.predicted and r.author == "somebody" for r in stored
    )
    assert (
        len(read_json(record.artifact("answer.json"))["by"]) >= 2
        and "stored once" in (record.path / "summary.txt").read_text()
    )
    assert not subprocess.run(["pgrep", "-f", str(tmp_path / "bundle")], capture_output=True).stdout


# -- candidates and the gate


def test_a_worse_candidate_never_passes_and_a_better_one_mostly_does():
    def passed(gain, trial, texts=2000, apart=0.1):
        u = np.random.default_rng([trial, int(1000 * gain + 500)]).random(texts)
        champion, candidate = ~(u < (apart + gain) / 2), ~((u >= (apart + gain) / 2) & (u < apart))
        return gate(champion, candidate).promoted

    assert not any(passed(-0.01, t) for t in range(100))
    assert sum(passed(0, t) for t in range(100)) <= 6
    assert sum(passed(0.03, t) for t in range(100)) >= 80


def texts_of(n: int, seed: int):
    "Made-up reviews: six words, two thirds of them from the 150 of their class."
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 2)
    words = [
        [
            f"{'np'[label]}{rng.integers(150)}" if rng.random() < 0.6 else f"w{rng.integers(50)}"
            for _ in range(6)
        ]
        for label in labels
    ]
    return pd.DataFrame(
        dict(id=[f"{seed}-{i}" for i in range(n)], text=[" ".join(w) for w in words], label=labels)
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A corpus with few training texts, a bundle fitted to them, and 600 further texts."
    place = tmp_path_factory.mktemp("world")
    splits, names = (
        dict(train=texts_of(80, 1), validation=texts_of(200, 2), test=texts_of(600, 3)),
        ["negative", "positive"],
    )
    write_corpus(place / "corpus", splits, names, {})
    every = pd.concat(
        [labelled_subset(splits["train"], 0), splits["validation"]]
    )  # in the order in which evaluate fits
    counted = {
        bag.analyzer: count_ngrams(every.text.tolist(), bag) for bag in recipes["tfidf_lr"].bags
    }
    split = RowSplit(np.arange(80), np.arange(80, 280), np.arange(0))
    model, _ = fit("tfidf_lr", counted, every.label.to_numpy(), split, names)
    model.save(place / "bundle")
    origin = Origin(model="tfidf_lr", num_labeled=80)
    schema = load_schema(place / "corpus")
    facts = Manifest("tfidf_lr", "linear", schema, accuracy=dict(test=0.7), origin=origin)
    write_manifest(place / "bundle", facts)
    return place, texts_of(600, 4)


def snapshot(folder: Path, texts, labels, authors=None) -> Path:
    ledger = Ledger(folder / "feedback.sqlite")
    waiting = []
    for i, (t, label, by) in enumerate(zip(texts, labels, authors or [""] * len(texts))):
        keep_predictions(ledger, f"{i:04}", "0" * 64, [t], [ANSWER])
        given = ["negative", "positive"][label]
        waiting.append(keep_feedback(ledger, f"{i:04}", 0, given, author=by))
    for w in waiting:
        w.result()
    ledger.close()
    freeze(folder, folder / "frozen")
    return folder / "frozen"


def test_without_feedback_the_champion_passes_unchanged(world, tmp_path):
    place, _ = world
    record = create_record(tmp_path / "r", "improve")
    improve(record, str(place / "corpus"), str(place / "bundle"))
    assert (
        sha256_of(record.artifact("champion")) == sha256_of(place / "bundle")
        and not record.metrics["promoted"]
        and "no feedback yet" in (record.path / "summary.txt").read_text()
    )


def test_true_corrections_promote_and_lies_do_not(world, tmp_path):
    place, more = world
    honest, lying = (
        snapshot(tmp_path / "honest", more.text, more.label),
        snapshot(tmp_path / "lying", more.text, 1 - more.label),
    )
    records = {}
    for name, feedback in (("honest", honest), ("lying", lying)):
        records[name] = create_record(tmp_path / f"r-{name}", "improve")
        improve(records[name], str(place / "corpus"), str(place / "bundle"), [], str(feedback))
    good, bad = (read_history(r.artifact("history.json"))[-1] for r in records.values())
    assert (
        good.promoted == "learned from feedback"
        and good.candidates[0].difference > 0
        and good.candidates[0].p < 0.05
    )
    assert (
        bad.promoted is None
        and bad.candidates[0].difference < 0
        and sha256_of(records["lying"].artifact("champion")) == sha256_of(place / "bundle")
    )
    manifest = verify(records["honest"].artifact("champion"))
    assert manifest.origin.parent == verify(place / "bundle").digest
    assert manifest.origin.corrections == good.feedback.texts
    # the next round: nobody said more, the bundle of the run is what it was; the promoted one
    # stays, though it is asked to defend itself against the same feedback
    third = create_record(tmp_path / "third", "improve")
    improve(
        third,
        str(place / "corpus"),
        str(place / "bundle"),
        [],
        str(honest),
        previous=str(records["honest"].artifact("champion")),
        history=str(records["honest"].artifact("history.json")),
    )
    assert (
        not third.metrics["promoted"]
        and third.metrics["round"] == 2
        and sha256_of(third.artifact("champion"))
        == sha256_of(records["honest"].artifact("champion"))
    )


@pytest.mark.parametrize("moment", ["judge_candidate", "write_changes", "round_metrics"])
def test_a_round_that_is_killed_pays_for_its_look_once(world, tmp_path, moment):
    "Before the answers, after them, and once the history is written."
    place, more = world
    some = more.head(60)
    feedback = str(snapshot(tmp_path / "said", some.text, some.label))
    given = str(place / "corpus"), str(place / "bundle"), [], feedback

    def attempt() -> Path:
        record = create_record(tmp_path / "r", "improve")
        improve(record, *given)
        return record.artifact("history.json")

    if not (pid := os.fork()):
        setattr(improve_module, moment, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
        attempt()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    paid = read_looks(tmp_path / "r" / "resume" / "looks.json")
    assert [look.number for look in paid] == [1], "paid before the answers"
    [once] = read_history(attempt())
    assert once.looks == paid and once.candidates[0].look == 1
    assert once.candidates[0].level == pytest.approx(0.05 * 6 / np.pi**2)
    assert not (tmp_path / "r" / "resume").exists()


def test_rounds_of_an_earlier_version_count_as_looks(world, tmp_path):
    place, more = world
    feedback = str(snapshot(tmp_path / "said", more.text[:60], more.label[:60]))
    before = dict(round=1, champion="c", name="n", accuracy=0.7, before="b", feedback={})
    old = dict(items=600, champion=0.7, candidate=0.7, difference=0.0, low=-0.1, high=0.1, p=1.0)
    old |= dict(detectable=0.1, no_worse=False, promoted=False, name="learned", digest="d")
    history = [before | dict(candidates=[old, old], promoted=None)]
    (tmp_path / "history.json").write_text(json.dumps(history))
    record = create_record(tmp_path / "r", "improve")
    given = str(place / "corpus"), str(place / "bundle"), [], feedback
    improve(record, *given, history=str(tmp_path / "history.json"))
    first, second = read_history(record.artifact("history.json"))
    assert first.looks == [] and second.looks[0].number == 3
    assert "3 looks at this test set" in (record.path / "summary.txt").read_text()


def test_a_champion_that_numbers_its_classes_otherwise_is_judged_by_their_names(world, tmp_path):
    "The classes of a later corpus may stand in another order; its equal bundle is no better."
    place, _ = world
    parts = {s: read_split(place / "corpus", s) for s in ("train", "validation", "test")}
    turned = {s: rows.assign(label=1 - rows.label) for s, rows in parts.items()}
    names = ["positive", "negative"]
    write_corpus(tmp_path / "corpus", turned, names, {})
    every = pd.concat([turned["train"], turned["validation"]])
    bags = recipes["tfidf_lr"].bags
    counted = {bag.analyzer: count_ngrams(every.text.tolist(), bag) for bag in bags}
    split = RowSplit(np.arange(80), np.arange(80, 280), np.arange(0))
    model, _ = fit("tfidf_lr", counted, every.label.to_numpy(), split, names)
    model.save(tmp_path / "bundle")
    schema = load_schema(tmp_path / "corpus")
    write_manifest(tmp_path / "bundle", Manifest("tfidf_lr", "linear", schema))
    record = create_record(tmp_path / "r", "improve")
    own, before = str(tmp_path / "bundle"), str(place / "bundle")
    improve(record, str(tmp_path / "corpus"), own, previous=before)
    found = read_history(record.artifact("history.json"))[-1]
    assert abs(found.candidates[0].difference) < 0.05 and found.candidates[0].champion > 0.6
    assert found.promoted is None and found.champion == verify(before).digest


def test_what_is_not_learned(world, tmp_path):
    place, _ = world
    test, train = texts_of(600, 3).text[0], texts_of(80, 1).text[0]
    frozen = snapshot(
        tmp_path / "f",
        [
            test,
            test.upper(),
            train,
            "new one",
            "new  ONE",
            "<b>new</b> two",
            "disputed",
            "disputed",
            test + ".",
            " ".join(test.split()[::-1]),
            train.title() + "!",
        ],
        [0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1],
    )
    rows, counts = usable_corrections(frozen, place / "corpus")
    assert rows.text.tolist() == ["new one", "new two"] and counts == CorrectionCounts(
        rows=11, unknown_label=0, in_test=4, in_train=2, contradicted=1, texts=2
    )


def test_one_opponent_does_not_veto_and_one_author_has_one_vote(world, tmp_path):
    place, _ = world
    said = [("five to one", 1, f"a{i}") for i in range(5)] + [("five to one", 0, "opponent")]
    said += [("one against two", 1, "a1"), ("one against two", 1, "a2")]
    said += [("one against two", 0, "a3")] * 4  # asks again and again
    said += [("all without a name", label, "") for label in (0, 0, 0, 1)]
    said += [("even", 1, "a1"), ("even", 0, "a2")]
    frozen = snapshot(tmp_path / "f", *zip(*said))
    rows, counts = usable_corrections(frozen, place / "corpus")
    found = dict(zip(rows.text, rows.label))
    assert found == {"five to one": 1, "one against two": 1} and counts.contradicted == 2
    rows, counts = usable_corrections(frozen, place / "corpus", agreement=0.8)
    assert rows.text.tolist() == ["five to one"] and counts.contradicted == 3
    rows, _ = usable_corrections(frozen, place / "corpus", agreement=1.0)
    assert not len(rows)


@pytest.mark.parametrize(
    "sheet, row", [("{", "{}"), ("[]", "{}"), ("{}", "{}"), (None, '{"text": "a", "stars": 3}')]
)
def test_frozen_feedback_of_another_version_is_refused_by_its_folder(tmp_path, sheet, row):
    (tmp_path / "feedback.jsonl").write_text(row + "\n")
    sheet = sheet or json.dumps(dict(sha256=sha256_of(tmp_path / "feedback.jsonl")))
    (tmp_path / "datasheet.json").write_text(sheet)
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        read_frozen(tmp_path)


def test_damaged_feedback_is_refused(world, tmp_path):
    place, _ = world
    frozen = snapshot(tmp_path / "f", ["new one"], [1])
    (frozen / "feedback.jsonl").write_text(
        (frozen / "feedback.jsonl").read_text().replace("positive", "negative")
    )
    with pytest.raises(DataError, match="not what was frozen"):
        usable_corrections(frozen, place / "corpus")


def test_refitting_on_nothing_new_changes_nothing(world):
    place, more = world
    base = LinearText.load(place / "bundle")
    again = refit_linear(base, place / "corpus", more[["text", "label"]][:0])
    assert np.allclose(
        again.probabilities(more.text.tolist()[:50]),
        base.probabilities(more.text.tolist()[:50]),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("label", "said"),
    [(7, "holds 7 "), (-1, "holds -1 "), ("positive", "holds 'positive' "), (0.5, r"holds 0\.5 ")],
)
def test_a_label_that_is_no_index_of_a_class_is_refused(world, tmp_path, label, said):
    place, _ = world
    base = LinearText.load(place / "bundle")
    corrections = pd.DataFrame(dict(text=["a new text", "another"], label=[label, label]))
    with pytest.raises(DataError, match=f"`label` of the corrections {said}.*from 0 to 1"):
        refit_linear(base, place / "corpus", corrections)
    pytest.importorskip("torch")
    record = create_record(tmp_path / "encoder", "improve")
    classifier = small_bundle("onnx").parent / "classifier"
    with pytest.raises(DataError, match=f"`label` of the corrections {said}.*from 0 to 1"):
        refit_encoder(record, classifier, place / "corpus", corrections, 0, tmp_path / "refitted")


def test_a_model_is_refitted_though_every_validation_text_was_corrected(world):
    "There is nothing left to choose by, so hyperparameters and temperature stay what they were."
    place, _ = world
    base, validation = LinearText.load(place / "bundle"), texts_of(200, 2)[["text", "label"]]
    again = refit_linear(base, place / "corpus", validation)
    assert again.about["settings"] == base.about["settings"] and again.scale == base.scale
    assert again.about["labels"] == 280 and again.about["validation_items"] == 0
    right = again.probabilities(validation.text.tolist()).argmax(1) == validation.label
    assert right.mean() > 0.95  # it has learned them


def test_validation_texts_that_the_server_refuses_are_named(tmp_path):
    rows = pd.DataFrame(dict(id=["a"], text=["x" * 200_001], label=[0]))
    write_corpus(
        tmp_path / "corpus",
        dict(train=rows, validation=rows, test=rows),
        ["negative", "positive"],
        {},
    )
    with pytest.raises(
        DataError, match="no validation text of 1 to 200,000 .* validation_size=0.1"
    ):
        interact(
            create_record(tmp_path / "r", "interact"),
            str(tmp_path / "corpus"),
            str(tmp_path / "bundle"),
        )


def test_a_locked_database_is_seen_without_a_break_and_fills_no_memory(tmp_path):
    ledger = Ledger(tmp_path / "f.sqlite", max_batch=8)
    holder = sqlite3.connect(tmp_path / "f.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    jobs = [ledger.write(lambda c: None, durable=False) for _ in range(400)]
    refused = [job for job in jobs if job.done()]
    assert len(refused) > 200 and all("Too much" in str(job.exception()) for job in refused)
    begun, ready = time.monotonic(), []
    while time.monotonic() - begun < 7:
        ready.append(not ledger.not_ready_reasons())
        time.sleep(0.1)
    assert not any(ready[35:])  # from 3.5 s on, also between two attempts
    holder.execute("ROLLBACK")
    holder.close()
    begun = time.monotonic()
    while ledger.not_ready_reasons() and time.monotonic() - begun < 10:
        time.sleep(0.1)
    assert not ledger.not_ready_reasons() and ledger.write(lambda c: 7).result() == 7
    ledger.close()


def test_the_log_that_is_synced_lies_beside_the_file_and_not_beside_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    Ledger(tmp_path / "real" / "f.sqlite").close()
    (tmp_path / "f.sqlite").symlink_to(tmp_path / "real" / "f.sqlite")
    ledger = Ledger(tmp_path / "f.sqlite")
    ledger.write(lambda c: None).result()
    assert ledger.log == tmp_path / "real" / "f.sqlite-wal" and ledger.log.exists()
    assert ledger.file.parent == tmp_path / "real"
    ledger.close()


def test_a_crash_of_a_job_leaves_the_writer_alive(tmp_path):
    ledger = Ledger(tmp_path / "f.sqlite")
    assert ledger.write(lambda c: sys.exit(3)).exception(10)
    assert ledger.write(lambda c: 7).result(10) == 7
    ledger.close()
