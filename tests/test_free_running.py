"""continuations(): what a model writes, its repetition and its divergence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from random_model import random_model, random_tokens

import lowbitq as lq
from lowbitq.free_running import Continuations, repetition
from lowbitq.models.config import ModelConfig

TEXT = random_tokens(400)
OPTIONS = {"prompts": 5, "prompt_tokens": 12, "new_tokens": 16}


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([1, 2, 3, 4, 5, 6, 7], 0),
        ([1, 1, 1, 1, 1, 1, 1], 3 / 4),  # 1111 four times, three of them again
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 2341 3412 4123 1234
        ([1, 2, 1, 2, 1, 2, 1, 2], 3 / 5),  # 1212 2121 1212 2121 1212
        ([9, 1, 2, 3, 4, 8, 1, 2, 3, 4], 1 / 7),
        ([1, 2, 3], 0),
        ([], 0),
    ],
)
def test_repetition_is_the_share_of_phrases_seen_before(tokens, share):
    assert repetition(np.array(tokens, np.int32)) == pytest.approx(share)


def test_continuations_are_those_of_generate():
    model, reference = random_model(), random_model(seed=1)
    found = lq.continuations(model, reference, TEXT, **OPTIONS)
    prompts = TEXT.reshape(5, 80)[:, :12]
    for one, written, share in (
        (model, found.written, found.repetition),
        (reference, found.reference_written, found.reference_repetition),
    ):
        expected = [one.generate(prompt, max_new_tokens=16) for prompt in prompts]
        assert all(map(np.array_equal, written, expected))
        assert float(share) == pytest.approx(np.mean([repetition(x) for x in expected]))
        assert (share.tokens, share.windows) == (5 * 16, 5)


def test_kl_is_that_of_the_predictions_that_wrote():
    model, reference = random_model(), random_model(seed=1)
    found = lq.continuations(model, reference, TEXT, **OPTIONS)
    per_prompt = []
    for prompt, written in zip(TEXT.reshape(5, 80)[:, :12], found.written, strict=True):
        read = np.append(prompt, written)[:-1]
        log_p, log_q = (
            x - np.log(np.exp(x).sum(1, keepdims=True))
            for x in (m.logits(read)[11:].astype(np.float64) for m in (reference, model))
        )
        assert np.array_equal(log_q.argmax(1), written)
        per_prompt.append((np.exp(log_p) * (log_p - log_q)).sum(1).mean())
    assert np.allclose(found.kl.per_window, per_prompt, rtol=1e-6)
    assert float(found.kl) == pytest.approx(np.mean(per_prompt), rel=1e-6)
    assert found.kl.tokens == 5 * 16


def test_a_model_writes_as_itself():
    model = random_model()
    found = lq.continuations(model, model, TEXT, **OPTIONS)
    assert float(found.kl) == 0
    assert found.repetition == found.reference_repetition


def with_end(model, token):
    values = vars(model.config) | {"eos_token_ids": (int(token),)}
    model.config = ModelConfig(**values)
    return model


def test_an_end_token_ends_a_continuation_and_is_predicted():
    reference = random_model(seed=1)
    free = lq.continuations(random_model(), reference, TEXT, **OPTIONS)
    end = free.written[0][5]
    ended = lq.continuations(with_end(random_model(), end), reference, TEXT, **OPTIONS)
    at = list(free.written[0]).index(end)
    assert np.array_equal(ended.written[0], free.written[0][:at])
    predicted = [min(len(tokens) + 1, 16) for tokens in ended.written]
    assert ended.kl.tokens == sum(predicted)
    assert ended.repetition.tokens == sum(map(len, ended.written))


def test_what_is_found_is_text_and_json():
    seen = []
    found = lq.continuations(
        random_model(), random_model(seed=1), TEXT, progress=lambda *at: seen.append(at), **OPTIONS
    )
    assert isinstance(found, Continuations)
    assert seen == [(done, 5) for done in range(1, 6)]
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["kl"]["value"] == float(found.kl)
    assert again["written"] == [tokens.tolist() for tokens in found.written]
    protocol = "5 greedy continuations of up to 16 tokens after 12 tokens of text"
    assert again["repetition"]["protocol"] == protocol
    assert protocol in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": 0}, "prompts is 0, expected at least 1"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0, expected at least 1"),
        ({"new_tokens": 0}, "new_tokens is 0, expected at least 1"),
        ({"prompts": 34}, "text has 400 tokens, expected at least 408 for 34 prompts of 12"),
        ({"new_tokens": 2040}, "window is 2052, but the reference has 2048 positions"),
        ({"text": TEXT + 99}, r"text has \d+, expected 0 to 99"),
    ],
)
def test_bad_arguments_are_named(options, message):
    given = {"text": TEXT, **OPTIONS} | options
    with pytest.raises(ValueError, match=message):
        lq.continuations(random_model(), random_model(), **given)
