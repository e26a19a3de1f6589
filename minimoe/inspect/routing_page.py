"""`minimoe inspect`: what routing.py found, on a terminal, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minimoe.errors import UserError
from minimoe.inspect.page import PageSection, Row, write_page
from minimoe.inspect.page import Table as PageTable
from minimoe.inspect.routing import Routing, Specialisation, route_files, route_prompt, specialisation
from minimoe.loading import load_minimoe

_PAGE_TOKENS = 1500  # shown at most
_TERMINAL_TOKENS = 400
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def run(
    model_dir: str,
    *,
    prompt: str | None,
    data: Sequence[str],
    chat: bool = False,
    layer: int | None = None,
    most_tokens: int = 50_000,
    html: str | None = None,
    json_output: bool = False,
    device: str = "auto",
    overrides: Sequence[str] = (),
) -> None:
    """Route, and show what was asked for.

    Raises:
        UserError: neither or both of prompt and data, a layer without experts, or a model without any.
    """
    if (prompt is None) == (not data):
        raise UserError("give one of --prompt and --data", fix='--prompt "Once upon a time", or --data FILE')
    model, tokenizer = load_minimoe(model_dir, device)
    if prompt is not None:
        routing = route_prompt(model, tokenizer, prompt, chat=chat)
        found: list[Specialisation] = []  # a text is no sample
    else:
        routing = route_files(model, tokenizer, data, most_tokens=most_tokens, overrides=overrides)
        found = specialisation(routing)
    if layer is not None and layer not in routing.layers:
        raise UserError(f"layer {layer} has no experts", fix=f"layers with experts: {routing.layers}")
    shown = routing.layers.index(layer) if layer is not None else 0
    if html:
        write_routing_page(Path(html), model_dir, routing, found, shown)
    if json_output:
        print(json.dumps(as_json(routing, found)))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(coloured(routing, shown))
    if routing.note:
        console.print(Text(routing.note, style="dim"))
    if data:
        console.print(_experts_table(routing, shown))
        console.print(_specialisation_table(found))
    if html:
        console.print(f"page: {html}", highlight=False)


def coloured(routing: Routing, layer: int) -> Text:
    """Each token with the expert of its largest weight, as a colour and as a number."""
    text = Text()
    for n in range(min(len(routing.tokens), _TERMINAL_TOKENS)):
        best = int(routing.weights[n, layer].argmax())
        expert = int(routing.experts[n, layer, best])
        colour = 17 + (expert * 37) % 210  # of a terminal's 256, far apart for neighbours
        text.append(
            routing.texts[int(routing.tokens[n])],
            f"black on color({colour})" if colour > 100 else f"white on color({colour})",
        )
        text.append(str(expert).translate(_SUBSCRIPTS), "dim")  # no part of the text, without colours either
    left = len(routing.tokens) - _TERMINAL_TOKENS
    if left > 0:
        text.append(f" … {left:,} more tokens", "dim")
    return text


def as_json(routing: Routing, found: Sequence[Specialisation]) -> dict[str, Any]:
    """Everything, for a program."""
    load = routing.load()
    return {
        "tokens": len(routing.tokens),
        "note": routing.note,
        "layers": [
            {
                "layer": layer,
                "experts": [
                    {
                        "expert": expert,
                        "load": round(float(load[n, expert]), 4),
                        "top_tokens": [
                            {"text": text, "share": round(share, 4), "count": count}
                            for text, share, count in routing.top_tokens(n, expert)
                        ],
                        "contexts": ["".join(parts) for parts in routing.contexts(n, expert)],
                    }
                    for expert in range(routing.num_experts)
                ],
                "coactivation": np.round(routing.coactivation(n), 3).tolist(),
            }
            for n, layer in enumerate(routing.layers)
        ],
        "specialisation": [{key: _rounded(value) for key, value in asdict(one).items()} for one in found],
    }


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


def _experts_table(routing: Routing, layer: int) -> Table:
    load = routing.load()[layer]
    table = Table("expert", "load", "tokens it takes most often", "where its weight is largest")
    table.title = f"layer {routing.layers[layer]}"
    for expert in range(routing.num_experts):
        tokens = "  ".join(f"{text!r} {share:.0%}" for text, share, _ in routing.top_tokens(layer, expert, 6))
        context = next(iter(routing.contexts(layer, expert, 1)), ("", "", ""))
        table.add_row(str(expert), f"{load[expert]:.2f}", Text(tokens), Text("{!r} [{}] {!r}".format(*_three(context))))
    return table


def _three(context: tuple[str, str, str]) -> tuple[str, str, str]:
    return context[0][-20:], context[1], context[2][:20]


def _specialisation_table(found: Sequence[Specialisation]) -> Table:
    table = Table("property", "layer", "bits", "by chance", "95 % interval", "of at most")
    table.title = "what a token's experts tell of it"
    for cells in _specialisation_rows(found):
        table.add_row(*cells)
    return table


def _specialisation_rows(found: Sequence[Specialisation]) -> list[list[str]]:
    return [
        [
            one.about,
            str(one.layer),
            f"{one.bits:.3f}",
            f"{one.shuffled:.4f}",
            f"{one.low:.3f} to {one.high:.3f}",
            f"{one.entropy:.2f}",
        ]
        for one in found
    ]


def write_routing_page(
    file: Path, model_dir: str, routing: Routing, found: Sequence[Specialisation], layer: int
) -> None:
    """The page: tokens to point at, experts, specialisation, which experts are chosen together."""
    load = routing.load()
    sections = []
    if found:
        rows = [Row(cells) for cells in _specialisation_rows(found)]
        head = ("property", "layer", "bits", "by chance", "95 % interval", "of at most")
        text = "Mutual information of a token's experts and its properties; by chance: with the property shuffled."
        sections.append(PageSection("What the experts tell of a token", text, table=PageTable(head, rows)))
        for n, number in enumerate(routing.layers):
            sections.append(_layer_section(routing, n, number, load[n]))
    shown = range(min(len(routing.tokens), _PAGE_TOKENS))
    tokens = [
        {
            "t": routing.texts[int(routing.tokens[n])],
            "e": routing.experts[n].tolist(),
            "w": np.round(routing.weights[n], 3).tolist(),
        }
        for n in shown
    ]
    data = json.dumps({"tokens": tokens, "layers": routing.layers, "experts": routing.num_experts})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_page(
        file,
        title=f"Experts of {model_dir}",
        subtitle=f"{len(routing.tokens):,} tokens of {', '.join(routing.source_names)}; {len(shown):,} are shown"
        + (f"; {routing.note}" if routing.note else ""),
        sections=sections,
        template="routing.html.j2",
        tokens_json=Markup(data.replace("<", "\\u003c")),  # so that no text ends the script
        first_layer=layer,
    )


def _layer_section(routing: Routing, n: int, number: int, load: np.ndarray) -> PageSection:
    together = routing.coactivation(n)
    rows = []
    for expert in range(routing.num_experts):
        tokens = ", ".join(f"{text!r} {share:.0%}" for text, share, _ in routing.top_tokens(n, expert))
        contexts = " ⏎ ".join(f"{before} [{token}] {after}" for before, token, after in routing.contexts(n, expert))
        partner = int(together[expert].argmax())
        pair = f"{partner} ({together[expert, partner]:.1f} times chance)" if routing.experts.shape[2] > 1 else "-"
        rows.append(Row([str(expert), f"{load[expert]:.2f}", tokens, contexts, pair]))
    head = ("expert", "load", "tokens it takes most often", "where its weight is largest", "most often together with")
    return PageSection(f"Layer {number}", table=PageTable(head, rows))
