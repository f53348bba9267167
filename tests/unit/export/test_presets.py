"""Presets say what the publishers' own inference code does, and make valid manifests."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.helpers.documents import valid_anyflow_document, valid_document, valid_tim_document, valid_wan_document
from tmd_engines import Manifest
from tmd_engines.bundle.manifest import parse_manifest
from tmd_export.errors import ExportError
from tmd_export.families import FAMILIES, find_preset, presets
from tmd_export.presets.wan import WAN_NEGATIVE_PROMPT
from tmd_runtime.sampling import resolve_settings
from tmd_runtime.sampling.schedule import told_time

PRESETS = presets()
FAMILY_OF = {name: family for family in FAMILIES.values() for name in family.presets}
WAN22 = ("wan2.2-ti2v", "fastwan2.2", "wan2.2-turbo")  # of Wan2.2-TI2V-5B
A14B = ("wan2.2-a14b", "lightning")


def manifest_of(name: str) -> Manifest:
    preset = PRESETS[name]
    documents = {
        "tmd": valid_document,
        "wan": valid_wan_document,
        "anyflow": valid_anyflow_document,
        "tim": valid_tim_document,
    }
    document = documents[FAMILY_OF[name].name]()
    document |= {"sampler": dict(preset.sampler), "video": dict(preset.video)}
    return parse_manifest(json.dumps(document).encode(), name)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_manifest_that_runs(name: str) -> None:
    manifest = manifest_of(name)
    settings = resolve_settings(manifest, seed=0)
    assert not settings.warnings and settings.rule == PRESETS[name].sampler["rule"]
    sizes = {"tim": (1024, 1024, 1), "fastmetal": (832, 448, 16)} | dict.fromkeys(WAN22, (1280, 704, 24))
    sizes |= dict.fromkeys(A14B, (1280, 720, 16))
    assert (settings.width, settings.height, settings.fps) == sizes.get(name, (832, 480, 16))
    assert settings.passes == (2 if name in ("wan", "wan2.2-ti2v", "wan2.2-a14b", "tim") else 1)
    assert find_preset(FAMILY_OF[name], name) is PRESETS[name]


@pytest.mark.parametrize(
    ("name", "rule", "told", "scale", "frames"),
    [
        # what the network is told, 1000·t, for each step
        ("rcm", "renoise", [988, 932, 852, 608], 0.987654, 77),
        ("lightx2v", "euler", [1000, 937.5, 833.333, 625], 1, 81),
        ("fastwan-qad", "renoise", [1000, 757, 522], 1, 81),
        ("fastmetal", "renoise", [1000, 757, 522], 1, 77),
        ("causvid", "renoise", [1000, 757, 522], 1, 81),
        ("fastwan2.2", "renoise", [1000, 757, 522], 1, 121),
        ("wan2.2-turbo", "renoise", [1000, 750, 500, 250], 1, 121),
        ("codmd", "renoise", [1000, 900, 757, 522], 1, 81),
        ("codmd-14b", "renoise", [1000, 937, 833, 624], 1, 81),
        ("accvideo", "unipc", [999, 978, 952, 920, 882, 833, 768, 681, 555, 356], 1, 81),
    ],
)
def test_times_are_those_of_the_publishers(name: str, rule: str, told: list[float], scale: float, frames: int) -> None:
    settings: Any = resolve_settings(manifest_of(name), seed=0)
    found = [1000 * told_time(t, settings.time_rounding) for t in settings.times[:-1]]
    assert found == pytest.approx(told, abs=1e-3)
    assert settings.times[-1] == 0 and settings.guidance == 1
    assert (settings.rule, settings.frames) == (rule, frames)
    assert settings.init_scale == pytest.approx(scale, abs=1e-6)


def test_rcm_times_in_closed_form() -> None:
    """sin/(sin + cos) is t with t/(1 - t) = tan(angle): 80 for the first."""
    times = PRESETS["rcm"].sampler["times"]
    assert [t / (1 - t) for t in times] == pytest.approx([80.0, *map(math.tan, (1.5, 1.4, 1.0))])
    for steps in (1, 2, 3, 4):
        assert resolve_settings(manifest_of("rcm"), seed=0, steps=steps).times == (*times[:steps], 0.0)


@pytest.mark.parametrize(
    ("name", "listed", "times"),
    [
        *((name, (1000, 757, 522), [1, 0.7568, 0.5217, 0]) for name in ("fastwan-qad", "fastmetal", "causvid")),
        ("fastwan2.2", (1000, 757, 522), [1, 0.7568, 0.5217, 0]),
        ("codmd", (1000, 900, 757, 522), [1, 0.8999, 0.7568, 0.5217, 0]),
        ("codmd-14b", (1000, 937, 833, 624), [1, 0.9369, 0.833, 0.6243, 0]),
        ("wan2.2-turbo", (1000, 750, 500, 250), [1, 0.7503, 0.4997, 0.25, 0]),
    ],
)
def test_steps_of_whole_numbers_go_through_the_times_that_their_table_has(
    name: str, listed: tuple[int, ...], times: list[float]
) -> None:
    """All these projects look for the nearest entry; diffusers' scheduler makes the same table."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    nearest = [int((scheduler.timesteps - told).abs().argmin()) for told in listed]
    expected = [*scheduler.sigmas[nearest].tolist(), 0.0]
    assert expected == pytest.approx(times, abs=5e-5)
    assert resolve_settings(manifest_of(name), seed=0).times == pytest.approx(expected, abs=1e-7)


