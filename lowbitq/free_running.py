"""What a model writes: whether its own continuations repeat themselves or leave the reference.

Perplexity reads text that people wrote. A quantized model may predict that well and still collapse
when it reads what it wrote itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbitq import _core
from lowbitq.estimates import Estimate, mean_estimate
from lowbitq.evaluation import check_reference
from lowbitq.generation import generate
from lowbitq.models.decoder import Model
from lowbitq.models.tokens import check_count
from lowbitq.texts import Text, settled, tokenize

Tokens = NDArray[np.int32]

_GRAM = 4  # tokens of a repeated phrase, as in most papers since Welleck et al.


@dataclass(frozen=True)
class Continuations:
    """What `continuations` found; the intervals are over prompts.

    Attributes
    ----------
    repetition : Estimate
        Share of the phrases of four tokens in a continuation that have occurred in it before.
    reference_repetition : Estimate
        The same for the reference's continuations of the same prompts.
    kl : Estimate
        Mean divergence of the model from the reference on the model's own continuations, in nats
        per token.
    written, reference_written : list of ndarray of shape (n,), int32
        The continuations; shorter than asked for where an end token came.
    """

    repetition: Estimate
    reference_repetition: Estimate
    kl: Estimate
    written: list[Tokens] = field(repr=False)
    reference_written: list[Tokens] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the estimates as plain dicts and the continuations as lists, for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: x.to_dict() if isinstance(x, Estimate) else [tokens.tolist() for tokens in x]
            for name, x in values.items()
        }

    def __str__(self) -> str:
        return (
            f"repetition  {float(self.repetition):.2%} of phrases of {_GRAM} tokens, the "
            f"reference {float(self.reference_repetition):.2%}\n"
            f"KL, own     {float(self.kl):.4f} nats per token ({self.kl.protocol})"
        )


def continuations(
    model: Model,
    reference: Model,
    text: Text,
    *,
    prompts: int = 20,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    progress: Callable[[int, int], object] | None = None,
) -> Continuations:
    """Let a model continue prompts from a text, greedily, and compare what it writes.

    Parameters
    ----------
    model, reference : Model
        Both need the same tokenizer, or, if `text` is tokens, the same vocabulary size.
    text : str, path, sequence of str or of paths, or array_like of int of shape (t,)
        As for `lowbitq.perplexity`.
    prompts, prompt_tokens : int
        The text is cut into this many equal parts; a prompt is the first tokens of each.
    new_tokens : int, default=64
        Tokens to write; fewer where an end token comes.
    progress : callable, default=None
        Called as ``progress(prompts done, prompts)``.

    Returns
    -------
    Continuations
        With ``repetition``, ``reference_repetition`` and ``kl``.

    Raises
    ------
    ValueError, TypeError
        As for `lowbitq.kl_divergence`, or if the text is too short for the prompts.

    References
    ----------
    S. Welleck et al., "Neural Text Generation With Unlikelihood Training", ICLR 2020 (the share of
    repeated phrases, seq-rep-4).

    Examples
    --------
    A model that counts modulo five, and repeats itself after five tokens:

    >>> from types import SimpleNamespace
    >>> def logits(hidden, out=None):
    ...     return np.roll(hidden, 1, axis=1)
    >>> def hidden(tokens):
    ...     return np.eye(5, dtype=np.float32)[tokens]
    >>> config = SimpleNamespace(
    ...     vocab_size=5, max_positions=99, sliding_window=None, eos_token_ids=()
    ... )
    >>> counting = SimpleNamespace(
    ...     config=config,
    ...     tokenizer=None,
    ...     new_cache=lambda capacity, bits: None,
    ...     step=lambda tokens, cache: logits(hidden(tokens[-1:]))[0],
    ...     hidden=hidden,
    ...     head_logits=logits,
    ... )
    >>> found = continuations(
    ...     counting, counting, np.arange(40) % 5, prompts=2, prompt_tokens=4, new_tokens=13
    ... )
    >>> float(found.repetition), float(found.kl), found.written[0][:6]
    (0.5, 0.0, array([4, 0, 1, 2, 3, 4], dtype=int32))
    """
    for name, count in (("prompts", prompts), ("prompt_tokens", prompt_tokens)):
        check_count(name, count, 1)
    check_count("new_tokens", new_tokens, 1)
    text = settled(text)
    tokens = tokenize(model.tokenizer, text, model.config.vocab_size)
    part = len(tokens) // prompts
    if part < prompt_tokens:
        raise ValueError(
            f"the text has {len(tokens)} tokens, expected at least {prompts * prompt_tokens} for "
            f"{prompts} prompts of {prompt_tokens}"
        )
    check_reference(model, reference, text, prompt_tokens + new_tokens)
    written: tuple[list[Tokens], list[Tokens]] = ([], [])
    shares: tuple[list[float], list[float]] = ([], [])
    divergence: list[NDArray[np.float64]] = []
    for index in range(prompts):
        prompt = tokens[index * part : index * part + prompt_tokens]
        for one, texts, found in zip((model, reference), written, shares, strict=True):
            texts.append(generate(one, prompt, max_new_tokens=new_tokens))
            found.append(repetition(texts[-1]))
        predicted = min(len(written[0][-1]) + 1, new_tokens)  # an end token too
        divergence.append(_divergence(model, reference, prompt, written[0][-1], predicted))
        if progress:
            progress(index + 1, prompts)
    protocol = (
        f"{prompts} greedy continuations of up to {new_tokens} tokens after {prompt_tokens} tokens "
        "of text"
    )
    means = [float(values.mean()) for values in divergence]
    ours, theirs, kl = (
        mean_estimate(Estimate, np.array(values)[:, None], protocol) for values in (*shares, means)
    )
    for estimate, texts in ((ours, written[0]), (theirs, written[1])):
        estimate.tokens = sum(map(len, texts))
    kl.tokens = sum(map(len, divergence))
    return Continuations(ours, theirs, kl, *written)


def repetition(tokens: Tokens, gram: int = _GRAM) -> float:
    """Return the share of phrases of `gram` tokens that have occurred before; 0 if there are none.

    Examples
    --------
    >>> repetition(np.array([1, 2, 3, 1, 2, 3, 1]), gram=3)
    0.4
    """
    if len(tokens) < gram:
        return 0.0
    phrases = np.lib.stride_tricks.sliding_window_view(tokens, gram)
    return 1 - len(np.unique(phrases, axis=0)) / len(phrases)


def _divergence(
    model: Model, reference: Model, prompt: Tokens, written: Tokens, predicted: int
) -> NDArray[np.float64]:
    """KL divergence from the reference of each prediction that wrote a continuation."""
    read = np.concatenate([prompt, written])[: len(prompt) + predicted - 1]
    ours, theirs = (one.head_logits(one.hidden(read)[-predicted:]) for one in (model, reference))
    divergence = np.empty(predicted)
    _core.kl_divergence(theirs, ours, divergence, np.empty(predicted, np.uint8))
    return divergence
