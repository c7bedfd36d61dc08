"""What is read before it is needed, and given back after."""

import kimi_native as kn
import pytest
from kimi_native import make_tiny as tiny
from kimi_native.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def asked(monkeypatch):
    """Entries by what is asked of the checkpoint."""
    entries = {"read_ahead": [], "release": []}
    monkeypatch.setattr(Checkpoint, "read_ahead", lambda self, more: entries["read_ahead"].extend(more))
    monkeypatch.setattr(Checkpoint, "release", lambda self, entry: entries["release"].append(entry))
    return entries


def dense(folder):
    """{name: entry}, of the text model all but the embeddings and the routed experts, in the order of the layers."""
    entries = Checkpoint(folder).entries
    body = ("language_model.model.layers.", "language_model.model.norm.", "language_model.lm_head.")
    named = {name: entry for name, entry in entries.items() if name.startswith(body) and ".experts." not in name}
    return dict(sorted(named.items(), key=lambda item: (item[1].file, item[1].begin)))


def test_what_every_token_needs_is_read_ahead(folder, asked, monkeypatch):
    monkeypatch.setattr("kimi_native.placement.memory_nodes", lambda: 1)
    kn.load(folder)
    assert asked["read_ahead"] == list(dense(folder).values())


def test_nothing_is_read_ahead_that_memory_does_not_hold(folder, asked, monkeypatch):
    size = sum(entry.nbytes for entry in dense(folder).values())
    monkeypatch.setattr("kimi_native.placement.available_memory", lambda: size - 1)
    kn.load(folder)
    assert asked["read_ahead"] == []


def test_nothing_is_read_ahead_onto_one_of_several_nodes(folder, asked, monkeypatch):
    monkeypatch.setattr("kimi_native.placement.memory_nodes", lambda: 2)
    kn.load(folder)
    assert asked["read_ahead"] == []


def test_what_was_rounded_is_released(folder, asked):
    kn.load(folder, dense="int8")
    kept = ("norm.weight", "mlp.gate.weight", "e_score_correction_bias", "kv_b_proj.weight")
    assert set(asked["release"]) == {entry for name, entry in dense(folder).items() if not name.endswith(kept)}
