"""The playground page, in a real browser without a window."""

import shutil

import pytest
from serving import embedded_service, running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT = "Once upon a time there was a fox who"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed on this machine; the page is not looked at"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of the browser's pipes
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url():
    with running(embedded_service(("mtp", "lookup"))) as server:
        yield server.url


@pytest.fixture(params=[("light", 1280, 820), ("dark", 420, 900)], ids=["light, wide", "dark, phone"])
def page(browser, url, request):
    """The open page. Whatever it reports as an error fails the test."""
    theme, width, height = request.param
    page, errors = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme), []
    page.on("console", lambda message: errors.append(message.text) if is_error(message) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#drafter option", state="attached")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    page.close()
    assert errors == []


def is_error(message) -> bool:
    """Whether a message of the console is an error, and not the status of a request that the server refused."""
    return message.type == "error" and "status of 400" not in message.text


def send(page, prompt=PROMPT, tokens="40"):
    page.fill("#tokens", tokens)
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    page.wait_for_selector(".note", timeout=60000)


def test_an_answer_is_drawn_round_by_round_and_equals_plain_decoding(page):
    send(page)
    drafted, plain = page.locator(".message.assistant .text").all_inner_texts()
    assert drafted == plain
    assert "The same text" in page.inner_text(".note")
    assert page.locator(".token.drafted").count() > 0
    bars = page.locator("#rounds div")
    assert page.inner_text("#tau") == f"{page.locator('.message.assistant').first.locator('.token').count() / bars.count():.2f}"
    drafting = page.locator("#rounds div.drafting")
    drafting.nth(1).click()
    assert page.locator("#tree .node").count() > 1
    assert page.inner_text("#round-title").startswith("Round ")


def test_rounds_are_chosen_by_keys(page):
    send(page)
    page.locator("#rounds div").nth(3).click()
    page.focus("#rounds")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#round-title").startswith("Round 3:")
    assert page.locator('#rounds div[aria-selected="true"]').count() == 1


def test_a_refusal_of_the_server_is_one_sentence_on_the_page(page):
    page.fill("#tokens", "100000")
    page.fill("#prompt", PROMPT)
    page.keyboard.press("Enter")
    page.wait_for_selector("#problem:not([hidden])")
    assert "100000" in page.inner_text("#problem")


def test_every_variant_is_explained_and_the_loaded_ones_have_figures(page):
    send(page)
    page.click("#tab-variants")
    for name in ("plain", "model", "lookup", "medusa", "hydra", "eagle", "eagle3", "mtp"):
        page.click(f"[data-name={name}]")
        assert len(page.inner_text("#summary")) > 50
        assert page.locator("#diagram .box").count() > 4
        while page.is_enabled("#next"):
            page.click("#next")
        assert page.locator("#diagram .later").count() == 0
        measured = page.inner_text("#measured")
        if name == "mtp":
            assert "tokens per pass" in measured
        elif name in ("medusa", "hydra", "eagle", "eagle3", "model"):
            assert "Not loaded on this server" in measured
            assert "headstart serve" in measured
    page.focus("[data-name=mtp]")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("[data-name=plain]", "aria-checked") == "true"
