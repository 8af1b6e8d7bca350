"""The curriculum: which task is played next. Mixing by weights, a window of solve rates, stages.

    mixing    sources of tasks (`[envs.NAME]`) have their shares of the groups, exactly within one (`fair`)
    window    tasks whose solve rate is outside of [low, high] are left out (`EnvConfig.window`)
    stages    from a step on, shares, windows and bounds are others (`Stage`)

CWM's schedule has these three (arXiv 2510.02387, its joint RL): shares of code, SWE and math that change at two steps, from
the second stage on solve rates in [0.1, 0.7] only, contexts capped in the third. There a task's rate is measured before a
stage (`EnvConfig.rates`); a rate is measured anew here with every group, as prime-rl's gates and DAPO's dynamic sampling
(arXiv 2503.14476, section 3.2, which is the window of all rates but 0 and 1) have it.

`Curriculum` is a state machine like `rl/admission.py`: `next` is a function of the groups issued and of the rates observed
before, with no clock and no randomness. Its state is what the journal says of every group, so that a resumed run (`resume`)
chooses what it would have chosen.

It does not say when a group is issued (`rl/admission.py`) and does not keep it (`rl/journal.py`).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.errors import nearest

if TYPE_CHECKING:
    from rl.config import Config
    from rl.journal import Entry

SOURCE_FIELDS = ("weight", "window", "rates", "kwargs", "max_context", "max_turns")
STAGED = {
    "env": SOURCE_FIELDS,
    "envs": SOURCE_FIELDS,
    "rollout": ("group_size",),
    "policy": ("temperature", "top_p", "max_tokens"),
}
"""What a stage may change, by section of the recipe. Everything else is built once, when the run starts."""

PATIENCE = 10
"""So many batches of groups of one source in a row may be outside of its window; then it counts as used up. Prime-rl gives
up after as many empty batches."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the recipe that holds for groups issued from `step` on, e.g. `envs.swe.weight = 3`, `rollout.group_size = 16`.
    `STAGED` says what may change. `kwargs` are merged. Evaluations stay as they were at first, so that they compare."""

    step: int
    """Steps trained when it begins. Groups that are under way then are trained as they are."""
    env: Mapping[str, Any] = field(default_factory=dict)
    envs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rollout: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"step={self.step} is the recipe itself; a stage begins at step 1 or later")
        named = {section: getattr(self, section) for section in STAGED if section != "envs"}
        for section, change in {**named, **{f"envs.{k}": v for k, v in self.envs.items()}}.items():
            allowed = STAGED[section.partition(".")[0]]
            if not isinstance(change, Mapping):
                raise ValueError(f"{section}={change!r} is no section; write {section}.{allowed[0]} = ...")
            for key in change:
                if key not in allowed:
                    known = ", ".join(f"{section}.{name}" for name in allowed)
                    raise ValueError(
                        f"{section}.{key} can't change while a run goes on; leave it to the recipe. Here a stage may change "
                        f"{known}.{nearest(str(key), allowed)}"
                    )


def overlaid(raw: Mapping[str, Any], stage: Stage, *, several: bool) -> dict[str, Any]:
    """A recipe as plain values, changed by a stage. `several`: its sources are `[envs.NAME]`."""
    wrong = [("envs", "env"), ("env", "envs.NAME")][several]
    if getattr(stage, wrong[0]):
        raise ValueError(
            f"the stage of step {stage.step} changes [{wrong[0]}], but the recipe has [{wrong[1]}]; change that"
        )
    for name in stage.envs:
        if name not in raw["envs"]:
            raise ValueError(
                f"the stage of step {stage.step} changes envs.{name}, which the recipe has not."
                f"{nearest(name, raw['envs'])} Name one of {', '.join(raw['envs'])}"
            )
    changes = {f.name: getattr(stage, f.name) for f in fields(stage) if f.name != "step"}
    return _merged(raw, changes)


def _merged(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        k: _merged(raw[k], v) for k, v in changes.items() if isinstance(v, Mapping) and isinstance(raw.get(k), Mapping)
    }
    return {**raw, **changes, **both}


def fair(weights: Mapping[str, float], counts: Mapping[str, int]) -> str:
    """Which source is next, so that after n choices each has been chosen floor(n p) or ceil(n p) times, p = weight / sum.

    The quota method of apportionment (Balinski & Young 1975): among the sources that a further choice leaves within
    ceil((n + 1) p), the one with the least (chosen + 1) / weight; ties go to the first. Weights are above 0.
    """
    exact = {name: Fraction(weight) for name, weight in weights.items()}
    total, n = sum(exact.values()), sum(counts.get(name, 0) for name in exact)
    within = [name for name, weight in exact.items() if counts.get(name, 0) * total < (n + 1) * weight]
    return min(within, key=lambda name: (counts.get(name, 0) + 1) / exact[name])


class Exhausted(ValueError):
    """No source has a task left, while steps are missing."""


@dataclass(frozen=True, kw_only=True)
class Pick:
    """A group to play."""

    group: str
    """Its id."""
    source: str
    index: int
    """Task index in the source's split."""
    stage: int
    """Index in `Config.staged`: the recipe that it is played by."""


