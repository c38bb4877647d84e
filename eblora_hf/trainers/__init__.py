"""ContinualMixin and its parts: what is laid over a `Trainer` so that it learns a sequence of tasks."""
