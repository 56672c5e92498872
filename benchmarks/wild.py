"""Tests `make_stochastic_` on public model code that we did not write: branches found, and how exact they are.

Each entry of `wild_models.py` is a small network of a public package with random weights. An engineer has counted its
residual branches by reading the code, and named for each the module call whose output the branch ends with. The
reference is the model's own code with the output of that call multiplied by its gate, and knows nothing of the library.
Compared are outputs and parameter gradients in float64, in training mode, with dropout 0 and BatchNorm in evaluation.
Plain additions get `uniform(0.5)` (granularity batch, rescale none), drop paths keep their own rates and are compared
with both granularities. Each entry runs in a process of its own.

    python benchmarks/wild.py [--only NAME ...] [--list] [--out FILE [--keep]] [--time-limit SECONDS]

Packages: `pip install -e '.[wild]'` and `pip install --no-deps dinov2`. Entries whose packages are missing are skipped
and named. `--out results/wild` writes results/wild.json and results/wild.md.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from protocol import processor
from torch import Tensor, nn
from wild_models import ENTRIES, Entry, matching

import stochastic_depth as sd
from stochastic_depth.retrofit.recording.maps import NotComputed

TOLERANCE = 1e-9
ABSENT = torch.zeros(0)
"""In place of an attention map that was not computed."""
# Imported once, before the processes of the entries are forked.
SLOW_IMPORTS = {"timm": "timm", "transformers": "transformers.modeling_utils", "diffusers": "diffusers"}
_RATES = ("drop_prob", "p", "drop_rate", "drop_path_rate", "prob", "drop")


@dataclasses.dataclass
class Report:
    """Results of one entry in one use.

    Attributes:
        entry: its name.
        packages: the packages with their versions.
        use: "additions" or "drop paths".
        branches: how many a careful engineer calls residual.
        found: how many the library lists; those that are no branch in the engineer's count are in `others`.
        skipped: how many of them the library says it skips.
        masked: how many it computes and masks.
        missed: how many of the engineer's branches no gate of the library closes.
        others: names of the library's branches that close none of the engineer's, or not it alone.
        outcome: "equal"; "deviates"; "crash" (after it was found); "refused" (ValueError or RuntimeError of
            `make_stochastic_`); "broken" (any other error of it); "unclear" (equal where it could be compared, but some
            of the library's branches are none of the engineer's); "time limit"; "entry" (itself at fault).
        output_deviation: largest difference of outputs over the largest output; None where nothing could be compared.
        gradient_deviation: the same of parameter gradients, each over the largest gradient of all parameters.
        evaluation_deviation: the same of outputs in evaluation, where the factor p has to hold.
        missing_zero_grads: parameters without a gradient where a mask gives zeros.
        open_is_bit_equal: whether outputs with all gates open are those of the model's own code, bit for bit.
        verify: what `depth.verify` says.
        by_example: whether `make_stochastic_` was given the inputs: where it finds or does less without.
        messages: causes of masks, errors and warnings, by the library or by the crash.
        seconds: duration.
    """

    entry: str
    packages: dict[str, str]
    use: str
    branches: int
    found: int = 0
    skipped: int = 0
    masked: int = 0
    missed: int = 0
    others: list[str] = dataclasses.field(default_factory=list)
    outcome: str = ""
    output_deviation: float | None = None
    gradient_deviation: float | None = None
    evaluation_deviation: float | None = None
    missing_zero_grads: int = 0
    open_is_bit_equal: bool | None = None
    verify: str = ""
    messages: list[str] = dataclasses.field(default_factory=list)
    by_example: bool = False
    seconds: float = 0.0


# --- The reference: the model's own code, gated from outside ---------------------------------------------------------

Call = tuple[str, int]
"""A branch of the reference: the name of the module that ends it, and the number of the call in one forward."""


class Reference:
    """A copy of the model in which the outputs of certain calls are multiplied by gates.

    Args:
        model: the model's own code.
        ends: names of the modules whose calls end the branches.
        drop_paths: whether they are drop paths, which then do nothing but multiply.
    """

    def __init__(self, model: nn.Module, ends: Sequence[str], *, drop_paths: bool) -> None:
        self.model = copy.deepcopy(model)
        self.gates: dict[Call, Tensor | float] = {}
        self.num_samples: dict[Call, int] = {}
        self._calls: collections.Counter[str] = collections.Counter()
        for name in ends:
            module = self.model.get_submodule(name)
            if drop_paths:
                # An instance's forward: the class and the attributes, which the model may ask for, stay.
                module.forward = lambda x, *_, name=name, **__: self._gated(name, x)
            else:
                module.register_forward_hook(lambda _module, _args, output, name=name: self._gated(name, output))

    def _gated(self, name: str, output: Any) -> Any:
        call = (name, self._calls[name])
        self._calls[name] += 1
        if isinstance(output, (tuple, list)):
            return type(output)([self._scaled(call, output[0]), *output[1:]])
        return self._scaled(call, output)

    def _scaled(self, call: Call, x: Tensor) -> Tensor:
        self.num_samples[call] = x.shape[0] if x.dim() else 1
        gate = self.gates.get(call, 1.0)
        if isinstance(gate, Tensor):
            gate = gate.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        return x if isinstance(gate, float) and gate == 1.0 else x * gate

    def __call__(self, *inputs: Any) -> Any:
        """A forward of the model."""
        self._calls.clear()
        return self.model(*inputs)


# --- What is compared ------------------------------------------------------------------------------------------------


def tensors(output: Any) -> list[Tensor]:
    """The floating tensors of an output, whatever holds them."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, NotComputed):
        return [ABSENT]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    if isinstance(output, (list, tuple)):
        return [leaf for value in output for leaf in tensors(value)]
    return []


