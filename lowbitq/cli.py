"""The command line: its commands and their arguments; `lowbitq.commands` carries them out.

Results go to standard output, as text or with --json as one JSON object; progress and errors go to
standard error. Exit codes: 0 ok, 1 error, 2 usage, 3 model unsupported, 4 interrupted (the message
says whether the same command resumes the work), 5 verification failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lowbitq as lq
from lowbitq import (
    arguments,
    arguments_generation,
    commands,
    commands_choosing,
    commands_generation,
    commands_serving,
)
from lowbitq.arguments import Parser
from lowbitq.budgets import FORMATS
from lowbitq.commands import ERROR, INTERRUPTED, Command, CommandError
from lowbitq.exports import TARGETS
from lowbitq.models.plain import DTYPES
from lowbitq.optimizers import RATES
from lowbitq.plans import PRESETS
from lowbitq.reconstruction import INPUTS
from lowbitq.roundings import METHODS
from lowbitq.scores import LEVELS
from lowbitq.search import SAMPLERS, TERMS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, default=None
        None: the arguments of the process.

    Returns
    -------
    int
        The exit code. argparse itself exits with 2 on a usage error.

    Examples
    --------
    >>> main(["inspect", "absent.gguf"])
    1
    """
    options = _parser().parse_args(arguments)
    try:
        if options.threads:
            lq.set_num_threads(options.threads)
        with _warnings_in_one_line():
            result, text = options.run(options)
        print(json.dumps(result, allow_nan=False) if options.json else commands.printable(text))
    except CommandError as error:
        return _fail(error.code, str(error))
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted")
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except (ValueError, OSError, ImportError) as error:
        return _fail(ERROR, str(error))
    except Exception as error:
        return _fail(ERROR, f"{type(error).__name__}: {error}")
    return 0


def _fail(code: int, message: str) -> int:
    commands.complain(message)
    return code


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show warnings like errors, without the line of code that raised them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: commands.complain(message)
        yield


def _parser() -> Parser:
    parser = Parser(
        prog="lowbitq",
        description="Language models in 1 to 4 bits: quantize, run and evaluate them on a CPU.",
        epilog="Exit codes: 0 ok, 1 error, 2 usage, 3 model unsupported, 4 interrupted, "
        "5 verification failed.",
    )
    parser.add_argument("--version", action="version", version=f"lowbitq {lq.__version__}")
    choices = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, add_arguments, text) in _commands().items():
        command = choices.add_parser(name, help=text, description=text)
        command.set_defaults(run=run, given=[])
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument("--threads", type=arguments.positive, help="(default: all CPUs)")
        add_arguments(command)
    return parser


def _commands() -> dict[str, tuple[Command, Callable[[Parser], None], str]]:
    """What runs each command, what adds its arguments to a parser, and its description."""
    return {
        "inspect": (
            commands.inspect,
            arguments.model_argument,
            "Describe a model by its headers.",
        ),
        "quantize": (commands.quantize, _quantize_arguments, "Quantize a model and save it."),
        "plan": (
            commands_choosing.plan,
            _plan_arguments,
            "Choose the format of each layer under a budget, for quantize --plan.",
        ),
        "enhance": (
            commands_choosing.enhance,
            _enhance_arguments,
            "Quantize a model as well as is known how under a budget: plan, compress, train.",
        ),
        "distill": (
            commands.distill,
            _distill_arguments,
            "Train a quantized model on the float model's predictions and save it.",
        ),
        "reconstruct": (
            commands.reconstruct,
            _reconstruct_arguments,
            "Train each block of a quantized model on the float block's output and save it.",
        ),
        "export": (commands.export, _export_arguments, "Write a model for other programs."),
        "search": (
            commands_choosing.search,
            _search_arguments,
            "Search the parameters of a quantized model's copies and save the best ones.",
        ),
        "evaluate": (commands.evaluate, _evaluate_arguments, "Measure perplexity, size and speed."),
        "sensitivity": (
            commands.sensitivity,
            _sensitivity_arguments,
            "Rank the layers of a float model by how much quantization harms them.",
        ),
        "chat": (
            commands_generation.chat,
            arguments_generation.chat,
            "Talk with a model; /reset forgets what was said, /exit ends.",
        ),
        "serve": (
            commands_serving.serve,
            arguments_generation.serve,
            "Serve a model to clients of OpenAI's protocol.",
        ),
        "generate": (
            commands_generation.generate,
            arguments_generation.generate,
            "Continue a text.",
        ),
        "bench": (
            commands.bench,
            _bench_arguments,
            "Measure layer speed against this machine's limits, in half a minute.",
        ),
        "demo": (
            commands.demo,
            _demo_arguments,
            "Make SmolLM2-135M a 4-, a 3- and a 2-bit model and compare them.",
        ),
    }


