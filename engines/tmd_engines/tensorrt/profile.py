"""The sizes that a plan is for: of each input the smallest, the one it is tuned for, and the largest."""

from __future__ import annotations

from collections.abc import Mapping

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]


def exactly(shapes: Shapes) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The range of one size."""
    return {name: (shape, shape, shape) for name, shape in shapes.items()}


def between(smallest: Shapes, best: Shapes, largest: Shapes) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The range from one size to another."""
    return {name: (smallest[name], best[name], largest[name]) for name in largest}


def largest(ranges: Ranges) -> dict[str, Shape]:
    """The shapes at the upper end."""
    return {name: sizes[2] for name, sizes in ranges.items()}


def contains(ranges: Ranges, shapes: Shapes) -> bool:
    """Whether a plan for `ranges` takes inputs of these shapes."""
    return ranges.keys() == shapes.keys() and all(
        len(shape) == len(ranges[name][0])
        and all(low <= size <= high for low, size, high in zip(ranges[name][0], shape, ranges[name][2], strict=True))
        for name, shape in shapes.items()
    )


def to_text(ranges: Ranges) -> str:
    """For people and for keys: "t 1, x 1x16x21x60x104"; a range is "x 1x16x5x8x8..1x16x21x60x104..1x16x21x90x160"."""
    return ", ".join(
        f"{name} " + "..".join("x".join(map(str, shape)) for shape in (sizes if len({*sizes}) > 1 else sizes[:1]))
        for name, sizes in sorted(ranges.items())
    )


def from_text(text: str) -> dict[str, tuple[Shape, Shape, Shape]]:
    """What `to_text` wrote. Raises ValueError."""
    ranges = {}
    for part in text.split(", "):
        name, _, sizes = part.rpartition(" ")
        shapes = [tuple(int(size) for size in shape.split("x")) if shape else () for shape in sizes.split("..")]
        if len(shapes) not in (1, 3) or not name:
            raise ValueError(f"{part!r} is no range of sizes")
        ranges[name] = (shapes[0], shapes[len(shapes) // 2], shapes[-1])
    return ranges
