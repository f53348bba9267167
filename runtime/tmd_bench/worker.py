"""One contender in a process of its own: a line of JSON in, a line of JSON out.

`python -m tmd_bench.worker NAME WORK`, then on stdin `load`, `run` (any number of times). Answers: seconds by stage,
and the process's peak of resident memory so far, in bytes. Whatever else writes to stdout goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

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
    from .ours import BundleRun

    return BundleRun(work, name)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runner = contender(sys.argv[1], Work.from_json(sys.argv[2]))
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"seconds": runner.load() if line.strip() == "load" else runner.run()}
        except Exception as error:  # told to the one who asked, who has the whole picture
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer["peak_bytes"] = kilobytes * (1 if sys.platform == "darwin" else 1024)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
