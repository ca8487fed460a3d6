"""Proof that packed examples do not see each other, by the model that is to be trained.

Whether a packed row is block-diagonal is decided deep in the model: by its attention, by a cache that is in the way,
by a model that takes no position ids at all. So it is measured, on real examples, in two ways:

    the same      each example gives the same logits packed as it does alone: its places count from 0, and all of it
                  is there. Rounding blurs this, since other shapes take other paths through the hardware.
    untouched     with every token of one example changed, no logit of the examples behind it moves. Shapes stay as
                  they are, so rounding stays too, and the smallest leak shows: one layer, one head, one place.

What hardware moves by itself is read off the examples before the changed one, which no causal model lets see it. And
what the second test is worth is measured by the same change in the same row, run as one text.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafit.data.loader import collate, collate_packed
from lorafit.data.tokens import Sequence
from lorafit.errors import InputError, reason
from lorafit.evaluation import evaluating

# the first tokens of each example show as much as all of them: a row of so many is run
_TOKENS = 256
# the share of the logits' norm that rounding alone may account for, whatever it was measured to be
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# what the logits of a place may move by itself, of the norm of those of a usual place: with the same shapes, nothing
_UNTOUCHED = 1e-5
# and a multiple of what was measured: other shapes take other paths, the same ones the same
_MARGIN, _MARGIN_UNTOUCHED = 3.0, 2.0


@dataclass(frozen=True)
class Isolation:
    """What was measured on packed examples.

    error: how far their logits are from those of each alone, relative to the norm of all; rounding: the same for a
    padded batch; tolerance: the largest error allowed. leak: how far the logits of any one place move when an example
    before its own is changed, relative to the norm at a usual place; noise: the same for a change behind it;
    allowed_leak: the largest leak allowed. contaminated: the leak where the row is one text.
    """

    examples: int
    error: float
    rounding: float
    tolerance: float
    leak: float
    noise: float
    allowed_leak: float
    contaminated: float

    def problem(self) -> str | None:
        """Why packing is not proven, or None when it is."""
        if not all(value < float("inf") for value in (self.error, self.rounding, self.leak, self.contaminated)):
            return "the logits of the model are not finite"  # NaN too
        if self.leak > self.allowed_leak:
            return (
                f"a packed example sees those before it: its logits move by {self.leak:.2g} of their norm when those "
                f"are changed ({self.allowed_leak:.2g} is rounding, {self.contaminated:.2g} would be one text)"
            )
        if self.error > self.tolerance:
            return (
                f"the logits of {self.examples} packed examples differ from those of each alone by {self.error:.2%} of "
                f"their norm ({self.tolerance:.2%} is rounding), so they do not stand at the places they have alone"
            )
        if self.contaminated <= self.allowed_leak:  # one text would pass too
            return (
                f"this model gives {self.examples} packed examples the same logits whether they see each other or not "
                f"({self.contaminated:.2g} against {self.allowed_leak:.2g} of rounding), so nothing is shown"
            )
        return None

    def sentence(self) -> str:
        """What was measured, for a person."""
        return (
            f"proven on {self.examples} examples: what stands before one moves its logits by {self.leak:.2g} of their "
            f"norm ({self.contaminated:.2g} if it saw it); packed and alone they differ by {self.error:.2g} "
            f"(rounding {self.rounding:.2g})"
        )


def measure_isolation(model: nn.Module, sequences: Seq[Sequence], pad_id: int, *, rows: int = 2) -> Isolation:
    """Run the beginnings of `sequences`, at least two of them, packed, alone, in a padded batch, and as one text.

    rows: packed rows in the batch, as in training: 1 where a batch is one row, else 2, for some kinds of attention tell
    examples apart in a single row alone. Nothing is trained and no random number is drawn; the model comes back in the
    mode it had.
    """
    device = next(model.parameters()).device
    longest = min(_TOKENS, _places(model)) // (2 * len(sequences))
    # each a little shorter than the one before: with equal lengths the padded batch would have no padding
    ends = [max(1, longest - index) for index in range(len(sequences))]
    sequences = [
        {key: row[key][:end] for key in ("input_ids", "labels")} for row, end in zip(sequences, ends, strict=True)
    ]
    lengths = [len(sequence["input_ids"]) for sequence in sequences]
    # all examples, and all of them once more: the one in the middle is changed, and as many stand before it as behind
    packed, padded = collate_packed([[*sequences, *sequences]] * rows, pad_id), collate(sequences, pad_id)
    ids, middle = packed["input_ids"], sum(lengths)
    before, behind = slice(0, middle), slice(middle + lengths[0], None)
    known, number = ids.unique(return_inverse=True)
    changed = ids.clone()
    changed[:, middle : behind.start] = known[(number[:, middle : behind.start] + 1) % len(known)]
    with evaluating(model):

        def logits(**inputs: Tensor) -> Tensor:
            moved = {key: value.to(device) for key, value in inputs.items()}
            return model(**moved, use_cache=False).logits.cpu()

        together = logits(input_ids=ids, position_ids=packed["position_ids"])
        touched = logits(input_ids=changed, position_ids=packed["position_ids"])
        one_text = logits(input_ids=ids), logits(input_ids=changed)
        alone = torch.cat([logits(input_ids=part.unsqueeze(0))[0] for part in ids[0, :middle].split(lengths)])
        batch = logits(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])
    batched = torch.cat([row[:length] for row, length in zip(batch, lengths, strict=True)])
    norm = _apart(alone, torch.zeros_like(alone)).norm().clamp(min=1e-30)
    usual = norm / middle**0.5

    def moved(one: Tensor, other: Tensor, where: slice) -> float:
        return float(_apart(one[:, where], other[:, where]).norm(dim=-1).max() / usual)

    noise = moved(together, touched, before)
    rounding = float(_apart(batched, alone).norm() / norm)
    copies = [half for row in together for half in row.split(middle)]
    return Isolation(
        examples=len(sequences),
        error=max(float(_apart(copy, alone).norm() / norm) for copy in copies),
        rounding=rounding,
        tolerance=max(_ROUNDING[together.dtype], _MARGIN * rounding),
        leak=moved(together, touched, behind),
        noise=noise,
        allowed_leak=max(_UNTOUCHED, _MARGIN_UNTOUCHED * noise),
        contaminated=moved(*one_text, behind),
    )


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """The difference of logits, but for a constant added to all of a place: that changes no probability."""
    difference = one.float() - other.float()
    return difference - difference.mean(dim=-1, keepdim=True)


def _places(model: nn.Module) -> int:
    """How many places the model can tell apart, where its configuration says so."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None) or _TOKENS


def require_isolation(
    model: nn.Module, sequences: Seq[Sequence], pad_id: int, setting: str, *, rows: int = 2
) -> Isolation:
    """The measurement, when it proves that packed examples do not see each other.

    Raises InputError with the reason when it does not, or when the model does not take position ids. setting: the key
    that is to be turned off; rows: see `measure_isolation`.
    """
    if len(sequences) < 2:
        raise InputError(f"{setting} cannot be proven with a single example: give more rows, or {setting}=false")
    others = "" if rows == 1 else ", data.padding_free=true, which makes a batch one row,"
    way_out = f"Take {setting}=false{others} or another model.attention"
    try:
        found = measure_isolation(model, sequences, pad_id, rows=rows)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model of anybody's making: whatever it raises, it cannot be packed
        raise InputError(
            f"{setting}: {type(model).__name__} cannot run a packed row ({reason(error)}). {way_out}"
        ) from error
    if problem := found.problem():
        raise InputError(f"{setting} is refused: {problem}. {way_out}")
    return found
