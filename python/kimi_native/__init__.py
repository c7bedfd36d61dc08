"""Kimi K2.5 on your own machine: the published checkpoint as it lies on disk, NumPy arrays, C++ kernels."""

from kimi_native.cache import Cache
from kimi_native.chat import parse_reply
from kimi_native.config import Config
from kimi_native.generate import generate, generate_tokens, stream
from kimi_native.model import Model
from kimi_native.sampling import SamplingParams
from kimi_native.tokenizer import Tokenizer

load = Model.load

__all__ = [
    "Cache",
    "Config",
    "Model",
    "SamplingParams",
    "Tokenizer",
    "generate",
    "generate_tokens",
    "load",
    "parse_reply",
    "stream",
]
