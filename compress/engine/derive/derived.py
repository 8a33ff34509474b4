"""Derivation of a family record for an architecture without one, from the model's modules and the data flow between them."""

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

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.skeleton import build_skeleton
from compress.engine.derive.dataflow import DataFlow, divides
from compress.engine.recorder import Forward, replace_forwards
from compress.errors import CheckpointError
from compress.families.family import Family, ScalePair, within
from compress.untrusted.reading import library_errors

_IMAGE_TOKEN_KEYS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""Keys of config.json with the ids of placeholder tokens."""

_REQUIRED_KEYS = ("num_attention_heads", "num_hidden_layers")
"""Keys of the text section that stages read, and that have no defaults without a record."""

_TOKENS = 8
"""The length of the text that the decoder is run on."""

_MAX_PACKED = 32
"""The most weights that one number on disk can pack."""

_NOR = "Nor can a family be derived from the model"
_REMEDY = (
    "A record names the decoder's blocks, embeddings and head, the vision tower, its blocks and projector, and the norms and "
    "linears between which scales can move: docs/adding-a-family.md says how to write one"
)
_MATRIX = 2
"""The dimensions of a linear's weight; more are a stack, as of experts."""


def derive_family(checkpoint: Checkpoint, misfit: str, trust_remote_code: bool = False) -> Family:
    """Return a derived record for a checkpoint that fits none for the reason `misfit`; its `derived` describes it.

    The decoder is run on a few tokens without its weights, and every tensor is followed. Its blocks must consist of norms, linear
    layers that run once each, and modules without weights; scales move only where the data flow shows that the output is unchanged.

    Raises:
        CheckpointError: transformers does not know the architecture, or it has another structure.
    """
    shapes = tuple((name, entry.shape) for name, entry in checkpoint.tensors.items())
    return _derive(checkpoint.folder, json.dumps(checkpoint.config, sort_keys=True), shapes, misfit, trust_remote_code)


