"""What an export says about this machine's CPU."""

from __future__ import annotations

import pytest

from tmd_export.advice import advice
from tmd_export.graph_export import GraphReport

BF16, VNNI = ["avx512f", "avx512_bf16"], ["avx512f", "avx512_bf16", "avx512_vnni"]


def graphs(precision: str, megabytes: int) -> list[GraphReport]:
    return [GraphReport(name, precision, 1, megabytes << 20, 1.0, None) for name in ("decoder_first", "decoder_step")]


@pytest.mark.parametrize(
    ("precision", "megabytes", "features", "said"),
    [
        ("fp16", 100, BF16, "--precision bf16"),
        ("fp32", 100, VNNI, "--precision bf16"),
        ("bf16", 100, VNNI, "decoder=int8"),
        ("bf16", 100, BF16, None),
        ("fp16", 100, ["avx2"], None),
        ("fp16", 10, BF16, None),  # a small model is fast in any precision
        ("int8", 100, VNNI, None),
    ],
)
def test_a_faster_precision_is_named_where_the_cpu_has_one(
    precision: str, megabytes: int, features: list[str], said: str | None
) -> None:
    found = advice(graphs(precision, megabytes), features)
    assert (said in found) if said and found else found is said
