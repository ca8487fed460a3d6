"""A run that was stopped goes on as itself, or says what has become otherwise.

pytest tests/test_resuming.py

One run over a small file of questions, in this process, is stopped by a signal in the middle of an accumulation, and
copied for each test. An epoch is nine batches, so that its last step takes one batch where the others take two.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from programs import run_program

from lorafit import train
from lorafit.checkpoint import load_checkpoint
from lorafit.config import compose, quoted, to_dict
from lorafit.embedded import TRAIN
from lorafit.errors import InputError
from lorafit.loading import load_base_model
from lorafit.module import FinetuneModule
from lorafit.resuming import changes, identity, set_aside
from lorafit.schema import flat, training_settings
from lorafit.sweep import alone

SMALL = (
    *("task.generate_examples=1", "task.samples=0", "task.eval_examples=8", "task.retention_path=general.txt"),
    *("callbacks.progress=false", "logger=none", "trainer.accelerator=cpu", "rank=2"),
)
DATA = ("data.path=rows.jsonl", "data.eval_path=held.jsonl", "data.batch_size=3")
STEPS = ("trainer.max_steps=10", "trainer.accumulate_grad_batches=2", "trainer.checkpoint_every_n_steps=1")
COMMAND = (*SMALL, *DATA, *STEPS, "dropout=0.1")
BATCH, STOPPED_AT = 10, 6  # the first of two batches of the sixth step, in the second epoch


def program(*arguments: str) -> tuple[int, str, str]:
    return run_program(train, *arguments)


def stopped(at: int, *arguments: str, signum: int = signal.SIGTERM) -> tuple[int, str, str]:
    """The program, which gets a signal in its training step number `at`."""
    real, seen = FinetuneModule.training_step, iter(range(1, 10_000))

    def step(self: FinetuneModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if next(seen) == at:
            os.kill(os.getpid(), signum)
        return real(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinetuneModule, "training_step", step)
        return program(*arguments)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the data, the undisturbed run `whole`, and `run`, which was stopped."""
    folder = tmp_path_factory.mktemp("home")
    rows = [json.loads(line) for line in Path(TRAIN).read_text().splitlines()[:40]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:26]))
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[26:]))
    (folder / "general.txt").write_text("Bees tell each other where flowers are by dancing on the comb.")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, _, err = program(*COMMAND, "hydra.run.dir=whole")
        assert code == 0, err
        code, _, err = stopped(BATCH, *COMMAND, "hydra.run.dir=run")
        assert code == 143, err
    assert load_checkpoint(folder / "run" / "checkpoints" / "last.ckpt")["global_step"] == STOPPED_AT
    yield folder


@pytest.fixture(autouse=True)
def elsewhere(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has copies of its own."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")


def step_of(folder: str) -> int:
    return load_checkpoint(Path(folder, "checkpoints", "last.ckpt"))["global_step"]


def adapter(folder: str | Path) -> bytes:
    [path] = (Path(folder) / "adapter").glob("*.safetensors")
    return path.read_bytes()


def status(folder: str | Path) -> str:
    return json.loads((Path(folder) / "metrics.json").read_text())["status"]


def curve(folder: str | Path, key: str = "train/loss") -> dict[int, float]:
    rows = [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


# --- in its own folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["checkpoints", "train.log", "history.jsonl", "checkpoints/last.ckpt", "wandb/run.json"]
)
def test_a_run_whose_folder_links_to_files_elsewhere_is_refused_and_they_stay_what_they_are(name: str) -> None:
    link = Path("run", name)
    link.parent.mkdir(exist_ok=True)
    elsewhere = Path("elsewhere").resolve()
    if link.exists():
        link.rename(elsewhere)
    else:
        elsewhere.write_text("somebody's")
    link.symlink_to(elsewhere)
    before = digests(elsewhere)
    for where in ("resume=run", "hydra.run.dir=run"):
        code, _, err = program(where, *([] if "resume" in where else COMMAND))
        assert code == 2 and f"{str(link)!r} is a link out of the folder" in err, err
    assert digests(elsewhere) == before


