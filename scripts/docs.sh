#!/usr/bin/env bash
# Builds the pages of docs/ as a site in out/site, with MkDocs in an environment of its own; a broken link is an error.
#   scripts/docs.sh            builds
#   scripts/docs.sh serve      shows it while it is written
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(benchmark/field/env.sh docs | tail -n 1)
export NO_MKDOCS_2_WARNING=1
exec "$python" -m mkdocs "${1:-build}" --strict "${@:2}"
