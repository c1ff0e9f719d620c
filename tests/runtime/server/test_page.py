"""The page, in a real browser on a real server. Without Chromium nothing here is run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
KEY = "a-key"
expect = playwright.expect


@pytest.fixture(scope="module")
def address(decoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    command = [sys.executable, "-m", "optimizer.cli", "serve", str(decoder_folder), "--port", "0", "--threads", "1"]
    with subprocess.Popen(
        [*command, "--api-key-file", str(keys)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
        assert found is not None
        yield found[0]
        process.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    opened = browser.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    outside: list[str] = []
    opened.on("request", lambda request: None if request.url.startswith(address) else outside.append(request.url))
    opened.goto(address)
    yield opened
    opened.close()
    assert outside == []  # it asks nobody but the server
    assert complaints == []


def give_key(page: Any) -> None:
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").dispatch_event("change")
    page.wait_for_selector("#model option", state="attached")


@needs_browser
def test_an_answer_streams_onto_the_page_with_its_figures(page: Any) -> None:
    give_key(page)
    page.get_by_label("prompt").fill("def main():")
    page.get_by_label("most tokens").fill("12")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#tokens")).to_have_text("12")
    assert len(page.locator("#answer").text_content()) > 0
    assert re.fullmatch(r"\d+ ms", page.locator("#ttft").text_content())
    assert float(page.locator("#speed").text_content()) > 0
    expect(page.locator("#slots")).to_have_text(re.compile(r"^\d+ of \d+$"))
    assert page.locator("#error").text_content() == ""


@needs_browser
def test_without_a_key_the_page_says_what_the_server_said(page: Any) -> None:
    page.get_by_label("prompt").fill("def main():")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#error")).to_contain_text("API key")
    assert page.locator("#answer").text_content() == ""


@needs_browser
def test_stop_ends_an_answer_where_it_is(page: Any) -> None:
    give_key(page)
    page.route("**/completions", lambda route: None)  # an answer that does not end by itself
    page.get_by_label("prompt").fill("def main():")
    page.get_by_role("button", name="Send").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    assert page.locator("#error").text_content() == ""


@needs_browser
def test_what_a_model_writes_is_never_markup(page: Any) -> None:
    give_key(page)
    markup = "<img src=x onerror='document.title = 1'>"
    event = json.dumps({"choices": [{"delta": {"content": markup}}], "usage": {"completion_tokens": 1}})
    body = f"data: {event}\n\ndata: [DONE]\n\n"
    page.route("**/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.get_by_label("prompt").fill("x")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#tokens")).to_have_text("1")
    assert page.locator("#answer").text_content() == markup
    assert page.locator("#answer img").count() == 0


def test_only_the_pages_own_script_and_style_may_run(client: Any) -> None:
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    for kind in ("script", "style"):
        text = re.findall(rf"<{kind}>(.*?)</{kind}>", response.text, re.DOTALL)
        assert len(text) == 1
        digest = base64.b64encode(hashlib.sha256(text[0].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not re.search(r"(src|href)=", response.text)
