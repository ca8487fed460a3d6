"""The charts of a report, by plotly: each a piece of HTML that waits for plotly's script on the same page.

Colours are of a middle tone, so that they can be told apart on white and on black. Text, and the box that opens under
the pointer, take theirs from the page (reporting/page.py). Colour never stands alone: series have markers of their own,
and what is drawn stands in a table as well. Texts come out of other people's files, so none reaches plotly as it is:
plotly reads some HTML in them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lorafit.reporting.choice import falls, label
from lorafit.reporting.runs import Run

_COLOURS = (
    "#3b82d6",
    "#d97a1a",
    "#2f9e62",
    "#9a63d8",
    "#d9534f",
    "#1f9aa8",
    "#d0589f",
    "#8a8a1f",
    "#a8714a",
    "#7a828a",
)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "pentagon", "star", "hexagon", "triangle-down")
_FRONT, _MARK, _GRID = "#888d94", "#2f9e62", "rgba(128, 128, 128, 0.22)"
_NAMED = 14  # series in a legend; the names of more would push the chart away
_SIZES = {
    "rank": ("rank", "rank"),
    "parameters_trainable": ("parameters", "trainable parameters"),
    "peak_bytes": ("memory", "peak memory"),
    "train_seconds": ("time", "training time"),
}


@dataclass
class Chart:
    """name: the id of its element; words: what it shows; html: its element and script."""

    name: str
    title: str
    words: str
    html: str
    switches: tuple[tuple[str, str, bool], ...] = ()  # (axis, its name, whether it begins logarithmic)


def plotly_script() -> str:
    """The library itself, for one script element before the first chart."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _chart(
    name: str, title: str, words: str, traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any], height: int = 400
) -> Chart:
    import plotly.graph_objects as go
    from plotly.io import to_html

    axis = {"gridcolor": _GRID, "linecolor": _GRID, "zeroline": False, "automargin": True, "fixedrange": False}
    figure = go.Figure(
        data=list(traces),
        layout={
            "template": go.layout.Template(),  # the usual one is longer than most charts
            "colorway": _COLOURS,
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            "margin": {"l": 48, "r": 12, "t": 12, "b": 40},
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 0,
                "yref": "container",
                "yanchor": "bottom",
                "font": {"size": 12},
                "maxheight": 0.25,  # of the chart; more than that scrolls
            },
            "hovermode": "closest",
            "dragmode": False,  # a finger on a chart scrolls the page
            **{key: value for key, value in layout.items() if key not in ("xaxis", "yaxis")},
            "xaxis": axis | _ticks(layout.get("xaxis", {})),
            "yaxis": axis | _ticks(layout.get("yaxis", {})),
        },
    )
    options = {
        "responsive": True,
        "displaylogo": False,
        "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d"],
    }
    html = to_html(
        figure, config=options, full_html=False, include_plotlyjs=False, div_id=name, default_height=f"{height}px"
    )
    switches = tuple(
        (f"{axis}axis", word, layout[f"{axis}axis"].get("type") == "log")
        for axis, word in (("y", "vertical"), ("x", "horizontal"))
        if "type" in layout.get(f"{axis}axis", {}) and "tickvals" not in layout[f"{axis}axis"]
    )
    return Chart(name, title, words, html, switches)


def _ticks(axis: Mapping[str, Any]) -> dict[str, Any]:
    """A logarithmic axis with whole numbers at 1, 2 and 5, which plotly would shorten to their last digits."""
    if axis.get("type") not in ("linear", "log") or "tickvals" in axis:
        return dict(axis)
    return {"tickformat": "~g", "dtick": "D2" if axis["type"] == "log" else None} | dict(axis)


def _plain(text: str, width: int = 60) -> str:
    """A text of somebody's file as plotly shows it letter by letter."""
    from lorafit.terminal import shorten, visible

    printable = visible(text).encode(errors="backslashreplace").decode()  # a name of other bytes than UTF-8
    return escape(shorten(printable, width), quote=False).replace("%{", "% {")  # which would be filled in


def _scale(values: Iterable[float], wide: float = 12) -> str:
    """The kind of axis on which these values can be told apart."""
    known = list(values)
    return "log" if known and min(known) > 0 and max(known) > wide * min(known) else "linear"


# ------------------------------------------------------------------------------------------------- quality against size


