"""The report: it reads whatever lies in a folder, judges as one would by hand, and its page asks nobody for anything.

pytest tests/test_report.py
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st
from programs import run_program

from lorafit import report
from lorafit.config import compose, to_dict
from lorafit.errors import InputError
from lorafit.ranks import recommend
from lorafit.report import find_root, report_csv, study
from lorafit.reporting.charts import quality
from lorafit.reporting.choice import command, front, spearman, varied_settings, weigh
from lorafit.reporting.page import report_page
from lorafit.reporting.runs import POINTS, Run, find_runs, thinned

PARAMETERS = 10_240  # of a rank, on all layers of the embedded model
BASE = 8.0  # the loss before training


@functools.cache
def settings_of(overrides: Sequence[str]) -> dict[str, Any]:
    return to_dict(compose(overrides))


def resolved(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration that these overrides give. Ranks and seeds are put in by hand: to compose takes its time."""
    plain = {text.partition("=")[0]: text for text in overrides if re.fullmatch(r"(rank|seed)=\d+", text)}
    if any("alpha" in text or "experiment" in text for text in overrides):
        plain = {}
    values = settings_of(tuple(text for text in overrides if text not in plain.values()))
    values = values | {key: int(text.partition("=")[2]) for key, text in plain.items()}
    return values | ({"alpha": 2 * values["rank"]} if "rank" in plain else {})


def make_run(folder: Path, *overrides: str, loss: float | None = None, **parts: Any) -> Path:
    """A run folder as `lorafit.train` leaves it, of these overrides. parts: what metrics.json holds beside or instead.

    With a loss it is completed; without one it was interrupted.
    """
    config = resolved(overrides)
    rank, quant = config["rank"], config["quant"]
    metrics: dict[str, Any] = {
        "status": "interrupted" if loss is None else "completed",
        "model": {"name": config["model"]["name"], "parameters_trainable": PARAMETERS * rank, "quant": quant},
        "lora": {"rank": rank, "alpha": config["alpha"]},
        "data": {"train_examples": 3224, "eval_examples": 256},
        "before": {"loss": BASE, "perplexity": math.exp(BASE), "exact_match": 0.0},
        "memory": {"peak_bytes": 800 * 2**20 if quant is None else 400 * 2**20},
        "speed": {"steps": 250, "train_seconds": 30.0 + rank, "supervised_tokens_per_second": 1500.0},
        "seed": config["seed"],
        "versions": {"python": "3.11.7", "lorafit": "0.1.0", "torch": "2.13.0"},
        "config_sha256": "ab" * 32,
    }
    if loss is not None:
        metrics["after"] = {"loss": loss, "perplexity": math.exp(loss), "exact_match": 1 / (1 + loss)}
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    (folder / ".hydra" / "resolved.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.json").write_text(json.dumps(metrics | parts))
    return folder


def job(program: str | None, folder: Path) -> Path:
    """What Hydra writes before a job of a program of lorafit begins; None: of a program of somebody else."""
    (folder / ".hydra").mkdir(parents=True)
    given = [f"hydra.job.name={program}"] if program else []
    text = yaml.safe_dump({"hydra": {"job": {"name": program or "train"}, "overrides": {"hydra": given}}})
    (folder / ".hydra" / "hydra.yaml").write_text(text)
    (folder / ".hydra" / "overrides.yaml").write_text("- rank=4\n")
    return folder


