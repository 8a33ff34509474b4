import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.cli.commands import COMMANDS
from tests.jobs import Job, make_job
from tests.preloaded import command_line


def compress(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command_line(*arguments), capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def broken(tmp_path: Path) -> Job:
    return make_job(tmp_path / "broken")


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'pydantic', 'rich'}"
    code = f"import sys, compress.cli.main as cli\ntry: cli.main(['--help'])\nfinally: assert not {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compress run recipes/demo.yaml" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_its_module_alone_and_nothing_heavy(name: str) -> None:
    heavy = "{'torch', 'pydantic', 'rich'}"
    code = (
        f"import sys, compress.cli.main as cli\ntry: cli.main(['{name}', '--help'])\nfinally:\n"
        f"    assert not {heavy} & set(sys.modules)\n"
        f"    assert [module for module in sys.modules if module.startswith('compress.cli.commands.')] == ['{COMMANDS[name][0]}']"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: compress {name}" in done.stdout


def test_a_command_that_is_none_is_a_usage_error() -> None:
    assert compress("compact").returncode == 2


@pytest.mark.parametrize("command", [["--help"], ["schema"], ["store", "list"], ["store", "list", "--json"], ["plan", "none.yaml"]])
@pytest.mark.parametrize("errors_too", [False, True])
def test_a_reader_that_goes_early_is_no_verdict(tmp_path: Path, command: list[str], *, errors_too: bool) -> None:
    read, write = os.pipe()
    os.close(read)
    errors = write if errors_too else subprocess.DEVNULL
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    arguments = [sys.executable, "-m", "compress.cli", *command]
    done = subprocess.run(arguments, stdout=write, stderr=errors, cwd=tmp_path, env=environment, check=False)
    os.close(write)
    assert done.returncode == (2 if "none.yaml" in command and not errors_too else 141)


def test_the_schema_is_json() -> None:
    assert json.loads(compress("schema").stdout)["title"] == "compress recipe"


def test_a_plan_shows_keys_sizes_and_what_is_cached(job: Job) -> None:
    done = compress("plan", str(job.recipe), "--store", str(job.store), "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    steps = {step["step"]: step for step in plan["steps"]}
    assert set(steps) >= {"calibration", "awq", "export vllm-awq", "measure original"}
    assert all(len(step["key"]) == 64 and not step["cached"] for step in steps.values())
    original = (job.folder / "model" / "model.safetensors").stat().st_size
    assert 0.3 * original < steps["export vllm-awq"]["expected_bytes"] < 0.9 * original
    assert not job.store.exists() or not list((job.store / "entries").glob("*"))
    shown = compress("plan", str(job.recipe), "--store", str(job.store))
    assert "measure vllm-compressed-tensors" in shown.stdout
    assert steps["awq"]["key"][:12] in shown.stdout


def test_the_override_that_the_demo_recipe_shows_can_be_planned(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "demo.yaml"
    (line,) = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("# Override:")]
    command = line.split()[2:]
    assert command[:3] == ["compress", "run", "recipes/demo.yaml"]
    done = compress("plan", str(recipe), *command[3:], "--store", str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_expected_sizes_are_those_of_the_artifacts(job: Job) -> None:
    plan = json.loads(compress("plan", str(job.recipe), "--store", str(job.store), "--json").stdout)
    done = compress(*job.arguments("--json"))
    assert done.returncode == 0, done.stderr
    expected = {step["step"]: step["expected_bytes"] for step in plan["steps"]}
    for row in json.loads(done.stdout)["rows"][1:]:
        weights = sum(path.stat().st_size for path in Path(row["path"]).glob("*.safetensors"))
        header = weights - expected[f"export {row['artifact']}"]
        assert 0 < header < 30_000


def no_checkpoint(job: Job) -> None:
    (job.folder / "model" / "config.json").unlink()


def no_weights(job: Job) -> None:
    (job.folder / "model" / "model.safetensors").unlink()


def truncated(job: Job) -> None:
    path = job.folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupt(job: Job) -> None:
    path = job.folder / "model" / "model.safetensors"
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


def index_outside(job: Job) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (job.folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def unsupported(job: Job) -> None:
    path = job.folder / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"model_type": "florence2"}
    path.write_text(json.dumps(config), encoding="utf-8")


def pickled(job: Job) -> None:
    folder = job.folder / "model"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def unreadable_image(job: Job) -> None:
    (job.folder / "images" / "101.png").write_bytes(b"no picture")


def missing_image(job: Job) -> None:
    (job.folder / "images" / "203.png").unlink()


def no_json(job: Job) -> None:
    path = job.folder / "calibration.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], "{id: 1", *lines[1:]]), encoding="utf-8")


def empty_calibration(job: Job) -> None:
    (job.folder / "calibration.txt").write_text("\n", encoding="utf-8")


def empty_questions(job: Job) -> None:
    (job.folder / "calibration.jsonl").write_text("", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (no_checkpoint, 2, ("config.json: missing", "is")),
        (no_weights, 2, ("no model.safetensors and no model.safetensors.index.json", "checkpoint")),
        (truncated, 2, ("model.safetensors: truncated", "fetch it again")),
        (corrupt, 2, ("model.safetensors: truncated or no safetensors file", "fetch it again")),
        (index_outside, 2, ("points to '../elsewhere.safetensors', outside", "do not use this checkpoint")),
        (unsupported, 2, ("model_type 'florence2' is no supported architecture", "qwen2_5_vl")),
        (pickled, 2, ("holds a pickle checkpoint", "allow_pickle: true")),
        (unreadable_image, 2, ("101.png", "cannot be read as an image", "convert the file, or leave the sample out")),
        (missing_image, 2, ("203.png", "no such file", "correct the path or remove the row")),
        (no_json, 2, ("calibration.jsonl:2: not readable as JSON", "correct or remove the line")),
        (empty_calibration, 2, ("calibration.sets.0: the text gives 0 windows of 32 tokens", "name a longer text")),
        (empty_questions, 2, ("calibration.jsonl", "holds no questions")),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_input_gets_one_clear_message(broken: Job, damage: Callable[[Job], None], code: int, said: tuple[str, ...]) -> None:
    damage(broken)
    done = compress(*broken.arguments("--json"))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    error = json.loads(done.stdout)
    assert error["exit_code"] == code
    for part in said:
        assert part in error["error"]
    assert not list((broken.store / "aside").glob("*"))
    assert not broken.published.exists()


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    done = compress("run", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "none.yaml: no such file" in done.stderr


def test_a_missing_runtime_says_how_to_install_it(job: Job, tmp_path: Path) -> None:
    done = compress(*job.arguments("--set", "eval.runtime.runtime=vllm"), COMPRESS_RUNTIMES=str(tmp_path))
    assert done.returncode == 3
    assert "compress runtime install vllm" in done.stderr


def in_own_mounts(mount: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a mount namespace of its own, after a mount that nobody else sees."""
    script = f'{mount} && exec "$@"'
    return subprocess.run(
        [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
            sys.executable,
            "-m",
            "compress.cli",
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_full_disk_is_told_and_leaves_the_store_usable(job: Job, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    arguments = ["run", str(job.recipe), "--runs", str(tmp_path / "runs"), "--store", str(store)]
    done = in_own_mounts(f"mount -t tmpfs -o size=900k tmpfs {store}", *arguments)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "full" in done.stderr or "No space left" in done.stderr
    assert "ree " in done.stderr  # free some space, or how much


@pytest.mark.parametrize("place", ["runs", "out"])
def test_a_full_disk_outside_the_store_is_told_too(job: Job, tmp_path: Path, place: str) -> None:
    full = tmp_path / place
    full.mkdir()
    settings = ["--set", f"publish.to={tmp_path / 'out'}"]
    arguments = ["run", str(job.recipe), "--runs", str(tmp_path / "runs"), "--store", str(job.store), *settings]
    done = in_own_mounts(f"mount -t tmpfs -o size=8k tmpfs {full}", *arguments)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert str(full) in done.stderr
    assert "free some space" in done.stderr


def test_a_read_only_output_is_told(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    done = in_own_mounts(f"mount -t tmpfs -o ro tmpfs {out}", *job.arguments("--set", f"publish.to={out}"))
    assert done.returncode == 3, done.stderr
    assert f"{out}" in done.stderr
    assert "name a folder you can write" in done.stderr


def test_the_store_is_listed_verified_and_pruned(job: Job) -> None:
    assert compress(*job.arguments("--json")).returncode == 0
    listed = json.loads(compress("store", "list", "--store", str(job.store), "--json").stdout)
    assert {"awq", "calibration", "measure original"} <= {row["step"] for row in listed}
    assert {(row["model"], row["recipe"]) for row in listed} == {(str(job.folder / "model"), "tiny")}
    shown = compress("store", "list", "--store", str(job.store)).stdout
    assert "model" in next(line for line in shown.splitlines() if "measure original" in line)
    assert compress("store", "verify", "--store", str(job.store)).returncode == 0
    victim = next((job.store / "entries").rglob("*.safetensors"))
    entry = job.store / "entries" / victim.relative_to(job.store / "entries").parts[0]
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    verified = compress("store", "verify", "--store", str(job.store), "--json")
    assert verified.returncode == 1
    assert entry.name in json.loads(verified.stdout)
    assert not (entry / "entry.json").exists()
    again = compress(*job.arguments("--json"))
    assert again.returncode == 0
    assert compress("store", "verify", "--store", str(job.store)).returncode == 0
    pruning = ("store", "prune", "--unused-for", "0", "--store", str(job.store), "--json")
    would = json.loads(compress(*pruning, "--dry-run").stdout)
    removed = json.loads(compress(*pruning).stdout)
    assert would == removed
    assert {row["key"] for row in removed} >= {row["key"] for row in listed}


def test_an_artifact_that_changed_after_it_was_measured_is_not_published(job: Job, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "store")]
    first = compress("run", str(job.recipe), "--runs", str(tmp_path / "runs"), *store, "--json")
    assert first.returncode == 0, first.stderr
    victim = next(Path(json.loads(first.stdout)["rows"][1]["path"]).glob("*.safetensors"))
    before, content = victim.stat(), victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    done = compress("run", str(job.recipe), "--runs", str(tmp_path / "runs"), *store, "--set", f"publish.to={tmp_path / 'out'}")
    assert done.returncode == 3
    assert "is not what was measured any more; run `compress store verify`" in done.stderr
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    reports = list((tmp_path / "runs").glob("*/report.json"))
    assert len(reports) == 2


def test_an_interrupt_ends_with_130_and_leaves_nothing_half_done(job: Job, tmp_path: Path) -> None:
    arguments = ["run", str(job.recipe), "--runs", str(tmp_path / "runs"), "--store", str(tmp_path / "store")]
    process = subprocess.Popen(command_line(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "awq" in line:
            break
    process.send_signal(2)
    said = process.stderr.read()
    process.communicate()
    assert process.returncode == 130
    assert "goes on where this one was" in said
    assert not list((tmp_path / "store" / "entries").glob("*/data/.blocks"))
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "events.jsonl").read_text(encoding="utf-8").splitlines()[-1])["event"] == "stopped"
