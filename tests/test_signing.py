"""Signed bundles: whose signature counts, what a server opens, and what is typed."""

import base64
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="signing needs the extra `serve`")
pytest.importorskip("onnxruntime", reason="serving needs the extra `serve`")
pytest.importorskip("onnx", reason="the hand-made bundle is written with onnx")
from smallbundle import make_bundle

from llmeco_nb.core import DataError, MissingError, UsageError, read_json, write_json
from llmeco_nb.deployment.manifest import verify, write_manifest
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.deployment.sign_command import SignChoice, sign
from llmeco_nb.deployment.signing import (
    TrustedKeys,
    fingerprint,
    new_key,
    purpose,
    read_key,
    sign_bundle,
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("keys")
    for name in ("team", "other"):
        new_key(place / name)
    return place


@pytest.fixture
def bundle(tmp_path) -> Path:
    return make_bundle(tmp_path / "words")


@pytest.fixture(scope="module")
def trusted(keys) -> TrustedKeys:
    return TrustedKeys.read([keys / "team.pub"])


def test_only_what_a_trusted_key_has_signed_is_opened(bundle, keys, trusted):
    with pytest.raises(DataError, match="nobody has signed it"):
        Predictor.load(bundle, trusted=trusted)
    sign_bundle(bundle, keys / "other")
    with pytest.raises(DataError, match="which is not trusted here"):
        Predictor.load(bundle, trusted=trusted)
    sign_bundle(bundle, keys / "team")
    assert Predictor.load(bundle, trusted=trusted).digest == verify(bundle).digest
    both = TrustedKeys.read([keys / "other.pub", keys / "team.pub"])
    assert both.check(bundle, verify(bundle).digest) == next(iter(trusted.keys))
    assert Predictor.load(bundle).digest == verify(bundle).digest  # whoever asks nobody


def test_the_signature_is_that_of_openssl(bundle, keys, tmp_path):
    "A key that openssl made signs here, and openssl finds the signature right."
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    key, public = tmp_path / "k.pem", tmp_path / "k.pub"
    make = [openssl, "genpkey", "-algorithm", "ed25519", "-out", key]
    subprocess.run(make, check=True, capture_output=True)
    subprocess.run([openssl, "pkey", "-in", key, "-pubout", "-out", public], check=True)
    signed = sign_bundle(bundle, key)
    TrustedKeys.read([public]).check(bundle, verify(bundle).digest)
    (tmp_path / "sig").write_bytes(base64.b64decode(signed.signature))
    (tmp_path / "said").write_bytes((purpose + verify(bundle).digest).encode())
    check = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"]
    check += ["-in", tmp_path / "said", "-sigfile", tmp_path / "sig"]
    assert subprocess.run(check, capture_output=True, text=True).returncode == 0


def test_a_signature_of_another_bundle_is_refused(bundle, keys, trusted, tmp_path):
    other = make_bundle(tmp_path / "other", name="other")
    sign_bundle(other, keys / "team")
    shutil.copy(other / "signature.json", bundle / "signature.json")
    with pytest.raises(DataError, match="of another bundle, or forged"):
        trusted.check(bundle, verify(bundle).digest)


def test_every_flipped_bit_of_a_signature_is_refused(bundle, keys, trusted):
    sign_bundle(bundle, keys / "team")
    digest, told = verify(bundle).digest, read_json(bundle / "signature.json")
    raw = base64.b64decode(told["signature"])
    for at in range(0, 64, 7):
        spoiled = bytearray(raw)
        spoiled[at] ^= 1 << (at % 8)
        write_json(
            bundle / "signature.json", told | dict(signature=base64.b64encode(spoiled).decode())
        )
        with pytest.raises(DataError, match="forged"):
            trusted.check(bundle, digest)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"key": 1}', b'{"key": "a", "signature": "%%"}', b"[" * 9999, b"\xff"],
)
def test_a_signature_that_is_none_is_refused(bundle, trusted, content):
    (bundle / "signature.json").write_bytes(content)
    with pytest.raises(DataError, match="refused: signature.json is not as it is written"):
        trusted.check(bundle, verify(bundle).digest)


def test_a_new_manifest_has_no_signature(bundle, keys, trusted):
    sign_bundle(bundle, keys / "team")
    write_manifest(bundle, verify(bundle))
    assert not (bundle / "signature.json").exists()


def test_a_damaged_bundle_is_not_signed(bundle, keys):
    (bundle / "model.onnx").write_bytes(b"x")
    with pytest.raises(DataError, match="model.onnx is not the file that was packed"):
        sign_bundle(bundle, keys / "team")
    assert not (bundle / "signature.json").exists()


