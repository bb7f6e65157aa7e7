"""Exact held-out figures of the demo, and what it leaves for people: a table, loss.png and report.html."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from logitstream.cache.heldout import read_heldout

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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


@torch.inference_mode()
def evaluate_heldout(student: Path, teacher: Path, cache: Path) -> dict[str, float]:
    """Compare the models' full next-token distributions, with none of the product's own code for the loss.

    cache: notes the sequences that the student was not trained on. Returns means per predicted token, in nats: both
    losses and KL(teacher‖student); and, as shares of 1, top-1 agreement and speculative acceptance Σ min(p, t).
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, teacher)]
    sums: dict[str, float] = {}
    for sequence in read_heldout(cache):
        input_ids = torch.from_numpy(sequence.token_ids).long()[None]
        student_TV, teacher_TV = (model(input_ids).logits[0, :-1].log_softmax(-1) for model in models)
        shared_TV, teacher_probs_TV = student_TV[:, : teacher_TV.shape[1]], teacher_TV.exp()
        found = {
            "heldout_loss_after": F.nll_loss(student_TV, input_ids[0, 1:], reduction="sum"),
            "teacher_heldout_loss": F.nll_loss(teacher_TV, input_ids[0, 1:], reduction="sum"),
            "heldout_kl_to_teacher": (teacher_probs_TV * (teacher_TV - shared_TV)).sum(),
            "heldout_top1_agreement": (shared_TV.argmax(-1) == teacher_TV.argmax(-1)).sum(),
            "heldout_speculative_acceptance": torch.minimum(shared_TV.exp(), teacher_probs_TV).sum(),
            "heldout_tokens": torch.tensor(len(sequence) - 1),
        }
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
    num_tokens = sums.pop("heldout_tokens")
    return {name: value / num_tokens for name, value in sums.items()} | {"heldout_tokens": int(num_tokens)}


def write_report(report: dict[str, Any], progress: list[dict[str, Any]], output: Path) -> None:
    (output / "report.json").write_text(json.dumps(report, indent=2))
    plot_loss(progress, report, output / "loss.png")
    write_html(report, output / "loss.png", output / "report.html")
    table = Table("figure", "value", title="logitstream demo")
    for row in rows(report):
        table.add_row(*row)
    Console().print(table)
    print(f"report: {output}/report.html · student: {output}/student · logs: {output}/*.log")


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (label, value with unit) of each figure that the report holds."""
    return [(label, form.format(report[key])) for key, label, form in ROWS if report.get(key) is not None]


def plot_loss(progress: list[dict[str, Any]], report: dict[str, Any], path: Path) -> None:
    """Plot the training loss by tokens seen, with the held-out losses of student and teacher."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    tokens = [row["tokens"] for row in progress]
    axis.plot(tokens, [row["loss"] for row in progress], label="training loss (distillation)")
    losses = [report["heldout_loss_before"], report["heldout_loss_after"]]
    axis.plot([0, max(tokens, default=1)], losses, "o", label="held-out loss of the student")
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
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto}}td+td{{text-align:right}}</style>
<h1>logitstream demo</h1><table>{cells}</table>
<p><img alt="training and held-out loss by tokens trained on" src="data:image/png;base64,{image}"></p>
<details><summary>report.json</summary><pre>{html.escape(json.dumps(report, indent=2))}</pre></details></html>
""",
        encoding="utf-8",
    )
