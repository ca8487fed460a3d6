"""What is kept of the forward pass changes memory and work, and never a gradient.

pytest tests/test_checkpointing.py
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_fastpath import IDS, INPUTS, model_of, same, step
from test_fused import Products
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from lorafit import checkpointing
from lorafit.checkpointing import CHECKPOINTING, HostCopies, keep_products, recompute_blocks
from lorafit.errors import InputError
from lorafit.fastpath import PLAIN
from lorafit.inject import lora_layers
from lorafit.module import FinetuneModule
from lorafit.quant import BaseReport, Quantization, quantize_model

KINDS = pytest.mark.parametrize("kind", ["selective", "full", "offload"])
TOKENS, WIDTH, FLOAT = IDS.numel(), 64, 4


def made(model: Any, kind: str, **options: Any) -> FinetuneModule:
    module = FinetuneModule(model, checkpointing=kind, compile="off", **({"rank": 4, "alpha": 8} | options))
    module.configure_model()
    for name, layer in lora_layers(module.model).items():  # type: ignore[arg-type]
        nn.init.normal_(layer.lora_B.weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return module


class Live(TorchDispatchMode):
    """The memory of the tensors that were made within the context and are still there; parameters aside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._without = {StorageWeakRef(parameter.untyped_storage()).cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._without:
                    self._storages[reference.cdata] = (reference, storage.nbytes())
        return result

    @property
    def bytes(self) -> int:
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def kept(kind: str, layers: int, family: str = "llama", **options: Any) -> int:
    """Bytes that stand after the forward pass for the backward pass."""
    sizes: dict[str, Any] = {"num_hidden_layers": layers}
    if family == "qwen3":
        sizes["layer_types"] = ["full_attention"] * layers
    model = made(model_of(family, **sizes), kind, **options).model
    assert model is not None
    with Live(model) as live:
        logits = model(input_ids=IDS).logits
    size = live.bytes
    del logits
    return size


# ------------------------------------------------------------------------------------------------ the same gradient


@KINDS
@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma", "mistral"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradient_is_that_of_keeping_everything(kind: str, fused: str, family: str, dropout: float) -> None:
    base = model_of(family)
    expected, found = (made(copy.deepcopy(base), each, fused=fused, dropout=dropout).model for each in ("none", kind))
    for name in ("no mask", "padded right", "packed"):
        same(step(found, INPUTS[name]), step(expected, INPUTS[name]), 3e-6)


@KINDS
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_over_a_quantized_base_it_is_too(kind: str, quant: str) -> None:
    base = model_of("llama")
    how = Quantization.of({"type": quant, "compute_dtype": torch.float32} if quant != "int8" else quant)
    assert how is not None
    quantize_model(base, how, torch.device("cpu"), BaseReport("test", how))
    expected, found = (made(copy.deepcopy(base), each).model for each in ("none", kind))
    same(step(found, {}), step(expected, {}), 1e-6)


def test_a_second_backward_pass_adds_the_same() -> None:
    model = made(model_of("llama"), "selective").model
    assert model is not None
    loss = model(input_ids=IDS).logits.square().sum()
    loss.backward(retain_graph=True)
    once = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, 2 * once[name])


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma"])
def test_full_keeps_less_than_selective_and_selective_less_than_everything(fused: str, family: str) -> None:
    everything, selective, full, offload = (kept(kind, 6, family, fused=fused) for kind in CHECKPOINTING)
    assert full < selective < everything
    assert offload == full  # on the CPU there is no other memory


@pytest.mark.parametrize("fused", ["auto", "off"])
def test_full_keeps_of_each_block_its_input(fused: str) -> None:
    assert kept("full", 4, fused=fused) - kept("full", 2, fused=fused) == 2 * TOKENS * WIDTH * FLOAT


