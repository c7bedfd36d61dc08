"""transformers' vision tower and projector on the CPU, with the tensors of a case."""

from types import SimpleNamespace

import torch
from kimi_native import ops
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25MultimodalProjection, Kimi_K25VisionModel

from bench.torch_ops import bf16

DTYPES = {"transformers f32": torch.float32, "transformers bf16": torch.bfloat16}
NAMES = {  # theirs for what the checkpoint names
    "vision_tower.": "tower.",
    "pos_emb.weight": "pos_emb.position_embeddings",
    "encoder.blocks": "layers",
    "encoder.final": "final",
    ".norm1": ".norm2",
    ".norm0": ".norm1",
    ".fc1": ".fc2",
    ".fc0": ".fc1",
    ".wo.": ".attn.proj.",
    "mm_projector.": "projector.",
    "proj.0": "in_proj",
    "proj.2": "out_proj",
}


def encoder(name: str, config, tensors, patches, grid):
    """A function that returns the features of an item, float32 [tokens, text_hidden_size]. name: one of DTYPES."""
    torch.set_num_threads(ops.num_threads())
    c, dtype = config, DTYPES[name]
    vision = Kimi_K25VisionConfig(
        num_hidden_layers=c.vt_num_hidden_layers
    )  # its other defaults are the published sizes
    whole = SimpleNamespace(
        vision_config=vision,
        projection_hidden_size=c.mm_hidden_size,
        projection_layer_norm_eps=c.projector_ln_eps,
        text_config=SimpleNamespace(hidden_size=c.text_hidden_size),
    )
    model = torch.nn.Module()
    model.tower, model.projector = Kimi_K25VisionModel._from_config(vision), Kimi_K25MultimodalProjection(whole)
    model.load_state_dict(dict(_renamed(tensors, c.vt_num_attention_heads)))
    for parameter in model.parameters():  # the tables of angles stay float32
        parameter.data = parameter.data.to(dtype)
    grids = torch.tensor([grid])

    def encode():
        pixels = torch.from_numpy(patches).view(-1, 3, c.patch_size, c.patch_size).to(torch.float32).div(127.5).sub(1)
        pooled = model.tower(pixels.to(dtype), grid_thw=grids).pooler_output
        return model.projector(pooled)[:, 0].float().numpy()

    return encode


def _renamed(tensors, heads: int):
    for name, array in tensors.items():
        tensor = bf16(array).float()
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if ".wqkv." not in name:
            yield name, tensor
            continue
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            if part != "v":  # theirs has the first of all rotated pairs, then the second
                rows = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            yield name.replace(".wqkv.", f".attn.{part}_proj."), rows
