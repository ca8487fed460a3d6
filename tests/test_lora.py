"""The layer is the paper's: h = W x + (alpha / rank) · B A x, with W frozen.

pytest tests/test_lora.py
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit.errors import InputError
from lorafit.inject import count_parameters, mark_only_lora_as_trainable
from lorafit.lora import LoRALinear
from lorafit.quant import BaseReport, Quantization, dequantize, is_quantized, quantize_model

IN, OUT, RANK = 64, 48, 4
BASES = ["linear", "linear_without_bias", "conv1d", "nf4", "fp4", "int8"]


class Scaled(nn.Linear):
    """A subclass with an attribute of its own, as models have them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.factor = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


def make_base(kind: str, dtype: torch.dtype = torch.float32, source: type[nn.Module] = nn.Linear) -> nn.Module:
    if kind == "conv1d" or source is Conv1D:
        base: nn.Module = Conv1D(OUT, IN)
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(IN, OUT, bias=kind != "linear_without_bias")
    base = base.to(dtype)
    if kind in ("nf4", "fp4", "int8"):
        holder = nn.Sequential(base)
        quant = Quantization.of({"type": kind, "compute_dtype": dtype})
        assert quant is not None
        quantize_model(holder, quant, torch.device("cpu"), BaseReport("test", quant))
        base = holder[0]
        assert is_quantized(base)
    return base


def make_layer(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> LoRALinear:
    """A layer that has been trained: its B is not zero."""
    factors = {} if kind in ("nf4", "fp4", "int8") else {"dtype": torch.promote_types(dtype, torch.float32)}
    layer = LoRALinear(make_base(kind, dtype), RANK, 8, **(factors | options))
    nn.init.normal_(layer.lora_B.weight, std=0.1)
    return layer


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_first_step_the_layer_equals_its_base_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    base, x = make_base(kind, dtype), torch.randn(3, 5, IN, dtype=dtype)
    expected = base(x)
    found = LoRALinear(base, RANK, 8)(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["linear", "linear_without_bias", "conv1d"])
@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_the_forward_pass_is_the_equation(kind: str, variant: str) -> None:
    layer, x = make_layer(kind, torch.float64, variant=variant), torch.randn(7, IN, dtype=torch.float64)
    W, A, B = dequantize(layer.base_layer), layer.lora_A.weight, layer.lora_B.weight
    bias = 0 if layer.bias is None else layer.bias
    scaling = 8 / RANK if variant == "lora" else 8 / math.sqrt(RANK)
    expected = torch.einsum("oi,ni->no", W, x) + bias + scaling * torch.einsum("or,ri,ni->no", B, A, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "linear_without_bias", "conv1d"])
def test_the_gradients_of_input_A_and_B_are_the_derivatives(kind: str) -> None:
    base = Conv1D(3, 5).double() if kind == "conv1d" else nn.Linear(5, 3, bias=kind == "linear", dtype=torch.float64)
    layer = LoRALinear(base, 2, 3, dtype=torch.float64)
    B = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    A = layer.lora_A.weight.detach().clone().requires_grad_()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A.weight": A, "lora_B.weight": B}, (x,))

    assert torch.autograd.gradcheck(call, (x, A, B))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_gradients_over_a_quantized_base_are_those_over_its_dequantized_weights(kind: str) -> None:
    layer = make_layer(kind)
    plain = copy.deepcopy(layer)
    plain.base_layer = nn.Linear(IN, OUT)
    plain.base_layer.weight.data, plain.base_layer.bias.data = dequantize(layer.base_layer), layer.bias.clone()
    x = torch.randn(7, IN)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    weights = torch.randn(7, OUT)
    for one, own in zip((layer, plain), inputs, strict=True):
        (one(own) * weights).sum().backward()
    # int8 multiplies in float16 and rounds the input to 8 bits; nf4 differs by float32 summation order
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if kind == "nf4" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(getattr(layer, name).weight.grad, getattr(plain, name).weight.grad, **tolerance)


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_rank_stabilized_lora_divides_by_the_square_root_of_the_rank(rank: int) -> None:
    assert LoRALinear(nn.Linear(IN, OUT), rank, 16).scaling == 16 / rank
    assert LoRALinear(nn.Linear(IN, OUT), rank, 16, variant="rslora").scaling == 16 / math.sqrt(rank)


