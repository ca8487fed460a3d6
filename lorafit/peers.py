"""How each system makes one training step of LoRA, on the same weights, the same batch and the same A and B.

A system is built by a function of its own into a `Trainee`: a model, its A and B by their names in the base, and one
step. What a system does inside its step is its own affair, as its users get it; what is put in and what
has to come out is the same for all, and is compared (`reference`, `gradient_errors`) before any time is taken:

    lorafit    FinetuneModule, supervised_loss; its own recomputing, compiled or not
    peft       get_peft_model over transformers, the model's own loss; A and B in float32 (its default) or bfloat16
    trl        SFTTrainer.training_step, called by hand
    litgpt     its own GPT class, its chunked head; 16 bits alone
    unsloth    FastLanguageModel; on CUDA alone, in a process of its own, since it rewrites the others' classes

Whether a step recomputes its blocks is counted in the step (`recomputed_share`), not read off a flag: a flag that says
"on" while nothing is recomputed has spoiled such measurements before. The peers are imported only where they are used.
"""

from __future__ import annotations

import importlib.util
import math
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorafit.errors import InputError
from lorafit.quant import Quantization, dequantize, features, head_names, linear_layers, transformers_quantization

SYSTEMS = ("lorafit", "peft", "trl", "litgpt", "unsloth", "transformers")
LEARNING_RATE = 1e-4
RECIPE = Quantization()  # NF4, blocks of 64, double quantization, products in bfloat16: the QLoRA paper's, for all

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One system in one setting. adapters: the dtype of A and B. compile: of lorafit's elementwise parts."""

    system: str
    label: str
    quant: bool = False
    checkpointing: str = "none"
    compile: str = "off"
    adapters: str = "float32"
    part: str = "step"  # or "head": the output head and the loss alone
    rank: int = 16
    alpha: float = 32.0


@dataclass(frozen=True)
class Source:
    """Where the weights come from: a model folder, or a configuration whose weights are drawn on the device."""

    folder: str | None = None
    config: Mapping[str, Any] | None = None
    seed: int = 0

    def model_config(self) -> Any:
        from transformers import AutoConfig, LlamaConfig

        if self.folder is not None:
            return AutoConfig.from_pretrained(self.folder)
        assert self.config is not None
        return LlamaConfig(**self.config)


@dataclass(frozen=True)
class Part:
    """A trained matrix: a parameter, or some of its rows where a system keeps several matrices in one."""

    parameter: nn.Parameter
    rows: slice = field(default_factory=lambda: slice(None))

    def fill(self, values: Tensor) -> None:
        with torch.no_grad():
            self.parameter[self.rows].copy_(values)

    def gradient(self) -> Tensor:
        """float32, on the CPU; zeros where none has been computed."""
        gradient = self.parameter.grad
        own = torch.zeros_like(self.parameter) if gradient is None else gradient
        return own[self.rows].detach().float().cpu().clone()


@dataclass
class Trainee:
    """A model that is ready to be trained. parts: NAME.lora_A and NAME.lora_B, NAME being the layer's in the base.
    backward(batch): the mean loss over the supervised tokens, with its gradients left in the parameters."""

    parts: dict[str, Part]
    backward: Callable[[Batch], Tensor]

    def __post_init__(self) -> None:
        parameters = {id(part.parameter): part.parameter for part in self.parts.values()}
        self.parameters = list(parameters.values())
        # the head alone trains nothing: what flows into the blocks is its result
        self.optimizer = None if "hidden" in self.parts else torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)

    def step(self, batch: Batch) -> None:
        """A whole training step: loss, gradients, optimizer."""
        self.backward(batch)
        if self.optimizer is not None:
            self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def installed(system: str) -> bool:
    """Whether a system can be imported here, as far as can be told without importing it."""
    return importlib.util.find_spec(system) is not None


def build(case: Case, source: Source, batch: Batch) -> Trainee:
    """The trainee of a case, its A and B filled by `fill`. Raises whatever the system raises."""
    if case.part == "head":
        return _HEADS[case.system](case, source, batch)
    trainee = _BUILDERS[case.system](case, source, batch["input_ids"].device)
    fill(trainee.parts, source.seed)
    return trainee


def fill(parts: Mapping[str, Part], seed: int) -> None:
    """The same A and B for every system, by name. B is not zero, as it is before training: else A had no gradient."""
    for name, part in parts.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        shape = part.parameter[part.rows].shape
        if name.endswith("lora_A"):
            values = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[-1])
        else:
            values = torch.randn(shape, generator=generator) * (0.02 if name.endswith("lora_B") else 1.0)
        part.fill(values)


