"""From logits to the next token: penalties, then temperature, top-k, top-p and min-p, with a seed."""

import math
from collections import Counter
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from kimi_native import ops
from kimi_native.ops._array import array_module, to_host


@dataclass(frozen=True)
class SamplingParams:
    """How to draw a token. The defaults are the model card's for thinking mode; for instant mode it advises 0.6.

    temperature: >= 0, 0 takes the most likely token. top_k: 0 keeps all. top_p: 0 < p <= 1. min_p: 0 <= p <= 1,
    relative to the most likely token. repetition_penalty: > 0, divides positive logits and multiplies negative ones of
    tokens in prompt or output. presence_penalty and frequency_penalty: subtracted from the logits of tokens in the
    output, once and per occurrence. seed: None draws a fresh one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self):
        checks = {
            "temperature": (0 <= self.temperature < math.inf, "a finite number >= 0"),
            "top_k": (isinstance(self.top_k, Integral) and 0 <= self.top_k < 2**31, "an integer >= 0"),
            "top_p": (0 < self.top_p <= 1, "0 < top_p <= 1"),
            "min_p": (0 <= self.min_p <= 1, "0 <= min_p <= 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a finite number > 0"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number"),
            "seed": (
                self.seed is None or (isinstance(self.seed, Integral) and self.seed >= 0),
                "None or an integer >= 0",
            ),
        }
        for name, (fits, expected) in checks.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")


class Sampler:
    """Draws the tokens of one sequence; remembers what penalties need."""

    def __init__(self, params: SamplingParams, prompt_ids):
        self.params = params
        self.rng = np.random.default_rng(params.seed)
        self.prompt = set(prompt_ids)
        self.output: Counter[int] = Counter()

    def next(self, logits) -> int:
        """logits: float32 [1, V], changed in place by penalties; those on the GPU are brought to the host for them.

        Returns a token id. Raises ValueError if the largest logit is not finite.
        """
        p = self.params
        if self._penalises():
            logits = to_host(logits)
            self._penalise(logits[0])
        uniform = array_module(logits).asarray(self.rng.random(1, np.float32))
        ids = ops.top_k_top_p_sample(logits, uniform, p.temperature, p.top_k, p.top_p, p.min_p)
        token = int(to_host(ids)[0])
        if token < 0:  # from the GPU, where the op has no way to say it
            raise ValueError("top_k_top_p_sample: logits[0] has no finite largest value")
        self.output[token] += 1
        return token

    def _penalises(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1.0 or bool(p.presence_penalty or p.frequency_penalty)

    def _penalise(self, logits: np.ndarray) -> None:
        p = self.params
        if p.repetition_penalty != 1.0:
            seen = np.array(sorted(self.prompt | self.output.keys()), np.int64)
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and self.output:
            written = np.array(list(self.output), np.int64)
            counts = np.array(list(self.output.values()), np.float32)
            logits[written] -= p.presence_penalty + p.frequency_penalty * counts
