"""What several runs say together: where they differ, which of them nothing beats, and which one is enough.

    evidence = weigh(runs, metric="loss", kept=0.99)
    evidence["sentence"]                  the recommendation, or why there is none
    evidence["recommended"]["command"]    what makes that run again

The best run is seldom the one to take. Recommended is the smallest run (trainable parameters, then peak memory, then
time) that keeps `kept` of the best run's gain over the base. The base is the worst of those that were measured, so that
a run over a 4-bit base is judged by what comes out of it and not by how bad its base was. Perplexities are compared by
their logarithms. Runs of equal settings that differ in their seed count as one, by their mean.

Numbers of different models or held-out rows are no evidence for each other: such runs are told apart, and only the
largest group of runs is judged.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from lorafit.errors import InputError, did_you_mean
from lorafit.ranks import recommend
from lorafit.reporting.runs import Run
from lorafit.schema import CONF, NO_PART_OF_A_RUN

# what a run is compared by beside its metric: less is better
SIZES = ("parameters_trainable", "peak_bytes", "train_seconds")

_WATCHING = (*NO_PART_OF_A_RUN, "ladder")  # settings that do not change the adapter
# settings that say what is measured; the later ones where the held-out rows are a part of the training data
_MEASURED = (
    *("model.name", "model.revision", "model.init", "task.name", "task.eval_examples", "data.eval_path"),
    *("data.eval_split", "data.subset", "data.format", "data.columns", "data.template", "data.system"),
    *("data.max_length", "data.overflow", "data.train_on", "data.limit"),
)
_HELD_OUT = ("data.path", "data.split", "data.eval_fraction")
# the setting of a section that others in it follow, and its shorter name
_HEADS = {
    "quant": "quant.type",
    "optimizer": "optimizer._target_",
    "model": "model.name",
    "scheduler": "scheduler.name",
}
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# ------------------------------------------------------------------------------------------------------------- settings


def varied_settings(runs: Sequence[Run]) -> list[str]:
    """The keys in which the runs differ, without those that only follow from another: alpha from the rank."""
    values: dict[str, dict[str, Any]] = {}
    for run in runs:
        for key, value in run.settings.items():
            if key.partition(".")[0] not in _WATCHING:
                values.setdefault(key, {})[json.dumps(value)] = value
    varied = [key for key, found in values.items() if len(found) > 1][:40]
    given = {text.lstrip("+~").partition("=")[0] for run in runs for text in run.overrides or ()}
    shown = [key for key in varied if not _follows(key, varied, runs, given)]
    return sorted(shown, key=lambda key: {"rank": 0, "seed": 2}.get(key, 1))  # most sweeps are about ranks


def _follows(key: str, varied: Sequence[str], runs: Sequence[Run], given: set[str]) -> bool:
    if key == "alpha" and "rank" in varied:
        return len({scaling(run) for run in runs} - {None}) == 1
    head = _HEADS.get(key.partition(".")[0])
    if head is None or head == key or head not in varied or key in given:
        return False
    by_head: dict[str, set[str]] = {}
    for run in runs:
        if key in run.settings:
            by_head.setdefault(json.dumps(run.settings.get(head)), set()).add(json.dumps(run.settings[key]))
    return all(len(found) == 1 for found in by_head.values())


def scaling(run: Run) -> float | None:
    """alpha / rank, where the run has both."""
    rank, alpha = run.settings.get("rank"), run.settings.get("alpha")
    if not isinstance(rank, int | float) or not isinstance(alpha, int | float) or not rank:
        return None
    return alpha / rank


def name_of(key: str) -> str:
    """A setting's name for a person: quant for quant.type, optimizer for optimizer._target_."""
    section = key.partition(".")[0]
    return section if _HEADS.get(section) == key else key


def value_of(key: str, value: Any) -> str:
    """A setting's value for a person, in a line."""
    if value is None:
        return "none"
    text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    return text.rpartition(".")[2] if key.endswith("_target_") else text


def label(run: Run, keys: Iterable[str]) -> str:
    """A run by its settings: "rank 4, quant nf4". The name of its folder, where none of them is known or too many."""
    parts = [f"{name_of(key)} {value_of(key, run.settings[key])}" for key in keys if key in run.settings]
    return ", ".join(parts) if 0 < len(parts) <= 6 else run.folder


# ------------------------------------------------------------------------------------------------------- good and small


def falls(metric: str) -> bool:
    """Whether less of a metric is better: a loss, a perplexity, a divergence; of all others more is."""
    return "loss" in metric or "perplexity" in metric or metric == "kl"


