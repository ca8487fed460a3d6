"""Which layers are adapted is said by name, is right on each architecture, and is never a guess.

pytest tests/test_inject.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from lorafit.errors import InputError
from lorafit.inject import (
    adapters_off,
    count_parameters,
    coverage,
    find_targets,
    inject_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
)
from lorafit.lora import LoRALinear
from lorafit.quant import BaseReport, Quantization, linear_layers, quantize_model

TinyLlama = Callable[..., LlamaForCausalLM]
DECODER = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = DECODER | {"intermediate_size": 128, "num_key_value_heads": 2}
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# What all_linear takes of each family, written down by hand from its modeling file: the kinds, and how many a layer.
CAUSAL: dict[str, tuple[PretrainedConfig, set[str], int]] = {
    "llama": (LlamaConfig(**GATED), SEVEN, 14),
    "mistral": (MistralConfig(**GATED), SEVEN, 14),
    "qwen3": (Qwen3Config(**GATED, head_dim=16), SEVEN, 14),
    "phi3": (Phi3Config(**GATED, pad_token_id=0), {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, 8),
    "gemma": (GemmaConfig(**GATED, head_dim=16), SEVEN, 14),
    "gpt2": (GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4), {"c_attn", "c_proj", "c_fc"}, 8),
    "gpt_neox": (
        GPTNeoXConfig(**DECODER, intermediate_size=128),
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        8,
    ),
    "falcon": (FalconConfig(**DECODER), {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, 8),
    "opt": (
        OPTConfig(**DECODER, ffn_dim=128, word_embed_proj_dim=64),
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
        12,
    ),
}


class Nets(nn.Module):
    """Two blocks, a convolution, attention whose out_proj is never called, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(2))
        self.conv = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0] + self.conv(x.mT).mT
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return self.second(self.first(x).relu())


def trained(model: nn.Module, **options: Any) -> list[str]:
    """Inject, and give B values as training would."""
    names = inject_lora(model, **({"rank": 4, "alpha": 8} | options))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    return names


@pytest.mark.parametrize("family", CAUSAL)
def test_all_linear_is_every_linear_layer_but_the_output_head(family: str) -> None:
    config, kinds, count = CAUSAL[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = find_targets(model, "all_linear")
    assert {name.rpartition(".")[2] for name in names} == kinds
    assert len(names) == count
    head = model.get_output_embeddings()
    assert head is not None
    assert all(model.get_submodule(name) is not head for name in names)


@pytest.mark.parametrize(
    ("model", "expected", "count"),
    [
        (lambda: AutoModelForMaskedLM.from_config(BertConfig(**DECODER, intermediate_size=128)), "dense", 2 * 6 + 1),
        (lambda: AutoModelForMaskedLM.from_config(RobertaConfig(**DECODER, intermediate_size=128)), "dense", 2 * 6 + 1),
        (lambda: T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=64, num_layers=2, d_ff=128)), "wo", 32),
        (lambda: BertForSequenceClassification(BertConfig(**DECODER, intermediate_size=128)), "dense", 2 * 6 + 1),
    ],
    ids=["bert", "roberta", "t5", "bert classifier"],
)
def test_all_linear_leaves_the_head_of_encoders_too(model: Callable[[], nn.Module], expected: str, count: int) -> None:
    names = find_targets(model(), "all_linear")
    assert len(names) == count
    assert expected in {name.rpartition(".")[2] for name in names}
    assert not {"lm_head", "decoder", "classifier"} & {name.rpartition(".")[2] for name in names}


