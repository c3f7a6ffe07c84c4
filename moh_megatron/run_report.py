"""Writes a page about one or several runs that any browser shows without a network.

It has curves over tokens, head maps, throughput, starts, differences of the configurations, evaluations and samples of
text, from the files in the run folders. A run may still be training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from moh_megatron.evaluate.results import (
    AVERAGE_COLUMNS,
    COMPARISON_COLUMNS,
    NOTHING_HELD_OUT,
    TASK_COLUMNS,
    VALIDATION_COLUMNS,
    average_rows,
    comparison_rows,
    model_line,
    suite_line,
    task_rows,
    validation_rows,
)
from moh_megatron.monitor.charts import Series, curves, head_map
from moh_megatron.monitor.run_folder import RunFolder

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1rem; max-width: 1180px; color: #111; background: #fff; }
body { font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; border-bottom: 2px solid #111; margin-top: 2.2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; } .unit { font-weight: 400; color: #444; }
svg { width: 100%; height: auto; display: block; } .key svg { display: inline; width: 34px; margin-right: .3rem; }
svg text { font: 13px system-ui, sans-serif; fill: #111; } .grid { stroke: #ccc; }
.curve { fill: none; stroke-width: 2; } .map rect { stroke: #888; stroke-width: .5; }
.key { display: inline-block; margin-right: 1rem; }
.wide { overflow-x: auto; margin: .7rem 0; }
table { border-collapse: collapse; font-size: .92rem; } th { background: #eee; }
th, td { border: 1px solid #888; padding: .2rem .5rem; text-align: left; vertical-align: top; }
td { max-width: 34rem; overflow-wrap: break-word; }
blockquote { margin: .5rem 0; padding-left: .8rem; border-left: 3px solid #111; overflow-wrap: anywhere; }
blockquote { white-space: pre-wrap; }
@media (max-width: 600px) {
  body { padding: .5rem; } table { font-size: .7rem; } th, td { padding: .1rem .2rem; }
  /* A table that is still wider has a shadow at the side where it continues. */
  .wide { background: linear-gradient(to right, #fff 30%, #fff0) local, linear-gradient(to left, #fff 30%, #fff0) local,
    linear-gradient(to right, #666, #fff0) left, linear-gradient(to left, #666, #fff0) right;
    background-repeat: no-repeat; background-size: 40px 100%, 40px 100%, 10px 100%, 10px 100%;
    background-position: left, right, left, right; }
}
"""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; empty without rows."""
    lines = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    if not lines:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def section(title: str, *parts: str) -> str:
    """A section with a heading; empty where all parts are empty."""
    content = "".join(parts)
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def over_tokens(runs: Sequence[RunFolder], key: str) -> list[Series]:
    """A column of metrics.jsonl over tokens, as one series per run."""
    return [(run.name, [(record["tokens"], record.get(key)) for record in run.steps]) for run in runs]


def tagged(runs: Sequence[RunFolder], tag: str) -> list[Series]:
    """A scalar of the event files over tokens, as one series per run."""
    return [
        (run.name, [(step * run.config.train.tokens_per_step, value) for step, value in run.series(tag)])
        for run in runs
    ]


def validation(runs: Sequence[RunFolder]) -> list[Series]:
    """The validation loss of each run, then the losses of each run's sources where there are several."""
    series: list[Series] = [
        (run.name, [(record["step"] * run.config.train.tokens_per_step, record["loss"]) for record in run.validations])
        for run in runs
    ]
    for run in runs:
        tokens = run.config.train.tokens_per_step
        sources = {name for record in run.validations for name in record.get("sources", {})}
        for name in sorted(sources):
            points = [(record["step"] * tokens, record.get("sources", {}).get(name)) for record in run.validations]
            series.append((f"{run.name}: {name}", points))
    return series


def charts(runs: Sequence[RunFolder]) -> str:
    """Charts of losses, norms and learning rate, each with the curves of all runs."""
    drawn = [
        curves("training loss", "nats a token", over_tokens(runs, "lm_loss")),
        curves("validation loss", "nats a token", validation(runs)),
        curves("balance loss", "mean over layers, before beta", over_tokens(runs, "balance_loss")),
        curves("gradient norm", "before clipping", over_tokens(runs, "grad_norm")),
        curves("gradient norm of the routers", "", tagged(runs, "optimizer/router_grad_norm")),
        curves("learning rate", "", over_tokens(runs, "lr")),
    ]
    return f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else ""


def throughput(runs: Sequence[RunFolder]) -> str:
    """Charts of rates and memory, and of the parts of a step's time."""
    drawn = [
        curves("tokens a second", "", over_tokens(runs, "tokens_per_second")),
        curves("executed TFLOP/s", "of each device", tagged(runs, "throughput/tflops_executed")),
        curves("memory", "GiB, largest rank", tagged(runs, "memory/largest_rank_gib")),
    ]
    for run in runs:
        parts = ("data", "forward", "backward", "optimizer", "save")
        split = [(part, points) for part in parts for _, points in tagged([run], f"time/{part}")]
        drawn.append(curves(f"time of a step, {run.name}", "seconds", split))
    return f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else ""


