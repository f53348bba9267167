"""`tmd-export`: weights to a bundle, from the command line.

Only click is imported at the top, so that `--help` answers at once; torch comes in when there is something to export.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn

import click

from tmd_engines.command.help import SETTINGS, Grouped
from tmd_engines.command.options import offered_list, version_option
from tmd_engines.command.program import FAILED, INTERRUPTED, run_program, sweep, verdict
from tmd_engines.utf8 import json_text

from .console import Line, print_table, record, reporter
from .families import FAMILIES, GRIDS, built_in, models, presets
from .hub.name import is_hub_name
from .loras import LoraFile
from .options import Lora, Parts, Precision
from .parts import PARTS, QUANTIZED, parse_precision

if TYPE_CHECKING:
    from .export import ExportResult
    from .quantization.calibration import Calibration
    from .sources.source import Source


_GROUPS = {
    "Where the weights come from": ("model", "checkpoint", "random_weights", "decoder", "text_encoder", "loras"),
    "How the model is sampled": ("preset", "grid"),
    "The bundle": ("out", "parts", "overwrite", "inspect"),
    "Instead of a bundle": ("transformer",),
    "Precision": ("precision", "text_encoder_weights", "calibration", "keep_no_layers", "no_verify"),
    "Reports": ("as_json", "quiet"),
}


@click.command(
    "tmd-export",
    cls=Grouped,
    groups=_GROUPS,
    context_settings=SETTINGS,
    epilog=f"""\
\b
Parts: {", ".join(PARTS)}.

\b
Checkpoints:
A checkpoint is a folder as tmd-distill leaves it (student.safetensors and, for
the other parts, vae.safetensors, umt5.safetensors, tokenizer.model), a Wan2.1
or Wan2.2 text-to-video or Wan2.2-TI2V-5B folder as its authors publish it, the
same in the layout of diffusers (AnyFlow too), or a single .safetensors, .gguf,
.pt or .pth file of one part. Its format and size are recognised from the
tensors; weights in scaled fp8, int8, mxfp8, nvfp4, GGUF or MLX are dequantised
to bfloat16. With several, a file given by itself replaces that part of a
folder, in any order. Parts that no checkpoint has are left out. Autoregressive
models (CausVid, Self-Forcing) cannot be told from bidirectional ones and do not
work. For the tim models: a folder with the released file (t2i_model.bin,
c2i_model_256.safetensors, ...), or with what tmd-distill pack leaves.

\b
Names on the hub:
hf:ORG/NAME is downloaded through huggingface_hub into its cache: of a repository
the files that are needed, with hf:ORG/NAME/path/to/file that one. HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE and the token of hf auth login are heeded. A branch,
tag or commit goes behind an @: hf:ORG/NAME@v1/file.safetensors.

\b
LoRAs:
A LoRA is added to the weights before they are rounded: strength*(alpha/rank)*
up*down, and whole differences of weights and biases. Several are added one after
the other. One that does not fit in every layer is an error that lists them. The
strength is the number behind the last "=" (default 1; a path that itself ends in
"=" and a number needs one behind it). DoRA, LoHa and LoKr are refused.

\b
Precisions:
A precision is fp32, fp16 or bf16, of the large products; inputs, outputs and
what would feel the rounding stay fp32. For single graphs:
--precision bf16,decoder=fp16,text_encoder=fp32
backbone and flow_head can also be int8 (for CPUs), fp8 (E4M3, for GPUs) or nvfp4
(linear layers in 4 bits, attention in fp8, for GPUs from Blackwell on); the
others are bf16 then. All are calibrated by sampling a few prompts in fp32; what
was measured is calibration.json in the bundle, good for the same checkpoint.
The decoder of a video can be int8 where it is named (bf16,decoder=int8): for CPUs.

\b
Checks:
Every graph is compared with the PyTorch reference in fp32 on ONNX Runtime: an
error above 1e-4 is a failure, in units of an output's RMS where that is above 1
(in fp16 and bf16: a cosine below 0.9999; with 8 or 4 bits: below 0.99).

\b
Exit codes: 0 done, 1 the export failed, 2 bad usage, 130 stopped by Ctrl-C
(129 by SIGHUP, 143 by SIGTERM).
The bundle appears under its name only when it is complete.