def digests(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


def test_a_link_within_the_folder_is_none_out_of_it() -> None:
    Path("run/checkpoints").rename("run/kept")
    Path("run/checkpoints").symlink_to("kept")
    code, _, err = program("resume=run")
    assert code == 0, err
    assert adapter("run") == adapter("whole")


@pytest.mark.parametrize("name", ["o'brien", 'a"b\\', "a\\b' {c}, [d]=$e"])
def test_the_folder_may_have_any_name(name: str) -> None:
    """What a run that was stopped says of how it goes on is put after the command as it is."""
    Path("run").rename(name)
    for given in (f"resume={name}", f"resume={quoted(name)}", f"resume={Path(name).resolve()}"):
        code, _, err = program(given, "seed=7")
        assert code == 2 and "was trained otherwise: seed is 42 there, 7 here" in err, err
    # a link out of it is found, too
    Path(name, "train.log").unlink()
    Path(name, "train.log").symlink_to(Path("rows.jsonl").resolve())
    code, _, err = program(f"resume={name}")
    assert code == 2 and "is a link out of the folder" in err, err
    Path(name, "train.log").unlink()
    code, _, err = program(f"resume={name}")
    assert code == 0, err
    assert adapter(name) == adapter("whole") and not Path("outputs").exists()


def test_no_way_on_is_offered_with_an_adapter_of_another_shape() -> None:
    code, _, err = program("resume=run", "rank=4", "seed=7")
    assert code == 2 and "Put it back, rank in any case: the adapter that is to go on is of another shape" in err, err
    assert "allow_changed=" not in err


def test_a_run_that_lost_its_recorded_settings_goes_on_in_its_folder_and_says_with_which() -> None:
    shutil.rmtree("run/.hydra")
    code, _, err = program("resume=run", *COMMAND)
    assert code == 0, err
    assert "overrides.yaml is not there: run goes on with the settings of this command alone" in err
    assert adapter("run") == adapter("whole") and not Path("outputs").exists()
    assert Path("run/.hydra/overrides.yaml").is_file()


def test_a_finished_run_is_complete_wherever_it_is_to_go_on() -> None:
    for where in ([], ["hydra.run.dir=elsewhere"]):
        code, _, err = program("resume=whole", *where)
        assert code == 2 and "'whole' is complete: to go on, raise trainer.max_steps above 10" in err
    assert not Path("elsewhere/metrics.json").exists()


# --- it goes on as itself ---------------------------------------------------------------------------------------------


def test_a_run_stopped_in_the_middle_of_an_accumulation_ends_as_the_undisturbed_one() -> None:
    assert not Path("run/adapter").exists() and status("run") == "interrupted"
    code, _, err = program("resume=run")
    assert code == 0 and err == ""
    assert adapter("run") == adapter("whole") and status("run") == "completed"
    assert curve("run") == curve("whole")


@pytest.mark.parametrize("at", [1, 2, 9, 17, 18])
def test_it_may_be_stopped_at_any_step_and_by_either_signal(at: int) -> None:
    signum = signal.SIGINT if at % 2 else signal.SIGTERM
    code, _, err = stopped(at, *COMMAND, "hydra.run.dir=other", signum=signum)
    assert code == 128 + signum, err
    code, _, err = program("resume=other")
    assert code == 0, err
    assert adapter("other") == adapter("whole")


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer=adamw_8bit", "quant=nf4", "rank=32"),
        ("optimizer=paged_adamw_8bit", "data.num_workers=2"),
        ("optimizer=paged_adamw_32bit", "data.packing=true", "data.max_length=96"),
        ("optimizer=lion_8bit", "data.padding_free=true", "data.group_by_length=true"),
        ("data.streaming=true", "data.window=10", "data.num_workers=2"),
        ("optimizer._target_=torch.optim.Adagrad", "~optimizer.betas", "lora/adapter_dtype=int8"),
        ("model.checkpointing=selective", "quant=int8"),
    ],
    ids=" ".join,
)
def test_so_does_every_kind_of_run(settings: tuple[str, ...]) -> None:
    command = (*COMMAND, *settings)
    code, _, err = program(*command, "hydra.run.dir=calm")
    assert code == 0, err
    assert stopped(11, *command, "hydra.run.dir=other")[0] == 143
    code, _, err = program("resume=other")
    assert code == 0, err
    assert adapter("other") == adapter("calm")


