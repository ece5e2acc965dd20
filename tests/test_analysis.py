"""analyze(): totals of bytes and operations, singular values against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
from random_model import random_model, random_tokens

from lowbitq.analysis import SHARES, analyze
from lowbitq.compression import compress
from lowbitq.linears import Linear

TEXT = random_tokens(8 * 48).reshape(8, 48)


@pytest.mark.parametrize("format", [None, "int2g32", "int4g32 + rank4"])
def test_totals_are_those_of_the_model(format):
    model = random_model()
    if format:
        model = compress(model, format, text=TEXT)
    found = analyze(model)
    assert found.nbytes == model.nbytes
    if format is None:
        assert found.nbytes == 4 * model.parameters
    blocks = [row for row in found.rows if "layers" in row.layer]
    weights = sum(rows * cols for rows, cols in (row.shape for row in blocks))
    bits = 8 * sum(row.nbytes for row in blocks) / weights
    assert bits == pytest.approx(model.bits_per_weight, rel=1e-3)
    assert [row.layer for row in found.rows] == [name for name, _ in model.matrices()]


def test_operations_are_two_for_each_weight():
    model = random_model()
    found = analyze(model)
    weights = sum(row.shape[0] * row.shape[1] for row in found.rows)
    assert found.operations == 2 * weights, "the embedding is the head, too"
    assert found.rows[0].intensity(3) == 3 * 2 / 4
    assert found.attention == 3 * 4 * 4 * 16  # blocks, scores and values, heads, head_dim
    untied = random_model()
    untied.head = Linear(untied.embedding.weight.copy())
    again = analyze(untied)
    assert (again.rows[0].operations, again.operations) == (0, found.operations)
    adapted = compress(model, "int4g32 + rank4", text=TEXT)
    row = next(row for row in analyze(adapted).rows if row.layer.endswith("0.self_attn.k_proj"))
    assert row.operations == 2 * (32 * 64 + 4 * (32 + 64))


def test_a_block_that_occurs_twice_is_stored_once_and_run_twice():
    model = random_model()
    once = analyze(model)
    model.blocks[2] = model.blocks[0]
    found = analyze(model)
    assert len(found.rows) == len(once.rows) - 7
    assert found.operations == once.operations
    assert found.nbytes == model.nbytes < once.nbytes


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (32, 32)])
def test_ranks_are_those_of_singular_values(shape):
    model = random_model(layers=1)
    rng = np.random.default_rng(0)
    narrow = rng.standard_normal((shape[0], 5)) @ rng.standard_normal((5, shape[1]))
    weight = (narrow + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    model.blocks[0].linears["q_proj"] = Linear(weight)
    row = next(row for row in analyze(model, spectrum=True).rows if "q_proj" in row.layer)
    squares = np.linalg.svd(weight.astype(float), compute_uv=False) ** 2
    energy = np.cumsum(squares) / squares.sum()
    expected = [np.argmax(energy >= share * (1 - 1e-9)) + 1 for share in SHARES]
    assert [rank * min(shape) for rank in row.ranks] == pytest.approx(expected)
    assert row.ranks[0] * min(shape) <= 5


def test_zeros_have_no_rank():
    model = random_model(layers=1)
    model.blocks[0].linears["q_proj"] = Linear(np.zeros((64, 64), np.float32))
    row = next(row for row in analyze(model, spectrum=True).rows if "q_proj" in row.layer)
    assert row.ranks == (0, 0, 0)
    model.blocks[0].linears["q_proj"] = Linear(np.full((64, 64), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"q_proj\.weight has a NaN or an infinity"):
        analyze(model, spectrum=True)


def test_it_prints_a_table():
    lines = str(analyze(random_model(), spectrum=True)).splitlines()
    assert lines[0].split() == ["layer", "shape", "kB", "kop/token", "op/byte", "50%", "90%", "99%"]
    assert lines[2].split()[:5] == ["model.layers.0.self_attn.q_proj", "64", "x", "64", "16.4"]
    assert len(lines) == 2 + 22
    assert "million operations a token" in lines[-1]
