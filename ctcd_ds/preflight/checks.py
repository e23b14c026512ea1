"""What makes a host unfit for a job: one function a check, on what all ranks said of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ctcd_ds.preflight.probes import GIB, PACKAGES
from ctcd_ds.recipe.reading import is_corpus_place

CLOCK_S = 2.0  # more than that, and logs of several hosts no longer tell what came first


@dataclass(frozen=True)
class Facts:
    """What one rank says of itself, its host, and what it understood of the job. Seconds, bytes.

    unreached: the ranks that did not answer it, with the reason. ahead_s: its clock against rank 0's, exact to half of
    trip_s. output: why the output directory is not good here, or None.

    settings: the resolved recipe and the DeepSpeed JSON, flat. corpus: its fingerprint. checkpoint_bytes: of one
    checkpoint; checkpoints: how many there are at the same time, at most. accelerator: 'cpu' or 'cuda'. gpu: its name;
    gpu_problem: why it is not good. mistake: where recipe, config or corpus cannot be understood here, the check that
    it belongs to and its message.
    """

    rank: int
    host: str
    versions: Mapping[str, str]
    unreached: Mapping[int, str]
    ahead_s: float | None
    trip_s: float | None
    output: str | None
    free_bytes: int | None
    settings: Mapping[str, Any] | None = None
    corpus: str | None = None
    checkpoint_bytes: int = 0
    checkpoints: int = 1
    accelerator: str = "cpu"
    gpu: str | None = None
    gpu_problem: str | None = None
    mistake: tuple[str, str] | None = None


@dataclass(frozen=True)
class Finding:
    """A host that is not fit: which check says so, what is wrong, and what to do."""

    host: str
    check: str
    problem: str
    cure: str


@dataclass(frozen=True)
class Hosts:
    """All that rank 0 heard: the facts of the ranks that spoke, and the host of each rank that did not."""

    facts: list[Facts]
    silent: dict[int, str]
    patience_s: float

    @cached_property
    def ranks(self) -> dict[str, list[int]]:
        """The ranks of every host, hosts in the order of ranks."""
        ranks: dict[str, list[int]] = {}
        for rank, host in sorted([*((f.rank, f.host) for f in self.facts), *self.silent.items()]):
            ranks.setdefault(host, []).append(rank)
        return ranks

    @cached_property
    def speakers(self) -> list[Facts]:
        """The first rank of every host that was heard: it speaks of what is the same for all ranks there."""
        return list({facts.host: facts for facts in reversed(self.facts)}.values())[::-1]

    def odd(self, value: Callable[[Facts], str | None]) -> Iterator[tuple[str, str, str]]:
        """(host, its value, that of most hosts) where they differ; of two hosts, rank 0's counts. None is no value."""
        own = {facts.host: v for facts in self.speakers if (v := value(facts)) is not None}
        [(usual, _)] = Counter(own.values()).most_common(1) or [("", 0)]  # of equals the first, which is rank 0's
        return ((host, v, usual) for host, v in own.items() if v != usual)


def check_reach(hosts: Hosts) -> Iterator[Finding]:
    """Every rank came, and every rank got an answer from every other, on a port of its own."""
    for host in dict.fromkeys(hosts.silent.values()):
        missing = counted([rank for rank, where in hosts.silent.items() if where == host])
        yield Finding(
            host,
            "reach",
            f"nothing heard of rank {missing} within {hosts.patience_s:g} s",
            "is it up, does `ssh HOST hostname` work, does it reach the first host? What it printed itself says more. "
            "Hosts that start slowly need a larger --patience_s",
        )
    host_of = {facts.rank: facts.host for facts in hosts.facts}
    failures = [(facts.host, host_of[rank], why) for facts in hosts.facts for rank, why in facts.unreached.items()]
    while failures:
        # Whoever fails with most others is the one; of two, the one that did not answer and is not rank 0's.
        partners: dict[str, set[str]] = {}
        for asking, asked, _ in failures:
            partners.setdefault(asked, set()).add(asking)
            partners.setdefault(asking, set()).add(asked)
        asked_of, order = Counter(asked for _, asked, _ in failures), list(hosts.ranks)
        worst = max(partners, key=lambda host: (len(partners[host]), asked_of[host], order.index(host)))
        asking, asked, why = next(failure for failure in failures if worst in failure[:2])
        others = sorted(partners[worst] - {worst}) or ["itself"]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        yield Finding(
            worst,
            "reach",
            f"no connection with {others[0]}{more}: {asking} asked {asked} at {why}",
            "open all TCP ports between the hosts (gloo and NCCL take any free one); with several networks, name the "
            "right one's interface in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME",
        )
        failures = [failure for failure in failures if worst not in failure[:2]]


def check_versions(hosts: Hosts) -> Iterator[Finding]:
    """The same Python, packages and code of CTCD-DS everywhere."""
    cure = "the same environment on all hosts: from the same constraints.txt, or one on shared storage"
    for name in ("python", "ctcd_ds", *PACKAGES):
        for host, version, usual in hosts.odd(lambda facts: facts.versions[name]):  # noqa: B023 - used at once
            yield Finding(host, "versions", f"{name} {version}, elsewhere {usual}", cure)
    yield from _mistakes(hosts, "versions", cure)


