"""Accusers who were refuted are not heard for a while, twice as long each time. Pure.

Of that subject; and of nobody, once subjects of several IP groups have refuted them:
one peer that plays dead for its observers shall not silence them for all others. Who
lies has a few shots, and then nobody spends bytes on it any more; who was merely
wrong, because it was itself slow, is soon heard again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

_FIRST_S = 5.0
_TIMES_MAX = 8  # 5 s * 2**7: 11 minutes
_ACCUSERS_MAX = 1024
_SUBJECTS_MAX = 16  # of one accuser
_GROUPS = 3  # of subjects, whose refutations silence an accuser altogether


@dataclass(slots=True)
class _Muted:
    """One accuser: by subject until when, how often, and the subject's IP group."""

    subjects: OrderedDict[str, tuple[float, int, str]] = field(default_factory=OrderedDict)


class Mutes:
    """Refuted accusers; the last refuted last."""

    def __init__(self) -> None:
        self._accusers: OrderedDict[str, _Muted] = OrderedDict()

    def refuted(self, accuser: str, subject: str, group: str, now: float) -> None:
        """A member of an IP group, whom this accuser said to have failed, is here."""
        muted = self._accusers.pop(accuser, None) or _Muted()
        until, times, _ = muted.subjects.pop(subject, (now, 0, group))
        # What it does not do again is forgotten as slowly as it was muted.
        times = 1 + (times if now < until + _FIRST_S * 2**times else 0)
        times = min(times, _TIMES_MAX)
        muted.subjects[subject] = (now + _FIRST_S * 2 ** (times - 1), times, group)
        if len(muted.subjects) > _SUBJECTS_MAX:
            muted.subjects.popitem(last=False)
        self._accusers[accuser] = muted
        if len(self._accusers) > _ACCUSERS_MAX:
            self._accusers.popitem(last=False)

    def muted(self, accuser: str, subject: str, now: float) -> bool:
        """Whether what it says of that subject is not heard now."""
        muted = self._accusers.get(accuser)
        if muted is None:
            return False
        of_subject = muted.subjects.get(subject)
        if of_subject is not None and now < of_subject[0]:
            return True
        groups = dict.fromkeys(g for until, _, g in muted.subjects.values() if now < until)
        return len(groups) >= _GROUPS