def goodness(metric: str, value: float | None) -> float | None:
    """A number that grows with the quality; None where there is none. Perplexities grow by their logarithm."""
    if value is None or ("perplexity" in metric and value <= 0):
        return None
    if "perplexity" in metric:
        value = math.log(value)
    return -value if falls(metric) else value


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """The Pareto front of (size, goodness): the places of the points that none beats.

    One beats another that is smaller or as small, and better or as good, and not the same in both.
    """
    found: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1])):
        # of all that are smaller, the last one found is the best
        if not found or points[place][1] > points[found[-1]][1] or points[place] == points[found[-1]]:
            found.append(place)
    return set(found)


# ----------------------------------------------------------------------------------------------------------- the choice


@dataclass
class Candidate:
    """Runs of equal settings, most often one. value: their mean; spread: what lies between the best and the worst."""

    runs: list[Run]
    good: float
    value: float
    spread: float | None
    size: tuple[float, float, float]  # of SIZES, means; infinite where nobody counted

    @property
    def best(self) -> Run:
        return self.runs[0]


def weigh(runs: Sequence[Run], *, metric: str, kept: float) -> dict[str, Any]:
    """What report.json says beside the runs themselves.

    {"varied", "metric", "kept", "recommended": {...} | None, "sentence", "warnings", "ladder", "pareto"}
    InputError where completed runs have numbers, and none of them is this metric.
    """
    completed = [run for run in runs if run.completed]
    require_metric(completed, metric)
    judged = [run for run in completed if goodness(metric, run.after.get(metric)) is not None]
    varied = varied_settings(runs)
    groups = comparable(judged, varied, metric)
    chosen, sentence = choose(groups[0], varied, metric, kept) if groups else (None, without_numbers(runs, metric))
    steps = [found for run in completed if (found := ladder(run, completed, kept)) is not None]
    if chosen is not None and len(judged) == 1 and steps:
        sentence = chosen["sentence"] = f"{sentence} {steps[0]['sentence']}"
    return {
        "varied": varied,
        "metric": metric,
        "kept": kept,
        "recommended": chosen,
        "sentence": sentence,
        "warnings": warn(groups, varied, metric),
        "ladder": steps,
        "pareto": {run.folder: marks for group in groups for run, marks in pareto(group, metric)},
    }


def require_metric(completed: Sequence[Run], metric: str) -> None:
    """Raise InputError when runs have numbers and none of them is the one that they are to be judged by."""
    known = list(dict.fromkeys(key for run in completed for key in run.after))
    if known and metric not in known:
        hint = did_you_mean(metric, known)
        raise InputError(f"report.metric: no run has {metric!r} after training, they have {', '.join(known)}.{hint}")


def without_numbers(runs: Sequence[Run], metric: str) -> str:
    """Why nothing can be recommended."""
    if not any(run.completed for run in runs):
        return f"Nothing can be recommended: of {_count(len(runs), 'run')} none is completed."
    return f"Nothing can be recommended: no completed run has a number for {metric}."


