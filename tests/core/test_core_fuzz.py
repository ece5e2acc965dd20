"""Random calls of every function of _core, made from its argument tables and then damaged.

Every call ends with a result or with one of four exceptions, writes only its outputs, and leaves
its inputs unchanged. Under sanitizers the same calls find errors that are silent otherwise.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import argument_tables
import numpy as np
import pytest
from packed_parts import dense_layer, description, packed_bytes, packed_copy

from lowbitq import NumericalError, _core

ALLOWED = (TypeError, ValueError, MemoryError, NumericalError)
TABLES = argument_tables.read_tables()
CODES = _core.codes()
SIZES = [1, 2, 3, 5, 7, 8, 16, 17, 31, 32, 33, 64, 96]
TEXTS = [
    "mse",
    "minmax",
    "percentile",
    "nf",
    "log",
    "portable",
    "avx2",
    "avx512",
    "",
    "\0",
    "x" * 999,
]
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 1e-30, 3e38, -3e38]
# Numbers that decide how long a call takes.
LASTING = {"steps": 9, "sweeps": 9, "candidates": 30, "threads": 4, "capacity": 99, "first": 99}
# Values that are more likely to fit the others than random ones.
USUAL = {"heads": [4], "kv_heads": [2], "block": [0, 1]}
USUAL |= {"levels": [1, 2, 3], "bits": [1, 2, 3, 4, 8], "scale_bits": [0, 4, 8, 16, 16, 16]}
USUAL |= {"activation_bits": [0, 4, 8], "group": [16, 32, 64, 128, 2**40], "past": [0, 1, 30]}
GUARD = 64

HIDDEN, FEED_FORWARD, VOCAB, HEAD = 32, 48, 20, 8


def code(name: str, scale_bits: int, symmetric: bool) -> tuple[Any, dict[str, Any]]:
    about = CODES[name]
    ascending = np.linspace(-1, 1, about["level_count"], dtype=np.float32)
    stored = {"scale_bits": scale_bits, "symmetric": symmetric}
    made = _core.code(
        None if about["table"] == "none" else ascending,
        name=name,
        unit=0.5,
        zero=about["zero"],
        **stored,
    )
    return made, {"stored": {"code": name, **stored}, "block": (about["rows"], about["cols"])}


def dense(rows: int, cols: int) -> tuple[Any, dict[str, int]]:
    weight = np.random.default_rng([rows, cols]).standard_normal((rows, cols), np.float32)
    return dense_layer(weight, None, None), {"r": rows, "k": cols}


def packed(bits: int, activation_bits: int) -> tuple[Any, dict[str, int]]:
    """A copy."""
    spec = description(HIDDEN, HIDDEN, bits, 32, has_offset=True)
    panels = _core.aligned_empty(bytes=packed_bytes(spec))
    panels[:] = np.random.default_rng(bits).integers(0, 60, len(panels))
    return packed_copy(panels, spec, bits=activation_bits), {"r": HIDDEN, "k": HIDDEN}


def layer_of(copy: Any, extent: dict[str, int]) -> tuple[Any, dict[str, int]]:
    return _core.linear((copy,), None, None, None), extent


def block() -> Any:
    shapes = [(HIDDEN, HIDDEN), (16, HIDDEN), (16, HIDDEN), (HIDDEN, HIDDEN)]
    shapes += [(FEED_FORWARD, HIDDEN), (FEED_FORWARD, HIDDEN), (HIDDEN, FEED_FORWARD)]
    gains = np.ones(HIDDEN, np.float32), None, np.ones(HEAD, np.float32), None
    layers = (dense(*shape)[0] for shape in shapes)
    return _core.block(*gains, *layers, attention_scale=1.0, mlp_scale=1.0, rope=True)


def decoder(blocks: tuple[Any, ...], rotation: Any) -> tuple[Any, dict[str, int]]:
    made = _core.decoder(
        *(dense(VOCAB, HIDDEN)[0], np.ones(HIDDEN, np.float32), np.ones(HEAD // 2), None),
        *(rotation, blocks),
        heads=4,
        kv_heads=2,
        epsilon=1e-5,
        rope_factor=1.0,
    )
    return made, {"h": HIDDEN, "a": HIDDEN, "i": FEED_FORWARD, "v": VOCAB}


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def gradients() -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    """Handles of arrays that take gradients."""
    shapes = [(HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (VOCAB, HIDDEN)]
    copies = [
        (_core.copy_gradient(zeros(*s), zeros(s[0]), None, None), {"r": s[0], "k": s[1]})
        for s in shapes
    ]
    empty = _core.linear_gradient((_core.copy_gradient(None, None, None, None),), None, None, None)
    layers = [(_core.linear_gradient((one,), zeros(n["r"]), None, None), n) for one, n in copies]
    nothing = [None] * 7
    blocks = [
        _core.block_gradient(zeros(HIDDEN), None, zeros(HEAD), None, *nothing),
        _core.block_gradient(None, None, None, None, layers[0][0], *nothing[1:]),
    ]
    return {
        "copy_gradient": copies,
        "linear_gradient": [*layers, (empty, {"r": HIDDEN, "k": HIDDEN})],
        "block_gradient": [(one, {}) for one in blocks],
    }


def attention_map(tokens: int) -> tuple[Any, dict[str, int]]:
    rng = np.random.default_rng(tokens)
    q, k = (rng.standard_normal((tokens, heads, HEAD), np.float32) for heads in (4, 2))
    return _core.attention_map(q, k, np.full((tokens, 4), 9, np.float32)), {"t": tokens}


class Calls:
    """Random calls; equal seeds make equal calls."""

    def __init__(self) -> None:
        eye = _core.dense_rotation(np.eye(HIDDEN, dtype=np.float32))
        blocks = (block(), block())
        decoders = [decoder(blocks, None), decoder(blocks, eye), decoder((), None)]
        # Handles of each kind, and the sizes of axes that go with them.
        self.handles: dict[str, list[tuple[Any, dict[str, Any]]]] = {
            "code": [code(name, bits, True) for name in CODES for bits in (16, 8, 4, 0)]
            + [
                code(name, bits, False)
                for name in CODES
                for bits in (16, 0)
                if CODES[name]["offsets"]
            ],
            "linear": [dense(HIDDEN, HIDDEN), dense(VOCAB, HIDDEN), dense(1, 1)]
            + [
                layer_of(*packed(bits, activations))
                for bits in (1, 2, 3, 4, 8)
                for activations in (0, 4, 8)
            ],
            "copy": [
                (_core.copy_dense(np.ones(s, np.float32), None, None, None), {"r": s[0], "k": s[1]})
                for s in ((HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (VOCAB, HIDDEN))
            ]
            + [packed(4, activations) for activations in (4, 8)],
            **gradients(),
            "rotation": [(eye, {"n": HIDDEN})],
            "block": [(made, {}) for made in blocks],
            "decoder": decoders,
            "attention_map": [attention_map(tokens) for tokens in (1, 17, 17, 17, 130)],
            "cache": [
                (_core.cache(made, capacity=40, bits=bits)[0], {})
                for made, _ in decoders
                for bits in (8, 32)
            ],
        }

    def make(self, r: random.Random, name: str) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments that fit the table, and mostly each other."""
        table = TABLES[name]
        self.memory: list[np.ndarray] = []  # of the arrays, with the guards around them
        keywords = {a.name: self.scalar(r, a) for a in table if a.kind in SCALARS}
        sizes: dict[str, Any] = {str(digit): digit for digit in range(10)}
        given: dict[str, Any] = {}
        for a in table:
            if a.kind == "HANDLES":
                chosen = [
                    r.choice(self.handles[a.what])
                    for _ in range(r.choice([0, 1, 2, 8] if r.random() < 0.9 else [9]))
                ]
                given[a.name] = tuple(handle for handle, _ in chosen)
                sizes |= chosen[0][1] if chosen else {}
                sizes["e"] = sum(extent.get("r", 0) for _, extent in chosen)
            elif a.kind == "HANDLE":
                among = self.handles[a.what]
                if name == "linear_backward" and r.random() < 0.5:
                    among = among[:1]  # a dense layer and gradients of its shape
                if name == "head_backward" and a.what == "linear_gradient":
                    among = among[-2:]  # of the head, or none
                handle, extent = r.choice(among)
                given[a.name] = None if a.or_none and r.random() < 0.8 else handle
                sizes |= extent
        letters = {c for a in table for c in a.shape if c != "*"}
        may_be_empty = {c for a in table for c in a.shape if c + "*" in a.shape}
        for letter in sorted(letters - set(sizes)):
            empty = letter in may_be_empty and r.random() < 0.1
            sizes[letter] = 0 if empty else r.choice(SIZES)
        self.relate(r, name, sizes, keywords)
        for a in table:
            if a.kind in ARRAYS:
                absent = a.or_none and r.random() < 0.25
                if name == "head_backward" and a.name in ("uniform", "teacher_hidden"):
                    absent = r.random() < 0.9
                if name == "pack":
                    absent = r.random() < 0.05
                if a.name == "V" and "U" in given and r.random() < 0.9:  # with U or not at all
                    absent = given["U"] is None
                if name == "code" and keywords["name"] in CODES and r.random() < 0.9:
                    absent = CODES[keywords["name"]]["table"] == "none"
                given[a.name] = None if absent else self.array(r, a, sizes)
        return [given[a.name] for a in table if a.kind not in SCALARS], keywords

    @staticmethod
    def relate(
        r: random.Random, name: str, sizes: dict[str, Any], keywords: dict[str, Any]
    ) -> None:
        """Set the sizes that follow from others: letters mean the same in every table."""
        if r.random() < 0.05:
            return
        sizes["r"] = keywords.get("rows", sizes.get("r", 1))
        sizes["k"] = keywords.get("cols", sizes.get("k", 1))
        rows, cols = sizes.get("block", (1, 1))
        sizes["R"] = -(-sizes["r"] // rows) * rows
        sizes["K"] = -(-sizes["k"] // cols) * cols
        stored = sizes.get("stored", keywords)
        if "symmetric" in keywords and r.random() < 0.9:
            keywords["symmetric"] = keywords["scale_bits"] != 16 or r.random() < 0.5
        if "group" in keywords:
            keywords["group"] = keywords["group"] if stored["scale_bits"] else 2**40
            sizes["g"] = -(-sizes["k"] // keywords["group"])
        if "stored" in sizes:
            size = {"rows": sizes["r"], "cols": sizes["k"], "group": keywords["group"]}
            try:
                sizes["b"] = _core.packed_bytes(**size, **stored)
            except ValueError:
                sizes["b"] = 64
        if name == "code":
            sizes["l"] = CODES.get(keywords["name"], {"level_count": 1})["level_count"]
        if name in ("code_gradient", "latent_gradient", "soft_gradient"):
            sizes["l"] = CODES[stored["code"]]["level_count"]
        if name in ("kmeans", "fixed_levels"):
            sizes["l"] = r.choice([2, 4, 16])
        if name == "magnitude_counts":
            sizes["b"] = 1 << 15
        if name == "decoder":
            sizes |= {"h": HIDDEN, "f": HEAD // 2}
        if name in ("decoder_block", "block_backward", "block_turn"):
            sizes |= {"n": 4, "q": HIDDEN, "k": 16}
        if name == "head_backward":
            sizes |= {"k": HIDDEN}
            keywords |= dict.fromkeys(("forward", "reverse", "jensen_shannon"), 0.0)
        if name == "attention_map":
            sizes["h"] = sizes["j"] * r.choice([1, 2, 3])
        if name == "attention_backward":
            sizes["j"] = r.choice([1, 2, 4])
        if name in ("attention_backward", "attention_divergence"):
            sizes["h"] = 4
        if name == "decoder_forward":
            sizes["r"] = r.choice([0, 1, sizes["t"]])
            sizes["b"] = 2  # blocks
        if name == "round_inputs":
            keywords |= {"bits": r.choice([4, 8]), "step": r.choice([16, 32, 64, 128])}
        if name == "hadamard_rotation":
            sizes |= {"m": 1, "n": 12 * r.choice([1, 2, 32]), "b": 288}
        if name == "rope":
            sizes["d"] = 2 * sizes["f"]
        if name == "attention":
            sizes["s"] = sizes["t"] + r.choice([0, 1, 30])
            sizes["h"] = sizes["j"] * r.choice([1, 2, 3])
        if name == "linears_forward":
            sizes["e"] *= sizes["t"]

    @staticmethod
    def scalar(r: random.Random, a: argument_tables.Argument) -> Any:
        if a.kind == "TEXT":
            words = {"method": TEXTS[:3], "kind": ["nf", "log"], "isa": TEXTS[5:8]}
            words |= {"name": list(CODES), "code": list(CODES)}
            return r.choice(words[a.name] if r.random() < 0.9 else TEXTS)
        if a.kind == "BOOL":
            return r.random() < 0.5
        if a.kind == "FLOAT":
            common = (0.0, 1e-5, 0.01, 0.5, 1.0, 2.0, 99.0)
            return r.choice([x for x in common if a.low <= x <= a.high])
        usual = [x for x in USUAL.get(a.name, []) if a.low <= x <= a.high]
        if usual and r.random() < 0.9:
            return r.choice(usual)
        most = min(a.high, LASTING.get(a.name, 130))
        return r.randint(int(a.low), max(int(a.low), int(most)))

    def array(
        self, r: random.Random, a: argument_tables.Argument, sizes: dict[str, int]
    ) -> np.ndarray:
        """An array between guard bytes."""
        wide = r.choice(["float32", "float64"])
        dtype = np.dtype(wide if a.what == "float32_or_64" else a.what)
        shape = tuple(sizes[c] for c in a.shape if c != "*")
        rng = np.random.default_rng(r.randrange(2**32))
        if a.name == "order":
            values = rng.permutation(shape[0])
        elif a.name == "orders":
            values = np.full(shape, 12)
        elif dtype.kind == "f" and len(set(a.shape)) < len(a.shape.replace("*", "")):
            root = rng.standard_normal(shape)
            values = root @ root.T + np.eye(shape[0])
        elif dtype.kind == "f":
            values = rng.standard_normal(shape)
            values = np.sort(values) if a.name == "levels" else values
            values = abs(values) if a.name in ("counts", "weights", "importance") else values
            values = values.astype("f2") if a.name in ("scale", "offset") else values
            values = values % 1 if a.name in ("uniform", "values") else values
        else:
            values = rng.integers(0, r.choice([2, 2, 16, 20, 120]), shape)
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.full(GUARD + size + GUARD, 0xA5, np.uint8)
        self.memory.append(memory)
        result = memory[GUARD : GUARD + size].view(dtype).reshape(shape)
        result[...] = values
        return result

    def damage(self, r: random.Random, args: list[Any], keywords: dict[str, Any]) -> None:
        arrays = [i for i, value in enumerate(args) if isinstance(value, np.ndarray)]
        if arrays and r.random() < 0.6:
            i = r.choice(arrays)
            args[i] = damaged(r, args[i], args[r.choice(arrays)])
        elif keywords and r.random() < 0.6:
            key = r.choice(list(keywords))
            huge = [0, -1, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 2**70]
            odd = [True, None, "x", 1.5, np.int64(3), float("nan"), float("inf"), 1e300, -1e-300]
            keywords[key] = r.choice([*huge, *odd, *TEXTS, "\ud800"])
            if key in LASTING and isinstance(keywords[key], int):
                keywords[key] = min(keywords[key], LASTING[key])
        elif args and r.random() < 0.6:
            every = [handle for kind in self.handles.values() for handle, _ in kind]
            args[r.randrange(len(args))] = r.choice([*every, None, (), (None,), tuple(every), 5])
        elif r.random() < 0.5:
            args[len(args) :] = [None]
        else:
            keywords["another"] = 1


SCALARS = ("INT", "FLOAT", "BOOL", "TEXT")
ARRAYS = ("IN", "OUT", "INOUT")


def damaged(r: random.Random, a: np.ndarray, other: np.ndarray) -> Any:
    """One thing that is wrong, or odd, about an array."""
    kind = r.randrange(9)
    if type(a) is not np.ndarray or a.ndim == 0 or not a.flags.carray:
        return a
    if kind == 0:
        return a.astype(r.choice(["f4", "f8", "u1", "i4", "i8", "f2", "?", a.dtype.newbyteorder()]))
    if kind == 1:
        shape = list(a.shape)
        shape[r.randrange(len(shape))] += r.choice([-1, 1, 5, -shape[-1]])
        return np.zeros([max(0, size) for size in shape], a.dtype)
    if kind == 2:
        return a[..., None] if r.random() < 0.5 else a.reshape(-1)
    if kind == 3:
        return np.zeros([2 * size for size in a.shape], a.dtype)[
            tuple(slice(None, None, 2) for _ in a.shape)
        ]
    if kind == 4:
        unaligned = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
        unaligned[...] = a
        return unaligned
    if kind == 5:
        a = a.copy()
        a.flags.writeable = False
        return a
    if kind == 6 and other.nbytes >= a.nbytes and other.flags.c_contiguous:
        return other.reshape(-1).view(np.uint8)[: a.nbytes].view(a.dtype).reshape(a.shape)
    if kind == 7:
        return r.choice([None, a.T, a.tolist(), np.ma.array(a), 5])
    if a.size and a.dtype.kind == "f":
        a.reshape(-1)[:: r.choice([1, 3, 100])] = r.choice(SPECIAL)
    elif a.size and a.dtype.kind in "iu":
        a.reshape(-1)[r.randrange(a.size)] = r.choice(
            [np.iinfo(a.dtype).max, np.iinfo(a.dtype).min]
        )
    return a


def described(value: Any) -> str:
    is_array = isinstance(value, np.ndarray)
    return f"{value.dtype}{value.shape}" if is_array else repr(value)[:80]


def run(calls: Calls, seed: int, outcomes: Counter[tuple[str, str]]) -> None:
    r = random.Random(seed)
    name = sorted(TABLES)[seed % len(TABLES)]
    args, keywords = calls.make(r, name)
    with np.errstate(all="ignore"):
        for _ in range(r.choice([0, 1, 1, 1, 2, 3])):
            calls.damage(r, args, keywords)
    table = [a for a in TABLES[name] if a.kind not in SCALARS]
    given = [(a.kind, v) for a, v in zip(table, args, strict=False) if isinstance(v, np.ndarray)]
    inputs = [value for kind, value in given if kind == "IN"]
    outputs = [value for kind, value in given if kind != "IN"]
    before = [value.tobytes() for value in inputs]
    what = f"seed {seed}: {name}({', '.join(map(described, args))}, {keywords})"
    try:
        getattr(_core, name)(*args, **keywords)
        outcome = "result"
    except ALLOWED as error:
        outcome = type(error).__name__
    outcomes[name, outcome] += 1
    for memory in calls.memory:
        assert (memory[:GUARD] == 0xA5).all(), f"wrote before an array: {what}"
        assert (memory[-GUARD:] == 0xA5).all(), f"wrote behind an array: {what}"
    for value, bytes_before in zip(inputs, before, strict=True):
        if not any(np.shares_memory(value, output) for output in outputs):
            assert value.tobytes() == bytes_before, f"changed an input: {what}"


@pytest.fixture
def settings(threads):
    """Restore threads and instruction set, which some of the calls change."""
    isa = _core.config()["isa"]
    _core.set_num_threads(threads=2)
    yield
    _core.use_isa(isa=isa)


def test_tables_are_those_of_the_functions():
    functions = {name for name in dir(_core) if callable(getattr(_core, name)) and name[0] != "_"}
    assert set(TABLES) == functions - {"NumericalError", "FormatError"}
    for name, table in TABLES.items():
        signature = getattr(_core, name).__text_signature__ or ""
        assert all(f"{a.name}" in signature for a in table), name


@pytest.mark.parametrize("count", [9000, pytest.param(20000, marks=pytest.mark.slow)])
def test_random_calls_end_in_order(settings, count):
    calls = Calls()
    outcomes: Counter[tuple[str, str]] = Counter()
    for seed in range(count):
        run(calls, seed, outcomes)
    for name in TABLES:
        assert outcomes[name, "result"] >= 5, f"{name} is hardly ever called as it should be"
