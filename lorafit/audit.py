"""Show, before anything is loaded or trained, what a run would train; refuse what would fail in silence.

    python -m lorafit.audit data.path=my.jsonl …       the overrides of `lorafit.train`, whatever they are
    python -m lorafit.audit audit.examples=10

Examples are printed token by token: trained, masked, or cut for their length. The rows are counted, those that repeat
or that are held out as well among them, and so are the linear layers that would be adapted, by kind and by layer; for
that the model is built without its weights. With packing the model is loaded, and whether packed examples see each
other is measured. What `train` would refuse is refused here, with all that speaks for it.

Leaves `audit.json`, `audit.html` (a page that needs nothing else) and a W&B table. Exit codes: 0 nothing is wrong, 2
refused.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.build import build_data, build_skeleton, load_module, open_logger, prove_packing, require_no_adapter
from lorafit.config import Config
from lorafit.errors import InputError
from lorafit.launch import start
from lorafit.redact import redact, redact_values

if TYPE_CHECKING:
    from lorafit.datamodule import FinetuneDataModule

_LISTED = 20  # of duplicates and of shared examples
_SEARCHED = 5000  # rows that are looked through for an example that is cut


def main() -> None:
    start("audit", run)


def run(config: Config, folder: Path) -> None:
    """One audit: writes its files, prints, and raises InputError when anything is refused."""
    from lorafit.audit_page import audit_page
    from lorafit.files import write_atomically, write_json
    from lorafit.tables import audit_tables, data_notes, source_names
    from lorafit.terminal import console
    from lorafit.trainer import quiet_libraries

    quiet_libraries()
    terminal = console()
    require_no_adapter(config)
    data = build_data(config)
    data.setup()
    refusals = [dataclasses.asdict(refusal) for refusal in data.refusals()]
    modules, problems = look_at_model(config, data)
    refusals += problems
    packing = None
    if not refusals and (config.data.packing or config.data.padding_free):
        terminal.print("loading the model to prove that packed examples do not see each other …")
        try:
            packing = prove_packing(config, data, load_module(config).model)
        except InputError as error:
            refusals.append({"check": "packing", "message": str(error)})
    found = report(config, data) | {
        "coverage": {kind: {key: item[key] for key in ("wrapped", "total")} for kind, item in modules.items()},
        "layers": {kind: item["layers"] for kind, item in modules.items()},
        "packing": dataclasses.asdict(packing) if packing is not None else None,
        "notes": data_notes(data, packing),
        "refusals": refusals,
    }
    write_json(folder / "audit.json", found)
    page = audit_page(found, source_names(config.data.path))
    write_atomically(folder / "audit.html", lambda file: file.write(redact(page).encode()))
    with open_logger(config, folder, job_type="audit") as logger:
        log_audit(logger, found)
    for part in audit_tables(found, terminal.is_terminal):
        terminal.print(part)
    terminal.print(f"The same as a page: {folder / 'audit.html'}")
    if refusals:
        raise InputError(refused(refusals))


def refused(refusals: list[dict[str, str]]) -> str:
    """The message of an audit that found something."""
    from lorafit.data.checks import way_past

    lines = [f"{len(refusals)} refused:", *(f"  {item['check']}: {item['message']}" for item in refusals)]
    past = way_past(item["check"] for item in refusals)
    return "\n".join([*lines, *([past] if past else [])])


def report(config: Config, data: FinetuneDataModule) -> dict[str, Any]:
    """What there is to say of the data, and some of its examples token by token."""
    numbers = data.statistics()
    duplicates, leaked, train = data.duplicates(), data.leaked(), data.train_sequences
    return {
        "examples": shown_examples(data, config.audit.examples, config.audit.tokens),
        "total_tokens": numbers["train_tokens"],
        **{key: value for key, value in numbers.items() if key not in ("train_tokens", "packed_rows")},
        "duplicate_rows": [train.place(int(index)) for index in duplicates[:_LISTED]],
        "leaked_rows": [train.place(int(index)) for index in leaked[:_LISTED]],
        "bad_rows": data.report.bad_rows,
        "longest": max(data.report.lengths, default=0),
    }


def shown_examples(data: FinetuneDataModule, count: int, width: int) -> list[dict[str, Any]]:
    """The first `count` training examples as tokens, and one more that is cut where there is any."""
    from lorafit.data.checks import token_rows

    some_are_cut = bool(data.report.dropped or data.report.truncated)
    shown: list[dict[str, Any]] = []
    for seen, example in enumerate(data.first_examples()):
        if seen >= _SEARCHED or (len(shown) >= count and not some_are_cut) or not count:
            break
        if len(shown) > count:
            break
        tokens = token_rows(data.encoder, example)
        cut = sum(token["cut"] for token in tokens)
        if len(shown) < count or cut:
            shown.append(
                {
                    "where": example.where,
                    "outcome": "whole" if not cut else "dropped" if cut == len(tokens) else "cut",
                    "length": len(tokens),
                    "tokens": tokens[:width],
                }
            )
            some_are_cut = some_are_cut and not cut
    return shown


def look_at_model(config: Config, data: FinetuneDataModule) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """({kind: {"wrapped", "total", "layers": {layer: wrapped?}}}, what is wrong), from a model without weights."""
    from lorafit.inject import inject_lora, lora_layers
    from lorafit.quant import linear_layers

    model = build_skeleton(config)
    problems = []
    names = list(linear_layers(model))
    try:
        data.check_vocabulary(model.get_input_embeddings().num_embeddings)
    except InputError as error:
        problems.append({"check": "vocabulary", "message": str(error)})
    inject_lora(
        model,
        rank=config.rank,
        alpha=config.alpha,
        target_modules=config.target_modules,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        bias=config.bias,
        modules_to_save=config.modules_to_save,
    )
    wrapped = set(lora_layers(model))
    kinds: dict[str, Any] = {}
    for name in names:
        entry = kinds.setdefault(name.rpartition(".")[2], {"wrapped": 0, "total": 0, "layers": {}})
        entry["wrapped"] += name in wrapped
        entry["total"] += 1
        layer = re.search(r"\.(\d+)\.", name)
        entry["layers"].setdefault(layer[1] if layer else "", []).append(name in wrapped)
    for entry in kinds.values():
        entry["layers"] = {layer: all(flags) for layer, flags in entry["layers"].items()}
    return kinds, problems


def log_audit(logger: Any, found: dict[str, Any]) -> None:
    """The counts, and the examples as a table, where the logger has tables: a row for each run of equal tokens."""
    from lorafit.tables import token_runs

    if logger is None:
        return
    numbers = ("total_tokens", "supervised_tokens", "truncated_examples", "dropped_examples", "duplicate_examples")
    logger.log_metrics({f"audit/{key}": found[key] for key in (*numbers, "leaked_examples", "skipped_rows")})
    rows = [
        [example["where"], state, count, text]
        for example in found["examples"]
        for state, count, text in token_runs(example["tokens"])
    ]
    if hasattr(logger, "log_table") and rows:
        logger.log_table("audit", columns=["row", "state", "tokens", "text"], data=redact_values(rows))


if __name__ == "__main__":
    main()
