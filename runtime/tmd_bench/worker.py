"""One contender in a process of its own: a line of JSON in, a line of JSON out.

`python -m tmd_bench.worker NAME WORK`, then on stdin `load`, `run` (any number of times). Answers: seconds by stage,
and the process's peak of resident memory so far, in bytes: all of it, and what no file backs (0 where the system does
not tell). Whatever else writes to stdout goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from time import sleep
from typing import Any

from .child import lines
from .spec import Work


def contender(name: str, work: Work) -> Any:
    """The contender called `name`: an engine, one of `spec.RIVALS`, or `limit`."""
    if name == "limit":
        from .limit import MatmulLimit

        return MatmulLimit()
    if name in ("torch", "torch-compile"):
        from .rivals import TorchRun

        return TorchRun(work, compiled=name == "torch-compile")
    if name == "diffusers":
        from .rivals import DiffusersRun

        return DiffusersRun(work)
    if name == "stable-diffusion.cpp":
        from .sdcpp import StableDiffusionCpp

        return StableDiffusionCpp(work)
    from .ours import BundleRun

    return BundleRun(work, name)


class AnonymousMemory(threading.Thread):
    """Asks the kernel every 50 ms for the memory that no file backs; pages of mapped weights could be dropped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        page = resource.getpagesize()
        while True:
            sleep(0.05)
            try:
                with open("/proc/self/statm", encoding="ascii") as file:
                    _, resident, shared, *_ = map(int, file.read().split())
            except OSError:
                return  # not Linux
            self.peak = max(self.peak, (resident - shared) * page)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    memory = AnonymousMemory()
    memory.start()
    runner = contender(sys.argv[1], Work.from_json(sys.argv[2]))
    for line in lines():
        try:
            answer: dict[str, Any] = {"seconds": runner.load() if line.strip() == "load" else runner.run()}
        except Exception as error:  # the process that started the contest reports it
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer["peak_bytes"] = kilobytes * (1 if sys.platform == "darwin" else 1024)
        answer["peak_anonymous_bytes"] = memory.peak
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
