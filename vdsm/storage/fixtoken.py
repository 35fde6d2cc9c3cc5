"""A fix's `data`, as it comes back from anybody."""

from typing import Any

import pydantic

from vdsm import errors, ids


class Token(pydantic.BaseModel):
    """`repo` is the repository's persistent name: the same on every host."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    repo: str
    fix: str
    entity: str = pydantic.Field(pattern=ids.UUID_PATTERN)
    guard: dict[str, int | str | dict[str, str] | None]


def read(data: dict[str, Any]) -> Token:
    """Raises `BadFix` for what no check has answered."""
    try:
        return Token.model_validate(data)
    except pydantic.ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "data"
        raise errors.BadFix(reason=f"{where}: {error.errors()[0]['msg']}") from error
