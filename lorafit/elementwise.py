"""What is computed number by number: norms, activations, rotations, the loss of a chunk. Forward, and backward by hand.

A matrix product spends its time on arithmetic; these spend it on moving numbers between memory and core. So each has
three makes with one meaning:

- `EAGER`: plain PyTorch. On the CPU it goes through the rows in blocks that fit the core's cache, so that the several
  operations of a formula read memory once and not each time.
- `compiled()`: the same formulas through torch.compile, which makes one loop of each. It needs a C++ compiler on the
  CPU (Triton on CUDA) and half a minute for the first call, so it is for runs that last.
- `liger()`: the kernels of Liger (arXiv:2410.10989) on CUDA, where the package `liger-kernel` is installed.

Everything works on rows: a tensor [rows, width] for norms and activations, [batch, length, heads, head_dim] for
rotations. Sums run in float32 or wider; what is stored has the dtype of the input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows are taken in blocks of about this many numbers, several of which fit the second-level cache of a core together.
BLOCK = 64 * 1024


@dataclass(frozen=True)
class Ops:
    """One make of the functions. name: for reports.

    rms_norm(x, weight, eps) -> y; rms_norm_backward(dy, x, weight, eps) -> dx
    swiglu(gate, up) -> h; swiglu_backward(dh, gate, up) -> (d gate, d up, h)
    rotate(x, cos, sin) -> x rotated, sin negated in the backward pass; x [batch, length, heads, head_dim], cos and sin
    [batch or 1, length, head_dim]
    cross_entropy(logits, targets) -> (sum of -log p in float32, d sum / d logits); logits may be overwritten
    """

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    swiglu_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    cross_entropy: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------ the formulas


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / sqrt(mean(x²) + eps) (arXiv:1910.07467), rounded before the weight as Llama does."""
    x32 = wide(x)
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * (x32 * rstd).to(x.dtype)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gradient of x, through the mean as well."""
    x32 = wide(x)
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    normed, d_normed = x32 * rstd, wide(dy * weight)
    return ((d_normed - normed * (d_normed * normed).mean(-1, keepdim=True)) * rstd).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (arXiv:2002.05202)."""
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(d gate, d up, h); h is made anew, since whoever asks needs it for the next gradient and has not kept it."""
    gate32 = wide(gate)
    sigmoid = torch.sigmoid(gate32)
    activation = (gate32 * sigmoid).to(gate.dtype)
    slope = sigmoid * (1 + gate32 * (1 - sigmoid))
    return (wide(dh) * wide(up) * slope).to(gate.dtype), dh * activation, activation * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864), the halves of a head against each other as in Llama."""
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    left, right = wide(x[..., :half]), wide(x[..., half:])
    return torch.cat(
        (left * cos[..., :half] - right * sin[..., :half], right * cos[..., half:] + left * sin[..., half:]), dim=-1
    ).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of -log softmax(logits)[target] in float32, its gradient in the dtype of the logits)."""
    logarithm = torch.log_softmax(wide(logits), dim=-1)
    index = targets.unsqueeze(1)
    loss = -logarithm.gather(1, index).sum()
    columns = torch.arange(logits.shape[1], device=logits.device)
    return loss, (logarithm.exp() - (columns == index).to(logarithm.dtype)).to(logits.dtype)


# ------------------------------------------------------------------------------------------------ eager


def _blocks(x: Tensor) -> Iterator[slice]:
    """Slices of rows that fit the cache; all rows at once where there is no such cache to fit."""
    rows = x.shape[0] if x.device.type != "cpu" else max(1, BLOCK // max(1, x[0].numel() if x.shape[0] else 1))
    return (slice(start, start + rows) for start in range(0, x.shape[0], max(1, rows)))


def _eager_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(x)
    for rows in _blocks(x):
        y[rows] = rms_norm(x[rows], weight, eps)
    return y


def _eager_rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dx = torch.empty_like(x)
    for rows in _blocks(x):
        dx[rows] = rms_norm_backward(dy[rows], x[rows], weight, eps)
    return dx


def _eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    h = torch.empty_like(gate)
    for rows in _blocks(gate):
        torch.ops.aten.silu.out(gate[rows], out=h[rows])
        h[rows] *= up[rows]
    return h


def _eager_swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_gate, d_up, h = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    for rows in _blocks(gate):
        torch.ops.aten.silu.out(gate[rows], out=h[rows])
        torch.mul(dh[rows], h[rows], out=d_up[rows])
        torch.ops.aten.silu_backward.grad_input(dh[rows] * up[rows], gate[rows], grad_input=d_gate[rows])
        h[rows] *= up[rows]
    return d_gate, d_up, h


def _eager_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    result = x * cos
    result[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    result[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return result


def _eager_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    index = targets.unsqueeze(1)
    logarithm = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    loss = -logarithm.gather(1, index).sum()
    gradient = logarithm.exp_()
    gradient.scatter_add_(1, index, gradient.new_full((1, 1), -1.0).expand(index.shape))
    return loss, logits.copy_(gradient)


EAGER = Ops(
    "eager",
    _eager_rms_norm,
    _eager_rms_norm_backward,
    _eager_swiglu,
    _eager_swiglu_backward,
    _eager_rotate,
    _eager_cross_entropy,
)


# ------------------------------------------------------------------------------------------------ compiled, Liger


@functools.cache
def compiled() -> Ops:
    """The formulas through torch.compile, for any number of rows; each is compiled at its first call."""
    formulas = (rms_norm, rms_norm_backward, swiglu, swiglu_backward, rotate, cross_entropy)
    return Ops("compiled", *(torch.compile(formula, dynamic=True, fullgraph=True) for formula in formulas))
