"""Promises of the page at /: it works in a browser, by keyboard too, and asks no other server."""

from __future__ import annotations

import re
import shutil
from importlib.resources import files

import httpx
import pytest

from spectral_window.serving.app import PAGE
from tests.serving.conftest import bytes_tokenizer
from tests.serving.test_http import NO_DEADLINE

SOURCES = {name: (files("spectral_window.serving") / name).read_text() for name in PAGE.values()}


def test_the_page_is_served_under_a_strict_policy(serve):
    address, _ = serve()
    for path, name in PAGE.items():
        answer = httpx.get(f"{address}{path}", **NO_DEADLINE)
        assert answer.status_code == 200
        assert answer.text == SOURCES[name]
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def test_the_page_has_no_inline_code_and_names_no_other_server():
    assert not re.findall(r"\son\w+\s*=", SOURCES["page.html"])
    assert not re.findall(r"<style|\sstyle=|<script(?! src=)", SOURCES["page.html"])
    for source in SOURCES.values():
        assert "//" not in source.replace("// ", "").replace("//\n", "")


# ------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    library = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on this machine")
    with library.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Tab:
    """A page at the address of a server. Whatever the browser complains of fails the test."""

    def __init__(self, browser, address, **options) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(0)  # the suite's own deadline ends what hangs
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.requests: list = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.goto(address)
        self.address = address

    def idle(self) -> None:
        self.page.locator("#go:enabled").wait_for()

    def text(self, name: str) -> str:
        return self.page.locator(f"#{name}").inner_text()

    def bodies(self) -> list[dict]:
        return [r.post_data_json for r in self.requests if r.method == "POST"]

    def end(self) -> None:
        self.context.close()
        assert self.wrong == []
        outside = [r.url for r in self.requests if not r.url.startswith((self.address, "data:"))]
        assert outside == []


@pytest.mark.parametrize("sessions", [True, False])
def test_a_text_is_continued_again_and_again(serve, browser, tmp_path, sessions):
    """With sessions a request sends only what is new; an edited text is a new session."""
    address, _ = serve(sessions=tmp_path if sessions else None)
    tab = Tab(browser, address)
    tab.page.locator("#name", has_text="tiny").wait_for()
    tab.page.click("#to-text")
    box = tab.page.locator("#text")
    box.fill("hello")
    tab.page.locator("summary").click()
    tab.page.fill("#seed", "3")
    tab.page.click("#go")
    tab.idle()
    first = box.input_value()
    assert first.startswith("hello")
    assert len(first) > 50
    assert int(tab.text("tokens")) > 50
    assert tab.text("state") == "5.14 kB"
    assert tab.text("cache").endswith("kB")
    for bar in ("#state-bar", "#cache-bar"):  # drawn: a style sheet once hid them
        assert min(tab.page.locator(bar).evaluate("x => [x.offsetWidth, x.offsetHeight]")) > 2
    box.press("End")
    box.fill(first + " more")
    tab.page.keyboard.press("Control+Enter")
    tab.idle()
    second = box.input_value()
    assert second.startswith(first + " more")
    box.fill("another " + second)
    tab.page.click("#go")
    tab.idle()
    bodies = tab.bodies()
    if sessions:
        assert [body["prompt"] for body in bodies] == ["hello", " more", "another " + second]
        names = [body["session_id"] for body in bodies]
        assert names[0] == names[1] != names[2]
        assert len(list(tmp_path.glob("*.session"))) == 1  # the old one was deleted
    else:
        assert [body["prompt"] for body in bodies][:2] == ["hello", first + " more"]
        assert not any("session_id" in body for body in bodies)
    tab.end()


@pytest.mark.parametrize("sessions", [True, False])
def test_a_conversation_by_keyboard(serve, browser, tmp_path, sessions):
    address, _ = serve(sessions=tmp_path if sessions else None)
    tab = Tab(browser, address, viewport={"width": 360, "height": 700})
    tab.page.locator("#name", has_text="tiny").wait_for()
    tab.page.locator("#message").focus()
    for said in ("hi", "why?"):
        tab.page.keyboard.type(said)
        tab.page.keyboard.press("Control+Enter")
        tab.idle()
    roles = tab.page.locator("#messages li").evaluate_all("all => all.map(x => x.dataset.role)")
    assert roles == ["user", "assistant"] * 2
    counts = [len(body["messages"]) for body in tab.bodies()]
    assert counts == ([1, 1] if sessions else [1, 3])
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    tab.end()


def test_escape_stops_and_the_text_can_go_on(serve, browser, tmp_path):
    from spectral_window.serving.service import Limits
    from tests.serving.test_http import until

    address, service = serve(
        sessions=tmp_path, limits=Limits(new_tokens=10**6), tokenizer=bytes_tokenizer()
    )
    tab = Tab(browser, address)
    tab.page.locator("#name", has_text="tiny").wait_for()
    tab.page.locator("summary").click()
    tab.page.fill("#max-tokens", "1000000")
    tab.page.fill("#temperature", "0")
    tab.page.click("#go")
    tab.page.locator("#speed", has_text=re.compile("[0-9]")).wait_for()
    tab.page.keyboard.press("Escape")
    tab.idle()
    until(lambda: service.scheduler.idle)
    tab.page.fill("#max-tokens", "5")
    tab.page.click("#go")
    tab.idle()
    assert tab.page.locator("#notice").is_hidden()
    tab.end()


def test_a_server_with_a_key_asks_for_it(serve, browser):
    address, _ = serve(api_key="secret")
    tab = Tab(browser, address)
    tab.page.locator("#key").wait_for()
    for key in ("wrong", "secret"):
        tab.page.fill("#key", key)
        tab.page.keyboard.press("Enter")
    tab.page.locator("#name", has_text="tiny").wait_for()
    tab.page.locator("#key-form").wait_for(state="hidden")
    tab.wrong = [line for line in tab.wrong if "401" not in line]
    tab.end()
