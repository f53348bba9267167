"""Compute capabilities that TensorRT for RTX builds for, and what each of them cannot compute.

Asked of the builder of 1.7.1, on layers of every type and on all graphs of the built-in models. Without a target it
takes fp8 and fp4 silently, so this is looked at before it is asked.
"""

from __future__ import annotations

from ..errors import EngineError, quote

EVERY_RTX_CARD: tuple[str, ...] = ()
KNOWN = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_BY_DEFAULT = ("8.0", "8.6", "8.9", "12.0")  # and later ones
_SINCE = {"bf16": (8, 0), "fp8": (8, 9), "nvfp4": (12, 0)}
_INSTEAD = {"fp8": "fp16 or bf16", "nvfp4": "fp8 (from 8.9 on) or bf16"}  # what older cards compute
_TURING = (7, 5)


def parse_targets(text: str) -> tuple[str, ...]:
    """ "rtx", or capabilities as "8.9,12.0". Raises EngineError."""
    if text.strip().lower() == "rtx":
        return EVERY_RTX_CARD
    wanted = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for each in wanted:
        if each not in KNOWN:
            raise EngineError(
                f"{quote(each)} is no compute capability that TensorRT for RTX builds for: give rtx for every card "
                f"from {_BY_DEFAULT[0]} on, or some of {', '.join(KNOWN)}."
            )
    return tuple(sorted(wanted, key=_numbers))


def to_text(targets: tuple[str, ...]) -> str:
    """For people and for keys."""
    return ",".join(targets) or "rtx"


def runs_on(targets: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether NVIDIA says that a plan for `targets` runs on a GPU. 9.0 and 10.0, cards for servers, are not listed."""
    listed = [_numbers(each) for each in targets or _BY_DEFAULT]
    return capability in listed or any(capability >= each >= (12, 0) for each in listed)


def refusal(precision: str, targets: tuple[str, ...]) -> str | None:
    """Why a graph of this precision does not build for `targets`, and what to do; None: it does."""
    oldest = min(_numbers(each) for each in targets or _BY_DEFAULT)
    if oldest == _TURING:
        reason = (
            "it has no bfloat16 and no fp8: a bundle for it would have to be in fp16"
            if precision in _SINCE
            else "it has no products and 3-D convolutions in float32, and graphs exported in fp16 keep a few of them"
        )
        return (
            f"compute capability 7.5 (Turing) cannot be built for, because {reason}. Use --engine onnxruntime on such "
            "a card, or name newer ones"
        )
    since = _SINCE.get(precision, (0, 0))
    if oldest < since:
        able = [each for each in KNOWN if _numbers(each) >= since]
        return (
            f"it is {precision}, which GPUs compute from compute capability {since[0]}.{since[1]} on: build with "
            f"--for {','.join(each for each in able if not each.endswith('.1'))}, or export one with --precision "
            f"{_INSTEAD.get(precision, 'fp16')}"
        )
    return None


def refusal_on(precision: str, capability: tuple[int, int]) -> str | None:
    """The same for the GPU of this machine."""
    return refusal(precision, (f"{capability[0]}.{capability[1]}",))


def needed(precision: str) -> str | None:
    """What a graph of this precision asks of an RTX card that not every one has, and what else to export."""
    since = _SINCE.get(precision, (0, 0))
    if since <= _numbers(_BY_DEFAULT[0]):
        return None
    return f"RTX cards from compute capability {since[0]}.{since[1]} on; for others export {_INSTEAD[precision]}"


def lacking(capability: str) -> str | None:
    """The precisions that a card cannot compute, and what to export for it; None: it computes all, or none of ours."""
    found = _numbers(capability)
    missing = [name for name, since in _SINCE.items() if found < since]
    if not missing or found <= _TURING:
        return None
    able = "bf16" if "fp8" in missing else "fp8 or bf16"
    shown = " and ".join(f"{name} (from {_SINCE[name][0]}.{_SINCE[name][1]} on)" for name in missing)
    return f"does not compute {shown}: export {able} for it"


def _numbers(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor)
