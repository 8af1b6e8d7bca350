"""The policy loss against hand-made numbers, finite differences, TRL and itself under padding and splitting."""

from collections import defaultdict
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rl.advantages import PRESETS, algorithm
from rl.losses import normaliser, policy_loss, token_logprobs

torch.set_num_threads(1)
CWM, GRPO = PRESETS["cwm"], PRESETS["grpo"]
GSPO = algorithm("grpo", ratio="sequence")


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_batch(seed: int = 0, b: int = 4, t: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, behaviour, advantages, mask in fp64; ratios spread to both sides of the clips."""
    g = torch.Generator().manual_seed(seed)
    behaviour = -torch.rand(b, t, generator=g, dtype=torch.float64) * 3
    noise = torch.randn(b, t, generator=g, dtype=torch.float64) + torch.randn(b, 1, generator=g, dtype=torch.float64)
    logprobs = behaviour + noise * 0.3
    advantages = torch.randn(b, 1, generator=g, dtype=torch.float64).expand(b, t).clone()
    mask = (torch.rand(b, t, generator=g) < 0.6).double()
    mask[:, 0] = 1
    return logprobs, behaviour, advantages, mask


def test_by_hand() -> None:
    # Ratios 1.5, 1.1, 0.5, 0.9 under advantages +1, +1, -1, -1; a fifth position is masked.
    # min(1.5, 1.25) = 1.25 (clipped high); 1.1; min(-0.5, -0.8) = -0.8 (clipped low); min(-0.9, -0.9) = -0.9
    # loss = -(1.25 + 1.1 - 0.8 - 0.9) / 10 = -0.065
    behaviour = rows([-1, -1, -1, -1, 0])
    logprobs = behaviour + rows([log(1.5), log(1.1), log(0.5), log(0.9), 5])
    advantages, mask = rows([1, 1, -1, -1, 9]), rows([1, 1, 1, 1, 0])
    loss, metrics = policy_loss(logprobs, behaviour, advantages, mask, CWM, 10.0, entropy=rows([1, 2, 3, 4, 99]))
    assert float(loss) == pytest.approx(-0.065)
    assert metrics["ratio"] == pytest.approx((1.5 + 1.1 + 0.5 + 0.9) / 4)
    assert (metrics["clip_high"], metrics["clip_low"], metrics["entropy"]) == (0.25, 0.25, 2.5)
    # k3 = r - 1 - ln r: 0.5 - 0.405465, 0.1 - 0.0953102, -0.5 + 0.693147, -0.1 + 0.1053605
    assert metrics["mismatch_kl"] == pytest.approx((0.094535 + 0.0046898 + 0.193147 + 0.0053605) / 4, abs=1e-6)
    # grpo clips at 1.2 instead: -(1.2 + 1.1 - 0.8 - 0.9) / 10
    assert float(policy_loss(logprobs, behaviour, advantages, mask, GRPO, 10.0)[0]) == pytest.approx(-0.06)


def test_sequence_ratio_by_hand() -> None:
    # log-ratios 0.2 and 0.4: their mean 0.3, ratio e^0.3 = 1.34986 for both tokens, clipped to 1.2: -(1.2 + 1.2) / 4
    behaviour = rows([-1, -1, -1])
    loss, metrics = policy_loss(behaviour + rows([0.2, 9, 0.4]), behaviour, rows([1, 1, 1]), rows([1, 0, 1]), GSPO, 4.0)
    assert float(loss) == pytest.approx(-0.6)
    assert metrics["ratio"] == pytest.approx(exp(0.3))
    assert metrics["clip_high"] == 1.0


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    logprobs, _, advantages, mask = random_batch()
    x = logprobs.clone().requires_grad_()
    loss, metrics = policy_loss(x, logprobs, advantages, mask, CWM, 13.0)
    loss.backward()
    assert torch.allclose(x.grad, -advantages * mask / 13.0)
    assert (metrics["ratio"], metrics["clip_low"], metrics["clip_high"], metrics["mismatch_kl"]) == (1, 0, 0, 0)


@pytest.mark.parametrize("row", [CWM, GRPO, GSPO], ids=["cwm", "grpo", "sequence"])
def test_gradient_is_that_of_finite_differences(row: object) -> None:
    logprobs, behaviour, advantages, mask = random_batch(1, b=16)

    def loss(x: Tensor) -> Tensor:
        return policy_loss(x, behaviour, advantages, mask, row, 17.0)[0]  # type: ignore[arg-type]

    x = logprobs.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x,), eps=1e-6, atol=1e-8)
    _, metrics = policy_loss(x, behaviour, advantages, mask, row, 17.0)  # type: ignore[arg-type]
    assert metrics["clip_low"] > 0 and metrics["clip_high"] > 0, "the batch must reach both clips"


@pytest.mark.parametrize("row", [CWM, GSPO], ids=["token", "sequence"])
@pytest.mark.parametrize("poison", [7.0, float("nan"), float("inf"), -float("inf")])
def test_what_is_masked_does_not_enter(row: object, poison: float) -> None:
    tensors = random_batch(2)
    mask = tensors[3]
    results = []
    for dirty in (False, True):
        filled = [torch.where((mask == 0) & torch.tensor(dirty), poison, t) for t in tensors[:3]]
        x = filled[0].clone().requires_grad_()
        loss, metrics = policy_loss(x, filled[1], filled[2], mask, row, 5.0, entropy=filled[1])  # type: ignore[arg-type]
        loss.backward()
        results.append((loss.detach(), x.grad, metrics))
    (a, grad_a, metrics_a), (b, grad_b, metrics_b) = results
    assert torch.equal(a, b) and metrics_a == metrics_b
    assert torch.equal(grad_a, grad_b) and torch.equal(grad_a * (1 - mask), torch.zeros_like(mask))


@pytest.mark.parametrize("row", [CWM, GSPO], ids=["token", "sequence"])
def test_neighbours_do_not_enter(row: object) -> None:
    """A row's gradient is the same whatever the other rows hold, and whatever padding follows it."""
    a, b = random_batch(3), random_batch(4)
    mixed = [torch.cat([x[:2], y[2:]]) for x, y in zip(a, b, strict=True)]
    padded = [torch.cat([x, torch.zeros(4, 3, dtype=x.dtype)], dim=1) for x in a]
    grads = []
    for logprobs, behaviour, advantages, mask in (a, mixed, padded):
        x = logprobs.clone().requires_grad_()
        policy_loss(x, behaviour, advantages, mask, row, 5.0)[0].backward()  # type: ignore[arg-type]
        grads.append(x.grad[:2, :7])
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_microbatches_add_up() -> None:
    batch = random_batch(5, b=6)
    divisor = normaliser(GRPO, int(batch[3].sum()), 6, 999)
    whole = policy_loss(*batch, GRPO, divisor)[0]
    parts = [policy_loss(*[x[i : i + 2] for x in batch], GRPO, divisor)[0] for i in (0, 2, 4)]
    assert float(sum(parts)) == pytest.approx(float(whole))


def test_normalisers() -> None:
    assert normaliser(GRPO, 40, 3, 512) == 40
    assert normaliser(CWM, 40, 3, 512) == 3 * 512
    assert normaliser(GRPO, 0, 0, 512) == 1


def test_a_huge_mismatch_stays_finite() -> None:
    x = rows([0.0, -500.0]).requires_grad_()
    loss, metrics = policy_loss(x, rows([-500, 0]), rows([-1, 1]), rows([1, 1]), CWM, 1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all() and metrics["ratio"] < 1e9


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [3, 5, 1000])
def test_chunked_logprobs_equal_log_softmax(masked: bool, chunk: int) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 5, generator=g, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 5, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (3, 7), generator=g)
    mask = (torch.rand(3, 7, generator=g) < 0.5).double() if masked else torch.ones(3, 7, dtype=torch.float64)
    weights = torch.randn(3, 7, generator=g, dtype=torch.float64)
    table = (hidden @ head.T).log_softmax(-1)
    plain = table.gather(-1, targets.unsqueeze(-1)).squeeze(-1) * mask
    expected = torch.autograd.grad((plain * weights).sum(), (hidden, head))
    logprobs, entropy = token_logprobs(hidden, head, targets, mask if masked else None, chunk)
    found = torch.autograd.grad((logprobs * weights).sum(), (hidden, head))
    assert torch.allclose(logprobs, plain)
    assert torch.allclose(entropy, -(table.exp() * table).sum(-1) * mask) and not entropy.requires_grad
    assert all(torch.allclose(x, y) for x, y in zip(found, expected, strict=True))


