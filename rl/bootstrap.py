"""`python -m rl bootstrap`: reinforcement learning that makes its own better start, again and again.

    recipe's model ──► RL ──► rejection sampling ──► SFT of the recipe's model ──► RL ──► …
         round 1 ───────────────────────────────────────────► round 2 ─────────────────────

CWM bootstraps its SWE agent so (arXiv 2510.02387): each round fine-tunes the *first* model again, on the resolved
trajectories of its own run alone; those of earlier rounds are thrown away. A round is `rl.train.train` and `rl.sft.imitate`,
nothing else.

    runs/<name>/  recipe.toml
                  round-1/        a run directory, and sft/ in it: the model that round 2 begins with
                  start.json, round-1-rl.json, round-1-sft.json        held-out tasks solved
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rl.config import Config, dump, load

Solved = dict[str, float]
"""Evaluation -> share of its tasks that a model resolved."""


def bootstrap(config: Config, rounds: int, epochs: float) -> list[tuple[str, Solved]]:
    """(model, held-out tasks solved) of the recipe's model and of every round, after RL and after SFT.

    What is finished is not done again: call it again after whatever ended it, with more rounds too.

    epochs: passes of each SFT over the resolved trajectories.
    Raises `ValueError` where the directory holds another recipe, or a round resolved nothing.
    """
    if rounds < 1 or epochs <= 0:
        raise ValueError(
            f"{rounds} rounds with {epochs:g} epochs of SFT are nothing to do; give 1 or more, and above 0"
        )
    from rl.evaluate import solve
    from rl.sft import WarmStart, imitate
    from rl.train import train

    home, sft = config.directory, WarmStart(epochs=epochs, seed=config.seed)
    _keep(home / "recipe.toml", config, f"# SFT: {epochs:g} epochs\n")
    table = [("start", _once(home / "start.json", partial(solve, config, config.model)))]
    model = config.model
    for number in range(1, rounds + 1):
        policy = replace(config.policy, model=str(model))
        this = replace(config, runs=str(home), name=f"round-{number}", policy=policy)
        run, model = this.directory, this.directory / "sft"
        if not (run / "model" / "tokenizer.json").is_file():
            print(f"{this.name}: reinforcement learning in {run}", flush=True)
            print(train(this, resume=(run / "journal.sqlite").is_file()), flush=True)
        if not model.is_dir():
            draft = run / "sft.partial"
            print(f"{this.name}: {imitate(run, config.model, draft, sft, run)}", flush=True)
            draft.rename(model)
        for phase, made in (("rl", run / "model"), ("sft", model)):
            name = f"{this.name}-{phase}"
            table.append((name, _once(home / f"{name}.json", partial(solve, config, made))))
    return table


def _keep(path: Path, config: Config, head: str) -> None:
    if path.is_file() and not (path.read_text().startswith(head) and load(path) == config):
        raise ValueError(f"{path.parent} holds rounds of another recipe; choose another --name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + dump(config))


def _once(path: Path, make: Callable[[], Any]) -> Any:
    if not path.is_file():
        print(f"{path.stem}: playing held-out tasks", flush=True)
        draft = path.with_suffix(".partial")
        draft.write_text(json.dumps(make()))
        draft.rename(path)
    return json.loads(path.read_text())


def lines(table: list[tuple[str, Solved]], tasks: int) -> str:
    """The table as text."""
    head = f"held-out tasks solved (of {tasks})"
    return "\n".join([head, *(f"{who:14}" + "".join(f"  {k} {v:6.1%}" for k, v in of.items()) for who, of in table)])
