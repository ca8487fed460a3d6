"""Examples as token ids and labels.

Prompt and completion are tokenized apart and put together: at inference the prompt is tokenized alone, too, so the
model meets in use exactly the boundary that it was trained on. Only the completion and the end token after it are
trained (`train_on="completion"`); the end token always is, or the model would never stop.

Templates: "plain" is prompt, line break, completion; "chat" is the tokenizer's own chat template, one user
and one assistant turn; "auto" takes the chat template where there is one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from lorafit.data.formats import Example
from lorafit.errors import InputError, did_you_mean, reason
from lorafit.quant import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
TEMPLATES = ("auto", "plain", "chat")
TRAIN_ON = ("completion", "all")
Sequence = dict[str, list[int]]


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model (hub id, folder or "embedded"), with an end token and a padding token.

    Raises InputError when there is none, or when it has no end token: a model trained without one never stops.
    """
    options = {"revision": revision} if revision is not None else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"the tokenizer of {name!r} cannot be loaded: {reason(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {name!r} has no end token, and a model trained without one never stops: "
            "name one as eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        # only fills up batches: padded places are masked by position, not by this id
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Encoder:
    """Turns examples into sequences with one tokenizer, template and length limit, and counts what it cut.

    `truncated`: sequences cut at max_length. `dropped`: those of which nothing to train was left.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "auto",
        max_length: int = 512,
        train_on: str = "completion",
    ) -> None:
        for key, value, choices in (("template", template, TEMPLATES), ("train_on", train_on, TRAIN_ON)):
            if value not in choices:
                raise InputError(
                    f"data.{key} must be one of {', '.join(choices)}, got {value!r}.{did_you_mean(value, choices)}"
                )
        if template == "chat" and not tokenizer.chat_template:
            raise InputError("data.template=chat: the tokenizer has no chat template. Take data.template=plain")
        self.tokenizer = tokenizer
        self.chat = template == "chat" or (template == "auto" and bool(tokenizer.chat_template))
        self.max_length, self.train_on = max_length, train_on
        self.truncated = self.dropped = 0

    def encode_all(self, examples: Iterable[Example]) -> list[Sequence]:
        """The sequences of all examples; those in which max_length left nothing to train are dropped and counted."""
        sequences = []
        for example in examples:
            sequence = self.encode(example)
            if len(sequence["input_ids"]) > self.max_length:
                self.truncated += 1
                sequence = {key: ids[: self.max_length] for key, ids in sequence.items()}
            # the first token has no place to be predicted from
            if all(label == IGNORE for label in sequence["labels"][1:]):
                self.dropped += 1
            else:
                sequences.append(sequence)
        return sequences

    def encode(self, example: Example) -> Sequence:
        """One example, uncut: token ids, and labels that are -100 where nothing is trained."""
        prompt = self.encode_prompt(example.prompt)
        completion = self._completion(example)
        masked = prompt if self.train_on == "all" else [IGNORE] * len(prompt)
        return {"input_ids": prompt + completion, "labels": masked + completion}

    def encode_prompt(self, prompt: str) -> list[int]:
        """What the model is given in use: the prompt up to the place where its answer begins."""
        if self.chat and prompt:
            return self._ids(self._render(prompt))
        # a text of its own begins with just what the tokenizer puts in front of any text
        return self._beginning() + (self._ids(f"{prompt}\n") if prompt else [])

    def _completion(self, example: Example) -> list[int]:
        end = self.tokenizer.eos_token_id
        text = example.completion
        if self.chat and example.prompt:
            rendered, start = self._render(example.prompt, example.completion), self._render(example.prompt)
            if not rendered.startswith(start):
                raise InputError(
                    "the chat template renders a prompt differently once it is answered, so the answer cannot be told "
                    "apart from it. Take data.template=plain"
                )
            text = rendered[len(start) :]
        ids = self._ids(text)
        if end in ids:
            # a template closes the turn itself, and may go on with a line break that nobody has to learn
            length = len(ids) - ids[::-1].index(end)
            if not str(self.tokenizer.decode(ids[length:])).strip():
                return ids[:length]
        return [*ids, end]

    def _render(self, prompt: str, completion: str | None = None) -> str:
        turns = [{"role": "user", "content": prompt}]
        if completion is not None:
            turns.append({"role": "assistant", "content": completion})
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=completion is None)
        assert isinstance(text, str)
        return text

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _beginning(self) -> list[int]:
        ids, bare = self.tokenizer("x").input_ids, self._ids("x")
        return next((ids[:at] for at in range(len(ids)) if ids[at : at + len(bare)] == bare), [])