def comparable(runs: Sequence[Run], varied: Sequence[str], metric: str) -> list[list[Run]]:
    """The runs in groups that share their base model, their held-out rows and their way to measure; the largest group
    first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        alike = json.dumps([run.settings.get(key) for key in _measured(run, varied, metric)])
        groups.setdefault(alike, []).append(run)
    return sorted(groups.values(), key=len, reverse=True)


def _measured(run: Run, varied: Sequence[str], metric: str) -> list[str]:
    keys = _MEASURED if run.settings.get("data.eval_path") is not None else (*_MEASURED, *_HELD_OUT)
    if metric not in ("loss", "perplexity"):  # what comes of answers
        keys = (*keys, "task.generate_examples", "task.max_new_tokens")
    return [key for key in keys if key in varied]


def warn(groups: Sequence[Sequence[Run]], varied: Sequence[str], metric: str) -> list[str]:
    """What makes a comparison one of unlike things, a sentence each."""
    found = []
    if len(groups) > 1:
        keys = sorted({key for group in groups for key in _measured(group[0], varied, metric)}, key=varied.index)
        found.append(
            f"Not like with like: the runs differ in {_and(map(name_of, keys))}, so their numbers say nothing about "
            f"each other. The recommendation looks only at the {len(groups[0])} of {sum(map(len, groups))} runs with "
            f"{label(groups[0][0], keys)}."
        )
    for group in groups[:1]:
        trained = [key for key in varied if key in _HELD_OUT and len({str(run.settings.get(key)) for run in group}) > 1]
        if trained:
            found.append(
                f"Not like with like: the runs are trained on different data ({_and(trained)}). A difference between "
                "them may come from there."
            )
        found += _bases(group, metric)
    return found


def _bases(group: Sequence[Run], metric: str) -> list[str]:
    """A sentence where the base was measured twice in the same way, and was not the same."""
    seen: dict[str, Run] = {}
    for run in group:
        if metric not in run.before:
            continue
        way = {key: value for key, value in run.settings.items() if key.partition(".")[0] in ("model", "quant")}
        first = seen.setdefault(json.dumps(way, sort_keys=True), run)
        one, other = first.before[metric], run.before[metric]
        if not math.isclose(one, other, rel_tol=0.01, abs_tol=1e-9):
            return [
                f"Not like with like: before training, {metric} was {one:.4g} in {first.folder} and {other:.4g} in "
                f"{run.folder}, over the same base. Their held-out rows or their models are not the same."
            ]
    return []


def choose(group: Sequence[Run], varied: Sequence[str], metric: str, kept: float) -> tuple[dict[str, Any] | None, str]:
    """(what is recommended among comparable runs, the sentence that says so); None where none improves on the base."""
    candidates = gather(group, metric)
    best = max(candidates, key=lambda candidate: candidate.good)
    keys = [key for key in varied if key != "seed" or all(len(candidate.runs) == 1 for candidate in candidates)]
    bases = [
        (good, run.before[metric]) for run in group if (good := goodness(metric, run.before.get(metric))) is not None
    ]
    if not bases:
        return None, (
            f"Nothing can be recommended: no run measured its base, so that no gain can be told. The best "
            f"{_word(metric)} is {best.value:.4g}, of {label(best.best, keys)}."
        )
    base_good, base = min(bases)
    gain = best.good - base_good
    if gain <= 0:
        return None, (
            f"Nothing can be recommended: no run improves on the base, whose {_word(metric)} is {base:.4g}; the best "
            f"run's is {best.value:.4g} ({label(best.best, keys)})."
        )
    enough = [candidate for candidate in candidates if candidate.good >= best.good - (1 - kept) * gain]
    small = _smallest(enough)
    share = (small.good - base_good) / gain
    run = small.best
    found = {
        "folder": run.folder,
        "label": label(run, keys),
        "value": small.value,
        "runs": len(small.runs),
        "spread": small.spread,
        "gain_kept": share,
        "base": base,
        "best": {"folder": best.best.folder, "label": label(best.best, keys), "value": best.value},
        "of_parameters": _ratio(small.size[0], best.size[0]),
        "of_memory": _ratio(small.size[1], best.size[1]),
        "compared": len(group),
        "command": command(run),
    }
    sentences = [_verdict(small, best, len(candidates), found, metric, kept), *_doubts(small, best, candidates, keys)]
    return found | {"sentence": " ".join(sentences)}, " ".join(sentences)


def _smallest(candidates: Sequence[Candidate]) -> Candidate:
    """The one of the fewest parameters; of several, the best of those whose memory and time are about the least.

    Memory and time of equal runs differ by chance, so that only what is clearly more counts.
    """
    left = list(candidates)
    for place, tolerance in enumerate((1.0, 1.1, 1.25)):  # of SIZES: parameters, memory, time
        least = min(candidate.size[place] for candidate in left)
        left = [candidate for candidate in left if candidate.size[place] <= tolerance * least]
    return max(left, key=lambda candidate: candidate.good)


def gather(group: Sequence[Run], metric: str) -> list[Candidate]:
    """The runs, those together that differ in nothing but the seed; the best of each first."""
    same: dict[str, list[tuple[float, Run]]] = {}
    for run in group:
        rest = {key: value for key, value in run.settings.items() if key.partition(".")[0] not in (*_WATCHING, "seed")}
        good = goodness(metric, run.after[metric])
        assert good is not None
        # settings that nobody recorded are not known to be equal
        key = json.dumps(rest, sort_keys=True) if run.overrides is not None else run.folder
        same.setdefault(key, []).append((good, run))
    found = []
    for members in same.values():
        members.sort(key=lambda item: -item[0])
        goods, runs = [good for good, _ in members], [run for _, run in members]
        values = [run.after[metric] for run in runs]
        mean, seeds = statistics.fmean(goods), {run.settings.get("seed") for run in runs}
        found.append(
            Candidate(
                runs=runs,
                good=mean,
                value=math.exp(-mean) if "perplexity" in metric else statistics.fmean(values),
                spread=max(values) - min(values) if len(seeds) > 1 else None,  # the same run twice is no spread
                size=tuple(_mean(run.numbers.get(key) for run in runs) for key in SIZES),  # type: ignore[arg-type]
            )
        )
    return found


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else math.inf


def _verdict(small: Candidate, best: Candidate, count: int, found: Mapping[str, Any], metric: str, kept: float) -> str:
    word, called = _word(metric), _capital(found["label"])
    means = f" (mean of {_count(len(small.runs), 'run')})" if len(small.runs) > 1 else ""
    if count == 1:
        return f"{called} is the only choice: {word} {small.value:.4g}{means}, where the base has {found['base']:.4g}."
    if small is best:
        return (
            f"{called} is the one to take: it has the best {word}, {small.value:.4g}{means}, and nothing smaller keeps "
            f"{_percent(kept)} of its gain over the base ({found['base']:.4g})."
        )
    costs = [
        f"{_share(ratio)} {what}"
        for ratio, what in ((found["of_parameters"], "trainable parameters"), (found["of_memory"], "peak memory"))
        if ratio is not None
    ]
    return (
        f"{called} is enough: {word} {small.value:.4g}{means} keeps {_percent(found['gain_kept'])} of the gain of "
        f"the best run ({found['best']['label']}: {best.value:.4g})" + (f", with {_and(costs)}." if costs else ".")
    )


def _doubts(small: Candidate, best: Candidate, candidates: Sequence[Candidate], keys: Sequence[str]) -> list[str]:
    """Where seeds were varied: whether the choice stands out from what a seed makes of a run."""
    spreads = [candidate.spread for candidate in candidates if candidate.spread is not None]
    if not spreads:
        return []
    widest = max(spreads)
    smaller = [candidate for candidate in candidates if candidate.size < small.size]
    neighbours = [max(smaller, key=lambda candidate: candidate.size)] if smaller else []
    neighbours += [best] if best is not small else []
    close = [other for other in neighbours if abs(other.value - small.value) <= widest]
    told = f"Runs that differ only in their seed lie up to {widest:.2g} apart."
    if not close:
        return [told + " The differences that decide are larger."] if neighbours else [told]
    names = _and(f"{label(other.best, keys)} ({other.value:.4g})" for other in close)
    return [f"{told} The difference from {names} is within that: it may be chance, and more seeds would tell."]


# -------------------------------------------------------------------------------------------------------------- command


def command(run: Run) -> str | None:
    """The command that makes a run again, alone; None where its overrides are not known, or cannot be typed."""
    if run.overrides is None or any(_CONTROLS.search(text) for text in run.overrides):
        return None
    words = ["python", "-m", "lorafit.train"]
    swept = False
    for text in run.overrides:
        key, _, value = text.lstrip("+~").partition("=")
        if key == "resume" or key.partition(".")[0] in ("hydra", "halving") or key.startswith("hydra/"):
            continue
        if key == "sweep":
            if _only_sweeps(value):
                continue
            swept = True
        words.append(text)
    # a file of conf/sweep that gives settings as well is kept for them, and would sweep again
    return shlex.join([*words, *(["hydra.mode=RUN"] if swept else [])])


def _only_sweeps(name: str) -> bool:
    """Whether a file of conf/sweep says which jobs there are, and nothing that a job alone would be told."""
    path = CONF / "sweep" / f"{name}.yaml"
    if not re.fullmatch(r"[\w-]+", name) or not path.is_file():
        return False
    return set(yaml.safe_load(path.read_text())) <= {"hydra", "halving"}


# --------------------------------------------------------------------------------------------------------------- pareto


def pareto(group: Sequence[Run], metric: str) -> list[tuple[Run, dict[str, bool | None]]]:
    """For each run and each size: whether no other run of the group beats it. None where it has no such size."""
    marks: list[tuple[Run, dict[str, bool | None]]] = [(run, {}) for run in group]
    for size in ("rank", *SIZES):
        known = [place for place, run in enumerate(group) if size in run.numbers]
        points = []
        for place in known:
            good = goodness(metric, group[place].after[metric])
            assert good is not None
            points.append((group[place].numbers[size], good))
        on_front = {known[place] for place in front(points)}
        for place, (_, mark) in enumerate(marks):
            mark[size] = place in on_front if place in known else None
    return marks


# --------------------------------------------------------------------------------------------------------------- ladder


def ladder(run: Run, others: Sequence[Run], kept: float) -> dict[str, Any] | None:
    """How a trained adapter, cut to smaller ranks, compares with runs that trained those.

    None without a ladder, and where a run of a higher rank and otherwise the same settings has one.
    """
    if not run.ladder or not isinstance(run.settings.get("rank"), int):
        return None
    own = max(run.ladder)  # with a rank_pattern another one than `rank`
    alike = own == run.settings["rank"]
    family = [other for other in others if alike and "loss" in other.after and _same_but_rank(run, other)]
    if any(other.ladder and other.settings["rank"] > own for other in family):
        return None  # the longer one says it all
    trained = {other.settings["rank"]: other for other in family}
    rows: list[dict[str, Any]] = []
    for rank, (loss, parameters) in sorted(run.ladder.items()):
        real = trained.get(rank) if rank != own else run
        value = real.after.get("loss") if real is not None else None
        difference = None if value is None or rank == own else loss - value
        row = {"rank": rank, "parameters": parameters, "cut": loss, "trained": value, "difference": difference}
        rows.append(row | {"folder": None if real is None else real.folder})
    pairs = [row for row in rows if row["difference"] is not None]
    found: dict[str, Any] = {"folder": run.folder, "rank": own, "rows": rows}
    gaps = [abs(row["difference"]) for row in pairs]
    found["mean_difference"] = statistics.fmean(gaps) if gaps else None
    found["largest_difference"] = max(gaps, default=None)
    found["rank_correlation"] = spearman([row["cut"] for row in pairs], [row["trained"] for row in pairs])
    found["recommended_rank"] = _enough(run, own, {row["rank"]: row["cut"] for row in rows}, kept)
    for way, key in (("cutting", "cut"), ("training", "trained")):
        # the same ranks on both sides
        losses = {row["rank"]: row[key] for row in rows if row["trained"] is not None}
        found[f"recommended_by_{way}"] = _enough(run, own, losses, kept) if pairs else None
    return found | {"sentence": _ladder_sentence(found, pairs, kept)}


def _enough(run: Run, own: int, losses: Mapping[int, float], kept: float) -> int | None:
    """The rank that `lorafit.ranks` would recommend of these; None without the own rank's loss or that of the base."""
    base = run.before.get("loss")
    return None if base is None or own not in losses else recommend(losses, base, losses[own], kept)


