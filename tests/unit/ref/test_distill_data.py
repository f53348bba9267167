"""Shards of latents: what goes in comes out; anything odd is a clear stop. Videos against what was put into them."""

import json

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tmd_ref.checkpoint import save_model
from tmd_ref.distill.config import Data
from tmd_ref.distill.data import DataError, LatentDataset, claim, write_index, write_shard
from tmd_ref.distill.draws import Draws
from tmd_ref.distill.prepare import encode_videos, read_list, read_video
from tmd_ref.distill.trainer import TrainingError
from tmd_ref.distill.weights import load_teacher, load_text_encoder, load_vae
from tmd_ref.text import Tokenizer
from tmd_ref.umt5 import UMT5Config, UMT5Encoder
from tmd_ref.vae import WanVAE, WanVAEConfig
from tmd_ref.wan import WAN_CONFIGS, WanConfig, WanTransformer

SHIPPED = "tmd_ref/weights/tiny"


def shards(folder, counts=(3, 2), size=(2, 4, 4)):
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, count in enumerate(counts):
        latents = torch.randn(count, 16, *size, generator=generator)
        embeds = torch.randn(count, 2, 6, 8, generator=generator)
        embeds[:, :, 4:] = 0
        write_shard(folder / f"{number:06d}.safetensors", latents, embeds, torch.ones(6, 8))
        made.append((latents, embeds))
    write_index(folder, {"seed": 1})
    return [torch.cat(parts) for parts in zip(*made, strict=True)]


def test_what_is_written_is_drawn_again(tmp_path):
    latents, embeds = shards(tmp_path)
    data = LatentDataset(tmp_path, (2, 4, 4))
    assert len(data) == 5 and data.null_embeds.shape == (6, 8)
    assert load_file(tmp_path / "000000.safetensors")["prompt_embeds"].shape[2] == 4, "zeros are not stored"
    for clip in range(5):
        assert torch.allclose(data.latents(clip), latents[clip], atol=2e-3)
        assert torch.allclose(data.embeds(clip, 1), embeds[clip, 1], atol=2e-3)
    draws = Draws(0, 0, 400)
    x, prompts = data.sample(draws)
    clips = Draws(0, 0, 400).integers(5)
    assert torch.allclose(x, latents[clips], atol=2e-3) and prompts.shape == (400, 6, 8)
    assert clips.bincount().min() > 40


def empty(folder):
    save_file({"latents": torch.zeros(0, 16, 2, 4, 4), "prompt_embeds": torch.zeros(0, 2, 6, 8),
               "null_embeds": torch.zeros(6, 8)}, folder / "000001.safetensors")  # fmt: skip


