"""Throughput comparisons: `python -m bench.run`. Only results that agree with their reference are timed."""
