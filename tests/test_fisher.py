"""lowbitq.fisher: squared gradients at the outputs of layers, and the weights made of them."""

from __future__ import annotations

import numpy as np
import pytest
from random_model import random_model, random_tokens

from lowbitq._core import NumericalError
from lowbitq.fisher import output_squares, token_weights
from lowbitq.gradients import Pass, block_sink, gradients
from lowbitq.linears import Linear
from lowbitq.losses import Loss
from lowbitq.models.slots import SLOTS, name_in_block


def uncertain_model(layers=1):
    """Whose predictions leave room for chance: random_model is sure of the token that it reads."""
    model = random_model(layers=layers)
    model.embedding = Linear(np.float32(0.2) * model.embedding.weight)
    return model


def test_squares_are_those_of_the_gradients_at_outputs():
    model, tokens = uncertain_model(layers=2), random_tokens(60).reshape(3, 20)
    by_token, by_output = output_squares(model, tokens, seed=5)
    names = [name for name, _ in model.linears()]
    assert list(by_token) == list(by_output) == names
    seen = 0
    for part in gradients(model, tokens, of=["output"], seed=5, mean=False):
        for name, gradient in part.items():
            squares = gradient.astype(float) ** 2
            layer = name.removesuffix(".output")
            # The same gradients to the bit but for sums over tokens, here of other lengths.
            assert np.allclose(by_token[layer], squares.mean(2), rtol=1e-4)
            assert np.allclose(by_output[layer], squares.mean((0, 1)), rtol=1e-4)
            seen += 1
    assert seen == len(names)


def test_labels_are_drawn_by_seed():
    model, tokens = uncertain_model(), random_tokens(40).reshape(2, 20)
    first, again, other = (output_squares(model, tokens, seed=seed)[0] for seed in (1, 1, 2))
    for name, squares in first.items():
        assert np.array_equal(squares, again[name])
        assert not np.array_equal(squares, other[name])


def exact_squares(model, row):
    """E[g^2] over labels drawn independently: cross terms have mean 0, so it is a sum over them.

    For every position s and every label, p(label) times the squared gradients of -log p(label) at s
    alone.
    """
    logits = model.logits(row).astype(float)
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    total = {slot.name: 0 for slot in SLOTS}
    for position in range(len(row) - 1):
        weights = np.eye(len(row), dtype=np.float32)[position]
        for label in range(logits.shape[1]):
            run = Pass(model, row)
            run.loss(Loss.parse("ce"), targets=np.full(len(row), label), weights=weights)
            outputs = {
                slot.name: np.empty((len(row), slot.shape(model.config)[0]), np.float32)
                for slot in SLOTS
            }
            run.back(0, block_sink(), outputs)
            for name, g in outputs.items():
                total[name] = total[name] + probability[position, label] * g.astype(float) ** 2
    return total


def test_the_mean_over_many_seeds_is_the_fisher_information():
    """Within 5 standard errors of the mean, for every token and output of a model of one block."""
    model, row = uncertain_model(), random_tokens(6)
    exact = exact_squares(model, row)
    draws = [output_squares(model, row[None], seed=seed) for seed in range(2000)]
    for slot in SLOTS:
        name = name_in_block(0, slot)
        for part, axis in ((0, 1), (1, 0)):
            found = np.array([draw[part][name] for draw in draws], float).reshape(len(draws), -1)
            expected = exact[slot.name].mean(axis)
            error = found.std(0) / len(draws) ** 0.5
            assert (abs(found.mean(0) - expected) <= 5 * error + 1e-9 * expected.max()).all(), name
            assert abs(found.mean(0) - expected).sum() < 0.2 * expected.sum(), name


def test_progress_counts_windows():
    done = []
    model, tokens = random_model(layers=1), random_tokens(40).reshape(4, 10)
    output_squares(model, tokens, progress=done.append)
    assert done == [1, 2, 3, 4]


def test_a_gradient_too_large_to_square_is_named():
    model = random_model(layers=2)
    linears = model.blocks[1].linears
    for name, factor in (("up_proj", 1e-37), ("down_proj", 1e38)):
        linears[name] = Linear(np.float32(factor) * linears[name].weight)
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj .* too large to square"):
        output_squares(model, random_tokens(20)[None])


# --- weights --------------------------------------------------------------------------------------


def test_weights_are_clipped_after_the_first_tokens():
    rng = np.random.default_rng(0)
    squares = np.exp(3 * rng.standard_normal((5, 40))).astype(np.float32)
    squares[:, :2] *= 1000
    weights = token_weights(squares, first_tokens=2, clip=10)
    assert weights.mean() == pytest.approx(1)
    expected = squares.astype(float)
    expected[:, 2:] = np.minimum(expected[:, 2:], 10 * np.median(expected[:, 2:]))
    assert np.allclose(weights, expected / expected.mean())
    assert weights[:, 2:].max() == pytest.approx(10 * np.median(weights[:, 2:]))


def test_weights_do_not_depend_on_the_unit_of_the_loss():
    squares = np.random.default_rng(0).random((2, 30))
    assert np.allclose(token_weights(1e-20 * squares), token_weights(squares))


@pytest.mark.parametrize("first_tokens", [0, 4, 100])
def test_nothing_to_clip(first_tokens):
    assert (token_weights(np.zeros((2, 6)), first_tokens=first_tokens) == 1).all()
    sparse = np.zeros((2, 10))
    sparse[:, 7] = 5
    assert np.array_equal(token_weights(sparse, first_tokens=first_tokens), 2 * sparse)
    squares = np.arange(12.0).reshape(2, 6)
    assert np.allclose(token_weights(squares, first_tokens=first_tokens), squares / 5.5)
