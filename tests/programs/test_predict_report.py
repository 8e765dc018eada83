"""predict's page: the highest scores first, every name escaped, nothing loaded from elsewhere."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from tests.helpers.image_trees import save_image
from tests.helpers.run_programs import predict, rows_of

HOSTILE = [
    '<script>alert("1")<⁄script>.png', "<img src=x onerror=alert(1)>.png", "\"'><b>&amp;.png", "{{ 7*7 }}{% x %}.png",
    "line\nbreak.png", "javascript:alert(1).png", "per%2Fcent #1?.png", "ünï code 図.png", "sub&<i>/a.png",
    b"not utf\xe4.png".decode("utf-8", "surrogateescape"),
]  # fmt: skip


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(file.read_bytes().decode())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def values(self, tag: str, name: str) -> list[str]:
        return [attributes[name] or "" for each, attributes in self.tags if each == tag and name in attributes]


def test_hostile_names_and_order(trained, tmp_path):
    for i, name in enumerate(HOSTILE):
        save_image(tmp_path / "in" / name, size=40 + 100 * (i == 3), seed=i)
    (tmp_path / "in" / "<u>damaged.png").write_text("no image")
    outcome = predict(f"run={trained}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "report=8")
    assert outcome.code == 1
    rows = sorted(rows_of(tmp_path / "out" / "scores.csv"), key=lambda row: -float(row["score"]))
    assert len(rows) == len(HOSTILE)
    page = Page(tmp_path / "out" / "report.html")
    assert {"script", "b", "i", "u"}.isdisjoint({tag for tag, _ in page.tags})
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    at = [page.text.index(row["path"]) for row in rows[:8]]
    assert at == sorted(at)
    assert all(row["path"] not in page.text for row in rows[8:])
    assert "<u>damaged.png: can't be decoded" in page.text
    for row in rows[:8]:
        assert f"{float(row['ratio']):.2f} × threshold" in page.text
    links = [unquote(link, errors="surrogateescape") for link in page.values("a", "href")]
    assert len(links) == 8
    assert all((tmp_path / "out" / link).is_file() and link.startswith("overlays/") for link in links)
    sources = page.values("img", "src")
    assert len(sources) == 16
    for source in sources:
        head, _, content = source.partition(",")
        assert head == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(content))).size) <= 320
    text = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in text


def test_summary(trained, tmp_path):
    for i in range(3):
        save_image(tmp_path / "in" / f"{i}.png", seed=i)
    predict(f"run={trained}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}")
    decisions = [row["decision"] for row in rows_of(tmp_path / "out" / "scores.csv")]
    text = Page(tmp_path / "out" / "report.html").text
    for part in (
        f"{decisions.count('defective')} defective, {decisions.count('good')} good", "All images, highest first",
        "0.99 quantile of", "normal training images", "norm_occ", "bottle", str(trained),
    ):  # fmt: skip
        assert part in text
    predict(f"run={trained}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'own'}", "threshold=-2", "report=2")
    text = Page(tmp_path / "own" / "report.html").text
    assert "3 defective, 0 good" in text
    assert "-2 (of your own)" in text
    assert "The 2 images with the highest scores" in text
    assert "× threshold" not in text
