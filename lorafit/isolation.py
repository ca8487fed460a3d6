"""Proof that packed examples do not see each other, by the model that is to be trained.

Whether a packed row is block-diagonal is decided deep in the model: by its attention, by a cache that is in the way,
by a model that takes no position ids at all. So it is measured. One packed row of real examples is run, and each of
them alone; the logits must agree. How far they may differ is measured too, as the rounding between each example alone
and in a padded batch, and so is what the test can see: how far they differ when the same row is run as if it were one
text.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafit.data.loader import collate, collate_packed
from lorafit.data.tokens import Sequence
from lorafit.errors import InputError
from lorafit.evaluation import evaluating

# the share of the logits' norm that rounding alone may account for, whatever it was measured to be
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# and a multiple of the rounding measured: other shapes take other paths
_MARGIN = 3.0


@dataclass(frozen=True)
class Isolation:
    """Differences of logits relative to their norm: of the packed row to its examples alone (`error`), of a padded
    batch to the same (`rounding`), and of the row run as one text (`contaminated`). `tolerance`: the largest error
    allowed."""

    examples: int
    error: float
    rounding: float
    contaminated: float
    tolerance: float

    def problem(self) -> str | None:
        """Why packing is not proven, or None when it is."""
        if not self.error <= self.tolerance:  # NaN is no proof
            return (
                f"the logits of {self.examples} packed examples differ from those of each alone by {self.error:.2%} of "
                f"their norm ({self.tolerance:.2%} is rounding; {self.contaminated:.2%} if they saw each other fully)"
            )
        if self.contaminated <= 2 * self.tolerance:
            return (
                f"this model gives {self.examples} packed examples the same logits whether they see each other or not "
                f"({self.contaminated:.2%} against {self.tolerance:.2%} of rounding), so nothing is shown"
            )
        return None

    def sentence(self) -> str:
        """What was measured, for a person."""
        return (
            f"proven on {self.examples} examples: their logits packed and alone differ by {self.error:.2g} of their "
            f"norm (rounding {self.rounding:.2g}; {self.contaminated:.2g} if they saw each other)"
        )


def measure_isolation(model: nn.Module, sequences: Seq[Sequence], pad_id: int) -> Isolation:
    """Run `sequences`, at least two of them, packed in one row, alone, in a padded batch, and as one text.

    Nothing is trained and no random number is drawn; the model comes back in the mode it had.
    """
    if len(sequences) < 2:
        raise InputError("packing cannot be proven with a single example: give more rows, or data.packing=false")
    device = next(model.parameters()).device
    packed = collate_packed([sequences], pad_id)
    padded = collate(sequences, pad_id)
    lengths = [len(sequence["input_ids"]) for sequence in sequences]
    with evaluating(model):

        def logits(**inputs: Tensor) -> Tensor:
            moved = {key: value.to(device) for key, value in inputs.items()}
            return model(**moved, use_cache=False).logits.cpu()

        alone = torch.cat([logits(input_ids=part.unsqueeze(0))[0] for part in packed["input_ids"][0].split(lengths)])
        together = logits(input_ids=packed["input_ids"], position_ids=packed["position_ids"])[0]
        one_text = logits(input_ids=packed["input_ids"])[0]
        batch = logits(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])
    batched = torch.cat([row[:length] for row, length in zip(batch, lengths, strict=True)])
    # a constant added to all logits of a place changes no probability
    center = [v.float() - v.float().mean(dim=-1, keepdim=True) for v in (alone, together, batched, one_text)]
    # the first example has nothing before it to see
    norm = center[0][lengths[0] :].norm().clamp(min=1e-30)
    error, rounding, contaminated = (float((v - center[0])[lengths[0] :].norm() / norm) for v in center[1:])
    tolerance = max(_ROUNDING[alone.dtype], _MARGIN * rounding)
    return Isolation(len(sequences), error, rounding, contaminated, tolerance)


def require_isolation(model: nn.Module, sequences: Seq[Sequence], pad_id: int, setting: str) -> Isolation:
    """The measurement, when it proves that packed examples do not see each other.

    Raises InputError with the reason when it does not, or when the model does not take position ids. setting: the key
    that is to be turned off.
    """
    way_out = f"Take {setting}=false, or another model.attention"
    try:
        found = measure_isolation(model, sequences, pad_id)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError | torch.OutOfMemoryError):
            raise
        raise InputError(f"{setting}: {type(model).__name__} cannot run a packed row ({error}). {way_out}") from error
    if problem := found.problem():
        raise InputError(f"{setting} is refused: {problem}. {way_out}")
    return found
