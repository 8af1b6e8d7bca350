"""Packing: who goes where, by hand and by property, and that rows of a pack never see one another."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rl.attention import check_heads
from rl.batch import Row, microbatches
from rl.learner import Learner
from rl.packing import Packed, Sharing
from rl.updates import LearnConfig
from tests.rl.packs import V, mixed_model, some_rows

torch.set_num_threads(1)


def test_a_pack_by_hand() -> None:
    inside = torch.tensor([[True, True, True], [True, True, False]])
    layout, x = Packed(inside), torch.tensor([[11, 12, 13], [21, 22, 0]])
    assert layout.pack(x).tolist() == [[11, 12, 13, 21, 22]]
    assert layout.arguments()["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert layout.unpack(layout.pack(x)).tolist() == x.tolist()


def test_padded_rows_are_dealt_largest_first() -> None:
    # 8 | 7, 6 to the cheaper second, 5 and 4 to the first (8 < 13, 13 = 13), 3 to the second (16 < 17)
    lengths = [3, 8, 4, 7, 5, 6]
    assert Sharing(ranks=2).all(lengths, 100) == [[[2, 4, 1]], [[0, 5, 3]]]
    # 3 x 4 and 2 x 6 are 12 positions; with the longest they would be 3 x 8 and 3 x 7
    assert Sharing(ranks=2).all(lengths, 12) == [[[2, 4], [1]], [[0, 5], [3]]]
    assert Sharing(ranks=2, rank=1).mine(lengths, 12) == [[0, 5], [3]]


def test_packs_are_dealt_in_rounds_of_like_cost() -> None:
    # Two rounds of two packs hold 20 each: 14 | 12 | 11 | 9, then 8 on 9, 7 on 11, 6 on 12, 5 on 14 (cost 19 18 18 17).
    lengths = [5, 6, 7, 8, 9, 11, 12, 14]
    assert Sharing(packed=True, ranks=2).all(lengths, 20) == [[[7, 0], [4, 3]], [[6, 1], [5, 2]]]
    # Pairs cost: 4 rows of 5 are cheaper than one of 20 (20 + 40 > 20 + 10), so the sixth goes to them.
    assert Sharing(packed=True, ranks=2, pair_cost=0.1).all([20, 5, 5, 5, 5, 5], 30) == [[[0]], [[1, 2, 3, 4, 5]]]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_row_once_within_the_budget_and_balanced(packed: bool, ranks: int) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        lengths = [rng.randint(1, 64) for _ in range(rng.choice([0, 1, 3, 50, 200]))]
        sharing = Sharing(packed=packed, ranks=ranks, pair_cost=0.01)
        cuts = sharing.all(lengths, 64)
        assert len(cuts) == ranks and len({len(cut) for cut in cuts}) == 1
        assert sorted(i for cut in cuts for bunch in cut for i in bunch) == list(range(len(lengths)))
        for bunch in (b for cut in cuts for b in cut if b):
            inside = [lengths[i] for i in bunch]
            assert (sum(inside) if packed else max(inside) * len(inside)) <= 64
        if len(lengths) == 200:
            costs = [sum(sharing.cost(lengths[i]) for bunch in cut for i in bunch) for cut in cuts]
            assert max(costs) < 1.03 * min(costs)
        if packed and lengths:  # few packs: at most a round more than the tokens fill
            assert len(cuts[0]) <= -(-sum(lengths) // (64 * ranks)) * 1.2 + 1


def test_a_share_of_nothing_is_a_position_of_padding() -> None:
    rows = some_rows(1)
    shares = [microbatches(rows, 64, Sharing(ranks=2, rank=r)) for r in range(2)]
    assert [[b.action_tokens for b in s] for s in shares] == [[rows[0].action_tokens], [0]]
    assert shares[1][0].token_ids.shape == (1, 1) and not shares[1][0].inside.any()


def scores(x: Learner, rows: list[Row]) -> list[list[float]]:
    return x.score([r.token_ids for r in rows])


def learner(packing: str, **changes: object) -> Learner:
    settings = {"max_tokens": 512, "packing": packing, "lr": 3e-4, "minibatches": 1, **changes}
    return Learner(LearnConfig(**settings), mixed_model(), context=64)  # type: ignore[arg-type]


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_rows_of_a_pack_never_see_one_another(changed: int) -> None:
    """Other tokens in one row, before, between or behind the others: the others' log-probs stay, bit by bit."""
    x, rows = learner("packed"), some_rows(3)
    assert len(x.policy.sharing.mine([len(r.token_ids) for r in rows], 512)) == 1
    other = replace(rows[changed], token_ids=[(t + 7) % V for t in rows[changed].token_ids])
    before, after = scores(x, rows), scores(x, [other if i == changed else r for i, r in enumerate(rows)])
    for i in range(3):
        assert (before[i] == after[i]) == (i != changed)


def test_packed_rows_score_as_alone() -> None:
    rows = some_rows(6)
    packed, alone = scores(learner("packed"), rows), [scores(learner("padded"), [r])[0] for r in rows]
    for a, b in zip(packed, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-12)


@pytest.mark.parametrize("preset", ["cwm", "grpo", "gspo"])  # one for each aggregation
def test_packed_and_padded_rows_give_the_same_update(preset: str) -> None:
    a, b = learner("packed", algorithm=preset), learner("padded", algorithm=preset)
    one, other = a.step(some_rows(12)), b.step(some_rows(12))
    assert one.loss == pytest.approx(other.loss, abs=1e-12) and one.grad_norm == pytest.approx(
        other.grad_norm, rel=1e-9
    )
    assert one.metrics == pytest.approx(other.metrics, abs=1e-9) and one.positions < other.positions
    for p, q in zip(a.policy.model.parameters(), b.policy.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-9)


def kept(x: Learner) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    rows = torch.stack([torch.arange(40) % V])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x.policy.forward(rows, rows, torch.ones(1, 40, dtype=torch.bool))
    return total


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_checkpointed_activations_give_the_same_update(packing: str) -> None:
    a, b = learner(packing, checkpoint_activations=True), learner(packing)
    one, other = a.step(some_rows(6)), b.step(some_rows(6))
    assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    assert all(torch.equal(p, q) for p, q in zip(a.policy.model.parameters(), b.policy.model.parameters(), strict=True))
    assert kept(a) < kept(b) / 3


def test_the_window_is_counted_with_the_token_itself() -> None:
    layout = Packed(torch.tensor([[True] * 3, [True, True, False]]))
    assert layout.mask(2)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert layout.mask(None)[0, 0].int().tolist()[2] == [1, 1, 1, 0, 0]


def test_key_value_heads_limit_the_split() -> None:
    check_heads(8, 4)
    with pytest.raises(
        ValueError,
        match="^learn.sequence_parallel=3 does not divide the 8 key-value heads of the model; choose one of 1, 2, 4, 8$",
    ):
        check_heads(8, 3)


def test_an_export_names_no_attention_of_ours(tmp_path: Path) -> None:
    learner("packed").export(tmp_path)
    assert "codeworld" not in (tmp_path / "config.json").read_text()