def test_llama_2_7b_at_rank_8_on_q_and_v_has_the_published_counts() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    inject_lora(model, rank=8, alpha=16, target_modules=["q_proj", "v_proj"])
    mark_only_lora_as_trainable(model)
    trainable, total = count_parameters(model)
    assert (trainable, total) == (4_194_304, 6_742_609_920)
    assert round(100 * trainable / total, 4) == 0.0622


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantized_model_counts_the_parameters_that_it_stands_for(tiny_llama: TinyLlama, quant: str) -> None:
    plain, packed = tiny_llama(), tiny_llama()
    recipe = Quantization.of(quant)
    assert recipe is not None
    quantize_model(packed, recipe, torch.device("cpu"), BaseReport("test", recipe))
    total = sum(parameter.numel() for parameter in plain.parameters())
    assert count_parameters(packed)[1] == total
    names = inject_lora(packed, rank=4, alpha=8)
    mark_only_lora_as_trainable(packed)
    adapter = sum(4 * (layer.in_features + layer.out_features) for layer in lora_layers(packed).values())
    assert len(names) == 14
    assert count_parameters(packed) == (adapter, total + adapter)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ("q_proj", ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (["self_attn.q_proj"], ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (["v_proj", "q_proj"], [f"{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qv"]),
        (["model.layers.1.mlp.up_proj"], ["1.mlp.up_proj"]),
        (["1.mlp.up_proj", "0.self_attn.k_proj"], ["0.self_attn.k_proj", "1.mlp.up_proj"]),
        (r".*layers\.1\..*(up|down)_proj", ["1.mlp.up_proj", "1.mlp.down_proj"]),
        ([r".*\.0\.mlp\..*"], ["0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj"]),
        (["q_proj", "self_attn.q_proj"], ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
    ],
)
def test_a_target_is_a_name_a_dotted_end_or_an_expression(
    tiny_llama: TinyLlama, targets: str | list[str], expected: list[str]
) -> None:
    model = tiny_llama()
    names = inject_lora(model, rank=2, alpha=2, target_modules=targets)
    assert names == [f"model.layers.{name}" for name in expected]
    assert list(lora_layers(model)) == names
    assert all(type(model.get_submodule(name)) is LoRALinear for name in names)


def test_the_output_head_can_be_named(tiny_llama: TinyLlama) -> None:
    assert find_targets(tiny_llama(), ["lm_head"]) == ["lm_head"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["v_porj"], "'v_porj' matches no linear layer of LlamaForCausalLM .*Did you mean 'v_proj'"),
        (["q_proj", "v_porj"], "'v_porj' matches no linear layer.*Did you mean 'v_proj'"),
        ("all-linear", "Did you mean 'all_linear'"),
        (["self_atn.q_proj"], "Did you mean .*self_attn.q_proj"),
        (["proj"], "'proj' matches no linear layer"),
        (["q"], "'q' matches no linear layer"),
        ([r".*\.7\.mlp.*"], "matches no linear layer"),
        (["self_attn"], "'self_attn' is LlamaAttention, no linear layer. Its linear layers are k_proj, o_proj, q_proj"),
        (["norm"], "'norm' is LlamaRMSNorm, no linear layer"),
        (["q_proj("], "neither a name nor a regular expression"),
        ([], "target_modules is empty"),
    ],
)
def test_a_target_that_matches_no_linear_layer_is_an_error_and_changes_nothing(
    tiny_llama: TinyLlama, targets: str | list[str], message: str
) -> None:
    model = tiny_llama()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(InputError, match=message):
        inject_lora(model, rank=2, alpha=2, target_modules=targets)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("change", [{"rank": 0}, {"alpha": -1}, {"dropout": 1.0}, {"variant": "dora"}])
def test_an_impossible_value_changes_nothing(tiny_llama: TinyLlama, change: dict[str, Any]) -> None:
    model = tiny_llama()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(InputError, match=f"{next(iter(change))} must"):
        inject_lora(model, **({"rank": 2, "alpha": 2} | change))
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_a_model_without_layers_to_wrap_is_an_error() -> None:
    with pytest.raises(InputError, match="Linear has no linear layer"):
        inject_lora(nn.Linear(4, 4), rank=2, alpha=2)


def test_a_layer_under_two_names_is_wrapped_once_and_merged_once() -> None:
    model, x = Nets().eval(), torch.randn(2, 3, 8)
    names = trained(model)
    assert "first" in names
    assert "second" in names
    assert model.first is model.second
    assert [name for name in lora_layers(model) if name in ("first", "second")] == ["first"]
    assert coverage(model)["first"] == coverage(model)["second"] == {"wrapped": 1, "total": 1}
    assert set(coverage(model)) == {"up", "down", "first", "second"}
    live = model(x)
    assert merge_lora(model) is model
    assert type(model.first) is nn.Linear
    assert model.first is model.second
    torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)


def test_attention_that_uses_a_weight_without_calling_its_layer_is_left_out() -> None:
    model = Nets()
    assert isinstance(model.attention.out_proj, nn.Linear)
    assert "attention.out_proj" not in find_targets(model, "all_linear")
    assert "conv" not in find_targets(model, "all_linear")
    with pytest.raises(InputError, match="'out_proj' is NonDynamicallyQuantizableLinear"):
        find_targets(model, ["out_proj"])
    model.again = model.attention
    assert not [name for name in linear_layers(model) if "out_proj" in name]


