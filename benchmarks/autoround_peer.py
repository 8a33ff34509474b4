"""AutoRound's side of a benchmark: weight-only rounding by signed gradient descent on one model's decoder, timed.

    uv venv autoround
    VIRTUAL_ENV=autoround uv pip install auto-round==0.16.1 torch==2.13.0 torchvision==0.28.0 transformers==5.17.0
    autoround/bin/python benchmarks/autoround_peer.py --bits 4 --group-size 64 \
        --model OUT/model --batches batches.pt --output out --threads 2

`--model` is a checkpoint whose decoder is a Llama, such as `benchmarks/real_weights.py` makes: that decoder alone is given to the
library, as a causal language model, with the text batches of `--batches` (see `benchmarks/peer.py`). What it has rounded is written
back as plain weights, in the scales' precision, so that any runtime loads it. All other settings are the library's defaults. The
last line printed is JSON, with the fields of `benchmarks/peer.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlamaForCausalLM


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    batches = [batch for batch in torch.load(arguments.batches) if "pixel_values" not in batch]
    windows = [row for batch in batches for row in batch["input_ids"]]
    imported = _resident()
    start, before = time.perf_counter(), time.process_time()
    # float32 on a CPU: many are far slower in bfloat16, which the library would take
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    whole = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=dtype)
    decoder = LlamaForCausalLM(whole.config.text_config).to(dtype)
    decoder.model.load_state_dict(whole.model.language_model.state_dict())
    decoder.tie_weights()
    if arguments.blocks:
        decoder.model.layers = decoder.model.layers[: arguments.blocks]
    rounding = AutoRound(
        decoder,
        AutoTokenizer.from_pretrained(arguments.model),
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=arguments.symmetric,
        iters=arguments.iterations,
        nsamples=len(windows),
        seqlen=len(windows[0]),
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows],
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        amp=torch.cuda.is_available(),
    )
    rounded, _ = rounding.quantize()
    state: dict[str, Any] = whole.model.language_model.state_dict()
    state |= {name: value for name, value in rounded.model.state_dict().items() if name in state}
    whole.model.language_model.load_state_dict(state)
    whole.save_pretrained(arguments.output)
    result = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - before,
        "peak_host_bytes": _resident(),
        "imported_host_bytes": imported,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--iterations", type=int, default=200, help="per block; 200 is the library's default")
    parser.add_argument("--blocks", type=int, help="the first so many blocks alone")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batches", type=Path, required=True, help="a list of forward arguments, saved by torch")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def _resident() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
