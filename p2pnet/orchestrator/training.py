"""The steps, cuts and commits of an orchestrated network, and who feeds it. Pure.

A part of `Conductor`, and of no use without one: what is wrong is said to the desk.
"""

from __future__ import annotations

from collections.abc import Mapping

from p2pnet.core import Tick
from p2pnet.errors import RemoteError
from p2pnet.log.history import check_entry, new_commit
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.cuts import Cuts
from p2pnet.orchestrator.desk import REASON_CHARS_MAX, Desk
from p2pnet.orchestrator.feeding import Feeder, TrainEvent, refused
from p2pnet.orchestrator.ledger import (
    Cut,
    CutWanted,
    Decide,
    EndOfData,
    Finished,
    NotFinite,
    Reported,
    Saved,
    Stalled,
    StepLedger,
    Unsaved,
)
from p2pnet.orchestrator.ledger import Event as LedgerEvent
from p2pnet.v1 import common_pb2, orchestrator_pb2
from p2pnet.vnode.draft import LOCAL

COMMIT_RETRY_S = 2.0
CUT_RETRY_S = 5.0  # after a host had no room for its states
BAD_REQUEST = common_pb2.REFUSAL_CODE_BAD_REQUEST
BUSY = common_pb2.REFUSAL_CODE_BUSY
FAILED = common_pb2.REFUSAL_CODE_FAILED
STATE_LOST = common_pb2.REFUSAL_CODE_STATE_LOST
NO_MEMORY = common_pb2.REFUSAL_CODE_NO_MEMORY

Event = (
    m.ReportArrived | m.Stored | m.NotStored
    | m.FeederCame | m.FeederLeft | m.FeederEnds | m.FeederFailed
)  # fmt: skip


