"""What a run says of itself: metrics.json, samples.jsonl, and what its logger gets beside the training's numbers."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.config import Config, config_sha256, to_dict
from lorafit.redact import redact_values
from lorafit.rescue import only_told

if TYPE_CHECKING:
    from lorafit.module import FinetuneModule


def begin_metrics(config: Config) -> dict[str, Any]:
    """What is known before anything is loaded, of a run that has not come to its end."""
    names = ("lorafit", "torch", "transformers", "lightning", "bitsandbytes", "hydra-core", "datasets", "wandb")
    return {
        "status": "failed",
        "seed": config.seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "config_sha256": config_sha256(config),
    }


def describe_model(metrics: dict[str, Any], config: Config, module: FinetuneModule, trainable: int, total: int) -> None:
    """The `model` and `lora` parts of metrics.json."""
    metrics["model"] = {
        "name": config.model.name,
        "architecture": type(module.model).__name__,
        "parameters_total": total,
        "parameters_trainable": trainable,
        "trainable_percent": round(100 * trainable / total, 4),
        "quant": to_dict(config)["quant"],
    }
    metrics["lora"] = {
        "rank": config.rank,
        "alpha": config.alpha,
        "target_modules": config.target_modules,
        "variant": config.variant,
        "modules_wrapped": len(module.wrapped),
    }


def effective_ranks(model: Any) -> dict[str, dict[str, int]]:
    """The `ranks` part of metrics.json: of each LoRA layer its rank, and how much of it is used."""
    from lorafit.inject import lora_layers
    from lorafit.spectrum import effective_rank, spectrum

    return {
        name: {"rank": layer.rank, "effective_rank": effective_rank(spectrum(layer))}
        for name, layer in lora_layers(model).items()
    }


def memory_metrics(memory: Any) -> dict[str, int | None]:
    """The `memory` part of metrics.json. The peak is that of training; lorafit does not predict it yet."""
    parts = memory.parts or dict.fromkeys(
        ("weights", "quant_state", "adapter", "gradient", "optimizer", "optimizer_paged"), 0
    )
    return {"peak_bytes": memory.peak, "predicted_peak_bytes": None} | {
        f"{part}_bytes": count for part, count in parts.items()
    }


def in_order(metrics: dict[str, Any]) -> dict[str, Any]:
    """The parts in the order in which a person reads them."""
    first = ("status", "error", "model", "lora", "data", "before", "after", "retention", "saved", "speed", "memory")
    last = ("rungs", "ladder", "seed", "versions", "config_sha256", "ranks")
    middle = {key: value for key, value in metrics.items() if key not in last}
    return {key: metrics[key] for key in first if key in metrics} | middle | metrics


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json into a run folder, whole or not at all."""
    from lorafit.files import write_json

    write_json(folder / "metrics.json", in_order(metrics))


def note_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json of a run that has failed already, if the disk takes it."""
    with only_told(folder / "metrics.json", "it does not say how the run ended"):
        write_metrics(folder, metrics)


def write_samples(path: Path, samples: list[dict[str, str]]) -> None:
    from lorafit.files import write_atomically

    text = "".join(json.dumps(redact_values(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(path, lambda file: file.write(text.encode()) and None)


def log_results(logger: Any, metrics: dict[str, Any], samples: list[dict[str, str]], step: int) -> None:
    """The held-out numbers, and the samples as a table where the logger has tables."""
    if logger is None:
        return
    numbers = {f"before/{key}": value for key, value in metrics["before"].items()}
    numbers |= {f"after/{key}": value for key, value in metrics["after"].items()}
    numbers |= {f"retention/{key}": value for key, value in metrics["retention"].items()}
    logger.log_metrics(numbers, step=step)
    if hasattr(logger, "log_table") and samples:
        rows = redact_values([list(sample.values()) for sample in samples])
        logger.log_table("samples", columns=list(samples[0]), data=rows)


def log_labels(logger: Any, rows: list[dict[str, Any]]) -> None:
    """What of some examples is trained, as a table where the logger has tables."""
    if hasattr(logger, "log_table") and rows:
        data = redact_values([list(row.values()) for row in rows])
        logger.log_table("labels", columns=list(rows[0]), data=data)
