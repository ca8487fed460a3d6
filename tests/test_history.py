"""history.jsonl: every number of a run, at the step that it belongs to, also where the run was stopped and went on.

pytest tests/test_history.py
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from hypothesis import given, settings, strategies as st
from test_callbacks import SEQUENCES, Each, fit, module

from lorafit.callbacks import Checkpoints, History, StepMetrics, history_rows
from lorafit.checkpoint import newest_checkpoint
from lorafit.data import ResumableLoader
from lorafit.datamodule import FinetuneDataModule
from lorafit.errors import Paused
from lorafit.trainer import build_trainer, quiet_libraries

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_libraries()


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def points(folder: Path, key: str) -> dict[int, float]:
    """What was logged under a key, by step."""
    found = [(row["step"], row[key]) for row in read(folder) if key in row]
    assert len(dict(found)) == len(found)  # no step twice
    return dict(found)


# ------------------------------------------------------------------------------------------------------- the file


def test_each_point_is_a_line_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    history = History(tmp_path)
    assert not (tmp_path / "history.jsonl").exists()
    for step, metrics in enumerate(({"train/loss": 2.5, "epoch": 0}, {"eval/loss": 1}, {"norm/A/q": 0.1}), start=1):
        history.log_metrics(metrics, step=step)
        assert len(read(tmp_path)) == step
    assert read(tmp_path) == [
        {"step": 1, "train/loss": 2.5},
        {"step": 2, "eval/loss": 1.0},
        {"step": 3, "norm/A/q": 0.1},
    ]


@given(st.lists(st.dictionaries(st.text(max_size=6), st.floats(), max_size=3), max_size=6))
@settings(max_examples=30, deadline=None)
def test_numbers_come_back_as_they_were_and_those_that_are_none_as_null(
    tmp_path_factory: pytest.TempPathFactory, logged: list[dict[str, float]]
) -> None:
    folder = tmp_path_factory.mktemp("history")
    history = History(folder)
    logged = [{key: value for key, value in row.items() if key not in ("step", "epoch")} for row in logged]
    for step, row in enumerate(logged):
        history.log_metrics(row, step=step)
    expected = [
        {"step": step} | {key: value if math.isfinite(value) else None for key, value in row.items()}
        for step, row in enumerate(logged)
    ]
    assert history_rows(folder, len(logged)) == expected
    if logged:
        for line in (folder / "history.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)  # of what JSON does not know


def write(folder: Path, *lines: str) -> None:
    (folder / "history.jsonl").write_text("\n".join(lines))


ROWS = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0}, {"step": 2, "eval/loss": 2.5}, {"step": 3}]


@pytest.mark.parametrize("until", range(5))
def test_the_points_after_a_checkpoint_are_cut_off(tmp_path: Path, until: int) -> None:
    write(tmp_path, *map(json.dumps, ROWS))
    assert history_rows(tmp_path, until) == [row for row in ROWS if row["step"] <= until]


def test_a_run_without_a_history_has_no_points(tmp_path: Path) -> None:
    assert history_rows(tmp_path, 9) == []
    assert history_rows(tmp_path / "nowhere", 9) == []


def test_what_a_resumed_run_lacks_of_its_curves_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lorafit"):
        history_rows(tmp_path, 0)  # nothing was logged before the first step
        write(tmp_path, json.dumps({"step": 10, "a": 1.0}), json.dumps({"step": 20, "a": 2.0})[:-3])
        history_rows(tmp_path, 15)  # and what comes after the checkpoint is logged again
        assert not caplog.messages
        history_rows(tmp_path, 20)
        history_rows(tmp_path / "nowhere", 20)
    cut, gone = caplog.messages
    assert "is cut off before step 20" in cut and "the curves begin at step 20" in gone


@pytest.mark.parametrize("length", range(len(json.dumps(ROWS[1]))))
def test_a_last_line_that_a_kill_has_cut_off_is_left_out(tmp_path: Path, length: int) -> None:
    write(tmp_path, json.dumps(ROWS[0]), json.dumps(ROWS[1])[:length])
    assert history_rows(tmp_path, 9) == ROWS[:1]


@pytest.mark.parametrize(
    "junk", ["[1, 2]", "null", "7", '"step"', "{}", '{"step": null}', '{"step": "2"}', '{"step": 9.5}']
)
def test_a_line_that_is_no_point_is_left_out_and_those_after_it_are_not(tmp_path: Path, junk: str) -> None:
    write(tmp_path, json.dumps(ROWS[0]), junk, json.dumps(ROWS[1]))
    assert history_rows(tmp_path, 9) == ROWS[:2]


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_bytes_give_points_and_no_error(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    folder = tmp_path_factory.mktemp("junk")
    (folder / "history.jsonl").write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + junk)
    rows = history_rows(folder, 9)
    assert all(isinstance(row, dict) and row["step"] <= 9 for row in rows)


def test_a_history_begins_with_the_points_that_it_is_given_when_it_has_one_of_its_own(tmp_path: Path) -> None:
    """Until then what an earlier run has left is there: a run that is stopped before its first step loses nothing."""
    write(tmp_path, *map(json.dumps, ROWS), '{"step": 4, "tr')
    history = History(tmp_path, history_rows(tmp_path, 2))
    assert (tmp_path / "history.jsonl").read_text().endswith('{"step": 4, "tr')
    history.log_metrics({"train/loss": 1.5}, step=3)
    assert read(tmp_path) == [*ROWS[:3], {"step": 3, "train/loss": 1.5}]
    history.log_metrics({"train/loss": 1.0}, step=4)
    assert read(tmp_path) == [*ROWS[:3], {"step": 3, "train/loss": 1.5}, {"step": 4, "train/loss": 1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


def test_a_history_without_points_of_its_own_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, *map(json.dumps, ROWS))
    History(tmp_path).log_metrics({"train/loss": 9.0}, step=1)
    assert read(tmp_path) == [{"step": 1, "train/loss": 9.0}]


# ------------------------------------------------------------------------------------------ in a run that goes on


def test_every_step_and_every_validation_is_logged_where_it_was(tmp_path: Path) -> None:
    validated: list[int] = []
    seen = Each(validation=lambda trainer, module: validated.append(trainer.global_step))
    steps = StepMetrics(every_n_steps=1)
    trainer = fit(module(), tmp_path, steps, seen, logger=[History(tmp_path)], max_steps=6, val_check_interval=2)
    assert points(tmp_path, "train/loss") == pytest.approx(dict(steps.losses))
    assert set(points(tmp_path, "train/loss")) == {1, 2, 3, 4, 5, 6}
    evaluated = points(tmp_path, "eval/loss")
    assert list(evaluated) == validated == [2, 4, 6]
    assert evaluated[6] == float(trainer.callback_metrics["eval/loss"])
    for key in ("train/gradient_norm", "train/learning_rate", "train/tokens_per_second", "train/seconds"):
        assert set(points(tmp_path, key)) == {1, 2, 3, 4, 5, 6}


def test_only_every_nth_step_is_logged_and_the_first(tmp_path: Path) -> None:
    fit(module(), tmp_path, StepMetrics(every_n_steps=3), logger=[History(tmp_path)], max_steps=7)
    assert set(points(tmp_path, "train/loss")) == {1, 3, 6}


class Data(FinetuneDataModule):
    """Eight rows that nobody has to tokenize."""

    def __init__(self) -> None:
        L.LightningDataModule.__init__(self)

    def setup(self, stage: str | None = None) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(SEQUENCES, 2, pad_id=0)

    val_dataloader = eval_batches = train_dataloader  # type: ignore[assignment]


class StopAt(Each):
    """Ends a run at a step, with a checkpoint."""

    def __init__(self, checkpoints: Checkpoints, step: int) -> None:
        def stop(trainer: Any, _: Any) -> None:
            if trainer.global_step == step:
                checkpoints.save(trainer)
                raise Paused

        super().__init__(stop)


@pytest.mark.parametrize(
    ("interval", "number"), [(2, 2), (2, 3), (0.75, 1), (0.75, 2), (0.25, 4), (0.25, 5), (0.25, 12)]
)
def test_a_validation_that_is_made_once_more_is_logged_once(tmp_path: Path, interval: float, number: int) -> None:
    """The process is killed when a validation is logged and no checkpoint knows of it yet; then once more, at once.

    interval: in steps, or as a share of an epoch of four batches, two of which are a step."""
    options: dict[str, Any] = {"max_steps": 6, "accumulate_grad_batches": 2, "val_check_interval": interval}

    def live(folder: Path, *dies: L.Callback) -> None:
        home = folder / "checkpoints"
        found = newest_checkpoint(home) if home.is_dir() else None
        rows = history_rows(folder, found.step, found.validated) if found else []
        callbacks = (StepMetrics(1), *dies, Checkpoints(home, every_n_steps=1))
        trainer = build_trainer(
            folder, batches=4, accelerator="cpu", callbacks=list(callbacks), logger=[History(folder, rows)], **options
        )
        trainer.fit(module(), Data(), ckpt_path=str(found.path) if found else None)

    def logged(folder: Path) -> list[dict[str, Any]]:
        return [row for row in read(folder) if "eval/loss" in row]

    live(tmp_path / "whole")

    class Dies(L.Callback):
        """When a validation is logged, or before the first batch."""

        def __init__(self, at: int | None = None) -> None:
            self.at, self.seen = at, 0

        def on_validation_end(self, *_: Any) -> None:
            self.seen += 1
            if self.seen == self.at:
                raise Paused

        def on_train_batch_start(self, *_: Any) -> None:
            if self.at is None:
                raise Paused

    with pytest.raises(Paused):
        live(tmp_path / "killed", Dies(number))
    assert len(logged(tmp_path / "killed")) == number
    with contextlib.suppress(Paused):  # there is no batch where it had taken all of its steps
        live(tmp_path / "killed", Dies())
    live(tmp_path / "killed")
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")


@pytest.mark.parametrize("stop", [1, 2, 4, 5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_goes_on_counts_on_and_its_history_is_the_whole_one(
    tmp_path: Path, stop: int, accumulate: int
) -> None:
    options = {"max_steps": 6, "accumulate_grad_batches": accumulate}
    whole = StepMetrics(every_n_steps=1)
    fit(module(), tmp_path / "whole", whole, logger=[History(tmp_path / "whole")], **options)

    folder = tmp_path / "stopped"
    first, checkpoints = StepMetrics(every_n_steps=1), Checkpoints(folder / "checkpoints")
    callbacks = (first, checkpoints, StopAt(checkpoints, stop))
    with pytest.raises(Paused):
        fit(module(), folder, *callbacks, logger=[History(folder)], **options)
    assert first.steps == stop and set(points(folder, "train/loss")) == set(range(1, stop + 1))
    with (folder / "history.jsonl").open("a") as file:
        file.write(json.dumps({"step": stop + 1, "train/loss": 99.0}) + '\n{"step": 7')  # it went further before a kill

    second, checkpoints = StepMetrics(every_n_steps=1), Checkpoints(folder / "checkpoints")
    history = History(folder, history_rows(folder, stop))
    fit(module(), folder, second, checkpoints, logger=[history], resume=checkpoints.last, **options)
    for key in ("train/loss", "train/learning_rate", "train/gradient_norm"):
        assert points(folder, key) == points(tmp_path / "whole", key)
    assert (second.steps, second.tokens, second.supervised_tokens) == (6, whole.tokens, whole.supervised_tokens)
    assert len(first.losses) + len(second.losses) == 6  # those of one process are its own

    # time goes on as well: it grows with every step, and at the end is that of both processes
    seconds = points(folder, "train/seconds")
    assert list(seconds) == [1, 2, 3, 4, 5, 6] and list(seconds.values()) == sorted(seconds.values())
    assert second.seconds > first.seconds > 0
    assert second.totals()["steps"] == 6
    assert second.totals()["tokens_per_second"] == pytest.approx(whole.tokens / second.seconds, rel=1e-3)


def test_the_speed_of_a_step_after_going_on_is_that_of_the_step(tmp_path: Path) -> None:
    """Neither the tokens nor the time before it are counted a second time."""
    first, checkpoints = StepMetrics(every_n_steps=1), Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(Paused):
        fit(module(), tmp_path, first, checkpoints, StopAt(checkpoints, 3), logger=[History(tmp_path)])
    first.seconds += 1000.0  # as if those three had taken long
    state = first.state_dict()
    second = StepMetrics(every_n_steps=1)
    second.load_state_dict(state)
    history = History(tmp_path / "second")
    (tmp_path / "second").mkdir()
    fit(module(), tmp_path / "second", second, logger=[history], max_steps=1)
    [row] = read(tmp_path / "second")
    tokens, seconds = second.tokens - state["tokens"], row["train/seconds"] - state["seconds"]
    assert tokens > 0 and 0 < seconds < 1000 < row["train/seconds"]
    assert row["train/tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-6)