def make_batch(vocabulary: int, rows: int, length: int, masked: float, seed: int, device: torch.device) -> Batch:
    """Random tokens {"input_ids", "labels"} [rows, length]; of each row the first share `masked` is not trained."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : round(masked * length)] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def supervised(batch: Batch) -> int:
    """The tokens whose loss counts: the first of a row is predicted by nothing."""
    return int((batch["labels"][:, 1:] != -100).sum())


# ------------------------------------------------------------------------------------------------ the model


def load_transformers(source: Source, quant: bool, device: torch.device) -> Any:
    """The base as transformers loads it, in bfloat16 or NF4, frozen and in training mode."""
    if source.folder is None:
        return random_model(source, quant, device)
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if quant:
        from transformers import BitsAndBytesConfig

        recipe = transformers_quantization(RECIPE, [])
        options["quantization_config"] = BitsAndBytesConfig(
            **{key: value for key, value in recipe.items() if key.startswith(("load_in_4bit", "bnb_4bit"))}
        )
    model = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=torch.bfloat16, device_map={"": str(device)}, **options
    )
    model.config.use_cache = False
    # in evaluation mode bitsandbytes 0.50 would repack the weights of a CPU, wrongly
    return model.requires_grad_(False).train()


def random_model(source: Source, quant: bool, device: torch.device) -> Any:
    """A model of drawn weights, made on the device layer by layer: it is never whole in 16 bits when quant is set, so
    that 70B parameters fit where their 4 bits do. The same weights for the same seed and device, quantized or not."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from lorafit.quant import BaseReport, quantize_model

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(source.model_config(), dtype=torch.bfloat16)

    def drawn(name: str, parameter: Tensor) -> nn.Parameter:
        values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if parameter.dim() > 1:
            seed = zlib.crc32(f"{source.seed} {name}".encode())
            values.normal_(0.0, 0.02, generator=torch.Generator(device).manual_seed(seed))
        else:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        return nn.Parameter(values, requires_grad=False)

    quantized = linear_layers(model).keys() - head_names(model) if quant else set()
    for name, module in list(model.named_modules()):
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[leaf] = drawn(f"{name}.{leaf}", parameter)
        if name in quantized:
            one = nn.ModuleDict({"layer": module})
            quantize_model(one, RECIPE, device, BaseReport("random", RECIPE))
            model.set_submodule(name, one["layer"])
    model.is_loaded_in_4bit = quant  # how peft tells which layers it has before it
    model.to(device)
    model.config.use_cache = False
    return model.train()


# ------------------------------------------------------------------------------------------------ the systems


def _named_parts(model: nn.Module) -> dict[str, Part]:
    """A and B by the layer's name in the base, as lorafit, peft and the reference below name them."""
    parts = {}
    for name, parameter in model.named_parameters():
        if found := re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.default)?\.weight", name):
            parts[f"{found[1]}.{found[2]}"] = Part(parameter)
    return parts


def _build_lorafit(case: Case, source: Source, device: torch.device) -> Trainee:
    from lorafit.loss import supervised_loss
    from lorafit.module import FinetuneModule

    in_memory = source.folder is None
    module = FinetuneModule(
        random_model(source, case.quant, device) if in_memory else source.folder,  # type: ignore[arg-type]
        rank=case.rank,
        alpha=case.alpha,
        quant=RECIPE.as_dict() if case.quant and not in_memory else None,
        dtype="bfloat16",
        device=str(device),
        checkpointing=case.checkpointing,
        fused="auto",
        compile=case.compile,
    )
    module.configure_model()
    model = module.model
    assert model is not None
    parameters = module.trainable_parameters()

    def backward(batch: Batch) -> Tensor:
        loss, tokens = supervised_loss(model, batch, module.ops)
        loss.backward()
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], tokens.float())
        return loss.detach() / tokens

    return Trainee(_named_parts(model), backward)


def _lora_config(case: Case) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=case.rank,
        lora_alpha=case.alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _build_peft(case: Case, source: Source, device: torch.device) -> Trainee:
    """Without `prepare_model_for_kbit_training`, which holds embeddings and head in float32 and was slower."""
    from peft import get_peft_model

    model = load_transformers(source, case.quant, device)
    if case.checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, _lora_config(case), autocast_adapter_dtype=case.adapters == "float32")
    parts = _named_parts(model)
    for part in parts.values():  # over a 4-bit base they are in float32 whatever the option says
        part.parameter.data = part.parameter.data.to(getattr(torch, case.adapters))

    def backward(batch: Batch) -> Tensor:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return Trainee(parts, backward)


