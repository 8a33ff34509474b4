"""Reports and galleries with something of everything, made here; the figures are plausible and mean nothing."""

from __future__ import annotations

import io
import math
from typing import Any

from PIL import Image, ImageDraw

from compress.eval.latency.results import (
    Best,
    Component,
    ComponentTable,
    Estimate,
    Latency,
    LoadResult,
    ModelLatency,
    Percentiles,
    PointLatency,
    Telemetry,
    Trial,
)
from compress.eval.latency.settings import LatencyGoal, LatencySettings, LoadPoint
from compress.eval.results import Fidelity, Grounding, PerplexityMetrics, ScoreMetrics
from compress.gate.gate import Check, Outcome, Verdict
from compress.report.gallery import Card, Gallery, GalleryAnswer, thumbnail
from compress.report.model import Published, Report, Row, Timing
from compress.runtimes.vllm.memory_fallback import MemoryFallback
from compress.stages.quantization.widths import FusedLayers, Widths
from compress.verification.results import Agreement, Answers, Difference, Verification

SPEEDS = {"original": 1.0, "vllm-awq": 0.62, "vllm-int8": 0.81}
SIZES = {"original": 16_580_000_000, "vllm-awq": 6_940_000_000, "vllm-int8": 9_410_000_000}
SCORES = {"original": (0.8425, 0.7712, 8.412), "vllm-awq": (0.8390, 0.7655, 8.596), "vllm-int8": (0.7905, 0.7021, 8.447)}


def metrics(scores: tuple[float, float, float], failed: int = 0) -> dict[str, ScoreMetrics | PerplexityMetrics]:
    textvqa, chartqa, perplexity = scores
    return {
        "textvqa": ScoreMetrics(
            task="vqa",
            metric="vqa_vote",
            score=textvqa,
            items=2000,
            failed=failed,
            binary=False,
            details={"number": textvqa - 0.07},
        ),
        "chartqa": ScoreMetrics(task="vqa", metric="relaxed", score=chartqa, items=1250),
        "text": PerplexityMetrics(perplexity=perplexity, window=512, windows=128, tokens=65_408),
    }


def fidelity(kl: float, lost: int | None, gained: int | None) -> Fidelity:
    changed = None if lost is None or gained is None else lost + gained + 41
    return Fidelity(
        tokens=9_216, kl_mean=kl, kl_p99=kl * 21, kl_interval=(kl * 0.9, kl * 1.1), top1_agreement=1 - 3 * kl,
        lost=lost, gained=gained, changed=changed,
    )  # fmt: skip


