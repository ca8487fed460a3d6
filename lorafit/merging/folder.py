"""A merged model on the disk: a plain model folder that transformers opens and that needs nothing of lorafit.

    config.json, model*.safetensors                the model
    generation_config.json, tokenizer files        copied from the base; no code and no pickles
    lorafit.json, README.md                        what was merged into what, and what it cost
    undo.lorafit                                   what `merge.unmerge` needs (see undo.py)

It appears whole or not at all: everything is written into a draft beside it, which is then renamed.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.adapter import load_adapter, read_record
from lorafit.errors import InputError, reason
from lorafit.files import replace_folder, require_own_files, write_atomically, write_json
from lorafit.inject import adapter_modules
from lorafit.loading import load_config
from lorafit.merging.candidates import DEQUANTIZED, REQUANTIZED, Candidate
from lorafit.merging.files import write_shards
from lorafit.merging.skeleton import lend_weights, skeleton
from lorafit.merging.undo import UNDO, UndoWriter, adapter_of, read_undo, restore
from lorafit.weights import INDEX, FileWeights, Planned

RECORD, CARD = "lorafit.json", "README.md"
# what a tokenizer and a chat template may be stored as; anything else of the base's folder stays there
COPIED = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *(
        "*.model",
        "*.tiktoken",
        "chat_template*",
        "*.jinja",
        "additional_chat_templates/*.jinja",
        "*processor_config.json",
    ),
)
NEVER = (".py", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".safetensors")


def require_new(out: str | None, outside_of: Sequence[Path] = ()) -> Path:
    """The folder that is to be written, so that it is known before anything is loaded that it can be.

    outside_of: folders in which it must not lie. Raises InputError when none is named, when it holds something, lies in
    one of those or cannot be made; which is tried, and leaves nothing behind.
    """
    if out is None:
        raise InputError("out is not set: give out=DIR, a new folder for the merged model")
    if not out.strip():
        raise InputError("out is empty: name a new folder")
    made: list[Path] = []
    try:
        folder = Path(out).expanduser().resolve()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"out: {out!r} exists and is not empty: name a new folder, or remove this one")
        for other in outside_of:
            if folder.is_relative_to(other.expanduser().resolve()):
                raise InputError(f"out: {out!r} lies inside {str(other)!r}, which is read: name a folder elsewhere")
        for path in reversed(folder.parents):
            if not path.exists():
                path.mkdir()
                made.append(path)
        made.append(Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-")))  # as `drafted` does
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a ~user that there is not, a loop of links
        if isinstance(error, InputError):
            raise
        why = getattr(error, "strerror", None) or reason(error)
        raise InputError(f"out: {out!r} cannot be made: {why}: name another folder") from error
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # somebody else may have put something there
                path.rmdir()
    return folder


@contextlib.contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that becomes it at the end, and vanishes where something fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield draft
        draft.chmod(0o755)  # mkdtemp makes what only its owner may open
        replace_folder(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def write_merged(
    candidate: Candidate,
    out: Path,
    *,
    adapted: Mapping[str, Any],
    source: Path | None,
    record: Mapping[str, Any],
    max_shard_bytes: int,
    undo: bool = True,
) -> dict[str, int]:
    """Write a candidate as a model folder, and return {"bytes": of its weights, "undo_bytes"}.

    adapted: the adapter's modules by name. source: the folder of the base, for its tokenizer. record: for lorafit.json
    and the card. undo: keep what undoes the merge; a model that is quantized again cannot be undone.
    """
    with drafted(out) as draft:
        undoer = UndoWriter(candidate, adapted, draft) if undo and candidate.name != REQUANTIZED else None
        size = write_shards(draft, candidate.tensors, max_shard_bytes, undoer.see if undoer is not None else None)
        written = {"bytes": size, "undo_bytes": undoer.write() if undoer is not None else 0}
        _write_config(candidate.config, draft)
        copy_tokenizer(source, draft)
        full = {**record, "candidate": candidate.name, "untied": candidate.untied, "added": candidate.added, **written}
        write_json(draft / RECORD, full)
        card = merged_card(full).encode()
        write_atomically(draft / CARD, lambda file: file.write(card))
    return written


def _write_config(config: Any, folder: Path) -> None:
    config.save_pretrained(folder)


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    """Copy the files that turn text into tokens and back, and how the base was to generate."""
    for pattern in COPIED if source is not None else ():
        assert source is not None
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.suffix not in NEVER:
                target = folder / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def merged_card(record: Mapping[str, Any]) -> str:
    """The README.md of a merged model."""
    how = {
        "original": "added to the base's own weights and rounded once",
        "dequantized": "added to the weights of the quantized base as they were computed with, and rounded once",
        "requantized": "added to the dequantized weights of the base, which were then quantized again",
    }[record["candidate"]]
    base = record.get("base_model")
    lines = ["---", f"base_model: {base}", "library_name: transformers", "tags: [lora, lorafit]", "---", ""]
    lines += [f"# {base} with a LoRA adapter merged in", "", f"The adapter was {how}."]
    numbers = record.get("measured") or {}
    if numbers:
        lines += [
            "",
            f"Against the live adapter, on {record.get('tokens'):,} held-out tokens: KL divergence "
            f"{numbers['kl']:.3g} nats per token, the same first choice at "
            f"{numbers['top1_agreement']:.2%} of them, loss {numbers['loss']:.4f} "
            f"where the live adapter has {record['live']['loss']:.4f}.",
        ]
    if trained_over := record.get("trained_over"):
        lines += [
            "",
            f"The adapter was trained over {trained_over['quant']} and is measured over {trained_over['now']}.",
        ]
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
        "```",
        "",
        f"What was merged into what is in `{RECORD}`.",
        "",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ and back


def unmerge_folder(merged: Path, adapter: Path, adapter_sha256: str, out: Path, max_shard_bytes: int) -> dict[str, Any]:
    """Write the model that `adapter` was merged into to make the folder `merged`, bit for bit.

    Returns {"bytes": of its weights, "candidate", "base_model", "is": what they are, in words}.

    Raises InputError for a folder that cannot be undone or another adapter, and where a hash is not the one noted.
    """
    if not merged.is_dir():
        raise InputError(f"merge.unmerge: no folder {str(merged)!r}")
    require_own_files(merged)
    record = read_record(merged)
    contents, notes = read_undo(merged)
    if record.get("adapter_sha256") != adapter_sha256:
        raise InputError(
            f"adapter {str(adapter)!r} is not the one in {str(merged)!r}, which was merged from "
            f"{record.get('merged_from')!r}: give that one as adapter=DIR"
        )
    weights = _merged_weights(merged, notes)
    try:
        config = load_config(str(merged))
        model = skeleton(config, None)
    except Exception as error:  # transformers raises what it happens to meet in a damaged configuration
        raise InputError(f"{str(merged / 'config.json')!r} describes no model: {reason(error)}") from error
    lend_weights(model, weights)
    load_adapter(model, adapter, allow_other_base=True)
    adapted = adapter_modules(model)
    config = copy.deepcopy(config)
    added = record.get("added") or []
    if not isinstance(added, list) or not {str(name) for name in added} <= weights.keys():
        raise InputError(f"{str(merged / RECORD)!r}: added names tensors that the model has not: {added!r}")
    if record.get("untied"):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = True

    def back(name: str) -> Planned:
        def make() -> Any:
            content = contents[name].make() if name in contents else None
            return restore(name, weights[name].make(), adapter_of(adapted, name), content, notes[name])

        return Planned(weights[name].dtype, weights[name].shape, make)

    dropped = added if record.get("untied") else []
    for name in dropped:
        back(name).make()  # not written, and checked as all others are
    tensors = {name: back(name) for name in weights if name not in dropped}
    with drafted(out) as draft:
        size = write_shards(draft, tensors, max_shard_bytes)
        _write_config(config, draft)
        copy_tokenizer(merged, draft)
        card = _unmerged_card(record).encode()
        write_atomically(draft / CARD, lambda file: file.write(card))
    told = {key: record.get(key) for key in ("candidate", "base_model")}
    return {"bytes": size, **told, "is": what_comes_back(record)}


def what_comes_back(record: Mapping[str, Any]) -> str:
    """What the weights are that a merge with this lorafit.json is undone to."""
    base = record.get("base_model")
    if record.get("candidate") != DEQUANTIZED:
        return f"the weights of the checkpoint {base}"
    who = "the merge" if "trained_over" in record else "training"
    kind = _kind(record.get("quant"))
    return f"the base as {who} held it ({kind}, dequantized and rounded to 16 bits), not the checkpoint {base}"


def _kind(quant: Any) -> str:
    return str(quant.get("type")) if isinstance(quant, Mapping) else "none"


def _unmerged_card(record: Mapping[str, Any]) -> str:
    base = record.get("base_model")
    lines = ["---", f"base_model: {base}", "library_name: transformers", "---", ""]
    lines += [f"# {base} with a LoRA adapter taken out again", ""]
    lines += [f"These are, bit for bit, {what_comes_back(record)}.", ""]
    return "\n".join(lines)


def _merged_weights(merged: Path, notes: Mapping[str, Any]) -> FileWeights:
    """The tensors of a merged folder, which are those that its undo file has a hash of; InputError otherwise."""
    if not any((merged / file).is_file() for file in (INDEX, "model.safetensors")):
        raise InputError(f"merged folder {str(merged)!r} has neither model.safetensors nor {INDEX}")
    weights = FileWeights(merged)
    if strange := sorted(weights.keys() ^ notes.keys()):
        there = "has no hash in" if strange[0] in weights else "is missing, and is in"
        raise InputError(f"merged folder {str(merged)!r} is not as it was written: {strange[0]} {there} {UNDO}")
    return weights
