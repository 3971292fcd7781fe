"""The soundness campaign: tries to break the scheduler in virtual time and the server in real time."""

import sglang_slo.twin.platform as _plain_cpu

_plain_cpu.settle()  # before anything of SGLang's is imported
