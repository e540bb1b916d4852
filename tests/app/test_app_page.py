"""The app's page as it is served: by Gradio's own client, several at once, and in headless Chromium.

Gradio is an extra, in an environment of its own (``make test`` makes it): everything here is skipped without it.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import OWN
from browser import requests as requests_of
from PIL import Image

import lvlm_probe as probe
from lvlm_probe.app import Limits, Service, application

pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'lvlm-probe[app]'")
import httpx
import uvicorn
from gradio import processing_utils
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

SPACE = Path(__file__).parents[2] / "integrations" / "space"
LIMITS = Limits(file_bytes=300_000)
WAIT = 300.0
"""Seconds for a reply: clients give up after five, which a busy machine may take."""


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an app that is being served."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        started = threading.Event()
        begin = server.startup

        async def startup(*args: Any, **kwargs: Any) -> None:
            await begin(*args, **kwargs)
            started.set()

        server.startup = startup  # type: ignore[method-assign]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        assert started.wait(120)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = server.force_exit = True  # a browser keeps its connection open
        thread.join(30)


@pytest.fixture(scope="module")
def service(demo: Any) -> Iterator[Service]:
    made = Service({"demo": demo}, limits=LIMITS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with served(application(service)) as address:
        yield address


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Images of several scenes, as a visitor has them."""
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path, scene in zip(paths, probe.demo.scenes(len(paths), seed=5), strict=True):
        scene.image.save(path)
    return paths


def client(url: str) -> Any:
    return Client(url, verbose=False, httpx_kwargs={"timeout": WAIT})


def test_visitors_at_once_get_their_own_answers_pictures_and_pages(
    url: str, service: Service, demo: Any, files: list[Path]
) -> None:
    scenes = probe.demo.scenes(len(files), seed=5)
    found: dict[int, Any] = {}

    def visit(number: int) -> None:
        one, secret = client(url), service.new_visitor()
        words, *_ = one.predict(
            "demo", handle_file(files[number]), scenes[number].question, secret, None, None, api_name="/ask_answer"
        )
        _, picture, facts = one.predict("input_gradient", api_name="/explain_answer")
        page = Path(one.predict(api_name="/page_answer")).read_text(encoding="utf-8")
        found[number] = words, picture, facts, page, one.predict(secret, api_name="/history")

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, scene in enumerate(scenes):
        words, picture, facts, page, history = found[number]
        alone = probe.ask(*demo, scene.image, scene.question)
        said = "".join(part.split("<")[0] for part in words.split(">"))
        assert said.strip() == alone.text
        heat = alone.explain(method="input_gradient", check=False)
        drawn = np.asarray(Image.open(picture).convert("RGB").resize((99, 99))).astype(float)
        expected = np.asarray(heat.preview(900, score=None).resize((99, 99))).astype(float)
        assert np.abs(drawn - expected).mean() < 3  # the browser is sent WebP
        assert "input_gradient" in facts
        assert json.dumps(scene.question) in page
        assert history.count("data-name") == 1
        assert scene.question in history


def test_of_several_images_each_has_its_map(url: str, service: Service, demo: Any, files: list[Path]) -> None:
    one, secret, question = client(url), service.new_visitor(), "What color is the cross?"
    one.predict("demo", handle_file(files[0]), question, secret, handle_file(files[1]), None, api_name="/ask_answer")
    (summary,) = service.history(secret)
    trace, views = summary.open(), []
    assert [np.asarray(image).mean() for image in trace.images] == [
        np.asarray(Image.open(path).convert("RGB")).mean() for path in files[:2]
    ]
    for number in ("1", "2"):
        _, plain, facts = one.predict(number, api_name="/image_answer")
        assert "Click a word" in facts
        assert np.abs(small(plain) - small(files[int(number) - 1])).mean() < 3
        views.append(one.predict("input_gradient", api_name="/explain_answer")[1])
    source = probe.replay(trace, *demo)
    for image, view in enumerate(views):
        heat = probe.explain(source, method="input_gradient", image=image)
        assert np.abs(small(view) - np.asarray(heat.preview(900).resize((99, 99))).astype(float)).mean() < 3
    with pytest.raises(AppError, match="has no image"):
        one.predict("3", api_name="/image_answer")


def small(path: str | Path) -> np.ndarray:
    """An image as it is compared: the browser is sent WebP."""
    return np.asarray(Image.open(path).convert("RGB").resize((99, 99))).astype(float)


def test_one_who_did_not_ask_has_nothing(url: str) -> None:
    one = client(url)
    for name, inputs in (("explain_answer", ["igos++"]), ("check_answer", []), ("page_answer", []), ("lens", [])):
        with pytest.raises(AppError, match="ask first"):
            one.predict(*inputs, api_name=f"/{name}")
    with pytest.raises(AppError, match="load it again"):
        one.predict("../../etc", api_name="/history")