def test_what_changes_nothing_that_is_trained_may_change() -> None:
    """Workers, loggers, where the data lie, how often it is looked at."""
    Path("moved").mkdir()
    shutil.move("rows.jsonl", "moved/questions.jsonl")
    code, _, err = program(
        *("resume=run", "data.path=moved/questions.jsonl", "data.num_workers=1", "logger=csv", "callbacks=none"),
        *("trainer.val_check_interval=3", "trainer.checkpoint_every_n_steps=null", "task.eval_examples=4"),
    )
    assert code == 0, err
    assert adapter("run") == adapter("whole")


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew() -> None:
    shutil.rmtree("run/checkpoints")
    code, _, err = program("resume=run")
    assert code == 0 and "has no checkpoint to go on from: it begins anew" in err
    assert adapter("run") == adapter("whole")


def test_a_new_run_in_an_old_folder_puts_aside_what_the_old_one_left() -> None:
    code, _, err = stopped(1, *COMMAND, "seed=1", "hydra.run.dir=run")
    assert code == 143 and "is called history.old.jsonl, metrics.old.json, checkpoints.old now" in err
    assert load_checkpoint("run/checkpoints.old/last.ckpt")["global_step"] == STOPPED_AT
    assert not Path("run/checkpoints/previous.ckpt").exists()  # or it could be taken for this run's


def test_a_run_repeated_in_its_folder_keeps_the_adapters_of_all() -> None:
    whole = {name: Path("whole", name).read_bytes() for name in ("metrics.json", "history.jsonl", "samples.jsonl")}
    shutil.copytree("whole", "again")
    for times in (1, 2):
        code, _, err = program(*COMMAND, f"seed={times}", "hydra.run.dir=again")
        assert code == 0 and "held an earlier run, which is not replaced" in err
    again = Path("again")
    assert (again / "adapter.old" / "adapter_model.safetensors").read_bytes() == adapter("whole")
    assert all((again / name.replace(".", ".old.")).read_bytes() == content for name, content in whole.items())
    seeds = [json.loads((again / f"metrics{which}.json").read_text())["seed"] for which in ("", ".old2")]
    assert seeds == [2, 1]
    assert adapter("again") != (again / "adapter.old2" / "adapter_model.safetensors").read_bytes()


