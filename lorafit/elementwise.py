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

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import InputError

# Rows are taken in blocks of about this many numbers, several of which fit the second-level cache of a core together.
BLOCK = 64 * 1024


@dataclass(frozen=True)
class Ops:
    """One make of the functions. name: for reports.

    rms_norm(x, weight, eps) -> y; rms_norm_backward(dy, x, weight, eps) -> dx
    swiglu(gate, up) -> h; swiglu_backward(dh, gate, up) -> (d gate, d up, h)
    rotate(x, cos, sin) -> x rotated, sin negated in the backward pass; x [batch, length, heads, head_dim], cos and sin
    [batch or 1, length, head_dim]
    attend(scores, first, scale, lengths) -> (weights, log of the sum of each row's exponentials), causal: scores
    [n, groups, queries, keys] of the queries from place `first` on against all keys up to the last of them; lengths
    [n]: how many keys there are, or None for all
    attend_backward(scores, d weights, log sums, delta, first, scale, lengths) -> (weights, d scores), delta being the
    sum of each row's output · its gradient
    cross_entropy(logits, targets) -> (sum of -log p in float32, d sum / d logits); logits may be overwritten
    """

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    swiglu_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    attend: Callable[[Tensor, int, float, Tensor | None], tuple[Tensor, Tensor]]
    attend_backward: Callable[[Tensor, Tensor, Tensor, Tensor, int, float, Tensor | None], tuple[Tensor, Tensor]]
    cross_entropy: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def __reduce__(self) -> Any:
        return _named, (self.name,)  # what is compiled is compiled anew where a copy is opened


def _named(name: str) -> Ops:
    return compiled() if name == "compiled" else liger() if name == "liger" else EAGER


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


def hidden(scores: Tensor, first: int, lengths: Tensor | None) -> Tensor:
    """Which keys a query does not see: those after it, and padding; [n or 1, 1, queries, keys]."""
    queries, keys = scores.shape[-2:]
    row = torch.arange(queries, device=scores.device).view(queries, 1) + first
    column = torch.arange(keys, device=scores.device)
    later = (column > row).view(1, 1, queries, keys)
    return later if lengths is None else later | (column >= lengths.view(-1, 1, 1, 1))


