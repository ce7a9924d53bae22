"""Sparse autoencoders on reasoning steps: the room for step-level sets, training and feature steering."""