\b
Examples:
  tmd-export --model tiny --out my-bundle
  tmd-export --model tiny --checkpoint runs/student --precision fp16 --out my-bundle
  tmd-export --model wan1.3b --random-weights 0 --out wan-noise
  tmd-export --checkpoint Wan2.1-T2V-1.3B --precision bf16 --out wan
  tmd-export --checkpoint hf:Wan-AI/Wan2.1-T2V-1.3B --precision bf16 --out wan
  tmd-export --checkpoint Wan2.1-T2V-1.3B-Diffusers --inspect
  tmd-export --model tim-t2i --checkpoint TiM-T2I --text-encoder gemma-3-1b-it \\
      --decoder dc-ae-f32c32-sana-1.1-diffusers --precision bf16,decoder=fp32 --out tim
  tmd-export --model wan1.3b --checkpoint rCM_Wan2.1_T2V_1.3B_480p.pt --preset rcm \\
      --checkpoint Wan2.1-T2V-1.3B --precision bf16 --out rcm
  tmd-export --checkpoint FastWan2.2-TI2V-5B-FullAttn-Diffusers --precision bf16 --out fastwan
  tmd-export --checkpoint rCM_Wan2.1_T2V_1.3B_480p.pt --transformer runs/wan/rcm.safetensors
  tmd-export --model wan14b --checkpoint Wan2.1-T2V-14B --lora 4steps.safetensors \\
      --lora style.safetensors=0.7 --preset lightx2v --precision bf16 --out fast""",
)
@click.option(
    "--model",
    type=click.Choice(models()),
    help="Which model the checkpoint must be.  [default: what its tensors say]",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="PATH",
    help="Trained weights, a folder or a file, or hf:ORG/NAME[@REVISION][/FILE] of the Hugging Face hub; may be given "
    "several times.  [default: the built-in ones, for tiny]",
)
@click.option(
    "--random-weights",
    type=click.IntRange(0),
    metavar="SEED",
    help="Weights from this seed instead: no download, and a model that shows noise. Wan sizes leave text_encoder out.",
)
@click.option(
    "--decoder",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Another decoder in the place of the VAE: TAEHV (taew2_1, lighttaew2_1; for Wan2.2-TI2V-5B taew2_2, "
    "lighttaew2_2) or lightvae (lightvaew2_1). For "
    "tim-t2i and tim-c2i-512 the folder of DC-AE (dc-ae-f32c32-sana-1.1-diffusers), for tim-c2i-256 that of SD-VAE "
    "(sd-vae-ft-ema); it brings the encoder too.",
)
@click.option(
    "--text-encoder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="For tim-t2i, whose file holds the transformer alone: the folder of its text encoder (gemma-3-1b-it).",
)
@click.option(
    "--lora",
    "loras",
    type=Lora(),
    multiple=True,
    metavar="FILE[=STRENGTH]",
    help="A LoRA to merge into the weights of backbone and flow_head, as LightX2V, ComfyUI, kohya and musubi, "
    "diffusers or PEFT write it; may be given several times.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The bundle to write.")
@click.option(
    "--transformer",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the transformer under Wan's own names, LoRAs merged, as safetensors: for tmd-distill.",
)
@click.option("--inspect", is_flag=True, help="Say what the checkpoint is and what would be exported; write nothing.")
@click.option(
    "--parts",
    type=Parts(),
    shell_complete=offered_list(*PARTS),
    metavar="A,B,...",
    help="Graphs to export.  [default: all]",
)
@click.option(
    "--precision",
    type=Precision(),
    default="fp32",
    show_default=True,
    metavar="P|PART=P,...",
    help="Precision of all graphs, or of each.",
)
@click.option(
    "--text-encoder-weights",
    type=click.Choice(("int8",)),
    help="Store the text encoder's weights in a quarter of the size, for the CPU; its arithmetic stays fp32.",
)
@click.option(
    "--preset",
    type=click.Choice(tuple(presets())),
    metavar="NAME",
    help=f"How a checkpoint is sampled, its times, rule and guidance: {', '.join(presets())}.  [default: what its "
    "folder says, else that of the model it was made from; --inspect shows it]",
)
@click.option(
    "--grid",
    type=click.Choice(GRIDS),
    help="Time grid of a Wan of any number of steps: that of Wan's own code, or that of diffusers, to compare with it; "
    "the same seed gives another picture.  [default: wan]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="For int8, fp8 and nvfp4: prompts to calibrate on, one per line, or the calibration.json of an earlier bundle "
    "of this checkpoint.  [default: built-in prompts]",
)
@click.option(
    "--keep-no-layers",
    is_flag=True,
    help="For int8, fp8 and nvfp4: quantize every layer, without measuring which ones should stay in more bits.",
)
@click.option("--overwrite", is_flag=True, help="Replace the bundle --out or the file --transformer if there is one.")
@click.option("--no-verify", is_flag=True, help="Skip the comparison with the reference; the manifest will tell.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, everything else on stderr.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors (and JSON with --json).")
@version_option("tmd-export")
def command(
    model: str | None,
    checkpoint: tuple[Path, ...],
    random_weights: int | None,
    decoder: Path | None,
    text_encoder: Path | None,
    loras: tuple[LoraFile, ...],
    out: Path | None,
    transformer: Path | None,
    inspect: bool,
    parts: tuple[str, ...] | None,
    precision: str,
    text_encoder_weights: str | None,
    preset: str | None,
    grid: str | None,
    calibration: Path | None,
    keep_no_layers: bool,
    overwrite: bool,
    no_verify: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Turn a checkpoint into a bundle: ONNX graphs and a manifest, which tmd-run and other programs load."""
    if checkpoint and random_weights is not None:
        raise click.UsageError("--checkpoint and --random-weights are two sources of weights: give one of them.")
    if model is None and not checkpoint:
        raise click.UsageError("there is no --model and no --checkpoint that says what to export: give one of them.")
    if not checkpoint and random_weights is None and model not in built_in():
        raise click.UsageError(f"{model} has no built-in weights: give --checkpoint PATH or --random-weights SEED.")
    for option, given in (("--calibration", calibration), ("--keep-no-layers", keep_no_layers)):
        if given and not set(QUANTIZED) & set(parse_precision(precision).values()):
            raise click.UsageError(f"{option} is for --precision int8, fp8 or nvfp4: nothing else needs it.")
    if transformer is not None and (out is not None or inspect):
        raise click.UsageError("--transformer is written in the place of a bundle: leave --out and --inspect out.")
    of_a_bundle = {
        "--parts": parts, "--precision": precision != "fp32", "--text-encoder-weights": text_encoder_weights,
        "--grid": grid, "--no-verify": no_verify,
    }  # fmt: skip
    if transformer is not None and any(of_a_bundle.values()):
        needless = next(name for name, value in of_a_bundle.items() if value)
        raise click.UsageError(f"{needless} is for a bundle: --transformer writes the weights as they are stored.")
    if out is None and transformer is None and not inspect:
        raise click.UsageError("there is no --out: name the bundle to write, or --inspect what there is.")
    means = (model, checkpoint, random_weights, decoder, preset, text_encoder, loras)
    start = perf_counter()
    if out is not None:
        sweep("tmd-export", [Path(os.path.abspath(out)).parent], quiet)
    try:
        if transformer is not None:
            if transformer.exists() and not overwrite:
                _fail(f"{transformer} exists: choose another name, or --overwrite to replace it.", as_json)
            _write_transformer(_local(means, ("backbone", "flow_head"), None if quiet else _say), transformer)
            if as_json:
                click.echo(json_text({"transformer": str(transformer), "bytes": transformer.stat().st_size}))
            return
        if out is None or inspect:
            with TemporaryDirectory(prefix="tmd-headers-") as room:
                local = _local(means, parts, None, Path(room))
                _inspect(local, as_json, grid, parts, precision, text_encoder_weights)
            return
        options = {
            "precision": precision,
            "text_encoder_weights": text_encoder_weights,
            "preset": preset,
            "grid": grid,
            "calibration": calibration,
            "verify": not no_verify,
            "keep_layers": not keep_no_layers,
            "overwrite": overwrite,
        }
        result = _export(_local(means, parts, None if quiet else _say), out, parts, options, quiet)
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        _fail(message, as_json)
    except KeyboardInterrupt:
        click.echo("tmd-export: stopped, nothing was written.", err=True)
        sys.exit(INTERRUPTED)
    if as_json:
        click.echo(json_text(record(result, perf_counter() - start)))
    elif not quiet:
        print_table(result, perf_counter() - start)
        from tmd_engines.device.cpu import describe_cpu

        from .advice import advice

        if hint := advice(result.graphs, describe_cpu()["features"] or ()):
            _say(hint)


