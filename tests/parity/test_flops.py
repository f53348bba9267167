"""Operations counted from the graphs, against torch's counter on other people's models of the same sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.built_in import BUILT_IN
from tmd_engines import Bundle
from tmd_engines.cost.sizing import estimate
from tmd_ref.umt5 import UMT5_CONFIGS
from tmd_ref.vae import WAN_VAE_CONFIGS
from tmd_ref.wan import WAN_CONFIGS

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDTH, HEIGHT, FRAMES = 96, 64, 5
LATENTS = (1, 16, 2, HEIGHT // 8, WIDTH // 8)


@pytest.fixture(scope="module")
def stages():
    return estimate(Bundle.open(BUILT_IN), width=WIDTH, height=HEIGHT, frames=FRAMES).stages


def counted(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_decoder_as_diffusers_decodes_the_whole_clip(stages):
    config = WAN_VAE_CONFIGS["tiny"]
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLWan(base_dim=config.dim, z_dim=config.z_dim)
    assert stages["decoder"].flops == counted(lambda: vae.decode(torch.empty(LATENTS, device="meta")))


def test_backbone_and_flow_head_are_a_wan_transformer_and_a_fusion(stages):
    config = WAN_CONFIGS["tiny"]
    with torch.device("meta"):
        wan = diffusers.WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
        given = torch.empty(LATENTS), torch.empty(1), torch.empty(1, config.text_len, config.text_dim)
    whole = counted(lambda: wan(*given))
    dim, tokens = config.dim, LATENTS[2] * LATENTS[3] // 2 * LATENTS[4] // 2
    # What the flow head has besides its blocks: patches of y, embeddings of s and s - r, the gated feed-forward.
    patches = 2 * tokens * 64 * dim
    times = 2 * 2 * (config.freq_dim * dim + dim * dim + 6 * dim * dim)
    fusion = 2 * 2 * tokens * dim * config.ffn_dim
    assert stages["backbone"].flops + stages["flow_head"].flops == whole + patches + times + fusion


def test_text_encoder_as_transformers_counts(stages):
    config = UMT5_CONFIGS["tiny"]
    umt5 = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.head_dim,
            d_ff=config.ffn_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            feed_forward_proj="gated-gelu",
        )
    )
    ids = torch.zeros(1, WAN_CONFIGS["tiny"].text_len, dtype=torch.long)
    assert stages["text_encoder"].flops == counted(lambda: umt5(ids, torch.ones_like(ids)))
