"""Exports a run's network, whole or smaller, to a file that works without this project, checked on real images."""

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
from stochastic_depth_lab.after.trained import NUM_LESION, NUM_RECALIBRATION, Trained, load_trained
from stochastic_depth_lab.data import Normalization
from stochastic_depth_lab.experiments.config import Order
from stochastic_depth_lab.files import write_whole
from stochastic_depth_lab.runs import records
from stochastic_depth_lab.runs.checkpoint import as_safetensors
from stochastic_depth_lab.training.setup import build_network

Format = Literal["onnx", "torch-export", "safetensors"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
TOLERANCE = 1e-4
"""Largest accepted difference to the original, relative to its largest output."""
_CHECKED_BATCHES = (1, 7, 64)


class WithNormalization(nn.Module):
    """A network that takes images as they are stored, uint8 (N, C, H, W)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", normalization.mean)
        self.register_buffer("std", normalization.std)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        return self.network((images.float() - self.mean) / self.std)


@dataclass(frozen=True)
class Exported:
    """A file, and how far its outputs are from the original's."""

    path: Path
    keep: tuple[int, ...]
    """Its blocks, by their index in the run's network."""
    num_bytes: int
    num_parameters: int
    num_images: int
    """Number of images that it was compared on."""
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
    normalize: bool = False,
    data_root: Path | None = None,
) -> Exported:
    """Write a run's network as plain weights, with the survival probabilities folded in.

    The BatchNorm statistics of a smaller network (`keep`, `cost`) are recomputed on training images. The content is
    checked on test images before it is written: onnxruntime runs an ONNX file and PyTorch an exported program, both in
    batches of several sizes; safetensors are loaded into a new network. A file that differs is not written.

    Args:
        folder: the run folder.
        out: the file to write.
        form: onnx, torch-export (a program that PyTorch loads without any code) or safetensors (weights only).
        keep: blocks to keep, by their index. None: all.
        cost: share of the FLOPs to keep. None: all.
        order: which blocks to remove first, see `stochastic_depth.subnetwork`.
        normalize: whether the file takes images as they are stored, uint8.
        data_root: folder of the data sets. None: where the run found them.

    Raises:
        ValueError: in one line, if the export fails, or the file differs from the network.
    """
    _check_format(form)
    if form == "safetensors" and normalize:
        raise ValueError("--normalize adds code to the file, but safetensors holds weights only: use another format.")
    if keep is not None and cost is not None:
        raise ValueError("--keep and --cost exclude each other.")
    run = load_trained(folder, device=torch.device("cpu"), data_root=data_root)
    if cost is not None:
        calibration = run.training_batches(NUM_LESION) if order == "lesion" else None
        example = run.inputs(run.images.data.test, 1)
        keep = sd.branches_to_keep(run.model, cost=cost, order=order, calibration=calibration, inputs=example)
    kept = list(range(run.num_blocks)) if keep is None else sorted(keep)
    network, original = _plain(run, kept, recalibrate=keep is not None)
    if normalize:
        network = WithNormalization(network, run.images.normalization)
    network = network.eval().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    images = run.images.data.test.first(max(_CHECKED_BATCHES)).images
    inputs = images if normalize else run.images.normalization(images)
    with torch.no_grad():
        expected = original(run.images.normalization(images))
    content = _WRITE[form](network, inputs[:2], _metadata(run, kept, normalize=normalize))
    given = _outputs(form, content, inputs, run, kept)
    difference = float((given - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{out} is not written: on {len(images)} images it differs by {difference:.1e} of the largest output."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, content)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return Exported(out, tuple(kept), len(content), num_parameters, len(images), difference)


def _plain(run: Trained, kept: Sequence[int], *, recalibrate: bool) -> tuple[nn.Module, nn.Module]:
    """The network without stochastic depth and without the other blocks, and the one that it must equal."""
    if not recalibrate:
        return (run.model if run.depth is None else sd.subnetwork(run.model, kept)), run.model
    network = sd.subnetwork(run.model, kept)
    sd.recalibrate_batchnorm_(network, run.training_batches(NUM_RECALIBRATION))
    return network.eval(), network


def _metadata(run: Trained, kept: Sequence[int], *, normalize: bool) -> dict[str, str]:
    normalization = run.images.normalization
    return {
        "experiment": run.experiment.name,
        "classes": json.dumps(run.images.data.class_names),
        "input": "uint8 images (N, C, H, W)" if normalize else "normalized images (N, C, H, W): (image - mean) / std",
        "mean": json.dumps(normalization.mean.tolist()),
        "std": json.dumps(normalization.std.tolist()),
        "keep": json.dumps(run.smaller(kept).model.keep),
    }


def _check_format(form: Format) -> None:
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
                f"--format {form} needs the package {package}: run pip install '.[export]' in a clone of the project."
            ) from None


def _program(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        return torch.export.export(network, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # PyTorch cannot trace it
        raise ValueError(f"PyTorch cannot export this network: {_first_line(error)}") from error


def write_onnx(network: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:
    """The bytes of an ONNX file of a network: input "images" of any batch size, output "logits".

    Raises:
        ValueError: if ONNX lacks an operator of the network.
    """
    program = _program(network, example)
    try:
        # The exporter prints and warns about itself.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: Any = torch.onnx.export(
                program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
            )
    except Exception as error:
        raise ValueError(f"ONNX cannot represent this network: {_first_line(error)}") from error
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
    return as_safetensors(network.state_dict(), metadata)


def run_onnx(content: bytes, inputs: Tensor) -> Tensor:
    """Outputs of an ONNX file in onnxruntime, in batches of several sizes."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def forward(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])

    return _in_batches(forward, inputs)


def run_program(content: bytes, inputs: Tensor) -> Tensor:
    """Outputs of an exported program in PyTorch, in batches of several sizes."""
    return _in_batches(torch.export.load(io.BytesIO(content)).module(), inputs)


def _in_batches(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    first, *others = (torch.cat([forward(batch) for batch in inputs.split(size)]).detach() for size in _CHECKED_BATCHES)
    for other in others:
        if not torch.allclose(first, other, rtol=TOLERANCE, atol=TOLERANCE * float(first.abs().max())):
            raise ValueError("the outputs of the file depend on the batch size.")
    return first


def _outputs(form: Format, content: bytes, inputs: Tensor, run: Trained, keep: Sequence[int]) -> Tensor:
    if form == "onnx":
        return run_onnx(content, inputs)
    if form == "torch-export":
        return run_program(content, inputs)
    from safetensors.torch import load

    fresh, _ = build_network(run.smaller(keep), run.images.data)
    fresh.load_state_dict(load(content), strict=True)
    with torch.no_grad():
        return fresh.eval()(inputs)


def _first_line(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


_WRITE = {"onnx": write_onnx, "torch-export": write_program, "safetensors": write_weights}


def default_path(folder: Path, form: Format, *, smaller: bool) -> Path:
    """The default path of a run's network. A smaller one does not replace the whole one."""
    experiment = records.read_json(folder / "config.json").get("name", "network")
    return folder / f"{experiment}{'-smaller' * smaller}{SUFFIXES[form]}"
