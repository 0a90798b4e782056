"""Writes docs/flags.md from the table of flags; --check only compares.

python tools/write_flags_doc.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_fipo.flags.render import markdown
from megatron_fipo.flags.table import all_options

TARGET = Path(__file__).resolve().parent.parent / "docs" / "flags.md"


def main() -> int:
    """Write or compare the reference; the exit status is 1 when --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where they differ")
    options = parser.parse_args()
    text = markdown(all_options())
    if not options.check:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET} is out of date: run python tools/write_flags_doc.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
