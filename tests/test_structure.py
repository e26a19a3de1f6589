"""The shape of the package: imports point down, nothing heavy happens before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minimoe"
# Each room may import itself and what stands below it.
BELOW = {
    "errors": set(),
    "failpoints": set(),
    "device": {"errors"},
    "openmp": set(),
    "ops": {"errors", "user_cache"},
    "model": {"ops", "errors"},
    "config": {"model", "errors"},
    "folder": {"errors"},
    "chat_template": {"errors"},
    "conversation": {"errors"},
    "hub": {"errors"},
    "user_cache": set(),
    "bpe": {"tokenizer", "chat_template"},
    "tokenizer": {"errors", "chat_template", "conversation", "folder", "hub"},
    "data": {"tokenizer", "conversation", "hub", "user_cache", "config", "errors", "model", "failpoints"},
    "outside": {"errors"},
    "adapters": {"config", "errors", "extras", "folder"},
    "sharded_files": set(),
    "loading": {"adapters", "tokenizer", "errors", "model", "folder", "device", "sharded_files"},
    "evaluate": {
        "conversation",
        "generation",
        "loading",
        "data",
        "tokenizer",
        "config",
        "errors",
        "model",
        "failpoints",
        "extras",
    },
    "generation": {"adapters", "outside", "loading", "conversation", "tokenizer", "config", "errors", "model", "ops"},
    "train": {
        "adapters",
        "generation",
        "bpe",
        "evaluate",
        "loading",
        "data",
        "config",
        "errors",
        "model",
        "failpoints",
        "ops",
        "device",
    }
    | {"tokenizer", "device", "outside", "folder", "sharded_files"},
    "extras": {"errors"},
    "inspect": {
        "config",
        "data",
        "device",
        "errors",
        "evaluate",
        "generation",
        "loading",
        "model",
        "ops",
        "tokenizer",
        "train",
    },
    "convert": {
        "adapters",
        "loading",
        "tokenizer",
        "chat_template",
        "conversation",
        "bpe",
        "model",
        "folder",
        "errors",
        "extras",
    }
    | {"train"},
    "cli": {"inspect", "train", "generation", "evaluate", "convert", "data", "config", "errors", "openmp"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "minimoe":
            names = [f"minimoe.{alias.name}" for alias in node.names]
        imported |= {name.split(".")[1] for name in names if name.startswith("minimoe.")}
    assert imported <= BELOW[room(path)] | {room(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize(
    "command",
    [
        "",
        "pretrain",
        "sft",
        "tokenizer",
        "preview",
        "report",
        "plan",
        "inspect",
        "doctor",
        "experts",
        "generate",
        "chat",
        "evaluate",
        "export",
        "import",
        "upcycle",
        "push",
    ],
)
def test_help_answers_without_importing_torch(command):
    code = (
        "import sys; from minimoe.cli import app\n"
        "try: app(prog_name='minimoe')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    words = [*command.split(), "--help"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage: minimoe" in result.stdout
    assert not command or "Example: minimoe" in result.stdout


@pytest.mark.parametrize(
    "first",
    [
        "import minimoe",
        "from transformers import AutoModelForCausalLM; import minimoe",
        "import minimoe, transformers.modeling_layers",  # which is half imported when the Auto classes are
        "from minimoe.model.config import MiniMoeConfig",
        "import minimoe.tokenizer; from transformers import AutoTokenizer",
    ],
)
def test_importing_minimoe_registers_the_architecture_whatever_came_before(first):
    """In a program called minimoe too."""
    code = (
        f"import sys; sys.argv[0] = 'minimoe'\n{first}\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "sizes = {'vocab_size': 64, 'hidden_size': 16, 'num_hidden_layers': 1, 'moe_intermediate_size': 8}\n"
        "config = AutoConfig.for_model('minimoe', num_experts=3, **sizes)\n"
        "print(AutoModelForCausalLM.from_config(config).model.layers[0].mlp.gate.weight.shape[0])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "3", result.stderr


@pytest.mark.parametrize(
    "module", ["minimoe", "minimoe.data.encode", "minimoe.chat_template", "minimoe.tokenizer", "minimoe.inspect.report"]
)
def test_a_module_without_a_model_does_without_torch(module):
    """What the processes that tokenise and render templates import; with a plain tokenizer's class."""
    code = f"import sys, {module}; from transformers import PreTrainedTokenizerFast; assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
