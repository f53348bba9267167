"""A server under load, on this machine: how long clients wait, what is lost, what memory does.

    python benchmarks/serve_load.py local --clients 16 --jobs 300            # one tmd-serve
    python benchmarks/serve_load.py local --clients 16 --jobs 300 --kills 10 # the same, killed at random moments
    python benchmarks/serve_load.py local --clients 2 --jobs 1200 --pause 5  # hours of use: memory
    python benchmarks/serve_load.py ray --jobs 40 --denoisers 2              # Ray Serve with so many denoisers

Every client submits a video of the built-in model, waits for its end by its events, and submits the next one. A 429 is
obeyed, a broken connection repeated with the same idempotency key. It exits with 1 if an accepted job is not completed.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np

PROMPT = "a red circle moving right on a black background"
PATIENCE = 600.0


@dataclass
class Seen:
    """What clients saw. Times are in seconds; `first` is from the accepted request to the first progress."""

    submit: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    full: int = 0
    broken: int = 0
    jobs: list[str] = field(default_factory=list)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def resident(process: int) -> int:
    """Bytes."""
    words = Path(f"/proc/{process}/statm").read_text().split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE")


class Local:
    """`tmd-serve` in a process of its own, which can be killed and started again."""

    def __init__(self, data: Path) -> None:
        self.port, self._data = free_port(), data
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-m", "tmd_serve", "--data", self._data, "--port", self.port, "--log-level", "warning"]
        self.process = subprocess.Popen(list(map(str, words)), stderr=subprocess.DEVNULL)
        wait_until_ready(self.port, self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def memory(self) -> int:
        return resident(self.process.pid)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


class OnRay:
    """The server on a cluster of this machine, each engine on one thread."""

    def __init__(self, data: Path, denoisers: int) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray
        from ray import serve

        from tmd_serve.ray import build

        self.port = free_port()
        ray.init(num_cpus=8, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": self.port})
        share = {"cpus": 0.2}
        words = {
            "data": data, "ingress": share, "text_encoders": share, "decoders": {**share, "least": denoisers},
            "denoisers": {**share, "least": denoisers, "most": denoisers}, "threads": 1, "require_key": False,
        }  # fmt: skip
        serve.run(build(words), name="tmd", route_prefix="/")
        wait_until_ready(self.port)

    def memory(self) -> int:
        """Of all replicas."""
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                    total += resident(int(folder.name))
            except OSError:
                continue
        return total

    def close(self) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()


def wait_until_ready(port: int, process: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and (process is None or process.poll() is None):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise click.ClickException("the server does not get ready.")


def client(
    port: int, seeds: Iterator[int], body: dict[str, Any], seen: Seen, lock: threading.Lock, pause: float = 0.0
) -> None:
    """Makes one video after the other, as long as there are seeds, with a pause behind each."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        while True:
            with lock:
                seed = next(seeds, None)
            if seed is None:
                return
            begin, key = time.perf_counter(), secrets.token_hex(8)
            job = submit(http, {**body, "seed": seed}, key, seen, lock)
            accepted = time.perf_counter()
            first = follow(http, job, seen, lock)
            with lock:
                seen.jobs.append(job)
                seen.submit.append(accepted - begin)
                seen.whole.append(time.perf_counter() - accepted)
                if first is not None:
                    seen.first.append(first - accepted)
            time.sleep(pause)


def submit(http: httpx.Client, body: dict[str, Any], key: str, seen: Seen, lock: threading.Lock) -> str:
    while True:
        try:
            answer = http.post("/v1/videos", json=body, headers={"Idempotency-Key": key})
        except httpx.TransportError:
            with lock:
                seen.broken += 1
            time.sleep(0.2)
            continue
        if answer.status_code == 429:
            with lock:
                seen.full += 1
            time.sleep(float(answer.headers["Retry-After"]))
            continue
        answer.raise_for_status()
        return str(answer.json()["id"])


