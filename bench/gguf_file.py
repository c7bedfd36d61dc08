"""A checkpoint with INT4 experts as a GGUF file for llama.cpp and its relatives: the same weights, experts in Q4_0
(exact), other matrices in Q8_0, the rest in float32. There is no tokenizer in it, only a size.

kv_b_proj is split, as llama.cpp's own converter does it, so that attention reads the latent cache. From a whole one
llama.cpp makes keys and values of each head, which is faster in prefill and slower over a long context.
"""

import numpy as np
from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from kimi_native.checkpoint import Checkpoint
from kimi_native.config import Config

from bench.ggml import q4_0

NAMES = {  # within a layer, ours: theirs
    "input_layernorm": "attn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def write(folder, file) -> None:
    """folder: of a checkpoint without YaRN."""
    c, checkpoint = Config.from_folder(folder).text_config, Checkpoint(folder)
    assert c.rope_scaling is None
    writer = GGUFWriter(file, "deepseek2")
    _add_metadata(writer, c)

    def add(theirs: str, values, kind=None) -> None:
        values = np.ascontiguousarray(values, np.float32)
        if kind is None:
            kind = GGMLQuantizationType.Q8_0 if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(theirs, quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", checkpoint["model.embed_tokens.weight"])
    add("output_norm.weight", checkpoint["model.norm.weight"])
    add("output.weight", checkpoint["lm_head.weight"])
    for layer in range(c.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for name, other in NAMES.items():
            if f"{ours}{name}.weight" in checkpoint:
                kind = GGMLQuantizationType.F32 if name == "mlp.gate" else None
                add(f"{theirs}{other}.weight", checkpoint[f"{ours}{name}.weight"], kind)
        k, v = _split(checkpoint[f"{ours}self_attn.kv_b_proj.weight"], c)
        add(f"{theirs}attn_k_b.weight", k)
        add(f"{theirs}attn_v_b.weight", v)
        if layer < c.first_k_dense_replace:
            continue
        bias = f"{ours}mlp.gate.e_score_correction_bias"
        add(f"{theirs}exp_probs_b.bias", checkpoint[bias])
        for name in ("gate", "up", "down"):
            experts = (f"{ours}mlp.experts.{e}.{name}_proj." for e in range(c.n_routed_experts))
            blocks = np.stack([q4_0(checkpoint[f"{e}weight_packed"], checkpoint[f"{e}weight_scale"]) for e in experts])
            rows = blocks.reshape(*blocks.shape[:2], -1)  # [E, out, bytes]
            writer.add_tensor(f"{theirs}ffn_{name}_exps.weight", rows, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _split(kv_b_proj, c):
    """(W_UK [N, C, Dn], W_UV [N, Dv, C])"""
    heads = kv_b_proj.reshape(c.num_attention_heads, -1, c.kv_lora_rank)
    return heads[:, : c.qk_nope_head_dim].transpose(0, 2, 1), heads[:, c.qk_nope_head_dim :]


def _add_metadata(writer, c) -> None:
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_leading_dense_block_count(c.first_k_dense_replace)
    writer.add_vocab_size(c.vocab_size)
    writer.add_q_lora_rank(c.q_lora_rank)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    writer.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.qk_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_tokenizer_model("no_vocab")
