"""Plans: their texts, patterns, refusals, JSON."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbitq.formats import Format
from lowbitq.plan_options import Rounding, RoundingOptions, Sampling
from lowbitq.plans import CopyPlan, LayerPlan, Plan, PlanOptions

NAMES = [
    f"model.layers.{i}.{name}"
    for i in range(3)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]

roundings = st.builds(
    Rounding,
    method=st.sampled_from(["gptq", "rtn"]),
    damping=st.floats(0, 1),
    sweeps=st.none() | st.integers(0, 9),
    importance=st.booleans(),
)
copies = st.builds(
    CopyPlan,
    st.sampled_from(["int2g64", "int4g32s8", "ternary", "nf4g64"]),
    st.sampled_from([None, "hadamard", "orthogonal"]),
    st.sampled_from(["own", "shared", "residual"]),
    st.sampled_from([8, 4, None]),
)
layers = st.builds(
    lambda first, others, rounding, rank: LayerPlan((first, *others), rounding, rank),
    copies.filter(lambda copy: copy.mode == "own"),
    st.lists(copies, max_size=2),
    roundings,
    st.integers(0, 16),
)


@given(layers)
@settings(deadline=None)
def test_a_layer_is_its_text_and_its_rounding(layer):
    assert LayerPlan.parse(str(layer), layer.rounding) == layer


@given(st.dictionaries(st.sampled_from(NAMES), layers), st.none() | layers, st.integers(0, 9))
@settings(deadline=None)
def test_json_round_trip(layers, embedding, seed):
    plan = Plan(layers, rotation="none", seed=seed, embedding=embedding, sampling=Sampling(3))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)


@pytest.mark.parametrize(
    ("text", "copies", "rank"),
    [
        ("int2g64", [CopyPlan("int2g64")], 0),
        ("int2g64 a4", [CopyPlan("int2g64", activation_bits=4)], 0),
        ("int2g64 a32 hadamard", [CopyPlan("int2g64", "hadamard", activation_bits=None)], 0),
        ("int2g64+int4 residual", [CopyPlan("int2g64"), CopyPlan("int4", mode="residual")], 0),
        ("int2g64 + rank16", [CopyPlan("int2g64")], 16),
    ],
)
def test_texts(text, copies, rank):
    assert LayerPlan.parse(text) == LayerPlan(tuple(copies), rank=rank)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown format ''"),
        ("int9", "unknown format 'int9'"),
        ("int2g64 twice", "has 'twice', expected one each of hadamard"),
        ("int2g64 a4 a8", "has 'a8', expected one each"),
        ("int2g64 residual", "first has mode 'residual', expected a first copy of mode 'own'"),
        ("int2g64 +", "unknown format ''"),
        ("rank8", "unknown format 'rank8'"),
        ("int2g64 + rank-1", "unknown format 'rank-1'"),
    ],
)
def test_bad_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        LayerPlan.parse(text)
    with pytest.raises(ValueError, match="there is none, expected a first copy of mode 'own'"):
        LayerPlan(())


def test_uniform_names_every_layer():
    plan = Plan.uniform(NAMES, "int4g64", seed=3, order="act", first_tokens=2)
    assert plan.layers == dict.fromkeys(NAMES, LayerPlan.parse("int4g64", Rounding(order="act")))
    assert (plan.seed, plan.sampling.first_tokens) == (3, 2)


def test_the_last_pattern_that_matches_decides():
    overrides = {"*.down_proj": "int4g32", "model.layers.1.*": "int2g64sym + int2g64 residual"}
    plan = Plan.uniform(NAMES, "int3g64", overrides=overrides, damping=0.5)
    texts = {name: str(layer) for name, layer in plan.layers.items()}
    assert texts["model.layers.0.mlp.down_proj"] == "int4g32"
    assert texts["model.layers.1.mlp.down_proj"] == "int2g64sym + int2g64 residual"
    assert texts["model.layers.1.self_attn.q_proj"] == "int2g64sym + int2g64 residual"
    assert texts["model.layers.2.self_attn.q_proj"] == "int3g64"
    assert {layer.rounding.damping for layer in plan.layers.values()} == {0.5}


def test_a_pattern_without_a_match_is_named():
    with pytest.raises(ValueError, match=r"override '\*.dwn_proj' matches none of 9 layers"):
        Plan.uniform(NAMES, "int3g64", overrides={"*.dwn_proj": "int4g32"})


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
        ("activation_bits", True),
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
        Plan.uniform(["a"], "int4", **{name: value})


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="colour"):
        Plan.uniform(NAMES, "int4g64", colour="red")


def test_few_bits_are_swept_unless_told_otherwise():
    formats = [*map(Format.parse, ("binary", "int2g64", "lattice2", "trellis2", "int3", "int8"))]
    assert [Rounding().sweeps_for(format) for format in formats] == [2, 2, 2, 0, 0, 0]
    assert {Rounding(sweeps=1).sweeps_for(format) for format in formats} == {1}


def test_text_is_needed_for_feedback_only():
    assert Plan({"a": "int4"}).needs_text
    assert not Plan.uniform(["a"], "int4", method="rtn").needs_text
    assert not Plan({}).needs_text


@pytest.mark.parametrize(
    ("asked", "text"), [({}, "int8g64"), ({"activation_bits": 4}, "int8g64"),
                        ({"activation_bits": None}, "int8g64 a32"),
                        ({"embedding": "int4g32"}, "int4g32"), ({"embedding": None}, "None")],
)  # fmt: skip
def test_the_embedding_is_rounded_to_nearest(asked, text):
    plan = Plan.uniform(NAMES, "int2g64", **asked)
    assert str(plan.embedding) == text
    assert plan.embedding is None or plan.embedding.rounding.method == "rtn"


def test_json_of_the_first_release_is_read():
    """Its fields stood side by side, with one format for each layer."""
    old = {
        "layers": {"a": "int2g64", "b": "int4g32sym"},
        "rotation": "orthogonal",
        "seed": 3,
        "method": "gptq",
        "range": "minmax",
        "norm": 2.4,
        "importance": False,
        "damping": 0.02,
        "damping_by": "mean",
        "order": "act",
        "first_tokens": 2,
        "first_weight": 8.0,
        "sweeps": None,
        "arithmetic": "float64",
        "activation_bits": 4,
        "embedding": "int8g64",
    }
    options = {name: value for name, value in old.items() if name != "layers"}
    expected = Plan.uniform(["a", "b"], "int2g64", overrides={"b": "int4g32sym"}, **options)
    assert Plan.from_json(json.dumps(old)) == expected


def test_json_fields_may_be_missing():
    assert Plan.from_json('{"layers": {}, "seed": 2}') == Plan({}, seed=2)
    assert Plan.from_json("{}") == Plan({})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "JSON object"),
        ('{"layers": []}', "'layers' is"),
        ('{"layers": {}, "lyers": 1}', "no field 'lyers'"),
        ('{"layers": {}, "seed": "1"}', "seed is '1', expected int"),
        ('{"layers": {}, "importance": 1}', "importance is 1, expected bool"),
        ('{"rounding": {"importance": 1}}', "importance is 1, expected bool"),
        ('{"rounding": {"damp": 1}}', "no field 'damp'"),
        ('{"roundings": {"a": {"damping": 1}}}', "roundings has 'a', which is not a layer"),
        ('{"layers": {"a": "int4"}, "roundings": {"a": 3}}', "'a' is 3, expected a JSON object"),
        ('{"layers": {}, "seed": true}', "seed is True"),
        ('{"layers": {"a": 3}}', "a is 3, expected str"),
        ('{"layers": {}, "embedding": 8}', "embedding is 8, expected str"),
        ('{"layers": {}, "embedding": "int9"}', "unknown format 'int9'"),
        ('{"activation_bits": 8.0}', "activation_bits is 8.0"),
        ("{", "plan is not JSON"),
        pytest.param("[" * 100_000, "plan is not JSON", id="deep"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_defaults_are_in_the_json():
    written = json.loads(Plan({}).to_json())
    assert written["sampling"] == {"first_tokens": 4, "first_weight": 16.0, "clip": 20.0}
    assert written["rounding"]["damping_by"] == "median"


def test_typed_options_are_the_fields():
    """Which type checkers know; at run time any field is an option."""
    names = {field.name for field in fields(Rounding)}
    assert set(RoundingOptions.__annotations__) == names
    names |= {field.name for kind in (Sampling, Plan) for field in fields(kind)}
    names -= {"layers", "sampling"}
    assert set(PlanOptions.__annotations__) == names | {"overrides", "activation_bits"}
