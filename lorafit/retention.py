"""What the fine-tune did to everything else: the same held-out text read by the base and by the adapted model.

Perplexity says how much worse the text is predicted; the KL divergence from the base's prediction to the adapted one,
in nats per token, also sees changes that the text at hand does not punish. Both come from one model in
memory: the base is the model with its adapters taken out for a moment.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from lorafit.errors import InputError
from lorafit.evaluation import evaluating, perplexity
from lorafit.inject import adapters_off


def measure_retention(model: nn.Module, texts: Iterable[list[int]], *, window: int = 256) -> dict[str, float]:
    """{"perplexity_adapter_off", "perplexity_adapter_on", "kl"} over the tokens of the texts.

    texts: token ids; each is read in windows of at most `window` tokens, one at a time, so that memory stays small.
    """
    device = next(model.parameters()).device
    off = on = divergence = 0.0
    count = 0
    with evaluating(model):
        for text in texts:
            for start in range(0, len(text) - 1, window):
                ids = torch.tensor([text[start : start + window + 1]], device=device)
                targets = ids[0, 1:]
                adapted = F.log_softmax(model(input_ids=ids[:, :-1]).logits[0].float(), dim=-1)
                with adapters_off(model):
                    base = F.log_softmax(model(input_ids=ids[:, :-1]).logits[0].float(), dim=-1)
                on += F.nll_loss(adapted, targets, reduction="sum").item()
                off += F.nll_loss(base, targets, reduction="sum").item()
                divergence += F.kl_div(adapted, base, log_target=True, reduction="sum").item()
                count += targets.numel()
    if not count:
        raise InputError("the text for retention has no two tokens in a row: give a longer one in task.retention_path")
    return {
        "perplexity_adapter_off": perplexity(off / count),
        "perplexity_adapter_on": perplexity(on / count),
        "kl": divergence / count,
    }
