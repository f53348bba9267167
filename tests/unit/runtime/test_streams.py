"""stdin, stdout and stderr that are closed, full or gone, and what reaches a screen."""

from __future__ import annotations

import json
import struct
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.helpers.processes import PROGRAM
from tmd_engines.command.screen import clean
from tmd_runtime.command.cli import command
from tmd_runtime.command.prompts import MAX_BYTES, MAX_CHARACTERS, MAX_PROMPTS

SMALL = "--prompt x --seed 1 --frames 1 --size 32x32 --out v.png"


def shell(folder: Path, redirection: str, arguments: str = SMALL) -> subprocess.CompletedProcess[str]:
    line = f"{' '.join(PROGRAM)} {arguments} {redirection}"
    return subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    assert shell(folder, "").returncode == 0
    return (folder / "v.png").read_bytes()


@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        ("<&-", 0),
        (">&-", 0),
        ("2>&-", 0),
        ("<&- >&- 2>&-", 0),
        ("2>/dev/full", 0),
        (">/dev/full", 1),
        (">/dev/full 2>/dev/full", 1),
        ("--json >/dev/full", 1),
        ("--json 2>/dev/full", 0),
        ("| true; exit ${PIPESTATUS[0]}", 1),
        ("2> >(exec true)", 0),
    ],
)
def test_a_broken_stream_spoils_no_file_and_prints_no_traceback(
    tmp_path: Path, picture: bytes, redirection: str, code: int
) -> None:
    done = shell(tmp_path, redirection)
    assert "Traceback" not in done.stderr + done.stdout and "Exception ignored" not in done.stderr
    assert done.returncode == code
    assert (tmp_path / "v.png").read_bytes() == picture, "what libraries print does not go into it"
    assert [path.name for path in tmp_path.iterdir()] == ["v.png"]


@pytest.mark.parametrize("arguments", ["--help", "--version", "--steps", "--prompt-file -", ""])
@pytest.mark.parametrize("redirection", [">/dev/full", "2>/dev/full", "<&-", "<&- >&- 2>&-"])
def test_bad_usage_and_help_survive_broken_streams(tmp_path: Path, arguments: str, redirection: str) -> None:
    done = shell(tmp_path, redirection, arguments)
    assert "Traceback" not in done.stderr + done.stdout and done.returncode in (0, 1, 2)


def test_runs_are_printed_as_they_finish(tmp_path: Path) -> None:
    arguments = [*SMALL.replace("--prompt x", "--prompt a --prompt b --prompt &nbsp;").split(), "--json", "--quiet"]
    process = subprocess.Popen(
        [*PROGRAM, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    output, _ = process.communicate(timeout=60)
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line.get("prompt") for line in lines] == ["a", "b", None] and "error" in lines[2]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;OWNED\x07", r"\x1b]0;OWNED\x07"),
        ("a\rb\x9b2J\x7f", r"a\rb\x9b2J\x7f"),
        ("safe \u202e txt.exe", r"safe \u202e txt.exe"),
        ("one\u2028two", r"one\u2028two"),
        ("一只猫 grün\n", "一只猫 grün\n"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_controls_a_terminal_is_shown_as_escapes(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_a_long_text_is_cut() -> None:
    assert len(clean("x" * 200_000)) < 2100 and "(200000 characters)" in clean("x" * 200_000)


def write_tensors(path: Path, metadata: dict[str, str], name: str, shape: list[int]) -> None:
    size = 4
    for side in shape:
        size *= side
    header = {"__metadata__": metadata, name: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    line = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(line)) + line + bytes(size))


LATENTS = {
    "format": "tmd-latents-1", "model": "m", "prompt": "p", "seed": "1", "steps": "2", "inner_steps": "2",
    "nfe": "1.0", "rule": "euler", "guidance": "1.0", "width": "32", "height": "32",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "-" + "9" * 4000}, "seed has 4001 characters"),
        ({"seed": "-1"}, "seed is '-1', and must be a whole number"),
        ({"seed": "١"}, "seed is"),
        ({"steps": "1_0"}, "steps is '1_0'"),
        ({"nfe": "nan"}, "nfe is 'nan', and must be a finite number"),
        ({"nfe": "1e999"}, "nfe is"),
        ({"guidance": "Infinity"}, "guidance is"),
        ({"prompt": "x" * 200_000}, "prompt has 200000 characters"),
        ({"rule": "\x1b[2J" * 1000}, "rule has 4000 characters"),
    ],
)
def test_what_a_file_says_of_itself_is_checked(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    write_tensors(tmp_path / "l", {**LATENTS, **changes}, "latents", [16, 1, 4, 4])
    result = CliRunner().invoke(command, ["--latents", str(tmp_path / "l"), "--out", str(tmp_path / "v.png")])
    assert result.exit_code == 1 and message in result.stderr and "\x1b" not in result.output
    assert len(result.output) < 3000


def test_escapes_from_files_never_reach_the_screen(tmp_path: Path) -> None:
    evil = "\x1b[31m\x1b]0;OWNED\x07"
    write_tensors(tmp_path / "l", {**LATENTS, "model": evil, "prompt": evil, "rule": evil}, "latents", [16, 1, 4, 4])
    write_tensors(tmp_path / "e", {"format": "tmd-embeds-1", "encoder": evil}, "prompt_embeds", [4, 64])
    write_tensors(tmp_path / "n", {**LATENTS, "format": evil}, evil, [16, 1, 4, 4])
    for option, name in (("--latents", "l"), ("--embeds", "e"), ("--latents", "n")):
        for more in ([], ["--json"]):
            options = [option, str(tmp_path / name), "--out", str(tmp_path / "v.png"), *more]
            result = CliRunner().invoke(command, options)
            assert "\x1b" not in result.output and "\x07" not in result.output
            assert isinstance(result.exception, SystemExit | None)


def prompts(path: Path, content: bytes) -> Any:
    path.write_bytes(content)
    return CliRunner().invoke(command, ["--prompt-file", str(path), "--bundle", str(path.parent / "nowhere")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * (MAX_BYTES + 1), "is larger than 4 MiB"),
        (b"x" * (MAX_CHARACTERS + 1), f"has a line of {MAX_CHARACTERS + 1} characters"),
        (b"x\n" * (MAX_PROMPTS + 1), f"holds {MAX_PROMPTS + 1} prompts"),
        (b"# one\n#two\n\n", "holds no prompt"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_prompt_files_are_read_in_bounds(tmp_path: Path, content: bytes, message: str) -> None:
    result = prompts(tmp_path / "p", content)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def test_an_endless_prompt_file_takes_little_memory() -> None:
    tracemalloc.start()
    result = CliRunner().invoke(command, ["--prompt-file", "/dev/zero"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.exit_code == 2 and "is larger than 4 MiB" in " ".join(result.stderr.split()) and peak < 64 << 20


def test_prompts_end_at_newlines_only_and_comments_are_left_out(tmp_path: Path) -> None:
    from tmd_runtime.command.prompts import read_prompts

    lines = "# a comment\r\na\u2028b\r\n  c\fd\x1ee\u0085f\n a # b\n"
    (tmp_path / "p").write_text(lines, encoding="utf-8", newline="")
    with open(tmp_path / "p", "rb") as file:
        assert read_prompts((), file) == ["a\u2028b", "c\fd\x1ee\u0085f", "a # b"]
