"""The process that watches a sweep: who is killed, who goes on, and what is said of it.

pytest tests/test_supervisor.py

Most workers here are a few lines of Python that write into a roll as a worker does; the last tests kill the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings, strategies as st

from lorafit.supervisor import Roll, death, serve, supervise

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import kill_sweep  # noqa: E402

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is known to Linux alone")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Runs jobs 0 … len(plan) - 1 as a worker of a sweep does; the plan says, for each, what happens in it the first time.
# begun.txt gets a line "pid number" for every job that is begun.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from lorafit.supervisor import serve

plan = json.loads(sys.argv[1])
roll = serve()
if roll is None:
    sys.exit("no worker")

def stop(signum, _):
    with open("signals.txt", "a") as file:
        file.write(f"{signum}\\n")
    time.sleep(0.3)  # a checkpoint is written; a second signal would come now
    sys.exit(128 + signum)

def note(name, text):
    with open(name, "a") as file:
        file.write(f"{text}\\n")

for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, stop)
if plan[0] == "killed before":
    os.kill(os.getpid(), signal.SIGKILL)
for number, what in enumerate(plan):
    entry = roll.read(0, number)
    if entry is None:
        roll.write(0, number, {"name": f"job {number}", "folder": ".", "ended": False})
        note("begun.txt", f"{os.getpid()} {number}")
        if what == "sleeps":
            time.sleep(300)
        elif what:
            os.kill(os.getpid(), getattr(signal, what))
        roll.write(0, number, {"name": f"job {number}", "folder": ".", "ended": True, "objective": number})
    elif "died" in entry:
        note("told.txt", f"{number} {entry['died']}")
if plan[-1] == "killed after":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(sum("died" in entry for entry in roll.entries().values()))
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def roll(tmp_path: Path) -> Iterator[Roll]:
    made = Roll.begin(tmp_path / "sweep")
    yield made
    made.end()


def worker(*plan: str | None) -> list[str]:
    return [sys.executable, "-c", WORKER, json.dumps(plan)]


def lines(name: str) -> list[list[int]]:
    path = Path(name)
    return [[int(word) for word in line.split()] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------- workers


def test_a_worker_that_ends_by_itself_is_started_once(roll: Roll) -> None:
    assert supervise(worker(None, None), roll) == 0
    assert [number for _, number in lines("begun.txt")] == [0, 1]
    assert len({pid for pid, _ in lines("begun.txt")}) == 1
    assert roll.unfinished() == {} and [entry["objective"] for entry in roll.entries().values()] == [0, 1]


def test_the_exit_code_of_a_worker_is_that_of_the_sweep(roll: Roll) -> None:
    assert supervise([sys.executable, "-c", "raise SystemExit(3)"], roll) == 3


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_a_job_whose_worker_is_killed_is_recorded_and_a_new_worker_takes_the_next(roll: Roll, name: str) -> None:
    code = -getattr(signal, name)
    assert supervise(worker(None, name, None, name), roll) == 2
    begun = lines("begun.txt")
    assert [number for _, number in begun] == [0, 1, 2, 3]  # in order, none of them twice
    pids = [pid for pid, _ in begun]
    assert pids[0] == pids[1] != pids[2] == pids[3]
    assert {number: entry.get("died") for (_, number), entry in roll.entries().items()} == {
        0: None,
        1: code,
        2: None,
        3: code,
    }
    assert roll.unfinished() == {}
    assert lines("told.txt") == [[1, code], [1, code], [3, code]]  # what each new worker found


@pytest.mark.parametrize("plan", [["killed before"], [None, "killed after"]])
def test_a_worker_that_dies_outside_of_a_job_ends_the_sweep(roll: Roll, plan: list[str | None]) -> None:
    plan = [None if what == "killed after" else what for what in plan[:-1]] + plan[-1:]
    begin = worker(*plan)
    begin[2] = WORKER.replace("elif what:", "elif what and what[0] == 'S':")
    assert supervise(begin, roll) == -signal.SIGKILL


@pytest.mark.parametrize(("sent", "received"), [("SIGTERM", 15), ("SIGINT", 2), ("SIGHUP", 15)])
def test_a_signal_to_the_watching_process_reaches_the_worker_once_and_its_code_comes_back(
    sent: str, received: int
) -> None:
    watching = start_watching(worker("sleeps", None))
    wait_for(lambda: lines("begun.txt"))
    watching.send_signal(getattr(signal, sent))
    assert watching.wait(30) == 128 + received
    assert lines("signals.txt") == [[received]]
    assert [number for _, number in lines("begun.txt")] == [0]  # no other job was begun


def test_the_keys_of_a_terminal_reach_the_worker_once() -> None:
    watching = start_watching(worker("sleeps", None))
    wait_for(lambda: lines("begun.txt"))
    [[pid, _]] = lines("begun.txt")
    assert os.getpgid(pid) != os.getpgid(watching.pid)
    os.killpg(watching.pid, signal.SIGINT)  # what a terminal does at Ctrl-C: to its whole group
    assert watching.wait(30) == 130
    assert lines("signals.txt") == [[signal.SIGINT]]


def test_a_worker_that_is_killed_after_a_signal_is_not_replaced() -> None:
    stubborn = worker("sleeps", None)
    stubborn[2] = WORKER.replace("time.sleep(0.3)", "os.kill(os.getpid(), signal.SIGKILL)")
    watching = start_watching(stubborn)
    wait_for(lambda: lines("begun.txt"))
    watching.send_signal(signal.SIGTERM)
    assert watching.wait(30) == 128 + signal.SIGKILL
    assert [number for _, number in lines("begun.txt")] == [0]


@LINUX
def test_a_worker_ends_with_the_process_that_watches_it() -> None:
    watching = start_watching(worker("sleeps"))
    wait_for(lambda: lines("begun.txt"))
    [[pid, _]] = lines("begun.txt")
    process = psutil.Process(pid)
    watching.kill()
    watching.wait(30)
    wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, 20)


def test_a_worker_whose_watching_process_is_gone_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError))  # nothing is asked of this process
    monkeypatch.setenv("LORAFIT_ROLL", f"{os.getpid()}:{Path.cwd()}")  # which is not its parent
    with pytest.raises(SystemExit) as end:
        serve()
    assert end.value.code == 1
    monkeypatch.setenv("LORAFIT_ROLL", f"{os.getppid()}:{Path.cwd()}")
    served = serve()
    assert served is not None and served.folder == Path.cwd()
    monkeypatch.delenv("LORAFIT_ROLL")
    assert serve() is None


def test_a_signal_that_was_ignored_stays_so() -> None:
    """As under nohup: the terminal is closed, and the sweep goes on."""
    watching = start_watching(worker("sleeps", None), before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    wait_for(lambda: lines("begun.txt"))
    watching.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert watching.poll() is None and lines("signals.txt") == []
    watching.send_signal(signal.SIGTERM)
    assert watching.wait(30) == 143 and lines("signals.txt") == [[signal.SIGTERM]]


def test_the_handlers_of_signals_are_afterwards_what_they_were(roll: Roll) -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    supervise(worker(None), roll)
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def start_watching(command: list[str], before: str = "") -> subprocess.Popen[bytes]:
    """A process, in a group of its own, that watches the worker of this command."""
    text = (
        "import signal, sys; from lorafit.supervisor import Roll, supervise\n"
        # as in a terminal, however the tests were started: under nohup and in the background some are ignored
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{before}\n"
        "roll = Roll.begin('sweep')\n"
        "code = supervise(sys.argv[1:], roll)\n"
        "roll.end()\n"
        "sys.exit(code if code >= 0 else 128 - code)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", text, *command], process_group=0)
    _started.append(process)
    return process


_started: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def none_left_behind() -> Iterator[None]:
    yield
    while _started:
        process = _started.pop()
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("code", "said", "told"),
    [
        (-signal.SIGKILL, "killed by SIGKILL", 137),
        (-signal.SIGSEGV, "died by SIGSEGV", 139),
        (-250, "died by signal 250", 378),
        (7, "ended with exit code 7", 7),
        (0, "ended with exit code 0", 1),  # which is no success in the middle of a job
    ],
)
def test_a_death_is_told_by_its_signal_or_code_and_with_the_way_on(code: int, said: str, told: int) -> None:
    text, exit_code = death(code)
    assert said in text and "Called again, it goes on" in text and exit_code == told
    assert ("memory" in text) == (code == -signal.SIGKILL)  # which the kernel sends when there is none


def test_a_worker_that_ends_by_itself_in_a_job_is_replaced_as_well(roll: Roll) -> None:
    ends = worker(None, "ends", None)
    ends[2] = WORKER.replace("        elif what:", "        elif what:\n            os._exit(7)")
    assert supervise(ends, roll) == 1
    assert [entry.get("died") for entry in roll.entries().values()] == [None, 7, None]
    assert [number for _, number in lines("begun.txt")] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------- the roll


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 3), st.integers(0, 120)),
        st.fixed_dictionaries({"name": st.text(max_size=5), "ended": st.booleans(), "objective": st.floats(0, 9)}),
        max_size=12,
    )
)
@settings(max_examples=25, deadline=None)
def test_a_roll_gives_back_what_was_written_in_the_order_of_rounds_and_jobs(entries: dict) -> None:
    shutil.rmtree("roll", ignore_errors=True)
    roll = Roll("roll")
    roll.folder.mkdir()
    for place, entry in entries.items():
        roll.write(*place, {"ended": False})
        roll.write(*place, entry)
    assert roll.entries() == entries and list(roll.entries()) == sorted(entries)
    for rung in range(4):
        assert roll.entries(rung) == {place: entry for place, entry in entries.items() if place[0] == rung}
    assert roll.unfinished() == {place: entry for place, entry in entries.items() if not entry["ended"]}
    assert roll.read(9, 9) is None


def test_an_entry_is_read_whole_or_not_at_all(roll: Roll) -> None:
    """While one process writes an entry again and again, another reads it."""
    text = (
        "import sys; from lorafit.supervisor import Roll; roll = Roll(sys.argv[1])\n"
        "for n in range(10**9): roll.write(0, 0, {'ended': True, 'text': 'x' * (n % 50000)})"
    )
    writer = subprocess.Popen([sys.executable, "-c", text, str(roll.folder)])
    try:
        wait_for(lambda: roll.read(0, 0))
        sizes = set()
        for _ in range(500):
            [entry] = roll.entries().values()  # a half-written one would be no JSON
            sizes.add(len(entry["text"]))
    finally:
        writer.kill()
        writer.wait()
    assert len(sizes) > 3
    assert len(roll.entries()) == 1  # and a draft that a kill left is not an entry


def test_rolls_of_dead_processes_are_removed_and_those_of_living_ones_and_other_machines_kept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    names = [f".roll-{host}-{pid}" for pid in (dead.pid, os.getppid(), 1)]
    names += [f".roll-{host}2-{dead.pid}", f".roll-{host}-strange", "rank=4"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0-0.json").write_text('{"ended": true}')
    roll = Roll.begin(tmp_path)
    assert roll.entries() == {}
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], roll.folder.name}
    roll.end()
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


# ---------------------------------------------------------------------------------------------- the program itself

TINY = (
    *("trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "trainer.checkpoint_every_n_steps=1"),
    *("data.batch_size=4", "task.generate_examples=4", "task.eval_examples=8", "task.max_new_tokens=4"),
    *("task.samples=0", "task.retention_path=general.txt", "callbacks=none", "logger=none", "dropout=0.1"),
)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep of the tests below, undisturbed: ranks 2 and 4, 24 steps."""
    folder = tmp_path_factory.mktemp("calm")
    code, log = sweep_in(folder)
    assert code == 0, log
    return folder / "all"


