"""The frame of the fault tests: the count of faults, what only a full run does, and a look for what was left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_table import FaultTable
from fork_server import ForkServer
from left_behind import nothing_left_behind
from runs import Runs, fork_server, write_inputs

TABLE = pytest.StashKey[FaultTable]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--all-faults", action="store_true", help="run the tests marked full_only too")
    group.addoption("--fault-table", type=Path, metavar="FILE", help="write the table of faults as Markdown")
    group.addoption("--least-faults", type=int, default=0, metavar="N", help="fail if fewer faults were injected")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full_only: a fault test, or a case of one, that only --all-faults runs")
    config.stash[TABLE] = FaultTable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all-faults", default=False):
        return
    for item in items:
        if item.get_closest_marker("full_only"):
            item.add_marker(pytest.mark.skip(reason="only --all-faults runs this"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    item.config.stash[TABLE].begin(item.nodeid)


@pytest.fixture(scope="session")
def faults(pytestconfig: pytest.Config) -> FaultTable:
    """Where every injected fault is recorded: `faults.record(kind, name, outcome, ok)`."""
    return pytestconfig.stash[TABLE]


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """What runs are forked by; started by the first test that wants it."""
    with fork_server() as started:
        yield started


@pytest.fixture(scope="session")
def runs(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of one rank on recorded rollouts."""
    return Runs(server, write_inputs(tmp_path_factory.mktemp("inputs")))


@pytest.fixture(scope="session")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of `runs` that nothing disturbed."""
    directory = tmp_path_factory.mktemp("undisturbed")
    ended = runs.run(directory)
    assert ended.statuses == [0], ended.stderr
    return directory


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """No process that a fault test starts, and no shared memory, outlives it."""
    with nothing_left_behind(request.node.name):
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and _complaints(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash[TABLE]
    if table.faults:
        terminalreporter.section("injected faults")
        for line in table.lines():
            terminalreporter.write_line(line)
    for complaint in _complaints(config):
        terminalreporter.write_line(complaint, red=True)
    path = config.getoption("--fault-table", default=None)
    if path is not None:
        table.write_markdown(path)


def _complaints(config: pytest.Config) -> list[str]:
    table = config.stash[TABLE]
    least = config.getoption("--least-faults", default=0)
    found = [f"{len(table.failed)} faults did not end as wanted"] if table.failed else []
    if len(table.faults) < least:
        found.append(f"{len(table.faults)} faults were injected, but at least {least} are wanted (--least-faults)")
    return found
