"""Every error that p2pnet raises on purpose.

    P2PNetError
    ├── UsageError            what the user asked for cannot be: says what to do next
    │   ├── SpecError         a network spec that cannot work
    │   └── NotFoundError     no such network, VNode or peer
    ├── LocalError            this node did something wrong or cannot go on
    │   ├── ResourceError     memory, disk, a port, a lock
    │   └── CancelledByUs     the node is shutting down
    └── RemoteError           a peer did something wrong, or did not do it in time
        ├── MalformedError    bytes that no honest peer sends
        ├── ForgedError       a signature, digest or grant that does not hold
        ├── RefusedError      the peer said no, and why
        │   └── VersionError  the peer speaks none of our protocol versions
        ├── RolledBackError   committed states are lost: a network went back
        └── UnreachableError  no connection, no answer, or not in time

"My bug" and "your bug" are different types (as in h11): a handler that meets a
RemoteError counts it against the peer and goes on; a LocalError is ours.
"""

from __future__ import annotations


class P2PNetError(Exception):
    """The root. `str(error)` is one sentence for people."""


class UsageError(P2PNetError):
    """The user asked for something that cannot be."""


class SpecError(UsageError):
    """A network spec that cannot work; names the node and what was expected."""


class NotFoundError(UsageError):
    """No such network, VNode or peer."""


class LocalError(P2PNetError):
    """This node did something wrong or cannot go on."""


class ResourceError(LocalError):
    """Something is used up or taken: memory, disk, a port, a data dir."""


class CancelledByUs(LocalError):
    """The node is shutting down."""


class RemoteError(P2PNetError):
    """A peer did something wrong, or did not do it in time."""


class MalformedError(RemoteError):
    """Bytes that no honest peer sends."""


class ForgedError(RemoteError):
    """A signature, digest or grant that does not hold."""


class RefusedError(RemoteError):
    """The peer said no.

    `code` is a `RefusalCode` value of the protocol (0 where there is none);
    `epoch` and `host` are what the peer said it knows, or 0 and "".
    """

    def __init__(self, detail: str, *, code: int = 0, epoch: int = 0, host: str = "") -> None:
        super().__init__(detail)
        self.code = code
        self.epoch = epoch
        self.host = host


class VersionError(RefusedError):
    """The peer speaks none of our protocol versions."""


class RolledBackError(RemoteError):
    """A network went back behind a commit, whose states are lost.

    `step` is the first one that has to be fed again.
    """

    def __init__(self, detail: str, *, step: int) -> None:
        super().__init__(detail)
        self.step = step


class UnreachableError(RemoteError):
    """No connection, no answer, or not in time."""


def root_of(error: BaseException) -> BaseException:
    """Of a group of errors the one that a person can do something about: ours before others."""
    if isinstance(error, BaseExceptionGroup):
        ours = error.subgroup(P2PNetError)
        error = error if ours is None else ours
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
