"""The page at `/` in a real Chromium: what it shows is what the run says, by keyboard too, in both
colours, on a phone, and nobody else is asked anything.

Every test ends with what the browser's console said and which other hosts it asked: nothing, none.
"""

import base64
import io
import json
import re
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from peft import PeftModel

from ship_ds.api import Ship
from ship_ds.config import base_folder
from ship_ds.inference.explaining import Threshold
from ship_ds.inference.lora_reader import LoraReader
from ship_ds.model.loading import load_lm
from ship_ds.serving.limits import Limits
from ship_ds.serving.page import MAX_ADAPTER_BYTES, Plane
from tests.inference.conftest import KNOWN
from tests.serving.conftest import BASE, Serve, Served

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.slow
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

INSTRUCTION = KNOWN[0]
INPUTS = ["3 7 3 5", "1 3 9"]
EXAMPLES = [("3 9 5", "9 5"), ("1 8 2", "8")]
PAGE = Path(__file__).resolve().parents[2] / "ship_ds" / "serving" / "page"
FILES = ("adapter_config.json", "adapter_model.safetensors")
SECONDS = 120_000
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'


@pytest.fixture(scope="module")
def site(ship: Ship) -> Iterator[Served]:
    """Ready to explain, by a reader that has learnt nothing."""
    from tests.serving.conftest import started

    ship._threshold = Threshold(0.5, 0.0, 0.0, 0)
    ship._reader = LoraReader(ship.model.task_llm.sites(), ship.config.model.latent_size)
    running, stop = started(ship, Limits())
    yield running
    stop()
    ship._threshold = ship._reader = None


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page of its own, and what went wrong on it."""

    def __init__(self, chromium: Any, url: str, **options: Any) -> None:
        self.host = urlsplit(url).netloc
        self.context = chromium.new_context(accept_downloads=True, **options)
        self.context.set_default_timeout(SECONDS)
        self.faults: list[str] = []
        self.allowed: tuple[str, ...] = ()
        """What the console may say: that a refusal was meant."""
        self.page = self.context.new_page()
        self.context.route(lambda asked: urlsplit(asked).netloc != self.host, self._refuse)
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: self.faults.append(f"dialog {dialog.message}"))
        self.page.goto(url)

    def _refuse(self, route: Any) -> None:
        self.faults.append(f"asked {route.request.url}")
        route.abort()

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def rows(self, body: str) -> list[list[str]]:
        rows = self.page.locator(f"{body} tr")
        return [rows.nth(i).locator("td").all_inner_texts() for i in range(rows.count())]

    def wait_for(self, selector: str, words: str) -> None:
        sync_api.expect(self.page.locator(selector)).to_contain_text(words, timeout=SECONDS)

    def answer(self, instruction: str = INSTRUCTION, inputs: list[str] = INPUTS) -> None:
        self.page.fill("#instruction", instruction)
        self.page.fill("#inputs", "\n".join(inputs))
        self.page.click("#answer")
        self.wait_for("#instruction-status", "agreement")

    def close(self) -> None:
        self.context.close()
        unmeant = [one for one in self.faults if not any(word in one for word in self.allowed)]
        assert unmeant == []


@pytest.fixture
def visit(chromium: Any, site: Served) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def begin(url: str = "", **options: Any) -> Visit:
        visits.append(Visit(chromium, url or site.url, **options))
        return visits[-1]

    yield begin
    for one in visits:
        one.close()


@pytest.fixture(scope="module", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The server of these tests is in this process; another one's folders do not count."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = before


def temporary_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("ship-ds-*"))


@in_chromium
def test_an_instruction_is_answered_beside_the_bare_base(
    visit: Callable[..., Visit], ship: Ship
) -> None:
    here = visit()
    here.wait_for("#run", BASE)
    assert here.page.input_value("#inputs") == "\n".join(ship.probes)
    here.answer()
    adapted, bare = ship.answer(INSTRUCTION, INPUTS), ship.answer_bare(INPUTS)
    confidence = ship.confidence(INSTRUCTION, INPUTS)
    rows = here.rows("#answers")
    assert [row[0] for row in rows] == INPUTS
    for column, answers in ((1, adapted), (2, bare)):
        for row, answer in zip(rows, answers, strict=True):
            # One that did not end is shown as far as it came, and said to be cut off.
            assert row[column] == answer if answer else "cut off after 6 tokens" in row[column]
    # An eighth is a tie, which Python and JavaScript round to different sides.
    shown = [float(row[3]) for row in rows]
    assert shown == pytest.approx(list(confidence.by_input), abs=0.0051)
    agreed = re.match(r"(low, )?(\d\.\d\d)\. ", here.text("#confidence"))
    assert agreed and float(agreed[2]) == pytest.approx(confidence.agreement, abs=0.0051)
    latent = ship.encode(INSTRUCTION)
    assert here.text("#reconstruction").strip() == ship.decode(latent).strip()
    nearest = [[one.instruction, f"{one.distance:.2f}"] for one in ship.nearest_known(latent)]
    assert here.rows("#nearest") == nearest
    assert here.page.is_hidden("#far")


@in_chromium
def test_the_warnings_are_shown(visit: Callable[..., Visit]) -> None:
    here = visit()
    here.wait_for("#run", BASE)
    here.page.route(
        "**/ship/v1/describe",
        lambda route: route.fulfill(
            json={
                "reconstruction": None,
                "nearest": [],
                "is_far": True,
                "warning": "far from the others",
                "place": None,
            }
        ),
    )
    here.page.route(
        "**/ship/v1/confidence",
        lambda route: route.fulfill(
            json={
                "agreement": 0.25,
                "by_input": [0.25, 0.25],
                "threshold": 0.7,
                "is_low": True,
                "warning": "confidence: adapters around this one disagree",
            }
        ),
    )
    here.answer()
    assert here.text("#far") == "far from the others"
    assert here.text("#doubt") == "confidence: adapters around this one disagree"
    assert here.text("#confidence").startswith("low, 0.25. ") and "0.70" in here.text("#confidence")


@in_chromium
def test_a_downloaded_adapter_is_loaded_by_peft_and_explained(
    visit: Callable[..., Visit], ship: Ship, tmp_path: Path
) -> None:
    before = temporary_folders()
    here = visit()
    here.wait_for("#run", BASE)
    here.page.fill("#instruction", INSTRUCTION)
    with here.page.expect_download() as download:
        here.page.click("#download")
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / INSTRUCTION.replace(" ", "-")
    assert {path.name for path in folder.iterdir()} >= {*FILES, "ship.json", "README.md"}
    config = ship.config.model.task_llm
    base = load_lm(config.base, config.quantisation, ship.dtype)
    loaded = PeftModel.from_pretrained(base, str(folder))
    assert loaded.peft_config["default"].base_model_name_or_path == str(
        base_folder(config.base).resolve()
    )

    here.page.set_input_files("#files", [folder / name for name in FILES])
    here.page.click("#explain")
    here.wait_for("#adapter-status", "Explained")
    rows = here.rows("#explained")
    assert here.text("#explanation") == INSTRUCTION == rows[0][0]
    explained = ship.explain(folder)
    assert rows == [
        [one.instruction, f"{one.same} of {len(explained.inputs)}", ", ".join(one.sources)]
        for one in explained.candidates[:6]
    ]
    assert "Same answers" in here.text("#adapter-part")

    here.page.fill("#adapter-inputs", "\n".join(INPUTS))
    here.page.click("#explain")
    here.wait_for("#adapter-status", "Explained")
    assert here.rows("#explained")[0][1] == f"{len(INPUTS)} of {len(INPUTS)}"
    assert temporary_folders() <= before


@in_chromium
def test_examples_give_candidates_and_a_click_takes_one(
    visit: Callable[..., Visit], ship: Ship
) -> None:
    here = visit()
    here.wait_for("#run", BASE)
    here.page.fill("#examples", "\n".join(f"{x} -> {y}" for x, y in EXAMPLES))
    here.page.click("#induce")
    here.wait_for("#examples-status", "the best answers")
    induced = ship.induce(EXAMPLES)
    for row, one in zip(here.rows("#candidates"), induced.candidates[:6], strict=True):
        in_prompt = f"{one.num_right_in_prompt} of 2"
        if one.num_right_in_prompt is None:
            in_prompt = "\N{EN DASH}"
        assert row == [one.instruction, f"{one.num_right} of 2", in_prompt, f"{one.loss:.2f}"]
    here.page.click("#candidates tr:first-child button")
    here.wait_for("#instruction-status", "agreement")
    assert here.page.input_value("#instruction") == induced.instruction
    assert here.text("#results-instruction") == induced.instruction


@in_chromium
def test_errors_stand_beside_what_caused_them(visit: Callable[..., Visit]) -> None:
    here = visit()
    here.allowed = ("status of 400",)
    here.wait_for("#run", BASE)
    here.page.click("#answer")
    assert "Say what to do" in here.text("#instruction-error")
    assert here.page.get_attribute("#instruction", "aria-invalid") == "true"
    assert here.page.evaluate("document.activeElement.id") == "instruction"
    here.page.fill("#instruction", HOSTILE)
    here.page.click("#answer")
    here.wait_for("#instruction-error", "vocabulary")
    assert "<img" in here.text("#instruction-error")
    here.page.fill("#instruction", INSTRUCTION)
    here.page.fill("#inputs", "1 2\nxylophone")
    here.page.click("#answer")
    here.wait_for("#inputs-error", "input 2: 'xylophone' is not")
    assert here.text("#instruction-error") == ""
    assert here.page.get_attribute("#instruction", "aria-invalid") is None
    here.page.fill("#inputs", "\n".join(["1 2"] * 17))
    here.page.click("#answer")
    here.wait_for("#inputs-error", "17 inputs")
    here.page.fill("#examples", "1 2 -> 2\nno arrow")
    here.page.click("#induce")
    here.wait_for("#examples-error", "line 2: expected input -> target")
    here.page.click("#explain")
    here.wait_for("#files-error", "adapter_config.json and adapter_model.safetensors")


@in_chromium
def test_files_that_are_no_adapter_are_one_line(visit: Callable[..., Visit]) -> None:
    before = temporary_folders()
    here = visit()
    here.allowed = ("status of 400",)
    here.wait_for("#run", BASE)
    junk = [{"name": name, "mimeType": "", "buffer": b"\x80\x02junk"} for name in FILES]
    here.page.set_input_files("#files", junk)
    here.page.click("#explain")
    here.wait_for("#files-error", "adapter_config.json")
    assert tempfile.gettempdir() not in here.text("#files-error")
    assert temporary_folders() <= before


@in_chromium
def test_texts_of_others_are_text(visit: Callable[..., Visit]) -> None:
    """What a model writes, and what is known, may be anything."""
    here = visit()
    here.wait_for("#run", BASE)
    events = [
        {"choices": [{"index": i, "text": HOSTILE, "finish_reason": "stop"}]} for i in range(2)
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    here.page.route(
        "**/v1/completions",
        lambda route: route.fulfill(body=stream, content_type="text/event-stream"),
    )
    here.page.route(
        "**/ship/v1/describe",
        lambda route: route.fulfill(
            json={
                "reconstruction": HOSTILE,
                "nearest": [{"instruction": HOSTILE, "distance": 1.0}],
                "is_far": True,
                "warning": HOSTILE,
                "place": [0.0, 0.0],
            }
        ),
    )
    here.page.route(
        "**/ship/v1/confidence",
        lambda route: route.fulfill(
            json={
                "agreement": 1.0,
                "by_input": [1.0, 1.0],
                "threshold": None,
                "is_low": True,
                "warning": HOSTILE,
            }
        ),
    )
    here.answer(HOSTILE, INPUTS)
    assert [row[1:3] for row in here.rows("#answers")] == [[HOSTILE, HOSTILE]] * 2
    for place in ("#far", "#doubt", "#reconstruction", "#nearest button", "#results-instruction"):
        assert here.text(place) == HOSTILE
    assert here.page.locator("main img, main script").count() == 0


@in_chromium
def test_an_answer_that_comes_before_the_map_is_marked_on_it(visit: Callable[..., Visit]) -> None:
    """The first map of a run takes as long as encoding all that it knows."""
    here = visit()
    here.wait_for("#run", BASE)
    held: list[Any] = []
    here.page.route("**/ship/v1/map", lambda route: held.append(route))
    here.page.reload()
    here.wait_for("#run", BASE)
    here.answer()
    assert here.page.locator("#map .typed").count() == 0
    held[0].continue_()
    here.page.wait_for_selector("#map .typed", state="attached")


@in_chromium
def test_the_map_is_walked_by_keys_and_has_a_table(visit: Callable[..., Visit], ship: Ship) -> None:
    here = visit()
    here.page.wait_for_selector("#map circle.known")
    assert here.page.locator("#map circle.known").count() == len(KNOWN)
    here.page.focus("#map")
    said = [here.text("#map-caption")]
    for key in ("ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown", "End", "Home", "PageDown"):
        here.page.keyboard.press(key)
        said.append(here.text("#map-caption"))
        current = here.page.get_attribute("#map", "aria-activedescendant")
        assert here.page.get_attribute(f"#{current}", "aria-label") == said[-1]
    assert set(said) <= set(KNOWN) and len(set(said)) > 3
    assert said[-3:] == [KNOWN[-1], KNOWN[0], KNOWN[1]]
    here.page.keyboard.press("Enter")
    here.wait_for("#instruction-status", "agreement")
    assert here.page.input_value("#instruction") == KNOWN[1]
    assert here.page.locator("#map .typed").count() == 1
    near = {one.instruction for one in ship.nearest_known(ship.encode(KNOWN[1]))}
    dots = here.page.locator("#map circle.near")
    assert {dots.nth(i).get_attribute("aria-label") for i in range(dots.count())} == near
    here.page.hover("#dot-3", force=True)
    assert here.text("#map-caption") in KNOWN
    here.page.click("#map-table-part summary")
    plane = Plane.of(ship)
    assert plane is not None
    here.wait_for("#map-rows", plane.points[-1][0])  # "toggle" comes after the click's own turn
    assert here.rows("#map-rows") == [
        [text, *(f"{value:z.2f}" for value in (x, y))] for text, x, y in plane.points
    ]


def test_a_new_instruction_lies_where_the_known_one_does(ship: Ship) -> None:
    plane = Plane.of(ship)
    assert plane is not None and 0 < plane.explained <= 1
    for text, x, y in plane.points[:3]:
        assert plane.place(ship.encode(text)) == pytest.approx((x, y), abs=1e-3)


FOCUSED = """() => {
  const one = document.activeElement, style = getComputedStyle(one);
  return {id: one.id || one.getAttribute("href") || one.tagName, outline: style.outlineStyle,
          width: parseFloat(style.outlineWidth)};
}"""


@in_chromium
def test_every_control_is_reached_by_keys_and_seen(visit: Callable[..., Visit]) -> None:
    here = visit()
    here.page.wait_for_selector("#map circle.known")
    here.page.focus("body")
    reached = []
    for _ in range(60):
        here.page.keyboard.press("Tab")
        focused = here.page.evaluate(FOCUSED)
        if focused["id"] == "BODY":
            break
        reached.append(focused["id"])
        assert focused["outline"] == "solid" and focused["width"] >= 2, focused
    else:
        pytest.fail(f"the keys are caught: {reached}")
    links = ["#main", "#instruction-part", "#map-part", "#examples-part", "#adapter-part"]
    controls = ["instruction", "inputs", "answer", "download", "map", "SUMMARY"]
    more = ["examples", "induce", "files", "adapter-inputs", "explain"]
    assert reached == [*links, *controls, *more]


@in_chromium
def test_an_instruction_by_keys_alone(visit: Callable[..., Visit]) -> None:
    here = visit()
    here.wait_for("#run", BASE)
    here.page.focus("body")
    for _ in range(6):
        here.page.keyboard.press("Tab")
    here.page.keyboard.type(INSTRUCTION)
    here.page.keyboard.press("Enter")
    here.wait_for("#instruction-status", "agreement")
    assert len(here.rows("#answers")) == len(here.page.input_value("#inputs").split("\n"))


@in_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    visit: Callable[..., Visit], scheme: str
) -> None:
    here = visit(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    here.page.wait_for_selector("#map circle.known")
    here.answer()
    here.page.fill("#examples", "\n".join(f"{x} -> {y}" for x, y in EXAMPLES))
    here.page.click("#induce")
    here.wait_for("#examples-status", "the best answers")
    here.page.click("#map-table-part summary")
    assert here.page.evaluate("document.documentElement.scrollWidth") == 360
    # Nothing is cut off either.
    outside = here.page.evaluate(
        "[...document.querySelectorAll('main *')].filter(one => !one.closest('thead, svg')"
        " && one.getBoundingClientRect().right > 360.5).map(one => one.outerHTML.slice(0, 80))"
    )
    assert outside == []
    background = here.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background))) / 3
    assert (brightness > 200) == (scheme == "light")


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_both_themes_have_enough_contrast() -> None:
    """4.5 for text, 3 for the edges of controls, dots and the focus (WCAG 2.2, 1.4.3 and
    1.4.11)."""
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", (PAGE / "style.css").read_text(), re.DOTALL)
    )
    assert light.keys() == dark.keys() and contrast("#000000", "#ffffff") == pytest.approx(21)
    for theme in (light, dark):
        for text in ("text", "quiet", "accent", "alert"):
            for ground in ("page", "surface", "tint"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        assert contrast(theme["on-accent"], theme["accent"]) >= 4.5
        for edge in ("border", "accent", "dot"):
            assert contrast(theme[edge], theme["surface"]) >= 3, edge


class Elements(HTMLParser):
    """(tag, attributes) of each element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs)))


