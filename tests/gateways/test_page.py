"""The files of the page: what their bytes must and must not contain, and their routes."""

import itertools
import re
from html.parser import HTMLParser

import pytest

from regd.gateways.daemon_connections import DaemonClient
from regd.gateways.guard import HEADERS
from regd.gateways.page_files import FILES, FOLDER
from regd.gateways.queries import COMMANDS
from regd.gateways.readers import Readers
from regd.gateways.routes import Gateway
from regd_client.protocol import parse_address
from tests.gateways.asgi import get

HTML, SCRIPT, STYLE = (FOLDER.joinpath(name).read_text() for name in ("index.html", "page.js", "page.css"))
TEXTS = pytest.mark.parametrize("text", [HTML, SCRIPT, STYLE], ids=["html", "js", "css"])


class Elements(HTMLParser):
    """Every element of a document with its attributes, and the texts within scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self._tag = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._tag = tag

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in ("script", "style"):
            self.inline += data


DOCUMENT = Elements(HTML)


@pytest.fixture
def app() -> Gateway:
    """A gateway without a daemon, since serving the page needs none."""
    return Gateway(DaemonClient(parse_address("tcp://127.0.0.1:1")), Readers(restricted=False))


@pytest.mark.parametrize(
    ("path", "text", "media_type"),
    [("/", HTML, "text/html"), ("/page.js", SCRIPT, "text/javascript"), ("/page.css", STYLE, "text/css")],
)
async def test_files_are_served(app: Gateway, path: str, text: str, media_type: str) -> None:
    response = await get(app, path)
    assert (response.status, response.body.decode()) == (200, text)
    assert response.headers["content-type"] == f"{media_type}; charset=utf-8"
    head = await get(app, path, "HEAD")
    assert (head.status, head.headers) == (200, response.headers)
    assert (await get(app, path + "?v=1")).body == response.body


@pytest.mark.parametrize(
    "path", ["/page.js/", "/page/page.js", "/page/index.html", "/PAGE.JS", "//", "/page_files.py", "/%2e/"]
)
async def test_no_other_file_is_served(app: Gateway, path: str) -> None:
    assert (await get(app, path)).status == 404


@pytest.mark.parametrize("path", FILES)
async def test_only_this_origin_loads_the_files(app: Gateway, path: str) -> None:
    for site, dest in itertools.product(("cross-site", "same-site"), ("script", "style", "iframe", "empty")):
        response = await get(app, path, sec_fetch_site=site, sec_fetch_mode="no-cors", sec_fetch_dest=dest)
        assert response.status == 403
    opened = await get(
        app, path, sec_fetch_site="cross-site", sec_fetch_mode="navigate", sec_fetch_dest="document"
    )
    assert opened.status == 200


async def test_pages_of_services_are_not_the_gateways(app: Gateway) -> None:
    assert (await get(app, "/page.js", host="shop.localhost:7380")).status == 503  # not the page


def test_policy_permits_only_what_the_page_needs() -> None:
    policy = dict(part.split(" ", 1) for part in dict(HEADERS)["Content-Security-Policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }


def test_document_has_no_inline_script_or_style() -> None:
    assert DOCUMENT.inline == ""
    for tag, attributes in DOCUMENT.elements:
        assert tag not in ("style", "base", "iframe", "object", "embed", "img", "form"), tag
        for name, value in attributes.items():
            assert name != "style", tag
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src"):
                assert re.fullmatch(r"/[a-z0-9/.]+", value or ""), (tag, value)
    assert [attributes for tag, attributes in DOCUMENT.elements if tag == "script"] == [
        {"type": "module", "src": "/page.js"}
    ]


# Functions and properties that turn text into markup, script or style, or that load something.
SINKS = [
    "innerHTML",
    "outerHTML",
    "insertAdjacentHTML",
    "setHTML",
    "getHTML",
    "srcdoc",
    "createContextualFragment",
    "DOMParser",
    "document.write",
    "eval(",
    "Function(",
    "import(",
    'import"',
    "javascript:",
    ".style",
    'setAttribute("on',
    'setAttribute("style',
    'setAttribute("src',
    "localStorage",
    "sessionStorage",
    "document.cookie",
    "postMessage",
    "Worker(",
    'createElement("script',
    "WebSocket(",
    "sendBeacon(",
    "XMLHttpRequest",
]


@pytest.mark.parametrize("sink", SINKS)
def test_script_has_no_sink(sink: str) -> None:
    assert sink not in SCRIPT


def test_script_starts_no_text() -> None:
    for name in ("setTimeout", "setInterval"):
        for argument in re.findall(rf"{name}\(([^,]*)", SCRIPT):
            assert not argument.startswith(("'", '"', "`")), argument
    assert "import " not in SCRIPT


def test_script_asks_for_commands_of_the_gateway_only() -> None:
    paths = set(re.findall(r"[\"`](/[a-z0-9/]*)", SCRIPT)) - {"/"}
    assert paths == {f"/v1/{cmd}" for cmd in ("watch", "stats", "why", "history")}
    assert {path.removeprefix("/v1/") for path in paths} <= set(COMMANDS)
    assert "http" not in re.sub(r'\["http", "https"\]|meta\.scheme : "http"', "", SCRIPT)
    assert re.findall(r"\bmethod:|\bbody:", SCRIPT) == []  # only GET


def test_style_loads_nothing() -> None:
    for word in ("url(", "@import", "@font-face", "expression(", "http"):
        assert word not in STYLE


def test_script_and_document_name_the_same_elements() -> None:
    named = set(re.findall(r'\$\("([a-z-]+)"\)', SCRIPT))
    ids = {attributes["id"] for _, attributes in DOCUMENT.elements if "id" in attributes}
    used = {value for _, attributes in DOCUMENT.elements if (value := attributes.get("aria-labelledby"))}
    assert named <= ids
    assert ids <= named | used
    columns = {attributes["data-column"] for _, attributes in DOCUMENT.elements if "data-column" in attributes}
    compared = SCRIPT.partition("const COMPARE = {")[2].partition("};")[0]
    assert columns == set(re.findall(r"^  ([a-z]+):", compared, re.MULTILINE))


def test_tables_are_tables_for_a_screen_reader() -> None:
    for tag, attributes in DOCUMENT.elements:
        if tag == "table":
            assert (attributes["role"], "aria-labelledby" in attributes) == ("table", True)
        elif tag in ("thead", "tbody"):
            assert attributes["role"] == "rowgroup"
        elif tag == "th":
            assert (attributes["scope"], attributes["role"]) == ("col", "columnheader")
        elif tag == "input":
            assert attributes["aria-label"]
    assert ("html", {"lang": "en"}) in DOCUMENT.elements


@TEXTS
def test_files_are_small_plain_text(text: str) -> None:
    assert len(text.encode()) < 40_000
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert max(map(len, text.splitlines())) <= 130


# Contrast.

COLOUR = re.compile(r"--([a-z]+): (#[0-9a-f]{6});")
LIGHT, DARK = (dict(COLOUR.findall(part)) for part in STYLE.split("@media (prefers-color-scheme: dark)")[:2])


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour (WCAG 2.2)."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_can_be_read(colours: dict[str, str]) -> None:
    assert set(LIGHT) == set(DARK)
    for text, ground in itertools.product(
        ("ink", "muted", "link", "ready", "starting", "draining", "gone"),
        ("paper", "surface", "hover", "added", "changed", "removed"),
    ):
        bright, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, (text, ground)  # level AA
