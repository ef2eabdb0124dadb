"""Shared by all commands: the import path, common arguments, and exit codes."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from configs.load import load_config
from engine import released
from engine.runtime import launched_processes
from errors import UserError

# Errors of the machine, not of our code: permissions, full disks, names that the file system refuses.
_OF_THE_MACHINE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
                   errno.ENAMETOOLONG, errno.ELOOP}

if TYPE_CHECKING:
    from paddle import nn
    from yacs.config import CfgNode


def argument_parser(description: str, *, config: bool = True, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser; ``config`` adds ``-c CONFIG`` and the repeatable ``-o KEY=VALUE``."""
    parser = argparse.ArgumentParser(description=description, epilog=epilog)
    if config:
        parser.add_argument("-c", "--config", metavar="CONFIG", help="YAML file, for example configs/quickstart.yaml")
        add_override(parser)
    return parser


def add_override(parser: argparse.ArgumentParser) -> None:
    """Add the repeatable ``-o KEY=VALUE``."""
    parser.add_argument("-o", "--override", metavar="KEY=VALUE", action="append", default=[],
                        help="override a key, such as TRAIN.EPOCHS=3 (repeatable)")


def add_weights(parser: argparse.ArgumentParser, *, exported: bool = False) -> None:
    """Add ``-w W``, required; ``exported`` adds ``--engine E`` for the folders that ``load_network`` takes."""
    folder = "a run or exported folder" if exported else "a run folder"
    parser.add_argument("-w", "--weights", required=True, metavar="W",
                        help=f"{folder}, .pdparams, .safetensors, a PyTorch file, or a name in checkpoints/")
    if exported:
        parser.add_argument("--engine", metavar="E", help="of an exported folder, see docs/DEPLOY.md")


def add_image_size(parser: argparse.ArgumentParser, meaning: str = "") -> None:
    """Add ``--image-size S``; ``image_size`` reads what was given."""
    parser.add_argument("--image-size", metavar="S",
                        help="side or HxW in pixels (default: the variant's own)" + (meaning and f"; {meaning}"))


def image_size(text: str | None) -> tuple[int, int] | None:
    """Return (height, width) of an ``--image-size`` such as ``224`` or ``192x256``; UserError for anything else."""
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) > 2 or not all(re.fullmatch(r"[1-9]\d{0,3}", side) and int(side) <= 4096 for side in sides):
        raise UserError(f"--image-size is {text!r}, expected a side such as 224 or a height and width such as 192x256, "
                        "each from 1 to 4096")
    return int(sides[0]), int(sides[-1])


def config_of(weights: str, overrides: Sequence[str], config: str | None = None) -> CfgNode:
    """Return the config of ``-c``, or that of the run folder or released checkpoint of ``-w``, with overrides."""
    return load_config(config or _config_beside(weights), overrides)


def _config_beside(name: str) -> Path:
    checkpoint = released.find_released(name)
    if checkpoint:
        released.check_released(checkpoint)
        return checkpoint / released.CONFIG
    weights = Path(name)
    for folder in (weights, weights.parent):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    if not weights.exists() and not weights.with_name(f"{weights.name}.pdparams").exists():
        raise released.unknown_weights(weights)
    if other := released.describe_other(weights):
        raise UserError(f"{weights} is {other}")
    raise UserError(f"no config: name one with -c ({weights} is in no run folder)")


class Loaded(NamedTuple):
    """A network in evaluation mode, its file, the recorded names of its outputs, and what to print about loading it.

    ``engine`` is "" for the suite's own forward pass.
    """

    network: nn.Layer
    path: Path
    classes: Sequence[str] | None
    lines: list[str]
    engine: str = ""


def exported_folder(weights: str) -> Path | None:
    """Return the exported folder that ``weights`` names, itself or by a program in it, or None."""
    path = Path(weights)
    folder = path.parent if path.is_file() and path.stem == "inference" else path
    return folder if (folder / "inference.yml").is_file() else None


def load_network(config: CfgNode, weights: str, engine: str | None) -> Loaded:
    """Return the network of ``-w``; ``engine`` runs an exported folder and is refused for other weights."""
    folder = exported_folder(weights)
    if folder:
        from deploy.engines import load_exported

        exported = load_exported(folder, engine, config.RUNTIME.THREADS)
        if len(exported.classes) != config.MODEL.NUM_CLASSES:
            raise UserError(f"{folder}: inference.yml has {len(exported.classes)} labels, expected the "
                            f"{config.MODEL.NUM_CLASSES} of the config's MODEL.NUM_CLASSES")
        return Loaded(exported, exported.path, exported.classes, [f"{exported.path}: run by {exported.engine}"],
                      exported.engine)
    if engine:
        raise UserError(f"--engine {engine} is for a folder that tools/export.py wrote, and {weights} is none")
    from engine.data import trained_classes
    from engine.model import load_model

    network, report = load_model(config, weights)
    return Loaded(network, report.path, trained_classes(report.path), report.lines())


def work_folder(weights: str, config: CfgNode) -> Path:
    """Return the folder for results about weights.

    That is their run's folder, ``OUTPUT/released/NAME`` for a released checkpoint, ``OUTPUT/NAME`` for other files and
    exported folders.
    """
    checkpoint = released.find_released(weights)
    if checkpoint:
        return Path(config.OUTPUT) / "released" / checkpoint.name
    path = Path(weights)
    run = path if path.is_dir() else path.parent
    known = (run / "config.yaml").is_file() and not exported_folder(weights)
    return run if known else Path(config.OUTPUT) / config.NAME


def _open_outputs() -> None:
    """Let output be written whatever its encoding is, and where there is none (``>&-``)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the whole process)
        elif isinstance(stream, io.TextIOWrapper):  # a notebook's is not
            stream.reconfigure(errors="replace")


def _expanded(value: Any) -> Any:
    """Return an argument with ``~`` expanded in paths: in quotes and after ``=`` a shell leaves it as it is."""
    if isinstance(value, list):
        return list(map(_expanded, value))
    return type(value)(os.path.expanduser(value)) if isinstance(value, (str, Path)) else value


def run(main: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser,
        argv: Sequence[str] | None = None, *, several_processes: bool = False) -> None:
    """Parse, call ``main`` and exit with 0 or what it returns.

    Exit codes: 2 for a UserError and for errors of the machine, 130 for Ctrl-C, 141 for output that nobody reads. Any
    other exception is a defect and keeps its traceback (1). ``several_processes``: a launcher may start the command.
    """
    _open_outputs()
    arguments = parser.parse_args(argv)
    vars(arguments).update({name: _expanded(value) for name, value in vars(arguments).items()})
    try:
        if not several_processes and launched_processes() > 1:
            raise UserError("this command runs in one process: start it without paddle.distributed.launch")
        code = main(arguments) or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, ImportError) as error:
        if KeyboardInterrupt not in map(type, (error, error.__cause__)):  # Ctrl-C while a C extension is imported
            raise
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # nobody reads our output, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{Path(sys.argv[0]).name}: {where}{error.strerror}", file=sys.stderr)
        code = 2
    sys.exit(code)
