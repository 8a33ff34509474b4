import json
from pathlib import Path

import compress
from compress.eval.results import Fidelity
from compress.report.width_table import width_table
from compress.stages.quantization.widths import FusedLayers, Widths
from tests.jobs import make_job


def group(layers: tuple[str, ...], width: int, loss: float = 0.001) -> FusedLayers:
    return FusedLayers(layers=layers, width=width, weights=1000, bytes=width * 125 + 25, predicted_loss=loss, losses={width: loss})


def test_blocks_of_one_width_share_a_line() -> None:
    attention = [tuple(f"model.layers.{block}.self_attn.{part}_proj" for part in "qkv") for block in range(12)]
    widths = [4, 4, 4, 3, 3, 8, 4, 4, 4, 4, 3, 4]
    groups = [group(layers, width) for layers, width in zip(attention, widths, strict=True)]
    down = [group((f"model.layers.{block}.mlp.down_proj",), 16, 0.0) for block in range(12)]
    found = Widths(bits_per_weight=6.2, predicted_loss=0.012, groups=(*groups, *down, group(("lm_head",), 8)))
    fidelity = Fidelity(tokens=9, kl_mean=0.0151, kl_p99=0.1, kl_interval=None, top1_agreement=0.9)
    page = width_table("gptq", found, {"vllm-compressed-tensors": {"scenes": fidelity}})
    assert page.splitlines() == [
        "gptq: 6.2 bits per weight in the layers below, scales and zero points counted. Predicted: a loss of 0.012 nats per text "
        "token of the calibration samples; measured KL of vllm-compressed-tensors: scenes 0.015",
        "",
        "| layers | blocks | width | bits/weight | predicted loss |",
        "| --- | --- | ---: | ---: | ---: |",
        "| self_attn.q_proj, k_proj, v_proj | 3-4, 10 | 3 | 3.20 | 0.003 |",
        "| self_attn.q_proj, k_proj, v_proj | 0-2, 6-9, 11 | 4 | 4.20 | 0.008 |",
        "| self_attn.q_proj, k_proj, v_proj | 5 | 8 | 8.20 | 0.001 |",
        "| mlp.down_proj | 0-11 | 16 (as it was) | 16.20 | 0 |",
        "| lm_head |  | 8 | 8.20 | 0.001 |",
    ]


def test_a_run_tells_each_layers_width_and_what_was_measured(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    stage = {"stage": "awq", "bits": "auto", "budget": {"bits_per_weight": 5}, "group_size": 32, "grid": 4}
    settings = {"stages": [stage], "export": [{"format": "vllm", "layout": "compressed-tensors"}]}
    report = compress.run(job.recipe, set=settings, **job.places())
    widths = report.widths["awq"]
    assert len(widths.by_layer) == 3 * 7
    stored = json.loads((Path(report.run) / "report.json").read_text(encoding="utf-8"))
    assert stored["widths"]["awq"]["groups"][0]["losses"].keys() == {"2", "3", "4", "8", "16"}
    page = (Path(report.run) / "report.md").read_text(encoding="utf-8")
    assert "nats per text token of the calibration samples; measured KL of vllm-compressed-tensors: " in page
    assert "| self_attn.q_proj, k_proj, v_proj | " in page
    told = {width for width in (2, 3, 8) if f"runs weights of 4 bits, not {width}: this artifact needs a GPU" in page}
    assert told == set(widths.by_layer.values()) - {4, 16}
    assert "where the stage chooses so" not in page
    artifact = report.rows[1]
    assert artifact.fidelity is not None
    assert widths.bits_per_weight <= 5
    assert 0.2 < widths.predicted_loss / artifact.fidelity["text"].kl_mean < 5
