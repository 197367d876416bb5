"""The Kademlia core by the hundred in virtual time: lookups, records, providers, silence."""

from __future__ import annotations

import random
from functools import partial

import pytest
from dht_samples import STRANGER, VNODE_KEY, WALL_MS, allocation_record, keypair
from kad_swarm import Swarm, addrs_of

from p2pnet.core import Tick
from p2pnet.dht import events as ev
from p2pnet.dht.core import Kademlia
from p2pnet.dht.keyspace import record_key
from p2pnet.dht.local import REPLICAS
from p2pnet.dht.records import OpenRecord, open_record, serialise_set
from p2pnet.dht.wire import Kind, Message
from p2pnet.keys import KeyPair, peer_id_bytes
from p2pnet.net.network import PeerInfo

TIMEOUT_S = 20.0


def opened(
    sequence: int = 1, *, epoch: int = 1, ttl_s: int = 60, claimant: KeyPair | None = None
) -> OpenRecord:
    """A checked allocation of VNode fc1."""
    author = claimant or keypair(-2)
    signed = allocation_record(sequence=sequence, epoch=epoch, ttl_s=ttl_s, claimant=author)
    return open_record(signed, VNODE_KEY, WALL_MS)


def swarm_of(count: int, seed: int, *, upkeep: bool = False, stock: int = 0) -> Swarm:
    """Peers that know each other well enough."""
    swarm = Swarm(count, seed, upkeep=upkeep, stock=stock)
    swarm.acquaint(25)
    return swarm


def get(op_id: int) -> ev.Get:
    """Reads VNode fc1."""
    return ev.Get(op_id, VNODE_KEY, TIMEOUT_S)


def holders_of(swarm: Swarm) -> list[str]:
    """Who holds a record of VNode fc1."""
    return [p for p in swarm.ids if swarm.cores[p].local.store.get(VNODE_KEY, swarm.now)]


@pytest.fixture(scope="module")
def big_swarm() -> Swarm:
    """200 peers that nobody harms."""
    return swarm_of(200, seed=1)


def test_every_lookup_finds_the_true_nearest(big_swarm: Swarm) -> None:
    for n in range(12):
        nobody, asker = keypair(1000 + n).peer_id, big_swarm.ids[n]
        result = big_swarm.ask(asker, lambda op, p=nobody: ev.FindNode(op, p, TIMEOUT_S))
        others = [peer_id for peer_id in big_swarm.ids if peer_id != asker]
        assert isinstance(result, ev.Nodes)
        assert result.target is None
        assert [peer.peer_id for peer in result.closest] == big_swarm.nearest(
            peer_id_bytes(nobody), 20, others
        )


def test_a_peer_is_found_where_it_is(big_swarm: Swarm) -> None:
    for n in range(12):
        sought = big_swarm.ids[-1 - n]
        result = big_swarm.ask(big_swarm.ids[n], lambda op, p=sought: ev.FindNode(op, p, TIMEOUT_S))
        assert isinstance(result, ev.Nodes)
        assert result.target == PeerInfo(sought, addrs_of(sought))


@pytest.mark.parametrize("seed", [2, 3])
def test_a_fifth_of_the_peers_silent(seed: int) -> None:
    """Lookups go round the silent ones, cost a patience and not a timeout, and are right."""
    swarm = swarm_of(100, seed)
    asker = swarm.ids[0]
    swarm.ask(asker, lambda op: ev.FindNode(op, STRANGER.peer_id, TIMEOUT_S))  # measures
    swarm.silent = set(swarm.rng.sample(swarm.ids[1:], 20))
    living = [p for p in swarm.ids if p not in swarm.silent and p != asker]
    for n in range(10):
        nobody = keypair(1000 + n).peer_id
        began = swarm.now
        result = swarm.ask(asker, lambda op, p=nobody: ev.FindNode(op, p, TIMEOUT_S))
        assert isinstance(result, ev.Nodes)
        found = [peer.peer_id for peer in result.closest]
        assert found[:REPLICAS] == swarm.nearest(peer_id_bytes(nobody), REPLICAS, living)
        assert swarm.now - began < 2.5
    swarm.run_for(10.0)
    assert {peer for who, peer in swarm.forgotten if who == asker} <= swarm.silent
    assert swarm.forgotten


