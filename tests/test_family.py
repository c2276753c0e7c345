"""One block, eight stock classes: the same logits and gradients both ways, through memory and
through a folder, and refusals that name what no class has."""

import json

import pytest

torch = pytest.importorskip("torch")
from llmeco_nb.core import DataError, UsageError
from llmeco_nb.models.conversion import (
    architecture_of,
    architectures,
    attribute_map,
    config_from_stock,
    from_stock,
    required_options,
    save_pretrained,
    stock_class,
    stock_config,
    to_stock,
    weight_map,
)
from llmeco_nb.models.costs import extra_parameters
from llmeco_nb.models.transformer import Bert, Gpt, Seq2Seq, TransformerConfig

EIGHT = [name for name in architectures if name != "BertForMaskedLM"]


def shape(name: str) -> TransformerConfig:
    "Sizes that are all different, so that no mixed-up dimension fits by chance."
    ours, options = architectures[name]
    more = (
        dict(type_vocab_size=2, layer_norm_eps=1e-12)
        if ours is Bert
        else dict(activation="gelu_new", num_layers=2)
        if ours is Gpt
        else dict(num_decoder_layers=3, scale_embedding=name.startswith(("Marian", "Pegasus")))
    )
    return TransformerConfig(
        **dict(
            vocab_size=37,
            hidden_size=12,
            num_heads=3,
            intermediate_size=48 if name.startswith("OpenAI") else 20,
            num_layers=2,
            max_position_embeddings=11,
        )
        | options
        | more
    )


