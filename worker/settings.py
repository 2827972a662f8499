"""What the engine is opened with: every setting of the base, the adapters and the engine, its flag, and its environment
variable. The command line and a queue's workers read them by these same definitions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import click
from click.core import ParameterSource

from loramill.schemas.failures import ExitCode, Failure
from loramill.worker.adapters_file import specs_of_json
from loramill.worker.specs import AdapterSpec, check_name, spec_of

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_POWERS = "KMGT"
_GIVEN = f"{__name__}.given"

LoraMode = Literal["auto", "dynamic", "static"]
Order = Literal["throughput", "input"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """Which adapters there are."""

    adapters: Mapping[str, AdapterSpec] = field(default_factory=dict)
    adapters_json: Mapping[str, AdapterSpec] = field(default_factory=dict)
    adapters_dir: Path | None = None
    adapters_file: Path | None = None
    """TOML or JSON, with aliases and routes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions(AdapterOptions):
    """The base, the adapters, and how the engine serves them."""

    base_model: str
    """A folder, or an id on the hub."""
    base_name: str | None = None
    """What rows call the base; None takes the last part of `base_model`."""
    allow_noop_adapters: bool = False
    chat_template: Path | None = None
    max_lora_rank: int = 64
    max_model_len: int | None = None
    max_loras_per_batch: int | None = None
    """None goes by the adapters: `Models.slots`."""
    max_loaded_loras: int | None = None
    lora_host_bytes: int | None = None
    """None lets the engine choose."""
    lora_eviction_policy: str = "plan"
    pinned: Sequence[str] = ()
    """Names of adapters that are never evicted."""
    preload: bool = False
    lora_mode: LoraMode = "auto"
    order: Order = "throughput"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 8192
    kv_cache_memory: int | None = None
    """Bytes; None lets the engine choose."""
    no_prefix_sharing: bool = False
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    """For rows without a seed of their own."""
    no_dedupe: bool = False
    """Whether rows are computed one by one though they must come to the same answer. In a queue a job says so."""
    longest_row: int | None = None
    """Tokens of the longest row that will come, prompt and answer, where that is known: it saves cache memory."""


class _CommaSeparated(click.types.StringParamType):
    """Text of which an environment variable holds several, with commas between."""

    envvar_list_splitter = ","


