"""From settings to the objects they describe."""

from calcformer.config import DataConfig, ModelConfig
from calcformer.data import ExpressionTask, FormulaForm, FormulaTask, Task
from calcformer.model import EncoderDecoder

__all__ = ["build_model", "build_task"]


def build_task(config: DataConfig) -> Task:
    """The kind of problem and its split."""
    if config.task == "expression":
        return ExpressionTask(
            config.train_size, config.valid_size, config.data_seed, config.leaky_split, config.fresh, config.held_out
        )
    form = FormulaForm(config.complexity, config.signed, config.truncate, config.zero_pad, config.reverse_answer)
    return FormulaTask(
        form,
        config.train_size,
        config.valid_size,
        config.data_seed,
        config.leaky_split,
        config.fresh,
        config.held_out,
        config.sampling,
    )


def build_model(config: ModelConfig, task: Task) -> EncoderDecoder:
    """A model with fresh weights, drawn from torch's global generator."""
    return EncoderDecoder(
        len(task.vocabulary),
        task.source_length,
        task.target_length,
        width=config.width,
        heads=config.heads,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        hidden=config.hidden,
        dropout=config.dropout,
        norm=config.norm,
        activation=config.activation,
        positions=config.positions,
        embeddings=config.embeddings,
        pad_id=task.vocabulary.pad_id,
    )
