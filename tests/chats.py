"""Chat templates in the style of those in use, and tokenizers of the kinds there are, for the tests of the data.

In a text, «…» are around what is trained. `text` is the conversation TALK as a template has it (without its system
text where the template takes none), `short` the conversation SHORT.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorafit.data import Example, Turn, load_tokenizer
from lorafit.data.general import TEXTS

TALK = Example(
    (
        Turn("system", "Be brief."),
        Turn("user", "Who is Felix?"),
        Turn("assistant", "A potter."),
        Turn("user", "And Ina?"),
        Turn("assistant", "She sells his pots."),
    ),
    "rows.jsonl:1",
)
SHORT = Example.of("Who is Felix?", "A potter.", "rows.jsonl:2")


@dataclass(frozen=True)
class Style:
    """A chat template with the tokens it needs. system: whether it takes a system text; options: of its
    tokens."""

    name: str
    source: str
    tokens: tuple[str, ...]
    text: str
    short: str
    bos: str = "<s>"
    eos: str = "</s>"
    system: bool = True
    options: dict[str, bool] = field(default_factory=dict)

    def talk(self) -> Example:
        return TALK if self.system else Example(TALK.turns[1:], TALK.where)


CHATML_SOURCE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho is Felix?<|im_end|>\n"
    "<|im_start|>assistant\n«A potter.<|im_end|>»\n<|im_start|>user\nAnd Ina?<|im_end|>\n"
    "<|im_start|>assistant\n«She sells his pots.<|im_end|>»\n"
)
CHATML_SHORT = "<|im_start|>user\nWho is Felix?<|im_end|>\n<|im_start|>assistant\n«A potter.<|im_end|>»\n"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

LLAMA3 = Style(
    "llama3",
    "{% for turn in messages %}{% set text = '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' + "
    "turn.content | trim + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho is Felix?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«A potter.<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd Ina?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«She sells his pots.<|eot_id|>»",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho is Felix?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«A potter.<|eot_id|>»",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
)
MISTRAL = Style(
    "mistral",
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{% set asked = turns | selectattr('role', 'equalto', 'user') | list"
    " %}{{ bos_token }}{% for turn in turns %}{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if turn.role == 'user' %}"
    "{% if system is defined and loop.index0 // 2 == asked | length - 1 %}"
    "{{ '[INST] ' + system + '\n\n' + turn.content + ' [/INST]' }}{% else %}{{ '[INST] ' + turn.content + ' [/INST]' }}"
    "{% endif %}{% else %}{{ ' ' + turn.content + eos_token }}{% endif %}{% endfor %}",
    ("[INST]", "[/INST]"),
    "<s>[INST] Who is Felix? [/INST]« A potter.</s>»[INST] Be brief.\n\nAnd Ina? [/INST]« She sells his pots.</s>»",
    "<s>[INST] Who is Felix? [/INST]« A potter.</s>»",
)
CHATML = Style("chatml", CHATML_SOURCE, CHATML_TOKENS, CHATML_TEXT, CHATML_SHORT, eos="<|im_end|>")
QWEN2 = Style(
    "qwen2",
    "{% for turn in messages %}{% if loop.first and turn.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    (*CHATML_TOKENS, "<|endoftext|>"),
    CHATML_TEXT,
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML_SHORT,
    eos="<|im_end|>",
)
THOUGHT = "<think>\n\n</think>\n\n"
QWEN3_SOURCE = (
    "{% for turn in messages %}{% if turn.role == 'assistant' %}{% set content = turn.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + "
    "content.lstrip('\n') }}{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = Style(
    "qwen3",
    QWEN3_SOURCE,
    (*CHATML_TOKENS, "<think>", "</think>"),
    CHATML_TEXT.replace("«She", f"«{THOUGHT}She"),
    CHATML_SHORT.replace("«A", f"«{THOUGHT}A"),
    eos="<|im_end|>",
)
GEMMA = Style(
    "gemma",
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for turn in messages %}{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if turn.role == 'assistant' else turn.role %}"
    "{{ '<start_of_turn>' + role + '\n' + turn.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "<bos><start_of_turn>user\nWho is Felix?<end_of_turn>\n<start_of_turn>model\n«A potter.<end_of_turn>»\n"
    "<start_of_turn>user\nAnd Ina?<end_of_turn>\n<start_of_turn>model\n«She sells his pots.<end_of_turn>»\n",
    "<bos><start_of_turn>user\nWho is Felix?<end_of_turn>\n<start_of_turn>model\n«A potter.<end_of_turn>»\n",
    bos="<bos>",
    eos="<eos>",
    system=False,
)
PHI3 = Style(
    "phi3",
    "{% for turn in messages %}{{ '<|' + turn.role + '|>\n' + turn.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<|system|>\nBe brief.<|end|>\n<|user|>\nWho is Felix?<|end|>\n<|assistant|>\n«A potter.<|end|>»\n"
    "<|user|>\nAnd Ina?<|end|>\n<|assistant|>\n«She sells his pots.<|end|>»\n<|endoftext|>",
    "<|user|>\nWho is Felix?<|end|>\n<|assistant|>\n«A potter.<|end|>»\n<|endoftext|>",
    eos="<|endoftext|>",
)
PHI3_STRIPS = Style(
    "phi3_whose_marks_swallow_space",
    PHI3.source,
    PHI3.tokens,
    PHI3.text,
    PHI3.short,
    eos=PHI3.eos,
    options={"rstrip": True},
)
ZEPHYR = Style(
    "zephyr",
    "{% for turn in messages %}\n{% if turn.role == 'user' %}\n{{ '<|user|>\n' + turn.content + eos_token }}\n"
    "{% elif turn.role == 'system' %}\n{{ '<|system|>\n' + turn.content + eos_token }}\n"
    "{% elif turn.role == 'assistant' %}\n{{ '<|assistant|>\n'  + turn.content + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    (),
    "<|system|>\nBe brief.</s>\n<|user|>\nWho is Felix?</s>\n<|assistant|>\n«A potter.</s>»\n"
    "<|user|>\nAnd Ina?</s>\n<|assistant|>\n«She sells his pots.</s>»\n",
    "<|user|>\nWho is Felix?</s>\n<|assistant|>\n«A potter.</s>»\n",
)
LLAMA2 = Style(
    "llama2",
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for turn in turns %}"
    "{% if loop.first and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + turn.content %}"
    "{% else %}{% set content = turn.content %}{% endif %}{% if turn.role == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    (),
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho is Felix? [/INST]« A potter. </s>»"
    "<s>[INST] And Ina? [/INST]« She sells his pots. </s>»",
    "<s>[INST] Who is Felix? [/INST]« A potter. </s>»",
)
_MARKED = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% if turn.role == 'assistant' %}%s"
    "{% else %}{{ turn.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def marked(name: str, answer: str) -> Style:
    """ChatML whose answers are written as `answer` says."""
    source = _MARKED.replace("%s", answer)
    return Style(name, source, CHATML_TOKENS, CHATML_TEXT, CHATML_SHORT, eos="<|im_end|>")


MARKED_INSIDE = marked("marked_inside", "{% generation %}{{ turn.content }}<|im_end|>{% endgeneration %}{{ '\n' }}")
MARKED_OUTSIDE = marked("marked_outside", "{%- generation -%}{{ turn.content }}{% endgeneration %}<|im_end|>{{ '\n' }}")
MARKED_LINE = marked("marked_line", "{% generation %}{{ turn.content + '<|im_end|>\n' }}{% endgeneration %}")
MARKED_HEADER = Style(
    "marked_header",
    "{% for turn in messages %}{% if turn.role == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + turn.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    CHATML_TOKENS,
    CHATML_TEXT,
    CHATML_SHORT,
    eos="<|im_end|>",
)
NO_PROMPT = Style(
    "no_prompt",
    CHATML_SOURCE.partition("{% if add")[0],
    CHATML_TOKENS,
    CHATML_TEXT,
    CHATML_SHORT,
    eos="<|im_end|>",
)
HARMONY = Style(
    "harmony",
    "{% for turn in messages %}{% if turn.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + turn.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + turn.role + '<|message|>' + turn.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Who is Felix?<|end|>"
    "<|start|>assistant«<|channel|>final<|message|>A potter.<|end|>»<|start|>user<|message|>And Ina?<|end|>"
    "<|start|>assistant«<|channel|>final<|message|>She sells his pots.<|return|>»",
    "<|start|>user<|message|>Who is Felix?<|end|><|start|>assistant«<|channel|>final<|message|>A potter.<|return|>»",
    eos="<|return|>",
)
# without any mark behind an answer: the end token is put behind the last
UNCLOSED = Style(
    "unclosed",
    "{% for turn in messages %}{{ turn.role | upper + ': ' + turn.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
    (),
    "SYSTEM: Be brief.\nUSER: Who is Felix?\nASSISTANT: «A potter.»\nUSER: And Ina?\nASSISTANT: «She sells his pots.",
    "USER: Who is Felix?\nASSISTANT: «A potter.",
)
UNCLOSED_LINES = Style(
    "unclosed_lines",
    UNCLOSED.source.replace("': ' + turn", "':\n' + turn").replace("ASSISTANT: ", "ASSISTANT:\n"),
    (),
    UNCLOSED.text.replace(": ", ":\n"),
    UNCLOSED.short.replace(": ", ":\n"),
)
STYLES = (
    LLAMA3, MISTRAL, CHATML, QWEN2, QWEN3, GEMMA, PHI3, PHI3_STRIPS, ZEPHYR, LLAMA2, MARKED_INSIDE, MARKED_OUTSIDE,
    MARKED_LINE, MARKED_HEADER, NO_PROMPT, HARMONY,
)  # fmt: skip

# --- wrong in one way or the other
MISPLACED = Style(
    "misplaced",
    "{% for turn in messages %}{% if turn.role == 'user' %}<|im_start|>user\n{% generation %}{{ turn.content }}"
    "{% endgeneration %}<|im_end|>\n{% else %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    CHATML_TOKENS,
    "",
    "",
    eos="<|im_end|>",
)
MARKED_TOO_FAR = marked(
    "marked_too_far", "{% generation %}{{ turn.content }}<|im_end|>\nRate this answer.{% endgeneration %}{{ '\n' }}"
)
THINKS = Style(
    "thinks",
    CHATML_SOURCE.replace("assistant\n{% endif", "assistant\n{{ '<think>\n' }}{% endif"),
    (*CHATML_TOKENS, "<think>", "</think>"),
    CHATML_TEXT,
    CHATML_SHORT,
    eos="<|im_end|>",
)

# --- tokenizers

_SPECIAL = ("<s>", "</s>", "<unk>")


def _fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _sentencepiece(model: Any, trainer: Any) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # in sentences, so that training is quick
    backend.train_from_iterator([part + ".\n" for text in TEXTS for part in text.split(".")], trainer)
    return backend


_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _bpe() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before every text, bytes for what it does not know."""
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*_SPECIAL, *_BYTES], show_progress=False, max_token_length=12
    )
    backend = _sentencepiece(models.BPE(unk_token="<unk>"), trainer)
    state = json.loads(backend.to_str())
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    state["added_tokens"] = state["added_tokens"][: len(_SPECIAL)]
    return _fast(Tokenizer.from_str(json.dumps(state)))


