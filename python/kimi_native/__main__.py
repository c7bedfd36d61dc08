"""kimi-native generate | chat | info | make-tiny | train"""

import argparse
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kimi_native import chat, ops
from kimi_native.chat_media import media_parts, read_media
from kimi_native.generate import Stats, check_limits, encode_prompt, stream, stream_ids
from kimi_native.info import describe, show
from kimi_native.make_tiny import PRESETS, make_tiny
from kimi_native.media import MediaItem
from kimi_native.model import DEMO, Model
from kimi_native.sampling import SamplingParams
from kimi_native.train import command as train

ERR = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

CHAT_HELP = """/image PATH   show an image with the next message
/video PATH   the same with a video, or a folder of its frames
/clear        forget the conversation
/think        reason before answering (the model's default)
/instant      answer at once
/help         this list
/exit         leave (also Ctrl-D); Ctrl-C stops a reply and keeps the conversation"""


@contextmanager
def progress_bar(label: str):
    """Yields progress(done, total, label); the bar appears on stderr once the work has taken a second."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=ERR, transient=True)
    task, due = bar.add_task(label, total=None), time.monotonic() + 1

    def update(done: int, total: int, label: str = label) -> None:
        nonlocal due
        if time.monotonic() > due:
            bar.start()
            bar.update(task, completed=done, total=total, description=label)
            due += 0.1

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        default=DEMO,
        metavar="DIR",
        help="checkpoint folder as published (default: the toy that ships with this package, to see everything run)",
    )
    add("--max-new-tokens", type=int, default=1024, metavar="N", help="longest reply (default 1024)")
    add("--instant", action="store_true", help="answer without reasoning first")
    add(
        "--temperature",
        type=float,
        metavar="X",
        help="0 takes the most likely token (default 1.0; 0.6 with --instant)",
    )
    add(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="keep the most likely tokens up to this sum (default 0.95)",
    )
    add("--top-k", type=int, default=0, metavar="K", help="keep the K most likely tokens (default 0: all)")
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="keep tokens of at least P times the best (default 0)",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1 discourages tokens already seen",
    )
    add(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="subtracted from logits of tokens in the reply",
    )
    add("--frequency-penalty", type=float, default=0.0, metavar="X", help="the same, per occurrence")
    add("--seed", type=int, metavar="N", help="same seed, same reply (default: a fresh one)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the reply here; may be given several times",
    )
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where the model runs (default cpu); cuda copies the weights to the GPU and needs CuPy",
    )
    add(
        "--experts",
        choices=["cpu"],
        help="with --device cuda: the routed experts, 96%% of the bytes, stay in host memory and run on the CPU",
    )
    add(
        "--activations",
        choices=["int16", "int8", "float32"],
        default="int16",
        help="what INT4 experts on the CPU are multiplied by: int16 (default, finer than bfloat16), int8 (faster, 1%% "
        "error a layer), float32 (exact, slower); with integers, attention of new tokens to a bfloat16 cache is int16",
    )
    add(
        "--dense",
        choices=["bfloat16", "int8"],
        default="bfloat16",
        help="int8, on the CPU: round the matrices outside the experts while loading, to read half the bytes a token",
    )
    add("--cache-dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the latent cache")
    add(
        "--expert-cache",
        metavar="SIZE",
        help="memory for routed experts, as in 12GB; others are read when chosen (default: what is available, or all "
        "stay mapped if they fit; 0: they stay mapped)",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads (default: the physical cores this process may use)",
    )


def sampling_options(args) -> dict:
    default = 0.6 if args.instant else 1.0
    return {
        "temperature": default if args.temperature is None else args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "seed": args.seed,
    }


def load(args) -> Model:
    if args.threads is not None:
        ops.set_num_threads(args.threads)
    if args.model == DEMO:
        ERR.print(
            "no --model given: the demo answers, a toy of this architecture that has read one old book", style="dim"
        )
    with progress_bar("loading") as progress:
        return Model.load(
            args.model,
            device=args.device,
            experts=args.experts,
            activations=args.activations,
            dense=args.dense,
            cache_dtype=args.cache_dtype,
            expert_cache=args.expert_cache,
            progress=progress,
        )


def run_generate(args) -> None:
    model, stats = load(args), Stats()
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    media = [media_part(model, kind, path) for kind, path in args.media]
    if not args.raw:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        prompt = [*system, user_message(media, prompt)]
    elif media:
        raise ValueError("--raw continues plain text, which has no place for --image or --video; leave out one of them")
    try:
        pieces = prompt_bar(
            media,
            lambda **progress: stream(
                model,
                prompt,
                args.max_new_tokens,
                stop=args.stop,
                raw=args.raw,
                thinking=not args.instant,
                stats=stats,
                **progress,
                **sampling_options(args),
            ),
        )
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass  # what was said so far stands, and the summary says what it took
    print(flush=True)
    show_summary(model, stats)


def show_summary(model: Model, stats: Stats) -> None:
    experts = f" | {model.expert_cache.summary()}" if model.expert_cache is not None else ""
    ERR.print(stats.summary() + experts, style="dim")


def media_part(model: Model, kind: str, path: str) -> dict:
    """The file as a part of a message, read now: what becomes of it until the message is sent does not matter."""
    model.check_vision()
    part = {"type": kind, kind: str(Path(path).expanduser())}
    (items,) = read_media([{"content": [part]}], model.media_processor, local_files=True)
    return {"type": kind, kind: items}


def user_message(media: list[dict], text: str) -> dict:
    return {"role": "user", "content": [*media, {"type": "text", "text": text}] if media else text}


def encoding_label(new: list[MediaItem], media: list[MediaItem]) -> str:
    """As in "encoding image 1 of 2: 1,036 tokens"; a video counts by its chunks."""
    kinds, digests = {item.kind for item in new}, {item.digest for item in new}
    name = {("image",): "image", ("video",): "video chunk"}.get(tuple(kinds), "item")
    asked = [item.digest in digests for item in media if item.kind in kinds]
    first, last = asked.index(True) + 1, len(asked) - asked[::-1].index(True)
    which = f"{name} {first}" if first == last else f"{name}s {first} to {last}"
    return f"encoding {which} of {len(asked)}: {sum(item.tokens for item in new):,} tokens"


def prompt_bar(parts: list[dict], start):
    """The pieces of start(progress=, media_progress=), with a progress bar until the first of them is there."""
    media = [item for part in parts for item in part[part["type"]]]
    with progress_bar("prompt") as progress:

        def media_progress(items, done, total):
            progress(done, total, encoding_label(items, media))

        pieces = start(progress=progress, media_progress=media_progress)
        first = next(pieces, "")
    yield first
    yield from pieces


def run_chat(args) -> None:
    SamplingParams(**sampling_options(args))
    check_limits(args.max_new_tokens, args.stop)
    model = load(args)
    encode_prompt(model, "")  # refuses a checkpoint without a tokenizer
    context = min(args.context, model.config.text_config.max_position_embeddings)
    session = Session(model, model.new_cache(context), args)
    ERR.print(
        f"{args.model}: context {context:,} tokens, {ops.num_threads()} threads. /help lists commands.",
        style="dim",
    )
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")
            continue
        if line == "/exit":
            return
        if line.startswith("/"):
            session.command(line)
        elif line:
            session.reply(line)


class Session:
    """A conversation: its messages, and the cache that holds what of them has been computed."""

    def __init__(self, model: Model, cache, args):
        self.model, self.cache, self.args = model, cache, args
        self.thinking = not args.instant
        self.clear()

    def clear(self) -> None:
        system, self.attached = self.args.system, []
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def command(self, line: str) -> None:
        if line == "/clear":
            self.clear()
        elif line in ("/think", "/instant"):
            self.thinking = line == "/think"
        elif line.startswith(("/image ", "/video ")):
            command, _, path = line.partition(" ")
            self.attach(command[1:], path.strip())
        else:
            print(CHAT_HELP)

    def attach(self, kind: str, path: str) -> None:
        try:
            part = media_part(self.model, kind, path)
        except (ValueError, OSError) as error:
            ERR.print(str(error), style="red")
            return
        self.attached.append(part)
        tokens = sum(item.tokens for item in part[kind])
        ERR.print(f"{path}: {tokens:,} tokens, shown with your next message", style="dim")

    def reply(self, text: str) -> None:
        """Stream the answer to one message. Broken off by Ctrl-C, what was said so far stays in the conversation."""
        messages, self.attached = [*self.messages, user_message(self.attached, text)], []
        stats, reply = Stats(), chat.Reply()
        parser = chat.ReplyParser(thinking=self.thinking)
        try:
            for piece in self._pieces(messages, stats):
                self._show(parser.push(piece), reply)
        except KeyboardInterrupt:
            ERR.print("(stopped)", style="dim")
        except ValueError as error:
            ERR.print(f"{error}. /clear starts anew; --context sets the room.", style="red")
            return
        self._show(parser.finish(), reply)
        print()
        show_summary(self.model, stats)
        self.messages = [*messages, reply.to_message()]

    def _pieces(self, messages: list[dict], stats: Stats):
        prompt = encode_prompt(self.model, messages, thinking=self.thinking)
        return prompt_bar(
            [part for _, part in media_parts(messages)],
            lambda **progress: stream_ids(
                self.model,
                prompt.token_ids,
                self.args.max_new_tokens,
                stop=self.args.stop,
                cache=self.cache,
                stats=stats,
                media=prompt.media,
                **progress,
                **sampling_options(self.args),
            ),
        )

    def _show(self, events, reply: chat.Reply) -> None:
        for event in events:
            reply.add(event)
            if isinstance(event, chat.ToolCall):
                print(f"[{event.name} {event.arguments}]")
            elif event.kind == "reasoning_content" and sys.stdout.isatty():
                print(f"\033[2m{event.text}\033[0m", end="", flush=True)
            else:
                print(event.text, end="", flush=True)


def run_info(args) -> None:
    with progress_bar("reading headers") as progress:
        description = describe(args.model, progress)
    show(description)


def run_make_tiny(args) -> None:
    with progress_bar("writing tensors") as progress:
        folder = make_tiny(args.folder, args.preset, seed=args.seed, experts=args.experts, progress=progress)
    print(f'{folder} written. Try: kimi-native generate --model {folder} "Hello"')


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(
        prog="kimi-native",
        description="Run Kimi K2.5 checkpoints as they lie on disk, on the CPU or an NVIDIA GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = commands.add_parser("generate", help="answer one prompt", description="Stream the reply to one prompt.")
    p.add_argument("prompt", help='a user message; "-" reads it from standard input')
    media = {"dest": "media", "action": "append", "default": [], "metavar": "PATH"}  # one list, in the order given
    image = "show the model an image before the prompt; may be given several times, as may --video"
    video = "the same with a video file, or a folder of its frames; two frames a second are shown"
    p.add_argument("--image", type=lambda path: ("image", path), help=image, **media)
    p.add_argument("--video", type=lambda path: ("video", path), help=video, **media)
    p.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    p.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    add_generation_options(p)
    p.set_defaults(run=run_generate)

    p = commands.add_parser(
        "chat",
        help="talk to the model",
        description="Interactive chat.",
        epilog=CHAT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--context",
        type=int,
        default=32768,
        metavar="N",
        help="tokens the conversation may hold (default 32768)",
    )
    p.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    add_generation_options(p)
    p.set_defaults(run=run_chat)

    p = commands.add_parser(
        "info",
        help="what a checkpoint is",
        description="Parameters and bytes by component, active "
        "parameters, cache per token, quantization, missing and unexpected tensors.",
    )
    p.add_argument("model", metavar="DIR", help="checkpoint folder; config.json alone will do")
    p.set_defaults(run=run_info)

    p = commands.add_parser(
        "make-tiny",
        help="write a random checkpoint to try things on",
        description="Write a random checkpoint in the published layout. It speaks gibberish.",
    )
    p.add_argument("folder", metavar="DIR", help="folder to create; must not exist")
    p.add_argument(
        "--preset",
        choices=PRESETS,
        default="tiny",
        help="default: tiny, 2 MB; full-width: one real MoE layer, "
        "sparse; small: 0.6 GB to time; full-size: the published 595 GB as a sparse file of zeros",
    )
    p.add_argument("--experts", choices=["int4", "bf16"], default="int4", help="format of the routed experts")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=run_make_tiny)

    p = commands.add_parser("train", help="train a model, or go on with one")
    train.add_options(p)
    p.set_defaults(run=lambda args: train.run(args, progress_bar))
    return main_parser


EXAMPLES = """examples:
  kimi-native generate "Once upon a time"             one reply, of the toy that ships with this package
  kimi-native make-tiny tiny                          a random checkpoint in the published layout
  kimi-native generate --model tiny "Hello"           one reply
  kimi-native generate --model /models/Kimi-K2.5 --image photo.jpg "What is this?"
  kimi-native chat --model /models/Kimi-K2.5          a conversation
  kimi-native chat --model /models/Kimi-K2.5 --device cuda --experts cpu
                                                      the same, attention on the GPU
  kimi-native info /models/Kimi-K2.5                  parameters, bytes, missing tensors
  kimi-native train --out run --init tiny --data book.txt --steps 200 --lr 2e-3
                                                      a model of your own; train --help says more"""


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    # RuntimeError and MemoryError come from the GPU, FloatingPointError from training
    except (ValueError, OSError, RuntimeError, MemoryError, FloatingPointError) as error:
        print(f"kimi-native: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
