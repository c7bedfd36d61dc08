"""Read back what --json printed."""

import json
from pathlib import Path

KEY = "op", "case", "isa"


def read(file) -> tuple[dict, list[dict]]:
    """(header, cases) of a file of JSON lines. Raises ValueError for a file that --json did not write."""
    try:
        header, *cases = map(json.loads, Path(file).read_text(encoding="utf-8").splitlines())
        if "commit" not in header or not all({*KEY, "median_seconds"} <= case.keys() for case in cases):
            raise ValueError("keys are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}; expected the output of python -m bench --json") from error
    return header, cases


def medians(file) -> dict[tuple, float]:
    """Seconds of each (op, case, isa)."""
    return {tuple(case[key] for key in KEY): case["median_seconds"] for case in read(file)[1]}
