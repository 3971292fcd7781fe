"""`python -m sglang_slo` is the `sglang-slo` command."""

from sglang_slo.cli import main

if __name__ == "__main__":
    main()