def _plain_tokenizer() -> Any:
    """A tokenizer for those who ask for one although the batch is made of tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="</s>", pad_token="</s>")


def _build_trl(case: Case, source: Source, device: torch.device) -> Trainee:
    """The trainer as `train()` would have set it up: that is where it prepares the model and turns checkpointing on."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            use_cpu=device.type == "cpu",
            bf16=True,
            learning_rate=LEARNING_RATE,
            gradient_checkpointing=case.checkpointing == "full",
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = SFTTrainer(
            model=load_transformers(source, case.quant, device),
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": [[0, 1]], "labels": [[0, 1]]}),
            processing_class=_plain_tokenizer(),
            peft_config=_lora_config(case),
        )
    plain: Any = trainer.model
    if case.checkpointing == "full":
        plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parts = _named_parts(plain)
    model = trainer.accelerator.prepare(plain.train())

    def backward(batch: Batch) -> Tensor:
        # it takes the dictionary as its own
        inputs = dict(batch) | {"attention_mask": torch.ones_like(batch["input_ids"])}
        return trainer.training_step(model, inputs, num_items_in_batch=torch.tensor(supervised(batch), device=device))

    return Trainee(parts, backward)


def _build_litgpt(case: Case, source: Source, device: torch.device) -> Trainee:
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    base = load_transformers(source, False, device)
    hf = base.config
    if hf.model_type != "llama" or case.quant or case.checkpointing != "none":
        raise InputError(f"litgpt is compared on Llamas in 16 bits without checkpointing, got {hf.model_type}")
    head_size = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    config = Config(
        name="llama",
        block_size=hf.max_position_embeddings,
        padded_vocab_size=hf.vocab_size,
        vocab_size=hf.vocab_size,
        n_layer=hf.num_hidden_layers,
        n_head=hf.num_attention_heads,
        n_query_groups=hf.num_key_value_heads,
        n_embd=hf.hidden_size,
        head_size=head_size,
        intermediate_size=hf.intermediate_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=hf.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
        rope_base=int(hf.rope_parameters["rope_theta"]),
        lora_r=case.rank,
        lora_alpha=case.alpha,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
    )
    model = GPT(config)
    state: dict[str, Tensor] = {}
    copy_weights_hf_llama(config, {}, state, base.state_dict())
    del base
    model.load_state_dict(state, strict=False)
    del state
    model.to(device=device, dtype=torch.bfloat16).train()
    mark_only_lora_as_trainable(model)

    def backward(batch: Batch) -> Tensor:
        # as in its finetune/lora.py: the head in chunks of 128 tokens
        logits = model(batch["input_ids"], lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, batch["labels"][..., 1:])
        loss.backward()
        return loss.detach()

    return Trainee(dict(_litgpt_parts(model, case.rank)), backward)


def _litgpt_parts(model: Any, rank: int) -> Iterator[tuple[str, Part]]:
    """litgpt keeps queries, keys and values in one matrix: A has rank rows for each, B their outputs one below the
    other."""
    single = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj"}
    single["mlp.proj"] = "mlp.down_proj"
    for index, block in enumerate(model.transformer.h):
        prefix = f"model.layers.{index}"
        at = 0
        for place, (letter, size) in enumerate(zip("qkv", block.attn.qkv.qkv_shapes, strict=True)):
            name = f"{prefix}.self_attn.{letter}_proj"
            yield f"{name}.lora_A", Part(block.attn.qkv.lora_A, slice(place * rank, (place + 1) * rank))
            yield f"{name}.lora_B", Part(block.attn.qkv.lora_B, slice(at, at + size))
            at += size
        for theirs, ours in single.items():
            layer = block.get_submodule(theirs)
            yield f"{prefix}.{ours}.lora_A", Part(layer.lora_A)
            yield f"{prefix}.{ours}.lora_B", Part(layer.lora_B)


