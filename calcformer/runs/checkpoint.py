"""What a run folder holds, and how it is written so that a kill at any moment leaves a folder that can be read.

config.json          all settings
model.safetensors    the weights after the last finished epoch
resume.safetensors   the same weights with Adam's state: one file, so that the two can never be of different epochs
metrics.jsonl        a line an epoch
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from calcformer.build import build_model, build_task
from calcformer.config import RunConfig
from calcformer.data import Task
from calcformer.errors import InputError
from calcformer.memory import check_memory, memory_to_answer
from calcformer.model import EncoderDecoder
from calcformer.runs.files import write_atomically

__all__ = [
    "RunError",
    "finished_epochs",
    "load_resume_state",
    "load_run",
    "read_config",
    "save_checkpoint",
    "save_weights",
    "saved_epoch",
    "trained_parameters",
]

CONFIG, MODEL, RESUME, METRICS = "config.json", "model.safetensors", "resume.safetensors", "metrics.jsonl"
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


class RunError(InputError):
    """A run folder that is missing or damaged."""


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name, each once even where layers share it, on the CPU."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters as the optimiser has them, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Write the state after `epoch` finished epochs."""
    state = {f"model.{name}": value for name, value in _weights(model).items()}
    for index, parameter in enumerate(trained_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{key}.{index}"] = value.detach().cpu()
    write_atomically(folder / RESUME, save(state, {"epoch": str(epoch)}))
    save_weights(folder, model, epoch)


def save_weights(folder: Path, model: nn.Module, epoch: int) -> None:
    """Write the weights after `epoch` finished epochs, for those who use the model."""
    write_atomically(folder / MODEL, save(_weights(model), {"epoch": str(epoch)}))


def _remedy(path: Path) -> str:
    """What to do about a file that is missing or damaged."""
    if path.name == MODEL and finished_epochs(path.parent) is not None:
        return f"restore it with: calcformer train --resume {path.parent}"
    return "train the run again or give another one"


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of a file and the epoch they are from."""
    if not path.is_file():
        raise RunError(f"{path} is missing; {_remedy(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            epoch = _epoch(file)
            return {name: file.get_tensor(name) for name in file.keys()}, epoch
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path} is damaged ({reason}); {_remedy(path)}") from None


def _epoch(file: Any) -> int:
    """The epoch that an open file of tensors is from; KeyError or ValueError where it does not say."""
    epoch = int((file.metadata() or {})["epoch"])
    if epoch < 0:
        raise ValueError(f"epoch {epoch}")
    return epoch


def saved_epoch(path: Path) -> int | None:
    """The epoch that a file of tensors is from; None where it cannot be read. Reads the file's head only."""
    try:
        with safe_open(path, framework="pt") as file:
            return _epoch(file)
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _check_finite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise RunError(f"{path} holds numbers that are infinite or NaN; {_remedy(path)}")


def _fill(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Copy weights into a model, all or none."""
    parameters = dict(model.named_parameters())
    wrong = sorted(parameters.keys() ^ weights.keys()) or sorted(
        name
        for name, parameter in parameters.items()
        if (parameter.shape, parameter.dtype) != (weights[name].shape, weights[name].dtype)
    )
    if wrong:
        raise RunError(
            f"{path} does not fit the model of its {CONFIG} (first difference: {wrong[0]}); "
            "train the run again or give another one"
        )
    _check_finite(weights, path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def read_config(folder: Path) -> RunConfig:
    """The settings of a run; RunError where the folder is not one."""
    if not folder.is_dir():
        raise RunError(f"there is no run folder {folder}; make one with: calcformer train --out {folder}")
    path = folder / CONFIG
    if not path.is_file():
        raise RunError(f"{folder} is not a run folder: it has no {CONFIG}; give the folder that training wrote")
    try:
        return RunConfig.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} cannot be used ({error}); train the run again or give another one") from None


def load_run(folder: Path, device: torch.device | str = "cpu") -> tuple[RunConfig, Task, EncoderDecoder, int]:
    """Settings, task, trained model in evaluation mode, and the epoch its weights are from."""
    config = read_config(folder)
    task = build_task(config.data)
    check_memory(memory_to_answer(config), torch.device(device))
    weights, epoch = _read_tensors(folder / MODEL)
    with torch.random.fork_rng(devices=[]):
        model = build_model(config.model, task)
    _fill(model, weights, folder / MODEL)
    return config, task, model.to(device).eval(), epoch


def finished_epochs(folder: Path) -> int | None:
    """How many epochs of a run are saved, None where there is no run to continue."""
    return saved_epoch(folder / RESUME)


def load_resume_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put weights and Adam's state back; returns how many epochs were finished."""
    path = folder / RESUME
    tensors, epoch = _read_tensors(path)
    prefix = "model."
    _fill(model, {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}, path)
    _check_finite(tensors, path)
    if epoch == 0:  # Adam makes its state in its first step
        return 0
    for index, parameter in enumerate(trained_parameters(optimizer)):
        state = {key: tensors.get(f"{key}.{index}") for key in ADAM_STATE}
        for key, value in state.items():
            expected = torch.Size() if key == "step" else parameter.shape
            if value is None or (value.shape, value.dtype) != (expected, torch.float32):
                raise RunError(
                    f"{path} does not fit the settings of its {CONFIG} (first difference: {key}.{index}); "
                    "train the run again or give another one"
                )
        optimizer.state[parameter] = {
            key: value.to(parameter.device) for key, value in state.items() if value is not None
        }
    return epoch
