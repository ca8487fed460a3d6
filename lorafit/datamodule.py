"""The LightningDataModule: from what people have to labelled batches, with some rows held out.

Everything is read and tokenized once, in `setup`, before any model is loaded, and what would fail in silence is found
then (`refusals`): what is wrong with the data is known within seconds. With streaming only the rows to measure on and
the first window are read before training starts.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np

from lorafit.data import (
    Encoder,
    Example,
    Pipeline,
    Report,
    ResumableLoader,
    StreamLoader,
    held_out_sources,
    load_tokenizer,
    parse_sources,
    read_corpus,
)
from lorafit.data.checks import (
    NEVER_ALLOWED,
    Refusal,
    check_sequences,
    check_template,
    one_of_each,
    require_vocabulary,
    way_past,
)
from lorafit.data.corpus import ON_BAD_ROW
from lorafit.data.loader import Share, shares_of
from lorafit.data.packing import best_fit
from lorafit.data.sources import draw_rows
from lorafit.data.store import Builder
from lorafit.data.tokens import Sequence
from lorafit.errors import InputError, did_you_mean

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FinetuneDataModule(L.LightningDataModule):
    """Rows of `path` for training; for evaluation those of `eval_path`, or those that a folder holds out by its files'
    names, or else a share of the rows chosen by a hash of the prompt.

    path: a file, a folder, a hub name, "embedded", or a list of those, mixed by weight (see `parse_sources`); split,
    eval_split: of a data set of the hub. tokenizer: an object, or the model name to load it by. format, columns: see
    `Formatter`. template, max_length, train_on, overflow, system: see `Encoder`. on_bad_row: "error", or "skip" to
    leave bad rows out and count them. packing: examples share rows of max_length tokens; padding_free: a batch is one
    row. group_by_length: batches of similar lengths. streaming: read while training, `stream_batches` batches in all.
    cache: keep what was tokenized. limit: at most so many rows are read; eval_limit: at most so many are held out in
    use. max_lost: the share of answers that max_length may cost; allow: names of checks that may fail.
    After `setup`: `train_sequences` (empty with streaming), `eval_sequences`, `eval_examples`, `statistics()`,
    `refusals()`.
    """

    def __init__(
        self,
        path: Any = "embedded",
        *,
        tokenizer: PreTrainedTokenizerBase | str = "embedded",
        eval_path: Any = None,
        eval_fraction: float = 0.05,
        eval_limit: int | None = None,
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        subset: str | None = None,
        split: str = "train",
        eval_split: str = "test",
        template: str = "auto",
        max_length: int = 512,
        train_on: str = "completion",
        overflow: str = "drop",
        system: str = "keep",
        on_bad_row: str = "error",
        packing: bool = False,
        padding_free: bool = False,
        group_by_length: bool = False,
        streaming: bool = False,
        window: int = 4096,
        stream_batches: int | None = None,
        cache: bool = False,
        max_lost: float = 0.2,
        allow: Iterable[str] = (),
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        limit: int | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if on_bad_row not in ON_BAD_ROW:
            raise InputError(
                f"data.on_bad_row must be one of {', '.join(ON_BAD_ROW)}, got {on_bad_row!r}."
                f"{did_you_mean(on_bad_row, ON_BAD_ROW)}"
            )
        if streaming and eval_limit is None:
            raise InputError("data.streaming=true: say how many rows are held out, with task.eval_examples")
        self.path, self.eval_path = path, eval_path
        self.sources = parse_sources(path, format=format, columns=columns, subset=subset)
        self.eval_sources = (
            parse_sources(eval_path, format=format, columns=columns, subset=subset, key="data.eval_path")
            if eval_path
            else held_out_sources(self.sources)
        )
        if self.eval_sources:  # each row is measured on once, whatever its source weighs in training
            self.eval_sources = [replace(source, weight=None) for source in self.eval_sources]
        self.eval_fraction, self.eval_limit, self.limit = eval_fraction, eval_limit, limit
        self.split, self.eval_split, self.on_bad_row = split, eval_split, on_bad_row
        self.packing, self.padding_free, self.group_by_length = packing, padding_free, group_by_length
        self.streaming, self.window, self.stream_batches = streaming, window, stream_batches
        self.cache, self.max_lost, self.allow = cache, max_lost, tuple(allow)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.encoder = Encoder(
            self.tokenizer,
            template=template,
            max_length=max_length,
            train_on=train_on,
            overflow=overflow,
            system=system,
        )
        self.train_sequences = self.eval_sequences = Builder().sequences()
        self.eval_examples: list[Example] = []
        self.report = Report()
        self._sizes: list[int] = []
        self._rows: list[list[int]] | None = None
        self._row_sizes: list[int] = []
        self._stream: StreamLoader | None = None
        self._vocabulary: int | None = None
        self._content: str | None = None
        self._ready = False

    # ---------------------------------------------------------------------------------------------- reading

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize; a second call does nothing. Raises InputError for what cannot be read."""
        if self._ready:
            return
        if self.streaming:
            self._setup_stream()
        else:
            corpus = read_corpus(
                self.sources,
                self.encoder,
                eval_sources=self.eval_sources,
                eval_fraction=self.eval_fraction,
                eval_limit=self.eval_limit,
                limit=self.limit,
                split=self.split,
                eval_split=self.eval_split,
                on_bad_row=self.on_bad_row,
                cache=self.cache,
            )
            self.train_sequences, self.eval_sequences = corpus.train, corpus.held_out
            self.eval_examples, self.report, self._sizes = corpus.held_out_examples, corpus.report, corpus.sizes
            self._pack()
            self._shares()
        self._ready = True

    def _pack(self) -> None:
        """Rows of each source by itself, so that weights stay those of the sources."""
        if not self.packing:
            self._row_sizes = self._sizes
            return
        self._rows, start = [], 0
        for size in self._sizes:
            lengths = self.train_sequences.lengths[start : start + size]
            rows = [[start + at for at in row] for row in best_fit(lengths, self.encoder.max_length)]
            self._rows += rows
            self._row_sizes.append(len(rows))
            start += size

    def _shares(self) -> list[Share] | None:
        """What of an epoch each source has; None without weights. Raises InputError where one has nothing to give."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return shares_of(self._row_sizes, weights) if weights and any(self._row_sizes) else None

    def _setup_stream(self) -> None:
        """The rows to measure on, and the first window for the checks."""
        sources = self.eval_sources or self.sources
        pipeline, built = Pipeline(sources, self.encoder, on_bad_row=self.on_bad_row), Builder()
        split, limit = (self.eval_split, None) if self.eval_sources else (self.split, self.limit)
        rows = draw_rows(sources, split, streaming=True, seed=self.seed, limit=limit)
        seen: set[str] = set()  # with weights a short source begins anew
        for _, example, encoded in pipeline.encode(rows):
            if (self.eval_sources is None and example.position() >= self.eval_fraction) or example.where in seen:
                continue
            seen.add(example.where)
            if (kept := pipeline.fit(example, encoded)) is not None:
                built.add(kept, example.key(), example.where)
                self.eval_examples.append(example)
            if len(built) == self.eval_limit:
                break
        if not len(built):
            raise InputError(
                f"no row of {pipeline.describe()} is held out to be measured on: give data.eval_path, or raise "
                "data.eval_fraction"
            )
        self.eval_sequences = built.sequences()
        stream = self._stream_loader(1)
        first = list(itertools.islice(stream.rows(0), self.window))
        window = stream.read(first, check=True)
        self.train_sequences, self.report = window.sequences, window.report
        self.report.held_out(pipeline.report)
        if not len(self.train_sequences) and not self.report.lost + self.report.untrained:
            bad = f"; the first that is bad: {self.report.bad_rows[0]}" if self.report.bad_rows else ""
            names = ", ".join(repr(source.path) for source in self.sources)
            raise InputError(f"the first {len(first)} rows of {names} give nothing to train{bad}")

    # ---------------------------------------------------------------------------------------------- proof

    def refusals(self) -> list[Refusal]:
        """What is wrong with the data in a way that training would not show; empty when it may begin."""
        found = [
            *check_template(self.encoder),
            *self.report.faults,
            *check_sequences(
                self.encoder,
                self.train_sequences,
                lost=self.report.lost,
                examples=len(self.report.lengths),
                max_lost=self.max_lost,
                lengths=self.report.lengths,
            ),
        ]
        return one_of_each(found, set(self.allow) - {NEVER_ALLOWED})

    def require_proof(self) -> None:
        """Raise InputError that lists the refusals and how to go on, if there are any."""
        if found := self.refusals():
            said = "\n".join(refusal.message for refusal in found)
            past = way_past(refusal.check for refusal in found)
            raise InputError(f"{said}. ({past}{'; ' * bool(past)}`python -m lorafit.audit` shows more.)")

    def first_examples(self) -> Iterator[Example]:
        """The good rows that are for training, from the beginning, before anything is cut."""
        pipeline = Pipeline(self.sources, self.encoder, on_bad_row="skip")
        rows = draw_rows(self.sources, self.split, streaming=self.streaming, seed=self.seed, limit=self.limit)
        held_out = {example.position() for example in self.eval_examples}  # in a small file also above the fraction
        for _, example, _ in pipeline.encode(rows):
            position = example.position()
            if self.eval_sources is not None or (position >= self.eval_fraction and position not in held_out):
                yield example

    def duplicates(self) -> np.ndarray:
        """The numbers of the training examples that repeat an earlier one, of another row."""
        train = self.train_sequences
        rows = np.arange(len(train))
        if self.streaming:  # with weights a row may come twice
            _, rows = np.unique(np.stack((train.origin, train.number)), axis=1, return_index=True)
            rows.sort()
        _, first = np.unique(train.keys[rows], return_index=True)
        return np.delete(rows, first)

    def leaked(self) -> np.ndarray:
        """The numbers of the training examples that are held out as well."""
        return np.flatnonzero(np.isin(self.train_sequences.keys, self.eval_sequences.keys))

    def check_vocabulary(self, size: int) -> None:
        """Raise InputError, naming the row, if a token id lies outside a vocabulary of `size`; what is streamed later
        is checked as it comes."""
        self._vocabulary = size
        for sequences in (self.train_sequences, self.eval_sequences):
            require_vocabulary(sequences, size, self.encoder)

    def statistics(self) -> dict[str, Any]:
        """The `data` part of metrics.json. With streaming it counts what was read so far."""
        report, stream = self.report, self._stream
        train: dict[str, Any] = {
            "train_examples": len(self.train_sequences),
            "eval_examples": len(self.eval_sequences),
            "train_tokens": len(self.train_sequences.ids),
            "supervised_tokens": int(self.train_sequences.trained.sum()),
        }
        if stream is not None:
            report = stream.report
            train |= {
                "train_examples": stream.examples,
                "train_tokens": stream.tokens,
                "supervised_tokens": stream.supervised_tokens,
            }
        return train | {
            "truncated_examples": report.truncated,
            "dropped_examples": report.dropped,
            "untrained_examples": report.untrained,
            "eval_truncated_examples": self.report.eval_truncated,
            "eval_dropped_examples": self.report.eval_dropped,
            "eval_unused_examples": self.report.eval_unused,
            "skipped_rows": report.skipped,
            "duplicate_examples": len(self.duplicates()),
            "leaked_examples": len(self.leaked()),
            "formats": self.report.formats,
            "packed_rows": len(self._rows) if self._rows is not None else None,
            "streaming": self.streaming,
        }

    def content_hash(self) -> str | None:
        """A SHA-256 over the training sequences, tokens and labels, in file order; None where they are streamed."""
        if self._content is None and not self.streaming:
            digest = hashlib.sha256()
            _add(digest, self.train_sequences)
            self._content = digest.hexdigest()
        return self._content

    def data_hash(self) -> str:
        """`content_hash`; of what is streamed, a SHA-256 over the first window, the rows to measure on, and the sizes
        of the files: nobody has read them to their end."""
        whole = self.content_hash()
        weights = [source.weight for source in self.sources]
        if whole is not None and not any(weights):
            return whole
        if whole is not None:  # in which order the rows of a mixture come
            return hashlib.sha256(f"{whole} {weights} {self._row_sizes}".encode()).hexdigest()
        digest = hashlib.sha256(repr(weights).encode())
        for sequences in (self.train_sequences, self.eval_sequences):
            _add(digest, sequences)
        for source in self.sources:
            path = Path(source.path)
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            digest.update(repr([file.stat().st_size for file in files if file.is_file()]).encode())
        return digest.hexdigest()

    def eval_hash(self) -> str:
        """SHA-256 over the held-out rows."""
        digest = hashlib.sha256()
        _add(digest, self.eval_sequences)
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """What the position in the data, which the loader keeps, is a position in."""
        return {"content": self.content_hash()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say so where the data is another one than the checkpoint's."""
        if state_dict["content"] != self.content_hash():
            log.warning(
                "resume: the training tokens are not those that the run began with (the rows, the tokenizer, or a "
                "setting of data.* has changed), so that the position in them means little: rows that were trained "
                "may now be held out, or come again"
            )

    def template_hash(self) -> str:
        """A SHA-256 of the template that turns conversations into text."""
        chat = self.encoder.chat
        text = chat.source if chat is not None else f"plain, headings {self.encoder.plain.headings}"
        return hashlib.sha256(text.encode()).hexdigest()

    def sample_for_packing(self, count: int = 4, longest: int = 512) -> list[Sequence]:
        """A few training examples that would stand in one row, of together at most `longest` tokens if there are
        any."""
        lengths = self.train_sequences.lengths
        chosen = np.argsort(lengths, kind="stable")
        # neither the shortest, which show little, nor those that would cost much
        start = max(0, min(int(np.searchsorted(np.sort(lengths), longest // count)), len(chosen)) - count)
        return [self.train_sequences[int(index)] for index in chosen[start : start + count]]

    # ---------------------------------------------------------------------------------------------- batches

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """This process's share of the training batches, in a new order each epoch."""
        replica, replicas = self._replica()
        if self.streaming:
            if self.stream_batches is None:
                raise InputError("data.streaming=true: the data has no known end, so trainer.max_steps must be given")
            self._stream = self._stream_loader(self.stream_batches, replica, replicas)
            return self._stream
        return ResumableLoader(
            self.train_sequences,
            self.batch_size,
            int(self.tokenizer.pad_token_id),
            rows=self._rows,
            padding_free=self.padding_free,
            shuffle=True,
            shares=self._shares(),
            group_by_length=self.group_by_length,
            seed=self.seed,
            num_workers=self.num_workers,
            replica=replica,
            replicas=replicas,
        )

    def _stream_loader(self, length: int, replica: int = 0, replicas: int = 1) -> StreamLoader:
        return StreamLoader(
            self.sources,
            self.encoder,
            length=length,
            batch_size=self.batch_size,
            pad_id=int(self.tokenizer.pad_token_id),
            window=self.window,
            packing=self.packing,
            padding_free=self.padding_free,
            group_by_length=self.group_by_length,
            eval_fraction=0.0 if self.eval_sources else self.eval_fraction,
            limit=self.limit,
            split=self.split,
            on_bad_row=self.on_bad_row,
            vocabulary=self._vocabulary,
            max_lost=1.0 if "answer_lost" in self.allow else self.max_lost,
            seed=self.seed,
            num_workers=self.num_workers,
            replica=replica,
            replicas=replicas,
        )

    def _replica(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def val_dataloader(self) -> ResumableLoader:
        """This process's share of the held-out batches."""
        return self._eval_loader(*self._replica())

    def eval_batches(self) -> ResumableLoader:
        """All held-out batches, whatever the number of processes."""
        return self._eval_loader(0, 1)

    def _eval_loader(self, replica: int, replicas: int) -> ResumableLoader:
        return ResumableLoader(
            self.eval_sequences,
            self.eval_batch_size,
            int(self.tokenizer.pad_token_id),
            seed=self.seed,
            replica=replica,
            replicas=replicas,
            whole=True,
        )


def _add(digest: Any, sequences: Any) -> None:
    """Sequences to a digest, as they are stored."""
    for array in (sequences.ids, sequences.trained, sequences.offsets):
        digest.update(np.ascontiguousarray(array).data)
