"""The page in headless Chromium: an image is classified and explained, and what is no image gets a message."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.engines import installed
from processes import ROOT, free_port, tool, wait

NAME = "iformer_cifar"
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
         "disable-component-update", "disable-sync")
MISSING = [name for name in ("gradio", "selenium") if not installed(name)] + (
    [] if shutil.which("chromedriver") else ["chromium-driver"])


def drives_chromium(test: Callable) -> Callable:
    return pytest.mark.slow(pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")(test))


@pytest.mark.skipif(installed("gradio"), reason="gradio is installed")
def test_without_gradio_the_line_that_installs_it_is_printed() -> None:
    done = tool("demo", "-w", NAME, code=2)
    assert "gradio is not installed: python -m pip install -r requirements-deploy.txt" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not installed("gradio"), reason="gradio is not installed")
def test_the_app_of_ai_studio_listens_where_it_is_told(tmp_path: Path) -> None:
    port = free_port()
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, ROOT / "app.gradio.py"], cwd=tmp_path, stdout=log, stderr=log,
                                  env={**os.environ, "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": str(port)})
    try:
        answer = wait(lambda: urllib.request.urlopen(f"http://127.0.0.2:{port}/", timeout=10).read().decode(), server)
        assert "Image classification" in answer
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Start the page; yields its address and the folder that it was started in."""
    folder = tmp_path_factory.mktemp("demo")
    port = free_port()
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "-w", NAME, "--port", str(port), "--out", "out"]
    before = files(ROOT)
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        wait(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None, server)
        with pytest.raises(OSError):  # on no other address of this machine
            socket.create_connection(("127.0.0.2", port), 1).close()
        yield f"http://127.0.0.1:{port}/", folder
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    assert {path.name for path in folder.iterdir()} == {"log", "out"}
    assert files(ROOT) == before


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], Any]]:
    from selenium import webdriver

    opened = []

    def start(language: str, width: int) -> Any:
        options = webdriver.ChromeOptions()
        for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('browser')}", f"window-size={width},900",
                     f"lang={language}", f"accept-lang={language}"):
            options.add_argument(f"--{flag}")
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        opened.append(webdriver.Chrome(options, service))
        return opened[-1]

    yield start
    for driver in opened:
        driver.quit()


@drives_chromium
@pytest.mark.parametrize(("language", "method", "width", "said"), [
    ("en", "Grad-CAM", 1280, "Five likeliest classes"), ("zh-CN", "LIME", 500, "最可能的五个类别")])
def test_an_image_is_classified_and_explained(page: tuple[str, Path], browser: Callable[[str, int], Any],
                                              language: str, method: str, width: int, said: str) -> None:
    driver = browser(language, width)
    driver.get(page[0])
    wait(lambda: driver.find_element("id", "run"))
    driver.find_element("xpath", f"//*[@id='method']//label[contains(., '{method}')]").click()
    upload(driver, ROOT / "deploy" / "examples" / "cifar10_test_1.png")
    wait(lambda: driver.find_element("css selector", "#overlay img").get_property("naturalWidth") == 320)
    shown = driver.find_element("id", "classes").text
    assert said in shown and shown.count("%") == 5 and shown.splitlines()[1] == "ship"
    sides = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert sides[0] <= sides[1], "the page is wider than the window"


@drives_chromium
def test_what_is_no_image_gets_a_message(page: tuple[str, Path], browser: Callable[[str, int], Any],
                                         tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-30])
    driver = browser("en", 1280)
    driver.get(page[0])
    for name in ("text.png", "cut.png"):
        upload(driver, tmp_path / name)
        message = wait(lambda name=name: [found.text for found in driver.find_elements(
            "css selector", ".toast-body") if name in found.text])
        assert "not a readable image" in message[0] and "请选择图像" in message[0], message
        assert str(tmp_path) not in message[0] and "uploads" not in message[0]
        driver.refresh()


def upload(driver: Any, path: Path) -> None:
    wait(lambda: driver.find_element("css selector", "#image input[type=file]")).send_keys(str(path))
    wait(lambda: driver.find_element("css selector", "#image img"))
    driver.find_element("id", "run").click()


def files(folder: Path) -> set[str]:
    """Return the source files of the suite's folder."""
    return {str(path) for part in ("deploy", "tools", "analysis") for path in (folder / part).rglob("*")
            if "__pycache__" not in path.parts} | set(os.listdir(folder))
