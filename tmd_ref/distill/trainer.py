"""One training loop for everything that is trained here: one network or several in turn, on one device or many.

A loss is a function of the step and its samples alone (besides the weights), because all randomness is keyed by them
(`tmd_ref.distill.draws`). So a checkpoint is weights, optimizers, averages and the step; resuming needs no other state
and gives the same run, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tmd_ref.distill.draws import Draws
from tmd_ref.distill.metrics import Metrics
from tmd_ref.distill.parallel import World, average_gradients, bare, fill, let_go, local, whole
from tmd_ref.distill.state import (
    TrainingError,
    average_of,
    code_version,
    gather,
    optimizer_state,
    read_checkpoint,
    restore_optimizer,
    save_atomic,
)

__all__ = [
    "AveragedWeights", "Loss", "Objective", "Run", "Schedule", "TrainingError", "fit", "save_atomic", "step_generator",
    "train",
]  # fmt: skip

Scalars = Mapping[str, Tensor]
Loss = Callable[[int], tuple[Tensor, Scalars]]
"""step -> a scalar to minimise, and named scalars for the log."""
Objective = Callable[[Draws], tuple[Tensor, Scalars]]
"""The same for some samples of a step: means over these samples."""
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


@dataclass(frozen=True)
class Run:
    """How a training run is carried out. `settings` is written into checkpoints and decides what may be resumed."""

    folder: Path
    batch: int = 1  # samples of a step, over all processes
    micro: int | None = None  # samples of one backward pass in one process; None: all of them
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    log_every: int = 50
    save_every: int = 250
    world: World = World()  # noqa: RUF009 (immutable)
    report: Callable[[str], None] = print


class _Trained:
    """One network in training, with its optimizer and the average of its weights."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self.model, self.schedule = model, schedule
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=schedule.lr, betas=schedule.betas, weight_decay=schedule.weight_decay
        )
        self.average = average_of(self.weights) if schedule.ema else None
        self.updates = 0

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def clip(self) -> Tensor:
        """Clip the gradient; its norm before that."""
        return whole(nn.utils.clip_grad_norm_(self.weights, self.schedule.clip))

    def update(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(step)
        self.optimizer.step()
        self.updates += 1
        if self.average is not None:
            # a short memory at first, so that the average forgets the random start
            decay = min(self.schedule.ema, self.updates / (self.updates + 9))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, [local(p.detach()) for p in self.weights], 1 - decay)

    def state(self, keep: bool) -> dict[str, Any]:
        stored: dict[str, Any] = {
            "model": gather(bare(self.model).state_dict(), keep),
            "optimizer": gather(optimizer_state(self.optimizer), keep),
            "updates": self.updates,
        }
        if self.average is not None:
            with self._averaged():
                weights = gather(bare(self.model).state_dict(), keep)
                # copies: on a CPU these are the weights themselves, which change back
                stored["average"] = {name: weight.clone() for name, weight in weights.items() if keep}
        return stored

    def restore(self, stored: Mapping[str, Any]) -> None:
        weights = bare(self.model).state_dict()
        if self.average is not None:
            fill(weights.values(), (stored["average"][name] for name in weights))
            self.average = average_of(self.weights)
        fill(weights.values(), (stored["model"][name] for name in weights))
        restore_optimizer(self.optimizer, stored["optimizer"])
        self.updates = stored["updates"]

    def finish(self) -> nn.Module:
        """The trained network, its weights averaged if the schedule says so."""
        if self.average is not None:
            self._exchange()
        return self.model.eval().requires_grad_(False)

    def _exchange(self) -> None:
        assert self.average is not None
        with torch.no_grad():
            for weight, average in zip(self.weights, self.average, strict=True):
                piece = local(weight.detach())
                kept = piece.clone()
                piece.copy_(average)
                average.copy_(kept)
        let_go(self.model)

    def _averaged(self) -> _Averaged:
        return _Averaged(self)


class _Averaged:
    """While entered, the network has its averaged weights."""

    def __init__(self, trained: _Trained) -> None:
        self._trained = trained

    def __enter__(self) -> None:
        self._trained._exchange()

    def __exit__(self, *error: object) -> None:
        self._trained._exchange()


class AveragedWeights:
    """An objective's way to the averaged weights of the one network in training, which `train` is given too.

    `with averaged: ...` around a pass without gradient, before the pass that has one.
    """

    _trained: _Trained | None = None

    def __enter__(self) -> None:
        if self._trained is None:
            raise ValueError("these averaged weights are those of no network in training: give them to `train`.")
        self._trained._exchange()

    def __exit__(self, *error: object) -> None:
        if self._trained is not None:
            self._trained._exchange()

    def _attach(self, networks: Mapping[str, _Trained]) -> None:
        (self._trained,) = networks.values()
        if self._trained.average is None:
            raise ValueError("the schedule keeps no averaged weights: set its ema.")


