"""`minimoe report | plan | compare | sweep | inspect | doctor | experts`."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from minimoe.cli.app import OVERRIDES, Config, Device, ModelDir, Overrides, app, large_imports
from minimoe.errors import UserError

AsJson = Annotated[bool, typer.Option("--json", help="one JSON object")]


@app.command(epilog="Example: minimoe report runs/quickstart/pretrain; minimoe report runs/a runs/b --out compare.html")
def report(
    folders: Annotated[list[str], typer.Argument(metavar="RUN…", help="folders of runs; several are compared")],
    out: Annotated[str | None, typer.Option(metavar="FILE", help="the page [RUN/report.html; ./report.html]")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object: the files written")] = False,
    background: Annotated[bool, typer.Option("--background", hidden=True)] = False,
) -> None:
    """Write a page about a run, or one that compares several: curves, experts, samples, config."""
    from minimoe.inspect.report import run

    page, *charts = run(folders, out, background=background)
    if json_output:
        print(json.dumps({"page": str(page), "charts": [str(chart) for chart in charts]}))
        return
    print(f"{page}" + (f", and {len(charts)} charts in {charts[0].parent}/" if charts else ""))


@app.command(
    context_settings=OVERRIDES,
    epilog="Example: minimoe plan configs/quickstart/pretrain.yaml model.num_experts=32; "
    "minimoe plan configs/minimind/pretrain_768.yaml --gpus 8 --gpu h100",
)
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="estimate for so many GPUs by formulas alone")] = None,
    gpu: Annotated[str, typer.Option(metavar="KIND", help="a100, h100, h200, b200 or rtx4090")] = "h100",
    json_output: AsJson = False,
) -> None:
    """What a run will cost: parameters, memory, time and disk, from a few of its steps in a temporary folder."""
    from minimoe.config import TrainingRun
    from minimoe.config.file import load_config

    with large_imports():
        loaded = load_config(TrainingRun, config, overrides or ())
        from minimoe.inspect.plan import run

    run(loaded, gpus=gpus, gpu=gpu, json_output=json_output)


Seeds = Annotated[int, typer.Option(min=1, help="runs of each, with seeds 0, 1, ...")]
Out = Annotated[str | None, typer.Option(metavar="DIR", help="folder of all runs [output_dir with a suffix]")]


@app.command(
    context_settings=OVERRIDES,
    epilog="Example: minimoe compare configs/quickstart/pretrain.yaml --seconds 60 --seeds 3",
)
def compare(
    config: Config,
    overrides: Overrides = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="of training, of the MoE [its config's steps]")] = None,
    seeds: Seeds = 3,
    out: Out = None,
    json_output: AsJson = False,
) -> None:
    """A mixture of experts beside its dense twins, at equal tokens and at equal seconds; started again, it goes on."""
    with large_imports():
        from minimoe.inspect.compare import run

    run(str(config), overrides or (), seconds=seconds, seeds=seeds, out=out, json_output=json_output)


@app.command(
    context_settings=OVERRIDES,
    epilog="Example: minimoe sweep configs/quickstart/pretrain.yaml optimizer.lr=0.005,0.01,0.02 --seconds 60",
)
def sweep(
    config: Config,
    overrides: Overrides = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="of training, for each run")] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="for each run")] = None,
    flops: Annotated[float | None, typer.Option(min=1, help="of training, for each run")] = None,
    variant: Annotated[
        list[str] | None, typer.Option(metavar='"KEY=A KEY=B"', help="one more variant, of several keys; repeatable")
    ] = None,
    seeds: Seeds = 1,
    out: Out = None,
    at_once: Annotated[int, typer.Option(min=1, help="runs in memory at a time, taking turns")] = 8,
    json_output: AsJson = False,
) -> None:
    """Every combination of key=a,b,c at an equal budget: one table; started again, it goes on."""
    budgets = {"seconds": seconds, "tokens": tokens, "flops": flops}
    given = [(kind, amount) for kind, amount in budgets.items() if amount is not None]
    if len(given) > 1:
        raise UserError("several budgets are given", fix="give one of --seconds, --tokens and --flops")
    with large_imports():
        from minimoe.inspect.sweep import Budget, run

    kind, amount = given[0] if given else ("steps", None)
    budget = Budget(kind, amount)  # type: ignore[arg-type]
    run(
        str(config),
        overrides or (),
        budget,
        also=variant or (),
        seeds=seeds,
        out=out,
        at_once=at_once,
        json_output=json_output,
    )


@app.command(
    name="inspect",
    epilog='Example: minimoe inspect runs/quickstart/sft/final --chat --prompt "Where is the kite?" --html page.html',
)
def inspect_command(
    model_dir: ModelDir,
    overrides: Overrides = None,
    prompt: Annotated[str | None, typer.Option(help="a text whose tokens are shown")] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="documents; give several to compare sources")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="whose experts are shown [the first that has some]")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="wrap the prompt in the chat template")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="of the data that are looked at")] = 50_000,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="write a page to point at tokens and experts")
    ] = None,
    json_output: AsJson = False,
    device: Device = "auto",
) -> None:
    """Which experts tokens use, what each expert is for, and how much their choice tells of a token."""
    if prompt is not None and overrides:
        raise UserError("values of the config are for --data", fix="leave them out")
    with large_imports():
        from minimoe.inspect.routing_page import run

    run(
        model_dir,
        prompt=prompt,
        chat=chat,
        data=data or (),
        layer=layer,
        most_tokens=tokens,
        html=html,
        json_output=json_output,
        device=device,
        overrides=overrides or (),
    )


@app.command(epilog="Example: minimoe doctor runs/quickstart/pretrain")
def doctor(
    folder: Annotated[str | None, typer.Argument(metavar="[RUN]", help="a run's folder to look at too")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON list")] = False,
) -> None:
    """Is this machine, and this run, as it should be: versions, speed, both dispatch paths, checkpoints."""
    with large_imports():
        from minimoe.inspect.doctor import run

    raise typer.Exit(run(folder, json_output=json_output))


@app.command(
    epilog="Example: minimoe experts runs/quickstart/sft/final prune --keep 6 --data held_out.txt --out models/six",
)
def experts(
    model_dir: ModelDir,
    action: Annotated[
        Literal["ablate", "prune", "merge", "revive", "freeze"], typer.Argument(help="what is done to experts")
    ],
    data: Annotated[str, typer.Option(metavar="FILE", help="documents that the change is measured on")],
    out: Annotated[str | None, typer.Option(metavar="DIR", help="folder of the changed model")] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="prune, merge: experts that each layer has then")] = None,
    layer: Annotated[int | None, typer.Option(help="ablate, freeze: of the expert; without: each")] = None,
    expert: Annotated[int | None, typer.Option(help="ablate, freeze: its number in the layer")] = None,
    json_output: AsJson = False,
    device: Device = "auto",
) -> None:
    """Take out, put together, revive or freeze experts; shows the change of the loss with its interval."""
    with large_imports():
        from minimoe.inspect.surgery import run

    run(
        model_dir,
        action,
        data=data,
        out=out,
        keep=keep,
        layer=layer,
        expert=expert,
        json_output=json_output,
        device=device,
    )