def left_in(folder: str) -> dict[str, bytes]:
    """All files that tell of a run, by their names."""
    paths = [
        path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".log" and path.name[0] != "."
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("folder", ["run", "whole"])
@pytest.mark.parametrize("ends", ["is refused", "is refused late", "runs out of memory", "is stopped"])
def test_a_command_that_does_not_come_to_train_changes_nothing_of_an_earlier_run(
    folder: str, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, more = left_in(folder), ["seed=1"]

    def ended(*_: Any, **__: Any) -> Any:
        if ends == "is stopped":
            os.kill(os.getpid(), signal.SIGINT)
        raise MemoryError

    if ends == "is refused":
        more = ["rank=banana"]
    elif ends == "is refused late":
        more = ["target_modules=[q_porj]"]
    with monkeypatch.context() as patch:
        if "is refused" not in ends:
            patch.setattr("lorafit.training.retention_text", ended)
        code, _, err = program(*COMMAND, *more, f"hydra.run.dir={folder}")
    assert code == {"is stopped": 130, "runs out of memory": 4}.get(ends, 2), err
    assert "it goes on from" not in err
    assert left_in(folder) == before


def test_a_completed_run_that_is_stopped_before_it_goes_on_is_still_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = left_in("whole")
    monkeypatch.setattr("lorafit.training.retention_text", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    more = ("trainer.max_steps=12", "allow_changed=[trainer.max_steps]")
    assert program("resume=whole", *more)[0] == 143
    assert left_in("whole") == before and status("whole") == "completed"


def test_a_run_that_begins_anew_where_it_was_to_go_on_records_what_it_goes_by() -> None:
    assert program(*COMMAND, "data.path=nowhere.jsonl", "hydra.run.dir=new")[0] == 2
    code, _, err = stopped(BATCH, *COMMAND, "hydra.run.dir=new", "resume=auto")
    assert code == 143 and "it goes on from its last checkpoint with resume=" in err
    code, _, err = program("resume=new")
    assert code == 0, err
    assert adapter("new") == adapter("whole")
    # before its first checkpoint, with another setting
    Path("bare/.hydra").mkdir(parents=True)
    shutil.copy("run/.hydra/overrides.yaml", "bare/.hydra")
    code, _, err = stopped(BATCH, "resume=bare", "seed=3")
    assert code == 143, err
    code, _, err = program("resume=bare")
    assert code == 0, err
    assert json.loads(Path("bare/metrics.json").read_text())["seed"] == 3


@pytest.mark.parametrize("done", range(8))
def test_a_new_run_can_be_killed_while_it_puts_an_old_one_aside(done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (Path("whole/csv/metrics.csv"), Path("whole/wandb/run.json")):
        path.parent.mkdir()
        path.write_text(path.name)
    whole, real, seen = left_in("whole"), os.replace, iter(range(100))

    def killed(source: Any, place: Any) -> None:
        if next(seen) == done:
            raise KeyboardInterrupt
        real(source, place)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        set_aside(Path("whole"))
    set_aside(Path("whole"))
    now = left_in("whole")
    assert all(".old" in name and ".old2" not in name for name in now)
    assert sorted(now.values()) == sorted(whole.values())


def test_a_run_in_a_folder_of_something_else_leaves_what_was_there() -> None:
    mine = {"metrics.json": '{"accuracy": 0.9}', "samples.jsonl": "{}\n", "notes.txt": "mine"}
    Path("mine").mkdir()
    for name, text in mine.items():
        Path("mine", name).write_text(text)
    code, _, err = program(*COMMAND, "hydra.run.dir=mine")
    assert code == 0 and "samples.old.jsonl, metrics.old.json now" in err
    assert [Path("mine", name.replace(".j", ".old.j")).read_text() for name in mine] == list(mine.values())
    assert adapter("mine") == adapter("whole")


def test_a_file_where_the_adapter_is_to_be_is_put_aside() -> None:
    Path("run/adapter").write_text("mine")
    code, _, err = program("resume=run")
    assert code == 0, err
    assert adapter("run") == adapter("whole") and Path("run/adapter.old").read_text() == "mine"


def test_what_killed_writers_have_left_is_taken_away() -> None:
    left = [Path("run") / name for name in (".metrics.json-1.draft", "checkpoints/.last.ckpt-1.draft")]
    for path in left:
        path.write_text("half")
    (Path("run") / ".adapter-abcd1234").mkdir()
    assert program("resume=run")[0] == 0
    assert not [path for path in (*left, Path("run") / ".adapter-abcd1234") if path.exists()]


def test_a_run_that_is_at_work_is_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.sweep.LOCK_SECONDS", 0.1)
    before = left_in("run")
    with alone(Path("run")):
        for arguments in (("resume=run",), (*COMMAND, "seed=1", "hydra.run.dir=run")):
            code, _, err = program(*arguments)
            assert code == 2 and "another process is at work in" in err
    assert left_in("run") == before


# --- what has become otherwise is named -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr is 0.005 there, 0.001 here"),
        ("optimizer=adamw_8bit", "optimizer._target_ is torch.optim.AdamW there, bitsandbytes.optim.AdamW8bit here"),
        ("scheduler=linear", "scheduler.name is cosine there, linear here"),
        ("seed=7", "seed is 42 there, 7 here"),
        ("dropout=0.2", "dropout is 0.1 there, 0.2 here"),
        ("rank=4 alpha=4", "rank is 2 there, 4 here"),
        ("quant=nf4", "quant.type is none there, nf4 here. Put it back"),
        ("model.dtype=float32", "model.dtype is auto there, float32 here"),
        ("data.batch_size=4", "data.batch_size is 3 there, 4 here"),
        ("data.template=alpaca", "data.template is auto there, alpaca here; the template is another one"),
        ("trainer.accumulate_grad_batches=1", "trainer.accumulate_grad_batches is 2 there, 1 here"),
        ("trainer.gradient_clip_val=null", "trainer.gradient_clip_val is 1.0 there, None here"),
        ("trainer.max_steps=12", "trainer.max_steps is 10 there, 12 here"),
    ],
)
def test_a_setting_that_changes_what_is_trained_is_refused_and_named(override: str, said: str) -> None:
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.suffix != ".log"}
    code, _, err = program("resume=run", *override.split())
    assert code == 2 and "Traceback" not in err
    assert f"'run' was trained otherwise: {said}" in err, err
    assert ("'allow_changed=[" in err) != ("rank" in override)
    # and nothing of the run was touched: it can still go on as it was
    assert {path: path.read_bytes() for path in before} == before


def test_settings_that_are_named_may_change_and_hold_from_there_on() -> None:
    code, _, err = program("resume=run", "optimizer.lr=1e-3", "allow_changed=[optimizer.lr]")
    assert code == 0 and "another run than it was" in err
    rates, whole = (curve(folder, "train/learning_rate") for folder in ("run", "whole"))
    assert rates[1] == whole[1]
    # the checkpoint's own rate is not what counts: 1e-3 along the same schedule
    assert rates[10] == pytest.approx(whole[10] / 5, rel=1e-6) and rates[10] > 0
    assert adapter("run") != adapter("whole")
    code, _, err = program("resume=run", "trainer.max_steps=12", "optimizer.lr=1e-3", "allow_changed=[trainer]")
    assert code == 0, err
    assert json.loads(Path("run/metrics.json").read_text())["speed"]["steps"] == 12


def failed(error: BaseException, *arguments: str) -> tuple[int, str, str]:
    """The program, whose first training step fails."""

    def step(*_: Any) -> torch.Tensor:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinetuneModule, "training_step", step)
        return program(*arguments)


