"""Data: cleaning is idempotent, splits are disjoint and a function of seed and rows alone, equal
input gives equal bytes."""

import hashlib
import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from llmeco_nb.core import (
    DataError,
    MissingError,
    UsageError,
    cached_fixture,
    create_record,
    open_record,
    package_files,
    read_json,
    sha256_of,
)
from llmeco_nb.data.corpus import (
    CorpusConfig,
    build_corpus,
    clean_table,
    count_split_leakage,
    drop_duplicates,
    label_names,
    read_split,
    small_corpus,
)
from llmeco_nb.data.splits import (
    split_names,
    split_rows,
    split_sizes,
    stratified_counts,
    subsample_splits,
)
from llmeco_nb.data.tables import text_ids
from llmeco_nb.data.text_spool import normalized_key
from llmeco_nb.tasks.cleaning import clean_text


def table(texts, labels=None) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "id": text_ids(texts),
            "text": texts,
            "label": labels if labels is not None else [i % 2 for i in range(len(texts))],
        }
    )


def own(path: Path, n: int = 60, labels=("1", "5")) -> Path:
    "A table of stars and bodies."
    rows = [
        {"stars": labels[i % len(labels)], "body": f"Film number {i}.<br />It is &quot;{i}&quot;."}
        for i in range(n)
    ]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def build(folder: Path, source: str | Path, name: str = "run", **fields) -> Path:
    "All rows of a table of stars and bodies, but for the config's `fields`."
    asked = dict(text_column="body", label_column="stars", max_rows=None) | fields
    return build_corpus(
        create_record(folder / name, "data"), CorpusConfig(source=str(source), **asked)
    )


def splits(corpus) -> dict:
    return {s: read_split(corpus, s) for s in split_names}


# ---- cleaning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("good<br /><br />film", "good film"),
        ("good<BR>film<br/>!", "good film !"),
        ('<p class="x > y">new</p>', "new"),
        ("<i>un</i>believable", "unbelievable"),
        ("I <3 it <sigh> 1 < 2 > 0", "I <3 it <sigh> 1 < 2 > 0"),
        ("if a<b and b>c", "if a<b and b>c"),
        ("a<!-- hidden -->b", "ab"),
        ("AT&amp;T &quot;x&quot; R&B &lt;3", 'AT&T "x" R&B <3'),
        ("&amp;lt;br&amp;gt;x", "x"),
        ("&#8217; &#x2019; &#150;", "’ ’ –"),
        ("&nbsp;x&nbsp;", "x"),
        ("cafÃ© â€“ naÃ¯ve", "café – naïve"),
        ("wow \x96 dash\x85", "wow – dash…"),
        ("cafe\u0301", "café"),
        ("“curly” stays", "“curly” stays"),
        ("全角 ｆｕｌｌ", "全角 ｆｕｌｌ"),
        ("bell\x07 zero\u200bwidth soft\xadhyphen", "bell zerowidth softhyphen"),
        ("\uf0b7 bullet", "bullet"),
        ("\ud83d alone", "\ufffd alone"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),
        ("  a\t b\r\n\u3000c\u2028d ", "a b c d"),
        ("", ""),
        ("<br />\u200b", ""),
    ],
)
def test_cleaning(raw, clean):
    assert clean_text(raw) == clean


def test_lines_are_kept_on_request():
    assert (
        clean_text("one  two\r\n\r\n\r\nthree<br />four", keep_newlines=True)
        == "one two\n\nthree\nfour"
    )
    assert clean_text("one  two\r\n\r\n\r\nthree<br />four") == "one two three four"


pieces = st.sampled_from(
    [
        "<br />",
        "<i>",
        "</i",
        "<",
        ">",
        "&",
        "&amp;",
        "lt;",
        "&lt;",
        "#",
        "8217;",
        "Ã",
        "©",
        "â€",
        "™",
        "\x96",
        "\x85",
        "\x00",
        "\u200b",
        "\u0301",
        "\xad",
        " ",
        "\n",
        "\r",
        "\ud800",
        "\udc00",
        "\uf0b7",
        "ﬁ",
        "é",
        "b",
        "=",
        '"',
        "<!--",
        "-->",
        "\xa0",
        "\x1b[31m",
        "\ufeff",
    ]
)
messy = st.lists(st.one_of(pieces, st.text(max_size=3)), max_size=14).map("".join)


