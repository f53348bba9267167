"""`tmd-serve` on the command line: what it takes, and what it says of what it does not."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from tests.helpers.serving import SERVE
from tmd_serve.command.cli import command
from tmd_serve.command.options import Amount, Named
from tmd_serve.command.serve import is_loopback


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """The command sets the log of the whole process up."""
    root, own = logging.getLogger(), logging.getLogger("tmd_serve")
    before = root.handlers[:], root.level, own.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    own.setLevel(before[2])


def serve(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


@pytest.mark.parametrize(
    ("text", "name", "place"),
    [
        ("wan=/models/wan 2", "wan", "/models/wan 2"),
        ("/models/wan/", "wan", "/models/wan/"),
        ("builtin:tim-tiny", "tim-tiny", "builtin:tim-tiny"),
        ("a=b=c", "a", "b=c"),
        ("./x", "x", "./x"),
    ],
)
def test_a_bundle_has_the_name_that_it_is_given_or_its_folder_s(text: str, name: str, place: str) -> None:
    assert Named().convert(text, None, None) == (name, place)


def test_names_and_amounts_that_cannot_be_are_refused() -> None:
    for text in ("", "wan=", "/models/a b", "/", "x\0"):
        with pytest.raises(click.BadParameter):
            Named().convert(text, None, None)
    assert [Amount().convert(text, None, None) for text in ("1", "20M", "3gb")] == [1, 20_000_000, 3_000_000_000]
    for text in ("0", "", "-1", "1.5G", "9" * 30, "x"):
        with pytest.raises(click.BadParameter):
            Amount().convert(text, None, None)


def test_only_addresses_of_this_machine_are_open_without_a_key() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.1", "example.org", "", "127.0.0.1.example.org")))


def test_what_cannot_be_served_is_a_sentence_and_an_exit_code(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            ("--bundle", "builtin:none", *data): (2, "choose one of"),
            ("--bundle", str(tmp_path / "nothing"), *data): (1, "nothing"),
            ("--bundle", "builtin:tiny", "--bundle", "tiny=builtin:tim-tiny", *data): (2, "two bundles have one name"),
            ("--host", "0.0.0.0", *data): (2, "needs an API key"),
            ("--database", "mysql://x", *data): (2, "postgresql://"),
            ("--port", port, *data): (1, "choose another --port"),
            ("--data", "/proc/nothing/here"): (1, "data folder"),
            ("--max-size", "0x0", *data): (2, "at least one pixel"),
            ("--allow-host", "http://name", *data): (2, "leave http://"),
            ("--allow-host", "name:8000", *data): (2, "the port"),
            ("--allow-origin", "example.org", *data): (2, "is not an origin"),
            ("--allow-origin", "https://example.org/page", *data): (2, "is not an origin"),
            ("keys", "remove", "none", *data): (2, "there is no key"),
            ("keys", "add", "", *data): (2, "1 to 200"),
        }
        for arguments, (code, words) in cases.items():
            done = serve(*arguments)
            assert (done.exit_code, words in done.output) == (code, True), (arguments, done.output)
            assert "Traceback" not in done.output


def test_a_key_that_could_not_be_shown_is_not_kept(tmp_path: Path) -> None:
    add = [*SERVE, "keys", "add", "laptop", "--data", str(tmp_path)]
    with open("/dev/full", "w") as full:
        assert subprocess.run(add, stdout=full, stderr=subprocess.DEVNULL).returncode == 1
    assert subprocess.run(add, capture_output=True, text=True, check=True).stdout.startswith("tmd-")


def test_a_damaged_data_folder_is_a_sentence_that_names_what_is_wrong(tmp_path: Path) -> None:
    for name in ("lock", "jobs.sqlite3"):
        (tmp_path / name / name).mkdir(parents=True)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "videos").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "jobs.sqlite3").write_bytes(b"not a database" * 100)
    for folder, code in (("lock", 1), ("videos", 1), ("jobs.sqlite3", 2), ("damaged", 2)):
        done = serve("--data", str(tmp_path / folder))
        assert done.exit_code == code, done.output
        assert str(tmp_path / folder) in done.output or "does not answer" in done.output, done.output
        assert done.output.endswith(".\n") and "Errno" not in done.output and "sqlite3.Database" not in done.output
    sentence = serve("--data", str(tmp_path / "damaged")).output
    assert "cannot be used (file is not a database): bring a backup" in sentence


def test_an_installation_without_the_server_s_packages_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "uvicorn" or name == "tmd_serve.command.serve"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = serve("--data", str(tmp_path))
    assert done.exit_code == 1 and "pip install '.[serve]' in tmd's checkout" in done.output
