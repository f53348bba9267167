"""Gemma as the text encoder of tim-t2i: transformers is what it is held to, from tokens to the latents of a run."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel, GemmaTokenizer

from tests.helpers.results import result_latents
from tests.helpers.tim_models import TEXT_16, network
from tmd_engines import Bundle, load
from tmd_engines.tensorrt.lowering import lower
from tmd_export import ExportError, ExportResult, export_bundle, graph_export, open_source
from tmd_export.cli import command as export_command
from tmd_export.families.tim import TIM as TIM_FAMILY
from tmd_export.graphs import text as graphs
from tmd_export.quantization.samplings import Samplings
from tmd_export.sources.gemma import CONFIG, INDEX, TOKENIZER, WEIGHTS, GemmaFolder, read_gemma_config
from tmd_export.sources.tim import RandomTiM, TiMFolder
from tmd_export.weights import tables as embedding
from tmd_ref.gemma import GemmaEncoder
from tmd_ref.tim.sampling import tim_sample
from tmd_runtime import RuntimeFailure, UsageFailure
from tmd_runtime.command.cli import command
from tmd_runtime.files.tensor_files import load_embeds
from tmd_runtime.pipeline import Pipeline
from tmd_runtime.sampling.noise import NoiseStream
from tmd_runtime.text.tokenizer import Tokenizer

WIDTH, LENGTH = 32, 24
TIM = replace(TEXT_16, num_layers=1, text_dim=WIDTH, text_len=LENGTH)
SENTENCES = ["a red circle on a black background", "two blue squares; 123 left-to-right!", "A photo of  an astronaut"]
PROMPT = "a red  circle, Überraschung &amp; 日本"
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 6,
    "sliding_window_pattern": 3,  # sliding, sliding, full, sliding
    "query_pre_attn_scalar": 24,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
RELEASED: dict[str, Any] = {  # what counts of the config.json of gemma-3-1b-it
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


def tokenizer_bytes(**changes: Any) -> bytes:
    """A tokenizer with Gemma's settings and marks, of few words."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=model, model_type="bpe", vocab_size=340,
        hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, split_digits=True, minloglevel=2, num_threads=1, bos_piece="<bos>",
        eos_piece="<eos>", **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, **changes},
    )  # fmt: skip
    return model.getvalue()


