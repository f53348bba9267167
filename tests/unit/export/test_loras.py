"""LoRAs merged while weights stream: every layout against the closed form in float64, and what goes with it."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from tests.helpers import lora_files as files
from tests.helpers import synthetic_checkpoints as made
from tests.helpers.checkpoint_files import refusal, saved, small
from tests.helpers.export_tools import small_source
from tests.helpers.tim_models import TEXT
from tmd_export import ExportError, LoraFile, WithLoras, open_source
from tmd_export.cli import command
from tmd_export.loras import parse_lora
from tmd_export.quantization.calibration import check_identity, identity, read_calibration
from tmd_export.sources.source import Source
from tmd_export.sources.tim import RandomTiM
from tmd_export.sources.wrapped import Wrapped
from tmd_ref.student import TMDStudent, save_student

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("checkpoint") / "wan.safetensors", files.weights())


def merged(source: Source) -> State:
    """Every weight of the denoiser by its original name."""
    names = [name for name, _ in source.module("student").named_parameters()]
    return {source.published_names(name)[0]: source.tensor("student", name) for name in names}


def is_sum(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert (found[name].double() - weight).abs().max() <= 2e-6, name


# What the option says


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors=0.125", "a.safetensors", 0.125),
        ("a=-.5", "a", -0.5),
        ("a=1e-2", "a", 0.01),
        ("rank=64.safetensors", "rank=64.safetensors", 1.0),
        ("rank=64.safetensors=2", "rank=64.safetensors", 2.0),
        ("run/step=400=1", "run/step=400", 1.0),
        ("a=high", "a=high", 1.0),
        ("a=0x10", "a=0x10", 1.0),
        ("a=1_0", "a=1_0", 1.0),
        ("a=", "a=", 1.0),
    ],
)
def test_the_strength_is_the_number_behind_the_last_equals_sign(text: str, path: str, strength: float) -> None:
    assert parse_lora(text) == LoraFile(Path(path), strength)


@pytest.mark.parametrize("strength", ["nan", "-inf", "Infinity", "1000.5", "1e400"])
def test_a_strength_that_is_no_finite_number_in_bounds_is_refused(strength: str) -> None:
    with pytest.raises(ValueError, match=r"of the LoRA 'a=b' is not a number from -1000 to 1000: write FILE=0.5"):
        parse_lora(f"a=b={strength}")


def test_the_command_line_tells_a_bad_strength_from_a_bad_file(tmp_path: Path) -> None:
    def run(lora: str) -> Result:
        return CliRunner().invoke(command, ["--model", "tiny", "--lora", lora, "--out", str(tmp_path / "b")])

    for text, code, words in (
        (f"{tmp_path}/a=nan", 2, "Invalid value for '--lora': the strength 'nan' of the LoRA"),
        (f"{tmp_path}/a=strong", 1, f"there is no file {tmp_path}/a=strong: --lora takes the file of a LoRA"),
        (f"{tmp_path}=0.5", 1, f"{tmp_path} is a folder without adapter_model.safetensors"),
    ):
        result = run(text)
        assert result.exit_code == code and words in result.output
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("strength", [math.nan, math.inf, True, "1", None])
def test_python_gets_the_same_refusal(strength: Any, checkpoint: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "lora.safetensors", files.random_lora().tensors())
    assert "is not a number from -1000 to 1000" in refusal(lambda: WithLoras(small(checkpoint), [(path, strength)]))


# Layouts

SUFFIXES = [
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B.default_0.weight", ".lora_A.default_0.weight"),
    (".lora_B", ".lora_A"),
    (".lora.up", ".lora.down"),
]


def prefixed(prefix: str) -> Callable[[str], str]:
    return lambda layer: prefix + layer


STARTS = ("", "diffusion_model.", "model.", "model.diffusion_model.", "unet.", "base_model.model.", "lycoris_")
PREFIXES: dict[str, Callable[[str], str]] = {
    **{start or "nothing": prefixed(start) for start in STARTS},
    "diffusers": lambda layer: f"transformer.{files.in_diffusers(layer)}",
    "diffusers in peft": lambda layer: f"base_model.model.{files.in_diffusers(layer)}",
    "compiled": lambda layer: f"base_model.model.{layer.replace('blocks.1', 'blocks.1._orig_mod')}",
    "kohya": files.flat,
    "kohya in the layout of diffusers": lambda layer: files.flat(files.in_diffusers(layer)),
}  # fmt: skip
LAYERS = [*files.BLOCK_LAYERS, *files.EMBEDDINGS, "time_projection.1", "head.head", "patch_embedding"]


@pytest.mark.parametrize("suffixes", SUFFIXES)
@pytest.mark.parametrize("alpha", [None, files.ALPHA])
def test_pairs_under_every_suffix_give_the_closed_form(
    suffixes: tuple[str, str], alpha: float | None, checkpoint: Path, tmp_path: Path
) -> None:
    lora = files.random_lora(LAYERS, alpha)
    path = saved(tmp_path / "lora.safetensors", lora.tensors(suffixes=suffixes))
    is_sum(merged(WithLoras(small(checkpoint), [(path, 0.7)])), lora.merged(files.weights(), 0.7))


@pytest.mark.parametrize("rename", PREFIXES.values(), ids=PREFIXES)
def test_layers_under_every_prefix_give_the_closed_form(
    rename: Callable[[str], str], checkpoint: Path, tmp_path: Path
) -> None:
    lora = files.random_lora(LAYERS, diff=("blocks.0.norm3", "head.modulation"), diff_b=("blocks.2.ffn.2", "head.head"))
    path = saved(tmp_path / "lora.pt", lora.tensors(rename))
    is_sum(merged(WithLoras(small(checkpoint), [(path, -1.5)])), lora.merged(files.weights(), -1.5))


WHOLE = ("blocks.0.self_attn.norm_q", "blocks.1.norm3", "blocks.2.cross_attn.o", "blocks.0.modulation", "head.head",
         "patch_embedding", "text_embedding.0", "time_projection.1")  # fmt: skip
BIASES = ("blocks.0.ffn.0", "blocks.1.norm3", "head.head", "patch_embedding", "time_embedding.2", "time_projection.1")


def test_whole_differences_of_weights_and_biases_are_added(checkpoint: Path, tmp_path: Path) -> None:
    """As LightX2V's files have them beside pairs, norms among them, which diffusers drops."""
    lora = files.random_lora(["blocks.0.self_attn.q", "head.head"], diff=WHOLE, diff_b=BIASES)
    path = saved(tmp_path / "lora.safetensors", lora.tensors())
    is_sum(merged(WithLoras(small(checkpoint), [(path, 0.4)])), lora.merged(files.weights(), 0.4))


