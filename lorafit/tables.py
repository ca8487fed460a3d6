"""What a person sees on the terminal: what will happen, before it starts, and what did happen, at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorafit.adapter import adapter_dtype
from lorafit.data.sources import files_not_read, held_out_files
from lorafit.datamodule import FinetuneDataModule
from lorafit.inject import adapter_modules, lora_layers, trained_biases
from lorafit.isolation import Isolation
from lorafit.lora import TrainedCopy
from lorafit.module import FinetuneModule
from lorafit.quant import BaseReport
from lorafit.terminal import human, number, shorten, visible


def start_table(
    *,
    base: BaseReport,
    architecture: str,
    dtype: str,
    device: str,
    rank: int,
    alpha: float,
    scaling: float,
    variant: str,
    coverage: Mapping[str, Mapping[str, int]],
    trainable: int,
    total: int,
    data: Mapping[str, Any],
    data_path: str,
    data_notes: Sequence[str],
    optimizer: str,
    learning_rate: float,
    steps: int,
    batch_size: int,
    accumulate: int,
    memory: Mapping[str, int],
    folder: str,
    adapter_notes: Sequence[str] = (),
    path_notes: Sequence[str] = (),
) -> Table:
    """What this run will do."""
    wrapped = [f"{kind} {n['wrapped']}" for kind, n in coverage.items() if n["wrapped"] == n["total"]]
    partly = [f"{kind} {n['wrapped']} of {n['total']}" for kind, n in coverage.items() if 0 < n["wrapped"] < n["total"]]
    without = [f"{kind} {n['total']}" for kind, n in coverage.items() if not n["wrapped"]]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = [
        ("model", f"{base.name} ({architecture}), {total:,} parameters, {dtype} on {device}"),
        ("base", base_sentence(base)),
        ("LoRA", f"rank {rank}, alpha {alpha:g}, scaling {scaling:.4g}{'' if variant == 'lora' else f' ({variant})'}"),
        *(("", note) for note in adapter_notes),
        ("adapted", ", ".join(wrapped + partly)),
        ("not adapted", ", ".join(without) or "–"),
        ("trainable", f"{trainable:,} parameters, {100 * trainable / total:.4f} % of all"),
        ("data", data_sentence(data_path, data)),
        *(("", note) for note in data_notes),
    ]
    per_step = f"{batch_size}" + (f" x {accumulate}" if accumulate > 1 else "")
    rows += [
        (
            "training",
            f"{steps:,} steps of {per_step} {'rows' if data['packed_rows'] else 'examples'}, {optimizer}, "
            f"learning rate {learning_rate:g}",
        ),
        *((name, note) for name, note in zip(("path", *[""] * len(path_notes)), path_notes, strict=False)),
        (
            "memory",
            f"weights {human(memory['weights'])}, scales {human(memory['quant_state'])}, "
            f"adapter {human(memory['adapter'])}; activations come on top",
        ),
        ("folder", folder),
    ]
    for name, text in rows:
        table.add_row(name, escape(visible(text)))
    return table


def adapter_notes(model: Any) -> list[str]:
    """What of an adapter is out of the ordinary, a sentence each: other ranks, whole modules, biases, rounding."""
    layers = lora_layers(model)
    notes = []
    for word in ("rank", "alpha"):
        found: dict[Any, set[str]] = {}
        for name, layer in layers.items():
            found.setdefault(getattr(layer, word), set()).add(name.rpartition(".")[2])
        if len(found) > 1:
            parts = (f"{key:g} on {', '.join(sorted(kinds))}" for key, kinds in sorted(found.items()))
            notes.append(f"{word} {'; '.join(parts)}")
    if whole := [name for name, module in adapter_modules(model).items() if isinstance(module, TrainedCopy)]:
        notes.append(f"trained whole: {', '.join(whole)}")
    if biases := trained_biases(model):
        notes.append(f"{len(biases)} biases of the base are trained")
    if (kind := adapter_dtype(model)) != "float32":
        notes.append(f"A and B multiply as {kind} holds them, and are saved so")
    return notes


def path_counts(paths: Mapping[str, str]) -> dict[str, int]:
    """How many LoRA layers run by which path."""
    counts: dict[str, int] = {}
    for path in paths.values():
        counts[path] = counts.get(path, 0) + 1
    return counts


def path_notes(module: FinetuneModule, compiled: str) -> list[str]:
    """Which layers run how, what is kept for the backward pass, and whether anything is compiled and why."""
    counts = path_counts(module.paths)
    notes = [", ".join(f"{path} {count}" for path, count in counts.items())]
    kept = {
        "none": "",
        "selective": "norms and activations are computed again in the backward pass",
        "full": "every block is computed again in the backward pass",
        "offload": "every block is computed again in the backward pass, its input waiting on the host",
    }[module.options.checkpointing]
    if module.options.checkpointing == "offload" and next(module.parameters()).device.type != "cuda":
        kept = "every block is computed again in the backward pass (offload: the model is on the host already)"
    if kept:
        notes.append(kept)
    notes.append(f"{'compiled' if module.ops.name == 'compiled' else 'not compiled'}: {compiled}")
    return notes


def source_names(path: Any) -> str:
    """What `data.path` names, for a person: "a.jsonl", or "a.jsonl x 0.7 + b.csv x 0.3"."""
    entries = path if isinstance(path, list) else [path]
    parts = []
    for entry in entries:
        values = entry if isinstance(entry, dict) else {"path": entry}
        weight = values.get("weight")
        parts.append(str(values["path"]) + ("" if weight is None else f" x {weight:g}"))
    return " + ".join(parts)


def data_sentence(path: str, data: Mapping[str, Any]) -> str:
    """How much is trained and held out."""
    formats = ", ".join(dict.fromkeys(data["formats"]))
    held_out = f"{data['eval_examples']:,} held out"
    if data["eval_unused_examples"]:
        held_out += f", {data['eval_unused_examples']:,} more held back (task.eval_examples)"
    if data["streaming"]:
        return f"{path} ({formats}), streamed; {held_out}"
    return (
        f"{path} ({formats}): {data['train_examples']:,} examples, {data['supervised_tokens']:,} of "
        f"{data['train_tokens']:,} tokens trained; {held_out}"
    )


def stream_sentence(data: Mapping[str, Any]) -> str:
    """What a stream has given, once it is over."""
    parts = [f"{data['train_examples']:,} examples", f"{data['train_tokens']:,} tokens"]
    for key, word in (("dropped", "dropped"), ("truncated", "cut")):
        if data[f"{key}_examples"]:
            parts.append(f"{data[f'{key}_examples']:,} {word} for their length")
    if data["untrained_examples"]:
        parts.append(f"{data['untrained_examples']:,} without anything to learn")
    if data["skipped_rows"]:
        parts.append(f"{data['skipped_rows']:,} bad rows skipped")
    return f"of the data were read: {', '.join(parts)}"


def data_notes(data: FinetuneDataModule, packing: Isolation | None = None) -> list[str]:
    """What a person should know of the data, a sentence each; nothing where nothing is out of the ordinary."""
    numbers, report, encoder = data.statistics(), data.report, data.encoder
    notes = []
    for source, columns in zip(data.sources, report.unused, strict=False):
        if columns and source.path != "embedded":
            notes.append(f"columns of {source.path} that are not read: {', '.join(columns[:8])}")
        if names := held_out_files(source.path):
            use = "not read" if data.eval_path else "held out for their names"
            notes.append(f"files of {source.path} that are {use}: {', '.join(names[:8])}")
        if left := files_not_read(source.path):
            notes.append(f"files of {source.path} that are not read: {', '.join(left[:8])}")
    if report.dropped or report.truncated:
        total = len(data.train_sequences) + report.dropped + report.untrained
        notes.append(
            f"of {total:,} examples {report.dropped + report.truncated:,} are longer than data.max_length="
            f"{encoder.max_length}: {report.dropped:,} dropped, {report.truncated:,} cut "
            f"(data.overflow={encoder.overflow})"
        )
    if report.untrained:
        notes.append(
            f"{report.untrained:,} examples have nothing to learn under data.train_on={encoder.train_on} (an answer of "
            "weight 0, or a text of one token) and are left out"
        )
    if report.eval_dropped or report.eval_truncated:
        total = numbers["eval_examples"] + report.eval_dropped
        notes.append(
            f"of {total:,} held-out examples {report.eval_dropped:,} are dropped and {report.eval_truncated:,} cut"
            + (": what is measured is the rest" if report.eval_dropped else "")
        )
    if report.marked:
        notes.append(
            f"{report.marked:,} example{'' if report.marked == 1 else 's'} hold special tokens in the text, which the "
            f"model reads as such; the first: {report.first_marked}"
        )
    if report.skipped:
        notes.append(f"{report.skipped:,} of {report.rows:,} rows are bad and skipped; the first: {report.bad_rows[0]}")
    if count := numbers["duplicate_examples"]:
        notes.append(f"{count:,} training example{' repeats' if count == 1 else 's repeat'} an earlier one")
    if count := numbers["leaked_examples"]:
        notes.append(f"{count:,} training example{' is' if count == 1 else 's are'} held out as well")
    if data.streaming:
        notes.append(f"checked on the first {report.rows:,} rows; {data.window:,} rows are shuffled together")
    mark = encoder.chat.end_mark() if encoder.chat is not None else None
    if mark is not None and mark != encoder.tokenizer.eos_token:
        notes.append(
            f"an answer ends with {mark}, which is not the tokenizer's end token {encoder.tokenizer.eos_token}: "
            "whoever generates has to stop at it"
        )
    if packing is not None:
        if data.padding_free:
            rows = "one row a batch"
        else:
            rows = "rows" if data.streaming else f"{numbers['packed_rows']:,} rows"
        notes.append(f"packed in {rows}; {packing.sentence()}")
    return notes


_STATES = {"trained": "bold green", "masked": "dim", "cut": "red strike"}


def token_runs(tokens: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, str]]:
    """(state, number of tokens, text) of each run of tokens that are alike: "trained", "masked" or "cut"."""
    runs: list[tuple[str, int, str]] = []
    for token in tokens:
        state = "cut" if token["cut"] else "trained" if token["trained"] else "masked"
        if runs and runs[-1][0] == state:
            runs[-1] = (state, runs[-1][1] + 1, runs[-1][2] + token["text"])
        else:
            runs.append((state, 1, token["text"]))
    return runs


def audit_tables(found: Mapping[str, Any], colours: bool = True) -> list[Any]:
    """What an audit found, for the terminal. Without colours the state of the tokens is written before them."""
    parts: list[Any] = []
    for example in found["examples"]:
        table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
        outcome = "" if example["outcome"] == "whole" else f", {example['outcome']}"
        parts.append(Text(f"{example['where']}: {example['length']:,} tokens{outcome}", style="bold"))
        table.add_column(style="dim")
        table.add_column(justify="right", style="dim")
        table.add_column(overflow="fold")
        at = 0
        for state, count, text in token_runs(example["tokens"]):
            shown = Text()
            # every other token is underlined, so that they can be told apart
            for place, token in enumerate(example["tokens"][at : at + count]):
                style = _STATES[state] + (" underline" if place % 2 else "")
                shown.append(_lines_marked(token["text"]), style=style)
            table.add_row(state, str(count), shown if colours else Text(_lines_marked(text)))
            at += count
        if example["length"] > len(example["tokens"]):
            table.add_row("", "", f"… {example['length'] - len(example['tokens']):,} more tokens (audit.tokens)")
        parts += [table, ""]
    counts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    counts.add_column(style="bold")
    counts.add_column(justify="right")
    share = found["supervised_tokens"] / found["total_tokens"] if found["total_tokens"] else 0.0
    for name, key in (
        ("training examples", "train_examples"),
        ("held-out examples", "eval_examples"),
        ("tokens", "total_tokens"),
        (f"trained tokens ({share:.1%})", "supervised_tokens"),
        ("longest example", "longest"),
        ("cut examples", "truncated_examples"),
        ("dropped examples", "dropped_examples"),
        ("skipped rows", "skipped_rows"),
        ("duplicates", "duplicate_examples"),
        ("shared with the held-out rows", "leaked_examples"),
    ):
        counts.add_row(name, f"{found[key]:,}")
    layers = Table(box=None, padding=(0, 2, 0, 0))
    layers.add_column("linear layers", style="bold")
    layers.add_column("adapted", justify="right")
    layers.add_column("by layer", overflow="fold")
    for kind, entry in found["coverage"].items():
        marks = "".join("■" if on else "·" for on in found["layers"][kind].values())
        layers.add_row(kind, f"{entry['wrapped']} of {entry['total']}", marks)
    parts += [counts, "", layers, ""]
    parts += [Text(f"- {visible(note)}") for note in found["notes"]]
    parts += [Text(f"- skipped: {visible(row)}") for row in found["bad_rows"]]
    if found["skipped_rows"] > len(found["bad_rows"]):
        parts.append(Text(f"- skipped: … and {found['skipped_rows'] - len(found['bad_rows']):,} more"))
    if not found["refusals"]:
        parts.append(Text("Nothing is wrong: every check passed.", style="green"))
    return parts


def _lines_marked(text: str) -> str:
    return visible(text).replace("\n", "⏎\n")


def base_sentence(base: BaseReport) -> str:
    """How the base weights are stored, and what could not be quantized and why."""
    if base.quant is None:
        return "not quantized"
    source = f", read from the quantized copy in {base.copy}" if base.copy else ""
    quant = base.quant
    detail = f", blocks of {quant.block_size}" if quant.block_size else ""
    detail += ", double quantization" if quant.double_quant else ""
    text = f"{len(base.quantized)} layers in {quant.type}{detail}"
    reasons: dict[str, list[str]] = {}
    for name, reason in base.left.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        shown = names[0] if len(names) == 1 else f"{len(names)} layers such as {names[0]}"
        text += f"; {shown} not quantized: {reason}"
    if base.whole:
        text += f"; the 16-bit model was whole in memory: {base.whole}"
    return text + source


def result_table(metrics: Mapping[str, Any]) -> Table:
    """Held-out numbers before and after, and what was kept."""
    table = Table(title="held out", title_justify="left")
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    before, after = metrics["before"], metrics["after"]
    for key in after:
        table.add_row(key.replace("_", " "), number(before.get(key)), number(after[key]))
    retention = metrics["retention"]
    if saved := metrics.get("saved"):
        table.add_row(f"loss as {saved['dtype']} holds it", "–", number(saved["loss"]))
    table.add_row(
        "perplexity of other text",
        number(retention["perplexity_adapter_off"]),
        number(retention["perplexity_adapter_on"]),
    )
    return table


def samples_table(samples: Sequence[Mapping[str, str]], width: int = 200) -> Table:
    """Answers before and after, side by side with the reference."""
    table = Table(show_lines=True)
    for name in ("prompt", "before", "after", "reference"):
        table.add_column(name, overflow="fold", ratio=1)
    for sample in samples:
        cells = (sample["prompt"], sample["before"], sample["after"], sample["reference"])
        table.add_row(*(escape(shorten(visible(cell), width)) for cell in cells))
    return table
