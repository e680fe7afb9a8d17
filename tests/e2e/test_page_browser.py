"""The page in a real browser: right at both widths, it answers, it lets nothing in or out."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qll.report import render

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "golden" / "report_sample.json"
SIZES = {"desktop": (1280, 900), "phone": (375, 812)}

spec = importlib.util.spec_from_file_location("screenshot", ROOT / "docs" / "screenshot.py")
screenshot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(screenshot)

pytestmark = pytest.mark.skipif(
    screenshot.find_chromium() is None, reason="no chromium on PATH (see tests/QUARANTINE.md)"
)

# WCAG contrast of an element's text on its own background, whatever colour space CSS mixed it in.
CONTRAST = """element => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const luminance = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const part = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const ground = (one) => getComputedStyle(one).backgroundColor;
  let holder = element;
  while (ground(holder) === "rgba(0, 0, 0, 0)") holder = holder.parentElement;
  const [a, b] = [getComputedStyle(element).color, ground(holder)].map(luminance);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


@pytest.fixture(scope="module")
def browser():
    with screenshot.chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads(SAMPLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def file(report, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(report), encoding="utf-8")
    return path


@pytest.fixture
def visit(browser, file):
    """visit(size, ...) opens the page; at the end nothing was requested and nothing complained."""
    contexts, complaints, requests = [], [], []

    def open_page(size: str = "desktop", path: Path = file, **options):
        width, height = SIZES[size]
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith("file:") for url in requests)
    assert len(requests) == len(contexts)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_overflows_and_everything_can_be_read(visit, size, theme):
    page = visit(size, color_scheme=theme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    clipped = "cells => cells.filter(c => c.scrollWidth > c.clientWidth + 1).length"
    assert page.locator(".cell").evaluate_all(clipped) == 0
    for selector in ("p.about", ".card h3", "nav a", ".choice span", ".bar .side", ".badge"):
        assert page.locator(selector).first.evaluate(CONTRAST) >= 4.5, selector
    for metric in ("kept", "rel_error", "gap"):
        page.check(f"input[value={metric}]", force=True)
        worst = page.locator(".cell").evaluate_all(f"cells => Math.min(...cells.map({CONTRAST}))")
        assert worst >= 3, metric


def test_themes_differ(visit):
    colour = "getComputedStyle(document.body).backgroundColor"
    assert visit(color_scheme="light").evaluate(colour) != visit(color_scheme="dark").evaluate(
        colour
    )


def test_colouring_the_map(visit, report):
    page = visit()
    row = report["compression"]["per_matrix"][0]
    cell = page.locator(".cell[data-number='0']")
    assert cell.inner_text() == f"{100 * row['params'] / row['params_dense']:.0f}"
    before = cell.evaluate("cell => getComputedStyle(cell).backgroundColor")
    page.check("input[value=rel_error]", force=True)
    assert cell.inner_text() == f"{row['rel_error']:.2f}".removeprefix("0")
    assert page.locator("#scale-name").inner_text() == "Relative error"
    assert cell.evaluate("cell => getComputedStyle(cell).backgroundColor") != before
    assert f"{row['rel_error']:.4f}" in cell.get_attribute("aria-label")


def test_choosing_a_matrix_by_mouse_and_by_keyboard(visit):
    page = visit()
    page.click(".cell[data-number='8']")
    assert page.locator("#detail-name").inner_text() == "model.layers.1.self_attn.k_proj"
    assert "192\u00d7576" in page.locator("#detail-facts").inner_text()
    assert page.locator("#detail-entropy tbody tr").count() == 3
    assert page.locator("#detail-spectrum [data-line='dense-1'].chosen").count() == 1
    page.keyboard.press("ArrowRight")
    assert page.locator("#detail-name").inner_text() == "model.layers.2.self_attn.k_proj"
    page.keyboard.press("ArrowUp")
    assert page.locator("#detail-name").inner_text() == "model.layers.2.self_attn.q_proj"
    page.keyboard.press("ArrowUp")
    assert page.locator("#detail-name").inner_text() == "model.layers.2.self_attn.q_proj"
    assert page.locator(".cell[tabindex='0']").count() == 1
    page.click(".other")
    assert page.locator("#detail-name").inner_text() == "model.embed_tokens"
    assert page.locator("#detail-spectrum").is_hidden()


def test_arrow_keys_follow_the_turned_map_of_a_phone(visit):
    page = visit("phone")
    page.click(".cell[data-number='8']")
    page.keyboard.press("ArrowDown")
    assert page.locator("#detail-name").inner_text() == "model.layers.2.self_attn.k_proj"


def test_reading_an_entropy_curve(visit, report):
    page = visit()
    assert page.locator(".panels.shown").count() == 1
    page.check("input[name=cut] >> nth=1", force=True)
    plot = page.locator(".panels.shown .curve").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 40)
    lines = page.locator("#tip").inner_text().splitlines()
    block = int(lines[0].removeprefix("block "))
    assert 10 <= block <= 20
    name = f"model.layers.{block}.self_attn.q_proj"
    entry = next(
        e for e in report["entropy"]["per_matrix"] if e["name"] == name and e["cut"] == "site1"
    )
    assert lines[2] == f"dense {entry['nats']:.3f}"
    assert lines[3] == f"converted {entry['nats_converted']:.3f}"
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + 40)
    assert page.locator("#detail-name").inner_text() == name


