"""Held-out scores and what they say about learning and forgetting."""
