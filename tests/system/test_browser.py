"""A report in a real browser: wide and narrow windows, light and dark themes."""

import io
import itertools
import shutil

import numpy as np
import pytest
from helpers.fabricated import fabricate, fabricate_learned, save
from PIL import Image

from experiments.reporting import load, report_page

playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed"
)

EXECUTABLES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)
CHROMIUM = next(filter(None, map(shutil.which, EXECUTABLES)), None)
# The sandbox and a large /dev/shm are missing in containers; the other flags keep
# Chromium from looking for a GPU, and from making requests of its own.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
# Widths of the window in CSS pixels.
DESKTOP = 1280
PHONE = 375
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason=f"no Chromium: none of {', '.join(EXECUTABLES)}"
)

# Defines the checks. Each is a function of the page that returns a list of what is
# wrong with it:
#   hidden: figures too small to be seen.
#   overflowing: widths of the page and the window, if the page scrolls sideways.
#   small: text of less than 11 CSS pixels, with its size.
#   pale: text with a contrast below 4.5, the limit of WCAG 2 for level AA.
#   crowded: text in figures that is cut off or overlaps other text.
SCRIPT = """
(() => {
const isVisible = element =>
  element.checkVisibility() && element.getClientRects().length > 0;

// Returns the visible text nodes as [element, text].
const visibleTexts = () => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (text && !element.closest("title, script, style") && isVisible(element)) {
      texts.push([element, text]);
    }
  }
  return texts;
};

// Returns how much the page scales an element of a figure.
const scale = element => {
  if (!element.ownerSVGElement) return 1;
  const matrix = element.getScreenCTM();
  return Math.hypot(matrix.a, matrix.b);
};

// A canvas of one pixel blends colours as the browser does, in any notation of CSS.
const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
const blend = (colour, background) => {
  canvas.fillStyle = `rgb(${background})`;
  canvas.fillRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const background = element => {
  if (!element) return [255, 255, 255];
  const colour = getComputedStyle(element).backgroundColor;
  return blend(colour, background(element.parentElement));
};

// Relative luminance and contrast ratio by WCAG 2.
const linear = value =>
  value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const luminance = colour => {
  const [r, g, b] = colour.map(value => linear(value / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (colour, other) => {
  const luminances = [luminance(colour), luminance(other)];
  const [dark, bright] = luminances.sort((a, b) => a - b);
  return (bright + 0.05) / (dark + 0.05);
};
const textContrast = element => {
  const style = getComputedStyle(element);
  const colour = element.ownerSVGElement ? style.fill : style.color;
  // A figure has no background of its own.
  const below = background(element.closest("svg")?.parentElement ?? element);
  return contrast(blend(colour, below), below);
};

const figures = () => [...document.querySelectorAll("svg[role=img]")];
const label = figure => figure.getAttribute("aria-label");

const isCutOff = (box, frame) =>
  box.left < frame.left - 1 || box.right > frame.right + 1
  || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;

const overlap = (a, b) => {
  const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  // A line's box is higher than its letters.
  return across > 1 && down > 3;
};

const crowdedTexts = figure => {
  const frame = figure.getBoundingClientRect();
  const boxes = [...figure.querySelectorAll("text")].map(
    element => [element.textContent, element.getBoundingClientRect()]);
  const wrong = [];
  boxes.forEach(([text, box], i) => {
    if (isCutOff(box, frame)) wrong.push([label(figure), text, "is cut off"]);
    for (const [otherText, otherBox] of boxes.slice(i + 1)) {
      if (overlap(box, otherBox)) wrong.push([label(figure), text, otherText]);
    }
  });
  return wrong;
};

window.checks = {
  hidden: () => {
    // The page has some figures twice, and shows the one that fits the window.
    const otherWidth = innerWidth > 704 ? ".narrow" : ".wide";
    return figures().filter(figure => {
      const box = figure.getBoundingClientRect();
      return !figure.closest(otherWidth) && (box.width < 250 || box.height < 100);
    }).map(label);
  },
  overflowing: () => {
    // innerWidth would not do: on a phone it grows with the content.
    const {scrollWidth, clientWidth} = document.documentElement;
    return scrollWidth > clientWidth ? [scrollWidth, clientWidth] : [];
  },
  small: () => visibleTexts().map(([element, text]) => {
    const size = parseFloat(getComputedStyle(element).fontSize);
    return [text, size * scale(element)];
  }).filter(([, size]) => size < 11),
  pale: () => visibleTexts().map(([element, text]) => [text, textContrast(element)])
    .filter(([, ratio]) => ratio < 4.5),
  crowded: () => figures().filter(isVisible).flatMap(crowdedTexts),
};
})()
"""
# Damages the page so that the check of this name fails.
DAMAGES = {
    "hidden": "document.querySelector('.panels svg[role=img]').style.width = 0",
    "overflowing": "document.querySelector('h1').style.width = '3000px'",
    "small": "document.querySelector('svg[role=img] text').style.fontSize = '7px'",
    "pale": "document.querySelector('tbody td').style.color = '#999'",
    "crowded": """(() => {
      const [first, second] = document.querySelectorAll('.panels svg text');
      second.setAttribute('x', first.getAttribute('x'));
    })()""",
}
LABELS = """
[...document.querySelectorAll("svg[role=img]")].map(
  figure => figure.getAttribute("aria-label"))
"""
# The tooltips at the left, in the middle and at the right of the figure of all classes.
TOOLTIPS = """(() => {
  const figure = [...document.querySelectorAll(".wide svg[role=img]")]
    .find(figure => figure.textContent.includes("species"));
  figure.scrollIntoView();
  const box = figure.getBoundingClientRect();
  const tooltipAt = x => document
    .elementFromPoint(box.left + x, box.top + box.height / 3)
    .querySelector("title").textContent;
  return [36, 500, box.width - 14].map(tooltipAt);
})()"""
# How the labels of the report's figures start.
FIGURES = (
    "Tail against head, ",
    "Accuracy on the tail against imbalance",
    "Test accuracy by class",
    "Mass by",
    "weight of kd over student_ce",
    "loss terms, ltkd",
    "test accuracy, tail",
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture
def visit(browser):
    """Returns a function that opens an address and returns the page.

    The page has two more attributes: `complaints`, the console's messages and the
    errors of scripts, and `requests`, the addresses that it has loaded.
    """
    contexts = []

    def visit(address, width=DESKTOP, *, height=900, dark=False):
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            is_mobile=width == PHONE,
        )
        contexts.append(context)
        page = context.new_page()
        page.complaints = []
        page.requests = []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Returns the path of a report of runs that together have every feature."""
    folder = tmp_path_factory.mktemp("runs")
    names = [f"some species {c}" for c in range(100)]
    methods = ("ce", "dkd", "ltkd", "reviewkd")
    imbalances = (20, 100)
    seeds = (0, 1)
    settings = itertools.product(methods, imbalances, seeds)
    for method, imbalance, seed in settings:
        run = fabricate(
            method, seed, classes=100, imbalance=imbalance, class_names=names
        )
        save(folder / f"{method}-{imbalance}-{seed}", run)
    long = fabricate("ltkd", 0, classes=100)
    long["config"]["method"] |= {
        "alpha": 0.5,
        "num_groups": 5,
        "a_very_long_name": "and_a_long_value_without_a_space",
    }
    save(folder / "long", long)
    for seed in seeds:
        save(folder / f"bikd-{seed}", fabricate_learned(seed))
    report_page.write_report(load.load_all([folder]), folder / "report.html")
    # The page must be complete without its folder of files, for example as an e-mail's
    # attachment.
    (folder / "report_files").rename(folder / "elsewhere")
    return folder / "report.html"


def screenshot(page):
    """Returns the pixels of the window, `[height, width, 3]`, as signed integers."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    return np.asarray(image).astype(int)


