"""Whether vLLM, serving an artifact, answers as the in-process runtime does that unpacks the same artifact.

A model with random weights is often undecided between two tokens. So an answer of vLLM's counts as far as it is the same, and where
it leaves the in-process answer, the in-process model is asked by how much it prefers its own token: more than `CLEAR` is a
disagreement. Rounded inputs need such an allowance: the last bit of a float can decide between two codes of an input, and one code
moves the log-probabilities of these models by up to half a nat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress.checkpoints.checkpoint import open_checkpoint
from compress.data.prompts import Prompt
from compress.export.format import ExportContext
from compress.export.vllm.format import VllmExport
from compress.export.vllm.limits import Layout
from compress.families import within
from compress.families.resolve import family_of
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext, Passage
from compress.runtimes.transformers.runtime import Transformers
from compress.runtimes.vllm.runtime import VNNI_FEATURES, WNA16_FEATURES, Vllm, lacks
from compress.workers.environment import install
from tests.quantized import round_checkpoint
from tests.tiny import picture

SILENT = Silent()
PROMPTS = (
    Prompt("one picture", "What colour is the shape?", (picture(0),)),
    Prompt("another", "How many circles are there?", (picture(1),)),
    Prompt("a third", "Is there a red square?", (picture(2),)),
)
TOKENS = 8
CLEAR = 0.5
"""Nats by which the in-process model must prefer its own token over vLLM's for a disagreement."""

FEW_BLOCKS = ("--num-gpu-blocks-override", "256")
"""Arguments of a server for some dozens of sequences: vLLM fills its cache with zeros, which for a gigabyte takes long."""

KERNELS: Literal["vllm", "reference"] = "reference" if lacks(WNA16_FEATURES) or lacks(VNNI_FEATURES) else "vllm"
"""Those by which vLLM's build for CPUs multiplies quantized linears rightly on this processor."""

TOKEN = Scheme(8, -1, symmetric=True, activations="token")
"""8-bit integers, inputs rounded token by token: W8A8."""


@dataclass(frozen=True)
class Case:
    """How the decoder, and where `vision` is given the linears that see images, are held; and the type vLLM computes in.

    On a CPU its kernels for 4-bit weights have no float32.
    """

    layout: Layout
    held: Scheme
    dtype: Literal["float32", "float16", "bfloat16"]
    vision: Scheme | None = None


@dataclass(frozen=True)
class Agreement:
    """How far two runtimes agree: `same` answer tokens of `compared`, the clear disagreements, and the largest gap of scores.

    An answer counts up to its first token that differs; `clear` are the prompts where it does though the in-process model is not
    undecided between the two tokens. `gap` is the largest difference in nats of a forced token's log-likelihood.
    """

    same: int
    compared: int
    clear: tuple[str, ...]
    gap: float


def make_artifact(source: Path, folder: Path, case: Case) -> Path:
    """Return the artifact of a checkpoint that is rounded to nearest and laid out as the case says."""
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint.config)

    def vision(name: str) -> Scheme | None:
        module = family.module_name(f"{name}.weight")
        return None if any(within(module, part) for part in family.served_unquantized) else case.vision

    round_checkpoint(source, folder / "rounded", case.held, vision=vision)
    (folder / "artifact").mkdir()
    export = VllmExport(format="vllm", layout=case.layout)
    export.apply(ExportContext(folder / "rounded", folder / "artifact", family, SILENT))
    return folder / "artifact"


def serving(case: Case) -> Vllm:
    """Return the runtime that serves a case, installed where it is not."""
    install("vllm", SILENT)
    settings: dict[str, Any] = {"kv_cache_gib": 1, "max_model_len": 512, "top_logprobs": 128, "arguments": FEW_BLOCKS}
    return Vllm(runtime="vllm", dtype=case.dtype, kernels=KERNELS, **settings)


def compare(artifact: Path, runtime: Vllm, logs: Path, prompts: Sequence[Prompt] = PROMPTS) -> Agreement:
    """Serve an artifact and have both runtimes answer, and score the in-process answers."""
    with Transformers(runtime="transformers", dtype="float32", device="cpu").open(OpenContext.at(artifact, logs, SILENT)) as inside:
        expected = inside.answer(prompts, TOKENS, SILENT)
        passages = [Passage(prompt.id, answer.token_ids, prompt) for prompt, answer in zip(prompts, expected, strict=True)]
        expected_scores = inside.score(passages, None, None, SILENT)
        with runtime.open(OpenContext.at(artifact, logs, SILENT)) as served:
            answers = served.answer(prompts, TOKENS, SILENT)
            scores = served.score(passages, None, None, SILENT)
        gaps = [
            np.abs(reference.negative_log_likelihood - actual.negative_log_likelihood)
            for reference, actual in zip(expected_scores, scores, strict=True)
        ]
        same, clear = 0, list[str]()
        for prompt, reference, actual in zip(prompts, expected, answers, strict=True):
            pairs = list(zip(reference.token_ids, actual.token_ids, strict=False))
            first = next((index for index, (left, right) in enumerate(pairs) if left != right), None)
            same += len(pairs) if first is None else first
            if (
                first is not None
                and _margin(inside, prompt, reference.token_ids[: first + 1], actual.token_ids[: first + 1]) > CLEAR
            ):
                clear.append(prompt.id)
    return Agreement(same, sum(len(answer.token_ids) for answer in expected), tuple(clear), float(np.concatenate(gaps).max()))


def _margin(session: Any, prompt: Prompt, reference: tuple[int, ...], actual: tuple[int, ...]) -> float:
    """Return by how many nats the in-process model prefers the end of its own answer over that of the other."""
    scores = session.score([Passage("reference", reference, prompt), Passage("actual", actual, prompt)], None, None, SILENT)
    return float(scores[1].negative_log_likelihood[-1] - scores[0].negative_log_likelihood[-1])
