"""The `minimoe` command. Torch is imported only inside a command, so that `--help` answers at once."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import minimoe
from minimoe import openmp
from minimoe.config.generation import GenerationSection
from minimoe.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_IO, EXIT_USER, MinimoeError, Preempted, UserError

app = typer.Typer(
    name="minimoe",
    help="Train a small mixture-of-experts language model from scratch, fine-tune it, generate text.",
    epilog="Start with: bash scripts/quickstart.sh",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="the run's config; recipes are in configs/")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="replace values of the config, e.g. train.max_steps=100"),
]
Resume = Annotated[bool, typer.Option("--resume", help="continue from the newest good checkpoint of output_dir")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="delete what an earlier run left in output_dir and start again")
]
ModelDir = Annotated[str, typer.Argument(metavar="MODEL_DIR", help="model folder, e.g. runs/quickstart/sft/final")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="decoding settings as the YAML has them, e.g. top_k=5")
]
# The disk's and the system's limits, not ours; any other OSError that gets this far is a bug.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_IO_ERRORS = (*_DISK, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EMFILE)
_OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
# Options may be written with either.
UNDERSCORES = {"token_normalize_func": lambda option: option.replace("_", "-")}
# A value of the config that is written as an option reaches `load_config`, which says how it is written.
OVERRIDES = {"ignore_unknown_options": True}
SettingsFile = Annotated[Path | None, typer.Option("--config", help="YAML file with a generation: section")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"minimoe {minimoe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of errors")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if debug:
        os.environ["MINIMOE_DEBUG"] = "1"


def decoding_options(command: Callable[..., None]) -> Callable[..., None]:
    """Every decoding setting as an option of the command, from the schema; what is given is added to `settings`."""
    signature = inspect.signature(command, eval_str=True)
    options = {}
    for name, field in GenerationSection.model_fields.items():
        if name in signature.parameters:
            continue
        flag = f"--{name.replace('_', '-')}"
        kind: Any = {bool: bool, tuple[str, ...]: list[str]}.get(field.annotation, str)  # type: ignore[arg-type]
        text = f"{field.description} [{'none' if field.default == () else field.default}]"
        names = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
        option = typer.Option(*names, help=text, show_default=False, metavar=None if kind is bool else "VALUE")
        options[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
        )

    @wraps(command)
    def call(**values: Any) -> None:
        given = {name: values.pop(name) for name in options}
        words = [f"{name}={json.dumps(v) if name == 'stop' else v}" for name, v in given.items() if v not in (None, [])]
        command(**values | {"settings": [*(values["settings"] or ()), *words]})

    parameters = [*signature.parameters.values(), *options.values()]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


@app.command(
    context_settings=OVERRIDES,
    epilog="Example: minimoe tokenizer configs/quickstart/tokenizer.yaml tokenizer.vocab_size=8192",
)
def tokenizer(config: Config, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Train a byte-level BPE tokenizer on the documents of a config."""
    from minimoe.config import TokenizerRun
    from minimoe.config.file import load_config
    from minimoe.train.tokenizer import run

    run(load_config(TokenizerRun, config, overrides or ()), overwrite=overwrite)


@app.command(
    context_settings=OVERRIDES,
    epilog="Example: minimoe pretrain configs/quickstart/pretrain.yaml train.max_steps=100 --resume",
)
def pretrain(config: Config, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False) -> None:
    """Train a model from scratch."""
    _train("pretrain", config, overrides, resume, overwrite)


@app.command(
    context_settings=OVERRIDES, epilog="Example: minimoe sft configs/quickstart/sft.yaml init_from=runs/mine/final"
)
def sft(config: Config, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False) -> None:
    """Fine-tune a model on conversations (supervised fine-tuning)."""
    _train("sft", config, overrides, resume, overwrite)


@app.command(context_settings=OVERRIDES, epilog="Example: minimoe preview configs/quickstart/sft.yaml --count 5")
def preview(
    config: Config,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=1, help="examples to print")] = 3,
) -> None:
    """Print the first examples as the trainer sees them: learned tokens coloured, masked ones dim."""
    from minimoe.config import TrainingRun
    from minimoe.config.file import load_config

    with _large_imports():
        loaded = load_config(TrainingRun, config, overrides or ())
        from minimoe.data.preview import run

    run(loaded, count)


