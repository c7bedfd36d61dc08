"""The checkpoint that ships with the package: it is small, runs, answers in form, and reads."""

import kimi_native as kn
import numpy as np
import pytest
from kimi_native.__main__ import main
from kimi_native.info import describe
from kimi_native.model import DEMO
from PIL import Image, ImageDraw, ImageFont

LIMIT = 12_000_000  # bytes, in the repository and in the wheel
# Training has seen a picture of none of them.
WORDS = [
    "altar",
    "angle",
    "arise",
    "begin",
    "breed",
    "catch",
    "coast",
    "dance",
    "eight",
    "empty",
    "false",
    "frost",
    "glory",
    "grass",
    "heath",
    "knees",
    "mouse",
    "night",
    "pearl",
    "swift",
]
PINNED = "And it came to pass, when the king of Israel had made an end of speaking unto the king of Israel,"


@pytest.fixture(scope="module")
def model():
    return kn.load()


def draw(word):
    """Black on white, in the font that Pillow brings: uint8 [56, 168, 3]."""
    image = Image.new("RGB", (168, 56), "white")
    ImageDraw.Draw(image).text((8, 4), word, font=ImageFont.load_default(40), fill="black")
    return np.asarray(image)


def test_it_is_small_and_complete():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < LIMIT
    found = describe(DEMO)
    assert found.has_weights and not (found.missing or found.unexpected or found.mismatched)


def test_it_has_the_architecture(model):
    c = model.config.text_config
    assert (c.n_routed_experts, c.num_experts_per_tok, c.n_shared_experts, c.first_k_dense_replace) == (32, 8, 1, 1)
    assert c.quantization_config.num_bits == 4 and model.config.architectures == ("KimiK25ForConditionalGeneration",)
    assert c.rope_scaling is not None and model.vision is not None


def test_greedy_output_is_pinned(model, isa):
    assert kn.generate(model, "Once upon a time", max_new_tokens=24, temperature=0, thinking=False) == PINNED


@pytest.mark.parametrize("thinking", [True, False])
def test_it_answers_in_form(model, thinking):
    for prompt in ("Once upon a time", "Tell me of David.", "Who are you?", "In the beginning God created"):
        text = kn.generate(model, prompt, max_new_tokens=160, temperature=0, thinking=thinking)
        reply = kn.parse_reply(text, thinking=thinking)
        assert reply.content.strip() and bool(reply.reasoning_content) == thinking, text


@pytest.mark.parametrize("thinking", [True, False])
def test_it_reads_words(model, thinking):
    """At least eight of ten."""
    options = {"max_new_tokens": 40, "temperature": 0, "thinking": thinking}
    texts = [kn.generate(model, "What does it say?", images=[draw(word)], **options) for word in WORDS]
    read = [kn.parse_reply(text, thinking=thinking).content for text in texts]
    right = sum(found == word for found, word in zip(read, WORDS, strict=True))
    assert len(WORDS) == 20 and right >= 16, list(zip(WORDS, read, strict=True))


def test_it_answers_from_the_command_line(capsys):
    assert main(["generate", "Once upon a time", "--seed", "1", "--instant"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.split()) > 5 and "demo" in shown.err and "tokens/s" in shown.err
