"""What `serve run tmd_serve.ray:build` takes: Ray gives the words of a command line, or a file's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tmd_runtime import UsageFailure
from tmd_serve.ray.arguments import Arguments


def test_a_command_line_and_a_file_say_the_same() -> None:
    words = {
        "data": "/shared/tmd",
        "require_key": "false",
        "bundles": "builtin:tiny,wan=/models/wan",
        "max_size": "832x480",
        "denoisers": "least=2,most=8,gpus=0.5",
        "decoders": '{"least": 3}',
    }
    values = {
        "data": "/shared/tmd",
        "require_key": False,
        "bundles": {"tiny": "builtin:tiny", "wan": "/models/wan"},
        "max_size": [832, 480],
        "denoisers": {"least": 2, "most": 8, "gpus": 0.5},
        "decoders": {"least": 3},
    }
    found = Arguments.read(words)
    assert found == Arguments.read(values)
    assert (found.data, found.max_size, found.decoders.limit) == (Path("/shared/tmd"), (832, 480), 3)


def test_an_ingress_keeps_two_jobs_going_for_each_denoiser_that_there_may_be() -> None:
    for denoisers, slots in (({}, 2), ({"most": 8}, 16), ({"least": 8}, 16)):
        assert Arguments.read({"data": "/x", "denoisers": denoisers}).slots == slots
    several = {"data": "/x", "denoisers": {"most": 8}, "ingress": {"least": 2, "most": 2}}
    assert Arguments.read(several).slots == 8


def test_the_limits_of_requests_are_those_of_the_arguments() -> None:
    words = {"max_size": "64x32", "max_frames": 9, "max_steps": 7, "max_seconds": 5.5, "max_waiting": 3}
    found = Arguments.read({"data": "/x", **words}).limits
    assert (found.pixels, found.frames, found.steps, found.seconds, found.waiting) == (2048, 9, 7, 5.5, 3)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ({}, "data is missing"),
        ({"databse": "x"}, "there is no argument databse"),
        ({"data": "folder"}, "data is refused: must begin with a slash"),
        ({"denoisers": "2"}, "denoisers is refused: must be NAME=VALUE"),
        ({"denoisers": "{"}, "denoisers is refused: is not JSON"),
        ({"denoisers": {"leest": 1}}, "there is no argument denoisers.leest"),
        ({"bundles": "a=/x,a=/y"}, "each name once"),
        ({"bundles": ""}, "cannot be the name of a model"),
        ({"bundles": {}}, "bundles is refused"),
        ({"max_size": "0x0"}, "max_size"),
        ({"max_size": "big"}, "max_size"),
        ({"threads": "two"}, "threads is refused"),
    ],
)
def test_a_wrong_argument_is_a_sentence_that_names_it(words: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageFailure) as failure:
        Arguments.read({"data": "/x", **words} if words else {})
    message = str(failure.value)
    assert part in message and message.endswith(".") and "\n" not in message


def test_the_application_is_built_from_what_ray_gives_it() -> None:
    """`serve run` and `serve deploy` call a builder with a dictionary."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.serve import Application

    from tmd_serve.ray import build

    assert isinstance(build({"data": "/x", "require_key": "false"}), Application)
    with pytest.raises(UsageFailure, match="several ingresses need one PostgreSQL"):
        build({"data": "/x", "ingress": "least=2,most=2"})
    with pytest.raises(UsageFailure, match="the bundle of wan is not here"):
        build({"data": "/x", "bundles": "wan=/nowhere"})
