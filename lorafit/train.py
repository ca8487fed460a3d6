"""Fine-tune a language model with LoRA.

    python -m lorafit.train                                       the embedded model, rank 16: a minute
    python -m lorafit.train rank=16 quant=nf4                     the same over a 4-bit base: QLoRA
    python -m lorafit.train model.name=FOLDER data.path=FILE 'data.columns={prompt: question, completion: answer}'
    python -m lorafit.train -m rank=4,8,16,32 quant=none,nf4      eight runs
    python -m lorafit.train resume=RUN                            go on where a stopped run, or sweep, stood

It says what it will do, measures the base, trains, measures again, and leaves a run folder: `adapter/`, `checkpoints/`,
`metrics.json`, `history.jsonl`, `samples.jsonl`, `train.log`. Exit codes: 0 done, 2 wrong input, 3 diverged or an
alarm, 4 out of memory, 5 trained but not saved, 129, 130 and 143 stopped by a signal with a checkpoint saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.build import (
    is_main_process,
    load_module,
    open_logger,
    prove_packing,
    require_accelerator,
    require_no_adapter,
)
from lorafit.config import Config, config_sha256, quoted, settings_to_record, to_dict
from lorafit.errors import DivergedError, InputError, LorafitError, MemoryExhausted, NotSaved, Paused, Stopped, reason
from lorafit.jobs import config_folder, given_overrides, record_settings
from lorafit.launch import start
from lorafit.measuring import measure, measure_ladder, measure_rounding, retention_text
from lorafit.redact import redact_values
from lorafit.rescue import before_training, only_told, remedy, rescued, tried_twice
from lorafit.resuming import clear_up, find_checkpoint, identity, require_same
from lorafit.stopping import stopped_by
from lorafit.sweep import Beyond, Job, Shared, alone, read_metrics, recorded_result, resumed, sweep_of
from lorafit.terminal import say

if TYPE_CHECKING:
    import lightning as L

    from lorafit.checkpoint import Found
    from lorafit.module import FinetuneModule

log = logging.getLogger(__name__)


_SHARED = Shared()  # by the jobs of a sweep in this process


def main() -> None:
    start("train", run, run_job)


def run(config: Config, folder: Path) -> float:
    """One run by itself: returns the held-out loss after training. Whatever happens, metrics.json says how it ended;
    after wrong input nothing half written is left."""
    sweep, main = sweep_of(folder) if config.resume else None, is_main_process()
    job = Job(sweep, rungs=read_metrics(folder).get("rungs", {})) if sweep is not None else None
    with alone(folder) if main else contextlib.nullcontext():
        try:
            return _recorded(config, folder, Shared(), job)
        except InputError as error:
            left = read_metrics(folder)
            if main and not config.resume and left.get("status") == Stopped.status:
                if any((folder / "checkpoints").glob("*.ckpt")):  # a bad row that a stream has come to
                    _note(folder, left | {"status": error.status, "error": str(error)})
                else:
                    (folder / "metrics.json").unlink(missing_ok=True)
            raise


def run_job(config: Config, folder: Path, sweep: Path, until: float | None) -> float:
    """One job of a sweep: not run if its result is here, gone on with if it was begun. Returns its held-out loss, or
    NaN where it stands beyond the share of its steps, `until`, at which it was to be looked at.
    """
    with alone(folder) if is_main_process() else contextlib.nullcontext():
        found = recorded_result(config, folder, until)
        if found is not None:
            say(f"done already: held-out loss {found:.4g}" if math.isfinite(found) else "done already")
            return found
        before, going_on = read_metrics(folder), resumed(config, folder)
        if going_on.resume is None:  # a checkpoint of nobody knows which settings is not to be found here later
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        with before_training(folder):
            record_settings(folder, config)
        try:
            return _recorded(going_on, folder, _SHARED, Job(sweep, until, before.get("rungs", {})))
        except Beyond:
            say("it has come further already")
            return math.nan
        except InputError as error:
            refused = {"status": "failed", "error": str(error), "config_sha256": config_sha256(config)}
            _note(folder, before | refused)
            raise
        finally:
            _SHARED.give_back()


def _recorded(config: Config, folder: Path, shared: Shared, job: Job | None) -> float:
    """`fine_tune`, with metrics.json written however it ends; for wrong input that is left to the caller."""
    metrics: dict[str, Any] = {"status": "failed"}
    begin_metrics(metrics, config)
    if job is not None and job.rungs:
        metrics["rungs"] = job.rungs
    if not is_main_process():
        return fine_tune(config, folder, metrics, shared, job)
    try:
        loss = fine_tune(config, folder, metrics, shared, job)
    except (InputError, Beyond):
        raise
    except (LorafitError, Stopped) as error:
        if isinstance(error, MemoryExhausted):
            shared.forget()
        _note(folder, metrics | {"status": error.status, "error": str(error)})
        raise
    except Exception as error:
        if (stop := stopped_by()) is not None:  # a library has made another error of it
            _note(folder, metrics | {"status": stop.status, "error": str(stop)})
            raise stop from error
        _note(folder, metrics | {"status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    if (refused := tried_twice(lambda: _write_metrics(folder, metrics), folder, "metrics.json")) is not None:
        raise NotSaved(
            f"{folder} does not take metrics.json ({refused.strerror}), without which the run looks unfinished. To "
            f"complete it, {remedy(refused)} and give resume={folder}"
        )
    return loss


def fine_tune(config: Config, folder: Path, metrics: dict[str, Any], shared: Shared, job: Job | None) -> float:
    """The run from top to bottom; fills `metrics` as it goes. Returns the held-out loss at its end."""
    began = time.perf_counter()  # before the heavy imports, which are a part of what it takes to start

    import lightning as L
    import torch

    from lorafit.adapter import adapter_bytes, save_adapter
    from lorafit.callbacks import (
        AdapterNorms,
        Checkpoints,
        History,
        PagedOptimizerMemory,
        PauseAt,
        ProveLearning,
        SkipNonFinite,
        StepMetrics,
        StopOnSignal,
        TrainingProgress,
        history_rows,
    )
    from lorafit.callbacks.wandb import log_adapter, log_summary
    from lorafit.data.checks import label_table
    from lorafit.evaluation import evaluate_loss
    from lorafit.exhausted import MEASURING, SAVING, TRAINING, OutOfMemory
    from lorafit.inject import count_parameters, coverage, lora_layers
    from lorafit.machine import return_free_memory
    from lorafit.memory import memory_by_part, reset_peak
    from lorafit.quant import base_report
    from lorafit.retention import measure_retention
    from lorafit.tables import (
        adapter_notes,
        data_notes,
        path_counts,
        path_notes,
        result_table,
        samples_table,
        source_names,
        start_table,
        stream_sentence,
    )
    from lorafit.terminal import console
    from lorafit.trainer import JobDDP, build_trainer, quiet_libraries, still_logging, total_steps

    terminal = console(quiet=not is_main_process())
    finite = SkipNonFinite(config.trainer.max_skipped_steps)
    checkpoints = Checkpoints(folder / "checkpoints", config.trainer.checkpoint_every_n_steps, finite=finite)
    memory_ends = OutOfMemory(config, metrics, checkpoints.last)
    with StopOnSignal(checkpoints) as signals, contextlib.ExitStack() as stack:
        stack.enter_context(memory_ends.told())
        L.seed_everything(config.seed, verbose=False)
        torch.set_float32_matmul_precision("high")
        quiet_libraries()

        require_no_adapter(config)
        require_accelerator(config.trainer.accelerator)
        found = find_checkpoint(config) if config.resume else None
        if found is None:
            config = dataclasses.replace(config, resume=None)

        # ---- what goes in: data first, since what is wrong with it is known soonest
        data = shared.data(config)
        metrics["data"] = data.statistics()
        module = load_module(config, shared.base(config))
        model: Any = module.model
        memory_ends.model, memory_ends.idle_bytes, memory_ends.doing = model, shared.idle_bytes, MEASURING
        base = base_report(model)
        assert base is not None
        data.check_vocabulary(model.get_input_embeddings().num_embeddings)
        packing = prove_packing(config, data, model)
        other_text = retention_text(config, data)
        metrics["data"]["packing"] = dataclasses.asdict(packing) if packing else None
        if config.model.name != "embedded" and config.data.path == "embedded":
            log.warning("data.path is the embedded toy data set: give data.path=FILE to train on your own")
        trainable, total = count_parameters(model)
        describe_model(metrics, config, module, trainable, total)

        # ---- what will happen
        devices = config.trainer.devices if isinstance(config.trainer.devices, int) else torch.cuda.device_count()
        if config.resume and data.streaming and devices > 1:
            raise InputError(
                "resume: a streamed run of several processes cannot be resumed, since they stand at different places: "
                "start it anew with one device, or without data.streaming"
            )
        if config.trainer.on_oom == "halve" and devices > 1:
            raise InputError(
                "trainer.on_oom=halve needs one device, since a group takes one backward pass a batch: trainer.devices "
                f"is {devices}"
            )
        if job and job.until is not None and devices > 1:
            raise InputError(
                f"halving.factor: a job is looked at early on one device only: trainer.devices is {devices}"
            )
        # a stream has the length of the run, for each process
        steps_per_epoch = max(1, len(data.train_dataloader()) // (1 if data.streaming else max(1, devices)))
        steps = total_steps(
            steps_per_epoch,
            config.trainer.accumulate_grad_batches,
            config.trainer.max_steps,
            config.trainer.max_epochs,
        )
        checkpoints.identity = identity(config, data, model)
        if found is not None:
            require_same(config, found, checkpoints.identity)
        resumed_at = found.step if found is not None else 0
        require_steps(config, steps, folder, resumed_at)
        stop = job.steps(steps) if job else None
        if stop and resumed_at > stop:
            raise Beyond
        compiled = module.decide_compilation(tokens_of(data, steps * config.trainer.accumulate_grad_batches))
        metrics["model"]["paths"] = path_counts(module.paths)
        metrics["model"]["compiled"] = module.ops.name == "compiled"
        device = next(model.parameters()).device
        first_layer = next(iter(lora_layers(model).values()))
        terminal.print(
            start_table(
                base=base,
                architecture=type(model).__name__,
                dtype=str(model.dtype).removeprefix("torch."),
                device=device_name(device),
                rank=config.rank,
                alpha=config.alpha,
                scaling=first_layer.scaling,
                variant=config.variant,
                coverage=coverage(model),
                trainable=trainable,
                total=total,
                data=metrics["data"],
                data_path=source_names(config.data.path),
                data_notes=data_notes(data, packing),
                optimizer=config.optimizer["_target_"].rpartition(".")[2],
                learning_rate=config.optimizer["lr"],
                steps=steps,
                batch_size=config.data.batch_size,
                accumulate=config.trainer.accumulate_grad_batches,
                memory=memory_by_part(model),
                folder=str(folder),
                adapter_notes=adapter_notes(model),
                path_notes=path_notes(module, compiled),
            )
        )

        if is_main_process():  # from here on a run that is killed has left word of itself
            if (folder / "adapter").exists() and not (folder / "adapter").is_dir():
                raise InputError(f"{folder / 'adapter'} is a file, where the adapter's folder is to be: remove it")
            with before_training(folder):
                clear_up(folder, found)
                if found is not None:
                    record_settings(folder, config)
                _write_metrics(folder, metrics | {"status": Stopped.status})

        # ---- the base, measured
        terminal.print("\nmeasuring the base on held-out data …")
        before, answers_before = shared.measured(config, lambda: measure(config, data, model))
        metrics["before"] = before

        # ---- training
        rows = history_rows(Path(config.resume), resumed_at) if config.resume else []
        logger = stack.enter_context(open_logger(config, folder, sweep=job.sweep if job else None, history=rows))
        stack.enter_context(memory_ends.told())  # the logger is to hear what it was as well
        step_metrics = StepMetrics(config.trainer.log_every_n_steps)
        memory = PagedOptimizerMemory(config.callbacks.memory_every_n_steps, shared.idle_bytes)
        callbacks: list[L.Callback] = [finite, step_metrics, memory]
        if config.callbacks.prove_after_n_steps:
            callbacks.append(ProveLearning(config.callbacks.prove_after_n_steps))
        if config.callbacks.norms_every_n_steps:
            callbacks.append(AdapterNorms(config.callbacks.norms_every_n_steps))
        if config.callbacks.progress:
            callbacks.append(TrainingProgress(step_metrics, terminal))
        pause = [PauseAt(checkpoints, stop)] if stop else []
        trainer = build_trainer(
            folder,
            batches=steps_per_epoch,
            max_steps=config.trainer.max_steps,
            max_epochs=config.trainer.max_epochs,
            accumulate_grad_batches=config.trainer.accumulate_grad_batches,
            val_check_interval=config.trainer.val_check_interval,
            accelerator=config.trainer.accelerator,
            devices=config.trainer.devices,
            log_every_n_steps=config.trainer.log_every_n_steps,
            callbacks=[*callbacks, checkpoints, signals, *pause],
            logger=[*([logger] if logger else []), History(folder, rows)],
            strategy=JobDDP(job_command(folder, config.resume)) if job and devices > 1 else "auto",
        )
        return_free_memory()  # what measuring has left is no part of training
        reset_peak(device)
        memory_ends.trainer, memory_ends.doing = trainer, TRAINING
        try:
            with restoring(found, module):
                trainer.fit(module, data, ckpt_path=str(found.path) if found is not None else None)
            checkpoints.make_up(trainer, module)
        except DivergedError as error:
            if finite.first_of_row is None or not is_main_process():
                raise
            good = checkpoints.keep_good(finite.first_of_row)
            raise DivergedError(f"{error}.{last_good(good, folder)}") from error
        except Paused:
            assert job is not None and stop is not None
            signals.check()
            loss = evaluate_loss(model, data.eval_batches())["loss"]
            if not math.isfinite(loss):  # its steps may be skipped ones
                raise DivergedError(f"the held-out loss after {stop} steps is not finite. Lower optimizer.lr") from None
            metrics["status"] = Stopped.status
            metrics["error"] = f"halving: looked at after {stop} of {steps} steps"
            metrics["rungs"] = job.rungs | {str(job.until): loss}
            with still_logging(logger):
                log_summary(logger, metrics)
            terminal.print(f"after {stop} of {steps} steps: held-out loss {loss:.4g}")
            return loss
        finally:
            metrics["speed"] = step_metrics.totals()
            metrics["speed"] |= {"skipped_steps": finite.skipped, "halved_batches": module.halved}
            metrics["speed"]["startup_seconds"] = round(step_metrics.began - began, 3)
            metrics["memory"] = memory_metrics(memory)
            metrics["data"] |= {key: value for key, value in data.statistics().items() if data.streaming}
        if data.streaming:
            terminal.print(stream_sentence(metrics["data"]))
        if not is_main_process():
            require_finite(module)
            return float("nan")

        # ---- what did happen
        memory_ends.doing = MEASURING
        terminal.print("measuring the adapter on held-out data …")
        try:
            require_finite(module)
            after, answers_after = measure(config, data, model)
            metrics["after"] = after
            if not math.isfinite(after["loss"]):  # finite weights may still overflow
                raise DivergedError("the held-out loss after training is not finite. Lower optimizer.lr.")
        except DivergedError as error:  # what the last step has made is no good place to go on from
            good = checkpoints.keep_good(trainer.global_step + 1)
            raise DivergedError(f"{error}{last_good(good, folder)}") from error
        checkpoints.keep_best(after["loss"])
        metrics["ranks"] = effective_ranks(model)
        if config.ladder:
            ladder = measure_ladder(model, lambda: evaluate_loss(model, data.eval_batches())["loss"], config.ladder)
            metrics["ladder"] = ladder
        metrics["retention"] = measure_retention(model, other_text)
        samples = [
            {"prompt": example.prompt, "before": old, "after": new, "reference": example.completion}
            for example, old, new in zip(data.eval_examples, answers_before, answers_after, strict=False)
        ]
        with only_told(folder / "samples.jsonl", "the run has no samples"):
            write_samples(folder / "samples.jsonl", samples)
        metrics["speed"]["total_seconds"] = round(time.perf_counter() - began, 3)
        if config.save.dtype != config.adapter_dtype == "float32":  # what was trained rounded is stored as it was used
            metrics["saved"] = {"dtype": config.save.dtype, "bytes": adapter_bytes(model, config.save.dtype)}
            metrics["saved"] |= measure_rounding(model, data.eval_batches(), config.save.dtype)
        provenance = {
            "metrics": {key: metrics[key] for key in ("before", "after", "retention", "saved") if key in metrics},
            "data": {"path": config.data.path, "template": data.template_hash(), "sha256": data.content_hash()}
            | metrics["data"],
            "settings": settings_to_record(config),
            "config_sha256": metrics["config_sha256"],
            "versions": metrics["versions"],
        }

        def save(place: Path) -> None:
            save_adapter(model, place / "adapter", dtype=config.save.dtype, provenance=provenance)

        def save_elsewhere(place: Path) -> None:
            save(place)
            _write_metrics(place, metrics)
            write_samples(place / "samples.jsonl", samples)

        memory_ends.doing = SAVING
        if checkpoints.failed is not None:
            log.warning(f"the last checkpoint is not written: {checkpoints.failed}")
        if (refused := tried_twice(lambda: save(folder), folder, "the adapter")) is not None:
            raise rescued(save_elsewhere, refused, folder, resumable=checkpoints.last.exists())
        metrics["status"] = "completed"  # only now: without its adapter a run is not
        with still_logging(logger):
            log_results(logger, metrics, samples, trainer.global_step)
            log_labels(logger, label_table(data.encoder, data.train_sequences))
            log_summary(logger, metrics)
            if config.logger is not None and config.logger.adapter:
                log_adapter(logger, folder / "adapter")
        terminal.print(result_table(metrics))
        if samples and config.task.samples:
            terminal.print(samples_table(samples[: config.task.samples]))
        terminal.print(
            f"{metrics['speed']['steps']} steps in {metrics['speed']['train_seconds']:.0f} s, "
            f"{metrics['speed']['supervised_tokens_per_second']:,.0f} supervised tokens/s. "
            f"The adapter is in {folder / 'adapter'}"
        )
        return after["loss"]


def require_steps(config: Config, steps: int, folder: Path, resumed_at: int) -> None:
    """Raise InputError when the warm-up takes all steps, or when the run to be resumed has taken them all."""
    warmup = config.scheduler.warmup
    if isinstance(warmup, int) and 0 < steps <= warmup:
        raise InputError(f"scheduler.warmup must be shorter than the run: {warmup} steps of warm-up, {steps} in all")
    done = read_metrics(folder).get("status") == "completed" and (folder / "adapter").is_dir()
    if resumed_at >= steps and done:
        raise InputError(
            f"resume: {config.resume!r} is complete: to go on, raise "
            f"trainer.max_steps above {steps}, with 'allow_changed=[trainer.max_steps]'"
        )


def job_command(folder: Path, resume: str | None) -> list[str]:
    """What the other processes of a job on several devices run: the job alone, in its own folder."""
    given = [f"resume={quoted(resume)}"] if resume else []
    where = [f"hydra.run.dir={quoted(str(folder))}", "hydra.mode=RUN", "hydra.output_subdir=null"]
    own = config_folder()
    flags = ["--config-dir", own] if own else []
    return [sys.executable, "-m", "lorafit.train", *flags, *given_overrides(), *given, *where]


def tokens_of(data: Any, batches: int) -> int:
    """About how many tokens so many batches hold, padding aside; the most that they may where nobody has counted."""
    examples, tokens = len(data.train_sequences), data.statistics()["train_tokens"]
    each = tokens / examples if examples and not data.packing and not data.streaming else data.encoder.max_length
    return round(batches * data.batch_size * each)


def last_good(good: tuple[Path, int] | None, folder: Path) -> str:
    """What to say of the checkpoint that is left after a run has diverged, and its step."""
    if good is None:
        return " It has no checkpoint from before that: begin anew with a lower optimizer.lr"
    return (
        f" The last good checkpoint is {good[0]}, of step {good[1]} (one whose next step was not finite is called "
        f"diverged.ckpt). To go on from it: {shlex.quote(f'resume={folder}')} optimizer.lr=LOWER "
        "'allow_changed=[optimizer.lr]'"
    )


@contextlib.contextmanager
def restoring(found: Found | None, module: FinetuneModule) -> Iterator[None]:
    """Raise InputError in place of what goes wrong while the contents of a checkpoint are taken over: it is whole, but
    another version or a stranger has written it. What goes wrong later is no fault of it."""
    from lorafit.checkpoint import Unfit

    try:
        yield
    except Exception as error:
        # what a device, a network or a disk says meanwhile is no fault of the checkpoint
        unfit = isinstance(error, Unfit | KeyError | IndexError | TypeError | AttributeError | ValueError)
        unfit = unfit and (isinstance(error, Unfit) or not isinstance(error, LorafitError))
        if found is None or module.began or not unfit:
            raise
        said = reason(error) if isinstance(error, Unfit) else f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{found.path} cannot be gone on from ({said}): remove it to begin anew") from error


def require_finite(module: FinetuneModule) -> None:
    """Raise DivergedError when the trained adapter holds a number that is not finite."""
    import torch

    bad = [name for name, tensor in module.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise DivergedError(f"the adapter is not finite after training: {', '.join(bad[:3])}.")


# ------------------------------------------------------------------------------------------------ recording


def begin_metrics(metrics: dict[str, Any], config: Config) -> None:
    """What is known before anything is loaded."""
    names = ("lorafit", "torch", "transformers", "lightning", "bitsandbytes", "hydra-core", "datasets", "wandb")
    metrics["seed"] = config.seed
    metrics["versions"] = {"python": platform.python_version()} | {name: version(name) for name in names}
    metrics["config_sha256"] = config_sha256(config)


def in_order(metrics: dict[str, Any]) -> dict[str, Any]:
    """The parts in the order in which a person reads them."""
    first = ("status", "error", "model", "lora", "data", "before", "after", "retention", "saved", "speed", "memory")
    last = ("rungs", "ladder", "seed", "versions", "config_sha256", "ranks")
    middle = {key: value for key, value in metrics.items() if key not in last}
    return {key: metrics[key] for key in first if key in metrics} | middle | metrics


def _note(folder: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json of a run that has failed already, if the disk takes it."""
    with only_told(folder / "metrics.json", "it does not say how the run ended"):
        _write_metrics(folder, metrics)


