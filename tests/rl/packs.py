"""What the tests of packing and of ranks share: a model whose layers differ, and rows."""

import random

import torch

from policy import models
from rl.batch import Row

V = 48


def mixed_model(seed: int = 0, *, heads: int = 4, kv_heads: int = 4) -> torch.nn.Module:
    """CWM's layout, small: three layers with a window of 6 to one without, in fp64; norms do not round to fp32 on the way."""
    size = {"vocab_size": V, "hidden_size": 32, "layers": 4, "intermediate_size": 48, "max_context": 64}
    config = models.describe(models.ModelConfig(**size, heads=heads, kv_heads=kv_heads))
    config.sliding_window = 6
    config.layer_types = ["sliding_attention"] * 3 + ["full_attention"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = models.CwmForCausalLM(config)
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)  # attention that is not flat
    for owner in model.modules():
        for name, norm in list(owner.named_children()):
            if type(norm).__name__ == "CwmRMSNorm":
                exact = torch.nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon)
                exact.weight.data.copy_(norm.weight.data)
                setattr(owner, name, exact)
    return model.double()


def some_rows(n: int, seed: int = 0, longest: int = 40) -> list[Row]:
    rng, rows = random.Random(seed), []
    for i in range(n):
        length = rng.randint(5, longest)
        mask = [0, 0] + [rng.randint(0, 1) for _ in range(length - 3)] + [1]
        rows.append(
            Row(
                token_ids=[rng.randrange(V) for _ in range(length)],
                loss_mask=mask,
                logprobs=[-3.5 * m for m in mask],
                versions=[m - 1 for m in mask],
                advantage=rng.choice([-1.0, 0.5, 1.0]),
                trajectory=f"t{i // 2}",
            )
        )
    return rows
