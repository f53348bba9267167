"""Tab in bash, zsh and fish completes every command of ours: options, choices, built-in bundles, presets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "tmd-run": "tmd_runtime.command.start",
    "tmd-engine": "tmd_engines.command.start",
    "tmd-export": "tmd_export.start",
    "tmd-distill": "tmd_ref.distill.start",
    "tmd-bench": "tmd_bench.start",
    "tmd-serve": "tmd_serve.start",
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which each program is a file on the PATH, as pip leaves it."""
    folder = tmp_path_factory.mktemp("bin")
    for name, module in PROGRAMS.items():
        (folder / name).write_text(f"#!{sys.executable}\nfrom {module} import main\nmain()\n")
        (folder / name).chmod(0o755)
    parts = os.pathsep.join(str(ROOT / part) for part in ("", "export", "engines", "runtime"))
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": parts}


def variable(program: str) -> str:
    return f"_{program}_COMPLETE".replace("-", "_").upper()


def shell(name: str, script: str, environment: dict[str, str], folder: Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    options = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}[name]
    home = {**environment, "HOME": str(folder)}
    done = subprocess.run([name, *options, "-c", script], capture_output=True, text=True, env=home, cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def bash(line: str, environment: dict[str, str], folder: Path) -> list[str]:
    """What bash would offer at the end of a line, whose words it splits at `:` and `=` too."""
    program = line.split()[0]
    script = f"""
compopt() {{ :; }}
eval "$({variable(program)}=bash_source {program})"
COMP_LINE={line!r} COMP_POINT={len(line)}
read -ra COMP_WORDS <<< "${{COMP_LINE//[:=]/ & }}"
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_{program.replace("-", "_")}_completion {program}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    return shell("bash", script, environment, folder).split()


def zsh(line: str, environment: dict[str, str], folder: Path) -> list[str]:
    """The same for zsh, whose own completion system needs a terminal: what the script hands to it."""
    program = line.split()[0]
    script = f"""
compdef() {{ }}
_path_files() {{ print -r -- FILES$1 }}
compadd() {{ print -rl -- $completions }}
_describe() {{ print -rl -- ${{completions_with_descriptions%%:*}} }}
eval "$({variable(program)}=zsh_source {program})"
words=(${{(z)1-}} {line}) ; [[ {line!r} == *' ' ]] && words+=("")
CURRENT=$#words
_{program.replace("-", "_")}_completion
"""
    return shell("zsh", script, environment, folder).split()


def fish(line: str, environment: dict[str, str], folder: Path) -> list[str]:
    program = line.split()[0]
    script = f"{variable(program)}=fish_source {program} | source; complete --do-complete {line!r}"
    return [found.split("\t")[0] for found in shell("fish", script, environment, folder).splitlines()]


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}
LINES = {
    "tmd-run --save-e": {"--save-embeds"},
    "tmd-run --engine open": {"openvino"},
    "tmd-run --device c": {"cpu", "cuda"},
    "tmd-run --bundle b": {"builtin:tiny", "builtin:tim-tiny"},
    "tmd-engine ver": {"verify"},
    "tmd-engine inspect b": {"builtin:tiny", "builtin:tim-tiny"},
    "tmd-export --preset fastwan2": {"fastwan2.2"},
    "tmd-export --parts backbone,flow": {"backbone,flow_head"},
    "tmd-distill stage1 --config tim-tiny-": {"tim-tiny-flow", "tim-tiny-meanflow"},
    "tmd-distill tiny tea": {"teacher"},
    "tmd-bench --compare torch,diff": {"torch,diffusers"},
    "tmd-serve keys re": {"remove"},
}


FEW = ("tmd-run --save-e", "tmd-run --bundle b", "tmd-export --parts backbone,flow", "tmd-distill tiny tea")
"""What the shells do differently."""


@pytest.mark.parametrize(
    ("name", "line"), [("bash", line) for line in LINES] + [(name, line) for name in ("zsh", "fish") for line in FEW]
)
def test_a_shell_offers_what_fits(name: str, line: str, programs: dict[str, str], tmp_path: Path) -> None:
    assert {word for word in SHELLS[name](line, programs, tmp_path) if "FILES" not in word} == LINES[line]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("tmd-run --bundle builtin:ti", {"tiny", "tim-tiny"}),  # bash replaces what is behind the colon or sign
        ("tmd-run --bundle=builtin:tin", {"tiny"}),
        ("tmd-run --engine=open", {"openvino"}),
        ("tmd-run --prompt 'a red circle: small' --engine open", {"openvino"}),
        ("tmd-export --precision bf16,decoder_step=fp3", {"fp32"}),
        ("tmd-serve --bundle mine=built", {"builtin:tiny", "builtin:tim-tiny"}),
    ],
)
def test_bash_keeps_words_with_a_colon_or_sign_together(
    line: str, wanted: set[str], programs: dict[str, str], tmp_path: Path
) -> None:
    assert set(bash(line, programs, tmp_path)) == wanted


def test_a_tab_in_a_real_terminal_completes_the_name_of_a_bundle(programs: dict[str, str], tmp_path: Path) -> None:
    """The whole of it, with readline: typed to an interactive bash, which then runs what stands there."""
    import pty
    import select

    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    (tmp_path / "bundles").mkdir()
    controller, terminal = pty.openpty()
    environment = {**programs, "HOME": str(tmp_path), "PS1": "> ", "TERM": "dumb"}
    words = ["bash", "--norc", "--noprofile", "-i"]
    with subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, cwd=tmp_path, start_new_session=True
    ) as process:
        os.close(terminal)

        def answer(text: str, until: str) -> str:
            os.write(controller, text.encode())
            seen, end = "", perf_counter() + 20
            while until not in seen:
                assert perf_counter() < end and select.select([controller], [], [], 20)[0], seen
                seen += os.read(controller, 4096).decode()
            return seen

        try:
            answer('eval "$(_TMD_ENGINE_COMPLETE=bash_source tmd-engine)"; echo rea""dy\n', "ready")
            answer("tmd-engine insp\t", "inspect ")
            answer("builtin:tin\t", "builtin:tiny ")
            assert "64x64 pixels" in answer("| grep pixels; echo do''ne\n", "done")
            answer("tmd-engine inspect bundl\t", "bundles/")
        finally:
            os.write(controller, b"\x15exit\n")
            process.wait(10)
    os.close(controller)


@pytest.mark.parametrize("program", PROGRAMS)
def test_completion_loads_nothing_heavy(program: str, programs: dict[str, str], tmp_path: Path) -> None:
    asked = {"COMP_WORDS": f"{program} --", "COMP_CWORD": "1", variable(program): "bash_complete"}
    words = [sys.executable, "-X", "importtime", shutil.which(program, path=programs["PATH"]) or program]
    done = subprocess.run(words, capture_output=True, text=True, env={**programs, **asked}, cwd=tmp_path)
    assert done.returncode == 0 and "plain,--help" in done.stdout, done.stderr
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "onnx", "onnxruntime", "openvino", "tensorrt", "av", "numpy"}
    assert len(done.stderr.splitlines()) < 500  # modules, of which a person waits for every one


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_the_readme_names_the_line_that_turns_it_on(name: str) -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    for program in PROGRAMS:
        assert program in text
    assert f"{name}_source" in text
