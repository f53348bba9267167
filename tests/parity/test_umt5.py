"""tmd_ref's UMT5 encoder against transformers' independent implementation, with random weights carried over."""

import pytest
import torch

from tmd_export.checkpoints.names import converted
from tmd_ref.umt5 import UMT5_CONFIGS, UMT5Config, UMT5Encoder, relative_buckets

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
CONFIG = UMT5Config(vocab_size=100, dim=48, num_heads=3, head_dim=20, ffn_dim=96, num_layers=3)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    ours = UMT5Encoder(CONFIG).eval()
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if "norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
            if "pos_embedding" in name:
                weight.normal_()  # positions must matter
    theirs = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=CONFIG.vocab_size,
            d_model=CONFIG.dim,
            d_kv=CONFIG.head_dim,
            d_ff=CONFIG.ffn_dim,
            num_layers=CONFIG.num_layers,
            num_heads=CONFIG.num_heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    weights = {converted("text_encoder", key): value for key, value in ours.state_dict().items()}
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    theirs.load_state_dict(weights, strict=True)
    return ours, theirs


@pytest.mark.parametrize(
    "lengths",
    [(12, 12), (1, 7, 20), (5,), (300, 170)],
    ids=["no padding", "ragged", "short", "beyond the last distance bucket"],
)
@torch.no_grad()
def test_prompt_embeds_equal_transformers_and_padding_is_zero(models, lengths):
    ours, theirs = models
    generator = torch.Generator().manual_seed(len(lengths))
    width = max(lengths) + (3 if len(lengths) != 2 else 0)
    input_ids = torch.randint(2, CONFIG.vocab_size, (len(lengths), width), generator=generator)
    attention_mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    input_ids *= attention_mask

    prompt_embeds = ours(input_ids, attention_mask)
    expected = theirs(input_ids, attention_mask).last_hidden_state

    text = attention_mask.bool()
    assert 0.3 < expected[text].std() < 3
    assert (prompt_embeds - expected)[text].abs().max() <= TOLERANCE
    assert torch.equal(prompt_embeds[~text], torch.zeros_like(prompt_embeds[~text]))


@torch.no_grad()
def test_embeddings_do_not_depend_on_the_amount_of_padding(models):
    ids = torch.tensor([[7, 9, 30, 1]])
    exact = models[0](ids, torch.ones_like(ids))
    padded = models[0](torch.nn.functional.pad(ids, (0, 9)), torch.nn.functional.pad(torch.ones_like(ids), (0, 9)))
    torch.testing.assert_close(padded[:, :4], exact, rtol=0, atol=1e-5)


def test_buckets_equal_transformers_at_every_distance():
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    attention = UMT5Attention(transformers.UMT5Config(num_layers=1), has_relative_attention_bias=True)
    offsets = torch.arange(-600, 601)
    expected = attention._relative_position_bucket(offsets)
    far = len(relative_buckets()) // 2
    assert torch.equal(torch.tensor(relative_buckets())[offsets.clamp(-far, far) + far], expected)


def test_parameter_count_is_that_of_the_official_checkpoint():
    with torch.device("meta"):
        model = UMT5Encoder(UMT5_CONFIGS["umt5-xxl"])
    assert sum(weight.numel() for weight in model.parameters()) == 5_680_910_336
    assert len(model.state_dict()) == 242
