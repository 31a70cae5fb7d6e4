"""A report in a real browser, at a desk's and at a phone's width, light and dark; and that each check can fail."""

import io
import shutil

import numpy as np
import pytest
from helpers.fabricated import fabricate, fabricate_learned, save
from PIL import Image

from experiments.reporting import load, report_page

playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed"
)

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
DESK, PHONE = 1280, 375
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason=f"no Chromium: none of {', '.join(NAMES)}"
)

# Every check is a function of the page that returns what is wrong with it; it is empty for a good page.
SCRIPT = """
(() => {
const shown = element => element.checkVisibility() && element.getClientRects().length > 0;
const texts = () => {  // of what is visible: [element, words]
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), texts = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, words = walker.currentNode.data.trim();
    if (words && !element.closest("title, script, style") && shown(element)) texts.push([element, words]);
  }
  return texts;
};
const scale = element => element.ownerSVGElement ? Math.hypot(element.getScreenCTM().a, element.getScreenCTM().b) : 1;
const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
const over = (colour, below) => {  // how the browser shows a colour on another
  canvas.fillStyle = `rgb(${below})`; canvas.fillRect(0, 0, 1, 1);
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const ground = element => element ? over(getComputedStyle(element).backgroundColor, ground(element.parentElement))
                                  : [255, 255, 255];
const light = colour => {
  const [r, g, b] = colour.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (one, other) => {
  const [dark, bright] = [light(one), light(other)].sort((a, b) => a - b);
  return (bright + 0.05) / (dark + 0.05);
};
window.checks = {
  unseen: () => [...document.querySelectorAll("svg[role=img]")]
    .filter(figure => !figure.closest(innerWidth > 704 ? ".narrow" : ".wide"))
    .filter(figure => { const box = figure.getBoundingClientRect(); return box.width < 250 || box.height < 100; })
    .map(figure => figure.getAttribute("aria-label")),
  wide: () => {  // innerWidth grows with what is too wide on a phone
    const {scrollWidth, clientWidth} = document.documentElement;
    return scrollWidth > clientWidth ? [scrollWidth, clientWidth] : [];
  },
  small: () => texts().map(([e, words]) => [words, parseFloat(getComputedStyle(e).fontSize) * scale(e)])
    .filter(([, size]) => size < 11),
  pale: () => texts().map(([e, words]) => {
    const style = getComputedStyle(e), below = ground(e.closest("svg")?.parentElement ?? e);
    return [words, contrast(over(e.ownerSVGElement ? style.fill : style.color, below), below)];
  }).filter(([, ratio]) => ratio < 4.5),
  crowded: () => [...document.querySelectorAll("svg[role=img]")].filter(shown).flatMap(figure => {
    const frame = figure.getBoundingClientRect(), wrong = [];
    const all = [...figure.querySelectorAll("text")].map(e => [e.textContent, e.getBoundingClientRect()]);
    all.forEach(([words, a], i) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1)
        wrong.push([figure.getAttribute("aria-label"), words, "is cut off"]);
      all.slice(i + 1).forEach(([others, b]) => {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 1 && down > 3) wrong.push([figure.getAttribute("aria-label"), words, others]);
      });
    });
    return wrong;
  }),
};
})()
"""
BREAKS = {
    "unseen": "document.querySelector('.panels svg[role=img]').style.width = 0",
    "wide": "document.querySelector('h1').style.width = '3000px'",
    "small": "document.querySelector('svg[role=img] text').style.fontSize = '7px'",
    "pale": "document.querySelector('tbody td').style.color = '#999'",
    "crowded": "(t => t[1].setAttribute('x', t[0].getAttribute('x')))(document.querySelectorAll('.panels svg text'))",
}
LABELS = "[...document.querySelectorAll('svg[role=img]')].map(figure => figure.getAttribute('aria-label'))"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture
def visit(browser):
    """Opens an address; returns the page, whose `complaints` and `requests` are collected."""
    contexts = []

    def visit(address, width=DESK, *, height=900, dark=False):
        scheme = "dark" if dark else "light"
        size = {"width": width, "height": height}
        contexts.append(
            browser.new_context(
                viewport=size, color_scheme=scheme, is_mobile=width == PHONE
            )
        )
        page = contexts[-1].new_page()
        page.complaints, page.requests = [], []
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
    """Returns the path of a page of work directories with all that there can be in them."""
    folder = tmp_path_factory.mktemp("runs")
    names = [f"some species {c}" for c in range(100)]
    for name in ("ce", "dkd", "ltkd", "reviewkd"):
        for imbalance in (20, 100):
            for seed in (0, 1):
                run = fabricate(
                    name, seed, classes=100, imbalance=imbalance, class_names=names
                )
                save(folder / f"{name}-{imbalance}-{seed}", run)
    long = fabricate("ltkd", 0, classes=100)
    long["config"]["method"] |= {
        "alpha": 0.5,
        "num_groups": 5,
        "a_very_long_name": "and_a_long_value_without_a_space",
    }
    save(folder / "long", long)
    for seed in (0, 1):
        save(folder / f"bikd-{seed}", fabricate_learned(seed))
    report_page.write_report(load.load_all([folder]), folder / "report.html")
    (folder / "report_files").rename(
        folder / "elsewhere"
    )  # the page alone, as if by e-mail
    return folder / "report.html"


