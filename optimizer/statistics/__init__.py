"""Bounds for the gate: one file per kind of score, numbers in, numbers out.

    paired.py     right or wrong per item, two models: exact unconditional test and its inversion
    clusters.py   what items of one document or passage do to a variance, and resampling whole groups
    ratio.py      summed loss over summed tokens (perplexity, KL)
    rate.py       share of positions that changed (flips)
    bca.py        a score that is no mean of its items, whatever it is
    macro_f1.py   one of them: F1 over classes
    spearman.py   another: the order of similarities
    records.py    any other, of which nothing is known but its value
    sequential.py levels of several looks at a growing sample
    power.py      how likely a gate is to decide, looks included, and with how many items

A loss is positive where the candidate is worse. Every bound is one-sided at the level it is given.
"""
