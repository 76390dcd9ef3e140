"""The frontend cases for pytest-benchmark."""

from bench.pytest_cases import tests_of

test_frontend = tests_of("frontend")
