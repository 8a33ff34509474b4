"""llm-compressor's modifiers by name and arguments (https://github.com/vllm-project/llm-compressor), in its own environment."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from compress.checkpoint import Checkpoint
from compress.families import Family
from compress.layouts import is_quantized
from compress.stages.stage import Stage, StageContext

ENVIRONMENT = "llmcompressor"
"""What its environment is installed as."""


def _with_arguments(value: Any) -> Any:
    """Let a name without arguments stand for the empty table."""
    if not isinstance(value, dict):
        return value
    return {name: cast("Any", {}) if given is None else given for name, given in cast("dict[Any, Any]", value).items()}


def _one_name(value: dict[str, dict[str, JsonValue]]) -> dict[str, dict[str, JsonValue]]:
    names = sorted(value)
    if len(names) != 1:
        held = f"names {len(names)} modifiers ({', '.join(names)})" if names else "names no modifier"
        raise ValueError(f"{held}; write each as an entry of its own, such as `- GPTQModifier: {{scheme: W4A16}}`")
    for name in (names[0], *value[names[0]]):
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name of a modifier or argument; use letters, digits and underscores")
    return value


Modifier = Annotated[dict[str, dict[str, JsonValue]], BeforeValidator(_with_arguments), AfterValidator(_one_name)]
"""A table of one key: a modifier's name with its arguments."""


class Llmcompressor(Stage):
    """Any of llm-compressor's modifiers, one after the other, each a name with its arguments.

    Whatever its library takes goes, under the names that it has for modules in memory. What is left out is filled in for
    this model: a modifier that takes `ignore` leaves the vision side, the projector and the output head alone; AWQ's and
    SmoothQuant's `mappings` are those of the decoder's blocks (the library's own would take in vision layers of the same names);
    SpinQuant's R1 and R2 rotate what the projector gives to the decoder with the embeddings. Give `ignore` or `mappings` to
    have it otherwise (SpinQuant: `transform_config`, `mappings` and `norm_mappings`). `pipeline` is the library's:
    `independent` goes through the model block by block, once for each modifier that needs samples; `basic` runs the whole
    model as it is, which takes more memory.

    Which linears end up how is known only once it has run, so exports are checked then, not in the plan. Formats that only vLLM
    reads (NVFP4, MXFP4) are exported as compressed-tensors and evaluated with `runtime: vllm`.
    """

    revision: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers", "tokenizers", "pillow")

    stage: Literal["llmcompressor"]
    modifiers: Annotated[tuple[Modifier, ...], Field(min_length=1)]
    pipeline: Literal["independent", "basic"] = "independent"

    @property
    def calls(self) -> list[tuple[str, dict[str, JsonValue]]]:
        """The modifiers' names with their arguments, in order."""
        return [next(iter(entry.items())) for entry in self.modifiers]

    def versions(self) -> dict[str, str]:
        """Return what prepares the samples, and what llm-compressor's environment holds, as `llmcompressor/NAME`.

        Raises:
            MissingError: the environment is not installed; the message says how to.
        """
        from compress.runtimes.environment import require

        own = {f"{ENVIRONMENT}/{name}": version for name, version in require(ENVIRONMENT).versions.items()}
        return super().versions() | own

    def check(self, checkpoint: Checkpoint, family: Family) -> list[str]:
        """Return what stands against it: weights quantized already. The library itself checks names and arguments, when it runs."""
        del family
        if is_quantized(checkpoint.config):
            return [f"{checkpoint.folder}: its weights are quantized already; start from the model's original"]
        return []

    def schemes(self, checkpoint: Checkpoint, family: Family) -> None:
        """Return None: only the run can tell."""
        del checkpoint, family

    def predict_bytes(self, checkpoint: Checkpoint, family: Family) -> None:
        """Return None: only the run can tell."""
        del checkpoint, family

    def apply(self, context: StageContext) -> None:
        """Run the modifiers in llm-compressor's environment and write what comes out under the source's own names.

        Raises:
            RecipeError: the library has no such modifier, or does not take such arguments.
            CheckpointError: it failed on this model, or changed nothing; the message holds its error and where its log lies.
            MissingError: the environment is not installed, or the device has too little memory.
            ServerError: it was killed.
        """
        from compress.stages.llmcompressor_apply import apply

        apply(self, context)
