"""Whose fault it is, by type; and what of a group of errors a person is told."""

from __future__ import annotations

import pytest

from p2pnet import errors
from p2pnet.errors import (
    CancelledByUs,
    ForgedError,
    LocalError,
    MalformedError,
    NotFoundError,
    P2PNetError,
    RefusedError,
    RemoteError,
    ResourceError,
    RolledBackError,
    SpecError,
    UnreachableError,
    UsageError,
    VersionError,
    root_of,
)

OURS = (LocalError, ResourceError, CancelledByUs)
THEIRS = (
    MalformedError,
    ForgedError,
    RefusedError,
    VersionError,
    RolledBackError,
    UnreachableError,
)
USERS = (SpecError, NotFoundError)


def test_every_error_is_somebodys() -> None:
    for kind in (*OURS, *THEIRS, *USERS):
        assert issubclass(kind, P2PNetError)
        assert issubclass(kind, LocalError) == (kind in OURS)
        assert issubclass(kind, RemoteError) == (kind in THEIRS)
        assert issubclass(kind, UsageError) == (kind in USERS)
    defined = [it for it in vars(errors).values() if isinstance(it, type)]
    known = (P2PNetError, RemoteError, UsageError, *OURS, *THEIRS, *USERS)
    assert sorted(map(str, defined)) == sorted(map(str, known))


def test_a_refusal_says_what_the_peer_knows() -> None:
    plain = RefusedError("no")
    assert (str(plain), plain.code, plain.epoch, plain.host) == ("no", 0, 0, "")
    full = VersionError("too old", code=3, epoch=7, host="peer")
    assert (str(full), full.code, full.epoch, full.host) == ("too old", 3, 7, "peer")


def test_a_network_that_went_back_says_what_to_feed_again() -> None:
    assert RolledBackError("it went back", step=7).step == 7


def test_of_a_group_the_root_is_what_a_person_can_act_on() -> None:
    ours = ResourceError("the disk is full")
    assert root_of(ours) is ours
    bug = ValueError("a bug")
    assert root_of(bug) is bug
    group = BaseExceptionGroup("nursery", [KeyboardInterrupt(), bug, ExceptionGroup("in", [ours])])
    assert root_of(group) is ours
    assert root_of(ExceptionGroup("only bugs", [ExceptionGroup("in", [bug]), KeyError()])) is bug


@pytest.mark.parametrize("depth", [1, 50])
def test_groups_in_groups(depth: int) -> None:
    error: Exception = UsageError("give --data-dir")
    root = error
    for _ in range(depth):
        error = ExceptionGroup("another", [error])
    assert root_of(error) is root
