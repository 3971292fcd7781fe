"""Every block of code in README, CONTRIBUTING and docs does what it says: run here, or marked with the reason why not.

A block is marked by the comment on the line above it: `<!-- not run: why -->`, or `<!-- needs MODULE -->` for what only a
version with that module can do. Port 30000 stands for the shared server.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import Server
from sglang_slo import launch_server
from sglang_slo.core.slo import Slo
from sglang_slo.observe.judge import RequestRecord, judge
from sglang_slo.observe.request_log import row
from sglang_slo.settings_in import read_yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
HERE = "http://127.0.0.1:30000"
KINDS = ("bash", "python", "yaml")


@dataclass(frozen=True)
class Block:
    """A block of code. `name`: page and number, for test ids."""

    name: str
    kind: str
    text: str
    mark: str

    @property
    def runs(self) -> bool:
        return not self.mark.startswith("not run: ")

    @property
    def asks_a_server(self) -> bool:
        return HERE in self.text

    def check_needs(self) -> None:
        """Skip what this version cannot do yet."""
        if self.mark.startswith("needs "):
            pytest.importorskip(self.mark.removeprefix("needs "), reason=self.mark)


def _blocks() -> list[Block]:
    return [
        Block(f"{page.stem}-{number}", match["kind"], match["text"], match["mark"] or "")
        for page in PAGES
        for number, match in enumerate(BLOCK.finditer(page.read_text()), 1)
    ]


BLOCKS = _blocks()


def _those(kind: str, server: bool) -> Any:
    chosen = [b for b in BLOCKS if b.kind == kind and b.runs and b.asks_a_server == server]
    return pytest.mark.parametrize("block", chosen, ids=[b.name for b in chosen])


def _bash(text: str, folder: Path) -> None:
    (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    env = {**os.environ, "CURL_HOME": str(folder)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_every_block_is_run_or_says_why_not() -> None:
    fences = sum(page.read_text().count("\n```") for page in PAGES)
    assert fences == 2 * len(BLOCKS), "a block that this test does not see"
    for block in BLOCKS:
        assert block.kind in KINDS, f"{block.name}: need one of {KINDS} after ```, got {block.kind!r}"
        assert not block.mark or block.mark.startswith(("not run: ", "needs ")), f"{block.name}: {block.mark}"


def test_every_link_leads_somewhere() -> None:
    broken = [
        f"{page.name}: {link}"
        for page in PAGES
        for link in LINK.findall(page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not broken


@pytest.mark.server
@_those("bash", server=True)
def test_a_command_that_asks_a_server_is_answered(block: Block, server: Server, tmp_path: Path) -> None:
    block.check_needs()
    _bash(block.text.replace(HERE, server.url), tmp_path)


@_those("bash", server=False)
def test_a_command_ends_well(block: Block, tmp_path: Path) -> None:
    block.check_needs()
    _bash(block.text, tmp_path)


@pytest.mark.server
@_those("python", server=True)
def test_a_program_that_asks_a_server_is_answered(block: Block, server: Server) -> None:
    block.check_needs()
    exec(compile(block.text.replace(HERE, server.url), block.name, "exec"), {"__name__": block.name})


@_those("python", server=False)
def test_a_program_ends_well(block: Block) -> None:
    block.check_needs()
    exec(compile(block.text, block.name, "exec"), {"__name__": block.name})


@_those("yaml", server=False)
def test_settings_are_read(block: Block, tmp_path: Path) -> None:
    block.check_needs()
    (tmp_path / "slo.yaml").write_text(block.text)
    assert read_yaml(tmp_path / "slo.yaml")


def _flags_are_known(argv: list[str]) -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    _, rest = launch_server.read_slo_flags(argv)
    parser.parse_args(["--model-path", "m", *rest])


def test_servers_that_are_not_started_here_have_flags_that_exist() -> None:
    lines = [
        line for block in BLOCKS for line in block.text.splitlines() if line.startswith("./scripts/serve.sh")
    ]
    assert lines
    for line in lines:
        _flags_are_known(line.split("#")[0].split()[1:])


def test_the_first_example_says_what_was_promised(server: Server) -> None:
    told = server.generate("Hello", tokens=16, slo={"ttft_ms": 5000, "tbt_ms": 1000})["meta_info"]["slo"]
    assert (told["ttft_limit_ms"], told["tbt_limit_ms"]) == (5000, 1000)


def test_generated_pages_are_what_the_code_says() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "pages.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_field_of_the_request_log_has_its_line() -> None:
    record = RequestRecord("r", Slo(1.0, 1.0), text="a prompt")
    named = re.findall(r"`(\w+)`", (ROOT / "docs" / "request-log.md").read_text())
    assert set(row(record, judge(record), 0.0)) <= set(named)


def test_the_container_starts_our_server_with_files_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    deploy = ROOT / "deploy"
    dockerfile = (deploy / "Dockerfile").read_text()
    for line in dockerfile.splitlines():
        if line.startswith("COPY "):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
    entry = re.search(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)
    assert entry is not None
    command, serve, *flags = yaml.safe_load(entry[1])
    assert (command, serve) == ("sglang-slo", "serve")
    (service,) = yaml.safe_load((deploy / "compose.yaml").read_text())["services"].values()
    assert (deploy / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    mounts = dict(mount.split(":")[1::-1] for mount in service["volumes"] if mount.startswith("./"))
    here = {inside: str(deploy / outside) for inside, outside in mounts.items()}
    _flags_are_known([*flags, *(here.get(word, word) for word in service["command"])])
    assert read_yaml(deploy / "slo.yaml")["classes"]
