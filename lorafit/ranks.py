"""How much rank an adapter needs, measured; and the same adapter with less of it.

    python -m lorafit.ranks adapter=DIR                    what each layer uses, and the held-out loss at smaller ranks
    python -m lorafit.ranks adapter=DIR out=NEW            the adapter cut to the recommended rank
    python -m lorafit.ranks adapter=DIR out=NEW rank=8     or to a rank, or with energy=0.99 each layer to its own

The spectra say how much of an update few directions hold; they do not say what those do for the task. So the adapter is
cut to each of a row of ranks and its held-out loss is measured, more finely where it begins to matter. The recommended
rank is the smallest that keeps 99 % of the gain over the base, as all larger ones that were measured do.

Leaves `ranks.json` and `ranks.svg`. A smaller adapter is measured after it was read back, and its card says how it
came about.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.build import adapter_folders, build_data, load_adapted, refuse_foreign
from lorafit.config import Config
from lorafit.errors import InputError
from lorafit.launch import start

if TYPE_CHECKING:
    from lorafit.datamodule import FinetuneDataModule

KEPT = 0.99  # the share of the gain that a recommended rank keeps
SHARES = (0.9, 0.99)  # of an update's energy, for which the ranks are told


def main() -> None:
    start("ranks", run)


def run(config: Config, folder: Path) -> None:
    """One study of an adapter: writes its files and prints; with `out` also the smaller adapter."""
    from lorafit.evaluation import evaluate_loss
    from lorafit.files import write_atomically, write_json
    from lorafit.terminal import console
    from lorafit.trainer import quiet_libraries

    refuse_foreign(config, "ranks")
    quiet_libraries()
    terminal = console()
    source = check_request(config)
    data = build_data(config)
    data.setup()
    if not len(data.eval_sequences):
        raise InputError("ranks are judged by held-out rows, and there are none: give data.eval_path=FILE")
    model = load_adapted(config)
    data.check_vocabulary(model.get_input_embeddings().num_embeddings)
    check_ranks(model, config.rank)
    batches = list(data.eval_batches())
    terminal.print("measuring the adapter at smaller ranks …")
    found = study(model, lambda: evaluate_loss(model, batches)["loss"], kept=KEPT)
    write_json(folder / "ranks.json", found)
    if config.out is not None:
        terminal.print("measuring the smaller adapter …")
        found["cut"] = write_smaller(config, data, model, found, source)
        write_json(folder / "ranks.json", found)
    picture = ranks_picture(found)
    write_atomically(folder / "ranks.svg", lambda file: file.write(picture.encode()))
    for part in ranks_tables(found):
        terminal.print(part)
    terminal.print(f"The same as a picture: {folder / 'ranks.svg'}")


def check_request(config: Config) -> Path:
    """The folder of the one adapter that is meant; InputError for what cannot be done, before anything is loaded."""
    folders = adapter_folders(config)
    if len(folders) > 1:
        raise InputError(f"adapter: ranks looks at one adapter at a time, got {len(folders)}: give adapter=DIR")
    if config.rank is not None and config.energy is not None:
        raise InputError(
            f"rank={config.rank} and energy={config.energy} are two ways to cut an adapter: give one of them"
        )
    for key, value in (("rank", config.rank), ("energy", config.energy)):
        if value is not None and config.out is None:
            raise InputError(f"{key}={value} says how to cut the adapter, not where to: give out=DIR as well")
    if config.out is not None:
        from lorafit.merging import require_new

        require_new(config.out, outside_of=list(folders.values()))
    return next(iter(folders.values()))


def check_ranks(model: Any, rank: int | None) -> None:
    """Raise InputError where the model has nothing to cut, or has no such rank."""
    from lorafit.inject import lora_layers

    layers = lora_layers(model)
    if not layers:
        raise InputError(
            "adapter: it has no LoRA layers, only modules that were trained whole: there is no rank to cut"
        )
    highest = max(layer.rank for layer in layers.values())
    if rank is not None and rank > highest:
        raise InputError(f"rank={rank} is above the adapter's own, which is {highest}: give rank={highest} or less")


# ------------------------------------------------------------------------------------------------------------ measuring


def study(model: Any, loss: Callable[[], float], *, kept: float = KEPT) -> dict[str, Any]:
    """What ranks.json holds, from an adapted model and the held-out loss as it is at the time of the call.

    The model comes back as it was, to the bit.
    """
    from lorafit.inject import adapters_off
    from lorafit.spectrum import Trial, effective_rank, energy, rank_for_energy

    with Trial(model) as trial:
        own = trial.ranks
        highest = max(own.values())
        full_loss = loss()
        with adapters_off(model):
            base_loss = loss()
        losses = {highest: full_loss}

        def measure_at(rank: int) -> None:
            trial.keep(rank=rank)
            losses[rank] = loss()

        for rank in even_ranks(highest):
            measure_at(rank)
        while (between := untried(losses, base_loss, full_loss, kept)) is not None:
            measure_at(between)
        by_energy = {}
        for share in SHARES:
            ranks = trial.keep(energy=share)
            by_energy[str(share)] = {"loss": loss(), "ranks": ranks, "parameters": trial.parameters(ranks)}
        spectra = trial.spectra
    effective = {name: effective_rank(values) for name, values in spectra.items()}
    recommended = recommend(losses, base_loss, full_loss, kept)
    gains = recommended is not None
    if recommended is None:
        recommended = max(1, *effective.values())
    capped = {name: min(recommended, rank) for name, rank in own.items()}
    return {
        "modules": {
            name: {
                "rank": own[name],
                "parameters": trial.parameters({name: own[name]}),
                "effective_rank": effective[name],
                "energy": energy(values),
                "energy_ranks": {str(share): rank_for_energy(values, share) for share in SHARES},
            }
            for name, values in spectra.items()
        },
        "loss_by_rank": {rank: losses[rank] for rank in sorted(losses)},
        "recommended_rank": recommended,
        "gains": gains,
        "kept": kept,
        "base_loss": base_loss,
        "full_loss": full_loss,
        "energy_ranks": by_energy,
        "parameters": {"now": trial.parameters(own), "recommended": trial.parameters(capped)},
    }


def even_ranks(highest: int) -> list[int]:
    """The ranks below `highest` that are measured first: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, …"""
    steps = {2**power for power in range(highest.bit_length())}
    steps |= {step + step // 2 for step in steps}
    return sorted(step for step in steps if step < highest)


def recommend(losses: Mapping[int, float], base_loss: float, full_loss: float, kept: float) -> int | None:
    """The smallest measured rank that keeps `kept` of the gain, as all larger measured ones do; None without a gain.

    losses: by rank, that of the whole adapter among them. The gain is base_loss - full_loss.
    """
    gain = base_loss - full_loss
    if not 0 < gain < math.inf:  # nor where a loss is not a number
        return None
    found = max(losses)
    for rank in sorted(losses, reverse=True)[1:]:
        if not base_loss - losses[rank] >= kept * gain:
            break
        found = rank
    return found


def untried(losses: Mapping[int, float], base_loss: float, full_loss: float, kept: float) -> int | None:
    """The rank half way between the recommended one and the next smaller one that was measured, if there is any."""
    upper = recommend(losses, base_loss, full_loss, kept)
    if upper is None:
        return None
    lower = max((rank for rank in losses if rank < upper), default=0)
    return (upper + lower) // 2 if upper - lower > 1 else None


def write_smaller(
    config: Config, data: FinetuneDataModule, model: Any, found: Mapping[str, Any], source: Path
) -> dict[str, Any]:
    """Cut the adapter, write it to `out`, read it back and measure that; return what ranks.json says of it."""
    from lorafit.adapter import load_adapter, read_record, save_adapter
    from lorafit.adapter.files import weights_file
    from lorafit.inject import adapters_off, detach_adapter
    from lorafit.measuring import measure, retention_text
    from lorafit.retention import measure_retention
    from lorafit.spectrum import cut

    assert config.out is not None
    record = read_record(source)
    rank = found["recommended_rank"] if config.rank is None and config.energy is None else config.rank
    with adapters_off(model):
        base, _ = measure(config, data, model)
    whole, _ = measure(config, data, model)
    ranks = cut(model, rank=rank, energy=config.energy)
    provenance: dict[str, Any] = {
        key: record[key] for key in ("data", "settings", "config_sha256", "versions") if key in record
    }
    options: dict[str, Any] = {
        # the base may be called otherwise here; the recorded name is the one that others find it by
        "base_model": None if config.allow_other_base else record.get("base_model"),
        "dtype": config.save.dtype,
    }
    save_adapter(model, config.out, provenance=provenance, **options)
    detach_adapter(model)
    load_adapter(model, config.out, allow_other_base=config.allow_other_base)
    model.eval()
    after, _ = measure(config, data, model)
    provenance["metrics"] = {
        "before": base,
        "after": after,
        "retention": measure_retention(model, retention_text(config, data)),
    }
    modules = found["modules"]
    provenance["cut_from"] = {
        "rank": max(module["rank"] for module in modules.values()),
        "parameters": found["parameters"]["now"],
        **whole,
    }
    if config.energy is not None:
        provenance["cut_from"]["energy"] = config.energy
    save_adapter(model, config.out, provenance=provenance, **options)
    return {
        "out": config.out,
        "rank": rank,
        "energy": config.energy,
        "ranks": ranks,
        "parameters": sum(modules[name]["parameters"] // modules[name]["rank"] * ranks[name] for name in ranks),
        "bytes": weights_file(Path(config.out)).stat().st_size,
        "base": base,
        "whole": whole,
        "smaller": after,
    }


# -------------------------------------------------------------------------------------------------------- in a terminal

_BARS = "▁▂▃▄▅▆▇█"


def by_kind(modules: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{kind: {layer: module}}: the last part of a module's name, and the number of the layer that it belongs to."""
    kinds: dict[str, dict[str, Any]] = {}
    for name, module in modules.items():
        layer = re.search(r"\.(\d+)\.", name)
        kinds.setdefault(name.rpartition(".")[2], {})[layer[1] if layer else name] = module
    return kinds