def test_nothing_is_fetched_decoded_or_read_for_a_stranger(
    url: str, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradio itself would fetch an address that is given as the path of a file."""
    fetched: list[str] = []

    async def fetch(address: str, **_: Any) -> str:
        fetched.append(address)
        probe.demo.scenes(1)[0].image.save(tmp_path / "a.png")
        return str(tmp_path / "a.png")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
    secret, address = service.new_visitor(), "https://example.org/a.png"
    for path in (address, address.upper(), "/etc/passwd", str(tmp_path / "a.png")):
        view = {"path": path, "url": address, "meta": {"_type": "gradio.FileData"}}
        for first, second in ((view, None), (None, view)):
            body = {"data": ["demo", first, "what?", secret, second, None]}
            event = httpx.post(f"{url}gradio_api/call/ask_answer", json=body, timeout=WAIT).json()["event_id"]
            assert "event: error" in httpx.get(f"{url}gradio_api/call/ask_answer/{event}", timeout=WAIT).text
    assert fetched == []
    assert service.history(secret) == []


def test_what_is_too_large_is_refused(url: str, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)).save(large)
    with large.open("rb") as data:
        answer = httpx.post(f"{url}gradio_api/upload", files={"files": data}, timeout=WAIT)
    assert answer.status_code >= 400
    body = httpx.post(f"{url}gradio_api/call/ask_answer", content=b" " * 2_000_000, timeout=WAIT)
    assert body.status_code == 413
    assert "save the image smaller" in body.text


def test_hostile_text_is_text(url: str, service: Service, files: list[Path]) -> None:
    question = '<img src=x onerror="document.title=1"><script>document.title=1</script>'
    one, secret = client(url), service.new_visitor()
    words, *_ = one.predict("demo", handle_file(files[0]), question, secret, None, None, api_name="/ask_answer")
    history = one.predict(secret, api_name="/history")
    assert "<img" not in words + history
    assert "<script" not in words + history
    assert "&lt;img" in history


def test_the_space_is_an_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SPACE))
    sys.modules.pop("app", None)
    import app as space  # type: ignore[import-not-found]

    with served(space.app) as address:
        assert "lvlm_probe" in httpx.get(address, timeout=WAIT).text
    space.service.close()
    sys.modules.pop("app")


# ------------------------------------------------------------------------------------------------------ in a browser


class Visit:
    """The page in a browser, and a way to wait for what it shows."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def __call__(self, condition: Any) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        stale = [StaleElementReferenceException]  # drawn anew between the look and the reading
        return WebDriverWait(self.driver, WAIT, ignored_exceptions=stale).until(lambda _: condition())

    def all_of(self, selector: str) -> list[Any]:
        return [one for one in self.driver.find_elements("css selector", selector) if one.is_displayed()]

    def press(self, text: str) -> None:
        script = """
            const all = document.querySelectorAll("button:not([tabindex='-1'])"); // tabs are measured on copies
            const shown = [...all].filter((one) => one.offsetParent);
            const found = shown.find((one) => one.textContent.trim() === arguments[0]);
            if (found) found.click();
            return Boolean(found);
        """
        self(lambda: self.driver.execute_script(script, text))

    def picture(self, label: str) -> np.ndarray:
        """The image under a label, as the browser was sent it."""
        script = """
            const block = [...document.querySelectorAll("label, [data-testid=block-label]")].find(
              (one) => one.textContent.trim() === arguments[0] && one.offsetParent);
            const image = block && block.closest(".block").querySelector("img");
            if (!image || !image.complete || !image.naturalWidth) return null;
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [99, 99];
            canvas.getContext("2d").drawImage(image, 0, 0, 99, 99);
            return canvas.toDataURL("image/png").split(",")[1];
        """
        found = self(lambda: self.driver.execute_script(script, label))
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(found))).convert("RGB")).astype(float)

    def keys(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, selector: str, text: str = "") -> None:
        """Press Tab until what has the focus fits."""
        script = """
            const one = document.activeElement;
            return one.matches(arguments[0]) && one.textContent.includes(arguments[1]);
        """
        for _ in range(100):
            if self.driver.execute_script(script, selector, text):
                return
            self.keys("\ue004")
        raise AssertionError(f"Tab comes to no {selector} {text!r}")

    def violations(self) -> list[str]:
        """What axe-core says against the page as it stands, light and dark, when nothing fades any more.

        Gradio's own box for an image that is not there has a name and no role.
        """
        axe = importlib.util.find_spec("axe_playwright_python")
        if axe is None or axe.origin is None:
            pytest.skip("no axe-core: pip install axe-playwright-python")
        self.driver.set_script_timeout(WAIT)
        self.driver.execute_script(Path(axe.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
        run = """
            const done = arguments[0];
            const still = () => document.getAnimations().every((one) => one.playState !== "running");
            const run = () => axe.run({exclude: [["div.empty[aria-label]"]]}).then(done);
            const wait = () => (still() ? run() : setTimeout(wait, 50));
            requestAnimationFrame(wait);
        """
        found = []
        for scheme in ("dark", "light"):
            self.driver.execute_script("document.body.classList.toggle('dark', arguments[0])", scheme == "dark")
            result = self.driver.execute_async_script(run)
            assert len(result["passes"]) > 10
            found += [
                f"{scheme} {one['id']}: {node['html'][:200]}" for one in result["violations"] for node in one["nodes"]
            ]
        return found


@pytest.fixture
def visit(driver: Any, url: str) -> Iterator[Visit]:
    """Opens the page; afterwards no complaint in the console, no request to anywhere else."""
    driver.get_log("browser")
    driver.get_log("performance")
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 1280, "height": 1400, "deviceScaleFactor": 1, "mobile": False}
    )
    driver.get(url)
    yield Visit(driver)
    assert driver.get_log("browser") == []
    assert [one for one in requests_of(driver) if not one.startswith((url, "blob:", *OWN))] == []


