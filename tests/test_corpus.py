"""Corpora of people's own tables: any number of classes, official splits, rows that belong
together, boilerplate, names that are nearly equal, and what is told of all that."""

import json
import math
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import live

from llmeco_nb.core import DataError, UsageError, create_record, open_record, read_json
from llmeco_nb.data.corpus import build_corpus, label_names, read_split
from llmeco_nb.data.corpus_counts import kept_text
from llmeco_nb.data.corpus_rows import CorpusConfig
from llmeco_nb.data.corpus_splits import thin_classes
from llmeco_nb.data.domains import read_domains
from llmeco_nb.data.groups import (
    content_groups,
    hash_texts,
    index_runs,
    long_parts,
    near_pairs,
    short_parts,
)
from llmeco_nb.data.splits import (
    deal_groups,
    split_names,
    split_rows,
    stratified_counts,
)
from llmeco_nb.data.tables import text_ids


def build(folder: Path, rows, name: str = "run", **fields) -> Path:
    "A corpus of all rows of a table with columns text and label, but for the config's `fields`."
    if not isinstance(rows, (str, Path)):
        file = folder / f"{name}.csv"
        pd.DataFrame(rows).to_csv(file, index=False)
        rows = file
    config = CorpusConfig(source=str(rows), **(dict(max_rows=None) | fields))
    return build_corpus(create_record(folder / name, "data"), config)


def splits(corpus) -> dict[str, pd.DataFrame]:
    return {s: read_split(corpus, s) for s in split_names}


def sheet(corpus) -> dict:
    return read_json(corpus / "datasheet.json")


def told(corpus) -> str:
    "What the terminal shows of a corpus: its line, and what is said at the end."
    record = open_record(corpus.parent, "data")
    return record.metrics["kept"] + "\n" + (corpus.parent / "summary.txt").read_text()


def intents(classes: int, rows: int, start: int = 0) -> pd.DataFrame:
    "Different short texts for each class."
    found = [
        (f"intent {c} asked in way {k} of many", f"c{c:04}")
        for c in range(classes)
        for k in range(start, start + rows)
    ]
    return pd.DataFrame(found, columns=["text", "label"])


# ---- number of classes ---------------------------------------------------------------------------


def slow_counts(n: int, counts: dict[int, int]) -> dict[int, int]:
    "`stratified_counts` as it is explained: one row at a time."
    exact = {c: n * k / sum(counts.values()) for c, k in counts.items()}
    part = {c: max(1, math.floor(e)) for c, e in exact.items()}
    while sum(part.values()) < n:
        part[min(part, key=lambda c: (part[c] - exact[c], c))] += 1
    while sum(part.values()) > n:
        several = (c for c in part if part[c] > 1)
        part[max(several, key=lambda c: (part[c] - exact[c], -c))] -= 1
    return part


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.floats(0, 1))
def test_shares_of_classes_are_those_explained(sizes, share):
    counts = dict(enumerate(sizes))
    n = len(sizes) + int(share * (sum(sizes) - len(sizes)))
    assert stratified_counts(n, counts) == slow_counts(n, counts)


@pytest.mark.parametrize("classes, rows", [(2, 15), (150, 12), (1000, 3)])
def test_any_number_of_classes(tmp_path, classes, rows):
    corpus = build(tmp_path, intents(classes, rows))
    parts = splits(corpus)
    assert all(p.label.nunique() == classes for p in parts.values())
    assert sum(map(len, parts.values())) == classes * rows == sheet(corpus)["counts"]["usable"]


def test_what_cannot_be_told_of_a_class_is_said(tmp_path):
    corpus = build(tmp_path, intents(40, 12))
    assert "40 of 40 classes have fewer than 5 test rows" in told(corpus)
    assert thin_classes(splits(corpus), 40, 1) == {}
    assert "fewer than 5 test" not in told(build(tmp_path, intents(3, 60), "large"))


@pytest.mark.slow
def test_150_classes_are_compared(tmp_path):
    "The smoke profile's sizes are smaller than the number of classes, and follow it."
    corpus = build(tmp_path, intents(150, 6))
    made = live(
        "smoke",
        tmp_path / "store",
        dict(data=dict(source=str(tmp_path / "run.csv"), max_rows=None)),
        {"data", "evaluate"},
    )
    table = read_json(made["evaluate"] / "table" / "table.json")
    trained = len(read_split(corpus, "train"))
    assert table["least"] == 150 and table["left_out"] == [25, 50, 100]
    assert table["sizes"] == [trained] and len(table["classes"]) == 150


def longtail() -> pd.DataFrame:
    "Two classes of twenty rows, and fifteen of one."
    rare = pd.DataFrame(
        [(f"a rare text of kind {c}", f"rare{c:02}") for c in range(15)], columns=["text", "label"]
    )
    return pd.concat([intents(2, 20), rare])


