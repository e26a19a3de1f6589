"""`minimoe export | import | upcycle | merge | push`."""

from __future__ import annotations

from typing import Annotated

import typer

from minimoe.cli.app import ModelDir, app, large_imports

Out = Annotated[str, typer.Option(metavar="DIR", help="the new folder; it must not exist, or be empty")]
Json = Annotated[bool, typer.Option("--json", help="print a JSON object")]
Foreign = Annotated[str, typer.Argument(metavar="MODEL_DIR", help="folder with config.json and safetensors")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="read a minimind pytorch_model.bin, with torch's weights_only")
]


@app.command(epilog="Example: minimoe export runs/quickstart/sft/final --to gguf --dtype q8_0 --out exported/")
def export(
    model_dir: ModelDir,
    out: Out,
    to: Annotated[
        str | None,
        typer.Option(help="qwen3-moe, glm4-moe, qwen3, llama or gguf; default: the one that says all of the model"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; gguf also q8_0; default: as the model is saved")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="of a file of weights, e.g. 500MB")] = "5GB",
    json_output: Json = False,
) -> None:
    """Write a model for transformers, vLLM, llama.cpp or ollama.

    What was written is opened with the stock library and compared: logits, greedy tokens, tokenizer, chat template.
    """
    with large_imports():
        from minimoe.convert.export import run

    run(model_dir, out, to=to, dtype=dtype, max_shard_size=max_shard_size, json_output=json_output)


@app.command(name="import", epilog="Example: minimoe import downloads/Qwen3-MoE-tiny --out models/mine")
def import_command(model_dir: Foreign, out: Out, allow_pickle: AllowPickle = False, json_output: Json = False) -> None:
    """Make a model from elsewhere one of ours, to train on.

    Read are Qwen3-MoE, GLM4-MoE, Qwen3, Llama and Mistral folders, and minimind's own. The two models are compared:
    logits, greedy tokens, tokenizer, chat template.
    """
    with large_imports():
        from minimoe.convert.imports import run

    run(model_dir, out, allow_pickle=allow_pickle, json_output=json_output)


@app.command(epilog="Example: minimoe merge runs/quickstart/lora/final --out models/merged")
def merge(
    adapter_dir: Annotated[str, typer.Argument(metavar="ADAPTER_DIR", help="the final/ of a run with lora:")],
    out: Out,
    base: Annotated[
        str | None, typer.Option(metavar="DIR", help="the base model, if it is no longer where it was in training")
    ] = None,
    json_output: Json = False,
) -> None:
    """Add an adapter to its base model's weights: an ordinary model folder, compared with the two."""
    with large_imports():
        from minimoe.convert.merge import run

    run(adapter_dir, out, base=base, json_output=json_output)


@app.command(
    epilog="Example: minimoe upcycle runs/dense/final --num-experts 8 --num-experts-per-tok 2 --out models/moe"
)
def upcycle(
    model_dir: Foreign,
    out: Out,
    num_experts: Annotated[int, typer.Option(min=1, help="experts of each layer")],
    num_experts_per_tok: Annotated[int, typer.Option(min=1, help="experts that a token uses")],
    slices: Annotated[int, typer.Option(min=1, help="experts that a copy of the dense network is cut into")] = 1,
    first_k_dense: Annotated[int, typer.Option(min=0, help="layers at the bottom that stay dense")] = 0,
    noise: Annotated[
        float, typer.Option(min=0, max=10, help="on the experts' weights, in their standard deviations")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="of the router and the noise")] = 0,
    allow_pickle: AllowPickle = False,
    json_output: Json = False,
) -> None:
    """Make a dense model an MoE of the same function, to train on.

    The model may be one of ours or one that `minimoe import` reads.
    """
    with large_imports():
        from minimoe.convert.upcycle import run

    run(
        model_dir,
        out,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        slices=slices,
        first_k_dense=first_k_dense,
        noise=noise,
        seed=seed,
        allow_pickle=allow_pickle,
        json_output=json_output,
    )


@app.command(epilog="Example: minimoe push runs/quickstart/sft/final me/my-first-moe --private")
def push(
    model_dir: ModelDir,
    repo: Annotated[str, typer.Argument(metavar="NAME", help="of the repository on the Hugging Face hub: me/model")],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    license_id: Annotated[
        str | None, typer.Option("--license", help="as the hub spells it, for the card: apache-2.0, mit, …")
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="write there what would be pushed, and push nothing")
    ] = None,
) -> None:
    """Share a model on the Hugging Face hub, with a model card made of its run."""
    with large_imports():
        from minimoe.convert.push import run

    run(model_dir, repo, private=private, license_id=license_id, out=out)
