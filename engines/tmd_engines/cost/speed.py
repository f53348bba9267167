"""How long a run will take: its operations over a speed that was measured on this machine, once, and kept.

The first estimate of a bundle rests on a product of matrices, of which a model reaches a share. From then on it rests
on the latest runs of that bundle: small ones are slower per operation than large ones, so each size has its own speed,
and a run larger than all before is as fast as the largest one at least.
"""

from __future__ import annotations

import hashlib
from time import perf_counter
from typing import TYPE_CHECKING

from ..cache_folder import Facts
from ..device.cpu import describe_cpu

if TYPE_CHECKING:
    from ..bundle.reader import Bundle

SHARE = 0.4
"""What graphs reach of the speed of a large product (docs/reliability.md)."""
_FACTS = Facts("speed.json")
_SIDE, _RUNS = 1024, 3
_SIZES = 40  # classes of runs; 4^40 operations are more than there will be


def seconds_of(flops: float, bundle: Bundle, engine: str, threads: int | None) -> float:
    """How long so many operations of this bundle take here: by its runs, or by a share of the machine's speed."""
    known, key, own = _read(), _key(bundle, engine, threads), _size_class(flops)
    seen = {size: known[f"{key} {size}"] for size in range(_SIZES) if f"{key} {size}" in known}
    enough = [size for size in seen if size >= own]
    if enough:
        return flops / seen[min(enough)]
    share = SHARE * _machine_speed(known, threads)
    return flops / (max(seen[max(seen)], share) if seen else share)


def learn(flops: float, seconds: float, bundle: Bundle, engine: str, threads: int | None) -> None:
    """Keeps what a run of this bundle reached, for the estimates to come."""
    if flops > 0 and seconds > 0:
        _FACTS.add({f"{_key(bundle, engine, threads)} {_size_class(flops)}": flops / seconds})


def _size_class(flops: float) -> int:
    """Runs of one class differ in size by less than a factor of four."""
    return min(int(flops).bit_length() // 2, _SIZES - 1)


def _machine_speed(known: dict[str, float], threads: int | None) -> float:
    machine = _machine_key(threads)
    if machine not in known:
        _FACTS.add({machine: _measure(threads)})
        known = {machine: _measured, **_read()}
    return known[machine]


_measured = 1e10  # the latest measurement of this process, where there is no cache; until then a slow core's


def _measure(threads: int | None) -> float:
    """Operations per second of a float32 product of 1024 x 1024 matrices on ONNX Runtime: the best of a few runs."""
    global _measured
    try:
        import numpy as np
        import onnxruntime
        from onnx import TensorProto, helper

        shape = [_SIDE, _SIDE]
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "abc"]
        graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "g", values[:2], values[2:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        inputs = {name: np.ones(shape, np.float32) for name in "ab"}
        seconds = []
        for _ in range(_RUNS):
            start = perf_counter()
            session.run(None, inputs)
            seconds.append(perf_counter() - start)
        _measured = 2 * _SIDE**3 / min(seconds)
    except Exception:  # no ONNX Runtime, no memory: an estimate may be rough, and must not end a run
        pass
    return _measured


def _key(bundle: Bundle, engine: str, threads: int | None) -> str:
    files = sorted(f"{name} {file.sha256}" for name, file in bundle.manifest.files.items())
    return hashlib.sha256("\n".join([_machine_key(threads), engine, *files]).encode()).hexdigest()


def _machine_key(threads: int | None) -> str:
    cpu = describe_cpu()
    text = f"{cpu['name']}, {cpu['cores']} cores, {threads or 'all'} threads"
    return f"matmul {hashlib.sha256(text.encode()).hexdigest()}"


def _read() -> dict[str, float]:
    """The figures that are kept, as far as they can be true."""
    numbers = {name: value for name, value in _FACTS.read().items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if 1e3 < value < 1e18}
