"""Plans: patterns, refusals, JSON."""

from __future__ import annotations

import json

import pytest
from random_model import random_model

from lowbitq.plans import Plan


def test_uniform_names_every_layer():
    model = random_model()
    plan = Plan.uniform(model, "int4g64", seed=3, order="act")
    assert plan.layers == {name: "int4g64" for name, _ in model.linears()}
    assert (plan.seed, plan.order) == (3, "act")


def test_the_last_pattern_that_matches_decides():
    overrides = {"*.down_proj": "int4g32", "model.layers.1.*": "int2g64sym"}
    plan = Plan.uniform(random_model(), "int3g64", overrides=overrides)
    assert plan.layers["model.layers.0.mlp.down_proj"] == "int4g32"
    assert plan.layers["model.layers.1.mlp.down_proj"] == "int2g64sym"
    assert plan.layers["model.layers.1.self_attn.q_proj"] == "int2g64sym"
    assert plan.layers["model.layers.2.self_attn.q_proj"] == "int3g64"


def test_a_pattern_without_a_match_is_named():
    with pytest.raises(ValueError, match=r"override '\*.dwn_proj' matches none of 21 layers"):
        Plan.uniform(random_model(), "int3g64", overrides={"*.dwn_proj": "int4g32"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotation", "givens"),
        ("method", "awq"),
        ("range", "max"),
        ("damping_by", "max"),
        ("order", "random"),
        ("arithmetic", "float16"),
        ("activation_bits", 6),
        ("damping", -0.1),
        ("damping", float("nan")),
        ("seed", -1),
        ("first_tokens", -1),
        ("sweeps", -1),
        ("norm", 0),
    ],
)
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is "):
        Plan({}, **{name: value})


def test_bad_formats_are_named():
    with pytest.raises(ValueError, match="unknown format 'int9'"):
        Plan({"model.layers.0.mlp.up_proj": "int9"})


def test_few_bits_are_swept_unless_told_otherwise():
    layers = {"a": "int2g64", "b": "ternary", "c": "int3g64", "d": "int8g64"}
    assert [Plan(layers).sweeps_of(name) for name in layers] == [2, 2, 0, 0]
    assert [Plan(layers, sweeps=1).sweeps_of(name) for name in layers] == [1, 1, 1, 1]
    assert Plan(layers, sweeps=0).sweeps_of("a") == 0


def test_json_round_trip():
    plan = Plan.uniform(
        random_model(), "int3g64", rotation="none", damping=0.5, activation_bits=None
    )
    assert Plan.from_json(plan.to_json()) == plan


def test_an_embedding_has_a_format_or_none():
    for embedding in ("int4g32", None):
        plan = Plan({}, embedding=embedding)
        assert Plan.from_json(plan.to_json()) == plan
        assert plan.embedding == embedding
    with pytest.raises(ValueError, match="unknown format 'int9'"):
        Plan({}, embedding="int9")


def test_json_fields_may_be_missing():
    assert Plan.from_json('{"layers": {}, "seed": 2}') == Plan({}, seed=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "JSON object"),
        ("{}", "'layers'"),
        ('{"layers": {}, "lyers": 1}', "no field 'lyers'"),
        ('{"layers": {}, "seed": "1"}', "seed is '1', expected int"),
        ('{"layers": {}, "importance": 1}', "importance is 1, expected bool"),
        ('{"layers": {}, "seed": true}', "seed is True"),
        ('{"layers": {"a": 3}}', "layers"),
        ('{"layers": {}, "embedding": 8}', "embedding is 8, expected str"),
        ("{", "plan is not JSON"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_defaults_are_in_the_json():
    written = json.loads(Plan({}).to_json())
    assert (written["first_tokens"], written["first_weight"]) == (4, 16.0)