def test_keys_are_kept_from_others_and_never_replaced(keys, tmp_path):
    assert (keys / "team").stat().st_mode & 0o077 == 0
    before = (keys / "team").read_bytes()
    with pytest.raises(UsageError, match="never replaced"):
        new_key(keys / "team")
    assert (keys / "team").read_bytes() == before
    with pytest.raises(UsageError, match="cannot be written"):
        new_key(tmp_path / "nowhere" / "key")
    name = fingerprint(read_key(keys / "team", private=True).public_key())
    assert name == fingerprint(read_key(keys / "team.pub", private=False)) and len(name) == 16


def test_what_is_no_key_is_refused_by_its_file(keys, tmp_path):
    (tmp_path / "text").write_text("no key")
    for file, private in ((tmp_path / "text", True), (keys / "team.pub", True), (keys / "team", 0)):
        with pytest.raises(DataError, match=f"{file} holds no"):
            read_key(file, bool(private))
    with pytest.raises(MissingError, match="cannot be read"):
        TrustedKeys.read([tmp_path / "nowhere"])
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    other = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "ec").write_bytes(
        other.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    )
    with pytest.raises(DataError, match="another kind than Ed25519"):
        read_key(tmp_path / "ec", private=True)


# -- what is typed


def test_the_command_makes_a_key_and_signs_a_copy(bundle, tmp_path, capsys):
    sign(SignChoice(new_key=str(tmp_path / "k")))
    sign(SignChoice(str(bundle), key=str(tmp_path / "k"), to=str(tmp_path / "approved")))
    said = capsys.readouterr().out
    assert "is signed with the key" in said and "approved" in said
    assert not (bundle / "signature.json").exists()
    TrustedKeys.read([tmp_path / "k.pub"]).check(tmp_path / "approved", verify(bundle).digest)


@pytest.mark.parametrize(
    "choice,said",
    [
        (dict(), "Say what to sign"),
        (dict(bundle="b"), "Say what to sign"),
        (dict(bundle="b", new_key="k"), "Give it alone"),
    ],
)
def test_half_a_wish_is_refused(choice, said):
    with pytest.raises(UsageError, match=said):
        sign(SignChoice(**choice))


def test_what_a_run_has_made_is_not_changed(bundle, keys, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMECO_RUNS", str(tmp_path / "runs"))
    inside = shutil.copytree(bundle, tmp_path / "runs" / "store" / "bundle")
    with pytest.raises(UsageError, match="what a run has made is not changed"):
        sign(SignChoice(str(inside), key=str(keys / "team")))
    with pytest.raises(UsageError, match="exists. Name a new folder"):
        sign(SignChoice(str(inside), key=str(keys / "team"), to=str(bundle)))
    (tmp_path / "runs" / "linked").symlink_to(bundle)  # a store that lies elsewhere
    with pytest.raises(UsageError, match="what a run has made is not changed"):
        sign(SignChoice(str(tmp_path / "runs" / "linked"), key=str(keys / "team")))
    for folder in (Path(inside), bundle):
        assert not (folder / "signature.json").exists()


# -- the server


def test_a_server_follows_no_version_that_is_not_signed(bundle, keys, trusted, tmp_path):
    "It goes on answering with the signed one, and says why it does not follow."
    fastapi = pytest.importorskip("fastapi.testclient")
    import time

    from llmeco_nb.deployment.registry import Registry
    from llmeco_nb.deployment.server import make_app

    sign_bundle(bundle, keys / "team")
    where, stranger = tmp_path / "f.sqlite", make_bundle(tmp_path / "stranger", name="stranger")
    registry = Registry(where, actor="test")
    try:
        registry.promote(str(registry.register(bundle)))
        app = make_app(Predictor.load(bundle, trusted=trusted), where, trusted=trusted)
        with fastapi.TestClient(app) as client:
            first = client.post("/v1/predict", json=dict(text="good")).json()["model"]["digest"]
            registry.promote(str(registry.register(stranger)))
            until = time.monotonic() + 10
            while not app.state.follower.problem and time.monotonic() < until:
                time.sleep(0.05)
            assert "nobody has signed it" in app.state.follower.problem
            reply = client.post("/v1/predict", json=dict(text="good")).json()
            assert reply["model"]["digest"] == first == verify(bundle).digest
            sign_bundle(stranger, keys / "team")
            registry.roll_back()
            registry.promote(str(registry.models()[-1]), reason="signed now")
            until = time.monotonic() + 10
            while time.monotonic() < until:
                reply = client.post("/v1/predict", json=dict(text="good")).json()
                if reply["model"]["digest"] != first:
                    break
                time.sleep(0.05)
            assert reply["model"]["digest"] == verify(stranger).digest
    finally:
        registry.close()


def test_a_server_refuses_to_start_with_what_is_not_signed(bundle, keys, tmp_path):
    code = (
        "import sys; from llmeco_nb.cli import main; sys.exit(main())",
        *("serve", "--bundle", str(bundle), "--port", "0", "--trust", str(keys / "team.pub")),
    )
    done = subprocess.run(
        [sys.executable, "-c", *code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 4 and "nobody has signed it" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
