"""A model with random weights: whole, or with fewer of its transformer blocks where that takes too long or does not
fit; with a tokenizer, so that its text encoder can be measured.

The blocks are alike, so ratios between contenders are close to the whole's; embeddings and output layer weigh more. The
tokenizer is the built-in model's, whose words the larger vocabulary holds too.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from tmd_engines.command.signals import Ending
from tmd_export import ExportError, RandomSource, export_bundle, open_source
from tmd_export.parts import ordered
from tmd_export.sources.source import TOKENIZER, built_in_folder

from .families import default_preset


def random_model(model: str, seed: int, kind: str, blocks: int | None) -> RandomSource:
    """`model` with random weights and so many blocks (None: all), of which the flow head gets its share of the whole.

    Raises ValueError if there are too few for a backbone and a flow head, or more than the model has.
    """
    whole: Any = open_source(model, random_seed=seed, preset=default_preset(kind, model))
    if blocks is None:
        return whole
    layers = whole.wan.num_layers
    if not 2 <= blocks <= layers:
        raise ValueError(f"{model} cannot have {blocks} blocks: choose 2 to {layers}.")
    head = max(1, round(blocks * whole.head_blocks / layers))
    wan = replace(whole.wan, num_layers=blocks)
    source = RandomSource(model, seed, fusion=whole.fusion, wan=wan, head_blocks=head)
    source.model = f"{model}-{blocks}-blocks"
    return source


def main() -> None:
    """`python -m tmd_bench.random_model PLAN`: writes a bundle. PLAN is JSON: origin, parts, precision and out."""
    Ending()
    plan = json.loads(sys.argv[1])
    try:
        source = random_model(plan["model"], plan["random_seed"], plan["kind"], plan["blocks"])
        source.tokenizer = built_in_folder() / TOKENIZER
        export_bundle(
            source, plan["out"], ordered(plan["parts"].split(",")), precision=plan["precision"],
            text_encoder_weights=plan["text_encoder_weights"], preset=default_preset(plan["kind"], plan["model"]),
            verify=False, keep_layers=False,  # which of their layers suffer most says nothing about trained ones
        )  # fmt: skip
    except (ExportError, ValueError) as error:
        sys.exit(f"tmd-bench: {error}")


if __name__ == "__main__":
    main()
