"""The table counts what was injected, by kind, and says what did not end as wanted."""

from __future__ import annotations

from pathlib import Path

from fault_table import FaultTable


def make_table() -> FaultTable:
    times = iter([0.0, 10.0, 11.5, 13.0, 20.0, 24.0])
    table = FaultTable(clock=lambda: next(times))
    table.begin("one")
    table.record("SIGKILL", "before the save", "resumed bitwise", True)
    table.record("bit flip", "byte 7", "found", True)
    table.begin("two")
    table.record("SIGKILL", "after the save", "other weights", False)
    return table


def test_faults_are_counted_by_kind() -> None:
    table = make_table()
    assert table.rows() == [("SIGKILL", 2, 1, 5.5), ("bit flip", 1, 1, 1.5)]
    assert table.total() == ("all", 3, 2, 7.0)


def test_the_table_names_what_did_not_end_as_wanted(tmp_path: Path) -> None:
    table = make_table()
    assert table.lines() == [
        "fault     injected  as wanted  seconds",
        "SIGKILL          2          1      5.5",
        "bit flip         1          1      1.5",
        "all              3          2      7.0",
        "not as wanted: SIGKILL: after the save: other weights (two)",
    ]
    table.write_markdown(tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text().splitlines() == [
        "| fault | injected | as wanted | seconds |",
        "|---|---:|---:|---:|",
        "| SIGKILL | 2 | 1 | 6 |",
        "| bit flip | 1 | 1 | 2 |",
        "| **all** | **3** | **2** | **7** |",
    ]


def test_the_table_takes_its_place_in_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Faults\n<!-- faults -->\nold\n<!-- end of faults -->\nMore.\n")
    make_table().write_markdown(page)
    lines = page.read_text().splitlines()
    assert lines[:3] == ["# Faults", "<!-- faults -->", "| fault | injected | as wanted | seconds |"]
    assert lines[-3:] == ["| **all** | **3** | **2** | **7** |", "<!-- end of faults -->", "More."]
    assert "old" not in lines
