"""GPUs as nvidia-smi tells of them, by a stand-in for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.doctor import gpus
from pipeline.doctor.report import Finding, Report

# Answers by the first word that a query has; a query for which there is none is refused, as by an older driver.
SCRIPT = """#!/bin/bash
case "$1" in
{cases}
  *) echo "Field \\"x\\" is not a valid field to query."; exit 2 ;;
esac
"""
BASIC = "0, GPU-a, NVIDIA H100, 570.1, 81559, 4\n1, GPU-b, NVIDIA H100, 570.1, 81559, 4\n"


def seen(folder: Path, monkeypatch: pytest.MonkeyPatch, **answers: str) -> Report:
    """What a host tells whose nvidia-smi gives these answers."""
    folder.mkdir(exist_ok=True)
    words = {"basic": "index,", "ecc": "ecc.", "mig": "mig.", "slow": "throttle", "rows": "remapped", "apps": "apps"}
    cases = [f"  *{words[name]}*) printf %s {text!r} ;;" for name, text in ({"basic": BASIC} | answers).items()]
    program = folder / "nvidia-smi"
    program.write_text(SCRIPT.format(cases="\n".join(cases).replace("\\n", "\n")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return gpus.look()


def judged(reports: dict[str, Report], slots: dict[str, int]) -> list[tuple[str, str, str, tuple[str, ...]]]:
    findings = gpus.judge({host: {"gpus": report} for host, report in reports.items()}, slots)
    return [(each.check, each.status, each.text, each.hosts) for each in findings]


def test_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = seen(
        tmp_path, monkeypatch, ecc="GPU-a, 0\nGPU-b, [N/A]\n", slow="GPU-a, Not Active, Not Active, Not Active\n"
    )
    assert judged({"a": idle, "b": idle}, {"a": 2, "b": 2}) == [
        ("GPUs", "pass", "2 on each host", ()),
        ("GPU health", "pass", "no ECC errors, not slowed, idle; at least 80 GiB free", ()),
    ]


def test_faults_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = seen(tmp_path, monkeypatch)
    ill = seen(
        tmp_path,
        monkeypatch,
        basic=BASIC.replace("570.1", "535.9").replace("81559, 4\n1", "81559, 60000\n1"),
        ecc="GPU-a, 0\nGPU-b, 7\n",
        slow="GPU-a, Active, Not Active, Not Active\n",
        rows="GPU-a, 1, 0\nGPU-b, 0, 1\n",
        apps="GPU-a, 4711, 59000\n",
        mig="GPU-a, Disabled\nGPU-b, Enabled\n",
    )
    found = judged({"a": idle, "b": ill, "c": idle}, {"a": 2, "b": 2, "c": 2})
    assert [(check, status, hosts) for check, status, _, hosts in found] == [
        ("GPUs", "pass", ()),
        ("GPUs", "warn", ("b",)),
        *[("GPU health", status, ("b",)) for status in ("warn", "warn", "warn", "fail", "fail", "warn")],
    ]
    assert [text for _, _, text, _ in found][1:] == [
        "driver: 570.1 on a, c; 535.9 on b",
        "GPU 0: a remapping of memory rows is pending",
        "GPU 0: slowed down: hw_thermal_slowdown",
        "GPU 0: process 4711 has 60000 of its 81559 MiB",
        "GPU 1: 7 uncorrected ECC errors",
        "GPU 1: a row of its memory could not be remapped",
        "GPU 1: divided into MIG devices",
    ]


def test_counts_and_a_driver_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = seen(tmp_path, monkeypatch)
    one = seen(tmp_path, monkeypatch, basic=BASIC.splitlines(keepends=True)[0])
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\necho NVIDIA-SMI has failed because of its driver; exit 9\n")
    gone = gpus.look()
    found = judged({"a": two, "b": one, "c": two, "d": gone}, {"a": 2, "b": 2, "c": 1, "d": 2})
    assert [each for each in found if each[0] == "GPUs"] == [
        ("GPUs", "fail", "nvidia-smi: NVIDIA-SMI has failed because of its driver", ("d",)),
        ("GPUs", "fail", "unequal numbers of GPUs: 2 on a, c; 1 on b", ("b",)),
        ("GPUs", "fail", "2 slots, 1 GPUs", ("b",)),
        ("GPUs", "warn", "1 slots, 2 GPUs", ("c",)),
    ]


def test_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = gpus.judge({"a": {"gpus": gpus.look()}}, {"a": 4})
    assert finding == Finding("GPUs", "pass", "none: ranks run on the CPU")
