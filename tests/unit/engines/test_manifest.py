"""The manifest accepts what the schema says, and answers everything else with one BundleError."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.documents import (
    SHA,
    parse,
    put,
    valid_document,
    valid_plain_document,
    valid_tim_document,
    valid_wan_document,
)  # fmt: skip
from tests.helpers.synthetic import text_encoder, velocity_sampler
from tmd_engines import BundleError, Manifest, TensorSpec
from tmd_engines.bundle.manifest import MAX_MANIFEST_BYTES, parse_manifest
from tmd_engines.errors import quote


def test_valid_manifest_survives_a_round_trip() -> None:
    manifest = parse(valid_document())
    assert manifest.graphs["backbone"].inputs[0].shape == ("batch", 16, "frames", "height", "width")
    assert parse(manifest.model_dump(mode="json")) == manifest


def test_manifest_is_frozen() -> None:
    with pytest.raises(ValueError):
        parse(valid_document()).model.dim = 3


def test_parts_that_a_bundle_may_lack_are_optional() -> None:
    document = valid_document()
    document["text"]["tokenizer"] = None
    document["graphs"]["backbone"]["data"] = None
    del document["graphs"]["backbone"]["accuracy"]
    assert parse(document).graphs["backbone"].accuracy is None


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        # wrong types: nothing is converted
        ("model/dim", "32", "model.dim"),
        ("model/dim", 32.5, "model.dim"),
        ("model/dim", True, "model.dim"),
        ("model/patch_size", [1, 2], "model.patch_size"),
        ("model/name", 7, "model.name"),
        ("model", [], "model"),
        ("sampler/allowed_steps", "1234", "sampler.allowed_steps"),
        ("graphs", [], "graphs"),
        ("graphs/backbone/inputs", {}, "inputs"),
        ("files/backbone.onnx/size", "10", "size"),
        # unknown words
        ("model/colour", "red", "model.colour"),
        ("sampler/rule", "magic", "sampler.rule"),
        ("graphs/backbone/precision", "fp31", "precision"),
        ("graphs/backbone/inputs/0/dtype", "float31", "dtype"),
        # ranges and counts
        ("model/dim", 0, "model.dim"),
        ("sampler/steps", 10**6, "sampler.steps"),
        ("sampler/t_max", 1.5, "t_max"),
        ("sampler/shift", 0.5, "shift"),
        ("latents/std", [0.0] * 16, "latents.std"),
        ("video/fps", 0, "video.fps"),
        ("files/backbone.onnx/size", -1, "size"),
        ("graphs/backbone/inputs", [], "inputs"),
        ("graphs/backbone/inputs/0/shape", ["batch"] * 9, "shape"),
        ("graphs/backbone/inputs/0/shape", [0], "fixed dimension"),
        ("graphs/backbone/inputs/0/shape", ["height/2"], "symbolic dimension"),
        ("graphs/backbone/accuracy/cosine", 1.1, "cosine"),
        # text that could rewrite a terminal
        ("provenance/source", "\x1b[2Jnothing to see", "provenance.source"),
        ("provenance/created", "yesterday", "created"),
        ("provenance/loras", None, "loras"),
        ("provenance/loras", {"file": "a", "sha256": SHA, "strength": 1.0}, "loras"),
        ("provenance/loras", [{"file": "a", "sha256": SHA}], "loras[0].strength"),
        ("provenance/loras", [{"file": "", "sha256": SHA, "strength": 1.0}], "loras[0].file"),
        ("provenance/loras", [{"file": "a\n", "sha256": SHA, "strength": 1.0}], "loras[0].file"),
        ("provenance/loras", [{"file": "a", "sha256": "1", "strength": 1.0}], "loras[0].sha256"),
        ("provenance/loras", [{"file": "a", "sha256": SHA, "strength": "1"}], "loras[0].strength"),
        ("provenance/loras", [{"file": "a", "sha256": SHA, "strength": 1000.5}], "loras[0].strength"),
        ("provenance/loras", [{"file": "a", "sha256": SHA, "strength": 1.0, "rank": 4}], "loras[0].rank"),
        ("provenance/loras", [{"file": "a", "sha256": SHA, "strength": 1.0}] * 65, "loras"),
        ("files/backbone.onnx/sha256", "F" * 64, "sha256"),
        # parts that contradict each other
        ("model/num_heads", 3, "num_heads 3"),
        ("model/head_blocks", 3, "head_blocks 3"),
        ("sampler/steps", 5, "steps 5 is not among"),
        ("sampler/allowed_steps", [2, 1], "ascending"),
        ("latents/mean", [0.0], "mean has 1"),
        ("video/frames", 16, "video.frames 16"),
        ("video/width", 72, "video.width 72"),
        ("graphs/backbone/outputs/0/name", "x", "same name"),
        # references between parts
        ("text/tokenizer", "other.model", "not in files"),
        ("graphs/backbone/file", "other.onnx", "must be 'other.onnx.data'"),
        ("graphs/backbone/file", "tokenizer.model", "must end in '.onnx'"),
        ("graphs/backbone/data", "tokenizer.model", "must be 'backbone.onnx.data'"),
        ("files/BACKBONE.onnx", {"size": 1, "sha256": SHA}, "differ only in case"),
    ],
)
def test_each_rule_of_the_schema_is_held(path: str, value: Any, said: str) -> None:
    document = valid_document()
    put(document, path, value)
    with pytest.raises(BundleError) as caught:
        parse(document)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_provenance_names_the_loras_that_were_merged_in() -> None:
    assert parse(valid_document()).provenance.loras == ()
    document = valid_document()
    entries = [
        {"file": f"{k}.safetensors", "sha256": SHA, "strength": strength} for k, strength in enumerate((1, -0.5))
    ]
    document["provenance"]["loras"] = entries
    found = parse(document).provenance.loras
    assert [(lora.file, lora.sha256, lora.strength) for lora in found] == [
        ("0.safetensors", SHA, 1.0),
        ("1.safetensors", SHA, -0.5),
    ]
    document["provenance"]["loras"] = []
    assert parse(document).provenance.loras == ()


def test_models_without_inner_flow_have_a_sampler_of_their_own() -> None:
    manifest = parse(valid_wan_document())
    assert manifest.family.name == "wan" and manifest.sampler.rule == "renoise"
    assert manifest.text.embedding is not None and manifest.text.embedding.size == 4800
    assert parse(manifest.model_dump(mode="json")) == manifest
    document = valid_wan_document()
    document["sampler"] = velocity_sampler(rule="euler", allowed_steps=None, times=None)
    for name in ("allowed_steps", "times", "init_scale", "negative_prompt"):
        del document["sampler"][name]
    sampler: Any = parse(document).sampler
    assert (sampler.rule, sampler.steps) == ("euler", 3)
    assert sampler.times is None and sampler.init_scale == 1


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        # each family has sections of its own
        ("model/family", "tmd", "model.fusion"),
        ("model/family", "heun", "model.family: must be one of tmd, wan, anyflow, tim (found 'heun')"),
        ("model/family", None, "model.family: must be one of"),
        ("model/fusion", "gated", "model.fusion"),
        ("sampler", valid_document()["sampler"], "sampler."),
        ("sampler/inner_steps", 2, "sampler.inner_steps"),
        (
            "sampler/rule",
            "heun",
            "sampler.rule: must be one of euler, renoise, unipc (found 'heun')",
        ),
        ("sampler/rule", None, "sampler.rule"),
        ("sampler", {}, "sampler.rule"),
        ("sampler", [], "sampler"),
        # times
        ("sampler/times", [0.5, 0.75, 0.25], "sampler: times must be descending"),
        ("sampler/times", [1.0, 1.0, 0.5], "times must be descending"),
        ("sampler/times", [1.0, 0.5, 0.0], "sampler.times[2]"),
        ("sampler/times", [1.5, 0.5, 0.2], "sampler.times[0]"),
        ("sampler/times", [], "sampler.times"),
        ("sampler/times", [1.0, 0.5], "allowed_steps must be given, up to 2"),
        ("sampler/allowed_steps", None, "allowed_steps must be given, up to 3"),
        ("sampler/allowed_steps", [3, 2], "ascending"),
        ("sampler/allowed_steps", [1, 3], "steps 2 is not among"),
        ("sampler/steps", 0, "sampler.steps"),
        # what goes with them
        ("sampler/time_rounding", "float16", "sampler.time_rounding"),
        ("sampler/init_scale", 0.0, "sampler.init_scale"),
        ("sampler/guidance", -1.0, "sampler.guidance"),
        ("sampler/guidance", "5", "sampler.guidance"),
        ("sampler/negative_prompt", "", "sampler.negative_prompt"),
        ("sampler/negative_prompt", "a\x1b[2J", "sampler.negative_prompt"),
        ("sampler/shift", 0.5, "sampler.shift"),
        # the embedding table
        ("text/embedding/file", "other.bin", "text.embedding needs 'other.bin'"),
        ("text/embedding/file", "tokenizer.model", "shares 'tokenizer.model'"),
        ("text/embedding/file", "backbone.onnx.data", "shares 'backbone.onnx.data'"),
        ("text/embedding/dtype", "int8", "text.embedding.dtype"),
        ("text/embedding/dtype", "float32", "has 4800 bytes, and 300 x 8 of float32 take 9600"),
        ("text/embedding/rows", 299, "take 4784"),
        ("text/embedding/rows", 0, "text.embedding.rows"),
        ("text/pad_id", 300, "must be rows of embedding"),
    ],
)
def test_each_rule_of_models_without_inner_flow_is_held(path: str, value: Any, said: str) -> None:
    document = valid_wan_document()
    put(document, path, value)
    with pytest.raises(BundleError) as caught:
        parse(document)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_transition_models_have_a_sampler_of_their_own() -> None:
    manifest: Any = parse(valid_tim_document())
    assert manifest.sampler.rule == "flow_map" and manifest.sampler.guidance_interval == (0, 1)
    assert manifest.model.classes is None and parse(manifest.model_dump(mode="json")) == manifest


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model/family", "wan", "model.rope"),
        ("model/family", "TIM", "model.family"),
        ("model/rope", None, "model.rope"),
        ("model/rope", "xy", "model.rope"),
        ("model/head_blocks", 2, "head_blocks 2 is not num_layers 3"),
        ("model/fusion", "gated", "model.fusion"),
        ("model/classes", 0, "model.classes"),
        ("sampler", valid_wan_document()["sampler"], "sampler.rule"),
        ("sampler/shift", 2.0, "sampler.shift"),
        ("sampler/steps", 1001, "sampler.steps"),
        ("sampler/guidance", -1, "sampler.guidance"),
        ("sampler/guidance_interval", [0.5, 0.5], "guidance_interval [0.5, 0.5] is empty"),
        ("sampler/guidance_interval", [0.0, 2.1], "guidance_interval"),
        ("sampler/guidance_interval", [0.0], "guidance_interval"),
        ("sampler/rho", -0.1, "sampler.rho"),
        ("sampler/rho", 10.5, "sampler.rho"),
        ("sampler/rho", None, "sampler.rho"),
    ],
)
def test_each_rule_of_transition_models_is_held(path: str, value: Any, said: str) -> None:
    document = valid_tim_document()
    put(document, path, value)
    with pytest.raises(BundleError) as caught:
        parse(document)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["rope", "classes"])
def test_what_goes_with_transition_models_alone(name: str) -> None:
    for other in (valid_document, valid_wan_document):
        document = other()
        document["model"][name] = "grid" if name == "rope" else 3
        with pytest.raises(BundleError, match=rf"model\.{name}"):
            parse(document)


def test_prompts_can_stay_as_they_are() -> None:
    manifest = parse(valid_plain_document())
    assert (manifest.text.tokenization, manifest.text.bos_id, manifest.text.eos_id) == ("plain", 2, None)
    assert list(manifest.text.tables) == ["embedding", "null_embeds"]
    assert parse(manifest.model_dump(mode="json")) == manifest
    document = valid_plain_document()
    document["text"] |= {"bos_id": None, "eos_id": 1, "null_embeds": None}
    assert parse(document).text.tokenization == "plain"
    assert parse(valid_tim_document()).text.tokenization == "wan"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("text/tokenization", "wan", "tokenization 'wan' has an eos_id and no bos_id"),
        ("text/tokenization", "t5", "text.tokenization"),
        ("text/tokenization", None, "text.tokenization"),
        ("text/bos_id", -1, "text.bos_id"),
        ("text/bos_id", 300, "must be rows of embedding"),
        ("text/eos_id", 300, "must be rows of embedding"),
        ("text/eos_id", "1", "text.eos_id"),
        ("text/null_embeds/rows", 7, "null_embeds has 7 x"),
        ("text/null_embeds/dim", 4, "and max_length x dim are"),
        ("text/null_embeds/dtype", "float16", "of float16 take"),
        ("text/null_embeds/file", "other.bin", "text.null_embeds needs 'other.bin'"),
        ("text/null_embeds/file", "table.bin", "text.null_embeds shares 'table.bin'"),
        ("text/null_embeds/file", "backbone.onnx.data", "text.null_embeds shares 'backbone.onnx.data'"),
    ],
)
def test_each_rule_of_plain_prompts_is_held(path: str, value: Any, said: str) -> None:
    document = valid_plain_document()
    put(document, path, value)
    with pytest.raises(BundleError) as caught:
        parse(document)
    assert said in str(caught.value)


def test_plain_prompts_are_for_transition_models_and_have_room_for_their_marks() -> None:
    for changes in ({"tokenization": "plain"}, {"null_embeds": valid_plain_document()["text"]["null_embeds"]}):
        document = valid_document()
        document["text"] |= changes
        document["files"]["null.bin"] = valid_plain_document()["files"]["null.bin"]
        with pytest.raises(BundleError, match="are not for family 'tmd'"):
            parse(document)
    document = valid_plain_document()
    document["text"] |= {"max_length": 1, "eos_id": 1, "null_embeds": None}
    with pytest.raises(BundleError, match="no room for bos_id and eos_id"):
        parse(document)
    del document["text"]["eos_id"]
    with pytest.raises(BundleError, match=r"text\.eos_id"):
        parse(document)


def test_token_embeddings_go_with_a_table_and_only_with_one() -> None:
    document = valid_wan_document()
    encoder = text_encoder()
    graph = {"file": "text_encoder.onnx", "data": None, "inputs": encoder.inputs, "outputs": encoder.outputs}
    document["files"]["text_encoder.onnx"] = {"size": 1, "sha256": SHA}
    document["graphs"]["text_encoder"] = copy.deepcopy(document["graphs"]["backbone"]) | graph
    with pytest.raises(BundleError, match="no input 'token_embeds' of graph 'text_encoder'"):
        parse(document)
    table = {"name": "token_embeds", "dtype": "float32", "shape": ["batch", "text", 8]}
    document["graphs"]["text_encoder"]["inputs"] = [table, encoder.inputs[1]]
    assert parse(document).text.embedding is not None
    document["text"]["embedding"] = None
    with pytest.raises(BundleError, match="no input 'input_ids' of graph 'text_encoder'"):
        parse(document)


@pytest.mark.parametrize("name", ["schema_version", "model", "files", "provenance"])
def test_a_missing_part_is_named(name: str) -> None:
    document = valid_document()
    del document[name]
    with pytest.raises(BundleError, match=name):
        parse(document)


@pytest.mark.parametrize(
    "name",
    [
        "../backbone.onnx",
        "..",
        ".",
        "/etc/passwd",
        "sub/backbone.onnx",
        "sub\\backbone.onnx",
        "C:backbone.onnx",
        "back\0bone.onnx",
        ".hidden",
        "-rf",
        "",
        "a" * 200,
        "manifest.json",
        "back bone.onnx",
        "r\u00fcckgrat.onnx",
        "backbone.onnx\n",
    ],
)
def test_only_plain_file_names_are_accepted(name: str) -> None:
    document = valid_document()
    document["files"][name] = {"size": 10, "sha256": SHA}
    with pytest.raises(BundleError, match=r"file name|list itself"):
        parse(document)


def test_two_graphs_cannot_share_a_file() -> None:
    document = valid_document()
    document["graphs"]["flow_head"] = copy.deepcopy(document["graphs"]["backbone"])
    with pytest.raises(BundleError, match=r"share 'backbone\.onnx'"):
        parse(document)


def test_too_many_graphs_files_or_tensors_are_refused() -> None:
    for count, path in ((33, "graphs"), (129, "files"), (257, "graphs/backbone/inputs")):
        document = valid_document()
        target: Any = document
        for part in path.split("/"):
            target = target[part]
        for index in range(count):
            if isinstance(target, list):
                target.append({"name": f"i{index}", "dtype": "float32", "shape": []})
            elif path == "graphs":
                target[f"g{index}"] = copy.deepcopy(target["backbone"])
            else:
                target[f"f{index}"] = {"size": 1, "sha256": SHA}
        with pytest.raises(BundleError, match="at most"):
            parse(document)


@pytest.mark.parametrize("version", [0, 1, 3, "2", 2.0, True, None, [2]])
def test_unknown_schema_version_is_told_before_anything_else(version: Any) -> None:
    with pytest.raises(BundleError, match=r"schema_version .* reads 2"):
        parse({"schema_version": version, "unknown": "part"})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"schema_version": 2, "schema_version": 2}',
        b'{"schema_version": NaN}',
        b'{"schema_version": ' + b"9" * 5000 + b"}",
        b'{"schema_version": 2} {}',
        b"[]",
        b"null",
        b'"text"',
        b"{}",
        b'{"schema_version": 2, "model": "\\ud800"}',
        json.dumps(valid_document()).encode()[:-1],
        json.dumps(valid_document()).encode()[:500],
    ],
    ids=lambda data: repr(data[:24]),
)
def test_broken_json_is_one_sentence(data: bytes) -> None:
    with pytest.raises(BundleError) as caught:
        parse_manifest(data, "manifest.json")
    assert len(str(caught.value)) < 500
    assert str(caught.value).isascii()


def test_repeated_key_is_refused() -> None:
    """JSON readers differ in which one they take: what one checks, another must not read differently."""
    text = json.dumps(valid_document()).replace('"dim": 32', '"dim": 32, "dim": 32')
    with pytest.raises(BundleError, match="'dim' appears twice"):
        parse_manifest(text.encode(), "manifest.json")


def test_quoted_text_is_short_and_harmless() -> None:
    assert quote("\x1b[2J\u202e") == r"'\x1b[2J\u202e'"
    assert len(quote("\x1b" * 1000)) < 100
    assert quote({"a": [1]}) == "a dict"


def test_oversized_manifest_is_refused() -> None:
    with pytest.raises(BundleError, match="larger than"):
        parse_manifest(b" " * (MAX_MANIFEST_BYTES + 1), "manifest.json")


def test_message_of_a_hostile_manifest_stays_short() -> None:
    document = valid_document()
    document["x" * 100_000] = "y" * 100_000
    document["model"]["name"] = "\x1b]0;" + "z" * 100_000
    with pytest.raises(BundleError) as caught:
        parse(document)
    assert len(str(caught.value)) < 500


def test_dimensions_resolve_from_symbols() -> None:
    spec = TensorSpec(name="frames", dtype="uint8", shape=("batch", 4, "8*height", "16*width", 3))
    assert spec.resolve(batch=2, height=5, width=3, tokens=9) == (2, 4, 40, 48, 3)
    with pytest.raises(KeyError, match="width"):
        spec.resolve(batch=2, height=5)


# --- fuzzing ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(SHA),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FUZZ = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def outcome(data: bytes) -> Manifest | BundleError:
    """Anything but these two escapes as the test's failure."""
    try:
        return parse_manifest(data, "manifest.json")
    except BundleError as error:
        return error


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a document."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    return [place for key in keys for place in [(document, key), *places(document[key])]]