def test_what_was_allowed_to_change_holds_also_where_no_checkpoint_was_written_since() -> None:
    shortage = torch.OutOfMemoryError("CUDA out of memory.")
    code, _, err = failed(shortage, "resume=run", "optimizer.lr=1e-3", "allow_changed=[optimizer.lr]")
    assert code == 4 and step_of("run") == STOPPED_AT, err
    code, _, err = program("resume=run")
    assert code == 0, err
    assert curve("run", "train/learning_rate")[10] == pytest.approx(curve("whole", "train/learning_rate")[10] / 5)


@pytest.mark.parametrize("change", [["rank=4"], ["optimizer=adamw_8bit"]])
def test_a_checkpoint_that_cannot_be_loaded_under_other_settings_stays_what_it_is(change: list[str]) -> None:
    before = Path("run/checkpoints/last.ckpt").read_bytes()
    for where in ([], ["hydra.run.dir=other"]):
        code, _, err = program("resume=run", *change, *where, "allow_changed=[all]")
        assert code == 2 and ("cannot be gone on from" in err or "does not fit the model" in err), err
        assert not Path("other/checkpoints/last.ckpt").exists()
    assert Path("run/checkpoints/last.ckpt").read_bytes() == before
    assert program("resume=run", *("rank=2", "optimizer=adamw", "optimizer.lr=5e-3"))[0] == 0
    assert adapter("run") == adapter("whole")


