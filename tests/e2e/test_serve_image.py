"""The container and the service: the Dockerfile's own commands in a fresh environment, and systemd's own check.

No Docker is needed: its instructions are read from the file and carried out in temporary folders. What is not tested
here is Docker itself, the base image and the user that it makes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.processes import with_default_signals
from tests.helpers.serving import Served

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, in order, with their lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in lines]


def test_the_image_s_instructions_are_those_that_this_test_knows_how_to_follow() -> None:
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK"}
    found = instructions()
    assert {name for name, _ in found} <= known | {"ENTRYPOINT", "CMD"}
    assert found[-2:] == [("ENTRYPOINT", '["/opt/tmd/bin/tmd-serve"]'), ("CMD", '["--host", "0.0.0.0"]')]
    assert ("USER", "10001") in found


@pytest.mark.slow
def test_the_image_s_commands_make_a_server_that_is_healthy(tmp_path: Path) -> None:
    places = {"/opt/tmd": str(tmp_path / "opt"), "/src": str(tmp_path / "src"), "/data": str(tmp_path / "data")}

    def here(text: str) -> str:
        for place, own in places.items():
            text = re.sub(rf"{place}\b", own, text)
        return text

    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    folder, commands = tmp_path, dict[str, list[str]]()
    for name, rest in instructions():
        if name == "ARG":
            environment |= dict([rest.split("=", 1)])
        elif name == "ENV":
            variables = dict(part.split("=", 1) for part in here(rest).split())
            path = variables.pop("PATH", environment["PATH"])
            environment |= {**variables, "PATH": path.replace("$PATH", environment["PATH"])}
        elif name == "WORKDIR":
            folder = Path(here(rest))
            folder.mkdir()
        elif (name, rest) == ("COPY", ". ."):
            copy_sources(folder)
        elif name == "RUN" and not rest.startswith("useradd"):
            command = here(rest).replace("chown 10001", "chown $(id -u)").replace("python3 ", f"{sys.executable} ")
            done = subprocess.run(["sh", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        elif name in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
            commands[name] = json.loads(here(rest[rest.index("[") :]))
    shutil.rmtree(places["/src"])  # the image is made from /opt/tmd alone
    entry = commands["ENTRYPOINT"]
    key = subprocess.run([*entry, "keys", "add", "laptop"], env=environment, capture_output=True, text=True, check=True)
    log = tmp_path / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*entry, *commands["CMD"], "--port", "0"],
            cwd="/",
            env=environment,
            stdout=out,
            stderr=out,
            preexec_fn=with_default_signals,
        )
    try:
        server = Served(process, log)
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        check = [part.replace("http://127.0.0.1:8000", server.url) for part in commands["HEALTHCHECK"]]
        assert subprocess.run(check, env=environment).returncode == 0
        right = {"Authorization": f"Bearer {key.stdout.strip()}"}
        video = server.ask("/v1/videos", {"prompt": "a red circle", "frames": 5}, **right)["id"]
        while (found := server.ask(f"/v1/videos/{video}", **right))["status"] in ("queued", "in_progress"):
            pass
        assert found["status"] == "completed", found
        if (ROOT / "runtime" / "tmd_serve" / "page" / "index.html").is_file():
            with urllib.request.urlopen(server.url) as page:
                assert b"<!doctype html>" in page.read().lower()
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    gpu = subprocess.run(
        [f"{places['/opt/tmd']}/bin/pip", "install", "--dry-run", "--ignore-installed", f"{ROOT}[gpu,serve]"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert gpu.returncode == 0 and "onnxruntime-gpu" in gpu.stdout.replace("_", "-"), gpu.stderr


def copy_sources(folder: Path) -> None:
    """What `COPY . .` copies: the files of the repository, without those that .dockerignore names."""
    left_out = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if "*" not in line]
    listed = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
        if not any(name == place or name.startswith(f"{place}/") for place in left_out) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def test_systemd_takes_the_service(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / "tmd-serve"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "tmd-serve.service"
    unit.write_text((DEPLOY / "tmd-serve.service").read_text().replace("/opt/tmd/bin/tmd-serve", str(program)))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
