"""What watches a training run: each file one concern, each callback usable alone with any Trainer of FinetuneModule."""

from lorafit.callbacks.checkpoints import Checkpoints
from lorafit.callbacks.finite import SkipNonFinite
from lorafit.callbacks.history import History, history_rows
from lorafit.callbacks.memory import PagedOptimizerMemory
from lorafit.callbacks.norms import AdapterNorms
from lorafit.callbacks.pause import PauseAt
from lorafit.callbacks.progress import TrainingProgress
from lorafit.callbacks.proof import ProveLearning
from lorafit.callbacks.signals import StopOnSignal
from lorafit.callbacks.speed import StepMetrics

__all__ = [
    "AdapterNorms",
    "Checkpoints",
    "History",
    "PagedOptimizerMemory",
    "PauseAt",
    "ProveLearning",
    "SkipNonFinite",
    "StepMetrics",
    "StopOnSignal",
    "TrainingProgress",
    "history_rows",
]
