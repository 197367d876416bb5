"""A keeper's room: how many logs it keeps, and which of them go when another comes. Pure.

An acceptor that forgot would break Paxos, so none does:
- of promises alone the highest ballot is kept, one for all logs that went
  (`Keeper._floor`): to promise more than was asked for is always safe;
- in all slots of any other log that this keeper may have voted in, it takes part no
  more (`Gone`): Paxos bears keepers that are dead. It may learn them again, by
  proofs, like anybody, and be named a keeper of later ones;
- a log that others keep goes only when they have decided a slot: a majority of them
  then has all slots before it, so there are as many copies as of any entry.

What nobody misses goes first (`KeptLog.use`). A log that somebody may want to read has
not changed for an hour before it goes; afterwards a reader is told that the network
has ended, or who keeps its log now, and never that there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from p2pnet.log.kept import NEEDED, Gone, KeptLog, refused
from p2pnet.v1 import common_pb2

NETWORKS_MAX = 1_024
UNCLAIMED_MAX = 16  # logs without an entry, of one caller
BYTES_MAX = 256 << 20  # of all logs kept; one alone gets half
GONE_MAX = 16_384  # logs given up that have to be remembered
KEPT_S = 3600.0  # how long a log that is of no use any more still answers those who read it


@dataclass(frozen=True, slots=True)
class Places:
    """What keeper `me` keeps, and has given up; `began`: when its process did."""

    me: str
    logs: Mapping[str, KeptLog]
    gone: Mapping[str, Gone]
    began: float

    def in_the_way(
        self, wanted: KeptLog, caller: str, now: float, entry: common_pb2.Signed | None = None
    ) -> list[str]:
        """Which logs have to go for `wanted`, or for an entry in it.

        Raises:
            RefusedError: those that may go do not make room enough.
        """
        going: list[str] = []
        if wanted.history.network_id not in self.logs:
            if self._unclaimed(caller) >= UNCLAIMED_MAX:
                raise refused("BUSY", "this peer keeps as many logs of yours as it may")
            if len(self.logs) >= NETWORKS_MAX:
                going = self._spare(wanted, now)[:1]
                if not going:
                    raise refused("BUSY", "this peer keeps as many logs as it can")
        if entry is None:
            return going
        held = sum(
            log.size_bytes for network_id, log in self.logs.items() if network_id not in going
        )
        # A log may grow while it takes no more than what is free (Choudhury and Hahne 1998,
        # "Dynamic queue length thresholds"): alone it gets half, and others always find room.
        room = BYTES_MAX - max(len(entry.payload), wanted.size_bytes)
        for network_id in self._spare(wanted, now) if held > room else ():
            size_bytes = self.logs[network_id].size_bytes
            if held > room and size_bytes and network_id not in going:
                going.append(network_id)
                held -= size_bytes
        if held > room:
            raise refused("NO_MEMORY", "this peer's room for logs is full")
        return going

    def _unclaimed(self, caller: str) -> int:
        """How many logs there are only because `caller` has asked for a promise."""
        return sum(
            1
            for log in self.logs.values()
            if not log.history.entries and log.promised and log.promised[1] == caller
        )

    def _spare(self, wanted: KeptLog, now: float) -> list[str]:
        """The logs that may go: who is missed least first, then who is unused for longest."""
        found: list[tuple[int, float, str]] = []
        for network_id, log in self.logs.items():
            used_at = self.began if log.used_at is None else log.used_at
            use = log.use(self.me)
            idle = use == 0 or (use < NEEDED and now - used_at >= KEPT_S)
            if idle and log is not wanted:
                found.append((use, used_at, network_id))
        places = GONE_MAX - len(self.gone)
        spare: list[str] = []
        for use, _, network_id in sorted(found):
            if use and network_id not in self.gone:
                if not places:
                    continue
                places -= 1
            spare.append(network_id)
        return spare
