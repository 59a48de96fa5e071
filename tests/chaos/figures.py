"""What the rows of the failure matrix measured, one JSON line per figure in the file named by LMX_FIGURES."""

import json
import os
from collections.abc import Callable
from pathlib import Path

#: figure("row 01", "death seen", seconds, target=0.050): a measured value, and what the matrix asks for.
Figure = Callable[..., None]


def record(
    row: str, name: str, value: float, *, target: float | None = None, unit: str = "s", least: bool = False
) -> None:
    """Append one figure, if a run collects them. `least`: the target is a least value, not a largest."""
    file = os.environ.get("LMX_FIGURES")
    if not file:
        return
    fields = {"row": row, "name": name, "value": round(value, 4), "target": target, "unit": unit, "least": least}
    line = json.dumps(fields)
    with Path(file).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
