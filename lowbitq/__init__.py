"""Language models in 1 to 4 bits: quantize, run and evaluate them on a CPU, without PyTorch.

    model = lq.load(lq.demo_model())               a GGUF file, a Hugging Face folder, a saved model
    small = lq.compress(model, "int3g64", text=text)  rotate, then round block by block
    print(small.report(), lq.evaluate(small, held_out, reference=model))
    small.save("folder"), lq.export(small, "small.gguf", "gguf")

Models         load, demo_model, rotate, rotate_inputs, repeat_blocks; Model, QuantizedModel,
               Block, Linear, QuantizedLinear, ModelConfig, Tokenizer
Quantizing     calibrate, plan, prices, compress, search, enhance, export; Plan, LayerPlan,
               CopyPlan, Rounding, Statistics
Measuring      evaluate, perplexity, kl_divergence, agreement, continuations, analyze
Sensitivity    sensitivity, linearity, importance, weights_for_bits
Training       distill, reconstruct, range_test; Hints
Activations    massive_activations, learn_normal; Moments, Detector, OnlineModel
One matrix     quantize, dequantize, gptq, adaround, kmeans, hessian; Format, QuantizedTensor
Rotations      hadamard, procrustes, optimize_rotation, optimize_copies, choose_rotations,
               residual_inputs, score_rotation; Rotation
Texts          windows, demo_texts
This machine   show_config, set_num_threads

Functions of arrays take float64, float16, bfloat16, any memory order, lists, and tensors of torch.
`lowbitq --help` has the same verbs for the command line.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import textwrap
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The library that _core links to; none of its own in a build with LOWBITQ_BLAS=system. Importing
# the package, which reads its own metadata, takes a tenth of the time that all of lowbitq does.
if (_found := find_spec("scipy_openblas32")) is not None and _found.origin is not None:
    for _library in Path(_found.origin).parent.glob("lib/libscipy_openblas*.so"):
        ctypes.CDLL(str(_library))
try:
    from lowbitq._core import FormatError, NumericalError
except ImportError as error:
    raise ImportError(
        f"the C module lowbitq._core cannot be loaded ({error}); in a source tree, build it with: "
        "pip install -e ."
    ) from error
except ValueError as error:  # LOWBITQ_NUM_THREADS or LOWBITQ_ISA has a bad value
    # The command line says an error in one line; this one comes before it is there.
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    if program == "lowbitq" or (program == "-m" and "lowbitq" in sys.orig_argv):
        raise SystemExit(f"lowbitq: {error}") from None
    raise
from lowbitq import _core
from lowbitq.analysis import analyze
from lowbitq.budgets import BudgetPlan, plan
from lowbitq.calibration import Statistics, calibrate
from lowbitq.compression import compress
from lowbitq.demo import demo_model, demo_texts
from lowbitq.distillation import distill
from lowbitq.enhancement import Enhanced, enhance
from lowbitq.estimates import Divergence, Estimate, Evaluation, Perplexity
from lowbitq.evaluation import agreement, evaluate, kl_divergence, perplexity
from lowbitq.exports import Export, export
from lowbitq.formats import Format
from lowbitq.free_running import Continuations, continuations
from lowbitq.hints import Hints
from lowbitq.importance import importance
from lowbitq.joint_rotations import JointRotations, optimize_copies
from lowbitq.linearity import linearity
from lowbitq.linears import Linear, QuantizedLinear
from lowbitq.massive import MassiveActivations, massive_activations
from lowbitq.matrices import gptq, hessian, kmeans
from lowbitq.models import Block, Model, ModelConfig, QuantizedModel, Tokenizer, load
from lowbitq.models.rotating import rotate, rotate_inputs
from lowbitq.monitoring import Detector, Moments, OnlineModel, learn_normal
from lowbitq.plan_options import Rounding
from lowbitq.plans import CopyPlan, LayerPlan, Plan
from lowbitq.prices import Prices, prices
from lowbitq.procrustes import OptimizedRotation, optimize_rotation, procrustes
from lowbitq.quantizers import adaround, dequantize, quantize
from lowbitq.range_test import range_test
from lowbitq.reconstruction import reconstruct
from lowbitq.rotation_choice import ChosenRotations, choose_rotations, residual_inputs
from lowbitq.rotation_scores import RotationScore, score_rotation
from lowbitq.rotations import Rotation, hadamard
from lowbitq.scores import Sensitivity, weights_for_bits
from lowbitq.search import search
from lowbitq.sensitivity import sensitivity
from lowbitq.serial_copies import repeat_blocks
from lowbitq.tensors import QuantizedTensor
from lowbitq.texts import windows
from lowbitq.version import __version__ as __version__

__all__ = [
    "Block",
    "BudgetPlan",
    "ChosenRotations",
    "Continuations",
    "CopyPlan",
    "Detector",
    "Divergence",
    "Enhanced",
    "Estimate",
    "Evaluation",
    "Export",
    "Format",
    "FormatError",
    "Hints",
    "JointRotations",
    "LayerPlan",
    "Linear",
    "MassiveActivations",
    "Model",
    "ModelConfig",
    "Moments",
    "NumericalError",
    "OnlineModel",
    "OptimizedRotation",
    "Perplexity",
    "Plan",
    "Prices",
    "QuantizedLinear",
    "QuantizedModel",
    "QuantizedTensor",
    "Rotation",
    "RotationScore",
    "Rounding",
    "Sensitivity",
    "Statistics",
    "Tokenizer",
    "adaround",
    "agreement",
    "analyze",
    "calibrate",
    "choose_rotations",
    "compress",
    "continuations",
    "demo_model",
    "demo_texts",
    "dequantize",
    "distill",
    "enhance",
    "evaluate",
    "export",
    "gptq",
    "hadamard",
    "hessian",
    "importance",
    "kl_divergence",
    "kmeans",
    "learn_normal",
    "linearity",
    "load",
    "massive_activations",
    "optimize_copies",
    "optimize_rotation",
    "perplexity",
    "plan",
    "prices",
    "procrustes",
    "quantize",
    "range_test",
    "reconstruct",
    "repeat_blocks",
    "residual_inputs",
    "rotate",
    "rotate_inputs",
    "score_rotation",
    "search",
    "sensitivity",
    "set_num_threads",
    "show_config",
    "weights_for_bits",
    "windows",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__version__"])


def set_num_threads(threads: int) -> None:
    """Choose how many threads lowbitq uses.

    The default is the environment variable ``LOWBITQ_NUM_THREADS``, or else the number of CPUs that
    the process may use. Results do not depend on it.

    Parameters
    ----------
    threads : int
        1 to 256, the calling thread included.

    Raises
    ------
    ValueError
        If `threads` is out of range.

    Examples
    --------
    >>> before = show_config()["threads"]
    >>> set_num_threads(1)
    >>> show_config()["threads"]
    1
    >>> set_num_threads(before)
    """
    _core.set_num_threads(threads=threads)


class _Configuration(dict[str, Any]):
    """A dict whose repr has one entry per line; long entries are wrapped."""

    def __repr__(self) -> str:
        lines = []
        for name, value in self.items():
            if isinstance(value, dict):
                isas = sorted(set(value.values()))
                value = "; ".join(
                    f"{i}: {', '.join(k for k in value if value[k] == i)}" for i in isas
                )
            lines.append(textwrap.fill(f"{name:9} {value}", 80, subsequent_indent=" " * 10))
        return "\n".join(lines)


def show_config() -> dict[str, Any]:
    """Version, CPU, instruction set, threads, BLAS and kernels in use.

    Returns
    -------
    dict
        ``version``; ``cpu``, its model name; ``isa``, the instruction set in use, and ``cpu_isa``,
        the best of this machine; ``threads`` in use and ``cpus`` that the process may use;
        ``blas``, its name, version and build, and ``blas_core``, the CPU that its kernels target;
        ``kernels``, the instruction set of each kernel in use, by name. Its repr has one entry per
        line.

    Examples
    --------
    >>> config = show_config()
    >>> config["isa"] in ("portable", "avx2", "avx512")
    True
    >>> config["kernels"]["gemv_u2_i8"] == config["isa"]
    True
    >>> print(config)  # doctest: +ELLIPSIS
    version   ...
    cpu       ...
    isa       ...
    cpu_isa   ...
    threads   ...
    cpus      ...
    blas      ...
    blas_core ...
    kernels   ...
    """
    return _Configuration({"version": __version__, "cpu": _cpu(), **_core.config()})


@cache
def _cpu() -> str:
    """Model name of the first CPU."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