def pixels(page):
    """Returns what the window shows of a page."""
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(
        int
    )


def count_colours(image):
    return len(np.unique(image[::3] @ (65536, 256, 1)))


@pytest.mark.parametrize("width", [DESK, PHONE])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page(visit, report, width, dark):
    page = visit(report.as_uri(), width, dark=dark)
    page.evaluate(SCRIPT)
    for check in BREAKS:
        assert page.evaluate(f"checks.{check}()") == [], check
    assert page.complaints == []
    assert page.requests == [report.as_uri()]
    page.evaluate("document.querySelector('svg[role=img]').scrollIntoView()")
    image = pixels(page)
    assert image.shape[1] == width and count_colours(image) > 100
    assert image.mean() < 60 if dark else image.mean() > 200
    labels = page.evaluate(LABELS)
    for figure in ("Tail against head, ", "Accuracy on the tail against imbalance", "Test accuracy by class", "Mass by",
                   "weight of kd over student_ce", "loss terms, ltkd", "test accuracy, tail"):  # fmt: skip
        assert any(label.startswith(figure) for label in labels), figure


def test_checks_can_fail(visit, report):
    page = visit(report.as_uri(), PHONE)
    page.evaluate(SCRIPT)
    for check, script in BREAKS.items():
        assert page.evaluate(f"checks.{check}()") == []
        page.evaluate(script)
        assert page.evaluate(f"checks.{check}()") != [], check
        page.reload()
        page.evaluate(SCRIPT)


def test_console_and_network_are_watched(visit, tmp_path):
    (tmp_path / "bad.html").write_text(
        '<script>console.warn("oh"); nowhere()</script><img src="gone.png">'
    )
    page = visit((tmp_path / "bad.html").as_uri())
    assert "oh" in page.complaints and any(
        "nowhere is not defined" in text for text in page.complaints
    )
    assert [url.rsplit("/", 1)[1] for url in page.requests] == ["bad.html", "gone.png"]


def test_pointer_is_over_the_right_class(visit, report):
    page = visit(report.as_uri())
    first, middle, last = page.evaluate("""(() => {
      const figure = [...document.querySelectorAll(".wide svg[role=img]")].find(f => f.textContent.includes("species"));
      figure.scrollIntoView();
      const box = figure.getBoundingClientRect();
      const at = part => document.elementFromPoint(box.left + part, box.top + box.height / 3);
      return [36, 500, box.width - 14].map(part => at(part).querySelector("title").textContent);
    })()""")
    assert first.startswith("some species ") and ", 500 training images\nce  " in first
    assert len({first, middle, last}) == 3 and last.startswith("some species 99, ")


@pytest.mark.parametrize(
    "name", ["*_test-accuracy-by-class.svg", "settings_tail-against-head-*.svg"]
)
def test_figure_file(visit, report, name):
    """A file shows the methods in their colours, on white."""
    path = next((report.parent / "elsewhere").glob(name))
    page = visit(path.as_uri(), 1000, height=500)
    assert page.complaints == []
    image = pixels(page)
    assert count_colours(image) > 100 and (image[-1] == 255).all()
    assert (np.abs(image - (0xB8, 0x42, 0x0F)).sum(-1) < 30).any()
