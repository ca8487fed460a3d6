"""How every program measures a model: on the rows that are held out, and on text that has nothing to do with them.

train measures before and after, evaluate with the adapter off and on; the same two functions make their numbers equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.config import Config
from lorafit.errors import InputError

if TYPE_CHECKING:
    from lorafit.data.loader import Batch
    from lorafit.datamodule import FinetuneDataModule


def measure(config: Config, data: FinetuneDataModule, model: Any) -> tuple[dict[str, float], list[str]]:
    """({"loss", "perplexity", "exact_match"}, answers in words) on the held-out rows.

    Exact match is over the first task.generate_examples rows, of which at least task.samples are answered.
    """
    from lorafit.evaluation import evaluate_loss, exact_match, generate

    numbers = evaluate_loss(model, data.eval_batches())
    count = max(config.task.generate_examples, config.task.samples)
    examples = data.eval_examples[:count]
    tokenizer: Any = data.tokenizer
    answers = generate(
        model,
        [data.encoder.encode_prompt(example) for example in examples],
        max_new_tokens=config.task.max_new_tokens,
        end_ids=data.encoder.end_ids,
        pad_id=tokenizer.pad_token_id,
    )
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    result = {"loss": numbers["loss"], "perplexity": numbers["perplexity"]}
    scored = min(config.task.generate_examples, len(examples))
    if scored:
        references = [example.completion for example in examples[:scored]]
        result["exact_match"] = exact_match(texts[:scored], references)
    return result, texts


def measure_rounding(model: Any, batches: Iterable[Batch], dtype: str) -> dict[str, float]:
    """What it costs to store the adapter of `model` in `dtype`: {"loss", "loss_float32", "kl", "top1_agreement"} per
    supervised token, the divergence from the adapter as it is to the one that would be read back, in nats.

    The adapter is as before afterwards. Raises InputError where no batch has a token.
    """
    import torch

    from lorafit.adapter import round_adapter
    from lorafit.evaluation import evaluating
    from lorafit.inject import load_lora_state_dict, lora_state_dict
    from lorafit.loss import supervised_logits
    from lorafit.merging.measure import compare

    device = next(model.parameters()).device
    exact = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    full, rounded, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    with evaluating(model):
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items()}
            logits, targets = supervised_logits(model, batch)
            round_adapter(model, dtype)
            try:
                other, _ = supervised_logits(model, batch)
            finally:
                load_lora_state_dict(model, exact)
            full += compare(logits, logits, targets)
            rounded += compare(logits, other, targets)
            count += targets.numel()
    if not count:
        raise InputError("no held-out row has a token to measure the stored adapter on: give data.eval_path")
    loss, kl, agreement = (rounded / count).tolist()
    return {"loss": loss, "loss_float32": (full[0] / count).item(), "kl": max(0.0, kl), "top1_agreement": agreement}


def measure_ladder(model: Any, loss: Callable[[], float], ranks: Iterable[int]) -> dict[str, dict[str, float]]:
    """What the adapter of `model` would be at smaller ranks: {"losses": {rank: loss}, "parameters": {rank: count}}.

    Each product B A is cut to its best approximation of that rank (see `lorafit.spectrum`) and `loss()` asked. Ranks
    above the adapter's own are left out; its own is measured as it is. The adapter is as before afterwards.
    """
    from lorafit.spectrum import Trial

    losses: dict[str, float] = {}
    parameters: dict[str, float] = {}
    with Trial(model) as trial:
        if not trial.layers:
            raise InputError("ladder: the adapter has no LoRA layers to cut, only modules that were trained whole")
        highest = max(trial.ranks.values())
        for rank in sorted({rank for rank in ranks if rank < highest} | {highest}):
            kept = trial.keep(rank=rank)
            losses[str(rank)] = loss()
            parameters[str(rank)] = trial.parameters(kept)
    return {"losses": losses, "parameters": parameters}


def retention_text(config: Config, data: FinetuneDataModule) -> list[list[int]]:
    """Token ids of text that has nothing to do with the task: the user's, or the embedded model's own, or general."""
    from lorafit import embedded
    from lorafit.data.general import TEXTS

    path = config.task.retention_path
    if path is None and config.model.name == "embedded":
        path = str(embedded.TEXT)
    texts = list(TEXTS) if path is None else read_texts(Path(path))
    tokenizer: Any = data.tokenizer
    # verbose: a text longer than the model reads is cut into windows later, and is no cause for a warning
    tokens = [tokenizer(text, verbose=False).input_ids for text in texts]
    if all(len(ids) < 2 for ids in tokens):
        raise InputError(f"task.retention_path: {path!r} holds no text of two tokens or more to measure retention on")
    return tokens


def read_texts(path: Path) -> list[str]:
    """The texts of a file: the `text` fields of JSON lines, or the whole of any other file."""
    if path.suffix != ".jsonl":
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise InputError(f"task.retention_path: {str(path)!r} is not UTF-8 text ({error})") from None
    from lorafit.data.sources import fields, read_rows

    texts = []
    for row in read_rows(path):
        text = fields(row).get("text")
        if not isinstance(text, str):
            raise InputError(f"{row.where}: the row has no field 'text' to measure retention on")
        texts.append(text)
    return texts
