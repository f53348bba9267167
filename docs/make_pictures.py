"""Makes the pictures of the built-in models: tiny.gif for the README, one clip per prompt side by side, and
tim-steps.png for docs/tim.md, a still per number of steps (rows) and prompt (columns).

Run it as `python docs/make_pictures.py`.
"""

from pathlib import Path

import numpy as np

import tmd_runtime

PROMPTS = (
    "a red circle moving right on a black background",
    "a large yellow star spinning on a navy background",
    "a small white square bouncing on a gray background",
    "a green triangle growing on a black background",
    "a cyan square moving up slowly on a navy background",
    "an orange circle shrinking on a gray background",
    "a magenta star falling quickly on a black background",
    "a blue triangle sliding left on a gray background",
)
STILLS = (
    "a large orange star on a black background",
    "a green square on a navy background",
    "a yellow triangle on a gray background",
    "a cyan circle on a black background",
    "a red star on a navy background",
    "a white triangle on a black background",
)
STEPS = (1, 2, 4, 8, 32)
COLUMNS, SCALE, GAP = 4, 2, 4


def main() -> None:
    clips()
    stills()


def clips() -> None:
    with tmd_runtime.load() as pipeline:
        clips = [pipeline(prompt, seed=1).frames.repeat(SCALE, 1).repeat(SCALE, 2) for prompt in PROMPTS]
        fps = pipeline.manifest.video.fps
    padded = [np.pad(clip, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255) for clip in clips]
    rows = [np.concatenate(padded[i : i + COLUMNS], axis=2) for i in range(0, len(padded), COLUMNS)]
    tmd_runtime.write_video(Path(__file__).parent / "tiny.gif", np.concatenate(rows, axis=1), fps)


def stills() -> None:
    with tmd_runtime.load("builtin:tim-tiny") as pipeline:
        made = [[pipeline(prompt, seed=1, steps=steps).frames for steps in STEPS] for prompt in STILLS]
    rows = [
        np.concatenate([np.pad(still, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255) for still in row], 1)
        for row in made
    ]
    tmd_runtime.write_video(Path(__file__).parent / "tim-steps.png", np.concatenate(rows, axis=2), 1)


if __name__ == "__main__":
    main()