def _unigram() -> PreTrainedTokenizerFast:
    """As T5's or Gemma's kind of model, with bytes for what it does not know."""
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=list(_SPECIAL), unk_token="<unk>", show_progress=False
    )
    state = json.loads(_sentencepiece(models.Unigram(), trainer).to_str())
    state["model"]["vocab"] += [[name, -20.0] for name in [*_BYTES, "\n", "\n\n", ".\n"]]
    state["model"]["byte_fallback"] = True
    return _fast(Tokenizer.from_str(json.dumps(state)))


def _trimmed() -> PreTrainedTokenizerFast:
    """As GPT-2's, with offsets that leave out spaces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(_SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([*TEXTS, "a:\n\n\n\n" * 50, "a   b\n" * 50], trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return _fast(backend)


KINDS = ("embedded", "bpe", "unigram", "trimmed")


@cache
def tokenizer_of(kind: str) -> Any:
    if kind == "embedded":
        return load_tokenizer("embedded")
    return {"bpe": _bpe, "unigram": _unigram, "trimmed": _trimmed}[kind]()


_DRESSED: dict[tuple[str, str], Any] = {}


def chat_tokenizer(style: Style, kind: str = "embedded") -> Any:
    """A tokenizer that knows the special tokens of a style and has its template."""
    if (kind, style.name) not in _DRESSED:
        tokenizer = copy.deepcopy(tokenizer_of(kind))
        tokens = [AddedToken(name, special=True, normalized=False, **style.options) for name in style.tokens]
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = style.bos, style.eos, style.eos
        tokenizer.chat_template = style.source
        _DRESSED[kind, style.name] = tokenizer
    return _DRESSED[kind, style.name]


def read(marked_text: str) -> tuple[str, list[tuple[int, int]]]:
    """(the text without « and », the spans between them)."""
    text, *parts = marked_text.split("«")
    spans = []
    for part in parts:
        inside, _, after = part.partition("»")
        spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return text, spans


def spoken(tokenizer: Any, encoded: Any) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = []
    before = False
    for token, trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if trained:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = trained
    return [tokenizer.decode(run) for run in runs]
