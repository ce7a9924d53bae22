"""Emotion circuits: heads and neurons that make an emotion, how they are found, tested and moved."""
