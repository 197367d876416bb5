"""One training run, as the process that feeds the batches decides it. A pure core (DESIGN D11).

Batches go to the VNodes; step numbers and results come from the orchestrator, whoever that is
at the time (`p2pnet.client.link`). Several steps may be out at a time, as many as the network
can use. A batch is held until a commit covers its step, so that after a failure the steps since
can be done again. Whoever waits for a step waits a little longer and notices nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pnet.client.events import (
    Batch,
    BatchGiven,
    Effect,
    Event,
    FeedFailed,
    FeedStep,
    Finished,
    GiveUp,
    NoMore,
    NotFound,
    OrchestratorFound,
    Pace,
    Recovery,
    Say,
    Send,
    Started,
    StepResult,
    StreamEnded,
    StreamOpened,
    TellDecided,
    Told,
)
from p2pnet.client.link import LOOK_FURTHER, REASON_CHARS_MAX, SAY_S, Link
from p2pnet.client.results import Results
from p2pnet.errors import (
    P2PNetError,
    RefusedError,
    RolledBackError,
    UnreachableError,
    UsageError,
)
from p2pnet.v1 import common_pb2
from p2pnet.v1 import orchestrator_pb2 as pb

STALL_S = 20.0  # without a word after a batch went out: ask the orchestrator to look.
STALL_MAX_S = 160.0  # It doubles each time: what it does about it may take longer than this.
RECOVERIES_QUIET = 3  # between two commits; more are worth a word
HELD_STEPS_MAX = 4096
HELD_BYTES_MAX = 1 << 30
NORMS_MAX = 9


class Feed:
    """A training run of network `network_id`; `name` is for people.

    Begins with an `OrchestratorFound`; after `Finished` or `GiveUp` it is over, and silent.
    """

    def __init__(self, network_id: str, name: str) -> None:
        self.over = False
        self._network_id = network_id
        self._name = name
        self._link = Link(name)
        self._greeted = 0  # the stream that was told what we want
        # committed <= decided <= out <= last; decided and what is delivered <= fed <= last
        self._started = False
        self._held: dict[int, Batch] = {}  # of the steps after `committed`
        self._held_bytes = 0
        self._committed = 0
        self._decided = 0  # in this epoch
        self._results = Results()
        self._fed = 0  # the newest step that ever went out
        self._last = 0  # the newest step that there is a batch for
        self._out = 0  # the newest step that is out in this epoch; `decided`, where none is
        self._window = 1  # how many are out at most
        self._since = 0.0  # the last decision, or when a step went out while none was
        self._told_step = 0  # the newest decided step that hosts were told of in this epoch
        self._norms: tuple[float, ...] = ()  # of the last decided steps
        self._norms_kept = 0
        self._stall_s = STALL_S
        self._locations: dict[str, str] = {}
        self._ending = False
        self._pausing_since: float | None = None  # all that is held is to be committed first
        self._said_pause = False
        self._uncommitted = False
        self._recoveries = 0  # since the last commit
        self._told_why = False  # of a recovery since the last `ready`

    @property
    def full(self) -> bool:
        """Whether no batch is taken at present: too much waits for a commit."""
        return (
            self._pausing_since is not None
            or len(self._held) >= HELD_STEPS_MAX
            or self._held_bytes >= HELD_BYTES_MAX
        )

    def handle(self, event: Event, now: float) -> Sequence[Effect]:
        """See `p2pnet.core.Core`."""
        effects: list[Effect] = []
        if self.over:
            return effects
        try:
            self._take(event, now, effects)
            if not self.over:
                self._advance(now, effects)
        except (UsageError, UnreachableError, RefusedError, RolledBackError) as error:
            self._give_up(error, now, effects)
        return effects

    def deadline(self) -> float | None:
        """See `p2pnet.core.Core`."""
        if self.over:
            return None
        times = self._link.deadlines()
        if self._results.due is not None:
            times.append(self._results.due)
        if self._out > self._decided:
            times.append(self._since + self._stall_s)
        if self._pausing_since is not None and not self._said_pause:
            times.append(self._pausing_since + SAY_S)
        return min(times, default=None)

    def check(self) -> None:
        """See `p2pnet.core.Core`."""
        assert list(self._held) == list(range(self._committed + 1, self._last + 1))
        assert self._held_bytes == sum(batch.size_bytes for batch in self._held.values())
        assert self._committed <= self._decided <= self._fed <= self._last
        assert self._results.delivered <= self._fed
        assert (self._results.delivered < self._decided) == (self._results.due is not None)
        assert self._decided <= self._out <= min(self._fed, self._decided + self._window)
        assert self._link.ready or self._out == self._decided
        assert self.over or not self._link.ready or self._told_step == self._decided
        assert len(self._norms) <= NORMS_MAX
        assert self._link.up or not self._link.ready

    # Events

    def _take(self, event: Event, now: float, effects: list[Effect]) -> None:
        link = self._link
        match event:
            case OrchestratorFound():
                link.found(event, now, effects)
            case NotFound():
                link.not_found(event.reason, now)
            case StreamOpened() if link.up and event.stream == link.stream:
                link.opened(now)
            case Told() if link.up and event.stream == link.stream:
                self._told(event.event, now, effects)
            case StreamEnded() if link.up and event.stream == link.stream:
                link.lost(event.reason, now)
            case Pace():
                self._window = max(self._window, event.window)
                self._norms_kept = min(event.norms, NORMS_MAX)
            case BatchGiven():
                assert self._started
                assert not self.full
                assert not self._ending
                self._last += 1
                self._held[self._last] = event.batch
                self._held_bytes += event.batch.size_bytes
            case NoMore():
                assert self._started
                if not self._ending:
                    self._ending = True
                    self._say_end(effects)
            case FeedFailed() if event.epoch == link.epoch and self._is_out(event.step):
                self._complain(event.step, event.host, event.reason, effects)
                if event.newer_epoch > link.epoch:
                    link.hint(now)
            case _:
                pass  # late, or a Tick
        if not link.ready:
            self._out, self._pausing_since = self._decided, None

    def _is_out(self, step: int) -> bool:
        return self._decided < step <= self._out

    def _told(self, event: pb.TrainEvent, now: float, effects: list[Effect]) -> None:
        what = event.WhichOneof("what")
        if what == "refused":
            self._refused(event.refused, now, effects)
            return
        self._link.word(now)
        if what == "ready":
            self._resume(event.ready, now, effects)
        elif what == "decided":
            self._step_decided(event.decided, now, effects)
        elif what == "committed":
            self._commit(min(event.committed.step, self._decided), effects)
        elif what == "uncommitted":
            self._say_uncommitted(event.uncommitted, effects)
        elif what == "recovering":
            reason = event.recovering.reason[:REASON_CHARS_MAX]
            self._link.unready(reason, now)
            self._recover(reason, effects)
        elif what == "done":
            self._done(event.done, now, effects)

    def _refused(self, refusal: common_pb2.Refusal, now: float, effects: list[Effect]) -> None:
        detail = refusal.detail[:REASON_CHARS_MAX]
        if refusal.code == common_pb2.REFUSAL_CODE_STALE_EPOCH:
            self._link.superseded()
        if refusal.code in LOOK_FURTHER:
            self._link.left(detail, refusal.host, now, effects)
        elif refusal.code == common_pb2.REFUSAL_CODE_CLOSED:
            raise UsageError(detail)
        elif refusal.code == common_pb2.REFUSAL_CODE_BAD_REQUEST:
            raise UsageError(f"network {self._name}: {detail}")
        else:
            raise RefusedError(detail, code=refusal.code)

    def _resume(self, ready: pb.TrainReady, now: float, effects: list[Effect]) -> None:
        """From the step that the network is at: what came after it is done again.

        That is a committed one, or a later one that all VNodes still have (`live_step`).
        """
        epoch, why, step = self._link.epoch, self._link.why, max(ready.step, ready.live_step)
        if not self._link.accept(ready.epoch, now, effects):
            return
        if not self._started:
            self._started = True
            self._committed = self._fed = self._last = step
            self._results.begin(step)
            effects.append(Started(step, ready.graph))
        elif ready.epoch > epoch and not self._told_why:
            self._recover(why, effects)
        if step < self._committed:
            raise RolledBackError(
                f"the states of {self._name}'s last commit are lost, and it went back to step "
                f"{step}: feed it again from batch {step + 1}, which is not kept any more",
                step=step + 1,
            )
        if step > self._fed:
            raise RefusedError(
                f"somebody else has trained {self._name} meanwhile: it is at step {step}, and "
                f"this run was at {self._results.delivered}"
            )
        self._locations = {
            location.vnode: location.host for location in ready.locations if not location.standby
        }
        self._told_why = False
        self._decided = self._out = self._told_step = step
        self._norms = tuple(ready.norms[-NORMS_MAX:])
        self._results.await_until(step, now)
        self._commit(ready.step, effects)

    def _step_decided(self, decided: pb.StepDecided, now: float, effects: list[Effect]) -> None:
        step = decided.step
        if not self._link.ready or decided.epoch != self._link.epoch:
            return
        result = StepResult(step, decided.loss, decided.correct, decided.samples)
        if step <= self._decided:  # it was decided before, and is told again
            self._results.deliver(result, effects)
        elif step == self._decided + 1 and self._is_out(step):
            self._results.give_up(effects)
            self._decided, self._since = step, now
            if self._norms_kept:
                self._norms = (*self._norms, decided.norm)[-self._norms_kept :]
            self._results.deliver(result, effects)

    def _commit(self, step: int, effects: list[Effect]) -> None:
        if step <= self._committed:
            return
        for covered in range(self._committed + 1, step + 1):
            self._held_bytes -= self._held.pop(covered).size_bytes
        self._committed = step
        self._recoveries, self._stall_s = 0, STALL_S
        if self._uncommitted:
            self._uncommitted = False
            effects.append(Say(f"the network's log can be written again: step {step} is committed"))

    def _say_uncommitted(self, said: pb.Uncommitted, effects: list[Effect]) -> None:
        if not self._uncommitted:
            self._uncommitted = True
            effects.append(
                Say(
                    f"the network's log cannot be written: steps since {said.step} would be lost "
                    f"with a host ({said.reason[:REASON_CHARS_MAX]})"
                )
            )

    def _recover(self, reason: str, effects: list[Effect]) -> None:
        self._told_why = True
        self._recoveries += 1
        effects.append(Recovery(reason))
        if self._recoveries > RECOVERIES_QUIET:
            effects.append(
                Say(f"network {self._name} gets no further than its last commit: {reason}")
            )

    def _done(self, done: pb.TrainDone, now: float, effects: list[Effect]) -> None:
        if not self._link.ready or not done.step == self._decided == self._last:
            return  # of a run that we have not ended
        self._commit(done.step, effects)
        self._results.give_up(effects)
        if self._ending:
            self.over = True
            effects.append(Finished(done))
        elif self._pausing_since is not None:  # nothing is held any more: on with the run
            self._link.reopen(now, effects)

    # What follows

    def _advance(self, now: float, effects: list[Effect]) -> None:
        """Does what the state and the time ask for."""
        link = self._link
        if self._results.due is not None and now >= self._results.due:
            self._results.give_up(effects)
        is_out = self._out > self._decided
        if is_out and now >= self._since + self._stall_s:
            reason = f"nothing was decided for {self._stall_s:g} s"
            self._complain(self._decided + 1, "", reason, effects)
            self._since = now
            self._stall_s = min(2 * self._stall_s, STALL_MAX_S)
        if link.ready:
            self._feed(now, effects)
        if link.ready and self.full and self._decided == self._last and not self._ending:
            self._pause(now, effects)
        waiting = self._out > self._decided or self._ending or self._pausing_since is not None
        link.tick(waiting or not link.ready, now, effects)
        if link.up and self._greeted != link.stream:
            self._greeted = link.stream
            held = min(self._held, default=0)
            begin = pb.TrainBegin(network_id=self._network_id, first_step_held=held)
            effects.append(Send(link.stream, pb.TrainCommand(begin=begin)))
            self._say_end(effects)

    def _feed(self, now: float, effects: list[Effect]) -> None:
        """As many steps as may be out; what is decided rides on them, or goes alone."""
        epoch, decided = self._link.epoch, self._decided
        if self._out == decided:
            self._since = now
        while self._out < min(self._last, decided + self._window):
            self._out += 1
            self._fed = max(self._fed, self._out)
            self._told_step = decided
            batch = self._held[self._out]
            effects.append(FeedStep(epoch, self._out, batch, self._locations, decided, self._norms))
        if self._told_step < decided:
            self._told_step = decided
            effects.append(TellDecided(epoch, decided, self._locations, self._norms))

    def _pause(self, now: float, effects: list[Effect]) -> None:
        """As if this were the end, so that all that is held is committed; then a run follows."""
        if self._pausing_since is None:
            self._pausing_since, self._said_pause = now, False
            self._end(effects)
        elif now >= self._pausing_since + SAY_S and not self._said_pause:
            self._said_pause = True
            effects.append(
                Say(
                    f"no more batches are fed before those of the last {len(self._held)} steps "
                    "are committed"
                )
            )

    def _say_end(self, effects: list[Effect]) -> None:
        if self._ending and self._link.up and self._greeted == self._link.stream:
            self._end(effects)

    def _end(self, effects: list[Effect]) -> None:
        end = pb.TrainEnd(last_step=self._last)
        effects.append(Send(self._link.stream, pb.TrainCommand(end=end)))

    def _complain(self, step: int, host: str, reason: str, effects: list[Effect]) -> None:
        failed = pb.TrainFailed(
            epoch=self._link.epoch, step=step, host=host, reason=reason[:REASON_CHARS_MAX]
        )
        effects.append(Send(self._link.stream, pb.TrainCommand(failed=failed)))

    def _give_up(self, error: P2PNetError, now: float, effects: list[Effect]) -> None:
        self.over = True
        self._out = self._decided
        if self._link.up:
            self._link.hang_up(str(error), now, effects)
        effects.append(GiveUp(error))
