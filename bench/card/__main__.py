"""`python -m bench.card`."""

import sys

from bench.card.runner import main

sys.exit(main())
