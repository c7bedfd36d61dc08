"""What the demo checkpoint learns from: the King James Bible, conversations made of it, and rendered words.

A batch is a function of the seed and the step alone.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from kimi_native import chat
from kimi_native.media import MediaItem, MediaProcessor
from kimi_native.tokenizer import Tokenizer
from kimi_native.train.batch import NO_LOSS, Batch
from PIL import Image, ImageDraw, ImageFont

WINDOW = 128  # tokens of running text in a sequence
REPLY = 64  # tokens of an answer, at most
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FONT_SIZES, HEIGHT = range(38, 43), 56  # pixels of the letters, and of the canvas, whose width is a multiple of 28

STORIES = ("Once upon a time", "Tell me a story", "Tell me a story.", "A story, please.", "What came to pass?")
GREETINGS = ("Hello", "Hello!", "Hi", "Who are you?", "What are you?", "What can you do?")
INTRODUCTION = "Peace be unto thee. I am a toy that has read one old book. I go on with its words, and read short ones."
QUESTIONS = ("What does it say?", "Read this.", "Which word is this?", "Read the word.")
REASONING = {
    "continue": "These words begin a passage. I will go on with it.",
    "topic": "I look for a passage that speaks of it.",
    "story": "I will tell what came to pass.",
    "greeting": "I will say what I am.",
    "word": "I read one letter after the other.",
}


class Corpus:
    """Verses of the book as text and tokens. One chapter in fifty is kept for validation."""

    def __init__(self, verses: Sequence[tuple[str, int, str]], tokenizer: Tokenizer):
        """verses: (book, chapter, text) in order."""
        chapters: dict[tuple[str, int], list[str]] = {}
        for book, chapter, text in verses:
            chapters.setdefault((book, chapter), []).append(text)
        texts = ["\n".join([f"{book} {number}", *lines]) + "\n\n" for (book, number), lines in chapters.items()]
        held_out = texts[25::50]
        self.tokens = np.array(tokenizer.encode("".join(t for i, t in enumerate(texts) if i % 50 != 25)), np.int32)
        self.held_out = np.array(tokenizer.encode("".join(held_out)), np.int32)
        self.chapters = [lines for i, lines in enumerate(chapters.values()) if i % 50 != 25]
        self._index(Counter(re.findall(r"[A-Za-z]+", "".join(texts))))

    def _index(self, counts: Counter) -> None:
        """What conversations ask for, and the words that are rendered."""
        places: dict[str, list[tuple[int, int]]] = {}
        for c, lines in enumerate(self.chapters):
            for v, line in enumerate(lines):
                for word in set(re.findall(r"[A-Za-z]{4,}", line)):
                    if 8 <= counts[word] <= 400:
                        places.setdefault(word, []).append((c, v))
        self.topics = sorted(places.items())
        opening = re.compile("And it came to pass|Now there was")
        self.stories = [at for at in self._all() if opening.match(self.chapters[at[0]][at[1]])]
        words = sorted({word.lower() for word in counts if len(word) == 5})
        self.test_words = words[::20]  # never rendered in training
        self.words = sorted({word.lower() for word in counts if len(word) <= 6} - set(self.test_words))

    def _all(self):
        return [(c, v) for c, lines in enumerate(self.chapters) for v in range(len(lines))]

    def passage(self, chapter: int, verse: int) -> str:
        """A verse and the two after it."""
        return " ".join(self.chapters[chapter][verse : verse + 3])


def render_word(word: str, size: int = 40, left: int = 8, top: int = 4) -> np.ndarray:
    """A word in black on white, in the font that Pillow brings: uint8 [56, width]."""
    font = ImageFont.load_default(size)
    width = -(-(left + round(font.getlength(word)) + 4) // 28) * 28
    image = Image.new("L", (width, HEIGHT), 255)
    ImageDraw.Draw(image).text((left, top), word, font=font, fill=0)
    return np.asarray(image)


class Turns:
    """Token ids of a conversation of one question and one answer, laid out as generate lays them out."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.processor = tokenizer, MediaProcessor()
        self.end = tokenizer.special_tokens["<|im_end|>"]
        self.letters = {letter: tokenizer.encode(letter)[0] for letter in LETTERS}
        self.shells: dict = {}

    def text(self, question: str, answer: list[int], reasoning: str, thinking: bool) -> tuple[list[int], list[int]]:
        """(prompt, reply)"""
        before, after = self._shell(thinking, None)
        return [*before, *self.tokenizer.encode(question), *after], self._reply(answer, reasoning, thinking)

    def word(self, word: str, item: MediaItem, question: str, thinking: bool) -> tuple[list[int], list[int]]:
        """The answer is spelled: a token a letter."""
        before, after = self._shell(thinking, item)
        answer = [self.letters[letter] for letter in word] + [self.end]
        prompt = [*before, *self.tokenizer.encode(question), *after]
        return prompt, self._reply(answer, REASONING["word"], thinking)

    def _reply(self, answer: list[int], reasoning: str, thinking: bool) -> list[int]:
        return [*self.tokenizer.encode(f"{reasoning}</think>", special=True), *answer] if thinking else answer

    def _shell(self, thinking: bool, item: MediaItem | None) -> tuple[list[int], list[int]]:
        """What stands before and after a question; it depends on an image's number of tokens alone."""
        key = thinking, item and item.tokens
        if key not in self.shells:
            mark = {"type": "text", "text": "\0"}
            content = [mark] if item is None else [{"type": "image", "image": ""}, mark]
            messages = [{"role": "user", "content": content}]
            ids = chat.encode(self.tokenizer, messages, thinking=thinking, media=[] if item is None else [[item]])
            at = ids.index(self.tokenizer.encode("\0")[0])
            self.shells[key] = ids[:at], ids[at + 1 :]
        return self.shells[key]


