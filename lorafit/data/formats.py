"""Rows of a data file as examples: a prompt, and the completion that is to be learned.

Two layouts are read: any two columns (`columns={prompt: question, completion: answer}`, or columns of these two
names), and Alpaca's `instruction`, `input`, `output`. Files of JSON lines are read here, line by line, so that a
fault is named with its file and line; csv, parquet and data sets of the hub come through the `datasets` library.
A row that cannot be used is an error that says which row it is: dropping it in silence would train something else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit import embedded
from lorafit.errors import InputError, did_you_mean, reason

FORMATS = ("auto", "prompt_completion", "alpaca")
Row = tuple[str, Mapping[str, Any]]  # where it stands ("train.jsonl:17"), and its fields


@dataclass(frozen=True)
class Example:
    """What the model is given, what it should answer, and where the row stands. The prompt may be empty: then
    the whole text is trained."""

    prompt: str
    completion: str
    where: str


def load_examples(
    path: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
) -> list[Example]:
    """The examples of a file (jsonl, json, csv, parquet), a hub data set by name, or "embedded".

    columns: which fields hold the "prompt" and the "completion". split: of a hub or of the embedded data set.
    Raises InputError, naming file and row, for what is missing, empty or not text.
    """
    if format not in FORMATS:
        raise InputError(
            f"data.format must be one of {', '.join(FORMATS)}, got {format!r}.{did_you_mean(format, FORMATS)}"
        )
    if columns is not None and set(columns) != {"prompt", "completion"}:
        raise InputError(
            f"data.columns names the fields of prompt and completion, as in "
            f"'data.columns={{prompt: question, completion: answer}}'; got {dict(columns)}"
        )
    rows = itertools.islice(read_rows(path, split), limit)
    examples = [_example(row, where, format, columns) for where, row in rows]
    if not examples:
        raise InputError(f"data file {str(path)!r} has no rows")
    return examples


def read_rows(path: str | Path, split: str = "train") -> Iterator[Row]:
    """Each row with the place where it stands."""
    if str(path) == "embedded":
        path = embedded.TRAIN if split == "train" else embedded.TEST
    file = Path(path).expanduser()
    if file.is_dir():
        raise InputError(f"data path {str(path)!r} is a folder: name one of its files")
    if file.suffix in (".jsonl", ".ndjson"):
        return _json_lines(_existing(file))
    if file.suffix == ".json":
        return _json_list(_existing(file))
    if file.suffix in (".csv", ".parquet"):
        return _dataset(file.suffix[1:], str(file.name), data_files=str(_existing(file)), split="train")
    if file.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        _existing(file)
        raise InputError(f"data file {str(path)!r} has the ending {file.suffix!r}: jsonl, json, csv or parquet is read")
    return _dataset(str(path), str(path), split=split)


def _existing(file: Path) -> Path:
    if not file.is_file():
        near = did_you_mean(file.name, [path.name for path in file.parent.glob("*")] if file.parent.is_dir() else [])
        raise InputError(f"data file {str(file)!r} does not exist.{near}")
    if file.stat().st_size == 0:
        raise InputError(f"data file {str(file)!r} is empty")
    return file


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError both
                raise InputError(f"{where}: the line is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: a row must be a JSON object, this is {type(row).__name__}")
            yield where, row


def _json_list(file: Path) -> Iterator[Row]:
    try:
        rows = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file}: the file is not JSON ({error}). Is it JSON lines? Name it .jsonl") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: the file must hold one list of objects")
    for number, row in enumerate(rows, start=1):
        yield f"{file}: row {number}", row


def _dataset(kind: str, name: str, **options: Any) -> Iterator[Row]:
    import datasets  # a second of import that JSON lines can do without

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(kind, **options)
    except Exception as error:  # the library raises many kinds; what a user needs is the name and the reason
        raise InputError(f"data {name!r} cannot be read: {reason(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}: row {number}", row


def _example(row: Mapping[str, Any], where: str, format: str, columns: Mapping[str, str] | None) -> Example:
    if columns is not None:
        prompt, completion = (_text(row, columns[key], where) for key in ("prompt", "completion"))
    elif format == "alpaca" or (format == "auto" and "instruction" in row and "output" in row):
        completion = _text(row, "output", where)
        prompt = alpaca_prompt(_text(row, "instruction", where), _text(row, "input", where) if row.get("input") else "")
    elif format == "prompt_completion" or ("prompt" in row and "completion" in row):
        prompt, completion = _text(row, "prompt", where), _text(row, "completion", where)
    else:
        raise InputError(
            f"{where}: no format fits the fields {', '.join(map(repr, row))}. Say which hold the prompt and the "
            f"completion: 'data.columns={{prompt: NAME, completion: NAME}}'"
        )
    if not completion.strip():
        raise InputError(f"{where}: the completion is empty, so nothing of this row would be trained")
    return Example(prompt, completion, where)


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """An instruction, with the text it is about when there is one, under the headings that Alpaca made common."""
    parts = [f"### Instruction:\n{instruction}", f"### Input:\n{context}" if context else "", "### Response:"]
    return "\n\n".join(part for part in parts if part)


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        names = [str(name) for name in row]
        raise InputError(
            f"{where}: the row has no field {field!r}; it has {', '.join(map(repr, names))}."
            f"{did_you_mean(field, names)} Choose fields with 'data.columns={{prompt: NAME, completion: NAME}}'."
        )
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{where}: field {field!r} must be text, it is {type(value).__name__}")
    try:
        str(value).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise InputError(f"{where}: field {field!r} is not valid Unicode ({error.reason})") from None
    return str(value)


def split_held_out(examples: list[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """(train, held out): a row is held out by a hash of its prompt, so that the choice does not depend on the order
    of the file, survives appended rows, and never parts two rows of the same prompt.

    Raises InputError when either side would be empty.
    """

    def position(example: Example) -> float:
        digest = hashlib.sha256((example.prompt or example.completion).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    positions = [position(example) for example in examples]
    # in a small file nothing may fall below the fraction: then the lowest is taken
    bound = max(fraction, min(positions) * (1 + 1e-9) + 1e-300)
    train = [example for example, at in zip(examples, positions, strict=True) if at >= bound]
    held_out = [example for example, at in zip(examples, positions, strict=True) if at < bound]
    if not train:
        raise InputError(
            f"{len(examples)} rows of one prompt are too few to hold some out: give data.eval_path, or more rows"
        )
    return train, held_out
