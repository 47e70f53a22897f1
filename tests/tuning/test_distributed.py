"""Two processes with sharded weights give the figures of one."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import melayer
import small_runs
import toys
from sharded import ENVIRONMENT


def test_sharded_is_whole(python, tmp_path):
    methods = ("sft", "dpo")
    command = [python[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).parents[1] / "sharded.py"), str(tmp_path / "two"), *methods]
    environment = {**python[1], **ENVIRONMENT, "FSDP_VERSION": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    for method in methods:
        seen = json.loads((tmp_path / "two" / method / "seen.json").read_text())
        assert seen["parameters"] == ["DTensor"]
        assert "FSDPLlamaDecoderLayer" in seen["wrapped"]
        assert "The weights were sharded with FSDP over 2 processes." in seen["notes"]
        rows = {"sft": small_runs.answers, "dpo": small_runs.pairs}[method]()
        # Two processes take two rows each.
        config = small_runs.small(max_steps=5, per_device_train_batch_size=4)
        out = tmp_path / "one" / method
        one = getattr(melayer, method)(
            small_runs.model(), toys.tokenizer(), rows, out=out, mask=small_runs.mask(), config=config
        )
        key = "loss" if method == "sft" else "rewards/margins"
        alone = [line[key] for line in one.history()]
        both = [json.loads(line)[key] for line in (tmp_path / "two" / method / "log.jsonl").read_text().splitlines()]
        assert len(alone) == 5
        assert both == pytest.approx(alone, abs=1e-5)
        left, right = (load_file(tmp_path / side / method / "model.safetensors") for side in ("one", "two"))
        for name, value in left.items():
            torch.testing.assert_close(right[name], value, atol=1e-4, rtol=1e-4)
        mask = melayer.WeMask.load(tmp_path / "two" / method)
        assert mask.by_layer == one.mask.by_layer
