"""Transition Models: the network against a plain float64 one, the released layout, sampling, and the two parts."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.tim_models import CLASSES, SIZES, TEXT, condition_of, randomised
from tmd_ref.tim.model import TIM_CONFIGS, TiM, TiMConfig, rope_tables
from tmd_ref.tim.released import load_released
from tmd_ref.tim.sampling import tim_sample, uniform_times
from tmd_ref.tim.split import SplitTiM, uncut


def plain(weights: dict[str, Tensor], c: TiMConfig, x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
    """The facts of the paper and the released code once more, token by token, with complex rotations."""
    w = weights.__getitem__

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w(f"{name}.weight").T + weights.get(f"{name}.bias", torch.zeros(()))

    def norm(x: Tensor, eps: float, name: str | None = None) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return x if name is None else x * w(f"{name}.weight") + w(f"{name}.bias")

    def swiglu(x: Tensor, name: str) -> Tensor:
        gate = linear(x, f"{name}.fc1_g")
        return linear(gate / (1 + (-gate).exp()) * linear(x, f"{name}.fc1_x"), f"{name}.fc2")

    def time(t: Tensor, name: str) -> Tensor:
        angle = t[:, None] * 10000.0 ** (-torch.arange(c.freq_dim // 2, dtype=t.dtype) / (c.freq_dim // 2))
        h = linear(torch.cat((angle.cos(), angle.sin()), 1), f"{name}.mlp.0")
        return linear(h / (1 + (-h).exp()), f"{name}.mlp.2")[:, None]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (c.num_heads, c.head_dim)).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-1, -2) / c.head_dim**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    p, (h, wide) = c.patch, (x.shape[2] // c.patch, x.shape[3] // c.patch)
    tokens = [  # row by row; a patch's values in the order (channel, row, column)
        linear(x[:, :, i * p : i * p + p, j * p : j * p + p].flatten(1), "x") for i in range(h) for j in range(wide)
    ]
    half = c.head_dim // 2
    ladder = 10000.0 ** (-torch.arange(0, half, 2, dtype=x.dtype) / half)
    turns = torch.stack([torch.cat((k % h * ladder, k // h * ladder)) for k in range(h * wide)])

    def rotate(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(turns), turns
        )
        return torch.view_as_real(turned).flatten(-2)

    z, delta = torch.stack(tokens, 1), time(t - r, "delta_embedder")
    cond = time(t, "t_embedder") + delta
    if c.text_dim is None:
        cond = cond + w("y_embedder.embedding_table.weight")[y][:, None]
    else:
        y = swiglu(norm(y, 1e-5, "y_embedder.norm"), "y_embedder.mlp")
    for n in range(c.num_layers):
        b = f"blocks.{n}"
        m = swiglu(cond, f"{b}.adaLN_modulation").chunk(6 if c.text_dim is None else 9, -1)
        q, k, v = (linear(norm(z, 1e-6) * (1 + m[1]) + m[0], f"{b}.attn.qkv") + linear(delta, f"{b}.attn.qkv_d")).chunk(
            3, -1
        )
        q, k = norm(heads(q), 1e-5, f"{b}.attn.q_norm"), norm(heads(k), 1e-5, f"{b}.attn.k_norm")
        z = z + m[2] * linear(attend(rotate(q), rotate(k), heads(v)), f"{b}.attn.proj")
        if c.text_dim is not None:
            q = linear(norm(z, 1e-6) * (1 + m[4]) + m[3], f"{b}.cross_attn.q")
            k, v = linear(norm(y, 1e-6), f"{b}.cross_attn.kv").chunk(2, -1)
            q, k = norm(heads(q), 1e-5, f"{b}.cross_attn.q_norm"), norm(heads(k), 1e-5, f"{b}.cross_attn.k_norm")
            z = z + m[5] * linear(attend(rotate(q), k, heads(v)), f"{b}.cross_attn.proj")
        z = z + m[-1] * swiglu(norm(z, 1e-6) * (1 + m[-2]) + m[-3], f"{b}.mlp")
    shift, scale = swiglu(cond, "final_layer.adaLN_modulation").chunk(2, -1)
    out = linear(norm(z, 1e-6) * (1 + scale) + shift, "final_layer.linear")
    picture = torch.zeros_like(x)
    for n in range(h * wide):  # a token's values in the order (row, column, channel)
        i, j = n // wide * p, n % wide * p
        picture[:, :, i : i + p, j : j + p] = out[:, n].unflatten(-1, (p, p, -1)).permute(0, 3, 1, 2)
    return picture


@pytest.mark.parametrize("config", [TEXT, CLASSES], ids=["text", "classes"])
@pytest.mark.parametrize("size", [(4, 4), (4, 10), (8, 2)])
def test_network_equals_the_plain_one(config: TiMConfig, size: tuple[int, int]) -> None:
    model = randomised(config, torch.float64)
    x, y = torch.randn(3, 3, *size, dtype=torch.float64), condition_of(config, 3, torch.float64)
    t = torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64)
    r = torch.tensor([0.0, 0.7, 0.1], dtype=torch.float64)
    weights = dict(model.state_dict())
    weights["x.weight"], weights["x.bias"] = (weights[f"x_embedder.proj.{key}"] for key in ("weight", "bias"))
    weights["x.weight"] = weights["x.weight"].flatten(1)
    found, expected = model(x, t, r, y), plain(weights, config, x, t, r, y)
    assert 0.1 < expected.std() < 10
    assert (found - expected).abs().max() <= 1e-6  # the model's rope tables are float32


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("tim-t2i", 864_978_080, 894), ("tim-c2i-256", 664_128_016, 607), ("tim-c2i-512", 664_164_896, 607)],
)
def test_parameters_are_those_of_the_released_model_without_its_projector(
    name: str, parameters: int, tensors: int
) -> None:
    with torch.device("meta"):
        model = TiM(TIM_CONFIGS[name])
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    keys = model.state_dict().keys()
    assert len(keys) == tensors and {"x_embedder.proj.weight", "blocks.27.attn.qkv_d.weight"} < keys
    assert ("blocks.0.cross_attn.kv.bias" in keys) == (name == "tim-t2i")
    assert ("y_embedder.embedding_table.weight" in keys) != (name == "tim-t2i")


def test_positions_are_those_of_the_released_code() -> None:
    """2 x 3 tokens: (0,1,0,1,0,1) and (0,0,1,1,2,2), which are columns and rows only on a square."""
    cos, sin = rope_tables(2, 3, 8)
    angle = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [0, 2], [1, 2]]).repeat_interleave(2, 1) * torch.tensor(
        [1.0, 0.01, 1.0, 0.01]
    )
    torch.testing.assert_close((cos, sin), (angle.cos(), angle.sin()))
    assert not torch.equal(cos, rope_tables(2, 3, 8, rope="grid")[0])
    assert torch.equal(rope_tables(3, 3, 8)[1], rope_tables(3, 3, 8, rope="grid")[1])
    with pytest.raises(ValueError, match="choose index"):
        rope_tables(2, 2, 8, rope="xy")


def test_a_new_network_predicts_nothing() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert not TiM(TEXT)(x, torch.rand(2), torch.zeros(2), condition_of(TEXT, 2)).any()


@pytest.mark.parametrize("shape", [(1, 3, 3, 4), (1, 3, 4, 3)])
def test_sides_that_are_no_whole_patches_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="whole numbers of patches"):
        TiM(CLASSES)(torch.randn(shape), torch.rand(1), torch.zeros(1), torch.tensor([1]))


@pytest.mark.parametrize("changes", [{"num_heads": 5}, {"text_dim": None}, {"num_classes": 3}, {"dim": 12}])
def test_sizes_that_do_not_fit_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError):
        TiMConfig(**{**SIZES, "patch": 1, "text_dim": 8, **changes})


@pytest.mark.parametrize("config", [TEXT, CLASSES], ids=["text", "classes"])
def test_both_parts_together_are_one_guided_transition(config: TiMConfig) -> None:
    model = randomised(config)
    y, t, r = condition_of(config, 2), torch.tensor([0.8, 0.8]), torch.tensor([0.3, 0.3])
    x = torch.randn(1, 3, 4, 6).expand(2, -1, -1, -1)
    with_prompt, without = model(x, t, r, y)
    expected = x[0] - 0.5 * (without + 2.5 * (with_prompt - without))
    names = set(dict(model.named_parameters()))
    parts = SplitTiM(model)
    assert {uncut(name) for name, _ in parts.named_parameters()} == names
    rope = rope_tables(4 // config.patch, 6 // config.patch, config.head_dim)
    mix = torch.tensor([[2.5, -1.5], [2.5, -1.5]])
    rows = parts.transition(x[:, :, None], t, r, mix, parts.prompt(y), *rope)
    for row in rows:
        torch.testing.assert_close(row[:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A folder of files in the released layout, random weights in bfloat16, with a projector."""
    projector = {f"projector.{k}.weight": torch.randn(4, 4) for k in (0, 2, 4)}
    for config, name in ((TEXT, "t2i_model.bin"), (CLASSES, "c2i_model_256.safetensors")):
        tensors = {key: value.bfloat16() for key, value in randomised(config).state_dict().items()} | projector
        torch.save(tensors, tmp_path / name) if name.endswith("bin") else save_file(tensors, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(("name", "config"), [("t2i_model.bin", TEXT), ("c2i_model_256.safetensors", CLASSES)])
def test_released_files_load(released: Path, name: str, config: TiMConfig) -> None:
    stored = {key: value.bfloat16() for key, value in randomised(config).state_dict().items()}
    model = load_released(released / name, config)
    assert not model.training and model.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
    exact = load_released(released / name, config, torch.float32)
    x = torch.randn(1, 3, 4, 6)
    assert exact(x, torch.ones(1), torch.zeros(1), condition_of(config, 1)).std() > 0.1
    with pytest.raises(ValueError, match="does not hold this TiM"):
        load_released(released / name, CLASSES if config is TEXT else TEXT)


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize("name", ["t2i_model.bin", "model.safetensors"])
def test_files_that_are_no_weights_are_refused_and_run_no_code(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="copy it again"):
        load_released(tmp_path / name, TEXT)
    assert not (tmp_path / "evil").exists()
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="flat dictionary"):
        load_released(tmp_path / "list.bin", TEXT)
    with pytest.raises(FileNotFoundError):
        load_released(tmp_path / "absent.bin", TEXT)


