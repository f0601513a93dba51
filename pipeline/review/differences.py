"""What differs between the configurations of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_OF_EVERY_RUN = ("name", "output_root")  # another name is another run
ABSENT = "—"


def differences(configs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Of each key whose values differ, the value of each run; runs without a configuration have none."""
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [config.get(key, ABSENT) for config in configs] for key in keys if key not in _OF_EVERY_RUN}
    known = [bool(config) for config in configs]
    return {
        key: values
        for key, values in rows.items()
        if len({value for value, config in zip(values, known, strict=True) if config}) > 1
    }
