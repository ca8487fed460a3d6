"""Each make of the elementwise functions is its definition, in every dtype, and forward and backward belong together.

pytest tests/test_elementwise.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fused import FORMULAS
from torch import Tensor

from lorafit import elementwise
from lorafit.elementwise import BLOCK, EAGER, Ops, require_compiled
from lorafit.errors import InputError

OPS = pytest.mark.parametrize("ops", [EAGER, FORMULAS], ids=lambda ops: ops.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
# of the largest number of a tensor: some roundings of each dtype
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
ROWS = pytest.mark.parametrize("rows", [0, 1, 7])
EPS = 1e-5


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    if found.numel():
        assert float((found.double() - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def by_autograd(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    """(what a definition gives in float64, the gradients of its inputs)."""
    inputs = tuple(x.to(torch.float64, copy=True).requires_grad_() for x in inputs)
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy.double())


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_i, x_{i + half}) as a complex number, times exp(i · angle)."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[:, :, None, :half]
    return torch.cat((turned.real, turned.imag), dim=-1)


def visible(queries: int, keys: int, first: int, lengths: Tensor | None, n: int) -> Tensor:
    seen = torch.zeros(n, 1, queries, keys, dtype=torch.bool)
    for row in range(n):
        for query in range(queries):
            end = min(first + query + 1, keys if lengths is None else int(lengths[row]))
            seen[row, 0, query, :end] = True
    return seen


@OPS
@DTYPES
@ROWS
@pytest.mark.parametrize("width", [5, 64])
def test_the_norm_is_its_definition(ops: Ops, dtype: torch.dtype, rows: int, width: int) -> None:
    x, dy, weight = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype), draw(width, dtype=dtype)
    y, dx, _ = by_autograd(norm, (x, weight), dy)
    found, found_dx = ops.rms_norm(x, weight, EPS), ops.rms_norm_backward(dy, x, weight, EPS)
    assert found.dtype == found_dx.dtype == dtype
    close(found, y, dtype)
    close(found_dx, dx, dtype)


@OPS
def test_a_norm_of_zeros_and_of_large_numbers_is_finite(ops: Ops) -> None:
    weight = torch.ones(8, dtype=torch.bfloat16)
    zeros, large = torch.zeros(2, 8, dtype=torch.bfloat16), torch.full((2, 8), 1e15, dtype=torch.bfloat16)
    assert not ops.rms_norm(zeros, weight, EPS).any()
    torch.testing.assert_close(ops.rms_norm(large, weight, EPS), torch.ones_like(large))
    assert torch.isfinite(ops.rms_norm_backward(large, zeros, weight, EPS)).all()


@OPS
@DTYPES
@ROWS
def test_swiglu_is_its_definition_and_its_backward_pass_gives_h_again(ops: Ops, dtype: torch.dtype, rows: int) -> None:
    gate, up, dh = (3 * draw(rows, 9, dtype=dtype) for _ in range(3))
    h, d_gate, d_up = by_autograd(lambda gate, up: gate * torch.sigmoid(gate) * up, (gate, up), dh)
    before = gate.clone(), up.clone(), dh.clone()
    close(ops.swiglu(gate, up), h, dtype)
    for found, expected in zip(ops.swiglu_backward(dh, gate, up), (d_gate, d_up, h), strict=True):
        assert found.dtype == dtype
        close(found, expected, dtype)
    assert all(torch.equal(*pair) for pair in zip((gate, up, dh), before, strict=True))  # kept for a second time


@OPS
@DTYPES
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("of_each", [False, True])
def test_a_rotation_turns_pairs_and_its_backward_pass_turns_them_back(
    ops: Ops, dtype: torch.dtype, batch: int, of_each: bool
) -> None:
    x, dy = draw(batch, 5, 2, 6, dtype=dtype), draw(batch, 5, 2, 6, dtype=dtype)
    angles = draw(batch if of_each else 1, 5, 3, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    y, dx = by_autograd(lambda x: turn(x, cos.double(), sin.double()), (x,), dy)
    close(ops.rotate(x, cos, sin), y, dtype)
    close(ops.rotate(dy, cos, -sin), dx, dtype)


@OPS
@DTYPES
@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("lengths", [None, (6, 2)])
@pytest.mark.parametrize("queries", [1, 3])
def test_attention_weights_are_a_softmax_over_what_a_query_sees(
    ops: Ops, dtype: torch.dtype, first: int, lengths: tuple[int, ...] | None, queries: int
) -> None:
    keys, scale, sizes = first + queries, 0.7, None if lengths is None else torch.tensor(lengths)
    scores, d_weights = (4 * draw(2, 3, queries, keys, dtype=dtype) for _ in range(2))
    seen = visible(queries, keys, first, sizes, 2)

    def softmax(scores: Tensor) -> Tensor:
        return (scores * scale).masked_fill(~seen, -torch.inf).softmax(-1)

    weights, d_scores = by_autograd(softmax, (scores,), d_weights)
    found, log_sums = ops.attend(scores.clone(), first, scale, sizes)
    close(found, weights, dtype)
    assert not found.masked_select(~seen).any()
    expected = (scores.double() * scale).masked_fill(~seen, -torch.inf).logsumexp(-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    close(log_sums, expected, wide)
    assert log_sums.dtype == wide
    # the sum over the keys of weight · its gradient is that of output · its gradient over the width of a head
    delta = (weights * d_weights.double()).sum(-1).to(wide)
    again, found = ops.attend_backward(scores.clone(), d_weights, log_sums, delta, first, scale, sizes)
    close(again, weights, dtype)
    close(found, d_scores, dtype)
    assert found.dtype == again.dtype == dtype


@OPS
def test_scores_far_apart_do_not_overflow(ops: Ops) -> None:
    scores = torch.tensor([[[[3e38, -3e38, 0.0]]]])
    weights, log_sums = ops.attend(scores, 2, 1.0, None)
    torch.testing.assert_close(weights, torch.tensor([[[[1.0, 0.0, 0.0]]]]))
    assert torch.isfinite(log_sums).all()


@OPS
@DTYPES
@ROWS
def test_cross_entropy_is_its_definition(ops: Ops, dtype: torch.dtype, rows: int) -> None:
    logits, targets = 3 * draw(rows, 11, dtype=dtype), torch.arange(rows) % 11
    loss, gradient = by_autograd(
        lambda logits: F.cross_entropy(logits, targets, reduction="sum"), (logits,), torch.ones(())
    )
    found, found_gradient = ops.cross_entropy(logits.clone(), targets)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found_gradient.dtype == dtype
    close(found, loss, torch.promote_types(dtype, torch.float32))
    close(found_gradient, gradient, dtype)


@OPS
def test_large_logits_do_not_overflow(ops: Ops) -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [0.0, 3e4, 3e4]], dtype=torch.bfloat16)
    loss, gradient = ops.cross_entropy(logits.clone(), torch.tensor([1, 1]))
    expected = float(logits[0, 0]) - float(logits[0, 1]) + float(torch.tensor(2.0).log())
    torch.testing.assert_close(loss, torch.tensor(expected))
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0, 0.0], [0.0, -0.5, 0.5]], dtype=torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 9])
def test_rows_that_go_through_the_cache_in_blocks_are_all_done(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "BLOCK", 4 * 16)  # four rows of sixteen
    x, dy, weight = (draw(*shape, dtype=torch.float64) for shape in ((rows, 16), (rows, 16), (16,)))
    for name, arguments in {
        "rms_norm": (x, weight, EPS),
        "rms_norm_backward": (dy, x, weight, EPS),
        "swiglu": (x, dy),
        "swiglu_backward": (dy, x, dy),
    }.items():
        found, expected = (getattr(ops, name)(*arguments) for ops in (EAGER, FORMULAS))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_row_longer_than_a_block_is_a_block() -> None:
    x = torch.randn(3, BLOCK + 1)
    torch.testing.assert_close(EAGER.swiglu(x, x), FORMULAS.swiglu(x, x))


# ------------------------------------------------------------------------------------------------ compiled


@pytest.fixture(scope="module")
def compiled() -> Ops:
    try:
        return require_compiled(torch.device("cpu"))
    except InputError as error:
        pytest.skip(str(error))


SHAPES = [(1, 8), (2, 8), (7, 8), (64, 8), (3, 24), (5, 16), (1, 64), (130, 8), (9, 40), (31, 8), (2, 64), (17, 8)]


def test_compiled_functions_are_right_for_any_shape_and_are_not_compiled_for_each(compiled: Ops) -> None:
    counters = torch._dynamo.utils.counters
    before = dict(counters["stats"])
    for index, (rows, width) in enumerate(SHAPES):
        dtype = torch.float32
        x, dy, weight = (draw(*shape, dtype=dtype) for shape in ((rows, width), (rows, width), (width,)))
        batch, heads = 1 + index % 3, 2
        q = draw(batch, rows, heads, width, dtype=dtype)
        angles = draw(1, rows, width // 2, dtype=dtype).repeat(1, 1, 2)
        first, queries = (0, 128)[index % 2], 1 + index
        scores = draw(batch, heads, queries, first + queries, dtype=dtype)
        lengths = None if index % 3 else torch.arange(1, batch + 1)
        _, log_sums = FORMULAS.attend(scores, first, 0.3, lengths)
        delta = draw(batch, heads, queries, dtype=dtype)
        calls: dict[str, tuple[Any, ...]] = {
            "rms_norm": (x, weight, EPS),
            "rms_norm_backward": (dy, x, weight, EPS),
            "swiglu": (x, dy),
            "swiglu_backward": (dy, x, dy),
            "rotate": (q, angles.cos(), angles.sin()),
            "attend": (scores, first, 0.3, lengths),
            "attend_backward": (scores, scores, log_sums, delta, first, 0.3, lengths),
            "cross_entropy": (x, torch.arange(rows) % width),
        }
        for name, arguments in calls.items():
            found, expected = (getattr(ops, name)(*arguments) for ops in (compiled, FORMULAS))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)
    graphs = counters["stats"]["unique_graphs"] - before.get("unique_graphs", 0)
    # eight functions: a size of one, and lengths that are given or not, are cases of their own
    assert graphs <= 8 * 4


def test_compiled_functions_round_to_16_bits_once(compiled: Ops) -> None:
    gate, up, dh = (draw(33, 24, dtype=torch.bfloat16) for _ in range(3))
    h, d_gate, d_up = by_autograd(lambda gate, up: gate * torch.sigmoid(gate) * up, (gate, up), dh)
    for found, expected in zip(compiled.swiglu_backward(dh, gate, up), (d_gate, d_up, h), strict=True):
        close(found, expected, torch.bfloat16)


@pytest.fixture
def no_memory_of_compiling() -> Iterator[None]:
    for function in (elementwise._refusal, elementwise.compiled):
        function.cache_clear()
    yield
    for function in (elementwise._refusal, elementwise.compiled):
        function.cache_clear()


@pytest.mark.usefixtures("no_memory_of_compiling")
def test_a_machine_that_cannot_compile_is_told_so_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_a_compiler(function: Any, **_: Any) -> Any:
        raise RuntimeError("\nno C++ compiler\nand many lines more")

    monkeypatch.setattr(torch, "compile", without_a_compiler)
    with pytest.raises(
        InputError, match=r"^model\.compile: .*\(RuntimeError: no C\+\+ compiler\).*model\.compile=off$"
    ):
        require_compiled(torch.device("cpu"))


@pytest.mark.usefixtures("no_memory_of_compiling")
def test_a_compiler_that_fails_at_the_first_call_is_a_refusal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("g++: no such file")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    with pytest.raises(InputError, match=r"OSError: g\+\+: no such file"):
        require_compiled(torch.device("cpu"))