@settings(max_examples=300, deadline=None)
@given(messy, st.booleans())
def test_cleaning_is_idempotent_and_safe(text, lines):
    clean = clean_text(text, lines)
    assert clean_text(clean, lines) == clean == clean.strip()
    assert clean.encode("utf-8").decode() == clean and not any(
        ord(c) < 32 and c != "\n" or 0x7F <= ord(c) < 0xA0 for c in clean
    )
    assert "  " not in clean and (lines or "\n" not in clean) and "\n\n\n" not in clean


@settings(max_examples=100, deadline=None)
@given(
    st.text(
        st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="<>&"), max_size=60
    )
)
def test_plain_text_is_left_alone(text):
    assert clean_text(text) == " ".join(text.split())


def test_hostile_texts_are_cleaned_in_time():
    for text in (
        "<" * 50_000,
        "<a " * 20_000,
        "<b x=" * 20_000,
        "&" * 50_000,
        "&#" * 30_000,
        "<!--" * 20_000,
        "é " * 30_000,
        " \n" * 50_000,
        "<br " + "a=b " * 20_000,
    ):
        clean_text(text)


def test_a_table_is_cleaned_and_accounted_for():
    rows = table(["fine<br />film", "plain", "<p> </p>", "caf\xc3\xa9"])
    cleaned, report = clean_table(rows)
    assert cleaned.text.tolist() == ["fine film", "plain", "café"] and cleaned.id.tolist() == [
        rows.id[i] for i in (0, 1, 3)
    ]
    assert {k: v["texts"] for k, v in report.items()} == {
        "encoding": 1,
        "spaces": 0,
        "entities": 0,
        "tags": 2,
        "controls": 0,
    }
    assert report["encoding"]["samples"] == [
        {"id": rows.id[3], "before": "caf\xc3\xa9", "after": "café"}
    ]
    assert clean_table(rows[::-1])[1] == report


# ---- duplicates ----------------------------------------------------------------------------------


def test_duplicates_and_conflicts():
    kept, report = drop_duplicates(
        table(["A film", "a  FILM", "b", "B", "c", "c", "d"], [1, 1, 0, 1, 1, 1, 0])
    )
    assert sorted(kept.text.str.lower().str.split().str.join(" ")) == ["a film", "c", "d"]
    assert (report["duplicates"], report["conflicts"], report["groups"]) == (2, 2, 3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "A", " a", "b", "B b", "b  B", "c"]), st.integers(0, 1)),
        min_size=1,
        max_size=12,
    ),
    st.randoms(),
)
def test_duplicates_do_not_depend_on_order(pairs, chance):
    "Whichever row comes first, the same texts and labels stay."

    def kept(pairs):
        rows, report = drop_duplicates(table(*map(list, zip(*pairs))))
        return list(zip(rows.id, rows.label)), report["duplicates"], report["conflicts"]

    mixed = pairs[:]
    chance.shuffle(mixed)
    rows, duplicates, conflicts = kept(pairs)
    assert kept(mixed) == (rows, duplicates, conflicts) and len(
        rows
    ) + duplicates + conflicts == len(pairs)


# ---- splitting -----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.floats(0, 1))
@example([1, 1, 10], 0.0)
def test_quotas(sizes, share):
    counts = dict(enumerate(sizes))
    n = len(sizes) + round(share * (sum(sizes) - len(sizes)))
    part = stratified_counts(n, counts)
    assert sum(part.values()) == n and all(1 <= part[c] <= counts[c] for c in counts)
    fair = {c: n * counts[c] / sum(sizes) for c in counts}
    lifted = sum(
        max(0, 1 - f) for f in fair.values()
    )  # what small classes were given to have one at all
    assert all(abs(part[c] - fair[c]) < 1 + lifted for c in counts)


rows_of = st.lists(st.integers(0, 3), min_size=20, max_size=120).map(
    lambda labels: table([f"text {i}" for i in range(len(labels))], labels)
)


@settings(max_examples=30, deadline=None)
@given(
    rows_of,
    st.sampled_from([0, 0.1, 0.25, 5]),
    st.sampled_from([0, 0.2, 8]),
    st.integers(0, 9),
    st.randoms(),
)
def test_splits(rows, validation, test, seed, chance):
    try:
        parts = split_rows(rows, validation, test, seed)
    except DataError:
        return
    ids = [set(p.id) for p in parts.values()]
    assert sum(map(len, ids)) == len(rows) == len(set().union(*ids)) and list(parts) == list(
        split_names
    )
    assert {k: len(p) for k, p in parts.items()} == split_sizes(
        len(rows), validation, test, rows.label.nunique()
    )
    for name, p in parts.items():  # stratified: no class is off by more than the rounding
        if len(p):
            share = (
                p.label.value_counts().reindex(sorted(set(rows.label)), fill_value=0)
                - len(p) * rows.label.value_counts(normalize=True).sort_index()
            )
            assert set(p.label) == set(rows.label) and share.abs().max() <= rows.label.nunique()
    order = list(range(len(rows)))
    chance.shuffle(order)
    again = split_rows(rows.iloc[order], validation, test, seed)
    assert all(parts[k].equals(again[k]) for k in parts)


