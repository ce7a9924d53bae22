"""Text from tokens as they come: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers put for bytes that do not make a character yet."""


class TextStream:
    """Decodes one row's tokens into pieces whose sum is the text, up to the first stop string.

    before: tokens in front of the first one, which some decoders need for the space that it begins with.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids = list(before)
        self._read, self._known, self._held = 0, decode(self._ids) if before else "", ""
        self.stopped = False
        """Whether a stop string has come: the first to be complete. It and everything after it are left out."""

    def push(self, token: int) -> str:
        """The text that is certain after one more token (often empty)."""
        self._ids.append(token)
        fresh = self._fresh()
        if not fresh or fresh.endswith(BROKEN):
            return ""
        # Tokens are decoded next to their predecessors, since decoders treat the first one differently (spaces).
        self._ids = self._ids[self._read :]
        self._read, self._known = len(self._ids), self._decode(self._ids)
        return self._release(fresh)

    def flush(self) -> str:
        """What was held back, once no token will follow; bytes without a character are dropped."""
        rest = self._release(self._fresh().rstrip(BROKEN))
        rest, self._held = rest + self._held, ""
        return rest

    def _fresh(self) -> str:
        return self._decode(self._ids)[len(self._known) :]

    def _release(self, fresh: str) -> str:
        if self.stopped:
            return ""
        text = self._held + fresh
        # The first to be complete (of two, the longer), so that it does not matter how tokens cut the text.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