def write_history(folder: Path, losses: Sequence[float], every: int = 5) -> None:
    rows: list[dict[str, Any]] = []
    for step, loss in enumerate(losses, 1):
        rows.append({"step": step, "train/loss": loss, "train/learning_rate": 1e-3})
        rows += [{"step": step, "eval/loss": loss * 1.1}] if step % every == 0 else []
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def judged(root: Path, metric: str = "loss", kept: float = 0.99) -> dict[str, Any]:
    return study(find_runs(root), metric=metric, kept=kept)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Ranks over two bases: by hand, 1 % of the gain (8 - 0.08) is 0.0792, so that 0.1592 is enough."""
    losses = {("none", 2): 0.5, ("none", 4): 0.159, ("none", 16): 0.08, ("nf4", 2): 0.6, ("nf4", 4): 0.158}
    for (quant, rank), loss in losses.items():
        folder = tmp_path / "sweep" / f"rank={rank},quant={quant}"
        # a command that is longer than a line
        overrides = (f"rank={rank}", f"quant={quant}", "trainer.max_steps=250", f"logger.tags=[{'long-' * 30}]")
        make_run(folder, *overrides, loss=loss)
    return tmp_path / "sweep"


# ------------------------------------------------------------------------------------------------------- what is chosen


def test_the_smallest_run_that_keeps_the_gain_is_recommended(sweep: Path) -> None:
    found = judged(sweep)
    chosen = found["recommended"]
    assert chosen["folder"] == "rank=4,quant=nf4"  # of two of rank 4 the one that takes less memory
    assert chosen["best"]["folder"] == "rank=16,quant=none"
    assert chosen["gain_kept"] == pytest.approx((8 - 0.158) / (8 - 0.08))
    assert chosen["command"].startswith("python -m lorafit.train rank=4 quant=nf4 trainer.max_steps=250 ")
    assert found["sentence"] == (
        "Rank 4, quant nf4 is enough: loss 0.158 keeps 99 % of the gain of the best run (rank 16, quant none: 0.08), "
        "with 25 % of its trainable parameters and 50 % of its peak memory."
    )


@pytest.mark.parametrize(
    ("kept", "folder"),
    [
        (1.0, "rank=16,quant=none"),
        (0.9902, "rank=16,quant=none"),
        (0.94, "rank=2,quant=none"),
        (0.93, "rank=2,quant=nf4"),
        (0.95, "rank=4,quant=nf4"),
    ],
)
def test_how_much_is_to_be_kept_decides(sweep: Path, kept: float, folder: str) -> None:
    assert judged(sweep, kept=kept)["recommended"]["folder"] == folder


def test_a_base_that_is_bad_does_not_make_its_run_look_better(tmp_path: Path) -> None:
    """Over its own base the 4-bit run gains more; what comes out of it is worse all the same."""
    make_run(tmp_path / "a", "quant=nf4", loss=1.0, before={"loss": 10.0})
    make_run(tmp_path / "b", "quant=none", loss=0.5, before={"loss": 8.0})
    found = judged(tmp_path)
    assert found["recommended"]["folder"] == "b"
    assert found["recommended"]["base"] == 10.0


def test_a_metric_that_grows_is_judged_the_other_way_round(tmp_path: Path) -> None:
    for rank, hits in ((1, 0.3), (2, 0.945), (4, 0.95)):
        after = {"loss": rank, "exact_match": hits}
        make_run(tmp_path / f"rank={rank}", f"rank={rank}", loss=1.0, after=after)
    assert judged(tmp_path, "exact_match")["recommended"]["folder"] == "rank=2"
    assert judged(tmp_path, "loss")["recommended"]["folder"] == "rank=1"


def test_perplexities_are_compared_by_their_logarithms(sweep: Path) -> None:
    """Of 2981 to 1.08 everything would keep 99 %; the choice is that by the loss."""
    assert judged(sweep, "perplexity")["recommended"]["folder"] == judged(sweep)["recommended"]["folder"]
    assert judged(sweep, "perplexity", 0.9999)["recommended"]["value"] == pytest.approx(math.exp(0.08))


def test_without_an_improvement_nothing_is_recommended(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "rank=2", loss=8.5)
    make_run(tmp_path / "b", "rank=4", loss=8.0)
    found = judged(tmp_path)
    assert found["recommended"] is None
    assert "no run improves on the base, whose loss is 8; the best run's is 8 (rank 4)" in found["sentence"]


def test_runs_that_did_not_complete_are_told_and_not_recommended(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "rank=2", status="diverged", error="not finite", after={"loss": 0.01})
    found = judged(tmp_path)
    assert found["recommended"] is None
    assert "of 1 run none is completed" in found["sentence"]
    assert [run["status"] for run in found["runs"]] == ["diverged"]


def test_a_single_run_is_the_only_choice_and_may_be_the_folder_itself(tmp_path: Path) -> None:
    found = judged(make_run(tmp_path / "run", "rank=2", loss=1.0))
    assert found["recommended"]["folder"] == "."
    assert "is the only choice: loss 1, where the base has 8." in found["sentence"]


def test_seeds_are_taken_together_and_their_spread_is_told(tmp_path: Path) -> None:
    losses = {2: (0.30, 0.36), 4: (0.15, 0.17), 8: (0.13, 0.15), 16: (0.10, 0.12)}
    for rank, values in losses.items():
        for seed, loss in enumerate(values):
            make_run(tmp_path / f"rank={rank},seed={seed}", f"rank={rank}", f"seed={seed}", loss=loss)
    chosen = judged(tmp_path)["recommended"]
    assert chosen["folder"] == "rank=4,seed=0"  # means 0.16 and 0.11; 1 % of the gain is 0.0789
    assert (chosen["runs"], chosen["value"]) == (2, pytest.approx(0.16))
    assert chosen["spread"] == pytest.approx(0.02)
    assert chosen["label"] == "rank 4"
    assert "lie up to 0.06 apart. The difference from rank 16 (0.11) is within that" in chosen["sentence"]
    assert "rank 2 (0.33)" not in chosen["sentence"]  # 0.17 away


def test_numbers_of_different_models_or_rows_are_not_compared(tmp_path: Path) -> None:
    for rank in (2, 4):
        make_run(tmp_path / f"a{rank}", f"rank={rank}", loss=1.0 / rank)
    make_run(tmp_path / "other", "rank=1", "data.limit=100", loss=0.01)
    found = judged(tmp_path)
    assert found["recommended"]["folder"] == "a4"
    assert found["recommended"]["compared"] == 2
    [warning] = found["warnings"]
    assert warning.startswith("Not like with like: the runs differ in data.limit")
    assert "2 of 3 runs with data.limit none" in warning
    assert found["runs"][-1]["pareto"] == dict.fromkeys(
        ("rank", "parameters_trainable", "peak_bytes", "train_seconds"), True
    )


def test_bases_that_should_be_one_and_are_not_are_told(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "rank=2", loss=1.0)
    make_run(tmp_path / "b", "rank=4", loss=0.5, before={"loss": 5.0})
    [warning] = judged(tmp_path)["warnings"]
    assert "before training, loss was 8 in a and 5 in b" in warning


def test_a_metric_that_no_run_has_is_refused_with_those_that_there_are(sweep: Path) -> None:
    with pytest.raises(InputError, match="no run has 'exact_mach'.*loss, perplexity, exact_match.*mean 'exact_match'"):
        judged(sweep, "exact_mach")


def test_what_only_follows_another_setting_is_no_column(tmp_path: Path) -> None:
    def varied(*jobs: Sequence[str]) -> list[str]:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for number, overrides in enumerate(jobs):
            make_run(root / str(number), *overrides, loss=1.0)
        return varied_settings(find_runs(root).runs)

    assert varied(["rank=2"], ["rank=4"]) == ["rank"]
    assert varied(["rank=2"], ["rank=4", "alpha=7"]) == ["rank", "alpha"]
    assert varied(["quant=none"], ["quant=nf4"], ["quant=int8"]) == ["quant.type"]
    assert varied(["optimizer=adamw"], ["optimizer=lion_8bit"]) == ["optimizer._target_"]
    assert varied(["optimizer=adamw", "optimizer.lr=1e-3"], ["optimizer=lion_8bit", "optimizer.lr=1e-4"]) == [
        "optimizer._target_",
        "optimizer.lr",
    ]
    assert varied(["seed=1", "rank=2"], ["seed=2", "rank=4"]) == ["rank", "seed"]
    assert varied(["logger=none"], ["logger=csv"]) == []


# --------------------------------------------------------------------------------------------------------------- fronts


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@given(points)
def test_the_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    expected = {place for place, point in enumerate(points) if not any(beats(other, point) for other in points)}
    assert front(points) == expected


def test_a_run_is_on_the_front_of_what_it_is_good_at(sweep: Path) -> None:
    marks = {run["folder"]: run["pareto"] for run in judged(sweep)["runs"]}
    assert [folder for folder, mark in marks.items() if mark["peak_bytes"]] == [
        "rank=4,quant=nf4",
        "rank=16,quant=none",
    ]
    assert [folder for folder, mark in marks.items() if mark["parameters_trainable"]] == [
        "rank=2,quant=none",
        "rank=4,quant=nf4",
        "rank=16,quant=none",
    ]


# -------------------------------------------------------------------------------------------------------------- ladders


def test_a_ladder_is_held_against_the_ranks_that_were_trained(tmp_path: Path) -> None:
    cut = {1: 3.0, 2: 1.0, 4: 0.15, 8: 0.11, 16: 0.1}
    trained = {1: 2.0, 2: 0.5, 4: 0.17, 8: 0.12}
    for rank, loss in trained.items():
        make_run(tmp_path / f"rank={rank}", f"rank={rank}", loss=loss)
    make_run(tmp_path / "rank=2,quant=nf4", "rank=2", "quant=nf4", loss=9.0)  # another base is no comparison
    counts = {str(rank): rank * PARAMETERS for rank in cut}
    ladder = {"losses": {str(rank): loss for rank, loss in cut.items()}, "parameters": counts}
    make_run(tmp_path / "all", "rank=16", "ladder=[1,2,4,8]", loss=0.1, ladder=ladder)
    shorter = {"losses": {"1": 3.0, "2": 0.5}, "parameters": {}}  # of rank 2, which the longer one covers
    metrics = json.loads((tmp_path / "rank=2" / "metrics.json").read_text())
    (tmp_path / "rank=2" / "metrics.json").write_text(json.dumps(metrics | {"ladder": shorter}))
    [found] = judged(tmp_path)["ladder"]
    differences = {row["rank"]: row["difference"] for row in found["rows"]}
    assert differences == pytest.approx({1: 1.0, 2: 0.5, 4: -0.02, 8: -0.01, 16: None})
    assert found["mean_difference"] == pytest.approx((1 + 0.5 + 0.02 + 0.01) / 4)
    assert found["largest_difference"] == pytest.approx(1.0)
    assert found["rank_correlation"] == pytest.approx(1.0)
    assert found["recommended_rank"] == found["recommended_by_cutting"] == recommend(cut, BASE, 0.1, 0.99) == 4
    assert found["recommended_by_training"] == recommend(trained | {16: 0.1}, BASE, 0.1, 0.99) == 4
    assert "cut to rank 4, keeps at least 99 % of its gain" in found["sentence"]
    assert "both ways recommend 4" in found["sentence"]


def test_a_ladder_alone_answers_which_rank(tmp_path: Path) -> None:
    ladder = {"losses": {"1": 3.0, "4": 0.15, "16": 0.1}, "parameters": {}}
    make_run(tmp_path / "all", "rank=16", "ladder=[1,4]", loss=0.1, ladder=ladder)
    found = judged(tmp_path)
    assert "cut to rank 4, keeps at least 99 % of its gain" in found["sentence"]
    assert found["ladder"][0]["recommended_by_training"] is None


def test_rank_correlation_is_that_of_the_closed_form() -> None:
    """1 - 6 sum d^2 / (n (n^2 - 1)), where no two are equal."""
    one, other = [1.0, 2.0, 3.0, 4.0, 5.0], [10.0, 30.0, 20.0, 50.0, 40.0]
    assert spearman(one, other) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman(one, [-value for value in one]) == pytest.approx(-1)
    # equal values share the middle of their places: 1.5, 1.5, 3, 4 against 1, 2, 3, 4
    assert spearman([1.0, 1.0, 2.0, 3.0], [1.0, 4.0, 5.0, 9.0]) == pytest.approx(math.sqrt(0.9))
    assert spearman(one[:3], other[:3]) is None
    assert spearman(one, [1.0] * 5) is None


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "overrides",
    [
        ["rank=4", "quant=nf4", "trainer.max_steps=250"],
        ["sweep=rank", "rank=8"],
        ["target_modules=[q_proj,v_proj]", "rank_pattern={q_proj: 2}", "rank=4"],
        ["experiment=smoke", "optimizer.lr=1e-4", "+optimizer.amsgrad=true", "lora/alpha=equal"],
        ["rank=4", "halving.factor=2", "hydra.sweep.dir=somewhere"],
    ],
)
def test_the_command_gives_the_settings_of_the_run(tmp_path: Path, overrides: list[str]) -> None:
    own = [text for text in overrides if not text.startswith("hydra")]
    make_run(tmp_path / "run", *own, loss=1.0)
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    [run] = find_runs(tmp_path).runs
    said = command(run)
    assert said is not None
    program, words = shlex.split(said)[:3], shlex.split(said)[3:]
    assert program == ["python", "-m", "lorafit.train"]
    assert not any(word.startswith(("hydra.sweep", "halving")) for word in words)
    again = to_dict(compose([word for word in words if not word.startswith("hydra.")]))
    assert again | {"halving": None} == to_dict(compose(own)) | {"halving": None}


def test_a_sweep_file_that_gives_settings_is_kept_and_does_not_sweep_again() -> None:
    def said(*overrides: str) -> str | None:
        return command(Run("run", Path(), overrides=list(overrides)))

    assert said("sweep=rank", "rank=4") == "python -m lorafit.train rank=4"
    assert said("sweep=halving", "rank=4", "optimizer.lr=1e-3") == "python -m lorafit.train rank=4 optimizer.lr=1e-3"
    assert said("sweep=rank_ladder", "rank=4") == "python -m lorafit.train sweep=rank_ladder rank=4 hydra.mode=RUN"
    assert said("sweep=mine", "rank=4") == "python -m lorafit.train sweep=mine rank=4 hydra.mode=RUN"
    assert said("sweep=../sweep/rank") == "python -m lorafit.train sweep=../sweep/rank hydra.mode=RUN"
    assert said("resume=there", "data.path=a b; rm -rf x") == "python -m lorafit.train 'data.path=a b; rm -rf x'"
    assert said("rank=4\nrm -rf x") is None
    assert command(Run("run", Path())) is None


# ---------------------------------------------------------------------------------------------------- what is looked at


def test_runs_are_found_however_deep_they_lie(tmp_path: Path) -> None:
    make_run(tmp_path / "outputs" / "2026-11-26" / "04-00-00", "rank=16", loss=1.0)
    make_run(tmp_path / "outputs" / "2026-11-26" / "04-00-01", "rank=8", loss=1.0)
    make_run(tmp_path / "outputs" / "2026-11-27" / "sweep" / "rank=2", "rank=2", loss=1.0)
    make_run(tmp_path / "outputs" / "2026-11-26" / "04-00-00" / "inner", "rank=1", loss=1.0)
    (tmp_path / "outputs" / "2026-11-26" / "04-00-00" / "plots").mkdir()
    for name in ("adapter", "checkpoints", "wandb", ".hidden"):
        make_run(tmp_path / "outputs" / "2026-11-26" / "04-00-00" / name / "not-me", "rank=1", loss=1.0)
    make_run(tmp_path / "wandb" / "run-1", "rank=1", loss=1.0)
    found = find_runs(tmp_path)
    assert [run.folder for run in found.runs] == [
        "outputs/2026-11-26/04-00-00",
        "outputs/2026-11-26/04-00-00/inner",
        "outputs/2026-11-26/04-00-01",
        "outputs/2026-11-27/sweep/rank=2",
    ]
    assert found.not_read == []


def test_a_job_that_was_killed_before_it_trained_is_a_run(tmp_path: Path) -> None:
    job("train", tmp_path / "killed")
    refused = job("train", tmp_path / "refused")
    (refused / "train.log").write_text("2026-11-26 04:00:00,1 ERROR lorafit.failure: rank must be\npositive\n")
    stopped = job("train", tmp_path / "stopped")
    (stopped / "train.log").write_text("2026-11-26 04:00:00,1 ERROR lorafit.failure: stopped by SIGTERM\n")
    runs = {run.folder: (run.status, run.error) for run in find_runs(tmp_path).runs}
    assert runs == {
        "killed": ("interrupted", None),
        "refused": ("failed", "rank must be\npositive"),
        "stopped": ("interrupted", "stopped by SIGTERM"),
    }


def test_what_is_no_run_is_named_with_the_reason(tmp_path: Path) -> None:
    make_run(tmp_path / "good", "rank=2", loss=1.0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes" / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "notes" / "deep" / "todo.txt").touch()
    job("merge", tmp_path / "merged")
    job(None, tmp_path / "stranger")
    (tmp_path / "link").symlink_to(tmp_path / "good")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "loose.txt").touch()
    not_read = dict(find_runs(tmp_path).not_read)
    assert not_read == {
        "empty": "empty",
        "notes": "not a run: it holds no metrics.json",
        "merged": "not a run of train, but of merge",
        "stranger": "not a run of train, but of another program",
        "link": "a link to another folder: not followed",
    }


BROKEN = {
    "nothing": (b"", "is not JSON"),
    "half": (b'{"status": "comp', "is not JSON"),
    "bytes": (b"\xff\xfe\x00", "is not JSON"),
    "list": (b"[1, 2]", "holds [1, 2], not the numbers of a run"),
    "stranger": (b'{"accuracy": 0.9}', "its status is none of a run's, null"),
    "number": (b'{"status": 5}', "its status is none of a run's, 5"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "digits": (b'{"status": ' + b"9" * 10_000 + b"}", "is not JSON"),
    "large": (b" " * (9 << 20), "holds 9 MB: more than 8 are not read"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_run_is_named_beside_those_that_are_whole(tmp_path: Path, kind: str) -> None:
    make_run(tmp_path / "good", "rank=2", loss=1.0)
    content, reason = BROKEN[kind]
    (tmp_path / "sweep" / "bad").mkdir(parents=True)
    (tmp_path / "sweep" / "bad" / "metrics.json").write_bytes(content)
    found = find_runs(tmp_path)
    assert [run.folder for run in found.runs] == ["good"]
    [(folder, why)] = found.not_read
    assert folder == "sweep/bad"
    assert reason in why


def test_files_that_are_no_files_are_not_waited_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "rank=2", status="failed")
    for name in ("history.jsonl", "train.log"):
        os.mkfifo(run / name)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "metrics.json")
    (tmp_path / "folder" / "metrics.json").mkdir(parents=True)
    assert find_runs(tmp_path).not_read == [
        ("folder", "metrics.json is not a file"),
        ("pipe", "metrics.json is not a file"),
        ("run", "history.jsonl is not a file"),
        ("run", "train.log is not a file"),
    ]


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so that the refusal is played."""
    make_run(tmp_path / "good", "rank=2", loss=1.0)
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_runs(tmp_path)
    assert len(found.runs) == 1
    assert found.not_read == [("closed", "cannot be read: Permission denied")]


