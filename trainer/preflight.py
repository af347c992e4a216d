"""The config of a run, and every refusal that needs no process group: of the model, its mesh and the data's files."""

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch

from configs.errors import ConfigError, at, did_you_mean
from configs.load import load
from configs.validate import parse
from models.config import LMConfig
from models.hf.folder import is_exported
from models.layer import Layer
from models.lm import LM
from models.memory.base import MemoryConfig
from parallel import pipeline
from parallel.compiled import refuse_compile, refuse_schedule
from parallel.mesh import MeshConfig
from parallel.preflight import refuse, refuse_memory
from trainer import checkpoint, kernels
from trainer.checkpoint import FOLDER
from trainer.config import RunConfig
from trainer.data.check import open_data
from trainer.data.fitting import fitting_tokenizer, refuse_other
from trainer.data.format import suffixes
from trainer.data.indexed import how_to_make
from trainer.data.sources import find_files
from trainer.data.vocabulary import refuse_vocabulary
from trainer.evaluation import Request, refuse_mesh
from trainer.initial import refuse_initial
from trainer.optim.base import OptimConfig
from trainer.optim.groups import refuse_patterns
from trainer.process import device_type
from trainer.runfolder import CONFIG


def load_run(file: str, overrides: Iterable[str] = ()) -> RunConfig:
    """The config, if its model can be built and its mesh can hold it; nothing is allocated. Raises ConfigError."""
    config: RunConfig = parse(RunConfig, load(file, overrides))
    refuse_run(config)
    return config


