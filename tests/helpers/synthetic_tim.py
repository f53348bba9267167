"""A complete bundle of family "tim" with tiny made-up graphs, beside the one of `synthetic.py`: for a prompt, or of
numbered classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.helpers.synthetic import (
    _ROPE,
    CHANNELS,
    DIM,
    TEXT_DIM,
    TEXT_LENGTH,
    GraphBuilder,
    _add_time,
    _patchify,
    _rope,
    _student_manifest,
    decoder_first,
    encoder,
    text_encoder,
    tokenizer_bytes,
    update,
    write_graph,
)

CLASSES = 5
_STILL = ["batch", CHANNELS, 1, "height", "width"]


def backbone(classes: bool) -> GraphBuilder:
    """What depends on the prompt, or on the class, alone."""
    g = GraphBuilder("backbone")
    if classes:
        labels = g.input("labels", ["batch"], "int64")
        rows = g.op("Gather", g.weight(CLASSES + 1, DIM, gain=2.0), labels)
        g.op("Unsqueeze", rows, g.constant([1], np.int64), out="context")
        g.output("context", ["batch", 1, DIM])
    else:
        prompt = g.input("prompt_embeds", ["batch", "text", TEXT_DIM])
        g.op("MatMul", prompt, g.weight(TEXT_DIM, DIM), out="context")
        g.output("context", ["batch", "text", DIM])
    return g


def flow_head(classes: bool) -> GraphBuilder:
    """x_next = x - (t - r)·(guidance·F) around a made-up F of everything that goes in."""
    g = GraphBuilder("flow_head")
    x, t, r = g.input("x", _STILL), g.input("t", ["batch"]), g.input("r", ["batch"])
    guidance = g.input("guidance", ["batch", "batch"])
    context = g.input("context", ["batch", 1 if classes else "text", DIM])
    cos, sin = g.input("rope_cos", _ROPE), g.input("rope_sin", _ROPE)
    tokens, grid = _patchify(g, x)
    tokens = _add_time(g, _add_time(g, tokens, t), r)
    rotated = _rope(g, tokens, cos, sin)
    tokens = g.op("Add", tokens, g.attention(rotated, rotated, tokens))
    # A model of classes has one attention per block, and adds its single row.
    tokens = g.op("Add", tokens, context if classes else g.attention(tokens, context, context))
    tokens = g.op("LayerNormalization", tokens, g.constant(np.ones(DIM)), axis=-1)
    volume = g.op("Reshape", g.op("Transpose", tokens, perm=[0, 2, 1]), grid)
    f = g.op("ConvTranspose", volume, g.weight(DIM, CHANNELS, 1, 2, 2), kernel_shape=[1, 2, 2], strides=[1, 2, 2])
    flat = g.op("Reshape", f, g.constant([0, -1], np.int64))
    mixed = g.op("Reshape", g.op("MatMul", guidance, flat), g.op("Shape", x))
    step = g.op("Unsqueeze", g.op("Sub", t, r), g.constant([1, 2, 3, 4], np.int64))
    g.op("Sub", x, g.op("Mul", step, mixed), out="x_next")
    g.output("x_next", _STILL)
    return g


def write_plain_bundle(folder: str | Path) -> Path:
    """One with guidance whose prompts keep their length, and that holds the embeddings of the empty prompt, as those
    with Gemma for a text encoder; returns its path."""
    return write_tim_bundle(folder, guidance=3.0, plain=True)


def write_tim_bundle(
    folder: str | Path, classes: bool = False, guidance: float = 1.0, pictures: bool = False, plain: bool = False
) -> Path:
    """Writes a complete, valid bundle of family "tim" under the new folder `folder`, with `pictures` one that can start
    from them; returns its path."""
    from tmd_engines import BundleWriter

    builders = [
        backbone(classes),
        flow_head(classes),
        update(_STILL),
        decoder_first(),
        *([encoder()] if pictures else []),
    ]
    with BundleWriter(folder) as writer:
        entries = {builder.name: write_graph(writer.folder, builder) for builder in builders}
        if not classes:
            entries["text_encoder"] = write_graph(writer.folder, text_encoder(padded=not plain))
            (writer.folder / "tokenizer.model").write_bytes(tokenizer_bytes())
        document = _student_manifest(entries)
        sizes = {"num_layers": 1, "head_blocks": 1, "classes": CLASSES if classes else None}
        document["model"] |= {"family": "tim", "architecture": "tim", "rope": "index", **sizes}
        del document["model"]["fusion"]
        document["sampler"] = {"rule": "flow_map", "steps": 4, "guidance": guidance}
        document["video"] = {"frames": 1, "width": 64, "height": 64, "fps": 1}
        if classes:
            document["text"] |= {"tokenizer": None}
        if plain:
            rows = np.random.default_rng(5).normal(size=(TEXT_LENGTH, TEXT_DIM)).astype("<f4")
            (writer.folder / "null.bin").write_bytes(rows.tobytes())
            table = {"file": "null.bin", "dtype": "float32", "rows": TEXT_LENGTH, "dim": TEXT_DIM}
            document["text"] |= {"tokenization": "plain", "bos_id": 2, "eos_id": None, "null_embeds": table}
        return writer.commit(document).folder
