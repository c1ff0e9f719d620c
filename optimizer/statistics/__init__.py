"""Bounds for the gate: one file per kind of score, numbers in, numbers out.

    paired.py     right or wrong per item, two models: exact unconditional test and its inversion
    clusters.py   what items of one document or passage do to a variance, and resampling whole groups
    ratio.py      summed loss over summed tokens (perplexity, KL)
    rate.py       share of positions that changed (flips)
    macro_f1.py   a score that is no mean of its items

A loss is positive where the candidate is worse. Every bound is one-sided at the level it is given.
"""
