"""Checkpoints by their name on the hub: through the real `huggingface_hub`, from a server on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner, Result
from filelock import FileLock

from tests.helpers import expert_files, lora_files
from tests.helpers import synthetic_checkpoints as made
from tests.helpers.checkpoint_files import refusal, saved, small
from tests.helpers.hub_server import Hub, commit_of
from tmd_export import ExportError, LoraFile, Source, WithLoras, export
from tmd_export.checkpoints.experts import experts_of
from tmd_export.checkpoints.hub_cache import inside_cache
from tmd_export.cli import command
from tmd_export.hub.name import HubName, parse_hub_name
from tmd_export.hub.places import local_checkpoints, local_loras
from tmd_export.hub.repository import silent
from tmd_export.loras import parse_lora
from tmd_export.parts import TWO_TRANSFORMERS, VIDEO_PARTS
from tmd_export.sources.experts import TwoTransformers
from tmd_export.sources.source import built_in_folder
from tmd_export.sources.wan import WanSource
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.vae import WanVAE

OFFICIAL, DIFFUSERS, MANY = "Wan-AI/Wan2.1-T2V", "Wan-AI/Wan2.1-T2V-Diffusers", "Comfy-Org/Repackaged"
SMALL: dict[str, Any] = {"text_encoder": made.TEXT, "vae": made.VAE}
EXTRA = ("README.md", "assets/logo.png", "examples/clip.mp4", "LICENSE.txt", ".gitattributes")


@pytest.fixture(scope="module")
def _repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    repos = {OFFICIAL: made.write_original(root / "official"), DIFFUSERS: made.write_diffusers(root / "diffusers")}
    transformer = made.models().state("transformer")
    for name in ("wan_fp16", "wan_other"):
        saved_in(root / "many" / "split_files" / f"{name}.safetensors", transformer)
    saved_in(root / "many" / "loras" / "four_steps.safetensors", lora_files.random_lora().tensors())
    repos[MANY] = root / "many"
    for folder in repos.values():
        for name in EXTRA:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"not needed")
    return repos


def saved_in(path: Path, state: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return saved(path, state)


@pytest.fixture
def hub(_repos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Served, and the only hub that this process knows; the cache is new."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Hub(**_repos).serving() as hub:
        own = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
        }
        for name, value in own.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def local(*names: str | Path, parts: tuple[str, ...] | None = None) -> tuple[Path, ...]:
    return local_checkpoints([Path(name) for name in names], parts, lambda _: None)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# Names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf:a/b", HubName("a/b")),
        ("hf://a/b", HubName("a/b")),
        ("hf:a/b@v1.0", HubName("a/b", "v1.0")),
        ("hf:a/b@refs/pr/7", HubName("a/b", "refs/pr/7")),
        ("hf:a/b@feature%2Fx/c/d.gguf", HubName("a/b", "feature/x", "c/d.gguf")),
        ("hf:a/b/c d/e@2.pth", HubName("a/b", None, "c d/e@2.pth")),
    ],
)
def test_a_name_is_read(text: str, name: HubName) -> None:
    assert parse_hub_name(Path(text)) == name


@pytest.mark.parametrize(
    "text", ["hf:", "hf:a", "hf:../b", "hf:a/..", "hf:a/b/../c", "hf:a/b@", "hf:a/b/c\\d", "hf:a/b/\n"]
)
def test_what_is_no_name_says_what_one_is(text: str) -> None:
    assert "write hf:ORG/NAME" in refusal(lambda: parse_hub_name(Path(text)))


# Folders


def test_of_an_official_repository_what_is_needed_is_downloaded(hub: Hub) -> None:
    said: list[str] = []
    (folder,) = local_checkpoints([Path(f"hf:{OFFICIAL}")], None, said.append)
    needed = names_in(hub.repos[OFFICIAL]) - set(EXTRA) - {"google/umt5-xxl/tokenizer.json"}
    assert names_in(folder) == needed and set(hub.downloads()) == needed
    size = sum((hub.repos[OFFICIAL] / name).stat().st_size for name in needed)
    assert len(said) == 1 and f"{len(needed)} files" in said[0] and f"{size / 1e6:.1f} MB to download" in said[0]
    source = small(folder)
    assert source.default_parts == VIDEO_PARTS
    assert source.origin == f"checkpoint hf:{OFFICIAL}@{commit_of(OFFICIAL)}"
    hashes = source.sha256(("backbone",))
    assert list(hashes) == [f"hf:{OFFICIAL}@{commit_of(OFFICIAL)}/diffusion_pytorch_model.safetensors"]


def test_of_a_repository_of_diffusers_the_shards_and_the_scheduler(hub: Hub) -> None:
    (folder,) = local(f"hf:{DIFFUSERS}")
    here, there = names_in(folder), names_in(hub.repos[DIFFUSERS])
    assert here < there and not here & set(EXTRA) and "scheduler/scheduler_config.json" in here
    assert {name for name in there if name.endswith(".safetensors")} < here
    assert small(folder).default_parts == VIDEO_PARTS


def test_of_both_layouts_in_one_repository_one_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    folder = shutil.copytree(hub.repos[DIFFUSERS], tmp_path / "both")
    for file in ("diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        shutil.copy(hub.repos[OFFICIAL] / file, folder)
    hub.repos["some/both"] = folder
    (place,) = local("hf:some/both")
    assert not any(name.count("/") == 0 and name.endswith((".safetensors", ".pth")) for name in hub.downloads())
    assert small(place).default_parts == VIDEO_PARTS


def test_quiet_is_quiet(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    local_checkpoints([Path(f"hf:{OFFICIAL}")], None, silent)
    assert capfd.readouterr() == ("", "")


def test_only_the_parts_that_are_exported_are_downloaded(hub: Hub) -> None:
    local(f"hf:{OFFICIAL}", parts=("backbone", "flow_head"))
    assert set(hub.downloads()) == {"diffusion_pytorch_model.safetensors", "config.json"}


def test_what_a_file_of_its_own_has_is_not_downloaded(hub: Hub) -> None:
    file = f"hf:{MANY}/split_files/wan_fp16.safetensors"
    paths = local(f"hf:{OFFICIAL}", file)
    assert "diffusion_pytorch_model.safetensors" not in hub.downloads()
    source = small(*paths)
    assert source.default_parts == VIDEO_PARTS
    assert source.origin.endswith(f"hf:{MANY}@{commit_of(MANY)}/split_files/wan_fp16.safetensors")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_both_experts_of_an_a14b_are_downloaded(layout: str, hub: Hub, tmp_path: Path) -> None:
    write = expert_files.write_original if layout == "original" else expert_files.write_diffusers
    hub.repos["Wan-AI/A14B"] = write(tmp_path / "A14B")
    (folder,) = local("hf:Wan-AI/A14B")
    experts = experts_of([folder])
    assert experts is not None
    source = TwoTransformers(experts, "small", **made.SIZES)
    source.check(TWO_TRANSFORMERS)
    assert source.origin == f"checkpoint hf:Wan-AI/A14B@{commit_of('Wan-AI/A14B')}"
    assert source.default_parts == TWO_TRANSFORMERS
    hub.repos["some/low"] = tmp_path / "low"
    saved_in(tmp_path / "low" / "low_noise.safetensors", expert_files.low())
    shutil.rmtree(tmp_path / "cache")
    hub.asked.clear()
    local("hf:Wan-AI/A14B", "hf:some/low/low_noise.safetensors")
    got = hub.downloads()
    assert any("high" in name or name.startswith("transformer/") for name in got)
    assert not any(
        name.endswith("1.safetensors") and name.startswith(("low_noise_model", "transformer_2")) for name in got
    )


def test_a_second_time_nothing_is_downloaded(hub: Hub) -> None:
    first = local(f"hf:{OFFICIAL}")
    hub.asked.clear()
    said: list[str] = []
    assert local_checkpoints([Path(f"hf:{OFFICIAL}@{commit_of(OFFICIAL)}")], None, said.append) == first
    assert not hub.asked and not said


def test_a_repository_that_holds_more_than_is_used_is_refused_before_it_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    """As Wan2.2-A14B in its own layout: half of it would pass for a whole."""
    folder = shutil.copytree(hub.repos[OFFICIAL], tmp_path / "experts")
    (folder / "other_model").mkdir()
    shutil.move(folder / "diffusion_pytorch_model.safetensors", folder / "other_model")
    hub.repos["Wan-AI/More"] = folder
    said = refusal(lambda: local("hf:Wan-AI/More"))
    assert f"hf:Wan-AI/More@{commit_of('Wan-AI/More')} holds other_model" in said and "tmd-hub" not in said
    assert not hub.downloads()


def test_a_repository_of_many_models_lists_its_files(hub: Hub) -> None:
    said = refusal(lambda: local(f"hf:{MANY}"))
    assert f"as in hf:{MANY}/" in said and "split_files/wan_other.safetensors" in said
    assert "has no file split_files/wan_fp8" in refusal(lambda: local(f"hf:{MANY}/split_files/wan_fp8.safetensors"))


# Interrupted, offline, and what can go wrong


def test_a_broken_connection_goes_on_where_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.breaks["diffusion_pytorch_model.safetensors"] = 100_000
    (folder,) = local(f"hf:{OFFICIAL}")
    name = "diffusion_pytorch_model.safetensors"
    assert (folder / name).read_bytes() == (hub.repos[OFFICIAL] / name).read_bytes()
    ranges = [span for method, path, span in hub.asked if method == "GET" and path.endswith(name)]
    assert ranges == [None, "bytes=100000-"]


def test_a_download_that_failed_goes_on_with_what_is_missing(hub: Hub) -> None:
    hub.refuses.add("Wan2.1_VAE.pth")
    assert "start again, what is complete stays" in refusal(lambda: local(f"hf:{OFFICIAL}"))
    done = set(hub.downloads()) - {"Wan2.1_VAE.pth"}
    hub.refuses.clear()
    hub.asked.clear()
    (folder,) = local(f"hf:{OFFICIAL}")
    assert "Wan2.1_VAE.pth" in hub.downloads() and not done & set(hub.downloads())
    assert small(folder).default_parts == VIDEO_PARTS


def test_an_index_of_what_was_left_out_is_no_broken_download(hub: Hub, tmp_path: Path) -> None:
    """Indexes come with every repository, and say what it holds; their shards only where they are needed."""
    paths = local(saved_in(tmp_path / "rcm.safetensors", made.models().state("transformer")), f"hf:{DIFFUSERS}")
    transformer = paths[1] / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert transformer.is_file() and not list(transformer.parent.glob("*.safetensors"))
    assert small(*paths).default_parts == VIDEO_PARTS
    shutil.rmtree(paths[1].parents[2])
    (folder,) = local(f"hf:{DIFFUSERS}", parts=("backbone", "flow_head"))
    assert (folder / "text_encoder" / "model.safetensors.index.json").is_file()
    source = small(folder)
    source.check(("backbone", "flow_head"))
    assert "the download is incomplete" in refusal(lambda: source.check(("text_encoder",)))


def test_what_a_killed_download_left_is_removed_by_the_next(hub: Hub) -> None:
    (folder,) = local(f"hf:{OFFICIAL}", parts=("backbone",))
    root = folder.parents[1]
    left, locked = (root / "blobs" / f"{digit * 64}.0123abcd.incomplete" for digit in "ab")
    for path in (left, locked):
        path.write_bytes(b"half")
    with FileLock(root.parent / ".locks" / root.name / f"{'b' * 64}.lock"):
        local(f"hf:{OFFICIAL}")
    assert not left.exists() and locked.exists(), "what somebody downloads now is locked"


def test_offline_the_cache_serves_what_is_complete(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = local(f"hf:{OFFICIAL}")
    local(f"hf:{DIFFUSERS}", parts=("backbone",))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert local(f"hf:{OFFICIAL}") == online
    for name in (DIFFUSERS, MANY):
        assert "HF_HUB_OFFLINE is set" in refusal(lambda name=name: local(f"hf:{name}"))  # type: ignore[misc]


def test_offline_a_cache_of_an_older_library_serves_what_is_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a one has no list of all files of the repository."""
    (folder,) = online = local(f"hf:{OFFICIAL}")
    shutil.rmtree(folder.parents[1] / "trees")
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert local(f"hf:{OFFICIAL}") == online