STEPS = 24
SWEEP = ("rank=2,4", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=7", *TINY)


def command_in(folder: Path) -> list[str]:
    (folder / "general.txt").write_text("Bees tell each other where flowers are by dancing on the comb.")
    return kill_sweep.sweep_command(Path("all"), SWEEP)


def sweep_in(folder: Path) -> tuple[int, str]:
    """(exit code, what was printed) of the sweep, run in `folder`."""
    process = subprocess.run(
        command_in(folder), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return process.returncode, process.stdout


def test_a_second_job_starts_in_a_tenth_of_the_time_of_the_first(calm: Path) -> None:
    first, second = (kill_sweep.read_metrics(calm / f"rank={rank}")["speed"]["startup_seconds"] for rank in (2, 4))
    assert 0 < second < 0.1 * first


def test_a_worker_that_is_killed_in_a_job_is_recorded_and_goes_on_when_called_again(calm: Path, tmp_path: Path) -> None:
    job = tmp_path / "all" / "rank=2"
    process = subprocess.Popen(
        command_in(tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    )
    _started.append(process)
    wait_for(lambda: steps_of(job) >= 3, 120)
    [killed] = psutil.Process(process.pid).children()
    assert "lorafit.train" in killed.cmdline()
    killed.kill()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL, out
    assert "Traceback" not in out and "1 of 2 jobs failed:\n  rank=2: killed by SIGKILL" in out
    metrics = kill_sweep.read_metrics(job)
    assert metrics["status"] == "interrupted" and metrics["error"].startswith("killed by SIGKILL")
    assert 3 <= steps_of(job) < STEPS and not (job / "adapter").exists()
    assert kill_sweep.read_metrics(tmp_path / "all" / "rank=4")["status"] == "completed"
    assert kill_sweep.differing(calm / "rank=4", tmp_path / "all" / "rank=4") == []
    ended = (tmp_path / "all" / "rank=4" / "metrics.json").stat().st_mtime_ns

    code, out = sweep_in(tmp_path)
    assert code == 0, out
    assert out.count("done already") == 1
    assert kill_sweep.differing(calm / "rank=2", job) == []
    assert (tmp_path / "all" / "rank=4" / "metrics.json").stat().st_mtime_ns == ended
    assert [path for path in (tmp_path / "all").iterdir() if path.name.startswith(".roll")] == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_before_the_worker_has_begun_ends_the_program(
    tmp_path: Path, signum: signal.Signals
) -> None:
    process = subprocess.Popen(
        command_in(tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    _started.append(process)
    wait_for(lambda: psutil.Process(process.pid).children(), 60)
    time.sleep(0.1)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, err
    assert err.count(f"lorafit train: stopped by {signum.name}") == 1 and out == ""
    assert "The sweep goes on with: python -m lorafit.train " in err


def steps_of(job: Path) -> int:
    """How far the history of a job has come."""
    path = job / "history.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return max((row["step"] for row in rows), default=0)


def test_a_sweep_that_is_killed_at_random_moments_ends_as_the_undisturbed_one(
    calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = command_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    code, whole = kill_sweep.run([sys.executable, "-c", "import lorafit.trainer, lorafit.quant"], tmp_path / "log")
    assert code == 0
    rng, finished = random.Random(0), dict[Path, int]()
    for _ in range(3):
        code, _ = kill_sweep.run(command, tmp_path / "log", rng.uniform(0.5, 2) * whole)
        assert code in (0, -signal.SIGKILL)
        for path, stamp in finished.items():
            assert path.stat().st_mtime_ns == stamp
        for path in (tmp_path / "all").glob("*/metrics.json"):
            if kill_sweep.read_metrics(path.parent)["status"] == "completed":
                finished.setdefault(path, path.stat().st_mtime_ns)
    code, _ = kill_sweep.run(command, tmp_path / "log")
    assert code == 0, (tmp_path / "log").read_text()
    for rank in (2, 4):
        assert kill_sweep.differing(calm / f"rank={rank}", tmp_path / "all" / f"rank={rank}") == []
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    assert time.monotonic() - began < 1200
