"""The page of an audit: one HTML file that needs no network, readable in light and in dark, on a screen and on a
phone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #697078; --paper: #ffffff; --line: #d9dde1;
  --trained: #b7ebc6; --masked: #eceef0; --cut: #ffc9c4; --bad: #b3261e; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --dim: #9aa2aa; --paper: #15181b; --line: #353b41;
  --trained: #1d5a31; --masked: #2a2f34; --cut: #7a2a25; --bad: #ff8a80; --good: #6fdd8b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; border-top: 1px solid var(--line); padding-top:
1rem; } .scroll { overflow-x: auto; } table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0;
  text-align: left; vertical-align: top; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.tokens { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens span { border-radius: 3px; padding: 1px 0; box-shadow: inset 1px 0 var(--paper); }
.trained { background: var(--trained); } .masked { background: var(--masked); }
.cut { background: var(--cut); text-decoration: line-through; }
.key span { padding: 1px .5em; border-radius: 3px; margin-right: .6em; }
.place, .dim { color: var(--dim); } .bad { color: var(--bad); } .good { color: var(--good); }
.cell { display: inline-block; width: .8em; height: .8em; margin-right: 2px; border-radius: 2px; background:
var(--masked); } .cell.on { background: var(--good); }
"""


def audit_page(found: Mapping[str, Any], source: str) -> str:
    """The page of what an audit found (the content of audit.json); source: what the data is called."""
    refusals = found["refusals"]
    verdict = (
        f'<p class="bad"><strong>{len(refusals)} refused.</strong> Training would go wrong without a word.</p>'
        + _list(f"<strong>{escape(item['check'])}</strong> {escape(item['message'])}" for item in refusals)
        if refusals
        else '<p class="good"><strong>Nothing is wrong.</strong> Every check passed.</p>'
    )
    body = [
        f"<h1>What would be trained: {escape(source)}</h1>",
        verdict,
        _list(escape(note) for note in found["notes"]),
        "<h2>Counts</h2>",
        _counts(found),
        "<h2>Examples</h2>",
        '<p class="key"><span class="trained">trained</span><span class="masked">masked</span>'
        '<span class="cut">cut</span></p>',
        *(_example(example) for example in found["examples"]),
        "<h2>Linear layers</h2>",
        _coverage(found),
        *_rows("Rows that were skipped", found["bad_rows"], found["skipped_rows"]),
        *_rows("Rows that repeat an earlier one", found["duplicate_rows"], found["duplicate_examples"]),
        *_rows("Training rows that are held out as well", found["leaked_rows"], found["leaked_examples"]),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>lorafit audit: {escape(source)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _list(items: Iterable[str]) -> str:
    lines = "".join(f"<li>{item}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""


def _counts(found: Mapping[str, Any]) -> str:
    total, supervised = found["total_tokens"], found["supervised_tokens"]
    share = f" ({supervised / total:.1%})" if total else ""
    rows = [
        ("training examples", f"{found['train_examples']:,}"),
        ("held-out examples", f"{found['eval_examples']:,}"),
        ("tokens", f"{total:,}"),
        ("trained tokens", f"{supervised:,}{share}"),
        ("longest example, in tokens", f"{found['longest']:,}"),
        ("cut examples", f"{found['truncated_examples']:,}"),
        ("dropped examples", f"{found['dropped_examples']:,}"),
        ("skipped rows", f"{found['skipped_rows']:,}"),
        ("duplicates", f"{found['duplicate_examples']:,}"),
        ("shared with the held-out rows", f"{found['leaked_examples']:,}"),
    ]
    lines = "".join(f'<tr><td>{name}</td><td class="number">{value}</td></tr>' for name, value in rows)
    return f'<div class="scroll"><table>{lines}</table></div>'


def _example(example: Mapping[str, Any]) -> str:
    spans = []
    for token in example["tokens"]:
        state = "cut" if token["cut"] else "trained" if token["trained"] else "masked"
        text = escape(token["text"]).replace("\n", "⏎\n")
        spans.append(f'<span class="{state}">{text}</span>')
    more = example["length"] - len(example["tokens"])
    rest = f'<span class="dim"> … {more:,} more tokens</span>' if more > 0 else ""
    outcome = "" if example["outcome"] == "whole" else f", {example['outcome']}"
    head = f"{escape(example['where'])}: {example['length']:,} tokens{outcome}"
    return f'<p class="place">{head}</p><div class="tokens">{"".join(spans)}{rest}</div>'


def _coverage(found: Mapping[str, Any]) -> str:
    lines = []
    for kind, entry in found["coverage"].items():
        cells = "".join(
            f'<span class="cell{" on" if on else ""}" title="{escape(f"layer {layer}" if layer else kind)}"></span>'
            for layer, on in found["layers"][kind].items()
        )
        adapted = f'<td class="number">{entry["wrapped"]} of {entry["total"]}</td>'
        lines.append(f"<tr><td>{escape(kind)}</td>{adapted}<td>{cells}</td></tr>")
    head = "<tr><th>kind</th><th>adapted</th><th>by layer</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'


def _rows(title: str, places: list[str], count: int) -> list[str]:
    if not count:
        return []
    more = [f"… and {count - len(places):,} more"] if count > len(places) else []
    return [f"<h2>{title} ({count:,})</h2>", _list(escape(place) for place in [*places, *more])]
