"""Chat format: messages to prompt, safe mode, reply to message."""

import base64
import itertools
import random

import pytest
from kimi_native.chat import DEFAULT_TEMPLATE, Delta, Reply, ReplyParser, ToolCall, encode, parse_reply, render
from kimi_native.tokenizer import SPECIAL_TOKENS, Tokenizer

OPEN = "<|im_assistant|>assistant<|im_middle|>"
IMAGE = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tool(content, call_id="functions.f:0"):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def call(arguments="{}", call_id="functions.f:0"):
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}


def calls(*pairs):
    inner = (f"<|tool_call_begin|>{i}<|tool_call_argument_begin|>{a}<|tool_call_end|>" for i, a in pairs)
    return f"<|tool_calls_section_begin|>{''.join(inner)}<|tool_calls_section_end|>"


def turn(tag, name, body):
    return f"<|im_{tag}|>{name}<|im_middle|>{body}<|im_end|>"


def function(name, parameters=None, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters or {}} | more}


# Messages to prompt


def test_the_generation_prompt():
    head = "<|im_user|>user<|im_middle|>hi<|im_end|>"
    assert render([user("hi")]) == f"{head}{OPEN}<think>"
    assert render([user("hi")], thinking=False) == f"{head}{OPEN}<think></think>"
    assert render([user("hi")], add_generation_prompt=False) == head
    assert render([]) == f"{OPEN}<think>"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "system", "content": "be"}, turn("system", "system", "be")),
        ({"role": "developer", "content": "be"}, turn("system", "developer", "be")),
        (user("hi", name="ann"), turn("user", "ann", "hi")),
        (user("hi", name=None), turn("user", "user", "hi")),
        (user(None), turn("user", "user", "")),
        ({"role": "user"}, turn("user", "user", "")),
        (user(""), turn("user", "user", "")),
        (user(" a\n\n"), turn("user", "user", " a\n\n")),
        (user("{{ 1 }} {% if %} & < é \\n"), turn("user", "user", "{{ 1 }} {% if %} & < é \\n")),
        (user([]), turn("user", "user", "")),
        (user([{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}]), turn("user", "user", "ab\n")),
        (
            user(
                [
                    {"type": "image", "image": b"x"},
                    {"type": "image_url", "image_url": {}},
                    {"type": "text", "text": "?"},
                ]
            ),
            turn("user", "user", f"{IMAGE}{IMAGE}?"),
        ),
        (
            user([{"type": "video"}, {"type": "video_url", "video_url": {"url": "v"}}]),
            turn("user", "user", "<|kimi_k25_video_placeholder|>\n" * 2),
        ),
        (tool("42"), turn("system", "tool", "## Return of functions.f:0\n42")),
        (tool([{"type": "image"}], "x:1"), turn("system", "tool", f"## Return of x:1\n{IMAGE}")),
        (tool(None), turn("system", "tool", "## Return of functions.f:0\n")),
    ],
)
def test_one_message(message, expected):
    assert render([message], add_generation_prompt=False) == expected
    assert render([message], thinking=False) == f"{expected}{OPEN}<think></think>"


def test_reasoning_is_kept_after_the_last_answer_only():
    messages = [
        user("1"),
        assistant("A", reasoning_content="ra"),
        user("2"),
        assistant("B", reasoning_content="rb", tool_calls=[call()]),
        tool("x"),
        assistant("C", reasoning_content="rc"),
        user("3"),
        assistant("", reasoning_content="rd", tool_calls=[call()]),
        tool("y"),
        assistant(None, reasoning_content="re", tool_calls=[call()]),
    ]

    def expected(*reasoning):
        a, b, c, d, e = (f"<think>{r}</think>" for r in reasoning)
        section = calls(("functions.f:0", "{}"))
        return "".join(
            [
                turn("user", "user", "1"),
                turn("assistant", "assistant", f"{a}A"),
                turn("user", "user", "2"),
                turn("assistant", "assistant", f"{b}B{section}"),
                turn("system", "tool", "## Return of functions.f:0\nx"),
                turn("assistant", "assistant", f"{c}C"),
                turn("user", "user", "3"),
                turn("assistant", "assistant", f"{d}{section}"),
                turn("system", "tool", "## Return of functions.f:0\ny"),
                turn("assistant", "assistant", f"{e}{section}"),
            ]
        )

    assert render(messages, add_generation_prompt=False) == expected("", "", "", "rd", "re")
    assert render(messages, add_generation_prompt=False, thinking=False) == expected("", "", "", "", "")
    everything = render(messages, add_generation_prompt=False, preserve_thinking=True)
    assert everything == expected("ra", "rb", "rc", "rd", "re")


