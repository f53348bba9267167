"""A complete bundle with tiny made-up graphs: all that a reader, an engine or the runtime needs, written in 0.2 s.

The graphs have the names, tensors and symbolic shapes of a real bundle (opset 23, external weights) and compute
something smooth and deterministic that depends on every input; they are no model. Weights come from fixed seeds.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

DIM, HEADS, HEAD_DIM = 32, 2, 16
TEXT_LENGTH, TEXT_DIM, VOCABULARY = 32, 64, 64
CHANNELS, STRIDE, CACHES = 16, 8, 32
MEAN = [0.05 * (channel - 8) for channel in range(CHANNELS)]
STD = [1.0 + 0.05 * channel for channel in range(CHANNELS)]

SENTENCES = [
    "a red circle moving right on a black background",
    "a small blue square growing slowly on a gray background",
    "a green triangle spinning fast on a navy background",
    "a large yellow star bouncing up and down",
    "the white circle shrinks while the cyan square moves left",
    "an orange star drifts across a magenta backdrop",
]
SECOND = ("backbone_2", "flow_head_2")
"""A second transformer of family "wan": the same graphs with other weights."""
GRAPHS = ("text_encoder", "backbone", "flow_head", "update", "decoder_first", "decoder_step")


class GraphBuilder:
    """Collects nodes, weights and interface of one graph; weights come from a generator seeded by the graph's name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[dict] = []
        self.outputs: list[dict] = []
        self._rng = np.random.default_rng(list(name.encode()))

    def input(self, name: str, shape: list, dtype: str = "float32") -> str:
        self.inputs.append({"name": name, "dtype": dtype, "shape": shape})
        return name

    def output(self, name: str, shape: list, dtype: str = "float32") -> None:
        self.outputs.append({"name": name, "dtype": dtype, "shape": shape})

    def constant(self, value: object, dtype: type = np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, *shape: int, gain: float = 1.0) -> str:
        """Normal weights scaled so that a product over the second-last dimension keeps its size."""
        fan_in = shape[-2] if len(shape) == 2 else int(np.prod(shape[1:]))
        return self.constant(self._rng.normal(0, gain / np.sqrt(max(fan_in, 1)), shape))

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name=f"n{len(self.nodes)}", **attributes))
        return out

    def attention(self, query: str, key: str, value: str) -> str:
        return self.op("Attention", query, key, value, q_num_heads=HEADS, kv_num_heads=HEADS)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [_value_info(tensor) for tensor in self.inputs],
            [_value_info(tensor) for tensor in self.outputs],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def _value_info(tensor: dict) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        tensor["name"], getattr(TensorProto, _ONNX_TYPES[tensor["dtype"]]), tensor["shape"]
    )


