"""The entry points: they let our parts in when asked to, and otherwise change nothing."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_slo import plugin
from sglang_slo.config import ENV, SloConfig


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `register` would put into SGLang: target to hook."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_slo.observe import answers

    hooks: dict[str, Any] = {}
    monkeypatch.setattr(HookRegistry, "register", lambda target, hook, kind: hooks.update({target: hook}))
    monkeypatch.setattr(answers, "install", lambda *_: hooks.update(answers=True))
    return hooks


def test_an_installed_but_unused_package_changes_nothing(
    registered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENV, raising=False)
    plugin.register()
    assert not registered


def test_policy_off_adds_the_status_routes_and_nothing_else(
    registered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastapi import FastAPI

    from sglang_slo.server.http_app import prepare

    monkeypatch.setenv(ENV, SloConfig(policy="off").to_json())
    plugin.register()
    assert registered.keys() == {plugin.HTTP_SERVER}
    app = FastAPI()
    stock = len(app.routes)
    prepare(app, SloConfig(policy="off"))
    prepare(app, SloConfig(policy="off"))
    assert {route.path for route in app.routes[stock:]} == {"/slo", "/slo/status"}
    assert not app.user_middleware


@pytest.mark.parametrize("settings", ["{}", SloConfig().to_json()])
def test_switched_on_by_environment_the_scheduler_is_ours(
    settings: str, registered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    monkeypatch.setenv(ENV, settings)
    plugin.register()
    assert issubclass(registered[plugin.SCHEDULER], Scheduler)
    assert registered[plugin.SCHEDULER] is not Scheduler
    assert plugin.HTTP_SERVER in registered and registered["answers"]


@pytest.mark.parametrize("settings", ["{", '{"policy": "maybe"}', '{"nonsense": 1}', '{"ttft_ms": -1}'])
def test_unusable_settings_end_the_process(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, settings)
    with pytest.raises(SystemExit, match=ENV):
        plugin.register()


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(plugin, "no_gpu", lambda: True)


def test_the_cpu_platform_is_offered_where_nothing_else_runs(no_accelerator: None) -> None:
    assert plugin.cpu_platform() == "sglang_slo.cpu.platform.NativeCpuPlatform"


@pytest.mark.parametrize(("name", "value"), [("SGLANG_PLATFORM", "other"), ("SGLANG_USE_CPU_ENGINE", "1")])
def test_the_cpu_platform_yields_to_the_users_choice(
    name: str, value: str, no_accelerator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert plugin.cpu_platform() is None


def test_the_cpu_platform_yields_to_a_gpu(no_accelerator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "no_gpu", lambda: False)
    assert plugin.cpu_platform() is None


def test_the_cpu_platform_yields_to_another_vendors(
    no_accelerator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [SimpleNamespace(name="npu"), SimpleNamespace(name=plugin.CPU_PLATFORM)]
    monkeypatch.setattr(plugin, "entry_points", lambda group: others)
    assert plugin.cpu_platform() is None


def test_what_sglang_loads_in_every_process_stays_light() -> None:
    code = "import sys, sglang_slo.plugin as p; p.register(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
