"""A Wan transformer in two parts is the same transformer."""

from typing import Any

import pytest
import torch

from tmd_export import RandomSource
from tmd_export.families.build import interface_of
from tmd_export.graphs.wan import backbone as backbone_graph
from tmd_export.graphs.wan import flow_head as flow_head_graph
from tmd_ref.first_frame import FirstFrameWan, SplitFirstFrame
from tmd_ref.split import SplitWan
from tmd_ref.student import TMDStudent
from tmd_ref.wan import WanConfig, WanTransformer

CONFIG = WanConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=4, text_dim=20, text_len=8)


def random_wan() -> WanTransformer:
    torch.manual_seed(0)
    wan = WanTransformer(CONFIG)
    torch.nn.init.normal_(wan.head.head.weight)  # zero at first, which would hide everything before it
    return wan.eval()


@pytest.mark.parametrize("head_blocks", [1, 3])
def test_both_parts_together_are_the_transformer(head_blocks):
    wan = random_wan()
    x, t = torch.randn(2, 16, 3, 4, 6), torch.tensor([0.3, 0.9])
    prompts = torch.randn(2, 8, 20)
    with torch.no_grad():
        expected = wan(x, t, prompts)
        split = SplitWan(wan, head_blocks)
        assert torch.equal(split(x, t, prompts), expected)
        rope: Any = TMDStudent.rope  # which reads the configuration alone
        cos, sin = rope(split, x)
        features, context = split.backbone(x, t, prompts, cos, sin)
        # Of x the head takes the shape alone.
        assert torch.equal(split.head(torch.full_like(x, torch.nan), t, features, context, cos, sin), expected)
    assert expected.abs().mean() > 0.1


@torch.no_grad()
def test_with_no_frame_held_it_is_the_transformer_to_the_last_bit():
    wan = random_wan()
    x, t, prompts = torch.randn(2, 16, 3, 4, 6), torch.tensor([0.3, 0.9]), torch.randn(2, 8, 20)
    holding = FirstFrameWan(CONFIG).eval()
    holding.load_state_dict(wan.state_dict())
    none, first = torch.zeros(3), torch.tensor([1.0, 0.0, 0.0])
    assert torch.equal(holding(x, t, prompts, none), wan(x, t, prompts))
    expected = holding(x, t, prompts, first)
    assert (expected - wan(x, t, prompts)).abs().max() > 0.01
    assert torch.equal(SplitFirstFrame(holding, 1)(x, t, prompts, first), expected)


def test_names_are_those_of_a_student_and_of_the_checkpoint():
    with torch.device("meta"):
        split, student, wan = SplitWan(WanTransformer(CONFIG), 1), TMDStudent(CONFIG, 1), WanTransformer(CONFIG)
    assert all(weight.is_meta for weight in split.parameters())
    assert set(split.state_dict()) < set(student.state_dict())

    def original(name: str) -> str:
        part, _, rest = name.partition(".")
        return rest.replace("blocks.0.", "blocks.3.") if part == "head" else rest

    assert {original(name) for name in split.state_dict()} == set(wan.state_dict())


@pytest.mark.parametrize("head_blocks", [0, 4])
def test_both_parts_need_a_block(head_blocks):
    with pytest.raises(ValueError, match=f"head_blocks is {head_blocks}.*choose 1 to 3"):
        SplitWan(random_wan(), head_blocks)


def test_graphs_of_the_parts_have_the_interface_of_family_wan():
    split = SplitWan(random_wan(), 1)
    interface = interface_of(RandomSource("tiny", 0, wan=split.config, head_blocks=1, fusion=None))
    backbone, head = backbone_graph(split, interface), flow_head_graph(split, interface)
    assert [spec.name for spec in backbone.outputs] == ["features", "context"]
    assert [spec.name for spec in head.inputs] == ["x", "t", "features", "context", "rope_cos", "rope_sin"]
    assert [(spec.name, spec.shape) for spec in head.outputs] == [
        ("velocity", ("batch", 16, "frames", "height", "width"))
    ]
    dims = head.sizes(batch=1, frames=2, height=4, width=6, text=5)
    inputs = head.random_inputs(0, batch=1, frames=2, height=4, width=6, text=5)
    with torch.no_grad():
        velocity = head.module(*inputs.values())
    assert velocity.shape == head.outputs[0].resolve(**dims)
