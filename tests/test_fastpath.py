"""Whatever path the modules of a model take, the model is the same; and what is said of the paths is what happens.

pytest tests/test_fastpath.py
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fused import FORMULAS, Kept, Products, close
from test_inject import CAUSAL, GATED
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from lorafit import fused
from lorafit.adapter import load_adapter, save_adapter
from lorafit.elementwise import EAGER, require_compiled
from lorafit.errors import InputError
from lorafit.fastpath import (
    ALONE,
    BLOCK,
    PLAIN,
    TOGETHER,
    FastLoRALinear,
    leave_fast_path,
    recomputes,
    take_fast_path,
    use_ops,
)
from lorafit.inject import (
    adapters_off,
    attach_adapter,
    detach_adapter,
    inject_lora,
    lora_layers,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    unmerge_lora,
)
from lorafit.lora import LoRALinear
from lorafit.module import FinetuneModule
from lorafit.quant import BaseReport, Quantization, dequantize, quantize_model
from lorafit.serving import Adapters

IDS = torch.arange(4, 28).view(2, 12)
LENGTHS = torch.arange(12) < torch.tensor([[12], [7]])
INPUTS: dict[str, dict[str, Tensor]] = {
    "no mask": {},
    "a mask of ones": {"attention_mask": torch.ones(2, 12, dtype=torch.long)},
    "padded right": {"attention_mask": LENGTHS.long()},
    "padded left": {"attention_mask": LENGTHS.flip(1).long()},
    "packed": {"position_ids": torch.cat((torch.arange(5), torch.arange(7))).expand(2, 12)},
}

# Families beside those of CAUSAL, with what makes their attention, norms or blocks differ from Llama's.
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
STRANGE: dict[str, tuple[str, dict[str, Any]]] = {
    "layers without positions": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}),
    "a window": ("mistral", {"sliding_window": 4}),
    "a window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "norms of 1 + w, a window": ("gemma3_text", {"head_dim": 16, "sliding_window": 4}),
    "norms of 1 + w, capped scores": ("gemma2", {"head_dim": 16, "sliding_window": 4}),
    "norms of the whole width after the block": ("olmo2", {}),
    "a norm without a weight": ("olmo", {}),
    "clipped queries": ("olmo", {"clip_qkv": 0.05}),
    "a scale of its own": ("granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    "experts": ("mixtral", EXPERTS),
    "experts and norms of queries": ("qwen3_moe", EXPERTS | {"head_dim": 16, "decoder_sparse_step": 2}),
    "a shared expert": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}),
    "positions that alternate": ("cohere", {}),
    "positions for half a head": ("stablelm", {}),
    "no gate": ("starcoder2", {}),
    "two products subtracted": ("diffllama", {}),
    "a mask that is computed": ("doge", {}),
    "norms after the positions": ("hunyuan_v1_dense", {"head_dim": 16}),
    "positions every other layer": ("exaone4", {"sliding_window": 4, "sliding_window_pattern": 2}),
    "positions for a part of a head": ("nemotron", {}),
    "positions for a part, experts": ("glm4_moe", EXPERTS | {"head_dim": 16, "n_routed_experts": 4}),
}


def model_of(family: str, seed: int = 0, attention: str = "sdpa", **options: Any) -> Any:
    """A tiny model whose vectors are no longer ones and zeros."""
    kind, more = STRANGE[family] if family in STRANGE else (family, {})
    if family in CAUSAL:
        config: PretrainedConfig = copy.deepcopy(CAUSAL[family][0])
        for name, value in options.items():
            setattr(config, name, value)
    else:
        config = AutoConfig.for_model(kind, **(GATED | {"pad_token_id": 0} | more | options))
    config.use_cache = False
    for name in ("attention_dropout", "residual_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    supported = "eager" if kind == "gemma2" else attention
    model = AutoModelForCausalLM.from_config(config, attn_implementation=supported)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def adapted(model: Any, quant: str | None = None, **options: Any) -> Any:
    """The model with trained adapters on all linear layers, in training."""
    if quant is not None:
        kind = Quantization.of({"type": quant, "compute_dtype": torch.float32} if quant != "int8" else quant)
        assert kind is not None
        quantize_model(model, kind, torch.device("cpu"), BaseReport("test", kind))
    inject_lora(model, **({"rank": 4, "alpha": 8} | options))
    mark_only_lora_as_trainable(model)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model.train()


def step(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits where there is a token, and the gradients of all trained parameters."""
    model.zero_grad()
    there = inputs.get("attention_mask", torch.ones_like(IDS)).bool()
    torch.manual_seed(3)
    logits = model(input_ids=IDS, **inputs).logits[there].float()
    (logits * torch.linspace(-1, 9, logits.numel()).view(logits.shape).sin()).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return logits.detach(), {
        name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None
    }


