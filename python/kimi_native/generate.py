"""Generation for one sequence: token ids, text, streaming, stops."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kimi_native import chat
from kimi_native.cache import Cache
from kimi_native.chat_media import media_parts, read_media
from kimi_native.media import MediaItem
from kimi_native.model import Model
from kimi_native.sampling import Sampler, SamplingParams
from kimi_native.splice import cache_keys, find_spans

STOP_TOKENS = ("<|im_end|>", "[EOS]", "[EOT]")


@dataclass
class Stats:
    """What a generation took. Seconds are wall time; the cached part of the prompt is not computed again. The prefill
    includes encoding images and video.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0  # tokens drawn after the first, which comes out of the prefill
    decode_bytes: int = 0  # weights and cache read while decoding
    finish_reason: str = ""  # "stop" or "length"

    def summary(self) -> str:
        """One line: tokens, tokens/s of each phase, GB/s of decoding."""
        computed = self.prompt_tokens - self.cached_tokens
        text = f"prompt {self.prompt_tokens} tokens"
        if self.cached_tokens:
            text += f" ({self.cached_tokens} cached)"
        text += f", {_rate(computed, self.prefill_seconds)} tokens/s | output {self.output_tokens} tokens, "
        text += f"{_rate(self.decode_steps, self.decode_seconds)} tokens/s, "
        return text + f"{_rate(self.decode_bytes / 1e9, self.decode_seconds)} GB/s"


def _rate(amount: float, seconds: float) -> str:
    return f"{amount / seconds:.2f}" if seconds > 0 else "-"


