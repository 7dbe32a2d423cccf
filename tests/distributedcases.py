"""What each process of the distributed tests does, in a module that it can import."""

from pathlib import Path

import torch
from torch import nn

import fastmeta as fm


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = torch.randn(4, 6, 3).double(), torch.arange(6).repeat(4, 1) % 2
    return model, (x[:, :2], y[:, :2], x[:, 2:], y[:, 2:])


def worker(rank, strategy, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    model, data = problem()
    maml = fm.MAML(model, 0.1, 2, learn_lr="parameter", strategy=strategy)
    ddp = nn.parallel.DistributedDataParallel(maml)
    ddp(*(part[2 * rank : 2 * rank + 2] for part in data)).backward()
    torch.save([p.grad for p in maml.parameters()], Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
