"""top_k_top_p_sample over the whole vocabulary; logits of standard deviation 4, peaked as a model's are."""

import numpy as np
from kimi_native import ops

from bench import baseline, shapes

SETTINGS = {
    "greedy": {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
    "top_p=0.95": {"temperature": 1.0, "top_k": 0, "top_p": 0.95},
    "top_k=50": {"temperature": 1.0, "top_k": 50, "top_p": 1.0},
}


def bench(harness):
    rng = shapes.rng()
    for B in shapes.SAMPLED.of(harness):
        logits = harness.arrays.put(shapes.random_f32(rng, B, shapes.VOCAB) * np.float32(4))
        uniform = harness.arrays.put(rng.random(B, np.float32))
        for name, scalars in SETTINGS.items():
            # arrays on a GPU: a number would be sent there with each call
            settings = {key: of_rows(harness, key, value, B) for key, value in scalars.items()}
            harness.run(
                "top_k_top_p_sample",
                f"B={B} {name}",
                lambda logits=logits, uniform=uniform, settings=settings: ops.top_k_top_p_sample(
                    logits, uniform, **settings
                ),
                bytes_moved=logits.nbytes,
                baseline=lambda logits=logits, uniform=uniform, settings=scalars: numpy_sample(
                    logits, uniform, **settings
                ),
            )


def of_rows(harness, name, value, B):
    if not harness.cuda:
        return value
    return harness.arrays.put(np.full(B, value, np.int32 if name == "top_k" else np.float32))


def numpy_sample(logits, uniform, temperature, top_k, top_p):
    """Sorts the vocabulary, or with top_k only the candidates."""
    if temperature == 0:
        return logits.argmax(axis=1)
    return np.array([_draw(row / temperature, u, top_k, top_p) for row, u in zip(logits, uniform, strict=True)])


def _draw(logits, u, top_k, top_p):
    kept = np.argpartition(-logits, top_k - 1)[:top_k] if top_k else np.arange(len(logits))
    kept = kept[np.argsort(-logits[kept], kind="stable")]
    sums = baseline.softmax(logits[kept]).cumsum()
    last = min(np.searchsorted(sums, top_p), len(kept) - 1)
    return kept[np.searchsorted(sums[: last + 1], u * sums[last], side="right")]
