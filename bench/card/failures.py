"""A plugin of pytest that prints why a test failed at once: `pytest -p bench.card.failures`.

pytest itself prints this at its end, which a run with a time limit may not reach.
"""

from __future__ import annotations

import pytest
from _pytest._io import TerminalWriter


class Failures:
    """Prints each failure when it is reported."""

    def __init__(self, writer: TerminalWriter) -> None:
        self.writer = writer

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Prints the reason if a test, or what prepares it, failed."""
        if report.failed:
            self.writer.line(f"\n{report.nodeid} failed:\n{report.longreprtext}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Adds the plugin where reports are printed: not in a worker of pytest-xdist, which has no terminal."""
    if config.pluginmanager.hasplugin("terminalreporter"):
        config.pluginmanager.register(Failures(config.get_terminal_writer()))
