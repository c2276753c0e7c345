"""The serving process, over real sockets: who hangs up is not computed, who says nothing keeps
nobody out, and a model that hangs does not keep the process from ending."""

import json
import shutil
import socket
import sqlite3
import ssl
import struct
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from served import COMMAND, ServeCommand, serving
from smallbundle import make_bundle

from llmeco_nb.deployment.executor import ExecutorOptions
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.deployment.server import make_app

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "words")


class Slow(Predictor):
    "Takes a moment for each text, and remembers what it was asked."

    pause = 0.0

    def predict(self, works):
        self.asked = getattr(self, "asked", []) + [work.text for work in works]
        time.sleep(self.pause * len(works))
        return super().predict(works)


def request(body, path="/v1/predict", *headers):
    "The bytes of a request."
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *headers]
    if not any(h.lower().startswith("transfer") for h in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def connected(address):
    one = socket.create_connection(address)
    one.settimeout(20)
    return one


def read_reply(s):
    "Status and body of an answer."
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := s.recv(65536)):
            break
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields.get(b"content-length", 0)):
        body += s.recv(65536)
    return int(head.split()[1]), json.loads(body)


def test_who_hangs_up_is_neither_computed_nor_stored(bundle, tmp_path):
    predictor = Slow.load(bundle)
    predictor.pause, predictor.asked = 0.02, []
    app = make_app(predictor, tmp_path / "f.sqlite", ExecutorOptions(slice_seconds=0.04))
    with serving(app) as address:
        predictor.asked.clear()
        first = connected(address)
        first.sendall(request(b'{"text": "first"}'))
        gone = [connected(address) for _ in range(40)]
        for i, one in enumerate(gone):
            one.sendall(request(json.dumps({"texts": [f"gone {i}"] * 8}).encode()))
        for one in gone:
            one.close()
        assert read_reply(first)[0] == 200
        first.sendall(request(b'{"text": "second"}'))  # the same connection again
        assert read_reply(first)[0] == 200
        first.close()
    left = sum(text.startswith("gone") for text in predictor.asked)
    assert left <= 40  # of 320
    with sqlite3.connect(tmp_path / "f.sqlite") as db:
        stored = [text for (text,) in db.execute("SELECT text FROM predictions")]
    assert {"first", "second"} <= set(stored) and len(stored) <= 2 + 16


def test_silent_connections_make_room(bundle, tmp_path):
    app = make_app(bundle, tmp_path / "f.sqlite")
    with serving(app, connections=20, header_seconds=2.0) as address:
        working = connected(address)
        working.sendall(request(b'{"text": "good"}'))
        assert read_reply(working)[0] == 200
        silent = [connected(address) for _ in range(60)]
        for one in silent[::2]:
            one.sendall(b"POST /v1/predict HTTP/1.1\r\nHo")
        begun = time.monotonic()
        asked = connected(address)
        asked.sendall(request(b'{"text": "good"}'))
        assert read_reply(asked)[0] == 200 and time.monotonic() - begun < 1.5
        closed = 0
        for one in silent:
            try:
                closed += one.recv(10) == b""
            except ConnectionResetError:
                closed += 1
        assert closed == 60 and time.monotonic() - begun < 6
        asked.sendall(b"POST /v1/predict HTT")  # a second request that is never finished
        assert asked.recv(10) == b"" and time.monotonic() - begun < 12


def count_open(connections):
    "Of some connections those that the server has not closed."
    time.sleep(0.3)
    there = 0
    for one in connections:
        one.setblocking(False)
        try:
            there += one.recv(1) != b""
        except BlockingIOError:
            there += 1
        except ConnectionResetError:
            pass
        one.settimeout(20)
    return there


def test_a_burst_keeps_to_the_limit_and_spares_who_asks(bundle, tmp_path):
    app = make_app(bundle, tmp_path / "f.sqlite")
    with serving(app, connections=10) as address:
        silent = [connected(address) for _ in range(6)]
        time.sleep(0.3)
        customer = connected(address)
        customer.sendall(request(b'{"text": "good"}'))
        assert read_reply(customer)[0] == 200
        more = [connected(address) for _ in range(60)]
        assert count_open([*silent, *more]) <= 10
        assert count_open(silent) == 0  # the longest first
        more = [connected(address) for _ in range(3)]
        assert count_open(more) == 3