def same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Logits and gradients equal, each to a part of its largest number; a gradient also to a part of the largest of
    all, since some are no more than rounding."""
    (logits, gradients), (other_logits, others) = found, expected
    close((logits,), (other_logits,), tolerance)
    assert gradients.keys() == others.keys() and gradients
    largest = max(float(gradient.abs().max()) for gradient in others.values())
    for name, gradient in gradients.items():
        bound = tolerance * max(float(others[name].abs().max()), 1e-2 * largest)
        assert float((gradient - others[name]).abs().max()) <= bound, name


def kinds(paths: dict[str, str]) -> dict[str, str]:
    """The paths without why the layers of a module are not taken together."""
    return {name: ALONE if path.startswith(ALONE) else path for name, path in paths.items()}


def fast_and_plain(model: Any, **options: Any) -> tuple[Any, Any, dict[str, str]]:
    fast = copy.deepcopy(model)
    return fast, model, kinds(take_fast_path(fast, **options))


@contextlib.contextmanager
def overheard() -> Iterator[list[tuple[str, int]]]:
    """Within the context: which layers go through a step of fused.py, as (path, id of the layer)."""
    calls: list[tuple[str, int]] = []
    linears, swiglu = fused.linears, fused.swiglu

    def of_linears(ops: Any, layers: Any, *rest: Any) -> Any:
        calls.extend((TOGETHER if len(layers) > 1 else ALONE, id(layer)) for layer in layers)
        return linears(ops, layers, *rest)

    def of_swiglu(ops: Any, *layers: Any) -> Any:
        calls.extend((BLOCK, id(layer)) for layer in layers[:3])
        return swiglu(ops, *layers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "linears", of_linears)
        patch.setattr(fused, "swiglu", of_swiglu)
        yield calls


def taken(model: Any, **inputs: Any) -> dict[str, set[str]]:
    """By which paths each LoRA layer does run; none of them: as it is written down."""
    with overheard() as calls:
        model(input_ids=IDS, **inputs)
    return {name: {path for path, which in calls if which == id(layer)} for name, layer in lora_layers(model).items()}


# ------------------------------------------------------------------------------------------------ the same model


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", [*CAUSAL, *STRANGE])
def test_logits_and_gradients_are_those_of_the_plain_path(family: str, recompute: bool) -> None:
    fast, plain, _ = fast_and_plain(adapted(model_of(family)), recompute=recompute)
    for inputs in INPUTS.values():
        same(step(fast, inputs), step(plain, inputs))


@pytest.mark.parametrize("family", [*CAUSAL, *STRANGE])
def test_what_is_said_of_a_layer_is_how_it_runs(family: str) -> None:
    model = adapted(model_of(family))
    paths = kinds(take_fast_path(model))
    found = taken(model)
    assert paths.keys() == lora_layers(model).keys()
    for name, path in paths.items():
        # a layer of experts may have been given no token
        assert found[name] == {path} or (not found[name] and (path.startswith(PLAIN) or "expert" in name)), name


def test_the_paths_of_known_families_are_known() -> None:
    def paths(family: str) -> dict[str, str]:
        found = kinds(take_fast_path(adapted(model_of(family))))
        return {name.rpartition(".")[2]: path for name, path in found.items()}

    qkv, mlp = dict.fromkeys(("q_proj", "k_proj", "v_proj"), TOGETHER), ("gate_proj", "up_proj", "down_proj")
    for family in ("llama", "mistral", "qwen3"):
        assert paths(family) == qkv | {"o_proj": ALONE} | dict.fromkeys(mlp, BLOCK)
    # Gemma's activation is GELU, and its norm multiplies by 1 + w
    assert paths("gemma") == qkv | {"o_proj": ALONE} | dict.fromkeys(mlp, ALONE)
    assert set(paths("gpt2").values()) == set(paths("phi3").values()) == {ALONE}


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_over_a_quantized_base_the_model_is_the_same(quant: str, family: str, recompute: bool) -> None:
    fast, plain, paths = fast_and_plain(adapted(model_of(family), quant), recompute=recompute)
    assert not any(path.startswith(PLAIN) for path in paths.values())
    for name in ("no mask", "padded right", "packed"):
        # in 8 bits a rounding in the input moves whole codes
        same(step(fast, INPUTS[name]), step(plain, INPUTS[name]), 1e-5 if quant != "int8" else 3e-2)


@pytest.mark.parametrize(
    "target_modules",
    [
        ["q_proj", "v_proj"],
        ["k_proj"],
        ["down_proj"],
        ["gate_proj"],
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        ["gate_proj", "up_proj", "down_proj"],
        r".*layers\.1\.(self_attn\.v_proj|mlp\.up_proj)",
        ["embed_tokens", "o_proj"],
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_model_adapted_in_part_is_the_same(target_modules: Any, dropout: float) -> None:
    model = adapted(model_of("llama"), target_modules=target_modules, dropout=dropout)
    fast, plain, paths = fast_and_plain(model, recompute=True)
    assert set(paths) == {name for name, layer in lora_layers(model).items() if isinstance(layer, LoRALinear)}
    for name in ("no mask", "padded right", "packed"):
        same(step(fast, INPUTS[name]), step(plain, INPUTS[name]))


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "rslora"},
        {"dropout": 0.3},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head", "norm", "layers.1.input_layernorm"]},
        {"bias": "all"},
        {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
        {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"adapter_dtype": "nf4"},
        {"adapter_dtype": "int8", "dropout": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [False, True])
def test_with_every_option_of_the_adapter_the_model_is_the_same(options: dict[str, Any], recompute: bool) -> None:
    model = adapted(model_of("llama", attention_bias=True, mlp_bias=True), **options)
    fast, plain, paths = fast_and_plain(model, recompute=recompute)
    assert not any(path.startswith(PLAIN) for path in paths.values())
    same(step(fast, INPUTS["padded right"]), step(plain, INPUTS["padded right"]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_every_attention_function_and_its_dropout_give_the_same(attention: str, dropout: float) -> None:
    model = model_of("llama", attention=attention)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    fast, plain, _ = fast_and_plain(adapted(model))
    for inputs in INPUTS.values():
        same(step(fast, inputs), step(plain, inputs))


def test_more_queries_than_a_block_holds_are_attended_to_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "QUERIES", 5)
    monkeypatch.setattr(fused, "SCORES", 100)
    fast, plain, _ = fast_and_plain(adapted(model_of("qwen3")))
    for inputs in INPUTS.values():
        same(step(fast, inputs), step(plain, inputs))


def test_the_other_make_of_the_functions_gives_the_same_and_is_used() -> None:
    fast, plain, _ = fast_and_plain(adapted(model_of("qwen3")), recompute=True)
    use_ops(fast, FORMULAS)
    used = {module.fast_ops for module in fast.modules() if hasattr(module, "fast_ops")}
    assert used == {FORMULAS}
    same(step(fast, INPUTS["padded right"]), step(plain, INPUTS["padded right"]))


def test_a_base_in_16_bits_is_computed_in_16_bits() -> None:
    fast, plain, _ = fast_and_plain(adapted(model_of("llama").to(torch.bfloat16)))
    assert all(gradient.dtype == torch.float32 for gradient in step(fast, {})[1].values())
    same(step(fast, {}), step(plain, {}), 0.1)


def test_under_autocast_the_plain_layers_run() -> None:
    fast, plain, _ = fast_and_plain(adapted(model_of("llama")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not any(taken(fast).values())
        same(step(fast, {}), step(plain, {}), 0.1)


# ------------------------------------------------------------------------------------------------ nothing else changes


def test_only_the_class_of_a_module_changes_and_leaving_gives_it_back() -> None:
    model = adapted(model_of("llama"))
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    state, names = model.state_dict(), [name for name, _ in model.named_parameters()]
    take_fast_path(model, recompute=True)
    for name, module in model.named_modules():
        own = before[name][0]
        assert isinstance(module, own)
        if own is not LoRALinear:
            assert (type(module).__name__, type(module).__module__) == (own.__name__, own.__module__)
    kinds = {LlamaAttention, LlamaMLP, LlamaRMSNorm, LoRALinear}
    assert all(
        (type(module) is before[name][0]) != (before[name][0] in kinds) for name, module in model.named_modules()
    )
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    leave_fast_path(model)
    for name, module in model.named_modules():
        assert type(module) is before[name][0]
        assert vars(module).keys() == before[name][1].keys()
    assert not any(taken(model).values())


def test_taking_the_fast_path_draws_no_number_and_changes_no_mode() -> None:
    model = adapted(model_of("qwen3"), dropout=0.3)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    take_fast_path(model, recompute=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_copy_is_a_copy() -> None:
    model = adapted(model_of("llama"))
    take_fast_path(model)
    twin = copy.deepcopy(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    same(step(twin, {}), step(model, {}), 0.0)
    with torch.no_grad():
        for layer in lora_layers(twin).values():
            layer.lora_B.weight.zero_()
    assert not torch.equal(step(twin, {})[0], step(model, {})[0])


def test_with_adapters_off_the_model_is_its_base_bit_for_bit() -> None:
    base = model_of("llama")
    model = adapted(copy.deepcopy(base))
    take_fast_path(model)
    on = step(model, {})[0]
    with adapters_off(model), torch.no_grad():
        # a norm has no adapter and stays where it is: for the bits, both without a gradient and with its own class
        leave_fast_path(model)
        assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
    take_fast_path(model)
    assert torch.equal(step(model, {})[0], on)


def test_an_adapter_that_is_detached_takes_its_path_along() -> None:
    model = adapted(model_of("llama"))
    take_fast_path(model)
    expected = step(model, {})
    adapter = detach_adapter(model)
    assert not any(isinstance(module, FastLoRALinear) for module in model.modules())
    attach_adapter(model, adapter)
    assert all(taken(model).values())
    same(step(model, {}), expected, 0.0)


def test_merging_and_unmerging_are_those_of_the_plain_model() -> None:
    fast, plain, _ = fast_and_plain(adapted(model_of("llama")))
    expected = step(fast, {})
    merge_lora(fast, keep=True)
    merge_lora(plain)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in fast.state_dict().items())
    unmerge_lora(fast)
    same(step(fast, {}), expected, 0.0)


def test_an_adapter_is_saved_and_loaded_as_from_the_plain_model(tmp_path: Path) -> None:
    fast, plain, _ = fast_and_plain(adapted(model_of("llama")))
    save_adapter(fast, tmp_path / "fast")
    save_adapter(plain, tmp_path / "plain")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    again = model_of("llama")
    load_adapter(again, tmp_path / "fast")
    assert lora_state_dict(again).keys() == lora_state_dict(plain).keys()
    paths = take_fast_path(again)
    assert not any(path.startswith(PLAIN) for path in paths.values())
    with torch.no_grad():
        close((again.eval()(input_ids=IDS).logits,), (plain.eval()(input_ids=IDS).logits,), 1e-5)


def test_adapters_are_mixed_in_one_batch_as_on_the_plain_path() -> None:
    def logits(fast: bool) -> Tensor:
        model = model_of("llama")
        adapters = Adapters(model)
        for seed, name in enumerate(("one", "two")):
            torch.manual_seed(seed)
            adapted(model)
            if fast:
                take_fast_path(model)
            adapters_of_model = detach_adapter(model)
            adapters.add(name, adapters_of_model)
        model.eval()
        with torch.no_grad():
            with adapters.mixed(["two", None]):
                mixed = model(input_ids=IDS).logits
            adapters.use("one")
            return torch.cat((mixed, model(input_ids=IDS).logits))

    close((logits(True),), (logits(False),), 1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_generation_with_a_cache_writes_the_same_tokens(family: str) -> None:
    fast, plain, _ = fast_and_plain(adapted(model_of(family)))
    texts = [
        model.eval().generate(
            input_ids=IDS, attention_mask=LENGTHS.flip(1).long(), max_new_tokens=12, do_sample=False, use_cache=True
        )
        for model in (fast, plain)
    ]
    assert torch.equal(*texts) and texts[0].shape[1] > 12


def test_a_hook_on_a_part_that_the_step_would_not_call_is_called() -> None:
    model = adapted(model_of("llama"))
    take_fast_path(model)
    seen: list[str] = []
    layer = model.model.layers[0]
    watched = {
        "base": layer.self_attn.q_proj.base_layer,
        "A": layer.mlp.up_proj.lora_A,
        "o": layer.self_attn.o_proj,
        "gate": layer.mlp.gate_proj,
        "norm": layer.input_layernorm,
        "block": layer.mlp,
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    plain = step(copy.deepcopy(model), {})
    assert sorted(seen) == sorted(watched)
    leave_fast_path(model)
    same(step(model, {}), plain)


# ------------------------------------------------------------------------------------------------ what is not taken


class Tripled(nn.Linear):
    """A layer that computes more than x Wᵀ + b."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Capped(LlamaAttention):
    """Scores that are capped, through a function of its own."""

    def forward(self, *args: Any, **options: Any) -> Any:
        y, weights = super().forward(*args, **options)
        return y.tanh(), weights


