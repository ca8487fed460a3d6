"""Held-out numbers: loss per supervised token, and answers in words beside their references.

Nothing here leaves a trace in the model: it comes back in the mode it had, and no random number is drawn.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from lorafit.data.loader import Batch
from lorafit.loss import supervised_loss


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients; afterwards every module is in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


def perplexity(loss: float) -> float:
    """exp(loss), and infinity where that is more than a float holds."""
    return math.inf if loss > 700 else math.exp(loss)  # NaN stays NaN


def evaluate_loss(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """{"loss", "perplexity", "tokens"} over the supervised tokens of all batches, each token weighing the same."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            loss, tokens = supervised_loss(model, {key: value.to(device) for key, value in batch.items()})
            total, count = total + loss.item(), count + int(tokens)
    mean = total / count if count else math.nan
    return {"loss": mean, "perplexity": perplexity(mean), "tokens": count}


def generate(
    model: nn.Module,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    end_ids: list[int],
    pad_id: int,
    batch_size: int = 32,
) -> list[list[int]]:
    """The greedy continuation of each prompt, up to the first of the end tokens and without it.

    Prompts are batched by length, so that few places are padding; they are padded on the left. An empty prompt, which
    has no place to predict from, begins after an end token.
    """
    prompts = [prompt or end_ids[:1] for prompt in prompts]
    device = next(model.parameters()).device
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=end_ids, pad_token_id=pad_id
    )
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with evaluating(model):
        for start in range(0, len(by_length), batch_size):
            chosen = by_length[start : start + batch_size]
            longest = max(len(prompts[index]) for index in chosen)
            padding = [longest - len(prompts[index]) for index in chosen]
            ids = torch.tensor([[pad_id] * pad + prompts[index] for pad, index in zip(padding, chosen, strict=True)])
            mask = (torch.arange(longest) >= torch.tensor(padding).unsqueeze(1)).long()
            output: Tensor = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
            for index, row in zip(chosen, output[:, longest:].tolist(), strict=True):
                answers[index] = row[: next((at for at, token in enumerate(row) if token in end_ids), len(row))]
    return answers


def exact_match(answers: list[str], references: list[str]) -> float:
    """The share of answers that are the reference, white space at the ends aside."""
    hits = sum(answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True))
    return hits / len(references) if references else math.nan
