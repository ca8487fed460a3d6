"""Data: rows as people have them, turned into tokens of which only the answers are trained.

    sources.py     files, folders, hub data sets, several with weights -> rows, each knowing where it stands
    formats.py     rows -> examples: conversations in one form, whatever layout they came in
    templates.py   conversations -> text, and the span of every answer in it
    tokens.py      text -> token ids and what of them is trained, within a length
    checks.py      proof of what is trained, by another road; what is refused
    store.py       many of those as flat arrays, kept on the disk for the next start
    packing.py     several in a row
    loader.py      rows -> batches, in an order that a checkpoint can continue
    corpus.py      all of it, read before the first step;   stream.py: or a window at a time

A sequence is a dict of `input_ids` and `labels`; a label of -100 is not trained.
"""

from lorafit.data.corpus import Corpus, Pipeline, Report, held_out_sources, read_corpus
from lorafit.data.formats import Example, Formatter, Turn
from lorafit.data.loader import ResumableLoader, collate, collate_packed
from lorafit.data.sources import Source, parse_sources, read_rows
from lorafit.data.store import Sequences
from lorafit.data.stream import StreamLoader
from lorafit.data.tokens import IGNORE, Encoder, load_tokenizer

__all__ = [
    "IGNORE",
    "Corpus",
    "Encoder",
    "Example",
    "Formatter",
    "Pipeline",
    "Report",
    "ResumableLoader",
    "Sequences",
    "Source",
    "StreamLoader",
    "Turn",
    "collate",
    "collate_packed",
    "held_out_sources",
    "load_tokenizer",
    "parse_sources",
    "read_corpus",
    "read_rows",
]