def fresh(inputs: Sequence[Any]) -> list[Any]:
    """The inputs again: some models change what they are given."""
    return copy.deepcopy(list(inputs))


def outputs_of(run: Callable[..., Any], inputs: Sequence[Any]) -> list[Tensor]:
    """Outputs without gradients."""
    with torch.no_grad():
        return [leaf if leaf is ABSENT else leaf.clone() for leaf in tensors(run(*fresh(inputs)))]


def gradients_of(
    run: Callable[..., Any], model: nn.Module, inputs: Sequence[Any], but: Sequence[int] = ()
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of all parameters, of a random projection of the outputs without some of them."""
    model.zero_grad(set_to_none=True)
    outputs = tensors(run(*fresh(inputs)))
    generator = torch.Generator().manual_seed(1)
    weighted = [
        (leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).sum()
        for index, leaf in enumerate(outputs)
        if leaf.requires_grad and index not in but
    ]
    torch.stack(weighted).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [leaf if leaf is ABSENT else leaf.detach() for leaf in outputs], gradients


def deviation(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference over the largest value of their tensors; infinite where shapes or NaN differ."""
    # What stands for an attention map that was not computed is no deviation: whatever uses it raises.
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a is not ABSENT]
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    worst = 0.0
    for a, b in pairs:
        if not a.numel():
            continue
        both = a.isfinite() & b.isfinite()
        if not torch.equal(a[~both].nan_to_num(), b[~both].nan_to_num()):
            return float("inf")
        if both.any():
            scale = max(b[both].abs().max().item(), 1e-30)
            worst = max(worst, (a[both] - b[both]).abs().max().item() / scale)
    return worst


def gradient_deviation(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, int]:
    """Largest difference over the largest gradient; and parameters without one where theirs is zero."""
    scale = max([g.abs().max().item() for g in theirs.values() if g.numel()], default=1.0) or 1.0
    worst, missing = 0.0, 0
    for name in {**ours, **theirs}:
        mine, other = ours.get(name), theirs.get(name)
        if mine is None and other is not None and not other.any():
            missing += 1
            continue
        zero = torch.zeros(())
        difference = (zero if mine is None else mine) - (zero if other is None else other)
        if difference.numel():
            worst = max(worst, difference.abs().max().item() / scale)
    return worst, missing


# --- One entry -------------------------------------------------------------------------------------------------------


