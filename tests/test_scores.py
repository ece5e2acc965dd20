"""Scores of layers: weights, normalization, levels, files."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbitq import plots
from lowbitq._core import FormatError
from lowbitq.ranks import kendall, spearman
from lowbitq.scores import (
    LayerScore,
    Sensitivity,
    effective_weights,
    normalized,
    scored,
    weights_for_bits,
)

SIZES = {"self_attn.q_proj": 64, "self_attn.o_proj": 48, "mlp.up_proj": 96, "mlp.down_proj": 100}
HOW = ["minmax", "zscore", "rank"]


def result(*, gradients=True, measured=True, normalize="minmax", seed=0):
    """Random metrics of three blocks in two formats."""
    rng = np.random.default_rng(seed)
    rows = [
        LayerScore(
            f"model.layers.{index}.{kind}",
            format,
            size,
            0.0,
            *rng.random(2).tolist(),
            *(rng.random(2).tolist() if gradients else (None, None)),
            *rng.random(2).tolist(),
            float(rng.random()) if measured else None,
        )
        for format in ("int2g32", "binary")
        for index in range(3)
        for kind, size in SIZES.items()
    ]
    weights = {
        format: effective_weights(format, None, gradients) for format in ("int2g32", "binary")
    }
    rows = scored(rows, weights, normalize)
    return Sensitivity(
        rows, "linear", 100.0, "mean", normalize, weights, (4, 32), 4 * measured, 1.5
    )


def column(found, metric, format="int2g32"):
    return np.array([getattr(row, metric) for row in found.of(format)])


# --- the score ------------------------------------------------------------------------------------


def test_weights_are_those_of_the_source():
    assert weights_for_bits(2) == (0.5, 0.3, 0.2)
    assert weights_for_bits(1) == (0.3, 0.5, 0.2)


def test_other_weights_follow_the_rule():
    for bits in (2, 2.5, 3, 4, 8):
        assert weights_for_bits(bits) == weights_for_bits(2)
    assert weights_for_bits(0.5) == weights_for_bits(1)
    assert weights_for_bits(1.5) == pytest.approx((0.4, 0.4, 0.2))
    for bits in np.linspace(0.1, 5, 50):
        assert sum(weights_for_bits(bits)) == pytest.approx(1)
    for bits in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=r"bits is .*, expected a positive number"):
            weights_for_bits(bits)


def test_weights_depend_on_the_bits_of_the_format():
    found = result()
    assert found.weights == {"int2g32": (0.5, 0.3, 0.2), "binary": (0.3, 0.5, 0.2)}
    assert effective_weights("trellis1.5", None, True) == pytest.approx((0.4, 0.4, 0.2))


def test_without_gradients_their_weight_is_shared_out():
    found = result(gradients=False)
    assert found.weights["int2g32"] == pytest.approx((0.625, 0.375, 0))
    assert not found.has_gradients
    assert "no gradients" in str(found)
    assert "no gradients" not in str(result())
    assert effective_weights("int2", (1, 3, 4), False) == (0.25, 0.75, 0)
    assert effective_weights("int2", (1, 3, 4), True) == (1, 3, 4)


@pytest.mark.parametrize(
    "bad",
    [
        (1, 2),
        (1, 2, 3, 4),
        (-1, 1, 1),
        (0, 0, 0),
        (1, 1, float("nan")),
        (1, 1, float("inf")),
        (1, 1, "1"),
    ],
)
def test_bad_weights_are_refused(bad):
    with pytest.raises(ValueError, match=r"unpack|weights are|not a finite number"):
        effective_weights("int2", bad, True)


@pytest.mark.parametrize("how", HOW)
def test_score_is_the_weighted_sum(how):
    found = result(normalize=how)
    for format, weights in found.weights.items():
        expected = 0
        for weight, metric in zip(weights, ("quant", "massive", "gradient"), strict=True):
            x = column(found, metric, format)
            expected += (
                weight
                * {
                    "minmax": (x - x.min()) / (x.max() - x.min()),
                    "zscore": (x - x.mean()) / x.std(),
                    "rank": x.argsort().argsort() / (len(x) - 1),
                }[how]
            )
        assert column(found, "score", format) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("metric", ["quant", "massive", "gradient"])
@pytest.mark.parametrize("factor", [1e-9, 0.3, 1e6])
def test_score_does_not_depend_on_the_scale_of_a_metric(how, metric, factor):
    found = result(normalize=how)
    rows = [replace(row, **{metric: factor * getattr(row, metric)}) for row in found.rows]
    again = scored(rows, found.weights, how)
    assert [row.score for row in again] == pytest.approx(
        [row.score for row in found.rows], rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize("how", HOW)
def test_a_constant_metric_adds_nothing(how):
    assert normalized([0.1, 0.1, 0.1], how).tolist() == [0, 0, 0]
    assert normalized([7], how).tolist() == [0]


def test_ties_share_their_rank():
    assert normalized([5, 1, 1, 9, 7], "rank").tolist() == [0.5, 0.125, 0.125, 1, 0.75]


def test_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="normalize is 'max', expected one of 'minmax'"):
        normalized([1, 2], "max")


def test_rescored_is_scored_with_other_weights():
    found = result()
    again = found.rescored(weights=(1, 0, 0), normalize="rank")
    assert column(again, "score") == pytest.approx(normalized(column(found, "quant"), "rank"))
    assert again.weights["int2g32"] == (1, 0, 0)
    assert again.normalize == "rank"
    assert again.rescored(weights=(0.5, 0.3, 0.2), normalize="minmax").of("int2g32") == found.of(
        "int2g32"
    )
    with pytest.raises(ValueError, match="the result is for 'half', expected 'linear'"):
        found.at("half").rescored(weights=(1, 0, 0))


# --- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(("level", "parts"), [("half", 2), ("block", 1)])
def test_a_part_has_the_weighted_mean_of_its_layers(level, parts, gradients):
    found = result(gradients=gradients)
    coarse = found.at(level)
    assert len(coarse.rows) == 2 * 3 * parts
    for row in coarse.rows:
        own = [r for r in found.of(row.format) if r.layer.startswith(f"{row.layer}.")]
        sizes = np.array([r.parameters for r in own], float)
        assert row.parameters == sizes.sum()
        for metric in ("score", "quant", "massive", "gradient", "fisher", "output", "energy"):
            values = [getattr(r, metric) for r in own]
            if None in values:
                assert getattr(row, metric) is None
            else:
                expected = (sizes * values).sum() / sizes.sum()
                assert getattr(row, metric) == pytest.approx(expected, rel=1e-9)
        assert row.measured is None
    assert coarse.measured_windows == 0
    assert found.at("linear") is found


def test_levels_that_cannot_be_had_are_refused():
    for one, level in ((result(), "head"), (result().at("block"), "half")):
        with pytest.raises(ValueError, match=f"level is '{level}', but the result is for"):
            one.at(level)


# --- what is made of it ---------------------------------------------------------------------------


def test_ranking_begins_with_the_most_sensitive():
    found = result()
    for metric in ("score", "massive", "measured"):
        names = [row.layer for row in found.of("binary")]
        expected = [names[i] for i in np.argsort(-column(found, metric, "binary"))]
        assert found.ranking("binary", by=metric) == expected


def test_what_was_not_computed_is_said():
    found = result(gradients=False, measured=False)
    for metric, needed in (("gradient", "gradients"), ("measured", "measure=True")):
        with pytest.raises(ValueError, match=f"{metric} was not computed; it needs {needed}"):
            found.ranking("binary", by=metric)
    with pytest.raises(ValueError, match="metric is 'size', expected one of score"):
        found.ranking("binary", by="size")
    with pytest.raises(ValueError, match="format is 'int3', expected one of int2g32, binary"):
        found.ranking("int3")
    assert found.correlations == {}


def test_correlations_are_with_the_measured_divergence():
    found = result()
    for format, row in found.correlations.items():
        assert list(row) == [
            "score", "quant", "massive", "gradient", "fisher", "output", "energy",
        ]  # fmt: skip
        for metric, value in row.items():
            x, y = column(found, metric, format), column(found, "measured", format)
            assert value == spearman(x, y)
    flat = replace(found, rows=tuple(replace(row, massive=0.0) for row in found.rows))
    assert "massive" not in flat.correlations["binary"]


def test_results_are_compared_by_their_ranking():
    one, other = result(), result(seed=1)
    found = one.compare(other, by="quant")
    for format in ("int2g32", "binary"):
        pair = column(one, "quant", format), column(other, "quant", format)
        assert found[format] == {"spearman": spearman(*pair), "kendall": kendall(*pair)}
    assert one.compare(one)["binary"]["kendall"] == pytest.approx(1)
    with pytest.raises(ValueError, match="different layers"):
        one.compare(other.at("half"))


def test_the_table_is_sorted_by_score():
    found = result()
    lines = str(found).splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("  model.")]
    assert shown == found.ranking("int2g32") + found.ranking("binary")
    assert lines[-1].startswith("binary: Spearman correlation")
    assert f"score {found.correlations['binary']['score']:.2f}" in lines[-1]
    assert "gradient" not in "".join(
        line for line in str(result(gradients=False)).splitlines() if "  layer" in line
    )


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("level", ["linear", "half", "block"])
def test_results_survive_a_file(tmp_path, gradients, level):
    found = result(gradients=gradients).at(level)
    found.save(tmp_path / "a.json")
    assert Sensitivity.load(tmp_path / "a.json") == found
    assert Sensitivity.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_damaged_file_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    result().save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-3], b"", b"[]", b"\xff", b"[" * 100000, b'{"rows": []}'):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"a\.json: "):
            Sensitivity.load(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(field=st.sampled_from(sorted(result().to_dict())), value=JSON)
def test_a_wrong_field_is_a_value_error_or_harmless(field, value):
    values = result().to_dict() | {field: value}
    try:
        str(Sensitivity.from_dict(values))
    except ValueError:
        return
    assert field not in ("rows", "weights")


@given(field=st.sampled_from(sorted(asdict(result().rows[0]))), value=JSON)
def test_a_wrong_field_of_a_row_is_a_value_error_or_fits(field, value):
    values = result().to_dict()
    values["rows"][0][field] = value
    try:
        str(Sensitivity.from_dict(values))
    except ValueError:
        return
    assert isinstance(value, (str, int, float))


def test_missing_pandas_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        result().to_frame()


def test_a_frame_has_a_row_per_layer_and_format():
    pytest.importorskip("pandas")
    found = result(gradients=False)
    frame = found.to_frame()
    assert list(frame.columns) == list(asdict(found.rows[0]))
    assert frame["quant"].tolist() == [row.quant for row in found.rows]
    assert frame["gradient"].isna().all()


class Axes:
    """Remembers what is drawn."""

    def __init__(self):
        self.lines = {}

    def plot(self, x, y, *_, label, **__):
        self.lines[label] = dict(zip(x, y, strict=True))

    def set(self, **options):
        self.options = options

    def legend(self, **_):
        self.has_legend = True


@pytest.mark.parametrize("level", ["linear", "block"])
def test_a_plot_has_a_line_per_kind_of_layer(level):
    found = result().at(level)
    axes = Axes()
    assert found.plot("binary", by="quant", axes=axes) is axes
    assert set(axes.lines) == ({""} if level == "block" else set(SIZES))
    for kind, line in axes.lines.items():
        expected = {
            int(row.layer.split(".")[2]): row.quant
            for row in found.of("binary")
            if row.layer.split(".", 3)[3:] == ([kind] if kind else [])
        }
        assert line == expected
    assert axes.options["ylabel"] == "quant, binary"
    assert hasattr(axes, "has_legend") == (level == "linear")


def test_matplotlib_draws_it():
    pytest.importorskip("matplotlib")
    axes = result().plot("binary")
    assert len(axes.get_lines()) == len(SIZES)
    assert plots.over_blocks({"": {0: 1.0}}, "x").get_legend() is None
