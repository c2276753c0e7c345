"""Filters: rules take what they name and nothing else; checksums decide what is masked; the stream
accounts for every document."""

import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmeco_nb.data.filters import (
    FilterConfig,
    FilterReport,
    Rules,
    counts_by_domain,
    drop_repeated_lines,
    english_share,
    filter_documents,
    quality_rule,
    repeated,
    repeated_ngram_chars,
    repetition_rule,
    terminal_lines,
    top_ngram_chars,
)
from llmeco_nb.data.personal_data import iban_lengths, luhn, mask_pii, mod97

PROSE = (
    "When the ship came into the harbour that evening, nobody of the crew would have said that the "
    "voyage had been easy. They had lost two sails in the storm and most of the water had gone "
    "bad, yet the captain stood with his hands behind him and looked at the town as if he had "
    "never been away. His wife was waiting on the pier, and with her the old pilot, who had to be "
    "held by the arm. Of all the houses only one showed a light."
)


# ---- quality rules -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, text",
    [
        ("words", "Too short."),
        ("words", ""),
        ("word length", "of to be a b c d e f g h i j k " * 6),
        ("word length", "the of " + "incomprehensibilities " * 60),
        ("symbols", PROSE + " #tag" * 12),
        ("symbols", PROSE + " well..." * 12),
        ("alphabetic", PROSE + " 1234 5678" * 15),
        ("stop words", "menu home login basket shoes shirts hats socks boots belts " * 6),
        ("banned: lorem ipsum", PROSE + " Lorem ipsum dolor sit amet."),
        ("bullets", "\n".join("- " + s for s in PROSE.split(". "))),
        ("repeated lines", "\n".join([PROSE, *["and so on it went"] * 9])),
        ("ellipses", "\n".join(s + "..." for s in PROSE.replace(",", ".").split(". "))),
        ("repeated paragraphs", "\n\n".join([PROSE] * 3).replace("When", "When", 1)),
        ("top 2-gram", PROSE + " knock knock" * 50),
    ],
)
def test_each_rule_takes_its_text(rule, text):
    found = quality_rule(text)
    assert found == rule or (
        rule == "repeated paragraphs" and found == "repeated lines"
    )  # a repeated paragraph is a repeated line, too


def test_prose_stays_and_thresholds_are_arguments():
    assert quality_rule(PROSE) is None
    assert quality_rule(PROSE, Rules(words=(500, 1000))) == "words"
    assert quality_rule("Too short.", Rules(words=(1, 9), stop_words=0)) is None
    assert (
        quality_rule(PROSE, Rules(sentences=5)) == "sentences"
        and quality_rule(PROSE, Rules(sentences=3)) is None
    )
    assert quality_rule(PROSE + " {", Rules(banned=("{",))) == "banned: {"


words = st.lists(st.sampled_from("a bb ccc dddd the of to".split()), min_size=1, max_size=60)


def counted(words, n):
    "Characters in runs of `n` words that occurred before, counted by marking every word."
    marks = [False] * len(words)
    for i in range(len(words) - n + 1):
        if any(words[j : j + n] == words[i : i + n] for j in range(i)):
            marks[i : i + n] = [True] * n
    return sum(len(w) for w, m in zip(words, marks) if m)


@given(words, st.integers(1, 7))
def test_repeated_grams_are_counted(words, n):
    assert repeated_ngram_chars(words, n) == counted(words, n)
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    most = max((runs.count(r) for r in runs), default=0)
    assert top_ngram_chars(words, n) in (
        {sum(map(len, r)) * most for r in runs if runs.count(r) == most} if most > 1 else {0}
    )


@given(words)
def test_early_exits_change_no_verdict(words):
    text, rules = " ".join(words), Rules()
    plain = [
        f"top {n}-gram" for n, s in rules.top_ngrams if top_ngram_chars(words, n) > s * len(text)
    ] + [
        f"repeated {n}-grams" for n, s in rules.repeated_ngrams if counted(words, n) > s * len(text)
    ]
    assert repetition_rule(text, words, [text]) == (plain[0] if plain else None)


