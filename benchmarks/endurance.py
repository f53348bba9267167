"""Kills and long runs: what must hold when nobody is careful. Not a test: it takes minutes.

    python benchmarks/endurance.py kill --count 200         # kill -9 at random moments of a run, an export, a cache
    python benchmarks/endurance.py soak --videos 1000       # many videos in one process, and its memory

`kill` makes every file twice, of seed 1 and then of seed 2. After each kill a name has the whole of one or the other,
and after a sweep, which every command begins with, nothing else is there. It exits with 1 where that does not hold.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from time import perf_counter, sleep

import click

RUN = ["--prompt", "a red circle moving right", "--frames", "5", "--size", "32x32", "--threads", "1", "--quiet"]
Work = Callable[[Path, int, str], object]


def contents(path: Path) -> str:
    """One sha256 of a file, or of all files below a folder with their names; of a bundle without its date."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.name != "manifest.json":
            digest.update(f"{file.relative_to(path.parent)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def tmd_run(folder: Path, seed: int, name: str, engine: str = "onnxruntime") -> None:
    """A video or a folder of frames, and latents."""
    from tmd_runtime.command.cli import command

    os.chdir(folder)
    more = ["--seed", str(seed), "--engine", engine, "--out", name, "--save-latents", "latents"]
    command.main([*RUN, *more], standalone_mode=False)


def tmd_run_with_cache(folder: Path, seed: int, name: str) -> None:
    """The same on OpenVINO, whose compiled graphs go into a cache."""
    os.environ["TMD_CACHE"] = str(folder / "cache")
    tmd_run(folder, seed, name, "openvino")


def tmd_export(folder: Path, seed: int, name: str) -> None:
    """A bundle over a bundle."""
    from tmd_export.export import export_bundle
    from tmd_export.families.open import open_source

    source = open_source("tiny", random_seed=seed)
    export_bundle(source, folder / name, ("decoder_first",), verify=False, overwrite=True)


KINDS: dict[str, tuple[Work, tuple[str, ...], int]] = {
    "run": (tmd_run, ("v.mp4", "frames", "latents"), 2),
    "cache": (tmd_run_with_cache, ("v.mp4", "frames", "latents"), 2),
    "export": (tmd_export, ("bundle",), 1),
}
"""What is killed, the names that it makes, and its share of the kills."""


def begin(work: Work, folder: Path, seed: int, name: str) -> int:
    """Starts the work in a process of its own, which has its libraries already."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            work(folder, seed, name)
        code = 0
    finally:
        os._exit(code)


def checked(kind: str, folder: Path, whole: dict[str, set[str]]) -> list[str]:
    """What is wrong in a folder after a kill."""
    from tmd_engines import Bundle, unfinished
    from tmd_engines.device.plan_cache import PlanCache

    problems = [f"{name} is neither of the two" for name in KINDS[kind][1]
                if (folder / name).exists() and contents(folder / name) not in whole[name]]  # fmt: skip
    problems += [f"{name} is not there" for name in KINDS[kind][1] if not (folder / name).exists()]
    unfinished.sweep(folder)
    unfinished.sweep(Path(tempfile.gettempdir()))
    others = {path.name for path in folder.iterdir()} - {*KINDS[kind][1], "cache"}
    problems += [f"{name} was left" for name in others]
    if kind == "export":
        Bundle.open(folder / "bundle")
    if kind == "cache" and (folder / "cache").exists():
        PlanCache(folder / "cache").store({"swept": "now"}, b"x")
        problems += [f"{path.name} was left" for path in (folder / "cache").glob(".new-*")]
    return problems


@click.group()
def main() -> None:
    """Kills and long runs."""


@main.command()
@click.option("--count", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--only", type=click.Choice(tuple(KINDS)))
def kill(count: int, seed: int, only: str | None) -> None:
    """Kill runs, exports and writers of a cache at random moments."""
    import onnxruntime  # noqa: F401
    import openvino  # noqa: F401

    import tmd_export.export  # noqa: F401
    import tmd_runtime.pipeline  # noqa: F401

    rng = random.Random(seed)
    kinds = [only] if only else [kind for kind, (*_, share) in KINDS.items() for _ in range(share)]
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        os.environ["TMPDIR"] = tempfile.tempdir = str(Path(place) / "temporary")
        Path(tempfile.tempdir).mkdir()
        for kind in dict.fromkeys(kinds):
            work, names, _ = KINDS[kind]
            folder, seconds = Path(place) / kind, 0.0
            folder.mkdir()
            whole: dict[str, set[str]] = {name: set() for name in names}
            made = [name for name in names if name != "latents"]
            for which in (1, 2):
                for name in made:
                    start = perf_counter()
                    if os.waitpid(begin(work, folder, which, name), 0)[1]:
                        raise click.ClickException(f"{kind} fails by itself.")
                    seconds = perf_counter() - start
                for name in names:
                    whole[name].add(contents(folder / name))
            moments: Counter[str] = Counter()
            for number in range(max(1, count * kinds.count(kind) // len(kinds))):
                if kind == "cache" and number % 3 == 0:  # so that there is something to write
                    shutil.rmtree(folder / "cache", ignore_errors=True)
                process = begin(work, folder, 1 + number // 2 % 2, made[number % len(made)])
                sleep(rng.uniform(0, 1.1 * seconds))
                os.kill(process, signal.SIGKILL)
                ended = os.waitpid(process, 0)[1]
                there = [path.name for path in folder.rglob(".*") if path.suffix == ".part"]
                moments["killed" if ended else "was done"] += 1
                moments["left something unfinished"] += bool(there)
                for problem in checked(kind, folder, whole):
                    failed += 1
                    click.echo(f"{kind} {number}: {problem}")
            if os.waitpid(begin(work, folder, 1, made[0]), 0)[1] or checked(kind, folder, whole):
                failed += 1
                click.echo(f"{kind}: the next one does not find its way")
            click.echo(f"{kind}: {dict(moments)}, {seconds:.1f} s without a kill, {failed} problems so far")
    sys.exit(bool(failed))


def resident() -> tuple[float, int]:
    """MB of memory that no file backs, and open files."""
    with open("/proc/self/statm", encoding="ascii") as file:
        _, all_pages, shared, *_ = map(int, file.read().split())
    return (all_pages - shared) * os.sysconf("SC_PAGESIZE") / 1e6, len(os.listdir("/proc/self/fd"))


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keepcost")
    ]


def allocated() -> float | None:
    """MB that the C library has given out and not got back: what grows if something leaks. None: it does not tell."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2  # glibc 2.33 and newer
    except (AttributeError, OSError):
        return None
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return float((found.used + found.hblkhd) / 1e6)


@main.command()
@click.option("--videos", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--engines", default="onnxruntime,openvino", show_default=True)
@click.option("--every", type=click.IntRange(1), default=100, show_default=True, help="Videos until the next length.")
def soak(videos: int, engines: str, every: int) -> None:
    """Make many videos of the built-in model in one process, on each engine in turn, and print its memory."""
    import tmd_runtime

    with tempfile.TemporaryDirectory() as folder:
        pipelines = {engine: tmd_runtime.load(engine=engine, threads=1) for engine in engines.split(",")}
        start = perf_counter()
        for number in range(1, videos + 1):
            pipeline = list(pipelines.values())[number % len(pipelines)]
            frames = 5 + 4 * (number // every % 3)
            result = pipeline("a red circle moving right", seed=number, frames=frames, size=(32, 32))
            ending = (".mp4", ".gif", ".png", "")[number // 2 % 4]
            tmd_runtime.write_video(Path(folder) / f"v{ending}", result.frames, result.fps)
            if number in (10, 50) or number % 100 == 0 or number == videos:
                (memory, files), given = resident(), allocated()
                told = "" if given is None else f", {given:.1f} MB of it in use"
                click.echo(f"{number:5} videos, {perf_counter() - start:7.1f} s: {memory:.1f} MB{told}, {files} files, "
                           f"{len(Path('/proc/self/maps').read_text().splitlines())} mappings")  # fmt: skip
        for pipeline in pipelines.values():
            pipeline.close()


if __name__ == "__main__":
    main()
