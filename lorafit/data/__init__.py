"""Data: rows as people have them, turned into tokens of which only the answers are trained.

    formats.py     files and hub data sets -> examples (prompt, completion), each knowing where it came from
    tokens.py      examples -> token ids and labels, by template
    loader.py      labelled sequences -> batches, in an order that a checkpoint can continue

A sequence is a dict of two lists, `input_ids` and `labels`; a label of -100 is not trained.
"""

from lorafit.data.formats import Example, load_examples, split_held_out
from lorafit.data.loader import ResumableLoader, collate
from lorafit.data.tokens import IGNORE, Encoder, load_tokenizer

__all__ = [
    "IGNORE",
    "Encoder",
    "Example",
    "ResumableLoader",
    "collate",
    "load_examples",
    "load_tokenizer",
    "split_held_out",
]
