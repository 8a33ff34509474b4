"""A family record for an architecture that has none, found by looking at the model: its modules, and what feeds what."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint
from compress.engine.recorder import Forward, replaced
from compress.errors import CheckpointError
from compress.families.dataflow import Flow, divides
from compress.families.family import Family, ScalePair, within
from compress.skeleton import build_skeleton
from compress.untrusted import foreign

_IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_NEEDED = ("num_attention_heads", "num_hidden_layers")
_TOKENS = 8
_MOST_PACKED = 32
"""How many weights a number on disk holds at most."""
_NOR = "Nor can a family be derived from the model"
_REMEDY = (
    "A record names the decoder's blocks, embeddings and head, the vision tower, its blocks and projector, and the norms and "
    "linears between which scales can move: docs/adding-a-family.md says how to write one"
)
_MATRIX = 2


def derive_family(checkpoint: Checkpoint, misfit: str, trust_remote_code: bool = False) -> Family:
    """Return a record for a checkpoint that fits none, for the reason `misfit`; what was derived stands in its `derived`.

    The decoder is run on a few tokens without its weights, every tensor followed. Its blocks have to consist of norms, linear
    layers that run once each, and what has no weights; scales move only where the tensors show that it changes nothing.

    Raises:
        CheckpointError: transformers does not know the architecture, or it is built otherwise.
    """
    shapes = tuple((name, entry.shape) for name, entry in checkpoint.tensors.items())
    return _derive(checkpoint.folder, json.dumps(checkpoint.config, sort_keys=True), shapes, misfit, trust_remote_code)


@lru_cache(maxsize=4)
def _derive(
    folder: Path, config: str, shapes: tuple[tuple[str, tuple[int, ...]], ...], misfit: str, trust_remote_code: bool
) -> Family:
    try:
        model: Any = build_skeleton(folder, torch.float32, torch.device("cpu"), trust_remote_code)
    except CheckpointError as error:
        raise CheckpointError(f"{misfit}. Nor can a family be derived from the model: {error}") from error
    return _Inspection(model, misfit, json.loads(config), dict(shapes)).family()


@dataclass(frozen=True)
class _Inspection:
    """The search for a model's parts; the model is without memory."""

    model: Any
    misfit: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def family(self) -> Family:
        """Return what was found.

        Raises:
            CheckpointError: the model is built otherwise.
        """
        self._check_widths()
        with self._telling("it is built otherwise than models that are known"):
            return self._family()

    def _family(self) -> Family:
        names = {id(module): name for name, module in self.model.named_modules()}
        try:
            embeddings, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        except NotImplementedError:
            embeddings = head = None
        if id(embeddings) not in names or id(head) not in names:
            self._refuse("its embeddings or its output head cannot be found")
        flow, called = self._run(names)
        blocks = self._blocks(called)
        scale_pairs = self._pairs(flow, blocks)
        vision = self._apart(called, names[id(head)])
        towers = tuple(self._towers(vision))
        projector = tuple(part for part in vision if not any(within(tower, part) for tower in towers))
        text = cast("Mapping[str, Any]", self.config.get("text_config") or self.config)
        if unsaid := [key for key in _NEEDED if text.get(key) is None]:
            self._refuse(f"config.json leaves {unsaid[0]} of its text's part to transformers; write it there")
        keys = tuple(key for key in _IMAGE_TOKENS if self.config.get(key) is not None)
        if vision and not keys:
            self._refuse(f"config.json has none of {', '.join(_IMAGE_TOKENS)}, so its images' tokens are not known")
        found = Family(
            name=str(self.config["model_type"]),
            model_type=str(self.config["model_type"]),
            architecture=str((self.config.get("architectures") or [type(self.model).__name__])[0]),
            renames=self._renames(),
            vision=vision,
            projector=projector,
            vision_blocks=towers,
            embeddings=names[id(embeddings)],
            blocks=blocks,
            head=names[id(head)],
            image_token_keys=keys,
            scale_pairs=scale_pairs,
            vision_scale_pairs=(),
            tied_by=(),
            tied_default=f"{names[id(head)]}.weight" in (getattr(self.model, "all_tied_weights_keys", None) or {}),
            derived="",
        )
        return _described(found)

    def _refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.misfit}. {_NOR}: {reason}. {_REMEDY}")

    def _telling(self, reason: str) -> AbstractContextManager[None]:
        """Let whatever the model's own code raises be a refusal for that reason."""
        return foreign(f"{self.misfit}. {_NOR}: {reason}", remedy=_REMEDY)

    def _check_widths(self) -> None:
        """Check that the model's layers are about as wide as the tensors on disk, before numbers of that width are made."""
        widest = max((max(parameter.shape, default=0) for parameter in self.model.parameters()), default=0)
        there = max((max(shape, default=0) for shape in self.shapes.values()), default=0)
        if widest > _MOST_PACKED * there:
            self._refuse(f"config.json makes layers {widest:,} wide, and the widest tensor has {there:,}")

    def _run(self, names: Mapping[int, str]) -> tuple[Flow, set[str]]:
        """Run the decoder on text, and return what happened and which modules took part."""
        decoder = self.model.get_decoder()
        if id(decoder) not in names:
            self._refuse("its decoder cannot be found")
        for name, parameter in decoder.named_parameters():
            if parameter.dim() > _MATRIX:
                self._refuse(f"{name} is a stack of matrices, as of experts, and no linear layer")
        leaves = {name: module for name, module in _modules(self.model) if not list(module.children())}
        weighty = {name: module for name, module in leaves.items() if list(module.parameters())}
        called: set[str] = set()

        def note(module: nn.Module, args: object) -> None:
            called.add(names[id(module)])

        hooks = [module.register_forward_pre_hook(note) for module in self.model.modules()]
        tokens = torch.arange(_TOKENS).unsqueeze(0)
        try:
            failing = self._telling("its decoder does not run on text alone")
            with failing, torch.no_grad(), _without_weights(decoder), Flow(weighty) as flow:
                decoder(input_ids=tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return flow, called

    def _blocks(self, called: set[str]) -> str:
        """Return the name of the list of blocks that the decoder ran through."""
        lists = [name for name, module in _modules(self.model) if isinstance(module, nn.ModuleList)]
        blocks = {name: [f"{name}.{place}" for place, _ in self.model.get_submodule(name).named_children()] for name in lists}
        run = [name for name, parts in blocks.items() if called.intersection(parts)]
        outer = [name for name in run if not any(name != other and within(name, other) for other in run)]
        if len(outer) != 1:
            self._refuse(f"its decoder runs through {len(outer)} lists of blocks for a text, where one is expected")
        if idle := [name for name in blocks[outer[0]] if name not in called]:
            self._refuse(f"{idle[0]} has no part in a text")
        return outer[0]

    def _pairs(self, flow: Flow, blocks: str) -> tuple[ScalePair, ...]:
        """Return the pairs that hold in every block that has their modules."""
        found: dict[str, list[ScalePair]] = {}
        for place, block in self.model.get_submodule(blocks).named_children():
            name = f"{blocks}.{place}"
            self._check_block(flow, name, block)
            found[name] = list(self._block_pairs(flow, name, block))
        every = dict.fromkeys(pair for scale_pairs in found.values() for pair in scale_pairs)
        return tuple(pair for pair in every if all(pair in pairs or not self._has(name, pair) for name, pairs in found.items()))

    def _has(self, block: str, pair: ScalePair) -> bool:
        modules = dict(self.model.get_submodule(block).named_modules())
        return all(name in modules for name in (pair.smooth_layer, *pair.balance_layers))

    def _check_block(self, flow: Flow, name: str, block: nn.Module) -> None:
        linears = [part for part, module in _modules(block) if isinstance(module, nn.Linear)]
        for part, parameter in block.named_parameters():
            if parameter.dim() > 1 and part.rpartition(".")[0] not in linears:
                self._refuse(f"{name}.{part} is a weight of more than one dimension that belongs to no linear layer")
        for part in linears:
            calls = len(flow.called[f"{name}.{part}"].inputs) if f"{name}.{part}" in flow.called else 0
            if calls != 1:
                self._refuse(f"{name}.{part} runs {calls} times for a text, not once")
        norms = [part for part, module in _modules(block) if not isinstance(module, nn.Linear) and f"{name}.{part}" in flow.called]
        if not any(flow.fed(output) for part in norms for output in flow.called[f"{name}.{part}"].outputs):
            self._refuse(f"no norm of {name} feeds linear layers")

    def _block_pairs(self, flow: Flow, name: str, block: nn.Module) -> Iterable[ScalePair]:
        """Return the pairs of one block, in the order in which their sources run."""
        modules = {f"{name}.{part}": (part, module) for part, module in _modules(block)}
        for full, called in flow.called.items():
            if full not in modules or len(called.outputs) != 1:
                continue
            (part, module), output = modules[full], called.outputs[0]
            if not isinstance(module, nn.Linear):
                fed = self._linears(flow.fed(output), name)
                if fed and divides(module):
                    yield ScalePair(part, fed)
                continue
            product = flow.multiplied(output)
            fed = self._linears(flow.fed(product), name) if product is not None else ()
            if fed:
                yield ScalePair(part, fed)
            elif (values := self._attended(flow, name, output)) is not None:
                yield ScalePair(part, values[:1], grouped=values[1:] == ("grouped",))

    def _linears(self, names: Sequence[str], block: str) -> tuple[str, ...]:
        """Return the names within the block; empty where one is no linear layer of it."""
        inside = all(within(name, block) and isinstance(self.model.get_submodule(name), nn.Linear) for name in names)
        return tuple(name.removeprefix(f"{block}.") for name in names) if inside else ()

    def _attended(self, flow: Flow, block: str, values: Tensor) -> tuple[str, ...] | None:
        """Return the linear that attention's values reach, and "grouped" where it reads each of them more than once."""
        reached = flow.through_attention(values)
        linear = self._linears((reached[0],), block) if reached else ()
        if reached is None or not linear:
            return None
        channels, width = reached[1], values.shape[-1]
        if torch.equal(channels, torch.arange(width, dtype=channels.dtype)):
            return linear
        heads = self._heads()
        size = len(channels) // heads if heads else 0
        if not size or width % size or heads % (width // size):
            return None
        spread = torch.arange(width, dtype=channels.dtype).view(width // size, 1, size)
        expected = spread.expand(width // size, heads * size // width, size).reshape(-1)
        return (*linear, "grouped") if torch.equal(channels, expected) else None

    def _heads(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "num_attention_heads", 0))

    def _apart(self, called: set[str], head: str) -> tuple[str, ...]:
        """Return the outermost modules with weights that no text goes through, other than the head."""
        used = {".".join(name.split(".")[:count]) for name in {*called, head} for count in range(name.count(".") + 2)}
        found: list[str] = []
        for name, module in _modules(self.model):
            if name not in used and list(module.parameters()) and not any(within(name, part) for part in (*found, head)):
                found.append(name)
        return tuple(found)

    def _towers(self, vision: Sequence[str]) -> Iterable[str]:
        """Return, for each module that sees images and has lists of like modules, the longest, of these the largest."""
        for part in vision:
            inside = [(f"{part}.{name}", module) for name, module in _modules(self.model.get_submodule(part))]
            lists = [(name, module) for name, module in inside if isinstance(module, nn.ModuleList)]
            alike = [(len(module), _size(module), name) for name, module in lists if len({type(block) for block in module}) == 1]
            if alike:
                yield max(alike)[2]

    def _renames(self) -> tuple[tuple[str, str], ...]:
        """Return how names on disk become module names, and check that each has its own place."""
        places: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name, tensor in self.model.state_dict().items():
            places.setdefault((name.rpartition(".")[2], tuple(tensor.shape)), []).append(name)
        rules: dict[str, str] = {}
        matches: dict[str, str] = {}
        for name, shape in self.shapes.items():
            free = places.get((name.rpartition(".")[2], shape), [])  # there is none for a part of a packed weight
            target = max(free, key=partial(_likeness, name), default="")
            if target:
                free.remove(target)
                matches[name] = target
                disk, module = _differing(name, target)
                rules[disk] = module
        ordered = sorted(rules.items(), key=lambda rule: -len(rule[0]))
        renames = tuple((rf"^{re.escape(disk)}(?=\.|$)", module) for disk, module in ordered if disk != module)
        probe = Family("", "", "", renames, (), (), (), "", "", None, (), (), ())
        owners = {probe.module_name(name).rpartition(".")[0] for name in self.shapes}
        modules = {"", *(name for name, _ in _modules(self.model))}
        missing = sorted(name for name, target in matches.items() if probe.module_name(name) != target)
        missing += sorted(owner for owner in owners if owner not in modules)
        if missing:
            self._refuse(f"{missing[0]}, a name on disk, cannot be told from others' in the model")
        return renames


@contextmanager
def _without_weights(decoder: nn.Module) -> Generator[None]:
    """Let linear layers and embeddings give random numbers of the right shape; what else has weights gets one number everywhere."""
    generator = torch.Generator().manual_seed(0)
    stubs: dict[str, Forward] = {}
    for name, module in _modules(decoder):
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            stubs[name] = partial(_random, generator, module.out_features, 1)
        elif isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
            stubs[name] = partial(_random, generator, module.embedding_dim, 0)
        else:
            for part, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(part, nn.Parameter(torch.ones(()).expand(parameter.shape), requires_grad=False))
    with replaced(decoder, stubs):
        yield


def _random(generator: torch.Generator, width: int, replaced: int, given: Tensor) -> Tensor:
    """Return random numbers of the shape given, its last `replaced` dimensions left away, and `width` channels."""
    return torch.rand((*given.shape[: given.dim() - replaced], width), generator=generator)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return all modules within a module, by their names in it."""
    found = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
    return [(name, part) for name, part in found if name]


def _likeness(name: str, key: str) -> tuple[int, int, int]:
    """Return how alike two names are: how much of their ends they share, how many words, how little their lengths differ."""
    ours, theirs = name.split("."), key.split(".")
    return _shared_end(ours, theirs), len(set(ours) & set(theirs)), -abs(len(ours) - len(theirs))


def _shared_end(ours: Sequence[str], theirs: Sequence[str]) -> int:
    count = 0
    for one, other in zip(reversed(ours), reversed(theirs), strict=False):
        if one != other:
            break
        count += 1
    return count


def _differing(name: str, key: str) -> tuple[str, str]:
    """Return the beginnings of two names up to the first word, counted from where they differ, that both have."""
    ours, theirs = name.split("."), key.split(".")
    shared = max(_shared_end(ours, theirs) - 1, 0)
    return ".".join(ours[: len(ours) - shared]), ".".join(theirs[: len(theirs) - shared])


def _described(family: Family) -> Family:
    """Return the family with a text of what was derived."""
    scale_pairs = "; ".join(f"{pair.smooth_layer} → {', '.join(pair.balance_layers)}" for pair in family.scale_pairs) or "none"
    text = (
        f"{family.model_type}: no family record fits, and one was derived from the model: decoder blocks {family.blocks}, "
        f"embeddings {family.embeddings}, head {family.head}; vision {', '.join(family.vision) or 'none'}, its blocks "
        f"{', '.join(family.vision_blocks) or 'none'}, projector {', '.join(family.projector) or 'none'}; scales move between "
        f"{scale_pairs}, and not within the vision tower. Compare this with the architecture, and the result with the original"
    )
    return replace(family, derived=text)