def follow(http: httpx.Client, job: str, seen: Seen, lock: threading.Lock) -> float | None:
    """Reads the events of a job to its end. Returns when the first progress came."""
    first: float | None = None
    while True:
        try:
            with http.stream("GET", f"/v1/videos/{job}/events") as events:
                kind = ""
                for line in events.iter_lines():
                    if line.startswith("event: "):
                        kind = line[7:]
                    elif line.startswith("data: ") and kind == "progress" and first is None:
                        first = time.perf_counter()
                    elif line.startswith("data: ") and kind == "status" and is_over(line[6:]):
                        return first
        except httpx.TransportError:
            with lock:
                seen.broken += 1
            time.sleep(0.2)


def is_over(document: str) -> bool:
    return json.loads(document)["status"] in ("completed", "failed")


@contextmanager
def watched(server: Local | OnRay, kills: int) -> Iterator[list[int]]:
    """The server's memory twice a second; kills it so often, at random moments."""
    sizes, over = list[int](), threading.Event()

    def watch() -> None:
        rng, left = random.Random(0), kills
        due = time.monotonic() + rng.uniform(1, 6)
        while not over.wait(0.5):
            if left and isinstance(server, Local) and time.monotonic() > due:
                server.kill()
                server.start()
                left, due = left - 1, time.monotonic() + rng.uniform(1, 6)
            try:
                sizes.append(server.memory())
            except OSError:
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        over.set()
        thread.join()


def quantiles(values: list[float]) -> str:
    half, most = np.percentile(values, (50, 99))
    return f"p50 {half:.3f} s, p99 {most:.3f} s"


@click.command()
@click.argument("kind", type=click.Choice(["local", "ray"]))
@click.option("--clients", type=click.IntRange(1, 200), default=8, show_default=True)
@click.option("--jobs", type=click.IntRange(1), default=100, show_default=True)
@click.option("--kills", type=click.IntRange(0), default=0, show_default=True, help="Of tmd-serve.")
@click.option("--denoisers", type=click.IntRange(1), default=1, show_default=True, help="And decoders, on Ray.")
@click.option("--frames", type=click.IntRange(1), default=17, show_default=True)
@click.option("--size", default="64x64", show_default=True)
@click.option("--pause", type=click.FloatRange(0), default=0.0, show_default=True, help="Seconds between jobs.")
def main(kind: str, clients: int, jobs: int, kills: int, denoisers: int, frames: int, size: str, pause: float) -> None:
    """Loads a server of the built-in model, and says what clients saw."""
    seen, lock, seeds = Seen(), threading.Lock(), iter(range(jobs))
    body = {"prompt": PROMPT, "frames": frames, "size": size}
    with tempfile.TemporaryDirectory() as folder:
        server: Local | OnRay = Local(Path(folder)) if kind == "local" else OnRay(Path(folder), denoisers)
        try:
            warm = Seen()
            client(server.port, iter(range(jobs, jobs + max(denoisers, 1))), body, warm, lock)
            begin = time.perf_counter()
            with watched(server, kills) as sizes:
                threads = [
                    threading.Thread(target=client, args=(server.port, seeds, body, seen, lock, pause))
                    for _ in range(clients)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            seconds = time.perf_counter() - begin
            http = httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60)
            ends = [http.get(f"/v1/videos/{job}").json()["status"] for job in seen.jobs]
        finally:
            server.close()
    rate = f"{60 * jobs / seconds:.1f} a minute, {seconds / 60:.1f} minutes"
    click.echo(f"{jobs} videos of {size}, {frames} frames, by {clients} clients: {rate}")
    click.echo(
        f"submit: {quantiles(seen.submit)}; first progress: {quantiles(seen.first)}; end: {quantiles(seen.whole)}"
    )
    click.echo(f"answers 429: {seen.full}; broken connections: {seen.broken}; completed: {ends.count('completed')}")
    shown = sizes[:: max(len(sizes) // 8, 1)]
    click.echo(f"memory: {', '.join(f'{size / 2**20:.0f}' for size in shown)} MiB, at most {max(sizes) / 2**20:.0f}")
    if ends.count("completed") != jobs:
        sys.exit(1)


if __name__ == "__main__":
    main()
