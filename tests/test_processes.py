"""Models as copies and in other processes: they compute the same bits."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from golden import tiny_models
from random_model import random_model, random_tokens
from test_models import to_gguf
from test_tokenizer import byte_level

import lowbitq as lq

TOKENS = random_tokens(120)
WINDOW = 40

# Any of them may warn that the processes of a pool with threads are forked.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def buffers_apart(value):
    """As protocol 5 sends large arrays beside the pickle, read-only."""
    buffers = []
    text = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(text, buffers=[bytes(buffer.raw()) for buffer in buffers])


WAYS = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "protocol 2": lambda value: pickle.loads(pickle.dumps(value, protocol=2)),
    "buffers apart": buffers_apart,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


def biased(model):
    layer = model.blocks[0].linears["q_proj"]
    model.blocks[0].linears["q_proj"] = layer.replace(bias=np.arange(64, dtype=np.float32))
    return model


def untied():
    model = biased(random_model(layers=2))
    model.head = lq.Linear(random_model(seed=7).embedding.weight)
    return model


MODELS = {
    "float": untied,
    "rotated": lambda: lq.rotate(untied(), seed=3),
    "orthogonal": lambda: lq.rotate(untied(), "orthogonal", seed=3),
    "packed": lambda: lq.compress(untied(), "int3g32", method="rtn"),
    "float32 activations": lambda: lq.compress(
        untied(), "kmeans3g32s8", method="rtn", activation_bits=None, embedding=None
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_copied_model_computes_the_same(name):
    """Whether the original has run or not."""
    model = MODELS[name]()
    fresh = [copied(model) for copied in WAYS.values()]
    expected = model.logits(TOKENS)
    for other in [*fresh, *(copied(model) for copied in WAYS.values()), model]:
        assert type(other) is type(model)
        assert other.config == model.config
        assert np.array_equal(other.logits(TOKENS), expected)
        assert getattr(other, "plan", None) == getattr(model, "plan", None)
        assert getattr(other, "records", None) == getattr(model, "records", None)


def test_a_deep_copy_stands_alone():
    model = lq.compress(untied(), "int3g32", method="rtn")
    expected = model.logits(TOKENS)
    other = copy.deepcopy(model)
    other.blocks[0].linears["q_proj"] = other.blocks[1].linears["q_proj"]
    other.final_norm[:] = 0
    assert not other.logits(TOKENS).any()
    assert np.array_equal(model.logits(TOKENS), expected)


def test_layers_that_share_a_rotation_still_do():
    model = WAYS["pickle"](lq.compress(untied(), "int3g32", method="rtn"))
    assert model.head.rotation is model.embedding.rotation is model.residual_rotation


def test_packed_weights_lie_at_cache_lines_again():
    model = lq.compress(untied(), "int3g32", method="rtn")
    for way in WAYS:
        for _, linear in WAYS[way](model).matrices():
            assert linear.tensor.panels.ctypes.data % 64 == 0


def test_a_mapped_model_needs_its_folder_no_longer(tmp_path):
    """Its pickle holds the arrays: it may be read on another machine."""
    small = lq.compress(untied(), "int3g32", method="rtn")
    small.save(tmp_path / "saved")
    text = pickle.dumps(lq.load(tmp_path / "saved"))
    shutil.rmtree(tmp_path / "saved")
    model = pickle.loads(text)
    assert np.array_equal(model.logits(TOKENS), small.logits(TOKENS))
    model.save(tmp_path / "saved")
    assert np.array_equal(lq.load(tmp_path / "saved").logits(TOKENS), small.logits(TOKENS))


def test_everything_that_holds_results_can_be_copied():
    model = untied()
    small = lq.compress(model, "int3g32", method="rtn")
    stats = lq.calibrate(model, TOKENS.reshape(3, 40), hessians=True)
    found = lq.evaluate(small, TOKENS, model, WINDOW)
    layer, x = small.blocks[0].linears["q_proj"], small.embed(TOKENS)
    for copied in WAYS.values():
        assert np.array_equal(copied(stats).tokens, stats.tokens)
        assert copied(stats).hessians.keys() == stats.hessians.keys()
        assert copied(small.plan) == small.plan
        assert str(copied(small.report())) == str(small.report())
        assert copied(lq.Format.parse("int3g32s8")) == lq.Format.parse("int3g32s8")
        assert copied(found).to_dict() == found.to_dict()
        assert np.array_equal(copied(layer).forward(x), layer.forward(x))
        assert np.array_equal(copied(small.blocks[0]).linears["q_proj"].bias, layer.bias)


def test_a_copied_tokenizer_stays_blind_to_special_tokens():
    """Even after it has been: the switch is not part of what its library pickles."""
    text = "low<|im_end|> low"
    tokenizer = lq.Tokenizer.from_gguf(byte_level(pre="smollm"))
    for before in (False, True):
        for copied in WAYS.values():
            other = copied(tokenizer)
            for special in (False, True):
                expected = lq.Tokenizer.from_gguf(byte_level(pre="smollm")).encode(
                    text, special=special
                )
                assert np.array_equal(other.encode(text, special=special), expected)
            assert other.eos_ids == tokenizer.eos_ids
        if not before:
            tokenizer.encode(text, special=False)


@pytest.mark.parametrize("error", [lq.FormatError("a.gguf, byte 3: bad"), lq.NumericalError("no")])
def test_errors_reach_the_process_that_asked(error):
    assert repr(pickle.loads(pickle.dumps(error))) == repr(error)


def test_a_cache_says_that_it_stays():
    cache = random_model(layers=1).new_cache(5)
    for copied in WAYS.values():
        with pytest.raises(TypeError, match=r"a Cache cannot be copied or pickled, .*new_cache"):
            copied(cache)


def test_another_instruction_set_computes_the_same_layers():
    """Packed layers and rotations do not depend on it."""
    layer = lq.compress(untied(), "int3g32", method="rtn").blocks[1].linears["down_proj"]
    x = np.random.default_rng(0).standard_normal((3, 96), dtype=np.float32)
    program = (
        "import pickle, sys; layer, x = pickle.load(sys.stdin.buffer); "
        "sys.stdout.buffer.write(layer.forward(x).tobytes())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps((layer, x)),
        env=os.environ | {"LOWBITQ_ISA": "portable"},
        capture_output=True,
        check=True,
    )
    assert layer.rotation is not None
    assert result.stdout == layer.forward(x).tobytes()


# --- pools ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A packed model that has run, from a GGUF file, with its perplexity."""
    source = lq.load(to_gguf("llama3", tmp_path_factory.mktemp("gguf") / "a.gguf"))
    small = lq.compress(source, "int4g16", method="rtn")
    tokens = np.tile(tiny_models.tokens_of("llama3"), 20)[: 3 * WINDOW]
    return small, tokens, lq.perplexity(small, tokens, window=WINDOW)


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_process_pools(model, start):
    small, tokens, expected = model
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(start)) as pool:
        jobs = [pool.submit(lq.perplexity, small, tokens, window=WINDOW) for _ in range(3)]
        assert [job.result() for job in jobs] == [expected] * 3
        # and back again
        again = pool.submit(copy.copy, small).result()
    assert lq.perplexity(again, tokens, window=WINDOW) == expected


def test_joblib(model):
    """Which maps large arrays into its workers, here all."""
    joblib = pytest.importorskip("joblib")
    small, tokens, expected = model
    run = joblib.delayed(lq.perplexity)
    with joblib.Parallel(2, max_nbytes=100) as parallel:
        found = parallel(run(small, tokens, window=WINDOW) for _ in range(3))
    assert found == [expected] * 3


@pytest.mark.slow
def test_dask(model):
    distributed = pytest.importorskip("distributed")
    small, tokens, expected = model
    with (
        distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        jobs = [client.submit(lq.perplexity, small, tokens, window=WINDOW, pure=False)]
        assert client.gather(jobs) == [expected]
