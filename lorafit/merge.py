"""Write the base and an adapter as one plain model, by the way that is measured to cost least.

    python -m lorafit.merge adapter=RUN/adapter out=DIR
    python -m lorafit.merge adapter=RUN/adapter out=DIR merge.candidate=original max_kl=0.2
    python -m lorafit.merge merge.unmerge=MERGED adapter=RUN/adapter out=DIR        and back, bit for bit

Under a quantized base there are three candidates (see `lorafit.merging`); each reads the held-out rows beside the
live adapter. A merge whose predictions are further than max_kl nats per token from the adapter's is refused.

Leaves merge.json. Exit codes: 0 written, 2 refused or wrong input; then nothing is in `out`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.build import adapter_folders, build_data, load_base, model_options, refuse_foreign, require_accelerator
from lorafit.config import Config, to_dict
from lorafit.errors import InputError
from lorafit.launch import start


def main() -> None:
    start("merge", run)


def run(config: Config, folder: Path) -> None:
    """One merge: measures, prints, writes merge.json and the model; InputError where the merge costs too much."""
    from rich.markup import escape

    from lorafit.adapter import load_adapter
    from lorafit.files import write_json
    from lorafit.inject import adapter_modules
    from lorafit.merging import candidates, measure_merge, merged_model, require_new, size, write_merged
    from lorafit.quant import base_report
    from lorafit.terminal import console, visible
    from lorafit.trainer import quiet_libraries

    refuse_foreign(config, "merge")
    quiet_libraries()
    terminal = console()
    adapters = adapter_folders(config)
    if len(adapters) > 1:
        raise InputError(f"adapter: {len(adapters)} are given, one is merged: make one of them first, or name one")
    adapter = next(iter(adapters.values()))
    merged = [Path(config.merge.unmerge)] if config.merge.unmerge is not None else []
    out, limit = require_new(config.out, [adapter, *merged]), size(config.merge.max_shard_size)
    if config.merge.unmerge is not None:
        unmerge(config, adapter, out, folder)
        return
    other = trained_over(adapter, to_dict(config)["quant"])
    if other is not None:
        terminal.print(escape(f"The adapter was trained over {other['quant']} and is measured over {other['now']}."))
    differs = {"trained_over": other} if other is not None else {}
    data = build_data(config)
    data.setup()
    base = open_for_merge(config)
    if base.whole is not None:
        terminal.print(f"The base is loaded whole into memory: {escape(visible(base.whole))}.")
    if base.renamed is not None:
        theirs, ours = (escape(visible(name)) for name in base.renamed)
        terminal.print(f"What is written has the model's names of tensors ({ours}), not the checkpoint's ({theirs}).")
    load_adapter(base.model, adapter, allow_other_base=config.allow_other_base)
    found = {candidate.name: candidate for candidate in candidates(base, config.merge.candidate)}
    models = {name: merged_model(base, candidate) for name, candidate in found.items()}
    live_loss, tokens, numbers = measure_merge(base.model, models, data.eval_batches())
    del models
    rows = [{"name": name, **numbers[name], "bytes": candidate.nbytes} for name, candidate in found.items()]
    best = choose(rows)
    result = {
        "candidates": rows,
        "live": {"loss": live_loss},
        "chosen": best["name"],
        "max_kl": config.max_kl,
        "out": None,
        "tokens": tokens,
        **differs,
    }
    write_json(folder / "merge.json", result)
    for part in merge_tables(result):
        terminal.print(part)
    if not affordable(result):
        raise InputError(
            f"{best['name']} is {best['kl']:.4g} nats per token from the live adapter, and max_kl is "
            f"{config.max_kl:g}: nothing was written. Use the adapter unmerged, or raise max_kl"
        )
    report = base_report(base.model)
    written = write_merged(
        found[best["name"]],
        out,
        adapted=adapter_modules(base.model),
        source=base.folder,
        record={
            "merged_from": str(adapter),
            "adapter_sha256": adapter_sha256(adapter),
            "base_model": config.model.name,
            "base_fingerprint": report.fingerprint if report is not None else None,
            "quant": to_dict(config)["quant"],
            **differs,
            "measured": {key: best[key] for key in ("loss", "kl", "top1_agreement")},
            "live": result["live"],
            "tokens": tokens,
            "versions": versions(),
        },
        max_shard_bytes=limit,
        undo=config.merge.undo,
    )
    write_json(folder / "merge.json", result | {"out": str(out), "undo_bytes": written["undo_bytes"]})
    terminal.print(f"Written to {escape(visible(str(out)))}: {best['name']}, {human_sizes(written)}.")


def open_for_merge(config: Config) -> Any:
    """The base of a configuration, opened for merging."""
    from lorafit.merging import open_base

    require_accelerator(config.trainer.accelerator)

    def load_whole(quantized: bool) -> Any:
        plain = dataclasses.replace(config, quant=None, model=dataclasses.replace(config.model, dtype="auto"))
        return load_base(config if quantized else plain)

    options = model_options(config)
    del options["cache"]  # a merge needs the 16-bit weights as well
    return open_base(config.model.name, load_whole=load_whole, **options)


def choose(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The candidate nearest to the live adapter; of equals the one with the lower loss."""

    def rank(row: Mapping[str, Any]) -> tuple[float, float]:
        return (math.inf if math.isnan(row["kl"]) else row["kl"], row["loss"])

    return min(rows, key=rank)


