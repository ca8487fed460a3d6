"""The callback that writes checkpoints: when it does, when it does not, and what a disk that fails costs.

pytest tests/test_checkpoints.py
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_callbacks import Each, fit, module

from lorafit.callbacks import Checkpoints
from lorafit.checkpoint import load_checkpoint
from lorafit.trainer import quiet_libraries


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_libraries()


def step_of(path: Path) -> int:
    return int(load_checkpoint(path)["global_step"])


def test_the_last_and_the_one_before_are_kept_and_say_what_run_they_are_of(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every_n_steps=1, identity={"settings": {"rank": 4}})
    fit(module(), tmp_path, checkpoints, max_steps=3)
    assert (step_of(checkpoints.last), step_of(checkpoints.previous)) == (3, 2)
    assert load_checkpoint(checkpoints.last)["run"] == {"settings": {"rank": 4}}


def test_a_checkpoint_written_anew_for_its_validation_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, every_n_steps=1)
    fit(module(), tmp_path, checkpoints, max_steps=3, val_check_interval=1)
    assert (step_of(checkpoints.last), step_of(checkpoints.previous)) == (3, 2)
    assert load_checkpoint(checkpoints.last)["callbacks"]["Checkpoints"]["validated_step"] == 3


def test_no_checkpoint_is_written_after_a_step_that_was_skipped(tmp_path: Path) -> None:
    finite = SimpleNamespace(skipped_in_a_row=0)

    def skip(trainer: Any, _: Any) -> None:
        finite.skipped_in_a_row = int(trainer.global_step >= 2)

    checkpoints = Checkpoints(tmp_path, every_n_steps=1, finite=finite)
    fit(module(), tmp_path, Each(skip), checkpoints, max_steps=4, val_check_interval=2)
    assert step_of(checkpoints.last) == 1 and not checkpoints.previous.exists()


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(tmp_path: Path) -> None:
    def overflow(trainer: Any, made: Any) -> None:
        if trainer.global_step == 3:
            made.trainable_parameters()[0].data[0, 0] = float("inf")

    checkpoints = Checkpoints(tmp_path, every_n_steps=1)
    fit(module(), tmp_path, Each(overflow), checkpoints, max_steps=3)
    assert step_of(checkpoints.last) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_costs_checkpoints_and_not_the_run(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second to the fourth step nothing can be written."""
    real, step = torch.save, [0]

    def save(state: Any, file: Any) -> None:
        if 2 <= state["global_step"] <= 4:
            file.write(b"some of it")
            raise OSError(number, os.strerror(number))
        real(state, file)

    def note(trainer: Any, _: Any) -> None:
        step[0] = trainer.global_step
        failing = 2 <= step[0] <= 4
        assert (checkpoints.failed is not None) == failing
        assert step_of(checkpoints.last) == (1 if failing else step[0])

    monkeypatch.setattr(torch, "save", save)
    checkpoints = Checkpoints(tmp_path, every_n_steps=1)
    with caplog.at_level(logging.WARNING, "lorafit"):
        fit(module(), tmp_path, checkpoints, Each(note), max_steps=6)
    assert step[0] == 6
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2  # once when it began, once when it was over
    assert "the checkpoint of step 2 cannot be written" in said[0] and os.strerror(number) in said[0]
    assert "the checkpoint of step 5 is written again" in said[1]
    assert (step_of(checkpoints.last), step_of(checkpoints.previous)) == (6, 5)
    assert not list(tmp_path.glob(".*"))


def test_a_best_checkpoint_that_cannot_be_copied_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lorafit.files.shutil.copyfileobj", full)
    checkpoints = Checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING, "lorafit"):
        fit(module(), tmp_path, checkpoints, max_steps=2, val_check_interval=1)
    assert "best.ckpt cannot be written (No space left on device)" in caplog.text
    assert step_of(checkpoints.last) == 2 and not checkpoints.best.exists()


@pytest.mark.parametrize(
    ("last", "previous", "good"),
    [(3, 2, 3), (4, 3, 3), (4, None, None)],
    ids=["the step after it was fine", "its own weights gave the bad step", "and there is none before it"],
)
def test_after_divergence_the_last_checkpoint_is_one_whose_next_step_was_finite(
    last: int, previous: int | None, good: int | None, tmp_path: Path
) -> None:
    """Step 5 was the first that was not finite."""
    checkpoints = Checkpoints(tmp_path)
    for path, step in ((checkpoints.last, last), (checkpoints.previous, previous)):
        if step is not None:
            rest = {"state_dict": {}, "loops": {}, "optimizer_states": [], "random_state": {}}
            torch.save({"global_step": step} | rest, path)
    kept = checkpoints.keep_good(bad_from=5)
    assert kept == (None if good is None else (checkpoints.last, good))
    assert kept is None or step_of(checkpoints.last) == good
    assert (tmp_path / "diverged.ckpt").exists() == (last == 4)


def test_after_divergence_a_full_disk_hides_no_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = {"state_dict": {}, "loops": {}, "optimizer_states": [], "random_state": {}}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lorafit.files.write_atomically", full)
    checkpoints = Checkpoints(tmp_path)
    torch.save({"global_step": 4} | rest, checkpoints.last)
    torch.save({"global_step": 3} | rest, checkpoints.best)
    assert checkpoints.keep_good(bad_from=5) == (checkpoints.best, 3)
    torch.save({"global_step": 2} | rest, checkpoints.previous)
    assert checkpoints.keep_good(bad_from=5) == (checkpoints.last, 2)


def test_after_divergence_a_best_checkpoint_is_good_if_its_next_step_was_and_a_damaged_one_is_left(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(tmp_path)
    rest = {"state_dict": {}, "loops": {}, "optimizer_states": [], "random_state": {}}
    torch.save({"global_step": 4} | rest, checkpoints.last)
    checkpoints.previous.write_bytes(b"half")
    torch.save({"global_step": 2} | rest, checkpoints.best)
    assert checkpoints.keep_good(bad_from=5) == (checkpoints.last, 2)
    torch.save({"global_step": 4} | rest, checkpoints.last)
    torch.save({"global_step": 4} | rest, checkpoints.best)
    assert checkpoints.keep_good(bad_from=5) is None  # and none is left that resume would take for good
    assert not checkpoints.last.exists() and not checkpoints.best.exists()


def test_after_divergence_neither_is_the_best_one_with_bad_steps_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    rest = {"state_dict": {}, "loops": {}, "optimizer_states": [], "random_state": {}}

    def write() -> None:
        for path, step in ((checkpoints.last, 4), (checkpoints.previous, 3), (checkpoints.best, 4)):
            torch.save({"global_step": step} | rest, path)

    write()
    assert checkpoints.keep_good(bad_from=5) == (checkpoints.last, 3)
    assert not checkpoints.best.exists() and step_of(tmp_path / "diverged.ckpt") == 4

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    write()
    monkeypatch.setattr(os, "replace", refuse)
    with caplog.at_level(logging.WARNING, "lorafit"):
        assert checkpoints.keep_good(bad_from=5) == (checkpoints.previous, 3)
    assert f"{checkpoints.last} is not to be gone on from: remove it (Read-only file system)" in caplog.text