def gain_kept(found: Mapping[str, Any], loss: float) -> float | None:
    """The share of the gain over the base that an adapter of this loss keeps; None where there is no gain."""
    gain = found["base_loss"] - found["full_loss"]
    return (found["base_loss"] - loss) / gain if found["gains"] else None


def ranks_tables(found: Mapping[str, Any]) -> list[Any]:
    """What a study found, for the terminal."""
    from rich.table import Table
    from rich.text import Text

    from lorafit.terminal import number

    layers = Table(box=None, padding=(0, 2, 0, 0))
    layers.add_column("module", style="bold")
    heads = ("layers", "rank", "effective rank", *(f"for {share:.0%} of the energy" for share in SHARES))
    for head in heads:
        layers.add_column(head, justify="right")
    layers.add_column(f"that for {SHARES[0]:.0%} by layer", overflow="fold")
    for kind, members in by_kind(found["modules"]).items():
        values = list(members.values())
        columns = [[module[key] for module in values] for key in ("rank", "effective_rank")]
        columns += [[module["energy_ranks"][str(share)] for module in values] for share in SHARES]
        heights = [min(7, 8 * module["energy_ranks"][str(SHARES[0])] // module["rank"]) for module in values]
        marks = "".join(_BARS[height] for height in heights)
        layers.add_row(Text(kind), str(len(values)), *map(_range, columns), marks)
    chart = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("rank", "held-out loss", "gain kept"):
        chart.add_column(head, justify="right")
    chart.add_column()
    chart.add_row("base", number(found["base_loss"]), "", "")
    for rank, loss in found["loss_by_rank"].items():
        kept = gain_kept(found, loss)
        here = rank == found["recommended_rank"]
        bar = "" if kept is None or math.isnan(kept) else "█" * round(40 * min(1.0, max(0.0, kept)))
        chart.add_row(
            str(rank),
            number(loss),
            "–" if kept is None else f"{kept:.1%}",
            bar + (" recommended" if here else ""),
            style="bold green" if here else None,
        )
    return [layers, "", chart, "", Text(verdict(found))]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def verdict(found: Mapping[str, Any]) -> str:
    """The recommendation in a sentence or two."""
    from lorafit.terminal import human

    rank, highest = found["recommended_rank"], max(found["loss_by_rank"])
    if not found["gains"]:
        text = (
            f"On these held-out rows the adapter gains nothing (loss {found['full_loss']:.4g}, the base's "
            f"{found['base_loss']:.4g}), so no rank can be judged by them. Rank {rank} is the largest effective rank "
            "of its layers."
        )
    elif rank == highest:
        text = f"Rank {rank} is used: no smaller rank that was measured keeps {found['kept']:.0%} of the gain."
    else:
        share = found["parameters"]["recommended"] / found["parameters"]["now"]
        kept = gain_kept(found, found["loss_by_rank"][rank])
        text = f"Rank {rank} is enough: it keeps {kept:.1%} of the gain with {share:.0%} of the adapter's parameters."
    cut = found.get("cut")
    if cut is None:
        return text
    size = (
        f"rank {_range(list(cut['ranks'].values()))}, {cut['parameters'] / found['parameters']['now']:.0%} "
        f"of the parameters, {human(cut['bytes'])}"
    )
    outcome = ", ".join(
        f"{key.replace('_', ' ')} {value:.4g} (whole {cut['whole'][key]:.4g}, base {cut['base'][key]:.4g})"
        for key, value in cut["smaller"].items()
        if key != "perplexity"  # which is the loss in other words
    )
    return f"{text}\nWritten to {cut['out']} ({size}). Read back: {outcome}."


# ------------------------------------------------------------------------------------------------------------ a picture

_STYLE = """
svg { color-scheme: light dark; --ink: #1c2024; --dim: #697078; --paper: #ffffff; --line: #d9dde1; --mark: #1a7f37;
  --data: #1f6feb; font: 12px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e8ea; --dim: #9aa2aa; --paper: #15181b; --line: #353b41;
  --mark: #6fdd8b; --data: #6cb0ff; } }
text { fill: var(--ink); } .dim { fill: var(--dim); } .title { font-size: 15px; font-weight: 600; }
.paper { fill: var(--paper); } .axis { stroke: var(--line); } .level { stroke: var(--dim); stroke-dasharray: 5 4; }
.mark { stroke: var(--mark); stroke-width: 2; } text.mark { fill: var(--mark); stroke: none; font-weight: 600; }
.curve { fill: none; stroke: var(--data); stroke-width: 2; } .thin { stroke-width: 1; opacity: 0.35; }
.dot { fill: var(--data); } .cell { fill: var(--data); } .right { text-anchor: end; } .middle { text-anchor: middle; }
"""
_LEFT, _WIDTH, _RIGHT = 96, 620, 120


def ranks_picture(found: Mapping[str, Any]) -> str:
    """An SVG that needs nothing else: the loss by rank, the energy curves, and two maps of the layers."""
    parts: list[str] = []
    y = 28
    for draw in (_losses, _energies, _directions, _effective):
        shapes, height = draw(found)
        parts.append(f'<g transform="translate(0 {y})">{"".join(shapes)}</g>')
        y += height + 36
    width = _LEFT + _WIDTH + _RIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" role="img">'
        f"<title>{escape(verdict(found))}</title><style>{_STYLE}</style>"
        f'<rect class="paper" width="{width}" height="{y}"/>{"".join(parts)}</svg>\n'
    )


def _text(x: float, y: float, words: object, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(str(words))}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _curve(points: Iterable[tuple[float, float]], kind: str, words: str = "") -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" class="{kind}"><title>{escape(words)}</title></polyline>'


def _by_rank(highest: int) -> Callable[[float], float]:
    """Where a rank stands on a logarithmic axis from 1 to the highest."""
    span = math.log2(max(highest, 2))
    return lambda rank: _LEFT + _WIDTH * math.log2(rank) / span


def _rank_axis(highest: int, y: float) -> list[str]:
    at = _by_rank(highest)
    ticks = sorted({2**power for power in range(highest.bit_length())} | {highest})
    # the last power of two would stand under the highest rank's own number
    ticks = [rank for rank in ticks if rank == highest or at(highest) - at(rank) > 24]
    return [
        _line(_LEFT, y, _LEFT + _WIDTH, y, "axis"),
        *(_text(at(rank), y + 16, rank, "dim middle") for rank in ticks),
        _text(_LEFT + _WIDTH + 12, y + 16, "rank", "dim"),
    ]


def _losses(found: Mapping[str, Any]) -> tuple[list[str], int]:
    height = 220
    losses = {rank: loss for rank, loss in found["loss_by_rank"].items() if math.isfinite(loss)}
    levels = {
        name: loss
        for name, loss in (("base", found["base_loss"]), ("whole", found["full_loss"]))
        if math.isfinite(loss)
    }
    values = [*losses.values(), *levels.values()]
    low, high = min(values, default=0.0), max(values, default=1.0)
    at = _by_rank(max(found["loss_by_rank"]))

    def down(loss: float) -> float:
        return 40 + (height - 60) * (high - loss) / ((high - low) or 1.0)

    shapes = [
        _text(_LEFT, 0, "Held-out loss of the adapter cut to a rank", "title"),
        *_rank_axis(max(found["loss_by_rank"]), height),
    ]
    for name, loss in levels.items():
        # two levels that are one line have their words one below the other
        beside = name == "whole" and "base" in levels and abs(down(loss) - down(levels["base"])) < 14
        shapes.append(_line(_LEFT, down(loss), _LEFT + _WIDTH, down(loss), "level"))
        shapes.append(_text(_LEFT + _WIDTH + 8, down(loss) + (18 if beside else 4), f"{name} {loss:.4g}", "dim"))
    rank = found["recommended_rank"]
    if rank in losses or not found["gains"]:
        shapes.append(_line(at(rank), 24, at(rank), height, "mark"))
        side = "mark right" if at(rank) > _LEFT + _WIDTH / 2 else "mark"
        shapes.append(_text(at(rank) + (-6 if "right" in side else 6), 32, f"recommended: {rank}", side))
    shapes.append(_curve([(at(rank), down(loss)) for rank, loss in losses.items()], "curve"))
    for rank, loss in losses.items():
        kept = gain_kept(found, loss)
        words = f"rank {rank}: loss {loss:.4g}" + ("" if kept is None else f", {kept:.1%} of the gain")
        shapes.append(
            f'<circle cx="{at(rank):.1f}" cy="{down(loss):.1f}" r="4" class="dot"><title>{words}</title></circle>'
        )
    return shapes, height + 20


def _energies(found: Mapping[str, Any]) -> tuple[list[str], int]:
    height = 160
    highest = max(module["rank"] for module in found["modules"].values())
    at = _by_rank(highest)
    shapes = [
        _text(_LEFT, 0, "Share of each update's energy in its first directions", "title"),
        *_rank_axis(highest, height),
    ]
    for share in (0.5, 0.9, 1.0):
        y = height - (height - 20) * share
        shapes += [_line(_LEFT, y, _LEFT + _WIDTH, y, "axis"), _text(_LEFT - 8, y + 4, f"{share:.0%}", "dim right")]
    for name, module in found["modules"].items():
        points = [(at(rank), height - (height - 20) * share) for rank, share in enumerate(module["energy"], 1)]
        shapes.append(_curve(points, "curve thin", name))
    return shapes, height + 20


def _effective(found: Mapping[str, Any]) -> tuple[list[str], int]:
    return _layers(found, "Effective rank", lambda module: module["effective_rank"])


def _directions(found: Mapping[str, Any]) -> tuple[list[str], int]:
    title = f"Rank for {SHARES[0]:.0%} of the energy"
    return _layers(found, title, lambda module: module["energy_ranks"][str(SHARES[0])])


def _layers(found: Mapping[str, Any], title: str, number: Callable[[Any], int]) -> tuple[list[str], int]:
    """A number of each module, by kind (rows) and layer (columns), the darker the more of the rank it is."""
    kinds = by_kind(found["modules"])
    columns = list(dict.fromkeys(layer for members in kinds.values() for layer in members))
    columns.sort(key=lambda layer: int(layer) if layer.isdigit() else math.inf)
    width = min(48.0, _WIDTH / len(columns))
    shapes = [_text(_LEFT, 0, f"{title}, by kind of module (rows) and layer (columns)", "title")]
    for row, (kind, members) in enumerate(kinds.items()):
        y = 16 + 24 * row
        shapes.append(_text(_LEFT - 8, y + 15, kind if len(kind) < 14 else f"{kind[:12]}…", "dim right"))
        for layer, module in members.items():
            x = _LEFT + width * columns.index(layer)
            value = number(module)
            words = f"{kind}, layer {layer}: {value} of {module['rank']}"
            shapes.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width - 2:.1f}" height="22" class="cell" '
                f'opacity="{0.08 + 0.62 * value / module["rank"]:.2f}"><title>{escape(words)}</title></rect>'
            )
            if width >= 18:
                shapes.append(_text(x + width / 2 - 1, y + 15, value, "middle"))
    return shapes, 24 * len(kinds) + 20


if __name__ == "__main__":
    main()
