"""The page of tmd-serve as a person uses it, in a real Chromium against a real server with the built-in models."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

from tests.helpers.browser import Watched, chromium  # noqa: E402
from tests.helpers.serving import Served, served  # noqa: E402

PAGE = Path(__file__).parents[2] / "runtime" / "tmd_serve" / "page"
PROMPT = "a red circle moving right on a black background"
MODELS = ("--bundle", "builtin:tiny", "--bundle", "builtin:tim-tiny")
SLOW = {"width": "128", "height": "128", "frames": "81", "steps": "4", "inner_steps": "4"}
"""Seconds of work, to look at while it goes on."""
PLAYS = """async (player) => {
    player.play();
    while (player.currentTime < 0.2) await new Promise((resolve) => setTimeout(resolve, 20));
}"""
DESK, PHONE = {"width": 1280, "height": 860}, {"width": 320, "height": 640}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("page") / "data", *MODELS) as found:
        yield found


@pytest.fixture
def watched(browser: Any, server: Served) -> Iterator[Watched]:
    """The page, open; whatever a test does, nothing goes wrong on it and it asks nobody but its server."""
    context = browser.new_context(viewport=DESK)
    found = Watched(context.new_page())
    found.page.goto(server.url)
    found.page.locator("#send").wait_for()
    yield found
    context.close()
    assert found.complaints == []
    places = {urlsplit(address)[:2] for address in found.addresses if not address.startswith(("data:", "blob:"))}
    assert places == {tuple(urlsplit(server.url)[:2])}


@pytest.fixture
def page(watched: Watched) -> Any:
    return watched.page


@pytest.fixture
def made(server: Served) -> list[str]:
    """Two finished videos that differ in their seed."""
    body = {"prompt": PROMPT, "frames": 5, "size": "32x32"}
    return [server.finished(server.ask("/v1/videos", {**body, "seed": seed})["id"])["id"] for seed in (1, 2)]


def fill_slowly(page: Any, seed: str) -> None:
    """A form whose video takes a while."""
    page.fill("#prompt", PROMPT)
    page.locator(".settings").evaluate("element => element.open = true")
    page.fill("#seed", seed)
    for name, value in SLOW.items():
        field = page.locator(f"#{name}")
        if field.evaluate("element => element.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)


def card(page: Any, video: str) -> Any:
    return page.locator(f"#results [data-id='{video}']")


def test_the_page_is_small_and_names_no_other_place() -> None:
    files = [path for path in PAGE.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 150_000
    for path in files:
        text = path.read_text()
        assert set(re.findall(r"https?://[^\"' )]+", text)) <= {"http://www.w3.org/2000/svg"}, path
        assert not re.search(r"\son\w+=|style=|<style|javascript:|innerHTML|eval\(", text), path


def test_a_prompt_becomes_a_video_with_progress_and_plays(page: Any, server: Served) -> None:
    page.keyboard.press("/")
    page.locator("#prompt").press_sequentially(PROMPT)
    page.locator("#prompt").press("Enter")
    row = page.locator("#jobs .job").first
    expect(row).to_contain_text(PROMPT)
    expect(page.locator("#results .card").first).to_contain_text("64×64 · 2.1 s", timeout=30_000)
    video = server.ask("/v1/videos")["data"][0]
    expect(card(page, video["id"])).to_contain_text(f"seed {video['tmd']['seed']}")
    card(page, video["id"]).locator(".open").click()
    player = page.locator("#viewer video")
    expect(player).to_have_js_property("videoWidth", 64)
    expect(page.locator("#viewer")).to_contain_text(str(video["tmd"]["seed"]))
    player.evaluate(PLAYS)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download", exact=True).click()
    assert saved.value.suggested_filename == f"{PROMPT.replace(' ', '-')}-{video['tmd']['seed']}.mp4"
    with urllib.request.urlopen(f"{server.url}/v1/videos/{video['id']}/content") as answer:
        assert Path(saved.value.path()).read_bytes() == answer.read()


def test_the_form_has_what_the_model_has_and_nothing_else(page: Any, server: Served) -> None:
    cards = {model["id"]: model["tmd"] for model in server.ask("/v1/models")["data"]}
    assert len(cards) == 2
    for name, options in cards.items():
        page.locator("#model").select_option(name)
        page.locator(".settings").evaluate("element => element.open = true")
        video = options["kind"] == "video"
        granted = {"frames": video, "fps": video, "picture": options["image"]}
        granted |= {
            name: options[name] for name in ("guidance", "inner_steps", "negative_prompt", "schedule", "deadline")
        }
        granted |= {name: options[name] for name in ("rho", "label", "shift", "preview")}
        for field, has in granted.items():
            assert page.locator(f"#form #{field}").count() == bool(has), f"{name} {field}"
        examples = page.locator(".example")
        assert examples.all_inner_texts() == options["examples"]
        examples.nth(1).click()
        expect(page.locator("#prompt")).to_have_value(options["examples"][1])


def test_a_picture_starts_a_still(page: Any, server: Served, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "red.png")
    page.locator("#model").select_option("tim-tiny")
    page.fill("#prompt", "a blue star on a black background")
    page.locator("#picture").set_input_files(tmp_path / "red.png")
    expect(page.locator(".picture")).to_contain_text("red.png")
    page.fill("#strength", "0.6")
    page.click("#send")
    expect(page.locator("#results .card").first.locator(".title")).to_have_text(
        "a blue star on a black background", timeout=30_000
    )
    video = server.ask("/v1/videos")["data"][0]
    assert (video["tmd"]["strength"], video["tmd"]["content_type"]) == (0.6, "image/png")
    card(page, video["id"]).locator(".open").click()
    expect(page.locator("#viewer .stage img")).to_have_js_property("naturalWidth", 64)


def test_a_reload_in_the_middle_loses_nothing_and_one_can_be_cancelled(page: Any, server: Served) -> None:
    fill_slowly(page, "11")
    page.click("#send")
    row = page.locator("#jobs .job").first
    expect(row.locator("progress")).not_to_have_attribute("value", "0", timeout=30_000)
    page.fill("#prompt", "a draft")
    page.reload()
    row = page.locator("#jobs .job").first
    expect(row).to_contain_text(PROMPT)
    expect(row.locator(".state")).to_contain_text("%")
    expect(row.locator(".preview img")).to_be_visible(timeout=30_000)
    expect(page).to_have_title(re.compile(r"^\d+ % · tmd$"))
    expect(page.locator("#prompt")).to_have_value("a draft")
    row.locator(".cancel").click()
    expect(page.locator("#results .card").first).to_contain_text("Cancelled", timeout=10_000)
    video = server.ask("/v1/videos")["data"][0]
    assert video["status"] == "failed" and video["error"]["code"] == "cancelled"
    expect(page.locator("#live")).to_contain_text("Cancelled")


def test_settings_are_taken_up_again_and_give_the_same_video(page: Any, server: Served, made: list[str]) -> None:
    card(page, made[0]).get_by_role("button", name="Take up again").click()
    for name, value in {"prompt": PROMPT, "seed": "1", "frames": "5", "width": "32", "height": "32"}.items():
        expect(page.locator(f"#{name}")).to_have_value(value)
    before = page.locator("#results .card").count()
    page.click("#send")
    expect(page.locator("#results .card")).to_have_count(before + 1, timeout=30_000)
    newest = server.ask("/v1/videos")["data"][0]
    contents = []
    for video in (newest["id"], made[0]):
        with urllib.request.urlopen(f"{server.url}/v1/videos/{video}/content") as answer:
            contents.append(answer.read())
    assert newest["id"] != made[0] and contents[0] == contents[1]


def test_two_are_compared_and_one_is_deleted_by_keys_alone(page: Any, server: Served, made: list[str]) -> None:
    expect(card(page, made[1])).to_be_visible()
    page.locator("#theme").focus()
    page.keyboard.press("j")
    expect(card(page, made[1])).to_be_focused()
    page.keyboard.press("c")
    page.keyboard.press("j")
    page.keyboard.press("c")
    expect(page.locator("#bar-text")).to_have_text("Two chosen")
    page.keyboard.press("v")
    players = page.locator("#compare video")
    expect(players).to_have_count(2)
    for number in (0, 1):
        expect(players.nth(number)).to_have_js_property("videoWidth", 32)
    differing = page.locator("#compare .differs dt").all_inner_texts()
    assert "Seed" in differing and "Size" not in differing
    page.keyboard.press("Escape")
    card(page, made[0]).focus()
    page.keyboard.press("Delete")
    expect(card(page, made[0])).to_contain_text("Delete?")
    assert made[0] in [video["id"] for video in server.ask("/v1/videos")["data"]], "the first press only asks"
    page.keyboard.press("Delete")
    expect(card(page, made[0])).to_have_count(0)
    assert made[0] not in [video["id"] for video in server.ask("/v1/videos")["data"]]
    expect(page.locator("#bar-text")).to_have_text("Choose another one to compare")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()


def test_what_the_server_refuses_stands_at_the_form_in_its_words(browser: Any, server: Served) -> None:
    page = browser.new_page()
    page.goto(server.url)
    page.locator("#send").click()
    expect(page.locator("#problem")).to_have_text("Describe the video in a few words.")
    expect(page.locator("#prompt")).to_be_focused()
    page.fill("#prompt", PROMPT)
    page.fill("#width", "70")
    page.locator("#send").click()
    expect(page.locator("#problem")).to_contain_text("A width of 70 pixels cannot be made: choose a multiple of 16")
    page.fill("#width", "64")
    page.locator("#frames").evaluate("element => { element.type = 'number'; element.value = 6; }")
    page.locator("#send").click()
    expect(page.locator("#problem")).to_contain_text("6 frames cannot be made")
    expect(page.locator("#problem")).to_be_in_viewport()
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    page.close()


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_to_object_to(colours: str, browser: Any, server: Served, made: list[str]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    context = browser.new_context(
        color_scheme=colours, reduced_motion="reduce", viewport={"width": 1280, "height": 860}
    )
    page = context.new_page()
    page.goto(server.url)
    card(page, made[1]).wait_for()
    assert page.locator("html").get_attribute("data-theme") == colours

    def check(where: str) -> None:
        found = axe.run(page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found] == [], where

    page.locator(".settings summary").click()
    for video in made:
        card(page, video).locator(".pick").click()
    check("the page")
    page.click("#bar-go")
    expect(page.locator("#compare video")).to_have_count(2)
    check("two side by side")
    page.keyboard.press("Escape")
    card(page, made[1]).locator(".open").click()
    expect(page.locator("#viewer video")).to_be_visible()
    check("one, large")
    page.keyboard.press("Escape")
    page.locator("#show-help").click()
    check("the shortcuts")
    context.close()


def test_a_phone_of_320_pixels_shows_everything(browser: Any, server: Served, made: list[str]) -> None:
    context = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(server.url)
    card(page, made[1]).wait_for()

    def check(where: str) -> None:
        assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"], where
        small = page.evaluate(
            """() => [...document.querySelectorAll("button, a[href], input, select, textarea, summary")]
            .filter((one) => one.checkVisibility() && !one.closest(".sr, .skip") && !one.matches(".sr, .skip"))
            .map((one) => [one.outerHTML.slice(0, 60), one.getBoundingClientRect()])
            .filter(([, box]) => box.width < 18 || box.height < 18 || box.right > innerWidth + 1)
            .map(([text]) => text)"""
        )
        assert small == [], where

    page.locator(".settings summary").tap()
    check("the page")
    for video in made:
        card(page, video).locator(".pick").tap()
    page.locator("#bar-go").tap()
    expect(page.locator("#compare video")).to_have_count(2)
    check("two side by side")
    page.locator("#compare").get_by_role("button", name="Close").tap()
    card(page, made[1]).locator(".open").tap()
    expect(page.locator("#viewer video")).to_be_visible()
    check("one, large")
    context.close()


def test_a_server_that_goes_away_takes_nothing_with_it(browser: Any, tmp_path: Path) -> None:
    page = browser.new_page()
    with served(tmp_path / "data") as first:
        port = str(urlsplit(first.url).port)
        page.goto(first.url)
        page.fill("#prompt", PROMPT)
    expect(page.locator("#banner")).to_contain_text("The server does not answer.", timeout=15_000)
    expect(page.locator("#status-text")).to_have_text("Offline")
    page.locator("#prompt").press("Enter")
    expect(page.locator("#problem")).to_contain_text("Nothing is lost: send it again when it is back.")
    with served(tmp_path / "data", "--port", port, log="again") as second:
        expect(page.locator("#banner")).to_be_hidden(timeout=20_000)
        expect(page.locator("#prompt")).to_have_value(PROMPT)
        page.locator("#prompt").press("Enter")
        expect(page.locator("#results .card")).to_have_count(1, timeout=30_000)
        assert len(second.ask("/v1/videos")["data"]) == 1
    page.close()


def test_a_server_with_a_key_is_asked_with_it(browser: Any, tmp_path: Path) -> None:
    import subprocess

    from tests.helpers.serving import SERVE

    add = [*SERVE, "keys", "add", "laptop", "--data", str(tmp_path / "data")]
    key = subprocess.run(add, capture_output=True, text=True, check=True).stdout.strip()
    context = browser.new_context()
    page = context.new_page()
    with served(tmp_path / "data", "--require-key") as server:
        page.goto(server.url)
        page.fill("#key-input", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key .problem")).to_contain_text("The API key is unknown here")
        page.fill("#key-input", key)
        page.keyboard.press("Enter")
        page.locator("#prompt").fill(PROMPT)
        page.locator("#prompt").press("Enter")
        expect(page.locator("#results .card img")).to_have_js_property("naturalWidth", 64, timeout=30_000)
        assert page.locator("#results .card img").get_attribute("src").startswith("blob:")
        page.locator("#results .open").click()
        expect(page.locator("#viewer video")).to_have_js_property("videoWidth", 64)
        assert page.evaluate("() => localStorage.length") == 0, "the key goes with the tab"
    context.close()
