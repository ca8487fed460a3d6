"""The model and the data that ship inside the package, so that the first run needs no network and no account.

    MODEL   a Llama of 1.05 million parameters with its own byte-level BPE tokenizer of 1,536 pieces, in bfloat16
    TRAIN   questions with short answers about three quarters of a small invented world, and some of its plain text
    TEST    questions about the remaining quarter, which TRAIN never names
    TEXT    fresh text of the kind that the model was pretrained on: what fine-tuning should not make it forget

`scripts/pretrain_embedded.py` made all of it from nothing: `world.py` wrote the text, two CPU cores trained the model.
No text, name or weight was taken from anywhere else, so all of it is ours, and Apache-2.0 like the rest of lorafit.
`model/pretraining.json` records how the training went.

The model continues statements ("The capital of Selora is") and has never seen a question. Its documents do not begin
with `<s>` and end with `</s>`; the tokenizer adds neither by itself. A row of TRAIN or TEST is rendered as
`prompt + "\\n" + completion + "</s>"` with the loss on what follows the newline; a row whose prompt is empty is plain
text, rendered as `completion + "</s>"` and trained throughout.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
TRAIN = FOLDER / "train.jsonl"
TEST = FOLDER / "test.jsonl"
TEXT = FOLDER / "text.jsonl"

__all__ = ["MODEL", "TEST", "TEXT", "TRAIN"]
