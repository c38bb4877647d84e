"""
What is remembered of a task: snapshots of its gradients, summed, and the bases that hold their energy.

May import `manifold` and `adapters`.
"""
