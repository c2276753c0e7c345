"""Layers that forget and compute again: the same numbers to the bit, in less memory, in any model,
also in the midst of a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from llmeco_nb.core import UsageError, create_record, open_record, sha256_of
from llmeco_nb.models.decoder import causal_loss, new_decoder
from llmeco_nb.training.activation_checkpointing import (
    MemoryTracker,
    checkpointed_layer_class,
    enable_activation_checkpointing,
    layers_of,
    saved_tensor_bytes,
)

IDS = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(0))


class Block(torch.nn.Module):
    """Keeps, by hand: its input, the first product (for GELU), GELU's result, and the dropout's
    mask."""

    def __init__(self, width):
        super().__init__()
        self.one, self.two, self.drop, self.calls = (
            torch.nn.Linear(width, 4 * width),
            torch.nn.Linear(4 * width, width),
            torch.nn.Dropout(0.3),
            0,
        )

    def forward(self, x, scale=1.0):
        self.calls += 1
        return x + scale * self.drop(self.two(torch.nn.functional.gelu(self.one(x))))


class Stack(torch.nn.Module):
    def __init__(self, depth, width=8):
        super().__init__()
        self.layers = torch.nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return x


def gradients(model, x):
    model.zero_grad()
    torch.manual_seed(3)
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@given(depth=st.integers(1, 6), every=st.integers(0, 7), rows=st.integers(1, 5), data=st.booleans())
def test_each_nth_layer_runs_twice_and_nothing_else_changes(depth, every, rows, data):
    torch.manual_seed(depth)
    model, x = (
        Stack(depth).train(),
        torch.randn(rows, 8, requires_grad=data),
    )  # an input that needs a gradient, or none
    before, names = gradients(model, x), [n for n, _ in model.named_parameters()]
    for layer in model.layers:
        layer.calls = 0
    after = gradients(enable_activation_checkpointing(model, every), x)
    chosen = [bool(every) and i % every == 0 for i in range(depth)]
    assert all(map(torch.equal, before, after)) and [layer.calls for layer in model.layers] == [
        2 if c else 1 for c in chosen
    ]
    assert (
        names == [n for n, _ in model.named_parameters()]
        and [type(layer) is not Block for layer in model.layers] == chosen
    )
    enable_activation_checkpointing(model, 0)
    assert all(type(layer) is Block for layer in model.layers)


def test_what_is_kept_is_what_arithmetic_says():
    model, x, r = Stack(5).train(), torch.randn(16, 8), 4 * 16
    kept_by = {}
    for every in (0, 1, 2):
        with saved_tensor_bytes(enable_activation_checkpointing(model, every)) as found:
            y = model(x)
        kept_by[every] = found.bytes
    a_layer = (kept_by[0] - kept_by[1]) / 5
    assert kept_by[1] >= 5 * r * 8 and kept_by[1] < kept_by[2] < kept_by[0]  # the inputs, at least
    assert abs(kept_by[2] - (kept_by[0] - 3 * a_layer)) <= 0.02 * kept_by[0] and a_layer > r * (
        32 + 32
    )
    assert y.shape == x.shape


def test_only_training_is_computed_again():
    model = enable_activation_checkpointing(Stack(3)).eval()
    model(torch.randn(2, 8)).sum().backward()
    model.train()
    with torch.no_grad():
        model(torch.randn(2, 8))
    assert [layer.calls for layer in model.layers] == [2, 2, 2]


def test_the_peak_falls_and_the_ledger_sees_it():
    peaks = {}
    for every in (0, 1):
        model = enable_activation_checkpointing(new_decoder(50, "8x32", 16).train(), every)
        with MemoryTracker() as ledger:
            causal_loss(model, IDS.repeat(8, 1), IDS.repeat(8, 1)).backward()
        peaks[every] = ledger.peak
    assert peaks[1] < 0.5 * peaks[0]


def test_stock_models_with_caches_and_two_stacks():
    from transformers import BartConfig, BartForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    qwen3 = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=24,
            max_position_embeddings=32,
            use_cache=True,
        )
    )
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=50,
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            dropout=0.2,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        )
    )
    for model, layers in ((qwen3, 2), (bart, 3)):
        config, found = model.config.to_json_string(), []
        for every in (0, 1):
            enable_activation_checkpointing(model.train(), every).zero_grad()
            torch.manual_seed(1)
            model(input_ids=IDS, labels=IDS).loss.backward()
            found.append([p.grad.clone() for p in model.parameters()])
        assert (
            len(layers_of(model)) == layers
            and all(map(torch.equal, *found))
            and model.config.to_json_string() == config
        )
        assert all(
            isinstance(layer, getattr(type(layer), "remembers")) for layer in layers_of(model)
        )  # still of its class, for whoever asks


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="activation_checkpointing is -1"):
        enable_activation_checkpointing(Stack(2), -1)
    with pytest.raises(UsageError, match="Linear has no ModuleList"):
        enable_activation_checkpointing(torch.nn.Linear(2, 2), 1)
    assert isinstance(enable_activation_checkpointing(torch.nn.Linear(2, 2), 0), torch.nn.Linear)
    assert (
        checkpointed_layer_class(Block) is checkpointed_layer_class(Block)
        and checkpointed_layer_class(Block).__name__ == "Block"
    )


def test_a_run_may_begin_to_forget_in_its_midst(tmp_path, at_step):
    """Out of memory at step 7 of a run that keeps everything; ended with layers that forget: the
    same bytes as a run that never did, or always."""
    from llmeco_nb.data.mixture import small_mixture
    from llmeco_nb.pretraining.causal import CausalConfig, pretrain_causal
    from llmeco_nb.pretraining.packing import small_subword_tokenizer
    from llmeco_nb.training.task import added_callbacks

    prose, toy = (
        small_mixture(),
        dict(
            size="2x32",
            context_length=32,
            steps=12,
            batch_size=4,
            lr=3e-3,
            eval_examples=8,
            num_evals=3,
            baseline_tokens=0,
        ),
    )

    def run(name, every):
        return pretrain_causal(
            create_record(tmp_path / name, "causal"),
            prose,
            small_subword_tokenizer(prose),
            CausalConfig(activation_checkpointing=every, **toy),
        )

    def rows(name):
        return [
            {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s", "roof_share")}
            for r in open_record(tmp_path / name, "causal").rows()
        ]

    run("remembers", 0), run("forgets", 1)

    def full(step):
        raise MemoryError

    with pytest.raises(MemoryError), added_callbacks(at_step(7, full)):
        run("both", 0)
    run("both", 2)
    assert (
        sha256_of(tmp_path / "both" / "decoder")
        == sha256_of(tmp_path / "remembers" / "decoder")
        == sha256_of(tmp_path / "forgets" / "decoder")
    )
    assert rows("both") == rows("remembers") == rows("forgets")


def test_compiled_layers_learn_the_same_and_repeatably(tmp_path):
    """Up to rounding what the plain ones learn; the same bytes each time, and with layers that
    forget."""
    from llmeco_nb.core import MissingError
    from llmeco_nb.data.mixture import small_mixture
    from llmeco_nb.pretraining.causal import CausalConfig, pretrain_causal
    from llmeco_nb.pretraining.packing import small_subword_tokenizer
    from llmeco_nb.training.compilation import torch_cpp_compiler

    try:
        torch_cpp_compiler()
    except MissingError as e:
        pytest.skip(str(e))
    prose, toy, made = (
        small_mixture(),
        dict(
            size="2x32",
            context_length=32,
            steps=6,
            batch_size=4,
            lr=3e-3,
            eval_examples=8,
            num_evals=2,
            baseline_tokens=0,
            precision="fp32",
            muon_lr=0.0,
        ),
        {},
    )
    for name, how in dict(
        plain={},
        compiled=dict(torch_compile=True),
        forgetful=dict(torch_compile=True, activation_checkpointing=1),
    ).items():
        pretrain_causal(
            create_record(tmp_path / name, "causal"),
            prose,
            small_subword_tokenizer(prose),
            CausalConfig(**toy, **how),
        )
        made[name] = (
            open_record(tmp_path / name, "causal").metrics["validation_loss"],
            sha256_of(tmp_path / name / "decoder"),
        )
    assert made["compiled"] == made["forgetful"] and made["compiled"][0] == pytest.approx(
        made["plain"][0], rel=1e-4
    )
