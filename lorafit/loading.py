"""The base: load a language model, frozen, with its linear weights in 16, 8 or 4 bits.

    model = load_base_model("embedded", quant="nf4")

transformers knows which files a model has, what their tensors are called in it, and what else belongs to a model; it
does all of that here as well, so that what comes out is what `from_pretrained` gives. Only the reading is ours: when
it asks for the matrices of a model that is to be quantized it is given placeholders, and each linear layer is
quantized as its weight is read, so that the 16-bit model is never whole in memory. It is where that cannot be done
rightly, with the same numbers, and the report says why.

The quantized layers can be kept on the disk (copies.py), and are read from there when the same is asked for again.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from lorafit.copies import Entry, entry_of, open_copy, write_copy
from lorafit.embedded import MODEL as EMBEDDED_MODEL
from lorafit.errors import InputError, reason
from lorafit.files import require_own_files
from lorafit.fingerprint import Fingerprint, fingerprint_of
from lorafit.quant import (
    BaseReport,
    Quantization,
    disarm_repacking,
    filled,
    head_names,
    linear_layers,
    note_quantized,
    quantize_model,
    quantized_layer,
    release_shared,
    to_dtype,
)
from lorafit.weights import INDEX, Ahead, FileWeights, Planned, indexed_files

_MOST_LAYERS = 10_000
_LARGEST_CONFIG = 32 * 2**20  # bytes; those of real models are a few thousand
_MAPPED = 2**20  # bytes from which on a tensor that stays in 16 bits is a view of its file


def resolve(name: str) -> str:
    """The hub id or folder behind a model name; "embedded" is the model inside the package.

    Whoever opens a model asks here first: a folder may be a stranger's. Raises InputError for one with something in it
    that must not be opened: a pipe, a link to elsewhere, settings of an absurd size.
    """
    if name == "embedded":
        return str(EMBEDDED_MODEL)
    folder = os.path.expanduser(str(name))
    if os.path.isdir(folder):
        require_own_files(folder)
        for path in Path(folder).glob("*config.json"):
            if path.stat().st_size > _LARGEST_CONFIG:
                raise InputError(f"{str(path)!r}: {path.stat().st_size:,} bytes are too many for settings")
        if (Path(folder) / INDEX).is_file():
            indexed_files(Path(folder))  # transformers would follow it out of the folder
        config = Path(folder) / "config.json"
        if config.is_file():
            _require_layers(config)
            if (Path(folder) / "adapter_config.json").is_file():  # transformers would put it on, and say nothing
                raise InputError(
                    f"model folder {name!r} holds an adapter as well (adapter_config.json): put it into a folder of "
                    "its own"
                )
    return str(name)


def load_base_model(
    name: str,
    *,
    quant: Quantization | Mapping[str, Any] | str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    init: str = "pretrained",
    attention: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    cache: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, frozen, its linear layers quantized as asked.

    name: a hub id, a local folder or "embedded". quant: "nf4", "fp4", "int8", a mapping or `Quantization`, or
    None for 16 bits. dtype: of what is not quantized; None means the checkpoint's own, or the compute dtype of
    a quantized base. init: "random" builds from the configuration alone and reads no weights. cache: keep what was
    quantized on the disk, unless the model is small, and read it from there the next time.
    What was quantized and what was not is in `base_report(model)`.
    Raises InputError when the model, its weights or a choice cannot be had.
    """
    quant = Quantization.of(quant)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = resolve(name)
    wanted = to_dtype(dtype)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    with input_errors(name):
        config = load_config(name, **options)
        if attention not in (None, "auto"):
            options["attn_implementation"] = attention
        prequantized = getattr(config, "quantization_config", None) is not None
        if prequantized and quant is not None:
            raise InputError(
                f"model {name!r} comes quantized already: choose quant=none to use it as it is, "
                f"or the 16-bit model for quant={quant.type}"
            )
        if wanted is None and quant is not None:
            wanted = quant.compute_dtype
        files = _Files(wait=quant is not None)
        if init == "random":
            files.whole = "model.init=random reads no files"
            wanted = wanted or getattr(config, "dtype", None) or torch.float32
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, **options)
        elif init == "pretrained":
            _require_weights(name, source)
            if trust_remote_code:
                files.whole = "it may run code of its own"
            with contextlib.nullcontext() if prequantized or trust_remote_code else _reading(files):
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    source,
                    dtype=wanted or "auto",
                    use_safetensors=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are an error below, with names
                    **({"device_map": {"": str(device)}} if prequantized else {}),
                    **options,
                )
            model, info = loaded
            missing = sorted(info["missing_keys"]) + sorted(str(item) for item in info["mismatched_keys"])
            if missing:
                raise InputError(
                    f"model {name!r}: {len(missing)} weights are missing from its files or have another shape, "
                    f"and would be random: {', '.join(missing[:3])}"
                )
        else:
            raise InputError(f"model.init must be pretrained or random, got {init!r}")
        model.requires_grad_(False)
        report = BaseReport(name=str(name), quant=quant, whole=files.whole if quant is not None else None)
        # codes of a model that was quantized elsewhere say nothing of its 16-bit weights, and float16 rounds otherwise
        told = not prequantized and (model.dtype != torch.float16 or getattr(config, "dtype", None) == torch.float16)
        told = told and not any(parameter.is_meta for parameter in model.parameters())
        names = [name for name, _ in model.named_parameters()] if told else []
        if prequantized:
            note_quantized(model, report)
        if quant is not None:
            entry = entry_of(files.paths, model, quant, device) if cache and files.paths else None
            _quantize(model, files, quant, device, report, names, entry)
        else:
            files.fill(model)
            if told:
                report.fingerprint = fingerprint_of(model.named_parameters())
    model.to(device)
    disarm_repacking(model)
    model.config.use_cache = False  # packed examples would see each other through the cache
    model.lorafit_base = report
    return model.train()


