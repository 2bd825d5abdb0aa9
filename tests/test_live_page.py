"""The live page in headless Chromium, against a server whose replies the test writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from page_server import PageServer, Reply, count, made_up_view

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]

WAIT = 10_000  # ms: much more than anything takes on a busy machine
PHONE, WIDE = {"width": 375, "height": 667}, {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        # Root, as in containers, may not use the sandbox; nothing but our own page is opened.
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    server = PageServer(made_up_view(6, 60, 30, name="demo"))
    yield server
    server.close()


Opener = Callable[..., Any]


@pytest.fixture
def visit(chromium: Any) -> Iterator[Opener]:
    """Opens the page of a server; at the end no script may have failed or been stopped by the policy."""
    contexts, complaints = [], []

    def visit(server: PageServer, *, live: bool = True, is_watched: bool = True, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": WIDE, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        if is_watched:
            page.on("pageerror", lambda e: complaints.append(str(e)))
            page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.goto(server.url)
        if live:
            page.wait_for_selector("#link.on")
        return page

    yield visit
    for context in contexts:
        context.close()
    # The browser itself reports answers that are errors and servers that are away; the page has to live with these.
    assert [x for x in complaints if "Failed to load resource" not in x] == []


def send(page: Any, server: PageServer, text: str) -> Reply:
    page.fill("#text", text)
    page.press("#text", "Enter")
    return server.reply()


def wait(page: Any, condition: str) -> None:
    """Until the condition holds; Playwright's own way to wait for one is what the page's policy forbids."""
    end = time.monotonic() + WAIT / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def last(page: Any) -> str:
    return str(page.locator(".message").last.inner_text())


class TestConversation:
    def test_a_reply_appears_while_it_is_written_and_is_part_of_the_next_request(
        self, visit: Opener, server: PageServer
    ) -> None:
        page = visit(server)
        reply = send(page, server, "Hello")
        assert reply.path == "/v1/chat/completions"
        assert reply.body == {
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": "Hello"}],
        }
        reply.say(content="Once upon")
        wait(page, "document.querySelector('#log').textContent.includes('Once upon')")
        assert page.is_visible("#stop") and not page.is_visible("#send")
        reply.say(content=" a time\n\n  there")
        cache = {"hit_rate": 0.953, "exact": False, "swapped_share": 0.05}
        reply.end("length", {"completion_tokens": 7, "expert_cache": cache, "timings": {"decode_tps": 31.44}})
        page.wait_for_selector("#send:visible")
        assert "Once upon a time\n\n  there" in last(page)
        assert "7 tokens · 31.4 tok/s · 95.3 % hit · 5.0 % swapped · cut at the most tokens allowed" in last(page)
        assert page.inner_text("#said") == "Once upon a time there"  # read aloud once, when complete
        second = send(page, server, "And then?")
        assert second.body["messages"] == [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Once upon a time\n\n  there"},
            {"role": "user", "content": "And then?"},
        ]
        second.end()

    def test_text_of_model_and_user_is_never_html(self, visit: Opener, server: PageServer) -> None:
        evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script></p><b>bold</b>"
        server.view = made_up_view(2, 8, 4, name=evil)
        page = visit(server)
        reply = send(page, server, evil)
        reply.say(reasoning=evil)
        reply.say(content=evil)
        reply.send({"error": {"message": evil}})
        reply.end(None)
        page.wait_for_selector("#send:visible")
        assert page.locator("#log").inner_text().count(evil) == 4
        assert page.inner_text("#model") == evil
        assert page.locator("img, b, #log script").count() == 0
        assert page.title() == "mlx_moecache"

    def test_reasoning_is_dimmed_and_not_sent_back(self, visit: Opener, server: PageServer) -> None:
        page = visit(server)
        reply = send(page, server, "2 + 2?")
        reply.say(reasoning="Two and ")
        reply.say(reasoning_content="two.")
        reply.say(content="4")
        reply.end()
        page.wait_for_selector("#send:visible")
        thought = page.locator(".thought")
        assert thought.inner_text() == "Two and two."
        assert thought.evaluate("e => getComputedStyle(e).color") != page.evaluate(
            "getComputedStyle(document.body).color"
        )
        second = send(page, server, "Sure?")
        assert second.body["messages"][1] == {"role": "assistant", "content": "4"}
        second.end()

    @pytest.mark.parametrize("by", ["button", "escape"])
    def test_stop_ends_the_reply_frees_the_server_and_keeps_what_was_written(
        self, visit: Opener, server: PageServer, by: str
    ) -> None:
        page = visit(server)
        reply = send(page, server, "Hello")
        reply.say(content="Half a")
        wait(page, "document.querySelector('#log').textContent.includes('Half a')")
        page.click("#stop") if by == "button" else page.keyboard.press("Escape")
        page.wait_for_selector("#send:visible")
        assert reply.gone.wait(10)
        assert "Half a" in last(page) and "stopped" in last(page)
        second = send(page, server, "Go on")
        assert second.body["messages"][1] == {"role": "assistant", "content": "Half a"}
        second.end()

    def test_settings_are_sent_and_wrong_ones_are_refused_in_one_line(self, visit: Opener, server: PageServer) -> None:
        page = visit(server)
        page.click("#options summary")
        page.fill("#system", "Be brief.")
        page.fill("#max-tokens", "12")
        page.fill("#temperature", "0.7")
        reply = send(page, server, "Hello")
        assert (reply.body["max_tokens"], reply.body["temperature"]) == (12, 0.7)
        assert reply.body["messages"][0] == {"role": "system", "content": "Be brief."}
        reply.end()
        page.wait_for_selector("#send:visible")
        page.fill("#max-tokens", "0")
        page.fill("#text", "Hello again")
        page.press("#text", "Enter")
        wait(page, "document.querySelector('#trouble').textContent.startsWith('Most tokens: ')")
        assert page.input_value("#text") == "Hello again"
        assert server.replies.empty()

    def test_an_error_is_one_line_and_the_message_can_be_sent_again(self, visit: Opener, server: PageServer) -> None:
        page = visit(server)
        server.refuse = (400, json.dumps({"error": {"message": "the context is full:\nshorten it"}}))
        page.fill("#text", "Hello")
        page.press("#text", "Enter")
        wait(page, "document.querySelector('#trouble').textContent === 'Error: the context is full: shorten it'")
        assert page.input_value("#text") == "Hello"
        assert page.locator(".message").count() == 0
        server.refuse = None
        page.press("#text", "Enter")
        reply = server.reply()
        assert reply.body["messages"] == [{"role": "user", "content": "Hello"}]
        assert page.inner_text("#trouble") == ""
        reply.say(content="Half")
        reply.send({"error": {"message": "expert bytes cannot be read"}})
        reply.end(None)
        page.wait_for_selector("#send:visible")
        assert page.inner_text(".error") == "Error: expert bytes cannot be read"

    def test_a_reply_that_breaks_off_says_so(self, visit: Opener, server: PageServer) -> None:
        page = visit(server)
        reply = send(page, server, "Hello")
        reply.say(content="Half")
        reply.end(None)
        page.wait_for_selector("#send:visible")
        assert page.inner_text(".error") == "Error: the connection ended in the middle of the reply"

    def test_a_model_without_a_chat_template_continues_the_text(self, visit: Opener, server: PageServer) -> None:
        server.view = made_up_view(6, 60, 30, name="base", has_template=False)
        page = visit(server)
        assert "no chat template" in page.inner_text("#empty")
        page.click("#options summary")
        assert not page.is_visible("#system")
        reply = send(page, server, "Once upon")
        assert (reply.path, reply.body["prompt"]) == ("/v1/completions", "Once upon")
        reply.say(text=" a time")
        reply.end()
        page.wait_for_selector("#send:visible")
        second = send(page, server, "and")
        assert second.body["prompt"] == "Once upon\n a time\nand"
        second.end()

    def test_clear_forgets_everything_said(self, visit: Opener, server: PageServer) -> None:
        page = visit(server)
        reply = send(page, server, "Hello")
        reply.say(content="Hi")
        reply.end()
        page.wait_for_selector("#send:visible")
        page.click("#clear")
        assert page.locator(".message").count() == 0
        again = send(page, server, "New")
        assert again.body["messages"] == [{"role": "user", "content": "New"}]
        again.end()

    def test_shift_enter_makes_a_line_and_blank_messages_are_not_sent(self, visit: Opener, server: PageServer) -> None:
        page = visit(server)
        page.fill("#text", "  \n ")
        page.press("#text", "Enter")
        page.fill("#text", "a")
        page.press("#text", "Shift+Enter")
        page.keyboard.type("b")
        page.press("#text", "Enter")
        reply = server.reply()
        assert reply.body["messages"] == [{"role": "user", "content": "a\nb"}]
        reply.end()


COLOUR_OF = """([layer, expert]) => {
    const [x, y] = cellOf(start[layer] + expert, layer), c = pen.getImageData(x + 1, y + 1, 1, 1).data;
    return `rgb(${c[0]},${c[1]},${c[2]})`;
}"""
# 0 on disk, 1 in memory, then steps of hits over either and of misses over either
ON_DISK, IN_MEMORY, HIT, MISS = "colours[0]", "colours[1]", "colours[1 + 2 * LEVELS]", "colours[1 + 4 * LEVELS]"


class TestCache:
    def test_experts_light_up_by_how_they_were_found_and_fade(self, visit: Opener, server: PageServer) -> None:
        page = visit(server, reduced_motion="reduce")  # full colour, then gone: no steps to hit in between

        def becomes(layer: int, expert: int, colour: str) -> None:
            wait(page, f"({COLOUR_OF})([{layer}, {expert}]) === {colour}")

        becomes(3, 5, IN_MEMORY)
        becomes(3, 45, ON_DISK)
        server.view.used(3, "decode", [5, 7, 29], [29])
        becomes(3, 29, MISS)
        becomes(3, 5, HIT)
        assert page.evaluate(COLOUR_OF, [2, 5]) == page.evaluate(IN_MEMORY)
        assert len({page.evaluate(c) for c in (ON_DISK, IN_MEMORY, HIT, MISS)}) == 4
        becomes(3, 5, IN_MEMORY)
        becomes(3, 29, IN_MEMORY)
        # An expert that takes another's place, on a page that draws only what changes.
        residents = server.view._cache.layers[3].residents
        residents.publish(residents.plan([45]))
        server.view.used(3, "decode", [45], [45])
        becomes(3, 45, MISS)
        becomes(3, 45, IN_MEMORY)
        evicted = next(e for e in range(30) if e not in residents)
        becomes(3, evicted, ON_DISK)

    def test_figures_are_those_of_the_view(self, visit: Opener, server: PageServer) -> None:
        count(server.view, 43, selections=1000, hits=953, misses=47, bytes_read=42 * 1_234_000, swapped=58)
        page = visit(server)
        shown = {
            x: page.inner_text(f"#{x}") for x in ("hits", "bytes", "speed", "swapped", "total", "routing", "brief")
        }
        assert shown == {
            "hits": "95.3 %",
            "bytes": "1.23 MB",
            "speed": "31.4",
            "swapped": "5.8 %",
            "total": "peak 3 GB of budget 4 GB",
            "routing": "routing cache-prior (strength 0.1, j 2) · not exact · "
            "30 of 60 experts per layer in memory, 4 used per token",
            "brief": "· writing, 43 tokens",
        }
        assert page.inner_text("#parts").replace("\n", " ") == (
            "weights 1 GB expert slots 1 GB KV cache 500 MB transients 500 MB"
        )
        widths = page.evaluate("[...document.querySelectorAll('#bar span')].map(e => e.getBoundingClientRect().width)")
        total = page.evaluate("document.querySelector('#bar').clientWidth")
        assert [w / total for w in widths] == pytest.approx([0.25, 0.25, 0.125, 0.125, 0], abs=0.01)

    def test_arrow_keys_tell_about_single_experts(self, visit: Opener, server: PageServer) -> None:
        page = visit(server)
        page.focus("#grid")
        assert page.inner_text("#cell").startswith("layer 0, expert 0: in memory")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("#cell").startswith("layer 0, expert 59: on disk, not used")
        assert "6 layers of 60 experts, 180 of 360 in memory" in page.get_attribute("#grid", "aria-label")

    def test_60_layers_of_512_experts_fit_and_are_drawn_smoothly(self, visit: Opener, server: PageServer) -> None:
        server.view = made_up_view(60, 512, 96, name="wide")
        for size in (PHONE, WIDE):
            page = visit(server, viewport=size)
            assert page.evaluate("place.columns * place.size <= grid.width && 60 * place.step <= grid.height")
            assert page.evaluate("document.querySelector('#text').getBoundingClientRect().bottom <= innerHeight")
            # 3 tokens of 8 experts arrive with a snapshot: what a slow frame costs, whatever else this machine does.
            took = page.evaluate("""() => {
                const times = [];
                for (let n = 0; n < 30; n++) {
                    for (let layer = 0; layer < 60; layer++)
                        for (let i = 0; i < 24; i++) {
                            const e = start[layer] + (n * 37 + i * 21) % 512;
                            lastUsed[e] = performance.now();
                            hot.add(e);
                        }
                    const began = performance.now();
                    draw(began);
                    pen.getImageData(0, 0, 1, 1);
                    times.push(performance.now() - began);
                }
                return times.sort((a, b) => a - b)[15];
            }""")
            print(f"{size['width']} px: {took:.1f} ms a frame")
            assert took < 50


class TestConnection:
    def test_it_comes_back_when_the_server_does_with_whatever_model_that_has(
        self, visit: Opener, server: PageServer
    ) -> None:
        page = visit(server)
        server.close()
        page.wait_for_selector("#link.off")
        assert page.inner_text("#link") == "no connection, trying again"
        page.fill("#text", "Hello")
        page.press("#text", "Enter")
        wait(page, "document.querySelector('#trouble').textContent.includes('the server does not answer')")
        assert page.input_value("#text") == "Hello"
        again = PageServer(made_up_view(3, 20, 10, name="another"), port=server.port)
        try:
            page.wait_for_selector("#link.on")
            assert page.inner_text("#model") == "another"
            assert page.evaluate("[experts.length, resident.length]") == [3, 60]
            page.press("#text", "Enter")
            reply = again.reply()
            reply.say(content="Back")
            reply.end()
            wait(page, "document.querySelector('#log').textContent.includes('Back')")
        finally:
            again.close()

    def test_a_key_is_asked_for_and_sent_with_every_request(self, visit: Opener, server: PageServer) -> None:
        server.key = "sesame"
        page = visit(server, live=False)
        page.wait_for_selector("#key:visible")
        assert page.evaluate("document.activeElement.id") == "secret"
        page.fill("#secret", "wrong")
        page.press("#secret", "Enter")
        wait(page, "document.querySelector('#trouble').textContent.includes('does not take this API key')")
        page.fill("#secret", "sesame")
        page.press("#secret", "Enter")
        page.wait_for_selector("#link.on")
        assert not page.is_visible("#key")
        reply = send(page, server, "Hello")
        assert reply.authorization == "Bearer sesame"
        reply.end()
        assert "sesame" not in page.content() + page.url
        page.reload()
        page.wait_for_selector("#link.on")

    def test_a_page_that_nobody_sees_gives_its_connection_back(self, visit: Opener, server: PageServer) -> None:
        server.view.used(0, "decode", [7], [])
        page = visit(server)
        hide = """hidden => {
            Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
        page.evaluate(hide, True)
        end = time.monotonic() + 10
        while server.watching and time.monotonic() < end:
            page.wait_for_timeout(20)
        assert server.watching == 0
        page.evaluate(hide, False)
        count(server.view, 43)
        wait(page, "document.querySelector('#brief').textContent === '· writing, 43 tokens'")
        assert page.evaluate("hot.size === 0 && lastUsed[7] === -Infinity")  # used before we looked
        server.view.used(0, "decode", [7], [])
        wait(page, "lastUsed[7] > 0")

    def test_the_policy_stops_scripts_that_are_not_the_page_s_own(self, visit: Opener, server: PageServer) -> None:
        page = visit(server, is_watched=False)
        blocked = page.evaluate("""() => new Promise(resolve => {
            document.addEventListener("securitypolicyviolation", e => resolve(e.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "document.title = 'owned'";
            document.body.append(script);
        })""")
        assert blocked == "script-src-elem" and page.title() == "mlx_moecache"


class TestLook:
    @pytest.mark.parametrize("size", [PHONE, {"width": 320, "height": 568}, WIDE], ids=["phone", "small", "wide"])
    def test_nothing_is_cut_off_or_out_of_reach(self, visit: Opener, server: PageServer, size: dict[str, int]) -> None:
        page = visit(server, viewport=size)
        reply = send(page, server, "x" * 300)
        reply.say(content="word " * 300 + "y" * 300)
        reply.end()
        page.wait_for_selector("#send:visible")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for part in ("#text", "#send", "#clear", "#grid", "#options summary"):
            box = page.locator(part).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"], part
            assert box["y"] >= 0 and box["y"] + box["height"] <= size["height"], part
        if size != WIDE:
            page.click("#options summary")
            page.click("#memory summary")
        assert page.locator("#log").bounding_box()["height"] >= 100
        assert page.locator("#max-tokens").bounding_box()["y"] < size["height"] - 30 or size == WIDE
        assert page.evaluate("(l => l.scrollHeight - l.scrollTop - l.clientHeight)(document.querySelector('#log'))") < 3

    def test_text_is_readable_in_both_colour_schemes(self, visit: Opener, server: PageServer) -> None:
        def luminance(colour: str) -> float:
            parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
            r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
            return 0.2126 * r + 0.7152 * g + 0.0722 * b

        backgrounds = set()
        for scheme in ("light", "dark"):
            page = visit(server, color_scheme=scheme)
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            for text, on in [
                *[(a, b) for a in ("text", "dim", "bad", "accent") for b in ("page", "panel")],
                ("text", "mine"), ("dim", "mine"), ("on-accent", "accent"),
            ]:  # fmt: skip
                a, b = (luminance(page.evaluate(f"`rgb(${{colour('--{x}')}})`")) for x in (text, on))
                assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 4.5, (scheme, text, on)
        assert len(backgrounds) == 2

    def test_every_control_has_a_name_and_is_reached_with_the_tab_key(self, visit: Opener, server: PageServer) -> None:
        page = visit(server)
        page.click("#options summary")
        names = {
            "textbox": ["Message", "System prompt"],
            "spinbutton": ["Most tokens", "Temperature"],
            "button": ["Send", "Clear"],
        }
        for role, wanted in names.items():
            for name in wanted:
                assert page.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
        page.evaluate("document.activeElement.blur()")
        reached = []
        for _ in range(14):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.parentElement.id"))
        for part in ("cache", "grid", "memory", "log", "text", "send", "clear", "options", "system", "max-tokens"):
            assert part in reached, part


def test_with_the_real_server_a_story_is_told_and_experts_light_up(visit: Opener, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlx_moecache.server", "--port", "0", "--slots", "20", "--max-context", "300"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            first = process.stderr.readline()
            assert "page http://" in first, first + process.stderr.read()
            page = visit(SimpleNamespace(url=re.search(r"page (\S+)", first)[1]))
            page.fill("#text", "Tell me a story about a dragon.")
            page.press("#text", "Enter")
            lit = set()
            while not page.is_visible("#send"):
                lit.update(page.evaluate("[...hot].map(n => colourOf(n, performance.now())).filter(c => c > 1)"))
            steps = page.evaluate("LEVELS")
            assert {(c - 2) // (2 * steps) for c in lit} == {0, 1}  # hits and misses
            assert re.search(r"\d+ tokens · [\d.]+ tok/s · [\d.]+ % hit", last(page))
            wait(page, "document.querySelector('#brief').textContent.startsWith('· last reply')")
            assert re.fullmatch(r"[\d.]+ %", page.inner_text("#hits")), page.inner_text("#hits")
            assert page.evaluate("resident.reduce((a, b) => a + b)") <= 6 * 20
        finally:
            process.terminate()
            process.wait(20)
