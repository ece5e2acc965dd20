"""Typed signatures of the C module; `python -m mypy.stubtest lowbitq._core` holds them to it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

class NumericalError(ArithmeticError): ...
class FormatError(ValueError): ...

def set_num_threads(*, threads: int) -> None: ...
def use_isa(*, isa: str) -> None: ...
def config() -> dict[str, Any]: ...
def half_to_float(x: NDArray[np.uint16], y: NDArray[np.float32], /) -> None: ...
def bfloat_to_float(x: NDArray[np.uint16], y: NDArray[np.float32], /) -> None: ...
def float_to_half(x: NDArray[np.float32], y: NDArray[np.uint16], /) -> None: ...
def random_bits(out: NDArray[np.uint64], /, *, seed: int, stream: int) -> None: ...
def random_normal(out: NDArray[np.float64], /, *, seed: int, stream: int) -> None: ...
def aligned_empty(*, bytes: int) -> NDArray[np.uint8]: ...
def code(
    levels: NDArray[np.float32] | None,
    /,
    *,
    name: str,
    symmetric: bool,
    scale_bits: int,
    unit: float,
    zero: float,
) -> Any: ...
def codes() -> dict[str, dict[str, Any]]: ...
def quantize(
    code: Any,
    weight: NDArray[np.float32],
    importance: NDArray[np.float32] | None,
    codes: NDArray[np.uint8] | None,
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    /,
    *,
    group: int,
    fixed: bool,
    method: str,
    clip: float,
    percentile: float,
    candidates: int,
    shrink: float,
    norm: float,
) -> None: ...
def quantize_packed(
    code: Any,
    weight: NDArray[np.float32],
    importance: NDArray[np.float32] | None,
    panels: NDArray[np.uint8],
    /,
    *,
    group: int,
    method: str,
    clip: float,
    percentile: float,
    candidates: int,
    shrink: float,
    norm: float,
) -> None: ...
def packed_bytes(
    *, code: str, rows: int, cols: int, group: int, scale_bits: int, symmetric: bool
) -> int: ...
def pack(
    code: Any,
    codes: NDArray[np.uint8],
    scale: NDArray[np.float32] | None,
    offset: NDArray[np.float32] | None,
    panels: NDArray[np.uint8],
    /,
    *,
    rows: int,
    cols: int,
    group: int,
) -> None: ...
def unpack(
    code: Any,
    panels: NDArray[np.uint8],
    codes: NDArray[np.uint8] | None,
    scale: NDArray[np.float32] | None,
    offset: NDArray[np.float32] | None,
    /,
    *,
    rows: int,
    cols: int,
    group: int,
) -> None: ...
def packed_dequantize(
    code: Any, panels: NDArray[np.uint8], weight: NDArray[np.float32], /, *, group: int
) -> None: ...
def check_weight(
    weight: NDArray[np.float32], importance: NDArray[np.float32] | None, /, *, scale_bits: int
) -> None: ...
def kmeans(
    values: NDArray[np.float64],
    weights: NDArray[np.float64] | None,
    levels: NDArray[np.float64],
    /,
) -> None: ...
def entropy_range(
    counts: NDArray[np.float64], kept: NDArray[np.int64], /, *, levels: int
) -> None: ...
def fixed_levels(levels: NDArray[np.float32], /, *, kind: str) -> None: ...
def copy_dense(
    weight: NDArray[np.float32],
    input: Any | None,
    output: Any | None,
    fusion: NDArray[np.float32] | None,
    /,
) -> Any: ...
def copy_rounding(
    weight: NDArray[np.float32],
    input: Any | None,
    output: Any | None,
    fusion: NDArray[np.float32] | None,
    packed: Any,
    values: NDArray[np.float32],
    /,
) -> Any: ...
def round_inputs(
    x: NDArray[np.float32],
    values: NDArray[np.float32],
    y: NDArray[np.float32],
    /,
    *,
    bits: int,
    step: int,
) -> None: ...
def copy_packed(
    code: Any,
    panels: NDArray[np.uint8],
    input: Any | None,
    output: Any | None,
    fusion: NDArray[np.float32] | None,
    sums: NDArray[np.float32] | None,
    basis: Any | None,
    /,
    *,
    rows: int,
    cols: int,
    group: int,
    activation_bits: int,
    activation_clip: float,
    activation_scale: float,
    activation_zero: float,
    zero_per_token: bool,
) -> Any: ...
def linear(
    copies: tuple[Any, ...],
    bias: NDArray[np.float32] | None,
    U: NDArray[np.float32] | None,
    V: NDArray[np.float32] | None,
    /,
) -> Any: ...
def linear_forward(layer: Any, x: NDArray[np.float32], y: NDArray[np.float32], /) -> None: ...
def linears_forward(
    layers: tuple[Any, ...], x: NDArray[np.float32], y: NDArray[np.float32], /
) -> None: ...
def linears_inputs(layers: tuple[Any, ...], /) -> int: ...
def hessian_add(
    x: NDArray[np.float32], weights: NDArray[np.float32] | None, hessian: NDArray[np.float64], /
) -> None: ...
def hessian_error(hessian: NDArray[np.float64], error: NDArray[np.float32], /) -> float: ...
def weight_sums(
    weight: NDArray[np.float32],
    quantized: NDArray[np.float32],
    importance: NDArray[np.float32] | None,
    gradient: NDArray[np.float32] | None,
    /,
) -> dict[str, float]: ...
def input_sums(x: NDArray[np.float32], /, *, tau: float) -> dict[str, Any]: ...
def magnitude_counts(x: NDArray[np.float32], counts: NDArray[np.int64], /) -> None: ...
def moment_add(
    y: NDArray[np.float32],
    x: NDArray[np.float32],
    weights: NDArray[np.float32] | None,
    moment: NDArray[np.float64],
    /,
) -> None: ...
def ridge_solve(
    hessian: NDArray[np.float64], b: NDArray[np.float64], /, *, ridge: float
) -> None: ...
def product(a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64], /) -> None: ...
def leading_eigenvectors(
    matrix: NDArray[np.float64],
    metric: NDArray[np.float64] | None,
    values: NDArray[np.float64],
    vectors: NDArray[np.float64],
    /,
) -> None: ...
def gptq_factor(
    hessian: NDArray[np.float64],
    order: NDArray[np.int64] | None,
    factor: NDArray[np.float32] | NDArray[np.float64],
    /,
    *,
    damping: float,
    median: bool,
) -> dict[str, Any]: ...
def gptq(
    code: Any,
    factor: NDArray[np.float32] | NDArray[np.float64],
    order: NDArray[np.int64] | None,
    start: NDArray[np.float32] | NDArray[np.float64] | None,
    weight: NDArray[np.float32],
    importance: NDArray[np.float32] | None,
    codes: NDArray[np.uint8],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    /,
    *,
    group: int,
    fixed: bool,
    block: int,
    method: str,
    clip: float,
    percentile: float,
    candidates: int,
    shrink: float,
    norm: float,
) -> None: ...
def adaround(
    code: Any,
    hessian: NDArray[np.float64],
    weight: NDArray[np.float32],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    codes: NDArray[np.uint8],
    /,
    *,
    group: int,
    steps: int,
    rate: float,
    strength: float,
) -> float: ...
def refine(
    code: Any,
    hessian: NDArray[np.float64],
    weight: NDArray[np.float32],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    codes: NDArray[np.uint8],
    /,
    *,
    group: int,
    damping: float,
    sweeps: int,
) -> int: ...
def rmsnorm(
    x: NDArray[np.float32],
    gain: NDArray[np.float32] | None,
    y: NDArray[np.float32],
    /,
    *,
    epsilon: float,
) -> None: ...
def swiglu(
    gate: NDArray[np.float32], up: NDArray[np.float32], y: NDArray[np.float32], /
) -> None: ...
def rope(
    x: NDArray[np.float32],
    frequency: NDArray[np.float64],
    gain: NDArray[np.float32] | None,
    /,
    *,
    first: int,
    factor: float,
    epsilon: float,
) -> None: ...
def attention(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    o: NDArray[np.float32],
    /,
    *,
    bits: int,
) -> None: ...
def cross_entropy(
    logits: NDArray[np.float32], target: NDArray[np.int32], nll: NDArray[np.float64], /
) -> None: ...
def kl_divergence(
    p: NDArray[np.float32],
    q: NDArray[np.float32],
    kl: NDArray[np.float64],
    same: NDArray[np.uint8],
    /,
) -> None: ...
def loss_gradient(
    logits: NDArray[np.float32],
    teacher: NDArray[np.float32] | None,
    target: NDArray[np.int32] | None,
    weight: NDArray[np.float32] | None,
    loss: NDArray[np.float64],
    /,
    *,
    forward: float,
    reverse: float,
    jensen_shannon: float,
    cross_entropy: float,
    temperature: float,
) -> None: ...
def draw(
    logits: NDArray[np.float32], uniform: NDArray[np.float64], target: NDArray[np.int32], /
) -> None: ...
def adamw(
    param: NDArray[np.float32],
    gradient: NDArray[np.float32],
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    /,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
    step: int,
) -> None: ...
def square_sum(x: NDArray[np.float32], /) -> float: ...
def code_gradient(
    code: Any,
    panels: NDArray[np.uint8],
    dweight: NDArray[np.float32],
    scale: NDArray[np.float32],
    dscale: NDArray[np.float32] | None,
    doffset: NDArray[np.float32] | None,
    dlevels: NDArray[np.float32] | None,
    /,
    *,
    group: int,
) -> None: ...
def compose(
    code: Any,
    panels: NDArray[np.uint8],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32] | None,
    weight: NDArray[np.float32],
    /,
    *,
    group: int,
) -> None: ...

_Real = NDArray[np.float32]
_Words = NDArray[np.uint8]

# fmt: off
def latent_compose(
    code: Any, latent: _Real, scale: _Real, offset: _Real | None, unit: _Real, weight: _Real, /, *,
    group: int, share: float,
) -> None: ...
def latent_words(
    code: Any, latent: _Real, scale: _Real, offset: _Real | None, unit: _Real, words: _Words, /, *,
    group: int,
) -> None: ...
def latent_gradient(
    code: Any, latent: _Real, scale: _Real, offset: _Real | None, unit: _Real, dweight: _Real,
    dlatent: _Real, dscale: _Real | None, doffset: _Real | None, dlevels: _Real | None, /, *,
    group: int, share: float, clipped: bool,
) -> None: ...
def latent_start(
    code: Any, weight: _Real, words: _Words, scale: _Real, offset: _Real | None, unit: _Real,
    latent: _Real, /, *, group: int,
) -> None: ...
def soft_compose(
    code: Any, V: _Real, lower: _Words, scale: _Real, offset: _Real | None, weight: _Real, /, *,
    group: int, sampled: bool, temperature: float, noise: float, seed: int, stream: int,
) -> None: ...
def soft_gradient(
    code: Any, V: _Real, lower: _Words, scale: _Real, offset: _Real | None, dweight: _Real,
    dV: _Real, dscale: _Real | None, doffset: _Real | None, dlevels: _Real | None, /, *,
    group: int, sampled: bool, temperature: float, noise: float, seed: int, stream: int,
) -> None: ...
def soft_bracket(
    code: Any, weight: _Real, words: _Words, scale: _Real, offset: _Real | None, V: _Real,
    lower: _Words, /, *, group: int, sampled: bool,
) -> None: ...
def soft_words(V: _Real, lower: _Words, words: _Words, /) -> None: ...
def soft_penalty(V: _Real, dV: _Real, /, *, strength: float, beta: float) -> None: ...
# fmt: on

def block(
    attention_norm: NDArray[np.float32] | None,
    mlp_norm: NDArray[np.float32] | None,
    query_norm: NDArray[np.float32] | None,
    key_norm: NDArray[np.float32] | None,
    q_proj: Any,
    k_proj: Any,
    v_proj: Any,
    o_proj: Any,
    gate_proj: Any,
    up_proj: Any,
    down_proj: Any,
    /,
    *,
    attention_scale: float,
    mlp_scale: float,
    rope: bool,
) -> Any: ...
def decoder(
    embedding: Any,
    final_norm: NDArray[np.float32],
    frequency: NDArray[np.float64],
    head: Any,
    rotation: Any,
    blocks: tuple[Any, ...],
    /,
    *,
    heads: int,
    kv_heads: int,
    epsilon: float,
    rope_factor: float,
) -> Any: ...
def decoder_embed(decoder: Any, tokens: NDArray[np.int32], x: NDArray[np.float32], /) -> None: ...
def decoder_block(
    decoder: Any,
    x: NDArray[np.float32],
    qkv: NDArray[np.float32] | None,
    o: NDArray[np.float32] | None,
    mlp: NDArray[np.float32] | None,
    down: NDArray[np.float32] | None,
    log_sum: NDArray[np.float32] | None,
    middle: NDArray[np.float32] | None,
    query: NDArray[np.float32] | None,
    key: NDArray[np.float32] | None,
    value: NDArray[np.float32] | None,
    gate: NDArray[np.float32] | None,
    up: NDArray[np.float32] | None,
    /,
    *,
    block: int,
    steps: int,
) -> None: ...
def decoder_finish(decoder: Any, x: NDArray[np.float32], y: NDArray[np.float32], /) -> None: ...
def decoder_head(decoder: Any, y: NDArray[np.float32], logits: NDArray[np.float32], /) -> None: ...
def decoder_forward(
    decoder: Any,
    tokens: NDArray[np.int32],
    cache: Any | None,
    hidden: NDArray[np.float32] | None,
    logits: NDArray[np.float32] | None,
    moments: NDArray[np.float64] | None,
    /,
    *,
    past: int,
) -> None: ...
def cache(decoder: Any, /, *, capacity: int, bits: int) -> tuple[Any, int]: ...
def hadamard_orders(orders: NDArray[np.int64], /, *, n: int) -> None: ...
def hadamard_base(base: NDArray[np.float32], /) -> None: ...
def orthogonal(q: NDArray[np.float64], /, *, seed: int, stream: int) -> None: ...
def polar(
    matrix: NDArray[np.float64], q: NDArray[np.float64], values: NDArray[np.float64], /
) -> None: ...
def hadamard_rotation(
    orders: NDArray[np.int64], bases: NDArray[np.float32], diagonal: NDArray[np.float32], /
) -> Any: ...
def dense_rotation(matrix: NDArray[np.float32], /) -> Any: ...
def rotate(rotation: Any, x: NDArray[np.float32], /) -> None: ...
def rotate_back(rotation: Any, x: NDArray[np.float32], /) -> None: ...
def rmsnorm_backward(
    x: NDArray[np.float32],
    gain: NDArray[np.float32] | None,
    g: NDArray[np.float32],
    dgain: NDArray[np.float32] | None,
    dx: NDArray[np.float32],
    /,
    *,
    epsilon: float,
) -> None: ...
def swiglu_backward(
    gate: NDArray[np.float32],
    up: NDArray[np.float32],
    g: NDArray[np.float32],
    dgate: NDArray[np.float32],
    dup: NDArray[np.float32],
    /,
) -> None: ...
def attention_map(
    q: NDArray[np.float32], k: NDArray[np.float32], log_sum: NDArray[np.float32], /
) -> Any: ...
def attention_divergence(map: Any, target: Any, divergence: NDArray[np.float64], /) -> None: ...
def attention_backward(
    q: NDArray[np.float32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    g: NDArray[np.float32],
    target: Any,
    dq: NDArray[np.float32],
    dk: NDArray[np.float32],
    dv: NDArray[np.float32],
    /,
    *,
    weight: float,
) -> None: ...
def block_turn(
    decoder: Any, query: NDArray[np.float32], key: NDArray[np.float32], /, *, block: int
) -> None: ...
def copy_gradient(
    dense: NDArray[np.float32] | None,
    fusion: NDArray[np.float32] | None,
    rounding: NDArray[np.float32] | None,
    rotation: NDArray[np.float32] | None,
    /,
) -> Any: ...
def linear_gradient(
    copies: tuple[Any, ...],
    bias: NDArray[np.float32] | None,
    U: NDArray[np.float32] | None,
    V: NDArray[np.float32] | None,
    /,
) -> Any: ...
def linear_backward(
    layer: Any,
    x: NDArray[np.float32],
    g: NDArray[np.float32],
    gradient: Any,
    dx: NDArray[np.float32] | None,
    /,
) -> None: ...
def block_gradient(
    attention_norm: NDArray[np.float32] | None,
    mlp_norm: NDArray[np.float32] | None,
    query_norm: NDArray[np.float32] | None,
    key_norm: NDArray[np.float32] | None,
    q_proj: Any,
    k_proj: Any,
    v_proj: Any,
    o_proj: Any,
    gate_proj: Any,
    up_proj: Any,
    down_proj: Any,
    /,
) -> Any: ...
def block_backward(
    decoder: Any,
    x: NDArray[np.float32],
    o: NDArray[np.float32] | None,
    log_sum: NDArray[np.float32] | None,
    middle: NDArray[np.float32] | None,
    query: NDArray[np.float32] | None,
    key: NDArray[np.float32] | None,
    value: NDArray[np.float32] | None,
    gate: NDArray[np.float32] | None,
    up: NDArray[np.float32] | None,
    gradient: Any,
    q_proj: NDArray[np.float32] | None,
    k_proj: NDArray[np.float32] | None,
    v_proj: NDArray[np.float32] | None,
    o_proj: NDArray[np.float32] | None,
    gate_proj: NDArray[np.float32] | None,
    up_proj: NDArray[np.float32] | None,
    down_proj: NDArray[np.float32] | None,
    target: Any,
    dx: NDArray[np.float32],
    /,
    *,
    block: int,
    weight: float,
) -> None: ...
def embed_backward(
    decoder: Any,
    tokens: NDArray[np.int32],
    dx: NDArray[np.float32],
    dense: NDArray[np.float32],
    /,
) -> None: ...
def finish_backward(
    decoder: Any,
    x: NDArray[np.float32],
    g: NDArray[np.float32],
    final_norm: NDArray[np.float32] | None,
    dx: NDArray[np.float32],
    /,
) -> None: ...
def head_backward(
    decoder: Any,
    y: NDArray[np.float32],
    teacher: Any,
    teacher_hidden: NDArray[np.float32] | None,
    target: NDArray[np.int32] | None,
    uniform: NDArray[np.float64] | None,
    weight: NDArray[np.float32] | None,
    gradient: Any,
    loss: NDArray[np.float64],
    dy: NDArray[np.float32] | None,
    /,
    *,
    forward: float,
    reverse: float,
    jensen_shannon: float,
    cross_entropy: float,
    temperature: float,
) -> None: ...
