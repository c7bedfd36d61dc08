"""Which experts to keep: hit rates of policies on random routing traces. python -m tests.cache_policies

Six layers of 384 experts, 8 a token, 1,600 tokens of which the last three quarters count. Popularity falls with rank as
1 / rank^s; a topic of about 220 tokens multiplies it by exp(normal * t) for each expert. The columns are the half-lives
of a use in tokens: 0 is LRU, infinity LFU.
"""

import numpy as np

LAYERS, EXPERTS, TOP_K, TOKENS = 6, 384, 8, 1600
HALF_LIVES = (0, 16, 64, 256, np.inf)
TRACES = {"uniform": (0, 0), "ranks": (1, 0), "topics": (0, 1.5), "ranks, topics": (0.5, 1), "both strong": (1, 1)}


def trace(rng, s: float, t: float) -> np.ndarray:
    """Expert ids [TOKENS, LAYERS, TOP_K]: draws without replacement by Gumbel noise."""
    ranks = np.stack([rng.permutation(-s * np.log(np.arange(1, EXPERTS + 1))) for _ in range(LAYERS)])
    pieces = []
    while sum(map(len, pieces)) < TOKENS:
        log_popularity = ranks + t * rng.standard_normal((LAYERS, EXPERTS))
        noise = rng.gumbel(size=(int(rng.exponential(200)) + 20, LAYERS, EXPERTS))
        pieces.append(np.argpartition(-(log_popularity + noise), TOP_K, axis=-1)[..., :TOP_K])
    return np.concatenate(pieces)[:TOKENS]


def hit_rate(ids: np.ndarray, slots: int, half_life: float) -> float:
    heat, resident = np.full(LAYERS * EXPERTS, -np.inf), np.zeros(LAYERS * EXPERTS, bool)
    hits = 0
    for token, layer in np.ndindex(ids.shape[:2]):
        keys = layer * EXPERTS + ids[token, layer]
        hits += resident[keys].sum() if token >= TOKENS // 4 else 0
        heat[keys] = np.logaddexp2(heat[keys], token / half_life) if half_life else token
        resident[keys] = True
        excess = int(resident.sum()) - slots
        if excess > 0:
            candidates = np.setdiff1d(np.flatnonzero(resident), keys)
            resident[candidates[np.argpartition(heat[candidates], excess - 1)[:excess]]] = False
    return hits / (ids[TOKENS // 4 :].size)


def main() -> None:
    print(f"{'trace':16}{'kept':>6}", *(f"{half_life:>6}" for half_life in HALF_LIVES))
    rng = np.random.default_rng(0)
    for name, shape in TRACES.items():
        ids = trace(rng, *shape)
        for kept in (0.05, 0.2, 0.5):
            rates = (hit_rate(ids, int(kept * LAYERS * EXPERTS), half_life) for half_life in HALF_LIVES)
            print(f"{name:16}{kept:>6.0%}", *(f"{rate:>6.1%}" for rate in rates), flush=True)


if __name__ == "__main__":
    main()
