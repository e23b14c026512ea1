"""What every file that people write is made of: typed sections, and all its mistakes in the house's words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ctcd_ds.cli import UserError, count, did_you_mean
from ctcd_ds.plain import from_yaml

Count = Annotated[int, Field(ge=1)]


class Mistakes(UserError):
    """All mistakes found at once: one line each, with field, value, and what to do."""

    def __init__(self, where: str, mistakes: Sequence[str]) -> None:
        self.mistakes = list(mistakes)
        super().__init__(
            f"{count(len(mistakes), 'mistake')} in {where}:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes)
        )


class Section(BaseModel):
    """A typed part of a YAML file: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def explained(problem: ValidationError, root: type[BaseModel]) -> list[str]:
    """What pydantic found wrong with a file of type `root`, in the house's words."""
    # A list whose items are wrong is "too short" besides: it has none left.
    return [
        _explained(error, root)
        for error in problem.errors()
        if error["type"] != "too_short" or len(error["input"]) < error["ctx"]["min_length"]
    ]


_FORMS = {
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),  # YAML 1.2 has no yes, no, on and off
    "dict_type": "must be a mapping, KEY: VALUE",
}


def _explained(error: Any, root: type[BaseModel]) -> str:
    location = [str(part) for part in error["loc"] if not (isinstance(part, str) and "[" in part)]
    field, value = ".".join(location), error["input"]
    if error["type"] == "extra_forbidden":
        return f"{field} = {value!r}: unknown key; {did_you_mean(location[-1], _keys_beside(location, root))}"
    if error["type"] == "missing":
        return f"{field}: missing; it has no default"
    said = _FORMS.get(error["type"].replace("model_type", "dict_type")) or error["msg"].replace("Input should", "must")
    said = re.sub(r"^\w+ should (have .*) after validation, not \d+$", r"must \1", said)
    return f"{field} = {value!r}: {said[0].lower() + said[1:]}{_as_it_is_written(error)}"


def _as_it_is_written(error: Any) -> str:
    """A cure where a number or a truth value was given as text, and a whole number as 1e3."""
    if isinstance(number := error["input"], float) and error["type"] == "int_type" and number.is_integer():
        return f"; write {number:.0f}"
    if not isinstance(text := error["input"], str) or not error["type"].startswith(("bool_", "float_", "int_")):
        return ""
    value = from_yaml(text) if re.fullmatch(r"[\w.+-]+", text) else None
    return f"; write {text}, without quotes" if isinstance(value, bool | int | float) else ""


def _keys_beside(location: Sequence[str], root: type[BaseModel]) -> list[str]:
    """The keys that are known at the place of an unknown one."""
    section: Any = root
    for part in location[:-1]:
        if _is_section(section):
            section = section.model_fields[part].annotation
        elif get_origin(section) is dict:
            section = get_args(section)[1]
        while get_origin(section) in (Union, UnionType, Annotated):
            section = next((arg for arg in get_args(section) if _is_section(arg)), get_args(section)[0])
    return list(section.model_fields) if _is_section(section) else []


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
