"""Caller sessions: how a caller proves its peer id on a channel (DESIGN D8). Pure.

The server is known already, by its pinned certificate. The caller asks for a
challenge, signs it together with the digest of that certificate (so that a
proof made for one server is worth nothing at another), and carries the token
that it gets. `now` is in seconds; nonces and tokens are random bytes that the
shell passes in.
"""

from __future__ import annotations

from collections import OrderedDict

from google.protobuf.message import DecodeError

from p2pnet.errors import ForgedError, MalformedError, RefusedError, VersionError
from p2pnet.keys import SESSION, KeyPair, verify
from p2pnet.v1 import common_pb2, session_pb2

PROTOCOL_VERSIONS = (1, 1)  # the lowest and the highest that this build speaks

SESSION_METADATA = "p2pnet-session-bin"  # where a call carries its token
SECRET_BYTES = 32  # of a nonce and of a token
NONCE_LIFE_S = 10.0
NONCES_MAX = 4096
SESSION_LIFE_S = 3600.0
SESSIONS_MAX = 4096
SESSIONS_PER_PEER_MAX = 16


def version_range(versions: tuple[int, int] = PROTOCOL_VERSIONS) -> common_pb2.VersionRange:
    """The protocol's message for a range of versions, both ends included."""
    return common_pb2.VersionRange(min=versions[0], max=versions[1])


def choose_version(ours: tuple[int, int], theirs: common_pb2.VersionRange) -> int:
    """The highest version that both sides speak.

    Raises:
        MalformedError: `theirs` is no range.
        VersionError: there is none; the text says both ranges.
    """
    if not 0 < theirs.min <= theirs.max:
        raise MalformedError(f"protocol versions {theirs.min} to {theirs.max} are no range")
    version = min(ours[1], theirs.max)
    if version < max(ours[0], theirs.min):
        # Either side may read this, so it names neither "us" nor "them".
        spoken = sorted((ours, (theirs.min, theirs.max)))
        raise VersionError(
            f"no protocol version in common: one side speaks {_range(*spoken[0])}, the other "
            f"{_range(*spoken[1])}; the one with the lower numbers has to be updated"
        )
    return version


def make_proof(
    keypair: KeyPair,
    challenge: session_pb2.ChallengeReply,
    certificate_digest: bytes,
    versions: tuple[int, int] = PROTOCOL_VERSIONS,
) -> session_pb2.OpenRequest:
    """The caller's answer to a challenge by the server with that certificate.

    Raises:
        MalformedError: a nonce of the wrong length, or no version range.
        VersionError: the server speaks none of our versions.
    """
    choose_version(versions, challenge.versions)
    if len(challenge.nonce) != SECRET_BYTES:
        raise MalformedError(f"a challenge has {SECRET_BYTES} bytes, not {len(challenge.nonce)}")
    proof = session_pb2.SessionProof(
        nonce=challenge.nonce,
        certificate_digest=certificate_digest,
        versions=version_range(versions),
    )
    return session_pb2.OpenRequest(proof=keypair.sign(SESSION, proof.SerializeToString()))


class SessionTable:
    """The server's side: challenges that wait for an answer, and open sessions.

    Both are bounded. The oldest challenge and the session unused for longest
    give way; a caller that lost its session opens another.
    """

    def __init__(
        self,
        certificate_digest: bytes,
        versions: tuple[int, int] = PROTOCOL_VERSIONS,
        *,
        nonces_max: int = NONCES_MAX,
        sessions_max: int = SESSIONS_MAX,
        sessions_per_peer_max: int = SESSIONS_PER_PEER_MAX,
    ) -> None:
        self._certificate_digest = certificate_digest
        self._versions = versions
        self._nonces_max = nonces_max
        self._sessions_max = sessions_max
        self._sessions_per_peer_max = sessions_per_peer_max
        self._nonces: OrderedDict[bytes, float] = OrderedDict()  # nonce -> until when
        self._sessions: OrderedDict[bytes, tuple[str, float]] = OrderedDict()  # by last use
        self._tokens: dict[str, list[bytes]] = {}  # a peer's tokens, oldest first

    def challenge(
        self, request: session_pb2.ChallengeRequest, now: float, nonce: bytes
    ) -> session_pb2.ChallengeReply:
        """Issues `nonce`, good for one `open` within NONCE_LIFE_S.

        Raises:
            MalformedError: the caller's versions are no range.
            VersionError: none in common, said before the caller signs anything.
        """
        choose_version(self._versions, request.versions)
        while len(self._nonces) >= self._nonces_max:
            self._nonces.popitem(last=False)
        self._nonces[nonce] = now + NONCE_LIFE_S
        return session_pb2.ChallengeReply(nonce=nonce, versions=version_range(self._versions))

    def open(
        self, request: session_pb2.OpenRequest, now: float, token: bytes
    ) -> session_pb2.OpenReply:
        """Checks a proof; from now on `token` stands for its author.

        Raises:
            MalformedError: no proof in it.
            RefusedError: the challenge is unknown, used or too old.
            ForgedError: the signature does not hold, or is for another server.
            VersionError: none in common.
        """
        try:
            proof = session_pb2.SessionProof.FromString(request.proof.payload)
        except DecodeError:
            raise MalformedError("a session proof that is no message") from None
        if self._nonces.pop(proof.nonce, now) <= now:
            raise RefusedError(
                f"the challenge is unknown, used, or older than {NONCE_LIFE_S:.0f} s"
            )
        peer_id = verify(SESSION, request.proof)
        if proof.certificate_digest != self._certificate_digest:
            raise ForgedError(f"{peer_id} sent a proof made for another server")
        version = choose_version(self._versions, proof.versions)
        self._remember(token, peer_id, now)
        return session_pb2.OpenReply(token=token, version=version, lifetime_s=int(SESSION_LIFE_S))

    def caller(self, token: bytes, now: float) -> str | None:
        """Whose session it is; None where there is none, or no longer."""
        peer_id, until = self._sessions.get(token, ("", now))
        if until > now:
            self._sessions.move_to_end(token)
            return peer_id
        if peer_id:
            self._drop(token)
        return None

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        assert len(self._nonces) <= self._nonces_max
        assert len(self._sessions) <= self._sessions_max
        held = [(token, peer_id) for peer_id, tokens in self._tokens.items() for token in tokens]
        assert sorted(held) == sorted((t, p) for t, (p, _) in self._sessions.items())
        for tokens in self._tokens.values():
            assert 0 < len(tokens) <= self._sessions_per_peer_max

    def _remember(self, token: bytes, peer_id: str, now: float) -> None:
        # One peer that opens session after session costs only its own.
        mine = self._tokens.get(peer_id, [])
        if len(mine) >= self._sessions_per_peer_max:
            self._drop(mine[0])
        elif len(self._sessions) >= self._sessions_max:
            self._drop(next(iter(self._sessions)))
        self._sessions[token] = (peer_id, now + SESSION_LIFE_S)
        self._tokens.setdefault(peer_id, []).append(token)

    def _drop(self, token: bytes) -> None:
        peer_id, _ = self._sessions.pop(token)
        tokens = self._tokens[peer_id]
        tokens.remove(token)
        if not tokens:
            del self._tokens[peer_id]


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
