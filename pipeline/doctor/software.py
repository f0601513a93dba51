"""Versions and code: what has to be the same on every host. Nothing that takes seconds to import is imported."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path

from pipeline.doctor.report import Finding, Report, Reports, answered, differing, grouped, odd

_ROOT = Path(__file__).parents[2]
# Those whose versions change what a run computes, or whether its ranks understand each other.
_PACKAGES = (
    *("torch", "torchvision", "triton", "deepspeed", "timm", "numpy", "pillow", "simplejpeg", "webdataset"),
    *("safetensors", "pydantic", "mlflow", "ffcv"),
)
_CODE = ("pipeline", "data_prep", "launch")
_SAME = "one environment for all hosts: `make setup` from the same constraints.txt, or a shared file system"


def look() -> Report:
    """Versions by name, packages that matter less apart, and a digest of each file of the checkout."""
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    others = _others()
    nccl = [f"{name} {version}" for name, version in others.items() if name.startswith("nvidia-nccl")]
    versions |= {"CUDA of torch": _cuda(), "NCCL": ", ".join(nccl) or "none"}
    decoder = importlib.util.find_spec("pipeline.data._jpeg")
    files = [file for room in _CODE for file in (_ROOT / room).rglob("*") if file.suffix in (".py", ".c", ".h", ".sh")]
    return {
        "versions": versions,
        "others": {name: version for name, version in others.items() if name not in _PACKAGES},
        "decoder": _digest(Path(decoder.origin)) if decoder and decoder.origin else "none",
        "files": {str(file.relative_to(_ROOT)): _digest(file) for file in sorted(files)},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _others() -> dict[str, str]:
    """All packages beside torch, by the names of their folders: to open each takes half a second."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return {}
    names = [path.name.removesuffix(".dist-info") for path in Path(found.origin).parents[1].glob("*.dist-info")]
    return {name.lower().replace("_", "-"): version for name, _, version in (each.rpartition("-") for each in names)}


def _cuda() -> str:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "none"
    text = Path(found.origin).with_name("version.py").read_text()
    match = re.search(r"^cuda\b.*=\s*'([^']+)'", text, re.MULTILINE)
    return match[1] if match else "none"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def judge(reports: Reports) -> list[Finding]:
    """Whether versions, code and the decoder's build agree."""
    told, findings = answered("software", reports, "software")
    if not told:
        return findings
    first = next(iter(told.values()))
    return [*findings, *_versions(told, first), *_checkout(told), *_decoder(told)]


def _versions(told: dict[str, Report], first: Report) -> list[Finding]:
    found = []
    for name in first["versions"]:
        values = {host: report["versions"][name] for host, report in told.items()}
        if hosts := odd(values):
            found.append(Finding("versions", "fail", f"{name}: {differing(values)}", _SAME, hosts))
        elif values and name in ("torch", "deepspeed", "timm") and set(values.values()) == {"none"}:
            found.append(Finding("versions", "fail", f"{name} is not installed", "run `make setup`"))
    names = sorted({name for report in told.values() for name in report["others"]})
    values = {name: {host: report["others"].get(name, "none") for host, report in told.items()} for name in names}
    if differ := [name for name in names if odd(values[name])]:
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        hosts = tuple(dict.fromkeys(host for name in differ for host in odd(values[name])))
        text = f"other packages: {', '.join(differ[:4])}{more} ({differing(values[differ[0]])})"
        found.append(Finding("versions", "warn", text, _SAME, hosts))
    if not found:
        words = [f"{name} {first['versions'][name]}" for name in ("Python", "torch", "CUDA of torch", "NCCL")]
        words += [f"{name} {first['versions'][name]}" for name in ("deepspeed", "timm")]
        found.append(Finding("versions", "pass", ", ".join(words).replace("NCCL nvidia-nccl", "nvidia-nccl")))
    return found


def _checkout(told: dict[str, Report]) -> list[Finding]:
    values = {host: report["files"] for host, report in told.items()}
    hosts = odd(values)
    if not hosts:
        return [Finding("checkout", "pass", f"{len(next(iter(values.values())))} files of code")]
    usual = grouped(values)[0][0]
    differ = sorted(
        {name for host in hosts for name in {*values[host], *usual} if values[host].get(name) != usual.get(name)}
    )
    text = f"other code than on {grouped(values)[0][1][0]}: {', '.join(differ[:3])}{', ...' if len(differ) > 3 else ''}"
    return [Finding("checkout", "fail", text, "check out the same commit there, without changes", hosts)]


def _decoder(told: dict[str, Report]) -> list[Finding]:
    builds = {host: report["decoder"] for host, report in told.items()}
    missing = tuple(host for host, build in builds.items() if build == "none")
    found = []
    if missing:
        text = "the C decoder is not built: decoding takes a third more time"
        found.append(Finding("decoder", "warn", text, "launch/setup.sh says what it needs", missing))
    built = {host: build for host, build in builds.items() if build != "none"}
    if hosts := odd(built):
        text = f"other builds of the C decoder: {differing(built)}"
        found.append(Finding("decoder", "warn", text, "run `make setup` there, from the same checkout", hosts))
    return found or [Finding("decoder", "pass", f"the C decoder, build {next(iter(built.values()))}")]