def test_chunks_do_not_keep_the_table() -> None:
    """What autograd saves for the backward pass is far less than the [B T, V] table."""
    hidden, head = torch.randn(1, 512, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        token_logprobs(hidden, head, torch.zeros(1, 512, dtype=torch.int64), chunk=64)
    assert max(saved) < 512 * 1000 / 10


def test_nothing_selected_is_zero() -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    logprobs, entropy = token_logprobs(
        hidden, torch.randn(9, 4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    )
    assert not logprobs.any() and not entropy.any()


def trl_loss(batch: tuple[Tensor, ...], loss_type: str, level: str, low: float, high: float, length: int) -> float:
    """TRL's own `_compute_loss` on given log-probs, without its trainer."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="needs the extra `train`")
    logprobs, behaviour, advantages, mask = batch
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(delta=None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        model=SimpleNamespace(training=True),
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=low,
        epsilon_high=high,
        max_completion_length=length,
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
    )
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages[:, 0],
        "old_per_token_logps": behaviour,
    }
    return float(grpo_trainer.GRPOTrainer._compute_loss(stub, None, inputs))


@pytest.mark.parametrize(
    ("row", "loss_type", "level"),
    [(GRPO, "bnpo", "token"), (GSPO, "bnpo", "sequence"), (CWM, "dr_grpo", "token")],
    ids=["token mean", "sequence ratio", "constant"],
)
def test_agrees_with_trl(row: object, loss_type: str, level: str) -> None:
    """TRL's `bnpo` divides by action tokens, `dr_grpo` by rows x longest completion: our `token` and `constant`."""
    batch = random_batch(6)
    divisor = normaliser(row, int(batch[3].sum()), 4, 100)  # type: ignore[arg-type]
    ours = policy_loss(*batch, row, divisor)[0]  # type: ignore[arg-type]
    theirs = trl_loss(batch, loss_type, level, row.clip_low, row.clip_high, 100)  # type: ignore[attr-defined]
    assert float(ours) == pytest.approx(theirs, rel=1e-12)