def library(words: int, **changes: Any) -> Gemma3ForCausalLM:
    """Theirs with random weights, none of them at its first value."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(vocab_size=words, **{**SMALL, **changes, "attn_implementation": "eager"})
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.normal_(0.0, 0.3 if "norm" in name else weight.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma")
    (path / TOKENIZER).write_bytes(tokenizer_bytes())
    library(352).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Gemma3TextModel:
    return Gemma3TextModel.from_pretrained(folder, attn_implementation="eager").eval().requires_grad_(False)


def features(model: Gemma3TextModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids).last_hidden_state


def null_features(model: Gemma3TextModel, tokens: tuple[int, ...] = (2,)) -> Tensor:
    """[LENGTH, E] of padded tokens, those of the empty prompt if none are said, as FlashAttention-2 makes them: no
    attention to padding, and zeros as what padding gets of it."""
    count = len(tokens)

    def nothing_for_padding(_: Any, given: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.cat((given[0][:, :count], torch.zeros_like(given[0][:, count:])), dim=1),)

    layers: Any = model.layers
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(nothing_for_padding) for layer in layers]
    ids, mask = torch.zeros(2, 1, LENGTH, dtype=torch.int64)
    ids[0, :count], mask[0, :count] = torch.tensor(tokens), 1
    try:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[0]
    finally:
        for hook in hooks:
            hook.remove()


def ours(folder: Path) -> GemmaEncoder:
    source = GemmaFolder(folder)
    model = source.module()
    model.load_state_dict({name: source.tensor(name) for name in model.state_dict()}, assign=True)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "rope_scaling": None, "sliding_window": 100},
        {"num_key_value_heads": 4, "sliding_window_pattern": 1, "query_pre_attn_scalar": 16, "rms_norm_eps": 1e-3},
    ],
)
def test_the_encoder_is_that_of_transformers(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copy(folder / TOKENIZER, tmp_path)
    library(352, **changes).save_pretrained(tmp_path)
    model = Gemma3TextModel.from_pretrained(tmp_path, attn_implementation="eager")
    for tokens in (1, 5, 6, 7, LENGTH):
        ids = torch.randint(0, 352, (2, tokens))
        expected = features(model, ids)
        assert expected.std() > 0.5
        torch.testing.assert_close(ours(tmp_path)(ids), expected, rtol=0, atol=2e-5)


def test_the_released_configuration_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    theirs: Any = Gemma3TextConfig(**RELEASED)
    assert theirs.rope_parameters["full_attention"]["rope_theta"] == 1e6
    for document in (RELEASED, {"text_config": RELEASED}, json.loads(json.dumps(theirs.to_dict()))):
        config = read_gemma_config(document, torch.bfloat16)
        assert config.sliding == tuple(kind == "sliding_attention" for kind in theirs.layer_types)
        assert (config.theta, config.local_theta, config.rope_factor, config.window) == (1e6, 1e4, 1.0, 512)
        assert config.embedding_factor == 34.0 == float(torch.tensor(1152**0.5).bfloat16())
    with torch.device("meta"):
        wanted = sum(weight.numel() for weight in Gemma3TextModel(theirs).parameters())
        assert sum(weight.numel() for weight in GemmaEncoder(config).parameters()) == wanted == 999_885_952
    for changes, said in (
        ({"hidden_activation": "silu"}, "hidden_activation is silu"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "the rule yarn"),
        ({"layer_types": ["full_attention"]}, "for each of 26 layers"),
        ({"model_type": "gemma2"}, "not gemma3_text"),
    ):
        with pytest.raises(ValueError, match=said):
            read_gemma_config({**RELEASED, **changes}, torch.float32)


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RandomTiM, ExportResult]:
    source = RandomTiM("tim-t2i", 3, TIM)
    source.take_text_encoder(folder)
    assert source.default_parts == ("text_encoder", "backbone", "flow_head")
    return source, export_bundle(source, tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def large(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportResult]:
    """As a large model is exported: bfloat16 in shards, its table outside of the graph, few blocks compared."""
    shards = tmp_path_factory.mktemp("shards")
    library(352).bfloat16().save_pretrained(shards, max_shard_size="20KB")
    assert (shards / INDEX).is_file()
    shutil.copy(folder / TOKENIZER, shards)
    source = RandomTiM("tim-t2i", 3, TIM)
    source.take_text_encoder(shards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "TABLE_BYTES", 0)
        patch.setattr(graph_export, "LARGE_BYTES", 0)
        return shards, export_bundle(
            source, tmp_path_factory.mktemp("bundle") / "b", ("text_encoder",), precision="bf16"
        )


def run(bundle: Bundle, given: dict[str, np.ndarray], engine: str) -> np.ndarray:
    with load(bundle, "text_encoder", engine) as loaded:
        out = loaded.empty("prompt_embeds", batch=1, text=next(iter(given.values())).shape[1])
        loaded.run(given, {"prompt_embeds": out})
        return out


@pytest.mark.long
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("tokens", [1, 5, LENGTH])
def test_graphs_give_the_features_of_transformers(
    exported: Any, large: Any, theirs: Gemma3TextModel, engine: str, tokens: int
) -> None:
    pytest.importorskip(engine)
    ids = torch.randint(0, 352, (1, tokens))
    found = run(exported[1].bundle, {"input_ids": ids.numpy()}, engine)
    expected = features(theirs, ids).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    found = run(large[1].bundle, {"token_embeds": theirs.embed_tokens.weight[ids].numpy()}, engine)
    relative = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < relative < 2e-2, "weights and products in bfloat16"


def test_weights_in_bfloat16_and_shards_are_read_exactly(large: Any) -> None:
    theirs = Gemma3TextModel.from_pretrained(large[0], dtype=torch.bfloat16, attn_implementation="eager")
    ids = torch.arange(LENGTH)[None]
    scaled = theirs.embed_tokens(ids)  # their factor is rounded to the type of the table, and is another in float32
    assert torch.equal(ours(large[0])._scaled(theirs.embed_tokens.weight[ids]).bfloat16(), scaled)
    assert ours(large[0]).config.embedding_factor == 5.65625 != WIDTH**0.5
    rows = theirs.embed_tokens.weight[ids].float()
    expected = theirs.float()(inputs_embeds=rows * 5.65625).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(ours(large[0]).float()(ids), expected, rtol=0, atol=2e-5)


def test_a_large_encoder_is_compared_on_blocks_of_both_kinds(large: Any) -> None:
    (graph,) = large[1].graphs
    assert graph.accuracy is not None and "on blocks 0 and 2 and 3 of 4" in graph.accuracy.scope
    assert 0.9999 < graph.accuracy.cosine < 1
    table = large[1].bundle.manifest.text.embedding
    assert (table.dtype, table.rows, table.dim) == ("bfloat16", 352, WIDTH)
    stored = np.fromfile(large[1].bundle.folder / embedding.FILE, np.uint16).reshape(352, WIDTH)
    assert np.array_equal(stored, library(352).model.embed_tokens.weight.bfloat16().view(torch.uint16).numpy())


@pytest.mark.parametrize("version", [(10, 14), (10, 16)])
def test_lowered_for_tensorrt_it_computes_the_same(exported: Any, version: tuple[int, int]) -> None:
    bundle = exported[1].bundle
    ids = np.random.default_rng(0).integers(0, 352, (1, 9))
    model = onnx.load(bundle.graph_path("text_encoder"))
    lower(model, version, {"input_ids": ids.shape})
    assert any(node.op_type == "Attention" for node in model.graph.node) == (version > (10, 14))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids})
    np.testing.assert_allclose(found, run(bundle, {"input_ids": ids}, "onnxruntime"), rtol=0, atol=1e-5)


def test_the_empty_prompt_is_that_of_flash_attention(exported: Any, theirs: Gemma3TextModel) -> None:
    manifest = exported[1].bundle.manifest
    assert (manifest.text.tokenization, manifest.text.bos_id, manifest.text.eos_id) == ("plain", 2, None)
    expected = null_features(theirs)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    stored = np.fromfile(exported[1].bundle.folder / embedding.NULL_FILE, np.float32).reshape(LENGTH, WIDTH)
    np.testing.assert_allclose(stored, expected, rtol=0, atol=2e-5)
    longer = null_features(theirs, (2, 30, 7))
    torch.testing.assert_close(longer[:3], features(theirs, torch.tensor([[2, 30, 7]]))[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(longer[3:], expected[3:], rtol=0, atol=2e-5)  # what a shorter prompt is filled up with
    plain = features(theirs, torch.tensor([[2] + [0] * (LENGTH - 1)]))[0]
    assert (plain[1:] - expected[1:]).abs().max() > 0.1, "attention of padding would make a difference"


def test_tokens_are_those_of_transformers(folder: Path) -> None:
    expected = GemmaTokenizer.from_pretrained(folder, add_bos_token=True)
    assert (expected.bos_token_id, expected.pad_token_id) == (2, 0)
    tokenizer = Tokenizer(folder / TOKENIZER, LENGTH, 0, None, 2, plain=True)
    for prompt in (*SENTENCES, PROMPT, " two  spaces ", "line\n\nline\t", "&amp; <b>ﬁ</b>", "\0 12345"):
        tokens = tokenizer(prompt)
        assert tokens.input_ids[0].tolist() == expected(prompt, truncation=True, max_length=LENGTH).input_ids
        assert tokens.attention_mask.all() and (tokens.dropped > 0) == (tokens.warning is not None)
    assert tokenizer("", allow_empty=True).input_ids.tolist() == [[2]]
    long = tokenizer("a red circle " * 20)
    assert long.input_ids.shape == (1, LENGTH) and f"last {long.dropped} of {long.dropped + LENGTH - 1}" in str(
        long.warning
    )
    assert tokenizer("\ud800").input_ids.tolist() == tokenizer("?").input_ids.tolist()
    for nothing in ("", "  \n"):
        with pytest.raises(UsageFailure, match="prompt is empty"):
            tokenizer(nothing)


def expected_latents(
    exported: Any, theirs: Gemma3TextModel, prompt: str, negative: str, times: tuple[float, ...]
) -> Tensor:
    """What the reference samples for these prompts, with transformers' tokens and features, guidance 3, seed 5."""
    tokenizer = GemmaTokenizer.from_pretrained(theirs.config._name_or_path, add_bos_token=True)
    null = null_features(theirs)[None]
    y, other = (features(theirs, torch.tensor([tokenizer(text).input_ids])) for text in (prompt, negative))
    other = other if negative else null
    rows = max(y.shape[1], other.shape[1]) if negative else y.shape[1]
    y, other = (torch.cat((part, null[:, part.shape[1] :]), dim=1)[:, :rows] for part in (y, other))
    noise = torch.from_numpy(NoiseStream(5).normal((1, 16, 1, 2, 2)).astype(np.float32)).squeeze(2)
    return tim_sample(network(exported[0]), noise, y, times, other, 3.0, (0.0, 1.5))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("negative", ["", "bad", "a blurred photo of an astronaut"])
