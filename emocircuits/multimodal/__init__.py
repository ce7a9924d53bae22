"""Multimodal models: where each modality's tokens are, how much each drives the answer, and conflict sets."""

from .spans import ModalitySpans, placeholders

__all__ = ["ModalitySpans", "placeholders"]
