"""
The sequence as others get it, on disk and on the Hub: index, files, identity of the base model, card, pushes.

May import `memory`, `manifold` and `adapters`.
"""