@app.command(
    context_settings=UNDERSCORES,
    epilog='Example: minimoe generate runs/quickstart/pretrain/final --prompt "Once upon a time" --temperature 0.7',
)
@decoding_options
def generate(
    model_dir: ModelDir,
    settings: Settings = None,
    prompt: Annotated[str | None, typer.Option(help="the prompt; without it, --file or standard input is read")] = None,
    file: Annotated[
        Path | None, typer.Option(help=".txt (a prompt a line), .jsonl or .json (prompt or messages)")
    ] = None,
    config: SettingsFile = None,
    chat: Annotated[bool, typer.Option("--chat", help="wrap the prompt in the chat template")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object per prompt")] = False,
    device: Device = "auto",
) -> None:
    """Generate text; streams to a terminal."""
    loaded = _generation_settings(config, [*(settings or []), *(["chat=true"] if chat else [])])
    with _large_imports():
        from minimoe.generation.generate import read_prompts, run

    run(model_dir, read_prompts(prompt, file, sys.stdin), loaded, json_output=json_output, device=device)


@app.command(
    name="chat",
    context_settings=UNDERSCORES,
    epilog='Example: minimoe chat runs/quickstart/sft/final --system "Answer briefly."',
)
@decoding_options
def chat_command(
    model_dir: ModelDir,
    settings: Settings = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    config: SettingsFile = None,
    device: Device = "auto",
) -> None:
    """Talk to a model in the terminal."""
    loaded = _generation_settings(config, [*(settings or []), "chat=true"])
    with _large_imports():
        from minimoe.generation.chat import run

    run(model_dir, loaded, device=device, system=system)


@app.command(
    context_settings=OVERRIDES,
    epilog="Example: minimoe evaluate runs/quickstart/pretrain/final --data data/quickstart/valid_stories.jsonl",
)
def evaluate(
    model_dir: ModelDir,
    data: Annotated[
        str, typer.Option(metavar="PATH", help="file, folder or glob: txt, jsonl, json, csv, tsv, parquet, arrow")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="how documents are read, as in a config, e.g. data.on_bad_rows=skip"),
    ] = None,
    answers_only: Annotated[bool, typer.Option("--answers-only", help="score assistant turns only")] = False,
    sequence_length: Annotated[
        int | None, typer.Option(min=8, max=1 << 20, help="tokens of context; default: the model's, 1024 at most")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows per forward pass")] = 16,
    json_output: Annotated[bool, typer.Option("--json", help="print a JSON object")] = False,
    device: Device = "auto",
) -> None:
    """Loss, perplexity and bits per byte of a model on any data."""
    with _large_imports():
        from minimoe.evaluate import run

    run(
        model_dir,
        data,
        answers_only=answers_only,
        sequence_length=sequence_length,
        batch_size=batch_size,
        json_output=json_output,
        device=device,
        overrides=overrides or (),
    )


@contextlib.contextmanager
def _large_imports() -> Iterator[None]:
    """Import torch and transformers without the garbage collector, and leave their objects out of its rounds.

    They make 600,000 objects that live as long as the process. To search these for garbage, over and over while they
    are made and again at the exit, took 2 of the 6 seconds of a short command.
    """
    if "transformers" in sys.modules:  # the command is called as a function, in a process that is not ours
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
    openmp.watch()


def _train(stage: str, config: Path, overrides: list[str] | None, resume: bool, overwrite: bool) -> None:
    """Run a training stage: its config and its module go by its name."""
    if resume and overwrite:
        raise UserError("both --resume and --overwrite are given", fix="give the one you mean")
    from minimoe.config.file import TRAINING_RUNS, load_config

    with _large_imports():  # a config with an architecture needs transformers too
        loaded = load_config(TRAINING_RUNS[stage], config, overrides or ())
        module = importlib.import_module(f"minimoe.train.{stage}")
    module.run(loaded, resume=resume, overwrite=overwrite)


def _generation_settings(config: Path | None, overrides: list[str]) -> Any:
    from minimoe.config import GenerateRun
    from minimoe.config.file import load_config

    # Bare, or with their section as the YAML file has them.
    dotted = [f"generation.{word.removeprefix('generation.')}" for word in overrides]
    return load_config(GenerateRun, config, dotted).generation


def main() -> NoReturn:
    """Entry point: run a command, turn errors into messages and exit codes."""
    openmp.configure()
    try:
        app()
    except MinimoeError as error:
        if os.environ.get("MINIMOE_DEBUG"):
            raise
        print(error if isinstance(error, Preempted) else f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("MINIMOE_DEBUG"):
            raise
        if isinstance(error, OSError) and error.errno in _IO_ERRORS:
            place = str(error.filename or "a file being written")
            print(f"error: {error.strerror}\n  at: {place[:200]}", file=sys.stderr)
            sys.exit(EXIT_IO)
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
            fix = "lower train.micro_batch_size, batch_size, data.sequence_length or the model's sizes"
            print(f"error: out of memory: {str(error).partition(chr(10))[0][:200]}\n  fix: {fix}", file=sys.stderr)
            sys.exit(EXIT_USER)
        print(f"error: a bug in minimoe ({type(error).__name__}: {error}); run again with --debug", file=sys.stderr)
        sys.exit(EXIT_BUG)
    sys.exit(0)


def program() -> NoReturn:
    """`main` in a process of its own, which ends without taking the interpreter down.

    To free torch's and transformers' objects one by one takes 2 s of CPU time, which beside other busy processes is a
    minute, and the last owner of a process group may wait for a thread that waits for the interpreter. The system
    frees all of it at once.
    """
    code = EXIT_BUG
    for stream in (sys.stdout, sys.stderr):  # what is shown may be in any script, whatever the terminal can print
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # what is not text is refused by line

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    atexit.register(leave)  # before anybody else's, so that it is called last
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
        raise


if __name__ == "__main__":
    program()
