"""Counters in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter

OUTCOMES = ("ok", "cancelled", "rejected", "invalid", "unauthorized", "error")
HELP = {
    "emocircuits_requests_total": ("counter", "Requests by how they ended."),
    "emocircuits_tokens_total": ("counter", "Tokens read as prompts and tokens generated."),
    "emocircuits_request_seconds": ("summary", "Seconds from submission to the last token of answered requests."),
    "emocircuits_queue_length": ("gauge", "Requests that wait for a place in the batch."),
    "emocircuits_batch_size": ("gauge", "Rows that are being generated."),
}


class Metrics:
    """What the engine and the server count; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self.tokens: Counter[str] = Counter({"prompt": 0, "generated": 0})
        self.seconds, self.answered = 0.0, 0

    def outcome(self, name: str) -> None:
        """One request ended as one of OUTCOMES."""
        with self._lock:
            self.requests[name] += 1

    def took(self, seconds: float) -> None:
        """One request was answered after this time."""
        with self._lock:
            self.seconds, self.answered = self.seconds + seconds, self.answered + 1

    def add_tokens(self, kind: str, count: int) -> None:
        """kind: "prompt" or "generated"."""
        with self._lock:
            self.tokens[kind] += count

    def text(self, queue_length: int, batch_size: int) -> str:
        """All of it, as /metrics serves it."""
        with self._lock:
            lines = {
                "emocircuits_requests_total": [(f'{{outcome="{k}"}}', v) for k, v in self.requests.items()],
                "emocircuits_tokens_total": [(f'{{kind="{k}"}}', v) for k, v in self.tokens.items()],
                "emocircuits_request_seconds": [("_sum", round(self.seconds, 6)), ("_count", self.answered)],
                "emocircuits_queue_length": [("", queue_length)],
                "emocircuits_batch_size": [("", batch_size)],
            }
        out: list[str] = []
        for name, values in lines.items():
            kind, text = HELP[name]
            out += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            out += [f"{name}{label} {value}" for label, value in values]
        return "\n".join(out) + "\n"
