"""`--enable-trace` on the real server: its spans arrive at a collector and carry class, limits and verdict.

    scripts/run.sh -- benchmark/field/traced.py

OpenTelemetry comes from an environment of its own (env.sh), which the server finds behind the main one; the collector is
a few lines of HTTP here. Prints what a request's span says of its limits; ends with status 1 if none arrives.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from field.tools import python_of
from servers import end_cleanly, server

SETTINGS = "classes:\n  chat: {ttft_ms: 60000, tbt_ms: 20000}\n"
# read by every Python that starts: appends, so that the main environment's packages come first
BEHIND = "import sys\nsys.path.append({path!r})\n"
DECODE = """
import sys
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
for name in sys.argv[1:]:
    request = ExportTraceServiceRequest.FromString(open(name, "rb").read())
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                ours = {a.key: a.value for a in span.attributes if a.key.startswith("slo.")}
                if ours:
                    print(span.name)
                    for key, value in sorted(ours.items()):
                        print("   ", key, str(value).replace("\\n", " ").strip())
"""


class Collector(BaseHTTPRequestHandler):
    """Keeps what is posted in files of `folder`."""

    folder: Path
    got = 0

    def do_POST(self) -> None:
        """One batch of spans."""
        body = self.rfile.read(int(self.headers["content-length"]))
        type(self).got += 1
        (self.folder / f"spans-{self.got:03d}.bin").write_bytes(body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/traced"), help="folder for spans and logs")
    folder = parser.parse_args().out.resolve()
    end_cleanly()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("spans-*.bin"):
        old.unlink()
    (folder / "slo.yaml").write_text(SETTINGS)
    python = python_of("trace")
    [site] = python.parent.parent.glob("lib/python3*/site-packages")
    (folder / "sitecustomize.py").write_text(BEHIND.format(path=str(site)))
    Collector.folder = folder
    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    flags = ["--enable-trace", "--otlp-traces-endpoint", endpoint, "--sleep-on-idle"]
    flags += ["--slo-config", str(folder / "slo.yaml")]
    env = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    env["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    with server("slo", flags, folder / "server.log", env) as url:
        body: dict[str, Any] = {
            "text": "Hello",
            "sampling_params": {"max_new_tokens": 8},
            "slo": {"class": "chat"},
        }
        requests.post(url + "/generate", json=body, timeout=120).raise_for_status()
        time.sleep(3)
    spans = sorted(folder.glob("spans-*.bin"))
    said = subprocess.run([python, "-c", DECODE, *spans], capture_output=True, text=True, check=True).stdout
    print(said or f"{len(spans)} batches of spans, none with limits")
    return int("slo.attained" not in said)


if __name__ == "__main__":
    sys.exit(main())