def test_the_document_names_what_it_shows() -> None:
    elements = Elements((PAGE / "index.html").read_text()).all
    ids = [one["id"] for _, one in elements if "id" in one]
    assert len(ids) == len(set(ids))
    labels = {one["for"] for tag, one in elements if tag == "label"}
    controls = {one["id"] for tag, one in elements if tag in ("input", "textarea", "select")}
    assert controls == labels
    for _, one in elements:
        for key in ("aria-describedby", "aria-labelledby", "for"):
            assert set((one.get(key) or "").split()) <= set(ids), one
    errors = [one for _, one in elements if one.get("class") == "error"]
    assert len(errors) >= len(controls) and all(one["role"] == "alert" for one in errors)
    assert all(one["role"] == "status" for _, one in elements if one.get("class") == "status")
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    tags = [tag for tag, _ in elements]
    assert tags.count("main") == tags.count("nav") == tags.count("header") == 1
    assert ("html", {"lang": "en"}) in elements


def test_nothing_is_inline_and_nothing_is_elsewhere(site: Served) -> None:
    """The policy forbids both; the files do not try."""
    for tag, one in Elements((PAGE / "index.html").read_text()).all:
        assert not any(key.startswith("on") or key == "style" for key in one), one
        assert tag != "style" and (tag != "script" or one["src"] == "/page/app.js")
    for path in PAGE.iterdir():
        hosts = set(re.findall(r"https?://[^\s\"'`)]+", path.read_text()))
        assert hosts <= {"http://www.w3.org/2000/svg"}, path  # a name, never asked
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", path.read_text()
        ), path
    for name in ("/", *(f"/page/{path.name}" for path in PAGE.iterdir() if path.suffix != ".html")):
        answer = httpx.get(f"{site.url}{name}")
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200 and "default-src 'none'" in policy
        assert "unsafe" not in policy and "*" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    for name in ("/page/", "/page/../page.py", "/page/%2e%2e/page.py", "/page//etc/passwd"):
        assert httpx.get(f"{site.url}{name}").status_code == 404


