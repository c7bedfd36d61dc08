"""Loss and largest attention logit of training runs, from their logs."""

from collections.abc import Sequence
from pathlib import Path

from kimi_native.train.run_folder import read_log


def check_matplotlib() -> None:
    """Raises ValueError where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError("a plot needs matplotlib, expected: pip install 'kimi-native[train]'") from error


def series(log) -> dict[str, tuple[list[int], list[float]]]:
    """{"loss", "validation_loss", "max_logit": (steps, values)} of a log.jsonl; ValueError if it has no step."""
    lines = {}
    records = list(read_log(log))
    for key in ("loss", "validation_loss", "max_logit"):
        points = [(record["step"], record[key]) for record in records if key in record]
        lines[key] = ([step for step, _ in points], [value for _, value in points])
    if not lines["loss"][0]:
        raise ValueError(f"{log}: has no step of training, expected at least one")
    return lines


def plot(logs: Sequence[str | Path], image, tau: float | None = None) -> None:
    """Draw the logs of one or more runs, named by their folders, into one image of a format matplotlib writes.

    tau: drawn as a line through the logits. Raises ValueError for a log without a step or without matplotlib.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure((9, 8), layout="constrained")
    losses, logits = figure.subplots(2, sharex=True)
    for log in map(Path, logs):
        lines, name = series(log), log.absolute().parent.name
        (drawn,) = losses.plot(*lines["loss"], linewidth=0.8, alpha=0.5, label=f"{name}, training")
        if lines["validation_loss"][0]:
            losses.plot(*lines["validation_loss"], marker="o", color=drawn.get_color(), label=f"{name}, validation")
        logits.plot(*lines["max_logit"], linewidth=0.8, color=drawn.get_color(), label=name)
    if tau is not None:
        logits.axhline(tau, color="black", linestyle="--", linewidth=0.8, label=f"tau = {tau:g}")
    losses.set(ylabel="loss, nats a token")
    logits.set(ylabel="largest attention logit", xlabel="step", yscale="log")
    for axes in (losses, logits):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(image)
