"""AWQ of compress beside AWQ of llm-compressor: the same model, samples and threads, timed in turn, and what each loses.

llm-compressor has pins of its own, so it runs in an environment of its own (its side is benchmarks/peer.py):

    compress runtime install llmcompressor
    python benchmarks/awq_vs_llmcompressor.py --model recipes/demo/model --calibration-text wiki.valid.tokens \
        --test-text wiki.test.tokens --output benchmarks/results/awq_vs_llmcompressor.json

Both round the decoder's linears to 4 bits, asymmetric, in groups of `--group-size`, llm-compressor with its default duo scaling.
The time is from opening the checkpoint to the last byte of the new one, imports left out; each side is a fresh process. The
loss is the mean over test tokens of KL(original ‖ compressed) in nats, computed by one piece of code from the weights each wrote
to disk.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

import compress.stages.quantize  # noqa: F401 - before the clock starts
from compress.calibration.collect import PinnedSet, Selection, collect
from compress.calibration.load import load_batches
from compress.calibration.sets import Text, Vqa
from compress.checkpoint import open_checkpoint
from compress.engine.weights import WeightReader
from compress.families import family_of
from compress.files import write_json
from compress.hardware import describe
from compress.layouts import quantized_linears, read_linear
from compress.progress import Silent
from compress.runtimes.environment import require
from compress.stages.awq import Awq
from compress.stages.stage import StageContext

SIDES = ("compress", "llm-compressor")
PEER_SIDE = Path(__file__).with_name("peer.py")
PACKAGES = ("torch", "transformers", "compressed-tensors", "llmcompressor")


def main() -> None:
    arguments = _arguments()
    if arguments.side:
        print(json.dumps(_run_ours(arguments)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = _prepare(arguments, folder)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                runs[side].append(_timed(side, arguments, folder))
                print(f"{side}: {runs[side][-1]['seconds']:.2f} s", file=sys.stderr)
        kl = _losses(arguments, {side: folder / side for side in SIDES})
    result = _report(arguments, tokens, runs, kl)
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer", type=Path, help="python of another environment that has llm-compressor")
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--calibration-questions", type=Path, help="JSONL or parquet with id, image, question, answer")
    parser.add_argument("--test-text", type=Path)
    parser.add_argument("--samples", type=int, default=64, help="of each kind of calibration sample")
    parser.add_argument("--tokens", type=int, default=512, help="per window of text")
    parser.add_argument("--windows", type=int, default=64, help="of test text")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=SIDES[:1], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Collect the samples, save them as plain batches for the other side, and return how many tokens they have."""
    text = str(arguments.calibration_text.resolve())
    sets = [PinnedSet(Text(dataset="text", source=text, samples=arguments.samples, tokens=arguments.tokens), (Path(text),))]
    if arguments.calibration_questions:
        path = arguments.calibration_questions.resolve()
        sets.append(PinnedSet(Vqa(dataset="vqa", source=str(path), samples=arguments.samples), (path,)))
    collect(Selection(0, tuple(sets)), arguments.model, folder / "calibration", Silent())
    batches = [batch.inputs() for batch in load_batches(folder / "calibration", arguments.model, 4096)]
    if any(not batch["attention_mask"].all() for batch in batches):  # the other side counts padding, so it gets none
        text_batches = [batch for batch in batches if "pixel_values" not in batch]
        singles = [batch.inputs() for batch in load_batches(folder / "calibration", arguments.model, 1)]
        batches = text_batches + [batch for batch in singles if "pixel_values" in batch]
    torch.save(batches, folder / "batches.pt")
    counts = {"text": 0, "with_image": 0}
    for batch in batches:
        counts["with_image" if "pixel_values" in batch else "text"] += int(batch["attention_mask"].sum())
    return counts


