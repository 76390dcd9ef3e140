"""The loss behind `clsp_fast.loss`: embeddings of all ranks, negatives and positives."""
