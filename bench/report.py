"""Results as Markdown."""

from __future__ import annotations

import os
import platform
from statistics import median

import servers
from workloads import WORKLOADS, Result

Key = tuple[str, str, str]  # format, workload, server
Results = dict[Key, list[Result]]


def _mid(runs: list[Result], field: str) -> float:
    return median(getattr(run, field) for run in runs)


def _rate(runs: list[Result], block: int) -> str:
    """Median with minimum and maximum: thousands a second, or MiB/s for large blocks."""
    scale, unit = (1e3, "k") if block < 1 << 20 else ((1 << 20) / block, "MiB/s")
    rates = [run.rate / scale for run in runs]
    digits = 1 if unit == "k" else 0
    return f"{median(rates):.{digits}f} {unit} ({min(rates):.{digits}f}–{max(rates):.{digits}f})"


def fastest_qemu(results: Results, fmt: str, key: str) -> str | None:
    """The setting of qemu-nbd with the highest median."""
    there = [name for name in servers.QEMU if (fmt, key, name) in results]
    return max(there, key=lambda n: _mid(results[fmt, key, n], "rate"), default=None)


def render(results: Results, rounds: int, seconds: float, took: float) -> str:
    """One table for each format: a row for each workload and server."""
    lines = [
        f"{rounds} alternating rounds of {seconds:g} s, {os.cpu_count()} processors, "
        f"{platform.system()} {platform.release()}, {servers.version(servers.OURS)}, "
        f"{servers.version('qemu-nbd threads')}, {servers.version(servers.NBDKIT)}; "
        f"{took / 60:.0f} minutes in all. Rates are medians (minimum–maximum).",
        "",
    ]
    for fmt in sorted({key[0] for key in results}, reverse=True):
        lines += [
            f"### {fmt}",
            "",
            "| work | server | requests/s or MiB/s | against qemu-nbd's fastest "
            "| p99 µs | CPU s per million | peak MiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for work in WORKLOADS:
            best = fastest_qemu(results, fmt, work.key)
            for name in servers.ALL:
                runs = results.get((fmt, work.key, name))
                if not runs:
                    continue
                ratio = ""
                if best is not None:
                    rate = _mid(results[fmt, work.key, best], "rate")
                    ratio = f"{_mid(runs, 'rate') / rate:.2f}×" if rate else ""
                lines.append(
                    f"| {work.title} | {name} | {_rate(runs, work.block)} | {ratio} "
                    f"| {_mid(runs, 'p99_us'):.0f} | {_mid(runs, 'cpu_us'):.1f} "
                    f"| {_mid(runs, 'peak_kib') / 1024:.0f} |"
                )
        lines.append("")
        lines += _totals(results, fmt)
    return "\n".join(lines)


def _totals(results: Results, fmt: str) -> list[str]:
    """Allocating writes with the final flush counted."""
    rows = []
    for work in WORKLOADS:
        if work.rw:
            continue
        totals = {
            name: [run.seconds + run.flush_seconds for run in results[fmt, work.key, name]]
            for name in servers.ALL
            if (fmt, work.key, name) in results
        }
        qemu = [median(totals[name]) for name in servers.QEMU if name in totals]
        for name, seconds in totals.items():
            ratio = f"{min(qemu) / median(seconds):.2f}×" if qemu else ""
            flush = _mid(results[fmt, work.key, name], "flush_seconds")
            rows.append(
                f"| {work.title} | {name} | {median(seconds):.2f} "
                f"({min(seconds):.2f}–{max(seconds):.2f}) | {flush:.2f} | {ratio} |"
            )
    if not rows:
        return []
    return [
        "| job of 16,384 writes | server | seconds with the final flush | of these the flush "
        "| against qemu-nbd's fastest |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