@pytest.mark.parametrize("alpha", [torch.tensor([6.0]), torch.tensor(6), torch.tensor(6.0).bfloat16()])
def test_an_alpha_may_have_any_form_of_one_number(alpha: Tensor, checkpoint: Path, tmp_path: Path) -> None:
    lora = files.random_lora(["blocks.1.ffn.2"])
    state = lora.tensors() | {"diffusion_model.blocks.1.ffn.2.alpha": alpha}
    path = saved(tmp_path / "lora.safetensors", state)
    is_sum(merged(WithLoras(small(checkpoint), [(path, 1.0)])), lora.merged(files.weights()))


def test_matrices_of_convolutions_may_be_flat_and_those_of_linear_layers_not(checkpoint: Path, tmp_path: Path) -> None:
    lora = files.random_lora(["patch_embedding", "blocks.0.ffn.0"])
    state = lora.tensors()
    for name in ("lora_up.weight", "lora_down.weight"):
        state[f"diffusion_model.patch_embedding.{name}"] = state[f"diffusion_model.patch_embedding.{name}"].flatten(1)
        state[f"diffusion_model.blocks.0.ffn.0.{name}"] = state[f"diffusion_model.blocks.0.ffn.0.{name}"][
            ..., None, None
        ]
    path = saved(tmp_path / "lora.safetensors", state)
    is_sum(merged(WithLoras(small(checkpoint), [(path, 1.0)])), lora.merged(files.weights()))


def test_several_loras_add_up(checkpoint: Path, tmp_path: Path) -> None:
    loras = [files.random_lora(LAYERS, alpha, seed=seed) for seed, alpha in ((1, None), (2, 3.0), (3, 8.0))]
    paths = [saved(tmp_path / f"{k}.safetensors", lora.tensors()) for k, lora in enumerate(loras)]
    strengths, expected = (1.0, -0.5, 0.25), files.weights()
    for lora, strength in zip(loras, strengths, strict=True):
        expected = lora.merged(expected, strength)
    is_sum(merged(WithLoras(small(checkpoint), list(zip(paths, strengths, strict=True)))), expected)


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    """Weights and LoRA in bfloat16: the sum leaves in float32, so that the graph's type is the only rounding."""
    base = {name: weight.bfloat16() for name, weight in files.weights().items()}
    lora = files.random_lora(dtype=torch.bfloat16)
    path = saved(tmp_path / "lora.safetensors", lora.tensors())
    found = merged(WithLoras(small(saved(tmp_path / "wan.safetensors", base)), [(path, 0.01)]))
    is_sum(found, lora.merged(base, 0.01))
    changed = [name for name, weight in found.items() if weight.dtype == torch.float32]
    assert sorted(changed) == sorted(f"{layer}.weight" for layer in lora.pairs)
    name = "blocks.0.self_attn.q.weight"
    assert (found[name] - found[name].bfloat16()).abs().max() > 1e-4  # what a second rounding would lose


