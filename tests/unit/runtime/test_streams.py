"""stdin, stdout and stderr that are closed, full or gone, and what reaches a screen."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import tmd_runtime
from tests.helpers.bundle_tools import edit_graph, impossible_transpose
from tests.helpers.processes import PROGRAM
from tmd_engines.command.screen import clean
from tmd_runtime import UsageFailure
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


@pytest.mark.parametrize("option", ["--prompt", "--negative-prompt"])
def test_prompts_that_are_not_utf_8_are_refused(tmp_path: Path, option: str) -> None:
    more = [] if option == "--prompt" else ["--prompt", "x", "--guidance", "2", "--bundle", "builtin:tim-tiny"]
    command = [*PROGRAM, option, os.fsdecode(b"a caf\xe9"), "--out", "v.png", "--frames", "1", "--json", *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "prompt holds bytes that are not UTF-8" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["\udce9", "x\ud800y"])
def test_a_pipeline_refuses_texts_that_are_not_unicode(text: str) -> None:
    with tmd_runtime.load() as pipeline:
        for arguments in ({"prompt": text}, {"prompt": "x", "negative_prompt": text, "guidance": 2.0}):
            with pytest.raises(UsageFailure, match="prompt holds bytes that are not UTF-8"):
                pipeline(**arguments)


def test_json_holds_no_lone_surrogate(tmp_path: Path) -> None:
    """Whatever names have; no other program could read it."""
    name = os.fsdecode(b"caf\xe9.png")
    for arguments in (SMALL.replace("v.png", ""), "--prompt x --bundle nowhere --out"):
        command = [*PROGRAM, *arguments.split(), name, "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        document = json.loads(done.stdout)
        json.dumps(document, ensure_ascii=False).encode()
    assert (tmp_path / name).exists()
    missing = [sys.executable, "-m", "tmd_runtime", "--prompt", "x", "--bundle", name, "--json", "--out", "w.png"]
    done = subprocess.run(missing, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    json.loads(done.stdout)["error"].encode()
    assert "caf\\udce9.png" in json.loads(done.stdout)["error"]


def test_every_command_writes_json_through_one_door() -> None:
    """`json_text` keeps NaN and lone surrogates out; what is for ourselves alone may use json.dumps."""
    ours = {"plan_cache.py", "cache_folder.py",
            "writer.py", "folder.py", "build.py", "graph_export.py", "tensor_files.py",
            "utf8.py", "calibration.py", "inspection.py", "headers.py",
            "transformer_file.py"}  # fmt: skip
    root = Path(__file__).parents[3]
    for part in ("engines/tmd_engines", "runtime/tmd_runtime", "export/tmd_export"):
        for file in (root / part).rglob("*.py"):
            assert file.name in ours or "json.dumps(" not in file.read_text(), file


def test_a_duration_is_told_only_where_there_is_an_engine(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['onnxruntime'] = sys.modules['openvino'] = None\n"
        "from tmd_runtime.command.start import main\n"
        "main()\n"
    )
    for engine in ("auto", "onnxruntime", "openvino"):
        arguments = [*SMALL.split(), "--engine", engine]
        done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and "this run will take" not in done.stderr, done.stderr


@pytest.mark.parametrize("size", ["100000000x16", "16x65537", f"{'9' * 5000}x1"])
def test_a_size_that_is_too_large_says_the_limit(size: str) -> None:
    result = CliRunner().invoke(command, ["--prompt", "x", "--size", size])
    assert (
        result.exit_code == 2 and "at most 65536 pixels a side" in result.stderr and "is no size" not in result.stderr
    )


def test_onnx_runtime_writes_nothing_before_our_error(tmp_path: Path, synthetic_bundle: Path) -> None:
    edit_graph(synthetic_bundle, impossible_transpose)
    bundle = ["--bundle", str(synthetic_bundle), "--memory", "all"]  # otherwise it is sized, and refused, before
    arguments = ["--prompt", "x", *bundle, "--engine", "onnxruntime", "--out", "v.png"]
    done = subprocess.run([*PROGRAM, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot load" in done.stderr
    assert "\x1b" not in done.stderr and all(line.startswith("tmd-run: ") for line in done.stderr.splitlines())