def test_a_run_with_guidance_is_the_reference(
    exported: Any, theirs: Gemma3TextModel, tmp_path: Path, engine: str, negative: str
) -> None:
    pytest.importorskip(engine)
    bundle = guided(exported)
    prompt = "a red circle"
    with Pipeline(bundle, engine) as pipeline:
        wishes: dict[str, Any] = {"steps": 2, "guidance": 3.0, "negative_prompt": negative, "size": (64, 64), "seed": 5}
        result = pipeline(prompt, **wishes, on_latents=lambda latents: None)
        times = pipeline.settings(**wishes).times
        expected = expected_latents(exported, theirs, prompt, negative, times)
        np.testing.assert_allclose(result_latents(result)[:, :, 0], expected, rtol=0, atol=1e-4)
        # The same by stages: features of another length, or none where the bundle has those of the empty prompt.
        given: dict[str, Any] = {"negative_embeds": pipeline.encode(negative)} if negative else {}
        found = pipeline.denoise(pipeline.encode(prompt), **wishes, **given)
        np.testing.assert_array_equal(found, result.latents)


def guided(exported: Any) -> Bundle:
    """The bundle with guidance in the first step too."""
    bundle: Bundle = exported[1].bundle
    sampler = bundle.manifest.sampler.model_copy(update={"guidance_interval": (0.0, 1.5)})
    return Bundle(bundle.folder, bundle.manifest.model_copy(update={"sampler": sampler}))


