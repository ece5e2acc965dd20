"""The model "lowbitq" of lm-eval, on tasks of a few lines and a tiny model."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from test_likelihoods import CLOSE, expected

import lowbitq as lq

pytest.importorskip("lm_eval")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what lm-eval imports
    import datasets
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    from lowbitq.integrations.lm_eval import LowbitqLM

CAPITALS = [
    {"question": "Capital of France?", "choices": ["Paris", "Rome", "Bonn"], "answer": 0},
    {"question": "Capital of Italy?", "choices": ["Paris", "Rome", "Bonn"], "answer": 1},
]
CHOICE = {
    "task": "capitals",
    "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(CAPITALS)},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return lq.load(tiny_folder)


@pytest.fixture
def harness(model):
    return LowbitqLM(model)


def requests(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_log_likelihoods_equal_sums_over_logits(model, harness):
    pairs = [("The capital is", " Paris"), ("The capital is", " Rome"), ("One ", "two"), ("", "x")]
    found = harness.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    encode = model.tokenizer.encode
    tokens = [(encode(a), encode(b)) for a, b in pairs[:2]]
    tokens += [(encode("One"), encode(" two")), ([harness.prefix_token_id], encode("x"))]
    for (nats, greedy), (context, continuation) in zip(found, tokens, strict=True):
        right = expected(model, context, continuation)
        assert nats == pytest.approx(right[0], **CLOSE)
        assert greedy == right[1]


def test_long_contexts_are_cut_from_the_left(model):
    harness = LowbitqLM(model, max_length=16)
    context, continuation = "abcdefghij" * 4, "xyz"
    with pytest.warns(UserWarning, match="1 of 2 requests are cut from the left to 16 tokens"):
        found = harness.loglikelihood(
            requests("loglikelihood", (context, continuation), ("ab", "c")), disable_tqdm=True
        )
    kept = model.tokenizer.encode(context)[-14:]  # 16 are read: all but the last of 17
    right = expected(model, kept, model.tokenizer.encode(continuation))
    assert found[0][0] == pytest.approx(right[0], **CLOSE)
    with pytest.raises(ValueError, match="a continuation has 17 tokens"):
        harness.loglikelihood(requests("loglikelihood", ("a", "b" * 17)), disable_tqdm=True)


def test_rolling_equals_perplexity(model):
    """Windows that predict each token once, the first one after the prefix token."""
    text = "It was a bright cold day in April, and the clocks were striking."
    tokens = model.tokenizer.encode(text)
    harness = LowbitqLM(model, max_length=32)
    whole, cut = harness.loglikelihood_rolling(
        requests("loglikelihood_rolling", (text[:32],), (text,)), disable_tqdm=True
    )
    row = np.array([harness.prefix_token_id, *tokens])
    assert len(tokens) == 64
    parts = [lq.perplexity(model, row[start : start + 33], window=33) for start in (0, 32)]
    assert whole == pytest.approx(-32 * parts[0].nll, **CLOSE)
    assert cut == pytest.approx(-32 * (parts[0].nll + parts[1].nll), **CLOSE)


def test_text_without_tokens_has_no_likelihood(harness):
    assert harness.loglikelihood_rolling(
        requests("loglikelihood_rolling", ("",)), disable_tqdm=True
    ) == [0.0]


def generate(harness, context, **options):
    found = harness.generate_until(
        requests("generate_until", (context, options)), disable_tqdm=True
    )
    return found[0]


def test_generates_what_the_model_does(model, harness):
    context = "Once upon a time"
    written = model.generate(context, max_new_tokens=20)
    assert generate(harness, context, until=[], max_gen_toks=20) == written
    assert generate(harness, context, max_new_tokens=5) == model.generate(context, max_new_tokens=5)
    stops = [written[9:11], written[14]]
    right = written[: min(written.index(stop) for stop in stops)]
    assert generate(harness, context, until=stops, max_gen_toks=20) == right


def test_an_empty_context_is_the_prefix_token(model, harness):
    tokens = model.generate([harness.prefix_token_id], max_new_tokens=5)
    text = "".join(model.tokenizer.stream(tokens, after=[harness.prefix_token_id]))
    assert generate(harness, "", max_gen_toks=5) == text


def test_sampling_follows_the_seed(model):
    def drawn(seed):
        harness = LowbitqLM(model, seed=seed)
        return [
            generate(harness, "Once", max_gen_toks=12, do_sample=True, temperature=2.0, top_p=0.9)
            for _ in range(2)
        ]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 2


def test_long_prompts_are_cut_from_the_left(model):
    harness = LowbitqLM(model, max_length=24)
    text = generate(harness, "abcdefghijklmnopqrstuvwxyz", max_gen_toks=8)
    assert text == model.generate("klmnopqrstuvwxyz", max_new_tokens=8)
    with pytest.raises(ValueError, match="max_gen_toks is 24, but the model reads at most 24"):
        generate(harness, "a", max_gen_toks=24)


def test_unknown_options_are_refused(harness):
    assert generate(harness, "a", max_gen_toks=1, num_beams=1)
    with pytest.raises(ValueError, match="option num_beams=4: unknown"):
        generate(harness, "a", max_gen_toks=1, num_beams=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 5000}, "max_length is 5000, but the model reads at most 4096"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
    ],
)
def test_refuses_arguments(model, options, message):
    with pytest.raises(ValueError, match=message):
        LowbitqLM(model, **options)


def test_refuses_a_model_without_a_tokenizer(model):
    mute = model.copy()
    mute.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        LowbitqLM(mute)


def test_last_message_may_be_left_open(model):
    speaking = model.copy()
    speaking.tokenizer = lq.Tokenizer(
        model.tokenizer._backend,
        chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}",
    )
    harness = LowbitqLM(speaking)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert harness.apply_chat_template(messages) == "[Hi][Yes]>"
    assert harness.apply_chat_template(messages, add_generation_prompt=False) == "[Hi][Yes"
    assert harness.chat_template(True) == speaking.tokenizer.chat_template


def test_whole_task_by_name(model, tiny_folder):
    """As the command does it, by the model's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm-eval's own
        found = lm_eval.simple_evaluate(
            "lowbitq",
            model_args={"path": str(tiny_folder)},
            tasks=[CHOICE],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            device="cuda:0",  # the command's default
        )
    encode = model.tokenizer.encode
    right = 0
    for line in CAPITALS:
        scores = [
            expected(model, encode(line["question"]), encode(f" {choice}"))[0]
            for choice in line["choices"]
        ]
        right += int(np.argmax(scores)) == line["answer"]
    assert found["results"]["capitals"]["acc,none"] == right / len(CAPITALS)
    assert json.dumps(found["results"])
