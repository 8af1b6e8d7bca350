"""Each preset from returns to loss, against numbers worked out by hand; then each against TRL's own loss."""

from collections import defaultdict
from math import log
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.trajectory import Group, Segment, Trajectory
from rl.advantages import PRESETS, Algorithm, algorithm
from rl.batch import microbatches, rows_of
from rl.critic import valued
from rl.losses import normaliser, policy_loss

torch.set_num_threads(1)
CONTEXT = 512
DEVIATION = 0.5001
"""Of the group below: one of four returns is 1, so mean 0.25 and std sqrt((0.75^2 + 3 * 0.25^2) / 3) = 0.5, plus 1e-4."""

# The group: four trajectories of one task. The first returns 1 and has two sampled tokens, the others 0 and one each.
#
#     return                        1           0     0     0
#     ratio current / sampler    1.5   1.1    0.5   0.9   6.0
#     log-prob, current           -1    -2     -1    -2    -1
#
# With A+ the advantage of the first and A- that of the others, PPO's clip at [0.8, 1.2] makes of the ratios
#     min(1.5 A+, 1.2 A+) = 1.2 A+;   min(1.1 A+, 1.1 A+) = 1.1 A+                       sum 2.3 A+
#     min(0.5 A-, 0.8 A-) = 0.8 A-;   0.9 A-;   min(6 A-, 1.2 A-) = 6 A- (as A- < 0)     sum 7.7 A-
RATIOS = [[0.5], [0.9], [6.0], [1.5, 1.1]]
LOGPROBS = [[-1.0], [-2.0], [-1.0], [-1.0, -2.0]]
RETURNS = [0.0, 0.0, 0.0, 1.0]

GOLDEN = {
    # A+ = 0.75 / 0.5001, A- = -0.25 / 0.5001; 2.3 * 0.75 - 7.7 * 0.25 = 1.725 - 1.925 = -0.2; over 5 tokens
    "grpo": 0.2 / DEVIATION / 5,
    # mu = (2 * 1 + 3 * 0) / 5 = 0.4: A+ = 0.6, A- = -0.4; clipped at 1.25: (1.25 + 1.1) * 0.6 - 7.7 * 0.4 = 1.41 - 3.08
    # = -1.67; over 512 tokens of context x 4 trajectories
    "cwm": 1.67 / 2048,
    # clipped at 1.28: (1.28 + 1.1) * 0.75 - 1.925 = 1.785 - 1.925 = -0.14
    "dapo": 0.14 / DEVIATION / 5,
    # no std: 1.725 - 1.925 = -0.2, over the constant
    "dr_grpo": 0.2 / 2048,
    # One ratio per row: sqrt(1.5 * 1.1) = 1.2845 is clipped to 1.0004 in both of its tokens, whose mean is 1.0004 A+;
    # 0.5 and 0.9 to 0.9997; 6 A- stays. 1.0004 * 0.75 - (0.9997 + 0.9997 + 6) * 0.25 = 0.7503 - 1.99985 = -1.24955; 4 rows
    "gspo": 1.24955 / DEVIATION / 4,
    # Weights 1.5, 1.1, 0.5, 0.9 and 5 for 6, each times A and log-prob: (-1.5 - 2.2) * 0.75 + (0.5 + 1.8 + 5) * 0.25
    # = -2.775 + 1.825 = -0.95
    "cispo": 0.95 / DEVIATION / 5,
    # A+ = 1 - 0 = 1, A- = 0 - 1/3 (the others return 1, 0, 0): 2.3 - 7.7 / 3 = -0.8 / 3
    "rloo": 0.8 / 3 / 2048,
    # Over tokens: mean 2 / 5 = 0.4, variance (2 * 0.6^2 + 3 * 0.4^2) / 5 = 0.24, std 0.4898979 + 0.0001;
    # 2.3 * 0.6 - 7.7 * 0.4 = 1.38 - 3.08 = -1.7
    "reinforce++": 1.7 / 0.4899979 / 5,
}


def group() -> Group:
    trajectories = []
    for reward, ratios, logprobs in zip(RETURNS, RATIOS, LOGPROBS, strict=True):
        n = len(ratios)
        behaviour = [now - log(r) for now, r in zip(logprobs, ratios, strict=True)]
        segment = Segment([5] + [7] * n, [0] + [1] * n, [0.0, *behaviour], [-1] + [0] * n)
        outcome = "resolved" if reward else "unresolved"
        trajectories.append(
            Trajectory("task", segments=[segment], reward=reward, outcome=outcome, stop="submitted", turns=1)
        )
    return Group("g", "task", trajectories)


def padded(lists: list[list[float]]) -> Tensor:
    """[4, 2] of lists of one or two."""
    return torch.tensor([(x + [0.0])[:2] for x in lists])


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "ppo"])
def test_golden(name: str) -> None:
    row = PRESETS[name]
    rows, report = rows_of([group()], row, 0)
    (batch,) = microbatches(rows, 100)
    assert (report.kept, batch.mask.tolist()) == (4, [[1, 0], [1, 0], [1, 0], [1, 1]])
    divisor = normaliser(row, action_tokens=5, trajectories=4, context=CONTEXT)
    loss, _ = policy_loss(padded(LOGPROBS), batch.behaviour, batch.advantages, batch.mask, row, divisor)
    assert float(loss) == pytest.approx(GOLDEN[name], rel=1e-5)


