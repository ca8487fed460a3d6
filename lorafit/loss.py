"""The loss: cross entropy over the supervised tokens alone, as a sum and a count.

The output head is by far the widest layer of a small model, and under completion-only training most rows of its
output are thrown away. So the hidden states of the other rows are taken out just before the head: what the
model does to its logits afterwards (scaling, soft caps) still happens, because the model itself does it.

A sum and a count, not a mean: a mean of means is wrong as soon as micro-batches differ in their number of tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.data import IGNORE
from lorafit.data.loader import Batch
from lorafit.errors import InputError


@contextlib.contextmanager
def head_sees(model: nn.Module, rows: Tensor) -> Iterator[None]:
    """Within the context the output head is given only the rows [batch, length] (bool), as one sequence [1, N]."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        raise InputError(f"{type(model).__name__} has no output head, so it cannot be trained as a language model")
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][rows].unsqueeze(0), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def supervised_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits [N, vocabulary], targets [N]) of the N supervised tokens: place t predicts the label of t + 1."""
    rows = batch["labels"].roll(-1, dims=1) != IGNORE
    rows[:, -1] = False
    targets = batch["labels"].roll(-1, dims=1)[rows]
    # a batch says who may see whom either by a mask or by position ids, and those count only without a cache
    inputs: dict = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    if "position_ids" in batch:
        inputs["use_cache"] = False
    with head_sees(model, rows):
        logits = model(**inputs).logits
    return logits[0], targets


def supervised_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(sum of -log p over the supervised tokens in float32, their number), both scalars on the model's device."""
    logits, targets = supervised_logits(model, batch)
    loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    return loss, targets.new_tensor(targets.numel())
