"""The command ``spcompile``."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Nothing here may import torch: arguments are checked before that takes its seconds.
from spcompile import __version__
from spcompile.config import Config
from spcompile.errors import SpcompileError
from spcompile.reports.budget import OPTIMIZERS, parse_size

__all__ = ["main"]

_EXAMPLE = "spcompile explain spcompile.example:tiny --ranks 64 --seq 1048576 pattern=LLLN"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 for a fault that doctor found, 2 for a wrong command."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    try:
        result = args.run(args, unknown)
    except (_Usage, SpcompileError) as error:
        print(f"spcompile: {error}", file=sys.stderr)
        return 2
    if isinstance(result, int):
        return result
    print(result)
    return 0


class _Usage(Exception):
    """What was asked for cannot be done; the message says why."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "spcompile", description="Sequence parallelism as a torch.compile backend."
    )
    parser.add_argument("--version", action="version", version=f"spcompile {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    explain = commands.add_parser(
        "explain",
        help="what would be done to a model on many ranks, without them",
        description="How a model would be sharded: attention, collectives, memory. Nothing is allocated.",
        epilog=f"example: {_EXAMPLE}",
        allow_abbrev=False,
    )
    explain.add_argument(
        "model", help="module:factory, a callable that builds the model; the folder is searched first"
    )
    explain.add_argument(
        "overrides", nargs="*", metavar="key=value", help="arguments of the factory (also --key value)"
    )
    explain.add_argument(
        "--ranks", type=_positive, default=8, metavar="P", help="ranks on the sequence axis (8)"
    )
    explain.add_argument(
        "--seq", type=_positive, default=8192, metavar="T", help="tokens in a sequence (8192)"
    )
    explain.add_argument("--batch", type=_positive, default=1, metavar="B", help="sequences in a batch (1)")
    explain.add_argument("--inference", action="store_true", help="no labels and no backward")
    explain.add_argument(
        "--option", action="append", default=[], metavar="key=value", help="an option of the backend"
    )
    explain.add_argument(
        "--optimizer",
        choices=list(OPTIMIZERS),
        default="adamw",
        help="whose state counts in the total (adamw); sgd is with momentum",
    )
    explain.add_argument(
        "--device-memory",
        type=_size,
        metavar="80GB",
        help="what a rank has: does it fit, and on how few ranks would it",
    )
    explain.add_argument(
        "--save", metavar="FOLDER", help="write the report and the graphs before and after there"
    )
    explain.set_defaults(run=_explain)
    variants = commands.add_parser("variants", help="the variants of linear attention, and what ranks send")
    variants.set_defaults(run=_variants)
    doctor = commands.add_parser("doctor", help="is all there that a run needs? with a test on two ranks")
    doctor.add_argument("--no-self-test", action="store_true", help="leave out the test on two ranks")
    doctor.set_defaults(run=_doctor)
    return parser


def _doctor(args: argparse.Namespace, unknown: list[str]) -> int:
    from spcompile.doctor import report

    if unknown:
        raise _Usage(f"{' '.join(unknown)}: no such option; doctor has --no-self-test")
    return report(not args.no_self_test)


def _variants(args: argparse.Namespace, unknown: list[str]) -> str:
    from spcompile.attention.variants import table

    if unknown:
        raise _Usage(f"{' '.join(unknown)}: variants takes no arguments")
    return table()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number, at least 1, got {text!r}")
    return int(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _overrides(words: list[str], unknown: list[str]) -> dict[str, Any]:
    """``key=value`` words, and ``--key value`` options that are not ours, as keyword arguments."""
    pairs = list(words)
    rest = iter(unknown)
    for flag in rest:
        if not flag.startswith("--"):
            pairs.append(flag)
            continue
        value = None if "=" in flag else next(rest, None)
        if "=" not in flag and (value is None or value.startswith("--")):
            raise _Usage(
                f"{flag}: no such option, and as an argument of the model's factory it needs a value"
            )
        pairs.append(flag[2:] if value is None else f"{flag[2:]}={value}")
    return dict(_pair(word) for word in pairs)


def _pair(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise _Usage(f"{word!r}: expected key=value")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return key.replace("-", "_"), value


def _explain(args: argparse.Namespace, unknown: list[str]) -> str:
    args.overrides = _overrides(args.overrides, unknown)
    options = dict(_pair(word) for word in args.option)
    if "ranks" in options:
        raise _Usage("--option ranks=...: say it as --ranks")
    Config.of(options)
    _look_for(args.model)

    import torch

    from spcompile import _torch
    from spcompile.reports.explainer import explain

    factory = _factory(args.model)
    # Fake tensors rather than meta ones: they allocate nothing either, and every operator knows their device.
    with _torch.FakeTensorMode(allow_non_fake_inputs=True, shape_env=_torch.ShapeEnv()):
        model = _build(factory, args.model, args.overrides)
        inputs = _inputs(model, args)
        if args.inference:
            model.eval()
        with torch.no_grad() if args.inference else contextlib.nullcontext():
            report = explain(model, ranks=args.ranks, **options)(**inputs)
    report.optimizer, report.device_memory = args.optimizer, args.device_memory
    report.name = f"{args.model} (batch {args.batch}, {'inference' if args.inference else 'training'})"
    if args.save:
        report.save(Path(args.save))
    return str(report) + (f"\nwritten to {args.save}" if args.save else "")


def _look_for(path: str) -> None:
    """That the path is a module and a name, and that there is such a package; nothing is imported."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise _Usage(f"{path!r}: the model is given as module:factory, for example spcompile.example:tiny")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if importlib.util.find_spec(module_name.partition(".")[0]) is None:
        raise _Usage(f"no module {module_name!r} in this folder or in the environment")


def _factory(path: str) -> Callable[..., Any]:
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but not what it imports: its own traceback says it best
        raise _Usage(f"no module {module_name!r} in this folder or in the environment") from error
    try:
        factory = getattr(module, name)
    except AttributeError as error:
        known = getattr(module, "PRESETS", None) or [n for n in vars(module) if not n.startswith("_")]
        raise _Usage(f"module {module_name!r} has no {name!r}; it has {', '.join(known)}") from error
    if not callable(factory):
        raise _Usage(f"{path} is a {type(factory).__name__}, not a callable that builds a model")
    return factory


def _build(factory: Callable[..., Any], path: str, overrides: dict[str, Any]) -> Any:
    import torch

    try:
        model = factory(**overrides)
    except (TypeError, ValueError) as error:
        raise _Usage(f"{path} cannot be built with {overrides or 'no arguments'}: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise _Usage(f"{path} built a {type(model).__name__}, not a torch.nn.Module")
    return model


def _inputs(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The model's own example inputs if it offers them; otherwise ids for its first argument, and labels."""
    import torch

    parameters = list(inspect.signature(model.forward).parameters)
    if hasattr(model, "example_inputs"):
        inputs = dict(model.example_inputs(args.seq, batch=args.batch))
    elif not parameters:
        raise _Usage(
            f"{args.model}: forward takes no argument; give the model a method example_inputs(seq, batch)"
        )
    else:
        ids = torch.zeros(args.batch, args.seq, dtype=torch.int64)
        inputs = {parameters[0]: ids, **({"labels": ids.clone()} if "labels" in parameters else {})}
    if args.inference:
        inputs.pop("labels", None)
    return inputs
