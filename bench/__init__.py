"""Throughput comparisons: `python -m bench.run`. Nothing is timed before it agrees with its reference."""
