"""Makes this process a plain-CPU SGLang process, whatever the machine has.

Must be imported before anything of SGLang's, since SGLang looks for its device while it is imported.
"""

from __future__ import annotations

import logging
import os
import warnings

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def settle() -> None:
    """Fix the platform of this process, and keep quiet about what a plain CPU lacks."""
    for noisy in ("sglang", "torch.utils.cpp_extension"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"sglang\..*")
    from sglang.srt import platforms

    from sglang_slo.cpu.platform import NativeCpuPlatform

    platforms._current_platform = NativeCpuPlatform()
