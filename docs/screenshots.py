"""Takes pictures of every page of the built site, and finds what is wider than its page.

python -m sphinx -W -b html docs docs/_build       build the site first
python docs/screenshots.py                         pictures of all pages
python docs/screenshots.py index which_clip        of these pages
python docs/screenshots.py --check                 no pictures; exit with 1 if a page is too wide

Each page is opened at 1280 and at 390 pixels, light and dark. Needs selenium (the extra `docs`),
Chromium and its driver (Debian: `apt install chromium chromium-driver`).
"""

import argparse
import base64
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

SITE = Path(__file__).parent / "_build"
WIDTHS, THEMES = (1280, 390), ("light", "dark")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TALLEST = 16_000
"""The most pixels of a picture; the rest of a page is cut off."""
GENERATED = ("genindex", "search", "py-modindex")

# What scrolls by itself may be wider inside. Of elements in each other the innermost is named.
_TOO_WIDE = """
const width = document.documentElement.clientWidth;
const scrolls = (e) => {
  for (let p = e; p && p !== document.body; p = p.parentElement) {
    const style = getComputedStyle(p);
    if (p !== e && ['auto', 'scroll', 'hidden'].includes(style.overflowX)) return true;
    if (style.position === 'fixed') return true;
  }
  return false;
};
const right = (e) => e.getBoundingClientRect().width ? e.getBoundingClientRect().right : 0;
const wide = [...document.querySelectorAll('main *')].filter(
  (e) => right(e) > width + 1 && !scrolls(e));
const causes = wide.filter((e) => !wide.some((other) => other !== e && e.contains(other)));
const found = causes.map((e) => `${e.tagName.toLowerCase()} (${Math.round(right(e))} px): ` +
  (e.getAttribute('src') || e.textContent.trim().slice(0, 40)));
const whole = document.documentElement.scrollWidth;
if (whole > width + 1) found.push(`the whole page (${whole} px)`);
return found;
"""


class Shot(NamedTuple):
    """A page as it is opened.

    Attributes:
        page: Its name, as `methods/index`.
        width: Of the window, in pixels.
        theme: "light" or "dark".
    """

    page: str
    width: int
    theme: str


def missing() -> str | None:
    """What is not there to open pages with; None if all is."""
    if not any(map(shutil.which, BROWSERS)):
        return "there is no Chromium; on Debian: apt install chromium chromium-driver"
    if not shutil.which("chromedriver"):
        return "there is no chromedriver; on Debian: apt install chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return 'selenium is missing; run: pip install -e ".[docs]"'
    return None


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium, closed at the end."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-background-networking", "disable-component-update", "disable-sync"):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def pages(site: Path) -> list[str]:
    """The names of the pages of a site."""
    named = (x.relative_to(site).with_suffix("").as_posix() for x in site.rglob("*.html"))
    return sorted(x for x in named if not x.startswith("_") and x not in GENERATED)


def opened(driver: Any, site: Path, shot: Shot) -> list[str]:
    """Opens a page, and says which of its elements are wider than it.

    Args:
        driver: From `browser`.
        site: The folder of the built site.
        shot: What to open, and how.
    """
    _resize(driver, shot.width, 900)
    scheme = [{"name": "prefers-color-scheme", "value": shot.theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    driver.get((site / f"{shot.page}.html").absolute().as_uri())
    return driver.execute_script(_TOO_WIDE)


def save(driver: Any, path: Path, width: int) -> None:
    """Writes a picture of the whole page that is open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]["height"]
    _resize(driver, width, min(height, TALLEST))
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {})
    path.write_bytes(base64.b64decode(taken["data"]))


def _resize(driver: Any, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def main(arguments: list[str] | None = None) -> int:
    """Takes the pictures, or only looks.

    Args:
        arguments: The command line; None for that of this process.

    Returns:
        The exit code: 1 if something is wider than its page.
    """
    head, _, about = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python docs/screenshots.py",
        description=head,
        epilog=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("page", nargs="*", help="pages by name (default: all)")
    parser.add_argument(
        "--site", type=Path, default=SITE, help="the built site (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="where pictures go (default: SITE/screenshots)")
    parser.add_argument("--check", action="store_true", help="take no pictures")
    options = parser.parse_args(arguments)
    if why := missing():
        parser.error(why)
    known = pages(options.site)
    if not known:
        parser.error(f"no pages in {options.site}: build the site, or name it with --site")
    if unknown := set(options.page) - set(known):
        parser.error(
            f"no page {sorted(unknown)[0]!r} in {options.site}; there are {', '.join(known)}"
        )
    out = options.out or options.site / "screenshots"
    themes = THEMES[:1] if options.check else THEMES  # a theme changes colors alone
    shots = [Shot(x, w, t) for x in options.page or known for w in WIDTHS for t in themes]
    wide = 0
    with browser() as driver:
        for shot in tqdm(shots, unit="page", disable=None):
            for element in opened(driver, options.site, shot):
                wide += 1
                tqdm.write(f"{shot.page} at {shot.width} px: too wide: {element}", file=sys.stderr)
            if not options.check:
                name = f"{shot.width}_{shot.theme}.png"
                save(driver, out / shot.page.replace("/", "__") / name, shot.width)
    if options.check:
        print(f"{len(shots)} pages opened, {wide} elements too wide")
    else:
        print(f"{len(shots)} pictures in {out}, {wide} elements too wide")
    return 1 if wide else 0


if __name__ == "__main__":
    sys.exit(main())
