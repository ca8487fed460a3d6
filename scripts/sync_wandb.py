"""Send the offline W&B runs below some folders to the server, also where the folders were copied from another machine.

    python scripts/sync_wandb.py multirun/2026-11-26/04-00-00        a sweep, or a run, or many
    python scripts/sync_wandb.py FOLDER --dry-run                    say which, and what is missing, and send nothing

An offline run notes the files of its artifacts by absolute path. Where that is gone, `wandb sync` leaves the files out,
marks the run as synced and says nothing of it. Here the paths are put right first: lorafit keeps those files inside
the run's own folder. Exit code 2 where one is nowhere to be found, or where there is no run: then nothing is sent.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafit.files import write_atomically

# The file of a run: 7 bytes, then blocks, in them chunks behind (crc, length, kind); a record is one chunk or several.
HEADER, BLOCK, CHUNK = 7, 32768, struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="send nothing and change nothing")
    options = parser.parse_args(argv)
    runs = find_runs(options.folders)
    if not runs:
        print(f"sync_wandb: there is no offline run below {', '.join(map(str, options.folders))}", file=sys.stderr)
        raise SystemExit(2)
    missing = [path for run in runs for path in missing_files(run)]
    if missing:
        print(f"sync_wandb: {len(missing)} files of artifacts are gone: {', '.join(missing[:3])}", file=sys.stderr)
        raise SystemExit(2)
    for run in runs:
        print(run)
        if not options.dry_run:
            mend(run)
    if not options.dry_run:
        raise SystemExit(subprocess.run([sys.executable, "-m", "wandb", "sync", "--yes", *map(str, runs)]).returncode)


def find_runs(folders: list[Path]) -> list[Path]:
    """The folders of offline runs, each once: a sweep's folder also holds links to them."""
    found = {path.resolve() for folder in folders for path in folder.rglob("offline-run-*") if path.is_dir()}
    found |= {folder.resolve() for folder in folders if folder.name.startswith("offline-run-")}
    runs = sorted(path for path in found if path.parent.name != "replaced")
    for run in runs:
        if not any(run.glob("run-*.wandb")):  # the process was killed before it wrote anything
            print(f"sync_wandb: {run} holds no run", file=sys.stderr)
    return [run for run in runs if any(run.glob("run-*.wandb"))]


def missing_files(run: Path) -> list[str]:
    """The files of a run's artifacts that are neither where they were noted nor in the run's folder."""
    return [
        entry.local_path
        for raw in read_records(log_of(run).read_bytes())
        for entry in artifact_files(parse(raw))
        if not Path(moved(run, entry.local_path)).is_file()
    ]


def mend(run: Path) -> None:
    """Let the run's records name the files of its artifacts where they are now. Where they do, nothing is written."""
    raws = list(read_records(log_of(run).read_bytes()))
    mended = [mended_record(run, raw) for raw in raws]
    if mended != raws:
        head = log_of(run).read_bytes()[:HEADER]
        write_atomically(log_of(run), lambda file: file.write(head + b"".join(chunks(mended))))


def mended_record(run: Path, raw: bytes) -> bytes:
    record = parse(raw)
    paths = [moved(run, entry.local_path) for entry in artifact_files(record)]
    if paths == [entry.local_path for entry in artifact_files(record)]:
        return raw
    for entry, path in zip(artifact_files(record), paths, strict=True):
        entry.local_path = path
    return record.SerializeToString()


def moved(run: Path, noted: str) -> str:
    """Where a file is that was noted at a path."""
    here = run / "artifacts" / "staging" / Path(noted).name
    return str(here) if here.is_file() else noted


def log_of(run: Path) -> Path:
    [log] = run.glob("run-*.wandb")
    return log


def parse(raw: bytes) -> Any:
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    record.ParseFromString(raw)
    return record


def artifact_files(record: Any) -> list[Any]:
    return [entry for entry in record.artifact.manifest.contents if entry.local_path]


def read_records(data: bytes) -> Iterator[bytes]:
    """The records in the file of a run; what a killed process left half written ends them."""
    place, whole = HEADER, b""
    while place + CHUNK.size <= len(data):
        if (room := BLOCK - place % BLOCK) < CHUNK.size:
            place += room
            continue
        crc, length, kind = CHUNK.unpack_from(data, place)
        payload = data[place + CHUNK.size : place + CHUNK.size + length]
        if len(payload) < length or zlib.crc32(payload, zlib.crc32(bytes([kind]))) != crc:
            return
        place += CHUNK.size + length
        whole = payload if kind in (FULL, FIRST) else whole + payload
        if kind in (FULL, LAST):
            yield whole


def chunks(raws: list[bytes]) -> Iterator[bytes]:
    """Records as the file of a run holds them, after its header."""
    place = HEADER
    for raw in raws:
        first = True
        while first or raw:
            if (room := BLOCK - place % BLOCK) < CHUNK.size:
                yield bytes(room)
                place, room = place + room, BLOCK
            payload, raw = raw[: room - CHUNK.size], raw[room - CHUNK.size :]
            kind = (FIRST if raw else FULL) if first else (MIDDLE if raw else LAST)
            yield CHUNK.pack(zlib.crc32(payload, zlib.crc32(bytes([kind]))), len(payload), kind) + payload
            place, first = place + CHUNK.size + len(payload), False


if __name__ == "__main__":
    main()
