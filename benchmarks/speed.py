"""AWQ, GPTQ and INT8 of compress beside llm-compressor's on one shape or checkpoint: seconds, peak memory, error.

    compress runtime install llmcompressor      # prints that environment's python
    python -m benchmarks.speed --shape qwen2.5-vl-3b --layers 1 --samples 32 --tokens 512 --peer PYTHON \
        --calibration-text wiki.valid.tokens --test-text wiki.test.tokens --output benchmarks/results/speed_3b_block.json

The time is from opening the checkpoint to the last byte of the new one, imports left out; each run is a fresh process, the sides in
turn. On a machine with CUDA both use it, and `peak_device_bytes` counts. The error is the squared difference of the decoder's
output (before its last norm) from the original's over the original's square, on held-out text, computed by one piece of code from
what each side wrote. `--shape qwen2.5-vl-7b` with all its 28 layers wants a GPU; with `--layers 1` it runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.sides import run_ours, run_peer, take_samples, versions
from compress.files import write_json
from compress.hardware import describe
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from tests.tiny import build_qwen2_5_vl

SHAPES: dict[str, dict[str, int]] = {
    "demo": {"hidden": 192, "intermediate": 384, "heads": 6, "kv_heads": 2, "layers": 4},
    "qwen2.5-vl-3b": {"hidden": 2048, "intermediate": 11008, "heads": 16, "kv_heads": 2, "layers": 36},
    "qwen2.5-vl-7b": {"hidden": 3584, "intermediate": 18944, "heads": 28, "kv_heads": 4, "layers": 28},
    "qwen2.5-vl-72b": {"hidden": 8192, "intermediate": 29568, "heads": 64, "kv_heads": 8, "layers": 80},
}
VISION: dict[str, Any] = {
    "tied": True,
    "vision_hidden": 1280,
    "vision_intermediate": 3420,
    "vision_heads": 16,
    "vision_blocks": 32,
}
"""The vision tower of the published 3B model, which `--whole` gives any shape."""

VOCABULARY = 151936
"""The rows of its embeddings; the tokens of the random model are the first of them."""

METHODS: dict[str, dict[str, Any]] = {
    "awq": {"stage": "awq", "bits": 4},
    "gptq": {"stage": "gptq", "bits": 4, "symmetric": True},
    "int8": {"stage": "int8"},
}


def main() -> None:
    arguments = _arguments()
    shape = {**SHAPES[arguments.shape], **({"layers": arguments.layers} if arguments.layers else {})}
    shape |= VISION if arguments.whole else {}
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        model = arguments.model or build_qwen2_5_vl(folder / "model", **shape, spread=0.02)
        if arguments.whole:
            _enlarge_embeddings(model)
        samples = take_samples(model, arguments.calibration_text, None, arguments.samples, arguments.tokens, folder)
        judge = _Judge(model, arguments.test_text, arguments.tokens)
        rows: dict[str, Any] = {}
        for method in arguments.methods:
            group = {} if method == "int8" else {"group_size": arguments.group_size}
            options = ["--method", method, *(["--symmetric"] if METHODS[method].get("symmetric") else [])]
            options += ["--group-size", str(arguments.group_size)]
            runs: dict[str, list[dict[str, float]]] = {"compress": [], "llm-compressor": []}
            for _ in range(arguments.rounds):
                runs["compress"].append(run_ours(METHODS[method] | group, model, samples, folder / "compress", arguments.threads))
                if arguments.peer:
                    runs["llm-compressor"].append(
                        run_peer(arguments.peer, options, model, samples, folder / "llm-compressor", arguments.threads)
                    )
                print(method, {side: [round(run["seconds"], 2) for run in done] for side, done in runs.items()}, file=sys.stderr)
            errors = {side: judge.error(folder / side) for side, done in runs.items() if done}
            rows[method] = {"runs": runs, "output_error": errors, **_ratios(runs, errors)}
            print(method, json.dumps(_ratios(runs, errors)), file=sys.stderr)
    result = {
        "what": "quantizing the decoder's linears: seconds, peak memory, output error on held-out text",
        "model": {"name": arguments.name or arguments.model.name} if arguments.model else {"random": arguments.shape, **shape},
        "group_size": arguments.group_size,
        "calibration_tokens": samples.tokens,
        "threads": arguments.threads,
        "methods": rows,
        "machine": describe(),
        "versions": versions(arguments.peer),
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; without one random weights of `--shape`")
    parser.add_argument("--name", help="of the model, in the results")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-vl-3b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--whole", action="store_true", help="with embeddings and a vision tower of full size")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--test-text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--peer", type=Path, help="python of the environment that has llm-compressor")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where the model and what is made of it lie meanwhile")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _enlarge_embeddings(model: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] = VOCABULARY
    write_json(model / "config.json", config)
    tensors = load_file(model / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    few = tensors[name]
    tensors[name] = torch.cat([few, torch.randn(VOCABULARY - len(few), few.shape[1], dtype=few.dtype) * 0.02])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


class _Judge:
    """Compares the decoder's output with the original's on held-out text."""

    def __init__(self, model: Path, text: Path, tokens: int, windows: int = 8) -> None:
        tokenizer = cast("Any", AutoTokenizer).from_pretrained(model)
        ids = tokenizer(text.read_text(encoding="utf-8")[: windows * tokens * 12], verbose=False)["input_ids"]
        self.windows = torch.tensor(ids)[: windows * tokens].view(windows, tokens)
        self.expected = self._outputs(model)

    def error(self, artifact: Path) -> float:
        """Return the relative squared error of an artifact."""
        found = self._outputs(artifact)
        return float((found - self.expected).square().sum() / self.expected.square().sum())

    @torch.no_grad()
    def _outputs(self, folder: Path) -> Tensor:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model: Any = load_model(OpenContext.at(folder, folder, Silent()), dtype, device)
        outputs: list[Tensor] = []
        hook = model.model.language_model.norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0].float().cpu()))
        for window in self.windows:
            model.model(input_ids=window[None].to(device))
        hook.remove()
        return torch.cat(outputs)


def _ratios(runs: dict[str, list[dict[str, float]]], errors: dict[str, float]) -> dict[str, float]:
    """Return the other side's over ours in time, ours over the other's in memory and error; medians over the rounds."""
    ours, theirs = runs["compress"], runs["llm-compressor"]
    if not theirs:
        return {}

    def median(done: list[dict[str, float]], key: str) -> float:
        return statistics.median(run[key] for run in done)

    def beyond_imports(done: list[dict[str, float]]) -> float:
        return statistics.median(run["peak_host_bytes"] - run["imported_host_bytes"] for run in done)

    return {
        "speedup": median(theirs, "seconds") / median(ours, "seconds"),
        "host_memory_ratio": median(ours, "peak_host_bytes") / median(theirs, "peak_host_bytes"),
        "host_memory_ratio_beyond_imports": beyond_imports(ours) / beyond_imports(theirs),
        "error_ratio": errors["compress"] / errors["llm-compressor"],
    }


if __name__ == "__main__":
    main()