def _build_unsloth(case: Case, source: Source, device: torch.device) -> Trainee:
    """By its documentation, and not measured: it needs a GPU that the author did not have."""
    if device.type != "cuda":
        raise InputError("unsloth needs a CUDA device")
    if source.folder is None:
        raise InputError("unsloth loads a model folder: give bench.shape=FOLDER")
    from unsloth import FastLanguageModel  # before transformers, whose classes it rewrites

    model, _ = FastLanguageModel.from_pretrained(
        model_name=source.folder,
        max_seq_length=source.model_config().max_position_embeddings,
        dtype=torch.bfloat16,
        load_in_4bit=case.quant,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=case.rank,
        lora_alpha=case.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if case.checkpointing == "full" else False,
    )

    def backward(batch: Batch) -> Tensor:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return Trainee(_named_parts(model), backward)


_BUILDERS: dict[str, Callable[[Case, Source, torch.device], Trainee]] = {
    "lorafit": _build_lorafit,
    "peft": _build_peft,
    "trl": _build_trl,
    "litgpt": _build_litgpt,
    "unsloth": _build_unsloth,
}


# ------------------------------------------------------------------------------------------------ the head alone


class HeadAlone(nn.Module):
    """A causal language model whose blocks have run already: hidden states [rows, length, hidden], and the head."""

    def __init__(self, source: Source, batch: Batch, dtype: torch.dtype) -> None:
        super().__init__()
        device = batch["input_ids"].device
        self.config = source.model_config()
        vocabulary, width = self.config.vocab_size, self.config.hidden_size
        weight = torch.empty(vocabulary, width, device=device, dtype=torch.bfloat16)
        weight.normal_(0.0, 0.02, generator=torch.Generator(device).manual_seed(source.seed))
        self.lm_head = nn.Linear(width, vocabulary, bias=False, device="meta")
        self.lm_head.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        hidden = torch.zeros(*batch["input_ids"].shape, width, device=device, dtype=torch.bfloat16)
        self.hidden = nn.Parameter(hidden)
        fill({"hidden": Part(self.hidden)}, source.seed)
        self.hidden.data = self.hidden.data.to(dtype)  # the reference has what the systems have, in float32

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.hidden))


def _head_lorafit(case: Case, source: Source, batch: Batch) -> Trainee:
    from lorafit.elementwise import EAGER, require_compiled
    from lorafit.loss import supervised_loss

    model = HeadAlone(source, batch, torch.bfloat16)
    ops = require_compiled(batch["input_ids"].device) if case.compile == "on" else EAGER

    def backward(batch: Batch) -> Tensor:
        loss, tokens = supervised_loss(model, batch, ops)
        (loss / tokens).backward()
        return loss.detach() / tokens

    return Trainee({"hidden": Part(model.hidden)}, backward)


def _head_transformers(case: Case, source: Source, batch: Batch) -> Trainee:
    from transformers.loss.loss_utils import ForCausalLMLoss

    model = HeadAlone(source, batch, torch.bfloat16)

    def backward(batch: Batch) -> Tensor:
        logits = model(**batch).logits
        loss = ForCausalLMLoss(logits, batch["labels"], vocab_size=model.config.vocab_size)
        loss.backward()
        return loss.detach()

    return Trainee({"hidden": Part(model.hidden)}, backward)


_HEADS: dict[str, Callable[[Case, Source, Batch], Trainee]] = {
    "lorafit": _head_lorafit,
    "transformers": _head_transformers,
}


# ------------------------------------------------------------------------------------------------ what is right


@dataclass
class Reference:
    """The mean loss, and the gradient of every part by name, in float32."""

    loss: float
    gradients: dict[str, Tensor]


