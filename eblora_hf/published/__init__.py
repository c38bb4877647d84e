"""The sequence on disk and on the Hub: its index, files, identity of the base model, card and pushes."""
