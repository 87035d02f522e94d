"""A limit in time that loses no result: pytest-benchmark writes its JSON only when a session ends by itself."""

import time

import pytest

BEGIN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=float("inf"), help="stop after the benchmark that exceeds it")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if time.monotonic() - BEGIN > item.config.getoption("--seconds"):
        item.session.shouldstop = "out of time: the other benchmarks were not run"
