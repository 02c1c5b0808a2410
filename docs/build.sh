#!/usr/bin/env bash
# Builds the documentation as a site in site/ (open site/index.html). Needs no network once its
# packages are in .venv. A link, an anchor or a reference that leads nowhere is an error, and so is a
# page that is in no menu. Arguments go to mkdocs build.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../requirements/environment.sh"
cd "$root"
lock=$(sha256sum requirements/docs.lock | cut -d' ' -f1)
if [ "$(cat .venv/docs.sha256 2>/dev/null)" != "$lock" ]; then
    echo "lopd: installing the packages of the documentation into .venv (once, some seconds)" >&2
    .venv/bin/pip --disable-pip-version-check -qq install --no-deps -r requirements/docs.lock
    echo "$lock" > .venv/docs.sha256
fi
export NO_MKDOCS_2_WARNING=1 # the theme announces its successor at every build; versions are pinned
exec python -m mkdocs build --strict "$@"
