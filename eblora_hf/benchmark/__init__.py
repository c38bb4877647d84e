"""
The embedded benchmark: continual learning on handwritten digits. No network, minutes on a CPU.

May import `trainers` and what lies below it.
"""
