"""What is remembered of a task: its gradients, summed over a snapshot, and the bases that hold their energy."""