# Students, and other families


def test_a_student_takes_a_lora_of_its_teacher_in_both_of_its_parts(tmp_path: Path) -> None:
    """Blocks of the head are counted from 0 there; the time embedding is in both parts."""
    torch.manual_seed(1)
    student = TMDStudent.from_teacher(made.models().transformer, 1)
    save_student(tmp_path / "student.safetensors", student)
    lora = files.random_lora([*files.BLOCK_LAYERS, "time_embedding.0", "head.head"], diff_b=("blocks.2.ffn.0",))
    path = saved(tmp_path / "lora.safetensors", lora.tensors())
    source = WithLoras(small(tmp_path / "student.safetensors"), [(path, 1.0)])
    expected, own = lora.merged(files.weights()), student.state_dict()
    pairs = {
        "backbone.blocks.1.ffn.2.weight": "blocks.1.ffn.2.weight",
        "head.blocks.0.self_attn.q.weight": "blocks.2.self_attn.q.weight",
        "head.blocks.0.ffn.0.bias": "blocks.2.ffn.0.bias",
        "backbone.time_embedding.0.weight": "time_embedding.0.weight",
        "head.time_embedding.0.weight": "time_embedding.0.weight",
        "head.head.head.weight": "head.head.weight",
    }
    for name, original in pairs.items():
        difference = expected[original] - files.weights()[original].double()
        assert difference.abs().max() > 0.01
        assert (source.tensor("student", name).double() - own[name].double() - difference).abs().max() < 2e-6, name
    gate = source.tensor("student", "head.fusion.gate")
    assert torch.equal(gate, own["head.fusion.gate"])


def test_a_student_takes_a_lora_of_its_own(tmp_path: Path) -> None:
    shape = (4, small_source().wan.dim)
    state = {
        "base_model.model.head.fusion.ffn.0.lora_A.weight": torch.randn(shape),
        "base_model.model.head.fusion.ffn.0.lora_B.weight": torch.randn(small_source().wan.ffn_dim, 4),
    }
    source = WithLoras(small_source(), [(saved(tmp_path / "lora.safetensors", state), 1.0)])
    name = "head.fusion.ffn.0.weight"
    down, up = state.values()
    added = source.tensor("student", name) - small_source().tensor("student", name)
    assert (added - up @ down).abs().max() < 1e-5


def test_a_wrapped_source_answers_every_question_with_what_is_inside() -> None:
    wrapped = Wrapped(small_source())
    questions = {name for name, value in vars(Source).items() if callable(value) and not name.startswith("_")}
    assert len(questions) > 9 and questions <= set(vars(Wrapped))
    facts = {name: getattr(wrapped, name) for name in Source.__annotations__}
    assert facts == {name: getattr(small_source(), name) for name in facts}
    assert set(facts) <= {*vars(wrapped), *vars(Wrapped)}


def test_a_transition_model_takes_names_of_its_released_file(tmp_path: Path) -> None:
    plain = RandomTiM("tim-small", 0, TEXT)
    state = {"blocks.1.cross_attn.kv.diff_b": torch.randn(2 * TEXT.dim), "final_layer.linear.diff_b": torch.randn(3)}
    source = WithLoras(plain, [(saved(tmp_path / "lora.safetensors", state), 2.0)])
    before, after = merged(plain), merged(source)
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {"blocks.1.cross_attn.kv.bias", "final_layer.linear.bias"}
    wrong = saved(tmp_path / "wan.safetensors", files.random_lora().tensors())
    assert "does not fit tim-small" in refusal(lambda: WithLoras(plain, [(wrong, 1.0)]))


# Bundles; what is in one is in tests/e2e/test_checkpoint_to_video.py