def affordable(result: Mapping[str, Any]) -> bool:
    """Whether the chosen candidate is written; one whose divergence is NaN is not."""
    best = next(row for row in result["candidates"] if row["name"] == result["chosen"])
    return bool(best["kl"] <= result["max_kl"])


def merge_tables(result: Mapping[str, Any]) -> list[Any]:
    """What a person sees: the candidates beside the live adapter, and why one was taken."""
    from rich.table import Table

    from lorafit.terminal import human, number

    table = Table(title=f"merged, on {result['tokens']:,} held-out tokens", title_justify="left")
    table.add_column("")
    for name in ("loss", "KL from the live adapter", "same first choice", "size"):
        table.add_column(name, justify="right")
    table.add_row("live adapter", number(result["live"]["loss"]), "", "", "")
    word = "taken" if affordable(result) else "nearest"
    for row in result["candidates"]:
        mark = f" ← {word}" if row["name"] == result["chosen"] else ""
        same = f"{row['top1_agreement']:.2%}"
        table.add_row(row["name"] + mark, number(row["loss"]), f"{row['kl']:.3g}", same, human(row["bytes"]))
    lowest = min(result["candidates"], key=lambda row: row["loss"])
    parts: list[Any] = [table]
    if lowest["name"] != result["chosen"]:
        parts.append(
            f"{lowest['name']} has the lower loss on these rows; {result['chosen']} is nearer to what was trained. "
            f"merge.candidate={lowest['name']} takes the other."
        )
    return parts


def human_sizes(written: Mapping[str, int]) -> str:
    from lorafit.terminal import human

    text = human(written["bytes"])
    return text + (f" and {human(written['undo_bytes'])} to undo it" if written["undo_bytes"] else "")


def unmerge(config: Config, adapter: Path, out: Path, folder: Path) -> None:
    """The way back."""
    from rich.markup import escape

    from lorafit.files import write_json
    from lorafit.merging import size, unmerge_folder
    from lorafit.terminal import console, visible

    source = Path(str(config.merge.unmerge)).expanduser()
    limit = size(config.merge.max_shard_size)
    written = unmerge_folder(source, adapter, adapter_sha256(adapter), out, limit)
    write_json(folder / "merge.json", {"unmerged": str(source), "adapter": str(adapter), "out": str(out)} | written)
    console().print(f"Written to {escape(visible(str(out)))}: bit for bit {escape(visible(written['is']))}.")


def trained_over(adapter: Path, quant: Any) -> dict[str, str] | None:
    """{"quant": what the adapter was trained over, "now": what it is merged over}; None where they are the same, or
    nobody wrote down the first."""
    from lorafit.adapter import read_record
    from lorafit.errors import reason
    from lorafit.quant import Quantization

    record = read_record(adapter)
    if "quant" not in record:
        return None
    try:
        then = Quantization.of(record["quant"])
    except (TypeError, ValueError) as error:
        raise InputError(f"adapter {str(adapter)!r}: lorafit.json has a quant that is none: {reason(error)}") from error
    now = Quantization.of(quant)
    if then == now:
        return None
    short = (then.type if then else "none") != (now.type if now else "none")

    def name(kind: Quantization | None) -> str:
        if kind is None or short:
            return kind.type if kind is not None else "none"
        return f"{kind.type} ({', '.join(f'{key} {value}' for key, value in kind.as_dict().items() if key != 'type')})"

    return {"quant": name(then), "now": name(now)}


def adapter_sha256(folder: Path) -> str:
    """The SHA-256 of an adapter's weights."""
    from lorafit.adapter.files import sha256_of, weights_file

    return sha256_of(weights_file(folder))


def versions() -> dict[str, str]:
    """Of what computes a merge."""
    from importlib.metadata import version

    return {name: version(name) for name in ("lorafit", "torch", "transformers", "bitsandbytes", "safetensors")}


if __name__ == "__main__":
    main()