def test_the_teacher_is_steered_as_wan_steers_it() -> None:
    phrases = WAN_NEGATIVE_PROMPT.split("，")
    assert (len(phrases), len(WAN_NEGATIVE_PROMPT), len(WAN_NEGATIVE_PROMPT.encode())) == (28, 137, 403)
    assert phrases[0] == "色调艳丽" and phrases[-1] == "倒着走"
    settings: Any = resolve_settings(manifest_of("wan"), seed=0)
    assert (settings.steps, settings.guidance, settings.negative_prompt) == (50, 5.0, WAN_NEGATIVE_PROMPT)
    told = [round(1000 * told_time(t, settings.time_rounding)) for t in settings.times[:-1]]
    assert told[:6] == [999, 992, 985, 978, 971, 963] and told[-4:] == [206, 160, 111, 57]  # its scheduler at shift 3


def test_each_family_has_a_preset_when_none_is_named() -> None:
    assert {name: find_preset(family).about for name, family in FAMILIES.items()} == {
        name: PRESETS[name].about for name in ("tmd", "wan", "anyflow", "tim")
    }


def test_the_presets_of_one_architecture_are_refused_for_the_other() -> None:
    wan = FAMILIES["wan"]
    assert find_preset(wan, None, "wan2.1-t2v") is PRESETS["wan"]
    assert find_preset(wan, None, "wan2.2-ti2v") is PRESETS["wan2.2-ti2v"]
    message = f"the preset rcm is for rCM, .* is of the architecture wan2.2-ti2v: choose among {', '.join(WAN22)}[.]"
    with pytest.raises(ExportError, match=message):
        find_preset(wan, "rcm", "wan2.2-ti2v")
    with pytest.raises(
        ExportError, match=r"fastwan2\.2 is for .* of the architecture wan2\.1-t2v: choose among wan, rcm"
    ):
        find_preset(wan, "fastwan2.2", "wan2.1-t2v")


def test_wan22_itself_is_steered_as_wan21_with_shift_5() -> None:
    settings: Any = resolve_settings(manifest_of("wan2.2-ti2v"), seed=0)
    assert (settings.rule, settings.steps, settings.guidance, settings.frames) == ("unipc", 50, 5.0, 121)
    assert settings.negative_prompt == WAN_NEGATIVE_PROMPT
    told = [round(1000 * told_time(t, settings.time_rounding)) for t in settings.times[:-1]]
    assert told[:6] == [999, 995, 991, 987, 982, 978] and told[-4:] == [302, 241, 172, 92]  # its scheduler at shift 5


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("tmd", "rcm", "for rCM, .* this checkpoint has a flow head with inner steps: choose among tmd"),
        (
            "wan",
            "tmd",
            "for a TMD student, and this checkpoint is a Wan .*: choose among wan, rcm, lightx2v",
        ),
        ("wan", "magic", "no preset 'magic': choose one of tmd, wan, rcm"),
    ],
)
def test_a_preset_of_another_family_is_refused(family: str, name: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        find_preset(FAMILIES[family], name)