@given(st.lists(st.sampled_from(["a", "bb", "ccc"])))
def test_repeated(parts):
    again = [p for i, p in enumerate(parts) if p in parts[:i]]
    share, chars = repeated(parts)
    assert chars == sum(map(len, again)) and share == pytest.approx(len(again) / max(1, len(parts)))


@given(
    st.lists(
        st.sampled_from(
            ["short", "a line that is long enough to count", "another line that is long enough", ""]
        )
    )
)
def test_lines_once(lines):
    text = "\n".join(lines)
    kept = drop_repeated_lines(text).split("\n")
    assert drop_repeated_lines(drop_repeated_lines(text)) == drop_repeated_lines(text)
    assert (
        set(kept) == set(lines or [""])
        and all(kept.count(line) <= 1 for line in kept if len(line) >= 20)
        and [k for k in kept if len(k) < 20] == [k for k in text.split("\n") if len(k) < 20]
    )


def test_terminal_lines():
    assert (
        terminal_lines(
            "Home\nThis is a sentence.\nThis trails off...\nWe use cookies here.\nToo short."
        )
        == "This is a sentence."
    )
    assert terminal_lines("One very " + "long" * 300 + " word.") == ""


# ---- language ------------------------------------------------------------------------------------

FOREIGN = dict(
    german=(
        "Als das Schiff an jenem Abend in den Hafen einlief, hätte niemand von der Mannschaft "
        "gesagt, dass die Reise leicht gewesen sei. Sie hatten im Sturm zwei Segel verloren."
    ),
    french=(
        "Quand le navire entra dans le port ce soir-là, personne de l'équipage n'aurait dit que le "
        "voyage avait été facile. Ils avaient perdu deux voiles dans la tempête."
    ),
    spanish=(
        "Cuando el barco entró en el puerto aquella tarde, nadie de la tripulación habría dicho "
        "que el viaje había sido fácil. Habían perdido dos velas en la tormenta."
    ),
    italian=(
        "Quando la nave entrò nel porto quella sera, nessuno dell'equipaggio avrebbe detto che il "
        "viaggio era stato facile. Avevano perso due vele nella tempesta."
    ),
    dutch=(
        "Toen het schip die avond de haven binnenliep, zou niemand van de bemanning hebben gezegd "
        "dat de reis gemakkelijk was geweest. Ze hadden twee zeilen verloren."
    ),
    russian=(
        "Когда корабль в тот вечер вошёл в гавань, никто из команды не сказал бы, что плавание "
        "было лёгким. Они потеряли в шторм два паруса."
    ),
    japanese="その夜、船が港に入ったとき、乗組員の誰もその航海が楽だったとは言わなかっただろう。",
)


@pytest.mark.parametrize("language", FOREIGN)
def test_other_languages(language):
    assert english_share(FOREIGN[language]) == 0


def test_english_is_english():
    assert (
        english_share(PROSE) == 1 == english_share(PROSE.upper())
        and english_share(PROSE.replace("'", "’")) == 1
    )
    assert english_share("") == english_share("12 34 !?") == 0
    assert 0.2 < english_share(PROSE + " " + " ".join([FOREIGN["german"]] * 3)) < 0.8


@given(st.text(max_size=300))
def test_share_is_a_share(text):
    assert 0 <= english_share(text) <= 1


# ---- personal data -------------------------------------------------------------------------------

digits = lambda n: st.text("0123456789", min_size=n, max_size=n)


def check_digit(number: str) -> str:
    "The digit that makes `number` pass Luhn's test, by the table of doubled digits."
    doubled = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    return str(
        -sum(doubled[int(d)] if i % 2 == 0 else int(d) for i, d in enumerate(reversed(number))) % 10
    )


def spaced(number: str, sign: str, n: int = 4) -> str:
    return sign.join(number[i : i + n] for i in range(0, len(number), n))


