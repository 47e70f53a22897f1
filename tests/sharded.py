"""Run by test_distributed.py in each of two processes: a few steps with the weights sharded by FSDP, on the CPU.

accelerate takes several processes on a CPU for plain data parallelism and leaves FSDP out. It is told here that they
are of the kind for which it does shard; torch's FSDP itself works on a CPU, through gloo.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

import melayer
import small_runs
import toys
from melayer.tuning import trainers

ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "OMP_NUM_THREADS": "1",
}


def sharded() -> None:
    initialise = PartialState.__init__

    def shards(self, *args, **options):
        initialise(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = shards


def main(out: str, methods: list[str]) -> None:
    sharded()
    kinds = {}
    begun = trainers.RunCallback.on_train_begin

    def look(self, args, state, control, **more):
        begun(self, args, state, control, **more)
        model = self.trainer.model
        wrapped = {type(module).__name__ for module in model.modules()}
        kinds["parameters"] = sorted({type(p).__name__ for p in model.parameters()})
        kinds["wrapped"] = sorted(name for name in wrapped if name.startswith("FSDP"))

    trainers.RunCallback.on_train_begin = look
    for method in methods:
        rows = {"sft": small_runs.answers, "dpo": small_runs.pairs}[method]()
        directory = Path(out) / method
        result = getattr(melayer, method)(
            small_runs.model(),
            toys.tokenizer(),
            rows,
            out=directory,
            mask=small_runs.mask(),
            config=small_runs.descending(max_steps=5),
        )
        if os.environ["RANK"] == "0":
            (directory / "seen.json").write_text(json.dumps({**kinds, "notes": list(result.notes)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
