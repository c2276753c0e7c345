"""Each file that a user once brought: table and stream read the same texts from it, the stage
builds a corpus of it, or the refusal says what is wrong and what to do."""

import csv

import cases
import pytest

from llmeco_nb.core import DataError, UsageError, create_record, read_json
from llmeco_nb.data.corpus import CorpusConfig, build_corpus, read_split
from llmeco_nb.data.delimited import ReadOptions
from llmeco_nb.data.mixture import MixtureConfig, build_mixture, read_mixture
from llmeco_nb.data.stream import stream_texts
from llmeco_nb.data.tables import name_key, near_equal_names, read_table


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return cases.build(tmp_path_factory.mktemp("cases"))


def corpus_of(folder, source, **config):
    "All rows of the corpus that the stage makes of a source, and its class names."
    config = CorpusConfig(source=str(source), max_rows=None, **config)
    corpus = build_corpus(create_record(folder / "record", "data"), config)
    splits = [read_split(corpus, s) for s in ("train", "validation", "test")]
    return [row for s in splits for row in s.to_dict("records")], read_json(corpus / "labels.json")


two = {"bad", "good"}
read = {
    "a_int64_na.parquet": (119, {"0", "1"}, {}),
    "a_string_na.parquet": (118, {"0", "1"}, {}),
    "aa_footer.csv": (160, two, {}),
    "b_classlabel_float.parquet": (100, {"1.0", "2.0", "3.0", "4.0", "5.0"}, {}),
    "bb_tickets.csv": (
        60,
        {"delivery", "returns", "billing"},
        dict(text_column="message", label_column="team"),
    ),
    "c_train.csv": (160, set("0124"), {}),
    "cc_escaped.csv": (320, two, {}),
    "dd_markup.csv": (
        360,
        {"Comedy|Drama", "<script>alert(1)</script>", "*_Action_* & `code`"},
        {},
    ),
    "e_sep.csv": (120, two, {}),
    "f_head.csv": (120, two, {}),
    "g_pipe.csv": (120, two, {}),
    "h_gz_inside.csv": (120, two, {}),
    "h_bz2_inside.csv": (120, two, {}),
    "h_zip_inside.csv": (120, two, {}),
    "l_longlabel.csv": (160, {"butterfly", cases.long_name}, {}),
    "n_dollar.csv": (120, {"$", "$$", "$$$"}, {}),
    "o_imbalanced.csv": (400, {"normal", "fraud"}, {}),
    "p03_spam_latin1.csv": (
        120,
        two,
        dict(text_column="v2", label_column="v1", options=ReadOptions(encoding="cp1252")),
    ),
    "q_thai.csv": (160, {"ดี", "แย่"}, {}),
    "q_hindi.csv": (160, {"यह", "यहाँ"}, {}),
    "q_vietnamese.csv": (160, {"mother", "seedling"}, {}),
    "v_cr.csv": (120, two, {}),
    "w_space.csv": (120, two, {}),
}


@pytest.mark.parametrize("name", read)
def test_what_is_read(files, tmp_path, name):
    rows, labels, more = read[name]
    table = read_table(files / name, **more)
    assert len(table) == rows and set(table.attrs["labels"]) == labels
    column, options = more.get("text_column", "text"), more.get("options", ReadOptions())
    streamed = [t for t in stream_texts(files / name, column, options=options) if t]
    missing = table.attrs["report"]["null_labels"]
    assert len(streamed) == rows + missing and set(table.text) <= set(streamed)
    if name == "l_longlabel.csv":  # whether a corpus takes so long a name is not a reader's matter
        return
    config = {k: v for k, v in more.items() if k != "options"} | {"encoding": options.encoding}
    made, names = corpus_of(tmp_path, files / name, **config)
    assert len(made) == rows and set(names) == labels
    truth = {one: table.attrs["labels"][c] for one, c in zip(table.id, table.label)}
    assert {r["id"]: names[r["label"]] for r in made} == truth


def test_texts_are_those_of_the_file(files):
    texts = [t for t, _ in cases.two_classes()]
    assert read_table(files / "h_zip_inside.csv").text.tolist() == texts
    for name in ("g_pipe.csv", "v_cr.csv", "w_space.csv"):
        assert read_table(files / name).text.tolist() == [t.replace(" in ", ", in ") for t in texts]
    pounds = read_table(
        files / "p03_spam_latin1.csv", "v2", "v1", options=ReadOptions(encoding="latin-1")
    )
    assert pounds.text.str.contains("costs £").all()


def test_declared_names_stand_as_they_are(files, tmp_path):
    made, names = corpus_of(tmp_path, files / "b_classlabel_float.parquet")
    assert names == ["1.0", "3.0", "5.0", "2.0", "4.0"]
    number = lambda row: int(row["text"].split()[1])
    assert all(row["label"] == number(row) % 5 for row in made)


def test_marks_that_change_a_word_are_kept(files, tmp_path):
    made, names = corpus_of(tmp_path, files / "q_vietnamese.csv")
    first = {"mother": "má", "seedling": "mạ"}
    assert all(row["text"].startswith(first[names[row["label"]]]) for row in made)


