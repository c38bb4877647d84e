"""
Looking into adapters and sequences: spectra, smoothing, merging, interference, and the commands for them.

May import `benchmark` and what lies below it.
"""
