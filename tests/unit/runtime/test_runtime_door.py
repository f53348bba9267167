"""A family of models and a velocity rule that this file alone knows, sampled by `tmd-run` without a change elsewhere.

And the other half of the same promise: nothing outside the modules of a family compares anything with its name.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import tmd_runtime
from tests.helpers.results import result_latents
from tests.helpers.synthetic import (
    CHANNELS,
    TEXT_DIM,
    GraphBuilder,
    _student_manifest,
    decoder_first,
    decoder_step,
    text_encoder,
    tokenizer_bytes,
    update,
    velocity_sampler,
    write_graph,
    write_synthetic_bundle,
)
from tmd_engines import BundleError, BundleWriter, Engine, Manifest
from tmd_engines.bundle.families import FAMILIES, Calls, Family
from tmd_engines.bundle.families.rules import RULES, Coefficients
from tmd_engines.bundle.families.signature import LATENTS, PROMPT, Signature, Tensor, update_signature
from tmd_engines.bundle.sections import SamplerInfo
from tmd_runtime import NoiseStream, RuntimeFailure
from tmd_runtime.clock import Timings
from tmd_runtime.command.cli import command
from tmd_runtime.sampling import SAMPLING, Denoised, RuntimeFamily
from tmd_runtime.sampling.calls import Call, Draws, Launches
from tmd_runtime.sampling.calls import Calls as RunCalls
from tmd_runtime.sampling.family import LatentShape, common_settings
from tmd_runtime.sampling.update import Updater
from tmd_runtime.settings import Settings, Wishes

# The new family: each step pulls x towards a colour that the prompt decides, by a share that the bundle says.


class PullSampler(SamplerInfo):
    """`share` of the way to the colour in each step."""

    rule: Literal["pull"]
    share: float


class _Pull(Family):
    name = "pull"
    sampler = PullSampler
    graphs = {  # noqa: RUF012  # read only
        "backbone": Signature({"prompt_embeds": PROMPT}, {"colour": Tensor(("batch", "channels"))}),
        "flow_head": Signature({"x": LATENTS, "colour": Tensor(("batch", "channels"))}, {"velocity": LATENTS}),
        "update": update_signature(LATENTS),
    }

    def passes(self, sampler: Any) -> int:
        return 1

    def calls(self, steps: int, inner_steps: int, passes: int) -> Calls:
        return Calls(1, steps)

    def describe(self, sampler: Any) -> str:
        return f"pull: {sampler.steps} steps of {sampler.share:g}"


class PullFamily(RuntimeFamily):
    name = "pull"

    def settings(self, manifest: Manifest, wishes: Wishes) -> Settings:
        return Settings(**common_settings(manifest, wishes, wishes.steps or manifest.sampler.steps))

    def loop(
        self,
        backbone: Engine,
        flow_head: Engine,
        update: Engine,
        manifest: Manifest,
        latent_shape: LatentShape,
        text_tokens: int,
    ) -> PullLoop:
        sizes = dict(zip(("batch", "frames", "height", "width"), (1, *latent_shape[2:]), strict=True))
        return PullLoop(backbone, flow_head, update, manifest, {**sizes, "text": text_tokens})


class PullLoop:
    """x <- x + share·(colour - x), from noise."""

    def __init__(
        self, backbone: Engine, flow_head: Engine, update: Engine, manifest: Manifest, dims: dict[str, int]
    ) -> None:
        self._share: float = manifest.sampler.share  # type: ignore[attr-defined]
        self._prompt, self._colour = (backbone.empty(name, **dims) for name in ("prompt_embeds", "colour"))
        self._x, self._velocity = (flow_head.empty(name, **dims) for name in ("x", "velocity"))
        self._backbone = backbone.bind({"prompt_embeds": self._prompt}, {"colour": self._colour})
        self._flow_head = flow_head.bind({"x": self._x, "colour": self._colour}, {"velocity": self._velocity})
        self._updater = Updater(update, self._x, dims)
        self._update = self._updater.bind(velocity=self._velocity)
        self._launches = Launches(flow_head, update)

    def run(
        self,
        prompt_embeds: np.ndarray,
        settings: Settings,
        timings: Timings,
        negative_embeds: np.ndarray | None = None,
        on_preview: Any = None,
        init: np.ndarray | None = None,
    ) -> Denoised:
        calls = RunCalls(timings, backbone=1, flow_head=settings.steps)
        self._prompt[...] = prompt_embeds
        Draws(settings.seed, settings.latent_shape, timings).into(self._x)
        calls("backbone", self._backbone)

        def step(call: Call) -> None:
            call("flow_head", self._flow_head)
            call("flow_head", self._update, counts=False)

        for k in range(settings.steps):
            self._updater.set(Coefficients(1.0, self._share), t=-1.0)  # all the way
            self._launches.run(calls, step)
            self._updater.check(self._colour)
            if on_preview is not None and k + 1 < settings.steps:
                on_preview(self._updater.preview())
        return Denoised(np.array(self._x, np.float32))


def pull_graphs() -> list[GraphBuilder]:
    """colour = tanh of the mean embedding, cut to the channels; velocity = colour - x."""
    backbone, flow_head = GraphBuilder("backbone"), GraphBuilder("flow_head")
    embeds = backbone.input("prompt_embeds", ["batch", "text", TEXT_DIM])
    mean = backbone.op("ReduceMean", embeds, backbone.constant([1], np.int64), keepdims=0)
    weight = backbone.constant(np.eye(TEXT_DIM, CHANNELS))
    backbone.op("Tanh", backbone.op("MatMul", mean, weight), out="colour")
    backbone.output("colour", ["batch", CHANNELS])
    latents = ["batch", CHANNELS, "frames", "height", "width"]
    x, colour = flow_head.input("x", latents), flow_head.input("colour", ["batch", CHANNELS])
    flow_head.op("Sub", flow_head.op("Unsqueeze", colour, flow_head.constant([2, 3, 4], np.int64)), x, out="velocity")
    flow_head.output("velocity", latents)
    return [backbone, flow_head, update()]


def write_pull_bundle(folder: Path) -> Path:
    with BundleWriter(folder) as writer:
        builders = [text_encoder(), *pull_graphs(), decoder_first(), decoder_step()]
        document = _student_manifest({builder.name: write_graph(writer.folder, builder) for builder in builders})
        (writer.folder / "tokenizer.model").write_bytes(tokenizer_bytes())
        document["model"] |= {"family": "pull", "architecture": "none"}
        del document["model"]["fusion"]
        document["sampler"] = {"rule": "pull", "steps": 3, "share": 0.75}
        return writer.commit(document).folder


@pytest.fixture
def pull_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(FAMILIES, "pull", _Pull())
    monkeypatch.setitem(SAMPLING, "pull", PullFamily())
    return write_pull_bundle(tmp_path / "bundle")


def test_a_new_family_goes_from_a_bundle_to_frames(
    pull_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--bundle", str(pull_bundle), "--prompt", "a red circle", "--seed", "5", "--frames", "5"]
    extra = ["--out", "frames", "--save-latents", "l.safetensors", "--preview", "p.png", "--json"]
    done = CliRunner().invoke(command, [*words, *extra], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["rule"], document["steps"], document["inner_steps"], document["nfe"]) == ("pull", 3, 1, 3)
    assert document["times"] == [] and document["preview"] == "p.png" and document["frames"] == 5

    pipeline = tmd_runtime.load(pull_bundle, threads=1)
    colour = np.tanh(pipeline.encode("a red circle").mean(axis=1)[:, :CHANNELS])[..., None, None, None]
    x = NoiseStream(5).normal((1, CHANNELS, 2, 8, 8))
    expected = x + (1 - 0.25**3) * (colour - x)
    result = pipeline("a red circle", seed=5, frames=5)
    np.testing.assert_allclose(result_latents(result), expected, rtol=0, atol=1e-5)
    for k, frame in enumerate(pipeline.decode(expected.astype(np.float32))):
        shown = np.asarray(Image.open(f"frames/frame_{k:04}.png")).astype(int)
        assert np.abs(shown - frame).max() <= 1
    text = CliRunner().invoke(command, [*words, "--out", "v.png"], catch_exceptions=False).stdout
    assert "seed 5, steps 3, NFE 3.00" in text


def test_what_a_new_family_gets_wrong_is_named(
    pull_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(SAMPLING, "pull")
    with pytest.raises(RuntimeFailure, match="cannot sample models of the family pull, only tmd, wan, anyflow, tim"):
        tmd_runtime.load(pull_bundle)
    monkeypatch.delitem(FAMILIES, "pull")
    with pytest.raises(BundleError, match=r"model\.family: must be one of tmd, wan, anyflow, tim"):
        tmd_runtime.load(pull_bundle)


# The new rule: two thirds of the way to the data predictions of the latest two steps, with fresh noise at times above.


def lagging(times: Sequence[float], i: int) -> Coefficients:
    """(1 - t')·(2·m + m')/3 + t'·noise, m = x - t·v and m' the prediction before; the first step has m alone."""
    now, after = times[i], times[i + 1]
    own = 1.0 - after if i == 0 else (1.0 - after) * 2 / 3
    return Coefficients(own, -own * now, after, 0.0 if i == 0 else (1.0 - after) / 3)


def test_a_new_velocity_rule_steps_in_the_loop_of_wan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "lagging", lagging)
    sampler = velocity_sampler(rule="lagging", guidance=3.0, negative_prompt="a blue square", time_rounding="none")
    bundle = write_synthetic_bundle(tmp_path / "bundle", sampler=sampler)
    out = tmp_path / "v.png"
    words = ["--bundle", str(bundle), "--prompt", "x", "--seed", "2", "--steps", "4", "--out", str(out), "--json"]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0 and json.loads(done.stdout)["rule"] == "lagging" and out.is_file(), done.output

    pipeline = tmd_runtime.load(bundle, threads=1)
    result, stream = pipeline("x", seed=2, steps=4), NoiseStream(2)
    embeds = [pipeline.encode(text) for text in ("x", "a blue square")]
    x, before = stream.normal((1, CHANNELS, 5, 8, 8)), None
    loop: Any = pipeline._loop
    loop = loop[1]
    for i, (t, after) in enumerate(zip(result.times, result.times[1:], strict=False)):
        velocities = []
        for prompt in embeds:
            loop._bound.x[...], loop._bound.t[...], loop._bound.prompt_embeds[...] = x, t, prompt
            loop._bound.step()
            loop._active.flow_head()
            velocities.append(loop._velocity.copy())
        data = x - t * (velocities[1] + 3.0 * (velocities[0] - velocities[1]))
        mixed = data if i == 0 else (2 * data + before) / 3
        x = (1 - after) * mixed + (after * stream.normal(x.shape) if after else 0)
        before = data
    np.testing.assert_allclose(result_latents(result), x, rtol=0, atol=2e-5)


# No other module knows a family or a rule by its name.

RUNTIME = Path(tmd_runtime.__file__).parent
FAMILY_MODULES = {
    *(RUNTIME / "sampling" / f"{name}.py" for name in ("tmd", "wan", "tim", "tim_settings")),
    RUNTIME.parent / "tmd_bench" / "families.py",
}
NAMES = {*FAMILIES, *RULES, "flow_map", "transition"}
CLASSES = {"TmdLoop", "WanLoop", "TimLoop", "WanSettings", "TimSettings", "TMD", "WAN", "TIM"}
ALLOWED: dict[tuple[str, str], str] = {}
"""(module, name) -> why it may compare with the name."""


def named(node: ast.AST) -> Iterator[str]:
    """Names of families, rules and their classes anywhere in an expression."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and part.value in NAMES:
            yield str(part.value)
        elif isinstance(part, ast.Name) and part.id in CLASSES:
            yield part.id
        elif isinstance(part, ast.Attribute) and part.attr in CLASSES:
            yield part.attr