def _quantize(
    model: Any,
    files: _Files,
    quant: Quantization,
    device: torch.device,
    report: BaseReport,
    names: list[str],
    entry: Entry | None,
) -> None:
    """Quantize a model whose matrices may still be in its files, or read its quantized layers from their entry; read
    what is left. names: of the parameters that the fingerprint is taken of; none where there is no fingerprint."""
    fingerprint = Fingerprint()
    with open_copy(entry) as copy, _reader(model, files, idle=copy is not None) as read:

        def layer_of(name: str, linear: nn.Module) -> nn.Module | str:
            found = copy.layer(name, linear) if copy is not None else None
            if found is not None:
                return found

            def read_leaf(leaf: str) -> Tensor:
                tensor = read(linear._parameters[leaf])
                fingerprint.see(f"{name}.{leaf}", tensor)
                return tensor

            return quantized_layer(filled(linear, read_leaf), quant, device)

        quantize_model(model, quant, device, report, layer_of)
    files.fill(model)
    release_shared()
    if copy is not None:
        report.fingerprint, report.copy = copy.fingerprint, str(copy.entry.folder) if copy.sound else None
    elif names:
        for name in names:
            if name not in fingerprint:
                fingerprint.see(name, model.get_parameter(name))
        report.fingerprint = fingerprint.hexdigest(names)
    if entry is not None and (copy is None or not copy.sound):
        write_copy(entry, model, report)


# ------------------------------------------------------------------------------------------------ reading


