"""Looking at trained updates."""
