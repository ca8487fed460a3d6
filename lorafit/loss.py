"""The loss: cross entropy over the supervised tokens alone, as a sum and a count, made chunk by chunk.

The output head is by far the widest layer of a small model. Two things follow:

- Under completion-only training most rows of its output are thrown away. So the hidden states of the other rows are
  taken out just before the head.
- What is left, rows times vocabulary, is still the largest tensor of a step, and its gradient is as large. So head and
  loss work on a few hundred rows at a time, and the gradient of a chunk is made at once, while its logits are there:
  the forward pass leaves behind the gradient of the hidden states and nothing as wide as the vocabulary. A softmax
  cross entropy is the last thing a model computes, so that the backward pass has only to multiply by one number.

        hidden [N, H] ── chunk [n, H] ── head ── what the model does after its head ── -log p, its gradient ── d chunk

What a model does to its logits after its head (a soft cap in Gemma, a scale in Granite and Cohere) is found once, by
giving it made-up logits: whatever reproduces its answer exactly, with a number that its configuration holds, is it.
A model that does something else computes its logits itself, all of them at once: slower, and right.

A sum and a count, not a mean: a mean of means is wrong as soon as micro-batches differ in their number of tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorafit.data import IGNORE
from lorafit.data.loader import Batch
from lorafit.elementwise import EAGER, Ops, wide
from lorafit.errors import InputError

# The logits of a chunk are about this many numbers: 256 rows for a vocabulary of 32,000 on a CPU. Fewer rows make the
# matrix products slow, more make the chunk large and no product faster; a GPU wants more of them at once.
_CHUNK, _CHUNK_GPU = 8 * 1024 * 1024, 32 * 1024 * 1024
_FEWEST_ROWS, _MOST_ROWS = 128, 1024
# without a gradient the float32 logits are nobody's but the loss's, so fewer rows of them do
_ROWS_IN_FLOAT32 = 32


# ------------------------------------------------------------------------------------------------ chunks


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """How many rows of logits are held at a time."""
    numbers = _CHUNK if device.type == "cpu" else _CHUNK_GPU
    return min(max(numbers // max(vocabulary, 1) // 64 * 64, _FEWEST_ROWS), _MOST_ROWS)


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    transform: Callable[[Tensor], Tensor] | None = None,
    rows: int | None = None,
    ops: Ops = EAGER,
) -> Tensor:
    """The sum of -log softmax(transform(head(hidden)))[target] in nats, a scalar in float32 (float64 for float64).

    hidden: [N, H]; targets: [N] token ids; head: any module that turns [1, n, H] into [1, n, vocabulary], trained or
    not. rows: of a chunk, `chunk_rows` of the vocabulary if not given. The gradients of hidden and of the head's
    trainable parameters are made here and not in the backward pass; those of parameters are summed up in float32.
    """
    trained = tuple(parameter for parameter in head.parameters() if parameter.requires_grad)
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        return _LinearCrossEntropy.apply(hidden, targets, head, transform, rows, ops, *trained)
    total = _zero(hidden)
    with torch.no_grad():
        for part in _chunks(hidden, head, rows):
            logits = _logits(hidden[part], head, transform)
            for few, right in zip(logits.split(_ROWS_IN_FLOAT32), targets[part].split(_ROWS_IN_FLOAT32), strict=True):
                total += F.cross_entropy(wide(few), right, reduction="sum")
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: nn.Module,
        transform: Callable[[Tensor], Tensor] | None,
        rows: int | None,
        ops: Ops,
        *trained: nn.Parameter,
    ) -> Tensor:
        d_hidden: Tensor | None
        d_trained: list[Tensor | None]
        if transform is None and not trained and _is_plain(head, hidden):
            loss, d_hidden = _of_plain_head(hidden, head, targets, rows, ops)
            d_trained = []
        else:
            loss, d_hidden, d_trained = _of_any_head(hidden, head, targets, transform, rows, ops, trained)
        ctx.save_for_backward(d_hidden, *d_trained)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, *d_trained = (None if saved is None else saved * d_loss for saved in ctx.saved_tensors)
        return (d_hidden, None, None, None, None, None, *d_trained)


def _of_plain_head(hidden: Tensor, head: Any, targets: Tensor, rows: int | None, ops: Ops) -> tuple[Tensor, Tensor]:
    """(loss, d hidden) for a frozen nn.Linear: two matrix products a chunk, and one buffer for the logits of all."""
    weight, bias = head.weight.detach(), head.bias
    loss, d_hidden = _zero(hidden), torch.empty_like(hidden)
    chunks = list(_chunks(hidden, head, rows))
    buffer = hidden.new_empty(chunks[0].stop if chunks else 0, weight.shape[0])
    for part in chunks:
        chunk, logits = hidden[part], buffer[: part.stop - part.start]
        if bias is None:
            torch.mm(chunk, weight.T, out=logits)
        else:
            torch.addmm(bias.detach(), chunk, weight.T, out=logits)
        part_loss, d_logits = ops.cross_entropy(logits, targets[part])
        loss += part_loss
        torch.mm(d_logits, weight, out=d_hidden[part])
    return loss, d_hidden


def _of_any_head(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    transform: Callable[[Tensor], Tensor] | None,
    rows: int | None,
    ops: Ops,
    trained: tuple[nn.Parameter, ...],
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """(loss, d hidden, d parameters) with the head's own backward pass, so that it may be quantized, adapted or both.

    It runs once for each chunk: dropout in the head draws one mask for each row, as ever.
    """
    loss = _zero(hidden)
    d_hidden = torch.zeros_like(hidden) if hidden.requires_grad else None
    d_trained = [torch.zeros_like(parameter, dtype=wide(parameter).dtype) for parameter in trained]
    for part in _chunks(hidden, head, rows):
        with torch.enable_grad():
            chunk = hidden[part].detach().requires_grad_(d_hidden is not None)
            logits = _logits(chunk, head, transform)
        # a copy, for the backward pass of whatever made the logits may want to read them
        part_loss, d_logits = ops.cross_entropy(logits.detach().clone(), targets[part])
        loss += part_loss
        wanted = ([] if d_hidden is None else [chunk]) + list(trained)
        found = list(torch.autograd.grad(logits, wanted, d_logits, allow_unused=True))
        if d_hidden is not None:
            d_hidden[part] = found.pop(0)
        for total, gradient in zip(d_trained, found, strict=True):
            if gradient is not None:
                total += gradient
    return loss, d_hidden, [total.to(parameter.dtype) for total, parameter in zip(d_trained, trained, strict=True)]


def _zero(hidden: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)


def _chunks(hidden: Tensor, head: nn.Module, rows: int | None) -> Iterator[slice]:
    rows = rows or chunk_rows(getattr(head, "out_features", _CHUNK_GPU), hidden.device)
    return (slice(start, min(start + rows, len(hidden))) for start in range(0, len(hidden), rows))


def _logits(chunk: Tensor, head: nn.Module, transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    logits = head(chunk.unsqueeze(0))[0]
    return logits if transform is None else transform(logits)


def _is_plain(head: nn.Module, hidden: Tensor) -> bool:
    """Whether the head is a linear layer as PyTorch has it, that nobody watches or has put something in place of."""
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
        and not torch.is_autocast_enabled(hidden.device.type)
    )


# ------------------------------------------------------------------------------------------------ after the head


@dataclass(frozen=True)
class AfterHead:
    """What a model does to its logits: kind is "nothing", "cap" (c tanh(x / c)), "times" or "over", by `number`; in
    float32 where `upcast`."""

    kind: str = "nothing"
    number: float = 1.0
    upcast: bool = False

    def __call__(self, logits: Tensor) -> Tensor:
        if self.upcast:
            logits = wide(logits)
        if self.kind == "cap":
            return torch.tanh(logits / self.number) * self.number
        if self.kind == "times":
            return logits * self.number
        return logits / self.number if self.kind == "over" else logits


# by model and not by head: the head is left out of the question, so that an adapter over it changes nothing
_FOUND: WeakKeyDictionary[nn.Module, AfterHead | None] = WeakKeyDictionary()


def after_head(model: nn.Module) -> AfterHead | None:
    """What `supervised_loss` has found out about the model; None where it is nothing known, or has not been asked."""
    return _FOUND.get(model)


def _find_after_head(config: Any, probe: Tensor, given: Tensor) -> AfterHead | None:
    """What turned the logits `probe` into `given`, exactly; None where nothing known did."""
    if probe.shape != given.shape:
        return None
    found = [AfterHead()]
    for number in _numbers(config):
        found += [AfterHead(kind, number, upcast) for kind in ("cap", "times", "over") for upcast in (False, True)]
    return next((one for one in found if torch.equal(wide(one(probe)), wide(given))), None)


def _numbers(config: Any) -> list[float]:
    """The numbers that a configuration holds, and that of its text part, each once."""
    if config is None:
        return []
    parts = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    values = [value for part in parts for value in vars(part).values()]
    return list({value: None for value in values if type(value) in (int, float) and value not in (0, 1)})


# ------------------------------------------------------------------------------------------------ a model's loss


def head_of(model: nn.Module) -> nn.Module:
    """The output head. Raises InputError for a model without one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        raise InputError(f"{type(model).__name__} has no output head, so it cannot be trained as a language model")
    return head


