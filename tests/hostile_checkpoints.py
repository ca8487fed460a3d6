"""Bad checkpoints, as a stranger or a dying disk makes them, and what becomes of a run that is to go on from one.

    with CheckpointLab(folder) as lab:
        for case in bad_checkpoints(seed=0, count=300):
            outcome = lab.try_checkpoint(case)       # "refused", "harmless", "diverged"; anything else is raised

Most are whole archives in which one thing is not what it should be: those that no checksum finds.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorafit.callbacks import Checkpoints, StepMetrics
from lorafit.checkpoint import load_checkpoint, newest_checkpoint
from lorafit.data.loader import ResumableLoader
from lorafit.errors import DivergedError, InputError
from lorafit.module import FinetuneModule
from lorafit.trainer import build_trainer, quiet_libraries
from lorafit.training import restoring


class Canary:
    """Unpickled, it makes a folder; nothing may unpickle it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@dataclass(frozen=True)
class BadCheckpoint:
    """kind: "bit", "cut" or "value"; seed: of what is drawn for it."""

    kind: str
    seed: int


def bad_checkpoints(seed: int, count: int) -> Iterator[BadCheckpoint]:
    """`count` cases: three of four with one wrong value, the others with flipped bits or cut off."""
    for number in range(count):
        yield BadCheckpoint(("value", "value", "value", "bit", "value", "cut")[number % 6], seed * 1_000_003 + number)


def _junk(rng: random.Random, value: Any) -> Any:
    """Something that does not belong in the place of `value`."""
    deep: Any = 1
    for _ in range(50):
        deep = {"x": [deep]}
    tensor = value if isinstance(value, torch.Tensor) else torch.ones(2)
    return rng.choice(
        [
            *(None, True, -1, 2**40, 2**70, 1e308, float("nan"), "x", "../../x", b"x", [], {}, (1, "a"), deep),
            *(torch.zeros(0), torch.full_like(tensor.float(), float("nan")), tensor.double(), tensor.flatten()[:-1]),
            *(torch.zeros((3, 5), dtype=torch.uint8), torch.tensor(7), Canary(), set(), complex(1, 2)),
        ]
    )


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


class CheckpointLab:
    """A small run that was stopped after two of its five steps, to be gone on with from bad checkpoints."""

    def __init__(self, folder: Path, optimizer: str = "torch.optim.AdamW") -> None:
        quiet_libraries()
        self.folder, self.optimizer = folder, optimizer
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, use_cache=False,
            )  # fmt: skip
            self.model = LlamaForCausalLM(config)
        self.rows = [{"input_ids": [number % 30 + 1] * 6, "labels": [number % 30 + 1] * 6} for number in range(12)]
        self._fit(None, steps=2)
        self.content = (folder / "last.ckpt").read_bytes()
        self.state = load_checkpoint(folder / "last.ckpt")
        self.places = sorted(_places(self.state), key=repr)

    def _fit(self, path: Path | None, steps: int) -> None:
        model = copy.deepcopy(self.model)
        module = FinetuneModule(
            model, rank=2, alpha=4, optimizer=self.optimizer, optimizer_args={"lr": 1e-3}, compile="off"
        )
        module.configure_model()
        found = newest_checkpoint(self.folder) if path is not None else None
        checkpoints = Checkpoints(self.folder / ("after" if path is not None else "."))
        callbacks: list[L.Callback] = [StepMetrics(1), checkpoints]
        trainer = build_trainer(self.folder, batches=4, max_steps=steps, accelerator="cpu", callbacks=callbacks)
        loader: Any = ResumableLoader(self.rows, 3, 0, shuffle=True)  # type: ignore[arg-type]
        with restoring(found, module):
            trainer.fit(module, loader, ckpt_path=str(path) if path is not None else None)

    def write(self, case: BadCheckpoint) -> Path:
        """The bad checkpoint as a file."""
        rng, path = random.Random(case.seed), self.folder / "last.ckpt"
        if case.kind == "value":
            state = copy.deepcopy(self.state)
            # any place as likely as another would mostly be one of the numbers of the random generators
            top = rng.choice(sorted({place[0] for place in self.places}))
            *above, key = rng.choice([place for place in self.places if place[0] == top])
            owner = state
            for step in above:
                owner = owner[step]
            what = rng.random()
            if what < 0.15:
                del owner[key]
            elif what < 0.2 and isinstance(owner, dict):
                owner[rng.choice([f"{key}.more", 3, ""])] = _junk(rng, owner[key])
            else:
                owner[key] = _junk(rng, owner[key])
            torch.save(state, path)
            return path
        content = bytearray(self.content)
        if case.kind == "cut":
            del content[rng.randrange(len(content)) :]
        else:
            for _ in range(rng.choice([1, 1, 8, 100])):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        return path

    def try_checkpoint(self, case: BadCheckpoint) -> str:
        """Go on from the bad checkpoint: "refused", "harmless" (it went on to its end) or "diverged"."""
        path = self.write(case)
        try:
            self._fit(path, steps=5)
        except InputError as error:
            assert str(error) and "Traceback" not in str(error)
            return "refused"
        except DivergedError:
            return "diverged"
        return "harmless"
