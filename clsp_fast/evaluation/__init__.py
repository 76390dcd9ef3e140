"""Figures of a model on a set of clips, and the tasks that are evaluated."""
