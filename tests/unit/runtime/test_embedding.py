"""Rows of the table are what torch looks up in memory, and the table itself stays on the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tmd_engines import BundleError
from tmd_engines.bundle.manifest import EmbeddingTable
from tmd_runtime import RuntimeFailure
from tmd_runtime.text.embedding import TokenEmbedding

ROWS, DIM = 50, 12


def write_table(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, EmbeddingTable]:
    table = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    (folder / "text_embedding.bin").write_bytes(table.view(torch.uint8).numpy().tobytes())
    name: Any = str(dtype).removeprefix("torch.")
    return table, EmbeddingTable(file="text_embedding.bin", dtype=name, rows=ROWS, dim=DIM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_equal_torchs_lookup_to_the_last_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    table, info = write_table(tmp_path, dtype)
    ids = torch.tensor([[0, 49, 7, 7], [1, 0, 0, 48]])
    found = TokenEmbedding(tmp_path, info)(ids.numpy())
    assert found.dtype == np.float32 and found.flags.c_contiguous
    assert np.array_equal(found, torch.nn.functional.embedding(ids, table).float().numpy())


@pytest.mark.parametrize("wrong", [-1, ROWS])
def test_an_id_without_a_row_is_an_error(tmp_path: Path, wrong: int) -> None:
    embed = TokenEmbedding(tmp_path, write_table(tmp_path, torch.float32)[1])
    with pytest.raises(RuntimeFailure, match=f"gave the id {wrong}, and text_embedding.bin has rows 0 to 49"):
        embed(np.array([[3, wrong]]))


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    _, info = write_table(tmp_path, torch.bfloat16)
    os.truncate(tmp_path / info.file, ROWS * DIM * 2 - 1)
    embed = TokenEmbedding(tmp_path, info)
    with pytest.raises(RuntimeFailure, match="has 1199 bytes where the manifest says 1200"):
        embed(np.array([[3]]))
    (tmp_path / info.file).unlink()
    (tmp_path / info.file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link to a file that is not there"):
        embed(np.array([[3]]))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc: resident memory cannot be asked")
def test_a_lookup_reads_the_rows_of_the_prompt_and_not_the_table(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    rows, dim = 65_536, 2048  # 256 MiB of bfloat16, as UMT5-XXL's 2.1 GB in small
    with open(tmp_path / "table.bin", "wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20) * 4)
    info = EmbeddingTable(file="table.bin", dtype="bfloat16", rows=rows, dim=dim)
    ids = np.random.default_rng(0).integers(0, rows, (1, 512))
    before = resident()
    embed = TokenEmbedding(tmp_path, info)
    values = embed(ids)
    grown = resident() - before
    assert values.nbytes == 512 * dim * 4
    assert grown < 16 << 20, f"resident memory grew by {grown / 2**20:.0f} MiB of the table's 256"
