"""The base that an adapter is merged into: opened so that it is never whole in memory, where that can be done rightly.

    base = open_base(name, quant=…, whole=lambda: load_base_model(…), original=…)

The short way takes a model folder as it lies on the disk. 16-bit weights stay there and are lent to the model (see
skeleton.py); a quantized base is quantized layer by layer as it is read. It is taken only where the names in the files
are those of the model, and nothing is rewritten on the way in: `why_whole` says what speaks against it. Everything else
is loaded whole, with the same numbers and more memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from lorafit.errors import InputError
from lorafit.fingerprint import fingerprint_of
from lorafit.loading import input_errors, load_config, resolve
from lorafit.merging.skeleton import (
    aliases,
    as_dtype,
    lend_weights,
    only_multiplies,
    place_of,
    skeleton,
)
from lorafit.quant import BaseReport, Quantization, filled, is_quantized, quantize_model, quantized_layer, to_dtype
from lorafit.weights import INDEX, FileWeights, Planned, Weights, give_memory_back, indexed_files


@dataclass
class Base:
    """What a merge begins with. model: the base as it computes, to be adapted. originals: its weights in 16 or 32 bits
    by the model's names, None where a checkpoint came quantized. whole: why the model is whole in memory, or None.
    renamed: (a tensor's name in the files, one in the model that the files have not), where transformers renames."""

    model: Any
    config: Any
    originals: Weights | None
    tied: dict[str, str]
    folder: Path | None
    whole: str | None
    attention: str | None = None
    trust_remote_code: bool = False
    renamed: tuple[str, str] | None = None

    def skeleton(self, config: Any, dtype: torch.dtype | None) -> Any:
        """Another model of this kind, without weights."""
        return skeleton(config, dtype, attention=self.attention, trust_remote_code=self.trust_remote_code)


def open_base(
    name: str,
    *,
    load_whole: Callable[[bool], Any],
    quant: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    init: str = "pretrained",
    attention: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Base:
    """Open a base model for merging. load_whole: loads it into memory, given whether quantized as `quant` says or in
    its own 16 bits; called where the short way does not do. The other arguments are those of `load_base_model`."""
    quant = Quantization.of(quant)
    config = load_config(name, trust_remote_code=trust_remote_code, revision=revision)
    folder = model_folder(name, revision)
    prequantized = getattr(config, "quantization_config", None) is not None
    with input_errors(name):
        why, files = why_whole(config, folder, init, trust_remote_code)
    if why is None and device != "cpu":
        why = f"it computes on {device}"
    if why is None:
        assert files is not None
        give_memory_back()
        wanted = to_dtype(dtype) or (quant.compute_dtype if quant is not None else None) or _own_dtype(config, files)
        model = skeleton(config, wanted, attention=attention)
        tied = aliases(model)
        report = BaseReport(name=str(name), quant=quant)
        report.fingerprint = fingerprint_of(_sampled(model, files, tied, wanted))
        if quant is not None:
            recipe, read = quant, _reader(files, tied, wanted)

            def layer_of(name: str, linear: nn.Module) -> nn.Module | str:
                layer = filled(linear, lambda leaf: read(f"{name}.{leaf}"))
                return quantized_layer(layer, recipe, torch.device("cpu"))

            quantize_model(model, quant, torch.device("cpu"), report, layer_of)
        lend_weights(model, files, wanted)
        model.lorafit_base = report
        return Base(model.train(), config, files, tied, folder, None, attention)
    model = load_whole(True)
    bare = skeleton(_unquantized(config), None, attention=attention, trust_remote_code=trust_remote_code)
    tied, names = aliases(bare), list(bare.state_dict())
    originals: Weights | None = None
    if not prequantized:
        if files is not None:
            originals = files
        elif quant is None and to_dtype(dtype) is None:
            originals = tensors_of(model, names, tied)
        else:
            originals = tensors_of(load_whole(False), names, tied)
    renamed = _renamed(folder, names, tied) if folder is not None and init == "pretrained" and files is None else None
    return Base(model, _unquantized(config), originals, tied, folder, why, attention, trust_remote_code, renamed)


def why_whole(
    config: Any, folder: Path | None, init: str, trust_remote_code: bool
) -> tuple[str | None, FileWeights | None]:
    """(what speaks against reading the model piece by piece, or None; its files, where their names are the model's)."""
    if init != "pretrained":
        return "model.init=random reads no files", None
    if trust_remote_code:
        return "it runs code of its own", None
    if getattr(config, "quantization_config", None) is not None:
        return "it comes quantized", None
    if folder is None:
        return "its files are not at hand", None
    files = FileWeights(folder)
    model = skeleton(config, None)
    tied = aliases(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    strange = [name for name in files if name not in wanted or files[name].shape != wanted[name]]
    missing = [name for name in wanted if place_of(files, name, tied) is None]
    if strange or missing:
        return f"its files call things otherwise than the model does: {(strange or missing)[0]}", None
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        return "it keeps parts in float32", files
    owners = ((model.get_submodule(name.rpartition(".")[0]), tensor) for name, tensor in model.named_parameters())
    if not only_multiplies(model) or any(p.dim() > 2 and not isinstance(owner, nn.Conv1d) for owner, p in owners):
        return "it has layers that do more than multiply", files
    return None, files


def model_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder in which the files of a model lie, or None when no file of weights is found."""
    folder = Path(resolve(name)).expanduser()
    if folder.is_dir():
        return folder if any(folder.glob("*.safetensors")) else None
    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    options["_raise_exceptions_for_connection_errors"] = False
    for file in ("model.safetensors", INDEX):
        path = cached_file(name, file, **options)
        if path is not None:
            found = Path(path).parent
            for shard in indexed_files(found) if file == INDEX else ():
                cached_file(name, shard, revision=revision)
            return found
    return None


def _renamed(folder: Path, names: list[str], tied: dict[str, str]) -> tuple[str, str] | None:
    """(a name in the files that the model has not, a name in the model that the files have not), where there are."""
    try:
        files = FileWeights(folder)
    except InputError:  # transformers, which has loaded it, knows more kinds of files
        return None
    theirs = next((name for name in files if name not in names), None)
    ours = next((name for name in names if place_of(files, name, tied) is None), None)
    return (theirs, ours) if theirs is not None and ours is not None else None


def tensors_of(model: Any, names: list[str], tied: dict[str, str]) -> Weights:
    """The tensors of a model in memory that carries no adapter, by their names; each once."""
    state = model.state_dict()
    found = {}
    for name in names:
        if name in state and name not in tied:
            found[name] = there(state[name])
    return found


def there(tensor: Tensor) -> Planned:
    """A tensor that is in memory already."""
    return Planned(tensor.dtype, tuple(tensor.shape), lambda: tensor.detach())


def _unquantized(config: Any) -> Any:
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def _own_dtype(config: Any, files: FileWeights) -> torch.dtype:
    """The dtype that transformers takes where none is asked for: the configuration's, or that of the first weight."""
    own = getattr(config, "dtype", None)
    first = next((planned.dtype for planned in files.values() if planned.dtype.is_floating_point), torch.float32)
    return own or first


class _Sampled:
    """As much of a tensor as a fingerprint looks at; the tensor is read only while it is looked at."""

    device = torch.device("cpu")

    def __init__(self, planned: Planned) -> None:
        self.planned, self.shape = planned, planned.shape

    def detach(self) -> _Sampled:
        return self

    flatten = detach

    def numel(self) -> int:
        return self.shape.numel() if isinstance(self.shape, torch.Size) else torch.Size(self.shape).numel()

    def __getitem__(self, places: Tensor) -> Tensor:
        return self.planned.make().flatten()[places]


def _sampled(model: nn.Module, files: Weights, tied: dict[str, str], dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    for name, _ in model.named_parameters():
        place = place_of(files, name, tied)
        assert place is not None
        yield name, _Sampled(as_dtype(files[place], dtype))


def _reader(files: Weights, tied: dict[str, str], dtype: torch.dtype) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        place = place_of(files, name, tied)
        if place is None:
            raise InputError(f"the model's files lack {name}")
        return as_dtype(files[place], dtype).make()

    return read


def stored(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight [out, in] as its layer keeps it: transposed in GPT-2's Conv1D, also where it was one before."""
    kind = getattr(module, "source_cls", None) if is_quantized(module) else type(module)
    return weight.T if kind is Conv1D else weight