def check_recipe(hosts: Hosts) -> Iterator[Finding]:
    """The same recipe and DeepSpeed config, key by key."""
    cure = "copy the recipe and the DeepSpeed config there again, or keep them on shared storage"
    for key in {key: None for facts in hosts.speakers for key in facts.settings or ()}:
        if not is_corpus_place(key.removeprefix("recipe.")):
            for host, value, usual in hosts.odd(lambda facts: _setting(facts, key)):  # noqa: B023 - used at once
                yield Finding(host, "recipe", f"{key} = {value}, elsewhere {usual}", cure)
    yield from _mistakes(hosts, "recipe", cure)


def check_corpus(hosts: Hosts) -> Iterator[Finding]:
    """The same corpus, by the fingerprint in its manifest; sizes and headers of its files were read."""
    cure = "copy the corpus there again, manifest.json last; `ctcd verify CORPUS` there reads every byte"
    for host, fingerprint, usual in hosts.odd(lambda facts: facts.corpus):
        yield Finding(host, "corpus", f"fingerprint {fingerprint[:12]}…, elsewhere {usual[:12]}…", cure)
    yield from _mistakes(hosts, "corpus", cure)


def check_output(hosts: Hosts) -> Iterator[Finding]:
    """One output directory that all hosts see and may write to."""
    cure = "name an --output_dir on storage that all hosts mount at the same path and may write to"
    return (Finding(facts.host, "output", facts.output, cure) for facts in hosts.facts if facts.output)


def check_space(hosts: Hosts) -> Iterator[Finding]:
    """Room for all checkpoints that this recipe keeps at the same time."""
    for facts in hosts.speakers:
        size, number = facts.checkpoint_bytes, facts.checkpoints
        if facts.free_bytes is not None and facts.free_bytes < size * number:
            yield Finding(
                facts.host,
                "space",
                f"{facts.free_bytes / GIB:.2f} GiB free, {size * number / GIB:.2f} GiB needed for {number} checkpoints "
                f"of {size / GIB:.2f} GiB",
                "make room, name another --output_dir, or keep fewer (training.keep_checkpoints)",
            )


def check_clock(hosts: Hosts) -> Iterator[Finding]:
    """Clocks that agree with rank 0's."""
    for facts in hosts.speakers:
        if facts.ahead_s is not None and abs(facts.ahead_s) > CLOCK_S + (facts.trip_s or 0.0) / 2:
            way = "ahead of" if facts.ahead_s > 0 else "behind"
            problem = f"the clock is {abs(facts.ahead_s):.1f} s {way} that of {next(iter(hosts.ranks))}"
            yield Finding(facts.host, "clock", problem, "set it (`chronyc makestep`) and keep chrony or ntpd running")


def check_gpu(hosts: Hosts) -> Iterator[Finding]:
    """A GPU for each rank, the same everywhere, with nobody else on it."""
    for host, accelerator, usual in hosts.odd(lambda facts: facts.accelerator):
        cure = "does nvidia-smi show the GPUs there, and is DS_ACCELERATOR the same on all hosts?"
        yield Finding(host, "GPU", f"runs on {accelerator}, elsewhere on {usual}", cure)
    for host, name, usual in hosts.odd(lambda facts: facts.gpu):
        yield Finding(host, "GPU", f"{name}, elsewhere {usual}", "take equal hosts: the slowest sets the pace")
    for facts in hosts.facts:
        if facts.gpu_problem:
            cure = "`nvidia-smi` there shows what runs: end it, or take the host out of the job"
            yield Finding(facts.host, "GPU", f"rank {facts.rank} {facts.gpu_problem}", cure)


CHECKS: dict[str, Callable[[Hosts], Iterator[Finding]]] = {
    "reach": check_reach,
    "versions": check_versions,
    "recipe": check_recipe,
    "corpus": check_corpus,
    "output": check_output,
    "space": check_space,
    "clock": check_clock,
    "GPU": check_gpu,
}


def judge(hosts: Hosts) -> list[Finding]:
    """What every check found, each finding once."""
    return list(dict.fromkeys(finding for check in CHECKS.values() for finding in check(hosts)))


def common_mistake(hosts: Hosts) -> str | None:
    """The message of a mistake that every rank sees alike: it is the user's, and no host's."""
    mistakes = {facts.mistake for facts in hosts.facts}
    mistake = mistakes.pop() if len(mistakes) == 1 else None
    return mistake[1] if mistake else None


def counted(ranks: list[int]) -> str:
    """'0-3', or '0, 2' where one is missing between."""
    whole = len(ranks) > 1 and ranks == list(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]}-{ranks[-1]}" if whole else ", ".join(map(str, ranks))


def _mistakes(hosts: Hosts, check: str, cure: str) -> Iterator[Finding]:
    """Hosts that could not understand their files, under the check that it belongs to."""
    for facts in hosts.facts:
        if facts.mistake and facts.mistake[0] == check:
            yield Finding(facts.host, check, facts.mistake[1], cure)


def _setting(facts: Facts, key: str) -> str | None:
    settings = facts.settings
    return None if settings is None else repr(settings[key]) if key in settings else "not set"
