"""Gemma 3 from a folder as its authors publish it: the text encoder of TiM's text-to-image model.

The layers are `tmd_ref.gemma`; sizes come from the folder's `config.json`, weights from its safetensors one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tmd_engines.bundle.files import sha256_hex
from tmd_ref.gemma import Block, GemmaConfig, GemmaEncoder, from_halves

from ..checkpoints import find
from ..errors import ExportError
from .source import on_meta

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"
INDEX = f"{WEIGHTS}.index.json"
BOS_ID, PAD_ID = 2, 0

_TABLE = "embed_tokens.weight"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ONLY = {  # what another value would need another formula for
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


def read_gemma_config(document: dict[str, Any], table: torch.dtype) -> GemmaConfig:
    """Sizes from a `config.json`, that of the text model alone or of one with pictures around it.

    `table` is the type of the stored embedding, to which transformers rounds the factor of its rows. Raises ValueError
    for a model that is not Gemma 3 or not as it was released, KeyError or TypeError for a damaged file.
    """
    stated: dict[str, Any] = document.get("text_config", document)
    if stated["model_type"] != "gemma3_text":
        raise ValueError(f"its model_type is {stated['model_type']}, not gemma3_text")
    for name, only in _ONLY.items():
        if (found := stated.get(name, only)) != only and (found or only):
            raise ValueError(f"{name} is {found}, and only {only} is known here")
    layers, every = int(stated["num_hidden_layers"]), int(stated.get("sliding_window_pattern", 6))
    types = stated.get("layer_types") or [_SLIDING if (k + 1) % every else _FULL for k in range(layers)]
    if len(types) != layers or not {*types} <= {_FULL, _SLIDING}:
        raise ValueError(f"layer_types does not name {_FULL} or {_SLIDING} for each of {layers} layers")
    theta, factor = _rope(stated, _FULL, "rope_theta", 1e6)
    local_theta, local_factor = _rope(stated, _SLIDING, "rope_local_base_freq", 1e4)
    if local_factor != 1:
        raise ValueError("positions of sliding attention are scaled, which is not known here")
    dim = int(stated["hidden_size"])
    return GemmaConfig(
        vocab_size=int(stated["vocab_size"]),
        dim=dim,
        ffn_dim=int(stated["intermediate_size"]),
        num_heads=int(stated["num_attention_heads"]),
        num_kv_heads=int(stated["num_key_value_heads"]),
        head_dim=int(stated.get("head_dim", 256)),
        sliding=tuple(kind == _SLIDING for kind in types),
        window=int(stated["sliding_window"]),
        embedding_factor=float(torch.tensor(dim**0.5).to(table)),
        query_scalar=float(stated.get("query_pre_attn_scalar", 256)),
        theta=theta,
        local_theta=local_theta,
        rope_factor=factor,
        eps=float(stated.get("rms_norm_eps", 1e-6)),
    )


def _rope(stated: dict[str, Any], kind: str, name: str, theta: float) -> tuple[float, float]:
    """Base of the frequencies and what positions are divided by. Files before transformers 5 have the base as `name`
    and what is scaled, for full attention alone, as `rope_scaling`."""
    new = (stated.get("rope_parameters") or {}).get(kind) or {}
    scaling = new or (stated.get("rope_scaling") or {} if kind == _FULL else {})
    scaled = scaling.get("rope_type", scaling.get("type", "default"))
    if scaled not in ("default", "linear"):
        raise ValueError(f"positions are scaled by the rule {scaled}, which is not known here")
    factor = float(scaling["factor"]) if scaled == "linear" else 1.0
    return float(new.get("rope_theta", stated.get(name, theta))), factor


class GemmaFolder:
    """Such a folder: configuration, weights in one file or in shards, and the sentencepiece tokenizer."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ExportError if something is missing or does not belong together."""
        self.folder = Path(folder)
        weights = self.folder / (INDEX if (self.folder / INDEX).is_file() else WEIGHTS)
        for path in (self.folder / CONFIG, self.folder / TOKENIZER, weights):
            if not path.is_file():
                raise ExportError(
                    f"{folder} has no {path.name}: --text-encoder takes Gemma's folder as its authors publish it "
                    f"(gemma-3-1b-it: {CONFIG}, {WEIGHTS}, {TOKENIZER})."
                )
        self.tokenizer = self.folder / TOKENIZER
        self._tensors = find(weights).weights[0].open()
        table = next((name for name in self._tensors.entries if name.endswith(_TABLE)), _TABLE)
        self._prefix = table.removesuffix(_TABLE)  # "model." in the released file, longer beside a vision tower
        try:
            document = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
            dtype = torch.float32 if table not in self._tensors.entries else self._tensors.read(table).dtype
            self.config = read_gemma_config(document, dtype)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = error if type(error) is ValueError else repr(error)
            where = self.folder / CONFIG
            raise ExportError(f"{where} is no configuration of Gemma 3's text model: {reason}.") from None
        self._check_weights()
        self._check_tokenizer()

    def module(self) -> GemmaEncoder:
        made: GemmaEncoder = on_meta(lambda: GemmaEncoder(self.config))  # type: ignore[assignment]
        return made

    def check(self, width: int) -> None:
        """Raises ExportError unless its features have the `width` that the transformer reads."""
        if self.config.dim != width:
            raise ExportError(
                f"{self.folder} makes text features of width {self.config.dim}, and this model reads {width}: they do "
                "not belong together. Take gemma-3-1b-it."
            )

    def tensor(self, name: str) -> Tensor:
        return from_halves(name, self._tensors.read(self._stored(name)), self.config.head_dim)

    def null_features(self, length: int) -> Tensor:
        """Features float32 `[length, E]` of the empty prompt, of the stored weights in float32, one block at a time."""
        encoder = self.module()

        def fill(module: nn.Module, path: str) -> None:
            state = {key: self.tensor(f"{path}.{key}").float() for key in module.state_dict()}
            module.load_state_dict(state, assign=True)

        def blocks() -> Iterator[Block]:
            for number, block in enumerate(cast(list[Block], encoder.blocks)):
                fill(block, f"blocks.{number}")
                yield block
                block.to("meta")

        fill(encoder.norm, "norm")
        with torch.no_grad():
            return encoder.null_features(self.tensor("token_embedding.weight")[[BOS_ID, PAD_ID]], length, blocks())

    def sha256(self) -> dict[str, str]:
        found = {}
        for path in (*self._tensors.files, self.tokenizer):
            with open(path, "rb", buffering=0) as file:
                found[f"text encoder {path.name}"] = sha256_hex(file)
        return found

    def _stored(self, name: str) -> str:
        return self._prefix + name.replace("blocks.", "layers.").replace("token_embedding.", "embed_tokens.")

    def _check_weights(self) -> None:
        """Raises ExportError unless the text model's tensors are those of the configuration and no others."""
        entries = self._tensors.entries
        found = {name: entry.shape for name, entry in entries.items() if name.startswith(self._prefix)}
        found.pop("lm_head.weight", None)  # where there is no prefix; the embedding once more
        wanted = {self._stored(name): tuple(weight.shape) for name, weight in self.module().named_parameters()}
        wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        if wrong:
            have, want = (list(there[wrong[0]]) if wrong[0] in there else "nothing" for there in (found, wanted))
            raise ExportError(
                f"the weights in {self.folder} are not those of its {CONFIG}: they have {have} as {wrong[0]} where "
                f"{want} belongs. Copy the folder again."
            )

    def _check_tokenizer(self) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            model = SentencePieceProcessor(model_proto=self.tokenizer.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ExportError(f"{self.tokenizer} is no sentencepiece model ({error}): copy it again.") from None
        ids = model.bos_id(), model.pad_id()
        if ids != (BOS_ID, PAD_ID) or model.vocab_size() > self.config.vocab_size:
            raise ExportError(
                f"{self.tokenizer} has {model.vocab_size()} words, {ids[0]} as the first token and {ids[1]} for "
                f"padding; Gemma has {self.config.vocab_size}, {BOS_ID} and {PAD_ID}: it belongs to another model."
            )
