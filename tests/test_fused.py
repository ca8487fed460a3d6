"""Each step of the fast path has the gradient that differences give, is the plain layer, and keeps what it says.

pytest tests/test_fused.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lorafit import elementwise, fused
from lorafit.elementwise import EAGER, Ops
from lorafit.fused import Normed
from lorafit.lora import LoRALinear
from lorafit.quant import BaseReport, Quantization, dequantize, is_quantized, quantize_model

# the formulas that torch.compile is given, uncompiled
FORMULAS = Ops(
    "formulas",
    elementwise.rms_norm,
    elementwise.rms_norm_backward,
    elementwise.swiglu,
    elementwise.swiglu_backward,
    elementwise.rotate,
    elementwise.attend,
    elementwise.attend_backward,
    elementwise.cross_entropy,
)
OPS = pytest.mark.parametrize("ops", [EAGER, FORMULAS], ids=lambda ops: ops.name)
BASES = ["linear", "conv1d", "nf4", "fp4"]
QUANTIZED = ("nf4", "fp4", "int8")
BIASES = ["none", "frozen", "trained"]


def make_base(kind: str, shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> nn.Module:
    if kind == "conv1d":
        base: nn.Module = Conv1D(shape[1], shape[0])
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(*shape, bias=bias)
    if kind in QUANTIZED:
        holder = nn.Sequential(base)
        quant = Quantization.of({"type": kind, "compute_dtype": dtype} if kind != "int8" else kind)
        assert quant is not None
        quantize_model(holder, quant, torch.device("cpu"), BaseReport("test", quant))
        base = holder[0]
        assert is_quantized(base)
        if base.bias is not None:
            base.bias = nn.Parameter(base.bias.to(dtype))
        return base
    return base.to(dtype)


def make_layer(
    kind: str = "linear",
    shape: tuple[int, int] = (5, 4),
    rank: int = 2,
    *,
    dtype: torch.dtype = torch.float64,
    bias: str = "frozen",
    adapted: bool = True,
    **options: Any,
) -> Any:
    """A layer that has been trained (its B is not zero), or a frozen one without an adapter."""
    base = make_base(kind, shape, dtype, bias != "none").requires_grad_(False)
    layer: Any = base
    if adapted:
        layer = LoRALinear(base, rank, 3, **({"dtype": torch.promote_types(dtype, torch.float32)} | options))
        nn.init.normal_(layer.lora_B.weight)
    if bias == "trained":
        base.bias.requires_grad_(True)
    return layer


def trainable(*layers: nn.Module) -> list[nn.Parameter]:
    return [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]


def norm_weight(width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(0.5, 1.5, width, dtype=dtype)


def seeded(function: Callable[[], Any]) -> Any:
    """What a function gives from the same state of the generator: it draws the same masks each time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return function()


def as_it_reads(step: Callable[[Tensor, Normed | None], Any], x: Tensor, weight: Tensor | None, ops: Ops) -> Any:
    """A step on x, or on the norm of x that it is told of."""
    if weight is None:
        return step(x, None)
    return step(fused.rms_norm(ops, x, weight, 1e-6), Normed(x.detach(), weight, 1e-6))


def check(step: Callable[[Tensor, Normed | None], Any], x: Tensor, layers: list[Any], ops: Ops, normed: bool) -> None:
    """Hold the gradient of every input and trained parameter against finite differences, in float64."""
    weight = norm_weight(x.shape[-1]) if normed else None
    parameters = trainable(*layers)
    assert parameters
    assert torch.autograd.gradcheck(
        lambda *_: seeded(lambda: as_it_reads(step, x, weight, ops)), (x.requires_grad_(), *parameters), atol=1e-6
    )


def linears_step(ops: Ops, layers: list[Any]) -> Callable[[Tensor, Normed | None], Any]:
    return lambda x, normed: fused.linears(ops, layers, x, normed)


def swiglu_step(ops: Ops, layers: list[Any]) -> Callable[[Tensor, Normed | None], Any]:
    return lambda x, normed: fused.swiglu(ops, *layers, x, normed)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ against differences


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("normed", [False, True])
def test_layers_that_read_one_input_have_the_right_gradient(
    count: int, bias: str, dropout: float, normed: bool
) -> None:
    ranks, variants = (2, 3, 2), ("lora", "rslora", "lora")
    layers = [
        make_layer(shape=(5, 3 + n), rank=ranks[n], variant=variants[n], bias=bias, dropout=dropout)
        for n in range(count)
    ]
    check(linears_step(EAGER, layers), double(2, 2, 5), layers, EAGER, normed)