def count_colours(image):
    """Returns the number of colours in every third row."""
    return len(np.unique(image[::3] @ (65536, 256, 1)))


def run_check(page, name):
    return page.evaluate(f"checks.{name}()")


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page(visit, report, width, dark):
    page = visit(report.as_uri(), width, dark=dark)
    page.evaluate(SCRIPT)
    for check in DAMAGES:
        assert run_check(page, check) == [], check
    assert page.complaints == []
    assert page.requests == [report.as_uri()]
    page.evaluate("document.querySelector('svg[role=img]').scrollIntoView()")
    image = screenshot(page)
    assert image.shape[1] == width
    # A figure is drawn, and the background has the theme's colour.
    assert count_colours(image) > 100
    assert image.mean() < 60 if dark else image.mean() > 200
    labels = page.evaluate(LABELS)
    for figure in FIGURES:
        assert any(label.startswith(figure) for label in labels), figure


def test_checks_can_fail(visit, report):
    page = visit(report.as_uri(), PHONE)
    page.evaluate(SCRIPT)
    for check, damage in DAMAGES.items():
        assert run_check(page, check) == []
        page.evaluate(damage)
        assert run_check(page, check) != [], check
        page.reload()
        page.evaluate(SCRIPT)


def test_complaints_and_requests_are_collected(visit, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        '<script>console.warn("oh"); nowhere()</script><img src="gone.png">'
    )
    page = visit(path.as_uri())
    assert "oh" in page.complaints
    assert any("nowhere is not defined" in text for text in page.complaints)
    assert [url.rsplit("/", 1)[1] for url in page.requests] == ["bad.html", "gone.png"]


def test_tooltips_name_the_class_at_the_pointer(visit, report):
    first, middle, last = visit(report.as_uri()).evaluate(TOOLTIPS)
    assert first.startswith("some species ")
    assert ", 500 training images\nce  " in first
    assert len({first, middle, last}) == 3
    assert last.startswith("some species 99, ")


@pytest.mark.parametrize(
    "name", ["*_test-accuracy-by-class.svg", "settings_tail-against-head-*.svg"]
)
def test_figure_file(visit, report, name):
    """Shows the methods in their colours, on white."""
    path = next((report.parent / "elsewhere").glob(name))
    page = visit(path.as_uri(), 1000, height=500)
    assert page.complaints == []
    image = screenshot(page)
    assert count_colours(image) > 100
    assert (image[-1] == 255).all()
    # At least one pixel is close to the colour of a method.
    assert (np.abs(image - (0xB8, 0x42, 0x0F)).sum(-1) < 30).any()