def test_the_last_answer_is_found_by_position_among_equal_messages():
    step = assistant("B", reasoning_content="r", tool_calls=[call()])
    answer = assistant("A", reasoning_content="r")
    text = render([answer, step, answer, step], add_generation_prompt=False)
    assert [part.split("</think>")[0] for part in text.split("<think>")[1:]] == ["", "", "", "r"]


@pytest.mark.parametrize(
    "more", [{}, {"reasoning_content": None}, {"reasoning_content": ""}, {"tool_calls": []}, {"tool_calls": None}]
)
def test_absent_reasoning_and_calls(more):
    expected = turn("assistant", "assistant", "<think></think>A")
    assert render([assistant("A", **more)], add_generation_prompt=False) == expected
    assert render([assistant("A", **more)], add_generation_prompt=False, preserve_thinking=True) == expected


def test_tool_calls():
    messages = [
        assistant(
            [{"type": "text", "text": "t"}],
            tool_calls=[
                call(' {"a":  1}', "functions.f:0"),
                call({"b": "é<>&'", "a": [1, None, True]}, "g:1"),
                call({}, "h:2"),
            ],
        )
    ]
    section = calls(("functions.f:0", ' {"a":  1}'), ("g:1", '{"b": "é<>&\'", "a": [1, null, true]}'), ("h:2", "{}"))
    body = f"<think></think>t{section}"
    assert render(messages, add_generation_prompt=False) == turn("assistant", "assistant", body)


def test_tools_are_declared_first():
    tools = [function("f", {"properties": {"b": {"type": "null"}, "a": {"type": "null"}}})]
    text = "# Tools\n\n## functions\nnamespace functions {\ntype f = (_: {\n  a?: null,\n  b?: null\n}) => any;\n}\n"
    declared = turn("system", "tool_declare", text)
    assert render([user("hi")], tools) == declared + render([user("hi")])
    assert render([user("hi")], []) == render([user("hi")], None) == render([user("hi")])
    assert render([], [{"type": "_plugin"}]) == turn("system", "tool_declare", "") + render([])


def test_tools_that_typescript_cannot_express_are_declared_as_sorted_json():
    tools = [
        function("é<", {"z": [{"y": 1, "x": 2}], "type": "object", "properties": {"p": {"oneOf": []}}}),
        function("g"),
    ]
    text = (
        '[{"function":{"name":"é<","parameters":{"properties":{"p":{"oneOf":[]}},"type":"object",'
        '"z":[{"x":2,"y":1}]}},"type":"function"},'
        '{"function":{"name":"g","parameters":{}},"type":"function"}]'
    )
    assert render([], tools) == turn("system", "tool_declare", text) + render([])


def test_the_input_is_left_as_it_was():
    messages, tools = [assistant(None, reasoning_content=None, tool_calls=[call({"b": 1, "a": 2})])], [function("f")]
    before = repr((messages, tools))
    render(messages, tools)
    assert repr((messages, tools)) == before


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ("hi", r"messages\[1\] is 'hi', expected an object"),
        ({"content": "hi"}, r"messages\[1\]\.role is None"),
        ({"role": "", "content": "hi"}, r"messages\[1\]\.role is ''"),
        ({"role": 1}, r"messages\[1\]\.role is 1"),
        (user(5), r"messages\[1\]\.content is 5, expected a string, a list of parts or null"),
        (user({"type": "text"}), r"messages\[1\]\.content is \{"),
        (user(["hi"]), r"messages\[1\]\.content\[0\] is 'hi', expected an object"),
        (user([{"text": "hi"}]), r"messages\[1\]\.content\[0\]\.type is None"),
        (user([{"type": "text"}]), r"messages\[1\]\.content\[0\]\.text is None"),
        (user([{"type": "audio"}]), "chat template: content part of type audio, expected text, image or video"),
        (user("hi", name=5), r"messages\[1\]\.name is 5"),
        ({"role": "tool", "content": "x"}, r"messages\[1\]\.tool_call_id is None"),
        (assistant("", reasoning_content=["r"]), r"messages\[1\]\.reasoning_content is \['r'\]"),
        (assistant("", tool_calls={}), r"messages\[1\]\.tool_calls is \{\}, expected a list"),
        (assistant("", tool_calls=["f"]), r"messages\[1\]\.tool_calls\[0\] is 'f'"),
        (assistant("", tool_calls=[{"function": {}}]), r"messages\[1\]\.tool_calls\[0\]\.id is None"),
        (assistant("", tool_calls=[{"id": "f:0"}]), r"tool_calls\[0\]\.function is None, expected an object"),
        (assistant("", tool_calls=[{"id": "f:0", "function": {"name": "f"}}]), "expected an object with arguments"),
        (assistant("", tool_calls=[call({"a": {1, 2}})]), "chat template: .* set is not JSON serializable"),
    ],
)
def test_a_malformed_message_is_an_error(message, where):
    with pytest.raises(ValueError, match=where):
        render([user("hi"), message])


