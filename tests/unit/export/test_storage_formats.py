"""Weights stored in fewer bits: each format gives the values that its own program, or another reader, has for them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import storage_files as stored
from tests.helpers import synthetic_checkpoints as made
from tests.helpers.checkpoint_files import refusal, saved, small
from tests.helpers.synthetic import tokenizer_bytes
from tmd_export.checkpoints import open_tensors
from tmd_export.checkpoints.names import converted
from tmd_export.checkpoints.storage import FORMATS
from tmd_export.sources.wan import WanSource
from tmd_ref.split import SplitWan
from tmd_ref.wan import WanTransformer

DATA = Path(__file__).parents[2] / "data"
State = dict[str, Tensor]


def holds(source: WanSource, meant: State, rest: State) -> None:
    """Every weight is what its format means by it; those that are kept as they are may be rounded to float16."""
    with torch.device("meta"):
        wan = WanTransformer(stored.WIDE)
    wan.load_state_dict({**rest, **{name: weight.float() for name, weight in meant.items()}}, assign=True)
    split = SplitWan(wan, source.head_blocks).state_dict()
    names = {weight.data_ptr(): name for name, weight in wan.state_dict().items()}
    for name, weight in split.items():
        found, original = source.tensor("student", name), names[weight.data_ptr()]
        assert found.shape == weight.shape
        if original in meant:
            assert found.dtype == meant[original].dtype
            assert torch.equal(found.float(), weight), name
        else:
            torch.testing.assert_close(found.float(), weight, rtol=2**-11, atol=1e-7)
    assert meant


# Against other projects' own values


def test_comfy_layers_have_the_values_of_comfy_kitchen() -> None:
    tensors = open_tensors([DATA / "comfy_kitchen.safetensors"])
    cases = [name.removeprefix("expected.") for name in tensors.entries if name.startswith("expected.")]
    assert len(cases) == 8
    for case in cases:
        found, expected = tensors.read(f"{case}.weight"), tensors.read(f"expected.{case}")
        assert found.dtype == torch.bfloat16 and expected.std() > 1e-3
        if "convrot" in case:  # a sum of many products, whose last bit depends on their order
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
            assert (found == expected).float().mean() > 0.99
        else:
            assert torch.equal(found, expected), case
    assert sum(tensors.formats.values()) == 8 and tensors.formats["ComfyUI int8_tensorwise with ConvRot"] == 2
    assert not [name for name in tensors.entries if "scale" in name or "comfy_quant" in name]


@pytest.mark.parametrize("bits", [8, 4])
def test_mlx_matrices_have_the_values_of_mlx(bits: int) -> None:
    tensors = open_tensors([DATA / f"mlx_int{bits}" / "mlx_dit.safetensors"])
    for name in ("half.weight", "brain.weight"):
        assert torch.equal(tensors.read(name), tensors.read(f"expected.{name}"))
    assert tensors.read("plain").dtype == torch.float16
    assert tensors.beside == (DATA / f"mlx_int{bits}" / "mlx_dit.json",)


# Whole transformers in the published layouts


@pytest.mark.parametrize("kind", [*stored.WRITTEN_BY_GGUF, *stored.FROM_BITS])
def test_gguf_has_the_values_of_diffusers(kind: str, tmp_path: Path) -> None:
    names = ("blocks.0.ffn.0.weight", "time_projection.1.weight")
    meant = stored.write_gguf(tmp_path / "wan.gguf", {name: stored.wide()[name] for name in names}, kind)
    tensors = open_tensors([tmp_path / "wan.gguf"])
    assert tensors.formats == {f"GGUF {kind}": 2}
    for name in names:
        found = tensors.read(name)
        assert found.dtype == torch.bfloat16 and found.std() > 1e-3
        assert torch.equal(found, meant[name])


@pytest.mark.parametrize("kind", ["Q4_K", "BF16"])
def test_a_transformer_in_gguf(kind: str, tmp_path: Path) -> None:
    meant = stored.write_gguf(tmp_path / "wan.gguf", stored.wide(), kind, keep="blocks.0.self_attn.q")
    source = stored.source(tmp_path / "wan.gguf")
    holds(source, meant, stored.wide())
    assert source.default_parts == ("backbone", "flow_head")
    stored_as = f"weights of Wan's transformer stored as GGUF {kind} (25): dequantised to bfloat16"
    assert source.origin == ("checkpoint wan.gguf" if kind == "BF16" else f"checkpoint wan.gguf; {stored_as}")
    assert source.notes == (() if kind == "BF16" else (f"{stored_as}.",))


def test_gguf_may_have_the_prefix_of_other_programs(tmp_path: Path) -> None:
    meant = stored.write_gguf(tmp_path / "wan.gguf", stored.wide(), "Q8_0", prefix="model.diffusion_model.")
    holds(stored.source(tmp_path / "wan.gguf"), meant, stored.wide())


def test_an_expert_of_wan22_in_gguf_is_refused(tmp_path: Path) -> None:
    stored.write_gguf(tmp_path / "wan.gguf", stored.wide(), "Q8_0", prefix="model.high_noise_diffusion_model.")
    assert "one of the two experts of Wan2.2-A14B" in refusal(lambda: stored.source(tmp_path / "wan.gguf"))


@pytest.mark.parametrize(
    ("dtype", "prefix"), [(torch.float8_e4m3fn, "model.diffusion_model."), (torch.float8_e5m2, "")]
)
def test_scaled_fp8_has_the_values_of_its_definition(dtype: torch.dtype, prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "wan_fp8_scaled.safetensors"
    meant = stored.write_scaled_fp8(path, stored.wide(), dtype, prefix)
    source = stored.source(path)
    holds(source, meant, stored.wide())
    assert source.notes == ("weights of Wan's transformer stored as scaled fp8 (26): dequantised to bfloat16.",)


@pytest.mark.parametrize(
    ("form", "in_header", "prefix"),
    [
        ("float8_e4m3fn", False, "model.diffusion_model."),
        ("float8_e4m3fn", True, ""),
        ("float8_e5m2", True, "model.diffusion_model."),
        ("int8_tensorwise", False, ""),
    ],
)
def test_comfy_quants_are_found_by_marks_and_by_the_header(
    form: str, in_header: bool, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / "wan.safetensors"
    meant = stored.write_comfy(path, stored.wide(), form, in_header=in_header, prefix=prefix)
    holds(stored.source(path), meant, stored.wide())


def test_a_layer_rotated_by_convrot_becomes_what_it_was(tmp_path: Path) -> None:
    """Rotated here by scipy's way to build such a matrix: one factor at a time."""
    torch.manual_seed(1)
    small_one = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
    weight = torch.randn(6, 512, dtype=torch.float64)
    turned = weight.reshape(6, 2, 4, 4, 4, 4)
    for axis in range(2, 6):
        turned = torch.tensordot(turned, small_one, dims=([axis], [0])).movedim(-1, axis)
    turned = turned.reshape(6, 512)
    scale = turned.abs().amax(1, keepdim=True) / 127
    conf = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}).encode()
    save_file(
        {
            "x.weight": (turned / scale).round().to(torch.int8),
            "x.weight_scale": scale.float(),
            "x.comfy_quant": torch.frombuffer(bytearray(conf), dtype=torch.uint8),
        },
        tmp_path / "x.safetensors",
    )
    found = open_tensors([tmp_path / "x.safetensors"]).read("x.weight").double()
    assert 0 < (found - weight).norm() / weight.norm() < 0.02


