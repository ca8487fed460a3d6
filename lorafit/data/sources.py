"""Where rows come from: files, folders of files, data sets of the hub; one of them, or several with weights.

A row is handed on as it was found, with the place where it stands ("train.jsonl:17"): a line of JSON is not
parsed here, so that whoever looks for the thousandth row, or for another process's rows, reads past the rest at
the speed of the disk. What is wrong with a single row travels in its place and is raised by `fields`; what is wrong
with a file is raised at once.

jsonl, json and csv are read with the standard library: a fault has a file and a line, text stays text ("007", "NA",
1.10), and of jsonl and csv memory does not grow with the file. Parquet, folders that `datasets` saved, and data sets of
the hub come through the `datasets` library.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math
import os
import random
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lorafit import embedded
from lorafit.errors import InputError, did_you_mean, nearest, reason
from lorafit.files import require_own_files

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
    path: Any,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    subset: str | None = None,
    key: str = "data.path",
) -> list[Source]:
    """The sources that `data.path`, or another `key`, names: a text, or a list of texts and of mappings such as
    ``{path: b.csv, weight: 0.3, columns: {prompt: q, completion: a}}``; what a mapping leaves out is as given here.

    Raises InputError for anything else, and where only some of several sources have a weight.
    """
    entries = path if isinstance(path, list | tuple) else [path]
    sources = []
    for entry in entries:
        values = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
        for name in values:
            if name not in _SOURCE_KEYS:
                raise InputError(f"{key}: a source has no key {name!r}.{did_you_mean(str(name), _SOURCE_KEYS)}")
        if not isinstance(values.get("path"), str | Path) or not str(values["path"]):
            raise InputError(f"{key}: a source is a path or a mapping with a path, got {entry!r}")
        weight = values.get("weight")
        if weight is not None and not (type(weight) in (int, float) and weight > 0 and math.isfinite(weight)):
            raise InputError(f"{key}: the weight of {values['path']!r} must be a positive number, got {weight!r}")
        for name, kind in (("format", str), ("columns", Mapping), ("subset", str)):
            if values.get(name) is not None and not isinstance(values[name], kind):
                wanted = "like {prompt: question, completion: answer}" if name == "columns" else "a name"
                raise InputError(f"{key}: {name} of {values['path']!r} must be {wanted}, got {values[name]!r}")
        defaults: dict[str, Any] = {"format": format, "columns": columns, "subset": subset}
        own = {name: value for name, value in values.items() if value is not None}
        sources.append(Source(**defaults | own | {"path": str(values["path"])}))
    if not sources:
        raise InputError(f"{key} is an empty list: name a source")
    weighted = sum(source.weight is not None for source in sources)
    if weighted not in (0, len(sources)):
        raise InputError(f"{key}: give a weight to every source, or to none")
    return sources


# ------------------------------------------------------------------------------------------------ reading


def read_rows(source: Source | str | Path, split: str = "train", *, streaming: bool = False) -> Iterator[Row]:
    """The rows of a source, in order. split: "train", or "test" for those that a folder or the embedded data hold out;
    for a data set of the hub the name of its split. streaming: read a data set of the hub as it arrives."""
    if not isinstance(source, Source):
        source = Source(str(source))
    path = local_path(source.path)
    if source.path == "embedded":
        return _json_lines(embedded_file(split))
    if os.path.isdir(path):
        if is_saved(path):
            return _saved(path, split)
        return itertools.chain.from_iterable(_read_file(file) for file in folder_files(path, split))
    named = bool(path.suffix) and len(path.parts) == 1 or path.suffix.lower() in SUFFIXES
    if os.path.exists(path) or named or source.path.startswith((".", "/", "~")) or len(path.parts) > 2:
        _is_held_out(source.path, split)
        return _read_file(path)
    return _hub(source, split, streaming)


def local_path(path: str) -> Path:
    """The path on this machine that a source's path would be, whether or not it is there."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises where there is no such user


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote a folder."""
    return any(os.path.isfile(folder / name) for name in ("dataset_dict.json", "state.json"))


def embedded_file(split: str) -> Path:
    """The file of the embedded data that belongs to a split."""
    return embedded.TEST if _is_held_out("embedded", split) else embedded.TRAIN


def _is_held_out(name: str, split: str) -> bool:
    """Whether a split means the held-out rows of something whose rows have no named splits.

    A name that means neither is an error: to train on what is measured would be the one guess, to ignore it the other.
    """
    if split != "train" and split.lower() not in _HELD_OUT_WORDS:
        raise InputError(
            f"data {name!r} has no split {split!r}: it has 'train', and 'test' for what its files' names hold out. "
            "Choose one of them, or name the files"
        )
    return split != "train"


def folder_files(folder: Path, split: str) -> list[Path]:
    """The data files of a folder that belong to a split.

    A file is held out when a word of its name says so (validation, dev, test, …); validation goes before test.
    For split "test" a folder without such files gives all of its files; raises InputError where there is none at all.
    """
    files = [path for path in _files(folder) if path.suffix.lower() in SUFFIXES]
    if not files:
        raise InputError(f"data folder {str(folder)!r} holds no file that ends in {', '.join(SUFFIXES)}")
    ranks = {path: _held_out_rank(path.relative_to(folder)) for path in files}
    if not _is_held_out(str(folder), split):
        files = [path for path in files if ranks[path] is None]
        if not files:
            raise InputError(f"data folder {str(folder)!r} holds only files to measure on: name one to train on it")
        return files
    best = min((rank for rank in ranks.values() if rank is not None), default=None)
    return files if best is None else [path for path in files if ranks[path] == best]


def _files(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, but for hidden ones."""
    require_own_files(folder, depth=20)
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _names(path: str) -> list[Path]:
    """The names of the files of a source that is a folder of files."""
    folder = local_path(path)
    if not os.path.isdir(folder) or is_saved(folder):
        return []
    return [file.relative_to(folder) for file in _files(folder)]


