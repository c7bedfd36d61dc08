"""The command line: main([...]) in this process, and `python -m kimi_native` where signals and pipes matter."""

import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import av
import kimi_native as kn
import numpy as np
import pytest
from kimi_native import __main__ as cli
from kimi_native import chat, ops
from kimi_native.checkpoint import Checkpoint
from kimi_native.generate import encode_prompt
from kimi_native.make_tiny import make_tiny
from kimi_native.tiny_config import published_config
from media_items import random_item
from PIL import Image

GREEDY = ["--temperature", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("main") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return kn.load(folder)


@pytest.fixture
def run(capsys, monkeypatch):
    """run(*arguments, stdin="") -> (exit status, stdout, stderr) of main."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    return call


def command(*arguments):
    return [sys.executable, "-m", "kimi_native", *map(str, arguments)]


def assert_refused(result, *parts):
    """Exit status 2, nothing but one message on stderr, with these parts."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert "kimi-native" in err
    for part in parts:
        assert part in err


# Help

SAMPLING = ["--max-new-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--seed", "--stop", "--threads"]
SAMPLING += [
    "--device",
    "--experts",
    "--repetition-penalty",
    "--presence-penalty",
    "--frequency-penalty",
    "--activations",
    "--dense",
    "--cache-dtype",
    "--expert-cache",
    "--instant",
]
HELP = {
    (): ["generate", "chat", "info", "make-tiny", "train", "kimi-native make-tiny tiny"],
    ("generate",): ["--model", "--image", "--video", "--raw", "--system", *SAMPLING, "prompt"],
    ("chat",): [
        "--model",
        "--context",
        "--system",
        *SAMPLING,
        "/image PATH",
        "/video PATH",
        "/clear",
        "/think",
        "/instant",
        "/help",
        "/exit",
        "Ctrl-C",
    ],
    ("info",): ["DIR", "config.json"],
    ("train",): ["--data FILE[:WEIGHT]", "--init", "--from", "--plot", "examples:", ".jsonl", "goes on where"],
    ("make-tiny",): ["DIR", "--preset", "--experts", "--seed", "tiny-k2", "full-width", "full-size"],
}


@pytest.mark.parametrize("words", HELP, ids=lambda words: "-".join(words) or "top")
def test_help(run, words):
    status, out, err = run(*words, "--help")
    assert (status, err) == (0, "")
    assert [word for word in HELP[words] if word not in out] == []


def test_help_of_the_module():
    result = subprocess.run(command("--help"), capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: kimi-native ")


@pytest.mark.parametrize(
    "arguments", [[], ["talk"], ["generate"], ["generate", "--model"], ["info"], ["chat", "Hello"]]
)
def test_usage_error(run, arguments):
    assert_refused(run(*arguments), "usage: kimi-native")


# generate


def test_generate(run, model, folder):
    status, out, err = run("generate", "--model", folder, "Hello", "--max-new-tokens", 30, "--seed", 3)
    assert status == 0
    assert out == kn.generate(model, "Hello", 30, seed=3, temperature=1.0, top_p=0.95) + "\n"
    prompt = len(encode_prompt(model, "Hello").token_ids)
    assert re.search(rf"prompt {prompt} tokens, [\d.]+ tokens/s \| output \d+ tokens, [\d.]+ tokens/s", err)


def test_generate_with_a_seed_is_reproducible(run, folder):
    def reply(seed):
        return run("generate", "--model", folder, "Hello", "--max-new-tokens", 20, "--seed", seed)[1]

    assert reply(1) == reply(1)
    assert reply(1) != reply(2)


def test_generate_greedily(run, model, folder):
    expected = kn.generate(model, "Hello", 20, temperature=0.0) + "\n"
    for seed in (1, 2):
        arguments = ["generate", "--model", folder, "Hello", "--max-new-tokens", 20, *GREEDY, "--seed", seed]
        assert run(*arguments)[1] == expected


def test_generate_as_a_module(model, folder):
    arguments = command("generate", "--model", folder, "Grüße, 世界", "--max-new-tokens", 10, *GREEDY)
    result = subprocess.run(arguments, capture_output=True, timeout=60)
    assert result.returncode == 0
    assert result.stdout.decode() == kn.generate(model, "Grüße, 世界", 10, temperature=0.0) + "\n"
    assert b"output 10 tokens" in result.stderr


def test_generate_options_reach_the_sampler(run, folder, monkeypatch):
    seen = {}

    def stream(model, prompt, max_new_tokens, **options):
        seen.update(options, model=model, prompt=prompt, max_new_tokens=max_new_tokens)
        return iter([])

    monkeypatch.setattr(cli, "stream", stream)
    texts = ["--stop", "a", "--stop", "b c", "--system", "Be brief.", "--cache-dtype", "float32", "--max-new-tokens", 7]
    numbers = ["--temperature", 0.3, "--top-p", 0.5, "--top-k", 9, "--min-p", 0.1, "--seed", 5]
    penalties = ["--repetition-penalty", 1.1, "--presence-penalty", 0.2, "--frequency-penalty", 0.4]
    formats = ["--dense", "int8", "--activations", "float32"]
    assert run("generate", "--model", folder, "Hello", *texts, *numbers, *penalties, *formats)[0] == 0
    model = seen.pop("model")
    assert model.cache_dtype == "float32" and model.lm_head.parts[0][0] is ops.gemm_int8
    assert model.layers[-1].mlp.activations == "float32"
    assert callable(seen.pop("progress")) and callable(seen.pop("media_progress"))
    assert seen.pop("stats").output_tokens == 0
    assert seen == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "max_new_tokens": 7,
        "stop": ["a", "b c"],
        "raw": False,
        "thinking": True,
        "temperature": 0.3,
        "top_p": 0.5,
        "top_k": 9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.4,
        "seed": 5,
    }
    for arguments, temperature in [([], 1.0), (["--instant"], 0.6), (["--instant", "--temperature", 0], 0.0)]:
        run("generate", "--model", folder, "Hello", *arguments)
        assert (seen["temperature"], seen["thinking"]) == (temperature, "--instant" not in arguments)
        assert (seen["top_p"], seen["seed"], seen["max_new_tokens"]) == (0.95, None, 1024)


def test_generate_raw(run, model, folder):
    out = run("generate", "--model", folder, "--raw", "The sea", "--max-new-tokens", 12, *GREEDY)[1]
    assert out == kn.generate(model, "The sea", 12, raw=True, temperature=0.0) + "\n"
    assert out != kn.generate(model, "The sea", 12, temperature=0.0) + "\n"


def test_generate_from_standard_input(run, model, folder):
    arguments = ["generate", "--model", folder, "-", "--max-new-tokens", 12, *GREEDY]
    text = "several\nlines, ünïcode\n"
    assert run(*arguments, stdin=text)[1] == kn.generate(model, text, 12, temperature=0.0) + "\n"
    result = subprocess.run(command(*arguments), input=text.encode(), capture_output=True, timeout=60)
    assert result.stdout.decode() == run(*arguments, stdin=text)[1]


def test_generate_stops_at_a_string(run, model, folder):
    reply = kn.generate(model, "Hello", 30, seed=3)
    stop = reply[8:10]
    out = run("generate", "--model", folder, "Hello", "--max-new-tokens", 30, "--seed", 3, "--stop", stop)[1]
    assert out == reply[: reply.index(stop)] + "\n"


# Images and video


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """60 x 90 pixels, 12 tokens."""
    path = tmp_path_factory.mktemp("main") / "a photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A film of 3 s, two chunks of 4 tokens."""
    path = tmp_path_factory.mktemp("main") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        for shade in range(0, 240, 20):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.full((48, 48, 3), shade, np.uint8), format="rgb24"))
            )
        container.mux(stream.encode())
    return path


