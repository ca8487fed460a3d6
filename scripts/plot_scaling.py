"""How the step of lorafit grows with the tokens of a batch and with the vocabulary: memory and time, fitted by lines.

    python scripts/plot_scaling.py                         rows of 512 up to 4096 tokens, vocabularies up to 64,000
    python scripts/plot_scaling.py --quant --checkpointing selective --compile on
    python scripts/plot_scaling.py --tokens 64 128 --vocabularies 512 1024 --length 32 --shape tiny       a trial

Every point is a process of its own: peak memory of two steps above what lies idle, and the median of some steps. Writes
scaling.json and scaling.svg, and prints each line with what the points are off it. A line is what should come out:
nothing in a step of rows of one length grows faster than its tokens, and nothing but one chunk of logits with the
vocabulary. The model is that of `bench.shape=small`, weights random.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from lorafit.bench import SHAPES, run_child, shape_options
from lorafit.files import write_atomically, write_json
from lorafit.machine import describe_machine
from lorafit.peers import Case, Source

UNITS = {"peak_bytes": ("step memory, MiB", 2**20), "seconds": ("step time, ms", 1e-3)}
AXES = {"tokens": "tokens of a batch", "vocabulary": "vocabulary"}


def measure(options: argparse.Namespace, device: torch.device, tokens: int, vocabulary: int) -> dict[str, Any]:
    """{"tokens", "vocabulary", "peak_bytes", "seconds", "recomputed_share"} of one point, in a fresh process."""
    case = Case("lorafit", "lorafit", options.quant, options.checkpointing, options.compile)
    config = shape_options(options.shape, options.length) | {"vocab_size": vocabulary}
    found = run_child(
        {
            "do": "alone",
            "cases": [dataclasses.asdict(case)],
            "source": dataclasses.asdict(Source(config=config)),
            "device": str(device),
            "batch": {"rows": tokens // options.length, "length": options.length, "masked": 0.0, "seed": 0},
            "warmup": 2,
            "rounds": options.rounds,
            "seconds": 120.0,
            "reference": "",
        }
    )
    if "failed" in found:
        sys.exit(f"plot_scaling: {tokens} tokens, vocabulary {vocabulary}: {found['failed']}")
    kept = {key: found[key] for key in ("peak_bytes", "idle_bytes", "recomputed_share", "matmul_rates")}
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "seconds": statistics.median(found["seconds"]),
        "rounds": found["seconds"],
        **kept,
    }


def fit(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """The line of least squares {"slope", "intercept"}, and the largest distance of a point from it as a share of the
    largest y, {"residual"}."""
    slope, intercept = statistics.linear_regression(xs, ys)
    off = max(abs(y - slope * x - intercept) for x, y in zip(xs, ys, strict=True))
    return {"slope": slope, "intercept": intercept, "residual": off / max(ys)}


# ------------------------------------------------------------------------------------------------ the picture

_STYLE = """
svg { color-scheme: light dark; --ink: #1c2024; --dim: #697078; --paper: #ffffff; --line: #d9dde1; --data: #1f6feb;
  font: 12px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e8ea; --dim: #9aa2aa; --paper: #15181b; --line: #353b41;
  --data: #6cb0ff; } }
text { fill: var(--ink); } .dim { fill: var(--dim); } .title { font-size: 14px; font-weight: 600; }
.paper { fill: var(--paper); } .axis { stroke: var(--line); } .fit { stroke: var(--data); stroke-dasharray: 5 4; }
.dot { fill: var(--data); } .right { text-anchor: end; } .middle { text-anchor: middle; }
"""
_WIDTH, _HEIGHT, _LEFT, _TOP = 360, 200, 70, 40
_PANEL = (_LEFT + _WIDTH + 40, _TOP + _HEIGHT + 60)


def picture(found: Mapping[str, Any]) -> str:
    """An SVG that needs nothing else: memory and time (rows) over tokens and vocabulary (columns)."""
    panels = []
    for column, axis in enumerate(AXES):
        for row, measure in enumerate(UNITS):
            shapes = _panel(found[axis]["points"], axis, measure, found[axis]["fits"][measure])
            panels.append(f'<g transform="translate({column * _PANEL[0]} {row * _PANEL[1]})">{shapes}</g>')
    width, height = 2 * _PANEL[0], 2 * _PANEL[1]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{escape(found["title"])}</title><style>{_STYLE}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>{"".join(panels)}</svg>\n'
    )


def _panel(points: Sequence[Mapping[str, Any]], axis: str, measure: str, line: Mapping[str, float]) -> str:
    words, unit = UNITS[measure]
    most_x = max(point[axis] for point in points)
    most_y = max(point[measure] for point in points) / unit * 1.1

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + _WIDTH * x / most_x, _TOP + _HEIGHT * (1 - y / most_y)

    left, bottom = at(0, 0)
    right, top = at(most_x, most_y)
    shapes = [
        f'<text x="{left:.1f}" y="22" class="title">{escape(words)}</text>',
        f'<line x1="{left:.1f}" y1="{bottom:.1f}" x2="{right:.1f}" y2="{bottom:.1f}" class="axis"/>',
        f'<line x1="{left:.1f}" y1="{bottom:.1f}" x2="{left:.1f}" y2="{top:.1f}" class="axis"/>',
        f'<text x="{right:.1f}" y="{bottom + 34:.1f}" class="dim right">{escape(AXES[axis])}</text>',
    ]
    for share in (0.0, 0.5, 1.0):
        x, y = at(0, share * most_y)
        shapes.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" class="dim right">{share * most_y:,.0f}</text>')
    ends = [at(x, (line["slope"] * x + line["intercept"]) / unit) for x in (min(p[axis] for p in points), most_x)]
    (x1, y1), (x2, y2) = ends
    shapes.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="fit"/>')
    for point in points:
        x, y = at(point[axis], point[measure] / unit)
        value = f"{point[axis]:,}: {point[measure] / unit:,.1f}"
        shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="dot"><title>{value}</title></circle>')
        shapes.append(f'<text x="{x:.1f}" y="{bottom + 16:.1f}" class="dim middle">{point[axis]:,}</text>')
    return "".join(shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8000, 16000, 32000, 64000])
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--shape", default="small", choices=sorted(SHAPES))
    parser.add_argument("--quant", action="store_true", help="the base in NF4")
    parser.add_argument("--checkpointing", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--compile", default="off", choices=("on", "off"))
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of a point")
    parser.add_argument("--out", type=Path, default=Path("scaling"), help="without its ending")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = f"{'NF4' if options.quant else 'bf16'}, checkpointing {options.checkpointing}, compile {options.compile}"
    found: dict[str, Any] = {"title": f"lorafit, {options.shape}, {kind}", "machine": describe_machine(device)}
    middle = sorted(options.tokens)[len(options.tokens) // 2 - 1]
    plans = {
        "tokens": [(tokens, SHAPES[options.shape]["vocab_size"]) for tokens in options.tokens],
        "vocabulary": [(middle, vocabulary) for vocabulary in options.vocabularies],
    }
    for axis, plan in plans.items():
        points = []
        for tokens, vocabulary in plan:
            points.append(measure(options, device, tokens, vocabulary))
            memory, seconds = points[-1]["peak_bytes"] / 2**20, points[-1]["seconds"]
            print(f"{tokens} tokens, vocabulary {vocabulary}: {memory:.1f} MiB, {1000 * seconds:.1f} ms", flush=True)
        xs = [point[axis] for point in points]
        fits = {measure: fit(xs, [point[measure] for point in points]) for measure in UNITS}
        found[axis] = {"points": points, "fits": fits}
        for name, (words, unit) in UNITS.items():
            line = fits[name]
            print(
                f"{words} = {line['intercept'] / unit:.2f} + {1000 * line['slope'] / unit:.3f} per 1000 of "
                f"{AXES[axis]}; no point is further off than {line['residual']:.1%} of the largest"
            )
    write_json(options.out.with_suffix(".json"), found)
    drawn = picture(found).encode()
    write_atomically(options.out.with_suffix(".svg"), lambda file: file.write(drawn))


if __name__ == "__main__":
    main()
