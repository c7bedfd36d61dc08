"""The loop: what it logs, that a run which was stopped, killed or out of disk goes on to the same weights."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import kimi_native as kn
import numpy as np
import pytest
from kimi_native import ops
from kimi_native.train import backward, params, qat
from kimi_native.train.muonclip import update_router_bias
from kimi_native.train.run_folder import RunFolder, read_log
from kimi_native.train.trainer import TrainingConfig, clip_gradients
from PIL import Image
from small import small_folder, trainer, write_tokens

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_folder(tmp_path_factory.mktemp("trainer") / "model")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.npy")


def log_of(folder):
    """The log without what differs from run to run."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_log(folder / "log.jsonl")]


def weights_of(file):
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "state"}


def assert_same_run(one, other):
    """Log, last checkpoints and exported model."""
    assert log_of(one) == log_of(other)
    files = sorted(path.name for path in one.glob("step-*"))
    assert files == sorted(path.name for path in other.glob("step-*"))
    for name in files:
        assert_same_arrays(weights_of(one / name), weights_of(other / name))


def assert_same_arrays(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.tobytes() == other[name].tobytes(), name


def assert_equal_values(one, other):
    """Zeros may differ in their sign, which codes do not have."""
    assert one.keys() == other.keys()
    assert [name for name, array in one.items() if not np.array_equal(array, other[name])] == []


def stopping(step):
    """A progress that stops the run like Ctrl-C once the log has this step."""

    def progress(record):
        if record["step"] == step and "loss" in record:
            raise KeyboardInterrupt

    return progress


# A run


def test_a_run_learns_and_logs(tmp_path, model, tokens):
    run = trainer(tmp_path, model, [tokens], steps=40, eval_every=20, save_every=15, schedule="cosine")
    seen = []
    run.run(seen.append)
    records = list(read_log(tmp_path / "log.jsonl"))
    assert seen == records
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 41))
    assert all(list(record) == list(steps[0]) for record in steps)
    assert set(steps[0]) == {"step", "loss", "lr", "grad_norm", "max_logit", "max_logit_layer", "max_logit_head",
                             "clipped_heads", "tokens", "seconds"}  # fmt: skip
    assert [record["lr"] for record in steps] == [run.training.learning_rate(step) for step in range(40)]
    assert {record["tokens"] for record in steps} == {48}
    assert steps[0]["loss"] > 6.5 and steps[-1]["loss"] < 3.5  # log(1024) = 6.9, log(40) = 3.7
    validations = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in validations] == [20, 40]
    assert validations[1]["validation_loss"] < 3.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "step-00000030.npz", "step-00000040.npz"]


