"""Messages to prompt and reply to message, in Kimi K2.5's chat format.

Messages and tools have the form of OpenAI's chat API, with `reasoning_content` on the assistant's messages.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kimi_native.chat_media import expand, without_source
from kimi_native.media import MediaItem
from kimi_native.tool_schema import to_typescript

DEFAULT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")

Object = Mapping[str, Any]


class SpecialTokenizer(Protocol):
    """What `encode` needs of `kimi_native.tokenizer.Tokenizer`."""

    special_tokens: dict[str, int]

    def encode(self, text: str, special: bool = False) -> list[int]: ...

    def split_special(self, text: str) -> list[str | int]: ...


def render(
    messages: Sequence[Object],
    tools: Sequence[Object] | None = None,
    *,
    thinking: bool = True,
    add_generation_prompt: bool = True,
    preserve_thinking: bool = False,
    template: str | None = None,
) -> str:
    """The prompt as text.

    `thinking=False` asks for an answer without reasoning. `add_generation_prompt` opens the assistant's turn.
    The reasoning of messages up to the last answer without tool calls is dropped unless `preserve_thinking`.
    `template` is the text of a checkpoint's chat_template.jinja, None for ours. A null key of a message is an
    absent one. Raises ValueError for a malformed message or template and for what the template rejects.
    """
    template = DEFAULT_TEMPLATE if template is None else template
    variables = _inputs(messages, tools) | _options(thinking, add_generation_prompt, preserve_thinking)
    return _run(template, variables)


def encode(
    tokenizer: SpecialTokenizer,
    messages: Sequence[Object],
    tools: Sequence[Object] | None = None,
    *,
    thinking: bool = True,
    add_generation_prompt: bool = True,
    preserve_thinking: bool = False,
    template: str | None = None,
    safe: bool = True,
    media: Sequence[Sequence[MediaItem]] | None = None,
) -> list[int]:
    """The prompt of `render` as token ids.

    media: the items of each image and video of the messages, as `chat_media.read_media` returns them: placeholders are
    then repeated for each of their tokens. None leaves the prompt as the template writes it.
    In safe mode the name of a special token counts only where the template itself wrote its first and last
    character. Within messages and tools it is plain text, and a role with such a character is a ValueError.
    Otherwise every name becomes its id, whoever wrote it, as in the published tokenizer. The same holds for the
    places of media. Raises ValueError as `render` does, and unless the prompt has a place for each of the media.
    """
    template = DEFAULT_TEMPLATE if template is None else template
    inputs = _inputs(messages, tools)
    options = _options(thinking, add_generation_prompt, preserve_thinking)
    if not safe:
        prompt = _run(template, inputs | options)
        return tokenizer.encode(prompt if media is None else expand(prompt, media), special=True)
    mark = _unused_character(inputs, template)
    prompt = _run(template, _marked(inputs, mark, _ends(tokenizer)) | options)
    if media is not None:  # here the marks still tell the template's places from the caller's text
        prompt = expand(prompt, media)
    ids: list[int] = []
    for piece in tokenizer.split_special(prompt):
        ids += [piece] if isinstance(piece, int) else tokenizer.encode(_unmarked(piece, mark))
    return ids


def _options(thinking: bool, add_generation_prompt: bool, preserve_thinking: bool) -> dict[str, bool]:
    return {
        "thinking": thinking,
        "enable_thinking": thinking,
        "add_generation_prompt": add_generation_prompt,
        "preserve_thinking": preserve_thinking,
    }


def _inputs(messages: Sequence[Object], tools: Sequence[Object] | None) -> dict[str, Any]:
    """The variables of the template that hold strings of the caller."""
    for i, tool in enumerate(tools or []):
        _expect(isinstance(tool, Mapping), f"tools[{i}]", tool, "an object")
    checked = [_for_template(message) for message in check_messages(messages)]
    tools = _sorted_keys(tools)
    return {"messages": checked, "tools": tools, "tools_ts_str": _typescript(tools) if tools else None}


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list | tuple):
        message["content"] = [without_source(part) for part in content]
    return message


def _typescript(tools: Sequence[Object]) -> str | None:
    try:
        return to_typescript(tools)
    except Exception:  # whatever is wrong with a schema, the template falls back to JSON
        return None


def _sorted_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted_keys(value[key]) for key in sorted(value)}
    return [_sorted_keys(item) for item in value] if isinstance(value, list | tuple) else value


# Checks


def _expect(condition: bool, where: str, found: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{where} is {found!r:.80}, expected {expected}")


def check_messages(messages: Sequence[Object]) -> list[dict[str, Any]]:
    """Copies of the messages without null keys, except a null content. Raises ValueError for a malformed one."""
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked_message(message: Any, where: str) -> dict[str, Any]:
    """`message` without its null keys, except a null content."""
    _expect(isinstance(message, Mapping), where, message, "an object")
    checked = {key: value for key, value in message.items() if value is not None or key == "content"}
    role = checked.get("role")
    _expect(isinstance(role, str) and role != "", f"{where}.role", role, "a non-empty string")
    _check_content(checked.get("content"), f"{where}.content")
    if role == "tool":
        _check_string(checked, "tool_call_id", where)
    for key in checked.keys() & {"name", "reasoning_content"}:
        _check_string(checked, key, where)
    _check_tool_calls(checked.get("tool_calls", []), f"{where}.tool_calls")
    return checked


def _check_string(found: Object, key: str, where: str) -> None:
    _expect(isinstance(found.get(key), str), f"{where}.{key}", found.get(key), "a string")


def _check_content(content: Any, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    _expect(isinstance(content, list | tuple), where, content, "a string, a list of parts or null")
    for i, part in enumerate(content):
        _expect(isinstance(part, Mapping), f"{where}[{i}]", part, "an object")
        _check_string(part, "type", f"{where}[{i}]")
        if part["type"] == "text":
            _check_string(part, "text", f"{where}[{i}]")


def _check_tool_calls(calls: Any, where: str) -> None:
    _expect(isinstance(calls, list | tuple), where, calls, "a list")
    for i, call in enumerate(calls):
        _expect(isinstance(call, Mapping), f"{where}[{i}]", call, "an object")
        _check_string(call, "id", f"{where}[{i}]")
        function = call.get("function")
        is_function = isinstance(function, Mapping) and "arguments" in function
        _expect(is_function, f"{where}[{i}].function", function, "an object with arguments")


# Templates


def _run(template: str, variables: dict[str, Any]) -> str:
    try:
        return _compile(template).render(variables)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"chat template: {error}") from error


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """In the environment that published templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