def quiet(model: nn.Module, inputs: Sequence[Any]) -> nn.Module:
    """The model in float64, in training mode, without dropout, BatchNorm in evaluation, and no branch that gives 0."""
    torch.manual_seed(0)
    model = model.double().train()
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.dim() <= 1 or not parameter.any()):
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # Statistics of these inputs: without them activations fade from block to block.
    if norms:
        outputs_of(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return settle(model)


def settle(model: nn.Module) -> nn.Module:
    """BatchNorm in evaluation."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def is_drop_path(module: nn.Module) -> bool:
    """Whether a module is a drop path with a rate, by its class name."""
    name = type(module).__name__.lower().replace("_", "")
    looks = name.endswith(("droppath", "stochasticdepth", "dropconnect")) and not any(module.children())
    return looks and rate_of(module) > 0


def rate_of(module: nn.Module) -> float:
    """The rate of a drop path."""
    return float(next((vars(module)[name] for name in _RATES if vars(module).get(name) is not None), 0.0))


def survivor(module: nn.Module) -> float:
    """What an open drop path multiplies by."""
    return 1 / (1 - rate_of(module)) if getattr(module, "scale_by_keep", True) else 1.0


def message_of(error: BaseException) -> str:
    """Type, text and the last place in the library, the package and here."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [
        f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
        for frame in frames
        if Path(frame.filename).parent.name != "benchmarks" and "/torch/" not in frame.filename
    ]
    text = re.sub(r"\s+", " ", str(error))[:600]
    return f"{type(error).__name__}: {text} [{' < '.join(reversed(places[-3:]))}]"


def examine(entry: Entry, use: str) -> Report:
    """Make one entry stochastic and compare it with the reference."""
    begin = time.perf_counter()
    branches = entry.additions if use == "additions" else entry.drop_paths
    report = Report(entry.name, versions(entry.packages), use, branches)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _examine(entry, use, report)
        except Exception as error:
            report.outcome = "entry"
            report.messages.append(message_of(error))
    report.messages += dict.fromkeys(
        f"warning: {str(warning.message)[:300]}" for warning in caught if "stochastic_depth" in warning.filename
    )
    report.seconds = round(time.perf_counter() - begin, 1)
    return report


def _examine(entry: Entry, use: str, report: Report) -> None:
    torch.manual_seed(0)
    model, inputs = entry.make(entry.rate if use == "drop paths" else 0.0)
    inputs = [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs]
    model = quiet(model, inputs)
    if use == "additions":
        ends = matching(model, entry.ends)
    else:
        ends = [name for name, module in model.named_modules() if is_drop_path(module)]
    reference = Reference(model, ends, drop_paths=use == "drop paths")
    plain = outputs_of(reference, inputs)
    if deviation(outputs_of(reference, inputs), plain) > 0:
        raise AssertionError("the model's own code gives two outputs for one input: some noise is left on")
    if not all(leaf.isfinite().all() for leaf in plain):
        raise AssertionError("the model's own code gives NaN or infinite values")
    calls = list(reference.num_samples)
    if len(calls) != report.branches:
        raise AssertionError(f"{report.branches} branches are said, but their ends are called {len(calls)} times")
    for call in calls:
        # An end whose gate changes nothing would make every comparison pass.
        reference.gates = {call: 0.0}
        if deviation(outputs_of(reference, inputs), plain) < 1e-7:
            raise AssertionError(f"closing the branch that ends with {call} changes nothing")
    reference.gates = {}
    plain = dataclasses.replace(report)
    _compare_all(plain, reference, model, inputs, use, by_example=False)
    best = plain
    if (plain.outcome, plain.skipped, plain.missed) != ("equal", report.branches, 0):
        by_example = dataclasses.replace(report, by_example=True, others=[], messages=[])
        _compare_all(by_example, reference, model, inputs, use, by_example=True)
        best = max(plain, by_example, key=lambda each: (each.outcome == "equal", each.skipped - each.missed))
    for each in dataclasses.fields(report):
        setattr(report, each.name, getattr(best, each.name))