def test_a_step_is_gradient_clip_optimizer_and_balance(tmp_path, model, tokens):
    """The record says what the parts give, and the bias of the router moves by its rule."""
    run = trainer(tmp_path, model, [tokens], steps=1, router_bias_rate=0.25)
    before = {name: array.copy() for name, array in run.params.items()}
    expected = backward.loss_and_gradients(before, run.config, run.dataset.batch(0))
    run.run()
    record, validation = log_of(tmp_path)
    assert record["loss"] == expected.loss
    logits = np.stack(expected.max_logits)
    assert record["max_logit"] == logits.max() == logits[record["max_logit_layer"], record["max_logit_head"]]
    assert record["grad_norm"] == pytest.approx(np.sqrt(sum(np.vdot(g, g) for g in expected.grads.values())), rel=1e-5)
    update_router_bias(before[BIAS], expected.tokens_per_expert[BIAS], 0.25)
    assert np.array_equal(run.params[BIAS], before[BIAS]) and before[BIAS].any()
    losses = [backward.loss(run.params, run.config, batch) for batch in run.dataset.validation()]
    assert validation["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-12)


def test_heads_are_clipped_by_muonclip_alone(tmp_path, model, tokens):
    clipped = {}
    for optimizer in ("muonclip", "muon", "adamw"):
        run = trainer(tmp_path / optimizer, model, [tokens], steps=4, optimizer=optimizer, tau=1e-3)
        run.run()
        clipped[optimizer] = sum(r["clipped_heads"] for r in log_of(tmp_path / optimizer) if "loss" in r)
    assert clipped["muonclip"] > 0 and clipped["muon"] == clipped["adamw"] == 0


def test_gradients_are_clipped_to_their_global_norm():
    grads = {"a": np.full((2, 2), 3, np.float32), "b": np.full(4, 4, np.float32)}
    assert clip_gradients(grads, 20.0) == 10 and grads["a"][0, 0] == 3
    assert clip_gradients(grads, 5.0) == 10
    assert grads["a"].tolist() == [[1.5, 1.5], [1.5, 1.5]] and grads["b"].tolist() == [2, 2, 2, 2]
    with pytest.raises(FloatingPointError, match="the gradient of b is not finite"):
        clip_gradients(grads | {"b": np.float32([1, np.nan])}, 5.0)


def test_learning_rates():
    config = TrainingConfig(steps=8, lr=2.0, warmup_steps=4, schedule="cosine", final_lr_ratio=0.5)
    cosine = [config.learning_rate(step) for step in range(9)]
    assert cosine == pytest.approx([0.5, 1, 1.5, 2, 2, 1 + 0.5 * (1 + 0.5**0.5), 1.5, 1.5 - 0.5**1.5, 1])
    assert [TrainingConfig(steps=8, lr=2.0, warmup_steps=2).learning_rate(step) for step in (0, 1, 2, 7)] == [
        1,
        2,
        2,
        2,
    ]


def test_qat_trains_masters_by_the_deployed_values(tmp_path, model, tokens, monkeypatch):
    """From the step on, gradients, validation and export see the deployed values; the masters are no such values."""
    seen, losses = [], []
    gradients, loss = backward.loss_and_gradients, backward.loss

    def keep(kept, function):
        return lambda weights, *rest: kept.append({k: v.copy() for k, v in weights.items()}) or function(weights, *rest)

    monkeypatch.setattr(backward, "loss_and_gradients", keep(seen, gradients))
    monkeypatch.setattr(backward, "loss", keep(losses, loss))
    run = trainer(tmp_path, model, [tokens], steps=4, qat_from=2, qat_levels=3, eval_every=1)
    run.run()
    deployed = [is_deployed(weights, 3) for weights in seen]
    assert deployed == [False, False, True, True]
    assert [is_deployed(weights, 3) for weights in losses[::2]] == [False, True, True, True]
    assert not is_deployed(run.params, 3)
    assert_same_arrays(losses[-1], qat.deployed(run.params, 3))


def is_deployed(weights, levels):
    again = qat.deployed(weights, levels)
    return all(np.array_equal(array, again[name]) for name, array in weights.items())


def test_the_exported_model(tmp_path, model, tokens):
    """Is what QAT trained, and runs."""
    run = trainer(tmp_path, model, [tokens], export=True, qat_from=4)
    run.run()
    exported = tmp_path / "checkpoint"
    assert_equal_values(params.load(exported), qat.deployed(run.params))
    loaded = kn.load(exported)
    assert len(kn.generate_tokens(loaded, [1, 2, 3], 5, temperature=0)) == 5
    before = (exported / "model.safetensors.index.json").stat().st_mtime_ns
    trainer(tmp_path, model, [tokens], export=True, qat_from=4).run()  # nothing left to do
    assert (exported / "model.safetensors.index.json").stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".*"))


def test_a_failed_export_is_written_at_the_next_run(tmp_path, model, tokens, monkeypatch):
    def export(*args, **options):
        raise OSError("No space left on device")

    run = trainer(tmp_path, model, [tokens], export=True)
    with monkeypatch.context() as patch:
        patch.setattr("kimi_native.train.trainer.export", export)
        with pytest.raises(OSError, match="No space left"):
            run.run()
    assert not (tmp_path / "checkpoint").exists()
    trainer(tmp_path, model, [tokens], export=True).run()
    assert_equal_values(params.load(tmp_path / "checkpoint"), qat.deployed(run.params))


