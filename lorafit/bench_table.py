"""What the samples of a benchmark mean: rows, ratios and tables. Nothing here measures anything.

A ratio is that of two medians. Beside it stand the quartiles of the same ratio taken round by round, in which a machine
that slows down for everybody cancels.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafit.peers import Case

OUTLIER = 3.0  # a round in which a system took so many times its median is dropped
_NUMBERS = (
    *("tokens_per_second", "peak_bytes", "idle_bytes", "speed_ratio", "speed_ratio_quartiles", "memory_ratio"),
    *("compared_with", "seconds", "rounds", "dropped", "timed", "flops", "share_of_matmul_rate", "matmul_rates"),
    *("loss_error", "gradient_errors", "recomputed_share", "adapter_weights", "supervised_tokens"),
)


@dataclass(frozen=True)
class Setting:
    """What is compared. against: the system, or the label of the row, that ratios refer to."""

    title: str
    quant: bool = False
    checkpointing: bool = False
    against: str = "peft"


SETTINGS = {
    "bf16": Setting("LoRA, 16 bits"),
    "bf16_checkpointing": Setting("LoRA, 16 bits, checkpointing", checkpointing=True),
    "nf4": Setting("QLoRA, NF4", quant=True),
    "nf4_checkpointing": Setting("QLoRA, NF4, checkpointing", quant=True, checkpointing=True),
    "nf4_vs_bf16": Setting("lorafit, NF4 against 16 bits", against="lorafit bf16"),
    "head_loss": Setting("output head and loss alone, part of the tokens not trained", against="transformers"),
}


def kept_rounds(seconds: Mapping[str, Sequence[float]]) -> list[int]:
    """The rounds in which nobody took more than OUTLIER times his own median: something else had the machine then."""
    medians = {label: statistics.median(taken) for label, taken in seconds.items()}
    rounds = range(len(next(iter(seconds.values()))))
    return [n for n in rounds if all(taken[n] <= OUTLIER * medians[label] for label, taken in seconds.items())]


def spread(samples: Sequence[float]) -> dict[str, float]:
    """{"median", "low", "high"} with the quartiles (of fewer than four samples the extremes), and "min", "max"."""
    few = len(samples) < 4
    quartiles = [min(samples), 0.0, max(samples)] if few else statistics.quantiles(samples, method="inclusive")
    ends = {"low": quartiles[0], "high": quartiles[2], "min": min(samples), "max": max(samples)}
    return {"median": statistics.median(samples), **ends}


def make_rows(
    setting: str,
    wanted: Sequence[Case],
    missing: Mapping[str, tuple[str, str] | None],
    timed: Mapping[str, Any],
    alone: Mapping[str, Any],
    tolerance: float,
) -> list[dict[str, Any]]:
    """A row for each case of a setting, measured or not; speed, shares and ratios are added by `add_speed` and
    `add_ratios`. timed, alone: what the child processes answered."""
    kept = kept_rounds(timed["seconds"]) if timed.get("seconds") else []
    rows = []
    for case in wanted:
        row: dict[str, Any] = dict.fromkeys(_NUMBERS)
        row |= {"system": case.system, "setting": setting, "label": case.label, "status": "measured", "reason": None}
        row |= {"quant": "nf4" if case.quant else None, "checkpointing": case.checkpointing, "part": case.part}
        row |= {"compile": case.compile} if case.system == "lorafit" else {"adapters": case.adapters}
        rows.append(row)
        if (absent := missing[case.label]) is not None:
            row["status"], row["reason"] = absent
            continue
        own = alone.get(case.label, {})
        by_itself = "seconds" in own
        # a system that may not be beside the others answers for itself; where all died, they died of the same
        found = own if case.system == "unsloth" else timed.get("cases", {}).get(case.label, timed)
        whole = own if by_itself else timed
        taken = own["seconds"] if by_itself else timed.get("seconds", {}).get(case.label, [])
        if failure := found.get("failed") or (own.get("failed") if not taken else None):
            row |= {"status": "failed", "reason": failure}
            continue
        row |= {key: found.get(key) for key in ("loss_error", "gradient_errors")}
        counted = own if by_itself else found
        row |= {key: counted.get(key) for key in ("recomputed_share", "adapter_weights")}
        row |= {key: whole.get(key) for key in ("matmul_rates", "supervised_tokens")}
        row["timed"] = "alone" if by_itself else "interleaved"
        row["rounds"] = list(taken) if by_itself else [taken[n] for n in kept]
        row["dropped"] = len(taken) - len(row["rounds"])
        row |= {"peak_bytes": own.get("peak_bytes"), "idle_bytes": own.get("idle_bytes")}
        if why := difference(found, tolerance):
            row |= {"status": "differs", "reason": why}
        elif failure := own.get("failed"):
            row["reason"] = f"memory: {failure}"
    return rows


def add_speed(row: dict[str, Any], model: Mapping[str, int], tokens: int, length: int) -> None:
    """From the rounds of a row: its times, tokens a second, and the share of the machine's rate that its useful
    operations are. model: as `describe_model` gives it; tokens: of the batch, in rows of `length`."""
    from lorafit.machine import step_flops

    if not row["rounds"]:
        return
    row["seconds"] = spread(row["rounds"])
    row["tokens_per_second"] = tokens / row["seconds"]["median"]
    head_alone = row["part"] == "head"
    row["flops"] = step_flops(
        base=0 if head_alone else model["base"],
        head=model["head"],
        adapter=0 if head_alone else row["adapter_weights"],
        layers=0 if head_alone else model["num_hidden_layers"],
        attention_width=model["attention_width"],
        tokens=tokens,
        supervised_tokens=row["supervised_tokens"],
        length=length,
    )
    if row["matmul_rates"]:
        rate = statistics.mean(row["matmul_rates"])
        row["share_of_matmul_rate"] = sum(row["flops"].values()) / row["seconds"]["median"] / rate


def fastest(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row with the most tokens a second among those that were measured and are right."""
    right = [row for row in rows if row["status"] == "measured" and row["tokens_per_second"]]
    return max(right, key=lambda row: row["tokens_per_second"], default=None)


