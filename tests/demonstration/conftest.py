import gc
import warnings

import pytest


@pytest.fixture(autouse=True, scope="module")
def _what_gradio_leaves_open():
    """Gradio leaves sockets and event loops to the garbage collector, which would warn in a later test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
