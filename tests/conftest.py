import math
import os
import signal
from pathlib import Path

# Set before diffusers is imported: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# Set before Triton decorates a kernel: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The tests' models are tiny: threads would only wait for each other, the more so on a busy machine.
torch.set_num_threads(1)
# Triton 3.9 warns unless told; the kernels do not depend on it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# Under nohup or in the background a shell has them ignored, and a run obeys; the tests send them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Start with the files that have slow tests, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory) -> Path:
    """A saved `tiny_sd3_pipeline()`, shared by all tests: only read it."""
    from support.pipelines import tiny_sd3_pipeline

    folder = tmp_path_factory.mktemp("tiny_sd3") / "model"
    tiny_sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def kernel_device(monkeypatch) -> str:
    """Where the Triton kernels run; what they are given to write to is full of NaN."""
    for name in ("empty", "empty_like", "empty_strided"):
        allocate = getattr(torch, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium. Its tests have the xdist_group "browser"; without one they are skipped."""
    pytest.importorskip("selenium", reason="selenium, of the extra test, is not installed")
    from support.browser import NONE, find_browser, open_browser

    if find_browser() is None:
        pytest.skip(NONE)
    browser = open_browser()
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium):
    """Chromium with a new page, whose console must stay empty and which must ask no other host."""
    from support.browser import emulate, requests_of

    emulate(chromium)
    chromium.get("about:blank")
    chromium.get_log("browser")
    requests_of(chromium)
    yield chromium
    errors = [entry["message"] for entry in chromium.get_log("browser")]
    assert [text for text in errors if "404" not in text] == []
    local = ("http://127.0.0.1:", "file:///", "about:", "data:", "blob:http://127.0.0.1:")
    assert [address for address in requests_of(chromium) if not address.startswith(local)] == []