@pytest.mark.parametrize("adapted", [(1, 0, 0), (0, 1, 0), (0, 1, 1), (1, 0, 1)])
@pytest.mark.parametrize("dropouts", [(0.0, 0.0, 0.0), (0.4, 0.4, 0.4), (0.4, 0.0, 0.3), (0.0, 0.4, 0.0)])
def test_members_without_an_adapter_or_with_another_dropout_have_the_right_gradient(
    adapted: tuple[int, ...], dropouts: tuple[float, ...]
) -> None:
    layers = [
        make_layer(shape=(5, 3 + n), bias="trained" if n == 2 else "frozen", adapted=bool(adapted[n]))
        if not adapted[n]
        else make_layer(shape=(5, 3 + n), bias="none", dropout=dropouts[n])
        for n in range(3)
    ]
    check(linears_step(EAGER, layers), double(3, 5), layers, EAGER, False)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@OPS
def test_every_base_has_the_right_gradient(kind: str, normed: bool, dropout: float, ops: Ops) -> None:
    width = 16 if kind in QUANTIZED else 6  # four rows are a block
    layers = [make_layer(kind, (width, 4 * n + 4), dropout=dropout, bias="trained") for n in range(2)]
    check(linears_step(ops, layers), double(2, width), layers, ops, normed)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("normed", [False, True])
@OPS
def test_a_swiglu_block_has_the_right_gradient(bias: str, dropout: float, normed: bool, ops: Ops) -> None:
    shapes, variants, ranks = ((4, 6), (4, 6), (6, 4)), ("lora", "rslora", "lora"), (2, 3, 2)
    layers = [
        make_layer(shape=shape, rank=rank, variant=variant, bias=bias, dropout=dropout)
        for shape, rank, variant in zip(shapes, ranks, variants, strict=True)
    ]
    check(swiglu_step(ops, layers), double(2, 2, 4), layers, ops, normed)


@pytest.mark.parametrize("adapted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", ["none", "trained"])
def test_a_swiglu_block_adapted_in_part_has_the_right_gradient(
    adapted: tuple[int, ...], dropout: float, bias: str
) -> None:
    layers = [
        make_layer(shape=shape, bias=bias, adapted=bool(one), **({"dropout": dropout} if one else {}))
        for shape, one in zip(((4, 6), (4, 6), (6, 4)), adapted, strict=True)
    ]
    check(swiglu_step(EAGER, layers), double(3, 4), layers, EAGER, True)


