"""The page `/slo` of a real server with an API key, in a real Chromium; pictures of it at two widths, light and dark.

    scripts/run.sh -- benchmark/field/page.py

Needs `chromium` on PATH (`apt-get install chromium`). Ends with status 1 if the key is not asked for once and kept, or if
something runs out of the page.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from field.tools import python_of
from servers import end_cleanly, server

KEY = "a key of the exercise"
SETTINGS = """classes:
  chat: {ttft_ms: 60000, tbt_ms: 20000}
  read: {ttft_ms: 60000, tbt_ms: 5000, pace: true}
  hopeless: {ttft_ms: 0.001, tbt_ms: 0.001}
default_class: chat
"""


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/page"), help="folder for pictures and logs")
    folder = parser.parse_args().out.resolve()
    end_cleanly()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "slo.yaml").write_text(SETTINGS)
    flags = ["--api-key", KEY, "--sleep-on-idle", "--slo-config", str(folder / "slo.yaml")]
    with server("slo", flags, folder / "server.log") as url:
        for name in ("chat", "read", "hopeless", "chat"):
            body: dict[str, Any] = {
                "text": "Hello",
                "sampling_params": {"max_new_tokens": 12},
                "slo": {"class": name},
            }
            answer = requests.post(
                url + "/generate", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=120
            )
            answer.raise_for_status()
        look = Path(__file__).with_name("in_browser.py")
        return subprocess.run([python_of("browser"), look, url, KEY, folder], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
