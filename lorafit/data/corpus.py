"""Everything that is read before the first step: rows, examples, tokens, and which of them are held out.

    corpus = read_corpus(sources, encoder, eval_fraction=0.05)      all rows, tokenized, or found in the cache

Every row is accounted for: it is trained, held out, dropped for its length, left out since nothing of it is to be
learned, or skipped as a bad one, and counted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np

from lorafit.cache import cache_folder
from lorafit.data import store
from lorafit.data.checks import Refusal, check_labels
from lorafit.data.formats import Example, Formatter, Turn
from lorafit.data.sources import (
    Row,
    Source,
    draw_rows,
    embedded_file,
    folder_files,
    has_held_out_files,
    is_saved,
    local_path,
)
from lorafit.data.store import Builder, Sequences
from lorafit.data.tokens import Encoded, Encoder
from lorafit.errors import InputError

log = logging.getLogger(__name__)

ON_BAD_ROW = ("error", "skip")
_CHUNK = 512  # rows that are tokenized together
_CACHE_VERSION = 2  # to be raised with every change of what a row gives, or of what is told of it
_LISTED = 20  # of the bad rows that were skipped
# labels are read back as text for the first examples of a source and then for one in so many, and for all whose text
# is not just what the template has around the contents
_CHECKED_FIRST, _CHECKED_THEN = 64, 64


@dataclass
class Report:
    """What became of the rows. `skipped` of `rows` were bad ones, the first of them in `bad_rows`; `dropped` and
    `truncated` training examples were longer than max_length; `lost` lost their answer or a part of it; `untrained`
    have nothing that is to be learned. `eval_dropped`, `eval_truncated`: the same of rows that are held out, of which
    `eval_unused` more are not needed. `marked` examples hold special tokens in a text of their own, the first of them
    is `first_marked`. `formats` and `unused`: of each source its layout and the columns that are not read. `faults`:
    see `check_labels`."""

    rows: int = 0
    skipped: int = 0
    dropped: int = 0
    truncated: int = 0
    lost: int = 0
    untrained: int = 0
    eval_dropped: int = 0
    eval_truncated: int = 0
    eval_unused: int = 0
    marked: int = 0
    first_marked: str = ""
    bad_rows: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    unused: list[list[str]] = field(default_factory=list)
    faults: list[Refusal] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens of the training examples before anything was cut

    def skip(self, error: InputError) -> None:
        """Count a bad row."""
        self.skipped += 1
        if len(self.bad_rows) < _LISTED:
            self.bad_rows.append(str(error))

    def add(self, other: Report) -> None:
        """Add what another stretch of the same data gave."""
        for name in ("rows", "skipped", "dropped", "truncated", "lost", "untrained", "marked"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_marked = self.first_marked or other.first_marked
        self.bad_rows = [*self.bad_rows, *other.bad_rows][:_LISTED]
        self.faults = [*self.faults, *other.faults][:_LISTED]

    def blame(self, fault: Refusal | None) -> None:
        """Keep a fault, the first of its kind."""
        if fault is not None and fault.check not in {known.check for known in self.faults}:
            self.faults.append(fault)

    def held_out(self, other: Report) -> None:
        """Take over what became of the rows to measure on."""
        self.eval_dropped += other.dropped + other.untrained
        self.eval_truncated += other.truncated

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Report:
        return cls(**values | {"faults": [Refusal(**item) for item in values["faults"]]})


@dataclass
class Corpus:
    """The tokenized data of a run. `sizes`: how many of the training examples each source gave, in order."""

    train: Sequences
    held_out: Sequences
    held_out_examples: list[Example]
    sizes: list[int]
    report: Report


class Pipeline:
    """Rows to tokens: reads, checks, encodes and cuts, and keeps the accounts. One for training rows, one for
    others."""

    def __init__(self, sources: list[Source], encoder: Encoder, *, on_bad_row: str = "error") -> None:
        self.sources, self.encoder, self.on_bad_row = sources, encoder, on_bad_row
        # what could not fit even if every token stood for a long word: it would only cost time
        characters = max(100_000, 64 * encoder.max_length)
        self.formatters = [Formatter(s.format, s.columns, max_characters=characters) for s in sources]
        self.report = Report()

    def examples(self, rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[int, Example]]:
        """Each good row's example with the number of its source."""
        for number, row in rows:
            self.report.rows += 1
            try:
                yield number, self.formatters[number](row)
            except InputError as error:
                self.bad(error)

    def bad(self, error: InputError) -> None:
        """Raise the error of a bad row, or count it."""
        if self.on_bad_row == "error":
            end = "" if str(error).endswith((".", "?")) else "."
            raise InputError(f"{error}{end} (data.on_bad_row=skip leaves out bad rows, and counts them.)") from None
        self.report.skip(error)

    def encode(self, rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[int, Example, Encoded]]:
        """Each good row's example, uncut."""
        examples = self.examples(rows)
        while chunk := list(itertools.islice(examples, _CHUNK)):
            for (number, example), found in zip(
                chunk, self.encoder.encode_all(example for _, example in chunk), strict=True
            ):
                if isinstance(found, InputError):
                    self.bad(found)
                    continue
                if (mark := self.encoder.special_in(example)) is not None:
                    self.report.marked += 1
                    self.report.first_marked = self.report.first_marked or f"{example.where} has {mark!r}"
                yield number, example, found

    def fit(self, example: Example, encoded: Encoded, report: Report | None = None) -> Encoded | None:
        """What is left of an example within max_length, counted in a report of its own or the pipeline's."""
        report = self.report if report is None else report
        try:
            kept, cut = self.encoder.fit(encoded, example.where)
        except InputError as error:
            self.bad(error)
            report.lost += bool(encoded.trained.any())
            return None
        if not encoded.trained.any():
            report.untrained += 1
            return None
        if kept is None:
            report.dropped += 1
            report.lost += 1
        elif cut.any():
            report.truncated += 1
            report.lost += bool((cut & encoded.trained).any())
        return kept

    def finish(self) -> Report:
        """The accounts, with the layouts that were found."""
        self.report.formats = [formatter.format for formatter in self.formatters]
        self.report.unused = [formatter.unused for formatter in self.formatters]
        return self.report

    def describe(self) -> str:
        return ", ".join(repr(source.path) for source in self.sources)