# Safe mode: marks on both sides of every `<`, `>`, `[` and `]` of the caller keep it from being read as an
# end of a special token's name, also where two strings join. They are removed before the text is encoded.


def _ends(tokenizer: SpecialTokenizer) -> str:
    """The first and last characters of special tokens. Word characters would put marks into the keys."""
    ends = "".join(sorted({end for name in tokenizer.special_tokens for end in (name[0], name[-1])}))
    _expect(not re.search(r"\w", ends), "tokenizer: the ends of special tokens", ends, "no word character")
    return ends


def _marked(inputs: dict[str, Any], mark: str, ends: str) -> dict[str, Any]:
    end = re.compile(f"[{re.escape(ends)}]")
    for i, message in enumerate(inputs["messages"]):
        _expect(not end.search(message["role"]), f"messages[{i}].role", message["role"], f"none of {ends}")
    return _map_strings(inputs, lambda text: end.sub(rf"{mark}\g<0>{mark}", text))


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    return [_map_strings(item, change) for item in value] if isinstance(value, list | tuple) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _unused_character(inputs: Object, template: str) -> str:
    """A character that neither the caller nor the template uses, nor its JSON escape."""
    text = "\n".join([template, *_strings(inputs)])
    return next(c for c in map(chr, range(0xE000, 0x110000)) if c not in text and _escape(c) not in text)


def _escape(character: str) -> str:
    return json.dumps(character)[1:-1]


def _unmarked(text: str, mark: str) -> str:
    return text.replace(mark, "").replace(_escape(mark), "")


# Reply to message

Field = Literal["reasoning_content", "content"]


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of one field of the reply."""

    kind: Field
    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`id` as the model wrote it (`functions.NAME:INDEX`); `arguments` is JSON text, not validated."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Reply:
    """A parsed reply."""

    reasoning_content: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, event: Delta | ToolCall) -> None:
        """Appends an event of `ReplyParser`."""
        if isinstance(event, ToolCall):
            self.tool_calls.append(event)
        else:
            setattr(self, event.kind, getattr(self, event.kind) + event.text)

    def to_message(self) -> dict[str, Any]:
        """The assistant's message for the next turn's history, without empty reasoning and tool calls."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.tool_calls
            ]
        return message


def parse_reply(text: str, *, thinking: bool = True) -> Reply:
    """Splits the text that the model wrote, without its stop token; see `ReplyParser`."""
    parser, reply = ReplyParser(thinking=thinking), Reply()
    for event in [*parser.push(text), *parser.finish()]:
        reply.add(event)
    return reply


