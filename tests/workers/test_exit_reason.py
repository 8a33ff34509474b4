"""Why a server ended is found in what it printed; the excerpts are vLLM 0.32's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import CheckpointError, CompressError, MissingError, RecipeError
from compress.runtimes.vllm.faults import fault_of
from compress.workers.exit_reason import describe_exit, read_log, reason_of

TRACE = (
    '  File "/x/vllm/engine/arg_utils.py", line 1955, in create_model_config\n    return ModelConfig(\n           ^^^^^^^^^^^^\n'
)
END = "The server ended with exit code 1.\n"
WARNING = (
    "(APIServer pid=10939) WARNING 11-30 05:38:06 [system_utils.py:255] Found ulimit of 20000. This can cause fd limit errors like "
    "`OSError: [Errno 24] Too many open files`.\n"
)


def validation(words: str) -> str:
    below = f"  Value error, {words} [type=value_error, input_value=ArgsKwargs((), {{'model': '/x'}}), input_type=ArgsKwargs]\n"
    further = "    For further information visit https://errors.pydantic.dev/2.14/v/value_error\n"
    return (
        f"{WARNING}{TRACE}pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n{below}{further}{END}"
    )


_WORKER = "(Worker pid=11290) ERROR 11-30 05:39:46 [multiproc_executor.py:953] "
WORKER = (
    f"{WARNING}{_WORKER}Traceback (most recent call last):\n"
    f"{_WORKER}    assert param_data.shape == loaded_weight.shape\n"
    f"{_WORKER}           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^\n"
    f"{_WORKER}AssertionError\n"
    "(EngineCore pid=11022) ERROR 11-30 05:39:50 [core.py:1510] Exception: WorkerProc initialization failed due to an exception in "
    f"a background process. See stack trace for root cause.\n{TRACE}RuntimeError: Engine core initialization failed. See root "
    f"cause above. Failed core proc(s): {{}}\n{END}"
)
LONG = (
    "User-specified max_model_len (1000000) is greater than the derived max_model_len (max_position_embeddings=2048.0 or model_max"
)
COMMAND = "usage: vllm serve [model_tag] [options]\nmain.py serve: error: {}\nThe server ended with exit code 2.\n"
SHORT = (
    "ValueError: To serve at least one request with the models's max seq len (8192), (0.50 GiB KV cache is needed, which is larger "
    "than the available KV cache memory (0.25 GiB). Based on the available memory, the estimated maximum model length is 4096."
)

NARROW = "RuntimeError: start (0) + length (288) exceeds dimension size (256)."

DEATHS: dict[str, tuple[str, str, type[CompressError] | None, str]] = {
    "context": (validation(f"{LONG}_length=None)."), LONG, RecipeError, "max_model_len of runtime vllm: vLLM, serving x, ended"),
    "quantization": (
        validation("Unknown quantization method: nonsense. Must be one of ['awq', 'gptq']."),
        "Unknown quantization method: nonsense.",
        CheckpointError,
        "vLLM knows no nonsense: correct quantization_config",
    ),
    "dtype": (
        validation("torch.bfloat16 is not supported for quantization method awq. Supported dtypes: [torch.float16]"),
        "torch.bfloat16 is not supported for quantization method awq.",
        RecipeError,
        "dtype of runtime vllm: ",
    ),
    "architecture": (
        validation("Model architectures ['NoSuchModel'] are not supported for now. Supported architectures: dict_keys(['A'])"),
        "Model architectures ['NoSuchModel'] are not supported for now.",
        CheckpointError,
        "this vLLM does not serve such a model",
    ),
    "setting": (validation("max_num_seqs must be positive"), "max_num_seqs must be positive", RecipeError, "correct the setting"),
    "unknown argument": (
        COMMAND.format("unrecognized arguments: --no-such-argument"),
        "unrecognized arguments: --no-such-argument",
        RecipeError,
        "arguments of runtime vllm: ",
    ),
    "wrong argument": (
        COMMAND.format("argument --kv-cache-dtype: invalid choice: 'int3' (choose from 'auto', 'fp8')"),
        "argument --kv-cache-dtype: invalid choice: 'int3'",
        RecipeError,
        "correct --kv-cache-dtype",
    ),
    "narrow": (f"{TRACE}{NARROW}\n{END}", NARROW, CheckpointError, "export it again"),
    "shapes": (WORKER, "AssertionError: assert param_data.shape == loaded_weight.shape", CheckpointError, "export it again"),
    "cache": (f"{TRACE}{SHORT}\n{WORKER}", SHORT[:60], MissingError, "set it to at most 4096"),
    "killed": (f"{WARNING}The server ended with signal 9 (SIGKILL).\n", "The server ended with signal 9 (SIGKILL).", None, ""),
    "memory": (
        f"ValueError: later\n(EngineCore pid=2) ERROR 11-30 05:39:50 [a.py:1] torch.OutOfMemoryError: CUDA out of memory.\n{END}",
        "torch.OutOfMemoryError: CUDA out of memory.",
        None,
        "",
    ),
    "else": (f"{TRACE}ZeroDivisionError: division by zero\n{END}", "ZeroDivisionError: division by zero", None, ""),
}


@pytest.mark.parametrize("name", DEATHS)
def test_the_line_that_decides_comes_first_and_what_is_at_fault_is_known(name: str) -> None:
    log, reason, error, words = DEATHS[name]
    assert (reason_of(log) or "").startswith(reason)
    assert describe_exit(log, Path("/logs/vllm.log")).startswith(f": {reason[:250]}")
    fault = fault_of("vLLM, serving x,", log, "/logs/vllm.log")
    assert type(fault) is (type(None) if error is None else error)
    if fault is not None:
        assert words in str(fault)
        assert "(its log: /logs/vllm.log)" in str(fault)
        assert "\n" not in str(fault)
        assert len(str(fault)) < 600
        assert fault.exit_code == (3 if error is MissingError else 2)


def test_an_end_without_a_word_shows_the_last_lines() -> None:
    log = "".join(f"INFO line {number}\n" for number in range(50))
    assert reason_of(log) is None
    message = describe_exit(log, None)
    assert message.startswith(".\nThe last lines:\n  INFO line 30\n")
    assert fault_of("vLLM", log, "x") is None


def test_what_a_log_shows_holds_no_secret_and_no_control_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    message = describe_exit("ValueError: \x1b[31mno access with hf_0123456789abcdef\x9b\nlast \x1b[0m hf_0123456789abcdef\n", None)
    assert "hf_" not in message
    assert "\x1b" not in message
    assert message.startswith(": ValueError: \\x1b[31mno access with …\\x9b\n")


def test_a_log_is_read_at_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_LIMIT_LOG_BYTES", "1000")
    log = tmp_path / "vllm.log"
    log.write_text("earlier" + "a" * 600 + "x" * 100_000 + "b" * 600)
    words = read_log(log, 7)
    assert words == "a" * 500 + "\n[...]\n" + "b" * 500
    assert read_log(log, log.stat().st_size - 3) == "bbb"
