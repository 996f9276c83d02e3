"""The report in a real browser: it draws, answers the mouse and the keyboard, and asks the network for nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from seedbed.runs.report import write_report
from tests.unit.runs.test_report import HOSTILE, SUMMARY, make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, report: Path, **options: Any) -> Iterator[Page]:
    """The report with its curves drawn. Fails at any request but for the file, and at any word on the console."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []

    def answer(route: Route) -> None:
        asked.append(route.request.url)
        route.continue_() if route.request.url == report.as_uri() else route.abort()

    page.route("**/*", answer)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto(report.as_uri())
    if options.get("java_script_enabled", True):
        page.wait_for_selector("html[data-curves=drawn]", state="attached", timeout=30_000)
    yield page
    context.close()
    assert asked == [report.as_uri()]
    assert said == []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with every kind of event, and hostile words wherever a run has words."""
    return write_report([make_run(tmp_path_factory.mktemp("page") / "run")])


@pytest.fixture(scope="module")
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The report, open for tests that leave it as they found it."""
    with opened(browser, report, permissions=["clipboard-read", "clipboard-write"]) as page:
        yield page


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    long = "a-run-with-a-name-as-long-as-those-that-sweeps-give-learning_rate-0.0005-weight_decay-0.1"
    runs = [make_run(folder / f"{long}-{seed}", seed=seed) for seed in range(2)]
    summary = {**SUMMARY, "best_val_loss": 3.2}
    return write_report([*runs, make_run(folder / "<b>other", learning_rate=0.01, summary=summary)])


