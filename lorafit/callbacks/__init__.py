"""What watches a training run: each file one concern, each callback usable alone with any Trainer of FinetuneModule."""

from lorafit.callbacks.checkpoints import Checkpoints
from lorafit.callbacks.finite import StopOnNonFinite
from lorafit.callbacks.memory import PagedOptimizerMemory
from lorafit.callbacks.progress import TrainingProgress
from lorafit.callbacks.signals import StopOnSignal
from lorafit.callbacks.speed import StepMetrics

__all__ = [
    "Checkpoints",
    "PagedOptimizerMemory",
    "StepMetrics",
    "StopOnNonFinite",
    "StopOnSignal",
    "TrainingProgress",
]
