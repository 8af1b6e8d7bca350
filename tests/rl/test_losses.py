"""The losses against hand-made numbers, finite differences, and themselves under padding and splitting."""

from itertools import product
from math import exp, log

import pytest
import torch
from torch import Tensor

from rl.advantages import PRESETS, Algorithm, algorithm
from rl.losses import normaliser, policy_loss, token_logprobs, value_loss

torch.set_num_threads(1)
CWM, GRPO = PRESETS["cwm"], PRESETS["grpo"]
GSPO = algorithm("grpo", ratio="sequence")
TRUNCATED = algorithm("cispo", correction="truncate")
MASKED = algorithm("gspo", correction="mask")


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
    assert float(loss.detach()) == pytest.approx(-0.065)
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
    assert float(loss.detach()) == pytest.approx(-0.6)
    assert metrics["ratio"] == pytest.approx(exp(0.3))
    assert metrics["clip_high"] == 1.0


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    logprobs, _, advantages, mask = random_batch()
    x = logprobs.clone().requires_grad_()
    loss, metrics = policy_loss(x, logprobs, advantages, mask, CWM, 13.0)
    loss.backward()
    assert torch.allclose(x.grad, -advantages * mask / 13.0)
    assert (metrics["ratio"], metrics["clip_low"], metrics["clip_high"], metrics["mismatch_kl"]) == (1, 0, 0, 0)


def test_dual_clip_by_hand() -> None:
    # Ratios 6 and 2 under A = -1: at least 3 * -1; 6 under A = +1: clipped to 1.2. -(-3 - 2 + 1.2) / 4 = 0.95
    row = algorithm("grpo", dual_clip=3.0)
    behaviour = rows([-7, -7, -7])
    x = (behaviour + rows([log(6), log(2), log(6)])).requires_grad_()
    loss, metrics = policy_loss(x, behaviour, rows([-1, -1, 1]), rows([1, 1, 1]), row, 4.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.95)
    assert x.grad.tolist() == [[0, pytest.approx(2 / 4), 0]]
    assert (metrics["clip_low"], metrics["clip_high"]) == (0, pytest.approx(2 / 3))


def test_clipped_weights_by_hand() -> None:
    # Ratios 7, 2 and 0.1 under A = 1, -1, 2: weights 5, 2 and 0.1 on log-probs -1, -2, -3; -(-5 + 4 - 0.6) / 4 = 0.4.
    # Every token keeps a gradient, -w A / 4: a clip would have stopped the first and, below, the third.
    row = PRESETS["cispo"]
    x = rows([-1, -2, -3]).requires_grad_()
    behaviour = x.detach() - rows([log(7), log(2), log(0.1)])
    loss, metrics = policy_loss(x, behaviour, rows([1, -1, 2]), rows([1, 1, 1]), row, 4.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.4)
    assert x.grad.tolist() == [pytest.approx([-5 / 4, 2 / 4, -0.2 / 4])]
    assert (metrics["clip_low"], metrics["clip_high"]) == (0, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("correction", "expected", "corrected"), [("truncate", (2.0, 1.1, 0.25), 1 / 3), ("mask", (0, 1.1, 0), 2 / 3)]
)
def test_corrections_by_hand(correction: str, expected: tuple[float, ...], corrected: float) -> None:
    # Old / sampler is 3, 1.1 and 0.25 in three tokens: truncated at 2, or left out where not in [0.5, 2]. Current / old
    # is 1.1, 1.5 and 1 under A = 1: clipped to 1.1, 1.2, 1 whatever the sampler says. Loss -(1.1 w + 1.2 w + w) / 10.
    row = algorithm("grpo", correction=correction)
    behaviour = rows([-4, -4, -4])
    old = behaviour + rows([log(3), log(1.1), log(0.25)])
    x = (old + rows([log(1.1), log(1.5), 0])).requires_grad_()
    loss, metrics = policy_loss(x, behaviour, rows([1, 1, 1]), rows([1, 1, 1]), row, 10.0, old=old)
    loss.backward()
    a, b, c = expected
    assert float(loss.detach()) == pytest.approx(-(1.1 * a + 1.2 * b + c) / 10)
    assert x.grad.tolist() == [pytest.approx([-1.1 * a / 10, 0, -c / 10])]  # the second is clipped
    assert metrics["corrected"] == pytest.approx(corrected) and metrics["ratio"] == pytest.approx(1.2)
    # k3 is still of the sampler: its ratios are 3.3, 1.65 and 0.25
    assert metrics["mismatch_kl"] == pytest.approx((5.2 - log(3.3 * 1.65 * 0.25) - 3) / 3)