def test_everybody_else_silent_ends_in_bounded_time() -> None:
    swarm = swarm_of(30, seed=4)
    asker = swarm.ids[0]
    swarm.silent = set(swarm.ids[1:])
    assert isinstance(swarm.ask(asker, get), ev.Failed)
    assert swarm.now <= TIMEOUT_S
    swarm.run_for(9.0)  # the silent ones are given up
    assert isinstance(swarm.ask(asker, get), ev.Failed)  # and so is the rest of the table
    swarm.run_for(9.0)
    assert swarm.cores[asker].stats()["peers"] == 0


def test_a_record_is_put_on_the_nearest_and_read_by_all() -> None:
    swarm = swarm_of(60, seed=5)
    result = swarm.ask(swarm.ids[0], lambda op: ev.Put(op, opened(), TIMEOUT_S))
    assert isinstance(result, ev.Stored)
    assert REPLICAS <= result.holders <= len(holders_of(swarm))
    assert set(holders_of(swarm)) >= set(swarm.nearest(VNODE_KEY, REPLICAS))
    for peer_id in swarm.ids[:20]:
        read = swarm.ask(peer_id, get)
        assert isinstance(read, ev.Records)
        assert [record.signed for record in read.records] == [opened().signed]


def test_a_holder_does_not_trust_its_own_copy_and_repairs_it() -> None:
    swarm = swarm_of(60, seed=6)
    nearest = swarm.nearest(VNODE_KEY, REPLICAS)
    stale, new = opened(1), opened(2)
    swarm.ask(swarm.ids[0], lambda op: ev.Put(op, new, TIMEOUT_S))
    for peer_id in nearest[:3]:  # as if they had missed the second put
        core = swarm.add(peer_id)
        for other in swarm.ids:
            swarm.meet(peer_id, other)
        assert core.local.store.put(stale, swarm.now)
    for quorum in (3, REPLICAS):
        ask = partial(ev.Get, key=VNODE_KEY, timeout_s=TIMEOUT_S, quorum=quorum)
        read = swarm.ask(nearest[0], ask)
        assert isinstance(read, ev.Records)
        assert [record.sequence for record in read.records] == [2]
        assert read.answers >= quorum
        swarm.run_for(1.0)
    for peer_id in nearest[:3]:
        (held,) = swarm.cores[peer_id].local.store.get(VNODE_KEY, swarm.now)
        assert held.sequence == 2


def test_known_peers_that_all_fail_make_a_read_fail_and_the_next_one_local() -> None:
    swarm = swarm_of(3, seed=7)
    holder = swarm.ids[0]
    assert swarm.cores[holder].local.store.put(opened(), 0.0)
    swarm.silent = set(swarm.ids[1:])
    assert isinstance(swarm.ask(holder, get), ev.Failed)
    swarm.run_for(9.0)  # the silent ones are given up
    read = swarm.ask(holder, get)
    assert isinstance(read, ev.Records)
    assert len(read.records) == 1


def test_a_peer_alone_holds_its_own_records_and_a_client_alone_fails() -> None:
    swarm = Swarm(1, seed=8)
    alone = swarm.ids[0]
    assert swarm.ask(alone, lambda op: ev.Put(op, opened(), TIMEOUT_S)) == ev.Stored(1)
    read = swarm.ask(alone, get)
    assert isinstance(read, ev.Records)
    assert [record.sequence for record in read.records] == [1]
    swarm.add(STRANGER.peer_id, server=False)
    result = swarm.ask(STRANGER.peer_id, lambda op: ev.Put(op, opened(), TIMEOUT_S))
    assert isinstance(result, ev.Failed)


def test_killed_holders_are_made_up_for_by_the_next_nearest() -> None:
    swarm = swarm_of(60, seed=9)
    dead = swarm.nearest(VNODE_KEY, 4)
    swarm.silent = set(dead)
    putter = swarm.nearest(VNODE_KEY, 60)[-1]
    result = swarm.ask(putter, lambda op: ev.Put(op, opened(), TIMEOUT_S))
    assert isinstance(result, ev.Stored)
    assert result.holders >= REPLICAS
    living = [p for p in swarm.ids if p not in swarm.silent]
    assert set(holders_of(swarm)) >= set(swarm.nearest(VNODE_KEY, REPLICAS, living))