def test_rare_classes_are_all_named_and_three_things_offered(tmp_path):
    with pytest.raises(DataError) as said:
        build(tmp_path, longtail())
    assert all(f"rare{c:02}" in str(said.value) for c in range(15))
    assert all(word in str(said.value) for word in ("rare=drop", "rare=other", "15 of 17 classes"))


def test_rare_classes_are_dropped_with_counts(tmp_path):
    corpus = build(tmp_path, longtail(), rare="drop")
    assert label_names(corpus) == ["c0000", "c0001"] and sheet(corpus)["counts"]["rare"] == 15
    assert read_json(corpus / "schema.json")["labels"] == label_names(corpus)
    assert "15 of classes too rare" in told(corpus) and "rare03" in told(corpus)
    for p in splits(corpus).values():
        for text, c in zip(p.text, p.label):
            assert text.split()[1] == str(int(label_names(corpus)[c][1:]))


def test_rare_classes_are_joined(tmp_path):
    corpus = build(tmp_path, longtail(), rare="other")
    names, parts = label_names(corpus), splits(corpus)
    assert names == ["c0000", "c0001", "other"] and sheet(corpus)["counts"]["rare"] == 0
    every = pd.concat(parts.values())
    assert (
        set(every.text[every.label == 2].str[:6]) == {"a rare"} and (every.label == 2).sum() == 15
    )
    taken = longtail().replace("c0000", "Other")
    with pytest.raises(DataError, match="a class 'Other' exists"):
        build(tmp_path, taken, "taken", rare="other")
    alone = longtail()[lambda t: ~t.label.str.startswith("rare") | (t.label == "rare00")]
    with pytest.raises(DataError, match="joins 1 rare classes .rare00. into one of 1, and 3"):
        build(tmp_path, alone, "alone", rare="other")
    with pytest.raises(DataError, match="leaves 1 of 16 classes"):
        build(tmp_path, longtail()[lambda t: t.label != "c0000"], "one", rare="drop")


def test_rare_classes_of_an_official_set_go_too(tmp_path):
    longtail().to_csv(tmp_path / "test.csv", index=False)
    more = longtail().assign(text=longtail().text + " again")
    corpus = build(tmp_path, more, test_source=str(tmp_path / "test.csv"), rare="drop")
    counts = sheet(corpus)["counts"]
    assert (counts["rare"], counts["test_rare"], counts["test"]) == (15, 15, 40)


# ---- official splits -----------------------------------------------------------------------------


def marked(words: dict[str, int], column: str = "split") -> pd.DataFrame:
    "Rows of two classes, so many for each word of a column of splits."
    found = [(f"text {k} for {w}", "ab"[k % 2], w) for w, n in words.items() for k in range(n)]
    return pd.DataFrame(found, columns=["text", "label", column])


def test_a_column_of_splits_is_obeyed(tmp_path):
    rows = marked({"train": 30, "Dev": 8, "test": 10, "unsup": 6})
    rows.loc[rows.split == "unsup", "label"] = None
    corpus = build(tmp_path, rows)
    parts = splits(corpus)
    assert {s: set(p.text.str.split().str[-1]) for s, p in parts.items()} == {
        "train": {"train"},
        "validation": {"Dev"},
        "test": {"test"},
    }
    assert [len(p) for p in parts.values()] == [30, 8, 10]
    counts = sheet(corpus)["counts"]
    assert counts["unlabelled"] == 6 and counts["null_labels"] == 0
    assert "48 of 54 rows; not used: 6 marked as unlabelled" in told(corpus)
    assert "column `split` says which rows are for what: 30 for train" in told(corpus)
    ignored = build(tmp_path, rows.dropna(), "ignored", split_column="none")
    assert len(splits(ignored)["train"]) == 33 and "column `split`" not in told(ignored)


def test_unlabelled_rows_are_pretrained_on(tmp_path):
    rows = marked({"train": 20, "test": 6, "unlabelled": 5})
    rows.loc[rows.index[-1], "text"] = rows.text[rows.split == "test"].iloc[0]  # a test text
    corpus = build(tmp_path, rows)
    extra = set(pd.read_parquet(corpus / "unlabelled.parquet").text)
    assert extra == {f"text {k} for unlabelled" for k in range(4)}
    read = list(read_domains(["corpus"], corpus=corpus)["corpus"])
    assert len(read) == len(set(read)) == len(read_split(corpus, "train")) + 4 >= len(extra)
    assert not set(read) & set(read_split(corpus, "test").text)


