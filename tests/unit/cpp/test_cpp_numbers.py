"""The C++ library computes the same bits as Python: RoPE, time grids, update rules, settings, embeddings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.bundle_tools import edit_manifest, reseal
from tests.helpers.cpp_tools import RUN, USAGE, twin
from tests.helpers.documents import valid_document
from tmd_engines import Bundle
from tmd_engines.bundle.families.rules import RULES
from tmd_engines.bundle.manifest import parse_manifest
from tmd_runtime.built_in import BUILT_IN, BUNDLES
from tmd_runtime.errors import RuntimeFailure, UsageFailure
from tmd_runtime.sampling import resolve_settings
from tmd_runtime.sampling.schedule import GRIDS, rope_tables, shift_grid, told_time, wan_grid
from tmd_runtime.text.embedding import TokenEmbedding


def hexed(array: np.ndarray) -> str:
    return array.astype("<f4").tobytes().hex()


@pytest.mark.parametrize("grid", [(1, 1, 1), (5, 4, 6), (1024, 1, 1), (1, 1024, 1), (1, 1, 1024)])
@pytest.mark.parametrize("head_dim", [2, 16, 64, 128])
def test_rope_tables(grid: tuple[int, int, int], head_dim: int) -> None:
    """The long axes hold every angle that any size has."""
    cosine, sine = rope_tables(*grid, head_dim)
    answer = twin().ask("rope", grid=grid, head_dim=head_dim)
    assert answer["ok"] == hexed(cosine) and answer["sine"] == hexed(sine)


def test_rope_refuses_the_same_grids() -> None:
    for grid in ((0, 1, 1), (1, 1025, 1)):
        with pytest.raises(ValueError):
            rope_tables(*grid, 16)
        assert twin().ask("rope", grid=grid, head_dim=16)["status"] == RUN


def test_time_grids() -> None:
    for steps in (1, 2, 3, 4, 7, 50, 1000):
        for shift in (1.0, 3.0, 5.0, 12.5):
            for name, grid in {"wan": wan_grid, **GRIDS}.items():
                assert twin().ask("make_grid", name=name, steps=steps, shift=shift)["ok"] == grid(steps, shift).tolist()
            answer = twin().ask("grid", steps=steps, shift=shift, t_max=0.999)
            try:
                expected = shift_grid(steps, shift).tolist()
            except ValueError:
                assert answer["status"] == RUN
            else:
                assert answer["ok"] == expected
    rng = np.random.default_rng(0)
    for t in (*rng.random(200), 0.988, 0.9375, 1.0, 0.001):
        for rounding in ("none", "integer", "nearest", "bfloat16"):
            assert twin().ask("told", t=t, rounding=rounding)["ok"] == told_time(t, rounding)


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize(
    "times",
    [(0.9, 0.0), (1.0, 0.75, 0.5, 0.25, 0.0), tuple(wan_grid(9, 5.0)), tuple(wan_grid(50, 3.0)), (0.999, 0.9989, 0.0)],
    ids=len,
)
def test_rules_give_the_same_coefficients(name: str, times: tuple[float, ...]) -> None:
    answer = twin().ask("rule", rule=name, times=times)
    assert answer["ok"] == [list(RULES[name](times, i)) for i in range(len(times) - 1)]


def manifest_with(**sampler: Any) -> bytes:
    document = json.loads((BUILT_IN / "manifest.json").read_text())
    if sampler:
        document["model"]["family"] = "wan"
        del document["model"]["fusion"]
        document["graphs"] = {name: document["graphs"][name] for name in ("backbone", "update")}
        document["sampler"] = {
            "rule": "euler", "steps": 4, "allowed_steps": None, "shift": 3.0, "times": None, "time_rounding": "none",
            "guidance": 1.0, **sampler,
        }  # fmt: skip
    return json.dumps(document).encode()


STUDENT = manifest_with()
FREE = manifest_with(rule="unipc", steps=50, shift=5.0, guidance=6.0, negative_prompt="blurry")
FIXED = manifest_with(rule="renoise", allowed_steps=[1, 2, 4], times=[0.99, 0.8, 0.6, 0.3], init_scale=2.0)


def stills_with(classes: int | None = None, **sampler: Any) -> bytes:
    document = json.loads((BUNDLES / "tim-tiny" / "manifest.json").read_text())
    document["model"]["classes"] = classes
    if classes is not None:
        del document["graphs"]["backbone"]  # which takes a prompt
    document["sampler"] |= sampler
    return json.dumps(document).encode()


STILLS = stills_with()
GUIDED = stills_with(guidance=2.5, guidance_interval=[0.2, 0.8], rho=0.2, negative_prompt="blurry")
CLASSES = stills_with(classes=10, guidance=1.5)


@pytest.mark.parametrize(
    "manifest",
    [STUDENT, FREE, FIXED, STILLS, GUIDED, CLASSES],
    ids=["student", "free", "fixed", "stills", "guided", "classes"],
)
@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"steps": 1},
        {"steps": 2, "inner_steps": 1},
        {"steps": 3},
        {"steps": 1000},
        {"steps": 1001},
        {"steps": 0},
        {"inner_steps": 2},
        {"inner_steps": 3},
        {"guidance": 1.0},
        {"guidance": 0.0},
        {"guidance": 3.5, "negative_prompt": "dark"},
        {"negative_prompt": "dark"},
        {"guidance": 1.0, "negative_prompt": "dark"},
        {"guidance": 1000.5},
        {"shift": 8.0},
        {"shift": 0.5},
        {"frames": 1},
        {"frames": 33},
        {"frames": 16},
        {"frames": 0},
        {"frames": 1_000_001},
        {"width": 128, "height": 96},
        {"width": 65, "height": 64},
        {"width": 0, "height": 64},
        {"width": 1 << 24, "height": 64},
        {"deadline": 0.0},
        {"deadline": 2.5},
        {"deadline": 86401.0},
        {"deadline": 2.5, "steps": 12},
        {"deadline": 2.5, "schedule": [1.0, 0.3, 0.0]},
        {"schedule": [1.0, 0.7, 0.3, 0.0]},
        {"schedule": [1.0, 0.0], "guidance": 3.0},
        {"schedule": [1.0, 0.0], "steps": 1},
        {"schedule": [0.9, 0.0]},
        {"schedule": [1.0, 0.5]},
        {"schedule": [1.0, 0.5, 0.5, 0.0]},
        {"schedule": [1.0]},
        {"strength": 0.6},
        {"strength": 0.6, "schedule": [0.6, 0.1, 0.0]},
        {"strength": 0.15, "guidance": 3.0},
        {"strength": 0.0},
        {"strength": 1.5},
        {"rho": 0.5},
        {"rho": 0.5, "steps": 2},
        {"rho": 11.0},
        {"label": 3},
        {"label": 3, "steps": 7},
        {"label": 3, "negative_prompt": "dark"},
        {"label": 10},
    ],
    ids=str,
)
def test_settings(manifest: bytes, wishes: dict[str, Any]) -> None:
    """Same choices, same refusals."""
    answer = twin().ask("settings", manifest=manifest.hex(), wishes=wishes)
    given = dict(wishes)
    size = (given.pop("width"), given.pop("height")) if "width" in given else None
    try:
        s = resolve_settings(parse_manifest(manifest, "manifest.json"), seed=1, size=size, **given)
    except UsageFailure:
        assert answer["status"] == USAGE
        return
    except RuntimeFailure:
        assert answer["status"] == RUN
        return
    _, _, *latent = s.latent_shape
    assert answer["ok"] == [s.steps, s.inner_steps, s.frames, s.width, s.height, *latent]
    assert (tuple(answer["times"]), answer["nfe"], answer["guidance"]) == (s.times, s.nfe, s.guidance)
    assert (answer["negative_prompt"], answer["rho"]) == (s.negative_prompt, s.rho)
    assert answer["warnings"].splitlines() == list(s.warnings)


def test_a_seed_beyond_32_bits_is_refused_by_both() -> None:
    """Torch's generator reads no more of a seed: two seeds would be one video."""
    manifest = json.dumps(valid_document()).encode()
    for seed, allowed in ((2**32 - 1, True), (2**32, False), (2**62, False)):
        answer = twin().ask("settings", manifest=manifest.hex(), wishes={"seed": seed})
        assert ("ok" in answer) == allowed
        if allowed:
            resolve_settings(parse_manifest(manifest, "manifest.json"), seed=seed)
        else:
            assert answer["status"] == USAGE
            with pytest.raises(UsageFailure):
                resolve_settings(parse_manifest(manifest, "manifest.json"), seed=seed)


