"""The training loop: a step, what it logs, and checkpoints from which a killed run goes on to the very same weights."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Protocol

import numpy as np

from kimi_native.config import Config
from kimi_native.train import backward, params, qat
from kimi_native.train.batch import NO_LOSS, Batch
from kimi_native.train.export import export
from kimi_native.train.muonclip import MuonClip, mla_heads, update_router_bias
from kimi_native.train.run_folder import RunFolder, Saved, checkpoints

OPTIMIZERS = ("muonclip", "muon", "adamw")
SCHEDULES = ("constant", "cosine")


class Dataset(Protocol):
    """identity: JSON values that say what the batches depend on; a run resumes only with equal ones."""

    identity: dict

    def batch(self, step: int) -> Batch: ...

    def validation(self) -> list[Batch]: ...


@dataclass(frozen=True)
class TrainingConfig:
    """steps, lr: as ever. warmup_steps: lr rises linearly over them. schedule: "constant", or "cosine" down to
    final_lr_ratio * lr. optimizer: "muonclip", "muon" (without the clip) or "adamw". tau: the largest attention logit
    that the clip allows. grad_clip: the largest global norm of the gradients. router_bias_rate: of the balancing of
    experts. qat_from: the number of steps after which the experts are quantised in every pass, None for never; to
    qat_levels on either side of zero. eval_every, save_every: steps between validations and between checkpoints; both
    also come at the end. Raises ValueError naming the field.
    """

    steps: int
    lr: float
    warmup_steps: int = 0
    schedule: str = "constant"
    final_lr_ratio: float = 0.1
    optimizer: str = "muonclip"
    weight_decay: float = 0.1
    momentum: float = 0.95
    tau: float = 100.0
    grad_clip: float = 1.0
    router_bias_rate: float = 1e-3
    qat_from: int | None = None
    qat_levels: int = 7
    seed: int = 0
    eval_every: int = 100
    save_every: int = 100

    def __post_init__(self):
        whole = 2**32 - 1
        integers = {"steps": (1, 10**8 - 1), "warmup_steps": (0, whole), "qat_from": (0, whole), "qat_levels": (1, 7)}
        integers |= {"seed": (0, whole), "eval_every": (1, whole), "save_every": (1, whole)}
        choices = {"schedule": SCHEDULES, "optimizer": OPTIMIZERS}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in choices:
                good, expected = value in choices[f.name], f"one of {', '.join(choices[f.name])}"
            elif f.name in integers:
                least, most = integers[f.name]
                good = type(value) is int and least <= value <= most or (f.name, value) == ("qat_from", None)
                expected = f"an integer from {least} to {most}"
            else:
                least = "> 0" if f.name in ("lr", "tau", "grad_clip") else ">= 0"
                most = 1 if f.name == "momentum" else math.inf
                good = type(value) in (int, float) and 0 <= value < most and (value > 0 or least == ">= 0")
                expected = f"a number {least} and < {most}"
            if not good:
                raise ValueError(f"{f.name} is {value!r}, expected {expected}")

    def learning_rate(self, step: int) -> float:
        """Of step 0, 1, ..."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.lr * (self.final_lr_ratio + (1 - self.final_lr_ratio) * (1 + math.cos(math.pi * done)) / 2)