def test_embeddings_in_a_file_keep_their_length(exported: Any, tmp_path: Path) -> None:
    embeds, bundle = tmp_path / "e.safetensors", exported[1].bundle
    common = ["--bundle", str(bundle.folder), "--size", "64x64", "--seed", "5", "--steps", "2", "--guidance", "3"]
    runs = (
        ["--prompt", "a red circle", "--save-embeds", str(embeds), "--save-latents", str(tmp_path / "a.safetensors")],
        ["--embeds", str(embeds), "--save-latents", str(tmp_path / "b.safetensors")],
    )
    for options in runs:
        result = CliRunner().invoke(command, [*common, *options])
        assert result.exit_code == 0, result.output
    one, two = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in "ab")
    assert torch.equal(one, two)
    loaded = load_embeds(embeds, bundle.manifest)
    tokens = Tokenizer(bundle.folder / TOKENIZER, LENGTH, 0, None, 2, plain=True)("a red circle").input_ids.shape[1]
    assert loaded.prompt_embeds.shape == (1, tokens, WIDTH) and loaded.negative_embeds is not None
    # Without the negative prompt's in the file: on a device without text encoder, the bundle has them.
    save_file({"prompt_embeds": load_file(embeds)["prompt_embeds"]}, embeds, {"format": "tmd-embeds-1", "encoder": ""})
    graphs = {name: graph for name, graph in bundle.manifest.graphs.items() if name != "text_encoder"}
    edge = Bundle(bundle.folder, bundle.manifest.model_copy(update={"graphs": graphs}))
    with Pipeline(edge, "onnxruntime") as pipeline:
        rows = load_embeds(embeds, edge.manifest).prompt_embeds
        again = pipeline.denoise(rows, 5, 2, size=(64, 64), guidance=3.0)
        np.testing.assert_array_equal(again[0], one)
        with pytest.raises(RuntimeFailure, match=f"{LENGTH + 1} rows of embeddings"):
            pipeline.denoise(np.zeros((1, LENGTH + 1, WIDTH), np.float32), guidance=3.0)