_ONNX_TYPES = {"float32": "FLOAT", "int64": "INT64", "uint8": "UINT8", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
_LATENTS = ["batch", CHANNELS, "frames", "height", "width"]
_ROPE = ["tokens", HEAD_DIM // 2]


def _rope(g: GraphBuilder, x: str, cos: str, sin: str) -> str:
    """Rotates `x` [B,N,D]; the tables [N, head_dim/2] get the batch dimension that the operator wants."""
    one = g.constant([1], np.int64)
    batch = g.op("Shape", x, start=0, end=1)
    repeat = g.op("Concat", batch, one, one, axis=0)
    axis = g.constant([0], np.int64)
    tables = [g.op("Expand", g.op("Unsqueeze", table, axis), repeat) for table in (cos, sin)]
    return g.op("RotaryEmbedding", x, *tables, num_heads=HEADS, interleaved=1)


def _patchify(g: GraphBuilder, x: str) -> tuple[str, str]:
    """Tokens [B,N,D] of latents, and the shape of the patch grid."""
    patches = g.op("Conv", x, g.weight(DIM, CHANNELS, 1, 2, 2), kernel_shape=[1, 2, 2], strides=[1, 2, 2])
    flat = g.op("Reshape", patches, g.constant([0, DIM, -1], np.int64))
    return g.op("Transpose", flat, perm=[0, 2, 1]), g.op("Shape", patches)


def _add_time(g: GraphBuilder, x: str, time: str, holds: bool = False) -> str:
    """With `holds`, tokens of held frames are told 0: there the sine is 0."""
    embedded = g.op("Mul", g.op("Unsqueeze", time, g.constant([1, 2], np.int64)), g.weight(1, 1, DIM))
    told = g.op("Sin", embedded)
    if not holds:
        return g.op("Add", x, told)
    held = g.input("held", ["frames"])
    shape = (g.constant([0], np.int64), g.op("Shape", held), g.constant([-1, DIM], np.int64))
    apart = g.op("Reshape", x, g.op("Concat", *shape, axis=0))
    free = g.op("Sub", g.constant(1.0), g.op("Reshape", held, g.constant([-1, 1, 1], np.int64)))
    told = g.op("Mul", g.op("Unsqueeze", told, g.constant([1], np.int64)), free)
    return g.op("Reshape", g.op("Add", apart, told), g.constant([0, -1, DIM], np.int64))


def backbone(flow_map: bool = False, name: str = "backbone", holds: bool = False) -> GraphBuilder:
    """With `flow_map`, told the time to go to as well; with `holds`, which frames are held."""
    g = GraphBuilder(name)
    x, t = g.input("x", _LATENTS), g.input("t", ["batch"])
    prompt = g.input("prompt_embeds", ["batch", "text", TEXT_DIM])
    cos, sin = g.input("rope_cos", _ROPE), g.input("rope_sin", _ROPE)
    tokens, _ = _patchify(g, x)
    tokens = _add_time(g, tokens, t, holds)
    if flow_map:
        tokens = _add_time(g, tokens, g.input("r", ["batch"]))
    query = _rope(g, g.op("MatMul", tokens, g.weight(DIM, DIM)), cos, sin)
    key = _rope(g, g.op("MatMul", tokens, g.weight(DIM, DIM)), cos, sin)
    tokens = g.op("Add", tokens, g.attention(query, key, g.op("MatMul", tokens, g.weight(DIM, DIM))))
    context = g.op("MatMul", prompt, g.weight(TEXT_DIM, DIM), out="context")
    tokens = g.op("Add", tokens, g.attention(tokens, context, context))
    g.op("LayerNormalization", tokens, g.constant(np.ones(DIM)), axis=-1, out="features")
    g.output("features", ["batch", "tokens", DIM])
    g.output("context", ["batch", "text", DIM])
    return g


def flow_head() -> GraphBuilder:
    """y_next = y - (s - r)(noise - head): the inner update of the sampler around a made-up head."""
    g = GraphBuilder("flow_head")
    y, noise = g.input("y", _LATENTS), g.input("noise", _LATENTS)
    s, r = g.input("s", ["batch"]), g.input("r", ["batch"])
    features = g.input("features", ["batch", "tokens", DIM])
    context = g.input("context", ["batch", "text", DIM])
    cos, sin = g.input("rope_cos", _ROPE), g.input("rope_sin", _ROPE)
    tokens, grid = _patchify(g, y)
    tokens = _add_time(g, g.op("Add", tokens, features), s)
    rotated = _rope(g, tokens, cos, sin)
    tokens = g.op("Add", tokens, g.attention(rotated, rotated, tokens))
    tokens = g.op("Add", tokens, g.attention(tokens, context, context))
    tokens = g.op("LayerNormalization", tokens, g.constant(np.ones(DIM)), axis=-1)
    volume = g.op("Reshape", g.op("Transpose", tokens, perm=[0, 2, 1]), grid)
    head = g.op("ConvTranspose", volume, g.weight(DIM, CHANNELS, 1, 2, 2), kernel_shape=[1, 2, 2], strides=[1, 2, 2])
    step = g.op("Unsqueeze", g.op("Sub", s, r), g.constant([1, 2, 3, 4], np.int64))
    g.op("Sub", y, g.op("Mul", step, g.op("Sub", noise, head)), out="y_next")
    g.output("y_next", _LATENTS)
    return g


def velocity_head(flow_map: bool = False, name: str = "flow_head", holds: bool = False) -> GraphBuilder:
    """The second graph of families "wan" and "anyflow": the velocity straight from the features; of x it uses the
    shape."""
    g = GraphBuilder(name)
    x, t = g.input("x", _LATENTS), g.input("t", ["batch"])
    features = g.input("features", ["batch", "tokens", DIM])
    context = g.input("context", ["batch", "text", DIM])
    cos, sin = g.input("rope_cos", _ROPE), g.input("rope_sin", _ROPE)
    _, grid = _patchify(g, x)
    tokens = _add_time(g, features, t, holds)
    if flow_map:
        tokens = _add_time(g, tokens, g.input("r", ["batch"]))
    rotated = _rope(g, tokens, cos, sin)
    tokens = g.op("Add", tokens, g.attention(rotated, rotated, tokens))
    tokens = g.op("Add", tokens, g.attention(tokens, context, context))
    tokens = g.op("LayerNormalization", tokens, g.constant(np.ones(DIM)), axis=-1)
    volume = g.op("Reshape", g.op("Transpose", tokens, perm=[0, 2, 1]), grid)
    weight = g.weight(DIM, CHANNELS, 1, 2, 2)
    g.op("ConvTranspose", volume, weight, kernel_shape=[1, 2, 2], strides=[1, 2, 2], out="velocity")
    g.output("velocity", _LATENTS)
    return g


def update(latents: list | None = None, holds: bool = False) -> GraphBuilder:
    """The next x of a velocity, as docs/bundle.md says; with `holds` of a model that holds frames."""
    g = GraphBuilder("update")
    names = ("x", "velocity", "negative", "noise", "before_1", "before_2")
    x, velocity, negative, noise, before_1, before_2 = (g.input(name, latents or _LATENTS) for name in names)
    coefficients = g.input("coefficients", [7])
    guidance, t, *factors = (g.op("Gather", coefficients, g.constant([k], np.int64)) for k in range(7))
    v = g.op("Add", negative, g.op("Mul", guidance, g.op("Sub", velocity, negative)))
    terms = [g.op("Mul", factor, z) for factor, z in zip(factors, (x, v, noise, before_1, before_2), strict=True)]
    total = terms[0]
    for k, term in enumerate(terms[1:], 1):
        total = g.op("Add", total, term, out="x_next" if k == 4 and not holds else None)
    data = g.op("Sub", x, g.op("Mul", t, v), out=None if holds else "data")
    if holds:
        held = g.op("Reshape", g.input("held", ["frames"]), g.constant([-1, 1, 1], np.int64))
        kept = g.op("Mul", g.input("picture", [*_LATENTS[:2], 1, *_LATENTS[3:]]), held)
        free = g.op("Sub", g.constant(1.0), held)
        g.op("Add", g.op("Mul", data, free), kept, out="data")
        total = g.op("Add", g.op("Mul", total, free), kept, out="x_next")
    size = g.op("ReduceMean", g.op("Abs", total), keepdims=0)
    g.op("Reshape", size, g.constant([1], np.int64), out="magnitude")
    g.output("x_next", latents or _LATENTS)
    g.output("data", latents or _LATENTS)
    g.output("magnitude", [1])
    return g


def text_encoder(padded: bool = True) -> GraphBuilder:
    g = GraphBuilder("text_encoder")
    ids = g.input("input_ids", ["batch", "text"], "int64")
    table = g.weight(VOCABULARY, TEXT_DIM, gain=np.sqrt(VOCABULARY))
    if padded:
        mask = g.input("attention_mask", ["batch", "text"], "int64")
        keep = g.op("Unsqueeze", g.op("Cast", mask, to=TensorProto.FLOAT), g.constant([2], np.int64))
        g.op("Mul", g.op("Gather", table, ids), keep, out="prompt_embeds")
    else:
        g.op("Gather", table, ids, out="prompt_embeds")
    g.output("prompt_embeds", ["batch", "text", TEXT_DIM])
    return g


def _decoder(name: str, frames: int) -> GraphBuilder:
    """`frames` images from one latent frame; the step form reads what the previous call left in the caches."""
    g = GraphBuilder(name)
    latents = g.input("latents", ["batch", CHANNELS, 1, "height", "width"])
    shape = [1, CHANNELS, 1, 1, 1]
    std, mean = g.constant(np.reshape(STD, shape)), g.constant(np.reshape(MEAN, shape))
    z = g.op("Add", g.op("Mul", latents, std), mean)
    cache_shape = ["batch", 1, 1, "height", "width"]
    old = [g.input(f"cache_{k:02d}", cache_shape) for k in range(CACHES)] if name == "decoder_step" else []
    level = g.op("ReduceMean", z, g.constant([1], np.int64), keepdims=1)
    for k in range(CACHES):
        new = g.op("Mul", level, g.constant((k + 1) / CACHES))
        if old:
            new = g.op("Add", new, g.op("Mul", old[k], g.constant(0.5)), out=f"cache_{k:02d}_next")
        else:
            new = g.op("Identity", new, out=f"cache_{k:02d}")
    if old:
        z = g.op("Add", z, g.op("Sum", *old))
    kernel = [frames, STRIDE, STRIDE]
    pixels = g.op("ConvTranspose", z, g.weight(CHANNELS, 3, *kernel), kernel_shape=kernel, strides=kernel)
    scaled = g.op("Add", g.op("Mul", g.op("Tanh", pixels), g.constant(127.5)), g.constant(127.5))
    size = g.op("ReduceMean", g.op("Abs", pixels), keepdims=0)
    g.op("Reshape", size, g.constant([1], np.int64), out="magnitude")
    bytes_ = g.op("Cast", g.op("Round", scaled), to=TensorProto.UINT8)
    g.op("Transpose", bytes_, perm=[0, 2, 3, 4, 1], out="frames")
    g.output("frames", ["batch", frames, f"{STRIDE}*height", f"{STRIDE}*width", 3], "uint8")
    g.output("magnitude", [1])
    for k in range(CACHES):
        g.output(f"cache_{k:02d}_next" if old else f"cache_{k:02d}", cache_shape)
    return g


def encoder() -> GraphBuilder:
    """Every square of pixels to one latent, each for itself."""
    g = GraphBuilder("encoder")
    frames = g.input("frames", ["batch", 1, f"{STRIDE}*height", f"{STRIDE}*width", 3], "uint8")
    video = g.op("Transpose", g.op("Cast", frames, to=TensorProto.FLOAT), perm=[0, 4, 1, 2, 3])
    kernel = [1, STRIDE, STRIDE]
    pixels = g.op("Div", video, g.constant(128.0))
    g.op("Conv", pixels, g.weight(CHANNELS, 3, *kernel), kernel_shape=kernel, strides=kernel, out="latents")
    g.output("latents", [*_LATENTS[:2], 1, *_LATENTS[3:]])
    return g


def decoder_first() -> GraphBuilder:
    return _decoder("decoder_first", 1)


def decoder_step() -> GraphBuilder:
    return _decoder("decoder_step", 4)


@lru_cache(maxsize=1)
def tokenizer_bytes() -> bytes:
    """A sentencepiece model trained on `SENTENCES`: pad 0, eos 1, unk 2."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_graph(folder: Path, builder: GraphBuilder) -> dict:
    """Writes `<name>.onnx` and, for large weights, `<name>.onnx.data`; returns the graph's manifest entry."""
    file = f"{builder.name}.onnx"
    onnx.save_model(
        builder.model(),
        folder / file,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=file + ".data",
        size_threshold=128,  # shapes must stay in the file itself: shape inference reads them
    )
    return {
        "file": file,
        "data": file + ".data" if (folder / (file + ".data")).exists() else None,
        "opset": 23,
        "precision": "fp32",
        "inputs": builder.inputs,
        "outputs": builder.outputs,
        "accuracy": {"max_abs_error": 0.0, "cosine": 1.0, "reference": "itself"},
    }


def velocity_sampler(**changes: object) -> dict:
    """A `sampler` for family "wan": Wan's own grid with a few UniPC steps, unless `changes` says otherwise."""
    return {
        "rule": "unipc",
        "steps": 3,
        "allowed_steps": None,
        "shift": 3.0,
        "times": None,
        "time_rounding": "integer",
        "init_scale": 1.0,
        "guidance": 1.0,
        "negative_prompt": None,
        **changes,
    }


def flow_map_sampler(**changes: object) -> dict:
    """A `sampler` for family "anyflow"."""
    return {"rule": "euler", "steps": 3, "shift": 5.0, "guidance": 1.0, "negative_prompt": None, **changes}


def _is_flow_map(sampler: dict | None) -> bool:
    return sampler is not None and "time_rounding" not in sampler


def manifest_without_files(graphs: dict, sampler: dict | None = None) -> dict:
    """The manifest of the synthetic model around the given graph entries, as `BundleWriter.commit` takes it.

    With a `sampler` it is of family "wan" (see `velocity_sampler`) or "anyflow" (`flow_map_sampler`).
    """
    document = _student_manifest(graphs)
    if sampler is not None:
        document["model"]["family"] = "anyflow" if _is_flow_map(sampler) else "wan"
        del document["model"]["fusion"]
        document["sampler"] = sampler
    return document


def _student_manifest(graphs: dict) -> dict:
    return {
        "schema_version": 2,
        "model": {
            "name": "synthetic",
            "family": "tmd",
            "architecture": "wan2.1-t2v",
            "dim": DIM,
            "num_layers": 2,
            "head_blocks": 1,
            "num_heads": HEADS,
            "head_dim": HEAD_DIM,
            "patch_size": [1, 2, 2],
            "fusion": "gated",
        },
        "sampler": {
            "rule": "euler",
            "steps": 2,
            "inner_steps": 2,
            "allowed_steps": [1, 2, 3, 4],
            "allowed_inner_steps": [1, 2, 4],
            "shift": 10.0,
            "inner_shift": 10.0,
            "t_max": 0.999,
        },
        "latents": {
            "channels": CHANNELS,
            "temporal_stride": 4,
            "spatial_stride": STRIDE,
            "mean": [*MEAN],
            "std": [*STD],
        },
        "video": {"frames": 17, "width": 64, "height": 64, "fps": 8},
        "text": {
            "tokenizer": "tokenizer.model",
            "max_length": TEXT_LENGTH,
            "dim": TEXT_DIM,
            "pad_id": 0,
            "eos_id": 1,
        },
        "graphs": graphs,
        "provenance": {
            "source": "tests/helpers/synthetic.py",
            "source_sha256": {},
            "tool": "tests",
            "versions": {"onnx": onnx.__version__},
            "created": "2026-01-01T00:00:00Z",
        },
    }


def take_wan22_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, what is written here has the latents of Wan2.2-TI2V-5B: 48 channels for 4x16x16 pixels."""
    changes = {"CHANNELS": 48, "STRIDE": 16, "MEAN": 3 * MEAN, "STD": 3 * STD}
    for name, value in (changes | {"_LATENTS": ["batch", 48, "frames", "height", "width"]}).items():
        monkeypatch.setitem(globals(), name, value)


def write_synthetic_bundle(
    folder: str | Path, graphs: tuple[str, ...] = GRAPHS, sampler: dict | None = None, holds: bool = False
) -> Path:
    """Writes a complete, valid bundle under the new folder `folder` with the named graphs; returns its path.

    With a `sampler` it is of another family, see `manifest_without_files`; with `holds` one of family "wan" that can
    hold a picture as the first frame.
    """
    from tmd_engines import BundleWriter

    flow_map = _is_flow_map(sampler)
    with BundleWriter(folder) as writer:
        builders = {
            **globals(),
            "backbone": lambda: backbone(flow_map, holds=holds),
            "flow_head": flow_head if sampler is None else lambda: velocity_head(flow_map, holds=holds),
            "update": lambda: update(holds=holds),
        }
        builders |= {
            "backbone_2": lambda: backbone(name="backbone_2"),
            "flow_head_2": lambda: velocity_head(name="flow_head_2"),
        }
        entries = {name: write_graph(writer.folder, builders[name]()) for name in graphs}
        (writer.folder / "tokenizer.model").write_bytes(tokenizer_bytes())
        document = manifest_without_files(entries, sampler)
        if holds:
            document["model"]["first_frame"] = True
        return writer.commit(document).folder
