"""Which run to take: many runs on one page, with the smallest that is good enough and the command that makes it again.

    python -m lorafit.report DIR                                the folder of a sweep, or any folder with runs below it
    python -m lorafit.report DIR report.metric=exact_match      judged by another number
    python -m lorafit.report DIR report.kept=0.95               by a looser rule

It reads what the runs left behind and runs nothing. Every run is told, also one that failed, with the reason, and so is
every folder that could not be read. Leaves `report.html` (a page that needs nothing else), `report.csv` (a row for each
run) and `report.json`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.config import Config
from lorafit.errors import InputError, near_path
from lorafit.launch import start
from lorafit.redact import redact
from lorafit.reporting.choice import name_of, value_of, weigh
from lorafit.reporting.page import report_page, shown_metrics, spelled, summary
from lorafit.reporting.runs import Found, Run, find_runs

_NUMBERS = (
    *("rank", "parameters_trainable", "peak_bytes", "train_seconds", "startup_seconds", "total_seconds", "steps"),
    *("tokens_per_second", "supervised_tokens_per_second", "seed"),
)


def main() -> None:
    start("report", run, folder_key="report.folder")


def run(config: Config, folder: Path) -> None:
    """One report: reads the runs below `report.folder`, writes its files and prints."""
    from rich.text import Text

    from lorafit.files import write_atomically, write_json
    from lorafit.terminal import console

    root = find_root(config.report.folder)
    read = find_runs(root)
    require_runs(read, root)
    found = study(read, metric=config.report.metric, kept=config.report.kept)
    title = root.resolve().name or str(root.resolve())
    # redacted, since other versions and other programs may have recorded what they should not
    page, rows = redact(report_page(title, read.runs, found)), redact(report_csv(read.runs, found))
    write_json(folder / "report.json", found)
    write_atomically(folder / "report.csv", lambda file: file.write(rows.encode(errors="backslashreplace")))
    write_atomically(folder / "report.html", lambda file: file.write(page.encode(errors="backslashreplace")))
    terminal = console()
    for part in report_tables(read.runs, found):
        # what is to be copied stays on its line
        terminal.print(part, soft_wrap=isinstance(part, Text) and bool(part.no_wrap))
    terminal.print(f"The same as a page: {folder / 'report.html'}", soft_wrap=True, markup=False)


def find_root(given: str | None) -> Path:
    """The folder of `report.folder`; InputError where there is none."""
    if given is None:
        raise InputError("report.folder is not set: give the folder of a sweep: python -m lorafit.report DIR")
    root = Path(given).expanduser()
    if not root.exists():
        raise InputError(f"report.folder: no folder {given!r}.{near_path(given)}")
    if not root.is_dir():
        raise InputError(f"report.folder: {given!r} is a file: give the folder of a sweep or of a run")
    return root


def require_runs(read: Found, root: Path) -> None:
    """Raise InputError where there is nothing to report."""
    if read.runs:
        return
    from lorafit.terminal import visible

    lines = [f"  {visible(folder)}: {visible(why)}" for folder, why in read.not_read[:8]]
    lines += [f"  … and {len(read.not_read) - 8:,} more"] if len(read.not_read) > 8 else []
    found = "\n".join(["What lies there:", *lines]) if lines else "It is empty."
    raise InputError(f"report.folder: there is no run of lorafit.train in or below {str(root)!r}. {found}")


def study(read: Found, *, metric: str, kept: float) -> dict[str, Any]:
    """What report.json holds. InputError where no run has the metric."""
    found = weigh(read.runs, metric=metric, kept=kept)
    runs = [
        {
            "folder": run.folder,
            "overrides": run.overrides,
            "status": run.status,
            "error": run.error,
            "settings": {key: run.settings[key] for key in found["varied"] if key in run.settings},
            "before": run.before or None,
            "after": run.after or None,
            "retention": run.retention or None,
            **{key: run.numbers.get(key) for key in _NUMBERS},
            "rungs": run.rungs or None,
            "config_sha256": run.config_sha256,
            "pareto": found["pareto"].get(run.folder),
        }
        for run in read.runs
    ]
    not_read = [{"folder": folder, "reason": why} for folder, why in read.not_read]
    return {"runs": runs, **found, "not_read": not_read}


# --------------------------------------------------------------------------------------------------------------- as csv


def report_csv(runs: Sequence[Run], found: Mapping[str, Any]) -> str:
    """A row for each run. Text that a spreadsheet would compute with is quoted, as it came from somebody's files."""
    metrics = list(dict.fromkeys(key for run in runs for key in run.after))
    bases = list(dict.fromkeys(key for run in runs for key in run.before))
    numbers = [key for key in _NUMBERS if key not in found["varied"]]
    heads = [
        "folder",
        "status",
        *found["varied"],
        *(f"before.{key}" for key in bases),
        *(f"after.{key}" for key in metrics),
    ]
    chosen = found["recommended"]
    rows: list[list[Any]] = [[*heads, *numbers, "recommended", "error"]]
    for run in runs:
        rows.append(
            [
                *(run.folder, run.status),
                *(run.settings.get(key) for key in found["varied"]),
                *(run.before.get(key) for key in bases),
                *(run.after.get(key) for key in metrics),
                *(run.numbers.get(key) for key in numbers),
                "yes" if chosen and chosen["folder"] == run.folder else "no",
                run.error,
            ]
        )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(_harmless, rows))
    return text.getvalue()


