"""What only a CUDA device can show: its kernels, paged optimizer state, and bytes against the allocator's.

pytest tests/test_gpu.py
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_quant import nearest_codes
from torch import nn
from transformers import LlamaForCausalLM

from lorafit.inject import inject_lora, lora_layers, mark_only_lora_as_trainable, merge_lora
from lorafit.loading import load_base_model
from lorafit.lora import LoRALinear
from lorafit.memory import memory_by_part, optimizer_tensors, peak_bytes, reset_peak
from lorafit.quant import (
    BaseReport,
    Quantization,
    dequantize,
    is_quantized,
    quant_state_tensors,
    quantize_model,
)

pytestmark = pytest.mark.gpu
TinyLlama = Callable[..., LlamaForCausalLM]
CUDA = torch.device("cuda")


def quantized_layer(quant: dict[str, object]) -> tuple[nn.Module, nn.Module]:
    """(the quantized layer on the device, the plain one it came from)."""
    plain = nn.Linear(256, 192).bfloat16()
    holder, recipe = nn.Sequential(copy.deepcopy(plain)), Quantization.of(quant)
    assert recipe is not None
    quantize_model(holder, recipe, CUDA, BaseReport("test", recipe))
    assert is_quantized(holder[0])
    return holder[0], plain


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_weights_read_back_as_the_definition_says(kind: str, block: int, double: bool) -> None:
    layer, plain = quantized_layer({"type": kind, "block_size": block, "double_quant": double})
    weight = plain.weight.detach().float()
    best, scale = nearest_codes(weight, kind, block)
    error = (dequantize(layer).float().cpu() - weight).abs()
    # what is read back is rounded to bfloat16; double quantization stores the scales in 8 bits
    slack = 0.03 if double else 2**-8
    assert (error <= (best - weight).abs() + slack * scale).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_quantized_layer_trains_and_merges_as_its_dequantized_twin(kind: str) -> None:
    base, _ = quantized_layer({"type": kind})
    layer = LoRALinear(base, 8, 16)
    nn.init.normal_(layer.lora_B.weight, std=0.1)
    twin = nn.Linear(256, 192, device=CUDA)
    twin.weight.data, twin.bias.data = dequantize(base).float(), layer.bias.detach().float()
    plain = LoRALinear(twin, 8, 16)
    plain.lora_A.load_state_dict(layer.lora_A.state_dict())
    plain.lora_B.load_state_dict(layer.lora_B.state_dict())
    x = torch.randn(32, 256, device=CUDA, dtype=torch.bfloat16)
    inputs = [x.clone().requires_grad_(), x.float().requires_grad_()]
    weights = torch.randn(32, 192, device=CUDA)
    outputs = [one(own) for one, own in zip((layer, plain), inputs, strict=True)]
    for output in outputs:
        (output.float() * weights).sum().backward()
    pairs = [
        (outputs[0].float(), outputs[1]),
        (inputs[0].grad.float(), inputs[1].grad),
        (layer.lora_A.weight.grad, plain.lora_A.weight.grad),
        (layer.lora_B.weight.grad, plain.lora_B.weight.grad),
        (layer.merge()(x).float(), outputs[1]),
    ]
    # products in bfloat16 (2^-8), for int8 with inputs of 8 bits
    for found, expected in pairs:
        assert (found - expected).norm() <= 0.03 * expected.norm()
    assert layer.lora_A.weight.grad.dtype == torch.float32
    assert base.weight.device.type == layer.lora_A.weight.device.type == "cuda"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_evaluation_before_training_changes_no_gradient(tiny_llama: TinyLlama, kind: str) -> None:
    ids, found = torch.arange(24, device=CUDA).view(2, 12), []
    recipe = Quantization.of(kind)
    assert recipe is not None
    for evaluate in (False, True):
        model = tiny_llama().bfloat16()
        quantize_model(model, recipe, CUDA, BaseReport("test", recipe))
        model.to(CUDA)
        torch.manual_seed(1)
        inject_lora(model, rank=4, alpha=8)
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B.weight, std=0.1)
        mark_only_lora_as_trainable(model)
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(input_ids=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= 1e-2 * gradient.norm()


def test_a_merged_model_answers_as_the_live_one(tmp_path: Path, tiny_llama: TinyLlama) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = load_base_model(str(tmp_path), quant="nf4", device="cuda").eval()
    ids = torch.arange(24, device=CUDA).view(2, 12)
    inject_lora(model, rank=4, alpha=8)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    with torch.no_grad():
        live = model(input_ids=ids).logits
        merge_lora(model)
        assert (model(input_ids=ids).logits - live).abs().max() <= 0.06 * live.abs().max()


@pytest.mark.parametrize(("name", "bytes_per_value"), [("PagedAdamW32bit", 4), ("PagedAdamW8bit", 1)])
def test_only_state_of_a_hundred_thousand_elements_is_paged(name: str, bytes_per_value: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    large, small = 128 * 1024, 64 * 1024
    assert small < 100_000 <= large
    model = nn.ParameterList([torch.randn(128, 1024, device=CUDA), torch.randn(64, 1024, device=CUDA)])
    optimizer = getattr(bnb.optim, name)(model.parameters(), lr=1e-3)
    sum(parameter.square().sum() for parameter in model).backward()
    optimizer.step()
    torch.cuda.synchronize()
    parts = memory_by_part(model, optimizer)
    assert parts["optimizer_paged"] == 2 * large * bytes_per_value
    assert parts["optimizer"] >= 2 * (large + small) * bytes_per_value
    # what comes on top are code tables and the scales of 8-bit state
    assert parts["optimizer"] <= 2 * (large + small) * bytes_per_value + 64 * 1024
    marked = [tensor for tensor in optimizer_tensors(optimizer) if getattr(tensor, "is_paged", False)]
    assert [tensor.numel() for tensor in marked] == [large, large]
    assert parts["gradient"] == parts["adapter"] == 4 * (large + small)


def test_an_optimizer_that_is_not_paged_has_nothing_paged() -> None:
    model = nn.ParameterList([torch.randn(128, 1024, device=CUDA)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model[0].square().sum().backward()
    optimizer.step()
    parts = memory_by_part(model, optimizer)
    assert parts["optimizer_paged"] == 0
    assert parts["optimizer"] >= 2 * 4 * 128 * 1024


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_the_bytes_counted_are_those_the_allocator_gave_out(
    tmp_path: Path, tiny_llama: TinyLlama, quant: str | None
) -> None:
    tiny_llama(hidden_size=512, intermediate_size=1024, vocab_size=1024).save_pretrained(tmp_path)
    load_base_model(str(tmp_path), quant=quant, device="cuda")  # what libraries allocate once and keep
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = load_base_model(str(tmp_path), quant=quant, device="cuda")
    gc.collect()
    allocated = torch.cuda.memory_allocated() - before
    parts = memory_by_part(model)
    counted = parts["weights"] + parts["quant_state"]
    # the allocator rounds each tensor up to 512 bytes
    tensors = len([*model.parameters(), *model.buffers(), *quant_state_tensors(model)])
    assert abs(allocated - counted) <= 512 * tensors
    assert counted > 2**20


def test_the_peak_counts_from_the_last_reset() -> None:
    first = torch.empty(64 * 2**20, dtype=torch.uint8, device=CUDA)
    del first
    reset_peak(CUDA)
    base = torch.cuda.memory_allocated()
    second = torch.empty(16 * 2**20, dtype=torch.uint8, device=CUDA)
    del second
    assert peak_bytes(CUDA) - base == 16 * 2**20
