"""The README.md of an adapter folder: what it is, how to use it, and what was measured; nothing that was not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorafit.adapter.files import PROVENANCE, ROUNDED


def model_card(config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The README.md of an adapter: what it is, how to use it, and what was measured."""
    metrics, data = record.get("metrics") or {}, record.get("data") or {}
    quant, targets = record.get("quant"), config["target_modules"]
    targets = targets.split("|") if isinstance(targets, str) else targets
    rounded = record.get("dtype") in ROUNDED
    lines = [
        "---",
        f"base_model: {json.dumps(config['base_model_name_or_path'])}",
        f"library_name: {'lorafit' if rounded else 'peft'}",
        "tags: [lora, lorafit]",
        "---",
        "",
        f"# LoRA adapter for {config['base_model_name_or_path']}",
        "",
        f"Rank {config['r']}, alpha {config['lora_alpha']:g}{' (rsLoRA)' if config['use_rslora'] else ''}, on "
        f"{', '.join(sorted({name.rpartition('.')[2] for name in targets}))}. The base was held in "
        + (f"{quant['type']} (block size {quant['block_size']}, " if quant else "16 or 32 bits.")
        + (f"double quantization {'on' if quant['double_quant'] else 'off'}) in training." if quant else ""),
    ]
    if data:
        lines += ["", f"Trained on `{data.get('path')}`: {data.get('train_examples')} examples."]
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    if after:
        lines += ["", "| held out | base | with the adapter |", "|---|---|---|"]
        lines += [f"| {key} | {_number(before.get(key))} | {_number(value)} |" for key, value in after.items()]
    retention = metrics.get("retention") or {}
    if retention:
        lines += [
            "",
            f"On text that has nothing to do with the task, perplexity went from "
            f"{_number(retention['perplexity_adapter_off'])} to {_number(retention['perplexity_adapter_on'])} "
            f"(KL divergence {_number(retention['kl'])} nats per token).",
        ]
    if saved := metrics.get("saved"):
        lines += [
            "",
            f"A and B are stored in {saved['dtype']}, {saved['bytes']:,} bytes. What that costs against float32: "
            f"held-out loss {_number(saved['loss'])} instead of {_number(saved['loss_float32'])}, KL divergence "
            f"{_number(saved['kl'])} nats per token.",
        ]
    if cut := record.get("cut_from"):
        numbers = ", ".join(f"{key} {_number(value)}" for key, value in cut.items() if key != "rank")
        lines += ["", f"Cut down from rank {cut.get('rank')} ({numbers})."]
    lines += ["", "```python"]
    if rounded:
        lines += [
            "import lorafit  # which alone reads these 8- or 4-bit weights",
            f"model = lorafit.load_base_model({json.dumps(config['base_model_name_or_path'])})",
            "lorafit.load_adapter(model, folder)",
        ]
    else:
        lines += ["from peft import PeftModel", "model = PeftModel.from_pretrained(base_model, folder)"]
    lines += ["```", "", f"Recipe, versions and hashes are in `{PROVENANCE}`.", ""]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, int | float) else str(value)