def test_what_stands_where_a_number_should_is_named_and_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "rank=2", loss=1.0)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["after"] = {"loss": "low", "exact_match": 0.5, "perplexity": None, "f1": math.nan, "size": 10**400}
    metrics["memory"] = {"peak_bytes": -5}
    metrics["speed"] = "fast"
    text = json.dumps(metrics)
    (folder / "metrics.json").write_text(text)
    found = find_runs(tmp_path)
    [run] = found.runs
    assert run.after == {"exact_match": 0.5}
    assert {"peak_bytes", "train_seconds"}.isdisjoint(run.numbers)
    assert [why for _, why in found.not_read] == [
        "metrics.json: after.loss is not a number, but low",
        "metrics.json: after.f1 is not a number, but nan",
        "metrics.json: after.size is not a number, but a number of very many digits",
        "metrics.json: memory.peak_bytes is not a number, but -5",
        "metrics.json: speed is not a mapping, but fast",
    ]


def test_a_history_that_is_cut_off_or_holds_junk_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    cut, junk = make_run(tmp_path / "cut", "rank=2"), make_run(tmp_path / "junk", "rank=4")
    write_history(cut, [3.0, 2.0, 1.0])
    with (cut / "history.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    rows = [
        '{"step": 1, "train/loss": 3.0}',
        "junk",
        "[]",
        '{"step": "x"}',
        '{"step": 2, "train/loss": NaN}',
        "\xff",
        "7",
    ]
    rows += ['{"step": 3, "train/loss": 1.0, "eval/loss": 1.5}', '{"step": 1, "train/loss": 2.5, "eval/loss": 2.8}']
    (junk / "history.jsonl").write_text("\n".join(rows) + "\n")
    found = find_runs(tmp_path)
    assert found.runs[0].curves == {"train/loss": [(1, 3.0), (2, 2.0), (3, 1.0)]}
    # of a step that was trained again after a stop the later value counts
    assert found.runs[1].curves == {"train/loss": [(1, 2.5), (3, 1.0)], "eval/loss": [(1, 2.8), (3, 1.5)]}
    assert found.not_read == [
        ("cut", "history.jsonl: its last line is cut off"),
        ("junk", "history.jsonl: 5 of 10 lines cannot be read, the first of them line 2"),
    ]


