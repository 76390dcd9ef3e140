"""The similarity cases for pytest-benchmark."""

from bench.pytest_cases import tests_of

test_similarity = tests_of("similarity")