def _compare_all(
    report: Report, reference: Reference, model: nn.Module, inputs: list[Any], use: str, *, by_example: bool
) -> None:
    example = inputs if by_example else None
    try:
        made = {granularity: _stochastic(model, use, granularity, example) for granularity in _granularities(use)}
    except (ValueError, RuntimeError) as error:
        report.outcome, report.missed = "refused", report.branches
        report.messages.append(message_of(error))
        return
    except Exception as error:
        report.outcome, report.missed = "broken", report.branches
        report.messages.append(message_of(error))
        return
    for granularity, (stochastic, depth) in made.items():
        report.found = len(depth.names)
        comparison = Comparison(report, reference, stochastic, depth, model, inputs)
        try:
            comparison.match(use)
            comparison.compare(use, granularity)
        except Exception as error:
            report.outcome = "crash"
            report.missed = max(report.missed, report.branches - report.found)
            report.messages.append(f"{granularity}: {message_of(error)}")
        report.masked = max(report.masked, len(depth.masked))  # Calls have shown it.
        report.skipped = report.found - report.masked
        report.messages += [f"{name}: masked, {cause}" for name, cause in depth.masked[:1]]
        try:
            report.verify = report.verify or _short(str(depth.verify(*fresh(inputs))))
        except Exception as error:
            report.verify = f"{type(error).__name__}: {_short(str(error))}"
    if not report.outcome:
        deviations = (report.output_deviation, report.gradient_deviation, report.evaluation_deviation)
        too_far = any(each is not None and not each <= TOLERANCE for each in deviations)
        report.outcome = "deviates" if too_far or report.missing_zero_grads else "equal"
        if report.others and report.outcome == "equal":
            report.outcome = "unclear"
    report.messages = list(dict.fromkeys(report.messages))


def _granularities(use: str) -> tuple[str, ...]:
    return ("batch",) if use == "additions" else ("sample", "batch")


def _stochastic(
    model: nn.Module, use: str, granularity: str, example: list[Any] | None, rescale: Any = None
) -> tuple[nn.Module, sd.Controller]:
    stochastic = copy.deepcopy(model)
    found_by = {} if example is None else {"inputs": fresh(example)}
    if use == "additions":
        depth = sd.make_stochastic_(
            stochastic, sd.uniform(0.5), granularity="batch", rescale=rescale or "none", skipped_grad="zero", **found_by
        )
    else:
        depth = sd.make_stochastic_(stochastic, granularity=granularity, **found_by)
    return stochastic, depth


def _short(text: str) -> str:
    return re.sub(r"\s+", " ", text)[:400]


