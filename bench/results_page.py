"""Turn the JSON lines of a run on a GPU into a page: python bench/results_page.py ABOUT < LINES > PAGE

ABOUT says where the run was: chip, driver, compiler, commit. The header line says when.
"""

import json
import sys

COLUMNS = ("op", "case", "cold us", "chained us", "GB/s", "TFLOP/s", "of copy", "of bf16", "beside it")


def page(about: str, lines) -> str:
    """Markdown. lines: the header, then the cases, as bench.gpu prints them."""
    header, *cases = map(json.loads, lines)
    copy, bf16 = header["copy_bytes_per_second"] / 1e9, header["bf16_operations_per_second"] / 1e12
    rows = [
        f"# {header['gpu']}, {header['date'][:10]}",
        "",
        f"{about}. CuPy {header['cupy']}; peers {header['peers']}. In this run a copy moved {copy:.0f} GB/s, a bf16",
        f"product by cuBLAS ran at {bf16:.0f} TFLOP/s. `python -m bench --help` says what the columns mean.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    return "\n".join([*rows, *map(row, cases)]) + "\n"


def row(case: dict) -> str:
    if "median_seconds" not in case:
        return f"| {case['op']} | {case['case']} {'| ' * (len(COLUMNS) - 2)}{case['note']} |"
    seconds, peers = case["median_seconds"], case["peers"].items()
    beside = [f"{t / seconds:.2f}x {name}" if isinstance(t, float) else f"{name} {t}" for name, t in peers]
    cells = [
        case["op"],
        case["case"],
        number(seconds, 1e-6),
        number(case["chained_seconds"], 1e-6),
        number(case["bytes_per_second"], 1e9),
        number(case["operations_per_second"], 1e12),
        number(case["of_copy"], 0.01, "%"),
        number(case["of_bf16"], 0.01, "%"),
        ", ".join(filter(None, [case["note"], *beside])),
    ]
    return f"| {' | '.join(cells)} |"


def number(value: float | None, unit: float, suffix: str = "") -> str:
    return f"{value / unit:.3g}{suffix}" if value else ""


if __name__ == "__main__":
    print(page(sys.argv[1], sys.stdin), end="")