def test_stock_peers_route_but_hold_no_records() -> None:
    swarm = swarm_of(60, seed=10, stock=30)
    result = swarm.ask(swarm.ids[-2], lambda op: ev.Put(op, opened(), TIMEOUT_S))
    assert isinstance(result, ev.Stored)
    assert result.holders >= REPLICAS
    assert all(peer_id in swarm.holders for peer_id in holders_of(swarm))
    read = swarm.ask(swarm.ids[-1], get)
    assert isinstance(read, ev.Records)
    assert len(read.records) == 1


def test_an_unrenewed_record_is_passed_on_and_still_expires_in_its_time() -> None:
    """New neighbours get it from the holders, with the age that it has had."""
    swarm = swarm_of(24, seed=11, upkeep=True)
    swarm.ask(swarm.ids[0], lambda op: ev.Put(op, opened(ttl_s=120), TIMEOUT_S))
    put_at = swarm.now
    nearest = swarm.nearest(VNODE_KEY, REPLICAS)
    for peer_id in nearest[:6]:  # restart with nothing
        swarm.add(peer_id)
        for other in swarm.ids:
            swarm.meet(peer_id, other)
    swarm.run_for(100.0)
    assert len([p for p in nearest[:6] if p in holders_of(swarm)]) >= 4
    for peer_id in holders_of(swarm):
        (held,) = swarm.cores[peer_id].local.store.get(VNODE_KEY, swarm.now)
        # What is put is as old as its author says: at most as long as the put took.
        assert held.age_s >= swarm.now - put_at - 0.5
    swarm.run_for(30.0)
    assert holders_of(swarm) == []


def test_a_kept_record_asks_to_be_renewed_after_a_third_of_its_life() -> None:
    swarm = swarm_of(10, seed=12, upkeep=True)
    author = swarm.ids[0]
    swarm.feed(author, ev.Keep(opened(1, ttl_s=60)))
    swarm.run_for(19.0)
    assert swarm.renewals == []
    swarm.run_for(2.0)
    assert swarm.renewals == [VNODE_KEY]
    swarm.feed(author, ev.Keep(opened(2, ttl_s=60)))
    swarm.run_for(2.0)
    for peer_id in swarm.nearest(VNODE_KEY, REPLICAS):
        (held,) = swarm.cores[peer_id].local.store.get(VNODE_KEY, swarm.now)
        assert held.sequence == 2
    swarm.feed(author, ev.Unkeep(VNODE_KEY))
    swarm.run_for(60.0)
    assert swarm.renewals == [VNODE_KEY]


def test_two_authors_of_one_key_do_not_displace_each_other() -> None:
    swarm = swarm_of(20, seed=13)
    first, second = opened(9, epoch=1), opened(8, epoch=1, claimant=STRANGER)
    swarm.start(swarm.ids[0], lambda op: ev.Put(op, first, TIMEOUT_S))
    swarm.ask(swarm.ids[1], lambda op: ev.Put(op, second, TIMEOUT_S))
    read = swarm.ask(swarm.ids[2], get)
    assert isinstance(read, ev.Records)
    assert [record.author for record in read.records] == [first.author, STRANGER.peer_id]


def test_who_has_claimed_a_network_later_is_read_alone() -> None:
    swarm = swarm_of(20, seed=13)
    first, second = opened(9, epoch=1), opened(1, epoch=2, claimant=STRANGER)
    swarm.ask(swarm.ids[1], lambda op: ev.Put(op, second, TIMEOUT_S))
    swarm.start(swarm.ids[0], lambda op: ev.Put(op, first, TIMEOUT_S))  # it has not heard
    read = swarm.ask(swarm.ids[2], get)
    assert isinstance(read, ev.Records)
    assert [record.author for record in read.records] == [STRANGER.peer_id]