def test_settings_are_told_by_the_overrides_where_the_configuration_is_missing(tmp_path: Path) -> None:
    for rank in (2, 4):
        run = make_run(tmp_path / f"rank={rank}", f"rank={rank}", "quant=nf4", loss=1 / rank)
        (run / ".hydra" / "resolved.yaml").unlink()
    make_run(tmp_path / "bare", "rank=8", loss=0.01)
    shutil.rmtree(tmp_path / "bare" / ".hydra")
    found = judged(tmp_path)
    assert [run["settings"].get("rank") for run in found["runs"]] == [8, 2, 4]
    assert found["recommended"]["folder"] == "bare"
    assert found["recommended"]["command"] is None
    assert found["not_read"] == [
        {"folder": "bare", "reason": "there is no .hydra/overrides.yaml: nobody knows its command"}
    ]


BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}, *{before}, *{before}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resolved.yaml", "!!python/object/apply:os.system ['touch executed']"),
        ("resolved.yaml", BOMB),
        ("resolved.yaml", "[" * 3000),
        ("resolved.yaml", "just text"),
        ("resolved.yaml", "{1: 2, null: {true: []}}"),
        ("overrides.yaml", "- {rank: 4}"),
        ("overrides.yaml", "rank: 4"),
        ("overrides.yaml", "- 'rank=['\n- '=='\n- ''\n- 'x={{{{'"),
        ("overrides.yaml", "!!python/name:os.system"),
    ],
)
def test_configurations_are_data_whatever_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs" / "run", "rank=2", loss=1.0)
    make_run(tmp_path / "runs" / "other", "rank=4", loss=0.5)
    (run / ".hydra" / name).write_text(text)
    read = find_runs(tmp_path / "runs")
    assert len(read.runs) == 2
    found = study(read, metric="loss", kept=0.99)
    assert len(json.dumps(found)) < 100_000
    assert report_page("x", read.runs, found)
    assert not (tmp_path / "executed").exists()


