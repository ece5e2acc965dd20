"""What the commands of the command line do; `lowbitq.cli` reads their arguments."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import lowbitq as lq
from lowbitq import llama_cpp, plots, roofline
from lowbitq.checkpoints.blocks import block_files, remove_blocks
from lowbitq.checkpoints.packed import check_replaceable
from lowbitq.checkpoints.writing import new_file
from lowbitq.compression import leftovers
from lowbitq.costs import stored_bytes
from lowbitq.demo import demo_model
from lowbitq.gradients import weight_gradients
from lowbitq.headers import read_header
from lowbitq.html_reports import write_report
from lowbitq.texts import Texts, read_texts, windows

ERROR, USAGE, UNSUPPORTED, INTERRUPTED, UNVERIFIED = 1, 2, 3, 4, 5

DEMO_FORMATS = ("int4g64", "trellis3", "trellis2")
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


# A command returns its result for --json and the text to print.
Options = Any  # an argparse.Namespace
Command = Callable[[Options], tuple[dict[str, Any], str]]


def inspect(options: Options) -> tuple[dict[str, Any], str]:
    """Describe a model by its headers and, if it is quantized, each of its layers."""
    found = read_header(options.model)
    return found.to_dict(), str(found)


def quantize(options: Options) -> tuple[dict[str, Any], str]:
    """Quantize a model, save it and verify that it loads unchanged."""
    out: Path = options.out
    check_replaceable(out)
    if options.target:
        _fit_program(options)
    work_dir = options.work_dir or out.with_name(out.name + ".work")
    cut = {"samples": options.samples, "window": options.window}
    how: lq.Plan | str = options.format
    task: dict[str, Any] = {
        "method": options.method,
        "rotation": options.rotation,
        "preset": options.preset,
        "embedding": None if options.embedding is None else str(options.embedding),
        "seed": options.seed,
    }
    seed = options.seed
    if options.plan is not None:
        how, task = _read_plan(options), {}
        seed = how.seed
    elif options.overrides:
        task["overrides"] = options.overrides
    if options.dry_run:
        return _planned(_load(options.model), how, task)
    texts = read_texts(options.text)
    started = time.perf_counter()
    # Of plans that differ by layer, compress finds out whether the blocks in work_dir fit.
    simple = None if options.plan is not None or options.overrides else options.format
    with _resuming(options, {work_dir: simple}, cut | task):
        model = _load(options.model)
        # compress has the same text of its own, with a warning if the plan needs one.
        seen: dict[str, Any] = {"text": None if texts.warning else texts.calibration, **cut}
        if options.fisher:
            warn_of(texts)
            with _bar("calibrating", unit="window") as progress:
                stats = lq.calibrate(
                    model, texts.calibration, fisher=True, progress=progress, seed=seed, **cut
                )
            seen = {"stats": stats}
        small = lq.compress(
            model,
            how,
            work_dir=work_dir,
            progress=sys.stderr.isatty(),
            **seen,
            **task,
        )
        small.save(out)
        if not options.no_verify:
            _verify(small, out)
    if options.report:
        write_report(options.report, small, title=str(out), about=_about(options, texts))
    result = {
        "saved": str(out),
        "format": str(options.format) if options.plan is None else None,
        "plan": None if options.plan is None else str(options.plan),
        "embedding": _text_of(small.plan.embedding if small.plan else None),
        "bits_per_weight": small.bits_per_weight,
        "size_bytes": small.nbytes,
        "seconds": time.perf_counter() - started,
    }
    text = (
        f"{out}: {small.bits_per_weight:.3f} bits per weight, {small.nbytes / 1e6:.1f} MB, "
        f"{result['seconds']:.0f} s"
    )
    return result, text


def _planned(
    model: lq.Model, how: lq.Plan | str, task: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Say what a plan would store."""
    shapes = {name: linear.shape for name, linear in model.linears()}
    if not isinstance(how, lq.Plan):
        how = lq.Plan.uniform(shapes, how, **{k: v for k, v in task.items() if k != "preset"})
    nbytes = sum(stored_bytes(layer, shapes[name]) for name, layer in how.layers.items())
    bits = 8 * nbytes / sum(rows * cols for rows, cols in shapes.values())
    counts = Counter(map(str, how.layers.values()))
    mix = ", ".join(f"{count} x {text}" for text, count in counts.most_common())
    found = {"bits_per_weight": bits, "size_bytes": nbytes, "layers": dict(counts)}
    return found, f"{bits:.3f} bits per weight, {nbytes / 1e6:.1f} MB of linear layers: {mix}"


def _fit_program(options: Options) -> None:
    """Fill in the options that --for decides, and refuse what that program cannot hold."""
    if options.plan is not None:
        raise CommandError(USAGE, f"--for is given beside --plan {options.plan}")
    for name, value in llama_cpp.PRESET.items():
        if f"--{name}" not in options.given:
            setattr(options, name, value)
    try:
        llama_cpp.check_plan(lq.LayerPlan.parse(options.format), options.rotation)
        if options.embedding is not None:
            llama_cpp.check_plan(lq.LayerPlan.parse(options.embedding), name="embedding")
    except ValueError as error:
        raise CommandError(USAGE, str(error)) from error