def test_int8_with_convrot_in_gguf(tmp_path: Path) -> None:
    """What a fork of ComfyUI-GGUF calls Q8_CR: the int8 matrix and its scales as tensors, the rest in the metadata."""
    import gguf

    sample = load_file(DATA / "comfy_kitchen.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    conf = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256, "weight_rotated": True}
    writer.add_string("comfy.gguf.quant.x.weight", json.dumps(conf))
    writer.add_tensor("x.weight", sample["int8_convrot.weight"].numpy())
    writer.add_tensor("x.weight_scale", sample["int8_convrot.weight_scale"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_tensors([tmp_path / "x.gguf"]).read("x.weight")
    torch.testing.assert_close(found, sample["expected.int8_convrot"], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_fastmetal_folder_has_the_values_of_its_definition(bits: int, tmp_path: Path) -> None:
    folder = tmp_path / "FastMetal-1.3B-QAD"
    meant = stored.write_mlx(folder, stored.wide(), bits)
    source = stored.source(folder)
    holds(source, meant, stored.wide())
    assert set(source.sha256(("backbone",))) == {
        "FastMetal-1.3B-QAD/mlx_dit.safetensors",
        "FastMetal-1.3B-QAD/mlx_dit.json",
    }


@pytest.mark.parametrize("form", ["gguf", "mlx"])
def test_the_sizes_are_read_from_every_layout(form: str, tmp_path: Path) -> None:
    if form == "gguf":
        stored.write_gguf(tmp_path / "wan.gguf", stored.wide(), "Q4_K")
    else:
        stored.write_mlx(tmp_path, stored.wide())
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4, "text_len": 12}))
    source = WanSource([tmp_path / "wan.gguf" if form == "gguf" else tmp_path], None)
    assert (source.wan, source.model) == (stored.WIDE, "wan-256x2")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_scale_per_row_needs_no_word(dtype: torch.dtype, tmp_path: Path) -> None:
    state, meant = stored.wide(), {}
    for name in stored.matrices(state):
        scale = state[name].abs().amax(1, keepdim=True) / (127 if dtype == torch.int8 else torch.finfo(dtype).max)
        q = state[name] / scale
        state[name] = q.round().to(dtype) if dtype == torch.int8 else q.to(dtype)
        state[f"{name}_scale"] = scale
        meant[name] = stored.rounded((state[name].double() * scale.double()).numpy())
    path = saved(tmp_path / "distill_fp8.safetensors", state)
    holds(stored.source(path), meant, stored.wide())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_fp8_without_scales_means_its_own_numbers(suffix: str, tmp_path: Path) -> None:
    state = stored.wide()
    meant = {name: state[name].to(torch.float8_e4m3fn) for name in stored.matrices(state)}
    path = saved(tmp_path / f"wan_fp8_e4m3fn{suffix}", {**state, **meant})
    holds(stored.source(path), {name: weight.bfloat16() for name, weight in meant.items()}, stored.wide())


def test_float64_is_read(tmp_path: Path) -> None:
    state = {name: weight.double() for name, weight in stored.wide().items()}
    source = stored.source(saved(tmp_path / "model.safetensors", state))
    source.check(("backbone", "flow_head"))
    assert source.tensor("student", "backbone.patch_embedding.weight").dtype == torch.float64


# Text encoders


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_a_text_encoder_in_gguf_has_the_names_of_llama_cpp(kind: str, tmp_path: Path) -> None:
    import gguf

    encoder = made.models().text_encoder
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, made.TEXT.num_layers)
    state = {}
    for name, weight in encoder.state_dict().items():
        theirs = converted("text_encoder", name).removesuffix(".weight")
        found = names.get_name(theirs)
        assert found is not None, theirs
        state[f"{found}.weight"] = weight
    assert state.keys() == stored.text_state(encoder, "ggml").keys()
    stored.write_gguf(tmp_path / "umt5.gguf", state, "Q8_0" if kind == "Q8_0" else "BF16", "t5encoder")
    (tmp_path / "spiece.model").write_bytes(tokenizer_bytes())
    source = small(tmp_path / "umt5.gguf", tmp_path / "spiece.model")
    source.check(("text_encoder",))
    for name, weight in encoder.state_dict().items():
        torch.testing.assert_close(source.tensor("text_encoder", name).float(), weight, rtol=2**-8, atol=1e-3)