def until(page: Page, condition: str) -> None:
    """Wait for a condition; what the browser has for it the page's policy forbids."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never: {condition}")


def first_x(page: Page) -> list[float]:
    """Where the first curve of each chart begins."""
    return page.evaluate("[...document.querySelectorAll('.chart')].map(chart => chart.data[0].x[0])")  # type: ignore[no-any-return]


def ranges(page: Page) -> list[list[float]]:
    return page.evaluate("[...document.querySelectorAll('.chart')].map(chart => chart.layout.xaxis.range)")  # type: ignore[no-any-return]


def test_curves_of_a_real_run(browser: Browser, tiny_run: Path, tmp_path: Path) -> None:
    with opened(browser, write_report([tiny_run], tmp_path / "report.html")) as page:
        titles = page.locator("figcaption").all_inner_texts()
        assert [title.split()[0] for title in titles][:2] == ["Loss", "Perplexity"]
        for chart in page.locator(".chart").all():
            paths = chart.locator(".scatterlayer path.js-line")
            assert paths.count() >= 1
            assert (paths.first.get_attribute("d") or "").count("L") >= 1


def test_values_where_the_mouse_is(page: Page) -> None:
    page.locator(".chart .nsewdrag").first.hover()
    shown = page.locator(".chart .hoverlayer").first
    shown.locator("text").first.wait_for()
    words = " ".join(shown.locator("text").all_text_contents())
    assert "step 1" in words and "training" in words


def test_another_axis_for_all_charts(page: Page) -> None:
    assert set(first_x(page)) == {1}
    page.get_by_label("Tokens").check(force=True)
    assert set(first_x(page)) == {256}
    page.get_by_label("Tokens").press("ArrowRight")  # as from the keyboard
    assert set(first_x(page)) == {0.6}  # seconds
    assert "seconds" in (page.locator(".chart .xtitle").first.text_content() or "")
    page.get_by_label("Epochs").check(force=True)
    assert set(first_x(page)) == {0.01}
    page.get_by_label("Steps").check(force=True)
    assert set(first_x(page)) == {1}


def test_a_zoom_in_one_chart_is_one_in_all(page: Page) -> None:
    before = ranges(page)
    assert len({tuple(each) for each in before}) == 1
    page.locator(".chart").nth(2).scroll_into_view_if_needed()
    area = page.locator(".chart .nsewdrag").nth(2).bounding_box()
    assert area
    page.mouse.move(area["x"] + 0.25 * area["width"], area["y"] + 60)
    page.mouse.down()
    page.mouse.move(area["x"] + 0.75 * area["width"], area["y"] + 62, steps=5)
    page.mouse.up()
    until(page, "document.querySelector('.chart').layout.xaxis.range[0] > 50")
    page.wait_for_timeout(300)
    (close,) = {tuple(round(end) for end in each) for each in ranges(page)}
    assert 60 < close[0] < 90 and 210 < close[1] < 240
    page.get_by_role("button", name="Whole run").click()
    until(page, "document.querySelector('.chart').layout.xaxis.range[0] < 50")
    assert ranges(page) == before


def test_lines_can_be_left_out(page: Page) -> None:
    button = page.get_by_role("button", name="validation", exact=True)
    drawn = page.locator(".chart").first.locator(".scatterlayer .trace")
    everything = drawn.count()
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert drawn.count() == everything - 1
    button.press("Enter")
    assert drawn.count() == everything


def test_events_are_lines_in_every_chart(page: Page) -> None:
    for chart in page.locator(".chart").all():
        assert chart.locator(".shapelayer path").count() >= 5
    spikes = page.get_by_role("button", name="loss spike")
    drawn = page.locator(".chart").nth(4).locator(".shapelayer path")
    everything = drawn.count()
    spikes.click()
    assert drawn.count() == everything - 1
    spikes.click()


def test_dark_and_light(browser: Browser, report: Path) -> None:
    page_colour = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('.xtick text')).fill"
    with opened(browser, report, color_scheme="light") as page:
        light = page.evaluate(f"[{page_colour}, {ink}]")
        page.locator("#theme").click()
        switched = page.evaluate(f"[{page_colour}, {ink}]")
    with opened(browser, report, color_scheme="dark") as page:
        dark = page.evaluate(f"[{page_colour}, {ink}]")
        page.emulate_media(color_scheme="light")
        until(page, f"{ink} === '{light[1]}'")
        page.emulate_media(color_scheme="dark")
        page.locator("#theme").click()
        assert page.evaluate(f"[{page_colour}, {ink}]") == light
    assert dark == switched
    assert dark[0] != light[0] and dark[1] != light[1]


@pytest.mark.parametrize("width", [360, 768])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_nothing_is_wider_than_a_phone(browser: Browser, name: str, width: int, request: pytest.FixtureRequest) -> None:
    with opened(browser, request.getfixturevalue(name), viewport={"width": width, "height": 740}) as page:
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for chart in page.locator(".chart").all():
            box = chart.bounding_box()
            assert box and box["width"] <= width and box["height"] > 150


def test_hostile_words_stay_words(page: Page) -> None:
    samples = page.locator(".samples blockquote").all_inner_texts()
    assert samples[0].startswith("</script><script>alert(1)</script><img src=x")
    assert len(samples) == HOSTILE.count("alert(1)") * 6
    assert page.locator("img, main script").count() == 0


def test_flags_are_copied(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    page.get_by_role("button", name="Copy").last.click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "--warmup_ratio 0.1"


def test_a_comparison_has_a_line_for_each_setting(browser: Browser, comparison: Path) -> None:
    with opened(browser, comparison) as page:
        assert "<b>other" in page.locator(".legend").inner_text()
        chart = page.locator(".chart").nth(1)
        assert chart.locator(".scatterlayer path.js-line").count() >= 2
        assert chart.locator(".scatterlayer path.js-fill").count() == 1  # the band of two seeds
        assert page.locator("td.best").count() >= 1


def test_without_javascript_the_words_are_there(browser: Browser, report: Path) -> None:
    with opened(browser, report, java_script_enabled=False) as page:
        assert page.locator("#no-curves").is_visible()
        assert "validation loss" in page.locator(".tiles").inner_text()
        assert page.locator("#summary td").count() > 5


def test_a_browser_that_cannot_unpack_says_so(browser: Browser, report: Path) -> None:
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(report.as_uri())
    assert "too old" in page.locator("#no-curves").inner_text()
    assert page.locator("#summary td").count() > 5
    page.close()


def test_a_page_without_curves(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    report = write_report([run])
    assert report.stat().st_size < 50_000
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(report.as_uri())
    assert "No figures were recorded" in page.locator("#curves").inner_text()
    assert problems == []
    page.close()


def test_it_prints_in_light_with_everything_open(browser: Browser, report: Path, tmp_path: Path) -> None:
    with opened(browser, report, color_scheme="dark") as page:
        page.pdf(path=str(tmp_path / "report.pdf"))
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(20, 22, 24)"
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
