"""
What is laid over a `Trainer` so that it learns a sequence of tasks: `ContinualMixin` and its parts.

May import `methods` and what lies below it. Only mixins override what a `Trainer` calls; the rest are objects and
functions with plain arguments.
"""
