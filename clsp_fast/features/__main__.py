"""`python -m clsp_fast.features --check-parity`: compares these features with lhotse's and torchaudio's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from clsp_fast import console, parity


@console.command
def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 if the features of a library differ."""
    parser = argparse.ArgumentParser(prog="python -m clsp_fast.features", description=parity.check.__doc__)
    parser.add_argument("--check-parity", action="store_true", required=True)
    parser.parse_args(arguments)
    sys.exit(parity.check())


if __name__ == "__main__":
    main()
