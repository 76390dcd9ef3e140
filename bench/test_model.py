"""The model cases for pytest-benchmark."""

from bench.pytest_cases import tests_of

test_model = tests_of("model")