@dataclasses.dataclass
class Comparison:
    """A stochastic model beside the reference, with what its gates stand for.

    Attributes:
        stands_for: for each of the library's gates the calls of the reference that it closes.
    """

    report: Report
    reference: Reference
    stochastic: nn.Module
    depth: sd.Controller
    model: nn.Module
    inputs: list[Any]
    stands_for: dict[int, tuple[Call, ...]] = dataclasses.field(default_factory=dict)

    def match(self, use: str) -> None:
        """Find out which calls of the reference each gate of the library closes."""
        calls = list(self.reference.num_samples)
        by_module: dict[str, list[Call]] = {}
        for call in calls:
            by_module.setdefault(call[0], []).append(call)
        if use == "drop paths":
            self._match_names(by_module)
        else:
            self._match_outputs([(call,) for call in calls] + [tuple(c) for c in by_module.values() if len(c) > 1])
        matched = {call for stands_for in self.stands_for.values() for call in stands_for}
        # A module used twice has one gate by promise; two modules with one gate are one branch missed.
        together = sum(len({name for name, _ in stands_for}) - 1 for stands_for in self.stands_for.values())
        self.report.missed = max(self.report.missed, len(calls) - len(matched) + together)
        if self.depth.masked and use == "drop paths":
            # One gate for several uses of a drop path: each use beyond the first is a branch without a gate of its own.
            self.report.missed = max(self.report.missed, len(calls) - len(self.stands_for))

    def _match_names(self, by_module: Mapping[str, list[Call]]) -> None:
        names = self.depth.names
        uses = collections.Counter(name.partition("#")[0] for name in names)
        for index, name in enumerate(names):
            module, _, number = name.partition("#")
            calls = by_module.get(module, [])
            if number:
                calls = [call for call in calls if call[1] % uses[module] == int(number) - 1]
            if calls:
                self.stands_for[index] = tuple(calls)
            else:
                self.report.others.append(name)

    def _match_outputs(self, candidates: Sequence[tuple[Call, ...]]) -> None:
        closed: dict[tuple[Call, ...], list[Tensor]] = {}
        for candidate in candidates:
            self.reference.gates = dict.fromkeys(candidate, 0.0)
            closed[candidate] = outputs_of(self.reference, self.inputs)
        self.reference.gates = {}
        for index, name in enumerate(self.depth.names):
            gates = [other != index for other in range(len(self.depth.names))]
            with self.depth.gates(gates):
                ours = outputs_of(self.stochastic, self.inputs)
            distance = {candidate: deviation(ours, theirs) for candidate, theirs in closed.items()}
            nearest = min(distance, key=distance.__getitem__)
            if distance[nearest] > TOLERANCE:
                nearest = self._pair(ours) or nearest
            if distance.get(nearest, 0.0) <= TOLERANCE:
                self.stands_for[index] = nearest
            else:
                self.report.others.append(f"{name} (nearest {nearest[0][0]}, {distance[nearest]:.1e} away)")

    def _pair(self, ours: Sequence[Tensor]) -> tuple[Call, ...] | None:
        """Two branches in sequence that one gate closes together: one of them is missed."""
        calls = list(self.reference.num_samples)
        for pair in itertools.pairwise(calls):
            self.reference.gates = dict.fromkeys(pair, 0.0)
            equal = deviation(ours, outputs_of(self.reference, self.inputs)) <= TOLERANCE
            self.reference.gates = {}
            if equal:
                self.report.messages.append(f"one gate for {pair[0][0]} and {pair[1][0]}")
                return pair
        return None

    def compare(self, use: str, granularity: str) -> None:
        """Outputs and gradients under several patterns of gates, an ordinary step, and evaluation."""
        generator = torch.Generator().manual_seed(3)
        num = len(self.depth.names)
        for pattern in ("open", "closed", "some", "others"):
            gates: list[bool | Tensor] = [True] * num
            for index, calls in self.stands_for.items():
                if pattern in ("some", "others"):
                    size = self.reference.num_samples[calls[0]]
                    draw = torch.rand(size, generator=generator) < 0.5
                    gates[index] = draw if granularity == "sample" else bool(draw[0])
                elif pattern == "closed":
                    gates[index] = False
            self._compare_under(gates, use, pattern)
        # A step with gates that the library draws: nothing may crash.
        self.stochastic.zero_grad(set_to_none=True)
        gradients_of(self.stochastic, self.stochastic, self.inputs)
        self._compare_evaluation(use, granularity)

    def _compare_under(self, gates: list[bool | Tensor], use: str, pattern: str) -> None:
        self.reference.gates = {}
        for index, calls in self.stands_for.items():
            gate = gates[index]
            for call in calls:
                open_by = survivor(self.model.get_submodule(call[0])) if use == "drop paths" else 1.0
                self.reference.gates[call] = (gate.double() if isinstance(gate, Tensor) else float(gate)) * open_by
        with self.depth.gates(gates):
            ours, our_gradients = gradients_of(self.stochastic, self.stochastic, self.inputs)
        absent = [index for index, leaf in enumerate(ours) if leaf is ABSENT]
        theirs, their_gradients = gradients_of(self.reference, self.reference.model, self.inputs, absent)
        self._note("output_deviation", deviation(ours, theirs), pattern)
        far, missing = gradient_deviation(our_gradients, their_gradients)
        self._note("gradient_deviation", far, pattern)
        self.report.missing_zero_grads = max(self.report.missing_zero_grads, missing)
        if pattern == "open":
            equal = len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
            self.report.open_is_bit_equal = equal and self.report.open_is_bit_equal is not False

    def _compare_evaluation(self, use: str, granularity: str) -> None:
        stochastic, depth = self.stochastic, self.depth
        if use == "additions":
            stochastic, depth = _stochastic(
                self.model, use, granularity, self.inputs if self.report.by_example else None, rescale="eval"
            )
        factor = {call: 0.5 for calls in self.stands_for.values() for call in calls}
        unknown = set(range(len(depth.names))) - set(self.stands_for)
        self.reference.gates = factor if use == "additions" else {}
        if use == "additions" and unknown:
            depth.set_survival_probs([1.0 if i in unknown else 0.5 for i in range(len(depth.names))])
        self.reference.model.eval()
        stochastic.eval()
        try:
            theirs, ours = outputs_of(self.reference, self.inputs), outputs_of(stochastic, self.inputs)
            self._note("evaluation_deviation", deviation(ours, theirs), "evaluation")
        finally:
            for model in (self.reference.model, stochastic):
                settle(model.train() or model)

    def _note(self, field: str, value: float, pattern: str) -> None:
        before = getattr(self.report, field)
        setattr(self.report, field, value if before is None else max(before, value))
        if not value <= TOLERANCE:
            self.report.messages.append(f"{field.replace('_', ' ')} {value:.1e} with gates {pattern}")