def test_splits_hold_still():
    """An added row hardly moves the others; another seed moves them all; the order inside a split
    is not the labels'."""
    rows = table([f"text {i}" for i in range(1000)])
    first, more, other = (
        split_rows(rows, 0.1, 0.2),
        split_rows(table([f"text {i}" for i in range(1001)]), 0.1, 0.2),
        split_rows(rows, 0.1, 0.2, seed=1),
    )
    assert (
        len(set(first["test"].id) - set(more["test"].id)) <= 1
        and len(set(first["test"].id) & set(other["test"].id)) < 80
    )
    assert 100 < (first["train"].label.diff().abs() == 1).sum() < 600


def test_splits_are_the_same_everywhere():
    """Fixed by hand: a change of the lots would silently exchange test and training rows of
    existing corpora."""
    parts = split_rows(table([f"text {i}" for i in range(12)]), 2, 4, seed=7)
    lot = lambda i: hashlib.sha256(
        f"7:{hashlib.sha256(f'text {i}'.encode()).hexdigest()[:16]}".encode()
    ).hexdigest()
    for c in (0, 1):
        ranked = [f"text {i}" for i in sorted(range(c, 12, 2), key=lot)]
        assert [
            [t for t in p.text if int(t.split()[1]) % 2 == c]
            for p in (parts["test"], parts["validation"], parts["train"])
        ] == [ranked[:2], ranked[2:3], ranked[3:]]


@settings(max_examples=20, deadline=None)
@given(rows_of, st.integers(0, 5))
def test_smaller_corpora_are_nested(rows, seed):
    try:
        parts = split_rows(rows, 0.2, 0.3, seed)
    except DataError:
        assume(False)
    former = {k: set() for k in parts}
    for limit in (12, 16, 20, len(rows)):
        try:
            some = subsample_splits(parts, limit, 0.2, 0.3)
        except DataError:
            continue
        assert sum(map(len, some.values())) <= limit and all(
            set(some[k].id) <= set(parts[k].id) for k in parts
        )
        assert all(len(former[k] - set(some[k].id)) <= rows.label.nunique() for k in parts)
        former = {k: set(p.id) for k, p in some.items()}


# ---- the corpus ----------------------------------------------------------------------------------


def test_own_data(tmp_path):
    corpus = build(tmp_path, own(tmp_path / "reviews.csv"), seed=3)
    parts = splits(corpus)
    assert {k: len(p) for k, p in parts.items()} == {
        "train": 42,
        "validation": 6,
        "test": 12,
    } and label_names(corpus) == ["1", "5"]
    train = parts["train"]
    assert (
        list(train.columns) == ["id", "text", "label"]
        and train.label.dtype == "int64"
        and train.id.map(type).eq(str).all()
    )
    number = int(train.text[0].split()[2].strip("."))
    assert (
        train.text[0] == f'Film number {number}. It is "{number}".' and train.label[0] == number % 2
    )
    sheet, metrics = (
        read_json(corpus / "datasheet.json"),
        read_json(tmp_path / "run" / "metrics.json"),
    )
    assert (
        sheet["source"] == "reviews.csv"
        and sheet["revision"] == "sha256:" + sha256_of(tmp_path / "reviews.csv")
        and sheet["seed"] == 3
    )
    assert (
        sheet["counts"]["usable"] == metrics["usable"] == 60
        and metrics["overlap"] == 0
        and metrics["changed_tags"] == 60
    )
    assert not any(
        str(tmp_path) in f.read_text(errors="replace") for f in corpus.iterdir()
    )  # a datasheet travels without its author's folders


