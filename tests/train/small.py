"""A model that trains in seconds, and runs of it."""

import json
import shutil

import numpy as np
from kimi_native.config import Config
from kimi_native.make_tiny import make_tiny
from kimi_native.tiny_config import preset_config
from kimi_native.train.data import Mixture
from kimi_native.train.encode import Encoder
from kimi_native.train.trainer import Trainer, TrainingConfig

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
VISION = {"mm_hidden_size": 16, "vt_hidden_size": 16, "vt_intermediate_size": 32, "vt_num_hidden_layers": 1}
VISION |= {"vt_num_attention_heads": 2, "text_hidden_size": 32}


def small_folder(folder, vision=False):
    """config.json and tokenizer of the small model, no weights."""
    preset = "tiny" if vision else "tiny-k2"
    tiny = make_tiny(folder.with_name("tiny"), preset)
    values = preset_config(preset)
    values.get("text_config", values).update(TEXT)
    if vision:
        values["vision_config"].update(VISION)
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_tokens(file):
    """Text of 40 tokens that a model of bigrams knows: each follows from the one before with a slip in ten."""
    rng = np.random.default_rng(1)
    successor = rng.permutation(40)
    tokens = [0]
    for slip in rng.random(3000) < 0.1:
        tokens.append(int(rng.integers(40) if slip else successor[tokens[-1]]))
    np.save(file, np.array(tokens, np.int16))
    return file


def trainer(folder, model, files, params=None, export=False, data=None, **options):
    """A Trainer in `folder` for the model of `small_folder` on these files."""
    options = {"steps": 8, "lr": 1e-2, "warmup_steps": 2, "eval_every": 3, "save_every": 3, **options}
    config = Config.from_folder(model)
    files = [(file, 1.0) for file in files]
    data = {"seq_len": 12, "batch_tokens": 48, "validation_batches": 2, **(data or {})}
    dataset = Mixture(files, Encoder(model, config), **data)
    return Trainer(config, TrainingConfig(**options), dataset, folder, params, source=model if export else None)
