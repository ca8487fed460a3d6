"""Quantized weights are what the paper defines, stay so through evaluation, and a model that cannot be had is said so.

pytest tests/test_quant.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lorafit.errors import InputError
from lorafit.fourbit import quantize_blocks
from lorafit.inject import inject_lora, lora_layers, mark_only_lora_as_trainable, merge_lora
from lorafit.loading import load_base_model
from lorafit.quant import (
    BaseReport,
    Quantization,
    base_report,
    dequantize,
    dequantize_shared,
    disarm_repacking,
    is_quantized,
    linear_layers,
    quant_state_tensors,
    quantize_4bit,
    quantize_model,
    release_shared,
    to_dtype,
)

TinyLlama = Callable[..., LlamaForCausalLM]
CPU = torch.device("cpu")
IDS = torch.arange(24).view(2, 12)


def nf4_codes() -> Tensor:
    """QLoRA, section 3 and its code: 8 and 9 even quantiles of N(0, 1) on the two sides of zero, scaled to [-1, 1]."""

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(0.9677083, 0.5, count, dtype=torch.float64)[:-1])

    codes = torch.cat((-quantiles(8), torch.zeros(1, dtype=torch.float64), quantiles(9)))
    return (codes / codes.max()).sort().values


def fp4_codes() -> Tensor:
    """Sign, two bits of exponent, one of mantissa, as bitsandbytes lays them out, scaled to [-1, 1]."""
    positive = torch.tensor([0, 0.0625, 2, 3, 4, 6, 8, 12], dtype=torch.float64) / 12
    return torch.cat((-positive.flip(0)[:-1], positive))


CODES = {"nf4": nf4_codes(), "fp4": fp4_codes()}


def nearest_codes(weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """(the best 4-bit approximation of a weight, its block's scale for each element), in float64."""
    flat = weight.double().flatten()
    padded = torch.cat((flat, flat.new_zeros(-flat.numel() % block))).view(-1, block)
    scale = padded.abs().amax(dim=1, keepdim=True)
    codes = CODES[kind]
    best = codes[(padded / scale.clamp_min(1e-30)).unsqueeze(-1).sub(codes).abs().argmin(-1)] * scale
    shape = weight.shape
    return best.flatten()[: flat.numel()].view(shape), scale.expand_as(padded).flatten()[: flat.numel()].view(shape)


def quantized(model: nn.Module, quant: Any) -> BaseReport:
    recipe = Quantization.of(quant)
    report = BaseReport("test", recipe)
    assert recipe is not None
    quantize_model(model, recipe, CPU, report)
    return report


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the adapter, after B has been given values that do not depend on the past."""
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.weight.data.normal_(std=0.1, generator=generator)
    mark_only_lora_as_trainable(model)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_width_reads_back_as_the_definition_says_or_stays_in_sixteen_bits(
    kind: str, block: int, double: bool
) -> None:
    widths = [*range(32, 321, 16), 33, 50, 72, 100]
    model = nn.Sequential(*(nn.Linear(width, 96) for width in widths))
    for layer in model:
        nn.init.normal_(layer.weight, std=0.02)
    original = {name: layer.weight.detach().clone() for name, layer in linear_layers(model).items()}
    recipe = {"type": kind, "block_size": block, "double_quant": double, "compute_dtype": "float32"}
    report = quantized(model, recipe)
    assert sorted([*report.quantized, *report.left]) == sorted(original)
    # the second quantization stores scales in 8 bits
    slack = 0.03 if double else 1e-5
    for (name, weight), width in zip(original.items(), widths, strict=True):
        if name in report.left:
            assert width % block, f"{width} is whole blocks and must be quantized"
            assert f"({width}, 96) in/out" in report.left[name]
            assert type(model[int(name)]) is nn.Linear
            assert torch.equal(model[int(name)].weight, weight)
            continue
        best, scale = nearest_codes(weight, kind, block)
        found = dequantize(model[int(name)])
        assert found.shape == weight.shape
        error, least = (found - weight).abs(), (best - weight).abs()
        assert (error <= least + slack * scale).all()
        half_gap = CODES[kind].diff().max() / 2
        assert (error <= (half_gap + slack) * scale).all()
        relative = (error.norm() / weight.norm()).item()
        assert relative == pytest.approx((least.norm() / weight.norm()).item(), rel=0.02)
        x = torch.randn(4, width)
        torch.testing.assert_close(model[int(name)](x), x @ found.T + model[int(name)].bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "expected"), [("nf4", 0.092), ("fp4", 0.122)])
def test_the_error_on_gaussian_weights_is_the_published_one(kind: str, expected: float) -> None:
    model = nn.Sequential(nn.Linear(512, 512))
    nn.init.normal_(model[0].weight, std=0.02)
    weight = model[0].weight.detach().clone()
    quantized(model, {"type": kind, "compute_dtype": "float32"})
    assert ((dequantize(model[0]) - weight).norm() / weight.norm()).item() == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512])
def test_each_block_of_weights_has_a_scale_of_its_own(block: int) -> None:
    model = nn.Sequential(nn.Linear(512, 8))
    quantized(model, {"type": "nf4", "block_size": block, "double_quant": False})
    scales = next(iter(quant_state_tensors(model)))
    assert scales.numel() == 512 * 8 // block
    assert scales.dtype == torch.float32
    doubled = nn.Sequential(nn.Linear(512, 8))
    quantized(doubled, {"type": "nf4", "block_size": block, "double_quant": True})
    scales = next(iter(quant_state_tensors(doubled)))
    assert (scales.numel(), scales.dtype) == (512 * 8 // block, torch.uint8)


def test_int8_scales_each_row_by_its_largest_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 48, dtype=torch.bfloat16))
    weight = model[0].weight.detach().float()
    report = quantized(model, "int8")
    assert report.quantized == ["0"]
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    for _ in range(2):
        assert ((dequantize(model[0]) - weight).abs() <= 0.502 * step).all()
        model(torch.randn(3, 64))  # moves the scales elsewhere


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
def test_an_evaluation_before_training_changes_no_gradient(tiny_llama: TinyLlama, quant: str) -> None:
    found = []
    for evaluate in (False, True):
        model = tiny_llama().bfloat16()
        quantized(model, quant)
        inject_lora(model, rank=4, alpha=8)
        weights = {name: dequantize(layer.base_layer).clone() for name, layer in lora_layers(model).items()}
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(input_ids=IDS)
        found.append(gradients(model))
        assert all(torch.equal(dequantize(layer.base_layer), weights[n]) for n, layer in lora_layers(model).items())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_merging_after_an_evaluation_keeps_what_was_learned(tiny_llama: TinyLlama) -> None:
    model = tiny_llama().bfloat16()
    quantized(model, "nf4")
    inject_lora(model, rank=4, alpha=8)
    gradients(model)
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            live = model(input_ids=IDS).logits
        merge_lora(model)
        merged = model(input_ids=IDS).logits
    assert (merged - live).abs().max() <= 0.05 * live.abs().max()


@pytest.mark.parametrize("double", [False, True])
def test_a_model_that_was_evaluated_elsewhere_before_is_put_right(llama_folder: Path, double: bool) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    found, weights = [], []
    for evaluate in (False, True):
        model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config, dtype=torch.bfloat16)
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(input_ids=IDS)
        inject_lora(model, rank=4, alpha=8)
        found.append(gradients(model))  # first: dequantizing undoes a repacking too
        weights.append([dequantize(layer.base_layer).clone() for layer in lora_layers(model).values()])
    # the repacking rounds the scales to bfloat16, and what it rounded away is gone
    for one, other in zip(*weights, strict=True):
        assert (one - other).float().norm() <= 2**-8 * one.float().norm()
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= 0.05 * gradient.norm()


@pytest.mark.parametrize("double", [False, True])
def test_disarming_undoes_a_repacking_that_happened(tiny_llama: TinyLlama, double: bool) -> None:
    model = tiny_llama(intermediate_size=256).bfloat16()
    quantized(model, {"type": "nf4", "double_quant": double})
    layers = [layer for layer in linear_layers(model).values() if is_quantized(layer)]
    packed = [layer.weight.data.clone() for layer in layers]
    weights = [dequantize(layer).float() for layer in layers]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = torch.cpu._is_avx512_bf16_supported()
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    disarm_repacking(model)
    assert all(torch.equal(layer.weight.data, before) for layer, before in zip(layers, packed, strict=True))
    for layer, before in zip(layers, weights, strict=True):
        assert (dequantize(layer).float() - before).norm() <= 2**-8 * before.norm()


@pytest.mark.parametrize("quant", [None, "nf4", "fp4", "int8"])
def test_the_embedded_model_loads_frozen_without_cache_and_in_bfloat16(quant: str | None) -> None:
    model = load_base_model("embedded", quant=quant, device="cpu")
    report = base_report(model)
    assert report is not None
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is False
    assert model.training
    kept = {p.dtype for n, m in model.named_modules() if not is_quantized(m) for p in m.parameters(recurse=False)}
    assert kept == {torch.bfloat16}
    linear = [name for name in linear_layers(model) if name != "lm_head"]
    assert report.quantized == (linear if quant else [])
    assert report.left == ({"lm_head": "output head"} if quant else {})
    assert all(is_quantized(model.get_submodule(name)) == bool(quant) for name in linear)
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_any_two_dtypes_of_products_and_of_the_rest_train_and_merge(
    llama_folder: Path, quant: str, compute: str, dtype: str | None
) -> None:
    model = load_base_model(str(llama_folder), quant={"type": quant, "compute_dtype": compute}, dtype=dtype)
    rest = to_dtype(dtype or compute)
    assert model.model.embed_tokens.weight.dtype == rest
    inject_lora(model, rank=4, alpha=8)
    assert gradients(model)
    live = model(input_ids=IDS).logits
    assert live.dtype == rest
    merge_lora(model)
    assert {parameter.dtype for parameter in model.parameters()} == {rest}
    merged = model(input_ids=IDS).logits
    assert (merged - live).abs().max() <= 0.06 * live.abs().max()


def test_the_checkpoints_own_dtype_is_kept_unless_another_is_asked(llama_folder: Path) -> None:
    assert load_base_model(str(llama_folder)).dtype == torch.float32
    assert load_base_model(str(llama_folder), dtype="bfloat16").dtype == torch.bfloat16
    assert load_base_model(str(llama_folder), quant="nf4").dtype == torch.bfloat16


def test_gpt2_is_quantized_and_merged_back_to_conv1d(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)).save_pretrained(tmp_path)
    model = load_base_model(str(tmp_path), quant={"type": "nf4", "compute_dtype": "float32"})
    report = base_report(model)
    assert report is not None
    assert len(report.quantized) == 8
    reference = load_base_model(str(tmp_path))
    weight = reference.transformer.h[0].mlp.c_fc.weight.T
    best, scale = nearest_codes(weight, "nf4", 64)
    found = dequantize(model.transformer.h[0].mlp.c_fc)
    assert ((found - weight).abs() <= (best - weight).abs() + 0.03 * scale).all()
    inject_lora(model, rank=4, alpha=8)
    gradients(model)
    model.eval()
    live = model(input_ids=IDS).logits
    merge_lora(model)
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (64, 256)
    torch.testing.assert_close(model(input_ids=IDS).logits, live, rtol=1e-4, atol=1e-4)


def test_what_is_no_plain_linear_layer_stays_and_is_named(tiny_llama: TinyLlama) -> None:
    model = nn.Module()
    model.embedding, model.tied = nn.Embedding(64, 64), nn.Linear(64, 64, bias=False)
    model.tied.weight = model.embedding.weight
    model.experts, model.convolution = nn.ParameterList([torch.randn(2, 64, 64)]), nn.Conv1d(8, 8, 4)
    model.one = nn.Linear(64, 64)
    model.other = model.one
    report = quantized(model, "nf4")
    assert report.quantized == ["one", "other"]
    assert model.one is model.other
    assert report.left == {
        "tied": "shares its weight with an embedding",
        "experts.0": "a stack of expert weights, no linear layer",
    }
    assert model.tied.weight is model.embedding.weight


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_checkpoint_that_comes_quantized_is_used_as_it_is_and_not_quantized_again(
    llama_folder: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config, dtype=torch.float32)
    folder = str(tmp_path / "quantized")
    model.save_pretrained(folder)
    loaded = load_base_model(folder, quant=None, device="cpu")
    expected = dequantize(model.model.layers[0].mlp.up_proj)
    assert torch.equal(dequantize(loaded.model.layers[0].mlp.up_proj), expected)
    report = base_report(loaded)
    assert report is not None
    assert len(report.quantized) == 14
    assert report.quant == Quantization.of({"type": kind, "compute_dtype": "bfloat16"})
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    inject_lora(loaded, rank=4, alpha=8)
    gradients(loaded)
    live = loaded(input_ids=IDS).logits
    merge_lora(loaded)
    assert (loaded(input_ids=IDS).logits - live).abs().max() <= 0.05 * live.abs().max()
    with pytest.raises(InputError, match="comes quantized already: choose quant=none"):
        load_base_model(folder, quant="nf4")


def test_a_random_model_needs_a_configuration_and_no_weights(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    model = load_base_model(str(llama_folder), init="random", quant={"type": "nf4", "compute_dtype": "float32"})
    assert len(base_report(model).quantized) == 14
    assert torch.isfinite(model(input_ids=IDS).logits).all()
    with pytest.raises(InputError, match="no .*safetensors weights"):
        load_base_model(str(llama_folder))


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def leave_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    drop_weights(folder)


def lose_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_the_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_config, "has no config.json"),
        (drop_weights, r"no \*.safetensors weights"),
        (leave_pickle, "it holds pytorch_model.bin, which lorafit does not open"),
        (lose_a_weight, "1 weights are missing .*model.layers.0.self_attn.q_proj.weight"),
        (reshape_a_weight, "q_proj.weight"),
        (cut_the_weights, "cannot be loaded"),
        (break_config, "cannot be loaded"),
        (unknown_architecture, "no_such_model"),
    ],
)
def test_a_damaged_model_folder_is_one_message(
    llama_folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(llama_folder)
    with pytest.raises(InputError, match=message) as caught:
        load_base_model(str(llama_folder), device="cpu")
    assert str(llama_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "no/such/folder"}, "'no/such/folder' cannot be loaded"),
        ({"name": "nobody/has-this-model"}, "'nobody/has-this-model' cannot be loaded"),
        ({"quant": "nf5"}, "quant.type must be one of nf4, fp4, int8, got 'nf5'. Did you mean 'nf4'"),
        ({"quant": {"type": "nf4", "block_size": 63}}, r"quant.block_size must be one of .*, got 63"),
        ({"quant": {"type": "nf4", "compute_dtype": "bfloat"}}, "got 'bfloat'. Did you mean 'bfloat16'"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        ({"init": "zeros"}, "model.init must be pretrained or random, got 'zeros'"),
        ({"attention": "flashy"}, "flashy"),
    ],
)
def test_a_choice_that_cannot_be_had_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_base_model(**({"name": "embedded"} | options))


def test_the_recipe_says_only_what_applies() -> None:
    recipe = Quantization.of("int8")
    assert recipe is not None
    assert recipe.as_dict() == {
        "type": "int8",
        "double_quant": False,
        "block_size": None,
        "compute_dtype": "bfloat16",
    }
    assert Quantization.of("none") is Quantization.of(None) is None
    assert Quantization.of(recipe) is recipe


class Doubling(torch.nn.Linear):
    """A linear layer that does something else as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Transposing(torch.nn.Linear):
    """A linear layer that writes its product another way, as Falcon's does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


def test_a_subclass_of_linear_is_quantized_only_if_it_multiplies_and_does_nothing_else() -> None:
    model = torch.nn.Sequential(Doubling(64, 64), Transposing(64, 64), torch.nn.Linear(64, 64))
    report = BaseReport("sequential", Quantization())
    quantize_model(model, Quantization(), torch.device("cpu"), report)
    assert report.quantized == ["1", "2"]
    assert list(report.left) == ["0"] and "Doubling" in report.left["0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "recipe",
    [
        *({"type": kind, "double_quant": double} for kind in ("nf4", "fp4") for double in (True, False)),
        *({"type": "nf4", "block_size": block} for block in (32, 128, 256, 512)),
        {"type": "int8"},
    ],
    ids=lambda recipe: "-".join(str(value) for value in recipe.values()),
)
def test_a_weight_in_shared_memory_is_the_one_of_its_own_bit_for_bit(recipe: Any, dtype: torch.dtype) -> None:
    widths = [(512, 96), (64, 3), (50, 7), (2, 1), (1, 2), *([(33, 12)] if dtype is torch.float32 else [])]
    layers = nn.Sequential(*(nn.Linear(*width, dtype=dtype) for width in widths))
    quantized(layers, recipe)
    assert any(is_quantized(layer) for layer in layers)
    for layer in layers:
        expected = dequantize(layer)
        assert torch.equal(dequantize_shared(layer), expected)
        for asked in (torch.float32, torch.bfloat16, torch.float16):
            found = dequantize_shared(layer, asked)
            assert found.dtype == asked
            assert torch.equal(found, expected.to(asked))


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_shared_memory_is_taken_once_for_all_layers_until_it_is_released(quant: str) -> None:
    release_shared()
    model = nn.Sequential(nn.Linear(128, 96), nn.Linear(64, 48), nn.Linear(128, 128))
    quantized(model, quant)
    large, small = dequantize_shared(model[2], torch.bfloat16), dequantize_shared(model[1], torch.bfloat16)
    assert large.data_ptr() == small.data_ptr()
    assert dequantize_shared(model[0], torch.bfloat16).data_ptr() == large.data_ptr()
    release_shared()
    kept = large.clone()
    dequantize_shared(model[0], torch.bfloat16)
    assert torch.equal(large, kept)


def test_a_layer_in_sixteen_bits_lends_its_own_weight() -> None:
    linear, conv = nn.Linear(8, 4), Conv1D(4, 8)
    assert dequantize_shared(linear).data_ptr() == linear.weight.data_ptr()
    assert dequantize_shared(conv).data_ptr() == conv.weight.data_ptr()
    assert torch.equal(dequantize_shared(conv, torch.bfloat16), conv.weight.T.bfloat16())


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_autograd_notices_that_a_shared_weight_was_overwritten(quant: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantized(model, quant)
    x = torch.randn(2, 64, requires_grad=True)
    y = x @ dequantize_shared(model[0], torch.float32).T
    dequantize_shared(model[1], torch.float32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_shared_weight_that_was_first_made_for_inference_can_be_trained_through() -> None:
    release_shared()
    model = nn.Sequential(nn.Linear(64, 64))
    quantized(model, "nf4")
    with torch.inference_mode():
        dequantize_shared(model[0], torch.float32)
    x = torch.randn(2, 64, requires_grad=True)
    (x @ dequantize_shared(model[0], torch.float32).T).sum().backward()
    assert x.grad is not None


def adversarial(kind: str, block: int) -> Tensor:
    """Blocks of weights on the midpoints between two codes, beside them and on the codes, at several scales, zeros of
    both signs, and blocks that are all zero or too small to be divided by."""
    codes = CODES[kind].float()
    midpoints = (codes[:-1] + codes[1:]) / 2
    near = [midpoints, *(midpoints.nextafter(torch.tensor(side)) for side in (-2.0, 2.0)), codes]
    values = torch.cat((torch.tensor([1.0, -1.0, 0.0, -0.0]), *near))
    values = torch.cat((values, values.new_zeros(-values.numel() % block)))
    scales = [1.0, -1.0, 3.0, 0.02, 1 / 3, 1e-20, 3e38, 1e-38, 1e-41, 0.0]
    return torch.cat([values * scale for scale in scales])


def expected_4bit(weight: Tensor, kind: str, block: int, double: bool) -> tuple[Tensor, Any]:
    return bnb.functional.quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type=kind)


def assert_same_state(found: Any, expected: Any) -> None:
    """Two quant_states hold the same, bit for bit."""
    assert vars(found).keys() == vars(expected).keys()
    for name, value in vars(expected).items():
        own = getattr(found, name)
        if name == "state2" and value is not None:
            assert_same_state(own, value)
        elif isinstance(value, Tensor):
            assert own.dtype == value.dtype
            assert torch.equal(own.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
        else:
            assert own == value, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_are_quantized_as_bitsandbytes_does_byte_for_byte(kind: str, block: int, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    every = every[torch.isfinite(every)].float()
    weights = {
        "gaussian": torch.randn(130, 1111) * 0.02,
        "adversarial": adversarial(kind, block),
        "all of bfloat16": every[torch.randperm(every.numel())],
        "all of bfloat16 by size": every[every.abs() < 60000],
        "one": torch.tensor([0.3]),
        "two": torch.tensor([[0.0], [-0.1]]),
        "short": torch.randn(block - 1),
        "a rest": torch.randn(3, 2 * block + 7),
        "heavy tails": torch.randn(1000, 64) ** 7,
    }
    for name, weight in weights.items():
        weight = weight.to(dtype)
        for double in (False, True):
            recipe = Quantization(kind, double, block)
            packed, state = expected_4bit(weight, kind, block, double)
            found, own = quantize_4bit(weight, recipe, CPU)
            assert torch.equal(found, packed), name
            assert_same_state(own, state)
        code = bnb.functional.get_4bit_type(kind, device="cpu")
        codes, scales = quantize_blocks(weight, block, code)
        if torch.isfinite(scales).all():  # the fast way itself, and not what stands in for it
            packed, state = expected_4bit(weight, kind, block, False)
            assert torch.equal(codes, packed.flatten()), name
            assert torch.equal(scales, state.absmax), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_that_is_not_finite_is_left_to_bitsandbytes(kind: str, bad: float) -> None:
    weight = torch.randn(4, 64)
    weight[1, 3] = bad
    packed, state = expected_4bit(weight, kind, 64, False)
    found, own = quantize_4bit(weight, Quantization(kind, False), CPU)
    assert torch.equal(found, packed)
    assert_same_state(own, state)


def test_threads_share_a_large_weight_without_a_difference() -> None:
    weight = (torch.randn(700, 2048) * 0.02).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(quantize_blocks(weight, 64, bnb.functional.get_4bit_type("nf4", device="cpu")))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(found[0][0], expected_4bit(weight, "nf4", 64, False)[0].flatten())


def test_a_quantizer_that_rounds_otherwise_is_noticed_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit import quant

    real = bnb.functional.quantize_4bit

    def other(weight: Tensor, **options: Any) -> tuple[Tensor, Any]:
        return real(weight.nextafter(torch.tensor(torch.inf)), **options)

    assert quant._blocks_agree("nf4")
    monkeypatch.setattr(bnb.functional, "quantize_4bit", other)
    quant._blocks_agree.cache_clear()
    try:
        assert not quant._blocks_agree("nf4")
    finally:
        quant._blocks_agree.cache_clear()
