"""Checkpoints: written whole, read back as they were written or not at all, and nothing of them runs.

pytest tests/test_checkpoint.py
"""

from __future__ import annotations

import errno
import os
import pickle
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch

from lorafit.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    Unfit,
    device_random_state,
    load_checkpoint,
    load_run,
    newest_checkpoint,
    random_state,
    require_counts,
    require_like,
    save_checkpoint,
    set_device_random_state,
    set_random_state,
)
from lorafit.errors import InputError
from lorafit.files import clear_drafts, write_atomically


def state(step: int = 3, **more: Any) -> dict[str, Any]:
    return {
        "global_step": step,
        "state_dict": {"layer.lora_A.weight": torch.arange(12.0).view(3, 4)},
        "loops": {},
        "optimizer_states": [],
        "random_state": random_state(),
    } | more


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / LAST, state(5))
    found = load_checkpoint(tmp_path / LAST)
    assert found["global_step"] == 5 and torch.equal(
        found["state_dict"]["layer.lora_A.weight"].flatten(), torch.arange(12.0)
    )
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


def test_the_checkpoint_before_stays_beside_the_last(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / LAST, state(step), keep=tmp_path / PREVIOUS)
    assert load_checkpoint(tmp_path / LAST)["global_step"] == 3
    assert load_checkpoint(tmp_path / PREVIOUS)["global_step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, PREVIOUS]


@pytest.mark.parametrize("links", [True, False], ids=["with links", "without"])
def test_at_every_moment_of_writing_one_whole_checkpoint_is_there(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of the writer that changes the folder is made the last one before a kill."""
    save_checkpoint(tmp_path / LAST, state(1))
    save_checkpoint(tmp_path / LAST, state(2), keep=tmp_path / PREVIOUS)

    class Killed(BaseException):
        pass

    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    real = {name: getattr(os, name) for name in ("replace", "link")}
    if not links:
        real["link"] = no_links
    written = 2
    for at in range(6):
        count = iter(range(100))

        def dies(name: str, count: Iterator[int] = count, at: int = at) -> Any:
            def call(*arguments: Any) -> None:
                if next(count) == at:
                    raise Killed
                real[name](*arguments)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, dies(name))
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # nor does anybody clean up
            try:
                save_checkpoint(tmp_path / LAST, state(3 + at), keep=tmp_path / PREVIOUS)
                written = 3 + at
            except Killed:
                pass
        found = newest_checkpoint(tmp_path)
        assert found is not None and not found.damaged and found.step >= written
    assert written == 8  # in the end it was not killed


def test_any_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """PyTorch itself does not look at the checksums in its archives: most of these it reads as other weights."""
    path, whole = tmp_path / LAST, state(7)
    save_checkpoint(path, whole)
    content = path.read_bytes()
    rng = random.Random(0)
    refused = unseen = 0
    for _ in range(400):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except InputError as error:
            refused += 1
            assert "cannot be read as a checkpoint" in str(error) and "\n" not in str(error)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("lorafit.checkpoint._require_whole", lambda path: None)
                try:
                    load_checkpoint(path)
                    unseen += 1
                except InputError:
                    pass
            continue
        assert found["global_step"] == 7  # in the padding between the parts
        assert torch.equal(found["state_dict"]["layer.lora_A.weight"], whole["state_dict"]["layer.lora_A.weight"])
        assert torch.equal(found["random_state"]["torch"], whole["random_state"]["torch"])
    print(f"400 flipped bits: {refused} refused, of which PyTorch alone reads {unseen}")
    assert refused > 250 and unseen > 100


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_checkpoint_that_is_cut_off_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / LAST
    save_checkpoint(path, state())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="cut off or damaged"):
        load_checkpoint(path)


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("how", ["pickle", "archive", "nested", "reduce in a tensor's place"])
def test_a_checkpoint_that_would_run_code_does_not(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / LAST
    if how == "pickle":
        path.write_bytes(pickle.dumps(state(extra=Canary())))
    elif how == "archive":
        torch.save(state(extra=Canary()), path)
    elif how == "nested":
        torch.save(state(loops={"fit_loop": [{"x": Canary()}]}), path)
    else:
        torch.save(state(state_dict={"layer.lora_A.weight": Canary()}), path)
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / LAST
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(InputError, match="it is compressed"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "broken",
    [[1, 2], {}, {"global_step": "3"}, {"global_step": True}, {"global_step": -1}, {"global_step": 2**60}]
    + [{key: None} for key in ("state_dict", "loops", "optimizer_states", "random_state")],
    ids=str,
)
def test_a_checkpoint_without_its_parts_is_refused(broken: Any, tmp_path: Path) -> None:
    torch.save(state() | broken if isinstance(broken, dict) and broken else broken, tmp_path / LAST)
    with pytest.raises(InputError, match="remove it to begin anew"):
        load_run(tmp_path / LAST)


def test_a_checkpoint_that_is_of_another_step_than_its_loops_is_refused(tmp_path: Path) -> None:
    """Curves would be cut off at the one, and the training go on at the other."""
    progress = {"optimizer": {"step": {"total": {"ready": 3, "completed": 3}}}}
    loops = {"fit_loop": {"epoch_loop.automatic_optimization.optim_progress": progress}}
    torch.save(state() | {"loops": loops, "global_step": 3}, tmp_path / LAST)
    assert load_run(tmp_path / LAST)["global_step"] == 3
    torch.save(state() | {"loops": loops, "global_step": 2}, tmp_path / LAST)
    with pytest.raises(InputError, match="said to be of step 2, and its loops are not"):
        load_run(tmp_path / LAST)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / LAST
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(InputError, match="no regular file"):
        load_checkpoint(path)


def test_of_damaged_checkpoints_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for name, step in ((LAST, 9), (PREVIOUS, 8), (BEST, 4)):
        save_checkpoint(tmp_path / name, state(step))
    for name, left in ((LAST, 8), (PREVIOUS, 4)):
        (tmp_path / name).write_bytes(b"half of it")
        found = newest_checkpoint(tmp_path)
        assert found is not None and found.step == left and tmp_path / name in found.damaged
    (tmp_path / BEST).write_bytes(b"")
    with pytest.raises(InputError) as caught:
        newest_checkpoint(tmp_path)
    assert [str(tmp_path / name) in str(caught.value) for name in (LAST, PREVIOUS, BEST)] == [True] * 3


def test_a_full_disk_is_told_as_such_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / LAST, state(1))

    class Full:
        """A file that takes a hundred bytes."""

        def __init__(self, file: IO[bytes]) -> None:
            self.file, self.taken = file, 0

        def write(self, data: Any) -> int:
            self.taken += len(data)
            if self.taken > 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    real = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda *arguments: Full(real(*arguments)))
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(tmp_path / LAST, state(2), keep=tmp_path / PREVIOUS)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [LAST]
    assert load_checkpoint(tmp_path / LAST)["global_step"] == 1


def test_what_a_killed_writer_left_is_taken_away_and_nothing_else(tmp_path: Path) -> None:
    for name in (".last.ckpt-a1b2.draft", ".previous.ckpt.draft", "last.ckpt", "best.ckpt", ".notes-of-mine"):
        (tmp_path / name).touch()
    clear_drafts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes-of-mine", "best.ckpt", "last.ckpt"]
    write_atomically(tmp_path / "a", lambda file: file.write(b"b"))
    assert (tmp_path / "a").read_bytes() == b"b"


def test_all_generators_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]

    draw()
    before = random_state()
    drawn = [draw() for _ in range(3)]
    set_random_state(before)
    assert [draw() for _ in range(3)] == drawn
    # in a file of ours it stands by itself; PyTorch dies of one that does not
    inside = torch.cat((torch.zeros(5056, dtype=torch.uint8), before["torch"]))[5056:]
    set_random_state(before | {"torch": inside})
    assert [draw() for _ in range(3)] == drawn


def test_every_process_of_a_group_has_its_own_generators() -> None:
    device = torch.device("cpu")
    states = torch.stack([device_random_state(device), torch.zeros_like(device_random_state(device))])
    torch.manual_seed(9)
    states[1] = device_random_state(device)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    set_device_random_state(states[1], device)
    assert torch.equal(torch.rand(3), drawn)


def test_pieces_of_a_checkpoint_are_of_the_kind_they_should_be() -> None:
    own = {"loss": 1.5, "steps": 3, "parts": {}, "name": "x", "anything": None, "flags": [1]}
    good = {
        "loss": 2,
        "steps": 4.0,
        "parts": {"weights": 3},
        "name": "y",
        "anything": {"a": []},
        "flags": [],
        "more": 1,
    }
    require_like(good, own, "callback")
    for key, value in (
        *(("loss", "1"), ("loss", None), ("loss", True), ("steps", []), ("parts", 3), ("parts", {"weights": "3"})),
        *(("parts", {1: 2}), ("name", 3), ("flags", "1")),
    ):
        with pytest.raises(Unfit, match=f"callback.{key}"):
            require_like(good | {key: value}, own, "callback")
    with pytest.raises(Unfit, match="callback lacks 'loss'"):
        require_like({key: good[key] for key in good if key != "loss"}, own, "callback")
    require_counts({"a": {"b": [1, 2, True]}, "c": 0}, "loops")
    for wrong in (-1, 1.5, "1", None, 2**60, torch.ones(())):
        with pytest.raises(Unfit, match=r"loops.a.b is"):
            require_counts({"a": {"b": [1, wrong]}}, "loops")
