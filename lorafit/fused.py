"""The fast path: several layers as one step of automatic differentiation, with the backward pass written by hand.

The layer in lora.py is the definition. What is here computes the same with fewer and smaller intermediate results, and
is held equal to it by gradient checks. Written for one linear layer, G being the gradient of its output Y:

    Y = X Wᵀ + b + s · U Bᵀ          U = X Aᵀ                           [tokens, rank]: the only thing kept besides X
    dA = s · (G B)ᵀ X                dB = s · Gᵀ U                      never [out, in]
    dX = G W + s · (G B) A           the thin products first

- The update is added onto the base's output in place; no other tensor of its size is made, and nothing is scaled apart.
- A and B are rounded down to the dtype of X; X is never widened to theirs.
- Layers that read the same X (queries, keys and values; gate and up) keep it once, and their thin products are one.
- A quantized W is made dense into one buffer that all layers share, in the forward pass and again in the backward
  pass: it is needed for the length of one product.
- The input may be known as the norm of something that is kept anyhow (`Normed`); then that is remembered instead, and
  the norm computed again.
- A SwiGLU block keeps X, gate and up, and computes h = silu(gate) · up again.

A frozen layer needs no gradient of its own, and an input that needs none gets none: below the first adapted layer
nothing is computed and nothing kept. The backward pass may run more than once, but not twice deep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lorafit.elementwise import Ops, wide
from lorafit.lora import LoRALinear
from lorafit.quant import dequantize_shared, is_quantized, stores_int8


@dataclass(frozen=True)
class Member:
    """One linear layer of a step: what of it is no tensor to be trained. dropout: 0 where none is drawn."""

    base: Any
    scaling: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True)
class Normed:
    """How an input came about: ops.rms_norm(x, weight, eps)."""

    x: Tensor
    weight: Tensor
    eps: float


def weight_of(base: Any, dtype: torch.dtype) -> Tensor:
    """The dense [out_features, in_features] weight; of a quantized layer it is valid until the next is asked for."""
    if is_quantized(base):
        return dequantize_shared(base, dtype)
    return base.weight.T if isinstance(base, Conv1D) else base.weight


def base_product(x: Tensor, base: Any, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b for x [tokens, in_features]."""
    if stores_int8(base):
        return base(x)  # multiplies in 8 bits, which is not x Wᵀ with the dense weight (arXiv:2208.07339)
    return F.linear(x, weight_of(base, x.dtype), bias)


def thin(factor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if factor is None else factor.detach().to(dtype)


def draw_masks(x: Tensor, members: Sequence[Member]) -> list[Tensor]:
    """For each member with dropout: which inputs of its A are kept (bool, the shape of x)."""
    return [
        torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - m.dropout) for m in members if m.dropout
    ]


def dropped(x: Tensor, mask: Tensor, member: Member) -> Tensor:
    return (x * mask).mul_(1 / (1 - member.dropout))


def add_updates(
    x: Tensor,
    outputs: Sequence[Tensor],
    members: Sequence[Member],
    factors: Sequence[Tensor | None],
    masks: list[Tensor],
) -> Tensor | None:
    """Add s · (x Aᵀ) Bᵀ onto each member's output, in place; gives all x Aᵀ side by side [tokens, sum of ranks]."""
    As = [thin(A, x.dtype) for A in factors[0::2]]
    Bs = [thin(B, x.dtype) for B in factors[1::2]]
    adapted = [A for A in As if A is not None]
    if not adapted:
        return None
    if masks:
        left = iter(masks)
        inputs = [dropped(x, next(left), m) if m.dropout else x for m in members]
        us = torch.cat([xd @ A.T for xd, A in zip(inputs, As, strict=True) if A is not None], dim=1)
    else:
        us = x @ (adapted[0] if len(adapted) == 1 else torch.cat(adapted)).T
    at = 0
    for Y, member, B in zip(outputs, members, Bs, strict=True):
        if B is not None:
            Y.addmm_(us[:, at : at + B.shape[1]], B.T, alpha=member.scaling)
            at += B.shape[1]
    return us


