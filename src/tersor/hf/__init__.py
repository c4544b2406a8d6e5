"""Text classification with Hugging Face Transformers, from local directories only: `from tersor import hf`."""

from tersor.hf.models import MeanPooledClassifier, SequenceClassifier, load_model
from tersor.hf.reference import PREFIX, model_directory, parse_task
from tersor.hf.text import DYNAMIC, text_task

__all__ = [
    "DYNAMIC",
    "PREFIX",
    "MeanPooledClassifier",
    "SequenceClassifier",
    "load_model",
    "model_directory",
    "parse_task",
    "text_task",
]
