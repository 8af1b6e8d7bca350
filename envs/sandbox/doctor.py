"""What this host can enforce for sandboxes, as rows of a table."""

from __future__ import annotations

import os

from envs.errors import CodeworldError

Row = tuple[str, str, str]
"""What, its value here, and what to do about it ("" where nothing needs doing)."""


def probe() -> list[Row]:
    """The sandbox rows of the doctor's table; each backend is tried with one trivial sandbox."""
    from envs.sandbox import BACKENDS, cgroups, make_backend

    rows: list[Row] = []
    for name in BACKENDS:
        try:
            make_backend(name).close()
            rows.append((f"sandbox {name}", "works", ""))
        except CodeworldError as error:
            cause, _, remedy = " ".join(str(error).split()).partition("; ")
            rows.append((f"sandbox {name}", cause, remedy))
    return [*rows, *_limits(cgroups.hierarchy()), _cache()]


def _cache() -> Row:
    from envs.sandbox import layers

    try:
        most = layers.cap() / 1e9
        count, size = layers.usage()
    except (CodeworldError, OSError) as error:
        cause, _, remedy = " ".join(str(error).split()).partition("; ")
        return ("image layers", cause, remedy)
    over = f"in use, or evicted with the next new layer; raise {layers.CAP} if that is often"
    return ("image layers", f"{count}, {size / 1e9:.2f} of {most:g} GB", over if size > most * 1e9 else "")


def _limits(found: object) -> list[Row]:
    root = os.geteuid() == 0
    user = "a host uid of its own, owning nothing" if root else "this user, in a user namespace"
    rows: list[Row] = [("native: runs as", user, "")]
    if found:
        version = getattr(found, "version", 1)
        swap = "" if version == 2 or _swap_capped(found) else " (swap is not counted by this kernel)"
        return [
            *rows,
            ("native: memory", f"cgroup v{version}, all processes together{swap}", ""),
            ("native: cpu", f"cgroup v{version} quota", ""),
            ("native: pids", f"cgroup v{version}", ""),
            ("native: disk", "size-capped tmpfs", ""),
        ]
    remedy = (
        "mount /sys/fs/cgroup writable"
        if root
        else "start as root, or in a delegated cgroup (systemd-run --user -p Delegate=yes)"
    )
    return [
        *rows,
        ("native: memory", "RLIMIT_AS of each process (worst case: pids x memory_mb)", remedy),
        ("native: cpu", "timeouts only", remedy),
        ("native: pids", "RLIMIT_NPROC of the sandbox's user", ""),
        ("native: disk", "size-capped tmpfs", ""),
    ]


def _swap_capped(found: object) -> bool:
    parents = getattr(found, "parents", {})
    return bool(parents) and (parents["memory"] / "memory.memsw.limit_in_bytes").exists()