def test_a_curve_is_thinned_to_what_can_be_seen() -> None:
    curve = [(float(step), math.sin(step)) for step in range(10_000)]
    thin = list(thinned(curve))
    assert len(thin) == POINTS
    assert (thin[0], thin[-1]) == (curve[0], curve[-1])
    assert [step for step, _ in thin] == sorted(step for step, _ in thin)
    assert math.fsum(value for _, value in thin) / POINTS == pytest.approx(0, abs=0.01)
    assert list(thinned(curve[:POINTS])) == curve[:POINTS]


# ------------------------------------------------------------------------------------------------- what nobody expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FULL = {
    "ranks": {f"model.layers.{layer}.mlp.up_proj": {"rank": 2, "effective_rank": 1} for layer in range(2)},
    "ladder": {"losses": {"1": 2.0, "2": 1.0}, "parameters": {"1": PARAMETERS}},
    "rungs": {"0.125": 3.0},
    "retention": {"kl": 0.1},
    "error": "none",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    make_run(root / "one", "rank=2", loss=1.0, **FULL)
    make_run(root / "two", "rank=4", "quant=nf4", loss=0.5, **FULL)
    write_history(root / "one", [3.0, 2.0, 1.0])
    return root


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_number_and_no_text_stops_a_report(pair: Path, data: st.DataObject) -> None:
    original = (pair / "one" / "metrics.json").read_text()
    metrics = json.loads(original)
    for _ in range(data.draw(st.integers(1, 4))):
        node = metrics
        key = data.draw(st.sampled_from(sorted(node)))
        while isinstance(node[key], dict) and node[key] and data.draw(st.booleans()):
            node, key = node[key], data.draw(st.sampled_from(sorted(node[key])))
        node[key] = data.draw(values)
    (pair / "one" / "metrics.json").write_text(json.dumps(metrics))
    try:
        read = find_runs(pair)
        found = study(read, metric="loss", kept=0.99)
        assert {run["folder"] for run in found["runs"]} | {item["folder"] for item in found["not_read"]} == {
            "one",
            "two",
        }
        json.dumps(found)
        report_csv(read.runs, found)
        page = report_page("x", read.runs, found)
        assert "<script>alert" not in page
    finally:
        (pair / "one" / "metrics.json").write_text(original)


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e%{customdata}"


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text that is no script or style."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.open = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.open = tag

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open in ("script", "style"):
            self.scripts.append(data)
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep in which every text that a run can bring is an attack."""
    root = tmp_path_factory.mktemp("hostile")
    name = HOSTILE.replace("/", "∕")
    parts = FULL | {"ranks": {f"{HOSTILE}.{layer}.{HOSTILE}": {"rank": 2, "effective_rank": 1} for layer in range(2)}}
    for rank, loss in ((2, 1.0), (4, 0.5)):
        run = make_run(root / f"=cmd,{rank}{name}", f"rank={rank}", loss=loss, **parts, versions={HOSTILE: HOSTILE})
        settings = yaml.safe_load((run / ".hydra" / "resolved.yaml").read_text())
        settings |= {"target_modules": f"{HOSTILE}{rank}", f"{HOSTILE}": {HOSTILE: f"=1+{rank}"}}
        (run / ".hydra" / "resolved.yaml").write_text(yaml.safe_dump(settings))
        (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"rank={rank}", f"target_modules={HOSTILE}"]))
        write_history(run, [3.0, 2.0, 1.0])
    failed = make_run(root / "failed", "rank=1", status="failed", error=f"=2+3 {HOSTILE}")
    (failed / "train.log").write_text(HOSTILE)
    make_run(root / os.fsdecode(b"bytes\xff"), "rank=8", loss=0.9)  # a name that is no text
    (root / name).mkdir()
    return root


def test_text_from_runs_is_shown_and_does_nothing(hostile: Path) -> None:
    read = find_runs(hostile)
    found = study(read, metric="loss", kept=0.99)
    page = report_page(HOSTILE, read.runs, found)
    parsed = Tags()
    parsed.feed(page)
    assert not {tag for tag, _ in parsed.tags} & {"img", "iframe", "link", "object", "a", "form", "input"}
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    own = "".join(script for script in parsed.scripts if len(script) < 10**6)  # plotly itself is longer
    assert "alert(1)" in own  # as the letters of a name
    assert "<script" not in own
    assert "\\u003cscript" not in own  # nor as plotly would read it: letters are written as &lt;script
    assert "%{customdata}" not in own
    assert "<script>alert(1)</script>" in "".join(parsed.text)
    assert "\x1b" not in page
    assert "\u202e" not in page
    rows = list(csv.reader(io.StringIO(report_csv(read.runs, found))))
    assert not [cell for row in rows for cell in row if cell[:1] in tuple("=+-@\t\r")]
    assert "'=1+2" in {cell for row in rows for cell in row}


def test_the_terminal_gets_no_sign_that_moves_it(hostile: Path, tmp_path: Path) -> None:
    code, out, err = run_program(report, str(hostile), f"hydra.run.dir={tmp_path / 'out'}")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "<U+001B>" in out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["recommended"]["command"] is None


# ------------------------------------------------------------------------------------------------------------- programs


def test_a_report_masks_secrets_that_others_have_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = "mark-5c1e-of-a-secret"
    for rank in (4, 8):
        make_run(tmp_path / "sweep" / f"rank={rank}", f"rank={rank}", f"logger.project={mark}", loss=1.0 / rank)
    make_run(tmp_path / "sweep" / "rank=2", "rank=2", error=f"no key {mark}", status="failed")
    monkeypatch.setenv("HF_TOKEN", mark)
    monkeypatch.chdir(tmp_path)
    code, out, err = run_program(report, "sweep")
    assert code == 0, err
    written = [(tmp_path / "sweep" / f"report.{kind}").read_text() for kind in ("html", "csv", "json")]
    assert all(mark not in text and "***" in text for text in (written[0], written[2]))
    assert mark not in written[1] + out + err


def test_the_program_leaves_a_page_a_table_and_the_numbers(sweep: Path) -> None:
    (sweep / "empty").mkdir()
    code, out, err = run_program(report, str(sweep))
    assert (code, err) == (0, "")
    found = json.loads((sweep / "report.json").read_text())
    assert {"runs", "recommended", "not_read", "ladder", "warnings", "sentence"} <= found.keys()
    keys = {"folder", "overrides", "status", "after", "parameters_trainable", "peak_bytes", "train_seconds"}
    assert all(keys <= run.keys() for run in found["runs"])
    first = found["runs"][0]
    assert first["folder"] == "rank=2,quant=nf4"
    assert first["overrides"][:3] == ["rank=2", "quant=nf4", "trainer.max_steps=250"]
    assert first["after"]["loss"] == 0.6
    assert (first["parameters_trainable"], first["peak_bytes"], first["train_seconds"]) == (20480, 400 * 2**20, 32)
    assert first["settings"] == {"rank": 2, "quant.type": "nf4"}
    assert found["not_read"] == [{"folder": "empty", "reason": "empty"}]
    assert " ".join(found["sentence"].split()) in " ".join(out.split())
    for line in (f"  {found['recommended']['command']}", "  empty: empty"):
        assert line in out.splitlines()
    assert str(sweep / "report.html") in out
    rows = list(csv.DictReader((sweep / "report.csv").open()))
    assert [row["after.loss"] for row in rows] == [str(run["after"]["loss"]) for run in found["runs"]]
    assert [row["folder"] for row in rows if row["recommended"] == "yes"] == ["rank=4,quant=nf4"]
    assert "<title>lorafit report: sweep</title>" in (sweep / "report.html").read_text()
    # a second report reads the same, whatever the first has left there
    code, _, err = run_program(report, str(sweep), "report.metric=exact_match")
    assert (code, err) == (0, "")
    assert len(json.loads((sweep / "report.json").read_text())["runs"]) == len(found["runs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swep"], "Did you mean"),
        ([], "report.folder is not set: give the folder of a sweep: python -m lorafit.report DIR"),
        (["sweep/empty"], "there is no run of lorafit.train in or below"),
        (["sweep", "report.metric=los"], "no run has 'los' after training"),
        (["sweep", "report.kept=0"], "report.kept must be in (0, 1], got 0"),
    ],
)
def test_what_cannot_be_reported_is_said_in_one_message(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(sweep.parent)
    (sweep / "empty").mkdir()
    code, out, err = run_program(report, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(sweep.parent.rglob("report.html"))


def test_a_folder_that_is_not_there_is_told_with_the_nearest(sweep: Path) -> None:
    with pytest.raises(InputError, match=r"no folder '.*swep'.*Did you mean '.*sweep'"):
        find_root(str(sweep.with_name("swep")))
    with pytest.raises(InputError, match="is a file"):
        find_root(str(sweep / "rank=2,quant=nf4" / "metrics.json"))


def test_a_folder_without_runs_says_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    code, _, err = run_program(report, str(tmp_path))
    assert code == 2
    assert "notes: not a run: it holds no metrics.json" in err


def test_reading_waits_for_no_library_of_training() -> None:
    heavy = ("torch", "transformers", "lightning", "plotly")
    code = f"import lorafit.report, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ------------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every part that a page can have."""
    root = tmp_path_factory.mktemp("page") / "runs"
    for quant in ("none", "nf4"):
        for rank, loss in ((1, 1.4), (4, 0.13), (16, 0.081)):
            ranks = {
                f"model.layers.{n}.mlp.{kind}": {"rank": rank, "effective_rank": 1} for n in range(3) for kind in "ab"
            }
            ladder = {"losses": {"1": 1.6, "4": 0.2, "16": loss}, "parameters": {}} if rank == 16 else {}
            retention = {"perplexity_adapter_off": 1.6, "perplexity_adapter_on": 1.68}
            parts = {"ranks": ranks, "rungs": {"0.25": 2 * loss}, "retention": retention} | (
                {"ladder": ladder} if ladder else {}
            )
            overrides = (f"rank={rank}", f"quant={quant}")
            write_history(
                make_run(root / f"{rank}-{quant}", *overrides, loss=loss, **parts), [8 * 0.8**n for n in range(30)]
            )
    make_run(root / "failed", "rank=32", status="out_of_memory", error="the device has no memory left")
    (root / "empty").mkdir()
    read = find_runs(root)
    found = study(read, metric="loss", kept=0.99)
    (root / "report.html").write_text(report_page("runs", read.runs, found))
    return root / "report.html"


