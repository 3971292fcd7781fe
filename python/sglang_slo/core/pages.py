"""KV in pages: SGLang gives a request whole pages of the pool (`--page-size`), so what it takes is more than it writes.

    page        |-------- 0 --------|-------- 1 --------|-------- 2 --------|
    a request   |========= written ===============|  its own, still empty   |
    the tree    |==== whole pages alone ======|

A page has one owner: a request, or the prefix tree, which keeps, finds and gives back whole pages alone. A decode takes
a page every `page` iterations and nothing in between. At page size 1 each of these is the plain number of tokens.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Tokens = TypeVar("Tokens", int, np.ndarray)


def whole(tokens: Tokens, page: int) -> Tokens:
    """Tokens of KV that so many take: up to the end of the last page."""
    return -(-tokens // page) * page


def growth(tokens: Tokens, more: Tokens | int, page: int) -> Tokens:
    """Tokens of KV that a request which has slots for `tokens` takes from the pool to write `more`; at most `whole(more)`."""
    taken: Tokens = whole(tokens + more, page) - whole(tokens, page)
    return taken


def cut(history: int, tokens: int, page: int) -> int:
    """How many of `tokens` behind `history` a piece of a prompt has: what is behind its last whole page is left to the next.

    The tree keeps whole pages, and what is behind them is computed again if the request is set aside. Where that would
    leave less than half of the piece, the next one begins inside a page, which SGLang and its kernels allow.
    """
    up_to_a_page = (history + tokens) // page * page - history
    return up_to_a_page if 2 * up_to_a_page >= tokens else tokens