class Scaled(LlamaAttention):
    """A scale that is told to the attention function and stands nowhere else."""

    def forward(self, *args: Any, **options: Any) -> Any:
        scaling, self.scaling = self.scaling, 0.5
        try:
            return super().forward(*args, **options)
        finally:
            self.scaling = scaling


class WithoutPositions(LlamaAttention):
    """A layer that does not turn its queries and keys."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **options: Any) -> Any:
        still = tuple(torch.full_like(each, number) for each, number in zip(position_embeddings, (1, 0), strict=True))
        return super().forward(hidden_states, position_embeddings=still, **options)


class OfPlaces(LlamaAttention):
    """Queries that grow with their place, which is asked for."""

    def forward(self, hidden_states: Tensor, position_ids: Any = None, **options: Any) -> Any:
        assert position_ids is not None, "places are needed"
        return super().forward(hidden_states=hidden_states * (1 + position_ids[..., None] / 9), **options)


class OfMasks(LlamaAttention):
    """A mask that is seen the other way round where there is one."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **options: Any) -> Any:
        mask = None if attention_mask is None else attention_mask | torch.ones_like(attention_mask).triu(2)
        return super().forward(hidden_states=hidden_states, attention_mask=mask, **options)


class BothWays(LlamaAttention):
    """Attention to what comes later, which the attention function is told by a word of its own."""

    def forward(self, hidden_states: Tensor, **options: Any) -> Any:
        return super().forward(hidden_states=hidden_states, **(options | {"is_causal": False}))


