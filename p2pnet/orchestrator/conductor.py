"""One network in the hands of this orchestrator, from its first claim on. A pure core.

    read the log ─► plan ─► claim ─► allocate ─► ready ◄─► steps, cuts, heartbeats
                     ▲                              │
                     └──── anything wrong ──────────┘

Whatever goes wrong (a host gone, a step stuck, a refusal) is dealt with in one way,
which is also how a network begins and how it is taken over: look who is there, plan,
claim the next epoch, allocate everything under it, start from the last committed cut.
Nothing done under an older epoch can count afterwards, so nothing needs to be undone.
When the log has another orchestrator's newer claim, this one is over.

Where VNodes have standbys, one thing is spared: the way back to the cut. If everything is
still there, on the VNodes' own hosts or on standbys that have followed at every step,
hosts are asked to go on in memory from the last decided step ("live"). If any of them
cannot, it is the cut again. And where the states of the cut are lost, it is the cut before.

What goes on while the network is ready is `Training`'s; moves in good order are `Move`s.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from p2pnet.bounded import keep_latest
from p2pnet.core import Tick
from p2pnet.errors import RemoteError
from p2pnet.keys import KeyPair, short
from p2pnet.log.history import (
    History,
    check_entry,
    claims_left,
    new_claim,
    new_closing,
    open_charter,
)
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.asks import Ask, Asks
from p2pnet.orchestrator.desk import REASON_CHARS_MAX, Desk
from p2pnet.orchestrator.feeding import refused
from p2pnet.orchestrator.logbook import Entry
from p2pnet.orchestrator.moving import Move
from p2pnet.orchestrator.overview import Overview
from p2pnet.orchestrator.sightings import closed_by_owner
from p2pnet.orchestrator.standbys import count
from p2pnet.orchestrator.watching import LOOK_INTO_THE_LOG
from p2pnet.v1 import common_pb2, log_pb2
from p2pnet.vnode.graph import CompiledGraph

WAIT_S = 5.0  # for hosts, or for the log's keepers, before looking again
FUTILE_MAX = 3  # recoveries without a commit between; each is an entry of the log
BACKOFF_S = 0.05
BACKOFF_MAX_S = 60.0
IMPROVE_S = 30.0
KEEPER_GONE_S = 30.0
LIMITED_S = 60.0  # between looks whether the owner's limits allow more
WELL_S = 60.0
GONE_MAX = 10_000

STALE = common_pb2.REFUSAL_CODE_STALE_EPOCH
FAILED = common_pb2.REFUSAL_CODE_FAILED
CLOSED = common_pb2.REFUSAL_CODE_CLOSED
DRAINING = common_pb2.REFUSAL_CODE_DRAINING


class Phase(Enum):
    """How far the network is on its way to being ready."""

    READING = auto()
    PLANNING = auto()
    CLAIMING = auto()
    ALLOCATING = auto()
    READY = auto()
    WAITING = auto()  # to plan again
    OVER = auto()


class Conductor(Overview):
    """One network under this node's claim.

    Args:
        history: the network's log as far as it is known, perhaps not at all. It is
            changed here and by nobody else.
        states: those that the network was submitted with; of a network that is in the
            log already, its genesis says.
    """

    def __init__(
        self,
        key: KeyPair,
        history: History,
        manifest: common_pb2.Signed,
        graph: CompiledGraph,
        *,
        states: Mapping[str, common_pb2.BlobRef] | None = None,
    ) -> None:
        desk = Desk(
            key,
            history,
            manifest,
            open_charter(history.network_id, manifest),
            graph,
            dict(states or {}),
            trouble=self._trouble,
            log_is_free=self._write,
            alive={key.peer_id: None},
        )
        super().__init__(desk)
        self.phase = Phase.READING
        self._asks = Asks(desk)
        self._begin: m.Begin | None = None
        self._reason = ""
        self._noticed_at: float | None = None  # since when something is wrong
        self._futile = 0  # recoveries since the last commit
        self._tries = 0  # allocations in a row that were not agreed to
        self._plans: dict[m.Purpose, None] = {}  # that are being made
        self._setback = ""  # that steps were lost, and which, until there is a commit
        self._move: Move | None = None
        self._gone: dict[str, None] = {}  # members that are no more, and have not come back
        self._resume_at: float | None = None
        self._ready_at = 0.0
        self._improve_at = 0.0
        self._keepers_at: float | None = None  # when a lost keeper is replaced

    # The core

    def handle(self, event: m.Event, now: float) -> list[m.Effect]:
        """See `p2pnet.core.Core`."""
        desk = self._desk
        desk.now = now
        if self.phase is Phase.OVER:
            self._refuse(event)
        else:
            self._take(event)
        out, desk.out = desk.out, []
        return out

    def deadline(self) -> float | None:
        """See `p2pnet.core.Core`."""
        times = [self._resume_at, self._asks.deadline()]
        if self.phase is Phase.READY:
            times += [self._watch.at, self._improve_at, self._keepers_at]
            times.append(self._training.deadline())
        return min((at for at in times if at is not None), default=None)

    def check(self) -> None:
        """See `p2pnet.core.Core`."""
        self._training.check()
        assert self._desk.ready == (self.phase is Phase.READY)
        if self._desk.ready:
            assert sorted(self.placement) == sorted(self.graph.vnodes())
            for vnode, peers in self._desk.standbys.items():
                assert self.placement[vnode] not in peers
        if self.phase is Phase.ALLOCATING:
            assert self._agreement.pending
        if self.phase is Phase.OVER:
            assert not self._asks.any

    @property
    def _me(self) -> str:
        return self._desk.key.peer_id

    # Events

    def _take(self, event: m.Event) -> None:
        match event:
            case m.Begin():
                self._begin = event
                self._logbook.read()
            case m.LogRead():
                self._log_read(event)
            case m.LogSilent():
                self._log_silent(event.reason)
            case m.Appended():
                self._appended(event.entry)
            case m.NotAppended():
                self._not_appended(event.reason)
            case m.Planned():
                self._planned(event)
            case m.Allocated() | m.NotAllocated():
                self._answered(event)
            case m.HostReady():
                self._host_ready(event)
            case m.Beaten() | m.NotBeaten():
                if self._watch.take(event):
                    self._logbook.read()
            case m.Released():
                self._desk.hosts.released(event.host, event.heard)
            case m.MemberGone():
                self._member_gone(event)
            case m.MemberCame():
                self._member_came(event.peer_id)
            case m.CutAsked() | m.HostLeaves() | m.Resign() | m.CancelAsked():
                self._asked_for(event)
            case Tick():
                self._tick()
            case _:
                self._training.take(event)

    def _refuse(self, event: m.Event) -> None:
        """It is over: whoever still comes is told so."""
        code = CLOSED if self.state == "closed" else STALE
        match event:
            case m.FeederCame():
                self._desk.out.append(m.Tell(event.feeder, refused(code, self.detail)))
            case m.CutAsked() | m.HostLeaves() | m.Resign() | m.CancelAsked():
                self._desk.answer(event.ask, code, self.detail)
            case _:
                pass

    def _tick(self) -> None:
        now = self._desk.now
        self._asks.tick()
        if self._resume_at is not None and now >= self._resume_at:
            self._resume_at = None
            if self._begin is not None:
                self._logbook.read()
            else:
                self._plan()
        if self.phase is Phase.READY:
            self._training.tick()
        if self.phase is Phase.READY:
            self._watch.tick()
        if self.phase is Phase.READY and self._keepers_at is not None and now >= self._keepers_at:
            self._keepers_at = None
            self._look_after_keepers(patient=False)
        if self.phase is Phase.READY and now >= self._improve_at:
            self._improve_at = now + IMPROVE_S
            if self._move is None and not self._training.uncommitted:
                self._start_move(m.Purpose.IMPROVE, "a better placement")

    # The log

    def _log_read(self, event: m.LogRead) -> None:
        commit, states = self.history.commit, self.states
        if bad := self._logbook.was_read(event.entries):
            self._log_silent(bad)
        elif self.history.closing is not None:
            self._closed()
        elif self._begin is not None:
            self._begin_with_log(self._begin)
        elif self._is_lost(self.epoch):
            self._lost()
        elif self._has_committed_after(commit):
            self._committed(states)  # ours, of which we have not heard that it is in the log

    def _log_silent(self, reason: str) -> None:
        self._logbook.was_silent()
        if self._begin is None:
            return  # it was only looked into; commits and claims will tell
        self._logbook.waits()
        if self._begin.epoch == 0:
            self._over(FAILED, f"the network's log cannot be reached: {reason}")
        else:
            self._wait(f"the network's log cannot be read: {reason}")

    def _begin_with_log(self, begin: m.Begin) -> None:
        history = self.history
        if self._is_lost(begin.epoch):
            self._lost()
            return
        self._begin = None
        self._desk.placement = dict(history.placement)
        self._desk.standbys = dict(history.standbys)
        self._relocations.take_over(history)
        if history.epoch:
            self.taken_over = history.epoch + 1
            self._desk.note(
                "taken_over",
                epoch=self.taken_over,
                from_host=history.orchestrator,
                reason=begin.reason,
            )
        self._recover(begin.reason)

    def _is_lost(self, epoch: int) -> bool:
        """Whether the log has a claim after that epoch which is not ours."""
        history = self.history
        return history.epoch > epoch and history.orchestrator != self._me

    def _has_committed_after(self, commit: log_pb2.Commit | None) -> bool:
        """Whether the log's last commit is ours, and of a later step; a claim may undo one."""
        last = self.history.commit
        is_new = last is not None and (commit is None or last.step > commit.step)
        return is_new and self.history.orchestrator == self._me

    def _appended(self, winner: common_pb2.Signed) -> None:
        written = self._logbook.was_appended(winner)
        if isinstance(written, str):
            self._not_appended(written)
        elif written is None:
            pass
        elif self.history.closing is not None:
            self._closed()
        elif self._is_lost(written.epoch):
            self._lost()
        elif written.ours and written.void:
            self._over(FAILED, f"an entry of the log does not count: {written.void}")
        else:
            if self._has_committed_after(written.commit):
                self._committed(written.states)  # by this one, or one that we had given up
            if written.what is Entry.CLAIM and written.ours:
                self._claimed(winner)
            else:
                self._write()

    def _not_appended(self, reason: str) -> None:
        what = self._logbook.was_not_appended()
        if what is Entry.CLOSING:
            self._asks.closed(FAILED, f"the log cannot be written: {reason}")
        if what is Entry.COMMIT:
            self._training.not_committed(reason)
        if self.phase is Phase.CLAIMING:
            self._wait(reason)

    def _write(self) -> None:
        """The log is free for what waits for it, if it is."""
        if self._logbook.writing:
            return
        if self._asks.closing is not None:
            self._close(self._asks.closing[1])
        elif self.phase in (Phase.CLAIMING, Phase.READY):
            # What is stored already need not be done again: before a claim, too.
            commit = self._training.commit_entry()
            if commit is not None:
                self._logbook.append(Entry.COMMIT, commit)
            elif self.phase is Phase.CLAIMING:
                self._claim()

    def _committed(self, before: Mapping[str, common_pb2.BlobRef]) -> None:
        self._futile = 0
        self._desk.hosts.forgive()
        self._desk.lost.forget()
        if self._setback and self._desk.detail == self._setback:
            self._desk.detail = ""
        self._setback = ""
        self._training.committed(before)
        if self.phase is Phase.READY:
            self._move_on()
        if self.phase is Phase.READY:
            self._serve_asks()

    # From trouble to ready

    def _trouble(self, reason: str) -> None:
        """Something is wrong under the present epoch."""
        if self.phase is Phase.READY:
            self._recover(reason)

    def _recover(self, reason: str) -> None:
        if self._desk.ready and self._desk.now >= self._ready_at + WELL_S:
            self._futile = 0  # it went well for a while, commits or not
        self._interrupt(reason)
        if self.graph.replicas > 1:  # what VNodes have in memory is of the epoch that ends
            self._agreement.lives_from = self._desk.epoch
        self._futile += 1
        if lost_wait_s := self._lost_wait_s:
            self._wait(self._reason, lost_wait_s)
        elif self._futile > FUTILE_MAX:
            self.phase = Phase.WAITING
            backoff_s = BACKOFF_S * 2 ** min(self._futile - FUTILE_MAX + 1, 20)
            self._resume_at = self._desk.now + min(backoff_s, BACKOFF_MAX_S)
        else:
            self._plan()

    @property
    def _lost_wait_s(self) -> float:
        return self._desk.lost.wait_s(self._desk.committed_step, self._desk.now)

    def _interrupt(self, reason: str) -> None:
        desk = self._desk
        if self._noticed_at is None:
            self._noticed_at = desk.now
        self._reason = reason[:REASON_CHARS_MAX]
        self._move = None
        desk.ready = False
        desk.state = "recovering" if desk.placement else "placing"
        desk.note("recovering", reason=self._reason, epoch=desk.epoch)
        self._training.interrupt(self._reason)

    def _wait(self, reason: str, wait_s: float = WAIT_S) -> None:
        self.phase = Phase.WAITING
        self._desk.state, self._desk.detail = "waiting", reason
        self._resume_at = self._desk.now + wait_s
        self._desk.note("waiting", reason=reason)

    def _plan(self) -> None:
        self.phase = Phase.PLANNING
        self._make_plan(m.Purpose.PLACE, self._desk.hosts_now)

    def _make_plan(self, purpose: m.Purpose, probe: tuple[str, ...] = ()) -> None:
        desk = self._desk
        if purpose not in self._plans:
            self._plans[purpose] = None
            barred = desk.hosts.barred(desk.now)
            live = purpose is m.Purpose.PLACE and self._agreement.can_live
            desk.out.append(
                m.MakePlan(purpose, dict(desk.placement), barred, probe, desk.followers, live)
            )

    def _planned(self, event: m.Planned) -> None:
        desk = self._desk
        self._plans.pop(event.purpose, None)
        # A plan may be of a moment before somebody died, and nobody says so twice.
        there = [peer for peer in event.alive if peer not in self._gone]
        if there:
            desk.alive = dict.fromkeys((*there, desk.key.peer_id))
        for host in event.absent:
            desk.hosts.shun(host, desk.now)
        if event.purpose is not m.Purpose.PLACE:
            self._move_planned(event)
        elif self.phase is not Phase.PLANNING:
            return
        elif event.placement is None:
            if self.history.epoch == 0:
                self._over(FAILED, event.reason)
            else:
                self._wait(event.reason)
        elif not desk.well(event.placement):
            self._plan()  # somebody failed meanwhile
        else:
            self._agreement.choose(event.placement, event.standbys, live=event.live)
            self.phase = Phase.CLAIMING
            self._write()

    def _claim(self) -> None:
        desk = self._desk
        from_step = 0
        if desk.lost.certain(desk.committed_step, desk.now):
            before = desk.history.before
            from_step = 0 if before is None else int(before.step)
            if not from_step:
                self._give_up()
                return
        genesis = None
        if desk.history.next_slot == 1:
            genesis = log_pb2.Genesis(graph=desk.graph.to_json(), states=desk.submitted)
        entry = new_claim(
            desk.history,
            desk.key,
            desk.manifest,
            placement=self._agreement.placement,
            standbys=self._agreement.standbys,
            keepers=desk.next_keepers,
            reason=self._reason,
            genesis=genesis,
            from_step=from_step,
        )
        try:
            check_entry(entry, desk.history)
        except RemoteError as error:  # not granted, or more than the owner's limits allow
            if desk.epoch:
                self._wait(str(error), LIMITED_S)
            else:
                self._over(FAILED, str(error))
            return
        self._logbook.append(Entry.CLAIM, entry)

    def _give_up(self) -> None:
        """The last commit's states are lost, and there is no commit to go back to.

        Whoever had one of them may come back with it; till then nothing is tried.
        """
        desk = self._desk
        self.phase = Phase.WAITING
        self._resume_at = None
        why = f"a state of step {desk.committed_step} is lost, and nothing is before it"
        desk.state, desk.detail = "lost", f"{why}: {desk.lost.why}"
        desk.note("waiting", reason=desk.detail)
        self._training.end(FAILED, desk.detail)

    @property
    def _claims_left(self) -> bool:
        return claims_left(self.history, self._desk.charter.limits)

    def _claimed(self, entry: common_pb2.Signed) -> None:
        desk = self._desk
        desk.epoch = desk.history.epoch
        slot = len(desk.history.entries)
        desk.note("claimed", epoch=desk.epoch, slot=slot, reason=self._reason)
        self._note_rollback()
        self.phase = Phase.ALLOCATING
        self._agreement.ask(entry)

    def _note_rollback(self) -> None:
        desk = self._desk
        if not desk.history.claims[-1][1].from_step:
            return
        self._setback = f"back to step {desk.committed_step}: states of a later one are lost"
        if desk.lost.why:
            self._setback += f": {desk.lost.why}"
        desk.note("rolled_back", step=desk.committed_step, epoch=desk.epoch, reason=desk.lost.why)
        desk.lost.forget()

    def _answered(self, event: m.Allocated | m.NotAllocated) -> None:
        agreement = self._agreement
        if not agreement.awaits(event.host, event.epoch):
            return
        if isinstance(event, m.Allocated):
            was_last = agreement.accepted(event)
        else:
            was_last = agreement.refused(event.host, event.reason, event.code)
            if event.code in LOOK_INTO_THE_LOG:
                self._logbook.read()
        if was_last:
            self._all_answered()

    def _all_answered(self) -> None:
        if not self._agreement.why_not:
            self._placed()
            return
        self._agreement.fail()
        self._tries += 1  # each is an entry of the log
        wait_s = min(BACKOFF_S * 2 ** min(self._tries, 20), BACKOFF_MAX_S)
        self._wait(self._agreement.why_not, max(wait_s, self._lost_wait_s))

    def _placed(self) -> None:
        desk, agreement = self._desk, self._agreement
        since = desk.now if self._noticed_at is None else self._noticed_at
        self._relocations.note(desk, agreement.placement, self._reason, since)
        agreement.settle()
        self.phase = Phase.READY
        desk.ready = True
        desk.state, desk.detail = "ready", self._setback
        self._noticed_at, self._tries = None, 0
        self._ready_at = desk.now
        self._improve_at = desk.now + IMPROVE_S
        self._keepers_at = None
        self._watch.begin_epoch()
        desk.note("placed", epoch=desk.epoch, placement=dict(desk.placement))
        self._training.begin_epoch(live=agreement.live)
        if self.phase is Phase.READY:
            self._serve_asks()

    # Moves in good order

    def _start_move(self, purpose: m.Purpose, reason: str) -> None:
        if self._claims_left:
            self._move = Move(purpose, reason)
            self._make_plan(purpose)
        else:
            self._asks.nowhere_to_go("the owner allows no more claims")

    def _move_planned(self, event: m.Planned) -> None:
        desk, move = self._desk, self._move
        if move is None or move.purpose is not event.purpose or self.phase is not Phase.READY:
            return
        same = event.placement is not None and dict(event.placement) == desk.placement
        more = count(event.standbys) > count(desk.followers)
        if event.placement is None or (same and not more):
            self._move = None
            if event.purpose is m.Purpose.MOVE:
                self._asks.nowhere_to_go(event.reason)
        elif not desk.well(event.placement):
            self._move = None  # somebody failed meanwhile
            self._serve_asks()
        else:
            move.reason = event.reason or move.reason
            move.begin(dict(event.placement), dict(event.standbys), desk)

    def _host_ready(self, event: m.HostReady) -> None:
        move = self._move
        if move is None or self.phase is not Phase.READY:
            return
        if not move.host_ready(event, self._desk):
            if not move.given_up:
                self._make_plan(move.purpose)
                return
            self._move = None
            if move.purpose is m.Purpose.MOVE:
                self._asks.nowhere_to_go(event.error)
        elif move.cutting:
            self._training.last_cut(move.newcomers(self._desk))
            self._move_on()

    def _move_on(self) -> None:
        """Claims the placement of a move, once all that is decided is committed."""
        move = self._move
        if move is None or not move.cutting or self._training.undecided_work:
            return
        if not self._desk.well(move.placement):
            self._recover(move.reason)
            return
        self._agreement.choose(move.placement, move.standbys)
        self._interrupt(move.reason)
        self.phase = Phase.CLAIMING
        self._write()

    # Members

    def _member_gone(self, event: m.MemberGone) -> None:
        desk = self._desk
        desk.alive.pop(event.peer_id, None)
        keep_latest(self._gone, event.peer_id, None, GONE_MAX)
        reason = f"peer {short(event.peer_id)} {event.why}"
        if self.phase is Phase.ALLOCATING:
            if self._agreement.gone(event.peer_id, reason):
                self._all_answered()
        elif event.peer_id in desk.placement.values():
            self._trouble(reason)
        if self.phase is Phase.READY:
            desk.standby_gone(event.peer_id, event.why)
        self._look_after_keepers(patient=True)

    def _look_after_keepers(self, *, patient: bool) -> None:
        """Replaces keepers that are gone, before too few are left to replace any.

        Every entry does that by the way. A network that stands idle writes none, so a
        new claim is made, with everything where it is; `patient`: if they stay away.
        """
        desk = self._desk
        lost = desk.lost_keeper
        if not lost or self.phase is not Phase.READY:
            return
        if patient or not desk.log_has_majority:
            if self._keepers_at is None:
                self._keepers_at = desk.now + KEEPER_GONE_S
        elif self._training.feeding:
            self._training.cut_soon()
        elif self._move is None and self._claims_left:
            reason = f"keeper {short(lost)} of the log is gone"
            move = self._move = Move(m.Purpose.MOVE, reason, cutting=True)
            move.placement, move.standbys = dict(desk.placement), dict(desk.standbys)
            self._training.last_cut()
            self._move_on()

    def _member_came(self, peer_id: str) -> None:
        desk = self._desk
        desk.alive[peer_id] = None
        self._gone.pop(peer_id, None)
        desk.hosts.came(peer_id)
        if desk.state == "lost" and any(peer_id in ref.holders for ref in desk.states.values()):
            desk.lost.forget()
            self._resume_at = desk.now + BACKOFF_S
        if self.phase is Phase.WAITING and self._resume_at is not None:
            self._resume_at = min(self._resume_at, desk.now + BACKOFF_S)

    # What is asked for

    def _asked_for(self, event: Ask) -> None:
        self._asks.take(event)
        if isinstance(event, m.CancelAsked):
            self._write()
        elif self.phase is Phase.READY:
            self._serve_asks()
        elif self._asks.resigns and self.phase is not Phase.CLAIMING:
            self._resign()  # whoever comes next finds the log as it is

    def _serve_asks(self) -> None:
        """Does what was asked for, as far as it can be done now."""
        self._asks.serve_cuts(self._training)
        leaving = self._asks.serve_leaves()
        if self._asks.leaves and not leaving:  # it only keeps the log
            self._look_after_keepers(patient=False)
            return
        if leaving and (self._move is None or self._move.purpose is not m.Purpose.MOVE):
            self._start_move(m.Purpose.MOVE, f"peer {short(leaving)} is leaving")
        if self._asks.resigns and not leaving and self._move is None:
            self._training.last_cut()
            if self._asks.resigns and not self._training.undecided_work:
                self._resign()

    def _resign(self) -> None:
        self._asks.resigned()
        self._over(DRAINING, "its orchestrator has handed it over")

    def _close(self, cancellation: common_pb2.Signed) -> None:
        """Ends the log with the owner's cancellation."""
        desk = self._desk
        entry = new_closing(desk.history, desk.key, cancellation)
        try:
            check_entry(entry, desk.history)
        except RemoteError as error:
            self._asks.closed(common_pb2.REFUSAL_CODE_NOT_GRANTED, str(error))
            self._write()
            return
        self._logbook.append(Entry.CLOSING, entry)

    # The end

    def _lost(self) -> None:
        who = self.history.orchestrator
        self._over(STALE, f"another orchestrator, {short(who)}, has taken the network", who)

    def _closed(self) -> None:
        closing = self.history.closing
        assert closing is not None
        self._asks.closed()
        self._over(CLOSED, closed_by_owner(self.graph.name, closing.reason))

    def _over(self, code: common_pb2.RefusalCode, reason: str, orchestrator: str = "") -> None:
        desk = self._desk
        self.phase = Phase.OVER
        desk.ready = False
        desk.state = "closed" if code == CLOSED else "lost"
        desk.detail = reason
        self._resume_at = self._move = None
        self._agreement.forget()
        self._logbook.forget()
        self._training.end(STALE if code == DRAINING else code, reason)
        self._asks.refuse_all(code, reason)
        desk.out.append(m.Withdraw())
        if code in (CLOSED, STALE):  # our hosts may not have heard of it
            epoch = desk.history.epoch if code == CLOSED else desk.epoch
            desk.out += [m.Release(host, epoch) for host in desk.hosts_now]
        desk.note("closed" if code == CLOSED else "over", reason=reason, peer=orchestrator)
        desk.out.append(m.Over(code, reason, orchestrator))
