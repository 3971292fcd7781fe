"""In which order the waiting are served: one policy a file, one line each in `ORDERS`; `--slo-order` names them.

Pure, like all of `core`. Always: each waiting row is in exactly one of the two lines, and whoever has no deadline to keep
is in `infeasible`, which keeps its guaranteed share of tokens whatever the policy says.
"""

from __future__ import annotations

from sglang_slo.core.orders import edf, shortest, stock
from sglang_slo.core.orders.queue import Order

ORDERS: dict[str, Order] = {
    "edf": edf.rank,
    "shortest": shortest.rank,
    "stock": stock.rank,
}