def test_providers_are_found_renewed_and_run_out() -> None:
    swarm = swarm_of(40, seed=14)
    provider, reader = swarm.ids[3], swarm.ids[30]
    key = record_key("/p2pnet/a key")

    def find(op_id: int) -> ev.FindProviders:
        return ev.FindProviders(op_id, key, TIMEOUT_S)

    told = swarm.ask(provider, lambda op: ev.Provide(op, key, TIMEOUT_S))
    assert isinstance(told, ev.Stored)
    assert told.holders == 20
    swarm.run_for(1.0)
    for _ in range(2):
        found = swarm.ask(reader, find)
        assert isinstance(found, ev.Providers)
        assert [peer.peer_id for peer in found.peers] == [provider]
        swarm.run_for(35 * 60.0)  # longer than a hint lives: it was renewed
    swarm.feed(provider, ev.Unprovide(key))
    swarm.run_for(35 * 60.0)
    assert swarm.ask(reader, find) == ev.Providers(())


def test_a_swarm_forms_from_one_bootstrap_peer() -> None:
    """Everybody knows only the first; then everybody finds everybody."""
    swarm = Swarm(24, seed=15, wire=True)
    for peer_id in swarm.ids[1:]:
        swarm.hear(peer_id, swarm.ids[0])
        swarm.hear(swarm.ids[0], peer_id)
        swarm.run_for(0.2)
    swarm.run_for(2.0)
    for n in range(1, 12, 2):
        sought = swarm.ids[-n]
        found = swarm.ask(swarm.ids[n], lambda op, p=sought: ev.FindNode(op, p, TIMEOUT_S))
        assert isinstance(found, ev.Nodes)
        assert found.target == (
            None if sought == swarm.ids[n] else PeerInfo(sought, addrs_of(sought))
        )
    assert min(len(core.local.table) for core in swarm.cores.values()) >= 15


def test_the_same_seed_gives_the_same_run() -> None:
    def run() -> tuple[int, float, list[str]]:
        swarm = swarm_of(12, seed=16, upkeep=True)
        swarm.ask(swarm.ids[0], lambda op: ev.Put(op, opened(), TIMEOUT_S))
        swarm.run_for(30.0)
        return swarm.requests, swarm.now, holders_of(swarm)

    assert run() == run()


def lone_core(*, server: bool = True) -> Kademlia:
    """A core that knows nobody."""
    return Kademlia(keypair(0).peer_id, random.Random(0), server=server)


def answer(core: Kademlia, asker: str, message: Message) -> ev.Effect:
    """What a core says to one request."""
    (effect,) = core.handle(ev.RequestArrived(7, asker, message, WALL_MS), 0.0)
    core.check()
    return effect


def test_a_peer_can_only_say_of_itself_that_it_provides() -> None:
    core, liar, victim = lone_core(), keypair(1).peer_id, keypair(2).peer_id
    claims = (PeerInfo(victim, ("/ip4/192.0.2.1/tcp/1",)), PeerInfo(liar, ()))
    message = Message(Kind.ADD_PROVIDER, b"key", providers=claims)
    assert answer(core, liar, message) == ev.SendReply(7, None)
    reply = answer(core, victim, Message(Kind.GET_PROVIDERS, b"key"))
    assert isinstance(reply, ev.SendReply)
    assert reply.message is not None
    assert [peer.peer_id for peer in reply.message.providers] == [liar]


def test_a_put_is_acknowledged_only_where_it_was_taken() -> None:
    core, asker = lone_core(), keypair(1).peer_id
    new, old = (
        Message(Kind.PUT_VALUE, VNODE_KEY, serialise_set([opened(sequence)])) for sequence in (2, 1)
    )
    taken = answer(core, asker, new)
    assert isinstance(taken, ev.SendReply)
    assert taken.message is not None
    assert taken.message.value is not None
    assert opened(2).signed.payload in taken.message.value
    refused = answer(core, asker, old)
    assert isinstance(refused, ev.SendReply)
    assert refused.message == Message(Kind.PUT_VALUE, VNODE_KEY)


@pytest.mark.parametrize(
    "message",
    [
        Message(Kind.FIND_NODE),
        Message(Kind.GET_VALUE),
        Message(Kind.PUT_VALUE, VNODE_KEY, b"\xff no record set"),
    ],
    ids=["no key", "no key to get", "no record set"],
)
def test_a_request_that_makes_no_sense_is_refused(message: Message) -> None:
    assert isinstance(answer(lone_core(), keypair(1).peer_id, message), ev.Refuse)


