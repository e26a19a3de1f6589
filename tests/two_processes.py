"""Worker of a test: 20 training steps, alone or as one of several gloo processes, with an expert kept idle."""

from __future__ import annotations

import sys

import torch

from minimoe.config import PretrainRun
from minimoe.config.file import load_config
from minimoe.data.loader import open_data
from minimoe.tokenizer import load_tokenizer
from minimoe.train.new_weights import draw
from minimoe.train.objectives import next_token
from minimoe.train.optim import build_optimizers
from minimoe.train.parallel import forward_backward, make_accelerator, wrap
from minimoe.train.pretrain import build_model


def main(config_path: str, folder: str) -> None:
    config = load_config(PretrainRun, config_path)
    accelerator = make_accelerator(config.train)
    tokenizer = load_tokenizer(config.tokenizer)
    with accelerator.main_process_first():
        data = open_data(config.data, tokenizer, "pretrain", config.seed)
    torch.manual_seed(0)
    model = build_model(config, tokenizer)
    draw(model)
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias[0] = -100.0
    optimizers = build_optimizers(model, config.optimizer)
    wrapped = wrap(model, accelerator)
    idle_tokens, hashes, gradients = 0, [], {}
    for step in range(20):
        batch = data.train.batch(step, config.train.batch_size, accelerator.process_index, accelerator.num_processes)
        micro_rows = config.train.micro_rows(accelerator.num_processes)
        _, counts = forward_backward(wrapped, batch, next_token, micro_rows, accelerator)
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        idle_tokens += int(counts[:, 0].sum())
        hashes.append(data.train.batch(step, config.train.batch_size).digest())
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    replicas = accelerator.gather(flat[None])
    if accelerator.is_main_process:
        result = {
            "world": accelerator.num_processes,
            "steps": step + 1,
            "idle_tokens": idle_tokens,
            "replicas_equal": bool((replicas == replicas[0]).all()),
            "gradients": gradients,
            "hashes": hashes,
        }
        torch.save(result, f"{folder}/result.pt")
    # The wrapper must go before the process group: as its last owner it would join gloo's thread while holding the
    # interpreter's lock, which that thread may be waiting for.
    accelerator.wait_for_everyone()
    del wrapped
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