def test_images_train_the_tower(tmp_path):
    model = small_folder(tmp_path / "model", vision=True)
    lines = []
    for i in range(4):
        Image.fromarray(np.full((28, 28, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
        user = {"role": "user", "content": [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "?"}]}
        lines.append(json.dumps({"messages": [user, {"role": "assistant", "content": "abcd"[i]}]}))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    files, tokens = [tmp_path / "chats.jsonl"], write_tokens(tmp_path / "tokens.npy")
    options = {"steps": 6, "save_every": 2, "data": {"batch_tokens": 64}}
    run = trainer(tmp_path / "whole", model, [*files, tokens], **options)
    before = {name: array.copy() for name, array in run.params.items()}
    run.run()
    records = log_of(tmp_path / "whole")
    assert records[-2]["loss"] < records[0]["loss"]
    moved = {name for name in before if not np.array_equal(before[name], run.params[name])}
    assert {name for name in before if name.startswith(("vision_tower.", "mm_projector."))} <= moved
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "stopped", model, [*files, tokens], **options).run(stopping(5))
    trainer(tmp_path / "stopped", model, [*files, tokens], **options).run()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_threads_change_nothing(tmp_path, model, tokens):
    threads = ops.num_threads()
    try:
        for count in (1, 3):
            ops.set_num_threads(count)
            trainer(tmp_path / str(count), model, [tokens], steps=3).run()
    finally:
        ops.set_num_threads(threads)
    assert_same_run(tmp_path / "1", tmp_path / "3")


# Resuming


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw"])
@pytest.mark.parametrize("step", [1, 3, 5, 7, 8])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, model, tokens, step, optimizer):
    options = {"optimizer": optimizer, "qat_from": 5, "schedule": "cosine"}
    trainer(tmp_path / "whole", model, [tokens], **options).run()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "stopped", model, [tokens], **options).run(stopping(step))
    again = trainer(tmp_path / "stopped", model, [tokens], **options)
    assert again.step == (step - 1) // 3 * 3
    again.run()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


KILLED = """
import os, signal, sys
from itertools import count
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kimi_native.train import backward
from small import trainer

def kill_at(call, function):
    calls = count(1)
    return lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == call else function(*args)

module, name = {"fsync": (os, "fsync"), "gradients": (backward, "loss_and_gradients")}[sys.argv[5]]
setattr(module, name, kill_at(int(sys.argv[6]), getattr(module, name)))
trainer(Path(sys.argv[2]), Path(sys.argv[3]), [Path(sys.argv[4])]).run()
"""

# A checkpoint syncs log, file and folder, the first one has no log yet: the places where the third one can end
KILLS = [("gradients", 5), ("fsync", 1), ("fsync", 6), ("fsync", 7), ("fsync", 8)]


@pytest.mark.parametrize(("where", "call"), KILLS)
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, model, tokens, where, call):
    """SIGKILL within a pass, and between the steps of writing a checkpoint."""
    arguments = map(str, [Path(__file__).parent, tmp_path / "killed", model, tokens, where, call])
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    for folder in ("killed", "whole"):
        trainer(tmp_path / folder, model, [tokens]).run()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*"))


def test_the_log_is_cut_to_the_checkpoint(tmp_path, model, tokens):
    trainer(tmp_path, model, [tokens]).run()
    before = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "step-00000008.npz").unlink()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')  # not finished when the process was killed
    again = trainer(tmp_path, model, [tokens])
    assert again.step == 6
    with pytest.raises(KeyboardInterrupt):
        again.run(stopping(7))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6, 7]
    assert lines[:-1] == before.splitlines()[:8]


def test_the_last_checkpoint_of_any_run(tmp_path, model, tokens):
    run = trainer(tmp_path, model, [tokens], steps=2)
    with pytest.raises(ValueError, match="has no step-.*npz, expected the folder of a training run"):
        RunFolder.last(tmp_path)
    run.run()
    saved = RunFolder.last(tmp_path)
    assert saved.step == 2
    assert_same_arrays(saved.params, run.params)
    assert_same_arrays(saved.optimizer, run.optimizer.state_dict())


def test_partial_files_of_a_killed_run_do_not_count(tmp_path, model, tokens):
    trainer(tmp_path / "whole", model, [tokens]).run()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", model, [tokens]).run(stopping(4))
    (tmp_path / "killed" / ".step-00000006.npz.partial").write_bytes(b"half")
    trainer(tmp_path / "killed", model, [tokens]).run()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*"))


