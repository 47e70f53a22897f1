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
        config = small_runs.descending(max_steps=5, per_device_train_batch_size=4)
        out = tmp_path / "one" / method
        model = small_runs.model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        one = getattr(melayer, method)(model, toys.tokenizer(), rows, out=out, mask=small_runs.mask(), config=config)
        alone = [line for line in one.history() if "loss" in line]
        both = [json.loads(line) for line in (tmp_path / "two" / method / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in both] == [line["step"] for line in alone] == [1, 2, 3, 4, 5]
        # A shard that is left out, counted twice or clipped by itself is off by a large part of these.
        for key in ("loss", "grad_norm") if method == "sft" else ("loss", "rewards/margins", "grad_norm"):
            assert [line[key] for line in both] == pytest.approx([line[key] for line in alone], rel=1e-3, abs=1e-5), key
        left, right = (load_file(tmp_path / side / method / "model.safetensors") for side in ("one", "two"))
        for name, value in left.items():
            moved = (value - before[name]).abs().max()
            # What the steps lose in a weight: one rounding each, and as much in the other run.
            rounding = 2 * 5 * torch.finfo(torch.float32).eps * value.abs().max()
            assert moved > 0, name
            assert (right[name] - value).abs().max() <= 1e-3 * moved + rounding, name
        mask = melayer.WeMask.load(tmp_path / "two" / method)
        assert mask.by_layer == one.mask.by_layer
