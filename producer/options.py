"""The options of `loramill run`: every flag, its environment variable, and what values it takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import click

from loramill.producer.adapters_file import specs_of_json
from loramill.producer.specs import AdapterSpec, check_name, spec_of

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_POWERS = "KMGT"


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
    max_loras_per_batch: int = 8
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
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    """For rows without a seed of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(ModelOptions):
    """One run, as the person asked for it."""

    input: str
    output: Path
    errors: Path | None = None
    limit: int | None = None
    on_invalid: str = "fail"
    overwrite: bool = False
    allow_failures: bool = False
    explain: bool = False
    json: bool = False
    quiet: bool = False

    @property
    def errors_path(self) -> Path:
        """Where failed rows go: `out.jsonl.gz` has `out.errors.jsonl.gz` beside it."""
        if self.errors is not None:
            return self.errors
        stem, dot, suffixes = self.output.name.partition(".jsonl")
        if not dot:
            stem, suffixes = self.output.stem, self.output.suffix
        return self.output.with_name(f"{stem}.errors{dot}{suffixes}")

    @property
    def journal_path(self) -> Path:
        """The run's finished rows until the output is whole."""
        return self.output.with_name(self.output.name + ".journal")


class _CommaSeparated(click.types.StringParamType):
    """Text of which an environment variable holds several, with commas between."""

    envvar_list_splitter = ","


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    """Bytes of `4GiB`, `512MB` or `1000000`; None for `auto`."""
    if value.lower() == "auto":
        return None
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise click.BadParameter(f"{value!r} is not a size: write it like 4GiB, 512MB or 1000000, or auto", ctx, param)
    number, unit = found.groups()
    scale = 1 if unit is None else (1024 if len(unit) == 2 else 1000) ** (_POWERS.index(unit[0].upper()) + 1)
    size = int(float(number) * scale)
    if size < 1:
        raise click.BadParameter(f"{value!r} is not above 0", ctx, param)
    return size


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


_Command = TypeVar("_Command", bound=Callable[..., Any])


def _flag(name: str, *short: str, dest: str | None = None, **settings: Any) -> Callable[[_Command], _Command]:
    """`--some-flag`, which `LORAMILL_SOME_FLAG` sets too."""
    variable = "LORAMILL_" + name.removeprefix("--").replace("-", "_").upper()
    settings.setdefault("show_default", settings.get("default") is not None and not settings.get("is_flag"))
    names = [*short, name, *([dest] if dest else [])]
    return click.option(*names, envvar=variable, show_envvar=True, **settings)


_FILE = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)
_DTYPES = click.Choice(["auto", "bfloat16", "float16", "float32"])

ADAPTER_FLAGS = [
    _flag("--adapter", dest="adapters", multiple=True, type=_CommaSeparated(), callback=_named_specs,
          metavar="NAME=PATH_OR_ID[@REV][*SCALE]",
          help="A LoRA adapter and its name in job lines; repeat it. In the environment: comma-separated."),
    _flag("--adapters", dest="adapters_json", callback=_json_specs, metavar="JSON",
          help='Adapters as one JSON object: {"name": "path"}.'),
    _flag("--adapters-dir", type=_FILE, metavar="DIR", help="Every sub-folder with an adapter, named after it."),
    _flag("--adapters-file", type=_FILE, metavar="FILE", help="Adapters, aliases and routes, as .toml or .json."),
]  # fmt: skip

_BASE_HELP = "A model folder, or an id on the hub."
_MAX_RANK = _flag("--max-lora-rank", type=_POSITIVE, default=64, help="Adapters over this rank are refused.")
_ALLOW_NOOP = _flag("--allow-noop-adapters", is_flag=True, help="Accept adapters that change nothing.")
_DEVICE = _flag("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute.")