def test_umt5_in_scaled_fp8_brings_its_tokenizer(tmp_path: Path) -> None:
    encoder, path = made.models().text_encoder, tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    state = stored.text_state(encoder, "diffusers")
    meant = stored.write_scaled_fp8(path, state)
    tokenizer = torch.frombuffer(bytearray(tokenizer_bytes()), dtype=torch.uint8)
    save_file({**load_file(path), "spiece_model": tokenizer}, path)
    source = small(path)
    source.check(("text_encoder",))
    assert source.tokenizer is not None and source.tokenizer.read_bytes() == tokenizer_bytes()
    assert set(source.sha256(("text_encoder",))) == {path.name}
    for name in encoder.state_dict():
        if (called := converted("text_encoder", name)) in meant:
            assert torch.equal(source.tensor("text_encoder", name), meant[called])
    other = tmp_path / "spiece.model"
    other.write_bytes(tokenizer_bytes())
    assert small(path, other).tokenizer == other  # one that is given comes before
    kept = source.tokenizer
    del source
    assert not kept.exists()


# Memory


_READ_ALL = """
import sys, threading
from pathlib import Path
from tmd_export.checkpoints import open_tensors

def anonymous():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

peak = 0

def watch(over):
    global peak
    while not over.wait(0.002):
        peak = max(peak, anonymous())

for path in sys.argv[1:]:
    tensors = open_tensors([Path(path)])
    tensors.read(next(iter(tensors.entries)))  # what a first time needs: libraries, threads
    before = peak = anonymous()
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(over,))
    watcher.start()
    for name in tensors.entries:
        weight = tensors.read(name)
        peak = max(peak, anonymous())
        del weight
    over.set()
    watcher.join()
    print(peak - before, len(tensors.entries))
"""


