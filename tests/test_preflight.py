"""The preflight: what it judges from what ranks say, and two real ranks of it on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import PATIENCE_S
from ctcd_ds.preflight.bandwidth import AllReduce, as_cluster
from ctcd_ds.preflight.checks import Facts, Hosts, common_mistake, judge
from ctcd_ds.preflight.probes import PACKAGES, OutputProbe
from ctcd_ds.preflight.verdict import host_table
from runs import ROOT, bert, chain_corpus, start_ranks

VERSIONS = dict.fromkeys(("python", "ctcd_ds", *PACKAGES), "1.0")
JOB: dict[str, Any] = {
    "settings": {"recipe.seed": 1},
    "corpus": "c" * 64,
    "checkpoint_bytes": 10,
    "checkpoints": 4,
}


def good(rank: int, host: str, **changes: Any) -> Facts:
    """What a rank says where all is well."""
    facts = Facts(rank, host, VERSIONS, {}, 0.0, 0.0, None, 1000, **JOB)
    return replace(facts, **changes)


def hosts_of(*facts: Facts, silent: dict[int, str] | None = None) -> Hosts:
    return Hosts(list(facts), silent or {}, 15.0)


def found(hosts: Hosts) -> list[tuple[str, str]]:
    return [(finding.host, finding.check) for finding in judge(hosts)]


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": {**VERSIONS, "torch": "2.0"}},
        {"settings": {"recipe.seed": 2}},
        {"settings": {"recipe.seed": 1, "deepspeed.extra": True}},
        {"corpus": "d" * 64},
        {"settings": None, "corpus": None, "mistake": ("corpus", "it does not exist")},
        {"output": "cannot write"},
        {"free_bytes": 39},
        {"ahead_s": -3.0},
        {"gpu_problem": "is busy"},
        {"accelerator": "cuda"},
    ],
    ids=str,
)
def test_the_odd_host_of_four_is_the_only_one_named(changes: dict[str, Any]) -> None:
    """Rank 0's own host too: the most count."""
    for odd in range(4):
        hosts = hosts_of(*(good(rank, f"n{rank}", **(changes if rank == odd else {})) for rank in range(4)))
        if "ahead_s" not in changes or odd:  # rank 0's clock is the measure
            assert {host for host, _ in found(hosts)} == {f"n{odd}"}


def test_of_two_hosts_rank_0_is_right() -> None:
    hosts = hosts_of(good(0, "a"), good(1, "b", versions={**VERSIONS, "deepspeed": "0.1"}))
    [finding] = judge(hosts)
    assert (finding.host, finding.problem) == ("b", "deepspeed 0.1, elsewhere 1.0")


def test_a_clock_is_judged_by_what_the_network_lets_it_know() -> None:
    assert not found(hosts_of(good(0, "a"), good(1, "b", ahead_s=5.0, trip_s=8.0)))
    assert found(hosts_of(good(0, "a"), good(1, "b", ahead_s=5.0, trip_s=1.0))) == [("b", "clock")]


@pytest.mark.parametrize(
    ("failing", "named"),
    [
        ([(1, 2), (3, 2)], ["n2"]),  # nobody gets through to 2
        ([(2, 0), (2, 1), (2, 3)], ["n2"]),  # 2 gets through to nobody
        ([(0, 2)], ["n2"]),
        ([(1, 0)], ["n0"]),
        ([(0, 1), (1, 0)], ["n1"]),
        ([(0, 1), (2, 3)], ["n1", "n3"]),
    ],
)
def test_who_fails_with_most_others_is_named(failing: Sequence[tuple[int, int]], named: list[str]) -> None:
    facts = [good(r, f"n{r}", unreached={b: "10.0.0.9:1 timed out" for a, b in failing if a == r}) for r in range(4)]
    assert sorted(host for host, _ in found(hosts_of(*facts))) == named


def test_a_mistake_is_the_users_only_where_all_ranks_see_it() -> None:
    mistaken = ("recipe", "no such key")
    assert common_mistake(hosts_of(good(0, "a", mistake=mistaken), good(1, "b", mistake=mistaken))) == "no such key"
    one_sided = hosts_of(good(0, "a"), good(1, "b", mistake=mistaken))
    assert common_mistake(one_sided) is None and found(one_sided) == [("b", "recipe")]


def test_a_thousand_hosts_make_a_table_that_can_be_read() -> None:
    facts = [good(rank, f"n{rank // 8}") for rank in range(8 * 1000 - 8)]
    hosts = hosts_of(*facts, silent={8 * 999 + k: "n999" for k in range(8)})
    lines = host_table(hosts, judge(hosts)).splitlines()
    assert len(lines) == 2 + 17 + 1 + 3
    assert lines[18].split()[:3] == ["n999", "7992-7999", "FAIL"] and lines[19].startswith("983 more")
    assert "nothing heard of rank 7992-7999 within 15 s" in lines[21]


def test_hosts_share_a_directory_or_do_not(tmp_path: Path) -> None:
    probes = [OutputProbe(tmp_path / "a" / "run", rank, "t" * 32) for rank in range(2)]
    probes[0].begin()
    assert [probe.look(write=True) for probe in probes] == [None, None] and probes[0].sees(1)
    stranger = OutputProbe(tmp_path / "a" / "run", 1, "u" * 32)
    assert "not the one that rank 0 sees" in str(stranger.look(write=True))
    for probe in reversed(probes):
        probe.end()
    assert not list(tmp_path.iterdir())


def test_the_model_of_the_measured_all_reduce_takes_the_measured_time() -> None:
    measured = AllReduce(world=8, latency_s=1e-3, size=2**26, seconds=0.2, flops=1e12, memory=1e10)
    cluster = as_cluster(measured, 1e12)
    assert cluster.all_reduce_s(measured.size) == pytest.approx(measured.seconds)
    assert cluster.all_reduce_s(0) == pytest.approx(measured.latency_s)


def preflight(folder: Path) -> list[object]:
    recipe = {
        "corpus": {"path": str(chain_corpus(folder / "corpus")), "sequence_length": 32},
        "peers": {"student": {"model": bert(16, 1)}},
        "training": {"global_batch_rows": 8, "steps": 5},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "d.json").write_text('{"zero_optimization": {"stage": 1}}')
    line: list[object] = [ROOT / "launchers" / "preflight.py", "--recipe", folder / "recipe.json"]
    return [*line, "--deepspeed_config", folder / "d.json", "--output_dir", folder / "run"]


def test_two_ranks_on_one_machine_are_good(tmp_path: Path) -> None:
    ranks = start_ranks([*preflight(tmp_path), "--patience_s", PATIENCE_S], 2, tmp_path / "log")
    codes = [rank.wait(PATIENCE_S) for rank in ranks]
    said = (tmp_path / "log-rank0.log").read_text()
    assert codes == [0, 0], said
    assert said.splitlines()[2].split()[1:] == ["0-1", *["ok"] * 7, "skipped"]
    assert "all-reduce of" in said and "(this one)" in said and not (tmp_path / "run").exists()


def test_a_rank_that_does_not_come_is_missed_in_time(tmp_path: Path) -> None:
    line = [*preflight(tmp_path), "--patience_s", 2]
    first, second = start_ranks(line, 2, tmp_path / "log")
    second.kill()
    second.wait()
    assert first.wait(PATIENCE_S) == 1
    said = (tmp_path / "log-rank0.log").read_text()
    assert said.splitlines()[2].split()[1:3] == ["0-1", "FAIL"] and "nothing heard of rank 1 within 2 s" in said
