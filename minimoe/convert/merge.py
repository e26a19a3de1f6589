"""`minimoe merge`: an adapter added to its base model's weights, as an ordinary model folder."""

from __future__ import annotations

from pathlib import Path

from minimoe import adapters
from minimoe.convert.export import new_folder
from minimoe.convert.receipt import Receipt, compare, folder_bytes, refuse_unequal, show
from minimoe.errors import UserError
from minimoe.loading import load_model, model_folder, quiet_transformers
from minimoe.tokenizer import load_tokenizer

NAME = "adapter"


def merge_folder(adapter_dir: str, out: str, base_dir: str | None = None) -> tuple[Path, Receipt]:
    """Write the merged model, open it again and compare it with the base and the adapter beside each other.

    Args:
        base_dir: where the base model is now; None looks where it was when the adapter was trained.

    Returns:
        The base's folder and the receipt.

    Raises:
        UserError: no adapter there, its base is missing or another model, or `out` is not empty.
    """
    folder = model_folder(adapter_dir)
    if not adapters.is_adapter(folder):
        raise UserError(f"no adapter: {folder} has no {adapters.ADAPTER_CONFIG}", fix="give the final/ of a lora run")
    base = adapters.base_of(folder, base_dir)
    merged = adapters.merged(load_model(base, "cpu")[0], folder)
    tokenizer = load_tokenizer(folder)
    adapted, _ = load_model(base, "cpu")
    adapters.put_on(adapted, folder, NAME)
    with new_folder(out) as target:
        with quiet_transformers():
            merged.save_pretrained(target)
            tokenizer.save_pretrained(target)
        receipt = compare((adapted.eval(), tokenizer), load_model(target, "cpu"), num_bytes=folder_bytes(target))
        refuse_unequal(receipt, "the merged model")
    return base, receipt


def run(adapter_dir: str, out: str, *, base: str | None, json_output: bool) -> None:
    """Merge, check and print."""
    found, receipt = merge_folder(adapter_dir, out, base)
    show(receipt, f"{adapter_dir} merged", json_output, base=str(found), out=out)
