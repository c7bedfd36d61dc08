"""From masters to a checkpoint in the published layout, which everything that reads Kimi K2.5's files can read."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from kimi_native.checkpoint import expected_tensors
from kimi_native.checkpoint_writer import new_folder, pack_int4, write_json, write_weights
from kimi_native.config import Config
from kimi_native.tiny_config import published_config
from kimi_native.train import params as parameters
from kimi_native.train.qat import quantize


def export(
    params: dict[str, np.ndarray],
    config: Config,
    folder,
    source,
    *,
    levels: int = 7,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the values of qat.deployed(params, levels) to `folder`, which must not exist, and return its path.

    params: float32, all of params.shapes(config). config: what they were trained with. source: where the other files
    come from, config.json among them: a folder, of which every visible file but the weights is copied, or a dict of
    file name -> bytes. config.json gets the quantization_config of INT4 experts if it has none. levels: codes of the
    experts are -levels..levels; a checkpoint that was exported gives the same files again. progress(done, total) is
    called after each tensor.
    Raises ValueError, naming the parameter or the key of config.json, for params that are not those of config, for a
    value that is not finite and for a config.json of another model; FileExistsError for an existing folder. A failure
    leaves nothing.
    """
    files = _files(source)
    values = _config_values(config, files, source)
    _check_params(params, config)
    tensors = expected_tensors(config)
    matrices = {on_disk: view for name, w in params.items() for on_disk, view in parameters.published(name, w)}
    folder = Path(folder)
    with new_folder(folder) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
        write_json(partial / "config.json", values)
        write_weights(partial, tensors, lambda name: _blocks(name, matrices, levels), progress)
    return folder


def _files(source) -> dict[str, bytes]:
    if isinstance(source, Mapping):
        return dict(source)
    visible = (file for file in sorted(Path(source).iterdir()) if file.is_file() and not file.name.startswith("."))
    return {file.name: file.read_bytes() for file in visible if ".safetensors" not in file.name}


def _config_values(config: Config, files: dict[str, bytes], source) -> dict:
    """config.json to write: that of the source, which must be that of config, saying that the experts are INT4."""
    where = "config.json" if isinstance(source, Mapping) else str(Path(source) / "config.json")
    if "config.json" not in files:
        raise ValueError(f"export: {where} is missing, expected it among the files of the source")
    try:
        values = json.loads(files["config.json"])
    except ValueError as error:
        raise ValueError(f"export: {where} is not JSON ({error}), expected a JSON object") from error
    found = Config.from_dict(values, source=where)
    if found.text_config.quantization_config is None:
        text = values.get("text_config", values)
        text["quantization_config"] = published_config()["text_config"]["quantization_config"]
    for key, value in _keys(found).items():
        if value != _keys(config)[key]:
            raise ValueError(f"export: {where} has {key} {value!r}, expected {_keys(config)[key]!r}, that of config")
    return values


def _keys(config: Config) -> dict:
    """What must be equal: all fields but the quantization."""
    flat = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "text_config"}
    text = config.text_config
    flat |= {f"text_config.{f.name}": getattr(text, f.name) for f in dataclasses.fields(text)}
    del flat["text_config.quantization_config"]
    return flat


def _check_params(params: dict[str, np.ndarray], config: Config) -> None:
    shapes = parameters.shapes(config)
    for name in shapes:
        if name not in params:
            raise ValueError(f"export: {name} is missing, expected all {len(shapes)} parameters of the config")
    for name, w in params.items():
        if name not in shapes:
            raise ValueError(f"export: {name} is unexpected, expected the {len(shapes)} parameters of the config alone")
        if w.dtype != np.float32 or w.shape != shapes[name]:
            raise ValueError(f"export: {name} is {w.dtype} {list(w.shape)}, expected float32 {list(shapes[name])}")
        if not np.isfinite(w).all():
            raise ValueError(f"export: {name} has a value that is not finite, expected finite ones")


def _blocks(name: str, matrices: dict[str, np.ndarray], levels: int) -> Iterator[np.ndarray]:
    """The values of a tensor on disk."""
    if name in matrices:
        dtype = np.float32 if name.endswith("e_score_correction_bias") else ml_dtypes.bfloat16
        yield matrices[name].astype(dtype)
        return
    module, _, part = name.rpartition("_")
    w = matrices[module]
    if part == "shape":
        yield np.array(w.shape, np.int32)
    else:
        codes, scale = quantize(w, levels)
        yield pack_int4(codes) if part == "packed" else scale
