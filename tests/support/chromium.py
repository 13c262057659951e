"""What a browser makes of a picture, seen by a real one without a window."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

WITHIN_S = 60.0
ALONE = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
    " --no-first-run --hide-scrollbars"
).split()
TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


def chromium() -> str:
    """Where Chromium is; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    return found


class Seen(NamedTuple):
    """A picture as an `<img>` of a page, such as a README's, shows it."""

    width: int
    """Its natural size in pixels; 0 where it is broken."""
    height: int
    colours: dict[str, float]
    """The share of each of its pixels' colours, the commonest first."""


def document(page: Path, profile: Path, *arguments: str) -> str:
    """The document that a page, or a picture as a page of its own, has become. `profile`: a new directory."""
    command = [chromium(), *ALONE, f"--user-data-dir={profile}", *arguments, "--dump-dom", page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=WITHIN_S)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def screenshot(picture: Path, directory: Path) -> tuple[Path, int, int]:
    """Show a picture in a page; gives the PNG of it, and the natural size that the browser takes it to have."""
    page = _page(picture, directory / f"{picture.stem}.html", "answer([img.naturalWidth, img.naturalHeight])")
    width, height = _answer(document(page, directory / "sizing"))
    target = directory / f"{picture.stem}-seen.png"
    size = f"--window-size={max(width, 1)},{max(height, 1)}"
    document(page, directory / "showing", size, f"--screenshot={target}")
    return target, width, height


def look(picture: Path, directory: Path) -> Seen:
    """Show a picture in a page, and look at the screen. `directory` is for what is written meanwhile."""
    shot, width, height = screenshot(picture, directory)
    page = _page(shot, directory / f"{picture.stem}-colours.html", _COUNT)
    counted: dict[str, int] = _answer(document(page, directory / "counting"))
    pixels = sum(counted.values())
    return Seen(width, height, {colour: number / pixels for colour, number in counted.items()})


_COUNT = """
  const canvas = new OffscreenCanvas(img.naturalWidth, img.naturalHeight);
  const context = canvas.getContext("2d");
  context.drawImage(img, 0, 0);
  const counted = new Map();
  for (const pixel of new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer))
    counted.set(pixel, (counted.get(pixel) ?? 0) + 1);
  const colour = pixel => [0, 8, 16].map(at => (pixel >> at & 255).toString(16).padStart(2, "0")).join("");
  answer(Object.fromEntries([...counted].sort((a, b) => b[1] - a[1]).map(([pixel, n]) => ["#" + colour(pixel), n])));
"""


def _page(picture: Path, page: Path, script: str) -> Path:
    """A page that shows a picture and nothing else, and runs `script` when it does, or cannot."""
    source = f"data:{TYPES[picture.suffix]};base64,{base64.b64encode(picture.read_bytes()).decode()}"
    page.write_text(
        f"""<!doctype html><meta charset="utf-8"><body style="margin:0"><img style="display:block" src="{source}">
<script>
const img = document.querySelector("img");
const answer = value => {{ document.body.dataset.answer = JSON.stringify(value); }};
addEventListener("load", () => {{ {script} }});
</script>""",
        encoding="utf-8",
    )
    return page


def _answer(document: str):  # type: ignore[no-untyped-def]
    found = re.search(r'data-answer="([^"]*)"', document)
    assert found, f"the page has not run to its end:\n{document[-2000:]}"
    return json.loads(found[1].replace("&quot;", '"'))
