"""Where the time of a train step goes: the largest operations of the device, and how long none ran.

HorNet-L at 384 px in bf16, the policy of the configurations, kernels on, as `steps.py` runs it.

- idle: the share of the time from the first operation's start to the last one's end in which the device ran none. It
  waited for the host, which the profiler slows: an upper bound.
- host: seconds until the host had launched a step, to the device's seconds for it; above 1 the host is the bound.
"""

import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.gpu.models import batch_at, build, set_policy, train_step
from tests.gpu.steps import DROP_PATH
from tests.gpu.timing import Bench

STEPS, LARGEST = 3, 10


def profile_step(bench: Bench) -> bool:
    px = bench.args.px[0]
    batch = 2 if bench.tiny else batch_at(bench, px)
    for kind in bench.args.models:
        if bench.late(f"the profile of {kind}"):
            continue
        model = build(bench.device, bench.tiny, kind, "ours", px, DROP_PATH)
        set_policy(model, "selective")
        step = train_step(bench, model, batch, px)
        seconds = bench.seconds(step, warm_up=3, budget=1.0)
        host = host_seconds(bench, step)
        activities = [ProfilerActivity.CPU] if bench.tiny else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities) as found:
            for _ in range(STEPS):
                step()
            synchronize(bench)
        bench.heading(
            f"{kind} at {px} px, batch {batch}: the largest operations", "model | operation | calls | ms | share"
        )
        attribute = "self_cpu_time_total" if bench.tiny else "self_device_time_total"
        events = found.key_averages() if bench.tiny else [e for e in found.key_averages() if on_device(e)]
        total = sum(getattr(event, attribute) for event in events)
        largest = sorted(events, key=lambda event: getattr(event, attribute), reverse=True)[:LARGEST]
        for event in largest:
            spent = getattr(event, attribute)
            fields = {"model": kind, "operation": event.key[:70].replace("|", "/"), "calls": event.count // STEPS}
            bench.row(**fields, ms=spent / STEPS / 1e3, share=spent / total)
        bench.heading(f"{kind}: the step as a whole", "model | ms | host launches, ms | host | idle")
        idle = idle_share(found)
        bench.row(model=kind, ms=seconds * 1e3, host_ms=host * 1e3, host=host / seconds, idle=idle)
        del model, step, found
        bench.clear()
    return True


def on_device(event: object) -> bool:
    return getattr(event, "device_type", None) == DeviceType.CUDA


def synchronize(bench: Bench) -> None:
    if not bench.tiny:
        torch.cuda.synchronize()


def host_seconds(bench: Bench, step: object) -> float:
    """Until a step is launched; the least of three, since a full queue would make the host wait."""
    took = []
    for _ in range(3):
        synchronize(bench)
        start = time.perf_counter()
        step()  # type: ignore[operator]
        took.append(time.perf_counter() - start)
    synchronize(bench)
    return min(took)


def idle_share(found: profile) -> float | None:
    """None without a device."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    if not spans:
        return None
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - spans[0][0])