def test_a_model_is_adapted_once(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    inject_lora(model, rank=2, alpha=2, target_modules=["q_proj"])
    with pytest.raises(InputError, match="carries LoRA layers already"):
        inject_lora(model, rank=2, alpha=2, target_modules=["v_proj"])
    merge_lora(model)
    assert inject_lora(model, rank=2, alpha=2, target_modules=["v_proj"])


def test_coverage_counts_each_kind_of_linear_layer(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    inject_lora(model, rank=2, alpha=2, target_modules=["q_proj", r".*\.0\.mlp\.up_proj"])
    none = {kind: {"wrapped": 0, "total": 2} for kind in SEVEN}
    some = {"q_proj": {"wrapped": 2, "total": 2}, "up_proj": {"wrapped": 1, "total": 2}}
    assert coverage(model) == none | some | {"lm_head": {"wrapped": 0, "total": 1}}


def test_coverage_of_a_mixture_of_experts_does_not_count_what_is_no_linear_layer() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**GATED, num_local_experts=4))
    inject_lora(model, rank=2, alpha=2)
    assert {kind: entry["wrapped"] for kind, entry in coverage(model).items() if entry["wrapped"]} == {
        kind: 2 for kind in ("q_proj", "k_proj", "v_proj", "o_proj")
    }


@pytest.mark.parametrize("family", CAUSAL)
def test_an_untrained_adapter_does_not_change_a_single_bit_of_the_logits(family: str) -> None:
    model = AutoModelForCausalLM.from_config(CAUSAL[family][0]).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        base = model(input_ids=ids, use_cache=False).logits
        inject_lora(model, rank=4, alpha=8)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, base)


@pytest.mark.parametrize("family", CAUSAL)
def test_merging_a_model_keeps_its_logits_and_its_layer_types(family: str) -> None:
    model = AutoModelForCausalLM.from_config(CAUSAL[family][0]).eval()
    ids = torch.arange(12).view(2, 6)
    types = {name: type(module) for name, module in model.named_modules()}
    with torch.no_grad():
        base = model(input_ids=ids, use_cache=False).logits
        trained(model)
        live = model(input_ids=ids, use_cache=False).logits
        merge_lora(model)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, live, rtol=1e-4, atol=1e-4)
    assert (live - base).abs().max() > 1e-2
    assert {name: type(module) for name, module in model.named_modules()} == types


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_with_adapters_off_the_model_is_its_base_and_afterwards_itself(tiny_llama: TinyLlama, dropout: float) -> None:
    model, ids = tiny_llama().eval(), torch.arange(12).view(2, 6)
    base = model(input_ids=ids).logits
    trained(model, dropout=dropout)
    adapters = list(lora_layers(model).items())
    live = model(input_ids=ids).logits
    assert (live - base).abs().max() > 1e-2
    with adapters_off(model):
        assert torch.equal(model(input_ids=ids).logits, base)
        assert not lora_layers(model)
        with adapters_off(model):
            assert torch.equal(model(input_ids=ids).logits, base)
    assert list(lora_layers(model).items()) == adapters
    assert torch.equal(model(input_ids=ids).logits, live)


def test_adapters_come_back_after_an_error_and_under_every_name() -> None:
    model = Nets()
    trained(model)
    with pytest.raises(KeyError), adapters_off(model):
        assert type(model.first) is type(model.second) is nn.Linear
        raise KeyError
    assert type(model.first) is LoRALinear
    assert model.first is model.second
    assert len(lora_layers(model)) == 5


def test_only_the_factors_are_trainable_after_marking(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    inject_lora(model, rank=2, alpha=2, target_modules=["q_proj"])
    assert model.model.norm.weight.requires_grad
    mark_only_lora_as_trainable(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(lora_state_dict(model))


def test_the_adapter_alone_carries_what_was_learned(tiny_llama: TinyLlama) -> None:
    model, twin, ids = tiny_llama(), tiny_llama(), torch.arange(12).view(2, 6)
    trained(model)
    inject_lora(twin, rank=4, alpha=8)
    state = lora_state_dict(model)
    assert len(state) == 2 * 14
    assert state["model.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 128)
    assert state["model.layers.0.mlp.down_proj.lora_B.weight"].shape == (64, 4)
    assert not torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    load_lora_state_dict(twin, state)
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_state_that_does_not_fit_is_listed_and_loads_nothing(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    trained(model, target_modules=["q_proj"])
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    wrong = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    missing, reshaped = "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.1.self_attn.q_proj.lora_B.weight"
    del wrong[missing]
    wrong[reshaped] = torch.zeros(64, 5)
    wrong["elsewhere.lora_A.weight"] = torch.zeros(4, 64)
    with pytest.raises(InputError) as caught:
        load_lora_state_dict(model, wrong)
    for part in (
        f"missing {missing}",
        "unused elsewhere.lora_A.weight",
        f"{reshaped} is (64, 5), the model's is (64, 4)",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora_state_dict(model).items())
