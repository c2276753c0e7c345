"""What people should not have sent is in no log, no metric and no byte of the database, and the
model reads it all the same."""

import json
import logging
import random
import re
import warnings

import pytest

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from smallbundle import make_bundle

from llmeco_nb.data.personal_data import iban_lengths
from llmeco_nb.deployment.ledger import read_feedback
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.deployment.retention import Retention
from llmeco_nb.deployment.server import make_app
from llmeco_nb.interaction.corrections import stored_keys

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the test client about its HTTP library
    from fastapi.testclient import TestClient


def checked_card(chance):
    digits = [chance.choice("45"), *(chance.choice("0123456789") for _ in range(14))]
    for last in "0123456789":
        number = [int(d) for d in (*digits, last)]
        odd, even = number[-1::-2], (sum(divmod(2 * d, 10)) for d in number[-2::-2])
        if (sum(odd) + sum(even)) % 10 == 0:
            text = "".join(map(str, number))
            return chance.choice([text, " ".join(text[i : i + 4] for i in range(0, 16, 4))])


def checked_iban(chance):
    country = chance.choice(sorted(iban_lengths))
    account = "".join(chance.choice("0123456789") for _ in range(iban_lengths[country] - 4))
    number = int("".join(str(int(c, 36)) for c in f"{account}{country}00"))
    text = f"{country}{98 - number % 97:02}{account}"
    return chance.choice([text, " ".join(text[i : i + 4] for i in range(0, len(text), 4))])


def planted(chance):
    "A piece of personal data, by another program than the one that finds it."
    letters = lambda n: "".join(chance.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(n))
    digits = lambda n: "".join(chance.choice("0123456789") for _ in range(n))
    first = lambda n: chance.choice("23456789") + digits(n - 1)
    kinds = {
        "email": lambda: f"{letters(6)}.{letters(4)}{digits(2)}@{letters(5)}.{letters(3)}",
        "card": lambda: checked_card(chance),
        "iban": lambda: checked_iban(chance),
        "ip": lambda: ".".join(str(chance.randint(11, 254)) for _ in range(4)),
        "phone": lambda: chance.choice(
            [f"+49 {first(3)} {digits(7)}", f"({first(3)}) {first(3)}-{digits(4)}"]
        ),
    }
    kind = chance.choice(sorted(kinds))
    return kind, kinds[kind]()


def test_planted_data_are_in_no_log_no_metric_and_no_byte_of_the_database(tmp_path, caplog, capfd):
    chance = random.Random(0)
    pieces = [planted(chance) for _ in range(400)]
    seen, told = [], []
    predictor = Predictor.load(make_bundle(tmp_path / "words"))
    plain = predictor.model.model.scores

    def scores(texts):
        seen.extend(texts)
        if "break" in texts[0]:
            raise ValueError(f"cannot read {texts[0]}")  # as a library may write it
        return plain(texts)

    predictor.model.model.scores = scores
    where = tmp_path / "f.sqlite"
    caplog.set_level(logging.DEBUG)
    # the web server sees no error that it could write down
    with TestClient(make_app(predictor, where, log=told.append)) as c:
        for i, (_, piece) in enumerate(pieces):
            reply = c.post("/v1/predict", json={"text": f"good, reach me: {piece} please"})
            assert reply.status_code == 200
            if i % 4 == 0:
                said = dict(
                    request_id=reply.json()["request_id"], correct=False, note=f"I am {piece}"
                )
                assert c.post("/v1/feedback", json=said).status_code == 200
        asked = len(told)
        for _, piece in pieces[:20]:  # what is refused, and what fails, is not told to a log either
            assert c.post("/v1/predict", json={"text": piece, "more": piece}).status_code == 422
            assert c.get(f"/{piece.replace(' ', '')}", params={"q": piece}).status_code == 404
            assert c.post("/v1/predict", json={"text": f"break {piece}"}).status_code == 500
        figures = c.get("/metrics").text
    stored = b"".join(f.read_bytes() for f in tmp_path.glob("f.sqlite*"))
    out = "".join([*told, figures, *capfd.readouterr()])
    out += "".join(r.getMessage() for r in caplog.records if not r.name.startswith("httpx"))
    missed = [(k, p) for k, p in pieces if p.encode() in stored]
    recall = 1 - len(missed) / len(pieces)
    assert recall >= 0.95, (recall, missed[:10])
    assert not [p for _, p in pieces if p in out]
    assert sum(piece in text for _, piece in pieces for text in seen) >= len(pieces)
    masked = float(re.findall(r"^llmeco_masked_personal_data ([\d.e+]+)$", figures, re.M)[0])
    assert masked >= 0.95 * 500 and len(told) > asked
    failures = [one for one in map(json.loads, told) if one.get("event") == "failure"]
    assert len(failures) == 20 and {one["error"] for one in failures} == {"ValueError"}
    assert any("scores" in where for where in failures[0]["where"]), "where it happened is told"
    note = read_feedback(where)[0].note
    assert re.fullmatch(r"I am \[\w+\]", note)


def test_masking_can_be_left_out(tmp_path):
    bundle = make_bundle(tmp_path / "words")
    with TestClient(make_app(bundle, tmp_path / "f.sqlite", retention=Retention(mask=False))) as c:
        reply = c.post("/v1/predict", json={"text": "good, ann@example.org"}).json()
        c.post("/v1/feedback", json=dict(request_id=reply["request_id"], correct=True))
    assert read_feedback(tmp_path / "f.sqlite")[0].text == "good, ann@example.org"


def test_a_masked_text_is_found_again_in_the_test_set():
    "Else a text of the test set could be learned as a correction."
    keys = stored_keys(["Write to ann@example.org.", "plain"])
    assert stored_keys(["Write to [email]."]) <= keys and stored_keys(["PLAIN"]) <= keys
    assert len(keys) == 3
