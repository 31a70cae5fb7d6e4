"""The report in a real browser, at a desk's and at a phone's width, light and dark; and that each check can fail."""

import collections
import json
import pathlib

import numpy as np
import pytest
from helpers import browser
from helpers.fabricated import Page, fabricate, learned, save
from PIL import Image

from experiments import report

ROOT = pathlib.Path(__file__).resolve().parents[2]
DESK, PHONE = 1280, 390
pytestmark = pytest.mark.skipif(not browser.installed(), reason=f"no Chromium: none of {', '.join(browser.NAMES)}")

# Every check is a function of the page that returns what is wrong with it; an empty list is a good page.
SCRIPT = """
(() => {
const shown = element => element.checkVisibility() && element.getClientRects().length > 0;
const texts = () => {  // of what is seen: [element, words]
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, words = walker.currentNode.data.trim();
    if (words && !element.closest("title, script, style") && shown(element)) found.push([element, words]);
  }
  return found;
};
const scale = element => element.ownerSVGElement ? Math.hypot(element.getScreenCTM().a, element.getScreenCTM().b) : 1;
const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
const over = (colour, below) => {  // what a colour looks like upon another, by the browser itself
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
CHECKS = ("unseen", "wide", "small", "pale", "crowded")


@pytest.fixture(scope="module")
def chromium():
    with browser.started() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of the results in the repository, and of work directories with all that there can be in them."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [(name, imbalance) for name in ("ce", "dkd", "ltkd", "reviewkd") for imbalance in (20, 100)]
    for name, imbalance in runs:
        for seed in (0, 1):
            run = fabricate(name, seed, classes=100, imbalance=imbalance)
            names = [f"some species {c}" for c in range(100)]
            save(folder / f"{name}-{imbalance}-{seed}", run | {"class_names": names}, epochs=24)
    long = fabricate("ltkd", 0, classes=100)
    long["config"]["method"] |= {"alpha": 0.5, "num_groups": 5, "a_very_long_name": "and_a_long_value_without_a_space"}
    save(folder / "long", long)
    for seed in (0, 1):
        (folder / f"bikd-{seed}").mkdir()
        run = learned(seed)
        lines = "".join(json.dumps(line) + "\n" for line in run.pop("metrics"))
        (folder / f"bikd-{seed}" / "results.json").write_text(json.dumps(run))
        (folder / f"bikd-{seed}" / "metrics.jsonl").write_text(lines)
    report.write_page(report.find([ROOT / "results", folder]), folder / "report.html")
    (folder / "report_files").rename(folder / "elsewhere")  # as if it had come by e-mail
    return folder / "report.html"


def look(chromium, page, width, dark, folder):
    """Opens a page as one would; returns the labels of its figures."""
    chromium.open(page.as_uri(), width=width, dark=dark)
    chromium.evaluate(SCRIPT)
    for check in CHECKS:
        assert chromium.evaluate(f"checks.{check}()") == [], check
    assert chromium.complaints() == []
    assert chromium.requests() == [page.as_uri()]
    seen = pixels(chromium.picture(folder / "page.png"))
    assert seen.shape[1] == width and colours(seen) > 300
    assert seen.mean() < 60 if dark else seen.mean() > 200
    # Every figure that was written is in the document.
    found = chromium.evaluate("[...document.querySelectorAll('svg[role=img]')].map(f => f.getAttribute('aria-label'))")
    assert collections.Counter(found) == collections.Counter(Page(page.read_text(encoding="utf-8")).labels)
    return found


def test_the_results_of_the_repository_on_a_phone_at_night(chromium, tmp_path):
    report.write_page(report.find(sorted(ROOT.glob("results/cifar100-*.json"))), tmp_path / "report.html")
    assert len(look(chromium, tmp_path / "report.html", PHONE, True, tmp_path)) > 8


@pytest.mark.slow
@pytest.mark.parametrize("width", [DESK, PHONE])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_that_a_page_can_hold(chromium, page, width, dark, tmp_path):
    found = look(chromium, page, width, dark, tmp_path)
    for figure in ("Tail against head, ", "Accuracy on the tail against imbalance", "Test accuracy by class", "Mass by",
                   "weight of kd over student_ce", "loss terms, ltkd", "test accuracy, tail"):  # fmt: skip
        assert any(label.startswith(figure) for label in found), figure


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def colours(seen):
    return len(np.unique(seen[::3].astype(int) @ (65536, 256, 1)))


@pytest.mark.slow
def test_a_pointer_shows_the_place_it_is_over(chromium, page):
    """The browser finds the areas that tell, where the classes are."""
    chromium.open(page.as_uri())
    told = chromium.evaluate("""(() => {
      const figure = [...document.querySelectorAll(".wide svg[role=img]")].find(f => f.textContent.includes("species"));
      figure.scrollIntoView();
      const box = figure.getBoundingClientRect();
      const at = part => document.elementFromPoint(box.left + part, box.top + box.height / 3);
      return [36, 500, box.width - 14].map(part => at(part).querySelector("title").textContent);
    })()""")
    first, middle, last = told
    assert first.startswith("some species ") and ", 500 training images\nce  " in first
    assert len({first, middle, last}) == 3 and last.startswith("some species 99, ")


BREAKS = {
    "unseen": "document.querySelector('.panels svg[role=img]').style.width = 0",
    "wide": "document.querySelector('h1').style.width = '3000px'",
    "small": "document.querySelector('svg[role=img] text').style.fontSize = '7px'",
    "pale": "document.querySelector('tbody td').style.color = '#999'",
    "crowded": "(t => t[1].setAttribute('x', t[0].getAttribute('x')))(document.querySelectorAll('.panels svg text'))",
}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_a_broken_page_is_seen_to_be_broken(chromium, page, check):
    chromium.open(page.as_uri(), width=PHONE)
    chromium.evaluate(SCRIPT)
    assert chromium.evaluate(f"checks.{check}()") == []
    chromium.evaluate(BREAKS[check])
    assert chromium.evaluate(f"checks.{check}()") != []


def test_the_console_and_the_network_are_watched(chromium, tmp_path):
    (tmp_path / "bad.html").write_text('<script>console.warn("oh"); nowhere()</script><img src="gone.png">')
    chromium.open((tmp_path / "bad.html").as_uri())
    said = str(chromium.complaints())
    assert "oh" in said and "nowhere is not defined" in said
    assert [url.rsplit("/", 1)[1] for url in chromium.requests()] == ["bad.html", "gone.png"]


@pytest.mark.slow
def test_figures_as_files_in_a_browser(chromium, page, tmp_path):
    """A file shows what the page does, in the same place, on white; and nothing where it holds nothing."""
    for name in ("*_test-accuracy-by-class.svg", "settings_tail-against-head-*.svg"):
        path = next((page.parent / "elsewhere").glob(name))
        chromium.open(path.as_uri(), width=1000, height=500)
        assert chromium.complaints() == []
        seen = pixels(chromium.picture(tmp_path / "figure.png", whole=False))
        assert colours(seen) > 100 and (seen[-1] == 255).all()
        # The lines or marks of methods are there in their colours.
        assert (np.abs(seen.astype(int) - (0xB8, 0x42, 0x0F)).sum(-1) < 30).any()