def _quantize_arguments(parser: Parser) -> None:
    arguments.model_argument(parser)
    parser.add_argument("out", type=Path, metavar="FOLDER", help="destination")
    program = "make what this program can hold unchanged; `lowbitq export` writes its file"
    parser.add_argument("--for", dest="target", choices=["llama.cpp"], help=program)
    how = "format of linear layers, such as int2g64, or 'int2g64 + rank16' with an adapter"
    parser.add_argument(
        "--format", type=arguments.layer, default="int4g64", action=arguments.Noted, help=how
    )
    _embedding_option(parser)
    methods = ["gptq", "rtn"]
    parser.add_argument(
        "--method", choices=methods, default="gptq", action=arguments.Noted, help="rounding method"
    )
    _rotation_option(parser)
    chain = "the best known chain for its time: fast or balanced (the default)"
    parser.add_argument("--preset", choices=list(PRESETS), action=arguments.Noted, help=chain)
    other = "plan of the layers whose names match, with * and ?; may be given several times"
    parser.add_argument(
        "--override",
        dest="overrides",
        type=arguments.override,
        action=arguments.NotedPair,
        default={},
        metavar="PATTERN=FORMAT",
        help=other,
    )
    planned = "plan of every layer, as lowbitq plan writes it, instead of the options above"
    parser.add_argument("--plan", type=Path, metavar="FILE", help=planned)
    arguments.text_option(parser, "to calibrate on")
    arguments.calibration_options(parser, samples=128, window=2048)
    fisher = "weight tokens by squared gradients of the loss; every window is also taken back"
    parser.add_argument("--fisher", action="store_true", help=fisher)
    arguments.work_dir_options(parser, "FOLDER.work")
    parser.add_argument("--no-verify", action="store_true", help="do not reload and compare")
    size = "say what would be stored, and quantize nothing"
    parser.add_argument("--dry-run", action="store_true", help=size)
    arguments.report_option(parser)


def _rotation_option(parser: Parser) -> None:
    rotations = ["hadamard", "orthogonal", "none"]
    parser.add_argument(
        "--rotation",
        choices=rotations,
        default="hadamard",
        action=arguments.Noted,
        help="rotation of the model",
    )


def _plan_arguments(parser: Parser) -> None:
    arguments.model_argument(parser)
    budget = parser.add_mutually_exclusive_group(required=True)
    bits = "stored bits per weight of the linear layers, at most"
    budget.add_argument("--bits", type=float, help=bits)
    size = "bytes of the whole model, at most"
    budget.add_argument("--size", type=arguments.positive, metavar="BYTES", help=size)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="destination")
    _formats_option(parser)
    by = "format whose divergence is measured and scaled, noise, or measured: all candidates are"
    parser.add_argument("--by", default="int2g64", help=by)
    measure = "windows that the divergence is measured on"
    parser.add_argument("--measure", type=arguments.positive, default=2, metavar="N", help=measure)
    _rotation_option(parser)
    arguments.text_option(parser, "to calibrate on")
    arguments.calibration_options(parser, samples=16, window=512)


def _enhance_arguments(parser: Parser) -> None:
    arguments.model_argument(parser)
    parser.add_argument("out", type=Path, metavar="FOLDER", help="destination")
    bits = "stored bits per weight of the linear layers, at most"
    parser.add_argument("--bits", type=float, required=True, help=bits)
    _formats_option(parser)
    _embedding_option(parser)
    trials = "of a search for the parameters of copies; 0: none"
    parser.add_argument("--trials", type=arguments.count, default=0, metavar="N", help=trials)
    steps = "of training; 0: none"
    parser.add_argument("--steps", type=arguments.count, default=240, metavar="N", help=steps)
    _pace_option(parser)
    parser.add_argument("--minutes", type=float, help="stop training after this time")
    arguments.text_option(parser, "to calibrate and train on; its last two windows are held back")
    arguments.calibration_options(parser, samples=32, window=2048)
    arguments.work_dir_options(parser, "FOLDER.work")