_THINK_END = "</think>"
_SECTION_BEGIN = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
_SECTION_END = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
_CALL_BEGIN = "<|tool_call_begin|>"
_ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"
_CALL_END = "<|tool_call_end|>"

# State -> the markers that end it. Every marker starts with the only `<` that it has.
_MARKERS = {
    "reasoning": (_THINK_END, *_SECTION_BEGIN),
    "draft": (_THINK_END,),
    "content": (_THINK_END, *_SECTION_BEGIN),
    "section": (_CALL_BEGIN, *_SECTION_END),
    "header": (_ARGUMENT_BEGIN, _CALL_BEGIN, _CALL_END, *_SECTION_END),
    "arguments": (_CALL_BEGIN, _CALL_END, *_SECTION_END),
    "done": (),
}
_CALL_ID = re.compile(r"[\w.\-]+:\d+")


class ReplyParser:
    """Parses a reply that arrives in pieces; how it is cut does not change the result.

    The reply starts inside the reasoning if `thinking`, else with content. `</think>` ends the reasoning and
    trailing whitespace goes; a later `</think>` is dropped from the content. A tool section that opens inside
    the reasoning is held back: it was a draft if `</think>` follows, else it ended the reasoning and `finish`
    parses it. What follows the section is dropped. An unclosed section or call counts as closed, and a call
    whose id is not NAME:INDEX is dropped.
    """

    def __init__(self, *, thinking: bool = True):
        self._state = "reasoning" if thinking else "content"
        self._tail = ""  # may be the beginning of a marker
        self._held = ""  # whitespace after the reasoning, a draft, or the header or arguments of a call
        self._call_id = ""

    def push(self, piece: str) -> list[Delta | ToolCall]:
        """The events that `piece` completes."""
        self._tail += piece
        events: list[Delta | ToolCall] = []
        while marker := self._next_marker():
            text, _, self._tail = self._tail.partition(marker)
            events += self._on_text(text)
            events += self._on_marker(marker)
        text, self._tail = self._split_tail()
        return events + self._on_text(text)

    def finish(self) -> list[Delta | ToolCall]:
        """The events that the end of the reply completes."""
        if self._state == "draft":
            section = (self._held + self._tail).lstrip()
            self._state, self._held, self._tail = "content", "", ""
            return self.push(section) + self.finish()
        events = self._on_text(self._tail) + self._close_call()
        self._state, self._tail = "done", ""
        return events

    def _next_marker(self) -> str | None:
        found = [(at, m) for m in _MARKERS[self._state] if (at := self._tail.find(m)) >= 0]
        return min(found)[1] if found else None

    def _split_tail(self) -> tuple[str, str]:
        start = self._tail.rfind("<")
        may_grow = start >= 0 and any(m.startswith(self._tail[start:]) for m in _MARKERS[self._state])
        return (self._tail[:start], self._tail[start:]) if may_grow else (self._tail, "")

    def _on_text(self, text: str) -> list[Delta | ToolCall]:
        if self._state == "reasoning":
            return self._reasoning(text)
        if self._state == "content" and text:
            return [Delta("content", text)]
        if self._state in ("draft", "header", "arguments"):
            self._held += text
        return []

    def _reasoning(self, text: str) -> list[Delta | ToolCall]:
        text = self._held + text
        stripped = text.rstrip()
        self._held = text[len(stripped) :]
        return [Delta("reasoning_content", stripped)] if stripped else []

    def _on_marker(self, marker: str) -> list[Delta | ToolCall]:
        if marker == _THINK_END:
            events = self._reasoning("") if self._state == "draft" else []
            self._state, self._held = "content", ""
            return events
        if marker in _SECTION_BEGIN and self._state == "reasoning":
            self._state = "draft"
            self._held += marker
            return []
        if marker == _ARGUMENT_BEGIN:
            self._state, self._call_id, self._held = "arguments", self._held.strip(), ""
            return []
        events = self._close_call()
        self._held = ""
        self._state = {_CALL_BEGIN: "header"}.get(marker, "done" if marker in _SECTION_END else "section")
        return events

    def _close_call(self) -> list[Delta | ToolCall]:
        if self._state != "arguments" or not _CALL_ID.fullmatch(self._call_id):
            return []
        name = self._call_id.partition(":")[0].removeprefix("functions.")
        return [ToolCall(self._call_id, name, self._held.strip())]
