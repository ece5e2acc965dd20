"""Models: the network, its representation in files, and load()."""

from __future__ import annotations

from lowbitq.models.config import ModelConfig
from lowbitq.models.decoder import Block, Cache, Model
from lowbitq.models.families import Family
from lowbitq.models.loading import load
from lowbitq.models.quantized import QuantizedModel, Report
from lowbitq.models.tokenizer import Tokenizer

__all__ = [
    "Block",
    "Cache",
    "Family",
    "Model",
    "ModelConfig",
    "QuantizedModel",
    "Report",
    "Tokenizer",
    "load",
]
