#!/usr/bin/env bash
# zlib-ng 1.1.0, isal 1.9.1: what they raise of damaged data is no zlib.error, though both are drop-in replacements of zlib.
#
# One would guess: `from zlib_ng import zlib_ng as zlib`, or isal's, changes speed alone: code elsewhere that catches zlib.error, the
#   standard library's among it, catches what it raises.
# What happens: zlib_ng.error and isal_zlib.error derive from Exception. A handler of zlib.error lets them through.
# Whom it hurts: who swaps the module in one file, and catches damaged archives in another: a bad CRC becomes a traceback.
# Instead: catch (zlib.error, zlib_ng.error, isal_zlib.error).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check zlib-ng==1.1.0 isal==1.9.1

venv/bin/python -I - <<'PYTHON'
import sys
import zlib
from importlib.metadata import version

from isal import isal_zlib
from zlib_ng import zlib_ng

print("zlib-ng", version("zlib-ng"), "isal", version("isal"))
packed = bytearray(zlib.compress(b"hello " * 1000))
packed[-1] ^= 1  # of the checksum


def caught(library):
    """Whether a handler of zlib.error catches what damaged data raise."""
    try:
        library.decompress(bytes(packed))
    except zlib.error:
        return True
    except Exception:
        return False
    raise AssertionError("no error at all")


seen = {library.__name__: caught(library) for library in (zlib, isal_zlib, zlib_ng)}
print(seen)
assert seen["zlib"]
if any(list(seen.values())[1:]):
    sys.exit("no longer so: neither was caught")
PYTHON
