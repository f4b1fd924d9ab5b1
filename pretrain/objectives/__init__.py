"""The losses of a run.

An objective consists of two files with the same name: `configs/NAME.py` defines its configuration and does not
import torch, and `NAME.py` computes it. An objective is a pure function of hidden states and batch, and returns sums,
never means. Only `total_loss` in `base.py` normalises. It divides the sum of each term by its count; sum and count
cover all ranks and micro batches of a step.
"""
