"""The library on a GPU; tests that can also run on the CPU do, so that they are known to work."""

from __future__ import annotations

import contextlib

import pytest
import reference
import torch
from process_group import group_of_one
from reference import assert_close, buffers, conv_net, copied, gradients, images, loss_of, mlp, vectors
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_both = pytest.mark.parametrize("device", ["cpu", ON_GPU])
both_granularities = pytest.mark.parametrize("granularity", ["batch", "sample"])
PROBS = [0.9, 0.7, 0.5, 0.3]
GATES = {
    "batch": [True, False, True, False],
    "sample": [torch.tensor([1, 0, 1, 1, 0, 1]).bool(), False, torch.tensor([0, 1, 1, 0, 0, 1]).bool(), True],
}


def on(device: str, gates: list[bool | Tensor]) -> list[bool | Tensor]:
    return [gate.to(device) if isinstance(gate, Tensor) else gate for gate in gates]


def step(net: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    net.zero_grad()
    loss_of(net(x).double()).backward()
    return gradients(net)


@on_both
@both_granularities
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_gradients_and_statistics_are_those_of_the_plain_network(
    device: str, granularity: str, channels_last: bool
) -> None:
    net, x = conv_net().to(device), images(6).to(device)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    plain = copied(net)
    loss_of(reference.forward(plain, x, on(device, GATES[granularity]))).backward()
    reference.fill_skipped_gradients(plain, GATES[granularity], "zero")
    depth = sd.make_stochastic_(net, PROBS, granularity=granularity)
    with depth.gates(GATES[granularity]):
        assert_close(step(net, x), gradients(plain))
    assert_close(buffers(net), buffers(plain))


@on_both
@both_granularities
def test_a_gpu_draws_what_the_cpu_draws(device: str, granularity: str) -> None:
    net, twin = mlp().to(device), mlp()
    depth = sd.make_stochastic_(net, PROBS, granularity=granularity, seed=3)
    sd.make_stochastic_(twin, PROBS, granularity=granularity, seed=3)
    for number in range(5):
        x = vectors(6, seed=number)
        torch.testing.assert_close(net(x.to(device)).cpu(), twin(x), rtol=1e-9, atol=1e-11)
    assert depth.state_dict()["counter"] == 5


@on_both
@both_granularities
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mixed_precision_with_a_scaler(device: str, granularity: str, dtype: torch.dtype) -> None:
    net, x = conv_net(dtype=torch.float32).to(device), images(6, dtype=torch.float32).to(device)
    plain = copied(net)
    depth = sd.make_stochastic_(net, PROBS, granularity=granularity)
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16, init_scale=2.0**8)
    found = []
    for each, gates in ((net, None), (plain, on(device, GATES[granularity]))):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        with torch.autocast(device, dtype), contextlib.ExitStack() as stack:
            if gates is None:
                stack.enter_context(depth.gates(GATES[granularity]))
            output = each(x) if gates is None else reference.forward(each, x, gates)
        scaler.scale(output.float().square().mean()).backward()
        scaler.unscale_(optimizer)
        found.append(gradients(each))
        scaler.step(optimizer)
        scaler.update()
    for name, gradient in found[0].items():
        other = found[1][name]
        torch.testing.assert_close(
            gradient, torch.zeros_like(gradient) if other is None else other, rtol=0.05, atol=0.02, msg=name
        )
        assert gradient.isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@on_both
@both_granularities
def test_compiled_branches_give_what_plain_ones_give(device: str, granularity: str) -> None:
    net, x = mlp().to(device), vectors(6).to(device)
    twin = copied(net)
    depths = [sd.make_stochastic_(each, PROBS, granularity=granularity, seed=1) for each in (net, twin)]
    for branch in depths[0].branches:
        branch.parts.compile(backend="aot_eager" if device == "cpu" else "inductor")
    for _ in range(4):
        assert_close(step(net, x), step(twin, x), atol=1e-9)
    torch._dynamo.reset()


@on_both
@both_granularities
@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_one_process_that_is_wrapped(device: str, granularity: str, how: str) -> None:
    net, x = mlp().to(device), vectors(6).to(device)
    twin = copied(net)
    for each in (net, twin):
        sd.make_stochastic_(each, PROBS, granularity=granularity, seed=2)
    with group_of_one(device):
        if how == "DDP":
            wrapped = DistributedDataParallel(net, device_ids=[0] if device == "cuda" else None)
        else:
            wrapped = sd.shard_(net, init_device_mesh(device, (1,))) or net
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (net, twin)]
        for _ in range(4):
            for each, optimizer in zip((wrapped, twin), optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(each(x)).backward()
                optimizer.step()
        state = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in net.state_dict().items()
        }
        assert_close(state, dict(twin.state_dict()), atol=1e-9)


@pytest.mark.gpu
def test_synchronized_batch_norm_of_one_process_is_batch_norm() -> None:
    net, x = conv_net().cuda(), images(6).cuda()
    twin = copied(net)
    with group_of_one("cuda"):
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        for each in (net, twin):
            sd.make_stochastic_(each, PROBS, seed=2)
        wrapped = DistributedDataParallel(net, device_ids=[0])
        loss_of(wrapped(x)).backward()
        assert_close(gradients(net), step(twin, x), atol=1e-8)
        assert_close(buffers(net), buffers(twin), atol=1e-8)


@pytest.mark.gpu
@both_granularities
def test_a_step_waits_for_nothing(granularity: str) -> None:
    """Gates are drawn on the CPU ahead of the GPU: nothing waits for a number from it."""
    net, x = conv_net().cuda(), images(6).cuda()
    sd.make_stochastic_(net, PROBS, granularity=granularity)
    step(net, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            net.zero_grad()
            net(x).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_closed_branch_keeps_no_memory() -> None:
    net = sd.models.cifar_resnet(20).cuda()
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    x = torch.randn(64, 3, 32, 32, device="cuda")
    kept = []
    for is_open in (True, False):
        with depth.gates([is_open] * len(depth.names)):
            before = torch.cuda.memory_allocated()
            output = net(x)
            kept.append(torch.cuda.memory_allocated() - before)
            del output
    assert kept[1] < 0.5 * kept[0]