def test_golden_ppo() -> None:
    """The one preset with advantages per token, of the values that a critic gives."""
    # Values 0.5 and 0.8 before the two tokens of the first: A = 1 - 0.5 and 1 - 0.8. The others: 0 - 0.2 = -0.2.
    # Over 5 tokens: mean 0.1 / 5 = 0.02, variance (0.48^2 + 0.18^2 + 3 * 0.22^2) / 5 = 0.408 / 5 = 0.0816, std 0.2856571
    # + 0.0001. 1.2 * 0.48 + 1.1 * 0.18 - 7.7 * 0.22 = 0.576 + 0.198 - 1.694 = -0.92
    row = PRESETS["ppo"]
    rows, report = rows_of([group()], row, 0)
    values = [[0, 0.5, 0.8] if r.advantage else [0, 0.2] for r in rows]
    (batch,) = microbatches(valued(rows, values, row), 100)
    divisor = normaliser(row, action_tokens=5, trajectories=4, context=CONTEXT)
    loss, _ = policy_loss(padded(LOGPROBS), batch.behaviour, batch.advantages, batch.mask, row, divisor)
    assert float(loss) == pytest.approx(0.92 / 0.2857571 / 5, rel=1e-5) and report.kept == 4


def trl_loss(batch: tuple[Tensor, ...], level: str = "token", **settings: Any) -> Tensor:
    """TRL's own `_compute_loss` on given log-probs, without its trainer; `weights` [B, T] stand for those with which it
    corrects vLLM's mismatch."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="needs the extra `train`")
    if not hasattr(grpo_trainer.GRPOTrainer, "_compute_loss"):
        pytest.skip("this trl has no GRPOTrainer._compute_loss")
    logprobs, reference, advantages, mask = batch
    weights = settings.pop("weights", None)
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        args=SimpleNamespace(delta=settings.pop("delta", None), steps_per_generation=1),
        _metrics=defaultdict(lambda: defaultdict(list)),
        model=SimpleNamespace(training=True),
        importance_sampling_level=level,
        max_completion_length=CONTEXT,
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        **settings,
    )
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages[:, 0],
        "old_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": weights,
    }
    return grpo_trainer.GRPOTrainer._compute_loss(stub, None, inputs)


def random_batch(seed: int = 6, b: int = 4, t: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, behaviour, advantages, mask in fp64; ratios spread over all clips."""
    g = torch.Generator().manual_seed(seed)
    behaviour = -torch.rand(b, t, generator=g, dtype=torch.float64) * 3
    logprobs = behaviour + torch.randn(b, t, generator=g, dtype=torch.float64)
    advantages = torch.tensor([[1.5], [-0.5], [-0.7], [0.2]], dtype=torch.float64).expand(b, t)
    mask = (torch.rand(b, t, generator=g) < 0.6).double()
    mask[:, 0] = 1
    return logprobs, behaviour, advantages, mask


def agree(row: Algorithm, theirs: Tensor, x: Tensor, batch: tuple[Tensor, ...], old: Tensor | None = None) -> None:
    """Loss and gradient of both, to 1e-12."""
    _, behaviour, advantages, mask = batch
    divisor = normaliser(row, action_tokens=int(mask.sum()), trajectories=4, context=CONTEXT)
    ours, _ = policy_loss(x, behaviour, advantages, mask, row, divisor, old=old)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    (mine,), (other,) = torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x)
    assert torch.allclose(mine, other, rtol=1e-12, atol=0) and mine.any()


TRL = {
    # preset, what is replaced, TRL's settings; its `bnpo` and `dapo` divide by action tokens, `grpo` averages rows
    "grpo": ("grpo", {}, {"loss_type": "bnpo"}),
    "grpo as in its paper": ("grpo", {"aggregation": "sequence"}, {"loss_type": "grpo"}),
    "cwm": ("cwm", {}, {"loss_type": "dr_grpo"}),
    "dapo": ("dapo", {}, {"loss_type": "dapo"}),
    "dr_grpo": ("dr_grpo", {}, {"loss_type": "dr_grpo"}),
    "gspo": ("gspo", {}, {"loss_type": "grpo", "level": "sequence"}),
    "cispo": ("cispo", {}, {"loss_type": "cispo", "epsilon_high": 5.0}),  # there the cap itself
    "rloo": ("rloo", {}, {"loss_type": "dr_grpo"}),
    "reinforce++": ("reinforce++", {}, {"loss_type": "dapo"}),
    "dual clip": ("grpo", {"dual_clip": 1.7}, {"loss_type": "dapo", "delta": 1.7}),
}


@pytest.mark.parametrize("case", TRL)
def test_agrees_with_trl(case: str) -> None:
    name, overrides, settings = TRL[case]
    row, batch = algorithm(name, **overrides), random_batch()
    x = batch[0].clone().requires_grad_()
    clips = {"epsilon_low": row.clip_low, "epsilon_high": row.clip_high}
    agree(row, trl_loss((x, *batch[1:]), **{**clips, **settings}), x, batch)


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_corrections_agree_with_trl(correction: str) -> None:
    """TRL multiplies by weights that it makes while it generates: here they are made as its `token_truncate` and
    `token_mask` say, and its loss is given the learner's old log-probs."""
    batch, g = random_batch(), torch.Generator().manual_seed(0)
    old = batch[1] + 0.5 * torch.randn(4, 7, generator=g, dtype=torch.float64)
    weights = (old - batch[1]).exp()
    weights = weights.clamp(max=1.3) if correction == "truncate" else weights * ((weights >= 0.7) & (weights <= 1.3))
    row = algorithm("grpo", correction=correction, correction_low=0.7, correction_high=1.3)
    x = batch[0].clone().requires_grad_()
    settings = {"loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.2, "weights": weights}
    agree(row, trl_loss((x, old, *batch[2:]), **settings), x, batch, old)
