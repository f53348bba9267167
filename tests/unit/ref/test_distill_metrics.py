"""What a person watches during training: the bar on a terminal, lines elsewhere, TensorBoard's file."""

import json
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tmd_ref.distill.metrics import Metrics


def record(run, lines, bar=None):
    metrics = Metrics(run, steps=10, done=0, every=5, report=lines.append, bar=bar)
    for step in range(10):
        scalars = {"loss": torch.tensor(float(step))}
        metrics.add(scalars if step % 2 else {**scalars, "rare": 1.0}, lr=0.1)
    metrics.close()


def test_tensorboard_holds_the_same_averages_as_the_json_lines(tmp_path):
    record(tmp_path, [])
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["rare"], line["lr"]) for line in written] == [
        (5, 2.0, 1.0, 0.1),
        (10, 7.0, 1.0, 0.1),
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 2.0), (10, 7.0)]
    assert set(events.Tags()["scalars"]) == {"loss", "rare"}


@pytest.mark.parametrize("bar", [True, False])
def test_a_bar_replaces_the_lines(tmp_path, capsys, bar):
    lines: list[str] = []
    record(tmp_path, lines, bar)
    shown = capsys.readouterr().err
    assert ("10/10" in shown, len(lines)) == ((True, 0) if bar else (False, 2))


def test_without_a_terminal_there_is_no_bar_and_without_tensorboard_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines: list[str] = []
    assert not sys.stderr.isatty()
    record(tmp_path, lines)
    assert capsys.readouterr().err == ""
    assert lines[0].startswith("step 5/10  loss 2  rare 1")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}