def test_the_page_can_be_read_without_seeing_it(page: Path) -> None:
    parsed = Tags()
    parsed.feed(page.read_text())
    tags = [tag for tag, _ in parsed.tags]
    assert ("html", {"lang": "en"}) in parsed.tags
    assert tags.count("h1") == tags.count("title") == tags.count("main") == 1
    assert tags.count("caption") == tags.count("table") > 3
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in parsed.tags if tag == "th")
    assert all(attributes["aria-label"] for tag, attributes in parsed.tags if tag == "figure")
    text = " ".join("".join(parsed.text).split())
    for words in ("All runs", "Quality against size", "Learning curves", "Effective rank", "Where halving looked"):
        assert words in text
    for words in ("One run for many ranks", "What did not complete, and why", "What was not read", "out of memory"):
        assert words in text
    assert "1.050" in text  # 1.68 / 1.6: what other text costs
    # what is drawn stands in a table: colour and place are not the only carriers
    assert "Pareto front of" in text


def test_parts_without_data_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "rank=2", loss=1.0)
    read = find_runs(tmp_path)
    text = report_page("x", read.runs, study(read, metric="loss", kept=0.99))
    for words in (
        "Quality against",
        "Learning curves",
        "Effective rank",
        "halving",
        "many ranks",
        "not complete",
        "not read",
    ):
        assert words not in text
    assert "Plotly" not in text  # nor is there a library to draw nothing


