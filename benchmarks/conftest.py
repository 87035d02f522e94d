"""A limit in time that loses no result, and baselines that torch cannot compile."""

import time
from collections.abc import Generator

import pytest
from torch._inductor.exc import InductorError

BEGIN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=float("inf"), help="stop after the benchmark that exceeds it")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Generator[None]:
    """Leave out a baseline that this version of torch cannot compile."""
    try:
        return (yield)
    except InductorError as error:
        if item.callspec.params.get("variant") != "compile":
            raise
        pytest.skip(f"torch.compile fails here: {str(error).splitlines()[0]}")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Stop here if the time is up: pytest-benchmark writes its JSON only when a session ends by itself."""
    if time.monotonic() - BEGIN > item.config.getoption("--seconds"):
        item.session.shouldstop = "out of time: the other benchmarks were not run"
