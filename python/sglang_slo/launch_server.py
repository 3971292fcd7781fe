"""The front door: `python -m sglang_slo.launch_server`, SGLang's server with deadlines.

Takes every flag of `sglang.launch_server` and the `--slo-*` flags. Without `--model-path` it serves the
embedded demo model. It only prepares settings and environment; SGLang itself starts the server, and lets
our scheduler and our HTTP layer in through its plugin hooks (plugin.py).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from sglang_slo import settings_in
from sglang_slo.config import ConfigError, SloConfig
from sglang_slo.core.slo import LIMITS_MS, SloClass
from sglang_slo.runtime.sglang import supported
from sglang_slo.runtime.sglang.settings import bound_ranks, resolved

PROG = "python -m sglang_slo.launch_server"
DEMO_KV_TOKENS = 65536  # the demo model's KV would else take most of the memory of a small machine


def main(argv: Sequence[str] | None = None) -> None:
    """Start a server with the flags in `argv` (default: the command line) and serve until it is stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        return _help()
    config, rest = read_slo_flags(argv)
    _check_installed()
    config.to_env()

    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    argv = with_defaults(rest)
    server_args = prepare_server_args(argv)
    say_how_it_runs(server_args, config, given_flags(argv))
    bind_cpus(server_args)

    from sglang.launch_server import run_server

    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def read_slo_flags(argv: Sequence[str]) -> tuple[SloConfig, list[str]]:
    """Our settings, and SGLang's flags. Ends the process with a message if a setting is unusable."""
    parser = argparse.ArgumentParser(prog=PROG, usage="%(prog)s [flags]", add_help=False, allow_abbrev=False)
    settings_in.add_flags(parser)
    args, rest = parser.parse_known_args(argv)
    unknown = [flag for flag in rest if flag.startswith("--slo-")]
    if unknown:
        parser.error(f"unknown flag {unknown[0].split('=')[0]}; see --help for every --slo- flag")
    try:
        return settings_in.from_args(args), rest
    except ConfigError as error:
        parser.error(str(error))


def with_defaults(argv: Sequence[str]) -> list[str]:
    """SGLang's flags, with the demo model where no model is named. What else is left out SGLang decides."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):  # `sglang serve MODEL` is accepted by SGLang's own command
        argv = ["--model-path", *argv]
    given = given_flags(argv)
    if not given & {"--model-path", "--model"}:
        argv += demo_flags(given)
    return argv


def given_flags(argv: Sequence[str]) -> set[str]:
    """The names of the flags in `argv` and in the YAML file of SGLang's own `--config`."""
    flags = {arg.split("=", 1)[0] for arg in argv if arg.startswith("--")}
    if "--config" in argv[:-1]:
        import yaml

        with open(argv[list(argv).index("--config") + 1]) as file:  # noqa: PTH123
            flags |= {"--" + str(key).replace("_", "-") for key in yaml.safe_load(file) or {}}
    return flags


def demo_flags(given: set[str]) -> list[str]:
    """Flags that serve the demo model, and a plain notice of it. `given`: flags to leave alone."""
    from sglang_slo.cpu.demo_model import demo_model_path

    path = str(demo_model_path())
    _say(f"no --model-path: serving the demo model ({path}). Its weights are random: its words mean nothing.")
    defaults = {"--dtype": "float32", "--max-total-tokens": str(DEMO_KV_TOKENS)}
    extra = [word for flag, value in defaults.items() if flag not in given for word in (flag, value)]
    return ["--model-path", path, *extra]


def say_how_it_runs(server_args: Any, config: SloConfig, given: set[str]) -> None:
    """Say what is known before anything is built. Ends the process if flags contradict each other.

    Whether deadlines are scheduled by is not known here: only a built scheduler knows its model and its cache, and
    says it in the log itself (`runtime/scheduler/scheduler.py`).
    """
    from sglang_slo.attention import attention_line
    from sglang_slo.runtime.scheduler.flags import refusals

    if config.policy == "off":
        return _say("--slo-policy off: stock SGLang; deadlines are not read")
    refused = refusals(server_args, config)
    if refused:
        raise SystemExit("\n".join(f"{PROG}: error: {message}" for message in refused))
    _say(attention_line(server_args, given))
    for line in promises(config):
        _say(line)
    metrics = "on" if server_args.enable_metrics else "off (--enable-metrics)"
    _say(
        f"to watch: http://{server_args.host}:{server_args.port}/slo, JSON at /slo/status; metrics {metrics}"
    )
    _say("deadlines are read and judged; each scheduler says below whether it schedules by them")


def promises(config: SloConfig) -> list[str]:
    """What requests are promised, one line a class and one for those that say nothing."""

    def limits(of: SloClass | SloConfig) -> str:
        given = {name: getattr(of, name, None) for name in LIMITS_MS}
        told = [f"{name.removesuffix('_ms')} {ms:g} ms" for name, ms in given.items() if ms is not None]
        return ", ".join(told) or "best effort"

    lines = [f"class {name}: {limits(declared)}" for name, declared in config.classes.items()]
    rest = f"class {config.default_class}" if config.default_class is not None else limits(config)
    return [*lines, f"requests that say nothing: {rest}"]


def bind_cpus(server_args: Any) -> None:
    """On a CPU, share the cores among ranks as far as SGLang binds them, unless the user has said how."""
    settings = resolved(server_args)
    if settings.device != "cpu" or os.environ.get("SGLANG_CPU_OMP_THREADS_BIND"):
        return
    cores, ranks = sorted(os.sched_getaffinity(0)), bound_ranks(server_args)
    if ranks == 1:
        return
    shares = [cores[i * len(cores) // ranks : (i + 1) * len(cores) // ranks] for i in range(ranks)]
    # With fewer cores than ranks some share one.
    text = "|".join(",".join(map(str, share or [cores[i % len(cores)]])) for i, share in enumerate(shares))
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = text


def _check_installed() -> None:
    try:
        supported.check()
    except supported.UnsupportedError as error:
        raise SystemExit(f"{PROG}: error: {error}") from error
    names = {entry.name for entry in entry_points(group="sglang.srt.plugins")}
    allowed = os.environ.get("SGLANG_PLUGINS")
    if "sglang_slo" not in names:
        raise SystemExit(
            f"{PROG}: error: SGLang cannot find this package; install it (pip install -e .) or "
            "start with scripts/serve.sh"
        )
    if allowed and "sglang_slo" not in allowed.replace(" ", "").split(","):
        raise SystemExit(f"{PROG}: error: SGLANG_PLUGINS={allowed}: add sglang_slo to it, or leave it unset")


def _help() -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(prog=PROG, description="SGLang's server, with deadlines.")
    settings_in.add_flags(parser)
    ServerArgs.add_cli_args(parser)
    for action in parser._actions:
        if action.dest == "model_path":
            action.required = False
    parser.print_help()


def _say(text: str) -> None:
    print(f"[sglang-slo] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
