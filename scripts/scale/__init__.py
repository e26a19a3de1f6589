"""Bytes that ranks really send in a training step, beside what the plan's formulas say.

torchrun --nproc_per_node 4 -m scripts.scale          a table for every layout of so many ranks
"""
