"""One pipeline in several threads, clones that share weights, and the machine that they share."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tmd_engines
import tmd_runtime
from tmd_engines.device.cpu import SMALL_THREADS, cores, cpu_quota, resolve_threads
from tmd_runtime import Pipeline, RuntimeFailure

PROMPTS = [f"a {colour} star" for colour in ("red", "blue", "green")]
OPTIONS: dict[str, Any] = {"frames": 5, "size": (32, 32), "seed": 1}


@pytest.fixture(params=["onnxruntime", "openvino"])
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    return tmd_runtime.load(engine=request.param)


def test_threads_take_turns_with_one_pipeline(pipeline: Pipeline) -> None:
    expected = {prompt: pipeline(prompt, **OPTIONS).frames for prompt in PROMPTS}
    work = PROMPTS * 6
    with ThreadPoolExecutor(6) as pool:
        for prompt, found in zip(work, pool.map(lambda text: pipeline(text, **OPTIONS).frames, work), strict=True):
            assert np.array_equal(found, expected[prompt])


def test_clones_share_weights_and_not_buffers(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {prompt: pipeline(prompt, **OPTIONS).frames for prompt in PROMPTS}

    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded again")

    monkeypatch.setattr(tmd_engines, "load", never)
    clones = [pipeline.clone() for _ in PROMPTS]

    def work(number: int) -> list[np.ndarray]:
        return [clones[number](PROMPTS[number], **OPTIONS).frames for _ in range(6)]

    with ThreadPoolExecutor(3) as pool:
        for prompt, found in zip(PROMPTS, pool.map(work, range(3)), strict=True):
            assert all(np.array_equal(frames, expected[prompt]) for frames in found)
    pipeline.close()
    assert np.array_equal(clones[0](PROMPTS[0], **OPTIONS).frames, expected[PROMPTS[0]]), "weights outlive the first"


def test_a_run_inside_a_run_is_refused_and_the_pipeline_stays_usable() -> None:
    pipeline = tmd_runtime.load()
    latents = np.zeros((1, 16, 2, 4, 4), np.float32)
    pieces = pipeline.decode_chunks(latents)
    next(pieces)
    for attempt in (lambda: pipeline(PROMPTS[0], **OPTIONS), lambda: pipeline.encode("x"),
                    lambda: pipeline.decode(latents)):  # fmt: skip
        with pytest.raises(RuntimeFailure, match=r"in the middle of a run in this thread.*pipeline.clone\(\)"):
            attempt()
    assert len(list(pieces)) == 1
    assert pipeline(PROMPTS[0], **OPTIONS).frames.shape == (5, 32, 32, 3)


def test_a_failed_run_gives_its_turn_back() -> None:
    pipeline = tmd_runtime.load()
    with pytest.raises(RuntimeFailure):
        pipeline(PROMPTS[0], callback=lambda _: False, **OPTIONS)
    done = threading.Thread(target=lambda: pipeline(PROMPTS[0], **OPTIONS))
    done.start()
    done.join(30)
    assert not done.is_alive()


def files(root: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/jobs/one\n", "sys/fs/cgroup/jobs/cpu.max": "150000 100000\n"}
V1 = {
    "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n1:memory:/docker/abc\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(
    ("content", "quota"),
    [
        ({}, None),
        (V2, 1.5),
        (V2 | {"sys/fs/cgroup/jobs/one/cpu.max": "max 100000\n"}, 1.5),
        (V2 | {"sys/fs/cgroup/jobs/one/cpu.max": "20000 100000\n"}, 0.2),
        (V1, 0.5),
        (V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, None),
        (V2 | {"sys/fs/cgroup/jobs/cpu.max": "broken\n"}, None),
        (V2 | {"sys/fs/cgroup/jobs/cpu.max": "1 0\n"}, None),
    ],
)
def test_a_containers_quota_of_processors_counts(tmp_path: Path, content: dict[str, str], quota: float | None) -> None:
    root = files(tmp_path, content)
    assert cpu_quota(root) == quota
    affinity = len(os.sched_getaffinity(0))
    assert cores(root) == (affinity if quota is None else max(1, min(affinity, int(np.ceil(quota)))))


class _Large:
    class manifest:
        class _File:
            size = 1 << 30

        files: dict[str, Any] = {"backbone.onnx.data": _File}  # noqa: RUF012


def test_default_threads_are_the_same_everywhere_for_a_small_model(tmp_path: Path) -> None:
    small = tmd_runtime.load().bundle
    for content in ({}, V2, V1):
        root = files(tmp_path / str(len(content)), content)
        assert resolve_threads(small, None, root) == (SMALL_THREADS, None)
    limited = files(tmp_path / "limited", V2)
    large: Any = _Large
    assert resolve_threads(large, None, tmp_path / "0") == (None, None)
    assert resolve_threads(large, None, limited)[0] == cores(limited)


def test_threads_are_bounded_by_the_machine() -> None:
    small = tmd_runtime.load().bundle
    most = max(os.cpu_count() or 1, SMALL_THREADS)
    assert resolve_threads(small, 1) == (1, None) and resolve_threads(small, most) == (most, None)
    threads, note = resolve_threads(small, 1024)
    assert threads == most and note is not None and "1024 threads are more than this machine's" in note
    result = tmd_runtime.load(threads=1024)(PROMPTS[0], **OPTIONS)
    assert result.threads == most and note in result.warnings
