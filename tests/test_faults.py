"""Whole programs under faults: SIGKILL at random moments, and checkpoints that a stranger or a dying disk has made.

pytest tests/test_faults.py

The same at length, with a table: `python scripts/faults.py`.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
from hostile_checkpoints import CheckpointLab, bad_checkpoints

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import faults  # noqa: E402


def test_a_run_that_is_killed_again_and_again_ends_as_the_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of the cases of the script, which have every quant, optimizer, number of workers and accumulation."""
    cases = [
        faults.Case("none", "adamw", 0, 3, packing=True),
        faults.Case("nf4", "adamw_8bit", 2, 1, packing=False),
        faults.Case("nf4", "paged_adamw_8bit", 0, 3, packing=False),
    ]
    monkeypatch.setattr(faults, "CASES", cases)
    rows = faults.kills(tmp_path, count=6, seed=1)
    assert [len(row["kills"]) for row in rows] == [2, 2, 2]
    assert any("writing" in kill for row in rows for kill in row["kills"])
    for row in rows:
        assert (row["exit_code"], row["differs"], row["unreadable"]) == (0, [], []), row


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "bitsandbytes.optim.AdamW8bit"])
def test_a_bad_checkpoint_is_refused_or_harmless(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lab = CheckpointLab(tmp_path, optimizer)
    outcomes = Counter(lab.try_checkpoint(case) for case in bad_checkpoints(seed=0, count=200))
    with capsys.disabled():
        print(f"\n{outcomes.total()} bad checkpoints ({optimizer}): {dict(outcomes)}")
    assert outcomes.total() == 200 and outcomes["refused"] > 100
    assert set(outcomes) <= {"refused", "harmless", "diverged"}
    assert not (tmp_path / "executed").exists()