@in_chromium
def test_a_long_job_says_that_it_runs_and_is_cancelled(
    visit: Callable[..., Visit], ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's work ends, too: at its next line of progress."""
    ended = threading.Event()

    def endless(pairs: object, log: Callable[[str], None]) -> None:
        try:
            while True:
                time.sleep(0.1)
                log("looking at candidates")
        finally:
            ended.set()

    monkeypatch.setattr(ship, "induce", endless)
    here = visit()
    here.wait_for("#run", BASE)
    here.page.fill("#examples", "1 2 -> 2 1")
    here.page.click("#induce")
    here.wait_for("#examples-status", "looking at candidates")
    here.wait_for("#examples-status", " s")
    assert here.page.get_attribute("#induce", "aria-disabled") == "true"
    here.page.click("#examples-cancel")
    assert here.text("#examples-status") == "Cancelled."
    assert here.page.is_hidden("#examples-cancel")
    assert here.page.evaluate("document.activeElement.id") == "induce"
    assert ended.wait(20)


@in_chromium
def test_what_ends_early_says_so(visit: Callable[..., Visit]) -> None:
    here = visit()
    here.allowed = ("status of 503",)
    here.wait_for("#run", BASE)
    error = json.dumps({"error": {"message": "no time for this"}})
    here.page.route("**/confidence", lambda route: route.fulfill(status=503, body=error))
    here.page.fill("#instruction", INSTRUCTION)
    here.page.click("#answer")
    here.wait_for("#instruction-form-error", "no time for this")
    assert here.text("#confidence") == "not measured"
    here.page.unroute("**/confidence")
    here.page.route("**/confidence", lambda route: None)  # no answer
    here.page.click("#answer")
    here.wait_for("#instruction-status", "Trying")
    assert here.text("#confidence") == "being measured"
    here.page.click("#instruction-cancel")
    here.wait_for("#confidence", "not measured")
    events = 'data: {"progress": "looking"}\n\n'
    here.page.route("**/induce", lambda route: route.fulfill(status=200, body=events))
    here.page.fill("#examples", "1 2 -> 2 1")
    here.page.click("#induce")
    here.wait_for("#examples-error", "the server ended before it had a result")


@in_chromium
def test_a_key_is_asked_for_and_kept_in_the_tab(serve: Serve, visit: Callable[..., Visit]) -> None:
    here = visit(serve(api_key="right").url)
    here.allowed = ("status of 401",)
    here.wait_for("#run", "A key is needed")
    # Nothing is wrong with what nobody has typed yet.
    assert here.page.get_attribute("#key", "aria-invalid") is None
    assert here.page.evaluate("document.activeElement.id") == "key"
    here.page.fill("#key", "wrong")
    here.page.keyboard.press("Enter")
    here.wait_for("#key-error", "does not take this key")
    here.page.fill("#key", "right")
    here.page.keyboard.press("Enter")
    here.wait_for("#run", BASE)
    assert here.page.is_hidden("#key-part")
    here.answer()
    assert here.page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]
    with here.page.expect_response("**/ship/v1/map"):
        here.page.evaluate("document.getElementById('key-form').requestSubmit()")
    here.page.wait_for_timeout(200)
    assert here.text("#map-lead").count("The two axes hold") == 1
    here.page.reload()
    here.page.wait_for_selector("#map circle.known")


