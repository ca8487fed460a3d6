"""Weights become 4-bit codes, fast on a CPU: what bitsandbytes' `quantize_4bit` computes there, byte for byte.

    packed, scales = quantize_blocks(weight, 64, code)

QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 2): a block of weights is divided by its largest magnitude, and
each takes the nearest of 16 values. Nearest is found by counting the midpoints between those values that a weight
exceeds. bitsandbytes searches them for each weight anew; to compare a run of weights that fits the processor's cache
with one midpoint after another is the same count, without a branch, and twenty times as fast.

A search and a count differ for NaN, and infinite weights become NaN: whoever calls this looks at the scales, which
are not finite then (`quant.quantize_4bit` does, and lets bitsandbytes have those).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

# Weights that are taken together: in float32 half of a core's second cache, whole blocks of every size, and less than
# torch would divide among threads of its own.
_RUN = 7 * 4096
_SMALLEST = 1e-38  # what a block is divided by at least


def quantize_blocks(weight: Tensor, block: int, code: Tensor) -> tuple[Tensor, Tensor]:
    """n weights as (codes [⌈n/2⌉] uint8, two in a byte and the first one high; scales [⌈n/block⌉] float32).

    weight: contiguous, on the CPU, of 16 or 32 bits. block: an even number of weights. code: [16] float32, the values,
    in any order. The work is divided among as many threads as torch uses.
    """
    flat = weight.detach().reshape(-1)
    order = torch.argsort(code)
    midpoints = (code[order[:-1]] + code[order[1:]]) / 2
    whole = flat.numel() // block * block
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    scales = torch.empty(-(-flat.numel() // block), dtype=torch.float32)
    runs = range(0, whole, _RUN)
    workers = min(torch.get_num_threads(), len(runs) // 4)
    shares = [runs[first::workers] for first in range(workers)] if workers > 1 else [runs]

    def work(share: range) -> None:
        _Worker(block, midpoints).run(flat[:whole], share, packed, scales)

    if workers > 1:
        with ThreadPoolExecutor(workers - 1) as pool:
            others = [pool.submit(work, share) for share in shares[1:]]
            work(shares[0])
            for other in others:
                other.result()
    else:
        work(runs)
    if whole < flat.numel():
        rest = flat[whole:].float()
        scales[-1] = rest.abs().max().clamp(min=_SMALLEST)
        values = torch.clamp(rest / scales[-1], -1, 1)
        codes = torch.bucketize(torch.nn.functional.pad(values, (0, values.numel() % 2)), midpoints).to(torch.uint8)
        packed[whole // 2 :] = (codes[::2] << 4) | codes[1::2]
    places = order.to(torch.uint8)
    if not torch.equal(places.long(), torch.arange(16)):  # codes that are not in the order of their values
        pairs = (places.repeat_interleave(16) << 4) | places.repeat(16)
        packed = torch.from_numpy(pairs.numpy()[packed.numpy()])
    return packed, scales


class _Worker:
    """One thread's share of a weight, and the memory that it works in."""

    def __init__(self, block: int, midpoints: Tensor) -> None:
        self.block, self.midpoints = block, midpoints.numpy()
        self.values, self.magnitudes = torch.empty(_RUN), torch.empty(_RUN)
        self.exceeds, self.count = np.empty((15, _RUN), dtype=bool), np.empty(_RUN, dtype=np.uint8)
        self.high = np.empty(_RUN // 2, dtype=np.uint16)

    def run(self, flat: Tensor, starts: range, packed: Tensor, scales: Tensor) -> None:
        out, largest = packed.numpy(), scales
        with np.errstate(all="ignore"):
            for start in starts:
                run = flat[start : start + _RUN]
                n, blocks = run.numel(), run.numel() // self.block
                values, magnitudes = self.values[:n], self.magnitudes[:n]
                values.copy_(run)
                torch.abs(values, out=magnitudes)
                at = start // self.block
                scale = torch.amax(magnitudes.view(blocks, self.block), dim=1)
                largest[at : at + blocks] = scale
                inverse = 1.0 / scale.clamp(min=_SMALLEST)
                torch.mul(values.view(blocks, self.block), inverse.view(-1, 1), out=values.view(blocks, self.block))
                self._count(values.numpy(), out[start // 2 : (start + n) // 2])

    def _count(self, values: np.ndarray, out: np.ndarray) -> None:
        n = len(values)
        exceeds, count, high = self.exceeds[:, :n], self.count[:n], self.high[: n // 2]
        np.greater(values, self.midpoints[:, None], out=exceeds)
        np.add.reduce(exceeds.view(np.uint8), axis=0, out=count)
        # a pair of counts as one little-endian number: the first is its low byte
        pairs = count.view(np.dtype("<u2"))
        np.left_shift(pairs, 4, out=high)
        np.right_shift(pairs, 8, out=pairs)
        np.bitwise_or(high, pairs, out=high)
        np.copyto(out, high, casting="unsafe")
