"""Staleness: how many groups may be on their way, and which form the next batch. Pure: numbers in, decisions out.

`Staleness` holds the bound and answers four questions: `capacity` (how many groups may be on their way), `may_issue` (may
one more), `select` (which finished groups are trained next, or wait) and `accept` (may this group be trained at all). It
keeps no state; `rl/admission.py` does, and holds the other limits.

Words. *Staleness* of a group is the learner's version when it is trained minus the oldest version that sampled one of
its tokens. A group is *outstanding* from its issue until it is trained or dropped. B is groups per batch, S the largest
staleness, v the version of the learner (batches trained), e <= v the version that the engines hold (the least of them).

The bound. A group issued while the engines hold e has no token older than e, so it may wait for training until v = e +
S: its deadline. Each version trains exactly B groups, so all outstanding groups can meet their deadlines, whatever
their order of finishing, iff for each w >= v at most (w - v + 1) B of them have a deadline <= w. e never falls, so a
new group's deadline is the latest, and it may be issued iff

    outstanding + 1 <= (e + S - v + 1) B

With e = v and v B groups trained this is AReaL's rule (arXiv 2505.24298, its staleness control), issued <= (S + v + 1)
B, which alone bounds the staleness only if groups are trained in the order of their issue. Slow groups are overtaken,
hence the second half: `select` takes the oldest finished groups first, and

* `wait` takes none while what would be left over could not meet its deadlines any more. As "oldest first" leaves over
  the least for every w, waiting ends when the groups waited for have finished: no token is trained past S, and no group
  is thrown away for its age.
* `drop` never waits; a group that was overtaken for too long is refused by `accept` when it finishes.

Under both the bound is enforced once more by `accept`, on the versions that really sampled the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from envs.errors import nearest

Policy = Literal["wait", "drop"]


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """The bound of a run, and the decisions that follow from it."""

    groups_per_batch: int = 8
    """B: groups that the learner trains per version."""
    max_staleness: int = 1
    """S: most versions between the oldest token of a group and the learner; 0 is on-policy: generate, train,
    publish."""
    policy: Policy = "wait"
    """What happens to groups that are too slow for the bound: the batch waits for them, or they are dropped."""

    def __post_init__(self) -> None:
        for name, least in (("groups_per_batch", 1), ("max_staleness", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"staleness.{name}={getattr(self, name)} must be at least {least}")
        known = get_args(Policy)
        if self.policy not in known:
            raise ValueError(
                f"staleness.policy={self.policy!r}; one of {', '.join(known)}.{nearest(self.policy, known)}"
            )

    def capacity(self, engine_version: int, version: int) -> int:
        """Most groups that may be outstanding while the engines hold `engine_version` and the learner `version`."""
        return max(0, (engine_version + self.max_staleness - version + 1) * self.groups_per_batch)

    def may_issue(self, engine_version: int, version: int, outstanding: int) -> bool:
        """Whether one more group may be issued.

        Args:
            engine_version: least version that an engine holds; the new group's tokens are of this one or newer.
            version: the learner's.
            outstanding: groups issued and neither trained nor dropped: pending, running, done or being trained now.
        """
        return outstanding < self.capacity(engine_version, version)

    def accept(self, oldest_version: int, version: int) -> Literal["train", "drop:stale"]:
        """The hard bound: whether a group whose oldest token is of `oldest_version` may be trained by a learner at
        `version`."""
        return "train" if version - oldest_version <= self.max_staleness else "drop:stale"

    def select(self, ready: Mapping[str, int], running: Mapping[str, int], version: int) -> list[str]:
        """Ids of the groups to train now: B of them, oldest first, or none: wait.

        Args:
            ready: finished groups -> oldest version of their tokens. Those that `accept` refuses are never selected.
            running: groups issued but not finished -> version that the engines held when they were started; for those
                that are pending (again), the version that the engines hold now.
            version: the learner's.
        """
        fit = {name: v for name, v in ready.items() if self.accept(v, version) == "train"}
        order = sorted(fit, key=lambda name: fit[name])  # sorted() is stable: ties in the order of `ready`
        chosen, left = order[: self.groups_per_batch], order[self.groups_per_batch :]
        if len(chosen) < self.groups_per_batch:
            return []
        if self.policy == "wait" and self._starves([fit[n] for n in left], list(running.values()), version):
            return []
        return chosen

    def _starves(self, left: list[int], running: list[int], version: int) -> bool:
        """Whether training now would leave a running group no place before its deadline.

        `left` and `running` hold versions; deadlines are S later. Training now makes the learner's version v + 1, so
        deadlines <= w leave (w - v) B places. Groups past their deadline already can't be helped by waiting and don't
        count.
        """
        for deadline in {v + self.max_staleness for v in running if v + self.max_staleness >= version}:
            due = sum(version <= v + self.max_staleness <= deadline for v in (*left, *running))
            if due > (deadline - version) * self.groups_per_batch:
                return True
        return False