def versus(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """How many times as fast as `other` a row is, by their medians; the quartiles of the same ratio round by round,
    where both were timed in one process; and its step memory as a share of the other's."""
    both = row["timed"] == other["timed"] == "interleaved"
    by_round = [theirs / ours for ours, theirs in zip(row["rounds"], other["rounds"], strict=True)] if both else []
    pair = spread(by_round) if by_round else None
    known = row["peak_bytes"] and other["peak_bytes"]
    return {
        "speed_ratio": row["tokens_per_second"] / other["tokens_per_second"],
        "speed_ratio_quartiles": [pair["low"], pair["high"]] if pair else None,
        "memory_ratio": row["peak_bytes"] / other["peak_bytes"] if known else None,
    }


def add_ratios(rows: Sequence[dict[str, Any]], against: str) -> None:
    """Put into every row that is right its ratios to the fastest row of the system, or with the label, `against`."""
    other = fastest(row for row in rows if against in (row["system"], row["label"]))
    for row in rows:
        if other is not None and row["status"] == "measured" and row["tokens_per_second"]:
            row |= versus(row, other) | {"compared_with": other["label"]}


def comparisons(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each row of lorafit against the fastest of every other system of its setting."""
    found = []
    for row in rows:
        if row["system"] != "lorafit" or row["status"] != "measured" or not row["tokens_per_second"]:
            continue
        for system in dict.fromkeys(other["system"] for other in rows if other["system"] != "lorafit"):
            other = fastest(one for one in rows if one["system"] == system)
            if other is not None:
                names = {"setting": row["setting"], "label": row["label"], "against": other["label"]}
                found.append(names | versus(row, other))
    return found


def difference(found: Mapping[str, Any], tolerance: float) -> str | None:
    """Why what a system computed is not what the reference did, or None. A number that is no number differs."""
    errors = {"loss": found["loss_error"], **found["gradient_errors"]} if "loss_error" in found else {}
    wrong = [f"{name} by {error:.2g}" for name, error in errors.items() if not error <= tolerance]
    return f"off by more than {tolerance:g}: {', '.join(wrong)}" if wrong else None


# ------------------------------------------------------------------------------------------------ what is shown


def bench_tables(found: Mapping[str, Any]) -> list[Any]:
    """The rows setting by setting, lorafit against each other system, and the machine, for the terminal."""
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for setting in dict.fromkeys(row["setting"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["setting"] == setting]
        against = next((row["compared_with"] for row in rows if row["compared_with"]), None)
        title = SETTINGS[setting].title + (f"; ratios to {against}" if against else "")
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("system", style="bold")
        for head in ("tokens/s", "ms", "quartiles", "speed", "step memory", "memory", "error", "recomputed", "of rate"):
            table.add_column(head, justify="right")
        table.add_column("", overflow="fold")
        for row in rows:
            table.add_row(row["label"], *_cells(row), Text(_note(row)))
        parts += [table, ""]
    if found["comparisons"]:
        table = Table(title="lorafit against each", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for head in ("setting", "lorafit", "against"):
            table.add_column(head)
        for head in ("speed", "quartiles by round", "memory"):
            table.add_column(head, justify="right")
        for one in found["comparisons"]:
            pair = one["speed_ratio_quartiles"]
            between = f"{pair[0]:.2f}–{pair[1]:.2f}" if pair else "–"
            ratios = (_times(one["speed_ratio"]), between, _times(one["memory_ratio"]))
            table.add_row(one["setting"], one["label"], one["against"], *ratios)
        parts += [table, ""]
    return [*parts, Text(machine_sentence(found["machine"]))]


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"


def _cells(row: Mapping[str, Any]) -> list[str]:
    from lorafit.terminal import human

    seconds, errors = row["seconds"], row["gradient_errors"]
    share, recomputed = row["share_of_matmul_rate"], row["recomputed_share"]
    return [
        "–" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
        f"{1000 * seconds['median']:.1f}" if seconds else "–",
        f"{1000 * seconds['low']:.1f}–{1000 * seconds['high']:.1f}" if seconds else "–",
        _times(row["speed_ratio"]),
        "–" if row["peak_bytes"] is None else human(row["peak_bytes"]),
        _times(row["memory_ratio"]),
        f"{max(errors.values()):.1%}" if errors else "–",
        # the first block's input needs no gradient, which is counted as a little less than nothing
        "–" if recomputed is None else f"{max(0.0, recomputed):.0%}",
        "–" if share is None else f"{share:.0%}",
    ]


def _note(row: Mapping[str, Any]) -> str:
    words = [row["status"]] if row["status"] != "measured" else []
    words += [row["reason"]] if row["reason"] else []
    words += [f"{row['dropped']} rounds dropped"] if row["dropped"] else []
    return ": ".join(words)


def machine_sentence(machine: Mapping[str, Any]) -> str:
    """The machine, its limits and the versions in a few lines."""
    rates = [rate for pair in machine.get("matmul_flops_per_second", {}).values() for rate in pair]
    lines = [
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads"
        + (f" ({', '.join(machine['flags'])})" if machine["flags"] and not machine["gpu"] else "")
        + f", load {machine['load']:.1f} before",
        f"memory {machine['memory_bytes_per_second'] / 1e9:.1f} GB/s"
        + (f"; 2048³ in bfloat16 {min(rates) / 1e9:,.0f} to {max(rates) / 1e9:,.0f} GFLOP/s" if rates else ""),
        ", ".join(f"{name} {number}" for name, number in machine["versions"].items()),
        machine["date"],
    ]
    return "\n".join(lines)