def traces(page: Path, name: str) -> dict[str, Any]:
    """What a chart of a page is given to draw, by the name of each series."""
    begin = re.search(rf'Plotly\.newPlot\(\s*"{name}",\s*', page.read_text())
    assert begin is not None
    drawn, _ = json.JSONDecoder().raw_decode(page.read_text(), begin.end())
    return {trace.get("name", "line"): trace for trace in drawn}


def test_charts_draw_the_numbers_of_the_runs(page: Path) -> None:
    found = judged(page.parent)
    for name, size in (("by-rank", "rank"), ("by-parameters", "parameters_trainable"), ("by-time", "train_seconds")):
        series = traces(page, name)
        front = [(run[size], run["after"]["loss"]) for run in found["runs"] if run["pareto"] and run["pareto"][size]]
        assert list(zip(series["Pareto front"]["x"], series["Pareto front"]["y"], strict=True)) == sorted(front)
        assert series["quant none"]["y"] == [1.4, 0.13, 0.081]
        assert series["recommended"]["y"] == [found["recommended"]["value"]]
    assert traces(page, "by-memory")["quant nf4"]["x"] == [400.0] * 3  # MiB
    [steps] = [steps for steps in found["ladder"] if steps["folder"] == "16-none"]
    number = found["ladder"].index(steps)
    assert traces(page, f"ladder-{number}")["cut"]["y"] == [1.6, 0.2, 0.081]
    assert traces(page, f"ladder-{number}")["trained for real"]["y"] == [1.4, 0.13, 0.081]
    curve = traces(page, "curves")["rank 4, quant none"]  # the held-out one is drawn last
    assert curve["y"] == pytest.approx([8 * 0.8**n * 1.1 for n in (4, 9, 14, 19, 24, 29)])
    assert traces(page, "effective-map")["line"]["text"] == [["1"] * 3] * 2


