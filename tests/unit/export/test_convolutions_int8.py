"""Decoders in int8: the rewritten graph on both engines against float64, and what the built-in decoder then shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import openvino
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.ms_ssim import ms_ssim
from tmd_engines.onnxruntime.engine import fast_unsigned_products
from tmd_engines.onnxruntime.lowering import low_precision_to_float32
from tmd_engines.openvino.engine import compile_properties
from tmd_export import ExportError
from tmd_export.families.family import Request
from tmd_export.families.tmd import TMD
from tmd_export.parts import parse_precision
from tmd_export.quantization.convolutions import FORMAT, quantize_convolutions
from tmd_export.quantization.decoder import DecoderQuantizer, RoundedDecoder
from tmd_export.sources.decoders import WithDecoder
from tmd_ref.taehv import TAEHV

CHANNELS, LARGEST = 24, 3.5


class OneWeight:
    """A stand-in for `Weights` with the weight of one convolution, in bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __contains__(self, name: str) -> bool:
        return name == "net.conv.weight"

    def form(self, name: str) -> tuple[torch.Size, torch.dtype]:
        return self.weight.shape, torch.bfloat16

    def laid_out(self, name: str) -> Tensor:
        return self.weight

    def codes(self, name: str) -> None:
        return None


def quantized_convolution(weight: Tensor, bias: Tensor) -> ir.Model:
    """x in float32 - Cast - Conv in bfloat16 with a bias - Cast, as `trace` gives it, after the rewriting."""
    low, full = TensorProto.BFLOAT16, TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], name="low", to=low),
        helper.make_node("Conv", ["low", "net.conv.weight", "net.conv.bias"], ["y"], name="conv", pads=[0, 1, 1] * 2),
        helper.make_node("Cast", ["y"], ["wide"], name="wide", to=full),
        helper.make_node("Mul", ["wide", "two"], ["out"], name="twice"),
    ]
    values = [
        helper.make_tensor("net.conv.weight", low, list(weight.shape), bytes(weight.numel() * 2), raw=True),
        helper.make_tensor("net.conv.bias", low, [CHANNELS], bias.view(torch.uint8).numpy().tobytes(), raw=True),
        helper.make_tensor("two", full, [], [2.0]),
    ]
    x, out = (
        helper.make_tensor_value_info("x", full, [1, CHANNELS, 4, 9, 7]),
        helper.make_tensor_value_info("out", 1, None),
    )
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [x], [out], values), opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    )
    model = ir.from_proto(proto)
    stored = quantize_convolutions(model, OneWeight(weight), {"net.conv": LARGEST})  # type: ignore[arg-type]
    for name, initializer in model.graph.initializers.items():
        if initializer.const_value is None:
            whole = torch.cat(list(stored.chunks(name)))
            raw = whole.contiguous().view(torch.uint8).numpy().tobytes()
            kind = {torch.int8: TensorProto.INT8, torch.bfloat16: low}[whole.dtype]
            initializer.const_value = ir.serde.deserialize_tensor(
                helper.make_tensor(name, kind, list(whole.shape), raw, raw=True)
            )
    return model


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_int8_convolution_is_that_of_the_rounded_values(engine: str) -> None:
    if engine == "openvino" and not fast_unsigned_products():
        pytest.skip("this CPU has no products of 8 bits, and sums in 16 bits overflow")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, 3, generator=generator) * 0.1
    bias = torch.randn(CHANNELS, generator=generator).bfloat16()
    x = torch.randn(1, CHANNELS, 4, 9, 7, generator=generator).bfloat16().float()
    low = torch.bfloat16
    rounded = FORMAT.rounded(x, LARGEST, low).double(), FORMAT.rounded_weight(weight, low).double()
    expected = 2 * torch.nn.functional.conv3d(*rounded, bias.double(), padding=(0, 1, 1)).numpy()
    proto = ir.to_proto(quantized_convolution(weight, bias))
    if engine == "onnxruntime":
        import onnxruntime

        low_precision_to_float32(proto)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x.numpy()})
    else:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(proto.SerializeToString()), "CPU", compile_properties(1))
        found = compiled({"x": x.numpy()})[0]
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 4e-3  # the product is bfloat16: 2^-9 of each value


def test_weights_have_a_scale_per_output_channel() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1, 0, 9]).view(
        -1, 1, 1, 1
    )
    rounded = FORMAT.rounded_weight(weight, torch.bfloat16)
    steps = weight.flatten(1).abs().amax(1) / 127
    error = (rounded - weight).flatten(1).abs().amax(1)
    assert (error <= steps * (0.5 + 127 * 2**-8)).all()


def test_the_built_in_decoder_in_int8_shows_what_it_shows_in_float32() -> None:
    quantizer = DecoderQuantizer(TMD.open(Request("tiny")))
    quantizer.prepare(lambda *_: None)
    assert quantizer.sensitivity is not None
    assert quantizer.sensitivity.chosen < 0.01 and quantizer.sensitivity.kept == ()
    with torch.no_grad():
        vae = quantizer._float32()
        latents = quantizer._latents(7, 1)
        rounded = RoundedDecoder(vae, set(quantizer._ranges))
        rounded._ranges = quantizer._ranges
        exact = rounded.decode(latents)["video"]
        found = rounded({"latents": latents.numpy()}, ())["video"]
        assert np.array_equal(rounded.decode(latents)["video"], exact)  # its weights are whole again
    one, other = (np.clip(127.5 * video[0].transpose(1, 2, 3, 0) + 127.5, 0, 255).round() for video in (exact, found))
    assert not np.array_equal(one, other) and ms_ssim(one, other, 3) > 0.99


def test_a_decoder_from_elsewhere_is_calibrated_on_latents_of_the_models_own_vae(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(TAEHV().state_dict(), tmp_path / "taehv.safetensors")
    inner = TMD.open(Request("tiny"))
    own, other = DecoderQuantizer(inner), DecoderQuantizer(WithDecoder(inner, tmp_path / "taehv.safetensors"))
    with torch.no_grad():
        assert torch.equal(own._latents(3, 1), other._latents(3, 1))
    with pytest.raises(ExportError, match="cannot compile TAEHV in int8"):
        other.prepare(lambda *_: None)


def test_trained_weights_without_an_encoder_are_not_calibrated_on_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    source = TMD.open(Request("tiny"))
    read = source.tensor
    monkeypatch.setattr(source, "tensor", lambda which, name: {}[name] if "encoder." in name else read(which, name))
    with pytest.raises(ExportError, match=r"no encoder to make latents.*decoder=bf16"):
        DecoderQuantizer(source)._latents(0, 1)


def test_int8_is_for_decoders_that_are_named() -> None:
    alone = parse_precision("int8")
    assert alone["decoder_step"] == "bf16" and alone["backbone"] == "int8"
    assert {parse_precision("bf16,decoder=int8")[part] for part in ("decoder_first", "decoder_step")} == {"int8"}
    for wrong in ("decoder=fp8", "decoder=nvfp4", "text_encoder=int8", "encoder=int8"):
        with pytest.raises(ValueError, match="cannot be"):
            parse_precision(wrong)