def test_generate_with_media(run, model, folder, photo, clip):
    """In the order of the command line, before the text."""
    options = ["What is this?", "--max-new-tokens", 12, *GREEDY]
    out = run("generate", "--model", folder, "--video", clip, "--image", photo, "--image", photo, *options)[1]
    parts = [{"type": "video", "video": clip}, *[{"type": "image", "image": photo}] * 2]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}
    assert out == kn.generate(model, [message], 12, temperature=0.0) + "\n"
    assert out != kn.generate(model, "What is this?", 12, temperature=0.0) + "\n"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_generate_with_media_as_a_module(model, folder, photo, clip, kind):
    path, prompt = {"image": photo, "video": clip}[kind], "What is this?"
    arguments = command("generate", "--model", folder, f"--{kind}", path, prompt, "--max-new-tokens", 12, *GREEDY)
    result = subprocess.run(arguments, capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr
    expected = kn.generate(model, prompt, 12, temperature=0.0, **{f"{kind}s": [path]})
    assert result.stdout.decode() == expected + "\n"
    tokens = len(encode_prompt(model, prompt, **{f"{kind}s": [path]}).token_ids)
    assert f"prompt {tokens} tokens".encode() in result.stderr


def test_generate_with_media_and_a_system_message(run, model, folder, photo):
    options = ["Hi", "--max-new-tokens", 8, *GREEDY]
    out = run("generate", "--model", folder, "--system", "Be brief.", "--image", photo, *options)[1]
    content = [{"type": "image", "image": photo}, {"type": "text", "text": "Hi"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    assert out == kn.generate(model, messages, 8, temperature=0.0) + "\n"


def test_generate_with_media_that_cannot_be_read(run, folder, photo, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:100])
    for path in (broken, tmp_path / "missing.png", tmp_path):
        assert_refused(run("generate", "--model", folder, "--image", path, "Hi"), str(path))
    for path in (photo, tmp_path / "missing.mp4"):
        assert_refused(run("generate", "--model", folder, "--video", path, "Hi"), str(path))
    assert_refused(run("generate", "--model", folder, "--image", "https://example.org/a.png", "Hi"), "example.org")
    assert_refused(run("generate", "--model", folder, "--raw", "--image", photo, "Hi"), "--raw", "--image")


def test_media_for_a_model_without_a_tower(run, photo, tmp_path):
    folder = make_tiny(tmp_path / "k2", "tiny-k2")
    assert_refused(run("generate", "--model", folder, "--image", photo, "Hi"), "takes no images or video")
    status, out, err = run("chat", "--model", folder, stdin=f"/image {photo}\n")
    assert status == 0 and "takes no images or video" in err


def test_label_of_encoding():
    rng = np.random.default_rng(0)
    images, clip = [random_item(rng, 56, 74), random_item(rng, 2, 2)], [random_item(rng, 4, 6, 1, "00:00:00.000")]
    media = [images[0], *clip, images[1]]
    assert cli.encoding_label(images[:1], media) == "encoding image 1 of 2: 1,036 tokens"
    assert cli.encoding_label(images[1:], media) == "encoding image 2 of 2: 1 tokens"
    assert cli.encoding_label(images, media) == "encoding images 1 to 2 of 2: 1,037 tokens"
    assert cli.encoding_label(clip, media) == "encoding video chunk 1 of 1: 6 tokens"
    assert cli.encoding_label([*clip, images[1]], media) == "encoding items 2 to 3 of 3: 7 tokens"
    assert cli.encoding_label(images[:1], images[:1] * 2) == "encoding images 1 to 2 of 2: 1,036 tokens"


def test_the_bar_says_what_is_encoded(run, folder, photo, monkeypatch):
    seen = []

    @contextmanager
    def progress_bar(label):
        yield lambda done, total, label=label: seen.append((label, done, total))

    monkeypatch.setattr(cli, "progress_bar", progress_bar)
    assert run("generate", "--model", folder, "--image", photo, "Hi", "--max-new-tokens", 2)[0] == 0
    labels = [label for label, _ in itertools.groupby(label for label, _, _ in seen)]
    assert labels == ["loading", "encoding image 1 of 1: 12 tokens", "prompt"]
    assert all(done <= total for _, done, total in seen)


def test_threads(run, folder):
    before = ops.num_threads()
    try:
        assert run("generate", "--model", folder, "Hello", "--max-new-tokens", 2, "--threads", 3)[0] == 0
        assert ops.num_threads() == 3
    finally:
        ops.set_num_threads(before)


def test_reader_that_goes_away(folder, endless):
    """As `kimi-native generate ... | head -c 5`."""
    arguments = command("generate", "--model", endless, "Hello", "--max-new-tokens", 20000, *GREEDY)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert len(process.stdout.read(5)) == 5
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait(60) == 1
    assert "Traceback" not in err
    assert "Exception ignored" not in err


# Errors

GENERATE_ERRORS = {
    "temperature": (["--temperature", -1], "temperature is -1.0"),
    "top_p": (["--top-p", 2], "top_p is 2.0"),
    "top_k": (["--top-k", -1], "top_k is -1"),
    "min_p": (["--min-p", "nan"], "min_p is nan"),
    "penalty": (["--repetition-penalty", 0], "repetition_penalty is 0.0"),
    "seed": (["--seed", -1], "seed is -1"),
    "length": (["--max-new-tokens", 0], "max_new_tokens is 0"),
    "stop": (["--stop", ""], "stop holds an empty string"),
    "threads": (["--threads", 0], "n is 0"),
}


@pytest.mark.parametrize("name", GENERATE_ERRORS)
@pytest.mark.parametrize("what", ["generate", "chat"])
def test_bad_option(run, folder, what, name):
    arguments, message = GENERATE_ERRORS[name]
    prompt = ["Hello"] if what == "generate" else []
    status, out, err = run(what, "--model", folder, *prompt, *arguments, stdin="Hello\n")
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert "Hello" not in out


@pytest.mark.parametrize("what", ["generate", "chat", "info"])
def test_folder_that_is_no_checkpoint(run, tmp_path, what):
    rest = {"generate": ["--model", tmp_path, "Hello"], "chat": ["--model", tmp_path], "info": [tmp_path]}[what]
    assert_refused(run(what, *rest), f"{tmp_path}/config.json")
    (tmp_path / "config.json").write_text("{")
    assert_refused(run(what, *rest), f"{tmp_path}/config.json", "not JSON")


def test_checkpoint_without_weights(run, folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    assert_refused(run("generate", "--model", tmp_path, "Hello"), "model.safetensors")


@pytest.mark.parametrize("what", ["generate", "chat"])
def test_checkpoint_without_tokenizer(run, folder, tmp_path, what):
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tiktoken.model"))
    prompt = ["Hello"] if what == "generate" else []
    status, _, err = run(what, "--model", bare, *prompt, stdin="Hello\n")
    assert status == 2
    assert "no tiktoken.model" in err


def test_empty_raw_prompt(run, folder):
    assert_refused(run("generate", "--model", folder, "--raw", ""), "the prompt has no tokens")


def test_chat_without_room(run, folder):
    assert_refused(run("chat", "--model", folder, "--context", 0), "max_tokens is 0")


def test_error_as_a_module(tmp_path):
    result = subprocess.run(command("info", tmp_path), capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"kimi-native: {tmp_path}/config.json: ")


# info and make-tiny


def test_info_of_a_checkpoint(run, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    status, out, err = run("info", folder)
    assert status == 0
    rows = {row[1].strip(): row[2:4] for line in out.splitlines() if len(row := line.split("│")) == 6}
    entries = Checkpoint(folder).entries
    assert int(rows["total"][1].replace(",", "")) == sum(entry.nbytes for entry in entries.values())
    assert int(rows["routed experts"][0].replace(",", "")) == 2 * 32 * 3 * 64 * 128
    for line in (f"{len(entries)} tensors in 6 files", "480 bytes per token", "192 of 192 routed expert matrices"):
        assert line in out
    assert re.search(r"missing +none\b", out)


def test_info_of_a_config_alone(run, tmp_path, monkeypatch):
    """The totals of the published checkpoint."""
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "config.json").write_text(json.dumps(published_config()))
    status, out, err = run("info", tmp_path)
    assert status == 0
    assert re.search(r"total +│ 1,026,879,376,368 │ 595,148,192,736 │", out)
    assert "70,272 bytes per token" in out
    assert "no safetensors file" in out


def test_info_lists_what_is_missing(run, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    del index["weight_map"]["language_model.model.norm.weight"]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    status, out, err = run("info", copy)
    assert status == 0
    assert re.search(r"missing +1 *\n +language_model\.model\.norm\.weight", out)


def test_make_tiny(run, tmp_path):
    target = tmp_path / "new" / "k2"
    status, out, err = run("make-tiny", target, "--preset", "tiny-k2", "--experts", "bf16", "--seed", 5)
    assert status == 0
    assert out.startswith(f"{target} written.")
    same = make_tiny(tmp_path / "same", "tiny-k2", experts="bf16", seed=5)
    assert {f.name: f.read_bytes() for f in target.iterdir()} == {f.name: f.read_bytes() for f in same.iterdir()}


def test_make_tiny_refuses_an_existing_folder(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(run("make-tiny", tmp_path), f"{tmp_path}: exists")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert_refused(run("make-tiny", tmp_path / "new", "--seed", -1), "seed is -1")
    assert_refused(run("make-tiny", tmp_path / "new", "--preset", "huge"), "huge")


# chat


def talk(run, folder, *lines, options=()):
    """(exit status, stdout, the summaries on stderr) of a chat with these lines, greedy, 20 tokens a reply."""
    arguments = ["chat", "--model", folder, "--max-new-tokens", 20, *GREEDY, *options]
    status, out, err = run(*arguments, stdin="".join(f"{line}\n" for line in lines))
    return status, out, re.findall(r"prompt (\d+) tokens(?: \((\d+) cached\))?, ", err)


def expected_reply(model, messages, thinking=True):
    """(prompt length, message) of the greedy reply."""
    reply = kn.generate(model, messages, 20, thinking=thinking, temperature=0.0)
    return len(encode_prompt(model, messages, thinking=thinking).token_ids), chat.parse_reply(reply, thinking=thinking)


def shown(reply):
    return reply.reasoning_content + reply.content


def user(text):
    return {"role": "user", "content": text}


def test_chat_help_and_unknown_commands(run, folder):
    status, out, summaries = talk(run, folder, "/help", "", "   ", "/nonsense")
    assert (status, summaries) == (0, [])
    assert out == f"> {cli.CHAT_HELP}\n> > > {cli.CHAT_HELP}\n> \n"


def test_chat_exit(run, folder):
    assert talk(run, folder, "/exit", "Hello") == (0, "> ", [])


def test_chat_of_two_turns(run, model, folder):
    """The second prompt holds the first and its reply; what the cache has of it is not computed again."""
    messages = [user("Hello")]
    first_length, first = expected_reply(model, messages)
    messages += [first.to_message(), user("And now?")]
    second_length, second = expected_reply(model, messages)
    status, out, summaries = talk(run, folder, "Hello", "And now?")
    assert status == 0
    assert out == f"> {shown(first)}\n> {shown(second)}\n> \n"
    assert [int(length) for length, _ in summaries] == [first_length, second_length]
    assert summaries[0][1] == ""
    assert first_length - 1 <= int(summaries[1][1]) < second_length


def test_chat_clear(run, model, folder):
    length, reply = expected_reply(model, [user("Hello")])
    status, out, summaries = talk(run, folder, "Hello", "/clear", "Hello")
    assert out == f"> {shown(reply)}\n> > {shown(reply)}\n> \n"
    assert summaries == [(str(length), ""), (str(length), str(length - 1))]


def test_chat_instant_and_think(run, model, folder):
    replies = [expected_reply(model, [user("Hello")], thinking)[1] for thinking in (False, True)]
    out = talk(run, folder, "/instant", "Hello", "/clear", "/think", "Hello")[1]
    assert out == f"> > {shown(replies[0])}\n> > > {shown(replies[1])}\n> \n"
    assert talk(run, folder, "Hello", options=["--instant"])[1] == f"> {shown(replies[0])}\n> \n"


def test_chat_with_a_system_message(run, model, folder):
    system = {"role": "system", "content": "Be brief."}
    length, reply = expected_reply(model, [system, user("Hello")])
    status, out, summaries = talk(run, folder, "Hello", "/clear", "Hello", options=["--system", "Be brief."])
    assert out == f"> {shown(reply)}\n> > {shown(reply)}\n> \n"
    assert [int(count) for count, _ in summaries] == [length, length]


def test_chat_message_beyond_the_context(run, model, folder):
    """It is refused and forgotten; the session goes on."""
    reply = expected_reply(model, [user("Hi")])[1]
    arguments = ["chat", "--model", folder, "--max-new-tokens", 20, *GREEDY, "--context", 64]
    status, out, err = run(*arguments, stdin="word " * 100 + "\nHi\n")
    assert status == 0
    assert re.search(r"the prompt has \d+ tokens, expected at most .* 64\b", err)
    assert "Traceback" not in err
    assert out == f"> > {shown(reply)}\n> \n"


REPLIES = {
    "brackets": "[bold]list[0][/] \\[x]",
    "emoji code": "a :smile: b :warning:",
    "tab": "all:\n\tcc -c a.c\n",
    "spaces": "  two  spaces   ",
    "long line": "word " * 60,
    "wide": "漢字 🙂 e\u0301",
}


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("thinking", [True, False], ids=["reasoning", "content"])
def test_chat_shows_the_text_as_it_is(run, folder, monkeypatch, name, thinking):
    reply = REPLIES[name]
    monkeypatch.setattr(cli, "stream_ids", lambda *_, **__: iter([reply]))
    out = talk(run, folder, "Hello", options=[] if thinking else ["--instant"])[1]
    assert out == f"> {reply.rstrip() if thinking else reply}\n> \n"


def test_chat_shows_tool_calls(run, folder, monkeypatch):
    reply = (
        "</think>Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        '<|tool_call_argument_begin|>{"city": ["Oslo"]}<|tool_call_end|><|tool_calls_section_end|>'
    )
    monkeypatch.setattr(cli, "stream_ids", lambda *_, **__: iter([reply]))
    out = talk(run, folder, "Hello")[1]
    assert out.startswith("> Let me see.")
    assert '[weather {"city": ["Oslo"]}]' in out


def test_chat_with_an_image(run, model, folder, photo, clip):
    """It goes with the next message and stays in the conversation, whatever becomes of its file."""
    parts = [{"type": "image", "image": photo}, {"type": "video", "video": clip}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "Hello"}]}]
    first_length, first = expected_reply(model, messages)
    messages += [first.to_message(), user("And now?")]
    second_length, second = expected_reply(model, messages)
    status, out, summaries = talk(run, folder, f"/image {photo}", f"/video  {clip} ", "Hello", "And now?")
    assert status == 0
    assert out == f"> > > {shown(first)}\n> {shown(second)}\n> \n"
    assert [int(length) for length, _ in summaries] == [first_length, second_length]
    assert int(summaries[1][1]) >= first_length - 1, "the image is in the cache"


def test_chat_with_an_image_that_cannot_be_read(run, model, folder, photo, tmp_path):
    """The session goes on; what cannot be read is not attached, nor is anything after /clear."""
    reply = expected_reply(model, [user("Hello")])[1]
    lines = [f"/image {tmp_path / 'missing.png'}", f"/video {photo}", "/image", f"/image {photo}", "/clear", "Hello"]
    arguments = ["chat", "--model", folder, "--max-new-tokens", 20, *GREEDY]
    status, out, err = run(*arguments, stdin="".join(f"{line}\n" for line in lines))
    assert status == 0
    assert out == f"> > > {cli.CHAT_HELP}\n> > > {shown(reply)}\n> \n"
    assert str(tmp_path / "missing.png") in err and f"{photo}: 12 tokens" in err
    assert "Traceback" not in err


# chat with Ctrl-C


@pytest.fixture(scope="module")
def endless(folder, tmp_path_factory):
    """A checkpoint whose greedy replies do not end: the logits of its stop tokens are 0, the largest is above."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("main") / "endless")
    model = kn.load(copy)
    entry = Checkpoint(copy).entries["language_model.lm_head.weight"]
    row = entry.nbytes // model.config.text_config.vocab_size
    with entry.file.open("r+b") as shard:
        for name in ("[EOS]", "<|im_end|>", "[EOT]"):
            shard.seek(entry.begin + row * model.tokenizer.special_tokens[name])
            shard.write(bytes(row))
    return copy


class Chat:
    """A running `kimi-native chat`, its output (stdout and stderr together) read by a thread."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            command("chat", *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
        )
        self.output, self.thread = b"", threading.Thread(target=self._read)
        self.thread.start()

    def _read(self):
        while block := self.process.stdout.read1():
            self.output += block

    def send(self, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def wait_until(self, what, start):
        """Waits until what(output from `start` on) is true and returns how much output there is."""
        deadline = time.monotonic() + 60
        while not what(self.output[start:]):
            assert time.monotonic() < deadline, f"waited in vain, output: {self.output[-2000:]!r}"
            assert self.process.poll() is None, f"left with {self.process.returncode}: {self.output[-2000:]!r}"
            time.sleep(0.01)
        return len(self.output)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.thread.join()
        self.process.stdin.close()
        self.process.stdout.close()


def test_interrupted_replies_and_end_of_input(endless):
    """Replies of 20,000 tokens would take half a minute; Ctrl-C ends each when some of its text has come."""
    arguments = ["--model", endless, "--max-new-tokens", 20000, *GREEDY]
    with Chat(*arguments) as session:
        at = session.wait_until(lambda text: text.endswith(b"> "), 0)
        for message in ("Hello", "And now?"):
            session.send(message)
            session.wait_until(lambda text: len(text) > 200, at)
            session.interrupt()
            session.wait_until(lambda text: b"(stopped)" in text and text.endswith(b"> "), at)
            reply, at = session.output[at:], len(session.output)
            assert b"Traceback" not in reply
            assert reply.count(b"(stopped)") == 1
        summary = re.search(rb"prompt (\d+) tokens \((\d+) cached\)", reply)
        assert 10 <= int(summary[2]) < int(summary[1])
        session.process.stdin.close()
        assert session.process.wait(60) == 0


def test_interrupt_at_the_prompt(endless):
    with Chat("--model", endless, "--max-new-tokens", 8, *GREEDY) as session:
        at = session.wait_until(lambda text: text.endswith(b"> "), 0)
        session.interrupt()
        at = session.wait_until(lambda text: b"/exit or Ctrl-D leaves" in text and text.endswith(b"> "), at)
        session.send("Hello")
        at = session.wait_until(lambda text: b"output 8 tokens" in text and text.endswith(b"> "), at)
        session.send("/exit")
        assert session.process.wait(60) == 0
        assert b"Traceback" not in session.output


def test_interrupted_generate(endless):
    """Ends the reply with its summary; what was said stays."""
    arguments = command("generate", "--model", endless, "Hello", "--max-new-tokens", 20000, *GREEDY)
    restore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **restore) as process:
        begin = process.stdout.read(50)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert len(begin) == 50
    assert out.endswith(b"\n")
    assert re.search(rb"output \d+ tokens", err)
    assert b"Traceback" not in err