def _pace_option(parser: Parser) -> None:
    paces = "factor of the learning rates of layers whose names or formats match, with * and ?"
    parser.add_argument(
        "--pace",
        dest="paces",
        type=arguments.pace,
        action="append",
        default=[],
        metavar="PATTERN=FACTOR",
        help=f"{paces}; may be given several times",
    )


def _formats_option(parser: Parser) -> None:
    formats = "candidates, separated by commas, such as 'trellis2, trellis3, int2g64 + rank8'"
    default = ",".join(FORMATS)
    parser.add_argument("--formats", type=arguments.layers, default=default, help=formats)


def _embedding_option(parser: Parser) -> None:
    parser.add_argument(
        "--embedding",
        type=arguments.embedding,
        default=lq.Plan({}).embedding,
        action=arguments.Noted,
        help="format of the embedding and the head, or none",
    )


def _student_arguments(parser: Parser, use: str) -> None:
    parser.add_argument("model", metavar="MODEL", help="a saved lowbitq model")
    parser.add_argument("teacher", metavar="TEACHER", help="its float model: file or folder")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="destination")
    arguments.text_option(parser, use)
    parser.add_argument(
        "--learn",
        type=arguments.kinds,
        default="scale,offset,norm",
        help=f"kinds of parameters, of {', '.join(RATES)}",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the windows")


def _distill_arguments(parser: Parser) -> None:
    _student_arguments(parser, "to train on; its last windows are held back")
    parser.add_argument("--loss", default="kl", help="such as kl, or 'kl + 0.5 reverse'")
    codes = "how words learn, if --learn has weight"
    parser.add_argument("--rounding", choices=METHODS, default="nearest", help=codes)
    hidden = "weight of the distance of hidden states behind --blocks"
    parser.add_argument("--features", type=float, default=0.0, metavar="W", help=hidden)
    relations = "weight of the distance of their similarities to each other"
    parser.add_argument("--relations", type=float, default=0.0, metavar="W", help=relations)
    maps = "weight of the divergence of attention maps"
    parser.add_argument("--attention", type=float, default=0.0, metavar="W", help=maps)
    blocks = "blocks of these three, separated by commas; -1: the last"
    parser.add_argument("--blocks", type=arguments.numbers(int), default="-1", help=blocks)
    alike = "weight of how alike the errors of averaged copies are"
    parser.add_argument("--diversity", type=float, default=0.0, metavar="W", help=alike)
    temperatures = "of the loss, separated by commas: 5,3,1 begins with soft targets"
    parser.add_argument(
        "--temperatures", type=arguments.numbers(float), default="", help=temperatures
    )
    parser.add_argument("--steps", type=arguments.positive, default=240, help="steps of AdamW")
    batch = "windows per step, or auto: as many as --memory holds"
    parser.add_argument("--batch", type=arguments.batch, default=2, help=batch)
    parser.add_argument("--window", type=arguments.positive, default=512, help="tokens per window")
    memory = "most memory of the process; larger batches are taken in parts (default: no limit)"
    parser.add_argument("--memory", type=float, metavar="GB", help=memory)
    rates = "first look for the learning rates, in at most 40 more steps"
    parser.add_argument("--find-rates", action="store_true", help=rates)
    _pace_option(parser)
    parser.add_argument("--minutes", type=float, help="stop after this time (default: never)")
    kept = "keep what the teacher says here, for later runs (default: run it for each window)"
    parser.add_argument("--teacher-dir", type=Path, metavar="FOLDER", help=kept)
    top_k = "keep its K most probable tokens and K others there (default: exact hidden states)"
    parser.add_argument("--top-k", type=arguments.positive, metavar="K", help=top_k)
    parser.add_argument("--log", type=Path, metavar="FILE", help="write options and losses as JSON")
    picture = "draw the losses: .png, .svg or .pdf (matplotlib)"
    parser.add_argument("--plot", type=arguments.picture, metavar="FILE", help=picture)
    arguments.work_dir_options(parser, "FOLDER.work")


def _reconstruct_arguments(parser: Parser) -> None:
    _student_arguments(parser, "to train on")
    parser.add_argument(
        "--steps", type=arguments.positive, default=16, help="steps of AdamW per block"
    )
    parser.add_argument("--batch", type=arguments.positive, default=2, help="windows per step")
    parser.add_argument(
        "--samples", type=arguments.positive, default=16, help="windows of the text"
    )
    parser.add_argument("--window", type=arguments.positive, default=1024, help="tokens per window")
    inputs = "what enters a block: outputs of the quantized or of the float blocks before it"
    parser.add_argument("--inputs", choices=INPUTS, default="quantized", help=inputs)


def _export_arguments(parser: Parser) -> None:
    arguments.model_argument(parser)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="destination: a folder, or for gguf a file"
    )
    parser.add_argument("--to", choices=TARGETS, default="hf", help="who reads it")
    dtype = "of float weights; auto: the narrowest that holds all of them exactly"
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=dtype)
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    check = "measure the perplexity of a text before and after"
    parser.add_argument("--check", action="store_true", help=check)
    arguments.text_option(parser, "to predict with --check")
    arguments.windows_options(parser)