def read_corpus(
    sources: list[Source],
    encoder: Encoder,
    *,
    eval_sources: list[Source] | None = None,
    eval_fraction: float = 0.05,
    eval_limit: int | None = None,
    limit: int | None = None,
    split: str = "train",
    eval_split: str = "test",
    on_bad_row: str = "error",
    cache: bool = False,
) -> Corpus:
    """All rows of the sources, tokenized, and those held out: of `eval_sources`, or of folders that have files of their
    own to measure on, or else the share `eval_fraction` of the rows, by a hash of the prompt.

    limit: read so many rows; eval_limit: hold so many out in use. cache: look in the cache first, and leave
    what was read there. Raises InputError for what cannot be read, and where either side would be empty.
    """
    eval_sources = eval_sources or held_out_sources(sources)
    folder = None
    if cache:
        options = {
            "eval_fraction": eval_fraction,
            "eval_limit": eval_limit,
            "limit": limit,
            "split": split,
            "eval_split": eval_split,
            "on_bad_row": on_bad_row,
        }
        key = _cache_key(sources, eval_sources, encoder, options)
        folder = cache_folder("tokens") / key if key else None
    if folder is not None and (found := store.load(folder, ("train", "held_out"))):
        parts, meta = found
        examples = [Example(tuple(Turn(*turn) for turn in turns), where) for turns, where in meta["examples"]]
        return Corpus(parts["train"], parts["held_out"], examples, meta["sizes"], Report.of(meta["report"]))
    corpus = _read(sources, encoder, eval_sources, eval_fraction, eval_limit, limit, split, eval_split, on_bad_row)
    if folder is not None:
        meta = {
            "examples": [[example.turns, example.where] for example in corpus.held_out_examples],
            "sizes": corpus.sizes,
            "report": corpus.report.as_dict(),
        }
        store.save(folder, {"train": corpus.train, "held_out": corpus.held_out}, meta)
    return corpus