def test_who_does_not_read_keeps_nobody_out(bundle, tmp_path):
    "Requests for pages without end, of which no answer is read."
    app = make_app(bundle, tmp_path / "f.sqlite")
    with serving(app, connections=3, header_seconds=1.5) as address:
        deaf = []
        for _ in range(3):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(address)
            one.settimeout(0.5)
            try:
                for _ in range(2000):
                    one.sendall(b"GET /docs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            except OSError:
                pass  # the server reads no more
            deaf.append(one)
        time.sleep(4)
        with connected(address) as one:
            one.sendall(request(b'{"text": "good"}'))
            assert read_reply(one)[0] == 200
        for one in deaf:
            one.close()


def test_requests_ahead_of_their_answers_are_bounded(bundle, tmp_path):
    predictor = Slow.load(bundle)
    predictor.pause = 0.02
    with serving(make_app(predictor, tmp_path / "f.sqlite")) as address, connected(address) as one:
        sent, part = 0, request(b'{"text": "good"}') * 500
        one.settimeout(5)
        with pytest.raises(OSError):
            for _ in range(300):
                one.sendall(part)
                sent += len(part)
        assert sent < 8e6


def test_who_sends_ahead_and_hangs_up_is_no_failure_of_ours(bundle, tmp_path):
    app = make_app(bundle, tmp_path / "f.sqlite")
    with serving(app) as address:
        with connected(address) as first:
            first.sendall(request(b'{"text": "good"}'))
            assert read_reply(first)[0] == 200
        for _ in range(10):
            one = connected(address)
            one.sendall(request(b'{"text": "good"}') * 12)
            # closed without a farewell, so that what is written then fails
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
        time.sleep(0.5)
        asked = connected(address)
        asked.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        told = b"".join(iter(lambda: asked.recv(65536), b"")).decode()
    assert 'status_code="200"' in told and 'status_code="500"' not in told


def test_of_requests_sent_ahead_the_one_at_work_is_given_up(bundle, tmp_path):
    predictor = Slow.load(bundle)
    predictor.pause, predictor.asked = 0.2, []
    app = make_app(predictor, tmp_path / "f.sqlite")
    with serving(app) as address:
        predictor.asked.clear()
        one = connected(address)
        texts = json.dumps({"texts": [f"no. {i}" for i in range(20)]}).encode()
        one.sendall(request(texts) * 2)
        time.sleep(0.3)
        one.close()
        time.sleep(1.0)
        asked = len(predictor.asked)
    assert 0 < asked < 20


UPGRADES = (
    ("Connection: Upgrade", "Upgrade: x"),
    ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIA"),
    ("upgrade: WebSocket", "connection: keep-alive, UPGRADE"),
    ("Connection: keep-alive", "Connection: Upgrade", "Upgrade: TLS/1.3, h2c"),
)


@pytest.mark.parametrize("more", UPGRADES, ids=str)
def test_a_protocol_that_is_not_spoken_is_passed_over(bundle, tmp_path, more):
    "Bodies with a length and in chunks, of one byte at a time too; and what is sent behind them."
    text = b'{"text": "good"}'
    chunked = b"".join(b"1\r\n%c\r\n" % one for one in text) + b"0\r\n\r\n"
    inner = b"GET /v1/model HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    plain = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    upgrade = plain + "\r\n".join(more).encode() + b"\r\n\r\n"
    with serving(make_app(bundle, tmp_path / "f.sqlite")) as address, connected(address) as one:
        for sent in (
            request(text, "/v1/predict", *more),
            request(chunked, "/v1/predict", *more, "Transfer-Encoding: chunked"),
        ):
            one.sendall(sent)
            status, told = read_reply(one)
            assert status == 200 and told["answers"][0]["label"] == "positive", told
        one.sendall(request(inner, "/v1/predict", *more))  # a body that looks like a request
        assert read_reply(one)[0] == 422
        for byte in request(text, "/v1/predict", *more):
            one.sendall(bytes([byte]))
        assert read_reply(one)[0] == 200
        one.sendall((upgrade + plain + b"\r\n") * 3 + plain + b"Connection: close\r\n\r\n")
        told = b"".join(iter(lambda: one.recv(65536), b""))
    assert told.count(b"HTTP/1.1 200") == 7 and told.count(b"HTTP/1.1") == 7, told


def test_a_protocol_that_is_not_spoken_keeps_the_order_of_answers(bundle, tmp_path):
    "The requests before and behind it are each answered once, in turn."
    texts = [f"film number {i}" for i in range(9)]
    more = UPGRADES[1]
    asked = [json.dumps({"text": text}).encode() for text in texts]
    sent = b"".join(
        request(body, "/v1/predict", *(more if i % 3 == 1 else ())) for i, body in enumerate(asked)
    )
    predictor = Slow.load(bundle)
    predictor.pause, predictor.asked = 0.01, []
    with serving(make_app(predictor, tmp_path / "f.sqlite")) as address, connected(address) as one:
        predictor.asked.clear()
        one.sendall(sent + b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        told = b"".join(iter(lambda: one.recv(65536), b""))
    assert told.count(b"HTTP/1.1 200") == 10 and predictor.asked == texts


def test_a_request_that_would_close_is_the_last_although_it_asks_for_another_protocol(
    bundle, tmp_path
):
    with serving(make_app(bundle, tmp_path / "f.sqlite")) as address, connected(address) as one:
        body = b'{"text": "good"}'
        last = request(body, "/v1/predict", "Connection: Upgrade, close", "Upgrade: h2c")
        one.sendall(last + request(body))
        told = b"".join(iter(lambda: one.recv(65536), b""))
    assert told.count(b"HTTP/1.1 200") == 1 and told.count(b"HTTP/1.1") == 1


def test_what_would_be_read_in_two_ways_is_refused_beside_an_upgrade(bundle, tmp_path):
    body = b"0\r\n\r\n"
    more = ("Connection: Upgrade", "Upgrade: h2c")
    with serving(make_app(bundle, tmp_path / "f.sqlite")) as address:
        for sent in (
            request(body, "/v1/predict", *more, "Transfer-Encoding: chunked", "Content-Length: 9"),
            request(body, "/v1/predict", *more, "Content-Length: 9"),
            request(body, "/v1/predict", *more, "X: a\r\n folded"),
            b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ):
            with connected(address) as one:
                one.sendall(sent + b"GET /v1/model HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                told = b"".join(iter(lambda: one.recv(65536), b""))
            assert told.startswith(b"HTTP/1.1 400") and told.count(b"HTTP/1.1") == 1, sent
            assert b"digest" not in told


def test_requests_for_another_protocol_are_bounded_like_others(bundle, tmp_path):
    predictor = Slow.load(bundle)
    predictor.pause = 0.02
    with serving(make_app(predictor, tmp_path / "f.sqlite")) as address, connected(address) as one:
        sent, part = 0, request(b'{"text": "good"}', "/v1/predict", *UPGRADES[1]) * 500
        one.settimeout(5)
        with pytest.raises(OSError):
            for _ in range(300):
                one.sendall(part)
                sent += len(part)
        assert sent < 8e6


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl to ask for HTTP/2 with")
def test_curl_that_would_rather_speak_http2_is_answered(bundle, tmp_path):
    with serving(make_app(bundle, tmp_path / "f.sqlite")) as (host, port):
        line = ["curl", "-s", "--http2", "-H", "Content-Type: application/json"]
        line += ["-d", '{"text": "good"}', f"http://{host}:{port}/v1/predict"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=30)
    assert json.loads(done.stdout)["answers"][0]["label"] == "positive", done.stdout + done.stderr


# -- over TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    "Certificate and key, made with the openssl of the system."
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    line += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*line, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


@pytest.fixture
def tls(certificate):
    "What a server speaks TLS with."
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    return context


def encrypted(address, certificate):
    "A connection whose handshake is complete."
    context = ssl.create_default_context(cafile=certificate[0])
    return context.wrap_socket(connected(address), server_hostname="127.0.0.1")


both_loops = pytest.mark.parametrize("loop", ["uvloop", "asyncio"])


@both_loops
def test_https_answers_on_either_event_loop(bundle, tmp_path, tls, certificate, loop):
    "Also what is sent in one packet with the end of the handshake, and much at once."
    body = json.dumps({"texts": ["good film " * 400] * 60}).encode()
    with serving(make_app(bundle, tmp_path / "f.sqlite"), tls=tls, loop=loop) as address:
        with encrypted(address, certificate) as one:
            for _ in range(3):
                one.sendall(request(body))
                status, told = read_reply(one)
                assert status == 200 and len(told["answers"]) == 60
        context = ssl.create_default_context(cafile=certificate[0])
        for _ in range(10):
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            talk = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
            with connected(address) as raw:
                while True:
                    try:
                        talk.do_handshake()
                        break
                    except ssl.SSLWantReadError:
                        raw.sendall(outgoing.read())
                        more = raw.recv(65536)
                        assert more, "closed amid the handshake"
                        incoming.write(more)
                talk.write(request(b'{"text": "good"}'))
                raw.sendall(outgoing.read())  # the handshake's last message and the request
                told = b""
                while b"positive" not in told:
                    try:
                        told += talk.read(65536)
                    except ssl.SSLWantReadError:
                        more = raw.recv(65536)
                        assert more, "closed without an answer"
                        incoming.write(more)
                assert told.startswith(b"HTTP/1.1 200")


@both_loops
def test_connections_without_a_handshake_make_room(bundle, tmp_path, tls, certificate, loop):
    app = make_app(bundle, tmp_path / "f.sqlite")
    hello = b"\x16\x03\x01\x02\x00\x01"  # of a first message that does not go on
    with serving(app, tls=tls, loop=loop, connections=20, header_seconds=1.0) as address:
        with encrypted(address, certificate) as working:
            working.sendall(request(b'{"text": "good"}'))
            assert read_reply(working)[0] == 200
            silent = [connected(address) for _ in range(60)]
            for one in silent[::2]:
                try:
                    one.sendall(hello)
                except OSError:
                    pass  # closed already
            begun = time.monotonic()
            assert count_open(silent) <= 20
            with encrypted(address, certificate) as asked:
                asked.sendall(request(b'{"text": "good"}'))
                assert read_reply(asked)[0] == 200
            closed = 0
            for one in silent:
                try:
                    closed += one.recv(10) == b""
                except ConnectionResetError:
                    closed += 1
            assert closed == 60 and time.monotonic() - begun < 6


@both_loops
def test_who_does_not_say_farewell_over_tls_is_not_waited_for(
    bundle, tmp_path, tls, certificate, loop
):
    "Closed connections hold no place, and the server ends without their word."
    app = make_app(bundle, tmp_path / "f.sqlite")
    last = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    with serving(app, tls=tls, loop=loop, connections=5, header_seconds=1.0) as address:
        kept = []
        for _ in range(12):
            one = encrypted(address, certificate)
            one.sendall(last)
            assert one.recv(4096).startswith(b"HTTP/1.1 200")
            kept.append(one)
        with encrypted(address, certificate) as one:
            one.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert one.recv(4096).startswith(b"HTTP/1.1 200")
            gone = 0
            for other in kept:
                raw = socket.socket(fileno=other.detach())
                raw.settimeout(5)
                while raw.recv(65536):  # until the server has closed it
                    pass
                gone += 1
                raw.close()
            assert gone == 12
        idle = encrypted(address, certificate)
        idle.sendall(request(b'{"text": "good"}'))
        assert read_reply(idle)[0] == 200
        begun = time.monotonic()
    assert time.monotonic() - begun < 2.5
    idle.close()


@pytest.mark.slow
def test_a_thousand_silent_clients_keep_nobody_out_of_https(bundle, tmp_path, certificate):
    "The command as it ships, which may open fewer files than there are clients."
    words = ("--bundle", bundle, "--database", tmp_path / "f.sqlite")
    words += ("--tls-cert", certificate[0], "--tls-key", certificate[1])
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (900, 900)); "
    server = ServeCommand(*words, code=limit + COMMAND)
    try:
        address = ("127.0.0.1", int(server.address.rpartition(":")[2]))
        silent = [connected(address) for _ in range(1000)]
        begun = time.monotonic()
        for _ in range(5):
            with encrypted(address, certificate) as one:
                one.sendall(request(b'{"text": "good"}'))
                assert read_reply(one)[0] == 200
        assert time.monotonic() - begun < 5
    finally:
        status, _, _ = server.end()
    assert status == 0
    for one in silent:
        one.close()


def test_pieces_of_a_byte_are_not_read_for_long(bundle, tmp_path):
    app = make_app(bundle, tmp_path / "f.sqlite")
    with serving(app) as address, connected(address) as one:
        begun = time.process_time()
        with pytest.raises((OSError, IndexError)):
            one.sendall(request(b"", "/v1/predict", "Transfer-Encoding: chunked"))
            for _ in range(300):
                one.sendall(b"1\r\nx\r\n" * 1000)
            read_reply(one)
        assert time.process_time() - begun < 1


def test_a_key_that_stands_twice_is_found_at_once():
    from starlette.exceptions import HTTPException

    from llmeco_nb.deployment.http_requests import strict_json

    body = json.dumps({f"key {i}": i for i in range(100_000)})[:-1] + ', "key 7": 1}'
    begun = time.process_time()
    with pytest.raises(HTTPException):
        strict_json(body.encode())
    assert time.process_time() - begun < 2


def test_a_header_without_end_is_cut_off(bundle, tmp_path):
    app = make_app(bundle, tmp_path / "f.sqlite")
    with serving(app, header_bytes=4096) as address, connected(address) as one:
        with pytest.raises((ConnectionResetError, BrokenPipeError, AssertionError)):
            one.sendall(b"GET / HTTP/1.1\r\n")
            for i in range(10_000):
                one.sendall(f"X-{i}: {'y' * 50}\r\n".encode())
            assert one.recv(10)


def test_what_is_not_http_is_told_so_in_our_form(bundle, tmp_path):
    app = make_app(bundle, tmp_path / "f.sqlite")
    with serving(app) as address:
        for rude in (
            b"HELLO\r\n\r\n",
            b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
            b"\x16\x03\x01" * 9,
        ):
            with connected(address) as one:
                one.sendall(rude + b"\r\n\r\n")
                status, body = read_reply(one)
                assert status == 400 and body["error"]["code"] == "wrong", body


def test_a_body_is_read_in_one_way(bundle, tmp_path):
    "Chunked is fine; a length beside it is not."
    app = make_app(bundle, tmp_path / "f.sqlite")
    text = b'{"text": "good"}'
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(text), text)
    with serving(app) as address:
        with connected(address) as one:
            one.sendall(request(chunked, "/v1/predict", "Transfer-Encoding: chunked"))
            assert read_reply(one)[0] == 200
        both = "Transfer-Encoding: chunked", f"Content-Length: {len(text)}"
        with connected(address) as one:
            one.sendall(request(chunked, "/v1/predict", *both))
            assert read_reply(one)[0] == 400


HANGS = """
import time
from llmeco_nb.deployment import serving
from llmeco_nb.deployment.predictor import Predictor

class Hangs(Predictor):
    def predict(self, works):
        if any(work.text == "hang" for work in works):
            time.sleep(1000)
        return super().predict(works)

serving.Predictor = Hangs
"""


@pytest.mark.slow
def test_a_model_that_hangs_is_seen_and_does_not_keep_the_process(bundle, tmp_path):
    words = ("--bundle", bundle, "--database", tmp_path / "f.sqlite")
    server = ServeCommand(*words, code=HANGS + COMMAND)
    try:
        address = ("127.0.0.1", int(server.address.rpartition(":")[2]))
        hanging = connected(address)
        hanging.sendall(request(b'{"text": "hang"}'))
        begun = time.monotonic()
        status = 200
        while status == 200 and time.monotonic() - begun < 8:
            time.sleep(0.3)
            with connected(address) as one:
                one.sendall(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                status, body = read_reply(one)
        assert status == 503 and "at work on a batch" in body["error"]["message"]
        with connected(address) as one:
            one.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert read_reply(one)[0] == 200
        assert read_reply(hanging)[0] == 503 and time.monotonic() - begun < 12
        time.sleep(1.5)  # until the batch is expected to take longer than a deadline
        hanging.sendall(request(b'{"text": "more"}'))
        assert read_reply(hanging)[0] == 429
        begun = time.monotonic()
        server.end()
        assert time.monotonic() - begun < 15
    finally:
        server.end()
