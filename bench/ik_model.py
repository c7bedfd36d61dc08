"""A GGUF file in ik_llama.cpp, through the wheel's own ctypes: repacked at load, flash attention, mla 3."""

import numpy as np
from ik_llama_cpp import _ctypes_api as api
from kimi_native import ops

from bench.quiet import silence

BATCH = 512


class IkModel:
    """One sequence through the model of the file."""

    def __init__(self, file, max_tokens: int):
        with silence():
            self._load(str(file), max_tokens)
        self._length = 0
        self._batch = api.llama_batch_init(BATCH, 0, 1)

    def _load(self, file: str, max_tokens: int) -> None:
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.mla, params.flash_attn, params.use_mmap, params.repack_tensors = 3, True, False, True
        self._model = api.llama_model_load_from_file(file.encode(), params)
        if not self._model:
            raise RuntimeError(f"{file}: ik_llama.cpp cannot load it")
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max_tokens, BATCH, BATCH
        params.n_threads = params.n_threads_batch = ops.num_threads()
        params.flash_attn, params.mla_attn = True, 3
        self._context = api.llama_init_from_model(self._model, params)

    def clear(self) -> None:
        api.llama_kv_cache_clear(self._context)
        self._length = 0

    def forward(self, token_ids) -> np.ndarray:
        """Logits [V] of the last token. At most BATCH tokens."""
        batch, batch.n_tokens = self._batch, len(token_ids)
        for i, token in enumerate(token_ids):
            batch.token[i], batch.pos[i] = token, self._length + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == len(token_ids) - 1
        status = api.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode: status {status}"
        self._length += len(token_ids)
        logits = api.llama_get_logits_ith(self._context, len(token_ids) - 1)
        return np.ctypeslib.as_array(logits, (self._vocab_size,)).copy()