@FUZZ
@given(st.binary(max_size=200))
def test_fuzz_bytes_never_escape(data: bytes) -> None:
    assert isinstance(outcome(data), BundleError)


@FUZZ
@given(st.data())
def test_fuzz_replaced_value_never_escapes(data: st.DataObject) -> None:
    document = data.draw(st.sampled_from((valid_document, valid_wan_document, valid_tim_document)))()
    container, key = data.draw(st.sampled_from(places(document)))
    if data.draw(st.booleans()):
        container[key] = data.draw(JSON)
    elif isinstance(container, dict):
        container[data.draw(st.text(max_size=12))] = container.pop(key)
    else:
        container.insert(0, container[key])
    outcome(json.dumps(document).encode())


@FUZZ
@given(st.data())
def test_fuzz_damaged_text_never_escapes(data: st.DataObject) -> None:
    text = bytearray(json.dumps(valid_document()).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text) - 1))
        text[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=8))
    outcome(bytes(text))


DRAWS = {"words": ["a", "circle", "don't", "red2"], "description": "circles", "example": "a circle"}


def test_what_a_model_draws_is_optional_and_read() -> None:
    assert parse(valid_document()).draws is None
    assert parse({**valid_document(), "draws": None}).draws is None
    draws = parse({**valid_document(), "draws": DRAWS}).draws
    assert draws is not None and draws.model_dump(mode="json") == DRAWS


@pytest.mark.parametrize(
    "change",
    [
        {"words": []},
        {"words": ["b", "a"]},
        {"words": ["a", "a"]},
        {"words": ["A"]},
        {"words": ["two words"]},
        {"words": ["\u00e9toile"]},
        {"words": [""]},
        {"words": ["x" * 65]},
        {"words": [1]},
        {"words": "a"},
        {"words": None},
        {"words": ["a\n"]},
        {"words": [f"{number:04d}" for number in range(4097)]},
        {"description": ""},
        {"description": "x\u001by"},
        {"description": None},
        {"example": "x" * 1025},
        {"more": "x"},
    ],
)
def test_other_words_of_what_a_model_draws_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="draws"):
        parse({**valid_document(), "draws": {**DRAWS, **change}})
