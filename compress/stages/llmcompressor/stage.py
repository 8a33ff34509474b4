"""Modifiers of llm-compressor (https://github.com/vllm-project/llm-compressor), by name and arguments, in its own environment."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from compress.checkpoints.spec import CheckpointSpec
from compress.stages.llmcompressor.defaults import ENVIRONMENT
from compress.stages.stage import Stage, StageContext, StagePlan


def _with_arguments(value: Any) -> Any:
    """Replace missing arguments by an empty table."""
    if not isinstance(value, dict):
        return value
    return {name: cast("Any", {}) if arguments is None else arguments for name, arguments in cast("dict[Any, Any]", value).items()}


def _one_name(value: dict[str, dict[str, JsonValue]]) -> dict[str, dict[str, JsonValue]]:
    names = sorted(value)
    if len(names) != 1:
        problem = f"names {len(names)} modifiers ({', '.join(names)})" if names else "names no modifier"
        raise ValueError(f"{problem}; write each as an entry of its own, such as `- GPTQModifier: {{scheme: W4A16}}`")
    for name in (names[0], *value[names[0]]):
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name of a modifier or argument; use letters, digits and underscores")
    return value


Modifier = Annotated[dict[str, dict[str, JsonValue]], BeforeValidator(_with_arguments), AfterValidator(_one_name)]
"""A table of one key: a modifier's name with its arguments."""


class Llmcompressor(Stage):
    """Modifiers of llm-compressor, applied in order.

    All arguments of the library are allowed; module names are those in transformers. Omitted arguments are set for this model: a
    modifier with `ignore` ignores the vision side, the projector and the output head; AWQ's and SmoothQuant's `mappings` are those
    of the decoder's blocks (the library's defaults would include vision layers of the same names); SpinQuant's R1 and R2 rotate the
    projector's output together with the embeddings. `ignore` or `mappings` override this (SpinQuant: `transform_config`, `mappings`
    and `norm_mappings`).

    The resulting schemes are known only after the run, so that exports are checked then, not in the plan. Formats that only vLLM
    reads (NVFP4, MXFP4) are exported as compressed-tensors and evaluated with `runtime: vllm`.
    """

    revision: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers", "tokenizers", "pillow")

    stage: Literal["llmcompressor"]
    modifiers: Annotated[tuple[Modifier, ...], Field(min_length=1)]
    pipeline: Literal["independent", "basic"] = "independent"
    """The library's pipeline.

    `independent`: block by block, once for each modifier that needs samples. `basic`: the whole model at once, with more memory.
    """

    @property
    def calls(self) -> list[tuple[str, dict[str, JsonValue]]]:
        """The modifiers' names and arguments, in order."""
        return [next(iter(entry.items())) for entry in self.modifiers]

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that prepare the samples, and as `llmcompressor/NAME` those of its environment.

        Raises:
            MissingError: the environment is not installed; the message names the command.
        """
        from compress.workers.environment import require

        environment = {f"{ENVIRONMENT}/{name}": version for name, version in require(ENVIRONMENT).versions.items()}
        return super().versions() | environment

    def plan(self, before: CheckpointSpec) -> StagePlan:
        """Return the incompatibilities: quantized weights. The library itself checks names and arguments; only the run can tell."""
        if before.quantized or before.unreadable:
            return StagePlan(
                (
                    f"{before.source}: the weights are quantized already, by their author or by a stage before it, and "
                    "llmcompressor needs weights that are not; start from the model's original, or remove the other stage",
                )
            )
        return StagePlan()

    def apply(self, context: StageContext) -> None:
        """Run the modifiers in llm-compressor's environment and write what comes out under the source's own names.

        Raises:
            RecipeError: the library has no such modifier, or does not take such arguments.
            CheckpointError: it failed on this model, or changed nothing; the message has its error and the path of its log.
            MissingError: the environment is not installed, or the device has too little memory.
            ServerError: it was killed.
        """
        from compress.stages.llmcompressor.apply import apply

        apply(self, context)
