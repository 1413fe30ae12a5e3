"""The processes of torchrun share the work of a command, or the first one does it alone.

Work is shared by number: of n processes, process r takes the items r, r + n, r + 2 n, …. The items
are whole batches where a network is called, because the size of a batch may change a pixel by one
of its 256 levels. So the files are those of a single process, byte for byte.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator

Items = TypeVar("Items", bound=Sequence[Any])

# What torchrun sets for each process, and Accelerate and PyTorch read.
VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def is_first_process() -> bool:
    """Whether this is the only process, or the first one of torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def work_alone() -> None:
    """Go on as a single process: the others of torchrun end here, with status 0."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return
    if not is_first_process():
        sys.exit(0)
    print(f"note: this command is not shared: the first of the {count} processes works alone")
    for name in VARIABLES:
        os.environ.pop(name, None)


def my_share(items: Items, accelerator: Accelerator | None) -> Items:
    """The items of this process: every n-th one. All of them without an accelerator."""
    if accelerator is None:
        return items
    share: Any = items[accelerator.process_index :: accelerator.num_processes]
    return share


def gather_shares(mine: Sequence[Any], accelerator: Accelerator | None) -> list[Any]:
    """What all processes made of their shares, in the order of the items, in each process.

    All processes must call it. Tensors must be on the CPU.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return list(mine)
    from accelerate.utils import gather_object

    # One share of each process.
    shares = gather_object([list(mine)])
    results: list[Any] = [None] * sum(len(share) for share in shares)
    for number, share in enumerate(shares):
        results[number :: len(shares)] = share
    return results
