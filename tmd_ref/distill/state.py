"""The state of a run on disk: one file, whole or not at all, that any number of processes can go on from."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmd_ref.distill.parallel import World, local, whole
from tmd_ref.partial import writing

_SAMPLE = 1 << 20  # bytes at the beginning, in the middle and at the end of a file


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""


def save_atomic(state: object, path: Path) -> None:
    """`torch.save` that leaves either the old file or the whole new one.

    Raises TrainingError if it cannot be written.
    """
    try:
        with writing(path) as partial, open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        kept = f"The one before is intact: {path}." if path.exists() else "There was none before."
        raise TrainingError(
            f"the checkpoint could not be written ({error}). {kept} Make room on the disk and run the same command "
            "again."
        ) from error


def gather(tree: Any, keep: bool) -> Any:
    """A copy of nested dicts and lists with sharded tensors made whole, on the CPU; None for tensors if not `keep`.

    Every process must call it, in the same order; one tensor at a time is whole on the device.
    """
    if isinstance(tree, Tensor):
        full = whole(tree.detach())
        return full.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: gather(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [gather(value, keep) for value in tree]
    return tree


def scatter_like(value: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor as sharded as `weight`, on its device; scalars (an optimizer's step count) stay whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(weight, DTensor) and value.shape == weight.shape:
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
    return value if value.dim() == 0 else value.to(weight.device)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """The optimizer's tensors by number of the parameter; learning rates follow from the step."""
    return optimizer.state_dict()["state"]


def restore_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[int, Mapping[str, Tensor]]) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, values in stored.items():
        optimizer.state[weights[number]] = {k: scatter_like(v, weights[number]) for k, v in values.items()}


def average_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Copies of this process's pieces of `parameters`, to average them over time."""
    return [local(p.detach()).clone() for p in parameters]


def code_version() -> dict[str, str]:
    """What made a checkpoint: this package's version and a digest of its sources, and torch's version."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    try:
        version = metadata.version("tmd-runtime")
    except metadata.PackageNotFoundError:  # run from a checkout
        version = "not installed"
    return {"tmd": version, "sources": digest.hexdigest()[:16], "torch": str(torch.__version__)}


def fingerprint(path: Path) -> str:
    """What tells one input from another: sizes and samples of a file, or of all files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode("utf-8", "surrogateescape"))
        with open(file, "rb") as content:
            for start in sorted({0, max(size // 2 - _SAMPLE // 2, 0), max(size - _SAMPLE, 0)}):
                content.seek(start)
                digest.update(content.read(_SAMPLE))
    return digest.hexdigest()[:16]


def read_checkpoint(path: Path, identity: Mapping[str, Any], world: World) -> dict[str, Any] | None:
    """The state in `path`, mapped, not loaded; None if there is none.

    Raises TrainingError, naming the setting, if it belongs to a run of other settings.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        stored = state["identity"]
    except (RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{path} is no checkpoint of this version ({error}). Delete it to start anew.") from error
    for name in sorted({*stored, *identity}):
        if name.startswith("input ") and not (name in stored and name in identity):
            continue  # a checkpoint of a version that did not note its inputs
        if stored.get(name) != identity.get(name):
            raise TrainingError(
                f"{path} was made with another {name}: {stored.get(name)}, now {identity.get(name)}. "
                f"Delete {path.parent} or choose another --run."
            )
    return state
