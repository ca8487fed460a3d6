"""What a merge costs: the live adapter and each candidate read the same held-out rows in the same pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.data.loader import Batch
from lorafit.errors import InputError
from lorafit.evaluation import evaluating
from lorafit.loss import supervised_logits

_ROWS = 128  # tokens whose probabilities are compared together


def measure_merge(
    live: Any, merged: Mapping[str, Any], batches: Iterable[Batch]
) -> tuple[float, int, dict[str, dict[str, float]]]:
    """(loss of the live model, supervised tokens, {candidate: {"loss", "kl", "top1_agreement"}}), per token.

    kl: the divergence from the live model's prediction to the candidate's, in nats. Raises InputError without tokens.
    """
    device = next(live.parameters()).device
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in merged}
    live_loss, count = 0.0, 0
    with evaluating(live):
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items()}
            logits, targets = supervised_logits(live, batch)
            if not targets.numel():
                continue
            count += targets.numel()
            for part, right in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
                live_loss += F.cross_entropy(part.float(), right, reduction="sum").item()
            for name, model in merged.items():
                with evaluating(model):
                    sums[name] += compare(logits, supervised_logits(model, batch)[0], targets)
    if not count:
        raise InputError("no held-out row has a token to measure a merge on: give data.eval_path, or more rows")
    keys = ("loss", "kl", "top1_agreement")
    means = {name: dict(zip(keys, (total / count).tolist(), strict=True)) for name, total in sums.items()}
    for numbers in means.values():
        # a divergence is never negative; the sum of its rounded terms may be
        numbers["kl"] = max(0.0, numbers["kl"]) if not math.isnan(numbers["kl"]) else math.nan
    return live_loss / count, count, means


def compare(live: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """Sums over tokens of -log p, of the divergence and of equal first choices."""
    total = torch.zeros(3, dtype=torch.float64)
    for a, b, right in zip(live.split(_ROWS), other.split(_ROWS), targets.split(_ROWS), strict=True):
        p, q = F.log_softmax(a.float(), dim=-1), F.log_softmax(b.float(), dim=-1)
        total[0] += F.nll_loss(q, right, reduction="sum").item()
        total[1] += F.kl_div(q, p, reduction="sum", log_target=True).item()
        total[2] += (a.argmax(dim=-1) == b.argmax(dim=-1)).sum().item()
    return total
