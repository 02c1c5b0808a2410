#!/usr/bin/env bash
# Installs Debian's Chromium for tests/report/test_browser.py where there is none and the user is
# root. Without it these tests are skipped with the reason.
set -euo pipefail
for program in chromium chromium-browser google-chrome; do
    if command -v "$program" >/dev/null; then
        exit 0
    fi
done
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "no Chromium, and apt-get cannot install it here: the browser tests are skipped" >&2
    exit 0
fi
# A machine without a network still runs all other tests.
if ! apt-get install -y --no-install-recommends chromium >/dev/null 2>&1; then
    if ! apt-get update >/dev/null 2>&1 ||
        ! apt-get install -y --no-install-recommends chromium >/dev/null 2>&1; then
        echo "Chromium cannot be installed: the browser tests are skipped" >&2
    fi
fi