def test_a_column_of_another_name_or_meaning(tmp_path):
    rows = marked({"training": 24, "val": 8}, "part")
    corpus = build(tmp_path, rows, split_column="part")
    parts = splits(corpus)
    assert set(parts["validation"].text.str.split().str[-1]) == {"val"}
    assert len(parts["validation"]) == 8 and len(parts["test"]) > 0  # the test set is cut
    bananas = marked({"banana": 24, "train": 8})
    assert "column `split`" not in told(build(tmp_path, bananas, "bananas"))
    with pytest.raises(DataError, match="`split` of .* holds the values banana. Words for splits"):
        build(tmp_path, bananas, "named", split_column="split")
    with pytest.raises(DataError, match="No row of .* is for training"):
        build(tmp_path, marked({"test": 24}), "none", split_column="split")
    with pytest.raises(DataError, match="has no column `sppit`.*Did you mean `split`"):
        build(tmp_path, bananas, "absent", split_column="sppit")
    with pytest.raises(UsageError, match="column of the texts or labels"):
        build(tmp_path, bananas, "label", split_column="label")
    labels = marked({"train": 20, "test": 20}).drop(columns="label")
    corpus = build(tmp_path, labels, "classes", label_column="split")
    assert label_names(corpus) == ["test", "train"]


def test_two_official_test_sets_are_one_too_many(tmp_path):
    marked({"x": 8}).to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(UsageError, match="marks 8 test rows, too. Leave test_source empty"):
        build(tmp_path, marked({"train": 20, "test": 8}), test_source=str(tmp_path / "test.csv"))


def test_official_validation_and_test_files(tmp_path):
    for name in ("validation", "test"):
        marked({name: 12}).drop(columns="split").to_csv(tmp_path / f"{name}.csv", index=False)
    files = {f"{s}_source": str(tmp_path / f"{s}.csv") for s in ("validation", "test")}
    rows = marked({"train": 30, "test": 2, "validation": 3}).drop(columns="split")
    corpus = build(tmp_path, rows, **files)
    counts, parts = sheet(corpus)["counts"], splits(corpus)
    assert counts["leaks"] == 5 and [len(p) for p in parts.values()] == [30, 12, 12]
    assert counts["overlap"] == 0 and counts["validation_read"] == counts["test_read"] == 12
    assert str(tmp_path) not in json.dumps(sheet(corpus))
    both = pd.concat([pd.read_csv(tmp_path / f"{s}.csv") for s in ("validation", "test")])
    both.to_csv(tmp_path / "validation.csv", index=False)
    corpus = build(tmp_path, rows, "again", **files)
    counts = sheet(corpus)["counts"]
    assert (counts["validation_leaks"], counts["validation"], counts["overlap"]) == (12, 12, 0)
    assert "17 also in an official validation or test set" in told(corpus)


def test_unknown_classes_of_all_official_sets_are_named(tmp_path):
    rows = marked({"train": 20, "validation": 4, "test": 4})
    rows.loc[rows.split == "validation", "label"] = ["a", "b", "x", "y"]
    rows.loc[rows.split == "test", "label"] = ["a", "b", "z", "a"]
    with pytest.raises(DataError, match="validation rows .*known here: x, y.*test rows .*here: z"):
        build(tmp_path, rows)


# ---- rows that belong together -------------------------------------------------------------------


def letters(authors: int, each: int) -> pd.DataFrame:
    "Letters of authors, who each write in both classes, with nothing in common but the author."
    chance = random.Random(0)
    found = [
        (" ".join(f"w{chance.randrange(10**6)}" for _ in range(9)), "ab"[k % 2], f"author {a}")
        for a in range(authors)
        for k in range(each)
    ]
    return pd.DataFrame(found, columns=["text", "label", "author"])


def test_a_group_stays_on_one_side(tmp_path):
    rows = letters(60, 10)
    corpus = build(tmp_path, rows, group_column="author")
    author = dict(zip(rows.text, rows.author))
    sides = {s: set(p.text.map(author)) for s, p in splits(corpus).items()}
    assert sum(map(len, sides.values())) == 60 and all(sides.values())
    sizes = {s: len(p) for s, p in splits(corpus).items()}
    assert abs(sizes["test"] - 120) <= 10 and abs(sizes["validation"] - 60) <= 10
    for p in splits(corpus).values():
        assert abs(p.label.mean() - 0.5) < 0.05
    counts = sheet(corpus)["counts"]
    assert (counts["groups"], counts["grouped_rows"]) == (60, 600)
    assert "600 rows in 60 groups belong together" in told(corpus)
    new = letters(1, 10).assign(author="new", text=lambda t: t.text.str[::-1])
    more = pd.concat([rows, new])
    again = splits(build(tmp_path, more, "more", group_column="author"))
    moved = [s for s in sides if len(sides[s] - set(again[s].text.map(author).dropna())) > 1]
    assert not moved  # one author more hardly moves another
    row_wise = splits(build(tmp_path, rows, "single"))
    assert set(row_wise["train"].text.map(author)) & set(row_wise["test"].text.map(author))


