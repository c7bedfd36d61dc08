"""Writes vision.npz and vision.json: what transformers makes of images and video chunks, on the tiny checkpoint.

Run by hand where make_golden.py runs, and under the same terms: its own loader, float64 throughout. Tower and projector
are called item by item, because transformers takes only items of equal length together. The patches are bytes drawn
from the seed in order of the grids; a byte b is normalised to b / 127.5 - 1.

The splice is a prompt whose placeholders stand for two of the items, and the logits of all of its tokens.
"""

import contextlib
import copy
import itertools
import json
import tempfile
from pathlib import Path

import make_golden
import numpy as np
import torch
import transformers
from kimi_native.make_tiny import make_tiny
from tensor_hash import hash_tensors
from transformers.models.kimi_k25 import modeling_kimi_k25

HERE = Path(__file__).parent
CHECKPOINT = json.loads((HERE / "text.json").read_text())["checkpoint"]
# The table of positions is 8 x 8.
GRIDS = ((1, 2, 2), (1, 8, 8), (1, 6, 10), (1, 16, 4), (1, 14, 20), (2, 4, 6), (3, 8, 8), (4, 10, 6), (4, 2, 2))
SPLICE_ITEMS, SPLICE_TEXT = (2, 6), (6, 3, 5)  # an image and a video chunk; tokens before, between and after


@contextlib.contextmanager
def float64(model):
    """Within the block `model` computes in float64, the casts to float32 in its source included."""
    single = torch.Tensor.float
    modeling_kimi_k25.torch, torch.Tensor.float = make_golden.DoubleTorch(), torch.Tensor.double
    try:
        with make_golden.float64(model):
            yield
    finally:
        modeling_kimi_k25.torch, torch.Tensor.float = torch, single


@torch.no_grad()
def features(model, patches, grid):
    """[tokens, text_hidden_size] of uint8 patches [t * gh * gw, 3, 14, 14]."""
    body = model.model
    pixels = (torch.from_numpy(patches).double() / 127.5 - 1).to(model.dtype)
    pooled = body.vision_tower(pixels, grid_thw=torch.tensor([grid])).pooler_output
    return body.mm_projector(pooled)[:, 0]


@torch.no_grad()
def splice(model, token_ids, media):
    """Logits [T, V]; the rows of `media` stand in place of the placeholders' embeddings."""
    ids = torch.tensor(token_ids)[None]
    embeddings = model.get_input_embeddings()(ids)
    embeddings[ids == model.config.image_token_id] = torch.cat(media)
    hidden = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
    return model.lm_head(hidden)[0].numpy()


def run(model, items, token_ids):
    encoded = [features(model, patches, grid) for patches, grid in zip(items, GRIDS, strict=True)]
    logits = splice(model, token_ids, [encoded[i] for i in SPLICE_ITEMS])
    return {"features": torch.cat(encoded).numpy(), "splice_logits": logits}


def bf16_features(model, items):
    """With weights and activations in bf16; the tables of angles stay float32, as they do when it is loaded so."""
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    encoded = [features(half, patches, grid) for patches, grid in zip(items, GRIDS, strict=True)]
    return torch.cat(encoded).double().numpy()


def difference(a, b):
    """The largest, in standard deviations of b."""
    return float(np.abs(a - b).max() / b.std())


def measure(seed, model):
    """(arrays for vision.npz, facts for vision.json) of one seed."""
    random, c = np.random.RandomState(seed), model.config
    items = [random.randint(0, 256, (t * gh * gw, 3, 14, 14), np.uint8) for t, gh, gw in GRIDS]
    text = [random.randint(0, c.bos_token_id, count).tolist() for count in SPLICE_TEXT]
    counts = [GRIDS[i][1] * GRIDS[i][2] // 4 for i in SPLICE_ITEMS]
    pads = [[c.image_token_id] * count for count in counts]
    token_ids = [token for part in itertools.zip_longest(text, pads, fillvalue=[]) for ids in part for token in ids]
    single = run(model, items, token_ids)
    half = bf16_features(model, items)
    with float64(model), make_golden.router_margins(model) as margins:
        double = run(model, items, token_ids)
    facts = {
        "seed": seed,
        "checkpoint": CHECKPOINT,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "float32_difference": {name: difference(single[name], value) for name, value in double.items()},
        "bf16_rms_difference": float(np.sqrt(np.mean((half - double["features"]) ** 2)) / double["features"].std()),
        "router_margin": min(margins),
    }
    arrays = {"grids": GRIDS, "splice_items": SPLICE_ITEMS, "splice_tokens": token_ids}
    arrays = {name: np.array(values, np.int32) for name, values in arrays.items()}
    return arrays | {name: value.astype(np.float32) for name, value in double.items()}, facts


def main():
    with tempfile.TemporaryDirectory() as parent:
        folder = make_tiny(Path(parent) / "checkpoint", **CHECKPOINT)
        digest, model = hash_tensors(folder), make_golden.load(folder)
    for seed in itertools.count():
        arrays, facts = measure(seed, model)
        if facts["router_margin"] > make_golden.MIN_ROUTER_MARGIN:
            break
    np.savez(HERE / "vision.npz", **arrays)
    (HERE / "vision.json").write_text(json.dumps(facts | {"sha256": digest}, indent=2) + "\n")


if __name__ == "__main__":
    main()
