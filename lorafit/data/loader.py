"""Batches in an order that a checkpoint can continue.

The order of an epoch depends on the seed and the epoch alone, and the position is counted in batches handed out, so a
run that stopped in the middle of an epoch goes on with the very next batch, with any number of worker processes.
Nothing here draws from torch's global generator: looking at held-out data must not change what dropout does afterwards.

A batch has `input_ids` and `labels` [rows, length], `tokens` (how many are not padding), and either
`attention_mask` (one example a row, padded on the right) or `position_ids` that begin anew with each of the examples
in a row. Those take the place of a mask: transformers builds block-diagonal attention from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lorafit.data.tokens import IGNORE, Sequence
from lorafit.errors import InputError
from lorafit.stopping import in_worker

Batch = dict[str, Tensor]


class Examples(Protocol):
    """What a loader reads: a list of sequences, or a store of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sequence: ...


# so many batches are sorted by length together: enough for little padding, few enough for a random order
_SORTED_TOGETHER = 50


def collate(sequences: Seq[Sequence], pad_id: int) -> Batch:
    """One example a row: tensors [batch, longest], padded on the right with pad_id, labels with -100."""
    lengths = [len(sequence["input_ids"]) for sequence in sequences]
    ids = np.full((len(sequences), max(lengths)), pad_id, dtype=np.int64)
    labels = np.full(ids.shape, IGNORE, dtype=np.int64)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        ids[row, :length], labels[row, :length] = sequence["input_ids"], sequence["labels"]
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "labels": torch.from_numpy(labels),
        "tokens": torch.tensor(sum(lengths)),
    }


def collate_packed(rows: Seq[Seq[Sequence]], pad_id: int) -> Batch:
    """Several examples a row, end to end: tensors [batch, longest row], with position ids.

    The first token of an example is never trained: what stands before it is another example. What fills up a row is one
    more example of its own, and nothing of it is trained.
    """
    lengths = [sum(len(sequence["input_ids"]) for sequence in row) for row in rows]
    ids = np.full((len(rows), max(lengths)), pad_id, dtype=np.int64)
    labels = np.full(ids.shape, IGNORE, dtype=np.int64)
    positions = np.zeros(ids.shape, dtype=np.int64)
    for number, row in enumerate(rows):
        at = 0
        for sequence in row:
            end = at + len(sequence["input_ids"])
            ids[number, at:end], labels[number, at:end] = sequence["input_ids"], sequence["labels"]
            labels[number, at] = IGNORE
            positions[number, at:end] = np.arange(end - at)
            at = end
        positions[number, at:] = np.arange(ids.shape[1] - at)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
        "tokens": torch.tensor(sum(lengths)),
    }


def collate_rows(rows: Seq[Seq[Sequence]], pad_id: int, *, packed: bool, padding_free: bool) -> Batch:
    """A batch of rows of examples: end to end in one row (padding_free), in rows of their own (packed), or padded."""
    if padding_free:
        return collate_packed([[sequence for row in rows for sequence in row]], pad_id)
    if packed:
        return collate_packed(rows, pad_id)
    return collate([sequence for row in rows for sequence in row], pad_id)


@dataclass(frozen=True)
class Share:
    """The rows start … stop of a loader are one source, and so many of them are handed out in an epoch."""

    start: int
    stop: int
    count: int


def shares_of(sizes: Seq[int], weights: Seq[float]) -> list[Share]:
    """Shares of an epoch as long as all sources together, in which each has rows in proportion to its weight.

    Raises InputError for a source that has no rows: its weight could not be kept.
    """
    if 0 in sizes:
        raise InputError(
            f"data.path: source {list(sizes).index(0) + 1} of {len(sizes)} has a weight, and no row of it is left to "
            "train, since they are dropped or held out: leave it out, give data.eval_path, or raise data.max_length"
        )
    total, edges = sum(sizes), np.concatenate(([0], np.cumsum(sizes))).tolist()
    counts = [max(1, round(total * weight / sum(weights))) for weight in weights]
    return [Share(start, stop, count) for start, stop, count in zip(edges, edges[1:], counts, strict=False)]


class _Rows:
    """What worker processes read: row i, as a list of examples."""

    def __init__(self, sequences: Examples, rows: Seq[Seq[int]] | None) -> None:
        self.sequences, self.rows = sequences, rows

    def __len__(self) -> int:
        return len(self.sequences) if self.rows is None else len(self.rows)

    def lengths(self) -> Tensor:
        """The tokens of each row."""
        own = getattr(self.sequences, "lengths", None)
        each = own
        if each is None:
            each = [len(self.sequences[at]["input_ids"]) for at in range(len(self.sequences))]
        if self.rows is not None:
            each = [sum(int(each[at]) for at in row) for row in self.rows]
        return torch.tensor(np.asarray(each))

    def __getitem__(self, index: int) -> list[Sequence]:
        return [self.sequences[at] for at in ([index] if self.rows is None else self.rows[index])]