class Clipped(LlamaAttention):
    """An input that is cut where it is large."""

    def forward(self, hidden_states: Tensor, **options: Any) -> Any:
        return super().forward(hidden_states=hidden_states.clamp(-2, 2), **options)


class Dropping(LlamaAttention):
    """A dropout after the output, as in Starcoder2: nothing in evaluation."""

    def forward(self, *args: Any, **options: Any) -> Any:
        y, weights = super().forward(*args, **options)
        return F.dropout(y, 0.5, self.training), weights


class DroppingBlock(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Gelu(LlamaMLP):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.act_fn = nn.GELU()


class Swapped(LlamaMLP):
    """The activation on the other of the two."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Residual(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class OnePlus(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + F.rms_norm(hidden_states, hidden_states.shape[-1:], None, 1e-6)


ATTENTIONS = [Capped, Scaled, WithoutPositions, OfPlaces, OfMasks, Clipped, Dropping]


def with_part(model: Any, name: str, kind: type, layers: tuple[int, ...] = (0, 1)) -> Any:
    """Give a part of some layers another class of the same shape."""
    for index in layers:
        old = getattr(model.model.layers[index], name)
        new = kind(model.config, index) if name == "self_attn" else kind(model.config) if name == "mlp" else kind(64)
        new.load_state_dict(old.state_dict())
        setattr(model.model.layers[index], name, new)
    return model


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("self_attn", kind) for kind in ATTENTIONS),
        *(("mlp", kind) for kind in (Gelu, Swapped, Residual, DroppingBlock)),
        ("input_layernorm", OnePlus),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_module_that_computes_something_else_is_not_taken(name: str, kind: type, layers: tuple[int, ...]) -> None:
    fast, plain, paths = fast_and_plain(adapted(with_part(model_of("llama"), name, kind, layers)), recompute=True)
    assert all(type(getattr(fast.model.layers[index], name)) is kind for index in layers)
    for inputs in INPUTS.values():
        same(step(fast, inputs), step(plain, inputs))
    if name != "input_layernorm":
        inside = {path for layer, path in paths.items() if f"layers.1.{name}." in layer}
        assert inside == {ALONE}


@pytest.mark.parametrize("place", ["self_attn.q_proj", "mlp.down_proj", "self_attn.o_proj"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_base_that_computes_more_keeps_its_layer_plain_and_says_so(place: str, layer: int) -> None:
    model, name = model_of("llama"), f"model.layers.{layer}.{place}"
    old = model.get_submodule(name)
    new = Tripled(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    model.set_submodule(name, new)
    fast, plain, paths = fast_and_plain(adapted(model))
    assert paths[name] == f"{PLAIN}Tripled computes more than x Wᵀ + b"
    same(step(fast, {}), step(plain, {}))
    assert taken(fast)[name] == set()


@pytest.mark.parametrize("name", ["no mask", "a mask of ones"])
def test_attention_that_is_told_to_look_both_ways_does(name: str) -> None:
    fast, plain, _ = fast_and_plain(adapted(with_part(model_of("llama"), "self_attn", BothWays)))
    same(step(fast, INPUTS[name]), step(plain, INPUTS[name]))


class Noisy(LoRALinear):
    """A layer whose forward is another one in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0.1 if self.training else 0.0)


