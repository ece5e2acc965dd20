"""Small models of two copies, for tests of searches."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from random_model import random_model, random_tokens

from lowbitq.compression import compress
from lowbitq.linears import Activation
from lowbitq.search import GRID, search, static

TOKENS = random_tokens(4 * 64, seed=5).reshape(4, 64)


def two_copies(bits=4, *, dynamic=False):
    """A float model, and it with each layer as the mean of two equal copies of its codes."""
    model, small = _two_copies(bits, dynamic)
    return model, small.copy()


@cache
def _two_copies(bits, dynamic):
    model = random_model(layers=2)
    # Its logits are so large that single tokens would decide about a divergence.
    model.embedding = model.embedding.replace(weight=model.embedding.weight / 8)
    small = compress(model, "int4g32", text=TOKENS, embedding="int8g64 a32")
    for name, linear in list(small.linears()):
        [copy] = linear.copies
        half = np.full(linear.shape[0], 0.5, np.float32)
        one = replace(copy, activation=Activation(bits), weight=half)
        small.replace_linear(name, linear.replace(copies=(one, one)))
    return model, small if dynamic else static(small, TOKENS)


def search_in(storage, seed, trials):
    """What a worker does."""
    model, small = two_copies()
    found = search(model, small, TOKENS, GRID, storage=storage, seed=seed, trials=trials, window=64)
    return found.value