def _say(text: str) -> None:
    click.echo(f"tmd-export: {text}", err=True)


def _local(
    means: tuple[Any, ...], parts: tuple[str, ...] | None, told: Callable[[str], None] | None, room: Path | None = None
) -> tuple[Any, ...]:
    """Arguments of `open_source`, with all that is on the hub downloaded, of which `told` hears; with `room` only the
    headers of weights, into that folder. Raises ExportError."""
    model, checkpoint, random_weights, decoder, preset, text_encoder, loras = means
    if not any(map(is_hub_name, (*checkpoint, decoder, text_encoder, *(lora.path for lora in loras)))):
        return means  # and torch is loaded later, behind the first line on the screen
    from .hub.places import local_checkpoints, local_loras
    from .hub.repository import silent

    say = (told or silent) if room is None else None
    checkpoint = local_checkpoints(checkpoint, parts, say, room)
    others = (
        None if path is None else local_checkpoints([path], None, say, room)[0] for path in (decoder, text_encoder)
    )
    decoder, text_encoder = others
    return model, checkpoint, random_weights, decoder, preset, text_encoder, local_loras(loras, say)


def _export(
    means: tuple[Any, ...], out: Path, parts: tuple[str, ...] | None, options: dict[str, Any], quiet: bool
) -> ExportResult:
    """`means` are the arguments of `open_source`."""
    visible = sys.stderr.isatty() and not quiet
    with Line() if visible else nullcontext() as line:
        if line is not None:
            line.show("loading")
        from .export import export_bundle
        from .families.open import open_source

        source = open_source(*means)
        if not quiet:
            sampled = source.sampler_note if options["preset"] is None else None
            for note in (*source.notes, *([sampled] if sampled else []), *_left_out(source, means[1], parts)):
                click.echo(f"tmd-export: {note}", err=True)
        options["calibration"] = _calibration(options["calibration"])
        return export_bundle(source, out, parts, **options, report=line or reporter(quiet))


