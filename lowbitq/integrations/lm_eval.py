"""Models of lowbitq for EleutherAI's evaluation harness, lm-eval, under the name "lowbitq".

    python -m lowbitq.integrations.lm_eval --model lowbitq --model_args path=FOLDER --tasks piqa

is the command `lm_eval` that knows this model too. In Python, importing this module is enough.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lowbitq.likelihoods import log_likelihoods
from lowbitq.models.decoder import Model
from lowbitq.models.loading import load
from lowbitq.models.tokens import check_count

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ImportError(
        "this module needs lm-eval; get it with: pip install 'lowbitq[lm-eval]'"
    ) from error

from tqdm.auto import tqdm

# Options of generate_until: those of `Model.stream`, and others that have no effect at this value.
_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
_NEUTRAL = {"num_beams": 1}


@register_model("lowbitq")
class LowbitqLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A model for tasks of lm-eval.

    Requests are sorted, so that contexts which they begin with in common are run once.

    Parameters
    ----------
    path : str, path-like or Model
        What `lowbitq.load` reads, or a model in memory. It needs a tokenizer.
    bits : float, default=None
        As for `lowbitq.load`: only the first copies of a progressive model.
    max_length : int, default=None
        Tokens that the model reads at most; longer contexts are cut from the left, with a warning.
        None: all positions of the model, or its sliding window.
    max_gen_toks : int, default=256
        New tokens of tasks that do not say how many.
    seed : int, default=0
        Of tasks that sample. Equal seeds give equal answers to equal requests.
    batch_size, max_batch_size, device
        lm-eval passes them, cuda:0 unless told otherwise. They change nothing: sequences run one
        after the other, on the CPU.

    Raises
    ------
    ValueError
        If the model has no tokenizer, or an argument is out of range.

    Examples
    --------
    >>> import lm_eval
    >>> from lowbitq.integrations.lm_eval import LowbitqLM
    >>> lm_eval.simple_evaluate(LowbitqLM("smollm2-3bit"), tasks=["piqa"])  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Model,
        *,
        bits: float | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(path, Model):
            self.model, self._name = path, repr(path)
        else:
            self._name = os.fspath(path)
            self.model = load(path) if bits is None else load(path, bits=bits)
        if self.model.tokenizer is None:
            raise ValueError(f"{self._name} has no tokenizer, so it cannot read text")
        self.tokenizer = self.model.tokenizer
        self._ends = (*self.tokenizer.eos_ids, *self.model.config.eos_token_ids)
        self.max_length = _length(self.model, max_length)
        check_count("max_gen_toks", max_gen_toks, 1)
        self.max_gen_toks = max_gen_toks
        check_count("seed", seed, 0)
        self._generator = np.random.default_rng(seed)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if not self._ends:
            raise ValueError(f"{self._name} names no token that ends a text")
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context: BOS, or else EOS."""
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What tells the requests of this model from those of others in lm-eval's cache."""
        return self._name.replace(os.sep, "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text; None begins it as the model's tokenizer does."""
        begins = add_special_tokens is not False and self.tokenizer.adds_bos
        tokens: list[int] = self.tokenizer.encode(
            string, add_bos=None if begins else False
        ).tolist()
        return tokens

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation; without a generation prompt, its last message is left open."""
        text = self.tokenizer.chat(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        found = text.rfind(last)
        return text if found < 0 else text[: found + len(last)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Score (key of lm-eval's cache or None, context, continuation)."""
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        short = sum(
            len(pair[0]) < len(context)
            for pair, (_, context, _) in zip(pairs, requests, strict=True)
        )
        if short:
            warnings.warn(
                f"the contexts of {short} of {len(pairs)} requests are cut from the left to "
                f"{self.max_length} tokens",
                stacklevel=3,
            )
        found: list[Any] = [None] * len(pairs)
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for number, scored in log_likelihoods(self.model, pairs):
                found[number] = tuple(scored)
                key = requests[number][0]
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, found[number])
                bar.update()
        return found

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Cut a context from the left, so that all but the last token can be read."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, but the model reads at most "
                f"{self.max_length}"
            )
        return context[-room:], continuation

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts, in windows that predict each token once, as lm-eval cuts them."""
        texts = [text for (text,) in (request.args for request in requests)]
        owners: list[int] = []
        windows: list[tuple[None, list[int], list[int]]] = []
        for number, text in enumerate(texts):
            for pair in self._rolling(text):
                owners.append(number)
                windows.append((None, *pair))
        found = [0.0] * len(texts)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (nats, _) in zip(owners, scored, strict=True):
            found[owner] += nats
        for text, nats in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), nats)
        return found

    def _rolling(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        yield from map(make_disjoint_window, windows)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until a stop string, an end token or `max_gen_toks` tokens."""
        found = []
        for context, options in tqdm(
            [request.args for request in requests], desc="continuations", disable=disable_tqdm
        ):
            found.append(self._continue(context, options))
            self.cache_hook.add_partial("generate_until", (context, options), found[-1])
        return found

    def _continue(self, context: str, options: Mapping[str, Any]) -> str:
        """Return one continuation, without the stop string that ended it."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
        until, count = given.pop("until"), given.pop("max_gen_toks")
        if count >= self.max_length:
            raise ValueError(
                f"max_gen_toks is {count}, but the model reads at most {self.max_length} tokens"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        prompt = np.array(tokens[count - self.max_length :], np.int32)
        sampling = {name: v for name, v in given.items() if name in _SAMPLING and v is not None}
        for name in given.keys() - _SAMPLING - {"do_sample"}:
            if given[name] != _NEUTRAL.get(name):
                raise ValueError(f"generation has the option {name}={given[name]!r}: unknown")
        seed = int(self._generator.integers(2**31))
        with self.model.stream(prompt, max_new_tokens=count, seed=seed, **sampling) as new:
            text = ""
            for piece in self.tokenizer.stream(new, after=prompt, skip_special=True):
                text += piece
                if ends := [text.find(stop) for stop in until if stop and stop in text]:
                    return text[: min(ends)]
        return text


def _length(model: Model, asked: int | None) -> int:
    """Return how many tokens a model reads at most."""
    window = model.config.sliding_window
    longest = min(model.config.max_positions, window or model.config.max_positions)
    if asked is None:
        return longest
    check_count("max_length", asked, 2)
    if asked > longest:
        raise ValueError(f"max_length is {asked}, but the model reads at most {longest} tokens")
    return asked


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
