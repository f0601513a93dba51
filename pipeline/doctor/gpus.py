"""The GPUs of each host, as nvidia-smi tells: how many, whether they are well, and whether somebody else has them."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.doctor.report import Finding, Report, Reports, Status, answered, differing, each, odd

_SECONDS = 15.0
_BASIC = ("index", "uuid", "name", "driver_version", "memory.total", "memory.used")
_SLOW = ("hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
# Each is asked for by itself: nvidia-smi refuses a whole query for a field that its driver does not know.
_MORE = {
    "ecc": "--query-gpu=uuid,ecc.errors.uncorrected.volatile.total",
    "mig": "--query-gpu=uuid,mig.mode.current",
    "slow": "--query-gpu=uuid," + ",".join(f"clocks_throttle_reasons.{name}" for name in _SLOW),
    "remapped": ("--query-remapped-rows=gpu_uuid,remapped_rows.pending,remapped_rows.failure"),
    "processes": ("--query-compute-apps=gpu_uuid,pid,used_memory"),
}
_USED_MIB = 1024  # more than a driver and its daemons take


def look() -> Report:
    """Each GPU as a mapping; `fault`: why nvidia-smi, which is there, says nothing."""
    with ThreadPoolExecutor() as pool:
        basic = pool.submit(_query, f"--query-gpu={','.join(_BASIC)}")
        more = {name: pool.submit(_query, words) for name, words in _MORE.items()}
        rows, fault = basic.result()
        found = {name: future.result()[0] for name, future in more.items()}
    gpus: list[dict[str, Any]] = [dict(zip(_BASIC, row, strict=False)) for row in rows if len(row) == len(_BASIC)]
    for gpu in gpus:
        for name, told in found.items():
            gpu[name] = [row[1:] for row in told if row[0] == gpu["uuid"]]
    return {"gpus": gpus, "fault": fault, "xids": _xids() if gpus else []}


def _query(words: str) -> tuple[list[list[str]], str]:
    """(rows, what is wrong: nothing where there is no nvidia-smi)."""
    try:
        done = subprocess.run(
            ["nvidia-smi", words, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        return [], ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer ({type(error).__name__})"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        return [], f"nvidia-smi: {said[-1].strip()[:200]}"
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()], ""


def _xids() -> list[str]:
    """The driver's errors in the kernel's log, where it may be read: nvidia-smi does not tell them."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=2.0, errors="replace", check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.partition("NVRM: ")[2].strip()[:120] for line in done.stdout.splitlines() if "NVRM: Xid" in line]


def judge(reports: Reports, slots: dict[str, int]) -> list[Finding]:
    """Against the slots of each host; none are known without a hostfile."""
    told, findings = answered("GPUs", reports, "gpus")
    gpus = {host: report["gpus"] for host, report in told.items()}
    counts = {host: len(found) for host, found in gpus.items()}
    faults = {host: report["fault"] for host, report in told.items() if report["fault"]}
    findings += each("GPUs", "fail", faults, "see to the driver there")
    findings += _counts({host: count for host, count in counts.items() if host not in faults}, slots)
    if not any(counts.values()):
        return findings
    for key, what in (("name", "GPUs"), ("driver_version", "driver")):
        values = {host: ", ".join(sorted({gpu[key] for gpu in found})) for host, found in gpus.items() if found}
        if hosts := odd(values):
            advice = "ranks wait for the slowest: leave one kind out" if key == "name" else "one driver on all hosts"
            findings.append(Finding("GPUs", "warn", f"{what}: {differing(values)}", advice, hosts))
    findings += _health(gpus, {host: report["xids"] for host, report in told.items()})
    return findings


def _counts(counts: dict[str, int], slots: dict[str, int]) -> list[Finding]:
    found = []
    if hosts := odd(counts):
        text = f"unequal numbers of GPUs: {differing(counts)}"
        found.append(Finding("GPUs", "fail", text, "leave hosts out, or see why GPUs are missing there", hosts))
    # Where no host has any, ranks are on the CPU, as many as one likes.
    if any(counts.values()):
        few = {
            host: f"{slots[host]} slots, {n} GPUs" for host, n in counts.items() if host in slots and n < slots[host]
        }
        many = {
            host: f"{slots[host]} slots, {n} GPUs" for host, n in counts.items() if host in slots and n > slots[host]
        }
        found += each("GPUs", "fail", few, "lower slots= in the hostfile: each rank has a GPU of its own")
        found += each("GPUs", "warn", many, "raise slots= in the hostfile, or GPUs stay idle")
    if not found and counts:
        number = next(iter(counts.values()))
        found.append(Finding("GPUs", "pass", f"{number} on each host" if number else "none: ranks run on the CPU"))
    return found


def _health(gpus: dict[str, list[dict[str, Any]]], xids: dict[str, list[str]]) -> list[Finding]:
    found: list[Finding] = []
    faults: list[tuple[Status, str, str, str]] = []  # status, host, text, advice
    for host, each_gpu in gpus.items():
        for gpu in each_gpu:
            faults += [(status, host, f"GPU {gpu['index']}: {text}", advice) for status, text, advice in _faults(gpu)]
    for host, seen in xids.items():
        if seen:
            text = f"the kernel's log has {len(seen)} errors of the driver, the last: {seen[-1]}"
            faults.append(("warn", host, text, "look the Xid up in NVIDIA's list"))
    for status, advice in dict.fromkeys((status, advice) for status, _, _, advice in faults):
        texts: dict[str, str] = {}
        for other, host, text, other_advice in faults:
            if (status, advice) == (other, other_advice):
                texts[host] = f"{texts[host]}; {text}" if host in texts else text
        found += each("GPU health", status, texts, advice)
    if not found:
        free = [int(gpu["memory.total"]) - int(gpu["memory.used"]) for all_of in gpus.values() for gpu in all_of]
        least = f"at least {min(free) / 1024:.0f} GiB free" if free else ""
        found.append(Finding("GPU health", "pass", f"no ECC errors, not slowed, idle; {least}"))
    return found


def _faults(gpu: dict[str, Any]) -> list[tuple[Status, str, str]]:
    """(status, what, what to do)."""
    found: list[tuple[Status, str, str]] = []
    number = gpu["ecc"][0][0] if gpu["ecc"] else "0"
    if number.isdigit() and int(number):
        found.append(("fail", f"{number} uncorrected ECC errors", "drain the host and reset or replace the GPU"))
    for pending, failure in gpu["remapped"]:
        if failure not in ("0", "No", "[N/A]"):
            found.append(("fail", "a row of its memory could not be remapped", "replace the GPU"))
        elif pending not in ("0", "No", "[N/A]"):
            found.append(("warn", "a remapping of memory rows is pending", "reset the GPU when the host is free"))
    if gpu["slow"] and (why := [name for name, on in zip(_SLOW, gpu["slow"][0], strict=False) if on == "Active"]):
        found.append(("warn", f"slowed down: {', '.join(why)}", "see to its cooling and power"))
    if gpu["mig"] and gpu["mig"][0] == ["Enabled"]:
        found.append(("warn", "divided into MIG devices", "a slot of a hostfile is a whole GPU"))
    used, pids = gpu["memory.used"], [row[0] for row in gpu["processes"]]
    if pids or (used.isdigit() and int(used) > _USED_MIB):
        who = f"process {', '.join(pids[:3])}" if pids else "somebody"
        found.append(("warn", f"{who} has {used} of its {gpu['memory.total']} MiB", "end that, or take other GPUs"))
    return found