@pytest.mark.parametrize("place", ["self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"])
def test_a_layer_with_a_forward_of_its_own_keeps_it_and_so_do_those_beside_it(place: str) -> None:
    model = adapted(model_of("llama"))
    layer = model.get_submodule(f"model.layers.1.{place}")
    layer.__class__ = Noisy
    fast, plain, paths = fast_and_plain(model)
    assert paths[f"model.layers.1.{place}"] == f"{PLAIN}Noisy has a forward of its own"
    same(step(fast, {}), step(plain, {}))
    found = taken(fast)
    assert all(found[name] == ({path} if not path.startswith(PLAIN) else set()) for name, path in paths.items())


def test_beside_a_frozen_layer_that_computes_more_layers_run_alone_and_it_is_said() -> None:
    model = model_of("llama")
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        old = model.get_submodule(f"model.layers.1.{name}")
        new = Tripled(old.in_features, old.out_features, bias=False)
        new.load_state_dict(old.state_dict())
        model.set_submodule(f"model.layers.1.{name}", new)
    adapted(model, target_modules=["q_proj", "gate_proj", "down_proj"])
    fast, plain, paths = fast_and_plain(model)
    same(step(fast, {}), step(plain, {}))
    found = taken(fast)
    assert all(found[name] == {path} for name, path in paths.items())
    assert {path for name, path in paths.items() if "layers.1" in name} == {ALONE}