def test_sizes_beyond_64_bits_are_refused() -> None:
    """Of a model whose patches and strides let every side be that long."""
    document = valid_document()
    document["video"] |= {"width": 65536, "height": 65536}
    document["model"]["patch_size"] = [1, *[65536 // document["latents"]["spatial_stride"]] * 2]
    manifest = json.dumps(document).encode().hex()
    frames = (1024 - 1) * document["latents"]["temporal_stride"] + 1
    side = 1024 * 65536
    assert "ok" in twin().ask("settings", manifest=manifest, wishes={"seed": 1})
    answer = twin().ask("settings", manifest=manifest, wishes={"frames": frames, "width": side, "height": side})
    assert answer["status"] == USAGE and "more than any memory holds" in answer["error"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_embedding_table(synthetic_bundle: Path, dtype: str) -> None:
    rows, dim = 40, 6
    rng = np.random.default_rng(3)
    values = (rng.normal(size=(rows, dim)) * 10.0 ** rng.integers(-7, 3, (rows, dim))).astype(np.float32)
    if dtype == "bfloat16":
        stored = (values.view(np.uint32) >> 16).astype("<u2")
    else:
        stored = values.astype("<f4" if dtype == "float32" else "<f2")
    (synthetic_bundle / "table.bin").write_bytes(stored.tobytes())

    def edit(document: dict[str, Any]) -> None:
        content = (synthetic_bundle / "table.bin").read_bytes()
        document["files"]["table.bin"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        document["text"]["embedding"] = {"file": "table.bin", "dtype": dtype, "rows": rows, "dim": dim}
        del document["graphs"]["text_encoder"]

    edit_manifest(synthetic_bundle, edit)
    reseal(synthetic_bundle)
    bundle = Bundle.open(synthetic_bundle)
    ids = [3, 0, 39, 3, 1, 0]
    assert bundle.manifest.text.embedding is not None
    expected = TokenEmbedding(bundle.folder, bundle.manifest.text.embedding)(np.array([ids]))
    assert twin().ask("embeds", bundle=str(synthetic_bundle), ids=ids)["ok"] == hexed(expected)
    assert twin().ask("embeds", bundle=str(synthetic_bundle), ids=[rows])["status"] == RUN