def held_out_sources(sources: list[Source]) -> list[Source] | None:
    """The sources that hold rows out by themselves: the embedded data, and folders with files for it."""
    found = [source for source in sources if source.path == "embedded" or has_held_out_files(source.path)]
    return found or None


def _read(
    sources: list[Source],
    encoder: Encoder,
    eval_sources: list[Source] | None,
    eval_fraction: float,
    eval_limit: int | None,
    limit: int | None,
    split: str,
    eval_split: str,
    on_bad_row: str,
) -> Corpus:
    pipeline = Pipeline(sources, encoder, on_bad_row=on_bad_row)
    report, others = pipeline.report, Report()
    train, held_out, examples = Builder(), Builder(), []
    sizes, checked = [0] * len(sources), [0] * len(sources)
    # of the prompt that is trained and has the lowest position: (place in train, source, example)
    lowest, nearest = 1.0, list[tuple[int, int, Example]]()
    said = time.monotonic()
    for number, example, encoded in pipeline.encode(draw_rows(sources, split, limit=limit)):
        checked[number] += 1
        sampled = checked[number] <= _CHECKED_FIRST or checked[number] % _CHECKED_THEN == 0
        if sampled or not encoded.as_written:
            report.blame(check_labels(encoder, example, encoded))
        position = example.position() if eval_sources is None else 1.0
        if position < eval_fraction:
            if eval_limit is not None and len(held_out) >= eval_limit:
                report.eval_unused += 1
            elif (kept := pipeline.fit(example, encoded, others)) is not None:
                held_out.add(kept, example.key(), example.where)
                examples.append(example)
            continue
        report.lengths.append(len(encoded.ids))
        if (kept := pipeline.fit(example, encoded)) is not None:
            if position < lowest:
                lowest, nearest = position, []
            if position == lowest < 1:
                nearest.append((len(train), number, example))
            train.add(kept, example.key(), example.where)
            sizes[number] += 1
        if time.monotonic() - said > 10:
            said = time.monotonic()
            log.info(f"tokenizing … {len(train):,} examples")
    report = pipeline.finish()
    if not report.rows:
        raise InputError(f"data file {pipeline.describe()} has no rows")
    if report.rows == report.skipped:
        raise InputError(
            f"every row of {pipeline.describe()} was skipped as a bad one; the first: {report.bad_rows[0]}"
        )
    if eval_sources is not None:
        other = Pipeline(eval_sources, encoder, on_bad_row=on_bad_row)
        for _, example, encoded in other.encode(draw_rows(eval_sources, eval_split)):
            if eval_limit is not None and len(held_out) >= eval_limit:
                break
            if (kept := other.fit(example, encoded)) is not None:
                held_out.add(kept, example.key(), example.where)
                examples.append(example)
        seen = other.report
        if not seen.rows:
            raise InputError(f"data file {other.describe()} has no rows")
        report.rows, report.skipped = report.rows + seen.rows, report.skipped + seen.skipped
        report.bad_rows = [*report.bad_rows, *seen.bad_rows][:_LISTED]
        report.held_out(seen)
        if not len(held_out):
            bad = f" {seen.skipped} of them are bad, the first: {seen.bad_rows[0]}" if seen.skipped else ""
            raise InputError(
                f"none of the {seen.rows} rows of {other.describe()} can be measured on within "
                f"data.max_length={encoder.max_length}.{bad}"
            )
        return Corpus(train.sequences(), held_out.sequences(), examples, sizes, report)
    report.held_out(others)
    sequences = train.sequences()
    if len(train) and not len(held_out) and len(nearest) < len(train):
        # in a small file nothing may fall below the fraction: then the lowest prompt is taken
        chosen, gone = np.array([place for place, _, _ in nearest]), Report()
        for _, number, example in nearest:
            encoded = encoder.encode(example)
            pipeline.fit(example, encoded, gone)
            report.lengths.remove(len(encoded.ids))
            sizes[number] -= 1
        report.truncated, report.lost = report.truncated - gone.truncated, report.lost - gone.lost
        report.held_out(gone)
        report.eval_unused += len(chosen[eval_limit:])
        return Corpus(
            sequences.select(np.setdiff1d(np.arange(len(train)), chosen)),
            sequences.select(chosen[:eval_limit]),
            [example for _, _, example in nearest[:eval_limit]],
            sizes,
            report,
        )
    # where the rest was dropped, the checks say so
    if len(train) and not len(held_out) or (len(held_out) and not len(train) + report.dropped + report.untrained):
        count = len(train) + len(held_out) + report.eval_unused
        one = len(train) or (not report.eval_unused and len({example.position() for example in examples}) < 2)
        problem = "of one prompt too few to hold some out" if one else "held out and none left to train"
        raise InputError(
            f"data {pipeline.describe()}: {count:,} example{' is' if count == 1 else 's are'} {problem}: give "
            f"data.eval_path, or more{'' if one else ', or lower data.eval_fraction'}"
        )
    return Corpus(sequences, held_out.sequences(), examples, sizes, report)