def test_a_base_that_multiplies_in_another_dtype_than_flows_runs_plain_and_says_so() -> None:
    model, quant = model_of("llama"), Quantization("nf4", compute_dtype=torch.bfloat16)
    quantize_model(model, quant, torch.device("cpu"), BaseReport("test", quant))
    fast, plain, paths = fast_and_plain(adapted(model))
    assert set(paths.values()) == {f"{PLAIN}it multiplies in bfloat16 what comes in float32"}
    assert not any(taken(fast).values())
    same(step(fast, {}), step(plain, {}))


def test_to_take_it_again_says_the_same_and_may_choose_otherwise() -> None:
    model = adapted(model_of("llama"))
    first = take_fast_path(model)
    assert take_fast_path(model, ops=FORMULAS, recompute=True) == first
    assert recomputes(model) and {m.fast_ops for m in model.modules() if hasattr(m, "fast_ops")} == {FORMULAS}
    assert all(taken(model).values())


def test_a_norm_that_somebody_writes_into_is_not_taken_for_what_it_was() -> None:
    model = adapted(model_of("llama"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.abs_()
    fast, plain, _ = fast_and_plain(model, recompute=True)
    for each in (fast, plain):
        for layer in each.model.layers:
            # after the norm, before the attention: no hook of the norm, which would keep it from the fast path
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, options: (args, options | {"hidden_states": options["hidden_states"].mul_(2)}),
                with_kwargs=True,
            )
            layer.mlp.register_forward_pre_hook(lambda _, args: (args[0].mul_(2),))
    same(step(fast, {}), step(plain, {}))


def test_fused_off_is_a_reason_too() -> None:
    made = FinetuneModule(model_of("llama"), rank=4, alpha=8, fused="off")
    made.configure_model()
    assert set(made.paths.values()) == {"plain: fused=off"} and len(made.paths) == 14
    assert made.model is not None and not any(taken(made.model).values())
    made = FinetuneModule(model_of("llama"), rank=4, alpha=8)
    made.configure_model()
    assert made.model is not None and all(taken(made.model).values())
    assert set(made.paths.values()) == {TOGETHER, ALONE, BLOCK}


def test_the_module_says_which_values_fused_and_compile_have() -> None:
    for key in ("fused", "compile", "checkpointing"):
        with pytest.raises(InputError, match=f"{key} must be one of .*got 'of'"):
            FinetuneModule(**{key: "of"})


def test_norms_are_kept_or_made_anew_as_asked() -> None:
    model = adapted(model_of("llama"))
    assert not recomputes(model)
    take_fast_path(model)
    assert not recomputes(model)
    leave_fast_path(model)
    take_fast_path(model, recompute=True)
    assert recomputes(model)


# ------------------------------------------------------------------------------------------------ below the first


def outputs_that_need_a_gradient(model: Any, **inputs: Any) -> set[str]:
    found: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor) and output.requires_grad:
                found.add(name)

        return hook

    handles = [layer.register_forward_hook(note(f"layer {index}")) for index, layer in enumerate(model.model.layers)]
    handles.append(model.model.embed_tokens.register_forward_hook(note("embedding")))
    model(input_ids=IDS, **inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("target", ["self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj", ".*"])
def test_below_the_first_adapted_layer_nothing_needs_a_gradient_and_nothing_is_kept(
    target: str, recompute: bool
) -> None:
    kept = []
    for layers in (1, 3, 5):
        model = model_of("llama", num_hidden_layers=layers)
        adapted(
            model,
            target_modules=rf".*layers\.{layers - 1}\.({target})"
            if target == ".*"
            else f"layers.{layers - 1}.{target}",
        )
        take_fast_path(model, recompute=recompute)
        assert outputs_that_need_a_gradient(model) == {f"layer {layers - 1}"}
        with Kept(*model.parameters()) as saved:
            logits = model(input_ids=IDS).logits
        kept.append(saved.bytes)
        del logits
    assert kept[0] == kept[1] == kept[2] > 0


def test_of_the_first_adapted_layer_the_gradient_of_the_input_is_not_computed() -> None:
    model = adapted(model_of("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=128))
    take_fast_path(model)
    logits = model(input_ids=IDS).logits
    with Products() as counted:
        logits.sum().backward()
    tokens, hidden, middle, rank = IDS.numel(), 64, 128, 4
    base = 96 * hidden + 3 * hidden * middle + hidden * hidden  # the head, the block and o; not q, k and v
    # each layer: dB and G B over its outputs, dA and its part of dX over its inputs; down's G B twice; no dX of q, k, v
    thin = sum(2 * rank * (layer.in_features + layer.out_features) for layer in lora_layers(model).values())
    assert counted.work == tokens * (base + thin + rank * hidden - 3 * rank * hidden)


# ------------------------------------------------------------------------------------------------ numerics


def total_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The norm of the difference of all gradients, as a part of the norm of them all."""
    assert found.keys() == exact.keys() and len(found) == 28
    apart = sum(float((found[name].double() - exact[name].double()).square().sum()) for name in exact)
    return (apart / sum(float(gradient.double().square().sum()) for gradient in exact.values())) ** 0.5


def trained_on(model: Any) -> dict[str, Tensor]:
    """The gradients of A and B by their names in the base, of the loss of four texts."""
    ids = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(1))
    logits = model.train()(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()).backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): gradient
        for name, gradient in named.items()
        if gradient is not None
    }


@pytest.fixture(scope="module", params=["none", "nf4"])
def systems(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Tensor], float]:
    """(an adapted model in bfloat16, its exact gradients, the error of peft's, the smaller of two settings)."""
    peft = pytest.importorskip("peft")
    config = LlamaConfig(**(GATED | {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 688}), use_cache=False)
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    exact = copy.deepcopy(base).float()
    if request.param == "nf4":
        quantize_model(base, Quantization("nf4"), torch.device("cpu"), BaseReport("test", Quantization("nf4")))
        for name, layer in exact.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                layer.weight.data = dequantize(base.get_submodule(name)).float()
    theirs = [copy.deepcopy(base) for _ in range(2)]
    for model in (base, exact):
        inject_lora(model, rank=16, alpha=32)
        mark_only_lora_as_trainable(model)
        torch.manual_seed(2)
        for layer in lora_layers(model).values():
            # numbers that bfloat16 holds: what is compared is the arithmetic, not the rounding of A and B
            layer.lora_A.weight.data = layer.lora_A.weight.data.bfloat16().float()
            layer.lora_B.weight.data = (0.02 * torch.randn_like(layer.lora_B.weight)).bfloat16().float()
    lora_layers_of = lora_layers(base)
    for name, layer in lora_layers(exact).items():
        layer.load_state_dict(
            {key: value for key, value in lora_layers_of[name].state_dict().items() if "lora" in key}, strict=False
        )
    gradients, errors = trained_on(exact), []
    state = {f"base_model.model.{name}": tensor for name, tensor in lora_state_dict(base).items()}
    for model, in_float32 in zip(theirs, (True, False), strict=True):
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", bias="none")
        adapted_by_peft = peft.get_peft_model(model, lora, autocast_adapter_dtype=in_float32)
        if not in_float32:
            for name, parameter in adapted_by_peft.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.bfloat16()
        found = peft.set_peft_model_state_dict(adapted_by_peft, state)
        assert not found.unexpected_keys
        errors.append(total_error(trained_on(adapted_by_peft), gradients))
    return base, gradients, min(errors)


@pytest.mark.parametrize("make", ["eager", "compiled"])
@pytest.mark.parametrize("recompute", [False, True])
def test_in_16_bits_the_gradient_is_no_further_from_the_exact_one_than_pefts(
    systems: tuple[Any, dict[str, Tensor], float], make: str, recompute: bool
) -> None:
    base, exact, error_of_peft = systems
    assert 1e-4 < error_of_peft < 0.1
    ops = EAGER
    if make == "compiled":
        try:
            ops = require_compiled(torch.device("cpu"))
        except InputError as error:
            pytest.skip(str(error))
    model = copy.deepcopy(base)
    paths = take_fast_path(model, ops=ops, recompute=recompute)
    assert set(paths.values()) == {TOGETHER, ALONE, BLOCK}
    assert total_error(trained_on(model), exact) <= 1.1 * error_of_peft


# ------------------------------------------------------------------------------------------------ what was found once


@pytest.mark.parametrize("family", ["cohere", "helium"])
@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_positions_that_turn_neighbours_against_each_other_are_told_apart_over_any_base(
    family: str, quant: str
) -> None:
    model = adapted(model_of(family, hidden_size=64, head_dim=16), quant)
    fast, plain, paths = fast_and_plain(model)
    assert TOGETHER not in paths.values()
    same(step(fast, {}), step(plain, {}), 1e-4)


def test_why_layers_are_not_taken_together_is_said() -> None:
    paths = take_fast_path(adapted(model_of("cohere")))
    assert paths["model.layers.0.self_attn.q_proj"] == f"{ALONE} (CohereAttention: another result)"


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
def test_large_scores_do_not_decide_whether_an_attention_is_taken(quant: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3))
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.dim() == 2 else 1
    model = model.bfloat16()
    kind = Quantization.of(quant)
    assert kind is not None
    quantize_model(model, kind, torch.device("cpu"), BaseReport("test", kind))
    inject_lora(model, rank=4, alpha=8)
    paths = take_fast_path(model)
    assert {path for name, path in paths.items() if "q_proj" in name} == {TOGETHER}


@pytest.mark.parametrize("place", ["self_attn.q_proj.base_layer", "mlp.up_proj.base_layer", "mlp.act_fn"])
def test_a_forward_that_somebody_put_in_the_place_of_a_modules_own_is_called(place: str) -> None:
    model = adapted(model_of("llama"))
    take_fast_path(model)
    module, calls = model.get_submodule(f"model.layers.0.{place}"), []
    own = module.forward
    module.forward = lambda x: calls.append(1) or own(x)
    model(input_ids=IDS)
    assert calls == [1]


def test_a_model_on_the_fast_path_can_be_pickled(tmp_path: Path) -> None:
    model = adapted(model_of("llama"))
    take_fast_path(model, recompute=True)
    torch.save(model, tmp_path / "model.pt")
    opened = torch.load(tmp_path / "model.pt", weights_only=False)
    assert taken(opened).values() and list(taken(opened).values()) == list(taken(model).values())
    same(step(opened, {}), step(model, {}), 0.0)


@pytest.mark.parametrize(("size", "offset"), [(1.0, 0.0), (4.0, 0.0), (16.0, 0.0), (1.0, 5.0)])
def test_attention_in_16_bits_is_about_as_exact_as_pytorchs(size: float, offset: float) -> None:
    """Scores of a hundred and more, and keys that have much in common, as real models have them."""
    torch.manual_seed(0)
    q, k, v, dy = (torch.randn(1, 256, 4, 64) for _ in range(4))
    inputs = [each.bfloat16() for each in (q * size, k + offset * torch.randn(1, 1, 4, 64), v)]

    def run(dtype: torch.dtype, attend: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [each.to(dtype).clone().requires_grad_() for each in inputs]
        y = attend(*leaves)
        y.backward(dy.bfloat16().to(dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def stock(*each: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in each), is_causal=True).transpose(1, 2)

    exact = run(torch.float64, stock)
    theirs, ours = (
        run(torch.bfloat16, stock),
        run(torch.bfloat16, lambda q, k, v: fused.attention(EAGER, q, k, v, 0.125)),
    )
    for found, other, right in zip(ours, theirs, exact, strict=True):
        error, bound = ((each.double() - right).norm() / right.norm() for each in (found, other))
        assert error <= 2.5 * bound