def _search_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a saved lowbitq model")
    parser.add_argument("teacher", metavar="TEACHER", help="its float model: file or folder")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="destination")
    space = "clips: a clip for each kind of layer; grid: 225 points of two copies; or a JSON file"
    parser.add_argument("--space", default="clips", help=space)
    objective = "what to make small, such as kl, perplexity or block"
    parser.add_argument("--objective", choices=TERMS, default="kl", help=objective)
    parser.add_argument("--trials", type=arguments.positive, default=50, help="number of trials")
    parser.add_argument("--sampler", choices=SAMPLERS, default="gaussian", help="strategy")
    storage = "keep the study here, to resume and to share: .log, .db or a URL (default: nowhere)"
    parser.add_argument("--storage", metavar="PLACE", help=storage)
    parser.add_argument("--study", default="lowbitq", metavar="NAME", help="its name there")
    scales = "first give the inputs of copies static scales that cover this share of them, up to 1"
    parser.add_argument("--static", type=float, metavar="SHARE", help=scales)
    arguments.text_option(parser, "to run")
    parser.add_argument("--measure", type=arguments.positive, default=4, help="windows of the text")
    parser.add_argument("--window", type=arguments.positive, default=512, help="tokens per window")
    parser.add_argument("--seed", type=int, default=0, help="seed of windows and trials")


def _evaluate_arguments(parser: Parser) -> None:
    arguments.model_argument(parser)
    arguments.bits_option(parser)
    parser.add_argument("--reference", metavar="MODEL", help="also compare with this model")
    arguments.text_option(parser, "to predict")
    arguments.windows_options(parser)
    parser.add_argument(
        "--continuations",
        type=arguments.positive,
        metavar="N",
        help="also let the model and the reference continue this many pieces of the text",
    )
    arguments.report_option(parser)


def _sensitivity_arguments(parser: Parser) -> None:
    arguments.model_argument(parser)
    formats = "formats to round to, separated by commas"
    parser.add_argument("--formats", type=arguments.formats, default="int2g64", help=formats)
    arguments.text_option(parser, "to calibrate on")
    arguments.calibration_options(parser, samples=16, window=512)
    gradients = "also score by gradients of the cross entropy"
    parser.add_argument("--gradients", action="store_true", help=gradients)
    rotation = "also rank the rotated model and compare"
    rotations = ["hadamard", "orthogonal"]
    parser.add_argument("--rotation", choices=rotations, help=rotation)
    levels = "what to rank: linear layers, attention and MLP, or blocks"
    parser.add_argument("--level", choices=LEVELS, default="linear", help=levels)
    measured = "also quantize each alone and measure the KL divergence on this many of the windows"
    parser.add_argument("--measure", type=arguments.positive, metavar="N", help=measured)


def _bench_arguments(parser: Parser) -> None:
    picture = "also draw it: .png, .svg or .pdf (matplotlib)"
    parser.add_argument("--plot", type=arguments.picture, metavar="FILE", help=picture)


def _demo_arguments(parser: Parser) -> None:
    arguments.text_option(
        parser, "to calibrate on (its first half) and to predict (its second half)"
    )
    arguments.calibration_options(parser, samples=16, window=1024)
    parser.add_argument(
        "--windows", type=arguments.positive, default=4, help="held-out windows to predict"
    )
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="save the models here")
    arguments.work_dir_options(parser, str(commands.DEMO_WORK))
