"""Writes text.npz and text.json: logits of the tiny checkpoint's text model as transformers computes them.

Run by hand where this package, torch (CPU), safetensors and transformers >= 5.23 are installed; the tests
need the two files alone. They make the checkpoint anew from its seed, only the hash of its tensors is stored.

The reference reads the checkpoint with its own loader and runs in float64 throughout: what its source has
fixed to float32 (norm statistics, softmax, router, rotation tables) is lifted too, only the rotation
frequencies stay float32 numbers. Its epsilon of the two latent norms is 1e-6 whatever the config says.
"""

import contextlib
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from kimi_native.make_tiny import make_tiny
from tensor_hash import hash_tensors
from transformers import DynamicCache, Kimi_K25Config, Kimi_K25ForConditionalGeneration
from transformers.models.deepseek_v3 import modeling_deepseek_v3

HERE = Path(__file__).parent
CHECKPOINT = {"preset": "tiny", "experts": "bf16", "scale_bits": 4}
PROMPT_TOKENS, LONG_TOKENS, NEW_TOKENS = 48, 1100, 40
LONG_ROWS = (0, 1, 15, 16, 63, 64, 127, 128, 255, 256, 511, 512, 513, 767, 768, 1023, 1024, 1025, 1098, 1099)
LOGITS = ("prompt_logits", "decode_logits", "long_logits")
# A seed is usable if rounding turns neither a token nor an expert. Logits are in standard deviations.
MIN_GREEDY_MARGIN = 1e-3  # best logit over the second
MIN_ROUTER_MARGIN = 1e-5  # last chosen expert over the first rejected
MAX_BF16_DIFFERENCE = 1.8e-2  # what a bf16 cache costs; a turned expert costs far more