def test_equal_input_gives_equal_bytes(tmp_path):
    source = own(tmp_path / "reviews.csv")
    first = build(tmp_path, source, "a", max_rows=30)
    code = (
        "from llmeco_nb.data.corpus import *; from llmeco_nb.core import *\n"
        "from llmeco_nb.data.corpus_rows import CorpusConfig\n"
        f"asked = CorpusConfig(source={str(source)!r}, text_column='body', label_column='stars', "
        f"max_rows=30)\n"
        f"print(sha256_of(build_corpus(create_record({str(tmp_path / 'b')!r}, 'data'), asked)))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    other = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert sha256_of(first) == sha256_of(build(tmp_path, source, "c", max_rows=30)) == other
    assert sha256_of(first) != sha256_of(build(tmp_path, source, "d", max_rows=30, seed=1))


def test_the_order_of_the_source_leaves_no_trace(tmp_path):
    rows = [
        ("5", "fine &amp; good"),
        ("5", "Fine & good"),
        ("1", "poor"),
        ("1", "same"),
        ("5", "same"),
        *(("15"[i % 2], f"text {i}") for i in range(40)),
    ]
    hashes = set()
    for name, order in {
        "a": rows,
        "b": rows[::-1],
        "c": random.Random(1).sample(rows, len(rows)),
    }.items():
        pd.DataFrame(order, columns=["stars", "body"]).to_csv(tmp_path / f"{name}.csv", index=False)
        corpus = build(tmp_path, tmp_path / f"{name}.csv", name)
        hashes.add(tuple(sha256_of(corpus / f"{s}.parquet") for s in split_names))
        assert (
            read_json(corpus / "datasheet.json")["counts"]["duplicates"] == 1
            and read_json(corpus / "datasheet.json")["counts"]["conflicts"] == 2
        )
    assert len(hashes) == 1


def test_an_official_test_set(tmp_path):
    source = own(tmp_path / "reviews.csv")
    rows = pd.read_csv(source, dtype=str)
    held = pd.concat(
        [
            rows.head(6),
            rows.head(2),
            pd.DataFrame({"stars": ["1"] * 8, "body": [f"New {i}" for i in range(8)]}),
        ]
    )
    held["body"] = held.body.str.upper().str.replace(
        "<BR />", "  "
    )  # the same texts in another dress
    held.to_json(tmp_path / "test.jsonl", orient="records", lines=True)
    corpus = build(tmp_path, source, test_source=str(tmp_path / "test.jsonl"))
    counts, parts = read_json(corpus / "datasheet.json")["counts"], splits(corpus)
    assert (
        counts["leaks"] == 6
        and counts["overlap"]
        == count_split_leakage({k: parts[k] for k in ("train", "validation")})
        == 0
    )
    assert (
        len(parts["test"]) == 16
        and parts["test"].id.is_unique
        and len(parts["train"]) + len(parts["validation"]) == 54
    )
    assert not set(parts["test"].text.map(normalized_key)) & set(
        parts["train"].text.map(normalized_key)
    ) | set(parts["test"].text.map(normalized_key)) & set(
        parts["validation"].text.map(normalized_key)
    )
    some = splits(
        build(tmp_path, source, "some", test_source=str(tmp_path / "test.jsonl"), max_rows=30)
    )
    assert {k: len(p) for k, p in some.items()} == {
        "train": 21,
        "validation": 3,
        "test": 6,
    } and set(some["test"].id) <= set(parts["test"].id)
    pd.DataFrame({"stars": ["3"], "body": ["x"]}).to_csv(tmp_path / "strange.csv", index=False)
    with pytest.raises(DataError, match="not known here: 3. Known are 1, 5"):
        build(tmp_path, source, test_source=str(tmp_path / "strange.csv"))
    with pytest.raises(DataError, match="Nothing of .* is left of .*leaks took 60"):
        build(tmp_path, source, test_source=str(source))


def test_a_class_that_training_lacks(tmp_path):
    "Training has classes 0, 1, 2 and 4. Class 3 of the test set must not become index 3, class 4."

    def table(name, classes, n):
        chosen = [classes[i % len(classes)] for i in range(n)]
        bodies = [f"{name}: thing {i} of kind {c}" for i, c in enumerate(chosen)]
        pd.DataFrame(dict(body=bodies, stars=chosen)).to_csv(tmp_path / name, index=False)
        return str(tmp_path / name)

    train = table("train.csv", [0, 1, 2, 4], 80)
    said = (
        "`stars` of .*strange.csv has classes that are not known here: 3. "
        "Known are 0, 1, 2, 4. .*training data"
    )
    with pytest.raises(DataError, match=said):
        build(tmp_path, train, test_source=table("strange.csv", [0, 1, 2, 3], 20))
    corpus = build(tmp_path, train, test_source=table("fine.csv", [0, 1, 4], 21))
    names, tested = label_names(corpus), read_split(corpus, "test")
    assert names == ["0", "1", "2", "4"] and sorted(set(tested.label)) == [0, 1, 3]
    for text, c in zip(tested.text, tested.label):
        assert text.endswith(f"of kind {names[c]}")


def test_missing_values_are_counted_on_both_sides(tmp_path):
    "Nullable columns, as pandas writes them; the test set's rows have an account of their own."

    def table(name, n):
        stars, bodies = [i % 2 for i in range(n)], [f"{name} {i}" for i in range(n)]
        stars[3::10] = [None] * (n // 10)
        bodies[5::10] = ["<br>"] * (n // 10)
        bodies[7::10] = [None] * (n // 10)
        rows = pd.DataFrame(dict(body=bodies, stars=stars))
        rows.astype({"body": "string", "stars": "Int64"}).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    corpus = build(tmp_path, table("train.parquet", 100), test_source=table("test.parquet", 30))
    counts = read_json(corpus / "datasheet.json")["counts"]
    keys = ("read", "null_texts", "null_labels", "empty")
    assert [counts[k] for k in keys] == [100, 10, 10, 10] and counts["usable"] == 70
    assert [counts[f"test_{k}"] for k in keys] == [30, 3, 3, 3]
    assert counts["test"] == len(read_split(corpus, "test")) == 21
    assert open_record(tmp_path / "run", "data").metrics["test_null_labels"] == 3
    alone = build(tmp_path, tmp_path / "train.parquet", "alone")
    assert "test_read" not in read_json(alone / "datasheet.json")["counts"]


def test_declared_names_in_training_and_test(tmp_path):
    "Training declares such names as 1.0; a test set declares another order, or writes 1."
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(name, declared, values):
        bodies = [f"{name} {i}: {v} stars" for i, v in enumerate(values)]
        rows = pa.table({"body": bodies, "stars": [declared.index(v) for v in values]})
        features = {"stars": {"names": declared, "_type": "ClassLabel"}}
        said = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(rows.replace_schema_metadata(said), tmp_path / name)
        return str(tmp_path / name)

    train = table("train.parquet", ["3.0", "1.0", "2.0"], ["1.0", "2.0", "3.0"] * 20)
    other = table("other.parquet", ["2.0", "3.0", "1.0"], ["1.0", "3.0", "2.0"] * 3)
    (tmp_path / "plain.csv").write_text("body,stars\nplain: 3,3\nplain: 2,2\nplain: 1,1\n")
    for k, test in enumerate([other, str(tmp_path / "plain.csv")]):
        corpus = build(tmp_path, train, f"run-{k}", test_source=test)
        assert label_names(corpus) == ["3.0", "1.0", "2.0"]
        for rows in splits(corpus).values():
            for text, c in zip(rows.text, rows.label):
                assert f": {label_names(corpus)[c].removesuffix('.0')}" in text


def test_text_without_labels(tmp_path):
    (tmp_path / "prose.txt").write_text("\n".join(f"Sentence number {i}." for i in range(40)))
    corpus = build(tmp_path, tmp_path / "prose.txt")
    assert label_names(corpus) == [] and {k: len(p) for k, p in splits(corpus).items()} == {
        "train": 28,
        "validation": 4,
        "test": 8,
    }
    assert set(read_split(corpus, "train").label) == {-1}
    own(tmp_path / "reviews.csv")
    corpus = build(tmp_path, tmp_path / "reviews.csv", "other", label_column="", keep_newlines=True)
    assert label_names(corpus) == [] and read_split(corpus, "test").text.str.contains("\n").all()


def test_no_validation_no_test(tmp_path):
    corpus = build(tmp_path, own(tmp_path / "reviews.csv"), validation_size=0, test_size=0)
    assert {k: len(p) for k, p in splits(corpus).items()} == {
        "train": 60,
        "validation": 0,
        "test": 0,
    }
    assert splits(corpus)["test"].columns.tolist() == ["id", "text", "label"]


@pytest.mark.parametrize(
    "n, labels, kwargs, error, message",
    [
        (9, "112131415", {}, DataError, "4 of 5 classes have fewer usable rows than the 3"),
        (7, "1111112", {}, DataError, r"The class '2' has 1 usable row and needs 3"),
        (
            4,
            "1515",
            {},
            DataError,
            "2 of 2 classes have fewer usable rows than the 3 that are "
            r"needed, one for each split: '1' \(2\), '5' \(2\)",
        ),
        (60, "15", dict(validation_size=0.5, test_size=0.5), DataError, "leave 0 for training"),
        (60, "15", dict(test_size=59), DataError, "leave 0 for training"),
        (
            60,
            "15",
            dict(test_size=-0.1),
            UsageError,
            "test_size is -0.1: .*greater than or equal to 0",
        ),
        (60, "15", dict(max_rows=5), DataError, "Of 5 rows.*leave 1 for training.*2 classes"),
        (60, "15", dict(max_rows=0), UsageError, "max_rows is 0: .*greater than 0"),
        (
            20,
            "1" * 17 + "555",
            dict(test_size=0.6, validation_size=0.3),
            DataError,
            "'5' has 3 rows, and validation and test take them all",
        ),
        (60, "1", {}, DataError, "single value"),
        (60, [str(i) for i in range(60)], {}, DataError, "60 different values in 60 rows"),
    ],
)
def test_data_that_cannot_be_split(tmp_path, n, labels, kwargs, error, message):
    with pytest.raises(error, match=message):
        build(tmp_path, own(tmp_path / "reviews.csv", n, labels), **kwargs)


def test_reading_a_corpus(tmp_path):
    with pytest.raises(MissingError, match="is not a corpus: train.parquet is not in it"):
        read_split(tmp_path, "train")
    with pytest.raises(UsageError, match="no split 'dev'; it has train, validation, test"):
        read_split(tmp_path, "dev")
    with pytest.raises(MissingError):
        label_names(tmp_path)


def test_a_fixture_is_made_again_when_what_makes_it_changes(tmp_path, monkeypatch):
    "Also where the change is in a module that another module imports."
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path / "runs"))
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "fixture_project"
    (folder / "data").mkdir(parents=True)
    for file, text in {
        "__init__.py": "",
        "data/__init__.py": "",
        "words.py": "WORD = 'old'",
        "data/say.py": "def say():\n    from ..words import WORD\n    return WORD",
        "made.py": "from fixture_project.data import say\n\n\n"
        "def make(folder):\n    folder.mkdir()\n    (folder / 'x').write_text(say.say())",
    }.items():
        (folder / file).write_text(text)
    make = importlib.import_module("fixture_project.made").make
    places = {cached_fixture("said", make, 1)}
    for file in ("words.py", "data/say.py", "made.py"):
        (folder / file).write_text((folder / file).read_text() + "\n# changed")
        places.add(cached_fixture("said", make, 1))
    assert len(places) == 4 and cached_fixture("said", make, 1) in places


def test_what_the_small_corpus_depends_on():
    "Reading, cleaning and the tasks are in its key, and training is not."
    module = sys.modules[small_corpus.__module__]
    root = Path(module.__file__).parents[1]
    found = {f.relative_to(root).as_posix() for f in package_files(Path(module.__file__))}
    wanted = {"data/corpus.py", "data/readers.py", "data/sources.py", "tasks/cleaning.py"}
    assert wanted <= found and not [f for f in found if f.startswith("training/")]


def test_a_typed_function_counts_by_its_code_and_by_what_it_calls(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path))

    def place(word):
        names = {"__name__": "typed"}
        exec(f"def say():\n    return {word!r}\ndef make(f):\n    f.mkdir() or say()", names)
        return cached_fixture("typed", names["make"])

    assert place("one") == place("one") != place("two")


def test_the_small_corpus(tmp_path, monkeypatch):
    "The packaged reviews, whole way; the second call only looks it up."
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path))
    corpus = small_corpus(60)
    made = {f: f.stat().st_mtime_ns for f in corpus.iterdir()}
    assert (
        corpus == small_corpus(60)
        and {f: f.stat().st_mtime_ns for f in corpus.iterdir()} == made
        and corpus.is_relative_to(tmp_path)
    )
    parts, sheet = splits(corpus), read_json(corpus / "datasheet.json")
    assert {k: len(p) for k, p in parts.items()} == {
        "train": 42,
        "validation": 6,
        "test": 12,
    } and label_names(corpus) == ["negative", "positive"]
    assert all(
        p.label.mean() == 0.5 and not p.text.str.contains("<br|\x85|\x96").any()
        for p in parts.values()
    )
    counts = sheet["counts"]
    assert (
        counts["read"]
        == 25_000
        == counts["usable"] + counts["duplicates"] + counts["conflicts"] + counts["empty"]
        and counts["duplicates"] >= 96
    )
    json.dumps(sheet, allow_nan=False)