def other_size(folder):
    write_shard(folder / "000001.safetensors", torch.ones(1, 16, 2, 6, 4), torch.ones(1, 2, 6, 8), torch.ones(6, 8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty, "000001.safetensors is empty"),
        (other_size, r"000001.safetensors has latents \(16, 2, 6, 4\)"),
        (lambda folder: (folder / "000001.safetensors").unlink(), "000001.safetensors is missing"),
        (lambda folder: (folder / "000001.safetensors").write_bytes(b"x" * 100), "no shard of latents"),
        (lambda folder: (folder / "index.json").unlink(), "has not finished"),
    ],
)
def test_odd_shards_are_a_clear_stop(damage, message, tmp_path):
    shards(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        LatentDataset(tmp_path)


def test_another_resolution_than_the_configs_is_a_clear_stop(tmp_path):
    shards(tmp_path)
    with pytest.raises(DataError, match=r"\(2, 4, 4\).*asks for \(2, 8, 8\).*another resolution"):
        LatentDataset(tmp_path, (2, 8, 8))


def test_bad_numbers_and_a_full_disk_leave_no_shard(tmp_path):
    shards(tmp_path)
    bad = torch.full((1, 16, 2, 4, 4), float("nan"))
    with pytest.raises(DataError, match="not finite"):
        write_shard(tmp_path / "000002.safetensors", bad, torch.ones(1, 2, 6, 8), torch.ones(6, 8))
    (tmp_path / "000002.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"Make room|intact"):
        write_shard(
            tmp_path / "000002.safetensors", torch.ones(1, 16, 2, 4, 4), torch.ones(1, 2, 6, 8), torch.ones(6, 8)
        )
    assert len(LatentDataset(tmp_path)) == 5 and not (tmp_path / "000002.safetensors").exists()


def write_video(path, shades, fps, size: tuple[int, int] = (48, 64)):
    """One flat gray per frame, `size` = (height, width), lossless."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *size, "bgr0"
        for shade in shades:
            picture = np.full((*size, 3), shade, np.uint8)
            picture[:, : size[1] // 8] = 0  # a black edge, cropped away where the video is too wide
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def test_a_video_is_resampled_in_time_scaled_and_cropped(tmp_path):
    path = tmp_path / "clip.mkv"
    write_video(path, range(0, 250, 10), fps=16)
    video = read_video(path, 5, (32, 32), 8)
    shades = (video.mean(dim=(0, 2, 3)) * 127.5 + 127.5).tolist()
    assert shades == pytest.approx([0, 20, 40, 60, 80], abs=1), "every second frame at half the rate"
    # 64x48 scaled by 2/3 to 43x32, five columns cut from each side: the black edge (8 columns, then 5.3) is gone
    assert video.shape == (3, 5, 32, 32) and video.std(dim=(2, 3)).max() < 0.05
    doubled = (read_video(path, 9, (32, 32), 32).mean(dim=(0, 2, 3)) * 127.5 + 127.5).tolist()
    assert doubled[::2] == pytest.approx([0, 10, 20, 30, 40], abs=1) and set(np.round(doubled)) <= set(range(0, 60, 10))


@pytest.mark.parametrize(
    ("frames", "size", "message"), [(29, (32, 32), "25 frames"), (5, (64, 64), "smaller than 64x64")]
)
def test_videos_too_short_or_too_small_are_refused(frames, size, message, tmp_path):
    write_video(tmp_path / "clip.mkv", range(25), fps=16)
    with pytest.raises(DataError, match=message):
        read_video(tmp_path / "clip.mkv", frames, size, 16)
    (tmp_path / "text.mkv").write_text("no video")
    with pytest.raises(DataError, match="cannot be read as a video"):
        read_video(tmp_path / "text.mkv", 5, (32, 32), 16)


def test_videos_and_captions_become_shards_and_the_rest_is_listed(tmp_path):
    lines = []
    for number in range(4):
        write_video(tmp_path / f"{number}.mkv", range(0, 250, 10), fps=8, size=(48, 48) if number != 2 else (16, 16))
        lines.append({"video": f"{number}.mkv", "caption": f"a red circle number {number}"})
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    vae, encoder = load_vae_of(SHIPPED), load_text_encoder_of(SHIPPED)
    tokenizer = Tokenizer(f"{SHIPPED}/tokenizer.model", 32)
    settings = Data(size=(48, 48), frames=5, fps=8, shard=3)
    out = tmp_path / "data"
    for _ in range(2):  # the second time, everything is there
        report: list[str] = []
        clips = encode_videos(read_list(tmp_path / "list.jsonl"), out, settings, vae, encoder, tokenizer,
                              report=report.append)  # fmt: skip
        assert clips == 3
    assert report == []
    assert "smaller" in json.loads((out / "skipped.jsonl").read_text())["reason"]
    data = LatentDataset(out, settings.latent_size)
    with torch.no_grad():
        expected = vae.encode(read_video(tmp_path / "3.mkv", 5, (48, 48), 8)[None])[0]
    assert torch.allclose(data.latents(2), expected, atol=1e-2)


def load_vae_of(folder):
    from pathlib import Path

    return load_vae(Path(folder) / "vae.safetensors")


def load_text_encoder_of(folder):
    from pathlib import Path

    return load_text_encoder(Path(folder) / "umt5.safetensors")


def test_shards_of_another_origin_are_not_mixed(tmp_path):
    claim(tmp_path, {"seed": 1, "size": (64, 64)})
    claim(tmp_path, {"seed": 1, "size": (64, 64)})  # an interrupted run goes on
    with pytest.raises(DataError, match="made with another input vae, another seed: delete that folder"):
        claim(tmp_path, {"seed": 2, "size": (64, 64), "input vae": "x"})
    (tmp_path / "unknown").mkdir()
    shards(tmp_path / "unknown", counts=(1,))
    with pytest.raises(DataError, match="nothing says what they were made of"):
        claim(tmp_path / "unknown", {"seed": 1})


def test_a_caption_may_hold_what_other_formats_end_lines_with(tmp_path):
    caption = "a red\u2028circle\x85on black"
    (tmp_path / "list.jsonl").write_text(
        json.dumps({"video": "a.mp4", "caption": caption}, ensure_ascii=False), "utf-8"
    )
    assert [entry.captions for entry in read_list(tmp_path / "list.jsonl")] == [(caption,)]
    (tmp_path / "latin.jsonl").write_bytes(b'{"video": "a.mp4", "caption": "gr\xfcn"}')
    with pytest.raises(DataError, match=r"latin.jsonl cannot be read"):
        read_list(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("line", ['{"video": "a.mp4"}', '{"video": "a.mp4", "caption": ""}', "[]", "{"])
def test_a_bad_line_of_the_list_is_named(line, tmp_path):
    (tmp_path / "list.jsonl").write_text('{"video": "a.mp4", "caption": "x"}\n' + line)
    with pytest.raises(DataError, match=r"list.jsonl, line 2"):
        read_list(tmp_path / "list.jsonl")


SMALL = WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_dim=8, text_len=4)


@pytest.mark.parametrize("layout", ["ours", "safetensors", "index", "pth"])
def test_given_weights_are_read_from_ours_and_from_official_files(layout, tmp_path):
    wan = WanTransformer(SMALL)
    nn.init.normal_(wan.head.head.weight)
    tensors = wan.state_dict()
    path = tmp_path / {"ours": "a.safetensors", "safetensors": "b.safetensors", "pth": "c.pth"}.get(
        layout, "d.index.json"
    )
    if layout == "ours":
        save_model(path, wan)
    elif layout == "safetensors":
        save_file(tensors, path)
    elif layout == "pth":
        torch.save(tensors, path)
    else:
        names = sorted(tensors)
        where = {name: f"part{n % 2}.safetensors" for n, name in enumerate(names)}
        for part in set(where.values()):
            save_file({name: tensors[name] for name in names if where[name] == part}, tmp_path / part)
        path.write_text(json.dumps({"weight_map": where}))
    loaded = load_teacher(path, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(wan.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"other sizes|does not hold"):
        load_teacher(path, WAN_CONFIGS["tiny"])


def test_official_vae_and_text_encoder_are_read_under_their_names(tmp_path, monkeypatch):
    from tmd_ref.distill import weights

    small_vae, small_text = WanVAEConfig(dim=8), UMT5Config(16, 8, 2, 4, 16, 1)
    monkeypatch.setitem(weights.WAN_VAE_CONFIGS, "wan2.1", small_vae)
    monkeypatch.setitem(weights.UMT5_CONFIGS, "umt5-xxl", small_text)
    vae, text = WanVAE(small_vae), UMT5Encoder(small_text).bfloat16()
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    torch.save(text.state_dict(), tmp_path / "text.pth")
    assert all(
        torch.equal(a, b) for a, b in zip(vae.parameters(), load_vae(tmp_path / "vae.pth").parameters(), strict=True)
    )
    assert next(load_text_encoder(tmp_path / "text.pth").parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="official names"):
        load_vae(tmp_path / "text.pth")