def test_a_malformed_tool_is_an_error():
    with pytest.raises(ValueError, match=r"tools\[1\] is 'f', expected an object"):
        render([], [function("f"), "f"])


# A checkpoint's template


def test_a_checkpoint_template_gets_all_variables():
    template = (
        "{{ messages[0].content }}|{{ tools[0].function.name }}|{{ tools_ts_str[:7] }}|{{ add_generation_prompt }}"
        "|{{ thinking }}|{{ enable_thinking }}|{{ preserve_thinking }}"
    )
    text = render([user("hi")], [function("f")], template=template, thinking=False, preserve_thinking=True)
    assert text == "hi|f|# Tools|True|False|False|True"
    assert render([user("hi")], template="{{ tools is none }} {{ tools_ts_str is none }}") == "True True"
    assert render([user("hi")], template="") == ""
    assert render([user(None)], template="{{ messages[0].content is none }}") == "True"
    assert render([user("hi")], template=DEFAULT_TEMPLATE) == render([user("hi")])


def test_the_template_environment():
    def run(template):
        return render([user('é<&"')], template=template)

    assert run("{{ messages[0].content | tojson }}") == '"é<&\\""'
    assert run("{{ {'b': 1, 'a': 'é'} | tojson }}") == '{"b": 1, "a": "é"}'
    assert run("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}") == '{"a":2,"b":1}'
    assert run("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert run("{{ 'é' | tojson(ensure_ascii=True) }}") == '"\\u00e9"'
    assert run("  {% if true %}\na\n  {% endif %}\nb") == "a\nb"
    assert run("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert run("{{ strftime_now('%Y') | int > 2000 }}") == "True"
    with pytest.raises(ValueError, match="chat template: no such thing"):
        run("{{ raise_exception('no such thing') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ messages",
        "{% for m in messages %}",
        "{{ missing.attribute }}",
        "{{ 'a' + none }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 | nofilter }}",
    ],
)
def test_a_malformed_or_forbidden_template_is_an_error(template):
    with pytest.raises(ValueError, match="chat template: "):
        render([user("hi")], template=template)


# Safe mode


def bytes_tokenizer(folder):
    lines = (base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return bytes_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def specials(tokenizer, ids):
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    return [names[i] for i in ids if i in names]


CONVERSATION = [
    {"role": "system", "content": "a < b [1, 2] -> c"},
    user([{"type": "text", "text": "see"}, {"type": "image", "image": "x.png"}, {"type": "text", "text": "?"}]),
    assistant("", reasoning_content="r <b>", tool_calls=[call({"a[0]": ["<x>", 1]}), call('{"é": []}')]),
    tool("[]"),
]
TOOLS = [function("f", {"type": "object", "properties": {"a[0]": {"enum": ["<x>"]}}}, description="[<f>]")]


@pytest.mark.parametrize("tools", [None, TOOLS, [function("f", {"properties": {"p": {"oneOf": [1]}}})]])
@pytest.mark.parametrize("thinking", [True, False])
def test_without_special_strings_safe_mode_changes_nothing(tokenizer, tools, thinking):
    ids = encode(tokenizer, CONVERSATION, tools, thinking=thinking)
    text = render(CONVERSATION, tools, thinking=thinking)
    assert ids == encode(tokenizer, CONVERSATION, tools, thinking=thinking, safe=False)
    assert ids == tokenizer.encode(text, special=True)
    assert "<|media_pad|>" in specials(tokenizer, ids)


def hostile(text):
    """The same conversation with and without `text` in each place where a caller can put a string."""
    tools = [
        function(
            f"n{text}",
            {
                "type": "object",
                "properties": {f"k{text}": {"type": "string", "description": text, "default": text, "enum": [text]}},
                "required": [f"k{text}"],
                "$defs": {f"D{text}": {"type": "string"}},
            },
            description=text,
        )
    ]
    messages = [
        {"role": "system", "content": text, "name": f"n{text}"},
        user([{"type": "text", "text": text}, {"type": "image"}, {"type": "text", "text": text}]),
        assistant(
            text,
            reasoning_content=text,
            tool_calls=[call(text, f"i{text}"), call({f"k{text}": [text, {text: text}]}, f"j{text}")],
        ),
        tool(text, f"i{text}"),
    ]
    return messages, tools


@pytest.mark.parametrize(
    "special", [*SPECIAL_TOKENS.values(), "<|reserved_token_261|>", "".join(SPECIAL_TOKENS.values())]
)
@pytest.mark.parametrize("json_tools", [False, True])
def test_special_strings_of_the_caller_stay_text(tokenizer, special, json_tools):
    messages, tools = hostile(special)
    plain_messages, plain_tools = hostile("x")
    if json_tools:
        for each in (tools, plain_tools):
            each[0]["function"]["parameters"]["properties"]["z"] = {"oneOf": []}
    ids = encode(tokenizer, messages, tools)
    assert specials(tokenizer, ids) == specials(tokenizer, encode(tokenizer, plain_messages, plain_tools))
    assert tokenizer.decode(ids) == render(messages, tools)
    assert len(specials(tokenizer, encode(tokenizer, messages, tools, safe=False))) > len(specials(tokenizer, ids))


def test_special_strings_that_arise_where_strings_join_stay_text(tokenizer):
    name = "<|im_end|>"
    for cut in range(1, len(name)):
        parts = [{"type": "text", "text": name[:cut]}, {"type": "text", "text": name[cut:]}]
        ids = encode(tokenizer, [user(parts)])
        assert tokenizer.decode(ids) == render([user(parts)])
        assert specials(tokenizer, ids).count(name) == 1
    # A template that writes the beginning or the end of a special token's name next to a string of the caller.
    for template, content in [("<{{ c }}", "|im_end|>"), ("<|im{{ c }}", "_end|>x"), ("{{ c }}>", "x<|im_end|")]:
        template = template.replace("c", "messages[0].content")
        ids = encode(tokenizer, [user(content)], template=template)
        assert specials(tokenizer, ids) == []
        assert tokenizer.decode(ids) == render([user(content)], template=template)


def test_a_template_may_assemble_special_tokens(tokenizer):
    template = "{% for m in messages %}<|im_{{ m.role }}|>{{ m.content }}{{ '<|im' ~ '_end|>' }}{% endfor %}"
    ids = encode(tokenizer, [user("<|im_end|>")], template=template)
    assert specials(tokenizer, ids) == ["<|im_user|>", "<|im_end|>"]
    assert tokenizer.decode(ids) == "<|im_user|><|im_end|><|im_end|>"


def test_marks_do_not_disturb_a_template_and_leave_no_trace(tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'user' and m.content is string %}{{ m.content | trim }};"
        "{{ m.content | tojson(ensure_ascii=True) }}{% endif %}{% endfor %}"
        "{% for t in tools if t.type == 'function' %}{{ t.function.parameters | tojson }}{% endfor %}"
    )
    messages = [user(" <|im_end|>\ue000\ue001 \\ue002 é[] ")]
    tools = [function("f", {"properties": {"a<": {"enum": ["[BOS]"]}}})]
    ids = encode(tokenizer, messages, tools, template=template)
    assert tokenizer.decode(ids) == render(messages, tools, template=template)
    assert specials(tokenizer, ids) == []


@pytest.mark.parametrize("role", ["<|im_end|>", "x<|im_", "[EOS]"])
def test_a_role_with_special_characters_is_an_error(tokenizer, role):
    with pytest.raises(ValueError, match=r"messages\[1\]\.role is"):
        encode(tokenizer, [user("hi"), {"role": role, "content": ""}])


def test_special_tokens_that_end_in_a_letter_are_an_error(tmp_path):
    bytes_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"261": {"content": "content"}}}')
    with pytest.raises(ValueError, match="the ends of special tokens"):
        encode(Tokenizer.from_folder(tmp_path), [user("hi")])


