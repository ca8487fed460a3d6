"""A batch in two halves, for a step that does not fit into memory as a whole.

The loss of a batch is a sum over its supervised tokens, so that the gradients of its halves add up to its own. Rows are
dealt out; a single row that holds several examples end to end (packing) is cut between two of them, where nothing is
attended across. What follows the last supervised token of a half is cut off: no trained token sees it.
"""

from __future__ import annotations

import torch

from lorafit.data.loader import Batch
from lorafit.data.tokens import IGNORE


def halves(batch: Batch) -> tuple[Batch, Batch] | None:
    """The two halves of a batch of `lorafit.data.loader`; None for a single example, which has none."""
    batch = trimmed(batch)
    rows, length = batch["input_ids"].shape
    if rows > 1:
        middle = rows // 2
        return trimmed(_part(batch, slice(0, middle))), trimmed(_part(batch, slice(middle, rows)))
    if "position_ids" not in batch:
        return None
    starts = torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist()
    inner = [start for start in starts if 0 < start < length]
    if not inner:
        return None
    cut = min(inner, key=lambda start: abs(2 * start - length))
    whole = slice(0, 1)
    return trimmed(_part(batch, whole, slice(0, cut))), trimmed(_part(batch, whole, slice(cut, length)))


def trimmed(batch: Batch) -> Batch:
    """The batch up to the last column that is trained in any row."""
    trained = torch.nonzero((batch["labels"] != IGNORE).any(dim=0)).flatten()
    end = int(trained[-1]) + 1 if len(trained) else 1
    return _part(batch, slice(None), slice(0, end))


def _part(batch: Batch, rows: slice, columns: slice = slice(None)) -> Batch:
    part = {key: value[rows, columns] if value.dim() == 2 else value for key, value in batch.items()}
    mask = part.get("attention_mask")
    part["tokens"] = mask.sum() if mask is not None else torch.tensor(part["input_ids"].numel())
    return part
