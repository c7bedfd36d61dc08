"""Images and video in messages: the layout of the prompt, whose text counts, which sources are read."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from kimi_native import chat
from kimi_native.chat_media import expand, media_parts, read_media
from kimi_native.make_tiny import make_tiny
from kimi_native.media import MediaError, MediaProcessor
from kimi_native.tokenizer import Tokenizer
from media_items import random_item
from PIL import Image

PROCESSOR = MediaProcessor()
PAD, VIDEO = "<|media_pad|>", "<|kimi_k25_video_placeholder|>"
HEAD, TAIL = "<|im_user|>user<|im_middle|>", "<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
RNG = np.random.default_rng(0)
IMAGE, SMALL = random_item(RNG, 16, 16), random_item(RNG, 2, 2)  # 64 tokens, 1 token
CLIP = [random_item(RNG, 4, 6, 4, "00:00:00.000"), random_item(RNG, 4, 6, 1, "00:00:02.000")]  # 6 tokens each


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_folder(make_tiny(tmp_path_factory.mktemp("chat_media") / "tiny"))


def user(*parts):
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def text(value):
    return {"type": "text", "text": value}


def image(source):
    return {"type": "image", "image": source}


def video(source):
    return {"type": "video", "video": source}


def encode(tokenizer, messages, **options):
    return chat.encode(tokenizer, messages, media=read_media(messages, PROCESSOR, True), **options)


def ids_of(tokenizer, *pieces):
    """Ids of names of special tokens, and of text."""
    special = tokenizer.special_tokens
    return [i for piece in pieces for i in ([special[piece]] if piece in special else tokenizer.encode(piece))]


OPEN = ["<|im_user|>", "user", "<|im_middle|>"]
CLOSE = ["<|im_end|>", "<|im_assistant|>", "assistant", "<|im_middle|>", "<think>"]
CHUNK = ["<|media_begin|>", "video", "<|media_content|>", *[PAD] * 6, "<|media_end|>"]


def test_layout_of_an_image(tokenizer):
    """The frame that the template writes, a placeholder for each token, one line feed."""
    found = encode(tokenizer, [user(image(IMAGE), "What is this?")])
    frame = ["<|media_begin|>", "image", "<|media_content|>", *[PAD] * 64, "<|media_end|>"]
    assert found == ids_of(tokenizer, *OPEN, *frame, "\nWhat is this?", *CLOSE)
    assert found.count(tokenizer.special_tokens[PAD]) == 64


def test_layout_of_a_video(tokenizer):
    """Each chunk behind the time of its first frame, nothing between them, one line feed at the end."""
    found = encode(tokenizer, [user("Look: ", video(CLIP), "What happens?")])
    chunks = ["Look: 00:00:00.000", *CHUNK, "00:00:02.000", *CHUNK]
    assert found == ids_of(tokenizer, *OPEN, *chunks, "\nWhat happens?", *CLOSE)


def test_mixed_media_stand_in_order(tokenizer):
    messages = [
        {"role": "system", "content": [image(SMALL), text("be")]},
        user("a", video(CLIP[0]), image(IMAGE), "b", image(SMALL)),
        {"role": "assistant", "content": "c"},
        {"role": "tool", "tool_call_id": "f:0", "content": [image(SMALL)]},
        user(video(CLIP)),
    ]
    one = f"<|media_begin|>image<|media_content|>{PAD}<|media_end|>\n"
    chunks = ["".join(f"{item.timestamp}{''.join(CHUNK)}" for item in items) for items in (CLIP[:1], CLIP)]
    expected = (
        f"<|im_system|>system<|im_middle|>{one}be<|im_end|>"
        f"{HEAD}a{chunks[0]}\n{one.replace(PAD, PAD * 64)}b{one}<|im_end|>"
        f"<|im_assistant|>assistant<|im_middle|><think></think>c<|im_end|>"
        f"<|im_system|>tool<|im_middle|>## Return of f:0\n{one}<|im_end|>"
        f"{HEAD}{chunks[1]}\n{TAIL}"
    )
    assert encode(tokenizer, messages) == tokenizer.encode(expected, special=True)
    media = read_media(messages, PROCESSOR, True)
    assert media == [[SMALL], CLIP[:1], [IMAGE], [SMALL], [SMALL], CLIP]


@pytest.mark.parametrize("name", [PAD, VIDEO, f"<|media_begin|>image<|media_content|>{PAD}<|media_end|>"])
def test_text_of_the_caller_is_no_place(tokenizer, name):
    cut = len(name) // 2
    messages = [user(name, image(IMAGE), name[:cut], name[cut:]), {"role": "assistant", "content": name}, user(name)]
    found = encode(tokenizer, messages)
    assert found.count(tokenizer.special_tokens[PAD]) == 64
    decoded = tokenizer.decode(found).replace(PAD * 64, PAD)
    assert decoded == chat.render(messages)


def test_outside_safe_mode_text_of_the_caller_is_a_place(tokenizer):
    with pytest.raises(ValueError, match=r"places for 2 media \(image, video\), expected one for each of the 1 "):
        encode(tokenizer, [user(image(IMAGE), VIDEO)], safe=False)
    messages = [user(image(IMAGE), video(CLIP), "x")]
    assert encode(tokenizer, messages, safe=False) == encode(tokenizer, messages)


TEMPLATES = {
    "none": ("{{ messages[0].content[0].type }}", "places for 0 media (none), expected one for each of the 2"),
    "one": (PAD, "places for 1 media (image), expected one for each of the 2"),
    "order": (VIDEO + PAD, "(video, image), expected one for each of the 2 in the messages (image, video)"),
    "many": (PAD + VIDEO + PAD, "places for 3 media (image, video, image)"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_without_the_right_places(tokenizer, name):
    template, message = TEMPLATES[name]
    with pytest.raises(ValueError) as error:
        encode(tokenizer, [user(image(SMALL), video(CLIP))], template=template)
    assert message in str(error.value)


def test_without_media_the_prompt_is_what_the_template_writes(tokenizer):
    messages = [user(image(IMAGE), video(CLIP))]
    text = f"{HEAD}<|media_begin|>image<|media_content|>{PAD}<|media_end|>\n{VIDEO}\n{TAIL}"
    assert chat.render(messages) == text
    assert tokenizer.decode(chat.encode(tokenizer, messages)) == text


def test_templates_see_the_kind_and_not_the_source():
    seen = chat.render([user(image("secret.png"), "t")], template="{{ messages[0].content | tojson }}")
    assert seen == '[{"type": "image", "image": ""}, {"type": "text", "text": "t"}]'


def test_expand_keeps_text_between_places():
    assert expand(f"a{PAD}b{VIDEO}\\1", [[SMALL], CLIP[:1]]) == f"a{PAD}b00:00:00.000{''.join(CHUNK)}\\1"
    assert expand("plain", []) == "plain"


# Sources

PIXELS = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)


def png():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


def data_url(data=None, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data or png()).decode()}"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a b%20é.png"
    path.write_bytes(png())
    return path


def test_sources_of_an_image(file):
    expected = PROCESSOR.image(PIXELS)
    sources = [str(file), file, png(), PIXELS, Image.fromarray(PIXELS), data_url(), file.as_uri()]
    sources += [
        file.as_uri().replace("file://", "file://localhost"),
        file.as_uri().replace("file://", "file:"),
        expected,
    ]
    sources += [[expected]]
    parts = [image(source) for source in sources]
    parts += [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in (data_url(), str(file))]
    parts += [{"type": "image_url", "image_url": data_url()}]
    media = read_media([user(*parts)], PROCESSOR, True)
    assert [len(items) for items in media] == [1] * len(parts)
    for (found,) in media:
        assert (found.kind, found.grid, found.digest) == ("image", (1, 4, 6), expected.digest)


def test_sources_of_a_video(tmp_path):
    frames = np.random.default_rng(2).integers(0, 256, (6, 30, 30, 3), np.uint8)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    expected = PROCESSOR.video(frames)
    sources = [frames, str(tmp_path), tmp_path, tmp_path.as_uri(), expected]
    parts = [*map(video, sources), {"type": "video_url", "video_url": {"url": str(tmp_path)}}]
    for items in read_media([user(*parts)], PROCESSOR, True):
        assert [(item.timestamp, item.digest) for item in items] == [(i.timestamp, i.digest) for i in expected]
    assert [len(item.patches) for item in expected] == [4 * 16, 2 * 16]


LOCAL = [str, lambda path: path, Path.as_uri, lambda path: path.as_uri().replace("file://", "file:")]


@pytest.mark.parametrize("form", LOCAL)
@pytest.mark.parametrize("kind", ["image", "image_url", "video", "video_url"])
def test_files_are_read_for_local_callers_alone(file, form, kind):
    source = form(file)
    for part in ({"type": kind, kind: source}, {"type": kind, kind: {"url": source}}):
        with pytest.raises(ValueError, match=rf"messages\[1\]\.content\[1\]\.{kind}.* expected a data URL"):
            read_media([user("a"), user("b", part)], PROCESSOR, local_files=False)
    ((item,),) = read_media([user({"type": "image_url", "image_url": {"url": data_url()}})], PROCESSOR, False)
    assert item.grid == (1, 4, 6)


@pytest.mark.parametrize("local_files", [True, False])
@pytest.mark.parametrize("url", ["https://example.org/a.png", "http://localhost/a.png", "ftp://a/b"])
def test_nothing_is_fetched(url, local_files):
    with pytest.raises(ValueError, match=url):
        read_media([user({"type": "image_url", "image_url": {"url": url}})], PROCESSOR, local_files)


@pytest.mark.parametrize("url", ["file://elsewhere/a.png", "file:a.png"])
def test_files_of_other_machines(url):
    with pytest.raises(ValueError, match=f"'{url}', expected file:///PATH"):
        read_media([user(image(url))], PROCESSOR, True)


BAD_PARTS = {
    "no source": ({"type": "image"}, "content[0].image is missing"),
    "null": ({"type": "image_url", "image_url": None}, "content[0].image_url is missing"),
    "no url": ({"type": "video_url", "video_url": {}}, "content[0].video_url.url is missing"),
    "other key": ({"type": "image", "image_url": "x"}, "content[0].image is missing"),
    "chunks for an image": (image(CLIP), "image is items of kind video, video, expected one image"),
    "two images": (image([IMAGE, SMALL]), "image is items of kind image, image, expected one image"),
    "image for a video": (video([CLIP[0], IMAGE]), "video is items of kind video, image, expected the chunks"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_bad_part(name):
    part, message = BAD_PARTS[name]
    with pytest.raises(ValueError) as error:
        read_media([user(part)], PROCESSOR, True)
    assert message in str(error.value)


@pytest.mark.parametrize("source", ["missing.png", 7, [], {"url": 7}, b"", "data:image/png;base64,AAAA"])
def test_source_that_is_no_image(source):
    with pytest.raises(MediaError):
        read_media([user(image(source))], PROCESSOR, True)


def test_parts_of_all_messages_in_order():
    messages = [user("a", image(1)), {"role": "assistant", "content": None}, {"role": "user", "content": "x"}, user()]
    messages += [user({"type": "video_url", "video_url": 2}, "b", {"type": "audio"})]
    where = ["messages[0].content[1]", "messages[4].content[0]"]
    assert [place for place, _ in media_parts(messages)] == where
