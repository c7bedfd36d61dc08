"""Generation with the whole tiny random model: prefill and decode in tokens/s, and peak memory.

The model has every part of the real one in small (3 layers, a few MB) and stays in the caches, so this measures what
lies between the kernels: Python, small ops, the cache, the sampler. It runs in a fresh process, so that the peak memory
is its own.

With peers, the preset "small" beside ik_llama.cpp and llama.cpp, in turns, with the same weights; writing them takes a
minute.
"""

import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from kimi_native import ops

from bench import cpu_peers, shapes
from bench.harness import SPINNING

PROMPT_TOKENS, NEW_TOKENS = 512, 128
LONG_CONTEXT, BURST = 4096, 16  # tokens; those decoded in a row before it is the other's turn


def bench(harness):
    repeats = 3 if harness.quick else 9
    with tempfile.TemporaryDirectory() as folder:
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=fresh) as process:
            device = {"device": "cuda"} if harness.cuda else {}
            task = process.submit(measure, Path(folder) / "tiny", repeats, ops.isa(), ops.num_threads(), device)
            runs, peak = task.result()
    note = f"peak memory {peak / 2**20:.0f} MiB"
    harness.report(
        "generate", f"prefill T={PROMPT_TOKENS}", [r["prefill_seconds"] for r in runs], tokens=PROMPT_TOKENS, note=note
    )
    harness.report(
        "generate",
        f"decode {NEW_TOKENS} after {PROMPT_TOKENS}",
        [r["decode_seconds"] for r in runs],
        tokens=NEW_TOKENS - 1,  # the first one comes out of the prefill
        note=note,
    )
    if not harness.cuda and harness.peers and cpu_peers.ggml_engines() and cpu_peers.module("gguf_file"):
        compare(harness)


def compare(harness):
    from kimi_native import load
    from kimi_native.make_tiny import make_tiny

    from bench import gguf_file, gguf_models

    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name) / "small", Path(name) / "small.gguf"
        make_tiny(folder, "small")
        gguf_file.write(folder, file)
        room = LONG_CONTEXT + 32 * BURST
        theirs = {engine: gguf_models.MODELS[engine](file, room) for engine in cpu_peers.ggml_engines()}
        for activations in ("int16", "int8"):  # theirs are int8; the dense weights have 8 bits in both
            ours = load(folder, activations=activations, dense="int8")
            take_turns(harness, activations, {"ours": OurModel(ours, room), **theirs})


class OurModel:
    """One sequence, as bench.gguf_models has it."""

    def __init__(self, model, max_tokens: int):
        self._model, self._cache = model, model.new_cache(max_tokens)

    def clear(self) -> None:
        self._cache.truncate(0)

    def forward(self, token_ids):
        return self._model.forward(token_ids, self._cache, last_only=True)[0]


def take_turns(harness, activations, engines):
    """engines: {name: model}, ours first. All get the same random tokens."""
    rounds = 3 if harness.quick else 9
    tokens = shapes.rng().integers(0, 16384, LONG_CONTEXT + (rounds + 1) * BURST).tolist()
    prompt, chunks = tokens[:PROMPT_TOKENS], range(0, LONG_CONTEXT, PROMPT_TOKENS)

    def prefill(engine, turn):
        engine.clear()
        return [timed(engine, prompt)]

    def decode_from_empty(engine, turn):
        engine.clear()
        return [timed(engine, [token]) for token in tokens[:BURST]]

    def decode(engine, turn):
        if turn == 0:
            engine.clear()
            for start in chunks:
                engine.forward(tokens[start : start + PROMPT_TOKENS])
        start = LONG_CONTEXT + turn * BURST
        return [timed(engine, [token]) for token in tokens[start : start + BURST]]

    for what, per_call, run in (
        (f"prefill T={PROMPT_TOKENS}", PROMPT_TOKENS, prefill),
        ("decode after 0", 1, decode_from_empty),
        (f"decode after {LONG_CONTEXT}", 1, decode),
    ):
        calls = {name: [] for name in engines}
        for turn in range(rounds + 1):
            for name, engine in engines.items():
                time.sleep(SPINNING)
                new = run(engine, turn)
                calls[name] += new if turn else []
        report(harness, f"small {what} {activations}", per_call, *calls.items())


def report(harness, case, tokens, ours, *others):
    """Lines of measured calls, each (name, [(seconds, logits)])."""
    ours_seconds, ours_logits = zip(*ours[1], strict=True)
    harness.report("generate", case, ours_seconds, tokens=tokens)
    for name, calls in others:
        seconds, logits = zip(*calls, strict=True)
        ratio = statistics.median(seconds) / statistics.median(ours_seconds)
        cosine = statistics.median(map(cosine_of, ours_logits, logits))
        note = f"ours {ratio:.2f}x, cosine of logits {cosine:.4f}"
        harness.report("generate", case, seconds, tokens=tokens, engine=name, note=note)


def timed(engine, token_ids):
    """(seconds, logits)"""
    started = time.perf_counter()
    logits = engine.forward(token_ids)
    return time.perf_counter() - started, logits


def cosine_of(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def measure(folder: Path, repeats: int, isa: str, threads: int, device: dict[str, str]):
    """Runs in the fresh process. Returns (kimi_native.generate.Stats as dicts, one a repeat, peak resident bytes)."""
    from kimi_native import load
    from kimi_native.generate import Stats, generate_tokens
    from kimi_native.make_tiny import make_tiny

    ops.set_isa(isa)
    ops.set_num_threads(threads)
    model = load(make_tiny(folder), **device)
    vocab_size = model.config.text_config.vocab_size
    prompt = shapes.rng().integers(0, vocab_size, PROMPT_TOKENS).tolist()
    runs = []
    for _ in range(repeats + 1):
        stats = Stats()
        generate_tokens(model, prompt, NEW_TOKENS, ignore_eos=True, temperature=0.0, stats=stats)
        runs.append(dataclasses.asdict(stats))
    return runs[1:], _peak_memory()


def _peak_memory() -> int:
    """Peak resident bytes of this process; getrusage would count the process it was started from as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
