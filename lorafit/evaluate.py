"""Measure an adapter: the held-out rows with it and without it, and what it did to other text.

    python -m lorafit.evaluate adapter=RUN/adapter                            on the rows that its training held out
    python -m lorafit.evaluate adapter=RUN/adapter data.eval_path=FILE        on others
    python -m lorafit.evaluate 'adapter=[A,B]'                                several, over one base in one process

The numbers are those that training measures, made by the same functions.

Leaves evaluate.json and samples.jsonl. Exit codes: 0 done, 2 wrong input, 3 an adapter under which the loss is
not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.build import adapter_folders, build_data, load_base, refuse_foreign
from lorafit.config import Config
from lorafit.errors import DivergedError
from lorafit.launch import start
from lorafit.measuring import measure, retention_text
from lorafit.results import write_samples

if TYPE_CHECKING:
    from rich.table import Table


def main() -> None:
    start("evaluate", run)


def run(config: Config, folder: Path) -> None:
    """Measure the base and each adapter; print a table, write evaluate.json and samples.jsonl."""
    from lorafit.files import write_json
    from lorafit.retention import measure_retention
    from lorafit.serving import Adapters
    from lorafit.tables import samples_table
    from lorafit.terminal import console
    from lorafit.trainer import quiet_libraries

    refuse_foreign(config, "evaluate")
    quiet_libraries()
    folders = adapter_folders(config)
    data = build_data(config)
    data.setup()
    other_text = retention_text(config, data)
    model = load_base(config).eval()
    data.check_vocabulary(model.get_input_embeddings().num_embeddings)
    adapters = Adapters(model)
    for name, place in folders.items():  # all of them first: one that does not fit is known before anything is measured
        adapters.load(name, place, allow_other_base=config.allow_other_base)

    off, answers_off = measure(config, data, model)
    measured: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[str]] = {}
    for name in folders:
        adapters.use(name)
        numbers, answers[name] = measure(config, data, model)
        measured[name] = numbers | {"retention": measure_retention(model, other_text)}

    first = next(iter(folders))
    result = {
        "adapter_off": off,
        "adapter_on": {key: value for key, value in measured[first].items() if key != "retention"},
        "retention": measured[first]["retention"],
        "adapter": first,
        "eval_examples": len(data.eval_examples),
    }
    if len(folders) > 1:
        result["adapters"] = measured
    write_json(folder / "evaluate.json", result)
    samples: list[dict[str, Any]] = []
    for row, (example, before) in enumerate(zip(data.eval_examples, answers_off, strict=False)):
        sample = {"prompt": example.prompt, "before": before, "after": answers[first][row]}
        sample["reference"] = example.completion
        samples.append(sample if len(folders) == 1 else sample | {"adapters": _of_row(answers, row)})
    write_samples(folder / "samples.jsonl", samples)
    terminal = console()
    terminal.print(evaluation_table(off, measured, result["eval_examples"]))
    if samples and config.task.samples:
        terminal.print(samples_table(samples[: config.task.samples]))
    if lost := [name for name, numbers in measured.items() if not math.isfinite(numbers["loss"])]:
        raise DivergedError(
            f"with {', '.join(lost)} the held-out loss is not finite, so the numbers of it say nothing"
            + ("" if math.isfinite(off["loss"]) else ": nor is it without an adapter, so that the base is at fault")
        )


def _of_row(answers: Mapping[str, Sequence[str]], row: int) -> dict[str, str]:
    return {name: texts[row] for name, texts in answers.items()}


def evaluation_table(off: Mapping[str, float], measured: Mapping[str, Mapping[str, Any]], rows: int) -> Table:
    """The numbers without an adapter and with each."""
    from rich.markup import escape
    from rich.table import Table

    from lorafit.terminal import number, visible

    table = Table(title=f"on {rows:,} held-out rows", title_justify="left")
    table.add_column("")
    for name in ("adapter off", *(measured if len(measured) > 1 else ["adapter on"])):
        table.add_column(escape(visible(name)), justify="right", overflow="fold")
    for key in off:
        table.add_row(key.replace("_", " "), number(off[key]), *(number(numbers[key]) for numbers in measured.values()))
    kept = [numbers["retention"] for numbers in measured.values()]
    table.add_row(
        "perplexity of other text",
        number(kept[0]["perplexity_adapter_off"]),
        *(number(numbers["perplexity_adapter_on"]) for numbers in kept),
    )
    table.add_row("KL from the base on it", "", *(number(numbers["kl"]) for numbers in kept))
    return table


if __name__ == "__main__":
    main()