@pytest.mark.parametrize("kind", ["conv1d", "nf4", "fp4"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_swiglu_block_over_every_base_has_the_right_gradient(kind: str, dropout: float) -> None:
    width, middle = (64, 64) if kind in QUANTIZED else (4, 6)
    layers = [make_layer(kind, shape, dropout=dropout) for shape in ((width, middle), (width, middle), (middle, width))]
    step, x, w = swiglu_step(EAGER, layers), double(2, width), double(2, width)
    # one direction at a time: 64 x 64 numbers are many for all of them
    assert torch.autograd.gradcheck(
        lambda *_: seeded(lambda: (step(x, None) * w).sum()), (x.requires_grad_(), *trainable(*layers)), fast_mode=True
    )


@OPS
def test_norms_and_rotations_have_the_right_gradient(ops: Ops) -> None:
    x = double(2, 3, 2, 6).requires_grad_()
    angles = double(1, 3, 3).repeat(1, 1, 2)
    assert torch.autograd.gradcheck(lambda x: fused.rms_norm(ops, x, norm_weight(6), 1e-3), (x,))
    assert torch.autograd.gradcheck(lambda x: fused.rotate(ops, x, angles.cos(), angles.sin()), (x,))


@pytest.fixture(params=[(3, 1), (1, 40), (2, 4), (128, 512 * 1024)], ids=lambda sizes: f"{sizes[0]}-queries")
def block_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries at a time, down to one, and scores, down to one head at a time."""
    monkeypatch.setattr(fused, "QUERIES", request.param[0])
    monkeypatch.setattr(fused, "SCORES", request.param[1])


@pytest.mark.usefixtures("block_sizes")
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [None, (5, 2)])
@OPS
def test_attention_in_blocks_is_attention_and_has_the_right_gradient(
    heads: tuple[int, int], lengths: tuple[int, ...] | None, ops: Ops
) -> None:
    q, k, v = (double(2, 5, n, 2).requires_grad_() for n in (heads[0], heads[1], heads[1]))
    scale, sizes = 0.37, None if lengths is None else torch.tensor(lengths)
    place = torch.arange(5)
    mask = (place <= place.unsqueeze(1)) & (place < torch.tensor(lengths or (5, 5)).view(2, 1, 1, 1))

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        few = [x.transpose(1, 2).repeat_interleave(heads[0] // x.shape[2], dim=1) for x in (q, k, v)]
        scores = (few[0] @ few[1].mT * scale).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ few[2]).transpose(1, 2)

    found, expected = fused.attention(ops, q, k, v, scale, sizes), reference(q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    if fused.QUERIES == 3:
        assert torch.autograd.gradcheck(lambda q, k, v: fused.attention(ops, q, k, v, scale, sizes), (q, k, v))


@pytest.mark.usefixtures("block_sizes")
def test_one_place_attends_to_itself() -> None:
    q, v = double(2, 1, 4, 3), double(2, 1, 2, 3)
    found = fused.attention(EAGER, q, double(2, 1, 2, 3), v, 1.0)
    torch.testing.assert_close(found, v.repeat_interleave(2, dim=2))


# ------------------------------------------------------------------------------------------ against the plain layer


def gradients(result: Any, of: list[Any]) -> list[Tensor | None]:
    results = result if isinstance(result, tuple) else (result,)
    weights = [torch.linspace(-1, 1, y.numel()).view(y.shape).sin().to(y.dtype) for y in results]
    total = sum((y * w).sum() for y, w in zip(results, weights, strict=True))
    return list(torch.autograd.grad(total, of, allow_unused=True))


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Equal to a part of the largest number of each tensor."""
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and one.shape == other.shape
            assert (one - other).abs().max() <= tolerance * other.abs().max(), f"{one} is not {other}"


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("kind", [*BASES, "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_step_is_the_plain_layer_with_the_same_masks(kind: str, dropout: float, dtype: torch.dtype) -> None:
    if kind in QUANTIZED and dtype == torch.float64:
        pytest.skip("bitsandbytes multiplies in float32 and less")
    layers = [make_layer(kind, (64, 32), rank, dtype=dtype, dropout=dropout, bias="frozen") for rank in (2, 3)]
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    of = [x, *trainable(*layers)]
    found, expected = (
        seeded(make) for make in (lambda: fused.linears(EAGER, layers, x), lambda: tuple(layer(x) for layer in layers))
    )
    close(found, expected, TOLERANCE[dtype])
    close(gradients(found, of), gradients(expected, of), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", [*BASES, "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_swiglu_block_is_the_plain_one_with_the_same_masks(kind: str, dropout: float) -> None:
    layers = [
        make_layer(kind, shape, dtype=torch.float32, dropout=dropout) for shape in ((64, 128), (64, 128), (128, 64))
    ]
    gate, up, down = layers
    x = torch.randn(2, 5, 64, requires_grad=True)
    of = [x, *trainable(*layers)]
    found, expected = (
        seeded(make) for make in (lambda: fused.swiglu(EAGER, *layers, x), lambda: down(F.silu(gate(x)) * up(x)))
    )
    close((found,), (expected,), 1e-5)
    # in 8 bits a last digit of h moves a code of it
    close(gradients(found, of), gradients(expected, of), 1e-5 if kind != "int8" else 2e-2)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_gradient_of_a_quantized_base_is_that_of_its_dequantized_weight(kind: str) -> None:
    layer, x = make_layer(kind, (64, 32), dtype=torch.float32), torch.randn(5, 64, requires_grad=True)
    A, B, W = layer.lora_A.weight, layer.lora_B.weight, dequantize(layer.base_layer)
    expected = F.linear(x, W, layer.bias) + layer.scaling * (x @ A.T) @ B.T
    close(gradients(fused.linears(EAGER, (layer,), x), [x, A, B]), gradients(expected, [x, A, B]), 1e-6)


@pytest.mark.parametrize("adapter_dtype", ["int8", "nf4"])
def test_rounded_factors_multiply_rounded_and_their_gradient_goes_straight_through(adapter_dtype: str) -> None:
    layers = [
        make_layer(shape=shape, rank=4, dtype=torch.float32, adapter_dtype=adapter_dtype)
        for shape in ((64, 128), (64, 128), (128, 64))
    ]
    gate, up, down = layers
    assert not torch.equal(gate.lora_A.value(), gate.lora_A.weight)
    x = torch.randn(7, 64, requires_grad=True)
    of = [x, *trainable(*layers)]
    close(gradients(fused.swiglu(EAGER, *layers, x), of), gradients(down(F.silu(gate(x)) * up(x)), of), 1e-5)


def test_in_evaluation_nothing_is_dropped_and_no_number_is_drawn() -> None:
    layer, x = make_layer(dropout=0.5).eval(), double(3, 5)
    before = torch.random.get_rng_state()
    torch.testing.assert_close(fused.linears(EAGER, (layer,), x)[0], layer(x))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_keeps_the_expected_share_and_the_expected_value() -> None:
    layer = make_layer(shape=(400, 4), dropout=0.25, bias="none")
    with torch.no_grad():
        x = torch.ones(500, 400, dtype=torch.float64)
        (mask,) = fused.draw_masks(x, [fused.Member(layer.base_layer, 1.0, 0.25)])
        kept = fused.dropped(x, mask, fused.Member(layer.base_layer, 1.0, 0.25))
    assert abs(float(mask.double().mean()) - 0.75) < 0.005  # 200,000 draws: five standard deviations
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / 0.75], dtype=torch.float64))


def test_an_input_that_needs_no_gradient_gets_none_and_frozen_factors_get_none() -> None:
    layers = [make_layer(), make_layer()]
    layers[1].requires_grad_(False)
    x = double(3, 5)
    first, second = fused.linears(EAGER, layers, x)
    (first.sum() + second.sum()).backward()
    assert x.grad is None and layers[1].lora_A.weight.grad is None and layers[1].lora_B.weight.grad is None
    A, B = layers[0].lora_A.weight, layers[0].lora_B.weight
    ones = torch.ones(3, 4, dtype=torch.float64)
    torch.testing.assert_close(A.grad, layers[0].scaling * (ones @ B).T @ x)
    torch.testing.assert_close(B.grad, layers[0].scaling * ones.T @ (x @ A.T))


def test_nothing_needs_a_gradient_where_nothing_is_trained() -> None:
    layers = [make_layer(shape=shape).requires_grad_(False) for shape in ((4, 6), (4, 6), (6, 4))]
    x = double(3, 4)
    assert not fused.swiglu(EAGER, *layers, x).requires_grad
    assert not fused.linears(EAGER, layers[:2], x)[0].requires_grad
    assert not fused.rms_norm(EAGER, x, norm_weight(4), 1e-6).requires_grad


@pytest.mark.parametrize("normed", [False, True])
def test_the_backward_pass_can_run_twice_and_adds_up(normed: bool) -> None:
    layers = [make_layer(shape=shape, dropout=0.3) for shape in ((4, 6), (4, 6), (6, 4))]
    x, weight = double(3, 4).requires_grad_(), norm_weight(4) if normed else None
    y = as_it_reads(swiglu_step(EAGER, layers), x, weight, EAGER).sum()
    y = y + sum(out.sum() for out in as_it_reads(linears_step(EAGER, layers[:2]), x, weight, EAGER))
    y.backward(retain_graph=True)
    of = [x, *trainable(*layers)]
    once = [each.grad.clone() for each in of]
    y.backward()
    close([each.grad for each in of], [2 * each for each in once], 1e-12)


def test_the_backward_pass_does_not_run_two_deep_in_silence() -> None:
    layer, x = make_layer(), double(3, 5).requires_grad_()
    (first,) = torch.autograd.grad(fused.linears(EAGER, (layer,), x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_that_nobody_uses_bring_no_gradient(used: tuple[int, ...], dropout: float) -> None:
    layers = [make_layer(shape=(5, 3 + n), dropout=dropout) for n in range(3)]
    x = double(3, 5).requires_grad_()
    of = [x, *trainable(*layers)]
    found, expected = (
        seeded(make) for make in (lambda: fused.linears(EAGER, layers, x), lambda: tuple(layer(x) for layer in layers))
    )
    found, expected = (gradients(tuple(each[n] for n in used), of) for each in (found, expected))
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None or not one.any()
        else:
            torch.testing.assert_close(one, other)


def test_of_an_output_that_nobody_uses_nothing_is_multiplied() -> None:
    layers, x = [make_layer(shape=(5, 3 + n)) for n in range(3)], double(7, 5).requires_grad_()
    first, _, _ = fused.linears(EAGER, layers, x)
    with Products() as counted:
        first.sum().backward()
    # dX through W and through A, dA, dB and G B of the first alone
    assert counted.work == 7 * (5 * 3 + 2 * 2 * (5 + 3))


@pytest.mark.parametrize("step", ["linears", "swiglu", "rms_norm", "attention"])
def test_a_model_may_write_into_what_a_step_gave(step: str) -> None:
    layers = [make_layer(shape=shape) for shape in ((4, 6), (4, 6), (6, 4))]
    x = double(2, 3, 4).requires_grad_()
    make: dict[str, Callable[[], Tensor]] = {
        "linears": lambda: fused.linears(EAGER, layers[:2], x)[1],
        "swiglu": lambda: fused.swiglu(EAGER, *layers, x),
        "rms_norm": lambda: fused.rms_norm(EAGER, x, norm_weight(4), 1e-6),
    }
    if step == "attention":  # it keeps its output, and says so
        heads = x.view(2, 3, 2, 2)
        y = fused.attention(EAGER, heads, heads, heads, 0.5)
        y += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        return
    of = [x, *(trainable(*layers[:2]) if step == "linears" else trainable(*layers) if step == "swiglu" else [])]
    apart = gradients(make[step]().square() + 1, of)
    y = make[step]()
    y = y.square_()
    y += 1
    close(gradients(y, of), apart, 1e-12)


def test_an_output_of_attention_is_whole_in_memory_and_kept_once() -> None:
    q, k, v = (torch.randn(2, 6, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    layer = make_layer(shape=(32, 5), dtype=torch.float32, rank=2)
    with Kept(q, k, v, *layer.parameters()) as kept:
        y = fused.attention(EAGER, q, k, v, 0.3)
        out = fused.linears(EAGER, (layer,), y.reshape(2, 6, 32))
    assert kept.bytes == 12 * (32 + 4 + 2) * FLOAT  # y, the sums of its rows, x Aᵀ
    del y, out


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@OPS
def test_no_tokens_give_no_outputs_and_gradients_of_zero(dropout: float, ops: Ops) -> None:
    layers = [make_layer(shape=shape, dropout=dropout) for shape in ((4, 6), (4, 6), (6, 4))]
    x = double(0, 4).requires_grad_()
    y = as_it_reads(swiglu_step(ops, layers), x, norm_weight(4), ops)
    first, second = fused.linears(ops, layers[:2], x)
    assert y.shape == (0, 4) and first.shape == second.shape == (0, 6)
    (y.sum() + first.sum() + second.sum()).backward()
    assert x.grad is not None and x.grad.shape == (0, 4)
    for parameter in trainable(*layers):
        assert parameter.grad is not None and not parameter.grad.any()


def test_an_input_in_strange_memory_is_read_by_its_meaning() -> None:
    layers = [make_layer(shape=shape) for shape in ((4, 6), (4, 6), (6, 4))]
    straight = double(2, 3, 4)
    for strange in (straight.transpose(0, 1).contiguous().transpose(0, 1), straight[:1].expand(2, 3, 4)):
        for step in (swiglu_step(EAGER, layers), linears_step(EAGER, layers[:2])):
            results = []
            for x in (strange.detach(), strange.contiguous()):
                x = x.requires_grad_()
                result = as_it_reads(step, x, norm_weight(4), EAGER)
                results.append([*(result if isinstance(result, tuple) else (result,)), *gradients(result, [x])])
            close(*results, 1e-12)


# ------------------------------------------------------------------------------------------------ what is kept


class Kept:
    """The distinct memory that autograd saves within a context, parameters aside: {place in memory: (shape, bytes)}."""

    def __init__(self, *parameters: Any) -> None:
        self.places: dict[int, tuple[torch.Size, int]] = {}
        self._without = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.numel() and storage.data_ptr() not in self._without:
            self.places[storage.data_ptr()] = (tensor.shape, storage.nbytes())
        return tensor

    def __enter__(self) -> Kept:
        self._hooks = saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.places.values())


def parameters_of(*layers: nn.Module) -> list[Tensor]:
    return [parameter for layer in layers for parameter in layer.parameters()]


TOKENS, WIDTH, MIDDLE, RANK, FLOAT = 40, 64, 192, 4, 4


def blocks(kind: str = "linear", dropout: float = 0.0) -> list[Any]:
    return [
        make_layer(kind, shape, RANK, dtype=torch.float32, dropout=dropout, bias="none")
        for shape in ((WIDTH, MIDDLE), (WIDTH, MIDDLE), (MIDDLE, WIDTH))
    ]


@pytest.mark.parametrize("kind", ["linear", "nf4", "int8"])
def test_layers_that_read_one_input_keep_it_once(kind: str) -> None:
    layers = [make_layer(kind, (WIDTH, 128), RANK, dtype=torch.float32) for _ in range(3)]
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with Kept(*parameters_of(*layers)) as kept:
        outputs = fused.linears(EAGER, layers, x)
    assert kept.bytes == TOKENS * (WIDTH + 3 * RANK) * FLOAT
    del outputs


def test_an_input_known_as_a_norm_is_not_kept() -> None:
    layers = [make_layer(shape=(WIDTH, 128), rank=RANK, dtype=torch.float32) for _ in range(3)]
    x, weight = torch.randn(TOKENS, WIDTH, requires_grad=True), norm_weight(WIDTH, torch.float32)
    step = linears_step(EAGER, layers)
    with Kept(weight, *parameters_of(*layers)) as kept:
        outputs = as_it_reads(step, x, weight, EAGER)
    # x itself, for the norm and for the layers; not its norm
    assert kept.bytes == TOKENS * (WIDTH + 3 * RANK) * FLOAT
    with Kept(weight, *parameters_of(*layers)) as more:
        del outputs
        outputs = step(fused.rms_norm(EAGER, x, weight, 1e-6), None)
    assert more.bytes == kept.bytes + TOKENS * WIDTH * FLOAT
    del outputs


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_a_swiglu_block_keeps_its_input_gate_and_up_and_nothing_else_of_that_width(kind: str) -> None:
    layers, x = blocks(kind), torch.randn(TOKENS, WIDTH, requires_grad=True)
    with Kept(*parameters_of(*layers)) as kept:
        y = fused.swiglu(EAGER, *layers, x)
    assert kept.bytes == TOKENS * (WIDTH + 2 * MIDDLE + 3 * RANK) * FLOAT
    del y


def test_a_mask_of_dropout_is_kept_as_bytes() -> None:
    layers, x = blocks(dropout=0.1), torch.randn(TOKENS, WIDTH, requires_grad=True)
    with Kept(*parameters_of(*layers)) as kept:
        y = fused.swiglu(EAGER, *layers, x)
    masks = TOKENS * (2 * WIDTH + MIDDLE)
    assert kept.bytes == TOKENS * (WIDTH + 2 * MIDDLE + 3 * RANK) * FLOAT + masks
    del y


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_no_dense_weight_of_a_quantized_base_is_kept(kind: str) -> None:
    layers = [make_layer(kind, shape, RANK, dtype=torch.float32) for shape in ((256, 512), (256, 512), (512, 256))]
    x = torch.randn(3, 256, requires_grad=True)
    with Kept(*parameters_of(*layers)) as kept:
        y = fused.swiglu(EAGER, *layers, x).sum() + sum(out.sum() for out in fused.linears(EAGER, layers[:2], x))
    assert all(shape.numel() < 256 * 512 // 2 for shape, _ in kept.places.values())
    y.backward()


class Products(TorchDispatchMode):
    """Counts what is multiplied: {shape of the result: how many matrix products have it}, and multiplications."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.work = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes.append(tuple(result.shape))
            self.work += result.numel() * args[-1].shape[0]
        return result


def test_the_thin_products_come_first_and_no_dense_gradient_is_made() -> None:
    layers, x = blocks(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    with Products() as counted:
        fused.swiglu(EAGER, *layers, x).sum().backward()
    assert (MIDDLE, WIDTH) not in counted.shapes and (WIDTH, MIDDLE) not in counted.shapes
    base, factors = 3 * TOKENS * WIDTH * MIDDLE, 3 * TOKENS * RANK * (WIDTH + MIDDLE)
    # the base forward and once backward; the factors forward, and backward for the input and for themselves; that of
    # down's B for h and again for its A
    assert counted.work <= 2 * base + 3 * factors + TOKENS * RANK * WIDTH


def test_of_an_input_that_needs_no_gradient_no_product_with_the_base_is_made_backward() -> None:
    layers, x = blocks(), torch.randn(TOKENS, WIDTH)
    y = fused.linears(EAGER, layers[:2], x)
    with Products() as counted:
        (y[0].sum() + y[1].sum()).backward()
    assert (TOKENS, WIDTH) not in counted.shapes
    assert counted.work == 2 * TOKENS * RANK * (2 * MIDDLE + WIDTH)