def train(
    networks: Mapping[str, tuple[nn.Module, Schedule]],
    objective: Objective,
    run: Run,
    turn: Callable[[int], tuple[str, ...]] | None = None,
    averaged: AveragedWeights | None = None,
) -> dict[str, nn.Module]:
    """Train networks by AdamW and return them, evaluated, with their averaged weights where a schedule keeps some.

    `turn(step)` names the networks that a step updates (None: all); the objective's gradient must reach no other one.
    `averaged` gives the objective the averaged weights of the one network. All schedules count all steps and have the
    same number. In the run's folder, `checkpoint.pt` is resumed, and `metrics.jsonl` gets one line per `log_every`
    steps.
    Raises TrainingError if a number is not finite, a checkpoint cannot be written or belongs to other settings.
    """
    world, folder = run.world, run.folder
    steps = {schedule.steps for _, schedule in networks.values()}
    if len(steps) != 1:
        raise ValueError(f"the schedules have {sorted(steps)} steps: networks trained together need the same number.")
    total = steps.pop()
    parts = world.parts(run.batch, run.micro)
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: _Trained(model, schedule) for name, (model, schedule) in networks.items()}
    if averaged is not None:
        averaged._attach(trained)
    identity = _plain(
        {"schedule": {name: asdict(schedule) for name, (_, schedule) in networks.items()},
         "batch": run.batch, "seed": run.seed, **run.settings}
    )  # fmt: skip
    checkpoint, first = folder / "checkpoint.pt", 0
    state = read_checkpoint(checkpoint, identity, world)
    if state is not None:
        for name, network in trained.items():
            network.restore(state["networks"][name])
        first = state["step"]
        done = f"{folder} is finished, at step {first}: delete it to train anew"
        run.report(f"resuming {folder} at step {first}" if first < total else done)
        del state
    code = code_version()

    def save(step: int) -> None:
        stored = {name: network.state(keep=world.first) for name, network in trained.items()}
        failure = None
        if world.first:
            try:
                save_atomic({"identity": identity, "code": code, "step": step, "networks": stored}, checkpoint)
            except TrainingError as error:
                failure = error
        if world.agree(failure is not None):
            raise failure or TrainingError("the first process could not write the checkpoint; see its message.")

    for network in trained.values():
        network.model.train()
    metrics = Metrics(folder, total, first, run.log_every, run.report) if world.first else None
    try:
        for step in range(first, total):
            names = tuple(trained) if turn is None else turn(step)
            for network in trained.values():
                network.zero_grad()
            scalars: dict[str, Tensor] = {}
            for indices in parts:
                draws = Draws(run.seed, step, run.batch, indices, world.device)
                value, named = objective(draws)
                (value / len(parts)).backward()
                for name, scalar in {"loss": value, **named}.items():
                    scalars[name] = scalars.get(name, 0) + scalar.detach() / len(parts)
            for name in names:
                average_gradients(trained[name].weights, world)
            means = dict(zip(scalars, world.mean(torch.stack([v.reshape(()).float() for v in scalars.values()])),
                             strict=True))  # fmt: skip
            norms = {_label("grad_norm", name, trained): trained[name].clip() for name in names}
            _check(step, {"loss": means["loss"], **norms}, folder)
            for name in names:
                trained[name].update(step)
            if metrics is not None:
                rates = {_label("lr", name, trained): trained[name].schedule.lr_at(step) for name in trained}
                metrics.add(means | norms, **rates)
            if (step + 1) % run.save_every == 0 or step + 1 == total:
                save(step + 1)
    finally:
        if metrics is not None:
            metrics.close()
    return {name: network.finish() for name, network in trained.items()}


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
    """`train` for one network in one process whose loss draws its own numbers from the step."""
    settings = Run(run, log_every=log_every, save_every=save_every, report=report)
    return train({"model": (model, schedule)}, lambda draws: loss(draws.step), settings)["model"]  # type: ignore[return-value]


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one training step: the same however often training was interrupted."""
    return torch.Generator().manual_seed((seed << 32) + step)


def _check(step: int, values: Mapping[str, Tensor], folder: Path) -> None:
    if not all(bool(torch.isfinite(value)) for value in values.values()):
        shown = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
        raise TrainingError(
            f"a number is not finite at step {step}: {shown}. The last good checkpoint is in {folder}; "
            "a smaller learning rate is the usual cure."
        )


def _label(what: str, name: str, networks: Mapping[str, object]) -> str:
    return what if len(networks) == 1 else f"{what}_{name}"


def _plain(value: Any) -> Any:
    """As JSON would give it back: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