def _timed(side: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    output = folder / side
    subprocess.run(["rm", "-rf", str(output)], check=True)
    output.mkdir()
    shared = ["--model", arguments.model, "--group-size", arguments.group_size, "--threads", arguments.threads]
    if side == SIDES[0]:
        command = [sys.executable, __file__, "--side", side, "--work", folder, *shared]
    else:
        awq = ["--method", "awq", "--bits", "4"]
        command = [_peer(arguments), PEER_SIDE, *awq, "--batches", folder / "batches.pt", "--output", output, *shared]
    limits = {name: str(arguments.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run([str(part) for part in command], env=os.environ | limits, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _peer(arguments: argparse.Namespace) -> Path:
    return arguments.peer or require("llmcompressor").python


def _run_ours(arguments: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(arguments.threads)
    stage = Awq(stage="awq", bits=4, group_size=arguments.group_size)
    family = family_of(open_checkpoint(arguments.model).config)
    start, before = time.perf_counter(), time.process_time()
    stage.apply(
        StageContext(
            source=arguments.model,
            target=arguments.work / SIDES[0],
            calibration=arguments.work / "calibration",
            family=family,
            device="cuda" if torch.cuda.is_available() else "cpu",
            seed=0,
            progress=Silent(),
        )
    )
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "processor_seconds": processor_seconds, "peak_host_bytes": peak}


@torch.no_grad()
def _losses(arguments: argparse.Namespace, outputs: dict[str, Path]) -> dict[str, float]:
    torch.set_num_threads(arguments.threads)
    tokenizer = cast("Any", AutoTokenizer).from_pretrained(arguments.model)
    characters = arguments.windows * arguments.tokens * 12
    text = arguments.test_text.read_text(encoding="utf-8")[:characters]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = ids[: len(ids) // arguments.tokens * arguments.tokens].view(-1, arguments.tokens)[: arguments.windows]
    model: Any = cast("Any", AutoModelForImageTextToText).from_pretrained(arguments.model, dtype=torch.float32).eval()
    others = {
        side: cast("Any", AutoModelForImageTextToText).from_pretrained(arguments.model, dtype=torch.float32).eval()
        for side in outputs
    }
    for side, folder in outputs.items():
        missing, unexpected = others[side].load_state_dict(dict(_dense(folder)), strict=False)
        if unexpected or any(name != "lm_head.weight" for name in missing):
            raise SystemExit(f"{side}: its weights do not fit the model: {missing} {unexpected}")
    sums = dict.fromkeys(outputs, 0.0)
    for window in windows:
        expected = model(input_ids=window[None]).logits[0].log_softmax(-1)
        for side, other in others.items():
            given = other(input_ids=window[None]).logits[0].log_softmax(-1)
            sums[side] += float((expected.exp() * (expected - given)).sum(-1).mean(dtype=torch.float64))
    return {side: total / len(windows) for side, total in sums.items()}


def _dense(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Give a compressed checkpoint's weights by the model's names, integers as the type of their scales, as a runtime has them."""
    checkpoint = open_checkpoint(folder)
    family = family_of(checkpoint.config)
    reader = WeightReader(checkpoint, family)
    packed = quantized_linears(checkpoint)
    for name in checkpoint.tensors:
        if name.rpartition(".weight_")[0] not in packed:
            yield family.module_name(name), reader.disk_tensor(name).float()
    for name, scheme in packed.items():
        weight = read_linear(name, scheme, reader.disk_tensor)
        yield family.module_name(f"{name}.weight"), weight.dequantize().to(weight.scales.dtype).float()


def _report(
    arguments: argparse.Namespace, tokens: dict[str, int], runs: dict[str, list[dict[str, float]]], kl: dict[str, float]
) -> dict[str, Any]:
    ours, theirs = SIDES
    seconds = {side: statistics.median(run["seconds"] for run in runs[side]) for side in SIDES}
    checkpoint = open_checkpoint(arguments.model)
    return {
        "what": "AWQ, 4 bits, asymmetric, decoder linears",
        "model": {"name": arguments.model.name, "bytes": checkpoint.weight_bytes, "model_type": checkpoint.config["model_type"]},
        "group_size": arguments.group_size,
        "calibration_tokens": tokens,
        "test_tokens": arguments.windows * arguments.tokens,
        "threads": arguments.threads,
        "runs": runs,
        "median_seconds": seconds,
        "speedup": seconds[theirs] / seconds[ours],
        "kl_nats_per_token": kl,
        "kl_ratio": kl[ours] / kl[theirs],
        "machine": describe(),
        "versions": {"compress": _versions(Path(sys.executable)), "llm-compressor": _versions(_peer(arguments))},
    }


def _versions(python: Path) -> dict[str, str]:
    if python == Path(sys.executable):
        found = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    else:
        code = (
            "import importlib.metadata as m, json; "
            f"print(json.dumps({{n: m.version(n) for n in {PACKAGES!r} if n in {{d.name for d in m.distributions()}}}}))"
        )
        found = json.loads(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)
    return {"python": sys.version.split()[0], **found}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
