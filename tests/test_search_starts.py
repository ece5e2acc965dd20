"""Where searches begin: the chapter's values, ramps, clips that complement each other."""

from __future__ import annotations

import numpy as np
import pytest
from searched_models import TOKENS, two_copies

from lowbitq.search import complementary, inputs_of, progressive, static, symmetric


def test_symmetric_is_as_the_chapter_has_it():
    assert symmetric() == {"scale1": 0.9, "clip1": 0.95, "scale2": 1.1, "clip2": 0.99}
    three = symmetric(3)
    assert [three[f"scale{n}"] for n in (1, 2, 3)] == [0.9, 1.0, 1.1]
    for copies in (2, 3, 5):
        found = symmetric(copies)
        assert np.mean([found[f"scale{n + 1}"] for n in range(copies)]) == pytest.approx(1)


@pytest.mark.parametrize("ramp", ["linear", "cosine"])
def test_progressive_goes_from_equal_copies_to_the_target(ramp):
    target = symmetric()
    points = progressive(target, 4, ramp=ramp)
    assert len(points) == 5
    assert points[0] == pytest.approx({"scale1": 1, "scale2": 1, "clip1": 0.97, "clip2": 0.97})
    assert points[-1] == target
    spread = [point["scale2"] - point["scale1"] for point in points]
    assert spread == sorted(spread)
    assert spread[2] == pytest.approx(0.1)  # half way, by either ramp
    assert (spread[1] == pytest.approx(0.05)) == (ramp == "linear")


def rounded(x, clip, bits):
    limit = 2 ** (bits - 1) - 1
    step = clip * abs(x).max() / limit
    return np.clip(np.round(x / step), -limit, limit) * step


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_two_clips_err_less_than_the_best_one(bits, seed):
    x = np.random.default_rng(seed).standard_t(3, 20000)
    found = complementary(x, bits)
    fused = (rounded(x, found["clip1"], bits) + rounded(x, found["clip2"], bits)) / 2
    single = min(((rounded(x, c, bits) - x) ** 2).mean() for c in np.geomspace(0.02, 1, 40))
    assert ((fused - x) ** 2).mean() < 0.9 * single
    assert found["clip1"] < found["clip2"]


def test_more_copies_err_less():
    x = np.random.default_rng(3).standard_t(3, 20000)
    errors = []
    for copies in (2, 3, 4):
        clips = complementary(x, 4, copies).values()
        fused = np.mean([rounded(x, clip, 4) for clip in clips], axis=0)
        errors.append(((fused - x) ** 2).mean())
    assert errors == sorted(errors, reverse=True)


def test_static_scales_are_those_of_the_largest_inputs():
    _, small = two_copies(bits=8, dynamic=True)
    made = static(small, TOKENS)
    for name, linear in made.linears():
        largest = max(abs(inputs_of(small, TOKENS, name, copy=i)).max() for i in range(2))
        for copy in linear.copies:
            assert copy.activation.scale == pytest.approx(largest / 127)
    turned = dict(small.linears())["model.layers.0.mlp.down_proj"].copies[0].rotation
    assert turned is not None  # so that inputs are seen through it
    exact, close = small.logits(TOKENS[0]), made.logits(TOKENS[0])
    assert abs(close - exact).mean() < 0.1 * abs(exact).mean()


def test_a_share_of_inputs_may_be_clipped():
    _, small = two_copies(dynamic=True)
    whole, most = static(small, TOKENS), static(small, TOKENS, share=0.9)
    for (_, one), (_, other) in zip(whole.linears(), most.linears(), strict=True):
        assert other.copies[0].activation.scale < one.copies[0].activation.scale


def test_float_inputs_stay():
    _, small = two_copies(bits=None, dynamic=True)
    assert dict(static(small, TOKENS).linears()).popitem()[1].copies[0].activation.bits is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda small: symmetric(1), "copies is 1, expected at least 2"),
        (lambda small: progressive({"clip1": 1.0}, 0), "steps is 0, expected at least 1"),
        (lambda small: progressive({"clip1": 1.0}, 2, ramp="up"), "ramp is 'up'"),
        (lambda small: complementary([0.0, 0.0], 4), "largest magnitude 0.0"),
        (lambda small: complementary([np.nan], 4), "largest magnitude nan"),
        (lambda small: complementary([1.0], 1), "bits is 1, expected at least 2"),
        (lambda small: static(small, TOKENS, share=0), "share is 0"),
        (lambda small: static(small, [[999]]), "tokens"),
        (lambda small: inputs_of(small, TOKENS, "q_proj"), "no copy 0 of a layer 'q_proj'"),
    ],
)
def test_what_does_not_fit_is_refused(call, said):
    _, small = two_copies()
    with pytest.raises(ValueError, match=said):
        call(small)
