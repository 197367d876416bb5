"""The shipped tenancy and step cores on a simulated machine: what `vnode/shell.py` does. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from p2pnet.core import Core, Tick
from p2pnet.keys import ACCEPTANCE, sha256
from p2pnet.sim.calls import Calls
from p2pnet.sim.compute import initial
from p2pnet.sim.connections import Later
from p2pnet.sim.crew import Crew, Followed, Following, Hop, Loading
from p2pnet.sim.driver import Driver
from p2pnet.sim.hints import Hints
from p2pnet.sim.log_client import WasRead
from p2pnet.sim.machine import Machine
from p2pnet.v1 import common_pb2, orchestrator_pb2, pnode_pb2, records_pb2, vnode_pb2
from p2pnet.vnode import tenancy_events as te
from p2pnet.vnode.admission import Limits
from p2pnet.vnode.blob_ages import BlobAges
from p2pnet.vnode.messages import Arrival, Decided
from p2pnet.vnode.network import refusal
from p2pnet.vnode.tenancy import Tenancy

MEMORY_BYTES = 1 << 30
HOP_TIMEOUT_S = 5.0
REPORT_TIMEOUT_S = 5.0
BLOB_TIMEOUT_S = 3.0
_TRIES = 5
_BUSY_PAUSE_S = 0.05
_KNOWN, _BLOBS = "standings", "blobs"

# reads a log, then tells the entries, or None and why not
LogReading = Callable[[te.ReadLog, WasRead], None]
# (vnode, host, epoch, claimant): a host has agreed to host
AcceptWatcher = Callable[[str, str, str, int, str], None]
# (network, host, vnode, step, digest): a host has stored a state
SaveWatcher = Callable[[str, str, str, int, bytes], None]

_CODE = 60


class HostNode(Driver[te.Event, te.Effect]):
    """One PNode that hosts. What it knows of logs, and its blobs, survive its process.

    `compute_s`: what each piece of work of a VNode takes.
    """

    def __init__(
        self,
        machine: Machine,
        calls: Calls,
        hints: Hints,
        read_log: LogReading,
        *,
        compute_s: float = 0.01,
    ) -> None:
        super().__init__(machine)
        self.compute_s = compute_s
        self.accept_watchers: list[AcceptWatcher] = []
        self.save_watchers: list[SaveWatcher] = []
        self.core: Tenancy
        self._calls = calls
        self._hints = hints
        self._read_log = read_log
        methods = calls.methods
        methods["PNode/Allocate"] = self._allocate
        methods["PNode/Ready"] = self._ready
        methods["PNode/Heartbeat"] = self._heartbeat
        methods["PNode/Drop"] = self._drop
        methods["PNode/Describe"] = lambda caller, request: pnode_pb2.DescribeReply()
        methods["VNode/Train"] = self._train
        methods["VNode/Follow"] = self._follow
        methods["VNode/Save"] = self._save
        methods["Blob/Put"] = self._put
        methods["Blob/Get"] = self._get
        methods["Blob/Retain"] = self._retain
        machine.on_boot.append(self.boot)
        self.boot()

    def boot(self) -> None:
        """A process begins with what the disk holds."""
        machine = self.machine
        limits = Limits(machine.peer_id, MEMORY_BYTES)
        self.core = Tenancy.load(limits, machine.disk.get(_KNOWN, {}))
        self.crews: dict[str, Crew] = {}
        self._following: dict[str, Following] = {}
        # Of networks whose claim is over: a newer one may go on from there.
        self._kept: dict[str, tuple[Crew | None, Following | None]] = {}
        self._cannot: dict[str, str] = {}  # why a network could not go on from memory
        self._ages = BlobAges(dict.fromkeys(self.blobs, machine.now))
        self._locations: dict[str, dict[str, str]] = {}
        self._asks: dict[int, Callable[[common_pb2.Refusal | None], None]] = {}
        self._ask = 0
        self.booted()

    @property
    def blobs(self) -> dict[bytes, bytes]:
        """The states on this disk, by digest."""
        disk: dict[bytes, bytes] = self.machine.disk.setdefault(_BLOBS, {})
        return disk

    def _keep(self, network_id: str, state: bytes) -> bytes:
        digest = sha256(state)
        self.blobs[digest] = state
        self._ages.put(network_id, digest, self.machine.now)
        return digest

    # Calls of the orchestrator

    def _allocate(self, caller: str, request: pnode_pb2.AllocateRequest) -> Later:
        def reply(no: common_pb2.Refusal | None) -> pnode_pb2.AllocateReply:
            if no is None and (why := self._cannot.get(request.network_id)):
                no = refusal("REFUSAL_CODE_FAILED", why)
            if no is not None:
                return pnode_pb2.AllocateReply(refusal=no)
            return pnode_pb2.AllocateReply(
                acceptances=[self._accept(request, caller, vnode) for vnode in request.vnodes]
            )

        wall_ms = self.machine.wall_ms
        return self._asked(lambda ask: te.AllocateAsked(ask, caller, request, wall_ms), reply)

    def _ready(self, caller: str, request: pnode_pb2.ReadyRequest) -> Later:
        later = Later()

        def fetched(no: common_pb2.Refusal | None) -> None:
            if no is not None or not request.states:
                later.answer(pnode_pb2.ReadyReply(refusal=no))
                return
            waiting = dict.fromkeys(sorted(request.states))
            missing: list[str] = []

            def have(vnode: str, state: bytes | None, why: str) -> None:
                waiting.pop(vnode)
                if state is None:
                    missing.append(why)
                if not waiting:
                    failed = refusal("REFUSAL_CODE_FAILED", missing[0]) if missing else None
                    later.answer(pnode_pb2.ReadyReply(refusal=failed))

            for vnode in list(waiting):
                self._fetch(request.network_id, request.states[vnode], partial(have, vnode))

        wall_ms = self.machine.wall_ms
        self._hand(lambda ask: te.ReadyAsked(ask, caller, request, wall_ms), fetched)
        return later

    def _heartbeat(self, caller: str, request: pnode_pb2.HeartbeatRequest) -> Later:
        def reply(no: common_pb2.Refusal | None) -> pnode_pb2.HeartbeatReply:
            if no is not None:
                return pnode_pb2.HeartbeatReply(refusal=no)
            return pnode_pb2.HeartbeatReply(vnodes=self.rows(request.network_id))

        return self._asked(lambda ask: te.HeartbeatCame(ask, caller, request), reply)

    def _drop(self, caller: str, request: pnode_pb2.DropRequest) -> Later:
        return self._asked(
            lambda ask: te.DropAsked(ask, caller, request),
            lambda no: pnode_pb2.DropReply(refusal=no),
        )

    def _save(self, caller: str, request: vnode_pb2.SaveRequest) -> Any:
        network_id = request.network_id
        if no := self.core.refuse_caller(network_id, caller, request.epoch):
            return vnode_pb2.SaveReply(refusal=no)
        later = Later()
        refs: dict[str, common_pb2.BlobRef] = {}

        def stored(vnode: str, ref: common_pb2.BlobRef | None, why: str) -> None:
            if ref is None:
                failed = refusal("REFUSAL_CODE_FAILED", why)
                later.answer(vnode_pb2.SaveReply(refusal=failed))
                return
            refs[vnode] = ref
            if len(refs) == len(request.vnodes):
                later.answer(vnode_pb2.SaveReply(states=refs))

        def saved(states: Mapping[str, bytes] | None, why: str) -> None:
            for vnode in request.vnodes:
                state = None if states is None else states.get(vnode)
                self._saved(request, vnode, stored, state, why)

        crew = self.crews.get(network_id)
        if crew is None:
            saved(None, "its VNodes are not here")
        else:
            crew.save(request.step, tuple(request.norms), saved)
        return later

    def _saved(
        self,
        request: vnode_pb2.SaveRequest,
        vnode: str,
        stored: Callable[[str, common_pb2.BlobRef | None, str], None],
        state: bytes | None,
        why: str,
    ) -> None:
        """Keeps a state and has it copied; one copy elsewhere is enough, where others are."""
        if state is None:
            stored(vnode, None, why)
            return
        digest, me = self._keep(request.network_id, state), self.peer_id
        for watcher in self.save_watchers:
            watcher(request.network_id, me, vnode, int(request.step), digest)
        ref = common_pb2.BlobRef(digest=digest, size_bytes=len(state), holders=[me])
        waiting = dict.fromkeys(request.copy_to)

        def copied(peer: str, reply: Any) -> None:
            waiting.pop(peer)
            if reply is not None:
                ref.holders.append(peer)
            if not waiting:
                enough = len(ref.holders) > 1 or not request.copy_to
                stored(vnode, ref if enough else None, "no peer took a copy")

        if not waiting:
            stored(vnode, ref, "")
        for peer in list(waiting):
            self._calls.call(
                peer,
                "Blob/Put",
                (request.network_id, state),
                timeout_s=BLOB_TIMEOUT_S,
                done=partial(copied, peer),
            )

    def rows(self, network_id: str) -> list[pnode_pb2.HostedVNode]:
        """What is hosted of a network."""
        crew = self.crews.get(network_id)
        if crew is None:
            return []
        return [
            pnode_pb2.HostedVNode(
                network_id=network_id,
                vnode=vnode,
                epoch=crew.epoch,
                step=crew.step,
                instantiated=crew.instantiated,
                error=crew.error,
            )
            for vnode in crew.vnodes
        ]

    # Blobs

    def _put(self, caller: str, request: tuple[str, bytes]) -> vnode_pb2.BlobPutReply:
        self._keep(*request)
        return vnode_pb2.BlobPutReply()

    def _get(self, caller: str, request: vnode_pb2.BlobGetRequest) -> bytes:
        """The state; b"" where it is not here."""
        return self.blobs.get(request.digest, b"")

    def _retain(self, caller: str, request: vnode_pb2.RetainRequest) -> Later:
        def retain(no: common_pb2.Refusal | None) -> vnode_pb2.RetainReply:
            if no is None:
                now = self.machine.now
                for digest in self._ages.retain(request.network_id, request.digests, now):
                    del self.blobs[digest]
            return vnode_pb2.RetainReply(refusal=no)

        return self._asked(
            lambda ask: te.ClaimShown(ask, caller, request.network_id, request.claim), retain
        )

    def _fetch(
        self, network_id: str, ref: common_pb2.BlobRef, done: Callable[[bytes | None, str], None]
    ) -> None:
        here = self.blobs.get(ref.digest)
        if here is not None:
            done(here, "")
            return
        holders = [holder for holder in ref.holders if holder != self.peer_id]

        def ask() -> None:
            if not holders:
                done(None, "none of its holders has the state")
                return
            holder = holders.pop(0)
            self._calls.call(
                holder,
                "Blob/Get",
                vnode_pb2.BlobGetRequest(digest=ref.digest),
                timeout_s=BLOB_TIMEOUT_S,
                done=got,
            )

        def got(state: bytes | None) -> None:
            if state and sha256(state) == ref.digest:
                self._keep(network_id, state)
                done(state, "")
            else:
                ask()

        ask()

    # VNodes

    def _train(self, caller: str, hop: Hop) -> vnode_pb2.HopReply:
        event, crew = hop.event, self.crews.get(hop.network_id)
        if isinstance(event, Decided):
            vnode = crew.vnodes[0] if crew is not None else ""
        else:
            vnode = event.node if crew is None else crew.graph.home(event.node)
        no = self.core.refuse(hop.network_id, event.epoch, vnode, self._now_here())
        if no is None and crew is None:
            no = refusal("REFUSAL_CODE_NOT_HOSTED", f"this peer does not run {vnode}")
        if no is None and crew is not None:
            no = crew.take(event)
        return vnode_pb2.HopReply(refusal=no)

    def _follow(self, caller: str, followed: Followed) -> vnode_pb2.HopReply:
        no = self.core.refuse(
            followed.network_id, followed.epoch, followed.vnode, self._now_here(), following=True
        )
        following = self._following.get(followed.network_id)
        if no is None and (following is None or followed.vnode not in following.vnodes):
            no = refusal("REFUSAL_CODE_NOT_HOSTED", f"this peer does not follow {followed.vnode}")
        if no is None and following is not None:
            no = following.follow(followed)
        return vnode_pb2.HopReply(refusal=no)

    def load(self, who: Loading, vnode: str, done: Callable[[bytes | None, str], None]) -> None:
        """See `Surroundings`."""
        if vnode in who.begins_with:
            self._fetch(who.network_id, who.begins_with[vnode], done)
        else:
            done(initial(who.graph.seed, vnode), "")

    def follow(self, standby: str, followed: Followed, done: Callable[[bool], None]) -> None:
        """See `Surroundings`."""
        self._calls.call(
            standby,
            "VNode/Follow",
            followed,
            timeout_s=HOP_TIMEOUT_S,
            done=lambda reply: done(reply is not None and not reply.HasField("refusal")),
        )

    def hop(self, crew: Crew, arrival: Arrival, done: Callable[[], None]) -> None:
        """See `Surroundings`: as `vnode/courier.py` does it."""
        self._hop(crew, arrival, done, 0)

    def _hop(self, crew: Crew, arrival: Arrival, done: Callable[[], None], tries: int) -> None:
        network_id, to = crew.network_id, crew.graph.home(arrival.node)
        known = self._locations.get(network_id, {})
        host = known.get(to) or self._look_up(network_id, to, crew.epoch)
        if crew.closed:
            return
        if not host or tries >= _TRIES:
            crew.trouble(arrival.step, host or "", f"{to} is not to be found")
            return

        def again(delay_s: float) -> None:
            self.machine.after(delay_s, self._hop, crew, arrival, done, tries + 1)

        def answered(reply: vnode_pb2.HopReply | None) -> None:
            if crew.closed:
                return
            if reply is None:
                crew.trouble(arrival.step, host, f"{to}: its host does not answer")
                return
            if not reply.HasField("refusal"):
                done()
                return
            no = reply.refusal
            stale = (
                common_pb2.REFUSAL_CODE_STALE_EPOCH,
                common_pb2.REFUSAL_CODE_UNKNOWN_EPOCH,
            )
            if no.code in stale and no.epoch > crew.epoch:
                return  # the network has moved on
            if no.code == common_pb2.REFUSAL_CODE_BUSY:  # it is there: it is waited for
                self.machine.after(_BUSY_PAUSE_S, self._hop, crew, arrival, done, tries)
            elif no.code in stale:
                again(_BUSY_PAUSE_S * 2**tries)
            elif no.code == common_pb2.REFUSAL_CODE_NOT_HOSTED:
                known.pop(to, None)
                if no.host and no.epoch >= crew.epoch:
                    known[to] = no.host
                again(_BUSY_PAUSE_S * 2**tries)
            else:
                crew.trouble(arrival.step, host, no.detail)

        self._calls.call(
            host,
            "VNode/Train",
            Hop(network_id, arrival),
            timeout_s=HOP_TIMEOUT_S,
            done=answered,
        )

    def _look_up(self, network_id: str, vnode: str, epoch: int) -> str:
        found = self._hints.get(self.machine, f"{network_id}/{vnode}")
        return found[0] if found is not None and found[1] == epoch else ""

    def tell(self, crew: Crew, report: orchestrator_pb2.ReportRequest) -> None:
        """See `Surroundings`."""
        self._calls.call(
            crew.claimant,
            "Orchestrator/Report",
            report,
            timeout_s=REPORT_TIMEOUT_S,
            done=lambda reply: None,  # it notices a step that stands still by itself
        )

    # The core

    def _driven(self) -> Core[te.Event | Tick, te.Effect]:
        return self.core

    def _carry_out(self, effect: te.Effect) -> None:
        match effect:
            case te.ReadLog():
                self._read_log(effect, partial(self._log_read, effect.network_id))
            case te.Persist(network_id, data):
                disk = self.machine.disk.setdefault(_KNOWN, {})
                if data is None:
                    disk.pop(network_id, None)
                else:
                    disk[network_id] = data
            case te.Begin():
                self._begin(effect)
            case te.End(network_id=network_id, keep=keep):
                self._end(network_id, keep)
            case te.Reply(ask, no):
                self._asks.pop(ask)(no)

    def _log_read(
        self, network_id: str, entries: tuple[common_pb2.Signed, ...] | None, why: str
    ) -> None:
        event: te.Event
        if entries is None:
            event = te.LogSilent(network_id, why)
        else:
            event = te.LogRead(network_id, entries)
        self.hand_in(event, _CODE, b"%d" % len(entries or ()))

    def _begin(self, effect: te.Begin) -> None:
        tenant, graph, request = effect.tenant, effect.offer.graph, effect.request
        network_id = tenant.network_id
        kept = self._kept.pop(network_id, (None, None))
        self._end(network_id, keep=False)
        self._cannot.pop(network_id, None)
        self._locations[network_id] = {
            location.vnode: location.host for location in request.locations if not location.standby
        }
        live_step = int(request.live_step) if effect.live else 0
        adopted = None
        if live_step:
            vnodes = (*tenant.sizes, *tenant.following)
            adopted = self._adopt(kept, vnodes, live_step, tuple(request.norms))
            if adopted is None:
                self._cannot[network_id] = f"this peer cannot go on from step {live_step}"
                return
        base_step = live_step or int(request.step)
        if tenant.sizes:
            self.crews[network_id] = Crew(
                self.machine,
                network_id,
                tenant.claimant,
                graph,
                tuple(tenant.sizes),
                epoch=tenant.epoch,
                base_step=base_step,
                states=request.states,
                standbys=effect.offer.standbys,
                adopted=None if adopted is None else {v: adopted[v] for v in tenant.sizes},
                around=self,
                compute_s=self.compute_s,
            )
        if tenant.following:
            self._following[network_id] = Following(
                network_id,
                graph,
                tuple(tenant.following),
                epoch=tenant.epoch,
                base_step=base_step,
                states=request.states,
                adopted=None if adopted is None else {v: adopted[v] for v in tenant.following},
                around=self,
            )

    def _adopt(
        self,
        kept: tuple[Crew | None, Following | None],
        vnodes: tuple[str, ...],
        step: int,
        norms: tuple[float, ...],
    ) -> dict[str, bytes] | None:
        """The states after a step out of what ran here before; None: not all are to be had."""
        crew, following = kept
        states: dict[str, bytes] = {}
        for vnode in vnodes:
            state = None
            if crew is not None and vnode in crew.vnodes:
                state = crew.give(vnode, step, norms[-1] if norms else 0.0)
            elif following is not None and vnode in following.vnodes:
                state = following.give(vnode, step, norms)
            if state is None:
                return None
            states[vnode] = state
        return states

    def _end(self, network_id: str, keep: bool) -> None:
        crew = self.crews.pop(network_id, None)
        following = self._following.pop(network_id, None)
        if crew is not None:
            crew.close()
        if not keep:
            self._kept.pop(network_id, None)
        elif crew is not None or following is not None:
            self._kept[network_id] = crew, following

    # Small things

    def _asked(
        self,
        event: Callable[[int], te.Event],
        reply: Callable[[common_pb2.Refusal | None], Any],
    ) -> Later:
        later = Later()
        self._hand(event, lambda no: later.answer(reply(no)))
        return later

    def _hand(
        self, event: Callable[[int], te.Event], then: Callable[[common_pb2.Refusal | None], None]
    ) -> None:
        self._ask += 1
        self._asks[self._ask] = then
        made = event(self._ask)
        self.hand_in(made, _CODE, type(made).__name__.encode())

    def _now_here(self) -> float:
        return max(self._now, self.machine.now)

    def _accept(
        self, request: pnode_pb2.AllocateRequest, claimant: str, vnode: str
    ) -> common_pb2.Signed:
        allocation = records_pb2.Allocation(
            network_id=request.network_id,
            vnode=vnode,
            host=self.peer_id,
            epoch=request.epoch,
            claimant=claimant,
            role="primary",
            lease_s=request.lease_s,
            manifest=request.manifest,
            standbys=self.crews[request.network_id].standbys.get(vnode, ()),
        )
        for watcher in self.accept_watchers:
            watcher(request.network_id, vnode, self.peer_id, int(request.epoch), claimant)
        return self.machine.key.sign(ACCEPTANCE, allocation.SerializeToString(deterministic=True))
