"""kimi-native train: from files on disk to a checkpoint that the other commands take."""

import json
import re

import kimi_native as kn
import numpy as np
import pytest
from kimi_native import __main__ as cli
from kimi_native.train import backward, params
from kimi_native.train.command import label, source
from kimi_native.train.run_folder import read_log
from PIL import Image
from small import small_folder

TEXT = "\n".join(f"Scene {i}. Enter a ghost, and speaks: remember me {i % 7} times." for i in range(120))
SUMMARY = r"(\d+) steps, [\d,]+ tokens, [\d,]+ tokens/s \| loss [\d.]+, validation [\d.]+ \| largest logit "
SUMMARY += r"[\d.]+ \(layer \d, head \d, step \d+\) \| .*checkpoint\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("command") / "model")


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    return tmp_path / "book.txt"


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit status, stdout, stderr) of kimi-native train."""

    def call(*arguments):
        try:
            status = cli.main(["train", *map(str, arguments)])
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    return call


def options(out, model, *data, steps=4, **others):
    named = {"out": out, "init": model, "steps": steps, "lr": 1e-2, "batch-tokens": 64, "seq-len": 16} | others
    pairs = [*named.items(), *(("data", file) for file in data)]
    return [word for name, value in pairs if value is not None for word in (f"--{name}", value)]


def test_train_and_generate(run, tmp_path, model, book):
    status, out, err = run(*options(tmp_path / "run", model, book, steps=6), "--plot")
    assert (status, err) == (0, "")
    assert re.fullmatch(SUMMARY, out)[1] == "6"
    assert [r["step"] for r in read_log(tmp_path / "run" / "log.jsonl") if "loss" in r] == [1, 2, 3, 4, 5, 6]
    with Image.open(tmp_path / "run" / "plot.png") as image:
        assert image.format == "PNG"
    status = cli.main(
        ["generate", "--model", str(tmp_path / "run" / "checkpoint"), "--raw", "Scene", "--max-new-tokens", "4"]
    )
    assert status == 0


def test_options_reach_the_run(run, tmp_path, model, book):
    """--from begins with the weights of a checkpoint; the log has the rates, the data their shares."""
    assert run(*options(tmp_path / "a", model, book))[0] == 0
    start = params.load(tmp_path / "a" / "checkpoint")
    others = {"init": None, "from": tmp_path / "a" / "checkpoint", "warmup": 2, "schedule": "cosine", "save-every": 1}
    others |= {"final-lr-ratio": 0.5, "optimizer": "adamw", "eval-every": 2, "qat-from": 2, "seed": 3}
    np.save(tmp_path / "t.npy", np.full(500, 77))
    data = [f"{book}:1", f"{tmp_path / 't.npy'}:3"]
    assert run(*options(tmp_path / "b", None, *data, **others))[0] == 0
    records = list(read_log(tmp_path / "b" / "log.jsonl"))
    assert [record["lr"] for record in records if "loss" in record] == [0.005, 0.01, 0.01, 0.0075]
    assert [record["step"] for record in records if "validation_loss" in record] == [2, 4]
    with np.load(tmp_path / "b" / "step-00000003.npz") as arrays:
        state = json.loads(str(arrays["state"]))
        assert "optimizer/second_moment.lm_head.weight" in arrays.files
        assert "optimizer/momentum.lm_head.weight" not in arrays.files
    training, data = state["identity"]["training"], state["identity"]["data"]
    assert training["qat_from"] == 2 and training["seed"] == data["seed"] == 3 and training["optimizer"] == "adamw"
    assert [file["weight"] for file in data["files"]] == [1, 3]
    moved = np.abs(
        params.load(tmp_path / "b" / "checkpoint")["model.embed_tokens.weight"] - start["model.embed_tokens.weight"]
    )
    assert 0 < moved.max() < 0.1


def test_the_same_command_goes_on(run, tmp_path, model, book, monkeypatch):
    """Ctrl-C says where the last checkpoint is; then the run ends as an uninterrupted one does."""
    arguments = options(tmp_path / "run", model, book, **{"save-every": 2})
    gradients, calls = backward.loss_and_gradients, []

    def interrupted(*rest):
        calls.append(rest)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return gradients(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(backward, "loss_and_gradients", interrupted)
        status, out, err = run(*arguments)
    assert (status, out) == (130, "")
    assert re.search(r"run/step-00000002.npz is the last checkpoint; the same command goes on from it\n$", err)
    assert run(*arguments)[0] == 0
    assert run(*options(tmp_path / "whole", model, book, **{"save-every": 2}))[0] == 0
    one, other = (params.load(tmp_path / folder / "checkpoint") for folder in ("run", "whole"))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    status, out, err = run(*options(tmp_path / "run", model, book, lr=0.5))
    assert (status, out) == (2, "")
    assert "step-00000004.npz: training.lr is 0.01, expected 0.5: a run goes on as it began" in err


def test_what_is_not_finite(run, tmp_path, model, book):
    with np.errstate(all="ignore"):
        status, out, err = run(*options(tmp_path / "run", model, book, lr=1e30, **{"grad-clip": 1e30}))
    assert (status, out) == (2, "")
    assert "step-00000000.npz is the last checkpoint" in err and re.search(r"kimi-native: step [1-4]: .*finite", err)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"data": "nowhere.txt"}, "nowhere.txt"),
        ({"steps": 0}, "steps is 0, expected an integer from 1"),
        ({"batch-tokens": 8}, "batch_tokens is 8, expected at least seq_len 16"),
        ({"init": "nowhere"}, "nowhere/config.json: cannot be read"),
        ({"init": None}, "one of the arguments --init --from is required"),
        ({"optimizer": "sgd"}, "argument --optimizer: invalid choice: 'sgd'"),
        ({"data": "book.txt:0"}, "the weight of book.txt is 0.0, expected a number > 0"),
        ({"validation-fraction": 2}, "validation_fraction is 2.0, expected 0 up to below 1"),
    ],
)
def test_refused(run, tmp_path, model, book, others, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*options("run", model, **{"data": "book.txt"} | others))
    assert (status, out) == (2, "")
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_progress_says_what_a_step_did():
    record = {"step": 7, "loss": 2.34567, "tokens": 5000, "seconds": 2.0, "max_logit": 12.34, "clipped_heads": 3}
    assert label(record) == "step 7 | loss 2.3457 | 2,500 tokens/s | largest logit 12.3 | 3 heads clipped"
    assert label({"step": 7, "validation_loss": 2.5}) == "step 7 | validation 2.5000"


def test_sources():
    assert source("a.txt") == ("a.txt", 1.0)
    assert source("a.txt:2.5") == ("a.txt", 2.5)
    assert source("/b:c/a.txt") == ("/b:c/a.txt", 1.0)
    assert source("c:/a.txt:3") == ("c:/a.txt", 3.0)


def test_training_from_a_random_checkpoint_of_make_tiny(run, tmp_path, book):
    """As the help has it: its config.json and tokenizer, and its weights with --from."""
    assert cli.main(["make-tiny", str(tmp_path / "tiny")]) == 0
    assert run(*options(tmp_path / "run", None, book, steps=1, **{"from": tmp_path / "tiny"}))[0] == 0
    loaded = kn.load(tmp_path / "run" / "checkpoint")
    assert loaded.vision is not None
    assert {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()} >= {
        "config.json",
        "tiktoken.model",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "generation_config.json",
    }