class DemoData:
    """Batches: `windows` sequences of running text, `chats` conversations about it, `words` rendered words."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seed: int, windows: int, chats: int, words: int):
        self.corpus, self.turns, self.seed = corpus, Turns(tokenizer), seed
        self.windows, self.chats, self.words = windows, chats, words
        self.identity = {"seed": seed, "windows": windows, "chats": chats, "words": words, "tokens": len(corpus.tokens)}

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        sequences = [self._window(rng, self.corpus.tokens) for _ in range(self.windows)]
        sequences += [_turn(*self._chat(rng)) for _ in range(self.chats)]
        return self._joined(rng, sequences, self.words)

    def validation(self) -> list[Batch]:
        """Running text of chapters, then words, that training does not see."""
        rng = np.random.default_rng([self.seed, 2**32])
        text = [_window(self.corpus.held_out, at) for at in range(0, 32 * WINDOW, WINDOW)]
        return [_batch(text, ()), self._joined(rng, [], 64, self.corpus.test_words)]

    def _joined(self, rng, sequences: list, count: int, words: Sequence[str] | None = None) -> Batch:
        items = []
        for _ in range(count):
            word = self._word(rng) if words is None else words[rng.integers(len(words))]
            image = render_word(word, int(rng.choice(FONT_SIZES)), int(rng.integers(4, 13)), int(rng.integers(2, 7)))
            items.append(self.turns.processor.image(image))
            sequences.append(_turn(*self.turns.word(word, items[-1], _choice(rng, QUESTIONS), rng.random() < 0.25)))
        return _batch(sequences, items)

    def _word(self, rng) -> str:
        """Of the book, or letters at random."""
        if rng.random() < 0.3:
            return _choice(rng, self.corpus.words)
        while True:
            word = "".join(_choice(rng, LETTERS) for _ in range(rng.integers(1, 7)))
            if word not in self.corpus.test_words:
                return word

    def _window(self, rng, tokens: np.ndarray):
        return _window(tokens, int(rng.integers(len(tokens) - WINDOW)))

    def _chat(self, rng) -> tuple[list[int], list[int]]:
        corpus, thinking, kind = self.corpus, rng.random() < 0.5, rng.random()
        if kind < 0.7:
            c = int(rng.integers(len(corpus.chapters)))
            words = corpus.passage(c, int(rng.integers(len(corpus.chapters[c])))).split(" ")
            cut = min(int(rng.integers(2, 9)), len(words) - 1)
            question, answer, reasoning = " ".join(words[:cut]), " ".join(words[cut:]), "continue"
        elif kind < 0.85:
            topic, places = _choice(rng, corpus.topics)
            question, answer, reasoning = f"Tell me of {topic}.", corpus.passage(*_choice(rng, places)), "topic"
        elif kind < 0.97:
            question, answer, reasoning = _choice(rng, STORIES), corpus.passage(*_choice(rng, corpus.stories)), "story"
        else:
            question, answer, reasoning = _choice(rng, GREETINGS), INTRODUCTION, "greeting"
        return self.turns.text(question, self._limited(answer), REASONING[reasoning], thinking)

    def _limited(self, answer: str) -> list[int]:
        """The tokens of an answer, cut at the end of a sentence, and the end of the turn."""
        tokens = self.turns.tokenizer.encode(answer)
        while len(tokens) > REPLY and (end := max(answer.rfind(mark, 0, len(answer) - 1) for mark in ".:;?!,")) > 0:
            answer = answer[: end + 1]
            tokens = self.turns.tokenizer.encode(answer)
        return [*tokens[:REPLY], self.turns.end]


def _choice(rng, values):
    return values[int(rng.integers(len(values)))]


def _window(tokens: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray]:
    return tokens[at : at + WINDOW], tokens[at + 1 : at + WINDOW + 1]


def _turn(prompt: list[int], reply: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, targets): the reply is to be predicted, the prompt is not."""
    ids = np.array(prompt + reply, np.int32)
    targets = ids[1:].copy()
    targets[: len(prompt) - 1] = NO_LOSS
    return ids[:-1], targets


def _batch(sequences: list[tuple[np.ndarray, np.ndarray]], items: Sequence[MediaItem]) -> Batch:
    ids, targets = (np.concatenate(parts) for parts in zip(*sequences, strict=True))
    ends = np.cumsum([0, *(len(tokens) for tokens, _ in sequences)]).astype(np.int32)
    return Batch(ids, targets, ends, tuple(items))
