"""A GGUF file in ik_llama.cpp and in llama.cpp, through the ctypes of their packages: experts repacked at load, flash
attention.
"""

from importlib import import_module

import numpy as np
from kimi_native import ops

from bench.quiet import silence

BATCH = 512


class GgufModel:
    """One sequence through the model of the file."""

    def __init__(self, file, max_tokens: int):
        self._api = import_module(self.api)
        with silence():
            self._load(str(file), max_tokens)
        self._length = 0
        self._batch = self._api.llama_batch_init(BATCH, 0, 1)

    def _load(self, file: str, max_tokens: int) -> None:
        api = self._api
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.use_mmap = False
        _set(params, self.model_options)
        self._model = api.llama_model_load_from_file(file.encode(), params)
        if not self._model:
            raise RuntimeError(f"{file}: {self.engine} cannot load it")
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max_tokens, BATCH, BATCH
        params.n_threads = params.n_threads_batch = ops.num_threads()
        _set(params, self.context_options)
        self._context = api.llama_init_from_model(self._model, params)

    def clear(self) -> None:
        self._clear()
        self._length = 0

    def forward(self, token_ids) -> np.ndarray:
        """Logits [V] of the last token. At most BATCH tokens."""
        batch, batch.n_tokens = self._batch, len(token_ids)
        for i, token in enumerate(token_ids):
            batch.token[i], batch.pos[i] = token, self._length + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == len(token_ids) - 1
        status = self._api.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode: status {status}"
        self._length += len(token_ids)
        logits = self._api.llama_get_logits_ith(self._context, len(token_ids) - 1)
        return np.ctypeslib.as_array(logits, (self._vocab_size,)).copy()


class IkModel(GgufModel):
    engine, api = "ik_llama.cpp", "ik_llama_cpp._ctypes_api"
    model_options = {"mla": 3, "flash_attn": True, "repack_tensors": True}
    context_options = {"flash_attn": True, "mla_attn": 3}

    def _clear(self) -> None:
        self._api.llama_kv_cache_clear(self._context)


class LlamaModel(GgufModel):
    engine, api = "llama.cpp", "llama_cpp.llama_cpp"
    model_options = {"use_extra_bufts": True}  # of the kind that repacks
    context_options = {"flash_attn_type": 1}

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)


MODELS = {kind.engine: kind for kind in (IkModel, LlamaModel)}


def _set(params, options: dict) -> None:
    names = {name for name, _ in params._fields_}
    for name, value in options.items():
        assert name in names, f"{type(params).__name__} has no {name}"
        setattr(params, name, value)
