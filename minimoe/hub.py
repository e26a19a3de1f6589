"""Whether the Hugging Face hub can be asked: once, and before a library tries again and again."""

from __future__ import annotations

from typing import Literal

from minimoe.errors import UserError

SECONDS = 10.0  # to wait for an answer


def reachable(kind: Literal["model", "dataset"], name: str) -> bool:
    """Whether the hub answers for a repository; False where the user works offline.

    Raises:
        UserError: it does not answer, or has no such repository, or not for this user.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        ask(name, timeout=SECONDS)
        return True
    except HfHubHTTPError as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the hub has no {kind} {name!r} for you: {reason}", fix="check the name and your access"
        ) from None
    except Exception as error:  # of the network, in the words of whichever library speaks to it
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(
            f"the hub does not answer for {kind} {name!r}: {reason}",
            fix="check the network, give a local path, or set HF_HUB_OFFLINE=1 to use what was downloaded before",
        ) from None
