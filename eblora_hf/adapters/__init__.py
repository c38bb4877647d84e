"""
LoRA on a model: where it is, its factors, its spectra, and the exact sums of several tasks.

Imports nothing of the package but `config`, `metrics` and `version`: every other wing stands on this one.
"""
