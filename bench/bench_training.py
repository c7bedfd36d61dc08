"""A whole training step of a small text model: gradients, then the optimizer, beside the same model in PyTorch.

The model is the demo checkpoint's: hidden 128, a dense layer and four of 32 experts, top-8; 4,096 tokens a step, in
sequences of 128. Calls take turns, both start from the same parameters, and the note says how far apart the losses are.
"""

import time

import numpy as np
from kimi_native.config import Config
from kimi_native.tiny_config import preset_config
from kimi_native.train import params as parameters
from kimi_native.train.backward import loss_and_gradients
from kimi_native.train.batch import Batch
from kimi_native.train.muonclip import MuonClip, mla_heads

from bench import cpu_peers, shapes
from bench.harness import SPINNING, enough

SEQUENCES, LENGTH, VOCABULARY, LR = 32, 128, 2048, 2e-3


VALUES = preset_config("tiny-k2", "bf16") | {"num_hidden_layers": 5, "intermediate_size": 512, "vocab_size": VOCABULARY}
CONFIG = Config.from_dict(VALUES)


def bench(harness):
    if harness.cuda:
        return  # training runs on the CPU
    compared = engines(parameters.initialise(CONFIG, 0), harness.peers)
    seconds = [{"gradients": [], "whole step": []} for _ in compared]
    losses = [None] * len(compared)
    least, budget = (3, 2.0) if harness.quick else (7, 15.0)
    while not all(enough(times["whole step"], least, budget, 100) for times in seconds):
        for i, (_, gradients, update) in enumerate(compared):
            time.sleep(SPINNING)
            started = time.perf_counter()
            losses[i] = gradients()
            seconds[i]["gradients"].append(time.perf_counter() - started)
            update()
            seconds[i]["whole step"].append(time.perf_counter() - started)
    for case in ("gradients", "whole step"):
        for i, (name, *_) in enumerate(compared):
            ratio = np.median(seconds[i][case]) / np.median(seconds[0][case])
            note = f"ours {ratio:.2f}x, last losses {abs(losses[i] - losses[0]):.1e} apart" if i else ""
            harness.report("training", case, seconds[i][case], tokens=SEQUENCES * LENGTH, engine=name, note=note)


def engines(params, peers: bool) -> list[tuple]:
    """Of ours and each peer: its name, a function that returns the loss of a step's gradients, and one that updates the
    parameters by them. Ours updates `params`."""
    tokens = shapes.rng().integers(0, VOCABULARY, (SEQUENCES, LENGTH + 1)).astype(np.int32)
    ends = np.arange(0, SEQUENCES * LENGTH + 1, LENGTH, dtype=np.int32)
    batch = Batch(tokens[:, :-1].ravel(), tokens[:, 1:].ravel(), ends)
    optimizer, found = MuonClip(params, lr=LR, heads=mla_heads(CONFIG)), []

    def gradients():
        found[:] = [loss_and_gradients(params, CONFIG, batch)]
        return found[0].loss

    result = [("", gradients, lambda: optimizer.step(found[0].grads, found[0].max_logits))]
    if torch := peers and cpu_peers.module("torch_training"):
        momentum = (name.partition(".") for name in optimizer.state_dict())
        muon = [name for kind, _, name in momentum if kind == "momentum"]
        result.append(torch.engine(CONFIG, params, muon, tokens, LR))  # copies the parameters
    return result
