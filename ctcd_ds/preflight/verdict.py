"""What the preflight says: one table of hosts and checks, and below it each finding with its cure."""

from __future__ import annotations

from ctcd_ds.cli import aligned
from ctcd_ds.preflight.checks import CHECKS, Finding, Hosts, counted

_SHOWN = 16


def host_table(hosts: Hosts, findings: list[Finding]) -> str:
    """A row a host, a column a check; below, each finding with its cure. Many good hosts share a row."""
    bad = {finding.host for finding in findings}
    good = [host for host in hosts.ranks if host not in bad]
    rows = [("host", "ranks", *CHECKS)]
    rows += [
        (host, counted(hosts.ranks[host]), *_cells(hosts, host, findings))
        for host in hosts.ranks
        if host in bad or host in good[:_SHOWN]
    ]
    if len(good) > _SHOWN:
        rows.append((f"{len(good) - _SHOWN} more", "", *_cells(hosts, good[-1], findings)))
    lines = aligned(rows)
    for finding in findings:
        lines += ["", f"{finding.host}: {finding.check}: {finding.problem}", f"  cure: {finding.cure}"]
    return "\n".join(lines)


def _cells(hosts: Hosts, host: str, findings: list[Finding]) -> list[str]:
    failed = {finding.check for finding in findings if finding.host == host}
    said = [facts for facts in hosts.facts if facts.host == host]
    skipped = {"GPU"} if all(facts.accelerator == "cpu" for facts in said) else set()
    return ["FAIL" if c in failed else "?" if not said else "skipped" if c in skipped else "ok" for c in CHECKS]
