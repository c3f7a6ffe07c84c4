"""The page of TensorBoard and the run report in a real browser: Debian's chromium, which CI installs."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from support.runs import ENVIRONMENT, REPOSITORY, Run

from moh_megatron.evaluate.paired_test import Comparison
from moh_megatron.evaluate.results import write_results

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="needs chromium and chromium-driver: apt-get install chromium chromium-driver",
)
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def runs(new_run: Callable[[], Run]) -> tuple[Run, Run]:
    """Two short runs that differ in one value; the first is stopped and resumed, raises an alarm and is evaluated."""
    first, second = new_run(), new_run()
    alarm = ["monitor.alarm_dead_heads=1.0", "monitor.alarm_steps=10"]
    settings = ["monitor.image_interval=10", "train.eval_interval=10", *alarm]
    for run, overrides, code in (
        (first, [*settings, "train.max_seconds=0.001"], 75),
        (first, settings, 0),
        (second, [*settings, "optimizer.learning_rate=1e-3"], 0),
    ):
        done = run.finish(*overrides)
        assert done.returncode == code, done.stdout + done.stderr
    found = first.folder / "eval" / "step_00000030"
    tasks = [{"task": "piqa", "shots": 0, "metric": "acc", "value": 0.5, "standard_error": 0.05, "questions": 100}]
    suite = {"name": "offline", "description": "d", "limit": 100, "tasks": tasks, "published": []}
    model = {"path": "one", "kind": "checkpoint", "step": 30, "tokens": 7680}
    compared = asdict(Comparison("piqa", 100, 0.1, 0.04, 12, 2, 0.013))
    comparison = {"against": "other/results.json", "tasks": [compared]}
    write_results(found, {"model": model, "dtype": "fp32", "suite": suite, "comparison": comparison}, [])
    first.folder.rename(first.folder.with_name("one"))
    second.folder.rename(second.folder.with_name("other"))
    return (
        Run(first.config, first.data, first.folder.with_name("one")),
        Run(second.config, second.data, second.folder.with_name("other")),
    )


def pixels(browser: webdriver.Chrome) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L"))


def resize(browser: webdriver.Chrome, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def shown(browser: webdriver.Chrome, *words: str) -> str:
    """The page's text, shadow roots included, once it has all ``words``."""
    script = """
        const text = node => [...node.childNodes].map(child =>
            child.nodeType === 3 ? child.nodeValue : ['STYLE', 'SCRIPT'].includes(child.nodeName) ? '' :
            text(child) + (child.shadowRoot ? text(child.shadowRoot) : '')).join(' ');
        return text(document.body);"""
    deadline = time.monotonic() + 90
    while True:
        found = browser.execute_script(script)
        # TensorBoard breaks a tag into two texts.
        missing = [word for word in words if "".join(word.split()) not in "".join(found.split())]
        if not missing:
            return found
        assert time.monotonic() < deadline, f"{missing} not in: {found[:3000]}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def tensorboard(runs: tuple[Run, Run]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs[0].folder.parent), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--load_fast", "false"],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if json.load(urllib.request.urlopen(f"{url}/data/runs", timeout=5)):
                    break
            except OSError:
                assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield url
    finally:
        process.kill()
        process.wait()


def test_tensorboard_shows_a_run(browser: webdriver.Chrome, tensorboard: str, tmp_path: Path) -> None:
    for plugin, tag in (
        ("scalars", "throughput/tflops_executed"),
        ("images", "routing_load/layers_by_heads"),
        ("histograms", "routing_load/over_fair_load"),
        ("text", "config/text_summary"),
    ):
        tags = json.load(urllib.request.urlopen(f"{tensorboard}/data/plugin/{plugin}/tags", timeout=60))
        assert any(tag in run_tags for run_tags in tags.values()), (plugin, tags)
    resize(browser, *DESKTOP)
    browser.get(f"{tensorboard}/?darkMode=false&tagFilter=%5Eloss/#timeseries")
    shown(browser, "loss/lm", "loss/balance", "loss/perplexity")
    assert pixels(browser).std() > 5
    # The page opens on the losses, not on single dots or on the load of single heads.
    browser.get("about:blank")
    browser.get(f"{tensorboard}/?darkMode=false#timeseries")
    cards = shown(browser, "loss/balance", "loss/lm")
    assert "head_load" not in cards
    browser.get("about:blank")
    browser.get(f"{tensorboard}/?darkMode=false#custom_scalars")
    categories = shown(browser, "language model", "throughput", "routing")
    assert categories.index("language model") < categories.index("throughput") < categories.index("routing")
    for page, tag in (("images", "routing_load/layers_by_heads"), ("histograms", "routing_load/over_fair_load")):
        browser.get("about:blank")
        browser.get(f"{tensorboard}/?darkMode=false#{page}")
        shown(browser, tag)
        assert pixels(browser).std() > 5
    browser.get(f"{tensorboard}/?darkMode=false#text")
    shown(browser, "config", "version", "num_attention_heads")


def test_the_report_is_readable_on_desktop_and_phone(
    browser: webdriver.Chrome, runs: tuple[Run, Run], tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    command = [sys.executable, str(REPOSITORY / "tools" / "report.py"), *(str(run.folder) for run in runs)]
    subprocess.run([*command, "--out", str(page)], env=ENVIRONMENT, check=True)
    assert "http" not in page.read_text(encoding="utf-8").replace("https://", "http"), "the page is self-contained"
    for width, height in (DESKTOP, PHONE):
        resize(browser, width, height)
        browser.get_log("browser")
        browser.get(page.as_uri())
        text = shown(browser, "training loss", "validation loss", "head load, one", "tokens a second", "Samples")
        assert "dead heads: layer" in text
        assert "measured here" in text
        assert "Against other/results.json" in text
        assert "optimizer.learning_rate" in text
        assert browser.get_log("browser") == []
        assert pixels(browser).std() > 5
        overflow = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0, "no part is wider than the window"
        charts = browser.find_elements(By.CSS_SELECTOR, "svg.chart")
        assert len(charts) >= 8
        for chart in charts:
            assert 0 < chart.rect["width"] <= width
        lines = browser.find_elements(By.CSS_SELECTOR, "figure:first-of-type polyline")[:2]
        dashes = {line.get_attribute("stroke-dasharray") for line in lines}
        assert len(dashes) == 2, "the lines of the runs differ without colour"
    rows = browser.execute_script("return [...document.querySelectorAll('tr')].map(row => row.innerText)")
    assert any(row.startswith("one") and "\t1\tfinished" in row for row in rows), "one restart"
