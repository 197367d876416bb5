"""Lookups among liars: do they find what brute force finds? Pure.

A share of all machines is silent, or names accomplices, or names peers that do not
exist, always in perfect form. They are in everybody's routing table, for they were
honest before. A lookup is right if it names every one of the honest peers nearest to
its key that a record would be kept on.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Mapping

from p2pnet.dht import events as ev
from p2pnet.dht.keyspace import POSITION_BITS, position
from p2pnet.dht.local import REPLICAS
from p2pnet.dht.wire import PEERS_MAX
from p2pnet.keys import peer_id_bytes, peer_id_from_bytes, sha256
from p2pnet.net.network import PeerInfo
from p2pnet.sim.grow import Peer, acquainted
from p2pnet.sim.liars import LyingRouter, SilentPeer, nearest_of
from p2pnet.sim.links import Links
from p2pnet.sim.report import Report, quantile, share
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.truth import nearest
from p2pnet.sim.world import World

_TIMEOUT_S = 20.0
_PAUSE_S = 0.05
_INVENTED = 200_000
_INVENTED_NEAR = 400  # nearest to the key of them, to choose from
# The multihash of an Ed25519 key, but for the key (libp2p's peer-ids spec).
_ED25519_ID_PREFIX = bytes.fromhex("002408011220")


class _Inventor:
    """Names peers that do not exist, nearer to the key than any that does.

    Each time others, out of a crowd that was made up beforehand.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        ids = (_ED25519_ID_PREFIX + rng.randbytes(32) for _ in range(_INVENTED))
        self._crowd = sorted((int.from_bytes(sha256(raw), "big"), raw) for raw in ids)

    def __call__(self, key: bytes) -> list[PeerInfo]:
        target = position(key)
        for bits in range(POSITION_BITS):  # the smallest part of the space that has enough
            size = 1 << bits
            first = bisect_left(self._crowd, (target // size * size,))
            last = bisect_left(self._crowd, ((target // size + 1) * size,))
            if last - first >= _INVENTED_NEAR:
                break
        chosen = self._rng.sample(self._crowd[first:last], PEERS_MAX)
        addr = f"/ip4/9.{self._rng.randrange(256)}.{self._rng.randrange(256)}.1/tcp/4001"
        return [PeerInfo(peer_id_from_bytes(raw), (addr,)) for _, raw in chosen]


class _Lookups:
    def __init__(self, nodes: int, seed: int, options: Mapping[str, float]) -> None:
        self.options = options
        self.world = World(seed, Links(loss=options["loss"]))
        self.rng = self.world.rng_of("lookups")
        self.peers = acquainted(self.world, nodes, gossip=False)
        shares = [options[kind] for kind in ("silent", "accomplices", "inventors")]
        liars = self.rng.sample(self.peers, round(sum(shares) * nodes))
        self.honest = [peer for peer in self.peers if peer not in liars]
        self._corrupt(liars, [round(part * nodes) for part in shares])
        self.right = self.lookups = 0
        self.hops: list[float] = []
        self.requests: list[float] = []
        self.took_s: list[float] = []
        for number in range(int(options["lookups"])):
            self.world.after(number * _PAUSE_S, self._look_up)

    def _corrupt(self, liars: list[Peer], counts: list[int]) -> None:
        silent, friends, _ = counts
        among_themselves = nearest_of(
            [PeerInfo(p.peer_id, (p.machine.addr,)) for p in liars[silent : silent + friends]]
        )
        invented = _Inventor(self.world.rng_of("invented"))
        for number, peer in enumerate(liars):
            if number < silent:
                SilentPeer(peer.machine)
            elif number < silent + friends:
                LyingRouter(peer.machine, among_themselves)
            else:
                LyingRouter(peer.machine, invented)

    def _look_up(self) -> None:
        asker = self.rng.choice(self.honest)
        nobody = peer_id_from_bytes(_ED25519_ID_PREFIX + self.rng.randbytes(32))
        since = self.world.now

        def done(result: ev.Result) -> None:
            self.took_s.append(self.world.now - since)
            self._judge(asker, nobody, result)

        asker.dht.start(lambda op: ev.FindNode(op, nobody, _TIMEOUT_S), done)

    def _judge(self, asker: Peer, nobody: str, result: ev.Result) -> None:
        self.lookups += 1
        if not isinstance(result, ev.Nodes):
            return
        others = [peer.machine for peer in self.honest if peer is not asker]
        true = nearest(others, peer_id_bytes(nobody), REPLICAS)
        named = [peer.peer_id for peer in result.closest]
        self.right += all(peer_id in named for peer_id in true)
        self.hops.append(result.hops)
        self.requests.append(result.requests)

    def report(self, nodes: int, seed: int) -> Report:
        wanted = int(self.options["lookups"])
        self.world.run(lambda: self.lookups == wanted, wanted * _PAUSE_S + _TIMEOUT_S + 5.0)
        right = share(self.right, wanted)
        report = Report("lookups", nodes, seed, trace=self.world.trace)
        hops, requests = quantile(self.hops, 0.99), quantile(self.requests, 0.99)
        report.figures = {
            "liars": nodes - len(self.honest),
            "lookups": wanted,
            "right against brute force": right,
            "hops p50": quantile(self.hops, 0.5),
            "hops p99": hops,
            "requests p50": quantile(self.requests, 0.5),
            "requests p99": requests,
            "seconds p50": quantile(self.took_s, 0.5),
            "seconds p99": quantile(self.took_s, 0.99),
        }
        report.series = {
            "hops": self.hops,
            "requests": self.requests,
            "seconds": self.took_s,
        }
        clean = len(self.honest) == nodes
        goal = 0.999 if clean else 0.99
        report.expect(right >= goal, f"{right:.2%} of lookups were right, not {goal:.1%}")
        if clean:
            report.expect(hops <= 5, "a lookup takes more than 5 hops")
            report.expect(requests <= 40, "a lookup takes over 40 messages")
        return report


def _run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    return _Lookups(nodes, seed, options).report(nodes, seed)


SCENARIO = Scenario(
    "lookups",
    "lookups among silent and lying peers, against brute force",
    _run,
    nodes=1000,
    nodes_min=40,
    options={
        "lookups": 300,
        "silent": 0.07,  # shares of all machines
        "accomplices": 0.07,
        "inventors": 0.06,
        "loss": 0.0,
    },
)