def size(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    """Bytes of `4GiB`, `512MB` or `1000000`; None for `auto`."""
    if value.lower() == "auto":
        return None
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise click.BadParameter(f"{value!r} is not a size: write it like 4GiB, 512MB or 1000000, or auto", ctx, param)
    number, unit = found.groups()
    scale = 1 if unit is None else (1024 if len(unit) == 2 else 1000) ** (_POWERS.index(unit[0].upper()) + 1)
    count = int(float(number) * scale)
    if count < 1:
        raise click.BadParameter(f"{value!r} is not above 0", ctx, param)
    return count


def _count(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    """A number from 1; None for `auto`."""
    if value.lower() == "auto":
        return None
    if not value.isdecimal() or not int(value):
        raise click.BadParameter(f"{value!r} is neither a number above 0 nor auto", ctx, param)
    return int(value)


def _named_specs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, AdapterSpec]:
    """Every `NAME=SPEC`; a bad name, or the same one twice, is a usage error."""
    named: dict[str, AdapterSpec] = {}
    for value in values:
        name, _, text = value.strip().partition("=")
        if not text:
            raise click.BadParameter(f"{value!r} is not NAME=PATH", ctx, param)
        try:
            check_name(name)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from error
        if name in named:
            raise click.BadParameter(f"adapter {name!r} is given twice", ctx, param)
        named[name] = spec_of(text)
    return named


def _several(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Every name, also of several with commas between."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def _json_specs(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, AdapterSpec]:
    """Every adapter of a JSON object."""
    if not value:
        return {}
    try:
        return specs_of_json(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


class _Setting(click.Option):
    """An option whose variable is looked up in the context's `obj` if that is set; click's knows `os.environ` alone."""

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        value, source = super().consume_value(ctx, opts)
        if source is ParameterSource.COMMANDLINE:
            ctx.meta.setdefault(_GIVEN, {})[str(self.envvar)] = value
        return value, source

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        environ: Mapping[str, str] = os.environ if ctx.obj is None else ctx.obj
        return environ.get(str(self.envvar)) or None


_Command = TypeVar("_Command", bound=Callable[..., Any])
_Options = TypeVar("_Options")
Flag = Callable[[Any], Any]
"""Decorates a click command."""


def flag(name: str, *short: str, dest: str | None = None, **settings: Any) -> Flag:
    """`--some-flag`, which `LORAMILL_SOME_FLAG` sets too."""
    variable = "LORAMILL_" + name.removeprefix("--").replace("-", "_").upper()
    settings.setdefault("show_default", settings.get("default") is not None and not settings.get("is_flag"))
    names = [*short, name, *([dest] if dest else [])]
    return click.option(*names, cls=_Setting, envvar=variable, show_envvar=True, **settings)


def flagged(flags: Sequence[Flag]) -> Callable[[_Command], _Command]:
    """Decorates a click command with all of them; --help has them in this order."""

    def decorate(command: _Command) -> _Command:
        for one in reversed(flags):
            command = one(command)
        return command

    return decorate


FILE = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)
_DTYPES = click.Choice(["auto", "bfloat16", "float16", "float32"])

ADAPTER_FLAGS = [
    flag("--adapter", dest="adapters", multiple=True, type=_CommaSeparated(), callback=_named_specs,
         metavar="NAME=PATH_OR_ID[@REV][*SCALE]",
         help="A LoRA adapter and its name in job lines; repeat it. In the environment: comma-separated."),
    flag("--adapters", dest="adapters_json", callback=_json_specs, metavar="JSON",
         help='Adapters as one JSON object: {"name": "path"}.'),
    flag("--adapters-dir", type=FILE, metavar="DIR", help="Every sub-folder with an adapter, named after it."),
    flag("--adapters-file", type=FILE, metavar="FILE", help="Adapters, aliases and routes, as .toml or .json."),
]  # fmt: skip

BASE_HELP = "A model folder, or an id on the hub."
MAX_RANK = flag("--max-lora-rank", type=POSITIVE, default=64, help="Adapters over this rank are refused.")
ALLOW_NOOP = flag("--allow-noop-adapters", is_flag=True, help="Accept adapters that change nothing.")
DEVICE = flag("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute.")

SEED = flag("--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="For rows without a seed of their own.")

OFFER_FLAGS = [
    flag("--base-name", metavar="NAME", help="The base's name in job lines.  [default: last part of --base-model]"),
    *ADAPTER_FLAGS,
    ALLOW_NOOP,
    flag("--max-loras-per-batch", callback=_count, default="auto", metavar="auto|N",
         help="Adapters on the device at once, at most; auto goes by how many there are and how large."),
    flag("--max-model-len", type=POSITIVE, help="Prompt and output tokens of a row.  [default: the model's context]"),
    MAX_RANK,
    flag("--dtype", type=_DTYPES, default="auto", help="What to compute in."),
    flag("--chat-template", type=FILE, metavar="FILE", help="A Jinja chat template in place of the base's own."),
]  # fmt: skip
"""What rows can ask for, with --base-model."""

MODEL_FLAGS = [
    flag("--base-model", required=True, metavar="PATH_OR_ID", help=BASE_HELP),
    *OFFER_FLAGS,
    flag("--max-loaded-loras", type=POSITIVE, help="Adapters in host memory at once.  [default: as many as fit]"),
    flag("--lora-host-bytes", callback=size, default="auto", metavar="auto|SIZE",
         help="Host memory for adapters, such as 4GiB."),
    flag("--lora-eviction-policy", type=click.Choice(["plan", "lru", "fifo"]), default="plan",
         help="Which adapter makes room: the one needed last, the least recently used, or the first to come."),
    flag("--pin", dest="pinned", multiple=True, type=_CommaSeparated(), callback=_several, metavar="NAME",
         help="An adapter that is never evicted; repeat it. In the environment: comma-separated."),
    flag("--preload", is_flag=True, help="Read adapters into host memory before the first row."),
    flag("--lora-mode", type=click.Choice(get_args(LoraMode)), default="auto",
         help="Adapters side by side, merged into the base one after another, or by measured cost for each."),
    flag("--order", type=click.Choice(get_args(Order)), default="throughput",
         help="Rows start as it is fastest, or about in input order."),
    flag("--max-num-seqs", type=POSITIVE, help="Sequences in flight.  [default: what the device suits]"),
    flag("--max-num-batched-tokens", type=POSITIVE, default=8192, help="Tokens in one forward pass."),
    DEVICE,
    flag("--kv-cache-memory", callback=size, default="auto", metavar="auto|SIZE",
         help="Memory for keys and values, such as 4GiB."),
    flag("--no-prefix-sharing", is_flag=True, help="Compute what prompts have in common for each of them."),
    SEED,
]  # fmt: skip
"""And how an engine serves it."""


def settings_from(environ: Mapping[str, str], flags: Sequence[Flag], make: Callable[..., _Options]) -> _Options:
    """The settings of these variables, `LORAMILL_BASE_MODEL` and so on, as the command line has them.

    Raises Failure (USAGE), which names the variable, for one that is missing or that cannot be read.
    """

    @click.command(add_help_option=False)
    @flagged(flags)
    def command(**given: Any) -> _Options:
        return make(**given)

    try:
        with command.make_context("settings", [], obj=environ) as context:
            options: _Options = command.invoke(context)
    except click.UsageError as error:
        raise Failure(ExitCode.USAGE, error.format_message()) from error
    return options


def given_variables(context: click.Context) -> dict[str, str]:
    """What the command line alone gave, as the variables that say the same: for a process that reads no other."""
    given: dict[str, Any] = context.meta.get(_GIVEN, {})
    return {
        name: ",".join(value) if isinstance(value, tuple | list) else "1" if value is True else str(value)
        for name, value in given.items()
    }