@contextlib.contextmanager
def head_sees(model: nn.Module, rows: Tensor) -> Iterator[None]:
    """Within the context the output head is given only the rows [batch, length] (bool), as one sequence [1, N].

    A head that is called with something of another shape is given all of it.
    """

    def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        whole = inputs[0].shape[:-1] != rows.shape
        return inputs if whole else (inputs[0][rows].unsqueeze(0), *inputs[1:])

    handle = head_of(model).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


class _StandIn:
    """Stands in for the head's forward: notes the rows of what the head is given, hidden [N, H], and computes nothing.

    It answers with logits of no row at all, which the model finishes at no cost; or, where probing, with one row of
    logits that tell apart all that may be done to them. hidden stays None where the head is called in another way.
    """

    def __init__(self, head: nn.Module, rows: Tensor, probing: bool) -> None:
        self.forward, self.rows, self.probing = head.forward, rows, probing
        self.calls = 0
        self.hidden: Tensor | None = None
        self.probe: Tensor | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self.calls += 1
        if len(inputs) != 1 or named or inputs[0].shape[:-1] != self.rows.shape:
            return self.forward(*inputs, **named)
        self.hidden = inputs[0][self.rows]
        if not self.probing:
            return inputs[0].detach()[:1, :0]
        devices = [self.rows.device] if self.rows.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):  # dropout in the head draws nothing that would count
            logits = self.forward(inputs[0][:1, :1])
        # from -548 to 548, most of them small
        self.probe = torch.linspace(-7, 7, logits.shape[-1], device=logits.device).sinh().to(logits.dtype)[None, None]
        return self.probe.clone()


