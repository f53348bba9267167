"""One training loop for everything that is trained here: resumable, logged, stopped by the first bad number.

A loss is a function of the step number alone (besides the weights): data and noise of step k are drawn from generators
seeded by (seed, k). So a checkpoint is weights, optimizer and step; resuming needs no other state and gives the same
run. Not a framework: no devices, no distribution.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

Loss = Callable[[int], tuple[Tensor, Mapping[str, Tensor]]]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: linear warm-up to `lr`, then a cosine down to `lr * final`."""

    steps: int
    lr: float
    warmup: int = 100
    final: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0  # decay of the averaged weights; 0 keeps none

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, 0-based."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress)))


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""


def save_atomic(state: object, path: Path) -> None:
    """`torch.save` that leaves either the old file or the whole new one."""
    partial = path.with_suffix(path.suffix + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def fit(
    model: Model,
    loss: Loss,
    schedule: Schedule,
    run: Path,
    *,
    log_every: int = 50,
    save_every: int = 250,
    report: Callable[[str], None] = print,
) -> Model:
    """Train `model` by AdamW on `loss` and return the trained weights (their average, if the schedule keeps one).

    `loss(step)` returns a scalar tensor and named scalars for the log. `run` is a folder: `checkpoint.pt` in it is
    resumed if its schedule is the same, `metrics.jsonl` gets one line per `log_every` steps.
    Raises TrainingError if the loss is not finite or the checkpoint belongs to another schedule.
    """
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = run / "checkpoint.pt"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.lr, betas=schedule.betas, weight_decay=schedule.weight_decay
    )
    average = copy.deepcopy(model).requires_grad_(False) if schedule.ema else None
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["schedule"] != _plain(schedule):
            raise TrainingError(f"{checkpoint} was made with another schedule. Delete {run} or choose another --run.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        first = state["step"]
        report(f"resuming {run} at step {first}")

    def save(step: int) -> None:
        state = {"schedule": _plain(schedule), "step": step, "model": model.state_dict()}
        state["optimizer"] = optimizer.state_dict()
        if average is not None:
            state["average"] = average.state_dict()
        save_atomic(state, checkpoint)

    model.train()
    sums: dict[str, float] = {}
    began = time.monotonic()
    with open(run / "metrics.jsonl", "a") as log:
        for step in range(first, schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr_at(step)
            value, scalars = loss(step)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            if not (torch.isfinite(value) and torch.isfinite(norm)):
                raise TrainingError(
                    f"loss {value.item()} with gradient norm {norm.item()} at step {step}. "
                    f"The last good checkpoint is in {run}; a smaller learning rate is the usual cure."
                )
            optimizer.step()
            if average is not None:
                # a short memory at first, so that the average forgets the random start
                decay = min(schedule.ema, (step + 1) / (step + 10))
                with torch.no_grad():
                    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            for name, scalar in {"loss": value, "grad_norm": norm, **scalars}.items():
                sums[name] = sums.get(name, 0.0) + float(scalar.detach()) / log_every
            if (step + 1) % log_every == 0:
                seconds = (time.monotonic() - began) / (step + 1 - first)
                line = {"step": step + 1, "lr": schedule.lr_at(step), "seconds_per_step": round(seconds, 4), **sums}
                log.write(json.dumps(line) + "\n")
                log.flush()
                left = seconds * (schedule.steps - step - 1) / 60
                report(f"step {step + 1}/{schedule.steps}  " + "  ".join(f"{k} {v:.4g}" for k, v in sums.items())
                       + f"  {seconds:.2f} s/step, {left:.0f} min left")  # fmt: skip
                sums = {}
            if (step + 1) % save_every == 0 or step + 1 == schedule.steps:
                save(step + 1)
    trained = average if average is not None else model
    return trained.eval().requires_grad_(False)


def _plain(schedule: Schedule) -> dict:
    return json.loads(json.dumps(asdict(schedule)))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one training step: the same however often training was interrupted."""
    return torch.Generator().manual_seed((seed << 32) + step)
