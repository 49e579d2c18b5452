"""Values that cross from one room into another: frozen, typed, validated where a file is read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from raytvb.storage.damage import unreadable

if TYPE_CHECKING:
    from typing_extensions import Self

JsonObject: TypeAlias = dict[str, JsonValue]


class Contract(BaseModel):
    """Base of all values that are stored as JSON or handed from room to room.

    A subclass lists its fields with types. A field of the file that the class does not have is
    ignored, so that files of other versions can be read.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def from_json(cls, fields: object, where: str) -> Self:
        """The value that parsed JSON stands for; `where` names the file.

        Raises DamagedError that names the file and the first field that is wrong.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise unreadable(where, problem_of(error)) from error

    def to_json(self) -> JsonObject:
        """Plain values for a JSON file."""
        return self.model_dump(mode="json")


def parse_json(data: bytes | str, where: str) -> Any:
    """The parsed bytes of a file; `where` names it. Raises DamagedError if not JSON."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise unreadable(where, f"it is not JSON: {error}") from error
    except RecursionError as error:
        raise unreadable(where, "its JSON is nested too deeply") from error


def problem_of(error: ValidationError) -> str:
    """The first field that is wrong, and what is wrong with it."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"])) or "its contents"
    return f"{field:.200}: {first['msg']}"