def test_sorting_and_filtering_the_table(visit, report):
    page = visit()
    header = page.locator("#table thead button", has_text="rel. error")
    header.click()
    header.click()
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("rel. error")
    largest = max(report["compression"]["per_matrix"], key=lambda row: row["rel_error"])
    assert page.locator("#table tbody tr").first.locator(".link").inner_text() == largest["name"]
    page.fill("#filter", "layers.12. mlp")
    assert page.locator("#shown").inner_text() == "3 of 211"
    assert page.locator("#table tbody tr:visible").count() == 3
    page.fill("#filter", "")
    page.select_option("#format", "dense")
    dense = sum(row["format"] == "dense" for row in report["compression"]["per_matrix"])
    assert page.locator("#table tbody tr:visible").count() == dense
    page.locator("#table tbody tr:visible .link").first.click()
    assert page.locator("#detail-format").inner_text() == "dense"


def test_the_page_is_whole_without_its_script(visit):
    page = visit(java_script_enabled=False)
    assert page.locator(".panels[data-cut]:visible").count() == 3
    assert page.locator("#table tbody tr").count() == 211
    assert page.locator(".needs-script:visible").count() == 0


def test_print_shows_every_row(visit):
    page = visit()
    page.emulate_media(media="print")
    height = "element => element.scrollHeight - element.clientHeight"
    assert page.locator(".tall").evaluate(height) <= 1
    assert page.locator("nav").is_hidden()
    assert page.pdf()[:5] == b"%PDF-"


def test_hostile_names_run_nothing(visit, report, tmp_path):
    evil = "</script><script>window.attacked=1</script><img src=x onerror='window.attacked=1'>"
    hostile = json.loads(json.dumps(report))
    entropy = hostile["entropy"]
    for key in ("per_matrix", "spectra"):  # two blocks are enough here
        entropy[key] = [e for e in entropy[key] if e["name"].split(".")[2] in ("0", "1")]
    hostile["model"]["name"] = evil
    hostile["warnings"] = [evil]
    hostile["compression"]["per_matrix"][0]["format"] = evil
    hostile["compression"]["per_matrix"][0]["modes"] = {evil: [2]}
    hostile["entropy"]["per_matrix"][1]["cut"] = evil
    path = tmp_path / "hostile.html"
    path.write_text(render(hostile), encoding="utf-8")
    page = visit(path=path)
    page.click(".cell[data-number='0']")
    assert evil in page.locator("#detail-facts").inner_text()
    assert page.locator("#detail-format").inner_text() == evil
    assert page.evaluate("window.attacked") is None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_script_that_got_in_would_be_blocked(browser, file, tmp_path):
    """The second wall: were escaping ever to fail, the browser would still refuse to run it."""
    page = browser.new_page()
    broken = file.read_text(encoding="utf-8").replace("<h1>", "<h1><script>attacked=1</script>")
    path = tmp_path / "broken.html"
    path.write_text(broken, encoding="utf-8")
    page.goto(path.as_uri())
    assert page.evaluate("window.attacked") is None
    assert page.locator("html.scripted").count() == 1
    page.close()


def test_the_screenshot_script_writes_a_picture(file, tmp_path):
    target = tmp_path / "page.png"
    script = ROOT / "docs" / "screenshot.py"
    size = ["--width", "400", "--height", "300"]
    subprocess.run([sys.executable, script, file, target, *size, "--dark"], check=True)
    data = target.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == 400