def quality(runs: Sequence[Run], found: Mapping[str, Any]) -> list[Chart]:
    """The metric against rank, parameters, memory and time, of the completed runs, with the Pareto front of each."""
    metric = found["metric"]
    drawn = [run for run in runs if run.folder in found["pareto"]]
    return [
        chart
        for size in _SIZES
        if (chart := _against(size, [run for run in drawn if size in run.numbers], metric, found)) is not None
    ]


def _against(size: str, runs: Sequence[Run], metric: str, found: Mapping[str, Any]) -> Chart | None:
    if len({run.numbers[size] for run in runs}) < 2:
        return None
    short, long = _SIZES[size]
    unit, name = _unit(size, [run.numbers[size] for run in runs])
    others = [key for key in found["varied"] if key not in ("rank", "seed")]
    series: dict[str, list[Run]] = {}
    for run in runs:
        series.setdefault(label(run, others) if others else "", []).append(run)
    on_front = [run for run in runs if found["pareto"][run.folder][size]]
    on_front.sort(key=lambda run: run.numbers[size])
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "Pareto front",
            "x": [run.numbers[size] / unit for run in on_front],
            "y": [run.after[metric] for run in on_front],
            "line": {"color": _FRONT, "width": 1.5, "dash": "dot", "shape": "hv"},
            "marker": {"symbol": "circle-open", "size": 17, "color": _FRONT, "line": {"width": 2}},
            "hoverinfo": "skip",
        }
    ]
    for place, (title, members) in enumerate(series.items()):
        members = sorted(members, key=lambda run: run.numbers[size])
        colour = _COLOURS[place % len(_COLOURS)]
        if size == "rank":
            traces.append(_means(members, metric, colour))
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text" if size != "rank" and _ranks_fit(runs, found) else "markers",
                "name": _plain(title or "runs"),
                "x": [run.numbers[size] / unit for run in members],
                "y": [run.after[metric] for run in members],
                "text": [f"{run.numbers.get('rank', ''):g}" if "rank" in run.numbers else "" for run in members],
                "textposition": "top right",
                "marker": {"size": 9, "color": colour, "symbol": _SYMBOLS[place % len(_SYMBOLS)]},
                "hovertext": [_told(run, metric, found) for run in members],
                "hoverinfo": "text",
                "showlegend": len(series) <= _NAMED,
            }
        )
    chosen = [run for run in runs if found["recommended"] and run.folder == found["recommended"]["folder"]]
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "recommended",
            "x": [run.numbers[size] / unit for run in chosen],
            "y": [run.after[metric] for run in chosen],
            "marker": {"symbol": "square-open", "size": 26, "color": _MARK, "line": {"width": 2.5}},
            "hoverinfo": "skip",
            "showlegend": bool(chosen),
        }
    )
    xaxis: dict[str, Any] = {"title": {"text": name}, "type": _scale(run.numbers[size] for run in runs)}
    if size == "rank":
        ranks = sorted({run.numbers["rank"] for run in runs})
        xaxis |= {"type": "log", "tickvals": ranks, "ticktext": [f"{rank:g}" for rank in ranks]}
    elif size == "parameters_trainable":
        xaxis["tickformat"] = "~s"
    word = metric.replace("_", " ")
    words = (
        f"{word} of {len(runs)} runs against {long}; {'lower' if falls(metric) else 'higher'} and further left is "
        f"better. On the Pareto front: {', '.join(label(run, found['varied']) for run in on_front)}."
    )
    yaxis = {"title": {"text": f"held-out {word}"}, "type": _scale(run.after[metric] for run in runs)}
    return _chart(f"by-{short}", f"Against {long}", words, traces, {"xaxis": xaxis, "yaxis": yaxis})


def _means(members: Sequence[Run], metric: str, colour: str) -> dict[str, Any]:
    """The line of a series: through the mean at each rank, where several seeds were trained."""
    by_rank: dict[float, list[float]] = {}
    for run in members:
        by_rank.setdefault(run.numbers["rank"], []).append(run.after[metric])
    line = {"type": "scatter", "mode": "lines", "line": {"color": colour, "width": 2}}
    points = {"x": list(by_rank), "y": [statistics.fmean(values) for values in by_rank.values()]}
    return line | points | {"hoverinfo": "skip", "showlegend": False}


def _ranks_fit(runs: Sequence[Run], found: Mapping[str, Any]) -> bool:
    return "rank" in found["varied"] and len(runs) <= 24


