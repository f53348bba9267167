"""Published Wan checkpoints as they lie on a disk: which files there are, whose they are, and their tensors by name.

`folders` finds files, `tensors` opens them without running anything that they hold, `storage` knows the formats that
keep weights in fewer bits, `names` knows how the same weight is called in each layout, `recognise` tells what a set of
tensors is and refuses what is no plain text-to-video model. `lora` reads differences to such weights, under the names
of `lora_names` and with the scales of `lora_config`.
What it is not: a source of weights for the exporter; `wan_source` makes one of it.
"""

from .folders import Found, WeightFiles, find
from .recognise import Checkpoint, Kind, recognise
from .tensors import Entry, Tensors, open_tensors

__all__ = ["Checkpoint", "Entry", "Found", "Kind", "Tensors", "WeightFiles", "find", "open_tensors", "recognise"]
