"""What the demo leaves behind for people: a table, loss.png and a self-contained report.html."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

ROWS = (
    ("heldout_loss_before", "held-out loss before", "{:.3f} nats"),
    ("heldout_loss_after", "held-out loss after", "{:.3f} nats"),
    ("teacher_heldout_loss", "teacher's held-out loss", "{:.3f} nats"),
    ("heldout_kl_to_teacher", "held-out KL to the teacher", "{:.3f} nats"),
    ("tokens_trained", "tokens trained on", "{:,.0f}"),
    ("student_tokens_per_second", "student throughput", "{:,.0f} tokens/s"),
    ("teacher_tokens_per_second", "teacher throughput", "{:,.0f} tokens/s"),
    ("replay_over_online_throughput", "epoch 2 from the cache, teacher stopped, over epoch 1", "{:.2f} ×"),
    ("entries_per_token", "sparse entries", "{:.1f} a token"),
    ("bytes_per_token", "received on the wire", "{:.1f} B/token"),
    ("seconds_waiting_for_targets", "waited for the teacher", "{:.1f} s"),
    ("overhead_vs_cross_entropy", "overhead vs cross-entropy, waiting included", "{:+.1%}"),
    ("overhead_vs_cross_entropy_without_waiting", "overhead vs cross-entropy, targets at hand", "{:+.1%}"),
    ("offline_overhead_vs_cross_entropy", "overhead vs cross-entropy, epoch from the cache", "{:+.1%}"),
)


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value with unit) of each figure that the report holds."""
    return [(label, form.format(report[key])) for key, label, form in ROWS if report.get(key) is not None]


def table(report: dict[str, Any]) -> Table:
    made = Table("figure", "value", title="logitstream demo")
    for label, value in rows(report):
        made.add_row(label, value)
    return made


def plot_loss(progress: list[dict[str, Any]], report: dict[str, Any], path: Path) -> None:
    """Training loss by tokens seen, with the held-out losses of student and teacher."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    tokens = [row["tokens"] for row in progress]
    axis.plot(tokens, [row["loss"] for row in progress], label="training loss (distillation)")
    ends = [0, max(tokens, default=1)]
    losses = [report["heldout_loss_before"], report["heldout_loss_after"]]
    axis.plot(ends, losses, "o", label="held-out loss of the student")
    axis.axhline(report["teacher_heldout_loss"], ls="--", color="grey", label="held-out loss of the teacher")
    if len(epochs := report.get("epochs", [])) > 1:
        axis.axvline(epochs[0]["tokens"], ls=":", color="grey", label="teacher stopped; cache from here")
    axis.set(xlabel="tokens trained on", ylabel="nats per token", ylim=(0, None))
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_html(report: dict[str, Any], loss_png: Path, path: Path) -> None:
    image = base64.b64encode(loss_png.read_bytes()).decode()
    cells = "\n".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in rows(report))
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>logitstream demo</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}}
td{{padding:.2rem 1rem .2rem 0;border-bottom:1px solid #ddd}}td+td{{text-align:right}}img{{max-width:100%}}
pre{{background:#f6f6f6;padding:1rem;overflow:auto}}</style>
<h1>logitstream demo</h1><table>{cells}</table>
<p><img alt="training and held-out loss by tokens trained on" src="data:image/png;base64,{image}"></p>
<details><summary>report.json</summary><pre>{html.escape(json.dumps(report, indent=2))}</pre></details></html>
""",
        encoding="utf-8",
    )
