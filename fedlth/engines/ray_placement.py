"""Where Ray workers go: what one worker takes of a node, and how many fit without sharing what cannot be shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedlth.errors import StudyError
from fedlth.study import sections

EPSILON = 1e-9  # 0.3 / 0.1 must be 3
GRAIN = 1e-4  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class Share:
    """What one worker takes: `cpus`, and `gpu`, the part of one GPU (0 for none)."""

    cpus: float
    gpu: float

    @property
    def per_gpu(self) -> int:
        """How many workers one GPU holds: 2 at 0.4, since the last 0.2 of two GPUs are not one place for a third."""
        return int(1 / self.gpu + EPSILON)

    @property
    def asked_gpu(self) -> float:
        """The part that Ray is asked for: rounded down, since Ray rounds 1/7 to 0.1429 and then fits only six."""
        return max(GRAIN, int(self.gpu / GRAIN + EPSILON) * GRAIN) if self.gpu else 0.0

    def fits(self, node: Mapping[str, float]) -> int | None:
        """Return how many workers a node of `CPU` and `GPU` holds; None where it takes nothing of it."""
        limits = []
        if self.cpus:
            limits.append(int(node.get("CPU", 0) / self.cpus + EPSILON))
        if self.gpu:
            limits.append(int(node.get("GPU", 0)) * self.per_gpu)
        return min(limits) if limits else None


def share_of(ray: sections.Ray, *, device: str, total_memory_mb: Callable[[], int | None]) -> Share:
    """Return what one worker takes; `total_memory_mb` asks this machine's smallest GPU, None where there is none.

    Raises StudyError for what no placement can serve.
    """
    if device not in ("cpu", "auto", "cuda"):
        raise StudyError(f"device: must be cpu, cuda or auto under Ray, which picks the GPU itself, got {device!r}")
    if ray.logical_gpus is not None and ray.address is not None:
        raise StudyError("ray.logical_gpus: only for a Ray that is started here, but ray.address names another")
    if ray.num_gpus and ray.gpu_memory_mb is not None:
        raise StudyError("ray: give num_gpus or gpu_memory_mb, not both")
    gpu = ray.num_gpus
    if ray.gpu_memory_mb is not None:
        total = ray.gpu_total_memory_mb or total_memory_mb()
        if total is None:
            raise StudyError("ray.gpu_total_memory_mb: required with gpu_memory_mb, since there is no GPU here to ask")
        if ray.gpu_memory_mb > total:
            raise StudyError(f"ray.gpu_memory_mb: must be at most a GPU's {total} MB, got {ray.gpu_memory_mb}")
        gpu = ray.gpu_memory_mb / total
    if gpu > 1:
        raise StudyError(f"ray.num_gpus: must be at most 1, since a client trains on one GPU, got {gpu:g}")
    if 0 < gpu < GRAIN:
        raise StudyError(f"ray.num_gpus: must be 0 or at least {GRAIN}, got {gpu:g}")
    if device == "cuda" and not gpu:
        raise StudyError("ray.num_gpus: must be above 0 with device cuda (or give ray.gpu_memory_mb), got 0")
    return Share(ray.num_cpus, gpu)


def count(share: Share, nodes: Sequence[Mapping[str, float]], *, wanted: int) -> int:
    """Return how many workers to run on these nodes: at most `wanted`; raise StudyError where not one fits."""
    found = room(share, nodes, wanted=wanted)
    if not found:
        raise StudyError(f"ray: {_why(share, nodes)}")
    return found


def room(share: Share, nodes: Sequence[Mapping[str, float]], *, wanted: int) -> int:
    """Return how many workers fit on these nodes, `wanted` at most."""
    return min(wanted, _places(share, nodes, wanted))


def shortage(share: Share, nodes: Sequence[Mapping[str, float]], *, wanted: int) -> str:
    """Return one line that says why fewer than `wanted` workers fit on these nodes, "" where all do."""
    places = _places(share, nodes, wanted)
    return "" if places >= wanted else f"note: ray.workers: {places} work, got {wanted}: {_why(share, nodes)}"


def taken(
    share: Share, nodes: Sequence[Mapping[str, float]], free: Sequence[Mapping[str, float]], *, size: int, wait_s: float
) -> str:
    """Return one line that says what others have taken where fewer than `size` workers fit now, "" where all do.

    `free` is what is left of each of `nodes`. A GPU's rest counts as whole even where it is the rest of two.
    """
    wanted = [(key, part) for key, part in (("CPU", share.cpus), ("GPU", share.gpu)) if part]
    fit = [min((int(node.get(key, 0.0) / part + EPSILON) for key, part in wanted), default=size) for node in free]
    now = sum(fit)
    if now >= size:
        return ""
    said = f"{now} of {size} workers fit now" if now else f"no room for a worker now, the wait is at most {wait_s:g} s"
    return f"note: ray: {said}; {_takes(share)}; taken by other jobs: {in_use(nodes, free)}"


def in_use(nodes: Sequence[Mapping[str, float]], free: Sequence[Mapping[str, float]]) -> str:
    """Say how much of all nodes' resources is taken."""
    return ", ".join(f"{_sum(nodes, key) - _sum(free, key):g} of {_sum(nodes, key):g} {key}s" for key in ("CPU", "GPU"))


def _sum(nodes: Sequence[Mapping[str, float]], key: str) -> float:
    return round(sum(node.get(key, 0.0) for node in nodes), 4)


def _places(share: Share, nodes: Sequence[Mapping[str, float]], wanted: int) -> int:
    return sum(wanted if n is None else n for n in map(share.fits, nodes))


def _takes(share: Share) -> str:
    return f"a worker takes {share.cpus:g} CPUs and {share.gpu:g} of a GPU"


def _why(share: Share, nodes: Sequence[Mapping[str, float]]) -> str:
    have = "; ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes) or "none"
    return f"{_takes(share)}, the nodes have: {have}"