Place = tuple[int, str]
"""Stage and source."""


class Curriculum:
    """The machine beside the loop.

    Example (`[env]`, first_task 0, window [0.1, 0.7])::

        curriculum.next(step=0)                     → Pick(group="g0", source="env", index=0, stage=0)
        curriculum.observe("g0", solved=8, graded=8) → False: drop it
        curriculum.next(step=0)                     → Pick(group="g1", …)
    """

    def __init__(
        self,
        config: Config,
        sizes: Mapping[Place, int | None] | None = None,
        rates: Mapping[Place, Mapping[int, float]] | None = None,
    ) -> None:
        """`sizes`: tasks after which a source's tasks come round again, None for never. `rates`: task index -> solve rate that
        was measured before. `curriculum` finds both."""
        self.config = config
        self.starts = [stage.step for stage in config.stages]
        self.sizes, self.before = dict(sizes or {}), dict(rates or {})
        self.picks: dict[str, Pick] = {}
        self.outside: Counter[str] = Counter()
        """Groups dropped by the window, by source."""
        self._cursor = {name: source.first_task for name, source in config.sources.items()}
        self._counted: dict[int, Counter[str]] = defaultdict(Counter)  # groups of a stage, without those outside
        self._order: dict[Place, list[str]] = defaultdict(list)
        self._rates: dict[Place, dict[int, float]] = defaultdict(dict)
        self._of_group: dict[str, float] = {}

    def stage(self, step: int) -> int:
        """The stage in force when `step` steps are trained."""
        return sum(start <= step for start in self.starts)

    def next(self, step: int) -> Pick | None:
        """The next group, which counts as issued; None while no source has a task left."""
        stage = self.stage(step)
        sources = self.config.staged[stage].sources
        found = {name: self._index((stage, name)) for name, source in sources.items() if source.weight}
        left = {name: index for name, index in found.items() if index is not None}
        if not left:
            return None
        source = fair({name: sources[name].weight for name in left}, self._counted[stage])
        group = f"g{left[source]}.{source}" if self.config.envs else f"g{left[source]}"
        pick = Pick(group=group, source=source, index=left[source], stage=stage)
        self._issue(pick)
        return pick

    def observe(self, group: str, solved: int, graded: int) -> bool:
        """A group has finished with `solved` of `graded` trajectories resolved. False: it is outside of its window, and its
        source's share has room for another."""
        inside = self._measure(group, solved / graded)
        if not inside:
            self._refuse(self.picks[group])
        return inside

    def resume(self, entries: Iterable[Entry]) -> None:
        """Take up the state that a journal's rows, in the order of their issue, describe."""
        for entry in entries:
            if entry.source not in self._cursor or entry.stage > len(self.starts):
                raise ValueError(
                    f"group {entry.id} of the journal is of source {entry.source!r} in stage {entry.stage}, which this recipe has not; "
                    "resume with the sources and stages that the run was started with"
                )
            pick = Pick(group=entry.id, source=entry.source, index=entry.task_index, stage=entry.stage)
            self._issue(pick)
            if entry.graded:
                self._measure(entry.id, entry.solved / entry.graded)
            if entry.reason == "window":
                self._refuse(pick)

    def none_left(self, step: int) -> str:
        """Why `next` finds nothing: one line."""
        stage = self.stage(step)
        why = []
        for name, source in self.config.staged[stage].sources.items():
            if source.weight and source.window:
                size = self.sizes.get((stage, name))
                what = (
                    f"the last {self._missed((stage, name))} groups"
                    if self._gives_up((stage, name))
                    else f"all {size} tasks"
                )
                why.append(f"{what} of {name} have solve rates outside of its window {list(source.window)}")
        return f"zero tasks left after filters: {'; '.join(why)}; widen the window, or add tasks"

    # ------------------------------------------------------------------ inside

    def _issue(self, pick: Pick) -> None:
        self.picks[pick.group] = pick
        self._cursor[pick.source] = max(self._cursor[pick.source], pick.index + 1)
        self._counted[pick.stage][pick.source] += 1
        self._order[pick.stage, pick.source].append(pick.group)

    def _refuse(self, pick: Pick) -> None:
        self.outside[pick.source] += 1
        self._counted[pick.stage][pick.source] -= 1

    def _measure(self, group: str, rate: float) -> bool:
        pick = self.picks[group]
        place = pick.stage, pick.source
        self._of_group[group] = rate
        self._rates[place][self._task(place, pick.index)] = rate
        return self._inside(place, rate)

    def _task(self, place: Place, index: int) -> int:
        size = self.sizes.get(place)
        return index % size if size else index

    def _inside(self, place: Place, rate: float) -> bool:
        window = self.config.staged[place[0]].sources[place[1]].window
        return window is None or window[0] <= rate <= window[1]

    def _index(self, place: Place) -> int | None:
        """The next task index of a source that is not known to be outside of its window."""
        first, size = self._cursor[place[1]], self.sizes.get(place)
        if self._gives_up(place):
            return None
        now, before = self._rates[place], self.before.get(place, {})
        for index in range(first, first + size) if size else count(first):
            task = self._task(place, index)
            rate = now.get(task, before.get(task))
            if rate is None or self._inside(place, rate):
                return index
        return None

    def _missed(self, place: Place) -> int:
        """Measured groups outside of the window since the last one inside, in the order of their issue."""
        missed = 0
        for group in reversed(self._order[place]):
            if group in self._of_group:
                if self._inside(place, self._of_group[group]):
                    break
                missed += 1
        return missed

    def _gives_up(self, place: Place) -> bool:
        return self._missed(place) >= PATIENCE * self.config.learn.groups_per_step