def test_too_few_groups_are_refused_by_name(tmp_path):
    rows = letters(20, 4)
    rows.loc[rows.label == "b", "author"] = "author 0"
    with pytest.raises(DataError, match="The class 'b' has 1 group and needs 3"):
        build(tmp_path, rows, group_column="author")
    with pytest.raises(DataError, match="has no column `autor`. Did you mean `author`"):
        build(tmp_path, rows, "absent", group_column="autor")


def test_classes_that_cannot_share_their_groups_are_named(tmp_path):
    "Each class has three groups and needs all, and no dealing of the four gives all to each."
    held = {"g0": "ab", "g1": "abc", "g2": "ac", "g3": "bc"}
    rows = letters(5, 2).head(9)
    rows["label"], rows["author"] = zip(*((c, g) for g, of in held.items() for c in of))
    with pytest.raises(DataError) as said:
        build(tmp_path, rows, "refused", group_column="author")
    told = str(said.value)
    assert "A class needs 3 groups, one for each of test, validation, train" in told
    assert "the class 'c' stands in 3, of which other classes leave it 2" in told
    assert "test_size to 0" in told and "leave group_column empty" in told


def test_a_group_of_an_official_set_leaves_training(tmp_path):
    rows = letters(60, 10)
    held = letters(4, 6).assign(text=lambda t: "official " + t.text.str[::-1])
    held["author"] = [f"author {a} " for a in (0, 1, 2, "new")] * 6
    held.to_csv(tmp_path / "test.csv", index=False)
    official = dict(test_source=str(tmp_path / "test.csv"), group_column="author")
    corpus = build(tmp_path, rows, **official)
    author, parts, counts = (
        dict(zip(rows.text, rows.author)),
        splits(corpus),
        sheet(corpus)["counts"],
    )
    assert len(parts["test"]) == 24 and counts["group_leaks"] == 30 and counts["leaks"] == 0
    inner = {s: set(parts[s].text.map(author)) for s in ("train", "validation")}
    assert not inner["train"] & inner["validation"]
    assert not (inner["train"] | inner["validation"]) & {"author 0", "author 1", "author 2"}
    assert "30 of a group that an official validation or test set holds" in told(corpus)
    assert "30 rows left training" in told(corpus)
    held.drop(columns="author").to_csv(tmp_path / "test.csv", index=False)
    corpus = build(tmp_path, rows, "without", **official)
    assert "The official test set has no column `author`" in told(corpus)
    assert sheet(corpus)["counts"]["group_leaks"] == 0
    everyone = letters(60, 1).assign(text=lambda t: t.text.str[::-1])
    everyone.to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(DataError, match="600 rows: group_leaks took 600.* `author` that of groups"):
        build(tmp_path, rows, "nothing", **official)


def test_groups_of_two_official_sets_are_told(tmp_path):
    rows = letters(30, 10)
    number = rows.author.str.split().str[1].astype(int)
    rows["split"] = np.select([number < 4, number < 9], ["test", "dev"], "train")
    rows.loc[rows.index[:5], "split"] = "dev"
    rows.loc[rows.index[-5:], "split"] = "test"
    corpus = build(tmp_path, rows, group_column="author")
    parts, counts = splits(corpus), sheet(corpus)["counts"]
    assert [len(p) for p in parts.values()] == [200, 55, 40] and counts["group_leaks"] == 5
    assert "1 groups of `author` stand in the official validation set and in the test" in told(
        corpus
    )


def test_equal_texts_join_their_groups_in_any_order(tmp_path):
    rows = letters(40, 6)
    copies = rows[rows.author == "author 7"].head(2).assign(author="author 31 ")
    blank = rows[rows.author == "author 8"].head(1).assign(author=None)
    every, seen = pd.concat([rows, copies, blank]), set()
    for name, order in (("one", every), ("two", every[::-1])):
        corpus = build(tmp_path, order, name, group_column="author")
        seen.add(tuple(tuple(p.id) for p in splits(corpus).values()))
        author = dict(zip(rows.text, rows.author))
        sides = {a: s for s, p in splits(corpus).items() for a in p.text.map(author)}
        assert sides["author 7"] == sides["author 31"]
        assert sheet(corpus)["counts"]["groups"] == 39
        assert "1 of 243 training rows have no `author`" in told(corpus)
    assert len(seen) == 1
    common = [("thanks a lot", "a", f"author {i}") for i in range(40)]
    common = pd.DataFrame(common, columns=rows.columns)
    corpus = build(tmp_path, pd.concat([rows, common]), "all", group_column="author")
    assert sheet(corpus)["counts"]["groups"] == 40 and "would be one" in told(corpus)