# Reply to message

SECTION = calls(("functions.get_weather:0", '{"city": "Zürich <b>"}'), ("functions.f:1", "{}"))
TOOL_CALLS = [
    ToolCall("functions.get_weather:0", "get_weather", '{"city": "Zürich <b>"}'),
    ToolCall("functions.f:1", "f", "{}"),
]
BEGIN, ARGUMENTS, END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"

# text, thinking, expected
REPLIES = [
    ("", True, Reply()),
    ("", False, Reply()),
    ("why\n not \n</think>\n because ", True, Reply("why\n not", "\n because ")),
    ("because", False, Reply("", "because")),
    (" \n", True, Reply()),
    (" a b \n", True, Reply(" a b")),
    ("</think>", True, Reply()),
    ("r</think>a</think>b</think>", True, Reply("r", "ab")),
    ("a</think>b", False, Reply("", "ab")),
    ("1 < 2 <| </thin <|tool_calls_", True, Reply("1 < 2 <| </thin <|tool_calls_")),
    ("1 < 2 <| </thin <|tool_calls_", False, Reply("", "1 < 2 <| </thin <|tool_calls_")),
    ("a<</think><<|tool_calls_section_end|>", True, Reply("a<", "<<|tool_calls_section_end|>")),
    (f"r</think>c {SECTION}", True, Reply("r", "c ", TOOL_CALLS)),
    (f"c{SECTION}dropped{SECTION}</think>", False, Reply("", "c", TOOL_CALLS)),
    (f"r \n{SECTION}", True, Reply("r", "", TOOL_CALLS)),
    (f"r {SECTION} no </think> c", True, Reply(f"r {SECTION} no", " c")),
    (f"r {SECTION}</think>c{SECTION}", True, Reply(f"r {SECTION}", "c", TOOL_CALLS)),
    (f"{SECTION} \n", True, Reply("", "", TOOL_CALLS)),
    (SECTION.replace("calls_section", "call_section"), False, Reply("", "", TOOL_CALLS)),
    (SECTION.replace("calls_section", "call_section"), True, Reply("", "", TOOL_CALLS)),
    (f"{SECTION_BEGIN}{SECTION_END}", False, Reply()),
    (
        f"{SECTION_BEGIN}\n{BEGIN} f:0 \n{ARGUMENTS}\n {{}} {END}\n{SECTION_END}",
        False,
        Reply("", "", [ToolCall("f:0", "f", "{}")]),
    ),
    (f"{SECTION_BEGIN}{BEGIN}my.f-1:12{ARGUMENTS}{END}", False, Reply("", "", [ToolCall("my.f-1:12", "my.f-1", "")])),
    (
        f'{SECTION_BEGIN}{BEGIN}f:0{ARGUMENTS}{{"a": "</think>',
        False,
        Reply("", "", [ToolCall("f:0", "f", '{"a": "</think>')]),
    ),
    (
        f"{SECTION_BEGIN}{BEGIN}f:0{ARGUMENTS}1{BEGIN}g:1{ARGUMENTS}2{SECTION_END}",
        False,
        Reply("", "", [ToolCall("f:0", "f", "1"), ToolCall("g:1", "g", "2")]),
    ),
    (
        f"{SECTION_BEGIN}{BEGIN}f:0{END}{BEGIN}{BEGIN}g:1{ARGUMENTS}2{END}",
        False,
        Reply("", "", [ToolCall("g:1", "g", "2")]),
    ),
    (
        f"{SECTION_BEGIN}{BEGIN}f{ARGUMENTS}1{END}{BEGIN}f x:1{ARGUMENTS}1{END}{BEGIN}:1{ARGUMENTS}1{END}",
        False,
        Reply(),
    ),
    (
        f"{SECTION_BEGIN}x{END}{ARGUMENTS}y{BEGIN}f:0{ARGUMENTS}{ARGUMENTS}{END}",
        False,
        Reply("", "", [ToolCall("f:0", "f", ARGUMENTS)]),
    ),
    (f"a{BEGIN}f:0{ARGUMENTS}{{}}{END}", False, Reply("", f"a{BEGIN}f:0{ARGUMENTS}{{}}{END}")),
]


