"""Files as users bring them, each rebuilt in a folder: `build(folder)` writes them all, and
`cases[name](folder)` one. Their rows are made up; what is odd about each is what was once reported
as a bug of some tool for text classification, data sets or notebooks."""

import bz2
import csv
import gzip
import io
import json
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

things = (
    "jacket shoes lamp order book kettle phone camera monitor mug table tent charger keyboard "
    "headset drone printer backpack chair cable"
).split()
cities = "Leeds Porto Graz Lyon Turku Brno Split Vigo Bonn Gent".split()
days = "Monday Tuesday Wednesday Thursday Friday today yesterday last-week".split()
footer = (
    "This message and any files sent with it are confidential and meant only for the person or "
    "company they are addressed to; please tell us if you got it by mistake."
)
long_name = (
    "dragonfly, or darning needle, or sewing needle, or snake feeder, or snake doctor, or mosquito "
    "hawk, or skeeter hawk, or whatever it is called"
)
Rows = list[tuple[str, str]]


def place(i: int) -> tuple[str, str, str]:
    "A thing, a city and a day, by a number."
    return things[i % 20], cities[i // 2 % 10], days[i // 3 % 8]


def good(i: int) -> str:
    thing, city, day = place(i)
    return f"The {thing} I bought on {day} in {city} works well and I like it number {i}."


def bad(i: int) -> str:
    thing, city, day = place(i)
    return f"My {thing} broke on {day} in {city} and I want my money back number {i}."


def two_classes(each: int = 60) -> Rows:
    "Rows of the classes bad and good, in turns."
    return [row for i in range(each) for row in ((bad(i), "bad"), (good(i), "good"))]


def csv_text(rows: Iterable[tuple], header: tuple = ("text", "label"), **dialect) -> str:
    "A table as the module csv writes it."
    out = io.StringIO(newline="")
    csv.writer(out, **dialect).writerows([header, *rows])
    return out.getvalue()


def put(folder: Path, name: str, text: str | bytes, encoding: str = "utf-8") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))


def tickets(folder: Path) -> None:
    dates = ("Monday", "last week", "yesterday", "the 3rd", "Friday")
    goods = ("blue jacket", "shoes", "lamp", "book")
    rows = [
        (sentence.format(thing, day), team)
        for sentence, team in (
            ("Where is the {}? It should have arrived {}.", "delivery"),
            ("I want to send the {} back, I got it {} and it does not fit.", "returns"),
            ("You charged me twice for the {} {}.", "billing"),
        )
        for thing in goods
        for day in dates
    ]
    put(folder, "bb_tickets.csv", csv_text(rows, ("message", "team")))


def unknown_class(folder: Path) -> None:
    sentences = {
        "0": good,
        "1": bad,
        "2": lambda i: f"Where can I find the manual for the {things[i % 20]}, item {i}?",
        "3": lambda i: f"Is there a student discount for the {things[i % 20]}, case {i}?",
        "4": lambda i: f"Shipping took until {days[i % 8]} but parcel {i} arrived.",
    }
    train = [(sentences[c](i), c) for c in "0124" for i in range(40)]
    test = [(sentences[c](i), c) for c in "0123" for i in range(500, 510)]
    put(folder, "c_train.csv", csv_text(train))
    put(folder, "c_test.csv", csv_text(test))


def declared_names(folder: Path) -> None:
    "A `ClassLabel` whose names look like numbers, in an order of their own."
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["1.0", "3.0", "5.0", "2.0", "4.0"]
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": names, "_type": "ClassLabel"},
    }
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    words = ("poor", "fair", "great", "weak", "fine")
    texts = [f"The {i} thing was {words[i % 5]} on day {i * 7}" for i in range(100)]
    table = pa.table({"text": texts, "label": [i % 5 for i in range(100)]})
    pq.write_table(table.replace_schema_metadata(said), folder / "b_classlabel_float.parquet")


def missing_values(folder: Path) -> None:
    import pandas as pd

    rows = two_classes()
    frame = pd.DataFrame(dict(text=[t for t, _ in rows], label=[int(k == "good") for _, k in rows]))
    frame = frame.astype({"text": "string", "label": "Int64"})
    frame.loc[5, "label"] = pd.NA
    frame.to_parquet(folder / "a_int64_na.parquet")
    frame.loc[7, "text"] = pd.NA
    frame.drop(index=5).to_parquet(folder / "a_string_na.parquet")