def test_a_sequence_is_corrected_as_one() -> None:
    # Old / sampler e^0.4 and e^1.2: their geometric mean e^0.8 = 2.2255 is truncated to 2 for both tokens.
    row = algorithm("gspo", correction="truncate")
    old = rows([-1, 9, -1])
    loss, _ = policy_loss(old, old - rows([0.4, 9, 1.2]), rows([1, 1, 1]), rows([1, 0, 1]), row, 1.0, old=old)
    assert float(loss.detach()) == pytest.approx(-2.0)


@pytest.mark.parametrize("bound", ["clip", "clip_weight"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_old_logprobs_the_weight_bounds_alone(bound: str, level: str) -> None:
    """One update per batch: the ratio is 1, both bounds pass, and the gradient is -w A / normaliser."""
    # current / sampler 3 and 1.2 -> truncated 2 and 1.2; as one sequence sqrt(3.6) = 1.8974
    row = algorithm("grpo", ratio=level, bound=bound, correction="truncate")
    x = rows([-1, -2]).requires_grad_()
    loss, metrics = policy_loss(x, x.detach() - rows([log(3), log(1.2)]), rows([1, 1]), rows([1, 1]), row, 4.0)
    loss.backward()
    weights = [2, 1.2] if level == "token" else [3.6**0.5] * 2
    assert x.grad.tolist() == [pytest.approx([-w / 4 for w in weights])]
    assert metrics["ratio"] == 1


def test_trajectories_weigh_the_same_by_sequence() -> None:
    # On-policy ratios 1: means are 2 (three tokens) and -4 (one); -(2 - 4) / 2 trajectories
    row, zero = algorithm("grpo", aggregation="sequence"), rows([0, 0, 0], [0, 0, 0])
    advantages, mask = rows([2, 2, 2], [-4, -4, -4]), rows([1, 1, 1], [0, 1, 0])
    divisor = normaliser(row, action_tokens=4, trajectories=2, context=99)
    assert float(policy_loss(zero, zero, advantages, mask, row, divisor)[0]) == pytest.approx(1.0)
    # Both rows branches of one trajectory of four action tokens: -(2 + 2 + 2 - 4) / 4
    one = normaliser(row, action_tokens=4, trajectories=1, context=99)
    loss = policy_loss(zero, zero, advantages, mask, row, one, lengths=torch.tensor([4.0, 4.0]))[0]
    assert float(loss) == pytest.approx(-0.5)


COMBINATIONS = list(product(["token", "sequence"], ["clip", "clip_weight", "dual"], ["none", "truncate", "mask"]))


@pytest.mark.parametrize(("ratio", "bound", "correction"), COMBINATIONS)
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_gradient_is_that_of_finite_differences(ratio: str, bound: str, correction: str, aggregation: str) -> None:
    """What is constant by definition, i.e. weights, is held at its value while log-probs are moved."""
    logprobs, behaviour, advantages, mask = random_batch(1, b=16)
    old = behaviour + 0.2 * torch.randn(behaviour.shape, generator=torch.Generator().manual_seed(2)).double()
    logprobs = logprobs + (old - behaviour)
    row = algorithm(
        "dr_grpo",
        ratio=ratio,
        bound="clip" if bound == "dual" else bound,
        dual_clip=1.3 if bound == "dual" else None,
        correction=correction,
        correction_low=0.9,
        correction_high=1.1,
        aggregation=aggregation,
    )

    weights = held(row, logprobs, behaviour, old, mask)

    def loss(x: Tensor) -> Tensor:
        if bound != "clip_weight":
            return policy_loss(x, behaviour, advantages, mask, row, 17.0, old=old)[0]
        return -(weights * advantages * x).sum() / 17.0

    x = logprobs.clone().requires_grad_()
    value, metrics = policy_loss(x, behaviour, advantages, mask, row, 17.0, old=old)
    assert torch.allclose(value, loss(logprobs))
    numeric = torch.zeros_like(x)
    for index in product(range(16), range(7)):
        step = torch.zeros_like(logprobs)
        step[index] = 1e-6
        numeric[index] = (loss(logprobs + step) - loss(logprobs - step)) / 2e-6
    assert torch.allclose(torch.autograd.grad(value, x)[0], numeric, atol=1e-8)
    assert metrics["clip_low"] > 0 and metrics["clip_high"] > 0, "the batch must reach both clips"
    assert correction == "none" or 0 < metrics["corrected"] < 1, "the batch must reach the correction"


def held(row: Algorithm, logprobs: Tensor, behaviour: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """The constant factors of `clip_weight`, token by token in plain Python: [B, T]."""
    out = torch.zeros_like(logprobs)
    reference = behaviour if row.correction == "none" else old
    for i, inside in enumerate(mask.bool().tolist()):
        places = [t for t, m in enumerate(inside) if m]
        for t in places:
            group = [t] if row.ratio == "token" else places
            ratio = exp(sum(float(logprobs[i, s] - reference[i, s]) for s in group) / len(group))
            weight = exp(sum(float(reference[i, s] - behaviour[i, s]) for s in group) / len(group))
            if row.correction == "mask" and not 0.9 <= weight <= 1.1:
                weight = 0.0
            share = 1 / len(places) if row.aggregation == "sequence" else 1
            out[i, t] = min(weight, 1.1) * min(max(ratio, 0.8), 1.2) * share
    return out


@pytest.mark.parametrize("row", [CWM, GSPO, TRUNCATED, MASKED], ids=["token", "sequence", "truncate", "mask"])
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


@pytest.mark.parametrize("row", [CWM, GSPO, TRUNCATED, MASKED], ids=["token", "sequence", "truncate", "mask"])
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
    for row in PRESETS.values():
        divisor = normaliser(row, action_tokens=int(batch[3].sum()), trajectories=5, context=999)
        whole = policy_loss(*batch, row, divisor)[0]
        parts = [policy_loss(*[x[i : i + 2] for x in batch], row, divisor)[0] for i in (0, 2, 4)]
        assert float(sum(parts)) == pytest.approx(float(whole))


def test_normalisers() -> None:
    update = {"action_tokens": 40, "trajectories": 3, "context": 512}
    assert normaliser(GRPO, **update) == 40
    assert normaliser(CWM, **update) == 3 * 512
    assert normaliser(PRESETS["gspo"], **update) == 3
    nothing = {"action_tokens": 0, "trajectories": 0, "context": 512}
    assert [normaliser(row, **nothing) for row in (GRPO, CWM, PRESETS["gspo"])] == [1, 512, 1]


def test_value_loss_by_hand() -> None:
    # Old values 1, targets 2, clip 0.5. V = 1.2: inside, (1.2 - 2)^2 = 0.64. V = 1.9: held at 1.5, whose 0.25 is worse than
    # 0.01 and has no gradient. V = 0.2: held at 0.5, whose 2.25 is better than 3.24. (0.64 + 0.25 + 3.24) / (2 * 10)
    values = rows([1.2, 1.9, 0.2, float("nan")]).requires_grad_()
    loss = value_loss(values, rows([1, 1, 1, 1]), rows([2, 2, 2, 2]), rows([1, 1, 1, 0]), 0.5, 10.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.2065)
    assert values.grad.tolist() == [pytest.approx([-0.8 / 10, 0, -1.8 / 10, 0])]


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
