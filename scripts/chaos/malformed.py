"""The contract that malformed input is checked against.

Whatever is wrong, the command ends within ten seconds with exit code 2, 3 or 74 and a short message. An exit code of 0
would mean that it passed over the mistake. The test draws a hundred cases, this as many as wanted:

    python -m scripts.chaos.malformed --count 2000 --seed 7

It exits with 1 if any of them breaks the contract.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import hypothesis

from minimoe import cli
from scripts.chaos.malformed_inputs import GOOD_CHAT, GOOD_ROW, MODEL, STRATEGIES, Case

MAX_SECONDS = 10  # of CPU time, which other processes do not lengthen
PATIENCE = 120  # seconds after which a command counts as hanging
EXIT_CODES = (2, 3, 74)


class Hang(BaseException):
    """Raised by the alarm; no `except Exception` of a command may stop it."""


@dataclass(frozen=True)
class Outcome:
    code: int | None  # None: it hung, or an exception escaped
    seconds: float
    message: str


def make_workspace(root: Path) -> Path:
    """A tiny model with its tokenizer, and good data."""
    import torch

    from minimoe import MiniMoeConfig, MiniMoeForCausalLM
    from minimoe.bpe import train_bpe
    from minimoe.loading import quiet_transformers

    tokenizer = train_bpe(iter([GOOD_ROW["text"]] * 4), vocab_size=320)
    torch.manual_seed(0)
    with quiet_transformers():
        MiniMoeForCausalLM(MiniMoeConfig(**MODEL, vocab_size=320, max_position_embeddings=128)).save_pretrained(
            root / "model"
        )
    tokenizer.save_pretrained(root / "model")
    (root / "data.jsonl").write_text((json.dumps(GOOD_ROW) + "\n") * 20)
    (root / "chats.jsonl").write_text((json.dumps(GOOD_CHAT) + "\n") * 20)
    return root


def run_case(case: Case, root: Path) -> Outcome:
    """Run the command in this process, in an empty folder with the case's files."""
    with tempfile.TemporaryDirectory(dir=root) as name:
        _write_files(case, root, Path(name))
        words = [word.replace("{root}", str(root)) for word in case.words]
        out, err = io.StringIO(), io.StringIO()
        started = time.process_time()
        code: int | None = None
        with (
            _chdir(name),
            mock.patch.object(sys, "argv", ["minimoe", *words]),
            mock.patch.object(sys.modules["__main__"], "__package__", None),  # else it is called `python -m ...`
            mock.patch.object(sys, "stdin", io.StringIO("")),
            mock.patch.dict(os.environ),
            mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            _alarm(PATIENCE),
        ):
            os.environ.pop("MINIMOE_DEBUG", None)
            try:
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
            except Hang:
                err.write("hang")
            except BaseException as error:
                err.write(f"Traceback: {type(error).__name__}: {error}")
        return Outcome(code, time.process_time() - started, err.getvalue() or (out.getvalue() if code else ""))


def violation(case: Case, outcome: Outcome) -> str | None:
    """How the outcome breaks the contract: "tracebacks", "hangs", "silent" or "messages"; None where it does not."""
    if (outcome.code is None and "Traceback" not in outcome.message) or outcome.seconds > MAX_SECONDS:
        return "hangs"
    if outcome.code == 0:
        return "silent"
    if outcome.code not in EXIT_CODES or "Traceback" in outcome.message or "a bug in minimoe" in outcome.message:
        return "tracebacks"
    lines = [line for line in outcome.message.splitlines() if line.strip()]
    is_list = " problems in " in lines[0] if lines else False
    if not lines or (len(lines) > 3 and not is_list and case.words):  # without a word, the answer is the help
        return "messages"
    return None


def _write_files(case: Case, root: Path, folder: Path) -> None:
    """The mark at the end of a name says what is done: `@` link, `-` cut, `+` merge into the JSON, `!` delete."""
    if any(name.startswith("model/") for name in case.files):
        (folder / "model").mkdir()
        for file in (root / "model").iterdir():
            (folder / "model" / file.name).write_bytes(file.read_bytes())
    for name, content in case.files.items():
        path, content = folder / name.rstrip("@+-!"), content.replace(b"{root}", str(root).encode())
        if name.endswith("@"):
            path.unlink()
            path.symlink_to(content.decode())
        elif name.endswith("-"):
            path.write_bytes(path.read_bytes()[: int(path.stat().st_size * float(content))])
        elif name.endswith("+"):
            path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(content)))
        elif name.endswith("!"):
            path.unlink()
        else:
            path.write_bytes(content)


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _chdir(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# ---- the long run


def main() -> None:
    parser = argparse.ArgumentParser(description="hold generated malformed input against the contract")
    parser.add_argument("--count", type=int, default=200, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    arguments = parser.parse_args()
    counts = {"inputs": 0, "tracebacks": 0, "hangs": 0, "silent": 0, "messages": 0}
    slowest, started = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        root = make_workspace(Path(name))

        def check(case: Case) -> None:
            nonlocal slowest
            if counts["inputs"] >= arguments.count:
                return
            outcome = run_case(case, root)
            broken = violation(case, outcome)
            slowest = max(slowest, outcome.seconds)
            counts["inputs"] += 1
            if broken:
                counts[broken] += 1
                print(f"{broken}: {case}\n  {outcome}", file=sys.stderr)

        seed = arguments.seed
        while counts["inputs"] < arguments.count:  # a strategy may run out of new cases for one seed
            for strategy in STRATEGIES.values():
                share = max(1, arguments.count // len(STRATEGIES))
                quiet = hypothesis.settings(
                    max_examples=share,
                    database=None,
                    deadline=None,
                    phases=[hypothesis.Phase.generate],
                    suppress_health_check=list(hypothesis.HealthCheck),
                )
                hypothesis.seed(seed)(quiet(hypothesis.given(strategy)(check)))()
            seed += 1
    seconds = time.monotonic() - started
    broken = sum(counts.values()) - counts["inputs"]
    summary = ", ".join(f"{number} {name}" for name, number in counts.items())
    print(f"malformed input: {summary}; slowest {slowest:.1f} s, {seconds:.0f} s in all")
    if arguments.json:
        arguments.json.write_text(json.dumps(counts | {"slowest": round(slowest, 1), "seconds": round(seconds, 1)}))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
