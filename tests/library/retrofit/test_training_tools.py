"""Training tools with a retrofitted model: mixed precision, averaged copies, accumulation, compilation, export."""

import copy
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel

import stochastic_depth as sd


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=48, num_classes=5, drop_path_rate=0.5
    )


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_gradient_scaler_scales_and_unscales_what_was_skipped_too() -> None:
    model = vit()
    sd.make_stochastic_(model)
    reference = copy.deepcopy(model)
    reference(images()).square().sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(images()).square().sum()).backward()
    scaler.unscale_(optimizer)
    assert_close(gradients(model), gradients(reference))
    scaler.step(optimizer)
    scaler.update()


def test_autocast_runs_the_branches_in_its_precision() -> None:
    model = vit()
    depth = sd.make_stochastic_(model)
    kinds: set[torch.dtype] = set()
    for name, module in model.named_modules():
        if name.endswith("mlp.fc1"):
            module.register_forward_hook(lambda _m, _i, output: kinds.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images())
    output.float().sum().backward()
    assert kinds == {torch.bfloat16}
    assert depth.last_gates is not None
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


@pytest.mark.parametrize("average", [AveragedModel, ModelEmaV3], ids=["torch", "timm"])
def test_an_averaged_copy_has_a_controller_of_its_own_and_evaluates_like_the_model(average: type[nn.Module]) -> None:
    model = vit()
    depth = sd.make_stochastic_(model)
    averaged = average(model)
    assert sd.controller(averaged) is not depth
    model(images())
    assert sd.controller(averaged).state_dict()["counter"] == 0
    model.eval()
    averaged.eval()
    assert torch.equal(averaged(images()), model(images()))


def test_accumulated_gradients_are_the_sum_of_those_of_the_micro_batches() -> None:
    model = vit()
    depth = sd.make_stochastic_(model)
    state = depth.state_dict()
    for part in images().chunk(2):
        model(part).square().sum().backward()
    accumulated = gradients(model)
    depth.load_state_dict(state)
    parts: list[dict[str, Tensor]] = []
    for part in images().chunk(2):
        model.zero_grad()
        model(part).square().sum().backward()
        parts.append(gradients(model))
    assert_close(accumulated, {name: parts[0][name] + parts[1][name] for name in accumulated})


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def of_dynamo(test):
    """PyTorch's compiler warns about what it does itself."""
    ignored = pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf",
        "ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function",  # up to PyTorch 2.11
        "ignore:Dynamo does not know how to trace the builtin",  # PyTorch 2.11, of its own dispatch modes
        "ignore::DeprecationWarning",
    )
    return pytest.mark.usefixtures("_fresh_dynamo")(ignored(test))


@of_dynamo
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_compiled_parts_of_branches_are_not_compiled_again_once_their_shapes_were_seen(granularity: str) -> None:
    model = vit().double()
    depth = sd.make_stochastic_(model, sd.uniform(0.5), granularity=granularity)
    plain = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.compile(backend="eager")
        block.mlp.compile(backend="eager")
    # All samples, one, and two sizes, the second of which makes the size dynamic.
    for count in [5, 1, 3, 4] if granularity == "sample" else [5]:
        gate = True if granularity == "batch" else torch.arange(5) < count
        with depth.gates([gate] * len(depth.names)):
            model(images(5).double()).sum().backward()
    graphs = counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 2 * (1 if granularity == "batch" else 3)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(8):
            ours, theirs = model(images(5).double()), plain(images(5).double())
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
            ours.sum().backward()
    assert counters["stats"]["unique_graphs"] == graphs


@of_dynamo
def test_a_compiled_whole_model_draws_the_gates_that_it_draws_without() -> None:
    model = vit().double()
    depth = sd.make_stochastic_(model)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    for _ in range(6):
        ours, theirs = compiled(images().double()), plain(images().double())
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert depth.last_gates == sd.controller(plain).last_gates
    assert depth.state_dict()["counter"] == 6
    assert counters["stats"]["unique_graphs"] > 0


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    return model


EXPORTED = {
    "drop paths": (vit, None),
    "drop paths, a schedule": (vit, sd.linear_decay(0.5)),
    "additions": (resnet, sd.linear_decay(0.5)),
}


