"""What all sections of a config have in common, and the types of values that several use."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Section(BaseModel):
    """Base of all config sections: frozen, strict about keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_silent_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read True as 1, and the text "no" as False: both hide a typing mistake.
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and "bool" not in str(annotation):
            raise ValueError(f"expected {_type_name(annotation)}, not a boolean")
        if isinstance(value, str) and annotation is bool:
            raise ValueError("write true or false")
        return value


def _folder(value: str) -> str:
    expanded = os.path.expanduser(value)  # leaves "~nobody" as it is
    if not value.strip() or expanded.startswith("~"):
        raise ValueError("must name a folder")
    if os.path.exists(expanded) and not os.path.isdir(expanded):
        raise ValueError("is a file, not a folder")
    return value


def _own_folder(value: str) -> str:
    expanded = os.path.expanduser(value)
    folder = os.path.realpath(expanded)
    if folder == os.path.dirname(folder):
        raise ValueError("must name a folder that a run can have for itself")
    return expanded


def _plain_name(value: str) -> str:
    if not value.strip() or value in (".", "..") or set(value) & set("/\\"):
        raise ValueError("must be a plain name, without a path in it")
    return value


Folder = Annotated[str, AfterValidator(_folder)]
OutputDir = Annotated[Folder, AfterValidator(_own_folder)]
Name = Annotated[str, AfterValidator(_plain_name)]
# torch's generators take no larger seed.
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


def _type_name(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")