def _write_transformer(means: tuple[Any, ...], path: Path) -> None:
    """`means` are the arguments of `open_source`."""
    from .errors import ExportError
    from .families.open import open_source
    from .transformer_file import write_transformer

    source = open_source(*means)
    if FAMILIES[source.family].adds_layers and source.trained:
        raise ExportError(
            f"{source.origin}: a TMD student is no Wan without its flow head's own layers. Give the Wan that it was "
            "distilled from."
        )
    write_transformer(source, path)


def _inspect(means: tuple[Any, ...], as_json: bool, *wishes: Any) -> None:
    """`means` are the arguments of `open_source`, `wishes` those of `inspect` behind the preset."""
    from .families.open import open_source
    from .inspection import inspect, print_inspection

    source = open_source(*means)
    found = inspect(source, means[4], *wishes)
    if as_json:
        click.echo(json_text(found))
    else:
        print_inspection(found)


def _calibration(path: Path | None) -> Calibration | tuple[str, ...] | None:
    """What `--calibration` names. Raises ExportError."""
    from .quantization.calibration import read_calibration
    from .quantization.prompts import read_prompts

    if path is None:
        return None
    return read_calibration(path) if path.suffix == ".json" else read_prompts(path)


def _left_out(source: Source, checkpoint: tuple[Path, ...], parts: tuple[str, ...] | None) -> list[str]:
    """What the user may miss in a bundle of all that there are weights for."""
    absent = [part for part in source.parts if part not in source.default_parts]
    if not checkpoint or parts is not None or not absent:
        return []
    how = FAMILIES[source.family].missing_parts
    return [f"{', '.join(absent)} left out: the checkpoint has no weights for it. To add it, {how}."]


def _message(error: Exception) -> str | None:
    """What to tell for an error that is not this program's own fault; None for one that is."""
    from tmd_engines import BundleError, EngineError

    from .errors import ExportError

    if isinstance(error, (ExportError, BundleError, EngineError)):
        return str(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory for this model. Close other programs, or choose fewer --parts."
    if isinstance(error, ImportError):
        return f"{error}. Exporting needs torch and onnx: pip install '.[export]' in tmd's checkout"
    return None


def _fail(message: str, as_json: bool) -> NoReturn:
    message, code = verdict(message, FAILED)
    click.echo(f"tmd-export: {message}", err=True)
    if as_json:
        click.echo(json_text({"error": message}))
    sys.exit(code)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `tmd-export`; `args` are those of the process unless given."""
    run_program(command, "tmd-export", args)
