"""results.json, and the same as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moh_megatron.monitor.records import write_json

RESULTS, TABLE = "results.json", "results.md"


def write_results(folder: Path, found: dict[str, Any]) -> str:
    """Write both files, each whole or not at all; returns the Markdown."""
    write_json(folder / RESULTS, found)
    text = markdown(found)
    temporary = folder / f".{TABLE}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / TABLE)
    return text


def markdown(found: dict[str, Any]) -> str:
    """Title, validation losses, and tasks where there are any."""
    model = found["model"]
    trained = f", step {model['step']:,}, {model['tokens']:,} tokens" if model["step"] is not None else ""
    parts = [f"# {model['path']}\n\n{model['kind']}{trained}, computed in {found['dtype']}\n"]
    if "validation" in found:
        rows = [
            (name, with_error(each["loss"], each["standard_error"], 4), f"{each['perplexity']:.2f}", each["sequences"])
            for name, each in found["validation"]["sources"].items()
        ]
        parts.append(table(("validation source", "nats a token", "perplexity", "sequences"), rows))
    return "\n".join(parts)


def with_error(value: float, error: float | None, digits: int) -> str:
    """0.4812 ± 0.0031"""
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)