_RUN_FLAGS = [
    _flag("--input", "-i", required=True, metavar="IN", help="Job lines: .jsonl, .jsonl.gz, .jsonl.zst, or - (stdin)."),
    _flag("--output", "-o", required=True, type=_FILE, metavar="OUT", help="Result lines, in input order."),
    _flag("--base-model", required=True, metavar="PATH_OR_ID", help=_BASE_HELP),
    _flag("--base-name", metavar="NAME", help="The base's name in job lines.  [default: last part of --base-model]"),
    *ADAPTER_FLAGS,
    _ALLOW_NOOP,
    _flag("--errors", type=_FILE, metavar="FILE", help="Failed rows.  [default: OUT with .errors before .jsonl]"),
    _flag("--max-loras-per-batch", type=_POSITIVE, default=8, help="Adapters on the device at once."),
    _flag("--max-loaded-loras", type=_POSITIVE, help="Adapters in host memory at once.  [default: as many as fit]"),
    _flag("--lora-host-bytes", callback=_size, default="auto", metavar="auto|SIZE",
          help="Host memory for adapters, such as 4GiB."),
    _flag("--lora-eviction-policy", type=click.Choice(["plan", "lru", "fifo"]), default="plan",
          help="Which adapter makes room: the one needed last, the least recently used, or the first to come."),
    _flag("--pin", dest="pinned", multiple=True, type=_CommaSeparated(), callback=_several, metavar="NAME",
          help="An adapter that is never evicted; repeat it. In the environment: comma-separated."),
    _flag("--preload", is_flag=True, help="Read adapters into host memory before the first row."),
    _flag("--lora-mode", type=click.Choice(get_args(LoraMode)), default="auto",
          help="Adapters side by side, merged into the base one after another, or by measured cost for each."),
    _flag("--order", type=click.Choice(get_args(Order)), default="throughput",
          help="Rows start as it is fastest, or about in input order."),
    _flag("--max-num-seqs", type=_POSITIVE, help="Sequences in flight.  [default: what the device suits]"),
    _flag("--max-num-batched-tokens", type=_POSITIVE, default=8192, help="Tokens in one forward pass."),
    _flag("--max-model-len", type=_POSITIVE, help="Prompt and output tokens of a row.  [default: the model's context]"),
    _MAX_RANK,
    _flag("--dtype", type=_DTYPES, default="auto", help="What to compute in."),
    _DEVICE,
    _flag("--kv-cache-memory", callback=_size, default="auto", metavar="auto|SIZE",
          help="Memory for keys and values, such as 4GiB."),
    _flag("--chat-template", type=_FILE, metavar="FILE", help="A Jinja chat template in place of the base's own."),
    _flag("--limit", type=_POSITIVE, metavar="N", help="Only the first N rows."),
    _flag("--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="For rows without a seed of their own."),
    _flag("--on-invalid", type=click.Choice(["fail", "skip"]), default="fail",
          help="Invalid lines stop the run before it starts, or go to the error file."),
    _flag("--overwrite", is_flag=True, help="Replace an output that exists, and a journal of another job."),
    _flag("--allow-failures", is_flag=True, help="Exit 0 though rows failed."),
    _flag("--explain", is_flag=True, help="Print the plan and run nothing."),
    _flag("--json", is_flag=True, help="Print one JSON object with the run's numbers on stdout at the end."),
    _flag("--quiet", is_flag=True, help="No progress."),
]  # fmt: skip


_EACH_JSON = _flag("--json", is_flag=True, help="One JSON object an adapter.")
_LIST_FLAGS = [
    *ADAPTER_FLAGS,
    _flag("--base-model", metavar="PATH_OR_ID", help="Say whether they fit it: a model folder, or an id on the hub."),
    _ALLOW_NOOP, _MAX_RANK, _EACH_JSON,
]  # fmt: skip
_VERIFY_FLAGS = [
    *ADAPTER_FLAGS,
    _flag("--base-model", required=True, metavar="PATH_OR_ID", help=_BASE_HELP),
    _flag("--prompt", default="The quick brown fox", metavar="TEXT", help="What is completed."),
    _ALLOW_NOOP, _MAX_RANK, _DEVICE, _EACH_JSON,
]  # fmt: skip


def _options(flags: Sequence[Callable[[Any], Any]]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return decorate


run_options = _options(_RUN_FLAGS)
"""Decorates a click command that takes RunOptions' fields as keyword arguments."""
list_options = _options(_LIST_FLAGS)
"""Of commands about adapters, with or without a base."""
verify_options = _options(_VERIFY_FLAGS)
