"""SGLang's HTTP app with deadlines, for uvicorn to import by name in each of several tokenizer workers."""

from sglang.srt.entrypoints.http_server import app
from sglang.srt.plugins import load_plugins

from sglang_slo.config import SloConfig
from sglang_slo.server.http_app import prepare

__all__ = ["app"]

load_plugins()  # SGLang does so in the process that starts the workers, not in them
_config = SloConfig.from_env()
if _config is not None:
    prepare(app, _config)
