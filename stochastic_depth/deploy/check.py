"""Checks the result of folding or cutting on an example: it must compute what the stochastic model computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stochastic_depth.copies import evaluating_
from stochastic_depth.deploy.batches import Inputs, call_of, map_tensors, own_tensors
from stochastic_depth.deploy.blocks import noted_calls
from stochastic_depth.deploy.branches import BranchWithGate
from stochastic_depth.deploy.guess import guessed_calls
from stochastic_depth.deploy.undo import without_traces
from stochastic_depth.residual import Residual
from stochastic_depth.retrofit import controller
from stochastic_depth.retrofit.remembered import Call, RememberedCalls, form_of_call
from stochastic_depth.torch_private import is_compiled_wrapper

Origin = Literal["given", "remembered", "guessed"]
Context = Callable[[], AbstractContextManager[Any]]

# Rounding error of a whole network, as a share of an output's largest value. Folded weights are rounded again, and
# models in float64 often normalize in float32.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ROUNDING_OF_TF32 = 1e-2  # GPUs compute float32 convolutions in TF32
_NUM_COMPARED = 8192


class _Sample(NamedTuple):
    """Some values of a tensor, in float64; its largest absolute value; and its type."""

    values: Tensor
    scale: float
    dtype: torch.dtype


class Check:
    """The outputs of a stochastic model on an example in evaluation, to compare with the result.

    The model runs without gradients and leaves no traces, except that the user's hooks run as in any forward. The
    outputs of blocks with branches are compared too, because an output layer that is still all zeros would hide
    differences.

    Args:
        model: the stochastic model.
        branches: its branches.
        inputs: an example from the user. None: remembered calls of the model, one of each form, or else a guess.
        remembered: calls of the model that it was copied from; None: its own.
        context: context in which the stochastic model runs.

    Attributes:
        calls: calls of the blocks and whole layers with branches in the examples.
        origin: where the examples come from.
    """

    def __init__(
        self,
        model: nn.Module,
        branches: Sequence[BranchWithGate],
        inputs: Inputs | None,
        *,
        remembered: RememberedCalls | None = None,
        context: Context = nullcontext,
    ) -> None:
        # The examples on which the model runs, each with what it computes.
        self._examples: list[tuple[Call, Mapping[tuple[str, str], _Sample]]] = []
        self.calls: dict[nn.Module, list[Call]] = {}
        self.origin: Origin = "given"
        depth = controller(model)
        self._kind = type(depth.root).__name__
        self._root = next(name for name, module in model.named_modules() if module is depth.root)
        self._is_wrapped = isinstance(model, (DataParallel, DistributedDataParallel)) or is_compiled_wrapper(model)
        self._branch_of = {
            branch.found.block_name: branch.found.name
            for branch in branches
            if branch.found.key is not None or branch.found.kind == "layer" or isinstance(branch.found.module, Residual)
            if not _is_inside_another(branch, branches)
        }
        blocks = {
            branch.found.module for branch in branches if branch.found.key is not None or branch.found.kind == "layer"
        }
        self._calls = depth.calls
        known = (remembered or depth.calls).evaluation_first()
        forms: list[Any] = []
        with self._calls.paused():
            for origin, call in _examples(depth.root, known, inputs):
                form = form_of_call(*call)
                if form in forms:
                    continue
                if forms and origin == "guessed":
                    break
                self.origin = origin
                try:
                    seen = self._seen(model, call, context, blocks)
                except Exception:
                    if origin == "given":
                        raise
                    continue
                if any(bool(sample.values.isfinite().any()) for sample in seen.values()):
                    self._examples.append((call, seen))
                    forms.append(form)

    def warn_if_impossible(self, function: str, *, stacklevel: int) -> None:
        """Warn that nothing could be checked, and say how to check it."""
        if not self._examples:
            warnings.warn(
                f"{function} could not check its result: it has no example of the inputs of {self._kind}. Pass one, "
                f"{function}(model, inputs=x), or run a forward first.",
                stacklevel=stacklevel + 1,
            )

    def forget_blocks(self) -> None:
        """From now on, compare only the outputs, without what has an entry or a term for each block.

        These are lists, and the losses of routers.
        """
        self._branch_of = {}
        self._examples = [
            (call, {key: sample for key, sample in before.items() if not key[0] and not _is_of_blocks(key[1])})
            for call, before in self._examples
        ]

    def refuse_difference(self, made: nn.Module, function: str, *, context: Context = nullcontext) -> None:
        """Run the result on the examples.

        Raises:
            RuntimeError: if its outputs differ from the stochastic model's, or if it does not run.
        """
        for call, before in self._examples:
            self._refuse_difference(made, function, call, before, context)

    def _refuse_difference(
        self,
        made: nn.Module,
        function: str,
        call: Call,
        before: Mapping[tuple[str, str], _Sample],
        context: Context,
    ) -> None:
        try:
            with self._calls.paused():
                after = self._seen(made, call, context)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise RuntimeError(
                f"{function} refuses {self._kind}: the result would not run on the {self.origin} example "
                f"({reason}). {_WAY_OUT}"
            ) from error
        difference = _difference(before, after, _rounding(made, [*before.values(), *after.values()]))
        if difference is not None:
            name, error, scale = difference
            where = f"{name} (branch {self._branch_of[name]})" if name in self._branch_of else "the output"
            raise RuntimeError(
                f"{function} refuses {self._kind}: on the {self.origin} example {where} would differ from the "
                f"evaluated stochastic model by {error:.2g}, with values up to {scale:.2g}. Most likely a hook, or "
                f"code outside the branch, uses its last weights or their output. {_WAY_OUT}"
            )

    def _seen(
        self, model: nn.Module, call: Call, context: Context, noted: Collection[nn.Module] = ()
    ) -> dict[tuple[str, str], _Sample]:
        """The blocks' outputs in order, then the model's outputs, which have the name ""."""
        root = model.get_submodule(self._root)
        model = model if self.origin == "given" and not self._is_wrapped else root
        inner: dict[tuple[str, str], _Sample] = {}

        def run() -> Any:
            args, kwargs = own_tensors(call)
            return model(*args, **kwargs)

        def note(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
            calls = sum(key[0] == name for key in inner)
            inner.update({(name, f"{calls}{path}"): _sample(tensor) for path, tensor in tensors_in(output)})

        with torch.no_grad(), warnings.catch_warnings(), context():
            warnings.simplefilter("ignore")
            # Without hooks first: layers of PyTorch with hooks take another path through their code.
            with without_traces(model):
                evaluating_(model)
                outputs = dict(tensors_in(run()))
                is_float = {path: tensor.is_floating_point() or tensor.is_complex() for path, tensor in outputs.items()}
                seen = {
                    ("", path): _sample(tensor)
                    for path, tensor in outputs.items()
                    if is_float[path] or not any(is_float.values())
                }
            with without_traces(model):
                evaluating_(model)
                modules = dict(root.named_modules(remove_duplicate=False))
                for name in self._branch_of:
                    if name and name in modules:
                        modules[name].register_forward_hook(partial(note, name))  # removed with the other traces
                try:
                    with noted_calls(noted) as calls:
                        run()
                except Exception:  # it does not run with hooks
                    inner.clear()
                else:
                    for block, its in calls.items():
                        self.calls.setdefault(block, []).extend(its)
        return {**inner, **seen}


_WAY_OUT = "The model is as it was. Evaluate it as it is, or write the sum as Residual(branch, shortcut)."


def _is_of_blocks(path: str) -> bool:
    return path.count(".") > 1 or path.endswith("loss")


def _is_inside_another(branch: BranchWithGate, branches: Sequence[BranchWithGate]) -> bool:
    """Whether a block lies in another block's branch, so that its output may have that branch's factor."""
    block = branch.found.module
    return any(
        other.found.module is not block and any(module is block for module in other.found.parts.modules())
        for other in branches
    )


def _examples(root: nn.Module, remembered: Sequence[Call], inputs: Inputs | None) -> Iterator[tuple[Origin, Call]]:
    if inputs is not None:
        yield "given", call_of(inputs)
        return
    first = next(root.parameters(), None)
    # Forwards of a sharded model wait for other ranks, which may not be here.
    if first is None or any(type(p).__name__ == "DTensor" or p.is_meta for p in root.parameters()):
        return
    for call in remembered:
        call = map_tensors(lambda tensor: tensor.to(first.device), call)
        yield "remembered", call
        # The model may have been converted in the meantime.
        yield "remembered", map_tensors(lambda tensor: _with_precision(tensor, first.dtype), call)
    for call in guessed_calls(root):
        yield "guessed", call


def _with_precision(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def tensors_in(value: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an output, in containers or as attributes of objects, each with its path."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield path, value
        return
    if id(value) in seen or isinstance(value, (nn.Module, type, str)):
        return
    seen.add(id(value))
    entries: Any = ()
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value).items()
    elif isinstance(value, (tuple, list)):
        entries = enumerate(cast("list[Any]", value))
    elif hasattr(value, "__dict__"):
        entries = vars(value).items()
    for key, entry in entries:
        yield from tensors_in(entry, f"{path}.{key}", seen)


def _sample(tensor: Tensor) -> _Sample:
    tensor = tensor.detach()
    if tensor.is_nested:
        tensor = torch.cat([part.flatten() for part in tensor.unbind()])
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()
    finite = values[values.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return _Sample(values[:: max(1, values.numel() // _NUM_COMPARED)].double().clone(), scale, tensor.dtype)


def _rounding(model: nn.Module, samples: Sequence[_Sample]) -> float:
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    dtypes = {*(parameter.dtype for parameter in parameters), *(sample.dtype for sample in samples)}
    roundings = [_ROUNDING.get(dtype, 1e-1) for dtype in dtypes if dtype.is_floating_point] or [1e-4]
    if torch.float32 in dtypes and any(parameter.is_cuda for parameter in parameters):
        roundings.append(_ROUNDING_OF_TF32)
    return max(roundings)


def _difference(
    before: Mapping[tuple[str, str], _Sample], after: Mapping[tuple[str, str], _Sample], rounding: float
) -> tuple[str, float, float] | None:
    """The first sample that differs by more than rounding: its name, the difference, and its largest value.

    Values that exist on one side only, such as attention maps of a removed branch, are not compared.
    """
    largest = max(sample.scale for sample in before.values())
    for key, sample in before.items():
        other = after.get(key)
        if other is None:
            continue
        if other.values.shape != sample.values.shape:
            return key[0], float("inf"), sample.scale
        one, two = sample.values, other.values.to(sample.values.device)
        error = torch.where((one == two) | (one.isnan() & two.isnan()), 0.0, (one - two).abs())
        worst = float(error.nan_to_num(nan=float("inf")).max()) if error.numel() else 0.0
        # If large values cancel, the result is only as exact as they are.
        if worst > rounding * sample.scale + 1e-2 * rounding * largest * (key[0] == ""):
            return key[0], worst, sample.scale
    return None