def test_a_released_transformer_takes_it(folder: Path, tmp_path: Path) -> None:
    torch.save(network(RandomTiM("x", 0, TIM)).state_dict(), tmp_path / "t2i_model.bin")
    source = TiMFolder(tmp_path, "tim-t2i", TIM)
    assert source.null_embeds() is None and source.text_entry()["tokenization"] == "plain"
    source.take_text_encoder(folder)
    parts = ("text_encoder", "backbone", "flow_head")
    assert source.default_parts == parts and source.tokenizer == folder / TOKENIZER
    assert sorted(source.sha256(parts)) == [
        "t2i_model.bin", f"text encoder {WEIGHTS}", f"text encoder {TOKENIZER}"
    ]  # fmt: skip
    assert source.origin.endswith(f"; text encoder {folder.name}")


def test_prompts_of_a_calibration_stand_beside_the_stored_empty_one(exported: Any, theirs: Gemma3TextModel) -> None:
    bundle = exported[1].bundle
    prompts = ("a red circle", "a")
    found = Samplings(bundle.manifest, TIM_FAMILY, {}).conditions(prompts, bundle, 0)
    null = null_features(theirs)
    with Pipeline(bundle, "onnxruntime") as pipeline:
        for condition, prompt in zip(found, prompts, strict=True):
            np.testing.assert_allclose(condition.prompt, pipeline.encode(prompt), rtol=0, atol=1e-5)
            assert condition.negative is not None and condition.negative.shape == condition.prompt.shape
            np.testing.assert_allclose(condition.negative[0], null[: condition.prompt.shape[1]], rtol=0, atol=2e-5)


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    lacking, other, torn, words = (copy(name) for name in ("lacking", "other", "torn", "words"))
    (lacking / TOKENIZER).unlink()
    (other / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), "num_hidden_layers": 5}))
    (torn / CONFIG).write_text('{"model_type": "gemma3_text"}')
    (words / TOKENIZER).write_bytes(tokenizer_bytes(bos_id=-1))
    narrow = replace(TIM, text_dim=20)
    for model, config, path, said in (
        ("tim-t2i", TIM, tmp_path, f"has no {CONFIG}: --text-encoder takes Gemma's folder"),
        ("tim-t2i", TIM, lacking, f"has no {TOKENIZER}"),
        ("tim-t2i", TIM, other, "is no configuration|are not those of its config.json"),
        ("tim-t2i", TIM, torn, "is no configuration of Gemma 3's text model"),
        ("tim-t2i", TIM, words, "-1 as the first token"),
        ("tim-t2i", narrow, folder, "features of width 32, and this model reads 20"),
        ("tim-c2i-256", None, folder, "tim-c2i-256 takes no prompt"),
        ("tim-tiny", None, folder, "tim-tiny has a text encoder of its own"),
    ):
        with pytest.raises(ExportError, match=said):
            RandomTiM(model, 0, config).take_text_encoder(path)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in tensors.items() if "layers.1.mlp.up" not in name}, other / WEIGHTS)
    shutil.copy(folder / CONFIG, other)
    with pytest.raises(ExportError, match=r"have nothing as model\.layers\.1\.mlp\.up_proj\.weight where"):
        GemmaFolder(other)
    with pytest.raises(ExportError, match=r"the text encoder of wan1\.3b comes with its --checkpoint"):
        open_source("wan1.3b", None, 0, text_encoder=folder)
    assert open_source("tiny").null_embeds() is None
    options = [
        "--model",
        "tim-t2i",
        "--random-weights",
        "0",
        "--text-encoder",
        str(folder),
        "--out",
        str(tmp_path / "b"),
    ]
    result = CliRunner().invoke(export_command, options)
    assert result.exit_code == 1 and "makes text features of width 32, and this model reads 1152" in result.output
