"""Generation with the whole tiny random model: prefill and decode in tokens/s, and peak memory.

The model has every part of the real one in small (3 layers, a few MB) and stays in the caches, so this measures what
lies between the kernels: Python, small ops, the cache, the sampler. It runs in a fresh process, so that the peak memory
is its own.
"""

import dataclasses
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from kimi_native import ops

from bench import shapes

PROMPT_TOKENS, NEW_TOKENS = 512, 128


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
