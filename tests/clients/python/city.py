"""What clients of pydantic ask for. Strings and objects are bounded: what a small model writes need not end by itself."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["City"]


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=99_999_999)
