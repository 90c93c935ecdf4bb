"""Memory: the peak of what a call has allocated for tensors above what was allocated before it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
from torch.autograd.profiler import profile

_EVENT = "[memory]"

# The profiler's library writes lines of its own to the standard error, unless it is told before its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak in bytes; `None` where this torch does not tell.

    On a GPU by the allocator's own count, on the CPU by adding up the allocations that the profiler records. The call
    is slower for it: never time one that is measured.
    """
    collecting = gc.isenabled()
    gc.disable()  # garbage from before, freed meanwhile, would count as the call's own
    try:
        return _peak_on_gpu(call, device) if device.type == "cuda" else _peak_on_cpu(call)
    finally:
        if collecting:
            gc.enable()


def _peak_on_gpu(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(call: Callable[[], object]) -> int | None:
    with profile(profile_memory=True) as profiled:
        call()
    results = profiled.kineto_results
    if results is None:
        return None
    events = [e for e in results.events() if e.name() == _EVENT and e.device_type().name == "CPU"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
