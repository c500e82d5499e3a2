"""A run's weights on disk, written so that a kill at any moment leaves a folder that can be read."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from calcformer.config import RunConfig
from calcformer.data import Task
from calcformer.memory import check_memory, memory_to_answer
from calcformer.runs.files import write_atomically
from calcformer.runs.folder import CONFIG, MODEL, RESUME, RunError, epoch_of, finished_epochs, read_config

__all__ = ["load_resume_state", "load_run", "save_checkpoint", "save_weights", "trained_parameters"]

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
AVERAGE = "average"  # the mean of the weights of the last epochs, which stands beside them


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name, each once even where layers share it, on the CPU."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters as the optimiser has them, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Write the state after `epoch` finished epochs."""
    state = {f"model.{name}": value for name, value in _weights(model).items()}
    for index, group in enumerate(optimizer.param_groups if optimizer.state else []):
        for key in optimizer.state[group["params"][0]]:
            values = [optimizer.state[parameter][key].cpu() for parameter in group["params"]]
            state[f"{key}.{index}"] = values[0] if key == "step" else torch.cat([value.flatten() for value in values])
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
            epoch = epoch_of(file.metadata())
            return {name: file.get_tensor(name) for name in file.keys()}, epoch
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path} is damaged ({reason}); {_remedy(path)}") from None


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


def load_run(folder: Path, device: torch.device | str = "cpu") -> tuple[RunConfig, Task, nn.Module, int]:
    """Settings, task, trained model in evaluation mode, and the epoch its weights are from."""
    config = read_config(folder)
    task = config.data.restore(folder)
    check_memory(memory_to_answer(config, task), torch.device(device))
    weights, epoch = _read_tensors(folder / MODEL)
    with torch.random.fork_rng(devices=[]):
        model = config.model.build(task)
    _fill(model, weights, folder / MODEL)
    return config, task, model.to(device).eval(), epoch


def load_resume_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put weights and Adam's state back; returns how many epochs were finished."""
    path = folder / RESUME
    tensors, epoch = _read_tensors(path)
    prefix = "model."
    _fill(model, {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}, path)
    _check_finite(tensors, path)
    if epoch == 0:  # Adam makes its state in its first step
        return 0
    for index, group in enumerate(optimizer.param_groups):
        sizes = [parameter.numel() for parameter in group["params"]]
        for key in (*ADAM_STATE, *([AVERAGE] if f"{AVERAGE}.{index}" in tensors else [])):
            value = tensors.get(f"{key}.{index}")
            expected = torch.Size([] if key == "step" else [sum(sizes)])
            if value is None or (value.shape, value.dtype) != (expected, torch.float32):
                raise RunError(
                    f"{path} does not fit the settings of its {CONFIG} (first difference: {key}.{index}); "
                    "train the run again or give another one"
                )
            parts = [value.clone() for _ in sizes] if key == "step" else value.split(sizes)
            for parameter, part in zip(group["params"], parts):
                shaped = part if key == "step" else part.view_as(parameter)
                optimizer.state[parameter][key] = shaped.to(parameter.device)
    return epoch