def parse_in_pieces(pieces, thinking):
    parser, reply = ReplyParser(thinking=thinking), Reply()
    for piece in pieces:
        for event in parser.push(piece):
            assert isinstance(event, ToolCall) or event.text
            reply.add(event)
    for event in parser.finish():
        reply.add(event)
    assert parser.finish() == []
    return reply


@pytest.mark.parametrize(("text", "thinking", "expected"), REPLIES)
def test_parse_reply(text, thinking, expected):
    assert parse_reply(text, thinking=thinking) == expected


@pytest.mark.parametrize(("text", "thinking", "expected"), REPLIES)
def test_how_a_reply_is_cut_does_not_matter(text, thinking, expected):
    assert parse_in_pieces(text, thinking) == expected
    for cut in range(len(text)):
        assert parse_in_pieces([text[:cut], text[cut:]], thinking) == expected
    source = random.Random(0)
    for _ in range(50):
        cuts = sorted(source.choices(range(len(text) + 1), k=source.randrange(8)))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert parse_in_pieces(pieces, thinking) == expected


@pytest.mark.parametrize("text", ["ab \n</think> c", "a<</think>", "</think></think>", "a<|</think>b<|"])
@pytest.mark.parametrize("thinking", [True, False])
def test_all_cuts_of_short_replies(text, thinking):
    expected = parse_reply(text, thinking=thinking)
    for mask in range(2 ** (len(text) - 1)) if len(text) < 14 else range(0, 2 ** (len(text) - 1), 7):
        ends = [i + 1 for i in range(len(text) - 1) if mask >> i & 1]
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]
        assert parse_in_pieces(pieces, thinking) == expected