def change_config(model, folder):
    values = json.loads((model / "config.json").read_text()) | {"rms_norm_eps": 1e-6}
    copy = folder / "model"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "config.json").write_text(json.dumps(values))
    return copy


def test_another_run_is_refused(tmp_path, model, tokens):
    trainer(tmp_path / "run", model, [tokens], steps=1).run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    other = tmp_path / "tokens.npy"
    np.save(other, np.load(tokens)[::-1])

    def refused(message, model=model, files=(tokens,), **options):
        with pytest.raises(ValueError, match=rf"step-00000001.npz: {message}: a run goes on as it began"):
            trainer(tmp_path / "run", model, files, **{"steps": 1} | options)

    refused("training.steps is 1, expected 2", steps=2)
    refused("training.lr is 0.01, expected 0.02", lr=0.02)
    refused("training.qat_from is None, expected 4", qat_from=4)
    refused("data.seq_len is 12, expected 8", data={"seq_len": 8})
    refused(r"data.files\[0\].sha256 is '\w{64}', expected '\w{64}'", files=[other])
    refused(r"data.files\[1\] is None, expected \{'name': 'tokens.npy', .*\}", files=[tokens, other])
    changed = change_config(model, tmp_path)
    refused("config.text_config.rms_norm_eps is 1e-05, expected 1e-06", changed)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    trainer(tmp_path / "run", model, [tokens], steps=1).run()


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 999, lambda data: flip(data)]
)
def test_damaged_checkpoint(tmp_path, model, tokens, damage):
    trainer(tmp_path, model, [tokens]).run()
    last = tmp_path / "step-00000008.npz"
    whole = last.read_bytes()
    last.write_bytes(damage(whole))
    with pytest.raises(
        ValueError, match=r"step-00000008.npz: cannot be read .* expected a checkpoint; without this file"
    ):
        trainer(tmp_path, model, [tokens])
    last.unlink()
    trainer(tmp_path, model, [tokens]).run()
    assert_same_arrays(weights_of(last), weights_from(whole, tmp_path))