@given(st.sampled_from("3456"), digits(14), st.sampled_from(["", " ", "-"]), st.integers(1, 9))
def test_cards_by_their_checksum(head, tail, sign, off):
    valid = head + tail + check_digit(head + tail)
    wrong = valid[:-1] + str((int(valid[-1]) + off) % 10)
    assert luhn(valid) and not luhn(wrong)
    assert mask_pii(f"Card {spaced(valid, sign)}, paid.") == ("Card [card], paid.", {"card": 1})
    text = f"Order {spaced(wrong, sign)}, paid."
    assert mask_pii(text) == (text, {})


def an_iban(country: str, bban: str) -> str:
    "The IBAN with its check digits, by schoolbook division, digit by digit."
    rest = 0
    for c in bban + country + "00":
        for d in c if c.isdigit() else str(ord(c) - 55):
            rest = (rest * 10 + int(d)) % 97
    return f"{country}{98 - rest:02}{bban}"


@given(
    st.sampled_from(sorted(iban_lengths)),
    st.data(),
    st.booleans(),
    st.sampled_from([".", " AND", ", thanks", " 12345", ""]),
)
def test_ibans_by_their_checksum(country, data, spaces, after):
    bban = data.draw(
        st.text(
            string.digits + "ABCDEFGHJKLMNPQRSTUVWXYZ",
            min_size=iban_lengths[country] - 4,
            max_size=iban_lengths[country] - 4,
        )
    )
    assume(sum(c.isdigit() for c in bban) >= 6)
    valid = an_iban(country, bban)
    place = data.draw(
        st.sampled_from([i for i in range(4, len(valid)) if valid[i].isdigit()])
    )  # one wrong digit is always found, a letter for a digit nearly always
    wrong = (
        valid[:place]
        + data.draw(st.sampled_from([c for c in string.digits if c != valid[place]]))
        + valid[place + 1 :]
    )
    show = (lambda n: spaced(n, " ")) if spaces else str
    assert mod97(valid) and mask_pii(f"To {show(valid)}{after}")[0].startswith(
        "To [iban]" + after[:1]
    ), valid
    assert not mod97(wrong) and "iban" not in mask_pii(f"To {show(wrong)}{after}")[1], wrong


@given(st.lists(st.integers(0, 255), min_size=4, max_size=4), st.integers(256, 999))
def test_ip4(parts, big):
    address = ".".join(map(str, parts))
    assert mask_pii(f"From {address}. Then") == ("From [ip]. Then", {"ip": 1})
    for other in (
        f"{address}.7",
        f"v{address}",
        f"version {address}",
        ".".join(map(str, [*parts[:3], big])),
        ".".join(map(str, parts[:3])),
    ):
        assert "ip" not in mask_pii(f"From {other} on")[1], other


@given(st.ip_addresses(v=6))
def test_ip6(address):
    assume(
        not address.is_loopback
        and not address.is_unspecified
        and sum(c.isdigit() for c in str(address))
        and str(address).count(":") >= 3
    )
    for form in (str(address), address.exploded):
        if any(c.isdigit() for c in form):
            assert mask_pii(f"at {form} now") == ("at [ip] now", {"ip": 1}), form


@pytest.mark.parametrize(
    "text, masked",
    [
        ("mail a.b+c@example.co.uk, soon", "mail [email], soon"),
        ("<jane_doe@mail-1.example.org>", "<[email]>"),
        ("call +44 20 7946 0958!", "call [phone]!"),
        ("+49 (0)30 901820", "[phone]"),
        ("+1-555-234-5678", "[phone]"),
        ("(555) 234-5678", "[phone]"),
        ("1-800-555-0199.", "[phone]."),
        ("555.234.5678", "[phone]"),
        ("2001:db8::1", "[ip]"),
        ("[fe80::1ff:fe23:4567:890a]", "[[ip]]"),
    ],
)
def test_masked(text, masked):
    assert mask_pii(text)[0] == masked


