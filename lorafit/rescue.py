"""What becomes of a run when the disk takes no more: it is told at once, and what was trained is not lost.

Training goes on without what cannot be written. At the end the adapter is tried twice, and then saved in the folder for
temporary files, which often is another disk; the run has failed all the same (`NotSaved`), since its folder lacks what
it is to hold. Before anything was trained such a disk is an `InputError`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lorafit.errors import InputError, NotSaved, reason
from lorafit.files import clear_drafts

log = logging.getLogger(__name__)

# what a run writes into its folder; in its own folders W&B makes links to its logs, and each run of it has a new one
_WRITTEN = (
    *("checkpoints", "adapter", "csv", ".hydra", "wandb", "wandb/run.json", ".lock", "train.log"),
    *("metrics.json", "history.jsonl", "samples.jsonl"),
)
_SWEEP = ("multirun.yaml", "sweep.json", "wandb")
AGAIN_SECONDS = 1.0  # until the second try: a quota or a network disk may have had a bad moment
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR}
_UNWRITABLE |= {errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.EFBIG, errno.ENODEV, errno.ENXIO}


def unwritable(error: BaseException | None, folder: Path | None = None) -> str | None:
    """What to say of a run folder that cannot be made or written; None where that is not what went wrong."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__  # logging makes a ValueError of what the disk says to train.log
    if error is None or error.errno not in _UNWRITABLE:
        return None
    where = str(folder or error.filename or "")
    return (
        f"the run folder cannot be written to{where and f': {where}'} ({error.strerror}). Nothing was trained now: "
        "put it right, or give hydra.run.dir=OTHER (for a sweep hydra.sweep.dir=OTHER)"
    )


@contextlib.contextmanager
def before_training(folder: Path) -> Iterator[None]:
    """Raise InputError in place of what the disk says to a run folder that nothing was trained in yet."""
    try:
        yield
    except OSError as error:
        said = unwritable(error, folder)
        if said is None:
            raise
        raise InputError(said) from error


def require_own_folder(folder: Path) -> None:
    """Raise InputError where something that a run writes into its folder is a link out of it, by which it would write
    over files elsewhere: the folder may be a stranger's."""
    home = Path(os.path.realpath(folder))
    for name in _WRITTEN:
        require_within(home, folder / name)
        for place, folders, files in os.walk(folder / name) if name != "wandb" else ():
            for below in (*folders, *files):
                require_within(home, Path(place, below))
    if os.path.lexists(folder.parent / "multirun.yaml"):  # it is a job of a sweep, and writes there as well
        require_within(home.parent, folder.parent / "wandb")


def require_own_sweep(folder: Path) -> None:
    """The same for the folder of a sweep, and for what lies in it: at whatever depth, since jobs may lie in folders of
    folders."""
    home = Path(os.path.realpath(folder))
    for name in _SWEEP:
        require_within(home, folder / name)
    if not any(os.path.lexists(folder / name) for name in _SWEEP):
        return  # there was no sweep
    for place, folders, files in os.walk(folder):
        for name in {*_WRITTEN} & {*folders, *files}:
            require_within(home, Path(place, name))
        for name in folders:
            path = Path(place, name)
            if os.path.islink(path) and any(os.path.lexists(path / written) for written in _WRITTEN):
                require_within(home, path)
        if {*_WRITTEN} & {*folders, *files}:
            require_own_folder(Path(place))
        folders[:] = [name for name in folders if name not in _WRITTEN]


def require_within(home: Path, path: Path) -> None:
    """Raise InputError where a path is a link out of a folder. home: the folder, without links."""
    if os.path.islink(path) and not (target := Path(os.path.realpath(path))).is_relative_to(home):
        raise InputError(
            f"{str(path)!r} is a link out of the folder, to {str(target)!r}, and is not followed: put what it "
            "leads to in its place, or the whole folder where there is room, with hydra.run.dir or hydra.sweep.dir"
        )


@contextlib.contextmanager
def only_told(path: Path, means: str) -> Iterator[None]:
    """A warning in place of what the disk says to a file that a run can do without. means: what is missing then."""
    try:
        yield
    except OSError as error:
        log.warning(f"{path} cannot be written ({error.strerror or reason(error)}): {means}")


def tried_twice(write: Callable[[], object], folder: Path, what: str) -> OSError | None:
    """Call `write`, which writes `what` into a run folder; where it fails once more, after a moment and after removing
    what killed writers left there. Returns what the disk said to both; None where it was written."""
    for last in (False, True):
        try:
            write()
            return None
        except OSError as error:
            if last:
                return error
            log.warning(f"{folder} does not take {what} ({error.strerror or reason(error)}): trying again")
            time.sleep(AGAIN_SECONDS)
            with contextlib.suppress(OSError):
                clear_run_drafts(folder)
    raise AssertionError("unreachable")


def clear_run_drafts(folder: Path) -> None:
    """Remove what killed writers have left in a run folder."""
    for place in (folder, folder / "checkpoints"):
        clear_drafts(place)
    for draft in folder.glob(".adapter-????????"):
        shutil.rmtree(draft, ignore_errors=True)


def rescued(write: Callable[[Path], object], error: OSError, folder: Path, resumable: bool) -> NotSaved:
    """Write elsewhere what a run folder did not take, and say where. write: called with the folder to write into.
    resumable: whether a checkpoint of the run is in its folder."""
    said = error.strerror or reason(error)
    lost = f"the run is trained, but {folder} does not take its adapter ({said})"
    way_on = ""
    if resumable:
        resume = shlex.quote(f"resume={folder}")
        way_on = f" To complete the run, {remedy(error)} and give {resume}: it goes on from its last checkpoint"
    try:
        place = Path(tempfile.mkdtemp(prefix=f"lorafit-{folder.name[:80]}-"))
        try:
            write(place)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    except OSError as second:
        also = f"nor does {tempfile.gettempdir()} ({second.strerror or reason(second)}): it is lost."
        return NotSaved(f"{lost}, {also}{way_on or ' Run it again elsewhere'}")
    disk = "" if _on_another_disk(place, folder) else ", on the same disk,"
    return NotSaved(f"{lost}. It is saved{disk} in {place / 'adapter'}.{way_on}")


def remedy(error: OSError) -> str:
    """What a user is to do about it, before the run goes on."""
    return "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "put that right"


def _on_another_disk(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.stat(one).st_dev != os.stat(other).st_dev
    return True
