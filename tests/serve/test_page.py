"""The page: whole in itself, and driven in a real browser on the really running server.

The browser's tests need Chromium and playwright (which drives it): as root on Debian
    apt-get install -y chromium && pip install playwright
and run by
    pytest -m browser tests/serve/test_page.py
"""

import base64
import hashlib
import io
import json
import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import httpx
import jsonschema
import pytest
from PIL import Image

import minivlm
from minivlm.serve.client import Server

FILE = Path(minivlm.__file__).parent / "serve" / "page.html"
PAGE = FILE.read_text(encoding="utf-8")
SAMPLE = Path(minivlm.__file__).parent.parent / "weights" / "minivlm-tiny" / "sample.png"
DESCRIPTION = (
    "a red star at the top left, the text FISH at the bottom left, a green square at the bottom, a blue circle "
)
DESCRIPTION += "at the top right"
VOID = {"meta", "link", "input", "img", "br"}
OPTIONAL = {"html", "body", "p", "li"}  # HTML lets their end be left out


class Parsed(HTMLParser):
    """Every element with its attributes and its text, and whether each was closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open[-1] != tag and self.open[-1] in OPTIONAL:
            self.open.pop()
        assert self.open.pop() == tag, f"</{tag}> in line {self.getpos()[0]}"

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data


@pytest.fixture(scope="module")
def parsed() -> Parsed:
    return Parsed(PAGE)


def attributes(parsed: Parsed, name: str) -> list[str]:
    return [values[name] for _, values in parsed.elements if values.get(name) is not None]


# ---- without a browser


def test_it_parses(parsed):
    assert set(parsed.open) <= OPTIONAL
    assert Counter(tag for tag, _ in parsed.elements)["script"] == 1
    assert max(map(len, PAGE.splitlines())) <= 120
    assert PAGE.splitlines()[0] == "<!doctype html>"


def test_names_refer_to_what_is_there(parsed):
    ids = Counter(attributes(parsed, "id"))
    assert ids.most_common(1)[0][1] == 1
    named = {"for", "aria-controls", "aria-describedby", "aria-labelledby"}
    assert {part for name in named for value in attributes(parsed, name) for part in value.split()} <= set(ids)
    assert set(re.findall(r'\$\("([^"]+)"\)', parsed.texts["script"])) <= set(ids)


def test_every_control_has_a_name(parsed):
    labelled = set(attributes(parsed, "for"))
    inside_labels = set(re.findall(r'<label[^>]*>[^<]*<input id="([^"]+)"', PAGE))
    for tag, values in parsed.elements:
        if tag in ("input", "textarea") and "hidden" not in values:
            assert values["id"] in labelled | inside_labels, values


def test_nothing_is_loaded_from_elsewhere(parsed):
    for name in ("src", "href", "srcset", "action", "data", "poster", "background"):
        assert all(value.startswith("data:") for value in attributes(parsed, name))
    assert not {tag for tag, _ in parsed.elements} & {"iframe", "object", "embed", "base", "form action"}
    style, script = parsed.texts["style"], parsed.texts["script"]
    assert not re.search(r"url\(|@import|@font-face", style)
    assert not re.search(r"https?:|//\w+\.|import\s*\(|importScripts|WebSocket|XMLHttpRequest|innerHTML|eval\(", script)
    assert set(re.findall(r"fetch\(([^,)]+)", script)) == {'"v1/models"', '"v1/chat/completions"'}


def test_the_policy_admits_this_style_and_this_script_alone(parsed):
    """The hashes to write into the page after a change are those that this test expects."""
    policy = next(
        values["content"] for _, values in parsed.elements if "content-security-policy" in str(values).lower()
    )
    directives = {words[0]: words[1:] for part in policy.split(";") if (words := part.split())}
    assert directives == {
        "default-src": ["'none'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "connect-src": ["'self'"],
        "img-src": ["data:", "blob:"],
        "style-src": [sha256(parsed.texts["style"])],
        "script-src": [sha256(parsed.texts["script"])],
    }
    assert not [values for _, values in parsed.elements if any(name == "style" or name[:2] == "on" for name in values)]


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_sample_picture_is_one_that_the_shipped_checkpoint_knows(parsed):
    (source,) = [values["src"] for tag, values in parsed.elements if tag == "img"]
    picture = Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))
    assert minivlm.load(device="cpu").generate("Describe the picture.", images=[picture]).text == DESCRIPTION


# ---- in a browser

OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
           "--disable-background-networking", "--disable-component-update"]  # fmt: skip
PATIENCE = 60_000  # milliseconds
LONG = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 500}


def serve(*options: str) -> Server:
    return Server("minivlm serve", [sys.executable, "-m", "minivlm", "serve", *options])


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "expected chromium or google-chrome on the PATH"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield running
        running.close()


class Visit:
    """The page in a window of its own, all that it asked of servers, and all that it complained of."""

    def __init__(self, browser, url: str, **window: object):
        self.context = browser.new_context(**window)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.complaints: list[str] = []
        self.addresses: list[str] = []
        self.bodies: list[dict] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        self.page.on("request", self._note)
        self.page.goto(url)
        self.page.locator("#model:not(:empty), #access:not([hidden])").first.wait_for()

    def _note(self, request) -> None:
        self.addresses.append(request.url)
        if request.method == "POST":
            self.bodies.append(json.loads(request.post_data))

    def ask(self, question: str) -> str:
        """Type, press Enter, wait for the end; the last answer."""
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        self.page.wait_for_selector("#send:not([hidden])")
        return self.answer()

    def answer(self) -> str:
        return self.page.locator(".turn").last.locator(".answer").inner_text().removesuffix("■")

    def facts(self) -> str:
        return self.page.locator(".facts").last.inner_text()

    def show(self, picture: Path = SAMPLE) -> None:
        self.page.set_input_files("#files", picture)
        self.page.wait_for_selector("#pending img")


@pytest.fixture
def visit(browser, server):
    opened = []

    def make(url: str = server.url, **window: object) -> Visit:
        opened.append(Visit(browser, url, **window))
        return opened[-1]

    yield make
    for one in opened:
        one.context.close()


@pytest.mark.browser
def test_a_picture_and_a_question(visit, server):
    here = visit()
    here.show()
    assert here.ask("Describe the picture.") == DESCRIPTION
    tokens = here.page.locator(".answer .t")
    assert "".join(tokens.all_inner_texts()).removesuffix("■") == DESCRIPTION
    assert re.search(r"35 tokens\s+first after \d+ ms\s+\d+ tokens/s\s+prompt of \d+", here.facts()), here.facts()
    tints = tokens.evaluate_all("spans => spans.map(span => Number(span.style.getPropertyValue('--tint')))")
    expected = minivlm.load().generate("Describe the picture.", images=[SAMPLE], top_logprobs=5).tokens
    least = min(range(len(expected)), key=lambda index: expected[index].logprob)
    assert tints.index(max(tints)) == least, "the model's least sure token has the strongest colour"
    tokens.nth(least).hover()
    card = here.page.locator("#card").inner_text()
    for alternative in expected[least].alternatives:
        assert alternative.text.replace(" ", "·") in card
    assert f"{100 * pow(2.718281828, expected[least].logprob):.0f}"[:1] in card
    assert here.complaints == []
    assert {address.startswith((server.url, "data:")) for address in here.addresses} == {True}


@pytest.mark.browser
def test_again_about_the_same_picture(visit):
    here = visit()
    here.show()
    here.ask("Describe the picture.")
    numbers = json.loads(here.ask("Where is the star?"))
    star = (20 / 640, 45 / 480, 212 / 640, 227 / 480)
    assert numbers == pytest.approx(star, abs=0.08)
    drawn = here.page.locator(".box").bounding_box()
    whole = here.page.locator(".shown img").bounding_box()
    assert (drawn["x"] - whole["x"]) / whole["width"] == pytest.approx(numbers[0], abs=0.02)
    assert len(here.bodies[1]["messages"]) == 1, "minivlm-tiny knows no second turns; its page sends the picture anew"
    here.page.check("#remember")
    assert here.ask("What is written?")
    roles = [message["role"] for message in here.bodies[2]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    pictures = [part for message in here.bodies[2]["messages"] for part in message["content"] if "image_url" in part]
    assert len(pictures) == 1
    here.page.click("#fresh")
    assert here.page.locator("#pending img").count() == 1, "the picture stays at hand"
    assert here.page.locator(".turn").count() == 0


@pytest.mark.browser
def test_pictures_are_pasted_dropped_drawn_and_removed(visit):
    here = visit()
    send = """async (kind) => {
      const canvas = document.createElement("canvas");
      const blob = await new Promise((done) => canvas.toBlob(done));
      const files = new DataTransfer();
      files.items.add(new File([blob], `${kind}.png`, { type: "image/png" }));
      const values = { bubbles: true, cancelable: true };
      document.dispatchEvent(kind === "paste" ? new ClipboardEvent("paste", { clipboardData: files, ...values })
        : new DragEvent("drop", { dataTransfer: files, ...values }));
    }"""
    for number, kind in enumerate(("paste", "drop")):
        here.page.evaluate(send, kind)
        here.page.locator("#pending img").nth(number).wait_for()
    here.page.get_by_label("Remove paste.png").click()
    here.page.get_by_label("Remove drop.png").click()
    here.page.click("#draw")
    assert re.fullmatch(r"an? \w+ \w+ .*", here.ask("Describe the picture.")), here.answer()
    here.page.set_input_files("#files", FILE)
    assert "page.html is not a picture (text/html)" in here.page.inner_text("#told")


@pytest.mark.browser
def test_json_of_a_schema(visit):
    here = visit()
    here.show()
    here.page.check("#guided")
    schema = json.loads(here.page.input_value("#schema"))
    jsonschema.validate(json.loads(here.ask("Describe the picture.")), schema)
    assert "valid JSON" in here.facts()
    assert here.bodies[0]["response_format"]["json_schema"]["schema"] == schema
    here.page.fill("#schema", '{"type": "object",}')
    assert "JSON" in here.page.inner_text("#schema-note")
    assert here.page.get_attribute("#schema", "aria-invalid") == "true"
    here.page.fill("#question", "What is written?")
    here.page.press("#question", "Enter")
    assert "JSON schema:" in here.page.inner_text("#told")
    assert len(here.bodies) == 1, "it is not sent"
    here.page.fill("#schema", '{"type": "nonsense"}')
    here.page.press("#question", "Enter")
    here.page.wait_for_selector(".error:not([hidden])")
    assert "422" in here.page.inner_text(".error:not([hidden])")
    assert "nonsense" in here.page.inner_text(".error:not([hidden])")


@pytest.mark.browser
def test_stop_frees_the_server(visit, server):
    here = visit()
    here.page.check("#guided")
    here.page.fill("#schema", json.dumps(LONG))
    here.page.fill("#max_tokens", "1800")
    here.page.fill("#question", "Count.")
    here.page.press("#question", "Enter")
    here.page.locator(".answer .t").nth(5).wait_for()
    here.page.click("#stop")
    here.page.wait_for_selector("#send:not([hidden])")
    assert "stopped" in here.facts()
    tokens = int(re.search(r"(\d+) tokens", here.facts())[1])
    assert 5 < tokens < 1000
    here.page.wait_for_timeout(500)
    assert "tgi_batch_current_size 0.0" in httpx.get(f"{server.url}/metrics").text
    here.page.uncheck("#guided")
    here.page.fill("#max_tokens", "100")
    here.show()
    assert here.ask("What is written?") == "FISH"


@pytest.mark.browser
def test_errors_are_shown_as_the_server_tells_them(visit):
    here = visit()
    here.show()
    here.page.fill("#max_tokens", "100000")
    here.ask("Describe the picture.")
    shown = here.page.inner_text(".error:not([hidden])")
    again = httpx.post(f"{here.page.url}v1/chat/completions", json=here.bodies[0], timeout=60)
    assert str(again.status_code) in shown
    error = again.json()["error"]
    assert (error if isinstance(error, str) else error["message"]) in shown
    here.page.fill("#max_tokens", "100")
    here.page.get_by_role("button", name="Try again").click()
    here.page.wait_for_selector("#send:not([hidden])")
    assert here.answer() == DESCRIPTION


@pytest.mark.browser
def test_the_key_is_asked_for(visit):
    with serve("--api-key", "secret") as locked:
        here = visit(locked.url)
        here.show()
        here.ask("Describe the picture.")
        assert "401" in here.page.inner_text(".error:not([hidden])")
        here.page.fill("#key", "secret")
        here.page.press("#key", "Enter")
        here.page.locator(".answer .t").nth(30).wait_for()
        here.page.wait_for_selector("#send:not([hidden])")
        assert here.answer() == DESCRIPTION


@pytest.mark.browser
def test_a_server_that_has_gone_is_told(visit):
    with serve() as short:
        here = visit(short.url)
    here.ask("Anybody there?")
    assert "The server does not answer" in here.page.inner_text(".error:not([hidden])")


@pytest.mark.browser
def test_by_keyboard_alone(visit):
    here = visit()
    here.page.focus("#sample")
    here.page.keyboard.press("Enter")
    assert here.page.evaluate("document.activeElement.id") == "question"
    here.page.keyboard.type("What is written?")
    here.page.keyboard.press("Enter")
    here.page.wait_for_selector("#send:not([hidden])")
    for _ in range(20):
        here.page.keyboard.press("Shift+Tab")
        if here.page.evaluate("document.activeElement.classList.contains('answer')"):
            break
    here.page.keyboard.press("ArrowRight")
    assert here.page.is_visible("#card")
    assert "%" in here.page.inner_text("#live")
    here.page.keyboard.press("Escape")
    assert here.page.is_hidden("#card")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_and_can_be_read(visit, scheme, width):
    here = visit(viewport={"width": width, "height": 800}, color_scheme=scheme)
    here.show()
    here.ask("Describe the picture.")
    assert here.page.evaluate("document.documentElement.scrollWidth") <= width
    colours = here.page.evaluate("""() => ["--paper", "--ink", "--quiet", "--wrong"].map((name) => {
      const probe = document.body.appendChild(document.createElement("i"));
      probe.style.setProperty("color", `var(${name})`);
      return getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    })""")
    paper, *inks = map(luminance, colours)
    assert (paper < 0.1) == (scheme == "dark")
    for ink in inks:
        assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) >= 4.5


def luminance(colour: list[float]) -> float:
    """WCAG's, 0 to 1."""
    linear = [value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour]
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
