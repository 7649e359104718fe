"""What `condzoo train --plan` and `--dry-run` print."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from condzoo.commands.display import console, number, print_json, short

if TYPE_CHECKING:
    from condzoo.training.planning import Plan
    from condzoo.training.rehearsal import Rehearsal

HOUR = 3600  # seconds


def print_plan(plan: "Plan", runs: int, as_json: bool) -> None:
    """One line a quantity, of one run; where there are several (seeds), what all take, too."""
    if as_json:
        print_json({**plan.to_dict(), "runs": runs, "seconds_of_all_runs": runs * plan.seconds})
        return
    held = [
        f"{label} {byte_text(count)}"
        for label, count in (
            ("weights", plan.weight_bytes),
            ("gradients", plan.gradient_bytes),
            ("optimizer", plan.optimizer_bytes),
            ("EMA", plan.average_bytes),
            ("activations", plan.activation_bytes),
            ("data set", plan.data_bytes),
        )
        if count
    ]
    fits = "" if plan.memory_bytes <= plan.device_memory_bytes else "  DOES NOT FIT"
    room = "" if plan.device_memory_bytes == math.inf else f" of {byte_text(plan.device_memory_bytes)}"
    rows = {
        "model": f"{plan.model}, {plan.parameters:,} parameters, {plan.trainable:,} of them trained",
        "device": f"{plan.count} x {plan.device}, {plan.precision}, taken to reach {plan.reached:.0%} of its peak "
        f"FLOP/s and {plan.reached_bandwidth:.0%} of its bandwidth",
        "steps": f"{plan.steps:,}: {plan.steps_per_epoch:,} an epoch of {plan.training_images:,} images, "
        f"{plan.images_per_step:,} a step, {plan.images_per_pass:,} at once on a device",
        "FLOPs": f"{number(plan.flops_per_step)} a step, {number(plan.flops)} in all "
        f"({number(plan.flops_forward_per_image)} an image forward)",
        "memory": f"{byte_text(plan.memory_bytes)}{room} a device: {', '.join(held)}{fits}",
        "sent": f"{byte_text(plan.communicated_bytes_per_step)} a step and device (ring all-reduce of the gradient)",
        "time": f"{duration_text(plan.seconds_per_step)} a step, {duration_text(plan.seconds)} in all, estimated; "
        "without evaluation, probe and data loading",
    }
    if runs > 1:
        rows["runs"] = f"{runs}, one after the other: {duration_text(runs * plan.seconds)}"
    for label, text in rows.items():
        console.print(f"{label:8} {text}", soft_wrap=True)


def print_rehearsal(rehearsal: "Rehearsal", as_json: bool) -> None:
    """One line a part, and that nothing was written."""
    if as_json:
        norm = rehearsal.grad_norm if math.isfinite(rehearsal.grad_norm) else None  # fp16's first scale is too large
        print_json({**asdict(rehearsal), "grad_norm": norm})
        return
    probed = f", {rehearsal.probed} layers probed" if rehearsal.probed else ""
    rows = {
        "model": f"{rehearsal.model}, {rehearsal.parameters:,} parameters, {rehearsal.device} in {rehearsal.precision}",
        "data": f"{rehearsal.training_images:,} training and {rehearsal.test_images:,} test images",
        "step 1": f"of {rehearsal.steps:,}: loss {rehearsal.loss:.4f}, gradient norm {rehearsal.grad_norm:.4g}, "
        f"{duration_text(rehearsal.seconds)}{probed}",
    }
    for label, text in rows.items():
        console.print(f"{label:8} {text}", soft_wrap=True)
    console.print("nothing was written")


def byte_text(count: float) -> str:
    """Bytes as people read them: 1.08 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{short(count / size)} {unit}"
    return f"{count:.0f} B"


def duration_text(seconds: float) -> str:
    """Milliseconds to days, whichever fits."""
    if seconds < 1:
        return f"{short(1000 * seconds)} ms"
    if seconds < 120:
        return f"{short(seconds)} s"
    if seconds < 2 * HOUR:
        return f"{short(seconds / 60)} minutes"
    return f"{short(seconds / HOUR)} hours" if seconds < 48 * HOUR else f"{short(seconds / (24 * HOUR))} days"
