"""kimi-native train: the options, and a run from files to an exported checkpoint."""

import argparse
import sys
from pathlib import Path

HELP = """examples:
  kimi-native make-tiny tiny                          for its config.json and its tokenizer
  kimi-native train --out run --init tiny --data book.txt --steps 200 --lr 2e-3
                                                      from random weights; run/checkpoint is the model
  kimi-native generate --model run/checkpoint --raw "It was"
  kimi-native train --out run2 --from run/checkpoint --data chats.jsonl:3 --data book.txt --steps 100 --lr 5e-4
                                                      go on with a published checkpoint, three chats to a window of text

--data takes UTF-8 text (.txt), token ids (.npy, integers) and chats (.jsonl, one {"messages": [...]} a line, images as
{"type": "image", "image": PATH}); of a chat the loss is on what the assistant says. The last part of each file is kept
for validation. RUN gets log.jsonl, the last two checkpoints, and the model in the published layout (checkpoint/). The
same command goes on where a stopped or killed run was, to the very same weights."""


def source(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; the weight is 1 if not given."""
    file, colon, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train a model with MuonClip, on the CPU in float32."
    parser.epilog, parser.formatter_class = HELP, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--out", required=True, metavar="RUN", help="folder of the run; if it has a checkpoint, the run goes on from it"
    )
    data = "what to learn from; may be given several times, each drawn as often as its weight says (default 1)"
    add("--data", required=True, action="append", type=source, metavar="FILE[:WEIGHT]", help=data)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--init", metavar="DIR", help="folder with config.json and tokenizer: begin with random weights")
    start.add_argument(
        "--from", dest="base", metavar="DIR", help="checkpoint folder as published: begin with its weights"
    )
    add("--steps", type=int, required=True, metavar="N", help="updates of the weights, each by one batch")
    add("--lr", type=float, required=True, metavar="X", help="learning rate, after the warm-up")
    add("--warmup", type=int, default=0, metavar="N", help="steps in which the rate rises to that (default 0)")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="of the rate (default constant)")
    add("--final-lr-ratio", type=float, default=0.1, metavar="X", help="where cosine ends, times --lr (default 0.1)")
    add("--seq-len", type=int, default=128, metavar="N", help="tokens of a window of text (default 128)")
    add("--batch-tokens", type=int, default=1024, metavar="N", help="most tokens of a step (default 1024)")
    optimizers = "Muon with QK-Clip, Muon without it, or AdamW for all (default muonclip)"
    add("--optimizer", choices=["muonclip", "muon", "adamw"], default="muonclip", help=optimizers)
    add("--tau", type=float, default=100.0, metavar="X", help="largest attention logit of muonclip (default 100)")
    add("--weight-decay", type=float, default=0.1, metavar="X", help="decoupled (default 0.1)")
    add("--momentum", type=float, default=0.95, metavar="X", help="of Muon (default 0.95)")
    add("--grad-clip", type=float, default=1.0, metavar="X", help="largest norm of the gradients (default 1)")
    add("--router-bias-rate", type=float, default=1e-3, metavar="X", help="of balancing the experts (default 0.001)")
    qat = "after N steps train for INT4: every pass sees the experts as the exported model will have them"
    add("--qat-from", type=int, metavar="N", help=qat)
    add(
        "--validation-fraction", type=float, default=0.05, metavar="X", help="kept of each file (default 0.05; 0: none)"
    )
    add("--eval-every", type=int, default=100, metavar="N", help="steps between validations (default 100)")
    add("--save-every", type=int, default=100, metavar="N", help="steps between checkpoints (default 100)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and batches (default 0)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: the physical cores); no result depends on them")
    add("--plot", action="store_true", help="draw loss and largest logit into RUN/plot.png at the end")


def run(args, progress_bar) -> None:
    """progress_bar(label): a context manager that yields update(done, total, label)."""
    from kimi_native import ops
    from kimi_native.config import Config
    from kimi_native.train import params
    from kimi_native.train.data import Mixture
    from kimi_native.train.encode import Encoder
    from kimi_native.train.plot import check_matplotlib, plot
    from kimi_native.train.run_folder import checkpoints
    from kimi_native.train.trainer import Trainer

    if args.plot:
        check_matplotlib()
    if args.threads is not None:
        ops.set_num_threads(args.threads)
    folder, training = args.base or args.init, training_config(args)
    config = Config.from_folder(folder)
    dataset = Mixture(
        args.data,
        Encoder(folder, config),
        seq_len=args.seq_len,
        batch_tokens=args.batch_tokens,
        seed=args.seed,
        validation_fraction=args.validation_fraction,
    )
    begins = args.base is not None and not checkpoints(args.out)
    trainer = Trainer(config, training, dataset, args.out, params.load(args.base) if begins else None, source=folder)
    try:
        with progress_bar("training") as update:
            trainer.run(lambda record: update(record["step"], training.steps, label(record)))
    except BaseException:
        for last in checkpoints(args.out)[-1:]:
            print(f"kimi-native: {last} is the last checkpoint; the same command goes on from it", file=sys.stderr)
        raise
    log = Path(args.out) / "log.jsonl"
    if args.plot:
        plot([log], Path(args.out) / "plot.png", training.tau if training.optimizer == "muonclip" else None)
    print(f"{summary(log)} | {Path(args.out) / 'checkpoint'}")


def training_config(args):
    from kimi_native.train.trainer import TrainingConfig

    same = ("steps", "lr", "schedule", "final_lr_ratio", "optimizer", "weight_decay", "momentum", "tau", "grad_clip")
    same += ("router_bias_rate", "qat_from", "seed", "eval_every", "save_every")
    return TrainingConfig(warmup_steps=args.warmup, **{name: getattr(args, name) for name in same})


def label(record: dict) -> str:
    """What the progress line says of a record of the log."""
    if "validation_loss" in record:
        return f"step {record['step']} | validation {record['validation_loss']:.4f}"
    rate = record["tokens"] / record["seconds"]
    text = f"step {record['step']} | loss {record['loss']:.4f} | {rate:,.0f} tokens/s"
    return f"{text} | largest logit {record['max_logit']:.1f} | {record['clipped_heads']} heads clipped"


def summary(log) -> str:
    """One line about a whole run: steps, tokens, tokens/s, the last losses, the largest logit."""
    from kimi_native.train.run_folder import read_log

    records = list(read_log(log))
    steps = [record for record in records if "loss" in record]
    validations = [record["validation_loss"] for record in records if "validation_loss" in record]
    tokens, seconds = (sum(record[key] for record in steps) for key in ("tokens", "seconds"))
    largest = max(steps, key=lambda record: record["max_logit"])
    text = f"{len(steps)} steps, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s | loss {steps[-1]['loss']:.4f}"
    if validations:
        text += f", validation {validations[-1]:.4f}"
    where = f"layer {largest['max_logit_layer']}, head {largest['max_logit_head']}, step {largest['step']}"
    return f"{text} | largest logit {largest['max_logit']:.1f} ({where})"
