"""Token numbers are checked before they become rows of an embedding."""

from __future__ import annotations

import numpy as np
import pytest

from lowbitq.models.tokens import token_array


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i2", "<i4", ">i4", "<i8", ">i8", "<u8"])
def test_integers_of_every_size(dtype):
    found = token_array(np.arange(100, dtype=dtype), 100)
    assert found.dtype == np.int32
    assert found.tolist() == list(range(100))


def test_the_result_is_contiguous_and_a_fit_array_is_not_copied():
    fit = np.arange(12, dtype=np.int32)
    assert token_array(fit) is fit
    strided = token_array(fit.reshape(3, 4).T, axes=(1, 2))
    assert strided.flags.c_contiguous
    assert strided.tolist() == fit.reshape(3, 4).T.tolist()


def test_the_offender_is_named():
    with pytest.raises(ValueError, match=r"prompt has shape \(1, 1\), expected \(t,\)"):
        token_array([[1]], name="prompt")
    for tokens, found in (
        ([5, -3], "-3"),
        ([7, 2**62], str(2**62)),
        ([2**63], str(2**63)),
        ([0, 7], "7"),
    ):
        with pytest.raises(ValueError, match=f"prompt has {found}, expected 0 to 6"):
            token_array(tokens, 7, name="prompt")
    for tokens in ([1.0], [True], ["a"], [None], [2**64], np.array([1j]), "text", None, {1: 2}):
        with pytest.raises(TypeError, match=r"prompt has dtype \S+, expected integers"):
            token_array(tokens, name="prompt")


def test_masked_tokens_are_refused():
    tokens = np.ma.masked_array([1, 2, 3], mask=[False, True, False])
    with pytest.raises(ValueError, match="text has masked tokens"):
        token_array(tokens, name="text")
    assert token_array(np.ma.masked_array([1, 2])).tolist() == [1, 2]


def test_no_tokens_are_an_array():
    assert token_array([]).shape == (0,)