def _text_of(layer: lq.LayerPlan | None) -> str | None:
    return None if layer is None else str(layer)


def _read_plan(options: Options) -> lq.Plan:
    """Read --plan, which no other option may contradict."""
    if options.given:
        said = f"{options.given[0]} is given beside --plan; set it in {options.plan}"
        raise CommandError(USAGE, said)
    try:
        return lq.Plan.from_json(options.plan.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(ERROR, f"{options.plan}: {error}") from error


@contextlib.contextmanager
def _resuming(
    options: Options, work_dirs: Mapping[Path, lq.Format | str | None], task: dict[str, Any]
) -> Iterator[None]:
    """First refuse or discard blocks of another task; on an interrupt, say where the blocks are.

    Blocks for a format of None are not looked at. On success the blocks are removed, unless the
    user chose the folder.
    """
    for work_dir, format in work_dirs.items():
        if options.restart:
            remove_blocks(work_dir)
        elif format is None:
            continue
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


def distill(options: Options) -> tuple[dict[str, Any], str]:
    """Train a quantized model on its float model's predictions and save it."""
    out: Path = options.out
    check_replaceable(out)
    axes = plots.new_axes() if options.plot else None  # first, as matplotlib may be missing
    work_dir = options.work_dir or out.with_name(out.name + ".work")
    if options.restart:
        shutil.rmtree(work_dir, ignore_errors=True)
    model, teacher, text = _student(options)
    how = {
        "learn": options.learn,
        "rounding": options.rounding,
        "loss": options.loss,
        "hints": lq.Hints(options.blocks, options.features, options.relations, options.attention),
        "window": options.window,
        "seed": options.seed,
    }
    started = time.perf_counter()
    try:
        rates = None
        if options.find_rates:
            few = 2 if options.batch == "auto" else options.batch
            rates = lq.range_test(
                model, teacher, text, batch=few, progress=sys.stderr.isatty(), **how
            ).rates
        trained = lq.distill(
            model,
            teacher,
            text,
            temperatures=options.temperatures,
            diversity=options.diversity,
            steps=options.steps,
            batch=options.batch,
            memory=None if options.memory is None else int(1e9 * options.memory),
            rates=rates,
            paces=dict(options.paces),
            seconds=None if options.minutes is None else 60 * options.minutes,
            work_dir=work_dir,
            teacher_dir=options.teacher_dir,
            top_k=options.top_k,
            progress=sys.stderr.isatty(),
            **how,
        )
    except KeyboardInterrupt:
        found = f"interrupted; the same command resumes from {work_dir}"
        raise CommandError(INTERRUPTED, found) from None
    trained.save(out)
    if options.work_dir is None:
        shutil.rmtree(work_dir, ignore_errors=True)
    known = trained.provenance["distillation"]
    if options.log:
        with new_file(options.log) as file:
            file.write(json.dumps(known, indent=1).encode())
    if axes is not None:
        plots.training(known, axes).figure.savefig(options.plot)
    curve = known["validation"]
    result = {
        "saved": str(out),
        "bits_per_weight": trained.bits_per_weight,
        "steps": curve[-1][0],
        "batch": known["options"]["batch"],
        "rates": dict(known["options"]["rates"]),
        "held_back_kl": {"before": curve[0][1], "after": min(value for _, value in curve)},
        "seconds": time.perf_counter() - started,
    }
    kl = result["held_back_kl"]
    return result, (
        f"{out}: {trained.bits_per_weight:.3f} bits per weight, divergence on held-back text "
        f"{kl['before']:.4f} -> {kl['after']:.4f}, {result['seconds']:.0f} s"
    )


def reconstruct(options: Options) -> tuple[dict[str, Any], str]:
    """Train the blocks of a quantized model on the outputs of the float blocks and save it."""
    out: Path = options.out
    check_replaceable(out)
    model, teacher, text = _student(options)
    started = time.perf_counter()
    with _bar("reconstructing", unit="block") as progress:
        trained = lq.reconstruct(
            model,
            teacher,
            text,
            learn=options.learn,
            steps=options.steps,
            batch=options.batch,
            samples=options.samples,
            window=options.window,
            inputs=options.inputs,
            seed=options.seed,
            progress=lambda found: progress(found.block + 1, found.blocks),
        )
    trained.save(out)
    blocks = trained.provenance["reconstruction"]["blocks"]
    result = {
        "saved": str(out),
        "bits_per_weight": trained.bits_per_weight,
        "blocks": blocks,
        "seconds": time.perf_counter() - started,
    }
    return result, (
        f"{out}: {trained.bits_per_weight:.3f} bits per weight, error behind the last block "
        f"{blocks[-1]['before']:.4f} -> {blocks[-1]['after']:.4f}, {result['seconds']:.0f} s"
    )


def _student(options: Options) -> tuple[lq.QuantizedModel, lq.Model, Any]:
    """Read a quantized model, its teacher and a text to train on."""
    texts = read_texts(options.text)
    model, teacher = _load(options.model), _load(options.teacher)
    if not isinstance(model, lq.QuantizedModel):
        raise CommandError(ERROR, f"{options.model} is a float model, expected a quantized one")
    warn_of(texts)
    return model, teacher, texts.calibration


def evaluate(options: Options) -> tuple[dict[str, Any], str]:
    """Measure a model, alone or against another."""
    if options.continuations and not options.reference:
        raise CommandError(USAGE, "--continuations compares with a model: give --reference")
    texts = read_texts(options.text)
    model = _load(options.model, options.bits)
    reference = _load(options.reference) if options.reference else None
    warn_of(texts)
    text = texts.held_out
    with _bar("evaluating") as progress:
        found = lq.evaluate(
            model, text, reference, options.window, options.windows, progress=progress
        )
    if options.report:
        about = _about(options, texts)
        write_report(options.report, model, found, title=options.model, about=about)
    result, shown = found.to_dict(), str(found)
    if reference is not None and options.continuations:
        with _bar("writing") as progress:
            written = lq.continuations(
                model, reference, text, prompts=options.continuations, progress=progress
            )
        result["continuations"] = written.to_dict()
        shown += f"\n{written}"
    return result, shown


def export(options: Options) -> tuple[dict[str, Any], str]:
    """Write a model for other programs."""
    texts = read_texts(options.text) if options.check else None
    model = _load(options.model)
    if texts:
        warn_of(texts)
    with _bar("evaluating") as progress:
        found = lq.export(
            model,
            options.out,
            options.to,
            dtype=options.dtype,
            overwrite=options.force,
            check=texts.held_out if texts else None,
            window=options.window,
            windows=options.windows,
            progress=progress,
        )
    return found.to_dict(), str(found)


def sensitivity(options: Options) -> tuple[dict[str, Any], str]:
    """Score the layers of a model."""
    texts = read_texts(options.text)
    model = _load(options.model)
    warn_of(texts)
    text = texts.calibration
    found = _scored(model, text, options)
    result, shown = {**found.to_dict(), "correlations": found.correlations}, str(found)
    if options.rotation:
        turned = _scored(lq.rotate(model, options.rotation), text, options)
        alike = found.compare(turned)
        result["rotated"] = {**turned.to_dict(), "correlations": turned.correlations}
        result["rank_correlations"] = alike
        shown += f"\n\nrotated ({options.rotation}):\n{turned}"
        for format, one in alike.items():
            shown += (
                f"\n{format}: the scores before and after rotation have Kendall's tau "
                f"{one['kendall']:.2f}, Spearman's rho {one['spearman']:.2f}"
            )
    return result, shown


def _scored(model: lq.Model, text: Any, options: Options) -> lq.Sensitivity:
    """Calibrate a model and score its layers."""
    cut = {"samples": options.samples, "window": options.window, "seed": options.seed}
    stats = lq.calibrate(model, text, **cut)
    with _bar("scoring", unit="step") as progress:
        return lq.sensitivity(
            model,
            stats,
            options.formats,
            level=options.level,
            measure=options.measure or False,
            gradients=weight_gradients if options.gradients else None,
            progress=progress,
        )


def _show(options: Options, piece: str) -> None:
    if not options.json:
        show(piece)


def show(piece: str) -> None:
    """Print a piece of text at once."""
    print(printable(piece), end="", flush=True)


def complain(message: object) -> None:
    print(f"lowbitq: {' '.join(str(message).split())}", file=sys.stderr)


def _about(options: Options, texts: Texts) -> dict[str, Any]:
    """Return the options of a command, and the texts if none was given, for its report."""
    unsaid = {"run", "given", "json", "threads", "report"}
    said = {name.replace("_", "-"): v for name, v in vars(options).items() if name not in unsaid}
    found = {name: v for name, v in said.items() if v not in (None, False, {})}
    return found | ({"text": texts.warning} if texts.warning else {})


def warn_of(texts: Texts) -> None:
    """Say so if no text was given."""
    if texts.warning:
        complain(texts.warning)


def printable(text: str) -> str:
    """Replace each character that standard output cannot encode by a question mark."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def bench(options: Options) -> tuple[dict[str, Any], str]:
    """Measure the limits of this machine and the layer speed of each format."""
    axes = plots.new_axes() if options.plot else None  # first, as matplotlib may be missing
    with _bar("measuring", unit="format") as progress:
        found = roofline.measure(progress=progress)
    config = lq.show_config()
    if axes is not None:
        found.plot(axes).figure.savefig(options.plot)
    return {**found.to_dict(), "config": dict(config)}, f"{config['cpu']}, {found}"


def demo(options: Options) -> tuple[dict[str, Any], str]:
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
    options: Options,
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


def _load(path: str | Path, bits: float | None = None) -> lq.Model:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = lq.load(path) if bits is None else lq.load(path, bits=bits)
        except lq.FormatError:
            raise
        except ValueError as error:
            raise CommandError(UNSUPPORTED, str(error)) from error
    said = [str(warning.message) for warning in caught]
    if model.tokenizer is None and not said:
        said.append(f"{path} has no tokenizer, so it cannot read text")
    for message in said:
        complain(f"warning: {message}")
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
