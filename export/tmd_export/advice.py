"""What another precision would bring on the CPU of this machine, said after an export. The figures: docs/speed.md."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .graph_export import GraphReport
from .parts import DECODERS

LEAST_BYTES = 64 << 20  # of the graphs meant; with smaller ones nobody waits
_BFLOAT16 = ("avx512_bf16", "amx_bf16")
_INT8 = ("avx512_vnni", "amx_int8")


def advice(graphs: Iterable[GraphReport], features: Collection[str]) -> str | None:
    """A sentence for the user; None if the precisions are those that a CPU with `features` is fastest in."""
    exported = list(graphs)
    slow = [each for each in exported if each.precision in ("fp32", "fp16") and each.name != "encoder"]
    units = [unit for unit in _BFLOAT16 if unit in features]
    if units and sum(each.bytes for each in slow) > LEAST_BYTES:
        names = ", ".join(each.name for each in slow if each.bytes > LEAST_BYTES // 4)
        return (
            f"{names} will be computed in float32 on a CPU. This one multiplies bfloat16 ({units[0]}), which is about "
            "twice as fast: for this machine choose --precision bf16, and run with OpenVINO."
        )
    decoders = [each for each in exported if each.name in DECODERS and each.precision == "bf16"]
    units = [unit for unit in _INT8 if unit in features]
    if units and sum(each.bytes for each in decoders) > LEAST_BYTES:
        return (
            f"decoding is most of a few-step run on a CPU. This one multiplies int8 ({units[0]}): --precision "
            "bf16,decoder=int8 decodes about 1.7 times as fast with OpenVINO, at an MS-SSIM above 0.99."
        )
    return None
