"""
What a continual-learning method decides: how a task starts, what constrains its steps, what is remembered of it.

May import `published` and what lies below it, but needs none of a `Trainer`.
"""
