"""Makes the README's picture with the built-in model: one clip per prompt, side by side, as an animated GIF.

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
COLUMNS, SCALE, GAP = 4, 2, 4


def main() -> None:
    with tmd_runtime.load() as pipeline:
        clips = [pipeline(prompt, seed=1).frames.repeat(SCALE, 1).repeat(SCALE, 2) for prompt in PROMPTS]
        fps = pipeline.manifest.video.fps
    padded = [np.pad(clip, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255) for clip in clips]
    rows = [np.concatenate(padded[i : i + COLUMNS], axis=2) for i in range(0, len(padded), COLUMNS)]
    tmd_runtime.write_video(Path(__file__).parent / "tiny.gif", np.concatenate(rows, axis=1), fps)


if __name__ == "__main__":
    main()
