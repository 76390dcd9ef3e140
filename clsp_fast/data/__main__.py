"""`python -m clsp_fast.data validate MANIFEST`: finds what training could not read."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from clsp_fast import console
from clsp_fast.data.validation import validate


@console.command
def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m clsp_fast.data validate MANIFEST [--decode]`."""
    import tyro

    try:
        count = tyro.extras.subcommand_cli_from_dict(
            {"validate": validate},
            args=arguments,
            prog="python -m clsp_fast.data",
            config=(tyro.conf.PositionalRequiredArgs,),
        )
    except (OSError, ValueError) as error:
        sys.exit(f"clsp_fast.data: {error}")
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