def attend(scores: Tensor, first: int, scale: float, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(scale · scores) over the keys that a query sees (arXiv:1706.03762, section 3.2.1)."""
    s = (wide(scores) * scale).masked_fill(hidden(scores, first, lengths), -torch.inf)
    largest = s.amax(-1, keepdim=True)
    e = (s - largest).exp()
    total = e.sum(-1, keepdim=True)
    return (e / total).to(scores.dtype), (largest + total.log()).squeeze(-1)


def attend_backward(
    scores: Tensor, d_weights: Tensor, log_sums: Tensor, delta: Tensor, first: int, scale: float, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weights made anew from their sums, and through the softmax (arXiv:2205.14135, appendix B.2)."""
    s = wide(scores) * scale - log_sums.unsqueeze(-1)
    p = s.exp().masked_fill(hidden(scores, first, lengths), 0.0)
    return p.to(scores.dtype), (p * (wide(d_weights) - delta.unsqueeze(-1)) * scale).to(scores.dtype)


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
    count = x.shape[0]
    rows = max(1, count if x.device.type != "cpu" else BLOCK * count // max(1, x.numel()))
    return (slice(start, start + rows) for start in range(0, count, rows))


def _eager_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.device.type != "cpu":
        return rms_norm(x, weight, eps)
    y = torch.empty_like(x)
    for rows in _blocks(x):
        y[rows] = rms_norm(x[rows], weight, eps)
    return y


def _eager_rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.device.type != "cpu":
        return rms_norm_backward(dy, x, weight, eps)
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


def _hide(s: Tensor, first: int, lengths: Tensor | None, value: float) -> Tensor:
    """Put a value, in place, where a query does not see a key; most of the keys come before all of the queries."""
    s[..., first:].masked_fill_(hidden(s[..., first:], 0, None), value)
    if lengths is not None:
        s.masked_fill_(torch.arange(s.shape[-1], device=s.device) >= lengths.view(-1, 1, 1, 1), value)
    return s


def _eager_attend(scores: Tensor, first: int, scale: float, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    s = _hide(wide(scores) * scale, first, lengths, -torch.inf)
    log_sums = s.logsumexp(-1)
    return s.sub_(log_sums.unsqueeze(-1)).exp_().to(scores.dtype), log_sums


def _eager_attend_backward(
    scores: Tensor, d_weights: Tensor, log_sums: Tensor, delta: Tensor, first: int, scale: float, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    p = _hide((wide(scores) * scale).sub_(log_sums.unsqueeze(-1)).exp_(), first, lengths, 0.0)
    d_scores = (wide(d_weights) - delta.unsqueeze(-1)).mul_(scale).mul_(p)
    return p.to(scores.dtype), d_scores.to(scores.dtype)


def _eager_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    total = logits.new_zeros((), dtype=dtype)
    # rows of a vocabulary are long: a few of them fill the cache
    few = 32 if logits.device.type == "cpu" else max(1, logits.shape[0])
    for start in range(0, logits.shape[0], few):
        rows, index = logits[start : start + few], targets[start : start + few].unsqueeze(1)
        gradient = torch.log_softmax(rows, dim=-1, dtype=dtype)
        total -= gradient.gather(1, index).sum()
        gradient.exp_().scatter_add_(1, index, gradient.new_full((1, 1), -1.0).expand(index.shape))
        rows.copy_(gradient)
    return total, logits


EAGER = Ops(
    "eager",
    _eager_rms_norm,
    _eager_rms_norm_backward,
    _eager_swiglu,
    _eager_swiglu_backward,
    _eager_rotate,
    _eager_attend,
    _eager_attend_backward,
    _eager_cross_entropy,
)


# ------------------------------------------------------------------------------------------------ compiled, Liger


@functools.cache
def compiled() -> Ops:
    """The formulas through torch.compile, for any number of rows; each is compiled at its first call."""
    formulas: list[Any] = [rms_norm, rms_norm_backward, swiglu, swiglu_backward, rotate]
    formulas += [attend, attend_backward, cross_entropy]
    return Ops("compiled", *(torch.compile(formula, dynamic=True) for formula in formulas))


def has_liger() -> bool:
    """Whether the package liger-kernel is there (`pip install lorafit[liger]`)."""
    return importlib.util.find_spec("liger_kernel") is not None


@functools.cache
def liger() -> Ops:
    """Norms, SwiGLU and rotations by Liger's Triton kernels, the rest as eager. For CUDA."""
    from liger_kernel.ops import rms_norm as norm, rope, swiglu as glu

    def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm_forward(x, weight, eps, 0.0, "llama", None)[0]

    def liger_rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # the root mean squares are not kept: one pass more over x
        _, x, rstd, block, warps, casting = norm.rms_norm_forward(x, weight, eps, 0.0, "llama", None)
        return norm.rms_norm_backward(dy, x, weight, rstd, 0.0, casting, block, warps, False, None)[0]

    def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return glu.swiglu_forward(gate, up)[2]

    def liger_swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # its kernel writes the gradients over gate and up, which autograd may be asked for again
        return *glu.swiglu_backward(gate.clone(), up.clone(), dh), liger_swiglu(gate, up)

    def liger_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # rotates queries and keys in one call, in place: here one of them is a head that nobody needs
        other = x[:, :, :1].clone()
        turned = rope.rope_forward(x.clone().transpose(1, 2), other.transpose(1, 2), cos, sin)[0]
        return turned.transpose(1, 2)

    return dataclasses.replace(
        EAGER,
        name="liger",
        rms_norm=liger_rms_norm,
        rms_norm_backward=liger_rms_norm_backward,
        swiglu=liger_swiglu,
        swiglu_backward=liger_swiglu_backward,
        rotate=liger_rotate,
    )


def ops_without_compiling(device: torch.device) -> Ops:
    """What is best on a device without torch.compile."""
    return liger() if device.type == "cuda" and has_liger() else EAGER


# Multiplications and additions of a run from which on compiling pays: it costs ten seconds on two cores of a CPU and
# saves a tenth of the time there; on a GPU a minute and less than a tenth, which is an estimate and not measured.
WORTH_COMPILING = {"cpu": 1e14, "cuda": 1e17}


@functools.cache
def _refusal(device: torch.device) -> str | None:
    """Why compiling does not work on this machine, found by doing it; None where it does."""
    try:
        with torch.no_grad():
            x = torch.ones(3, 8, device=device)
            compiled().rms_norm(x, x[0], 1e-6)
    except Exception as error:  # whatever a compiler that is missing or broken brings about
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
    return None


def require_compiled(device: torch.device) -> Ops:
    """The compiled functions. Raises InputError where this machine cannot compile."""
    if (why := _refusal(torch.device(device.type))) is not None:
        raise InputError(
            f"model.compile: torch.compile does not work on this machine ({why}). "
            "Install a C++ compiler (on CUDA: Triton), or choose model.compile=off"
        )
    return compiled()