@pytest.mark.parametrize("case", EXPORTED)
def test_the_evaluated_model_exports_with_any_batch_size(case: str) -> None:
    make, schedule = EXPORTED[case]
    model = make().double()
    sd.make_stochastic_(model, schedule)
    model.eval()(images(2).double())  # What is exported was proven before.
    exported = torch.export.export(model, (images(2).double(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        given = exported.module()(images(3).double())
        torch.testing.assert_close(given, model(images(3).double()), rtol=1e-9, atol=1e-12)
    if schedule is not None:  # Its factors are in the graph: the plain network computes something else.
        assert not torch.allclose(make().double().eval()(images(3).double()), given, rtol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", EXPORTED)
def test_the_evaluated_model_gives_the_same_in_onnx(case: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    make, schedule = EXPORTED[case]
    model = make()
    sd.make_stochastic_(model, schedule)
    with torch.no_grad():
        model.eval()(images(2))  # What is exported was proven before.
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images(2),), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images(2).numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(output), model(images(2)), rtol=1e-4, atol=1e-4)


def plain_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(*(sd.Residual(nn.Linear(6, 6)) for _ in range(3))))


def test_a_copy_of_a_block_in_the_model_is_refused_in_training() -> None:
    net, x = plain_net(), torch.randn(4, 6)
    depth = sd.make_stochastic_(net, sd.uniform(0.5))
    stage = net[0]
    assert isinstance(stage, nn.Sequential)
    beside = copy.deepcopy(stage)
    stage.append(copy.deepcopy(stage[2]))
    with pytest.raises(RuntimeError, match=r"A copy of 0\.2 runs in the model that it was copied from"):
        net(x)
    with depth.gates([True] * 3):
        pass
    assert net.eval()(x).shape == x.shape
    assert beside.train()(x).shape == x.shape  # a model of its own


def test_a_traced_function_does_not_freeze_a_draw() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    net, x = plain_net(), torch.randn(4, 6)
    sd.make_stochastic_(net, sd.uniform(0.5))
    with pytest.raises(RuntimeError, match="A trace would freeze the gates"):
        make_fx(net)(x)
    torch.testing.assert_close(make_fx(net.eval())(x)(x), net(x))


def test_gradients_of_single_samples_do_not_share_a_gate() -> None:
    net, x = plain_net(), torch.randn(4, 6)
    sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, values, (sample[None],)).sum()

    with pytest.raises(RuntimeError, match=r"torch\.vmap draws one gate for all that it maps"):
        torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    sd.restore_(net)
    sd.make_stochastic_(net, sd.uniform(0.5))
    torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)


def test_the_gates_after_an_empty_batch() -> None:
    net = plain_net()
    depth = sd.make_stochastic_(net, sd.uniform(0.5), granularity="sample")
    net(torch.randn(0, 6))
    assert depth.last_gates == [0.0] * 3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("rescale", ["eval", "train"])
def test_an_evaluated_encoder_packs_a_padded_batch(rescale: Any) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).double()
    x, padding = torch.randn(3, 5, 8, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    sd.make_stochastic_(encoder, sd.uniform(0.5), rescale=rescale)
    encoder(x, src_key_padding_mask=padding)
    encoder.eval()
    expected = encoder(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        if rescale == "eval":
            with pytest.raises(RuntimeError, match=r"set encoder\.use_nested_tensor = False"):
                encoder(x, src_key_padding_mask=padding)
            encoder.use_nested_tensor = False
        found = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])


@pytest.mark.parametrize("undo", [sd.restore_, sd.fold_])
@pytest.mark.parametrize("kind", ["residuals", "blocks"])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_keeps_working_once_it_is_plain(undo: Any, kind: str) -> None:
    torch.manual_seed(0)
    parts = (sd.Residual(nn.Linear(6, 6)) if kind == "residuals" else Adding() for _ in range(2))
    net, x = Stack(*parts).double().eval(), torch.randn(3, 6).double()
    sd.make_stochastic_(net, [0.6, 0.3])
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    net.train()
    compiled(x).sum().backward()
    net.eval()
    undo(net)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


class Stack(nn.Module):
    """A root that is no container of PyTorch."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@pytest.mark.parametrize("kind", ["block", "layer", "residual"])
@pytest.mark.parametrize("undo", [sd.restore_, sd.fold_])
def test_a_wrapper_around_a_stochastic_forward_outlives_it(undo: Any, kind: str) -> None:
    """Profilers and accelerate wrap the forward of a module and keep what they wrapped."""
    torch.manual_seed(0)
    module = sd.Residual(nn.Linear(6, 6)) if kind == "residual" else Adding()
    net, x = nn.Sequential(module, nn.Linear(6, 6)).double().eval(), torch.randn(3, 6).double()
    sd.make_stochastic_(net, [0.6], **({"layers": ["0"]} if kind == "layer" else {}))
    inner, calls = module.forward, []

    @functools.wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    module.forward = wrapper
    evaluated = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a layer, whose factor stays a scalar
        undo(net)
    before = len(calls)
    f = module.branch if kind == "residual" else module.f
    plain = net[1](x + f(x)) if kind != "layer" or undo is sd.restore_ else evaluated
    torch.testing.assert_close(net(x), plain, rtol=1e-12, atol=1e-12)
    assert len(calls) > before
    if undo is sd.fold_:
        torch.testing.assert_close(net(x), evaluated, rtol=1e-12, atol=1e-12)