class _Files:
    """The files of a model while transformers loads it. wait: whether its matrices are to wait, as placeholders, until
    they are read. whole: why they could not."""

    def __init__(self, wait: bool) -> None:
        self.wait = wait
        self.whole: str | None = None
        self.paths: list[Path] = []
        self._weights = FileWeights(())
        self._waiting: dict[int, tuple[Tensor, str, torch.dtype]] = {}

    def state_dict(self, paths: list[str] | None, load_config: Any) -> dict[str, Any] | None:
        """What transformers is to load from, by the names in the files; None to leave the reading to it."""
        self.paths = [Path(path) for path in paths or ()]
        try:
            self._weights = FileWeights(self.paths)
        except InputError:  # it says what is wrong, or can read what we cannot
            self.whole = "its files are not such as can be read piece by piece"
            return None
        # conversions that do more than rename would compute with the placeholders
        if any(hasattr(each, "operations") for each in load_config.weight_mapping or ()):
            self.wait, self.whole = False, "its files hold weights that are put together as they are loaded"
        return {name: _Slice(self, name, planned) for name, planned in self._weights.items()}

    def placeholder(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of the shape and dtype of a matrix that takes no memory, and is NaN throughout."""
        nothing = torch.full((1,), torch.nan, dtype=dtype)
        self._waiting[nothing.data_ptr()] = (nothing, name, dtype)
        return nothing.expand(self._weights[name].shape)

    def waiting(self, tensor: Tensor) -> tuple[Planned, torch.dtype] | None:
        """What a placeholder stands for, and as which dtype; None for any other tensor."""
        if tensor.is_meta or tensor.data_ptr() not in self._waiting:
            return None
        _, name, dtype = self._waiting[tensor.data_ptr()]
        return self._weights[name], dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor that stays as it is: small ones are read, and the others are views of their file."""
        planned = self._weights[name]
        return self._weights.mapped(name) if planned.nbytes >= _MAPPED else planned.make()

    def read(self, tensor: Tensor) -> Tensor:
        """What a placeholder stands for; any other tensor itself."""
        found = self.waiting(tensor)
        return tensor.detach() if found is None else found[0].make().to(found[1])

    def fill(self, model: nn.Module) -> None:
        """Put what they stand for in the place of all placeholders."""
        for tensor in (*model.parameters(), *model.buffers()):
            if self.waiting(tensor) is not None:
                _, name, dtype = self._waiting[tensor.data_ptr()]
                tensor.data = self.tensor(name).to(dtype)


class _Slice:
    """A tensor in a file, as transformers takes it: all of it by `[...]`, and then `to` a dtype."""

    def __init__(self, files: _Files, name: str, planned: Planned) -> None:
        self._files, self._name, self._planned = files, name, planned

    def __getitem__(self, where: Any) -> Any:
        planned = self._planned
        matrix = len(planned.shape) == 2 and planned.nbytes and planned.dtype.is_floating_point
        return self if self._files.wait and matrix and where is ... else self._files.tensor(self._name)[where]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return self._files.placeholder(self._name, dtype or self._planned.dtype)


_reading_lock = threading.Lock()


@contextlib.contextmanager
def _reading(files: _Files) -> Iterator[None]:
    """Within the context transformers loads from `files.state_dict`.

    `from_pretrained` takes a `state_dict` only in place of a name, and then knows neither where the files are nor what
    else lies beside them. So its method that turns one into the other is given ours.
    """
    theirs = getattr(PreTrainedModel, "_load_pretrained_model", None)
    wanted = {"state_dict", "checkpoint_files", "load_config"}
    if theirs is None or not wanted <= inspect.signature(theirs).parameters.keys():
        files.whole = "this version of transformers loads in a way that lorafit does not know"
        yield
        return
    thread = threading.get_ident()

    def load(*args: Any, **options: Any) -> Any:
        call = inspect.signature(theirs).bind(*args, **options)
        if threading.get_ident() == thread and call.arguments["state_dict"] is None:
            paths, load_config = call.arguments["checkpoint_files"], call.arguments["load_config"]
            call.arguments["state_dict"] = files.state_dict(paths, load_config)
        return theirs(*call.args, **call.kwargs)

    with _reading_lock, _replaced(PreTrainedModel, "_load_pretrained_model", staticmethod(load)):
        yield


@contextlib.contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _reader(model: nn.Module, files: _Files, idle: bool) -> Iterator[Callable[[Any], Tensor]]:
    """A function that reads what a parameter stands for, into memory that is valid until the next but one. The weights
    of linear layers are read ahead in their order; idle: unless it seems that none will be asked for."""
    head, slots = head_names(model), [torch.empty(0, dtype=torch.uint8)] * 2
    jobs: dict[int, Callable[[int], Tensor]] = {}

    def job(planned: Planned, dtype: torch.dtype) -> Callable[[int], Tensor]:
        def read(slot: int) -> Tensor:
            if slots[slot].numel() < planned.nbytes:
                slots[slot] = torch.empty(planned.nbytes, dtype=torch.uint8)
            memory = slots[slot][: planned.nbytes]
            assert planned.read_into is not None
            planned.read_into(memory)
            return memory.view(planned.dtype).view(planned.shape).to(dtype)

        return read

    for name, linear in () if idle else linear_layers(model).items():
        found = files.waiting(linear.weight)  # type: ignore[arg-type]
        if found is not None and name not in head:
            jobs[linear.weight.data_ptr()] = job(*found)  # type: ignore[operator]
    with Ahead(jobs.items()) as ahead:

        def read(parameter: Tensor) -> Tensor:
            found = ahead.get(parameter.data_ptr())
            return files.read(parameter) if found is None else found

        yield read


# ------------------------------------------------------------------------------------------------ what may go wrong


def load_config(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The configuration of a model. Raises InputError where there is none, and where it asks for code to be fetched."""
    options = {"revision": revision} if revision is not None else {}
    with input_errors(name):
        try:
            config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=trust_remote_code, **options)
        except (OSError, ValueError, KeyError, ImportError):
            raise
        except Exception as error:  # whatever transformers meets in a configuration that is none
            raise InputError(f"model {name!r}: its config.json describes no model: {reason(error)}") from error
    for part in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))):
        kernel = getattr(part, "_attn_implementation", None)
        if isinstance(kernel, str) and "/" in kernel and not trust_remote_code:
            raise InputError(
                f"model {name!r}: its config.json asks for the kernel {kernel!r}, which is code of the hub: where you "
                "trust it, give model.trust_remote_code=true"
            )
    return config


def _require_layers(path: Path) -> None:
    """Raise InputError for a config.json of more layers than there is time to build."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # transformers says it
        return
    parts = [found, *found.values()] if isinstance(found, dict) else []
    for key, value in (item for part in parts if isinstance(part, dict) for item in part.items()):
        if "layer" in key and isinstance(value, int) and value > _MOST_LAYERS:
            raise InputError(f"{str(path)!r}: {key} is {value:,}, and no model has more than {_MOST_LAYERS:,}")


def _require_weights(name: str, source: str) -> None:
    folder = Path(source).expanduser()
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
        found = f"; it holds {others[0]}, which lorafit does not open (pickle)" if others else ""
        raise InputError(
            f"model folder {name!r} has no *.safetensors weights{found}. "
            "Save the model with save_pretrained, or use model.init=random to begin from its configuration."
        )


@contextlib.contextmanager
def input_errors(name: str) -> Iterator[None]:
    """Turn what transformers says about a model that is not there, or is none, into one message of ours."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, RecursionError) as error:
        folder = Path(resolve(name)).expanduser()
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise InputError(f"model folder {name!r} has no config.json: it is no model folder") from error
        raise InputError(f"model {name!r} cannot be loaded: {reason(error)}") from error
    except (RuntimeError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
        # a fault of ours, unless no model can be built by that configuration
        if isinstance(error, torch.OutOfMemoryError) or (said := _fault_of_config(name)) is None:
            raise
        raise InputError(f"model {name!r}: its config.json describes no model: {said}") from error


def _fault_of_config(name: str) -> str | None:
    """Why no model can be built by a folder's configuration; None where one can."""
    if not Path(resolve(name)).expanduser().is_dir():
        return None
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve(name)))
    except Exception as error:
        return reason(error)
    return None
