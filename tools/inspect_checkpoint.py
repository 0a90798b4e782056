"""Says what a directory of weights is, what it holds and whether it is whole: a Hugging Face model, a checkpoint of a
training run (its --save directory or one step in it), or a Megatron-LM torch_dist checkpoint.

python tools/inspect_checkpoint.py DIR [--verify] [--json] [--diff OTHER [--hf-checkpoint DIR]]

The exit status is 1 where something is missing, damaged or different.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_fipo.tool_program import ended, progress

if TYPE_CHECKING:
    from megatron_fipo.actor.inspection import Inspection

FOUND_WRONG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Look, and print."""
    options = _parser().parse_args(arguments)
    return ended(lambda: compare(options) if options.diff else look(options))


def look(options: argparse.Namespace) -> int:
    """Print what the directory is; the exit status."""
    from megatron_fipo.actor.inspection import inspect

    with progress("reading") as advance:
        found = inspect(options.directory, verify=options.verify, advance=advance)
    if options.json:
        print(json.dumps(asdict(found), indent=2, default=str))
    else:
        _print(found, options.verify)
    return FOUND_WRONG if found.problems else 0


def compare(options: argparse.Namespace) -> int:
    """Print in what the models of two directories differ; the exit status."""
    from megatron_fipo.actor.model_difference import model_difference

    with progress("comparing") as advance:
        found = model_difference(options.directory, options.diff, options.hf_checkpoint, advance=advance)
    if options.json:
        values = {name: delta if math.isfinite(delta) else str(delta) for name, delta in found.values.items()}
        print(json.dumps(asdict(found) | {"values": values}, indent=2))
        return FOUND_WRONG if found.differs else 0
    for name, text in found.shapes.items():
        print(f"{name}: {text}")
    for name, delta in found.values.items():
        print(f"{name}: max |delta| {delta:g}")
    print(
        f"{found.num_compared} tensors compared: {len(found.shapes)} differ in name, shape or dtype, "
        f"{len(found.values)} in values"
    )
    return FOUND_WRONG if found.differs else 0


def _print(found: Inspection, verify: bool) -> None:
    print(f"{found.directory}: {found.kind}")
    if found.iteration is not None:
        print(f"  iteration        {found.iteration}")
    if found.others:
        print(f"  beside it        {', '.join(found.others)}")
    dtypes = ", ".join(sorted({tensor["dtype"] for tensor in found.tensors.values()}))
    print(f"  model            {found.num_parameters:,} parameters in {len(found.tensors)} tensors, {dtypes}")
    print(f"  size             {_size(found.total_bytes)} in all, {_size(found.model_bytes)} of it the model")
    for name, value in found.holds.items():
        print(f"  {name:16} {_told(value)}")
    for name, tensor in found.tensors.items():
        print(f"    {name}  {tensor['shape']} {tensor['dtype']}")
    if found.verified:
        print(f"  verified         {found.verified}")
    elif not verify:
        print("  not verified     --verify reads every byte")
    for problem in found.problems:
        print(f"  PROBLEM          {problem}")


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_told(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 10**8 else f"{num_bytes / 1e6:.2f} MB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--verify", action="store_true", help="compare hashes with the manifest, or read every tensor")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--diff", metavar="OTHER", help="compare the models of two directories: names, shapes, values")
    parser.add_argument(
        "--hf-checkpoint",
        metavar="DIR",
        help="with --diff, where neither is a Hugging Face model: compare under its names",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
