"""An eclipse: a crowd of identities from a few networks settles around one key. Pure.

The attacker has ground peer ids until they lay nearer to the key than any honest
peer's (identities are free), and addresses in a few /24 networks (which are not).
Its peers make themselves known to everybody near, name one another, acknowledge
records and drop them. A newcomer starts from bootstrap peers of which only one is
honest. Judged: whom the tables hold, and whether the key is readable all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from p2pnet.dht import events as ev
from p2pnet.dht.keyspace import name_key, peer_position, position
from p2pnet.dht.records import open_record
from p2pnet.dht.routing import GROUP_TABLE_MAX, K
from p2pnet.keys import peer_id_from_bytes, sha256
from p2pnet.net.groups import ip_group
from p2pnet.net.network import PeerInfo
from p2pnet.sim.grow import Peer, acquainted, settle
from p2pnet.sim.liars import LyingRouter, nearest_of
from p2pnet.sim.machine import Machine
from p2pnet.sim.records import network_record
from p2pnet.sim.report import Report, share
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.truth import nearest
from p2pnet.sim.world import World

_NAME = "digits"
_TIMEOUT_S = 20.0
_SETTLE_S = 30.0
_LIFE_S = 3600
_VISITS = 40  # honest peers near the key that each sybil makes itself known to
_GRIND_MAX = 4_000_000
_ED25519_ID_PREFIX = bytes.fromhex("002408011220")


class _Eclipse:
    def __init__(self, nodes: int, seed: int, options: Mapping[str, float]) -> None:
        self.options = options
        self.world = World(seed)
        self.rng = self.world.rng_of("eclipse")
        self.key = name_key(_NAME)
        self.peers = acquainted(self.world, nodes, gossip=False)
        self.near = nearest([p.machine for p in self.peers], self.key, _VISITS)
        self.by_id = {peer.peer_id: peer for peer in self.peers}
        self.author = self.rng.choice(self.peers)
        self.sequence = 0
        self.sybils: list[LyingRouter] = []

    def run(self) -> None:
        self._put()
        self._attack()
        self.world.run_for(_SETTLE_S)
        self.newcomer = self._join()
        self.world.run_for(_SETTLE_S)
        self._put()  # under attack

    # The attacker

    def _attack(self) -> None:
        machines = [self._sybil(number) for number in range(int(self.options["sybils"]))]
        crowd = [PeerInfo(machine.peer_id, (machine.addr,)) for machine in machines]
        names = lru_cache(maxsize=4096)(nearest_of(crowd))
        self.sybils = [LyingRouter(machine, names) for machine in machines]
        for sybil in self.sybils:
            for peer_id in self.near:
                sybil.announce(self.by_id[peer_id].dht)

    def _sybil(self, number: int) -> Machine:
        """A machine whose id is nearer to the key than any honest peer's."""
        target = position(self.key)
        limit = peer_position(self.near[0]) ^ target
        for _ in range(_GRIND_MAX):
            raw = _ED25519_ID_PREFIX + self.rng.randbytes(32)
            if int.from_bytes(sha256(raw), "big") ^ target < limit:
                break
        peer_id = peer_id_from_bytes(raw)
        group = number % int(self.options["groups"])
        place = 1 + number // int(self.options["groups"])
        return self.world.machine(addr=f"/ip4/9.9.{group}.{place}/tcp/4001", peer_id=peer_id)

    # The honest

    def _put(self) -> None:
        self.sequence += 1
        machine = self.author.machine
        signed = network_record(machine, _NAME, epoch=1, sequence=self.sequence, ttl_s=_LIFE_S)
        record = open_record(signed, self.key, machine.wall_ms)
        self.author.dht.ask(lambda op: ev.Put(op, record, _TIMEOUT_S))

    def _join(self) -> Peer:
        newcomer = settle(self.world, gossip=False)
        others = [peer.machine for peer in self.peers]
        newcomer.bootstrap = [self.sybils[0].machine, self.sybils[1].machine]
        newcomer.bootstrap.append(self.rng.choice(others))
        newcomer.join()
        return newcomer

    # The outcome

    def _readable(self, asker: Peer) -> bool:
        result = asker.dht.ask(lambda op: ev.Get(op, self.key, _TIMEOUT_S))
        if not isinstance(result, ev.Records):
            return False
        return any(record.sequence == self.sequence for record in result.records)

    def report(self, nodes: int, seed: int) -> Report:
        self.run()
        report = Report("eclipse", nodes, seed, trace="")
        liars = {sybil.peer_id: None for sybil in self.sybils}
        crowds: list[int] = []
        shares: list[float] = []
        for peer in (*(self.by_id[peer_id] for peer_id in self.near), self.newcomer):
            table = peer.dht.core.local.table
            where = ((c.peer_id, self.world.by_id[c.peer_id].addr) for c in table)
            groups = Counter(ip_group(peer_id, addr) for peer_id, addr in where)
            crowds.append(max(groups.values()))
            neighbours = table.closest(position(self.key), K)
            shares.append(share(sum(c.peer_id not in liars for c in neighbours), len(neighbours)))
        askers = self.rng.sample(self.peers, int(self.options["reads"]))
        read = [self._readable(peer) for peer in (*askers, self.newcomer)]
        readable = share(sum(read), len(read))
        report.trace = self.world.trace
        report.figures = {
            "sybils": len(self.sybils),
            "IP groups": int(self.options["groups"]),
            "of one group in a table": max(crowds),
            "honest neighbours, least": min(shares),
            "honest neighbours of the newcomer": shares[-1],
            "reads": len(read),
            "readable": readable,
            "readable by the newcomer": int(read[-1]),
        }
        report.series = {"honest neighbours": shares}
        report.expect(max(crowds) <= GROUP_TABLE_MAX, "an IP group crowds a table")
        report.expect(min(shares) >= 0.5, f"a table near the key is {min(shares):.0%} honest")
        report.expect(readable >= 0.99, f"only {readable:.1%} could read the key")
        return report


def _run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    return _Eclipse(nodes, seed, options).report(nodes, seed)


SCENARIO = Scenario(
    "eclipse",
    "identities from a few networks crowd around one key",
    _run,
    nodes=1000,
    nodes_min=60,
    nodes_max=2000,
    options={"sybils": 256, "groups": 4, "reads": 100},
)
