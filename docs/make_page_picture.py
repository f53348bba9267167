"""Makes serve.png, the page of `tmd-serve` with videos of the built-in model, in a Chromium of the system.

Run it as `python docs/make_page_picture.py`, with the extras `serve` and `test`. The picture differs a little from
machine to machine, by fonts and by how far the running video is.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.helpers.browser import chromium
from tests.helpers.serving import served

SIZE = {"width": 1280, "height": 820}
PROMPTS = (
    "a red circle moving right on a black background",
    "a large yellow star spinning on a navy background",
    "a cyan square moving up slowly on a navy background",
    "a blue triangle sliding left on a gray background",
    "an orange circle shrinking on a gray background",
    "a green triangle growing on a black background",
)
LONG = {"frames": 121, "steps": 4, "inner_steps": 4, "preview": True}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, chromium() as browser, served(Path(folder) / "data") as server:
        for prompt in PROMPTS:
            server.finished(server.ask("/v1/videos", {"prompt": prompt, "seed": 1})["id"])
        page = browser.new_page(viewport=SIZE, device_scale_factor=1.25)
        page.goto(server.url)
        page.locator("#results .card").nth(len(PROMPTS) - 1).wait_for()
        page.fill("#prompt", "a magenta star falling quickly on a black background")
        body = {"prompt": "a magenta star falling quickly on a black background", "seed": 1}
        server.ask("/v1/videos", {**body, **LONG})
        page.locator(".job .preview img").wait_for(timeout=60_000)
        page.locator("#prompt").blur()
        page.mouse.move(1, 1)
        page.screenshot(path=Path(__file__).parent / "serve.png")


if __name__ == "__main__":
    main()
