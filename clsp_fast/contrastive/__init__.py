"""The parts of `clsp_fast.loss`: argument checks, engines, negative and positive pairs, several ranks."""