said = {
    "h_html.csv": (DataError, "is a web page titled “Sign in, please”, not a table", {}),
    "i_lfs.csv": (DataError, "is a pointer of Git LFS.*git lfs pull", {}),
    "p03_spam_latin1.csv": (
        DataError,
        "line 2, byte .*: 0xa3 is not UTF-8.*encoding=cp1252 reads £.. £.. £.., encoding=",
        {},
    ),
    "y_pretty.jsonl": (
        DataError,
        "line [12], .*not JSON.*objects that are written over several",
        {},
    ),
    "y_arrays.jsonl": (DataError, "an array a line|must be an object", {}),
}


@pytest.mark.parametrize("name", said)
def test_what_is_refused(files, tmp_path, name):
    "By table, stream and stage alike, with the likely cause and the cure."
    error, message, more = said[name]
    for call in (
        lambda: read_table(files / name, **more),
        lambda: list(stream_texts(files / name)),
        lambda: corpus_of(tmp_path, files / name, **more),
    ):
        with pytest.raises(error, match=f"(?s){name}.*{message}") as caught:
            call()
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_a_class_that_training_lacks(files, tmp_path):
    with pytest.raises(DataError, match="c_test.csv has classes that are not known here: 3"):
        corpus_of(tmp_path, files / "c_train.csv", test_source=str(files / "c_test.csv"))


def test_all_rare_classes_are_named_at_once(files, tmp_path):
    with pytest.raises(DataError) as caught:
        corpus_of(tmp_path, files / "x_longtail.csv")
    assert all(f"rare-{c:02}" in str(caught.value) for c in range(0, 15, 2))


def test_a_folder_of_splits(files):
    "From above and from within: `unsup` is no class, and what is not read is counted."
    for folder, skipped in (
        ("d_aclImdb", {".txt": 4, "no ending": 1}),
        ("d_aclImdb/train", {".txt": 3}),
    ):
        table = read_table(files / folder)
        assert table.attrs["labels"] == ["neg", "pos"] and len(table) == 80
        assert set(table.split) == {"train"}
        report = table.attrs["report"]
        assert (report["rows_read"], report["null_labels"]) == (160, 80)
        assert report["skipped"] == skipped


def test_nearly_equal_names(files):
    table = read_table(files / "k_variants.csv")
    names = table.attrs["labels"]
    counts = {name: int((table.label == i).sum()) for i, name in enumerate(names)}
    groups = near_equal_names(counts)
    assert sorted(name_key(next(iter(group))) for group in groups) == ["bad", "qualité"]
    assert sum(n for group in groups for n in group.values()) == 120
    assert sorted(map(len, groups)) == [4, 4]  # a space at an end makes no class of its own


def test_columns_called_on_and_no(tmp_path):
    (tmp_path / "a.csv").write_text(cases.csv_text(cases.two_classes(), ("on", "no")))
    made, names = corpus_of(tmp_path, tmp_path / "a.csv", text_column="on", label_column="no")
    assert len(made) == 120 and names == ["bad", "good"]


@pytest.mark.parametrize(
    "told, message",
    [
        (dict(separator="::"), "separator is '::'; one sign is wanted"),
        (dict(encoding="windows1252x"), "encoding is 'windows1252x'.*Did you mean `windows-1252`"),
        (dict(encoding="base64"), "encoding is 'base64'"),
    ],
)
def test_what_no_source_can_have(files, tmp_path, told, message):
    with pytest.raises(UsageError, match=message):
        corpus_of(tmp_path, files / "e_sep.csv", **told)


def test_what_is_told_reaches_the_corpus(tmp_path):
    "Separator, encoding and null words, of training and test source alike."
    rows = [(t.replace("money", "argent, très"), k) for t, k in cases.two_classes(30)]
    rows += [("n/a", "bad"), ("lost", "n/a")]
    for name, some in (("train.csv", rows), ("test.csv", [("très bon", "good"), ("n/a", "bad")])):
        text = cases.csv_text(some, ("text", "label"), delimiter="~", quoting=csv.QUOTE_ALL)
        (tmp_path / name).write_bytes(text.encode("cp1252"))
    made, names = corpus_of(
        tmp_path,
        tmp_path / "train.csv",
        test_source=str(tmp_path / "test.csv"),
        separator="~",
        encoding="cp1252",
        nulls=["n/a"],
    )
    assert len(made) == 61 and names == ["bad", "good"]
    assert sum("argent, très" in row["text"] for row in made) == 30


def test_what_is_told_reaches_the_pretraining_corpus(tmp_path):
    "Of the sources of one's own; the packaged ones need nothing."
    texts = [f"Le café numéro {i} était très bon, et le service aussi." for i in range(40)]
    rows = [(t, "x") for t in [*texts, "n/a"]]
    table = cases.csv_text(rows, delimiter="~", quoting=csv.QUOTE_ALL)
    (tmp_path / "own.csv").write_bytes(table.encode("cp1252"))
    told = dict(separator="~", encoding="cp1252", nulls=["n/a"])
    config = MixtureConfig(
        domains=[],
        extra_sources=[f"own={tmp_path / 'own.csv'}"],
        quality_rules=["own=none"],
        min_english=0,
        min_jaccard=1,
        **told,
    )
    folder = build_mixture(create_record(tmp_path / "record", "prose"), config=config)
    found = [r["text"] for s in ("train", "validation", "test") for r in read_mixture(folder, s)]
    assert set(found) == set(texts)
