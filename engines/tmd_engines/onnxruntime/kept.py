"""The optimised graphs of small models, kept between runs: they load several times as fast as they are optimised.

An entry holds a second copy of the weights, so large models are left alone. It depends on the CPU, as the layouts of
convolutions do, and is kept only if it computes what the graph computes, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from tempfile import gettempdir
from threading import Lock, get_ident
from typing import Any

import numpy as np

from .. import unfinished
from ..bundle.reader import Bundle
from ..cache_folder import cache_folder, code_key
from ..device.cpu import cpu_key
from ..device.paths import utf8_name
from ..device.plan_cache import PlanCache
from ..device.running import RUNNING
from ..engine import Engine
from ..errors import EngineError
from . import SILENT

MAX_BYTES = 64 << 20  # of a graph and its weights
MAX_CHECKED_BYTES = 8 << 20  # of the inputs at which an entry is checked, which runs the graph twice more
_CODE = tuple(Path(__file__).with_name(name) for name in ("engine.py", "float4.py", "kept.py", "lowering.py"))


class KeptGraph:
    """What is kept of one graph, and how it comes to be: `open` reads it, `make` and `check` write it."""

    def __init__(self, onnxruntime: Any, bundle: Bundle, engine: Engine, threads: int | None) -> None:
        info = bundle.graph_info(engine.graph)
        files = [bundle.manifest.files[name] for name in (info.file, info.data) if name]
        code = code_key(*_CODE)
        small = sum(file.size for file in files) <= MAX_BYTES
        self._onnxruntime, self._bundle, self._graph, self._inputs = onnxruntime, bundle, engine.graph, engine.inputs
        self._plans = PlanCache(cache_folder() if small and code else None)
        self._key = {
            "engine": f"onnxruntime {onnxruntime.__version__}",
            "graph": " ".join(file.sha256 for file in files),
            "lowering": str(code),
            "threads": str(threads),
            **cpu_key(),
        }
        self._lock = Lock()
        self._unchecked: bytes | None = None
        self._again: Callable[[bytes], Any] | None = None

    def open(self, content: Callable[[], Any], options: Callable[[], Any]) -> Any:
        """A session: what is kept, or the graph that `content()` gives, optimised. Raises as ONNX Runtime does."""

        def read(entry: bytes) -> Any:
            settings = options()
            settings.graph_optimization_level = self._onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            return self._onnxruntime.InferenceSession(entry, settings, providers=["CPUExecutionProvider"])

        found = self._plans.map(self._key)
        entry = None if found is None else bytes(found)
        if entry:
            with suppress(Exception):  # an entry that ONNX Runtime does not take is made anew
                return read(entry)
        made = content()  # which settles what options say
        if entry == b"" or not self._plans.usable:
            return self._onnxruntime.InferenceSession(made, options(), providers=["CPUExecutionProvider"])
        return self._make(made, options(), options, read)

    def _make(self, content: Any, settings: Any, options: Callable[[], Any], read: Callable[[bytes], Any]) -> Any:
        """A session whose optimised graph is remembered until `check` has buffers to try it with."""
        try:
            folder = unfinished.begin(Path(gettempdir()), is_folder=True, mode=0o700)
        except OSError:
            return self._onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
        try:
            file = folder / "optimised.ort"
            settings.optimized_model_filepath = utf8_name(file)
            settings.add_session_config_entry("session.save_model_format", "ORT")
            try:
                session = self._onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
            except Exception:  # of the graph, and then once more; or of a disk without room
                return self._onnxruntime.InferenceSession(content, options(), providers=["CPUExecutionProvider"])
            if self._bundle.data_is_as_stated(self._graph):  # or another model would be kept for this one
                with suppress(OSError):
                    self._unchecked, self._again = file.read_bytes(), read
            return session
        finally:
            unfinished.discard(folder)

    def _run(self, session: Any, inputs: Mapping[str, np.ndarray]) -> Any:
        """The outputs. Raises EngineError if a signal stopped it, and as ONNX Runtime does."""
        thread, trial = get_ident(), _Trial(self._onnxruntime.RunOptions())
        trial.options.log_severity_level = SILENT
        RUNNING[thread] = trial
        try:
            return session.run(None, inputs, trial.options)
        except Exception:
            if trial.options.terminate:
                raise EngineError(f"Graph {self._graph} was stopped.") from None
            raise
        finally:
            RUNNING.pop(thread, None)

    def check(self, session: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Keeps a graph that was just optimised if it computes the same after reading it back, for these inputs.

        An empty entry says that it was tried. Raises EngineError if a signal stopped it.
        """
        if self._unchecked is None:
            return
        types = {name: np.dtype(spec.dtype) for name, spec in self._inputs.items()}
        if sum(prod(shape) * types[name].itemsize for name, shape in shapes.items()) > MAX_CHECKED_BYTES:
            return
        with self._lock:
            content, again = self._unchecked, self._again
            self._unchecked = self._again = None
        if content is None or again is None:  # another thread took it
            return
        rng = np.random.default_rng(0)
        inputs = {
            name: rng.normal(size=shape).astype(types[name])
            if types[name].kind == "f"
            else rng.integers(0, 2, shape).astype(types[name])
            for name, shape in shapes.items()
        }
        try:
            expected = self._run(session, inputs)
        except EngineError:
            raise
        except Exception:  # sizes that do not fit together
            return
        try:
            found = self._run(again(content), inputs)
            same = all(one.tobytes() == other.tobytes() for one, other in zip(expected, found, strict=True))
        except EngineError:
            raise
        except Exception:
            same = False
        self._plans.store(self._key, content if same else b"")


class _Trial:
    """A run of a check, as `RUNNING` has it."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def stop(self) -> None:
        """Ends the run, after the node that it is at."""
        self.options.terminate = True