def refuse_run(config: RunConfig) -> None:
    """Raise ConfigError where the model cannot be built, or the mesh cannot hold it; nothing is allocated."""
    refuse_model(config.model)
    try:
        config.model.residual.check_dtype(getattr(torch, config.train.dtype))
    except ValueError as error:
        raise at("model.residual", str(error)) from error
    try:
        refuse(config.model, config.mesh, config.memory, config.train.compile)
        if config.mesh.pp > 1:
            rows = config.train.global_batch // config.micro_batches
            layers = len(config.model.expanded)
            pipeline.refuse(
                config.mesh, layers, config.micro_batches, lambda count: f"train.global_batch={count * rows}"
            )
        if config.train.compile:
            refuse_schedule(config.mesh)
    except ValueError as error:
        raise at("mesh", str(error)) from error
    try:
        refuse_memory(config.model, config.mesh, config.memory, config.train.compile)
    except ValueError as error:
        raise at("memory", str(error)) from error
    try:
        config.engine.refuse(config)
    except ValueError as error:
        raise at("engine", str(error)) from error
    try:
        kernels.refuse(config.model, config.kernels, config.mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    refuse_optim(config.model, config.optim)


def load_model(file: str, overrides: Iterable[str] = ()) -> LMConfig:
    """The model of a config, if it can be built. Its other parts may be missing or wrong."""
    data = load(file, overrides)
    parts = [field.name for field in dataclasses.fields(RunConfig)]
    for key in data:
        if key not in parts:
            raise at(key, f"unknown key; {did_you_mean(key, parts)}the config takes {', '.join(parts)}")
    if "model" not in data:
        raise ConfigError(f"{file}: model is missing, and nothing else is asked for; give a config that has one")
    config: LMConfig = parse(LMConfig, data["model"], "model")
    refuse_model(config)
    return config


def load_optim(file: str, overrides: Iterable[str], model: LMConfig) -> OptimConfig | None:
    """The optimiser of a config for `model`, None where the config has none. Raises ConfigError."""
    data = load(file, overrides)
    if "optim" not in data:
        return None
    config: OptimConfig = parse(OptimConfig, data["optim"], "optim")
    refuse_optim(model, config)
    return config


def refuse_optim(model: LMConfig, optim: OptimConfig) -> None:
    """Raise ConfigError for settings that mean nothing of the model, or that it cannot be trained with."""
    refuse_patterns(model, optim.patterns())
    try:
        optim.sparsity.refuse(model)
    except ValueError as error:
        raise at("optim.sparsity", str(error)) from error


def load_memory(file: str, overrides: Iterable[str]) -> MemoryConfig:
    """What a config keeps of the forward pass. Raises ConfigError."""
    return parse(MemoryConfig, load(file, overrides).get("memory", {"kind": "none"}), "memory")


def refuse_model(config: LMConfig) -> None:
    """Build the model on the meta device. Raises ConfigError, which names the layer's letter where one is at fault."""
    with torch.device("meta"):
        for letter in config.layers:
            try:
                Layer(config, config.pattern.index(letter))
            except ValueError as error:
                raise at(at_fault(config, letter), str(error)) from error
        try:
            LM(config)
        except ValueError as error:
            raise at("model", str(error)) from error


def at_fault(config: LMConfig, letter: str) -> str:
    """What a layer that cannot be built fails for: a slot of the whole model, or the layer's own."""
    index = config.pattern.index(letter)
    own, ctx = config.expanded[index], config.context(index)
    slots = {
        "depth": lambda: config.depth.build(ctx),
        "values": lambda: config.values.build(ctx, own.mixer.value_shape(config.d_model)),
        "scaling": lambda: config.scaling.build(ctx),
    }
    with contextlib.suppress(ValueError):
        own.mixer.build(ctx)
        own.ffn.build(ctx)
        for slot, build in slots.items():
            try:
                build()
            except ValueError:
                return f"model.{slot}"
    return f"model.layers.{letter}"


def refuse_machine(config: RunConfig) -> None:
    """Raise ValueError where this machine lacks what the config asks for."""
    if config.train.compile:
        refuse_compile(device_type())
    config.engine.refuse_machine()


def refuse_data(config: RunConfig) -> None:
    """Raise ConfigError where a file of the data is missing, and ValueError where they do not fit the model."""
    blended = not isinstance(config.data.train, str)
    for k, source in enumerate(config.data.sources):
        refuse_missing(f"data.train.{k}.path" if blended else "data.train", "train", source.path)
        open_data(source.path)
    if config.data.valid is not None:
        refuse_missing("data.valid", "valid", config.data.valid)
        open_data(config.data.valid)
    tokenizer = config.data.tokenizer
    if tokenizer is not None and not Path(tokenizer).exists():
        raise at("data.tokenizer", f"{tokenizer} does not exist; give the tokenizer.model that weft prepare wrote")
    refuse_vocabulary(config)
    if tokenizer is not None:
        own = fitting_tokenizer(tokenizer, "of the config", config.model.vocab_size)
        for prefix in (*config.data.weights, *([config.data.valid] if config.data.valid else [])):
            refuse_other(prefix, own, tokenizer)
    refuse_initial(config)


def refuse_missing(key: str, name: str, prefix: str) -> None:
    """A dataset is two files; weft prepare writes one called train and one called valid into its folder."""
    for suffix in (".bin", ".idx"):
        if Path(prefix + suffix).is_file():
            continue
        inside = Path(prefix) / name
        if inside.with_name(f"{name}.idx").is_file():
            raise at(key, f"{prefix} is a folder; give the dataset in it, {inside}")
        raise at(key, f"{prefix}{suffix} does not exist; {how_to_make(prefix)}")


def refuse_evaluation(request: Request, mesh: MeshConfig) -> None:
    """Raise ValueError where a run cannot be evaluated on `mesh`, without reading its weights."""
    if is_exported(request.model):
        refuse_mesh(request.model, str(mesh))
    # A checkpoint's folder stands in that of its run.
    inside = checkpoint.NAME.fullmatch(request.model.name)
    folder = request.model.parent.parent if inside else request.model
    if not checkpoint.steps(folder / FOLDER):
        raise ValueError(f"{folder} has no checkpoint; give the folder of a run that has saved one")
    config: RunConfig = parse(RunConfig, load(folder / CONFIG))
    refuse(config.model, mesh)
    request.sizes(config.data.sequence_length)
    if request.texts:
        fitting_tokenizer(request.tokenizer or config.data.tokenizer, str(request.model), config.model.vocab_size)
        find_files(request.texts, suffixes())
    else:
        refuse_missing("data.valid" if request.data is None else "--data", "valid", request.prefix(config))
