"""A learner's memory, in a process of its own: MODEL CONTEXT MAX_TOKENS ROWS; prints one line of JSON, bytes.

`peak` is the most that was resident above what the imports took. Started with `MALLOC_MMAP_THRESHOLD_` it is what lives at a time;
without, it holds as well what the C library keeps of freed tensors.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from benchmarks.systems.learner_side import peak, used
from rl.batch import Row
from rl.learner import Learner
from rl.updates import LearnConfig


def rows(count: int, tokens: int, vocabulary: int) -> list[Row]:
    """Rows of `tokens` positions, all sampled but the first token."""
    draw = random.Random(0)
    return [
        Row(
            token_ids=[draw.randrange(vocabulary) for _ in range(tokens + 1)],
            loss_mask=[0, *[1] * tokens],
            logprobs=[-9.0] * (tokens + 1),
            versions=[0] * (tokens + 1),
            advantage=1.0 if index % 2 else -1.0,
            trajectory=f"{index}",
        )
        for index in range(count)
    ]


def main(model: str, context: int, max_tokens: int, count: int) -> None:
    """One update of a learner as a run would make it."""
    before = used()
    settings = LearnConfig(algorithm="grpo", lr=1e-6, minibatches=1, max_tokens=max_tokens)
    learner = Learner(settings, Path(model), context=context)
    learner.step(rows(count, context, learner.policy.model.config.vocab_size))
    print(json.dumps({"peak": peak() - before}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
