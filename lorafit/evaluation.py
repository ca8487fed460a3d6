"""Held-out numbers: loss per supervised token, and answers in words beside their references.

Nothing here leaves a trace in the model: it comes back in the mode it had, and no random number is drawn unless
answers are to be.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

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
    temperature: float = 0.0,
    top_p: float = 1.0,
    around: Callable[[list[int]], contextlib.AbstractContextManager[Any]] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The continuation of each prompt, up to the first of the end tokens and without it.

    temperature: 0 takes the likeliest token each time; above, tokens are drawn by torch's generator of the device, from
    the likeliest that hold `top_p` of the probability. Nothing else is done to the probabilities, whatever the
    model's own generation settings say. around: makes a context for each batch, given which prompts are its rows.
    on_token: is told each token as it comes, end tokens aside; the prompts are then answered one after another.

    Prompts are batched by length, so that few places are padding; they are padded on the left. An empty prompt, which
    has no place to predict from, begins after an end token.
    """
    prompts = [prompt or end_ids[:1] for prompt in prompts]
    device = next(model.parameters()).device
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=end_ids,
        pad_token_id=pad_id,
        num_beams=1,
        repetition_penalty=1.0,  # said here, or the model's own would be taken
        **(drawn if temperature else {"do_sample": False}),
    )
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    if on_token is not None:
        by_length, batch_size = list(range(len(prompts))), 1
    with evaluating(model):
        for start in range(0, len(by_length), batch_size):
            chosen = by_length[start : start + batch_size]
            longest = max(len(prompts[index]) for index in chosen)
            padding = [longest - len(prompts[index]) for index in chosen]
            ids = torch.tensor([[pad_id] * pad + prompts[index] for pad, index in zip(padding, chosen, strict=True)])
            mask = (torch.arange(longest) >= torch.tensor(padding).unsqueeze(1)).long()
            with around(chosen) if around is not None else contextlib.nullcontext():
                output: Tensor = model.generate(  # type: ignore[operator]
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=settings,
                    streamer=None if on_token is None else _Stream(on_token, end_ids),
                )
            for index, row in zip(chosen, output[:, longest:].tolist(), strict=True):
                answers[index] = row[: next((at for at, token in enumerate(row) if token in end_ids), len(row))]
    return answers


class _Stream(BaseStreamer):
    """What transformers hands the tokens to: the prompt first, then one at a time."""

    def __init__(self, on_token: Callable[[int], None], end_ids: list[int]) -> None:
        self.on_token, self.end_ids = on_token, end_ids
        self.began = False

    def put(self, value: Tensor) -> None:
        if self.began and int(value) not in self.end_ids:
            self.on_token(int(value))
        self.began = True

    def end(self) -> None:
        """Nothing is held back here."""


def exact_match(answers: list[str], references: list[str]) -> float:
    """The share of answers that are the reference, white space at the ends aside."""
    hits = sum(answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True))
    return hits / len(references) if references else math.nan
