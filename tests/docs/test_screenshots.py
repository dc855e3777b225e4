"""docs/screenshots.py finds what is wider than its page; `.ci/run docs` asks it about the site."""

import pytest
from helpers.scripts import DOCS, script

screenshots = script(DOCS / "screenshots.py")

PAGE = "<html><body><main><p>narrow</p>{}</main></body></html>"
WIDE = '<div style="width: 700px">wide</div>'
SCROLLS = f'<div style="overflow-x: auto">{WIDE}</div>'

needs_chromium = pytest.mark.skipif(
    screenshots.missing() is not None, reason=f"pages are NOT opened: {screenshots.missing()}"
)


@needs_chromium
@pytest.mark.parametrize(("content", "code"), [("", 0), (SCROLLS, 0), (WIDE, 1)])
def test_what_is_wider_than_its_page_is_found(tmp_path, capsys, content, code):
    (tmp_path / "index.html").write_text(PAGE.format(content))
    assert screenshots.main(["--site", str(tmp_path), "--check"]) == code
    assert ("index at 390 px: too wide: div" in capsys.readouterr().err) == bool(code)


@needs_chromium
def test_a_picture_is_taken_at_each_width_and_theme(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/fixed.html").write_text(PAGE.format(""))
    assert screenshots.main(["methods/fixed", "--site", str(tmp_path)]) == 0
    names = {path.name for path in (tmp_path / "screenshots/methods__fixed").iterdir()}
    assert names == {"1280_dark.png", "1280_light.png", "390_dark.png", "390_light.png"}


@needs_chromium
def test_a_page_that_is_not_there_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        screenshots.main(["--site", str(tmp_path)])
    assert "build the site" in capsys.readouterr().err


def test_without_a_browser_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        screenshots.main(["--check"])
    assert "apt install chromium" in capsys.readouterr().err
