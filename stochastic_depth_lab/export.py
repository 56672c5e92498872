"""A run's network, whole or smaller, as a file that needs nothing of this project, checked on real images."""

import contextlib
import importlib
import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.deploy.choice import Order
from stochastic_depth_lab import records
from stochastic_depth_lab.atomic import write_whole
from stochastic_depth_lab.build import build_network
from stochastic_depth_lab.data import Normalisation
from stochastic_depth_lab.subnetworks import NUM_LESION, NUM_RECALIBRATION
from stochastic_depth_lab.trained import Trained, load_trained

Format = Literal["onnx", "torch-export", "safetensors"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
TOLERANCE = 1e-4
"""Largest difference to the original that is accepted, relative to its largest output."""
_CHECKED_BATCHES = (1, 7, 64)


class WithNormalisation(nn.Module):
    """A network that takes images as they are stored, uint8 (N, C, H, W).

    Args:
        network: takes normalised images.
        normalisation: of the run.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, normalisation: Normalisation) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", normalisation.mean)
        self.register_buffer("std", normalisation.std)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        return self.network((images.float() - self.mean) / self.std)


@dataclass(frozen=True)
class Exported:
    """A file, and how far what it gives is from the original."""

    path: Path
    num_bytes: int
    num_parameters: int
    num_images: int
    """Real images that it was compared on."""
    difference: float
    """Largest difference of an output, relative to the largest output of the original."""


def export_run(
    folder: Path,
    out: Path,
    *,
    form: Format,
    keep: Sequence[int] | None = None,
    cost: float | None = None,
    order: Order = "last",
    normalise: bool = False,
    data_root: Path | None = None,
) -> Exported:
    """Write a run's network: plain weights, survival probabilities folded into them.

    A smaller one (`keep`, `cost`) has its BatchNorm statistics taken anew on training images. What is written is
    checked on test images first: an ONNX file is run by onnxruntime, an exported program by PyTorch, both in batches of
    several sizes, and safetensors are loaded into a fresh network. A file that differs is not written.

    Args:
        folder: the run folder.
        out: the file to write.
        form: onnx, torch-export (a program that PyTorch loads without any code) or safetensors (weights only).
        keep: blocks to keep, by their index. None: all.
        cost: share of the FLOPs that may be left. None: all.
        order: which blocks go first, see `stochastic_depth.subnetwork`.
        normalise: whether the file takes images as they are stored, uint8.
        data_root: where the data lie. None: where the run found them.

    Raises:
        ValueError: in one line, if it cannot be done, or the file is not equal to the network.
    """
    _require(form)
    if form == "safetensors" and normalise:
        raise ValueError("--normalise puts code into the file, and safetensors holds weights only: use another format.")
    run = load_trained(folder, device=torch.device("cpu"), data_root=data_root)
    network, original = _plain(run, keep, cost, order)
    if normalise:
        network = WithNormalisation(network, run.images.normalisation)
    network = network.eval().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    images = run.images.data.test.first(max(_CHECKED_BATCHES)).images
    inputs = images if normalise else run.images.normalisation(images)
    with torch.no_grad():
        expected = original(run.images.normalisation(images))
    metadata = _metadata(run, keep, cost, normalise=normalise)
    content = _WRITE[form](network, inputs[:2], metadata)
    given = _outputs(form, content, inputs, run)
    difference = float((given - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{out} is not written: on {len(images)} images it differs by {difference:.1e} of the largest output."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, content)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return Exported(out, len(content), num_parameters, len(images), difference)


def _plain(run: Trained, keep: Sequence[int] | None, cost: float | None, order: Order) -> tuple[nn.Module, nn.Module]:
    """The network without stochastic depth, and the one that it must be equal to."""
    if keep is None and cost is None:
        if run.depth is None:
            return run.model, run.model
        network = sd.subnetwork(run.model, range(len(run.depth.names)))
        return network, run.model
    calibration = run.training_batches(NUM_LESION) if order == "lesion" else None
    network = sd.subnetwork(run.model, keep, cost=cost, order=order, calibration=calibration)
    sd.recalibrate_batchnorm_(network, run.training_batches(NUM_RECALIBRATION))
    return network.eval(), network


def _metadata(run: Trained, keep: Sequence[int] | None, cost: float | None, *, normalise: bool) -> dict[str, str]:
    normalisation = run.images.normalisation
    return {
        "experiment": run.experiment.name,
        "classes": json.dumps(run.images.data.class_names),
        "input": "uint8 images (N, C, H, W)" if normalise else "normalised images (N, C, H, W): (image - mean) / std",
        "mean": json.dumps(normalisation.mean.tolist()),
        "std": json.dumps(normalisation.std.tolist()),
        "keep": json.dumps(None if keep is None else list(keep)),
        "cost": json.dumps(cost),
    }


# ---------------------------------------------------------------------------------------------- writing and reading


def _require(form: Format) -> None:
    if form not in get_args(Format):
        raise ValueError(f"--format must be one of {', '.join(get_args(Format))}, but is {form!r}.")
    packages = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",), "torch-export": ()}[
        form
    ]
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            raise ValueError(
                f"--format {form} needs the package {package}: pip install 'stochastic-depth[export]'"
            ) from None


def _program(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        return torch.export.export(network, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # whatever of the network PyTorch cannot trace
        raise ValueError(f"PyTorch cannot export this network: {_first_line(error)}") from error


def write_onnx(network: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:
    """The bytes of an ONNX file of a network: input "images" of any batch size, output "logits".

    Raises:
        ValueError: if an operator of the network has none in ONNX.
    """
    program = _program(network, example)
    try:
        # The exporter prints, and warns of its own means.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: Any = torch.onnx.export(
                program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
            )
    except Exception as error:
        raise ValueError(f"ONNX has no form of this network: {_first_line(error)}") from error
    proto = made.model_proto
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    return cast(bytes, proto.SerializeToString())


def write_program(network: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:
    """The bytes of an exported PyTorch program."""
    file = io.BytesIO()
    torch.export.save(_program(network, example), file, extra_files={"metadata.json": json.dumps(metadata)})
    return file.getvalue()


def write_weights(network: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:  # noqa: ARG001
    """The bytes of a safetensors file of the weights."""
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in network.state_dict().items()}, metadata)


def run_onnx(content: bytes, inputs: Tensor) -> Tensor:
    """What onnxruntime makes of an ONNX file, in batches of several sizes."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def forward(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])

    return _in_batches(forward, inputs)


def run_program(content: bytes, inputs: Tensor) -> Tensor:
    """What PyTorch makes of an exported program, in batches of several sizes."""
    return _in_batches(torch.export.load(io.BytesIO(content)).module(), inputs)


def _in_batches(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    first, *others = (torch.cat([forward(batch) for batch in inputs.split(size)]).detach() for size in _CHECKED_BATCHES)
    for other in others:
        if not torch.allclose(first, other, rtol=TOLERANCE, atol=TOLERANCE * float(first.abs().max())):
            raise ValueError("the file gives other outputs for other batch sizes.")
    return first


def _outputs(form: Format, content: bytes, inputs: Tensor, run: Trained) -> Tensor:
    if form == "onnx":
        return run_onnx(content, inputs)
    if form == "torch-export":
        return run_program(content, inputs)
    from safetensors.torch import load

    weights = load(content)
    fresh, depth = build_network(run.experiment, run.images.data)
    if depth is not None:
        sd.restore_(fresh)
    # A smaller network lacks the branches that were dropped.
    for name, module in list(fresh.named_modules()):
        if isinstance(module, sd.Residual) and not any(key.startswith(f"{name}.branch.") for key in weights):
            module.branch = _Zero(module.shortcut)
    fresh.load_state_dict(weights, strict=True)
    with torch.no_grad():
        return fresh.eval()(inputs)


class _Zero(nn.Module):
    """A branch that gives zeros of the shortcut's shape."""

    def __init__(self, shortcut: nn.Module | None) -> None:
        super().__init__()
        self._shortcut = [shortcut]  # in a list, or its parameters would be this module's too

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self._shortcut[0]
        return torch.zeros_like(x if shortcut is None else shortcut(x))


def _first_line(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


_WRITE = {"onnx": write_onnx, "torch-export": write_program, "safetensors": write_weights}


def default_path(folder: Path, form: Format) -> Path:
    """Where a run's network goes if nothing else is said."""
    experiment = records.read_json(folder / "config.json").get("name", "network")
    return folder / f"{experiment}{SUFFIXES[form]}"