def check_limits(max_new_tokens: int, stop: Iterable[str] = ()) -> None:
    """Raises ValueError for a length below 1 or an empty stop string."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if not all(stop):
        raise ValueError("stop holds an empty string, expected non-empty strings")


def stop_ids(model: Model) -> set[int]:
    """Ids that end a reply: the config's eos and the tokenizer's end-of-turn tokens."""
    special = model.tokenizer.special_tokens if model.tokenizer else {}
    return {model.config.eos_token_id} | {special[name] for name in STOP_TOKENS if name in special}


def prefill(model: Model, token_ids, cache: Cache, progress=None, media=None, media_progress=None):
    """Bring the cache to hold token_ids, using what it already has of them, of each of the media all or nothing.

    progress, media and media_progress as in Model.forward; media that the cache has are not encoded. Returns the last
    token's logits, float32 [1, V], and how many tokens the cache had.
    """
    token_ids = list(token_ids)
    if not token_ids:
        raise ValueError("the prompt has no tokens, expected at least one")
    spans = [] if media is None else find_spans(token_ids, model.config.media_placeholder_token_id, media)
    shared = 0
    for ours, theirs in zip(cache.token_ids, cache_keys(token_ids, spans)[:-1], strict=False):
        if ours != theirs:
            break
        shared += 1
    shared = min([shared, *(span.start for span in spans if span.stop > shared)])
    if len(token_ids) > cache.max_tokens:
        raise ValueError(
            f"the prompt has {len(token_ids)} tokens, expected at most the cache's max_tokens = {cache.max_tokens}"
        )
    cache.truncate(shared)
    new = None if media is None else [span.item for span in spans if span.start >= shared]
    options = {"progress": progress, "media": new, "media_progress": media_progress}
    return model.forward(token_ids[shared:], cache, last_only=True, **options), shared


def iter_tokens(
    model: Model,
    token_ids,
    max_new_tokens: int = 256,
    *,
    cache: Cache | None = None,
    ignore_eos: bool = False,
    stats: Stats | None = None,
    progress: Callable[[int, int], None] | None = None,
    media: Sequence | None = None,
    media_progress: Callable[[list[MediaItem], int, int], None] | None = None,
    **sampling,
) -> Iterator[int]:
    """Yield new token ids as they are drawn; a stop id ends the sequence and is not yielded.

    cache: continued if given; the part of token_ids that it already holds is not computed again. sampling: fields of
    SamplingParams. stats is set anew and filled in as generation goes on. progress(done, total) follows the prompt.
    media, media_progress: as in Model.forward, for the placeholders of the whole prompt.
    Raises ValueError for an empty prompt, an id out of range, media that do not fit the placeholders, or a prompt that
    leaves no room in context or cache, RuntimeError if the GPU has no room for a cache of prompt and reply.
    """
    check_limits(max_new_tokens)
    params = SamplingParams(**sampling)
    token_ids, stats = list(token_ids), stats or Stats()
    if cache is None:
        context = model.config.text_config.max_position_embeddings
        if len(token_ids) > context:
            raise ValueError(f"the prompt has {len(token_ids)} tokens, expected at most the context of {context}")
        cache = model.new_cache(min(context, max(1, len(token_ids) + max_new_tokens)))
    started = time.perf_counter()
    vars(stats).update(vars(Stats(prompt_tokens=len(token_ids))))
    logits, stats.cached_tokens = prefill(model, token_ids, cache, progress, media, media_progress)
    stats.prefill_seconds = time.perf_counter() - started
    yield from _decode(model, logits, cache, max_new_tokens, ignore_eos, stats, Sampler(params, token_ids))


def _decode(model, logits, cache, max_new_tokens, ignore_eos, stats, sampler) -> Iterator[int]:
    stops = set() if ignore_eos else stop_ids(model)
    token = sampler.next(logits)
    while token not in stops:
        stats.output_tokens += 1
        yield token
        if stats.output_tokens == max_new_tokens or len(cache) == cache.max_tokens:
            stats.finish_reason = "length"
            return
        started = time.perf_counter()
        token = sampler.next(model.forward([token], cache, last_only=True))
        stats.decode_seconds += time.perf_counter() - started
        stats.decode_steps += 1
        stats.decode_bytes += model.bytes_per_token + len(cache) * cache.pool.bytes_per_token
    stats.finish_reason = "stop"


def generate_tokens(model: Model, token_ids, max_new_tokens: int = 256, **options) -> list[int]:
    """New token ids for a prompt of token ids. Options as in iter_tokens."""
    return list(iter_tokens(model, token_ids, max_new_tokens, **options))


class Prompt(NamedTuple):
    """Token ids, and the media whose placeholders stand among them, in order."""

    token_ids: list[int]
    media: list[MediaItem]


def encode_prompt(
    model: Model,
    prompt,
    *,
    raw: bool = False,
    tools=None,
    thinking: bool = True,
    images: Sequence = (),
    videos: Sequence = (),
    local_files: bool = True,
    **template,
) -> Prompt:
    """A prompt for the model: a str is one user message (with raw=True plain text to continue), a list is messages.

    images, videos: what precedes the text of a str, each as in chat_media.read_media; messages hold them as parts.
    local_files: False for messages that come from elsewhere: media must then be data URLs, no path is opened.
    template: further options of chat.encode. Raises ValueError without a tokenizer, for a malformed message, or for
    media where the model takes none; MediaError for media that cannot be read.
    """
    if model.tokenizer is None:
        raise ValueError("the checkpoint has no tiktoken.model; use generate_tokens with token ids")
    parts = _parts("image", images) + _parts("video", videos)
    if parts and (raw or not isinstance(prompt, str)):
        raise ValueError("images and videos go with a prompt that is one message; messages hold theirs as parts")
    if raw:
        return Prompt(model.tokenizer.encode(prompt), [])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}] if parts else prompt}]
    messages, media = chat.check_messages(prompt), []
    if any(media_parts(messages)):
        model.check_vision()
        media = read_media(messages, model.media_processor, local_files)
    options = {"thinking": thinking, "template": model.chat_template, "media": media, **template}
    return Prompt(chat.encode(model.tokenizer, messages, tools, **options), [item for items in media for item in items])


def _parts(kind: str, sources: Sequence) -> list[dict]:
    if not isinstance(sources, list | tuple):
        raise ValueError(f"{kind}s is {type(sources).__name__}, expected a list")
    return [{"type": kind, kind: source} for source in sources]


def stream(
    model: Model,
    prompt,
    max_new_tokens: int = 256,
    *,
    stop: Iterable[str] = (),
    raw: bool = False,
    tools=None,
    thinking: bool = True,
    images: Sequence = (),
    videos: Sequence = (),
    **options,
) -> Iterator[str]:
    """Yield the reply's text in pieces that never split a character; together they are generate()'s result.

    prompt: a user message, or a list of messages in OpenAI's form; with raw=True text to continue as it is.
    tools: function declarations in OpenAI's form. thinking: False asks for an answer without reasoning.
    images, videos: lists of paths, bytes, data URLs, Pillow images or arrays that precede the text of a prompt that is
    one message. Within messages they are parts: {"type": "image", "image": path}, {"type": "image_url", "image_url":
    {"url": "data:image/png;base64,..."}}, and "video" and "video_url" likewise.
    stop: strings that end the reply and are not part of it. options: as in iter_tokens.
    """
    media = {"images": images, "videos": videos}
    prompt = encode_prompt(model, prompt, raw=raw, tools=tools, thinking=thinking, **media)
    return stream_ids(model, prompt.token_ids, max_new_tokens, stop=stop, media=prompt.media, **options)


def stream_ids(model: Model, token_ids, max_new_tokens: int = 256, *, stop: Iterable[str] = (), **options):
    """stream() for a prompt of token ids."""
    stop = [stop] if isinstance(stop, str) else list(stop)
    check_limits(max_new_tokens, stop)
    options["stats"] = stats = options.get("stats") or Stats()
    decoder, held = model.tokenizer.stream(), ""
    for token in iter_tokens(model, token_ids, max_new_tokens, **options):
        held += decoder.push(token)
        found = min((at for at in map(held.find, stop) if at >= 0), default=-1)
        if found >= 0:
            stats.finish_reason = "stop"
            if found:
                yield held[:found]
            return
        ready = len(held) - _possible_start(held, stop)
        if ready:
            yield held[:ready]
            held = held[ready:]
    held += decoder.flush()
    if held:
        yield held


def _possible_start(text: str, stop: list[str]) -> int:
    """Length of the longest end of `text` that may become a stop string."""
    longest = max((len(s) for s in stop), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0


def generate(model: Model, prompt, max_new_tokens: int = 256, **options) -> str:
    """The reply to a prompt as text, reasoning included; chat.parse_reply splits it. Arguments as in stream()."""
    return "".join(stream(model, prompt, max_new_tokens, **options))
