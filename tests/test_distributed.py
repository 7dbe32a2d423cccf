"""`MAML` in DistributedDataParallel: two processes, gradients averaged over their tasks."""

import multiprocessing
import tempfile
from pathlib import Path

import pytest
import torch
from distributedcases import problem, worker

import fastmeta as fm


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_gradients_are_those_of_all_tasks():
    strategy = "engine" if fm.backend_info()["native"] else "vmap"
    model, data = problem()
    maml = fm.MAML(model, 0.1, 2, learn_lr="parameter", strategy=strategy)
    maml.loss(*data).backward()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=worker, args=(rank, strategy, folder)) for rank in (0, 1)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        for rank in (0, 1):
            grads = torch.load(Path(folder) / f"{rank}.pt")
            for found, parameter in zip(grads, maml.parameters(), strict=True):
                torch.testing.assert_close(found, parameter.grad, rtol=1e-10, atol=1e-12)


def test_the_call_with_targets_is_the_loss():
    model, data = problem()
    maml = fm.MAML(model, 0.1, 2)
    assert torch.equal(maml(*data), maml.loss(*data))
    with pytest.raises(ValueError, match="query_mask must be None with query_y"):
        maml(*data, query_mask=torch.ones(4, 4, dtype=torch.bool))