def test_a_folder_whose_name_is_no_text_is_drawn_by_its_bytes() -> None:
    runs = [Run(f"{rank}\udcff", Path(), "completed", after={"loss": 1 / rank}) for rank in (1, 2)]
    for rank, run in enumerate(runs, 1):
        run.numbers["rank"] = rank
    [chart] = quality(runs, weigh(runs, metric="loss", kept=0.99))
    assert r"1\\udcff" in chart.html


def opened(page: Path, folder: Path, *options: str) -> tuple[str, list[str], list[str]]:
    """(the page as Chromium has drawn it, what its console said, every address that the page asked for)."""
    log = folder / "net.json"
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", *(f"--{word}" for word in quiet)),
        *(f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=8000", "--dump-dom", *options, page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = re.findall(r":CONSOLE[^\]]*\] (.*)", done.stderr)
    asked = [
        event["params"]["url"]
        for event in json.loads(log.read_text())["events"]
        # the browser's own requests come from no origin
        if "url" in event.get("params", {}) and event["params"].get("initiator", "not an origin") != "not an origin"
    ]
    return done.stdout, said, asked


needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")


@needs_chromium
def test_the_page_draws_its_charts_and_asks_nobody_for_anything(page: Path, tmp_path: Path) -> None:
    pressed = (
        "<script>for (const b of document.querySelectorAll('button[data-type=linear]')) b.click();"
        "setTimeout(() => document.body.append('vertical: ' + curves.layout.yaxis.type), 999);</script>"
    )
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text() + pressed)
    drawn, said, asked = opened(copy, tmp_path)
    assert said == []
    assert asked == []
    charts = re.findall(r'<div id="([\w-]+)" class="plotly-graph-div', drawn)
    assert {"by-rank", "by-parameters", "by-memory", "by-time", "curves", "effective-rank", "effective-map"} < set(
        charts
    )
    assert len(re.findall(r'<svg class="main-svg"[^>]*>', drawn)) >= len(charts)
    assert "vertical: linear" in drawn


@needs_chromium
def test_a_page_that_asks_or_fails_would_be_noticed(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://example.invalid/x.png"><script>nothing()</script>')
    _, said, asked = opened(bad, tmp_path)
    assert len(said) == 1
    assert set(asked) == {"http://example.invalid/x.png"}


@needs_chromium
def test_on_a_phone_nothing_is_wider_than_the_screen(page: Path, tmp_path: Path) -> None:
    inner, outer = tmp_path / "page.html", tmp_path / "phone.html"
    tell = (
        "<script>addEventListener('load', () => parent.postMessage(document.documentElement.scrollWidth, '*'))</script>"
    )
    inner.write_text(page.read_text() + tell)
    outer.write_text(
        "<script>onmessage = event => document.body.append('width: ' + event.data)</script>"
        '<iframe src="page.html" style="width: 390px; height: 800px; border: 0"></iframe>'
    )
    drawn, said, _ = opened(outer, tmp_path)
    assert said == []
    [width] = re.findall(r"width: (\d+)", drawn.partition("</iframe>")[2])
    assert int(width) <= 390