# whoever has only a folder resolves its family again (`family_at`); the arguments are texts and tuples so that they can be hashed
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
    """The search for a model's components; the model is on the meta device."""

    model: Any
    misfit: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def family(self) -> Family:
        """Return the derived record.

        Raises:
            CheckpointError: the model has another structure.
        """
        # before the run: config.json alone decides how large its random activations are
        self._check_widths()
        # the model's own code runs here, and may raise anything
        with self._refusing("it is built otherwise than models that are known"):
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
        vision = self._unused_by_text(called, names[id(head)])
        towers = tuple(self._towers(vision))
        projector = tuple(module for module in vision if not any(within(tower, module) for tower in towers))
        text = cast("Mapping[str, Any]", self.config.get("text_config") or self.config)
        if missing := [key for key in _REQUIRED_KEYS if text.get(key) is None]:
            self._refuse(f"config.json leaves {missing[0]} of its text's part to transformers; write it there")
        keys = tuple(key for key in _IMAGE_TOKEN_KEYS if self.config.get(key) is not None)
        if vision and not keys:
            self._refuse(f"config.json has none of {', '.join(_IMAGE_TOKEN_KEYS)}, so its images' tokens are not known")
        family = Family(
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
        return _with_description(family)

    def _refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.misfit}. {_NOR}: {reason}. {_REMEDY}")

    def _refusing(self, reason: str) -> AbstractContextManager[None]:
        """Translate any error of the model's own code into a refusal with that reason."""
        return library_errors(f"{self.misfit}. {_NOR}: {reason}", remedy=_REMEDY)

    def _check_widths(self) -> None:
        """Check that the model's layers are about as wide as the tensors on disk, before tensors of that width are allocated."""
        widest = max((max(parameter.shape, default=0) for parameter in self.model.parameters()), default=0)
        widest_on_disk = max((max(shape, default=0) for shape in self.shapes.values()), default=0)
        if widest > _MAX_PACKED * widest_on_disk:
            self._refuse(f"config.json makes layers {widest:,} wide, and the widest tensor has {widest_on_disk:,}")

    def _run(self, names: Mapping[int, str]) -> tuple[DataFlow, set[str]]:
        """Run the decoder on text; return the data flow, and the names of the modules that were called."""
        decoder = self.model.get_decoder()
        if id(decoder) not in names:
            self._refuse("its decoder cannot be found")
        for name, parameter in decoder.named_parameters():
            if parameter.dim() > _MATRIX:
                self._refuse(f"{name} is a stack of matrices, as of experts, and no linear layer")
        leaves = {name: module for name, module in _modules(self.model) if not list(module.children())}
        with_weights = {name: module for name, module in leaves.items() if list(module.parameters())}
        called: set[str] = set()

        def note(module: nn.Module, args: object) -> None:
            called.add(names[id(module)])

        hooks = [module.register_forward_pre_hook(note) for module in self.model.modules()]
        tokens = torch.arange(_TOKENS).unsqueeze(0)
        try:
            failing = self._refusing("its decoder does not run on text alone")
            with failing, torch.no_grad(), _without_weights(decoder), DataFlow(with_weights) as flow:
                decoder(input_ids=tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return flow, called

    def _blocks(self, called: set[str]) -> str:
        """Return the name of the list of blocks that the decoder runs through."""
        lists = [name for name, module in _modules(self.model) if isinstance(module, nn.ModuleList)]
        blocks = {name: [f"{name}.{index}" for index, _ in self.model.get_submodule(name).named_children()] for name in lists}
        used = [name for name, children in blocks.items() if called.intersection(children)]
        outer = [name for name in used if not any(name != other and within(name, other) for other in used)]
        if len(outer) != 1:
            self._refuse(f"its decoder runs through {len(outer)} lists of blocks for a text, where one is expected")
        if idle := [name for name in blocks[outer[0]] if name not in called]:
            self._refuse(f"{idle[0]} has no part in a text")
        return outer[0]

    def _pairs(self, flow: DataFlow, blocks: str) -> tuple[ScalePair, ...]:
        """Return the scale pairs that are valid in every block that has their modules."""
        by_block: dict[str, list[ScalePair]] = {}
        for index, block in self.model.get_submodule(blocks).named_children():
            name = f"{blocks}.{index}"
            self._check_block(flow, name, block)
            by_block[name] = list(self._block_pairs(flow, name, block))
        # in the order of the first block: a dict keeps it, a set would not
        candidates = dict.fromkeys(pair for scale_pairs in by_block.values() for pair in scale_pairs)
        # blocks may differ (cross-attention): a pair counts if it holds wherever all its modules exist
        return tuple(
            pair for pair in candidates if all(pair in pairs or not self._has(name, pair) for name, pairs in by_block.items())
        )

    def _has(self, block: str, pair: ScalePair) -> bool:
        modules = dict(self.model.get_submodule(block).named_modules())
        return all(name in modules for name in (pair.smooth_layer, *pair.balance_layers))

    def _check_block(self, flow: DataFlow, name: str, block: nn.Module) -> None:
        linears = [local for local, module in _modules(block) if isinstance(module, nn.Linear)]
        for local, parameter in block.named_parameters():
            if parameter.dim() > 1 and local.rpartition(".")[0] not in linears:
                self._refuse(f"{name}.{local} is a weight of more than one dimension that belongs to no linear layer")
        for local in linears:
            calls = len(flow.called[f"{name}.{local}"].inputs) if f"{name}.{local}" in flow.called else 0
            # the statistics of a linear that runs several times would mix different inputs
            if calls != 1:
                self._refuse(f"{name}.{local} runs {calls} times for a text, not once")
        norms = [
            local for local, module in _modules(block) if not isinstance(module, nn.Linear) and f"{name}.{local}" in flow.called
        ]
        if not any(flow.fed(output) for local in norms for output in flow.called[f"{name}.{local}"].outputs):
            self._refuse(f"no norm of {name} feeds linear layers")

    def _block_pairs(self, flow: DataFlow, name: str, block: nn.Module) -> Iterable[ScalePair]:
        """Return the scale pairs of one block, in the order in which their smooth layers run."""
        modules = {f"{name}.{local}": (local, module) for local, module in _modules(block)}
        for full, called in flow.called.items():
            if full not in modules or len(called.outputs) != 1:
                continue
            (local, module), output = modules[full], called.outputs[0]
            if not isinstance(module, nn.Linear):
                fed = self._linears(flow.fed(output), name)
                # dividing the weight of a norm that multiplies by 1 + weight (Gemma) does not divide its output
                if fed and divides(module):
                    yield ScalePair(local, fed)
                continue
            product = flow.multiplied(output)
            fed = self._linears(flow.fed(product), name) if product is not None else ()
            if fed:
                yield ScalePair(local, fed)
            # only the first name is the linear; "grouped" marks repeated key-value heads
            elif (values := self._attended(flow, name, output)) is not None:
                yield ScalePair(local, values[:1], grouped=values[1:] == ("grouped",))

    def _linears(self, names: Sequence[str], block: str) -> tuple[str, ...]:
        """Return the names within the block; empty where one is no linear layer of it."""
        inside = all(within(name, block) and isinstance(self.model.get_submodule(name), nn.Linear) for name in names)
        return tuple(name.removeprefix(f"{block}.") for name in names) if inside else ()

    def _attended(self, flow: DataFlow, block: str, values: Tensor) -> tuple[str, ...] | None:
        """Return the linear that attention's values reach, and "grouped" where it reads each of them more than once (GQA)."""
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
        by_head = torch.arange(width, dtype=channels.dtype).view(width // size, 1, size)
        expected = by_head.expand(width // size, heads * size // width, size).reshape(-1)
        return (*linear, "grouped") if torch.equal(channels, expected) else None

    def _heads(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "num_attention_heads", 0))

    def _unused_by_text(self, called: set[str], head: str) -> tuple[str, ...]:
        """Return the outermost modules with weights that text does not pass through, other than the head."""
        used = {".".join(name.split(".")[:count]) for name in {*called, head} for count in range(name.count(".") + 2)}
        unused: list[str] = []
        for name, module in _modules(self.model):
            if name not in used and list(module.parameters()) and not any(within(name, other) for other in (*unused, head)):
                unused.append(name)
        return tuple(unused)

    def _towers(self, vision: Sequence[str]) -> Iterable[str]:
        """Return each vision module's list of blocks: of its lists with modules of one class the longest, of these the largest."""
        for tower in vision:
            inside = [(f"{tower}.{name}", module) for name, module in _modules(self.model.get_submodule(tower))]
            lists = [(name, module) for name, module in inside if isinstance(module, nn.ModuleList)]
            candidates = [
                (len(module), _size(module), name) for name, module in lists if len({type(block) for block in module}) == 1
            ]
            if candidates:
                yield max(candidates)[2]

    def _renames(self) -> tuple[tuple[str, str], ...]:
        """Return the renames from names on disk to module names, and check that they are unique."""
        unmatched: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name, tensor in self.model.state_dict().items():
            unmatched.setdefault((name.rpartition(".")[2], tuple(tensor.shape)), []).append(name)
        rules: dict[str, str] = {}
        matches: dict[str, str] = {}
        for name, shape in self.shapes.items():
            free = unmatched.get((name.rpartition(".")[2], shape), [])  # empty for a tensor of a packed weight
            target = max(free, key=partial(_similarity, name), default="")
            if target:
                # each parameter stands for one tensor on disk
                free.remove(target)
                matches[name] = target
                disk, module = _differing_prefixes(name, target)
                rules[disk] = module
        # the first rule that matches is applied, so longer, more specific prefixes come first
        ordered = sorted(rules.items(), key=lambda rule: -len(rule[0]))
        renames = tuple((rf"^{re.escape(disk)}(?=\.|$)", module) for disk, module in ordered if disk != module)
        # the rules are tried together: one found for a tensor must not rename another wrongly
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
    """Make linear layers and embeddings return random values of the right shape; all other weights become one."""
    generator = torch.Generator().manual_seed(0)
    stubs: dict[str, Forward] = {}
    for name, module in _modules(decoder):
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            stubs[name] = partial(_random, generator, module.out_features, 1)
        elif isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
            stubs[name] = partial(_random, generator, module.embedding_dim, 0)
        else:
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                # an expanded scalar takes no memory, whatever the width
                module.register_parameter(leaf, nn.Parameter(torch.ones(()).expand(parameter.shape), requires_grad=False))
    with replace_forwards(decoder, stubs):
        yield


def _random(generator: torch.Generator, width: int, dropped: int, inputs: Tensor) -> Tensor:
    """Return random values in the inputs' shape without its last `dropped` dimensions, with `width` channels."""
    return torch.rand((*inputs.shape[: inputs.dim() - dropped], width), generator=generator)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the descendants of a module with their names in it."""
    modules = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
    return [(name, submodule) for name, submodule in modules if name]


def _similarity(name: str, key: str) -> tuple[int, int, int]:
    """Return how similar two names are: common words at their ends, common words, and the difference of their lengths."""
    first, second = name.split("."), key.split(".")
    return _common_suffix(first, second), len(set(first) & set(second)), -abs(len(first) - len(second))


def _common_suffix(first: Sequence[str], second: Sequence[str]) -> int:
    count = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        count += 1
    return count


def _differing_prefixes(name: str, key: str) -> tuple[str, str]:
    """Return the prefixes of two names up to and including the first word of their common suffix."""
    first, second = name.split("."), key.split(".")
    shared = max(_common_suffix(first, second) - 1, 0)
    return ".".join(first[: len(first) - shared]), ".".join(second[: len(second) - shared])


def _with_description(family: Family) -> Family:
    """Return the family with a description of what was derived."""
    scale_pairs = "; ".join(f"{pair.smooth_layer} → {', '.join(pair.balance_layers)}" for pair in family.scale_pairs) or "none"
    text = (
        f"{family.model_type}: no family record fits, and one was derived from the model: decoder blocks {family.blocks}, "
        f"embeddings {family.embeddings}, head {family.head}; vision {', '.join(family.vision) or 'none'}, its blocks "
        f"{', '.join(family.vision_blocks) or 'none'}, projector {', '.join(family.projector) or 'none'}; scales move between "
        f"{scale_pairs}, and not within the vision tower. Compare this with the architecture, and the result with the original"
    )
    return replace(family, derived=text)