def test_of_a_block_on_the_fast_path_selective_keeps_all_but_the_two_norms() -> None:
    middle, keys, heads, rank = 128, 32, 4, 4
    per_layer = [(kept(kind, 4) - kept(kind, 2)) // 2 for kind in ("none", "selective")]
    # the inputs of the two norms; q, k and v turned, the output of attention and its sums; gate and up; x Aᵀ of seven
    products = 2 * WIDTH + (WIDTH + 2 * keys) + WIDTH + heads + 2 * middle + 7 * rank
    norms = 2 * WIDTH
    assert per_layer == [TOKENS * (products + norms) * FLOAT, TOKENS * products * FLOAT]


def test_the_fast_path_keeps_less_than_the_plain_one() -> None:
    assert kept("none", 4, dropout=0.1) < 0.6 * kept("none", 4, fused="off", dropout=0.1)
    assert kept("none", 4) < kept("none", 4, fused="off")


# ------------------------------------------------------------------------------------------------ work


def calls(kind: str, **options: Any) -> list[int]:
    """How often each block runs in a forward and backward pass."""
    model = made(model_of("llama"), kind, **options).model
    assert model is not None
    counts = [0] * len(model.model.layers)
    for index, layer in enumerate(model.model.layers):

        def count(*_: Any, index: int = index) -> None:
            counts[index] += 1

        layer.self_attn.register_forward_pre_hook(count)
    model(input_ids=IDS).logits.sum().backward()
    return counts


@pytest.mark.parametrize("fused", ["auto", "off"])
def test_with_full_each_block_is_computed_twice(fused: str) -> None:
    assert calls("none", fused=fused) == [1, 1]
    assert calls("full", fused=fused) == calls("offload", fused=fused) == [2, 2]


def test_with_selective_a_block_on_the_fast_path_is_computed_once() -> None:
    assert calls("selective") == [1, 1]


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("fused", ["auto", "off"])
def test_below_the_first_adapted_layer_no_block_needs_a_gradient_or_runs_again(kind: str, fused: str) -> None:
    model = made(model_of("llama", num_hidden_layers=3), kind, fused=fused, target_modules=r".*layers\.2\..*").model
    assert model is not None
    ran, need = [0, 0, 0], set()
    for index, layer in enumerate(model.model.layers):

        def note(_: Any, __: Any, output: Any, index: int = index) -> None:
            ran[index] += 1
            if output[0].requires_grad:
                need.add(index)

        layer.self_attn.register_forward_hook(note)
    model(input_ids=IDS).logits.sum().backward()
    assert need == {2}
    assert ran[:2] == [1, 1]


def work(kind: str, family: str, **options: Any) -> int:
    model = made(model_of(family), kind, **options).model
    assert model is not None
    with Products() as counted:
        model(input_ids=IDS).logits.sum().backward()
    return counted.work


@pytest.mark.parametrize(
    ("family", "fused"), [("llama", "auto"), ("llama", "off"), ("gpt2", "auto"), ("gemma", "auto")]
)
def test_selective_computes_no_large_product_twice_and_full_does(family: str, fused: str) -> None:
    # where a block is not on the fast path as a whole, selective is the plain path with its products kept
    whole = family == "llama" and fused == "auto"
    once = work("none", family, fused="auto" if whole else "off")
    layers = lora_layers(made(model_of(family), "none").model).values()  # type: ignore[arg-type]
    with_B = TOKENS * sum(4 * layer.out_features for layer in layers)
    found = work("selective", family, fused=fused)
    assert found == once if whole else once <= found <= once + with_B
    assert work("full", family, fused=fused) > once + with_B


def test_the_module_says_where_selective_takes_the_plain_path() -> None:
    assert not any(path.startswith(PLAIN) for path in made(model_of("llama"), "selective").paths.values())
    paths = made(model_of("gpt2"), "selective").paths
    assert set(paths.values()) == {f"{PLAIN}its block keeps products alone (checkpointing=selective)"}
    assert len(paths) == 8


# ------------------------------------------------------------------------------------------------ what cannot be


class Unable(LlamaForCausalLM):
    supports_gradient_checkpointing = False


@KINDS
def test_a_model_whose_blocks_cannot_run_twice_is_told_so(kind: str) -> None:
    config = model_of("llama").config
    if kind == "selective":  # the steps of the fast path need nothing from the model
        made(Unable(config), kind)
        with pytest.raises(InputError, match=r"Unable cannot .*model\.checkpointing=none"):
            made(Unable(config), kind, fused="off")
    else:
        with pytest.raises(InputError, match=r"Unable cannot .*model\.checkpointing=none"):
            made(Unable(config), kind)
    for function in (recompute_blocks, keep_products):
        with pytest.raises(InputError, match=r"Linear cannot .*model\.checkpointing=none"):
            function(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------ copies


def test_on_the_cpu_nothing_is_copied() -> None:
    copies, large = HostCopies(), torch.zeros(checkpointing.SMALLEST_OFFLOADED)
    assert copies.unpack(copies.pack(large)) is large


@pytest.mark.gpu
def test_on_cuda_large_tensors_go_to_the_host_and_come_back() -> None:
    copies = HostCopies()
    large = torch.randn(checkpointing.SMALLEST_OFFLOADED, device="cuda")
    small, weight = torch.randn(3, device="cuda"), nn.Parameter(large.clone())
    assert copies.pack(small) is small and copies.pack(weight) is weight
    expected = large.cpu()
    packed = copies.pack(large)
    host, device = packed
    assert host.device.type == "cpu" and host.is_pinned() and device.type == "cuda"
    large.zero_()  # what happens to the tensor after it was packed waits for the copy
    found = copies.unpack(packed)
    assert found.device == device and torch.equal(found.cpu(), expected)


@pytest.mark.gpu
def test_on_cuda_offload_holds_no_block_input_on_the_device_and_changes_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpointing, "SMALLEST_OFFLOADED", 0)
    base = model_of("llama", num_hidden_layers=8).cuda()
    ids, gradients, held = IDS.cuda(), [], []
    for kind in ("full", "offload"):
        model = made(copy.deepcopy(base), kind).model
        assert model is not None
        before = torch.cuda.memory_allocated()
        logits = model(input_ids=ids).logits
        held.append(torch.cuda.memory_allocated() - before)
        logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert held[1] <= held[0] - 7 * TOKENS * WIDTH * FLOAT
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