def escaped(folder: Path) -> None:
    say = lambda i, word: f"I {word} say the {place(i)[0]} from {place(i)[1]} was worth it, no. {i}"
    rows = [(say(i, "wouldn&#x27;t"), "bad") for i in range(160)]
    rows += [(say(i, "would"), "good") for i in range(160, 320)]
    put(folder, "cc_escaped.csv", csv_text(rows))


def reviews(folder: Path) -> None:
    "The layout of Maas et al.: 40 reviews of each class to train on, and 80 without one."
    for name, make, n in (("neg", bad, 40), ("pos", good, 40), ("unsup", good, 80)):
        for i in range(n):
            text = make(i + 1000 * (name == "unsup"))
            put(folder, f"d_aclImdb/train/{name}/{i}_{i % 10}.txt", text)
        put(folder, f"d_aclImdb/train/urls_{name}.txt", "http://example.org/usercomments\n" * n)
    put(folder, "d_aclImdb/imdbEr.txt", "1.0\n2.0\n")
    put(folder, "d_aclImdb/README", "A data set of reviews.\n")


def markup(folder: Path) -> None:
    names = ("Comedy|Drama", "<script>alert(1)</script>", "*_Action_* & `code`")
    rows = [(f"{' '.join(place(i))} {names[i % 3][2:5]} {i}", names[i % 3]) for i in range(360)]
    put(folder, "dd_markup.csv", csv_text(rows))


