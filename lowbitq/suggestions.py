"""The known word that a user most likely meant by an unknown one."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a remark for an error message, or nothing if no known word is similar.

    Examples
    --------
    >>> did_you_mean("quantise", ["inspect", "quantize"])
    " (did you mean 'quantize'?)"
    >>> did_you_mean("xyz", ["inspect", "quantize"])
    ''
    """
    from difflib import get_close_matches  # here, because few programs need it

    if not (found := get_close_matches(word.lower(), list(known), n=3)):
        return ""
    # Of nf4 and nf4g32, which are equally similar to nf3, it is nf4.
    return f" (did you mean {min(found, key=lambda one: abs(len(one) - len(word)))!r}?)"
