"""What was measured or found, as plain data: printed by `--json`, kept in files, read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError
from typing_extensions import Self


class Result(BaseModel):
    """Plain data."""

    called: ClassVar[str] = "a result"  # of its files, in messages

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return self.model_dump()

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: something else.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except ValidationError as error:
            raise ValueError(f"{path} is not {cls.called} file: {error.errors()[0]['msg']}") from None
