"""The parts of `clsp_fast.loss`: the checked problem, engines, negative and positive pairs, several ranks."""
