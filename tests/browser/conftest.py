"""A headless Chromium for all tests of this folder."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    # Only `make test-browser` installs it, and other test runs collect this folder too.
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "no Chromium here; `make test-browser` installs it"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
