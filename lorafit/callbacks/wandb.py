"""Weights & Biases: one run a job, offline unless asked otherwise, and never a question on the terminal.

The run is made here rather than by Lightning's logger, which in a sweep would go on writing into the first job's run;
`WandbLogger` is then given it. Whoever opens a run closes it (`finish`), also when training fails.
Everything is written below the job's own folder; `wandb sync` brings it to a server later.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from lorafit.errors import InputError


@contextlib.contextmanager
def wandb_logger(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    mode: str = "offline",
    project: str = "lorafit",
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    job_type: str = "train",
) -> Iterator[WandbLogger]:
    """A Lightning logger over a new run in `folder`/wandb, finished on leaving: with exit code 1 after an error.

    Raises InputError when mode is "online" and no key is known, instead of asking for one.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    # artifacts and caches stay beside the run, so that the folder can be moved to another machine and synced there
    data = Path(folder).resolve() / "wandb"
    data.mkdir(parents=True, exist_ok=True)
    os.environ["WANDB_DATA_DIR"] = str(data)
    import wandb

    if mode == "online" and not wandb.login(prompt=False):
        raise InputError("logger.mode=online: no W&B key is known here. Run `wandb login`, or use logger.mode=offline")
    run = wandb.init(
        project=project,
        name=name,
        group=group,
        tags=list(tags),
        job_type=job_type,
        config=dict(config),
        dir=folder,
        mode=mode,  # type: ignore[arg-type]
        reinit="create_new",
        settings=wandb.Settings(console="off", silent=True),
    )
    exit_code = 1
    try:
        yield WandbLogger(experiment=run)
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)