def thai(folder: Path) -> None:
    letters = "กขคงจชซญดตถทธนบปผฝพฟมยรลวสหอ"
    n = len(letters)
    tail = lambda i: "".join(letters[(i * k + k) % n] for k in range(3, 14))
    word = lambda i: letters[i % n] + letters[i // n] + tail(i)
    like = "ผมซื้อสินค้านี้เมื่อวันจันทร์ที่ร้านใกล้{}บ้านและรู้สึกว่าคุณภาพดีมากเพราะใช้งานได้นาน"
    hate = "สินค้าชิ้นนี้เสียตั้งแต่วันแรกที่ได้รับ{}และผมต้องการขอเงินคืนทันที"
    rows = [(like.format(word(i)), "ดี") for i in range(80)]
    rows += [(hate.format(word(i)), "แย่") for i in range(80, 160)]
    put(folder, "q_thai.csv", csv_text(rows))


def one_letter_apart(folder: Path) -> None:
    "Two words that a mark tells apart, in two languages."
    end = lambda i: f"{i} {cities[i % 10]} {things[i % 20]}"
    for name, pairs in (
        ("q_hindi.csv", (("यह अच्छा है", "यह"), ("यहाँ अच्छा है", "यहाँ"))),
        ("q_vietnamese.csv", (("má", "mother"), ("mạ", "seedling"))),
    ):
        rows = [(f"{text} {end(i)}", label) for text, label in pairs for i in range(80)]
        put(folder, name, csv_text(rows))


def variants(folder: Path) -> None:
    "Two classes under nine names."
    bads = ("bad", "Bad ", "ba\xadd", "BAD")
    goods = ("qualité", "Qualité", "quali\u200bté", unicodedata.normalize("NFD", "qualité"))
    names = {"bad": bads, "good": (*goods, "qualité\xa0")}
    rows = [(t, names[k][i // 2 % len(names[k])]) for i, (t, k) in enumerate(two_classes())]
    put(folder, "k_variants.csv", csv_text(rows))


def long_tail(folder: Path) -> None:
    rows = two_classes()
    for c in range(15):
        asked = [f"Only {c} asked about {things[c]} {i}" for i in range(1 + c % 2)]
        rows += [(text, f"rare-{c:02}") for text in asked]
    put(folder, "x_longtail.csv", csv_text(rows))


def separators(folder: Path) -> None:
    "Tables that a reader of comma-separated files takes for something else."
    rows = two_classes()
    commas = [(t.replace(" in ", ", in "), k) for t, k in rows]
    put(folder, "e_sep.csv", "sep=;\r\n" + csv_text(rows, delimiter=";"))
    priced = [(t, k, i) for i, (t, k) in enumerate(rows)]
    header = "text;label;price (EUR, incl. VAT)\n"
    body = csv_text(priced, delimiter=";", lineterminator="\n").partition("\n")[2]
    put(folder, "f_head.csv", header + body)
    numbered = [(i, t, k) for i, (t, k) in enumerate(commas)]
    put(folder, "g_pipe.csv", csv_text(numbered, ("id", "text", "label"), delimiter="|"))
    put(folder, "v_cr.csv", csv_text(commas, delimiter=";", lineterminator="\r"))
    quoted = "".join(f'"{t}", "{k}"\n' for t, k in (("text", "label"), *commas))
    put(folder, "w_space.csv", quoted)


def disguised(folder: Path) -> None:
    "Data that is something else than its name says."
    table = csv_text(two_classes()).encode()
    put(folder, "h_gz_inside.csv", gzip.compress(table))
    put(folder, "h_bz2_inside.csv", bz2.compress(table))
    with zipfile.ZipFile(packed := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("reviews.csv", table)
    put(folder, "h_zip_inside.csv", packed.getvalue())
    page = "<html lang='en'><head><title>Sign in, please</title></head><body>no</body></html>"
    put(folder, "h_html.csv", f"<!DOCTYPE html>\n{page}\n")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 1469\n"
    put(folder, "i_lfs.csv", pointer)


def encoded(folder: Path) -> None:
    rows = [(k, f"{t} costs £{i}", "", "", "") for i, (t, k) in enumerate(two_classes())]
    table = csv_text(rows, ("v1", "v2", "", "", ""))
    put(folder, "p03_spam_latin1.csv", table, "latin-1")


def json_by_another_rule(folder: Path) -> None:
    rows = two_classes()
    objects = (json.dumps(dict(text=t, label=k), indent=2) for t, k in rows)
    put(folder, "y_pretty.jsonl", "\n".join(objects))
    put(folder, "y_arrays.jsonl", "\n".join(json.dumps(row) for row in rows))


def simple(name: str, rows: Callable[[], Rows]) -> Callable[[Path], None]:
    "A case that is one ordinary file of these rows."
    return lambda folder: put(folder, name, csv_text(rows()))


def dollars() -> Rows:
    ask = lambda i: f"Where can I find the manual for the {things[i % 20]}, item {i}?"
    made = ((good, "$"), (bad, "$$"), (ask, "$$$"))
    return [(make(i), label) for make, label in made for i in range(40)]


def footers() -> Rows:
    return [(f"{text} {footer}", label) for text, label in two_classes(80)]


def long_names() -> Rows:
    label = lambda i: long_name if i % 2 else "butterfly"
    return [(f"{' '.join(place(i))} {label(i)[:9]} {i}", label(i)) for i in range(160)]


def few_frauds() -> Rows:
    rows = [(f"{' '.join(place(i))} {i}", "normal") for i in range(392)]
    return rows + [(f"{' '.join(place(i))} fraud {i}", "fraud") for i in range(8)]


cases: dict[str, Callable[[Path], None]] = {
    "a_*_na.parquet": missing_values,
    "aa_footer.csv": simple("aa_footer.csv", footers),
    "b_classlabel_float.parquet": declared_names,
    "bb_tickets.csv": tickets,
    "c_train.csv, c_test.csv": unknown_class,
    "cc_escaped.csv": escaped,
    "d_aclImdb": reviews,
    "dd_markup.csv": markup,
    "e, f, g, v, w": separators,
    "h_*, i_lfs.csv": disguised,
    "k_variants.csv": variants,
    "l_longlabel.csv": simple("l_longlabel.csv", long_names),
    "n_dollar.csv": simple("n_dollar.csv", dollars),
    "norway.yaml": lambda folder: put(folder, "norway.yaml", "data:\n  text: on\n  label: no\n"),
    "o_imbalanced.csv": simple("o_imbalanced.csv", few_frauds),
    "p03_spam_latin1.csv": encoded,
    "q_thai.csv": thai,
    "q_hindi.csv, q_vietnamese.csv": one_letter_apart,
    "x_longtail.csv": long_tail,
    "y_*.jsonl": json_by_another_rule,
}


def build(folder: Path) -> Path:
    """All files, in a folder that is there.

    Args:
        folder: Gets them.
    """
    for write in cases.values():
        write(folder)
    return folder
