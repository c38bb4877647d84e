"""
The embedded benchmark: continual learning on handwritten digits that ship with scikit-learn. No network, minutes on
CPU.
"""
