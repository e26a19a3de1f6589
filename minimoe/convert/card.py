"""A model card: what the model is, what it learned from, how training went, how its experts are used, how to load it.

Paths of data are given by their last part alone: the rest would tell strangers about somebody's computer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from minimoe.folder import read_object
from minimoe.model.config import num_parameters
from minimoe.train.files import CONFIG_FILE, METRICS_FILE
from minimoe.train.metrics import read_metrics

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 48  # characters of the curve


def model_card(folder: Path, name: str, license_id: str | None = None) -> str:
    """README.md of a repository, from a model folder and, where there is one, the run that made it.

    Args:
        name: of the repository, such as somebody/my-model.
        license_id: as the hub spells it, such as apache-2.0.
    """
    values = read_object(folder / "config.json")
    run = next((parent for parent in (folder.parent, folder.parent.parent) if (parent / METRICS_FILE).is_file()), None)
    kind = values.get("model_type", "")
    facts: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    facts["tags"] = ["minimoe", "mixture-of-experts"] if kind == "minimoe" else [kind.replace("_", "-"), "minimoe"]
    if license_id:
        facts = {"license": license_id, **facts}
    sections = [f"# {name.rpartition('/')[2]}", *_about(values), *_loading(folder, name, kind)]
    if run is not None:
        sections += _training(run)
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def _about(values: dict[str, Any]) -> list[str]:
    if values.get("model_type") != "minimoe":
        return ["A language model made with minimoe."]
    total, active = num_parameters(values), num_parameters(values, active=True)
    experts = f"{values['num_experts']} experts a layer, of which a token uses {values['num_experts_per_tok']}"
    if values["first_k_dense_replace"] >= values["num_hidden_layers"]:
        experts = "no experts"
    text = f"A small language model: {total:,} parameters, {active:,} of them active for a token; {experts}."
    keys = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads num_experts num_experts_per_tok "
        "moe_intermediate_size n_shared_experts first_k_dense_replace scoring_func vocab_size max_position_embeddings"
    ).split()
    return [text, "## Architecture", _table(("key", "value"), [(f"`{key}`", values[key]) for key in keys])]


def _loading(folder: Path, name: str, kind: str) -> list[str]:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if kind == "minimoe":
        lines.insert(0, "import minimoe  # pip install minimoe; or leave this out and add trust_remote_code=True below")
    lines += [f'model = AutoModelForCausalLM.from_pretrained("{name}")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    if (folder / "chat_template.jinja").exists():
        lines += [
            'chat = [{"role": "user", "content": "Hello!"}]',
            'prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")',
        ]
    else:
        lines += ['prompt = tokenizer("Once upon a time", return_tensors="pt")']
    lines += ["print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))"]
    return ["## Use", "```python\n" + "\n".join(lines) + "\n```"]


def _training(run: Path) -> list[str]:
    rows = read_metrics(run / METRICS_FILE)
    steps = [row for row in rows if row.get("lm_loss") is not None]  # it is null where it was not finite
    sections = ["## Training"]
    if (run / CONFIG_FILE).is_file():
        sections.append(_setting(yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))))
    if not steps:
        return sections
    last = steps[-1]
    found = {"steps": f"{last['step']:,}", "tokens": f"{last['tokens']:,}", "seconds": f"{rows[-1]['seconds']:,.0f}"}
    found["training loss (nats per token)"] = f"{last['lm_loss']:.3f}"
    held_out = [row for row in rows if row.get("val_loss") is not None]
    if held_out:
        found["held-out loss"] = f"{held_out[-1]['val_loss']:.3f}"
        if held_out[-1].get("val_bits_per_byte") is not None:
            found["held-out bits per byte"] = f"{held_out[-1]['val_bits_per_byte']:.3f}"
    sections.append(_table(("measure", "value"), list(found.items())))
    losses = [row["lm_loss"] for row in steps]
    sections.append(f"Training loss, from {losses[0]:.2f} to {losses[-1]:.2f}:\n\n```\n{curve(losses)}\n```")
    load = last.get("expert_load")
    if load:
        table = [(layer, f"{min(shares):.2f}", f"{max(shares):.2f}") for layer, shares in enumerate(load)]
        sections += [
            "Load of the experts at the last logged step (1 is an equal share of the tokens):",
            _table(("MoE layer", "least used", "most used"), table),
        ]
    return sections


def _setting(config: dict[str, Any]) -> str:
    """Data and recipe of the run."""
    sources = [source.get("hub") or Path(source["path"]).name for source in config["data"]["train"]]
    train, optimizer = config["train"], config["optimizer"]
    text = f"Data: {', '.join(f'`{name}`' for name in sources)}. "
    if config.get("init_from"):
        text += "It continues another model. "
    text += f"Optimizer {optimizer['name']}, learning rate {optimizer['lr']:g}, schedule {config['schedule']['name']}, "
    rows = f"{train['batch_size']} rows of {config['data']['sequence_length']} tokens a step"
    return f"{text}{rows}, {train['precision']}."


def curve(values: Sequence[float], width: int = _WIDTH) -> str:
    """A line of bars, each the mean of its part of the values."""
    width = min(width, len(values))
    edges = [len(values) * part // width for part in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low or 1)
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
