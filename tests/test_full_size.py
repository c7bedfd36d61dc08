"""The proof at full size, on a model of 2.6 MB."""

import re

import numpy as np
import pytest
from kimi_native.checkpoint import Checkpoint

from tests import full_size

TOKENS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    full_size.write_model(folder, 1, TOKENS, preset="tiny")
    return folder


def test_real_bytes_where_they_are_said_to_be(folder):
    checkpoint = Checkpoint(folder)
    prefix = f"{checkpoint.prefix}model."
    np.testing.assert_array_equal(checkpoint[f"{prefix}norm.weight"].astype(np.float32), 1)
    embeddings = checkpoint[f"{prefix}embed_tokens.weight"].astype(np.float32)
    assert len(np.unique(embeddings[full_size.FIRST_TOKEN :][:TOKENS], axis=0)) == TOKENS
    scales = checkpoint[f"{prefix}layers.1.mlp.experts.0.up_proj.weight_scale"].astype(np.float32)
    assert 0.0075 < scales.min() < scales.max() < 0.032
    codes = checkpoint[f"{prefix}layers.1.mlp.experts.0.up_proj.weight_packed"]
    assert len(np.unique(codes)) > 0.9 * codes.size
    router = checkpoint[f"{prefix}layers.2.mlp.gate.weight"].astype(np.float32)
    assert 0.9 < router.std() * router.shape[1] ** 0.5 < 1.1


@pytest.mark.parametrize("expert_cache", ["1GB", "0"])
def test_report(folder, expert_cache, monkeypatch, capsys):
    monkeypatch.setattr(full_size, "storage", lambda file: {f"reads of {file.name}": 1.0})
    full_size.report(folder, 1, TOKENS, expert_cache)
    text = capsys.readouterr().out
    assert re.search(r"storage:  1.00 GB/s  reads of model-0000\d-of-", text)
    assert re.findall(r"^token (\d):", text, re.M) == list("1234")
    assert "peak memory: RssAnon 0." in text
    assert (" hits" in text) == (expert_cache == "1GB")


def test_storage_reads_pieces_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(full_size, "PIECE", 1 << 16)
    monkeypatch.setattr(full_size, "TOTAL", 1 << 18)
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    try:
        rates = full_size.storage(file)
    except OSError as error:
        pytest.skip(f"no O_DIRECT or no MADV_POPULATE_READ here: {error}")
    assert len(rates) == 7 and all(rate > 0 for rate in rates.values())
