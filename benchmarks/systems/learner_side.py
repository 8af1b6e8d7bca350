"""One side of `learner.py` in a process of its own: SIDE HOME MICRO THREADS STEPS CONTEXT; prints one line of JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from policy import models
from rl.batch import Row
from rl.learner import Learner
from rl.updates import LearnConfig


def used() -> int:
    """Resident bytes now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Most resident bytes so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(home: Path, batch: list[dict[str, Any]], micro: int, steps: int, context: int) -> dict[str, Any]:
    """`rl.learner.Learner`, with the algorithm `grpo`."""
    before = used()
    settings = LearnConfig(algorithm="grpo", lr=1e-6, minibatches=1, threads=torch.get_num_threads())
    learner = Learner(settings, home / "model", context=context)
    scores = learner.score([r["token_ids"] for r in batch])
    rows = [
        Row(
            token_ids=r["token_ids"],
            loss_mask=r["loss_mask"],
            logprobs=score,
            versions=[0] * len(score),
            advantage=r["advantage"],
            trajectory=str(i),
        )
        for i, (r, score) in enumerate(zip(batch, scores, strict=True))
    ]
    seconds, norms = [], []
    for _ in range(steps):
        began = time.perf_counter()
        norms.append(learner.step(rows).grad_norm)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "peak": peak() - before, "grad_norm": norms[0]}


def trl(home: Path, batch: list[dict[str, Any]], micro: int, steps: int, context: int) -> dict[str, Any]:
    """`GRPOTrainer`, whose sampling is replaced by the rows."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    before = used()
    seconds: list[float] = []

    class Given(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            return padded(batch)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")), pad_token="b", eos_token="b"
    )
    arguments = GRPOConfig(
        output_dir=str(home / "trl"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(batch) // micro,
        num_generations=8,
        max_completion_length=context,
        max_steps=steps,
        learning_rate=1e-6,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        loss_type="dapo",
        beta=0.0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Given(
        model=models.load(home / "model"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * len(batch)),
        processing_class=words,
        callbacks=[Clock()],
    )
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"seconds": seconds[1:], "peak": peak() - before, "grad_norm": float(norms[0])}


def padded(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as `GRPOTrainer` makes them: prompts [N, P] padded on the left, completions [N, C] on the right."""
    most = {part: max(part(r) for r in batch) for part in (_prompt, _completion)}
    shapes = [(len(batch), most[part]) for part in (_prompt, _completion)]
    (prompt, there), (completion, here) = (
        [torch.zeros(shape, dtype=torch.int64) for _ in range(2)] for shape in shapes
    )
    sampled = torch.ones_like(completion)
    for i, r in enumerate(batch):
        ids, at, n = torch.tensor(r["token_ids"]), _prompt(r), _completion(r)
        prompt[i, most[_prompt] - at :], there[i, most[_prompt] - at :] = ids[:at], 1
        completion[i, :n], here[i, :n] = ids[at:], 1
        sampled[i, :n] = torch.tensor(r["loss_mask"][at:])
    return {
        "prompt_ids": prompt,
        "prompt_mask": there,
        "completion_ids": completion,
        "completion_mask": here,
        "tool_mask": sampled,
        "advantages": torch.tensor([r["advantage"] for r in batch]),
        "num_items_in_batch": (here * sampled).sum(),
    }


def _prompt(r: dict[str, Any]) -> int:
    return int(r["prompt"])


def _completion(r: dict[str, Any]) -> int:
    return len(r["token_ids"]) - int(r["prompt"])


def main() -> None:
    """Run one side."""
    side, home, *numbers = sys.argv[1:]
    micro, threads, steps, context = map(int, numbers)
    torch.set_num_threads(threads)
    batch = json.loads((Path(home) / "rows.json").read_text())
    print(json.dumps({"ours": ours, "trl": trl}[side](Path(home), batch, micro, steps, context)))


if __name__ == "__main__":
    main()
