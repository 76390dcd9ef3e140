"""The message for an interpreter that does not work with the installed numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton


def test_the_interpreter_works_or_the_tests_say_what_to_install() -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted on a card")
    import interpreter

    assert interpreter.problem() == ""
    assert interpreter.count(3) == 3

    def refuse(steps: int) -> int:
        return int(np.zeros((1, 2)))  # a TypeError, as numpy 2.4 raises for arrays of one element

    message = interpreter.problem(refuse)
    assert message.startswith(
        f"triton {triton.__version__} cannot interpret kernels with numpy {np.__version__}"
    )
    assert "Install numpy<2.4 or a later triton" in message
