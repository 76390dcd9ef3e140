"""The networks behind `clsp_fast.model`: the speech tower, the text tower and their layers."""