def wild(model, seed=0, spread=0.4):
    """Every parameter and the constant row random, norms and biases, too: at their first values a
    missing one would not show."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.requires_grad or n in ("bias", "final_logits_bias"):
                p.copy_(
                    torch.randn(p.shape, generator=g) * spread
                    + (0.6 if p.ndim == 1 and n.endswith("weight") else 0)
                )
    return model.eval()


G = torch.Generator().manual_seed(3)
IDS = torch.randint(4, 37, (3, 9), generator=G)
WRITTEN = torch.randint(4, 37, (3, 6), generator=G)
SEGMENTS = torch.randint(0, 2, (3, 9), generator=G)
KEEP = torch.ones(3, 9, dtype=torch.long)
KEEP[1, 6:], KEEP[2, 2:] = 0, 0


def outputs(model) -> list:
    "All logits at places that are no padding, of ours or of a stock model."
    kind = type(model).__name__
    if kind == "Bert":
        tokens, pair = model(IDS, KEEP, SEGMENTS)
        return [tokens[KEEP == 1], pair]
    if kind == "Gpt":
        return [model(IDS, KEEP)[KEEP == 1]]
    if kind == "Seq2Seq":
        return [model(IDS, WRITTEN, KEEP)]
    if kind == "BertForMaskedLM":
        return [model(IDS, attention_mask=KEEP, token_type_ids=SEGMENTS).logits[KEEP == 1]]
    if "Bert" in kind:
        found = model(IDS, attention_mask=KEEP, token_type_ids=SEGMENTS)
        return [found.prediction_logits[KEEP == 1], found.seq_relationship_logits]
    if "GPT" in kind:
        return [model(IDS, attention_mask=KEEP).logits[KEEP == 1]]
    return [model(input_ids=IDS, attention_mask=KEEP, decoder_input_ids=WRITTEN).logits]


def near(a, b):
    return all(
        x.shape == y.shape and (x - y).abs().max() < 1e-5
        for x, y in zip(outputs(a), outputs(b), strict=True)
    )


def test_there_are_eight_networks():
    assert len(EIGHT) == 8 and {ours for ours, _ in architectures.values()} == {Bert, Gpt, Seq2Seq}


@pytest.mark.parametrize("name", EIGHT)
def test_our_weights_in_their_class(name):
    ours = wild(architectures[name][0](shape(name)))
    theirs = to_stock(ours)
    assert type(theirs) is stock_class(name) and architecture_of(ours) == name
    assert near(ours, theirs)
    sum(o.square().sum() for o in outputs(ours)).backward()
    sum(o.square().sum() for o in outputs(theirs)).backward()
    mine = dict(ours.named_parameters())
    other = dict(theirs.named_parameters())
    for t, o, how in weight_map(name, ours.config):
        if t not in other or not other[t].requires_grad:
            continue
        expected = other[t].grad
        found = torch.cat([mine[n].grad for n in o])
        if how == "flip" and found.ndim == 2:
            found = found.mT
        if how == "two unused":
            expected = expected[2:]
        if expected is not None:
            torch.testing.assert_close(
                found, expected, atol=2e-4, rtol=2e-4, msg=lambda m: f"{t}: {m}"
            )


@pytest.mark.parametrize("name", EIGHT)
def test_their_weights_in_ours_and_back(name):
    theirs = wild(stock_class(name)(stock_config(name, shape(name))), seed=7)
    if architectures[name][1].get("position_embedding") == "sinusoidal":
        plain = stock_class(name)(stock_config(name, shape(name))).state_dict()
        # computed there, not learned
        theirs.load_state_dict(
            {k: v for k, v in plain.items() if k.endswith("embed_positions.weight")}, strict=False
        )
    theirs.tie_weights()
    ours = from_stock(theirs)
    assert (
        type(ours) is architectures[name][0] and ours.config == shape(name) and near(ours, theirs)
    )
    again = to_stock(ours, name)
    # two rows there are read by nobody
    read = lambda k, v: (
        v[2:]
        if architectures[name][1].get("position_embedding") == "learned"
        and architectures[name][0] is Seq2Seq
        and "embed_positions" in k
        else v
    )
    assert near(again, theirs) and all(
        torch.equal(read(k, v), read(k, again.state_dict()[k]))
        for k, v in theirs.state_dict().items()
    )


@pytest.mark.parametrize(
    "name,stock,opener",
    [
        ("BertForPreTraining", "", "AutoModelForPreTraining"),
        ("BertForPreTraining", "BertForMaskedLM", "AutoModelForMaskedLM"),
        ("GPT2LMHeadModel", "", "AutoModelForCausalLM"),
        ("MarianMTModel", "", "AutoModelForSeq2SeqLM"),
        ("BartForConditionalGeneration", "", "AutoModelForSeq2SeqLM"),
    ],
)
def test_a_folder_opens_in_plain_transformers(name, stock, opener, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    ours = wild(architectures[name][0](shape(name)))
    folder = save_pretrained(
        ours, tmp_path / "model", tmp_path / "tokenizer", stock, bos_token_id=1, eos_token_id=2
    )
    plain = stock_class(opener).from_pretrained(folder).eval()
    assert (
        type(plain).__name__
        == json.loads((folder / "config.json").read_text())["architectures"][0]
        == (stock or name)
        and (folder / "tokenizer.json").read_text() == "{}"
    )
    for a, b in zip(outputs(ours), outputs(plain)):
        assert (a - b).abs().max() < 1e-5
    if stock:
        return
    again = from_stock(plain)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize(
    "kind,options,named",
    [
        (
            Gpt,
            dict(position_embedding="sinusoidal", norm="pre", embedding_norm=False),
            "position_embedding='sinusoidal'",
        ),
        (Gpt, dict(norm="pre", embedding_norm=True), "embedding_norm=True"),
        (Gpt, dict(norm="pre", embedding_norm=False, scale_embedding=True), "scale_embedding=True"),
        (
            Gpt,
            dict(norm="post", embedding_norm=False, intermediate_size=20, activation="gelu_new"),
            "intermediate_size=20",
        ),
        (Bert, dict(norm="pre", type_vocab_size=2), "norm='pre'"),
        (Bert, dict(type_vocab_size=0), "type_vocab_size=0"),
        (
            Bert,
            dict(position_embedding="sinusoidal", type_vocab_size=2),
            "position_embedding='sinusoidal'",
        ),
        (Seq2Seq, dict(layer_norm_eps=1e-6), "layer_norm_eps=1e-06"),
        (
            Seq2Seq,
            dict(norm="pre", position_embedding="sinusoidal", embedding_norm=True),
            "position_embedding='sinusoidal'",
        ),
    ],
)
def test_what_no_stock_class_has_is_refused_by_name(kind, options, named, tmp_path):
    with pytest.raises(UsageError, match="No stock class has this network") as e:
        save_pretrained(
            kind(TransformerConfig(37, 12, 3, max_position_embeddings=11, **options)),
            tmp_path / "model",
        )
    assert named in str(e.value) and not (tmp_path / "model").exists()


def test_stock_options_that_are_not_ours_are_refused():
    gpt2 = stock_class("GPT2LMHeadModel")
    with pytest.raises(UsageError, match="scale_attn_by_inverse_layer_idx=True"):
        from_stock(
            gpt2(
                gpt2.config_class(
                    vocab_size=9,
                    n_embd=8,
                    n_head=2,
                    n_layer=1,
                    scale_attn_by_inverse_layer_idx=True,
                )
            )
        )
    with pytest.raises(UsageError, match="'tanh'"):
        config_from_stock(
            "GPT2LMHeadModel",
            gpt2.config_class(
                vocab_size=9, n_embd=8, n_head=2, n_layer=1, activation_function="tanh"
            ),
        )
    for ask in (
        lambda name: config_from_stock(name, gpt2.config_class()),
        lambda name: stock_config(name, shape("GPT2LMHeadModel")),
        lambda name: weight_map(name, shape("GPT2LMHeadModel")),
        lambda name: required_options(name, shape("GPT2LMHeadModel")),
        lambda name: extra_parameters(name, shape("GPT2LMHeadModel")),
        attribute_map,
    ):
        with pytest.raises(UsageError, match="RobertaModel is none of BertFor.*PegasusFor"):
            ask("RobertaModel")
    with pytest.raises(UsageError, match="Linear is none of"):
        from_stock(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="none of Bert, Gpt and Seq2Seq"):
        to_stock(torch.nn.Linear(2, 2))
    with pytest.raises(
        UsageError, match="name is 'MarianMTModel'; this network is a GPT2LMHeadModel"
    ):
        to_stock(Gpt(shape("GPT2LMHeadModel")), "MarianMTModel")
    odd = to_stock(Gpt(shape("GPT2LMHeadModel")))
    odd.transformer.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(DataError, match="transformer.extra"):
        from_stock(odd)
