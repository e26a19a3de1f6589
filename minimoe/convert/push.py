"""`minimoe push`: a model folder to the Hugging Face hub, with a model card."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from minimoe.convert.card import model_card
from minimoe.convert.export import new_folder
from minimoe.errors import UserError
from minimoe.folder import check_folder
from minimoe.loading import load_model, model_folder
from minimoe.model.language_model import MiniMoeForCausalLM

_SENT = (".json", ".jinja", ".safetensors", ".model", ".txt")
CARD = "README.md"


def prepare(model_dir: str, target: Path, repo: str, license_id: str | None = None) -> None:
    """Put into `target` what goes to the hub; the model is opened first, so that it is one.

    Raises:
        UserError: the folder holds no whole model.
    """
    folder = model_folder(model_dir)
    check_folder(folder)
    model, _ = load_model(folder, "cpu")
    for file in sorted(folder.iterdir()):
        if file.suffix in _SENT:
            shutil.copyfile(file, target / file.name)
    if isinstance(model, MiniMoeForCausalLM):
        model.config.save_pretrained(target)  # with the module that it names, which older folders lack
    own = folder / CARD
    text = own.read_text(encoding="utf-8") if own.is_file() else model_card(folder, repo, license_id)
    (target / CARD).write_text(text, encoding="utf-8")


def run(model_dir: str, repo: str, *, private: bool, license_id: str | None, out: str | None) -> None:
    """Push, or with `out` write there what would be pushed.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    if out is not None:
        with new_folder(out) as folder:
            prepare(model_dir, folder, repo, license_id)
        print(f"written to {out}, and nothing pushed")
        return
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set", fix="unset it to push, or write the folder with --out DIR")
    with tempfile.TemporaryDirectory() as name:
        prepare(model_dir, Path(name), repo, license_id)
        try:
            api = HfApi()
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(folder_path=name, repo_id=repo, commit_message="Pushed by minimoe")
        except Exception as error:  # of the network, in the words of whichever library speaks to it
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"cannot push to {repo}: {reason}", fix="check the name and the network, and run `hf auth login`"
            ) from error
    print(f"pushed: {commit.commit_url}")