class DoubleTorch:
    """The torch module, but its float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def float64(model):
    """Within the block `model` computes in float64, the casts to float32 in its source included."""
    modeling_deepseek_v3.torch = DoubleTorch()
    try:
        yield model.double()
    finally:
        modeling_deepseek_v3.torch = torch
        model.float()


class Bf16Cache(DynamicCache):
    """A cache whose latent and rope part are rounded to bf16 as they are written."""

    def update(self, latent, k_pe, layer):
        rounded = [part.to(torch.bfloat16).to(part.dtype) for part in (latent, k_pe)]
        return super().update(*rounded, layer)


def load(folder):
    """The float32 reference with plain attention and experts; every tensor on disk must find its place."""
    values = json.loads((folder / "config.json").read_text())
    vision = values["vision_config"]
    values["vision_config"] = {
        "model_type": "kimi_k25_vision",
        "hidden_size": vision["vt_hidden_size"],
        "intermediate_size": vision["vt_intermediate_size"],
        "num_hidden_layers": vision["vt_num_hidden_layers"],
        "num_attention_heads": vision["vt_num_attention_heads"],
        "patch_size": vision["patch_size"],
        "pos_emb_height": vision["init_pos_emb_height"],
        "pos_emb_width": vision["init_pos_emb_width"],
        "pos_emb_time": vision["init_pos_emb_time"],
    }
    values |= {
        "projection_hidden_size": vision["mm_hidden_size"],
        "image_token_id": values["media_placeholder_token_id"],
        "video_token_id": values["text_config"]["vocab_size"],
    }
    model, report = Kimi_K25ForConditionalGeneration.from_pretrained(
        folder,
        config=Kimi_K25Config.from_dict(values),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    if any(report.values()):
        raise RuntimeError(f"{folder}: transformers could not place every tensor: {report}")
    return model.eval()


@torch.no_grad()
def forward(model, token_ids, cache):
    """Logits [T, V] of the tokens that follow what is in the cache."""
    positions = cache.get_seq_length() + torch.arange(len(token_ids))[None]
    ids = torch.tensor(token_ids)[None]
    output = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return output.logits[0].numpy()


def run(model, prompt, long_prompt):
    """Logits of both prompts, greedy continuation of the first one and its logits token by token."""
    cache = DynamicCache()
    prompt_logits = forward(model, prompt, cache)
    tokens, rows = [int(prompt_logits[-1].argmax())], []
    while len(rows) < NEW_TOKENS - 1:
        rows.append(forward(model, tokens[-1:], cache)[0])
        tokens.append(int(rows[-1].argmax()))
    long_logits = forward(model, long_prompt, DynamicCache())[list(LONG_ROWS)]
    return {
        "prompt_logits": prompt_logits,
        "greedy_tokens": np.array(tokens),
        "decode_logits": np.stack(rows),
        "long_logits": long_logits,
    }


def replay(model, prompt, tokens, cache):
    """Logits of the prompt and of `tokens` but the last, in one pass."""
    logits = forward(model, prompt + tokens.tolist()[:-1], cache)
    return {"prompt_logits": logits[: len(prompt)], "decode_logits": logits[len(prompt) :]}


@contextlib.contextmanager
def router_margins(model):
    """A list that receives, for every call of a router, its smallest margin between in and out."""
    margins = []

    def record(router, arguments, result):
        choice = result[0].sigmoid() + router.e_score_correction_bias
        best = choice.topk(router.top_k + 1, dim=-1).values
        margins.append((best[:, -2] - best[:, -1]).min().item())

    routers = [m for m in model.modules() if isinstance(m, modeling_deepseek_v3.DeepseekV3TopkRouter)]
    hooks = [router.register_forward_hook(record) for router in routers]
    yield margins
    for hook in hooks:
        hook.remove()


def greedy_margin(result):
    """The smallest lead of a greedy token, in standard deviations of the logits."""
    rows = np.concatenate([result["prompt_logits"][-1:], result["decode_logits"]])
    best = np.sort(rows, axis=1)[:, -2:]
    return float((best[:, 1] - best[:, 0]).min() / rows.std())


def difference(a, b):
    """The largest difference of any logits of run or replay `a` from those of run `b`, in standard deviations."""
    return float(max(np.abs(a[name] - b[name]).max() / b[name].std() for name in LOGITS if name in a))


def measure(seed):
    """(arrays for text.npz, facts for text.json) of one seed."""
    checkpoint = CHECKPOINT | {"seed": seed}
    with tempfile.TemporaryDirectory() as parent:
        folder = make_tiny(Path(parent) / "checkpoint", **checkpoint)
        digest, model = hash_tensors(folder), load(folder)
    random, ordinary = np.random.RandomState(seed), model.config.bos_token_id  # the first special id
    prompt = random.randint(0, ordinary, PROMPT_TOKENS).tolist()
    long_prompt = random.randint(0, ordinary, LONG_TOKENS).tolist()
    single = run(model, prompt, long_prompt)
    with float64(model):
        with router_margins(model) as margins:
            double = run(model, prompt, long_prompt)
        tokens = double["greedy_tokens"]
        again = replay(model, prompt, tokens, DynamicCache())
        rounded = replay(model, prompt, tokens, Bf16Cache())
    facts = {
        "checkpoint": checkpoint,
        "sha256": digest,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "float32_difference": difference(single, double),
        "replay_difference": difference(again, double),
        "bf16_cache_difference": difference(rounded, double),
        "greedy_margin": greedy_margin(double),
        "router_margin": min(margins),
        "greedy_equal_in_float32": bool((single["greedy_tokens"] == tokens).all()),
        "greedy_without_media": model.config.image_token_id not in tokens,
    }
    integers = {"prompt": prompt, "long_prompt": long_prompt, "long_rows": LONG_ROWS, "greedy_tokens": tokens}
    arrays = {name: np.array(values, np.int32) for name, values in integers.items()}
    arrays |= {name: double[name].astype(np.float32) for name in LOGITS}
    return arrays, facts


def usable(facts):
    """Whether rounding errors leave the chosen tokens and experts as they are."""
    return (
        facts["greedy_margin"] > MIN_GREEDY_MARGIN
        and facts["router_margin"] > MIN_ROUTER_MARGIN
        and facts["bf16_cache_difference"] < MAX_BF16_DIFFERENCE
        and facts["greedy_equal_in_float32"]
        and facts["greedy_without_media"]
    )


def main():
    for seed in itertools.count():
        arrays, facts = measure(seed)
        if usable(facts):
            break
    np.savez(HERE / "text.npz", **arrays)
    (HERE / "text.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
