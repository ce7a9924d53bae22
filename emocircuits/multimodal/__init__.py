"""Multimodal models: how much each modality drives the answer, and conflict sets."""