class ResumableLoader:
    """Iterates over batches; `state_dict()` says where it stands, and `load_state_dict()` puts it there.

    rows: which examples are packed together; None: each is a row of its own. padding_free: a batch is one row.
    With shuffle the order is drawn anew each epoch from (seed, epoch); without it the next two have no say. shares: how
    many rows of each source an epoch has; over several epochs every row of a source comes up before one comes up again.
    group_by_length: batches of rows of about the same length. `replica` of `replicas` gives each of several processes
    its own share of the batches, the same number to each; the few left over wait for another epoch. With `whole`
    none is left over: who has one less gets a batch in which nothing is supervised.
    """

    def __init__(
        self,
        sequences: Examples,
        batch_size: int,
        pad_id: int,
        *,
        rows: Seq[Seq[int]] | None = None,
        padding_free: bool = False,
        shuffle: bool = False,
        shares: Seq[Share] | None = None,
        group_by_length: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        replica: int = 0,
        replicas: int = 1,
        whole: bool = False,
    ) -> None:
        self.data, self.batch_size = _Rows(sequences, rows), batch_size
        self._collate = partial(collate_rows, pad_id=pad_id, packed=rows is not None, padding_free=padding_free)
        self.shuffle, self.seed, self.num_workers = shuffle, seed, num_workers
        self.shares = list(shares) if shares and shuffle else None
        self.group_by_length = group_by_length and shuffle
        self.replica, self.replicas, self.whole = replica, replicas, whole
        self.epoch = self.position = 0

    def __len__(self) -> int:
        rows = sum(share.count for share in self.shares) if self.shares else len(self.data)
        batches = -(-rows // self.batch_size)
        if self.whole:
            return -(-batches // self.replicas)
        return batches if self.replicas == 1 else max(1, batches // self.replicas)

    def order(self, epoch: int) -> Tensor:
        """The rows of an epoch, in order."""
        if not self.shuffle:
            return torch.arange(len(self.data))
        if self.shares is None:
            return torch.randperm(len(self.data), generator=self._generator(epoch))
        drawn = []
        for number, share in enumerate(self.shares):
            # an endless sequence of shufflings of the source, of which each epoch takes the next `count`
            size, start = share.stop - share.start, epoch * share.count
            rounds = range(start // size, (start + share.count - 1) // size + 1)
            endless = torch.cat([torch.randperm(size, generator=self._generator(turn, number + 1)) for turn in rounds])
            drawn.append(share.start + endless[start % size : start % size + share.count])
        together = torch.cat(drawn)
        return together[torch.randperm(len(together), generator=self._generator(epoch))]

    def _generator(self, turn: int, stream: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + stream * 7_919_000_003 + turn)

    def batches(self, epoch: int) -> list[list[int]]:
        """The rows of each batch of an epoch, in order."""
        order = self.order(epoch)
        if self.group_by_length:
            lengths = self.data.lengths()[order]
            sorted_parts = []
            for start in range(0, len(order), _SORTED_TOGETHER * self.batch_size):
                part = slice(start, start + _SORTED_TOGETHER * self.batch_size)
                sorted_parts.append(order[part][torch.argsort(lengths[part], descending=True, stable=True)])
            batches = [chunk.tolist() for part in sorted_parts for chunk in part.split(self.batch_size)]
            shuffled = torch.randperm(len(batches), generator=self._generator(epoch, -1)).tolist()
            batches = [batches[index] for index in shuffled]
        else:
            batches = [chunk.tolist() for chunk in order.split(self.batch_size)]
        if self.whole:
            return batches[self.replica :: self.replicas]
        return [
            batches[index % len(batches)] for index in range(self.replica, self.replicas * len(self), self.replicas)
        ]

    def batch(self, rows: Seq[int]) -> Batch:
        """The rows of one batch as tensors."""
        return self._collate([self.data[row] for row in rows])

    def __iter__(self) -> Iterator[Batch]:
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        loader: DataLoader[Any] = DataLoader(
            self.data,  # type: ignore[arg-type]
            batch_sampler=self.batches(self.epoch)[self.position :],
            collate_fn=self._collate,
            num_workers=self.num_workers,
            worker_init_fn=in_worker,
            generator=torch.Generator().manual_seed(self.seed),
        )
        for batch in loader:
            # counted before it is handed out: whoever holds the batch finds it counted
            self.position += 1
            yield batch
        if self.position < len(self):
            self.position += 1
            blank = self.batch([0])
            blank["labels"] = torch.full_like(blank["labels"], IGNORE)
            yield blank

    def state_dict(self) -> dict[str, int]:
        """Epoch, and number of its batches handed out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there at the next iteration."""
        self.epoch, self.position = state["epoch"], state["position"]
