"""The losses of a run.

An objective is two files of one name: `configs/NAME.py` has its configuration, which imports without torch, and `NAME.py` computes it. An objective
is a pure function of hidden states and batch, and returns sums, never means. Only `total_loss` in `base.py` normalises: it divides each
term's sum over all ranks and micro batches of a step by its count over the same.
"""
