"""Types of a recipe's options: what pydantic checks and converts when a recipe is read."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BeforeValidator, Field

T = TypeVar("T")
Several = Annotated[tuple[T, ...], BeforeValidator(lambda x: tuple(x) if isinstance(x, list) else (x,))]  # one: no []
Text = Annotated[str, BeforeValidator(lambda x: str(x) if type(x) in (int, float) else x)]  # a name may be a number
Count = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(ge=1e-3)]
Share = Annotated[float, Field(ge=0, le=1)]
