"""That an entry was decided, so that anybody can check it. Pure.

A keeper signs what it accepts. The votes of a majority of a slot's keepers, under
one ballot, are exactly what Paxos calls chosen, so they prove the decision to
somebody who trusts none of the peers that tell it: the manifest, whose digest is
the network's id, names the keepers of the first slot, and every entry those of
the next. So a log proves itself from its network's id alone; neither one lying
keeper nor an orchestrator that signs entries for itself can lengthen it, and
keepers that are long gone need not be asked about the slots that they decided.
What a proof does not tell is whether more was decided since: see `reader`.

Among the keepers themselves the assumption is Paxos's: they may crash, sleep and come
back, but they forget nothing and do not lie to a proposer. One that hides what it
has accepted, while two orchestrators race for a slot, could split that slot; to
bear that takes 3f+1 keepers and larger quorums (Castro and Liskov 1999).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from p2pnet import keys
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.keys import KeyPair, sha256
from p2pnet.log.entry import parse_entry
from p2pnet.log.history import History, check_entry, keepers_of_next
from p2pnet.v1 import common_pb2, log_pb2

BallotKey = tuple[int, str]


def majority(keepers: Sequence[str]) -> int:
    """How many of a slot's keepers decide."""
    return len(keepers) // 2 + 1


def vote(keeper: KeyPair, ballot: log_pb2.Ballot, signed: common_pb2.Signed) -> bytes:
    """A keeper's signature that it has accepted an entry under a ballot."""
    return keeper.sign(keys.VOTE, _payload(ballot, signed)).signature


def check_vote(
    keeper: str, signature: bytes, ballot: log_pb2.Ballot, signed: common_pb2.Signed
) -> None:
    """Raises ForgedError or MalformedError where it is not that keeper's."""
    _check(keeper, signature, _payload(ballot, signed))


def prove(ballot: log_pb2.Ballot, votes: Mapping[str, bytes]) -> log_pb2.Proof:
    """The proof that votes make."""
    return log_pb2.Proof(ballot=ballot, votes=dict(sorted(votes.items())))


def check_proof(proof: log_pb2.Proof, signed: common_pb2.Signed, keepers: Sequence[str]) -> None:
    """That `keepers`, those of the entry's slot, have decided it.

    Raises:
        ForgedError, MalformedError: they have not, or not by this proof.
    """
    if len(proof.votes) > len(keepers) or not majority(keepers) <= len(proof.votes):
        raise ForgedError(
            f"a log entry has {len(proof.votes)} votes, but {len(keepers)} keepers decide"
        )
    payload = _payload(proof.ballot, signed)
    for keeper in sorted(proof.votes):
        if keeper not in keepers:
            raise ForgedError(f"a log entry has the vote of {keeper[:64]}, which is no keeper")
        _check(keeper, proof.votes[keeper], payload)


def check_decided(
    signed: common_pb2.Signed, proof: log_pb2.Proof, history: History
) -> log_pb2.LogEntry:
    """The next entry of `history`, decided by its keepers.

    Raises:
        MalformedError, ForgedError: it would not count, or is not proved.
    """
    entry = check_entry(signed, history)
    check_proof(proof, signed, keepers_of_next(history, signed))
    return entry


def take_decided(signed: common_pb2.Signed, proof: log_pb2.Proof, history: History) -> None:
    """Adds the next entry to `history`, once; raises as `check_decided`, and then adds nothing."""
    if not history.entries:
        check_entry(signed, history)
    check_proof(proof, signed, keepers_of_next(history, signed))
    history.add(signed)  # it is on peers: what would not count is refused here


def _payload(ballot: log_pb2.Ballot, signed: common_pb2.Signed) -> bytes:
    entry = parse_entry(signed)
    return log_pb2.Vote(
        network_id=entry.network_id,
        slot=entry.slot,
        ballot=ballot,
        digest=sha256(signed.payload),
    ).SerializeToString(deterministic=True)


def _check(keeper: str, signature: bytes, payload: bytes) -> None:
    statement = common_pb2.Signed(
        payload=payload, public_key=keys.public_key_of(keeper), signature=signature
    )
    try:
        keys.verify(keys.VOTE, statement)
    except MalformedError:
        raise ForgedError(f"a vote of {keeper} is no signature") from None
