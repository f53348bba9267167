"""What the C++ library thinks of memory: free as Python reads it, needed about as Python counts, and what follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cpp_tools import twin
from tests.helpers.system_files import FREE_MEMORY
from tmd_engines import Bundle
from tmd_engines.cost.sizing import estimate
from tmd_runtime.built_in import BUILT_IN


def put(root: Path, files: dict[str, str]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return str(root)


def latent_size(width: int, height: int, frames: int) -> list[int]:
    return [(frames - 1) // 4 + 1, height // 8, width // 8]


@pytest.mark.parametrize(("files", "expected"), FREE_MEMORY)
def test_free_memory_is_read_as_in_python(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert twin().ask("available", root=put(tmp_path, files))["ok"] == expected


def test_free_memory_of_this_machine_is_read() -> None:
    assert twin().ask("available", root="")["ok"] > 1e6


@pytest.mark.parametrize(("width", "height", "frames"), [(64, 64, 17), (256, 256, 1), (512, 512, 33), (832, 480, 81)])
def test_need_is_within_a_factor_of_two_of_what_python_counts(width: int, height: int, frames: int) -> None:
    """Python goes through the graphs node by node, and was compared with real runs (docs/wan.md)."""
    counted = estimate(Bundle.open(BUILT_IN), width=width, height=height, frames=frames)
    guessed = twin().ask("need", bundle=str(BUILT_IN), size=latent_size(width, height, frames))["ok"]
    for mode, bytes_ in zip(("all", "low"), guessed, strict=True):
        assert 0.5 < bytes_ / counted.peak(mode) < 2  # type: ignore[arg-type]


def test_stages_follow_each_other_where_all_of_them_do_not_fit(tmp_path: Path) -> None:
    size, small = latent_size(832, 480, 81), latent_size(64, 64, 17)
    every, low = twin().ask("need", bundle=str(BUILT_IN), size=size)["ok"]
    assert low < every

    def with_free(free: int, *sizes: list[int]) -> tuple[list[bool], str]:
        root = put(tmp_path, {"proc/meminfo": f"MemAvailable: {free // 1024 + 1} kB\n"})
        answer = twin().ask("memory_mode", bundle=str(BUILT_IN), root=root, sizes=sizes)
        return answer["ok"], answer["warnings"]

    assert with_free(every, size) == ([False], "")
    assert with_free((every + low) // 2, size, small, size) == ([True, False, True], "")
    modes, warnings = with_free(low // 2, size)
    assert modes == [True] and "even with one stage after the other" in warnings
    assert twin().ask("memory_mode", bundle=str(BUILT_IN), root="/nowhere", sizes=[size])["ok"] == [False]