def compared(kl: float, lost: int) -> dict[str, Fidelity]:
    return {
        "textvqa": fidelity(kl, lost, lost // 2),
        "chartqa": fidelity(kl * 1.3, lost + 3, lost // 3),
        "text": fidelity(kl * 0.8, None, None),
    }


def grounding(own: float) -> Grounding:
    return Grounding(
        task="textvqa", metric="vqa_vote", binary=False, items=64, failed=0, score_own=own, score_other=0.113, score_none=0.094,
        changed_other=0.891, changed_none=0.938,
    )  # fmt: skip


def rows() -> tuple[Row, ...]:
    return tuple(
        Row(
            artifact=name,
            runtime="vllm",
            path=f"/store/{name}",
            bytes=SIZES[name],
            size_ratio=SIZES[name] / SIZES["original"],
            bits_per_weight=16 * SIZES[name] / SIZES["original"],
            metrics=metrics(SCORES[name], failed=3 if name == "vllm-int8" else 0),
            fidelity=None if name == "original" else compared(0.0041 if name == "vllm-awq" else 0.031, 21),
            noise=compared(0.0002, 2) if name == "original" else None,
            grounding=grounding(SCORES[name][0]),
        )
        for name in SPEEDS
    )


def check(
    artifact: str, name: str, task: str | None, figures: tuple[float, tuple[float, float] | None, float], verdict: Outcome
) -> Check:
    value, interval, limit = figures
    reason = f"{task + ': ' if task else ''}what was found is {value:.4f}, and the limit is {limit:g}"
    return Check(
        artifact=artifact, check=name, task=task, value=value, interval=interval, limit=limit, verdict=verdict, reason=reason
    )


def verdict() -> Verdict:
    checks = (
        check("vllm-awq", "accuracy.min_recovery", "textvqa", (0.9958, (0.9907, 1.0012), 0.99), "pass"),
        check("vllm-awq", "accuracy.min_recovery", "chartqa", (0.9926, (0.9836, 1.0018), 0.99), "inconclusive"),
        check("vllm-awq", "perplexity.max_ratio", "text", (1.0219, (1.0201, 1.0236), 1.03), "pass"),
        check("vllm-awq", "fidelity.max_kl", "textvqa", (0.0041, (0.0037, 0.0045), 0.02), "pass"),
        check("vllm-awq", "size.max_ratio", None, (0.4186, None, 0.45), "pass"),
        check("vllm-awq", "latency.max_ttft_p95_ms", "16 at once, 1 × 640×480, 128 → 128 tokens", (412.5, None, 500), "pass"),
        check("vllm-int8", "accuracy.min_recovery", "textvqa", (0.9383, (0.9271, 0.9496), 0.99), "fail"),
        check("vllm-int8", "accuracy.min_recovery", "chartqa", (0.9104, (0.8987, 0.9222), 0.99), "fail"),
        check("vllm-int8", "size.max_ratio", None, (0.5676, None, 0.45), "fail"),
    )
    return Verdict(verdict="fail", artifacts={"vllm-awq": "inconclusive", "vllm-int8": "fail"}, checks=checks)


def shape(concurrency: int = 1, images: int = 1) -> LoadPoint:
    return LoadPoint(concurrency=concurrency, images=images, width=640, height=480, prompt_tokens=128, output_tokens=128)


def percentiles(middle: float) -> Percentiles:
    return Percentiles(mean=middle * 1.05, p50=middle, p90=middle * 1.4, p95=middle * 1.6, p99=middle * 2.1)


def load(speed: float, concurrency: int) -> LoadResult:
    first, further = 62 * speed * concurrency**0.7, 11.4 * speed * (1 + concurrency / 24)
    seconds = (first + 127 * further) / 1000
    return LoadResult(
        requests=64, failed=0, seconds=64 * seconds / concurrency, ttft=percentiles(first), tpot=percentiles(further),
        itl=percentiles(further), e2el=percentiles(seconds * 1000), request_rate=concurrency / seconds,
        output_token_rate=128 * concurrency / seconds, goodput=0.93 * concurrency / seconds, client="vllm bench serve",
    )  # fmt: skip


def latency(concurrencies: tuple[int, ...] = (1, 4, 16, 64)) -> Latency:
    models: dict[str, ModelLatency] = {}
    for name, speed in SPEEDS.items():
        points: list[PointLatency] = []
        for concurrency in concurrencies:
            result = load(speed, concurrency)
            ratio = Estimate(value=speed, interval=(speed * 0.97, speed * 1.03))
            ratios = dict.fromkeys(("ttft_p50", "ttft_p95", "tpot_p50", "tpot_p95", "e2el_p95"), ratio)
            ratios |= {"output_token_rate": Estimate(value=1 / speed, interval=(0.97 / speed, 1.03 / speed))}
            points.append(
                PointLatency(
                    point=shape(concurrency), pooled=result, rounds=(result, result), figures={},
                    ratios={} if speed == 1 else ratios,
                    telemetry=Telemetry(
                        seconds=result.seconds, peak_host_bytes=4 << 30, peak_device_bytes=int(60e9 * speed), cache_bytes=8 << 30,
                        gpu_utilisation=0.94, mean_watts=512, energy_joules=9000, joules_per_request=141 * speed,
                        cpu_seconds_per_request=0.21,
                    ),
                )
            )  # fmt: skip
        tried = (
            Trial(concurrency=16, held=True, result=load(speed, 16)),
            Trial(concurrency=64, held=False, result=load(speed, 64)),
        )
        best = Best(shape=shape(), concurrency=16, output_token_rate=load(speed, 16).output_token_rate, trials=tried)
        timed = (
            Component(component="vision", median_ms=21.4, least_ms=20.9, repeats=5),
            Component(component="projector", median_ms=1.32, least_ms=1.31, repeats=5),
            Component(component="prefill", median_ms=33.7, least_ms=33.1, repeats=5),
            Component(component="decode", median_ms=11.1, least_ms=10.8, repeats=5),
        )
        components = ComponentTable(
            runtime="transformers", device="cuda", dtype="bfloat16", point=shape(), sequence_tokens=512, components=timed
        )
        models[name] = ModelLatency(
            name=name, points=tuple(points), best=(best,), memory_bytes=int(60e9 * speed), memory_ratio=speed, components=components
        )
    original = models.pop("original")
    return Latency(
        revision=1,
        runtime="vllm",
        settings=LatencySettings(concurrency=concurrencies, requests=64, goal=LatencyGoal(ttft_ms=500, tpot_ms=50)),
        hardware={},
        versions={"vllm": "0.15.0"},
        original=original,
        artifacts=models,
        steps=(
            MemoryFallback(
                rung="context", setting="max_model_len", before="8192", after="4096", value=4096, cause="the cache did not fit"
            ),
        ),
        notes=("measured on one GPU, in alternation",),
    )


def widths(blocks: int = 28) -> Widths:
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    groups: list[FusedLayers] = []
    for block in range(blocks):
        for number, kind in enumerate(kinds):
            loss = 0.0004 * (1 + number) * (1.5 + math.cos(block / 4)) ** 3
            losses = {2: loss * 40, 3: loss * 6, 4: loss, 8: loss / 200, 16: 0.0}
            width = 8 if loss > 0.009 else 3 if loss < 0.0005 else 4
            size = 4_000_000 * (number + 1)
            layers = (f"model.layers.{block}.{kind}",)
            groups.append(
                FusedLayers(
                    layers=layers, width=width, weights=size, bytes=size * width // 8, predicted_loss=losses[width], losses=losses
                )
            )
    total = sum(group.bytes for group in groups) * 8 / sum(group.weights for group in groups)
    return Widths(bits_per_weight=total, predicted_loss=sum(group.predicted_loss for group in groups), groups=tuple(groups))


def verification() -> Verification:
    components = (
        Difference(
            component="vision encoder", inputs=4, absolute=7.1e-6, relative=1.1e-6, limit=1e-4,
            worst="images of 97×61 and 252×140 pixels",
        ),
        Difference(component="embeddings", inputs=5, absolute=0, relative=0, limit=1e-4, worst="a prompt without an image"),
        Difference(
            component="decoder", computed="inputs not rounded", inputs=5, absolute=8.1e-6, relative=6.1e-7, limit=1e-4,
            worst="an image of 84×196 pixels",
        ),
        Difference(
            component="decoder", inputs=10, absolute=0.179, relative=0.018, limit=0.15,
            worst="a prompt without an image, in a batch of 3, decoding with its cache",
        ),
    )  # fmt: skip
    answers = Answers(
        agreement=(
            Agreement(shown="right image", prompts=8, same=8),
            Agreement(shown="wrong image", prompts=8, same=8),
            Agreement(shown="no image", prompts=8, same=7),
        ),
        likelihood=0.049,
        likelihood_limit=0.25,
        least_agreement=0,
        seeing=8,
        ungrounded=0,
        changed_checkpoint=6,
        changed_artifact=6,
    )
    return Verification(roundings=("float32", "inputs in blocks"), components=components, answers=answers)


def report(**changes: Any) -> Report:
    example = Report(
        name="qwen2.5-vl-7b",
        run="/srv/runs/qwen2.5-vl-7b-20250112-101500-3fa9",
        finished="2025-01-12T10:41:07+00:00",
        source={"source": "Qwen/Qwen2.5-VL-7B-Instruct", "hub": "huggingface", "revision": "main", "commit": "cc594898"},
        rows=rows(),
        gate=verdict(),
        timings=(
            Timing(step="calibration", seconds=12.1, peak_host_bytes=2 << 30, peak_device_bytes=0, cached=True),
            Timing(step="awq", seconds=1841.3, peak_host_bytes=9 << 30, peak_device_bytes=11 << 30, cached=False),
            Timing(step="measure original", seconds=644.0, peak_host_bytes=3 << 30, peak_device_bytes=61 << 30, cached=False),
        ),
        warnings=("task chartqa: the data hold 1,250 questions, samples asks for 2,000; all of them are used",),
        published=(Published(artifact="vllm-awq", path="/models/published/qwen2.5-vl-7b/vllm-awq", forced=True),),
        notes={
            "KL": "KL(original ‖ artifact) over the vocabulary, at every answer token",
            "textvqa": "VQAv2's vote of ten answers",
        },
        recipe={
            "name": "qwen2.5-vl-7b",
            "stages": [{"stage": "awq", "bits": 4, "group_size": 128}],
            "publish": {"to": "published"},
        },
        versions={"compress": "0.1.0", "torch": "2.13.0"},
        runtime_versions={"vllm": "0.15.0"},
        hardware={"processor": "AMD EPYC 9654", "gpus": ["NVIDIA H200"], "cores": 16, "memory_bytes": 137_000_000_000},
        widths={"awq": widths()},
        latency={"local": latency()},
        verifications={"vllm-awq": verification()},
        digests={"original": "3b1f" * 16, "textvqa": "77ad" * 16},
    )
    return example.model_copy(update=changes)


def picture(colour: str, size: tuple[int, int] = (320, 240)) -> bytes:
    image = Image.new("RGB", size, "#f4f4f2")
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def gallery() -> Gallery:
    shown = (("red", "lost"), ("teal", "lost"), ("navy", "lost"), ("orange", "gained"))
    cards = tuple(
        Card(
            task="textvqa" if number % 2 else "chartqa",
            id=f"q{number}",
            kind="lost" if kind == "lost" else "gained",
            binary=bool(number % 2),
            original=GalleryAnswer("original", colour if kind == "lost" else "grey", None, 1.0 if kind == "lost" else 0.0),
            artifacts=(
                GalleryAnswer("vllm-awq", "grey" if kind == "lost" else colour, None, 0.0 if kind == "lost" else 1.0),
                GalleryAnswer("vllm-int8", "", "the server answered 503 three times" if kind == "lost" else None, 0.0),
            ),
            accepted=((colour, 9), (f"dark {colour}", 1)),
            question=f"What colour is the shape in picture {number}?",
            images=(thumbnail(picture(colour), "a picture"),),
        )
        for number, (colour, kind) in enumerate(shown)
    )
    return Gallery(cards=cards, lost=41, gained=17)
