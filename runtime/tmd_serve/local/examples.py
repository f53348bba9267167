"""Prompts that the models which come with the package can draw, for a page to offer."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "tiny": (
        "a red circle moving right on a black background",
        "a blue star spinning on a gray background",
        "a large yellow square bouncing on a navy background",
        "a small green triangle growing on a black background",
    ),
    "tim-tiny": (
        "a large orange star on a black background",
        "a red circle on a gray background",
        "a small green triangle on a navy background",
        "a blue square on a black background",
    ),
}
"""Name of a model -> prompts in the words of its training."""
