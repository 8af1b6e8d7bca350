"""`report.html`: one static file with a run's curves, ledger, summary and a trajectory to read. No script, no network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from policy.renderer import Renderer
from rl.ledger import is_idle
from rl.metrics import GLOSSARY, read

CHARTS = (
    ("Held-out tasks solved", ("solve",)),
    ("Training reward and solve rate", ("reward", "solve_rate")),
    ("Solve rate by source of tasks", ("source_solve",)),
    ("Groups with a signal", ("live_groups",)),
    ("Entropy, nats", ("entropy",)),
    ("Mismatch KL, nats a token", ("mismatch_kl",)),
    ("Engine, learner (share of time busy)", ("engine_busy", "learner_busy")),
    ("Episodes in a sandbox", ("env_busy",)),
    ("Oldest token, versions", ("staleness_max",)),
    ("Turns", ("turns",)),
)
CHART_STYLE = (
    ".t{font-weight:600;font-size:12px}.y{font-size:10px;text-anchor:end;fill:#555}.l{font-size:10px}.g{stroke:#eee}"
)
"""What the classes of a `chart` look like."""
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706")
Curve = tuple[str, list[tuple[float, float]]]


def chart(title: str, curves: Sequence[Curve], width: int = 380, height: int = 200, high: float | None = None) -> str:
    """An SVG line chart of named curves of (x, y) points; `high` is the axis' end, by default the highest point."""
    points = [p for _, c in curves for p in c]
    if not points:
        return ""
    left, right, top, bottom = 46, 8, 24, 22
    x1 = max(1.0, *(x for x, _ in points))
    low, high = min(0.0, *(y for _, y in points)), max(y for _, y in points) if high is None else high
    high = high if high > low else low + 1

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / x1 * (width - left - right), top + (high - y) / (high - low) * (height - top - bottom)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img"><text x="{left}" y="14" class="t">{html.escape(title)}</text>'
    ]
    for fraction in (0.0, 0.5, 1.0):
        value = low + fraction * (high - low)
        _, y = at(0, value)
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" class="g"/><text x="{left - 4}" y="{y + 4:.1f}" class="y">{value:.3g}</text>'
        )
    parts.append(f'<text x="{width - right}" y="{height - 6}" class="y">step {x1:g}</text>')
    for number, (name, curve) in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in curve))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(curves) > 1:
            parts.append(
                f'<text x="{left + 6 + 120 * number}" y="{height - 6}" fill="{colour}" class="l">{html.escape(name)}</text>'
            )
    return "".join([*parts, "</svg>"])


def _curves(rows: list[dict[str, Any]], names: Sequence[str]) -> list[Curve]:
    if names == ("solve",):
        splits = sorted({r["split"] for r in rows if r["kind"] == "eval"})
        return [(s, [(r["step"], r["solve"]) for r in rows if r["kind"] == "eval" and r["split"] == s]) for s in splits]
    if names == ("source_solve",):
        found = [(r["step"], r["source_solve"]) for r in rows if "source_solve" in r]
        sources = sorted({name for _, solve in found for name in solve})
        return [(name, [(step, solve[name]) for step, solve in found if name in solve]) for name in sources]
    return [(n, [(r["step"], r[n]) for r in rows if r["kind"] == "step" and n in r]) for n in names]


def _bars(ledgers: dict[str, dict[str, float]]) -> str:
    out = []
    for part, labels in ledgers.items():
        total = sum(labels.values()) or 1.0
        cells = "".join(
            f'<span style="width:{100 * s / total:.2f}%;background:{"#e5e7eb" if is_idle(k) else COLOURS[i % 4]}" title="{k} {s:.1f} s">{k if s / total > 0.07 else ""}</span>'
            for i, (k, s) in enumerate(sorted(labels.items(), key=lambda kv: -kv[1]))
        )
        out.append(f"<div class='bar'><b>{part}</b><div>{cells}</div></div>")
    return "".join(out)


def _example(directory: Path, renderer: Renderer) -> str:
    files = sorted((directory / "evaluations").glob("*.jsonl"))
    if not files:
        return ""
    rows = [json.loads(line) for line in files[-1].read_text().splitlines()]
    row = next((r for r in rows if r["outcome"] == "resolved"), rows[0] if rows else None)
    if row is None:
        return ""
    segment, spans = row["segments"][0], []
    for token, mask in zip(segment["token_ids"], segment["loss_mask"], strict=True):
        spans.append(f"<{'b' if mask else 'i'}>{html.escape(renderer.decode([token]))}</{'b' if mask else 'i'}>")
    return f"<h2>A trajectory: {html.escape(row['task_id'])}, {row['outcome']}</h2><pre>{''.join(spans)}</pre><p>Bold: sampled by the policy, trained on. The rest was read.</p>"


def write_report(directory: Path, renderer: Renderer) -> Path:
    """Write `report.html` from the run's own files; returns its path. `renderer` is that of the run's model."""
    rows = read(directory / "metrics.jsonl")
    end: dict[str, Any] = next((r for r in reversed(rows) if r["kind"] == "end"), {})
    charts = "".join(chart(title, [c for c in _curves(rows, names) if c[1]]) for title, names in CHARTS)
    glossary = "".join(f"<tr><td><code>{k}</code></td><td>{html.escape(v)}</td></tr>" for k, v in GLOSSARY.items())
    style = (
        "body{font:14px system-ui;max-width:1200px;margin:2em auto;color:#111}svg{width:380px;border:1px solid #e5e7eb;margin:4px}"
        f"{CHART_STYLE}"
        ".bar>div{display:flex;height:22px;margin-bottom:6px}.bar span{overflow:hidden;color:#111;font-size:11px;padding:3px}"
        "pre{background:#f8fafc;padding:1em;white-space:pre-wrap}pre i{font-style:normal;color:#64748b}td{padding:2px 8px}"
    )
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(directory.name)}</title><style>{style}</style>"
        f"<h1>{html.escape(directory.name)}</h1><pre>{html.escape(end.get('summary', 'the run has not ended'))}</pre>{charts}"
        f"<h2>Where the time went</h2>{_bars(end.get('ledgers', {}))}{_example(directory, renderer)}"
        f"<h2>Recipe</h2><pre>{html.escape((directory / 'recipe.toml').read_text())}</pre><h2>Metrics</h2><table>{glossary}</table>"
    )
    path = directory / "report.html"
    path.write_text(page)
    return path