def _same_but_rank(run: Run, other: Run) -> bool:
    """Whether two runs differ in their rank alone; alpha may stay, or follow the rank."""
    if not isinstance(other.settings.get("rank"), int) or other.settings["rank"] == run.settings["rank"]:
        return False
    keys = {
        key for key in (*run.settings, *other.settings) if key.partition(".")[0] not in (*_WATCHING, "rank", "alpha")
    }
    if any(run.settings.get(key) != other.settings.get(key) for key in keys):
        return False
    return run.settings.get("alpha") == other.settings.get("alpha") or scaling(run) == scaling(other)


def _ladder_sentence(found: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]], kept: float) -> str:
    own, enough = found["rank"], found["recommended_rank"]
    adapter, rule = f"The rank {own} adapter of {found['folder']}", f"at least {_percent(kept)} of its gain"
    if enough is None:
        said = f"{adapter} was cut to smaller ranks."
    elif enough == own:
        said = f"{adapter} needs its rank: cut to none of the smaller ones it keeps {rule}."
    else:
        said = f"{adapter}, cut to rank {enough}, keeps {rule}."
    if not pairs:
        return f"{said} No run trained a smaller rank with otherwise its settings, to compare with."
    worst = max(pairs, key=lambda row: abs(row["difference"]))
    said += (
        f" Its loss when cut differs from that of the rank trained for real by {found['mean_difference']:.2g} on "
        f"average and by {found['largest_difference']:.2g} at most, at rank {worst['rank']}."
    )
    cut, trained = found["recommended_by_cutting"], found["recommended_by_training"]
    if cut is not None and cut == trained:
        said += f" Of the ranks trained for real, both ways recommend {cut}."
    elif cut is not None and trained is not None:
        said += f" Of the ranks trained for real, cutting recommends {cut} and training {trained}."
    if found["rank_correlation"] is not None:
        said += f" The order of the ranks agrees to {found['rank_correlation']:.2f} (1 is the same order)."
    return said


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The rank correlation of two rows of numbers; None of fewer than four, or where one of them never changes."""
    if len(one) < 4 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return statistics.correlation(_places(one), _places(other))


def _places(values: Sequence[float]) -> list[float]:
    """The place of each value among all, equal values in the middle of their places."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


# ---------------------------------------------------------------------------------------------------------------- words


def _word(metric: str) -> str:
    return metric.replace("_", " ")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _share(ratio: float) -> str:
    return "the same" if math.isclose(ratio, 1, abs_tol=0.005) else f"{_percent(ratio)} of its"


def _ratio(one: float, other: float) -> float | None:
    return one / other if math.isfinite(one) and math.isfinite(other) and other > 0 else None


def _and(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
