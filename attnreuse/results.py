"""Plain data that files keep: what was measured or found, and policies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

MOST = 3  # of a file's faults that a message names


class Result(BaseModel):
    """Data of numbers, text, lists and tables alone.

    Attributes:
        file_kind: what a file of it is called in messages.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")
    file_kind: ClassVar[str] = "a result"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return self.model_dump()

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: something else; the message says which field is wrong and how.
        """
        with reading(path, cls.file_kind):
            return cls.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))


@contextmanager
def reading(path: str | Path, file_kind: str) -> Iterator[None]:
    """Errors of reading `path` say what is wrong with it."""
    try:
        yield
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
        more = f"; and {len(wrong) - MOST} more" if len(wrong) > MOST else ""
        raise ValueError(f"{path} is not {file_kind} file: {'; '.join(wrong[:MOST])}{more}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not {file_kind} file: {error}") from None