@contextlib.contextmanager
def _standing_in(model: nn.Module, rows: Tensor, probing: bool) -> Iterator[_StandIn]:
    head = head_of(model)
    # an attribute goes before the method of the class; whoever has put one there already gets it back
    before, stand_in = vars(head).get("forward"), _StandIn(head, rows, probing)
    head.forward = stand_in
    try:
        yield stand_in
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def _before_head(model: nn.Module, inputs: dict[str, Any], rows: Tensor) -> Tensor | None:
    """The hidden states [N, H] of the rows just before the head; None for a model that has to make its logits itself.

    The first call finds out which of the two it is, in the same pass through the model.
    """
    if model in _FOUND and _FOUND[model] is None:
        return None
    probing = model not in _FOUND
    random = _random_state(rows.device) if probing else []
    with _standing_in(model, rows, probing) as head:
        given = model(**inputs).logits
    if probing:
        probe = head.probe if head.calls == 1 else None
        _FOUND[model] = None if probe is None else _find_after_head(getattr(model, "config", None), probe, given)
    if _FOUND[model] is None:
        _set_random_state(rows.device, random)  # the pass is made once more, and draws what it would have drawn
        return None
    return head.hidden


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(device: torch.device, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def _task(batch: Batch) -> tuple[dict[str, Any], Tensor, Tensor]:
    """(the model's inputs, the supervised places [batch, length], their targets [N]): t predicts the label of t + 1."""
    rows = batch["labels"].roll(-1, dims=1) != IGNORE
    rows[:, -1] = False
    targets = batch["labels"].roll(-1, dims=1)[rows]
    # a batch says who may see whom either by a mask or by position ids, and those count only without a cache
    inputs: dict[str, Any] = {
        key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch
    }
    if "position_ids" in batch:
        inputs["use_cache"] = False
    return inputs, rows, targets


def supervised_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits [N, vocabulary], targets [N]) of the N supervised tokens, all at once."""
    inputs, rows, targets = _task(batch)
    with head_sees(model, rows):
        logits = model(**inputs).logits
    logits = logits.reshape(-1, logits.shape[-1])
    # there is no target for the last place of a row, so that as many logits as places are those of all places
    return logits[rows.flatten()] if len(logits) == rows.numel() else logits, targets


def supervised_loss(model: nn.Module, batch: Batch, ops: Ops = EAGER) -> tuple[Tensor, Tensor]:
    """(sum of -log p over the supervised tokens in float32, their number), both scalars on the model's device.

    No more than a chunk of logits is held at a time, with gradients or without. ops: which make of the cross entropy.
    """
    inputs, rows, targets = _task(batch)
    hidden = _before_head(model, inputs, rows)
    if hidden is None:
        logits, _ = supervised_logits(model, batch)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    else:
        changes = None if _FOUND[model] == AfterHead() else _FOUND[model]
        loss = linear_cross_entropy(hidden, head_of(model), targets, changes, ops=ops)
    return loss, targets.new_tensor(targets.numel())
