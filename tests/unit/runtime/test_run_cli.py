"""`tmd-run` as a person types it, and as a program reads it."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.helpers.processes import PROGRAM, with_default_signals
from tests.helpers.synthetic import write_synthetic_bundle
from tmd_engines.device.gpu import has_gpu
from tmd_runtime.command.cli import command
from tmd_runtime.command.job import slug
from tmd_runtime.memory import DENOISER

PROMPT = "a red circle moving right on a black background"
KEYS = ["seed", "prompt", "steps", "inner_steps", "nfe", "frames", "width", "height", "fps", "stage_seconds"]
STAGES = ["load", "text", "noise", "backbone", "flow_head", "decode", "file"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def run(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], **options)


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def test_a_prompt_becomes_a_file_and_a_report(synthetic_bundle: Path) -> None:
    result = run("--prompt", PROMPT, "--bundle", synthetic_bundle, "--seed", 7)
    assert result.exit_code == 0, result.output
    name = "a-red-circle-moving-right-on-a-black-background-7.mp4"
    assert files() == [name]
    assert result.stdout.startswith(f"{name}: 17 frames of 64x64 at 8 fps\n")
    for part in (
        "seed 7,",
        "steps 2 x 2,",
        "NFE 3.00",
        "text ",
        "backbone ",
        "flow head ",
        "decode ",
        "file ",
        "load ",
    ):
        assert part in result.stdout
    assert result.stderr.startswith("tmd-run: this run will take ")
    assert [line.split(":")[1].strip() for line in result.stderr.splitlines()[1:]] == [
        *("text", "backbone", "flow head", "load", "decode")
    ], "without a terminal, a line for each stage"


def test_json_is_one_document_and_alone_on_stdout(synthetic_bundle: Path) -> None:
    result = run(
        "--prompt", PROMPT, "--bundle", synthetic_bundle, "--json", "--out", "v.gif", "--frames", 5, "--size", "32x48"
    )
    document = json.loads(result.stdout)
    assert list(document)[: len(KEYS)] == KEYS and document["out"] == "v.gif"
    assert (document["frames"], document["width"], document["height"], document["fps"]) == (5, 32, 48, 8)
    assert (document["prompt"], document["steps"], document["inner_steps"]) == (PROMPT, 2, 2)
    assert document["nfe"] == pytest.approx(3)
    assert list(document["stage_seconds"]) == STAGES
    assert all(seconds > 0 for seconds in document["stage_seconds"].values())
    assert document["total_seconds"] > 0
    assert "may look worse" in document["warnings"][0] and "may look worse" in result.stderr


def test_printed_seed_gives_the_same_video_again(synthetic_bundle: Path) -> None:
    first = json.loads(run("--prompt", PROMPT, "--bundle", synthetic_bundle, "--json", "--out", "a.png").stdout)
    run("--prompt", PROMPT, "--bundle", synthetic_bundle, "--seed", first["seed"], "--out", "b.png")
    run("--prompt", PROMPT, "--bundle", synthetic_bundle, "--seed", first["seed"] + 1, "--out", "c.png")
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_several_prompts_load_the_model_once(synthetic_bundle: Path) -> None:
    Path("prompts.txt").write_text(f"\ufeff{PROMPT}\n\n  a blue star  \n", encoding="utf-8")
    options = ("--bundle", synthetic_bundle, "--out", "v.gif", "--json", "--frames", 1, "--size", "16x16")
    result = run("--prompt", "first", "--prompt-file", "prompts.txt", *options)
    runs = [json.loads(line) for line in result.stdout.splitlines()]
    assert [item["prompt"] for item in runs] == ["first", PROMPT, "a blue star"]
    assert [item["out"] for item in runs] == ["v-001.gif", "v-002.gif", "v-003.gif"]
    assert all(Path(item["out"]).is_file() for item in runs)
    assert [item["stage_seconds"]["load"] > 0 for item in runs] == [True, False, False]


def test_a_prompt_file_gives_runs_even_if_it_holds_one(synthetic_bundle: Path) -> None:
    result = run("--prompt-file", "-", "--bundle", synthetic_bundle, "--json", "--out", "v.png", input=f"{PROMPT}\n")
    assert [json.loads(line)["out"] for line in result.stdout.splitlines()] == ["v.png"]


def test_prompts_that_begin_alike_have_a_file_each(synthetic_bundle: Path) -> None:
    """Without --out a file has the first words of its prompt."""
    prompts = [f"{' '.join(['word'] * 12)} {last}" for last in ("slowly", "quickly", "again")]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    result = run(*words, "--bundle", synthetic_bundle, "--seed", 3, "--frames", 5, "--json")
    names = [json.loads(line)["out"] for line in result.stdout.splitlines()]
    assert len(names) == 3 and sorted(names) == files(), result.output
    assert names[1:] == [names[0].replace("-3.mp4", f"-3-{number}.mp4") for number in (2, 3)]


def test_no_result_takes_the_name_of_the_prompts(synthetic_bundle: Path) -> None:
    Path("prompts.txt").write_text(PROMPT)
    result = run("--prompt-file", "prompts.txt", "--bundle", synthetic_bundle, "--save-latents", "prompts.txt")
    assert result.exit_code == 2 and "--prompt-file and --save-latents name the same file" in result.output
    assert Path("prompts.txt").read_text() == PROMPT


def test_quiet_says_nothing(synthetic_bundle: Path) -> None:
    result = run("--prompt", PROMPT * 20, "--bundle", synthetic_bundle, "--quiet", "--out", "v.png", "--frames", 5)
    assert (result.exit_code, result.stdout, result.stderr, files()) == (0, "", "", ["v.png"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "No prompt: give --prompt TEXT or --prompt-file FILE"),
        (["--json"], 2, "--json needs a prompt"),
        (["--prompt", " "], 2, "prompt is empty"),
        (["--prompt", "&nbsp;"], 2, "prompt is empty"),
        (["--prompt-file", "nowhere.txt"], 2, "No such file"),
        (["--prompt-file", "empty.txt"], 2, "holds no prompt: write one per line"),
        (["--prompt-file", "latin1.txt"], 2, "is not UTF-8 text"),
        (["--prompt-file", "."], 2, "Is a directory"),
        (["--prompt", "x", "--steps", "9"], 2, "does not do 9 steps: choose 1, 2, 3 or 4"),
        (["--prompt", "x", "--steps", "0"], 2, "0 is out of range: give a whole number, 1 or more"),
        (["--prompt", "x", "--inner-steps", "3"], 2, "choose 1, 2 or 4"),
        (["--prompt", "x", "--frames", "6"], 2, "such as 5 or 9"),
        (["--prompt", "x", "--size", "60x64"], 2, "such as 48 or 64"),
        (["--prompt", "x", "--size", "64"], 2, "'64' is no size: write width x height"),
        (["--prompt", "x", "--size", "64x-1"], 2, "is no size"),
        (
            ["--prompt", "x", "--seed", "-1"],
            2,
            "-1 is out of range: give a whole number, from 0 to 4294967295",
        ),
        (["--prompt", "x", "--seed", str(2**32)], 2, "which reads 32 bits of a seed"),
        (["--prompt", "x", "--schedule", "1,nan,0"], 2, "no list of times"),
        (["--prompt", "x", "--schedule", "inf,0"], 2, "no list of times"),
        (["--prompt", "x", "--guidance", "nan"], 2, "'nan' is no number"),
        (["--prompt", "x", "--rho", "inf"], 2, "'inf' is no number"),
        (["--prompt", "x", "--out", "-"], 2, "a result cannot go to stdout"),
        (["--prompt", "x", "--out", ".mp4"], 2, "an ending without a name. Write video.mp4"),
        (["--prompt", "x", "--out", "v.mp4", "--preview", "./v.mp4"], 2, "--out and --preview name the same file"),
        (["--prompt", "x", "--out", "v.mp4", "--preview", "p.gif", "--fps", "60"], 2, "a GIF of 60 frames per second"),
        (
            ["--prompt", "x", "--prompt", "y", "--out", "v.png", "--image", "./v-002.png"],
            2,
            "--out may name v-002.png for one of the prompts, which --image reads",
        ),
        (["--prompt", "x", "--out", "v.mp4", "--save-latents", "nowhere/l"], 1, "the folder nowhere does not exist"),
        (["--prompt", "x", "--seed", "1.5"], 2, "is no whole number"),
        (["--prompt", "x", "--seed", "9" * 5000], 2, "is no whole number"),
        (["--prompt", "x", "--threads", "0"], 2, "from 1 to 1024"),
        (["--prompt", "x", "--engine", "abacus"], 2, "abacus"),
        (["--prompt", "x", "--device", "gpu"], 2, "no device 'gpu'. Choose one of: auto, cpu, cuda, cuda:N"),
        (["--prompt", "x", "--device", "cuda:-1"], 2, "no device 'cuda:-1'"),
        (["--prompt", "x", "--device", "cuda:1", "--engine", "openvino"], 2, "runs on device cpu, not on cuda:1"),
        (["--prompt", "x", "--device", "cpu", "--engine", "tensorrt"], 2, "runs on device cuda, not on cpu"),
        (["--prompt", "x", "--out", "v.avi"], 2, "Choose .mp4, .webm, .gif, .png (contact sheet)"),
        (["--prompt", "x", "--out", "nowhere/v.mp4"], 1, "the folder nowhere does not exist"),
        (["--prompt", "x", "--out", "x" * 300 + ".mp4"], 1, "file name too long"),
        (["--prompt", "x", "--out", "x" * 300], 1, "file name too long"),
        (["--prompt", "x", "--prompt", "y", "--out", "."], 2, "cannot all go to .: name a file or folder"),
        (["--prompt", "x", "--out", "empty.txt/v.mp4"], 1, "cannot write"),
        (["--prompt", "x", "--bundle", "nowhere"], 1, "nowhere does not exist: a bundle is a folder"),
        (["--prompt", "x", "--bundle", "empty.txt"], 1, "empty.txt"),
        (["--prompt", "x", "--frames", "4093", "--size", "16384x16384"], 1, "not enough memory"),
        (["--colour"], 2, "No such option"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(
    synthetic_bundle: Path, arguments: list[str], code: int, message: str
) -> None:
    Path("empty.txt").write_text("\n \n")
    Path("latin1.txt").write_bytes("grün".encode("latin-1"))
    before = files()
    bundle = [] if "--bundle" in arguments else ["--bundle", str(synthetic_bundle)]
    result = run(*arguments, *bundle)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert result.stdout == "" and "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    assert files() == before


def test_a_broken_bundle_is_one_sentence(synthetic_bundle: Path) -> None:
    with open(synthetic_bundle / "backbone.onnx.data", "ab") as file:
        file.write(b"x")
    result = run("--prompt", PROMPT, "--bundle", synthetic_bundle, "--json")
    assert result.exit_code == 1 and files() == []
    message = json.loads(result.stdout)["error"]
    assert "backbone.onnx.data" in message and result.stderr == f"tmd-run: {message}\n"


def test_a_bundle_without_text_encoder_is_named(tmp_path: Path) -> None:
    bundle = write_synthetic_bundle(tmp_path / "b", (*DENOISER, "decoder_first", "decoder_step"))
    result = run("--prompt", PROMPT, "--bundle", bundle)
    assert result.exit_code == 1 and "no graph text_encoder" in result.stderr and files() == []


def test_a_bad_target_is_found_before_the_model_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("tmd_runtime.pipeline.load", never)
    assert run("--prompt", PROMPT, "--bundle", "b", "--out", "v.avi").exit_code == 2
    assert run("--prompt", PROMPT, "--bundle", "b", "--out", "nowhere/v.mp4").exit_code == 1


def test_a_failure_among_several_prompts_keeps_the_finished_runs(synthetic_bundle: Path) -> None:
    result = run(
        *(
            "--prompt",
            PROMPT,
            "--prompt",
            "&nbsp;",
            "--prompt",
            "x",
            "--bundle",
            synthetic_bundle,
            "--json",
            "--out",
            "v.png",
        )
    )
    finished, failed = map(json.loads, result.stdout.splitlines())
    assert result.exit_code == 2 and list(failed) == ["error"] and "prompt is empty" in failed["error"]
    assert finished["out"] == "v-001.png" and files() == ["v-001.png"]


@pytest.mark.parametrize("stage", ["load", "text", "backbone", "flow_head", "decode"])
def test_ctrl_c_ends_with_130_and_no_file(synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    from tmd_runtime.command import progress

    def interrupt(_: object, step: Any) -> None:
        if step.stage == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.Lines, "__call__", interrupt)
    for out in ("v.mp4", "frames"):
        result = run("--prompt", PROMPT, "--bundle", synthetic_bundle, "--out", out)
        assert (result.exit_code, files()) == (130, [])
        assert result.stderr.splitlines()[1:] == ["tmd-run: stopped."]


def start_endless(bundle: Path, *arguments: str) -> subprocess.Popen[str]:
    """`tmd-run` whose steps take long enough to be interrupted; returns when the first has begun."""
    slow = (
        "import time, tmd_runtime.clock as clock, tmd_runtime.command.start as start\n"
        "report = clock.Timings.report\n"
        "def slow(self, stage, *rest):\n"
        "    report(self, stage, *rest)\n"
        "    if stage == 'decode':\n"
        "        print('working', flush=True)\n"
        "        time.sleep(60)\n"
        "clock.Timings.report = slow\n"
        "start.main()\n"
    )
    command = [sys.executable, "-c", slow, "--prompt", PROMPT, "--bundle", str(bundle), *arguments]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, preexec_fn=with_default_signals, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_real_process_cleanly(synthetic_bundle: Path, number: signal.Signals, code: int) -> None:
    process = start_endless(synthetic_bundle, "--out", "v.mp4")
    assert [name for name in files() if name.endswith(".part")], "the file is in the making"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code and files() == []
    assert "Traceback" not in stderr


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from tmd_runtime.command import cli\n"
        "sys.argv = ['tmd-run', '--help']\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "print('MODULES', *sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    text, modules = done.stdout.split("MODULES")
    assert "--prompt" in text and "Exit codes" in text
    heavy = {
        "torch",
        "onnxruntime",
        "onnx",
        "av",
        "numpy",
        "pydantic",
        "rich",
        "sentencepiece",
        "ftfy",
        "tmd_engines.bundle",
        "openvino",
    }
    assert heavy.isdisjoint(modules.split())


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0 and result.stdout.startswith("tmd-run ")


def test_a_device_is_where_the_graphs_run(synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tmd_engines

    load: Any = tmd_engines.load
    devices: set[str] = set()

    def watched(*arguments: Any, device: str, **named: Any) -> Any:
        devices.add(device)
        return load(*arguments, device=device, **named)

    monkeypatch.setattr(tmd_engines, "load", watched, raising=False)
    command = ("--bundle", str(synthetic_bundle), "--prompt", "x", "--seed", "1", "--quiet")
    assert run(*command, "--device", "cpu", "--out", "v.png").exit_code == 0
    assert devices == {"cpu"} and files() == ["v.png"]
    if not has_gpu():
        result = run(*command, "--device", "cuda:1", "--out", "w.png")
        assert result.exit_code == 1 and files() == ["v.png"]
        assert "no engine for device cuda:1 here: tmd-engine doctor says what is missing" in result.stderr


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A Red Circle, moving right!", "a-red-circle-moving-right"),
        ("../../etc/passwd", "etc-passwd"),
        ("  ", "video"),
        ("...", "video"),
        ("一只猫 走路", "一只猫-走路"),
        ("\ud800 x", "x"),
        ("word " * 50, "-".join(["word"] * 9)),
        ("x" * 300, "x" * 48),
    ],
)
def test_slug(prompt: str, name: str) -> None:
    assert slug(prompt) == name


def in_terminal(arguments: list[str], typed: list[str | int], timeout: float = 60) -> tuple[int, str]:
    """Runs `tmd-run` on a pseudo terminal, answering each 'prompt> ' with text, or with Ctrl-C for SIGINT."""
    pid, terminal = pty.fork()
    if pid == 0:
        with_default_signals()
        os.execv(sys.executable, [*PROGRAM, *arguments])
    output, answered, waiting, interrupt_at = "", 0, list(typed), float("inf")
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            output += data.decode(errors="replace")
        if waiting and output.count("prompt> ") > answered:
            answered += 1
            answer = waiting.pop(0)
            if answer == signal.SIGINT:
                interrupt_at = time.monotonic() + 0.5
            else:
                os.write(terminal, str(answer).encode() + b"\n")
        if time.monotonic() >= interrupt_at:
            # Again after a while: one that comes while the line editor is setting up the terminal is lost.
            interrupt_at = time.monotonic() + 3
            os.write(terminal, b"\x03")
    else:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), output


def test_prompt_loop_keeps_the_model_and_survives_mistakes(synthetic_bundle: Path) -> None:
    options = ["--bundle", str(synthetic_bundle), "--seed", "1", "--frames", "5"]
    code, output = in_terminal(options, ["a red circle", "&nbsp;", "a blue star", ""])
    assert code == 0, output
    assert files() == ["a-blue-star-1.mp4", "a-red-circle-1.mp4"]
    assert output.count("seed 1") == 2 and "prompt is empty" in output
    assert output.count("(and load") == 1, "the second run is warm"


def test_ctrl_c_at_the_prompt_ends_the_loop(synthetic_bundle: Path) -> None:
    code, output = in_terminal(["--bundle", str(synthetic_bundle)], [signal.SIGINT])
    assert (code, files()) == (130, []), output
    assert "Traceback" not in output


def test_bars_are_drawn_in_a_terminal_only(synthetic_bundle: Path) -> None:
    options = ["--bundle", str(synthetic_bundle), "--prompt", PROMPT, "--out", "v.png"]
    _, output = in_terminal(options, [])
    assert "flow head" in output and "decode" in output and "4/4" in output
    _, quiet = in_terminal([*options, "--quiet"], [])
    assert quiet == ""


def test_undisplayable_names_do_not_end_a_run(synthetic_bundle: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    arguments = ["--prompt", "一只猫", "--bundle", str(synthetic_bundle), "--seed", "1", "--frames", "1"]
    done = subprocess.run([*PROGRAM, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and r"\u4e00\u53ea\u732b-1.mp4" in done.stdout and files() == ["一只猫-1.mp4"]


def test_plans_are_for_an_engine_that_takes_them(synthetic_bundle: Path, tmp_path: Path) -> None:
    words = ["--bundle", str(synthetic_bundle), "--prompt", "x", "--engine", "onnxruntime", "--plans", str(tmp_path)]
    done = CliRunner().invoke(command, [*words, "--out", str(tmp_path / "v.png")])
    assert done.exit_code == 1 and "takes no plans" in done.stderr
