"""A page made by a command, as its readers and its browser see it."""

import html.parser
import json
import re

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
LOADING = ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "style")


class Page(html.parser.HTMLParser):
    """The elements of a page with their attributes, its text, and the content of its scripts."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "input", "meta"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("script", "style"):
            self.scripts += [data] if self._open[-1] == "script" else []
        else:
            self.texts.append(data)

    def data(self) -> dict:
        return json.loads(self.scripts[0])

    def chart(self, title: str) -> dict:
        (found,) = [chart for chart in self.data()["charts"] if chart["title"] == title]
        return found


def assert_loads_nothing(page: Page) -> None:
    """No element, style or script of the page asks for a file, and its policy forbids it."""
    for name, attributes in page.elements:
        assert name not in ("link", "iframe", "object", "embed", "base", "form", "video", "audio")
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in LOADING:
                assert (value or "").startswith(("#", "data:image/webp;base64,")), (name, key, value)
    source = page.source
    assert "@import" not in source and "url(" not in source and "fetch(" not in source
    assert [url for url in re.findall(r"https?://[^\s\"'<]+", source) if "www.w3.org/2000/svg" not in url] == []
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy or "") and "unsafe" not in (policy or "")