def test_a_client_serves_nobody() -> None:
    effect = answer(lone_core(server=False), keypair(1).peer_id, Message(Kind.FIND_NODE, b"k"))
    assert isinstance(effect, ev.Refuse)


def acquaint(core: Kademlia, *peer_ids: str) -> None:
    """The core knows these peers: they have answered a lookup."""
    for peer_id in peer_ids:
        seen = core.handle(ev.PeerSeen(peer_id, addrs_of(peer_id), True, True), 0.0)
        (check,) = [effect for effect in seen if isinstance(effect, ev.SendRequest)]
        reply = ev.ReplyArrived(check.rpc_id, Message(Kind.FIND_NODE), True, WALL_MS)
        for effect in core.handle(reply, 0.0):  # the first one starts a look round
            if isinstance(effect, ev.SendRequest):
                core.handle(ev.ReplyArrived(effect.rpc_id, effect.message, True, WALL_MS), 0.0)


def test_only_a_server_that_answers_a_lookup_enters_the_table_and_an_asker_does_not() -> None:
    core, peer_id = lone_core(), keypair(1).peer_id
    answer(core, peer_id, Message(Kind.FIND_NODE, b"k"))
    assert core.stats()["peers"] == 0
    (check,) = core.handle(ev.PeerSeen(peer_id, (), True, True), 0.0)
    assert isinstance(check, ev.SendRequest)
    assert core.stats()["peers"] == 0
    core.handle(ev.RequestFailed(check.rpc_id), 0.0)
    assert core.stats()["peers"] == 0
    assert not core.wants(peer_id)  # for a while
    peer_id = keypair(2).peer_id
    acquaint(core, peer_id)
    assert core.stats()["peers"] == 1
    core.handle(ev.PeerSeen(peer_id, (), False, False), 0.0)
    assert core.stats()["peers"] == 0


def test_an_answer_of_the_wrong_kind_is_a_failure() -> None:
    core, peer_id = lone_core(), keypair(1).peer_id
    acquaint(core, peer_id)
    (request,) = core.handle(get(1), 0.0)
    assert isinstance(request, ev.SendRequest)
    reply = ev.ReplyArrived(request.rpc_id, Message(Kind.FIND_NODE), True, WALL_MS)
    effects = core.handle(reply, 0.1)
    assert ev.Forget(peer_id) in effects
    assert isinstance(effects[-1], ev.OperationDone)
    assert isinstance(effects[-1].result, ev.Failed)
    assert core.stats()["peers"] == 0


def test_a_request_that_the_shell_never_answers_is_given_up() -> None:
    core, peer_id = lone_core(), keypair(1).peer_id
    acquaint(core, peer_id)
    core.handle(get(1), 0.0)
    now, seen = 0.0, []
    while not any(isinstance(effect, ev.OperationDone) for effect in seen):
        deadline = core.deadline()
        assert deadline is not None
        now = max(now, deadline)
        assert now < TIMEOUT_S + 1
        seen += core.handle(Tick(), now)
        core.check()


def test_wrong_addresses_from_one_peer_do_not_hide_another() -> None:
    """A liar names the target first, at an address where nobody is."""
    core, liar, honest, target = lone_core(), *(keypair(n).peer_id for n in (1, 2, 3))
    acquaint(core, liar, honest)
    requests = {r.peer.peer_id: r for r in core.handle(ev.FindNode(1, target, 9.0), 0.0)
                if isinstance(r, ev.SendRequest)}  # fmt: skip
    wrong = Message(Kind.FIND_NODE, closer=(PeerInfo(target, ("/ip4/192.0.2.1/tcp/1",)),))
    right = Message(Kind.FIND_NODE, closer=(PeerInfo(target, addrs_of(target)),))
    (to_nobody,) = core.handle(ev.ReplyArrived(requests[liar].rpc_id, wrong, True, WALL_MS), 0.1)
    assert isinstance(to_nobody, ev.SendRequest)
    core.handle(ev.RequestFailed(to_nobody.rpc_id), 0.2)
    effects = core.handle(ev.ReplyArrived(requests[honest].rpc_id, right, True, WALL_MS), 0.3)
    again = [effect for effect in effects if isinstance(effect, ev.SendRequest)]
    assert [request.peer.peer_id for request in again] == [target]
    assert again[0].peer.addrs[0] == addrs_of(target)[0]