class _PlainLoRA(nn.Module):
    """W x + b + scaling · B A x in float32 and nothing else: what all systems are held against."""

    def __init__(self, linear: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        weight = dequantize(linear).float()
        bias: Any = getattr(linear, "bias", None)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        (width_in, width_out), self.scaling = features(linear), alpha / rank
        self.lora_A = nn.Linear(width_in, rank, bias=False, device=weight.device)
        self.lora_B = nn.Linear(rank, width_out, bias=False, device=weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.lora_B(self.lora_A(x)) * self.scaling  # type: ignore[arg-type]


def reference(case: Case, source: Source, batch: Batch) -> Reference:
    """Loss and gradients by plain differentiation in float32, over the weights that transformers loads: for a quantized
    base those that its 4 bits stand for, so that a fault in how lorafit quantizes would show as well."""
    device = batch["input_ids"].device
    model: Any
    if case.part == "head":
        model = HeadAlone(source, batch, torch.float32)
        parts = {"hidden": Part(model.hidden)}
    else:
        model = load_transformers(source, case.quant, device)
        head = head_names(model)
        for name, linear in linear_layers(model).items():
            if name not in head:
                model.set_submodule(name, _PlainLoRA(linear, case.rank, case.alpha))
        nn.Module.float(model)  # what a quantized model of transformers refuses, but nothing of it is quantized now
        parts = _named_parts(model)
        fill(parts, source.seed)
    logits = model(input_ids=batch["input_ids"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return Reference(loss.item(), {name: part.gradient() for name, part in parts.items()})


def gradient_errors(found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, float]:
    """|found - right| / |right| over all A together, and over all B: {"lora_A": …, "lora_B": …}.

    Apart, since the gradients of B can be so much larger that a wrong A would be lost among them. Infinite where the
    layers are not the same.
    """
    kinds = {name: name.rpartition(".")[2] for name in right}
    if found.keys() != right.keys():
        return dict.fromkeys(kinds.values(), math.inf)
    errors = {}
    for kind in dict.fromkeys(kinds.values()):
        names = [name for name in right if kinds[name] == kind]
        off = sum((found[name] - right[name]).double().square().sum().item() for name in names)
        size = sum(right[name].double().square().sum().item() for name in names)
        errors[kind] = math.sqrt(off / size) if size else math.inf
        if not math.isfinite(off):
            errors[kind] = math.inf
    return errors


class _Products(TorchDispatchMode):
    """Counts the operations of the matrix products that go through the weights of the blocks: [m, k] @ [k, n].

    Those with the vocabulary are the head's and those with the rank the adapters'; neither is what checkpointing a
    block computes again. Batched products are attention's.
    """

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self.ignored, self.flops = ignored, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for m, k, n in self._sizes(func.overloadpacket.__name__, args):
            if not self.ignored & {m, k, n}:
                self.flops += 2 * m * k * n
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _sizes(name: str, args: Any) -> Iterator[tuple[int, int, int]]:
        if name == "mm":
            yield *args[0].shape, args[1].shape[1]
        elif name in ("addmm", "addmm_"):
            yield *args[1].shape, args[2].shape[1]
        elif name in ("linear", "gemm_4bit"):  # the latter bitsandbytes' own, with the weight's shape beside it
            n, k = args[1].shape if name == "linear" else args[2]
            yield args[0].numel() // k, k, n


def recomputed_share(trainee: Trainee, batch: Batch, config: Any, rank: int) -> float:
    """The share of its blocks' forward products that one step computes a second time: about 0 without checkpointing,
    about 1 where every block runs again. Counted while a step runs; its gradients are left.

    A little below 0 is right: the input of the first block needs no gradient, so some products fall away. Of a batch of
    as few tokens as one, two or three ranks, products with the adapters cannot be told from those with the base.
    """
    kept = {config.hidden_size, config.intermediate_size, batch["input_ids"].numel()}
    thin = {rank, 2 * rank, 3 * rank, config.vocab_size} - kept
    # torch.compile gives a function up for good once it was called under such a mode: it is not asked here
    with torch.compiler.set_stance("force_eager"), _Products(thin) as products:
        trainee.backward(batch)
    forward = 2 * base_weights(config) * batch["input_ids"].numel()
    return products.flops / forward - 2


def base_weights(config: Any) -> int:
    """The weights of all linear layers in the blocks of a Llama: four of attention, three of the feed-forward part."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    attention = 2 * hidden * heads * size + 2 * hidden * keys * size
    return config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)


def adapter_weights(trainee: Trainee) -> int:
    return sum(part.parameter[part.rows].numel() for part in trainee.parts.values())


# From here on a step is checkpointed; below the lower bound it is not. In between it does some of both.
RECOMPUTES, RECOMPUTES_NOT = 0.25, 0.1


def require_checkpointing(case: Case, share: float) -> None:
    """Raise InputError where a case's step does not recompute what its checkpointing says. `selective` may recompute as
    much of a block as it likes, but not all of it."""
    if case.part == "head":
        return
    right = {
        "none": share < RECOMPUTES_NOT,
        "selective": share < 0.9,
        "full": share >= RECOMPUTES,
    }[case.checkpointing]
    if not right:
        raise InputError(
            f"{case.label}: checkpointing is said to be {case.checkpointing}, but a step computes {share:.0%} of its "
            "blocks' products again: its time would be told under the wrong name"
        )
