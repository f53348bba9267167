"""A checkpoint that keeps its weights in fp8 or int8 is not rounded a second time for a graph in the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import storage_files as files
from tmd_export import Source, WithLoras
from tmd_export.families.build import build
from tmd_export.quantization.formats import FORMATS
from tmd_export.quantization.weights import QuantizedWeights

LAYER = "blocks.0.ffn.0"
WEIGHT = f"{LAYER}.weight"
E4M3 = torch.float8_e4m3fn
State = dict[str, Tensor]


def per_row(path: Path, state: State, dtype: torch.dtype = torch.int8) -> State:
    """As LightX2V has it."""
    stored = dict(state)
    for name in files.matrices(state):
        most = 127 if dtype == torch.int8 else torch.finfo(dtype).max
        scale = state[name].abs().amax(1, keepdim=True) / most
        values = state[name] / scale
        stored[name] = (values.round() if dtype == torch.int8 else values).to(dtype)
        stored[f"{name}_scale"] = scale
    save_file(stored, path)
    return stored


def unscaled(path: Path, state: State) -> None:
    save_file(state | {name: state[name].to(E4M3) for name in files.matrices(state)}, path)


def written(source: Source, precision: str) -> tuple[Tensor, Tensor]:
    """Numbers `[K, N]` and scales `[N]` of the layer in a graph of this precision."""
    name = f"{WEIGHT}.T"
    weights = QuantizedWeights(build(source, "backbone", precision)[1], {name: FORMATS[precision]})
    values, scales = (torch.cat(list(weights.chunks(f"{name}.{part}"))) for part in ("quantized", "scale"))
    assert (values.shape, values.dtype) == weights.form(f"{name}.quantized")
    assert (scales.shape, scales.dtype) == weights.form(f"{name}.scale")
    return values, scales


KEPT: dict[str, tuple[Callable[[Path, State], object], str, str]] = {
    "scaled fp8": (files.write_scaled_fp8, "fp8", ".scale_weight"),
    "comfy fp8": (lambda path, state: files.write_comfy(path, state, "float8_e4m3fn"), "fp8", ".weight_scale"),
    "fp8 per row": (lambda path, state: per_row(path, state, E4M3), "fp8", ".weight_scale"),
    "fp8 without scales": (unscaled, "fp8", ""),
    "int8 per row": (per_row, "int8", ".weight_scale"),
}


@pytest.mark.parametrize("form", KEPT)
def test_numbers_and_scales_are_those_of_the_file(form: str, tmp_path: Path) -> None:
    write, precision, ending = KEPT[form]
    path = tmp_path / "wan.safetensors"
    write(path, files.wide())
    values, scales = written(files.source(path), precision)
    stored = load_file(path)
    assert torch.equal(values.float(), stored[WEIGHT].float().t())
    expected = stored[f"{LAYER}{ending}"].float().reshape(-1) if ending else torch.ones(1)
    assert torch.equal(scales, expected.to(torch.bfloat16).expand(len(scales)))


def test_the_weight_loses_less_than_when_it_is_rounded_again(tmp_path: Path) -> None:
    path = tmp_path / "wan.safetensors"
    meant = files.write_scaled_fp8(path, files.wide())[WEIGHT].double().t()
    source = files.source(path)
    lost = []
    for keeps in (True, False):
        if not keeps:
            source.codes = lambda which, name: None  # type: ignore[method-assign]
        values, scales = written(source, "fp8")
        lost.append(((values.double() * scales.double() - meant).norm() / meant.norm()).item())
    assert lost[0] < 2**-8 and lost[1] > 2 * lost[0] and lost[1] > 0.01


@pytest.mark.parametrize(
    ("form", "precision"), [("scaled fp8", "int8"), ("int8 per row", "fp8"), ("convrot", "int8"), ("e5m2", "fp8")]
)
def test_other_numbers_are_rounded_anew(form: str, precision: str, tmp_path: Path) -> None:
    """int8 with ConvRot is rotated, and E5M2 is no number of ours."""
    path = tmp_path / "wan.safetensors"
    if form == "convrot":
        files.write_comfy(path, files.wide(), "int8_tensorwise")
    elif form == "e5m2":
        files.write_scaled_fp8(path, files.wide(), torch.float8_e5m2)
    else:
        KEPT[form][0](path, files.wide())
    values, scales = written(files.source(path), precision)
    largest = FORMATS[precision].largest  # type: ignore[attr-defined]
    assert (values.float().abs().amax(0) >= 0.99 * largest).all(), "each channel has its own scale"
    matrix = files.source(path).tensor("student", f"backbone.{WEIGHT}").double().t()
    assert (values.double() * scales.double() - matrix).abs().max() < 0.04 * matrix.abs().max()


def test_what_a_lora_changes_and_what_is_no_number_is_rounded_anew(tmp_path: Path) -> None:
    path = tmp_path / "wan.safetensors"
    per_row(path, files.wide())
    source, name = files.source(path), f"backbone.{WEIGHT}"
    rows, columns = source.tensor("student", name).shape
    pair = {f"diffusion_model.{LAYER}.lora_up.weight": torch.randn(rows, 2)}
    pair |= {f"diffusion_model.{LAYER}.lora_down.weight": torch.randn(2, columns)}
    save_file(pair, tmp_path / "lora.safetensors")
    merged = WithLoras(source, [(tmp_path / "lora.safetensors", 1.0)])
    assert merged.codes("student", name) is None and source.codes("student", name) is not None
    assert merged.codes("student", name.replace("ffn.0", "ffn.2")) is not None
    stored = load_file(path)
    for scale in (-1.0, 0.0):
        stored[f"{WEIGHT}_scale"][3] = scale
        save_file(stored, path)
        assert files.source(path).codes("student", name) is None
