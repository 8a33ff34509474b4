"""Verify an ONNX artifact against its checkpoint: first each component's outputs, then generated answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.errors import VerificationError
from compress.export.format import VerifyContext
from compress.export.onnx.files import check_files
from compress.runtimes.activations import activation_quantization_disabled
from compress.runtimes.embedding import EmbeddingSession
from compress.runtimes.onnxruntime.graph import Engine, GraphSession
from compress.runtimes.runtime import OpenContext, Runtime
from compress.runtimes.strip_activation_quantization import quantizes_activations
from compress.runtimes.transformers.runtime import Transformers
from compress.runtimes.transformers.session import TransformersSession, open_session
from compress.verification import graphs
from compress.verification.answers import ask, judge_answers
from compress.verification.independent import load_independently
from compress.verification.limits import DifferenceLimits
from compress.verification.reference import Reference, ReferenceTowers, references, towers
from compress.verification.results import Answers, Component, Difference, Verification
from compress.verification.samples import samples

_TOKENS_PER_BATCH = 2048
"""Tokens in a batch of the checkpoint's answers: bounds memory, not the results."""

_ENGINE = Engine(("cpu",))

Compare = Callable[..., Iterator[graphs.Compared]]
Table = Mapping[Component, tuple[str, Compare, Compare]]
"""Per component: its graph, and the comparisons without activation quantization and as it runs."""

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
    """Compare every graph of an artifact with the checkpoint, then its answers in its runtime.

    The checkpoint is freed before the artifact is loaded, and each graph before the next. `table` is for artifacts whose graphs
    are not those of `format: onnx`.

    Raises:
        VerificationError: a difference exceeds its limit; the first component is named.
        CheckpointError: the checkpoint, or a graph, cannot be loaded or run.
    """
    # float32 on the CPU whatever the artifact's device: the reference does not depend on a GPU and its kernels
    reader = Transformers(runtime="transformers", dtype="float32", device="cpu", tokens_per_batch=_TOKENS_PER_BATCH)
    opening = OpenContext(context.source, context.logs, context.progress, context.family, context.trust_remote_code, "checkpoint")
    with open_session(reader, opening, load_independently) as session:
        expected = _reference_values(session, context, limits)
        reference_answers = ask(session, context.family, None, context.progress)
    default = _TOWERS if context.family.head is None else _GENERATIVE
    differences = list(_differences(context.artifact, expected, limits, table or default))
    opening = replace(opening, artifact=context.artifact, name=context.artifact.name)
    with runtime.open(opening) as session:
        artifact_answers = ask(session, context.family, reference_answers, context.progress)
        answers = judge_answers(reference_answers, artifact_answers, limits)
    check_answers(context.artifact, answers)
    return Verification(roundings=limits.roundings, components=tuple(differences), answers=answers)


@dataclass(frozen=True)
class _ReferenceValues:
    """The checkpoint's values, with and without activation quantization; the same where it has none."""

    quantized: list[Reference] | ReferenceTowers
    exact: list[Reference] | ReferenceTowers


def _reference_values(
    session: TransformersSession | EmbeddingSession, context: VerifyContext, limits: DifferenceLimits
) -> _ReferenceValues:
    def compute() -> list[Reference] | ReferenceTowers:
        if isinstance(session, EmbeddingSession):
            return towers(session)
        return references(session, samples(context.family), context.progress)

    values = compute()
    if "inputs to 8 bits" not in limits.roundings:
        return _ReferenceValues(values, values)
    with activation_quantization_disabled():
        return _ReferenceValues(values, compute())


def _differences(artifact: Path, expected: _ReferenceValues, limits: DifferenceLimits, table: Table) -> Iterator[Difference]:
    """Yield each component's difference, in the order of the data flow, up to the first that exceeds its limit.

    A graph with activation quantization is first compared without it on both sides: that holds its weights to the tight limit of
    the format, which the rounding of activations would hide.
    """
    for component, (name, compare_exact, compare) in table.items():
        path = artifact / f"{name}.onnx"
        # a graph names its weights' files by any path: checked before the runtime maps them
        check_files(path)
        for exact in (True, False) if quantizes_activations(path) else (False,):
            graph: Any = GraphSession(path, _ENGINE, exact=exact)
            compared = compare_exact(graph, expected.exact) if exact else compare(graph, expected.quantized)
            outputs, absolute, relative, worst = graphs.largest_difference(compared)
            # freed before the next is loaded: two decoders may not fit in memory
            del graph
            difference = Difference(
                component=component,
                computed="inputs not rounded" if exact else "as it runs",
                inputs=outputs,
                absolute=absolute,
                relative=relative,
                limit=limits.of(component, exact=exact),
                worst=worst,
            )
            # stops at the first: later components are fed by this one in use
            check_component(path, difference)
            yield difference


def check_component(path: Path, difference: Difference) -> None:
    """Check a component's difference.

    Raises:
        VerificationError: it exceeds its limit.
    """
    if not difference.passed:
        raise VerificationError(
            f"{path}: the {difference.component} differs from the checkpoint's: by {difference.absolute:.3g}, "
            f"{difference.relative:.3g} of its largest value (limit {difference.limit:g}; {difference.computed}), for "
            f"{difference.worst}; {_REMEDY}"
        )


def check_answers(artifact: Path, answers: Answers) -> None:
    """Check the comparison of answers.

    Raises:
        VerificationError: the artifact is not grounded in its images, or its answers differ from the checkpoint's.
    """
    if answers.seeing and 2 * answers.ungrounded >= answers.seeing:
        raise VerificationError(
            f"{artifact}: not grounded in its images: for {answers.ungrounded} of {answers.seeing} prompts another image changes "
            f"what the checkpoint finds likely, and not what the artifact does, though each part alone agrees; {_REMEDY}"
        )
    # written as a negation because NaN compares False with everything
    if not answers.likelihood <= answers.likelihood_limit:
        raise VerificationError(
            f"{artifact}: finds an answer of the checkpoint more or less likely by {answers.likelihood:.3g} nats per token "
            f"(limit {answers.likelihood_limit:g}), though each part alone agrees; {_REMEDY}"
        )
    same, prompts = sum(row.same for row in answers.agreement), sum(row.prompts for row in answers.agreement)
    if same < answers.least_agreement * prompts:
        raise VerificationError(
            f"{artifact}: gives {same} of {prompts} answers as the checkpoint does (limit {answers.least_agreement:.0%}), though "
            f"each part alone agrees; {_REMEDY}"
        )
