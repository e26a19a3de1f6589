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
    "kernels": set(),
    "openmp": set(),
    "model": {"kernels"},
    "strict_yaml": {"errors"},
    "config": {"strict_yaml", "errors", "model"},
    "folder": {"errors"},
    "chat_template": {"errors"},
    "tokenizer": {"config", "errors", "model", "chat_template", "folder"},
    "data": {"tokenizer", "config", "errors", "model", "failpoints"},
    "loading": {"tokenizer", "config", "errors", "model", "folder"},
    "evaluate": {"loading", "data", "tokenizer", "config", "errors", "model", "failpoints"},
    "generation": {"loading", "tokenizer", "config", "errors", "model", "kernels"},
    "train": {"generation", "evaluate", "loading", "data", "config", "errors", "model", "failpoints", "kernels"}
    | {"tokenizer"},
    "cli": {"train", "generation", "evaluate", "loading", "data", "tokenizer", "config", "errors", "model", "openmp"},
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


@pytest.mark.parametrize("command", ["", "pretrain", "sft", "tokenizer", "preview", "generate", "chat", "evaluate"])
def test_help_answers_without_importing_torch(command):
    code = (
        "import sys; sys.argv = ['minimoe', *sys.argv[1:]]\n"
        "from minimoe.cli import app\n"
        "try: app()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    words = [*command.split(), "--help"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage: minimoe" in result.stdout
    assert not command or "Example: minimoe" in result.stdout


def test_importing_minimoe_registers_the_architecture_with_transformers():
    code = "import minimoe; from transformers import AutoConfig; print(AutoConfig.for_model('minimoe').num_experts)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "4", result.stderr