@pytest.mark.xdist_group("browser")
class TestInABrowser:
    def test_the_keyboard_is_enough_and_no_rule_of_axe_is_broken(self, visit: Any) -> None:
        enter, left, right, down = "\ue007", "\ue012", "\ue014", "\ue015"
        visit(lambda: visit.all_of(".lp-scenes button img"))
        assert visit.violations() == []
        visit.tab_to(".lp-scenes button")
        visit.keys(enter)
        question = probe.demo.scenes(1)[0].question
        visit(lambda: any(one.get_attribute("value") == question for one in visit.all_of("textarea, input")))
        visit.tab_to("button", "Ask")
        visit.keys(enter)
        visit(lambda: len(visit.all_of("#words-answer button[data-word]")) == 5)
        visit.tab_to("#words-answer button", "yellow")
        visit.keys(enter)
        visit(lambda: "Not checked" in visit.all_of("#facts-answer")[0].text)
        assert visit.violations() == []
        visit.press("Only this part")
        visit(lambda: visit.all_of(".lp-paint canvas"))
        visit.tab_to(".lp-paint canvas")
        visit.keys(*[right] * 7, *[down] * 6)  # from the middle to the cross, in steps of a brush's radius
        for _ in range(4):
            visit.keys(" ", right, right, " ", left, left, down)
        assert visit.violations() == []
        visit.tab_to("button", "And without this?")

        def said_without() -> str:  # the last stroke may be on its way to the server
            visit.keys(enter)
            visit(lambda: "Without this" in visit.all_of("#said-part")[0].text)
            return str(visit.all_of("#said-part")[0].text)

        visit(lambda: "yellow" in said_without())  # it was said, and is no more

    def test_ask_click_a_word_check_paint_and_look_inside(self, driver: Any, visit: Any) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        all_of, press, picture = visit.all_of, visit.press, visit.picture

        visit(lambda: all_of(".lp-scenes button img"))[0].click()
        question = probe.demo.scenes(1)[0].question
        visit(lambda: any(one.get_attribute("value") == question for one in all_of("textarea, input")))
        press("Ask")
        said = ["The", "cross", "is", "yellow", "."]
        visit(lambda: [one.text for one in all_of("#words-answer button[data-word]")] == said)
        words = all_of("#words-answer button[data-word]")
        warmth = [one.value_of_css_property("background-color") for one in words]
        assert warmth[3].startswith("rgba(213, 94, 0, 0.4")
        assert not warmth[0].startswith("rgba(213, 94, 0, 0.4")
        before = picture("Map")
        words[3].click()
        visit(lambda: "Not checked" in all_of("#facts-answer")[0].text)
        change = visit(lambda: (abs(picture("Map") - before).mean(axis=2)).max() > 30) and abs(picture("Map") - before)
        hot = change.mean(axis=2)[:90] > 30  # below is the mark
        assert hot[75:, 70:].sum() > 0.5 * hot.sum()  # on the cross
        press("Check this map")
        visit(lambda: "holds up" in all_of("#facts-answer")[0].text)
        assert "insertion" in all_of("#facts-answer")[0].text

        press("Only this part")
        canvas = visit(lambda: all_of(".lp-paint canvas"))[0]
        wide, high = canvas.size["width"], canvas.size["height"]
        chain = ActionChains(driver).move_to_element_with_offset(canvas, int(0.18 * wide), int(0.27 * high))
        chain.click_and_hold()
        for _ in range(4):
            chain.move_by_offset(int(0.22 * wide), 0).move_by_offset(-int(0.22 * wide), int(0.04 * high))
        chain.release().perform()
        press("And without this?")
        visit(lambda: "Without this" in all_of("#said-part")[0].text)
        assert "yellow" in all_of("#said-part")[0].text  # it was said, and is no more

        press("Layers")
        press("Read the layers")
        read = picture("Words at image tokens")
        assert (read.max(axis=2) - read.min(axis=2)).max() > 30
        image = next(one for one in all_of("img") if one.size["height"] > 300)
        ActionChains(driver).move_to_element(image).click().perform()
        visit(lambda: "likeliest words at image token" in all_of("#lens-table")[0].text)

        press("History")
        visit(lambda: all_of(".lp-history button[data-name]"))[0].click()
        press("Answer")
        visit(lambda: "Click a word" in all_of("#facts-answer")[0].text)
