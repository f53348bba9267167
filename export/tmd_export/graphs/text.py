"""The graph of a text encoder."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from tmd_ref.gemma import GemmaEncoder
from tmd_ref.umt5 import UMT5Encoder

from .graph import Graph, Interface

TABLE_BYTES = 256 << 20  # in float32; a larger embedding table becomes a file of its own, of which a run reads few rows


class EncoderOfRows(nn.Module):
    """The text encoder behind its embedding table: a prompt needs 512 of UMT5-XXL's 256,384 rows."""

    def __init__(self, encoder: UMT5Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, token_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder.encode(token_embeds, attention_mask)


class GemmaOfRows(nn.Module):
    """The same of Gemma, which has no padding."""

    def __init__(self, encoder: GemmaEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, token_embeds: Tensor) -> Tensor:
        return self.encoder.encode(token_embeds)


def text_encoder(encoder: UMT5Encoder | GemmaEncoder, interface: Interface) -> Graph:
    """From token ids; from rows of the embedding table if that is too large to lie in a graph."""
    config = encoder.config
    of_rows = 4 * config.vocab_size * config.dim > TABLE_BYTES
    flags = {*interface.flags} - {"ids", "table"} | {"table" if of_rows else "ids"}
    numbers = {**interface.numbers, "table_dim": config.dim}
    sides = replace(interface, numbers=numbers, flags=flags).of("text_encoder")
    if not of_rows:
        return Graph("text_encoder", encoder, *sides, vocabulary=config.vocab_size)
    rows = GemmaOfRows(encoder) if isinstance(encoder, GemmaEncoder) else EncoderOfRows(encoder)
    return Graph("text_encoder", rows, *sides)
