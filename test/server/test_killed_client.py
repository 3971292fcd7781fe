"""A client that is killed while its requests lie on the host: they end, and everything they held is given back."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import PATIENCE_S, STATUS_AGE_S, running

pytestmark = pytest.mark.server

# Outputs of which the pool holds one at a time: no machine is through with them before the client is killed.
POOL_TOKENS, REQUESTS, OUTPUT_TOKENS = 3000, 24, 2000
SWAPPING = ["--max-total-tokens", str(POOL_TOKENS), "--slo-preempt", "swap", "--slo-host-kv-gb", "0.05"]
# SGLang's admission with next to no reserve: too many get in, and KV runs short
SWAPPING += ["--slo-kv", "stock", "--schedule-conservativeness", "0.05", "--slo-length", "none"]
SWAPPING += ["--slo-max-preemptions", "1000"]
CLIENT = f"""
import concurrent.futures, requests, sys
def ask(i):
    params = {{"max_new_tokens": {OUTPUT_TOKENS}, "ignore_eos": True, "temperature": 0}}
    body = {{"text": f"{{i}} " + "hello " * 20, "sampling_params": params, "stream": i % 2 == 0}}
    return len(requests.post(sys.argv[1] + "/generate", json=body, timeout=600).content)
with concurrent.futures.ThreadPoolExecutor({REQUESTS}) as pool:
    list(pool.map(ask, range({REQUESTS})))
"""


def test_requests_on_the_host_end_with_the_client_that_sent_them(tmp_path: Path) -> None:
    with running(tmp_path, *SWAPPING) as server:
        client = subprocess.Popen([sys.executable, "-c", CLIENT, server.url])
        try:
            for _ in range(int(PATIENCE_S / STATUS_AGE_S * 5)):
                if server.status()["replicas"][0]["now"]["swap"]["host_used"] > 0:
                    break
                assert client.poll() is None, "the client had all its answers before anything was swapped"
                time.sleep(STATUS_AGE_S / 5)
            else:
                raise AssertionError("nothing was swapped")
        finally:
            client.send_signal(signal.SIGKILL)
            client.wait()
        server.settle()
        (replica,) = server.status()["replicas"]
        kv, swap = replica["now"]["kv"], replica["now"]["swap"]
        assert kv["free"] + kv["evictable"] == kv["capacity"] == POOL_TOKENS
        assert swap["host_used"] == 0
        totals = replica["totals"]
        assert totals["arrived"] == totals["finished"] and totals["left_in_time"] > 0
        assert replica["fallbacks"]["count"] == 0 and replica["observer_errors"] == 0
        assert server.generate("hello", 8)["meta_info"]["completion_tokens"] == 8
