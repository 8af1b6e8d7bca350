"""From trajectories to better weights: the loop, its parts and its records. Start at `rl/loop.py`."""