def _write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    from lorafit.files import write_json

    write_json(folder / "metrics.json", in_order(metrics))


def describe_model(metrics: dict[str, Any], config: Config, module: FinetuneModule, trainable: int, total: int) -> None:
    """The `model` and `lora` parts of metrics.json."""
    metrics["model"] = {
        "name": config.model.name,
        "architecture": type(module.model).__name__,
        "parameters_total": total,
        "parameters_trainable": trainable,
        "trainable_percent": round(100 * trainable / total, 4),
        "quant": to_dict(config)["quant"],
    }
    metrics["lora"] = {
        "rank": config.rank,
        "alpha": config.alpha,
        "target_modules": config.target_modules,
        "variant": config.variant,
        "modules_wrapped": len(module.wrapped),
    }


def effective_ranks(model: Any) -> dict[str, dict[str, int]]:
    """The `ranks` part of metrics.json: of each LoRA layer its rank, and how much of it is used."""
    from lorafit.inject import lora_layers
    from lorafit.spectrum import effective_rank, spectrum

    return {
        name: {"rank": layer.rank, "effective_rank": effective_rank(spectrum(layer))}
        for name, layer in lora_layers(model).items()
    }


def memory_metrics(memory: Any) -> dict[str, int | None]:
    """The `memory` part of metrics.json. The peak is that of training; lorafit does not predict it yet."""
    parts = memory.parts or dict.fromkeys(
        ("weights", "quant_state", "adapter", "gradient", "optimizer", "optimizer_paged"), 0
    )
    return {"peak_bytes": memory.peak, "predicted_peak_bytes": None} | {
        f"{part}_bytes": count for part, count in parts.items()
    }


def write_samples(path: Path, samples: list[dict[str, str]]) -> None:
    from lorafit.files import write_atomically

    text = "".join(json.dumps(redact_values(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(path, lambda file: file.write(text.encode()) and None)


def log_results(logger: Any, metrics: dict[str, Any], samples: list[dict[str, str]], step: int) -> None:
    """The held-out numbers, and the samples as a table where the logger has tables."""
    if logger is None:
        return
    numbers = {f"before/{key}": value for key, value in metrics["before"].items()}
    numbers |= {f"after/{key}": value for key, value in metrics["after"].items()}
    numbers |= {f"retention/{key}": value for key, value in metrics["retention"].items()}
    logger.log_metrics(numbers, step=step)
    if hasattr(logger, "log_table") and samples:
        rows = redact_values([list(sample.values()) for sample in samples])
        logger.log_table("samples", columns=list(samples[0]), data=rows)


def log_labels(logger: Any, rows: list[dict[str, Any]]) -> None:
    """What of some examples is trained, as a table where the logger has tables."""
    if hasattr(logger, "log_table") and rows:
        data = redact_values([list(row.values()) for row in rows])
        logger.log_table("labels", columns=list(rows[0]), data=data)


def device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
