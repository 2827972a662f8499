"""A place for each of an adapter's tensors, and a tensor for each place that its config names.

Names and shapes in, a plan and its problems out: nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from loramill.worker.claims import SHOWN, Claims, some
from loramill.worker.model import BaseInfo
from loramill.worker.packed import Part, Target
from loramill.worker.peft_config import LoraSettings
from loramill.worker.tensor_names import Kind, Place, Rows


@dataclass(slots=True)
class Fit:
    """What each tensor of an adapter is for, by the tensor's name."""

    targets: dict[str, Target] = field(default_factory=dict)
    """Linear layers' low-rank pairs, by module path."""
    embeddings: dict[str, Target] = field(default_factory=dict)
    """The same of embeddings, whose `in` is the vocabulary."""
    replaced: dict[str, str] = field(default_factory=dict)
    """Whole parameters: the base's name -> the tensor's."""
    tokens: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Rows of an embedding or head trained by themselves: module path -> tensor, token ids."""
    vocab_size: int = 0
    """Rows of embedding and head where training added tokens, otherwise 0."""
    equal: list[tuple[str, str]] = field(default_factory=list)
    """Tensors that must be equal: two names of one meaning."""
    copies: list[tuple[str, str]] = field(default_factory=list)
    """Tensors that have a place only if they repeat the base's own, with its name."""
    strays: list[str] = field(default_factory=list)
    """Tensors without a place."""
    misfits: list[str] = field(default_factory=list)
    """Pairs of other shapes than the base and the config want."""
    problems: list[str] = field(default_factory=list)
    """All of them, the first few misfits included."""

    @property
    def parts(self) -> list[tuple[str, Part]]:
        """Every low-rank pair with its module."""
        modules = [*self.targets.items(), *self.embeddings.items()]
        return [(module, part) for module, target in modules for part in target.parts]


def fit(shapes: Mapping[str, tuple[int, ...]], settings: LoraSettings, base: BaseInfo) -> Fit:
    """Give every tensor its place."""
    claims = Claims(shapes, settings, base)
    found = Fit(strays=claims.strays, problems=claims.twice, equal=claims.equal)
    _measure_vocabulary(claims, found)
    _place_pairs(claims, found)
    _place_whole(claims, found)
    _place_tokens(claims, found)
    found.problems += found.misfits[:SHOWN]
    if len(found.misfits) > SHOWN:
        found.problems.append(f"{len(found.misfits) - SHOWN} more modules do not fit this base model either")
    found.problems += claims.disagreements()
    return found


def reasons(found: Fit, settings: LoraSettings, base: BaseInfo) -> tuple[str, ...]:
    """Why an adapter can only be served merged, for messages; empty where it can be served either way."""
    parts = [part for _, part in found.parts]
    biases = {name for name in found.replaced if settings.bias != "none" and name.endswith(".bias")}
    saved = {name.rpartition(".")[0] for name in found.replaced.keys() - biases}
    if found.vocab_size:
        saved -= {base.embedding, base.head}
    why = {
        "DoRA": any(part.magnitude for part in parts),
        "lora_bias": any(part.bias for part in parts),
        "bias": biases,
        f"modules_to_save: {some(saved)}": saved,
        "LoRA on embeddings": found.embeddings,
        "trainable_token_indices": found.tokens,
        f"a vocabulary of {found.vocab_size} tokens": found.vocab_size,
    }
    return tuple(reason for reason, holds in why.items() if holds)


def _measure_vocabulary(claims: Claims, found: Fit) -> None:
    """Whether tokens were added in training: PEFT then saves embedding and head whole."""
    base, sizes = claims.base, dict[str, int]()
    for module in claims.ends:
        own = base.parameters[f"{module}.weight"]
        for kind in (Kind.WEIGHT, Kind.KEPT_WEIGHT):
            _, name = claims.whole.get((f"{module}.weight", kind), ("", ""))
            shape = claims.shapes.get(name, own)
            if len(shape) == 2 and shape[1] == own[1] and shape[0] != own[0]:
                sizes[module] = shape[0]
                found.replaced.setdefault(f"{module}.weight", name)  # what was trained, rather than what it was before
    if not sizes:
        return
    if base.tied_head and base.head and base.embedding in sizes:
        sizes.setdefault(base.head, sizes[base.embedding])
        found.replaced.setdefault(f"{base.head}.weight", found.replaced[f"{base.embedding}.weight"])
    rows = base.parameters[f"{base.embedding}.weight"][0]
    if len(sizes) == 2 and len(set(sizes.values())) == 1 and min(sizes.values()) > rows:
        found.vocab_size = min(sizes.values())
        return
    named = ", ".join(f"{module} has {count} rows" for module, count in sizes.items())
    found.problems.append(
        f"it was trained with another vocabulary: {named}, the base's {rows}; "
        "served are an embedding and a head that both grew to one size"
    )


