"""The command line: searching the parameters of a saved model."""

from __future__ import annotations

import json

import pytest
from command_line import run

import lowbitq as lq


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_folder):
    """A model whose layers round their inputs to 4 bits."""
    folder = tmp_path_factory.mktemp("saved") / "small"
    lq.compress(lq.load(tiny_folder), "int4g32 a4", method="rtn").save(folder)
    return folder


@pytest.fixture
def search(capsys, saved, tiny_folder, text_file, tmp_path):
    """The search command, and the folder it writes."""
    out = tmp_path / "searched"
    arguments = ["search", saved, tiny_folder, out, "--text", text_file, "--window", 48]
    return lambda *more: run(capsys, *arguments, "--measure", 2, "--trials", 4, *more), out


def test_the_best_parameters_are_saved(search, saved):
    command, out = search
    code, shown, err = command("--json", "--seed", 1)
    assert (code, err) == (0, [])
    found, before, after = json.loads(shown), lq.load(saved), lq.load(out)
    assert found["value"] <= found["before"]
    assert found["trials"] == 4
    clips = {name.split(".")[-1]: x.copies[0].activation.clip for name, x in after.linears()}
    for name, value in found["parameters"].items():
        assert clips[name.split(" ")[0].removeprefix("*.")] == value
    assert after.nbytes == before.nbytes


def test_a_space_in_a_file_and_a_study_on_disk(search, tmp_path):
    command, _ = search
    path, study = tmp_path / "space.json", tmp_path / "study.log"
    path.write_text('{"*": {"scale": [0.5, 0.8], "clip": {"low": 0.9, "high": 1}}}')
    more = ["--space", path, "--static", "0.99", "--storage", study, "--sampler", "random"]
    code, shown, _ = command(*more, "--objective", "block")
    assert code == 0
    assert shown.startswith("block ")
    code, _, err = command(*more)
    assert code == 1
    assert "is of another search, with different objective" in err[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "space.json: not a space"),
        ("[]", "space.json: not a space"),
        ('{"*": 3}', "space.json: not a space"),
        ('{"*": {"clip": 3}}', "clip is 3, expected a list or low and high"),
        ('{"*": {"clip": {"low": 1}}}', "clip has low, expected low and high"),
        ('{"*": {"clip": ["a"]}}', "expected a range"),
        ('{"*": {"scale": [1]}}', "scales each token by itself"),
    ],
)
def test_bad_spaces_are_refused(search, tmp_path, content, said):
    command, out = search
    (tmp_path / "space.json").write_text(content)
    code, _, err = command("--space", tmp_path / "space.json")
    assert code == 1
    assert len(err) == 1
    assert said in err[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--sampler", "bayes"], 2, "invalid choice"),
        (["--objective", "loss"], 2, "invalid choice"),
        (["--space", "absent.json"], 1, "absent.json"),
        (["--storage", "study"], 1, "expected a path ending in .log or .db"),
        (["--static", "2"], 1, "share is 2.0"),
    ],
)
def test_wrong_use_is_one_line(search, more, code, said):
    command, _ = search
    found = command(*more)
    assert found[0] == code
    assert said in found[2][-1]
