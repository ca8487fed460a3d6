"""The project's workspace in Weights & Biases: which rank, over which base, at what price.

    python scripts/dashboard.py                              every run of the project lorafit
    python scripts/dashboard.py --entity TEAM --group ranks  the runs of one sweep
    python scripts/dashboard.py --dry-run workspace.json     its JSON, without a key and without a network

A new view is saved, and its address printed. Every chart is made of what runs of `lorafit.train` log; it stays empty
for what a run was told not to (`callbacks.norms_every_n_steps=null`). Needs `pip install 'lorafit[dashboard]'` and a
key (`wandb login`); exit code 2 where either is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

STEP = "trainer/global_step"
PARTS = ("weights", "quant_state", "adapter", "gradient", "optimizer", "optimizer_paged")
NEEDED = "dashboard: wandb-workspaces is not installed. pip install 'lorafit[dashboard]'"
NO_KEY = "dashboard: no W&B key is known here. Run `wandb login`, or use --dry-run"


def build(project: str, entity: str, *, group: str | None = None, name: str = "lorafit") -> Workspace:
    """The workspace, of the runs of one group or of all; nothing is asked of a server."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces
    from wandb_workspaces.reports.v2 import (
        BarPlot,
        Config,
        LinePlot,
        ParallelCoordinatesPlot,
        ParallelCoordinatesPlotColumn,
        RunComparer,
        ScatterPlot,
        SummaryMetric,
    )

    def scatter(title: str, x: Any, y: str, **options: Any) -> ScatterPlot:
        return ScatterPlot(title=title, x=x, y=SummaryMetric(y), **options)

    def curve(title: str, *keys: str, **options: Any) -> LinePlot:
        return LinePlot(title=title, x=STEP, y=list(keys), **options)

    def axis(label: str, metric: Any, log: bool = False) -> ParallelCoordinatesPlotColumn:
        return ParallelCoordinatesPlotColumn(metric=metric, display_name=label, log=log)

    rank = Config("rank")
    sections = {
        "Which rank": [
            scatter("Held-out loss against rank", rank, "after/loss", log_x=True),
            scatter(
                "Held-out loss against trainable parameters",
                SummaryMetric("parameters_trainable"),
                "after/loss",
                log_x=True,
            ),
            scatter("Other text: divergence from the base against rank", rank, "retention/kl", log_x=True),
            scatter("Seconds of training against rank", rank, "speed/train_seconds"),
            ParallelCoordinatesPlot(
                title="What the settings lead to",
                columns=[
                    axis("rank", rank, log=True),
                    axis("alpha", Config("alpha"), log=True),
                    axis("learning rate", Config("optimizer.lr"), log=True),
                    axis("quant", SummaryMetric("quant")),
                    axis("parameters", SummaryMetric("parameters_trainable"), log=True),
                    axis("held-out loss", SummaryMetric("after/loss")),
                ],
            ),
        ],
        "Learning": [
            curve("Training loss, by rank", "train/loss", groupby=rank),
            curve("Held-out loss, by rank", "eval/loss", groupby=rank),
            curve("Training loss", "train/loss", smoothing_type="exponentialTimeWeighted", smoothing_factor=0.6),
            curve("Held-out loss", "eval/loss"),
            curve("Norm of the gradient", "train/gradient_norm", log_y=True),
            curve("Learning rate", "train/learning_rate"),
        ],
        "Layers": [
            LinePlot(title="Norm of A", x=STEP, metric_regex="norm/A/.*"),
            LinePlot(title="Norm of B", x=STEP, metric_regex="norm/B/.*"),
            LinePlot(title="Norm of the update", x=STEP, metric_regex="norm/update/.*"),
        ],
        "Memory and speed": [
            scatter("Peak memory against rank", rank, "memory/peak_bytes"),
            BarPlot(title="Peak memory by quantization", metrics=["memory/peak_bytes"], groupby=Config("quant.type")),
            BarPlot(title="Weights by quantization", metrics=["memory/weights_bytes"], groupby=Config("quant.type")),
            curve("Memory by part", *(f"memory/{part}_bytes" for part in PARTS)),
            curve("Peak memory", "memory/peak_bytes"),
            curve("Tokens per second", "train/tokens_per_second", "train/supervised_tokens_per_second"),
        ],
        "Answers and labels": [
            reports.WeavePanelSummaryTable(table_name="samples"),
            reports.WeavePanelSummaryTable(table_name="labels"),
        ],
        "Runs beside each other": [RunComparer(diff_only="split")],
    }
    columns = ("summary:status", "config:rank", "summary:quant", "summary:parameters_trainable", "summary:after/loss")
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(name=title, panels=panels, is_open=number < 4)
            for number, (title, panels) in enumerate(sections.items())
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP, max_runs=50),
        runset_settings=workspaces.RunsetSettings(
            filters=[expr.Metric("Group") == group] if group else [],
            order=[expr.Ordering(expr.Summary("after/loss"), ascending=True)],
            pinned_columns=["run:displayName", *columns],
        ),
    )


def to_json(workspace: Workspace) -> dict[str, Any]:
    """The workspace as it is sent to the server."""
    return workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", help="the user or team whose project it is; default: $WANDB_ENTITY, or your own")
    parser.add_argument("--project", default="lorafit")
    parser.add_argument("--group", help="show only the runs of this group: a sweep")
    parser.add_argument("--name", help="of the view; default: the group's, or lorafit")
    parser.add_argument(
        "--dry-run", nargs="?", const="-", metavar="FILE", help="write its JSON there, and save nothing"
    )
    options = parser.parse_args(argv)
    os.environ.setdefault("WANDB_SILENT", "true")
    entity = options.entity or os.environ.get("WANDB_ENTITY")
    if options.dry_run is None:
        entity = log_in(entity)
    try:
        workspace = build(
            options.project, entity or "ENTITY", group=options.group, name=options.name or options.group or "lorafit"
        )
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("wandb", "wandb_workspaces"):
            raise
        end(NEEDED)
    if options.dry_run is None:
        print(workspace.save_as_new_view().url)
        return
    text = json.dumps(to_json(workspace), indent=2) + "\n"
    if options.dry_run == "-":
        print(text, end="")
    else:
        try:
            Path(options.dry_run).write_text(text)
        except OSError as error:
            end(f"dashboard: {options.dry_run!r} cannot be written ({error.strerror})")


def log_in(entity: str | None) -> str:
    """The entity that is meant, the user's own where none is named; ends the program where no key is known."""
    import wandb

    os.environ["WANDB_MODE"] = "online"  # whatever is set for runs
    if not wandb.login(prompt=False):
        end(NO_KEY)
    return entity or wandb.Api().default_entity


def end(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
