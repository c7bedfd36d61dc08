"""What a training run leaves in its folder: log.jsonl, the last two checkpoints, and the exported model at the end.

Nothing is ever half written: files get a temporary name, are brought to the disk, and are then renamed.
"""

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

KEPT = 2


class Saved(NamedTuple):
    """A checkpoint: steps done, parameters, the optimizer's state."""

    step: int
    params: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]


class RunFolder:
    """`identity`: what must be equal for a run to be resumed, as JSON values: configs and data."""

    def __init__(self, path, identity: dict):
        """Makes the folder if there is none."""
        self.path, self.log_file = Path(path), Path(path) / "log.jsonl"
        self.identity = json.loads(json.dumps(identity))  # tuples become lists, as they come back
        self.path.mkdir(parents=True, exist_ok=True)

    def save(self, saved: Saved) -> None:
        """A new checkpoint, after which only the last two are kept. If it fails, what was there is as before."""
        arrays = {f"params/{name}": array for name, array in saved.params.items()}
        arrays |= {f"optimizer/{name}": array for name, array in saved.optimizer.items()}
        state = json.dumps({"step": saved.step, "identity": self.identity})
        if self.log_file.exists():
            with self.log_file.open("rb") as stream:  # the log of the steps up to here must not come later than this
                os.fsync(stream.fileno())
        with _replacing(self.path / f"step-{saved.step:08}.npz") as stream:
            np.savez(stream, state=np.array(state), **arrays)
        for old in checkpoints(self.path)[:-KEPT]:
            old.unlink()

    def load(self) -> Saved | None:
        """The last checkpoint, None if there is none.

        Raises ValueError for one that cannot be read, and for one of a run with another identity.
        """
        for file in checkpoints(self.path)[-1:]:
            saved, identity = _read(file)
            _check_same(file, identity, self.identity)
            return saved
        return None

    @staticmethod
    def last(path) -> Saved:
        """The last checkpoint of the run in a folder, whatever run it is. Raises ValueError if there is none."""
        for file in checkpoints(path)[-1:]:
            return _read(file)[0]
        raise ValueError(f"{path}: has no step-*.npz, expected the folder of a training run")

    def cut_log(self, step: int) -> None:
        """Keep what the log says of the first `step` steps; a line that was not finished goes too."""
        if self.log_file.exists():
            kept = [json.dumps(record) + "\n" for record in read_log(self.log_file) if record["step"] <= step]
            with _replacing(self.log_file) as stream:
                stream.write("".join(kept).encode())

    def log(self, record: dict) -> None:
        with self.log_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


def checkpoints(path) -> list[Path]:
    """The checkpoints of the run in this folder, oldest first."""
    return sorted(Path(path).glob("step-*.npz"))


def read_log(file) -> Iterator[dict]:
    """The records of a log.jsonl, up to a line that was not finished. Raises ValueError for one that is no record."""
    lines = Path(file).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error}), expected a record of a step") from error
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{file}, line {number}: found {line!r:.80}, expected a record of a step")
        yield record


def _read(file: Path) -> tuple[Saved, dict]:
    """A checkpoint and the identity of its run."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            state = json.loads(str(arrays["state"]))
            groups = (_with_prefix(arrays, prefix) for prefix in ("params/", "optimizer/"))
            return Saved(state["step"], *groups), state["identity"]
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file}: cannot be read ({error}), expected a checkpoint; without this file the run goes on from the one "
            f"before"
        ) from error


def _with_prefix(arrays, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}


def _check_same(file: Path, found, expected, field: str = "") -> None:
    """found: of the checkpoint; expected: of this run."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in found | expected:
            _check_same(file, found.get(key), expected.get(key), f"{field}.{key}" if field else key)
    elif isinstance(found, list) and isinstance(expected, list):
        for i, pair in enumerate(zip_longest(found, expected)):
            _check_same(file, *pair, f"{field}[{i}]")
    elif found != expected:
        raise ValueError(
            f"{file}: {field} is {found!r:.200}, expected {expected!r:.200}: a run goes on as it began; another needs "
            f"a folder of its own"
        )


@contextmanager
def _replacing(file: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes become the file once all of them are on the disk; an error leaves the file as it was."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(partial, file)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name too
    finally:
        os.close(folder)
