"""A signal ends `tmd-distill` within half a second, whatever it is doing: no traceback, and no file half written."""

from __future__ import annotations

import sys
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, Signals

import pytest

from tests.helpers.processes import send, started

# The command, with a stage that is in the midst of writing, and says so.
SCRIPT = """
import hashlib, threading
from tmd_ref.distill import recipe
from tmd_ref.partial import writing

def teacher(job):
    with writing(job.run / "checkpoint.pt") as partial:
        partial.write_bytes(b"the first half")
        threading.Timer(0.3, print, ["running"], {{"flush": True}}).start()
        while True:
            hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})  # Python waits for it to end

recipe.teacher = teacher
from tmd_ref.distill.start import main
main()
"""
BRIEF, LONG = 100, 1_000_000_000


@pytest.mark.parametrize(("number", "rounds"), [(SIGINT, BRIEF), (SIGTERM, LONG), (SIGHUP, BRIEF)])
def test_a_stage_ends_and_leaves_nothing(tmp_path: Path, number: Signals, rounds: int) -> None:
    (tmp_path / "run").mkdir()
    stage = ["teacher", "--config", "tiny", "--run", str(tmp_path / "run"), "--threads", "1"]
    with started([sys.executable, "-c", SCRIPT.format(rounds=rounds), *stage], tmp_path) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "running\n":
            assert line, process.communicate()
        assert list(tmp_path.rglob("*.partial"))
        said = send(process, number)
    assert "stopped" in said and ("resume from the last checkpoint" in said) == (rounds == BRIEF)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("stream", ["<&-", ">&-", "2>&-", ">/dev/full"])
def test_a_broken_stream_ends_in_no_traceback(tmp_path: Path, stream: str) -> None:
    words = f"{sys.executable} -m tmd_ref.distill --help {stream}"
    with started(["sh", "-c", words], tmp_path) as process:
        output, errors = process.communicate(timeout=60)
    assert "Traceback" not in output + errors
    assert process.returncode == (1 if stream == ">/dev/full" else 0), errors