def _told(run: Run, metric: str, found: Mapping[str, Any]) -> str:
    """What opens under the pointer."""
    from lorafit.terminal import human

    lines = [_plain(label(run, found["varied"]), 80), f"{metric.replace('_', ' ')} {run.after[metric]:.4g}"]
    if "parameters_trainable" in run.numbers:
        lines.append(f"{run.numbers['parameters_trainable']:,} trainable parameters")
    if "peak_bytes" in run.numbers:
        lines.append(f"{human(run.numbers['peak_bytes'])} at the peak")
    if "train_seconds" in run.numbers:
        lines.append(f"{run.numbers['train_seconds']:,.0f} s of training")
    marks = [_SIZES[size][1] for size, on in found["pareto"][run.folder].items() if on]
    return "<br>".join([*lines, *([f"on the front of {', '.join(marks)}"] if marks else [])])


def _unit(size: str, values: Sequence[float]) -> tuple[float, str]:
    """(what the values are divided by, the title of their axis)."""
    long = _SIZES[size][1]
    if size == "peak_bytes":
        return (2**30, f"{long}, GiB") if max(values) >= 4 * 2**30 else (2**20, f"{long}, MiB")
    if size == "train_seconds":
        for unit, word, least in ((3600, "hours", 7200), (60, "minutes", 600)):
            if max(values) >= least:
                return unit, f"{long}, {word}"
        return 1, f"{long}, seconds"
    return 1, long


# ------------------------------------------------------------------------------------------------------ learning curves


def curves(runs: Sequence[Run], found: Mapping[str, Any]) -> list[Chart]:
    """One chart of the training and held-out loss by step, of every run that wrote some down; none without any."""
    drawn = [run for run in runs if run.curves]
    if not drawn:
        return []
    traces = []
    for place, run in enumerate(drawn):
        colour = _COLOURS[place % len(_COLOURS)]
        title = _plain(label(run, found["varied"])) + ("" if run.completed else f" ({run.status.replace('_', ' ')})")
        for key, words in (("train/loss", "training"), ("eval/loss", "held out")):
            if key not in run.curves:
                continue
            steps, values = zip(*run.curves[key], strict=True)
            held_out = key == "eval/loss"
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if held_out or len(steps) < 3 else "lines",
                    "name": title,
                    "legendgroup": str(place),
                    "showlegend": len(drawn) <= _NAMED and (held_out or "eval/loss" not in run.curves),
                    "x": steps,
                    "y": values,
                    "line": {"color": colour, "width": 2 if held_out else 1.2, "dash": "dash" if held_out else "solid"},
                    "opacity": 1 if held_out else 0.7,
                    "marker": {"size": 7, "symbol": _SYMBOLS[place % len(_SYMBOLS)]},
                    "hovertemplate": f"{title}<br>{words}, step %{{x}}: %{{y:.4g}}<extra></extra>",
                }
            )
    losses = [value for run in drawn for points in run.curves.values() for _, value in points]
    layout = {
        "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "loss"}, "type": _scale(losses, wide=8)},
    }
    words = f"Loss by step of {len(drawn)} runs: training as thin lines, held out as dashed lines with markers."
    return [_chart("curves", "", words, traces, layout, height=460)]


# ------------------------------------------------------------------------------------------------------- effective rank


def effective_ranks(runs: Sequence[Run], found: Mapping[str, Any]) -> list[Chart]:
    """The effective rank by layer, a line for each run through the means of its modules; and one run's by module."""
    from lorafit.ranks import by_kind

    drawn = [run for run in runs if run.ranks]
    if not drawn:
        return []
    charts = []
    traces = []
    deepest = 0
    for place, run in enumerate(drawn):
        by_layer: dict[str, list[float]] = {}
        for members in by_kind(run.ranks).values():
            for layer, (_, effective) in members.items():
                by_layer.setdefault(layer, []).append(effective)
        layers = sorted((layer for layer in by_layer if layer.isdecimal()), key=int)
        if len(layers) > 1:
            title = _plain(label(run, found["varied"]))
            deepest = max(deepest, int(layers[-1]))
            means = [statistics.fmean(by_layer[layer]) for layer in layers]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": title,
                    "x": [int(layer) for layer in layers],
                    "y": means,
                    "line": {"width": 1.5},
                    "marker": {"size": 7, "symbol": _SYMBOLS[place % len(_SYMBOLS)]},
                    "hovertext": [
                        f"{title}<br>layer {layer}: {mean:.3g}" for layer, mean in zip(layers, means, strict=True)
                    ],
                    "hoverinfo": "text",
                    "showlegend": len(drawn) <= _NAMED,
                }
            )
    if traces:
        layout = {
            "xaxis": {"title": {"text": "layer"}, "dtick": max(1, round(deepest / 12))},
            "yaxis": {"title": {"text": "effective rank"}, "rangemode": "tozero"},
        }
        words = f"Effective rank by layer, the mean over a layer's adapted modules, of {len(drawn)} runs."
        charts.append(_chart("effective-rank", "By layer", words, traces, layout))
    chosen = found["recommended"] and next((run for run in drawn if run.folder == found["recommended"]["folder"]), None)
    run = chosen or max(drawn, key=lambda run: max(rank for rank, _ in run.ranks.values()))
    return [*charts, _map(run, label(run, found["varied"]))]