# --- The driver ------------------------------------------------------------------------------------------------------


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the packages; those that are missing are left out."""
    found: dict[str, str] = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def uses_of(entry: Entry) -> Iterator[str]:
    """The uses that an entry has branches for."""
    if entry.drop_paths:
        yield "drop paths"
    if entry.additions:
        yield "additions"


def in_a_process(entry: Entry, use: str, time_limit: float) -> Report:
    """The report of an entry, whatever happens to its process, which starts with what is imported here."""
    begin = time.perf_counter()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(entry, use, sender))
    process.start()
    sender.close()
    lost = Report(
        entry.name, versions(entry.packages), use, entry.additions if use == "additions" else entry.drop_paths
    )
    try:
        if receiver.poll(time_limit):
            return receiver.recv()
        lost.outcome = "time limit"
        lost.messages.append(f"not done after {time_limit:g} s")
    except EOFError:
        process.join()
        lost.outcome = "crash"
        lost.messages.append(f"the process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
    lost.missed = lost.branches
    lost.seconds = round(time.perf_counter() - begin, 1)
    return lost


def _report(entry: Entry, use: str, sender: Connection) -> None:
    os.dup2(2, 1)  # What packages print is not part of the table.
    # numba imports a package called coverage, which is not the script beside this one.
    here = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]
    sender.send(examine(entry, use))


HEADER = (
    "code base", "use", "branches", "found", "skipped", "masked", "missed", "outcome", "output", "gradient",
    "evaluation", "verify",
)  # fmt: skip


def row(report: Report) -> tuple[str, ...]:
    """A line of the table."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.0e}" if value else "0"

    outcome = report.outcome + (" (inputs=)" if report.by_example else "")
    verdict = "" if not report.verify else "passes" if re.match(r"\d", report.verify) else "raises"
    return (
        report.entry, report.use, str(report.branches), str(report.found), str(report.skipped), str(report.masked),
        str(report.missed), outcome, number(report.output_deviation), number(report.gradient_deviation),
        number(report.evaluation_deviation), verdict,
    )  # fmt: skip


def summary(reports: Sequence[Report]) -> str:
    """The totals, in two sentences."""
    branches = sum(report.branches for report in reports)
    right = [report for report in reports if report.outcome == "equal"]
    skipped = sum(max(0, min(report.skipped, report.branches - report.missed)) for report in right)
    code_bases = len({package for report in reports for package in list(report.packages)[:1]})
    outcomes = collections.Counter(report.outcome for report in reports)
    silent = [
        report.entry
        for report in reports
        if report.outcome in ("deviates", "unclear") and re.match(r"\d", report.verify)
    ]
    text = (
        f"{len({report.entry for report in reports})} entries of {code_bases} packages, {branches} branches: "
        f"{skipped} ({skipped / max(branches, 1):.1%}) are skipped in entries that equal their own code. "
        f"Outcomes: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.most_common())}."
    )
    return text + (f" Deviates or is unclear although verify passes: {', '.join(silent)}." if silent else "")