def test_a_disk_that_is_too_small_is_said_before(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "1.0 kB are free" in refusal(lambda: local(f"hf:{OFFICIAL}")) and not hub.downloads()


def test_what_the_hub_does_not_give_is_said_in_a_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"there is no {hub.url}/no/such, or it is private" in refusal(lambda: local("hf:no/such"))
    assert "no revision 'v9'" in refusal(lambda: local(f"hf:{OFFICIAL}@v9"))
    hub.gated.add(OFFICIAL)
    assert f"agree to its terms at {hub.url}/{OFFICIAL}" in refusal(lambda: local(f"hf:{OFFICIAL}"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    local(f"hf:{OFFICIAL}", parts=("backbone",))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refusal(lambda: local(f"hf:{DIFFUSERS}"))


def test_names_that_lead_out_of_a_repository_are_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = huggingface_hub.hf_api.RepoFile(path="../evil.safetensors", size=1, oid="0")
    monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", lambda *_, **__: [entry])
    assert "leads out of it" in refusal(lambda: local(f"hf:{OFFICIAL}"))


def test_without_the_library_one_command_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install '.[hub]' in tmd's checkout" in refusal(lambda: local(f"hf:{OFFICIAL}"))


# LoRAs and the cache


def test_a_lora_of_the_hub_is_merged_and_named_with_its_commit(hub: Hub) -> None:
    given = parse_lora(f"hf:{MANY}/loras/four_steps.safetensors=0.5")
    loras = local_loras([given], lambda _: None)
    assert hub.downloads() == ["loras/four_steps.safetensors"]
    (entry,) = WithLoras(small(*local(f"hf:{OFFICIAL}", parts=("backbone",))), loras).loras()
    assert entry["file"] == f"hf:{MANY}@{commit_of(MANY)}/loras/four_steps.safetensors" and entry["strength"] == 0.5


def test_a_repository_of_peft_is_a_lora(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    saved_in(folder / "adapter_model.safetensors", lora_files.random_lora().tensors())
    (folder / "adapter_config.json").write_text('{"lora_alpha": 4}')
    hub.repos["some/lora"] = folder
    (lora,) = local_loras([LoraFile(Path("hf:some/lora"))], lambda _: None)
    assert names_in(lora.path) == {"adapter_model.safetensors", "adapter_config.json"}
    assert "name one of its files" in refusal(lambda: local_loras([LoraFile(Path(f"hf:{MANY}"))], lambda _: None))


def test_the_root_of_a_cached_repository_is_understood(hub: Hub, tmp_path: Path) -> None:
    (snapshot,) = local(f"hf:{OFFICIAL}")
    root = snapshot.parents[1]
    assert root.name.startswith("models--") and local(root) == (snapshot,)
    shutil.rmtree(root / "refs")
    assert inside_cache(root) == snapshot
    (root / "snapshots" / "0").mkdir()
    assert "nothing says which one is meant" in refusal(lambda: inside_cache(root))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("1")
    assert "names a snapshot that is not there" in refusal(lambda: inside_cache(root))


# The command


def test_inspect_downloads_no_weights(hub: Hub) -> None:
    arguments = ["--checkpoint", f"hf:{OFFICIAL}", "--inspect"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 1 and "would have to be downloaded first" in result.stderr and not hub.downloads()


def inspected(*words: str) -> Result:
    return CliRunner().invoke(command, [*words, "--inspect", "--json"])


def test_inspect_reads_headers_over_the_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the disk, with the name and the commit of the hub; not a byte of the values, and nothing stays of it."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    sizes = {"text_encoder": UMT5Encoder, "vae": WanVAE}
    monkeypatch.setattr(WanSource, "_own_config", lambda _, which, kind: SMALL[which] if sizes[which] is kind else None)
    words = ("--checkpoint", f"hf:{DIFFUSERS}")
    result = inspected(*words)
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["source"] == f"checkpoint hf:{DIFFUSERS}@{commit_of(DIFFUSERS)}"
    assert found["parts"] == list(VIDEO_PARTS) and found["model"] == "wan-48x3"
    ranges = {path.rpartition("/")[2]: span for method, path, span in hub.asked if method == "GET" and span}
    weights = {path.name for path in hub.repos[DIFFUSERS].rglob("*.safetensors")}
    assert set(ranges) == weights and set(ranges.values()) == {"bytes=0-100000"}
    cached = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() or path.is_symlink()}
    assert not weights & cached and not list((tmp_path / "temporary").iterdir())
    local(f"hf:{DIFFUSERS}")
    assert json.loads(inspected(*words).stdout) == found


def test_what_a_header_does_not_tell_has_to_be_downloaded(hub: Hub, tmp_path: Path) -> None:
    state = made.models().state("transformer")
    quantised = {**state, "blocks.0.ffn.0.comfy_quant": torch.zeros(4, dtype=torch.uint8)}
    saved_in(tmp_path / "odd" / "quantised.safetensors", quantised)
    (tmp_path / "odd" / "damaged.safetensors").write_bytes(b"\x10" + bytes(7) + b"no header at all")
    hub.repos["some/odd"] = tmp_path / "odd"
    for file, message in (
        ("quantised", "says in the values of tensors how it is stored"),
        ("damaged", "is no safetensors file"),
    ):
        result = CliRunner().invoke(command, ["--checkpoint", f"hf:some/odd/{file}.safetensors", "--inspect"])
        assert result.exit_code == 1 and message in result.stderr, result.stderr


def test_the_command_exports_what_it_downloaded(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds of tracing: what would be exported is enough."""
    hub.repos["some/tiny"] = tiny_student(tmp_path / "tiny")
    exported = []

    def stop(source: Source, *_: object, **__: object) -> None:
        exported.append(source.origin)
        raise ExportError("stopped here")

    monkeypatch.setattr(export, "export_bundle", stop)
    result = CliRunner().invoke(command, ["--checkpoint", "hf:some/tiny", "--out", str(tmp_path / "out")])
    name = f"hf:some/tiny@{commit_of('some/tiny')}"
    assert result.stderr.endswith("stopped here\n") and exported == [f"checkpoint {name}"]
    assert f"tmd-export: {name}: 1 file, " in result.stderr and hub.downloads() == ["student.safetensors"]


def test_the_environment_of_the_library_is_heeded(tmp_path: Path) -> None:
    """In a process of its own: the library reads HF_HOME and HF_ENDPOINT when it is imported."""
    code = (
        "from pathlib import Path\nfrom tmd_export.hub.places import local_checkpoints\n"
        "print(local_checkpoints([Path('hf:some/tiny')], None, print)[0])"
    )
    with Hub(**{"some/tiny": tiny_student(tmp_path / "tiny")}).serving() as hub:
        own = {
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        environment = {**os.environ, **own}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(str(tmp_path / "home" / "hub" / "models--some--tiny"))


def tiny_student(folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(built_in_folder() / "student.safetensors", folder)
    return folder
