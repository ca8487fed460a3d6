"""lorafit against a plain peft loop, step by step in one process, on the same weights, batches and settings.

    python scripts/compare_peft.py --model FOLDER --data train.jsonl --columns question answer --out compare.json

Both sides hold the base in NF4 with double quantization and bf16 products, LoRA of the same rank on all linear layers
but the head, with the same A to begin with, AdamW and the same schedule. The peft side is what its documentation shows:
the model's own loss over all logits, adapters in float32. The steps alternate (peft, lorafit, peft, …), so that a slow
moment of the machine hits both. Reported are the medians, their ratio, and the held-out loss before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorafit.data import ResumableLoader
from lorafit.datamodule import FinetuneDataModule
from lorafit.evaluation import evaluate_loss
from lorafit.inject import lora_layers
from lorafit.loading import resolve
from lorafit.loss import supervised_loss
from lorafit.module import FinetuneModule, learning_rate_factor
from lorafit.quant import disarm_repacking
from lorafit.trainer import quiet_libraries


def peft_model(name: str, rank: int) -> Any:
    """The model as peft's quantization guide builds it."""
    recipe = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(
        resolve(name), quantization_config=recipe, dtype=torch.bfloat16, device_map={"": device}
    )
    base.config.use_cache = False
    disarm_repacking(base)  # else the measuring of its held-out loss would corrupt it on some CPUs
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--columns", nargs=2, metavar=("PROMPT", "COMPLETION"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--eval-examples", type=int, default=64)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()

    columns = dict(zip(("prompt", "completion"), arguments.columns, strict=True)) if arguments.columns else None
    data = FinetuneDataModule(
        arguments.data,
        tokenizer=arguments.model,
        columns=columns,
        batch_size=arguments.batch_size,
        eval_limit=arguments.eval_examples,
    )
    data.setup()
    ours = FinetuneModule(arguments.model, rank=arguments.rank, alpha=2 * arguments.rank, quant="nf4")
    ours.configure_model()
    assert ours.model is not None
    theirs = peft_model(arguments.model, arguments.rank)
    for name, layer in lora_layers(ours.model).items():  # the same A on both sides
        theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.data.copy_(layer.lora_A.weight)

    models = {"peft": theirs, "lorafit": ours.model}
    device = next(ours.model.parameters()).device
    optimizers, schedules, parameters = {}, {}, {}
    for system, model in models.items():
        parameters[system] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers[system] = torch.optim.AdamW(parameters[system], lr=arguments.lr, weight_decay=0.0)
        schedules[system] = torch.optim.lr_scheduler.LambdaLR(
            optimizers[system],
            lambda step: learning_rate_factor(
                step, schedule="cosine", warmup_steps=round(0.05 * arguments.steps), total_steps=arguments.steps
            ),
        )
    held_out: dict[str, dict[str, float]] = {system: {} for system in models}
    before = evaluate_loss(ours.model, data.val_dataloader())["loss"]
    seconds: dict[str, list[float]] = {system: [] for system in models}
    losses: dict[str, list[float]] = {system: [] for system in models}
    tokens = 0

    def step(system: str, batch: dict[str, torch.Tensor]) -> float:
        if system == "peft":
            loss = models[system](**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
            mean = loss.item()
        else:
            total, count = supervised_loss(models[system], batch)
            loss = total / count
            mean = loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters[system], 1.0)
        optimizers[system].step()
        schedules[system].step()
        optimizers[system].zero_grad()
        return mean

    loader: ResumableLoader = data.train_dataloader()
    batches = iter(loader)
    for number in range(arguments.steps):
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(loader)
            batch = next(batches)
        batch = {key: value.to(device) for key, value in batch.items()}
        tokens += int((batch["labels"] != -100).sum())
        for system in models:
            began = time.perf_counter()
            losses[system].append(step(system, batch))
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[system].append(time.perf_counter() - began)
        if number % 5 == 0:
            line = "  ".join(f"{system} {losses[system][-1]:.4f} in {seconds[system][-1]:.2f} s" for system in models)
            print(f"step {number + 1}/{arguments.steps}  {line}", flush=True)

    for system, model in models.items():
        after = evaluate_loss(model, data.val_dataloader())["loss"]
        held_out[system] = {"before": before, "after": after, "fall_percent": 100 * (1 - after / before)}
    medians = {system: statistics.median(values) for system, values in seconds.items()}
    result = {
        "setting": {key: str(value) for key, value in vars(arguments).items() if key != "out"},
        "seconds_total": {system: sum(values) for system, values in seconds.items()},
        "seconds_median": medians,
        "ratio_of_medians": medians["peft"] / medians["lorafit"],
        "supervised_tokens": tokens,
        "held_out_loss": held_out,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses["peft"], losses["lorafit"], strict=True)),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
