"""Where rows come from: files, folders of files, data sets of the hub; one of them, or several with weights.

A row is handed on as it was found, with the place where it stands ("train.jsonl:17"): a line of JSON is not
parsed here, so that whoever looks for the thousandth row, or for another process's rows, reads past the rest at
the speed of the disk. What is wrong with a single row travels in its place and is raised by `fields`; what is wrong
with a file is raised at once.

jsonl, json and csv are read line by line with the standard library: a fault has a file and a line, text stays text
("007", "NA"), and memory does not grow with the file. Parquet, folders that `datasets` saved, and data sets of
the hub come through the `datasets` library.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from lorafit import embedded
from lorafit.errors import InputError, did_you_mean, nearest, reason

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_SOURCE_KEYS = ("path", "weight", "format", "columns", "subset")
# a name with one of these words in it holds rows that are not for training
_HELD_OUT_WORDS = {"validation": 0, "valid": 0, "val": 0, "dev": 0, "eval": 0, "heldout": 0, "test": 1, "testing": 1}

csv.field_size_limit(sys.maxsize)  # how long a row may be is said by the reader of rows, not by the parser


class Row(NamedTuple):
    """A row as it was found: where, and a line of JSON, its fields, or the error that stands in their place."""

    where: str
    payload: bytes | Mapping[str, Any] | InputError


@dataclass(frozen=True)
class Source:
    """One source of rows. weight: its share of the mixture, None where sources are simply put together.

    path: a file, a folder, a name on the hub, or "embedded". subset: of a data set of the hub, where it has several.
    format, columns: see `lorafit.data.formats.Formatter`.
    """

    path: str
    weight: float | None = None
    format: str = "auto"
    columns: Mapping[str, str] | None = None
    subset: str | None = None


def parse_sources(
    path: Any, *, format: str = "auto", columns: Mapping[str, str] | None = None, subset: str | None = None
) -> list[Source]:
    """The sources that `data.path` names: a text, or a list of texts and of mappings such as
    ``{path: b.csv, weight: 0.3, columns: {prompt: q, completion: a}}``; what a mapping leaves out is as given here.

    Raises InputError for anything else, and where only some of several sources have a weight.
    """
    entries = path if isinstance(path, list | tuple) else [path]
    sources = []
    for entry in entries:
        values = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
        for key in values:
            if key not in _SOURCE_KEYS:
                raise InputError(f"data.path: a source has no key {key!r}.{did_you_mean(str(key), _SOURCE_KEYS)}")
        if not isinstance(values.get("path"), str | Path) or not str(values["path"]):
            raise InputError(f"data.path: a source is a path or a mapping with a path, got {entry!r}")
        weight = values.get("weight")
        if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0):
            raise InputError(f"data.path: the weight of {values['path']!r} must be a positive number, got {weight!r}")
        defaults: dict[str, Any] = {"format": format, "columns": columns, "subset": subset}
        sources.append(Source(**defaults | values | {"path": str(values["path"])}))
    if not sources:
        raise InputError("data.path is an empty list: name a source")
    weighted = sum(source.weight is not None for source in sources)
    if weighted not in (0, len(sources)):
        raise InputError("data.path: give a weight to every source, or to none")
    return sources


# ------------------------------------------------------------------------------------------------ reading


def read_rows(source: Source | str | Path, split: str = "train", *, streaming: bool = False) -> Iterator[Row]:
    """The rows of a source, in order. split: "train", or "test" for those that a folder or the embedded data hold out;
    for a data set of the hub the name of its split. streaming: read a data set of the hub as it arrives."""
    if not isinstance(source, Source):
        source = Source(str(source))
    path = Path(source.path).expanduser()
    if source.path == "embedded":
        return _json_lines(embedded.TRAIN if split == "train" else embedded.TEST)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved(path, split)
        return itertools.chain.from_iterable(_read_file(file) for file in folder_files(path, split))
    if path.is_file() or path.suffix in SUFFIXES or source.path.startswith((".", "/", "~")) or len(path.parts) > 2:
        return _read_file(path)
    return _hub(source, split, streaming)


def folder_files(folder: Path, split: str) -> list[Path]:
    """The data files of a folder that belong to a split.

    A file is held out when a word of its name says so (validation, dev, test, …); validation goes before test.
    For split "test" a folder without such files gives all of its files; raises InputError where there is none at all.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(f"data folder {str(folder)!r} holds no file that ends in {', '.join(SUFFIXES)}")
    ranks = {path: _held_out_rank(path.relative_to(folder)) for path in files}
    if split == "train":
        files = [path for path in files if ranks[path] is None]
        if not files:
            raise InputError(f"data folder {str(folder)!r} holds only files to measure on: name one to train on it")
        return files
    best = min((rank for rank in ranks.values() if rank is not None), default=None)
    return files if best is None else [path for path in files if ranks[path] == best]


