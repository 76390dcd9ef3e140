"""The loss cases for pytest-benchmark."""

from bench.pytest_cases import tests_of

test_loss = tests_of("loss")
