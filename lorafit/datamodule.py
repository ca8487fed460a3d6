"""The LightningDataModule: from a path to labelled batches, with some rows held out.

Everything is read and tokenized once, in `setup`, before any model is loaded: what is wrong with the data is known
within seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import lightning as L

from lorafit.data import Encoder, Example, ResumableLoader, load_examples, load_tokenizer, split_held_out
from lorafit.data.tokens import IGNORE, Sequence
from lorafit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FinetuneDataModule(L.LightningDataModule):
    """Rows of `path` for training; for evaluation those of `eval_path`, or else a share of the rows held out by hash.

    tokenizer: an object, or the model name to load it by. format, columns: see `load_examples`. template, max_length,
    train_on: see `Encoder`. limit: at most so many rows are read; eval_limit: at most so many are held out in use.
    After `setup`: `train_examples`, `eval_examples`, `train_sequences`, `eval_sequences`, `statistics()`.
    """

    def __init__(
        self,
        path: str = "embedded",
        *,
        tokenizer: PreTrainedTokenizerBase | str = "embedded",
        eval_path: str | None = None,
        eval_fraction: float = 0.05,
        eval_limit: int | None = None,
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        template: str = "auto",
        max_length: int = 512,
        train_on: str = "completion",
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        limit: int | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.path, self.eval_path, self.eval_fraction, self.eval_limit = path, eval_path, eval_fraction, eval_limit
        self.format, self.columns, self.limit = format, columns, limit
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.encoder = Encoder(self.tokenizer, template=template, max_length=max_length, train_on=train_on)
        self.train_examples: list[Example] = []
        self.eval_examples: list[Example] = []
        self.train_sequences: list[Sequence] = []
        self.eval_sequences: list[Sequence] = []

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize; a second call does nothing."""
        if self.train_sequences:
            return
        examples = load_examples(self.path, format=self.format, columns=self.columns, limit=self.limit)
        eval_path = self.eval_path or ("embedded" if self.path == "embedded" else None)
        if eval_path:
            held_out = load_examples(eval_path, format=self.format, columns=self.columns, split="test")
        else:
            examples, held_out = split_held_out(examples, self.eval_fraction)
        self.train_examples, self.eval_examples = examples, held_out[: self.eval_limit]
        # held-out rows first, so that the counts of the encoder end up those of the training rows
        self.eval_sequences = self.encoder.encode_all(self.eval_examples)
        self.encoder.truncated = self.encoder.dropped = 0
        self.train_sequences = self.encoder.encode_all(self.train_examples)
        for kind, sequences in (("training", self.train_sequences), ("held-out", self.eval_sequences)):
            if not sequences:
                raise InputError(
                    f"no {kind} row of {self.path!r} has a token to train within data.max_length="
                    f"{self.encoder.max_length}: raise it"
                )

    def check_vocabulary(self, size: int) -> None:
        """Raise InputError if a token id lies outside a vocabulary of `size`: the tokenizer is another model's."""
        largest = max(max(sequence["input_ids"]) for sequence in [*self.train_sequences, *self.eval_sequences])
        if largest >= size:
            raise InputError(
                f"the tokenizer gives token id {largest}, the model knows {size} tokens: they do not belong together"
            )

    def statistics(self) -> dict[str, int]:
        """The `data` part of metrics.json."""
        return {
            "train_examples": len(self.train_sequences),
            "eval_examples": len(self.eval_sequences),
            "train_tokens": sum(len(sequence["input_ids"]) for sequence in self.train_sequences),
            "supervised_tokens": sum(
                sum(label != IGNORE for label in sequence["labels"]) for sequence in self.train_sequences
            ),
            "truncated_examples": self.encoder.truncated,
            "dropped_examples": self.encoder.dropped,
        }

    def content_hash(self) -> str:
        """A SHA-256 over the training sequences, tokens and labels: what was really trained, in file order."""
        digest = hashlib.sha256()
        for sequence in self.train_sequences:
            digest.update(repr((sequence["input_ids"], sequence["labels"])).encode())
        return digest.hexdigest()

    def train_dataloader(self) -> ResumableLoader:
        """This process's share of the training batches, in a new order each epoch."""
        return self._loader(self.train_sequences, self.batch_size, shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        """This process's share of the held-out batches."""
        return self._loader(self.eval_sequences, self.eval_batch_size, shuffle=False)

    def eval_batches(self) -> ResumableLoader:
        """All held-out batches, whatever the number of processes."""
        return self._loader(self.eval_sequences, self.eval_batch_size, shuffle=False, shared=False)

    def _loader(
        self, sequences: list[Sequence], batch_size: int, *, shuffle: bool, shared: bool = True
    ) -> ResumableLoader:
        trainer = self.trainer if shared else None
        return ResumableLoader(
            sequences,
            batch_size,
            int(self.tokenizer.pad_token_id),
            shuffle=shuffle,
            seed=self.seed,
            num_workers=self.num_workers if shuffle else 0,
            replica=trainer.global_rank if trainer is not None else 0,
            replicas=trainer.world_size if trainer is not None else 1,
        )