def has_held_out_files(path: str) -> bool:
    """Whether a source is a folder with files of its own to measure on."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return False
    if (folder / "dataset_dict.json").is_file():
        return bool(_held_out_split(json.loads((folder / "dataset_dict.json").read_bytes())["splits"]))
    if (folder / "state.json").is_file():
        return False
    return any(_held_out_rank(file.relative_to(folder)) is not None for file in folder_files(folder, "test"))


def _held_out_rank(name: Path) -> int | None:
    words = re.split(r"[^a-z]+", str(name.with_suffix("")).lower())
    return min((_HELD_OUT_WORDS[word] for word in words if word in _HELD_OUT_WORDS), default=None)


def _read_file(file: Path) -> Iterator[Row]:
    if not file.is_file():
        near = did_you_mean(file.name, [path.name for path in file.parent.glob("*")] if file.parent.is_dir() else [])
        raise InputError(f"data file {str(file)!r} does not exist.{near}")
    if file.stat().st_size == 0:
        raise InputError(f"data file {str(file)!r} is empty")
    if file.suffix in (".jsonl", ".ndjson"):
        return _json_lines(file)
    if file.suffix == ".json":
        return _json(file)
    if file.suffix in (".csv", ".tsv"):
        return _csv(file)
    if file.suffix == ".parquet":
        return _parquet(file)
    raise InputError(f"data file {str(file)!r} has the ending {file.suffix!r}: jsonl, json, csv or parquet is read")


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.isspace():
                yield Row(f"{file}:{number}", line)


def _json(file: Path) -> Iterator[Row]:
    """A list of objects; or, since many files of that ending hold them, JSON lines."""
    with file.open("rb") as opened:
        first = next((byte for byte in iter(lambda: opened.read(1), b"") if byte not in b" \t\r\n\xef\xbb\xbf"), b"")
    if first == b"{":
        one = _parse(file.read_bytes().removeprefix(b"\xef\xbb\xbf")) if file.stat().st_size < 1 << 20 else None
        if isinstance(one, dict):
            raise InputError(
                f"{file}: the file holds one JSON object; it must hold a list of them, or one in each line"
            )
        yield from _json_lines(file)
        return
    rows = _parse(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    if isinstance(rows, InputError):
        raise InputError(f"{file}: the file is {rows}")
    if not isinstance(rows, list):
        raise InputError(f"{file}: the file must hold one list of objects, it holds {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        where = f"{file}: row {number}"
        yield Row(where, row if isinstance(row, dict) else _not_an_object(where, row))


def fields(row: Row) -> Mapping[str, Any]:
    """The fields of a row; raises InputError, naming its place, where it has none."""
    if isinstance(row.payload, InputError):
        raise row.payload
    if not isinstance(row.payload, bytes):
        return row.payload
    found = _parse(row.payload)
    if isinstance(found, InputError):
        raise InputError(f"{row.where}: the line is {found}")
    if not isinstance(found, dict):
        raise _not_an_object(row.where, found)
    return found


def _not_an_object(where: str, found: object) -> InputError:
    return InputError(f"{where}: a row must be a JSON object, this is {type(found).__name__}")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _parse(text: bytes) -> Any:
    """The value of a JSON text, or an InputError that says what it is instead."""
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        return InputError(f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start})")
    except RecursionError:
        return InputError("not JSON that can be read (it is nested too deeply)")
    except ValueError as error:
        return InputError(f"not JSON ({error})")


class _Lines:
    """The lines of a file as text; one that is not UTF-8 raises, and the next call goes on behind it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.number = file, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.file)
        self.number += 1
        return line.decode("utf-8-sig" if self.number == 1 else "utf-8")