def test_markers_in_any_order_are_cut_independent():
    source = random.Random(1)
    atoms = [BEGIN, ARGUMENTS, END, SECTION_BEGIN, SECTION_END, "</think>", "<|tool_call", "<", " ", "\n", "f:0", "x"]
    for _ in range(400):
        text = "".join(source.choices(atoms, k=source.randrange(1, 14)))
        for thinking in (True, False):
            assert parse_in_pieces(text, thinking) == parse_reply(text, thinking=thinking)


def test_every_prefix_of_a_reply_with_calls():
    text = f"rea son</think>answer{SECTION}"
    whole = parse_reply(text)
    for end in range(len(text)):
        reply = parse_reply(text[:end])
        assert whole.reasoning_content.startswith(reply.reasoning_content.partition("<")[0])
        assert reply.content.startswith("answer"[: len(reply.content)])
        for found, expected in zip(reply.tool_calls, whole.tool_calls, strict=False):
            assert (found.id, found.name) == (expected.id, expected.name)
            assert expected.arguments.startswith(found.arguments.rpartition("<|")[0])
    assert whole == Reply("rea son", "answer", TOOL_CALLS)


def test_text_is_delivered_as_soon_as_it_cannot_be_a_marker():
    parser = ReplyParser()
    assert parser.push("so ") == [Delta("reasoning_content", "so")]
    assert parser.push("a<") == [Delta("reasoning_content", " a")]
    assert parser.push("b") == [Delta("reasoning_content", "<b")]
    assert parser.push(" </thi") == []
    assert parser.push("nk>c <|tool") == [Delta("content", "c ")]
    assert parser.push("s") == [Delta("content", "<|tools")]
    assert parser.push(SECTION_BEGIN) == []
    assert parser.push(f"{BEGIN}functions.f:0{ARGUMENTS}{{}}") == []
    assert parser.push(END) == [ToolCall("functions.f:0", "f", "{}")]
    assert parser.push(f"{SECTION_END} x") == []
    assert parser.finish() == []


def test_to_message():
    reply = Reply("r", "c", TOOL_CALLS[1:])
    assert reply.to_message() == {
        "role": "assistant",
        "content": "c",
        "reasoning_content": "r",
        "tool_calls": [{"id": "functions.f:1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    assert Reply("", "c").to_message() == {"role": "assistant", "content": "c"}


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("content", ["", "answer"])
def test_a_reply_sent_back_renders_as_the_model_wrote_it(thinking, content):
    prompt = render([user("hi")], thinking=thinking)
    text = f"{'because</think>' if thinking else ''}{content}{SECTION}"
    message = parse_reply(text, thinking=thinking).to_message()
    again = render([user("hi"), message], thinking=thinking, add_generation_prompt=False)
    assert again == f"{prompt}{text}<|im_end|>"
