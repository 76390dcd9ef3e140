"""`python -m bench.card`."""

import sys

from bench.card import needs

needs.check(needs.ALWAYS)
from bench.card.runner import main  # noqa: E402

sys.exit(main())