def adjoint(
    x: Tensor,
    grads: Sequence[Tensor | None],
    members: Sequence[Member],
    factors: Sequence[Tensor | None],
    us: Tensor | None,
    masks: list[Tensor],
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(gradient of x or None, [dA, dB of each member]) from those of the members' outputs, each [tokens, out]."""
    dx: Tensor | None = None
    d_factors: list[Tensor | None] = [None] * len(factors)
    left, at = iter(masks), 0
    parts: list[tuple[Tensor, Tensor, Member, Tensor | None, int]] = []
    for index, (G, member) in enumerate(zip(grads, members, strict=True)):
        A, B = thin(factors[2 * index], x.dtype), thin(factors[2 * index + 1], x.dtype)
        mask = next(left) if member.dropout else None
        if A is not None and B is not None and us is not None:
            rank = A.shape[0]
            if G is not None:
                d_factors[2 * index + 1] = (G.T @ us[:, at : at + rank]).mul_(member.scaling)
                parts.append(((G @ B).mul_(member.scaling), A, member, mask, index))
            at += rank
        if G is not None and needs_x:
            W = weight_of(member.base, x.dtype)
            dx = G @ W if dx is None else dx.addmm_(G, W)
    if parts and all(mask is None for *_, mask, _ in parts):
        T = parts[0][0] if len(parts) == 1 else torch.cat([t for t, *_ in parts], dim=1)
        dA = T.T @ x
        if dx is not None:
            dx.addmm_(T, parts[0][1] if len(parts) == 1 else torch.cat([A for _, A, *_ in parts]))
        at = 0
        for _, A, _, _, index in parts:
            d_factors[2 * index] = dA[at : at + A.shape[0]]
            at += A.shape[0]
    else:
        for t, A, member, mask, index in parts:
            d_factors[2 * index] = t.T @ (x if mask is None else dropped(x, mask, member))
            if dx is not None:
                dx += t @ A if mask is None else dropped(t @ A, mask, member)
    for index, factor in enumerate(factors):
        if (gradient := d_factors[index]) is not None and factor is not None:
            d_factors[index] = gradient.to(factor.dtype)
    return dx, d_factors


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def shaped(Y: Tensor, x: Tensor) -> Tensor:
    """Y [tokens, out] in the shape of x, and to autograd no view: a model may write into outputs, as Falcon does."""
    return torch.ops.aten._unsafe_view.default(Y, [*x.shape[:-1], Y.shape[-1]])


class _Linears(torch.autograd.Function):
    """Linear layers that read one input."""

    @staticmethod
    def forward(
        ctx: Any, ops: Ops, members: Sequence[Member], x: Tensor, normed: Any, *parameters: Tensor | None
    ) -> Any:
        # parameters: the bias of each member, then A and B of each
        biases, factors = parameters[: len(members)], parameters[len(members) :]
        flat = rows(x)
        outputs = [base_product(flat, m.base, bias) for m, bias in zip(members, biases, strict=True)]
        masks = draw_masks(flat, members)
        us = add_updates(flat, outputs, members, factors, masks)
        kept = (x, None) if normed is None else (normed.x, normed.weight)
        ctx.save_for_backward(*kept, us, *factors, *masks)
        ctx.ops, ctx.members, ctx.eps = ops, members, None if normed is None else normed.eps
        ctx.set_materialize_grads(False)  # an output that nobody uses has no gradient, rather than one of zeros
        return tuple(shaped(Y, x) for Y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        members, count = ctx.members, len(ctx.members)
        x, weight, us, *rest = ctx.saved_tensors
        factors, masks = rest[: 2 * count], rest[2 * count :]
        shape = x.shape
        flat = rows(x) if weight is None else ctx.ops.rms_norm(rows(x), weight, ctx.eps)
        flats = [None if G is None else rows(G) for G in grads]
        dx, d_factors = adjoint(flat, flats, members, factors, us, masks, ctx.needs_input_grad[2])
        d_biases = [
            G.sum(0) if G is not None and ctx.needs_input_grad[4 + index] else None for index, G in enumerate(flats)
        ]
        return None, None, None if dx is None else dx.view(shape), None, *d_biases, *d_factors


class _SwiGLU(torch.autograd.Function):
    """down(silu(gate(x)) · up(x))."""

    @staticmethod
    def forward(
        ctx: Any, ops: Ops, members: Sequence[Member], x: Tensor, normed: Any, *parameters: Tensor | None
    ) -> Any:
        biases, factors = parameters[:3], parameters[3:]
        flat = rows(x)
        gate, up = (base_product(flat, m.base, bias) for m, bias in zip(members[:2], biases[:2], strict=True))
        masks = draw_masks(flat, members[:2])
        us = add_updates(flat, (gate, up), members[:2], factors[:4], masks)
        h = ops.swiglu(gate, up)
        out = base_product(h, members[2].base, biases[2])
        masks_h = draw_masks(h, members[2:])
        us_h = add_updates(h, (out,), members[2:], factors[4:], masks_h)
        kept = (x, None) if normed is None else (normed.x, normed.weight)
        ctx.save_for_backward(*kept, gate, up, us, us_h, *factors, *masks, *masks_h)
        ctx.ops, ctx.members, ctx.eps = ops, members, None if normed is None else normed.eps
        return shaped(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> Any:
        members, ops = ctx.members, ctx.ops
        x, weight, gate, up, us, us_h, *rest = ctx.saved_tensors
        factors, masks = rest[:6], rest[6:]
        outer = sum(1 for m in members[:2] if m.dropout)
        shape, flat_G = x.shape, rows(G)
        needs = ctx.needs_input_grad
        d_biases: list[Tensor | None] = [None, None, flat_G.sum(0) if needs[6] else None]
        # everything but down's own factors comes through h
        inner = needs[2] or any(needs[4:6]) or any(needs[7:11])
        dh = None
        if inner:
            dh = flat_G @ weight_of(members[2].base, flat_G.dtype)
            A, B = thin(factors[4], flat_G.dtype), thin(factors[5], flat_G.dtype)
            if A is not None and B is not None:
                t = (flat_G @ B).mul_(members[2].scaling)
                if members[2].dropout:
                    dh += dropped(t @ A, masks[outer], members[2])
                else:
                    dh.addmm_(t, A)
        if dh is not None:
            d_gate, d_up, h = ops.swiglu_backward(dh, gate, up)
            del dh
        else:
            h = ops.swiglu(gate, up)
        _, d_down = adjoint(h, (flat_G,), members[2:], factors[4:], us_h, masks[outer:], False)
        del h
        dx: Tensor | None = None
        d_inner: list[Tensor | None] = [None] * 4
        if inner:
            flat = rows(x) if weight is None else ops.rms_norm(rows(x), weight, ctx.eps)
            dx, d_inner = adjoint(flat, (d_gate, d_up), members[:2], factors[:4], us, masks[:outer], needs[2])
            d_biases[0] = d_gate.sum(0) if needs[4] else None
            d_biases[1] = d_up.sum(0) if needs[5] else None
        return None, None, None if dx is None else dx.view(shape), None, *d_biases, *d_inner, *d_down


class _RMSNorm(torch.autograd.Function):
    """The norm with a frozen weight; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, ops: Ops, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ops, ctx.eps = ops, eps
        return shaped(ops.rms_norm(rows(x), weight, eps), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx = ctx.ops.rms_norm_backward(rows(dy), rows(x), weight, ctx.eps)
        return None, dx.view(x.shape), None, None


class _Rotate(torch.autograd.Function):
    """Rotary positions: the backward pass turns the other way."""

    @staticmethod
    def forward(ctx: Any, ops: Ops, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.ops = ops
        return ops.rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return None, ctx.ops.rotate(dy.contiguous(), cos, -sin), None, None


# What a core's cache holds of the scores of a few heads: numbers in the block that is worked on.
SCORES = 512 * 1024
QUERIES = 128
# Scores from which on bfloat16 is too coarse for them: its steps are 1/16 between 8 and 16.
LARGE = 10.0


def _head_blocks(q: Tensor) -> Iterator[tuple[slice, int, int]]:
    """(heads, first query, end of the queries) of blocks whose scores [heads, groups, queries, keys] fit the cache."""
    n, groups, length, _ = q.shape
    for first in range(0, length, QUERIES):
        end = min(length, first + QUERIES)
        heads = max(1, SCORES // (groups * (end - first) * end))
        for start in range(0, n, heads):
            yield slice(start, start + heads), first, end


class _Attention(torch.autograd.Function):
    """Causal attention in blocks of queries, each against the keys up to it: half of the scores are never made.

    For the CPU, where the products of a block in bfloat16 and a softmax in the cache are twice as fast as the kernel
    that comes with PyTorch. Queries of one key head are the rows of one product.

    What such a product gives is rounded to bfloat16, which a softmax feels where scores are large. So the mean of the
    keys is taken off them first, which changes every score of a query alike and no weight (arXiv:2410.02367, section
    4.2), and where scores are large all the same, above LARGE, the whole is done in float32. Gradients of keys and
    values are added up in float32.
    """

    @staticmethod
    def forward(ctx: Any, ops: Ops, q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Tensor | None) -> Tensor:
        batch = q.shape[0]
        seen = None if lengths is None else lengths.repeat_interleave(k.shape[2])
        Y, log_sums = _attend_by_blocks(ops, *_heads(q, k, v), scale, seen)
        exact = q.dtype.itemsize > 2 or bool(log_sums.abs().amax() <= LARGE)
        if not exact:
            Y, log_sums = _attend_by_blocks(ops, *_heads(wide(q), wide(k), wide(v)), scale, seen)
        # the layer after it keeps this one too, and not a copy
        y = _by_place(Y.to(q.dtype), batch).contiguous()
        ctx.save_for_backward(q, k, v, y, log_sums, seen)
        ctx.ops, ctx.scale, ctx.exact = ops, scale, exact
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        q, k, v, y, log_sums, seen = ctx.saved_tensors
        batch, ops = q.shape[0], ctx.ops
        if ctx.exact:
            Q, K, V, dY = (*_heads(q, k, v), _by_head(dy, k))
        else:
            Q, K, V, dY = (*_heads(wide(q), wide(k), wide(v)), _by_head(wide(dy), k))
        delta = _by_head((wide(dy) * wide(y)).sum(-1, keepdim=True), k).squeeze(-1)
        width = Q.shape[-1]
        dQ, dK, dV = torch.empty_like(Q), torch.zeros_like(wide(K)), torch.zeros_like(wide(V))
        for some, first, end in _head_blocks(Q):
            few, d_few = (each[some, :, first:end] for each in (Q, dY))
            shape = few.shape
            few, d_few = few.reshape(shape[0], -1, width), d_few.reshape(shape[0], -1, width)
            keys, values = K[some, :end], V[some, :end]
            scores = torch.bmm(few, keys.transpose(1, 2)).view(*shape[:3], end)
            d_weights = torch.bmm(d_few, values.transpose(1, 2)).view(*shape[:3], end)
            weights, d_scores = ops.attend_backward(
                scores,
                d_weights,
                log_sums[some, :, first:end],
                delta[some, :, first:end],
                first,
                ctx.scale,
                None if seen is None else seen[some],
            )
            weights, d_scores = weights.view(shape[0], -1, end), d_scores.view(shape[0], -1, end)
            dV[some, :end] += torch.bmm(weights.transpose(1, 2), d_few)
            dK[some, :end] += torch.bmm(d_scores.transpose(1, 2), few)
            dQ[some, :, first:end] = torch.bmm(d_scores, keys).view(shape)
        dq, dk, dv = (_by_place(each.to(q.dtype), batch) for each in (dQ, dK[:, None], dV[:, None]))
        return None, dq, dk, dv, None, None


def _heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys without their mean over the places, and values, by head."""
    K = _by_head(k, k)[:, 0]
    K = (wide(K) - wide(K).mean(1, keepdim=True)).to(k.dtype)
    return _by_head(q, k), K, _by_head(v, k)[:, 0]


def _attend_by_blocks(
    ops: Ops, Q: Tensor, K: Tensor, V: Tensor, scale: float, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(the output by head, the logarithms of the sums of the softmax); seen: how many keys there are for each head."""
    Y = torch.empty_like(Q)
    log_sums = torch.empty(Q.shape[:3], device=Q.device, dtype=torch.promote_types(Q.dtype, torch.float32))
    for some, first, end in _head_blocks(Q):
        few = Q[some, :, first:end]
        scores = torch.bmm(few.reshape(few.shape[0], -1, Q.shape[-1]), K[some, :end].transpose(1, 2))
        scores = scores.view(*few.shape[:3], end)
        weights, log_sums[some, :, first:end] = ops.attend(scores, first, scale, None if seen is None else seen[some])
        Y[some, :, first:end] = torch.bmm(weights.view(few.shape[0], -1, end), V[some, :end]).view(few.shape)
    return Y, log_sums


def _by_head(x: Tensor, k: Tensor) -> Tensor:
    """[batch, length, heads, width] as [batch · key heads, query heads of each, length, width]."""
    batch, length, heads, width = x.shape
    kinds = k.shape[2]
    x = x.view(batch, length, kinds, heads // kinds, width).permute(0, 2, 3, 1, 4)
    return x.reshape(batch * kinds, heads // kinds, length, width)


def _by_place(x: Tensor, batch: int) -> Tensor:
    """The other way: [batch, length, heads, width]."""
    n, groups, length, width = x.shape
    x = x.view(batch, n // batch, groups, length, width).permute(0, 3, 1, 2, 4)
    return x.reshape(batch, length, -1, width)


# ------------------------------------------------------------------------------------------------ from layers


def as_member(layer: Any) -> tuple[Member, Tensor | None, tuple[Tensor | None, Tensor | None]]:
    """(what a step needs of a layer that is no tensor, its bias, its A and B); a plain linear layer has no A and B."""
    if isinstance(layer, LoRALinear):
        dropout = getattr(layer.dropout, "p", 0.0) if layer.training else 0.0
        member = Member(layer.base_layer, layer.scaling, dropout)
        return member, layer.base_layer.bias, (layer.lora_A.value(), layer.lora_B.value())
    return Member(layer), layer.bias, (None, None)


def _step(function: Any, ops: Ops, layers: Sequence[nn.Module], x: Tensor, normed: Normed | None) -> Any:
    members, biases, factors = zip(*map(as_member, layers), strict=True)
    return function.apply(ops, members, x, normed, *biases, *(factor for pair in factors for factor in pair))


def linears(ops: Ops, layers: Sequence[nn.Module], x: Tensor, normed: Normed | None = None) -> tuple[Tensor, ...]:
    """The outputs of linear layers, LoRALinear or frozen plain ones, that all read x [..., in_features].

    x must have the dtype in which they multiply. normed: x as the norm of another tensor, which is then kept instead.
    """
    return _step(_Linears, ops, layers, x, normed)


def swiglu(
    ops: Ops, gate: nn.Module, up: nn.Module, down: nn.Module, x: Tensor, normed: Normed | None = None
) -> Tensor:
    """down(silu(gate(x)) · up(x)), gate and up kept and nothing else of that width."""
    return _step(_SwiGLU, ops, (gate, up, down), x, normed)


def rms_norm(ops: Ops, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm over the last dimension of x; its weight is frozen."""
    return _RMSNorm.apply(ops, x, weight, eps)


def rotate(ops: Ops, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, length, heads, head_dim] turned by its positions."""
    return _Rotate.apply(ops, x, cos, sin)


def attention(ops: Ops, q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Tensor | None = None) -> Tensor:
    """Causal attention of q [batch, length, heads, width] to k and v [batch, length, key heads, width].

    lengths [batch]: how many places of each row are there, the rest being padding at the end; None: all.
    """
    return _Attention.apply(ops, q, k, v, scale, lengths)
