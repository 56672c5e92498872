"""The root of a stochastic model: each call of it is one pass, from its first hook to its last."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import nn

from stochastic_depth.compiling import graph_break
from stochastic_depth.retrofit.controller import Controller

_RESERVED = "_stochastic_depth_pass"


def _plain_call(root: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return nn.Module.__call__(root, *args, **kwargs)


class StochasticRoot(nn.Module):
    """Behavior of the module that `make_stochastic_` was called with.

    The call is the pass, not `forward`, because users and accelerate replace `forward` on the instance.
    """

    _stochastic_depth: Controller

    @partial(graph_break, recursive=False, exported=_plain_call)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the plain module; all calls inside belong to one pass."""
        if not isinstance(self, StochasticRoot):  # restored; someone, such as torch.compile, has kept this method
            return type(self).__call__(self, *args, **kwargs)
        scope = self._stochastic_depth.scope(self.training, self.__dict__.pop(_RESERVED, None))
        if scope is None:
            return super().__call__(*args, **kwargs)
        try:
            scope.enter()
            output = super().__call__(*args, **kwargs)
        finally:
            scope.leave()
        self._stochastic_depth.calls.note(self, args, kwargs)
        if self.training and self._stochastic_depth.passes.first_reached is not None:
            self._stochastic_depth.check_first_pass()
        return output

    def _replicate_for_data_parallel(self) -> nn.Module:
        """A replica for DataParallel, which calls it once in a thread that does not see the gates forced here."""
        replica = cast(nn.Module, super()._replicate_for_data_parallel())  # pyright: ignore
        gates = self._stochastic_depth.passes.reserve(self.training)
        if gates is not None:
            replica.__dict__[_RESERVED] = gates
        return replica
