"""Sparse, unbiased distillation targets: draw them, encode them, train on them. Usable alone in any training loop."""