def _map(run: Run, title: str) -> Chart:
    """The effective rank of each module of a run: kinds as rows, layers as columns."""
    from lorafit.ranks import by_kind

    kinds = by_kind(run.ranks)
    layers = list(dict.fromkeys(layer for members in kinds.values() for layer in members))
    layers.sort(key=lambda layer: int(layer) if layer.isdecimal() else math.inf)
    cells = [[kinds[kind].get(layer) for layer in layers] for kind in kinds]
    trace = {
        "type": "heatmap",
        "x": [_plain(layer, 24) for layer in layers],
        "y": [_plain(kind, 24) for kind in kinds],
        "z": [[cell and cell[1] / cell[0] for cell in row] for row in cells],
        "text": [[f"{cell[1]:g}" if cell else "" for cell in row] for row in cells],
        "texttemplate": "%{text}" if len(layers) <= 16 else "",
        "hovertext": [
            [
                f"{_plain(kind)}, layer {_plain(layer, 24)}: {cell[1]:g} of {cell[0]}" if cell else ""
                for layer, cell in zip(layers, row, strict=True)
            ]
            for kind, row in zip(kinds, cells, strict=True)
        ],
        "hoverinfo": "text",
        # light enough for the page's text, whichever that is
        "colorscale": [[0, "rgba(59, 130, 214, 0.06)"], [1, "rgba(59, 130, 214, 0.7)"]],
        "zmin": 0,
        "zmax": 1,
        "xgap": 2,
        "ygap": 2,
        "showscale": False,
    }
    layout = {
        "xaxis": {"title": {"text": "layer"}, "type": "category", "showgrid": False},
        "yaxis": {"autorange": "reversed", "type": "category", "showgrid": False},
    }
    words = f"Effective rank of each adapted module of {title}, by kind and layer; the darker, the more of its rank."
    chart = _chart(
        "effective-map", f"By module: {title}", words, [trace], layout, height=max(220, 90 + 30 * len(kinds))
    )
    chart.switches = ()
    return chart


# --------------------------------------------------------------------------------------------------------------- ladder


def ladders(found: Mapping[str, Any]) -> list[Chart]:
    """For each trained ladder: the loss of the adapter cut to a rank, and of that rank trained for real."""
    charts = []
    for place, steps in enumerate(found["ladder"][:6]):
        traces = []
        for key, name, symbol, dash in (
            ("cut", "cut", "diamond", "dash"),
            ("trained", "trained for real", "circle", "solid"),
        ):
            rows = [row for row in steps["rows"] if row[key] is not None]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": name,
                    "x": [row["rank"] for row in rows],
                    "y": [row[key] for row in rows],
                    "line": {"dash": dash, "width": 2, "color": _COLOURS[key == "trained"]},
                    "marker": {"size": 9, "symbol": symbol},
                    "hovertext": [f"rank {row['rank']}, {name}: {row[key]:.4g}" for row in rows],
                    "hoverinfo": "text",
                }
            )
        ranks = [row["rank"] for row in steps["rows"]]
        values = [row[key] for row in steps["rows"] for key in ("cut", "trained") if row[key] is not None]
        layout = {
            "xaxis": {
                "title": {"text": "rank"},
                "type": "log",
                "tickvals": ranks,
                "ticktext": [f"{rank}" for rank in ranks],
            },
            "yaxis": {"title": {"text": "held-out loss"}, "type": _scale(values)},
        }
        charts.append(_chart(f"ladder-{place}", "", steps["sentence"], traces, layout))
    return charts
