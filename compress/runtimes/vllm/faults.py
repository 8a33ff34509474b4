"""Maps the error in a vLLM server's log to the recipe setting, or the artifact, that caused it, with a remedy."""

from __future__ import annotations

import re
from dataclasses import dataclass

from compress.errors import CheckpointError, CompressError, MissingError, RecipeError
from compress.workers.exit_reason import reason_of, shorten

_RUNTIME = "runtime vllm"


@dataclass(frozen=True)
class _Sign:
    """One of vLLM's error messages and how to report it."""

    pattern: str
    setting: str
    """The runtime's field at fault; empty where the artifact is."""

    remedy: str
    """What to do; `{n}` is the pattern's n-th group."""

    error: type[CompressError] = RecipeError


# vLLM has no error codes: a message's wording is all that tells a wrong setting from a damaged artifact. The first match counts.
_SIGNS = (
    _Sign(
        r"max_model_len \(\d+\) is greater than the derived max_model_len \(\w+=(\d+)",
        "max_model_len",
        "set it to at most {1}, or leave it out",
    ),
    _Sign(
        r"estimated maximum model length is (\d+)",
        "max_model_len",
        "set it to at most {1}, or give more memory (gpu_memory_utilization on a GPU, kv_cache_gib on a CPU)",
        MissingError,
    ),
    _Sign(r"unrecognized arguments: (.+)", "arguments", "leave out {1}, or install a vLLM that knows it"),
    _Sign(r"argument (--[\w-]+)[^:]*: ", "arguments", "correct {1}"),
    _Sign(
        r"max_num_batched_tokens \(?\d+\)? is smaller than",
        "arguments",
        "raise --max-num-batched-tokens, or leave it out",
    ),
    _Sign(
        r"Quantization method specified in the model config \(([\w-]+)\) does not match",
        "arguments",
        "leave out --quantization: vLLM takes {1} from the artifact",
    ),
    _Sign(
        r"(\S+) is not supported for quantization method (\S+)\. Supported dtypes: (.+)",
        "dtype",
        "set one of {3}, which {2} takes",
    ),
    _Sign(r"does not support float16|Bfloat16 is only supported|Unknown dtype", "dtype", "set another one, or auto"),
    _Sign(
        r"quantization method (\S+) is not supported for the current GPU",
        "",
        "serve it on a newer GPU, or export another layout than {1}",
        MissingError,
    ),
    _Sign(
        r"Unknown quantization method: ([\w-]+)",
        "",
        "vLLM knows no {1}: correct quantization_config in the artifact's config.json, or export it again",
        CheckpointError,
    ),
    _Sign(
        r"Model architectures \[.*\] (?:are not supported|failed to be inspected)",
        "",
        "this vLLM does not serve such a model: install a newer one, or measure in runtime transformers",
        CheckpointError,
    ),
    _Sign(
        r"assert \w+\.(?:shape|size\(\)) == loaded_weight\.|size mismatch for "
        r"|start \(\d+\) \+ length \(\d+\) exceeds dimension",
        "",
        "its weights have other shapes than its config.json gives: export it again",
        CheckpointError,
    ),
)
_INVALID_SETTINGS = re.compile(r"ValidationError: \d+ validation errors? for \w+(?:Config|Args)\b")
"""pydantic's error on a configuration class of vLLM: some setting is invalid, whichever it is."""


def fault_of(name: str, log: str, path: str) -> CompressError | None:
    """Return the error to raise where a server's log shows that the recipe or the artifact is at fault; None where it does not.

    `name` is the server's name in the message, `path` that of its log.
    """
    reason = reason_of(log)
    if reason is None:
        return None
    for sign in _SIGNS:
        if (match := re.search(sign.pattern, reason)) is not None:
            setting = f"{sign.setting} of {_RUNTIME}: " if sign.setting else ""
            error, remedy = sign.error, sign.remedy.format(match.group(0), *match.groups())
            break
    else:
        if not _INVALID_SETTINGS.search(log):
            return None
        setting, error = f"{_RUNTIME}: ", RecipeError
        remedy = "correct the setting that it names, in the runtime's fields or arguments"
    message = f"{setting}{name} ended while it was loading: {shorten(reason)}; {remedy} (its log: {path})"
    return RecipeError([message]) if error is RecipeError else error(message)