@pytest.mark.parametrize("times", [uniform_times(1), uniform_times(7), [1.0, 0.91, 0.4, 0.39, 0.0]])
def test_a_straight_path_is_followed_exactly_in_any_split(times: list[float]) -> None:
    """With F = noise - data every schedule ends in the data, and a first t < 1 begins on the path."""
    data, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for begin in range(len(times) - 1):
        x = (1 - times[begin]) * data + times[begin] * noise
        out = tim_sample(lambda x, t, r, y: noise - data, x, torch.zeros(2), times[begin:])
        torch.testing.assert_close(out, data, rtol=0, atol=1e-12)


def test_guidance_follows_the_strict_interval() -> None:
    """F of the prompt is 3, of none 1; each step of 1/4 subtracts a quarter of what is used."""
    asked: list[tuple[float, float, int]] = []

    def network(x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        asked.append((t[0].item(), r[0].item(), len(x)))
        return y.view(-1, 1, 1, 1).expand_as(x)

    x, prompt, null = torch.zeros(1, 1, 1, 1), torch.full((1, 1), 3.0), torch.ones(1, 1)
    out = tim_sample(network, x, prompt, uniform_times(4), null, 2.0)
    assert out.item() == -(3 + 3 * 5) / 4 and [rows for *_, rows in asked] == [1, 2, 2, 2]
    out = tim_sample(network, x, prompt, uniform_times(4), null, 2.0, (0.25, 1.1))
    assert out.item() == -(5 * 3 + 3) / 4
    asked.clear()
    tim_sample(network, x, prompt, uniform_times(2), instant=True)
    assert [(t, r) for t, r, _ in asked] == [(1.0, 1.0), (0.5, 0.5)]
    for wrong in ([1.0], [0.5, 0.5], [1.2, 0.0], [1.0, -0.1]):
        with pytest.raises(ValueError, match="fall"):
            tim_sample(network, x, prompt, wrong)