class Training:
    """What goes on in a network while it is placed.

    Attributes:
        uncommitted: why the log takes no commits; "" where it does.
        steps_decided, step_bytes: counted over this orchestrator's time.
    """

    def __init__(self, desk: Desk) -> None:
        self.feeder = Feeder()
        self.uncommitted = ""
        self.steps_decided = 0
        self.step_bytes = 0
        self._desk = desk
        self._cuts = Cuts()
        self._ledger = self._new_ledger()
        self._finishing: int | None = None  # the step after which the feeder is done
        self._goes_back = False  # to the last cut, when nothing is on its way into the log
        self._retry_at: float | None = None
        self._cut_again_at: float | None = None
        self._going_to: tuple[str, ...] = ()  # hosts that VNodes move to after the next cut

    def take(self, event: Event) -> None:
        """What hosts, VNodes and feeders say."""
        match event:
            case m.ReportArrived():
                self._reported(event)
            case m.Stored():
                self._stored(event)
            case m.NotStored():
                self._not_stored(event)
            case m.FeederCame():
                self._feeder_came(event)
            case m.FeederLeft():
                self._feeder_left(event.feeder)
            case m.FeederEnds():
                if event.feeder == self.feeder.stream:
                    self.feeder.last_step = event.last_step
                    if self._desk.ready and not self.feeder.waits:
                        self._feed(EndOfData(event.last_step))
            case m.FeederFailed():
                if event.feeder == self.feeder.stream and event.epoch == self._desk.epoch:
                    if event.host in self._desk.placement.values():
                        self._desk.hosts.blame(event.host, "", self._desk.now)
                    self._desk.trouble(event.reason)

    def tick(self) -> None:
        """The time that `deadline` named has come; the network is ready."""
        now = self._desk.now
        due = self._ledger.deadline()
        if due is not None and now >= due:
            self._feed(Tick())
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            self._desk.log_is_free()
        if self._cut_again_at is not None and now >= self._cut_again_at:
            self._cut_again_at = None
            self._feed(CutWanted())

    def deadline(self) -> float | None:
        """When a tick is wanted, while the network is ready."""
        times = (self._ledger.deadline(), self._retry_at, self._cut_again_at)
        return min((at for at in times if at is not None), default=None)

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        self._ledger.check()
        if self._desk.ready:
            assert self._ledger.epoch == self._desk.epoch
            assert self._desk.committed_step <= self._ledger.decided

    @property
    def step(self) -> int:
        """The last decided step."""
        return self._ledger.decided

    @property
    def undecided_work(self) -> bool:
        """Whether something is decided, or on its way, that the log does not have."""
        return self._ledger.decided > self._desk.committed_step or self._cuts.busy

    @property
    def live_step(self) -> int:
        """The decided step that VNodes may go on from in memory; 0: the cut is as good.

        Asked after an epoch has ended, and before the next one begins. Standbys have
        followed at every decided step, since a VNode reports none before they have.
        """
        step = self._ledger.decided
        return step if step > self._desk.committed_step else 0

    @property
    def norms(self) -> tuple[float, ...]:
        """Of the last decided steps, the newest last, where the network clips."""
        return self._ledger.norms

    @property
    def feeding(self) -> bool:
        """Whether batches come in."""
        return self.feeder.here and not self.feeder.waits

    # What the conductor does with it

    def begin_epoch(self, *, live: bool = False) -> None:
        """Every host has agreed: from the last cut on, or `live` from the last decided step."""
        self.uncommitted = ""
        self.feeder.dirty = self._goes_back = False
        self._finishing = self._retry_at = self._cut_again_at = None
        self._going_to = ()
        self._ledger = self._new_ledger(live=live)
        if self.feeder.here and not (live and self.feeder.waits):
            self._feeder_may_begin(live=live)
        if live:
            # A standby that has stepped in has nobody behind it, so this is made safe at
            # once. A feeder that has come meanwhile waits for it: it has not heard of these
            # steps.
            self._feed(CutWanted(last=not self.feeding))

    def interrupt(self, reason: str) -> None:
        """The epoch ends; what is stored may still be committed, before the next claim."""
        self._cuts.forget_storing()
        self._retry_at = None
        recovering = orchestrator_pb2.Recovering(reason=reason)
        self._desk.out += self.feeder.tell(TrainEvent(recovering=recovering))

    def end(self, code: common_pb2.RefusalCode, reason: str) -> None:
        """This orchestrator is done with the network."""
        self._desk.out += self.feeder.refuse(code, reason)
        self.feeder.leaves()

    def last_cut(self, going_to: tuple[str, ...] = ()) -> None:
        """Nothing is decided after the next cut, which is made at once; `going_to` get copies."""
        self._going_to = going_to
        self._feed(CutWanted(last=True))

    def cut_soon(self) -> None:
        """A cut as soon as there is something to store, and steps go on."""
        self._feed(CutWanted())

    def cut_now(self) -> None:
        """A cut of the present state, where none is under way."""
        if self._cuts.busy:
            return
        if self._ledger.decided > self._desk.committed_step:
            self._feed(CutWanted())
        else:
            self._begin_cut(self._ledger.decided, None)

    def commit_entry(self) -> common_pb2.Signed | None:
        """What is to be written into the log, if anything is; it would count."""
        desk, cut = self._desk, self._cuts.stored
        if cut is None or self._retry_at is not None:
            return None
        mine = desk.history.orchestrator == desk.key.peer_id
        if not mine or not cut.epoch == desk.epoch == desk.history.epoch:
            self._cuts.forget_stored()
            return None
        result = cut.result
        entry = new_commit(
            desk.history,
            desk.key,
            cut.step,
            cut.states,
            result=None if result is None else (result.loss, result.correct, result.samples),
            keepers=desk.next_keepers,
        )
        try:
            check_entry(entry, desk.history)
        except RemoteError as error:  # the log has it already, or can never have it
            desk.note("cut_dropped", step=cut.step, reason=str(error))
            self._cuts.forget_stored()
            return None
        return entry

    def committed(self, before: Mapping[str, common_pb2.BlobRef]) -> None:
        """The log has a new commit of ours, in the place of one with the states `before`."""
        desk, step = self._desk, self._desk.committed_step
        if self._cuts.stored is not None and self._cuts.stored.step <= step:
            self._cuts.forget_stored()
        if self.uncommitted:
            self.uncommitted = ""
            if desk.ready:
                desk.state, desk.detail = "training" if self.feeding else "ready", ""
        slot, _ = desk.history.claims[-1]
        claim = desk.history.entry(slot)
        assert claim is not None
        desk.out.append(m.Retain(*self._cuts.to_retain(before, desk.states), claim))
        committed = orchestrator_pb2.Committed(step=step)
        desk.out += self.feeder.tell(TrainEvent(committed=committed))
        desk.note("committed", step=step, epoch=desk.epoch, slot=len(desk.history.entries))
        self._finish()
        if desk.ready and self._goes_back and not self._cuts.busy:
            self._go_back()
        if desk.ready and self.feeder.waits and not self.undecided_work:
            self._feeder_may_begin()

    def not_committed(self, reason: str) -> None:
        """The log has no majority: steps go on, and count when it has one again."""
        desk = self._desk
        self._retry_at = desk.now + COMMIT_RETRY_S
        if not desk.ready:
            self._retry_at = None  # the next claim asks for it first
            return
        self._is_uncommitted(reason)

    def _is_uncommitted(self, reason: str) -> None:
        desk = self._desk
        if not self.uncommitted:
            desk.note("uncommitted", reason=reason, step=desk.committed_step)
            self.uncommitted = reason
            self._tell_uncommitted()
        self.uncommitted = reason
        desk.state = "uncommitted"
        desk.detail = f"steps after {desk.committed_step} would be lost with a host: {reason}"

    # Steps

    def _new_ledger(self, *, live: bool = False) -> StepLedger:
        desk, graph = self._desk, self._desk.graph
        return StepLedger(
            vnodes=tuple(graph.vnodes()),
            loss=graph.loss.id,
            epoch=desk.epoch,
            step=desk.committed_step,
            cut_every=graph.cut_every,
            window=graph.window,
            local=graph.learning == LOCAL,
            clips=graph.clip_norm > 0,
            norms_kept=graph.staleness + 1,
            last=self._ledger.last if live else None,
            norms=self._ledger.norms if live else (),
        )

    def _feed(self, event: LedgerEvent) -> None:
        for effect in self._ledger.handle(event, self._desk.now):
            match effect:
                case Decide():
                    self.steps_decided += 1
                    self._desk.lost.forget()  # every VNode has its state
                    self._tell_decided(effect)
                    self._desk.note("decided", step=effect.step, epoch=self._desk.epoch)
                case Cut():
                    self._begin_cut(effect.step, effect.decided)
                case Finished():
                    self._finishing = effect.step
                    self._finish()
                case NotFinite():
                    self._is_bad(f"step {effect.step}: its gradients have no finite norm")
                case Stalled():
                    missing = ", ".join(effect.missing)
                    self._desk.trouble(f"step {effect.step} stands still: nothing from {missing}")

    def _reported(self, event: m.ReportArrived) -> None:
        desk, report = self._desk, event.report
        self.step_bytes += event.size_bytes
        if report.id.epoch != desk.epoch or not desk.ready:
            return
        vnodes = tuple(report.vnodes) or (report.vnode,)
        if any(desk.placement.get(vnode) != event.caller for vnode in vnodes):
            return  # a host that lost the VNode meanwhile, or somebody who never had it
        if report.HasField("held"):
            held = report.held
            # Late or doubled, a report still says who has not followed.
            mine = [v for v in held.unfollowed if desk.placement.get(v) == event.caller]
            desk.unfollow(mine, f"step {report.id.step} did not reach every standby")
            self._feed(
                Reported(
                    vnodes,
                    desk.epoch,
                    report.id.step,
                    held.loss,
                    held.correct,
                    held.samples,
                    tuple(held.squares),
                )
            )
            return
        reason = report.trouble.reason[:REASON_CHARS_MAX]
        if report.trouble.bad_input:
            self._is_bad(reason)
            return
        if report.trouble.state_lost:
            desk.lost.said(desk.committed_step, desk.epoch, f"{report.vnode}: {reason}", desk.now)
        elif not report.trouble.host:  # its own failure
            desk.hosts.shun(event.caller, desk.now)
        elif report.trouble.host in desk.placement.values():
            desk.hosts.blame(report.trouble.host, event.caller, desk.now)
        desk.trouble(f"{report.vnode}: {reason}")

    def _is_bad(self, reason: str) -> None:
        """What is fed can never be right: no use in trying again."""
        self.feeder.dirty = True
        self._desk.out += self.feeder.refuse(BAD_REQUEST, reason)

    # Cuts

    def _begin_cut(self, step: int, result: Decide | None) -> None:
        desk = self._desk
        barred, norms = desk.hosts.barred(desk.now), self._ledger.norms
        for host, vnodes in self._cuts.begin(desk.placement, desk.epoch, step, result).items():
            desk.out.append(m.Store(host, desk.epoch, step, vnodes, self._going_to, barred, norms))

    def _stored(self, event: m.Stored) -> None:
        if not self._desk.ready:
            return
        try:
            cut = self._cuts.take(event)
        except ValueError as error:
            self._desk.hosts.shun(event.host, self._desk.now)
            self._not_stored(m.NotStored(event.host, event.epoch, event.step, str(error)))
            return
        if cut is not None:
            self._feed(Saved(cut.step))
            self._desk.log_is_free()

    def _not_stored(self, event: m.NotStored) -> None:
        if self._cuts.is_for(event.epoch, event.step):
            if event.code == NO_MEMORY:
                # A new epoch would find no more room, and lose the steps since the last cut.
                self._cuts.forget_storing()
                self._cut_again_at = self._desk.now + CUT_RETRY_S
                self._is_uncommitted(event.reason)
                self._feed(Unsaved(event.step))
                if self._goes_back:
                    self._go_back()
                return
            if event.code == STATE_LOST:
                desk = self._desk
                desk.lost.said(desk.committed_step, desk.epoch, event.reason, desk.now)
            self._desk.trouble(f"the cut at step {event.step} failed: {event.reason}")

    # The feeder

    def _feeder_came(self, event: m.FeederCame) -> None:
        desk, feeder = self._desk, self.feeder
        if feeder.here and event.peer_id == feeder.peer_id:
            # It comes back by another way, before we have noticed that it was gone.
            desk.out += feeder.refuse(BUSY, "the feeder has come back")
            self._feeder_left(feeder.stream)
        if desk.state == "lost":
            desk.out.append(m.Tell(event.feeder, refused(FAILED, desk.detail)))
            return
        if feeder.here:
            detail = "is being trained by somebody else: wait until that is done"
            desk.out.append(m.Tell(event.feeder, refused(BUSY, f"{desk.graph.name} {detail}")))
            return
        feeder.takes(event.feeder, event.peer_id)
        if self.uncommitted:
            self._tell_uncommitted()
        # Else it is told at the end of what is going on, or after the last cut of the
        # feeder before: we go on from there.
        if desk.ready and not self.undecided_work:
            self._feeder_may_begin()

    def _feeder_may_begin(self, *, live: bool = False) -> None:
        desk, feeder = self._desk, self.feeder
        if feeder.dirty:  # half a step of the feeder before may be under way
            desk.trouble("a new training run begins")
            return
        feeder.waits, feeder.dirty = False, True
        desk.state = "training"
        if not live:
            self._ledger = self._new_ledger()
        ready = orchestrator_pb2.TrainReady(
            epoch=desk.epoch,
            step=desk.committed_step,
            locations=desk.locations(),
            graph=desk.graph.to_json(),
            live_step=self._ledger.decided if live else 0,
            norms=self._ledger.norms,
        )
        desk.out += feeder.tell(TrainEvent(ready=ready))
        commit = desk.history.commit
        if commit is not None and commit.samples and not live:
            # It may be that the feeder was cut off before it heard of this step. Where it
            # goes on live it has been here all the time.
            self._tell_decided(
                Decide(int(commit.step), commit.loss, int(commit.correct), int(commit.samples))
            )
        if feeder.last_step is not None:
            self._feed(EndOfData(feeder.last_step))

    def _feeder_left(self, stream: int | None) -> None:
        if stream != self.feeder.stream:  # it is here again already
            return
        self.feeder.leaves()
        if self._desk.ready:
            if self._desk.state == "training":
                self._desk.state = "ready"
            if not self._ledger.local:
                self._feed(CutWanted(last=True))  # what was decided is kept
            elif self.feeder.dirty and not self._cuts.busy:
                self._go_back()
            else:
                self._goes_back = self.feeder.dirty

    def _go_back(self) -> None:
        """The feeder of a `local` network has left half-way.

        Its VNodes are each at another step by now, and keep the states of no step that all
        of them have passed but those of cuts. So the last cut is what there is of it.
        """
        self._goes_back = False
        step = self._desk.committed_step
        self._desk.trouble(f"its feeder has left: back to the cut at step {step}")

    def _finish(self) -> None:
        """The feeder is done when the log has all that it fed."""
        desk = self._desk
        if self._finishing is None or desk.committed_step < self._finishing:
            return
        done = orchestrator_pb2.TrainDone(step=self._finishing, states=desk.states)
        desk.out += self.feeder.tell(TrainEvent(done=done))
        self._finishing = None
        self.feeder.dirty = False
        self.feeder.leaves()
        if desk.ready:
            desk.state = "ready"

    def _tell_decided(self, decision: Decide) -> None:
        decided = orchestrator_pb2.StepDecided(
            epoch=self._desk.epoch,
            step=decision.step,
            loss=decision.loss,
            correct=decision.correct,
            samples=decision.samples,
            norm=decision.norm,
        )
        self._desk.out += self.feeder.tell(TrainEvent(decided=decided))

    def _tell_uncommitted(self) -> None:
        uncommitted = orchestrator_pb2.Uncommitted(
            step=self._desk.committed_step, reason=self.uncommitted
        )
        self._desk.out += self.feeder.tell(TrainEvent(uncommitted=uncommitted))
