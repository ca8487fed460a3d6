"""Batches in an order that a checkpoint can continue.

The order of an epoch depends on the seed and the epoch alone, and the position is counted in batches handed out, so a
run that stopped in the middle of an epoch goes on with the very next batch, with or without worker processes. Nothing
here draws from torch's global generator: looking at held-out data must not change what dropout does afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lorafit.data.tokens import IGNORE, Sequence

Batch = dict[str, Tensor]


def collate(sequences: list[Sequence], pad_id: int) -> Batch:
    """Sequences as tensors [batch, longest], padded on the right with pad_id, labels with -100."""
    longest = max(len(sequence["input_ids"]) for sequence in sequences)

    def padded(key: str, filler: int) -> Tensor:
        return torch.tensor([sequence[key] + [filler] * (longest - len(sequence[key])) for sequence in sequences])

    lengths = torch.tensor([[len(sequence["input_ids"])] for sequence in sequences])
    return {
        "input_ids": padded("input_ids", pad_id),
        "attention_mask": (torch.arange(longest) < lengths).long(),
        "labels": padded("labels", IGNORE),
    }


class ResumableLoader:
    """Iterates over batches; `state_dict()` says where it stands, and `load_state_dict()` puts it there.

    With shuffle the order is drawn anew each epoch from (seed, epoch). `replica` of `replicas` gives each
    of several processes its own share of the batches, the same number to each; the few left over wait for
    another epoch.
    """

    def __init__(
        self,
        sequences: list[Sequence],
        batch_size: int,
        pad_id: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        self.sequences, self.batch_size, self.pad_id = sequences, batch_size, pad_id
        self.shuffle, self.seed, self.num_workers = shuffle, seed, num_workers
        self.replica, self.replicas = replica, replicas
        self.epoch = self.position = 0

    def __len__(self) -> int:
        batches = -(-len(self.sequences) // self.batch_size)
        return batches if self.replicas == 1 else max(1, batches // self.replicas)

    def batches(self, epoch: int) -> list[list[int]]:
        """The indices of each batch of an epoch, in order."""
        order = torch.arange(len(self.sequences))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.sequences), generator=generator)
        batches = [chunk.tolist() for chunk in order.split(self.batch_size)]
        return [
            batches[index % len(batches)] for index in range(self.replica, self.replicas * len(self), self.replicas)
        ]

    def __iter__(self) -> Iterator[Batch]:
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        loader: DataLoader[Any] = DataLoader(
            self.sequences,  # type: ignore[arg-type]
            batch_sampler=self.batches(self.epoch)[self.position :],
            collate_fn=partial(collate, pad_id=self.pad_id),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
        )
        for batch in loader:
            # counted before it is handed out: whoever holds the batch finds it counted
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and number of its batches handed out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there at the next iteration."""
        self.epoch, self.position = state["epoch"], state["position"]
