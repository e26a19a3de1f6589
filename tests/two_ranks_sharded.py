"""Worker of a test: the model sharded by transformers' engine over two ranks, beside one process."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from tiny import relative_error
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import minimoe  # noqa: F401  (registers the architecture)

LAYOUTS = {
    "tensor": {"tp_size": 2},
    "tensor and experts": {"tp_size": 2, "ep_size": 2},
    "fully sharded": {"fsdp_size": 2},
    "fully sharded and experts": {"fsdp_size": 2, "ep_size": 2},
}


def main(folder: str, output: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    one = AutoModelForCausalLM.from_pretrained(folder).train()
    expected = one(input_ids=ids, labels=ids).lm_loss
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in one.named_parameters()}
    found = {}
    for name, layout in LAYOUTS.items():
        config = DistributedConfig(**layout)
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).train()
        loss = model(input_ids=ids, labels=ids).lm_loss  # every rank has the same rows
        loss.backward()
        errors = []
        for key, parameter in model.named_parameters():
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            errors.append(relative_error(gradient, wanted[key]))
        with torch.no_grad():
            evaluated = model.eval()(input_ids=ids, labels=ids).loss
        sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
        found[name] = {
            "loss": abs(float(loss - expected)),
            "evaluated": abs(float(evaluated - expected)),
            "gradients": max(errors),
            "sharded": sharded,
        }
    if dist.get_rank() == 0:
        with open(output, "w") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