def flip(data):
    """One bit in the middle, where the weights are."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def weights_from(data, folder):
    (folder / "copy").write_bytes(data)
    return weights_of(folder / "copy")


# What ends a run


def test_a_gradient_that_is_not_finite(tmp_path, model, tokens, monkeypatch):
    """The error names step and parameter; the checkpoint before it is the same as without the accident."""
    gradients, calls = backward.loss_and_gradients, []

    def poisoned(*args):
        calls.append(args)
        result = gradients(*args)
        if len(calls) == 5:
            result.grads["model.layers.1.self_attn.o_proj.weight"][3, 4] = np.inf
        return result

    trainer(tmp_path / "whole", model, [tokens], steps=3).run()
    with monkeypatch.context() as patch:
        patch.setattr(backward, "loss_and_gradients", poisoned)
        message = "^step 5: the gradient of model.layers.1.self_attn.o_proj.weight is not finite"
        with pytest.raises(FloatingPointError, match=message):
            trainer(tmp_path / "run", model, [tokens]).run()
    last = "step-00000003.npz"
    assert_same_arrays(weights_of(tmp_path / "run" / last), weights_of(tmp_path / "whole" / last))
    assert [record["step"] for record in log_of(tmp_path / "run")] == [1, 2, 3, 3, 4]
    trainer(tmp_path / "run", model, [tokens]).run()


def test_a_logit_that_is_not_finite(tmp_path, model, tokens, monkeypatch):
    gradients = backward.loss_and_gradients

    def poisoned(*args):
        result = gradients(*args)
        result.max_logits[1][1] = np.nan
        return result

    monkeypatch.setattr(backward, "loss_and_gradients", poisoned)
    with pytest.raises(FloatingPointError, match=r"^step 1: .*max_logits\[1\]\[1\] \(layer, head\) is nan"):
        trainer(tmp_path, model, [tokens]).run()


def test_weights_that_run_away(tmp_path, model, tokens):
    """Ends with an error that names the step, and no checkpoint has what is not finite."""
    with pytest.raises(FloatingPointError, match=r"^step [1-8]: "), np.errstate(all="ignore"):
        trainer(tmp_path, model, [tokens], lr=1e30, grad_clip=1e30, save_every=1).run()
    for file in tmp_path.glob("step-*"):
        assert all(np.isfinite(array).all() for array in weights_of(file).values())


def test_no_checkpoint_keeps_what_is_not_finite(tmp_path, model, tokens):
    run = trainer(tmp_path, model, [tokens], save_every=1)
    step = run.optimizer.step

    def overflowing(*args):
        run.params["model.norm.weight"][2] = np.inf
        return step(*args)

    run.optimizer.step = overflowing
    with pytest.raises(FloatingPointError, match="^step 1: model.norm.weight is not finite after the update"):
        run.run()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000000.npz"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, model, tokens):
    """A file cannot grow beyond half of a checkpoint: writing it fails in the middle, as it does on a full disk."""
    trainer(tmp_path / "whole", model, [tokens]).run()
    size = (tmp_path / "whole" / "step-00000008.npz").stat().st_size
    run = trainer(tmp_path / "run", model, [tokens])
    with pytest.raises(KeyboardInterrupt):
        run.run(stopping(5))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("step-*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            trainer(tmp_path / "run", model, [tokens]).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").glob("step-*")}
    assert not list((tmp_path / "run").glob(".*"))
    trainer(tmp_path / "run", model, [tokens]).run()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_at_the_end_of_writing(tmp_path, model, tokens, monkeypatch, call):
    trainer(tmp_path, model, [tokens], steps=6).run()
    last = tmp_path / "step-00000006.npz"
    last.unlink()
    with monkeypatch.context() as patch:

        def fail(*args):
            raise OSError(28, "No space left on device")

        run = trainer(tmp_path, model, [tokens], steps=6)
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            run.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "step-00000003.npz"]
    trainer(tmp_path, model, [tokens], steps=6).run()
    assert last.exists()


# Arguments

BAD = [("steps", 0), ("steps", 2.0), ("lr", 0), ("lr", float("nan")), ("lr", float("inf")), ("warmup_steps", -1)]
BAD += [("schedule", "linear"), ("optimizer", "sgd"), ("tau", 0), ("grad_clip", 0), ("weight_decay", -1)]
BAD += [("qat_from", -1), ("qat_levels", 8), ("eval_every", 0), ("save_every", 0), ("seed", 2**32), ("momentum", 1)]
BAD += [("steps", None), ("final_lr_ratio", -0.1), ("router_bias_rate", float("nan")), ("lr", "1e-3")]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_config(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, expected "):
        TrainingConfig(**{"steps": 1, "lr": 1e-3, name: value})


def test_params_that_do_not_fit(tmp_path, model, tokens):
    good = trainer(tmp_path / "good", model, [tokens]).params
    name = "model.norm.weight"

    def refused(message, given):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path / "bad", model, [tokens], given)

    refused(f"params differ in {name}", {n: w for n, w in good.items() if n != name})
    refused("params differ in more", good | {"more": good[name]})
    refused(rf"{name} is float32 \[31\], expected float32 \[32\]", good | {name: good[name][:-1]})
    refused(rf"{name} is float64 \[32\], expected float32 \[32\]", good | {name: good[name].astype(float)})


def test_given_params_are_trained(tmp_path, model, tokens):
    given = {name: array * np.float32(2) for name, array in trainer(tmp_path / "a", model, [tokens]).params.items()}
    first = trainer(tmp_path / "b", model, [tokens], given)
    assert all(first.params[name] is given[name] for name in given)
    with pytest.raises(KeyboardInterrupt):
        first.run(stopping(4))
    trainer(tmp_path / "b", model, [tokens]).run()  # the checkpoint has them
    trainer(
        tmp_path / "c",
        model,
        [tokens],
        {n: a * np.float32(2) for n, a in trainer(tmp_path / "a", model, [tokens]).params.items()},
    ).run()
    assert_same_run(tmp_path / "b", tmp_path / "c")