def test_a_run_that_goes_on_in_another_folder_has_its_checkpoint_there_from_the_beginning() -> None:
    code, _, err = failed(torch.OutOfMemoryError("CUDA out of memory."), "resume=run", "hydra.run.dir=other")
    assert code == 4 and step_of("other") == STOPPED_AT, err
    shutil.rmtree("run")
    code, _, err = program("resume=other")
    assert code == 0, err
    assert adapter("other") == adapter("whole") and curve("other") == curve("whole")


def test_bad_input_that_a_resumed_run_comes_to_is_recorded() -> None:
    code, _, err = failed(InputError("row 7 is bad"), "resume=run")
    assert code == 2 and "row 7 is bad" in err
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["status"] == "failed" and metrics["error"] == "row 7 is bad"
    assert program("resume=run")[0] == 0 and adapter("run") == adapter("whole")


def test_another_number_of_processes_is_named_also_where_it_was_left_to_the_machine() -> None:
    """Each of four has seen other rows than each of two."""
    config = compose([*COMMAND, "trainer.devices=auto"])
    data, model = SimpleNamespace(data_hash=lambda: "d", template_hash=lambda: "t"), load_base_model("embedded")
    four, two = (identity(config, data, model, devices) for devices in (4, 2))  # type: ignore[arg-type]
    assert changes(four, two) == {"trainer.devices": "trainer.devices is 4 there, 2 here"}
    assert changes(four, four) == {}


def test_a_completed_run_whose_last_checkpoints_the_disk_did_not_take_is_complete() -> None:
    assert program("resume=run")[0] == 0
    shutil.copy("run/checkpoints/previous.ckpt", "run/checkpoints/last.ckpt")
    before = Path("run/metrics.json").read_bytes()
    code, _, err = program("resume=run")
    assert code == 2 and "'run' is complete: to go on, raise trainer.max_steps above 10" in err
    assert Path("run/metrics.json").read_bytes() == before
    for odd in ("many", {"steps": "10"}, {"steps": None}):  # of a file that somebody has edited nothing is believed
        Path("run/metrics.json").write_text(json.dumps(json.loads(before) | {"speed": odd}))
        code, _, err = program("resume=run", "rank=4")
        assert code == 2 and "was trained otherwise" in err, err


def test_other_weights_of_a_mixture_are_other_data() -> None:
    """The same rows, in another order."""
    mixed = "data.path=[{path: rows.jsonl, weight: %s}, {path: held.jsonl, weight: 1}]"
    assert stopped(5, *COMMAND, mixed % 1, "hydra.run.dir=other")[0] == 143
    code, _, err = program("resume=other", mixed % 9)
    assert code == 2 and "the training data are others" in err, err


def test_what_was_allowed_once_is_not_allowed_for_ever() -> None:
    code, _, err = stopped(3, "resume=run", "optimizer.lr=1e-3", "allow_changed=[all]")
    assert code == 143, err
    assert "allow_changed" not in Path("run/.hydra/overrides.yaml").read_text()
    code, _, err = program("resume=run", "optimizer.lr=2e-3")
    assert code == 2 and "optimizer.lr is 0.001 there, 0.002 here" in err


def test_other_data_are_refused_and_named_and_can_be_allowed() -> None:
    rows = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text(rows.replace(json.loads(rows.splitlines()[3])["completion"], "something else"))
    code, _, err = program("resume=run")
    assert code == 2 and "was trained otherwise: the training data are others." in err and "[data]" in err
    code, _, err = program("resume=run", "allow_changed=[data]")
    assert code == 0, err