@pytest.mark.parametrize(
    "text",
    [
        "in 1984",
        "1914-1918",
        "2021-03-04 12:30:45",
        "12:30",
        "$1,299.99",
        "EUR 3.500.000",
        "1,234,567,890",
        "ISBN 978-3-16-148410-0",
        "ISBN 0-306-40615-2",
        "9783161484100",
        "Python 3.11.2",
        "version 1.2.3.4",
        "v10.20.30.40",
        "std::vector<int>",
        "a::b",
        "Foo::Bar2",
        "::",
        "3.14159265358979",
        "user@host",
        "@home",
        "a@b",
        "pages 123-456",
        "Psalm 119:105",
        "score 10:9",
        "101.202.303.404",
        "1.2.3",
        "0x1F4A9",
        "the years 1990, 1991, 1992, 1993",
        "5 x 4 = 20",
        "+5",
        "3+4=7",
        "20 000 000 people",
        "call 911",
        "1/2/2003",
        "12.05.2021",
        "room 2-104",
    ],
)
def test_left_alone(text):
    assert mask_pii(text) == (text, {})


@given(st.text("0123456789 .-()+:@abcXYZ[]", max_size=80))
def test_masking_is_idempotent_and_counts(text):
    masked, counts = mask_pii(text)
    again, more = mask_pii(masked)
    assert sum(masked.count(f"[{k}]") for k in ("email", "iban", "card", "ip", "phone")) >= sum(
        counts.values()
    )
    assert (masked == text) == (not counts)


# ---- the stream ----------------------------------------------------------------------------------

TWICE = PROSE.replace(". ", ".\n") + "\n" + "a line that is said twice here\n" * 2
texts = st.sampled_from(
    [
        PROSE,
        PROSE + "\nWrite to jane@example.org.",
        "short",
        "",
        "<br />",
        *FOREIGN.values(),
        TWICE,
        "<p>" + PROSE + "</p>",
    ]
)


@given(st.lists(texts, max_size=12))
@settings(max_examples=40)
def test_every_document_is_accounted_for(texts):
    report, documents = (
        FilterReport(),
        [{"id": str(i), "text": t, "domain": "d", "more": i} for i, t in enumerate(texts)],
    )
    kept = list(filter_documents(iter(documents), report))
    row = counts_by_domain(report).get("d", {"read": 0, "kept": 0})
    assert row["read"] == len(documents) == row["kept"] + sum(
        r.documents for r in report.removed.values()
    ) and row["kept"] == len(kept)
    assert [d["more"] for d in kept] == [i for i, t in enumerate(texts) if PROSE in t or t == TWICE]
    assert not any(
        "@" in d["text"] or "<" in d["text"] or d["text"].count("said twice") > 1 for d in kept
    )
    assert all(
        len(r.samples) == min(3, r.documents)
        for r in [*report.removed.values(), *report.changed.values()]
    )


def test_nothing_is_read_ahead():
    read = []

    def documents():
        for i in range(10**9):
            read.append(i)
            yield {"id": str(i), "text": PROSE, "domain": "d"}

    assert next(filter_documents(documents(), FilterReport()))["id"] == "0" and read == [0]


def test_steps_can_be_left_out():
    document = {"id": "x", "text": "Ein kurzer Satz, an jane@example.org.", "domain": "d"}
    for rules in (Rules(words=(1, 100), stop_words=0), None):
        config = FilterConfig(
            rules, min_english=0, mask_pii=False, clean=False, drop_repeated_lines=False
        )
        (kept,) = filter_documents([document], FilterReport(), config)
        assert kept == document


def test_the_account_is_by_domain_and_step():
    report, texts = (
        FilterReport(),
        {"a": [PROSE, "short", "short", ""], "b": [PROSE, FOREIGN["german"]]},
    )
    assert (
        len(
            list(
                filter_documents(
                    [
                        {"id": f"{d}{i}", "text": t, "domain": d}
                        for d, some in texts.items()
                        for i, t in enumerate(some)
                    ],
                    report,
                )
            )
        )
        == 2
    )
    assert counts_by_domain(report) == {
        "a": {"read": 4, "language": 2, "empty": 1, "kept": 1},
        "b": {"read": 2, "language": 1, "empty": 0, "kept": 1},
    }
    assert [s["id"] for s in report.removed["language"].samples] == [
        "a1",
        "a2",
        "b1",
    ] and counts_by_domain(FilterReport()) == {}
