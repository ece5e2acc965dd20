"""What the commands do that choose: plans under a budget, parameters of copies."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

import lowbitq as lq
from lowbitq.checkpoints.packed import check_replaceable
from lowbitq.checkpoints.writing import new_file
from lowbitq.commands import Options, _bar, _load, _student, warn_of
from lowbitq.search import read_space, static
from lowbitq.texts import read_texts, windows


def plan(options: Options) -> tuple[dict[str, Any], str]:
    """Plan each layer of a model under a budget and write the plan."""
    texts = read_texts(options.text)
    model = _load(options.model)
    warn_of(texts)
    with _bar("pricing", unit="step") as progress:
        found = lq.plan(
            model,
            texts.calibration,
            bits=options.bits,
            size=options.size,
            formats=options.formats,
            by=options.by,
            measure=options.measure,
            samples=options.samples,
            window=options.window,
            rotation=options.rotation,
            seed=options.seed,
            progress=progress,
        )
    with new_file(options.out) as file:
        file.write(found.to_json().encode())
    shown = f"{found}\n{options.out}: {found.outcome.bits:.3f} bits per weight"
    return {"saved": str(options.out), **found.comparison()}, shown


def search(options: Options) -> tuple[dict[str, Any], str]:
    """Search the parameters of a quantized model's copies and save the best ones."""
    check_replaceable(options.out)
    space = read_space(options.space)
    model, teacher, text = _student(options)
    started = time.perf_counter()
    cut = {"window": options.window, "seed": options.seed}
    tokens = windows(model.tokenizer, text, samples=options.measure, config=model.config, **cut)
    if options.static is not None:
        model = static(model, tokens, share=options.static)
    with _bar("searching", unit="trial") as progress:
        found = lq.search(
            teacher,
            model,
            tokens,
            space,
            objective=options.objective,
            trials=options.trials,
            sampler=options.sampler,
            storage=options.storage,
            study=options.study,
            measure=len(tokens),
            progress=progress,
            **cut,
        )
    found.model.save(options.out)
    seconds = time.perf_counter() - started
    result = {"saved": str(options.out), **found.to_dict(), "seconds": seconds}
    return result, f"{found}\n{options.out}: {seconds:.0f} s"


def enhance(options: Options) -> tuple[dict[str, Any], str]:
    """Quantize a model as well as is known how under a budget, and save it."""
    check_replaceable(options.out)
    work_dir = options.work_dir or options.out.with_name(options.out.name + ".work")
    if options.restart:
        shutil.rmtree(work_dir, ignore_errors=True)
    texts = read_texts(options.text)
    model = _load(options.model)
    warn_of(texts)
    found = lq.enhance(
        model,
        texts.calibration,
        bits=options.bits,
        formats=options.formats,
        samples=options.samples,
        window=options.window,
        trials=options.trials,
        steps=options.steps,
        seconds=None if options.minutes is None else 60 * options.minutes,
        embedding=None if options.embedding is None else str(options.embedding),
        seed=options.seed,
        work_dir=work_dir,
        progress=sys.stderr.isatty(),
    )
    found.model.save(options.out)
    if options.work_dir is None:
        shutil.rmtree(work_dir, ignore_errors=True)
    return {"saved": str(options.out), **found.to_dict()}, f"{found}\n{options.out}"