def test_reading_takes_one_tensor_of_memory_and_not_all(tmp_path: Path) -> None:
    side, count = 2048, 12  # 8 MiB each in bfloat16, 96 MiB together
    paths = []
    for form, write in _WRITE.items():
        (tmp_path / form).mkdir()
        paths.append(write(tmp_path / form, side, count))
    run = subprocess.run([sys.executable, "-c", _READ_ALL, *paths], capture_output=True, text=True, check=True)
    for form, line in zip(_WRITE, run.stdout.splitlines(), strict=True):
        grown, found = map(int, line.split())
        assert found == count
        assert grown < (8 + 56) << 20, form


def _many_gguf(folder: Path, side: int, count: int) -> Path:
    import gguf

    writer = gguf.GGUFWriter(folder / "x.gguf", "wan")
    blocks = np.zeros((side, side // 256 * 144), np.uint8)
    for k in range(count):
        writer.add_tensor(f"w{k}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "x.gguf"


def _many(folder: Path, count: int, parts: dict[str, Tensor], name: str = "x.safetensors") -> Path:
    save_file({f"w{k}.{part}": tensor.clone() for k in range(count) for part, tensor in parts.items()}, folder / name)
    return folder / name


def _mark(**conf: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(conf).encode()), dtype=torch.uint8)


def _many_mlx(folder: Path, side: int, count: int) -> Path:
    scales = torch.ones(side, side // 64, dtype=torch.float16)
    words = torch.zeros(side, side // 4, dtype=torch.uint32)
    how = {"mode": "affine", "bits": 8, "group_size": 64}
    (folder / "mlx_dit.json").write_text(json.dumps({"format_version": 1, "quantization": how}))
    return _many(
        folder, count, {"weight": words, "weight.scales": scales, "weight.biases": scales}, "mlx_dit.safetensors"
    )


_WRITE: dict[str, Callable[[Path, int, int], Path]] = {
    "gguf": _many_gguf,
    "scaled fp8": lambda folder, side, count: _many(
        folder, count, {"weight": torch.ones(side, side).to(torch.float8_e4m3fn), "scale_weight": torch.tensor(0.5)}
    ),
    "int8 with ConvRot": lambda folder, side, count: _many(
        folder,
        count,
        {
            "weight": torch.ones(side, side, dtype=torch.int8),
            "weight_scale": torch.ones(side, 1),
            "comfy_quant": _mark(format="int8_tensorwise", convrot=True, convrot_groupsize=256),
        },
    ),
    "nvfp4": lambda folder, side, count: _many(
        folder,
        count,
        {
            "weight": torch.ones(side, side // 2, dtype=torch.uint8),
            "weight_scale": torch.ones(side, side // 16).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(1.0),
            "comfy_quant": _mark(format="nvfp4"),
        },
    ),
    "mlx": _many_mlx,
}


# What is not read, and what does not fit


def conf_file(tmp_path: Path, conf: object, **changes: Tensor | None) -> Path:
    """A layer that ComfyUI's int8 would describe, with `conf` as its word, and some tensors replaced or left out."""
    text = conf if isinstance(conf, bytes) else json.dumps(conf).encode()
    parts: dict[str, Tensor | None] = {
        "weight": torch.ones(4, 64, dtype=torch.int8),
        "weight_scale": torch.ones(4, 1),
        "comfy_quant": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        **changes,
    }
    state = {f"blocks.0.ffn.0.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    return saved(tmp_path / "model.safetensors", state)


@pytest.mark.parametrize(
    "form", ["convrot_w4a4", "asym_w4a8_int8", "awq_w4a16", "int8_blockwise", "float8_e4m3fn_rowwise", "new_one"]
)
def test_an_unknown_comfy_format_names_itself(form: str, tmp_path: Path) -> None:
    said = refusal(lambda: open_tensors([conf_file(tmp_path, {"format": form})]))
    assert f"'blocks.0.ffn.0.weight' in ComfyUI's format '{form}', which is not read here" in said
    assert "float8_e4m3fn, float8_e5m2, int8_tensorwise, mxfp8, nvfp4" in said


@pytest.mark.parametrize(
    ("conf", "changes", "said"),
    [
        (b"{", {}, "should be JSON and is not"),
        (b"[1]", {}, "should be JSON and is not (it is no object)"),
        (b"[" * 60_000, {}, "should be JSON and is not"),
        ({}, {}, "in ComfyUI's format 'None'"),
        ({"format": ["int8_tensorwise"]}, {}, "ComfyUI's format"),
        ({"format": "int8_tensorwise"}, {"weight": None}, "'blocks.0.ffn.0.weight' is missing"),
        ({"format": "int8_tensorwise"}, {"weight_scale": None}, "'blocks.0.ffn.0.weight_scale' is missing"),
        ({"format": "int8_tensorwise"}, {"weight_scale": torch.ones(4, 2)}, "is [4, 2], which does not fit"),
        ({"format": "int8_tensorwise"}, {"weight_scale": torch.ones(4, dtype=torch.int32)}, "is int32 instead of"),
        ({"format": "float8_e4m3fn"}, {}, "is int8 instead of float8_e4m3fn"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}, {}, "64 columns, rotated by groups"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 32}, {}, "rotated by groups of '32'"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 2**40}, {}, "rotated by groups"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64, "weight_rotated": False}, {},
         "no rotated weight"),
        ({"format": "nvfp4"}, {"weight": torch.ones(4, 8, dtype=torch.uint8)}, "instead of float8_e4m3fn or uint8"),
        ({"format": "nvfp4"}, {"weight": torch.ones(4, 9, dtype=torch.uint8)}, "no whole groups of 16"),
        ({"format": "nvfp4"}, {"weight": torch.ones(64, dtype=torch.uint8)}, "is [64] and no matrix"),
        ({"format": "nvfp4"}, {"weight": torch.ones(4, 8, dtype=torch.uint8),
                               "weight_scale": torch.ones(4, 1, dtype=torch.uint8)}, "is [4, 1], which does not fit"),
        ({"format": "nvfp4"}, {"weight": torch.ones(4, 8, dtype=torch.uint8),
                               "weight_scale": torch.ones(128, 4, dtype=torch.uint8)}, "weight_scale_2' is missing"),
        ({"format": "int8_tensorwise"}, {"comfy_quant": torch.zeros(1 << 17, dtype=torch.uint8)}, "a few bytes of"),
    ],
)  # fmt: skip
def test_a_layer_that_does_not_fit_its_format_is_refused(
    conf: object, changes: dict[str, Tensor | None], said: str, tmp_path: Path
) -> None:
    path = conf_file(tmp_path, conf, **changes)
    assert said in refusal(lambda: open_tensors([path]))


@pytest.mark.parametrize(
    "header", ["{", "[]", '{"layers": 3}', '{"layers": {"a": 1}}', '{"layers": {"a": {"format": "nvfp4"}}}']
)
def test_a_header_that_makes_no_sense_is_refused(header: str, tmp_path: Path) -> None:
    save_file({"b.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors", metadata={"_quantization_metadata": header})
    assert "x.safetensors" in refusal(lambda: open_tensors([tmp_path / "x.safetensors"]))


def test_scales_that_are_no_numbers_are_refused_when_they_are_read(tmp_path: Path) -> None:
    path = conf_file(tmp_path, {"format": "int8_tensorwise"}, weight_scale=torch.tensor(float("nan")))
    tensors = open_tensors([path])
    assert "values that are no numbers" in refusal(lambda: tensors.read("blocks.0.ffn.0.weight"))


def test_old_scaled_fp8_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    fp8 = torch.ones(4, 4).to(torch.float8_e4m3fn)
    for state, said in (
        ({"a.scale_weight": torch.tensor(1.0)}, "'a.weight' is missing"),
        ({"a.weight": torch.ones(4, 4), "a.scale_weight": torch.tensor(1.0)}, "is float32 instead of float8_e4m3fn"),
        ({"a.weight": fp8, "a.scale_weight": torch.ones(3)}, "'a.scale_weight' is [3], which does not fit"),
    ):
        path = saved(tmp_path / "x.safetensors", state)
        assert said in refusal(lambda: open_tensors([path]))  # noqa: B023


def test_fp8_with_scales_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    state = stored.wide()
    name = "blocks.0.ffn.0.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    path = saved(tmp_path / "x.safetensors", {**state, f"{name}_scale_inv": torch.ones(4, 2)})
    assert "1 unexpected ('blocks.0.ffn.0.weight_scale_inv')" in refusal(lambda: stored.source(path))
    path = saved(tmp_path / "x.safetensors", {**state, f"{name}_scale": torch.ones(4, 2)})
    assert "is [4, 2], which does not fit" in refusal(lambda: stored.source(path))


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (None, "mlx_dit.json, which says how, is not beside it"),
        ("{", "cannot be read as JSON"),
        ("[]", "is a list in JSON"),
        ('{"format_version": 2, "quantization": {}}', "has format_version '2'"),
        ('{"format_version": 1, "quantization": null}', "quantization 'None'"),
        ('{"format_version": 1, "quantization": {"mode": "mxfp4"}}', "in the mode 'mxfp4'"),
        ('{"format_version": 1, "quantization": {"mode": "affine", "bits": 3, "group_size": 64}}', "'3' bits"),
        ('{"format_version": 1, "quantization": {"mode": "affine", "bits": 8, "group_size": true}}', "affine"),
        ('{"format_version": 1, "quantization": {"mode": "affine", "bits": 8, "group_size": 60}}', "no whole groups"),
        ('{"format_version": 1, "quantization": {"mode": "affine", "bits": 8, "group_size": 32}}', "does not fit"),
    ],
)
def test_an_mlx_file_without_a_word_that_is_known_is_refused(document: str | None, said: str, tmp_path: Path) -> None:
    stored.write_mlx(tmp_path, stored.wide())
    (tmp_path / "mlx_dit.json").unlink()
    if document is not None:
        (tmp_path / "mlx_dit.json").write_text(document)
    assert said in refusal(lambda: stored.source(tmp_path))


def test_nothing_else_knows_a_format_by_name() -> None:
    """The rest of `checkpoints` asks `Tensors`; a format is one module of `storage` and a row of its list."""
    package = Path(sys.modules[WanSource.__module__].__file__ or "").parents[1] / "checkpoints"
    assert len({type(form).__module__ for form in FORMATS}) == len(FORMATS)
    words = ("scale_weight", "weight_scale", "comfy_quant", "mlx_dit.json", "float8")
    for path in package.glob("*.py"):
        found = [word for word in words if word in path.read_text()]
        assert not found or (path.name == "tensors.py" and found == ["float8"]), (path, found)
