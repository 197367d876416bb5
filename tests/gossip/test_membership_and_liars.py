"""What a single core makes of forgeries, strangers, other versions and its own limits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from gossip_world import World, keypair
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnet.core import Tick
from p2pnet.errors import ForgedError, MalformedError, RemoteError
from p2pnet.gossip.events import (
    Answered,
    Effect,
    GossipConfig,
    MemberChanged,
    Misbehaved,
    PeerConnected,
    PeerDisconnected,
    PeerRefused,
    Reply,
    Request,
    Send,
    State,
    Synced,
    SyncWith,
    Unanswered,
)
from p2pnet.gossip.membership import Membership
from p2pnet.gossip.messages import Kind, Kinds, Message, read_message, write_message
from p2pnet.gossip.statements import (
    OpenAccusation,
    OpenAdvert,
    Versions,
    build_accusation,
    build_advert,
    open_advert,
    raw_of,
)
from p2pnet.gossip.table import Table

NOW = 50.0
CONFIG = GossipConfig(observers=4, quorum=2)
LATER = NOW + 2.0  # the time to refute is over: 0.4 s * log2(25) = 1.9 s at most, here
KIND_PROBE = Kinds.KIND_PROBE


def core(number: int = 1, config: GossipConfig | None = None, **options: object) -> Membership:
    return Membership(
        keypair(number),
        incarnation=100,
        now=NOW,
        rng=random.Random(number),
        config=config or CONFIG,
        **options,  # type: ignore[arg-type]
    )


def advert(number: int, incarnation: int = 100, **options: object) -> OpenAdvert:
    values: dict[str, object] = {"incarnation": incarnation, "sequence": 0, **options}
    return build_advert(keypair(number), **values)  # type: ignore[arg-type]


def accusation(accuser: int, subject: int, incarnation: int = 100) -> OpenAccusation:
    return build_accusation(
        keypair(accuser), keypair(subject).peer_id, incarnation=incarnation, failed=True
    )


def message(
    *statements: OpenAdvert | OpenAccusation, kind: Kind = Kinds.KIND_NEWS, low: int = 1
) -> bytes:
    return write_message(
        kind,
        Versions(low, low),
        adverts=[s.raw for s in statements if isinstance(s, OpenAdvert)],
        accusations=[s.raw for s in statements if isinstance(s, OpenAccusation)],
    )


def tell(node: Membership, *statements: OpenAdvert | OpenAccusation) -> list[Effect]:
    effects = node.handle(Request(keypair(2).peer_id, message(*statements)), NOW)
    node.check()
    return list(effects)


def reply(effects: list[Effect]) -> Message:
    return next(read_message(e.message) for e in effects if isinstance(e, Reply))


def state(node: Membership, number: int) -> State | None:
    member = node.member(keypair(number).peer_id)
    return member.state if member else None


def acquainted(count: int) -> Membership:
    node = core()
    tell(node, *(advert(number) for number in range(2, count + 1)))
    return node


def nearest(node: Membership, count: int, subject: int) -> list[int]:
    """The members in the order in which they follow `subject` on the ring."""
    table = Table(keypair(1).peer_id, GossipConfig(observers=1000), lambda p, a: p)
    for number in range(1, count + 1):
        table.take_advert(advert(number), NOW)
    numbers = {keypair(number).peer_id: number for number in range(1, count + 1)}
    return [numbers[p] for p in table.observers(keypair(subject).peer_id)]


def pass_time(node: Membership) -> list[Effect]:
    """Until the time to refute is over."""
    effects = list(node.handle(Tick(), LATER))
    node.check(full=True)
    return effects


def convict(node: Membership, subject: int, *accusers: int) -> None:
    tell(node, *(accusation(accuser, subject) for accuser in accusers))
    pass_time(node)


def test_two_observers_make_a_failure_and_one_does_not() -> None:
    node = acquainted(6)
    tell(node, accusation(3, 5))
    assert state(node, 5) is State.SUSPECT
    tell(node, accusation(3, 5))  # saying it twice does not help
    pass_time(node)
    assert state(node, 5) is State.SUSPECT
    node.handle(Request(keypair(2).peer_id, message(accusation(4, 5))), LATER)
    assert state(node, 5) is State.SUSPECT
    node.handle(Tick(), LATER + 2)
    assert state(node, 5) is State.FAILED


def test_the_convicted_may_refute_while_the_time_for_it_lasts() -> None:
    node = acquainted(6)
    tell(node, accusation(3, 5), accusation(4, 5))
    due = node.deadline()
    assert due is not None
    assert due < LATER
    tell(node, advert(5, 101))
    assert MemberChanged not in [type(effect) for effect in pass_time(node)]
    assert state(node, 5) is State.ALIVE


def test_whose_connection_to_us_broke_is_failed_without_waiting() -> None:
    node = acquainted(6)
    subject = keypair(5).peer_id
    node.handle(PeerConnected(subject, ""), NOW)
    tell(node, accusation(3, 5), accusation(4, 5))
    assert state(node, 5) is State.SUSPECT
    effects = node.handle(PeerDisconnected(subject), NOW)
    assert [e.new for e in effects if isinstance(e, MemberChanged)] == [State.FAILED]


def test_a_connection_that_came_back_or_broke_long_ago_says_nothing() -> None:
    for connected_again in (True, False):
        node = acquainted(6)
        subject = keypair(5).peer_id
        node.handle(PeerDisconnected(subject), NOW)
        now = NOW
        if connected_again:
            node.handle(PeerConnected(subject, ""), NOW)
        else:
            now = NOW + CONFIG.broken_s + 1
            node.handle(Tick(), node.deadline() or now)
        for accuser in (3, 4):
            news = Request(keypair(2).peer_id, message(accusation(accuser, 5)))
            node.handle(news, now)
        assert state(node, 5) is State.SUSPECT


def inquiry(node: Membership, subject: int) -> tuple[Send, float]:
    """The question that a node asks a convict before its time is over, and when."""
    for _ in range(20):
        now = node.deadline()
        for effect in node.handle(Tick(), now):
            probe = isinstance(effect, Send) and read_message(effect.message).kind == KIND_PROBE
            if probe and isinstance(effect, Send) and effect.peer_id == keypair(subject).peer_id:
                return effect, now
    raise AssertionError("a convict was not asked")


def stranger_to(count: int) -> int:
    """A member that node 1 does not watch."""
    node = acquainted(count)
    return next(n for n in range(5, count) if 1 not in nearest(node, count, n)[: CONFIG.observers])


def test_a_convict_is_asked_and_who_refuses_is_gone() -> None:
    node = acquainted(24)
    subject = stranger_to(24)
    near = [n for n in nearest(node, 24, subject) if n != 1]
    tell(node, accusation(near[0], subject), accusation(near[1], subject))
    send, now = inquiry(node, subject)
    assert len(read_message(send.message).accusations) == 2
    node.handle(Unanswered(send.rpc_id), now + 0.01)
    assert state(node, subject) is State.FAILED


def test_a_convict_that_answers_has_more_time_and_who_is_silent_has_not() -> None:
    for answers in (True, False):
        node = acquainted(24)
        subject = stranger_to(24)
        near = [n for n in nearest(node, 24, subject) if n != 1]
        tell(node, accusation(near[0], subject), accusation(near[1], subject))
        send, now = inquiry(node, subject)
        if answers:
            node.handle(Answered(send.rpc_id, message(kind=Kinds.KIND_PROBE_ACK)), now + 0.1)
        while node.deadline() < LATER + 0.3:
            node.handle(Tick(), node.deadline())
        assert state(node, subject) is (State.SUSPECT if answers else State.FAILED)


def test_who_was_refuted_is_not_heard_at_once_again() -> None:
    node = acquainted(6)
    tell(node, accusation(3, 5), accusation(4, 5))
    tell(node, advert(5, 101))
    tell(node, accusation(3, 5, 101), accusation(4, 5, 101))
    assert state(node, 5) is State.ALIVE
    tell(node, accusation(6, 5, 101))
    assert state(node, 5) is State.SUSPECT


def test_time_that_we_were_not_there_is_none_to_refute_in() -> None:
    node = acquainted(6)
    tell(node, accusation(3, 5), accusation(4, 5))
    due = node.deadline()
    assert due is not None
    node.handle(Tick(), due + 60)  # we were stopped for a minute
    assert state(node, 5) is State.SUSPECT
    node.handle(Request(keypair(2).peer_id, message(advert(5, 101))), due + 60)
    assert state(node, 5) is State.ALIVE


def test_a_higher_incarnation_refutes_and_an_old_accusation_says_nothing_of_it() -> None:
    node = acquainted(6)
    tell(node, accusation(3, 5), accusation(4, 5))
    tell(node, advert(5, 101))
    assert state(node, 5) is State.ALIVE
    tell(node, accusation(3, 5, 100), accusation(4, 5, 100))
    assert state(node, 5) is State.ALIVE
    tell(node, accusation(3, 5, 999), accusation(4, 5, 999))  # of one that it never had
    assert state(node, 5) is State.ALIVE


def test_who_is_not_among_the_nearest_observers_accuses_in_vain() -> None:
    count = 24
    node = acquainted(count)
    order = [n for n in nearest(node, count, 5) if n != 1]
    tell(node, *(accusation(far, 5) for far in order[9:]))
    assert state(node, 5) is State.ALIVE
    convict(node, 5, *order[:2])
    assert state(node, 5) is State.FAILED


def test_strangers_accuse_in_vain() -> None:
    node = acquainted(4)
    tell(node, *(accusation(stranger, 3) for stranger in range(50, 60)))
    assert state(node, 3) is State.ALIVE


def test_accusers_of_one_ip_group_count_once() -> None:
    node = core(group_of=lambda peer_id, addr: addr or peer_id)
    tell(node, *(advert(number) for number in range(2, 8)))
    for number in (3, 4):
        node.handle(PeerConnected(keypair(number).peer_id, "same"), NOW)
    convict(node, 5, 3, 4)
    assert state(node, 5) is State.SUSPECT
    node.handle(Request(keypair(2).peer_id, message(accusation(6, 5))), LATER)
    node.handle(Tick(), LATER + 2)
    assert state(node, 5) is State.FAILED


def test_the_voices_of_one_group_keep_no_others_out() -> None:
    node = core(group_of=lambda peer_id, addr: addr or peer_id)
    tell(node, *(advert(number) for number in range(2, 30)))
    near = [n for n in nearest(node, 29, 5) if n != 1][:8]
    for number in near[:6]:
        node.handle(PeerConnected(keypair(number).peer_id, "same"), NOW)
    convict(node, 5, *near[:6])
    assert state(node, 5) is State.SUSPECT
    assert len(node.accusations(keypair(5).peer_id)) == 1
    node.handle(Request(keypair(2).peer_id, message(accusation(near[6], 5))), LATER)
    node.handle(Tick(), LATER + 2)
    assert state(node, 5) is State.FAILED


def test_an_accusation_of_ourselves_is_refuted_in_the_answer() -> None:
    node = acquainted(5)
    answer = reply(tell(node, accusation(3, 1)))
    ours = [open_advert(s) for s in answer.adverts]
    assert [a.incarnation for a in ours if a.peer_id == keypair(1).peer_id] == [101]
    assert state(node, 1) is State.ALIVE


def test_refuting_is_paced() -> None:
    node = acquainted(5)
    for incarnation in range(100, 150):
        tell(node, accusation(3, 1, incarnation))
    tell(node, accusation(4, 1, 101))  # which is not muted
    member = node.member(keypair(1).peer_id)
    assert member is not None
    assert member.advert.incarnation == 101
    node.handle(Tick(), NOW + 0.5)
    member = node.member(keypair(1).peer_id)
    assert member is not None
    assert member.advert.incarnation == 102


def test_one_whom_we_hold_failed_is_told_so_when_it_asks() -> None:
    node = acquainted(6)
    convict(node, 5, 3, 4)
    probe = message(kind=Kinds.KIND_PROBE)
    effects = list(node.handle(Request(keypair(5).peer_id, probe), LATER))
    assert len(reply(effects).accusations) == 2


def test_old_news_is_answered_with_newer() -> None:
    node = acquainted(4)
    tell(node, advert(3, 200))
    answer = reply(tell(node, advert(3, 150)))
    held = [open_advert(s) for s in answer.adverts]
    assert (keypair(3).peer_id, 200) in [(a.peer_id, a.incarnation) for a in held]


def test_leaving_is_signed_by_the_leaver_and_outlives_what_it_said_before() -> None:
    node = acquainted(4)
    tell(node, advert(3, left=True, sequence=1))
    tell(node, advert(3, sequence=9))
    assert state(node, 3) is State.LEFT
    tell(node, accusation(2, 3), accusation(4, 3))
    assert state(node, 3) is State.LEFT
    tell(node, advert(3, 101))
    assert state(node, 3) is State.ALIVE


def test_a_forgery_is_an_error_and_nothing_of_its_message_is_taken() -> None:
    node = acquainted(3)
    good, victim = advert(8), advert(9)
    stolen = victim.signed.__class__(
        payload=victim.signed.payload,
        public_key=keypair(2).public_key,
        signature=victim.signed.signature,
    )
    data = write_message(Kinds.KIND_NEWS, Versions(), adverts=[raw_of(good.signed), raw_of(stolen)])
    with pytest.raises(ForgedError):
        node.handle(Request(keypair(2).peer_id, data), NOW)
    node.check()
    assert state(node, 8) is None
    assert state(node, 9) is None


@pytest.mark.parametrize(
    "kind", [Kinds.KIND_UNSPECIFIED, Kinds.KIND_PROBE_ACK, Kinds.KIND_SYNC_REPLY]
)
def test_what_is_no_request_is_malformed(kind: Kind) -> None:
    with pytest.raises(MalformedError):
        core().handle(Request(keypair(2).peer_id, message(kind=kind)), NOW)


def test_another_version_is_told_so_in_words_and_both_sides_know() -> None:
    node, other = core(1, versions=Versions(1, 2)), core(2, versions=Versions(3, 4))
    send = next(e for e in other.handle(SyncWith(keypair(1).peer_id), NOW) if isinstance(e, Send))
    effects = list(node.handle(Request(keypair(2).peer_id, send.message), NOW))
    answer = reply(effects)
    assert answer.kind == Kinds.KIND_REFUSED
    assert "1 to 2" in answer.detail
    assert "3 to 4" in answer.detail
    assert [e.peer_id for e in effects if isinstance(e, PeerRefused)] == [keypair(2).peer_id]
    raw = next(e.message for e in effects if isinstance(e, Reply))
    told = other.handle(Answered(send.rpc_id, raw), NOW)
    assert told == [PeerRefused(keypair(1).peer_id, answer.detail)]
    assert state(node, 2) is None


def test_an_answer_that_does_not_fit_is_misbehaviour() -> None:
    node = core()
    for answer in (b"", b"\xff" * 9, message(advert(3)), message(kind=Kinds.KIND_PROBE_ACK)):
        effects = node.handle(SyncWith(keypair(2).peer_id), NOW)
        send = next(e for e in effects if isinstance(e, Send))
        told = node.handle(Answered(send.rpc_id, answer), NOW)
        assert [type(effect) for effect in told] == [Misbehaved]
    assert len(node.members()) == 1


def test_answers_to_nothing_are_ignored() -> None:
    node = acquainted(3)
    assert node.handle(Answered(12345, message(advert(9))), NOW) == []
    assert node.handle(Unanswered(12345), NOW) == []
    assert state(node, 9) is None


def test_a_full_table_makes_room_by_the_gone_and_takes_no_more_than_it_holds() -> None:
    node = core(config=replace(CONFIG, members_max=5))
    tell(node, *(advert(number) for number in range(2, 12)))
    assert [state(node, n) is not None for n in range(1, 8)] == [True] * 5 + [False] * 2
    tell(node, advert(4, left=True))
    tell(node, advert(9))
    assert state(node, 4) is None
    assert state(node, 9) is State.ALIVE


def test_requests_of_ours_are_bounded_when_nobody_answers() -> None:
    node = core(config=replace(CONFIG, pending_max=16))
    now, under_way = NOW, 0
    for number in range(2, 60):
        now += 0.1
        news = Request(keypair(2).peer_id, message(advert(number)))
        under_way += sum(isinstance(e, Send) for e in node.handle(news, now))
    assert under_way <= 16 + 4 * 2 + 5  # and the probes of its subjects, which changed


def test_no_message_is_longer_than_it_may_be() -> None:
    node = core()
    for number in range(2, 40):
        tell(node, advert(number, grpc_certificate=bytes(4000)))
    effects = list(
        node.handle(Request(keypair(2).peer_id, message(kind=Kinds.KIND_SYNC)), NOW + 0.2)
    )
    sizes = [len(e.message) for e in effects if isinstance(e, Reply | Send)]
    assert max(sizes) > 32 << 10
    assert max(sizes) < (64 << 10) + 200


def test_a_client_puts_nothing_into_the_world() -> None:
    node = core(9, client=True)
    effects = node.handle(SyncWith(keypair(2).peer_id), NOW)
    send = next(e for e in effects if isinstance(e, Send))
    asked = read_message(send.message)
    assert asked.client
    assert asked.adverts == ()
    answer = write_message(
        Kinds.KIND_SYNC_REPLY, Versions(), adverts=[advert(n).raw for n in (2, 3)]
    )
    told = node.handle(Answered(send.rpc_id, answer), NOW)
    assert Synced(keypair(2).peer_id) in told
    assert sum(isinstance(e, MemberChanged) for e in told) == 2
    later = node.handle(Tick(), NOW + 5)
    sends = [read_message(e.message) for e in (*told, *later) if isinstance(e, Send)]
    assert [(m.kind, m.adverts, m.accusations) for m in sends] == [(Kinds.KIND_SYNC, (), ())]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.binary(max_size=200), max_size=4), st.integers(0, 7))
def test_no_message_raises_anything_but_a_remote_error(parts: list[bytes], kind: int) -> None:
    node = acquainted(4)
    good = advert(6).signed
    broken = [
        raw_of(good.__class__(payload=part, public_key=good.public_key, signature=good.signature))
        for part in parts
    ]
    data = write_message(kind, Versions(), adverts=broken[:2], accusations=broken[2:])  # type: ignore[arg-type]
    for raw in (data, data[: len(data) // 2], b"".join(parts)):
        try:
            node.handle(Request(keypair(3).peer_id, raw), NOW)
        except RemoteError:
            pass
        node.check()


@pytest.mark.parametrize("seed", range(1))
def test_a_lone_liar_among_the_observers_gets_nobody_declared_failed(seed: int) -> None:
    world = World(7, seed=seed)
    world.join_all()
    world.run(5)
    nodes = world.list()
    for turn in range(20):
        victim = nodes[1 + turn % 6]
        held = nodes[0].core.member(victim.peer_id)
        assert held is not None
        lie = build_accusation(
            keypair(1), victim.peer_id, incarnation=held.advert.incarnation, failed=True
        )
        for node in nodes[1:]:
            if node is not victim:
                world.feed(node, Request(nodes[0].peer_id, message(lie)))
        world.run(0.7)
    world.run(3)
    assert world.ever(State.FAILED) == []
    assert world.all_alive()
