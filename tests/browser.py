"""A headless Chromium for the tests of the status page, and a reader of Prometheus' text format.

A browser that cannot be started is a failure, no reason to skip: nothing else looks at the page."""

import contextlib
import os
import re
import sys
import tempfile
import time

sys.path.append("/usr/lib/python3/dist-packages")  # Debian's selenium, for a virtual environment


@contextlib.contextmanager
def browser(folder):
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError as error:
        raise AssertionError("the status page is tested with python3-selenium, chromium and "
                             f"chromium-driver; install them with ./dev setup ({error})") from error
    options = webdriver.ChromeOptions()
    profile = tempfile.mkdtemp(prefix="browser-", dir=folder)
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu",
                 "window-size=1200,900", f"user-data-dir={profile}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(service=Service("/usr/bin/chromedriver"), options=options)
    except Exception as error:
        raise AssertionError(f"Chromium could not be started: {error}") from error
    driver.set_page_load_timeout(60)
    try:
        yield Page(driver)
    finally:
        driver.quit()


class Page:
    def __init__(self, driver):
        self.driver = driver

    def open(self, url):
        self.driver.get(url)

    def script(self, text, *arguments):
        return self.driver.execute_script("return " + text, *arguments)

    def text(self, identity):
        return self.script("document.getElementById(arguments[0]).innerText", identity)

    def wait_for(self, condition, what):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"no {what} after 60 s; the page says:\n" + \
                self.script("document.body.innerText")
            time.sleep(0.05)

    def complaints(self):
        """What the browser logged since the last call, warnings included."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def screenshot(self, path, width=1200, dark=False):
        command = self.driver.execute_cdp_cmd
        command("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
        for _ in range(2):  # the height follows from the width
            command("Emulation.setDeviceMetricsOverride", {
                "width": width, "height": self.script("document.body.scrollHeight"),
                "deviceScaleFactor": 1, "mobile": False})
            self.script("new Promise(requestAnimationFrame)")
        self.driver.save_screenshot(path)

    def overflow(self, width):
        """How many pixels the page is wider than a window of that width."""
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
        return self.script("document.documentElement.scrollWidth") - width


NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*"'


def prometheus(text):
    """{name or name{labels}: value}; asserts that the text keeps to the format's grammar."""
    assert text.endswith("\n")
    values, types = {}, {}
    for line in text.split("\n")[:-1]:
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in types and kind in ("counter", "gauge"), line
            types[name] = kind
        elif line.startswith("# HELP "):
            assert re.fullmatch(rf"# HELP {NAME} .+", line), line
        else:
            match = re.fullmatch(rf"({NAME})(\{{{LABEL}(?:,{LABEL})*\}})? (\S+)", line)
            assert match, f"no line of Prometheus' text format: {line}"
            name, labels, value = match.groups()
            assert name in types, f"{name} has no type"
            assert (name.endswith("_total")) == (types[name] == "counter"), line
            assert name + (labels or "") not in values, f"twice: {line}"
            values[name + (labels or "")] = float(value)
    return values
