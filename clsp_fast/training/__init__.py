"""The parts of a training run, which `clsp_fast.train` puts together."""
