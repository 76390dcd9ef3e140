"""How good a model is: figures, zero-shot tasks, readers of corpora and ratings, reports."""