def test_another_template_is_named_and_not_the_data_that_follow_from_it() -> None:
    then = {
        "settings": {},
        "rounding": {},
        "base": {"fingerprint": "a", "config": "b"},
        "data": "c",
        "template": "d",
        "machine": {"transformers": "5"},
    }
    assert changes(then, then) == {}
    assert list(changes(then, then | {"template": "e", "data": "f"})) == ["template"]
    assert list(changes(then, then | {"data": "f"})) == ["data"]
    assert list(changes(then, then | {"base": {"fingerprint": "a", "config": "x"}})) == ["base"]
    newer = then | {"base": {"fingerprint": "a", "config": "x"}, "machine": {"transformers": "6"}}
    assert changes(then, newer) == {}  # another version says the same configuration in other words


@pytest.mark.parametrize("what", ["a weight", "the configuration"])
def test_another_base_is_refused_and_named(what: str, llama_folder: Path) -> None:
    from lorafit.embedded import MODEL

    for path in Path(MODEL).iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, llama_folder)
    size = json.loads((Path(MODEL) / "config.json").read_text())["vocab_size"]
    config = json.loads((llama_folder / "config.json").read_text()) | {"vocab_size": size}
    (llama_folder / "config.json").write_text(json.dumps(config))
    weights = safetensors.torch.load_file(llama_folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.randn(size, weights[name].shape[1]) * 0.02
    safetensors.torch.save_file(weights, llama_folder / "model.safetensors", {"format": "pt"})
    command = (*COMMAND, f"model.name={llama_folder}", "optimizer.lr=1e-3")
    assert stopped(5, *command, "hydra.run.dir=other")[0] == 143
    if what == "a weight":
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
        safetensors.torch.save_file(weights, llama_folder / "model.safetensors", {"format": "pt"})
    else:
        config["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "default"}
        (llama_folder / "config.json").write_text(json.dumps(config))
    code, _, err = program("resume=other")
    assert code == 2 and "was trained otherwise: the base model has" in err and "[base]" in err, err
    assert program("resume=other", "allow_changed=[base]")[0] == 0


def test_every_setting_is_either_of_the_training_or_known_not_to_be() -> None:
    """A key that is new is refused until somebody has thought about it."""
    config = compose()
    kept, rounding = training_settings(config)
    left = {key for key in flat(to_dict(config)) if key not in kept and key not in rounding}
    assert {key.partition(".")[0] for key in left} == {
        *("adapter", "allow_changed", "allow_other_base", "audit", "bench", "callbacks", "combine", "data", "energy"),
        *("generate", "halving", "ladder", "logger", "max_kl", "merge", "model", "out", "prompt", "report", "resume"),
        *("quant", "save", "task", "trainer"),
    }
    assert {"rank", "alpha", "seed", "optimizer.lr", "data.packing", "trainer.max_steps", "model.dtype"} <= set(kept)
    assert {key for key in left if key.startswith("trainer.")} == {
        *("trainer.val_check_interval", "trainer.log_every_n_steps", "trainer.checkpoint_every_n_steps"),
        *("trainer.accelerator", "trainer.max_skipped_steps", "trainer.on_oom"),
    }


@pytest.mark.parametrize("name", ["optimzer.lr", "bse", "rank.x"])
def test_a_name_that_cannot_have_changed_is_answered_with_the_nearest(name: str) -> None:
    code, _, err = program("resume=run", f"allow_changed=[{name}]")
    assert code == 2 and f"allow_changed: there is no {name!r}" in err
    if name != "rank.x":
        assert "Did you mean" in err


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut off", "flipped bits", "empty", "missing"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_gone_on_from(how: str) -> None:
    last = Path("run/checkpoints/last.ckpt")
    content = bytearray(last.read_bytes())
    if how == "missing":
        last.unlink()
    elif how == "flipped bits":
        for place in range(0, len(content), 997):  # a single one may lie in the padding between two parts
            content[place] ^= 4
        last.write_bytes(content)
    else:
        last.write_bytes(content[: len(content) // 2 if how == "cut off" else 0])
    code, _, err = program("resume=run")
    assert code == 0, err
    if how != "missing":
        assert "last.ckpt cannot be read as a checkpoint" in err
        assert f"previous.ckpt, of step {STOPPED_AT - 1}" in err
        assert Path("run/checkpoints/last.damaged").exists()
    assert adapter("run") == adapter("whole")
    for name in ("last", "previous", "best"):
        load_checkpoint(f"run/checkpoints/{name}.ckpt")


def test_without_a_checkpoint_that_can_be_read_it_says_which_to_remove() -> None:
    for path in Path("run/checkpoints").glob("*.ckpt"):
        path.write_bytes(b"no checkpoint")
    code, _, err = program("resume=run")
    assert code == 2 and err.count("cannot be read as a checkpoint") >= 2 and "Traceback" not in err


@pytest.mark.parametrize("part", ["checkpoints", "checkpoints/last.ckpt"])
def test_a_part_of_a_run_is_answered_with_the_run(part: str) -> None:
    code, _, err = program(f"resume=run/{part}")
    assert code == 2 and f"'run/{part}' is a part of a run: give the folder of the run, resume=run" in err


# --- resume=auto ------------------------------------------------------------------------------------------------------


def test_auto_begins_goes_on_and_is_done() -> None:
    """The same command until it is done, as a scheduler gives it that puts a job back into the queue."""
    command = (*COMMAND, "hydra.run.dir=job", "resume=auto")
    code, out, _ = stopped(9, *command)
    assert code == 143 and "a new one begins" in out
    code, out, _ = stopped(3, *command)
    assert code == 143 and "goes on in job" in out
    code, out, _ = program(*command)
    assert code == 0 and "goes on in job" in out
    assert adapter("job") == adapter("whole")
    before = {path: path.stat().st_mtime_ns for path in Path("job").rglob("*")}
    code, out, err = program(*command)
    assert code == 0 and "is done already" in out and err == ""
    assert {path: path.stat().st_mtime_ns for path in Path("job").rglob("*")} == before


def test_auto_without_a_folder_finds_the_newest_stopped_run_of_the_same_settings() -> None:
    for place, settings in (("1", COMMAND), ("2", COMMAND), ("3", (*COMMAND, "seed=1"))):
        assert stopped(5, *settings, f"hydra.run.dir=outputs/2026-01-01/{place}")[0] == 143
        time.sleep(0.02)
    with alone(Path("outputs/2026-01-01/2").resolve()):  # somebody is at work there
        code, out, _ = program(*COMMAND, "resume=auto")
    assert code == 0 and "goes on in outputs/2026-01-01/1" in out
    assert adapter("outputs/2026-01-01/1") == adapter("whole")
    assert status("outputs/2026-01-01/2") == status("outputs/2026-01-01/3") == "interrupted"
    code, out, _ = stopped(3, *COMMAND, "resume=auto", "seed=2")
    assert code == 143 and "no run of these settings: a new one begins" in out


def test_auto_goes_on_with_the_sweep_of_the_same_command() -> None:
    command = ("-m", *COMMAND, "rank=1,2")
    assert stopped(25, *command)[0] == 143
    [sweep] = Path("multirun").glob("*/*")
    code, out, _ = program(*command, "resume=auto")
    assert code == 0 and f"goes on in {sweep}" in out
    assert [status(sweep / f"rank={rank}") for rank in (1, 2)] == ["completed"] * 2
    assert adapter(sweep / "rank=2") == adapter("whole")


def test_auto_wants_a_folder_that_it_can_find_again() -> None:
    code, _, err = program(*COMMAND, "resume=auto", "hydra.run.dir=runs/${now:%H%M%S}")
    assert code == 2 and "give a fixed one, or none" in err
