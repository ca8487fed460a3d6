"""The page of a report: one HTML file that needs no network, for a screen or a phone, in light and in dark.

It refuses the network itself (its content security policy allows nothing from outside), and what it shows of run
folders is escaped: they may hold anything. Parts for which there is nothing to show are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lorafit.reporting.charts import Chart, curves, effective_ranks, ladders, plotly_script, quality
from lorafit.reporting.choice import label, name_of, value_of
from lorafit.reporting.runs import STATUSES, Run

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #5f6770; --paper: #ffffff; --line: #d9dde1; --soft: #f4f6f8;
  --good: #1a7f37; --warn: #8a5a00; --bad: #b3261e; --link: #1f6feb; --mark: #eaf6ee; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --dim: #9aa2aa; --paper: #15181b; --line: #353b41;
  --soft: #1d2125; --good: #6fdd8b; --warn: #e3b341; --bad: #ff8a80; --link: #6cb0ff; --mark: #17281d; } }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 76rem; padding: 1.5rem 1.25rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { max-width: 46rem; margin: .4rem 0; } .dim { color: var(--dim); }
.verdict { margin: 1.5rem 0 0; padding: 1rem 1.25rem; border-left: 4px solid var(--good); background: var(--mark);
  border-radius: 0 6px 6px 0; } .verdict p:first-child { font-size: 1.1rem; line-height: 1.45; margin-top: 0; }
.verdict.none { border-color: var(--warn); background: var(--soft); }
.warning { border-left: 4px solid var(--bad); padding: .5rem 1.25rem; margin: 1rem 0 0; background: var(--soft); }
pre { font: 13px/1.5 ui-monospace, monospace; background: var(--soft); border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem .8rem; margin: .5rem 0; overflow-x: auto; }
pre.command { user-select: all; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--paper); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13.5px; min-width: min(100%, 28rem); }
caption { text-align: left; color: var(--dim); padding-bottom: .4rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 2.5rem); }
td, th { padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top; white-space: nowrap; }
thead th { color: var(--dim); font-weight: 500; border-bottom: 1px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 400; } tbody tr + tr > * { border-top: 1px solid var(--soft); }
.number { text-align: right; font-variant-numeric: tabular-nums; } tr.chosen > * { background: var(--mark); }
td.wide { white-space: normal; min-width: 14rem; } td.marks { white-space: normal; min-width: 9rem; }
.tag { color: var(--good); font-weight: 600; } .status::before { content: "●"; margin-right: .4em; }
.completed { color: var(--good); } .interrupted { color: var(--warn); }
.diverged, .out_of_memory, .failed { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem 2rem; margin-top: .75rem; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; }
.switch { font-size: 13px; color: var(--dim); } .switch button { font: inherit; color: var(--dim); background: none;
  border: 1px solid var(--line); border-radius: 4px; padding: .1rem .5rem; margin-left: .3rem; cursor: pointer; }
.switch button[aria-pressed="true"] { color: var(--ink); border-color: var(--dim); background: var(--soft); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1.25rem; margin: .5rem 0; }
dt { color: var(--dim); } dd { margin: 0; }
.js-plotly-plot .main-svg text { fill: var(--ink) !important; }
.js-plotly-plot .hoverlayer .hovertext path { fill: var(--soft) !important; stroke: var(--line) !important; }
.js-plotly-plot .modebar-container { opacity: 0; } figure:hover .modebar-container { opacity: 1; }
.js-plotly-plot .modebar-group { background: var(--paper) !important; }
.js-plotly-plot .modebar-btn path { fill: var(--dim) !important; }
@media (max-width: 52rem) { .charts { grid-template-columns: minmax(0, 1fr); }
  body { padding: 1rem .9rem 3rem; } dl { grid-template-columns: minmax(0, 1fr); } dd { margin-bottom: .4rem; } }
"""
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_SWITCHES = """
for (const button of document.querySelectorAll("button[data-chart]")) {
  button.addEventListener("click", () => {
    const { chart, axis, type } = button.dataset;
    const ticks = type === "log" ? "D2" : null; // as reporting/charts.py sets them
    Plotly.relayout(chart, { [axis + ".type"]: type, [axis + ".dtick"]: ticks, [axis + ".autorange"]: true });
    for (const other of button.parentElement.querySelectorAll("button")) {
      other.setAttribute("aria-pressed", other === button);
    }
  });
}
"""


