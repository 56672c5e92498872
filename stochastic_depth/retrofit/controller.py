"""The controller of a stochastic model: its branches, forced gates, state, cost and proof."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochastic_depth.attribution import Pass, Scope
from stochastic_depth.branch_times import with_times
from stochastic_depth.compiling import eager
from stochastic_depth.cost import Cost, measure_cost
from stochastic_depth.cuda_graphs import BranchGraphs, refuse_unrecordable
from stochastic_depth.display import GateInfo, Overview, as_html, as_text, plot
from stochastic_depth.gate_draws import GateDraws, has_several_ranks
from stochastic_depth.residual import SkippedGrad
from stochastic_depth.retrofit.ddp import refuse_unsound
from stochastic_depth.retrofit.finding.branches import Branch
from stochastic_depth.retrofit.first_pass import warn_of_first_pass
from stochastic_depth.retrofit.remembered import RememberedCalls
from stochastic_depth.retrofit.running.arguments import copy_of_object
from stochastic_depth.retrofit.running.block_branches import BlockBranches
from stochastic_depth.retrofit.verify import Verification, verify
from stochastic_depth.schedules import Values, at_progress, expected_depth, to_survival_probs
from stochastic_depth.tally import metrics
from stochastic_depth.torch_private import tree_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Controller:
    """Controls the gates of a stochastic model; `make_stochastic_` returns it.

    Print it for a table of the branches, or show it in a notebook. `len(depth)` is the number of branches;
    `depth["blocks.3.drop_path1"]`, `depth[0]` and iteration return `GateInfo`s. Main attributes: `names`,
    `survival_probs`, `expected_depth`, `last_gates`. After stochastic depth is removed from the model, methods that
    change, count or run it raise RuntimeError.
    """

    def __init__(
        self,
        root: nn.Module,
        branches: Sequence[Branch],
        passes: GateDraws,
        *,
        rescale: str,
        skipped_grad: SkippedGrad,
        notes: Sequence[str] = (),
        over_time: tuple[Sequence[float], Callable[[float], float]] | None = None,
        follows_depth: bool = False,
    ) -> None:
        self._root = root
        self._branches = tuple(branches)
        self._passes = passes
        self._rescale = rescale
        self._skipped_grad: SkippedGrad = skipped_grad
        self._notes = tuple(notes)
        self._over_time = over_time
        self._follows_depth = follows_depth and len(set(passes.survival_probs)) > 1
        self._detached = False
        self._calls = RememberedCalls()
        self._cost: Cost | None = None

    @eager
    def scope(self, training: bool, gates: Pass | None) -> Scope | None:
        """The scope of a call of the root, see `GateDraws.scope`."""
        if training:
            refuse_unsound(self._passes, self._skipped_grad, [branch.parts for branch in self._branches])
        return self._passes.scope(training, gates)

    @eager
    def check_first_pass(self) -> None:
        """Warn if the first forward in training did not reach all branches, or reached them in quite another order."""
        reached, self._passes.first_reached = list(self._passes.first_reached or ()), None
        warn_of_first_pass(self._root, self._branches, reached, follows_depth=self._follows_depth)

    def detach(self) -> None:
        """Disconnect from the model. `restore_` calls it."""
        self._detached = True

    def _refuse_detached(self) -> None:
        if self._detached:
            raise RuntimeError("Stochastic depth was removed from the model: this controller has nothing to control.")

    @property
    def names(self) -> list[str]:
        """Names of the branches, in the order of `model.named_modules()`, or of the calls of the example (`inputs`)."""
        return list(self._passes.names)

    @property
    def passes(self) -> GateDraws:
        """The object that draws the gates."""
        return self._passes

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches as found by `make_stochastic_`; their modules are the model's own."""
        return self._branches

    @property
    def root(self) -> nn.Module:
        """The model that was passed to `make_stochastic_`, without wrappers."""
        return self._root

    @property
    def calls(self) -> RememberedCalls:
        """Example calls of the model: its first forward in each mode, cut to two samples if large.

        `fold_`, `convert_rescale_` and `subnetwork` check their result on one. Copies and pickles contain none.
        """
        return self._calls

    def note_rescales(self, rescales: Sequence[str]) -> None:
        """Update the rescaling that `print` shows, after `convert_rescale_`."""
        self._rescale = " or ".join(dict.fromkeys(rescales))

    @property
    def survival_probs(self) -> list[float]:
        """Survival probability of each branch, in (0, 1]."""
        return list(self._passes.survival_probs)

    @property
    def masked(self) -> list[tuple[str, str]]:
        """Names of the branches that are computed and masked because they cannot be skipped, each with the cause."""
        return [(branch.name, cause) for branch in self._branches if (cause := _cause_of_mask(branch))]

    @property
    def expected_depth(self) -> float:
        """Expected number of branches that run in a training step."""
        return expected_depth(self._passes.survival_probs)

    @property
    def last_gates(self) -> list[float] | None:
        """For each branch, the share of the samples for which it was open in the latest training pass, in 0..1.

        None before the first pass.
        """
        latest = self._passes.latest
        if latest is None:
            return None
        num_samples = 1 if self._passes.granularity == "batch" else next(reversed(latest.counts), 1)
        if num_samples == 0:
            return [0.0] * len(self._passes.names)
        return [count / num_samples for count in self._passes.draw_of(latest, num_samples)]

    def capture(self) -> BranchGraphs:
        """Replay each branch as a CUDA graph from now on, forward and backward. Graphs are recorded at the first run.

        A step then launches two graphs and a few copies per open branch, however many kernels it has, and nothing for a
        closed one. Outputs and gradients are those of the plain branch. A graph keeps its own memory, even in steps in
        which its branch is closed. Branches with several inputs, masked ones, whole layers (`layers=`), activation
        checkpoints and evaluation run without graphs. Copies and pickles have none.

        Returns:
            An object that counts recordings and replays.

        Raises:
            ValueError: if a branch is not on a GPU, or does more than a graph repeats, such as hooks.
        """
        self._refuse_detached()
        recorded = [branch for branch in self._branches if branch.kind != "layer" and branch.treatment != "mask"]
        refuse_unrecordable([branch.name for branch in recorded], [branch.parts for branch in recorded])
        self._passes.graphs = BranchGraphs(self.names)
        return self._passes.graphs

    def release(self) -> None:
        """Undo `capture`: run every branch without graphs again, and free their memory."""
        self._passes.graphs = None

    def set_survival_probs(self, survival_probs: Values) -> None:
        """Change the survival probabilities, from the next forward on. Schedules over time use it.

        Args:
            survival_probs: one per branch, in a list, a tuple, a numpy array or a tensor.

        Raises:
            ValueError: if there is not one number in (0, 1] per branch.
        """
        self._refuse_detached()
        _check_length(survival_probs, len(self.names), "survival_probs", "survival probabilities")
        self._passes.survival_probs = tuple(to_survival_probs(survival_probs))
        self._passes.end_parts()

    def set_progress(self, progress: float) -> None:
        """Set the survival probabilities to those of the schedule at this point of training.

        For schedules that change over time, such as `layerskip(0.2, over_time="exponential")`. The probabilities depend
        on the progress only, so a resumed run needs nothing else.

        Args:
            progress: completed share of the training, in [0, 1]: step / (num_steps - 1), with steps counted from 0.

        Raises:
            TypeError: if it is not a number.
            ValueError: if it is not in [0, 1], or the schedule does not change over time.
        """
        if self._over_time is None:
            raise ValueError(
                "The schedule does not change over time. Pass one that does to make_stochastic_, such as "
                "layerskip(0.2, over_time='exponential'), or use set_survival_probs."
            )
        survival_probs, over_time = self._over_time
        self.set_survival_probs(at_progress(survival_probs, over_time, progress))

    def set_costs(self, costs: Cost | Sequence[float] | None) -> None:
        """Set the costs of the branches for `draw="equal_cost"`, from the next forward on.

        The cost of every step, and with `ranks="decorrelate"` of every rank, then stays within one largest branch of
        its expectation. Without costs, all branches count the same. All ranks need the same costs. Counted costs
        (`depth.set_costs(depth.cost(x))`) are the same everywhere; measured times (`depth.cost(x, measure=True)`) are
        not. Costs become part of `state_dict`.

        Args:
            costs: the result of `cost`, of which measured times are used, else training FLOPs; or one positive number
                per branch, in any unit; or None for equal costs.

        Raises:
            ValueError: if there is not one positive finite number per branch, or if times were measured and this
                process is one of several.
        """
        self._refuse_detached()
        if isinstance(costs, Cost):
            if costs.total.time_s is not None and has_several_ranks():
                raise ValueError(
                    "All ranks need the same costs, but measured times differ between ranks. Send those "
                    "of one rank to all (torch.distributed.broadcast_object_list) as a list: "
                    "[branch.time_s for branch in cost.branches]."
                )
            # A branch without FLOPs (a bare normalization) costs almost nothing, but must not cost 0.
            costs = [
                max(branch.training_flops, 1) if branch.time_s is None else max(branch.time_s, 1e-9)
                for branch in costs.branches
            ]
        if costs is not None:
            _check_length(costs, len(self.names), "costs", "costs")
            for name, cost in zip(self.names, costs, strict=True):
                if not isinstance(cost, (int, float)) or not 0 < cost < float("inf"):
                    raise ValueError(f"costs must be positive numbers, but that of {name} is {cost!r}.")
            costs = tuple(float(cost) for cost in costs)
        self._passes.costs = costs
        self._passes.end_parts()

    @contextmanager
    def gates(self, gates: Sequence[bool | Tensor]) -> Generator[None]:
        """Context that forces one subnetwork: open branches run, closed ones do not, in training and in evaluation.

        The training rule applies in both modes: an open branch has factor 1 (`rescale` "eval" or "none") or 1/p
        ("train"). Nothing is drawn, and the counter does not change.

        It applies to the thread or asyncio task that enters it, to DataParallel replicas made inside it, and to
        recomputations of activation checkpoints. Other threads are not affected.

        Args:
            gates: one entry per branch; with granularity "sample" an entry may be a bool tensor (N,).

        Raises:
            ValueError: if there is not one entry per branch.
            TypeError: if an entry is neither a bool nor, with granularity "sample", a bool tensor (N,).
        """
        self._refuse_detached()
        _check_length(gates, len(self.names), "gates", "gates")
        forced = tuple(self._checked_gate(index, gate) for index, gate in enumerate(gates))
        before = self._passes.forced_here
        try:
            self._passes.forced = forced
            yield
        finally:
            self._passes.forced = before

    def _checked_gate(self, index: int, gate: bool | Tensor) -> bool | Tensor:
        if isinstance(gate, bool):
            return gate
        name = self.names[index]
        if not isinstance(gate, Tensor):
            raise TypeError(f"gates[{index}] ({name}) must be True or False, but is {gate!r}.")
        if self._passes.granularity == "batch":
            raise TypeError(
                f"gates[{index}] ({name}) is a tensor, but with granularity 'batch' a gate is True or False: "
                "one for the whole mini-batch."
            )
        if gate.dtype != torch.bool or gate.dim() != 1:
            raise TypeError(
                f"gates[{index}] ({name}) must be a bool tensor (N,), but is {gate.dtype} of shape {tuple(gate.shape)}."
            )
        return gate.detach().clone().cpu()

    def state_dict(self) -> dict[str, Any]:
        """Names, survival probabilities, costs, seed and counter, with which a resumed run draws the same gates."""
        return {
            "names": self.names,
            "survival_probs": self.survival_probs,
            "costs": None if self._passes.costs is None else list(self._passes.costs),
            "seed": self._passes.seed,
            "counter": self._passes.counter,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where `state_dict` was called.

        Raises:
            ValueError: if the state does not belong to a model with the same branches; nothing changes then.
        """
        expected = set(self.state_dict())
        if not isinstance(state, Mapping) or set(state) != expected:
            given = f"has {sorted(map(str, state))}" if isinstance(state, Mapping) else f"is {state!r}"
            raise ValueError(f"The state must have the entries {sorted(expected)}, but {given}.")
        if not isinstance(state["names"], (list, tuple)):
            raise ValueError(f"The state's names must be a list of branch names, but is {state['names']!r}.")
        if list(state["names"]) != self.names:
            raise ValueError(
                f"The state belongs to a model with {len(state['names'])} branches, this one has {len(self.names)}; "
                f"the first names that differ: {_first_difference(list(state['names']), self.names)}."
            )
        for name in ("seed", "counter"):
            if isinstance(state[name], bool) or not isinstance(state[name], int):
                raise ValueError(f"The state's {name} must be a whole number, but is {state[name]!r}.")
        if state["counter"] < 0:
            raise ValueError(f"The state's counter must be at least 0, but is {state['counter']}.")
        before = self._passes.costs
        try:
            self.set_costs(state["costs"])
            self.set_survival_probs(state["survival_probs"])
        except (TypeError, ValueError) as error:
            self._passes.costs = before
            raise ValueError(f"The state cannot be loaded: {error}") from None
        self._passes.seed = state["seed"]
        self._passes.counter = state["counter"]
        self._passes.end_parts()

    def cost(self, *inputs: Any, measure: bool = False) -> Cost:
        """Count what the schedule saves on one forward and backward with every branch open. Nothing changes.

        From then on `print`, the table in notebooks and `metrics` include the share of the training FLOPs.

        Args:
            *inputs: arguments of a forward. Counted shares depend on their shapes only, and hardly on the batch size.
            measure: also measure how long each branch takes, in a few more steps. Times depend on the machine and the
                batch size: pass a batch as in training.
        """
        self._refuse_detached()
        cost = measure_cost(self._root, self._passes, [branch.parts for branch in self._branches], inputs)
        self._cost = with_times(cost, self._root, self._passes, inputs) if measure else cost
        return self._cost

    def verify(self, *inputs: Any, **named: Any) -> Verification:
        """Run an example and prove that the model computes what its own code computes under masks.

        Compares outputs and gradients of parameters, in training and in evaluation, under several patterns of gates.
        Also checks that each branch follows its own gate and runs nothing when closed, that its parameters then get the
        promised gradients, and that evaluation is repeatable. During the check, dropout is off and BatchNorm uses its
        running statistics.

        Args:
            *inputs: arguments of a forward.
            **named: arguments by name.

        Returns:
            The findings; print them.

        Raises:
            RuntimeError: if a check fails; the message names the branches.
        """
        self._refuse_detached()

        def call() -> Any:
            args, kwargs = tree_map(copy_of_object, (inputs, named))  # A cache would grow with every run.
            return self._root(*args, **kwargs)

        return verify(self._root, self._passes, self._branches, call, _cause_of_mask, self._skipped_grad)

    # -------------------------------------------------------------------------------------- looking

    def __len__(self) -> int:
        """Number of branches."""
        return len(self._branches)

    def __iter__(self) -> Iterator[GateInfo]:
        """The gates, in the order of `names`."""
        frequencies = self._passes.tally.count.frequencies or [None] * len(self)
        for branch, survival_prob, frequency in zip(self._branches, self.survival_probs, frequencies, strict=True):
            cause = _cause_of_mask(branch)
            treatment = "mask" if cause else self._treatment(branch, survival_prob)
            yield GateInfo(branch.name, survival_prob, treatment, cause, frequency)

    def __getitem__(self, key: str | int) -> GateInfo:
        """The gate of a branch, by name or by position.

        Raises:
            KeyError: if no branch has this name.
            IndexError: if there are fewer branches.
        """
        if isinstance(key, str) and key not in self._passes.names:
            close = difflib.get_close_matches(key, self._passes.names, n=1)
            raise KeyError(f"No branch is called {key!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
        return list(self)[self._passes.names.index(key) if isinstance(key, str) else key]

    def __contains__(self, name: object) -> bool:
        return name in self._passes.names

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if not name.startswith("_") and name not in _INTERNAL]

    def metrics(self) -> dict[str, float]:
        """Scalars for TensorBoard, W&B or MLflow: how often gates were open since the last call.

        Counts draws only: forwards of this process in training mode, without forced gates. All keys start with
        `stochastic_depth/`.

        - `expected_depth`: sum of the survival probabilities.
        - `realized_depth`: mean number of branches that ran.
        - `cost_share`: share of the training FLOPs of constant depth at these frequencies, if `cost` was called before.
        - `frequency/NAME`: for each branch, the mean share of the samples for which its gate was open. In NAME,
          `#2` is `/2` and `()` is `/function`, because MLflow does not allow the former.

        Without a draw since the last call, only the expected depth is returned.
        """
        return metrics(
            self._passes.tally.since_last_call(), self.names, self.expected_depth, self._cost and self._cost.share
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot survival probabilities, and how often each gate was open in this process.

        Args:
            ax: matplotlib axes to draw in; None makes a new figure.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        return plot(self._overview(), ax)

    def _overview(self) -> Overview:
        blocks = {own.name: own for branch in self._branches if (own := _block_of(branch))}
        late = [
            f"{name or 'the model'} also adds the output of {used}, which was not found before: it has no gate and "
            "always runs"
            for name, own in blocks.items()
            for used in own.ungated
        ]
        flops_share = self._cost and self._cost.share(self.survival_probs)
        settings = {
            "granularity": self._passes.granularity,
            "rescale": self._rescale,
            "skipped_grad": self._skipped_grad,
            "draw": self._passes.draw,
            "ranks": self._passes.ranks,
            "seed": self._passes.seed,
        }
        num_draws = self._passes.tally.count.num_draws
        remarks: list[str] = []
        if self._over_time is not None:
            full = expected_depth(self._over_time[0])
            remarks.append(f"over time: set_progress lowers the expected depth to {full:.2f} at full strength")
        notes = [*self._notes, *late]
        return Overview(list(self), self.expected_depth, flops_share, settings, notes, num_draws, remarks)

    def _treatment(self, branch: Branch, survival_prob: float) -> str:
        if survival_prob == 1:
            return "always runs"
        how = "skip" if self._passes.granularity == "batch" else "subset"
        return f"{how}, with its {len(branch.drop_paths)} drop paths" if branch.drop_paths else how

    def __str__(self) -> str:
        return as_text(self._overview())

    def _repr_html_(self) -> str:
        return as_html(self._overview())

    def __repr__(self) -> str:
        return f"<Controller of {len(self.names)} branches, expected depth {self.expected_depth:.2f}>"


_INTERNAL = {"branches", "calls", "check_first_pass", "detach", "note_rescales", "passes", "root", "scope"}
"""Names without an underscore that are for the library's other modules, not for users."""


def _cause_of_mask(branch: Branch) -> str:
    """Why a branch is masked, from the calls of its block so far; before the first call, from its code."""
    own = _block_of(branch)
    return branch.cause if own is None or branch.key is None or not own.was_called else own.cause_of_mask(branch.key)


def _block_of(branch: Branch) -> BlockBranches | None:
    own: Any = branch.module.__dict__.get("_stochastic_depth_branch")
    return own if isinstance(own, BlockBranches) else None


def _check_length(values: Any, num_branches: int, name: str, what: str) -> None:
    if not hasattr(values, "__len__"):
        raise TypeError(f"{name} must have one entry per branch, {num_branches} in all, but is {values!r}.")
    if len(values) != num_branches:
        raise ValueError(
            f"{name} must have one entry per branch, {num_branches} in all, but {len(values)} {what} were given."
        )


def _first_difference(theirs: list[str], ours: list[str]) -> str:
    for their, our in zip(theirs, ours, strict=False):
        if their != our:
            return f"{their!r} and {our!r}"
    shorter = min(len(theirs), len(ours))
    return repr((theirs + ours)[shorter] if len(theirs) > shorter else ours[shorter])
