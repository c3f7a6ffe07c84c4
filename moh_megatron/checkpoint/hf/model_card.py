"""Generates the README.md of an exported model from its configuration."""

from __future__ import annotations

from pathlib import PurePath

from moh_megatron.config.layer_heads import active_share, layer_heads, routing_groups
from moh_megatron.config.schema import Config

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {title}

{summary} {origin}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER"{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

{code}

## Settings

{table}

## Data

{data}

## Licence

This folder states no licence for its weights: whoever trained them chooses it, within what the licences of the training
data and of any weights they started from allow. {code_licence}
"""

_IN_GROUPS = " They are equally many in each group of heads that share keys and values."
_SLOTS = "Every attention implementation of transformers computes the active heads alone."
_MOSTLY_EVERY_HEAD = (
    "On one thread of a CPU a long prompt is computed for the active heads alone; elsewhere every head is computed and "
    "multiplied by its gate."
)


def _rows(config: Config, dtype: str) -> list[tuple[str, object]]:
    model, moh = config.model, config.moh
    rows: list[tuple[str, object]] = [
        ("layers", model.num_layers),
        ("hidden size", model.hidden_size),
        ("feed-forward size", model.ffn_hidden_size),
        ("query heads", model.num_attention_heads),
        ("key/value heads", model.query_groups),
        ("head size", model.head_dim),
        ("vocabulary", model.vocab_size),
        ("tied embeddings", "yes" if model.tie_word_embeddings else "no"),
        ("RoPE base", f"{model.rotary_base:g}"),
        ("RoPE scaling", model.rope_scaling.type if model.rope_scaling else "none"),
        ("longest context", model.max_position_embeddings or config.train.sequence_length),
        ("training sequence length", config.train.sequence_length),
        ("training precision", config.train.precision),
        ("precision of these weights", dtype),
    ]
    if moh.enabled:
        grouped = routing_groups(model, moh) > 1
        rows += [
            ("shared heads", _shared(config)),
            ("active heads, shared ones included", moh.active_heads),
            ("routing groups", "the key/value groups" if grouped else "1, the whole layer"),
            ("router", moh.router),
            ("balancing", _balancing(config)),
        ]
        if moh.router == "learned":
            rows.append(("gating", moh.gating))
        if moh.router == "learned" and grouped:
            rows.append(("gate softmax", f"over each {moh.gate_softmax}"))
    return rows


def _shared(config: Config) -> str:
    shared = config.moh.shared_heads
    if isinstance(shared, int):
        return str(shared) if config.moh.shared_placement == "first" else f"{shared}, spread over the KV groups"
    return str([list(heads) for heads in shared or ()])


def _balancing(config: Config) -> str:
    moh = config.moh
    if moh.balancing == "bias":
        return f"bias on the routed heads' scores, {moh.bias_update_rate:g} a step"
    return f"{moh.balance_loss} balance loss, weight {moh.balance_coefficient:g}"


def model_card(config: Config, *, dtype: str, step: int, tokens: int) -> str:
    """Return Markdown that says what the model is, how to load it, its settings and its training data.

    Args:
        dtype: precision of the exported weights.
        step, tokens: training so far; 0 steps for a model that was only converted.
    """
    moh, heads = config.moh, config.model.num_attention_heads
    if moh.enabled:
        active, layers = active_share(config.model, moh), layer_heads(config.model, moh)
        groups = routing_groups(config.model, moh)
        shared = sum(len(layer.shared) for layer in layers) / len(layers)
        uniform = len({(len(layer.shared), layer.active) for layer in layers}) == 1
        summary = (
            f"A LLaMA-like language model with Mixture-of-Head attention (arXiv 2410.11842): each token uses "
            f"{active * heads:g} of {heads} attention heads ({active:.0%}), {shared:g} of them shared by "
            f"all tokens{'' if uniform else ', on average over layers'}.{_IN_GROUPS if groups > 1 else ''}"
        )
        code = (
            "`trust_remote_code=True` runs `configuration_moh.py` and `modeling_moh.py` of this folder; they need only "
            f"torch and transformers 5. {_SLOTS if groups == config.model.query_groups else _MOSTLY_EVERY_HEAD}"
        )
    else:
        summary = "A LLaMA-like language model with dense attention."
        code = "This is a plain `LlamaForCausalLM`."
    corpora = (config.data.inputs, *(source.inputs for source in config.data.sources))
    names = [PurePath(name).name for inputs in corpora for name in inputs]
    return _CARD.format(
        title="Mixture-of-Head language model" if moh.enabled else "Dense language model",
        tags="\n".join(f"- {tag}" for tag in (["mixture-of-head", "moe"] if moh.enabled else ["llama"])),
        summary=summary,
        origin=f"It was trained with moh_megatron and exported after {step:,} steps ({tokens:,} tokens)."
        if step
        else "It was converted with moh_megatron.",
        trust=", trust_remote_code=True" if moh.enabled else "",
        code=code,
        table="\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _rows(config, dtype))]),
        data="Trained on: " + ", ".join(f"`{name}`" for name in names) + "." if names else "Not recorded.",
        code_licence="The two Python files are under Apache-2.0." if moh.enabled else "",
    ).rstrip() + "\n"  # fmt: skip