def report_page(title: str, runs: Sequence[Run], found: Mapping[str, Any]) -> str:
    """The page of the runs below a folder. title: what the folder is called; found: the content of report.json."""
    body = [
        f"<h1>{_words(title)}</h1>",
        f'<p class="dim">{_words(summary(runs, found), 600)}</p>',
        _verdict(found),
        *(f'<p class="warning"><strong>{_words(text, 1000)}</strong></p>' for text in found["warnings"]),
        "<h2>All runs</h2>",
        _runs_table(runs, found),
    ]
    sections = [
        ("Quality against size", _QUALITY, quality(runs, found)),
        ("Learning curves", _CURVES, curves(runs, found)),
        ("Effective rank", _EFFECTIVE, effective_ranks(runs, found)),
    ]
    drawn = bool(found["ladder"]) or any(charts for _, _, charts in sections)
    if drawn:
        body.append(f"<script>{plotly_script()}</script>")
    for head, words, charts in sections:
        if charts:
            body += [f"<h2>{head}</h2>", f"<p>{words}</p>", _figures(charts)]
    if any(run.rungs for run in runs):
        body += ["<h2>Where halving looked</h2>", _rungs_table(runs, found)]
    if found["ladder"]:
        body.append("<h2>One run for many ranks</h2>")
        for steps, chart in zip(found["ladder"], ladders(found), strict=False):
            body += [f"<p>{_words(steps['sentence'], 800)}</p>", _figures([chart]), _ladder_table(steps)]
    body += [*_failures(runs), *_not_read(found), "<h2>How the numbers were made</h2>", _origins(runs, found)]
    if drawn:
        body.append(f"<script>{_SWITCHES}</script>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>lorafit report: {_words(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


_QUALITY = (
    "Each mark is a completed run. A run with a ring is on the Pareto front: none is smaller and better, or equal in "
    "one and better in the other. The one in a square is recommended. Numbers beside marks are ranks."
)
_CURVES = (
    "Thin lines are the training loss, dashed lines with marks the held-out loss. A click in the legend hides a run."
)
_EFFECTIVE = (
    "How many directions an adapter's update really has. Where it is far below the rank in all layers, a smaller rank "
    "may do."
)


# ---------------------------------------------------------------------------------------------------------------- words


def _words(text: object, width: int = 120) -> str:
    """A text of somebody's file, for HTML."""
    from lorafit.terminal import shorten, visible

    return escape(shorten(visible(str(text)), width))


def _human(count: float | None) -> str:
    from lorafit.terminal import human

    return "–" if count is None else human(count)


def _number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else f"{value:{form}}"


def spelled(status: str) -> str:
    return status.replace("_", " ")


def summary(runs: Sequence[Run], found: Mapping[str, Any]) -> str:
    """How many runs there are, how they ended and in what they differ."""
    counts = {status: sum(run.status == status for run in runs) for status in STATUSES}
    ends = ", ".join(f"{count:,} {spelled(status)}" for status, count in counts.items() if count)
    varied = [name_of(key) for key in found["varied"]]
    differ = f" They differ in {', '.join(varied)}." if varied else ""
    return f"{len(runs):,} run{'' if len(runs) == 1 else 's'}: {ends}.{differ}"


def forgetting(run: Run) -> float | None:
    """The perplexity of other text with the adapter, as a multiple of that without; None where nobody measured it."""
    without, with_it = (run.retention.get(f"perplexity_adapter_{state}", 0.0) for state in ("off", "on"))
    return with_it / without if without > 0 and with_it > 0 else None


def shown_metrics(runs: Sequence[Run]) -> list[str]:
    """The numbers after training that a table shows; a perplexity beside its loss is the same in other words."""
    keys = list(dict.fromkeys(key for run in runs for key in run.after))
    return [key for key in keys if not (key == "perplexity" and "loss" in keys)]


# --------------------------------------------------------------------------------------------------------------- pieces


def _table(caption: str, heads: Iterable[tuple[str, bool]], rows: Iterable[str]) -> str:
    """heads: (title, whether its column holds numbers); rows: whole table rows. Too wide a table scrolls by itself."""
    head = "".join(f'<th scope="col"{_NUMBER if right else ""}>{_words(title, 60)}</th>' for title, right in heads)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


_NUMBER = ' class="number"'


def _row(cells: Iterable[str], chosen: bool = False) -> str:
    """A table row; the first cell is its head."""
    first, *others = cells
    kind = ' class="chosen"' if chosen else ""
    return f'<tr{kind}><th scope="row">{first}</th>{"".join(others)}</tr>'


def _cell(text: str, number: bool = False) -> str:
    return f"<td{_NUMBER if number else ''}>{text}</td>"


def _verdict(found: Mapping[str, Any]) -> str:
    chosen = found["recommended"]
    if chosen is None:
        return f'<div class="verdict none"><p>{_words(found["sentence"], 1000)}</p></div>'
    again = (
        '<p class="dim">The command that makes this run again:</p>'
        f'<pre class="command">{escape(chosen["command"])}</pre>'
        if chosen["command"]
        else '<p class="dim">Its command was not recorded.</p>'
    )
    return f'<div class="verdict"><p>{_words(found["sentence"], 1200)}</p>{again}</div>'


def _runs_table(runs: Sequence[Run], found: Mapping[str, Any]) -> str:
    metrics, varied = shown_metrics(runs), found["varied"]
    heads = [("run", False), ("status", False), *((name_of(key), False) for key in varied)]
    heads += [(key.replace("_", " "), True) for key in metrics]
    kept = {run.folder: forgetting(run) for run in runs}
    forgets = any(share is not None for share in kept.values())
    heads += [("other text", True)] if forgets else []
    heads += [("parameters", True), ("peak memory", True), ("training", True), ("tokens/s", True)]
    heads += [("Pareto front of", False)]
    rows = []
    for run in runs:
        numbers = run.numbers
        chosen = bool(found["recommended"]) and run.folder == found["recommended"]["folder"]
        seconds = numbers.get("train_seconds")
        marks = [_FRONTS[size] for size, on in found["pareto"].get(run.folder, {}).items() if on]
        cells = [
            _words(run.folder, 80) + (' <span class="tag">recommended</span>' if chosen else ""),
            _cell(f'<span class="status {run.status}">{spelled(run.status)}</span>'),
            *(_cell(_words(value_of(key, run.settings[key]), 40) if key in run.settings else "–") for key in varied),
            *(_cell(_number(run.after.get(key)), number=True) for key in metrics),
            *([_cell("–" if kept[run.folder] is None else f"{kept[run.folder]:.3f}", number=True)] if forgets else []),
            _cell(_number(numbers.get("parameters_trainable"), ","), number=True),
            _cell(_human(numbers.get("peak_bytes")), number=True),
            _cell("–" if seconds is None else f"{seconds:,.{0 if seconds >= 10 else 1}f} s", number=True),
            _cell(_number(numbers.get("supervised_tokens_per_second"), ",.0f"), number=True),
            f'<td class="marks">{", ".join(marks)}</td>',
        ]
        rows.append(_row(cells, chosen))
    caption = "Every run: what it ended with on held-out data, and what it took. Tokens are those that are trained."
    if forgets:
        caption += " Other text: its perplexity with the adapter, as a multiple of that without."
    return _table(caption, heads, rows)


_FRONTS = {"rank": "rank", "parameters_trainable": "params", "peak_bytes": "memory", "train_seconds": "time"}


def _rungs_table(runs: Sequence[Run], found: Mapping[str, Any]) -> str:
    shares = sorted({share for run in runs for share in run.rungs})
    rows = [
        _row(
            [
                _words(label(run, found["varied"]), 80),
                *(_cell(_number(run.rungs.get(share)), number=True) for share in shares),
                _cell(spelled(run.status)),
            ]
        )
        for run in runs
        if run.rungs
    ]
    heads = [("run", False), *((f"at {100 * share:.3g} %", True) for share in shares), ("in the end", False)]
    return _table("Held-out loss at the shares of its steps where a run was compared with the others.", heads, rows)


def _figures(charts: Sequence[Chart]) -> str:
    """The charts of a section, two in a row where there is room. A chart without a title has that of its section."""
    figures = []
    for chart in charts:
        switches = "".join(_switch(chart, axis, word, log) for axis, word, log in chart.switches)
        head = f"<figcaption>{_words(chart.title)}</figcaption>" if chart.title else ""
        figures.append(
            f'<figure aria-label="{_words(chart.words, 1000)}">{head}{chart.html}'
            f'<div class="switch">{switches}</div></figure>'
        )
    return f'<div class="{"charts" if len(charts) > 1 else ""}">{"".join(figures)}</div>'


def _switch(chart: Chart, axis: str, word: str, log: bool) -> str:
    buttons = "".join(
        f'<button type="button" data-chart="{chart.name}" data-axis="{axis}" data-type="{kind}" '
        f'aria-pressed="{"true" if on else "false"}">{kind}</button>'
        for kind, on in (("linear", not log), ("log", log))
    )
    return f'<span role="group" aria-label="{word} axis">{word} {buttons}</span> '


def _ladder_table(steps: Mapping[str, Any]) -> str:
    heads = [("rank", True), ("parameters", True), ("loss, cut", True), ("loss, trained", True), ("difference", True)]
    rows = [
        _row(
            [
                f"{row['rank']}",
                _cell(_number(row["parameters"], ","), number=True),
                _cell(_number(row["cut"]), number=True),
                _cell(_number(row["trained"]), number=True),
                _cell(_number(row["difference"], "+.2g"), number=True),
                _cell("" if row["folder"] is None else _words(row["folder"], 80)),
            ]
        )
        for row in steps["rows"]
    ]
    caption = "The held-out loss of one trained adapter cut to each rank, and of runs that trained the rank."
    return _table(caption, [*heads, ("trained in", False)], rows)


def _failures(runs: Sequence[Run]) -> list[str]:
    parts = []
    for run in runs:
        if run.completed:
            continue
        error = f"<p>{_words(run.error, 2000)}</p>" if run.error else '<p class="dim">No reason was recorded.</p>'
        # halving stops a run on purpose: its log says nothing more
        log = [] if (run.error or "").startswith("halving:") else run.log
        lines = f"<pre>{_words(chr(10).join(log), 6000)}</pre>"
        tail = f'<p class="dim">The last lines of its log:</p>{lines}' if log else ""
        state = f'<span class="status {run.status}">{spelled(run.status)}</span>'
        parts.append(f"<h3>{_words(run.folder)} {state}</h3>{error}{tail}")
    return ["<h2>What did not complete, and why</h2>", *parts] if parts else []


def _not_read(found: Mapping[str, Any]) -> list[str]:
    rows = [
        _row([_words(item["folder"]), f'<td class="wide">{_words(item["reason"], 300)}</td>'])
        for item in found["not_read"]
    ]
    if not rows:
        return []
    return [
        "<h2>What was not read</h2>",
        _table("Folders and files left out.", [("folder", False), ("why", False)], rows),
    ]


def _origins(runs: Sequence[Run], found: Mapping[str, Any]) -> str:
    metric = found["metric"].replace("_", " ")
    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, number in run.versions.items():
            versions.setdefault(name, {})[number] = None
    differ = [name for name, numbers in versions.items() if len(numbers) > 1]
    bases = {f"{run.before[found['metric']]:.4g}": None for run in runs if found["metric"] in run.before}
    said = [
        (
            "judged by",
            f"{metric} on held-out rows, after training; {100 * found['kept']:.3g} % of the best gain is enough",
        ),
        (f"{metric} of the base", ", ".join(bases)),
        ("model", _several(run.settings.get("model.name") for run in runs)),
        ("data", _several(run.settings.get("data.path") for run in runs)),
        ("held-out rows", _several(run.numbers.get("eval_examples") for run in runs)),
        ("training rows", _several(run.numbers.get("train_examples") for run in runs)),
        ("seeds", _several(run.numbers.get("seed") for run in runs)),
        ("versions", ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in versions.items())),
        ("not the same in all runs", ", ".join(differ)),
    ]
    items = "".join(f"<dt>{_words(name)}</dt><dd>{_words(text, 800)}</dd>" for name, text in said if text)
    rows = [_row([_words(run.folder, 80), _cell(_words(run.config_sha256, 64))]) for run in runs if run.config_sha256]
    hashes = _table(
        "The hash of each run's settings: equal for equal settings.", [("run", False), ("sha256", False)], rows
    )
    notes = "<p>Peak memory is that of the CUDA device; on a CPU it is that of the process, its libraries included.</p>"
    return f"<dl>{items}</dl>{notes}" + (
        f"<details><summary>Settings by hash</summary>{hashes}</details>" if rows else ""
    )


def _several(values: Iterable[Any]) -> str:
    """The different values, in a line."""
    found = list(dict.fromkeys(str(value) for value in values if value is not None))
    return ", ".join(found[:8]) + (f" and {len(found) - 8:,} more" if len(found) > 8 else "")
