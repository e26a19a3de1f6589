"""The docs say what is: links lead somewhere, commands are taken, the reference is the code's, the tutorial runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_runs import run_command

import minimoe.cli  # noqa: F401  (makes every command known)
from minimoe.cli.app import app
from minimoe.config import TokenizerRun, TrainingRun
from minimoe.config.file import load_config
from scripts.docs.reference import PAGES, architecture

ROOT = Path(__file__).parent.parent
PAGES_OF_DOCS = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES_OF_DOCS += sorted(ROOT.glob("README.*.md"))
PAGES_OF_DOCS = [page for page in PAGES_OF_DOCS if "_build" not in page.parts]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def bash_lines(page: Path) -> list[str]:
    """Commands of the page's bash blocks, without comments; a line that ends in a backslash goes on."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


COMMANDS = [
    pytest.param(shlex.split(line, comments=True)[1:], id=f"{name(page)}: {line[:90]}")
    for page in PAGES_OF_DOCS
    for line in bash_lines(page)
    if line.startswith("minimoe ")
]


@pytest.mark.parametrize("page", PAGES_OF_DOCS, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        found = page if not file else (page.parent / file).resolve()
        assert found.exists(), f"{target} in {name(page)}"
        if anchor and found.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{target} in {name(page)}"


TRANSLATED = [ROOT / "README.md", ROOT / "docs" / "start.md"]
FIGURE = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?:e-\d+)?", re.ASCII)


def sections(page: Path) -> list[tuple[int, list[str], list[str]]]:
    """Of each heading: its level, the commands below it, and the figures below it, sorted."""
    text, found, fenced = page.read_text(encoding="utf-8"), [], ""
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = "" if fenced else line
        elif not fenced and (heading := re.match(r"(#+) ", line)):
            found.append((len(heading[1]), [], FIGURE.findall(line)))
        elif fenced == "```bash":
            found[-1][1].append(line.split("#")[0].strip())
        elif not fenced:
            found[-1][2].extend(FIGURE.findall(line))
    return [(level, commands, sorted(figures)) for level, commands, figures in found]


@pytest.mark.parametrize("page", TRANSLATED, ids=name)
def test_the_chinese_page_has_the_same_headings_commands_and_figures(page):
    other = page.with_suffix(".zh.md")
    english, chinese = sections(page), sections(other)
    assert [level for level, _, _ in chinese] == [level for level, _, _ in english]
    for (_, commands, figures), (_, commands_there, figures_there) in zip(english, chinese, strict=True):
        assert commands_there == commands
        assert figures_there == figures


def test_there_are_commands():
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_one_that_minimoe_takes(words, monkeypatch):
    """Its options exist; its config is there, and takes the values given."""
    monkeypatch.chdir(ROOT)
    group: Any = typer.main.get_command(app)
    command = group.commands[words[0]]
    context = command.make_context(words[0], words[1:])
    config = context.params.get("config")
    if config is None or words[0] in ("generate", "chat") or not str(config).startswith("configs/"):
        return
    overrides = [word for word in context.params.get("overrides") or [] if "," not in word or words[0] != "sweep"]
    load_config(TokenizerRun if words[0] == "tokenizer" else TrainingRun, config, overrides)


@pytest.mark.parametrize("page", list(PAGES))
def test_the_reference_is_made_from_the_code(page):
    assert (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8") == PAGES[page](), (
        "run: python -m scripts.docs"
    )


def test_every_key_of_the_architecture_is_explained():
    explained = {key: meaning for key, _, _, meaning in architecture()}
    assert {key for key, meaning in explained.items() if not meaning} <= {"bos_token_id", "eos_token_id"}
    from minimoe.config.stages import GrpoConfig
    from minimoe.model.config import MiniMoeConfig

    assert set(explained) == set(MiniMoeConfig.__annotations__) - {
        key for key, hint in MiniMoeConfig.__annotations__.items() if "ClassVar" in str(hint)
    }
    assert all(field.description for field in GrpoConfig.model_fields.values())


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    words = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(tmp_path)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "expert" in (tmp_path / "moe.html").read_text(encoding="utf-8")


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    """The commands of docs/start.md in their order, shortened; `plan` and `doctor` have tests of their own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    made = [sys.executable, "-m", "scripts.quickstart.make_data", "--out", "data/quickstart", "--scale", "0.02"]
    subprocess.run(made, check=True, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    short = ["train.max_steps=2", "train.sample_every=null", "train.batch_size=2", "schedule.warmup_steps=0"]
    short += ["data.max_validation_documents=4"]
    extra = {"pretrain": short, "sft": short, "generate": ["--max-new-tokens", "4"]}
    lines = [line for line in bash_lines(ROOT / "docs" / "start.md") if "runs/mine" not in line]
    done = []
    for line in lines:
        words = shlex.split(line)
        if words[0] != "minimoe" or words[1] in ("plan", "doctor", "chat"):
            continue
        assert run_command(monkeypatch, *words[1:], *extra.get(words[1], [])) == 0, capsys.readouterr().err
        done.append(words[1])
    assert done == ["tokenizer", "pretrain", "evaluate", "preview", "sft", "generate", "inspect"]
    assert (tmp_path / "experts.html").is_file()
