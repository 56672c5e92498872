"""What is known of the forms of a model's block calls: the code that was prepared for each, and what was proven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stochastic_depth.retrofit.rewriting.generated_code import Code
from stochastic_depth.retrofit.rewriting.rewrite import GatedUse
from stochastic_depth.retrofit.rewriting.sums import Key

# Number of forms of a call that are kept.
MAX_FORMS = 128
# With how many samples, at most, it is proven what runs on some of them: what mixes samples may need many.
MAX_SAMPLES = 64


@dataclass
class Prepared:
    """The prepared code of one form of a block's call.

    Attributes:
        code: the rewritten code; None where the block's own code runs, with masks.
        masked: the branches that are computed and masked, each with the cause.
        stores: plain numbers that the block's own code sets on the block.
        uses: places of the gated branches in the block's own code.
        ungated: for each addition that was not found before the call, what it uses.
        recorded: recording of the block's own code on a few samples, and the rows of the arguments that these are.
        of_subset: the number of samples that it was proven with for some of them, and their rows of the arguments.
        is_of_any_size: whether it holds for arguments of other sizes too, as the code asks for none.
        num_blocks: number of blocks that share it; they take turns in recording their code again.
        refusal: why the form is refused, if the code has changed since.
    """

    code: Code | None
    masked: dict[Key, str]
    stores: dict[str, Any] = field(default_factory=dict[str, Any])
    uses: tuple[GatedUse, ...] = ()
    ungated: tuple[str, ...] = ()
    recorded: tuple[Any, Mapping[int, Tensor]] | None = None
    of_subset: tuple[int, Mapping[int, Tensor]] | None = None
    is_of_any_size: bool = False
    num_blocks: int = 0
    refusal: str = ""


@dataclass
class Form:
    """A form of a block's call, with its number of calls.

    Attributes:
        prepared: the code.
        number: which of the blocks that share the code it is.
        num_calls: number of calls so far.
    """

    prepared: Prepared
    number: int
    num_calls: int = 0

    def is_its_turn(self) -> bool:
        """Whether the block records its code again in this call: the calls 2, 4, 8, … of each block in turn."""
        turn = self.num_calls.bit_length() - 2
        is_power = not self.num_calls & (self.num_calls - 1)
        return is_power and turn >= 0 and turn % self.prepared.num_blocks == self.number


class KnownForms:
    """The known forms of calls of all blocks of a model; equal blocks share them."""

    def __init__(self) -> None:
        self.prepared: dict[Any, Prepared] = {}
        self.proven: dict[Any, int] = {}
        """Proven code, without its numbers, as one that changes in every step needs no new proof; and the number of
        samples that it was proven with for some of them, 0 where that cannot be."""
        self.num_runs = 0
        """Number of runs of blocks for recordings and proofs."""
        self.warned: set[Any] = set()
        self.called: set[type] = set()
        """Classes of arguments whose methods blocks call, such as a cache."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> KnownForms:
        return KnownForms()

    def remember(self, key: Any, prepared: Prepared) -> None:
        """Keep the prepared code of a form, and drop the oldest if there are too many."""
        self.prepared[key] = prepared
        if len(self.prepared) > MAX_FORMS:
            del self.prepared[next(iter(self.prepared))]