def overview(runs: Sequence[RunFolder]) -> str:
    """A table of how far each run is and how it ended."""
    rows = []
    for run in runs:
        last = run.steps[-1] if run.steps else {"step": 0, "tokens": 0}
        losses = [record["loss"] for record in run.validations if record["loss"] is not None]
        loss = f"{losses[-1]:.4f}" if losses else ""
        skipped = sum(bool(record.get("skipped")) for record in run.steps)
        ending = run.ending.get("reason", "still running, or killed")
        restarts = max(len(run.starts) - 1, 0)
        rows.append((run.name, f"{last['step']:,}", f"{last['tokens']:,}", loss, skipped, restarts, ending))
    head = ("run", "steps", "tokens", "validation loss", "skipped steps", "restarts", "ended")
    return table(head, rows)


def starts(runs: Sequence[RunFolder]) -> str:
    """A table of every start of every run."""
    rows = [
        (
            run.name,
            time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(start.get("time", 0))),
            start["step"],
            f"{start.get('ranks', '')} ranks, TP {start.get('tensor', '')}, ZeRO {start.get('zero_stage', '')}",
            start.get("code", ""),
        )
        for run in runs
        for start in run.starts
    ]
    return table(("run", "started", "after step", "on", "code"), rows)


def damaged(runs: Sequence[RunFolder]) -> str:
    """A table of the files whose damaged lines were left out."""
    rows = [(run.name, name, f"{count:,}") for run in runs for name, count in run.damaged.items()]
    return table(("run", "file", "lines left out"), rows)


def differences(runs: Sequence[RunFolder]) -> str:
    """A table of the keys whose values differ between runs; for a single run, of all keys."""
    keys = sorted({key for run in runs for key in run.settings})
    rows = [(key, *(run.settings.get(key, "") for run in runs)) for key in keys]
    if len(runs) > 1:
        rows = [row for row in rows if len(set(row[1:])) > 1]
        return table(("key", *(run.name for run in runs)), rows)
    return f"<details><summary>every value</summary>{table(('key', runs[0].name), rows)}</details>"


def evaluations(runs: Sequence[RunFolder]) -> str:
    """The tables of every evaluation; one whose file has another form is named."""
    parts = []
    for run in runs:
        for name, results in run.evaluations.items():
            parts.append(f"<h3>{escape(f'{run.name}, {name}')}</h3>")
            try:
                parts.append(evaluation(results))
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
                parts.append("<p>Its results.json is not as moh-evaluate writes it.</p>")
    return "".join(parts)


def evaluation(results: dict[str, Any]) -> str:
    """The tables of one results.json."""
    parts = [f"<p>{escape(model_line(results))}</p>"]
    if "validation" in results:
        rows = validation_rows(results["validation"])
        parts.append(table(VALIDATION_COLUMNS, rows) or f"<p>{NOTHING_HELD_OUT}</p>")
    if "suite" in results:
        parts.append(f"<h4>{escape(suite_line(results['suite']))}</h4>")
        parts.append(table(TASK_COLUMNS, task_rows(results["suite"])))
        parts.append(table(AVERAGE_COLUMNS, average_rows(results["suite"])))
    if "comparison" in results:
        parts.append(f"<h4>{escape('Against ' + results['comparison']['against'])}, question by question</h4>")
        parts.append(table(COMPARISON_COLUMNS, comparison_rows(results["comparison"]["tasks"])))
    return "".join(parts)


def last_samples(run: RunFolder) -> str:
    """The texts of the last validations."""
    return "".join(
        f"<p>{escape(run.name)}, step {record['step']:,}</p><blockquote>{escape(str(record['sample']))}</blockquote>"
        for record in run.validations[-3:]
        if "sample" in record
    )


def for_each(runs: Sequence[RunFolder], part: Callable[[RunFolder], str]) -> str:
    """The same part of the page for each run."""
    return "".join(part(run) for run in runs)


def page(runs: Sequence[RunFolder]) -> str:
    """The whole page."""
    title = "Run report: " + ", ".join(run.name for run in runs)
    alarms = [(run.name, step, message) for run in runs for step, message in run.alarms]
    samples = for_each(runs, last_samples)
    body = [
        overview(runs),
        section("Losses", charts(runs)),
        section("Heads", for_each(runs, lambda run: head_map(f"head load, {run.name}", run.head_load))),
        section("Throughput", throughput(runs)),
        section("Alarms", table(("run", "step", "alarm"), alarms)),
        section("Starts", starts(runs)),
        section("Damaged files", damaged(runs)),
        section("Configuration" if len(runs) == 1 else "What the configurations differ in", differences(runs)),
        section("Evaluation", evaluations(runs)),
        section("Samples", samples),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{''.join(body)}"
        "</body></html>\n"
    )
