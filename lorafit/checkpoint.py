"""Checkpoints, and the random state that a resumed run needs.

Nothing is read back except as plain data (`weights_only`), since a pickle can run code.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorafit.errors import InputError
from lorafit.files import write_atomically


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """torch.save, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """torch.load of plain data and tensors. Raises InputError for a file that is damaged, or would run code."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # of many kinds, and PyTorch's own advice would have the file run its code
        what = type(error).__name__
        raise InputError(f"{path} cannot be read as a checkpoint ({what}): remove it to begin anew") from error


def random_state() -> dict[str, Any]:
    """The state of every generator a training step may draw from, as plain values and tensors."""
    state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every generator back to a state of `random_state`."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([item.cpu() for item in state["cuda"]])