def test_groups_are_the_same_written_as_numbers_or_as_texts(tmp_path):
    rows = letters(30, 6)
    number = rows.author.str.split().str[1].astype(int)
    rows.assign(author=number.astype(float)).to_parquet(tmp_path / "train.parquet")
    held = letters(3, 4).assign(text=lambda t: t.text.str[::-1], author=["0", "1.0", " 2"] * 4)
    held.to_json(tmp_path / "test.jsonl", orient="records", lines=True)
    corpus = build(
        tmp_path,
        tmp_path / "train.parquet",
        group_column="author",
        test_source=str(tmp_path / "test.jsonl"),
    )
    assert sheet(corpus)["counts"]["group_leaks"] == 18


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=3, max_size=40),
    st.integers(0, 5),
)
def test_groups_are_dealt_whole_and_every_class_everywhere(groups, seed):
    labels = np.array([c for group in groups for c in group])
    ends = np.cumsum([0] + [len(group) for group in groups])
    members = [np.arange(a, b) for a, b in zip(ends, ends[1:])]
    random.Random(seed).shuffle(members)
    counts = {int(c): int(n) for c, n in zip(*np.unique(labels, return_counts=True))}
    n = max(len(counts), len(labels) // 5)
    if n > len(labels):
        return
    wanted = {s: stratified_counts(n, counts) for s in ("test", "validation")}
    try:
        sides = deal_groups(labels, members, wanted)
    except DataError:
        return
    assert all(len(set(sides[m])) == 1 for m in members)
    assert {(s, c) for s, c in zip(sides, labels)} == {(s, c) for s in split_names for c in counts}


def test_near_duplicates_and_parts_stay_on_one_side(tmp_path):
    chance = random.Random(1)
    word = lambda: f"w{chance.randrange(10**6)}"
    found = []
    for k in range(120):
        words = [word() for _ in range(30)]
        changed = [*words[:11], word(), *words[12:]]  # 5 of 26 runs, J = 21/31
        near = [*words[:29], word()]  # 1 of 26 runs, J = 25/27
        found += [(" ".join(w), "ab"[k % 2], k) for w in (words, near, words[5:15], words[20:23])]
        found += [(" ".join(changed[10:20]), "ab"[k % 2], -k - 1)]
    rows = pd.DataFrame(found, columns=["text", "label", "family"])
    corpus = build(tmp_path, rows.drop(columns="family"))
    family = dict(zip(rows.text, rows.family))
    sides = {s: {f for f in p.text.map(family) if f >= 0} for s, p in splits(corpus).items()}
    assert sum(map(len, sides.values())) == 120 and all(sides.values())
    counts = sheet(corpus)["counts"]
    assert (counts["groups"], counts["grouped_rows"]) == (120, 480)
    assert "480 rows in 120 groups share their content" in told(corpus)


def test_near_duplicates_of_an_official_set_leave_training(tmp_path):
    chance = random.Random(1)
    words = [[f"w{chance.randrange(10**6)}" for _ in range(30)] for _ in range(120)]
    rows = [(" ".join(w), "ab"[k % 2]) for k, w in enumerate(words)]
    rows += [("fine film", "a"), ("A long day.", "b"), ("fine", "b")]
    rows += [(" ".join(["new", *words[0][1:]]), "a")]  # J = 25/27 both with 0 and with the test's
    held = [(" ".join([*w[:29], f"other{k}"]), "ab"[k % 2]) for k, w in enumerate(words[:10])]
    held += [("Fine film!", "a"), ("a long day", "b"), (" ".join(words[20][:15]), "a")]
    held += [(" ".join([*w[:25], *w[:5]]), "b") for w in words[30:35]]  # J = 21/31
    for name, of in (("train", rows), ("test", held)):
        pd.DataFrame(of, columns=["text", "label"]).to_csv(tmp_path / f"{name}.csv", index=False)
    corpus = build(tmp_path, tmp_path / "train.csv", test_source=str(tmp_path / "test.csv"))
    parts, counts = splits(corpus), sheet(corpus)["counts"]
    assert (counts["leaks"], counts["near_leaks"], counts["test"]) == (0, 13, 18)
    left = set(parts["train"].text) | set(parts["validation"].text)
    gone = {t for t, _ in rows} - left
    assert gone == {t for t, _ in rows[:10]} | {"fine film", "A long day.", rows[-1][0]}
    assert "13 nearly equal to a text of an official validation or test set" in told(corpus)
    assert "13 rows left training" in told(corpus)


def test_without_groups_nothing_changes(tmp_path):
    "The split is that of the rows alone, to the byte."
    rows = letters(100, 2).drop(columns="author")
    corpus = build(tmp_path, rows)
    table = pd.DataFrame({"id": text_ids(rows.text), "text": rows.text})
    table["label"] = rows.label.map({"a": 0, "b": 1})
    expected = split_rows(table, 0.1, 0.2)
    for s, p in splits(corpus).items():
        pd.testing.assert_frame_equal(p, expected[s], check_dtype=False)
    assert sheet(corpus)["counts"]["groups"] == 0


def test_a_few_groups_move_few_rows():
    rows = letters(200, 5).drop(columns="author")
    rows["label"] = rows.label.map({"a": 0, "b": 1})
    rows["id"] = text_ids(rows.text)
    first = split_rows(rows, 0.1, 0.2)
    group = rows.id.copy()
    group.iloc[1:10] = group.iloc[0:9].to_numpy()[0]
    second = split_rows(rows.assign(group=group), 0.1, 0.2)
    for s in first:
        assert len(set(first[s].id) ^ set(second[s].id)) <= 24
    for s in second:
        assert len(second[s]) == pytest.approx(len(first[s]), abs=6)


def brute_parts(texts: list[str]) -> set[tuple[int, int]]:
    "All pairs of a text and another that holds it, word by word."
    padded = [f" {t} " for t in texts]
    return {
        (i, j)
        for i in range(len(texts))
        for j in range(len(texts))
        if i != j and padded[i] in padded[j]
    }


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=9).map(" ".join),
        min_size=1,
        max_size=25,
    )
)
def test_parts_are_all_found(texts):
    table = hash_texts(texts)
    found = np.concatenate([long_parts(index_runs(table, len(texts))), short_parts(table)])
    assert {(int(i), int(j)) for i, j in found} == brute_parts(texts)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=30))