def test_dropout_acts_on_the_input_of_A_and_only_in_training() -> None:
    layer, x = make_layer("linear", dropout=0.5), torch.randn(4000, IN)
    still = layer.eval()(x)
    assert torch.equal(still, layer(x))
    assert torch.equal(still, make_same(layer, dropout=0.0)(x))
    base, noisy = layer.base_layer(x), layer.train()(x)
    assert not torch.equal(noisy, layer(x))
    # dropout keeps the mean: over 4000 rows the update's projection on the undisturbed one is about one
    update, expected = noisy - base, still - base
    assert ((update * expected).sum() / expected.square().sum()).item() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.base_layer(x), base)


def make_same(layer: LoRALinear, **options: Any) -> LoRALinear:
    twin = LoRALinear(layer.base_layer, layer.rank, layer.alpha, **options)
    twin.lora_A.load_state_dict(layer.lora_A.state_dict())
    twin.lora_B.load_state_dict(layer.lora_B.state_dict())
    return twin


def test_A_begins_uniform_within_one_over_the_square_root_of_its_inputs() -> None:
    A = LoRALinear(nn.Linear(400, 10), 50, 1).lora_A.weight
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.99 * bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("kind", BASES)
def test_training_moves_A_and_B_and_leaves_every_bit_of_the_base(kind: str) -> None:
    layer = LoRALinear(make_base(kind), RANK, 8)
    mark_only_lora_as_trainable(layer)
    # 8-bit layers hold their scales outside of the parameters, so they are compared dequantized as well
    before = {name: tensor.clone() for name, tensor in layer.base_layer.state_dict().items()}
    values = dequantize(layer.base_layer).clone()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    first_A = layer.lora_A.weight.clone()
    for _ in range(3):
        layer(torch.randn(8, IN)).square().sum().backward()
        assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
            "lora_A.weight",
            "lora_B.weight",
        }
        optimizer.step()
        optimizer.zero_grad()
    after = layer.base_layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(dequantize(layer.base_layer), values)
    assert layer.lora_B.weight.abs().max() > 0
    assert not torch.equal(layer.lora_A.weight, first_A)


def test_wrapping_freezes_the_base() -> None:
    layer = LoRALinear(nn.Linear(IN, OUT), RANK, 8)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A.weight", "lora_B.weight"]


# The merged product differs from the live one by rounding alone: float32 sums in another order (1e-5); bfloat16 rounds
# the weight and each of the two terms (2^-8 of the largest value each, a few of them add); int8 rounds the INPUT to 8
# bits in the live layer and not in the merged one (1/254 of its largest value, times the norm of a row).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, "int8": 4e-2}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_a_plain_layer_that_computes_the_same(kind: str, dtype: torch.dtype) -> None:
    layer, x = make_layer(kind, dtype).eval(), torch.randn(9, IN, dtype=dtype)
    live = layer(x)
    merged = layer.merge()
    assert type(merged) is (Conv1D if kind == "conv1d" else nn.Linear)
    assert merged.weight.dtype == dtype
    found = merged(x)
    assert found.dtype == dtype
    tolerance = TOLERANCE["int8" if kind == "int8" else dtype]
    assert (found - live).abs().max() <= tolerance * live.abs().max()
    # and the update is in it
    assert (layer.base_layer(x) - live).abs().max() > 5 * tolerance * live.abs().max()