def post(site: Served, path: str, body: object) -> httpx.Response:
    return httpx.post(f"{site.url}/ship/v1/{path}", json=body, timeout=SECONDS)


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("describe", {"instruction": ""}, "instruction"),
        ("describe", {"instruction": "  "}, "instruction: is empty"),
        ("describe", {"instruction": "add 1", "file": "/etc/passwd"}, "file"),
        ("describe", {"instruction": "a\ud800b"}, "instruction"),
        ("describe", {"instruction": "add\x001"}, "NUL"),
        ("describe", {"instruction": "add " * 20_000}, "instruction"),
        ("confidence", {"instruction": "add 1", "inputs": ["1"] * 17}, "inputs"),
        ("confidence", {"instruction": "add 1", "inputs": []}, "inputs"),
        ("induce", {"examples": []}, "examples"),
        ("induce", {"examples": [{"input": "1", "target": "xylophone"}]}, "example 1, target"),
        (
            "induce",
            {"examples": [{"input": "1", "target": "1"}, {"input": "1", "target": "2"}]},
            "two targets",
        ),
        ("export", {"instruction": "xylophone"}, "vocabulary"),
        ("explain", {"config": "{}", "weights": "AAAA"}, "config: is not base64"),
        ("explain", {"config": "e30=", "weights": "AAAA"}, "adapter_config.json"),
        ("explain", {"config": "e30="}, "weights"),
    ],
)
def test_what_cannot_be_done_is_one_line(site: Served, path: str, body: object, word: str) -> None:
    before = temporary_folders()
    # As JSON spells half a surrogate pair: httpx refuses to.
    answer = httpx.post(
        f"{site.url}/ship/v1/{path}",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
        timeout=SECONDS,
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and word in error["message"]
    assert "\n" not in error["message"] and tempfile.gettempdir() not in error["message"]
    assert temporary_folders() <= before


def test_an_adapter_may_be_larger_than_other_requests(serve: Serve, site: Served) -> None:
    """As far as it is bounded; and one at a time."""
    served = serve(Limits(max_body_bytes=2000, max_upload_bytes=50_000))
    config = base64.b64encode(b'{"peft_type": "NONE"}').decode()
    weights = base64.b64encode(bytes(30_000)).decode()
    refused = post(served, "explain", {"config": config, "weights": weights})
    assert refused.status_code == 400 and "peft_type" in refused.text
    too_large = post(served, "explain", {"config": config, "weights": weights * 2})
    assert too_large.status_code == 413
    assert post(served, "describe", {"instruction": "a" * 3000}).status_code == 413
    # The largest adapter in base64 fits what a server takes.
    assert Limits().max_upload_bytes > MAX_ADAPTER_BYTES * 4 / 3


def test_a_run_that_is_not_ready_says_how_to_make_it_so(
    site: Served, ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training a reader would hold the model for minutes, whoever else asks."""
    monkeypatch.setattr(ship, "_threshold", None)
    refused = post(site, "explain", {"config": "e30=", "weights": "AAAA"})
    assert refused.status_code == 400 and "--prepare" in refused.json()["error"]["message"]


def test_one_adapter_is_explained_at_a_time(
    site: Served, ship: Ship, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(folder: Path, inputs: object, log: object) -> None:
        assert oct(folder.parent.stat().st_mode & 0o777) == "0o700"
        begun.set()
        go_on.wait(30)
        raise ValueError("over")

    monkeypatch.setattr(ship, "explain", slow)
    files = {"config": "e30=", "weights": "AAAA"}
    first = threading.Thread(target=post, args=(site, "explain", files))
    first.start()
    assert begun.wait(30)
    second = post(site, "explain", files)
    go_on.set()
    first.join()
    assert second.status_code == 429 and "another adapter" in second.json()["error"]["message"]
    monkeypatch.undo()
    assert post(site, "explain", files).status_code == 400


def test_the_first_description_lets_answers_go_on(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    call, are_short = served.room.call, []

    async def recorded(function: Callable[[Ship], Any], *, is_short: bool = False) -> Any:
        are_short.append(is_short)
        return await call(function, is_short=is_short)

    monkeypatch.setattr(served.room, "call", recorded)
    for _ in range(2):
        assert post(served, "describe", {"instruction": INSTRUCTION}).status_code == 200
    assert are_short == [False, True]


def test_a_zip_of_a_client_that_leaves_is_gone(site: Served) -> None:
    before = temporary_folders()
    with httpx.stream(
        "POST",
        f"{site.url}/ship/v1/export",
        json={"instruction": INSTRUCTION},
        timeout=SECONDS,
    ) as answer:
        assert answer.headers["content-type"] == "application/zip"
        assert next(answer.iter_bytes(4)) == b"PK\x03\x04"
    assert temporary_folders() <= before
    whole = post(site, "export", {"instruction": INSTRUCTION})
    with zipfile.ZipFile(io.BytesIO(whole.content)) as archive:
        assert archive.testzip() is None