class Trainer:
    """A run in `folder`: log.jsonl, step-NNNNNNNN.npz (the last two checkpoints), and at the end checkpoint/, the model
    in the published layout. If the folder has a checkpoint, the run goes on from it.
    """

    def __init__(self, config: Config, training: TrainingConfig, dataset: Dataset, folder, params=None, *, source=None):
        """params: as params.load returns them, changed in place; by default new ones from the seed. A checkpoint has
        its own. source: the folder (or the files) whose config.json and tokenizer go with the exported model; None
        exports none. Raises ValueError if the folder has a run of another config or other data, or if params do not
        fit.
        """
        self.config, self.training, self.dataset, self.source = config, training, dataset, source
        identity = {"config": asdict(config), "training": asdict(training), "data": dataset.identity}
        self.folder = RunFolder(folder, identity)
        self._validation = dataset.validation()
        saved = self.folder.load()
        self.step = 0 if saved is None else saved.step
        self.params = saved.params if saved else _initial(config, training.seed, params)
        self.optimizer = _optimizer(config, training, self.params)
        if saved:
            self.optimizer.load_state_dict(saved.optimizer)

    def run(self, progress: Callable[[dict], None] | None = None) -> None:
        """Train to the end and export. progress(record) is called with each record of the log.

        Raises FloatingPointError naming step and parameter, or layer and head, for what is not finite, and OSError for
        a full disk; the last checkpoint is then good. So it is after KeyboardInterrupt.
        """
        self.folder.cut_log(self.step)
        if not checkpoints(self.folder.path):
            self._save()
        while self.step < self.training.steps:
            with _naming(self.step + 1):
                self._report(self._train_step(), progress)
                self.step += 1
                if self._is_due(self.training.eval_every) and self._validation:
                    self._report({"step": self.step, "validation_loss": self.validation_loss()}, progress)
                if self._is_due(self.training.save_every):
                    self._save()
        exported = self.folder.path / "checkpoint"
        if self.source is not None and not exported.exists():
            export(self.params, self.config, exported, self.source, levels=self.training.qat_levels)

    def validation_loss(self) -> float:
        """The mean over all targets of the validation batches."""
        weights, total, targets = self._forward_params(), 0.0, 0
        for batch in self._validation:
            count = int(np.count_nonzero(batch.targets != NO_LOSS))
            total += backward.loss(weights, self.config, batch) * count
            targets += count
        return total / targets

    def _report(self, record: dict, progress: Callable[[dict], None] | None) -> None:
        self.folder.log(record)
        if progress:
            progress(record)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.training.steps

    def _forward_params(self) -> dict[str, np.ndarray]:
        """What this step's passes see: the masters, with QAT the values that an exported model has."""
        qat_from = self.training.qat_from
        if qat_from is None or self.step < qat_from:
            return self.params
        return qat.deployed(self.params, self.training.qat_levels)

    def _train_step(self) -> dict:
        """The update by the batch of self.step, and its record, whose step is the number of steps done with it."""
        started = time.perf_counter()
        batch, lr = self.dataset.batch(self.step), self.training.learning_rate(self.step)
        result = backward.loss_and_gradients(self._forward_params(), self.config, batch)
        norm = clip_gradients(result.grads, self.training.grad_clip)
        clipped = self.optimizer.step(result.grads, result.max_logits, lr)
        for name, counts in result.tokens_per_expert.items():
            update_router_bias(self.params[name], counts, self.training.router_bias_rate)
        logits = np.stack(result.max_logits)  # [layers, N]
        layer, head = map(int, np.unravel_index(np.argmax(logits), logits.shape))
        return {
            "step": self.step + 1,
            "loss": float(result.loss),
            "lr": lr,
            "grad_norm": norm,
            "max_logit": float(logits[layer, head]),
            "max_logit_layer": layer,
            "max_logit_head": head,
            "clipped_heads": int(clipped),
            "tokens": len(batch.token_ids),
            "seconds": time.perf_counter() - started,
        }

    def _save(self) -> None:
        for name, array in self.params.items():
            if not np.isfinite(array).all():
                raise FloatingPointError(f"{name} is not finite after the update, which no checkpoint keeps")
        self.folder.save(Saved(self.step, self.params, self.optimizer.state_dict()))


def clip_gradients(grads: dict[str, np.ndarray], largest: float) -> float:
    """The global norm; where it is larger than `largest`, the gradients are scaled to that in place.

    Raises FloatingPointError naming the parameter whose gradient is not finite.
    """
    total = 0.0
    for name, grad in grads.items():
        square = float(np.square(grad, dtype=np.float64).sum())  # a dot product's sum would depend on BLAS's threads
        if not math.isfinite(square):
            raise FloatingPointError(f"the gradient of {name} is not finite")
        total += square
    norm = math.sqrt(total)
    if norm > largest:
        for grad in grads.values():
            grad *= np.float32(largest / norm)
    return norm


@contextmanager
def _naming(step: int) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}") from error


def _initial(config: Config, seed: int, given: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    if given is None:
        return params.initialise(config, seed)
    shapes = params.shapes(config)
    if given.keys() != shapes.keys():
        raise ValueError(f"params differ in {min(given.keys() ^ shapes.keys())}, expected exactly those of the config")
    for name, shape in shapes.items():
        if given[name].dtype != np.float32 or given[name].shape != shape:
            found = f"{given[name].dtype} {list(given[name].shape)}"
            raise ValueError(f"params: {name} is {found}, expected float32 {list(shape)}")
    return given


def _optimizer(config: Config, training: TrainingConfig, params: dict[str, np.ndarray]) -> MuonClip:
    return MuonClip(
        params,
        lr=training.lr,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
        tau=training.tau if training.optimizer == "muonclip" else None,
        heads=mla_heads(config),
        muon=() if training.optimizer == "adamw" else None,
    )
