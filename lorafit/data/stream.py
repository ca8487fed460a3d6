"""Data larger than memory: rows are read, tokenized and packed a window at a time, while training goes on.

A window is so many rows in a row of the stream; within it the examples are shuffled and put into batches, so that what
is held at once does not depend on the size of the file. Windows are numbered: worker processes take turns with
them, and the batches come in the same order with any number of workers. A checkpoint holds the number of the window
and of the batch in it; to go on, the rows before it are read past, unparsed.

The loader has the length of the whole run and goes through the data as often as that takes: how long an epoch is
would only be known at its end.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lorafit.data.checks import check_labels, require_vocabulary
from lorafit.data.corpus import Pipeline, Report
from lorafit.data.formats import Formatter
from lorafit.data.loader import Batch, ResumableLoader
from lorafit.data.packing import best_fit
from lorafit.data.sources import Row, Source, draw_rows, read_rows
from lorafit.data.store import Builder, Sequences
from lorafit.data.tokens import Encoder
from lorafit.errors import InputError
from lorafit.stopping import in_worker

log = logging.getLogger(__name__)


@dataclass
class Window:
    """The examples of a window, and what became of its rows; or the error that ended it."""

    sequences: Sequences
    report: Report
    error: str | None = None


class _Windows(IterableDataset):
    """Windows first, first + replicas, …: of this replica, from its window number `skip` on."""

    def __init__(self, stream: StreamLoader, epoch: int, skip: int) -> None:
        self.stream, self.epoch, self.skip = stream, epoch, skip

    def __iter__(self) -> Iterator[Window]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        stream = self.stream
        step = stream.replicas * count
        wanted = stream.replica + stream.replicas * (self.skip + number)
        rows = stream.rows(self.epoch)
        rows = itertools.islice(rows, wanted * stream.window, None)
        try:
            while mine := list(itertools.islice(rows, stream.window)):
                yield stream.read(mine)
                # read past the windows of the others
                for _ in itertools.islice(rows, (step - 1) * stream.window):
                    pass
        except InputError as error:
            # raised again by the process that trains: torch would wrap it in a traceback of its own
            yield Window(Builder().sequences(), Report(), str(error))


class StreamLoader:
    """`length` batches from a stream of rows; `state_dict()` says where it stands, as ResumableLoader's does.

    window: rows that are shuffled together. eval_fraction: rows whose prompt falls below it by its hash are held out
    and not trained. packing: rows of at most the encoder's max_length. vocabulary: how many tokens the model knows.
    max_lost: the share of answers lost to max_length above which a warning is logged. `report` counts what was read
    so far.
    """

    def __init__(
        self,
        sources: list[Source],
        encoder: Encoder,
        *,
        length: int,
        batch_size: int,
        pad_id: int,
        window: int = 4096,
        packing: bool = False,
        padding_free: bool = False,
        group_by_length: bool = False,
        eval_fraction: float = 0.0,
        limit: int | None = None,
        split: str = "train",
        on_bad_row: str = "error",
        vocabulary: int | None = None,
        max_lost: float = 1.0,
        seed: int = 0,
        num_workers: int = 0,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        self.encoder, self.length, self.batch_size, self.pad_id = encoder, length, batch_size, pad_id
        self.window, self.packing, self.padding_free = window, packing, padding_free
        self.group_by_length, self.vocabulary = group_by_length, vocabulary
        self.eval_fraction, self.limit, self.split, self.on_bad_row = eval_fraction, limit, split, on_bad_row
        self.max_lost, self._warned = max_lost, False
        self.seed, self.num_workers, self.replica, self.replicas = seed, num_workers, replica, replicas
        self.sources = _told(sources, split)
        self.report = Report(formats=[source.format for source in self.sources], unused=[[] for _ in sources])
        self.examples = self.tokens = self.supervised_tokens = 0
        self.epoch = self.at_window = self.position = self.handed_out = 0

    def __len__(self) -> int:
        return self.length

    def rows(self, epoch: int) -> Iterator[tuple[int, Row]]:
        """The rows of an epoch as they are found."""
        return draw_rows(self.sources, self.split, streaming=True, seed=self.seed + epoch, limit=self.limit)

    def read(self, rows: list[tuple[int, Row]], *, check: bool = False) -> Window:
        """The examples of a window of rows, held-out ones left out. check: look at the labels of about 128 of them, and
        of those whose text is not as it was written, and note how long they are."""
        pipeline, built = Pipeline(self.sources, self.encoder, on_bad_row=self.on_bad_row), Builder()
        for index, (_, example, encoded) in enumerate(pipeline.encode(rows)):
            if check and (index % max(1, len(rows) // 128) == 0 or not encoded.as_written):
                pipeline.report.blame(check_labels(self.encoder, example, encoded))
            if self.eval_fraction and example.position() < self.eval_fraction:
                continue
            if check:
                pipeline.report.lengths.append(len(encoded.ids))
            if (kept := pipeline.fit(example, encoded)) is not None:
                built.add(kept, example.key(), example.where)
        found = built.sequences()
        if self.vocabulary is not None:
            require_vocabulary(found, self.vocabulary, self.encoder)
        return Window(found, pipeline.finish())

    def window_loader(self, sequences: Sequences, window: int) -> ResumableLoader:
        """The batches of a window: `batches(epoch)` gives their rows."""
        rows = best_fit(sequences.lengths, self.encoder.max_length) if self.packing else None
        return ResumableLoader(
            sequences,
            self.batch_size,
            self.pad_id,
            rows=rows,
            padding_free=self.padding_free,
            shuffle=True,
            group_by_length=self.group_by_length,
            seed=self.seed + 104_729 * (window + 1),
        )

    def __iter__(self) -> Iterator[Batch]:
        while self.handed_out < self.length:
            loader: DataLoader[Any] = DataLoader(
                _Windows(self, self.epoch, self.at_window),
                batch_size=None,
                num_workers=self.num_workers,
                worker_init_fn=in_worker,
                collate_fn=_as_it_is,  # type: ignore[arg-type]  # without a batch size it is given one window
                prefetch_factor=1 if self.num_workers else None,
                generator=torch.Generator().manual_seed(self.seed),
            )
            found = self.at_window > 0
            for window in loader:
                if window.error is not None:
                    raise InputError(window.error)
                if not self.position:
                    self._count(window)
                number = self.replica + self.replicas * self.at_window
                found = found or len(window.sequences) > 0
                order = self.window_loader(window.sequences, number)
                for batch in order.batches(self.epoch)[self.position :]:
                    self.position += 1
                    self.handed_out += 1
                    yield order.batch(batch)
                    if self.handed_out == self.length:
                        return
                self.at_window, self.position = self.at_window + 1, 0
            if not found:
                which = f" of those that fall to process {self.replica + 1} of {self.replicas}"
                raise InputError(
                    f"no row of the data{which if self.replicas > 1 else ''} has a token to train: look at it with "
                    f"`python -m lorafit.audit`{', or lower data.window' if self.replicas > 1 else ''}"
                )
            self.epoch, self.at_window, self.position = self.epoch + 1, 0, 0

    def _count(self, window: Window) -> None:
        if self.epoch == 0:
            self.report.add(window.report)
            self.examples += len(window.sequences)
            self.tokens += len(window.sequences.ids)
            self.supervised_tokens += int(window.sequences.trained.sum())
            seen = self.examples + self.report.dropped
            if not self._warned and self.report.lost > self.max_lost * seen:
                self._warned = True
                log.warning(
                    f"{self.report.lost:,} of the {seen:,} examples read so far ({self.report.lost / seen:.1%}) lose "
                    f"their answer to data.max_length={self.encoder.max_length}; data.max_lost is {self.max_lost:g}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Epoch, window, batches of it handed out, batches handed out in all, and what was counted."""
        return {
            "epoch": self.epoch,
            "window": self.at_window,
            "position": self.position,
            "handed_out": self.handed_out,
            "examples": self.examples,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "report": self.report.as_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next iteration."""
        self.epoch, self.at_window = state["epoch"], state["window"]
        self.position, self.handed_out = state["position"], state["handed_out"]
        self.examples, self.tokens = state["examples"], state["tokens"]
        self.supervised_tokens, self.report = state["supervised_tokens"], Report.of(state["report"])


def _as_it_is(window: Window) -> Window:
    return window


def _told(sources: list[Source], split: str) -> list[Source]:
    """The sources with the layout that their first row has: workers must not each find their own."""
    told = []
    for source in sources:
        formatter = Formatter(source.format, source.columns)
        for row in itertools.islice(read_rows(source, split, streaming=True), 100):
            try:
                formatter(row)
            except InputError:
                continue  # said when its turn comes
            break
        told.append(replace(source, format=formatter.format))
    return told
