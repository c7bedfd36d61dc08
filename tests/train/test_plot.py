"""The plot of training runs: what it draws, and logs that have nothing to draw."""

import json
import sys

import pytest
from kimi_native.train.plot import plot, series
from PIL import Image

RECORDS = [
    {"step": 1, "loss": 3.0, "max_logit": 5.0},
    {"step": 2, "loss": 2.5, "max_logit": 50.0},
    {"step": 2, "validation_loss": 2.75},
    {"step": 3, "loss": 2.0, "max_logit": 20.0},
]


def write_log(folder, records):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "log.jsonl"


def test_series(tmp_path):
    log = write_log(tmp_path / "run", RECORDS)
    with log.open("a") as stream:
        stream.write('{"step": 4, "loss"')  # a killed run's last line
    assert series(log) == {
        "loss": ([1, 2, 3], [3.0, 2.5, 2.0]),
        "validation_loss": ([2], [2.75]),
        "max_logit": ([1, 2, 3], [5.0, 50.0, 20.0]),
    }


def test_two_runs_in_one_image(tmp_path, monkeypatch):
    """Both are drawn and named, and tau is."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args: figures.append(self) or save(self, *args))
    logs = [write_log(tmp_path / "one", RECORDS), write_log(tmp_path / "two", RECORDS[:2])]
    plot(logs, tmp_path / "plot.png", tau=30.0)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG" and min(image.size) > 500
    losses, logits = figures[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for axes in (losses, logits) for line in axes.lines}
    assert lines == {
        "one, training": [3.0, 2.5, 2.0],
        "one, validation": [2.75],
        "two, training": [3.0, 2.5],
        "one": [5.0, 50.0, 20.0],
        "two": [5.0, 50.0],
        "tau = 30": [30.0, 30.0],
    }


def test_without_tau_none_is_drawn(tmp_path):
    plot([write_log(tmp_path / "run", RECORDS)], tmp_path / "plot.svg")
    assert "tau" not in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize(("line", "message"), [("{", "line 2: not JSON"), ("[1]", r"line 2: found '\[1\]', expected")])
def test_log_that_is_none(tmp_path, line, message):
    log = write_log(tmp_path / "run", RECORDS)
    log.write_text(f"{json.dumps(RECORDS[0])}\n{line}\n")
    with pytest.raises(ValueError, match=f"log.jsonl, {message}"):
        plot([log], tmp_path / "plot.png")


def test_log_without_a_step(tmp_path):
    log = write_log(tmp_path / "run", [])
    with pytest.raises(ValueError, match="log.jsonl: has no step of training, expected at least one"):
        plot([log], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"a plot needs matplotlib, expected: pip install 'kimi-native\[train\]'"):
        plot([write_log(tmp_path / "run", RECORDS)], tmp_path / "plot.png")
