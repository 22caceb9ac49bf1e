"""The page of `blockffn serve` in headless Chromium: it talks to the server, and can be used on a phone and by keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from serving import Local, chat_model

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium here (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    started = Local(chat_model(tmp_path_factory.mktemp("chat")), "--parallel", "2")
    yield started
    started.stop()


@pytest.fixture
def page(server: Local, tmp_path: Path) -> Iterator[browser.Browser]:
    opened = browser.Browser(tmp_path / "profile")
    opened.open(server.base)
    opened.until("find('model').textContent")
    opened.run("find('tokens').value = '20'; find('temperature').value = '0'; find('seed').value = '1'; 0")
    yield opened
    errors = opened.errors
    opened.close()
    assert errors == []


def shown(page: browser.Browser) -> str:
    """Return the text of the last answer."""
    return str(page.run("[...document.querySelectorAll('.text')].pop().textContent"))


def test_chat_streams_and_counts(page: browser.Browser, server: Local) -> None:
    assert page.run("document.activeElement.id") == "prompt" and page.run("find('mode').value") == "chat"
    page.write("hello")
    page.key("Enter")
    page.until("!!document.querySelector('.note')")
    messages = [{"role": "user", "content": "hello"}]
    body = {"messages": messages, "max_tokens": 20, "temperature": 0, "seed": 1}
    expected = server.ok("/v1/chat/completions", **body)["choices"][0]["message"]["content"]
    assert shown(page) == expected
    assert page.run("find('prompt').value") == "" and page.run("Number(find('speed').textContent) > 0") is True
    assert page.run("find('perstep').textContent") == "1.00"
    assert page.run("document.querySelectorAll('.text span.plain').length") > 10
    page.until("document.querySelectorAll('#cells i').length === 2")  # the layers of the model
    assert page.run("find('share').textContent").endswith("%")
    page.write("again")
    page.key("Enter")
    page.until("document.querySelectorAll('.note').length === 2")
    messages += [{"role": "assistant", "content": expected}, {"role": "user", "content": "again"}]
    assert shown(page) == server.ok("/v1/chat/completions", **body)["choices"][0]["message"]["content"]


def test_keys_stop_and_clear(page: browser.Browser, server: Local) -> None:
    page.run("find('tokens').value = '1900'; find('mode').value = 'continue'; 0")
    page.write("def add")
    with server.held(after=4):
        page.key("Enter")
        page.until("document.querySelectorAll('.text span').length > 2")
        page.key("Escape")
        page.until("!!document.querySelector('.note')")
    assert "stopped" in page.run("document.querySelector('.note').textContent") and shown(page).startswith("def add")
    assert server.idle()
    page.key("c", modifiers=1)
    assert page.run("document.querySelectorAll('.message').length") == 0


def test_switches(page: browser.Browser, server: Local) -> None:
    assert page.run("find('draft').disabled") is True  # started without --draft
    page.key("e", modifiers=1)
    page.until("find('exact').checked")
    for _ in range(200):
        if server.service.exact:
            break
        page.run("new Promise((done) => setTimeout(done, 20))")
    assert server.service.exact
    server.ok("/settings", exact=False)


def test_theme_and_width(page: browser.Browser) -> None:
    before = page.run("getComputedStyle(document.body).backgroundColor")
    page.key("t", modifiers=1)
    assert page.run("getComputedStyle(document.body).backgroundColor") != before
    for width in (360, 800):
        page.resize(width, 740)
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run("find('send').getBoundingClientRect().bottom") <= 740
    page.run("localStorage.clear(); 0")


def test_errors_are_shown(page: browser.Browser) -> None:
    page.run("find('tokens').value = '-5'; 0")
    page.write("hello")
    page.key("Enter")
    page.until("!!document.querySelector('.message.error')")
    assert "max_tokens" in page.run("document.querySelector('.message.error').textContent")
    page.errors.clear()  # Chromium logs the status 400 as an error
