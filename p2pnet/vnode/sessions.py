"""The sequences that are fed in parts: what is remembered of each, for how long, how much. Pure.

A session has a cache in every stage that it passes: the keys and values of the tokens so
far, in the stage's attention VNodes. A part has to begin where the cache ends; the first
one begins at 0 and makes the cache anew. Caches are worth nothing but time, so that a host
may let one go whenever it needs the room: whose it was is told so at its next part, and
begins a new session with all of its tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

SESSIONS_MAX = 64
BYTES_MAX = 256 << 20
IDLE_S = 120.0


@dataclass(slots=True)
class Session:
    """One sequence in one stage. `caches` is opaque here, and the compute thread's."""

    caches: Mapping[str, Any] | None = None
    tokens: int = 0
    size_bytes: int = 0
    used_at: float = 0.0


class Sessions:
    """The sessions of one host, the least recently used first."""

    def __init__(self) -> None:
        self._sessions: dict[Hashable, Session] = {}

    def take(self, key: Hashable, position: int, now: float) -> Session | None:
        """The session for a part that begins at a position; None: it has to begin anew.

        It is out of the table until it is put back, so that a part which fails, or comes
        while another is computed, ends the session.
        """
        self.expire(now)
        session = self._sessions.pop(key, None)
        if position == 0:
            return Session(used_at=now)
        return session if session is not None and session.tokens == position else None

    def put(self, key: Hashable, session: Session, now: float) -> None:
        """Keeps a session as the most recently used; others may go for it."""
        self._sessions.pop(key, None)
        session.used_at = now
        self._sessions[key] = session
        while len(self._sessions) > SESSIONS_MAX or self.size_bytes > BYTES_MAX:
            del self._sessions[next(iter(self._sessions))]

    def expire(self, now: float) -> None:
        """Lets go of what nobody has used for a while."""
        while self._sessions:
            key, oldest = next(iter(self._sessions.items()))
            if oldest.used_at + IDLE_S > now:
                return
            del self._sessions[key]

    def deadline(self) -> float | None:
        """When `expire` has something to do."""
        oldest = next(iter(self._sessions.values()), None)
        return None if oldest is None else oldest.used_at + IDLE_S

    @property
    def size_bytes(self) -> int:
        """Of all caches."""
        return sum(session.size_bytes for session in self._sessions.values())

    def __len__(self) -> int:
        return len(self._sessions)