def test_parts_that_no_lora_changes_are_refused_alone(checkpoint: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "lora.safetensors", files.random_lora().tensors())
    source = WithLoras(small(checkpoint), [(path, 0.5), (path, 0.0)])
    source.check(("backbone",))
    said = refusal(lambda: source.check(("decoder_step", "text_encoder")))
    assert "--lora changes backbone and flow_head, and none of them is among the parts" in said
    assert source.origin == "checkpoint wan.safetensors; 2 LoRAs merged in"
    entry = {"file": "lora.safetensors", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert source.loras() == ({**entry, "strength": 0.5}, {**entry, "strength": 0.0})


def test_at_strength_0_a_weight_passes_as_it_is(tmp_path: Path) -> None:
    base = {name: weight.bfloat16() for name, weight in files.weights().items()}
    path = saved(tmp_path / "lora.safetensors", files.random_lora(diff_b=BIASES).tensors())
    checkpoint = saved(tmp_path / "wan.safetensors", base)
    plain, found = merged(small(checkpoint)), merged(WithLoras(small(checkpoint), [(path, 0.0), (path, -0.0)]))
    assert all(torch.equal(found[name], plain[name]) and found[name].dtype == torch.bfloat16 for name in plain)


def test_a_calibration_belongs_to_the_merged_weights(checkpoint: Path, tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"{k}.safetensors", files.random_lora(seed=k).tensors()) for k in range(2)]

    def bound(*loras: tuple[Path, float]) -> dict[str, str]:
        return identity(WithLoras(small(checkpoint), loras) if loras else small(checkpoint))

    plain = bound()
    assert bound((paths[0], 0.0)) == plain
    kinds = [plain, bound((paths[0], 1.0)), bound((paths[0], 0.5)), bound((paths[1], 1.0)),
             bound((paths[0], 1.0), (paths[0], 1.0)), bound((paths[0], 1.0), (paths[1], 1.0))]  # fmt: skip
    assert all(kinds.count(kind) == 1 for kind in kinds)
    assert all(kind.items() > plain.items() for kind in kinds[1:])
    calibration = read_calibration(_calibration(tmp_path / "calibration.json", plain))
    check_identity(calibration, plain, "the calibration")
    with pytest.raises(ExportError, match=r"another checkpoint .* than this one \(.*LoRA 1, 0.safetensors at 0.5"):
        check_identity(calibration, bound((paths[0], 0.5)), "the calibration")


def _calibration(path: Path, checkpoint: dict[str, str]) -> Path:
    entries = {"format": "tmd-calibration-2", "checkpoint": checkpoint, "prompts": [], "latents": [1, 1, 1]}
    path.write_text(json.dumps({**entries, "steps": [[1, 1]], "ranges": {}, "sensitivity": {}}))
    return path


def test_no_more_than_one_weight_and_its_sum_are_in_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: dict[int, int] = {}
    most = 0

    def watch(tensor: Tensor) -> Tensor:
        nonlocal most
        if id(tensor) in alive:  # a weight that nothing is added to passes as it is
            return tensor
        alive[id(tensor)] = tensor.numel()
        most = max(most, sum(alive.values()))
        weakref.finalize(tensor, alive.pop, id(tensor))
        return tensor

    base = small(checkpoint)
    path = saved(tmp_path / "lora.safetensors", files.random_lora(LAYERS, rank=2).tensors())
    source = WithLoras(base, [(path, 1.0), (path, 0.5)])
    read, stored = base.tensor, [lora.tensors for lora in source._loras]
    monkeypatch.setattr(base, "tensor", lambda which, name: watch(read(which, name)))
    for tensors in stored:
        monkeypatch.setattr(tensors, "read", partial(lambda read, name: watch(read(name)), tensors.read))
    sizes = []
    for name, weight in source.module("student").named_parameters():
        watch(source.tensor("student", name))
        sizes.append(weight.numel())
    gc.collect()
    assert not alive
    assert max(sizes) < most <= 2 * max(sizes) + 2 * 2 * 7 * made.WAN.dim < sum(sizes) / 3


# Notes


def test_a_missing_alpha_is_said_where_one_belongs(checkpoint: Path, tmp_path: Path) -> None:
    def notes(state: State, name: str = "lora.safetensors") -> tuple[str, ...]:
        return WithLoras(small(checkpoint), [(saved(tmp_path / name, state), 1.0)]).notes

    assert notes(files.random_lora().tensors()) == ()
    assert notes(files.random_lora(alpha=None).tensors(suffixes=SUFFIXES[2])) == ()
    (said,) = notes(files.random_lora(alpha=None).tensors())
    assert said.startswith("lora.safetensors states no alpha") and "FILE=0.125 for alpha 8 and rank 64" in said
    (said,) = notes(files.random_lora().tensors(), "wan2.2_t2v_A14b_high_noise_lora_rank64.safetensors")
    assert "is for the high-noise expert of a Wan2.2 A14B" in said


def test_open_source_takes_loras_for_every_family(tmp_path: Path) -> None:
    up, down = torch.ones(128, 1), torch.ones(1, 128)
    state = {"blocks.0.self_attn.q.lora_up.weight": up, "blocks.0.self_attn.q.lora_down.weight": down}
    path = saved(tmp_path / "lora.safetensors", state)
    source = open_source("tiny", loras=[LoraFile(path, 0.5)])
    name = "backbone.blocks.0.self_attn.q.weight"
    plain = open_source("tiny")
    assert torch.equal(source.tensor("student", name), plain.tensor("student", name).float() + 0.5)
    assert source.origin == "built-in weights; 1 LoRA merged in" and source.default_parts == plain.default_parts
