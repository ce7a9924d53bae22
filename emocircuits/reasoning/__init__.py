"""Reasoning step by step: which sentence of a model's reasoning carries its answer."""