def files_not_read(path: str) -> list[str]:
    """The names of a source's files that are of no kind that is read, where the source is a folder."""
    return [str(name) for name in _names(path) if name.suffix.lower() not in (*SUFFIXES, ".md", "")]


def held_out_files(path: str) -> list[str]:
    """The names of those of a source's files that are not trained for what they are called, where it is a folder."""
    found = (name for name in _names(path) if name.suffix.lower() in SUFFIXES)
    return [str(name) for name in found if _held_out_rank(name) is not None]


def has_held_out_files(path: str) -> bool:
    """Whether a source is a folder with files of its own to measure on."""
    folder = local_path(path)
    if is_saved(folder):
        splits = folder / "dataset_dict.json"
        found = _parse(splits.read_bytes()) if splits.is_file() else None
        names = found.get("splits") if isinstance(found, dict) else None
        return isinstance(names, list) and bool(_held_out_split(names))
    return bool(held_out_files(path))


def _held_out_rank(name: Path) -> int | None:
    words = re.split(r"[^a-z]+", str(name.with_suffix("")).lower())
    return min((_HELD_OUT_WORDS[word] for word in words if word in _HELD_OUT_WORDS), default=None)


def _read_file(file: Path) -> Iterator[Row]:
    if not os.path.isfile(file):
        if os.path.exists(file):
            raise InputError(
                f"data file {str(file)!r} is no regular file, and it is read more than once: save it to a file"
            )
        hint = " Name one of the files, or their folder" if "*" in str(file) else _near_file(file)
        raise InputError(f"data file {str(file)!r} does not exist.{hint}")
    if file.stat().st_size == 0:
        raise InputError(f"data file {str(file)!r} is empty")
    readers = {".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    readers |= {".jsonl": _json_lines, ".ndjson": _json_lines}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise InputError(f"data file {str(file)!r} has the ending {file.suffix!r}: jsonl, json, csv or parquet is read")
    return _opened(file, reader(file))


def _near_file(path: Path) -> str:
    """A hint for a file or folder that is not there."""
    beside = [found.name for found in path.parent.glob("*")] if os.path.isdir(path.parent) else []
    seen = [name for name in beside if name.startswith(".") == path.name.startswith(".")]
    same = next((name for name in seen if Path(name).stem == path.name), None)
    return f" Did you mean {same!r}?" if same is not None else did_you_mean(path.name, seen)


def _opened(file: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows; what the system says against reading them is an error of the file."""
    try:
        yield from rows
    except OSError as error:
        raise InputError(f"data file {str(file)!r} cannot be read: {reason(error)}") from error


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Row(f"{file}:{number}", line)


def _json(file: Path) -> Iterator[Row]:
    """A list of objects, read whole; or, since many files of that ending hold them, JSON lines."""
    with file.open("rb") as opened:
        first = next((byte for byte in iter(lambda: opened.read(1), b"") if byte not in b" \t\r\n\xef\xbb\xbf"), b"")
    if first == b"{":
        text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").strip() if file.stat().st_size < 1 << 20 else b""
        if b"\n" in text and isinstance(_parse(text), dict):
            raise InputError(
                f"{file}: the file holds one JSON object; it must hold a list of them, or one in each line"
            )
        yield from _json_lines(file)
        return
    rows = _parse(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    if isinstance(rows, InputError):
        raise InputError(f"{file}: the file is {rows}. It holds one list, so nothing of it can be skipped: correct it")
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


class _Number(float):
    """A number of JSON that is no whole one. As text it is what stands in the file: 1.10 stays 1.10."""

    text: str

    def __new__(cls, text: str) -> _Number:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two values with one name either could be meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the name {shown(_repeated(name for name, _ in pairs))} stands twice in an object")
    return found


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that stands there before."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_float=_Number, parse_constant=_no_number)


def _not_utf8(text: bytes, at: int) -> str:
    line = text.count(b"\n", 0, at)
    place = f"position {at}" if not line else f"line {line + 1}"
    kind = ", perhaps UTF-16" if text.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
    return f"not UTF-8 (byte 0x{text[at]:02x} at {place}{kind})"


def _parse(text: bytes) -> Any:
    """The value of a JSON text, or an InputError that says what it is instead."""
    try:
        return _JSON.decode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return InputError(_not_utf8(error.object, error.start))
    except RecursionError:
        return InputError("not JSON that can be read (it is nested too deeply)")
    except ValueError as error:
        return InputError(f"not JSON ({reason(error).partition(';')[0]})")


def _csv(file: Path) -> Iterator[Row]:
    """Rows of a table with a header. The separator is the one of comma, semicolon, tab that the header has most of.

    Behind a broken quote a line of somebody's text could be taken for a row. So a row with one is a bad row only where
    it is sure that it ends with its line (`_ends_with_its_line`); otherwise it is an error of the file. Bytes that are
    not UTF-8 are carried through, so that their row ends where it does, and is bad as a whole.
    """
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        first = next((line for line in lines if line.strip()), "")
        lines.seek(0)
        options: dict[str, Any] = {
            "delimiter": "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=re.sub('"[^"]*"', "", first).count),
            "strict": True,
        }
        header: list[str] = []
        taken: list[str] = []  # the lines of the row at hand
        before = 0  # lines before it
        source: Iterator[str] = iter(lines)
        reader = csv.reader(_noted(source, taken), **options)
        while True:
            before += len(taken)
            taken.clear()
            where = f"{file}:{before + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                problem = (
                    f"{where}: a quote or a line break of this row is broken "
                    f"({str(error).partition(' - ')[0]}, line {before + len(taken)})"
                )
                if not header or not _ends_with_its_line(file, before, taken[0], len(header), options):
                    raise InputError(
                        f"{problem}, so that nobody knows where the rows after it begin. Correct it; it cannot be "
                        "skipped"
                    ) from None
                yield Row(where, InputError(problem))
                if len(taken) > 1:
                    source = itertools.chain(taken[1:], source)
                    del taken[1:]
                reader = csv.reader(_noted(source, taken), **options)
                continue
            if cells is None:
                return
            if not cells:
                continue
            fault = _fault(cells, header)
            if not header:
                if fault:
                    raise InputError(f"{where}: the header {fault}")
                header = cells
            elif fault:
                yield Row(where, InputError(f"{where}: the row {fault}"))
            else:
                yield Row(where, dict(zip(header, cells, strict=True)))


def _noted(lines: Iterator[str], taken: list[str]) -> Iterator[str]:
    """The lines, each put down in `taken`."""
    for line in lines:
        taken.append(line)
        yield line


def _ends_with_its_line(file: Path, before: int, broken: str, width: int, options: dict[str, Any]) -> bool:
    """Whether a row with a broken quote is just the line `broken`, which stands behind `before` others.

    It is when every quote that it opens is closed in it, or when each line after it is a whole row by itself, so that
    it was the closing quote that was forgotten.
    """
    if broken.count('"') % 2 == 0:
        return True
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        for line in itertools.islice(lines, before + 1, None):
            try:
                cells = next(csv.reader([line], **options), [])
            except csv.Error:
                return False
            if line.count('"') % 2 or (cells and len(cells) != width):
                return False
    return True


_UNDECODED = re.compile("[\udc80-\udcff]")  # how "surrogateescape" spells a byte that is not UTF-8


def _fault(cells: list[str], header: list[str]) -> str | None:
    """What is wrong with a line of a table; without a header, with the line as header."""
    for number, cell in enumerate(cells, start=1):
        if found := _UNDECODED.search(cell):
            return f"is not UTF-8 (byte 0x{ord(found[0]) - 0xDC00:02x} at position {found.start()} of cell {number})"
    if header:
        return f"has {len(cells)} cells, the header {len(header)}" if len(cells) != len(header) else None
    twice = _repeated(filter(str.strip, cells))  # a table may have columns without a name
    return f"names {shown(twice)} twice" if twice is not None else None


def _parquet(file: Path) -> Iterator[Row]:
    def load(datasets: Any) -> Any:
        from pyarrow.parquet import read_metadata

        if not read_metadata(file).num_rows:
            return []
        return datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)

    return _from_library(str(file), load)


def _hub(source: Source, split: str, streaming: bool) -> Iterator[Row]:
    rows = _from_library(
        source.path,
        lambda datasets: datasets.load_dataset(source.path, source.subset, split=split, streaming=streaming),
    )
    some = False
    try:
        for row in rows:
            some = True
            yield row
    except InputError as error:
        if some:
            raise
        hint = _near_file(local_path(source.path))
        raise InputError(f"{error}. Nor is there a file or folder of this name.{hint}") from error


def _saved(folder: Path, split: str) -> Iterator[Row]:
    """A folder that `datasets` wrote with save_to_disk."""

    def load(datasets: Any) -> Any:
        require_own_files(folder)
        _require_own_names(folder)
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.DatasetDict):
            held_out = _held_out_split(found) if split.lower() in _HELD_OUT_WORDS else None
            name = split if split in found else held_out
            if name is None:
                raise InputError(f"data {str(folder)!r} has no split {split!r}; it has {', '.join(map(str, found))}")
            found = found[name]
        return found.with_format(None).to_iterable_dataset()  # tensors, if it was saved so

    return _from_library(str(folder), load)


def _require_own_names(folder: Path) -> None:
    """Raise InputError where a state.json in a folder that `datasets` wrote names a file that is not beside it."""
    for state in (folder / "state.json", *folder.glob("*/state.json")):
        found = _parse(state.read_bytes()) if state.is_file() else {}
        files = found.get("_data_files") if isinstance(found, dict) else None
        for entry in files if isinstance(files, list) else ():
            name = entry.get("filename") if isinstance(entry, dict) else None
            if not isinstance(name, str) or not name or Path(name).name != name:
                raise InputError(f"data {str(folder)!r}: {state} names {shown(name)}, which is no file of its folder")
    splits = folder / "dataset_dict.json"
    found = _parse(splits.read_bytes()) if splits.is_file() else {}
    names = found.get("splits") if isinstance(found, dict) else None
    for name in names if isinstance(names, list) else ():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise InputError(f"data {str(folder)!r}: {splits} names {shown(name)}, which is no folder of it")


def _from_library(name: str, load: Callable[[Any], Iterable[Any]]) -> Iterator[Row]:
    import datasets  # a second of import that lines can do without

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is said below
    number = 0
    try:
        rows = load(datasets)
        if isinstance(rows, datasets.IterableDataset):
            rows = rows.decode(False)  # of pictures and sounds, which may name any file or address, to be opened
        for number, row in enumerate(rows, start=1):
            yield Row(f"{name}: row {number}", row)
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds; what a user needs is the name and the reason
        after = f" after row {number}" if number else ""
        raise InputError(f"data {name!r} cannot be read{after}: {reason(error)[:400]}") from error


def _held_out_split(names: Iterable[Any]) -> str | None:
    ranked = [(rank, str(name)) for name in names if (rank := _held_out_rank(Path(str(name)))) is not None]
    return min(ranked)[1] if ranked else None


# ------------------------------------------------------------------------------------------------ mixing


def draw_rows(
    sources: list[Source], split: str = "train", *, streaming: bool = False, seed: int = 0, limit: int | None = None
) -> Iterator[tuple[int, Row]]:
    """The rows of all sources, each with the number of its source; at most `limit`, of each source its part.

    Without weights one source follows the other. With weights (streaming alone: elsewhere the loader mixes what has
    been read) each row comes from a source drawn in proportion; one that ends begins anew, until each has ended once.
    """
    weights = [1.0 if source.weight is None else source.weight for source in sources]
    if not streaming or sources[0].weight is None or len(sources) == 1:
        for number, source in enumerate(sources):
            part = None if limit is None else max(1, round(limit * weights[number] / sum(weights)))
            for row in itertools.islice(read_rows(source, split, streaming=streaming), part):
                yield number, row
        return
    yield from itertools.islice(_drawn(sources, weights, split, seed), limit)


def _drawn(sources: list[Source], weights: list[float], split: str, seed: int) -> Iterator[tuple[int, Row]]:
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


# ------------------------------------------------------------------------------------------------ messages


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: object) -> str:
    """A value of a row for a message, cut where it is long or deep."""
    return _short.repr(value)


def listed(names: Iterable[Any], count: int = 12) -> str:
    """The names of a row's fields for a message, the first of them where there are many."""
    names = list(names)
    return ", ".join([*map(shown, names[:count]), *(["…"] if len(names) > count else [])]) or "none"


def near_columns(name: str, names: Iterable[str]) -> str:
    """A hint for a column that is not there."""
    return did_you_mean(name, nearest(name, names))
