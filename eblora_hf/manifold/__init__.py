"""
The step: maps of the Stiefel manifold, factors stacked for them, and the constraint on an optimizer.

May import `adapters`.
"""
