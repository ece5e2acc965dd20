"""The command line: the arguments of its commands; `lowbitq.commands` carries them out.

Results go to standard output, as text or with --json as one JSON object; progress and errors go to
standard error. Exit codes: 0 ok, 1 error, 2 usage, 3 model unsupported, 4 interrupted (the message
says whether the same command resumes the work), 5 verification failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lowbitq as lq
from lowbitq import commands, commands_choosing, commands_serving
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


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except uninformative ones."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _Noted(argparse.Action):
    """Stores a value and notes in `given` that the user gave it, for options that exclude it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = [*namespace.given, option_string]


class _NotedPair(_Noted):
    """The same, of an option that may be given several times: a dict of all pairs."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name, value = values
        both = getattr(namespace, self.dest) | {name: value}
        super().__call__(parser, namespace, both, option_string)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowbitq",
        description="Language models in 1 to 4 bits: quantize, run and evaluate them on a CPU.",
        epilog="Exit codes: 0 ok, 1 error, 2 usage, 3 model unsupported, 4 interrupted, "
        "5 verification failed.",
    )
    parser.add_argument("--version", action="version", version=f"lowbitq {lq.__version__}")
    choices = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, add_arguments, text) in _commands().items():
        command = choices.add_parser(name, help=text, description=text, formatter_class=_Help)
        command.set_defaults(run=run, given=[])
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument("--threads", type=_positive, help="(default: all CPUs)")
        add_arguments(command)
    return parser


def _commands() -> dict[str, tuple[Command, Callable[[argparse.ArgumentParser], None], str]]:
    """What runs each command, what adds its arguments to a parser, and its description."""
    return {
        "inspect": (commands.inspect, _model_argument, "Describe a model."),
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
            commands_serving.chat,
            _chat_arguments,
            "Talk with a model; /reset forgets what was said, /exit ends.",
        ),
        "serve": (
            commands_serving.serve,
            _serve_arguments,
            "Serve a model to clients of OpenAI's protocol.",
        ),
        "generate": (commands.generate, _generate_arguments, "Continue a text."),
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


def _model_argument(parser: argparse.ArgumentParser) -> None:
    model = "GGUF file, Hugging Face folder, or saved lowbitq model"
    parser.add_argument("model", metavar="MODEL", help=model)


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument("out", type=Path, metavar="FOLDER", help="destination")
    program = "make what this program can hold unchanged; `lowbitq export` writes its file"
    parser.add_argument("--for", dest="target", choices=["llama.cpp"], help=program)
    how = "format of linear layers, such as int2g64, or 'int2g64 + rank16' with an adapter"
    parser.add_argument("--format", type=_layer, default="int4g64", action=_Noted, help=how)
    _embedding_option(parser)
    methods = ["gptq", "rtn"]
    parser.add_argument(
        "--method", choices=methods, default="gptq", action=_Noted, help="rounding method"
    )
    _rotation_option(parser)
    chain = "the best known chain for its time: fast or balanced (the default)"
    parser.add_argument("--preset", choices=list(PRESETS), action=_Noted, help=chain)
    other = "plan of the layers whose names match, with * and ?; may be given several times"
    parser.add_argument(
        "--override",
        dest="overrides",
        type=_override,
        action=_NotedPair,
        default={},
        metavar="PATTERN=FORMAT",
        help=other,
    )
    planned = "plan of every layer, as lowbitq plan writes it, instead of the options above"
    parser.add_argument("--plan", type=Path, metavar="FILE", help=planned)
    _text_option(parser, "to calibrate on")
    _calibration_options(parser, samples=128, window=2048)
    fisher = "weight tokens by squared gradients of the loss; every window is also taken back"
    parser.add_argument("--fisher", action="store_true", help=fisher)
    _work_dir_options(parser, "FOLDER.work")
    parser.add_argument("--no-verify", action="store_true", help="do not reload and compare")
    size = "say what would be stored, and quantize nothing"
    parser.add_argument("--dry-run", action="store_true", help=size)


def _rotation_option(parser: argparse.ArgumentParser) -> None:
    rotations = ["hadamard", "orthogonal", "none"]
    parser.add_argument(
        "--rotation",
        choices=rotations,
        default="hadamard",
        action=_Noted,
        help="rotation of the model",
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    budget = parser.add_mutually_exclusive_group(required=True)
    bits = "stored bits per weight of the linear layers, at most"
    budget.add_argument("--bits", type=float, help=bits)
    size = "bytes of the whole model, at most"
    budget.add_argument("--size", type=_positive, metavar="BYTES", help=size)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="destination")
    _formats_option(parser)
    by = "format whose divergence is measured and scaled, noise, or measured: all candidates are"
    parser.add_argument("--by", default="int2g64", help=by)
    measure = "windows that the divergence is measured on"
    parser.add_argument("--measure", type=_positive, default=2, metavar="N", help=measure)
    _rotation_option(parser)
    _text_option(parser, "to calibrate on")
    _calibration_options(parser, samples=16, window=512)


def _enhance_arguments(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument("out", type=Path, metavar="FOLDER", help="destination")
    bits = "stored bits per weight of the linear layers, at most"
    parser.add_argument("--bits", type=float, required=True, help=bits)
    _formats_option(parser)
    _embedding_option(parser)
    trials = "of a search for the parameters of copies; 0: none"
    parser.add_argument("--trials", type=_count, default=0, metavar="N", help=trials)
    steps = "of training; 0: none"
    parser.add_argument("--steps", type=_count, default=240, metavar="N", help=steps)
    parser.add_argument("--minutes", type=float, help="stop training after this time")
    _text_option(parser, "to calibrate and train on; its last two windows are held back")
    _calibration_options(parser, samples=32, window=2048)
    _work_dir_options(parser, "FOLDER.work")


def _formats_option(parser: argparse.ArgumentParser) -> None:
    formats = "candidates, separated by commas, such as 'trellis2, trellis3, int2g64 + rank8'"
    default = ",".join(FORMATS)
    parser.add_argument("--formats", type=_layers, default=default, help=formats)


def _embedding_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--embedding",
        type=_embedding,
        default=lq.Plan({}).embedding,
        action=_Noted,
        help="format of the embedding and the head, or none",
    )


def _student_arguments(parser: argparse.ArgumentParser, use: str) -> None:
    parser.add_argument("model", metavar="MODEL", help="a saved lowbitq model")
    parser.add_argument("teacher", metavar="TEACHER", help="its float model: file or folder")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="destination")
    _text_option(parser, use)
    parser.add_argument(
        "--learn",
        type=_kinds,
        default="scale,offset,norm",
        help=f"kinds of parameters, of {', '.join(RATES)}",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the windows")


def _distill_arguments(parser: argparse.ArgumentParser) -> None:
    _student_arguments(parser, "to train on; its last windows are held back")
    parser.add_argument("--loss", default="kl", help="such as kl, or 'kl + 0.5 reverse'")
    codes = "how words learn, if --learn has weight"
    parser.add_argument("--rounding", choices=METHODS, default="nearest", help=codes)
    hidden = "weight of the distance of hidden states behind --blocks"
    parser.add_argument("--features", type=float, default=0.0, metavar="W", help=hidden)
    relations = "weight of the distance of their similarities to each other"
    parser.add_argument("--relations", type=float, default=0.0, metavar="W", help=relations)
    blocks = "blocks of --features and --relations, separated by commas; -1: the last"
    parser.add_argument("--blocks", type=_numbers(int), default="-1", help=blocks)
    temperatures = "of the loss, separated by commas: 5,3,1 begins with soft targets"
    parser.add_argument("--temperatures", type=_numbers(float), default="", help=temperatures)
    parser.add_argument("--steps", type=_positive, default=240, help="steps of AdamW")
    batch = "windows per step, or auto: as many as --memory holds"
    parser.add_argument("--batch", type=_batch, default=2, help=batch)
    parser.add_argument("--window", type=_positive, default=512, help="tokens per window")
    memory = "most memory of the process; larger batches are taken in parts (default: no limit)"
    parser.add_argument("--memory", type=float, metavar="GB", help=memory)
    rates = "first look for the learning rates, in at most 40 more steps"
    parser.add_argument("--find-rates", action="store_true", help=rates)
    parser.add_argument("--minutes", type=float, help="stop after this time (default: never)")
    kept = "keep what the teacher says here, for later runs (default: run it for each window)"
    parser.add_argument("--teacher-dir", type=Path, metavar="FOLDER", help=kept)
    top_k = "keep its K most probable tokens and K others there (default: exact hidden states)"
    parser.add_argument("--top-k", type=_positive, metavar="K", help=top_k)
    parser.add_argument("--log", type=Path, metavar="FILE", help="write options and losses as JSON")
    picture = "draw the losses: .png, .svg or .pdf (matplotlib)"
    parser.add_argument("--plot", type=_picture, metavar="FILE", help=picture)
    _work_dir_options(parser, "FOLDER.work")


def _reconstruct_arguments(parser: argparse.ArgumentParser) -> None:
    _student_arguments(parser, "to train on")
    parser.add_argument("--steps", type=_positive, default=16, help="steps of AdamW per block")
    parser.add_argument("--batch", type=_positive, default=2, help="windows per step")
    parser.add_argument("--samples", type=_positive, default=16, help="windows of the text")
    parser.add_argument("--window", type=_positive, default=1024, help="tokens per window")
    inputs = "what enters a block: outputs of the quantized or of the float blocks before it"
    parser.add_argument("--inputs", choices=INPUTS, default="quantized", help=inputs)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="destination: a folder, or for gguf a file"
    )
    parser.add_argument("--to", choices=TARGETS, default="hf", help="who reads it")
    dtype = "of float weights; auto: the narrowest that holds all of them exactly"
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=dtype)
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    check = "measure the perplexity of a text before and after"
    parser.add_argument("--check", action="store_true", help=check)
    _text_option(parser, "to predict with --check")
    _windows_options(parser)


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a saved lowbitq model")
    parser.add_argument("teacher", metavar="TEACHER", help="its float model: file or folder")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="destination")
    space = "clips: a clip for each kind of layer; grid: 225 points of two copies; or a JSON file"
    parser.add_argument("--space", default="clips", help=space)
    objective = "what to make small, such as kl, perplexity or block"
    parser.add_argument("--objective", choices=TERMS, default="kl", help=objective)
    parser.add_argument("--trials", type=_positive, default=50, help="number of trials")
    parser.add_argument("--sampler", choices=SAMPLERS, default="gaussian", help="strategy")
    storage = "keep the study here, to resume and to share: .log, .db or a URL (default: nowhere)"
    parser.add_argument("--storage", metavar="PLACE", help=storage)
    parser.add_argument("--study", default="lowbitq", metavar="NAME", help="its name there")
    scales = "first give the inputs of copies static scales that cover this share of them, up to 1"
    parser.add_argument("--static", type=float, metavar="SHARE", help=scales)
    _text_option(parser, "to run")
    parser.add_argument("--measure", type=_positive, default=4, help="windows of the text")
    parser.add_argument("--window", type=_positive, default=512, help="tokens per window")
    parser.add_argument("--seed", type=int, default=0, help="seed of windows and trials")


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    _bits_option(parser)
    parser.add_argument("--system", type=_text, metavar="TEXT", help="what the model is told first")
    most = "most tokens of an answer"
    parser.add_argument("--max-new-tokens", type=_positive, default=256, help=most)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most probable token")


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=_positive, default=8000, help="port to listen on")
    token = "that clients must send; needed for a --host that others can reach"
    parser.add_argument("--token", help=f"{token} (default: the variable LOWBITQ_TOKEN)")
    parser.add_argument("--name", default="lowbitq", help="what clients call the model")
    parser.add_argument("--seconds", type=float, default=600.0, help="most time for one answer")
    parser.add_argument("--waiting", type=_positive, default=64, help="most requests at a time")


def _bits_option(parser: argparse.ArgumentParser) -> None:
    bits = "run only the first copies of a progressive model, with codes of so many bits in all"
    parser.add_argument("--bits", type=float, help=f"{bits} (default: all)")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    _bits_option(parser)
    parser.add_argument("--reference", metavar="MODEL", help="also compare with this model")
    _text_option(parser, "to predict")
    _windows_options(parser)
    parser.add_argument(
        "--continuations",
        type=_positive,
        metavar="N",
        help="also let the model and the reference continue this many pieces of the text",
    )


def _sensitivity_arguments(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    formats = "formats to round to, separated by commas"
    parser.add_argument("--formats", type=_formats, default="int2g64", help=formats)
    _text_option(parser, "to calibrate on")
    _calibration_options(parser, samples=16, window=512)
    gradients = "also score by gradients of the cross entropy"
    parser.add_argument("--gradients", action="store_true", help=gradients)
    rotation = "also rank the rotated model and compare"
    rotations = ["hadamard", "orthogonal"]
    parser.add_argument("--rotation", choices=rotations, help=rotation)
    levels = "what to rank: linear layers, attention and MLP, or blocks"
    parser.add_argument("--level", choices=LEVELS, default="linear", help=levels)
    measured = "also quantize each alone and measure the KL divergence on this many of the windows"
    parser.add_argument("--measure", type=_positive, metavar="N", help=measured)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    _bits_option(parser)
    parser.add_argument("prompt", type=_text)
    parser.add_argument(
        "--chat", action="store_true", help="treat the prompt as a message to answer"
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=64, help="maximum number of new tokens"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most probable token")
    parser.add_argument("--top-k", type=_positive, help="choose among this many tokens")
    parser.add_argument("--top-p", type=float, help="choose among tokens of this total probability")
    parser.add_argument("--cache-bits", type=int, default=32, help="cache precision, 8 or 32")
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    picture = "also draw it: .png, .svg or .pdf (matplotlib)"
    parser.add_argument("--plot", type=_picture, metavar="FILE", help=picture)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    _text_option(parser, "to calibrate on (its first half) and to predict (its second half)")
    _calibration_options(parser, samples=16, window=1024)
    parser.add_argument("--windows", type=_positive, default=4, help="held-out windows to predict")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="save the models here")
    _work_dir_options(parser, str(commands.DEMO_WORK))


def _text_option(parser: argparse.ArgumentParser, use: str) -> None:
    default = "(default: WikiText-2 in the folder LOWBITQ_DATA, else Python's help texts)"
    parser.add_argument("--text", type=Path, metavar="FILE", help=f"UTF-8 text {use} {default}")


def _windows_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--window", type=_positive, default=2048, help="tokens per window")
    parser.add_argument("--windows", type=_positive, help="number of windows (default: all)")


def _calibration_options(parser: argparse.ArgumentParser, *, samples: int, window: int) -> None:
    parser.add_argument("--samples", type=_positive, default=samples, help="calibration windows")
    parser.add_argument("--window", type=_positive, default=window, help="tokens per window")
    seed = "seed for samples and rotations"
    parser.add_argument("--seed", type=int, default=0, action=_Noted, help=seed)


def _work_dir_options(parser: argparse.ArgumentParser, default: str) -> None:
    place = f"(default: {default}, removed at the end)"
    parser.add_argument("--work-dir", type=Path, help=f"where finished blocks are kept {place}")
    parser.add_argument("--restart", action="store_true", help="discard the blocks kept there")


def _text(text: str) -> str:
    """Read as UTF-8 any text that the locale, such as C, could not decode."""
    if not any("\udc80" <= character <= "\udcff" for character in text):
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"not text: {error}") from error


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _override(text: str) -> tuple[str, str]:
    pattern, equals, plan = text.partition("=")
    if not (pattern and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=FORMAT")
    return pattern, _layer(plan)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def _format(text: str) -> lq.Format:
    try:
        return lq.Format.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _formats(text: str) -> list[lq.Format]:
    return [_format(name) for name in text.split(",")]


def _batch(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """What reads numbers that are separated by commas; none from an empty text."""

    def numbers(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(one) for one in text.split(",") if text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return numbers


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if unknown := set(kinds) - set(RATES):
        expected = f"expected some of {', '.join(RATES)}"
        raise argparse.ArgumentTypeError(f"unknown kinds {', '.join(sorted(unknown))}; {expected}")
    return kinds


def _layer(text: str) -> str:
    try:
        return str(lq.LayerPlan.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _layers(text: str) -> list[str]:
    return [_layer(one.strip()) for one in text.split(",")]


def _embedding(text: str) -> lq.Format | None:
    return None if text == "none" else _format(text)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, .svg or .pdf")
    return path
