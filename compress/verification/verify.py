"""The step that compares an ONNX artifact with the checkpoint it came from, part by part and then in whole answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.errors import VerificationError
from compress.export.format import VerifyContext
from compress.onnx_files import check_files
from compress.runtimes.activations import activation_quantization_disabled
from compress.runtimes.onnxruntime_graph import Engine, GraphSession
from compress.runtimes.runtime import OpenContext, Runtime
from compress.runtimes.strip_activation_quantization import quantizes_activations
from compress.runtimes.transformers_session import TransformersSession, TransformersSettings, open_session
from compress.verification import graphs
from compress.verification.answers import ask, judge_answers
from compress.verification.independent import load_independently
from compress.verification.limits import DifferenceLimits
from compress.verification.reference import Reference, ReferenceTowers, references, towers
from compress.verification.results import Answers, Component, Difference, Verification
from compress.verification.samples import samples

_TOKENS_PER_BATCH = 2048
_ENGINE = Engine(("cpu",))

Compare = Callable[..., Iterator[graphs.Compared]]
Table = Mapping[Component, tuple[str, Compare, Compare]]
"""The graph of each part, and what compares it: where no inputs are rounded, and as it runs."""

_GENERATIVE: Table = {
    "vision encoder": ("vision_encoder", graphs.image_features, graphs.image_features),
    "embeddings": ("embed_tokens", graphs.embeddings, graphs.embeddings),
    "decoder": ("decoder_model_merged", graphs.prompt_logits, graphs.logits),
}
_TOWERS: Table = {
    "image encoder": ("vision_model", graphs.image_embeds, graphs.image_embeds),
    "text encoder": ("text_model", graphs.text_embeds, graphs.text_embeds),
}

_REMEDY = (
    "nothing of it is measured or published. Run again with --fresh, which exports it anew; if it stays so, the export is at "
    "fault: report it, and use format: vllm until then"
)


def verify_graphs(context: VerifyContext, runtime: Runtime, limits: DifferenceLimits, table: Table | None = None) -> Verification:
    """Compare every graph of an artifact with the checkpoint, then what it answers in its runtime.

    The checkpoint is let go of before the artifact is loaded, and each graph before the next. `table` is for artifacts whose graphs
    are not those of `format: onnx`.

    Raises:
        VerificationError: something is beyond its limit; the first part is named.
        CheckpointError: the checkpoint, or a graph, cannot be loaded or run.
    """
    opening = OpenContext(context.source, context.logs, context.progress, context.trust_remote_code, "checkpoint")
    with open_session(opening, TransformersSettings("float32", "cpu", _TOKENS_PER_BATCH), load_independently) as session:
        given = _given(session, context, limits)
        said = ask(session, context.family, None, context.progress)
    usual = _TOWERS if context.family.head is None else _GENERATIVE
    found = list(_components(context.artifact, given, limits, table or usual))
    opening = replace(opening, artifact=context.artifact, name=context.artifact.name)
    with runtime.open(opening) as session:
        answers = judge_answers(said, ask(session, context.family, said, context.progress), limits)
    check_answers(context.artifact, answers)
    return Verification(roundings=limits.roundings, components=tuple(found), answers=answers)


@dataclass(frozen=True)
class _Given:
    """What the checkpoint's parts give: as it says, and with no input rounded."""

    rounded: list[Reference] | ReferenceTowers
    exact: list[Reference] | ReferenceTowers


def _given(session: TransformersSession, context: VerifyContext, limits: DifferenceLimits) -> _Given:
    def ask_parts() -> list[Reference] | ReferenceTowers:
        if context.family.head is None:
            return towers(session)
        return references(session, samples(context.family), context.progress)

    found = ask_parts()
    if "inputs to 8 bits" not in limits.roundings:
        return _Given(found, found)
    with activation_quantization_disabled():
        return _Given(found, ask_parts())


def _components(artifact: Path, given: _Given, limits: DifferenceLimits, table: Table) -> Iterator[Difference]:
    """Give what each part's difference is, in the order in which parts feed each other, up to the first that is too large.

    Where the inputs of matrices are rounded, a graph is first compared without that, on both sides: so the weights themselves are
    held to a limit that no rounding hides behind.
    """
    for component, (name, exactly, compare) in table.items():
        path = artifact / f"{name}.onnx"
        check_files(path)
        ways = (True, False) if quantizes_activations(path) else (False,)
        for exact in ways:
            graph: Any = GraphSession(path, _ENGINE, exact=exact)
            compared = exactly(graph, given.exact) if exact else compare(graph, given.rounded)
            inputs, absolute, relative, worst = graphs.largest(compared)
            del graph
            found = Difference(
                component=component,
                computed="inputs not rounded" if exact else "as it runs",
                inputs=inputs,
                absolute=absolute,
                relative=relative,
                limit=limits.of(component, exact=exact),
                worst=worst,
            )
            check_component(path, found)
            yield found


def check_component(path: Path, found: Difference) -> None:
    """Check a part's difference.

    Raises:
        VerificationError: it is too large.
    """
    if not found.passed:
        raise VerificationError(
            f"{path}: the {found.component} differs from the checkpoint's: by {found.absolute:.3g}, {found.relative:.3g} of its "
            f"largest value (limit {found.limit:g}; {found.computed}), for {found.worst}; {_REMEDY}"
        )


def check_answers(artifact: Path, found: Answers) -> None:
    """Check what whole answers say.

    Raises:
        VerificationError: the artifact does not look at its images, or answers otherwise than the checkpoint.
    """
    if found.seeing and 2 * found.ungrounded >= found.seeing:
        raise VerificationError(
            f"{artifact}: not grounded in its images: for {found.ungrounded} of {found.seeing} prompts another image changes "
            f"what the checkpoint finds likely, and not what the artifact does, though each part alone agrees; {_REMEDY}"
        )
    if not found.likelihood <= found.likelihood_limit:
        raise VerificationError(
            f"{artifact}: finds an answer of the checkpoint more or less likely by {found.likelihood:.3g} nats per token "
            f"(limit {found.likelihood_limit:g}), though each part alone agrees; {_REMEDY}"
        )
    same, asked = sum(row.same for row in found.agreement), sum(row.prompts for row in found.agreement)
    if same < found.least_agreement * asked:
        raise VerificationError(
            f"{artifact}: gives {same} of {asked} answers as the checkpoint does (limit {found.least_agreement:.0%}), though each "
            f"part alone agrees; {_REMEDY}"
        )