def _place_pairs(claims: Claims, found: Fit) -> None:
    """Low-rank pairs, and what stands beside them: magnitudes, and biases of B."""
    base, names = claims.base, claims.names
    parts: dict[str, list[Part]] = {}
    linears = dict(base.linears)
    if found.vocab_size and base.head:
        linears[base.head] = (found.vocab_size, linears[base.head][1])
    for path, held in claims.pairs.values():
        module = names.module(path)
        if module is not None and module == base.embedding:
            vocab, hidden = base.parameters[f"{module}.weight"]
            vocab = found.vocab_size or vocab
            whole = Place(module, Rows(0, hidden), Rows(0, hidden))
            for part in _parts(claims, found, path, held, [whole], vocab):
                found.embeddings[module] = Target((part,), hidden, vocab)
            continue
        places = names.places(path)
        if module is not None and module == base.head:
            whole_head = Rows(0, linears[module][0])
            places = [Place(module, whole_head, whole_head)]
        for place, part in zip(
            places, _parts(claims, found, path, held, places, linears[places[0].module][1]), strict=False
        ):
            parts.setdefault(place.module, []).append(part)
    for module, pairs in parts.items():
        pairs.sort(key=lambda part: part.target)
        overlaps = [(one, other) for one, other in pairwise(pairs) if other.target.start < one.target.stop]
        found.problems += [f"{one.b} and {other.b} both change {module}" for one, other in overlaps]
    # In the model's order, whatever the file's: that is how they are packed.
    found.targets = {m: _shared(Target(tuple(parts[m]), *linears[m])) for m in base.linears if m in parts}


@cache
def _shared(target: Target) -> Target:
    """The first of all equal ones, for adapters of one recipe to share: 10 KB each over 224 modules, not 122."""
    return target


def _parts(
    claims: Claims, found: Fit, path: str, held: Mapping[Kind, str], places: list[Place], columns: int
) -> list[Part]:
    """A pair of tensors at each of its places, or problems and nothing."""
    where, settings, shapes = claims.names.same(path), claims.settings, claims.shapes
    a, b = held.get(Kind.A) or held.get(Kind.EMBEDDING_A), held.get(Kind.B) or held.get(Kind.EMBEDDING_B)
    if a is None or b is None:
        found.problems.append(f"{where} has only {some(held)}: both lora_A and lora_B are needed")
        return []
    rank, rows = settings.rank(path), places[-1].source.stop
    if shapes[a] != (rank, columns) or shapes[b] != (rows, rank):
        found.misfits.append(
            f"{where}: lora_A {list(shapes[a])} and lora_B {list(shapes[b])} must be [{rank}, {columns}] and "
            f"[{rows}, {rank}] for this base model and the config's rank"
        )
        return []
    beside = {"use_dora": (settings.use_dora, Kind.MAGNITUDE), "lora_bias": (settings.lora_bias, Kind.B_BIAS)}
    for option, (is_set, kind) in beside.items():
        name = held.get(kind)
        if name is None and is_set:
            found.problems.append(f"{where} has no {kind}, and `{option}` is set")
        elif name is not None and not is_set:
            found.problems.append(f"{name} is there, and `{option}` is not set")
        elif name is not None and shapes[name] != (rows,):
            found.problems.append(f"{name} must have {rows} numbers for this base model, not {list(shapes[name])}")
    scale, magnitude, bias = settings.scale(path), held.get(Kind.MAGNITUDE), held.get(Kind.B_BIAS)
    return [Part(a, b, rank, scale, place.source, place.target, magnitude, bias) for place in places]


def _place_whole(claims: Claims, found: Fit) -> None:
    """Parameters that were saved whole: trained, or the base's own beside a pair."""
    base = claims.base
    for (parameter, kind), (path, name) in claims.whole.items():
        module = parameter.rpartition(".")[0]
        is_kept, is_bias = kind in (Kind.KEPT_WEIGHT, Kind.KEPT_BIAS), kind in (Kind.BIAS, Kind.KEPT_BIAS)
        if found.replaced.get(parameter) == name:
            continue  # of a vocabulary that grew
        if not (is_bias and claims.trains_bias(module)) and (is_kept or not claims.saves(module, path)):
            found.copies.append((name, parameter))
            continue
        if claims.shapes[name] != base.parameters[parameter]:
            shape, wanted = list(claims.shapes[name]), list(base.parameters[parameter])
            found.problems.append(f"{name} {shape} must be {wanted} for this base model")
        if kind is Kind.WEIGHT and (module in found.targets or module in found.embeddings):
            found.problems.append(f"{module} is both saved whole and adapted")
        found.replaced[parameter] = name
    missing = []
    for parameter in base.parameters:
        module, _, part = parameter.rpartition(".")
        is_trained = claims.saves(module, module) or (part == "bias" and claims.trains_bias(module))
        if is_trained and parameter not in found.replaced:
            missing.append(parameter)
    if missing:
        found.problems.append(f"trained whole (`modules_to_save`, `bias`) and without tensors: {some(missing)}")


def _place_tokens(claims: Claims, found: Fit) -> None:
    """Single rows of embedding and head."""
    base = claims.base
    for module in claims.ends:
        ids = tuple(claims.settings.tokens(module, is_embedding=module == base.embedding))
        name = claims.token_rows.get(module)
        rows, hidden = base.parameters[f"{module}.weight"]
        if name is not None and claims.shapes[name] != (len(ids), hidden):
            shape = list(claims.shapes[name])
            found.problems.append(f"{name} {shape} must be [{len(ids)}, {hidden}] for the config's token indices")
        elif not all(0 <= i < (found.vocab_size or rows) for i in ids) or len(set(ids)) < len(ids):
            found.problems.append(f"trainable_token_indices of {module} are not distinct tokens of this base")
        elif name is not None:
            found.tokens[module] = (name, ids)
        elif module == base.head and base.tied_head and base.embedding in found.tokens:
            # PEFT has a tied head follow the embedding's tokens, unless the head has its own.
            found.tokens[module] = found.tokens[base.embedding]
            if ids and ids != found.tokens[module][1]:
                found.problems.append(f"trainable_token_indices of {module} have no tensor")
        elif ids:
            found.problems.append(f"trainable_token_indices of {module} have no tensor")