def curriculum(config: Config) -> Curriculum:
    """The curriculum of a recipe. `ValueError` where a file of rates can't be read or leaves no task of a source."""
    from envs.registration import make

    sizes: dict[Place, int | None] = {}
    rates: dict[Place, dict[int, float]] = {}
    for stage, staged in enumerate(config.staged):
        for name, source in staged.sources.items():
            if source.window is None:
                continue
            env = make(source.id, **source.kwargs)
            size = sizes[stage, name] = getattr(env, "size", lambda split: None)(source.split)
            env.close()
            rates[stage, name] = {i % size if size else i: rate for i, rate in read_rates(source.rates)}
    found = Curriculum(config, sizes, rates)
    for place in rates:
        if found._index(place) is None:
            source = config.staged[place[0]].sources[place[1]]
            raise ValueError(
                f"zero tasks of {place[1]} left after filters: {source.rates} has none of its {sizes[place]} tasks within the window "
                f"{list(source.window or ())}; widen the window, or measure more tasks"
            )
    return found


def read_rates(path: str) -> list[tuple[int, float]]:
    """(task index, solve rate) of each line {"index", "solved", "graded"} of a file; nothing for an empty path."""
    if not path:
        return []
    if not Path(path).is_file():
        raise ValueError(f"rates={path!r}: no such file; make it with `python -m rl rates`")
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        return [(int(row["index"]), row["solved"] / row["graded"]) for row in rows if row["graded"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'rates={path!r}: a line is not {{"index", "solved", "graded"}} ({error}); make it with `python -m rl rates`'
        ) from None
