"""The prepared run on a GPU, about eight minutes long: `python -m bench.card`; docs/card.md describes it."""
