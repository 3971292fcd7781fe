"""SGLang's two ways in for us: a CPU platform, and our scheduler in place of SGLang's.

SGLang calls both functions in each of its processes wherever this package is installed. Neither may ever
hurt a stock server: the platform is offered only where nothing else could run, and the scheduler is
replaced only if the environment carries settings with policy `slo` (`SloConfig.to_env`). Importing this
module imports little.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from importlib.metadata import entry_points

from sglang_slo.config import ENV, SloConfig

CPU_PLATFORM = "sglang_slo_cpu"  # the entry point's name, as SGLANG_PLATFORM would give it
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
HTTP_SERVER = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"
MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
REQUEST = "sglang.srt.managers.io_struct.TokenizedGenerateReqInput"


def cpu_platform() -> str | None:
    """Dotted name of the CPU platform, or None where SGLang has another device or another CPU engine."""
    if os.environ.get("SGLANG_PLATFORM") not in (CPU_PLATFORM, "", None):
        return None
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":  # SGLang's own, with a CPU build of sgl_kernel
        return None
    others = {e.name for e in entry_points(group="sglang.srt.platforms")} - {CPU_PLATFORM}
    if others and os.environ.get("SGLANG_PLATFORM") != CPU_PLATFORM:
        return None  # SGLang refuses to start with two: another vendor's comes first
    return "sglang_slo.cpu.platform.NativeCpuPlatform" if no_gpu() else None


def no_gpu() -> bool:
    """True if torch sees no accelerator that SGLang knows how to use."""
    import torch  # late: this module must stay light

    if torch.cuda.is_available() or torch.xpu.is_available():
        return False
    others = [getattr(torch, name, None) for name in ("npu", "hpu", "musa", "mps")]
    return not any(device is not None and device.is_available() for device in others)


def settings() -> SloConfig | None:
    """The settings this process was started with, None without. Ends the process on unusable ones."""
    try:
        return SloConfig.from_env()
    except (TypeError, ValueError) as error:
        # SGLang logs a plugin's exception and goes on without it: what was asked for would be lost.
        raise SystemExit(f"{ENV}: {error}") from error


def switched_on() -> bool:
    """True if our scheduler was asked for."""
    config = settings()
    return config is not None and config.policy == "slo"


def register() -> None:
    """Our scheduler in SGLang's place and the ingress before its endpoints, if switched on.

    With policy `off` only the status route, which says so.
    """
    if settings() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if _may_serve_http():
        from sglang_slo.server.http_app import serve_with_deadlines

        HookRegistry.register(HTTP_SERVER, serve_with_deadlines, HookType.AROUND)
    if not switched_on():
        return
    _check_supported()
    from sglang_slo.server import wire

    HookRegistry.register(f"{REQUEST}.wrap_pickle_fields", wire.wrap, HookType.AROUND)
    HookRegistry.register(f"{REQUEST}.unwrap_pickle_fields", wire.unwrap, HookType.AROUND)
    if _may_tokenize():
        _at_the_door()
    if _may_serve_http():
        from sglang_slo.server import verdicts

        verdicts.install()
    from sglang_slo.runtime.scheduler.scheduler import SloScheduler

    HookRegistry.register(SCHEDULER, SloScheduler, HookType.REPLACE)


def _check_supported() -> None:
    """Ends the process on a release that is not supported: SGLang would go on, without what was asked for."""
    from sglang_slo.runtime.sglang import supported

    try:
        supported.check()
    except supported.UnsupportedError as error:
        raise SystemExit(f"sglang-slo: {error}") from error


def _at_the_door() -> None:
    """Limits in and verdicts out, in a process that tokenizes: the HTTP server, its workers, an offline Engine."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_slo.observe import answers
    from sglang_slo.server import inputs, refusals, verdicts
    from sglang_slo.server.door import Door

    config = settings()
    assert config is not None
    HookRegistry.register(f"{MANAGER}.generate_request", Door(config).hook, HookType.AROUND)
    HookRegistry.register(f"{MANAGER}._create_tokenized_object", inputs.checked, HookType.AROUND)
    HookRegistry.register(f"{MANAGER}._handle_abort_finish_reason", refusals.noted, HookType.AROUND)
    HookRegistry.register(f"{MANAGER}.convert_to_span_attrs", answers.span_attributes, HookType.AROUND)
    answers.install(verdicts.heard)


def _may_serve_http() -> bool:
    # Hooking imports SGLang's HTTP server: seconds that its scheduler processes need not pay.
    return multiprocessing.parent_process() is None or "sglang.srt.entrypoints.http_server" in sys.modules


def _may_tokenize() -> bool:
    return _may_serve_http() or "sglang.srt.managers.tokenizer_manager" in sys.modules
