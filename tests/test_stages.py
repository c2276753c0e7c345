"Profiles and files of parameters: what is written is what a parameter gets."

import pytest

from llmeco_nb.cli import parse_settings
from llmeco_nb.core import UsageError, create_record
from llmeco_nb.data.corpus import CorpusConfig, build_corpus, label_names
from llmeco_nb.runner.identity import Parameter
from llmeco_nb.runner.stages import StageRegistry, read_profile, read_yaml


@pytest.fixture(scope="module")
def registry():
    return StageRegistry.find()


def profile_of(registry, folder, **files):
    "The stage `data` of a profile that has it alone, with the given texts as its YAML files."
    (folder / "p").mkdir(exist_ok=True)
    for name, text in {"pipeline": "stages:\n  data:\n", **files}.items():
        (folder / "p" / f"{name}.yaml").write_text(text)
    return read_profile(registry, str(folder / "p"))[0][0]


def test_columns_named_on_and_no(registry, tmp_path):
    "In a profile's file and in a file given with -f, down to the corpus."
    one = profile_of(registry, tmp_path, data="text_column: on\nlabel_column: no\n")
    assert (one.values["text_column"], one.values["label_column"]) == ("on", "no")
    (tmp_path / "norway.yaml").write_text("data:\n  text_column: on\n  label_column: no\n")
    given = parse_settings([], [tmp_path / "norway.yaml"])
    assert given == [("data", "text_column", "on"), ("data", "label_column", "no")]
    other = profile_of(registry, tmp_path, data="")
    for _, name, value in given:
        other.set({name: value}, "-f")
    assert other.values == one.values
    rows = [f"It is number {i}.,{'yes' if i % 2 else 'off'}\n" for i in range(40)]
    (tmp_path / "table.csv").write_text("".join(["on,no\n", *rows]))
    chosen = {k: other.values[k] for k in ("text_column", "label_column")}
    config = CorpusConfig(source=str(tmp_path / "table.csv"), **chosen)
    corpus = build_corpus(create_record(tmp_path / "run", "data"), config)
    assert label_names(corpus) == ["off", "yes"]


words = [
    "on",
    "off",
    "yes",
    "no",
    "True",
    "FALSE",
    "y",
    "n",
    "1.0",
    "1e5",
    "010",
    "0x1F",
    "1_000",
    "12:30",
    "2026-11-28",
    "2026-11-28 10:00:00",
    ".5",
    ".inf",
    ".nan",
    "+1",
    "<NA>",
    "None",
    "=",
]


@pytest.mark.parametrize("word", words)
def test_a_text_is_what_was_written(registry, tmp_path, word):
    "As a value, in a list, as a key, and in quotes."
    (tmp_path / "a.yaml").write_text(f"value: {word}\nlist: [{word}, '{word}']\n{word}: here\n")
    read = read_yaml(tmp_path / "a.yaml")
    assert read == {"value": word, "list": [word, word], word: "here"}
    assert Parameter("x", "str", "").coerce(read["value"]) == word
    assert Parameter("x", "list[str]", []).coerce(read["list"]) == [word, word]
    assert (
        profile_of(registry, tmp_path, data=f"text_column: {word}\n").values["text_column"] == word
    )


@pytest.mark.parametrize(
    "kind, written, value",
    [
        ("int", "400", 400),
        ("int", "1e5", 100_000),
        ("int", "010", 10),
        ("int", "-3", -3),
        ("float", "3e-4", 3e-4),
        ("float", ".5", 0.5),
        ("float", "2", 2.0),
        ("bool", "on", True),
        ("bool", "No", False),
        ("bool", "false", False),
        ("int | None", "null", None),
        ("int | None", "~", None),
        ("int | None", "", None),
        ("int | None", "7", 7),
        ("float | None", "Null", None),
        ("list[int]", "[1, 2]", [1, 2]),
        ("list[int]", "1, 2", [1, 2]),
        ("list[str]", "[a, no]", ["a", "no"]),
        ("Literal[1, 2]", "2", 2),
    ],
)
def test_types_come_from_the_parameter(tmp_path, kind, written, value):
    (tmp_path / "a.yaml").write_text(f"x: {written}\n")
    got = Parameter("x", kind, None).coerce(read_yaml(tmp_path / "a.yaml")["x"])
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "kind, written",
    [
        ("int", "on"),
        ("int", "12:30"),
        ("float", "yes"),
        ("bool", "2"),
        ("str", "null"),
        ("str", ""),
        ("str", "!!bool on"),
        ("list[int]", "[no]"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, kind, written):
    (tmp_path / "a.yaml").write_text(f"x: {written}\n")
    with pytest.raises(
        UsageError, match=r"data\.x(\[0\])? is .*(is wanted|Input should be a valid)"
    ):
        Parameter("x", kind, None).coerce(read_yaml(tmp_path / "a.yaml")["x"], "data")


def test_merged_mappings_still_work(tmp_path):
    (tmp_path / "a.yaml").write_text("base: &b {text: on}\ndata: {<<: *b, label: no}\n")
    assert read_yaml(tmp_path / "a.yaml")["data"] == {"text": "on", "label": "no"}


@pytest.mark.parametrize("prompts", ["It was [MASK]", "[MASK] is [MASK]", "[It was [MASK]]"])
def test_brackets_of_a_prompt_are_not_those_of_the_list(prompts):
    "As `-p pretrain.prompts=...` gives it."
    (found,) = Parameter("prompts", "list[str]", []).coerce(prompts)
    assert found == prompts.replace("[It", "It").replace("]]", "]")


def test_an_item_in_quotes_may_hold_a_comma():
    read = Parameter("prompts", "list[str]", []).coerce
    assert read("""["Well, then", 'a "b"', it's]""") == ["Well, then", 'a "b"', "it's"]
