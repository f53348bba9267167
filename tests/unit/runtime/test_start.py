"""What the first run of a process may cost: graphs opened side by side, and libraries that it does without."""

from __future__ import annotations

import random
import string
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import pytest

import tmd_runtime
from tmd_engines import EngineError
from tmd_runtime import graphs
from tmd_runtime.ahead import Ahead
from tmd_runtime.text.tokenizer import clean_prompt

SIZE: dict[str, Any] = {"frames": 5, "size": (32, 32), "seed": 1}


class Opened:
    """An engine as far as `Ahead` knows one."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_what_is_opened_ahead_is_taken_once_and_the_rest_is_closed() -> None:
    made = {name: Opened() for name in "abcd"}
    ahead = Ahead(list("abcd"), lambda name: made[name])  # type: ignore[arg-type, return-value]
    taken = ahead.take("c")
    assert taken in (made["c"], None) and ahead.take("c") is None and ahead.take("e") is None
    ahead.close()
    assert ahead.take("a") is None
    assert not made["c"].is_closed


def test_an_engine_whose_taker_is_interrupted_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    made, opening = Opened(), threading.Event()

    def load(name: str) -> Any:
        assert opening.wait(10)
        return made

    ahead = Ahead(["a"], load)
    while ahead._waiting:  # until its thread has begun
        pass

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ahead._ready["a"], "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ahead.take("a")
    opening.set()
    ahead.close()
    assert made.is_closed


def test_engines_are_opened_side_by_side_and_a_failure_is_raised_where_it_is_asked_for() -> None:
    together = threading.Barrier(3, timeout=10)  # two threads, and this one

    def load(name: str) -> Any:
        together.wait()
        if name == "b":
            raise EngineError("b is broken")
        return name

    ahead = Ahead(["a", "b"], load)
    together.wait()
    assert ahead.take("a") == "a"
    with pytest.raises(EngineError, match="b is broken"):
        ahead.take("b")


def test_one_stage_after_the_other_opens_nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    load = graphs.Graphs._open

    def opening(self: graphs.Graphs, name: str) -> Any:
        threads.append(threading.current_thread().name)
        return load(self, name)

    monkeypatch.setattr(graphs.Graphs, "_open", opening)
    with tmd_runtime.load(memory="low", threads=1) as pipeline:
        low = pipeline("a red circle", **SIZE)
    assert set(threads) == {threading.main_thread().name}
    with tmd_runtime.load(memory="all", threads=1) as pipeline:
        everything = pipeline("a red circle", **SIZE)
    assert "load" in threads and np.array_equal(low.frames, everything.frames)


def test_prompts_that_need_no_repair_are_cleaned_as_ftfy_does() -> None:
    rng = random.Random(0)
    signs = string.printable.translate({ord(sign): None for sign in "&\t\n\r\x0b\x0c"})
    for _ in range(300):
        text = "".join(rng.choices(signs + "   ''\"\"``--..", k=rng.randrange(60)))
        assert clean_prompt(text) == " ".join(ftfy.fix_text(text).split())
    assert clean_prompt("a &amp;amp; b\x00  c\u200b caf\u00c3\u00a9") == "a & b c\u200b caf\u00e9"


def test_a_second_process_starts_without_what_only_the_first_needs(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from tmd_runtime.command.start import main\n"
        "sys.argv = ['tmd-run', '--prompt', 'a red circle', '--quiet', '--frames', '1', '--out', 'a.png']\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print(' '.join(sys.modules))"
    )
    for first in (True, False):
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        heavy = {"onnx", "google.protobuf", "ftfy", "openvino", "torch", "tmd_engines.tensorrt.engine"}
        found = heavy & set(done.stdout.split())
        assert first or not found