# ------------------------------------------------------------------------------------------------ the cache's key


def _cache_key(
    sources: list[Source], eval_sources: list[Source] | None, encoder: Encoder, options: dict[str, Any]
) -> str | None:
    """A hash of all that tokens and labels depend on; None where it cannot be known (a data set of the hub)."""
    read, measured = (
        [(_read_as(source, options), _content(source, str(options[split]))) for source in some or ()]
        for some, split in ((sources, "split"), (eval_sources, "eval_split"))
    )
    if any(content is None for _, content in (*read, *measured)) or not encoder.tokenizer.is_fast:
        return None
    chat = encoder.chat
    parts = {
        "version": _CACHE_VERSION,
        "libraries": [version(name) for name in ("tokenizers", "transformers")],
        "report": sorted(field.name for field in fields(Report)),
        "train": read,
        "held_out": measured,
        "options": options,
        "tokenizer": encoder.tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(token) for name, token in encoder.tokenizer.special_tokens_map.items()},
        "template": chat.source if chat is not None else f"plain, headings {encoder.plain.headings}",
        "system": encoder.plain.system,
        # a template that knows what day it is gives other tokens tomorrow
        "day": str(date.today()) if chat is not None and "strftime_now" in chat.source else None,
        "encoder": [encoder.max_length, encoder.train_on, encoder.overflow],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def _read_as(source: Source, options: dict[str, Any]) -> dict[str, Any]:
    """What of a source its examples depend on: its weight is the loader's, unless it says how many rows are read."""
    return asdict(source) | ({"weight": None} if options["limit"] is None else {})


def _content(source: Source, split: str) -> list[tuple[str, str]] | None:
    """(name, hash) of every file of a source, or None where there are no files that can be read."""
    path = local_path(source.path)
    if source.path == "embedded":
        files = [embedded_file(split)]
    elif os.path.isdir(path):
        files = (
            sorted(file for file in path.rglob("*") if file.is_file()) if is_saved(path) else folder_files(path, split)
        )
    elif os.path.isfile(path):
        files = [path]
    else:
        return None
    try:
        return [(str(file), store.sha256(file)) for file in files]
    except OSError:
        return None  # said when the rows are read