def comparisons(tree: ast.AST) -> Iterator[str]:
    """What a module compares with, matches, keys a table by, or asks the type of, among these names."""
    asks_type = ("isinstance", "issubclass")
    for node in ast.walk(tree):
        parts: list[ast.expr | ast.pattern | None] = []
        if isinstance(node, ast.Compare | ast.MatchValue | ast.MatchClass):
            parts = [node]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in asks_type:
            parts = [*node.args]
        elif isinstance(node, ast.Dict):
            parts = [*node.keys]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        for part in filter(None, parts):
            yield from named(part)


def test_shared_modules_compare_nothing_with_the_name_of_a_family_or_rule() -> None:
    found = {
        (str(file.relative_to(RUNTIME.parent)), name)
        for part in ("tmd_runtime", "tmd_bench")
        for file in (RUNTIME.parent / part).rglob("*.py")
        if file not in FAMILY_MODULES
        for name in comparisons(ast.parse(file.read_text()))
    }
    assert found == set(ALLOWED)


def test_such_comparisons_are_found() -> None:
    code = """
        if rule == 'euler': pass
        isinstance(loop, TimLoop)
        table = {'tmd': 1}
        table[kind in ('wan', 'x')]
        match kind:
            case 'tim': pass
    """
    tree = ast.parse("if True:\n" + code)
    assert sorted(comparisons(tree)) == ["TimLoop", "euler", "tim", "tmd", "wan", "wan"]
