"""`python -m benchmarks [NAME ...] [-n IMAGES] [--repeat LAPS] [--write]`: what `make bench` runs."""

from __future__ import annotations

import argparse
import shlex
import sys

from benchmarks.table import table
from besiege.core.errors import BadInput


def main() -> int:
    """Print the table; without names, or with --write, docs/benchmarks.md has it too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="only these attacks; docs/benchmarks.md stays as it is"
    )
    parser.add_argument("--write", action="store_true", help="put these attacks into docs/benchmarks.md")
    parser.add_argument("-n", "--images", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3, metavar="LAPS")
    given = parser.parse_args()
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    try:
        print(table(given.names, images=given.images, repeat=given.repeat, command=command, write=given.write), end="")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