def _harmless(row: Iterable[Any]) -> list[Any]:
    return [f"'{cell}" if isinstance(cell, str) and cell[:1] in tuple("=+-@\t\r\n") and cell else cell for cell in row]


# -------------------------------------------------------------------------------------------------------- in a terminal


def report_tables(runs: Sequence[Run], found: Mapping[str, Any]) -> list[Any]:
    """What a report found, for the terminal."""
    from rich.table import Table
    from rich.text import Text

    from lorafit.terminal import human, number, shorten, visible

    def words(text: object, width: int = 60) -> Text:
        return Text(shorten(visible(str(text)), width))

    varied, metrics = found["varied"], shown_metrics(runs)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("run", *map(name_of, varied)) if not varied else map(name_of, varied):
        table.add_column(words(head))
    table.add_column("status")
    for head in (*metrics, "parameters", "memory", "seconds"):
        table.add_column(words(head.replace("_", " ")), justify="right")
    table.add_column()
    for run in runs:
        chosen = bool(found["recommended"]) and run.folder == found["recommended"]["folder"]
        named = [words(value_of(key, run.settings[key]) if key in run.settings else "–", 30) for key in varied]
        peak, seconds = run.numbers.get("peak_bytes"), run.numbers.get("train_seconds")
        parameters = run.numbers.get("parameters_trainable")
        table.add_row(
            *(named or [words(run.folder)]),
            Text(spelled(run.status), style=_STYLES[run.status]),
            *(number(run.after.get(key)) for key in metrics),
            "–" if parameters is None else f"{parameters:,}",
            "–" if peak is None else human(peak),
            "–" if seconds is None else f"{seconds:,.1f}",
            "recommended" if chosen else "",
            style="bold" if chosen else None,
        )
    parts: list[Any] = [words(summary(runs, found), 400), "", table, ""]
    parts += [Text(visible(text), style="bold red") for text in found["warnings"]]
    parts.append(Text(visible(found["sentence"])))
    if found["recommended"] and found["recommended"]["command"]:
        parts.append(Text(f"  {found['recommended']['command']}", style="bold", no_wrap=True))
    parts += [Text(visible(steps["sentence"])) for steps in found["ladder"]]
    unfinished = [run for run in runs if run.error and run.status != "completed"]
    for run in unfinished[:8]:
        looked = f" (held-out loss {run.rungs[max(run.rungs)]:.4g} there)" if run.rungs else ""
        parts.append(Text(f"  {visible(run.folder)}: {shorten(visible(run.error or ''), 200)}{looked}"))
    if len(unfinished) > 8:
        parts.append(Text(f"  … and {len(unfinished) - 8:,} more that did not end, see the page"))
    if found["not_read"]:
        parts.append(Text("Not read:"))
        parts += [Text(f"  {visible(item['folder'])}: {visible(item['reason'])}") for item in found["not_read"][:8]]
        if len(found["not_read"]) > 8:
            parts.append(Text(f"  … and {len(found['not_read']) - 8:,} more, see the page"))
    return parts


_STYLES = {
    "completed": "green",
    "interrupted": "yellow",
    "diverged": "red",
    "out_of_memory": "red",
    "failed": "red",
}


if __name__ == "__main__":
    main()
