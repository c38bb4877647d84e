"""The parts of `scripts/benchmark.py`: each measures one cost, as ratios inside one run."""