def test_any_texts_can_be_grouped(texts):
    found = content_groups(texts)
    assert len(found.group) == len(texts)
    assert all(found.group[g] == g <= i for i, g in enumerate(found.group))


def test_many_short_texts_take_little_memory():
    "Nearly all runs of a template are shared, so every text is signed."
    chance = random.Random(0)
    places, days = [f"place{i}" for i in range(3000)], "Monday Tuesday Friday Sunday".split()
    texts = [
        f"please book a table for {n % 60} at {chance.choice(places)} on {chance.choice(days)} then"
        for n in range(12_000)
    ]
    index = index_runs(hash_texts(texts), most=len(texts))
    tracemalloc.start()
    near_pairs(index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * len(index.table.hashes)  # bytes a word


def test_templates_are_split_row_by_row_and_that_is_said(tmp_path):
    "Two thirds of the rows are one template, long and with a short gap."
    fixed = "the parcel with the number {} that you sent us last week has come back to the store"
    rows = [(fixed.format(f"n{i} x{i}"), "ab"[i % 2]) for i in range(90)]
    other = letters(45, 1).drop(columns="author")
    rows = pd.concat([pd.DataFrame(rows, columns=["text", "label"]), other])
    corpus = build(tmp_path, rows)
    assert sheet(corpus)["counts"]["groups"] == 0
    assert "that you sent us" in sheet(corpus)["groups"]["boilerplate"][0]["text"]
    assert "of the texts hold the same" in told(corpus)


def test_a_chain_without_end_is_broken_and_that_is_said(tmp_path):
    "Each text shares nine tenths with the next one, and no run stands in many."
    chance = random.Random(2)
    words = [f"w{chance.randrange(10**6)}" for _ in range(2600)]
    rows = [(" ".join(words[20 * i : 20 * i + 200]), "ab"[i % 2]) for i in range(120)]
    found = content_groups([t for t, _ in rows])
    assert found.broken == 120 and found.boilerplate == []
    corpus = build(tmp_path, pd.DataFrame(rows, columns=["text", "label"]))
    assert "120 rows are alike in groups of more than a tenth of the table" in told(corpus)
    assert sheet(corpus)["counts"]["groups"] == 0


def test_the_footer_is_named_and_makes_no_group(tmp_path):
    footer = (
        "This message and its attachments are confidential and meant for the addressee alone; if "
        "you have received it in error please tell the sender and delete it at once"
    )
    rows = letters(60, 2).drop(columns="author")
    rows["text"] = rows.text + " " + footer
    corpus = build(tmp_path, rows)
    named = sheet(corpus)["groups"]["boilerplate"][0]
    assert named["share"] == 1.0 and named["text"].startswith("this message and its attachments")
    assert sheet(corpus)["counts"]["groups"] == 0 and sheet(corpus)["counts"]["usable"] == 120
    assert "100% of the texts hold the same" in told(corpus)


@pytest.mark.slow
def test_few_of_25_000_reviews_belong_together():
    from llmeco_nb.data.tables import read_table

    found = content_groups(sorted(set(read_table("imdb").text)))
    assert 0 < found.counts["grouped_rows"] < 2500 and found.broken == 0


# ---- what is told --------------------------------------------------------------------------------


def test_the_last_line_says_what_was_kept(tmp_path):
    rows = intents(2, 30)
    rows.loc[60] = ["<br>", "c0000"]
    rows.loc[61] = ["intent 0 asked in way 0 of many", "c0000"]
    rows.loc[62] = [None, "c0000"]
    rows.loc[63] = ["intent 1 ASKED in way 1 of many", "c0000"]
    corpus = build(tmp_path, rows, max_rows=40)
    record = open_record(corpus.parent, "data")
    assert record.metrics["kept"] == (
        "40 of 64 rows; not used: 1 without a text, 1 empty after cleaning, 1 copies of other "
        "rows, 2 equal texts with different labels, 19 beyond max_rows"
    )
    assert (corpus.parent / "summary.txt").read_text().startswith("Corpus: 40 of 64 rows; not used")
    assert kept_text(dict(read=3, train=1, validation=1, test=1)) == "3 of 3 rows"


def test_contradictions_are_shown(tmp_path):
    rows = intents(2, 30)
    torn = [("so so", "c0000"), ("So  so", "c0001"), ("so so", "c0001"), ("hm", "c0000")]
    rows = pd.concat([rows, pd.DataFrame(torn, columns=["text", "label"])])
    found = sheet(build(tmp_path, rows))["copies"]["contradictions"]
    assert [one["labels"] for one in found] == [{"c0000": 1, "c0001": 2}]
    assert found[0]["text"].casefold() == "so so"


def variants() -> pd.DataFrame:
    names = ["ba\u200bd", "Bad ", "BAD", "bad", "good", "Good"]
    found = [(f"text {k} of name {i}", n) for i, n in enumerate(names) for k in range(12 - i)]
    return pd.DataFrame(found, columns=["text", "label"])


def test_names_that_are_nearly_equal_are_reported_and_joined_on_request(tmp_path):
    apart = build(tmp_path, variants())
    assert len(label_names(apart)) == 6
    assert "'Bad' (11), 'BAD' (10), 'bad' (9)" in told(apart) and "join_names" in told(apart)
    corpus = build(tmp_path, variants(), "joined", join_names=True)
    assert label_names(corpus) == ["Bad", "good"] and "were joined" in told(corpus)
    kinds = {s: p.text.str[-1].astype(int) for s, p in splits(corpus).items()}
    for s, p in splits(corpus).items():
        assert ((kinds[s] >= 4) == (p.label == 1)).all()
    pd.DataFrame({"text": ["x", "y"], "label": ["GOOD", "bAd"]}).to_csv(
        tmp_path / "test.csv", index=False
    )
    corpus = build(
        tmp_path, variants(), "official", join_names=True, test_source=str(tmp_path / "test.csv")
    )
    assert dict(zip(read_split(corpus, "test").text, read_split(corpus, "test").label)) == {
        "x": 1,
        "y": 0,
    }
    with pytest.raises(DataError, match="not known here: GOOD, bAd"):
        build(tmp_path, variants(), "apart", test_source=str(tmp_path / "test.csv"))


def test_names_of_official_sets_alone_are_joined_on_request(tmp_path):
    rows = marked({"train": 30}).drop(columns="split").replace({"label": {"a": "bad", "b": "good"}})
    held = pd.DataFrame({"text": ["x", "y", "z"], "label": ["Bad ", "bad", "GOOD"]})
    held.to_csv(tmp_path / "test.csv", index=False)
    official = dict(test_source=str(tmp_path / "test.csv"))
    with pytest.raises(DataError) as said:
        build(tmp_path, rows, **official)
    assert "'Bad' is nearly 'bad'" in str(said.value) and "join_names" in str(said.value)
    corpus = build(tmp_path, rows, "joined", join_names=True, **official)
    test = read_split(corpus, "test")
    assert dict(zip(test.text, test.label)) == {"x": 0, "y": 0, "z": 1}
    assert "official test set were joined: 'Bad' (1) as 'bad', 'GOOD' (1) as 'good'" in told(corpus)
    folder = tmp_path / "held"
    for name in ("Bad", "good"):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.txt").write_text(f"{name} film")
    tones = rows.rename(columns={"label": "tone"})
    asked = dict(test_source=str(folder), label_column="tone", join_names=True)
    assert len(read_split(build(tmp_path, tones, "folder", **asked), "test")) == 2


def test_a_folder_of_splits(tmp_path):
    for split, label, n in [
        ("train", "pos", 12),
        ("train", "neg", 12),
        ("train", "unsup", 5),
        ("test", "pos", 4),
        ("test", "neg", 4),
    ]:
        folder = tmp_path / "films" / split / label
        folder.mkdir(parents=True)
        for k in range(n):
            (folder / f"{k}.txt").write_text(f"{label} film {k} of {split}")
    corpus = build(tmp_path, tmp_path / "films")
    parts, counts = splits(corpus), sheet(corpus)["counts"]
    assert label_names(corpus) == ["neg", "pos"] and counts["unlabelled"] == 5
    assert len(parts["test"]) == 8 and len(parts["train"]) + len(parts["validation"]) == 24
    assert parts["test"].text.str.endswith("of test").all()


# ---- validation against test ---------------------------------------------------------------------


def sentences(n: int, noise: float, seed: int) -> pd.DataFrame:
    "Texts whose class a word tells, but for a share of wrong labels."
    chance = random.Random(seed)
    found = []
    for k in range(n):
        c = k % 2
        word = "fine" if c else "poor"
        rest = " ".join(f"w{chance.randrange(500)}" for _ in range(5))
        found.append((f"{rest} {word}", "ab"[c ^ (chance.random() < noise)]))
    return pd.DataFrame(found, columns=["text", "label"])


def evaluated(folder: Path, noise: float) -> Path:
    "The record of the stage evaluate for an official test set with wrong labels."
    from llmeco_nb.evaluation.comparison import EvaluationConfig, evaluate_models

    folder.mkdir()
    sentences(200, noise, 1).to_csv(folder / "test.csv", index=False)
    test = str(folder / "test.csv")
    corpus = build(folder, sentences(600, 0.02, 0), validation_size=200, test_source=test)
    record = create_record(folder / "evaluated", "evaluate")
    evaluate_models(record, str(corpus), (), EvaluationConfig(num_labeled=[0], learning_curve=[]))
    return record.path


def test_a_test_set_of_another_kind_is_said_first(tmp_path):
    found = evaluated(tmp_path / "shifted", 0.3)
    shift = read_json(found / "table" / "table.json")["shift"]
    assert shift["p"] < 0.001 and 0.15 < shift["low"] < shift["difference"] < shift["high"]
    said = (found / "summary.txt").read_text()
    assert said.startswith("Validation and test differ by more than chance: ")
    same = evaluated(tmp_path / "same", 0.02)
    assert read_json(same / "table" / "table.json")["shift"]["p"] > 0.05
    assert "more than chance" not in (same / "summary.txt").read_text()


def test_one_thin_class_leaves_the_other_groups_together(tmp_path):
    words = [f"w{i}" for i in range(3000)]
    rows = []
    for i in range(150):
        said = " ".join(words[i * 12 : i * 12 + 12]) if i * 12 + 12 <= 3000 else f"other {i}"
        rows += [[f"{said} {i}", "ab"[i % 2]], [f"{said} {i} again", "ab"[i % 2]]]
    alike = "these six rows of one class are nearly the same but for a number at the end"
    rows += [[f"{alike} {i}", "c"] for i in range(6)]
    table = pd.DataFrame(rows, columns=["text", "label"])
    corpus = build(tmp_path, table)
    twins = {
        s: set(read_split(corpus, s).query("label < 2").text.str.removesuffix(" again"))
        for s in ("train", "validation", "test")
    }
    assert not twins["train"] & twins["test"] and not twins["train"] & twins["validation"]
    assert "a class has too few groups" in told(corpus)


def test_classes_that_cannot_share_their_groups_leave_the_other_groups_together(tmp_path):
    "Each of three classes is in three of four groups of alike rows: no dealing suits all three."
    chance = random.Random(0)
    said = lambda: " ".join(f"w{chance.randrange(10**6)}" for _ in range(30))
    texts = [said() for _ in range(150)]
    rows = [(t + end, "ab"[i % 2]) for i, t in enumerate(texts) for end in (" so", " again")]
    for of in ("ce", "cde", "de", "cd"):
        alike = said()
        rows += [(f"{alike} {k}", c) for k, c in enumerate(of)]
    corpus = build(tmp_path, pd.DataFrame(rows, columns=["text", "label"]))
    side = {t: s for s, p in splits(corpus).items() for t in p.text}
    assert all(side[t + " so"] == side[t + " again"] for t in texts)
    assert "a class has too few groups; 300 rows belong together and are" in told(corpus)


def test_what_is_too_rare_is_counted_in_groups_where_rows_have_groups(tmp_path):
    rows = letters(20, 4)
    rows.loc[rows.author.isin(["author 1", "author 2"]) & (rows.label == "b"), "label"] = "c"
    corpus = build(tmp_path, rows, group_column="author", rare="drop")
    assert "1 classes with fewer than 3 groups were left out: c" in told(corpus)
    assert sheet(corpus)["counts"]["rare"] == 4
