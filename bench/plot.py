"""Plot the rate of each op over its batch, a line for each kind of case and engine: python -m bench.plot LINES IMAGE

LINES: the output of python -m bench --json. IMAGE: a file of a format that matplotlib writes: .svg, .png, .pdf.
"""

import re
import sys
from collections import defaultdict

from bench import results


def series(cases) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{op: {kind of case and engine: [(T, operations/s), ...]}} of the cases that count T tokens and operations."""
    found = defaultdict(lambda: defaultdict(list))
    for case in cases:
        tokens = re.search(r"\bT=(\d+)", case["case"])
        if tokens and case["operations_per_second"]:
            rest = re.sub(r"\b(T|experts)=\d+", "", case["case"])
            label = " ".join([*rest.split(), case["isa"]])
            found[case["op"]][label].append((int(tokens[1]), case["operations_per_second"]))
    lines = {op: {k: sorted(points) for k, points in kinds.items() if len(points) > 1} for op, kinds in found.items()}
    return {op: kinds for op, kinds in lines.items() if kinds}


def plot(lines, image) -> None:
    from matplotlib.figure import Figure

    header, cases = results.read(lines)
    ops = series(cases)
    if not ops:
        raise ValueError(f"{lines}: no op in it has two cases that differ in T alone")
    figure = Figure((9, 5 * len(ops)), layout="constrained")
    for axes, (op, kinds) in zip(figure.subplots(len(ops), squeeze=False)[:, 0], ops.items(), strict=True):
        for label, points in kinds.items():
            tokens, rates = zip(*points, strict=True)
            axes.plot(tokens, [rate / 1e9 for rate in rates], marker="o", label=label)
        axes.axhline(header["float32_operations_per_second"] / 1e9, color="grey", linestyle=":", label="float32 roof")
        axes.set(title=op, xlabel="tokens", ylabel="GOP/s")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.legend(fontsize="small")
    figure.suptitle(f"{header['chip']}, threads: {header['threads']}, {header['date'][:10]}, {header['commit']}")
    figure.savefig(image)


if __name__ == "__main__":
    try:
        plot(*sys.argv[1:])
    except (TypeError, ValueError) as error:
        sys.exit(f"bench.plot: {error}")