def test_merging_in_float64_is_exact_to_float64() -> None:
    layer, x = make_layer("linear", torch.float64), torch.randn(9, IN, dtype=torch.float64)
    torch.testing.assert_close(layer.merge()(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", BASES)
def test_merging_leaves_the_layer_as_it_was(kind: str) -> None:
    layer, x = make_layer(kind), torch.randn(9, IN)
    live, state = layer(x), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    merged = layer.merge()
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.fill_(7)
    after = layer.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in state.items())
    assert torch.equal(layer(x), live)


def test_merging_keeps_a_subclass_of_linear_and_its_attributes() -> None:
    layer, x = LoRALinear(Scaled(IN, OUT), RANK, 8), torch.randn(9, IN)
    nn.init.normal_(layer.lora_B.weight)
    merged = layer.merge()
    assert type(merged) is Scaled
    weight = layer.base_layer.weight + layer.delta_weight()
    torch.testing.assert_close(merged(x), 3 * (x @ weight.T + layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_conv1d_merges_back_to_a_conv1d(kind: str) -> None:
    layer, x = LoRALinear(make_base(kind, source=Conv1D), RANK, 8), torch.randn(9, IN)
    nn.init.normal_(layer.lora_B.weight, std=0.1)
    merged = layer.merge()
    assert type(merged) is Conv1D
    live = layer(x)
    assert (merged(x) - live).abs().max() <= TOLERANCE["int8"] * live.abs().max()


@pytest.mark.parametrize("kind", ["linear", "nf4", "int8"])
def test_A_and_B_are_float32_over_a_bfloat16_base_and_multiplied_in_its_dtype(kind: str) -> None:
    layer = LoRALinear(make_base(kind, torch.bfloat16), RANK, 8)
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32
    seen = []
    layer.lora_A.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    assert layer(torch.randn(3, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_over_four_bits_the_output_has_the_dtype_of_the_input(compute: torch.dtype, given: torch.dtype) -> None:
    layer = LoRALinear(make_base("nf4", compute), RANK, 8)
    seen = []
    layer.lora_A.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert layer(torch.randn(3, IN, dtype=given)).dtype == given
    assert seen == [compute]


def test_the_delta_weight_is_scaling_times_B_A() -> None:
    layer = make_layer("linear", variant="rslora")
    A, B = layer.lora_A.weight.double(), layer.lora_B.weight.double()
    torch.testing.assert_close(layer.delta_weight().double(), 8 / 2 * (B @ A), rtol=1e-5, atol=1e-6)
    assert layer.delta_weight().shape == (OUT, IN)
    assert not layer.delta_weight().requires_grad


def test_an_adapter_has_rank_times_inputs_plus_outputs_parameters() -> None:
    for in_features, out_features, expected in ((5000, 4000, 72_000), (512, 64, 4_608)):
        layer = LoRALinear(nn.Linear(in_features, out_features, device="meta"), 8, 8)
        assert count_parameters(layer)[0] == expected
        assert (layer.in_features, layer.out_features) == (in_features, out_features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": -3}, "rank must be a positive integer, got -3"),
        ({"rank": "abc"}, "rank must be a positive integer, got 'abc'"),
        ({"rank": True}, "rank must be a positive integer, got True"),
        ({"rank": 1.5}, "rank must be a positive integer, got 1.5"),
        ({"rank": None}, "rank must be a positive integer, got None"),
        ({"alpha": -1}, "alpha must be a positive number, got -1"),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"alpha": math.nan}, "alpha must be a positive number, got nan"),
        ({"alpha": math.inf}, "alpha must be a positive number, got inf"),
        ({"alpha": "x"}, "alpha must be a positive number, got 'x'"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be a number in \[0, 1\), got -0.1"),
        ({"dropout": math.nan}, r"dropout must be a number in \[0, 1\), got nan"),
        ({"dropout": "a"}, r"dropout must be a number in \[0, 1\), got 'a'"),
        ({"variant": "rslra"}, "got 'rslra'. Did you mean 'rslora'"),
        ({"base_layer": nn.Embedding(3, 4)}, "wraps linear layers, not Embedding"),
        ({"base_layer": nn.Conv1d(3, 4, 1)}, "wraps linear layers, not Conv1d"),
    ],
)
def test_an_impossible_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRALinear(**({"base_layer": nn.Linear(4, 4), "rank": 2, "alpha": 2} | change))
