"""What only a GPU shows: variable-length attention against attention under a mask, and a rank over nccl."""

from pathlib import Path

import pytest
import torch

from rl.attention import _varlen, attend
from rl.learner import Learner
from rl.packing import Packed
from rl.ranks import Place
from rl.updates import LearnConfig
from tests.rl.packs import mixed_model, on_ranks, some_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="gpu: torch sees none")


@pytest.mark.parametrize("window", [None, 5])
def test_variable_length_attention_is_that_under_the_mask(window: int | None) -> None:
    inside = torch.arange(70, device="cuda") < torch.tensor([[70], [1], [33]], device="cuda")
    layout, n = Packed(inside), int(inside.sum())
    shapes = ((1, 8, n, 64), (1, 4, n, 64), (1, 4, n, 64))
    halves = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    wholes = [x.detach().float().requires_grad_() for x in halves]
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    got = _varlen(*halves, layout, 0.125, window)
    expected = attend(module, *wholes, None, layout=layout, scaling=0.125, sliding_window=window)[0]
    weights = torch.randn_like(expected)
    (got.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    assert got.shape == expected.shape
    for a, b in ((got, expected), *((x.grad, y.grad) for x, y in zip(halves, wholes, strict=True))):
        assert (a.float() - b).norm() < 0.02 * b.norm()


def scored(place: Place) -> tuple[bool, list[list[float]]]:
    """Whether rows were packed, and their scores after a batch."""
    x = Learner(LearnConfig(max_tokens=512, lr=1e-4, minibatches=1), mixed_model().float(), place, context=64)
    x.step(some_rows(11))
    return x.policy.sharing.packed, x.score([r.token_ids for r in some_rows(9, 77)])


def test_a_rank_over_nccl_scores_as_the_cpu(tmp_path: Path) -> None:
    (packed, found), (_, expected) = (
        on_ranks(1, scored, tmp_path / "gpu", device="cuda", dtype="bf16")[0],
        scored(Place()),
    )
    assert packed
    gaps = [abs(a - b) for mine, theirs in zip(found, expected, strict=True) for a, b in zip(mine, theirs, strict=True)]
    assert sum(gaps) / len(gaps) < 0.05