def _csv(file: Path) -> Iterator[Row]:
    """Rows of a table with a header. The separator is the one of comma, semicolon, tab that the header has most of."""
    with file.open("rb") as opened:
        lines = _Lines(opened)
        try:
            first = next(lines)
            separator = "\t" if file.suffix == ".tsv" else max(",;\t", key=first.count)
            opened.seek(0)
            lines.number = 0
            reader = csv.reader(lines, delimiter=separator, strict=True)
            header = next((cells for cells in reader if cells), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{file}:{lines.number}: the header cannot be read ({error})") from None
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise InputError(f"{file}:1: the header names {twice[0]!r} twice")
        while True:
            where = f"{file}:{lines.number + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                place = f"{file}:{lines.number}"
                byte = error.object[error.start]
                problem = f"{place}: the line is not UTF-8 (byte 0x{byte:02x} at position {error.start})"
                yield Row(place, InputError(problem))
                continue
            except csv.Error as error:
                last = lines.number
                span = "" if f"{file}:{last}" == where else f", which goes on to line {last},"
                yield Row(where, InputError(f"{where}: the row{span} has a broken quote ({error})"))
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                problem = f"{where}: the row has {len(cells)} cells, the header {len(header)}"
                yield Row(where, InputError(problem))
            else:
                yield Row(where, dict(zip(header, cells, strict=True)))


def _parquet(file: Path) -> Iterator[Row]:
    return _datasets(str(file), "parquet", data_files=str(file), split="train", streaming=True)


def _hub(source: Source, split: str, streaming: bool) -> Iterator[Row]:
    return _datasets(source.path, source.path, source.subset, split=split, streaming=streaming)


def _datasets(name: str, *args: Any, **options: Any) -> Iterator[Row]:
    import datasets  # a second of import that lines can do without

    datasets.disable_progress_bars()
    number = 0
    try:
        for number, row in enumerate(datasets.load_dataset(*args, **options), start=1):
            yield Row(f"{name}: row {number}", row)
    except Exception as error:  # the library raises many kinds; what a user needs is the name and the reason
        after = f" after row {number}" if number else ""
        raise InputError(f"data {name!r} cannot be read{after}: {reason(error)}") from error


def _saved(folder: Path, split: str) -> Iterator[Row]:
    """A folder that `datasets` wrote with save_to_disk."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InputError(f"data {str(folder)!r} cannot be read: {reason(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        name = split if split in found else None if split == "train" else _held_out_split(found)
        if name is None:
            known = ", ".join(map(str, found))
            raise InputError(f"data {str(folder)!r} has no split {split!r}; it has {known}")
        found = found[name]
    for number, row in enumerate(found, start=1):
        yield Row(f"{folder}: row {number}", row)


def _held_out_split(names: Iterable[Any]) -> str | None:
    ranked = [(rank, str(name)) for name in names if (rank := _held_out_rank(Path(str(name)))) is not None]
    return min(ranked)[1] if ranked else None


# ------------------------------------------------------------------------------------------------ mixing


def draw_rows(
    sources: list[Source], split: str = "train", *, streaming: bool = False, seed: int = 0
) -> Iterator[tuple[int, Row]]:
    """The rows of all sources, each with the number of its source.

    Without weights one source follows the other. With weights (streaming alone: elsewhere the loader mixes what has
    been read) each row comes from a source drawn in proportion; one that ends begins anew, until each has ended once.
    """
    if not streaming or sources[0].weight is None or len(sources) == 1:
        for number, source in enumerate(sources):
            for row in read_rows(source, split, streaming=streaming):
                yield number, row
        return
    weights = [float(source.weight or 0) for source in sources]
    draw = random.Random(seed)
    readers = [read_rows(source, split, streaming=True) for source in sources]
    running = set(range(len(sources)))
    while True:
        number = draw.choices(range(len(sources)), weights)[0]
        found = next(readers[number], None)
        if found is None:
            running.discard(number)
            if not running:
                return
            readers[number] = read_rows(sources[number], split, streaming=True)
            found = next(readers[number], None)
            if found is None:
                raise InputError(f"data file {sources[number].path!r} has no rows")
        yield number, found


def near_columns(name: str, names: Iterable[str]) -> str:
    """A hint for a column that is not there."""
    return did_you_mean(name, nearest(name, names))