def markdown(reports: Sequence[Report], missing: Mapping[str, Sequence[str]]) -> str:
    """The table, the messages, and where it was measured."""
    lines = [
        "## Public model code under the same gates",
        "",
        f"`python {shlex.join(sys.argv)}`",
        "",
        summary(reports),
        "",
    ]
    lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(row(report)) + " |" for report in reports]
    lines += ["", "What was not skipped, or not equal:", ""]
    for report in reports:
        told = [*report.messages]
        if report.others:
            told.append("closes none of the counted branches, or not it alone: " + ", ".join(report.others[:6]))
        if report.missing_zero_grads:
            told.append(f"{report.missing_zero_grads} parameters lack the gradient of zero that a mask gives")
        if report.verify and not re.match(r"\d", report.verify):
            told.append(f"verify: {report.verify}")
        if told:
            lines.append(f"- **{report.entry}**, {report.use}: " + "; ".join(text.replace("|", "\\|") for text in told))
    if missing:
        lines += ["", "Not installed, skipped: " + "; ".join(f"{n} ({', '.join(p)})" for n, p in missing.items()) + "."]
    packages = {name: version for report in reports for name, version in report.packages.items()}
    lines += [
        "",
        "Deviations are relative to the largest value of the model's own code, in float64. Versions: "
        + ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))
        + f". {processor()}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}.",
    ]
    return "\n".join(lines) + "\n"


def write(out: Path, reports: Sequence[Report], missing: Mapping[str, Sequence[str]]) -> None:
    """Write the table as OUT.md and all that was found as OUT.json."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(markdown(reports, missing))
    content = {
        "command": f"python {shlex.join(sys.argv)}",
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "missing": missing,
        "reports": [dataclasses.asdict(report) for report in reports],
    }
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def kept_reports(out: Path) -> dict[tuple[str, str], Report]:
    """What OUT.json holds, but for entries that were at fault themselves or ran into the time limit."""
    if not out.with_suffix(".json").exists():
        return {}
    reports = [Report(**each) for each in json.loads(out.with_suffix(".json").read_text())["reports"]]
    return {(each.entry, each.use): each for each in reports if each.outcome not in ("entry", "time limit")}


def main() -> None:
    """Run the entries and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run the entries whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="list the entries")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json and FILE.md")
    parser.add_argument("--keep", action="store_true", help="run only what FILE.json does not hold yet")
    parser.add_argument("--time-limit", type=float, default=300, metavar="SECONDS", help="per entry (300)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [e for e in ENTRIES.values() if not options.only or any(part in e.name for part in options.only)]
    if not chosen:
        parser.error(f"no entry contains {' or '.join(options.only)}; --list lists them")
    missing = {
        entry.name: sorted(set(entry.packages) - set(versions(entry.packages)))
        for entry in chosen
        if set(entry.packages) - set(versions(entry.packages))
    }
    if options.keep and not options.out:
        parser.error("--keep needs --out")
    if options.list:
        for entry in chosen:
            state = f"  (needs {', '.join(missing[entry.name])})" if entry.name in missing else ""
            print(f"{entry.name}: {entry.drop_paths} drop paths, {entry.additions} additions{state}")
        return
    work = [(entry, use) for entry in chosen if entry.name not in missing for use in uses_of(entry)]
    reports: list[Report] = []
    for package, module in SLOW_IMPORTS.items():
        if any(package in entry.packages for entry, _ in work):
            importlib.import_module(module)
    kept = kept_reports(options.out) if options.keep else {}
    for entry, use in work:
        report = kept.get((entry.name, use)) or in_a_process(entry, use, options.time_limit)
        reports.append(report)
        print(" | ".join(row(report)), file=sys.stderr, flush=True)
        if report.outcome == "entry":
            print("   ", *report.messages, sep="\n    ", file=sys.stderr, flush=True)
        if options.out:
            write(options.out, reports, missing)
    print(markdown(reports, missing))


if __name__ == "__main__":
    main()