def test_more_operations_than_may_run_wait_their_turn() -> None:
    swarm = swarm_of(10, seed=17)
    asker = swarm.ids[0]
    keys = [record_key(f"/p2pnet/key {n}") for n in range(150)]
    op_ids = [
        swarm.start(asker, lambda op, key=key: ev.Get(op, key, TIMEOUT_S))  # type: ignore[misc]
        for key in keys
    ]
    assert swarm.cores[asker].stats()["operations"] == 64
    swarm.run(lambda: all(op_id in swarm.results for op_id in op_ids))
    assert all(isinstance(swarm.results[op_id], ev.Records) for op_id in op_ids)


def test_reads_of_one_key_at_once_share_one_lookup() -> None:
    swarm = swarm_of(10, seed=17)
    swarm.ask(swarm.ids[1], lambda op: ev.Put(op, opened(), TIMEOUT_S))
    asker = swarm.ids[0]
    op_ids = [swarm.start(asker, get) for _ in range(50)]
    assert swarm.cores[asker].stats()["operations"] == 1
    swarm.run(lambda: all(op_id in swarm.results for op_id in op_ids))
    for op_id in op_ids:
        result = swarm.results[op_id]
        assert isinstance(result, ev.Records)
        assert len(result.records) == 1


def test_a_newcomer_is_handed_the_records_that_it_is_near_to() -> None:
    swarm = swarm_of(20, seed=18, upkeep=True)
    newcomer = swarm.nearest(VNODE_KEY, 1)[0]
    swarm.silent = {newcomer}
    putter = swarm.nearest(VNODE_KEY, 20)[-1]
    swarm.ask(putter, lambda op: ev.Put(op, opened(ttl_s=3600), TIMEOUT_S))
    swarm.silent = set()
    swarm.add(newcomer)
    for peer_id in holders_of(swarm):
        swarm.feed(peer_id, ev.PeerGone(newcomer))
        swarm.hear(peer_id, newcomer)
    swarm.run_for(5.0)  # long before anything is republished
    (held,) = swarm.cores[newcomer].local.store.get(VNODE_KEY, swarm.now)
    assert held.sequence == 1


def test_a_kept_record_that_its_holders_lost_is_put_again() -> None:
    swarm = swarm_of(30, seed=19, upkeep=True)
    author = swarm.nearest(VNODE_KEY, 30)[-1]
    swarm.feed(author, ev.Keep(opened(1, ttl_s=3600)))
    swarm.run(lambda: len(holders_of(swarm)) >= REPLICAS)
    for peer_id in holders_of(swarm):  # they took it, and have it no more
        swarm.cores[peer_id].local.store.expire(swarm.now + 7200.0)
    assert holders_of(swarm) == []
    swarm.run_for(10.0)
    assert len(holders_of(swarm)) >= REPLICAS


def test_a_busy_peer_is_not_taken_for_a_silent_one() -> None:
    """One request unanswered: it stays. A second, too: it goes."""
    core, peer_id = lone_core(), keypair(1).peer_id
    acquaint(core, peer_id)
    (request,) = [e for e in core.handle(get(1), 1.0) if isinstance(e, ev.SendRequest)]
    effects = core.handle(ev.RequestFailed(request.rpc_id), 5.0)
    (again,) = [effect for effect in effects if isinstance(effect, ev.SendRequest)]
    assert core.stats()["peers"] == 1
    reply = ev.ReplyArrived(again.rpc_id, Message(Kind.FIND_NODE), True, WALL_MS)
    core.handle(reply, 6.0)
    assert core.stats()["peers"] == 1
    (request,) = [e for e in core.handle(get(2), 7.0) if isinstance(e, ev.SendRequest)]
    effects = core.handle(ev.RequestFailed(request.rpc_id), 11.0)
    (again,) = [effect for effect in effects if isinstance(effect, ev.SendRequest)]
    assert ev.Forget(peer_id) in core.handle(ev.RequestFailed(again.rpc_id), 13.0)
    assert core.stats()["peers"] == 0
    core.check(full=True)
